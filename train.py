"""Pre-train ELECTRA: `python train.py --size small`. Optimizer, schedule, the loop, checkpoints.

Read `train` first: the loop. out/<size> receives log.jsonl, checkpoint.pt and, at the end, the two networks
as HuggingFace folders, discriminator/ and generator/. The same command resumes a run that was stopped.

On a CPU, with the same threads and versions, a run that is killed at any moment and resumed ends in the same
bits as one that never was: rows, masks, samples and dropout of a step are functions of (seed, step), and no
random state is kept.
"""

import os

# OpenMP threads spin at barriers. On a machine with other work to do, the default makes training crawl.
os.environ.setdefault("GOMP_SPINCOUNT", "10000")

import argparse
import inspect
import io
import math
import pickle
import re
import shutil
import signal
import sys
import time
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from data import (
    Cache,
    DataConfig,
    Order,
    UserError,
    append_json,
    atomic_write,
    load_wordpiece,
    lock,
    parse_json,
    prepare,
    producing,
    rng,
)
from model import SIZES, Electra, ElectraConfig, ModelError, count, save_pretrained, selectable

HELDOUT_ROWS = 1024  # rows of every evaluation, always with the same masks and samples
SAVE_SECONDS = 600  # the most work that a kill can cost
SHOWN_ROWS, SHOWN_TOKENS = 5, 40  # what is shown at the end
SLOW_DAYS = 14  # a run that takes longer is a mistake


@dataclass(frozen=True)
class StepConfig:
    """What an optimizer step of pre-training and one of fine-tuning have in common."""

    weight_decay: float = 0.01  # decoupled weight decay, not of LayerNorms and biases
    adam_beta1: float = 0.9  # decay of Adam's first moment
    adam_beta2: float = 0.999  # decay of Adam's second moment
    adam_epsilon: float = 1e-6  # added to the root of Adam's second moment
    max_grad_norm: float = 1.0  # global norm to which gradients are clipped
    dtype: str = "auto"  # fp32 or bf16; auto is bf16 on a GPU that has it, else fp32
    device: str = "auto"  # cpu or cuda; auto is cuda if there is one


@dataclass(frozen=True)
class TrainConfig(StepConfig):
    """The recipe, and where and how it runs."""

    size: str = "small"  # tiny, small, base or large: the model and its recipe
    batch_size: int = 128  # rows in a step
    num_train_steps: int = 1_000_000  # steps, after which the learning rate is 0
    learning_rate: float = 5e-4  # peak learning rate
    num_warmup_steps: int = 10_000  # steps over which the learning rate rises from 0
    micro_batch_size: int = 0  # rows in a forward pass, to save memory; 0 is batch_size
    compile: bool = None  # use torch.compile; None is on a GPU only
    out: str = "out"  # folder for runs; this one goes to its subfolder SIZE
    log_every: int = 100  # steps between lines of log.jsonl
    eval_every: int = 1000  # steps between evaluations on held-out text
    save_every: int = 1000  # steps between checkpoints; there is one every ten minutes, too
    restart: bool = False  # delete the run in the folder and start over
    prepare_only: bool = False  # prepare the text, and do not train
    show: int = 0  # with --prepare-only: print so many rows

    def __post_init__(self):
        if self.size not in SIZES:
            raise UserError(f"there is no size {self.size}; there are {', '.join(SIZES)}")
        for name in ("batch_size", "num_train_steps", "log_every", "eval_every", "save_every"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} is {getattr(self, name)}; it must be at least 1")
        if self.micro_batch_size and self.batch_size % self.micro_batch_size:
            raise UserError(f"a batch of {self.batch_size} rows does not split into micro-batches of "
                            f"{self.micro_batch_size}")


