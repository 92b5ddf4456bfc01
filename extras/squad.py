"""SQuAD: questions about paragraphs of Wikipedia. In 1.1 each paragraph has the answer; in 2.0 some lack it.

This file has where SQuAD comes from, how it is read and how it is scored. spans.py has what lies between: the
rows, the network and the way back to the text. [Qnn] marks a detail that DETAILS.md explains.
"""

import hashlib
import re
import string
import sys
from collections import Counter
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import spans

import data
import glue

SQUAD = "https://rajpurkar.github.io/SQuAD-explorer/dataset/"
FILES = {  # size in bytes and SHA-256 [Q01]
    "train-v1.1.json": (30_288_272, "3527663986b8295af4f7fcdff1ba1ff3f72d07d61a20f487cb238a6ef92fd955"),
    "dev-v1.1.json": (4_854_279, "95aa6a52d5d6a735563366753ca50492a658031da74f301ac5238b03966972c9"),
    "train-v2.0.json": (42_123_633, "68dcfbb971bd3e96d5b46c7177b16c1a4e7d4bdef19fb204502738552dede002"),
    "dev-v2.0.json": (4_370_528, "80a5225e94905956a6446d296ca1093975c4d3b3260f1d6c8f68bc2ab77182d8"),
}
OFFICIAL_THRESHOLD = -2.75  # a question with a higher null score is left unanswered, whatever the model


# ------------------------------------------------------------------------------------------------------------
# Reading


def fetch_questions(version, split, wordpiece, cache, data_dir=None):
    """The questions of train or dev, and the SHA-256 of data_dir's SPLIT.json or of an official file."""
    if data_dir:
        path = Path(data_dir) / f"{split}.json"
    else:
        name = f"{split}-v{version}.json"
        path = glue.fetch_official((SQUAD + name, *FILES[name]), cache)
    raw = path.read_bytes()
    questions = read_questions(raw, path, version, wordpiece, is_training=split == "train")
    return questions, hashlib.sha256(raw).hexdigest()


def read_questions(raw, source, version, wordpiece, is_training):
    """The questions in a file of SQuAD's format. Training leaves out those with a misplaced answer. [Q02]

    The file is {"data": [{"paragraphs": [{"context", "qas": [QUESTION, ...]}, ...]}, ...]}, and a question is
    {"id", "question", "answers": [{"text", "answer_start"}, ...]}, with "is_impossible" in 2.0.
    """
    questions = []
    misplaced = []
    where = source
    content = data.parse_json(data.decode(raw, source), source)
    for article in read_field(content, "data", list, where):
        for paragraph in read_field(article, "paragraphs", list, where):
            context = spans.make_context(read_field(paragraph, "context", str, where), wordpiece)
            for entry in read_field(paragraph, "qas", list, where):
                name = str(read_field(entry, "id", str | int, where))
                where = f"{source}, question {name}"
                [pieces] = wordpiece.encode([read_field(entry, "question", str, where)])
                answers = [] if entry.get("is_impossible") else read_field(entry, "answers", list, where)
                texts = [read_field(answer, "text", str, where) for answer in answers]
                if version == "1.1" and not texts:
                    raise data.UserError(f"{where}, has no answer; use --version 2.0")
                span = None
                if is_training and texts:  # [Q04] The first answer is learned; all are for metrics.
                    start = read_field(answers[0], "answer_start", int, where)
                    span = spans.find_answer(texts[0], start, context, wordpiece)
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


def read_field(entry, name, kind, where):
    """A field of a JSON object. `where` is the last question that was read."""
    value = entry.get(name) if isinstance(entry, dict) else None
    if not isinstance(value, kind):
        raise data.UserError(f"{where}, or what follows, is not in SQuAD's format: {name} is wrong")
    if isinstance(value, str):
        return value.encode("utf-8", "replace").decode()  # JSON can hold half a surrogate pair
    return value


# ------------------------------------------------------------------------------------------------------------
# Metrics, as fractions of 1


def score(questions, texts, null_scores, version):
    """Metrics by name of one text for each question, and for 2.0 the thresholds of the best ones by name."""
    metrics = {}
    thresholds = {}
    null_scores = np.array(null_scores)
    has_answer = np.array([bool(question.answers) for question in questions])
    for name, metric in ("exact", exact), ("f1", f1):
        scores = np.array([max(metric(text, gold) for gold in golds(question))
                           for question, text in zip(questions, texts, strict=True)])  # [Q42]
        if version == "1.1":
            metrics[name] = float(scores.mean())  # [Q40] every question is answered
            continue
        unanswered = 1.0 - has_answer  # the scores if no question is answered
        gain, thresholds[name] = best_threshold(scores - unanswered, null_scores)
        official_gain, thresholds[f"official {name}"] = best_threshold(
            np.where(has_answer, scores, -1.0), null_scores, is_official=True)
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
    totals = np.append(0.0, gains[order]).cumsum()
    thresholds = np.append(0.0, null_scores[order])
    if not is_official:
        # The official threshold may not give its score: equal null scores are separated, and if leaving all
        # questions unanswered is best, it is 0. Here it then lies below all null scores.
        thresholds[0] = thresholds[1] - 1
        totals[:-1][thresholds[:-1] == thresholds[1:]] = -np.inf
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
