"""GLUE: nine tasks and a diagnostic set. Where they come from, how they are read, scored and submitted.

An example is (first sentence, second sentence or "", label). Read the table of tasks, then `read_examples`.
Every file must have the official number of rows, every download its published SHA-256.
"""

import functools
import hashlib
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from data import UserError, atomic_write, decode, download, make_once
from train import ranks

GLUE = "https://dl.fbaipublicfiles.com/glue/data/"
MSR = "https://dl.fbaipublicfiles.com/senteval/senteval_data/"


class Example(NamedTuple):
    first: str
    second: str  # "" for a task of single sentences
    label: float | None  # number of a class; for STS-B the score / 5; None in a test set


@dataclass(frozen=True)
class Task:
    """A task. Columns are counted from 0."""

    title: str  # also the name of the folder in the zip
    source: tuple  # address, size in bytes and SHA-256 of the download
    rows: dict  # official number of rows of each split; the split is also the name of the file
    sentences: tuple  # columns of the one or two sentences in train and dev
    test_sentences: tuple  # the same in test
    metrics: tuple  # the first is the one that ELECTRA reports
    submissions: dict  # test split -> name of the file to submit
    label: int = None  # column of the label in train and dev; -1 is the last
    labels: tuple = ("0", "1")  # names of the classes; none for STS-B, whose label is a number from 0 to 5
    in_words: bool = False  # submitted by name, not by number
    num_train_epochs: int = 3  # [D32]
    both_orders: bool = False  # [D30] trained on both orders of the sentences
    header: bool = True  # of train and dev; test always has one
    skips_short_rows: bool = False  # QQP has some rows that lack fields
    raw_rows: int = None  # training rows of the original QQP.zip, which is accepted as well

    @property
    def dev_splits(self):
        return [split for split in self.rows if split.startswith("dev")]


ENTAILED = ("entailment", "not_entailment")
NLI = ("entailment", "neutral", "contradiction")
TASKS = {
    "cola": Task(
        title="CoLA",
        source=(GLUE + "CoLA.zip", 376_971,
                "f212fcd832b8f7b435fb991f101abf89f96b933ab400603bf198960dfc32cbff"),
        rows=dict(train=8_551, dev=1_043, test=1_063),
        sentences=(3,), test_sentences=(1,), label=1,
        metrics=("matthews",), submissions={"test": "CoLA.tsv"},
        header=False,
    ),
    "sst2": Task(
        title="SST-2",
        source=(GLUE + "SST-2.zip", 7_439_277,
                "d67e16fb55739c1b32cdce9877596db1c127dc322d93c082281f64057c16deaa"),
        rows=dict(train=67_349, dev=872, test=1_821),
        sentences=(0,), test_sentences=(1,), label=1,
        metrics=("accuracy",), submissions={"test": "SST-2.tsv"},
    ),
    "mrpc": Task(
        title="MRPC",
        source=(MSR + "msr_paraphrase_train.txt", 1_047_044,
                "60a9b09084528f0673eedee2b69cb941920f0b8cd0eeccefc464a98768457f89"),
        rows=dict(train=3_668, dev=408, test=1_725),
        sentences=(3, 4), test_sentences=(3, 4), label=0,
        metrics=("accuracy", "f1"), submissions={"test": "MRPC.tsv"},
        both_orders=True,
    ),
    "stsb": Task(
        title="STS-B",
        source=(GLUE + "STS-B.zip", 802_872,
                "e60a6393de5a8b5b9bac5020a1554b54e3691f9d600b775bd131e613ac179c85"),
        rows=dict(train=5_749, dev=1_500, test=1_379),
        sentences=(7, 8), test_sentences=(7, 8), label=9, labels=(),
        metrics=("spearman", "pearson"), submissions={"test": "STS-B.tsv"},
        num_train_epochs=10, both_orders=True,
    ),
    "qqp": Task(
        title="QQP",
        source=(GLUE + "QQP-clean.zip", 41_696_084,
                "40e7c862c04eb26ee04b67fd900e76c45c6ba8e6d8fab4f8f1f8072a1a3fbae0"),
        rows=dict(train=363_846, dev=40_430, test=390_965),
        sentences=(3, 4), test_sentences=(1, 2), label=5,
        metrics=("accuracy", "f1"), submissions={"test": "QQP.tsv"},
        skips_short_rows=True, raw_rows=363_849,
    ),
    "mnli": Task(
        title="MNLI",
        source=(GLUE + "MNLI.zip", 312_783_507,
                "e7c1d896d26ed6caf700110645df426cc2d8ebf02a5ab743d5a5c68ac1c83633"),
        rows=dict(train=392_702, dev_matched=9_815, dev_mismatched=9_832, test_matched=9_796,
                  test_mismatched=9_847),
        sentences=(8, 9), test_sentences=(8, 9), label=-1, labels=NLI,
        metrics=("accuracy",), submissions={"test_matched": "MNLI-m.tsv", "test_mismatched": "MNLI-mm.tsv"},
        in_words=True,
    ),
    "qnli": Task(
        title="QNLI",
        source=(GLUE + "QNLIv2.zip", 10_627_589,
                "e634e78627a29adaecd4f955359b22bf5e70f2cbd93b493f2d624138a0c0e5f5"),
        rows=dict(train=104_743, dev=5_463, test=5_463),
        sentences=(1, 2), test_sentences=(1, 2), label=3, labels=ENTAILED,
        metrics=("accuracy",), submissions={"test": "QNLI.tsv"}, in_words=True,
    ),
    "rte": Task(
        title="RTE",
        source=(GLUE + "RTE.zip", 697_150,
                "6bf86de103ecd335f3441bd43574d23fef87ecc695977a63b82d5efb206556ee"),
        rows=dict(train=2_490, dev=277, test=3_000),
        sentences=(1, 2), test_sentences=(1, 2), label=3, labels=ENTAILED,
        metrics=("accuracy",), submissions={"test": "RTE.tsv"}, in_words=True,
        num_train_epochs=10,
    ),
    "wnli": Task(
        title="WNLI",
        source=(GLUE + "WNLI.zip", 28_999,
                "ae0e8e4d16f4d46d4a0a566ec7ecceccfd3fbfaa4a7a4b4e02848c0f2561ac46"),
        rows=dict(train=635, dev=71, test=146),
        sentences=(1, 2), test_sentences=(1, 2), label=3,
        metrics=("accuracy",), submissions={"test": "WNLI.tsv"},
    ),
}
# The diagnostic set has no labels and no training set: the model of MNLI predicts it.
DIAGNOSTIC = Task(
    title="diagnostic",
    source=(GLUE + "AX.tsv", 222_257, "0e13510b1bb14436ff7e2ee82338f0efb0133ecf2e73507a697dc210db3f05fd"),
    rows=dict(diagnostic=1_104),
    sentences=(1, 2), test_sentences=(1, 2), labels=NLI,
    metrics=(), submissions={"diagnostic": "AX.tsv"}, in_words=True,
)
# MRPC cannot be distributed with GLUE: its dev set is cut out of the original's training set.
MRPC_TEST = (MSR + "msr_paraphrase_test.txt", 441_275,
             "a04e271090879aaba6423d65b94950c089298587d9c084bf9cd7439bd785f784")
