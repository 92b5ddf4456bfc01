"""Fine-tune on GLUE or on your own labels, and score: `python finetune.py --task mrpc --seeds 10`.

`main` makes an Experiment of each task. `sweep` runs all of them with all seeds, and `Finetuner.run` one with
one seed: read these first. Each finished seed is a line of out/glue/results.jsonl and is not run again. The
result of a seed does not depend on other seeds or tasks.

The table has the mean, deviation, median and best that papers print. --submit writes files for
gluebenchmark.com. --save keeps the best network of a task, and `Predictor` uses it.
"""

import train  # isort: skip  # first, since it sets an environment variable that torch reads when imported
import collections
import functools
import hashlib
import io
import itertools
import json
import math
import re
import sys
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

import data
import glue
import model

EVAL_BATCH_SIZE = 128  # examples in a forward pass that predicts
CHUNK = 10_000  # examples of --predict-file that are sorted by length together
HEAD_DROPOUT = 0.1  # before the classifier; --dropout is the encoder's


@dataclass(frozen=True)
class RecipeConfig(train.StepConfig):
    """Flags of all fine-tuning, here and in extras/. StepConfig adds Adam, device, dtype and graphs."""

    seeds: Annotated[int, "number of seeds: 0, 1, ...", 1, 1_000_000] = 1
    model: Annotated[str, "a run of train.py, a folder in HuggingFace's format, or a name on "
                          "the hub"] = "out/small"
    random_weights: Annotated[bool, "start from random weights of the model's shape, as a baseline"] = False
    learning_rate: Annotated[float, "peak learning rate; 0 is the size's value (see train.SIZES)", 0, 1] = 0.0
    layerwise_lr_decay: Annotated[float, "factor from each layer to the one below; 0 is the size's "
                                         "value", 0, 1] = 0.0
    num_train_epochs: Annotated[int, "passes over the task; 0 is 10 for RTE and STS-B, 3 for the others",
                                0, 10_000] = 0
    batch_size: Annotated[int, "examples in a step", 1, 65_536] = 32
    max_length: Annotated[int, "tokens to which an example is cut", 8, 65_536] = 128
    dropout: Annotated[float, "in the encoder, whatever pre-training used", 0, 0.9] = 0.1
    warmup_proportion: Annotated[float, "share of the steps over which the learning rate rises from 0",
                                 0, 1] = 0.1
    weight_decay: Annotated[float, "decoupled weight decay, as in the paper; the official default is "
                                   "0.01 [D33]", 0, 1] = 0.0
    save: Annotated[bool, "keep the network of the seed with the best dev score in OUT/networks"] = False
    predict_file: Annotated[str, "a .tsv, .csv or .jsonl file, or - for standard input: print "
                                 "predictions for it"] = ""
    format: Annotated[str, "tsv, csv or jsonl: what --predict-file holds; else its name's ending says "
                           "it"] = ""
    cache: Annotated[str, "folder for downloads"] = data.DataConfig.cache
    out: Annotated[str, "folder for results"] = "out/glue"


@dataclass(frozen=True)
class FinetuneConfig(RecipeConfig):
    """The tasks, the recipe, and where and how it runs."""

    task: Annotated[list, "cola, sst2, mrpc, stsb, qqp, mnli, qnli, rte, wnli, all, or folders of "
                          "your own"] = ("all",)
    regression: Annotated[bool, "the labels in these folders are numbers to be predicted, not "
                                "classes"] = False
    glue_dir: Annotated[str, "folder laid out as the official zips are; without it the tasks are "
                             "downloaded"] = ""
    keep_predictions: Annotated[bool, "keep every seed's predictions of the test sets"] = False
    submit: Annotated[bool, "write the test predictions of the seeds with the best dev scores as files; "
                            "GLUE as a zip"] = False


def fill_in_recipe(config, task, hidden_size):
    """Fill in the flags that are 0: epochs by task, learning rate and decay by width.

    A width between two sizes takes the values of the larger one, and a width above all those of the largest.
    """
    recipes = {size.get("hidden_size", model.ElectraConfig.hidden_size): size["finetuning"]
               for size in train.SIZES.values()}  # by width
    width = min((width for width in recipes if width >= hidden_size), default=max(recipes))
    learning_rate, layerwise_lr_decay = recipes[width]
    return replace(config, learning_rate=config.learning_rate or learning_rate,
                   layerwise_lr_decay=config.layerwise_lr_decay or layerwise_lr_decay,
                   num_train_epochs=config.num_train_epochs or task.num_train_epochs)


# ------------------------------------------------------------------------------------------------------------
# Experiments

# Flags, here and in extras/, that `Experiment.settings` leaves out. They do not decide a result, or they name
# the model or files: of these it has hashes.
NOT_SETTINGS = {"task", "seeds", "model", "random_weights", "glue_dir", "keep_predictions", "submit", "save",
                "predict_file", "format", "cache", "out", "device", "graph", "deterministic", "data_dir"}


