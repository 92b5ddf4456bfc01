"""Answer questions about a text: SQuAD 1.1, where every context has the answer, and 2.0, where some have none.

The file follows a question from top to bottom: reading; windows, the overlapping parts of a context of which
each fills a row; the head; answers, which lead from its output back to the characters; metrics. A piece is a
word piece. [Qnn] marks a detail that DETAILS.md explains and links to the official code and to its test.
"""

import bisect
import hashlib
import math
import operator
import re
import string
import sys
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import data
import glue
import model

SQUAD = "https://rajpurkar.github.io/SQuAD-explorer/dataset/"
FILES = {  # size in bytes and SHA-256 [Q01]
    "train-v1.1.json": (30_288_272, "3527663986b8295af4f7fcdff1ba1ff3f72d07d61a20f487cb238a6ef92fd955"),
    "dev-v1.1.json": (4_854_279, "95aa6a52d5d6a735563366753ca50492a658031da74f301ac5238b03966972c9"),
    "train-v2.0.json": (42_123_633, "68dcfbb971bd3e96d5b46c7177b16c1a4e7d4bdef19fb204502738552dede002"),
    "dev-v2.0.json": (4_370_528, "80a5225e94905956a6446d296ca1093975c4d3b3260f1d6c8f68bc2ab77182d8"),
}
QUESTION_LENGTH = 64  # pieces to which a question is cut
ANSWER_LENGTH = 30  # pieces in the longest answer
BEAM = 20  # starts of a row, and ends of each start
N_BEST = 20  # answers of a question
HEAD_WIDTH = 512  # of the head's hidden layers, whatever the width of the encoder
OFFICIAL_THRESHOLD = -2.75  # questions with a higher null score are left unanswered, whatever the model


# ------------------------------------------------------------------------------------------------------------
# Reading


class Context(NamedTuple):
    """A text as words and as pieces."""

    words: list
    starts: list  # the character at which each word begins
    pieces: list  # ids
    word_of: list  # the number of the word in which each piece lies


class Question(NamedTuple):
    id: str
    pieces: list  # ids
    context: Context
    answers: list  # of texts; empty if the context has no answer
    span: tuple | None  # the first and the last piece of the first answer, in a training set


def read_questions(version, split, wordpiece, cache, data_dir=None):
    """The Questions of train or dev and the SHA-256 of their file: data_dir's SPLIT.json, or an official one."""
    if data_dir:
        path = Path(data_dir) / f"{split}.json"
    else:
        name = f"{split}-v{version}.json"
        path = glue.fetch_official((SQUAD + name, *FILES[name]), cache)
    raw = path.read_bytes()
    questions = []
    misplaced = []
    for where, name, text, context, answers in parse_squad(raw, path, wordpiece):
        if version == "1.1" and not answers:
            raise data.UserError(f"{where}, has no answer; use --version 2.0")
        span = None
        if split == "train" and answers:
            span = find_answer(*answers[0], context, wordpiece)  # [Q04] the other answers are for metrics
            if span is None:
                misplaced.append(where)
                continue
        questions.append(Question(name, wordpiece.encode([text])[0], context, [text for text, _ in answers], span))
    if misplaced:
        print(f"left out {len(misplaced):,} questions whose answer is not at its answer_start; the first is "
              f"{misplaced[0]}")
    if not questions:
        raise data.UserError(f"{path} has no question to use")
    return questions, hashlib.sha256(raw).hexdigest()


def parse_squad(raw, source, wordpiece):
    """Yield ("SOURCE, question ID", ID, question, Context, [(answer, its first character)]). [Q02]"""
    where = f"{source}, first question"
    content = data.parse_json(data.decode(raw, source), source)
    try:
        for paragraph in [paragraph for article in content["data"] for paragraph in article["paragraphs"]]:
            context = make_context(glue.read_cell(paragraph, "context", where), wordpiece)
            for entry in paragraph["qas"]:
                name = glue.read_cell(entry, "id", where)
                where = f"{source}, question {name}"
                answers = [(glue.read_cell(answer, "text", where), operator.index(answer["answer_start"]))
                           for answer in entry["answers"]]
                if entry.get("is_impossible"):
                    answers = []
                yield where, name, glue.read_cell(entry, "question", where), context, answers
    except (KeyError, TypeError) as error:
        raise data.UserError(f"{where}, or what follows it, is not in SQuAD's format ({error})") from None


