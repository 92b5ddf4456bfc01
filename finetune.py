"""Fine-tune on GLUE, score, repeat with n seeds, and submit. `python finetune.py --task mrpc --seeds 10`.

What enters: a pre-trained ELECTRA folder, ours or Google's, and the tasks of glue.py. What leaves, in
out/glue: results.jsonl, a line for every task and seed; the table that papers print; with --submit the zip
that gluebenchmark.com takes. Read `finetune` first; above it stand rows and classifier, below it the sweep.

Claim: a seed of a task gives the same figures alone or among others (test_a_seed_*). Batches are padded to
their own longest row, which changes no logit beyond rounding (test_padding_*) and takes a fraction of the
time: see LOG.md.
"""

import hashlib
import itertools
import math
import platform
import re
import shutil
import sys
import time
from contextlib import suppress
from dataclasses import asdict, dataclass, fields
from functools import partial
from pathlib import Path

import numpy as np
import tokenizers
import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

from data import (
    DataConfig,
    Missing,
    Parser,
    WordPiece,
    append,
    atomic_write,
    configure,
    digest,
    download,
    generator,
    lock,
    make_once,
    one_sentence,
    parse,
    read_vocab,
)
from glue import (
    AVERAGED_BY_ELECTRA,
    TASKS,
    average_of_8,
    average_of_9,
    find_task,
    predicted_by,
    read_examples,
    score,
    write_submission,
)
from model import (
    Encoder,
    attention_mask_and_token_types,
    glorot_uniform_,
    load_config,
    load_weights,
    read_weights,
    widen,
)
from train import StepConfig, TrainConfig, build_optimizer, learning_rate, resolve, update

GET_ONE = ("pre-train one with `python train.py --size small`, or take --model "
           "google/electra-small-discriminator, which is downloaded")
EVAL_BATCH = 128  # examples in a forward pass that predicts
# Peak learning rate and layer-wise decay of small, base and large, by hidden size; what is in between takes
# the next larger one's. 3e-4 is the paper's for small; the official code's default for it is 1e-4.
RECIPES = {256: (3e-4, 0.8), 768: (1e-4, 0.8), 1024: (5e-5, 0.9)}


@dataclass(frozen=True)
class FinetuneConfig(StepConfig):
    """The recipe, and where and how it runs."""

    task: list = ("all",)  # cola, sst2, mrpc, stsb, qqp, mnli, qnli, rte, wnli, or all
    seeds: int = 1  # how many seeds to fine-tune with: 0, 1, ...
    model: str = "out/small"  # a run of train.py, a folder that transformers can load, or a name on the hub
    random_weights: bool = False  # begin from random weights of the model's shape, to compare with
    glue_dir: str = ""  # folder laid out as the official zips are; without it the tasks are downloaded
    learning_rate: float = 0.0  # peak learning rate; 0 is that of the model's size (see README)
    layerwise_lr_decay: float = 0.0  # of the rate, from a layer to the one below; 0 is the model size's
    num_train_epochs: int = 0  # passes over the task; 0 is 10 for RTE and STS-B, and 3 for the others
    batch_size: int = 32  # examples in a step
    max_length: int = 128  # tokens to which an example is cut
    warmup_proportion: float = 0.1  # share of the steps over which the learning rate rises from 0
    # [D33] As in the paper; the official code's default is 0.01.
    weight_decay: float = 0.0  # decoupled, and not on LayerNorms and biases
    predict: bool = False  # keep predictions of the test sets in the folder `predictions`
    submit: bool = False  # write submission.zip from each task's seed of the best dev score
    cache: str = DataConfig.cache  # folder for what is downloaded
    out: str = "out/glue"  # folder for results

    def __post_init__(self):
        self.check(learning_rate=(0, 1e3), layerwise_lr_decay=(0, 1), num_train_epochs=(0, 1000),
                   warmup_proportion=(0, 1), max_length=(8, math.inf), seeds=(1, 10_000))
        if self.submit and set(self.tasks) != set(TASKS):
            sys.exit("a submission has all nine tasks: --submit goes with --task all")

    @property
    def tasks(self):
        names = [name for typed in self.task
                 for name in (TASKS if typed.lower() == "all" else [find_task(typed)])]
        return list(dict.fromkeys(names))


