"""`vita_vla.py --ablation list`: the rows of its ablations, the paper's numbers and ours."""

import numpy as np

import common


def show(rows):
    """rows: {--ablation: {"_row": words, "_paper": "% first, length" or None, flags}}; ours are the
    means over seeds of assets/results/vita_vla.jsonl."""
    lines = common.result_lines("vita_vla")
    print(f"{'--ablation':16} {'row':42} {'paper: % first, length':22}  ours (seeds)")
    for name, about in rows.items():
        found = {}
        for r in lines:
            if r["arm"] == name:
                first = r["domains"].get("chain", r)["success"]
                found.setdefault(r["flags"], []).append((100 * first, r["length"]))
        ours = "; ".join(
            "{:.1f}, {:.2f} ({}) {}".format(*np.mean(v, 0), len(v), flags).strip()
            for flags, v in found.items()
        )
        print(f"{name:16} {about['_row']:42} {about['_paper'] or '-':22}  {ours or 'not run'}")
