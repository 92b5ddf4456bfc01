"""Tests of extras/: questions (squad.py, spans.py), then words (tagging.py).

official/qa/edge.json and official/tagging say what was recorded of the official code. Each test of a detail
Q04 to Q47 or T01 to T16 quotes the fact that it checks.
"""

import doctest
import gzip
import hashlib
import io
import itertools
import json
import random
import re
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import data
import finetune
import model
import spans
import squad
import tagging
import train
from test_electra import NoSync, Recorded, find_network, official_views, read_results, watch, write_files

OFFICIAL = Path(__file__).parent.parent / "official"


def test_examples_in_docstrings_are_right():
    """The worked examples in docstrings run as they are written."""
    for module in spans, squad, tagging:
        result = doctest.testmod(module)
        assert result.attempted >= 2 and not result.failed


# ============================================================================================================
# Questions

QA = OFFICIAL / "qa"
EDGE = json.loads((QA / "edge.json").read_text())
WORDPIECE = data.WordPiece(EDGE["vocab"])
MAX_LENGTH = 80
STRIDE = 24


def squad_file(paragraphs):
    """The bytes of a file with these paragraphs, (context, [(id, question, [(answer, start)])])."""
    def entry(name, question, answers):
        return dict(id=name, question=question, is_impossible=not answers,
                    answers=[dict(text=text, answer_start=start) for text, start in answers])

    content = [dict(context=context, qas=[entry(*row) for row in rows]) for context, rows in paragraphs]
    return json.dumps(dict(version="2.0", data=[dict(title="own", paragraphs=content)])).encode()


def read(raw, version="2.0", is_training=False):
    return squad.read_questions(raw, "file.json", version, WORDPIECE, is_training)


@pytest.fixture(scope="module")
def record():
    """The recorded questions as read for training and evaluation, their windows, and their answers."""
    raw = json.dumps(EDGE["squad"]).encode()
    train = {question.id: question for question in read(raw, is_training=True)}
    dev = read(raw)
    rows, labels, _, windows = spans.make_windows([train.get(question.id, question) for question in dev],
                                                  WORDPIECE, MAX_LENGTH, STRIDE)
    numbers = np.repeat(np.arange(len(dev)), [len(own) for own in windows])
    official = [(dev[number], window, EDGE["features"][dev[number].id]) for number, window in
                zip(numbers, [window for own in windows for window in own], strict=True)]
    recorded = [entry for question in dev for entry in EDGE["features"][question.id]["windows"]]
    outputs = np.load(QA / "edge.npz")
    output = spans.Output(outputs["start_top_index"].astype(int), outputs["start_top_log_probs"],
                          outputs["end_top_index"].astype(int), outputs["end_top_log_probs"],
                          outputs["answerable_logit"])
    return SimpleNamespace(train=train, dev=dev, rows=rows, labels=labels, windows=windows, official=official,
                           recorded=recorded, answers=spans.find_answers(dev, windows, output, WORDPIECE))


# ------------------------------------------------------------------------------------------------------------
# Reading


def read_split(version, split, data_dir=""):
    """The questions of a split, as the command reads them, and the SHA-256 of their file."""
    config = squad.SquadConfig(version=version, data_dir=str(data_dir))
    (raw, path), sha256 = squad.Experiment.read(SimpleNamespace(config=config), split)
    return squad.read_questions(raw, path, version, WORDPIECE, is_training=split == "train"), sha256


def test_official_files_are_checked(tmp_path, monkeypatch):
    """SQuAD's four files have these addresses, sizes and SHA-256; "squad" is 2.0."""
    fetched = []
    raw = squad_file([("the dam", [("a", "what", [("dam", 4)])])])
    (tmp_path / "own.json").write_bytes(raw)
    monkeypatch.setattr(squad.glue, "fetch_official",
                        lambda source, cache, flag: fetched.append(source) or tmp_path / "own.json")
    for version, split in ("1.1", "train"), ("1.1", "dev"), ("2.0", "train"), ("2.0", "dev"):
        [question], sha256 = read_split(version, split)
        assert question.id == "a" and sha256 == hashlib.sha256(raw).hexdigest()
    site = "https://rajpurkar.github.io/SQuAD-explorer/dataset/"
    assert [(address.removeprefix(site), size, sha256[:8]) for address, size, sha256 in fetched] == [
        ("train-v1.1.json", 30288272, "35276639"), ("dev-v1.1.json", 4854279, "95aa6a52"),
        ("train-v2.0.json", 42123633, "68dcfbb9"), ("dev-v2.0.json", 4370528, "80a5225e")]


def test_Q04_a_folder_is_read_and_training_takes_the_first_answer(tmp_path):
    """Training takes answers[0] alone; evaluation has all answers and no positions."""
    raw = squad_file([("the dam is tall", [("a", "what", [("tall", 11), ("dam", 4)]), ("b", "who", [])])])
    for split in ("train", "dev"):
        (tmp_path / f"{split}.json").write_bytes(raw)
    train, _ = read_split("2.0", "train", tmp_path)
    dev, _ = read_split("2.0", "dev", tmp_path)
    assert [question.span for question in train] == [(3, 3), None]
    assert [question.span for question in dev] == [None, None]
    assert [question.answers for question in train] == [["tall", "dam"], []] == [q.answers for q in dev]
    contradiction = json.loads(raw)
    contradiction["data"][0]["paragraphs"][0]["qas"][0]["is_impossible"] = True
    assert read(json.dumps(contradiction).encode(), is_training=True)[0].answers == []


def test_Q05_five_characters_separate_words(record):
    """Words end at space, tab, CR, LF and U+202F, nothing else."""
    for question in record.dev:
        assert question.context.words == EDGE["features"][question.id]["doc_tokens"]
    assert {character for character in map(chr, range(0x10000)) if not 0xD800 <= ord(character) < 0xE000
            and len(spans.make_context(f"a{character}b", WORDPIECE).words) == 2} == set(" \t\r\n\u202f")


def test_Q06_Q07_misplaced_answers_are_left_out_of_training(record, capsys):
    """Dropped are answers that the words at their place do not contain; dev questions never are."""
    dropped = {name for name, entry in EDGE["features"].items() if entry["dropped_from_training"]}
    assert {question.id for question in record.dev} - record.train.keys() == dropped and len(dropped) == 4
    read(json.dumps(EDGE["squad"]).encode(), is_training=True)
    assert capsys.readouterr().out == ("left out 4 questions whose answer is not at its answer_start; the "
                                       "first is file.json, question no-break-space\n")
    asked = [(str(place), "what", [("dam ", place)]) for place in (-1, 4, 9)]
    [kept] = read(squad_file([("the dam ", asked)]), is_training=True)
    assert (kept.id, kept.span) == ("4", (1, 1))  # the others begin before and beyond the context


# ------------------------------------------------------------------------------------------------------------
# Windows


def test_Q08_Q10_Q13_rows_are_the_official_ones(record):
    """[CLS] question [SEP] context [SEP], zero-padded, the question cut to 64 pieces, token by token."""
    assert len(record.rows) == len(record.recorded) == 52
    for row, (question, window, _), entry in zip(record.rows, record.official, record.recorded, strict=True):
        size = len(entry["tokens"])
        assert [WORDPIECE.tokens[number] for number in row[:size]] == entry["tokens"] and not row[size:].any()
        assert window.offset == entry["first_context_position"]
        assert question.context.word_of[window.begin : window.end] == entry["words"]
    assert max(window.offset for _, window, _ in record.official) == 66


