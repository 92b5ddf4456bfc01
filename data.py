"""From text to batches: source, documents, WordPiece ids, examples of two segments, shards, training order.

What enters: files, archives or addresses of text, among them OpenWebText, or the documentation that Python,
torch and numpy ship. What leaves: a cache of `.npy` shards, uint16 (rows, max_length), zero-padded, and from
it the rows of every step. The disk holds that one array: attention mask and token types follow from the ids.
`python data.py --data PATH` prepares a cache ahead of time; training has the same done by a process beside
it.

Claim: the same input, vocabulary and seed give the same bytes, in one go, over broken connections or after
any number of kills (test_cache_*, test_a_stream_*), and row g of the training order is a function of the seed
and g alone (test_order_*).
"""

import argparse
import ast
import fcntl
import gzip
import hashlib
import importlib.metadata
import importlib.util
import inspect
import io
import itertools
import json
import lzma
import math
import os
import platform
import random
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import tempfile
import threading
import time
import zlib
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path
from urllib.parse import urlsplit

import numpy as np
import requests
import urllib3
from requests.adapters import HTTPAdapter
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers
from tqdm import tqdm

PAD, UNK, CLS, SEP, MASK = SPECIAL_TOKENS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
# hub: stands for the hub's host. This revision still has the tars, which the main branch replaced by parquet.
OPENWEBTEXT = [f"hub:/datasets/Skylion007/openwebtext/resolve/39d1a6d3f3a4c838b27bbc65bfb14a2f6f727740"
               f"/subsets/urlsf_subset{number:02d}.tar" for number in range(21)]
OFFLINE = "once it can, the same command goes on; --data PATH or --data python-docs need no network"
TIMEOUT, ATTEMPTS, BACKOFF = 30, 6, 0.5  # seconds; in a row; seconds, and twice as many each time
BERT_VOCAB = dict(  # BERT's uncased vocabulary, which is ELECTRA's
    address="hub:/google/electra-small-discriminator/resolve/main/vocab.txt",
    size=231_508,
    sha256="07eced375cec144d27c900241f3e339478dec958f92fddbc551f295c992038a3",
)
UNIT_CHARACTERS = 4_000_000  # of text become one shard, some 6,000 rows of 128
MAX_GROUP = 64  # shards that are shuffled together, at most: some 50 MB
MAX_DOCUMENT = 100_000_000  # bytes; what is longer is surely not one document
MAX_LINE = 65_536  # characters of a line that are tokenised
ENCODED_CHARACTERS = 1_000_000  # characters that are tokenised in one call
VOCAB_CHARACTERS = 200_000_000  # from the beginning of the corpus, to train a vocabulary on
HELDOUT_SHARE = 100  # one document in so many is held out


@dataclass(frozen=True)
class DataConfig:
    """What text, and how it becomes rows."""

    data: list = ("openwebtext",)  # files, folders, addresses of text, openwebtext, or python-docs
    one_document_per_file: bool = False  # blank lines in .txt files do not separate documents
    vocab: str = "bert"  # a vocab.txt; train:SIZE, made of the text; or bert, downloaded once
    do_lower_case: bool = True  # lower-case the text
    strip_accents: bool = True  # strip accents, where the text is lower-cased
    max_length: int = 128  # tokens in a row, [CLS] and [SEP] included
    seed: int = 0  # of everything that is random
    workers: int = os.cpu_count()  # threads that tokenise
    cache: str = "cache"  # folder for prepared text and vocabularies

    def __post_init__(self):
        if self.max_length < 8:
            sys.exit(f"max_length is {self.max_length}; a row needs 8 tokens at the least")
        if not 0 <= self.seed < 2**63 or self.workers < 1:
            sys.exit("seed must be from 0 to 2^63 - 1, and workers 1 or more")


# ------------------------------------------------------------------------------------------------------------
# Sources: what was typed -> files and addresses -> bytes

READABLE = re.compile(r"\.(txt|jsonl|tar)(\.gz|\.xz)?$")


def find_files(config):
    """The corpus as a list of paths and addresses in a fixed order: as typed, the files of a folder by
    name."""
    files = []
    for argument in config.data:
        path = Path(argument)
        if argument == "python-docs" or is_address(argument):
            files.append(argument)
        elif argument == "openwebtext":
            files += OPENWEBTEXT
        elif path.is_dir():
            found = sorted(file for file in path.rglob("[!.]*") if READABLE.search(file.name))
            if not found:
                sys.exit(f"{path} has no .txt, .jsonl or .tar file in it, nor one of these with .gz or .xz")
            files += found
        elif not path.exists():
            sys.exit(f"there is no {path}; --data takes files, folders, addresses, openwebtext, python-docs")
        else:
            files += read_addresses(path) or [path]
    for file in files:
        if file != "python-docs" and not READABLE.search(path_of(file)):
            sys.exit(f"{file} cannot be read: .txt, .jsonl and .tar can, and these with .gz or .xz")
    return files


def is_address(name):
    return str(name).startswith(("http://", "https://", "hub:"))


def path_of(file):
    return urlsplit(file).path if is_address(file) else str(file)


def url_of(address):
    hub = os.environ.get("HF_ENDPOINT", "https://huggingface.co").rstrip("/")
    return hub + address.removeprefix("hub:") if address.startswith("hub:") else address


def read_addresses(path):
    """The addresses in a .txt file that begins with one; else none, and it is text."""
    if path.suffix != ".txt":
        return []
    with open(path, "rb") as file:
        if not file.read(8).startswith((b"http://", b"https://")):
            return []
        file.seek(0)
        addresses = file.read().decode("utf-8", "replace").split()
    if not all(map(is_address, addresses)):
        sys.exit(f"{path} begins with an address, so it must hold addresses only, one a line")
    return addresses


def identify(file):
    """What tells whether a file is still the one that a cache was made from.

    Of an address it is the address alone; HttpStream sees to it that what is there stays the same.
    """
    if file == "python-docs":
        return [file, platform.python_version(), *map(importlib.metadata.version, ("torch", "numpy"))]
    return [file] if is_address(file) else [str(file), file.stat().st_size, file.stat().st_mtime_ns]


