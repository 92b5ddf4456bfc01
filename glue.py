"""GLUE: nine tasks and a diagnostic set. Where they come from, how they are read, scored and submitted.

An example is (first sentence, second sentence or "", label). Read the table of tasks, then `read_official`.
Each file is checked for the official number of rows, each download for its published SHA-256. `own_task`
turns a folder of your own files into a task. [Dnn] marks a detail that DETAILS.md explains.
"""

import csv
import functools
import hashlib
import io
import json
import math
import re
import sys
import zipfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar, NamedTuple

import numpy as np

import data

# ------------------------------------------------------------------------------------------------------------
# Tasks


class Example(NamedTuple):
    first: str
    second: str = ""  # stays "" in a task of single sentences
    label: float | None = None  # the number of the class, or a score from 0 to 1; None in a test set


@dataclass(frozen=True, kw_only=True)
class Task:
    """What fine-tuning and scoring must know. A subclass adds `splits` and `read(split, cache, glue_dir)`.

    `splits` are names: "train", then those that begin with "dev", then test sets.
    """

    title: str
    metrics: tuple  # names in METRICS; the first is the one that ELECTRA reports
    labels: tuple = ("0", "1")  # names of the classes; () in a regression, where labels are numbers
    label_range: tuple = None  # a regression's lowest and highest label; they are scaled to 0 and 1
    num_train_epochs: int = 3  # [D32]
    both_orders: bool = False  # [D30] trained on both orders of the sentences
    submission_names: dict = None  # the file to submit for each test set, if that is not TITLE.tsv

    number_format: ClassVar = ".6g"  # of a regression's predictions, where they are printed or submitted

    @property
    def name(self):
        """The name of --task, in results and in names of files."""
        return self.title

    @functools.cached_property
    def class_numbers(self):
        """The number of each class by its name. Cached, since a task of your own may have thousands."""
        return {label: number for number, label in enumerate(self.labels)}

    @property
    def is_regression(self):
        return not self.labels

    @property
    def dev_splits(self):
        return [split for split in self.splits if split.startswith("dev")]

    @property
    def test_splits(self):
        return [split for split in self.splits if split != "train" and split not in self.dev_splits]

    def submission_name(self, split):
        """The name of the file to submit for a test set."""
        return self.submission_names[split] if self.submission_names else f"{self.title}.tsv"

    def score(self, predictions, labels):
        """{metric: score} from {split: predictions} and {split: labels}."""
        scores = {}
        for split in self.dev_splits:
            prefix = "mismatched " if split == "dev_mismatched" else ""  # MNLI has two dev sets
            for metric in self.metrics:
                scores[prefix + metric] = METRICS[metric](predictions[split], labels[split])
        return scores


@dataclass(frozen=True, kw_only=True)
class GlueTask(Task):
    """A task of GLUE. Its title is also the name of the folder in the zip."""

    download: tuple  # address, size in bytes and SHA-256
    num_rows: dict  # of each split, officially; the split is also the name of the file
    sentence_columns: tuple  # one or two
    label_column: str  # of train and dev; a test set has no labels
    header: tuple = None  # all columns of train and dev, if these files do not name them

    number_format: ClassVar = ".3f"

    @property
    def name(self):
        return plain_name(self.title)

    @property
    def splits(self):
        return tuple(self.num_rows)

    def read(self, split, cache, glue_dir=None):
        """The examples of a split, in file order, and the SHA-256 of its file.

        The file comes from `glue_dir` if given, else it is downloaded to `cache`.
        """
        raw, source = read_official(self, split, cache, glue_dir)
        return parse_official(self, split, raw, source), hashlib.sha256(raw).hexdigest()


def plain_name(name):
    """A name of a task in lower case, without hyphens."""
    return name.lower().replace("-", "")