class Experiment:
    """A task, its config and the model: everything that decides a result, except the seed.

    `test_splits` are predicted, too. Subclasses in extras/, for questions and for words, override the methods
    from `read` to `saved_fields`.
    """

    def __init__(self, task, config, pretrained, test_splits=()):
        self.task = task
        self.config = fill_in_recipe(config, task, pretrained.config.hidden_size)
        self.pretrained = pretrained
        self.test_splits = test_splits
        self.short_name = task.name[:40]  # in names of files, which have a limit
        # All files are read here, so that damage is reported now, not in the middle of the night.
        self.examples = {}  # by split
        self.sha256 = {}  # of their files, by split
        for split in ["train", *task.dev_splits, *test_splits]:
            self.examples[split], self.sha256[split] = self.read(split)

    def tokenize_splits(self):
        """The Tokenized examples by split."""
        return {split: self.tokenize(split, examples) for split, examples in self.examples.items()}

    def read(self, split):
        """The examples of a split, and the SHA-256 of their file."""
        return self.task.read(split, self.config.cache, self.config.glue_dir)

    def tokenize(self, split, examples):
        """The Tokenized examples of a split. Prints a line about them."""
        tokenized = tokenize_examples(examples, self.pretrained.wordpiece, self.config.max_length,
                                      both_orders=self.task.both_orders and split == "train")
        summary = summarize(self.task, examples, tokenized.lengths, self.config.max_length)
        print_split(self, split, tokenized.rows, summary)
        return tokenized

    def new_network(self):
        """A network with random weights. Training minimizes what its method `losses` returns."""
        return Classifier(self.pretrained.config, self.task.labels)

    def predict(self, network, tokenized):
        return predict_rows(network, tokenized.rows, self.task, self.config)

    def evaluate(self, predictions, splits):
        """The metrics, and whether all answers are the same, from predictions and Tokenized by split."""
        dev_splits = self.task.dev_splits
        metrics = self.task.score(predictions, {split: splits[split].labels for split in dev_splits})
        is_constant = bool(np.ptp(predictions[dev_splits[0]]) < 1e-5)  # greatest minus least
        return dict(metrics=metrics, is_constant=is_constant)

    def saved_fields(self, result):
        """What config.json must tell `Predictor`. (`result`, a seed's line, has squad.py's threshold.)"""
        id2label = {str(number): label for number, label in enumerate(self.task.labels)}
        return dict(id2label=id2label, label_range=self.task.label_range,
                    num_sentences=len(self.task.sentence_columns))

    @property
    def folder(self):
        return Path(self.config.out)

    @functools.cached_property
    def settings(self):
        """The settings that decide a result, as stored in results.jsonl."""
        flags = {name: value for name, value in asdict(self.config).items() if name not in NOT_SETTINGS}
        wordpiece = self.pretrained.wordpiece
        return flags | dict(
            data={split: self.sha256[split] for split in ("train", *self.task.dev_splits)},
            shape=asdict(self.pretrained.config), weights=self.pretrained.weights_sha256,
            vocab=wordpiece.sha256, do_lower_case=wordpiece.do_lower_case,
            strip_accents=wordpiece.strip_accents)

    # Names of files have a digest of the settings, and those of predictions also one of the test sets.

    def network_path(self):
        return self.folder / "networks" / f"{self.short_name}-{data.digest(self.settings)}"

    def run_name(self, seed):
        """The name of a seed's lock, and the beginning of its predictions'."""
        return f"{self.short_name}-{seed}-{data.digest(self.settings)}"

    def predictions_path(self, seed):
        tests = data.digest([self.sha256[split] for split in self.test_splits])
        return self.folder / "predictions" / f"{self.run_name(seed)}-{tests}.npz"

    def finished_results(self):
        """{seed: its line of results.jsonl} of the finished seeds, in ascending order.

        If test sets are to be predicted, a seed without these predictions is not finished. The file is read
        anew each time, since other processes append to it.
        """
        results = {}
        for result in read_results(self.folder / "results.jsonl"):
            if result["task"] == self.task.name and result["settings"] == self.settings:
                results[result["seed"]] = result
        finished = {}
        for seed in range(self.config.seeds):  # an earlier command may have had more seeds
            if seed not in results:
                continue
            if self.test_splits and not self.predictions_path(seed).exists():
                continue
            finished[seed] = results[seed]
        return finished


# ------------------------------------------------------------------------------------------------------------
# The sweep: all tasks with all seeds


def sweep_and_report(config, experiments):
    """Run the sweep, print the table, and save the best networks.

    Returns False, and saves none, if another process is still working on a seed.
    """
    sweep(experiments)
    tasks = {experiment.task.name: experiment.task for experiment in experiments}
    results = {experiment.task.name: experiment.finished_results() for experiment in experiments}
    print(format_table(results, tasks))
    print(f"every seed's metrics are in {Path(config.out) / 'results.jsonl'}")
    missing = [f"{task.title} seed {seed}" for name, task in tasks.items() for seed in range(config.seeds)
               if seed not in results[name]]
    if missing:
        print(f"not in the table, because another process is working on it: {', '.join(missing)}")
        return False
    if config.save:
        save_best(experiments)
    return True


