"""From text to batches: source -> documents -> WordPiece ids -> examples of two segments -> shards -> rows in training order.

What enters: files of text, or the documentation that Python, torch and numpy ship. What leaves: a cache of `.npy` shards,
uint16 (rows, max_length), zero-padded, and from it the rows of every step. The disk holds that one array: attention mask
and token types follow from the ids. `python data.py --data PATH` prepares a cache ahead of time, `--show 3` prints rows.

Claim: the same input, vocabulary and seed give the same bytes, in one go or after any number of kills
(test_cache_is_the_same_bytes_*), and row g of the training order is a function of the seed and g (test_order_*).
"""

import argparse
import ast
import fcntl
import gzip
import hashlib
import importlib.metadata
import importlib.util
import inspect
import itertools
import json
import lzma
import os
import platform
import random
import re
import sys
import sysconfig
import textwrap
import zlib
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from functools import cache, cached_property
from pathlib import Path

import numpy as np
import requests
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers
from tqdm import tqdm

PAD, UNK, CLS, SEP, MASK = SPECIAL_TOKENS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
HUB = os.environ.get("HF_ENDPOINT", "https://huggingface.co")
BERT_VOCAB = dict(  # BERT's uncased vocabulary, which ELECTRA uses
    url=f"{HUB}/google/electra-small-discriminator/resolve/main/vocab.txt",
    size=231_508,
    sha256="07eced375cec144d27c900241f3e339478dec958f92fddbc551f295c992038a3",
)
UNIT_CHARACTERS = 2_000_000  # text that becomes one shard, about 3,000 rows of 128
MAX_GROUP = 64  # shards shuffled together, at most: some 50 MB of rows
MAX_DOCUMENT = 100_000_000  # bytes; a longer one is surely a file that is not what it seems
VOCAB_CHARACTERS = 200_000_000  # text from the start of the corpus that a vocabulary is trained on
HELDOUT_SHARE = 100  # one document in so many is held out


@dataclass(frozen=True)
class DataConfig:
    """What text, and how it becomes rows."""

    data: tuple = ("python-docs",)  # files or folders of .txt or .jsonl, also .gz or .xz; or python-docs
    one_document_per_file: bool = False  # in .txt files, blank lines do not separate documents
    vocab: str = (
        "bert"  # a vocab.txt, train:SIZE for one trained on the text, or bert for BERT's, downloaded once
    )
    do_lower_case: bool = True  # lower-case the text
    strip_accents: bool = True  # strip accents too, where the text is lower-cased
    max_length: int = 128  # tokens in a row, [CLS] and [SEP] included
    seed: int = 0  # of everything that is random
    workers: int = os.cpu_count()  # threads that tokenise
    cache: str = "cache"  # folder for prepared text and vocabularies

    def __post_init__(self):
        if self.max_length < 8:
            sys.exit(f"max_length is {self.max_length}; a row needs at least 8 tokens")
        if self.seed < 0 or self.workers < 1:
            sys.exit("seed must be 0 or more, and workers 1 or more")


# ---------------------------------------------------------------------------------------------------------------------
# Sources and documents

READERS = {".gz": gzip.open, ".xz": lzma.open}
TEXT_FILE = re.compile(r"\.(txt|jsonl)(\.gz|\.xz)?$")


def find_files(config):
    """The corpus as a list of paths, in a fixed order: arguments as given, the files of a folder by name."""
    files = []
    for argument in config.data:
        path = Path(argument)
        if path.is_dir():
            found = sorted(
                p for p in path.rglob("*") if TEXT_FILE.search(p.name) and not p.name.startswith(".")
            )
            if not found:
                sys.exit(f"{path} has no .txt or .jsonl file in it, nor one of these with .gz or .xz")
            files += found
        elif argument == "python-docs":
            files.append(argument)
        elif not path.exists():
            sys.exit(f"there is no {path}; --data takes files, folders or python-docs")
        elif not TEXT_FILE.search(path.name):
            sys.exit(
                f"{path} has none of the endings that can be read: .txt, .jsonl, and these with .gz or .xz"
            )
        else:
            files.append(path)
    return files


