"""Pre-train ELECTRA: `python train.py --size small`. The loop, optimizer and schedule, checkpoints.

Read `train` first. Everything a run writes is in out/SIZE: log.jsonl, checkpoint.pt and, at the end,
discriminator/ and generator/, two HuggingFace folders. The same command resumes a run that was stopped.

On a CPU with the same threads and versions, a run that was killed and resumed gives bit for bit the result of
an uninterrupted one. Every random number is a function of (seed, step), so no random state is saved.
"""

import os

# OpenMP threads busy-wait at barriers: by default, one other process on the machine makes training crawl.
os.environ.setdefault("GOMP_SPINCOUNT", "10000")

import argparse
import inspect
import io
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
    prepare,
    producing,
    rng,
)
from model import SIZES, Electra, ElectraConfig, ModelError, count, save_pretrained, selectable

HELDOUT_ROWS = 1024  # rows of every evaluation, always with the same masks and samples
SAVE_SECONDS = 600  # the most work that a kill can cost
SHOWN_ROWS, SHOWN_TOKENS = 5, 40  # what is shown at the end
SLOW_DAYS = 14  # warn about a run that takes longer


@dataclass(frozen=True)
class StepConfig:
    """Flags shared by pre-training and fine-tuning."""

    weight_decay: float = 0.01  # decoupled weight decay; LayerNorms and biases are exempt
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
    num_train_steps: int = 1_000_000  # steps in all; the learning rate decays to 0
    learning_rate: float = 5e-4  # peak learning rate
    num_warmup_steps: int = 10_000  # steps over which the learning rate rises from 0
    micro_batch_size: int = 0  # rows in a forward pass, to save memory; 0 is batch_size
    compile: bool = None  # use torch.compile; None is on a GPU only
    out: str = "out"  # parent folder; the run goes to OUT/SIZE
    log_every: int = 100  # steps between lines of log.jsonl
    eval_every: int = 1000  # steps between evaluations on held-out text
    save_every: int = 1000  # steps between checkpoints; there is one every ten minutes, too
    restart: bool = False  # delete the run in the folder and start over
    prepare_only: bool = False  # prepare the text, and do not train
    show: int = 0  # with --prepare-only: print this many rows

    def __post_init__(self):
        if self.size not in SIZES:
            raise UserError(f"there is no size {self.size}; there are {', '.join(SIZES)}")
        for name in ("batch_size", "num_train_steps", "log_every", "eval_every", "save_every"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} is {getattr(self, name)}; it must be at least 1")
        if self.num_warmup_steps < 0 or self.micro_batch_size < 0:
            raise UserError("num_warmup_steps and micro_batch_size must be 0 or more")
        if self.micro_batch_size and self.batch_size % self.micro_batch_size:
            raise UserError(f"a batch of {self.batch_size} rows does not split into micro-batches of "
                            f"{self.micro_batch_size}")


# What each size changes. The defaults, above and in DataConfig, are small's.
RECIPES = {
    "tiny": dict(data=["python-docs"], vocab="train:2048", max_length=32, batch_size=32, num_train_steps=9000,
                 learning_rate=1e-3, num_warmup_steps=500, log_every=50, eval_every=500, save_every=1000),
    "small": dict(),
    "base": dict(max_length=512, batch_size=256, num_train_steps=766_000, learning_rate=2e-4),
    "large": dict(max_length=512, batch_size=2048, num_train_steps=400_000, learning_rate=2e-4),
}
DEFAULTS = {size: RECIPES[size] | SIZES[size] for size in SIZES}
# Flags that a resumed run may change. All others decide its result.
MAY_CHANGE = {"micro_batch_size", "dtype", "device", "compile", "out", "log_every", "eval_every",
              "save_every", "restart", "prepare_only", "show"}


# ------------------------------------------------------------------------------------------------------------
# The loop


