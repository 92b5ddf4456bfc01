"""Pre-train ELECTRA: `python train.py --size small`. The loop, optimizer and schedule, checkpoints.

Read `train` first. Everything a run writes is in out/SIZE: log.jsonl, checkpoint.pt, and discriminator/ and
generator/, two HuggingFace folders. The same command resumes a run that was stopped.

On a CPU with the same threads and versions, a run that was killed and resumed gives bit for bit the result of
an uninterrupted one. Every random number is a function of (seed, step), so no random state is saved.

Under torchrun every process (rank) draws the rows and random numbers of the whole batch, and computes its
slice. One sum of the gradients over the ranks makes a step. What is said of one process holds for many.
"""

import os

# OpenMP threads busy-wait at barriers: by default, one other process on the machine makes training crawl.
os.environ.setdefault("GOMP_SPINCOUNT", "10000")

import argparse
import collections
import inspect
import io
import pickle
import re
import shutil
import signal
import sys
import time
import warnings
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from tqdm import tqdm

from data import (
    Cache,
    DataConfig,
    Order,
    UserError,
    append_json,
    atomic_folder,
    atomic_write,
    digest,
    find_model,
    find_vocab,
    load_wordpiece,
    lock,
    prepare,
    producing,
    read_tokenizer,
    rng,
)
from model import (
    SIZES,
    Electra,
    ElectraConfig,
    ModelError,
    Output,
    count,
    load_config,
    load_networks,
    load_weights,
    save_pretrained,
    selectable,
)

# Of all processes, of those on this machine, and their number. Set by torchrun.
RANK, LOCAL_RANK, WORLD_SIZE = (
    int(os.environ.get(name, default)) for name, default in dict(RANK=0, LOCAL_RANK=0, WORLD_SIZE=1).items())
HELDOUT_ROWS = 1024  # rows of every evaluation, always with the same masks and samples
FEW_ROWS = 50  # held-out rows whose metrics are mostly chance
SAVE_SECONDS = 600  # the most work that a kill can cost
SHOWN_ROWS, SHOWN_TOKENS = 5, 40  # what is shown at the end
WARM_UP_CALLS = 3  # before a CUDA graph is captured: they compile, choose and load kernels
SLOW_DAYS = 14  # warn about a run that takes longer
MIN_LOSS_SCALE = 1e-4  # of fp16; below it every step has overflowed for long
FIRST_ADAM_STEP = 1_000_000  # see build_optimizer
KEPT = (0.01, 0.0625, 0.125, 0.25, 0.5, 0.75)  # shares of the steps after which the networks are kept


@dataclass(frozen=True)
class StepConfig:
    """Flags shared by pre-training and fine-tuning."""

    weight_decay: float = 0.01  # decoupled weight decay; LayerNorms and biases are exempt
    adam_beta1: float = 0.9  # decay of Adam's first moment
    adam_beta2: float = 0.999  # decay of Adam's second moment
    adam_epsilon: float = 1e-6  # added to the root of Adam's second moment
    max_grad_norm: float = 1.0  # global norm to which gradients are clipped
    dtype: str = "auto"  # fp32, bf16 or fp16; auto is bf16 on a GPU that has it, fp16 on another, else fp32
    device: str = "auto"  # cpu, cuda, cuda:1 or mps; auto is cuda if there is one, else cpu
    graph: bool = True  # on a GPU, replay steps as CUDA graphs; not in fp16, nor with several processes
    deterministic: bool = False  # on a GPU, repeat a run to the bit, with slower kernels


@dataclass(frozen=True)
class TrainConfig(StepConfig):
    """The recipe, and where and how it runs."""

    size: str = "small"  # tiny, small, base or large: the model and its recipe
    batch_size: int = 128  # rows in a step
    num_train_steps: int = 1_000_000  # steps in all; the learning rate decays to 0
    learning_rate: float = 5e-4  # peak learning rate
    num_warmup_steps: int = 10_000  # steps over which the learning rate rises from 0
    micro_batch_size: int = 0  # rows in a forward pass, to save memory; 0 is all
    init: list = ()  # start from weights: DISCRIMINATOR [GENERATOR], runs, folders or names on the hub
    compile: bool = None  # use torch.compile; by default on a GPU, without --deterministic
    out: str = "out"  # parent folder; the run goes to OUT/SIZE
    log_every: int = 100  # steps between lines of log.jsonl
    eval_every: int = 1000  # steps between evaluations on held-out text
    save_every: int = 1000  # steps between checkpoints; there is one every ten minutes, too
    restart: bool = False  # delete the run in the folder and start over
    eval_only: bool = False  # evaluate a saved run, and do not train
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
        if self.batch_size % (WORLD_SIZE * max(1, self.micro_batch_size)):
            raise UserError(f"a batch of {self.batch_size} rows does not split into {WORLD_SIZE} times "
                            f"micro-batches of {self.micro_batch_size or 'equal size'}")
        if len(self.init) > 2:
            raise UserError("--init takes a discriminator and a generator")
        if self.eval_only and self.restart:
            raise UserError("--eval-only evaluates a run, and --restart deletes it; leave one out")


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
MAY_CHANGE = {"micro_batch_size", "dtype", "device", "graph", "deterministic", "compile", "out", "log_every",
              "eval_every", "save_every", "restart", "eval_only", "prepare_only", "show"}