def identify(file):
    """What tells whether a file is still the one that a cache was made from."""
    if file == "python-docs":
        versions = [importlib.metadata.version(package) for package in ("torch", "numpy")]
        return [file, platform.python_version(), *versions]
    return [str(file), file.stat().st_size, file.stat().st_mtime_ns]


def read_documents(config, start=(0, 0)):
    """Yield ((file, index), text) for every document from position `start` on; the position is the document's own."""
    for number, file in enumerate(find_files(config)):
        if number < start[0]:
            continue
        documents = python_docs() if file == "python-docs" else read_file(file, config.one_document_per_file)
        for index, text in enumerate(documents):
            if (number, index) >= tuple(start) and text.strip():
                yield (number, index), text.strip()


def read_file(path, one_document_per_file):
    """Yield the documents of a .txt file, which blank lines separate, or of a .jsonl file, one a line."""
    suffix, offset, document, size = path.suffix, 0, [], 0
    is_jsonl = ".jsonl" in path.suffixes[-2:]
    try:
        with READERS.get(suffix, open)(path, "rb") as file:
            # Only "\n" ends a line: str.splitlines would also cut at U+2028 and its like.
            for number, raw in enumerate(iter(lambda: file.readline(MAX_DOCUMENT + 1), b""), 1):
                try:
                    line = raw.decode("utf-8-sig" if number == 1 else "utf-8")
                except UnicodeDecodeError as error:
                    sys.exit(
                        f"{path} is not UTF-8 at byte {offset + error.start}; convert it first, for example with iconv"
                    )
                offset, size = offset + len(raw), size + len(raw)
                if size > MAX_DOCUMENT:
                    sys.exit(
                        f"{path} has a document of over {MAX_DOCUMENT:,} bytes; separate documents by blank lines"
                    )
                if is_jsonl:
                    size = 0
                    if line.strip():
                        yield text_of_json(line, f"{path}, line {number}")
                elif line.strip() or one_document_per_file:
                    document.append(line)
                else:
                    yield "".join(document)
                    document, size = [], 0
        yield "".join(document)
    except (EOFError, zlib.error, gzip.BadGzipFile, lzma.LZMAError) as error:
        sys.exit(f"{path} is damaged or cut short ({error}); fetch or make it again")


def text_of_json(line, where):
    try:
        text = json.loads(line)["text"]
    except (ValueError, TypeError, KeyError):
        text = None
    if not isinstance(text, str):
        sys.exit(f'{where}: every line of a .jsonl file must be an object with a string under "text"')
    return text


DOCUMENTED = (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)


@cache
def python_docs():
    """About 9 MB of real English that is on every machine: Python's help topics, and the docstrings of the standard
    library, torch and numpy, a document per module. Files are parsed, never imported."""
    standard_library = Path(sysconfig.get_path("stdlib"))
    roots = [
        standard_library,
        *(Path(importlib.util.find_spec(name).origin).parent for name in ("torch", "numpy")),
    ]
    documents = []
    for root in roots:
        for path in sorted(root.rglob("*.py")):
            inside = path.relative_to(root).parts
            if inside[0] == "site-packages" or {"test", "tests", "idle_test"} & set(inside):
                continue
            source = path.read_bytes()
            if inside == ("pydoc_data", "topics.py"):
                [topics] = [node.value for node in ast.parse(source).body if isinstance(node, ast.Assign)]
                documents += ast.literal_eval(topics).values()
            elif b'"""' in source:
                documents.append("\n".join(docstrings(source)))
    # In an order without meaning, so that every shard is a mixture.
    return sorted(filter(None, documents), key=lambda text: hashlib.sha256(text.encode()).digest())


def docstrings(source):
    """Yield the docstrings of a module's source, its classes and functions, from the outside in."""
    try:
        nodes = [ast.parse(source)]
    except SyntaxError:  # torch ships a few files in the syntax of newer Pythons
        return
    while nodes:
        node = nodes.pop()
        if text := ast.get_docstring(node):
            yield text
        nodes += reversed([child for child in node.body if isinstance(child, DOCUMENTED)])


# ---------------------------------------------------------------------------------------------------------------------
# WordPiece


