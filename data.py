"""From text to batches: documents, WordPiece ids, rows of two segments, shards, training order.

`prepare` is the whole pipeline. Its stages stand in the order in which text passes through them:

    documents        names -> files -> one string for each document
    workers          the next stage, on several cores
    rows             a document -> ids -> rows of two segments
    WordPiece        lines -> ids, and back
    shards           rows <-> disk
    growing shards   a child process adds shards while this process trains
    order            (seed, step) -> the rows of a training step

After them come model folders, vocabularies, downloads, and helpers for files. A *sealed* file ends with a
checksum. [Dnn] marks a detail that DETAILS.md explains.

The disk holds one array, uint16 (rows, max_length), zero-padded, in shards: attention mask and token types
follow from the ids. The same text, vocabulary and seed give the same bytes, however often the run is killed,
and the rows of a step are a function of (seed, step).

train.py runs this file as a child process (`python data.py child`), and `prepare` divides the work among
workers, processes of their own.
"""

import fcntl
import gzip
import hashlib
import importlib.metadata
import importlib.util
import io
import itertools
import json
import lzma
import math
import multiprocessing
import os
import pickle
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
import unicodedata
import zlib
from collections import Counter, deque
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, NamedTuple

import numpy as np
import requests
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers
from tqdm import tqdm

# Without this, tokenizers uses a single core beside child processes.
os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")

SPECIAL_TOKENS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
PAD, UNK, CLS, SEP, MASK = SPECIAL_TOKENS


class UserError(ValueError):
    """An error that the user can fix. The message is a sentence that says how."""


# ------------------------------------------------------------------------------------------------------------
# The pipeline


@dataclass(frozen=True)
class DataConfig:
    """Which text, and how it becomes rows. A field is a flag: its type, help, least and greatest value."""

    data: Annotated[list, "files, folders, addresses of text, openwebtext, or python-docs"] = ("openwebtext",)
    one_document_per_file: Annotated[bool, "each .txt is one document; else blank lines separate "
                                           "documents"] = False
    split_long_lines: Annotated[bool, "cut lines that are longer than a row; else their ends are "
                                      "lost"] = False
    vocab: Annotated[str, "a vocab.txt; train:SIZE, trained on the text; or bert, downloaded once"] = "bert"
    do_lower_case: Annotated[bool, "lower-case the text"] = True
    strip_accents: Annotated[bool, "strip accents from lower-cased text"] = True
    max_length: Annotated[int, "tokens in a row, [CLS] and [SEP] included", 8, 1_000_000] = 128
    seed: Annotated[int, "seed of all randomness", 0, 2**32 - 1] = 0
    cache: Annotated[str, "folder for prepared text and downloads"] = "cache"


def prepare(config, wordpiece=None):
    """Turn text into shards of rows. After a kill it resumes; a finished shard is never made again."""
    shards = Shards(config, wordpiece or load_wordpiece(config))
    with lock(shards.folder / "lock", f"waiting for another process to prepare {shards.folder}"):
        shards.refresh()  # the other process may have added some
        if shards.is_complete:
            return shards
        shard_texts = read_shard_texts(config, start=shards.next_position, first_number=len(shards.infos))
        for train, heldout, info in build_shards(shard_texts, shards.wordpiece, config):
            shards.add(train, heldout, info)
        if shards.total("rows") == 0:
            raise no_text(config)
        shards.mark_complete()
    return shards


# ------------------------------------------------------------------------------------------------------------
# Documents: names -> files -> one string for each document

SHARD_CHARACTERS = 2_000_000  # characters of text per shard, about 3,000 rows of 128
MAX_DOCUMENT = 10_000_000  # characters; a longer document of a .txt is split
READABLE = ".txt, .jsonl, .json, .parquet or .tar file, plain, .gz, .xz or .zst"
# Where OpenWebText may be: tars of a revision that had them, tars of the main branch, or the files to which
# the hub converts data sets. hub: stands for the address of HuggingFace's hub, see `hub`.
REPOSITORY = "hub:/datasets/Skylion007/openwebtext/resolve"
TARS = [f"subsets/urlsf_subset{number:02d}.tar" for number in range(21)]
OPENWEBTEXT = dict(
    pinned=[f"{REPOSITORY}/39d1a6d3f3a4c838b27bbc65bfb14a2f6f727740/{tar}" for tar in TARS],
    main=[f"{REPOSITORY}/main/{tar}" for tar in TARS],
    parquet=[f"{REPOSITORY}/refs%2Fconvert%2Fparquet/plain_text/train/{number:04d}.parquet"
             for number in range(80)],
)


class Position(NamedTuple):
    """A place between two documents of the text."""

    file_number: int
    num_documents: int  # of that file, before the place
    checksum: int  # CRC-32 of these documents


START = Position(0, 0, 0)


def read_shard_texts(config, start, first_number):
    """Yield (number, documents, Position after them) of each shard. The first has `first_number`."""
    number = first_number
    documents = []
    size = 0
    for text, position in read_documents(config, start):
        documents.append(text)
        size += len(text)
        if size >= SHARD_CHARACTERS:
            yield number, documents, position
            number += 1
            documents = []
            size = 0
    if documents:
        yield number, documents, position


def read_documents(config, start=START):
    """Yield (text, Position after it) for each document from `start` on.

    Reads the file of `start` from its beginning, and refuses it if the documents before `start` have changed.
    """
    for file_number, name in enumerate(find_files(config)):
        if file_number < start.file_number:
            continue
        is_past_start = start == START or file_number > start.file_number
        checksum = 0
        for count, text in enumerate(read_source(name, config), 1):
            text = text.replace("\r\n", "\n").strip()
            checksum = zlib.crc32(text.encode(), checksum)
            position = Position(file_number, count, checksum)
            if text and is_past_start:
                yield text, position
            if position == start:  # also in its checksum: the documents before it are the same
                is_past_start = True
        if not is_past_start:
            raise UserError(f"{without_secrets(name)} has changed since its beginning was prepared; use "
                            "another --cache")


def find_files(config):
    """The files and addresses of the corpus, in a fixed order: as given, and within a folder by name."""
    files = []
    for name in config.data:
        if name == "openwebtext":
            files += find_openwebtext(config.cache)
        elif os.path.isdir(name):
            files += sorted(filter(is_readable, walk(name)))
        elif not is_local(name) or os.path.exists(name):
            files.append(name)
        else:
            raise UserError(f"there is no {without_secrets(name)}; --data takes paths, addresses, "
                            "openwebtext or python-docs")
    if not files:
        raise UserError(f"{config.data[0]} holds no {READABLE}")
    for name in files:
        if is_local(name) and not os.path.isfile(name):  # a pipe or a device: reading it could wait for ever
            raise UserError(f"{name} is not a regular file; copy what it gives to one")
    return files


def find_openwebtext(cache):
    """The addresses of OpenWebText's files. The cache keeps the choice, so that a run has one text."""
    path = Path(cache) / "openwebtext"
    make_once(path, lambda: write_sealed(path, choose_openwebtext().encode()))
    return OPENWEBTEXT[read_sealed(path, advice="delete it").decode()]


def choose_openwebtext():
    """The first of OPENWEBTEXT whose first file is there."""
    for choice, addresses in OPENWEBTEXT.items():
        if exists(addresses[0]):
            return choice
    raise UserError(f"{without_secrets(hub())} does not have OpenWebText; use --data PATH or --data "
                    "python-docs")


def exists(address):
    try:
        next(fetch(address), None)  # the first bytes
    except NotFound:
        return False
    return True


def walk(folder):
    """The files in a folder, through symbolic links, without hidden files and folders."""

    def refuse(error):  # os.walk would leave out a folder that cannot be read
        raise error

    seen = set()
    for path, folders, names in os.walk(folder, onerror=refuse, followlinks=True):
        real_path = os.path.realpath(path)
        if real_path in seen:  # a link leads back up
            folders.clear()  # os.walk goes no deeper
            continue
        seen.add(real_path)
        folders[:] = [name for name in folders if not name.startswith(".")]
        yield from (os.path.join(path, name) for name in names if not name.startswith("."))


def is_readable(name):
    """Whether a file of a folder or an archive is read. Hidden ones are not: macOS adds ._NAME for NAME."""
    kind, _ = kind_of(name)
    return kind != "" and not os.path.basename(name).startswith(".")


def kind_of(name):
    """The kind and the compression of a file, by its name. The kind is "" if the file cannot be read.

    >>> kind_of("a.jsonl"), kind_of("B.TXT.gz"), kind_of("c.zip")
    (('.jsonl', ''), ('.txt', '.gz'), ('', ''))
    """
    name = name.lower()
    if name.endswith("_data.xz"):  # the tars in the tars of OpenWebText
        return ".tar", ".xz"
    compression = ""
    if name.endswith((".gz", ".xz", ".zst")):
        name, compression = os.path.splitext(name)
    for kind in ".txt", ".json", ".jsonl", ".parquet", ".tar":
        if name.endswith(kind):
            return kind, compression
    return "", compression


def is_local(name):
    """Whether a name is a path, and neither an address nor python-docs."""
    return name != "python-docs" and not is_address(name)


def read_source(name, config):
    """Yield the documents of a file or an address. Some may be empty."""
    if name == "python-docs":
        yield from python_docs()
        return
    is_openwebtext = any(name in addresses for addresses in OPENWEBTEXT.values())
    one_document = config.one_document_per_file or is_openwebtext
    source = without_secrets(name)  # also without ?query, so that an address ends like the name of a file
    with open_source(name) as stream:
        yield from read_file(stream, source, one_document)


