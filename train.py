"""Pre-train ELECTRA: optimiser, schedule, loop, checkpoints. `python train.py --size small --data PATH`.

What enters: a recipe and text. What leaves, in out/<size>: log.jsonl, checkpoint.pt, and the two networks as HuggingFace
folders, discriminator/ and generator/. The same command after a kill goes on where the last checkpoint was.

Claim: on a CPU, with the same threads and versions, a run that was killed at any moment and resumed ends in bitwise the
same weights and log lines as one that never was (test_resume_*), since a step's rows, masks, samples and dropout are a
function of (seed, step) and nothing about random state is kept.
"""

import io
import json
import math
import os
import shutil
import signal
import sys
import time
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from data import (
    Cache,
    DataConfig,
    Parser,
    TrainingRows,
    append,
    atomic_write,
    configure,
    digest,
    generator,
    load_wordpiece,
    lock,
    one_sentence,
)
from model import SIZES, Electra, ElectraConfig, save_pretrained, selectable

HELDOUT_ROWS = 1024  # every evaluation is on the same rows, masks and samples
SAVE_SECONDS = 600  # the longest that a kill can cost
HEALTH_STEP, HEALTH_WINDOW = (
    20_000,
    5_000,
)  # when a run should have left its initial state, and for how long it may not


@dataclass(frozen=True)
class TrainConfig:
    """The recipe, and where and how it runs."""

    size: str = "small"  # tiny, small, base or large: the model and its recipe
    batch_size: int = 128  # rows in a step
    num_train_steps: int = 1_000_000  # steps, after which the learning rate is 0
    learning_rate: float = 5e-4  # peak learning rate
    num_warmup_steps: int = 10_000  # steps over which the learning rate rises from 0
    weight_decay: float = 0.01  # decoupled, and not on LayerNorms and biases
    adam_beta1: float = 0.9  # decay of Adam's first moment
    adam_beta2: float = 0.999  # decay of Adam's second moment
    adam_epsilon: float = 1e-6  # what Adam adds to the root of the second moment
    max_grad_norm: float = 1.0  # global norm to which gradients are clipped
    micro_batch_size: int = 0  # rows in one forward pass, to save memory; 0 for all of the batch
    dtype: str = "auto"  # fp32 or bf16; auto is bf16 on CUDA from compute capability 8.0, else fp32
    device: str = "auto"  # cpu or cuda; auto is cuda where there is one
    compile: bool = None  # use torch.compile; None is on CUDA only
    out: str = "out"  # folder for runs; this one goes to its subfolder named as the size
    log_every: int = 100  # steps between lines of log.jsonl
    eval_every: int = 1000  # steps between evaluations on held-out text
    save_every: int = 1000  # steps between checkpoints, which also come every ten minutes, on a logged step
    restart: bool = False  # start over, deleting the run that is there

    def __post_init__(self):
        if self.size not in SIZES:
            sys.exit(f"there is no size {self.size}; there are {', '.join(SIZES)}")
        positive = ("batch_size", "num_train_steps", "log_every", "eval_every", "save_every")
        if wrong := [name for name in positive if getattr(self, name) < 1]:
            sys.exit(f"{wrong[0]} is {getattr(self, wrong[0])}; it must be 1 or more")
        if self.micro_batch_size < 0 or self.batch_size % (self.micro_batch_size or self.batch_size):
            sys.exit(
                f"the batch of {self.batch_size} rows is not a multiple of the micro-batch of {self.micro_batch_size}"
            )
        if self.dtype not in ("auto", "fp32", "bf16"):
            sys.exit(f"there is no dtype {self.dtype}; there are fp32, bf16 and auto")


# What differs from the defaults above and in DataConfig, which are small's.
RECIPES = {
    "tiny": dict(
        data=("python-docs",),
        vocab="train:8192",
        batch_size=32,
        num_train_steps=1500,
        learning_rate=2e-3,
        num_warmup_steps=150,
        log_every=20,
        eval_every=250,
        save_every=100,
    ),
    "small": dict(),
    "base": dict(max_length=512, batch_size=256, num_train_steps=766_000, learning_rate=2e-4),
    "large": dict(max_length=512, batch_size=2048, num_train_steps=400_000, learning_rate=2e-4),
}
SIZE_DEFAULTS = {size: RECIPES[size] | SIZES[size] for size in SIZES}