def test_Q09_Q15_labels_are_the_official_ones(record):
    """The first sub-span that spells the answer; 0 and 0 in a window that does not hold all of it."""
    checked = 0
    for label, (_, _, feature), entry in zip(record.labels, record.official, record.recorded, strict=True):
        if not feature["dropped_from_training"]:
            assert [*label[:2]] == [entry["start"], entry["end"]]
            checked += 1
    assert checked == 48


def test_Q11_windows_are_the_official_loops():
    """Windows start at 0 and every min(length, stride) pieces until one reaches the end of the context."""
    random_ = random.Random(0)
    for _ in range(500):
        size, room, stride = random_.randint(0, 60), random_.randint(1, 30), random_.randint(1, 40)
        expected, start = [], 0
        while start < size:
            length = min(size - start, room)
            expected.append((start, start + length))
            if start + length == size:
                break
            start += min(length, stride)
        assert list(spans.window_bounds(size, room, stride)) == expected, (size, room, stride)


@pytest.mark.parametrize("max_length", [32, 64, 67, 79])
def test_Q12_a_question_as_long_as_the_row_leaves_room(max_length):
    """The official loop never ends if 64 + 3 >= max_seq_length; here 13 pieces of the context fit."""
    questions = read(squad_file([("dam " * 40, [("a", "very " * 70, [])])]))
    rows, _, _, [windows] = spans.make_windows(questions, WORDPIECE, max_length, 8)
    assert {window.end - window.begin for window in windows[:-1]} == {13} and windows[-1].end == 40
    assert rows[0].all()


def test_Q14_a_piece_counts_where_it_has_most_context(record):
    """The highest of min(left, right) + 0.01 x window length, the first of equals."""
    ours = [[int(spans.best_window(piece, own) == window) for piece in range(window.begin, window.end)]
            for own in record.windows for window in own]
    assert ours == [entry["max_context"] for entry in record.recorded]
    long, short = spans.Window(0, 300, 9), spans.Window(290, 320, 9)
    assert spans.best_window(295, [long, short]) == long  # 4 + 3.0 is more than 5 + 0.3
    assert spans.best_window(297, [long, short]) == short


def test_Q16_answerability_is_the_questions(record):
    """A window without the answer of an answerable question has positions 0 and is_impossible 0."""
    without = set()
    for label, (question, _, _), entry in zip(record.labels, record.official, record.recorded, strict=True):
        if entry["start"] is not None:
            assert label[2] == entry["is_impossible"]
            if entry["start"] == 0 and question.answers:
                without.add(question.id)
    assert without == {"several-windows", "answer-over-a-border", "answer-longer-than-a-window",
                       "between-windows"}


# ------------------------------------------------------------------------------------------------------------
# The head


def make_network(**changes):
    shape = dict(vocab_size=100, hidden_size=64, embedding_size=64, num_hidden_layers=2,
                 num_attention_heads=4, intermediate_size=128, max_position_embeddings=128,
                 hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, cls_token_id=2, sep_token_id=3)
    torch.manual_seed(0)
    return spans.QuestionAnswerer(model.ElectraConfig(**shape | changes))


def test_Q19_Q24_the_head_has_five_layers_with_glorot_weights():
    """Five dense layers, hidden ones 512 whatever H: 526,595 parameters in small, 1,575,683 in base."""
    for hidden_size, expected in (256, 526_595), (768, 1_575_683):
        network = make_network(hidden_size=hidden_size, num_hidden_layers=1)
        head = {name: p for name, p in network.named_parameters() if not name.startswith("encoder.")}
        assert sum(parameter.numel() for parameter in head.values()) == expected
        for name, parameter in head.items():
            limit = (6 / sum(parameter.shape)) ** 0.5 if name.endswith("weight") else 0.0
            assert 0.9 * limit <= parameter.abs().max() <= limit, name


@pytest.fixture
def head():
    """The recorded head, on an encoder whose output is the recorded one; and the record, as tensors."""
    npz = np.load(QA / "head.npz")
    facts = {name: torch.from_numpy(npz[name]) for name in npz.files}
    network = make_network()
    official = dict(start="dense", end_hidden="qa_hidden", end="dense_1", null_hidden="dense_2",
                    null="dense_3")
    views = {}
    for ours, theirs in official.items():
        layer = getattr(network, ours)
        layer.weight.data = facts[f"w|{theirs}/kernel"].float().T.contiguous()
        layer.bias.data = facts[f"w|{theirs}/bias"].float()
        views[f"{theirs}/kernel"] = lambda layer=layer: layer.weight.grad.T
        views[f"{theirs}/bias"] = lambda layer=layer: layer.bias.grad
    hidden = facts["hidden"].requires_grad_()
    network.encoder.forward = lambda *args: hidden
    return SimpleNamespace(network=network, facts=facts, hidden=hidden, gradients=views)


def test_Q20_Q23_Q26_Q27_losses_and_gradients_are_the_official_ones(head):
    """(CE of start + CE of end) / 2 + 0.5 x sigmoid CE, the end given the gold start; gradients as well."""
    losses = head.network.losses(head.facts["input_ids"].long(), head.facts["labels"].long())
    assert losses.detach().numpy() == pytest.approx(head.facts["loss"].numpy(), rel=1e-6)
    losses.sum().backward()
    assert torch.allclose(head.hidden.grad, head.facts["gradient_of_hidden"], rtol=1e-5, atol=1e-6)
    for name, gradient in head.gradients.items():
        if f"gradient|{name}" in head.facts:
            assert torch.allclose(gradient(), head.facts[f"gradient|{name}"], rtol=1e-5, atol=5e-6), name
        else:
            norm = head.facts[f"gradient_norm|{name}"].item()
            assert gradient().norm().item() == pytest.approx(norm, rel=1e-5)


def test_Q21_Q22_the_beam_is_the_official_one(head):
    """The 20 likeliest starts, and for each of them the 20 likeliest ends, by log-softmax over the row."""
    with torch.no_grad():
        output = head.network(head.facts["input_ids"].long())
    assert torch.equal(output.starts, head.facts["eval|start_top_index"].long())
    assert torch.equal(output.ends, head.facts["eval|end_top_index"].long())
    for ours, theirs in ((output.start_log_probs, "start_top_log_probs"),
                         (output.end_log_probs, "end_top_log_probs"),
                         (output.null_logits, "answerable_logit")):
        assert torch.allclose(ours, head.facts[f"eval|{theirs}"], rtol=1e-6, atol=2e-5)


def test_Q20_places_outside_the_context_are_1000_less_likely():
    """Not minus infinity: a row with under 20 allowed places still has a top 20."""
    rows = torch.tensor([[2, 9, 10, 3, 11, 12, 13, 3, *[0] * 24]])
    with torch.no_grad():
        output = make_network()(rows)
    assert sorted(output.starts[0, :5].tolist()) == [0, 4, 5, 6, 7]
    assert output.start_log_probs[0, :5].exp().sum().item() == pytest.approx(1, abs=1e-6)
    assert ((output.start_log_probs[0, 5:] + 1000).abs() < 20).all()


def test_Q28_answerability_is_learned_from_every_row():
    """The answerability loss is on for every task: a third label moves the loss of any row."""
    network = make_network()
    rows = torch.tensor([[2, 9, 3, *range(10, 40), 3]])
    here, not_here = (network.losses(rows, torch.tensor([[5, 6, label]])).item() for label in (0, 1))
    assert not_here - here == pytest.approx(-0.5 * network(rows).null_logits.item(), rel=1e-4)


