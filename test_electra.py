"""The specification, executable. Contents, in the order of the file:

    Fixtures and helpers    networks and rows; text and servers; pre-training; fine-tuning; watched functions
    The official step       three steps with Google's weights and draws, to six digits
    The details             D01 to D35, in order; each test quotes the fact it checks
    data.py                 words; documents; rows and the cache; the order of the rows
    model.py                the objective, also compiled and on a GPU; the networks of transformers
    train.py                a run; stopping and resuming; flags and numbers; several processes; the CUDA path
    finetune.py             results; the table and the submission; networks that are kept; the CUDA path
    glue.py                 files; metrics and labels

bench/test_faults.py has what can go wrong. bench/test_documents.py checks README.md, LOG.md, DETAILS.md and
the scripts. extras/test_extras.py has questions and words. `pytest` runs all four. Text, models and servers
are made here: there is no network but the loopback interface. Tests marked `cuda` are skipped without a GPU.
"""

import os

# Tensors here are tiny: threads only wait for each other, long if anything else is running.
os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported

import collections
import gzip
import hashlib
import http.server
import inspect
import io
import itertools
import json
import lzma
import math
import multiprocessing
import random
import re
import runpy
import shutil
import signal
import socket
import struct
import subprocess
import sys
import tarfile
import threading
import time
import unicodedata
import warnings
import zipfile
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import fields, replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import sklearn.metrics
import tokenizers
import torch
import torch.nn.functional as F
from scipy import stats
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import data
import finetune
import glue
import model
import train
from data import DataConfig, Order, Shards, UserError, WordPiece
from model import Electra, ElectraConfig, ModelError

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # for --deterministic, before cuBLAS is loaded
data.WORKERS = 1  # processes take a second to start: only tests that are about them use several

