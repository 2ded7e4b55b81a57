"""What a person looks at: camera frames with words under them, films, contact sheets, line charts.

Drawn with pillow alone. Pictures are (height, width, 3) uint8 arrays.
"""

import importlib.util
import json
import math
import shutil
import sys
import textwrap
import time

import numpy as np
from PIL import Image, ImageDraw, ImageFont

INKS = ("#1f6fb4", "#d9541e", "#2c9a3f", "#8c4fb0", "#b8860b", "#00929a", "#c2326f", "#5a5a5a",
        "#7fb3e0", "#f0a37e", "#90cf9a", "#c9a6df", "#111111")  # fmt: skip


def tick_marks(low: float, high: float, count: int = 5) -> list[float]:
    """Round numbers that enclose [low, high]."""
    if high - low <= 1e-9 * max(abs(low), abs(high), 1e-9):
        low, high = low - (abs(low) or 1) / 2, high + (abs(high) or 1) / 2
    power = 10 ** math.floor(math.log10((high - low) / count))
    step = next(m * power for m in (1, 2, 5, 10) if m * power * count >= (high - low) * 0.999)
    first, last = math.floor(low / step + 1e-6), math.ceil(high / step - 1e-6)
    return [i * step for i in range(first, last + 1)]


def plot_curves(path, series: dict[str, list], title, xlabel, ylabel, smooth=0.0, log=False):
    """PNG line chart of {name: [(x, y), ...]}; smooth > 0: exponential mean over the faint raw;
    log: the y are powers of ten."""
    finite = {name: [p for p in line if math.isfinite(p[1])] for name, line in series.items()}
    series = {name: line for name, line in finite.items() if line}
    points = [point for line in series.values() for point in line] or [(0, 0), (1, 1)]
    x_ticks = tick_marks(min(x for x, _ in points), max(x for x, _ in points), 8)
    y_ticks = tick_marks(min(y for _, y in points), max(y for _, y in points))
    # Drawn at twice the size and halved at the end: smooth lines without a plotting library.
    font, large, ink = ImageFont.load_default(26), ImageFont.load_default(34), "#333333"
    left, top, right, bottom = 170, 90, 1400, 850
    legend = max([font.getlength(name) for name in series], default=0)
    sheet = Image.new("RGB", (int(right + legend + 150) // 2 * 2, 1000), "white")
    draw = ImageDraw.Draw(sheet)

    def place(x, y):
        u = (x - x_ticks[0]) / (x_ticks[-1] - x_ticks[0])
        v = (y - y_ticks[0]) / (y_ticks[-1] - y_ticks[0])
        return left + u * (right - left), bottom - v * (bottom - top)

    for x in x_ticks:
        at = place(x, 0)[0]
        draw.line([at, bottom, at, bottom + 10], ink, 2)
        draw.text((at, bottom + 16), f"{x:.6g}", ink, font, "mt")
    for y in y_ticks:
        at = place(0, y)[1]
        draw.line([left, at, right, at], "#dddddd", 2)
        draw.text((left - 14, at), f"{10**y if log else y:.{2 if log else 6}g}", ink, font, "rm")
    draw.line([left, top, left, bottom, right, bottom], ink, 3)
    draw.text(((left + right) / 2, 24), title, ink, large, "mt")
    draw.text(((left + right) / 2, 940), xlabel, ink, font, "mm")
    draw.text((14, top - 32), ylabel, ink, font, "lm")
    for i, (name, line) in enumerate(series.items()):
        colour, y_label, mean, means = INKS[i % len(INKS)], top + 20 + 44 * i, None, []
        for x, y in line:
            mean = y if mean is None else smooth * mean + (1 - smooth) * y
            means.append(place(x, mean))
        if smooth:
            faint = tuple(150 + c * 105 // 255 for c in bytes.fromhex(colour[1:]))
            draw.line([place(x, y) for x, y in line], faint, 2, "curve")
        draw.line(means, colour, 5, "curve")
        for x, y in means if len(means) < 30 else ():
            draw.ellipse([x - 7, y - 7, x + 7, y + 7], colour)
        draw.line([right + 30, y_label, right + 80, y_label], colour, 6)
        draw.text((right + 95, y_label), name, ink, font, "lm")
    sheet.resize((sheet.width // 2, 500), Image.Resampling.LANCZOS).save(path)


def caption_frame(images: list, lines: list[str], scale=4, success: bool | None = None):
    """HWC uint8 pictures at one height (the first's, times `scale`), text under them, and a
    green (success) or red (failure) border."""
    height, font = len(images[0]) * scale, ImageFont.load_default(14)
    tiles = [Image.fromarray(np.asarray(image)) for image in images]
    tiles = [t.resize((t.width * height // t.height, height), Image.NEAREST) for t in tiles]
    width = max(sum(tile.width + 6 for tile in tiles) + 6, 280)
    text = [part for line in lines for part in textwrap.wrap(line, width // 8) or [""]]
    frame = Image.new("RGB", (width, height + 18 + 18 * len(text)), "white")
    draw, x = ImageDraw.Draw(frame), 6
    for tile in tiles:
        frame.paste(tile, (x, 6))
        x += tile.width + 6
    draw.multiline_text((8, height + 9), "\n".join(text), "black", font, spacing=4)
    if success is not None:
        border = INKS[2] if success else INKS[1]
        draw.rectangle([0, 0, frame.width - 1, frame.height - 1], None, border, 4)
    return frame


def contact_sheet(path, rows: list, scale=3) -> None:
    """PNG with a captioned frame per (images, text), one under the other."""
    frames = [caption_frame(images, text.splitlines(), scale) for images, text in rows]
    sheet = Image.new("RGB", (max(f.width for f in frames), sum(f.height for f in frames)))
    y = 0
    for frame in frames:
        sheet.paste(frame, (0, y))
        y += frame.height
    sheet.save(path)


def save_gif(path, frames: list, fps: float = 10) -> None:
    """Frames: pillow images or HWC uint8 arrays; smaller ones are padded with white.

    An octree finds a frame's 256 colours ten times faster than pillow's own choice for a GIF, and
    leaves a purple spoon purple."""
    frames = [f if isinstance(f, Image.Image) else Image.fromarray(np.asarray(f)) for f in frames]
    size = max(f.width for f in frames), max(f.height for f in frames)
    padded = [Image.new("RGB", size, "white") for _ in frames]
    for canvas, frame in zip(padded, frames, strict=True):
        canvas.paste(frame, (0, 0))
    how = dict(method=Image.Quantize.FASTOCTREE, dither=Image.Dither.NONE)
    first, *rest = [canvas.quantize(256, **how) for canvas in padded]
    first.save(path, save_all=True, append_images=rest, duration=1000 / fps, loop=0)


def save_mp4(path, frames: list, fps: float = 10) -> None:
    """The same as H.264, sides made even; needs the `[data]` extra's av."""
    import av

    width, height = (max(f.size[k] for f in frames) // 2 * 2 for k in (0, 1))
    with av.open(str(path), "w") as file:
        stream = file.add_stream("libx264", round(fps))
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        for frame in frames:
            canvas = Image.new("RGB", (width, height), "white")
            canvas.paste(frame, (0, 0))
            file.mux(stream.encode(av.VideoFrame.from_image(canvas)))
        file.mux(stream.encode())


def check(how: str) -> None:
    """Whether `--render` can do what it is asked, before a run is spent on it."""
    from common import UserError  # which brings PyTorch: drawing alone does without

    if how == "mp4" and importlib.util.find_spec("av") is None:
        raise UserError("--render mp4 needs av: pip install 'onefile-vla[data]'")
    if how == "show" and not sys.stdout.isatty():
        raise UserError("--render show draws into a terminal, and this is none: take gif")


def render(path, frames: list, fps: float, how: str) -> None:
    """A film at path.gif or path.mp4; show: at path.gif, and in the terminal."""
    if how == "mp4":
        return save_mp4(f"{path}.mp4", frames, fps)
    save_gif(f"{path}.gif", frames, fps)
    if how == "show":
        for frame in frames:
            sys.stdout.write("\x1b[H\x1b[J" + blocks(frame) + "\n")
            sys.stdout.flush()
            time.sleep(1 / fps)


def blocks(image, columns: int = 0, lines: int = 0) -> str:
    """A picture as text: every character is two pixels, one above the other, in true colour.

    It fills `columns` x `lines` characters (0: the terminal's), its proportions kept.
    """
    image = image if isinstance(image, Image.Image) else Image.fromarray(np.asarray(image))
    have = shutil.get_terminal_size()
    columns, lines = columns or have.columns, lines or have.lines - 2
    scale = min(columns / image.width, 2 * lines / image.height)
    size = max(1, int(image.width * scale)), max(2, int(image.height * scale) // 2 * 2)
    how = Image.BOX if scale < 1 else Image.NEAREST
    pixels = np.asarray(image.convert("RGB").resize(size, how))
    rows = []
    for upper, lower in zip(pixels[::2].tolist(), pixels[1::2].tolist()):
        cells = (
            "\x1b[38;2;{};{};{};48;2;{};{};{}m\u2580".format(*u, *w) for u, w in zip(upper, lower)
        )
        rows.append("".join(cells) + "\x1b[0m")
    return "\r\n".join(rows)


def glow(image, heat):
    """A picture (h, w, 3), dark but where `heat` (rows, columns) lies on it."""
    soft = Image.fromarray(np.float32(heat / heat.max()))
    soft = np.asarray(soft.resize(image.shape[1::-1], Image.Resampling.BILINEAR))[:, :, None]
    return (image * (0.2 + 0.8 * soft)).astype(np.uint8)


def trace(actions: list, side: int, last: int = 60):
    """The last actions [(A,)] in -1..1 -> (side, side, 3): a line for each number, 1 at its top."""
    sheet = Image.new("RGB", (side, side), "white")
    pen, lines = ImageDraw.Draw(sheet), np.clip(np.stack(actions[-last:]), -1, 1).T
    high = side / len(lines)
    for row, line in enumerate(lines):
        middle = (row + 0.5) * high
        pen.line([0, middle, side, middle], "#dddddd")
        points = [((i + 1) * side / last, middle - 0.45 * high * v) for i, v in enumerate(line)]
        pen.line([(0, points[0][1]), *points], INKS[row % len(INKS)], 2)
    return np.asarray(sheet)


def draw_run(folder, losses) -> None:
    """A run's metrics.jsonl -> loss.png and, if abilities were measured, forgetting.png."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    curves = {k: [(r["step"], r[k]) for r in lines if k in r] for k in losses}
    curves = {k: points for k, points in curves.items() if points}
    if curves:
        plot_curves(folder / "loss.png", curves, "training loss", "step", "loss", smooth=0.6)
    asked = [(r["step"], r["abilities"]) for r in lines if "abilities" in r]
    if len(asked) > 1:
        names = [(side, name) for side, scores in asked[0][1].items() for name in scores]
        curves = {f"{n} ({s})": [(step, a[s][n]) for step, a in asked] for s, n in names}
        title = "abilities along training"
        plot_curves(folder / "forgetting.png", curves, title, "step", "share")
