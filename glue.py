"""GLUE: nine tasks and a diagnostic set. Where they come from, how they are read, scored and submitted.

An example is (first sentence, second sentence or "", label). Read the table of tasks, then `read_examples`.
Every file must have the official number of rows, every download its published SHA-256. A folder with files of
one's own makes one more task: `own_task`.
"""

import csv
import functools
import hashlib
import io
import itertools
import re
import zipfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np

from data import UserError, atomic_write, decode, download, make_once, parse_json
from train import tied_ranks

GLUE = "https://dl.fbaipublicfiles.com/glue/data/"
MSR = "https://dl.fbaipublicfiles.com/senteval/senteval_data/"


class Example(NamedTuple):
    first: str
    second: str  # "" for a task of single sentences
    label: float | None  # number of a class; a score on a scale from 0 to 1; None in a test set


@dataclass(frozen=True)
class Task:
    """A task. Columns are counted from 0."""

    title: str  # also the name of the folder in the zip
    rows: dict  # official number of rows of each split; the split is also the name of the file
    metrics: tuple  # the first is the one that ELECTRA reports
    submissions: dict  # test split -> name of the file to submit
    source: tuple = None  # address, size in bytes and SHA-256 of the download
    sentences: tuple = None  # columns of the one or two sentences in train and dev
    test_sentences: tuple = None  # the same in test
    label: int = None  # column of the label in train and dev; -1 is the last
    labels: tuple = ("0", "1")  # names of the classes; none if the label is a number
    low: float = 0.0  # such numbers are scaled to 0-1 from this
    high: float = 5.0  # to this
    in_words: bool = False  # submitted by name, not by number
    num_train_epochs: int = 3  # [D32]
    both_orders: bool = False  # [D30] trained on both orders of the sentences
    header: bool = True  # of train and dev; test always has one
    skips_short_rows: bool = False  # QQP has some rows that lack fields
    raw_rows: int = None  # training rows of the original QQP.zip, which is accepted as well
    files: dict = None  # of one's own task: split -> path

    @property
    def name(self):
        return self.title if self.files else self.title.lower().replace("-", "")

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


def find_tasks(names, is_regression=False):
    """The tasks of a command by name: GLUE's, without regard to case and hyphens, folders, or all of GLUE."""
    tasks = {}
    for name in names:
        key = name.lower().replace("-", "")
        if key == "all":
            found = list(TASKS.values())
        elif key in TASKS:
            found = [TASKS[key]]
        elif Path(name).is_dir():
            found = [own_task(Path(name), is_regression)]
        else:
            raise UserError(f"there is no task {name}; there are {', '.join(TASKS)}, all, and folders with "
                            "train and dev as .tsv, .csv or .jsonl")
        for task in found:
            if any(task.title == other.title and task != other for other in tasks.values()):
                raise UserError(f"two tasks are called {task.title}; rename a folder")
            tasks[task.name] = task
    return tasks


def submission_splits(task):
    """(Task, split) of all that the model of a task predicts: MNLI's predicts the diagnostic set, too."""
    tasks = [task, DIAGNOSTIC] if task is TASKS["mnli"] else [task]
    return [(task, split) for task in tasks for split in task.submissions]


# ------------------------------------------------------------------------------------------------------------
# Reading


def read_examples(task, split, cache, glue_dir=None):
    """(The examples of a split, in file order; SHA-256), from `glue_dir` or else downloaded to `cache`."""
    if task.files:
        raw, source = task.files[split].read_bytes(), task.files[split]
        return read_own(task, split, raw, source), hashlib.sha256(raw).hexdigest()
    if glue_dir:
        source = official_path(task, split, glue_dir)
        raw = source.read_bytes()
    else:
        raw, source = read_download(task, split, cache)
    return parse_official(task, split, raw, source), hashlib.sha256(raw).hexdigest()