HERE = Path(__file__).parent
GPU = [pytest.mark.cuda, pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")]
CLS, SEP, MASK = 101, 102, 103


# ============================================================================================================
# Fixtures and helpers

# ------------------------------------------------------------------------------------------------------------
# Networks and rows

# Odd on purpose: embeddings wider than the generator and narrower than the discriminator, heads of 24.
CONFIG = ElectraConfig(
    vocab_size=200, embedding_size=40, hidden_size=48, num_hidden_layers=2, num_attention_heads=2,
    intermediate_size=96, max_position_embeddings=64, generator_size=0.5)
NO_DROPOUT = replace(CONFIG, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)


def make_electra(config=NO_DROPOUT, seed=0):
    torch.manual_seed(seed)
    return Electra(config)


def make_rows(count=6, length=32, seed=0):
    """Rows as data.py writes them: some full, some padded, with one segment or two."""
    random_ = np.random.default_rng(seed)
    rows = np.zeros((count, length), dtype=np.int64)
    for number, row in enumerate(rows):
        end = length if number % 2 else int(random_.integers(5, length))
        row[:end] = random_.integers(104, 200, end)
        row[0], row[end - 1] = CLS, SEP
        if number % 3:
            row[end // 2] = SEP
    return torch.from_numpy(rows)


def make_uniforms(input_ids, config=CONFIG, seed=0):
    B, L = input_ids.shape
    numbers = np.random.default_rng(seed).random((B, L + 2 * config.num_slots(L)), dtype=np.float32)
    return torch.from_numpy(numbers)


def run_electra(electra, input_ids, seed=0):
    return electra(input_ids, make_uniforms(input_ids, electra.config, seed))


def run_mask(input_ids, config=CONFIG, seed=0):
    L = input_ids.shape[1]
    K = config.num_slots(L)
    priorities, uniforms, _ = make_uniforms(input_ids, config, seed).split([L, K, K], dim=1)
    positions, is_used, _, masked_ids = model.mask_tokens(input_ids, priorities, uniforms, config)
    return positions, is_used, masked_ids


def always_sample(electra, token):
    """Make the generator sample one token everywhere."""
    bias = torch.full((200,), -1e4)
    bias[token] = 1e4
    electra.generator.mlm_bias.data = bias


# ------------------------------------------------------------------------------------------------------------
# Text and servers

# ba, bara, basto, ..., mipa, minon
WORDS = [f"{a}{b}" for a in "ba do ku le mi".split() for b in ["", *"ra sto vin zu gel pa non".split()]]
SMALL_VOCAB = [*data.SPECIAL_TOKENS, *WORDS, ".", ",", "##s"]


def make_text(documents=300, seed=0):
    """Documents of lines of words, in which a word often decides the next: something can be learned."""
    random_ = random.Random(seed)
    texts = []
    word = 0  # its number in WORDS
    for _ in range(documents):
        lines = []
        for _ in range(random_.randint(1, 8)):
            line = []
            for _ in range(random_.randint(3, 20)):
                frequent = int(len(WORDS) * random_.random() ** 3)
                word = (word * 7 + 3) % len(WORDS) if random_.random() < 0.3 else frequent
                line.append(WORDS[word])
            lines.append(" ".join([*line, "."]))
        texts.append("\n".join(lines))
    return texts


def make_tar(members, mode="w"):
    """The bytes of a tar of {name: bytes}; "w:xz" compresses it."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode=mode) as tar:
        for name, content in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return buffer.getvalue()


def make_openwebtext(documents=120, per_archive=20):
    """(Texts, a tar) in OpenWebText's nesting: a tar of xz-compressed tars of one .txt per document."""
    texts = make_text(documents, seed=1)
    members = {"openwebtext/README": b"no text"}
    for start in range(0, documents, per_archive):
        inner = {f"{n:07d}.txt": text.encode() for n, text in enumerate(texts[start : start + per_archive])}
        members[f"openwebtext/urlsf_subset00-{start}_data.xz"] = make_tar({"notes": b"none", **inner}, "w:xz")
    return texts, make_tar(members)


def write_files(folder, files):
    """Write {name: bytes} into a folder."""
    for name, content in files.items():
        path = Path(folder) / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)


@contextmanager
def prepare_in_child(shards):
    """GrowingShards.prepare_in_child without a child process, which would take seconds to start."""
    data.prepare(shards.config, wordpiece=shards.wordpiece)
    yield


@pytest.fixture
def corpus(tmp_path, monkeypatch):
    """A folder to work in, with corpus.txt and vocab.txt. Shards are small, so that there are many."""
    monkeypatch.setattr(data.GrowingShards, "prepare_in_child", prepare_in_child)
    monkeypatch.setattr(data, "SHARD_CHARACTERS", 10_000)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hub-cache"))  # not what is on this machine
    monkeypatch.chdir(tmp_path)
    Path("corpus.txt").write_text("\n\n".join(make_text()), encoding="utf-8")
    Path("vocab.txt").write_text("\n".join(SMALL_VOCAB) + "\n", encoding="utf-8")
    return tmp_path


def data_config(**changes):
    return DataConfig(**dict(data=("corpus.txt",), vocab="vocab.txt", max_length=32) | changes)


def read_texts(path, **changes):
    """The documents of a file or folder."""
    return [text for text, _ in data.read_documents(data_config(data=(str(path),), **changes))]


def contents(cache):
    """The bytes of each file of a cache."""
    return {path.name: path.read_bytes() for path in cache.folder.iterdir()}


class Handler(http.server.BaseHTTPRequestHandler):
    """Answers a request to a Server, with its next fault."""

    def do_GET(self):
        server = self.server
        asked = self.headers.get("Range", "")
        server.ranges_asked.append(asked)
        body = server.files.get(self.path.split("?")[0])
        fault = server.fault()
        etag = f'"{hashlib.md5(body or b"").hexdigest()}"'
        if fault in (429, 503):
            self.answer(fault)
        elif body is None:
            self.answer(404)
        elif fault == "redirect" and "?" not in self.path:
            self.answer(302, headers={"Location": f"{self.path}?again"})
        elif asked and server.has_ranges and self.headers.get("If-Range", etag) == etag:
            start = int(re.fullmatch(r"bytes=(\d+)-", asked)[1])
            span = f"bytes {start}-{len(body) - 1}/{len(body)}"
            self.answer(206, body[start:], fault, {"ETag": etag, "Content-Range": span})
        else:
            self.answer(200, body, fault, {"ETag": etag})

    def answer(self, status, body=b"", fault=None, headers=()):
        framing = {"Content-Length": len(body)}
        if self.server.is_chunked:  # in one chunk; that of length 0 is the end
            framing = {"Transfer-Encoding": "chunked"}
            body = b"%x\r\n%s\r\n0\r\n\r\n" % (len(body), body)
        self.send_response(status)
        for name, value in {**framing, **dict(headers)}.items():
            self.send_header(name, str(value))
        self.end_headers()
        wait = threading.Event().wait  # unlike time.sleep, `quick` does not shorten it
        if fault in ("cut", "reset", "stall"):
            body = body[: len(body) * 2 // 3]
        with suppress(ConnectionError):
            for start in range(0, len(body), len(body) // 4 + 1):
                self.wfile.write(body[start : start + len(body) // 4 + 1])
                wait(0.02 if fault == "slow" else 0)
        if fault == "stall":
            wait(60)  # longer than the client's patience
        if fault == "reset":  # RST instead of FIN
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            os.close(self.connection.detach())

    def log_message(self, *args):
        pass


class Server(http.server.ThreadingHTTPServer):
    """Serves `files`, {path: bytes}, on the loopback interface. `fault()` says what goes wrong next.

    That is None, or one of 429, 503, "redirect", "cut", "reset", "stall" and "slow".
    """

    daemon_threads = True

    def __init__(self, files, fault=lambda: None, has_ranges=True, is_chunked=False):
        super().__init__(("127.0.0.1", 0), Handler)
        self.files = files
        self.fault = fault
        self.has_ranges = has_ranges
        self.is_chunked = is_chunked
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.ranges_asked = []
        poll_interval = 0.01  # so long it takes to shut down
        threading.Thread(target=self.serve_forever, args=[poll_interval], daemon=True).start()

    def __exit__(self, *error):
        self.shutdown()
        self.server_close()


# ------------------------------------------------------------------------------------------------------------
# Pre-training: in this process, in one that is killed, in several

ARGUMENTS = (
    "--data corpus.txt --vocab vocab.txt --embedding-size 16 --hidden-size 32 --num-hidden-layers 2 "
    "--num-attention-heads 2 --intermediate-size 64 --max-position-embeddings 32 --max-length 32 "
    "--batch-size 8 --num-train-steps 24 --num-warmup-steps 4 --learning-rate 0.002 --log-every 2 "
    "--eval-every 8 --save-every 4 ")


def pretrain(flags=""):
    train.main((ARGUMENTS + flags).split())


def read_log(folder="out/small", split=None):
    """The lines of a log, or those of a split, without what is never the same twice, the rate."""
    lines = [json.loads(line) for line in (Path(folder) / "log.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if name != "tokens_per_second"}
            for line in lines if split in (None, line.get("split"))]


def assert_same_run(one, other):
    """Two values of --out hold the same weights and the same log, to the last bit."""
    one, other = Path(one, "small"), Path(other, "small")
    for name in ("discriminator/model.safetensors", "generator/model.safetensors"):
        assert (one / name).read_bytes() == (other / name).read_bytes()
    assert read_log(one) == read_log(other)


def fail_at(victim, count, kills=False):
    """os.fsync, but the disk is full, or the process is killed, in the `count`-th write of a file."""
    fsync, calls = os.fsync, itertools.count()

    def failing_fsync(number):
        path = Path(os.readlink(f"/proc/self/fd/{number}"))
        if victim in path.name and next(calls) == count:
            os.truncate(path, path.stat().st_size - 9)  # the end of it is not on the disk
            if kills:
                os.kill(os.getpid(), signal.SIGKILL)
            raise OSError(28, "No space left on device")
        fsync(number)

    return failing_fsync


# Processes that need torch are forked from one that has imported it, which takes seconds.
FORKED = multiprocessing.get_context("forkserver")
FORKED.set_forkserver_preload(["torch._dynamo", "torch.distributed.run", "tokenizers", "requests"])
RUN_CODE = """
import os, sys
os.environ.clear()
os.environ.update(environment)
output = os.open("printed", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
os.dup2(output, 1)
os.dup2(output, 2)
sys.argv[1:] = arguments
exec(code, {"__name__": "__main__"})
"""


class Child:
    """A process that runs Python code with `arguments` as its sys.argv[1:]. What it prints is in a file."""

    def __init__(self, code, *arguments):
        environment = os.environ | {"PYTHONPATH": str(HERE)}
        values = dict(code=code, arguments=arguments, environment=environment)
        self.process = FORKED.Process(target=exec, args=(RUN_CODE, values))
        self.process.start()
        self.pid = self.process.pid

    def is_running(self):
        return self.process.is_alive()

    def finish(self):
        """(exit status, what it printed)."""
        self.process.join(120)
        if self.is_running():
            self.process.terminate()
        return self.process.exitcode, Path("printed").read_text()


# What the code of such a process begins with: small shards, and two of the functions above.
PRELUDE = "\n".join([
    "import itertools, os, signal, subprocess, sys", "from contextlib import contextmanager",
    "from pathlib import Path", "import data, train", "data.SHARD_CHARACTERS, data.WORKERS = 10_000, 1",
    *map(inspect.getsource, (prepare_in_child, fail_at))])
KILLED = PRELUDE + """
data.GrowingShards.prepare_in_child = prepare_in_child
os.fsync = fail_at(sys.argv[1], int(sys.argv[2]), kills=True)
train.main(sys.argv[3:])
"""


def pretrain_until_killed(flags, victim, count):
    """Pre-train in a process that is killed in its `count`-th write of a file."""
    status, printed = Child(KILLED, victim, str(count), *ARGUMENTS.split(), *flags.split()).finish()
    assert status == -signal.SIGKILL, printed


WITHOUT_DROPOUT = "--hidden-dropout-prob 0 --attention-probs-dropout-prob 0 "
RANKED = """
import sys, time, traceback
from datetime import timedelta
import torch, train
torch.set_default_dtype(torch.float64)
initialize, learning_rate = train.dist.init_process_group, train.learning_rate
def initialize_with_patience(backend, timeout):
    assert timeout >= timedelta(hours=12)  # text may come late
    initialize(backend, timeout=timeout)
train.dist.init_process_group = initialize_with_patience
flags = sys.argv[1:]
if "VOCAB" in flags:  # another one on each rank
    flags[flags.index("VOCAB")] = f"vocab{train.RANK}.txt"
def fail(step, *args):
    if step == 3 and train.RANK == 1:
        raise ValueError("rank one is broken")
    return learning_rate(step, *args)
if "SLOW_SAVE" in flags:
    flags.remove("SLOW_SAVE")
    save = train.Run.save
    train.Run.save = lambda *args: (time.sleep(1), save(*args))
if "BROKEN" in flags:
    flags.remove("BROKEN")
    train.learning_rate = fail
try:
    sys.exit(train.run_command(lambda: train.main(flags)))
except Exception:  # python prints it, unless it was forked
    traceback.print_exc()
    raise
"""


def launch(ranks, flags, before="", how="--start-method fork --run-path"):
    """`train.py` in fp64 under torchrun: the process. Each rank first runs the Python code `before`."""
    path = Path("ranked.py").resolve()
    path.write_text(before + RANKED)
    words = f"--standalone --nproc-per-node {ranks} {how} {path} {ARGUMENTS} {WITHOUT_DROPOUT} {flags}"
    return Child("import torch.distributed.run as torchrun; torchrun.main()", *words.split())


# ------------------------------------------------------------------------------------------------------------
# Fine-tuning

FINETUNED = replace(CONFIG, vocab_size=len(SMALL_VOCAB))

WEIGHTS, TOKENIZER = "model.safetensors", "tokenizer_config.json"


def save_discriminator(folder, config=FINETUNED):
    """A model folder of random weights, as train.py would leave it."""
    torch.manual_seed(0)
    discriminator = model.Discriminator(config)
    write_files(folder, model.pretrained_files(discriminator) | WordPiece(SMALL_VOCAB).files(64))
    return discriminator.eval()


OFFICIAL_ROWS = {name: dict(task.num_rows) for name, task in glue.TASKS.items()}
MRPC = "\ufeffQuality\t#1 ID\t#2 ID\t#1 String\t#2 String\n"
NLI = "index\tpromptID\tpairID\tgenre\t1b\t2b\t1p\t2p\tsentence1\tsentence2"
NLI_ROW = "0\t1\t1n\tgov\t(\t(\t(\t(\t"
STSB, STSB_ROW = "index\tgenre\tfile\tyear\told\ts1\ts2\tsentence1\tsentence2", "0\tnews\tf\t2012\t1\tx\ty\t"


def write_split(name, split, content):
    folder = "diagnostic" if split == "diagnostic" else glue.TASKS[name].title
    write_files("glue", {f"{folder}/{split}.tsv": content})


@pytest.fixture
def toy_glue(corpus, monkeypatch):
    """`corpus` with a model in out/small and toy tasks in glue/, whose label is one word. The folder."""
    save_discriminator("out/small/discriminator")
    random_ = random.Random(0)
    for name, task in glue.TASKS.items():
        columns = ["x0", task.label_column, "x2", *task.sentence_columns]
        for split in task.num_rows:
            # Test sets of different sizes, so that none can be taken for another.
            count = {"train": 48, "test_mismatched": 13, "diagnostic": 14}.get(split, 12)
            monkeypatch.setitem(task.num_rows, split, count)
            is_test = split in task.test_splits
            rows = [] if name == "cola" and not is_test else [columns]
            for _ in range(count):
                row, label = ["x"] * 3, random_.randrange(max(2, len(task.labels)))
                for _ in task.sentence_columns:
                    words = random_.choices(WORDS[8:], k=random_.randint(2, 9))
                    row.append(" ".join([*words, WORDS[label]]))
                if not is_test:
                    row[1] = task.labels[label] if task.labels else str(5 * label)
                rows.append(row)
            write_split(name, split, "".join("\t".join(row) + "\n" for row in rows).encode())
    return corpus


TOY = "--glue-dir glue --max-length 32 --batch-size 8"


def tune(flags):
    """Fine-tune the model of `toy_glue` for one epoch."""
    finetune.main(f"{TOY} --num-train-epochs 1 {flags}".split())


def read_results(folder="out/glue"):
    """The results by (task, seed), without what is never the same twice."""
    lines = (Path(folder) / "results.jsonl").read_text().splitlines()
    entries = [{key: value for key, value in json.loads(line).items()
                if key not in ("seconds", "finished", "digest")} for line in lines]
    return {(entry["task"], entry["seed"]): entry for entry in entries}


def find_network(task, out="out/glue"):
    """The one folder that --save made for a task."""
    [folder] = Path(out, "networks").glob(f"{task}-*")
    return str(folder)


def write_task(folder, kind="tsv", label=("bad", "good", "fair").__getitem__, count=48):
    """A folder whose label follows from one word of the sentence."""
    random_ = random.Random(0)
    for split in ("train", "dev", "test"):
        rows = []
        for _ in range(count):
            number = random_.randrange(3)
            text = " ".join([*random_.choices(WORDS[8:], k=5), WORDS[number]])
            rows.append(dict(sentence=text) | ({} if split == "test" else dict(label=label(number))))
        if kind == "jsonl":
            content = "".join(json.dumps(row) + "\n" for row in rows)
        else:
            lines = [rows[0], *(row.values() for row in rows)]
            content = "".join(("," if kind == "csv" else "\t").join(map(str, line)) + "\n" for line in lines)
        write_files(folder, {f"{split}.{kind}": content.encode()})


def keep_mrpc(monkeypatch):
    """Small files where the official ones of MRPC would be after a download. The task."""
    rows = "".join(f"{n % 2}\t{n}\t{n + 1}\tA{n}\tB{n}\n" for n in range(6))
    contents = dict(train=(MRPC + rows).encode(), test=(MRPC + "1\t7\t8\tX\tY\n").encode(),
                    ids=b"4\t5\n1\t2\n0\t9\n")  # the last pair is of no row
    write_files("cache/glue", contents)
    sources = {name: (f"http://nowhere/{name}", len(content), hashlib.sha256(content).hexdigest())
               for name, content in contents.items()}
    task = replace(glue.TASKS["mrpc"], download=sources["train"], num_rows=dict(train=4, dev=2, test=1))
    monkeypatch.setitem(glue.TASKS, "mrpc", task)
    monkeypatch.setattr(glue, "MRPC_TEST", sources["test"])
    monkeypatch.setattr(glue, "MRPC_DEV_IDS", sources["ids"])
    return task


# ------------------------------------------------------------------------------------------------------------
# What is watched, and stand-ins for a GPU


def watch(monkeypatch, owner, name, look):
    """Call `look` with the arguments of every call of a function, before the function."""
    function = getattr(owner, name)

    def watched(*args, **kwargs):
        look(*args, **kwargs)
        return function(*args, **kwargs)

    monkeypatch.setattr(owner, name, watched)


@contextmanager
def ctrl_c_at(monkeypatch, *steps):
    """Ctrl-C comes while these steps of pre-training are taken."""
    def interrupt(step, *args):
        if step in steps:
            signal.raise_signal(signal.SIGINT)

    with monkeypatch.context() as patch:
        watch(patch, train, "learning_rate", interrupt)
        yield


@pytest.fixture
def steps(monkeypatch):
    """What each step of an optimizer is given: the settings of its groups, the gradients and their norm."""
    seen = []

    def look(optimizer):
        gradients = [p.grad.clone() for group in optimizer.param_groups for p in group["params"]]
        norm = math.sqrt(sum((gradient**2).sum().item() for gradient in gradients))
        groups = [dict(group, lr=float(group["lr"])) for group in optimizer.param_groups]
        seen.append(SimpleNamespace(groups=groups, gradients=gradients, norm=norm))

    watch(monkeypatch, torch.optim.AdamW, "step", look)
    return seen


class NoSync(TorchDispatchMode):
    """Fails on what would make the host wait for the device: values and sizes that depend on data."""

    WAITING = "_local_scalar_dense", "nonzero", "masked_select", "_unique2", "unique_dim", "equal"

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        assert function.overloadpacket.__name__ not in self.WAITING, function
        is_mask = "index" in function.overloadpacket.__name__ and any(
            isinstance(index, torch.Tensor) and index.dtype == torch.bool
            for index in (args[1] if isinstance(args[1], list | tuple) else ()))
        assert not is_mask, function
        return function(*args, **(kwargs or {}))


def tensors_of(results):
    """The tensors in nested lists and tuples."""
    if isinstance(results, torch.Tensor):
        return [results]
    return [tensor for result in results or () for tensor in tensors_of(result)]


class Recorded(train.CudaGraphs):
    """A stand-in for CUDA graphs on a CPU: a replay calls again, into the same tensors."""

    captures = 0
    replays = 0

    def __init__(self, function):
        self.function = function
        self.num_calls = collections.Counter()
        self.graphs = {}

    def run_eagerly(self, inputs):
        return self.function(*inputs)

    def capture(self, inputs):
        Recorded.captures += 1
        results = []

        def replay():
            Recorded.replays += 1
            new = self.function(*inputs)
            results.append(new)
            for old, tensor in zip(tensors_of(results[0]), tensors_of(new), strict=True):
                old.copy_(tensor)
            return results[0]

        return replay


@pytest.fixture
def recorded(monkeypatch):
    """Steps are replayed, on a CPU."""
    resolve = train.set_up_device
    monkeypatch.setattr(train, "CudaGraphs", Recorded)
    monkeypatch.setattr(train, "set_up_device", lambda config: replace(resolve(config), graph=config.graph))
    monkeypatch.setattr(Recorded, "captures", 0)
    monkeypatch.setattr(Recorded, "replays", 0)


@pytest.fixture
def on_gpu():
    """Leaves torch as it was."""
    yield
    torch.use_deterministic_algorithms(False)
    torch.backends.cuda.enable_cudnn_sdp(True)
    torch.backends.cuda.enable_mem_efficient_sdp(True)


def on_cuda(function):
    return pytest.mark.cuda(pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")(
        pytest.mark.usefixtures("on_gpu")(function)))


# ============================================================================================================
# The official step


def official_views(electra, of):
    """{name in the official graph: `of(parameter)` in its layout, where kernels are (in, out)}."""
    views = {}
    for network in "generator", "discriminator":
        tensors = {name: of(parameter) for name, parameter in getattr(electra, network).named_parameters()}
        holder = SimpleNamespace(state_dict=lambda tensors=tensors: tensors)
        for name, tensor in model.huggingface_tensors(holder).items():
            if network == "generator" and not name.startswith("electra.embeddings."):
                name = name.replace("electra.", "generator.")
            name = name.replace("generator_lm_head.bias", "generator_predictions.output_bias")
            name = name.replace("dense_prediction.", "dense_1.").replace(".layer.", ".layer_")
            name = name.replace("LayerNorm.weight", "LayerNorm.gamma")
            name = name.replace("LayerNorm.bias", "LayerNorm.beta")
            name = re.sub(r"_embeddings\.weight$", "_embeddings", name)
            name = re.sub(r"\.weight$", ".kernel", name).replace(".", "/")
            views[name] = tensor.T if name.endswith("kernel") else tensor
    return views


def test_official_step_is_reproduced(monkeypatch):
    """Given the official weights and draws, three steps give the official losses, gradients and weights."""
    facts = json.loads((HERE / "official" / "official_step.json").read_text())
    record = np.load(HERE / "official" / "official_step.npz")
    config, recipe = (kind(**{field.name: facts[field.name] for field in fields(kind) if field.name in facts})
                      for kind in (ElectraConfig, train.TrainConfig))
    electra = Electra(config)
    weights = official_views(electra, lambda parameter: parameter.data)
    assert {f"before|{name}" for name in weights} == {key for key in record if key.startswith("before|")}
    for name, tensor in weights.items():
        tensor.copy_(torch.from_numpy(record[f"before|{name}"]))
    optimizer = train.build_optimizer(electra.named_parameters(), recipe)
    input_ids = torch.from_numpy(record["input_ids"]).long()
    for step in range(facts["optimizer_steps"]):
        step_record = {key.removeprefix(f"{step}|"): torch.from_numpy(record[key])
                       for key in record if key.startswith(f"{step}|")}
        positions, corrupted = step_record["positions"].long(), step_record["corrupted_ids"].long()
        draws = (positions, step_record["weights"] > 0, input_ids.gather(1, positions),
                 step_record["masked_ids"].long())
        sampled = corrupted.gather(1, positions)
        monkeypatch.setattr(model, "mask_tokens", lambda *args, draws=draws: draws)
        monkeypatch.setattr(model, "sample", lambda *args, sampled=sampled: sampled)
        output = electra(input_ids)
        assert torch.equal(output.corrupted_ids, corrupted)
        assert torch.equal(output.is_replaced.int(), step_record["is_replaced"])
        assert output.mlm_loss.item() == pytest.approx(step_record["mlm_loss"].item(), rel=1e-6)
        assert output.disc_loss.item() == pytest.approx(step_record["disc_loss"].item(), rel=1e-6)
        output.loss.backward()
        if step == 0:
            for name, gradient in official_views(electra, lambda parameter: parameter.grad).items():
                expected = torch.from_numpy(record[f"gradient|{name}"])
                assert (gradient - expected).abs().max() <= 1e-5 * expected.abs().max() + 1e-8, name
        lr = train.learning_rate(facts["first_step"] + step, recipe.learning_rate, recipe.num_train_steps,
                                 recipe.num_warmup_steps)
        assert lr == pytest.approx(facts["learning_rates"][step], rel=1e-12)
        torch.nn.utils.clip_grad_norm_(electra.parameters(), recipe.max_grad_norm)
        for group in optimizer.param_groups:
            group["lr"] = lr
        optimizer.step()
        optimizer.zero_grad()
    for name, tensor in weights.items():
        assert (tensor - torch.from_numpy(record[f"after|{name}"])).abs().max() <= 1e-6, name


# ============================================================================================================
# The details


def official_examples(lines, max_length, uniform):
    """build_pretraining_dataset.py:47-93, written from its description, with a target drawn per document."""

    def random_target():
        return 5 + int(uniform() * (max_length - 4)) if uniform() < 0.05 else max_length

    examples, sentences, size, target = [], [], 0, random_target()
    for place, line in enumerate(lines):
        sentences.append(line)
        size += len(line)
        if size < target and place < len(lines) - 1:
            continue
        first_target = 100_000 if uniform() < 0.1 else (target - 3) // 2
        first, second = [], []
        for sentence in sentences:
            if not first or len(first) + len(sentence) < first_target:
                first = first + sentence
            elif not second and len(first) < first_target and uniform() < 0.5:
                first = first + sentence
            else:
                second = second + sentence
        first = first[: max_length - 2]
        second = second[: max(0, max_length - len(first) - 3)]
        examples.append((first, second, size - len(first) - len(second)))
        if size >= target:
            target = random_target()
        sentences, size = [], 0
    return examples


def test_D01_an_example_never_crosses_the_end_of_a_document():
    """An example never crosses the end of a document, and its last lines make one, too."""
    documents = ["\n".join([f"{word} " * 7] * 9) for word in WORDS]  # one word in each
    rows, heldout, info = data.build_shard(0, documents, (0, 40), WordPiece(SMALL_VOCAB), data_config())
    rows = np.concatenate([rows, heldout])
    assert len(rows) >= 80 and info["tokens_kept"] + info["tokens_dropped"] == 40 * 63
    assert all(len(set(row.tolist()) - {0, 2, 3}) == 1 for row in rows)


def test_D02_D03_D04_examples_are_the_official_builders():
    """Segments, targets, cuts and what is dropped are the official builder's, on 2,000 documents."""
    shapes, seen = random.Random(1), set()
    for seed in range(2000):
        num_lines, ids = shapes.randrange(1, 20), itertools.count(10)
        lengths = [shapes.choice([1, 3, 6, 12, 40]) + shapes.randrange(6) for _ in range(num_lines)]
        lines = [list(itertools.islice(ids, length)) for length in lengths]
        ours = list(data.segment(lines, 32, random.Random(seed).random))
        assert ours == official_examples(lines, 32, random.Random(seed).random), seed
        for first, second, _ in ours:
            seen.add("broken order" if second and first[-1] > second[0] else bool(second))
    assert seen == {"broken order", True, False}


def test_D05_D30_pairs_are_swapped_and_then_the_longer_sentence_is_cut_first():
    """Tokens are popped off the longer side, of equals B, until a pair fits; MRPC and STS-B swap before."""
    for pair, length, expected in [("abc|d", 4, "abc|d"), ("abcde|fg", 4, "ab|fg"), ("ab|cdef", 4, "ab|cd"),
                                   ("abc|def", 5, "abc|de"), ("abc|def", 4, "ab|de"), ("abc|", 2, "ab|")]:
        assert "|".join(map("".join, finetune.truncate(*pair.split("|"), length))) == expected
    a, b, c = 5, 13, 21  # ba, do, ku; [CLS] is 2 and [SEP] is 3
    examples = [glue.Example("ba do ku ba do ku ba", "", 0), glue.Example("ba ba ba", "do do ku", 1)]
    rows, labels, _ = finetune.tokenize_examples(examples, WordPiece(SMALL_VOCAB), 8)
    assert rows.tolist() == [[2, a, b, c, a, b, c, 3], [2, a, a, a, 3, b, b, 3]]
    rows, labels, _ = finetune.tokenize_examples(examples[1:], WordPiece(SMALL_VOCAB), 8, both_orders=True)
    assert rows.tolist() == [[2, a, a, a, 3, b, b, 3], [2, b, b, c, 3, a, a, 3]]
    assert labels.tolist() == [1, 1]
    assert [name for name, task in glue.TASKS.items() if task.both_orders] == ["mrpc", "stsb"]


def test_D06_a_selected_token_becomes_mask_with_probability_85_percent():
    """Each selected position becomes [MASK] with probability 0.85, else it stays; none becomes random."""
    ids = make_rows(4000, 64, seed=1)
    positions, is_used, masked_ids = run_mask(ids)
    shown = masked_ids.gather(1, positions)
    is_masked, counts = (shown == MASK) & is_used, is_used.sum(0)
    assert (is_masked | (shown == ids.gather(1, positions))).all()
    assert abs(is_masked.sum() / is_used.sum() - 0.85) < 4 * math.sqrt(0.85 * 0.15 / is_used.sum())
    # Slots are in the order of priority, and the toss does not depend on that.
    assert ((is_masked.sum(0) / counts - 0.85).abs() < 5 * (0.85 * 0.15 / counts).sqrt()).all()
    untouched = torch.ones_like(ids).scatter(1, positions, 0).bool()
    assert torch.equal(masked_ids[untouched], ids[untouched])


def test_D07_special_tokens_are_never_selected_and_unknown_ones_may_be():
    """[CLS], [SEP], [MASK] and padding are never selected; [UNK] may be."""
    UNK = 100
    ids = torch.tensor([[CLS, UNK, MASK, SEP, UNK, SEP, 0, 0]])
    assert model.selectable(ids, CONFIG).tolist() == [[False, True, False, False, True, False, False, False]]
    config = replace(CONFIG, mask_prob=0.9)
    for seed in range(50):
        positions, is_used, _ = run_mask(ids, config, seed)
        assert sorted(positions[is_used].tolist()) == [1, 4]


def test_D08_the_number_of_predictions():
    """round(0.15 x tokens), half to even, at least 1, at most K = int(0.155 x length) or the candidates."""
    for mask_prob, length, slots in (0.15, 128, 19), (0.15, 512, 79), (0.25, 512, 130), (0.15, 4, 1):
        assert replace(CONFIG, mask_prob=mask_prob).num_slots(length) == slots
    # 0.15 x 3 = 0.45 -> 1; x 10 = 1.5 -> 2; x 30 = 4.5 -> 4; x 50 = 7.5 -> 8; x 128 = 19.2 -> 19 = K
    for length, predictions in (2, 0), (3, 1), (10, 2), (30, 4), (50, 8), (64, 10), (118, 18), (128, 19):
        ids = torch.zeros(1, 128, dtype=torch.long)
        ids[0, :length] = 150
        ids[0, 0], ids[0, length - 1] = CLS, SEP
        positions, is_used, masked_ids = run_mask(ids)
        assert is_used.shape == (1, 19) and is_used.sum() == predictions
        assert model.loss_counts(ids, CONFIG).tolist() == [predictions, length]
        assert (positions[~is_used] == 0).all() and masked_ids[0, 0] == CLS
    full = torch.full((1, 32), 150)  # 0.15 x 32 = 4.8 -> 5, but K = 4
    assert model.loss_counts(full, CONFIG)[0] == run_mask(full)[1].sum() == 4


def test_large_masks_a_quarter():
    """Large predicts 25 % of the tokens, small and base 15 %."""
    sizes = "small", "base", "large"
    shares = [train.make_config(ElectraConfig, train.SIZES[size]).mask_prob for size in sizes]
    assert shares == [0.15, 0.15, 0.25]


def test_D09_positions_are_drawn_uniformly_without_replacement():
    """Positions are drawn without replacement, unlike in the official code, and uniformly."""
    ids = torch.full((4000, 32), 150)
    ids[:, 0], ids[:, 20], ids[:, -1] = CLS, SEP, SEP
    positions, is_used, _ = run_mask(ids)
    assert is_used.sum() == 4000 * 4
    assert all(len(set(row)) == 4 for row in positions.tolist())
    counts = np.bincount(positions.flatten().numpy(), minlength=32)
    assert counts[[0, 20, 31]].sum() == 0
    assert stats.chisquare(np.delete(counts, [0, 20, 31])).pvalue > 1e-3


def test_positions_are_uniform_where_slots_are_spare():
    """A short row that uses few of its slots does not prefer the left."""
    ids = torch.full((4000, 64), 150) * (torch.arange(64) < 30)  # 4 predictions, and K = 9 slots
    positions, is_used, _ = run_mask(ids)
    counts = np.bincount(positions[is_used].numpy(), minlength=30)
    assert len(counts) == 30 and stats.chisquare(counts).pvalue > 1e-3


def test_D10_masks_are_drawn_anew_at_every_step(corpus, monkeypatch):
    """Masks are drawn anew at every step, and a step draws the same ones in every run."""
    drawn = []
    watch(monkeypatch, model, "mask_tokens", lambda ids, priorities, *_: drawn.append(priorities.clone()))
    for out in "ab":
        pretrain(f"--num-train-steps 3 --eval-every 9 --out {out}")
    one, other = torch.stack([numbers for numbers in drawn if len(numbers) == 8]).chunk(2)
    assert torch.equal(one, other) and len(one) == 3 == len(one.unique(dim=0))


def test_a_row_is_masked_anew_in_the_next_epoch():
    """Masks are a function of the step, and not of the row."""
    rows = make_rows().numpy()
    one, same, other = (train.draw_uniforms(0, "train", step, rows, CONFIG) for step in (0, 0, 1))
    assert np.array_equal(one, same) and not (one == other).all(1).any()


def test_D11_samples_follow_the_softmax():
    """The replacement is a sample from the softmax, not the argmax."""
    logits, draws = torch.tensor([2.0, -1.0, 0.5, 1.0, 0.0, -math.inf]), 20_000
    uniforms = torch.from_numpy(np.random.default_rng(0).random((draws, 1), dtype=np.float32))
    counts = np.bincount(model.sample(logits.expand(draws, 1, 6), uniforms).flatten().numpy(), minlength=6)
    expected = draws * logits[:5].double().softmax(-1)
    assert counts[5] == 0 and stats.chisquare(counts[:5], expected).pvalue > 1e-3
    # The ends of [0, 1). Sums of 41 times 1/41, and others, end just below 1: no token may be left over.
    almost_one = float(np.nextafter(np.float32(1), np.float32(0)))
    for size in range(1, 200):
        logits = torch.tensor([-math.inf, *[0.0] * size, -math.inf]).expand(1, 2, -1)
        assert model.sample(logits, torch.tensor([[0.0, almost_one]])).tolist() == [[1, size]]


def test_D11_one_generator_pass_serves_the_loss_and_the_samples():
    """The samples come from the pass that has the loss, with dropout."""
    electra, ids, passes = make_electra(CONFIG), make_rows(), []
    electra.generator.register_forward_hook(lambda module, inputs, logits: passes.append(logits))
    output, [logits] = run_electra(electra, ids), passes
    sampled = model.sample(logits, make_uniforms(ids)[:, -CONFIG.num_slots(32) :])
    labels = ids.gather(1, output.positions)
    corrupted = model.corrupt(ids, output.positions, output.is_used, labels, sampled)
    assert torch.equal(output.corrupted_ids, corrupted)


def test_D12_D13_every_selected_token_is_resampled_and_may_stay_the_original():
    """Corruption starts from the unmasked text; a sample that equals the original counts as original."""
    electra, ids = make_electra(), make_rows()
    ids[:, 1:16][ids[:, 1:16] > MASK] = 150
    always_sample(electra, 150)
    output, (positions, is_used, masked_ids) = run_electra(electra, ids), run_mask(ids)
    selected = torch.zeros_like(ids).scatter(1, positions, is_used.long()).bool()
    assert torch.equal(output.corrupted_ids, torch.where(selected, 150, ids))
    assert torch.equal(output.is_replaced, selected & (ids != 150))
    assert (output.is_replaced & (masked_ids == ids)).any()  # some stayed visible, and are resampled too
    assert output.sampled_correct == output.mlm_correct == (selected & (ids == 150)).sum() > 0
    always_sample(electra, CLS)
    output = run_electra(electra, ids)
    assert not is_used.all()
    assert output.sampled_correct == output.mlm_correct == 0  # unused slots hold [CLS]


@pytest.mark.parametrize("sampled", [0, SEP, 150])
def test_D14_D35_the_loss_covers_every_original_token_whatever_the_generator_samples(sampled):
    """[CLS] and [SEP] count, padding does not; masks, types and counts are those of the original ids."""
    electra, ids = make_electra().eval(), make_rows()
    always_sample(electra, sampled)
    output = run_electra(electra, ids)
    mask, types = model.attention_mask_and_token_types(ids, SEP)
    assert (output.corrupted_ids[output.is_replaced] == sampled).all() and output.is_replaced.any()
    assert torch.allclose(output.disc_logits, electra.discriminator(output.corrupted_ids, mask, types))
    losses = F.softplus(torch.where(output.is_replaced, -output.disc_logits, output.disc_logits))
    assert torch.allclose(output.disc_loss, losses[ids != 0].sum() / ((ids != 0).sum() + 1e-6), rtol=1e-5)


def test_D11_D15_both_losses_reach_the_embeddings_and_only_mlm_reaches_the_generator():
    """loss = MLM + 50 x discriminator; no gradient flows through the sample."""
    ids, tables, heads = make_rows(), [], []
    assert ElectraConfig().discriminator_weight == 50
    for weight in (0.0, 50.0):
        electra = make_electra(replace(NO_DROPOUT, discriminator_weight=weight))
        output = run_electra(electra, ids)
        assert torch.allclose(output.loss, output.mlm_loss + weight * output.disc_loss, rtol=1e-5)
        output.loss.backward()
        tables.append(electra.discriminator.encoder.embeddings.word_embeddings.weight.grad)
        heads.append(electra.generator.mlm_dense.weight.grad)
    assert tables[0].norm() > 0 and (tables[1] - tables[0]).norm() > 0
    assert heads[0].norm() > 0 and torch.allclose(*heads, rtol=1e-4, atol=1e-7)


def test_D16_embeddings_and_their_layer_norm_are_one_object():
    """Word, position and token-type embeddings and their LayerNorm are tied between the networks."""
    electra = make_electra()
    shared = electra.generator.encoder.embeddings
    assert shared is electra.discriminator.encoder.embeddings
    assert {name.split(".")[0] for name, _ in shared.named_parameters()} == {
        "word_embeddings", "position_embeddings", "token_type_embeddings", "norm"}


def test_D17_each_network_projects_embeddings_of_another_width():
    """Embeddings of another width are projected by each network for itself."""
    electra, same_width = make_electra(), make_electra(replace(NO_DROPOUT, embedding_size=48))
    assert electra.generator.encoder.embeddings_project.weight.shape == (24, 40)
    assert electra.discriminator.encoder.embeddings_project.weight.shape == (48, 40)
    assert same_width.discriminator.encoder.embeddings_project is None


def test_dropout_comes_before_the_projection(monkeypatch):
    """Dropout follows the embeddings' LayerNorm, at their width, and not the projection."""
    encoder, ids, widths = make_electra(CONFIG).discriminator.encoder, make_rows(), []
    watch(monkeypatch, model, "dropout", lambda hidden, *args: widths.append(hidden.shape[-1]))
    encoder(ids, ids != 0, ids * 0)
    assert widths == [40] + 2 * [32, 48, 48]


@pytest.mark.parametrize("size, shape, count", [
    ("small", (64, 256, 1, 12), 14_196_219), ("base", (256, 1024, 4, 12), 119_386_427),
    ("large", (256, 1024, 4, 24), 354_655_291)])
def test_D18_generator_is_narrower_not_shallower(size, shape, count):
    """hidden x size, FFN 4 x that, max(1, hidden // 64) heads, the same depth; official parameter counts."""
    config = train.make_config(ElectraConfig, train.SIZES[size])
    generator = config.generator_config()
    assert shape == (generator.hidden_size, generator.intermediate_size, generator.num_attention_heads,
                     generator.num_hidden_layers)
    with torch.device("meta"):
        assert sum(parameter.numel() for parameter in Electra(config).parameters()) == count
    odd = ElectraConfig(hidden_size=200, generator_size=1.0)
    assert odd.generator_config().num_attention_heads == 2  # 200 // 64 = 3 heads cannot share 200


def test_the_generators_feed_forward_follows_its_own_width():
    """It is four times the generator's width, whatever the discriminator's is."""
    config = ElectraConfig(hidden_size=256, intermediate_size=512, generator_size=0.25)
    assert config.generator_config().intermediate_size == 4 * 64


def test_D19_mlm_head_at_the_selected_positions_only():
    """The MLM head: dense, GELU, LayerNorm, tied word table and bias, at the selected positions only."""
    generator, ids, seen = make_electra(CONFIG).generator.eval(), make_rows(), []
    generator.mlm_bias.data.normal_()
    generator.mlm_dense.register_forward_hook(lambda module, inputs, _: seen.append(inputs[0].shape))
    positions = torch.tensor([[3, 1], [2, 2], [0, 4], [1, 1], [5, 6], [7, 8]])
    logits = generator(ids, ids != 0, ids * 0, positions)
    assert seen == [(6, 2, 24)]
    hidden = generator.encoder(ids, ids != 0, ids * 0)[torch.arange(6)[:, None], positions]
    table = generator.encoder.embeddings.word_embeddings.weight
    expected = generator.mlm_norm(F.gelu(generator.mlm_dense(hidden))) @ table.T + generator.mlm_bias
    assert torch.allclose(logits, expected, atol=1e-6)
    [gradient] = torch.autograd.grad(logits.sum(), table)
    assert (gradient[~torch.isin(torch.arange(200), ids)].norm(dim=1) > 0).all()  # as an output layer, too


def test_the_mlm_head_has_no_dropout():
    """With the encoder in evaluation mode, two passes agree, though the head is in training mode."""
    generator, ids = make_electra(CONFIG).generator, make_rows()
    generator.encoder.eval()
    positions = torch.tensor([[3, 1]] * 6)
    one, other = (generator(ids, ids != 0, ids * 0, positions) for _ in range(2))
    assert torch.equal(one, other)


def test_D20_discriminator_head():
    """The discriminator's head: dense, GELU, dense to 1, without dropout."""
    discriminator, ids = make_electra(CONFIG).discriminator, make_rows()
    discriminator.encoder.eval()  # the head stays in training mode
    hidden = F.gelu(discriminator.disc_dense(discriminator.encoder(ids, ids != 0, ids * 0)))
    logits = discriminator.disc_output(hidden)[..., 0]
    assert torch.allclose(discriminator(ids, ids != 0, ids * 0), logits, atol=1e-6)


def test_D21_initial_weights():
    """Truncated normal of 0.02 at two deviations; Glorot for projections and the last layer; biases 0."""
    electra = make_electra(replace(CONFIG, vocab_size=5000, hidden_size=192, num_attention_heads=3))
    for name, weight in electra.named_parameters():
        if name.endswith("bias"):
            assert (weight == 0).all()
        elif "norm" in name:
            assert (weight == 1).all()
        elif re.search("disc_output|embeddings_project", name):
            bound = math.sqrt(6 / sum(weight.shape))
            assert 0.9 * bound < weight.abs().max() <= bound
        else:
            assert weight.abs().max() <= 0.04
            if weight.numel() > 5000:
                assert abs(weight.std() - 0.0176) < 0.0004 and weight.abs().max() > 0.039, name
    assert electra.generator.encoder.embeddings.word_embeddings.weight[0].abs().sum() > 0  # [PAD] like any


def test_D22_a_layer_is_post_norm_and_masks_keys_only():
    """Attention masks keys only; then dropout, add, LayerNorm; the same for feed-forward."""
    layer = make_electra().discriminator.encoder.layers[0]
    hidden, mask = torch.randn(2, 5, 48), torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]]).bool()
    q, k, v = layer.query_key_value(hidden).chunk(3, -1)
    attended = torch.zeros_like(hidden)
    for head in (slice(0, 24), slice(24, 48)):
        scores = q[..., head] @ k[..., head].transpose(1, 2) / math.sqrt(24) - 1e4 * ~mask[:, None, :]
        attended[..., head] = scores.softmax(-1) @ v[..., head]
    middle = layer.attention_norm(hidden + layer.attention_output(attended))
    expected = layer.output_norm(middle + layer.output(F.gelu(layer.intermediate(middle))))
    assert torch.allclose(layer(hidden, mask), expected, atol=1e-5)


def test_D22_dropout_follows_embeddings_attention_and_feed_forward(monkeypatch):
    """Dropout 0.1 after the embedding LayerNorm, attention and feed-forward, and on the probabilities."""
    config = replace(CONFIG, attention_probs_dropout_prob=0.2)
    encoder, ids, seen = make_electra(config).discriminator.encoder, make_rows(), []
    watch(monkeypatch, model, "dropout", lambda hidden, *args: seen.append((hidden.ndim, *args)))
    encoder(ids, ids != 0, ids * 0)
    assert seen == [(3, 0.1, True)] + 2 * [(4, 0.2, True), (3, 0.1, True), (3, 0.1, True)]
    seen.clear()
    once = encoder.eval()(ids, ids != 0, ids * 0)
    assert not any(training for *_, training in seen) and torch.equal(once, encoder(ids, ids != 0, ids * 0))


def test_dropout_spares_the_residual(monkeypatch):
    """Dropout comes before the sum: if it drops everything, what is left is the residual."""
    layer, hidden = make_electra().discriminator.encoder.layers[0], torch.randn(2, 5, 48)
    monkeypatch.setattr(model, "dropout", lambda hidden, prob, training: 0 * hidden)
    expected = layer.output_norm(layer.attention_norm(hidden))
    assert torch.allclose(layer(hidden, torch.ones(2, 5).bool()), expected, atol=1e-6)


def test_D23_the_pooled_vector_is_the_last_layers_unchanged():
    """The pooled output is the raw [CLS] vector of the last layer, without a tanh layer."""
    encoder, ids, seen = make_electra().discriminator.encoder, make_rows(), []
    encoder.layers[-1].register_forward_hook(lambda module, inputs, result: seen.append(result))
    assert encoder(ids, ids != 0, ids * 0) is seen[0]


def test_D24_D25_adam_corrects_no_bias_and_decouples_decay():
    """40 steps are those of model/optimization.py, in NumPy: m and v as they are, decay multiplied by lr."""
    random_ = np.random.default_rng(0)
    for name, shape in ("word_embeddings.weight", (7, 5)), ("norm.weight", (5,)), ("output.bias", (5,)):
        value, gradients = random_.normal(size=shape), random_.normal(size=(40, *shape))
        parameter = nn.Parameter(torch.tensor(value))
        optimizer = train.build_optimizer([(name, parameter)], train.TrainConfig(weight_decay=0.1))
        optimizer.param_groups[0]["lr"], m, v = 0.01, 0, 0
        for gradient in gradients:
            m, v = 0.9 * m + 0.1 * gradient, 0.999 * v + 0.001 * gradient**2
            decay = 0.1 * value if name == "word_embeddings.weight" else 0
            value = value - 0.01 * (m / (np.sqrt(v) + 1e-6) + decay)
            parameter.grad = torch.tensor(gradient)
            optimizer.step()
        assert np.abs(parameter.detach().numpy() - value).max() < 1e-10
    assert train.TrainConfig().weight_decay == 0.01


def test_D26_warm_up_multiplies_the_decay(corpus):
    """lr = peak x (1 - t/T) x min(1, t/W): the first step has 0, the last peak / T."""
    steps = 0, 5_000, 10_000, 500_000, 999_999
    rates = [train.learning_rate(step, 5e-4, 1_000_000, 10_000) for step in steps]
    assert rates == pytest.approx([0, 5e-4 * 0.995 * 0.5, 5e-4 * 0.99, 2.5e-4, 5e-10], rel=1e-12)
    assert train.learning_rate(0, 1.0, 10, 0) == 1.0
    pretrain()
    lines = read_log(split="train")
    assert len(lines) == 13
    for line in lines:
        step = line["step"] - 1
        assert line["lr"] == pytest.approx(0.002 * (1 - step / 24) * min(1, step / 4))


def test_D27_gradients_are_clipped_to_global_norm_over_both_networks(corpus, steps):
    """Gradients are clipped to a global norm over both networks together."""
    assert train.TrainConfig().max_grad_norm == finetune.FinetuneConfig().max_grad_norm == 1.0
    pretrain("--num-train-steps 3 --log-every 1 --max-grad-norm 5")
    logged = [line["grad_norm"] for line in read_log(split="train")]
    assert min(logged) > 5 and [step.norm for step in steps] == pytest.approx([5.0] * 3, rel=1e-4)
    pretrain("--num-train-steps 3 --log-every 1 --max-grad-norm 1e9 --restart")
    assert steps[3].norm == pytest.approx(logged[0], rel=1e-4)


def test_D28_every_layer_has_a_learning_rate_of_its_own(toy_glue, steps):
    """The exponent of the decay is n + 2 - depth: the classifier has 0, the top layer 2, embeddings n + 2."""
    for name, exponent in [("classifier.weight", 0), ("encoder.layers.23.output.weight", 2),
                           ("encoder.layers.0.output_norm.bias", 25), ("encoder.embeddings.norm.bias", 26),
                           ("encoder.embeddings_project.weight", 26)]:
        assert finetune.lr_scale(name, 24, 0.9) == pytest.approx(0.9**exponent)
    tune("--task cola --layerwise-lr-decay 0.5 --learning-rate 1e-3 --warmup-proportion 0")
    assert len(steps) == 6
    for number, step in enumerate(steps):
        rates = sorted({group["lr"] for group in step.groups}, reverse=True)
        expected = [1e-3 * (1 - number / 6) * 0.5**exponent for exponent in (0, 2, 3, 4)]
        assert rates == pytest.approx(expected)


def test_D29_the_classifier_is_dropout_and_one_layer_on_cls(tmp_path):
    """The classifier is dropout 0.1 and one linear layer on [CLS]; only the encoder is loaded."""
    discriminator = save_discriminator(tmp_path)
    network = finetune.Classifier(replace(FINETUNED, sep_token_id=3), "abc")
    bound = math.sqrt(6 / (48 + 3))  # Glorot
    assert 0.8 * bound < network.classifier.weight.abs().max() <= bound and not network.classifier.bias.any()
    model.load_weights(network.encoder, tmp_path)
    ids = torch.tensor([[2, 7, 8, 3, 9, 3, 0, 0]])
    hidden = discriminator.encoder(ids, *model.attention_mask_and_token_types(ids, 3))
    expected = F.linear(hidden[:, 0], network.classifier.weight, network.classifier.bias)
    assert torch.equal(network.eval()(ids), expected) and network.dropout.p == 0.1
    network.train()
    network.encoder.eval()
    assert not torch.equal(network(ids), expected)  # it is dropout that differs


def test_D27_D29_D33_fine_tuning_starts_from_the_folders_encoder_clips_and_decays(
        toy_glue, steps, monkeypatch):
    """The encoder's weights are the folder's, gradients are clipped, and the flag of weight decay counts."""
    starts = []
    watch(monkeypatch, finetune.Classifier, "forward", lambda network, *args: starts.append(
        network.encoder.layers[1].output.weight.detach().clone()))
    tune("--task cola --max-grad-norm 0.5 --weight-decay 0.2")
    tensors = model.read_weights("out/small/discriminator")
    assert torch.equal(starts[0], tensors["electra.encoder.layer.1.output.dense.weight"])
    assert [step.norm for step in steps] == pytest.approx([0.5] * 6, rel=1e-3)
    assert {group["weight_decay"] for group in steps[0].groups} == {0.2, 0.0}
    assert finetune.FinetuneConfig().weight_decay == 0.0


def test_D31_scores_are_trained_on_a_scale_from_0_to_1():
    """STS-B: score / 5, squared error without a sigmoid; times 5 and clipped for submission."""
    def losses(logits, labels):
        network = finetune.Classifier(FINETUNED, () if isinstance(labels[0], float) else "ab")
        network.forward = lambda ids: torch.tensor(logits)
        return network.losses(None, torch.tensor(labels))

    stsb = glue.TASKS["stsb"]
    assert torch.allclose(losses([[0.5], [-2.0]], [0.2, 1.0]), torch.tensor([0.09, 9.0]))
    assert losses([[0.5, 1.5]], [1]).item() == pytest.approx(math.log(1 + math.exp(-1)))
    assert glue.read_label(stsb, "3.800", "") == pytest.approx(0.76)
    text = glue.submission_text(stsb, np.array([0.25, -0.1, 1.2, 0.7654321, -0.0], np.float32))
    assert text == "index\tprediction\n0\t1.250\n1\t0.000\n2\t5.000\n3\t3.827\n4\t0.000\n"


def test_D32_epochs_batches_and_warm_up(toy_glue, steps, monkeypatch):
    """10 epochs for RTE and STS-B, else 3; batches of 32; ceil(n / 32) x epochs steps, a tenth warm-up."""
    totals, batches = {}, []
    for name, task in glue.TASKS.items():
        examples = OFFICIAL_ROWS[name]["train"] * (2 if task.both_orders else 1)
        totals[name] = finetune.num_steps(examples, 32, task.num_train_epochs)
    assert totals == dict(cola=804, sst2=6315, mrpc=690, stsb=3600, qqp=34113, mnli=36816, qnli=9822, rte=780,
                          wnli=60)
    assert finetune.FinetuneConfig().batch_size == 32
    watch(monkeypatch, finetune.Classifier, "losses", lambda _, ids, labels: batches.append(labels.tolist()))
    finetune.main(f"{TOY} --task cola --batch-size 7".split())
    rates = [max(group["lr"] for group in step.groups) for step in steps]
    assert rates == pytest.approx([3e-4 * (1 - step / 21) * min(1, step / 2.1) for step in range(21)])
    assert [len(labels) for labels in batches] == [7, 7, 7, 7, 7, 7, 6] * 3
    first, second, third = (sum(batches[step : step + 7], []) for step in (0, 7, 14))
    assert first != second != third and sorted(first) == sorted(second) == sorted(third)  # a new order


def test_D34_the_loss_is_summed_over_the_batch(toy_glue, steps, monkeypatch):
    """The fine-tuning loss is summed over the batch, not averaged."""
    batches = []
    watch(monkeypatch, F, "cross_entropy", lambda logits, labels, **_: batches.append((logits, labels)))
    tune("--task mnli --batch-size 20 --max-grad-norm 1e9")
    assert len(steps) == 3
    for (logits, labels), step in zip(batches, steps, strict=True):
        [gradient] = [gradient for gradient in step.gradients if gradient.shape == (3,)]  # the bias's
        expected = (logits.detach().softmax(1) - F.one_hot(labels, 3)).sum(0)
        assert torch.allclose(gradient, expected, atol=1e-5)


def test_only_training_rows_are_doubled(toy_glue, monkeypatch):
    """MRPC trains on both orders of a pair, and is scored on one."""
    seen = []
    watch(monkeypatch, finetune, "tokenize_examples",
          lambda examples, *_, both_orders: seen.append(both_orders))
    tune("--task mrpc")
    assert seen == [True, False]


def test_the_last_step_is_scored(toy_glue, monkeypatch):
    """Predictions are made once, after all steps, so that no best epoch is picked."""
    calls = []
    for owner, name in ((finetune.Classifier, "losses"), (finetune, "predict_rows")):
        watch(monkeypatch, owner, name, lambda *_, name=name: calls.append(name))
    tune("--task cola --num-train-epochs 3")
    assert calls[-1] == "predict_rows" and set(calls[:-1]) == {"losses"} and len(calls) == 19


def test_D35_attention_mask_and_token_types_follow_from_the_ids():
    """Mask = "id != 0"; types are 0 up to and including the first [SEP], then 1, and 0 on padding."""
    ids = torch.tensor([[CLS, 5, SEP, 6, SEP, 7, SEP, 0], [CLS, 5, 6, SEP, 0, 0, 0, 0]])
    mask, types = model.attention_mask_and_token_types(ids, SEP)
    assert mask.tolist() == [[True] * 7 + [False], [True] * 4 + [False] * 4]
    assert types.tolist() == [[0, 0, 0, 1, 1, 1, 1, 0], [0] * 8]


# ============================================================================================================
# data.py

# ------------------------------------------------------------------------------------------------------------
# Words


def test_text_becomes_wordpieces():
    """Lower case, no accents, longest match first; no text becomes a special token, long words are [UNK]."""
    wordpiece, long = WordPiece(SMALL_VOCAB), "x" * 200
    for text, tokens in [("Kura, bazu!", "kura , bazu [UNK]"), ("[SEP] [MASK]", "[UNK] " * 6), ("", ""),
                         ("KÜRAs", "kura ##s"), ("ba" * 100, "[UNK]")]:
        assert [SMALL_VOCAB[number] for number in wordpiece.encode([text])[0]] == tokens.split()
    cased = WordPiece([*data.SPECIAL_TOKENS, long, "Ünï", "uni"], do_lower_case=False, strip_accents=True)
    assert cased.encode([f"{long} Ünï uni x{long}"]) == [[5, 6, 7, 1]]
    assert WordPiece(cased.tokens).encode(["Ünï"]) == [[7]]  # accents go only from lower-cased text
    assert WordPiece([*data.SPECIAL_TOKENS, "ünï"], strip_accents=False).encode(["Ünï"]) == [[5]]


@pytest.mark.parametrize("do_lower_case", [True, False])
def test_printable_ascii_needs_no_normalizer(do_lower_case):
    """Characters that skip the normalizer give the ids that they would give with it, whatever follows."""
    random_ = random.Random(0)
    others = [*map(chr, range(128)), *"éÉ中İſΣσ\u2028\ufffd\xa0\xad\u0301\u0327\u302e"]
    lines = ["".join(random_.choices(others[32:127] + others * (number % 2), k=60)) for number in range(400)]
    tokens = [*data.SPECIAL_TOKENS, *{c for line in lines for c in line if c.isprintable() and c != " "}]
    wordpiece = WordPiece(tokens + [f"##{token}" for token in tokens[5:]], do_lower_case)
    wordpiece.tokenizer.normalizer = wordpiece.normalizer
    library = wordpiece.tokenizer.encode_batch(lines, add_special_tokens=False)
    wordpiece.tokenizer.normalizer = None
    assert wordpiece.encode(lines) == [encoding.ids for encoding in library]
    assert sum(map(str.isascii, lines)) > 200 and wordpiece.encode([]) == []
    # All planes in use, and of the others a sixteenth.
    numbers = *range(0xD800), *range(0xE000, 0x40000), *range(0x40000, 0x110000, 16)
    unicode = "a".join(map(chr, numbers))
    assert wordpiece.normalize(unicode) == wordpiece.normalizer.normalize_str(unicode)


def test_a_vocabulary_is_trained_once_for_a_text(corpus, capsys):
    """train:SIZE gives at most SIZE tokens, once for a text, with room for words beside rare letters."""
    config = data_config(vocab="train:60")
    first = data.load_wordpiece(config)
    [path] = Path("cache").glob("*.vocab")
    assert first.tokens[:5] == data.SPECIAL_TOKENS and 20 < len(first.tokens) <= 60
    data.write_sealed(path, "\n".join([*first.tokens, "marker"]).encode())
    assert data.load_wordpiece(config).tokens[-1] == "marker"  # reused, not trained again
    assert "yields" not in capsys.readouterr().err
    count = len(data.load_wordpiece(data_config(vocab="train:5000")).tokens)
    assert f"the text yields a vocabulary of {count} and not 5,000" in capsys.readouterr().err
    letters = "".join(chr(0xA000 + n) + "ab" * (n % 7) for n in range(900))  # Yi syllables
    Path("corpus.txt").write_text(letters, encoding="utf-8")
    tokens = data.load_wordpiece(config).tokens
    assert tokens[-1] != "marker" and len(tokens) <= 60
    assert any(len(token.removeprefix("##")) > 1 for token in tokens[5:])


def test_ideographs_are_kept_as_long_as_there_is_room(corpus, capsys):
    """A Chinese text has no [UNK] if its characters fit; beside English, they get their share of the text."""
    wordpiece = WordPiece(SMALL_VOCAB, do_lower_case=False)
    for number in [*range(0x3000, 0xD800), *range(0xE000, 0x30000)]:  # the normalizer defines what they are
        is_word = wordpiece.normalize(chr(number)) == f" {chr(number)} "
        assert bool(data.IDEOGRAPH.match(chr(number))) == is_word
    random_ = random.Random(0)
    ideographs = [chr(0x4E00 + 7 * number) for number in range(300)]
    text = "".join(ideographs) + "。"
    Path("corpus.txt").write_text(text + "".join(random_.choices(ideographs[:90], k=9000)), encoding="utf-8")
    whole = data.load_wordpiece(data_config(vocab="train:400"))
    assert data.UNK not in whole.decode(whole.encode([text])[0])
    assert "vocabulary of 306 and not 400: it has no more pieces of words" in capsys.readouterr().err
    part = data.load_wordpiece(data_config(vocab="train:100")).tokens
    assert len(part) == 100 and set(part[6:]) - set(ideographs[:90]) <= set(ideographs)
    assert len(set(part) & set(ideographs[:90])) == 90  # the most frequent
    with open("corpus.txt", "a", encoding="utf-8") as file:
        file.write("\n" + " ".join(make_text(100)))
    mixed = data.load_wordpiece(data_config(vocab="train:60")).tokens
    assert set(mixed) & set(WORDS) and 5 < len(set(mixed) & set(ideographs)) < 30 and len(mixed) == 60


def test_vocab_txt_is_read_as_the_official_code_reads_it(tmp_path):
    """White space around a token does not count, and a line with more than a token is refused."""
    path = tmp_path / "vocab.txt"
    path.write_bytes(" \r\n".join([*data.SPECIAL_TOKENS, "\tba", "do"]).encode())
    assert data.read_vocab(path) == [*data.SPECIAL_TOKENS, "ba", "do"]
    path.write_bytes("\n".join([*data.SPECIAL_TOKENS, "ba\t-3"]).encode())
    with pytest.raises(UserError, match=r"vocab.txt, line 6, holds more than a token: 'ba\\t-3'; keep one"):
        data.read_vocab(path)


@pytest.mark.parametrize("architecture", ["Bert", "Electra"])
@pytest.mark.parametrize("settings", [{}, {"do_lower_case": False}, {"strip_accents": False}])
def test_tokenizers_of_transformers_are_loaded(tmp_path, architecture, settings):
    """What transformers writes for BERT and ELECTRA gives the same ids here."""
    transformers = pytest.importorskip("transformers")
    tokens = [*data.SPECIAL_TOKENS, "élan", "elan", "Élan", "##s", "中"]
    (tmp_path / "vocab.txt").write_text("\n".join(tokens), encoding="utf-8")
    theirs = getattr(transformers, f"{architecture}TokenizerFast")(str(tmp_path / "vocab.txt"), **settings)
    theirs.save_pretrained(tmp_path / "saved")
    ours, _ = data.read_tokenizer(tmp_path / "saved")
    text = "Élan élans elan 中中 [x]"
    assert ours.encode([text])[0] == theirs(text, add_special_tokens=False)["input_ids"]
    write_files(tmp_path, ours.files(17))
    again, length = data.read_tokenizer(tmp_path)
    assert again.encode([text]) == ours.encode([text]) and length == 17


def of_tokenizers(model="WordPiece", normalizer=None, pre_tokenizer=None, **options):
    """The content of a tokenizer.json, as the library tokenizers writes it."""
    tokens = {token: number for number, token in enumerate(SMALL_VOCAB)}
    if model == "BPE":
        options |= dict(merges=[])
    tokenizer = tokenizers.Tokenizer(getattr(tokenizers.models, model)(tokens, unk_token="[UNK]", **options))
    tokenizer.normalizer = normalizer or tokenizers.normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizer or tokenizers.pre_tokenizers.BertPreTokenizer()
    return json.loads(tokenizer.to_str())


@pytest.mark.parametrize("file, content, message", [
    (TOKENIZER, {"word_tokenizer_type": "mecab"}, "word_tokenizer_type is 'mecab' and not 'basic'"),
    (TOKENIZER, {"tokenizer_class": "BertJapaneseTokenizer"}, "tokenizer_class is 'BertJapaneseTokenizer'"),
    (TOKENIZER, {"do_basic_tokenize": False}, "do_basic_tokenize is False and not True"),
    (TOKENIZER, {"do_lower_case": "no"}, "do_lower_case is 'no'"),
    (TOKENIZER, {"do_lower_case": False, "strip_accents": True}, "accents are stripped only from lower"),
    (TOKENIZER, {"model_max_length": "512"}, "is damaged: model_max_length is '512'"),
    (TOKENIZER, {"subword_tokenizer_type": "character"}, "subword_tokenizer_type is 'character'"),
    (TOKENIZER, {"never_split": ["ba"]}, r"never_split is \['ba'\]"),
    (TOKENIZER, {"strip_accents": 1.0}, "strip_accents is 1.0 and not True"),
    (TOKENIZER, {"do_lower_case": {"content": None}}, "do_lower_case is {'content': None} and not True"),
    ("tokenizer.json", of_tokenizers() | {"added_tokens": 1}, "added_tokens is 1"),
    (TOKENIZER, {"mask_token": {"content": "<mask>"}}, r"mask_token is '<mask>' and not '\[MASK\]'"),
    ("tokenizer.json", of_tokenizers(max_input_chars_per_word=3), "max_input_chars_per_word is 3"),
    ("tokenizer.json", of_tokenizers() | {"added_tokens": [{"content": "ba do"}]}, "added_tokens has 'ba do"),
    ("tokenizer.json", of_tokenizers("BPE", continuing_subword_prefix="##"), "model.type is 'BPE' and not"),
    ("tokenizer.json", of_tokenizers("WordLevel"), "model.type is 'WordLevel'"),
    ("tokenizer.json", of_tokenizers(continuing_subword_prefix="@@"), "continuing_subword_prefix is '@@'"),
    ("tokenizer.json", of_tokenizers(normalizer=tokenizers.normalizers.NFC()), "normalizer.type is 'NFC'"),
    ("tokenizer.json", of_tokenizers(normalizer=tokenizers.normalizers.BertNormalizer(clean_text=False)),
     "normalizer.clean_text is False"),
    ("tokenizer.json", of_tokenizers(pre_tokenizer=tokenizers.pre_tokenizers.Whitespace()),
     "pre_tokenizer.type is 'Whitespace' and not 'BertPreTokenizer'"),
    ("tokenizer.json", of_tokenizers() | {"normalizer": None}, "normalizer.type is None and not"),
])
def test_a_tokenizer_with_other_rules_is_refused(tmp_path, file, content, message):
    """The file that asks for the rule is named, also where vocab.txt stands beside it."""
    write_files(tmp_path, {"vocab.txt": "\n".join(SMALL_VOCAB).encode(), file: json.dumps(content).encode()})
    with pytest.raises(UserError, match=message) as error:
        data.read_tokenizer(tmp_path)
    assert str(error.value).startswith(f"{tmp_path / file} ")


def test_case_and_accents_come_from_the_model_folder(tmp_path):
    """tokenizer_config.json decides; by default text is lower-cased, and accents go with the capitals."""
    write_files(tmp_path, {"vocab.txt": "\n".join(SMALL_VOCAB).encode()})
    for settings, expected in [
        (None, (True, True)), ({"do_lower_case": False}, (False, False)),
        ({"strip_accents": None}, (True, True)), ({"strip_accents": False}, (True, False)),
    ]:
        if settings is not None:
            (tmp_path / TOKENIZER).write_text(json.dumps(settings))
        wordpiece, _ = data.read_tokenizer(tmp_path)
        assert (wordpiece.do_lower_case, wordpiece.strip_accents) == expected


def test_transformers_tokenizer_agrees_on_case_and_accents(tmp_path):
    """The exported tokenizer keeps case and accents, and knows the length that was trained."""
    transformers = pytest.importorskip("transformers")
    tokens, expected = [*data.SPECIAL_TOKENS, "Élan", "elan", "e", "##lan", "É"], ["Élan", "elan", "É"]
    network = model.Discriminator(replace(CONFIG, vocab_size=len(tokens)))
    ours = WordPiece(tokens, do_lower_case=False)
    write_files(tmp_path, model.pretrained_files(network) | ours.files(17))
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert theirs.tokenize("Élan elan É") == expected and theirs.model_max_length == 17
    assert [tokens[number] for number in ours.encode(["Élan elan É"])[0]] == expected


def test_the_network_of_a_run_is_chosen_by_name(tmp_path):
    """The objective decides, in a run and in its steps. A missing network is never replaced by the other."""
    for objective, network, other in [("electra", "discriminator", "generator"),
                                      ("mlm", "generator", "discriminator")]:
        run = tmp_path / objective
        write_files(run, {"log.jsonl": json.dumps({"settings": {"objective": objective}}).encode() + b"\n{"})
        for place in run, run / "step-5":
            write_files(place, {f"{network}/config.json": b"", f"{other}/config.json": b""})
            assert data.find_model(str(place), "cache") == place / network
            assert data.find_model(str(place), "cache", other) == place / other
            shutil.rmtree(place / network)
            with pytest.raises(UserError, match=f"there is no model in {place}/{network}; pre-train"):
                data.find_model(str(place), "cache")


@pytest.mark.parametrize("variables, home", [
    ({"HF_HUB_CACHE": "here", "HF_HOME": "elsewhere"}, "here"),
    ({"HF_HOME": "here"}, "here/hub"),
    ({}, ".cache/huggingface/hub"),
])
@pytest.mark.parametrize("missing", ["", "config.json", "vocab.txt", "tokenizer_config.json",
                                     "pytorch_model.bin", "refs"])
def test_a_download_of_huggingface_hub_is_found(tmp_path, monkeypatch, variables, home, missing):
    """Its cache is where the variables say. What is not whole there, or of no known revision, is fetched."""
    monkeypatch.chdir(tmp_path)
    for name in "HF_HUB_CACHE", "HF_HOME":
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    folder = tmp_path / home / "models--someone--electra"
    names = "config.json", "vocab.txt", "tokenizer_config.json", "pytorch_model.bin"
    files = {name: b"" for name in names if name != missing}
    write_files(folder / "snapshots" / "4f2a", files)
    if missing != "refs":
        write_files(folder, {"refs/main": b"4f2a"})
    if missing:
        with pytest.raises(UserError, match="HF_HUB_OFFLINE is set"):
            data.find_model("someone/electra", "cache")
    else:
        assert data.find_model("someone/electra", "cache").resolve() == folder / "snapshots" / "4f2a"


# ------------------------------------------------------------------------------------------------------------
# Documents


def test_documents_of_every_kind_of_file(corpus):
    """Text, JSON lines and archives, plain, gz and xz, in folders and in each other: the same documents."""
    lines = b'{"text": "a\\n\\nb"}\n\n{"text": "c \\ud800"}\n'  # half a surrogate pair
    files = {
        "1/x.txt.xz": lzma.compress(b"x"), "2.jsonl": lines, "3.jsonl.gz": gzip.compress(lines),
        "4.json": lines, "5.JSON.GZ": gzip.compress(lines), "6.TXT": b"y\n \nz", "README.md": b"no text",
        "7.tar": make_tar({"../p.txt": b"p\n\nq", "/etc/r.txt": b"\xef\xbb\xbfr", "s.bin": b"\xff",
                           "._p.txt": b"\xff"}),  # macOS adds these
        "8.tar.gz": make_tar({"t_data.xz": make_tar({"t.txt": b"t"}, "w:xz")}, "w:gz"),
    }
    expected = ["x"] + ["a\n\nb", "c ?"] * 4 + ["y", "z", "p", "q", "r", "t"]
    write_files("folder", files)
    assert read_texts("folder") == expected
    for mode in ("w", "w:gz", "w:xz"):
        path = Path(f"all.tar{mode[1:].replace(':', '.')}")
        path.write_bytes(make_tar(files, mode))
        assert read_texts(path) == expected
    assert not [*corpus.rglob("[rt].txt"), *corpus.parent.glob("p.txt")]  # nothing was unpacked


def make_parquet(**columns):
    pyarrow, buffer = pytest.importorskip("pyarrow"), io.BytesIO()
    pytest.importorskip("pyarrow.parquet").write_table(pyarrow.table(columns), buffer, row_group_size=2)
    return buffer.getvalue()


def test_parquet_and_zst_are_read_if_there_is_pyarrow(corpus, monkeypatch):
    """The column "text", from a file, an archive or an address; frames of zstd; what is damaged is named."""
    zstd = pytest.importorskip("pyarrow").Codec("zstd")
    texts = [f"row {number}\n\nba" for number in range(5)]
    table = make_parquet(number=list(range(5)), text=texts)
    frames = b"".join(zstd.compress(part, asbytes=True) for part in (b"ba\n\nd", b"o\n\nku"))
    files = {"a.parquet": table, "b.txt.zst": frames, "c.tar": make_tar({"a.parquet": table}),
             "d.tar.zst": zstd.compress(make_tar({"b.txt.zst": frames}), asbytes=True)}
    write_files("folder", files)
    assert read_texts("folder") == [*texts, "ba", "do", "ku"] * 2
    with Server({f"/{name}": content for name, content in files.items()}) as server:
        assert read_texts(f"{server.url}/a.parquet") == texts
        assert read_texts(f"{server.url}/d.tar.zst") == ["ba", "do", "ku"]
    for name, content, message in [
        ("a.parquet", table[:-9], "a.parquet is damaged or cut short"),
        ("a.parquet", b"", "a.parquet is damaged or cut short"),
        ("a.parquet", make_parquet(content=["ba"]), 'a.parquet has no string under "text" but None'),
        ("a.parquet", make_parquet(text=["ba", None]), 'a.parquet has no string under "text" but None'),
        ("a.txt.zst", frames[:-3], "a.txt.zst is damaged or cut short"),
        ("a.txt.zst", b"<html>", "a.txt.zst is damaged or cut short"),
    ]:
        Path(name).write_bytes(content)
        with pytest.raises(UserError, match=message):
            read_texts(name)

    def fill_the_disk(*files):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "copyfileobj", fill_the_disk)
        with pytest.raises(OSError, match="No space left on device: 'a.parquet'"):
            read_texts("a.parquet")
    monkeypatch.setitem(sys.modules, "pyarrow", None)  # as if it were not installed
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    for name in "a.parquet", "a.txt.zst":
        with pytest.raises(UserError, match=f"{name} is read with pyarrow: pip install pyarrow"):
            read_texts(name)


def test_blank_lines_separate_documents_wherever_a_txt_is(tmp_path, monkeypatch):
    """The same .txt gives the same documents in an archive; OpenWebText's are one a file; none has no end."""
    raw = "\ufeffone\r\ntwo\u2028still two\r\n \r\n\r\nthree\n".encode()
    write_files(tmp_path, {"a.txt": raw, "a.tar": make_tar({"a.txt": raw})})
    for path in tmp_path.iterdir():
        assert read_texts(path) == ["one\ntwo\u2028still two", "three"]
        assert read_texts(path, one_document_per_file=True) == ["one\ntwo\u2028still two\n \n\nthree"]
    monkeypatch.setattr(data, "MAX_DOCUMENT", 100)
    (tmp_path / "a.txt").write_text("some words\n" * 50)
    texts = read_texts(tmp_path / "a.txt")
    assert len(texts) == 5 and "\n".join(texts) == "\n".join(["some words"] * 50)


def test_folders_are_read_through_links_and_without_hidden_files(tmp_path):
    """Symbolic links are followed, also in a circle; hidden files and folders are left out."""
    names = "text/a.txt", "elsewhere/b.txt", "c.txt", "text/.git/d.txt", "text/.e.txt"
    write_files(tmp_path, {name: Path(name).stem.encode() for name in names})
    for link, target in ("linked", "elsewhere"), ("c.txt", "c.txt"), ("circle", "text"):
        (tmp_path / "text" / link).symlink_to(tmp_path / target)
    assert read_texts(tmp_path / "text") == ["a", "c", "b"]


def test_a_folder_that_cannot_be_read_is_an_error(tmp_path, monkeypatch):
    """The folder is named; none is left out without a word."""
    write_files(tmp_path, {"text/a.txt": b"ba", "text/locked/b.txt": b"do"})
    scandir = os.scandir

    def refusing_scandir(path):  # root may read all folders
        if os.path.basename(path) == "locked":
            raise PermissionError(13, "Permission denied", path)
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refusing_scandir)
    with pytest.raises(PermissionError, match="text/locked"):
        read_texts(tmp_path / "text")


