"""GLUE: nine tasks and a diagnostic set. Where they come from, how they are read, scored and submitted.

An example is (first sentence, second sentence or "", label). Read the table of tasks, then `read_examples`.
Each file is checked for the official number of rows, each download for its published SHA-256. `own_task`
turns a folder of your own files into a task.
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

import data

GLUE = "https://dl.fbaipublicfiles.com/glue/data/"
MSR = "https://dl.fbaipublicfiles.com/senteval/senteval_data/"


class Example(NamedTuple):
    first: str
    second: str  # "" for a task of single sentences
    label: float | None  # the number of the class, or a score from 0 to 1; None in a test set


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
    labels: tuple = ("0", "1")  # names of the classes, or () for a regression: the label is a number
    low: float = 0.0  # a regression's labels in [low, high] are scaled to [0, 1]
    high: float = 5.0
    submits_names: bool = False  # classes are submitted by name, not by number
    num_train_epochs: int = 3  # [D32]
    both_orders: bool = False  # [D30] trained on both orders of the sentences
    header: bool = True  # whether train and dev have one; test always has
    skips_short_rows: bool = False  # QQP has some rows that lack fields
    raw_rows: int = None  # training rows of the original QQP.zip, which is accepted as well
    files: dict = None  # split -> path, for a task of your own

    @property
    def name(self):
        if self.files:
            return self.title
        return self.title.lower().replace("-", "")

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
        submits_names=True,
    ),
    "qnli": Task(
        title="QNLI",
        source=(GLUE + "QNLIv2.zip", 10_627_589,
                "e634e78627a29adaecd4f955359b22bf5e70f2cbd93b493f2d624138a0c0e5f5"),
        rows=dict(train=104_743, dev=5_463, test=5_463),
        sentences=(1, 2), test_sentences=(1, 2), label=3, labels=ENTAILED,
        metrics=("accuracy",), submissions={"test": "QNLI.tsv"}, submits_names=True,
    ),
    "rte": Task(
        title="RTE",
        source=(GLUE + "RTE.zip", 697_150,
                "6bf86de103ecd335f3441bd43574d23fef87ecc695977a63b82d5efb206556ee"),
        rows=dict(train=2_490, dev=277, test=3_000),
        sentences=(1, 2), test_sentences=(1, 2), label=3, labels=ENTAILED,
        metrics=("accuracy",), submissions={"test": "RTE.tsv"}, submits_names=True,
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
    metrics=(), submissions={"diagnostic": "AX.tsv"}, submits_names=True,
)
# MRPC cannot be distributed with GLUE: its dev set is cut out of the original's training set.
MRPC_TEST = (MSR + "msr_paraphrase_test.txt", 441_275,
             "a04e271090879aaba6423d65b94950c089298587d9c084bf9cd7439bd785f784")
MRPC_DEV_IDS = (GLUE + "mrpc_dev_ids.tsv", 6_222,
                "971d7767d81b997fd9060ade0ec23c4fc31cbb226a55d1bd4a1bac474eb81dc7")


def find_tasks(names, is_regression=False):
    """The tasks of a command by name: GLUE's, in any case and with or without hyphens, folders, or all."""
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
            raise data.UserError(f"there is no task {name}; there are {', '.join(TASKS)}, all, and folders "
                                 "with train and dev as .tsv, .csv or .jsonl")
        for task in found:
            namesakes = [other for other in tasks.values() if other.title == task.title]
            if any(other != task for other in namesakes):
                raise data.UserError(f"two tasks are called {task.title}; rename a folder")
            tasks[task.name] = task
    return tasks


def submission_splits(task):
    """(Owner, split) of each set that a task's model predicts. MNLI's predicts the diagnostic set, too."""
    owners = [task]
    if task is TASKS["mnli"]:
        owners.append(DIAGNOSTIC)
    return [(owner, split) for owner in owners for split in owner.submissions]


