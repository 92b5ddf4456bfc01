"""Does ELECTRA learn more than masked language modelling from equal compute, on a CPU?

    python bench/study.py STAGE [--data TEXT] [--glue GLUE] [--jobs 2]

TEXT is text in OpenWebText's nesting, one document per file. GLUE is a folder laid out as the official zips
are. A stage starts one process per job, with one thread each, and resumes where it was stopped. Its figures
are in bench/results/STAGE.json, README.md and LOG.md. The stages, in order:

exercises  tiny with one line changed, three seeds each
pilots     both arms of the claim with three learning rates each
main       both arms with their best learning rate and the whole budget
sizes      generators of a quarter, half and all of the discriminator's width
glue       fine-tuning of both arms and of random weights
report     prints the tables of these figures, and draws their curves; needs nothing but bench/results

The arms are replaced-token detection and masked language modelling with a network of the discriminator's
size, at equal training FLOPs: those of all matrix products, forward and backward, as torch counts them.
"""

import argparse
import json
import os
import shlex
import shutil
import statistics
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import plot
import step_against_transformers

import model
from glue import TASKS

HERE = Path(__file__).resolve().parent
COMMIT = subprocess.run(["git", "describe", "--always", "--dirty", "--exclude", "*"], cwd=HERE,
                        capture_output=True, text=True).stdout.strip()
OUT = Path("out/study")
RESULTS = HERE / "results"
FILES = ("model.py", "data.py", "train.py", "glue.py", "finetune.py")
# What README's exercises change: flags, or one line of a file.
EXERCISES = {
    "unchanged": "",
    "argmax": ("model.py", "sampled = sample(log_probs.detach(), sample_uniforms)",
               "sampled = log_probs.argmax(-1)"),
    "untied": ("model.py", "Discriminator(config, embeddings) if", "Discriminator(config) if"),
    "half masked": "--mask-prob 0.5",
    "MLM only": "--objective mlm",
}
SEEDS = 3
# The network of the claim. LOG.md has what else was tried.
SHAPE = dict(embedding_size=128, hidden_size=128, num_hidden_layers=2, num_attention_heads=2,
             intermediate_size=512, max_position_embeddings=64, hidden_dropout_prob=0.0,
             attention_probs_dropout_prob=0.0, initializer_range=0.07)
GENERATOR_SIZE = 0.5  # the generator's share of the width; "mlm" has one of the full width
VOCAB = 4096
LENGTH = 64
BATCH = 16
LEARNING_RATES = (5e-4, 1e-3, 2e-3)
ARMS = ("electra", "mlm")
NAMES = {"random": "no pre-training", "mlm": "MLM", "electra": "ELECTRA"}
METRICS = ("mlm_loss", "unigram_entropy", "disc_loss", "all_original", "auc")  # in the tables
PILOT_FLOPS = 9e13  # 20 minutes
MAIN_FLOPS = 4.5e14  # 100 minutes
FINE_TUNED = {"cola": 5, "mrpc": 5, "stsb": 5, "sst2": 2}  # seeds


def run(command, folder=Path(".")):
    """Run a command with one thread. Returns the seconds that it took."""
    began = time.perf_counter()
    environment = os.environ | {"OMP_NUM_THREADS": "1", "RAYON_NUM_THREADS": "1"}
    subprocess.run([sys.executable, *shlex.split(command)], cwd=folder, env=environment, check=True,
                   stdout=subprocess.DEVNULL)
    return time.perf_counter() - began


def run_all(jobs, commands):
    """Call `run` with each of these tuples of arguments, `jobs` at a time."""
    with ThreadPoolExecutor(jobs) as pool:
        return list(pool.map(lambda command: run(*command), commands))


def read_log(folder, split="heldout"):
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [line for line in lines if line.get("split") == split]


def write(stage, figures):
    RESULTS.mkdir(exist_ok=True)
    text = json.dumps(dict(command=f"python bench/study.py {stage}", commit=COMMIT,
                           date=time.strftime("%Y-%m-%d"), **figures), indent=1)
    (RESULTS / f"{stage}.json").write_text(text + "\n")


