"""Latency and throughput of the policy server, with several clients at once.

  python bench/serve.py [RUN] [--clients 1,4,8 --seconds 10 --side 224 --threads 1]

Without RUN an untrained TwinBrainVLA on the tiny backbone is served: what is measured does not hang
on its weights. The server is a process of its own on this machine, each client a thread that sends
two pictures, a state and an instruction as openpi's LIBERO example does, and waits for its chunk.
"""

import argparse
import dataclasses
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import numpy as np  # noqa: E402
import torch  # noqa: E402
from study import machine  # noqa: E402
from websockets.sync.client import connect  # noqa: E402

import common  # noqa: E402
import data  # noqa: E402
import twinbrain  # noqa: E402
from worlds import serve  # noqa: E402


def untrained(folder):
    """A run folder as the default run has it before its first step."""
    cfg, episodes = (
        twinbrain.Config(),
        [data.record("bridge", seed, 64, 32, 0.3) for seed in (0, 1)],
    )
    model, _ = twinbrain.build(cfg, 8, 7)
    tensors = {n: t for n, t in model.state_dict().items() if not n.startswith("left.")}
    meta = {"method": "twinbrain", "config": dataclasses.asdict(cfg)}
    about = {"cameras": list(episodes[0].images), "fps": episodes[0].fps}
    meta["robots"] = {"tabletop:bridge": data.statistics(episodes) | about}
    alone = common.Dist(0, 1, torch.device("cpu"))
    common.save_checkpoint(Path(folder) / "checkpoints", 0, tensors, {}, {}, meta, alone)
    return folder


def client(port, message, start, end, took):
    """Asks over and over until `end()`; each request's ms, and those of them in the policy."""
    with connect(f"ws://127.0.0.1:{port}", compression=None, max_size=None) as ws:
        ws.recv()
        for _ in range(3):
            ws.send(message)
            ws.recv()
        start.wait()
        while not end():
            began = time.perf_counter()
            ws.send(message)
            answer = serve.decode(ws.recv())
            ms = 1000 * (time.perf_counter() - began)
            took.append((ms, answer["policy_timing"]["infer_ms"]))


def measure(port, clients, seconds, message):
    """-> [(ms, of them in the policy)], requests a second of all clients together."""
    took, until = [], [0.0]
    start = threading.Barrier(clients, lambda: until.append(time.perf_counter() + seconds))
    arguments = (port, message, start, lambda: time.perf_counter() > until[-1], took)
    threads = [threading.Thread(target=client, args=arguments) for _ in range(clients)]
    [t.start() for t in threads]
    [t.join() for t in threads]
    return took, len(took) / seconds


def report(args, server, message):
    """Waits until the server listens; a line for each number of clients."""
    ready = (line for line in server.stdout if line.startswith("listening"))
    if not (line := next(ready, "")):
        raise common.UserError("the server ended; its own message is above")
    threading.Thread(target=server.stdout.read, daemon=True).start()
    port = int(line.split(",")[0].rsplit(":", 1)[1])
    print(f"{machine()}, {args.threads} thread(s) of torch, {len(message)} bytes")
    heads = f"{'median ms':>10} {'90% ms':>8} {'in the policy':>14} {'requests/s':>11}"
    print(f"{'clients':>7} {heads}")
    for clients in map(int, args.clients.split(",")):
        took, rate = measure(port, clients, args.seconds, message)
        ms, policy = np.array(took).T
        line = f"{clients:7} {np.median(ms):10.1f} {np.quantile(ms, 0.9):8.1f}"
        print(f"{line} {np.median(policy):14.1f} {rate:11.1f}", flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", nargs="?", help="run folder; none: an untrained one")
    parser.add_argument("--clients", default="1,4,8", help="how many at once")
    parser.add_argument("--seconds", type=float, default=10)
    parser.add_argument("--side", type=int, default=224, help="of the pictures sent, pixels")
    parser.add_argument("--threads", type=int, default=1, help="of the server's torch")
    args = parser.parse_args()
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (2, args.side, args.side, 3), np.uint8)
    keys = serve.CLIENTS["libero"]
    message = dict(zip(keys.images, images)) | {keys.state[0]: np.zeros(8), "prompt": "stack them"}
    with tempfile.TemporaryDirectory() as folder:
        words = ["--checkpoint", args.run or untrained(folder), "--port", "0", "--max-rate", "1e6"]
        words += ["--threads", str(args.threads)]
        command = [sys.executable, str(ROOT / "worlds" / "serve.py"), *words]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
            try:
                report(args, server, serve.encode(message))
            finally:
                server.terminate()


if __name__ == "__main__":
    common.run_main(main)
