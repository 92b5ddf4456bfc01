"""GLUE: nine tasks and a diagnostic set: where they come from, how they are read, scored and submitted.

What enters: the official files, downloaded or in a folder. What leaves: examples (sentence, second sentence
or "", label), metrics of predictions, and the zip that gluebenchmark.com takes.

Claim: every file is read to the official number of rows, or refused (test_glue_*); the metrics agree with
those of scipy and scikit-learn (test_metric_*).
"""

import hashlib
import sys
import zipfile
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np

from data import atomic_write, decode, download, make_once, ranks

GLUE = "https://dl.fbaipublicfiles.com/glue/data/"
MSR = "https://dl.fbaipublicfiles.com/senteval/senteval_data/"


class Example(NamedTuple):
    first: str
    second: str  # "" for a task of single sentences
    label: float | None  # the place of the label's name in the task's labels; STS-B's score / 5; None: a test


@dataclass(frozen=True)
class Task:
    """A task. Columns are counted from 0, and from the end if negative."""

    title: str  # also the folder inside the zip
    source: tuple  # address, bytes, SHA-256 of what is downloaded
    rows: dict  # official numbers of rows, by split, which is also the name of the file
    sentences: tuple  # columns of the one or two sentences in training and dev
    test_sentences: tuple  # and in test
    metrics: tuple  # the first is the one that ELECTRA reports
    submissions: dict  # the file to submit, by test split
    label: int = None  # column of the label in training and dev
    labels: tuple = ("0", "1")  # names; none for STS-B, whose label is a number from 0 to 5
    in_words: bool = False  # submitted by name, not by number
    num_train_epochs: int = 3  # [D32]
    both_orders: bool = False  # [D30] trained on both orders of the sentences, since neither comes first
    header: bool = True  # of training and dev; test always has one
    ended: tuple = ()  # splits whose file is known to end with "\n": without it, it was cut short
    skips_short_rows: bool = False  # pass over rows that lack fields, and count them
    raw_rows: int = None  # of QQP's training file as it first came out, which is taken, too

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
        header=False, ended=("train", "test"),
    ),
    "sst2": Task(
        title="SST-2",
        source=(GLUE + "SST-2.zip", 7_439_277,
                "d67e16fb55739c1b32cdce9877596db1c127dc322d93c082281f64057c16deaa"),
        rows=dict(train=67_349, dev=872, test=1_821),
        sentences=(0,), test_sentences=(1,), label=1,
        metrics=("accuracy",), submissions={"test": "SST-2.tsv"},
        ended=("train", "dev", "test"),
    ),
    "mrpc": Task(
        title="MRPC",
        source=(MSR + "msr_paraphrase_train.txt", 1_047_044,
                "60a9b09084528f0673eedee2b69cb941920f0b8cd0eeccefc464a98768457f89"),
        rows=dict(train=3_668, dev=408, test=1_725),
        sentences=(3, 4), test_sentences=(3, 4), label=0,
        metrics=("accuracy", "f1"), submissions={"test": "MRPC.tsv"},
        both_orders=True, ended=("train", "dev", "test"),
    ),
    "stsb": Task(
        title="STS-B",
        source=(GLUE + "STS-B.zip", 802_872,
                "e60a6393de5a8b5b9bac5020a1554b54e3691f9d600b775bd131e613ac179c85"),
        rows=dict(train=5_749, dev=1_500, test=1_379),
        sentences=(7, 8), test_sentences=(7, 8), label=9, labels=(),
        metrics=("spearman", "pearson"), submissions={"test": "STS-B.tsv"},
        num_train_epochs=10, both_orders=True, ended=("train", "dev", "test"),
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
        ended=("train", "dev", "test"),
    ),
}
# The diagnostic set has no labels and no training text: the model of MNLI predicts it.
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


def predicted_by(name):
    """The tasks whose test sets the model of a task predicts: its own, and for MNLI the diagnostic set."""
    return [TASKS[name], DIAGNOSTIC] if name == "mnli" else [TASKS[name]]


# ------------------------------------------------------------------------------------------------------------
# Reading