GLUE_URL = "https://dl.fbaipublicfiles.com/glue/data/"
MSR_URL = "https://dl.fbaipublicfiles.com/senteval/senteval_data/"
TWO_WAY = ("entailment", "not_entailment")
THREE_WAY = ("entailment", "neutral", "contradiction")
TASKS = {task.name: task for task in (
    GlueTask(
        title="CoLA",
        download=(GLUE_URL + "CoLA.zip", 376_971,
                  "f212fcd832b8f7b435fb991f101abf89f96b933ab400603bf198960dfc32cbff"),
        num_rows=dict(train=8_551, dev=1_043, test=1_063),
        sentence_columns=("sentence",), label_column="label", header=("source", "label", "mark", "sentence"),
        metrics=("matthews",),
    ),
    GlueTask(
        title="SST-2",
        download=(GLUE_URL + "SST-2.zip", 7_439_277,
                  "d67e16fb55739c1b32cdce9877596db1c127dc322d93c082281f64057c16deaa"),
        num_rows=dict(train=67_349, dev=872, test=1_821),
        sentence_columns=("sentence",), label_column="label",
        metrics=("accuracy",),
    ),
    GlueTask(
        title="MRPC",
        download=(MSR_URL + "msr_paraphrase_train.txt", 1_047_044,
                  "60a9b09084528f0673eedee2b69cb941920f0b8cd0eeccefc464a98768457f89"),
        num_rows=dict(train=3_668, dev=408, test=1_725),
        sentence_columns=("#1 String", "#2 String"), label_column="Quality",
        metrics=("accuracy", "f1"),
        both_orders=True,
    ),
    GlueTask(
        title="STS-B",
        download=(GLUE_URL + "STS-B.zip", 802_872,
                  "e60a6393de5a8b5b9bac5020a1554b54e3691f9d600b775bd131e613ac179c85"),
        num_rows=dict(train=5_749, dev=1_500, test=1_379),
        sentence_columns=("sentence1", "sentence2"), label_column="score", labels=(), label_range=(0.0, 5.0),
        metrics=("spearman", "pearson"),
        num_train_epochs=10, both_orders=True,
    ),
    GlueTask(
        title="QQP",
        download=(GLUE_URL + "QQP-clean.zip", 41_696_084,
                  "40e7c862c04eb26ee04b67fd900e76c45c6ba8e6d8fab4f8f1f8072a1a3fbae0"),
        num_rows=dict(train=363_846, dev=40_430, test=390_965),
        sentence_columns=("question1", "question2"), label_column="is_duplicate",
        metrics=("accuracy", "f1"),
    ),
    GlueTask(  # its model also predicts the diagnostic set, which has no labels and no training set
        title="MNLI",
        download=(GLUE_URL + "MNLI.zip", 312_783_507,
                  "e7c1d896d26ed6caf700110645df426cc2d8ebf02a5ab743d5a5c68ac1c83633"),
        num_rows=dict(train=392_702, dev_matched=9_815, dev_mismatched=9_832, test_matched=9_796,
                  test_mismatched=9_847, diagnostic=1_104),
        sentence_columns=("sentence1", "sentence2"), label_column="gold_label", labels=THREE_WAY,
        metrics=("accuracy",),
        submission_names=dict(test_matched="MNLI-m.tsv", test_mismatched="MNLI-mm.tsv", diagnostic="AX.tsv"),
    ),
    GlueTask(
        title="QNLI",
        download=(GLUE_URL + "QNLIv2.zip", 10_627_589,
                  "e634e78627a29adaecd4f955359b22bf5e70f2cbd93b493f2d624138a0c0e5f5"),
        num_rows=dict(train=104_743, dev=5_463, test=5_463),
        sentence_columns=("question", "sentence"), label_column="label", labels=TWO_WAY,
        metrics=("accuracy",),
    ),
    GlueTask(
        title="RTE",
        download=(GLUE_URL + "RTE.zip", 697_150,
                  "6bf86de103ecd335f3441bd43574d23fef87ecc695977a63b82d5efb206556ee"),
        num_rows=dict(train=2_490, dev=277, test=3_000),
        sentence_columns=("sentence1", "sentence2"), label_column="label", labels=TWO_WAY,
        metrics=("accuracy",),
        num_train_epochs=10,
    ),
    GlueTask(
        title="WNLI",
        download=(GLUE_URL + "WNLI.zip", 28_999,
                  "ae0e8e4d16f4d46d4a0a566ec7ecceccfd3fbfaa4a7a4b4e02848c0f2561ac46"),
        num_rows=dict(train=635, dev=71, test=146),
        sentence_columns=("sentence1", "sentence2"), label_column="label",
        metrics=("accuracy",),
    ),
)}
DIAGNOSTIC = (GLUE_URL + "AX.tsv", 222_257,
              "0e13510b1bb14436ff7e2ee82338f0efb0133ecf2e73507a697dc210db3f05fd")