class Retry(urllib3.Retry):
    """urllib3's, but it says why it waits."""

    def sleep(self, response=None):
        last = self.history[-1]
        say_waiting(last.url, last.error or f"it answers {last.status}", self.get_backoff_time())
        super().sleep(response)


def say_waiting(url, why, seconds):
    if seconds:  # the first new attempt comes at once
        tqdm.write(f"{url}: {why}; trying again in {seconds:.0f} s", file=sys.stderr)


def patient_session():
    """A session that tries again, for half a minute, where a connection or the server fails."""
    retry = Retry(ATTEMPTS, status_forcelist=[429, 500, 502, 503, 504], backoff_factor=BACKOFF)
    session = requests.Session()
    for scheme in ("http://", "https://"):
        session.mount(scheme, HTTPAdapter(max_retries=retry))
    return session


class Missing(SystemExit):
    """There is nothing at an address."""


class HttpStream(io.RawIOBase):
    """What is at an address, from byte `offset` on, as a binary file. A body that breaks off is continued.

    The session tries again where no answer comes, `wait_after` where an answer breaks off, ATTEMPTS times
    each.
    `seen` maps addresses to the (ETag, length) first found there. It is added to; what is there must agree
    with it. `instead` says what the user can do where that fails.
    """

    def __init__(self, address, offset, seen, instead=OFFLINE):
        self.address, self.url, self.position, self.seen = address, url_of(address), offset, seen
        self.instead = instead
        self.response, self.length, self.failures = None, None, 0
        self.session = patient_session()

    def readable(self):
        return True

    def close(self):
        self.disconnect()
        self.session.close()
        super().close()

    def disconnect(self):
        if self.response is not None:
            self.response.close()
        self.response = None

    def readinto(self, buffer):
        while self.length is None or self.position < self.length:
            try:
                if self.response is None:
                    self.connect()  # whose own errors come after as many attempts, and end it
                data = self.response.raw.read(min(len(buffer), self.length - self.position))
                if not data:
                    self.raise_broken()
            except requests.RequestException as error:
                reason = getattr(error.args[0], "reason", error) if error.args else error
                sys.exit(f"{self.url} cannot be read: {ATTEMPTS + 1} attempts in a row failed, the last "
                         f"with: {reason}; {self.instead}")
            except urllib3.exceptions.HTTPError as error:
                self.wait_after(error)
                continue
            buffer[: len(data)] = data
            self.position, self.failures = self.position + len(data), 0
            return len(data)
        return 0

    def connect(self):
        """Ask for what is missing, following redirects anew, and see that it is the rest of the same
        thing."""
        headers = {"Range": f"bytes={self.position}-", "Accept-Encoding": "identity"}
        self.response = response = self.session.get(self.url, headers=headers, stream=True, timeout=TIMEOUT)
        status, told = response.status_code, response.headers
        part = re.fullmatch(r"bytes (?:(\d+)-\d+|\*)/(\d+)", told.get("Content-Range", ""))
        if status in (206, 416) and part:  # 416: nothing from here on, as it is empty or shorter than it was
            begin, length = int(part[1] or self.position), int(part[2])
        elif status == 200 and told.get("Content-Length", "").isdecimal():
            begin, length = 0, int(told["Content-Length"])
        elif status in (200, 206):
            begin, length = -1, -1  # it does not say
        else:
            message = f"{self.url} cannot be read: it answers {status} {response.reason}; {self.instead}"
            raise (Missing if status == 404 else SystemExit)(message)
        # Servers may call a .gz file encoded that is sent as it is; what else is encoded cannot be continued.
        is_encoded = told.get("Content-Encoding", "identity") != "identity" and not self.url.endswith(".gz")
        if begin not in (0, self.position) or is_encoded:
            sys.exit(f"{self.url} cannot be read: the server does not say which part it sends of how long a "
                     f"whole, or compresses it on the way; {self.instead}")
        # What the hub has at a pinned revision is the same everywhere, whatever ETag a mirror gives it.
        found = [None if self.address in OPENWEBTEXT else told.get("ETag"), length]
        known = self.seen.setdefault(self.address, found)
        if known != found:
            sys.exit(f"{self.url} is no longer what it was: its ETag and length are {found}, not {known}; "
                     "take another --cache to begin anew")
        while begin < self.position:  # a server that does not know Range begins at the beginning
            begin += len(response.raw.read(min(1 << 20, self.position - begin)) or self.raise_broken())
        self.length = length

    def raise_broken(self):
        raise urllib3.exceptions.ProtocolError("the body ended early")

    def wait_after(self, error):
        self.disconnect()
        self.failures += 1
        if self.failures > ATTEMPTS:
            sys.exit(f"{self.url} cannot be read: {self.failures} attempts in a row broke off at byte "
                     f"{self.position:,}, the last with: {error}; {self.instead}")
        seconds = min(60, BACKOFF * 2**self.failures)
        say_waiting(self.url, f"broke off at byte {self.position:,} ({error})", seconds)
        time.sleep(seconds)


# ------------------------------------------------------------------------------------------------------------
# Documents

DAMAGE = (EOFError, zlib.error, gzip.BadGzipFile, lzma.LZMAError, tarfile.TarError)


class Damage(Exception):
    """What a file or a member of an archive holds cannot be read; the message names it."""


