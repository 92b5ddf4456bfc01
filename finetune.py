"""Fine-tune on GLUE or on your own labels, and score: `python finetune.py --task mrpc --seeds 10`.

Read `Finetuner.run` first: one run of one task with one seed. `Sweep` runs all tasks and seeds. Each finished
run is a line of out/glue/results.jsonl and is never repeated. The table is what papers print; --submit writes
files for gluebenchmark.com. The result of a seed does not depend on what else runs. --save keeps the best
network of a task, and `Predictor` uses it.
"""

import os

os.environ.setdefault("GOMP_SPINCOUNT", "10000")  # as in train.py

import hashlib
import itertools
import math
import re
import sys
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

from data import (
    DataConfig,
    UserError,
    WordPiece,
    append_json,
    atomic_folder,
    atomic_write,
    digest,
    find_model,
    lock,
    parse_json,
    read_json,
    read_tokenizer,
    rng,
)
from glue import (
    AVERAGED_BY_ELECTRA,
    TASKS,
    Example,
    average_of_8,
    average_of_9,
    check_folder,
    find_tasks,
    no_rows,
    read_examples,
    read_sentences,
    read_table,
    score,
    submission_file,
    submission_splits,
    write_submission,
)
from model import (
    ElectraConfig,
    Encoder,
    glorot_uniform_,
    in_fp32,
    load_config,
    load_weights,
    mask_and_types,
    save_pretrained,
)
from train import (
    CudaGraphs,
    StepConfig,
    autocast,
    build_optimizer,
    learning_rate,
    parse,
    reset_moments,
    resolve_device,
    run_command,
)

EVAL_BATCH_SIZE = 128  # examples in a forward pass that predicts
CHUNK = 10_000  # examples of --predict-file that are sorted by length together
# Peak learning rate and layer-wise decay of small, base and large by hidden size; a size in between takes the
# next larger one's. 3e-4 is the paper's for small; the official code's default for it is 1e-4.
RECIPES = {256: (3e-4, 0.8), 768: (1e-4, 0.8), 1024: (5e-5, 0.9)}


@dataclass(frozen=True)
class FinetuneConfig(StepConfig):
    """The recipe, and where and how it runs."""

    task: list = ("all",)  # cola, sst2, mrpc, stsb, qqp, mnli, qnli, rte, wnli, all, or folders of your own
    regression: bool = False  # the labels in these folders are numbers to be predicted, not classes
    seeds: int = 1  # number of seeds: 0, 1, ...
    model: str = "out/small"  # a run of train.py, a folder in HuggingFace's format, or a name on the hub
    random_weights: bool = False  # start from random weights of the model's shape, as a baseline
    glue_dir: str = ""  # folder laid out as the official zips are; without it the tasks are downloaded
    learning_rate: float = 0.0  # peak learning rate; 0 is that for the model's size
    layerwise_lr_decay: float = 0.0  # factor from each layer to the one below; 0 is that for the size
    num_train_epochs: int = 0  # passes over the task; 0 is 10 for RTE and STS-B, 3 for the others
    batch_size: int = 32  # examples in a step
    max_length: int = 128  # tokens to which an example is cut
    dropout: float = 0.1  # in the encoder, whatever pre-training used
    warmup_proportion: float = 0.1  # share of the steps over which the learning rate rises from 0
    weight_decay: float = 0.0  # decoupled weight decay, as in the paper; the official default is 0.01 [D33]
    predict: bool = False  # keep predictions of the test sets
    submit: bool = False  # write those of the seeds with the best dev scores as files; GLUE as a zip
    save: bool = False  # keep the network of the seed with the best dev score in OUT/TASK
    predict_file: str = ""  # a .tsv, .csv or .jsonl file, or - for standard input: print predictions for it
    cache: str = DataConfig.cache  # folder for downloads
    out: str = "out/glue"  # folder for results

    def __post_init__(self):
        for name in ("seeds", "batch_size"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} is {getattr(self, name)}; it must be at least 1")
        if self.max_length < 8:
            raise UserError(f"max_length is {self.max_length}; an example needs at least 8 tokens")


