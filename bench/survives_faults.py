"""Does a run with a failing server and under kills end in the same bytes as one that nothing happened to?

    python bench/survives_faults.py --subsets DIR --vocab FILE [--files 2] [--faults 100] [--kills 20]

DIR holds tars in OpenWebText's nesting (urlsf_subset00.tar, ...), and FILE is BERT's vocabulary. A server on
the loopback interface hands them out under the paths of the hub, the first --files tars as they are and empty
ones for the rest of the 21. HF_ENDPOINT points there, so that `--data openwebtext --vocab bert` is what runs.
As on the hub, each request is redirected first. Prints how long after the first byte of the corpus the first
batch reaches the step, and whether cache, weights and log are the same at the end. Figures: LOG.md, "Kills".
"""

import argparse
import http.server
import json
import os
import random
import re
import shutil
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import data

HERE = Path(data.__file__).parent
ADDRESSES = [data.BERT_VOCAB["address"], *data.OPENWEBTEXT["pinned"]]
PATHS = [address.removeprefix("hub:") for address in ADDRESSES]
EMPTY_TAR = bytes(10_240)
FIRST_BATCH = """
import os, sys, time, train
def first(*args):
    print("first batch", time.time(), flush=True)
    os._exit(0)
train.seed_dropout = first  # the rows have been read
train.main(sys.argv[1:])
"""


class Hub(http.server.ThreadingHTTPServer):
    """Serves `bodies`, {file name: bytes}. The next `faults` requests go wrong in one way or another."""

    daemon_threads = True

    def __init__(self, bodies, seed=0):
        self.bodies = bodies
        self.random = random.Random(seed)
        self.faults = 0  # how many more requests go wrong
        self.happened = []  # the kinds of faults
        self.first_byte = None  # when the first byte of the corpus was sent
        super().__init__(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.serve_forever, daemon=True).start()

    def fault(self):
        """The kind of fault that the next request meets, or None."""
        if self.faults <= 0:
            return None
        self.faults -= 1
        kind = self.random.choice(["reset", "truncated", "429", "503", "slow", "loop"])
        self.happened.append(kind)
        return kind


class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        hub = self.server
        path, is_redirected, _ = self.path.partition("?")
        if path not in PATHS:
            return self.send_error(404)
        fault = hub.fault() if is_redirected else None
        status = 200
        if not is_redirected or fault == "loop":
            status = 302
        elif fault in ("429", "503"):
            status = int(fault)
        if status != 200:
            self.send_response(status)
            self.send_header("Location", self.path + "?at-the-cdn")
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        body = hub.bodies[Path(path).name]
        asked = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
        begin = int(asked[1]) if asked else 0
        self.send_response(206 if asked else 200)
        self.send_header("ETag", f'"{Path(path).name}-{len(body)}"')
        self.send_header("Content-Length", str(len(body) - begin))
        if asked:
            self.send_header("Content-Range", f"bytes {begin}-{len(body) - 1}/{len(body)}")
        if path != PATHS[0]:
            hub.first_byte = hub.first_byte or time.time()
        self.end_headers()
        # While faults are wanted, every body ends early, so that there is another request.
        end = min(len(body), begin + hub.random.randrange(50_000, 400_000)) if fault else len(body)
        try:
            for start in range(begin, end, 1 << 16):
                self.wfile.write(body[start : min(end, start + (1 << 16))])
                time.sleep(0.05 if fault == "slow" else 0)
            if fault == "reset":  # RST instead of FIN
                self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                os.close(self.connection.detach())
        except OSError:
            pass  # the client was killed
        self.close_connection = True

    def log_message(self, *args):
        pass


def children(pid):
    """The ids of a process's children."""
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def read_files(folder):
    return {path.name: path.read_bytes() for path in Path(folder).iterdir()}


def read_log(folder):
    """The lines of a run's log, without the speed, which is never the same twice."""
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    for line in lines:
        line.pop("tokens_per_second", None)
    return lines