def make_context(text, wordpiece):
    """The Context of a text. Each word is tokenized by itself; some have no piece. [Q08]"""
    matches = list(re.finditer("[^ \t\r\n\u202f]+", text))  # [Q05] a no-break space does not end a word
    words = [match[0] for match in matches]
    pieces = []
    word_of = []
    for number, ids in enumerate(wordpiece.encode(words)):
        pieces += ids
        word_of += [number] * len(ids)
    return Context(words, [match.start() for match in matches], pieces, word_of)


def find_answer(answer, start, context, wordpiece):
    """The first and the last piece of an answer at a character, or None if the words there lack it.

    In its words, the first pieces that spell the answer are taken, as "1895" in "(1895-1943),". If none do, as
    for "Japan" in "Japanese", all pieces of the words are taken. [Q09]
    """
    # [Q06] From the word of the first character to that of the last. A space belongs to the word before it.
    first_word = bisect.bisect_right(context.starts, start) - 1
    last_word = bisect.bisect_right(context.starts, start + len(answer) - 1) - 1
    found = " ".join(context.words[first_word : last_word + 1]).lower()
    wanted = " ".join(answer.split()).lower()
    if not wanted or wanted not in found:  # [Q07]
        return None
    first = bisect.bisect_left(context.word_of, first_word)
    last = bisect.bisect_right(context.word_of, last_word) - 1
    [ids] = wordpiece.encode([answer])
    for begin in range(first, last - len(ids) + 2):
        if ids and context.pieces[begin : begin + len(ids)] == ids:
            return begin, begin + len(ids) - 1
    return first, last


# ------------------------------------------------------------------------------------------------------------
# Windows


class Window(NamedTuple):
    """The pieces [begin, end) of a context, and the position of the first in the row."""

    begin: int
    end: int
    offset: int


def make_windows(questions, wordpiece, max_length, stride):
    """Rows, uint16 (N, max_length), zero-padded, their labels (N, 3), and the Windows of each question. [Q15]"""
    rows = []
    labels = []
    windows = []
    for question in questions:
        # [Q12] 13 pieces are left to the context. Unlike here, the official loop never ends if none are.
        ids = question.pieces[: min(QUESTION_LENGTH, max_length - 16)]  # [Q10]
        offset = len(ids) + 2  # [Q13] after [CLS], question and [SEP]; another [SEP] ends the row
        pieces = question.context.pieces
        own = [Window(*span, offset) for span in spans(len(pieces), max_length - offset - 1, stride)]
        for window in own:
            row = wordpiece.add_special_tokens(ids, pieces[window.begin : window.end])
            rows.append(np.pad(np.array(row, np.uint16), (0, max_length - len(row))))
            labels.append(make_label(question.span, window))
        windows.append(own)
    return np.array(rows).reshape(-1, max_length), np.array(labels).reshape(-1, 3), windows


def spans(num_pieces, room, stride):
    """Yield (begin, end) of each window: `room` pieces, a stride apart, but without a gap. [Q11]

    >>> list(spans(10, 4, 3)), list(spans(10, 4, 8))
    ([(0, 4), (3, 7), (6, 10)], [(0, 4), (4, 8), (8, 10)])
    """
    for begin in range(0, num_pieces, min(room, stride)):
        yield begin, min(begin + room, num_pieces)
        if begin + room >= num_pieces:
            return