# What differs from the defaults, here and in DataConfig, which are small's.
RECIPES = {
    "tiny": dict(data=["python-docs"], vocab="train:2048", max_length=32, batch_size=32, num_train_steps=6000,
                 learning_rate=1e-3, num_warmup_steps=500, log_every=50, eval_every=500, save_every=1000),
    "small": dict(),
    "base": dict(max_length=512, batch_size=256, num_train_steps=766_000, learning_rate=2e-4),
    "large": dict(max_length=512, batch_size=2048, num_train_steps=400_000, learning_rate=2e-4),
}
DEFAULTS = {size: RECIPES[size] | SIZES[size] for size in SIZES}
# Flags that a resumed run may change. All others decide its result.
MAY_CHANGE = {"micro_batch_size", "dtype", "device", "compile", "workers", "cache", "out", "log_every",
              "eval_every", "save_every", "restart", "prepare_only", "show"}


# ------------------------------------------------------------------------------------------------------------
# The loop


def train(run, cache, producer_error):
    """Take steps until the last one, a signal or an error of the producer. All that is done is then saved."""
    config, model, optimizer, device = run.config, run.model, run.optimizer, run.config.device
    forward = torch.compile(model, fullgraph=True) if config.compile else model
    order, heldout, error, warning = Order(cache, config.batch_size), None, None, None
    saved_at = logged_at = time.perf_counter()
    first_step = logged_step = run.step
    with (stop_signals() as signals,
          tqdm(total=config.num_train_steps, initial=run.step, unit=" steps", disable=None) as bar):
        while run.step < config.num_train_steps and not signals and not error:
            is_last = run.step + 1 == config.num_train_steps
            evaluates = is_last or (run.step + 1) % config.eval_every == 0

            # Rows: they may still be on their way.
            batch = order.batch(run.step)
            if evaluates and heldout is None:
                heldout = run.load_heldout(cache)
            if batch is None or (evaluates and heldout is None):
                bar.set_description("waiting for text")
                error = producer_error()
                time.sleep(0.05)
                continue
            epoch, input_ids = batch
            uniforms = run.draw("train", run.step, len(input_ids))
            input_ids, uniforms = (tensor.to(device) for tensor in (torch.from_numpy(input_ids), uniforms))

            # Forward and backward, in micro-batches whose gradients add up to that of the batch.
            lr = learning_rate(run.step, config.learning_rate, config.num_train_steps,
                               config.num_warmup_steps)
            for group in optimizer.param_groups:
                group["lr"] = lr * group["lr_scale"]
            torch.manual_seed(int(rng(run.seed, "dropout", run.step).integers(2**63)))
            counts = count(input_ids, model.config)
            size, outputs = config.micro_batch_size, []
            for ids, numbers in zip(input_ids.split(size), uniforms.split(size), strict=True):
                with autocast(config):
                    output = forward(ids, numbers, counts)
                output.loss.backward()
                outputs.append(output._replace(loss=output.loss.detach()))
            grad_norm = torch.nn.utils.clip_grad_norm_(model.parameters(), config.max_grad_norm)  # [D27]
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            run.step += 1
            bar.update()

            # Log, evaluate, save. A log line is about its own step, so checkpoints leave no trace in the log.
            saves = is_last or run.step % config.save_every == 0
            if evaluates or saves or run.step == 1 or run.step % config.log_every == 0:
                metrics = compute_metrics(outputs, input_ids, counts)  # waits for the device
                seconds = (time.perf_counter() - logged_at) / (run.step - logged_step)
                line = run.log("train", epoch, lr=lr, **metrics, grad_norm=grad_norm.item(),
                               tokens_per_second=round(input_ids.numel() / seconds))
                bar.set_description(f"loss {line['loss']:.3f}, {line['tokens_per_second']:,} tokens/s")
                if warning is None and (warning := diagnose(run.lines, config.num_warmup_steps)):
                    tqdm.write(f"warning: {warning}")
                days = seconds * (config.num_train_steps - run.step) / 86_400
                if logged_step < first_step + 100 <= run.step and days > SLOW_DAYS:
                    tqdm.write(f"at this rate the rest takes {days:.0f} days; `--size tiny` takes minutes on "
                               "a CPU, and the other sizes need a GPU")
                logged_at, logged_step = time.perf_counter(), run.step
            if evaluates and len(heldout):
                line = run.log("heldout", epoch, **compute_metrics(*run.evaluate(heldout)))
                share = line["disc_loss"] / line["all_original"]
                tqdm.write(f"step {run.step}, held-out text: MLM loss {line['mlm_loss']:.3f}, discriminator "
                           f"loss {share:.3f} x all-original, AUC {line['auc']:.3f}")
            if saves or time.perf_counter() - saved_at > SAVE_SECONDS:
                run.save()
                saved_at = time.perf_counter()
            if run.step == first_step + 1:  # the first step compiles; rates are of the others
                logged_at, logged_step = time.perf_counter(), run.step
    if run.step < config.num_train_steps:
        run.save()
        again = "the same command" + " without --restart" * config.restart
        raise UserError(error or f"stopped and saved after step {run.step}; {again} resumes")


