"""Draws the three methods as one diagram: what they share in grey, what each adds in its colour.

  python bench/diagram.py        # writes assets/figures/methods.png
"""

import argparse
import math
import sys
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from worlds import tabletop  # noqa: E402

WIDTH, ROW, TOP, FOOT = 1000, 220, 34, 46  # in pixels of the page
SCALE, OUT = 4, 2  # drawn at four times that size and kept at two
INK, GREY, PALE = "#24292f", "#6e7781", "#f3f4f6"
BLUE, ORANGE, GREEN = "#1f6fb4", "#c9501c", "#2b8a3e"
LIGHT = {BLUE: "#e3eef8", ORANGE: "#fcebe1", GREEN: "#e3f3e6", GREY: PALE}
SEES, VLM, LEAVES, HEAD, ACTS = 178, 322, 500, 662, 822  # left edges of the columns
MAIN, ABOVE = 122, 14  # tops of the two lanes of a row
TALL = 66  # height of a box


class Pen:
    """Draws in pixels of the page."""

    def __init__(self, height):
        self.sheet = Image.new("RGB", (WIDTH * SCALE, height * SCALE), "white")
        self.draw = ImageDraw.Draw(self.sheet)

    def words(self, x, y, text, colour=INK, size=13, anchor="mm", bold=False):
        font = ImageFont.load_default(size * SCALE)
        stroke = dict(stroke_width=round(0.35 * SCALE), stroke_fill=colour) if bold else {}
        lines = text.split("\n")
        for i, line in enumerate(lines):
            at = (x * SCALE, (y + (i - (len(lines) - 1) / 2) * size * 1.25) * SCALE)
            self.draw.text(at, line, colour, font, anchor, **stroke)

    def box(self, x, y, width, text, colour=GREY, height=TALL, frozen=False, size=13):
        """A rounded box, its first line bold; frozen: with a snowflake."""
        edges = [x * SCALE, y * SCALE, (x + width) * SCALE, (y + height) * SCALE]
        self.draw.rounded_rectangle(edges, 8 * SCALE, LIGHT[colour], colour, round(1.6 * SCALE))
        ink = INK if colour == GREY else colour
        title, _, rest = text.partition("\n")
        lines = 1 + text.count("\n")
        first = y + height / 2 - (lines - 1) / 2 * size * 1.25
        self.words(x + width / 2, first, title, ink, size, bold=True)
        if rest:
            below = first + size * 1.25 * (1 + rest.count("\n") / 2)
            self.words(x + width / 2, below, rest, ink, size)
        if frozen:
            self.flake(x + width - 11, y + 11, colour)

    def flake(self, x, y, colour):
        for k in range(3):
            a = math.pi * (k / 3 + 1 / 6)
            dx, dy = 6 * math.cos(a), 6 * math.sin(a)
            ends = [(x - dx) * SCALE, (y - dy) * SCALE, (x + dx) * SCALE, (y + dy) * SCALE]
            self.draw.line(ends, colour, round(1.4 * SCALE))

    def arrow(self, *points, colour=GREY, dashed=False):
        """A line through the points, its head at the last."""
        (x0, y0), (x1, y1) = points[-2:]
        angle = math.atan2(y1 - y0, x1 - x0)
        stem = (x1 - 6 * math.cos(angle), y1 - 6 * math.sin(angle))
        line = [*points[:-1], stem]
        for (ax, ay), (bx, by) in zip(line, line[1:]):
            long = math.dist((ax, ay), (bx, by))
            step = 8 if dashed else max(long, 1)
            for i in range(math.ceil(long / step)):
                u, v = i * step / long, min(1, (i * step + (4.5 if dashed else step)) / long)
                ends = [c for w in (u, v) for c in (ax + w * (bx - ax), ay + w * (by - ay))]
                self.draw.line([c * SCALE for c in ends], colour, round(1.8 * SCALE))
        turns = (angle + 0.42, angle - 0.42)
        sides = [(x1 - 9 * math.cos(turn), y1 - 9 * math.sin(turn)) for turn in turns]
        self.draw.polygon([c * SCALE for p in ((x1, y1), *sides) for c in p], colour)

    def chunk(self, x, y, count, colour=GREY):
        """`count` actions: a bar of each."""
        for i in range(count):
            high = 9 + 22 * abs(math.sin(0.55 * i + 0.8))
            left = x + i * 11
            edges = [left * SCALE, (y - high) * SCALE, (left + 7) * SCALE, y * SCALE]
            self.draw.rounded_rectangle(edges, 2 * SCALE, colour)