class WordPiece:
    """A vocabulary and the rules by which text becomes ids, agreeing with the official tokenizer.

    `tokens` is the vocabulary in the order of its ids. Text never becomes a special token: "[SEP]" is three words.
    """

    def __init__(self, tokens, do_lower_case=True, strip_accents=True):
        self.tokens, self.do_lower_case, self.strip_accents = (
            tokens,
            do_lower_case,
            do_lower_case and strip_accents,
        )
        ids = {token: number for number, token in enumerate(tokens)}
        self.cls_token_id, self.sep_token_id, self.mask_token_id = ids[CLS], ids[SEP], ids[MASK]
        self.sha256 = hashlib.sha256("\n".join(tokens).encode()).hexdigest()
        self.tokenizer = blank_tokenizer(self.do_lower_case, self.strip_accents)
        # A longer word than 200 characters becomes [UNK]; the library's own limit is 100.
        self.tokenizer.model = models.WordPiece(ids, unk_token=UNK, max_input_chars_per_word=200)

    def encode(self, lines):
        """A list of lines -> a list of lists of ids, without special tokens."""
        return [
            encoding.ids for encoding in self.tokenizer.encode_batch_fast(lines, add_special_tokens=False)
        ]

    def decode(self, ids):
        """Readable text, special tokens included and padding left out."""
        return " ".join(self.tokens[i] for i in ids if i).replace(" ##", "")


def blank_tokenizer(do_lower_case, strip_accents):
    tokenizer = Tokenizer(models.WordPiece(unk_token=UNK))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=do_lower_case, strip_accents=strip_accents)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    return tokenizer


def load_wordpiece(config):
    """The WordPiece that `config.vocab` names: a file, BERT's, or one trained on the text, each kept once made."""
    folder = Path(config.cache)
    if config.vocab == "bert":
        path = folder / "bert-uncased-vocab.txt"
        if not path.exists():
            download(
                path,
                **BERT_VOCAB,
                instead="pass --vocab FILE, or --vocab train:8192 to train one on your text",
            )
    elif match := re.fullmatch(r"train:(\d+)", config.vocab):
        # Training is not reproducible to the byte, so it happens once for a text.
        made_from = [
            [identify(file) for file in find_files(config)],
            config.one_document_per_file,
            config.do_lower_case,
            config.strip_accents,
            match[1],
        ]
        path = folder / f"vocab-{source_name(config)}-{digest(made_from)}.txt"
        if not path.exists():
            train_vocab(config, int(match[1]), path)
    else:
        path = Path(config.vocab)
    return WordPiece(read_vocab(path), config.do_lower_case, config.strip_accents)


def train_vocab(config, size, path):
    """Train a WordPiece vocabulary of at most `size` tokens on the first 200 MB of the text and write it to `path`."""
    check_vocab_size(size, "--vocab train")
    tokenizer = blank_tokenizer(config.do_lower_case, config.do_lower_case and config.strip_accents)
    trainer = trainers.WordPieceTrainer(vocab_size=size, special_tokens=SPECIAL_TOKENS, show_progress=False)
    total = 0

    def beginning():
        nonlocal total
        for _, text in read_documents(config):
            total += len(text)
            if total > VOCAB_CHARACTERS:
                return
            yield from text.split("\n")

    tokenizer.train_from_iterator(beginning(), trainer)
    if not total:
        sys.exit(f"there is no text in {' '.join(config.data)} to train a vocabulary on")
    ids = tokenizer.get_vocab()
    with atomic_write(path) as file:
        file.write("".join(token + "\n" for token in sorted(ids, key=ids.get)).encode())