def read_file(stream, source, one_document):
    """Yield the documents of a file. The ending of `source`, its name, decides how it is read."""
    kind, compression = kind_of(source)
    if not kind:
        raise UserError(f"{source} cannot be read; it is no {READABLE}")
    try:
        with add_path_to_errors(source), decompress(stream, compression, source) as file:
            if kind == ".txt":
                yield from read_txt(file, source, one_document)
            elif kind == ".tar":
                for name, content in read_tar(file):  # a member may be an archive in its turn
                    yield from read_file(content, f"{source}/{name}", one_document)
            elif kind == ".parquet":
                yield from read_parquet(file, source)
            else:
                yield from read_jsonl(file, source)
    except (EOFError, OSError, RecursionError, zlib.error, lzma.LZMAError, tarfile.TarError) as error:
        is_of_system = isinstance(error, OSError) and error.errno  # damage has no number
        if is_of_system:
            raise
        raise UserError(f"{source} is damaged or cut short ({error}); make or fetch it again") from error


def decompress(stream, compression, source):
    """A context manager that gives the content of a stream as a file."""
    if compression and not stream.peek(1):  # gzip would take it for an empty file
        raise EOFError("it is empty")
    if compression == ".gz":
        return gzip.open(stream)
    if compression == ".xz":
        return lzma.open(stream)
    if compression == ".zst":
        return io.BufferedReader(import_pyarrow(source).CompressedInputStream(stream, "zstd"))
    return nullcontext(stream)


def import_pyarrow(source):
    """pyarrow, which only .parquet and .zst need."""
    try:
        import pyarrow.parquet
    except ImportError:
        raise UserError(f"{source} is read with pyarrow: pip install pyarrow") from None
    return pyarrow


def read_tar(file):
    """Yield (name, content as a file) for each readable member. Nothing is unpacked to disk."""
    with tarfile.open(fileobj=file, mode="r|", tarinfo=Member) as tar:
        while member := tar.next():
            tar.members.clear()  # it would grow with the archive
            if member.isfile() and is_readable(member.name):
                yield member.name, tar.extractfile(member)


class Member(tarfile.TarInfo):
    """A member of a tar. A header that is damaged or missing is an error.

    tarfile takes it for the end of the archive, and would leave out the rest without a word.
    """

    @classmethod
    def fromtarfile(cls, tar):
        try:
            return super().fromtarfile(tar)
        except tarfile.EOFHeaderError:  # a block of zeros, which ends the archive
            # Only zeros may follow. Reading them also verifies the checksum of a compressed tar.
            while rest := tar.fileobj.read(1 << 20):
                if rest.strip(b"\0"):
                    raise tarfile.ReadError("data after its end") from None
            raise
        except tarfile.HeaderError as error:
            raise tarfile.ReadError(str(error)) from None


def read_txt(file, source, one_document):
    """Yield the parts of a text file between blank lines or, with `one_document`, all of it."""
    if one_document:
        yield decode_utf8(file.read(), source)
        return
    lines = []
    size = 0
    for number, raw in enumerate(file, 1):  # bytes: only "\n" ends a line
        line = decode_utf8(raw, f"{source}, line {number},")
        is_blank = not line.strip()
        if is_blank or size >= MAX_DOCUMENT:
            yield "".join(lines)
            lines = []
            size = 0
        lines.append(line)  # a blank one, too: `read_documents` strips it
        size += len(line)
    yield "".join(lines)


def read_jsonl(file, source):
    """Yield the documents of a file with a JSON object on each line: the string under "text"."""
    for number, line in enumerate(file, 1):
        if line.strip():
            place = f"{source}, line {number},"
            yield without_surrogates(find_text(parse_json(line, place), place))


def read_parquet(file, source):
    """Yield the documents of a parquet file: the strings of the column "text"."""
    pyarrow = import_pyarrow(source)
    with tempfile.TemporaryFile() as copy:  # reading begins at the end, which a stream cannot
        shutil.copyfileobj(file, copy)
        try:
            for batch in pyarrow.parquet.ParquetFile(copy).iter_batches(batch_size=1000, columns=["text"]):
                for row in batch.to_pylist():
                    yield find_text(row, source)
        except pyarrow.ArrowException as error:
            raise EOFError(error) from error  # which `read_file` reports as damage


def find_text(row, source):
    """The string under "text" in a dict."""
    text = row.get("text")
    if not isinstance(text, str):
        raise UserError(f'{source} has no string under "text" but {text!r:.40}')
    return text


# A capitalized word, four plain words or more, and a full stop.
SENTENCE = re.compile(r"[A-Z][a-z']*(?:[,;:]? [A-Za-z][a-z]*(?:[-'][a-z]+)*){4,}[.?!]")


def python_docs():
    """Yield about 2 MB of English found on every machine: a document for each file, a sentence on each line.

    Takes sentences that look like prose, each once, from the docstrings and comments of the standard library,
    torch and numpy. The files are searched, never imported.
    """
    roots = [sysconfig.get_path("stdlib")]
    for package in ("torch", "numpy"):
        spec = importlib.util.find_spec(package)
        roots.append(spec.submodule_search_locations[0])  # its folder
    skipped = {"site-packages", "test", "tests", "idle_test"}
    documents = []
    for root in roots:
        for path in Path(root).rglob("*.py"):
            if not skipped & set(path.relative_to(root).parts):
                documents.append(find_sentences(path.read_text("utf-8", "replace")))
    documents.sort(key=digest)  # an arbitrary but fixed order, so that each shard mixes the packages
    seen = set()
    for sentences in documents:
        yield "\n".join(sentence for sentence in sentences if sentence not in seen)
        seen.update(sentences)


def find_sentences(source):
    """The sentences of prose in the docstrings and comments of a Python file, each once."""
    blocks = re.findall(r'"""(.*?)"""', source, re.DOTALL)
    runs = itertools.groupby(source.split("\n"), key=lambda line: line.lstrip().startswith("#"))
    for is_comment, lines in runs:
        if is_comment:
            blocks.append("\n".join(lines).replace("#", ""))
    found = []
    for block in blocks:
        for paragraph in re.split(r"\n\s*\n", block):
            text = " ".join(re.sub("[`*]", "", paragraph).split())
            found += filter(SENTENCE.fullmatch, re.split(r"(?<=[.?!]) ", text))
    return list(dict.fromkeys(found))


def no_text(config):
    names = " ".join(without_secrets(name) for name in config.data)
    return UserError(f"there is no text to train on in {names}")


def describe_unread(config):
    """A clause on the files in folders that are not read, such as "; 8 files are not read: .bz2 8", or ""."""
    kinds = Counter()
    for folder in filter(os.path.isdir, config.data):
        for path in walk(folder):
            if not is_readable(path):
                kinds[Path(path).suffix or "no ending"] += 1
    if not kinds:
        return ""
    listed = ", ".join(f"{kind} {count:,}" for kind, count in kinds.most_common(9))
    return f"; {kinds.total():,} files are not read: {listed}"


# ------------------------------------------------------------------------------------------------------------
# Workers: documents -> shards, on several cores

try:
    CORES = len(os.sched_getaffinity(0))
except AttributeError:  # macOS
    CORES = os.cpu_count()
WORKERS = min(8, CORES)  # processes that turn text into rows; a single reader can keep about 8 busy
HELDOUT_EVERY = 100  # one document in 100 is held out


def build_shards(shard_texts, wordpiece, config):
    """Yield (rows for training, held-out rows, info) of each shard whose text read_shard_texts yields.

    The workers take turns, and each has the text of one shard at a time, so memory does not grow.
    """
    if WORKERS < 2:
        for number, documents, end in shard_texts:
            yield build_shard(number, documents, end, wordpiece, config)
        return
    errors = []  # of reading the text: at most one, raised after the shards before it are written
    shard_texts = until_error(shard_texts, errors)
    busy = deque()  # connections to the workers, in the order of their shards
    with ExitStack() as stack:
        # A text for each worker.
        for shard_text in itertools.islice(shard_texts, WORKERS):
            worker = stack.enter_context(start_worker(wordpiece, config))
            send(worker, shard_text)
            busy.append(worker)
        # In turn, a shard from a worker, and the next text to it.
        for shard_text in shard_texts:
            worker = busy.popleft()
            shard = receive(worker)
            send(worker, shard_text)  # before the shard is written: a worker that waits is a core that waits
            busy.append(worker)
            yield shard
        # The last shards.
        for worker in busy:
            yield receive(worker)
    if errors:
        raise errors[0]


def until_error(shard_texts, errors):
    """Yield what can be read. An error ends it, and goes to `errors`."""
    try:
        yield from shard_texts
    except (UserError, OSError) as error:
        errors.append(error)


def start_worker(wordpiece, config):
    """Start a process that runs `run_worker`. Returns a connection; closing it ends the process.

    Unlike the pools of the standard library, this never hangs when a worker is killed while it sends.
    """
    spawn = multiprocessing.get_context("spawn")
    ours, theirs = spawn.Pipe()
    spawn.Process(target=run_worker, args=(theirs, wordpiece.tokens, config), daemon=True).start()
    theirs.close()  # else `receive` would wait for a worker that has been killed
    return ours


def run_worker(connection, tokens, config):
    """Turn each text that arrives into a shard, and send that back."""
    os.setsid()  # Ctrl-C reaches only the parent
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # one core each
    wordpiece = WordPiece.from_config(tokens, config)
    with suppress(EOFError, OSError):  # the parent has ended or closed the connection
        while True:
            number, documents, end = connection.recv()
            connection.send(build_shard(number, documents, end, wordpiece, config))


