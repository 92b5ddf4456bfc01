"""Pre-train ELECTRA: optimiser, schedule, loop, checkpoints. `python train.py --size small --data PATH`.

What enters: a recipe and text. What leaves, in out/<size>: log.jsonl, checkpoint.pt, and the two networks as
HuggingFace folders, discriminator/ and generator/. The same command after a kill goes on from the checkpoint.

Claim: on a CPU, with the same threads and versions, a run that was killed at any moment and resumed ends in
bitwise the same weights and log lines as one that never was (test_resume_*), since a step's rows, masks,
samples and dropout are a function of (seed, step) and no state of a random generator is kept.
"""

import io
import math
import os
import pickle
import shutil
import signal
import sys
import time
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from data import (
    Cache,
    DataConfig,
    Interrupted,
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
    parse,
    ranks,
)
from model import SIZES, Electra, ElectraConfig, check_ranges, save_pretrained, selectable

HELDOUT_ROWS = 1024  # every evaluation is on these rows, with the same masks and samples
SHOWN_TOKENS = 512  # of held-out text, at the end
SAVE_SECONDS = 600  # the most work that a kill can cost
HEALTH_STEP, HEALTH_WINDOW = 20_000, 5_000  # from when on, and for how many steps, a figure must look bad


@dataclass(frozen=True)
class StepConfig:
    """What a step of pre-training and one of fine-tuning have in common."""

    weight_decay: float = 0.01  # decoupled, and not on LayerNorms and biases
    adam_beta1: float = 0.9  # decay of Adam's first moment
    adam_beta2: float = 0.999  # decay of Adam's second moment
    adam_epsilon: float = 1e-6  # what Adam adds to the root of the second moment
    max_grad_norm: float = 1.0  # global norm to which gradients are clipped
    dtype: str = "auto"  # fp32 or bf16; auto is bf16 on CUDA from compute capability 8.0 on, else fp32
    device: str = "auto"  # cpu or cuda; auto is cuda where there is one

    def check(self, **ranges):
        # Betas nearer to 1 would have 1 - beta^step below 1 at any number of steps that fp32 can count.
        check_ranges(self, weight_decay=(0, 1), adam_beta1=(0, 0.9999), adam_beta2=(0, 0.9999),
                     adam_epsilon=(1e-20, 1), max_grad_norm=(1e-9, 1e30), **ranges)
        if self.dtype not in ("auto", "fp32", "bf16"):
            sys.exit(f"there is no dtype {self.dtype}; there are fp32, bf16 and auto")


@dataclass(frozen=True)
class TrainConfig(StepConfig):
    """The recipe, and where and how it runs."""

    size: str = "small"  # tiny, small, base or large: the model and its recipe
    batch_size: int = 128  # rows in a step
    num_train_steps: int = 1_000_000  # steps, after which the learning rate is 0
    learning_rate: float = 5e-4  # peak learning rate
    num_warmup_steps: int = 10_000  # steps over which the learning rate rises from 0
    micro_batch_size: int = 0  # rows in one forward pass, to save memory; 0 is the whole batch
    compile: bool = None  # use torch.compile; None is on CUDA only
    out: str = "out"  # folder for runs; this one goes to its subfolder with the name of the size
    log_every: int = 100  # steps between lines of log.jsonl
    eval_every: int = 1000  # steps between evaluations on held-out text
    save_every: int = 1000  # steps between checkpoints, which also come every ten minutes
    restart: bool = False  # start over, deleting the run that is there

    def __post_init__(self):
        if self.size not in SIZES:
            sys.exit(f"there is no size {self.size}; there are {', '.join(SIZES)}")
        self.check(num_warmup_steps=(0, math.inf), micro_batch_size=(0, self.batch_size),
                   learning_rate=(0, 1e3))
        if self.batch_size % (self.micro_batch_size or self.batch_size):
            sys.exit(f"a batch of {self.batch_size} rows cannot be cut into micro-batches of "
                     f"{self.micro_batch_size}; take a divisor")


