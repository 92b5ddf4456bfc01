"""The figures that bench/gpu.sh left in a folder, as a table and as gpu.json: bench/gpu_report.py FOLDER"""

import json
import sys
from pathlib import Path


def main():
    folder = Path(sys.argv[1])
    results = {path.stem: json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))
               if path.name != "gpu.json"}
    (folder / "gpu.json").write_text(json.dumps(results, indent=1) + "\n")
    print("| step | device | dtype | tokens/s | x transformers | utilization | peak memory |")
    print("|---|---|---|---|---|---|---|")
    for name, figures in results.items():
        if "ours" in figures:
            ratio = f"{figures['ratio']:.2f}" if "ratio" in figures else "-"
            print(f"| {name}, {figures['batch_size']} x {figures['length']} | {figures['device']} "
                  f"| {figures['dtype']} | {figures['ours']:,.0f} | {ratio} | {figures['utilization']:.0%} "
                  f"| {figures['memory']['ours'] / 2**20:,.0f} MiB |")
    for name, figures in results.items():
        for kind, share in sorted(figures.get("shares", {}).items(), key=lambda item: -item[1]):
            print(f"{name}: {share:6.1%} {kind}")
    if "mrpc" in results:
        print("MRPC: {examples_per_second:,.0f} examples/s, an epoch in {epoch_seconds:.1f} s, {outside:.1%} "
              "of it outside the network".format(**results["mrpc"]))
    for path in sorted(folder.glob("*.failed")):
        last = (path.read_text().strip().splitlines() or ["nothing was printed"])[-1]
        print(f"{path.stem} failed: {last}")


if __name__ == "__main__":
    main()
