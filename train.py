"""Pre-train ELECTRA: `python train.py --size small`. The loop, optimizer and schedule, checkpoints.

Read `train` first. Everything a run writes is in out/SIZE: log.jsonl, checkpoint.pt, and discriminator/ and
generator/, two HuggingFace folders. The same command resumes a run that was stopped.

On a CPU with the same threads and versions, a run that was killed and resumed gives bit for bit the result of
an uninterrupted one. Every random number is a function of (seed, step), so no random state is saved.

Under torchrun every process (rank) draws the rows and random numbers of the whole batch, and computes its
slice. One sum of the gradients over the ranks makes a step.
"""

import os

# How long threads of GNU OpenMP spin at barriers. By default, a second busy process slows training down
# several times. This must be set before torch is imported, so finetune.py imports this file first.
os.environ.setdefault("GOMP_SPINCOUNT", "10000")

import argparse
import collections
import io
import json
import math
import signal
import sys
import threading
import time
import traceback
import warnings
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import asdict, dataclass, fields, replace
from datetime import timedelta
from pathlib import Path
from typing import Annotated, NamedTuple, get_args, get_origin

import numpy as np
import torch
import torch.distributed as dist
from tqdm import tqdm

import data
import model


def read_variable(name, default):
    """A number that torchrun sets. It is -1 if the variable holds no number: `parse` refuses that."""
    try:
        return int(os.environ.get(name) or default)
    except ValueError:
        return -1


RANK = read_variable("RANK", default=0)  # the number of this process
LOCAL_RANK = read_variable("LOCAL_RANK", default=0)  # its number on this machine
WORLD_SIZE = read_variable("WORLD_SIZE", default=1)  # how many processes there are


@dataclass(frozen=True)
class StepConfig:
    """Flags shared by pre-training and fine-tuning: type, help, then the lowest and the highest value."""

    weight_decay: Annotated[float, "decoupled weight decay; LayerNorms and biases are exempt", 0, 1] = 0.01
    adam_beta1: Annotated[float, "decay of Adam's first moment", 0, 0.9999] = 0.9
    adam_beta2: Annotated[float, "decay of Adam's second moment", 0, 0.9999] = 0.999
    adam_epsilon: Annotated[float, "added to the root of Adam's second moment", 1e-12, 1] = 1e-6
    max_grad_norm: Annotated[float, "global norm to which gradients are clipped", 1e-6, 1e12] = 1.0
    dtype: Annotated[str, "fp32, bf16 or fp16; auto is bf16 on a GPU that has it, fp16 on another, "
                          "else fp32"] = "auto"
    device: Annotated[str, "cpu, cuda, cuda:1 or mps; auto is cuda if there is one, else cpu"] = "auto"
    graph: Annotated[bool, "on a GPU, replay steps as CUDA graphs; not in fp16, nor with several "
                           "processes"] = True
    deterministic: Annotated[bool, "on a GPU, repeat a run to the bit, with slower kernels"] = False


@dataclass(frozen=True)
class TrainConfig(StepConfig):
    """The recipe, and where and how it runs."""

    size: Annotated[str, "tiny, small, base or large: the model and its recipe"] = "small"
    batch_size: Annotated[int, "rows in a step", 1, 1_000_000] = 128
    num_train_steps: Annotated[int, "steps in all; the learning rate decays to 0", 1, 10**9] = 1_000_000
    learning_rate: Annotated[float, "peak learning rate", 0, 1] = 5e-4
    num_warmup_steps: Annotated[int, "steps over which the learning rate rises from 0", 0, 10**9] = 10_000
    micro_batch_size: Annotated[int, "rows in a forward pass, to save memory; 0 is all", 0, 1_000_000] = 0
    init: Annotated[list, "start from weights: DISCRIMINATOR [GENERATOR], runs, folders or names on the "
                          "hub"] = ()
    compile: Annotated[bool, "use torch.compile; by default on a GPU, with torch 2.11 or later"] = None
    out: Annotated[str, "parent folder; the run goes to OUT/SIZE"] = "out"
    log_every: Annotated[int, "steps between lines of log.jsonl", 1, 10**9] = 100
    eval_every: Annotated[int, "steps between evaluations on held-out text", 1, 10**9] = 1000
    save_every: Annotated[int, "steps between checkpoints; one comes every ten minutes, too", 1, 10**9] = 1000
    restart: Annotated[bool, "delete the run in the folder and start over"] = False
    eval_only: Annotated[bool, "evaluate a saved run, and do not train"] = False
    prepare_only: Annotated[bool, "prepare the text, and do not train"] = False
    show: Annotated[int, "with --prepare-only: print this many rows", 0, 10**9] = 0

    def __post_init__(self):
        if self.size not in SIZES:
            raise data.UserError(f"there is no size {self.size}; there are {', '.join(SIZES)}")
        divisor = WORLD_SIZE * max(1, self.micro_batch_size)
        if self.batch_size % divisor:
            raise data.UserError(f"batch_size {self.batch_size} must be a multiple of {divisor}, the number "
                                 "of processes times micro_batch_size")
        if len(self.init) > 2:
            raise data.UserError("--init takes a discriminator and a generator")
        if self.deterministic and self.compile:
            raise data.UserError("--deterministic does not compile; leave out --compile")
        if self.eval_only and self.restart:
            raise data.UserError("--eval-only evaluates a run, and --restart deletes it; leave one out")

    @property
    def run_path(self):
        return Path(self.out, self.size)


# All that a size means. A row lists what differs from the defaults of TrainConfig, DataConfig and
# ElectraConfig, which are those of small. `finetuning` is finetune.py's learning rate and layer-wise decay.
SIZES = {
    "tiny": dict(
        data=["python-docs"], vocab="train:2048", max_length=32, batch_size=32, num_train_steps=9000,
        learning_rate=1e-3, num_warmup_steps=500, log_every=50, eval_every=500, save_every=1000,
        embedding_size=64, hidden_size=64, num_hidden_layers=2, num_attention_heads=2, intermediate_size=256,
        max_position_embeddings=32, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
        initializer_range=0.1,  # layers this narrow need it: with 0.02 hardly any context reaches a token
        generator_size=0.5, finetuning=(3e-4, 0.8)),
    "small": dict(finetuning=(3e-4, 0.8)),  # as in the paper; the official code's default is 1e-4
    "base": dict(
        max_length=512, batch_size=256, num_train_steps=766_000, learning_rate=2e-4,
        embedding_size=768, hidden_size=768, num_attention_heads=12, intermediate_size=3072,
        generator_size=1 / 3, finetuning=(1e-4, 0.8)),
    "large": dict(
        max_length=512, batch_size=2048, num_train_steps=400_000, learning_rate=2e-4,
        embedding_size=1024, hidden_size=1024, num_hidden_layers=24, num_attention_heads=16,
        intermediate_size=4096, mask_prob=0.25, finetuning=(5e-5, 0.9)),
}
# Flags that a resumed run may change. Some of them change its rounding (see Run.numerics).
MAY_CHANGE = {"micro_batch_size", "dtype", "device", "graph", "deterministic", "compile", "out", "log_every",
              "eval_every", "save_every", "restart", "eval_only", "prepare_only", "show"}


# ------------------------------------------------------------------------------------------------------------
# The loop

HELDOUT_ROWS = 1024  # the first so many held-out rows are evaluated
SAVE_SECONDS = 600  # a kill costs no more work than this
# After these shares of the steps the networks are kept, for the paper's table of score by compute.
SNAPSHOTS = (0.01, 0.0625, 0.125, 0.25, 0.5, 0.75)


