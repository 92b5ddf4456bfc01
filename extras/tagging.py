"""Tag the words of sentences: fine-tune, score, predict. `python extras/tagging.py --task chunking --seeds 3`

The task is CoNLL-2000's chunks, or a folder of your own with train.txt, and perhaps dev.txt and test.txt: a
word and its tag on a line, an empty line after each sentence. Tags are O, or B-, I-, E- or S- with a type, as
B-NP. finetune.py has the sweep over seeds and the training. [Tnn] marks a detail that DETAILS.md explains.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import train  # isort: skip  # first, as in finetune.py
import gzip
import hashlib
import itertools
import re
from dataclasses import dataclass
from typing import Annotated, NamedTuple

import numpy as np
import torch.nn.functional as F

import data
import finetune
import glue
import model

CONLL2000 = "https://www.clips.uantwerpen.be/conll2000/chunking/"
SHA256 = {  # of the unpacked files [T01]
    "train.txt": "82033cd7a72b209923a98007793e8f9de3abc1c8b79d646c50648eb949b87cea",
    "test.txt": "73b7b1e565fa75a1e22fe52ecdf41b6624d6f59dacb591d44252bf4d692b1628",
}
WORD = re.compile(r"[^ \t\r\n]+")  # a no-break space is part of a word
NO_WORD = -100  # the class of a token that does not begin a word


@dataclass(frozen=True)
class TaggingConfig(finetune.RecipeConfig):
    """Words, and how their tags are learned. An annotated field is a flag, and the text is its help."""

    task: Annotated[str, "chunking, which is downloaded, or a folder with train.txt"] = "chunking"
    # [T18] The official code has rows of 256, a weight decay of 0.01 and, for small, a learning rate of 1e-4.
    # The longest sentence that CoNLL-2000 has for training is 107 tokens.
    max_length: Annotated[int, "tokens in a row; a longer sentence takes several", 8, 65_536] = 128
    num_train_epochs: Annotated[int, "passes over the sentences", 1, 10_000] = 3
    predict_file: Annotated[str, "a .tsv, .csv or .jsonl file with a column sentence, spaces between words, "
                                 "or - for standard input: print words and tags"] = ""
    out: Annotated[str, "folder for results"] = "out/tagging"


# ------------------------------------------------------------------------------------------------------------
# What finetune.py must know of the task


@dataclass(frozen=True, kw_only=True)
class Task(glue.Task):
    """The sentences, (words, tags), of each split: train, dev and perhaps test."""

    sentences: dict

    @property
    def splits(self):
        return tuple(self.sentences)

    @property
    def dev_splits(self):
        return self.splits[1:]  # all but train are scored


class Experiment(finetune.Experiment):
    """Words in the place of sentences. A test set is scored beside the dev set, which picks the best seed."""

    def read(self, split):
        sentences = self.task.sentences[split]
        return sentences, data.digest(sentences)

    def tokenize(self, split, sentences):
        tokenized = tokenize(sentences, self.task.labels, self.pretrained.wordpiece, self.config.max_length)
        counts = finetune.format_label_counts(tag for _, tags in sentences for tag in tags)
        finetune.print_split(self, split, tokenized.rows, f"{len(sentences):,} sentences; {counts}")
        return tokenized

    def new_network(self):
        return Tagger(self.pretrained.config, self.task.labels)

    def predict(self, network, tokenized):
        return predict_tags(network, tokenized, self.task.labels, self.config)

    def evaluate(self, predictions, splits):
        metrics = {}
        for split, predicted in predictions.items():
            actual = [tags for _, tags in splits[split].sentences]
            metrics[f"{split} f1"] = f1(predicted, actual)
            metrics[f"{split} official f1"] = f1(predicted, actual, official=True)
        return dict(metrics=metrics, is_constant=len(set(itertools.chain(*predictions["dev"]))) == 1)

    def saved_fields(self, result):
        return dict(id2label={str(number): label for number, label in enumerate(self.task.labels)})


# ------------------------------------------------------------------------------------------------------------
# Files and tags


def find_task(config):
    """The Task of a command. Its labels are those of train. [T05]"""
    if config.task == "chunking":
        title = "chunking"
        folder = Path(config.cache, "conll2000")
        data.make_once(folder / "test.txt", lambda: download(folder))
    else:
        folder = Path(config.task)
        title = f"own-{folder.resolve().name}"
    sentences = {}
    for split in "train", "dev", "test":
        path = folder / f"{split}.txt"
        if split == "train" or path.exists():
            sentences[split] = parse(path.read_bytes(), path)
    if "dev" not in sentences:  # as in CoNLL-2000: a random tenth of train is held out, the same in every run
        whole = sentences["train"]
        is_dev = data.rng(0, "held-out sentences").permutation(len(whole)) < len(whole) / 10
        sentences["train"] = list(itertools.compress(whole, ~is_dev))
        sentences["dev"] = list(itertools.compress(whole, is_dev))
    if not all(sentences.values()):
        raise data.UserError(f"each file in {folder} needs a sentence, and train.txt two without a dev.txt")
    labels = sorted({tag for _, tags in sentences["train"] for tag in tags})
    return Task(title=title, metrics=("dev f1",), labels=tuple(labels), sentences=sentences)


def download(folder):
    """Download CoNLL-2000's files, unpack and check them. test.txt is the last one."""
    advice = f"put {' and '.join(SHA256)} into {folder}"
    for name, sha256 in SHA256.items():
        address = f"{CONLL2000}{name}.gz"
        raw = b"".join(data.fetch(address, advice))
        if raw.startswith(b"\x1f\x8b"):  # it is not a web page
            raw = gzip.decompress(raw)
        if hashlib.sha256(raw).hexdigest() != sha256:
            raise data.UserError(f"{address} is not the official file; {advice}")
        with data.atomic_write(folder / name) as file:
            file.write(raw)