def test_python_docs_are_sentences_of_prose(monkeypatch):
    """Sentences come from docstrings and comments; code, signatures and fragments do not."""
    source = '''def f(x):
    """Return the sum of all the numbers given.

    >>> f([1])
    Args: x (list): Of numbers.

    Words that go over
    two lines are one sentence. A short one. Also `quoted` names are kept as words."""
    # A comment that says why we do this
    # goes over two lines as well.
    return x + 1  # no\n'''
    assert data.find_sentences(source) == [
        "Return the sum of all the numbers given.", "Words that go over two lines are one sentence.",
        "Also quoted names are kept as words.",
        "A comment that says why we do this goes over two lines as well."]
    rglob = Path.rglob  # of every tenth file, to save time
    monkeypatch.setattr(Path, "rglob", lambda *args: itertools.islice(rglob(*args), 0, None, 10))
    sentences = "\n".join(data.python_docs()).split("\n")
    sentences = [sentence for sentence in sentences if sentence]
    assert len(sentences) > 1000 and len(set(sentences)) == len(sentences)


@pytest.mark.parametrize("choice, first, last, count", [
    ("pinned", "39d1a6d3f3a4c838b27bbc65bfb14a2f6f727740/subsets/urlsf_subset00.tar", "subset20.tar", 21),
    ("main", "main/subsets/urlsf_subset00.tar", "main/subsets/urlsf_subset20.tar", 21),
    ("parquet", "refs%2Fconvert%2Fparquet/plain_text/train/0000.parquet", "train/0079.parquet", 80),
])
def test_openwebtext_is_read_where_the_hub_has_it(corpus, monkeypatch, choice, first, last, count):
    """The first source whose first file is there is taken, and kept even if a better one returns."""
    repository = "/datasets/Skylion007/openwebtext/resolve/"
    with Server({repository + first: b""}) as server:
        monkeypatch.setenv("HF_ENDPOINT", server.url)
        files = data.find_files(DataConfig())
        assert data.url_of(files[0]) == server.url + repository + first and files[-1].endswith(last)
        assert len(files) == count and data.identify_text(files)[3] == ([files[3]], [])
        server.files = {data.OPENWEBTEXT["pinned"][0].removeprefix("hub:"): b""}
        assert data.find_files(DataConfig()) == files
    assert data.find_files(DataConfig()) == files  # without a server
    with Server({}) as server:
        monkeypatch.setenv("HF_ENDPOINT", server.url)
        with pytest.raises(UserError, match=f"{server.url} does not have OpenWebText; use --data PATH"):
            data.find_files(DataConfig(cache="another"))