def train(run):
    """Take the remaining steps of a run. `run.shards` is the text; data.Order is its shuffled batches.

    A signal, or an error in the text, ends training early: it saves, and raises data.UserError.
    """
    config = run.config
    electra = run.electra
    optimizer = run.optimizer
    seed = run.shards.config.seed
    take_step = make_step(config, electra, optimizer, run.scaler)
    order = data.Order(run.shards, config.batch_size)
    snapshot_steps = {round(share * config.num_train_steps) for share in SNAPSHOTS}
    heldout = None  # rows for evaluation; the text may not be prepared so far yet
    saved_at = time.perf_counter()
    stopwatch = Stopwatch(run.first_step)
    with stop_signals() as signals, progress_bar(config, run.first_step) as bar:
        if LOCAL_RANK == 0:  # the only rank of its machine that waits for text
            run.shards.signals = signals  # a signal ends the wait
        for step in range(run.first_step, config.num_train_steps):
            if any_rank(bool(signals)):
                stop_early(run, step, order)
            done = step + 1  # steps, once this one is taken
            is_last = done == config.num_train_steps
            is_evaluated = is_last or done % config.eval_every == 0

            # Learning rate.
            lr = learning_rate(step, config.learning_rate, config.num_train_steps, config.num_warmup_steps)
            for group in optimizer.param_groups:
                group["lr"].fill_(lr * group["lr_scale"])  # a tensor (see build_optimizer)

            # Rows. This waits until the text is prepared that far, on all ranks.
            try:
                epoch, rows = read_together(order.batch, step)
                if is_evaluated and heldout is None:  # not later: this wait may end the run before the step
                    heldout = read_heldout(run)
            except data.Stopped as stopped:
                stop_early(run, step, order, stopped.error)

            # Step.
            input_ids = to_device(rows, config.device)
            uniforms = to_device(draw_uniforms(seed, "train", step, rows, electra.config), config.device)
            seed_dropout(seed, step)
            outputs, grad_norm = take_step(input_ids, uniforms)
            bar.update()

            # Log. This waits for the device.
            is_logged = is_evaluated or done == 1 or done % config.log_every == 0
            if is_logged:
                metrics = compute_metrics(gather_outputs(outputs), input_ids)
                rate = round(input_ids.numel() / stopwatch.seconds_per_step(done))  # with padding
                run.log("train", done, epoch, lr=lr, **metrics, grad_norm=grad_norm.item(),
                        **fp16_metrics(run.scaler, optimizer, done), tokens_per_second=rate)
                bar.set_description(f"loss {metrics['loss']:.3f}, {rate:,} tokens/s")
            if done == run.first_step + 100:
                warn_if_slow(stopwatch.seconds_per_step(done) * (config.num_train_steps - done))

            # Evaluate.
            if is_evaluated and len(heldout):
                metrics = evaluate(run, done, heldout)
                run.log("heldout", done, epoch, **metrics)
                if done >= max(LATE_STEP, 2 * config.num_warmup_steps):
                    warn_if_stuck(metrics)

            # Save.
            if done in snapshot_steps:
                run.export(done, run.path / f"step-{done}")
            is_overdue = time.perf_counter() - saved_at > SAVE_SECONDS
            if is_last or is_overdue or done % config.save_every == 0:
                run.save(done, order)
                saved_at = time.perf_counter()
            if is_logged or step == run.first_step:  # the first step compiles
                stopwatch.restart(done)


def stop_early(run, step, order, error=None):
    """Save a run after `step` steps, and raise data.UserError.

    `error` says what is wrong with the text. After a signal there is none, and the message is how to resume.
    """
    if step > run.first_step:
        run.save(step, order)
    wait_for_all_ranks()  # until rank 0 has saved: torchrun ends all ranks as soon as one has ended
    command = "the same command without --restart" if run.config.restart else "the same command"
    raise data.UserError(error or f"stopped after step {step}; {command} resumes") from None


class Stopwatch:
    """Measures the seconds that a step takes since the last `restart`, which is at least one step ago.

    The loop restarts it at the end of each step that is logged, and of the first, which compiles. So neither
    compiling nor evaluating counts.
    """

    def __init__(self, done):
        self.restart(done)

    def restart(self, done):
        self.started_at = time.perf_counter()
        self.done_before = done

    def seconds_per_step(self, done):
        return (time.perf_counter() - self.started_at) / (done - self.done_before)


def progress_bar(config, step):
    disable = True if RANK > 0 else None  # None: shown if stderr is a terminal
    return tqdm(total=config.num_train_steps, initial=step, unit=" steps", disable=disable)


# Limits of the warnings below.
FEW_ROWS = 50  # metrics of fewer held-out rows are mostly chance
LONG_WARMUP = 0.2  # of the run
SLOW_DAYS = 14
LATE_STEP = 20_000  # earlier, a network may look stuck and still learn
STUCK_MLM_LOSS = 6  # guessing by word frequency alone gives about 7 with BERT's vocabulary
STUCK_SHARE = 0.97  # of the discriminator's loss if it always guesses the base rate


def read_heldout(run):
    """Wait for the held-out rows, (N, L), and say how many there are."""
    heldout = read_together(run.shards.heldout, HELDOUT_ROWS)
    if not len(heldout):
        tqdm.write("no evaluation: one document in a hundred is held out, and this text has too few")
        return heldout
    warning = ", too few for reliable metrics" if len(heldout) < FEW_ROWS else ""
    tqdm.write(f"{len(heldout):,} rows are held out{warning}; guessing by word frequency alone would "
               f"give an MLM loss of {unigram_entropy(heldout, run.electra.config):.3f}")
    return heldout


def warn_if_warmup_is_long(config):
    if config.num_warmup_steps > LONG_WARMUP * config.num_train_steps:
        print(f"warning: the learning rate rises for {config.num_warmup_steps:,} of "
              f"{config.num_train_steps:,} steps; a short run needs fewer: --num-warmup-steps "
              f"{config.num_train_steps // 20}")


def warn_if_slow(seconds):
    days = seconds / 86_400
    if days > SLOW_DAYS:
        tqdm.write(f"at this rate the rest takes {days:.0f} days; `--size tiny` takes minutes on "
                   "a CPU, and the other sizes need a GPU")


def warn_if_stuck(metrics):
    if metrics["mlm_loss"] > STUCK_MLM_LOSS:
        tqdm.write("warning: the generator is stuck; try a lower learning rate")
    if "auc" in metrics and metrics["disc_loss"] >= STUCK_SHARE * metrics[BASE_RATE_LOSS]:
        tqdm.write("warning: the discriminator is stuck; try a smaller generator or a lower learning rate")


@contextmanager
def stop_signals():
    """Yield a list. The first Ctrl-C or SIGTERM is appended to it. A second one kills the process."""
    received = []

    def receive(number, frame):
        received.append(number)
        signal.signal(number, signal.SIG_DFL)
        tqdm.write("stopping after this step, and saving; once more kills")

    old_handlers = {}
    if threading.current_thread() is threading.main_thread():  # no other thread may set handlers
        for number in signal.SIGINT, signal.SIGTERM:
            old_handlers[number] = signal.signal(number, receive)
    try:
        yield received
    finally:
        for number, handler in old_handlers.items():
            signal.signal(number, handler)


# ------------------------------------------------------------------------------------------------------------
# The step