def sweep(experiments):
    """Fine-tune in each Experiment with each seed, and append a line to results.jsonl.

    Finished seeds are skipped. Several processes may share a sweep: each skips the seeds that others are
    working on.
    """
    for experiment in experiments:
        finetuner = None  # made for the first seed that is not skipped
        for seed in range(experiment.config.seeds):
            with data.try_lock(experiment.folder / "locks" / experiment.run_name(seed)) as is_ours:
                if not is_ours:  # another process is working on it
                    continue
                if seed in experiment.finished_results():  # perhaps another process has just finished it
                    continue
                if finetuner is None:
                    finetuner = Finetuner(experiment, experiment.tokenize_splits())
                run_and_record(finetuner, seed)


def run_and_record(finetuner, seed):
    """Fine-tune a task with a seed, score it, and append its line to the results."""
    began = time.perf_counter()
    predictions = finetuner.run(seed)
    seconds = round(time.perf_counter() - began, 1)

    experiment = finetuner.experiment
    splits = finetuner.splits
    task = experiment.task
    config = experiment.config
    outcome = experiment.evaluate(predictions, splits)
    if experiment.test_splits:
        write_predictions(experiment, seed, predictions)
    append_result(experiment, dict(
        task=task.name,
        seed=seed,
        **outcome,
        examples={split: len(tokenized.rows) for split, tokenized in splits.items()},
        seconds=seconds,
        finished=time.strftime("%Y-%m-%d %H:%M:%S"),
        model=str(experiment.pretrained.folder),
        device=config.device,
        threads=torch.get_num_threads(),
        torch=str(torch.__version__),
        settings=experiment.settings,
    ))
    shown = ", ".join(f"{metric} {100 * score:.1f}" for metric, score in outcome["metrics"].items())
    print(f"{task.title}, seed {seed}: {shown} ({seconds:.0f} s)")
    if config.save and seed == best_seed(experiment):  # so far
        save_network(experiment, seed, finetuner.network)


# ------------------------------------------------------------------------------------------------------------
# Results on disk


def read_results(path):
    """The lines of results.jsonl. Each has a digest of its other entries, so that damage is found."""
    if not path.exists():
        return []
    results = []
    for number, line in enumerate(path.read_bytes().splitlines(), 1):
        where = f"{path}, line {number}"
        result = data.parse_json(line, where)
        digest = result.pop("digest", None)
        if digest != data.digest(result):
            raise data.UserError(f"{where} is damaged or of an earlier version; delete this line, and its "
                                 "seed is run again")
        results.append(result)
    return results


def append_result(experiment, result):
    """Append a line to results.jsonl. The file is replaced, so that no kill cuts a line short."""
    path = experiment.folder / "results.jsonl"
    line = json.dumps(result | dict(digest=data.digest(result))).encode()
    with lock_outputs(experiment.folder, to_write="results"):
        lines = path.read_bytes().splitlines() if path.exists() else []
        with data.atomic_write(path) as file:
            file.write(b"\n".join([*lines, line, b""]))


def lock_outputs(folder, to_write):
    """The one lock on all files that processes of a sweep share. It waits for another process."""
    return data.lock(folder / "locks" / "results", f"waiting to write the {to_write}")


def write_predictions(experiment, seed, predictions):
    """Write a seed's predictions of the test sets, with a seal that shows damage."""
    content = io.BytesIO()
    np.savez(content, **{split: predictions[split] for split in experiment.test_splits})
    data.write_sealed(experiment.predictions_path(seed), content.getvalue())


def read_predictions(experiment, seed):
    """What `write_predictions` wrote: an array for each test set, by split."""
    path = experiment.predictions_path(seed)
    content = data.read_sealed(path, advice="delete it, and the same command makes it again")
    return np.load(io.BytesIO(content))


def best_seed(experiment):
    """The finished seed with the best dev score; of equal ones, the first."""
    results = experiment.finished_results()
    metric = experiment.task.metrics[0]
    return max(results, key=lambda seed: results[seed]["metrics"][metric])


# ------------------------------------------------------------------------------------------------------------
# One fine-tuning run