# ------------------------------------------------------------------------------------------------------------
# Rows and the cache


def test_rows_of_a_document_do_not_depend_on_its_neighbours():
    """The random numbers of a document follow from the seed, the shard and its place."""
    documents = ["\n".join([f"{word} " * 7] * 9) for word in WORDS[:20]]
    others = ["ba do\n" * 5 if place % 3 == 1 else one for place, one in enumerate(documents)]
    one, other, moved = (
        data.build_shard(shard, documents_, (0, 20), WordPiece(SMALL_VOCAB), data_config())[0]
        for documents_, shard in ((documents, 4), (others, 4), (documents, 5)))
    for number in map(SMALL_VOCAB.index, WORDS[2:20:3]):
        assert np.array_equal(one[one[:, 1] == number], other[other[:, 1] == number])
    assert not np.array_equal(one, moved)


def test_long_lines_can_be_split(corpus):
    """--split-long-lines loses less of long lines, and changes no text whose lines fit."""
    for length, max_length in itertools.product((9, 31, 32, 33, 100), (8, 9, 31, 32)):
        pieces = data.split_line(list(range(length)), max_length)
        assert sum(pieces, []) == list(range(length))
        assert all(sum(map(len, four)) == max_length for four in [pieces[:4]] if len(pieces) > 4)
    long = "\n\n".join(text.replace("\n", " ") for text in make_text(100))
    for text, is_same in (long, False), ("\n\n".join(["ba do ku ."] * 300), True):
        Path("corpus.txt").write_text(text)
        plain, split = (data.prepare(data_config(split_long_lines=flag)) for flag in (False, True))
        lost, still_lost = (shards.total("tokens_dropped") for shards in (plain, split))
        assert still_lost < 0.3 * lost or is_same
        assert np.array_equal(plain.load("train", 0), split.load("train", 0)) == is_same


def test_shards_hold_what_was_read(corpus):
    """A shard's counts are those of its rows, and together they account for every token."""
    shards = data.prepare(data_config())
    assert len(shards.infos) > 4 and sum(info["documents"] for info in shards.infos) == 300
    for number, info in enumerate(shards.infos):
        train_, heldout = shards.load("train", number), shards.load("heldout", number)
        assert train_.dtype == np.uint16
        assert (len(train_), len(heldout)) == (info["rows"], info["heldout_rows"])
        rows = np.concatenate([train_, heldout])
        assert info["tokens_kept"] == np.sum((rows != 0) & (rows != 2) & (rows != 3))  # [PAD], [CLS], [SEP]
    total = sum(info["tokens_kept"] + info["tokens_dropped"] for info in shards.infos)
    assert total == sum(len(text.split()) for text in make_text())


def test_held_out_documents_are_chosen_by_a_hash_of_their_text(corpus):
    """One document in a hundred is held out; copies of a document are on the same side."""
    texts = [" ".join(pair * 5) for pair in itertools.permutations(WORDS, 2)][:600]
    hashes = [int(hashlib.sha256(text.encode()).hexdigest()[:16], 16) for text in texts]
    chosen = {text for text, number in zip(texts, hashes, strict=True) if number % 100 == 0}
    Path("corpus.txt").write_text("\n\n".join([*texts, *texts]))
    shards = grow("corpus.txt")
    heldout = shards.heldout(1000)
    trained = np.concatenate([shards.load("train", number) for number in range(len(shards.infos))])
    read, rest = ({re.sub(r"\[...\] ?", "", shards.wordpiece.decode(row)).strip() for row in rows}
                  for rows in (heldout, trained))
    assert read == chosen and 0 < len(chosen) < 20 and len(heldout) == 2 * len(chosen)
    assert rest == set(texts) - chosen and np.array_equal(shards.heldout(2), heldout[:2])


def test_a_cache_is_the_same_bytes_after_any_stop(corpus, monkeypatch):
    """Stopped at any shard and resumed, for text and for archives, the cache is byte for byte the same."""
    stops = []

    def stop(shards, *args):
        if len(shards.infos) in stops:
            stops.remove(len(shards.infos))
            raise KeyboardInterrupt

    watch(monkeypatch, Shards, "add", stop)
    Path("owt.tar").write_bytes(make_openwebtext()[1])
    for name in ("corpus.txt", "owt.tar"):
        config = data_config(data=(name,))
        whole, stops[:], config = contents(data.prepare(config)), [0, 1, 3], replace(config, cache="other")
        while stops:
            with pytest.raises(KeyboardInterrupt):
                data.prepare(config)
        assert len(whole) > 5 and contents(data.prepare(config)) == whole
    monkeypatch.setattr(data, "read_documents", lambda *_: pytest.fail("a complete cache needs no reading"))
    data.prepare(config)


def test_a_cache_of_anything_else_is_not_reused(corpus):
    """A cache is identified by all that its rows depend on."""
    Path("v2.txt").write_text("\n".join([*SMALL_VOCAB, "more"]))
    shutil.copy2("corpus.txt", "b.txt")
    changes = [dict(max_length=16), dict(seed=1), dict(do_lower_case=False), dict(strip_accents=False),
               dict(vocab="v2.txt"), dict(data=("b.txt",)), dict(one_document_per_file=True)]
    configs = [data_config(), *(replace(data_config(), **change) for change in changes)]
    folders = {Shards(config, data.load_wordpiece(config)).folder for config in configs}
    assert len(folders) == 1 + len(changes)
    os.utime("corpus.txt", (1, 1))
    assert Shards(configs[0], data.load_wordpiece(configs[0])).folder not in folders


def find_cache(*paths, **changes):
    config = data_config(data=paths, **changes)
    return Shards(config, data.load_wordpiece(config)).folder


def test_a_copy_of_the_text_and_another_path_to_it_find_the_cache(corpus, monkeypatch):
    """Names in the folder, sizes and content identify a text; other content of the same size does not."""
    write_files("text", {"a.txt": b"ba do", "sub/b.txt": b"ku le"})
    whole = data.prepare(data_config(data=("text",))).folder
    calls = []
    watch(monkeypatch, data, "hash_files", calls.append)
    for path in "text/", "./text", str(corpus / "text"):
        assert find_cache(path) == whole and not calls
    shutil.copytree("text", "same times")
    assert find_cache("same times") == whole and len(calls) == 1
    Path("same times/a.txt").write_bytes(b"ba du")
    shutil.copystat("text/a.txt", "same times/a.txt")
    assert find_cache("same times") != whole
    shutil.copytree("text", "copy", copy_function=shutil.copyfile)
    calls.clear()
    assert find_cache("copy") == find_cache(str(corpus / "copy")) == whole and len(calls) == 2
    Path("copy").rename("renamed")
    assert find_cache("renamed") == whole
    for content in b"ba du", b"ba do ku":
        Path("renamed/a.txt").write_bytes(content)
        assert find_cache("renamed") != whole
    Path("renamed/a.txt").write_bytes(b"ba do")
    assert find_cache("renamed") == whole
    Path("renamed/a.txt").rename("renamed/c.txt")  # another order
    assert find_cache("renamed") != whole


