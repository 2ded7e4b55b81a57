"""Closed loop: any policy, many worlds side by side, success rates with their intervals.

A policy has `act(observations, instructions, rng) -> (n, H, A)` action chunks in the world's units.
It may have `views(observations, instructions) -> pictures, or nothing`, panels of its own for the
films, `said`, what it said before each of the last chunks, and `stats`, what it was trained on,
which must suit the world. With an observation comes "memory", a dict for the policy's own use that
lasts as long as its world's goal.
"""

import importlib
import multiprocessing
import os
import signal
import traceback
from functools import partial

import numpy as np

import common
from worlds import pictures
from worlds.client import blend

FIRST_TEST_SEED = 10_000_000  # demonstrations of --seed s take theirs from 20_000_000 s on
OUTSIDE = "colour", "shape", "pair", "wording"  # what no demonstration has; their mean is "out"
NOTHING = {"success": None, "ci95": None, "episodes": 0, "per_task": {}}  # of `--world none`
WORLDS = {  # `--world NAME`: its class; what it fulfils is in worlds/__init__.py
    "tabletop": "worlds.tabletop:Tabletop",
    "metaworld": "worlds.metaworld:MetaWorld",
}


def find(world):
    """`--world NAME:SUITE` -> its class, the suite ("" if left out); anything else is an error."""
    name, _, suite = world.partition(":")
    try:
        if name not in WORLDS:
            raise LookupError(name, list(WORLDS))
        module, _, kind = WORLDS[name].partition(":")
        World = getattr(importlib.import_module(module), kind)
        World.offers(suite)
    except LookupError as error:
        word, known = error.args
        near = world.replace(word, common.nearest(word, known), 1)
        known = known[:12] + ["..."] * (len(known) > 12)
        words = f"unknown --world {world}: did you mean {near}? ({' '.join(known)})"
        raise common.UserError(words) from None
    return World, suite


def known(world):
    """Whether `find()` finds it."""
    try:
        return bool(find(world))
    except common.UserError:
        return False


def domains_of(world, asked):
    """The asked evaluation domains, or all of the world's; an unknown one is an error."""
    if world == "none":
        return ()
    World, suite = find(world)
    _, known = World.offers(suite)
    for name in asked:
        if name not in known:
            near = common.nearest(name, known)
            where = suite or world
            raise common.UserError(f"unknown --domains {name} for {where}: did you mean {near}?")
    return asked or known


def check(cfg):
    """Whether the world, the domains and the way to render exist, before anything is spent. Of the
    domains that a preset names, or a run's own elsewhere, those stay that the world has."""
    if "domains" not in getattr(cfg, "explicit", ["domains"]):
        cfg.domains = tuple(d for d in cfg.domains if d in domains_of(cfg.world, ()))
    if domains_of(cfg.world, cfg.domains):
        World, suite = find(cfg.world)
        World(suite, cfg.size, cfg.wrist_size)  # says which package it lacks
    pictures.check(cfg.render)


def starts_of(world, domain, episodes, seed):
    """-> [(world seed, task, domain)] of an evaluation; the same for every policy."""
    first = FIRST_TEST_SEED + seed * 100_000
    if domain == "chain":
        return [(first + i, "chain", "look") for i in range(episodes)]
    if domain == "pick_all":
        return [(first + i, "pick_all", "in") for i in range(episodes)]
    World, suite = find(world)
    same = World.untouched(suite, domain) if hasattr(World, "untouched") else ()
    tasks = [task for task in World.offers(suite)[0] if task not in same]
    return [(first + i, tasks[i % len(tasks)], domain) for i in range(episodes)]


