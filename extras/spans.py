"""From a question and a context to rows, and from the network's output back to the answer's characters.

A context is split into words, and these into word pieces. Each row has the question and a window, as many
pieces of the context as fit; the windows of a long context overlap. The head points at the start and the end
of the answer in a row. On the way back, the best spans in all windows of a question become text. squad.py has
the files and the metrics. [Qnn] marks a detail that DETAILS.md explains and links to the official code.
"""

import bisect
import re
import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import model

QUESTION_LENGTH = 64  # pieces to which a question is cut
ANSWER_LENGTH = 30  # pieces in the longest answer
BEAM = 20  # starts of a row, ends of each start, and answers of a question
HEAD_WIDTH = 512  # of the head's hidden layers, whatever the width of the encoder


class Context(NamedTuple):
    words: list
    starts: list  # the character at which each word begins
    pieces: list  # their ids
    word_of: list  # the number of the word in which each piece lies


class Question(NamedTuple):
    id: str
    pieces: list  # ids
    context: Context
    answers: list  # texts; empty if the context has no answer
    span: tuple | None  # the first and the last piece of the answer to learn, if there is one


class Window(NamedTuple):
    """The pieces [begin, end) of a context, and the position of the first of them in the row."""

    begin: int
    end: int
    offset: int


class Tokenized(NamedTuple):
    """Questions as the network takes them, and what leads from its output back to the text."""

    rows: np.ndarray  # uint16 (N, max_length), zero-padded
    labels: np.ndarray  # (N, 3): start, end, 1 if the context has no answer
    questions: list
    windows: list  # the Windows of each question, one for a row


# ------------------------------------------------------------------------------------------------------------
# From text to pieces


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


def locate_answer(answer, start, context, wordpiece):
    """The (first, last) piece of an answer that begins at a character, or None if it is not there."""
    if not context.words:
        return None
    end_of_context = context.starts[-1] + len(context.words[-1])
    if start + len(answer.rstrip()) > end_of_context:
        return None  # [Q07]
    # [Q06] From the word of the first character to that of the last. A space belongs to the word before it.
    first_word = bisect.bisect_right(context.starts, start) - 1
    last_word = bisect.bisect_right(context.starts, start + len(answer) - 1) - 1
    found = " ".join(context.words[first_word : last_word + 1]).lower()
    wanted = " ".join(answer.split()).lower()
    if not wanted or wanted not in found:
        return None
    first = bisect.bisect_left(context.word_of, first_word)
    last = bisect.bisect_right(context.word_of, last_word) - 1
    [ids] = wordpiece.encode([answer])
    begin = find_sublist(ids, context.pieces[first : last + 1])
    if not ids or begin is None:
        return first, last
    return first + begin, first + begin + len(ids) - 1


def find_sublist(wanted, items):
    """The first place in a list at which another begins, or None. [Q09]

    Of the word "(1895-1943)," only "1895" is learned. "Japan" is not found in "Japanese", which is one piece.

    >>> find_sublist([1895], [7, 1895, 8, 1943, 9]), find_sublist([1895], [1896])
    (1, None)
    """
    for place in range(len(items)):
        if items[place : place + len(wanted)] == wanted:
            return place
    return None


# ------------------------------------------------------------------------------------------------------------
# From pieces to rows


def make_windows(questions, wordpiece, max_length, stride):
    """The Tokenized questions. All windows of a context become rows, with and without the answer. [Q15]"""
    rows = []
    labels = []
    windows = []
    for question in questions:
        # [Q12] At least 13 pieces fit beside a question. The official loop never ends if it fills the row.
        ids = question.pieces[: min(QUESTION_LENGTH, max_length - 16)]  # [Q10]
        offset = len(ids) + 2  # [Q13] after [CLS], question and [SEP]; another [SEP] ends the row
        pieces = question.context.pieces
        bounds = window_bounds(len(pieces), max_length - offset - 1, stride)
        question_windows = [Window(begin, end, offset) for begin, end in bounds]
        for window in question_windows:
            row = wordpiece.add_special_tokens(ids, pieces[window.begin : window.end])
            rows.append(np.pad(np.array(row, np.uint16), (0, max_length - len(row))))
            labels.append(make_label(question.span, window))
        windows.append(question_windows)
    rows = np.array(rows, dtype=np.uint16).reshape(-1, max_length)
    return Tokenized(rows, np.array(labels).reshape(-1, 3), questions, windows)