# ------------------------------------------------------------------------------------------------------------
# Optimizer and schedule


def build_optimizer(parameters, config, lr_scale=None):
    """torch's AdamW as the official Adam, which does not correct the bias of its moments. [D24]

    `parameters` are (name, parameter) pairs. `lr_scale(name)` is a parameter's share of the learning rate.
    With the step count preset far ahead, 1 - beta^step is 1 to the last bit: the update is exactly the
    official one, and the fused kernel can be used.
    """
    groups = {}
    for name, parameter in parameters:
        decay = config.weight_decay if parameter.ndim > 1 else 0.0  # [D25] not of LayerNorms and biases
        options = dict(weight_decay=decay, lr_scale=lr_scale(name) if lr_scale else 1.0)
        groups.setdefault(tuple(options.items()), []).append(parameter)
    optimizer = torch.optim.AdamW(
        [dict(options, params=members) for options, members in groups.items()], lr=0.0,
        betas=(config.adam_beta1, config.adam_beta2), eps=config.adam_epsilon, fused=True)
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            optimizer.state[parameter] = dict(
                step=torch.tensor(1e6, dtype=torch.float32, device=parameter.device),
                exp_avg=torch.zeros_like(parameter), exp_avg_sq=torch.zeros_like(parameter))
    return optimizer


def learning_rate(step, peak, num_train_steps, num_warmup_steps):
    """Warm-up multiplies the linear decay, both from step 0. [D26]

    >>> [round(learning_rate(step, 1.0, 100, 10), 3) for step in (0, 5, 10, 99)]
    [0.0, 0.475, 0.9, 0.01]
    """
    warmup = min(1.0, step / num_warmup_steps) if num_warmup_steps else 1.0
    return peak * (1 - step / num_train_steps) * warmup


def autocast(config):
    """bf16 where the config asks for it."""
    device = torch.device(config.device).type
    return torch.autocast(device, torch.bfloat16, enabled=config.dtype == "bf16")


# ------------------------------------------------------------------------------------------------------------
# Metrics


def compute_metrics(outputs, input_ids, counts):
    """The metrics of a batch from the Outputs of its micro-batches. They cross from the device here."""
    predictions, _ = counts.tolist()
    is_token = (input_ids != 0).cpu().numpy()
    logits = torch.cat([output.disc_logits for output in outputs]).cpu().numpy()[is_token]
    is_replaced = torch.cat([output.is_replaced for output in outputs]).cpu().numpy()[is_token]

    def total(name):
        return sum(getattr(output, name) for output in outputs).item()

    flagged = logits > 0
    caught, fake_rate = int((flagged & is_replaced).sum()), is_replaced.mean()
    return {
        "loss": total("loss"),
        "mlm_loss": total("mlm_loss"),
        "mlm_accuracy": total("mlm_correct") / predictions,
        "sampled_accuracy": total("sampled_correct") / predictions,
        "disc_loss": total("disc_loss"),
        # The loss of a discriminator that knows the share of replaced tokens and nothing else.
        "all_original": entropy(np.array([fake_rate, 1 - fake_rate])),
        "auc": area_under_curve(logits, is_replaced),
        "precision": caught / max(1, int(flagged.sum())),
        "recall": caught / max(1, int(is_replaced.sum())),
    }