def send(worker, shard_text):
    with suppress(OSError):  # it has been killed, which `receive` reports in its turn
        worker.send(shard_text)


def receive(worker):
    """Wait for a worker's shard."""
    try:
        return worker.recv()
    except (EOFError, OSError):
        raise UserError("a process that prepares text was killed or failed; run the same command "
                        "again") from None


def build_shard(number, documents, end, wordpiece, config):
    """(rows for training, held-out rows, info) of a shard. Rows are uint16; info has counts and `end`.

    The random numbers of a document follow from the seed, the shard's number and the document's index in it.
    """
    train = []
    heldout = []
    kept = 0
    dropped = 0
    for index, lines in enumerate(tokenize(documents, wordpiece)):
        rows, num_kept, num_dropped = build_rows(lines, f"{config.seed} {number} {index}", wordpiece, config)
        if is_heldout(documents[index]):
            heldout += rows
        else:
            train += rows
        kept += num_kept
        dropped += num_dropped
    train = to_array(train, config.max_length)
    heldout = to_array(heldout, config.max_length)
    unk = wordpiece.unk_token_id
    unknown = int(np.sum(train == unk) + np.sum(heldout == unk))
    marks = 0  # vowel signs and the like that are stripped, see MARKS
    if wordpiece.strip_accents:
        marks = count_marks(documents)
    info = dict(documents=len(documents), tokens_kept=kept, tokens_dropped=dropped, end=end,
                rows=len(train), heldout_rows=len(heldout), tokens_unknown=unknown, marks_stripped=marks)
    return train, heldout, info


def is_heldout(text):
    """Whether a document is held out. A hash decides, so duplicates are never split."""
    number = int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")
    return number % HELDOUT_EVERY == 0


def to_array(rows, length):
    return np.array(rows, dtype=np.uint16).reshape(-1, length)  # reshape: an empty list has shape (0,)


# ------------------------------------------------------------------------------------------------------------
# Rows: a document -> WordPiece ids -> rows of two segments

def tokenize(documents, wordpiece):
    """Yield [ids of each line] for each document."""
    split = [[line for line in text.split("\n") if line.strip()] for text in documents]
    # All lines are encoded in one call, which is parallel, and then dealt out to their documents.
    ids = iter(wordpiece.encode([line for lines in split for line in lines]))
    for lines in split:
        yield [next(ids) for _ in lines]


def build_rows(lines, seed, wordpiece, config):
    """(rows, number of ids kept, number dropped) of a document. A row is a list of max_length ids."""
    uniform = random.Random(seed).random  # draws from [0, 1); NumPy's generator is slow to make
    if config.split_long_lines:
        lines = [piece for line in lines for piece in split_line(line, config.max_length)]
    rows = []
    kept = 0
    dropped = 0
    for first, second, overflow in segment(lines, config.max_length, uniform):
        row = wordpiece.add_special_tokens(first, second)
        rows.append(row + [0] * (config.max_length - len(row)))
        kept += len(first) + len(second)
        dropped += overflow
    return rows, kept, dropped


