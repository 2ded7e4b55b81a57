"""Milliseconds from an observation to the actions, by part, and episodes a minute.

  python bench/latency.py                    # the three methods untrained, on the embedded backbone
  python bench/latency.py --random           # at the papers' sizes with random weights: for a GPU
  python bench/latency.py --method twinbrain -- --euler 10     # behind --: the script's own flags
  python bench/latency.py RUN/teacher RUN/finetune ...         # trained runs

One world asks; medians of `--repeats` plans, the variants of a method taking turns. A plan is a
chunk, of which `execute` actions are executed; VITA-VLA plans at each step, and its number is the
mean over a history that grows from empty to full, and as many steps again. Variants: the head's
keys made anew in each Euler step instead of once, what VITA-VLA keeps of its history left out,
DualVLA asked to reason first (words: as many as it says, `--talk` at most; a random model seldom
stops), on a GPU all weights stored in bfloat16 instead of being cast in each plan.

Episodes a minute: `--worlds` worlds planned for at once beside one alone, `--seconds` each, counted
in episodes of full length, as untrained policies make them.
"""

import argparse
import gc
import json
import statistics
import sys
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import methods  # noqa: E402
import numpy as np  # noqa: E402
import torch  # noqa: E402
from study import append, machine  # noqa: E402

import common  # noqa: E402
from worlds import loop  # noqa: E402

PRESETS = {"twinbrain": "paper", "vita_vla": "calvin", "dualvla": "paper"}
STAGES = {"twinbrain": [""], "vita_vla": ["teacher", "finetune"], "dualvla": ["dual"]}


# --- what is left out or put in -------------------------------------------------------------------


@contextmanager
def changed(owner, **values):
    before = {name: getattr(owner, name) for name in values}
    for name, value in values.items():
        setattr(owner, name, value)
    yield
    for name, value in before.items():
        setattr(owner, name, value)


def keys_anew(head, prepare):
    """The head's `prepare` runs in each Euler step instead of once."""
    make, forward = getattr(head, prepare), head.forward
    words = {prepare: lambda *given: given}
    words["forward"] = lambda x, t, given: forward(x, t, make(*given))
    return changed(head, **words)


@contextmanager
def reasoning(policy, random):
    """It reasons first; with random weights, which name no word more than another, all the way."""
    model, cfg = policy.model, policy.cfg
    talks = {"speak": 0.0} if random else {}
    with changed(policy, form="reason"), changed(cfg, **talks):
        with changed(model, **({"first": 1 << 30, "end": -1} if random else {})):
            yield


def variants(method, policy, random):
    """-> {name: a function that makes the context in which the policy acts so}."""
    model, usual = policy.model, {"as it acts": nullcontext}
    if method == "twinbrain":
        return usual | {"keys anew": lambda: keys_anew(model.expert, "keys")}
    if method == "dualvla":
        policy.form = "plain"
        return {
            "no reasoning": nullcontext,
            "no reasoning, keys anew": lambda: keys_anew(model.flow, "prefix"),
            "reasons first": lambda: reasoning(policy, random),
        }
    if policy.cfg.stage == "teacher":
        return usual
    return usual | {"nothing kept": lambda: changed(policy.cfg, cache=False)}


# --- one world ------------------------------------------------------------------------------------


def plan(policy, observation, words, clock):
    """-> {part: seconds} of a plan, the mean over a growing history where there is one."""
    steps = 2 * getattr(policy.cfg, "history", 0) or 1
    memory, rng = {}, np.random.default_rng(0)
    clock.mark("rest")
    for _ in range(steps):
        policy.act([observation | {"memory": memory}], [words], rng)
    return {part: spent / steps for part, spent in clock.read().items()}


def latency(method, policy, args):
    """-> {variant: {part: median ms}} of one world, "all" among the parts."""
    world, clock = place(policy.cfg), methods.Clock(args.busy)
    methods.watch(method, policy.model, clock)
    observation, ways = world.reset(0), variants(method, policy, args.random)
    times, words = {name: [] for name in ways}, {}
    for _ in range(args.repeats + 1):
        for name, way in ways.items():
            with way():
                spent = plan(policy, observation, world.instruction, clock)
                words[name] = [len(said.split()) for said in getattr(policy, "said", [])]
            times[name].append(spent | {"all": sum(spent.values())})
    found = {}
    for name, mine in times.items():
        parts = {part for spent in mine for part in spent}
        found[name] = {
            p: round(1000 * statistics.median(s.get(p, 0.0) for s in mine[1:]), 2) for p in parts
        }
        if words[name]:
            found[name]["words"] = words[name][0]
    return found


def place(cfg):
    World, suite = loop.find(cfg.world)
    return World(suite, cfg.size, cfg.wrist_size)


# --- many worlds ----------------------------------------------------------------------------------


class Enough(Exception):
    """The time for a measurement is over."""


class Timed:
    """A policy that counts its plans, the first one not, and stops after some seconds."""

    def __init__(self, policy, seconds, now):
        self.policy, self.seconds, self.plans, self.began = policy, seconds, 0, None
        self.now = now

    def act(self, observations, instructions, rng):
        now = self.now()
        self.spent = now - (self.began or now)
        if self.began and self.spent > self.seconds:
            raise Enough
        self.plans += len(observations) if self.began else 0
        out = self.policy.act(observations, instructions, rng)
        self.began = self.began or self.now()
        return out