def entropy(probabilities):
    """In nats."""
    probabilities = probabilities[probabilities > 0]
    return float(-(probabilities * np.log(probabilities)).sum())


def area_under_curve(scores, labels):
    """The probability that a positive scores above a negative; ties count half. 0.5 if either is missing."""
    positives = int(labels.sum())
    negatives = labels.size - positives
    if not positives or not negatives:
        return 0.5
    return float((ranks(scores)[labels].sum() - positives * (positives + 1) / 2) / (positives * negatives))


def ranks(values):
    """Ranks from 1. Ties share the mean of their ranks.

    >>> ranks(np.array([0.3, 0.1, 0.3])).tolist()
    [2.5, 1.0, 2.5]
    """
    _, place, ties = np.unique(values, return_inverse=True, return_counts=True)
    return (np.cumsum(ties) - (ties - 1) / 2)[place]


def unigram_entropy(rows, model_config):
    """The MLM loss, in nats, of a generator that knows only how frequent each token of `rows` is."""
    ids = torch.from_numpy(rows)
    frequencies = np.bincount(ids[selectable(ids, model_config)].numpy())
    return entropy(frequencies / frequencies.sum())


def diagnose(lines, num_warmup_steps):
    """A sentence about the last 5,000 steps of a log if they look unhealthy, else None."""
    last = lines[-1]["step"]
    if last < max(20_000, 2 * num_warmup_steps):
        return None
    recent = [line for line in lines if line["step"] > last - 5_000]
    if min(line["mlm_loss"] for line in recent) > 6:
        return f"the generator is stuck at an MLM loss above 6 at step {last}; try a lower learning rate"
    if all(line["disc_loss"] >= 0.97 * line["all_original"] for line in recent):
        return (f"the discriminator knows little but the share of replaced tokens at step {last}; try a "
                "smaller generator, or a lower learning rate")
    return None


# ------------------------------------------------------------------------------------------------------------
# The run and its folder