# ------------------------------------------------------------------------------------------------------------
# From examples to batches


def truncate(first, second, length):
    """Pop the last id of the longer of two lists until they fit; of equals, the second's. [D05]"""
    first, second = list(first), list(second)
    while len(first) + len(second) > length:
        (first if len(first) > len(second) else second).pop()
    return first, second


def build_row(first, second, wordpiece, max_length):
    """[CLS] first [SEP], or [CLS] first [SEP] second [SEP] where there is a second, as a list of ids."""
    first, second = truncate(first, second, max_length - (3 if second else 2))
    row = [wordpiece.cls_token_id, *first, wordpiece.sep_token_id]
    return row + [*second, wordpiece.sep_token_id] if second else row


def build_rows(examples, wordpiece, max_length, both_orders=False):
    """-> rows, a list of uint16 arrays of ids, and labels, an array. With both orders, the swapped ones
    follow."""
    firsts, seconds = (wordpiece.encode([example[side] for example in examples]) for side in (0, 1))
    pairs = list(zip(firsts, seconds, strict=True))
    labels = [example.label for example in examples]
    if both_orders:
        pairs += [(second, first) for first, second in pairs]  # [D30] swapped before they are cut
        labels += labels
    rows = [build_row(first, second, wordpiece, max_length) for first, second in pairs]
    return [np.array(row, dtype=np.uint16) for row in rows], np.array(labels)


def pad(rows):
    """(B, L) int64, L the length of the longest of these rows."""
    batch = np.zeros((len(rows), max(map(len, rows))), dtype=np.int64)
    for place, row in zip(batch, rows, strict=True):
        place[: len(row)] = row
    return torch.from_numpy(batch)


# ------------------------------------------------------------------------------------------------------------
# One fine-tuning


class Classifier(nn.Module):
    """The pre-trained encoder with one new layer on [CLS]; its pre-training head is left behind. [D29]"""

    def __init__(self, config, num_outputs):
        super().__init__()
        self.encoder = Encoder(config)
        self.dropout = nn.Dropout(0.1)
        self.classifier = nn.Linear(config.hidden_size, num_outputs)
        glorot_uniform_(self.classifier)

    def forward(self, input_ids, sep_token_id):
        """(B, L) ids -> logits (B, num_outputs)."""
        hidden = self.encoder(input_ids, *attention_mask_and_token_types(input_ids, sep_token_id))
        return widen(self.classifier(self.dropout(hidden[:, 0])))


class Model:
    """What is fine-tuned, a folder's shape, weights and tokeniser, and the device and dtype to do it with."""

    def __init__(self, config):
        self.folder = find_model(config)
        self.shape, self.wordpiece = load_config(self.folder), read_tokenizer(self.folder)
        self.device, self.dtype = resolve(config)
        size, expected = len(self.wordpiece.tokens), self.shape.vocab_size
        if size != expected:
            sys.exit(f"{self.folder} contradicts itself: its vocab.txt has {size:,} tokens, and its "
                     f"config.json says {expected:,}")
        positions = self.shape.max_position_embeddings
        if config.max_length > positions:
            sys.exit(f"{self.folder} has {positions} positions; take --max-length {positions} or less")
        network = Classifier(self.shape, 1)
        path = load_weights(network, self.folder, encoder_only=True)
        self.weights, self.pretrained = "random", None
        if not config.random_weights:
            self.weights = hashlib.sha256(path.read_bytes()).hexdigest()
            self.pretrained = network.encoder.state_dict()

    def classifier(self, num_outputs):
        network = Classifier(self.shape, num_outputs)
        if self.pretrained is not None:
            network.encoder.load_state_dict(self.pretrained)
        return network.to(self.device)

    def forward(self, network, rows):
        """Logits (B, num_outputs) of rows, padded to the longest of them."""
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.dtype == "bf16"):
            return network(pad(rows).to(self.device), self.wordpiece.sep_token_id)