def make_label(span, window):
    """(Start, end, 0): the positions of an answer; or (0, 0, 1) if it is not wholly in the window. [Q15]

    >>> make_label((5, 6), Window(4, 9, 12)), make_label((8, 9), Window(4, 9, 12))
    ((13, 14, 0), (0, 0, 1))
    """
    if span is None or not window.begin <= span[0] <= span[1] < window.end:
        # [Q16] Unlike in the official code, which has (0, 0, 0) if another window holds the answer. But the
        # lowest null score of the windows decides, so a window without the answer should have a high one.
        return 0, 0, 1
    shift = window.offset - window.begin
    return span[0] + shift, span[1] + shift, 0


# ------------------------------------------------------------------------------------------------------------
# The head


class Output(NamedTuple):
    """Of each of B rows the K = BEAM likeliest starts, the K likeliest ends for each, and the null score."""

    starts: torch.Tensor  # (B, K) positions
    start_log_probs: torch.Tensor  # (B, K)
    ends: torch.Tensor  # (B, K, K) positions
    end_log_probs: torch.Tensor  # (B, K, K) given the start
    null_logits: torch.Tensor  # (B,) above 0 for "no answer here"


class QuestionAnswerer(nn.Module):
    """The pre-trained encoder, and a head that predicts an answer's start and, given the start, its end."""

    architecture = "ElectraModel"  # saved as a plain encoder: the head in transformers is another one [Q59]

    def __init__(self, config):
        super().__init__()
        H = config.hidden_size
        self.config = config
        self.encoder = model.Encoder(config)
        self.start = nn.Linear(H, 1)  # [Q19]
        self.end_hidden = nn.Linear(2 * H, HEAD_WIDTH)
        self.end = nn.Linear(HEAD_WIDTH, 1)
        self.null_hidden = nn.Linear(2 * H, HEAD_WIDTH)
        self.null = nn.Linear(HEAD_WIDTH, 1)
        for linear in (self.start, self.end_hidden, self.end, self.null_hidden, self.null):
            model.glorot_uniform_(linear)  # [Q24]

    def forward(self, input_ids):
        """The Output for rows (B, L)."""
        hidden, mask, start_logits = self.encode(input_ids)
        start_log_probs, starts = largest(start_logits.log_softmax(1))
        end_log_probs, ends = largest(self.end_logits(hidden, mask, starts).log_softmax(2))
        return Output(starts, start_log_probs, ends, end_log_probs, self.null_logits(hidden, start_logits))

    def losses(self, input_ids, labels):
        """The loss (B,) of rows (B, L) with labels (B, 3)."""
        start, end, is_null = labels.unbind(1)
        hidden, mask, start_logits = self.encode(input_ids)
        end_logits = self.end_logits(hidden, mask, start[:, None])[:, 0]  # [Q22] given the true start
        start_losses = F.cross_entropy(start_logits, start, reduction="none")
        end_losses = F.cross_entropy(end_logits, end, reduction="none")
        null_logits = self.null_logits(hidden, start_logits)
        null_losses = F.binary_cross_entropy_with_logits(null_logits, is_null.to(null_logits), reduction="none")
        return (start_losses + end_losses) / 2 + 0.5 * null_losses  # [Q26] [Q27] [Q28] of 1.1, too

    def encode(self, input_ids):
        """Token vectors (B, L, H), the mask (B, L) to add to logits, and the masked start logits (B, L)."""
        attention_mask, token_type_ids = model.mask_and_types(input_ids, self.config.sep_token_id)
        hidden = self.encoder(input_ids, attention_mask, token_type_ids)
        is_allowed = token_type_ids.clone()  # the context and the last [SEP]
        is_allowed[:, 0] = 1  # [CLS], which stands for "no answer here"
        mask = 1000.0 * (is_allowed - 1)  # [Q20] not minus infinity
        return hidden, mask, model.in_fp32(self.start(hidden).squeeze(2)) + mask  # [Q21]

    def end_logits(self, hidden, mask, starts):
        """Logits (B, S, L) of the end given each of the starts (B, S)."""
        # A layer on [start vector; end vector] is the sum of two, each of which is applied once to a vector.
        start_weight, end_weight = self.end_hidden.weight.chunk(2, dim=1)
        start_vectors = hidden.gather(1, starts[..., None].expand(-1, -1, hidden.shape[2]))  # (B, S, H)
        from_start = F.linear(start_vectors, start_weight)  # (B, S, HEAD_WIDTH)
        from_end = F.linear(hidden, end_weight, self.end_hidden.bias)  # (B, L, HEAD_WIDTH)
        # One start after the other: all at once they would not fit into memory.
        logits = [self.end(F.gelu(from_end + vector[:, None])) for vector in from_start.unbind(1)]
        return model.in_fp32(torch.stack(logits, 1).squeeze(3)) + mask[:, None]

    def null_logits(self, hidden, start_logits):
        """Logits (B,) of "no answer here", from [CLS] and the mean of all vectors, weighted as starts. [Q23]"""
        start_probs = start_logits.softmax(1).to(hidden.dtype)
        mean = (start_probs[:, None] @ hidden).squeeze(1)  # (B, H)
        return model.in_fp32(self.null(F.gelu(self.null_hidden(torch.cat([hidden[:, 0], mean], 1)))).squeeze(1))


