"""Label every word of a sentence: the chunks of CoNLL-2000, or the tags in a folder of your own.

The folder has train.txt and perhaps dev.txt and test.txt: a word and its tag on a line, and an empty line
between sentences. Tags are O, or B-, I-, E- or S- with a type, as B-NP. [Tnn] marks a detail with a test.
"""

import gzip
import hashlib
import itertools
import re
import sys
from pathlib import Path

import numpy as np
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import data
import finetune
import model

CONLL2000 = "https://www.clips.uantwerpen.be/conll2000/chunking/"
SHA256 = {"train.txt": "82033cd7a72b209923a98007793e8f9de3abc1c8b79d646c50648eb949b87cea",  # unpacked [T01]
          "test.txt": "73b7b1e565fa75a1e22fe52ecdf41b6624d6f59dacb591d44252bf4d692b1628"}
NO_WORD = -100  # the class of a token that does not begin a word


def read_splits(name, cache):
    """The sentences of train, dev and, if there is one, test, by split. `name` is chunking or a folder."""
    folder = Path(name)
    if name == "chunking":
        folder = Path(cache) / "conll2000"
        for name in SHA256:
            data.make_once(folder / name, lambda path=folder / name: fetch(path))
    files = {split: folder / f"{split}.txt" for split in ("train", "dev", "test")}
    splits = {split: parse(path.read_bytes(), path) for split, path in files.items()
              if path.exists() or split == "train"}
    if "dev" not in splits:  # as in CoNLL-2000: a random tenth of train is held out, the same in every run
        sentences = splits["train"]
        is_dev = data.rng(0, "held-out sentences").permutation(len(sentences)) < len(sentences) / 10
        splits["train"] = list(itertools.compress(sentences, ~is_dev))
        splits["dev"] = list(itertools.compress(sentences, is_dev))
    for split, sentences in splits.items():
        if not sentences:
            raise data.UserError(f"{files[split]} needs a sentence, and train.txt two if there is no dev.txt")
    return splits


def fetch(path):
    """Download a file of CoNLL-2000, unpack it to `path` and check it."""
    address = f"{CONLL2000}{path.name}.gz"
    advice = f"put {path.name} into {path.parent}"
    raw = b"".join(data.fetch(address, advice))
    if raw.startswith(b"\x1f\x8b"):  # it is not a web page
        raw = gzip.decompress(raw)
    if hashlib.sha256(raw).hexdigest() != SHA256[path.name]:
        raise data.UserError(f"{address} is not the official file; {advice}")
    with data.atomic_write(path) as file:
        file.write(raw)


def parse(raw, source):
    r"""The sentences in a file, (words, tags). The first column is a word, the last its tag. [T02]

    >>> parse(b"It PRP B-NP\nis VBZ B-VP\nso RB B-ADVP\n\nNo DT B-NP\ngood NN I-NP", "train.txt")
    [(('It', 'is', 'so'), ['S-NP', 'S-VP', 'S-ADVP']), (('No', 'good'), ['B-NP', 'E-NP'])]
    """
    sentences = []
    pairs = []
    # Unlike in the official code, a last sentence without an empty line after it is not lost.
    for number, line in enumerate([*data.decode_utf8(raw, source).split("\n"), ""], 1):
        columns = re.findall(r"[^ \t\r]+", line)
        if columns and columns[0] != "-DOCSTART-":
            if len(columns) == 1 or not re.fullmatch("O|[BIES]-.+", columns[-1]):
                raise data.UserError(f"{source}, line {number}, needs a word, and last a tag: O, or B-, I-, "
                                     f"E- or S- with a type, as B-NP; it is {line.strip()[:80]!r}")
            pairs.append((columns[0], columns[-1]))
        elif pairs:
            words, tags = zip(*pairs, strict=True)
            # Unlike the official code, which makes one VP of B-NP I-VP, this reads tags by conlleval's rules.
            sentences.append((words, to_bioes(find_spans(tags), len(tags))))
            pairs = []
    return sentences