def read_documents(config, start=(0, 0, 0), seen=None):
    """Yield (position, group, text) from the document at position `start` on.

    A position is (file, offset, index): where in an uncompressed tar the document's member begins, else 0,
    and the number of the document from there. Documents with the same group, not None, are from the same
    inner archive.
    """
    seen = {} if seen is None else seen
    for number, file in enumerate(find_files(config)):
        if number < start[0]:
            continue
        offset, index = start[1:] if number == start[0] else (0, 0)
        damaged = None
        while True:
            try:
                for at, group, text in read_file(file, offset, index, config, seen):
                    # Without "\r", so that copies of a document are the same text.
                    if text := text.replace("\r\n", "\n").strip():
                        yield (number, *at), group and (number, group), text
                    offset, index = at[0], at[1] + 1
                break
            except Damage as damage:
                # Only in an uncompressed tar is what came before the damage known to be whole.
                if damaged == (offset, index) or not path_of(file).endswith(".tar"):
                    sys.exit(f"{damage}; make or fetch it again")
                damaged = offset, index  # perhaps it was damaged on its way here: once more from there


def read_file(file, offset, index, config, seen):
    """Yield ((offset, index), group, text) for the documents of one file, from a position in it on."""
    if file == "python-docs":
        documents = ((0, None, text) for text in python_docs(config.cache))
        stream = io.BytesIO()
    elif is_address(file):
        stream = io.BufferedReader(HttpStream(file, offset, seen), 1 << 20)
    else:
        stream = open(file, "rb")
        stream.seek(offset)
    with stream:
        name = path_of(file)
        if kind_of(name) == "tar":
            documents = read_tar(stream, name, file, offset)
        elif file != "python-docs":
            texts = read_text(stream, name, file, config.one_document_per_file)
            documents = ((0, None, text) for text in texts)
        last, number = offset, -1
        for where, group, text in documents:
            last, number = where, number + 1 if where == last else 0
            if where > offset or number >= index:
                yield (where, number), group, text


class Member(tarfile.TarInfo):
    """A member of an archive that must not end without its end mark, as tarfile would let it."""

    @classmethod
    def fromtarfile(cls, tar):
        try:
            return super().fromtarfile(tar)
        except (tarfile.EmptyHeaderError, tarfile.TruncatedHeaderError, tarfile.InvalidHeaderError) as error:
            raise tarfile.ReadError(f"no end mark, but {error}") from error

    def _proc_member(self, tar):
        if not self.isfile() and self.size > 1 << 20:  # an extended header, which tarfile reads whole
            raise tarfile.ReadError(f"a header of {self.size:,} bytes")
        return super()._proc_member(tar)


def read_tar(stream, name, source, base):
    """Yield (offset, group, text) for what a tar holds. Nothing is written to the disk.

    Members are .txt, one document each, .jsonl, and tars of these, as which OpenWebText's *_data.xz count
    too. `base` is where in the source the stream began.
    """
    with (told_as_damage(source), decompress(stream, name) as file,
          tarfile.open(fileobj=file, mode="r|", tarinfo=Member) as tar):
        while member := tar.next():
            tar.members.clear()  # or else it would grow with the archive
            inside = f"{member.name} in {source}"
            offset = base + member.offset if file is stream else 0
            if not member.isfile():
                continue
            kind = kind_of(member.name)
            if kind in ("txt", "jsonl"):
                for text in read_text(tar.extractfile(member), member.name, inside, whole=True):
                    yield offset, None, text
            elif kind == "tar" or member.name.endswith(".xz"):
                # Held back until the end is reached, and with it the checksum, or the archive is a large one.
                inner, size = [], 0
                for _, _, text in read_tar(tar.extractfile(member), member.name, inside, 0):
                    inner.append((offset, 1 + base + member.offset, text))
                    size += len(text)
                    if size > 4 * UNIT_CHARACTERS:
                        yield from inner
                        inner.clear()
                yield from inner
        while file is not stream and file.read(1 << 20):
            pass  # what follows the end mark, for the checksum of the whole


def read_text(stream, name, source, whole):
    """Yield the documents of a .jsonl file, one a line, or of a .txt file, separated by blank lines or one
    whole."""
    with told_as_damage(source), decompress(stream, name) as file:
        if kind_of(name) == "jsonl":
            for number, (line, _) in enumerate(read_lines(file, source), 1):
                if line.strip():
                    yield text_of_json(line, f"{source}, line {number}")
            return
        if whole:
            raw = file.read(MAX_DOCUMENT + 1)
            check_document(len(raw), source)
            yield decode(raw, source)
            return
        document, start = io.StringIO(), 0  # many short lines in a list would take many times their size
        for line, end in read_lines(file, source):
            check_document(end - start, source)
            if line.strip():
                document.write(line)
            else:
                yield document.getvalue()
                document, start = io.StringIO(), end
        yield document.getvalue()


def kind_of(name):
    """txt, jsonl, tar, or None for what cannot be read."""
    match = READABLE.search(name)
    return match and match[1]


def decompress(stream, name):
    opener = {".gz": gzip.open, ".xz": lzma.open}.get(name[-3:])
    return opener(stream) if opener else stream


@contextmanager
def told_as_damage(source):
    try:
        yield
    except DAMAGE as error:
        raise Damage(f"{source} is damaged or cut short ({error})") from error


def read_lines(file, source):
    """Yield (line, byte offset of its end). Only "\\n" ends a line; str.splitlines also cuts at U+2028 and
    others."""
    offset = 0
    while raw := file.readline(MAX_DOCUMENT + 1):
        if len(raw) > MAX_DOCUMENT:
            sys.exit(f"{source} has a line of over {MAX_DOCUMENT:,} bytes; it is hardly text")
        yield decode(raw, source, offset), offset + len(raw)
        offset += len(raw)


def decode(raw, source, offset=0):
    try:
        text = raw.decode()
    except UnicodeDecodeError as error:
        sys.exit(f"{source} is not UTF-8 at byte {offset + error.start}; convert it, perhaps with iconv")
    return text if offset else text.removeprefix("\ufeff")


def check_document(size, source):
    if size > MAX_DOCUMENT:
        sys.exit(f"{source} has a document of over {MAX_DOCUMENT:,} bytes; is it one, and is it text?")


