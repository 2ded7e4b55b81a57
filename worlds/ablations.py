"""`--ablation list` of a script: the rows of its ablations, the paper's numbers and ours."""

import numpy as np

import common


def row(paper, words, **overrides):
    """A row of ablations: the paper's number, if it has one, what it is called, flags."""
    return dict(_paper=paper, _row=words, **overrides)


def show(method, rows, paper, ours, numbers):
    """Prints rows {--ablation: {"_row": words, "_paper": number or None, flags}} beside the means
    over seeds of `numbers(line)`, of assets/results' lines on the tabletop; paper, ours: what the
    two columns hold. -> {name: means of the runs without further flags}."""
    plain, lines = {}, common.result_lines(method)
    lines = [r for r in lines if r["world"].startswith("tabletop")]
    lines = [r for r in lines if "--eval-only" not in r["flags"]]  # those are asked again
    print(f"{'--ablation':18} {'row':45} {paper:>24}   ours, {ours} (seeds) flags")
    for name, about in rows.items():
        found = {}
        for r in lines:
            if r["arm"] == name:
                flags = r["flags"].partition("--distill")[0].strip()
                found.setdefault(flags, []).append(numbers(r))
        means = {flags: np.mean(np.array(v, float), axis=0) for flags, v in found.items()}
        plain |= {name: means[""]} if "" in means else {}
        cells = [
            f"{', '.join(f'{x:.3g}' for x in mean if x == x)} ({len(found[flags])}) {flags}".strip()
            for flags, mean in sorted(means.items())
        ]
        told = about["_paper"] or "-"
        print(f"{name:18} {about['_row']:45} {told:>24}   {'; '.join(cells) or 'not run'}")
    return plain
