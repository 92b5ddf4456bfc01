"""Fine-tuning with batches padded to their own longest row, compared with padding to 128, and with batches
that are sorted and run in parts.

    python bench/padding.py --model FOLDER --glue-dir DIR [--task cola mrpc] [--steps 60] [--rounds 3]

Each round times all variants on the same steps of the same batches, one after the other. Prints medians of
examples per second, and ratios.
"""

import argparse
import statistics
import sys
import time
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import finetune
import glue
from train import build_optimizer, update


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", required=True)
    parser.add_argument("--glue-dir", required=True)
    parser.add_argument("--task", nargs="+", default=["cola", "mrpc"])
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    config = finetune.FinetuneConfig(model=options.model, glue_dir=options.glue_dir)
    model = finetune.Model(config)
    for name in options.task:
        task = glue.TASKS[name]
        examples = glue.read_examples(task, "train", config.cache, config.glue_dir)
        rows, labels = finetune.build_rows(examples, model.wordpiece, config.max_length, task.both_orders)
        labels = torch.tensor(labels, dtype=torch.long if task.labels else torch.float32, device=model.device)
        order = np.random.default_rng(0).permutation(len(rows))[: options.steps * config.batch_size]
        batches = np.split(order, options.steps)

        def run(parts, full, rows=rows, labels=labels, batches=batches, task=task, order=order):
            network = model.classifier(len(task.labels) or 1).train()
            optimizer = build_optimizer(network.named_parameters(), config)
            began = time.perf_counter()
            for batch in batches:
                batch = sorted(batch, key=lambda i: len(rows[i])) if parts > 1 else batch
                for part in np.array_split(batch, parts):
                    chosen = [np.pad(rows[i], (0, max(0, full - len(rows[i])))) for i in part]
                    logits = model.forward(network, chosen)
                    finetune.losses(logits, labels[torch.tensor(part)], task).sum().backward()
                update(optimizer, 1e-4, config.max_grad_norm)
            if model.device.type == "cuda":
                torch.cuda.synchronize()
            return len(order) / (time.perf_counter() - began)

        variants = {"padded to 128": (1, 128), "own longest": (1, 0), "2 parts": (2, 0), "4 parts": (4, 0)}
        rates = {variant: [] for variant in variants}
        for _ in range(options.rounds):
            for variant, arguments in variants.items():
                rates[variant].append(run(*arguments))
        base = rates["padded to 128"]
        for variant, measured in rates.items():
            ratio = statistics.median(rate / one for rate, one in zip(measured, base, strict=True))
            print(f"{task.title}, {variant}: {statistics.median(measured):.0f} examples/s, x {ratio:.2f}")


if __name__ == "__main__":
    main()
