"""How many rows does a text give in a second, and what limits that on many cores?

    python bench/rows_per_second.py --data PATH --vocab FILE [--workers 1] [--in-place] [--rounds 5]

Each round times, one after the other:

- the tokenizer alone, with as many threads as there are workers;
- text to rows, with that many worker processes; with one, or with `--in-place`, by threads of one process;
- reading alone;
- the parent alone: workers that answer at once, with rows made beforehand, so that it reads, sends, receives
  and writes as fast as it can;
- making rows alone, on one thread, which is what a worker does.

Prints medians and, from the last two, the rate to expect when each process has a core. With --rounds 0 the
text is only prepared, and the peak memory of this process and of its largest worker is printed. Figures:
LOG.md.
"""

import argparse
import os
import resource
import shutil
import statistics
import sys
import tempfile
import time
from contextlib import suppress
from functools import partial
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import data


def answer_at_once(connection, tokens, config, num_rows):
    """data.run_worker, but with rows made beforehand."""
    shape = num_rows, config.max_length
    rows = np.random.default_rng(0).integers(0, 30_000, shape, dtype=np.uint16)
    with suppress(EOFError, ConnectionError):
        while True:
            _, texts, position = connection.recv()
            info = dict(documents=len(texts), tokens_kept=0, tokens_dropped=0, end=position,
                        rows=len(rows), heldout_rows=0)
            connection.send((rows, rows[:0], info))


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", nargs="+", required=True)
    parser.add_argument("--vocab", required=True)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--in-place", action="store_true")
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    os.environ["RAYON_NUM_THREADS"] = str(options.workers)
    data.WORKERS = 1 if options.in_place else options.workers
    with tempfile.TemporaryDirectory(prefix="rate-") as work:
        config = data.DataConfig(data=options.data, vocab=options.vocab, cache=work,
                                 one_document_per_file=True)
        if options.rounds:
            compare(config, options)
        else:
            print(data.prepare(config).describe())
            peaks = [resource.getrusage(who).ru_maxrss / 1024
                     for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
            print(f"peak memory {peaks[0]:.0f} MB, of a worker {peaks[1]:.0f} MB")


def compare(config, options):
    wordpiece = data.load_wordpiece(config)
    shard_texts = list(data.read_shard_texts(config, data.START, 0))
    texts = [text for _, documents, _ in shard_texts for text in documents]
    lines = [line for text in texts for line in text.split("\n") if line.strip()]
    megabytes = sum(len(text.encode()) for text in texts) / 1e6
    tokenizer = Tokenizer(wordpiece.tokenizer.model)
    tokenizer.pre_tokenizer = wordpiece.tokenizer.pre_tokenizer
    tokenizer.normalizer = wordpiece.normalizer
    shards = data.prepare(config)
    rows = shards.total("rows") + shards.total("heldout_rows")
    some = shard_texts[: 1 + len(shard_texts) // 3]

    def tokenize():
        for start in range(0, len(lines), 10_000):
            tokenizer.encode_batch(lines[start : start + 10_000], add_special_tokens=False)

    def prepare():
        shutil.rmtree(shards.folder)
        data.prepare(config)

    def read():
        for _ in data.read_shard_texts(config, data.START, 0):
            pass

    def parent():
        workers = data.WORKERS
        run_worker = data.run_worker
        data.WORKERS = 2
        data.run_worker = partial(answer_at_once, num_rows=rows // len(shard_texts))
        prepare()
        data.WORKERS = workers
        data.run_worker = run_worker

    def build():
        os.environ["TOKENIZERS_PARALLELISM"] = "false"
        for shard_text in some:
            data.build_shard(*shard_text, wordpiece, config)
        os.environ["TOKENIZERS_PARALLELISM"] = "true"

    stages = tokenize, prepare, read, parent, build
    walls = {stage: [] for stage in stages}  # seconds
    cpus = {stage: [] for stage in stages}
    for _ in range(options.rounds):
        for stage in stages:
            wall_began = time.perf_counter()
            cpu_began = time.process_time()
            stage()
            walls[stage].append(time.perf_counter() - wall_began)
            cpus[stage].append(time.process_time() - cpu_began)
    wall = {stage: statistics.median(walls[stage]) for stage in stages}
    cpu = {stage: statistics.median(cpus[stage]) for stage in stages}
    ratio = statistics.median(t / p for t, p in zip(walls[tokenize], walls[prepare], strict=True))
    kind = "threads" if options.in_place or options.workers == 1 else "workers"
    print(f"{megabytes:.0f} MB, {rows:,} rows, {len(shard_texts)} shards, {options.workers} {kind}: "
          f"encode_batch alone {megabytes / wall[tokenize]:.2f} MB/s, text to rows "
          f"{megabytes / wall[prepare]:.2f} MB/s, ratio {ratio:.2f}; {rows / wall[prepare]:,.0f} rows/s")
    for stage, count in (read, len(shard_texts)), (parent, len(shard_texts)), (build, len(some)):
        print(f"{stage.__name__}: {1000 * wall[stage] / count:.0f} ms a shard, of which "
              f"{1000 * cpu[stage] / count:.0f} on the CPU")
    for workers in 1, 2, 4, 8, 16:
        shards_per_second = min(len(shard_texts) / wall[parent], workers * len(some) / wall[build])
        rate = shards_per_second * rows / len(shard_texts)
        print(f"{workers} workers and the parent, a core each: {rate:,.0f} rows/s")


if __name__ == "__main__":
    main()