MRPC_DEV_IDS = (GLUE + "mrpc_dev_ids.tsv", 6_222,
                "971d7767d81b997fd9060ade0ec23c4fc31cbb226a55d1bd4a1bac474eb81dc7")


def find_task(name):
    """The key of a task in TASKS. Case and hyphens do not matter."""
    key = name.lower().replace("-", "")
    if key not in TASKS:
        raise UserError(f"there is no task {name}; there are {', '.join(TASKS)} and all")
    return key


def submission_splits(name):
    """(Task, split) of all that the model of a task predicts: MNLI's predicts the diagnostic set, too."""
    tasks = [TASKS[name], DIAGNOSTIC] if name == "mnli" else [TASKS[name]]
    return [(task, split) for task in tasks for split in task.submissions]


# ------------------------------------------------------------------------------------------------------------
# Reading


def read_examples(task, split, cache, glue_dir=None):
    """The examples of a split, in file order, from `glue_dir` or else downloaded to `cache`.

    Only "\\n" ends a line and only "\\t" a field. Quotes are characters like any other.
    """
    raw, source = read_file(task, split, glue_dir) if glue_dir else read_download(task, split, cache)
    is_test = split in task.submissions
    columns = task.test_sentences if is_test else task.sentences
    lines = decode(raw, source).removesuffix("\n").split("\n")
    width = lines[0].count("\t") + 1
    first_line = 2 if task.header or is_test else 1
    examples, skipped = [], 0
    for number, line in enumerate(lines[first_line - 1 :], first_line):
        fields = line.split("\t")
        if len(fields) < width and task.skips_short_rows:
            skipped += 1
            continue
        if len(fields) != width or width <= max(*columns, 0 if is_test else task.label):
            raise UserError(f"{source}, line {number}, has {len(fields)} fields; it was damaged or edited")
        sentences = [fields[column] for column in columns]
        label = None if is_test else read_label(task, fields[task.label], f"{source}, line {number}")
        examples.append(Example(sentences[0], sentences[1] if len(sentences) == 2 else "", label))
    if len(examples) not in (task.rows[split], task.raw_rows):
        raise UserError(f"{source} has {len(examples):,} rows and not {task.rows[split]:,}: it was cut or "
                        "edited")
    if skipped:
        print(f"{source}: skipped {skipped} rows that lack fields")
    return examples


def read_label(task, text, where):
    """The number of the class or, for STS-B, the score on a scale from 0 to 1. [D31]"""
    if task.labels:
        if text not in task.labels:
            raise UserError(f"{where}: the label is {text!r} and not one of {', '.join(task.labels)}")
        return task.labels.index(text)
    try:
        return float(text) / 5
    except ValueError:
        raise UserError(f"{where}: the score is {text!r} and not a number") from None