def train(run, producer_error):
    """Train to the last step, or stop at a signal or an error of the producer, and save."""
    config, model, optimizer = run.config, run.model, run.optimizer
    forward = torch.compile(model, fullgraph=True) if config.compile else model
    order, heldout, error = Order(run.cache, config.batch_size), None, None
    saved_at = logged_at = time.perf_counter()
    first_step = logged_step = run.step
    with (stop_signals() as signals,
          tqdm(total=config.num_train_steps, initial=run.step, unit=" steps", disable=None) as bar):
        while run.step < config.num_train_steps and not signals and not error:
            is_last = run.step + 1 == config.num_train_steps
            evaluates = is_last or (run.step + 1) % config.eval_every == 0

            # Get the rows. Neither they nor the held-out rows may be ready yet.
            batch = order.batch(run.step)
            if evaluates and heldout is None:
                heldout = run.load_heldout()
            if batch is None or (evaluates and heldout is None):
                bar.set_description("waiting for text")
                error = producer_error()
                time.sleep(0.05)
                continue
            epoch, rows = batch
            input_ids, uniforms = run.to_device(rows, "train", run.step)

            # Forward and backward, in micro-batches whose gradients add up to the batch's.
            lr = learning_rate(run.step, config.learning_rate, config.num_train_steps,
                               config.num_warmup_steps)
            for group in optimizer.param_groups:
                group["lr"] = lr * group["lr_scale"]
            torch.manual_seed(int(rng(run.seed, "dropout", run.step).integers(2**63)))
            counts, outputs = count(input_ids, model.config), []
            parts = (tensor.split(config.micro_batch_size) for tensor in (input_ids, uniforms))
            for part in zip(*parts, strict=True):
                with autocast(config):
                    output = forward(*part, counts)
                output.loss.backward()
                outputs.append(output._replace(loss=output.loss.detach()))
            grad_norm = torch.nn.utils.clip_grad_norm_(model.parameters(), config.max_grad_norm)  # [D27]
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            run.step += 1
            bar.update()

            # Log, evaluate, save. A checkpoint leaves no trace in the log.
            is_logged = evaluates or run.step == 1 or run.step % config.log_every == 0
            if is_logged:
                metrics = compute_metrics(outputs, input_ids, counts)  # waits for the device
                seconds = (time.perf_counter() - logged_at) / (run.step - logged_step)
                rate = round(input_ids.numel() / seconds)
                run.log("train", epoch, lr=lr, **metrics, grad_norm=grad_norm.item(), tokens_per_second=rate)
                bar.set_description(f"loss {metrics['loss']:.3f}, {rate:,} tokens/s")
                days = seconds * (config.num_train_steps - run.step) / 86_400
                if logged_step < first_step + 100 <= run.step and days > SLOW_DAYS:
                    tqdm.write(f"at this rate the rest takes {days:.0f} days; `--size tiny` takes minutes on "
                               "a CPU, and the other sizes need a GPU")
            if evaluates and len(heldout):
                metrics = compute_metrics(*run.evaluate(heldout))
                run.log("heldout", epoch, **metrics)
                is_late = run.step >= max(20_000, 2 * config.num_warmup_steps)
                tqdm.write(f"step {run.step}, held-out text: {describe(metrics, is_late)}")
            if is_last or run.step % config.save_every == 0 or time.perf_counter() - saved_at > SAVE_SECONDS:
                run.save()
                saved_at = time.perf_counter()
            if is_logged or run.step == first_step + 1:  # rates leave out compiling, evaluating and saving
                logged_at, logged_step = time.perf_counter(), run.step
    if run.step < config.num_train_steps:
        if run.step > first_step:
            run.save()
        again = "the same command" + " without --restart" * config.restart
        raise UserError(error or f"stopped after step {run.step}; {again} resumes")


# ------------------------------------------------------------------------------------------------------------
# The run and its folder