def window_bounds(num_pieces, room, stride):
    """Yield (begin, end) of each window: `room` pieces, a stride apart, but without a gap. [Q11]

    >>> list(window_bounds(10, 4, 3)), list(window_bounds(10, 4, 8))
    ([(0, 4), (3, 7), (6, 10)], [(0, 4), (4, 8), (8, 10)])
    """
    for begin in range(0, num_pieces, min(room, stride)):
        yield begin, min(begin + room, num_pieces)
        if begin + room >= num_pieces:
            return


def make_label(span, window):
    """(Start, end, 0) of an answer in a row, (0, 0, 0) if it is not wholly in the window. [Q15] [Q16]

    >>> make_label((5, 6), Window(4, 9, 12)), make_label((8, 9), Window(4, 9, 12)), make_label(None, ...)
    ((13, 14, 0), (0, 0, 0), (0, 0, 1))
    """
    if span is None:  # the context has no answer
        return 0, 0, 1
    if not window.begin <= span[0] <= span[1] < window.end:
        return 0, 0, 0
    shift = window.offset - window.begin
    return span[0] + shift, span[1] + shift, 0


# ------------------------------------------------------------------------------------------------------------
# The head


class Output(NamedTuple):
    """The likeliest spans of each of B rows, K = BEAM."""

    starts: torch.Tensor  # (B, K) positions, the likeliest first
    start_log_probs: torch.Tensor  # (B, K)
    ends: torch.Tensor  # (B, K, K) positions, for each start the likeliest first
    end_log_probs: torch.Tensor  # (B, K, K) given the start
    null_logits: torch.Tensor  # (B,) above 0 for "not here"


class QuestionAnswerer(nn.Module):
    """The pre-trained encoder, and a head that predicts an answer's start and, given the start, its end."""

    architecture = "ElectraModel"  # saved as a plain encoder: the head in transformers is another one

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
            model.init_glorot_uniform(linear)  # [Q24]

    def forward(self, input_ids):
        """Rows (B, L) -> an Output."""
        input_ids = F.pad(input_ids, (0, max(0, BEAM - input_ids.shape[1])))  # so that it has BEAM places
        hidden, mask, start_logits = self.encode(input_ids)
        start_log_probs, starts = start_logits.log_softmax(1).topk(BEAM)
        end_log_probs, ends = self.end_logits(hidden, mask, starts).log_softmax(2).topk(BEAM)  # [Q22]
        return Output(starts, start_log_probs, ends, end_log_probs, self.null_logits(hidden, start_logits))

    def losses(self, input_ids, labels):
        """The losses (B,) of rows (B, L) with labels (B, 3)."""
        start, end, is_null = labels.unbind(1)
        hidden, mask, start_logits = self.encode(input_ids)
        end_logits = self.end_logits(hidden, mask, start[:, None])[:, 0]  # [Q22] given the true start
        start_losses = F.cross_entropy(start_logits, start, reduction="none")
        end_losses = F.cross_entropy(end_logits, end, reduction="none")
        null_logits = self.null_logits(hidden, start_logits)
        null_losses = F.binary_cross_entropy_with_logits(null_logits, is_null.to(null_logits.dtype),
                                                         reduction="none")
        return (start_losses + end_losses) / 2 + 0.5 * null_losses  # [Q26] [Q27] [Q28] of 1.1, too

    def encode(self, input_ids):
        """Token vectors (B, L, H), the mask (B, L) to add to logits, and the masked start logits (B, L)."""
        attention_mask, token_type_ids = model.attention_mask_and_token_types(
            input_ids, self.config.sep_token_id)
        hidden = self.encoder(input_ids, attention_mask, token_type_ids)
        is_allowed = token_type_ids.clone()  # the context and the last [SEP]
        is_allowed[:, 0] = 1  # [CLS], which stands for "not here"
        mask = 1000.0 * (is_allowed - 1)  # [Q20] not minus infinity
        return hidden, mask, model.in_fp32(self.start(hidden).squeeze(2)) + mask  # [Q21]

    def end_logits(self, hidden, mask, starts):
        """Logits (B, S, L) of the end given each of the starts (B, S)."""
        # The hidden layer's input is [start vector; end vector]. Each half is multiplied once, then added.
        start_weight, end_weight = self.end_hidden.weight.chunk(2, dim=1)
        start_vectors = hidden.gather(1, starts[..., None].expand(-1, -1, hidden.shape[2]))  # (B, S, H)
        from_start = F.linear(start_vectors, start_weight)  # (B, S, HEAD_WIDTH)
        from_end = F.linear(hidden, end_weight, self.end_hidden.bias)  # (B, L, HEAD_WIDTH)
        # One start after the other: (B, S, L, HEAD_WIDTH) would be a gigabyte.
        logits = [self.end(F.gelu(from_end + vector[:, None])) for vector in from_start.unbind(1)]
        return model.in_fp32(torch.stack(logits, 1).squeeze(3)) + mask[:, None]

    def null_logits(self, hidden, start_logits):
        """Logits (B,) of "not here", from [CLS] and the mean vector under the start probabilities. [Q23]"""
        start_probs = start_logits.softmax(1).to(hidden.dtype)
        mean = (start_probs[:, None] @ hidden).squeeze(1)  # (B, H)
        null_hidden = F.gelu(self.null_hidden(torch.cat([hidden[:, 0], mean], 1)))
        return model.in_fp32(self.null(null_hidden).squeeze(1))


