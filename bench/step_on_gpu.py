"""How fast is a pre-training step on a GPU: plain, compiled, as a CUDA graph, and in transformers?

    python bench/step_on_gpu.py [--size small] [--only "eager;eager, graph"] [--glue-dir GLUE] [--json FILE]

Prints tokens/s, time on the host, memory and kernels of each variant. One process runs them all in a few
minutes, most of them for compiling. Each step reads the recipe's batch, draws random numbers, sets rates and
the seed, and ends with clipping and AdamW. With GLUE, a folder laid out as the official zips are, MRPC is
fine-tuned for an epoch, twice: the first time includes captures. `--device cpu --batch-size 4` is a trial,
without graphs. Figures: LOG.md and bench/results/h100/steps.json.
"""

import argparse
import gc
import json
import statistics
import sys
import time
from dataclasses import replace
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import finetuning_overhead
import step_against_transformers

import data
import finetune
import model
import train

# compile is the mode of torch.compile; None is none. The last one changes torch's settings for good.
VARIANTS = {
    "transformers": dict(kind="transformers"),
    "eager": dict(graph=False),
    "compiled": dict(graph=False, compile="default"),
    "compiled, reduce-overhead": dict(graph=False, compile="reduce-overhead"),
    "eager, graph": dict(graph=True),
    "compiled, graph": dict(graph=True, compile="default"),
    "eager, graph, deterministic": dict(graph=True, deterministic=True),
}


def parse(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--size", default="small", choices=train.SIZES)
    parser.add_argument("--only", help="these variants, separated by ';'")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--batch-size", type=int, default=0, help="0 is the recipe's")
    parser.add_argument("--micro-batch-size", type=int, default=0, help="0 is the batch, for base 64")
    parser.add_argument("--steps", type=int, default=40, help="steps in each of three timings")
    parser.add_argument("--glue-dir", help="also fine-tune MRPC")
    parser.add_argument("--json", help="file for the figures")
    return parser.parse_args(argv)


def make_recipe(options):
    """The TrainConfig, ElectraConfig and max_length of a size on this device."""
    row = train.SIZES[options.size]
    shape = train.make_config(model.ElectraConfig, row)
    config = train.set_up_device(train.TrainConfig(
        size=options.size, device=options.device, dtype=options.dtype,
        batch_size=options.batch_size or row.get("batch_size", 128)))
    micro = options.micro_batch_size or (64 if options.size == "base" else config.batch_size)
    config = replace(config, micro_batch_size=min(micro, config.batch_size))
    return config, shape, row.get("max_length", data.DataConfig.max_length)


def make_step(config, shape, length, kind="ours", graph=False, compile=None, deterministic=False):
    """A function of the step's number that does what train.train does in a step that is not logged."""
    if deterministic:
        train.compute_deterministically()
    rows = step_against_transformers.make_rows(shape, config.batch_size, length)
    torch.manual_seed(0)
    if kind == "ours":
        network = model.Electra(shape)
    else:
        network = step_against_transformers.TransformersElectra(shape)
    network = network.to(config.device).train()
    optimizer = train.build_optimizer(network.named_parameters(), config)
    config = replace(config, graph=graph, compile=False)
    if compile:
        network.forward = torch.compile(network.forward, fullgraph=True,
                                        mode=None if compile == "default" else compile)
    if kind == "ours":
        step = train.make_step(config, network, optimizer, torch.amp.GradScaler(enabled=False))
    else:
        step = plain_step(network, optimizer, config)
    rows = rows.numpy()

    def take(number):
        input_ids = train.to_device(rows, config.device)
        uniforms = train.draw_uniforms(0, "train", number, rows, shape)
        uniforms = train.to_device(uniforms, config.device)
        for group in optimizer.param_groups:
            group["lr"].fill_(1e-4 * group["lr_scale"])
        torch.manual_seed(number)
        if compile == "reduce-overhead":
            torch.compiler.cudagraph_mark_step_begin()
        return step(input_ids, uniforms)

    return take


def plain_step(network, optimizer, config):
    """A step of the modules of transformers."""
    def step(input_ids, uniforms):
        optimizer.zero_grad(set_to_none=True)
        for ids, draws in train.micro_batches(input_ids, uniforms, config.micro_batch_size):
            with train.autocast(config):
                loss = network(ids, draws)
            (loss * len(ids) / len(input_ids)).backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), config.max_grad_norm)
        optimizer.step()

    return step


def warm_up(step, device):
    """Take the first steps, which compile and capture, and return their seconds."""
    began = time.perf_counter()
    for number in range(train.WARM_UP_CALLS + 3):
        step(number)
    step_against_transformers.synchronize(device)
    return time.perf_counter() - began