def read_vocab(path):
    """The tokens of a vocab.txt, one a line."""
    if not path.is_file():
        sys.exit(f"there is no vocabulary {path}; --vocab takes a vocab.txt, train:SIZE or bert")
    try:
        tokens = path.read_text(encoding="utf-8-sig").removesuffix("\n").split("\n")
    except UnicodeDecodeError as error:
        sys.exit(f"the vocabulary {path} is not UTF-8 at byte {error.start}")
    tokens = [token.removesuffix("\r") for token in tokens]
    if missing := [token for token in SPECIAL_TOKENS if token not in tokens]:
        sys.exit(f"the vocabulary {path} lacks {', '.join(missing)}")
    if tokens[0] != PAD:
        sys.exit(f"the vocabulary {path} must begin with {PAD}, since padding is id 0")
    if len(set(tokens)) != len(tokens):
        sys.exit(f"the vocabulary {path} has a token twice: {max(tokens, key=tokens.count)!r}")
    check_vocab_size(len(tokens), path)
    return tokens


def check_vocab_size(size, name):
    if not len(SPECIAL_TOKENS) < size <= 65_535:
        sys.exit(
            f"{name} has {size:,} tokens; from 6 to 65,535 are possible, since a row is stored as uint16"
        )


def download(path, url, size, sha256, instead):
    """Fetch `url` whole to `path`, by way of a temporary file; `instead` says what to do where that cannot be."""
    try:
        with requests.get(url, stream=True, timeout=30) as response, atomic_write(path) as file:
            response.raise_for_status()
            seen, length = hashlib.sha256(), 0
            for chunk in response.iter_content(1 << 16):
                file.write(chunk)
                seen.update(chunk)
                length += len(chunk)
            if (length, seen.hexdigest()) != (size, sha256):
                sys.exit(
                    f"{url} is not what it was: {length} bytes, SHA-256 {seen.hexdigest()}, instead of {size} bytes,"
                    f" SHA-256 {sha256}; {instead}"
                )
    except requests.RequestException as error:
        sys.exit(f"{url} cannot be downloaded ({type(error).__name__}: {error}); {instead}")


# ---------------------------------------------------------------------------------------------------------------------
# Examples of two segments