def text_of_json(line, where):
    try:
        text = json.loads(line)["text"]
    except (ValueError, TypeError, KeyError, RecursionError):
        text = None
    if not isinstance(text, str):
        sys.exit(f'{where}: a line of a .jsonl file must be an object with a string under "text"')
    return text.encode("utf-8", "replace").decode()  # JSON can hold half a surrogate pair


DOCUMENTED = (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)


def python_docs(folder):
    """Some 9 MB of real English that every machine has: Python's help topics, and the docstrings of the
    standard library, torch and numpy, one document per module.

    The files are parsed, never imported. Since that takes half a minute, the documents are kept in `folder`.
    """
    kept = Path(folder) / f"python-docs-{digest(identify('python-docs'))}.json"
    if kept.exists():
        return json.loads(kept.read_bytes())
    roots = [Path(sysconfig.get_path("stdlib"))]
    roots += [Path(importlib.util.find_spec(package).origin).parent for package in ("torch", "numpy")]
    paths = [(path, path.relative_to(root).parts) for root in roots for path in sorted(root.rglob("*.py"))]
    documents = []
    for path, inside in tqdm(paths, desc="reading python-docs", unit=" files", disable=None):
        if inside[0] == "site-packages" or {"test", "tests", "idle_test"} & set(inside):
            continue
        source = path.read_bytes()
        if inside == ("pydoc_data", "topics.py"):
            [topics] = [node.value for node in ast.parse(source).body if isinstance(node, ast.Assign)]
            documents += ast.literal_eval(topics).values()
        elif b'"""' in source:
            documents.append("\n".join(docstrings(source)))
    # In an order without meaning, so that each shard is a mixture.
    documents = sorted(filter(None, documents), key=lambda text: hashlib.sha256(text.encode()).digest())
    with atomic_write(kept) as file:
        file.write(json.dumps(documents).encode())
    return documents


def docstrings(source):
    """Yield the docstrings of a module's source, its classes and functions, in the order of the text."""
    try:
        nodes = [ast.parse(source)]
    except SyntaxError:  # torch ships a few files in the syntax of newer Pythons
        return
    while nodes:
        node = nodes.pop()
        if text := ast.get_docstring(node):
            yield text
        nodes += reversed([child for child in node.body if isinstance(child, DOCUMENTED)])


# ------------------------------------------------------------------------------------------------------------
# WordPiece


class WordPiece:
    """A vocabulary, `tokens` in the order of their ids, and the rules by which text becomes ids.

    No text becomes a special token: "[SEP]" is the three tokens "[", "sep" and "]".
    """

    def __init__(self, tokens, do_lower_case=True, strip_accents=True):
        self.tokens, self.do_lower_case = tokens, do_lower_case
        self.strip_accents = do_lower_case and strip_accents
        ids = {token: number for number, token in enumerate(tokens)}
        self.cls_token_id, self.sep_token_id, self.mask_token_id = ids[CLS], ids[SEP], ids[MASK]
        self.sha256 = hashlib.sha256("\n".join(tokens).encode()).hexdigest()
        self.tokenizer = blank_tokenizer(self.do_lower_case, self.strip_accents)
        # As in the official code, only a word of over 200 characters is [UNK] by its length.
        self.tokenizer.model = models.WordPiece(ids, unk_token=UNK, max_input_chars_per_word=200)
        # The same without a normalizer, for lines that need none.
        self.unnormalized = Tokenizer(self.tokenizer.model)
        self.unnormalized.pre_tokenizer = self.tokenizer.pre_tokenizer

    def encode(self, lines):
        """A list of lines -> a list of lists of ids, without special tokens."""
        # Printable ASCII has nothing to clean, strip or space out. What would be left to the normalizer, a
        # third of all the time, is to lower the case, which Python does at next to no cost.
        plain = [line.isascii() and line.isprintable() for line in lines]
        easy = [line.lower() if self.do_lower_case else line for line in itertools.compress(lines, plain)]
        others = [line for line, is_plain in zip(lines, plain, strict=True) if not is_plain]
        easy_ids = encode_in_parts(self.unnormalized, easy)
        other_ids = encode_in_parts(self.tokenizer, others)
        return [next(easy_ids if is_plain else other_ids) for is_plain in plain]

    def decode(self, ids):
        """Readable text, with special tokens and without padding."""
        return " ".join(self.tokens[i] for i in ids if i).replace(" ##", "")


def encode_in_parts(tokenizer, lines):
    """Yield the ids of each line, tokenised in parallel, but not all at once, since that takes memory.

    A part ends where the running total of characters passes a multiple of ENCODED_CHARACTERS.
    """
    pairs = zip(lines, itertools.accumulate(map(len, lines)), strict=True)
    for _, part in itertools.groupby(pairs, lambda pair: pair[1] // ENCODED_CHARACTERS):
        for encoding in tokenizer.encode_batch_fast([line for line, _ in part], add_special_tokens=False):
            yield encoding.ids


def blank_tokenizer(do_lower_case, strip_accents):
    tokenizer = Tokenizer(models.WordPiece(unk_token=UNK))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=do_lower_case, strip_accents=strip_accents)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    return tokenizer


def load_wordpiece(config):
    """The WordPiece that config.vocab names: a file, BERT's, or one trained on the text."""
    find_files(config)  # what is not there is said before anything is downloaded
    # What tokenizers reads when it first runs in parallel.
    os.environ.update(RAYON_NUM_THREADS=str(config.workers), TOKENIZERS_PARALLELISM="true")
    path, make = Path(config.vocab), None
    if config.vocab == "bert":
        path = Path(config.cache) / "bert-uncased-vocab.txt"
        instead = "or take --vocab FILE, or --vocab train:8192 for one trained on your text"
        make = partial(download, path, **BERT_VOCAB, instead=instead)
    elif match := re.fullmatch(r"train:(\d+)", config.vocab):
        # Training is not reproducible to the byte, so a vocabulary is trained once for a text and kept.
        made_from = [[identify(file) for file in find_files(config)], config.one_document_per_file,
                     config.do_lower_case, config.strip_accents, match[1]]
        path = Path(config.cache) / f"{source_name(config)}-{digest(made_from)}-vocab.txt"
        make = partial(train_vocab, config, int(match[1]), path)
    if make is not None:
        make_once(path, make)
    return WordPiece(read_vocab(path), config.do_lower_case, config.strip_accents)