def find_spans(tags, official=False):
    """(First word, last word, type) of each span, as conlleval or as the official code reads tags. [T04]

    >>> tags = ["B-NP", "E-NP", "I-NP", "O", "B-NP", "I-VP"]
    >>> find_spans(tags), find_spans(tags, official=True)
    ([(0, 1, 'NP'), (2, 2, 'NP'), (4, 4, 'NP'), (5, 5, 'VP')], [(0, 2, 'NP'), (4, 5, 'VP')])
    """
    spans = []
    for index, (before, tag) in enumerate(itertools.pairwise(["O", *tags])):
        continues = before[0] in "BI" and tag[0] in "IE" and before[2:] == tag[2:]
        if official:  # neither an E nor a change of type ends a span
            continues = before != "O" and tag[0] in "IE"
        first = spans.pop()[0] if continues else index
        if tag != "O":
            spans.append((first, index, tag[2:]))
    return spans


def to_bioes(spans, num_words):
    """The tags of spans: S for a single word; else B for the first, E for the last and I between. [T03]"""
    tags = ["O"] * num_words
    for first, last, kind in spans:
        prefixes = "S" if first == last else "B" + "I" * (last - first - 1) + "E"
        tags[first : last + 1] = [f"{prefix}-{kind}" for prefix in prefixes]
    return tags


def build_rows(sentences, labels, wordpiece, max_length):
    """Rows, uint16 (N, max_length), and where words begin in them their classes, int64 (N, max_length).

    >>> wordpiece = data.WordPiece([*data.SPECIAL_TOKENS, "do", "it", "##ing"])
    >>> rows, classes = build_rows([(["doing", "it"], ["O", "S-NP"])], ["O", "S-NP"], wordpiece, 6)
    >>> rows.tolist(), classes.tolist()
    ([[2, 5, 7, 6, 3, 0]], [[-100, 0, -100, 1, -100, -100]])
    """
    unknown = [wordpiece.tokens.index(data.UNK)]
    rows = []
    classes = []
    for words, tags in sentences:
        end = max_length  # where the next word begins: no row is begun yet
        # Unlike in the official code, words are tokenized as in pre-training: Chinese by character, cased
        # text in its case [T06], [SEP] as text [T07]. Every word has a first piece, if only [UNK]. [T09]
        for pieces, tag in zip(wordpiece.encode(words), tags, strict=True):
            pieces = (pieces or unknown)[: max_length - 2]
            # [T10] Unlike in the official code, which cuts a sentence at about half of what fits, a long one
            # continues in the next row, so that all words are trained on and scored. [T16]
            if end + len(pieces) + 1 > max_length:
                rows.append(np.zeros(max_length, dtype=np.uint16))
                classes.append(np.full(max_length, NO_WORD))
                rows[-1][0] = wordpiece.cls_token_id
                end = 1
            # [T05] Unlike in the official code, labels are those of train. Others, as in dev, are not used.
            classes[-1][end] = labels.index(tag) if tag in labels else 0
            rows[-1][end : end + len(pieces)] = pieces
            end += len(pieces)
            rows[-1][end] = wordpiece.sep_token_id  # until the next word takes its place
    return np.stack(rows), np.stack(classes)


class Tagger(finetune.Classifier):
    """The pre-trained encoder, then one linear layer on every token, without dropout. [T12]"""

    def forward(self, input_ids):
        """(B, L) ids -> logits (B, L, num_outputs). A word's are those of its first piece. [T09]"""
        attention_mask = input_ids != 0
        token_types = attention_mask.long()  # [T08] 1 everywhere; in pre-training a first segment has 0
        return model.in_fp32(self.classifier(self.encoder(input_ids, attention_mask, token_types)))

    def losses(self, logits, labels):
        """The cross-entropy of each word, 0 elsewhere, (B, L). Training takes the sum. [T13]"""
        labels = labels[:, : logits.shape[1]]  # rows are cut to the longest of their batch
        return F.cross_entropy(logits.transpose(1, 2), labels, ignore_index=NO_WORD, reduction="none")


def name_tags(predicted, labels, sentences):
    """The predicted tags of each sentence, from the classes predicted for all words, (words,)."""
    tags = (labels[number] for number in predicted)
    return [list(itertools.islice(tags, len(words))) for words, _ in sentences]


def score(predicted, actual):
    """F1 of the spans in lists of tags, as a fraction of 1: conlleval's and the official code's. [T15]"""
    metrics = {}
    for name, official in (("f1", False), ("official f1", True)):
        found, gold = ({(number, *span) for number, tags in enumerate(sentences)
                        for span in find_spans(tags, official)} for sentences in (predicted, actual))
        metrics[name] = 2 * len(found & gold) / max(1, len(found) + len(gold))
    return metrics
