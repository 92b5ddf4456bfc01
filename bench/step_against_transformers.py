"""How fast is a pre-training step, compared with one made of transformers' modules?

    python bench/step_against_transformers.py [--size small] [--batch-size 32] [--dtype bf16] [--threads 2]
        [--rounds 5]

The two take turns in one process, read the same random rows, apply the same masks, and end with clipping and
the fused AdamW. The other one is built as replications of ELECTRA build it: ElectraForMaskedLM and
ElectraForPreTraining with one embedding object and sdpa attention, logits at every position, Gumbel noise at
the masked ones, each loss computed once.

Prints medians: tokens per second, their ratio, peak memory, the share of the machine's rate of multiplying
matrices, and where the time of our step goes. Figures: LOG.md.
"""

import argparse
import importlib.util
import json
import statistics
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path

import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import data
import model
import train

# Kinds of work by what the profiler calls an operation. The first that matches counts.
KINDS = {
    "matrix products": ("mm", "linear", "baddbmm", "gemm", "cutlass", "cublas"),
    "attention": ("attention", "flash", "fmha"),
    "dropout and random bits": ("dropout", "bernoulli", "random", "rand"),
    "softmax, loss and sampling": ("softmax", "nll", "cross_entropy", "cumsum", "searchsorted", "argmax"),
    "GELU and LayerNorm": ("gelu", "layer_norm"),
    "optimizer and clipping": ("adam", "norm", "foreach"),
    "copies and casts": ("copy", "cat", "clone", "gather", "scatter", "index", "embedding"),
}


def parse(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--size", default="small", choices=train.SIZES)
    parser.add_argument("--batch-size", type=int, default=0, help="0 is the recipe's on CUDA, 32 on a CPU")
    parser.add_argument("--dtype", default="auto", help="fp32, bf16 or fp16")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=5, help="timed steps of each")
    parser.add_argument("--json", help="file for the figures")
    parser.add_argument("--only", choices=["ours", "transformers"], help="one of the two; prints JSON")
    return parser.parse_args(argv)