def train_vocab(config, size, path):
    """Train a vocabulary of at most `size` tokens on the beginning of the text and write it to `path`."""
    check_vocab_size(size, config.vocab)
    total = 0

    def lines():
        nonlocal total
        for _, _, text in read_documents(config):
            total += len(text)
            if total > VOCAB_CHARACTERS:
                return
            yield from text.split("\n")

    tokenizer = blank_tokenizer(config.do_lower_case, config.do_lower_case and config.strip_accents)
    # Each letter takes two places, within a word and at its beginning; rare ones must leave room for words.
    trainer = trainers.WordPieceTrainer(vocab_size=size, special_tokens=SPECIAL_TOKENS, show_progress=False,
                                        limit_alphabet=max(1, size // 4))
    tokenizer.train_from_iterator(lines(), trainer)
    if not total:
        sys.exit(f"{' '.join(config.data)} holds no text to train a vocabulary on")
    ids = tokenizer.get_vocab()
    with atomic_write(path) as file:
        file.write("".join(token + "\n" for token in sorted(ids, key=ids.get)).encode())


def read_vocab(path):
    """The tokens of a vocab.txt, one a line, in the order of their ids."""
    if not path.is_file():
        sys.exit(f"there is no vocabulary {path}; --vocab takes a vocab.txt, train:SIZE or bert")
    try:
        lines = path.read_bytes().decode("utf-8-sig").removesuffix("\n").split("\n")
    except UnicodeDecodeError as error:
        sys.exit(f"the vocabulary {path} is not UTF-8 at byte {error.start}")
    tokens = [line.removesuffix("\r") for line in lines]
    if missing := [token for token in SPECIAL_TOKENS if token not in tokens]:
        sys.exit(f"the vocabulary {path} lacks {', '.join(missing)}")
    if tokens[0] != PAD:
        sys.exit(f"the vocabulary {path} must begin with {PAD}, since padding is id 0")
    if len(set(tokens)) < len(tokens):
        sys.exit(f"the vocabulary {path} has a token twice: {max(tokens, key=tokens.count)!r}")
    check_vocab_size(len(tokens), path)
    return tokens


def check_vocab_size(size, name):
    if not len(SPECIAL_TOKENS) < size <= 65_535:
        sys.exit(f"the vocabulary {name} has {size:,} tokens; 6 to 65,535 are possible, as rows are uint16")


def download(path, address, instead, size=None, sha256=None):
    """Fetch what is at an address whole to `path`, and check its size in bytes and SHA-256, where given.

    `instead` says what else the user can do.
    """
    seen = hashlib.sha256()
    with (HttpStream(address, 0, {}, f"try again, {instead}") as stream, atomic_write(path) as file,
          tqdm(desc=path.name, total=size, unit="B", unit_scale=True, leave=False, disable=None) as bar):
        while chunk := stream.read(1 << 16):
            file.write(chunk)
            seen.update(chunk)
            bar.update(len(chunk))
        if size is not None and (file.tell(), seen.hexdigest()) != (size, sha256):
            sys.exit(f"{stream.url} has {file.tell()} bytes with SHA-256 {seen.hexdigest()} instead of "
                     f"{size} bytes with {sha256}; try again, {instead}")


# ------------------------------------------------------------------------------------------------------------
# Examples of two segments


def segment(lines, max_length, uniform):
    """Cut one document into examples: yield (first, second, number of ids dropped); second is often empty.

    `lines` is a list of lists of ids, one for each line of the document; `uniform()` draws from [0, 1).
    It is called once per document, so no example crosses the end of one. [D01]
    """
    current, length, target = [], 0, draw_target(max_length, uniform)
    for line in lines:
        current.append(line)
        length += len(line)
        if length >= target:
            yield split(current, target, max_length, uniform)
            current, length, target = [], 0, draw_target(max_length, uniform)
    if length:
        yield split(current, target, max_length, uniform)


def draw_target(max_length, uniform):
    """The number of ids to aim at: mostly max_length, with probability 0.05 anything from 5 to it. [D03]

    Unlike the official code, where a target carries over to the next document, each document begins with a
    draw of its own, so that what becomes of it does not depend on those before it.
    """
    return 5 + int(uniform() * (max_length - 4)) if uniform() < 0.05 else max_length


def split(lines, target, max_length, uniform):
    """Deal lines out to two segments that meet near the middle, and cut what is too long."""
    half = math.inf if uniform() < 0.1 else (target - 3) // 2
    first, second = [], []
    for line in lines:
        fits = len(first) + len(line) < half  # [D02] even once second has begun: lines may swap
        if not first or fits or (not second and len(first) < half and uniform() < 0.5):
            first += line
        else:
            second += line
    length = len(first) + len(second)
    first = first[: max_length - 2]
    second = second[: max(0, max_length - len(first) - 3)]  # [D04] the overflow is dropped
    return first, second, length - len(first) - len(second)


def build_rows(documents, unit, wordpiece, config):
    """The rows of one unit, uint16, for training and held out, and the numbers of ids kept and dropped.

    `documents` is a list of (is held out, lines of ids). Its random numbers are a function of the seed,
    the unit and its index, so they depend neither on its neighbours nor on the number of threads.
    """
    rows, kept, dropped = ([], []), 0, 0
    cls, sep = [wordpiece.cls_token_id], [wordpiece.sep_token_id]
    for index, (heldout, lines) in enumerate(documents):
        uniform = random.Random(f"{config.seed} {unit} {index}").random
        for first, second, cut in segment(lines, config.max_length, uniform):
            rows[heldout].append(cls + first + sep + (second + sep if second else []))
            kept, dropped = kept + len(first) + len(second), dropped + cut
    arrays = [np.zeros((len(part), config.max_length), dtype=np.uint16) for part in rows]
    for array, part in zip(arrays, rows, strict=True):
        for place, row in enumerate(part):
            array[place, : len(row)] = row
    return *arrays, kept, dropped


# ------------------------------------------------------------------------------------------------------------
# The cache: shards and their manifest


class Interrupted(Exception):
    """A signal came while training waited for shards."""


class Cache:
    """A folder of shards made from one corpus with one vocabulary, and a manifest of how far it has come.

    manifest.jsonl: a line that says what the cache is made from; a line per shard, once that is safe on the
    disk; at the end {"complete": true}. The rows of shard n are train-n.npy and heldout-n.npy.
    """

    def __init__(self, config, wordpiece):
        self.config, self.wordpiece = config, wordpiece
        self.made_from = {
            "format": [1, UNIT_CHARACTERS, HELDOUT_SHARE],
            "files": [identify(file) for file in find_files(config)],
            "one_document_per_file": config.one_document_per_file,
            "vocab_sha256": wordpiece.sha256,
            "do_lower_case": wordpiece.do_lower_case,
            "strip_accents": wordpiece.strip_accents,
            "max_length": config.max_length,
            "seed": config.seed,
        }
        # A cache of anything else has another name, so it is never taken for this one.
        self.folder = Path(config.cache) / f"{source_name(config)}-{digest(self.made_from)}"
        self.manifest = self.folder / "manifest.jsonl"
        self.shards, self.complete, self.read_bytes, self.seen = [], False, 0, {}
        self.producer, self.interrupted = None, []  # the latter holds signals that came
        self.reading = threading.Lock()  # rows and held-out rows are waited for in two threads

    def read_manifest(self):
        """-> the shards' entries, and whether they are all. Only lines that were added meanwhile are read."""
        with self.reading, open(self.manifest, "rb") if self.manifest.exists() else io.BytesIO() as manifest:
            manifest.seek(self.read_bytes)
            for line in manifest:
                if not line.endswith(b"\n"):
                    break  # torn by a kill, or not yet whole
                self.read_bytes += len(line)
                entry = parse(line, self.manifest)
                self.complete = "complete" in entry
                self.shards += [entry] if "shard" in entry else []
                self.seen |= entry.get("seen", {})
        return self.shards, self.complete

    def prepare(self):
        """Make what is missing of the cache, with a progress bar."""
        self.folder.mkdir(parents=True, exist_ok=True)
        with lock(self.folder / "lock", f"waiting for another process to prepare {self.folder}", wait=True):
            _, complete = self.read_manifest()
            if complete:
                return
            self.announce()
            with open(self.manifest, "ab") as manifest:
                manifest.truncate(self.read_bytes)
                if not self.read_bytes:
                    append(manifest, {"made_from": self.made_from})
                self.add_shards(manifest)
                append(manifest, {"complete": True})

    def add_shards(self, manifest):
        start = self.shards[-1]["next"] if self.shards else (0, 0, 0)
        rows, known = sum(shard["rows"] for shard in self.shards), set(self.seen)
        files = find_files(self.config)
        with tqdm(desc="preparing", unit=" rows", initial=rows, disable=None) as bar:
            units = prefetch(read_units(self.config, start, self.seen))
            encoded = prefetch(self.encode(*unit) for unit in units)
            for number, (documents, following, file) in enumerate(encoded, len(self.shards)):
                entry = self.write_shard(number, documents, following)
                # Of the files up to this one only: how far ahead the reading is, is chance.
                if late := self.seen.keys() - known:  # mostly nothing, however many files there are
                    new = [address for address in files[: file + 1] if address in late]
                    known |= set(new)
                    entry |= {"seen": {address: self.seen[address] for address in new}} if new else {}
                append(manifest, entry)
                bar.update(entry["rows"])
                rows += entry["rows"]
        if not rows:
            sys.exit(f"{' '.join(self.config.data)} holds no text to train on: not one row came of it")

    def announce(self):
        """Say what will be made, and what disk it takes."""
        free = shutil.disk_usage(self.config.cache).free / 1e9
        known = " (openwebtext gives 50 million of 128, about 13 GB)" * ("openwebtext" in self.config.data)
        print(f"preparing {self.folder}: a row takes {2 * self.config.max_length} bytes of disk{known}, and "
              f"{free:.0f} GB are free", flush=True)

    @contextmanager
    def producing(self):
        """For as long as this lasts, have a process of its own make what is missing: what `python data.py`
        does.

        It ends when this process does, however that ends, since then its standard input closes.
        """
        if self.read_manifest()[1]:
            yield
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        self.announce()
        command = [sys.executable, __file__, "--until-stdin-closes", *as_flags(self.config)]
        # What it says goes to a file, since a pipe that nobody reads while training is not waiting fills up.
        with tempfile.NamedTemporaryFile("w") as said, open(said.name) as self.said:
            pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=said)
            # In a session of its own, so that a Ctrl-C is for training alone to answer.
            with subprocess.Popen(command, **pipes, start_new_session=True) as self.producer:
                try:
                    yield
                finally:
                    self.producer.kill()

    def wait(self, enough):
        """The shards' entries, as soon as they are `enough`, or all there are going to be."""
        said = ""
        while True:
            ended = self.producer is not None and self.producer.poll() is not None
            shards, complete = self.read_manifest()
            if complete or enough(shards):
                return shards
            if ended:
                self.said.seek(0)
                lines = self.said.read().strip().splitlines()
                sys.exit(lines[-1] if lines and self.producer.returncode > 0 else
                         f"the preparation of {self.folder} was killed; run this again")
            if self.interrupted:
                raise Interrupted
            if said:
                tqdm.write(said, file=sys.stderr)  # what it waits for: had it ended, it would have by now
            said = self.said.read().strip() if self.producer is not None else ""
            time.sleep(0.05)

    def encode(self, texts, *where):
        """The documents of a unit as (is_heldout, lines of ids), tokenised in one call, which runs in
        parallel."""
        documents = [[line[:MAX_LINE] for line in text.split("\n") if line.strip()] for text in texts]
        ids = iter(self.wordpiece.encode([line for lines in documents for line in lines]))
        encoded = [list(itertools.islice(ids, len(lines))) for lines in documents]
        return list(zip(map(is_heldout, texts), encoded, strict=True)), *where

    def write_shard(self, number, documents, following):
        """Write the rows of one unit; return its entry for the manifest."""
        train, heldout, kept, dropped = build_rows(documents, number, self.wordpiece, self.config)
        for kind, rows in ("train", train), ("heldout", heldout):
            with atomic_write(self.path(kind, number)) as file:
                np.save(file, rows)
        return dict(shard=number, documents=len(documents), rows=len(train), heldout_rows=len(heldout),
                    tokens_kept=kept, tokens_dropped=dropped, next=following)

    def path(self, kind, number):
        return self.folder / f"{kind}-{number:06d}.npy"

    def load(self, kind, numbers):
        """The rows of some shards, uint16 (rows, max_length)."""
        try:
            return np.concatenate([np.load(self.path(kind, number)) for number in numbers])
        except (ValueError, EOFError) as error:
            sys.exit(f"a shard of {self.folder} is damaged ({error}); delete the folder, to prepare it anew")

    def heldout(self, limit):
        """The first `limit` held-out rows, once they are there, or all if there are fewer."""
        rows = np.zeros((0, self.config.max_length), dtype=np.uint16)
        for shard in self.wait(lambda shards: sum(shard["heldout_rows"] for shard in shards) >= limit):
            if len(rows) < limit:
                rows = np.concatenate([rows, self.load("heldout", [shard["shard"]])])
        return rows[:limit]

    def describe(self):
        """What the cache holds, with a warning where D04 drops much of it."""
        names = ("documents", "rows", "heldout_rows", "tokens_kept", "tokens_dropped")
        shards, complete = self.read_manifest()
        documents, rows, heldout, kept, dropped = (sum(shard[name] for shard in shards) for name in names)
        share = dropped / max(1, kept + dropped)
        text = (f"{self.folder}{'' if complete else ', so far'}: {documents:,} documents gave {rows:,} rows "
                f"and {heldout:,} held out; "
                f"{kept:,} tokens are in them, and {share:.1%} were dropped where lines overflow a row")
        if share > 0.4:
            text += ("\nwarning: that is a lot. ELECTRA takes a line for a sentence or paragraph, and cuts "
                     "what is longer than a row: put line breaks into the text, or raise --max-length")
        return text


def read_units(config, start, seen):
    """Group documents into units, an inner archive or some MB: yield (texts, position after, last file)."""
    texts, size, unit, file = [], 0, None, 0
    for position, group, text in read_documents(config, start, seen):
        if texts and (size >= UNIT_CHARACTERS or group != unit):
            yield texts, position, file
            texts, size = [], 0
        texts.append(text)
        size, unit, file = size + len(text), group, position[0]
    if texts:
        yield texts, (len(find_files(config)), 0, 0), file


def is_heldout(text):
    """By a hash of the text, so that copies of a document are on the same side."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") % HELDOUT_SHARE == 0


# ------------------------------------------------------------------------------------------------------------
# The order of training


class TrainingRows:
    """The rows of a cache in the order in which training reads them, for ever: a function of the seed.

    Shards form groups of 1, 2, 4, ... up to 64, and the rows of a group are shuffled. In epoch 0 the shards
    come in their own order, so that training can begin with the first; later epochs permute them before they
    are grouped.
    """

    def __init__(self, cache):
        self.cache, self.seed = cache, cache.config.seed

    def groups(self):
        """Yield (epoch, group, its shards) for ever, in epoch 0 as soon as the shards of a group are
        there."""
        for epoch in itertools.count():
            start = 0
            for group in itertools.count():
                stop = start + min(2**group, MAX_GROUP)
                arrived = len(self.cache.wait(lambda shards, stop=stop: len(shards) >= stop))
                order = range(arrived)
                if epoch:
                    order = generator(self.seed, "shards", epoch).permutation(arrived).tolist()
                if start >= arrived:
                    break
                yield epoch, group, list(order[start:stop])
                start = stop

    def read_groups(self, first_row):
        """Yield (epoch, rows) of the groups from row `first_row` on, and of the first group only what follows
        it."""
        for epoch, group, shards in self.groups():
            size = sum(self.cache.shards[shard]["rows"] for shard in shards)
            if first_row < size:
                order = generator(self.seed, "rows", epoch, group).permutation(size)
                yield epoch, self.cache.load("train", shards)[order[first_row:]]
            first_row = max(0, first_row - size)

    def batches(self, first_step, batch_size, waiting=None):
        """Yield (epoch of the last row, (batch_size, max_length) int64) from step `first_step` on.

        Row g = step x batch_size + i of the order is row i of the step's batch; batches run on across groups
        and epochs. The next group is read in the background; `waiting` is called where it has not come yet.
        """
        groups = prefetch(self.read_groups(first_step * batch_size), waiting=waiting)
        epoch, rows = next(groups)
        while True:
            while len(rows) < batch_size:
                epoch, more = next(groups)
                rows = np.concatenate([rows, more])
            yield epoch, rows[:batch_size].astype(np.int64)
            rows = rows[batch_size:]


def generator(seed, purpose, *numbers):
    """A NumPy generator that is a function of its arguments."""
    return np.random.default_rng([seed, *purpose.encode(), *numbers])


# ------------------------------------------------------------------------------------------------------------
# Files that survive a kill, and a thread


@contextmanager
def atomic_write(path):
    """Open a temporary binary file, which takes the place of `path` once it is whole and on the disk, or
    goes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.tmp")
    try:
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        if error.errno is not None:
            error.filename = str(path)  # which the system leaves out when it refuses to write
        raise
    finally:
        temporary.unlink(missing_ok=True)


def append(file, entry):
    """Add a line of JSON to an open binary file and see it to the disk."""
    try:
        file.write(json.dumps(entry).encode() + b"\n")
        file.flush()
        os.fsync(file.fileno())
    except OSError as error:
        error.filename = file.name
        raise


@contextmanager
def lock(path, busy=None, wait=False):
    """Hold a lock, which the kernel releases when the process ends. While another process has it, say
    `busy` and wait or exit; with nothing to say, go on without. Yields whether it is held."""
    with open(path, "ab") as file:
        held = True
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            held = wait
            if busy and not wait:
                sys.exit(busy)
            if wait:
                print(busy, file=sys.stderr)
                fcntl.flock(file, fcntl.LOCK_EX)
        yield held


def make_once(path, make):
    """Call `make()`, which makes what is to be at `path`, unless that is there; one process does it."""
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        with lock(path.with_suffix(".lock"), f"waiting for another process to make {path}", wait=True):
            if not path.exists():
                make()


def prefetch(items, depth=1, waiting=None):
    """Iterate over `items` in a background thread, up to `depth` ahead. What is raised there is raised here.

    `waiting` is called with True before a wait for an item that is late, and with False after it.
    """
    end = object()
    with ThreadPoolExecutor(1) as thread:
        iterator = iter(items)
        pending = deque(thread.submit(next, iterator, end) for _ in range(depth))
        while True:
            is_late = not pending[0].done()
            if waiting and is_late:
                waiting(True)
            item = pending.popleft().result()
            if waiting and is_late:
                waiting(False)
            if item is end:
                return
            pending.append(thread.submit(next, iterator, end))
            yield item


def parse(line, where, remedy="delete the folder it is in, to begin anew"):
    try:
        return json.loads(line)
    except (ValueError, RecursionError):
        sys.exit(f"{where} is damaged; {remedy}")


def digest(value):
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()[:12]


def ranks(values):
    """From 1 on; values that tie share the mean of their ranks."""
    _, place, ties = np.unique(values, return_inverse=True, return_counts=True)
    return (np.cumsum(ties) - (ties - 1) / 2)[place]


def source_name(config):
    return re.sub(r"[^\w.-]", "_", Path(config.data[0]).name) or "text"


# ------------------------------------------------------------------------------------------------------------
# Command lines


class Parser(argparse.ArgumentParser):
    """Makes flags of the fields of dataclasses, with the comment behind a field as its help."""

    def __init__(self, description):
        super().__init__(description=description, allow_abbrev=False, argument_default=argparse.SUPPRESS)

    def error(self, message):
        sys.exit(f"{message}; --help lists the flags")

    def add_fields(self, config_class, **sizes):
        """Add a flag for every field that has a comment; `sizes` says which defaults a size changes."""
        source = "".join(inspect.getsource(parent) for parent in config_class.__mro__[-2::-1])
        comments = dict(re.findall(r"^    (\w+): .*?  # (.+)$", source, re.M))
        for field in sorted(fields(config_class), key=lambda field: field.name not in vars(config_class)):
            if field.name not in comments:  # its own first, then those that it inherits
                continue
            values = {"": field.default} | {f"{size}: ": row[field.name] for size, row in sizes.items()
                                            if field.name in row}
            defaults = [key + (" ".join(value) if field.type is list else f"{value}")
                        for key, value in values.items()]
            kinds = {bool: dict(action=argparse.BooleanOptionalAction), list: dict(nargs="+")}
            help = f"{comments[field.name]} ({'; '.join(defaults)})".replace("%", "%%")
            kind = kinds.get(field.type, dict(type=field.type))
            self.add_argument("--" + field.name.replace("_", "-"), help=help, **kind)


def configure(config_class, typed, **defaults):
    """A config in which what was typed prevails over `defaults`, and these over the defaults of the class."""
    values = defaults | vars(typed)
    values = {field.name: values[field.name] for field in fields(config_class) if field.name in values}
    return config_class(**values)


def as_flags(config):
    """What to type to get this config."""
    flags = []
    for field in fields(config):
        name, value = field.name.replace("_", "-"), getattr(config, field.name)
        if field.type is bool:
            flags.append(f"--{name}" if value else f"--no-{name}")
        else:
            flags += [f"--{name}", *map(str, value if field.type is list else [value])]
    return flags


def end_with_parent():
    """Once standard input closes, end this process, at once and wherever it is: what is whole stays."""
    while os.read(0, 1):  # not sys.stdin, whose lock this thread would hold when the process ends by itself
        pass
    os._exit(1)


@contextmanager
def one_sentence():
    """Let what the system refuses, such as space on a full disk, end the command with a sentence."""
    try:
        yield
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        sys.exit(f"{where}{error.strerror or error}; mend that and go on: what was saved is safe")
    except KeyboardInterrupt:
        print("stopped; the same command goes on", file=sys.stderr, flush=True)
        os._exit(130)  # without waiting for a thread that waits for a server: what is whole is on the disk


@one_sentence()
def main(argv=None):
    parser = Parser("Prepare text for pre-training: tokenise it, cut it into rows, and keep them in a cache.")
    parser.add_fields(DataConfig)
    parser.add_argument("--until-stdin-closes", action="store_true", help="end with who began this")
    parser.add_argument("--show", type=int, default=0, metavar="N", help="print N rows and their segments")
    typed = parser.parse_args(argv)
    if hasattr(typed, "until_stdin_closes"):
        threading.Thread(target=end_with_parent, daemon=True).start()
    config = configure(DataConfig, typed)
    wordpiece = load_wordpiece(config)
    cache = Cache(config, wordpiece)
    cache.prepare()
    print(cache.describe())
    for row in cache.load("train", [0])[: typed.show]:
        length, first = np.count_nonzero(row), 1 + np.flatnonzero(row == wordpiece.sep_token_id)[0]
        print(f"\n{length} tokens: {first} in the first segment, {length - first} in the second")
        print(wordpiece.decode(row))


if __name__ == "__main__":
    main()