# ------------------------------------------------------------------------------------------------------------
# Reading


def check_folder(splits, folder):
    """Check that a folder has the files of all (task, split), and name all that are missing."""
    paths = [official_path(task, split, folder) for task, split in splits if not task.files]
    missing = [str(path) for path in paths if not path.is_file()]
    if missing:
        raise data.UserError(f"there is no {', '.join(missing)}; --glue-dir takes a folder laid out as the "
                             "official zips are")


def read_examples(task, split, cache, glue_dir=None):
    """The examples of a split, in file order, and the SHA-256 of its file.

    The file is one of your own, or an official one, from `glue_dir` if given, else downloaded to `cache`.
    """
    if task.files:
        source = task.files[split]
        raw = source.read_bytes()
        examples = parse_own(task, split, raw, source)
    else:
        raw, source = read_official(task, split, cache, glue_dir)
        examples = parse_official(task, split, raw, source)
    return examples, hashlib.sha256(raw).hexdigest()


def read_official(task, split, cache, glue_dir):
    """The bytes of an official file, and its name for messages. Most downloads are zips."""
    if glue_dir:
        path = official_path(task, split, glue_dir)
        return path.read_bytes(), path
    if task is TASKS["mrpc"]:
        return read_mrpc(split, cache), f"MRPC's {split} set"
    path = fetch_official(task.source, cache)
    if path.suffix != ".zip":
        return path.read_bytes(), str(path)
    name = f"{task.title}/{split}.tsv"
    with zipfile.ZipFile(path) as archive:
        return archive.read(name), f"{name} in {path}"


def official_path(task, split, folder):
    return Path(folder) / task.title / f"{split}.tsv"


def read_mrpc(split, cache):
    """The bytes of MRPC's train, dev or test set. GLUE cuts dev out of the original's training set."""
    if split == "test":
        return fetch_official(MRPC_TEST, cache).read_bytes()
    lines = fetch_official(MRPC_DEV_IDS, cache).read_bytes().split(b"\n")
    dev_ids = {tuple(line.split(b"\t")) for line in lines}
    original = fetch_official(TASKS["mrpc"].source, cache).read_bytes()
    header, *rows = original.removesuffix(b"\n").split(b"\n")
    kept = [header]
    for row in rows:
        ids = tuple(row.split(b"\t")[1:3])
        row_split = "dev" if ids in dev_ids else "train"
        if row_split == split:
            kept.append(row)
    return b"\n".join(kept)


@functools.cache
def fetch_official(source, cache):
    """The path of an official file: downloaded, unless it is there, and checked."""
    address, size, sha256 = source
    path = Path(cache) / "glue" / address.rsplit("/", 1)[1]
    advice = f"put {path.name} into {path.parent}, or use --glue-dir"
    data.make_once(path, lambda: data.download(path, address, advice, size, sha256))
    found = hashlib.sha256(path.read_bytes()).hexdigest()
    if found != sha256:
        raise data.UserError(f"{path} has SHA-256 {found} instead of {sha256}; delete it to download it "
                             "again")
    return path


def parse_official(task, split, raw, source):
    """The examples in an official file.

    Only "\\n" ends a line and only "\\t" a field. Quotes are characters like any other.
    """
    is_test = split in task.submissions  # a test set has columns of its own, a header and no labels
    if is_test:
        columns = task.test_sentences
        last_column = max(columns)
    else:
        columns = task.sentences
        last_column = max(*columns, task.label)
    lines = data.decode(raw, source).removesuffix("\n").split("\n")
    width = lines[0].count("\t") + 1
    first_line = 2 if task.header or is_test else 1
    examples = []
    skipped = 0
    for number, line in enumerate(lines[first_line - 1 :], first_line):
        fields = line.split("\t")
        if len(fields) < width and task.skips_short_rows:
            skipped += 1
            continue
        if len(fields) != width or last_column >= width:
            raise data.UserError(f"{source}, line {number}, has {len(fields)} fields; it was damaged or "
                                 "edited")
        first = fields[columns[0]]
        second = fields[columns[1]] if len(columns) == 2 else ""
        label = None
        if not is_test:
            label = read_label(task, fields[task.label], f"{source}, line {number}")
        examples.append(Example(first, second, label))
    sizes = [task.rows[split]]
    if task.raw_rows:  # of QQP there are two versions
        sizes.append(task.raw_rows)
    if len(examples) not in sizes:
        raise data.UserError(f"{source} has {len(examples):,} rows and not {task.rows[split]:,}: it was "
                             "cut or edited")
    if skipped:
        print(f"{source}: skipped {skipped} rows that lack fields")
    return examples


