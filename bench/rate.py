"""Text to rows, compared with what the tokenizer alone does on the same text with the same number of threads.

    python bench/rate.py --data PATH --vocab FILE [--workers 1] [--rounds 5]

Each round times both, one after the other. Prints medians and their ratio. With --rounds 0 the text is only
prepared, and the peak memory of this process is printed.
"""

import argparse
import os
import resource
import shutil
import statistics
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import data


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", nargs="+", required=True)
    parser.add_argument("--vocab", required=True)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    work = tempfile.mkdtemp(prefix="rate-")
    os.environ["RAYON_NUM_THREADS"] = str(options.workers)
    config = data.DataConfig(data=options.data, vocab=options.vocab, cache=work, one_document_per_file=True)
    if not options.rounds:
        cache = data.prepare(config, progress=False)
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        print(f"{cache.describe()}\npeak memory {peak:.0f} MB")
        shutil.rmtree(work)
        return
    wordpiece = data.load_wordpiece(config)
    texts = [text for _, text in data.read_documents(config)]
    lines = [line for text in texts for line in text.split("\n") if line.strip()]
    tokenizer = data.blank_tokenizer(config.do_lower_case, config.strip_accents)
    tokenizer.model = wordpiece.tokenizer.model
    megabytes = sum(len(text.encode()) for text in texts) / 1e6
    bare, whole = [], []
    for _ in range(options.rounds):
        began = time.perf_counter()
        for start in range(0, len(lines), 10_000):
            tokenizer.encode_batch(lines[start : start + 10_000], add_special_tokens=False)
        bare.append(megabytes / (time.perf_counter() - began))
        began = time.perf_counter()
        cache = data.prepare(config, progress=False)
        whole.append(megabytes / (time.perf_counter() - began))
        shutil.rmtree(cache.folder)
    shutil.rmtree(work)
    ratio = statistics.median(w / b for w, b in zip(whole, bare, strict=True))
    print(f"{megabytes:.0f} MB, {options.workers} threads: encode_batch {statistics.median(bare):.2f} MB/s, "
          f"text to rows {statistics.median(whole):.2f} MB/s, ratio {ratio:.2f}")


if __name__ == "__main__":
    main()
