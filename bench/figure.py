"""Draws the README's figure from a run's films: four moments of a rollout, a row for each domain.

  python bench/figure.py runs/NAME        # writes assets/figures/rollouts.png
"""

import argparse
from pathlib import Path

from PIL import Image, ImageSequence

ROOT = Path(__file__).resolve().parent.parent


def strip(film, moments=4):
    """A GIF -> `moments` of its frames from first to last, side by side."""
    frames = [frame.convert("RGB") for frame in ImageSequence.Iterator(Image.open(film))]
    picked = [frames[i * (len(frames) - 1) // (moments - 1)] for i in range(moments)]
    sheet = Image.new("RGB", (sum(f.width for f in picked), picked[0].height), "white")
    for i, frame in enumerate(picked):
        sheet.paste(frame, (i * frame.width, 0))
    return sheet


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path)
    parser.add_argument("--domains", nargs="+", default=["in", "look", "colour"])
    args = parser.parse_args()
    rows = [strip(args.run / f"rollout-{domain}-0.gif") for domain in args.domains]
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