class Run:
    """Model, optimizer and step of a run, and its folder with log and checkpoint."""

    def __init__(self, config, data_config, model_config, cache):
        self.config, self.seed, self.max_length = config, data_config.seed, data_config.max_length
        self.wordpiece, self.folder = cache.wordpiece, Path(config.out) / config.size
        self.checkpoint, self.log_path = self.folder / "checkpoint.pt", self.folder / "log.jsonl"
        everything = asdict(config) | asdict(model_config) | cache.fingerprint
        self.settings = {name: value for name, value in everything.items() if name not in MAY_CHANGE}
        # What may change on resume but changes the rounding, and so is logged.
        self.numerics = dict(device=config.device, dtype=config.dtype, compile=config.compile,
                             micro_batch_size=config.micro_batch_size, threads=torch.get_num_threads(),
                             torch=str(torch.__version__))
        torch.manual_seed(self.seed)
        self.model = Electra(model_config).to(config.device).train()
        self.optimizer = build_optimizer(self.model.named_parameters(), config)
        self.step, self.lines = 0, []  # the lines of the log about training steps

    def draw(self, purpose, step, num_rows):
        """The uniform numbers (B, L + 2K) of a step's masks and samples."""
        width = self.max_length + 2 * self.model.config.num_slots(self.max_length)
        return torch.from_numpy(rng(self.seed, purpose, step).random((num_rows, width), dtype=np.float32))

    def load_heldout(self, cache):
        """The held-out rows, or None while they have not arrived. Prints the baseline of the MLM loss."""
        heldout = cache.heldout(HELDOUT_ROWS)
        if heldout is not None and len(heldout):
            unigram = unigram_entropy(heldout, self.model.config)
            tqdm.write(f"{len(heldout):,} rows are held out; word frequencies alone give them an MLM loss of "
                       f"{unigram:.3f}")
        elif heldout is not None:
            tqdm.write("no evaluation: one document in a hundred is held out, and this text has too few")
        return heldout

    @torch.no_grad()
    def evaluate(self, rows):
        """(Outputs, ids, counts) of rows, without dropout, with the same masks and samples every time."""
        self.model.eval()
        uniforms, ids = self.draw("heldout", 0, len(rows)), torch.from_numpy(rows)
        ids, uniforms = ids.to(self.config.device), uniforms.to(self.config.device)
        counts, size = count(ids, self.model.config), self.config.micro_batch_size
        parts = zip(ids.split(size), uniforms.split(size), strict=True)
        with autocast(self.config):
            outputs = [self.model(*part, counts) for part in parts]
        self.model.train()
        return outputs, ids, counts

    def log(self, split, epoch, **values):
        """Add a line to log.jsonl and return it. A value that is not finite stops the run."""
        if not all(map(math.isfinite, values.values())):
            self.stop_diverged("the loss or the gradient")
        tokens = self.step * self.config.batch_size * self.max_length
        line = dict(split=split, step=self.step, tokens=tokens, epoch=epoch, **values)
        with open(self.log_path, "ab") as log:
            append_json(log, line)
        if split == "train":
            self.lines.append(line)
        return line

    def save(self):
        """Write the checkpoint. The one before it stays until this one is whole."""
        if not all(parameter.isfinite().all() for parameter in self.model.parameters()):
            self.stop_diverged("a weight")
        state = dict(step=self.step, settings=self.settings, numerics=self.numerics,
                     model=self.model.state_dict(), optimizer=self.optimizer.state_dict(),
                     log_bytes=self.log_path.stat().st_size)
        buffer = io.BytesIO()  # on a full disk torch.save reports an error of its own, not the disk's
        torch.save(state, buffer)
        with atomic_write(self.checkpoint) as file:
            file.write(buffer.getbuffer())

    def stop_diverged(self, what):
        raise UserError(f"{what} is not finite after step {self.step}; the checkpoint before it is kept; use "
                        "--restart with a lower --learning-rate")

    def load_checkpoint(self):
        """The state to resume from, or None. A checkpoint of another run is refused."""
        if self.config.restart or not self.checkpoint.exists():
            return None
        try:
            state = torch.load(self.checkpoint, map_location=self.config.device, weights_only=True)
        except (RuntimeError, pickle.UnpicklingError, EOFError):
            raise UserError(f"{self.checkpoint} is damaged; --restart starts over") from None
        old, new = state["settings"], self.settings
        changed = [f"{name} was {old.get(name)} and is now {new.get(name)}"
                   for name in sorted(old.keys() | new.keys()) if old.get(name) != new.get(name)]
        if changed:
            raise UserError(f"{self.folder} holds another run ({'; '.join(changed)}); use its settings, "
                            "another --out, or --restart")
        return state

    def start(self, state):
        """Start over, or resume from a state: what was logged after it is cut off."""
        if state is None:
            self.checkpoint.unlink(missing_ok=True)  # first, so that it never stands beside another run's log
            for name in ("discriminator", "generator"):
                shutil.rmtree(self.folder / name, ignore_errors=True)
            with open(self.log_path, "wb") as log:
                append_json(log, dict(settings=self.settings, numerics=self.numerics))
            self.save()
            return
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.step = state["step"]
        with open(self.log_path, "r+b") as log:
            log.truncate(state["log_bytes"])
            entries = [parse_json(line, self.log_path) for line in log]
            if state["numerics"] != self.numerics:
                append_json(log, dict(step=self.step, numerics=self.numerics))
        self.lines = [entry for entry in entries if entry.get("split") == "train"]
        print(f"resuming after step {self.step} of {self.config.num_train_steps}")

    def export(self):
        """Write discriminator/ and generator/. A folder that is there stays until the new one is whole."""
        for name in ("discriminator", "generator"):
            folder, new = self.folder / name, self.folder / f"{name}.tmp"
            shutil.rmtree(new, ignore_errors=True)
            save_pretrained(getattr(self.model, name), new)
            self.wordpiece.save(new, self.max_length)
            shutil.rmtree(folder, ignore_errors=True)
            new.rename(folder)


