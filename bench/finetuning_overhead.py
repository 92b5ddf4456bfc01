"""How much of an epoch of fine-tuning is spent outside the network and the optimizer?

    python bench/finetuning_overhead.py --glue-dir GLUE [--examples 640] [--threads 1]

The epoch is MRPC's, with random weights of a size. Forward, backward, clipping and the optimizer are inside;
on a GPU the host waits here after each of them. Figures: LOG.md, "Fine-tuning on a CPU".
"""

import argparse
import json
import sys
import time
from dataclasses import replace
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import finetune
import glue
import model
import train
from data import SPECIAL_TOKENS, WordPiece


def make_finetuner(glue_dir, size, num_examples=None, **flags):
    """A Finetuner of MRPC with random weights of a size, for an epoch, on its first examples."""
    config = train.set_up_device(finetune.FinetuneConfig(glue_dir=glue_dir, num_train_epochs=1, **flags))
    task = glue.TASKS["mrpc"]
    shape = train.make_config(model.ElectraConfig, train.SIZES[size])
    examples, _ = task.read("train", config.cache, glue_dir)
    # A vocabulary of the words that are there: rows are about as long as with BERT's.
    words = {word for example in examples for word in f"{example.first} {example.second}".lower().split()}
    wordpiece = WordPiece([*SPECIAL_TOKENS, *sorted(words)])
    shape = replace(shape, sep_token_id=wordpiece.sep_token_id,
                    max_position_embeddings=max(128, shape.max_position_embeddings))
    tokenized = finetune.tokenize_examples(examples[:num_examples], wordpiece, config.max_length)
    pretrained = finetune.Pretrained(Path("random"), shape, wordpiece, None, "random")
    experiment = finetune.Experiment(task, config, pretrained)
    return finetune.Finetuner(experiment, dict(train=tokenized))


def time_calls(owner, name, device, seconds):
    """Append to `seconds` how long each call of a function takes."""
    function = getattr(owner, name)

    def timed(*args, **kwargs):
        began = time.perf_counter()
        result = function(*args, **kwargs)
        if device.startswith("cuda"):
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - began)
        return result

    setattr(owner, name, timed)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--glue-dir", required=True)
    parser.add_argument("--size", default="small", choices=train.SIZES)
    parser.add_argument("--examples", type=int, default=10_000, help="at most so many of the training set")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--json", help="file for the figures")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    finetuner = make_finetuner(options.glue_dir, options.size, options.examples)
    config = finetuner.config
    inside = []  # seconds of calls
    for owner, name in ((finetune.Classifier, "forward"), (torch.Tensor, "backward"),
                        (torch.nn.utils, "clip_grad_norm_"), (torch.optim.AdamW, "step")):
        time_calls(owner, name, config.device, inside)
    step_begins = []  # (time, seconds inside so far)
    learning_rate = train.learning_rate

    def note_begin(*args):  # a step begins with its learning rate
        step_begins.append((time.perf_counter(), sum(inside)))
        return learning_rate(*args)

    train.learning_rate = note_begin
    finetuner.run(0)
    first_time, first_inside = step_begins[0]
    last_time, last_inside = step_begins[-1]
    seconds = last_time - first_time
    steps = len(step_begins) - 1  # the last one is not timed
    num_examples = len(finetuner.splits["train"].rows)
    figures = dict(device=config.device, dtype=config.dtype, size=options.size, steps=steps,
                   outside=1 - (last_inside - first_inside) / seconds,
                   examples_per_second=steps * config.batch_size / seconds,
                   epoch_seconds=seconds / steps * finetune.num_steps(num_examples, config.batch_size, 1))
    if options.json:
        Path(options.json).write_text(json.dumps(figures, indent=1) + "\n")
    print("{device}, {dtype}, {size}, {steps} steps: {examples_per_second:,.0f} examples/s; {outside:.1%} of "
          "the time outside the network".format(**figures))


if __name__ == "__main__":
    main()