# MRPC cannot be distributed with GLUE: its dev set is cut out of the original's training set.
MRPC_TEST = (MSR_URL + "msr_paraphrase_test.txt", 441_275,
             "a04e271090879aaba6423d65b94950c089298587d9c084bf9cd7439bd785f784")
MRPC_DEV_IDS = (GLUE_URL + "mrpc_dev_ids.tsv", 6_222,
                "971d7767d81b997fd9060ade0ec23c4fc31cbb226a55d1bd4a1bac474eb81dc7")


# ------------------------------------------------------------------------------------------------------------
# Reading GLUE's files


def read_official(task, split, cache, glue_dir):
    """The bytes of an official file, and its name for messages."""
    if glue_dir:
        folder = "diagnostic" if split == "diagnostic" else task.title
        path = Path(glue_dir) / folder / f"{split}.tsv"
        if not path.is_file():
            raise data.UserError(f"there is no {path}; --glue-dir takes a folder laid out as the official "
                                 "zips are")
        return path.read_bytes(), path
    if split == "diagnostic":
        path = fetch_official(DIAGNOSTIC, cache)
        return path.read_bytes(), path
    if task is TASKS["mrpc"]:
        return read_mrpc(split, cache), f"MRPC's {split} set"
    path = fetch_official(task.download, cache)
    member = f"{task.title}/{split}.tsv"
    with zipfile.ZipFile(path) as archive:
        return archive.read(member), f"{member} in {path}"


def read_mrpc(split, cache):
    """The bytes of MRPC's train, dev or test set. GLUE cuts dev out of the original's training set."""
    if split == "test":
        return fetch_official(MRPC_TEST, cache).read_bytes()
    lines = fetch_official(MRPC_DEV_IDS, cache).read_bytes().split(b"\n")
    dev_ids = {tuple(line.split(b"\t")) for line in lines}
    original = fetch_official(TASKS["mrpc"].download, cache).read_bytes()
    header, *rows = original.removesuffix(b"\n").split(b"\n")
    kept = [header]
    for row in rows:
        ids = tuple(row.split(b"\t")[1:3])  # the columns #1 ID and #2 ID
        row_split = "dev" if ids in dev_ids else "train"
        if row_split == split:
            kept.append(row)
    return b"\n".join(kept)


@functools.cache  # a file is checked once, not for each of its splits
def fetch_official(download, cache, flag="--glue-dir"):
    """The path of an official file: downloaded, unless it is there, and checked.

    `flag` is the option that an error suggests, for a copy of your own.
    """
    address, size, sha256 = download
    path = Path(cache) / "glue" / address.rsplit("/", 1)[1]
    advice = f"put {path.name} into {path.parent}, or use {flag}"
    data.download_once(path, address, advice, size, sha256)
    return path