def skeleton(pen, y, picture, name, idea, colour, vlm, leaves, head, loss, actions):
    """What the three share: pictures and words -> VLM -> action head -> a chunk of actions."""
    pen.words(16, y + 86, name, colour, 19, "lm", bold=True)
    pen.words(16, y + 124, idea, INK, 13, "lm")
    middle = y + MAIN + TALL / 2
    pen.sheet.paste(picture, (SEES * SCALE, (y + MAIN - 4) * SCALE))
    pen.words(SEES + 37, y + MAIN + TALL + 16, "pictures, words, state", GREY, 11)
    pen.box(VLM, y + MAIN, 132, vlm, frozen=vlm.endswith("LoRA experts"))
    pen.words(LEAVES + 66, middle, leaves[0], leaves[1], 12.5)
    pen.box(HEAD, y + MAIN, 122, head[0], head[1], frozen=head[0].startswith("flow expert"))
    pen.arrow((SEES + 80, middle), (VLM - 4, middle))
    pen.arrow((VLM + 136, middle), (LEAVES + 12, middle))
    pen.arrow((LEAVES + 122, middle), (HEAD - 4, middle))
    pen.arrow((HEAD + 126, middle), (ACTS - 6, middle))
    pen.chunk(ACTS + 4, middle + 14, actions)
    pen.words(ACTS + 4, middle + 28, "action chunk", GREY, 11, "lm")
    pen.words(ACTS + 134, middle, loss, colour, 12)


def twinbrain(pen, y, picture):
    skeleton(pen, y, picture, "TwinBrainVLA", "a frozen VLM\nand its trained twin", BLUE,
             "right brain\nVLM, trained", ("all hidden\nstates H_R", INK),
             ("DiT\nflow matching", GREY), "|v - u|^2,\nEq. 7", 8)  # fmt: skip
    pen.box(VLM, y + ABOVE, 132, "left brain\nthe same VLM", BLUE, frozen=True)
    pen.arrow((SEES + 37, y + MAIN - 10), (SEES + 37, y + ABOVE + TALL / 2),
              (VLM - 4, y + ABOVE + TALL / 2), colour=BLUE)  # fmt: skip
    pen.words(SEES + 44, y + ABOVE + TALL / 2 - 10, "pictures, words", BLUE, 11, "lm")
    for dx in (26, 66, 106):
        x = VLM + dx
        pen.arrow((x, y + ABOVE + TALL + 3), (x, y + MAIN - 3), colour=BLUE, dashed=True)
    pen.words(VLM + 146, y + (ABOVE + TALL + MAIN) / 2,
              "keys and values, layer by layer: AsyMoT, Eq. 3-6", BLUE, 12.5, "lm")  # fmt: skip
    middle = y + ABOVE + TALL / 2
    pen.arrow((VLM + 136, middle), (VLM + 172, middle), colour=BLUE)
    pen.words(VLM + 180, middle, "answers questions as it always did", BLUE, 12.5, "lm")


def vita(pen, y, picture):
    skeleton(pen, y, picture, "VITA-VLA", "a VLM learns to act\nfrom a small model", ORANGE,
             "VLM\nfrozen in stage 1,\ntrained in stage 2", ("3 action tokens,\nmapper M", ORANGE),
             ("decoder D\nthe teacher's", ORANGE), "L1 +\n0.01 BCE", 3)  # fmt: skip
    pen.box(VLM, y + ABOVE, 132, "Seer, the teacher\na small model", ORANGE, frozen=True)
    pen.arrow((SEES + 37, y + MAIN - 10), (SEES + 37, y + ABOVE + TALL / 2),
              (VLM - 4, y + ABOVE + TALL / 2), colour=ORANGE)  # fmt: skip
    middle = y + ABOVE + TALL / 2
    pen.words(LEAVES + 66, middle, "its action\ntokens' states", ORANGE, 12.5)
    pen.arrow((VLM + 136, middle), (LEAVES + 12, middle), colour=ORANGE)
    pen.arrow((LEAVES + 122, middle), (HEAD - 4, middle), colour=ORANGE)
    pen.box(HEAD, y + ABOVE, 122, "decoder D", ORANGE, frozen=True)
    pen.arrow((LEAVES + 66, middle + 20), (LEAVES + 66, y + MAIN + 12), colour=ORANGE, dashed=True)
    pen.words(LEAVES + 58, y + (ABOVE + TALL + MAIN) / 2, "1  align, Eq. 3", ORANGE, 12.5, "rm")
    down, between = HEAD + 61, y + (ABOVE + TALL + MAIN) / 2
    pen.arrow((down, y + ABOVE + TALL + 3), (down, y + MAIN - 3), colour=ORANGE)
    pen.words(down + 9, between, "2  reuse and fine-tune", ORANGE, 12.5, "lm")