# ------------------------------------------------------------------------------------------------------------
# The loop


def train(run, producer_error):
    """Train to the last step, or stop at a signal or an error of the producer, and save."""
    config, model, optimizer = run.config, run.model, run.optimizer
    step = make_step(run)
    order, heldout, error = Order(run.cache, config.batch_size), None, None
    kept_steps = {round(part * config.num_train_steps) for part in KEPT}
    saved_at = logged_at = time.perf_counter()
    first_step = logged_step = run.step
    with (stop_signals() as signals,
          tqdm(total=config.num_train_steps, initial=run.step, unit=" steps",
               disable=RANK > 0 or None) as bar):
        while run.step < config.num_train_steps:
            is_last = run.step + 1 == config.num_train_steps
            evaluates = is_last or (run.step + 1) % config.eval_every == 0

            # Get the rows. Neither they nor the held-out rows may be ready yet, here or on another rank.
            batch = order.batch(run.step)
            if evaluates and heldout is None:
                heldout = run.load_heldout()
            is_waiting = batch is None or (evaluates and heldout is None)
            must_stop, must_wait = any_rank(bool(signals or error), is_waiting)
            if must_stop:
                break
            if must_wait:
                bar.set_description("waiting for text")
                error = producer_error()
                time.sleep(0.05)
                continue
            epoch, rows = batch
            input_ids, uniforms = run.to_device(rows, "train", run.step)

            lr = learning_rate(run.step, config.learning_rate, config.num_train_steps,
                               config.num_warmup_steps)
            for group in optimizer.param_groups:
                group["lr"].fill_(lr * group["lr_scale"])
            torch.manual_seed(int(rng(run.seed, "dropout", run.step, RANK).integers(2**63)))
            outputs, grad_norm = step(input_ids, uniforms)
            run.step += 1
            bar.update()

            # Log, evaluate, save. A checkpoint leaves no trace in the log.
            is_logged = evaluates or run.step == 1 or run.step % config.log_every == 0
            if is_logged:
                counts = count(input_ids, model.config)
                metrics = compute_metrics(gather_outputs(outputs), input_ids, counts)  # waits for the device
                seconds = (time.perf_counter() - logged_at) / (run.step - logged_step)
                rate = round(input_ids.numel() / seconds)
                run.log("train", epoch, lr=lr, **metrics, grad_norm=grad_norm.item(), **run.scaling(),
                        tokens_per_second=rate)
                bar.set_description(f"loss {metrics['loss']:.3f}, {rate:,} tokens/s")
                days = seconds * (config.num_train_steps - run.step) / 86_400
                if logged_step < first_step + 100 <= run.step and days > SLOW_DAYS:
                    tqdm.write(f"at this rate the rest takes {days:.0f} days; `--size tiny` takes minutes on "
                               "a CPU, and the other sizes need a GPU")
            if evaluates and len(heldout):
                metrics = compute_metrics(*run.evaluate(heldout))
                run.log("heldout", epoch, **metrics,
                        unigram_entropy=unigram_entropy(heldout, model.config))
                is_late = run.step >= max(20_000, 2 * config.num_warmup_steps)
                tqdm.write(f"step {run.step}, held-out text: {describe(metrics, is_late)}")
            if run.step in kept_steps:
                run.export(run.folder / f"step-{run.step}")
            if is_last or run.step % config.save_every == 0 or time.perf_counter() - saved_at > SAVE_SECONDS:
                run.save()
                saved_at = time.perf_counter()
            if is_logged or run.step == first_step + 1:  # rates leave out compiling, evaluating and saving
                logged_at, logged_step = time.perf_counter(), run.step
    if run.step < config.num_train_steps:
        if run.step > first_step:
            run.save()
        error = next(filter(None, gather(error)), None)  # also waits for the rank that saves
        again = "the same command" + " without --restart" * config.restart
        raise UserError(error or f"stopped after step {run.step}; {again} resumes")


# ------------------------------------------------------------------------------------------------------------
# The step


def make_step(run):
    """The function that takes a step of a run: from ids (B, L) and uniforms (B, L + 2K) of the whole batch to
    the Outputs of the micro-batches and the norm of the gradient before clipping.
    """
    config, model, optimizer, scaler = run.config, run.model, run.optimizer, run.scaler
    forward = torch.compile(model, fullgraph=True) if config.compile else model
    share = config.batch_size // WORLD_SIZE
    mine = slice(share * RANK, share * (RANK + 1))  # rows of this rank

    def step(input_ids, uniforms):
        optimizer.zero_grad(set_to_none=True)
        counts = count(input_ids, model.config)  # of the whole batch, so that the gradients add up to its own
        outputs = []
        for ids, draws in micro_batches(input_ids[mine], uniforms[mine], config.micro_batch_size):
            with autocast(config):
                output = forward(ids, draws, counts)
            scaler.scale(output.loss).backward()
            outputs.append(output._replace(loss=output.loss.detach()))
        add_up_gradients(model)
        scaler.unscale_(optimizer)
        grad_norm = torch.nn.utils.clip_grad_norm_(model.parameters(), config.max_grad_norm)  # [D27]
        scaler.step(optimizer)
        scaler.update()
        return outputs, grad_norm

    return CudaGraphs(step) if config.graph else step