def test_the_encoder_of_a_saved_network_loads_in_transformers(tmp_path):
    """transformers has another head: the encoder loads there, and the whole network here."""
    transformers = pytest.importorskip("transformers")
    network = make_network().eval()
    write_files(tmp_path, model.pretrained_files(network))
    loaded = transformers.AutoModel.from_pretrained(tmp_path).eval()
    rows = torch.tensor([[2, 9, 3, *range(10, 40), 3]])
    attention_mask, token_type_ids = model.attention_mask_and_token_types(rows, 3)
    with torch.no_grad():
        theirs = loaded(rows, attention_mask.long(), token_type_ids).last_hidden_state
        assert torch.allclose(network.encoder(rows, attention_mask, token_type_ids), theirs, atol=1e-5)
        again = spans.QuestionAnswerer(network.config).eval()
        model.load_weights(again, tmp_path)
        assert torch.equal(again(rows).end_log_probs, network(rows).end_log_probs)


def test_half_precision_has_losses_in_fp32():
    """Under autocast to bf16, losses and log-probabilities are fp32 and close."""
    network = make_network()
    rows = torch.tensor([[2, 9, 3, *range(10, 40), 3]])
    labels = torch.tensor([[5, 6, 0]])
    with torch.autocast("cpu", torch.bfloat16):
        losses = network.losses(rows, labels)
        output = network(rows)
    assert losses.dtype == output.end_log_probs.dtype == output.null_logits.dtype == torch.float32
    assert losses.item() == pytest.approx(network.losses(rows, labels).item(), rel=0.02)


def toy_questions():
    """The bytes of a file with twelve questions on six contexts. The answer to every other one is a word."""
    paragraphs = []
    for number, word in enumerate(["dam", "old", "red", "cat", "ship", "bay"]):
        context = " ".join(["the small crew of the island"[: 4 + number], word, "was lost in the storm"])
        paragraphs.append((context, [(f"{word} 1", "what was lost", [(word, context.index(word))]),
                                     (f"{word} 0", "who", [])]))
    return squad_file(paragraphs)


def test_a_network_learns_where_the_answer_is():
    """Trained on twelve questions, half without an answer, it answers them and leaves the others."""
    questions = read(toy_questions(), is_training=True)
    rows, labels, _, windows = spans.make_windows(questions, WORDPIECE, 32, 16)
    network = make_network(vocab_size=len(WORDPIECE.tokens), cls_token_id=WORDPIECE.cls_token_id,
                           sep_token_id=WORDPIECE.sep_token_id)
    optimizer = torch.optim.Adam(network.parameters(), 3e-3)
    ids = torch.from_numpy(rows.astype(np.int64))
    for _ in range(40):
        optimizer.zero_grad()
        network.losses(ids, torch.from_numpy(labels)).sum().backward()
        optimizer.step()
    with torch.no_grad():
        output = spans.Output(*(field.numpy() for field in network.eval()(ids)))
    answers = spans.find_answers(questions, windows, output, WORDPIECE)
    metrics, thresholds = squad.score(questions, [next(iter(texts)) for texts, _ in answers],
                                      [null_score for _, null_score in answers], "2.0")
    assert metrics["best exact"] == 1.0 and metrics["best f1"] == 1.0


# ------------------------------------------------------------------------------------------------------------
# Answers


def test_Q30_Q31_Q32_Q33_answers_are_the_official_ones(record):
    """Context only, start max-context, at most 30 pieces; by score, stable, each text once, 20 at most."""
    official = EDGE["predictions"]
    for question, (texts, _) in zip(record.dev, record.answers, strict=True):
        best = official["nbest"][question.id]
        scores = torch.tensor(list(texts.values()), dtype=torch.float64)
        ours = [text or "empty" for text in texts]  # [Q34]
        assert ours[: len(best)] == [text for text, *_ in best] and len(ours) <= 20
        assert ours[0] == official["predictions"][question.id]
        official_scores = [start + end for _, _, start, end in best]
        assert scores[: len(best)].numpy() == pytest.approx(official_scores, abs=2e-6)
        shares = scores.softmax(0)[: len(best)].numpy()
        assert shares == pytest.approx([share for _, share, _, _ in best], abs=1e-6)


@pytest.mark.parametrize(("start", "end", "is_kept"), [
    (5, 34, True), (5, 35, False), (5, 5, True), (5, 4, False), (4, 5, False), (43, 44, True),
    (43, 45, False), (0, 0, False)])
def test_Q30_an_answer_is_in_the_context_and_has_at_most_30_pieces(start, end, is_kept):
    """Kept if both lie on context pieces, end >= start and end - start + 1 <= 30."""
    context = spans.make_context("dam " * 40, WORDPIECE)
    output = spans.Output(np.array([start]), np.zeros(1), np.array([[end]]), np.zeros((1, 1)), np.zeros(1))
    answers = spans.n_best(context, [spans.Window(0, 40, 5)], [output], WORDPIECE)
    assert answers == {" ".join(["dam"] * (end - start + 1)) if is_kept else "": 0.0}


def test_Q32_of_equal_scores_the_first_window_start_and_end_come_first():
    """Stable: of equals the earlier window, then the likelier start, then the likelier end."""
    context = spans.make_context("old red cat dam", WORDPIECE)
    starts, ends = np.array([7, 6]), np.array([[8, 7], [7, 6]])
    output = spans.Output(starts, np.zeros(2), ends, np.zeros((2, 2)), np.zeros(1))
    windows = [spans.Window(0, 3, 5), spans.Window(1, 4, 5)]
    answers = spans.n_best(context, windows, [output, output], WORDPIECE)
    assert [*answers] == ["red cat", "red", "dam", "cat dam", "cat"]


def test_Q34_without_a_candidate_there_is_no_answer(record):
    """Official: the answer is the word "empty" and the null score 1000000. Here it is "", and infinity."""
    answers = {question.id: answer for question, answer in zip(record.dev, record.answers, strict=True)}
    for name in ("empty-context", "only-spaces"):
        assert answers[name] == ({"": 0.0}, float("inf"))
        assert EDGE["predictions"]["predictions"][name] == "empty"
        assert EDGE["predictions"]["null_odds"][name] == 1e6


def test_Q36_the_null_score_is_the_lowest_of_the_windows(record):
    """The minimum over windows of the answerability logit, without any span's score."""
    ours = {question.id: min(null_score, 1e6) for question, (_, null_score)
            in zip(record.dev, record.answers, strict=True)}
    assert ours == EDGE["predictions"]["null_odds"]


@pytest.mark.parametrize(("spelled", "words", "expected"), EDGE["final_text"])
def test_Q38_the_way_back_to_the_text_is_the_official_one(spelled, words, expected):
    """Tokenized words are searched for the pieces; what cannot be aligned is answered with whole words."""
    assert spans.original_text(spelled, words, WORDPIECE) == expected


# ------------------------------------------------------------------------------------------------------------
# Metrics


def test_Q41_Q42_Q43_texts_are_compared_as_in_the_official_scripts():
    """Normalized exact match and F1, 17 x 17 pairs; two empty texts have F1 1, unlike officially in 1.1."""
    for gold, text, normalized, exact, f1, exact_2, f1_2 in EDGE["metric_strings"]:
        assert squad.normalize(text) == normalized
        assert squad.exact(text, gold) == exact == exact_2
        assert squad.f1(text, gold) == pytest.approx(f1_2, abs=1e-12)
        assert f1 == f1_2 or (normalized == squad.normalize(gold) == "" and f1 == 0)