def parse(raw, source):
    r"""The sentences in a file, (words, tags). The first column is a word, the last its tag. [T02]

    >>> parse(b"It PRP B-NP\nis VBZ B-VP\nso RB B-ADVP\n\nNo DT B-NP\ngood NN I-NP", "train.txt")
    [(('It', 'is', 'so'), ['S-NP', 'S-VP', 'S-ADVP']), (('No', 'good'), ['B-NP', 'E-NP'])]
    """
    sentences = []
    words = []
    tags = []
    lines = data.decode_utf8(raw, source).split("\n")
    # Unlike in the official code, a last sentence without an empty line after it is not lost.
    lines.append("")
    for number, line in enumerate(lines, 1):
        columns = WORD.findall(line)
        if columns and columns[0] != "-DOCSTART-":
            if len(columns) == 1 or not re.fullmatch("O|[BIES]-.+", columns[-1]):
                raise data.UserError(f"{source}, line {number} needs a word, and last a tag: O, or B-, I-, "
                                     f"E- or S- with a type, as B-NP; it is {line.strip()[:80]!r}")
            words.append(columns[0])
            tags.append(columns[-1])
        elif words:
            # By conlleval's rules. The official code makes one VP of B-NP I-VP.
            sentences.append((tuple(words), to_bioes(find_spans(tags), len(tags))))
            words = []
            tags = []
    return sentences


def find_spans(tags, official=False):
    """(First word, last word, type) of each span, as conlleval or as the official code reads tags. [T04]

    >>> tags = ["B-NP", "E-NP", "I-NP", "O", "B-NP", "I-VP"]
    >>> find_spans(tags), find_spans(tags, official=True)
    ([(0, 1, 'NP'), (2, 2, 'NP'), (4, 4, 'NP'), (5, 5, 'VP')], [(0, 2, 'NP'), (4, 5, 'VP')])
    """
    spans = []
    for index, (before, tag) in enumerate(itertools.pairwise(["O", *tags])):
        if official:  # neither an E nor a change of type ends a span
            continues = before != "O" and tag[0] in "IE"
        else:
            continues = before[0] in "BI" and tag[0] in "IE" and before[2:] == tag[2:]
        if continues:
            first, _, _ = spans.pop()
            spans.append((first, index, tag[2:]))  # one word longer
        elif tag != "O":
            spans.append((index, index, tag[2:]))
    return spans


def to_bioes(spans, num_words):
    """The tags of spans: S for a single word; else B for the first, E for the last and I between. [T03]"""
    tags = ["O"] * num_words
    for first, last, kind in spans:
        prefixes = "S" if first == last else "B" + "I" * (last - first - 1) + "E"
        tags[first : last + 1] = [f"{prefix}-{kind}" for prefix in prefixes]
    return tags


# ------------------------------------------------------------------------------------------------------------
# Rows, network and score


class Tokenized(NamedTuple):
    """Sentences as the network takes them."""

    rows: np.ndarray  # uint16 (N, max_length), zero-padded
    labels: np.ndarray  # int64 (N, max_length), the class of each word where it begins; else NO_WORD
    sentences: list  # (words, tags); a long one has several rows