def exercises(options):
    """tiny with one change each: held-out metrics of three seeds."""
    commands = []
    folders = {}  # by name and seed
    cache = (OUT / "cache").resolve()
    for name, change in EXERCISES.items():
        copy = (OUT / "exercises" / name.replace(" ", "-")).resolve()
        copy.mkdir(parents=True, exist_ok=True)
        for file in FILES:
            shutil.copy(HERE.parent / file, copy)
        if isinstance(change, tuple):
            file, old, new = change
            text = (copy / file).read_text()
            assert text.count(old) == 1, old
            (copy / file).write_text(text.replace(old, new))
            change = ""
        for seed in range(SEEDS):
            flags = f"--size tiny --seed {seed} --out seed-{seed} --cache '{cache}' {change}"
            commands.append((f"train.py {flags}", copy))
            folders[name, seed] = copy / f"seed-{seed}" / "tiny"
    run(f"{HERE.parent / 'train.py'} --size tiny --prepare-only --cache '{cache}'")  # one vocabulary
    run_all(options.jobs, commands)
    write("exercises", {name: [read_log(folders[name, seed])[-1] for seed in range(SEEDS)]
                        for name in EXERCISES})


def steps_for(flops, arm, generator_size=GENERATOR_SIZE):
    shape = SHAPE | dict(vocab_size=VOCAB, objective=arm, generator_size=generator_size)
    per_token = step_against_transformers.flops_per_token(model.ElectraConfig(**shape), LENGTH)
    return int(flops / (per_token * LENGTH * BATCH))


def folder_of(arm, lr, flops, generator_size=GENERATOR_SIZE):
    """The folder of a run. Stages that need the same run share it."""
    return OUT / f"{flops:.0e}-flops" / f"{arm}-lr-{lr}-generator-{generator_size}" / "small"


def train_command(options, arm, lr, flops, generator_size=GENERATOR_SIZE):
    steps = steps_for(flops, arm, generator_size)
    flags = {**SHAPE, "generator_size": generator_size, "data": options.data, "vocab": f"train:{VOCAB}",
             "max_length": LENGTH, "batch_size": BATCH, "num_train_steps": steps,
             "num_warmup_steps": steps // 20, "learning_rate": lr, "objective": arm, "log_every": 100,
             "eval_every": steps // 20, "cache": OUT / "cache", "dtype": options.dtype,
             "out": folder_of(arm, lr, flops, generator_size).parent}
    words = " ".join(f"--{flag.replace('_', '-')} {value}" for flag, value in flags.items())
    return f"{HERE.parent / 'train.py'} {words} --one-document-per-file"


def claims(options, stage, runs):
    """Train {name: settings of folder_of}, and keep curves, steps and speed."""
    commands = [train_command(options, *settings) for settings in runs.values()]
    run(f"{commands[0]} --prepare-only")  # the vocabulary, and the text, once
    run_all(options.jobs, [(command,) for command in commands])
    figures = {}
    for name, (arm, lr, flops, *size) in runs.items():
        folder = folder_of(arm, lr, flops, *size)
        figures[name] = dict(arm=arm, learning_rate=lr, flops=flops, steps=steps_for(flops, arm, *size),
                             tokens_per_second=read_log(folder, "train")[-1]["tokens_per_second"],
                             curve=read_log(folder))
    write(stage, dict(shape=SHAPE, vocab=VOCAB, length=LENGTH, batch=BATCH, dtype=options.dtype,
                      runs=figures))


def pilots(options):
    claims(options, "pilots", {f"{arm}, {lr}": (arm, lr, PILOT_FLOPS)
                               for lr in LEARNING_RATES for arm in ARMS})


def score(line):
    """Lower is better: the discriminator's loss as a share of the all-original line, or else the MLM loss."""
    return line["disc_loss"] / line["all_original"] if "disc_loss" in line else line["mlm_loss"]


def best_rates():
    """The learning rate of each arm that was best in the pilots, on held-out text."""
    runs = json.loads((RESULTS / "pilots.json").read_text())["runs"].values()
    rates = {}
    for arm in ARMS:
        best = min((one for one in runs if one["arm"] == arm), key=lambda one: score(one["curve"][-1]))
        rates[arm] = best["learning_rate"]
    return rates


def main_runs(options):
    claims(options, "main", {arm: (arm, lr, MAIN_FLOPS) for arm, lr in best_rates().items()})


def sizes(options):
    rate = best_rates()["electra"]
    claims(options, "sizes", {f"generator size {size}": ("electra", rate, PILOT_FLOPS, size)
                              for size in (0.25, 0.5, 1.0)})