def test_Q40_Q42_in_1_1_the_best_gold_counts_and_null_scores_do_not():
    """Each the maximum over all gold answers; a 1.1 question is never left unanswered."""
    questions = read(squad_file([("the old dam", [("a", "what", [("old", 4), ("old dam", 4)]),
                                                  ("b", "how", [("old", 4)])])]), "1.1")
    metrics, thresholds = squad.score(questions, ["the dam", "Old!"], [99.0, 99.0], "1.1")
    assert metrics == {"exact": 0.5, "f1": pytest.approx((2 / 3 + 1) / 2, abs=1e-12)} and not thresholds


def test_Q37_Q44_Q46_metrics_are_the_official_ones(record):
    """exact and F1 at -2.75, of all questions and of those with and without an answer, and the best ones."""
    official = EDGE["predictions"]["metrics"]
    texts = [next(iter(answers)) for answers, _ in record.answers]
    null_scores = [null_score for _, null_score in record.answers]
    metrics, thresholds = squad.score(record.dev, texts, null_scores, "2.0")
    for name in ("exact", "f1"):
        assert 100 * metrics[f"{name} at -2.75"] == pytest.approx(official[name], abs=1e-12)
        for best in "best", "official best":
            assert 100 * metrics[f"{best} {name}"] == pytest.approx(official[f"best_{name}"], abs=1e-12)
        assert thresholds[name] == thresholds[f"official {name}"] == official[f"best_{name}_thresh"]
        for group in (True, False):
            part = [number for number, question in enumerate(record.dev) if bool(question.answers) == group]
            ours, _ = squad.score([record.dev[number] for number in part], [texts[number] for number in part],
                                  [null_scores[number] for number in part], "2.0")
            key = f"HasAns_{name}" if group else f"NoAns_{name}"
            assert 100 * ours[f"{name} at -2.75"] == pytest.approx(official[key], abs=1e-12)


def test_Q43_Q44_empty_golds_are_dropped_and_2_75_itself_is_answered():
    """Gold texts that normalize to nothing are dropped; above -2.75 the prediction is ""."""
    context = [("the old dam", [("a", "what", [("the", 0), ("dam", 8)]), ("b", "how", [("the", 0)])])]
    questions = read(squad_file(context))
    metrics, _ = squad.score(questions, ["the", "the"], [-2.75, -2.75], "2.0")
    assert metrics["exact at -2.75"] == metrics["f1 at -2.75"] == 0.5  # only b's gold is ""
    metrics, _ = squad.score(questions, ["dam", "the"], [-2.74, -2.75], "2.0")
    assert metrics["exact at -2.75"] == 0.5 and metrics["best exact"] == 1.0


@pytest.mark.parametrize("case", EDGE["thresholds"])
def test_Q46_the_best_threshold_gives_its_score(case):
    """If "all unanswered" is best, the official threshold is 0.0, at which the score need not hold."""
    scores, has_answer, null_scores, texts = (np.array([case[key][name] for name in case["scores"]])
                                              for key in ("scores", "has_answer", "null_odds", "predictions"))
    unanswered = 1.0 - has_answer
    gain, threshold = squad.best_threshold(scores - unanswered, null_scores)
    applied = np.where(null_scores > threshold, unanswered, scores)
    assert applied.mean() == pytest.approx(unanswered.mean() + gain / len(scores), abs=1e-12)
    at_all = [np.where(null_scores > place, unanswered, scores).mean() for place in [-99, *null_scores]]
    assert applied.mean() == pytest.approx(max(at_all), abs=1e-12)
    official_gains = np.where(has_answer, scores, np.where(texts == "", 0.0, -1.0))
    gain, threshold = squad.best_threshold(official_gains, null_scores, is_official=True)
    assert 100 * (unanswered.mean() + gain / len(scores)) == pytest.approx(case["best_score"], abs=1e-12)
    assert threshold == case["best_threshold"]


def test_Q46_equal_null_scores_are_not_separated():
    """Questions with equal null_odds are separated officially, although no threshold can."""
    gains = np.array([1.0, -1.0])
    assert squad.best_threshold(gains, np.array([0.5, 0.5]), is_official=True) == (1.0, 0.5)
    assert squad.best_threshold(gains, np.array([0.5, 0.5])) == (0.0, -0.5)


# ------------------------------------------------------------------------------------------------------------
# The command


@pytest.fixture
def own_questions(tmp_path, monkeypatch):
    """A tiny model in out/small and questions in own/. The folder is the current one."""
    monkeypatch.chdir(tmp_path)
    network = make_network(vocab_size=len(WORDPIECE.tokens), cls_token_id=WORDPIECE.cls_token_id,
                           sep_token_id=WORDPIECE.sep_token_id)
    train.write_network(Path("out/small/discriminator"), network, WORDPIECE, 48)
    write_files("own", {"train.json": toy_questions(), "dev.json": toy_questions()})


def ask(flags):
    squad.main(f"--data-dir own --max-length 48 --batch-size 4 --learning-rate 3e-3 --layerwise-lr-decay 1 "
               f"--dropout 0 --num-train-epochs 25 --device cpu --dtype fp32 {flags}".split())