def parse_official(task, split, raw, source):
    """The examples in an official file.

    Only "\\n" ends a line and only "\\t" a field. Quotes are characters like any other. Rows that lack fields
    are skipped: QQP has a few. The official number of rows shows that nothing else was lost.
    """
    is_test = split in task.test_splits
    lines = data.decode_utf8(raw, source).removesuffix("\n").split("\n")
    if task.header and not is_test:  # CoLA's test set has a header, its other files do not
        header = task.header
        first_line = 1
    else:
        header = lines.pop(0).split("\t")
        first_line = 2
    columns = list(task.sentence_columns)
    if not is_test:
        columns.append(task.label_column)
    for column in columns:
        if column not in header:
            raise data.UserError(f"{source}, line 1 has no column {column}; it was damaged or edited")
    examples = []
    skipped = []  # numbers of lines
    for number, line in enumerate(lines, first_line):
        fields = line.split("\t")
        if len(fields) != len(header):
            skipped.append(number)
            continue
        row = dict(zip(header, fields, strict=True))
        label = None
        if not is_test:
            label = read_label(task, row[task.label_column], f"{source}, line {number}")
        examples.append(Example(*[row[column] for column in task.sentence_columns], label=label))
    if skipped:
        print(f"{source}: skipped {len(skipped)} rows that have not {len(header)} fields; the first is line "
              f"{skipped[0]}")
    if len(examples) != task.num_rows[split]:
        raise data.UserError(f"{source} has {len(examples):,} rows and not {task.num_rows[split]:,}: it was "
                             "cut or edited, or is another version")
    return examples


def read_label(task, text, where):
    """The number of the class or, in a regression, the label scaled to [0, 1]. [D31]"""
    if task.is_regression:
        low, high = task.label_range
        return (read_number(text, where) - low) / (high - low)
    if text not in task.class_numbers:
        raise data.UserError(f"{where}: the label is {text!r} and not one of {join_few(task.labels)}")
    return task.class_numbers[text]


def join_few(texts, most=10):
    """The first few texts of a list, and the number of others."""
    joined = ", ".join(texts[:most])
    others = len(texts) - most
    return f"{joined} and {others:,} others" if others > 0 else joined


# float() also takes "nan", "infinity" and "1_000".
NUMBER = re.compile(r"[-+]?(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?")


def read_number(text, where):
    if not NUMBER.fullmatch(text) or not math.isfinite(float(text)):  # 1e999 is infinite
        raise data.UserError(f"{where}: the label is {text!r} and not a number")
    return float(text)


def unscale(numbers, label_range):
    """Predictions on the scale of the labels: the inverse of what `read_label` does."""
    low, high = label_range
    return low + (high - low) * numbers


# ------------------------------------------------------------------------------------------------------------
# The tasks of a command, and your own

SINGLE = ("sentence",)
PAIR = ("sentence1", "sentence2")


def find_tasks(names, is_regression=False):
    """The tasks of a command, by name: tasks of GLUE (case and hyphens do not matter), folders, or all."""
    tasks = {}
    for name in names:
        if plain_name(name) == "all":
            found = list(TASKS.values())
        elif plain_name(name) in TASKS:
            found = [TASKS[plain_name(name)]]
        elif Path(name).is_dir():
            found = [own_task(Path(name), is_regression)]
        else:
            # The name may be an address with a token.
            raise data.UserError(f"there is no task {data.without_secrets(name)}; there are "
                                 f"{', '.join(TASKS)}, all, and folders with train and dev as .tsv, .csv or "
                                 ".jsonl")
        for task in found:
            if task.name in tasks and tasks[task.name] != task:  # as of a/reviews and b/reviews
                raise data.UserError(f"two tasks are called {task.title}; rename a folder")
            tasks[task.name] = task
    return tasks


@dataclass(frozen=True, kw_only=True)
class OwnTask(Task):
    """A folder of your own files. Its title begins with "own-", so that no task of GLUE has it."""

    files: dict  # path by split
    sentence_columns: tuple  # SINGLE or PAIR, in all files
    train_bytes: bytes = field(repr=False)  # of the training file, which also gave `labels` or `label_range`

    @property
    def splits(self):
        return tuple(self.files)

    def read(self, split, cache=None, glue_dir=None):
        """The examples of a split, in file order, and the SHA-256 of its file."""
        path = self.files[split]
        raw = self.train_bytes if split == "train" else path.read_bytes()
        return parse_own(self, split, raw, path), hashlib.sha256(raw).hexdigest()