class Finetuner:
    """Fine-tunes a task on its Tokenized `splits`.

    The network, its optimizer and its CUDA graphs are made once and serve all seeds.
    """

    def __init__(self, experiment, splits):
        config = experiment.config
        self.experiment = experiment
        self.config = config
        self.splits = splits
        self.network = experiment.new_network().to(config.device)  # `reset` gives it its weights
        num_layers = experiment.pretrained.config.num_hidden_layers
        self.optimizer = train.build_optimizer(
            self.network.named_parameters(), config,
            lambda name: lr_scale(name, num_layers, config.layerwise_lr_decay))
        self.scaler = torch.amp.GradScaler(torch.device(config.device).type, enabled=config.dtype == "fp16")
        self.scaler_state = self.scaler.state_dict()  # with which each seed begins
        step = functools.partial(train_step, self.network, self.optimizer, self.scaler, config)
        self.take_step = train.CudaGraphs(step) if config.graph else step  # on a GPU

    def run(self, seed):
        """Train on splits["train"] and return the predictions of the other splits, NumPy arrays (N,)."""
        task = self.experiment.task
        config = self.config
        self.reset(seed)
        rows = self.splits["train"].rows
        labels = self.splits["train"].labels
        if task.is_regression:
            labels = labels.astype(np.float32)  # as the logits
        total = num_steps(len(rows), config.batch_size, config.num_train_epochs)
        step = 0
        title = f"{task.title}, seed {seed}"
        with tqdm(total=total, desc=title, unit=" steps", leave=False, disable=None) as bar:
            for epoch in range(config.num_train_epochs):
                order = data.rng(seed, f"{task.name} order", epoch).permutation(len(rows))
                for indices, ids in batches(rows, order, config.batch_size, config):
                    lr = train.learning_rate(step, config.learning_rate, total,
                                             config.warmup_proportion * total)
                    for group in self.optimizer.param_groups:
                        group["lr"].fill_(lr * group["lr_scale"])  # a tensor, which the CUDA graph reads
                    self.take_step(ids, train.to_device(labels[indices], config.device))
                    step += 1
                    bar.update()
        # The last step is scored: no best epoch is picked.
        return {split: self.experiment.predict(self.network, tokenized)
                for split, tokenized in self.splits.items() if split != "train"}

    def reset(self, seed):
        """Go back to the pre-trained weights, a new head and empty moments, all in place."""
        generator = data.rng(seed, f"{self.experiment.task.name} classifier")
        torch.manual_seed(int(generator.integers(2**63)))  # for the weights of the new head, and for dropout
        network = self.experiment.new_network()
        encoder_state = self.experiment.pretrained.encoder_state
        if encoder_state is not None:
            network.encoder.load_state_dict(encoder_state)
        self.network.load_state_dict(network.state_dict())  # copied, since CUDA graphs hold its tensors
        self.network.train()
        train.init_adam_state(self.optimizer)
        self.scaler.load_state_dict(self.scaler_state)


def train_step(network, optimizer, scaler, config, ids, labels):
    """Take an optimizer step on ids (B, L) and labels (B,)."""
    optimizer.zero_grad(set_to_none=True)
    with train.autocast(config):
        loss = network.losses(ids, labels).sum()  # [D34] not the mean
    scaler.scale(loss).backward()
    train.update_weights(network, optimizer, scaler, config)


def lr_scale(name, num_hidden_layers, decay):
    """A parameter's share of the learning rate: the further below the classifier, the smaller. [D28]

    Of n layers, embeddings have height 0, layer i has height i + 1, and the classifier n + 2. Nothing has
    n + 1, so the top layer's rate is the classifier's times decay squared. The official code's author calls
    that a mistake; the published scores have it.

    >>> [round(lr_scale(name, 12, 0.8), 3) for name in ("classifier.bias", "encoder.layers.11.output.bias")]
    [1.0, 0.64]
    """
    top = num_hidden_layers + 2
    layer = re.match(r"encoder\.layers\.(\d+)\.", name)
    if layer:
        height = int(layer[1]) + 1
    elif name.startswith("encoder."):
        height = 0
    else:
        height = top
    return decay ** (top - height)


def num_steps(num_examples, batch_size, epochs):
    return math.ceil(num_examples / batch_size) * epochs  # [D32]


def batches(rows, order, size, config):
    """Yield the indices of each batch's rows, and their ids on the device, cut to the longest row.

    On a GPU the length is a multiple of 16, so that few shapes are captured.
    """
    for start in range(0, len(order), size):
        indices = order[start : start + size]
        length = int(count_tokens(rows[indices]).max())
        if config.device.startswith("cuda"):
            length = min(16 * math.ceil(length / 16), rows.shape[1])
        ids = rows[indices, :length].astype(np.int32)
        yield indices, train.to_device(ids, config.device)


def count_tokens(rows):
    """(N,): the tokens in each row, without the zeros that pad it."""
    return (rows != 0).sum(1)


def predict_batches(network, rows, config):
    """Yield each batch's row indices and output, without dropout. Rows of like length share a batch."""
    network.eval()
    order = np.argsort(count_tokens(rows), kind="stable")
    for indices, ids in batches(rows, order, EVAL_BATCH_SIZE, config):
        with torch.no_grad(), train.autocast(config):
            output = network(ids)
        yield indices, output


# ------------------------------------------------------------------------------------------------------------
# The network for sentences: classifier, loss, predictions, and how examples become rows