def test_names_of_caches_are_short_and_hold_no_query(corpus):
    """An address may hold a signature; a name of 244 bytes is allowed, but not with more after it."""
    signed = f"http://user:secret@host/a.txt?Signature=secret{'0' * 300}"
    assert re.fullmatch(r"a\.txt-\w{12}-\w{12}", find_cache(signed).name)
    for path in "\ud55c" * 80 + ".txt", "x" * 240 + ".txt":
        shutil.copy("corpus.txt", path)
        for vocab in "vocab.txt", "train:60":
            assert data.prepare(data_config(data=(path,), vocab=vocab)).is_complete


def describe(text, **changes):
    Path("text.txt").write_text(text, encoding="utf-8")
    return data.prepare(data_config(data=("text.txt",), **changes)).describe()


def test_many_unknown_tokens_are_a_warning(corpus):
    """The share of [UNK] is printed, and above 5 % the usual causes are named."""
    words = ["ba"] * 95
    for unknown, share, is_warned in (0, "0.0%", False), (5, "5.0%", False), (6, "5.9%", True):
        printed = describe(" ".join(words + ["x"] * unknown), max_length=128)
        assert f", {share} of the rest are [UNK]" in printed
        assert ("of the tokens are [UNK]" in printed) == is_warned
    printed = describe("ba" * 200 + "\n\n" + "do" * 200)  # no spaces
    assert "100.0% of the rest are [UNK]" in printed and "padding" not in printed


def test_a_cased_vocabulary_for_lower_cased_text_is_a_warning(corpus):
    """More than a token in twenty with capitals, [PAD] and its like aside, cannot occur."""
    tokens = [*data.SPECIAL_TOKENS, "ba", *map(str, range(92))]  # 98
    for capitals, is_warned in (["B", "##Do", "Ku", "É", "Z"], False), ([*"ABCDEF"], True):
        Path("vocab.txt").write_text("\n".join(tokens + capitals), encoding="utf-8")
        assert ("have capitals" in describe("ba")) == is_warned
        assert "have capitals" not in describe("ba", do_lower_case=False)


@pytest.mark.parametrize("text, is_warned", [
    ("हिन्दी भाषा की किताब", True), ("كِتَاب مَدرَسة", True), ("ภาษาไทยที่ดี", True), ("ガラスが", True),
    ("Éléphant müde Tiếng Việt", False), ("ёлка й", False), ("한국어 학교", False), ("हद दन", False),
    ("\u2764\ufe0f " * 9, False)])
def test_stripped_vowel_signs_are_a_warning(corpus, text, is_warned):
    """Accents of Latin and Cyrillic may go; what spells the words of other scripts may not without a word."""
    texts = [unicodedata.normalize(form, f"{text} ba do") for form in ("NFC", "NFD")]
    for one in texts:
        assert ("--no-strip-accents" in describe(one)) == is_warned
        assert "--no-strip-accents" not in describe(one, strip_accents=False)


def test_files_of_a_folder_that_are_not_read_are_counted_by_kind(corpus):
    """Hidden files are left out; where all files are read, nothing is said."""
    names = "a.txt", "b.bz2", "c.BZ2", "d.bz2", "LICENSE", "sub/e.docx", ".hidden", ".git/f.pack"
    write_files("text", {name: b"ba do ku" for name in names})
    printed = data.prepare(data_config(data=("text", "corpus.txt"))).describe()
    assert "; 5 files are not read: .bz2 2, .BZ2 1, no ending 1, .docx 1" in printed
    assert "not read" not in data.prepare(data_config()).describe()


def test_a_config_with_many_paths_reaches_the_child(corpus, monkeypatch):
    """Its paths would not fit into an argument, which holds 128 KiB."""
    monkeypatch.undo()
    monkeypatch.chdir(corpus)
    Path("a.txt").write_text("ba do ku")
    config = data_config(data=("./" * 100 + "a.txt",) * 700)
    shards = data.GrowingShards(config, data.load_wordpiece(config))
    with shards.prepare_in_child():
        shards.wait_for_shards(1)
    assert shards.total("documents") == 700


# ------------------------------------------------------------------------------------------------------------
# The order of the rows


def prepare_growing_shards():
    """Complete shards, of the class that training reads."""
    shards = data.prepare(data_config())
    return data.GrowingShards(shards.config, shards.wordpiece)