def own_task(folder, is_regression):
    """The task that a folder describes: train and dev, and perhaps test, as .tsv, .csv or .jsonl."""
    files = find_own_files(folder)
    title = f"own-{folder.resolve().name}"
    train = files["train"]
    raw = train.read_bytes()
    rows = list(read_table(io.BytesIO(raw), train))
    label_places = find_labels(rows)
    if is_regression:
        numbers = {read_number(text, where) for text, where in label_places.items()}
        num_labels = len(numbers)  # 1 and 1.0 are one
        label_range = (min(numbers), max(numbers))
        label_fields = dict(labels=(), label_range=label_range, metrics=("spearman", "pearson"))
    else:
        check_classes(label_places, title)
        num_labels = len(label_places)
        labels = tuple(sorted(label_places, key=class_order))
        label_fields = dict(labels=labels, metrics=("accuracy", "macro f1", "matthews"))
    if num_labels < 2:
        raise data.UserError(f"{train} needs at least two different labels")
    where, first_row = rows[0]
    return OwnTask(title=title, files=files, sentence_columns=find_columns(first_row, where),
                   train_bytes=raw, **label_fields)


def find_own_files(folder):
    """The file of each split in a folder."""
    files = {}
    for split in ("train", "dev", "test"):
        paths = [folder / f"{split}.{ending}" for ending in ("tsv", "csv", "jsonl")]
        found = [path for path in paths if path.is_file()]
        if len(found) > 1:
            raise data.UserError(f"there are {found[0]} and {found[1]}; keep one of them")
        if found:
            files[split] = found[0]
        elif split != "test":
            raise data.UserError(f"{folder} has no {split}.tsv, {split}.csv or {split}.jsonl")
    return files


def find_labels(rows):
    """{label: "SOURCE, line N" of its first row} of the rows of a table. Labels are text."""
    label_places = {}
    for where, row in rows:
        label_places.setdefault(read_cell(row, "label", where), where)
    return label_places


def check_classes(label_places, title):
    """Refuse labels that cannot name classes, and point out decimals."""
    for text, where in label_places.items():
        if not text or re.search(r"[\t\r\n]", text):
            raise data.UserError(f"{where}: the label is {text!r}; it must be a word, without tab or line "
                                 "break")
    decimals = [text for text in label_places if "." in text]
    if decimals and all(map(NUMBER.fullmatch, label_places)):
        print(f"{title}: labels such as {decimals[0]} are names of classes; --regression makes them numbers")


def class_order(text):
    """The key that sorts numbers by value, and words by letters where 0 is."""
    value = float(text) if NUMBER.fullmatch(text) else 0
    return value, text


def parse_own(task, split, raw, source):
    """The examples in a file of your own."""
    examples = []
    for where, row in read_table(io.BytesIO(raw), source):
        label = None
        if split not in task.test_splits:
            label = read_label(task, read_cell(row, "label", where), where)
        examples.append(Example(*read_sentences(row, task.sentence_columns, where), label=label))
    return examples


def read_sentences(row, columns, where):
    """The one or two sentences of a row. All rows of a task must have the same columns."""
    found = find_columns(row, where)
    if found != columns:
        raise data.UserError(f"{where} has {' and '.join(found)}; it should have {' and '.join(columns)}")
    return [read_cell(row, column, where) for column in columns]


def find_columns(row, where):
    """The columns with the sentences of a row: SINGLE or PAIR."""
    if "sentence1" in row and "sentence2" in row:
        return PAIR
    if "sentence" in row and "sentence2" not in row:  # with sentence2, sentence1 was probably meant
        return SINGLE
    raise data.UserError(f"{where} has no column sentence, or sentence1 and sentence2; there are "
                         f"{', '.join(row)}")


def read_cell(row, column, where):
    """The text in a column of a row, without spaces around it. `where` is "SOURCE, line N"."""
    if column not in row:
        raise data.UserError(f"{where} has no column {column}; there are {', '.join(row)}")
    value = row[column]
    if isinstance(value, str):
        return data.without_surrogates(value).strip()
    if isinstance(value, int) or (isinstance(value, float) and math.isfinite(value)):
        return json.dumps(value)  # as in the file: 9, 1.5 or true
    raise data.UserError(f"{where}: column {column} is {value!r}, neither text nor a number")