def draw_uniforms(seed, purpose, step, rows, electra_config):
    """The uniform numbers for masks and samples of rows (B, L), (B, L + 2K) float32."""
    B, L = rows.shape
    shape = (B, L + 2 * electra_config.num_slots(L))
    return data.rng(seed, purpose, step).random(shape, dtype=np.float32)


def to_device(array, device):
    """A NumPy array as a tensor. On a GPU the copy overlaps with the previous step."""
    tensor = torch.from_numpy(array)
    if device.startswith("cuda"):
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


def seed_dropout(seed, step):
    """Seed torch's generator, which only dropout uses in a step. Each rank gets its own seed."""
    dropout_seed = data.rng(seed, "dropout", step, RANK).integers(2**63)
    torch.manual_seed(int(dropout_seed))


def make_step(config, electra, optimizer, scaler):
    """Return step(input_ids, uniforms), which takes a step on the whole batch: (B, L) and (B, L + 2K).

    It returns (the Outputs of this rank's micro-batches, the norm of the gradient before clipping).
    """
    forward = torch.compile(electra, fullgraph=True) if config.compile else electra
    share = config.batch_size // WORLD_SIZE
    mine = slice(share * RANK, share * (RANK + 1))  # rows of this rank

    def step(input_ids, uniforms):
        optimizer.zero_grad(set_to_none=True)
        # Counts of the whole batch, so that gradients of micro-batches add up to its gradient.
        counts = model.loss_counts(input_ids, electra.config)
        outputs = []
        for micro_ids, micro_uniforms in micro_batches(
                input_ids[mine], uniforms[mine], config.micro_batch_size):
            with autocast(config):
                output = forward(micro_ids, micro_uniforms, counts)
            scaler.scale(output.loss).backward()
            outputs.append(output._replace(loss=output.loss.detach()))  # keep the number, drop the graph
        add_up_gradients(electra)
        grad_norm = update_weights(electra, optimizer, scaler, config)
        return outputs, grad_norm

    return CudaGraphs(step) if config.graph else step


def update_weights(network, optimizer, scaler, config):
    """Clip the gradient, and take a step of the optimizer. Returns the norm before clipping."""
    scaler.unscale_(optimizer)
    grad_norm = torch.nn.utils.clip_grad_norm_(network.parameters(), config.max_grad_norm)  # [D27]
    scaler.step(optimizer)
    scaler.update()
    return grad_norm


def evaluate(run, step, heldout):
    """Print the main metrics of held-out rows, and return all of them."""
    outputs, input_ids = run_without_dropout(run, heldout)
    metrics = compute_metrics(outputs, input_ids)
    metrics["unigram_entropy"] = unigram_entropy(heldout, run.electra.config)
    tqdm.write(f"step {step}, held-out text: {describe_metrics(metrics)}")
    return metrics


@torch.no_grad()
def run_without_dropout(run, rows):
    """(Outputs, ids) of rows, with the same masks and samples every time."""
    config = run.config
    electra = run.electra
    seed = run.shards.config.seed
    input_ids = to_device(rows, config.device)
    uniforms = to_device(draw_uniforms(seed, "heldout", 0, rows, electra.config), config.device)
    counts = model.loss_counts(input_ids, electra.config)
    outputs = []
    electra.eval()
    with autocast(config):
        for micro_ids, micro_uniforms in micro_batches(input_ids, uniforms, config.micro_batch_size):
            outputs.append(electra(micro_ids, micro_uniforms, counts))
    electra.train()
    return outputs, input_ids


def micro_batches(input_ids, uniforms, size):
    """(input_ids, uniforms) of the parts of a batch, with `size` rows each."""
    return zip(input_ids.split(size), uniforms.split(size), strict=True)


def autocast(config):
    """bf16 or fp16 where the config asks for it."""
    if config.dtype == "fp32":
        return nullcontext()
    dtype = dict(bf16=torch.bfloat16, fp16=torch.float16)[config.dtype]
    return torch.autocast(torch.device(config.device).type, dtype)


WARM_UP_CALLS = 3  # before a CUDA graph is captured: they compile, choose and load kernels


class CudaGraphs:
    """A function of tensors on a GPU whose kernels are launched all at once, as a CUDA graph, for each shape.

    For a small network, launching a kernel takes longer than running it. The first calls of a shape run as
    they are. The next one captures the function's kernels without running them. From then on they are
    replayed, and each replay writes its results into the same tensors.

    What the function reads besides its inputs, such as weights and learning rates, must be changed in place.
    Dropout in a replay draws from torch's generator as it is seeded at that time.
    """

    def __init__(self, function):
        self.function = function
        self.num_calls = collections.Counter()
        self.graphs = {}  # (static inputs, replay) by shapes
        self.stream = torch.cuda.Stream()
        self.pool = torch.cuda.graph_pool_handle()  # of memory, which all graphs share

    def __call__(self, *inputs):
        shapes = tuple(tensor.shape for tensor in inputs)
        self.num_calls[shapes] += 1
        if self.num_calls[shapes] <= WARM_UP_CALLS:
            return self.run_eagerly(inputs)
        if shapes not in self.graphs:
            static_inputs = [tensor.clone() for tensor in inputs]
            try:
                self.graphs[shapes] = static_inputs, self.capture(static_inputs)
            except RuntimeError as error:
                # torch's generator on the GPU is unusable after a failed capture, so the run ends.
                reason = str(error).partition("\n")[0]
                raise data.UserError(
                    f"no CUDA graph can be made of a step ({reason}); add --no-graph") from error
        static_inputs, replay = self.graphs[shapes]
        for static, new in zip(static_inputs, inputs, strict=True):
            static.copy_(new)
        return replay()

    def run_eagerly(self, inputs):
        """Call the function as it is, on the stream of the captures.

        The first backward pass binds each weight to its stream, and a capture on another one would fail.
        """
        self.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.stream):
            results = self.function(*inputs)
        torch.cuda.current_stream().wait_stream(self.stream)
        return results

    def capture(self, inputs):
        """Record the function on these tensors. Returns replay(), which runs it on what they hold by then."""
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self.pool, stream=self.stream):
            results = self.function(*inputs)

        def replay():
            graph.replay()
            return results

        return replay


# ------------------------------------------------------------------------------------------------------------
# Several processes

RANK_TIMEOUT = timedelta(days=1)  # ranks wait for each other, even while text is downloaded


def torchrun_error():
    names = ("RANK", "LOCAL_RANK", "WORLD_SIZE")
    found = ", ".join(f"{name} is {os.environ.get(name, 'unset')}" for name in names)
    return data.UserError(f"{found}, but this is no process of torchrun: start it with torchrun, or unset "
                          "all three")


def start_ranks(config):
    """Connect the processes that torchrun has started, if it has."""
    if WORLD_SIZE == 1:
        return
    backend = "cpu:gloo,cuda:nccl" if config.device.startswith("cuda") else "gloo"
    try:
        dist.init_process_group(backend, timeout=RANK_TIMEOUT)
    except ValueError:  # a variable that torchrun sets is missing
        raise torchrun_error() from None
    if RANK > 0:  # rank 0 talks for all; errors go to stderr
        sys.stdout = open(os.devnull, "w")