def read_label(task, text, where):
    """The number of the class or, for STS-B, the score on a scale from 0 to 1. [D31]"""
    if not task.labels:
        return (read_number(text, where) - task.low) / (task.high - task.low)
    if text not in task.labels:
        raise data.UserError(f"{where}: the label is {text!r} and not one of {', '.join(task.labels)}")
    return task.labels.index(text)


def read_number(text, where):
    try:
        number = float(text)
    except ValueError:
        number = np.nan
    if not np.isfinite(number):
        raise data.UserError(f"{where}: the label is {text!r} and not a number")
    return number


# ------------------------------------------------------------------------------------------------------------
# Your own tasks. Nothing of GLUE needs this section.


def own_task(folder, is_regression):
    """The task that a folder describes: train and dev, and perhaps test, as .tsv, .csv or .jsonl."""
    files = find_own_files(folder)
    title = folder.resolve().name
    submissions = {}
    if "test" in files:
        submissions["test"] = f"{title}.tsv"
    task = Task(title, rows=dict.fromkeys(files), metrics=("accuracy", "macro f1", "matthews"),
                submissions=submissions, submits_names=True, files=files)
    first_seen = find_labels(files["train"])
    if is_regression:
        labels = {read_number(text, where) for text, where in first_seen.items()}
    else:
        labels = set(first_seen)
        for text, where in first_seen.items():
            check_class(text, where)
    if len(labels) < 2:
        raise data.UserError(f"{files['train']} needs at least two different labels")
    if is_regression:
        return replace(task, labels=(), metrics=("spearman", "pearson"), low=min(labels), high=max(labels))
    return replace(task, labels=tuple(sorted(labels, key=class_order)))


def find_own_files(folder):
    """The file of each split in a folder."""
    files = {}
    for split in ("train", "dev", "test"):
        paths = [folder / f"{split}.{kind}" for kind in ("tsv", "csv", "jsonl")]
        found = [path for path in paths if path.is_file()]
        if len(found) > 1:
            raise data.UserError(f"there are {found[0]} and {found[1]}; keep one of them")
        if found:
            files[split] = found[0]
        elif split != "test":
            raise data.UserError(f"{folder} has no {split}.tsv, {split}.csv or {split}.jsonl")
    return files


def find_labels(path):
    """The different labels in a file, as text, and where each first occurs."""
    first_seen = {}
    with open(path, "rb") as file:
        for where, row in read_table(file, path):
            first_seen.setdefault(read_cell(row, "label", where), f"{where}, column label")
    return first_seen


WHOLE_NUMBER = re.compile(r"[-+]?\d+")
NUMBER = re.compile(r"[-+]?\d*\.?\d+([eE][-+]?\d+)?")


def check_class(text, where):
    """Check that a label can be the name of a class: words and whole numbers can."""
    if not text or re.search(r"[\t\r\n]", text):
        raise data.UserError(f"{where}: the label is {text!r}; it must be a word, without tab or line break")
    if NUMBER.fullmatch(text) and not WHOLE_NUMBER.fullmatch(text):
        raise data.UserError(f"{where}: the label is {text}, a number; use --regression")


