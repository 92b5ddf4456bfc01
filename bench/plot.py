"""What have runs of train.py learned? Curves on held-out text, or one sentence through both networks.

    python bench/plot.py out/small out/mlm/small [--official] [--out curves.png]
    python bench/plot.py out/tiny --sentence "Return the most common data point." [--out sentence.png]

Draws the MLM loss with the loss that word frequencies alone give, the discriminator's loss with the loss of
one that takes every token for the original, and the AUC. --official adds the published curve of ELECTRA-Small
on OpenWebText (bench/official_curve.csv, read off the figure in google-research/electra#3).
"""

import argparse
import csv
import json
import sys
from pathlib import Path

import matplotlib
import torch

matplotlib.use("Agg")
import matplotlib.pyplot as plt

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import data
import model

OFFICIAL = Path(__file__).with_name("official_curve.csv")
OFFICIAL_TOKENS = 128 * 128  # in a step
PANELS = {"MLM loss": ("mlm_loss", "unigram_entropy", "word frequencies alone"),
          "discriminator loss": ("disc_loss", "all_original", "all called original"),
          "AUC": ("auc", None, None)}


def read_run(folder):
    """The evaluations in a run's log."""
    path = Path(folder) / "log.jsonl"
    if not path.is_file():
        raise SystemExit(f"{folder} has no log.jsonl; give the folder of a run of train.py, as out/tiny")
    whole, _, _ = path.read_text(encoding="utf-8").rpartition("\n")  # the run may be writing the last line
    lines = [json.loads(line) for line in whole.split("\n")]
    lines = [line for line in lines if line.get("split") == "heldout"]
    if not lines:
        raise SystemExit(f"{folder} has not been evaluated yet")
    return lines


def read_official():
    """The points of the published curve. It has no curve for what is missing in a row."""
    with open(OFFICIAL, newline="") as file:
        rows = [{name: float(value) for name, value in row.items() if value} for row in csv.DictReader(file)]
    for row in rows:
        row["tokens"] = row["step"] * OFFICIAL_TOKENS
        row["auc"] = row.get("disc_auc")
    return rows


def draw(axis, lines, metric, **style):
    """Draw a metric against the tokens so far. Evaluations that lack it are left out."""
    points = [(line["tokens"] / 1e6, line[metric]) for line in lines if line.get(metric) is not None]
    if points:
        axis.plot(*zip(*points, strict=True), **style)


def plot(runs, out, official=False):
    """Draw curves: runs are {label: evaluations, as read_run returns them}."""
    figure, axes = plt.subplots(1, 3, figsize=(12, 4), layout="constrained")
    for axis, (title, (metric, baseline, baseline_name)) in zip(axes, PANELS.items(), strict=True):
        for number, (name, lines) in enumerate(runs.items()):
            draw(axis, lines, metric, label=name, color=f"C{number}")
            draw(axis, lines, baseline, color=f"C{number}", linestyle=":")
        if official:
            draw(axis, read_official(), metric, label="published", color="gray", linestyle="--")
        axis.set(title=f"{title} (dotted: {baseline_name})" if baseline else title,
                 xlabel="million tokens, padding included")
        axis.spines[["top", "right"]].set_visible(False)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=3, frameon=False)
    figure.savefig(out, dpi=150)
    print(f"wrote {out}")


def plot_sentence(run, text, out, seed=0):
    """Draw a sentence as it was, masked, as the generator fills it in, and what the discriminator says."""
    wordpiece, _ = data.read_tokenizer(Path(run) / "discriminator")
    electra = model.load_electra(Path(run) / "discriminator", Path(run) / "generator", wordpiece).eval()
    [ids] = wordpiece.encode([text])
    input_ids = torch.tensor([[wordpiece.cls_token_id, *ids, wordpiece.sep_token_id]])
    L = input_ids.shape[1]
    K = electra.config.num_slots(L)
    uniforms = torch.rand(1, L + 2 * K, generator=torch.Generator().manual_seed(seed))
    priorities, mask_uniforms, _ = uniforms.split([L, K, K], dim=1)
    *_, masked_ids = model.mask_tokens(input_ids, priorities, mask_uniforms, electra.config)
    output = electra(input_ids, uniforms)
    chosen = torch.zeros_like(input_ids).scatter(1, output.positions, output.is_used.long())[0].bool()
    rows = [[wordpiece.tokens[number] for number in row[0][1:-1].tolist()]
            for row in (input_ids, masked_ids, output.corrupted_ids)]
    said = output.disc_logits[0, 1:-1].sigmoid().tolist()
    rows.append([f"{100 * probability:.0f} %" for probability in said])
    shades = [[0.0] * len(said), 0.35 * chosen[1:-1], 0.35 * output.is_replaced[0, 1:-1], said]

    starts = [0.0]  # of the columns
    for column in zip(*rows[:3], strict=True):
        starts.append(starts[-1] + max(4, *map(len, column)) + 1.6)
    figure, axis = plt.subplots(figsize=(12, 2.2), layout="constrained")
    names = "original", "masked", "generator", "discriminator"
    for number, (name, row) in enumerate(zip(names, rows, strict=True)):
        axis.text(-2, -number, name, ha="right", va="center", fontsize=11, color="gray")
        for column, word in enumerate(row):
            shade = float(shades[number][column])  # from 0 to 1
            colormap = "Oranges" if name == "discriminator" else "Blues"
            color = matplotlib.colormaps[colormap](0.8 * shade)
            box = dict(boxstyle="round,pad=0.25", facecolor=color if shade else "white", linewidth=0)
            middle = (starts[column] + starts[column + 1]) / 2
            axis.text(middle, -number, word, ha="center", va="center", fontsize=11, bbox=box)
    axis.set(xlim=(-13, starts[-1]), ylim=(-3.6, 0.6))
    axis.axis("off")
    figure.savefig(out, dpi=150)
    print(f"wrote {out}")


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("runs", nargs="+", help="folders with a log.jsonl")
    parser.add_argument("--official", action="store_true", help="add the published curve")
    parser.add_argument("--sentence", help="draw this sentence through the networks of the first run")
    parser.add_argument("--out", help="the picture; by default curves.png or sentence.png")
    options = parser.parse_args()
    if options.sentence:
        plot_sentence(options.runs[0], options.sentence, options.out or "sentence.png")
    else:
        runs = {folder: read_run(folder) for folder in options.runs}
        plot(runs, options.out or "curves.png", options.official)


if __name__ == "__main__":
    main()