def lr_scale(name, num_hidden_layers, decay):
    """A parameter's share of the learning rate: the deeper under the classifier, the smaller. [D28]

    Embeddings have depth 0, layer i has i + 1, and the classifier n + 2. No parameter has n + 1, so that the
    top layer's rate is the classifier's times decay squared, not decay. The official code's author calls that
    a mistake; the published scores have it, and so it is kept.
    """
    match = re.match(r"encoder\.layers\.(\d+)\.", name)
    depth = int(match[1]) + 1 if match else 0 if name.startswith("encoder.") else num_hidden_layers + 2
    return decay ** (num_hidden_layers + 2 - depth)


def finetune(name, seed, data, model, settings, config, progress):
    """Train a classifier on a task and predict: -> predictions by split, a dict of NumPy arrays.

    `data` has (rows, labels) by split; `progress(epoch, examples)` is told of every step.
    """
    task, (rows, labels) = TASKS[name], data["train"]
    torch.manual_seed(int(generator(seed, f"{name} classifier").integers(2**63)))  # and dropout
    network = model.classifier(len(task.labels) or 1).train()
    layers, decay = model.shape.num_hidden_layers, settings["layerwise_lr_decay"]
    optimizer = build_optimizer(network.named_parameters(), config, lambda n: lr_scale(n, layers, decay))

    epochs, size = settings["num_train_epochs"], config.batch_size
    total = num_steps(len(rows), size, epochs)
    warmup = config.warmup_proportion * total
    labels = torch.tensor(labels, dtype=torch.long if task.labels else torch.float32, device=model.device)
    step = 0
    for epoch in range(epochs):
        order = generator(seed, f"{name} order", epoch).permutation(len(rows))
        for chosen in np.split(order, range(size, len(rows), size)):
            logits = model.forward(network, [rows[i] for i in chosen])
            losses(logits, labels[torch.from_numpy(chosen)], task).sum().backward()  # [D34] not the mean
            lr = learning_rate(step, settings["learning_rate"], total, warmup)
            update(optimizer, lr, config.max_grad_norm)
            step += 1
            progress(epoch, len(chosen))
    # The last step is what is scored: no best epoch is picked.
    others = data.keys() - {"train"}
    return {split: predict(network, data[split][0], model, task) for split in others}


def num_steps(num_examples, batch_size, epochs):
    return math.ceil(num_examples / batch_size) * epochs  # [D32]


def losses(logits, labels, task):
    """(B,): cross-entropy, or for STS-B the squared error of the number itself. [D31]"""
    if task.labels:
        return F.cross_entropy(logits, labels, reduction="none")
    return (logits.squeeze(1) - labels) ** 2


@torch.no_grad()
def predict(network, rows, model, task):
    """The places of the likeliest labels, or STS-B's numbers, (N,)."""
    network.eval()
    order = np.argsort([len(row) for row in rows], kind="stable")  # so that little is padded
    parts = np.split(order, range(EVAL_BATCH, len(rows), EVAL_BATCH))
    logits = torch.cat([model.forward(network, [rows[i] for i in part]) for part in parts]).cpu().numpy()
    if not np.isfinite(logits).all():  # that is one answer for all, and a sweep goes on
        tqdm.write(f"{task.title}: the predictions are not finite; try a lower --learning-rate")
        logits = np.zeros_like(logits)
    predictions = np.empty(len(rows), dtype=np.int64 if task.labels else np.float32)
    predictions[order] = logits.argmax(1) if task.labels else logits[:, 0]
    return predictions


# ------------------------------------------------------------------------------------------------------------
# The model folder


def find_model(config):
    """The folder of `--model`: itself, the discriminator of a run, or what is downloaded from the hub."""
    path = Path(config.model)
    for folder in path, path / "discriminator":
        if (folder / "config.json").is_file():
            return folder
    if runs := [str(found.parents[1]) for found in path.glob("*/discriminator/config.json")]:
        sys.exit(f"there is no model in {path}, but in {' and '.join(runs)}")
    is_name = re.fullmatch(r"[\w.-]+/[\w.-]+", config.model) and not path.exists()
    if not is_name or path.parts[0] == TrainConfig.out:
        sys.exit(f"there is no model in {path}: {GET_ONE}")
    folder = Path(config.cache) / "models" / config.model.replace("/", "--")
    make_once(folder, partial(download_model, config.model, folder))
    return folder