def compare(work, name):
    """Whether cache, networks and log of a run are those of the undisturbed one, by what is compared."""
    [whole_cache] = (work / "whole-cache").glob("openwebtext-*")
    [cache] = (work / f"{name}-cache").glob("openwebtext-*")
    whole = work / "whole-out/tiny"
    out = work / f"{name}-out/tiny"
    same = {"cache": read_files(cache) == read_files(whole_cache)}
    for network in "discriminator", "generator":
        weights = f"{network}/model.safetensors"
        same[network] = (out / weights).read_bytes() == (whole / weights).read_bytes()
    same["log"] = read_log(out) == read_log(whole)
    return same


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--subsets", type=Path, required=True)
    parser.add_argument("--vocab", type=Path, required=True)
    parser.add_argument("--files", type=int, default=2)
    parser.add_argument("--faults", type=int, default=100)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--steps", type=int, default=1500)
    options = parser.parse_args()
    work = Path(tempfile.mkdtemp(prefix="soak-"))
    bodies = {Path(path).name: EMPTY_TAR for path in PATHS} | {"vocab.txt": options.vocab.read_bytes()}
    for path in sorted(options.subsets.glob("*.tar"))[: options.files]:
        bodies[path.name] = path.read_bytes()
    hub = Hub(bodies)
    os.environ["HF_ENDPOINT"] = f"http://127.0.0.1:{hub.server_port}"
    common = ["--data", "openwebtext", "--vocab", "bert"]

    for size in ("tiny", "small"):
        hub.first_byte = None
        flags = [*common, *f"--size {size} --cache {work / size}-cache --out {work / 'first'}".split()]
        command = [sys.executable, "-c", FIRST_BATCH, *flags]
        printed = subprocess.run(command, cwd=HERE, capture_output=True, text=True)
        seconds = float(re.search(r"first batch (\S+)", printed.stdout)[1]) - hub.first_byte
        print(f"{size}: first batch {seconds:.1f} s after the first byte", flush=True)

    recipe = [*common, *f"--size tiny --num-train-steps {options.steps}".split(),
              *"--log-every 10 --save-every 50 --eval-every 300 --max-length 32".split()]

    def commands(name):
        place = ["--cache", str(work / f"{name}-cache"), "--out", str(work / f"{name}-out")]
        train = [sys.executable, str(HERE / "train.py"), *recipe, *place]
        return train, [*train, "--prepare-only"]

    def run_to_the_end(name):
        train, prepare = commands(name)
        for part in (train, prepare):
            subprocess.run(part, check=True, stdout=subprocess.DEVNULL)

    began = time.time()
    run_to_the_end("whole")
    print(f"undisturbed run: {time.time() - began:.0f} s", flush=True)

    hub.faults = options.faults
    run_to_the_end("faults")
    counts = {kind: hub.happened.count(kind) for kind in sorted(set(hub.happened))}
    print(f"faults: {len(hub.happened)}, {counts}", flush=True)

    hub.happened.clear()
    hub.faults = 10**9
    chance = random.Random(1)
    killed = {"trainer": 0, "its child": 0}
    while sum(killed.values()) < options.kills:
        with open(work / "killed.log", "ab") as log:
            process = subprocess.Popen(commands("killed")[0], stdout=log, stderr=log)
        time.sleep(chance.uniform(2.0, 9.0))
        if process.poll() is not None:
            sys.exit(f"the run ended after {killed} kills: raise --steps")
        victims = {"trainer": process.pid}
        preparing = children(process.pid)  # one child, or none once the text is prepared
        if preparing:
            victims["its child"] = preparing[0]
        victim = chance.choice(list(victims))
        os.kill(victims[victim], signal.SIGKILL)
        killed[victim] += 1
        process.wait()
    hub.faults = 0
    run_to_the_end("killed")
    print(f"kills: {killed}, with {len(hub.happened)} faults besides", flush=True)

    for name in "faults", "killed":
        print(f"{name}: the same as undisturbed: {compare(work, name)}", flush=True)
    shutil.rmtree(work)


if __name__ == "__main__":
    main()