def class_order(text):
    """The key that sorts whole numbers by value and words by letters."""
    if WHOLE_NUMBER.fullmatch(text):
        return int(text), text
    return 0, text


def parse_own(task, split, raw, source):
    """The examples in a file of your own."""
    examples = []
    for where, row in read_table(io.BytesIO(raw), source):
        label = None
        if split not in task.submissions:
            label = read_label(task, read_cell(row, "label", where), f"{where}, column label")
        first, second = read_sentences(row, where)
        examples.append(Example(first, second, label))
    if not examples:
        raise no_rows(source)
    return examples


def no_rows(source):
    return data.UserError(f"{source} has no rows; the first line of a table names its columns")


def read_sentences(row, where):
    """The one or two sentences of a row, under `sentence` or `sentence1` and `sentence2`."""
    if "sentence1" in row:
        first = read_cell(row, "sentence1", where)
    elif "sentence" in row:
        first = read_cell(row, "sentence", where)
    else:
        raise data.UserError(f"{where}, has no column sentence, or sentence1 and sentence2; there are "
                             f"{', '.join(map(str, row))}")
    second = read_cell(row, "sentence2", where) if "sentence2" in row else ""
    return first, second


def read_cell(row, column, where):
    """The text in a column of a row. `where` is "SOURCE, line N", with which every message begins."""
    if column not in row:
        raise data.UserError(f"{where}, has no column {column}; there are {', '.join(map(str, row))}")
    value = row[column]
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise data.UserError(f"{where}, column {column}, is {value!r}, neither text nor a number")
    return str(value).encode("utf-8", "replace").decode()  # JSON can hold half a surrogate pair


def read_table(file, source):
    """Yield ("SOURCE, line N", {column: value}) for each row of a binary .tsv, .csv or .jsonl file."""
    lines = (data.decode(line, f"{source}, line {number},") for number, line in enumerate(file, 1))
    first = next(lines, "")
    lines = itertools.chain([first], lines)
    kind = Path(source).suffix.lower()
    if kind not in (".jsonl", ".csv", ".tsv"):  # for example, of standard input
        kind = guess_kind(first)
    if kind == ".jsonl":
        return read_objects(lines, source)
    return read_separated(lines, source, kind)


def guess_kind(first_line):
    """The kind of a table from its first line: .jsonl begins with "{", .tsv has tabs, .csv commas."""
    if first_line.startswith("{"):
        return ".jsonl"
    if "," in first_line and "\t" not in first_line:
        return ".csv"
    return ".tsv"


def read_objects(lines, source):
    for number, line in enumerate(lines, 1):
        if line.strip():
            yield f"{source}, line {number}", data.parse_json(line, f"{source}, line {number},")


def read_separated(lines, source, kind):
    if kind == ".csv":
        rows = csv.reader(lines)
    else:
        rows = (line.rstrip("\r\n").split("\t") for line in lines)
    try:
        header = next(rows, [])
        for row_number, fields in enumerate(rows, 2):
            # In a .csv, a quoted cell may have several lines.
            line_number = rows.line_num if kind == ".csv" else row_number
            where = f"{source}, line {line_number}"
            if fields in ([], [""]):
                continue
            if len(fields) != len(header):
                raise data.UserError(f"{where}, has {len(fields)} fields, and the first line {len(header)}")
            yield where, dict(zip(header, fields, strict=True))
    except csv.Error as error:
        raise data.UserError(f"{source}, line {rows.line_num}, is not CSV: {error}") from None


# ------------------------------------------------------------------------------------------------------------
# Metrics, as fractions of 1. 0 / 0 counts as 0, so a constant prediction scores 0.

AVERAGED_BY_ELECTRA = tuple(name for name in TASKS if name != "wnli")


def average_of_8(metrics):
    """ELECTRA's average: the main metric of every task except WNLI. `metrics` are by task and name."""
    return float(np.mean([metrics[name][TASKS[name].metrics[0]] for name in AVERAGED_BY_ELECTRA]))


