"""Answer questions about a text: fine-tune on SQuAD, score, predict. `python extras/squad.py --version 2.0`

SQuAD's texts are paragraphs of Wikipedia. In 1.1 each has the answer to its questions; in 2.0 some lack it.
This file has the command, where SQuAD comes from, how it is read and how it is scored. spans.py has what lies
between: the rows, the network and the way back to the text. finetune.py has the sweep over seeds and the
training. [Qnn] marks a detail that DETAILS.md explains.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import train  # isort: skip  # first, as in finetune.py
import hashlib
import re
import string
from collections import Counter
from dataclasses import dataclass, replace
from typing import Annotated

import numpy as np
import torch
from tqdm import tqdm

import data
import finetune
import glue
import spans

SQUAD = "https://rajpurkar.github.io/SQuAD-explorer/dataset/"
FILES = {  # size in bytes and SHA-256
    "train-v1.1.json": (30_288_272, "3527663986b8295af4f7fcdff1ba1ff3f72d07d61a20f487cb238a6ef92fd955"),
    "dev-v1.1.json": (4_854_279, "95aa6a52d5d6a735563366753ca50492a658031da74f301ac5238b03966972c9"),
    "train-v2.0.json": (42_123_633, "68dcfbb971bd3e96d5b46c7177b16c1a4e7d4bdef19fb204502738552dede002"),
    "dev-v2.0.json": (4_370_528, "80a5225e94905956a6446d296ca1093975c4d3b3260f1d6c8f68bc2ab77182d8"),
}
OFFICIAL_THRESHOLD = -2.75  # a question with a higher null score is left unanswered, whatever the model


@dataclass(frozen=True)
class SquadConfig(finetune.RecipeConfig):
    """Questions, and how they are learned. An annotated field is a flag, and the text is its help."""

    version: Annotated[str, "1.1, or 2.0, in which a text may lack the answer"] = "2.0"
    data_dir: Annotated[str, "folder with train.json and dev.json in SQuAD's format; without it SQuAD is "
                             "downloaded"] = ""
    max_length: Annotated[int, "tokens in a row: a question and a part of its text [Q47]", 32, 100_000] = 512
    stride: Annotated[int, "word pieces from the beginning of a part to that of the next; 0 is 128, or half "
                           "of --max-length if that is less", 0, 100_000] = 0
    num_train_epochs: Annotated[int, "passes over the questions [Q47]", 1, 1000] = 2
    predict_file: Annotated[str, "a .tsv, .csv or .jsonl file with question and context, or - for standard "
                                 "input: print answers"] = ""
    out: Annotated[str, "folder for results"] = "out/squad"


# ------------------------------------------------------------------------------------------------------------
# What finetune.py must know of the task


class Squad(glue.Task):
    """SQuAD, or files like SQuAD's in a folder of your own, whose title begins with "own-" as in glue.py."""

    splits = ("train", "dev")

    @property
    def name(self):
        return self.title.lower().replace(" ", "")


class Experiment(finetune.Experiment):
    """Questions in the place of sentences."""

    def read(self, split):
        """The bytes and the path of a split's file, and the SHA-256 of the bytes."""
        if self.config.data_dir:
            path = Path(self.config.data_dir) / f"{split}.json"
        else:
            name = f"{split}-v{self.config.version}.json"
            path = glue.fetch_official((SQUAD + name, *FILES[name]), self.config.cache, "--data-dir")
        raw = path.read_bytes()
        return (raw, path), hashlib.sha256(raw).hexdigest()

    def tokenize(self, split, examples):
        raw, path = examples
        wordpiece = self.pretrained.wordpiece
        questions = read_questions(raw, path, self.config.version, wordpiece, is_training=split == "train")
        tokenized = spans.make_windows(questions, wordpiece, self.config.max_length, self.config.stride)
        if not len(tokenized.rows):
            raise data.UserError(f"{path} needs a context that has words")
        answered = sum(bool(question.answers) for question in questions)
        summary = (f"{len(questions):,} questions, {answered:,} with an answer, in "
                   f"{len(tokenized.rows):,} rows")
        finetune.print_split(self, split, tokenized.rows, summary)
        return tokenized

    def new_network(self):
        return spans.QuestionAnswerer(self.pretrained.config)

    def predict(self, network, tokenized):
        return predict(network, tokenized, self.pretrained.wordpiece, self.config)

    def evaluate(self, predictions, splits):
        texts = [next(iter(answers)) for answers, _ in predictions["dev"]]
        null_scores = [null_score for _, null_score in predictions["dev"]]
        metrics, thresholds = score(splits["dev"].questions, texts, null_scores, self.config.version)
        return dict(metrics=metrics, thresholds=thresholds, is_constant=len(set(texts)) == 1)

    def saved_fields(self, result):
        return dict(stride=self.config.stride, threshold=result["thresholds"].get("exact"))