def test_order_is_a_permutation_of_groups_in_every_epoch(corpus, monkeypatch):
    """Groups of 1, 2, 4, ... shards are shuffled; every epoch has every row once."""
    monkeypatch.setattr(data, "MAX_GROUP", 4)
    monkeypatch.setattr(data, "SHARD_CHARACTERS", 4_000)
    shards = prepare_growing_shards()
    groups = list(itertools.takewhile(lambda group: group[0] < 3, Order(shards, 8).list_groups()))
    epochs = [[members for epoch, _, members in groups if epoch == number] for number in range(3)]
    assert [len(members) for members in epochs[0][:5]] == [1, 2, 4, 4, 4]
    first, second, third = (sum(members, []) for members in epochs)
    assert first == list(range(len(shards.infos))) == sorted(second) == sorted(third)
    assert first != second != third
    rows = [bytes(row) for number in first for row in shards.load("train", number)]
    order, flat = Order(shards, 7), []
    while len(flat) < 2 * len(rows):
        flat += [bytes(row.astype(np.uint16)) for row in order.batch(len(flat) // 7)[1]]
    assert sorted(flat[: len(rows)]) == sorted(flat[len(rows) : 2 * len(rows)]) == sorted(rows)
    size = shards.infos[0]["rows"]
    assert sorted(flat[:size]) == sorted(rows[:size]) and flat[:size] != rows[:size]
    monkeypatch.setattr(data, "SHARD_CHARACTERS", 10**9)  # a group of one shard in every epoch
    shards = prepare_growing_shards()
    first, second = (Order(shards, shards.infos[0]["rows"]).batch(step)[1] for step in (0, 1))
    assert sorted(first.tolist()) == sorted(second.tolist()) and not np.array_equal(first, second)


def test_order_of_any_step_is_a_function_of_the_step(corpus):
    """A run that resumes at any step reads the rows that it would have read, in later epochs, too."""
    shards = prepare_growing_shards()
    steps = 3 * sum(info["rows"] for info in shards.infos) // 64
    whole = Order(shards, 64)
    batches = [whole.batch(step) for step in range(steps)]
    assert batches[-1][0] >= 2
    for start in (1, 5, steps // 2, steps - 1):
        resumed = Order(shards, 64)
        for step in range(start, steps):
            epoch, rows = resumed.batch(step)
            assert epoch == batches[step][0] and np.array_equal(rows, batches[step][1])
    halves = Order(shards, 32)  # a row's place does not depend on the batch size
    rows = np.concatenate([halves.batch(step)[1] for step in range(4)])
    assert np.array_equal(rows, np.concatenate([batches[0][1], batches[1][1]]))


def grow(*paths):
    """The shards of these files, of the class that training reads."""
    config = data_config(data=paths)
    data.prepare(config)
    return data.GrowingShards(config, data.load_wordpiece(config))


def test_a_run_is_identified_by_the_shards_that_it_has_used(corpus):
    """What changes after them changes nothing for it; where its rows depend on the end, a new end does."""
    text = Path("corpus.txt").read_bytes()
    before = grow("corpus.txt")
    order = Order(before, 8)
    order.batch(0)
    assert order.num_shards_used == 1
    order.batch(before.infos[0]["rows"] // 8)
    assert order.num_shards_used == 3  # the group of shards 1 and 2
    begun = before.history(3)
    order.batch(before.total("rows") // 8)  # the end of the epoch
    assert order.num_shards_used > len(before.infos)
    ended = before.history(order.num_shards_used)
    Path("more.txt").write_bytes(b"ba do ku")
    write_files("mended", {"corpus.txt": text[:-2] + b"ba"})
    write_files("spoilt", {"corpus.txt": b"x" + text[1:]})
    for paths, is_begun, is_ended in [
        (("corpus.txt", "more.txt"), True, False), (("mended",), True, False), (("spoilt",), False, False),
        (("more.txt", "corpus.txt"), False, False),
    ]:
        after = grow(*paths)
        assert (after.history(3) == begun) == is_begun
        assert (after.history(order.num_shards_used) == ended) == is_ended
    Path("corpus.txt").rename("other.txt")
    os.utime("other.txt", (1, 1))
    assert grow("other.txt").history(order.num_shards_used) == ended


def test_a_history_says_where_the_text_differs(corpus):
    """The file in which the first other shard begins is named."""
    for number in range(3):
        Path(f"{number}.txt").write_text("\n\n".join(make_text(100, seed=number)))
    names = "0.txt", "1.txt", "2.txt"
    history = grow(*names).history(100)
    for changed in names:
        text = Path(changed).read_text()
        documents = text.split("\n\n")
        Path(changed).write_text("\n\n".join([*documents[:50], "le le le", *documents[50:]]))
        assert grow(*names).changed_file(history) == changed
        Path(changed).write_text(text)


def test_ctrl_c_is_heard_while_groups_are_skipped(corpus):
    """A resume at a far step skips more groups than a user would wait for."""
    shards = prepare_growing_shards()
    shards.signals.append(signal.SIGINT)
    with pytest.raises(data.Stopped):
        Order(shards, 8).batch(10**12)


# ============================================================================================================
# model.py

# ------------------------------------------------------------------------------------------------------------
# The objective, also compiled and on a GPU


def test_electra_works_with_nothing_but_ids_and_compiles_to_one_graph():
    """Uniforms and counts have obvious defaults; torch.compile traces the whole objective without a break."""
    electra, ids = make_electra(), make_rows()
    torch.manual_seed(3)
    expected = electra(ids)
    torch.manual_seed(3)
    arguments = ids, torch.rand(6, 32 + 2 * CONFIG.num_slots(32)), model.loss_counts(ids, CONFIG)
    for function in electra, torch.compile(electra, fullgraph=True, backend="eager"):
        assert all(map(torch.equal, function(*arguments), expected))


def test_micro_batches_give_the_gradient_of_the_one_batch():
    """Losses are divided by the counts of the whole batch, so that micro-batches add up to it."""
    ids, gradients = make_rows(12), {}
    uniforms, counts = make_uniforms(ids), model.loss_counts(ids, CONFIG)
    for size in (12, 1, 3, 4):
        electra = make_electra().double()
        for part in zip(ids.split(size), uniforms.split(size), strict=True):
            electra(*part, counts).loss.backward()
        gradients[size] = torch.cat([parameter.grad.flatten() for parameter in electra.parameters()])
        assert (gradients[size] - gradients[12]).abs().max() < 1e-10


def test_dropout_and_attention_of_a_cpu_are_torchs():
    """A share of the elements is dropped, the others are scaled up; attention agrees with torch's kernel."""
    ones = torch.ones(401, 499, dtype=torch.float64, requires_grad=True)
    dropped = model.dropout(ones, 0.1, training=True)
    assert set(dropped.unique().tolist()) == {0.0, 1 / 0.9} and abs(dropped.mean() - 1) < 0.003
    (dropped * 2).sum().backward()
    assert torch.equal(ones.grad, 2 * dropped)
    flat = (dropped == 0).double().flatten()
    for lag in (1, 2, 3, 4, 499):  # four elements share a random number
        assert abs((flat[lag:] * flat[:-lag]).mean() - 0.01) < 0.001
    assert torch.equal(model.dropout(ones, 0.0, training=True), ones)
    query, key, value = torch.randn(3, 2, 4, 7, 8, dtype=torch.float64)
    mask = torch.rand(2, 7) < 0.7
    mask[:, 0] = True
    ours, theirs = (model.attention(query, key, value, mask, prob, True) for prob in (1e-9, 0.0))
    assert torch.allclose(ours, theirs, atol=1e-8)


@pytest.mark.filterwarnings("ignore")  # torch's own
def test_inductor_compiles_the_step():
    """Compiled for real, one layer gives the loss and the gradients of the same layer uncompiled."""
    if torch.__version__ < "2.11":
        pytest.skip("it compiles wrong gradients of embeddings on a CPU")
    if not shutil.which("g++"):
        pytest.skip("inductor needs a C++ compiler")
    torch.set_float32_matmul_precision("highest")
    electra, ids = make_electra(replace(NO_DROPOUT, num_hidden_layers=1)), make_rows()
    uniforms, gradients = make_uniforms(ids), []
    for function in electra, torch.compile(electra, fullgraph=True):
        electra.zero_grad()
        function(ids, uniforms).loss.backward()
        gradients.append([parameter.grad.clone() for parameter in electra.parameters()])
    for one, other in zip(*gradients, strict=True):
        assert torch.allclose(one, other, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("dtype", [pytest.param("bf16", marks=GPU), pytest.param("fp16", marks=GPU)])
def test_a_gpu_agrees_with_the_cpu(dtype, corpus):
    """Losses of one step on a GPU are the CPU's: in fp32 to 1e-4, in bf16 and fp16 to 2 %."""
    electra, ids = make_electra(), make_rows()
    uniforms = make_uniforms(ids)
    expected = electra(ids, uniforms)
    electra, inputs = electra.cuda(), (ids.cuda(), uniforms.cuda())
    torch.set_float32_matmul_precision("highest")
    for kind, tolerance in ("fp32", 1e-4), (dtype, 0.02):
        with train.autocast(train.TrainConfig(device="cuda", dtype=kind)):
            output = electra(*inputs)
        for name in "mlm_loss", "disc_loss":
            ours, theirs = getattr(output, name).item(), getattr(expected, name).item()
            assert ours == pytest.approx(theirs, rel=tolerance)
    counts, whole, parts = model.loss_counts(inputs[0], CONFIG), [], []
    for gradients, size in (whole, 6), (parts, 2):  # micro-batches
        electra.zero_grad()
        for part in zip(*(tensor.split(size) for tensor in inputs), strict=True):
            electra(*part, counts).loss.backward()
        gradients += [parameter.grad.clone() for parameter in electra.parameters()]
    for one, other in zip(whole, parts, strict=True):
        assert torch.allclose(one, other, rtol=1e-3, atol=1e-5)


# ------------------------------------------------------------------------------------------------------------
# The networks of transformers


@pytest.mark.parametrize("name, architecture", [
    ("discriminator", "ElectraForPreTraining"), ("generator", "ElectraForMaskedLM")])
@pytest.mark.parametrize("embedding_size", [40, 48])  # with a projection and, for the discriminator, without
def test_transformers_and_we_load_what_the_other_saves(name, architecture, embedding_size, tmp_path):
    """No key is missing or unexpected, and the logits are the same; also from a file in the old format."""
    transformers = pytest.importorskip("transformers")
    transformers.logging.set_verbosity_error()
    ours = getattr(make_electra(replace(CONFIG, embedding_size=embedding_size)), name).eval()
    for parameter in ours.parameters():  # biases and [PAD], too; with 0.02 attention is nearly uniform
        parameter.data += 0.1 * torch.randn_like(parameter)
    write_files(tmp_path / "ours", model.pretrained_files(ours))
    loader = getattr(transformers, architecture)
    theirs, report = loader.from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not report["unexpected_keys"] and not report["missing_keys"] and not report["mismatched_keys"]
    theirs.save_pretrained(tmp_path / "theirs")
    theirs.config.save_pretrained(tmp_path / "old")
    # As Google's repositories hold it: the tied duplicate and position_ids are there.
    state = theirs.state_dict() | {"electra.embeddings.position_ids": torch.arange(64)[None]}
    torch.save(state, tmp_path / "old" / "pytorch_model.bin")
    networks = [ours]
    for folder in (tmp_path / "theirs", tmp_path / "old"):
        networks.append(type(ours)(model.load_config(folder)).eval())
        model.load_weights(networks[-1], folder)
    ids = make_rows(8, 40, seed=3)
    mask, types = model.attention_mask_and_token_types(ids, SEP)
    positions = [torch.arange(40).expand(8, 40)] if name == "generator" else []
    with torch.no_grad():
        expected = theirs.eval()(input_ids=ids, attention_mask=mask.long(), token_type_ids=types).logits
        for network in networks:
            assert (network(ids, mask, types, *positions) - expected)[mask].abs().max() < 1e-5


# Special tokens unlike Google's, and rows of the vocabulary that no token uses.
PADDED = replace(CONFIG, vocab_size=56, cls_token_id=2, sep_token_id=3, mask_token_id=4)


def save_foreign(folder, network):
    """A folder of others, which has no ids of special tokens in its config.json."""
    files = model.pretrained_files(network)
    config = json.loads(files["config.json"])
    for name in "cls_token_id", "sep_token_id", "mask_token_id":
        del config[name]
    write_files(folder, files | {"config.json": json.dumps(config).encode()})


def test_special_tokens_come_from_the_vocabulary_and_its_padding_is_cut(tmp_path, capsys):
    """Loaded from others' folders, the two networks mask, separate and score as they did."""
    electra = make_electra(replace(PADDED, hidden_dropout_prob=0, attention_probs_dropout_prob=0)).eval()
    electra.generator.mlm_bias.data[len(SMALL_VOCAB) :] = -1e9  # the padding is never sampled
    for name in "generator", "discriminator":
        save_foreign(tmp_path / name, getattr(electra, name))
    folders = tmp_path / "discriminator", tmp_path / "generator"
    loaded = model.load_electra(*folders, WordPiece(SMALL_VOCAB)).eval()
    assert f"the last {56 - len(SMALL_VOCAB)} rows of electra.embeddings.word_" in capsys.readouterr().out
    assert loaded.config.vocab_size == len(SMALL_VOCAB) and loaded.config.mask_token_id == 4
    ids = torch.tensor([[2, *range(7, 20), 3, *range(20, 30), 3, 0, 0]])
    output, expected = run_electra(loaded, ids), run_electra(electra, ids)
    assert torch.equal(output.corrupted_ids, expected.corrupted_ids)
    torch.testing.assert_close(output.disc_logits, expected.disc_logits)
    wordpiece = WordPiece([*SMALL_VOCAB, *map(str, range(99))])
    with pytest.raises(ModelError, match="lm_head.bias has shape .56., and should have .147."):
        model.load_electra(*folders, wordpiece)


def test_weights_are_read_in_every_form_that_libraries_write(tmp_path):
    """Shards with an index, gamma and beta, and tensors of other types that no network here has."""
    network = model.Discriminator(CONFIG)
    files = model.pretrained_files(network)
    write_files(tmp_path, files)
    tensors = {}
    for name, tensor in model.read_weights(tmp_path).items():
        tensors[name.replace("Norm.weight", "Norm.gamma").replace("Norm.bias", "Norm.beta")] = tensor
    assert sum("gamma" in name for name in tensors) == 5
    names = {name: f"model-{number % 2}.safetensors" for number, name in enumerate(tensors)}
    for shard in set(names.values()):
        part = {name: tensor for name, tensor in tensors.items() if names[name] == shard}
        odd = {"electra.embeddings.position_ids": torch.arange(64), "mask": torch.ones(3, dtype=torch.bool)}
        safetensors = pytest.importorskip("safetensors.torch")
        (tmp_path / shard).write_bytes(safetensors.save(part | odd))
    (tmp_path / WEIGHTS).rename(tmp_path / "whole")
    (tmp_path / f"{WEIGHTS}.index.json").write_text(json.dumps(dict(weight_map=names)))
    loaded = model.Discriminator(model.load_config(tmp_path))
    model.load_weights(loaded, tmp_path)
    for ours, theirs in zip(network.parameters(), loaded.parameters(), strict=True):
        assert torch.equal(ours, theirs)
    (tmp_path / "model-1.safetensors").unlink()
    with pytest.raises(OSError, match="model-1.safetensors"):
        model.load_config(tmp_path)


# ============================================================================================================
# train.py

# ------------------------------------------------------------------------------------------------------------
# A run


def test_a_run_learns_logs_and_leaves_models(corpus, capsys):
    """A run lowers its losses, logs what it should, and leaves two folders and a look at what it learned."""
    pretrain("--num-train-steps 150 --learning-rate 0.01")
    header, steps, heldout = read_log()[0], read_log(split="train"), read_log(split="heldout")
    assert [line["step"] for line in steps] == [1, *range(2, 151, 2)]
    assert [line["step"] for line in heldout] == [*range(8, 151, 8), 150]
    metrics = set("split step tokens epoch loss mlm_loss mlm_accuracy sampled_accuracy disc_loss "
                  "all_original auc precision recall".split())
    assert set(steps[0]) == metrics | {"lr", "grad_norm"}
    assert set(heldout[0]) == metrics | {"unigram_entropy"}
    assert steps[0]["tokens"] == 8 * 32 and header["settings"]["batch_size"] == 8
    assert heldout[-1]["mlm_loss"] < heldout[0]["mlm_loss"] - 0.2
    printed = capsys.readouterr().out
    assert "held-out text: MLM loss" in printed and "✗]" in printed and "by word frequency alone" in printed
    assert "2 rows are held out, too few for reliable metrics" in printed
    wordpiece, length = data.read_tokenizer("out/small/discriminator")
    assert wordpiece.tokens == SMALL_VOCAB and length == 32
    electra = model.load_electra("out/small/discriminator", "out/small/generator", wordpiece)
    assert electra.config.vocab_size == len(SMALL_VOCAB)


def test_evaluations_use_the_same_rows_masks_and_samples(corpus):
    """With a learning rate of 0, all evaluations are equal; dropout is off."""
    pretrain("--learning-rate 0")
    lines = [line | dict(step=0, tokens=0, epoch=0) for line in read_log(split="heldout")]
    assert len(lines) == 3 and lines[0] == lines[1] == lines[2]


def test_metrics_of_a_batch_by_hand():
    """The metrics of micro-batches are those of the batch, over non-padding tokens."""
    electra, ids = make_electra().double().eval(), make_rows(8)
    ids[ids > 150] = 150
    electra.generator.mlm_bias.data[150] = 4.0  # the best guess, and now and then the sample
    uniforms, counts = make_uniforms(ids), model.loss_counts(ids, CONFIG)
    with torch.no_grad():
        whole = electra(ids, uniforms, counts)
        parts = [electra(*part, counts) for part in zip(ids.split(2), uniforms.split(2), strict=True)]
    fakes, logits = whole.is_replaced[ids != 0].numpy(), whole.disc_logits[ids != 0].numpy()
    predictions = counts[0].item()
    assert whole.mlm_correct > whole.sampled_correct > 0
    assert train.compute_metrics(parts, ids) == pytest.approx(dict(
        loss=whole.loss.item(), mlm_loss=whole.mlm_loss.item(), disc_loss=whole.disc_loss.item(),
        mlm_accuracy=whole.mlm_correct.item() / predictions,
        sampled_accuracy=whole.sampled_correct.item() / predictions,
        all_original=stats.entropy([fakes.mean(), 1 - fakes.mean()]),
        auc=sklearn.metrics.roc_auc_score(fakes, logits),
        recall=sklearn.metrics.recall_score(fakes, logits > 0),
        precision=sklearn.metrics.precision_score(fakes, logits > 0)), rel=1e-9)
    rows = np.array([[CLS, 150, 150, 151, 152, SEP, 0, 0]])
    assert train.unigram_entropy(rows, CONFIG) == pytest.approx(1.5 * math.log(2))


def test_networks_can_be_used_before_a_run_ends(corpus, monkeypatch):
    """Each checkpoint refreshes the two folders; at six shares of the steps they are kept."""
    saved = []

    def look(run, *_):
        if (network := run.path / "discriminator").exists():
            saved.append(model.read_weights(network)["electra.embeddings.word_embeddings.weight"])

    watch(monkeypatch, train.Run, "save", look)
    pretrain("--num-train-steps 40")
    assert len(saved) > 5 and not torch.equal(saved[0], saved[1])
    kept = sorted(Path("out/small").glob("step-*/generator/model.safetensors"))
    assert sorted(int(path.parts[2][5:]) for path in kept) == [2, 5, 10, 20, 30]  # 0.4 steps are none
    assert len({path.read_bytes() for path in kept}) == 5
    assert data.find_model("out/small/step-10", "cache") == Path("out/small/step-10/discriminator")


def test_a_saved_run_is_evaluated_again(corpus, capsys):
    """--eval-only prints the evaluation and the sentences that the run printed last, and changes nothing."""
    pretrain()
    end = capsys.readouterr().out.split("step 24, held-out text")[-1].partition("\ntransformers can load")[0]
    files = {path: path.read_bytes() for path in Path("out").rglob("*.*") if path.is_file()}
    pretrain("--eval-only")
    assert capsys.readouterr().out.split("step 24, held-out text")[-1] == end and "✗" in end
    assert all(path.read_bytes() == content for path, content in files.items())
    shutil.rmtree("cache")  # is made again
    pretrain("--eval-only")
    assert capsys.readouterr().out.split("step 24, held-out text")[-1] == end
    for flags, message in [("--eval-only --out elsewhere", "there is no run in elsewhere/small to evaluate"),
                           ("--eval-only --num-train-steps 25", "now 25.; use its settings.* or --restart"),
                           ("--eval-only --restart", "and --restart deletes it; leave one out")]:
        with pytest.raises(UserError, match=message):
            pretrain(flags)
    assert not Path("elsewhere").exists() and Path("out/small/checkpoint.pt").exists()


def test_a_run_starts_from_weights(corpus, capsys):
    """--init takes a run, two folders or one; shape, vocabulary and case come from them, the rest is new."""
    pretrain("--no-do-lower-case --generator-size 0.5")
    shape = re.compile(r"--(vocab|\S+-size|num-[ah]\S+|max-position\S+) \S+")
    flags = shape.sub("", ARGUMENTS) + "--batch-size 4 --num-train-steps 3 --learning-rate 0 "
    small = Path("out/small")
    shutil.copytree(small / "discriminator", "alone")
    before = {name: model.read_weights(small / name) for name in ("discriminator", "generator")}

    def assert_starts_from(out, networks):
        for name in networks:
            after = model.read_weights(f"{out}/small/{name}")
            assert after.keys() == before[name].keys()
            assert all(torch.equal(after[key], before[name][key]) for key in after if "predictions" in key)

    train.main(f"{flags} --init out/small --out again".split())
    assert_starts_from("again", before)
    [header, *_] = read_log("again/small")
    assert header["settings"]["generator_size"] == 0.5 and not header["settings"]["do_lower_case"]
    train.main(f"{flags} --init alone --out half --generator-size 1".split())
    assert_starts_from("half", ["discriminator"])
    assert "--init names no generator" in capsys.readouterr().out
    generator = model.Generator(model.load_config(small / "generator"))
    write_files("other", model.pretrained_files(generator))
    deeper = replace(model.load_config(small / "generator"), num_hidden_layers=3)
    write_files("deeper", model.pretrained_files(model.Generator(deeper)))
    shutil.copytree(small / "generator", "cased")
    for name in "other", "deeper":
        write_files(name, WordPiece(SMALL_VOCAB, do_lower_case=False).files(32))
    write_files("cased", WordPiece(SMALL_VOCAB).files(32))
    train.main(f"{flags} --init {small} other --out mixed".split())
    assert "different embeddings; the discriminator's are used" in capsys.readouterr().out
    table = "electra.embeddings.word_embeddings.weight"
    for name in before:
        after = model.read_weights(f"mixed/small/{name}")
        assert torch.equal(after[table], before["discriminator"][table])
    for more, message in [
        ("--hidden-size 32 --vocab vocab.txt", "--init prescribes hidden_size, vocab; leave these flags out"),
        ("--out out", "--init names the run that would be overwritten"),
        ("--init a b c", "--init takes a discriminator and a generator"),
        ("--init alone out/small --objective mlm", "--objective mlm has no discriminator; --init takes one"),
        ("--init out/small nowhere", "there is no model in nowhere"),
        (f"--init {small}/generator", "does not fit this Discriminator: discriminator_predictions"),
        (f"--init {small} alone", "alone does not fit this Generator: num_attention_heads is 2"),
        (f"--init {small} deeper", "deeper does not fit this Generator: num_hidden_layers is 3"),
        (f"--init {small} cased", "have different vocabularies, or rules for case"),
    ]:
        with pytest.raises((UserError, ModelError), match=re.escape(message)):
            train.main(f"{flags} --out new --init out/small {more}".split())
    with pytest.raises(UserError, match=r"num_train_steps was 24 .* use another --out and --init out/small"):
        pretrain("--no-do-lower-case --generator-size 0.5 --num-train-steps 30")


def test_the_baseline_is_a_masked_language_model_of_the_discriminators_size(toy_glue, capsys):
    """--objective mlm trains one network, as wide as the discriminator, and finetune.py takes it."""
    pretrain("--objective mlm --num-train-steps 150 --learning-rate 0.01 --out mlm")
    heldout = read_log("mlm/small", "heldout")
    assert not {"disc_loss", "auc"} & heldout[0].keys()
    assert heldout[-1]["mlm_loss"] < heldout[0]["mlm_loss"] - 0.2
    assert not Path("mlm/small/discriminator").exists()
    shape = model.load_config("mlm/small/generator")
    assert (shape.hidden_size, shape.intermediate_size, shape.num_attention_heads) == (32, 64, 2)
    electra = Electra(replace(CONFIG, objective="mlm"))
    assert not [name for name, _ in electra.named_parameters() if "discriminator" in name]
    output = run_electra(electra, make_rows())
    assert output.loss == output.mlm_loss and output.disc_logits is None
    printed = capsys.readouterr().out
    assert "→" in printed and "✗" not in printed
    tune("--task cola --model mlm/small")
    assert read_results()["cola", 0]["model"] == "mlm/small/generator"
    pretrain("--objective mlm --restart")
    assert not list(Path("out/small/discriminator").iterdir())  # of the run before


def test_prepare_only_shows_rows_and_warns_of_long_lines(corpus, capsys):
    """--prepare-only makes the cache that training uses, and --show prints rows of it."""
    pretrain("--prepare-only --show 2")
    printed = capsys.readouterr().out
    assert "300 documents" in printed and printed.count("[CLS]") == 2 and "warning" not in printed
    assert not Path("out").exists()
    Path("long.txt").write_text("\n\n".join(text.replace("\n", " ") * 3 for text in make_text(20)))
    pretrain("--prepare-only --data long.txt")
    assert "warning: many tokens are dropped" in capsys.readouterr().out
    Path("short.txt").write_text("ba do ku\n\n" * 20)
    pretrain("--prepare-only --data short.txt")
    assert "warning: rows are mostly padding" in capsys.readouterr().out


def test_text_without_held_out_documents_trains_without_evaluation(corpus, capsys):
    """A text that is too short to hold anything out can still be trained on."""
    texts = [text for text in make_text() if not data.is_heldout(text)]
    Path("corpus.txt").write_text("\n\n".join(texts[:40]))
    pretrain()
    assert "no evaluation" in capsys.readouterr().out
    assert {line.get("split") for line in read_log()} == {None, "train"}


def test_a_warm_up_that_fills_the_run_is_a_warning(corpus, capsys):
    """small's 10,000 steps of warm-up leave a run of 24 at a fraction of its learning rate."""
    for steps, is_warned in (4, False), (5, True), (10_000, True):
        pretrain(f"--num-warmup-steps {steps} --restart")
        printed = capsys.readouterr().out
        assert ("of 24 steps; a short run needs fewer: --num-warmup-steps 1" in printed) == is_warned


def test_training_works_in_a_thread_and_in_a_notebook(corpus, monkeypatch):
    """A thread gets no signals. A notebook has a stdout of its own, and runs the file as %run does."""
    thread = threading.Thread(target=pretrain, args=["--out thread"])
    thread.start()
    thread.join()
    monkeypatch.setattr(sys, "argv", ["train.py", *ARGUMENTS.split()])
    monkeypatch.setattr(sys, "stdout", io.StringIO())
    with pytest.raises(SystemExit) as end:
        runpy.run_path(str(HERE / "train.py"), run_name="__main__")
    assert end.value.code == 0 and "to fine-tune" in sys.stdout.getvalue()
    assert_same_run("out", "thread")


def test_an_unhealthy_run_and_a_slow_machine_are_reported(corpus, monkeypatch, capsys):
    """A stuck generator, a collapsed discriminator, and a run that would take weeks each get a sentence."""

    def warning(mlm_loss, disc_loss):
        train.warn_if_stuck(dict(mlm_loss=mlm_loss, disc_loss=disc_loss, all_original=0.4, auc=0.5))
        return capsys.readouterr().out

    assert warning(3.0, 0.3) == ""
    assert "generator is stuck" in warning(6.5, 0.3)
    assert "discriminator is stuck" in warning(3.0, 0.39)
    monkeypatch.setattr(train, "SLOW_DAYS", 1e-9)
    pretrain("--num-train-steps 101")
    assert "at this rate the rest takes 0 days; `--size tiny`" in capsys.readouterr().out


# ------------------------------------------------------------------------------------------------------------
# Stopping and resuming


def test_ctrl_c_saves_and_the_same_command_resumes(corpus, monkeypatch):
    """Ctrl-C ends after the step it came in; the run saves, resumes, and ends in the same bits."""
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job has it ignored
    pretrain("--out whole")

    with ctrl_c_at(monkeypatch, 6):
        with pytest.raises(UserError, match="stopped after step 7; the same command resumes"):
            pretrain()
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    for _ in range(2):  # the second time it only shows its end again
        pretrain()
        assert_same_run("out", "whole")


def test_what_changes_only_the_rounding_may_change_and_is_logged(corpus):
    """Micro-batches and bf16 change a run by rounding only; they may change on resume, and are logged."""
    losses = []
    for flags in "", "--micro-batch-size 2", "--dtype bf16":
        pretrain(f"{WITHOUT_DROPOUT} --restart {flags}")
        losses.append([line["loss"] for line in read_log() if "loss" in line])
    plain, micro, bf16 = losses
    assert plain != micro == pytest.approx(plain, rel=1e-3) and plain != bf16 == pytest.approx(plain, rel=0.1)
    # Resumes the bf16 run. All these flags may change.
    pretrain(WITHOUT_DROPOUT + "--micro-batch-size 4 --cache cache2 --log-every 3 --eval-every 3 "
             "--save-every 3 --device cpu")
    before, after = (line["numerics"] for line in read_log() if "numerics" in line)
    assert before | dict(micro_batch_size=4, dtype="fp32") == after


def test_checkpoints_come_at_least_every_ten_minutes(corpus, monkeypatch):
    """A checkpoint also comes by the clock, at any step."""
    monkeypatch.setattr(train, "SAVE_SECONDS", 0)
    saved = []
    watch(monkeypatch, train.Run, "save", lambda run, step, *_: saved.append(step))
    pretrain("--save-every 1000")
    assert saved == list(range(1, 25))


# ------------------------------------------------------------------------------------------------------------
# Flags and numbers


def test_compile_and_optimizer_flags_do_what_they_say(corpus, steps, monkeypatch):
    """--compile compiles one graph; flags of Adam and of the shape reach the optimizer and the networks."""
    compiled, models = [], []
    monkeypatch.setattr(torch, "compile", lambda module, fullgraph: compiled.append(fullgraph) or module)
    monkeypatch.setattr(train, "COMPILES_SINCE", "2.0")  # nothing is compiled here
    watch(monkeypatch, Electra, "forward", lambda self, *args: models.append(self))
    pretrain("--compile --layer-norm-eps 1e-3 --hidden-dropout-prob 0.3 --attention-probs-dropout-prob 0.4 "
             "--adam-beta1 0.8 --adam-beta2 0.95 --adam-epsilon 1e-4 --weight-decay 0.2 --num-train-steps 1")
    groups, modules = steps[0].groups, list(models[0].modules())
    assert compiled == [True]
    assert {(*group["betas"], group["eps"]) for group in groups} == {(0.8, 0.95, 1e-4)}
    assert {group["weight_decay"] for group in groups} == {0.2, 0.0}
    assert {module.eps for module in modules if isinstance(module, nn.LayerNorm)} == {1e-3}
    assert {module.dropout_prob for module in modules if hasattr(module, "dropout_prob")} == {0.3}
    assert {module.attention_dropout_prob for module in modules if isinstance(module, model.Layer)} == {0.4}


def test_auto_means_bf16_on_a_gpu_that_has_it(monkeypatch):
    """auto is this rank's CUDA device if there is one: bf16 from compute capability 8.0 on, else fp16."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    for asked, rank, capability, *expected in [
        ("auto", 0, (8, 0), "cuda:0", "bf16"), ("auto", 1, (7, 5), "cuda:1", "fp16"),
        ("cuda:1", 0, (9, 0), "cuda:1", "bf16"), ("cpu", 0, (8, 0), "cpu", "fp32"),
    ]:
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _, capability=capability: capability)
        monkeypatch.setattr(train, "LOCAL_RANK", rank)
        config = train.set_up_device(train.TrainConfig(device=asked))
        assert [config.device, config.dtype] == expected
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (7, 5))
    with pytest.raises(UserError, match="cuda:0 does not compute in bf16; --dtype takes fp16, fp32"):
        train.set_up_device(train.TrainConfig(device="cuda:0", dtype="bf16"))


def test_fp16_scales_the_loss_skips_what_overflows_and_resumes(corpus, monkeypatch):
    """fp16 learns as fp32 does; a step whose gradient overflows is skipped, counted and in the schedule."""
    losses = []
    for dtype in "fp32", "fp16":
        pretrain(f"--dtype {dtype} --out {dtype}")
        losses.append([line["loss"] for line in read_log(f"{dtype}/small", "train")])
    assert 0 < abs(losses[0][0] - losses[1][0]) < 0.01  # the same step, rounded
    assert losses[1][-1] == pytest.approx(losses[0][-1], rel=0.1)
    pretrain_until_killed("--dtype fp16 --out killed", "checkpoint.pt", 2)
    pretrain("--dtype fp16 --out killed")
    assert_same_run("killed", "fp16")
    scaler, steps = torch.amp.GradScaler, []
    monkeypatch.setattr(torch.amp, "GradScaler",
                        lambda device, enabled: scaler(device, init_scale=2.0**20, enabled=enabled))
    watch(monkeypatch, train, "learning_rate", lambda step, *_: steps.append(step))
    pretrain("--dtype fp16 --log-every 1")
    lines = read_log(split="train")
    skipped = [line["skipped_steps"] for line in lines]
    assert steps == list(range(24)) and skipped[:3] == [1, 2, 3] and 5 < skipped[-1] == skipped[-5] < 24
    assert lines[0]["loss_scale"] == 2.0**19 and lines[-1]["loss"] < lines[0]["loss"]
    monkeypatch.setattr(torch.amp, "GradScaler",
                        lambda device, enabled: scaler(device, init_scale=1e-6, enabled=enabled))
    with pytest.raises(UserError, match="the loss overflows in fp16 at step 4, and nothing is learned"):
        pretrain("--dtype fp16 --restart")


def test_where_a_run_compiles(monkeypatch):
    """By default on a GPU, not with an old torch, and never with --deterministic."""
    compiles = train.compiles_by_default
    assert compiles(train.TrainConfig(device="cuda:0")) == (torch.__version__ >= "2.11")
    assert not compiles(train.TrainConfig(device="cpu"))
    assert not compiles(train.TrainConfig(device="cuda:0", deterministic=True))
    monkeypatch.setattr(torch, "__version__", torch.torch_version.TorchVersion("2.6.0+cu124"))
    assert not compiles(train.TrainConfig(device="cuda:0"))
    with pytest.raises(UserError, match="--deterministic does not compile; leave out --compile"):
        train.TrainConfig(deterministic=True, compile=True)


def test_an_old_torch_does_not_compile_on_a_cpu(corpus, monkeypatch):
    """torch 2.6 was seen to compile wrong gradients on a CPU, so --compile is refused there."""
    monkeypatch.setattr(torch, "__version__", torch.torch_version.TorchVersion("2.6.0+cu124"))
    with pytest.raises(UserError, match="torch 2.6.0.cu124 may compile wrong gradients"):
        pretrain("--compile")


def test_the_toy_computes_on_one_thread(monkeypatch):
    """tiny does on a CPU, whatever the machine has, unless OMP_NUM_THREADS is set; the other sizes do not."""
    chosen = []
    monkeypatch.setattr(torch, "set_num_threads", chosen.append)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    train.configure("--size small --device cpu".split())
    assert chosen == []
    train.configure("--size tiny --device cpu".split())
    assert chosen == [1]
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    train.configure("--size tiny --device cpu".split())
    assert chosen == [1]


# ------------------------------------------------------------------------------------------------------------
# Several processes


def test_ranks_follow_the_curve_of_one_process(corpus):
    """1, 2 and 4 ranks end in the same weights and metrics; ranks wait for text that comes late."""
    wait, files = threading.Event().wait, {"/late.txt": Path("corpus.txt").read_bytes()}
    states, logs = [], []
    with Server(files, lambda: wait(3) and None) as server:
        late = f"{server.url}/late.txt"
        for ranks, micro, text in (1, 8, "corpus.txt"), (2, 2, late), (4, 2, "corpus.txt"):
            flags = f"--data {text} --num-train-steps 5 --eval-every 3 --log-every 1"
            status, printed = launch(ranks, f"{flags} --micro-batch-size {micro} --out {ranks}").finish()
            assert status == 0, printed
            assert printed.count("to fine-tune:") == 1  # one rank talks
            states.append(torch.load(f"{ranks}/small/checkpoint.pt", weights_only=True)["model"])
            logs.append([line for line in read_log(f"{ranks}/small") if "split" in line])
    for state, log in zip(states[1:], logs[1:], strict=True):
        for name, tensor in states[0].items():
            assert tensor.dtype == torch.float64
            torch.testing.assert_close(state[name], tensor, rtol=0, atol=1e-10)
        for line, other in zip(log, logs[0], strict=True):
            assert line.pop("split") == other["split"]
            assert line == pytest.approx({name: other[name] for name in line}, abs=1e-10)


def test_ranks_stop_after_the_same_step_and_any_number_resumes(corpus):
    """Ctrl-C, or SIGTERM to one rank, stops all after one step, when it is saved; one rank resumes."""
    flags, log = "--num-train-steps 300 --save-every 300 --eval-every 300 ", Path("out/small/log.jsonl")
    for lines in 5, 15:
        torchrun = launch(2, flags + "SLOW_SAVE")
        while not log.exists() or log.read_bytes().count(b"\n") < lines:
            assert torchrun.is_running()
            time.sleep(0.02)
        if lines == 5:
            os.kill(torchrun.pid, signal.SIGINT)
        else:
            ranks = Path(f"/proc/{torchrun.pid}/task/{torchrun.pid}/children").read_text().split()
            os.kill(int(ranks[-1]), signal.SIGTERM)
        _, printed = torchrun.finish()
        stops = re.findall(r"stopped after step (\d+)", printed)
        assert len(stops) == 2 and len(set(stops)) == 1, printed
        step = int(stops[0])
        assert torch.load("out/small/checkpoint.pt", weights_only=True)["step"] == step
    status, printed = launch(1, flags).finish()
    assert status == 0 and f"resuming after step {step} of 300" in printed, printed
    numerics = [line["numerics"]["ranks"] for line in read_log() if "numerics" in line]
    assert numerics == [2, 1]  # what changes is logged


# ------------------------------------------------------------------------------------------------------------
# The CUDA path: by evidence that needs no GPU, and on one


class SyncIsError:
    """Fails, on a GPU, where the host waits for it."""

    def __enter__(self):
        self.set_mode("error")

    def __exit__(self, *error):
        self.set_mode("default")

    def set_mode(self, mode):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that this mode is a prototype
            torch.cuda.set_sync_debug_mode(mode)


@pytest.mark.parametrize("device, graph, mode", [
    ("cpu", "--no-graph", NoSync),
    pytest.param("cuda", "--no-graph", SyncIsError, marks=GPU),
    pytest.param("cuda", "--graph", SyncIsError, marks=GPU),
])
def test_no_step_of_pre_training_waits_for_the_device(corpus, monkeypatch, device, graph, mode):
    """Between two lines of the log nothing crosses from the device, and no size or branch depends on data."""
    steps, crossings = ExitStack(), []
    first = train.WARM_UP_CALLS + 1 if graph == "--graph" else 1  # capturing waits, once

    def look(step, *args):
        if step == first:  # step 0 is logged; the last one, too, and evaluated
            steps.enter_context(mode())
        if step == 22:
            steps.close()

    monkeypatch.setattr(train, "SNAPSHOTS", ())  # to export a network, the host waits for it
    watch(monkeypatch, train, "learning_rate", look)
    watch(monkeypatch, train, "gather_outputs", crossings.append)
    with steps:
        pretrain(f"--device {device} {graph} --log-every 100 --eval-every 100 --save-every 100 "
                 "--micro-batch-size 4 --no-compile")
    assert len(crossings) == len(read_log(split="train")) == 2


def test_batches_are_pinned_and_copied_without_waiting(monkeypatch):
    """For a GPU, rows and uniforms are in pinned memory, and the host does not wait for the copy."""
    pinned, copied = [], []
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: pinned.append(tensor) or tensor)
    monkeypatch.setattr(torch.Tensor, "to", lambda tensor, *args, **kwargs: copied.append((args, kwargs)))
    rows = make_rows().numpy()
    for array in rows, train.draw_uniforms(0, "train", 5, rows, CONFIG):
        train.to_device(array, "cuda:0")
    assert [tensor.shape for tensor in pinned] == [(6, 32), (6, 32 + 2 * CONFIG.num_slots(32))]
    assert copied == [(("cuda:0",), dict(non_blocking=True))] * 2


def test_a_replayed_run_is_the_plain_run(corpus, monkeypatch, request):
    """Through captures, replays, evaluations, a stop and a resume, a run ends in the bits of a plain one."""
    pretrain("--micro-batch-size 4 --out plain")
    request.getfixturevalue("recorded")
    pretrain("--micro-batch-size 4 --out replayed")
    assert (Recorded.captures, Recorded.replays) == (1, 24 - train.WARM_UP_CALLS)

    with ctrl_c_at(monkeypatch, 9):
        with pytest.raises(UserError, match="stopped after step 10; the same command resumes"):
            pretrain("--micro-batch-size 4 --out resumed")
    pretrain("--micro-batch-size 4 --out resumed")
    assert_same_run("replayed", "resumed")
    for name in ("discriminator/model.safetensors", "generator/model.safetensors"):
        assert Path("plain/small", name).read_bytes() == Path("replayed/small", name).read_bytes()
    for split in ("train", "heldout"):
        assert read_log("plain/small", split) == read_log("replayed/small", split)


def test_a_graph_for_each_shape(recorded):
    """Shapes are captured apart, and the next replay of a shape overwrites its results."""
    graphs = Recorded(lambda ids: [ids * 2])
    for width in 2, 3, 2, 3, 2, 3, 2, 3:
        [doubled] = graphs(torch.full((width,), 7))
        assert doubled.tolist() == [14] * width
    assert Recorded.captures == len(graphs.graphs) == 2
    [first], [second] = graphs(torch.full((2,), 1)), graphs(torch.full((2,), 5))
    assert first is second and second.tolist() == [10, 10]


def test_a_failed_capture_names_the_flag(recorded, monkeypatch, corpus):
    """What cannot be captured ends the run with a sentence; with --no-graph the same command goes on."""
    def fail(graphs, inputs):
        raise RuntimeError("not permitted\nCUDA kernel errors might be asynchronously reported")

    monkeypatch.setattr(Recorded, "capture", fail)
    message = r"no CUDA graph can be made of a step \(not permitted\); add --no-graph"
    with pytest.raises(UserError, match=message):
        pretrain()
    pretrain("--no-graph")
    assert read_log(split="heldout")[-1]["step"] == 24


def test_where_there_are_no_graphs_it_is_said(monkeypatch, capsys):
    """Graphs are the default on a GPU; fp16 and several processes go without, and say so."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    monkeypatch.setattr(torch, "set_float32_matmul_precision", lambda precision: None)
    sentence = "no CUDA graphs: they are for bf16 and fp32 in one process\n"
    for changes, size, expected, printed in (
            ({}, 1, True, ""), (dict(dtype="fp32"), 1, True, ""), (dict(graph=False), 1, False, ""),
            (dict(dtype="fp16"), 1, False, sentence), ({}, 2, False, sentence),
            (dict(device="cpu"), 1, False, "")):
        monkeypatch.setattr(train, "WORLD_SIZE", size)
        assert train.set_up_device(train.TrainConfig(**changes)).graph is expected
        assert capsys.readouterr().err == printed


@on_cuda
def test_graphs_and_resuming_change_no_bit_on_a_gpu(corpus, monkeypatch):
    """With --deterministic, 24 steps replayed as a graph equal 24 plain ones; so does a resumed run."""
    flags = "--device cuda --deterministic --log-every 1 --out "
    pretrain(flags + "plain --no-graph")
    pretrain(flags + "graph")

    with ctrl_c_at(monkeypatch, 9):
        with pytest.raises(UserError, match="stopped after step 10"):
            pretrain(flags + "resumed")
    pretrain(flags + "resumed")
    assert_same_run("graph", "resumed")
    assert read_log("plain/small", "train") == read_log("graph/small", "train")
    for name in ("discriminator/model.safetensors", "generator/model.safetensors"):
        assert Path("plain/small", name).read_bytes() == Path("graph/small", name).read_bytes()


@on_cuda
@pytest.mark.filterwarnings("ignore")  # inductor's own
def test_a_compiled_graph_follows_plain_steps(corpus):
    """Compiled and replayed, the default, a run follows the losses of plain steps, and of a CPU's."""
    flags = WITHOUT_DROPOUT + "--dtype fp32 --num-hidden-layers 1 "
    pretrain(flags + "--device cuda --no-graph --no-compile --out plain")
    pretrain(flags + "--device cuda --out compiled")
    pretrain(flags + "--device cpu --out cpu")
    plain, compiled, cpu = ([line["loss"] for line in read_log(f"{out}/small", "train")]
                            for out in ("plain", "compiled", "cpu"))
    assert compiled == pytest.approx(plain, rel=0.01) and cpu == pytest.approx(plain, rel=0.01)


@on_cuda
def test_a_run_moves_between_gpu_and_cpu(corpus, monkeypatch):
    """A run that began on a GPU resumes on a CPU, and the other way round."""
    with ctrl_c_at(monkeypatch, 5, 11):
        for device in "cuda", "cpu":
            with pytest.raises(UserError, match="stopped after step"):
                pretrain(f"--no-compile --device {device}")
    pretrain("--no-compile --device cuda")
    devices = [line["numerics"]["device"] for line in read_log() if "numerics" in line]
    assert devices == ["cuda:0", "cpu", "cuda:0"]
    assert read_log(split="heldout")[-1]["step"] == 24


@on_cuda
def test_dropout_differs_from_replay_to_replay():
    """The seed that is set before a replay reaches the graph: another seed, another mask."""
    torch.manual_seed(0)
    graphs = train.CudaGraphs(lambda hidden: F.dropout(hidden, 0.5))
    hidden, plain, replayed = torch.ones(1000, device="cuda"), [], []
    for seed in (*range(train.WARM_UP_CALLS), 5, 6, 5):
        torch.manual_seed(seed)
        replayed.append(graphs(hidden).clone())
        torch.manual_seed(seed)
        plain.append(F.dropout(hidden, 0.5))
    assert all(torch.equal(*pair) for pair in zip(plain, replayed, strict=True))
    assert not torch.equal(replayed[-1], replayed[-2])


@on_cuda
@pytest.mark.filterwarnings("ignore")  # inductor's own
def test_compiled_dropout_differs_from_replay_to_replay():
    """The same holds for what inductor compiles, which draws seeds of its own from torch's."""
    torch.manual_seed(0)
    graphs = train.CudaGraphs(torch.compile(lambda hidden: F.dropout(hidden, 0.5)))
    hidden, replayed = torch.ones(1000, device="cuda"), []
    for seed in (*range(train.WARM_UP_CALLS), 5, 6, 5):
        torch.manual_seed(seed)
        replayed.append(graphs(hidden).clone())
    assert torch.equal(replayed[-1], replayed[-3]) and not torch.equal(replayed[-1], replayed[-2])


@on_cuda
def test_a_function_that_cannot_be_captured_is_refused():
    """Where the host must wait there can be no graph, and the sentence names the flag."""
    program = ("import torch, train\n"  # a process of its own: torch's random numbers do not survive it
               "graphs = train.CudaGraphs(lambda hidden: hidden * hidden.sum().item())\n"
               "for _ in range(train.WARM_UP_CALLS + 1): graphs(torch.ones(3, device='cuda'))")
    process = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=HERE)
    assert "no CUDA graph can be made of a step (CUDA error: " in process.stderr
    assert process.stderr.strip().endswith("add --no-graph")


# ============================================================================================================
# finetune.py

# ------------------------------------------------------------------------------------------------------------
# Results


def test_a_separable_task_is_learned_to_100_percent(toy_glue, capsys):
    """Fine-tuning learns what can be learned, and the table says so."""
    tune("--task sst2 rte --num-train-epochs 40 --learning-rate 1e-3")
    metrics = {name: entry["metrics"] for (name, _), entry in read_results().items()}
    assert metrics == {"sst2": {"accuracy": 1.0}, "rte": {"accuracy": 1.0}}
    assert re.search(r"SST-2 +accuracy\* +1 +100.00 +- +100.00 +100.00", capsys.readouterr().out)


def test_a_seed_gives_the_same_result_alone_or_among_others(toy_glue):
    """The result of a (task, seed) does not depend on what else a sweep does."""
    tune("--keep-predictions --seeds 2 --task all")
    tune("--seeds 2 --task stsb --out alone")
    tune("--seeds 2 --task stsb --out alone --keep-predictions")  # again, since predictions are missing
    together, alone = read_results(), read_results("alone")
    assert len(together) == 18 and set(alone) == {("stsb", 0), ("stsb", 1)}
    assert alone["stsb", 0]["metrics"] != alone["stsb", 1]["metrics"]
    assert alone.items() <= together.items()
    paths = list(Path("alone/predictions").iterdir())
    assert len(paths) == 2
    for path in paths:
        assert path.read_bytes() == Path("out/glue/predictions", path.name).read_bytes()


def test_padding_to_the_longest_row_changes_no_logit():
    """A row's logits do not depend on the rows beside it; predictions are without dropout, in order."""
    config = finetune.FinetuneConfig(device="cpu", dtype="fp32")
    texts, rows = [[2] * 40, [2, 5, 6, 3], [2, *range(5, 12), 3, 7, 3]], np.zeros((3, 50), np.uint16)
    for row, ids in zip(rows, texts, strict=True):
        row[: len(ids)] = ids
    network = finetune.Classifier(CONFIG, ()).eval()
    alone = torch.cat([network(torch.tensor([ids])) for ids in texts])[:, 0].detach().numpy()
    predictions = finetune.predict_rows(network.train(), rows, glue.TASKS["stsb"], config)  # sorts by length
    assert np.abs(predictions - alone).max() < 1e-5


def test_fine_tuning_has_a_dropout_of_its_own(toy_glue, capsys):
    """The encoder's dropout is 0.1 whatever pre-training used; an input longer than that is reported."""
    save_discriminator("out/small/discriminator", replace(FINETUNED, hidden_dropout_prob=0.0))
    config = finetune.FinetuneConfig(max_length=64)
    assert config.dropout == 0.1
    for dropout in (0.1, 0.3):
        loaded = finetune.load_pretrained(replace(config, dropout=dropout)).config
        assert loaded.hidden_dropout_prob == loaded.attention_probs_dropout_prob == dropout
    write_files("out/small/discriminator", WordPiece(SMALL_VOCAB).files(24))
    finetune.load_pretrained(replace(config, max_length=24))
    assert "warning" not in capsys.readouterr().out
    finetune.load_pretrained(replace(config, max_length=32))
    assert "pre-trained on rows of 24 tokens" in capsys.readouterr().out


def test_other_settings_are_other_results(toy_glue):
    """What decides a result is part of its identity, and what does not decide it is not."""
    deciding = [{}, dict(learning_rate=1e-3), dict(random_weights=True), dict(layerwise_lr_decay=1.0),
                dict(dropout=0.0), dict(weight_decay=0.1), dict(warmup_proportion=0.5), dict(adam_beta1=0.8),
                dict(max_length=16), dict(dtype="bf16"), dict(batch_size=4), dict(num_train_epochs=4)]
    shutil.copytree("glue", "g")
    others = [dict(seeds=3), dict(keep_predictions=True), dict(glue_dir="g"), dict(out="o"),
              dict(task=["all"])]
    names = []
    for changes in deciding + others:
        config = replace(finetune.FinetuneConfig(glue_dir="glue", max_length=32), **changes)
        pretrained = finetune.load_pretrained(config)
        experiment = finetune.Experiment(glue.TASKS["wnli"], config, pretrained)
        names.append(experiment.run_name(0))
    assert len(set(names[: len(deciding)])) == len(deciding) and set(names[len(deciding) :]) == {names[0]}
    path = Path("glue/WNLI/dev.tsv")
    path.write_bytes(path.read_bytes().replace(b"ba", b"do"))
    experiment = finetune.Experiment(glue.TASKS["wnli"], config, pretrained)
    assert experiment.run_name(0) not in names


def test_processes_share_a_sweep_by_skipping_what_another_has_in_hand(toy_glue, capsys):
    """A (task, seed) that another process is working on is skipped and named."""
    tune("--task wnli --out done")
    [lock] = Path("done/locks").glob("wnli-0-*")
    with data.try_lock(Path("out/glue/locks") / lock.name):
        tune("--task wnli --seeds 2")
    assert set(read_results()) == {("wnli", 1)}
    assert "another process is working on it: WNLI seed 0" in capsys.readouterr().out
    tune("--task wnli --seeds 2")
    assert set(read_results()) == {("wnli", 0), ("wnli", 1)}


def test_a_seed_that_diverges_is_kept_and_marked(toy_glue, monkeypatch, capsys):
    """Predictions that are not finite, or all the same, count, and the table says so."""
    watch(monkeypatch, torch.optim.AdamW, "step",
          lambda optimizer: optimizer.param_groups[0]["params"][0].data.fill_(math.nan))
    tune("--task cola stsb")
    printed = capsys.readouterr().out
    assert "CoLA: the predictions are not finite; try a lower --learning-rate" in printed
    assert "STS-B: seed 0 gave every example the same answer" in printed
    assert {entry["is_constant"] for entry in read_results().values()} == {True}


def test_folders_of_transformers_and_generators_are_taken(toy_glue, capsys, tmp_path):
    """A tokenizer.json gives vocabulary, case and accents; that a model is a generator is said."""
    transformers = pytest.importorskip("transformers")
    for lower, accents in (True, None), (False, None), (True, False):
        folder, rules = tmp_path / f"{lower}{accents}", dict(do_lower_case=lower, strip_accents=accents)
        transformers.ElectraTokenizer("vocab.txt", **rules).save_pretrained(folder)
        assert not (folder / "vocab.txt").exists()
        wordpiece, _ = data.read_tokenizer(folder)
        assert wordpiece.tokens == SMALL_VOCAB
        assert (wordpiece.do_lower_case, wordpiece.strip_accents) == (lower, lower and accents is None)
    shutil.copytree("out/small/discriminator", "theirs")
    Path("theirs/vocab.txt").unlink()
    shutil.copy(tmp_path / "TrueNone/tokenizer.json", "theirs")
    tune("--task wnli --model theirs")
    tune("--task wnli")
    assert len(read_results()) == 1 and "generator" not in capsys.readouterr().out
    encoder = transformers.AutoModel.from_pretrained("out/small/discriminator")
    encoder.save_pretrained("encoder")  # its names lack "electra."
    shutil.copy("vocab.txt", "encoder")
    tune("--task wnli --model encoder")
    assert len(read_results()) == 1  # the same weights
    torch.manual_seed(0)
    write_files("theirs", model.pretrained_files(model.Generator(FINETUNED)))
    tune("--task wnli --model theirs")
    assert "theirs is a generator or a masked language model; its encoder is" in capsys.readouterr().out


# ------------------------------------------------------------------------------------------------------------
# The table and the submission


def test_the_table_is_what_papers_print():
    """Mean, deviation, median and best of the seeds; of all tasks also the averages of ELECTRA and GLUE."""

    def entry(seed, metrics):
        return dict(metrics=metrics, is_constant=False, seed=seed)

    mrpc = {seed: entry(seed, dict(accuracy=accuracy, f1=0.9))
            for seed, accuracy in enumerate([0.8, 0.9, 0.82])}
    results = dict(mrpc=mrpc, wnli={0: entry(0, dict(accuracy=0.5))}, cola={})
    text = finetune.format_table(results, glue.find_tasks(["mrpc", "wnli", "cola"]))
    assert re.search(r"^MRPC +accuracy\* +3 +84.00 +5.29 +82.00 +90.00$", text, re.M)
    assert re.search(r"^MRPC +f1 +3 +90.00 +0.00 +90.00 +90.00$", text, re.M)
    assert re.search(r"^WNLI +accuracy +1 +50.00 +- +50.00 +50.00$", text, re.M)
    assert "no WNLI): needs CoLA, SST-2, STS-B, QQP, MNLI, QNLI, RTE" in text
    assert "WNLI's dev set is adversarial" in text
    assert "average" not in finetune.format_table(results, glue.find_tasks(["mrpc"]))


def test_the_averages_are_the_papers():
    """ELECTRA's average is of eight main metrics; GLUE's is of nine tasks, each the mean of its metrics."""
    published = dict(cola=[56.8], sst2=[88.3], mrpc=[87.4, 90.4], stsb=[86.8, 87.0], qqp=[88.3, 85.3],
                     mnli=[78.9, 79.9], qnli=[87.9], rte=[68.5], wnli=[56.3])
    # Two seeds have the published scores, whose average is 80.36, and one has 0.3 more: the mean 0.1 more.
    results = collections.defaultdict(dict)
    for (name, scores), (seed, more) in itertools.product(published.items(), enumerate([0, 0, 0.3])):
        metrics = [*glue.TASKS[name].metrics, "mismatched accuracy"]
        values = {metric: (score + more) / 100 for metric, score in zip(metrics, scores, strict=False)}
        results[name][seed] = dict(metrics=values, is_constant=False, seed=seed)
    text = finetune.format_table(results, glue.TASKS)
    assert "no WNLI): 80.46 from means, 80.36 from medians" in text
    mean = np.mean([np.mean(scores) for scores in published.values()])
    assert f"averaged first): {mean + 0.1:.2f} from means, {mean:.2f} from medians" in text


def test_submission_is_eleven_files_of_the_best_seeds(toy_glue, monkeypatch, capsys):
    """The zip has eleven files, each from its task's best seed; it is reproducible."""
    scores = itertools.cycle([0.1, 0.2, 0.2, 0.1])  # of two seeds, task after task
    watched = glue.Task.score
    monkeypatch.setattr(glue.Task, "score",
                        lambda task, *args: watched(task, *args) | {task.metrics[0]: next(scores)})
    tune("--seeds 2 --submit --learning-rate 2e-3")
    said, results, path = capsys.readouterr().out, read_results(), Path("out/glue/submission.zip")
    content = path.read_bytes()
    with zipfile.ZipFile(path) as archive:
        files = {name: archive.read(name).decode() for name in archive.namelist()}
    names = "CoLA SST-2 MRPC STS-B QQP MNLI-m QNLI RTE WNLI".split()
    assert {name: text.count("\n") - 1 for name, text in files.items()} == {
        **{f"{name}.tsv": 12 for name in names}, "MNLI-mm.tsv": 13, "AX.tsv": 14}
    best = {}
    for name, task in glue.TASKS.items():
        best[name] = int(np.argmax([results[name, seed]["metrics"][task.metrics[0]] for seed in (0, 1)]))
        assert f"{task.title} {best[name]}" in said
        [kept] = Path("out/glue/predictions").glob(f"{name}-{best[name]}-*.npz")
        for split, predictions in np.load(kept).items():
            assert files[task.submission_name(split)] == glue.submission_text(task, predictions)
    assert set(best.values()) == {0, 1}
    path.unlink()
    tune("--seeds 2 --submit --learning-rate 2e-3")
    assert path.read_bytes() == content


def test_part_of_glue_is_submitted_as_files(toy_glue, capsys):
    """--submit for some tasks writes just their files."""
    tune("--task mnli --submit")
    files = {path.name for path in Path("out/glue/submission").iterdir()}
    assert files == {"MNLI-m.tsv", "MNLI-mm.tsv", "AX.tsv"}
    assert not Path("out/glue/submission.zip").exists() and "needs --task all" in capsys.readouterr().out


# ------------------------------------------------------------------------------------------------------------
# Networks that are kept


def test_a_network_is_kept_and_predicts(toy_glue, capsys, monkeypatch):
    """The seed with the best dev score is kept, loads in transformers, and predicts any file in its order."""
    write_task("own", "csv")
    flags = "--task own --seeds 3 --num-train-epochs 12 --learning-rate 1e-3 "
    tune(flags + "--submit")
    scores = [read_results()["own-own", seed]["metrics"]["accuracy"] for seed in range(3)]
    assert set(read_results()["own-own", 0]["metrics"]) == {"accuracy", "macro f1", "matthews"}
    best, ran = int(np.argmax(scores)), []
    watch(monkeypatch, finetune.Finetuner, "run", lambda finetuner, seed: ran.append(seed))
    tune(flags + "--save")  # only the best is run again, since it was not kept
    tune(flags + "--save")
    assert ran == [best] and scores[best] > 0.8
    folder = find_network("own-own")
    assert f"{folder} holds the network of seed {best}, own-own's best on dev" in capsys.readouterr().out
    tune(flags + "--save --out other")
    kept = [model.read_weights(find_network("own-own", out))["classifier.weight"]
            for out in ("out/glue", "other")]
    assert torch.equal(*kept) and ran == [best, 0, 1, 2]

    lines = Path("own/test.csv").read_text().splitlines()
    monkeypatch.setattr(finetune, "CHUNK", 10)
    capsys.readouterr()
    finetune.main(f"--predict-file own/test.csv --model {folder} --device cpu".split())
    header, *printed = capsys.readouterr().out.splitlines()
    assert header.split("\t") == ["prediction", "bad", "fair", "good"] and len(printed) == len(lines) - 1
    submitted = Path("out/glue/submission/own-own.tsv").read_text().splitlines()[1:]
    assert [line.split("\t")[0] for line in printed] == [line.split("\t")[1] for line in submitted]
    config = json.loads(Path(folder, "config.json").read_text())
    config["id2label"] = dict(reversed(config["id2label"].items()))  # the keys count, not their order
    Path(folder, "config.json").write_text(json.dumps(config))
    predictor = finetune.Predictor(folder)
    for line, (label, probabilities) in zip(
            printed, predictor.predict(lines[1:]), strict=True):
        assert line.split("\t") == [label, *(f"{value:.4f}" for value in probabilities.values())]
        assert sum(probabilities.values()) == pytest.approx(1)
    capsys.readouterr()
    predictor.predict([("ba zzz",)])
    assert capsys.readouterr().err.startswith("warning: 50% of the tokens are [UNK]")
    for texts in "ba do", {"ba": "do"}:
        with pytest.raises(UserError, match="predict takes a list, even for one text"):
            predictor.predict(texts)
    for text in ("ba", "do"), ("ba", "do", "good"), b"ba", 1, [1], ():
        with pytest.raises(UserError, match=f"takes texts, not {re.escape(repr(text))}$"):
            predictor.predict(["ba", text])
    Path("empty.tsv").write_text("A fine film.\n")
    with pytest.raises(UserError, match="empty.tsv has no rows; the first line of a table names its columns"):
        finetune.main(f"--predict-file empty.tsv --model {folder} --device cpu".split())
    assert capsys.readouterr().out == ""
    stdin = "".join(json.dumps(dict(sentence=line)) + "\n" for line in lines[1:]).encode()
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=io.BytesIO(stdin)))
    finetune.main(f"--predict-file - --format jsonl --model {folder} --device cpu".split())
    assert capsys.readouterr().out.splitlines()[1:] == printed

    transformers = pytest.importorskip("transformers")
    encoder = transformers.AutoModel.from_pretrained(folder).eval()
    assert encoder.config.id2label == {0: "bad", 1: "fair", 2: "good"}
    ids = torch.tensor([[2, 7, 8, 3]])
    with torch.no_grad():
        ours = predictor.network.eval().encoder(ids, *model.attention_mask_and_token_types(ids, 3))
        assert torch.allclose(encoder(ids).last_hidden_state, ours, atol=1e-5)


@pytest.fixture
def predictor(monkeypatch):
    """A network that takes every sentence for of one class, whose name is not ASCII."""
    monkeypatch.setattr(finetune, "Predictor", lambda *_: SimpleNamespace(
        labels=["é"], is_regression=False, num_sentences=1,
        predict=lambda texts: [("é", {"é": 1.0})] * len(texts)))


@pytest.mark.parametrize("name, content, count", [
    ("a.tsv", "sentence\nba\n\ndo\n\n", 4),
    ("a.tsv", "id\tsentence\n1\tba", 1),
    ("a.csv", 'sentence\n"ba, ""do"""\n\n"ba\ndo"\n', 3),
    ("a.csv", f"sentence,x\n{'ba ' * 50_000},\nba,\n", 2),
    ("- --format csv", 'sentence\n"ba, do"\n"ba\ndo"\n', 2),
    ("a.txt --format jsonl", '{"sentence": 1.5}\n{"sentence": ""}', 2),
    ("a.tsv", "sentence1\tsentence2\nba\tdo\n", "line 2 has sentence1 and sentence2; it should have s"),
    ("a.tsv", "id\tsentence\n1\tba\n\n", "a.tsv, line 3 is empty; delete it"),
    ("a.csv", "id,sentence\n1,ba\n\n", "a.csv, line 3 is empty; delete it"),
    ("a.jsonl", '{"sentence": "ba"}\n\n', "a.jsonl, line 2 is empty; delete it"),
    ("a.tsv", 'sentence\n"ba\ndo"\n', "a.tsv, line 2 opens a quote and does not close it; cells of several"),
    ("a.tsv", 'sentence \n"ba" do\nba"\n', 2),
    ("a.csv", 'id,sentence\n1,ba\n2,"ba\n3,ba\n', "a.csv, line 3 is not CSV: a quote opens here"),
    ("-", "sentence\nba, do\n", "standard input has no known format; --format takes tsv, csv or jsonl"),
])
def test_a_row_in_is_a_row_out(tmp_path, monkeypatch, capsys, predictor, name, content, count):
    """Every row has its prediction, or the table is refused under the number of the line."""
    monkeypatch.chdir(tmp_path)
    if content:
        monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=io.BytesIO(content.encode())))
        Path(name.split()[0]).write_text(content)
    if isinstance(count, str):
        with pytest.raises(UserError, match=count):
            finetune.main(f"--predict-file {name}".split())
    else:
        finetune.main(f"--predict-file {name}".split())
        assert capsys.readouterr().out.splitlines() == ["prediction\té", *["é\t1.0000"] * count]


def test_predictions_in_a_file_are_utf8_in_any_locale(tmp_path, monkeypatch, predictor):
    """Only a terminal may get ? for a letter that it does not know."""
    Path(tmp_path, "a.tsv").write_text("sentence\nba\n")
    output = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(output, "ascii", errors="replace"))
    assert train.run_command(lambda: finetune.main(["--predict-file", str(tmp_path / "a.tsv")])) == 0
    assert output.getvalue().decode() == "prediction\té\né\t1.0000\n"