def compare_ranks(run):
    """Raise data.UserError if ranks have other text, vocabularies or flags than this one."""
    ours = dict(run.settings)
    names_and_sizes = [identity.portable for identity in run.shards.identities]
    ours["files"] = data.digest(names_and_sizes)
    ours["init"] = len(run.config.init)  # paths may differ between machines
    ours["log_every"] = run.config.log_every  # ranks meet when they log and evaluate
    ours["eval_every"] = run.config.eval_every
    everyones = from_all_ranks(ours)
    different = [name for name in sorted(ours) if any(theirs[name] != ours[name] for theirs in everyones)]
    if different:
        raise data.UserError(f"the ranks differ in {', '.join(different)}: give all machines the same flags, "
                             "the same --data and, if a vocabulary was trained, that one by --vocab FILE")


def read_together(read, *args):
    """read(*args) on every rank, where `read` blocks until text is prepared.

    The first rank of each machine prepares the text, so it reads first. The others wait for the first ranks
    of all machines, and then read. If one of these was stopped, every rank raises data.Stopped.
    """
    stopped = None
    if LOCAL_RANK == 0:
        try:
            result = read(*args)
        except data.Stopped as exception:
            stopped = exception
    if any_rank(stopped is not None):  # all ranks wait here
        exceptions = [exception for exception in from_all_ranks(stopped) if exception is not None]
        raise max(exceptions, key=lambda exception: exception.error is not None)  # an error before a signal
    if LOCAL_RANK > 0:
        result = read(*args)
    return result


def any_rank(flag):
    """Whether a flag is true on any rank. All wait here for the last one."""
    if WORLD_SIZE == 1:
        return flag
    flags = torch.tensor([flag], dtype=torch.int32)
    dist.all_reduce(flags, dist.ReduceOp.MAX)
    return bool(flags.item())


def add_up_gradients(electra):
    """Replace gradients by their sums over all ranks, in one reduction."""
    if WORLD_SIZE == 1:
        return
    gradients = [parameter.grad for parameter in electra.parameters()]
    total = torch.cat([gradient.flatten() for gradient in gradients])
    dist.all_reduce(total)
    parts = total.split([gradient.numel() for gradient in gradients])
    for gradient, part in zip(gradients, parts, strict=True):
        gradient.copy_(part.view_as(gradient))


def gather_outputs(outputs):
    """The Outputs of all micro-batches of all ranks, on the CPU."""
    ours = []
    for output in outputs:
        tensors = [None if tensor is None else tensor.cpu() for tensor in output]
        ours.append(model.Output(*tensors))
    return [output for theirs in from_all_ranks(ours) for output in theirs]


def wait_for_all_ranks():
    from_all_ranks(None)


def from_all_ranks(value):
    """The values of all ranks, in their order. All wait here for the last one."""
    values = [value] * WORLD_SIZE
    if WORLD_SIZE > 1:
        dist.all_gather_object(values, value)
    return values


# ------------------------------------------------------------------------------------------------------------
# A run and its folder

CHECKPOINT = "checkpoint.pt"
LOG = "log.jsonl"
MIN_LOSS_SCALE = 1e-4  # of fp16: it falls this low only if every step overflows
# What `write_network` writes. --restart deletes config.json first: without it, a folder is no network.
NETWORK_FILES = ("config.json", "tokenizer_config.json", "vocab.txt", "model.safetensors")


@contextmanager
def lock_run(config):
    """Only one process at a time may train in a folder. Evaluating needs no lock."""
    if RANK > 0 or config.eval_only:
        yield
        return
    with data.try_lock(config.run_path / "lock") as is_ours:
        if not is_ours:
            raise data.UserError(f"another process is training in {config.run_path}; use another --out")
        yield


class Run:
    """A run: its text, networks and optimizer, and the folder where they are saved. Only rank 0 writes.

    A run begins with a checkpoint, at step 0. The checkpoint holds all that the run needs. The log and the
    networks are brought into line with it at every start.

    `settings` decide the result, and a resumed run must have the same. `numerics` change only rounding and
    dropout: they are logged. `record` is what the checkpoint says about the run, or None in a new one.
    """

    def __init__(self, config, origin, shards, electra, record, first_step):
        self.config = config
        self.origin = origin
        self.shards = shards
        self.electra = electra
        self.optimizer = build_optimizer(electra.named_parameters(), config)
        self.scaler = torch.amp.GradScaler(torch.device(config.device).type, enabled=config.dtype == "fp16")
        self.record = record
        self.first_step = first_step  # so many steps are taken already
        self.path = config.run_path
        self.checkpoint = self.path / CHECKPOINT
        self.log_path = self.path / LOG
        everything = asdict(config) | asdict(electra.config) | shards.row_settings
        self.settings = {name: value for name, value in everything.items() if name not in MAY_CHANGE}
        self.numerics = dict(device=config.device, dtype=config.dtype, compile=config.compile,
                             graph=config.graph, deterministic=config.deterministic,
                             micro_batch_size=config.micro_batch_size, ranks=WORLD_SIZE,
                             threads=torch.get_num_threads(), torch=str(torch.__version__))

    def check_settings(self):
        """Refuse to continue a run that has other settings."""
        old = self.record["settings"]
        new = self.settings
        changes = [f"{name} was {old.get(name)} and is now {new.get(name)}"
                   for name in sorted(old.keys() | new.keys()) if old.get(name) != new.get(name)]
        if not changes:
            return
        message = self.refusal("; ".join(changes))
        if old.get("num_train_steps") != new["num_train_steps"]:
            message += f"; to train it for longer, use another --out and --init {self.path}"
        raise data.UserError(message)

    def check_text(self):
        """Wait for the first shard, and for those that the run has read. Refuse to continue with others."""
        read_together(self.shards.wait_for_shards, 1)
        if self.record is None:
            return
        recorded = self.record["history"]  # hashes of the shards that the run has read
        if read_together(self.shards.history, self.record["num_shards"]) != recorded:
            place = self.shards.changed_file(recorded)
            raise data.UserError(self.refusal(f"the text differs in {place} or after it"))

    def refusal(self, reason):
        return f"{self.path} holds another run ({reason}); use its settings, another --out, or --restart"

    def start(self):
        """Make the folder of a new run, or bring the log and the networks into line with the checkpoint."""
        if RANK > 0:
            return
        if self.config.restart:  # the checkpoint goes first: if this is cut short, there is no run
            for file in [self.checkpoint, *written_files(self.path)]:
                file.unlink(missing_ok=True)
        if self.record is None:
            self.write_checkpoint(0, num_shards=0)
        self.restore_log()
        if self.first_step > 0:
            self.export(self.first_step, self.path)
        if self.first_step == self.config.num_train_steps:
            print(f"all {self.first_step} steps are done; to train again, use --restart or another --out")
        elif self.record is not None:
            print(f"resuming after step {self.first_step} of {self.config.num_train_steps}")

    def restore_log(self):
        """Write the log anew: the settings, the lines up to the first step, the numerics if they are new."""
        lines = self.log_path.read_bytes().splitlines() if self.log_path.exists() else []
        entries = []
        for line in lines:
            with suppress(data.UserError, TypeError):  # a damaged line is left out
                entry = data.parse_json(line, self.log_path)
                if "step" in entry and entry["step"] <= self.first_step:  # the settings have no step
                    entries.append(entry)
        logged_numerics = [entry["numerics"] for entry in entries if "numerics" in entry]
        if not logged_numerics or logged_numerics[-1] != self.numerics:
            entries.append(dict(step=self.first_step + 1, numerics=self.numerics))  # from the next step on
        with data.atomic_write(self.log_path) as file:
            for entry in [dict(settings=self.settings), *entries]:
                file.write(json.dumps(entry).encode() + b"\n")

    def log(self, split, step, epoch, **values):
        """Append a line to log.jsonl. Its `tokens` are those trained on so far, padding included."""
        if RANK > 0:
            return
        num_tokens = step * self.config.batch_size * self.shards.config.max_length
        entry = dict(split=split, step=step, tokens=num_tokens, epoch=epoch)
        for name, value in values.items():
            entry[name] = value if math.isfinite(value) else None  # JSON has no NaN
        with open(self.log_path, "ab") as log:
            data.append_json(log, entry)

    def save(self, step, order):
        """Write the networks, then the checkpoint."""
        if RANK > 0:
            return
        if self.scaler.is_enabled() and self.scaler.get_scale() < MIN_LOSS_SCALE:
            raise data.UserError(f"the loss overflows in fp16 at step {step}, and nothing is learned; use "
                                 "--dtype fp32, or --restart with a lower --learning-rate")
        self.export(step, self.path)
        self.write_checkpoint(step, order.num_shards_used)

    def export(self, step, parent):
        """Write the networks as folders in `parent`."""
        if RANK > 0:
            return
        if not all(parameter.isfinite().all() for parameter in self.electra.parameters()):
            raise data.UserError(f"the weights are not finite after step {step}, and are not saved; use "
                                 "--restart with a lower --learning-rate")
        for name, network in networks_of(self.electra).items():
            write_network(parent / name, network, self.shards.wordpiece, self.shards.config.max_length)

    def write_checkpoint(self, step, num_shards):
        """Write all that the run needs, as built-in types and tensors."""
        # So many shards of the text have been read; `history` has their hashes. `inputs` is the Origin.
        record = dict(inputs=self.origin._asdict(), settings=self.settings,
                      num_shards=num_shards, history=self.shards.history(num_shards))
        state = dict(run=record, step=step, model=self.electra.state_dict(),
                     optimizer=self.optimizer.state_dict(), scaler=self.scaler.state_dict())
        buffer = io.BytesIO()
        torch.save(state, buffer)
        data.write_sealed(self.checkpoint, buffer.getbuffer())

    def load(self, state):
        """Load the networks and the optimizer of a checkpoint, as `read_checkpoint` returned it."""
        self.electra.load_state_dict(state["model"])
        groups = self.optimizer.state_dict()["param_groups"]  # these, since their rates are on this device
        self.optimizer.load_state_dict(dict(state=state["optimizer"]["state"], param_groups=groups))
        if state["scaler"] and self.scaler.is_enabled():
            self.scaler.load_state_dict(state["scaler"])

    def copy_from_rank_0(self):
        """Give all ranks the networks and the optimizer of rank 0."""
        if WORLD_SIZE == 1:
            return
        scaler_state = from_all_ranks(self.scaler.state_dict())[0]  # of rank 0
        if scaler_state:
            self.scaler.load_state_dict(scaler_state)
        for tensor in self.electra.state_dict().values():
            dist.broadcast(tensor, 0)
        for moments in self.optimizer.state.values():  # of a parameter
            for tensor in moments.values():
                dist.broadcast(tensor, 0)