# A flag is of one of three kinds. Those in neither of these sets change the result: they cannot differ on resume.
ROUNDING = {"micro_batch_size", "dtype", "device", "compile"}  # only the rounding, and the dropout's draws
NEITHER = {"workers", "cache", "out", "log_every", "eval_every", "save_every", "restart"}


# ---------------------------------------------------------------------------------------------------------------------
# Optimiser and schedule


def build_optimizer(parameters, config):
    """torch's AdamW as the official Adam, which corrects no bias. [D24]

    With the count of steps far ahead 1 - beta^step is 1 to the last bit, and the update is exactly the official one.
    `parameters` are tensors or, for learning rates of their own, (tensor, factor) pairs.
    """
    groups = {}
    for parameter in parameters:
        decay = (
            config.weight_decay if parameter.ndim > 1 else 0.0
        )  # [D25] LayerNorms and biases are the vectors
        groups.setdefault(decay, []).append(parameter)
    optimizer = torch.optim.AdamW(
        [dict(params=params, weight_decay=decay) for decay, params in groups.items()],
        lr=0.0,
        betas=(config.adam_beta1, config.adam_beta2),
        eps=config.adam_epsilon,
        fused=True,
    )
    for parameter in (p for group in optimizer.param_groups for p in group["params"]):
        far_ahead = torch.tensor(1e6, dtype=torch.float32, device=parameter.device)
        moments = dict(exp_avg=torch.zeros_like(parameter), exp_avg_sq=torch.zeros_like(parameter))
        optimizer.state[parameter] = dict(step=far_ahead, **moments)
    return optimizer


def learning_rate(step, peak, num_train_steps, num_warmup_steps):
    """Warm-up multiplies the decay, both from step 0: the first step has 0, the last peak / num_train_steps. [D26]"""
    return (
        peak * (1 - step / num_train_steps) * min(1.0, step / num_warmup_steps if num_warmup_steps else 1.0)
    )


def update(optimizer, lr, max_grad_norm):
    """Clip, step, and forget the gradients; return their global norm before clipping, a tensor."""
    parameters = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
    gradients = [parameter.grad for parameter in parameters]
    norm = torch.nn.utils.get_total_norm(gradients)
    # [D27] Over both networks together. torch's own clip_grad_norm_ adds 1e-6 to the norm; the official one does not.
    torch._foreach_mul_(gradients, max_grad_norm / norm.clamp(min=max_grad_norm))
    for group in optimizer.param_groups:
        group["lr"] = lr
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return norm


# ---------------------------------------------------------------------------------------------------------------------
# One step, and what is to be seen of it


def draw_noise(seed, purpose, step, rows, model_config, length):
    """A step's two draws for the whole batch: (rows, L) float64 for masks, (rows, K) float32 for samples."""
    random = generator(seed, purpose, step)
    mask_uniform = random.random((rows, length))
    return mask_uniform, random.random((rows, model_config.num_slots(length)), dtype=np.float32)


def forward_parts(model, input_ids, noise, part_size, device):
    """Run the objective over a batch part by part; yield (loss with its graph, what can be logged, mask) for each.

    All parts divide by the counts of the whole batch, so that losses and gradients add up to those of the one batch.
    """
    batch = [torch.from_numpy(array) for array in (input_ids, *noise)]
    if device.type == "cuda":
        batch = [tensor.pin_memory().to(device, non_blocking=True) for tensor in batch]
    counts = model.counts(batch[0])
    for start in range(0, len(input_ids), part_size):
        ids, mask_uniform, sample_uniform = (tensor[start : start + part_size] for tensor in batch)
        yield model(ids, mask_uniform, sample_uniform, counts), ids, counts


def train_step(model, optimizer, input_ids, noise, lr, config, device, autocast):
    """One update from one batch -> its parts, for the log, and the gradient norm. Waits for nothing on the device."""
    parts = []
    with autocast:
        for output, ids, counts in forward_parts(
            model, input_ids, noise, config.micro_batch_size or config.batch_size, device
        ):
            output.loss.backward()
            parts.append((output._replace(loss=output.loss.detach()), ids, counts))
    return parts, update(optimizer, lr, config.max_grad_norm)