class Classifier(nn.Module):
    """The pre-trained encoder, then dropout and one linear layer on [CLS]. [D29]"""

    architecture = "ElectraModel"  # transformers has no class with this head, and loads only the encoder

    def __init__(self, config, labels):
        super().__init__()
        self.config = config
        self.encoder = model.Encoder(config)
        self.dropout = nn.Dropout(HEAD_DROPOUT)
        self.is_regression = not labels
        num_outputs = 1 if self.is_regression else len(labels)
        self.classifier = nn.Linear(config.hidden_size, num_outputs)
        model.init_glorot_uniform(self.classifier)

    def forward(self, input_ids):
        """(B, L) ids -> logits (B, num_outputs)."""
        attention_mask, token_type_ids = model.attention_mask_and_token_types(
            input_ids, self.config.sep_token_id)
        hidden = self.encoder(input_ids, attention_mask, token_type_ids)  # (B, L, H)
        return model.in_fp32(self.classifier(self.dropout(hidden[:, 0])))

    def losses(self, input_ids, labels):
        """(B,): cross-entropy or, in a regression, the squared error of the output. [D31]"""
        logits = self(input_ids)
        if self.is_regression:
            return (logits.squeeze(1) - labels) ** 2
        return F.cross_entropy(logits, labels, reduction="none")


def compute_logits(network, rows, config):
    """(N, num_outputs), in the order of the rows."""
    logits = np.empty((len(rows), network.classifier.out_features), dtype=np.float32)
    for indices, batch_logits in predict_batches(network, rows, config):
        logits[indices] = batch_logits.cpu()
    return logits


def predict_rows(network, rows, task, config):
    """The most likely classes or, in a regression, the numbers, (N,)."""
    logits = compute_logits(network, rows, config)
    if not np.isfinite(logits).all():  # predict class 0 everywhere, so that the sweep continues
        tqdm.write(f"{task.title}: the predictions are not finite; try a lower --learning-rate")
        logits = np.zeros_like(logits)
    return logits[:, 0] if task.is_regression else logits.argmax(1)


class Tokenized(NamedTuple):
    """Examples as the network takes them."""

    rows: np.ndarray  # uint16 (N, max_length), zero-padded
    labels: np.ndarray  # (N,)
    lengths: np.ndarray  # (N,) tokens before the row was cut


def tokenize_examples(examples, wordpiece, max_length, both_orders=False):
    """Tokenize a list of examples. With both_orders, the swapped pairs follow."""
    firsts = wordpiece.encode([example.first for example in examples])
    seconds = wordpiece.encode([example.second for example in examples])
    labels = [example.label for example in examples]
    if both_orders:  # [D30] swapped before they are cut
        firsts_of_both = firsts + seconds
        seconds = seconds + firsts
        firsts = firsts_of_both
        labels = labels + labels
    rows = np.zeros((len(firsts), max_length), dtype=np.uint16)
    lengths = np.zeros(len(firsts), dtype=np.int64)
    for number, (first, second) in enumerate(zip(firsts, seconds, strict=True)):
        num_special = 3 if second else 2
        lengths[number] = len(first) + len(second) + num_special
        ids = wordpiece.add_special_tokens(*truncate(first, second, max_length - num_special))
        rows[number, : len(ids)] = ids
    return Tokenized(rows, np.array(labels), lengths)


def truncate(first, second, length):
    """Pop the last id of the longer list until both fit into `length`; of equal ones, the second's. [D05]

    >>> truncate([1, 2, 3, 4, 5], [6, 7, 8], 5)
    ([1, 2, 3], [6, 7])
    """
    first = list(first)
    second = list(second)
    while len(first) + len(second) > length:
        if len(first) > len(second):
            first.pop()
        else:
            second.pop()
    return first, second


def summarize(task, examples, lengths, max_length):
    """What `print_split` shall print of a split: its rows, labels, empty sentences and lengths."""
    labels = [example.label for example in examples]
    if labels[0] is None:
        shown = "no labels"
    elif task.is_regression:
        low = glue.unscale(min(labels), task.label_range)
        high = glue.unscale(max(labels), task.label_range)
        shown = f"labels from {low:g} to {high:g}"
    else:
        shown = format_label_counts(task.labels[label] for label in labels)
    sentences = [example.first for example in examples]
    if len(task.sentence_columns) == 2:
        sentences += [example.second for example in examples]
    num_empty = sentences.count("")
    if num_empty:
        shown += f"; empty sentences: {num_empty:,}"
    share_cut = np.mean(lengths > max_length)
    return (f"{len(examples):,} rows; {shown}; the longest has {lengths.max():,} tokens, "
            f"{share_cut:.1%} are cut")


def format_label_counts(labels):
    """How often each label occurs, the most frequent first: "0: 2,474, 1: 1,194"."""
    counts = collections.Counter(labels).most_common()
    return glue.join_few([f"{label}: {count:,}" for label, count in counts])


def print_split(experiment, split, rows, summary):
    """Print the summary of a split, and the share of [UNK] in its rows."""
    unknown = experiment.pretrained.wordpiece.unknown_share(rows)
    print(f"{experiment.task.title}, {split}: {summary}; {unknown:.1%} [UNK]")
    if warning := data.unknown_warning(unknown):
        print(warning)


