"""ELECTRA's claim on a CPU: the figures of the README, in stages.

    python bench/study.py STAGE [--data TEXT] [--glue GLUE] [--jobs 2]

TEXT is text in OpenWebText's nesting, one document per file; GLUE a folder laid out as the official zips are.
A stage starts one process per job with one thread each, resumes where it was stopped, and leaves its figures
in bench/results/STAGE.json. The stages, in order:

exercises  tiny with one line changed, three seeds each
pilots     both arms of the claim with three learning rates each
main       both arms with their best learning rate and the whole budget
sizes      generators of a quarter, half and all of the discriminator's width
glue       fine-tuning of both arms and of random weights

The arms are replaced-token detection and masked language modelling with a network of the discriminator's
size, at equal training FLOPs: bench/pretrain.py counts them, backward passes and the output layer included.
"""

import argparse
import json
import os
import shlex
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import pretrain

import model

HERE = Path(__file__).resolve().parent
OUT, RESULTS = Path("out/study"), HERE / "results"
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
# The network of the claim.
SHAPE = dict(embedding_size=128, hidden_size=128, num_hidden_layers=3, num_attention_heads=2,
             intermediate_size=512, max_position_embeddings=64, hidden_dropout_prob=0.0,
             attention_probs_dropout_prob=0.0, initializer_range=0.05, generator_size=0.5)
VOCAB, LENGTH, BATCH = 8192, 64, 32
LEARNING_RATES = (5e-4, 1e-3, 2e-3)
ARMS = ("electra", "mlm")
PILOT_FLOPS, MAIN_FLOPS = 2e13, 1.2e14
TASKS = {"cola": 5, "mrpc": 5, "stsb": 5, "sst2": 2}


def run(command, folder=Path(".")):
    """Run a command with one thread. Returns the seconds that it took."""
    began = time.perf_counter()
    environment = os.environ | {"OMP_NUM_THREADS": "1", "RAYON_NUM_THREADS": "1"}
    subprocess.run([sys.executable, *shlex.split(command)], cwd=folder, env=environment, check=True,
                   stdout=subprocess.DEVNULL)
    return time.perf_counter() - began


def run_all(jobs, commands):
    with ThreadPoolExecutor(jobs) as pool:
        return list(pool.map(lambda command: run(*command), commands))


def read_log(folder, split="heldout"):
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [line for line in lines if line.get("split") == split]


def write(stage, figures):
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=HERE, capture_output=True, text=True)
    RESULTS.mkdir(exist_ok=True)
    text = json.dumps(dict(command=f"python bench/study.py {stage}", commit=commit.stdout.strip(),
                           date=time.strftime("%Y-%m-%d"), **figures), indent=1)
    (RESULTS / f"{stage}.json").write_text(text + "\n")


def exercises(options):
    """tiny with one change each: held-out metrics of three seeds."""
    commands, folders, cache = [], {}, (OUT / "cache").resolve()
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


def steps_for(flops, arm, generator_size):
    shape = SHAPE | dict(vocab_size=VOCAB, objective=arm, generator_size=generator_size)
    return int(flops / (pretrain.flops_per_token(model.ElectraConfig(**shape), LENGTH) * LENGTH * BATCH))


def train_command(options, name, arm, lr, flops, generator_size):
    """(The command of a run of the claim, its folder.)"""
    steps = steps_for(flops, arm, generator_size)
    shape = SHAPE | dict(generator_size=generator_size)
    flags = {**shape, "data": options.data, "vocab": f"train:{VOCAB}", "max_length": LENGTH,
             "batch_size": BATCH, "num_train_steps": steps, "num_warmup_steps": steps // 20,
             "learning_rate": lr, "objective": arm, "log_every": 100, "eval_every": max(1, steps // 20),
             "cache": OUT / "cache", "out": OUT / name, "dtype": options.dtype}
    words = " ".join(f"--{flag.replace('_', '-')} {value}" for flag, value in flags.items())
    return f"{HERE.parent / 'train.py'} {words} --one-document-per-file", OUT / name / "small"


def claims(options, stage, runs, flops):
    """Train (name, arm, learning rate, generator size), and keep curves, seconds and counts."""
    made = {name: train_command(options, f"{stage}/{name}", arm, lr, flops, size)
            for name, arm, lr, size in runs}
    first, _ = next(iter(made.values()))
    run(f"{first} --prepare-only")  # the vocabulary, and the text, once
    run_all(options.jobs, [(command,) for command, _ in made.values()])
    figures = {}
    for name, arm, lr, size in runs:
        folder = made[name][1]
        figures[name] = dict(arm=arm, learning_rate=lr, generator_size=size, flops=flops,
                             steps=steps_for(flops, arm, size), curve=read_log(folder),
                             tokens_per_second=read_log(folder, "train")[-1]["tokens_per_second"])
    write(stage, dict(shape=SHAPE, vocab=VOCAB, length=LENGTH, batch=BATCH, dtype=options.dtype,
                      runs=figures))


def pilots(options):
    claims(options, "pilots", [(f"{arm}-{lr}", arm, lr, SHAPE["generator_size"])
                               for lr in LEARNING_RATES for arm in ARMS], PILOT_FLOPS)


def best_rates():
    """The learning rate of each arm that was best in the pilots: by its own loss on held-out text."""
    runs = json.loads((RESULTS / "pilots.json").read_text())["runs"].values()
    metric = dict(electra="disc_loss", mlm="mlm_loss")
    return {arm: min((one for one in runs if one["arm"] == arm),
                     key=lambda one: one["curve"][-1][metric[one["arm"]]])["learning_rate"] for arm in ARMS}


def main_runs(options):
    rates = best_rates()
    claims(options, "main", [(arm, arm, rates[arm], SHAPE["generator_size"]) for arm in ARMS], MAIN_FLOPS)


def sizes(options):
    rate = best_rates()["electra"]
    claims(options, "sizes", [(f"generator-{size}", "electra", rate, size) for size in (0.25, 0.5, 1.0)],
           PILOT_FLOPS)


def fine_tune(options):
    models = {"electra": OUT / "main/electra/small/discriminator", "mlm": OUT / "main/mlm/small/generator",
              "random": OUT / "main/electra/small/discriminator"}
    commands = []
    for name, folder in models.items():
        for task, seeds in TASKS.items():
            commands.append((f"{HERE.parent / 'finetune.py'} --task {task} --seeds {seeds} --model {folder} "
                             f"--max-length {LENGTH} --glue-dir {options.glue} --out {OUT / 'glue' / name} "
                             f"--dtype {options.dtype} " + "--random-weights" * (name == "random"),))
    run_all(options.jobs, commands)
    results = {name: (OUT / "glue" / name / "results.jsonl").read_text().splitlines() for name in models}
    write("glue", {name: list(map(json.loads, lines)) for name, lines in results.items()})


STAGES = {"exercises": exercises, "pilots": pilots, "main": main_runs, "sizes": sizes, "glue": fine_tune}


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("stage", choices=STAGES)
    parser.add_argument("--data", help="folder or files of text, one document per file")
    parser.add_argument("--glue", help="folder laid out as the official zips are")
    parser.add_argument("--jobs", type=int, default=2, help="processes at once")
    parser.add_argument("--dtype", default="fp32")
    options = parser.parse_args()
    STAGES[options.stage](options)


if __name__ == "__main__":
    main()