# What differs from the defaults, here and in DataConfig, which are small's.
RECIPES = {
    "tiny": dict(data=["python-docs"], vocab="train:2048", max_length=32, batch_size=32, num_train_steps=6000,
                 learning_rate=1e-3, num_warmup_steps=500, log_every=50, eval_every=500, save_every=1000),
    "small": dict(),
    "base": dict(max_length=512, batch_size=256, num_train_steps=766_000, learning_rate=2e-4),
    "large": dict(max_length=512, batch_size=2048, num_train_steps=400_000, learning_rate=2e-4),
}
SIZE_DEFAULTS = {size: RECIPES[size] | SIZES[size] for size in SIZES}

# A flag is of one of three kinds: it changes only the rounding (and which units dropout hits), or nothing of
# the result, or, if it is in neither set, the result; such a one cannot differ on resume.
ROUNDING = {"micro_batch_size", "dtype", "device", "compile"}
NEITHER = {"workers", "cache", "out", "log_every", "eval_every", "save_every", "restart"}


# ------------------------------------------------------------------------------------------------------------
# Optimiser and schedule


def build_optimizer(parameters, config, lr_scale=None):
    """torch's AdamW as the official Adam, which corrects no bias. [D24]

    `parameters` are (name, parameter) pairs; `lr_scale(name)`, where given, is a parameter's share of the
    learning rate, and so of the weight decay that the rate multiplies.

    With the count of steps preset far ahead, 1 - beta^step is 1 to the last bit and the update is the
    official one exactly, while the fused kernel stays at hand.
    """
    groups = {}
    for name, parameter in parameters:
        decay = config.weight_decay if parameter.ndim > 1 else 0.0  # [D25] LayerNorms and biases are exempt
        kind = dict(weight_decay=decay, lr_scale=lr_scale(name) if lr_scale else 1.0)
        groups.setdefault(tuple(kind.items()), []).append(parameter)
    optimizer = torch.optim.AdamW(
        [dict(kind, params=members) for kind, members in groups.items()],
        lr=0.0, betas=(config.adam_beta1, config.adam_beta2), eps=config.adam_epsilon, fused=True,
    )
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            optimizer.state[parameter] = dict(
                step=torch.tensor(1e6, dtype=torch.float32, device=parameter.device),
                exp_avg=torch.zeros_like(parameter), exp_avg_sq=torch.zeros_like(parameter),
            )
    return optimizer


def learning_rate(step, peak, num_train_steps, num_warmup_steps):
    """Warm-up multiplies the decay, both from step 0: the first step has 0, the last peak /
    num_train_steps."""
    warmup = min(1.0, step / num_warmup_steps) if num_warmup_steps else 1.0
    return peak * (1 - step / num_train_steps) * warmup  # [D26]


def update(optimizer, lr, max_grad_norm):
    """Clip, step, and forget the gradients; return their global norm before clipping, a tensor."""
    gradients = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
    norm = torch.nn.utils.get_total_norm(gradients)
    # [D27] Over both networks together. torch's clip_grad_norm_ adds 1e-6 to the norm, the official one does
    # not.
    torch._foreach_mul_(gradients, max_grad_norm / norm.clamp(min=max_grad_norm))
    for group in optimizer.param_groups:
        group["lr"] = lr * group["lr_scale"]
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return norm


# ------------------------------------------------------------------------------------------------------------
# What can be seen of a step