def read_table(file, source, kind=""):
    """Yield ("SOURCE, line N", {column: value}) for each row of a binary file.

    `kind` is tsv, csv or jsonl; by default it is the ending of the file's name. No line is skipped: an empty
    one is an empty cell in a table of one column, and otherwise an error.
    """
    kind = kind or Path(source).suffix.lower().removeprefix(".")
    lines = read_lines(file, source)
    if kind == "jsonl":
        rows = parse_json_lines(lines, source)
    elif kind == "csv":
        rows = name_fields(split_csv(lines, source))
    elif kind == "tsv":
        rows = name_fields(split_tsv(lines, source))
    else:
        raise data.UserError(f"{source} has no known format; --format takes tsv, csv or jsonl")
    first = next(rows, None)
    if first is None:
        raise data.UserError(f"{source} has no rows; the first line of a table names its columns")
    yield first
    yield from rows


def read_lines(file, source):
    """Yield each line of a binary file as text."""
    for number, line in enumerate(file, 1):
        if number == 1 and b"\r" in line.rstrip(b"\r\n"):  # Python takes such a file for one line
            raise data.UserError(f"the lines of {source} end with CR; save it with line ends LF or CR LF")
        yield data.decode_utf8(line, f"{source}, line {number}")


def parse_json_lines(lines, source):
    """Yield ("SOURCE, line N", {column: value}) for each line of JSON."""
    for number, line in enumerate(lines, 1):
        where = f"{source}, line {number}"
        if not line.strip():
            raise data.UserError(f"{where} is empty; delete it")
        yield where, data.parse_json(line, where)


def split_tsv(lines, source):
    """Yield ("SOURCE, line N", fields) for each line. Quotes are characters like any other."""
    for number, line in enumerate(lines, 1):
        where = f"{source}, line {number}"
        fields = line.rstrip("\r\n").split("\t")
        # A spreadsheet's cell of several lines. In a table of more columns, such a line lacks fields.
        if len(fields) == 1 and line.startswith('"') and line.count('"') % 2:
            raise data.UserError(f"{where} opens a quote and does not close it; cells of several lines need "
                                 "a .csv or .jsonl file")
        yield where, fields


def split_csv(lines, source):
    """Yield ("SOURCE, line N", fields) for each row. N is its first line: quoted fields may have several."""
    csv.field_size_limit(sys.maxsize)  # the default is 131,072 characters
    reader = csv.reader(lines, strict=True)
    first_line = 1
    try:
        for fields in reader:
            yield f"{source}, line {first_line}", fields or [""]  # csv has [] for an empty line
            first_line = reader.line_num + 1
    except csv.Error as error:
        raise data.UserError(f"{source}, line {first_line} is not CSV: a quote opens here and is not closed "
                             f"at the end of its cell ({error})") from None


def name_fields(rows):
    """Yield ("SOURCE, line N", {column: field}) for each row but the first, which names the columns."""
    first_where, header = next(rows, ("", []))  # an empty file has no columns and no rows
    header = [name.strip() for name in header]
    named = [name for name in header if name]  # spreadsheets append empty columns
    if len(set(named)) < len(named):
        raise data.UserError(f"{first_where} names a column twice; there are {', '.join(named)}")
    for where, fields in rows:
        if fields == [""] and len(header) > 1:
            raise data.UserError(f"{where} is empty; delete it")
        if len(fields) != len(header):
            raise data.UserError(f"{where} has {len(fields)} fields, and the first line {len(header)}")
        if [cell.strip() for cell in fields] == header:
            raise data.UserError(f"{where} repeats the first line, which names the columns; delete it")
        yield where, dict(zip(header, fields, strict=True))


# ------------------------------------------------------------------------------------------------------------
# Metrics, as fractions of 1. 0 / 0 counts as 0, so a constant prediction scores 0.