def segment(lines, max_length, uniform):
    """Cut one document into examples: yield (first, second, number of dropped ids), second often empty.

    `lines` is a list of lists of ids, one for each line of the document, `uniform` a function that draws from [0, 1).
    Called once per document, so no example crosses the end of one. [D01]
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
    """The number of ids to aim at: mostly max_length, seldom anything from 5 to it. [D03]

    Unlike the official code, which lets the target carry over, a document begins with a draw of its own, so that what
    becomes of it does not depend on the documents before it.
    """
    return 5 + int(uniform() * (max_length - 4)) if uniform() < 0.05 else max_length


def split(lines, target, max_length, uniform):
    """Deal out lines to two segments that meet near the middle, and cut what is too long: (first, second, dropped)."""
    half = (
        float("inf") if uniform() < 0.1 else (target - 3) // 2
    )  # one row in ten has room for one segment only
    first, second = [], []
    for line in lines:
        fits = (
            len(first) + len(line) < half
        )  # [D02] even when the second has begun, which breaks the order of lines
        if not first or fits or (not second and len(first) < half and uniform() < 0.5):
            first += line
        else:
            second += line
    length = len(first) + len(second)
    first = first[: max_length - 2]
    second = second[: max(0, max_length - len(first) - 3)]  # [D04] the overflow is dropped, not carried over
    return first, second, length - len(first) - len(second)


def build_rows(documents, unit, wordpiece, config):
    """Turn the documents of one unit, as lists of lines of ids, into two uint16 arrays of rows, training and held-out.

    `documents` is a list of (is_heldout, lines). A document's random numbers come from (seed, unit, its index), so its
    rows depend neither on its neighbours nor on threads. -> (train rows, held-out rows, ids kept, ids dropped)
    """
    rows, dropped, kept = ([], []), 0, 0
    cls, sep = [wordpiece.cls_token_id], [wordpiece.sep_token_id]
    for index, (is_heldout, lines) in enumerate(documents):
        uniform = random.Random(f"{config.seed} {unit} {index}").random
        for first, second, cut in segment(lines, config.max_length, uniform):
            rows[is_heldout].append(cls + first + sep + (second + sep if second else []))
            kept += len(first) + len(second)
            dropped += cut
    arrays = [np.zeros((len(part), config.max_length), dtype=np.uint16) for part in rows]
    for array, part in zip(arrays, rows, strict=True):
        for number, row in enumerate(part):
            array[number, : len(row)] = row
    return *arrays, kept, dropped


# ---------------------------------------------------------------------------------------------------------------------
# The cache: shards and their manifest


class Cache:
    """A folder of shards made from one corpus by one vocabulary, and the manifest that says how far it has come.

    manifest.jsonl: a line that says what the cache is made from, a line per shard once it is safe on the disk, a last
    line {"complete": true}. Shard n is train-n.npy and, where it holds out documents, heldout-n.npy.
    """

    def __init__(self, config, wordpiece):
        self.config, self.wordpiece = config, wordpiece
        self.made_from = {
            "format": 1,
            "files": [identify(file) for file in find_files(config)],
            "one_document_per_file": config.one_document_per_file,
            "vocab_sha256": wordpiece.sha256,
            "do_lower_case": wordpiece.do_lower_case,
            "strip_accents": wordpiece.strip_accents,
            "max_length": config.max_length,
            "seed": config.seed,
        }
        # The name holds a hash of all that: a cache of anything else is another folder.
        self.name = f"{source_name(config)}-{digest(self.made_from)}"
        self.folder = Path(config.cache) / self.name
        self.manifest = self.folder / "manifest.jsonl"

    def read_manifest(self):
        """-> (lines of shards, whether they are all, bytes of the manifest that are whole)."""
        shards, complete, size = [], False, 0
        for line in self.manifest.read_bytes().splitlines(keepends=True) if self.manifest.exists() else []:
            if not line.endswith(b"\n"):
                break  # torn by a kill
            entry, size = json.loads(line), size + len(line)
            if "shard" in entry:
                shards.append(entry)
            complete = complete or "complete" in entry
        return shards, complete, size

    def prepare(self):
        """Make what is missing, with a progress bar. Ends at once where the cache is complete."""
        self.folder.mkdir(parents=True, exist_ok=True)
        with lock(
            self.folder / "lock", f"another process is preparing {self.folder}; waiting for it", wait=True
        ):
            shards, complete, size = self.read_manifest()
            if complete:
                return
            with open(self.manifest, "ab") as manifest:
                manifest.truncate(size)
                if not size:
                    append(manifest, {"made_from": self.made_from})
                start, unit = (shards[-1]["next"], len(shards)) if shards else ((0, 0), 0)
                rows = sum(shard["rows"] for shard in shards)
                with tqdm(desc="preparing", unit=" rows", initial=rows, disable=None) as bar:
                    encoded = prefetch(
                        self.encode(units) for units in prefetch(read_units(self.config, start))
                    )
                    for unit, (documents, following) in enumerate(encoded, unit):
                        entry = self.write_shard(unit, documents, following)
                        append(manifest, entry)
                        rows += entry["rows"]
                        bar.update(entry["rows"])
                if not rows:
                    sys.exit(
                        f"{' '.join(self.config.data)} holds no text to train on: not one row came of it"
                    )
                append(manifest, {"complete": True})

    def encode(self, unit):
        """A unit's texts -> (is_heldout, lines of ids) of its documents; one batch, since that is what runs in parallel."""
        texts, following = unit
        lines = [[line for line in text.split("\n") if line.strip()] for text in texts]
        ids = iter(self.wordpiece.encode(list(itertools.chain.from_iterable(lines))))
        return [
            (is_heldout(text), list(itertools.islice(ids, len(part))))
            for text, part in zip(texts, lines, strict=True)
        ], following

    def write_shard(self, unit, documents, following):
        train, heldout, kept, dropped = build_rows(documents, unit, self.wordpiece, self.config)
        for kind, rows in ("train", train), ("heldout", heldout):
            with atomic_write(self.path(kind, unit)) as file:
                np.save(file, rows)
        return {
            "shard": unit,
            "documents": len(documents),
            "rows": len(train),
            "heldout_rows": len(heldout),
            "tokens_kept": kept,
            "tokens_dropped": dropped,
            "next": following,
        }

    def path(self, kind, number):
        return self.folder / f"{kind}-{number:06d}.npy"

    def load(self, kind, numbers):
        """The rows of some shards, uint16 (rows, max_length)."""
        empty = np.zeros((0, self.config.max_length), dtype=np.uint16)
        return np.concatenate([empty, *(np.load(self.path(kind, number)) for number in numbers)])

    def heldout(self, limit):
        """The first `limit` held-out rows, or fewer if there are not so many."""
        shards, _, _ = self.read_manifest()
        enough = itertools.accumulate(shard["heldout_rows"] for shard in shards)
        needed = 1 + sum(rows < limit for rows in enough)
        return self.load("heldout", [shard["shard"] for shard in shards[:needed]])[:limit]

    def first_rows(self):
        """Yield the training rows in the order of the shards, for a look at them."""
        shards, _, _ = self.read_manifest()
        for shard in shards:
            yield from self.load("train", [shard["shard"]])

    def describe(self):
        """What the cache holds, in a few lines, with a warning where D04 drops much of it."""
        shards, _, _ = self.read_manifest()
        documents, rows, heldout, kept, dropped = (
            sum(shard[key] for shard in shards)
            for key in ("documents", "rows", "heldout_rows", "tokens_kept", "tokens_dropped")
        )
        share = dropped / max(1, kept + dropped)
        text = (
            f"{self.folder}: {documents:,} documents -> {rows:,} rows for training and {heldout:,} held out; "
            f"{kept:,} tokens kept, {share:.1%} dropped"
        )
        if share > 0.4:
            text += (
                "\nwarning: most lines are longer than a row, and what overflows a row is dropped. ELECTRA takes a line for"
                " a sentence or a paragraph: put line breaks into the text, or raise --max-length"
            )
        return text