@torch.no_grad()
def evaluate(model, rows, noise, part_size, device, autocast):
    """The figures of `rows`, without dropout."""
    model.eval()
    with autocast:
        parts = list(forward_parts(model, rows, noise, part_size, device))
    model.train()
    return figures(parts)


def figures(parts):
    """What the log says of a batch: fetched from the device here, and only here."""
    outputs = [output for output, _, _ in parts]
    predictions, tokens = parts[0][2].tolist()
    total = {name: sum(getattr(output, name) for output in outputs).item()
             for name in ("loss", "mlm_loss", "disc_loss", "mlm_correct", "sampled_correct")}  # fmt: skip
    is_token = torch.cat([ids != 0 for _, ids, _ in parts])
    logits = torch.cat([output.disc_logits for output in outputs])[is_token].cpu().numpy()
    labels = torch.cat([output.is_replaced for output in outputs])[is_token].cpu().numpy()
    flagged = logits > 0
    caught = float((flagged & labels).sum())
    return {
        "loss": total["loss"],
        "mlm_loss": total["mlm_loss"],
        "mlm_accuracy": total["mlm_correct"] / predictions,
        "sampled_accuracy": total["sampled_correct"] / predictions,
        "disc_loss": total["disc_loss"],
        "all_original": entropy(np.array([labels.sum(), (~labels).sum()]) / tokens),
        "auc": area_under_curve(logits, labels),
        "precision": caught / max(1, flagged.sum()),
        "recall": caught / max(1, labels.sum()),
    }


def entropy(probabilities):
    """In nats. Of (p, 1 - p), the loss of a discriminator that has learnt the rate of fakes p and nothing else."""
    probabilities = probabilities[probabilities > 0]
    return float(-(probabilities * np.log(probabilities)).sum())


def area_under_curve(scores, labels):
    """The probability that a positive scores above a negative, ties counting half; 0.5 where there is only one kind."""
    positives = int(labels.sum())
    negatives = labels.size - positives
    if not positives or not negatives:
        return 0.5
    _, place, ties = np.unique(scores, return_inverse=True, return_counts=True)
    ranks = (np.cumsum(ties) - (ties - 1) / 2)[
        place
    ]  # 1 for the lowest score, the mean rank where scores tie
    return float((ranks[labels].sum() - positives * (positives + 1) / 2) / (positives * negatives))


def unigram_entropy(rows, model_config):
    """The MLM loss, in nats, of a generator that knows how frequent each token is in `rows`, and nothing else."""
    ids = torch.from_numpy(rows)
    counts = np.bincount(ids[selectable(ids, model_config)].numpy())
    return entropy(counts / counts.sum())


def diagnose(lines, num_warmup_steps):
    """A sentence on what looks wrong in the training lines of a log, or None."""
    last = lines[-1]["step"]
    recent = [line for line in lines if line["step"] > last - HEALTH_WINDOW]
    if last < max(HEALTH_STEP, 2 * num_warmup_steps) or recent[0]["step"] > last - HEALTH_WINDOW / 2:
        return None
    if min(line["mlm_loss"] for line in recent) > 6:
        return (f"the generator looks stuck: MLM loss above 6 after {last} steps; "
                "the likely cause is a learning rate that is too high, or text that is not prose")  # fmt: skip
    if all(line["disc_loss"] >= 0.97 * line["all_original"] for line in recent):
        return (f"the discriminator looks collapsed: for {HEALTH_WINDOW} steps it has told fakes no better than by their "
                "rate; the likely cause is a generator that is too large or a learning rate that is too high")  # fmt: skip
    return None


# ---------------------------------------------------------------------------------------------------------------------
# The run