def download_model(repository, folder):
    """Download a model of the hub to `folder`, which is there once it is whole and can be read."""
    new = folder.with_name(f"{folder.name}.new")
    instead = (f"or check the name, as there is no folder {repository} here either, or pre-train a model "
               "with `python train.py --size small`")

    def fetch(name):
        download(new / name, f"hub:/{repository}/resolve/main/{name}", instead)

    try:
        fetch("config.json")
        fetch("vocab.txt")
        with suppress(Missing):
            fetch("tokenizer_config.json")
        try:
            fetch("model.safetensors")
        except Missing:
            fetch("pytorch_model.bin")
        load_config(new), read_tokenizer(new), read_weights(new)
        new.rename(folder)
    finally:
        shutil.rmtree(new, ignore_errors=True)


def read_tokenizer(folder):
    """The WordPiece of a folder, with case and accents as its tokenizer_config.json says."""
    path = folder / "tokenizer_config.json"
    settings = parse(path.read_bytes(), path, "take the model's own") if path.exists() else {}
    if not isinstance(settings, dict):
        sys.exit(f"{path} is not a JSON object; take the model's own")
    do_lower_case, strip_accents = settings.get("do_lower_case", True), settings.get("strip_accents")
    strip_accents = do_lower_case if strip_accents is None else strip_accents
    spaces_chinese = settings.get("tokenize_chinese_chars", True)
    if (do_lower_case, strip_accents, spaces_chinese) not in (
            (True, True, True), (True, False, True), (False, False, True)):
        sys.exit(f"{path} asks for what this tokenizer does not do: do_lower_case {do_lower_case}, "
                 f"strip_accents {strip_accents}, tokenize_chinese_chars {spaces_chinese}")
    if not (folder / "vocab.txt").is_file():
        sys.exit(f"{folder} is not a model folder: it has no vocab.txt")
    return WordPiece(read_vocab(folder / "vocab.txt"), do_lower_case, strip_accents)


# ------------------------------------------------------------------------------------------------------------
# The sweep: tasks and seeds, each once