class Run:
    """Model, optimizer and step of a run, and its folder with log and checkpoint."""

    def __init__(self, config, model_config, cache):
        self.config, self.cache, self.seed, self.max_length = (
            config, cache, cache.config.seed, cache.config.max_length)
        self.folder = Path(config.out) / config.size
        self.checkpoint, self.log_path = self.folder / "checkpoint.pt", self.folder / "log.jsonl"
        everything = asdict(config) | asdict(model_config) | cache.fingerprint
        self.settings = {name: value for name, value in everything.items() if name not in MAY_CHANGE}
        # These may change on resume. They change the rounding, so they are logged.
        self.numerics = dict(device=config.device, dtype=config.dtype, compile=config.compile,
                             micro_batch_size=config.micro_batch_size, threads=torch.get_num_threads(),
                             torch=str(torch.__version__))
        torch.manual_seed(self.seed)
        self.model = Electra(model_config).to(config.device).train()
        self.optimizer = build_optimizer(self.model.named_parameters(), config)
        self.step = 0

    def resume(self):
        """Continue from the checkpoint, or start over. What was logged after the checkpoint is cut off."""
        if self.config.restart:
            self.checkpoint.unlink(missing_ok=True)  # first: it must not stand beside another run's log
        if not self.checkpoint.exists():
            for name in ("discriminator", "generator"):
                shutil.rmtree(self.folder / name, ignore_errors=True)
            with open(self.log_path, "wb") as log:
                append_json(log, dict(settings=self.settings, numerics=self.numerics))
            return
        try:
            state = torch.load(self.checkpoint, map_location="cpu", weights_only=True)
            old, new = state["settings"], self.settings
        except (RuntimeError, pickle.UnpicklingError, EOFError, KeyError):
            raise UserError(f"{self.checkpoint} is damaged; --restart starts over") from None
        changed = [f"{name} was {old.get(name)} and is now {new.get(name)}"
                   for name in sorted(old.keys() | new.keys()) if old.get(name) != new.get(name)]
        if changed:
            raise UserError(f"{self.folder} holds another run ({'; '.join(changed)}); use its settings, "
                            "another --out, or --restart")
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.step = state["step"]
        with open(self.log_path, "r+b") as log:
            log.truncate(state["log_bytes"])
            log.seek(0, os.SEEK_END)
            if state["numerics"] != self.numerics:
                append_json(log, dict(step=self.step, numerics=self.numerics))
        if self.step == self.config.num_train_steps:
            print(f"all {self.step} steps are done already")
        else:
            print(f"resuming after step {self.step} of {self.config.num_train_steps}")

    def to_device(self, rows, purpose, step):
        """ids (B, L) and the uniform numbers (B, L + 2K) of their masks and samples."""
        width = self.max_length + 2 * self.model.config.num_slots(self.max_length)
        uniforms = rng(self.seed, purpose, step).random((len(rows), width), dtype=np.float32)
        return [torch.from_numpy(array).to(self.config.device) for array in (rows, uniforms)]

    def load_heldout(self):
        """The held-out rows, or None while they have not arrived. Prints the baseline of the MLM loss."""
        heldout = self.cache.heldout(HELDOUT_ROWS)
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
        ids, uniforms = self.to_device(rows, "heldout", 0)
        counts = count(ids, self.model.config)
        parts = (tensor.split(self.config.micro_batch_size) for tensor in (ids, uniforms))
        with autocast(self.config):
            outputs = [self.model(*part, counts) for part in zip(*parts, strict=True)]
        self.model.train()
        return outputs, ids, counts

    def log(self, split, epoch, **values):
        """Append a line to log.jsonl."""
        positions = self.step * self.config.batch_size * self.max_length  # padding included
        with open(self.log_path, "ab") as log:
            append_json(log, dict(split=split, step=self.step, tokens=positions, epoch=epoch, **values))

    def save(self):
        """Write the checkpoint. The one before it stays until this one is whole."""
        if not all(parameter.isfinite().all() for parameter in self.model.parameters()):
            raise UserError(f"the weights are not finite after step {self.step}; the checkpoint before is "
                            "intact; use --restart with a lower --learning-rate")
        state = dict(step=self.step, settings=self.settings, numerics=self.numerics,
                     model=self.model.state_dict(), optimizer=self.optimizer.state_dict(),
                     log_bytes=self.log_path.stat().st_size)
        buffer = io.BytesIO()  # torch.save hides a full disk behind an error of its own
        torch.save(state, buffer)
        with atomic_write(self.checkpoint) as file:
            file.write(buffer.getbuffer())

    def export(self):
        """Write discriminator/ and generator/. The old folder is kept until the new one is complete."""
        for name in ("discriminator", "generator"):
            folder, new = self.folder / name, self.folder / f"{name}.tmp"
            shutil.rmtree(new, ignore_errors=True)
            save_pretrained(getattr(self.model, name), new)
            self.cache.wordpiece.save(new, self.max_length)
            shutil.rmtree(folder, ignore_errors=True)
            new.rename(folder)