def resolve(config, task, hidden_size):
    """The config of one task: what was typed, else the recipe of the task and of the model's size."""
    sizes = [size for size in RECIPES if size >= hidden_size]
    peak, decay = RECIPES[min(sizes, default=max(RECIPES))]
    return replace(config, learning_rate=config.learning_rate or peak,
                   layerwise_lr_decay=config.layerwise_lr_decay or decay,
                   num_train_epochs=config.num_train_epochs or task.num_train_epochs)


# ------------------------------------------------------------------------------------------------------------
# One fine-tuning run


class Finetuner:
    """Fine-tunes a task. The network, its optimizer and its CUDA graphs are made once and serve all seeds."""

    def __init__(self, task, pretrained, config):
        self.task = task
        self.pretrained = pretrained
        self.config = config
        self.network = self.new_classifier().to(config.device)
        layers, decay = pretrained.config.num_hidden_layers, config.layerwise_lr_decay
        self.optimizer = build_optimizer(self.network.named_parameters(), config,
                                         lambda name: lr_scale(name, layers, decay))
        self.step = CudaGraphs(self.take_step) if config.graph else self.take_step

    def run(self, seed, splits):
        """Train with a seed on splits["train"], and return the predictions of the others, NumPy arrays (N,).

        `splits` has the (rows, labels) of each split.
        """
        task, config = self.task, self.config
        self.start(seed)
        rows, labels = splits["train"]
        # Everything is on the device, and the host knows the lengths: no step waits for the device.
        ids, lengths = to_device(rows, config)
        kind = torch.long if task.labels else torch.float32
        labels = torch.tensor(labels, dtype=kind, device=config.device)
        total, step = num_steps(len(rows), config.batch_size, config.num_train_epochs), 0
        title = f"{task.title}, seed {seed}"
        with tqdm(total=total, desc=title, unit=" steps", leave=False, disable=None) as bar:
            for epoch in range(config.num_train_epochs):
                order = rng(seed, f"{task.name} order", epoch).permutation(len(rows))
                for chosen, places in batches(order, config.batch_size, config.device):
                    lr = learning_rate(step, config.learning_rate, total, config.warmup_proportion * total)
                    for group in self.optimizer.param_groups:
                        group["lr"].fill_(lr * group["lr_scale"])
                    self.step(ids[places, : cut_length(lengths[chosen], config)], labels[places])
                    step += 1
                    bar.update()
        # The last step is scored: no best epoch is picked.
        return {split: predict(self.network, rows, task, config)
                for split, (rows, _) in splits.items() if split != "train"}

    def start(self, seed):
        """Go back to the pre-trained weights, a new classifier and empty moments, all in place."""
        torch.manual_seed(int(rng(seed, f"{self.task.name} classifier").integers(2**63)))  # of dropout, too
        self.network.load_state_dict(self.new_classifier().state_dict())
        self.network.train()
        reset_moments(self.optimizer)
        device = torch.device(self.config.device).type
        self.scaler = torch.amp.GradScaler(device, enabled=self.config.dtype == "fp16")

    def new_classifier(self):
        network = Classifier(self.pretrained.config, len(self.task.labels) or 1)
        if self.pretrained.encoder_state is not None:
            network.encoder.load_state_dict(self.pretrained.encoder_state)
        return network

    def take_step(self, ids, labels):
        """One optimizer step on ids (B, L) and labels (B,)."""
        self.optimizer.zero_grad(set_to_none=True)
        with autocast(self.config):
            logits = self.network(ids)
        loss = losses(logits, labels, self.task).sum()  # [D34] not the mean
        self.scaler.scale(loss).backward()
        self.scaler.unscale_(self.optimizer)
        torch.nn.utils.clip_grad_norm_(self.network.parameters(), self.config.max_grad_norm)
        self.scaler.step(self.optimizer)
        self.scaler.update()


class Classifier(nn.Module):
    """The pre-trained encoder, then dropout and one linear layer on [CLS]. [D29]"""

    architecture = "ElectraModel"  # the encoder: the head of transformers' classifier is another one

    def __init__(self, config, num_outputs):
        super().__init__()
        self.config = config
        self.encoder = Encoder(config)
        self.dropout = nn.Dropout(0.1)
        self.classifier = nn.Linear(config.hidden_size, num_outputs)
        glorot_uniform_(self.classifier)

    def forward(self, input_ids):
        """(B, L) ids -> logits (B, num_outputs)."""
        types = mask_and_types(input_ids, self.config.sep_token_id)
        hidden = self.encoder(input_ids, *types)  # (B, L, H)
        return in_fp32(self.classifier(self.dropout(hidden[:, 0])))