def read_checkpoint(config):
    """What `Run.write_checkpoint` wrote, on rank 0. None if there is no run, or none to be kept.

    Networks or a log without a checkpoint are refused: a new run would write over them.
    """
    path = config.run_path
    checkpoint = path / CHECKPOINT
    if RANK > 0 or config.restart:
        return None
    if checkpoint.exists():
        advice = ("--restart starts over; if a former version wrote it, use another --out and "
                  f"--init {path}, which takes its networks")
        content = data.read_sealed(checkpoint, advice=advice)
        return torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    if config.eval_only:
        raise data.UserError(f"there is no run in {path} to evaluate; check --size and --out")
    for found in written_files(path):
        if found.exists():
            raise data.UserError(f"{path} has no {CHECKPOINT}, but {found.relative_to(path)}; use another "
                                 "--out, or --restart, which deletes it")
    return None


def written_files(path):
    """Yield the files that a run may have written in its folder, apart from its checkpoint."""
    snapshots = [folder for folder in path.glob("step-*") if folder.name.removeprefix("step-").isdecimal()
                 and not folder.is_symlink()]  # which may lead to another run
    for parent in [path, *snapshots]:
        for network in ("generator", "discriminator"):
            for name in NETWORK_FILES:
                yield parent / network / name
    yield path / LOG


def write_network(folder, network, wordpiece, max_length):
    """Write a network and its tokenizer as a folder that transformers can load."""
    write_folder(folder, wordpiece.files(max_length) | model.pretrained_files(network))


def write_folder(folder, files):
    """Write the files of a network, {name: bytes}.

    Only files that change are written, each at once, so another process may read the folder meanwhile.
    """
    # Another program may have left this one, and transformers would prefer it to ours.
    (folder / "tokenizer.json").unlink(missing_ok=True)
    for name, content in files.items():
        path = folder / name
        if not path.is_file() or path.read_bytes() != content:
            with data.atomic_write(path) as file:
                file.write(content)


def networks_of(electra):
    """The networks by the names of their folders."""
    if electra.discriminator is None:
        return {"generator": electra.generator}
    return {"discriminator": electra.discriminator, "generator": electra.generator}


# ------------------------------------------------------------------------------------------------------------
# Optimizer and schedule

FIRST_ADAM_STEP = 1_000_000  # so late that Adam has no bias left to correct


def build_optimizer(parameters, config, lr_scale_of=None):
    """torch's AdamW as the official Adam, which does not correct the bias of its moments. [D24]

    AdamW corrects it by dividing by 1 - beta^step. Steps are counted from FIRST_ADAM_STEP, where that is 1 to
    the last bit. So the update is exactly the official one, and the fused kernel can be used. `parameters`
    are (name, parameter) pairs, and `lr_scale_of(name)` is a parameter's share of the learning rate.
    """
    members = {}  # of the groups, by weight decay and share
    for name, parameter in parameters:
        decay = config.weight_decay if parameter.ndim > 1 else 0.0  # [D25] not of LayerNorms and biases
        lr_scale = lr_scale_of(name) if lr_scale_of else 1.0
        members.setdefault((decay, lr_scale), []).append(parameter)
    groups = []
    for (decay, lr_scale), params in members.items():
        lr = torch.zeros((), device=params[0].device)  # a tensor, for a CUDA graph to read
        groups.append(dict(params=params, lr=lr, lr_scale=lr_scale, weight_decay=decay))
    optimizer = torch.optim.AdamW(
        groups, betas=(config.adam_beta1, config.adam_beta2), eps=config.adam_epsilon, fused=True,
        capturable=config.device.startswith("cuda"))
    init_adam_state(optimizer)
    return optimizer


def init_adam_state(optimizer):
    """Give Adam its state before the first step.

    finetune.py calls it again for each seed. Then the tensors, which CUDA graphs read, are overwritten.
    """
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


def fp16_metrics(scaler, optimizer, step):
    """The extra log values of fp16. A step with an infinite gradient is skipped."""
    if not scaler.is_enabled():
        return {}
    state = next(iter(optimizer.state.values()))  # of any parameter; Adam does not count a skipped step
    num_taken = round(state["step"].item()) - FIRST_ADAM_STEP
    return dict(loss_scale=scaler.get_scale(), skipped_steps=step - num_taken)


# ------------------------------------------------------------------------------------------------------------
# Metrics

# The discriminator's loss if it gives every token the same probability. The name is that of recorded runs.
BASE_RATE_LOSS = "all_original"