def test_a_command_trains_scores_resumes_saves_and_predicts(own_questions, monkeypatch, capsys):
    """Finished seeds are not repeated. An answer's probability is a softmax over the n-best scores."""
    ran = []
    watch(monkeypatch, finetune.Finetuner, "run", lambda finetuner, seed: ran.append(seed))
    ask("--seeds 1")
    ask("--seeds 2 --save")
    results = read_results("out/squad")
    assert set(results) == {("own-own", 0), ("own-own", 1)}
    best = max((0, 1), key=lambda seed: results["own-own", seed]["metrics"]["best exact"])
    assert ran[:2] == [0, 1] and set(ran[2:]) <= {best}
    result = results["own-own", best]
    assert result["metrics"]["best exact"] == result["metrics"]["best f1"] == 1.0
    assert result["examples"] == dict(train=12, dev=12)
    ask("--seeds 2 --save")
    assert len(ran) <= 3 and read_results("out/squad") == results
    assert "best exact" in capsys.readouterr().out

    asked = [("the " + "small crew"[:number] + f" {word} was lost in the storm", question)
             for number, word in ((0, "dam"), (3, "cat")) for question in ("what was lost", "who")]
    lines = [dict(context=context, question=question) for context, question in asked]
    Path("new.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    folder = find_network("own-own", "out/squad")
    squad.main(f"--predict-file new.jsonl --model {folder} --device cpu".split())
    header, *answers = [line.split("\t") for line in capsys.readouterr().out.splitlines()]
    assert header == ["answer", "probability"]
    assert [text for text, _ in answers] == ["dam", "", "cat", ""]
    assert all(0.3 < float(probability) <= 1 for _, probability in answers)

    with pytest.raises(data.UserError, match=f"{folder} has no Classifier"):
        finetune.main(f"--predict-file new.jsonl --model {folder} --device cpu".split())
    with pytest.raises(data.UserError, match="out/small/discriminator has no QuestionAnswerer; --model"):
        squad.main("--predict-file new.jsonl --model out/small/discriminator --device cpu".split())


def test_Q47_length_and_stride(own_questions, monkeypatch):
    """512 tokens, a stride of 128, 2 epochs, batches of 32; a shorter row has a stride of half its length."""
    strides = []
    watch(monkeypatch, spans, "make_windows", lambda questions, wordpiece, max_length, stride:
          strides.append((max_length, stride)))
    config = squad.SquadConfig()
    assert (config.max_length, config.num_train_epochs, config.batch_size) == (512, 2, 32)
    for length, flags in ((128, ""), (48, ""), (48, "--stride 9")):
        ask(f"--num-train-epochs 1 --max-length {length} {flags}")
    assert strides == [(128, 64)] * 2 + [(48, 24)] * 2 + [(48, 9)] * 2


def test_a_look_at_each_split_is_printed(own_questions, capsys):
    """Questions, those with an answer, and rows are counted. Contexts without any word are refused."""
    ask("--num-train-epochs 1")
    assert "own-own, dev: 12 questions, 6 with an answer, in 12 rows; 6.8% [UNK]" in capsys.readouterr().out
    Path("own/dev.json").write_bytes(squad_file([(" ", [("a", "what", [])])]))
    with pytest.raises(data.UserError, match="own/dev.json needs a context that has words"):
        ask("--num-train-epochs 1")


def test_rows_longer_than_those_of_pre_training_are_reported(own_questions, capsys):
    """A model that was trained on short rows gets a warning; there is no version 3.0."""
    ask("--num-train-epochs 1 --max-length 64")
    assert "pre-trained on rows of 48 tokens" in capsys.readouterr().out
    with pytest.raises(data.UserError, match="there is no version 3.0; there are 1.1 and 2.0"):
        ask("--version 3.0")


def test_a_network_that_diverged_is_scored(own_questions, monkeypatch, capsys):
    """Weights that are not finite give answers that are wrong, and the sweep goes on."""
    monkeypatch.setattr(spans.QuestionAnswerer, "null_logits", lambda *_: torch.tensor([float("nan")] * 12))
    [tokenized] = [spans.make_windows(read(toy_questions()), WORDPIECE, 48, 24)]
    config = squad.SquadConfig(device="cpu", dtype="fp32")
    network = make_network(vocab_size=len(WORDPIECE.tokens))
    answers = squad.predict(network, tokenized, WORDPIECE, config)
    assert [null_score for _, null_score in answers] == [0.0] * 12
    assert "the predictions are not finite" in capsys.readouterr().out


def test_replayed_steps_are_plain_steps(own_questions, monkeypatch):
    """A shape of a batch is captured once for all seeds; scores and weights are those of plain steps."""
    ask("--seeds 2 --num-train-epochs 6 --save --out plain")
    resolve = train.set_up_device
    monkeypatch.setattr(train, "CudaGraphs", Recorded)
    monkeypatch.setattr(train, "set_up_device", lambda config: replace(resolve(config), graph=True))
    for name in "captures", "replays":
        monkeypatch.setattr(Recorded, name, 0)
    ask("--seeds 2 --num-train-epochs 6 --save --out replayed")
    assert Recorded.replays > Recorded.captures > 0
    assert read_results("plain") == read_results("replayed")
    plain, replayed = (model.read_weights(find_network("own-own", out)) for out in ("plain", "replayed"))
    assert all(torch.equal(plain[name], replayed[name]) for name in plain)


def test_no_step_waits_for_the_device():
    """Nothing in a step has a size or a branch that depends on data, so that it can be a CUDA graph."""
    tokenized = spans.make_windows(read(toy_questions(), is_training=True), WORDPIECE, 48, 24)
    network = make_network(vocab_size=len(WORDPIECE.tokens))
    ids = torch.from_numpy(tokenized.rows.astype(np.int32))
    labels = torch.from_numpy(tokenized.labels)
    with NoSync():
        network.losses(ids, labels).sum().backward()


# ------------------------------------------------------------------------------------------------------------
# What can go wrong

BAD_FILES = {
    "no JSON": (b"{", "file.json is damaged: it is not a JSON object"),
    "another format": (b'{"data": "text"}', "file.json or what follows is not in SQuAD's format: data"),
    "no questions": (squad_file([]), "file.json has no question to use"),
    "no context": (squad_file([(None, [])]), "context is wrong"),
    "no text of a question": (squad_file([("the dam", [("a", None, [])])]), "file.json, question a or what"),
    "a place that is a word": (squad_file([("the dam", [("a", "what", [("dam", "4")])])]),
                               "question a or what follows is not in SQuAD's format: answer_start"),
    "all misplaced": (squad_file([("the dam", [("a", "what", [("cat", 4)])])]), "has no question to use"),
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_bad_files_are_refused_with_a_sentence(name):
    """A file that cannot be read is named, and the question with it."""
    raw, message = BAD_FILES[name]
    with pytest.raises(data.UserError, match=message):
        read(raw, is_training=True)


def test_version_1_1_needs_answers():
    """An unanswerable question is refused in 1.1, with file, question and what to do."""
    with pytest.raises(data.UserError, match="file.json, question a has no answer; use --version 2.0"):
        read(squad_file([("the dam", [("a", "what", [])])]), "1.1")


@pytest.mark.parametrize(("context", "question", "answer", "expected"), [
    ("x" * 10_000, "what is long", ("x" * 10_000, 0), "x" * 10_000),
    ("the dam", "", ("dam", 4), "dam"),
    ("the \ud800 dam", "what \ud800", ("dam", 6), "dam"),
    ("dam", 7 * "dam ", ("dam", 0), "dam")])
def test_odd_questions_are_read(context, question, answer, expected):
    """A context of one huge word, an empty question, half a surrogate pair: the answer is found again."""
    [entry] = read(squad_file([(context, [("a", question, [answer])])]), is_training=True)
    _, [[start, end, _]], _, [[window]] = spans.make_windows([entry], WORDPIECE, 40, 16)
    output = spans.Output(np.array([start]), np.zeros(1), np.array([[end]]), np.zeros((1, 1)), np.zeros(1))
    assert spans.n_best(entry.context, [window], [output], WORDPIECE) == {expected: 0.0}


def test_an_answer_without_pieces_is_its_word_or_in_no_window():
    """A zero-width space has no piece. Inside a word it is that word; as a word it is "not here"."""
    asked = [("a", "what", [("\u200b", 4)]), ("b", "what", [("\u200b", 8)])]
    questions = read(squad_file([("the \u200b da\u200bm", asked)]), is_training=True)
    labels = spans.make_windows(questions, WORDPIECE, 40, 16).labels
    assert labels.tolist() == [[0, 0, 0], [4, 4, 0]]


def test_thousands_of_questions_share_one_context():
    """The context is tokenized and held once."""
    questions = read(squad_file([("the dam " * 2000, [(str(number), "what", []) for number in range(3000)])]))
    assert len(questions) == 3000 and all(q.context is questions[0].context for q in questions)


# ============================================================================================================
# Words

TAGGING = OFFICIAL / "tagging"
SENTENCES = json.loads((TAGGING / "sentences.json").read_text())
SPANS = json.loads((TAGGING / "spans.json").read_text())["rows"]  # (tags, spans, the spans as BIOES)
# All pieces that the official code made of the sentences, and those that only our rules need.
VOCAB = list(dict.fromkeys(
    [*data.SPECIAL_TOKENS, *"[ ] cls sep 京 ##5 ##6 ##7 ##8 ##9".split()]
    + [token for sentence in SENTENCES["sentences"].values() for token in sentence["tokens"]]))
NP = (b"The DT B-NP\ndog NN I-NP\nbarks VBZ B-VP\n\n"
      b"It PRP B-NP\nis VBZ B-VP\n\n")


def make_rows(sentences, max_length=32, vocab=VOCAB):
    """The rows of sentences, as lists of tokens without padding, and the indices where words begin."""
    names = sorted({tag for _, tags in sentences for tag in tags})
    rows, classes, _ = tagging.tokenize(sentences, names, data.WordPiece(vocab), max_length)
    assert rows.dtype == np.uint16 and rows.shape == classes.shape == (len(rows), max_length)
    tokens = [[vocab[number] for number in row if number] for row in rows]
    assert all(not row[len(texts):].any() for row, texts in zip(rows, tokens, strict=True))
    return tokens, [np.flatnonzero(row != tagging.NO_WORD).tolist() for row in classes]


def read_task(name, cache="cache"):
    """The sentences of a task by split."""
    return tagging.find_task(tagging.TaggingConfig(task=str(name), cache=str(cache))).sentences


def make_tags(random_, length, types=("NP", "VP")):
    return [random_.choice(["O", *(f"{prefix}-{kind}" for prefix in "BIES" for kind in types)])
            for _ in range(length)]


def spans_by_regex(tags, pattern):
    """The spans that a pattern finds in tags, each followed by a space. The last tag says the type."""
    text = "".join(f"{tag} " for tag in tags)
    spans = []
    for match in re.finditer(pattern, text):
        first, end = (text[:place].count(" ") for place in match.span())
        spans.append((first, end - 1, match[0].strip().rsplit("-", 1)[1]))
    return spans


CONLLEVAL_SPAN = r"[BI]-(\w+) (?:I-\1 )*(?:E-\1 )?|[ES]-\w+ "
OFFICIAL_SPAN = r"[BIES]-\w+ (?:[IE]-\w+ )*"


def f1_of(predicted, actual):
    """F1 from precision and recall of two sets."""
    correct = len(predicted & actual)
    if not correct:
        return 0.0
    precision, recall = correct / len(predicted), correct / len(actual)
    return 2 * precision * recall / (precision + recall)


# ------------------------------------------------------------------------------------------------------------
# Files


def test_T01_conll2000_is_downloaded_once_and_its_unpacked_files_are_checked(tmp_path, monkeypatch):
    """CoNLL-2000 comes as two .gz; SHA-256 is that of the unpacked files; there is no dev set."""
    files = {"train.txt": NP * 20, "test.txt": NP}
    asked = []

    def fetch(address, advice):
        asked.append(address)
        yield gzip.compress(files[address.rsplit("/", 1)[1].removesuffix(".gz")])

    monkeypatch.setattr(data, "fetch", fetch)
    with pytest.raises(data.UserError, match="train.txt.gz is not the official file; put train.txt and test"):
        read_task("chunking", tmp_path)
    monkeypatch.setattr(data, "fetch", lambda address, advice: [b"<html>"])
    with pytest.raises(data.UserError, match="not the official file"):
        read_task("chunking", tmp_path)

    monkeypatch.setattr(data, "fetch", fetch)
    monkeypatch.setattr(tagging, "SHA256",
                        {name: hashlib.sha256(content).hexdigest() for name, content in files.items()})
    asked.clear()
    splits = read_task("chunking", tmp_path)
    assert {split: len(sentences) for split, sentences in splits.items()} == dict(train=36, dev=4, test=2)
    assert read_task("chunking", tmp_path) == splits
    folder = "https://www.clips.uantwerpen.be/conll2000/chunking/"
    assert asked == [f"{folder}train.txt.gz", f"{folder}test.txt.gz"]


def test_T01_without_a_dev_set_a_random_tenth_of_train_is_one(tmp_path):
    """Of 95 sentences 10 are held out, not in a block, the same every time; a dev set at hand is used."""
    sentences = [f"w{number} O\n" for number in range(95)]
    (tmp_path / "train.txt").write_text("\n".join(sentences))
    splits = read_task(tmp_path)
    assert splits == read_task(tmp_path) and set(splits) == {"train", "dev"}
    train, dev = ([int(words[0][1:]) for words, _ in splits[split]] for split in ("train", "dev"))
    assert train == sorted(set(range(95)) - set(dev)) and dev == sorted(dev) and len(dev) == 10
    assert max(np.diff(dev)) > 1
    (tmp_path / "dev.txt").write_text("x O")
    splits = read_task(tmp_path)
    assert (len(splits["train"]), splits["dev"]) == (95, [(("x",), ["O"])])


def test_T02_word_is_the_first_column_and_tag_the_last():
    """A word per line, -DOCSTART- skipped. Deviations: the last sentence counts, U+00A0 is no border."""
    ours = [list(words) for words, _ in tagging.parse(SENTENCES["file"].encode(), "f")]
    theirs = {name: sentence["words"] for name, sentence in SENTENCES["sentences"].items()}
    theirs["no-break space in a word"] = ["a\u00a0b", "c"]
    assert ours == [*theirs.values(), ["lost"]]
    assert tagging.parse(NP.replace(b"\n", b"\r\n") + b" \t\r\n\n", "f") == tagging.parse(NP.strip(), "f")
    assert tagging.parse(b"\xef\xbb\xbfa O\n-DOCSTART- O\nb I-my-type", "f") == [
        (("a",), ["O"]), (("b",), ["S-my-type"])]


def test_T03_T04_recorded_spans_and_labels():
    """Tags are read into spans and written back as BIOES; E or a change of type ends no official span."""
    assert len(SPANS) == 300
    proper = 0
    for tags, recorded, bioes in SPANS:
        assert tagging.find_spans(tags, official=True) == list(map(tuple, recorded))
        assert tagging.to_bioes(map(tuple, recorded), len(tags)) == bioes
        if tags == bioes:  # no odd ones: conlleval reads the same
            assert tagging.find_spans(tags) == list(map(tuple, recorded))
            proper += 1
    assert proper >= 100


def test_T03_labels_of_recorded_sentences():
    """Labels are BIOES. Deviation: a change of type begins a span, as conlleval has it."""
    ours = [tags for _, tags in tagging.parse(SENTENCES["file"].encode(), "f")]
    theirs = {name: sentence["bioes"] for name, sentence in SENTENCES["sentences"].items()}
    assert theirs["inside first"] == ["B-VP", "I-VP", "E-VP"]
    assert theirs["type changes without B"] == ["B-VP", "I-VP", "E-VP", "O"]
    theirs["inside first"] = ["B-NP", "E-NP", "S-VP"]
    theirs["type changes without B"] = ["S-NP", "B-VP", "E-VP", "O"]
    assert ours[:-1] == list(theirs.values())


@pytest.mark.parametrize("content, message", [
    (b"He PRP B-NP\nran\n", "line 2 needs a word, and last a tag.* it is 'ran'"),
    (b"He PRP B-NP\n\nThe DT\n", "line 3 needs a word.* it is 'The DT'"),
    (b"He PRP B-NP\nO\n", "line 2 needs.* it is 'O'"),
    (b"He PRP NP-B\n", "line 1 needs"),
    (b"He PRP B-\n", "line 1 needs"),
    (b"He PRP o\n", "line 1 needs"),
    (b"\n\n", "needs a sentence, and train.txt"),
    (b"", "needs a sentence"),
    (b"a O\nb O", "two without a dev.txt"),
    (b"\xff O\n", "not UTF-8 at byte 0"),
])
def test_bad_files_are_named_with_the_line(tmp_path, content, message):
    """One sentence says which file, which line and what it should hold. A missing file is named, too."""
    with pytest.raises(FileNotFoundError, match="train.txt"):
        read_task(tmp_path)
    (tmp_path / "train.txt").write_bytes(content)
    with pytest.raises(data.UserError, match="train.txt") as error:
        read_task(tmp_path)
    assert re.search(message, str(error.value)) and len(str(error.value)) < 300


# ------------------------------------------------------------------------------------------------------------
# Rows


def test_T05_labels_are_those_of_train_and_others_count_as_wrong(monkeypatch):
    """Classes are sorted labels. Deviation: one that only dev has is no class, but gold in the score."""
    dev = [(("the", "dog", "barks"), ["B-NP", "E-NP", "S-VP"])]
    names = ["B-NP", "E-NP", "O"]
    tokenized = tagging.tokenize(dev, names, data.WordPiece(VOCAB), 8)
    logits = torch.zeros(1, 6, 3)
    logits[0, [1, 2, 3, 4], [0, 1, 2, 2]] = 1.0
    monkeypatch.setattr(finetune, "predict_batches", lambda *_: [([0], logits)])
    tags = tagging.predict_tags(None, tokenized, names, None)
    assert tags == [["B-NP", "E-NP", "O"]]
    assert tagging.f1(tags, [tags for _, tags in dev]) == pytest.approx(2 / 3)


def test_T06_T07_T09_recorded_rows():
    """Pieces and first pieces. Deviations: Chinese and [SEP] as in pre-training, every word has a piece."""
    deviations = {
        "special tokens as words": ("[CLS] [ sep ] [ cls ] dog ran [SEP]".split(), [1, 4, 7, 8]),
        "control characters only": ("[CLS] [UNK] dog bark ##s [SEP]".split(), [1, 2, 3]),
        "chinese": ("[CLS] 北 京 is [SEP]".split(), [1, 3]),
    }
    for name, sentence in SENTENCES["sentences"].items():
        if name == "too long for 32" or name == "just does not":
            continue  # see T10
        expected = deviations.get(name, (sentence["tokens"], sentence["labeled_positions"]))
        tokens, starts = make_rows([(sentence["words"], sentence["bioes"])])
        assert (tokens, starts) == ([expected[0]], [expected[1]]), name


def test_T10_T16_a_long_sentence_continues_in_the_next_row():
    """Officially words are cut at half of what fits, and count nowhere. Deviation: here no word is lost."""
    too_long, fits = (SENTENCES["sentences"][name] for name in ("too long for 32", "just does not"))
    assert (len(too_long["words"]), len(too_long["labels"])) == (20, 5)
    (first, second), starts = make_rows([(too_long["words"], too_long["bioes"])])
    assert first[:11] == too_long["tokens"][:11]
    assert "".join(first[1:-1] + second[1:-1]).replace("##", "") == "".join(too_long["words"])
    # Ten words of two pieces and ten of three: 13 words with [CLS] and [SEP] are 31 tokens.
    assert starts == [[*range(1, 21, 2), 21, 24, 27], list(range(1, 22, 3))]
    tokens, starts = make_rows([(fits["words"], fits["bioes"])] * 2)
    assert (tokens, starts) == ([["[CLS]", *"w" * 15, "[SEP]"]] * 2, [list(range(1, 16))] * 2)


def test_T10_huge_words_and_sentences():
    """Every word of any sentence has a class, in rows that are never too long; a word may fill a row."""
    words = ["]" * 5_000, *["dog"] * 30_000, "]" * 9, "[" * 14]
    tokens, starts = make_rows([(words, ["O"] * len(words)), (["dog"], ["O"])], max_length=16)
    assert sum(map(len, starts)) == len(words) + 1
    assert tokens[0] == ["[CLS]", *"]" * 14, "[SEP]"] and starts[0] == [1]
    assert max(map(len, tokens)) == 16 and tokens[-1] == ["[CLS]", "dog", "[SEP]"]
    assert tokens[-2] == ["[CLS]", *"[" * 14, "[SEP]"] and all(row[-1] == "[SEP]" for row in tokens)


# ------------------------------------------------------------------------------------------------------------
# The network


def test_T08_T09_T12_T13_recorded_losses_and_gradients():
    """Types 1 on all tokens; one dense layer on first pieces; cross-entropy x mask, summed."""
    facts = json.loads((TAGGING / "head.json").read_text())
    record = np.load(TAGGING / "head.npz")
    fields = model.ElectraConfig.__dataclass_fields__
    config = model.ElectraConfig(**{name: value for name, value in facts.items() if name in fields})
    tagger = tagging.Tagger(config, range(facts["num_labels"]))
    tagger.train()
    networks = SimpleNamespace(generator=nn.Identity(), discriminator=tagger)

    def views(of):
        return {name.replace("classifier", "task_specific/chunk/dense"): tensor
                for name, tensor in official_views(networks, of).items()}

    weights = views(lambda parameter: parameter.data)
    assert {f"w|{name}" for name in weights} == {key for key in record if key.startswith("w|")}
    for name, tensor in weights.items():
        tensor.copy_(torch.from_numpy(record[f"w|{name}"].astype(np.float32)))
    classes = torch.full((6, 32), tagging.NO_WORD)
    for row, positions, labels, mask in zip(
            classes, record["chunk_labeled_positions"], record["chunk_labels"], record["chunk_labels_mask"],
            strict=True):
        row[positions[mask].astype(int)] = torch.from_numpy(labels[mask].astype(int))
    longer = F.pad(classes, (0, 5), value=7)  # rows, but not their classes, are cut to the longest of a batch
    losses = tagger.losses(torch.from_numpy(record["input_ids"].astype(int)), longer)
    assert losses.sum(1).tolist() == pytest.approx(record["loss"].tolist(), rel=1e-6)
    losses.sum().backward()
    gradients = views(lambda parameter: parameter.grad)
    for name in ("task_specific/chunk/dense/kernel", "task_specific/chunk/dense/bias"):
        expected = torch.from_numpy(record[f"gradient|{name}"])
        assert (gradients[name] - expected).abs().max() <= 1e-5 * expected.abs().max(), name


def test_T12_the_head_has_no_dropout_and_starts_from_glorot_uniform():
    """One dense layer, Glorot uniform, bias 0, no dropout in it."""
    config = model.ElectraConfig(vocab_size=200, embedding_size=32, hidden_size=64, num_hidden_layers=1,
                                 intermediate_size=64, hidden_dropout_prob=0.0,
                                 attention_probs_dropout_prob=0.0)
    tagger = tagging.Tagger(config, range(36)).train()
    weight = tagger.classifier.weight
    limit = (6 / 100) ** 0.5
    assert 0.95 * limit < weight.abs().max() <= limit and not tagger.classifier.bias.any()
    ids = torch.tensor([[101, 7, 8, 102, 0]])
    assert torch.equal(tagger(ids), tagger(ids))
    assert tagger(ids).shape == (1, 5, 36)


# ------------------------------------------------------------------------------------------------------------
# The score


def test_T15_recorded_spans_give_the_official_f1():
    """Spans by T04, gold and predicted, over the whole set. All recorded tags of one length are compared."""
    by_length = {}
    for tags, recorded, _ in SPANS:
        by_length.setdefault(len(tags), []).append((tags, set(map(tuple, recorded))))
    pairs = [pair for group in by_length.values() for pair in itertools.pairwise(group)]
    assert len(pairs) > 200
    tags = [tags for (tags, _), _ in pairs], [tags for _, (tags, _) in pairs]
    predicted, actual = ({(number, span) for number, pair in enumerate(pairs) for span in pair[side][1]}
                         for side in (0, 1))
    official = tagging.f1(*tags, official=True)
    assert official == pytest.approx(f1_of(predicted, actual), rel=1e-12)
    assert official != tagging.f1(*tags) > 0


def test_T15_f1_is_that_of_regular_expressions_on_random_tags():
    """Official: not conlleval, which ends a span at E and at a change of type; proper tags agree."""
    random_ = random.Random(0)
    for _ in range(500):
        predicted, actual = [], []
        for _ in range(random_.randint(1, 4)):
            tags = make_tags(random_, random_.randint(1, 12))
            actual.append(tags)
            predicted.append([tag if random_.random() < 0.6 else make_tags(random_, 1)[0] for tag in tags])
        for official, pattern in ((False, CONLLEVAL_SPAN), (True, OFFICIAL_SPAN)):
            found, gold = ({(number, *span) for number, tags in enumerate(sentences)
                            for span in spans_by_regex(tags, pattern)} for sentences in (predicted, actual))
            ours = tagging.f1(predicted, actual, official)
            assert ours == pytest.approx(f1_of(found, gold), rel=1e-12), (predicted, actual)
        proper = [tagging.to_bioes(tagging.find_spans(tags), len(tags)) for tags in actual]
        assert all(tagging.find_spans(tags) == tagging.find_spans(tags, official=True) for tags in proper)


def test_T15_a_score_of_nothing_is_0():
    """0 if nothing is right, also if there is nothing."""
    for predicted, actual in ("O", "O"), ("S-NP", "S-VP"), ("S-NP", "O"):
        for official in (False, True):
            assert tagging.f1([[predicted]], [[actual]], official) == 0


# ------------------------------------------------------------------------------------------------------------
# The command

TAG_OF = {"dog": "S-NP", "barks": "S-VP", "twenty-one": "S-NP", "the": "O", "ran": "S-VP", "a": "O"}


def write_sentences(longest):
    """The bytes of 40 sentences of at most `longest` words."""
    random_ = random.Random(longest)
    sentences = [random_.choices(list(TAG_OF), k=random_.randint(1, longest)) for _ in range(40)]
    return "\n".join("".join(f"{word} {TAG_OF[word]}\n" for word in words) for words in sentences).encode()


@pytest.fixture
def own_words(tmp_path, monkeypatch):
    """A tiny model in out/small and six words with their tags in own/. The folder is the current one."""
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    wordpiece = data.WordPiece(VOCAB)
    config = model.ElectraConfig(vocab_size=len(VOCAB), embedding_size=32, hidden_size=32,
                                 num_hidden_layers=1, num_attention_heads=2, intermediate_size=64,
                                 max_position_embeddings=16)
    train.write_network(Path("out/small/discriminator"), tagging.Tagger(config, ["O"]), wordpiece, 16)
    write_files("own", {"train.txt": write_sentences(20), "dev.txt": write_sentences(6),
                        "test.txt": write_sentences(30)})


def tag(flags):
    tagging.main(f"--task ./own --max-length 16 --batch-size 8 --learning-rate 1e-2 --layerwise-lr-decay 1 "
                 f"--dropout 0 --num-train-epochs 8 --device cpu --dtype fp32 {flags}".split())


def test_T14_a_command_trains_scores_resumes_saves_and_predicts(own_words, monkeypatch, capsys):
    """Words get their likeliest tags, also in sentences of several rows; finished seeds are not repeated."""
    ran = []
    watch(monkeypatch, finetune.Finetuner, "run", lambda finetuner, seed: ran.append(seed))
    tag("--seeds 1")
    tag("--seeds 2 --save")
    assert ran == [0, 1, 0]  # both are perfect, and the first one's network had not been saved
    results = read_results("out/tagging")
    assert set(results) == {("own-own", 0), ("own-own", 1)}
    for result in results.values():
        assert result["metrics"] == {"dev f1": 1.0, "dev official f1": 1.0, "test f1": 1.0,
                                     "test official f1": 1.0}
        assert result["examples"]["dev"] == 40 and result["examples"]["test"] > 60
    tag("--seeds 2 --save")
    assert len(ran) == 3 and read_results("out/tagging") == results
    lines = capsys.readouterr().out.splitlines()
    assert any(re.match(r"own-own +test f1 +2 +100\.00", line) for line in lines)
    assert any(re.match(r"own-own, dev: 40 sentences; .*S-VP: \d+.*; 0.0% \[UNK\]", line) for line in lines)

    saved = find_network("own-own", "out/tagging")
    sentences = ["the dog barks", "dog", "", " ".join(TAG_OF) + " dog" * 40]
    Path("new.tsv").write_text("\n".join(["sentence", *sentences, ""]))
    Path("none.tsv").write_text("sentence\n \n")  # a sentence without words
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(Path("new.tsv").read_bytes())))
    expected = "".join("".join(f"{word} {TAG_OF[word]}\n" for word in sentence.split()) + "\n"
                       for sentence in sentences)
    for file, printed in ("new.tsv", expected), ("- --format tsv", expected), ("none.tsv", "\n"):
        tagging.main(f"--predict-file {file} --model {saved} --device cpu".split())
        assert capsys.readouterr().out == printed

    with pytest.raises(data.UserError, match="has no Classifier"):
        finetune.main(f"--predict-file new.tsv --model {saved} --device cpu".split())
    with pytest.raises(data.UserError, match="out/small/discriminator has no Tagger; --model"):
        tagging.main("--predict-file new.tsv --model out/small/discriminator --device cpu".split())