def lr_scale(name, num_hidden_layers, decay):
    """A parameter's share of the learning rate: the deeper below the classifier, the smaller. [D28]

    Embeddings have depth 0, layer i has depth i + 1, and the classifier n + 2. Nothing has n + 1, so that the
    top layer's rate is the classifier's times decay squared. The official code's author calls that a mistake;
    the published scores have it.

    >>> [round(lr_scale(name, 12, 0.8), 3) for name in ("classifier.bias", "encoder.layers.11.output.bias")]
    [1.0, 0.64]
    """
    match = re.match(r"encoder\.layers\.(\d+)\.", name)
    depth = int(match[1]) + 1 if match else 0 if name.startswith("encoder.") else num_hidden_layers + 2
    return decay ** (num_hidden_layers + 2 - depth)


def num_steps(num_examples, batch_size, epochs):
    return math.ceil(num_examples / batch_size) * epochs  # [D32]


def losses(logits, labels, task):
    """(B,): cross-entropy or, for STS-B, the squared error of the number itself. [D31]"""
    if task.labels:
        return F.cross_entropy(logits, labels, reduction="none")
    return (logits.squeeze(1) - labels) ** 2


def to_device(rows, config):
    """(ids (N, L) on the device, their lengths (N,) on the host) of zero-padded rows."""
    return torch.from_numpy(rows.astype(np.int32)).to(config.device), (rows != 0).sum(1)


def batches(order, size, device):
    """Yield (numbers, the same on the device) for each batch of examples in an order."""
    places = torch.from_numpy(order).to(device)  # all at once
    for start in range(0, len(order), size):
        yield order[start : start + size], places[start : start + size]


def cut_length(lengths, config):
    """The length to which a batch is cut: its longest row's. On a GPU few lengths save captures and plans."""
    longest = int(lengths.max())
    return 16 * math.ceil(longest / 16) if config.device.startswith("cuda") else longest


@torch.no_grad()
def compute_logits(network, rows, config):
    """(N, num_outputs), without dropout. Rows of like length share a batch."""
    network.eval()
    ids, lengths = to_device(rows, config)
    order = np.argsort(lengths, kind="stable")
    with autocast(config):
        logits = torch.cat([network(ids[places, : cut_length(lengths[chosen], config)])
                            for chosen, places in batches(order, EVAL_BATCH_SIZE, config.device)])
    unsorted = np.empty(logits.shape, dtype=np.float32)
    unsorted[order] = logits.cpu().numpy()
    return unsorted


def predict(network, rows, task, config):
    """The most likely classes or, for STS-B, the numbers, (N,)."""
    logits = compute_logits(network, rows, config)
    if not np.isfinite(logits).all():  # predict class 0 everywhere, so that the sweep continues
        tqdm.write(f"{task.title}: the predictions are not finite; try a lower --learning-rate")
        logits = np.zeros_like(logits)
    return logits.argmax(1) if task.labels else logits[:, 0]


# ------------------------------------------------------------------------------------------------------------
# From examples to rows


def tokenize_examples(examples, wordpiece, max_length, both_orders=False):
    """Rows, uint16 (N, max_length), zero-padded, and labels (N,). With both_orders, swapped pairs follow."""
    firsts, seconds = (wordpiece.encode([example[side] for example in examples]) for side in (0, 1))
    pairs = list(zip(firsts, seconds, strict=True))
    labels = [example.label for example in examples]
    if both_orders:
        pairs += [(second, first) for first, second in pairs]  # [D30] swapped before they are cut
        labels += labels
    rows = np.zeros((len(pairs), max_length), dtype=np.uint16)
    for row, pair in zip(rows, pairs, strict=True):
        ids = build_row(*pair, wordpiece, max_length)
        row[: len(ids)] = ids
    return rows, np.array(labels)