# ------------------------------------------------------------------------------------------------------------
# The pre-trained model


class Pretrained(NamedTuple):
    """A model to fine-tune."""

    folder: Path
    config: model.ElectraConfig  # with the dropout of fine-tuning
    wordpiece: data.WordPiece
    encoder_state: dict | None  # None for random weights
    weights_sha256: str  # or "random"


def load_pretrained(config):
    """The model that --model names. It is checked here, before anything is fine-tuned."""
    folder = data.find_model(config.model, config.cache)
    wordpiece, trained_length = data.read_tokenizer(folder)
    model_config = replace(model.load_config(folder), hidden_dropout_prob=config.dropout,
                           attention_probs_dropout_prob=config.dropout, sep_token_id=wordpiece.sep_token_id,
                           vocab_size=len(wordpiece.tokens))
    check_length(folder, model_config.max_position_embeddings, trained_length, config.max_length)
    if config.random_weights:
        return Pretrained(folder, model_config, wordpiece, None, "random")
    architectures = data.read_json(folder / "config.json").get("architectures") or []
    if "ElectraForMaskedLM" in architectures:
        print(f"{folder} is a generator or a masked language model; its encoder is fine-tuned")
    encoder = model.Encoder(model_config)
    model.load_weights(encoder, folder)
    encoder_state = encoder.state_dict()
    sha256 = hashlib.sha256()  # of the tensors: a copy in another format is the same model
    for tensor in encoder_state.values():
        sha256.update(tensor.numpy())
    return Pretrained(folder, model_config, wordpiece, encoder_state, sha256.hexdigest())


def check_length(folder, positions, trained_length, max_length):
    """Check that a model has --max-length positions, and warn if it was pre-trained on shorter rows."""
    if max_length > positions:
        raise data.UserError(f"{folder} has {positions} positions; use --max-length {positions} or less")
    if trained_length and max_length > trained_length:
        print(f"warning: {folder} was pre-trained on rows of {trained_length} tokens, so later positions are "
              f"untrained; --max-length {trained_length} avoids them")


# ------------------------------------------------------------------------------------------------------------
# The table


def format_table(results, tasks):
    """The table that papers print: mean, deviation, median and best per metric, then the averages.

    `results` has the lines of results.jsonl by task and seed.
    """
    percentages = {name: collect_percentages(results[name]) for name in tasks if results[name]}
    has_averages = len(tasks.keys() & glue.TASKS.keys()) > 1  # over several tasks of GLUE
    width = max(10, *(len(task.title) + 1 for task in tasks.values()))
    lines = [f"{'':{width}}{'':22}{'seeds':>6}{'mean':>8}{'sd':>7}{'median':>8}{'best':>7}"]
    for name in percentages:
        task = tasks[name]
        for metric, values in percentages[name].items():
            is_averaged = name in glue.AVERAGED_BY_ELECTRA and metric == task.metrics[0]
            star = "*" if has_averages and is_averaged else ""  # the line of the average explains it
            lines.append(f"{task.title:{width}}{metric + star:22}{format_statistics(values)}")
    for name in percentages:
        lines += notes_on_constant_answers(tasks[name], results[name])
    if has_averages:
        lines.append("ELECTRA's average of 8 (the metrics with *, no WNLI): "
                     + format_average(glue.average_of_8, glue.AVERAGED_BY_ELECTRA, percentages))
        lines.append("GLUE's average of 9 (a task's metrics averaged first): "
                     + format_average(glue.average_of_9, glue.TASKS, percentages))
    if "wnli" in tasks:
        lines.append("WNLI's dev set is adversarial: the majority class scores 56.3, models rarely more")
    return "\n".join(lines)


def notes_on_constant_answers(task, results):
    """A line about the seeds that gave every example the same answer, if there are any."""
    seeds = [str(seed) for seed, result in results.items() if result["is_constant"]]
    if not seeds:
        return []
    return [f"{task.title}: seed {', '.join(seeds)} gave every example the same answer; it counts, too. With "
            "little data, more --num-train-epochs help"]


def collect_percentages(results):
    """{metric: the scores of a task's seeds in percent}."""
    percentages = collections.defaultdict(list)
    for result in results.values():
        for metric, score in result["metrics"].items():
            percentages[metric].append(100 * score)
    return percentages


def format_statistics(values):
    deviation = f"{np.std(values, ddof=1):.2f}" if len(values) > 1 else "-"
    return (f"{len(values):6}{np.mean(values):8.2f}{deviation:>7}{np.median(values):8.2f}"
            f"{np.max(values):7.2f}")


def format_average(average, needed, percentages):
    """An average or, if it cannot be formed, the tasks that are missing."""
    missing = [glue.TASKS[name].title for name in needed if name not in percentages]
    if missing:
        return f"needs {', '.join(missing)}"
    means = {}
    medians = {}
    for name in needed:
        means[name] = {metric: np.mean(values) for metric, values in percentages[name].items()}
        medians[name] = {metric: np.median(values) for metric, values in percentages[name].items()}
    return f"{average(means):.2f} from means, {average(medians):.2f} from medians"