def largest(log_probs):
    """The BEAM largest values along the last dimension, and their indices; of equal ones, the first."""
    values, indices = log_probs.sort(dim=-1, descending=True, stable=True)
    return values[..., :BEAM], indices[..., :BEAM]


# ------------------------------------------------------------------------------------------------------------
# Answers


class Answer(NamedTuple):
    text: str
    start_log_prob: float
    end_log_prob: float


def answer_questions(questions, windows, output, wordpiece):
    """For each question its best Answers and its null score. `output` holds the NumPy arrays of all rows."""
    rows = (Output(*fields) for fields in zip(*output, strict=True))
    answers = []
    for question, own in zip(questions, windows, strict=True):
        outputs = [next(rows) for _ in own]
        # [Q36] No span's score is in it. A context without pieces has no window, and no answer.
        null_score = min((float(output.null_logits) for output in outputs), default=math.inf)
        answers.append((n_best(question.context, own, outputs, wordpiece), null_score))
    return answers


def n_best(context, windows, outputs, wordpiece):
    """The N_BEST likeliest Answers, each text once, from the windows of a question and the Output of each."""
    found = []
    for window, output in zip(windows, outputs, strict=True):
        shift = window.begin - window.offset
        for i, start in enumerate(output.starts + shift):
            if not window.begin <= start < window.end or best_window(start, windows) != window:
                continue
            ends = output.ends[i] + shift
            is_kept = (start <= ends) & (ends < window.end) & (ends < start + ANSWER_LENGTH)  # [Q30]
            for j in np.flatnonzero(is_kept):
                found.append((start, ends[j], output.start_log_probs[i], output.end_log_probs[i, j]))
    # [Q31] Each window has probabilities of its own, yet they are compared. [Q32] The sort is stable.
    found.sort(key=lambda candidate: candidate[2] + candidate[3], reverse=True)
    answers = {}
    for start, end, start_log_prob, end_log_prob in found:
        spelled = wordpiece.decode(context.pieces[start : end + 1]).removeprefix("##")
        words = context.words[context.word_of[start] : context.word_of[end] + 1]
        text = original_text(spelled, " ".join(words), wordpiece)
        answers.setdefault(text, Answer(text, float(start_log_prob), float(end_log_prob)))  # [Q33]
        if len(answers) == N_BEST:
            break
    # [Q34] Unlike in the official code, where the answer is then the word "empty".
    return list(answers.values()) or [Answer("", 0.0, 0.0)]


def best_window(piece, windows):
    """The window in which a piece counts, because it has most context there. [Q14]

    >>> [best_window(piece, [Window(0, 4, 9), Window(2, 6, 9)]).begin for piece in range(6)]
    [0, 0, 0, 2, 2, 2]
    """
    return max((window for window in windows if window.begin <= piece < window.end),
               key=lambda window: min(piece - window.begin, window.end - 1 - piece)
               + 0.01 * (window.end - window.begin))