def micro_batches(input_ids, uniforms, size):
    """Yield parts of a batch with `size` rows each."""
    return zip(input_ids.split(size), uniforms.split(size), strict=True)


class CudaGraphs:
    """A function of tensors on a GPU whose kernels are launched all at once, as a CUDA graph, for each shape.

    To launch a kernel of a small network takes the host longer than the kernel takes the GPU. So the function
    is called as it is a few times, then captured, which computes nothing, and replayed from there on. Each
    replay writes its results into the same tensors. What the function reads besides its inputs, such as
    weights and learning rates, must be changed in place.
    """

    def __init__(self, function):
        self.function = function
        self.num_calls = collections.Counter()
        self.captured = {}  # (inputs, replay) by shapes
        self.stream = torch.cuda.Stream()
        self.pool = torch.cuda.graph_pool_handle()  # of memory, which all graphs share

    def __call__(self, *inputs):
        shapes = tuple(tensor.shape for tensor in inputs)
        self.num_calls[shapes] += 1
        if self.num_calls[shapes] <= WARM_UP_CALLS:
            return self.call(inputs)
        if shapes not in self.captured:
            try:
                self.captured[shapes] = self.capture([tensor.clone() for tensor in inputs])
            except RuntimeError as error:  # after which torch gives no more random numbers on the GPU
                reason = str(error).partition("\n")[0]
                raise UserError(f"no CUDA graph can be made of a step ({reason}); add --no-graph") from error
        captured, replay = self.captured[shapes]
        for old, new in zip(captured, inputs, strict=True):
            old.copy_(new)
        return replay()

    def call(self, inputs):
        """Call the function as it is, on the stream of the captures, as torch's notes ask for."""
        self.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.stream):
            results = self.function(*inputs)
        torch.cuda.current_stream().wait_stream(self.stream)
        return results

    def capture(self, inputs):
        """(inputs, a function that computes the results from what they hold when it is called)."""
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self.pool, stream=self.stream):
            results = self.function(*inputs)

        def replay():
            graph.replay()
            return results

        return inputs, replay


# ------------------------------------------------------------------------------------------------------------
# Several processes


def any_rank(*flags):
    """Of each flag, whether it is true on any rank.

    All ranks ask this before every step. So they stop after the same one, and while one waits for text, the
    others wait here for a moment at a time, too short for a time-out.
    """
    if WORLD_SIZE == 1:
        return flags
    flags = torch.tensor(flags, dtype=torch.int32)
    dist.all_reduce(flags, dist.ReduceOp.MAX)
    return flags.bool().tolist()


def add_up_gradients(model):
    """Replace gradients by their sums over all ranks, in one reduction."""
    if WORLD_SIZE == 1:
        return
    gradients = [parameter.grad for parameter in model.parameters()]
    total = torch.cat([gradient.flatten() for gradient in gradients])
    dist.all_reduce(total)
    for gradient, part in zip(gradients, total.split([g.numel() for g in gradients]), strict=True):
        gradient.copy_(part.view_as(gradient))


def gather(value):
    """The values of all ranks, in their order."""
    values = [value] * WORLD_SIZE
    if WORLD_SIZE > 1:
        dist.all_gather_object(values, value)
    return values


def gather_outputs(outputs):
    """The Outputs of all micro-batches of all ranks, on the CPU."""
    outputs = [Output(*(None if tensor is None else tensor.cpu() for tensor in output)) for output in outputs]
    return [output for outputs in gather(outputs) for output in outputs]


# ------------------------------------------------------------------------------------------------------------
# The run and its folder