class Crew:
    """`n` worlds, asked together; slow ones live in other processes, each with its share of them.

    ask({i: (what, *arguments)}): what is a method's name, or a function of the world that another
    process can import -> {i: what it returned}. `facts[i]`: success, instruction, max_steps.
    """

    def __init__(self, world, n, size, wrist_size):
        World, suite = find(world)
        self.facts, self.hands, self.pipes = {}, [], []
        self.make = partial(World, suite, size, wrist_size)
        self.worlds = [] if World.slow else [self.make() for _ in range(n)]
        for _ in range(min(n, os.cpu_count()) if World.slow else 0):
            here, there = multiprocessing.Pipe()
            hand = multiprocessing.Process(target=work, args=(self.make, there), daemon=True)
            hand.start()
            there.close()  # so that the end of a process is noticed
            self.hands.append(hand)
            self.pipes.append(here)

    def ask(self, calls):
        answers, P = {}, len(self.pipes)
        if not P:
            answers = {i: call(self.worlds[i], *what) for i, what in calls.items()}
        for p, pipe in enumerate(self.pipes):
            pipe.send({i // P: what for i, what in calls.items() if i % P == p})
        for p, pipe in enumerate(self.pipes):
            try:
                failure, given = pipe.recv()
            except EOFError:
                failure = RuntimeError(f"the process of world {p} has ended")
            if failure:
                self.close()
                raise failure
            answers |= {i * P + p: answer for i, answer in given.items()}
        self.facts |= {i: facts for i, (_, facts) in answers.items()}
        return {i: answer for i, (answer, _) in answers.items()}

    def close(self):
        for pipe, hand in zip(self.pipes, self.hands):
            try:
                pipe.send(None)
            except OSError:  # it has ended before
                pass
            hand.join(2)
            hand.terminate()
            pipe.close()
        self.hands, self.pipes = [], []

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()


def call(world, what, *arguments):
    """-> the answer; success, instruction and step limit as they are then."""
    act = getattr(world, what) if isinstance(what, str) else partial(what, world)
    answer = act(*arguments)
    return answer, (world.success, world.instruction, world.max_steps)


def work(make, pipe):
    """A process of a Crew: answers until it is sent None."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the process that asks
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    worlds = {}
    while (calls := pipe.recv()) is not None:
        try:
            for i in calls.keys() - worlds:
                worlds[i] = make()
            pipe.send((None, {i: call(worlds[i], *what) for i, what in calls.items()}))
        except common.UserError as error:
            pipe.send((error, {}))
        except Exception:  # the one who asked shows where it happened
            pipe.send((RuntimeError(traceback.format_exc()), {}))


def measures(world):
    """-> names of its cameras, how many numbers an action has"""
    return list(world.observe()["images"]), len(world.expert(0, 0.0).act())


def suits(stats, name, cameras, width):
    """Whether a policy trained on `stats` can act in a world: as many cameras, actions as wide."""
    own, seen = len(stats["action"]["q01"]), stats.get("cameras") or cameras
    if (len(seen), own) != (len(cameras), width):
        there = f"{len(cameras)} cameras ({', '.join(cameras)}) and actions of {width} numbers"
        here = f"{len(seen)} ({', '.join(seen)}) and {own}"
        raise common.UserError(f"--world {name} has {there}, the policy was trained with {here}")


def foresee(cfg, stats):
    """Before a policy learns from other recordings of these statistics: whether it can act."""
    if cfg.data and cfg.world != "none":
        domain = domains_of(cfg.world, cfg.domains)[0]
        (start,) = starts_of(cfg.world, domain, 1, cfg.seed)
        with Crew(cfg.world, 1, cfg.size, cfg.wrist_size) as crew:
            crew.ask({0: begin(start)})
            suits(stats, cfg.world, *crew.ask({0: (measures,)})[0])


def begin(start):
    """How an episode of starts_of() begins in its world."""
    seed, task, domain = start
    return ("chain", seed) if task == "chain" else ("reset", seed, task, domain)


def rollout(policy, cfg, world, starts, film=0, crew=None):
    """Acts in one world per start until success or the world's step limit.

    Every `--execute` steps (or each step, with `--ensemble`) the policy plans for all of them at
    once. -> goals reached in a row by each (a chain has five, anything else one), films [[frame]].
    """
    if crew is None:
        with Crew(world, len(starts), cfg.size, cfg.wrist_size) as crew:
            return rollout(policy, cfg, world, starts, film, crew)
    n, rng, stride = len(starts), np.random.default_rng(cfg.seed), film_stride(world)[0]
    crew.ask(dict(enumerate(map(begin, starts))))
    if stats := getattr(policy, "stats", None):
        suits(stats, world, *crew.ask({0: (measures,)})[0])
    chunks, used = [[] for _ in starts], [0] * n  # plans; actions taken of the newest
    age, reached, said = [0] * n, [0] * n, [""] * n
    live, films, taken = list(range(n)), [[] for _ in range(film)], [[] for _ in range(film)]
    memory = [{} for _ in starts]
    every = 1 if cfg.ensemble else cfg.execute
    while live:
        due = [i for i in live if not chunks[i] or used[i] == every]
        if due:
            seen = crew.ask({i: ("observe",) for i in due})
            seen = [seen[i] | {"memory": memory[i]} for i in due]
            plans = policy.act(seen, [crew.facts[i][1] for i in due], rng)
            spoken = getattr(policy, "said", None) or [""] * len(due)
            for i, chunk, words in zip(due, plans, spoken):
                chunks[i], used[i], said[i] = (chunks[i] + [chunk])[-7:], 0, words
        now = {i: blend(chunks[i]) if cfg.ensemble else chunks[i][-1][used[i]] for i in live}
        crew.ask({i: ("step", action) for i, action in now.items()})
        for i in live:
            used[i], age[i] = used[i] + 1, age[i] + 1
            success, words, limit = crew.facts[i]
            over = success or age[i] >= limit
            if i < film:
                taken[i].append(now[i])
                if over or age[i] % stride == 0:
                    scene = crew.ask({i: ("observe",)})[i], words, said[i], len(taken[i])
                    films[i].append((*scene, success if over else None))
            if success:
                reached[i] += 1
                over = starts[i][1] != "chain" or not crew.ask({i: ("next_goal",)})[i]
                if not over:  # the next goal of a chain: no plan for the last one outlives it
                    chunks[i], age[i], memory[i] = [], 0, {}
            if over:
                age[i] = None
        live = [i for i in live if age[i] is not None]
    return reached, [draw(policy, cfg, *film) for film in zip(films, taken)]


def film_stride(world):
    """Steps from one frame of a film to the next, and its frames in a second: in real time, but a
    world of few steps in a second is shown a little faster."""
    World, _ = find(world)
    stride = max(1, int(World.fps // 10))
    return stride, max(8.0, World.fps / stride)


def draw(policy, cfg, scenes, actions):
    """The frames of a film, from its scenes (observation, instruction, what was said before this
    plan, actions so far, how it ended (None: not yet)): the cameras, the policy's own view, the
    actions, the words."""
    frames, views = [], getattr(policy, "views", lambda *_: None)
    at_once = min(16, cfg.parallel)
    for first in range(0, len(scenes), at_once):
        some = scenes[first : first + at_once]
        own = views([scene[0] for scene in some], [scene[1] for scene in some])
        own = own or [None] * len(some)
        for (observation, words, said, step, success), extra in zip(some, own):
            shown = [*observation["images"].values()] + ([] if extra is None else [extra])
            scale = max(1, 256 // len(shown[0]))
            shown.append(pictures.trace(actions[:step], scale * len(shown[0])))
            how = {None: "", True: ", success", False: ", failure"}[success]
            lines = [words, *([said] if said else []), f"step {step}{how}"]
            frames.append(pictures.caption_frame(shown, lines, scale, success))
    return frames


def evaluate(policy, cfg, dist, folder, say=print):
    """Success in each domain -> {domain: {"success", "ci95", "episodes", "per_task"}}.

    A chain counts its first goal as success and reports the rates at 1..5 and the average length
    besides. Rank 0 writes rollout-<domain>-<i> for the first `--gifs` episodes of each, as a GIF or
    as `--render` says.
    """
    if cfg.world == "none":
        say("not acted: --world none")
        return {}
    say("closed loop:")
    results, most = {}, min(cfg.parallel, -(-cfg.episodes // dist.processes))
    with Crew(cfg.world, most, cfg.size, cfg.wrist_size) as crew:
        for domain in domains_of(cfg.world, cfg.domains):
            starts = starts_of(cfg.world, domain, cfg.episodes, cfg.seed)
            mine, reached = range(dist.rank, len(starts), dist.processes), {}
            for first in range(0, len(mine), cfg.parallel):
                some = mine[first : first + cfg.parallel]
                film = min(cfg.gifs, len(some)) if dist.main and first == 0 else 0
                these = [starts[i] for i in some]
                goals, films = rollout(policy, cfg, cfg.world, these, film, crew)
                reached |= dict(zip(some, goals))
                for i, frames in enumerate(films):
                    place = folder / f"rollout-{domain}-{i}"
                    pictures.render(place, frames, film_stride(cfg.world)[1], cfg.render)
            reached = {i: n for part in dist.gather(reached) for i, n in part.items()}
            results[domain] = tally(domain, starts, reached, say)
    return results


def headline(results):
    """What evaluate() found in the first domain, the run's own: a result's first numbers."""
    first = next(iter(results.values()), NOTHING)
    return {name: first[name] for name in NOTHING}


def tally(domain, starts, reached, say):
    """Goals that each start's world reached, {i: n} -> the domain's entry of the results."""
    wins = {i: n > 0 for i, n in reached.items()}
    per_task = {task: [] for _, task, _ in starts}
    for i, won in sorted(wins.items()):
        per_task[starts[i][1]].append(won)
    low, high = common.ci95(sum(wins.values()), len(wins))
    result = {
        "success": sum(wins.values()) / len(wins),
        "ci95": (low, high),
        "episodes": len(wins),
        "per_task": {task: sum(won) / len(won) for task, won in per_task.items()},
    }
    words = f"  {domain:8} success {result['success']:6.1%}"
    words += f"  (95%: {low:.1%} to {high:.1%}, {len(wins)} episodes)"
    if domain == "chain":
        rates = [sum(n >= k for n in reached.values()) / len(reached) for k in range(1, 6)]
        result |= {"at": rates, "length": sum(rates)}
        words += f"; in a row {' '.join(f'{r:.1%}' for r in rates)}, average {sum(rates):.2f}"
    say(words)
    return result
