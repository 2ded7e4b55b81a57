"""Steps of the embedded world in a second on one core, with the pictures that policies see.

  python bench/world.py [--size 64 --wrist-size 32 --seconds 3]

A step is its physics and the drawing: of the static camera alone, then of both cameras, as
`observe()` gives them. The expert moves the hand; its thinking is not counted. Suites take turns.
"""

import argparse
import statistics
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from study import append, machine  # noqa: E402

import common  # noqa: E402
from worlds.tabletop import SUITES, Expert, Tabletop  # noqa: E402


def rate(suite, args, busy=time.process_time):
    """-> steps a second: physics alone, with the static picture, with both."""
    world, spent, steps, seed = Tabletop(suite, args.size, args.wrist_size), [0.0] * 3, 0, 0
    while spent[2] < args.seconds:
        world.reset(seed)
        expert, seed = Expert(world), seed + 1
        while not world.success and world.steps < world.max_steps:
            action = expert.act()
            marks = [busy()]
            world.step(action)
            marks.append(busy())
            world.render(args.size)
            marks.append(busy())
            world.render(args.wrist_size, True)
            marks.append(busy())
            spent = [s + mark - marks[0] for s, mark in zip(spent, marks[1:])]
            steps += 1
    return [steps / s for s in spent]


def arguments(words):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", type=int, default=64)
    parser.add_argument("--wrist-size", type=int, default=32)
    parser.add_argument("--seconds", type=float, default=3.0, help="of a suite and round")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--note", default="", help="said beside the numbers")
    return parser.parse_args(words)


def main():
    args = arguments(sys.argv[1:])
    turns = [{suite: rate(suite, args) for suite in SUITES} for _ in range(args.rounds)]
    print(f"{'steps a second of one core':28}{'physics':>10}{'static':>10}{'both':>10}")
    for suite in SUITES:
        found = [round(statistics.median(column)) for column in zip(*(t[suite] for t in turns))]
        print(f"{suite:28}" + "".join(f"{n:10,}" for n in found))
        row = {"suite": suite, "physics": found[0], "static": found[1], "both": found[2]}
        append("world", row | {"size": args.size, "wrist_size": args.wrist_size, "note": args.note})
    print(f"{args.size} and {args.wrist_size} px; {machine()}; {args.note}")


if __name__ == "__main__":
    common.run_main(main)