def average_of_9(metrics):
    """The GLUE leaderboard's average: the mean over tasks of each task's mean metric."""
    return float(np.mean([np.mean(list(metrics[name].values())) for name in TASKS]))


def score(task, predictions, labels):
    """Metrics by name from predictions and labels by split. MNLI has "mismatched accuracy" as well."""
    metrics = {}
    for split in task.dev_splits:
        prefix = "mismatched " if split == "dev_mismatched" else ""
        for metric in task.metrics:
            metrics[prefix + metric] = METRICS[metric](predictions[split], labels[split])
    return metrics


def accuracy(predictions, labels):
    return float(np.mean(predictions == labels))


def macro_f1(predictions, labels):
    """The mean of the F1 of each class."""
    classes = np.union1d(predictions, labels)
    return float(np.mean([f1(predictions == number, labels == number) for number in classes]))


def f1(predictions, labels):
    """F1 of class 1. (The official F1Scorer counts predictions where it should count labels.)"""
    hits = np.sum((predictions == 1) & (labels == 1))
    total = np.sum(predictions == 1) + np.sum(labels == 1)
    return float(2 * hits / total) if total else 0.0


def matthews(predictions, labels):
    """Matthews' correlation for any number of classes: Pearson's of one-hot predictions and labels."""
    classes = np.union1d(predictions, labels)
    predicted = (predictions[:, None] == classes).astype(np.float64)  # (N, classes)
    actual = (labels[:, None] == classes).astype(np.float64)
    predicted = predicted - predicted.mean(0)
    actual = actual - actual.mean(0)
    norm = np.sqrt((predicted**2).sum() * (actual**2).sum())
    return float((predicted * actual).sum() / norm) if norm else 0.0


def spearman(predictions, labels):
    return pearson(tied_ranks(predictions), tied_ranks(labels))


def tied_ranks(values):
    """Ranks from 1. Ties share the mean of their ranks.

    >>> tied_ranks(np.array([0.3, 0.1, 0.3])).tolist()
    [2.5, 1.0, 2.5]
    """
    _, place, ties = np.unique(values, return_inverse=True, return_counts=True)
    last_rank = np.cumsum(ties)  # of each distinct value
    return (last_rank - (ties - 1) / 2)[place]


def pearson(predictions, labels):
    if np.ptp(predictions) == 0 or np.ptp(labels) == 0:
        return 0.0
    return float(np.corrcoef(predictions.astype(np.float64), labels.astype(np.float64))[0, 1])


METRICS = {"accuracy": accuracy, "f1": f1, "macro f1": macro_f1, "matthews": matthews, "pearson": pearson,
           "spearman": spearman}


# ------------------------------------------------------------------------------------------------------------
# Submission


def submission_file(task, predictions):
    """The text of a file to submit."""
    if not task.labels:
        scores = task.low + (task.high - task.low) * np.clip(predictions, 0, 1)  # [D31]
        digits = ".6g" if task.files else ".3f"
        values = [f"{number:{digits}}" for number in scores + 0.0]  # + 0.0 turns -0.0 into 0.0
    elif task.submits_names:
        values = [task.labels[int(label)] for label in predictions]
    else:
        values = [str(int(label)) for label in predictions]
    return "index\tprediction\n" + "".join(f"{index}\t{value}\n" for index, value in enumerate(values))


def write_submission(path, files):
    """Write the zip of eleven files. `files` has the text of each by name."""
    with data.atomic_write(Path(path)) as file, zipfile.ZipFile(file, "w") as archive:
        for task in [*TASKS.values(), DIAGNOSTIC]:
            for name in task.submissions.values():
                member = zipfile.ZipInfo(name)  # dated 1980: the same predictions give the same bytes
                member.external_attr = 0o644 << 16
                archive.writestr(member, files[name], zipfile.ZIP_DEFLATED)