def read_units(config, start):
    """Group documents into units of some MB: yield (texts, position of the first document after them)."""
    texts, size, end = [], 0, (len(find_files(config)), 0)
    for position, text in read_documents(config, start):
        if size >= UNIT_CHARACTERS:
            yield texts, position
            texts, size = [], 0
        texts.append(text)
        size += len(text)
    if texts:
        yield texts, end


def is_heldout(text):
    """By a hash of the text, so that copies of a document are on the same side."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") % HELDOUT_SHARE == 0


# ---------------------------------------------------------------------------------------------------------------------
# The order of training


class TrainingRows:
    """The rows of a cache in the order in which training reads them, for ever: a function of the seed.

    Shards form groups of 1, 2, 4, ... up to 64, and the rows of a group are shuffled. In epoch 0 the shards come in
    their own order, so that training can begin with the first one; later epochs permute them before they are grouped.
    """

    def __init__(self, cache):
        shards, _, _ = cache.read_manifest()
        self.cache, self.rows = cache, [shard["rows"] for shard in shards]
        self.per_epoch = sum(self.rows)

    def groups(self):
        """Yield (epoch, group, its shards) for ever."""
        for epoch in itertools.count():
            shards = list(range(len(self.rows)))
            if epoch:
                shards = generator(self.cache.config.seed, "shards", epoch).permutation(len(shards)).tolist()
            for group, size in enumerate(min(2**n, MAX_GROUP) for n in itertools.count()):
                if not shards:
                    break
                yield epoch, group, shards[:size]
                shards = shards[size:]

    def read_groups(self, first_row):
        """Yield the rows of the groups from row `first_row` on, the first group without what comes before it."""
        for epoch, group, shards in self.groups():
            size = sum(self.rows[shard] for shard in shards)
            if first_row >= size:
                first_row -= size
                continue
            rows = self.cache.load("train", shards)
            yield rows[generator(self.cache.config.seed, "rows", epoch, group).permutation(size)][first_row:]
            first_row = 0

    def batches(self, first_step, batch_size):
        """Yield (batch_size, max_length) int64 from step `first_step` on; row g = step x batch_size + its place.

        Batches run on across groups and epochs. The next group is read in the background.
        """
        groups = prefetch(self.read_groups(first_step * batch_size))
        rows = next(groups)
        while True:
            while len(rows) < batch_size:
                rows = np.concatenate([rows, next(groups)])
            yield rows[:batch_size].astype(np.int64)
            rows = rows[batch_size:]


def generator(seed, purpose, *numbers):
    """A NumPy generator that is a function of its arguments, the same on every machine."""
    return np.random.default_rng([seed, *purpose.encode(), *numbers])


# ---------------------------------------------------------------------------------------------------------------------
# Small things that every file above uses


def prefetch(items, depth=1):
    """Iterate over `items` in a background thread, up to `depth` ahead. What is raised there is raised here."""
    end = object()
    with ThreadPoolExecutor(1) as thread:
        iterator = iter(items)
        pending = deque(thread.submit(next, iterator, end) for _ in range(depth))
        while (item := pending.popleft().result()) is not end:
            pending.append(thread.submit(next, iterator, end))
            yield item


@contextmanager
def atomic_write(path):
    """Open a temporary binary file that takes the place of `path` once it is whole and on the disk, or goes away."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def lock(path, busy, wait=False):
    """Hold a lock that the kernel releases when the process ends. While another holds it, say `busy` and give up or wait."""
    with open(path, "ab") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if not wait:
                sys.exit(busy)
            print(busy, file=sys.stderr)
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def append(file, entry):
    """Add a line of JSON to an open binary file and see it to the disk."""
    file.write(json.dumps(entry).encode() + b"\n")
    file.flush()
    os.fsync(file.fileno())