class Run:
    """Model, optimizer and step of a run, and its folder with log and checkpoint. Only rank 0 writes."""

    def __init__(self, config, model_config, cache):
        self.config, self.cache, self.seed, self.max_length = (
            config, cache, cache.config.seed, cache.config.max_length)
        self.folder = Path(config.out) / config.size
        self.checkpoint, self.log_path = self.folder / "checkpoint.pt", self.folder / "log.jsonl"
        everything = asdict(config) | asdict(model_config) | cache.fingerprint
        self.settings = {name: value for name, value in everything.items() if name not in MAY_CHANGE}
        # These may change on resume. They change rounding and dropout, so they are logged.
        self.numerics = dict(device=config.device, dtype=config.dtype, compile=config.compile,
                             graph=config.graph, deterministic=config.deterministic,
                             micro_batch_size=config.micro_batch_size, ranks=WORLD_SIZE,
                             threads=torch.get_num_threads(), torch=str(torch.__version__))
        torch.manual_seed(self.seed)
        self.model = Electra(model_config).train()
        self.networks = {name: network for name in ("discriminator", "generator")
                         if (network := getattr(self.model, name)) is not None}
        load_init(self.model, config)
        self.model.to(config.device)
        self.optimizer = build_optimizer(self.model.named_parameters(), config)
        self.scaler = torch.amp.GradScaler(torch.device(config.device).type, enabled=config.dtype == "fp16")
        self.step = 0

    def resume(self):
        """Continue from the checkpoint, or start over. What was logged after the checkpoint is cut off."""
        if RANK == 0:
            if self.config.restart:
                self.checkpoint.unlink(missing_ok=True)  # first: it must not stand beside another run's log
            if self.checkpoint.exists():
                self.read_checkpoint()
            else:
                self.start_over()
        self.step, scaler_state = gather((self.step, self.scaler.state_dict()))[0]
        if scaler_state:
            self.scaler.load_state_dict(scaler_state)
        states = [self.model.state_dict(), *self.optimizer.state.values()]
        for state in states if WORLD_SIZE > 1 else ():
            for tensor in state.values():
                dist.broadcast(tensor, 0)

    def start_over(self):
        for folder in (self.folder / "discriminator", self.folder / "generator", *self.folder.glob("step-*")):
            shutil.rmtree(folder, ignore_errors=True)
        with open(self.log_path, "wb") as log:
            append_json(log, dict(settings=self.settings, numerics=self.numerics))

    def read_checkpoint(self):
        try:
            state = torch.load(self.checkpoint, map_location="cpu", weights_only=True)
            old, new = state["settings"], self.settings
        except (RuntimeError, pickle.UnpicklingError, EOFError, KeyError):
            raise UserError(f"{self.checkpoint} is damaged; --restart starts over") from None
        changed = [{"files": "the text differs", "vocab": "the vocabulary differs"}.get(name) or
                   f"{name} was {old.get(name)} and is now {new.get(name)}"
                   for name in sorted(old.keys() | new.keys()) if old.get(name) != new.get(name)]
        if changed:
            message = (f"{self.folder} holds another run ({'; '.join(changed)}); use its settings, another "
                       "--out, or --restart")
            if old.get("num_train_steps") != new["num_train_steps"] and not self.config.eval_only:
                message += f"; to train it for longer, use another --out and --init {self.folder}"
            raise UserError(message)
        self.model.load_state_dict(state["model"])
        # Its groups hold settings, which are this run's, and rates, which must stay on this run's device.
        groups = self.optimizer.state_dict()["param_groups"]
        self.optimizer.load_state_dict(state["optimizer"] | dict(param_groups=groups))
        if state["scaler"] and self.scaler.is_enabled():
            self.scaler.load_state_dict(state["scaler"])
        self.step = state["step"]
        if self.config.eval_only:
            return
        with open(self.log_path, "r+b") as log:
            log.truncate(state["log_bytes"])
            log.seek(0, os.SEEK_END)
            if state["numerics"] != self.numerics:
                append_json(log, dict(step=self.step, numerics=self.numerics))
        if self.step == self.config.num_train_steps:
            print(f"all {self.step} steps are done already; after a change of the code, use another --out")
        else:
            print(f"resuming after step {self.step} of {self.config.num_train_steps}")

    def to_device(self, rows, purpose, step):
        """ids (B, L) and the uniform numbers (B, L + 2K) of their masks and samples."""
        width = self.max_length + 2 * self.model.config.num_slots(self.max_length)
        uniforms = rng(self.seed, purpose, step).random((len(rows), width), dtype=np.float32)
        tensors = map(torch.from_numpy, (rows, uniforms))
        if self.config.device.startswith("cuda"):  # copied while the device still computes the step before
            return [tensor.pin_memory().to(self.config.device, non_blocking=True) for tensor in tensors]
        return [tensor.to(self.config.device) for tensor in tensors]

    def load_heldout(self):
        """The held-out rows, or None while they have not arrived. Prints the baseline of the MLM loss."""
        heldout = self.cache.heldout(HELDOUT_ROWS)
        if heldout is not None and len(heldout):
            unigram = unigram_entropy(heldout, self.model.config)
            doubt = ", too few for reliable metrics" * (len(heldout) < FEW_ROWS)
            tqdm.write(f"{len(heldout):,} rows are held out{doubt}; guessing by word frequency alone would "
                       f"give an MLM loss of {unigram:.3f}")
        elif heldout is not None:
            tqdm.write("no evaluation: one document in a hundred is held out, and this text has too few")
        return heldout

    @torch.no_grad()
    def evaluate(self, rows):
        """(Outputs, ids, counts) of rows, without dropout, with the same masks and samples every time."""
        self.model.eval()
        ids, uniforms = self.to_device(rows, "heldout", 0)
        counts = count(ids, self.model.config)
        with autocast(self.config):
            outputs = [self.model(*part, counts)
                       for part in micro_batches(ids, uniforms, self.config.micro_batch_size)]
        self.model.train()
        return outputs, ids, counts

    def scaling(self):
        """What fp16 adds to the log. A step with an infinite gradient is skipped."""
        if not self.scaler.is_enabled():
            return {}
        taken = next(iter(self.optimizer.state.values()))["step"].item() - FIRST_ADAM_STEP
        return dict(loss_scale=self.scaler.get_scale(), skipped_steps=round(self.step - taken))

    def log(self, split, epoch, **values):
        """Append a line to log.jsonl."""
        if RANK:
            return
        positions = self.step * self.config.batch_size * self.max_length  # padding included
        with open(self.log_path, "ab") as log:
            append_json(log, dict(split=split, step=self.step, tokens=positions, epoch=epoch, **values))

    def save(self):
        """Write the networks, then the checkpoint. The one before it stays until this one is whole."""
        if RANK:
            return
        if not all(parameter.isfinite().all() for parameter in self.model.parameters()):
            raise UserError(f"the weights are not finite after step {self.step}, and are not saved; use "
                            "--restart with a lower --learning-rate")
        if self.scaler.is_enabled() and self.scaler.get_scale() < MIN_LOSS_SCALE:
            raise UserError(f"the loss overflows in fp16 at step {self.step}, and nothing is learned; use "
                            "--dtype fp32, or --restart with a lower --learning-rate")
        self.export(self.folder)
        state = dict(step=self.step, settings=self.settings, numerics=self.numerics,
                     model=self.model.state_dict(), optimizer=self.optimizer.state_dict(),
                     scaler=self.scaler.state_dict(), log_bytes=self.log_path.stat().st_size)
        buffer = io.BytesIO()  # torch.save hides a full disk behind an error of its own
        torch.save(state, buffer)
        with atomic_write(self.checkpoint) as file:
            file.write(buffer.getbuffer())

    def export(self, parent):
        """Write the networks as folders in `parent`. An old folder stays until the new one is complete."""
        if RANK:
            return
        for name, network in self.networks.items():
            with atomic_folder(parent / name) as folder:
                save_pretrained(network, folder)
                self.cache.wordpiece.save(folder, self.max_length)


