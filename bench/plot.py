"""Learning curves of runs of train.py, on held-out text, as a PNG.

    python bench/plot.py out/small out/mlm/small [--official] [--out curves.png]

Draws the MLM loss with the loss that word frequencies alone give, the discriminator's loss with the loss of
one that takes every token for the original, and the AUC. --official adds the published curve of ELECTRA-Small
on OpenWebText (bench/official_curve.csv, read off the figure in google-research/electra#3).
"""

import argparse
import csv
import json
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

OFFICIAL = Path(__file__).with_name("official_curve.csv")
OFFICIAL_TOKENS = 128 * 128  # in a step
PANELS = {"MLM loss": ("mlm_loss", "unigram_entropy", "word frequencies"),
          "discriminator loss": ("disc_loss", "all_original", "all original"),
          "AUC": ("auc", None, None)}


def read_run(folder):
    """The evaluations in a run's log."""
    path = Path(folder) / "log.jsonl"
    if not path.is_file():
        raise SystemExit(f"{folder} is not a run of train.py, such as out/small")
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
    return [dict(row, tokens=row["step"] * OFFICIAL_TOKENS, auc=row.get("disc_auc")) for row in rows]


def draw(axis, lines, metric, **style):
    points = [(line["tokens"] / 1e6, line[metric]) for line in lines if line.get(metric) is not None]
    if points:
        axis.plot(*zip(*points, strict=True), **style)


def plot(folders, out, official=False):
    figure, axes = plt.subplots(1, 3, figsize=(12, 3.6), layout="constrained")
    for axis, (title, (metric, baseline, baseline_name)) in zip(axes, PANELS.items(), strict=True):
        for number, folder in enumerate(folders):
            lines = read_run(folder)
            draw(axis, lines, metric, label=str(folder), color=f"C{number}")
            if baseline:
                label = f"{folder}: {baseline_name}"
                draw(axis, lines, baseline, label=label, color=f"C{number}", linestyle=":")
        if official:
            draw(axis, read_official(), metric, label="published", color="gray", linestyle="--")
        axis.set(title=title, xlabel="million tokens, padding included")
        axis.spines[["top", "right"]].set_visible(False)
        if axis.lines:
            axis.legend(fontsize="small", frameon=False)
    figure.savefig(out, dpi=150)
    print(f"wrote {out}")


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("runs", nargs="+", help="folders with a log.jsonl")
    parser.add_argument("--official", action="store_true", help="add the published curve")
    parser.add_argument("--out", default="curves.png", help="the picture")
    options = parser.parse_args()
    plot(options.runs, options.out, options.official)


if __name__ == "__main__":
    main()