def build_row(first, second, wordpiece, max_length):
    """[CLS] first [SEP] second [SEP], or [CLS] first [SEP] if there is no second, as a list of ids."""
    cls, sep = [wordpiece.cls_token_id], [wordpiece.sep_token_id]
    first, second = truncate(first, second, max_length - (3 if second else 2))
    return cls + first + sep + (second + sep if second else [])


def truncate(first, second, length):
    """Pop the last id of the longer list until both fit into `length`; of equal ones, the second's. [D05]

    >>> truncate([1, 2, 3, 4, 5], [6, 7, 8], 5)
    ([1, 2, 3], [6, 7])
    """
    first, second = list(first), list(second)
    while len(first) + len(second) > length:
        (first if len(first) > len(second) else second).pop()
    return first, second


# ------------------------------------------------------------------------------------------------------------
# The pre-trained model


class Pretrained(NamedTuple):
    """A model to fine-tune."""

    folder: Path
    config: ElectraConfig  # with the dropout of fine-tuning
    wordpiece: WordPiece
    encoder_state: dict | None  # None for random weights
    weights_sha256: str  # or "random"


def load_pretrained(config):
    folder = find_model(config.model, config.cache)
    wordpiece, trained_length = read_tokenizer(folder)
    model_config = replace(load_config(folder), hidden_dropout_prob=config.dropout,
                           attention_probs_dropout_prob=config.dropout, sep_token_id=wordpiece.sep_token_id)
    if "ElectraForMaskedLM" in (read_json(folder / "config.json").get("architectures") or ()):
        print(f"{folder} is a generator or a masked language model; its encoder is fine-tuned")
    if len(wordpiece.tokens) != model_config.vocab_size:
        raise UserError(f"{folder} is inconsistent: its vocabulary has {len(wordpiece.tokens):,} tokens, and "
                        f"config.json says {model_config.vocab_size:,}")
    positions = model_config.max_position_embeddings
    if config.max_length > positions:
        raise UserError(f"{folder} has {positions} positions; use --max-length {positions} or less")
    if trained_length and config.max_length > trained_length:
        print(f"warning: {folder} was pre-trained on rows of {trained_length} tokens, so later positions are "
              f"untrained; --max-length {trained_length} avoids them")
    network, sha256 = Classifier(model_config, 1), hashlib.sha256()
    load_weights(network, folder, encoder_only=True)
    if config.random_weights:
        return Pretrained(folder, model_config, wordpiece, None, "random")
    encoder_state = network.encoder.state_dict()
    for tensor in encoder_state.values():
        sha256.update(tensor.numpy())
    return Pretrained(folder, model_config, wordpiece, encoder_state, sha256.hexdigest())


# ------------------------------------------------------------------------------------------------------------
# The sweep over tasks and seeds