@contextmanager
def stop_signals():
    """Yields a list that the first Ctrl-C or SIGTERM is added to. A second one kills."""
    received = []

    def receive(number, frame):
        received.append(number)
        signal.signal(number, signal.SIG_DFL)
        tqdm.write("stopping after this step, and saving; once more kills")

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
    # Rates are tensors on the device, for a CUDA graph to read.
    optimizer = torch.optim.AdamW(
        [dict(options, params=members, lr=torch.zeros((), device=members[0].device))
         for options, members in groups.items()],
        betas=(config.adam_beta1, config.adam_beta2), eps=config.adam_epsilon, fused=True,
        capturable=config.device.startswith("cuda"))
    reset_moments(optimizer)
    return optimizer


def reset_moments(optimizer):
    """Set the moments to 0, in place if there are any: a CUDA graph may know them by their addresses."""
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            state = optimizer.state[parameter]
            if not state:
                state["step"] = torch.zeros((), device=parameter.device)
                state["exp_avg"] = torch.zeros_like(parameter)
                state["exp_avg_sq"] = torch.zeros_like(parameter)
            state["step"].fill_(FIRST_ADAM_STEP)
            state["exp_avg"].zero_()
            state["exp_avg_sq"].zero_()


def learning_rate(step, peak, num_train_steps, num_warmup_steps):
    """Warm-up multiplies the linear decay, both from step 0. [D26]

    >>> [round(learning_rate(step, 1.0, 100, 10), 3) for step in (0, 5, 10, 99)]
    [0.0, 0.475, 0.9, 0.01]
    """
    warmup = min(1.0, step / num_warmup_steps) if num_warmup_steps else 1.0
    return peak * (1 - step / num_train_steps) * warmup


def autocast(config):
    """bf16 or fp16 where the config asks for it."""
    dtype = dict(fp32=None, bf16=torch.bfloat16, fp16=torch.float16)[config.dtype]
    return torch.autocast(torch.device(config.device).type, dtype, enabled=dtype is not None)


# ------------------------------------------------------------------------------------------------------------
# Metrics