class Run:
    """One pre-training run in its folder: model, optimiser, step, log and checkpoint."""

    def __init__(self, config, data_config, model_config, cache):
        self.config, self.data_config, self.model_config, self.cache = (
            config,
            data_config,
            model_config,
            cache,
        )
        self.folder = Path(config.out) / config.size
        self.checkpoint, self.log_path = self.folder / "checkpoint.pt", self.folder / "log.jsonl"
        self.device, self.dtype, compiled = resolve(config)
        # What a checkpoint must agree with to be gone on from, and what may differ but is logged.
        corpus = cache.made_from | {"files": digest(cache.made_from["files"])}
        recipe = {name: value for name, value in asdict(config).items() if name not in ROUNDING | NEITHER}
        self.settings = corpus | recipe | asdict(model_config)
        self.rounding = dict(
            device=self.device.type,
            dtype=self.dtype,
            compile=compiled,
            torch=str(torch.__version__),
            micro_batch_size=config.micro_batch_size,
            threads=torch.get_num_threads(),
        )
        torch.manual_seed(data_config.seed)
        self.model = Electra(model_config).to(self.device).train()
        self.optimizer = build_optimizer(self.model.parameters(), config)
        self.callable = torch.compile(self.model, fullgraph=True) if compiled else self.model
        self.step, self.lines = 0, []

    def autocast(self):
        return torch.autocast(self.device.type, torch.bfloat16) if self.dtype == "bf16" else nullcontext()

    def save(self):
        """Write the checkpoint; the one before it stays until this one is whole."""
        if not all(p.isfinite().all() for p in self.model.parameters()):
            self.stop_for("a weight")
        state = dict(step=self.step, model=self.model.state_dict(), optimizer=self.optimizer.state_dict(),
                     settings=self.settings, rounding=self.rounding, log_bytes=self.log_path.stat().st_size)  # fmt: skip
        # By way of memory: on a full disk torch.save to a file reports its own confusion, not the disk's error.
        buffer = io.BytesIO()
        torch.save(state, buffer)
        with atomic_write(self.checkpoint) as file:
            file.write(buffer.getbuffer())

    def load(self):
        """Go on from the checkpoint if there is one. Log lines that were written after it are cut."""
        if self.config.restart:
            for path in (self.checkpoint, self.log_path):
                path.unlink(missing_ok=True)
        if not self.checkpoint.exists():
            with open(self.log_path, "wb") as log:
                append(log, {"settings": self.settings, "rounding": self.rounding})
            self.save()
            return
        state = torch.load(self.checkpoint, map_location=self.device, weights_only=True)
        before, now = state["settings"], self.settings
        if differing := [
            name for name in sorted(before.keys() | now.keys()) if before.get(name) != now.get(name)
        ]:
            listed = ", ".join(f"{name} {before.get(name)} -> {now.get(name)}" for name in differing)
            sys.exit(f"{self.folder} holds another run ({listed}); go on with its settings, choose another --out, or"
                     " --restart")  # fmt: skip
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.step = state["step"]
        with open(self.log_path, "r+b") as log:
            log.truncate(state["log_bytes"])
        with open(self.log_path, "rb") as log:
            self.lines = [entry for entry in map(json.loads, log) if entry.get("split") == "train"]
        if state["rounding"] != self.rounding:
            with open(self.log_path, "ab") as log:
                append(log, {"rounding": self.rounding, "from_step": self.step})

    def stop_for(self, what):
        sys.exit(f"{what} is not finite after step {self.step}; the likely cause is a learning rate that is too high, or "
                 f"--dtype bf16 on a device without it; the checkpoint in {self.folder} is from before")  # fmt: skip

    def log(self, line):
        """Add a line to log.jsonl, after a look at whether it makes sense."""
        if not all(math.isfinite(value) for value in line.values() if isinstance(value, float)):
            self.stop_for("the loss or the gradient")
        with open(self.log_path, "ab") as log:
            append(log, line)
        if line["split"] == "train":
            self.lines.append(line)

    def train(self, rows, heldout):
        """Steps from wherever the run is to its end."""
        config, seed, length = self.config, self.data_config.seed, self.data_config.max_length
        saved_step, saved_time, warned = self.step, time.monotonic(), False
        with (
            stop_signals() as signals,
            tqdm(
                total=config.num_train_steps, initial=self.step, desc=config.size, unit="step", disable=None
            ) as bar,
        ):
            batches = rows.batches(self.step, config.batch_size)
            clock, clock_step = time.perf_counter(), self.step
            while self.step < config.num_train_steps:
                input_ids = next(batches)
                noise = draw_noise(seed, "noise", self.step, config.batch_size, self.model_config, length)
                torch.manual_seed(int(generator(seed, "dropout", self.step).integers(2**63)))
                lr = learning_rate(
                    self.step, config.learning_rate, config.num_train_steps, config.num_warmup_steps
                )
                parts, norm = train_step(
                    self.callable, self.optimizer, input_ids, noise, lr, config, self.device, self.autocast()
                )
                self.step += 1
                bar.update()
                is_last = self.step == config.num_train_steps
                if self.step == 1 or self.step % config.log_every == 0 or is_last:
                    line = {
                        "split": "train",
                        **self.progress(rows),
                        "lr": lr,
                        **figures(parts),
                        "grad_norm": norm.item(),
                    }
                    positions = (self.step - clock_step) * config.batch_size * length
                    line["tokens_per_second"] = round(positions / (time.perf_counter() - clock))
                    self.log(line)
                    bar.set_postfix(
                        {name: f"{line[name]:.4g}" for name in ("loss", "lr", "tokens_per_second")}
                    )
                    if not warned and (warned := diagnose(self.lines, config.num_warmup_steps)):
                        tqdm.write(f"warning: {warned}")
                    if len(heldout) and (self.step % config.eval_every < config.log_every or is_last):
                        tqdm.write(self.evaluate(rows, heldout))
                    due = (
                        self.step - saved_step >= config.save_every
                        or time.monotonic() - saved_time > SAVE_SECONDS
                    )
                    if due or is_last:
                        self.save()
                        saved_step, saved_time = self.step, time.monotonic()
                    clock, clock_step = time.perf_counter(), self.step
                if signals:
                    self.save()
                    sys.exit(
                        f"stopped after step {self.step}, and saved; the same command goes on from there"
                    )

    def progress(self, rows):
        seen = self.step * self.config.batch_size
        return {
            "step": self.step,
            "tokens": seen * self.data_config.max_length,
            "epoch": round(seen / rows.per_epoch, 4),
        }

    def evaluate(self, rows, heldout):
        """Log the figures of the held-out rows and return them as a sentence."""
        config, started = self.config, time.perf_counter()
        noise = draw_noise(
            self.data_config.seed, "heldout", 0, len(heldout), self.model_config, heldout.shape[1]
        )
        part_size = config.micro_batch_size or config.batch_size
        line = evaluate(self.model, heldout, noise, part_size, self.device, self.autocast())
        self.log(
            {
                "split": "heldout",
                **self.progress(rows),
                **line,
                "seconds": round(time.perf_counter() - started, 2),
            }
        )
        return (
            f"step {self.step}, held-out text: generator MLM loss {line['mlm_loss']:.3f}; discriminator loss "
            f"{line['disc_loss']:.4f}, {line['disc_loss'] / line['all_original']:.3f} of the all-original line, "
            f"AUC {line['auc']:.3f}"
        )

    def export(self):
        """Write discriminator/ and generator/, each whole before it takes the place of what was there."""
        wordpiece = self.cache.wordpiece
        for name in ("discriminator", "generator"):
            network, folder, new = getattr(self.model, name), self.folder / name, self.folder / f"{name}.new"
            if new.exists():  # left by a kill
                shutil.rmtree(new)
            shape = getattr(self.model_config, name)()
            save_pretrained(
                network, shape, new, wordpiece.tokens, wordpiece.do_lower_case, wordpiece.strip_accents
            )
            if folder.exists():
                shutil.rmtree(folder)
            new.rename(folder)