def predict(network, tokenized, wordpiece, config):
    """The answers and the null score of each question, as `spans.find_answers` has them."""
    order, outputs = zip(*finetune.predict_batches(network, tokenized.rows, config), strict=True)
    in_file_order = np.argsort(np.concatenate(order))
    fields = [torch.cat(batches).cpu().numpy()[in_file_order] for batches in zip(*outputs, strict=True)]
    if not all(np.isfinite(field).all() for field in fields):  # the sweep continues
        tqdm.write("the predictions are not finite; try a lower --learning-rate")
        fields = [np.nan_to_num(field) for field in fields]
    return spans.find_answers(tokenized.questions, tokenized.windows, spans.Output(*fields), wordpiece)


# ------------------------------------------------------------------------------------------------------------
# Reading


def read_questions(raw, source, version, wordpiece, is_training):
    """The questions in a file of SQuAD's format. Training leaves out those with a misplaced answer. [Q07]

    The file is {"data": [{"paragraphs": [{"context", "qas": [QUESTION, ...]}, ...]}, ...]}, and a question is
    {"id", "question", "answers": [{"text", "answer_start"}, ...]}, with "is_impossible" in 2.0.
    """
    questions = []
    misplaced = []
    for name, where, entry, context in list_questions(raw, source, wordpiece):
        [pieces] = wordpiece.encode([read_field(entry, "question", str, where)])
        answers = [] if entry.get("is_impossible") else read_field(entry, "answers", list, where)
        texts = [read_field(answer, "text", str, where) for answer in answers]
        if version == "1.1" and not texts:
            raise data.UserError(f"{where} has no answer; use --version 2.0")
        span = None
        if is_training and texts:  # [Q04] The first answer is learned; all are for metrics.
            start = read_field(answers[0], "answer_start", int, where)
            span = spans.locate_answer(texts[0], start, context, wordpiece)
            if span is None:
                misplaced.append(where)
                continue
        questions.append(spans.Question(name, pieces, context, texts, span))
    if misplaced:
        print(f"left out {len(misplaced):,} questions whose answer is not at its answer_start; the first is "
              f"{misplaced[0]}")
    if not questions:
        raise data.UserError(f"{source} has no question to use")
    return questions


def list_questions(raw, source, wordpiece):
    """Yield (id, where it stands, JSON object, Context) of each question in a file."""
    where = source
    content = data.parse_json(data.decode_utf8(raw, source), source)
    for article in read_field(content, "data", list, where):
        for paragraph in read_field(article, "paragraphs", list, where):
            context = spans.make_context(read_field(paragraph, "context", str, where), wordpiece)
            for entry in read_field(paragraph, "qas", list, where):
                name = str(read_field(entry, "id", str | int, where))
                where = f"{source}, question {name}"
                yield name, where, entry, context


def read_field(entry, name, kind, where):
    """A field of a JSON object. `where` is the last question that was read."""
    value = entry.get(name) if isinstance(entry, dict) else None
    if not isinstance(value, kind):
        raise data.UserError(f"{where} or what follows is not in SQuAD's format: {name} is wrong")
    if isinstance(value, str):
        return data.without_surrogates(value)
    return value


# ------------------------------------------------------------------------------------------------------------
# Metrics, as fractions of 1


def score(questions, texts, null_scores, version):
    """Metrics by name of one text for each question, and for 2.0 the thresholds of the best ones by name."""
    metrics = {}
    thresholds = {}
    null_scores = np.array(null_scores)
    has_answer = np.array([bool(question.answers) for question in questions])
    unanswered = 1.0 - has_answer  # the scores of questions that are left unanswered
    for name, metric in ("exact", exact), ("f1", f1):
        scores = np.array([max(metric(text, gold) for gold in golds(question))
                           for question, text in zip(questions, texts, strict=True)])  # [Q42]
        if version == "1.1":
            metrics[name] = float(scores.mean())  # [Q40] every question is answered
            continue
        gain, thresholds[name] = best_threshold(scores - unanswered, null_scores)
        # Officially any text loses the point of a question without an answer, even one without words.
        official_gains = np.where(has_answer, scores, -1.0)
        official_gain, thresholds[f"official {name}"] = best_threshold(
            official_gains, null_scores, is_official=True)
        metrics[f"best {name}"] = float(unanswered.mean() + gain / len(questions))
        metrics[f"official best {name}"] = float(unanswered.mean() + official_gain / len(questions))
        at_official = np.where(null_scores > OFFICIAL_THRESHOLD, unanswered, scores)  # [Q37] [Q44]
        metrics[f"{name} at {OFFICIAL_THRESHOLD}"] = float(at_official.mean())
    return metrics, thresholds