def test_T18_the_recipe():
    """3 epochs and batches of 32. Deviations: rows of 128, which hold every sentence of CoNLL-2000, not 256;
    learning rates as for GLUE."""
    config = tagging.TaggingConfig()
    assert (config.max_length, config.num_train_epochs, config.batch_size) == (128, 3, 32)
    task = SimpleNamespace(num_train_epochs=10)
    rates = [finetune.fill_in_recipe(config, task, size).learning_rate for size in (256, 768, 1024)]
    assert rates == [3e-4, 1e-4, 5e-5]


def test_no_step_of_a_tagger_waits_for_the_device(own_words):
    """Nothing in a step has a size or a branch that depends on data, so that it can be a CUDA graph."""
    tokenized = tagging.tokenize(tagging.parse(write_sentences(8), "f"), sorted(set(TAG_OF.values())),
                                 data.WordPiece(VOCAB), 16)
    tagger = tagging.Tagger(model.load_config(Path("out/small/discriminator")), range(3))
    with NoSync():
        tagger.losses(torch.from_numpy(tokenized.rows.astype(np.int32)),
                      torch.from_numpy(tokenized.labels)).sum().backward()


def test_a_network_that_diverged_is_scored_and_noted(own_words, monkeypatch, capsys):
    """If weights are not finite, every word gets the same tag. The table says so."""
    watch(monkeypatch, tagging, "predict_tags",
          lambda network, *_: network.classifier.bias.data.fill_(np.nan))
    tag("--num-train-epochs 1")
    assert "own-own: seed 0 gave every example the same answer" in capsys.readouterr().out