def figures(parts):
    """What the log says of a batch, given as (Output, ids, counts) of its parts: fetched from the device
    here."""
    outputs, ids, [counts, *_] = zip(*parts, strict=True)
    predictions, _ = counts.tolist()
    is_token = torch.cat(ids) != 0
    logits = torch.cat([output.disc_logits for output in outputs])[is_token].cpu().numpy()
    is_replaced = torch.cat([output.is_replaced for output in outputs])[is_token].cpu().numpy()

    def total(name):
        return sum(getattr(output, name) for output in outputs).item()

    flagged = logits > 0
    caught = int((flagged & is_replaced).sum())
    fake_rate = is_replaced.mean()
    return {
        "loss": total("loss"),
        "mlm_loss": total("mlm_loss"),
        "mlm_accuracy": total("mlm_correct") / predictions,
        "sampled_accuracy": total("sampled_correct") / predictions,
        "disc_loss": total("disc_loss"),
        # The loss of a discriminator that has learnt the rate of fakes and nothing else.
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
    """The probability that a positive scores above a negative, ties counting half; 0.5 if there are not
    both."""
    positives = int(labels.sum())
    negatives = labels.size - positives
    if not positives or not negatives:
        return 0.5
    return float((ranks(scores)[labels].sum() - positives * (positives + 1) / 2) / (positives * negatives))


def unigram_entropy(rows, model_config):
    """The MLM loss, in nats, of a generator that knows how frequent each token of `rows` is and nothing
    else."""
    ids = torch.from_numpy(rows)
    counts = np.bincount(ids[selectable(ids, model_config)].numpy())
    return entropy(counts / counts.sum())


def diagnose(lines, num_warmup_steps):
    """A sentence on what looks wrong in the training lines of a log, or None."""
    last = lines[-1]["step"]
    if last < max(HEALTH_STEP, 2 * num_warmup_steps):
        return None
    recent = [line for line in lines if line["step"] > last - HEALTH_WINDOW]
    if min(line["mlm_loss"] for line in recent) > 6:
        return (f"the generator looks stuck: MLM loss above 6 up to step {last}; the likely cause is a "
                "learning rate that is too high, or text that is not language")
    if all(line["disc_loss"] >= 0.97 * line["all_original"] for line in recent):
        return (f"the discriminator looks collapsed: up to step {last} it knows the rate of fakes and little "
                "else; the likely cause is a generator that is too large, or a high learning rate")
    return None


# ------------------------------------------------------------------------------------------------------------
# The run


class Run:
    """One pre-training run in its folder: model, optimiser, step, log and checkpoint."""

    def __init__(self, config, data_config, model_config, cache):
        self.config, self.model_config, self.cache = config, model_config, cache
        self.seed, self.length = data_config.seed, data_config.max_length
        self.folder = Path(config.out) / config.size
        self.checkpoint, self.log_path = self.folder / "checkpoint.pt", self.folder / "log.jsonl"
        self.device, self.dtype = resolve(config)
        compiled = self.device.type == "cuda" if config.compile is None else config.compile
        # What a checkpoint must agree with to be gone on from, and what may differ but is logged.
        self.settings = {name: value for name, value in (asdict(config) | asdict(model_config)).items()
                         if name not in ROUNDING | NEITHER}
        self.settings |= cache.made_from | {"files": digest(cache.made_from["files"])}
        self.rounding = dict(device=self.device.type, dtype=self.dtype, compile=compiled,
                             micro_batch_size=config.micro_batch_size, threads=torch.get_num_threads(),
                             torch=str(torch.__version__))
        torch.manual_seed(self.seed)
        self.model = Electra(model_config).to(self.device).train()
        self.compiled_model = torch.compile(self.model, fullgraph=True) if compiled else self.model
        self.optimizer = build_optimizer(self.model.named_parameters(), config)
        self.step, self.lines, self.heldout = 0, [], None

    def train(self, rows):
        """Steps from wherever the run is to its end, or to a signal; what is then not yet saved is."""
        with stop_signals() as self.cache.interrupted:
            with suppress(Interrupted):
                self.take_steps(rows)
            if self.step < self.config.num_train_steps:
                self.save()
                again = "the same command" + " without --restart" * self.config.restart
                sys.exit(f"stopped and saved after step {self.step}; {again} goes on from there")

    def take_steps(self, rows):
        config, total, warned = self.config, self.config.num_train_steps, False
        if self.step == total:
            return
        saved = clock = time.perf_counter()
        clock_step = self.step
        with tqdm(total=total, initial=self.step, desc=config.size, unit="step", disable=None) as bar:

            def waiting(is_so):
                bar.set_description(f"{config.size}, waiting for text" if is_so else config.size)

            for epoch, input_ids in rows.batches(self.step, config.batch_size, waiting):
                if self.cache.interrupted:
                    return
                evaluates = (self.step + 1) % config.eval_every == 0 or self.step + 1 == total
                saves = (self.step + 1) % config.save_every == 0 or self.step + 1 == total
                if evaluates and self.heldout is None:
                    waiting(True)
                    self.heldout = self.wait_for_heldout()  # before the step, in case a signal comes
                    waiting(False)
                lr = learning_rate(self.step, config.learning_rate, total, config.num_warmup_steps)
                parts, norm = self.train_step(input_ids, lr)
                self.step += 1
                bar.update()

                if evaluates or saves or self.step == 1 or self.step % config.log_every == 0:
                    rate = (self.step - clock_step) * input_ids.size / (time.perf_counter() - clock)
                    line = self.log("train", epoch, lr=lr, **figures(parts), grad_norm=norm.item(),
                                    tokens_per_second=round(rate))
                    shown = ("loss", "lr", "tokens_per_second")
                    bar.set_postfix({name: f"{line[name]:.4g}" for name in shown})
                    if not warned and (warned := diagnose(self.lines, config.num_warmup_steps)):
                        tqdm.write(f"warning: {warned}")
                    if evaluates and len(self.heldout):
                        tqdm.write(self.evaluate(epoch))
                    clock, clock_step = time.perf_counter(), self.step
                # A line is about its own step alone, so a checkpoint can come between lines without a trace.
                if saves or time.perf_counter() - saved > SAVE_SECONDS:
                    self.save()
                    saved = time.perf_counter()
                if self.step == total:
                    return

    def train_step(self, input_ids, lr):
        """One update from one batch -> its parts, for `figures`, and the gradient norm. Waits for no
        result."""
        torch.manual_seed(int(generator(self.seed, "dropout", self.step).integers(2**63)))
        noise, parts = self.draw("train", input_ids), []
        for output, ids, counts in self.forward_parts(self.compiled_model, input_ids, noise):
            output.loss.backward()
            parts.append((output._replace(loss=output.loss.detach()), ids, counts))
        return parts, update(self.optimizer, lr, self.config.max_grad_norm)

    def draw(self, purpose, input_ids):
        """A step's two draws for the whole batch: (B, L) float64 for the masks, (B, K) float32 for the
        samples."""
        random = generator(self.seed, purpose, self.step if purpose == "train" else 0)
        num_slots = self.model_config.num_slots(self.length)
        return random.random(input_ids.shape), random.random((len(input_ids), num_slots), dtype=np.float32)

    def forward_parts(self, model, input_ids, noise):
        """Run the objective over a batch part by part: yield (Output, ids of the part, counts of the batch).

        All divide by the counts of the whole batch: losses and gradients add up to those of the one batch.
        """
        batch = [torch.from_numpy(array) for array in (input_ids, *noise)]
        if self.device.type == "cuda":
            batch = [tensor.pin_memory().to(self.device, non_blocking=True) for tensor in batch]
        counts = self.model.counts(batch[0])
        size = self.config.micro_batch_size or self.config.batch_size
        for ids, *uniform in zip(*(tensor.split(size) for tensor in batch), strict=True):
            with torch.autocast(self.device.type, torch.bfloat16, enabled=self.dtype == "bf16"):
                output = model(ids, *uniform, counts)
            yield output, ids, counts

    @torch.no_grad()
    def forward_heldout(self, heldout):
        """The parts of held-out rows, without dropout, with the same masks and samples every time."""
        self.model.eval()
        parts = list(self.forward_parts(self.model, heldout, self.draw("heldout", heldout)))
        self.model.train()
        return parts

    def wait_for_heldout(self):
        """The held-out rows, as soon as there are enough; says what to compare the MLM loss on them with."""
        heldout = self.cache.heldout(HELDOUT_ROWS).astype(np.int64)
        if len(heldout):
            unigram = unigram_entropy(heldout, self.model_config)
            tqdm.write(f"held out: {len(heldout):,} rows; word frequencies alone give MLM loss {unigram:.3f}")
        else:
            tqdm.write("of so little text no document is held out (one in a hundred is): no evaluation")
        return heldout

    def evaluate(self, epoch):
        """Log the figures of the held-out rows and return them as a sentence."""
        line = self.log("heldout", epoch, **figures(self.forward_heldout(self.heldout)))
        return (f"step {self.step}, held-out text: MLM loss {line['mlm_loss']:.3f}; discriminator loss "
                f"{line['disc_loss']:.4f} = {line['disc_loss'] / line['all_original']:.3f} x all-original, "
                f"AUC {line['auc']:.3f}, recall {line['recall']:.3f}")

    def log(self, split, epoch, **values):
        """Add a line to log.jsonl and return it. Figures that are not finite stop the run."""
        if not all(map(math.isfinite, values.values())):
            self.stop_for("the loss or the gradient")
        tokens = self.step * self.config.batch_size * self.length
        line = dict(split=split, step=self.step, tokens=tokens, epoch=epoch, **values)
        with open(self.log_path, "ab") as log:
            append(log, line)
        if split == "train":
            self.lines.append(line)
        return line

    def save(self):
        """Write the checkpoint; the one before it stays until this one is whole."""
        if not all(parameter.isfinite().all() for parameter in self.model.parameters()):
            self.stop_for("a weight")
        state = dict(step=self.step, settings=self.settings, rounding=self.rounding,
                     model=self.model.state_dict(), optimizer=self.optimizer.state_dict(),
                     log_bytes=self.log_path.stat().st_size)
        # By way of memory: on a full disk torch.save reports a confusion of its own, not the disk's error.
        buffer = io.BytesIO()
        torch.save(state, buffer)
        with atomic_write(self.checkpoint) as file:
            file.write(buffer.getbuffer())

    def stop_for(self, what):
        sys.exit(f"{what} is not finite after step {self.step}, and that was not saved; the likely cause is "
                 "a learning rate that is too high: --restart with a lower one")

    def read_checkpoint(self):
        """The state to go on from, or None; the state of another run is refused."""
        if self.config.restart or not self.checkpoint.exists():
            return None
        try:
            state = torch.load(self.checkpoint, map_location=self.device, weights_only=True)
        except (RuntimeError, pickle.UnpicklingError, EOFError, OSError):
            sys.exit(f"{self.checkpoint} is damaged; --restart begins anew")
        before, now = state["settings"], self.settings
        if before != now:
            names = [name for name in sorted(before.keys() | now.keys()) if before.get(name) != now.get(name)]
            listed = ", ".join(f"{name} {before.get(name)} there and {now.get(name)} here" for name in names)
            sys.exit(f"{self.folder} has another run ({listed}): take its settings, or --out, or --restart")
        return state

    def begin(self, state):
        """Begin anew, or go on from a state; log lines from after it are cut."""
        if state is None:
            for left in ("discriminator", "generator", "discriminator.new", "generator.new"):
                shutil.rmtree(self.folder / left, ignore_errors=True)
            with open(self.log_path, "wb") as log:
                append(log, dict(settings=self.settings, rounding=self.rounding))
            self.save()
            return
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.step = state["step"]
        with open(self.log_path, "r+b") as log:
            log.truncate(state["log_bytes"])
            entries = [parse(line, self.log_path) for line in log]
            self.lines = [entry for entry in entries if entry.get("split") == "train"]
            if state["rounding"] != self.rounding:
                append(log, dict(step=self.step, rounding=self.rounding))

    def export(self):
        """Write discriminator/ and generator/, each whole before it takes the place of what was there."""
        wordpiece = self.cache.wordpiece
        for name in ("discriminator", "generator"):
            folder, new = self.folder / name, self.folder / f"{name}.new"
            try:
                save_pretrained(getattr(self.model, name), getattr(self.model_config, name)(), new,
                                wordpiece.tokens, wordpiece.do_lower_case, wordpiece.strip_accents)
                if folder.exists():
                    shutil.rmtree(folder)
                new.rename(folder)
            except OSError as error:
                error.filename = str(folder)
                shutil.rmtree(new, ignore_errors=True)
                raise


@contextmanager
def stop_signals():
    """A list that Ctrl-C and SIGTERM put themselves into, to be looked at between steps; a second one
    kills."""
    signals = []

    def note(number, frame):
        signals.append(number)
        signal.signal(number, signal.SIG_DFL)

    before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield signals
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def resolve(config):
    """-> device, "fp32" or "bf16": what "auto" stands for on this machine."""
    cuda = torch.cuda.is_available() and config.device != "cpu"
    if config.device not in ("auto", "cpu", "cuda") or (config.device == "cuda" and not cuda):
        sys.exit(f"there is no device {config.device} here; --device takes cpu, cuda or auto")
    dtype = config.dtype
    if dtype == "auto":
        dtype = "bf16" if cuda and torch.cuda.get_device_capability() >= (8, 0) else "fp32"
    if cuda:
        torch.set_float32_matmul_precision("high")  # TF32 for what is fp32
    return torch.device("cuda" if cuda else "cpu"), dtype


# ------------------------------------------------------------------------------------------------------------
# What it has learnt, to look at

COLOURS = {"=": 36, "✓": 32, "✗": 31, "!": 33}
LEGEND = """
Held-out text, read by both networks. The discriminator names as many suspects as there are fakes, since at a
threshold of one half a young one accuses nobody. Of the words that were masked,
  [word =]        the generator put back the word that was there
  [word→other ✓]  it put another, and the discriminator caught it
  [word→other ✗]  it put another, and the discriminator missed it
and of all the others  [word !]  is a false alarm."""


def show(run, heldout):
    """Print held-out rows with what was masked, what the generator put there, what the discriminator said."""
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="replace")  # a terminal may not know every character
    colour = sys.stdout.isatty() and "NO_COLOR" not in os.environ
    tokens = run.cache.wordpiece.tokens
    parts = run.forward_heldout(heldout)
    suspicions = torch.cat([output.disc_logits[ids != 0] for output, ids, _ in parts]).sort(descending=True)
    threshold = suspicions.values[sum(output.is_replaced.sum() for output, _, _ in parts)]
    rows = []
    for output, ids, _ in parts:
        masked = torch.zeros_like(output.is_replaced).scatter(1, output.positions, output.weights > 0)
        rows += zip(ids, output.corrupted_ids, masked, output.disc_logits > threshold, strict=True)
    print(LEGEND)
    for row in rows:
        text = ""
        for original, seen, is_masked, is_flagged in zip(*(part.tolist() for part in row), strict=True):
            if not original:
                break
            word, sign = tokens[original], ""
            if seen != original:
                word, sign = f"{word}→{tokens[seen]}", "✓" if is_flagged else "✗"
            elif is_masked or is_flagged:
                sign = "!" if is_flagged else "="
            if sign and colour:
                text += f" \033[{COLOURS[sign]}m[{word} {sign}]\033[0m"
            elif sign:
                text += f" [{word} {sign}]"
            else:
                text += word[2:] if word.startswith("##") else f" {word}"
        print(f"\n{text.strip()}")