def compute_metrics(outputs, input_ids, counts):
    """The metrics of a batch from the Outputs of its micro-batches."""
    predictions, _ = counts.tolist()

    def total(name):
        return sum(getattr(output, name) for output in outputs).item()

    metrics = {
        "loss": total("loss"),
        "mlm_loss": total("mlm_loss"),
        "mlm_accuracy": total("mlm_correct") / predictions,
        "sampled_accuracy": total("sampled_correct") / predictions,
    }
    if outputs[0].disc_logits is None:
        return metrics
    is_token = (input_ids != 0).cpu().numpy()
    logits = torch.cat([output.disc_logits for output in outputs]).cpu().numpy()[is_token]
    is_replaced = torch.cat([output.is_replaced for output in outputs]).cpu().numpy()[is_token]
    flagged = logits > 0
    caught, fake_rate = int((flagged & is_replaced).sum()), is_replaced.mean()
    return metrics | {
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
    text = f"MLM loss {metrics['mlm_loss']:.3f}"
    if "auc" in metrics:
        loss, guessing = metrics["disc_loss"], metrics["all_original"]
        text += (f", discriminator loss {loss:.3f} (guessing: {guessing:.3f}), AUC {metrics['auc']:.3f} "
                 "(guessing: 0.5)")
        if is_late and loss >= 0.97 * guessing:
            text += "; warning: the discriminator is stuck; try a smaller generator or a lower learning rate"
    if is_late and metrics["mlm_loss"] > 6:
        text += "; warning: the generator is stuck; try a lower learning rate"
    return text


# ------------------------------------------------------------------------------------------------------------
# A look at what it has learned

LEGEND = """
Held-out sentences, as the networks see them.
  [word =]        masked; the generator put the same word back
  [word→other]    masked; the generator put another word"""
DISCRIMINATOR_LEGEND = """\
             ✓    ... and the discriminator flagged it
             ✗    ... and the discriminator did not flag it
  [word !]        flagged, but not replaced
If N tokens were replaced, the N with the highest scores are flagged."""


def finish(run, producer_error):
    """Evaluate a run, and show sentences."""
    while (heldout := run.cache.heldout(HELDOUT_ROWS)) is None:  # the cache may be new
        if error := producer_error():
            raise UserError(error)
        time.sleep(0.05)
    if not len(heldout):
        print("no text is held out, so there is nothing to show")
        return
    if run.config.eval_only:
        metrics = compute_metrics(*run.evaluate(heldout))
        print(f"step {run.step}, held-out text: {describe(metrics, is_late=False)}")
    show(run, choose_readable(heldout, run.cache.wordpiece))


def choose_readable(rows, wordpiece):
    """The rows with the largest share of whole words, (SHOWN_ROWS, L): chosen by their text alone."""

    def readability(row):
        words = [wordpiece.tokens[number] for number in row[:SHOWN_TOKENS] if number]
        return sum(word.isalpha() for word in words) / len(words) if len(words) >= 16 else 0.0

    return np.array(sorted(rows, key=readability, reverse=True)[:SHOWN_ROWS])


def show(run, rows):
    """Print rows with what was masked, what the generator put there, and what the discriminator flagged."""
    outputs, ids, _ = run.evaluate(rows)

    def join(name):
        return torch.cat([getattr(output, name) for output in outputs]).cpu()

    positions, weights, corrupted_ids, is_replaced = map(
        join, ("positions", "weights", "corrupted_ids", "is_replaced"))
    is_suspect, marks = torch.zeros_like(is_replaced), ("", "")
    print(LEGEND)
    if run.model.discriminator is not None:
        print(DISCRIMINATOR_LEGEND)
        marks = " ✗", " ✓"
        logits = join("disc_logits")
        suspicions = logits[ids.cpu() != 0].sort(descending=True).values
        is_suspect = logits > suspicions[is_replaced.sum()]
    is_masked = torch.zeros_like(is_replaced).scatter(1, positions, weights > 0)
    tokens = run.cache.wordpiece.tokens
    arrays = rows, corrupted_ids, is_masked, is_suspect
    for row in zip(*(array.tolist() for array in arrays), strict=True):
        words = []
        for original, seen, masked, suspect in list(zip(*row, strict=True))[:SHOWN_TOKENS]:
            if not original:
                break
            if seen != original:
                words.append(f"[{tokens[original]}→{tokens[seen]}{marks[suspect]}]")
            elif suspect or masked:
                words.append(f"[{tokens[original]} {'!' if suspect else '='}]")
            else:
                words.append(tokens[original])
        print("\n" + re.sub(r"(?<!\]) ##", "", " ".join(words)))  # word pieces, unless one is marked


# ------------------------------------------------------------------------------------------------------------
# Command line


def parse(argv, description, config_classes, sizes):
    """A config of each class from the command line, and the names of what was typed.

    A field that has a comment is a flag, with the comment as its help. What is not typed is as in `sizes`, a
    table of what differs from the defaults, and else the default.
    """
    parser = argparse.ArgumentParser(description=description, usage="%(prog)s [--FLAG VALUE ...]",
                                     allow_abbrev=False, argument_default=argparse.SUPPRESS,
                                     exit_on_error=False)
    for config_class in config_classes:
        source = "".join(map(inspect.getsource, config_class.__mro__[-2::-1]))
        comments = dict(re.findall(r"^    (\w+): .*?  # (.+)$", source, re.MULTILINE))
        group = parser.add_argument_group(inspect.getdoc(config_class).partition(".")[0])
        # A class's own fields come first, then those it inherits.
        for field in sorted(fields(config_class), key=lambda field: field.name not in vars(config_class)):
            if field.name not in comments:
                continue
            defaults = [format_default(field.default)]
            defaults += [f"{size}: {format_default(row[field.name])}" for size, row in sizes.items()
                         if field.name in row]
            shown = "; ".join(filter(None, defaults))
            help = comments[field.name] + f" ({shown})" * bool(shown)
            kinds = {bool: dict(action=argparse.BooleanOptionalAction), list: dict(nargs="+")}
            group.add_argument(f"--{field.name.replace('_', '-')}", help=help.replace("%", "%%"),
                               **kinds.get(field.type, dict(type=field.type)))
    try:
        typed, unknown = parser.parse_known_args(argv)
    except argparse.ArgumentError as error:
        raise UserError(f"{error}; --help lists the flags") from None
    if unknown:
        raise UserError(f"there is no {' '.join(unknown)}; --help lists the flags")
    values = sizes.get(getattr(typed, "size", "small"), {}) | vars(typed)
    configs = [config_class(**{field.name: values[field.name] for field in fields(config_class)
                               if field.name in values}) for config_class in config_classes]
    return configs, vars(typed).keys()


def format_default(default):
    """A default as --help shows it: nothing if there is none."""
    if isinstance(default, bool):
        return "on" if default else "off"
    if isinstance(default, list | tuple):
        return " ".join(default)
    return "" if default is None else str(default)


def resolve_device(config):
    """The config with what "auto" stands for on this machine."""
    gpus = [f"cuda:{number}" for number in range(torch.cuda.device_count())]
    found = [*gpus, "cpu", *["mps"] * torch.backends.mps.is_available()]
    device = ("cuda" if gpus else "cpu") if config.device == "auto" else config.device
    if device == "cuda":
        device = f"cuda:{LOCAL_RANK}"
    if device not in found:
        raise UserError(f"there is no device {device} here; there are {', '.join(found)}")
    if device in gpus:
        torch.cuda.set_device(device)
        torch.set_float32_matmul_precision("high")  # TF32 for what stays fp32
    dtypes = dtypes_of(device)
    if config.dtype not in ("auto", *dtypes):
        raise UserError(f"{device} does not compute in {config.dtype}; --dtype takes {', '.join(dtypes)}")
    dtype = dtypes[0] if config.dtype == "auto" else config.dtype
    graph = config.graph and device in gpus
    if graph and (dtype == "fp16" or WORLD_SIZE > 1):
        print("no CUDA graphs: they are for bf16 and fp32 in one process", file=sys.stderr)
        graph = False
    if config.deterministic and device in gpus:
        compute_deterministically()
    return replace(config, device=device, dtype=dtype, graph=graph)


def compute_deterministically():
    """Have torch choose kernels that give the same bits each time."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS's condition
    torch.use_deterministic_algorithms(True, warn_only=True)
    # torch warns of every cumsum. `model.sample` adds up along rows, which is always done in the same order.
    warnings.filterwarnings("ignore", message="cumsum")
    # The backward passes of these two add up in any order.
    torch.backends.cuda.enable_cudnn_sdp(False)
    torch.backends.cuda.enable_mem_efficient_sdp(False)


def dtypes_of(device):
    """What a device computes in, the best first."""
    if not device.startswith("cuda"):
        return ["fp32", "bf16", "fp16"] if device == "cpu" else ["fp32"]
    has_bf16 = torch.cuda.get_device_capability(device) >= (8, 0)  # older GPUs only emulate it
    return ["bf16", "fp16", "fp32"] if has_bf16 else ["fp16", "fp32"]


def run_command(main):
    """Run `main` and return the exit status. An error that the user can fix is printed as one line."""
    if RANK:
        sys.stdout = open(os.devnull, "w")  # one rank talks, and all report errors
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="replace")  # the terminal may not know every character
    try:
        main()
    except (UserError, ModelError) as error:
        print(error, file=sys.stderr)
        return 1
    except BrokenPipeError:  # `| head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except RuntimeError as error:
        if "by peer" not in str(error):
            raise
        print(f"rank {RANK} stops because another one has", file=sys.stderr)  # which prints its own error
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
    (config, data_config, model_config), typed = parse(
        argv, description, (TrainConfig, DataConfig, ElectraConfig), DEFAULTS)
    config = resolve_device(config)
    if config.size == "tiny" and config.device == "cpu" and "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(1)  # a second gains little, and loses much on a busy machine (LOG.md)
    config = replace(config, micro_batch_size=config.micro_batch_size or config.batch_size // WORLD_SIZE)
    if config.compile is None:  # inductor may choose other kernels in another process, and round otherwise
        config = replace(config, compile=config.device.startswith("cuda") and not config.deterministic)
    if config.compile and config.device == "cpu" and torch.__version__ < "2.11":
        raise UserError(f"torch {torch.__version__} may compile wrong gradients of embeddings on a CPU; "
                        "leave out --compile, or use torch 2.11 or later")
    if config.init:
        config, data_config, model_config = resolve_init(config, data_config, model_config, typed)
    if config.prepare_only:
        cache = prepare(data_config)
        print(cache.describe())
        for row in cache.load("train", 0)[: config.show]:
            print("\n" + cache.wordpiece.decode(row))
        return
    positions = model_config.max_position_embeddings
    if data_config.max_length > positions:
        raise UserError(f"max_length {data_config.max_length} is beyond the model's {positions} positions; "
                        "lower it, or raise --max-position-embeddings too")
    if WORLD_SIZE > 1:
        dist.init_process_group("cpu:gloo,cuda:nccl" if config.device.startswith("cuda") else "gloo")
    folder = Path(config.out) / config.size
    if config.eval_only and RANK == 0 and not (folder / "checkpoint.pt").exists():
        raise UserError(f"there is no run in {folder} to evaluate; check --size and --out")
    wordpiece = load_wordpiece(data_config)
    model_config = replace(
        model_config, vocab_size=len(wordpiece.tokens), cls_token_id=wordpiece.cls_token_id,
        sep_token_id=wordpiece.sep_token_id, mask_token_id=wordpiece.mask_token_id)
    writes, produces = RANK == 0 and not config.eval_only, LOCAL_RANK == 0
    with lock(folder / "lock") if writes else nullcontext(True) as is_ours:
        if not is_ours:
            raise UserError(f"another process is training in {folder}; use another --out")
        run = Run(config, model_config, Cache(data_config, wordpiece))
        compare_ranks(run)
        with producing(run.cache) if produces else nullcontext(lambda: None) as producer_error:
            wait_for_text(run.cache, producer_error)
            run.resume()  # with text at hand, so that bad input leaves the run in the folder alone
            print(run.cache.describe())
            if not config.eval_only:
                train(run, producer_error)
            if RANK == 0:
                finish(run, producer_error)
    if WORLD_SIZE > 1:
        dist.destroy_process_group()
    exported = " and ".join(str(folder / name) for name in run.networks)
    print(f"\ntransformers can load {exported}; to fine-tune:\n"
          f"python finetune.py --model {folder} --task mrpc --max-length {data_config.max_length}")


def compare_ranks(run):
    """Ranks must have the same text, vocabulary and flags. Times of files and paths of --init may differ."""
    identities = [identity[:2] for identity in run.cache.identities]
    settings = run.settings | dict(files=digest(identities), init=len(run.config.init),
                                   log_every=run.config.log_every, eval_every=run.config.eval_every)
    different = {name for one in gather(settings) for name in one if one[name] != settings[name]}
    if different:
        raise UserError(f"the ranks differ in {', '.join(sorted(different))}: give all machines the same "
                        "flags, the same --data and, if a vocabulary was trained, that one by --vocab FILE")


def wait_for_text(cache, producer_error):
    """Wait until there is a shard on every rank."""
    while True:
        error = producer_error()
        cache.refresh()
        if not any_rank(not cache.shards)[0]:
            return
        if error and not cache.shards:  # with a shard, training begins, and saves before it ends
            raise UserError(error)
        time.sleep(0.05)


# Fields of ElectraConfig that weights prescribe.
SHAPE = ("vocab_size", "embedding_size", "hidden_size", "num_hidden_layers", "num_attention_heads",
         "intermediate_size", "max_position_embeddings", "type_vocab_size", "layer_norm_eps")


def resolve_init(config, data_config, model_config, typed):
    """The configs for --init: shape, vocabulary and case are those of the folders."""
    is_mlm, names = model_config.objective == "mlm", list(config.init)
    if is_mlm and len(names) == 2:
        raise UserError("--objective mlm has no discriminator; --init takes one folder")
    if not is_mlm and len(names) == 1 and Path(names[0], "generator").is_dir():
        names *= 2  # both networks of a run
    networks = [["generator"]] if is_mlm else [["discriminator"], ["generator"]]
    folders = [find_model(name, data_config.cache, network).resolve()
               for name, network in zip(names, networks, strict=False)]
    refused = {*SHAPE, "vocab", "do_lower_case", "strip_accents", *["generator_size"] * (len(folders) - 1)}
    if refused & typed:
        raise UserError(f"--init prescribes {', '.join(sorted(refused & typed))}; leave these flags out")
    if any(Path(config.out, config.size).resolve() in folder.parents for folder in folders):
        raise UserError("--init names the run that would be overwritten; use another --out")
    tokenizers = [read_tokenizer(folder)[0] for folder in folders]
    if len({(each.sha256, each.do_lower_case, each.strip_accents) for each in tokenizers}) > 1:
        raise UserError(f"{folders[0]} and {folders[1]} have different vocabularies, or rules for case")
    shapes = [load_config(folder) for folder in folders]
    shape = {name: getattr(shapes[0], name) for name in SHAPE}
    if len(folders) == 2:
        shape["generator_size"] = shapes[1].hidden_size / shapes[0].hidden_size
    return (replace(config, init=[str(folder) for folder in folders]),
            replace(data_config, vocab=str(find_vocab(folders[0])), do_lower_case=tokenizers[0].do_lower_case,
                    strip_accents=tokenizers[0].strip_accents),
            replace(model_config, **shape))


def load_init(model, config):
    """Fill the networks from the folders of --init."""
    if len(config.init) == 2:
        if not load_networks(model, *config.init):
            print("the two folders of --init have different embeddings; the discriminator's are used")
    elif config.init and model.discriminator is None:
        load_weights(model.generator, *config.init)
    elif config.init:
        load_weights(model.discriminator, *config.init)
        print("--init names no generator, so one starts from random weights; until it has learned, its "
              "samples are easy to tell and teach the discriminator little")


if __name__ == "__main__":
    sys.exit(run_command(main))