def episodes_a_minute(policy, worlds, args):
    """In episodes of full length; the worlds' own steps and pictures are in it."""
    cfg, timed = policy.cfg, Timed(policy, args.seconds, methods.Clock(args.busy).now)
    starts = loop.starts_of(cfg.world, "in", worlds, cfg.seed)
    try:
        while True:
            loop.rollout(timed, cfg, cfg.world, starts)
    except Enough:
        pass
    world = place(cfg)
    world.reset(*starts[0])
    steps = timed.plans * (1 if cfg.ensemble else cfg.execute)
    return 60 * steps / world.max_steps / timed.spent


# --- the table ------------------------------------------------------------------------------------


def report(method, name, policy, args):
    found = latency(method, policy, args)
    rates = [episodes_a_minute(policy, n, args) for n in (1, args.worlds)]
    parts = dict.fromkeys(p for parts in found.values() for p in sorted(parts))
    parts = [p for p in parts if p not in ("all", "rest", "words")] + ["rest", "all"]
    print(f"{name + ', ms a plan':34}" + "".join(f"{v:>26}" for v in found))
    usual = next(iter(found.values()))["all"]
    for part in parts:
        cells = [f"{x.get(part, 0):.1f} {x.get(part, 0) / x['all']:5.0%}" for x in found.values()]
        print(f"  {part:32}" + "".join(f"{cell:>26}" for cell in cells))
    print(f"  {'of the first':32}" + "".join(f"{x['all'] / usual:>26.2f}" for x in found.values()))
    if any("words" in x for x in found.values()):
        print(f"  {'words said':32}" + "".join(f"{x.get('words', 0):>26}" for x in found.values()))
    print(f"  episodes a minute: {rates[0]:.1f} one at a time, {rates[1]:.1f} with {args.worlds} "
          f"at once, {rates[1] / rates[0]:.1f} times")  # fmt: skip
    cfg = policy.cfg
    about = {"method": method, "stage": getattr(cfg, "stage", ""), "backbone": cfg.backbone}
    about |= {"random": args.random, "trained": bool(args.runs), "execute": cfg.execute}
    kinds = {str(p.dtype)[6:] for p in policy.model.parameters()}
    about |= {"weights": ", ".join(sorted(kinds)), "busy": args.busy, "note": args.note}
    for variant, row in found.items():
        spent = {part: row.get(part, 0.0) for part in parts if part != "all"}
        row = {"variant": variant, "ms": row["all"], "parts_ms": spent, "words": row.get("words")}
        row |= {"of_the_first": round(row["ms"] / usual, 3)}
        append("latency", row | about)
    rates = {f"episodes_a_minute_{n}": round(r, 2) for n, r in zip((1, args.worlds), rates)}
    append("latency", {"variant": "rollouts"} | rates | about)


def bf16(policy):
    """All weights stored in bfloat16, as autocast would cast them."""
    policy.model.requires_grad_(False)
    for p in policy.model.parameters():
        p.data = p.data.bfloat16()
    return policy


def policies(args, flags):
    """-> method, a name, a function that makes the policy."""
    for folder in args.runs:
        names = "config.json", "chain.json", "meta.json"
        files = [f for f in (Path(folder, n) for n in names) if f.exists()]
        if not files:
            raise common.UserError(f"{folder}: no run folder, there is no {folder}/config.json")
        method = json.loads(files[0].read_text())["method"]
        yield method, folder, partial(methods.SCRIPTS[method].load_policy, folder, methods.DEVICE)
    for method in () if args.runs else args.method or methods.SCRIPTS:
        real = ["--preset", PRESETS[method], "--frozen", "bf16"] if args.random else []
        for stage in STAGES[method]:
            cfg = methods.config(method, [*real, *flags], stage)
            name = f"{method} {stage}".strip()
            yield method, name, partial(methods.policy, method, cfg, args.random)


def arguments(words):
    """-> this script's own, the methods' flags behind --."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("runs", nargs="*", help="run folders; none: untrained models")
    parser.add_argument("--method", nargs="+", choices=methods.SCRIPTS, help="some of the three")
    parser.add_argument("--random", action="store_true", help="the papers' sizes, random weights")
    parser.add_argument("--repeats", type=int, default=10, help="plans of each variant")
    parser.add_argument("--worlds", type=int, default=16, help="planned for at once")
    parser.add_argument("--seconds", type=float, default=5.0, help="for each rate of episodes")
    parser.add_argument("--busy", action="store_true", help="the processor's seconds, not wall's")
    parser.add_argument("--note", default="", help="said beside the numbers")
    end = words.index("--") if "--" in words else len(words)
    return parser.parse_args(words[:end]), words[end + 1 :]


def main():
    args, flags = arguments(sys.argv[1:])
    measured = 0
    for method, name, make in policies(args, flags):
        try:
            policy = make()
            report(method, name, policy, args)
            measured += 1
            if methods.DEVICE.type == "cuda":
                report(method, f"{name}, weights in bfloat16", bf16(policy), args)
        except torch.OutOfMemoryError:
            print(f"{name}: out of the GPU's memory")
        policy = None
        gc.collect()  # what a clock watches refers to itself
        torch.cuda.empty_cache()
    print(f"{machine()}; {args.note}")
    if not measured:
        raise common.UserError("none of them fits in this GPU's memory")


if __name__ == "__main__":
    common.run_main(main)