def compute_metrics(outputs, input_ids):
    """The metrics of a batch from the Outputs of its micro-batches, under their names in log.jsonl."""

    def total(name):
        return sum(getattr(output, name).sum() for output in outputs).item()

    num_predictions = total("is_used")
    metrics = {
        "loss": total("loss"),
        "mlm_loss": total("mlm_loss"),
        "mlm_accuracy": total("mlm_correct") / num_predictions,
        "sampled_accuracy": total("sampled_correct") / num_predictions,
    }
    if outputs[0].disc_logits is None:
        return metrics
    is_token = (input_ids != 0).cpu().numpy()
    logits = concatenate(outputs, "disc_logits").numpy()[is_token]
    is_replaced = concatenate(outputs, "is_replaced").numpy()[is_token]
    is_flagged = logits > 0
    num_caught = int((is_flagged & is_replaced).sum())
    base_rate = is_replaced.mean()
    return metrics | {
        "disc_loss": total("disc_loss"),
        BASE_RATE_LOSS: entropy(np.array([base_rate, 1 - base_rate])),
        "auc": area_under_curve(logits, is_replaced),
        "precision": num_caught / max(1, int(is_flagged.sum())),
        "recall": num_caught / max(1, int(is_replaced.sum())),
    }


def concatenate(outputs, name):
    """A field of the Outputs of all micro-batches, on the CPU."""
    return torch.cat([getattr(output, name) for output in outputs]).cpu()


def area_under_curve(scores, labels):
    """The probability that a positive scores above a negative; ties count half. 0.5 if either is missing."""
    positives = scores[labels]
    negatives = np.sort(scores[~labels])
    if not len(positives) or not len(negatives):
        return 0.5
    num_below = np.searchsorted(negatives, positives, side="left")  # negatives below each positive
    num_not_above = np.searchsorted(negatives, positives, side="right")  # and those that tie with it
    wins = (num_below.sum() + num_not_above.sum()) / 2
    return float(wins / (len(positives) * len(negatives)))


def unigram_entropy(rows, electra_config):
    """The MLM loss, in nats, of a generator that knows only how frequent each token of `rows` is."""
    ids = torch.from_numpy(rows)
    is_selectable = model.selectable(ids, electra_config)
    frequencies = np.bincount(ids[is_selectable].numpy())
    return entropy(frequencies / frequencies.sum())


def entropy(probabilities):
    """In nats."""
    probabilities = probabilities[probabilities > 0]
    return float(-(probabilities * np.log(probabilities)).sum())


def describe_metrics(metrics):
    """The main metrics, each beside its value for a network that knows only frequencies."""
    text = f"MLM loss {metrics['mlm_loss']:.3f}"
    if "auc" in metrics:
        text += f", discriminator loss {metrics['disc_loss']:.3f} (guessing: {metrics[BASE_RATE_LOSS]:.3f})"
        text += f", AUC {metrics['auc']:.3f} (guessing: 0.5)"
    return text


# ------------------------------------------------------------------------------------------------------------
# A look at what it has learned

SHOWN_ROWS = 5
SHOWN_TOKENS = 40
MIN_SHOWN_TOKENS = 16
LEGEND = """
Held-out sentences, as the networks see them.
  [word =]        predicted (85 % of them were masked); the generator put the same word back
  [word→other]    predicted; the generator put another word"""
DISCRIMINATOR_LEGEND = """\
             ✓    ... and the discriminator flagged it
             ✗    ... and the discriminator did not flag it
  [word !]        flagged, but not replaced
If N tokens were replaced, the N with the highest scores are flagged."""


def report(run):
    """Show held-out sentences. With --eval-only, evaluate the run before that."""
    heldout = read_together(run.shards.heldout, HELDOUT_ROWS)
    if not len(heldout):
        print("no text is held out, so there is nothing to show")
        return
    if run.config.eval_only:
        evaluate(run, run.first_step, heldout)
    wordpiece = run.shards.wordpiece
    outputs, input_ids = run_without_dropout(run, choose_readable(heldout, wordpiece))
    print_sentences(outputs, input_ids.cpu(), wordpiece)


def choose_readable(rows, wordpiece):
    """The rows with the largest share of whole words, (SHOWN_ROWS, L)."""

    def share_of_words(row):
        tokens = [wordpiece.tokens[number] for number in row[:SHOWN_TOKENS] if number]
        if len(tokens) < MIN_SHOWN_TOKENS:
            return 0.0
        return sum(token.isalpha() for token in tokens) / len(tokens)

    most_readable = sorted(rows, key=share_of_words, reverse=True)
    return np.array(most_readable[:SHOWN_ROWS])


def print_sentences(outputs, input_ids, wordpiece):
    """Print rows: what was predicted, what the generator put there, and what the discriminator flagged."""
    print(LEGEND)
    corrupted_ids = concatenate(outputs, "corrupted_ids")
    is_replaced = concatenate(outputs, "is_replaced")
    is_predicted = torch.zeros_like(is_replaced).scatter(
        1, concatenate(outputs, "positions"), concatenate(outputs, "is_used"))
    is_flagged = torch.zeros_like(is_replaced)
    has_discriminator = outputs[0].disc_logits is not None
    if has_discriminator:
        print(DISCRIMINATOR_LEGEND)
        logits = concatenate(outputs, "disc_logits").masked_fill(input_ids == 0, -math.inf)
        num_replaced = int(is_replaced.sum())
        is_flagged.view(-1)[logits.flatten().topk(num_replaced).indices] = True
    for row, ids in enumerate(input_ids):
        words = []
        for place, original in enumerate(ids[ids != 0][:SHOWN_TOKENS]):
            word = wordpiece.tokens[original]
            if is_replaced[row, place]:
                word = f"{word}→{wordpiece.tokens[corrupted_ids[row, place]]}"
                if has_discriminator:
                    word += " ✓" if is_flagged[row, place] else " ✗"
                word = f"[{word}]"
            elif is_flagged[row, place]:
                word = f"[{word} !]"
            elif is_predicted[row, place]:
                word = f"[{word} =]"
            if word.startswith("##") and words and not words[-1].endswith("]"):
                words[-1] += word[2:]  # "un" and "##related" are joined, "[un =]" and "##related" are not
            else:
                words.append(word)
        print("\n" + " ".join(words))


# ------------------------------------------------------------------------------------------------------------
# Flags

# On a CPU, torch 2.6 compiled wrong gradients of embeddings, and 2.11 right ones. On a GPU, --compile is the
# default from that version on. (torch.__version__ compares as a version: "2.6" < "2.11".)
COMPILES_SINCE = "2.11"