AVERAGED_BY_ELECTRA = tuple(name for name in TASKS if name != "wnli")


def average_of_8(scores):
    """ELECTRA's average of {task: {metric: score}}: the main metric of every task except WNLI."""
    return float(np.mean([scores[name][TASKS[name].metrics[0]] for name in AVERAGED_BY_ELECTRA]))


def average_of_9(scores):
    """The GLUE leaderboard's average of {task: {metric: score}}: the mean of the tasks' means."""
    return float(np.mean([np.mean(list(scores[name].values())) for name in TASKS]))


def accuracy(predictions, labels):
    return float(np.mean(predictions == labels))


def macro_f1(predictions, labels):
    """The mean of the F1 of each class."""
    classes = np.union1d(predictions, labels)
    return float(np.mean([f1(predictions, labels, number) for number in classes]))


def f1(predictions, labels, positive=1):
    """F1 of the class `positive`.

    It is the usual F1. Google's F1Scorer mistakes the predictions for the labels, so its recall is wrong.
    """
    hits = np.sum((predictions == positive) & (labels == positive))
    total = np.sum(predictions == positive) + np.sum(labels == positive)
    return float(2 * hits / total) if total else 0.0


def matthews(predictions, labels):
    """Matthews' correlation. Of more than two classes it is known as R_K (Gorodkin, 2004).

    R_K = (accuracy - p·q) / sqrt((1 - p·p) (1 - q·q)), p and q the shares of the classes in both arrays.
    """
    num_classes = 1 + max(predictions.max(), labels.max())
    predicted = np.bincount(predictions, minlength=num_classes) / len(predictions)  # share of each class
    actual = np.bincount(labels, minlength=num_classes) / len(labels)
    chance = predicted @ actual  # the accuracy if both were independent
    norm = np.sqrt((1 - predicted @ predicted) * (1 - actual @ actual))
    return float((accuracy(predictions, labels) - chance) / norm) if norm else 0.0


def spearman(predictions, labels):
    return pearson(tied_ranks(predictions), tied_ranks(labels))


def tied_ranks(values):
    """Ranks from 1. Ties share the mean of their ranks.

    >>> tied_ranks(np.array([0.3, 0.1, 0.3])).tolist()
    [2.5, 1.0, 2.5]
    """
    _, place, ties = np.unique(values, return_inverse=True, return_counts=True)
    last_rank = np.cumsum(ties)  # of each distinct value
    mean_rank = last_rank - (ties - 1) / 2
    return mean_rank[place]


def pearson(predictions, labels):
    if np.ptp(predictions) == 0 or np.ptp(labels) == 0:  # the range is 0: one of them is constant
        return 0.0
    return float(np.corrcoef(predictions.astype(np.float64), labels.astype(np.float64))[0, 1])


METRICS = {"accuracy": accuracy, "f1": f1, "macro f1": macro_f1, "matthews": matthews, "pearson": pearson,
           "spearman": spearman}


# ------------------------------------------------------------------------------------------------------------
# Submission


def submission_text(task, predictions):
    """The text of a file to submit."""
    if task.is_regression:
        numbers = unscale(np.clip(predictions, 0, 1), task.label_range)  # [D31]
        values = [f"{number:{task.number_format}}" for number in numbers]
    else:
        values = [task.labels[int(number)] for number in predictions]
    lines = [f"{index}\t{value}\n" for index, value in enumerate(values)]
    return "".join(["index\tprediction\n", *lines])


def write_submission(path, files):
    """Write the zip of eleven files. `files` has the text of each by name."""
    with data.atomic_write(Path(path)) as file, zipfile.ZipFile(file, "w") as archive:
        for task in TASKS.values():
            for split in task.test_splits:
                name = task.submission_name(split)
                member = zipfile.ZipInfo(name)  # dated 1980: the same predictions give the same bytes
                member.external_attr = 0o644 << 16  # readable by all
                archive.writestr(member, files[name], zipfile.ZIP_DEFLATED)