# ------------------------------------------------------------------------------------------------------------
# --submit: the test predictions of the best seeds


def submit(experiments, config):
    """Write the predictions of each task's best seed and, with all nine of GLUE, the zip."""
    files = {}  # text by name
    submitted = []  # titles and seeds
    for experiment in experiments:
        if not experiment.test_splits:  # a task of your own without one
            continue
        task = experiment.task
        seed = best_seed(experiment)
        submitted.append(f"{task.title} {seed}")
        predictions = read_predictions(experiment, seed)
        for split in experiment.test_splits:
            files[task.submission_name(split)] = glue.submission_text(task, predictions[split])
    if not files:
        print("no task has a test set, so there is nothing to submit")
        return
    names = {experiment.task.name for experiment in experiments}
    is_whole = names.issuperset(glue.TASKS)
    folder = Path(config.out)
    with lock_outputs(folder, to_write="submission"):
        for name, text in files.items():
            with data.atomic_write(folder / "submission" / name) as file:
                file.write(text.encode())
        if is_whole:
            glue.write_submission(folder / "submission.zip", files)
    print(f"{folder / 'submission'} has the test predictions of the seeds with the best dev scores: "
          f"{', '.join(submitted)}")
    if not is_whole and glue.TASKS.keys() & names:
        print("submission.zip for gluebenchmark.com needs --task all")


# ------------------------------------------------------------------------------------------------------------
# --save: the network of the best seed


def save_best(experiments):
    """See that the network of each task's best seed is saved.

    The sweep has saved it if it ran the seed with --save. Otherwise the seed is run again here.
    """
    for experiment in experiments:
        seed = best_seed(experiment)
        if not is_saved(experiment, seed):
            finetuner = Finetuner(experiment, experiment.tokenize_splits())
            finetuner.run(seed)
            save_network(experiment, seed, finetuner.network)
        print(f"{experiment.network_path()} holds the network of seed {seed}, {experiment.task.title}'s best "
              "on dev")


def is_saved(experiment, seed):
    """Whether the folder of an experiment's network holds that of this seed, undamaged."""
    try:
        fields = read_saved_config(experiment.network_path())
    except data.UserError:  # it is damaged
        return False
    return fields.get("run_name") == experiment.run_name(seed)


def save_network(experiment, seed, network):
    """Write encoder, head, names of the labels and tokenizer to the network's folder.

    config.json is written last. It has the hashes of the other files and a digest of its own fields, so that
    parts of two networks are never taken for one.
    """
    files = experiment.pretrained.wordpiece.files(experiment.config.max_length)
    files["model.safetensors"] = model.weights_bytes(network)
    sha256 = {name: hashlib.sha256(content).hexdigest() for name, content in files.items()}
    fields = model.config_fields(network) | dict(
        head=type(network).__name__, run_name=experiment.run_name(seed), sha256=sha256,
        **experiment.saved_fields(experiment.finished_results()[seed]))
    files["config.json"] = model.config_bytes(fields | dict(digest=digest_fields(fields)))
    with lock_outputs(experiment.folder, to_write="network"):
        train.write_folder(experiment.network_path(), files)


def read_saved_config(folder):
    """The fields of a saved network's config.json, after a check of all its files. {} if there is none."""
    path = folder / "config.json"
    fields = data.read_json(path) if path.is_file() else {}
    if "head" not in fields:
        return {}
    advice = "is damaged, or of an earlier version; the command that saved it makes it again"
    digest = fields.pop("digest", None)
    if digest != digest_fields(fields):
        raise data.UserError(f"{path} {advice}")
    for name, sha256 in fields["sha256"].items():
        path = folder / name
        if not path.is_file() or hashlib.sha256(path.read_bytes()).hexdigest() != sha256:
            raise data.UserError(f"{path} {advice}")
    return fields


def digest_fields(fields):
    """A digest of fields in any order: another program may have sorted them."""
    return data.digest(json.dumps(fields, sort_keys=True))


# ------------------------------------------------------------------------------------------------------------
# Predictions of a saved network: in Python and with --predict-file


class SavedNetwork(NamedTuple):
    """What `save_network` wrote to a folder. `load_into` reads the weights."""

    folder: Path
    fields: dict  # config.json, with what `Experiment.saved_fields` gave
    labels: list  # names of the classes
    config: model.ElectraConfig
    wordpiece: data.WordPiece
    max_length: int

    def load_into(self, network, device):
        """The network with the saved weights, on the device."""
        model.load_weights(network, self.folder)
        return network.to(device)