def fine_tune(options):
    runs = {arm: folder_of(arm, lr, MAIN_FLOPS) for arm, lr in best_rates().items()}
    models = {"electra": runs["electra"] / "discriminator", "mlm": runs["mlm"] / "generator",
              "random": runs["electra"] / "discriminator"}
    commands = []
    for name, folder in models.items():
        for task, seeds in FINE_TUNED.items():
            flags = (f"--task {task} --seeds {seeds} --model {folder} --max-length {LENGTH} "
                     f"--glue-dir {options.glue} --out {OUT / 'glue' / name} --dtype {options.dtype}")
            if name == "random":
                flags += " --random-weights"
            commands.append((f"{HERE.parent / 'finetune.py'} {flags}",))
    run_all(options.jobs, commands)
    figures = {}
    for name in models:
        lines = (OUT / "glue" / name / "results.jsonl").read_text().splitlines()
        results = [json.loads(line) for line in lines]
        for task in FINE_TUNED:
            metric = TASKS[task].metrics[0]
            scores = [one["metrics"][metric] for one in results if one["task"] == task]
            figures.setdefault(f"{task} {metric}", {})[name] = scores
    write("glue", figures)


def format_mean(values):
    return f"{100 * statistics.mean(values):.1f} ± {100 * statistics.stdev(values):.1f}"


def format_difference(values, others):
    """The difference of means, with its standard error."""
    variance = sum(statistics.variance(each) / len(each) for each in (values, others))
    return f"{100 * (statistics.mean(values) - statistics.mean(others)):+.1f} ± {100 * variance**0.5:.1f}"


def print_table(corner, columns, rows):
    print(f"\n| {corner} | {' | '.join(columns)} |\n" + "|---" * (1 + len(columns)) + "|")
    for name, cells in rows.items():
        print(f"| {name} | {' | '.join(cells)} |")


def report(options):
    found = {path.stem: json.loads(path.read_text()) for path in RESULTS.glob("*.json")}
    if "exercises" in found:
        report_exercises(found["exercises"])
    for stage in "pilots", "main", "sizes":
        if stage in found:
            report_claims(stage, found[stage]["runs"])
    if "glue" in found:
        report_glue(found["glue"])


def report_exercises(figures):
    rows = {}
    for name in EXERCISES:
        rows[name] = []
        for metric in "mlm_loss", "auc":
            values = [f"{line[metric]:.3f}" for line in figures[name] if metric in line]
            rows[name].append(", ".join(values))
    print_table("changed", ["MLM loss", "AUC"], rows)


def report_claims(stage, runs):
    curves = {NAMES.get(name, name): one["curve"] for name, one in runs.items()}
    plot.plot(curves, RESULTS / f"{stage}.png")
    rows = {}
    for name, one in runs.items():
        last = one["curve"][-1]
        rows[name] = [f"{one['steps']:,}", f"{one['tokens_per_second']:,}"]
        for metric in METRICS:
            rows[name].append(f"{last[metric]:.3f}" if metric in last else "")
    print_table(stage, ["steps", "tokens/s", *METRICS], rows)


def report_glue(figures):
    table = {column: scores for column, scores in figures.items() if isinstance(scores, dict)}
    columns = []
    for column, scores in table.items():
        task, _ = column.split()
        columns.append(f"{TASKS[task].title}, n = {len(scores['electra'])}")
    rows = {}
    for name in NAMES:
        rows[NAMES[name]] = [format_mean(scores[name]) for scores in table.values()]
    for one, other in [("electra", "mlm"), ("electra", "random"), ("mlm", "random")]:
        cells = [format_difference(scores[one], scores[other]) for scores in table.values()]
        rows[f"{NAMES[one]} − {NAMES[other]}"] = cells
    print_table("GLUE dev sets", columns, rows)


STAGES = {"exercises": exercises, "pilots": pilots, "main": main_runs, "sizes": sizes, "glue": fine_tune,
          "report": report}


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("stage", choices=STAGES)
    parser.add_argument("--data", help="folder or files of text, one document per file")
    parser.add_argument("--glue", help="folder laid out as the official zips are")
    parser.add_argument("--jobs", type=int, default=2, help="processes at once")
    parser.add_argument("--dtype", default="bf16", help="of the claim; fp32 where the CPU has no bf16")
    options = parser.parse_args()
    STAGES[options.stage](options)


if __name__ == "__main__":
    main()