def dual(pen, y, picture):
    skeleton(pen, y, picture, "DualVLA", "less reasoning to learn,\ntwo teachers", GREEN,
             "VLM\nwith two trained\nLoRA experts", ("N action\nqueries", INK),
             ("flow expert\nE's own", GREY), "L_VLA +\n0.15 L_KD", 8)  # fmt: skip
    for i in range(9):  # the frames of an episode, with their sentences
        kept, x = i in (2, 6), SEES - 14 + i * 13
        edges = [x * SCALE, (y + ABOVE + 42) * SCALE, (x + 10) * SCALE, (y + ABOVE + 52) * SCALE]
        pen.draw.rectangle(edges, GREEN if kept else "white", GREEN, SCALE)
    words = "reasoning stays where\nsomething happens, Eq. 4"
    pen.words(SEES + 43, y + ABOVE + 17, words, GREEN, 12)
    frames = y + ABOVE + 47
    pen.arrow((SEES + 104, frames), (VLM + 20, frames), (VLM + 20, y + MAIN - 3), colour=GREEN)
    middle = y + ABOVE + TALL / 2
    pen.box(VLM + 42, y + ABOVE, 90, "G, the\ngeneralist", GREEN, frozen=True)
    pen.box(HEAD, y + ABOVE, 122, "E, the\nspecialist", GREEN, frozen=True)
    pen.words(LEAVES + 70, middle + 4, "says why,\nor stays silent", GREEN, 12.5)
    out = VLM + 148
    pen.arrow((VLM + 134, y + MAIN + 18), (out, y + MAIN + 18), (out, middle + 12),
              (LEAVES + 16, middle + 12), colour=GREEN)  # fmt: skip
    pen.arrow((VLM + 136, middle - 4), (LEAVES + 16, middle - 4), colour=GREEN, dashed=True)
    pen.words(VLM + 146, middle - 22, "questions: Eq. 6", GREEN, 12.5, "lm")
    over = ACTS + 45
    pen.arrow((HEAD + 126, middle), (over, middle), (over, y + MAIN - 10), colour=GREEN,
              dashed=True)  # fmt: skip
    pen.words(over + 9, middle + 18, "robot data: Eq. 5", GREEN, 12.5, "lm")


def main():
    argparse.ArgumentParser(description=__doc__.splitlines()[0]).parse_args()
    height = TOP + 3 * ROW + FOOT
    pen = Pen(height)
    world = tabletop.Tabletop("bridge")
    picture = Image.fromarray(next(iter(world.reset(7)["images"].values())))
    picture = picture.resize((74 * SCALE, 74 * SCALE), Image.Resampling.NEAREST)
    heads = ((SEES + 37, "sees"), (VLM + 66, "a pretrained model"), (LEAVES + 66, "what leaves it"),
             (HEAD + 61, "action head"), (ACTS + 46, "acts"), (ACTS + 134, "loss"))  # fmt: skip
    for x, words in heads:
        pen.words(x, 18, words, GREY, 12.5)
    for i, row in enumerate((twinbrain, vita, dual)):
        y = TOP + i * ROW
        pen.draw.line([12 * SCALE, y * SCALE, (WIDTH - 12) * SCALE, y * SCALE], "#d0d7de", SCALE)
        row(pen, y, picture)
    y = height - FOOT
    pen.draw.line([12 * SCALE, y * SCALE, (WIDTH - 12) * SCALE, y * SCALE], "#d0d7de", SCALE)
    y += FOOT / 2
    pen.box(178, y - 9, 22, "", GREY, 18)
    pen.words(208, y, "what any such VLA has", INK, 12.5, "lm")
    for i, colour in enumerate((BLUE, ORANGE, GREEN)):
        pen.box(374 + 26 * i, y - 9, 22, "", colour, 18)
    pen.words(458, y, "what the paper adds", INK, 12.5, "lm")
    pen.flake(622, y, INK)
    pen.words(636, y, "frozen", INK, 12.5, "lm")
    pen.arrow((716, y), (752, y), colour=INK, dashed=True)
    pen.words(762, y, "no gradient comes back", INK, 12.5, "lm")
    out = ROOT / "assets" / "figures" / "methods.png"
    out.parent.mkdir(parents=True, exist_ok=True)
    size = WIDTH * OUT, height * OUT
    pen.sheet.resize(size, Image.Resampling.LANCZOS).quantize(128).save(out, optimize=True)
    print(f"wrote {out.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