@contextmanager
def stop_signals():
    """A list that Ctrl-C and SIGTERM put themselves into, to be looked at between steps; a second one stops at once."""
    signals = []

    def note(number, frame):
        if signals:
            sys.exit("stopped at once; the same command goes on from the last checkpoint")
        signals.append(number)

    before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield signals
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def resolve(config):
    """-> device, "fp32" or "bf16", whether to compile: what "auto" and None stand for on this machine."""
    if config.device not in ("auto", "cpu", "cuda") or (
        config.device == "cuda" and not torch.cuda.is_available()
    ):
        sys.exit(f"there is no device {config.device} here; --device takes cpu, cuda or auto")
    cuda = torch.cuda.is_available() and config.device != "cpu"
    if cuda:
        torch.set_float32_matmul_precision("high")  # TF32 for what is fp32
    dtype = config.dtype
    if dtype == "auto":
        dtype = "bf16" if cuda and torch.cuda.get_device_capability() >= (8, 0) else "fp32"
    return torch.device("cuda" if cuda else "cpu"), dtype, cuda if config.compile is None else config.compile


# ---------------------------------------------------------------------------------------------------------------------
# What it has learnt, to look at

COLOURS = {"=": 36, "✓": 32, "✗": 31, "!": 33}
LEGEND = {"[word =]": "the generator found the word that was hidden", "[word→other ✓]": "it put another, the discriminator "
          "caught it", "[word→other ✗]": "missed it", "[word !]": "false alarm"}  # fmt: skip