# ------------------------------------------------------------------------------------------------------------
# From the output to the answers


def find_answers(questions, windows, output, wordpiece):
    """The `n_best` answers and the null score of each question. `output` is that of all rows, in NumPy."""
    rows = [Output(*row) for row in zip(*output, strict=True)]
    first_row = 0
    answers = []
    for question, question_windows in zip(questions, windows, strict=True):
        outputs = rows[first_row : first_row + len(question_windows)]
        first_row += len(question_windows)
        # [Q36] No span's score is in it. A context without pieces has no window, and so no answer.
        null_score = min((float(output.null_logits) for output in outputs), default=float("inf"))
        answers.append((n_best(question.context, question_windows, outputs, wordpiece), null_score))
    return answers


def n_best(context, windows, outputs, wordpiece):
    """The BEAM likeliest answers, {text: log-probability}, in a question's windows and the Output of each."""
    found = []
    for window, output in zip(windows, outputs, strict=True):
        found += list_spans(window, output, windows)
    # [Q31] Each window has probabilities of its own, yet they are compared. [Q32] The sort is stable.
    found.sort(key=lambda span: span[0], reverse=True)
    answers = {}
    for log_prob, start, end in found:
        spelled = wordpiece.decode(context.pieces[start : end + 1]).removeprefix("##")
        words = context.words[context.word_of[start] : context.word_of[end] + 1]
        answers.setdefault(original_text(spelled, " ".join(words), wordpiece), float(log_prob))  # [Q33]
        if len(answers) == BEAM:
            break
    return answers or {"": 0.0}  # [Q34] Unlike in the official code, which answers "empty".


def list_spans(window, output, windows):
    """Yield (log-probability, first piece, last piece) of the possible spans of a window. [Q30]"""
    shift = window.begin - window.offset  # from positions in the row to pieces of the context
    for i, start in enumerate(output.starts + shift):
        if not window.begin <= start < window.end or best_window(start, windows) != window:
            continue
        ends = output.ends[i] + shift
        is_possible = (start <= ends) & (ends < window.end) & (ends < start + ANSWER_LENGTH)
        for j in np.flatnonzero(is_possible):
            yield output.start_log_probs[i] + output.end_log_probs[i, j], start, ends[j]


def best_window(piece, windows):
    """The window in which a piece counts, because it has most context there; of equals, the first. [Q14]

    >>> [best_window(piece, [Window(0, 4, 9), Window(2, 6, 9)]).begin for piece in range(6)]
    [0, 0, 0, 2, 2, 2]
    """
    def context_around(window):
        return min(piece - window.begin, window.end - 1 - piece) + 0.01 * (window.end - window.begin)

    return max((window for window in windows if window.begin <= piece < window.end), key=context_around)


def original_text(spelled, words, wordpiece):
    """The part of `words` that was tokenized to `spelled`, or all of it if the two cannot be aligned. [Q38]

    They differ in case, accents and spaces: "1895" is found in "(1895-1943),", and "zurich" in "Zürich.".
    """
    tokens = wordpiece.tokenizer.pre_tokenizer.pre_tokenize_str(wordpiece.normalize(words))
    tokenized = " ".join(token for token, _ in tokens)
    begin = tokenized.find(spelled)  # the first occurrence
    places = [place for place, character in enumerate(words) if character != " "]
    if begin < 0 or len(places) != len(tokenized.replace(" ", "")):
        return words
    first = len(tokenized[:begin].replace(" ", ""))
    last = first + len(spelled.replace(" ", "")) - 1
    return words[places[first] : places[last] + 1]