def split_line(line, max_length):
    """Cut a line that is longer than a row into pieces of a quarter of a row.

    So a segment can end near the middle of a row. A full row still loses 3 ids: [CLS] and two [SEP] take
    their places.

    >>> split_line([1, 2, 3, 4, 5, 6, 7, 8, 9], 8), split_line([1, 2, 3], 8)
    ([[1, 2], [3, 4], [5, 6], [7, 8], [9]], [[1, 2, 3]])
    """
    if len(line) <= max_length:
        return [line]
    pieces = []
    for start in range(0, len(line), max_length):
        block = line[start : start + max_length]
        for quarter in range(4):
            piece = block[quarter * max_length // 4 : (quarter + 1) * max_length // 4]
            if piece:  # the last block may be shorter
                pieces.append(piece)
    return pieces


def segment(lines, max_length, uniform):
    """Cut a document into rows of two segments: yield (first, second, number of ids dropped).

    `lines` holds a list of ids for each line, `uniform()` draws from [0, 1). The second segment may be empty.
    Called once per document, so that no row crosses the end of one. [D01] There is no next-sentence task:
    segments only train token type 1 and the second [SEP], which sentence pairs need in fine-tuning.

    Lines are collected until they hold `target` ids, usually max_length, and then dealt out to two segments.
    Below, max_length is 12. The first four lines fill a row, and the last line gets a row of its own.

    >>> list(segment([[1, 2], [3, 4, 5], [6, 7, 8, 9, 10, 11], [12], [13]], 12, lambda: 0.5))
    [([1, 2, 12], [3, 4, 5, 6, 7, 8], 3), ([13], [], 0)]
    """
    collected = []
    length = 0
    target = draw_target(max_length, uniform)
    for line in lines:
        collected.append(line)
        length += len(line)
        if length >= target:
            yield deal_out(collected, target, max_length, uniform)
            collected = []
            length = 0
            target = draw_target(max_length, uniform)
    if length:
        yield deal_out(collected, target, max_length, uniform)


def draw_target(max_length, uniform):
    """The number of ids to collect: max_length or, with probability 0.05, a uniform draw from 5 to it. [D03]

    Unlike the official code, where a target carries over to the next document, each document begins with a
    draw of its own. Its rows then do not depend on the documents before it.
    """
    if uniform() < 0.05:
        return 5 + int(uniform() * (max_length - 4))
    return max_length


def deal_out(lines, target, max_length, uniform):
    """Deal lines out to two segments that meet near the middle, and drop what overflows a row.

    Below, the first segment should stay under (12 - 3) // 2 = 4 ids. [1, 2] goes to it. [3, 4, 5]
    crosses the middle, and a coin, uniform() < 0.5, sends it to the second. [12] fits into the first, and
    still joins it. A row has room for 9 ids beside [CLS] and two [SEP], so 3 are dropped.

    >>> deal_out([[1, 2], [3, 4, 5], [6, 7, 8, 9, 10, 11], [12]], 12, 12, lambda: 0.5)
    ([1, 2, 12], [3, 4, 5, 6, 7, 8], 3)
    """
    half = (target - 3) // 2
    if uniform() < 0.1:
        half = math.inf  # everything goes to the first segment
    first = []
    second = []
    for line in lines:
        if not first or len(first) + len(line) < half:
            goes_first = True  # [D02] even after `second` has begun: line order can change
        elif not second and len(first) < half:  # the line crosses the middle
            goes_first = uniform() < 0.5
        else:
            goes_first = False
        if goes_first:
            first += line
        else:
            second += line
    length = len(first) + len(second)
    first = first[: max_length - 2]
    room = max(0, max_length - len(first) - 3)  # 0 also where `first` leaves no room for a second [SEP]
    second = second[:room]  # [D04] the overflow is dropped
    return first, second, length - len(first) - len(second)


# ------------------------------------------------------------------------------------------------------------
# WordPiece: lines <-> ids

NOT_PRINTABLE_ASCII = re.compile(r"[^ -~]+")


class WordPiece:
    """A vocabulary, `tokens` in the order of their ids, and the rules that turn text into ids.

    A word is cut greedily: each token is the longest that fits, and inside a word tokens begin with ##. No
    text becomes a special token: "[SEP]" is tokenized as "[", "sep" and "]".

    >>> wordpiece = WordPiece([*SPECIAL_TOKENS, "p", "play", "##ing", "##in"])
    >>> [wordpiece.tokens[number] for number in wordpiece.encode(["Playing"])[0]]
    ['play', '##ing']
    """

    @classmethod
    def from_config(cls, tokens, config):
        """With the rules of a DataConfig."""
        return cls(tokens, config.do_lower_case, config.strip_accents)

    def __init__(self, tokens, do_lower_case=True, strip_accents=True):
        self.tokens = tokens
        self.do_lower_case = do_lower_case
        self.strip_accents = do_lower_case and strip_accents
        ids = {token: number for number, token in enumerate(tokens)}
        self.cls_token_id = ids[CLS]
        self.sep_token_id = ids[SEP]
        self.mask_token_id = ids[MASK]
        self.unk_token_id = ids[UNK]
        self.sha256 = hashlib.sha256("\n".join(tokens).encode()).hexdigest()
        # As in the official code, only words over 200 characters become [UNK] for their length.
        self.tokenizer = Tokenizer(models.WordPiece(ids, unk_token=UNK, max_input_chars_per_word=200))
        self.tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        # Not within the tokenizer, since `normalize` is faster.
        self.normalizer = normalizers.BertNormalizer(
            lowercase=self.do_lower_case, strip_accents=self.strip_accents)

    def encode(self, lines):
        """A list of lines -> a list of lists of ids, without special tokens."""
        texts = [self.normalize(line) for line in lines]
        encodings = self.tokenizer.encode_batch_fast(texts, add_special_tokens=False)
        return [encoding.ids for encoding in encodings]

    def normalize(self, line):
        """What `normalizer` makes of a line, a third faster: printable ASCII needs only lower-casing.

        BertNormalizer works character by character, so pieces of a line may be normalized one by one.
        """
        line = NOT_PRINTABLE_ASCII.sub(lambda match: self.normalizer.normalize_str(match[0]), line)
        if self.do_lower_case:
            line = line.lower()
        return line

    def add_special_tokens(self, first, second):
        """[CLS] first [SEP] second [SEP], or [CLS] first [SEP] if there is no second, as a list of ids."""
        row = [self.cls_token_id, *first, self.sep_token_id]
        if second:
            row += [*second, self.sep_token_id]
        return row

    def unknown_share(self, rows):
        """The share of [UNK] among the ids of text in rows, an array of ids."""
        ids = rows[(rows != 0) & (rows != self.cls_token_id) & (rows != self.sep_token_id)]
        if not len(ids):
            return 0.0
        return float(np.mean(ids == self.unk_token_id))

    def cased_share(self):
        """The share of tokens that lower-casing makes useless. [PAD] and its like do not count."""
        if not self.do_lower_case:
            return 0.0
        is_useless = [token != token.lower() and not token.startswith("[") for token in self.tokens]
        return sum(is_useless) / len(self.tokens)

    def decode(self, ids):
        """Readable text, with special tokens and without padding."""
        words = [self.tokens[number] for number in ids if number != 0]  # 0 is [PAD]
        return " ".join(words).replace(" ##", "")

    def files(self, max_length):
        """{name: bytes} of vocab.txt and tokenizer_config.json. `max_length` is the length trained on."""
        # Without tokenizer_config.json, transformers always lower-cases and strips accents.
        settings = dict(tokenizer_class="ElectraTokenizer", do_lower_case=self.do_lower_case,
                        strip_accents=self.strip_accents, tokenize_chinese_chars=True,
                        model_max_length=max_length)
        return {"vocab.txt": vocab_bytes(self.tokens),
                "tokenizer_config.json": (json.dumps(settings, indent=2) + "\n").encode()}


def unknown_warning(share):
    """A warning that names the usual causes of so many [UNK], or "" if they are at most 5 %."""
    if share <= 0.05:
        return ""
    return (f"warning: {share:.0%} of the tokens are [UNK]. Usual causes: a vocabulary of another "
            "language, case or accents; a vocabulary of another kind (with ▁ or Ġ); words of over 200 "
            "characters (text without spaces); lines of vocab.txt that hold more than a token")


# Combining marks (category Mn) that change a word when they are stripped as accents: vowel signs of Hindi,
# Thai and Arabic, voicing marks of Japanese and the like. Those up to U+036F belong to Latin, Greek and
# Cyrillic, and those from U+FE00 on mostly to emoji.
MARKS = [chr(code) for code in range(0x370, 0xFE00) if unicodedata.category(chr(code)) == "Mn"]
ANY_MARK = re.compile(f"[{''.join(MARKS)}]")


def count_marks(texts):
    """The number of MARKS in texts, also in characters that Unicode takes apart into a letter and a mark."""
    return sum(len(ANY_MARK.findall(unicodedata.normalize("NFD", text))) for text in texts)


def vocab_bytes(tokens):
    """The content of a vocab.txt."""
    return "".join(f"{token}\n" for token in tokens).encode()


# ------------------------------------------------------------------------------------------------------------
# Shards: rows <-> disk
#
# What may change, and what shows it:
#     a file of the text               its Identity, when a shard is added and at the end
#     documents that are read again    the CRC-32 in their Position
#     a shard                          its seal, and its SHA-256 in `complete`
#     the text of a resumed run        its history, made of these SHA-256

FORMAT = 4  # raise it when rows or their files change
CACHE_ADVICE = "delete its folder, and it is made again"


class Shards:
    """The shards on disk that were made from one text with one vocabulary.

    shard-N.npz holds the rows for training, the held-out rows and the `info` of build_shard: counts, and the
    position in the text after the shard. `complete` lists them all, and says that there will be no more.
    """

    def __init__(self, config, wordpiece):
        self.config = config
        self.wordpiece = wordpiece
        self.infos = []  # of each shard that is known so far: its info, and the file's "sha256"
        self.is_complete = False
        self.files = find_files(config)
        self.root = common_folder(self.files)
        self.identities = [identify(name, self.root) for name in self.files]
        self.row_settings = {  # all that the rows depend on, apart from the text
            "format": [FORMAT, SHARD_CHARACTERS, HELDOUT_EVERY],
            "one_document_per_file": config.one_document_per_file,
            "split_long_lines": config.split_long_lines,
            "vocab": wordpiece.sha256[:12],
            "do_lower_case": wordpiece.do_lower_case,
            "strip_accents": wordpiece.strip_accents,
            "max_length": config.max_length,
            "seed": config.seed,
        }
        self.folder = self.find_folder()
        self.folder.mkdir(parents=True, exist_ok=True)  # so that the child process finds this one
        self.refresh()

    def find_folder(self):
        """The folder for these shards: one made from the same files, or from a copy of them, or a new one.

        Folders are named SOURCE-KEY-TIMES. If KEY and TIMES agree, the files are the same. If only KEY does,
        they may be a copy: then the SHA-256 of each file decides.
        """
        key = digest([self.row_settings, [identity.portable for identity in self.identities]])
        times = digest([identity.local for identity in self.identities])
        cache = Path(self.config.cache)
        same = sorted(cache.glob(f"*-{key}-{times}"))
        if same:
            return same[0]
        complete = sorted(cache.glob(f"*-{key}-*/complete"))
        if complete:
            hashes = hash_files(self.files)
            for path in complete:
                if read_complete(path)["files"] == hashes:
                    return path.parent
        return cache / f"{source_name(self.config)}-{key}-{times}"

    def refresh(self):
        """Look for shards that another process has added."""
        if self.is_complete:
            return
        complete = self.folder / "complete"
        if complete.exists():
            self.infos = read_complete(complete)["shards"]
            for number in range(len(self.infos)):
                if not self.path(number).exists():
                    raise UserError(f"{self.path(number)} is missing; {CACHE_ADVICE}")
            self.is_complete = True
            return
        while self.path(len(self.infos)).exists():
            arrays, sha256 = self.read(len(self.infos))
            info = json.loads(arrays["info"].item())  # np.savez made an array of the string
            self.infos.append(info | dict(sha256=sha256))

    def path(self, number):
        return self.folder / f"shard-{number:06d}.npz"

    def read(self, number):
        """(arrays by their names, SHA-256) of a shard file."""
        content = read_sealed(self.path(number), advice=CACHE_ADVICE)
        return np.load(io.BytesIO(content)), hashlib.sha256(content).hexdigest()

    def load(self, name, number):
        """The `train` or `heldout` rows of a shard, uint16 (rows, max_length)."""
        arrays, sha256 = self.read(number)
        if sha256 != self.infos[number]["sha256"]:
            raise UserError(f"{self.path(number)} was replaced by another shard; {CACHE_ADVICE}")
        return arrays[name]

    @property
    def next_position(self):
        """The Position in the text at which the next shard begins."""
        if not self.infos:
            return START
        return end_of(self.infos[-1])

    def add(self, train, heldout, info):
        """Write the next shard, if the files that its text comes from are still those that were found."""
        for number in range(self.next_position.file_number, end_of(info).file_number + 1):
            if identify(self.files[number], self.root) != self.identities[number]:
                raise text_changed(self.files[number])
        file = io.BytesIO()
        np.savez(file, train=train, heldout=heldout, info=json.dumps(info))
        content = file.getvalue()
        write_sealed(self.path(len(self.infos)), content)
        self.infos.append(info | dict(sha256=hashlib.sha256(content).hexdigest()))

    def mark_complete(self):
        """Say that there will be no more shards, if the text is still the one that was read."""
        listing = dict(shards=self.infos, files=hash_files(self.files))
        if identify_text(find_files(self.config)) != self.identities:  # also if files were added
            raise text_changed("the text")
        write_sealed(self.folder / "complete", json.dumps(listing).encode())
        self.is_complete = True

    def total(self, name):
        """The sum of a count over all shards."""
        return sum(info[name] for info in self.infos)

    def describe(self):
        """What the shards hold, and a line for each warning."""
        kept = self.total("tokens_kept")
        lost_share = self.total("tokens_dropped") / max(1, kept + self.total("tokens_dropped"))
        unknown_share = self.total("tokens_unknown") / max(1, kept)
        state = "" if self.is_complete else ", still growing"
        text = (f"{self.folder}{state}: {self.total('documents'):,} documents, {self.total('rows'):,} rows "
                f"to train on, {self.total('heldout_rows'):,} held out; {lost_share:.0%} of the tokens "
                f"overflow and are dropped, {unknown_share:.1%} of the rest are [UNK]"
                f"{describe_unread(self.config)}")
        return "\n".join([text, *self.list_warnings(kept, lost_share, unknown_share)])

    def list_warnings(self, kept, lost_share, unknown_share):
        """Yield a warning if much of the text is lost, unknown or padding."""
        if lost_share > 0.4:
            option = "" if self.config.split_long_lines else ", or use --split-long-lines"
            yield ("warning: many tokens are dropped. ELECTRA takes a line for a sentence or a paragraph: "
                   f"raise --max-length{option}")
        warning = unknown_warning(unknown_share)
        if warning:
            yield warning
        room = (self.total("rows") + self.total("heldout_rows")) * self.config.max_length
        if kept < 0.4 * room and not warning:  # many [UNK] make rows short, too
            yield ("warning: rows are mostly padding. A blank line ends a document: if it should not, use "
                   "--one-document-per-file, else lower --max-length")
        if self.wordpiece.cased_share() > 0.05:
            yield ("warning: many tokens of the vocabulary have capitals and can never occur in lower-cased "
                   "text: use --no-do-lower-case")
        if self.total("marks_stripped") > 0.05 * kept:
            yield ("warning: vowel signs or voicing marks are stripped like accents, which changes words of "
                   "Hindi, Thai, Arabic, Japanese and others: use --no-strip-accents")


def text_changed(what):
    return UserError(f"{what} changed while it was being read; run the same command again")


def read_complete(path):
    """What `complete` holds: "shards", their infos, and "files", the SHA-256 of each file of the text."""
    return parse_json(read_sealed(path, advice=CACHE_ADVICE), path)


def end_of(info):
    """The Position in the text after a shard, from its info."""
    return Position(*info["end"])


def hash_files(files):
    """The SHA-256 of each of `find_files`. Addresses have none."""
    hashes = []
    for name in filter(is_local, files):
        with open(name, "rb") as file:
            hashes.append(hashlib.file_digest(file, "sha256").hexdigest())
    return hashes


class Identity(NamedTuple):
    """Tells whether a file of the text has changed, without reading it."""

    portable: list  # what a copy has, too: name, and size or versions
    local: list  # time and inode; in an image of a container all times may be 0


def identify_text(files):
    """The Identity of each of `find_files`."""
    root = common_folder(files)
    return [identify(name, root) for name in files]


def common_folder(files):
    """The folder that holds all of `find_files`. Names are relative to it, so that it can be moved."""
    parents = [os.path.dirname(os.path.abspath(name)) for name in files if is_local(name)]
    return os.path.commonpath(parents or ["/"])


def identify(name, root):
    """The Identity of one of `find_files`. Only files have a time and an inode."""
    if name == "python-docs":
        versions = [importlib.metadata.version(package) for package in ("torch", "numpy")]
        return Identity([name, [platform.python_version(), *versions]], [])
    if is_address(name):
        return Identity([name], [])
    status = os.stat(name)
    return Identity([os.path.relpath(name, root), status.st_size], [status.st_mtime_ns, status.st_ino])


def source_name(config):
    """The name of the first source, fit for the name of a file: short, and without secrets."""
    name = Path(without_secrets(config.data[0])).name
    return re.sub(r"[^\w.-]", "_", name)[:40] or "text"


# ------------------------------------------------------------------------------------------------------------
# Growing shards: a child process prepares the text while this process trains

HISTORY_DIGITS = 16  # hexadecimal, for each shard


class Stopped(UserError):
    """Waiting for text ended. `error` is the message of a child that failed, or None after a signal."""

    def __init__(self, error=None):
        super().__init__(error or "stopped; the same command resumes")
        self.error = error


class GrowingShards(Shards):
    """Shards to which a child of this process, or of another rank, may still be adding.

    Its methods wait for shards. They raise Stopped if the child of this process has failed, or as soon as
    `signals` is not empty, a list to which train.stop_signals appends.
    """

    def __init__(self, config, wordpiece):
        super().__init__(config, wordpiece)
        self.signals = []
        self.child = None
        self.child_output = None

    @contextmanager
    def prepare_in_child(self):
        """Run `prepare` in a child process for as long as the context lasts.

        Its stdout holds nothing but an error message, and is captured. Its progress shows on the terminal.
        multiprocessing would import the main program in it, which may be a script that starts training.
        """
        if self.is_complete:
            yield
            return
        with (tempfile.TemporaryFile() as output,
              subprocess.Popen([sys.executable, __file__, "child"], stdin=subprocess.PIPE, stdout=output,
                               start_new_session=True) as child):  # Ctrl-C reaches only the parent
            self.child = child
            self.child_output = output
            try:
                with suppress(BrokenPipeError):  # it has ended, which `child_error` reports
                    pickle.dump((self.wordpiece.tokens, asdict(self.config)), child.stdin)
                    child.stdin.flush()
                yield
            finally:
                child.kill()
                with suppress(BrokenPipeError):  # data that could not be sent
                    child.stdin.close()

    def wait_for_shards(self, count):
        """Block until there are `count` shards, or until the text is complete."""
        self.wait_until(lambda: len(self.infos) >= count)

    def history(self, count):
        """What a checkpoint keeps of the text that a run has read, so that a resumed run can compare it.

        It is the first digits of the SHA-256 of each of `count` shards, or of all if there are fewer. Blocks
        until they are there.
        """
        self.wait_for_shards(count)
        return "".join(info["sha256"][:HISTORY_DIGITS] for info in self.infos[:count])

    def changed_file(self, history):
        """The file or address in which the first shard begins that differs from another history."""
        begin = START
        for number, info in enumerate(self.infos):
            place = HISTORY_DIGITS * number
            if info["sha256"][:HISTORY_DIGITS] != history[place : place + HISTORY_DIGITS]:
                break
            begin = end_of(info)
        return without_secrets(self.files[begin.file_number])

    def heldout(self, limit):
        """The first `limit` held-out rows, int64, or all if the whole text has fewer. Blocks until then."""
        self.wait_until(lambda: self.total("heldout_rows") >= limit)
        rows = np.zeros((0, self.config.max_length), dtype=np.uint16)
        for number in range(len(self.infos)):
            if len(rows) >= limit:
                break
            rows = np.concatenate([rows, self.load("heldout", number)])
        return rows[:limit].astype(np.int64)

    def wait_until(self, is_there):
        """Block until `is_there()`, or until the text is complete."""
        with tqdm(desc="waiting for text", bar_format="{desc}, {elapsed}, {n} rows", delay=1, leave=False,
                  disable=None) as bar:
            while True:
                has_ended = self.child is not None and self.child.poll() is not None
                self.refresh()  # after `poll`: a child that has ended adds no more
                if is_there() or self.is_complete:
                    return
                if has_ended:
                    raise Stopped(self.child_error())
                if self.signals:
                    raise Stopped
                bar.update(self.total("rows") - bar.n)
                time.sleep(0.05)

    def child_error(self):
        """The error message of a child that has ended before the text did."""
        self.child_output.seek(0)
        message = self.child_output.read().decode(errors="replace").strip()
        status = self.child.returncode
        return message or f"preparing the text ended with status {status}; run the same command again"


def run_as_child():
    """Receive a vocabulary and a config from standard input, and prepare text. Returns the exit status."""
    sys.stdout.reconfigure(encoding="utf-8", errors="replace")
    tokens, settings = pickle.load(sys.stdin.buffer)
    config = DataConfig(**settings)
    threading.Thread(target=end_with_parent, daemon=True).start()
    try:
        prepare(config, WordPiece.from_config(tokens, config))
    except (UserError, OSError) as error:
        print(error)
        return 1
    return 0


def end_with_parent():
    os.read(0, 1)  # the parent writes no more, so this returns when the parent ends and the pipe closes
    os._exit(1)


# ------------------------------------------------------------------------------------------------------------
# Order: (seed, step) -> the rows of a step

MAX_GROUP = 128  # most shards that are shuffled together, about 100 MB


class Order:
    """The endless sequence of rows that training reads. The rows of a step are a function of (seed, step).

    Shards form groups of 1, 2, 4, ... 128, and the rows of a group are shuffled. In epoch 0 shards come in
    their own order, so that training begins when the first is there; later epochs permute them. For example,
    five shards of 100 rows: the sequence begins with the 100 rows of shard 0; the next 200 rows are those of
    shards 1 and 2, mixed; the next 200, which end epoch 0, are those of shards 3 and 4.
    """

    def __init__(self, shards, batch_size):
        self.shards = shards
        self.batch_size = batch_size
        self.seed = shards.config.seed
        self.groups = self.list_groups()
        self.rows = np.zeros((0, shards.config.max_length), dtype=np.uint16)  # a part of the sequence
        self.end = 0  # the place in the sequence where `rows` ends
        self.epoch = 0  # of the last of `rows`
        # How many shards a checkpoint vouches for: more than there are once the run has seen the end of the
        # text, so that a text that has grown is noticed.
        self.num_shards_used = 0

    def batch(self, step):
        """(epoch, ids (batch_size, max_length) int64) of a step. Steps must not decrease.

        Blocks until the rows are prepared. Raises Stopped if they will not be, or if there is a signal.
        """
        begin = step * self.batch_size
        while self.end < begin + self.batch_size:
            if self.shards.signals:  # a resume at a far step skips many groups
                raise Stopped
            self.epoch, group, members = next(self.groups)
            self.end += sum(self.shards.infos[shard]["rows"] for shard in members)
            if self.end > begin:
                self.rows = np.concatenate([self.rows, self.read(self.epoch, group, members)])
            else:  # all of the group comes before the step, and is not read
                self.rows = self.rows[:0]
        num_left = self.end - begin  # rows from this step on, the last of `rows`
        assert num_left <= len(self.rows), "the step is earlier than the last one"
        self.rows = self.rows[-num_left:]
        return self.epoch, self.rows[: self.batch_size].astype(np.int64)

    def read(self, epoch, group, members):
        """The shuffled rows of a group of shards."""
        rows = np.concatenate([self.shards.load("train", shard) for shard in members])
        return rows[rng(self.seed, "rows", epoch, group).permutation(len(rows))]

    def list_groups(self):
        """Yield (epoch, index of the group in it, the group's shards) for ever."""
        for group, (begin, end) in enumerate(group_bounds()):
            self.shards.wait_for_shards(end)
            self.num_shards_used = end
            members = list(range(begin, min(end, len(self.shards.infos))))
            if not members:
                break
            yield 0, group, members
        for epoch in itertools.count(1):
            permuted = rng(self.seed, "shards", epoch).permutation(len(self.shards.infos)).tolist()
            for group, (begin, end) in enumerate(group_bounds()):
                members = permuted[begin:end]
                if not members:
                    break
                yield epoch, group, members


def group_bounds():
    """Yield (place of its first shard, place after its last) for each group: (0, 1), (1, 3), (3, 7), ..."""
    begin = 0
    size = 1
    while True:
        yield begin, begin + size
        begin += size
        size = min(2 * size, MAX_GROUP)


def rng(seed, purpose, *numbers):
    """A NumPy random generator that is a function of its arguments."""
    return np.random.default_rng([seed, *purpose.encode(), *numbers])  # bytes are numbers


# ------------------------------------------------------------------------------------------------------------
# Model folders: a path, a run of train.py, or a name on the hub


def find_model(name, cache, network=None):
    """The folder of a model. `name` is that folder, a run of train.py, or OWNER/NAME on the hub.

    `network`, discriminator or generator, picks one of a run; by default it is the one to fine-tune.
    """
    folder = Path(name)
    if folder.is_dir() and not (folder / "config.json").is_file():
        folder = folder / (network or trained_network(folder))
    if (folder / "config.json").is_file():
        return folder
    is_own = Path(name).exists() or name.startswith("out/")  # out/small: perhaps a run that was never made
    if is_own or not re.fullmatch(r"[\w.-]{1,96}/[\w.-]{1,96}", name):
        place = without_secrets(name) if is_address(name) else folder
        raise UserError(f"there is no model in {place}; pre-train one with `python train.py --size small`, "
                        "or give google/electra-small-discriminator or another name on the hub")
    snapshot = find_snapshot(name)
    if snapshot:
        return snapshot
    folder = Path(cache) / "models" / name.replace("/", "--")
    make_once(folder / "config.json", lambda: download_model(name, folder))
    return folder


def find_snapshot(name):
    """The folder to which huggingface_hub has downloaded a whole model, or None."""
    home = os.environ.get("HF_HOME") or f"{os.environ.get('XDG_CACHE_HOME') or '~/.cache'}/huggingface"
    cache = os.environ.get("HF_HUB_CACHE") or f"{home}/hub"
    folder = Path(cache).expanduser() / f"models--{name.replace('/', '--')}"
    with suppress(OSError, ValueError):  # it is not there, or damaged
        snapshot = folder / "snapshots" / (folder / "refs" / "main").read_text().strip()
        files = {path.name for path in snapshot.iterdir() if path.exists()}  # links may lead nowhere
        has_tokenizer = "tokenizer.json" in files or {"vocab.txt", "tokenizer_config.json"} <= files
        has_weights = "model.safetensors" in files or "pytorch_model.bin" in files
        if has_tokenizer and has_weights and "config.json" in files:
            return snapshot
    return None


def trained_network(folder):
    """Which network of a run of train.py, or of a step-N in it, is the one to fine-tune.

    The objective decides, whichever networks are there: a generator never replaces a discriminator.
    """
    run = folder.parent if folder.name.startswith("step-") else folder
    log = run / "log.jsonl"
    if log.is_file():
        with open(log, "rb") as file:
            settings = parse_json(file.readline(), log).get("settings", {})
        if settings.get("objective") == "mlm":
            return "generator"
    return "discriminator"


def download_model(name, folder):
    """Download a model from the hub. config.json comes last and marks a complete download."""

    def get(file):
        download(folder / file, f"hub:/{name}/resolve/main/{file}",
                 advice=f"check the name: there is no folder {name} here either")

    def get_if_there(file):
        try:
            get(file)
        except NotFound:
            return False
        return True

    for file in "vocab.txt", "tokenizer.json", "tokenizer_config.json":
        get_if_there(file)
    if not get_if_there("model.safetensors"):
        index = "model.safetensors.index.json"  # lists the files of weights that are in several
        if get_if_there(index):
            content = (folder / index).read_text("utf-8", "replace")
            # A file with a "/" is left out: it could be written outside of the folder.
            for file in sorted(set(re.findall(r'"([\w.-]+\.safetensors)"', content))):
                get(file)
        else:
            get("pytorch_model.bin")
    get("config.json")


# What tokenizer_config.json and tokenizer.json may say: the usual value first, and None for null or no entry.
CONFIG_VALUES = {
    "tokenizer_class": ["ElectraTokenizer", "ElectraTokenizerFast", "BertTokenizer", "BertTokenizerFast",
                        "PreTrainedTokenizerFast", "TokenizersBackend", None],
    "do_lower_case": [True, False, None],
    "strip_accents": [True, False, None],
    "do_basic_tokenize": [True, None],
    "word_tokenizer_type": ["basic", None],
    "subword_tokenizer_type": ["wordpiece", None],
    "wordpieces_prefix": ["##", None],
    "tokenize_chinese_chars": [True, None],
    "never_split": [[], None],
    "unk_token": [UNK, None],
    "mask_token": [MASK, None],
}
JSON_VALUES = {
    "model.type": ["WordPiece", None],
    "model.continuing_subword_prefix": ["##", None],
    "model.unk_token": [UNK, None],
    "model.max_input_chars_per_word": [200, 100, None],  # transformers has 100, the official code 200
    "normalizer.type": ["BertNormalizer"],
    "normalizer.clean_text": [True, None],
    "normalizer.handle_chinese_chars": [True, None],
    "normalizer.lowercase": [True, False],
    "normalizer.strip_accents": [True, False, None],
    "pre_tokenizer.type": ["BertPreTokenizer"],
}
TOKENIZER_DEFAULTS = dict(do_lower_case=True, strip_accents=True, model_max_length=None)


def read_tokenizer(folder):
    """(WordPiece, max_length or None) of a model folder. max_length is the length trained on.

    The vocabulary and the settings for case and accents stand in vocab.txt and tokenizer_config.json, in
    tokenizer.json, or in both. Files that disagree are refused: other libraries may follow the other one.
    """
    vocab_path = Path(folder, "vocab.txt")
    config_path = Path(folder, "tokenizer_config.json")
    json_path = Path(folder, "tokenizer.json")
    vocabularies = [read_vocab(path) for path in (vocab_path, json_path) if path.is_file()]
    if not vocabularies:
        raise UserError(f"{folder} is not a model folder: it has neither vocab.txt nor tokenizer.json")
    tokens = vocabularies[0]
    if any(vocabulary != tokens for vocabulary in vocabularies):
        raise UserError(f"{vocab_path} and {json_path} hold different vocabularies; delete the wrong one")
    config_settings = read_tokenizer_config(config_path)
    json_settings = read_tokenizer_json(json_path)
    for name, value in json_settings.items():
        if config_settings.get(name, value) != value:  # both state it, and differ
            raise UserError(f"{config_path} and {json_path} disagree about {name}; correct the wrong one")
    for path, settings in (config_path, config_settings), (json_path, json_settings):
        if settings.get("strip_accents") and settings.get("do_lower_case") is False:
            raise unsupported(path, "accents are stripped only from lower-cased text")
    settings = TOKENIZER_DEFAULTS | config_settings | json_settings
    wordpiece = WordPiece(tokens, settings["do_lower_case"], settings["strip_accents"])
    return wordpiece, settings["model_max_length"]


def read_tokenizer_config(path):
    """The entries of TOKENIZER_DEFAULTS that a tokenizer_config.json states, or {} if there is no file."""
    if not path.is_file():
        return {}
    content = read_json(path)
    check_values(content, CONFIG_VALUES, path)
    if not isinstance(content.get("model_max_length"), int | float | None):  # 1e30 stands for no limit
        raise UserError(f"{path} is damaged: model_max_length is {content['model_max_length']!r}")
    return {name: content[name] for name in TOKENIZER_DEFAULTS if content.get(name) is not None}


def read_tokenizer_json(path):
    """do_lower_case and strip_accents, as a tokenizer.json states them, or {} if there is no file."""
    if not path.is_file():
        return {}
    content = read_json(path)
    check_values(content, JSON_VALUES, path)
    added_tokens = content.get("added_tokens") or []
    if not isinstance(added_tokens, list):
        raise unsupported(path, f"added_tokens is {added_tokens!r:.80}")
    for added_token in added_tokens:
        token = find_entry(added_token, "content")
        if token not in SPECIAL_TOKENS:
            raise unsupported(path, f"added_tokens has {token!r:.80}")
    lowercase = content["normalizer"]["lowercase"]
    strip_accents = content["normalizer"].get("strip_accents")
    if strip_accents is None:  # accents go with the capitals
        strip_accents = lowercase
    return dict(do_lower_case=lowercase, strip_accents=strip_accents)


def check_values(content, possible_values, path):
    """Raise UserError if an entry of `content` is not among its possible values."""
    for name, values in possible_values.items():
        value = find_entry(content, name)
        if name.endswith("_token") and isinstance(value, dict):  # a token with its properties
            value = value.get("content")
        if value not in values or type(value) not in map(type, values):  # 1.0 is no True
            raise unsupported(path, f"{name} is {value!r:.80} and not {values[0]!r}")


def unsupported(path, rule):
    return UserError(f"{path} asks for a rule that this tokenizer lacks: {rule}")


def find_entry(content, name):
    """The entry of nested JSON objects at a dotted name such as model.type, or None."""
    for key in name.split("."):
        content = content.get(key) if isinstance(content, dict) else None
    return content


# ------------------------------------------------------------------------------------------------------------
# Vocabularies

BERT_VOCAB = dict(  # BERT's uncased vocabulary, which is ELECTRA's
    address="hub:/google/electra-small-discriminator/resolve/main/vocab.txt",
    size=231_508,
    sha256="07eced375cec144d27c900241f3e339478dec958f92fddbc551f295c992038a3",
)
VOCAB_DOCUMENTS = 100_000  # documents used to train a vocabulary
# Chinese characters and kanji: BERT's normalizer makes each a word of its own.
IDEOGRAPH = re.compile("[\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0002a6df\U0002a700-\U0002b73f"
                       "\U0002b740-\U0002b81f\U0002b920-\U0002ceaf\U0002f800-\U0002fa1f]")


def load_wordpiece(config):
    """The WordPiece that config.vocab names: a file, BERT's, or one trained on the text."""
    find_files(config)  # raises if one is missing, before a vocabulary is downloaded
    return WordPiece.from_config(load_vocab(config), config)


def load_vocab(config):
    """The tokens of the vocabulary that config.vocab names. It is downloaded or trained if need be."""
    if config.vocab == "bert":
        path = Path(config.cache) / "bert-uncased-vocab.txt"
        advice = "use --vocab FILE, or --vocab train:8192 for one trained on your text"
        download_once(path, **BERT_VOCAB, advice=advice)
        return read_vocab(path)
    if is_address(config.vocab):
        raise UserError(f"{without_secrets(config.vocab)} is an address; --vocab takes a file: download it")
    match = re.fullmatch(r"train:(\d+)", config.vocab)
    if not match:
        return read_vocab(Path(config.vocab))
    size = int(match[1])
    if not len(SPECIAL_TOKENS) < size <= 65_535:
        raise UserError(f"--vocab {config.vocab} is not possible; rows are uint16, so take 6 to 65535")
    # Training is not reproducible to the byte, so the vocabulary of a text is kept.
    identities = identify_text(find_files(config))
    files = [identity.portable + identity.local for identity in identities]
    fingerprint = [files, config.one_document_per_file, config.do_lower_case, config.strip_accents,
                   match[1]]
    path = Path(config.cache) / f"{source_name(config)}-{digest(fingerprint)}.vocab"
    make_once(path, lambda: train_vocab(config, size, path, identities))
    return parse_vocab(read_sealed(path, advice="delete it, and it is trained again"), path)


def train_vocab(config, size, path, identities):
    """Train a vocabulary of at most `size` tokens on the beginning of the text, and write it to `path`.

    A text that has changed since it was identified is refused: `path` is named after it.
    """
    wordpiece = WordPiece.from_config(SPECIAL_TOKENS, config)
    counts = Counter()  # of the characters in the lines that were read

    def read_lines():
        for text, _ in itertools.islice(read_documents(config), VOCAB_DOCUMENTS):
            for line in text.split("\n"):
                line = wordpiece.normalize(line)
                counts.update(line)
                yield IDEOGRAPH.sub(" ", line)

    # Letters, which take two tokens each (x and ##x), may fill half of the vocabulary.
    trainer = trainers.WordPieceTrainer(vocab_size=size, special_tokens=SPECIAL_TOKENS, show_progress=False,
                                        limit_alphabet=max(1, size // 4))
    wordpiece.tokenizer.train_from_iterator(read_lines(), trainer)
    ids = wordpiece.tokenizer.get_vocab()
    tokens = add_ideographs(sorted(ids, key=ids.get), counts, size)
    if len(tokens) == len(SPECIAL_TOKENS):
        raise no_text(config)
    if len(tokens) < size:
        tqdm.write(f"the text yields a vocabulary of {len(tokens):,} and not {size:,}: it has no more pieces "
                   "of words", file=sys.stderr)
    if identify_text(find_files(config)) != identities:
        raise text_changed("the text")
    write_sealed(path, vocab_bytes(tokens))


def add_ideographs(tokens, counts, size):
    """A vocabulary of at most `size` tokens: the trainer's, and the most frequent ideographs at its end.

    The trainer sees no ideographs, since each is a word of its own. Their number is the larger of two: the
    room that the trainer leaves, and their share of the text, whose characters `counts` has.
    """
    ideographs = [character for character, _ in counts.most_common() if IDEOGRAPH.match(character)]
    share_of_text = sum(counts[character] for character in ideographs) / max(1, counts.total())
    room = size - len(tokens)
    fair_share = int(share_of_text * (size - len(SPECIAL_TOKENS)))
    ideographs = ideographs[: max(room, fair_share)]
    return tokens[: size - len(ideographs)] + ideographs


def read_vocab(path):
    """The tokens of a vocab.txt, one on each line, or of a tokenizer.json, in the order of their ids."""
    if not path.is_file():
        raise UserError(f"there is no vocabulary {path}; --vocab takes a vocab.txt, train:SIZE or bert")
    return parse_vocab(path.read_bytes(), path)


def parse_vocab(raw, path):
    """The tokens in the content of a vocabulary's file."""
    text = decode_utf8(raw, path)
    if path.suffix == ".json":
        tokens = parse_tokenizer(text, path)
    else:
        tokens = [line.strip() for line in text.removesuffix("\n").split("\n")]  # as in the official code
    for number, token in enumerate(tokens, 1):
        if len(token.split()) > 1:
            raise UserError(f"the vocabulary {path}, line {number}, holds more than a token: {token!r:.40}; "
                            "keep one on each line")
    if tokens[:1] != [PAD] or not set(SPECIAL_TOKENS) <= set(tokens):
        raise UserError(f"the vocabulary {path} must begin with {PAD} and hold {', '.join(SPECIAL_TOKENS)}")
    token, count = Counter(tokens).most_common(1)[0]
    if count > 1:
        raise UserError(f"the vocabulary {path} holds {token!r:.40} more than once; keep each token once")
    if len(tokens) > 65_535:
        raise UserError(f"the vocabulary {path} holds more than 65,535 tokens; rows are uint16")
    return tokens


def parse_tokenizer(text, path):
    """The tokens in the content of a tokenizer.json, in the order of their ids."""
    ids = find_entry(parse_json(text, path), "model.vocab")
    is_vocabulary = isinstance(ids, dict) and all(isinstance(number, int) for number in ids.values())
    if not is_vocabulary or set(ids.values()) != set(range(len(ids))):
        raise UserError(f"{path} is not a WordPiece tokenizer, as ELECTRA's and BERT's are")
    return sorted(ids, key=ids.get)


# ------------------------------------------------------------------------------------------------------------
# Downloads: addresses -> bytes

TIMEOUT = 30  # seconds without an answer
BACKOFF = 0.5  # seconds, doubled before each new attempt, at most a minute
ATTEMPTS = 16  # in a row; they take ten minutes
ATTEMPTS_WITHOUT_ANSWER = 7  # if the server has never answered; they take a minute
LASTING_ERRORS = re.compile(  # in the messages of errors that another attempt does not mend
    "WRONG_VERSION_NUMBER|RECORD_LAYER_FAILURE|CERTIFICATE_VERIFY_FAILED|"  # OpenSSL's
    "Name or service not known|nodename nor servname provided")  # an unknown host, not a missing network


def open_source(name):
    """A file or address as a binary stream."""
    if is_address(name):
        return io.BufferedReader(ChunkStream(fetch(name)), 1 << 20)
    return open(name, "rb")


class ChunkStream(io.RawIOBase):
    """A file object over an iterator of byte chunks, since archives are read from files."""

    def __init__(self, chunks):
        self.chunks = chunks
        self.rest = b""

    def readable(self):
        return True

    def readinto(self, buffer):
        if not self.rest:
            self.rest = next(self.chunks, b"")
        size = min(len(buffer), len(self.rest))
        buffer[:size] = self.rest[:size]
        self.rest = self.rest[size:]
        return size


def is_address(name):
    return str(name).startswith(("http://", "https://", "hub:"))


def download_once(path, address, advice, size, sha256):
    """Download a file unless it is there. Its SHA-256 is checked either way."""
    if not path.exists():
        make_once(path, lambda: download(path, address, advice, size, sha256))
        return
    actual = hashlib.sha256(path.read_bytes()).hexdigest()
    if actual != sha256:
        raise UserError(f"{path} has SHA-256 {actual} instead of {sha256}; delete it to download it again")


def download(path, address, advice, size=None, sha256=None):
    """Fetch a file whole, and check its SHA-256 where that is known."""
    hasher = hashlib.sha256()
    with (atomic_write(path) as file,
          tqdm(desc=path.name, total=size, unit="B", unit_scale=True, leave=False, disable=None) as bar):
        for chunk in fetch(address, advice):
            file.write(chunk)
            hasher.update(chunk)
            bar.update(len(chunk))
        if sha256 is not None and hasher.hexdigest() != sha256:
            raise UserError(f"{without_secrets(address)} has SHA-256 {hasher.hexdigest()} instead of "
                            f"{sha256}; try again, or {advice}")


def fetch(address, advice="use --data PATH or --data python-docs"):
    """Yield the bytes at an address. Errors name it, and end with `advice`."""
    file = RemoteFile(address, advice)
    while True:
        try:
            yield from file.read_rest()
            return
        except requests.RequestException as error:
            file.wait_or_give_up(error)


class NotFound(UserError):
    """There is nothing at an address."""


class Answer(NamedTuple):
    """What the headers of a response say. None is unknown."""

    begin: int | None  # the position of its first byte in the file
    length: int | None  # of the whole file
    version: str | None


class RemoteFile:
    """A file on a server, and how far it has been read. After a broken connection, reading goes on there."""

    def __init__(self, address, advice):
        self.url = url_of(address)
        self.name = without_secrets(address)
        self.advice = advice
        self.position = 0  # of the next byte
        self.first = None  # the Answer that began with byte 0
        self.failures = 0  # in a row

    def read_rest(self):
        """Yield the bytes from `position` on. Raises RequestException if they break off."""
        if self.first is not None and self.position == self.first.length:
            return  # all had arrived when the connection broke
        with self.request() as response:
            self.check_status(response)
            answer = self.read_headers(response)
            if self.position == 0:
                self.first = answer
            self.check_continuity(answer)
            for chunk in response.iter_content(1 << 14):
                self.position += len(chunk)
                if answer.length is not None and self.position > answer.length:
                    raise UserError(f"{self.name} sends more than it announces; {self.advice}")
                self.failures = 0
                yield chunk
        if answer.length is not None and answer.length != self.position:
            raise requests.ConnectionError("the body ended early")

    def request(self):
        """Ask for the bytes from `position` on. The body of the response is yet to be read."""
        headers = {"Accept-Encoding": "identity"}
        if self.position > 0:
            headers["Range"] = f"bytes={self.position}-"
        if self.url.startswith(f"{hub()}/"):
            if os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "TRUE", "YES"):
                raise UserError(f"{self.name} is not read, because HF_HUB_OFFLINE is set; unset it, or "
                                f"{self.advice}")
            if os.environ.get("HF_TOKEN"):  # requests drops it when another host is redirected to
                headers["Authorization"] = f"Bearer {os.environ['HF_TOKEN'].strip()}"
        try:
            return requests.get(self.url, headers=headers, stream=True, timeout=TIMEOUT)
        except ValueError:  # the address is malformed
            raise UserError(f"{self.name} is not the address of a server; {self.advice}") from None

    def check_status(self, response):
        """Raise requests.HTTPError if another attempt may help, and UserError if not."""
        status = response.status_code
        if status == 429 or status >= 500:
            response.raise_for_status()
        message = f"{self.name} answers {status} {response.reason}; {self.advice}"
        if status == 404:
            raise NotFound(message)
        if status not in (200, 206):
            raise UserError(message)

    def read_headers(self, response):
        """The Answer of a response. Raises UserError if its body is encoded, or could be cut unnoticed."""
        headers = response.headers
        encoding = headers.get("Content-Encoding", "identity")
        if encoding != "identity":
            raise UserError(f"{self.name} answers with Content-Encoding {encoding!r:.40}; {self.advice}")
        version = headers.get("ETag") or headers.get("Last-Modified") or None
        if response.status_code == 206:
            part = re.fullmatch(r"bytes (\d{1,18})-\d+/(\d{1,18})", headers.get("Content-Range", ""))
            if part is None:
                return Answer(None, None, version)
            return Answer(int(part[1]), int(part[2]), version)
        if headers.get("Transfer-Encoding") == "chunked":  # urllib3 checks that the last chunk comes
            return Answer(0, None, version)
        if not re.fullmatch(r"\d{1,18}", headers.get("Content-Length", "")):  # a cut body would look whole
            raise UserError(f"{self.name} does not say how long it is; {self.advice}")
        return Answer(0, int(headers["Content-Length"]), version)

    def check_continuity(self, answer):
        """Raise UserError unless an answer begins at `position` and is of the same file as the first one."""
        first = self.first
        if answer.begin != self.position:
            reason = "the server sends another part"
        elif self.position > 0 and first.version is None:
            reason = "the server does not say whether it has changed"
        elif answer.version != first.version:
            reason = "it has changed"
        elif first.length is not None and answer.length != first.length:
            reason = "it has changed"
        else:
            return
        raise UserError(f"{self.name} cannot be read from byte {self.position:,} on: {reason}; {self.advice}")

    def wait_or_give_up(self, error):
        """Wait before the next attempt. Raises UserError if none can help, or after too many in a row."""
        self.failures += 1
        reason = type(error).__name__
        is_lasting = isinstance(error, requests.TooManyRedirects) or LASTING_ERRORS.search(str(error))
        if is_lasting and self.position == 0:
            raise UserError(f"{self.name} cannot be read: {reason}; check the address, or "
                            f"{self.advice}") from None
        attempts = ATTEMPTS
        if error.response is not None:
            reason = f"it answers {error.response.status_code}"
        elif self.position == 0:  # perhaps there is no such server
            attempts = ATTEMPTS_WITHOUT_ANSWER
        if self.failures >= attempts:
            raise UserError(f"{self.name} cannot be read: {reason}, {self.failures} times in a row; the same "
                            f"command resumes later; or {self.advice}") from None
        seconds = min(60, BACKOFF * 2**self.failures)
        tqdm.write(f"{self.name}: {reason}, at byte {self.position:,}; trying again in {seconds:.0f} s",
                   file=sys.stderr)
        time.sleep(seconds)


def url_of(address):
    """The URL of an address, which may begin with hub:."""
    if not address.startswith("hub:"):
        return address
    return hub() + address.removeprefix("hub:")


def hub():
    """The URL of the hub."""
    return (os.environ.get("HF_ENDPOINT") or "https://huggingface.co").rstrip("/")


def without_secrets(name):
    """A path as it is; an address without user, password, query and fragment, which can hold secrets.

    >>> without_secrets("https://me:secret@host:80/a@b.txt?token#part")
    'https://host:80/a@b.txt'
    >>> without_secrets("https://me:sec/ret@host/a.txt")  # in an address, / should be %2F
    'https://host/a.txt'
    """
    scheme, separator, rest = url_of(name).partition("://")
    if not separator:
        return name
    host = r"(\[[^]]*\]|[^:@/?#]+)(:\d*)?([/?#]|$)"  # HOST or HOST:PORT, and how it ends
    while "@" in rest and not re.match(host, rest):  # before an @ stands USER:PASSWORD, or a part of it
        rest = rest.partition("@")[2]
    return f"{scheme}://" + re.split("[?#]", rest)[0]


# ------------------------------------------------------------------------------------------------------------
# Files that survive a kill: helpers, also for train.py, glue.py and finetune.py

SEAL_BYTES = 32  # of a SHA-256


@contextmanager
def atomic_write(path):
    """Open a binary file that takes the place of `path` once it is complete and synced to disk.

    The caller holds a lock: two processes must not write to the same temporary file.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.tmp")
    try:
        with add_path_to_errors(path), open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def add_path_to_errors(path):
    """Add a path to an OSError without one, for example of a full disk."""
    try:
        yield
    except OSError as error:
        if error.errno and not error.filename:
            raise OSError(error.errno, error.strerror, str(path)) from None
        raise


def write_sealed(path, content):
    """Write bytes, and after them their seal. torch.load ignores it, so it can open a sealed checkpoint."""
    with atomic_write(path) as file:
        file.write(content)
        file.write(seal(path, content))


def read_sealed(path, *, advice):
    """The bytes that `write_sealed` wrote. One that was cut, changed or renamed is refused with `advice`."""
    raw = path.read_bytes()
    content = raw[:-SEAL_BYTES]
    if seal(path, content) != raw[-SEAL_BYTES:]:
        raise UserError(f"{path} is damaged; {advice}")
    return content


def seal(path, content):
    """The SHA-256 of a file's name and content. The name tells apart files that have changed places."""
    hasher = hashlib.sha256(path.name.encode())
    hasher.update(content)
    return hasher.digest()


def make_once(path, make):
    """Call `make()` unless `path` exists. Only one process does it at a time."""
    if path.exists():
        return
    with lock(path.with_suffix(".lock"), f"waiting for another process to make {path}"):
        if not path.exists():  # the other process may have made it
            make()


@contextmanager
def lock(path, message):
    """Hold a lock, which ends with the process. Prints `message` and waits if another process holds it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "ab") as file:
        if not acquire(file):
            tqdm.write(message, file=sys.stderr)
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


@contextmanager
def try_lock(path):
    """Hold a lock, as `lock` does, but never wait. Yields False if another process holds it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "ab") as file:
        yield acquire(file)


def acquire(file):
    """Lock an open file. Returns False if another process holds the lock."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        raise UserError(f"{file.name} cannot be locked ({error.strerror}); use --out and --cache on a "
                        "file system that has locks") from None
    return True


def append_json(file, entry):
    """Append a line of JSON to an open binary file, and flush it to disk."""
    with add_path_to_errors(file.name):
        file.write(json.dumps(entry).encode() + b"\n")
        file.flush()
        os.fsync(file.fileno())


def read_json(path):
    """The JSON object in a file."""
    return parse_json(path.read_bytes(), path)


def parse_json(text, source):
    """The JSON object in `text`. Errors name `source`."""
    damage = f"{source} is damaged: it is not a JSON object"
    try:
        value = json.loads(text, object_pairs_hook=dict_of_unique)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{damage} ({error})") from None
    if not isinstance(value, dict):
        raise UserError(damage)
    return value


def dict_of_unique(pairs):
    """A dict of (key, value) pairs. A repeated key is refused: json would keep only its last value."""
    values = {}
    for key, value in pairs:
        if key in values:
            raise ValueError(f"it has the key {key!r:.40} more than once")
        values[key] = value
    return values


def decode_utf8(raw, source):
    """The text of some bytes, without a byte order mark. Errors name `source`."""
    advice = "convert it, for example with iconv"
    try:
        text = raw.decode()
    except UnicodeDecodeError as error:
        raise UserError(f"{source} is not UTF-8 at byte {error.start}; {advice}") from None
    for sign in "\0", "\x1b$":  # UTF-16 without its mark and ISO-2022-JP can be valid UTF-8
        if sign in text:
            place = raw.index(sign.encode())
            raise UserError(f"{source} is not UTF-8 at byte {place}; {advice}")
    return text.removeprefix("\ufeff")


def without_surrogates(text):
    """`text` with ? for each half of a surrogate pair. JSON can hold such halves, and UTF-8 cannot."""
    return text.encode("utf-8", "replace").decode()


def digest(value):
    """A short hash of a value that JSON can hold."""
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()[:12]


if __name__ == "__main__":
    if sys.argv[1:] != ["child"]:
        sys.exit("data.py is started by train.py; to see rows: python train.py --prepare-only --show 5")
    sys.exit(run_as_child())