class Sweep:
    """All (task, seed) of a config. A finished one is a line of results.jsonl, and is not repeated.

    Several processes may share a sweep: each skips what another is working on.
    """

    def __init__(self, config, tasks, pretrained):
        self.config, self.tasks, self.pretrained, self.folder = config, tasks, pretrained, Path(config.out)
        self.path = self.folder / "results.jsonl"
        self.keeps_predictions = config.predict or config.submit
        self.jobs = [(name, seed) for name in tasks for seed in range(config.seeds)]
        self.configs = {name: resolve(config, task, pretrained.config.hidden_size)
                        for name, task in tasks.items()}
        if config.glue_dir:
            check_folder([needed for name in tasks for needed in self.splits(name)], config.glue_dir)
        for name in tasks if config.save else ():
            folder = self.folder / name
            if folder.exists() and not is_kept_network(folder):
                raise UserError(f"--save would overwrite {folder}, which is not a network; use another --out")
        # Everything is read here once, so that damage is reported now, not in the middle of the night.
        self.sha256 = {name: {split: sha256 for split, (_, sha256) in self.read(name).items()}
                       for name in tasks}

    def splits(self, name):
        """All (task, split) that are needed of a task."""
        task = self.tasks[name]
        needed = [(task, split) for split in ("train", *task.dev_splits)]
        return needed + submission_splits(task) * self.keeps_predictions

    def read(self, name):
        """(Examples, SHA-256) by split."""
        return {split: read_examples(task, split, self.config.cache, self.config.glue_dir)
                for task, split in self.splits(name)}

    def tokenize(self, name):
        """(Rows, labels) by split."""
        wordpiece, length, task = self.pretrained.wordpiece, self.config.max_length, self.tasks[name]
        splits = self.read(name)
        if {split: sha256 for split, (_, sha256) in splits.items()} != self.sha256[name]:
            raise UserError(f"the files of {task.title} have changed; run the same command again")
        return {split: tokenize_examples(examples, wordpiece, length, task.both_orders and split == "train")
                for split, (examples, _) in splits.items()}

    def settings(self, name):
        """Everything that decides a task's result, except the seed."""
        model, task = self.pretrained, self.tasks[name]
        others = ("task", "seeds", "model", "random_weights", "glue_dir", "predict", "submit", "save",
                  "predict_file", "cache", "out", "device", "graph", "deterministic")
        settings = {key: value for key, value in asdict(self.configs[name]).items() if key not in others}
        return settings | dict(
            data={split: self.sha256[name][split] for split in ("train", *task.dev_splits)},
            shape=asdict(model.config), weights=model.weights_sha256, vocab=model.wordpiece.sha256,
            do_lower_case=model.wordpiece.do_lower_case, strip_accents=model.wordpiece.strip_accents)

    def key(self, name, seed):
        """The name under which the files of a (task, seed) are kept."""
        return f"{name}-{seed}-{digest(self.settings(name))}"

    def predictions_path(self, name, seed):
        tests = digest([self.sha256[name][split] for _, split in submission_splits(self.tasks[name])])
        return self.folder / "predictions" / f"{self.key(name, seed)}-{tests}.npz"

    def results(self):
        """The finished lines of these settings by (task, seed)."""
        lines = self.path.read_bytes().split(b"\n") if self.path.exists() else [b""]
        wanted, done = {name: self.settings(name) for name in self.tasks}, {}
        for number, line in enumerate(lines[:-1], 1):  # a kill may have cut the last one short
            entry = parse_json(line, f"{self.path}, line {number},")
            name, seed = entry["task"], entry["seed"]
            if entry["settings"] == wanted.get(name) and seed < self.config.seeds:
                if not self.keeps_predictions or self.predictions_path(name, seed).exists():
                    done[name, seed] = entry
        return done

    def add(self, entry):
        """Append a line to results.jsonl."""
        with (lock(self.folder / "locks" / "results", "waiting to write the results"),
              open(self.path, "a+b") as file):
            file.seek(0)
            file.truncate(file.read().rfind(b"\n") + 1)  # what a kill cut short
            append_json(file, entry)

    def run(self):
        """Run everything that is not finished, except what another process is working on."""
        finetuner, splits = None, None
        for name, seed in self.jobs:
            with lock(self.folder / "locks" / self.key(name, seed)) as is_ours:
                if is_ours and (name, seed) not in self.results():  # another process may have finished it
                    if finetuner is None or finetuner.task is not self.tasks[name]:
                        finetuner = Finetuner(self.tasks[name], self.pretrained, self.configs[name])
                        splits = self.tokenize(name)
                    self.run_one(name, seed, finetuner, splits)

    def run_one(self, name, seed, finetuner, splits):
        """Fine-tune a task with a seed, and add its line to the results."""
        task, config, began = self.tasks[name], self.configs[name], time.perf_counter()
        predictions = finetuner.run(seed, splits)
        seconds = round(time.perf_counter() - began, 1)
        metrics = score(task, predictions, {split: splits[split][1] for split in task.dev_splits})
        if self.keeps_predictions:
            files = {owner.submissions[split]: predictions[split] for owner, split in submission_splits(task)}
            with atomic_write(self.predictions_path(name, seed)) as file:
                np.savez(file, **files)
        self.add(dict(
            task=name, seed=seed, metrics=metrics,
            is_constant=bool(np.ptp(predictions[task.dev_splits[0]]) < 1e-5),
            examples={split: len(rows) for split, (rows, _) in splits.items()}, seconds=seconds,
            finished=time.strftime("%Y-%m-%d %H:%M:%S"), model=str(self.pretrained.folder),
            device=config.device, threads=torch.get_num_threads(), torch=str(torch.__version__),
            settings=self.settings(name)))
        scores = ", ".join(f"{metric} {100 * value:.1f}" for metric, value in metrics.items())
        print(f"{task.title}, seed {seed}: {scores} ({seconds:.0f} s)")
        if self.config.save and seed == self.best_seed(name):
            self.save(name, seed, finetuner.network)

    def best_seed(self, name):
        """The finished seed with the best dev score."""
        results, metric = self.results(), self.tasks[name].metrics[0]
        scores = {seed: results[name, seed]["metrics"][metric]
                  for seed in range(self.config.seeds) if (name, seed) in results}
        return max(scores, key=scores.get)

    def save(self, name, seed, network):
        """Write encoder, classifier, names of the labels and tokenizer of a task to its folder."""
        task = self.tasks[name]
        labels = dict(id2label=dict(enumerate(task.labels)), label_range=[task.low, task.high])
        with (lock(self.folder / "locks" / "results", "waiting to write the network"),
              atomic_folder(self.folder / name) as folder):
            save_pretrained(network, folder, **labels, result=self.key(name, seed))
            self.pretrained.wordpiece.save(folder, self.config.max_length)

    def save_best(self):
        """Keep the network of each task's best seed. If it is not at hand any more, the seed is run again."""
        for name, task in self.tasks.items():
            seed, path = self.best_seed(name), self.folder / name / "config.json"
            if not path.exists() or read_json(path).get("result") != self.key(name, seed):
                finetuner = Finetuner(task, self.pretrained, self.configs[name])
                finetuner.run(seed, self.tokenize(name))
                self.save(name, seed, finetuner.network)
            print(f"{path.parent} holds the network of seed {seed}, {task.title}'s best on dev")

    def submit(self):
        """Write the predictions of each task's best seed and, with all nine of GLUE, the zip."""
        files, folder, is_whole = {}, self.folder / "submission", set(TASKS) <= set(self.tasks)
        for name, task in self.tasks.items():
            with np.load(self.predictions_path(name, self.best_seed(name))) as kept:
                for owner, split in submission_splits(task):
                    file = owner.submissions[split]
                    files[file] = submission_file(owner, kept[file])
        with lock(self.folder / "locks" / "results", "waiting to write the submission"):
            for file, text in files.items():
                with atomic_write(folder / file) as opened:
                    opened.write(text.encode())
            if is_whole:
                write_submission(self.folder / "submission.zip", files)
        chosen = ", ".join(f"{task.title} {self.best_seed(name)}" for name, task in self.tasks.items())
        print(f"{folder} has the test predictions of the seeds with the best dev scores: {chosen}")
        if not is_whole and set(TASKS) & set(self.tasks):
            print("submission.zip for gluebenchmark.com needs --task all")


