"""Milliseconds of a control step, one world: VITA-VLA's teacher, its student with and without what
the student keeps between steps, and the share that seeing has.

  python bench/latency.py runs/<chain>/teacher runs/<chain>/finetune
"""

import sys
import time
from pathlib import Path

import numpy as np
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import common  # noqa: E402
import vita_vla  # noqa: E402
from worlds import loop  # noqa: E402


def measure(policy, observation, words, repeats):
    """-> median seconds of a step (over a history from empty to full, twice as long), of seeing."""
    cfg, took, eyes = policy.cfg, [], []
    steps = 2 * cfg.history
    tower = policy.model.vlm if hasattr(policy.model, "vlm") else policy.model.eyes.vlm
    see, spent = tower.see, [0.0]

    def timed(*arguments):
        before = time.perf_counter()
        out = see(*arguments)
        spent[0] += time.perf_counter() - before
        return out

    tower.see = timed
    for _ in range(repeats):
        memory, spent[0], before = {}, 0.0, time.perf_counter()
        for _ in range(steps):
            policy.act([observation | {"memory": memory}], [words], None)
        took.append((time.perf_counter() - before) / steps)
        eyes.append(spent[0] / steps)
    tower.see = see
    return np.median(took), np.median(eyes)


def main():
    torch.manual_seed(0)
    if len(sys.argv) < 2 or "-h" in sys.argv[1:]:
        sys.exit(__doc__)
    print(f"{'run':40} {'ms a step':>10} {'of it seeing':>13}")
    for folder in sys.argv[1:]:
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        policy = vita_vla.load_policy(folder, device)
        World, suite = loop.find(policy.cfg.world)
        world = World(suite, policy.cfg.size)
        observation = world.reset(0)
        for cache in (True, False) if policy.cfg.stage != "teacher" else (False,):
            policy.cfg.cache = cache
            step, eyes = measure(policy, observation, world.instruction, repeats=10)
            name = f"{policy.cfg.stage}{', nothing kept' if not cache else ''} ({folder})"
            print(f"{name:40} {1000 * step:10.1f} {eyes / step:13.0%}")


if __name__ == "__main__":
    common.run_main(main)