class Sweep:
    """All (task, seed) of a config. What is finished is a line of results.jsonl, and is not done again."""

    def __init__(self, config):
        self.config, self.model = config, Model(config)
        self.folder = Path(config.out)
        self.path = self.folder / "results.jsonl"
        (self.folder / "locks").mkdir(parents=True, exist_ok=True)

    def settings(self, name):
        """All that decides the figures of a task, but the seed."""
        config, model = self.config, self.model
        width = min((width for width in RECIPES if width >= model.shape.hidden_size), default=max(RECIPES))
        peak, decay = RECIPES[width]
        kept = {field.name for field in fields(StepConfig)} - {"device"}
        kept |= {"batch_size", "max_length", "warmup_proportion"}
        return {key: value for key, value in asdict(config).items() if key in kept} | dict(
            dtype=model.dtype,
            learning_rate=config.learning_rate or peak,
            layerwise_lr_decay=config.layerwise_lr_decay or decay,
            num_train_epochs=config.num_train_epochs or TASKS[name].num_train_epochs,
            shape=asdict(model.shape), weights=model.weights, vocab=model.wordpiece.sha256,
            do_lower_case=model.wordpiece.do_lower_case, strip_accents=model.wordpiece.strip_accents,
        )

    def results(self):
        """The finished lines of these settings, by (task, seed)."""
        lines = self.path.read_bytes().split(b"\n")[:-1] if self.path.exists() else []  # the last may be torn
        wanted, done = {name: self.settings(name) for name in self.config.tasks}, {}
        for number, line in enumerate(lines, 1):
            where, remedy = f"{self.path}, line {number},", "delete that line, and its seed is done again"
            entry = parse(line, where, remedy)
            keys = {"task", "seed", "settings", "metrics", "is_constant"}
            if not isinstance(entry, dict) or not keys <= entry.keys():
                sys.exit(f"{where} is not a result; {remedy}")
            name, seed = entry["task"], entry["seed"]
            if entry["settings"] != wanted.get(name) or seed >= self.config.seeds:
                continue
            if not self.keeps_predictions or self.predictions_path(name, seed).exists():
                done[name, seed] = entry
        return done

    def add(self, entry):
        """Append a line to results.jsonl."""
        with (lock(self.folder / "locks" / "results", "waiting to write the results", wait=True),
              open(self.path, "a+b") as file):
            file.seek(0)
            file.truncate(file.read().rfind(b"\n") + 1)  # what a kill tore
            append(file, entry)

    @property
    def keeps_predictions(self):
        return self.config.predict or self.config.submit

    def key(self, name, seed):
        """What files of a (task, seed) are called."""
        return f"{name}-{seed}-{digest(self.settings(name))}"

    def predictions_path(self, name, seed):
        return self.folder / "predictions" / f"{self.key(name, seed)}.npz"

    def run(self):
        """Do all that is not done. What other processes have in hand is waited for, and done if they die."""
        jobs = [(name, seed) for name in self.config.tasks for seed in range(self.config.seeds)]
        done, read = self.results(), None
        for name in dict.fromkeys(name for name, seed in jobs if (name, seed) not in done):
            for _ in self.read(name):
                pass  # what is missing or damaged of any task is said now, and not in the middle of the night
        total = sum(self.examples(name) for name, seed in jobs if (name, seed) not in done)
        with tqdm(total=total, unit=" examples", unit_scale=True, disable=None) as bar:
            # First whatever no other process has in hand, then the rest, one after the other.
            for waits, (name, seed) in itertools.product((False, True), jobs):
                if (name, seed) in done:
                    continue
                claim = self.folder / "locks" / self.key(name, seed)
                busy = f"waiting for another process to finish seed {seed} of {TASKS[name].title}"
                with lock(claim, busy if waits else None, waits) as is_ours:
                    done = self.results()  # another process may have been here
                    if is_ours and (name, seed) not in done:
                        if read != name:
                            read, data = name, self.tokenize(name)
                        self.run_one(name, seed, data, bar)
                        done = self.results()
                    elif is_ours:
                        bar.total -= self.examples(name)

    def examples(self, name):
        task = TASKS[name]
        return task.rows["train"] * (2 if task.both_orders else 1) * self.settings(name)["num_train_epochs"]

    def read(self, name):
        """Yield (split, its examples) of all that is needed of a task."""
        task = TASKS[name]
        splits = [(task, split) for split in ["train", *task.dev_splits]]
        if self.keeps_predictions:
            splits += [(owner, split) for owner in predicted_by(name) for split in owner.submissions]
        for owner, split in splits:
            yield split, read_examples(owner, split, self.config.cache, self.config.glue_dir)

    def tokenize(self, name):
        """(rows, labels) by split, made once for all seeds."""
        wordpiece, length, both_orders = self.model.wordpiece, self.config.max_length, TASKS[name].both_orders
        return {split: build_rows(examples, wordpiece, length, both_orders and split == "train")
                for split, examples in self.read(name)}

    def run_one(self, name, seed, data, bar):
        """Fine-tune a task with a seed, add the line that says how it went, and print its figures."""
        task, settings, began = TASKS[name], self.settings(name), time.perf_counter()

        def progress(epoch, examples):
            place = f"epoch {epoch + 1} of {settings['num_train_epochs']}"
            bar.set_description(f"{task.title}, seed {seed}, {place}", refresh=False)
            bar.update(examples)

        predictions = finetune(name, seed, data, self.model, settings, self.config, progress)
        seconds = time.perf_counter() - began
        metrics = score(task, predictions, {split: data[split][1] for split in task.dev_splits})
        if self.keeps_predictions:
            files = {file: predictions[split] for owner in predicted_by(name)
                     for split, file in owner.submissions.items()}
            with atomic_write(self.predictions_path(name, seed)) as file:
                np.savez(file, **files)
        first = predictions[task.dev_splits[0]]
        self.add(dict(
            task=name, seed=seed, metrics=metrics, is_constant=bool(np.ptp(first) < 1e-5),
            examples={split: len(rows) for split, (rows, _) in data.items()},
            seconds=round(seconds, 1), examples_per_second=round(self.examples(name) / seconds),
            model=str(self.model.folder), finished=time.strftime("%Y-%m-%d %H:%M:%S"),
            device=self.model.device.type, threads=torch.get_num_threads(), python=platform.python_version(),
            torch=str(torch.__version__), numpy=np.__version__, tokenizers=tokenizers.__version__,
            settings=settings,
        ))
        seeds = [entry["metrics"] for (other, _), entry in self.results().items() if other == name]
        figures = "; ".join(f"{metric} {100 * value:.1f}, mean of {len(seeds)} "
                            f"{100 * np.mean([one[metric] for one in seeds]):.1f}"
                            for metric, value in metrics.items())
        tqdm.write(f"{task.title}, seed {seed}, {seconds:.0f} s: {figures}")

    def submit(self, results):
        """Write the zip from each task's best seed, and say which."""
        chosen, files = [], {}
        for name in TASKS:
            metric = TASKS[name].metrics[0]
            best = max(range(self.config.seeds), key=lambda seed: results[name, seed]["metrics"][metric])
            dev = 100 * results[name, best]["metrics"][metric]
            chosen.append(f"{TASKS[name].title} seed {best} ({dev:.1f})")
            with np.load(self.predictions_path(name, best)) as kept:
                files |= {file: kept[file] for file in kept.files}
        write_submission(self.folder / "submission.zip", files)
        return (f"{self.folder / 'submission.zip'} has the test predictions of, by the best dev score of "
                f"{self.config.seeds}: {', '.join(chosen)}")