def test_what_fine_tuning_reads_is_shown_before_the_work(toy_glue, capsys):
    """For each split: rows, labels, the longest row and those that are cut, the share of [UNK]."""
    files = dict(train="good\tba do ku\n bad\tba zzz\ngood\tba ba ba ba ba ba ba ba\n", dev="good\tba\n",
                 test="x\tba\ny\t\n")
    write_files("own", {f"{split}.tsv": f"label\tsentence\n{rows}".encode() for split, rows in files.items()})
    tune("--task own --max-length 8 --keep-predictions")
    printed = capsys.readouterr().out
    assert ("own-own, train: 3 rows; good: 2, bad: 1; the longest has 10 tokens, 33.3% are cut; 9.1% [UNK]\n"
            "warning: 9% of the tokens are [UNK]. Usual causes: a vocabulary of another language") in printed
    assert "own-own, dev: 1 rows; good: 1; the longest has 3 tokens, 0.0% are cut; 0.0% [UNK]\n" in printed
    assert "own-own, test: 2 rows; no labels; empty sentences: 1; the longest has" in printed
    assert printed.count("warning") == 1
    tune("--task stsb cola --num-train-epochs 1")
    assert "STS-B, train: 48 rows; labels from 0 to 5; the longest has" in capsys.readouterr().out


