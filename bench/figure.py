"""Draws the figures of README and docs from a run's films and from the result lines.

  python bench/figure.py runs/NAME        # assets/figures/rollouts.png: moments of three rollouts
  python bench/figure.py --forgetting     # assets/figures/forgetting.png: abilities along training
  python bench/figure.py --degeneration   # assets/figures/degeneration.png: DualVLA's G likewise
"""

import argparse
import sys
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont, ImageSequence

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from bench import compare  # noqa: E402
from worlds import pictures  # noqa: E402

BRAINS = {  # arms of Figure 2, and whose answers are drawn
    "VLA training": ("f2-vla", "right"), "co-training": ("f2-cotrain", "right"),
    "twin, right brain": ("f2-twin", "right"), "twin, left brain": ("f2-twin", "left"),
}  # fmt: skip
LEFT = 110  # pixels beside a row, for its name


def strip(film, name):
    """A GIF -> its domain, a frame halfway and the last one, side by side."""
    frames = [frame.convert("RGB") for frame in ImageSequence.Iterator(Image.open(film))]
    wide, high = frames[0].size
    sheet = Image.new("RGB", (2 * wide + LEFT, high), "white")
    ImageDraw.Draw(sheet).text((8, 40), name, "black", ImageFont.load_default(26))
    for i, frame in enumerate((frames[len(frames) // 2], frames[-1])):
        sheet.paste(frame, (LEFT + i * wide, 0))
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


def degeneration(lines):
    """DualVLA's G, which begins as E: the share of tasks and of questions, by step; of seed 0."""
    curve = next((x["curve"] for x in lines if x["arm"] == "degeneration" and not x["seed"]), [])
    means = {"tasks done": "actions", "questions answered": "answers"}
    return {
        words: [(step, 100 * sum(s[kind].values()) / len(s[kind])) for step, s in curve]
        for words, kind in means.items()
    }


FIGURES = {  # what is drawn of which lines, and its title
    "forgetting": ("twinbrain", forgetting, "what is left of the abilities"),
    "degeneration": ("dualvla", degeneration, "a specialist learns to reason and to answer"),
}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path, nargs="?")
    for name, (_, _, title) in FIGURES.items():
        parser.add_argument(f"--{name}", action="store_true", help=f"instead of rollouts: {title}")
    parser.add_argument("--domains", nargs="+", default=["in", "look", "colour"])
    args = parser.parse_args()
    asked = [name for name in FIGURES if getattr(args, name)]
    for name in asked:
        method, draw, title = FIGURES[name]
        series = draw(compare.read_lines(ROOT / "assets" / "results" / f"{method}.jsonl"))
        out = ROOT / "assets" / "figures" / f"{name}.png"
        pictures.plot_curves(out, series, title, "step", "%")
        print(f"wrote {out.relative_to(ROOT)}: {', '.join(series) or 'nothing to draw yet'}")
    if asked:
        return
    if not args.run:
        parser.error("a run folder, or --forgetting, or --degeneration")
    films = [args.run / f"rollout-{domain}-0.gif" for domain in args.domains]
    if missing := [str(film) for film in films if not film.exists()]:
        parser.error(f"no film {', '.join(missing)}")
    rows = [strip(*pair) for pair in zip(films, args.domains)]
    sheet = Image.new("RGB", (max(r.width for r in rows), sum(r.height for r in rows)), "white")
    top = 0
    for row in rows:
        sheet.paste(row, (0, top))
        top += row.height
    out = ROOT / "assets" / "figures" / "rollouts.png"
    out.parent.mkdir(parents=True, exist_ok=True)
    sheet.resize((sheet.width * 3 // 4, sheet.height * 3 // 4), Image.Resampling.LANCZOS).save(out)
    print(f"wrote {out.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