def find_task(name):
    """A task by its name, in which case and hyphens do not matter."""
    key = name.lower().replace("-", "")
    if key not in TASKS:
        sys.exit(f"there is no task {name}; there are {', '.join(TASKS)} and all")
    return key


def read_examples(task, split, cache, glue_dir=None):
    """The examples of a split, in the order of the file: downloaded to `cache`, or from a folder.

    UTF-8, "\\n" alone ends a line and "\\t" a field, and quotes are characters like any other.
    """
    content, where = (read_folder if glue_dir else read_download)(task, split, glue_dir or cache)
    if b"\r\n" in content[:1000]:
        sys.exit(f"{where} has \\r\\n at its line ends, and the official file has \\n; take that one")
    if split in task.ended and not content.endswith(b"\n"):
        sys.exit(f"{where} does not end with a line break: it was cut short")
    lines = decode(content, where).removesuffix("\n").split("\n")
    is_test, width = split in task.submissions, lines[0].count("\t") + 1
    sentences = task.test_sentences if is_test else task.sentences
    if width <= max(sentences):
        sys.exit(f"{where} has {width} columns, too few to be what it should be")
    examples, short = [], 0
    begin = 1 if task.header or is_test else 0
    for number, line in enumerate(lines[begin:], begin + 1):
        fields = line.split("\t")
        if len(fields) < width and task.skips_short_rows:
            short += 1
            continue
        if len(fields) != width:
            sys.exit(f"{where}, line {number}, has {len(fields)} fields where line 1 has {width}")
        first, second = [*(fields[column] for column in sentences), ""][:2]
        label = None if is_test else read_label(task, fields[task.label], f"{where}, line {number}")
        examples.append(Example(first, second, label))
    official = task.rows[split]
    if len(examples) != official and not (split == "train" and len(examples) == task.raw_rows):
        sys.exit(f"{where} has {len(examples):,} rows and not {official:,}: it was cut short or edited")
    if short:
        print(f"{where}: {short} rows that lack fields were skipped")
    return examples


def read_label(task, text, where):
    if task.labels:
        if text not in task.labels:
            sys.exit(f"{where}: the label is {text!r} and not one of {', '.join(task.labels)}")
        return task.labels.index(text)
    try:
        score = float(text)
    except ValueError:
        score = -1.0
    if not 0 <= score <= 5:
        sys.exit(f"{where}: the score is {text!r} and not a number from 0 to 5")
    return score / 5  # [D31]


def read_folder(task, split, folder):
    """The bytes of a split in a folder laid out as the official zips are, and their name."""
    path = Path(folder) / task.title / f"{split}.tsv"
    if not path.is_file():
        sys.exit(f"there is no {path}; --glue-dir takes a folder that holds {task.title}/{split}.tsv and the "
                "like, as the official zips do")
    return path.read_bytes(), path


def read_download(task, split, cache):
    """The bytes of a split out of what was downloaded, a zip mostly, and their name."""
    if task is TASKS["mrpc"]:
        return split_mrpc(split, cache), f"MRPC's {split} set"
    path = fetch(task.source, task, cache)
    if path.suffix != ".zip":
        return path.read_bytes(), path
    name = f"{task.title}/{split}.tsv"
    with zipfile.ZipFile(path) as archive:
        return archive.read(name), f"{name} in {path}"


def split_mrpc(split, cache):
    """Bytes of MRPC's training, dev or test set, as GLUE splits the original corpus."""
    task = TASKS["mrpc"]
    if split == "test":
        return fetch(MRPC_TEST, task, cache).read_bytes()
    pairs = {tuple(line.split(b"\t")) for line in fetch(MRPC_DEV_IDS, task, cache).read_bytes().splitlines()}
    header, *rows = fetch(task.source, task, cache).read_bytes().removesuffix(b"\n").split(b"\n")
    chosen = [row for row in rows if (tuple(row.split(b"\t")[1:3]) in pairs) == (split == "dev")]
    return b"\n".join([header, *chosen, b""])