@contextmanager
def stop_signals():
    """Yields a list that the first Ctrl-C or SIGTERM is added to. A second one kills."""
    received = []

    def receive(number, frame):
        received.append(number)
        signal.signal(number, signal.SIG_DFL)
        tqdm.write("stopping after this step, and saving; once more kills", file=sys.stderr)

    before = {number: signal.signal(number, receive) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


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


def describe(metrics, is_late):
    """A sentence about held-out text. Late in training it warns of networks that have not learned."""
    share = metrics["disc_loss"] / metrics["all_original"]
    text = (f"MLM loss {metrics['mlm_loss']:.3f}, discriminator loss {share:.3f} x all-original, AUC "
            f"{metrics['auc']:.3f}")
    if is_late and metrics["mlm_loss"] > 6:
        text += "; warning: the generator is stuck; try a lower learning rate"
    if is_late and share >= 0.97:
        text += "; warning: the discriminator is stuck; try a smaller generator or a lower learning rate"
    return text


# ------------------------------------------------------------------------------------------------------------
# A look at what it has learned

LEGEND = """
Held-out sentences, as both networks see them. The tokens with the highest scores are flagged, as many as were
replaced: early in training few scores exceed one half.
  [word =]        masked; the generator put the same word back
  [word→other ✓]  masked; the generator put another word, and the discriminator flagged it
  [word→other ✗]  masked; the generator put another word, and the discriminator did not flag it
  [word !]        flagged, but not replaced"""


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
    is_suspect = logits > suspicions[is_replaced.sum()]
    is_masked = torch.zeros_like(is_replaced).scatter(1, positions, weights > 0)
    tokens = run.cache.wordpiece.tokens
    print(LEGEND)
    arrays = rows, corrupted_ids, is_masked, is_suspect
    for row in zip(*(array.tolist() for array in arrays), strict=True):
        words = []
        for original, seen, masked, suspect in list(zip(*row, strict=True))[:SHOWN_TOKENS]:
            if not original:
                break
            if seen != original:
                words.append(f"[{tokens[original]}→{tokens[seen]} {'✓' if suspect else '✗'}]")
            elif suspect or masked:
                words.append(f"[{tokens[original]} {'!' if suspect else '='}]")
            else:
                words.append(tokens[original])
        print("\n" + " ".join(words).replace(" ##", ""))


# ------------------------------------------------------------------------------------------------------------
# Command line


def parse(argv, description, config_classes, sizes):
    """A config of each class from the command line.

    A field that has a comment is a flag, with the comment as its help. What is not typed is as in `sizes`, a
    table of what differs from the defaults, and else the default.
    """
    parser = argparse.ArgumentParser(description=description, allow_abbrev=False,
                                     argument_default=argparse.SUPPRESS, exit_on_error=False)
    for config_class in config_classes:
        source = "".join(map(inspect.getsource, config_class.__mro__[-2::-1]))
        comments = dict(re.findall(r"^    (\w+): .*?  # (.+)$", source, re.MULTILINE))
        for field in sorted(fields(config_class), key=lambda field: field.name not in vars(config_class)):
            if field.name not in comments:  # a class's own fields come first, then those it inherits
                continue
            defaults = [str(field.default)] + [f"{size}: {row[field.name]}" for size, row in sizes.items()
                                               if field.name in row]
            help = f"{comments[field.name]} ({'; '.join(defaults)})".replace("%", "%%")
            kinds = {bool: dict(action=argparse.BooleanOptionalAction), list: dict(nargs="+")}
            parser.add_argument(f"--{field.name.replace('_', '-')}", help=help,
                                **kinds.get(field.type, dict(type=field.type)))
    try:
        typed, unknown = parser.parse_known_args(argv)
    except argparse.ArgumentError as error:
        raise UserError(f"{error}; --help lists the flags") from None
    if unknown:
        raise UserError(f"there is no {' '.join(unknown)}; --help lists the flags")
    values = sizes.get(getattr(typed, "size", "small"), {}) | vars(typed)
    return [config_class(**{field.name: values[field.name] for field in fields(config_class)
                            if field.name in values}) for config_class in config_classes]


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
    if device == "cuda":
        torch.set_float32_matmul_precision("high")  # TF32 for what stays fp32
    return replace(config, device=device, dtype=dtype)


def run_command(main):
    """Run `main` and return the exit status. An error that the user can fix is printed as one line."""
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="replace")  # the terminal may not know every character
    try:
        main()
    except (UserError, ModelError) as error:
        print(error, file=sys.stderr)
        return 1
    except OSError as error:  # a full disk, a file that must not be read
        print(f"{error}; fix that, and the same command resumes", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("stopped; the same command resumes", file=sys.stderr)
        return 130
    return 0


def main(argv=None):
    description = "Pre-train ELECTRA. After a stop or a kill the same command resumes."
    configs = parse(argv, description, (TrainConfig, DataConfig, ElectraConfig), DEFAULTS)
    config, data_config, model_config = configs
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
    wordpiece = load_wordpiece(data_config)
    model_config = replace(
        model_config, vocab_size=len(wordpiece.tokens), cls_token_id=wordpiece.cls_token_id,
        sep_token_id=wordpiece.sep_token_id, mask_token_id=wordpiece.mask_token_id)
    folder = Path(config.out) / config.size
    with lock(folder / "lock") as is_ours:
        if not is_ours:
            raise UserError(f"another process is training in {folder}; use another --out")
        run = Run(config, model_config, Cache(data_config, wordpiece))
        with producing(run.cache) as producer_error:
            run.resume()  # with text at hand, so that bad input leaves the run in the folder alone
            print(run.cache.describe())
            train(run, producer_error)
        run.export()
        heldout = run.cache.heldout(HELDOUT_ROWS)
        if heldout is not None and len(heldout):
            show(run, choose_readable(heldout, wordpiece))
    print(f"\ntransformers can load {folder}/discriminator and {folder}/generator; to fine-tune:\n"
          f"python finetune.py --model {folder} --task mrpc --max-length {data_config.max_length}")


if __name__ == "__main__":
    sys.exit(run_command(main))