def tokenize(sentences, names, wordpiece, max_length):
    """Tokenize sentences, (words, tags). `names` has the tag of each class.

    >>> wordpiece = data.WordPiece([*data.SPECIAL_TOKENS, "do", "it", "##ing"])
    >>> tokenized = tokenize([(["doing", "it"], ["O", "S-NP"])], ["O", "S-NP"], wordpiece, 6)
    >>> tokenized.rows.tolist(), tokenized.labels.tolist()
    ([[2, 5, 7, 6, 3, 0]], [[-100, 0, -100, 1, -100, -100]])
    """
    numbers = {name: number for number, name in enumerate(names)}
    rows = []
    labels = []
    for words, tags in sentences:
        ids = []  # of the row that is being filled
        # Unlike in the official code, words are tokenized as in pre-training: Chinese by character, cased
        # text in its case [T06], [SEP] as text [T07]. Every word has a first piece, if only [UNK]. [T09]
        for pieces, tag in zip(wordpiece.encode(words), tags, strict=True):
            pieces = pieces[: max_length - 2] or [wordpiece.unk_token_id]
            # [T10] Unlike in the official code, which cuts a sentence at about half of what fits, a long one
            # continues in the next row, so that all words are trained on and scored. [T16]
            if not ids or len(ids) + len(pieces) + 1 > max_length:
                ids = [wordpiece.cls_token_id]
                classes = [NO_WORD]
                rows.append(ids)
                labels.append(classes)
            ids += pieces
            # [T05] Unlike in the official code, classes are train's tags. Another one, in dev, is not used.
            classes += [numbers.get(tag, 0), *[NO_WORD] * (len(pieces) - 1)]
    padded = np.zeros((len(rows), max_length), dtype=np.uint16)
    padded_labels = np.full(padded.shape, NO_WORD)
    for number, (ids, classes) in enumerate(zip(rows, labels, strict=True)):
        padded[number, : len(ids) + 1] = [*ids, wordpiece.sep_token_id]
        padded_labels[number, : len(classes)] = classes
    return Tokenized(padded, padded_labels, sentences)


class Tagger(finetune.Classifier):
    """The pre-trained encoder, then one linear layer on every token, without dropout. [T12]"""

    def forward(self, input_ids):
        """(B, L) ids -> logits (B, L, number of classes). A word's are those of its first piece. [T09]"""
        attention_mask = input_ids != 0
        token_types = attention_mask.long()  # [T08] 1 everywhere; in pre-training a first segment has 0
        return model.in_fp32(self.classifier(self.encoder(input_ids, attention_mask, token_types)))

    def losses(self, input_ids, labels):
        """The cross-entropy of each word, 0 elsewhere, (B, L). Training takes the sum. [T13]"""
        logits = self(input_ids).transpose(1, 2)
        labels = labels[:, : input_ids.shape[1]]  # rows are cut to the longest of their batch
        return F.cross_entropy(logits, labels, ignore_index=NO_WORD, reduction="none")


def predict_tags(network, tokenized, names, config):
    """The most likely tags of each sentence, a list of lists. [T14]"""
    classes = np.zeros_like(tokenized.labels)
    for indices, logits in finetune.predict_batches(network, tokenized.rows, config):
        classes[indices, : logits.shape[1]] = logits.argmax(2).cpu()
    tags = (names[number] for number in classes[tokenized.labels != NO_WORD])  # of all words, in their order
    return [list(itertools.islice(tags, len(words))) for words, _ in tokenized.sentences]


def f1(predicted, actual, official=False):
    """F1 of the spans in lists of tags, as a fraction of 1: conlleval's or the official code's. [T15]"""
    found = set_of_spans(predicted, official)
    gold = set_of_spans(actual, official)
    return 2 * len(found & gold) / max(1, len(found) + len(gold))


def set_of_spans(sentences, official):
    """(Number of the sentence, first word, last word, type) of each span."""
    return {(number, *span) for number, tags in enumerate(sentences) for span in find_spans(tags, official)}


# ------------------------------------------------------------------------------------------------------------
# The command line


def predict_file(config):
    """Print the words of each sentence in a table with their tags, in the format of train.txt."""
    saved = finetune.load_saved(config.model, "Tagger")
    network = saved.load_into(Tagger(saved.config, saved.labels), config.device)
    for chunk in finetune.read_chunks(config):
        sentences = []
        for where, row in chunk:
            words = WORD.findall(glue.read_cell(row, "sentence", where))
            sentences.append((words, ["O"] * len(words)))  # tags of which only the number counts
        tokenized = tokenize(sentences, saved.labels, saved.wordpiece, saved.max_length)
        predicted = predict_tags(network, tokenized, saved.labels, config)
        for (words, _), tags in zip(sentences, predicted, strict=True):
            for word, tag in zip(words, tags, strict=True):
                print(word, tag)
            print()


def main(argv=None):
    description = "Fine-tune on tagged words, and score. The same command resumes."
    config = finetune.parse(argv, description, TaggingConfig)
    if config.predict_file:
        predict_file(config)
        return
    experiment = Experiment(find_task(config), config, finetune.load_pretrained(config))
    finetune.sweep_and_report(config, [experiment])


if __name__ == "__main__":
    sys.exit(train.run_command(main))