def best_threshold(gains, null_scores, is_official=False):
    """(Total gain, threshold). A question adds its gain if its null score is at most the threshold. [Q46]

    >>> best_threshold(np.array([0.5, -1.0, 1.0]), np.array([-3.0, 2.0, 2.0]))
    (0.5, -3.0)
    """
    order = np.argsort(null_scores, kind="stable")
    # The first entries are those if no question is answered, the next if only the first in this order is.
    totals = np.append(0.0, gains[order]).cumsum()
    thresholds = np.append(0.0, null_scores[order])
    if not is_official:
        # The official threshold may not give its score. It is 0 if leaving all questions unanswered is best,
        # and it may separate equal null scores.
        thresholds[0] = thresholds[1] - 1
        separates_equals = np.append(thresholds[:-1] == thresholds[1:], False)
        totals[separates_equals] = -np.inf
    best = totals.argmax()
    return float(totals[best]), float(thresholds[best])


def golds(question):
    """The texts with which a prediction is compared: those that have words. [Q43]"""
    return [answer for answer in question.answers if normalize(answer)] or [""]


def exact(text, gold):
    return float(normalize(text) == normalize(gold))


def f1(text, gold):
    """F1 of the words in two texts."""
    words = Counter(normalize(text).split())
    gold_words = Counter(normalize(gold).split())
    if not words or not gold_words:  # [Q43] Unlike in the official code of 1.1, two empty texts have F1 1.
        return float(words == gold_words)
    return 2 * (words & gold_words).total() / (words.total() + gold_words.total())


def normalize(text):
    """Lower case, without ASCII punctuation, articles and spare spaces, removed in this order. [Q41]

    >>> normalize("The A.B. of 10,000  cafés")
    'ab of 10000 cafés'
    """
    text = "".join(character for character in text.lower() if character not in string.punctuation)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", text).split())


# ------------------------------------------------------------------------------------------------------------
# The command line


def predict_file(config):
    """Print an answer and its probability for each row of a table with the columns question and context.

    The probability of an answer is its share among the likeliest ones. If the null score is above the saved
    threshold, the answer is empty, with the probability that the context has none.
    """
    saved = finetune.load_saved(config.model, "QuestionAnswerer")
    wordpiece = saved.wordpiece
    threshold = saved.fields["threshold"]  # None in 1.1
    network = saved.load_into(spans.QuestionAnswerer(saved.config), config.device)
    for number, chunk in enumerate(finetune.read_chunks(config)):
        questions = [read_row(row, where, wordpiece) for where, row in chunk]
        if number == 0:
            print("answer", "probability", sep="\t")
        tokenized = spans.make_windows(questions, wordpiece, saved.max_length, saved.fields["stride"])
        for answers, null_score in predict(network, tokenized, wordpiece, config):
            shares = torch.tensor(list(answers.values())).softmax(0)
            text = next(iter(answers))
            probability = float(shares[0])
            if threshold is not None and null_score > threshold:
                text = ""
                probability = float(torch.tensor(null_score).sigmoid())
            print(text, f"{probability:.4f}", sep="\t")


def read_row(row, where, wordpiece):
    """The Question in a row of a table."""
    [pieces] = wordpiece.encode([glue.read_cell(row, "question", where)])
    context = spans.make_context(glue.read_cell(row, "context", where), wordpiece)
    if not context.pieces:
        raise data.UserError(f"{where} has an empty context")
    return spans.Question(where, pieces, context, [], None)


def main(argv=None):
    description = "Fine-tune on questions, and score. The same command resumes."
    config = finetune.parse(argv, description, SquadConfig)
    if config.predict_file:
        predict_file(config)
        return
    if config.version not in ("1.1", "2.0"):
        raise data.UserError(f"there is no version {config.version}; there are 1.1 and 2.0")
    config = replace(config, stride=config.stride or min(128, config.max_length // 2))  # [Q47]
    title = f"own-{Path(config.data_dir).resolve().name}" if config.data_dir else f"SQuAD {config.version}"
    metrics = ("exact", "f1") if config.version == "1.1" else ("best exact", "best f1")
    task = Squad(title=title, metrics=metrics)
    finetune.sweep_and_report(config, [Experiment(task, config, finetune.load_pretrained(config))])


if __name__ == "__main__":
    sys.exit(train.run_command(main))