def load_saved(folder, class_name):
    """What --save wrote to a folder for a network of the named class."""
    folder = Path(folder)
    fields = read_saved_config(folder)
    if fields.get("head") != class_name:
        raise data.UserError(f"{folder} has no {class_name}; --model takes what --save wrote in OUT/networks")
    id2label = fields.get("id2label", {})
    labels = [id2label[str(number)] for number in range(len(id2label))]  # the keys may have any order
    config = model.load_config(folder)
    wordpiece, max_length = data.read_tokenizer(folder)
    return SavedNetwork(folder, fields, labels, config, wordpiece, max_length)


class Predictor:
    """A fine-tuned network in a folder that --save wrote.

        predictor = Predictor("out/glue/networks/mrpc-0123456789ab")
        [(label, probabilities)] = predictor.predict([("He left early.", "He went away early.")])

    The encoder in that folder loads in transformers, too. The head does not: theirs has another layer.
    """

    def __init__(self, folder, config=None):
        self.config = config or FinetuneConfig(device="cpu", dtype="fp32")
        self.saved = load_saved(folder, "Classifier")
        self.labels = self.saved.labels
        self.num_sentences = self.saved.fields["num_sentences"]  # 2 if it takes pairs
        self.network = self.saved.load_into(Classifier(self.saved.config, self.labels), self.config.device)
        self.is_regression = self.network.is_regression

    def predict(self, texts):
        """For each sentence or pair of sentences: (label, {label: probability}), or (number, {})."""
        if isinstance(texts, str | dict):  # its letters or keys would be taken for texts
            raise data.UserError("predict takes a list, even for one text")
        examples = [self.make_example(text) for text in texts]
        if not examples:
            return []
        rows = tokenize_examples(examples, self.saved.wordpiece, self.saved.max_length).rows
        if warning := data.unknown_warning(self.saved.wordpiece.unknown_share(rows)):
            print(warning, file=sys.stderr)
        logits = torch.from_numpy(compute_logits(self.network, rows, self.config))
        if self.is_regression:
            label_range = self.saved.fields["label_range"]
            return [(glue.unscale(number, label_range), {}) for number in logits[:, 0].tolist()]
        predictions = []
        for probabilities in logits.softmax(1).tolist():
            label = self.labels[int(np.argmax(probabilities))]
            predictions.append((label, dict(zip(self.labels, probabilities, strict=True))))
        return predictions

    def make_example(self, text):
        """The Example of a sentence, or of a list of as many sentences as the network takes."""
        sentences = [text] if isinstance(text, str) else text
        fits = isinstance(sentences, list | tuple) and len(sentences) == self.num_sentences
        if not fits or not all(isinstance(sentence, str) for sentence in sentences):
            kind = "texts" if self.num_sentences == 1 else "pairs of texts"
            raise data.UserError(f"this network takes {kind}, not {text!r:.80}")
        return glue.Example(*sentences)


def predict_file(config):
    """Print a table of predictions for a file of any size, in its order."""
    predictor = Predictor(config.model, config)
    columns = glue.SINGLE if predictor.num_sentences == 1 else glue.PAIR
    for number, chunk in enumerate(read_chunks(config)):
        texts = [glue.read_sentences(row, columns, where) for where, row in chunk]
        if number == 0:  # not earlier: nothing is printed for a file that cannot be read
            print("prediction", *predictor.labels, sep="\t")
        for answer, probabilities in predictor.predict(texts):
            if predictor.is_regression:
                answer = format(answer, glue.Task.number_format)
            print(answer, *(f"{probability:.4f}" for probability in probabilities.values()), sep="\t")


def read_chunks(config):
    """Yield lists of CHUNK rows of --predict-file, as `glue.read_table` yields them."""
    if config.predict_file == "-":
        source = "standard input"
        if not hasattr(sys.stdin, "buffer"):
            raise data.UserError("standard input is closed or replaced; use --predict-file FILE")
        file = sys.stdin.buffer
    else:
        source = config.predict_file
        file = open(source, "rb")
    with file:
        rows = glue.read_table(file, source, config.format)
        while chunk := list(itertools.islice(rows, CHUNK)):
            yield chunk


# ------------------------------------------------------------------------------------------------------------
# The command line


def parse(argv, description, config_class):
    """The config of a command line, here or in extras/, with a device of this machine."""
    [config], _ = train.parse(argv, description, [config_class], sizes={})
    return train.set_up_device(config)


def main(argv=None):
    description = "Fine-tune and score. The same command resumes; a finished seed is not repeated."
    config = parse(argv, description, FinetuneConfig)
    if config.predict_file:
        predict_file(config)
        return
    tasks = glue.find_tasks(config.task, config.regression)
    pretrained = load_pretrained(config)
    predicts_test_sets = config.keep_predictions or config.submit
    experiments = []
    for task in tasks.values():
        test_splits = task.test_splits if predicts_test_sets else ()
        experiments.append(Experiment(task, config, pretrained, test_splits))
    is_finished = sweep_and_report(config, experiments)
    if is_finished and config.submit:
        submit(experiments, config)


if __name__ == "__main__":
    sys.exit(train.run_command(main))