@contextmanager
def stop_signals():
    """A list to which the first Ctrl-C or SIGTERM adds itself. The second one kills."""
    received = []

    def receive(number, frame):
        received.append(number)
        signal.signal(number, signal.SIG_DFL)

    before = {number: signal.signal(number, receive) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


# ------------------------------------------------------------------------------------------------------------
# A look at what it has learned

LEGEND = """
Held-out sentences, as both networks see them. The discriminator flags as many tokens as were replaced.
  [word =]        masked; the generator put the same word back
  [word→other ✓]  masked; the generator put another word, and the discriminator flagged it
  [word→other ✗]  masked; the generator put another word, and the discriminator did not flag it
  [word !]        flagged, but not replaced"""
COLOURS = {"=": 36, "✓": 32, "✗": 31, "!": 33}


def choose_readable(rows, wordpiece):
    """The rows with the largest share of whole words, (SHOWN_ROWS, L): chosen by their text alone."""

    def readability(row):
        words = [wordpiece.tokens[number] for number in row[:SHOWN_TOKENS] if number]
        return sum(word.isalpha() for word in words) / len(words) if len(words) >= 16 else 0.0

    return np.array(sorted(rows, key=readability, reverse=True)[:SHOWN_ROWS])


def show(run, rows):
    """Print rows with what was masked, what the generator put there, and what the discriminator flagged."""
    outputs, ids, _ = run.evaluate(rows)
    positions, weights, corrupted_ids, is_replaced, logits = (
        torch.cat([getattr(output, name) for output in outputs]).cpu()
        for name in ("positions", "weights", "corrupted_ids", "is_replaced", "disc_logits"))
    suspicions = logits[ids.cpu() != 0].sort(descending=True).values
    is_flagged = logits > suspicions[is_replaced.sum()]
    is_masked = torch.zeros_like(is_replaced).scatter(1, positions, weights > 0)
    in_colour = sys.stdout.isatty() and "NO_COLOR" not in os.environ
    print(LEGEND)
    arrays = rows, corrupted_ids, is_masked, is_flagged
    for row in zip(*(array.tolist() for array in arrays), strict=True):
        text = ""
        for original, seen, masked, flagged in list(zip(*row, strict=True))[:SHOWN_TOKENS]:
            if not original:
                break
            word, sign = run.wordpiece.tokens[original], ""
            if seen != original:
                word, sign = f"{word}→{run.wordpiece.tokens[seen]}", "✓" if flagged else "✗"
            elif flagged:
                sign = "!"
            elif masked:
                sign = "="
            if sign:
                word = f"[{word} {sign}]"
                text += f" \033[{COLOURS[sign]}m{word}\033[0m" if in_colour else f" {word}"
            else:
                text += word[2:] if word.startswith("##") else f" {word}"
        print(f"\n{text.strip()}")


# ------------------------------------------------------------------------------------------------------------
# Command line


class Parser(argparse.ArgumentParser):
    """Makes a flag of every field of a dataclass that has a comment, which becomes its help."""

    def __init__(self, description):
        super().__init__(description=description, allow_abbrev=False, argument_default=argparse.SUPPRESS)

    def error(self, message):
        raise UserError(f"{message}; --help lists the flags")

    def add_config(self, config_class, sizes):
        source = "".join(map(inspect.getsource, config_class.__mro__[-2::-1]))
        comments = dict(re.findall(r"^    (\w+): .*?  # (.+)$", source, re.MULTILINE))
        for field in fields(config_class):
            if field.name in comments:
                defaults = [str(field.default)] + [f"{size}: {row[field.name]}" for size, row in sizes.items()
                                                   if field.name in row]
                help = f"{comments[field.name]} ({'; '.join(defaults)})".replace("%", "%%")
                kind = {bool: dict(action=argparse.BooleanOptionalAction), list: dict(nargs="+")}
                self.add_argument(f"--{field.name.replace('_', '-')}", help=help,
                                  **kind.get(field.type, dict(type=field.type)))


def configure(config_class, typed, defaults):
    """A config: what was typed, else the defaults of a size, else those of the class."""
    values = defaults | vars(typed)
    names = [field.name for field in fields(config_class) if field.name in values]
    return config_class(**{name: values[name] for name in names})


def resolve_device(config):
    """The config with what "auto" stands for on this machine."""
    has_cuda = torch.cuda.is_available()
    device = ("cuda" if has_cuda else "cpu") if config.device == "auto" else config.device
    if device not in ("cpu", "cuda") or (device == "cuda" and not has_cuda):
        raise UserError(f"there is no device {device} here; --device takes cpu, cuda or auto")
    if config.dtype not in ("auto", "fp32", "bf16"):
        raise UserError(f"there is no dtype {config.dtype}; --dtype takes fp32, bf16 or auto")
    dtype = config.dtype
    if dtype == "auto":
        dtype = "bf16" if device == "cuda" and torch.cuda.get_device_capability() >= (8, 0) else "fp32"
    torch.set_float32_matmul_precision("high")  # TF32 on GPUs that have it; a CPU is not affected
    return replace(config, device=device, dtype=dtype)


def run_command(main):
    """Run a `main`. What the user can mend becomes one line on standard error. The exit status."""
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="replace")  # the terminal may not know every character
    try:
        main()
    except (UserError, ModelError, OSError) as error:
        print(error, file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("stopped; the same command resumes", file=sys.stderr, flush=True)
        os._exit(130)  # at once: a thread may be waiting for a server
    return 0


def main(argv=None):
    parser = Parser("Pre-train ELECTRA. After a stop or a kill the same command resumes.")
    for config_class in (TrainConfig, DataConfig, ElectraConfig):
        parser.add_config(config_class, DEFAULTS)
    typed = parser.parse_args(argv)
    defaults = DEFAULTS.get(getattr(typed, "size", TrainConfig.size), {})
    config, data_config, model_config = (configure(config_class, typed, defaults)
                                         for config_class in (TrainConfig, DataConfig, ElectraConfig))
    if config.prepare_only:
        cache = prepare(data_config)
        print(cache.describe())
        for row in cache.load("train", 0)[: config.show]:
            print("\n" + cache.wordpiece.decode(row))
        return
    positions = model_config.max_position_embeddings
    if data_config.max_length > positions:
        raise UserError(f"max_length {data_config.max_length} is beyond the model's {positions} positions; "
                        "raise --max-position-embeddings too")
    config = resolve_device(config)
    config = replace(config, micro_batch_size=config.micro_batch_size or config.batch_size,
                     compile=config.device == "cuda" if config.compile is None else config.compile)
    cache = Cache(data_config, load_wordpiece(data_config))
    wordpiece = cache.wordpiece
    model_config = replace(model_config, vocab_size=len(wordpiece.tokens), **wordpiece.special_token_ids)
    folder = Path(config.out) / config.size
    with lock(folder / "lock") as is_ours:
        if not is_ours:
            raise UserError(f"another process is training in {folder}; use another --out")
        run = Run(config, data_config, model_config, cache)
        state = run.load_checkpoint()  # before the text is prepared, which may take long
        with producing(cache) as producer_error:
            while not cache.has_shards(1):
                if error := producer_error():
                    raise UserError(error)
                time.sleep(0.05)
            run.start(state)  # after that, so that bad input leaves the run in the folder alone
            print(cache.describe())
            train(run, cache, producer_error)
        run.export()
        heldout = cache.heldout(HELDOUT_ROWS)
        if heldout is not None and len(heldout):
            show(run, choose_readable(heldout, wordpiece))
    print(f"\ntransformers can load {folder}/discriminator and {folder}/generator; to fine-tune:\n"
          f"python finetune.py --model {folder} --task mrpc --max-length {run.max_length}")


if __name__ == "__main__":
    sys.exit(run_command(main))
