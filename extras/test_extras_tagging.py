"""Tests of tagging.py: the details T01 to T18 in order, each test quoting the fact it checks.

official/tagging has what the official code did with sentences, random tags and a small network of ours.
"""

import doctest
import gzip
import hashlib
import io
import itertools
import json
import random
import re
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
import tagging
from test_electra import NoSync, official_views, read_results, watch, write_files

OFFICIAL = Path(__file__).parent.parent / "official"


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
    task = tagging.find_task(tagging.TaggingConfig(task=str(name), cache=str(cache)))
    return {split: task.read(split)[0] for split in task.splits}


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
    with pytest.raises(data.UserError, match="train.txt.gz is not the official file; put train.txt into"):
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
    (b"He PRP B-NP\nran\n", "line 2, needs a word, and last a tag.* it is 'ran'"),
    (b"He PRP B-NP\n\nThe DT\n", "line 3, needs a word.* it is 'The DT'"),
    (b"He PRP B-NP\nO\n", "line 2, needs.* it is 'O'"),
    (b"He PRP NP-B\n", "line 1, needs"),
    (b"He PRP B-\n", "line 1, needs"),
    (b"He PRP o\n", "line 1, needs"),
    (b"\n\n", "train.txt needs a sentence"),
    (b"", "train.txt needs a sentence"),
    (b"a O\nb O", "two if there is no dev.txt"),
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
    monkeypatch.setattr(finetune, "run_network", lambda *_: [([0], logits)])
    tags = tagging.predict_tags(None, tokenized, names, None)
    assert tags == [["B-NP", "E-NP", "O"]]
    assert tagging.score(tags, [tags for _, tags in dev])["f1"] == pytest.approx(2 / 3)


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
    tagger = tagging.Tagger(config, facts["num_labels"])
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
    tagger = tagging.Tagger(config, 36).train()
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
    ours = tagging.score([tags for (tags, _), _ in pairs], [tags for _, (tags, _) in pairs])
    predicted, actual = ({(number, span) for number, pair in enumerate(pairs) for span in pair[side][1]}
                         for side in (0, 1))
    assert ours["official f1"] == pytest.approx(f1_of(predicted, actual), rel=1e-12)
    assert ours["official f1"] != ours["f1"] > 0


def test_T15_f1_is_that_of_regular_expressions_on_random_tags():
    """Official: not conlleval, which ends a span at E and at a change of type; proper tags agree."""
    random_ = random.Random(0)
    for _ in range(500):
        predicted, actual = [], []
        for _ in range(random_.randint(1, 4)):
            tags = make_tags(random_, random_.randint(1, 12))
            actual.append(tags)
            predicted.append([tag if random_.random() < 0.6 else make_tags(random_, 1)[0] for tag in tags])
        ours = tagging.score(predicted, actual)
        for name, pattern in (("f1", CONLLEVAL_SPAN), ("official f1", OFFICIAL_SPAN)):
            found, gold = ({(number, *span) for number, tags in enumerate(sentences)
                            for span in spans_by_regex(tags, pattern)} for sentences in (predicted, actual))
            assert ours[name] == pytest.approx(f1_of(found, gold), rel=1e-12), (predicted, actual)
        proper = [tagging.to_bioes(tagging.find_spans(tags), len(tags)) for tags in actual]
        assert all(tagging.find_spans(tags) == tagging.find_spans(tags, official=True) for tags in proper)


def test_T15_a_score_of_nothing_is_0():
    """0 if nothing is right, also if there is nothing."""
    nothing = {"f1": 0.0, "official f1": 0.0}
    assert tagging.score([["O"]], [["O"]]) == nothing
    assert tagging.score([["S-NP"]], [["S-VP"]]) == nothing
    assert tagging.score([["S-NP"]], [["O"]]) == nothing


def test_examples_in_docstrings_are_right():
    """The worked examples in docstrings run as they are written."""
    results = doctest.testmod(tagging)
    assert results.attempted >= 6 and not results.failed


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
    model.save_pretrained(tagging.Tagger(config, 1), "out/small/discriminator")
    wordpiece.save(Path("out/small/discriminator"), 16)
    write_files("own", {"train.txt": write_sentences(20), "dev.txt": write_sentences(6),
                        "test.txt": write_sentences(30)})


def tag(flags):
    tagging.main(f"--task ./own --max-length 16 --batch-size 8 --learning-rate 1e-2 --layerwise-lr-decay 1 "
                 f"--dropout 0 --num-train-epochs 8 --device cpu --dtype fp32 {flags}".split())


def test_T14_a_command_trains_scores_resumes_saves_and_predicts(own_words, monkeypatch, capsys):
    """Words get their likeliest tags, also in sentences of several rows; finished seeds are not repeated."""
    ran = []
    watch(monkeypatch, finetune.Finetuner, "run", lambda finetuner, seed, splits: ran.append(seed))
    tag("--seeds 1")
    tag("--seeds 2 --save")
    assert ran == [0, 1, 0]  # both are perfect, and the first one's network had not been saved
    results = read_results("out/tagging")
    assert set(results) == {("own", 0), ("own", 1)}
    for result in results.values():
        assert result["metrics"] == {"f1": 1.0, "official f1": 1.0, "test f1": 1.0, "test official f1": 1.0}
        assert result["examples"]["dev"] == 40 and result["examples"]["test"] > 60
    tag("--seeds 2 --save")
    assert len(ran) == 3 and read_results("out/tagging") == results
    lines = capsys.readouterr().out.splitlines()
    assert any(re.match(r"own +test f1 +2 +100\.00", line) for line in lines)

    [saved] = [path.parent for path in Path("out/tagging").rglob("config.json")]
    sentences = ["the dog barks", "dog", " ".join(TAG_OF) + " dog" * 40]
    content = "\n\n".join(sentences).encode()
    Path("new.txt").write_bytes(content)
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(content)))
    expected = "\n".join("".join(f"{word} {TAG_OF[word]}\n" for word in sentence.split())
                         for sentence in sentences) + "\n"
    for file in "new.txt", "-":
        tagging.main(f"--predict-file {file} --model {saved} --device cpu".split())
        assert capsys.readouterr().out == expected

    with pytest.raises(data.UserError, match="has no classifier"):
        finetune.main(f"--predict-file new.txt --model {saved} --device cpu".split())
    with pytest.raises(data.UserError, match="out/small/discriminator does not tag words; --model"):
        tagging.main("--predict-file new.txt --model out/small/discriminator --device cpu".split())


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
    tagger = tagging.Tagger(model.load_config(Path("out/small/discriminator")), 3)
    with NoSync():
        tagger.losses(torch.from_numpy(tokenized.rows.astype(np.int32)),
                      torch.from_numpy(tokenized.labels)).sum().backward()


def test_a_network_that_diverged_is_scored_and_noted(own_words, monkeypatch, capsys):
    """If weights are not finite, every word gets the same tag. The table says so."""
    watch(monkeypatch, tagging, "predict_tags",
          lambda network, *_: network.classifier.bias.data.fill_(np.nan))
    tag("--num-train-epochs 1")
    assert "own: seed 0 gave every example the same answer" in capsys.readouterr().out