def configure(argv):
    """The three configs of a command line, with automatic values resolved, and the names of flags typed.

    It also sets up torch for them.
    """
    description = "Pre-train ELECTRA. After a stop or a kill the same command resumes."
    (config, data_config, electra_config), typed_flags = parse(
        argv, description, (TrainConfig, data.DataConfig, model.ElectraConfig), SIZES)
    refuse_output_in_text(config, data_config)
    config = set_up_device(config)
    if config.size == "tiny" and config.device == "cpu" and "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(1)  # a second gains little, and loses much on a busy machine (LOG.md)
    if config.micro_batch_size == 0:
        config = replace(config, micro_batch_size=config.batch_size // WORLD_SIZE)
    if config.compile is None:
        config = replace(config, compile=compiles_by_default(config))
    if config.compile and config.device == "cpu" and torch.__version__ < COMPILES_SINCE:
        raise data.UserError(f"torch {torch.__version__} may compile wrong gradients of embeddings on a CPU; "
                             f"leave out --compile, or use torch {COMPILES_SINCE} or later")
    return config, data_config, electra_config, typed_flags


def refuse_output_in_text(config, data_config):
    """Refuse --out or --cache in a folder of --data, where their files would be read as text."""
    for source in data_config.data:
        for folder in config.out, data_config.cache:
            if os.path.isdir(source) and Path(folder).resolve().is_relative_to(Path(source).resolve()):
                raise data.UserError(f"{folder} is in {source}, so that its files would be read as text; use "
                                     "--data FOLDER with nothing but text, or another --out and --cache")


def compiles_by_default(config):
    """True on a GPU with a new enough torch, not with --deterministic: compiling again may change bits."""
    is_gpu = config.device.startswith("cuda")
    return is_gpu and not config.deterministic and torch.__version__ >= COMPILES_SINCE


def parse(argv, description, config_classes, sizes):
    """A config of each class from the command line, and the names of the fields whose flags were typed.

    A field is a flag if its type is annotated with a help. ElectraConfig has fields with a range only, where
    the help is "". A flag that was not typed has its value in the size's row of `sizes`, or else its default.
    """
    if not 0 <= LOCAL_RANK <= RANK < WORLD_SIZE:
        raise torchrun_error()
    parser = argparse.ArgumentParser(description=description, usage="%(prog)s [--FLAG VALUE ...]",
                                     allow_abbrev=False, argument_default=argparse.SUPPRESS,
                                     exit_on_error=False)
    for config_class in config_classes:
        heading = config_class.__doc__.partition(".")[0]  # the first sentence
        group = parser.add_argument_group(heading)
        for field in fields(config_class):
            if get_origin(field.type) is Annotated and get_args(field.type)[1]:
                add_flag(group, field, sizes)
    try:
        arguments, unknown = parser.parse_known_args(argv)
    except argparse.ArgumentError as error:
        raise data.UserError(f"{error}; --help lists the flags") from None
    if unknown:
        raise data.UserError(f"there is no {' '.join(unknown)}; --help lists the flags")
    typed = vars(arguments)
    size = typed.get("size", TrainConfig.size)
    row = sizes.get(size, {})  # TrainConfig refuses an unknown size
    configs = [make_config(config_class, row | typed) for config_class in config_classes]
    return configs, typed.keys()


def make_config(config_class, values):
    """A config with those of the values that are its fields, checked for numbers out of range."""
    names = {field.name for field in fields(config_class)}
    config = config_class(**{name: value for name, value in values.items() if name in names})
    model.check_ranges(config)
    return config


def add_flag(group, field, sizes):
    """Make a field a flag. Its help ends with its defaults: "peak learning rate (0.0005; tiny: 0.001)"."""
    kind, text, *_ = get_args(field.type)
    defaults = [] if field.default in (None, "", ()) else [format_default(field.default)]
    for size, row in sizes.items():
        if field.name in row:
            defaults.append(f"{size}: {format_default(row[field.name])}")
    if defaults:
        text = f"{text} ({'; '.join(defaults)})"
    options = dict(help=text.replace("%", "%%"))
    if kind is bool:
        options["action"] = argparse.BooleanOptionalAction  # adds --no-FLAG
    elif kind is list:
        options["nargs"] = "+"
    else:
        options["type"] = kind
    group.add_argument(f"--{field.name.replace('_', '-')}", **options)


def format_default(default):
    """A default as --help shows it."""
    if isinstance(default, bool):
        return "on" if default else "off"
    if isinstance(default, list | tuple):
        return " ".join(default)
    return str(default)


def set_up_device(config):
    """Replace "auto" by what this machine has, refuse what it lacks, and set up the GPU."""
    device = find_device(config.device)
    dtype = find_dtype(config.dtype, device)
    is_gpu = device.startswith("cuda")
    if is_gpu:
        torch.cuda.set_device(device)
        torch.set_float32_matmul_precision("high")  # TF32 for what stays fp32
    if is_gpu and config.deterministic:
        compute_deterministically()
    graph = config.graph and is_gpu
    if graph and (dtype == "fp16" or WORLD_SIZE > 1):
        print("no CUDA graphs: they are for bf16 and fp32 in one process", file=sys.stderr)
        graph = False
    return replace(config, device=device, dtype=dtype, graph=graph)


def find_device(name):
    """A device of this machine. auto is a GPU if there is one, and cuda is the GPU of this rank."""
    gpus = [f"cuda:{number}" for number in range(torch.cuda.device_count())]
    found = [*gpus, "cpu"]
    if torch.backends.mps.is_available():
        found.append("mps")
    if name == "auto":
        name = "cuda" if gpus else "cpu"
    if name == "cuda":
        name = f"cuda:{LOCAL_RANK}"
    if name not in found:
        raise data.UserError(f"there is no device {name} here; there are {', '.join(found)}")
    return name


def find_dtype(name, device):
    """A dtype in which a device computes. auto is the best."""
    if device.startswith("cuda"):
        has_bf16 = torch.cuda.get_device_capability(device) >= (8, 0)  # older GPUs only emulate it
        dtypes = ["bf16", "fp16", "fp32"] if has_bf16 else ["fp16", "fp32"]
    elif device == "cpu":
        dtypes = ["fp32", "bf16", "fp16"]
    else:
        dtypes = ["fp32"]
    if name == "auto":
        return dtypes[0]
    if name not in dtypes:
        raise data.UserError(f"{device} does not compute in {name}; --dtype takes {', '.join(dtypes)}")
    return name


def compute_deterministically():
    """Have torch choose kernels that give the same bits each time."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS's condition
    torch.use_deterministic_algorithms(True, warn_only=True)
    # torch warns about every cumsum. `model.sample` adds up along rows, always in the same order.
    warnings.filterwarnings("ignore", message="cumsum")
    # The backward passes of these two add up in any order.
    torch.backends.cuda.enable_cudnn_sdp(False)
    torch.backends.cuda.enable_mem_efficient_sdp(False)


# ------------------------------------------------------------------------------------------------------------
# What a run is made from: a vocabulary, and the weights that --init names

# Fields of ElectraConfig that weights prescribe.
SHAPE = ("embedding_size", "hidden_size", "num_hidden_layers", "num_attention_heads",
         "intermediate_size", "max_position_embeddings", "type_vocab_size", "layer_norm_eps")


class Origin(NamedTuple):
    """What a run is made from. Its checkpoint has a copy, since the folders and files may change or go."""

    init: list  # --init, as it was typed
    vocab: str  # --vocab, as it was typed
    tokens: list  # the vocabulary, in the order of the ids
    shape: dict  # fields of ElectraConfig that the weights of --init prescribe
    rules: dict  # fields of DataConfig that they prescribe: those for case and accents


def read_origin(config, data_config, electra_config, record=None):
    """The Origin of these flags. The copy in a checkpoint's `record` is taken if it has the same flags.

    A vocabulary file is always read anew, since it may have changed: `Run.check_settings` compares it.
    """
    if record is not None and not Path(data_config.vocab).is_file():
        saved = Origin(**record["inputs"])
        if saved.init == list(config.init) and saved.vocab == data_config.vocab:
            return saved
    if not config.init:
        tokens = data.load_wordpiece(data_config).tokens
        return Origin([], data_config.vocab, tokens, shape={}, rules={})
    folders = list(find_init_folders(config, data_config, electra_config).values())
    wordpieces = [data.read_tokenizer(folder)[0] for folder in folders]
    tokenizations = {(each.sha256, each.do_lower_case, each.strip_accents) for each in wordpieces}
    if len(tokenizations) > 1:
        raise data.UserError(f"{folders[0]} and {folders[1]} have different vocabularies, or rules for case")
    configs = [model.load_config(folder) for folder in folders]
    shape = {name: getattr(configs[0], name) for name in SHAPE}
    if len(folders) == 2:
        shape["generator_size"] = configs[1].hidden_size / configs[0].hidden_size
    wordpiece = wordpieces[0]
    rules = dict(do_lower_case=wordpiece.do_lower_case, strip_accents=wordpiece.strip_accents)
    return Origin(list(config.init), data_config.vocab, wordpiece.tokens, shape, rules)


def find_init_folders(config, data_config, electra_config):
    """The folders of --init, if it was given, by the networks that start from them."""
    if not config.init:
        return {}
    first, *more = config.init
    if electra_config.objective == "mlm":
        if more:
            raise data.UserError("--objective mlm has no discriminator; --init takes one folder")
        names = {"generator": first}
    else:
        names = {"discriminator": first}
        if more:
            names["generator"] = more[0]
        elif Path(first, "generator").is_dir():  # a run, which has both networks
            names["generator"] = first
    folders = {}
    for network, name in names.items():
        folders[network] = data.find_model(name, data_config.cache, network).resolve()
        if config.run_path.resolve() in folders[network].parents:
            raise data.UserError("--init names the run that would be overwritten; use another --out")
    return folders


def apply_origin(origin, data_config, electra_config, typed_flags):
    """The DataConfig, the ElectraConfig and the WordPiece of a run with this Origin."""
    prescribed = {"vocab", *origin.shape, *origin.rules}
    conflicts = sorted(typed_flags & prescribed)
    if origin.init and conflicts:
        raise data.UserError(f"--init prescribes {', '.join(conflicts)}; leave these flags out")
    data_config = replace(data_config, **origin.rules)
    wordpiece = data.WordPiece.from_config(origin.tokens, data_config)
    electra_config = replace(electra_config, **origin.shape).with_vocabulary(wordpiece)
    positions = electra_config.max_position_embeddings
    if data_config.max_length > positions:
        raise data.UserError(f"max_length {data_config.max_length} is beyond the model's {positions} "
                             "positions; lower it, or raise --max-position-embeddings too")
    return data_config, electra_config, wordpiece


def load_init_weights(electra, init_folders):
    """Fill the networks that have a folder of --init."""
    networks = networks_of(electra)
    if init_folders and len(init_folders) < len(networks):
        print("--init names no generator, so one starts from random weights; until it has learned, its "
              "samples are easy to tell and teach the discriminator little")
    tables = []
    for name in ("generator", "discriminator"):  # both fill the shared embeddings: the last one's stay
        if name in init_folders:
            model.load_weights(networks[name], init_folders[name])
            tables.append(electra.generator.encoder.embeddings.word_embeddings.weight.clone())
    if len(tables) == 2 and not torch.equal(*tables):
        print("the two folders of --init have different embeddings; the discriminator's are used")


# ------------------------------------------------------------------------------------------------------------
# The command


def main(argv=None):
    config, data_config, electra_config, typed_flags = configure(argv)
    if config.prepare_only:
        prepare_only(config, data_config, electra_config, typed_flags)
        return
    start_ranks(config)
    with lock_run(config):
        run = open_run(config, data_config, electra_config, typed_flags)
        # The first rank of each machine prepares the text in a child process.
        preparation = run.shards.prepare_in_child() if LOCAL_RANK == 0 else nullcontext()
        with preparation:
            run.check_text()  # before anything in its folder is changed
            print(run.shards.describe())
            if not config.eval_only:
                was_complete = run.shards.is_complete
                warn_if_warmup_is_long(config)
                run.start()
                train(run)
                if not was_complete:  # now the whole text is known
                    print(run.shards.describe())
            report(run)
    if WORLD_SIZE > 1:
        dist.destroy_process_group()
    if not config.eval_only:
        folders = " and ".join(str(run.path / name) for name in networks_of(run.electra))
        max_length = run.shards.config.max_length
        print(f"\ntransformers can load {folders}; to fine-tune:\n"
              f"python finetune.py --model {run.path} --task mrpc --max-length {max_length}")


def open_run(config, data_config, electra_config, typed_flags):
    """The run in the folder, or a new one, with its weights. A run with other settings is refused.

    Nothing is written. The checkpoint is read first, since it has the vocabulary and the networks' shape.
    """
    state = read_checkpoint(config)
    saved = (state["run"], state["step"]) if state else (None, 0)
    record, first_step = from_all_ranks(saved)[0]  # of rank 0, which alone has read the checkpoint
    origin = read_origin(config, data_config, electra_config, record)
    data_config, electra_config, wordpiece = apply_origin(origin, data_config, electra_config, typed_flags)
    shards = data.GrowingShards(data_config, wordpiece)
    torch.manual_seed(data_config.seed)
    electra = model.Electra(electra_config).train().to(config.device)
    run = Run(config, origin, shards, electra, record, first_step)
    compare_ranks(run)
    if record is None:
        load_init_weights(electra, find_init_folders(config, data_config, electra_config))
    else:
        run.check_settings()
        if RANK == 0:
            run.load(state)
    run.copy_from_rank_0()
    return run


def prepare_only(config, data_config, electra_config, typed_flags):
    """Prepare the text, and print rows of it."""
    origin = read_origin(config, data_config, electra_config)
    data_config, _, wordpiece = apply_origin(origin, data_config, electra_config, typed_flags)
    shards = data.GrowingShards(data_config, wordpiece)
    with shards.prepare_in_child():
        shards.wait_for_shards(math.inf)  # the whole text
    print(shards.describe())
    for row in shards.load("train", 0)[: config.show]:
        print("\n" + wordpiece.decode(row))


# ------------------------------------------------------------------------------------------------------------
# What a command prints, and its exit status


def run_command(main):
    """Run `main` and return the exit status. An error that the user can fix is printed as one line."""
    set_up_output()
    try:
        main()
        sys.stdout.flush()
        return 0
    except (data.UserError, model.ModelError) as error:
        print(error, file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("stopped; the same command resumes", file=sys.stderr)
        return 130
    except OSError as error:
        print_system_error(error)
        return 1
    except RuntimeError as error:
        if "by peer" not in str(error):
            raise
        # torch.distributed: "Connection closed by peer". The other rank prints why it has ended.
        print(f"rank {RANK} stops because another one has", file=sys.stderr)
        return 1


def set_up_output():
    """Let any text be printed, in any locale, even if the streams are closed."""
    sys.stdout = sys.stdout or open(os.devnull, "w")
    sys.stderr = sys.stderr or open(os.devnull, "w")
    for stream in sys.stdout, sys.stderr:
        if isinstance(stream, io.TextIOWrapper):  # a notebook has others
            encoding = stream.encoding if stream.isatty() else "utf-8"
            stream.reconfigure(encoding=encoding, errors="replace")


def print_system_error(error):
    """Print an OSError, for example of a full disk, with its file or the function that it comes from."""
    where = f" in {traceback.extract_tb(error.__traceback__)[-1].name}"
    if error.filename:
        where = ""  # it is in the error's own text
    try:
        sys.stdout.flush()
    except OSError:
        where = " in standard output"
        # What is left of the output is discarded: Python would flush it at exit, and print the error again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    if not isinstance(error, BrokenPipeError):  # `| head` has read enough
        print(f"{error}{where}; fix that, and the same command resumes", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(run_command(main))
