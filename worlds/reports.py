"""What dualvla.py prints and draws beside training: a Pareto plot, pruning, a chain's outcome."""

import numpy as np

import common
from worlds import ablations, events, pictures


def pareto(rows, numbers, folder):
    """--show pareto: what `--ablation list` prints; the rows of the paper's table and their
    specialist (E) as points of a picture, a line through those that no other beats in both."""
    means = ablations.show("dualvla", rows, "paper %", "% success, answers", numbers)
    means = {name: mean for name, mean in means.items() if rows[name]["_paper"]}
    chains = [r["stages"]["expert"] for r in common.result_lines("dualvla")
              if r["arm"] == "ours" and not r["flags"]]  # fmt: skip
    if chains:
        means["E, silent"] = np.mean([numbers(r) for r in chains], axis=0)
    points = {n: (answers, success) for n, (success, answers) in means.items()}
    best = sorted(p for p in points.values() if not any(
        q[0] >= p[0] and q[1] >= p[1] and q != p for q in points.values()))  # fmt: skip
    curves = {"unbeaten": best} | {name: [point] for name, point in points.items()}
    names = "actions against answers", "answers %", "success %"
    pictures.plot_curves(folder / "pareto.png", curves, *names)
    print(f"wrote {folder / 'pareto.png'}")


def pruning(told, keep, seed, tokenizer, folder):
    """--show pruning. told: (episode, scene, action labels) of those with reasoning; keep: scene,
    action, --prune, rng -> frames that keep it."""
    episodes = [e for e, _, _ in told]
    lengths = {text: len(tokenizer.encode(text)) for e in episodes for text in set(e.reasoning)}
    words = np.array([lengths[text] for e in episodes for text in e.reasoning])
    print(f"{'--prune':8} {'frames':>8} {'kept':>8} {'share':>7} {'words':>9} {'words left':>10}")
    for rule in ("none", "both", "action", "scene", "either", "random"):
        rng = np.random.default_rng(seed)
        stays = np.concatenate([keep(s, a, rule, rng) for _, s, a in told])
        row = f"{rule:8} {len(stays):8} {stays.sum():8} {stays.mean():7.1%}"
        print(f"{row} {words.sum():9} {words[stays].sum():10}")
    episode, scene, action = told[0]
    labels = {"action": action, "scene": scene, "kept": keep(scene, action, "both")}
    events.timeline(folder / "pruning.png", episode, labels)
    print(f"an episode's timeline: {folder / 'pruning.png'}")


def stages(results, say=print):
    """A chain's outcome: a line for each way in which a stage is asked, without what was not
    measured (`--world none`)."""

    def cell(value, width, form):
        return f"{'-' if value is None else format(value, form):>{width}}"

    heads = f"{'success':>8} {'answers':>8} {'VLA Score':>9} {'ms/plan':>8} words"
    say(f"{'stage':10} {'form':7} {heads}")
    for stage, r in results.items():
        for form, f in r["forms"].items():
            success = next((d["success"] for d in f["domains"].values()), None)
            last = form == list(r["forms"])[-1]
            vla = r["vla_score"]["score"] if r["vla_score"] and last else None
            cells = cell(success, 8, ".1%"), cell(r["answers"], 8, ".1%"), cell(vla, 9, ".3f")
            cells += cell(f.get("ms"), 8, ".1f"), cell(f.get("words"), 0, ".1f")
            say(f"{stage:10} {form:7} {' '.join(cells)}")