def table(results, config):
    """What papers print: per task and metric the number of seeds, mean, deviation, median, best; averages."""
    lines = [f"{'':10}{'':22}{'seeds':>6}{'mean':>8}{'sd':>7}{'median':>8}{'best':>7}"]
    means, medians, constant = {}, {}, []
    for name in config.tasks:
        task, entries = TASKS[name], [entry for (other, _), entry in results.items() if other == name]
        if not entries:
            continue
        figures = {metric: 100 * np.array([entry["metrics"][metric] for entry in entries])
                   for metric in entries[0]["metrics"]}
        means[name] = {metric: np.mean(values) for metric, values in figures.items()}
        medians[name] = {metric: np.median(values) for metric, values in figures.items()}
        for metric, values in figures.items():
            deviation = f"{np.std(values, ddof=1):.2f}" if len(values) > 1 else "-"
            mark = "*" if metric == task.metrics[0] and name in AVERAGED_BY_ELECTRA else ""
            lines.append(f"{task.title:10}{metric + mark:22}{len(values):6}{np.mean(values):8.2f}"
                         f"{deviation:>7}{np.median(values):8.2f}{np.max(values):7.2f}")
        if stuck := [str(entry["seed"]) for entry in entries if entry["is_constant"]]:
            constant.append(f"{task.title}: seed {', '.join(stuck)} gave one answer to every example, which "
                            "is counted as it is")
    lines += constant
    for average, tasks, what in () if len(config.tasks) == 1 else (
        (average_of_8, AVERAGED_BY_ELECTRA, "ELECTRA's average of 8 (* each; no WNLI)"),
        (average_of_9, tuple(TASKS), "GLUE's average of 9 (a task's metrics averaged first)"),
    ):
        lacking = [TASKS[name].title for name in tasks if name not in means]
        lines.append(f"{what}: not without {', '.join(lacking)}" if lacking else
                     f"{what}: {average(means):.2f} from means, {average(medians):.2f} from medians")
    if "wnli" in means:
        lines.append("WNLI's dev set is adversarial: to answer with the majority class scores 56.3, which "
                     "trained models seldom beat")
    return "\n".join(lines)


# ------------------------------------------------------------------------------------------------------------


@one_sentence()
def main(argv=None):
    parser = Parser("Fine-tune on GLUE and score. What is finished is kept: the same command goes on.")
    parser.add_fields(FinetuneConfig)
    sweep = Sweep(configure(FinetuneConfig, parser.parse_args(argv)))
    sweep.run()
    results = sweep.results()
    print(table(results, sweep.config))
    print(f"all figures of every seed: {sweep.path}")
    if sweep.config.submit:
        print(sweep.submit(results))


if __name__ == "__main__":
    main()