def fetch(source, task, cache):
    """The path of an official file in the cache: it is downloaded if it is not there, and checked."""
    address, size, sha256 = source
    path = Path(cache) / "glue" / address.rsplit("/", 1)[1]
    sources = [task.source, *([MRPC_TEST, MRPC_DEV_IDS] if task is TASKS["mrpc"] else [])]
    names = ", ".join(address.rsplit("/", 1)[1] for address, _, _ in sources)
    files = ", ".join(f"{split}.tsv" for split in task.rows)
    instead = (f"or put {names} into {path.parent}, or put {files} into DIR/{task.title} and take "
               "--glue-dir DIR")
    make_once(path, partial(download, path, address, instead, size, sha256))
    found = hashlib.sha256(path.read_bytes()).hexdigest()
    if found != sha256:
        sys.exit(f"{path} has SHA-256 {found} instead of {sha256}; delete it, to download it again")
    return path


# ------------------------------------------------------------------------------------------------------------
# Metrics, as fractions of 1. Where one is 0 / 0, it is 0: a constant prediction has learnt nothing.


def accuracy(predictions, labels):
    return float(np.mean(predictions == labels))


def f1(predictions, labels):
    """Of class 1. (The official F1Scorer counts predictions where it means labels.)"""
    hits, both = np.sum((predictions == 1) & (labels == 1)), np.sum(predictions == 1) + np.sum(labels == 1)
    return float(2 * hits / both) if both else 0.0


def pearson(predictions, labels):
    if np.ptp(predictions) == 0 or np.ptp(labels) == 0:
        return 0.0
    one, other = (np.asarray(values, np.float64) - np.mean(values, dtype=np.float64)
                  for values in (predictions, labels))
    return float(np.sum(one * other) / np.sqrt(np.sum(one**2) * np.sum(other**2)))


def spearman(predictions, labels):
    return pearson(ranks(predictions), ranks(labels))


# Matthews' coefficient is Pearson's, of zeros and ones.
METRICS = dict(accuracy=accuracy, f1=f1, matthews=pearson, pearson=pearson, spearman=spearman)
AVERAGED_BY_ELECTRA = tuple(name for name in TASKS if name != "wnli")


def score(task, predictions, labels):
    """Metrics by name, from predictions and labels by dev split. MNLI's second accuracy is the mismatched
    one's."""
    return {
        metric if split in ("dev", "dev_matched") else f"{split.removeprefix('dev_')} {metric}":
            METRICS[metric](predictions[split], labels[split])
        for split in task.dev_splits for metric in task.metrics
    }


def average_of_8(figures):
    """ELECTRA's: the metric it reports of each task but WNLI; `figures` are metrics by task."""
    return float(np.mean([figures[name][TASKS[name].metrics[0]] for name in AVERAGED_BY_ELECTRA]))


def average_of_9(figures):
    """The GLUE leaderboard's: all tasks, and of each the mean of its metrics."""
    return float(np.mean([np.mean(list(figures[name].values())) for name in TASKS]))


# ------------------------------------------------------------------------------------------------------------
# Submission


def submission_file(task, predictions):
    """The text of a file to submit."""
    if not task.labels:
        said = [f"{score:.3f}" for score in np.clip(5 * predictions, 0, 5) + 0.0]  # [D31] and no -0
    else:
        said = [task.labels[int(label)] if task.in_words else str(int(label)) for label in predictions]
    return "index\tprediction\n" + "".join(f"{index}\t{value}\n" for index, value in enumerate(said))


def write_submission(path, predictions):
    """Write the zip of eleven files; `predictions` are those of every test split, by the file's name."""
    tasks = {file: task for task in [*TASKS.values(), DIAGNOSTIC] for file in task.submissions.values()}
    assert predictions.keys() == tasks.keys(), (predictions.keys(), tasks.keys())
    with atomic_write(Path(path)) as file, zipfile.ZipFile(file, "w") as archive:
        for name, task in tasks.items():
            member = zipfile.ZipInfo(name)  # whose date is 1980: the same predictions are the same bytes
            member.external_attr = 0o644 << 16
            archive.writestr(member, submission_file(task, predictions[name]), zipfile.ZIP_DEFLATED)