def parse_official(task, split, raw, source):
    """The examples in an official file.

    Only "\\n" ends a line and only "\\t" a field. Quotes are characters like any other.
    """
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
    if not task.labels:
        return (read_number(text, where) - task.low) / (task.high - task.low)
    if text not in task.labels:
        raise UserError(f"{where}: the label is {text!r} and not one of {', '.join(task.labels)}")
    return task.labels.index(text)


def read_number(text, where):
    try:
        number = float(text)
    except ValueError:
        number = np.nan
    if not np.isfinite(number):
        raise UserError(f"{where}: the label is {text!r} and not a number")
    return number


def check_folder(splits, folder):
    """Check that the files of all (task, split) are in a folder. Those that are missing are named at once."""
    paths = [official_path(task, split, folder) for task, split in splits if not task.files]
    missing = [str(path) for path in paths if not path.is_file()]
    if missing:
        raise UserError(f"there is no {', '.join(missing)}; --glue-dir takes a folder laid out as the "
                        "official zips are")


def official_path(task, split, folder):
    return Path(folder) / task.title / f"{split}.tsv"


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
# One's own tasks


def own_task(folder, is_regression):
    """The task that a folder describes: train and dev, and perhaps test, as .tsv, .csv or .jsonl."""
    files = {}
    for split in ("train", "dev", "test"):
        found = [path for kind in ("tsv", "csv", "jsonl") if (path := folder / f"{split}.{kind}").is_file()]
        if len(found) > 1:
            raise UserError(f"there are {found[0]} and {found[1]}; keep one of them")
        if found:
            files[split] = found[0]
        elif split != "test":
            raise UserError(f"{folder} has no {split}.tsv, {split}.csv or {split}.jsonl")
    title = folder.resolve().name
    task = Task(title, dict.fromkeys(files), ("accuracy", "macro f1", "matthews"),
                {"test": f"{title}.tsv"} if "test" in files else {}, in_words=True, files=files)
    places = {}  # of each label, where it is seen first
    with open(files["train"], "rb") as file:
        for where, row in read_table(file, files["train"]):
            places.setdefault(read_cell(row, "label", where), f"{where}, column label")
    if is_regression:
        numbers = {read_number(text, where) for text, where in places.items()}
        if len(numbers) < 2:
            raise UserError(f"{files['train']} needs at least two different labels")
        return replace(task, labels=(), metrics=("spearman", "pearson"), low=min(numbers), high=max(numbers))
    for text, where in places.items():
        if not text or re.search(r"[\t\r\n]", text):
            raise UserError(f"{where}: the label is {text!r}; it must be a word, without tab or line break")
        if re.fullmatch(r"[-+]?\d*\.?\d+([eE][-+]?\d+)?", text) and not re.fullmatch(r"[-+]?\d+", text):
            raise UserError(f"{where}: the label is {text}, a number; use --regression")
    if len(places) < 2:
        raise UserError(f"{files['train']} needs at least two different labels")
    in_order = sorted(places, key=lambda text: (int(text) if re.fullmatch(r"[-+]?\d+", text) else 0, text))
    return replace(task, labels=tuple(in_order))


def read_own(task, split, raw, source):
    """The examples in a file of one's own."""
    examples = []
    for where, row in read_table(io.BytesIO(raw), source):
        label = None
        if split not in task.submissions:
            label = read_label(task, read_cell(row, "label", where), f"{where}, column label")
        examples.append(Example(*read_sentences(row, where), label))
    if not examples:
        raise UserError(f"{source} has no rows; the first line of a table names its columns")
    return examples


def read_sentences(row, where):
    """The one or two sentences of a row, under `sentence` or `sentence1` and `sentence2`."""
    if not {"sentence", "sentence1"} & row.keys():
        raise UserError(f"{where}, has no column sentence, or sentence1 and sentence2; there are "
                        f"{', '.join(map(str, row))}")
    first = read_cell(row, "sentence1" if "sentence1" in row else "sentence", where)
    return first, read_cell(row, "sentence2", where) if "sentence2" in row else ""