# ------------------------------------------------------------------------------------------------------------


@one_sentence()
def main(argv=None):
    parser = Parser("Pre-train ELECTRA. After a stop or a kill the same command goes on from the checkpoint.")
    for config_class in (TrainConfig, DataConfig, ElectraConfig):
        parser.add_fields(config_class, **SIZE_DEFAULTS)
    typed = parser.parse_args(argv)
    defaults = SIZE_DEFAULTS.get(getattr(typed, "size", TrainConfig.size), {})
    config, data_config = configure(TrainConfig, typed, **defaults), configure(DataConfig, typed, **defaults)
    model_config = configure(ElectraConfig, typed, **defaults)
    if data_config.max_length > model_config.max_position_embeddings:
        sys.exit(f"max_length {data_config.max_length} is over the model's "
                 f"{model_config.max_position_embeddings} position rows; raise --max-position-embeddings too")
    wordpiece = load_wordpiece(data_config)
    special = {name: getattr(wordpiece, name) for name in ("cls_token_id", "sep_token_id", "mask_token_id")}
    model_config = replace(model_config, vocab_size=len(wordpiece.tokens), **special)
    cache = Cache(data_config, wordpiece)
    folder = Path(config.out) / config.size
    folder.mkdir(parents=True, exist_ok=True)
    with lock(folder / "lock", f"another process is training in {folder}; take another --out"):
        run = Run(config, data_config, model_config, cache)
        state = run.read_checkpoint()  # before the text is prepared, which may take long,
        with cache.producing():
            cache.wait(lambda shards: any(shard["rows"] for shard in shards))
            run.begin(state)  # and after, so that bad input leaves nothing behind
            print(cache.describe())
            if state is not None:
                print(f"going on after step {run.step} of {config.num_train_steps}")
            run.train(TrainingRows(cache))
            run.export()
            heldout = run.wait_for_heldout() if run.heldout is None else run.heldout
            if len(heldout):
                show(run, heldout[: SHOWN_TOKENS // data_config.max_length or 1])
        length = min(128, model_config.max_position_embeddings)
        print(f"\n{folder}/discriminator and {folder}/generator are folders that transformers loads, too; to "
              f"fine-tune: python finetune.py --model {folder} --max-length {length} --task mrpc")


if __name__ == "__main__":
    main()
