"""Closed loop: any policy, many worlds side by side, success rates with their intervals.

A policy has `act(observations, instructions, rng) -> (n, H, A)` action chunks in the world's units
and `view(observation, instruction) -> picture or None`, a panel of its own for the films. With an
observation comes "memory", a dict for the policy's own use that lasts as long as its world's goal.
"""

import numpy as np

import common
from worlds import pictures, tabletop
from worlds.client import blend

FIRST_TEST_SEED = 10_000_000  # demonstrations of --seed s take theirs from 20_000_000 s on
EXTRA = {"abc_d": ("chain",), "franka": ("pick_all",)}  # evaluations of one suite alone


def suite_of(world):
    """`--world tabletop:SUITE` (bridge if left out) -> SUITE; anything else is an error."""
    kind, _, suite = world.partition(":")
    suite = suite or "bridge"
    if kind != "tabletop" or suite not in tabletop.SUITES:
        known = [f"tabletop:{name}" for name in tabletop.SUITES]
        near = common.nearest(world, known)
        raise common.UserError(f"unknown --world {world}: did you mean {near}? ({' '.join(known)})")
    return suite


def domains_of(suite, asked):
    """The asked evaluation domains, or all of the suite's; an unknown one is an error."""
    known = ("in", "look", "colour", "shape", "pair", "wording") + EXTRA.get(suite, ())
    for name in asked:
        if name not in known:
            near = common.nearest(name, known)
            raise common.UserError(f"unknown --domains {name} for {suite}: did you mean {near}?")
    return asked or known


def starts_of(suite, domain, episodes, seed):
    """-> [(world seed, task, domain)] of an evaluation; the same for every policy."""
    first = FIRST_TEST_SEED + seed * 100_000
    if domain == "chain":
        return [(first + i, "chain", "look") for i in range(episodes)]
    if domain == "pick_all":
        return [(first + i, "pick_all", "in") for i in range(episodes)]
    tasks = tabletop.TRAIN_TASKS[suite]
    return [(first + i, tasks[i % len(tasks)], domain) for i in range(episodes)]


def rollout(policy, cfg, suite, starts, film=0):
    """Acts in one world per start until success or the world's step limit.

    Every `--execute` steps (or each step, with `--ensemble`) the policy plans for all of them at
    once. -> goals reached in a row by each (a chain has five, anything else one), films [[frame]].
    """
    rng = np.random.default_rng(cfg.seed)
    worlds = [tabletop.Tabletop(suite, cfg.size, cfg.wrist_size) for _ in starts]
    for world, (seed, task, domain) in zip(worlds, starts):
        world.chain(seed) if task == "chain" else world.reset(seed, task, domain)
    chunks, used = [[] for _ in worlds], [0] * len(worlds)  # plans; actions taken of the newest
    age, reached = [0] * len(worlds), [0] * len(worlds)
    live, films = list(range(len(worlds))), [[] for _ in range(film)]
    memory = [{} for _ in worlds]
    every = 1 if cfg.ensemble else cfg.execute
    while live:
        due = [i for i in live if not chunks[i] or used[i] == every]
        if due:
            seen = [worlds[i].observe() | {"memory": memory[i]} for i in due]
            words = [worlds[i].instruction for i in due]
            for i, chunk in zip(due, policy.act(seen, words, rng)):
                chunks[i], used[i] = (chunks[i] + [chunk])[-7:], 0
        for i in live:
            world = worlds[i]
            world.step(blend(chunks[i]) if cfg.ensemble else chunks[i][-1][used[i]])
            used[i], age[i] = used[i] + 1, age[i] + 1
            if i < film:
                films[i].append(draw(policy, world, age[i]))
            over = age[i] >= world.max_steps
            if world.success:
                reached[i] += 1
                over = starts[i][1] != "chain" or not world.next_goal()
                if not over:  # the next goal of a chain: no plan for the last one outlives it
                    chunks[i], age[i], memory[i] = [], 0, {}
            if over:
                age[i] = None
        live = [i for i in live if age[i] is not None]
    return reached, films


def draw(policy, world, step):
    """One frame of a film: the cameras, the policy's own view, instruction, step and success."""
    observation = world.observe()
    views = list(observation["images"].values())
    extra = policy.view(observation, world.instruction)
    words = [world.instruction, f"step {step}" + (", success" if world.success else "")]
    views += [] if extra is None else [extra]
    return pictures.caption_frame(views, words, scale=4, success=world.success or None)


def evaluate(policy, cfg, dist, folder, say=print):
    """Success in each domain -> {domain: {"success", "ci95", "episodes", "per_task"}}.

    A chain counts its first goal as success and reports the rates at 1..5 and the average length
    besides. Rank 0 writes rollout-<domain>-<i>.gif for the first `--gifs` episodes of each.
    """
    suite, results = suite_of(cfg.world), {}
    for domain in domains_of(suite, cfg.domains):
        starts = starts_of(suite, domain, cfg.episodes, cfg.seed)
        mine, reached = range(dist.rank, len(starts), dist.processes), {}
        for first in range(0, len(mine), cfg.parallel):
            some = mine[first : first + cfg.parallel]
            film = min(cfg.gifs, len(some)) if dist.main and first == 0 else 0
            goals, films = rollout(policy, cfg, suite, [starts[i] for i in some], film)
            reached |= dict(zip(some, goals))
            for i, frames in enumerate(films):
                pictures.save_gif(folder / f"rollout-{domain}-{i}.gif", frames, fps=8)
        reached = {i: n for part in dist.gather(reached) for i, n in part.items()}
        wins = {i: n > 0 for i, n in reached.items()}
        per_task = {task: [] for _, task, _ in starts}
        for i, won in sorted(wins.items()):
            per_task[starts[i][1]].append(won)
        results[domain] = {
            "success": sum(wins.values()) / len(wins),
            "ci95": common.ci95(sum(wins.values()), len(wins)),
            "episodes": len(wins),
            "per_task": {task: sum(won) / len(won) for task, won in per_task.items()},
        }
        low, high = results[domain]["ci95"]
        words = f"  {domain:8} success {results[domain]['success']:6.1%}"
        words += f"  (95%: {low:.1%} to {high:.1%}, {len(wins)} episodes)"
        if domain == "chain":
            rates = [sum(n >= k for n in reached.values()) / len(reached) for k in range(1, 6)]
            results[domain] |= {"at": rates, "length": sum(rates)}
            words += f"; in a row {' '.join(f'{r:.1%}' for r in rates)}, average {sum(rates):.2f}"
        say(words)
    return results