def digest(value):
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()[:12]


def source_name(config):
    return re.sub(r"[^\w.-]", "_", Path(config.data[0]).name) or "text"


# ---------------------------------------------------------------------------------------------------------------------
# Command lines


class Parser(argparse.ArgumentParser):
    """Turns the fields of dataclasses into flags, each with the comment behind it as its help.

    A value is the field's default, or what the size says, or what was typed, the later the stronger.
    """

    def __init__(self, description):
        super().__init__(description=description, allow_abbrev=False, argument_default=argparse.SUPPRESS)

    def error(self, message):
        sys.exit(f"{message}; --help lists every flag")

    def add_fields(self, config_class, sizes=None):
        comments = {}
        for parent in reversed(config_class.__mro__[:-1]):
            comments |= dict(re.findall(r"^    (\w+): .*?  # (.+)$", inspect.getsource(parent), re.M))
        for field in fields(config_class):
            if field.name not in comments:
                continue  # a field that follows from others
            default = " ".join(field.default) if field.type is tuple else field.default
            by_size = "".join(
                f"; {name}: {values[field.name]}"
                for name, values in (sizes or {}).items()
                if field.name in values
            )
            help = f"{comments[field.name]} ({default}{by_size})".replace("%", "%%")
            kind = {bool: dict(action=argparse.BooleanOptionalAction), tuple: dict(nargs="+")}.get(
                field.type, dict(type=field.type)
            )
            self.add_argument("--" + field.name.replace("_", "-"), help=help, **kind)


def configure(config_class, typed, **defaults):
    """A config from the flags that were typed, and over the class's defaults those of the size."""
    typed = {name: tuple(value) if isinstance(value, list) else value for name, value in vars(typed).items()}
    names = {field.name for field in fields(config_class)}
    return config_class(**{name: value for name, value in (defaults | typed).items() if name in names})


@contextmanager
def one_sentence():
    """What the system refuses, such as space on a full disk, ends the command with a sentence."""
    try:
        yield
    except OSError as error:
        sys.exit(
            f"{error.filename or 'the system'}: {error.strerror or error}; the same command goes on once that is mended"
        )


@one_sentence()
def main(argv=None):
    parser = Parser("Prepare text for pre-training: tokenise it, cut it into rows, and keep them in a cache.")
    parser.add_fields(DataConfig)
    parser.add_argument(
        "--show", type=int, default=0, metavar="N", help="print the first N rows and their two segments"
    )
    typed = parser.parse_args(argv)
    config = configure(DataConfig, typed)
    cache = Cache(config, load_wordpiece(config))
    cache.prepare()
    print(cache.describe())
    for row in itertools.islice(cache.first_rows(), typed.show):
        tokens = [cache.wordpiece.tokens[i] for i in row if i]
        print(f"\n{len(tokens)} tokens, {tokens.count(SEP)} segments: {cache.wordpiece.decode(row)}")


if __name__ == "__main__":
    main()