def make_rows(config, batch_size, length):
    """Rows of random words, full, in two segments."""
    rows = torch.randint(1000, config.vocab_size, (batch_size, length))
    rows[:, 0] = config.cls_token_id
    rows[:, [length // 2, -1]] = config.sep_token_id
    return rows


class TransformersElectra(torch.nn.Module):
    """The objective, made of transformers' modules."""

    def __init__(self, config):
        super().__init__()
        import transformers

        def make(kind, shape):
            fields = {name: value for name, value in asdict(shape).items() if not name.endswith("token_id")}
            return kind(transformers.ElectraConfig(**fields, attn_implementation="sdpa"))

        self.config = config
        self.generator = make(transformers.ElectraForMaskedLM, config.generator_config())
        self.discriminator = make(transformers.ElectraForPreTraining, config)
        self.discriminator.electra.embeddings = self.generator.electra.embeddings
        self.generator.tie_weights()

    def forward(self, input_ids, uniforms):
        L = input_ids.shape[1]
        K = self.config.num_slots(L)
        priorities, mask_uniforms, _ = uniforms.split([L, K, K], dim=1)
        attention_mask, types = model.attention_mask_and_token_types(input_ids, self.config.sep_token_id)
        positions, is_used, tokens, masked_ids = model.mask_tokens(
            input_ids, priorities, mask_uniforms, self.config)
        is_masked = torch.zeros_like(attention_mask).scatter(1, positions, is_used)
        logits = self.generator(masked_ids, attention_mask, types).logits  # (B, L, V)
        labels = input_ids.masked_fill(~is_masked, -100)
        mlm_loss = F.cross_entropy(logits.flatten(0, 1).float(), labels.flatten())
        with torch.no_grad():
            chosen = logits.gather(1, positions[..., None].expand(-1, -1, logits.shape[-1])).float()
            gumbel = -torch.log(-torch.log(torch.rand_like(chosen).clamp(1e-9, 1 - 1e-7)))
            sampled = (chosen + gumbel).argmax(-1)
        corrupted = model.corrupt(input_ids, positions, is_used, tokens, sampled)
        disc_logits = self.discriminator(corrupted, attention_mask, types).logits.float()
        losses = F.binary_cross_entropy_with_logits(
            disc_logits, (corrupted != input_ids).float(), reduction="none")
        return mlm_loss + 50.0 * (losses * attention_mask).sum() / attention_mask.sum()


def make_step(kind, config, recipe, rows):
    """A function that takes one optimizer step, by the number of the step."""
    torch.manual_seed(0)
    network = model.Electra(config) if kind == "ours" else TransformersElectra(config)
    network = network.to(recipe.device).train()
    if kind == "ours":
        optimizer = train.build_optimizer(network.named_parameters(), recipe)
    else:
        optimizer = torch.optim.AdamW(network.parameters(), lr=5e-4, eps=1e-6, weight_decay=0.01, fused=True)
    scaler = torch.amp.GradScaler(torch.device(recipe.device).type, enabled=recipe.dtype == "fp16")
    width = rows.shape[1] + 2 * config.num_slots(rows.shape[1])

    def step(number):
        uniforms = data.rng(0, "train", number).random((len(rows), width), dtype="float32")
        uniforms = torch.from_numpy(uniforms).to(recipe.device)
        with train.autocast(recipe):
            output = network(rows, uniforms)
        scaler.scale(output.loss if kind == "ours" else output).backward()
        scaler.unscale_(optimizer)
        torch.nn.utils.clip_grad_norm_(network.parameters(), recipe.max_grad_norm)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad(set_to_none=True)

    return step


def synchronize(device):
    if device.startswith("cuda"):
        torch.cuda.synchronize()


def time_of(call, device):
    synchronize(device)
    began = time.perf_counter()
    call()
    synchronize(device)
    return time.perf_counter() - began


def matmul_rate(recipe):
    """FLOP/s of a large product of matrices in the step's precision."""
    dtype = dict(fp32=torch.float32, bf16=torch.bfloat16, fp16=torch.float16)[recipe.dtype]
    size = 8192 if recipe.device.startswith("cuda") else 1536
    left, right = (torch.randn(size, size, device=recipe.device, dtype=dtype) for _ in range(2))
    times = [time_of(lambda: left @ right, recipe.device) for _ in range(7)]
    return 2 * size**3 / statistics.median(times[2:])


def flops_per_token(config, length):
    """Multiplications and additions of matrix products in a step, for each position, counted by torch."""
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        rows = torch.zeros(1, length, dtype=torch.long)
        uniforms = torch.zeros(1, length + 2 * config.num_slots(length))
        model.Electra(config)(rows, uniforms, torch.ones(2)).loss.backward()
    return counter.get_total_flops() / length


def kind_of(operation):
    """The kind of work of an operation of the profiler."""
    for kind, names in KINDS.items():
        if any(name in operation for name in names):
            return kind
    return "the rest"


def where_time_goes(step, device):
    """The share of each kind of work in the time of one step."""
    from torch.profiler import ProfilerActivity, profile

    is_cuda = device.startswith("cuda")
    activities = [ProfilerActivity.CPU]
    if is_cuda:
        activities.append(ProfilerActivity.CUDA)
    with profile(activities=activities) as profiler:
        step(10_000)
        synchronize(device)
    shares = dict.fromkeys([*KINDS, "the rest"], 0.0)
    for event in profiler.key_averages():
        kind = kind_of(event.key.lower())
        shares[kind] += event.self_device_time_total if is_cuda else event.self_cpu_time_total
    total = sum(shares.values())
    return {kind: spent / total for kind, spent in shares.items()}


def peak_memory(options, kind):
    """Bytes. On a CPU those of a process that does nothing else."""
    command = [sys.executable, __file__, "--only", kind, "--size", options.size, "--dtype", options.dtype,
               "--device", options.device, "--threads", str(options.threads), "--rounds", "1",
               "--batch-size", str(options.batch_size)]
    return json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)["peak_memory"]


def resident_memory():
    """The largest resident set of this process, in bytes. (getrusage includes its parent's.)"""
    [line] = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM")]
    return 1024 * int(line.split()[1])


def measure(options):
    """The figures of a comparison, as a dictionary."""
    torch.set_num_threads(options.threads)
    recipe = train.set_up_device(train.TrainConfig(device=options.device, dtype=options.dtype))
    is_cuda = recipe.device.startswith("cuda")
    recipe_row = train.SIZES[options.size]
    config = train.make_config(model.ElectraConfig, recipe_row)
    length = recipe_row.get("max_length", data.DataConfig.max_length)
    batch_size = options.batch_size or (recipe_row.get("batch_size", 128) if is_cuda else 32)
    rows = make_rows(config, batch_size, length).to(recipe.device)
    kinds = [options.only] if options.only else ["ours", "transformers"]
    if not options.only and importlib.util.find_spec("transformers") is None:
        print("transformers is not installed: there is nothing to compare with")
        kinds = ["ours"]
    steps = {kind: make_step(kind, config, recipe, rows) for kind in kinds}
    times = {kind: [] for kind in kinds}
    for number in range(2 + options.rounds):
        for kind in kinds:
            if is_cuda:
                torch.cuda.reset_peak_memory_stats()
            seconds = time_of(lambda kind=kind, number=number: steps[kind](number), recipe.device)
            if number >= 2:  # the first two are for warming up and compiling
                times[kind].append(seconds)
    device_name = torch.cuda.get_device_name() if is_cuda else f"{options.threads} CPU threads"
    figures = dict(device=device_name, dtype=recipe.dtype, size=options.size, batch_size=batch_size,
                   length=length, torch=str(torch.__version__))
    for kind in kinds:
        figures[kind] = batch_size * length / statistics.median(times[kind])
    if options.only:
        memory = torch.cuda.max_memory_allocated() if is_cuda else resident_memory()
        return figures | dict(peak_memory=memory)
    if len(kinds) == 2:
        figures["ratio"] = figures["ours"] / figures["transformers"]
    flop_per_token = flops_per_token(config, length)
    peak = matmul_rate(recipe)
    return figures | dict(
        flop_per_token=flop_per_token, matmul_rate=peak, utilization=figures["ours"] * flop_per_token / peak,
        shares=where_time_goes(steps["ours"], recipe.device),
        memory={kind: peak_memory(options, kind) for kind in kinds})


def main():
    options = parse()
    figures = measure(options)
    if options.only:
        print(json.dumps(figures))
        return
    print("{device}, {dtype}, {size}, {batch_size} x {length}, torch {torch}".format(**figures))
    if options.json:
        Path(options.json).write_text(json.dumps(figures, indent=1) + "\n")
    for kind in figures["memory"]:
        memory = figures["memory"][kind] / 2**20
        print(f"{kind:13} {figures[kind]:10,.0f} tokens/s, {memory:,.0f} MiB at the peak")
    ratio = f"ratio {figures['ratio']:.2f}; " if "ratio" in figures else ""
    print(f"{ratio}{figures['flop_per_token'] / 1e6:.0f} MFLOP per token, "
          f"{figures['utilization']:.0%} of the rate of a large matrix product "
          f"({figures['matmul_rate'] / 1e9:,.0f} GFLOP/s)")
    for kind, share in sorted(figures["shares"].items(), key=lambda item: -item[1]):
        print(f"{share:6.1%}  {kind}")


if __name__ == "__main__":
    main()