@torch.no_grad()
def show(run, heldout, count=3):
    """Print held-out rows with what was masked, what the generator put there, and what the discriminator made of it."""
    colour = sys.stdout.isatty() and "NO_COLOR" not in os.environ
    rows = heldout[:count]
    noise = draw_noise(run.data_config.seed, "heldout", 0, len(rows), run.model_config, rows.shape[1])
    run.model.eval()
    with run.autocast():
        [(output, _, _)] = forward_parts(run.model, rows, noise, len(rows), run.device)
    run.model.train()
    tokens = run.cache.wordpiece.tokens
    selected = torch.zeros_like(output.is_replaced).scatter(1, output.positions, output.weights > 0)
    print("\nHeld-out text. " + ", ".join(f"{sign}: {meaning}" for sign, meaning in LEGEND.items()))
    for row, read, masked, flagged in zip(
        rows, output.corrupted_ids.tolist(), selected.tolist(), (output.disc_logits > 0).tolist(), strict=True
    ):
        text = ""
        for original, seen, is_masked, is_flagged in zip(row, read, masked, flagged, strict=True):
            if not original:
                break
            word, sign = tokens[original], ""
            if seen != original:
                word, sign = f"{word}→{tokens[seen]}", "✓" if is_flagged else "✗"
            elif is_masked or is_flagged:
                sign = "!" if is_flagged else "="
            if sign:
                word = f"[{word} {sign}]"
                word = f" \033[{COLOURS[sign]}m{word}\033[0m" if colour else f" {word}"
            else:
                word = word[2:] if word.startswith("##") else f" {word}"
            text += word
        print(f"\n{text.strip()}")


# ---------------------------------------------------------------------------------------------------------------------


@one_sentence()
def main(argv=None):
    parser = Parser(
        "Pre-train ELECTRA. The same command after a stop or a kill goes on from the last checkpoint."
    )
    for config_class in (TrainConfig, DataConfig, ElectraConfig):
        parser.add_fields(config_class, SIZE_DEFAULTS)
    typed = parser.parse_args(argv)
    config = configure(TrainConfig, typed, **SIZE_DEFAULTS.get(getattr(typed, "size", TrainConfig.size), {}))
    defaults = SIZE_DEFAULTS[config.size]
    data_config = configure(DataConfig, typed, **defaults)
    model_config = configure(ElectraConfig, typed, **defaults)
    if data_config.max_length > model_config.max_position_embeddings:
        sys.exit(f"max_length {data_config.max_length} is over the model's max_position_embeddings"
                 f" {model_config.max_position_embeddings}; raise that too")  # fmt: skip
    wordpiece = load_wordpiece(data_config)
    model_config = replace(
        model_config,
        vocab_size=len(wordpiece.tokens),
        cls_token_id=wordpiece.cls_token_id,
        sep_token_id=wordpiece.sep_token_id,
        mask_token_id=wordpiece.mask_token_id,
    )
    cache = Cache(data_config, wordpiece)
    cache.prepare()
    print(cache.describe())
    folder = Path(config.out) / config.size
    folder.mkdir(parents=True, exist_ok=True)
    with lock(folder / "lock", f"another process is training in {folder}; choose another --out"):
        run = Run(config, data_config, model_config, cache)
        run.load()
        rows, heldout = TrainingRows(cache), cache.heldout(HELDOUT_ROWS).astype(np.int64)
        if len(heldout):
            print(f"held-out text: {len(heldout)} rows; word frequencies alone would give an MLM loss of "
                  f"{unigram_entropy(heldout, model_config):.3f}")  # fmt: skip
        else:
            print(
                "no document of this text is held out (one in a hundred is), so there will be no evaluation"
            )
        run.train(rows, heldout)
        run.export()
        if len(heldout):
            show(run, heldout)
        print(
            f"\n{folder / 'discriminator'} and {folder / 'generator'} are ready for fine-tuning and for transformers"
        )


if __name__ == "__main__":
    main()