def test_own_numbers_are_scaled_by_their_range_and_back(toy_glue, capsys):
    """--regression learns numbers of any range and predicts in that range."""
    write_task("own", "jsonl", label=lambda number: 100.0 * number - 50)
    tune("--task own --regression --num-train-epochs 20 --learning-rate 1e-3 --submit --save")
    assert read_results()["own-own", 0]["metrics"]["spearman"] > 0.8
    finetune.main(f"--predict-file own/test.jsonl --model {find_network('own-own')} --device cpu".split())
    predicted = [float(line) for line in capsys.readouterr().out.split("prediction\n")[1].splitlines()]
    lines = Path("out/glue/submission/own-own.tsv").read_text().splitlines()
    submitted = [line.split("\t")[1] for line in lines]
    assert np.clip(predicted, -50, 150) == pytest.approx([float(text) for text in submitted[1:]], abs=1e-3)
    assert min(predicted) < 0 < 100 < max(predicted)


# ------------------------------------------------------------------------------------------------------------
# The CUDA path


def test_no_step_of_fine_tuning_waits_for_the_device(toy_glue, monkeypatch):
    """Nothing in a step has a size or a branch that depends on them."""
    steps = ExitStack()
    watch(monkeypatch, train, "learning_rate", lambda step, *_: step or steps.enter_context(NoSync()))
    watch(monkeypatch, finetune, "predict_rows", lambda *_: steps.close())
    config = finetune.FinetuneConfig(glue_dir="glue", max_length=32, num_train_epochs=1, device="cpu",
                                     dtype="fp32", graph=False, learning_rate=1e-3, layerwise_lr_decay=0.8)
    experiment = finetune.Experiment(glue.TASKS["mrpc"], config, finetune.load_pretrained(config))
    with steps:
        finetune.Finetuner(experiment, experiment.tokenize_splits()).run(0)


def test_replayed_fine_tuning_is_plain_fine_tuning(toy_glue, monkeypatch, request):
    """A shape of a batch is captured once for all seeds; scores and networks are those of plain steps."""
    flags = "--task mrpc --seeds 3 --save --keep-predictions "
    tune(flags + "--out plain")
    request.getfixturevalue("recorded")
    shapes = []
    watch(monkeypatch, Recorded, "__call__", lambda graphs, ids, labels: shapes.append(ids.shape))
    tune(flags + "--out replayed")
    counts = collections.Counter(shapes).values()
    assert Recorded.captures == sum(count > train.WARM_UP_CALLS for count in counts) > 0
    assert Recorded.replays == sum(max(0, count - train.WARM_UP_CALLS) for count in counts)
    plain, replayed = (read_results(out) for out in ("plain", "replayed"))
    assert plain == replayed
    plain, replayed = (model.read_weights(find_network("mrpc", out)) for out in ("plain", "replayed"))
    assert all(torch.equal(plain[name], replayed[name]) for name in plain)


def test_what_a_graph_reads_stays_where_it_is(toy_glue):
    """Weights, moments, step counts and rates are the same tensors, at the same addresses, for all seeds."""
    config = finetune.FinetuneConfig(glue_dir="glue", max_length=32, num_train_epochs=1, device="cpu",
                                     dtype="fp32", graph=False, learning_rate=1e-3, layerwise_lr_decay=0.8)
    experiment = finetune.Experiment(glue.TASKS["mrpc"], config, finetune.load_pretrained(config))
    finetuner = finetune.Finetuner(experiment, experiment.tokenize_splits())
    runs = []
    for seed in 0, 1:
        finetuner.run(seed)
        rates = [group["lr"] for group in finetuner.optimizer.param_groups]
        state = [tensor for state in finetuner.optimizer.state.values() for tensor in state.values()]
        tensors = [*finetuner.network.parameters(), *state, *rates]
        runs.append([(tensor, tensor.data_ptr()) for tensor in tensors])
        assert min(rates) > 0
    for (one, before), (other, after) in zip(*runs, strict=True):
        assert one is other and before == after


@on_cuda
def test_fine_tuning_replays_the_plain_steps(toy_glue):
    """With --deterministic, scores and the kept network are, with graphs, to the bit those without."""
    flags = "--task mrpc --device cuda --deterministic --seeds 3 --save --keep-predictions --out "
    tune(flags + "plain --no-graph")
    tune(flags + "graph")
    plain, graph = (read_results(out) for out in ("plain", "graph"))
    assert {key: plain[key]["metrics"] for key in plain} == {key: graph[key]["metrics"] for key in graph}
    plain, graph = (model.read_weights(find_network("mrpc", out)) for out in ("plain", "graph"))
    assert all(torch.equal(plain[name], graph[name]) for name in plain)


# ============================================================================================================
# glue.py

# ------------------------------------------------------------------------------------------------------------
# Files

# A few rows of each file as the official ones are written, and the examples in them.
GLUE_FILES = {
    # No header; quotes are characters. No "\n" at the end.
    ("cola", "train"): ('gj04\t1\t\tHe said "no.\ngj04\t0\t*\t"Said he" no.',
                        [('He said "no.', "", 1), ('"Said he" no.', "", 0)]),
    ("cola", "test"): ("index\tsentence\n0\tWho?\n", [("Who?", "", None)]),
    # What str.splitlines takes for the end of a line, and a space at the end.
    ("sst2", "train"): ("sentence\tlabel\nso\u2028good \t1\nbad\x85 film\t0\n",
                        [("so\u2028good ", "", 1), ("bad\x85 film", "", 0)]),
    ("sst2", "test"): ("index\tsentence\n0\tfine .\n", [("fine .", "", None)]),
    ("mrpc", "train"): (MRPC + '1\t10\t11\tHe " won .\tHe did .\n', [('He " won .', "He did .", 1)]),
    ("mrpc", "test"): (MRPC + "0\t10\t11\tOne .\tTwo .\n", [("One .", "Two .", None)]),
    ("stsb", "train"): (f"{STSB}\tscore\n{STSB_ROW}A plane.\tA jet.\t3.8\n", [("A plane.", "A jet.", 0.76)]),
    ("stsb", "test"): (f"{STSB}\n{STSB_ROW}A\tB\n", [("A", "B", None)]),
    # Rows that lack fields, and an empty question.
    ("qqp", "train"): ("id\tqid1\tqid2\tquestion1\tquestion2\tis_duplicate\n"
                       "1\t2\t3\tWhy?\tWhy so?\t1\n4\t5\t6\tbroken\n7\t8\t9\tHow?\t\t0\n",
                       [("Why?", "Why so?", 1), ("How?", "", 0)]),
    ("qqp", "test"): ("id\tquestion1\tquestion2\n0\tWhy?\tHow?\n", [("Why?", "How?", None)]),
    # The label is in the last column, wherever that is.
    ("mnli", "train"): (f"{NLI}\tlabel1\tgold_label\n{NLI_ROW}It is.\tIt may.\tneutral\tneutral\n",
                        [("It is.", "It may.", 1)]),
    ("mnli", "dev_mismatched"): (f"{NLI}\tlabel1\tlabel2\tgold_label\n{NLI_ROW}A\tB\tneutral\tentailment\t"
                                 "contradiction\n", [("A", "B", 2)]),
    ("mnli", "test_matched"): (f"{NLI}\n{NLI_ROW}A\tB\n", [("A", "B", None)]),
    ("qnli", "dev"): ("index\tquestion\tsentence\tlabel\n0\tA?\tHe.\tnot_entailment\n", [("A?", "He.", 1)]),
    ("qnli", "test"): ("index\tquestion\tsentence\n0\tWho?\tHe.\n", [("Who?", "He.", None)]),
    ("rte", "train"): ("index\tsentence1\tsentence2\tlabel\n0\tA\tB\tentailment\n", [("A", "B", 0)]),
    ("rte", "test"): ("index\tsentence1\tsentence2\n0\tA\tB\n", [("A", "B", None)]),
    ("wnli", "dev"): ("index\tsentence1\tsentence2\tlabel\n0\tA\tB\t1\n", [("A", "B", 1)]),
    ("wnli", "test"): ("index\tsentence1\tsentence2\n0\tA\tB\n", [("A", "B", None)]),
    ("mnli", "diagnostic"): ("index\tsentence1\tsentence2\n0\tA.\tB.\n", [("A.", "B.", None)]),
}


@pytest.mark.parametrize("name, split", GLUE_FILES)
def test_glue_files_are_read_as_they_are_written(name, split, corpus, monkeypatch, capsys):
    """Every file's own columns, header, label and oddities."""
    task, (content, expected) = glue.TASKS[name], GLUE_FILES[name, split]
    write_split(name, split, content.encode())
    monkeypatch.setitem(task.num_rows, split, len(expected))
    examples, sha256 = task.read(split, "cache", "glue")
    assert sha256 == hashlib.sha256(content.encode()).hexdigest()
    for example, (first, second, label) in zip(examples, expected, strict=True):
        assert example == (first, second, label if label is None else pytest.approx(label))
    skipped = "skipped 1 rows that have not 6 fields; the first is line 3\n"
    assert (skipped in capsys.readouterr().out) == (name == "qqp" and split == "train")


def test_mrpcs_dev_set_is_cut_out_by_its_ids(corpus, monkeypatch):
    """Pairs of ids that are listed are MRPC's dev set, the other rows its training set."""
    task = keep_mrpc(monkeypatch)
    for split, numbers in dict(train=[0, 2, 3, 5], dev=[1, 4]).items():
        examples, _ = task.read(split, "cache")
        assert examples == [(f"A{n}", f"B{n}", n % 2) for n in numbers]
    assert task.read("test", "cache")[0] == [("X", "Y", None)]


def test_own_tasks_are_read_from_every_kind_of_file(tmp_path, monkeypatch):
    """The same rows as .tsv, .csv and .jsonl make the same task, which is never taken for one of GLUE."""
    monkeypatch.chdir(tmp_path)
    files = {
        "tsv": '\ufeffid\tsentence1\tsentence2\tlabel\r\n1\tHe said "no.\t\t10\r\n'
               "2\té,\tb\t 9 \r\n",
        "csv": 'label,sentence1,sentence2\n10,"He said ""no.",\n9,"é,",b\n',
        "jsonl": '{"sentence1": "He said \\"no.", "sentence2": "", "label": 10}\n'
                 '{"sentence2": "b", "label": "9", "sentence1": "\\u00e9,"}\n',
    }
    for kind, content in files.items():
        write_files(kind, {f"{split}.{kind}": content.encode() for split in ("train", "dev")})
        [(name, task)] = glue.find_tasks([f"./{kind}"]).items()
        assert name == f"own-{kind}" and task.labels == ("9", "10") and task.test_splits == []
        assert task.read("dev")[0] == [('He said "no.', "", 1), ("é,", "b", 0)]
        [task] = glue.find_tasks([kind], is_regression=True).values()
        assert task.read("train")[0] == [('He said "no.', "", 1.0), ("é,", "b", 0.0)]
    for texts, labels in [(["1.0", "0.0"], ("0.0", "1.0")), (["2.10", "2.1", "10"], ("2.1", "2.10", "10")),
                          (["b", "10", "a", "-1", "9"], ("-1", "a", "b", "9", "10"))]:
        rows = "".join(f"ba\t{text} \n" for text in texts)
        (tmp_path / "tsv" / "train.tsv").write_text(f"sentence\tlabel\n{rows}")
        assert glue.find_tasks(["tsv"])["own-tsv"].labels == labels
    (tmp_path / "jsonl" / "train.jsonl").write_text(
        '{"sentence": "ba", "label": true}\n{"sentence": "ba", "label": false}\n')
    assert glue.find_tasks(["jsonl"])["own-jsonl"].labels == ("false", "true")
    (tmp_path / "csv" / "train.csv").write_text('sentence,label\n"two\nlines",x\nb,y\n')
    [task] = glue.find_tasks(["csv"]).values()
    assert task.read("train")[0][0] == ("two\nlines", "", 0)
    write_task("mrpc")
    assert glue.find_tasks(["mrpc"]) == {"mrpc": glue.TASKS["mrpc"]}
    both = glue.find_tasks(["mrpc", "./mrpc"])
    assert both["mrpc"] == glue.TASKS["mrpc"] and both["own-mrpc"].files
    assert glue.find_tasks(["all", "./mrpc"]).keys() == {*glue.TASKS, "own-mrpc"}


# ------------------------------------------------------------------------------------------------------------
# Metrics and labels


@pytest.mark.filterwarnings("ignore")  # scikit-learn's own, where a metric is 0 / 0
def test_metrics_agree_with_scikit_learn_and_scipy():
    """Of classes also for constant predictions, where they are 0; of numbers also with ties."""
    random_, references = np.random.default_rng(0), dict(
        accuracy=sklearn.metrics.accuracy_score, matthews=sklearn.metrics.matthews_corrcoef,
        f1=partial(sklearn.metrics.f1_score, zero_division=0))
    pairs = [random_.integers(0, 2, (2, size)) for size in (2, 3, 10, 500) * 5]
    pairs += [np.array(pair) for pair in itertools.product(([0] * 5, [1] * 5, [0, 1, 0, 1, 1]), repeat=2)]
    for (predictions, labels), name in itertools.product(pairs, references):
        expected = references[name](labels, predictions)
        assert glue.METRICS[name](predictions, labels) == pytest.approx(expected, abs=1e-12)
    references["macro f1"] = partial(sklearn.metrics.f1_score, zero_division=0, average="macro")
    for size, name in itertools.product((1, 2, 4, 20, 500), ("macro f1", "matthews")):
        predictions, labels = random_.integers(0, 5, (2, size))
        expected = references[name](labels, predictions)
        assert glue.METRICS[name](predictions, labels) == pytest.approx(expected, abs=1e-12)
    for size, places in (10, 9), (10, 1), (1000, 9), (1000, 1), (1000, 0):
        one = random_.normal(size=size).astype(np.float32).round(places)
        other = random_.random(size).round(places)
        labels = other > other.min()
        assert glue.pearson(one, other) == pytest.approx(stats.pearsonr(one, other)[0], abs=1e-6)
        assert glue.spearman(one, other) == pytest.approx(stats.spearmanr(one, other)[0], abs=1e-12)
        expected = sklearn.metrics.roc_auc_score(labels, one)
        assert train.area_under_curve(one, labels) == pytest.approx(expected)
    constant = np.full(7, 0.1, np.float32)
    assert glue.pearson(constant, np.arange(7)) == glue.spearman(np.arange(7), constant) == 0.0
    assert train.area_under_curve(np.arange(7), constant > 0.5) == 0.5


def test_mnli_is_scored_on_its_matched_and_on_its_mismatched_set():
    """The mismatched set has a metric of its own."""
    labels = dict(dev_matched=np.array([0, 2, 1, 1]), dev_mismatched=np.array([0, 0, 1, 0]))
    predictions = dict.fromkeys(labels, labels["dev_matched"])
    expected = {"accuracy": 1.0, "mismatched accuracy": 0.5}
    assert glue.TASKS["mnli"].score(predictions, labels) == expected


def test_labels_are_submitted_as_words_or_as_numbers():
    """MNLI, QNLI and RTE are submitted in words, the other tasks in numbers."""
    written = {name: glue.submission_text(task, np.array([1, 0])).split()[3::2]
               for name, task in glue.TASKS.items() if task.labels}
    numbers, entailed = ["1", "0"], ["not_entailment", "entailment"]
    assert written == dict.fromkeys(("cola", "sst2", "mrpc", "qqp", "wnli"), numbers) | dict(
        mnli=["neutral", "entailment"], qnli=entailed, rte=entailed)
