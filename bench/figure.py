"""Draws the figures of README and docs from a run's films and from the result lines.

  python bench/figure.py runs/NAME        # assets/figures/rollouts.png: moments of three rollouts
  python bench/figure.py --forgetting     # assets/figures/forgetting.png: abilities along training
"""

import argparse
import sys
from pathlib import Path

from PIL import Image, ImageSequence

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from bench import compare  # noqa: E402
from worlds import pictures  # noqa: E402

BRAINS = {  # arms of Figure 2, and whose answers are drawn
    "VLA training": ("f2-vla", "right"), "co-training": ("f2-cotrain", "right"),
    "twin, right brain": ("f2-twin", "right"), "twin, left brain": ("f2-twin", "left"),
}  # fmt: skip


def strip(film, moments=4):
    """A GIF -> `moments` of its frames from first to last, side by side."""
    frames = [frame.convert("RGB") for frame in ImageSequence.Iterator(Image.open(film))]
    picked = [frames[i * (len(frames) - 1) // (moments - 1)] for i in range(moments)]
    sheet = Image.new("RGB", (sum(f.width for f in picked), picked[0].height), "white")
    for i, frame in enumerate(picked):
        sheet.paste(frame, (i * frame.width, 0))
    return sheet


def forgetting(lines):
    """Figure 2: whose answers -> the mean share that is right of four kinds of questions, by step;
    of seed 0."""
    series = {}
    for line in (x for x in lines if x["seed"] == 0):
        for name, (arm, side) in BRAINS.items():
            if line["arm"] == arm:
                shares = [(step, scores[side].values()) for step, scores in line["curve"]]
                series[name] = [(step, 100 * sum(s) / len(s)) for step, s in shares]
    return series


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path, nargs="?")
    parser.add_argument("--forgetting", action="store_true", help="Figure 2 instead of rollouts")
    parser.add_argument("--domains", nargs="+", default=["in", "look", "colour"])
    args = parser.parse_args()
    if args.forgetting:
        series = forgetting(compare.read_lines(ROOT / "assets" / "results" / "twinbrain.jsonl"))
        out = ROOT / "assets" / "figures" / "forgetting.png"
        pictures.plot_curves(out, series, "what is left of the abilities", "step", "% right")
        print(f"wrote {out.relative_to(ROOT)}: {', '.join(series) or 'nothing to draw yet'}")
        return
    if not args.run:
        parser.error("a run folder, or --forgetting")
    films = [args.run / f"rollout-{domain}-0.gif" for domain in args.domains]
    if missing := [str(film) for film in films if not film.exists()]:
        parser.error(f"no film {', '.join(missing)}")
    rows = [strip(film) for film in films]
    sheet = Image.new("RGB", (max(r.width for r in rows), sum(r.height for r in rows)), "white")
    top = 0
    for row in rows:
        sheet.paste(row, (0, top))
        top += row.height
    out = ROOT / "assets" / "figures" / "rollouts.png"
    out.parent.mkdir(parents=True, exist_ok=True)
    sheet.resize((sheet.width // 2, sheet.height // 2), Image.Resampling.LANCZOS).save(out)
    print(f"wrote {out.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