def format_table(results, tasks):
    """What papers print: of every metric the mean, deviation, median and best of the seeds; averages."""
    width = max(10, *(len(task.title) + 1 for task in tasks.values()))
    lines = [f"{'':{width}}{'':22}{'seeds':>6}{'mean':>8}{'sd':>7}{'median':>8}{'best':>7}"]
    means, medians, notes = {}, {}, []
    for name, task in tasks.items():
        entries = [entry for (other, _), entry in results.items() if other == name]
        means[name], medians[name] = {}, {}
        for metric in entries[0]["metrics"] if entries else ():
            values = 100 * np.array([entry["metrics"][metric] for entry in entries])
            means[name][metric], medians[name][metric] = np.mean(values), np.median(values)
            deviation = f"{np.std(values, ddof=1):.2f}" if len(values) > 1 else "-"
            is_averaged = name in AVERAGED_BY_ELECTRA and len(TASKS.keys() & tasks) > 1 and not task.files
            mark = "*" if is_averaged and metric == task.metrics[0] else ""
            lines.append(f"{task.title:{width}}{metric + mark:22}{len(values):6}{np.mean(values):8.2f}"
                         f"{deviation:>7}{np.median(values):8.2f}{np.max(values):7.2f}")
        if constant := [str(entry["seed"]) for entry in entries if entry["is_constant"]]:
            notes.append(f"{task.title}: seed {', '.join(constant)} gave every example the same answer; it "
                         "counts, too. With little data, more --num-train-epochs help")
    if len(TASKS.keys() & tasks) > 1:
        for title, average, needed in (
            ("ELECTRA's average of 8 (* of each, no WNLI)", average_of_8, AVERAGED_BY_ELECTRA),
            ("GLUE's average of 9 (a task's metrics averaged first)", average_of_9, tuple(TASKS)),
        ):
            missing = [TASKS[name].title for name in needed if not means.get(name)]
            notes.append(f"{title}: needs {', '.join(missing)}" if missing else
                         f"{title}: {average(means):.2f} from means, {average(medians):.2f} from medians")
    if "wnli" in tasks:
        notes.append("WNLI's dev set is adversarial: the majority class scores 56.3, models rarely more")
    return "\n".join(lines + notes)