def original_text(spelled, words, wordpiece):
    """The part of `words` that was tokenized to `spelled`, or all of it if the two cannot be aligned. [Q38]

    They differ in case, accents and spaces: "1895" is found in "(1895-1943),", "zurich" in "Zürich.".
    """
    tokens = wordpiece.tokenizer.pre_tokenizer.pre_tokenize_str(wordpiece.normalize(words))
    tokenized = " ".join(token for token, _ in tokens)
    begin = tokenized.find(spelled)  # [Q39] the first occurrence
    places = [place for place, character in enumerate(words) if character != " "]
    if not spelled or begin < 0 or len(places) != len(tokenized.replace(" ", "")):
        return words
    first = len(tokenized[:begin].replace(" ", ""))
    last = first + len(spelled.replace(" ", "")) - 1
    return words[places[first] : places[last] + 1]


# ------------------------------------------------------------------------------------------------------------
# Metrics, as fractions of 1


def score(questions, texts, null_scores, version):
    """Metrics by name, and for 2.0 the thresholds of the best ones, for the best text of each question."""
    metrics = {}
    thresholds = {}
    has_answer = np.array([bool(question.answers) for question in questions])
    null_scores = np.array(null_scores)
    for name, metric in ("exact", exact), ("f1", f1):
        scores = np.array([max(metric(text, gold, version) for gold in golds(question.answers, version))
                           for question, text in zip(questions, texts, strict=True)])  # [Q42]
        if version == "1.1":
            metrics[name] = float(scores.mean())  # [Q40] every question is answered
            continue
        unanswered = 1.0 - has_answer  # the scores if no question were answered
        gain, thresholds[name] = best_threshold(scores - unanswered, null_scores)
        metrics[f"best {name}"] = float(unanswered.mean() + gain / len(questions))
        at_official = np.where(null_scores > OFFICIAL_THRESHOLD, unanswered, scores)  # [Q37] [Q44]
        for group, is_in_group in ("", has_answer | True), (" answerable", has_answer), (" unanswerable", ~has_answer):
            if is_in_group.any():
                metrics[f"{name}{group} at {OFFICIAL_THRESHOLD}"] = float(at_official[is_in_group].mean())
    return metrics, thresholds


def best_threshold(gains, null_scores):
    """(Total gain, threshold) if the best threshold decides which questions are answered. [Q46]

    Answered are those whose null score is at most the threshold; each adds its gain (N,), which can be negative.

    >>> best_threshold(np.array([0.5, -1.0, 1.0]), np.array([-3.0, 2.0, 2.0]))
    (0.5, -3.0)
    """
    order = np.argsort(null_scores, kind="stable")
    totals = np.append(0.0, gains[order]).cumsum()
    thresholds = np.append(null_scores[order[0]] - 1, null_scores[order])
    # Unlike in the official code, equal null scores are on the same side of the threshold, and if no question
    # should be answered, the threshold is below all null scores, not 0.
    is_possible = np.append(thresholds[:-1] < thresholds[1:], True)
    best = np.where(is_possible, totals, -np.inf).argmax()
    return float(totals[best]), float(thresholds[best])


def golds(answers, version):
    """The texts with which a prediction is compared. [Q43]"""
    if version == "1.1":
        return answers
    return [answer for answer in answers if normalize(answer)] or [""]


def exact(text, gold, version):
    return float(normalize(text) == normalize(gold))


def f1(text, gold, version):
    """F1 of the words in two texts, counted as often as they occur."""
    text, gold = normalize(text).split(), normalize(gold).split()
    if version == "2.0" and not (text and gold):  # [Q43]
        return float(text == gold)
    common = sum((Counter(text) & Counter(gold)).values())
    return 2 * common / (len(text) + len(gold)) if common else 0.0


def normalize(text):
    """Lower case, without ASCII punctuation, articles and extra spaces, in this order. [Q41]

    >>> normalize("The A.B. of 10,000  cafés")
    'ab of 10000 cafés'
    """
    text = "".join(character for character in text.lower() if character not in string.punctuation)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", text).split())
