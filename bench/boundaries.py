"""How well event boundaries are found in recordings that no detector has learned from.

  python bench/boundaries.py [--seeds 3] [--episodes 200]

F1 by relative distance, as Kinetics-GEBD has it (worlds/events.py), of dualvla.py's detectors on
held-out recordings of its world, beside marking every second frame. `ddm` learns from as many
labelled recordings as a run gives it (--event-demos).
"""

import argparse
import statistics
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import common  # noqa: E402
import data  # noqa: E402
import dualvla  # noqa: E402
from bench import study  # noqa: E402
from worlds import events  # noqa: E402

HELD_OUT = 900  # added to a seed: no training draws its recordings there


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--episodes", type=int, default=200, help="held-out recordings")
    args = parser.parse_args()
    cfg, rows = dualvla.Config(), {}
    for seed in range(args.seeds):
        looks = cfg.size, cfg.wrist_size, cfg.noise
        known = data.demonstrations(cfg.world, cfg.event_demos, seed + 500, *looks)
        held = data.demonstrations(cfg.world, args.episodes, seed + HELD_OUT, *looks)
        for kind in ("ddm", "similarity"):
            began = time.perf_counter()
            made = events.detector(kind, known, seed)
            seconds = time.perf_counter() - began
            *own, every = events.worth(made, held)
            rows.setdefault(kind, []).append(dict(own) | {"seconds": seconds})
        rows.setdefault("every second frame", []).append({"F1@0.05": every[1]})
    names = ("F1@0.05", "F1@0.25", "mean", "seconds")
    print(f"{'--events':20}" + "".join(f"{name:>10}" for name in names))
    for kind, found in rows.items():
        means = {n: statistics.mean(x[n] for x in found) for n in names if n in found[0]}
        print(f"{kind:20}" + "".join(f"{means[n]:10.3f}" for n in means))
        study.append("boundaries", {
            "events": kind, "world": cfg.world, "seeds": args.seeds, "episodes": args.episodes,
            "each": [round(x["F1@0.05"], 4) for x in found],
            **{n: round(v, 4) for n, v in means.items()},
        })  # fmt: skip


if __name__ == "__main__":
    common.run_main(main)