def read_cell(row, column, where):
    """The text in a column."""
    if column not in row:
        raise UserError(f"{where}, has no column {column}; there are {', '.join(map(str, row))}")
    value = row[column]
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise UserError(f"{where}, column {column}, is {value!r}, neither text nor a number")
    return str(value).encode("utf-8", "replace").decode()  # JSON can hold half a surrogate pair


def read_table(file, source):
    """Yield ("SOURCE, line N", {column: value}) for each row of a binary .tsv, .csv or .jsonl file.

    Of standard input ("-") the first line tells which: .jsonl begins with "{", .tsv has tabs, .csv commas.
    """
    lines = (decode(line, f"{source}, line {number},") for number, line in enumerate(file, 1))
    first, kind = next(lines, ""), Path(source).suffix.lower()
    if kind not in (".jsonl", ".csv", ".tsv"):
        kind = ".jsonl" if first.startswith("{") else ".csv" if "," in first and "\t" not in first else ".tsv"
    lines = itertools.chain([first], lines)
    return read_objects(lines, source) if kind == ".jsonl" else read_separated(lines, source, kind)


def read_objects(lines, source):
    for number, line in enumerate(lines, 1):
        if line.strip():
            yield f"{source}, line {number}", parse_json(line, f"{source}, line {number},")


def read_separated(lines, source, kind):
    rows = csv.reader(lines) if kind == ".csv" else (line.rstrip("\r\n").split("\t") for line in lines)
    try:
        header = next(rows, [])
        for number, fields in enumerate(rows, 2):
            where = f"{source}, line {rows.line_num if kind == '.csv' else number}"
            if fields in ([], [""]):
                continue
            if len(fields) != len(header):
                raise UserError(f"{where}, has {len(fields)} fields, and the first line {len(header)}")
            yield where, dict(zip(header, fields, strict=True))
    except csv.Error as error:
        raise UserError(f"{source}, line {rows.line_num}, is not CSV: {error}") from None


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
    return pearson(tied_ranks(predictions), tied_ranks(labels))


def macro_f1(predictions, labels):
    """The mean over the classes of each one's F1."""
    classes = np.union1d(predictions, labels)
    return float(np.mean([f1(predictions == number, labels == number) for number in classes]))


def matthews(predictions, labels):
    """Pearson's coefficient of indicators of the classes; of two classes, of zeros and ones."""
    classes = np.union1d(predictions, labels)
    one, other = ((values[:, None] == classes).astype(np.float64) for values in (predictions, labels))
    one, other = one - one.mean(0), other - other.mean(0)
    norm = np.sqrt((one**2).sum() * (other**2).sum())
    return float((one * other).sum() / norm) if norm else 0.0


METRICS = {"accuracy": accuracy, "f1": f1, "macro f1": macro_f1, "matthews": matthews, "pearson": pearson,
           "spearman": spearman}
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
        scores = task.low + (task.high - task.low) * np.clip(predictions, 0, 1)
        digits = ".6g" if task.files else ".3f"
        values = [f"{score:{digits}}" for score in scores + 0.0]  # [D31] and no -0
    else:
        values = [task.labels[int(label)] if task.in_words else str(int(label)) for label in predictions]
    return "index\tprediction\n" + "".join(f"{index}\t{value}\n" for index, value in enumerate(values))


def write_submission(path, files):
    """Write the zip of eleven files. `files` has the text of each by name."""
    with atomic_write(Path(path)) as file, zipfile.ZipFile(file, "w") as archive:
        for task in [*TASKS.values(), DIAGNOSTIC]:
            for name in task.submissions.values():
                member = zipfile.ZipInfo(name)  # dated 1980: the same predictions give the same bytes
                member.external_attr = 0o644 << 16
                archive.writestr(member, files[name], zipfile.ZIP_DEFLATED)