def measure(step, device, num_steps):
    """Seconds of a step, and of those on the host: medians of three timings."""
    whole = []
    host = []
    for timing in range(3):
        began = time.perf_counter()
        for number in range(num_steps):
            step(100 + timing * num_steps + number)
        host.append((time.perf_counter() - began) / num_steps)
        step_against_transformers.synchronize(device)
        whole.append((time.perf_counter() - began) / num_steps)
    return statistics.median(whole), statistics.median(host)


def kernels(step, device):
    """[name, milliseconds, calls] of the kernels of a step, the longest first. A graph's are listed, too."""
    is_cuda = device.startswith("cuda")
    with profile(activities=[ProfilerActivity.CUDA if is_cuda else ProfilerActivity.CPU]) as profiler:
        for number in range(3):
            step(10_000 + number)
        step_against_transformers.synchronize(device)
    spent = {}
    for event in profiler.key_averages():
        total = event.self_device_time_total if is_cuda else event.self_cpu_time_total
        if total:
            spent[event.key] = [event.key[:120], total / 3e3, event.count / 3]
    return sorted(spent.values(), key=lambda entry: -entry[1])


def measure_variant(options, name):
    config, shape, length = make_recipe(options)
    if config.device.startswith("cuda"):
        torch.cuda.reset_peak_memory_stats()
    step = make_step(config, shape, length, **VARIANTS[name])
    first = warm_up(step, config.device)
    seconds, host = measure(step, config.device, options.steps)
    rate = config.batch_size * length / seconds
    flops = rate * step_against_transformers.flops_per_token(shape, length)  # a second
    figures = dict(ms=1e3 * seconds, host_ms=1e3 * host, steps_per_second=1 / seconds, tokens_per_second=rate,
                   first_seconds=first, share=flops / options.rate)
    if config.device.startswith("cuda"):
        figures["peak_GiB"] = torch.cuda.max_memory_allocated() / 2**30
    listed = kernels(step, config.device)
    figures["kernel_ms"] = sum(entry[1] for entry in listed)
    figures["kernels"] = listed[:40]
    return figures


def mrpc_epochs(options):
    """Seconds of an epoch of MRPC, pairs in one order: with captures, and after them."""
    finetuner = finetuning_overhead.make_finetuner(
        options.glue_dir, options.size, device=options.device, dtype=options.dtype)
    seconds = []
    for seed in range(2):
        began = time.perf_counter()
        finetuner.run(seed)
        step_against_transformers.synchronize(finetuner.config.device)
        seconds.append(time.perf_counter() - began)
    steps = finetune.num_steps(len(finetuner.splits["train"].rows), finetuner.config.batch_size, 1)
    return dict(steps=steps, first=seconds[0], second=seconds[1])


def main():
    options = parse()
    config, _, length = make_recipe(options)
    options.rate = step_against_transformers.matmul_rate(config)
    is_cuda = config.device.startswith("cuda")
    names = options.only.split(";") if options.only else list(VARIANTS)
    if not is_cuda:
        names = [name for name in names if "graph" not in name and "reduce" not in name]
    device = torch.cuda.get_device_name() if is_cuda else f"{torch.get_num_threads()} CPU threads"
    figures = dict(device=device, dtype=config.dtype, torch=str(torch.__version__), size=options.size,
                   batch_size=config.batch_size, micro_batch_size=config.micro_batch_size, length=length,
                   matmul_rate=options.rate, variants={})
    print(f"{device}, {config.dtype}, torch {torch.__version__}, {options.size}, "
          f"{config.batch_size} x {length} in micro-batches of {config.micro_batch_size}; "
          f"a large matrix product: {options.rate / 1e12:.1f} TFLOP/s")
    print("| variant | ms | on the host | kernels | steps/s | tokens/s | of the matrix rate | GiB | first |")
    print("|---|---|---|---|---|---|---|---|---|", flush=True)
    for name in names:
        torch.compiler.reset()
        gc.collect()
        try:
            row = measure_variant(options, name)
        except RuntimeError as error:  # one variant must not cost the others
            print(f"| {name} | failed: {type(error).__name__}: {str(error)[:300]} |", flush=True)
            continue
        figures["variants"][name] = row
        print(f"| {name} | {row['ms']:.2f} | {row['host_ms']:.2f} | {row['kernel_ms']:.2f} "
              f"| {row['steps_per_second']:.1f} | {row['tokens_per_second']:,.0f} | {row['share']:.1%} "
              f"| {row.get('peak_GiB', 0):.2f} | {row['first_seconds']:.1f} s |", flush=True)
        if options.json:
            Path(options.json).write_text(json.dumps(figures, indent=1) + "\n")
    if options.glue_dir:
        epochs = mrpc_epochs(options)
        figures["mrpc"] = epochs
        print("MRPC, {steps} steps: {first:.2f} s with captures, {second:.2f} s after".format(**epochs))
    if options.json:
        Path(options.json).write_text(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    main()