# ------------------------------------------------------------------------------------------------------------
# A network that was kept


def is_kept_network(folder):
    """Whether --save wrote a folder."""
    path = Path(folder) / "config.json"
    return path.is_file() and "label_range" in read_json(path)


class Predictor:
    """A fine-tuned network in a folder that --save wrote.

        predictor = Predictor("out/glue/mrpc")
        [(label, probabilities)] = predictor.predict([("He left early.", "He went away early.")])

    The encoder in that folder loads in transformers, too. The head does not: theirs has another layer.
    """

    def __init__(self, folder, config=FinetuneConfig(device="cpu", dtype="fp32")):
        folder, self.config = Path(folder), config
        if not is_kept_network(folder):
            raise UserError(f"{folder} has no classifier; --model takes what --save wrote, as out/glue/mrpc")
        content = read_json(folder / "config.json")
        self.labels, (self.low, self.high) = list(content["id2label"].values()), content["label_range"]
        self.wordpiece, self.max_length = read_tokenizer(folder)
        self.network = Classifier(load_config(folder), len(self.labels) or 1)
        load_weights(self.network, folder)
        self.network.to(config.device)

    def predict(self, texts):
        """For each sentence or pair of sentences: (label, {label: probability}), or (number, {})."""
        pairs = [(text, "") if isinstance(text, str) else text for text in texts]
        if not pairs:
            return []
        examples = [Example(first, second, None) for first, second in pairs]
        rows, _ = tokenize_examples(examples, self.wordpiece, self.max_length)
        logits = torch.from_numpy(compute_logits(self.network, rows, self.config))
        if not self.labels:
            return [(self.low + (self.high - self.low) * score, {}) for score in logits[:, 0].tolist()]
        return [(self.labels[int(np.argmax(row))], dict(zip(self.labels, row, strict=True)))
                for row in logits.softmax(1).tolist()]


def predict_file(config):
    """Print a table of predictions for a file of any size, in its order."""
    predictor, is_stdin = Predictor(config.model, config), config.predict_file == "-"
    source = "standard input" if is_stdin else config.predict_file
    header = ["prediction", *predictor.labels]
    with sys.stdin.buffer if is_stdin else open(source, "rb") as file:
        rows = read_table(file, source)
        while chunk := [read_sentences(row, where) for where, row in itertools.islice(rows, CHUNK)]:
            if header:  # not before there is something below it
                print(*header, sep="\t")
                header = None
            for label, probabilities in predictor.predict(chunk):
                text = label if predictor.labels else f"{label:.6g}"
                print(text, *(f"{probability:.4f}" for probability in probabilities.values()), sep="\t")
    if header:
        raise no_rows(source)


def main(argv=None):
    description = "Fine-tune and score. The same command resumes; a finished seed is not repeated."
    [config], _ = parse(argv, description, [FinetuneConfig], {})
    config = resolve_device(config)
    if config.predict_file:
        predict_file(config)
        return
    sweep = Sweep(config, find_tasks(config.task, config.regression), load_pretrained(config))
    sweep.run()
    results = sweep.results()
    print(format_table(results, sweep.tasks))
    print(f"every seed's metrics are in {sweep.path}")
    missing = [f"{sweep.tasks[name].title} seed {seed}" for name, seed in sweep.jobs
               if (name, seed) not in results]
    if missing:
        print(f"not in the table, because another process is working on it: {', '.join(missing)}")
        return
    if config.submit:
        sweep.submit()
    if config.save:
        sweep.save_best()


if __name__ == "__main__":
    sys.exit(run_command(main))