def read_file(task, split, folder):
    """(Bytes, name) of a split in a folder that is laid out as the official zips are."""
    path = Path(folder) / task.title / f"{split}.tsv"
    if not path.is_file():
        raise UserError(f"there is no {path}; --glue-dir takes a folder laid out as the official zips are")
    return path.read_bytes(), str(path)


def read_download(task, split, cache):
    """(Bytes, name) of a split in the downloads, most of which are zips."""
    if task is TASKS["mrpc"]:
        return split_mrpc(split, cache), f"MRPC's {split} set"
    path = fetch_official(task.source, cache)
    if path.suffix != ".zip":
        return path.read_bytes(), str(path)
    name = f"{task.title}/{split}.tsv"
    with zipfile.ZipFile(path) as archive:
        return archive.read(name), f"{name} in {path}"


def split_mrpc(split, cache):
    """The bytes of MRPC's train, dev or test set: GLUE cuts dev out of the original's training set."""
    if split == "test":
        return fetch_official(MRPC_TEST, cache).read_bytes()
    pairs = fetch_official(MRPC_DEV_IDS, cache).read_bytes().split(b"\n")
    dev_ids = {tuple(pair.split(b"\t")) for pair in pairs}
    train = fetch_official(TASKS["mrpc"].source, cache).read_bytes()
    header, *rows = train.removesuffix(b"\n").split(b"\n")
    chosen = [row for row in rows if (tuple(row.split(b"\t")[1:3]) in dev_ids) == (split == "dev")]
    return b"\n".join([header, *chosen])


@functools.cache
def fetch_official(source, cache):
    """The path of an official file: downloaded, unless it is there, and checked."""
    address, size, sha256 = source
    path = Path(cache) / "glue" / address.rsplit("/", 1)[1]
    make_once(path, lambda: download(path, address, f"put {path.name} into {path.parent}, or use --glue-dir",
                                     size, sha256))
    found = hashlib.sha256(path.read_bytes()).hexdigest()
    if found != sha256:
        raise UserError(f"{path} has SHA-256 {found} instead of {sha256}; delete it to download it again")
    return path


# ------------------------------------------------------------------------------------------------------------
# Metrics, as fractions of 1. 0 / 0 counts as 0, so a constant prediction scores 0.


def accuracy(predictions, labels):
    return float(np.mean(predictions == labels))


def f1(predictions, labels):
    """Of class 1. (The official F1Scorer counts predictions where it means labels.)"""
    hits, total = np.sum((predictions == 1) & (labels == 1)), np.sum(predictions == 1) + np.sum(labels == 1)
    return float(2 * hits / total) if total else 0.0


def pearson(predictions, labels):
    if np.ptp(predictions) == 0 or np.ptp(labels) == 0:
        return 0.0
    return float(np.corrcoef(predictions.astype(np.float64), labels.astype(np.float64))[0, 1])


def spearman(predictions, labels):
    return pearson(ranks(predictions), ranks(labels))


# Matthews' coefficient is Pearson's of zeros and ones.
METRICS = dict(accuracy=accuracy, f1=f1, matthews=pearson, pearson=pearson, spearman=spearman)
AVERAGED_BY_ELECTRA = tuple(name for name in TASKS if name != "wnli")


def score(task, predictions, labels):
    """Metrics by name from predictions and labels by split. MNLI has "mismatched accuracy" as well."""
    metrics = {}
    for split in task.dev_splits:
        prefix = "mismatched " if split == "dev_mismatched" else ""
        metrics |= {prefix + metric: METRICS[metric](predictions[split], labels[split])
                    for metric in task.metrics}
    return metrics


def average_of_8(metrics):
    """ELECTRA's average: the main metric of every task except WNLI. `metrics` are by task and name."""
    return float(np.mean([metrics[name][TASKS[name].metrics[0]] for name in AVERAGED_BY_ELECTRA]))


def average_of_9(metrics):
    """The GLUE leaderboard's average: of every task the mean of its metrics."""
    return float(np.mean([np.mean(list(metrics[name].values())) for name in TASKS]))


# ------------------------------------------------------------------------------------------------------------
# Submission


def submission_file(task, predictions):
    """The text of a file to submit."""
    if not task.labels:
        values = [f"{score:.3f}" for score in np.clip(5 * predictions, 0, 5) + 0.0]  # [D31] and no -0
    else:
        values = [task.labels[int(label)] if task.in_words else str(int(label)) for label in predictions]
    return "index\tprediction\n" + "".join(f"{index}\t{value}\n" for index, value in enumerate(values))


def write_submission(path, predictions):
    """Write the zip of eleven files. `predictions` are those of every test split by the name of its file."""
    with atomic_write(Path(path)) as file, zipfile.ZipFile(file, "w") as archive:
        for task in [*TASKS.values(), DIAGNOSTIC]:
            for name in task.submissions.values():
                member = zipfile.ZipInfo(name)  # dated 1980: the same predictions give the same bytes
                member.external_attr = 0o644 << 16
                archive.writestr(member, submission_file(task, predictions[name]), zipfile.ZIP_DEFLATED)
