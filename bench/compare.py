"""Compares runs with each other, or a run with the reference: what differs, and is it chance?

  python bench/compare.py RUN_A RUN_B                              # one run a side
  python bench/compare.py RUN_A0 RUN_A1 --against RUN_B0 RUN_B1    # several seeds a side
  python bench/compare.py twinbrain:t1-twin twinbrain:t1-vanilla   # arms of assets/results
  python bench/compare.py --check-curve RUN                        # is my curve right?
  python bench/compare.py RUN_0 RUN_1 RUN_2 --make-reference NAME  # assets/reference/NAME.jsonl

Prints the settings that differ, every success rate with its 95% interval and the difference with
its own, and draws the losses and the rates (--out). With one run a side the intervals are over
episodes (Wilson; Newcombe for a difference): they say nothing about another seed. With several
they are t-intervals over seeds, and a difference is taken seed by seed if both sides have them.

The reference of a run is its script's and preset's, assets/reference/<method>[-<preset>].jsonl, or
--reference NAME. The band holds 95% of new runs at a step: mean +- t s sqrt(1 + 1/n) of the n
reference runs' losses, in logarithms, smoothed over a tenth of the run; s is pooled over an eighth
of the run to each side, so that three curves that happen to cross do not pinch it. A run has left
the band where it stays outside for a tenth of the run. Exit status: 0 within the band, 1 it left, 2
cannot be told.
"""

import argparse
import json
import math
import shlex
import statistics
import sys
from bisect import bisect_left
from pathlib import Path
from typing import NamedTuple

from PIL import Image, ImageDraw, ImageFont

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import common  # noqa: E402
from worlds import pictures  # noqa: E402

STAGES = ("teacher", "align", "finetune", "frozen", "expert", "generalist", "dual")
NO_LOSS = ("step", "time", "lr", "norm", "samples/s")
NO_MATTER = (  # settings that change where and how a run goes, not what comes out of it
    "out", "resume", "eval_only", "device", "threads", "workers", "gifs", "parallel", "log_every",
    "save_every", "skip_bad", "seed", "preset", "explicit",
)  # fmt: skip


class Made(NamedTuple):
    """A run, or a line of a result file: settings, result, curves {loss: [(step, value)]}."""

    name: str
    settings: dict
    result: dict
    curves: dict
    facts: dict


# --- reading --------------------------------------------------------------------------------------


def read_json(path):
    try:
        return json.loads(path.read_text()) if path.exists() else {}
    except (ValueError, OSError) as error:
        raise common.UserError(f"{path}: no JSON ({error}): take a finished run") from None


def read_lines(path):
    """A .jsonl file -> its dicts; a torn last line, of a run that still goes on, is left out."""
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    try:
        return [json.loads(line) for line in lines if line.endswith("\n")]
    except ValueError as error:
        raise common.UserError(f"{path}: no JSON lines ({error})") from None


def read_run(folder):
    """A run folder, of one stage or of a chain of them -> Made."""
    folder, curves = Path(folder), {}
    stages = {name: folder / name for name in STAGES if (folder / name / "metrics.jsonl").exists()}
    if (folder / "metrics.jsonl").exists():
        stages = {"": folder}
    if not stages:
        raise common.UserError(f"{folder}: no run here (metrics.jsonl is missing)")
    for stage, inner in stages.items():
        for line in read_lines(inner / "metrics.jsonl"):
            for key, value in line.items():
                if key not in NO_LOSS and isinstance(value, (int, float)):
                    curves.setdefault(f"{stage} {key}".strip(), []).append((line["step"], value))
    last = list(stages.values())[-1]
    files = folder / "chain.json", folder / "config.json", last / "config.json"
    config = next(filter(None, map(read_json, files)), {})
    result = read_json(folder / "result.json") or read_json(last / "result.json")
    return Made(folder.name, config.get("config", {}), result, curves, config)


def read_side(words):
    """Run folders, or METHOD:ARM of assets/results -> [Made]."""
    made = []
    for word in words:
        method, _, arm = word.partition(":")
        file = ROOT / "assets" / "results" / f"{method}.jsonl"
        if not arm or not file.exists():
            made.append(read_run(word))
            continue
        lines = [line for line in read_lines(file) if line["arm"] == arm and not line["flags"]]
        if not lines:
            raise common.UserError(f"{file}: no line of the arm {arm}")
        made += [Made(arm, {"ablation": arm, "seed": x["seed"]}, x, {}, x) for x in lines]
    return made


def measures(result):
    """What a result says -> {name: (value, trials or None)}; shares in 0..1, {} of no result."""
    found = {}
    forms = result.get("forms") or {"": {"domains": result.get("domains") or {}}}
    for form, about in forms.items():
        for domain, rates in about["domains"].items():
            if rates["success"] is not None:
                found[f"{form} {domain}".strip()] = rates["success"], rates["episodes"]
            for k, share in enumerate(rates.get("at", ()), 1):
                found[f"{domain} {k}"] = share, rates["episodes"]
        found |= {f"{form} {key}": (about[key], None) for key in KEYS if key in about}
    if result.get("success_out") is not None:
        some = [d for d in result["domains"] if d not in ("in", "look")]
        found["out"] = result["success_out"], sum(result["domains"][d]["episodes"] for d in some)
    for side, scores in (result.get("vqa") or {}).items():
        if isinstance(scores, dict):
            found |= {f"{side} {name}": (share, None) for name, share in scores.items()}
        else:
            found[side] = scores, None
    for key in ("answers", "length", "kept", "train_seconds"):
        if result.get(key) is not None:
            found[key] = result[key], None
    if result.get("vla_score"):
        found["vla_score"] = result["vla_score"]["score"], None
    for stage, inner in (result.get("stages") or {}).items():
        found |= {f"{stage}: {name}": pair for name, pair in measures(inner).items()}
    return found


# --- numbers --------------------------------------------------------------------------------------

KEYS = ("ms", "ms_mean", "words")  # of each form of prompt
PLAIN = (*KEYS, "length", "train_seconds", "vla_score")  # not shares


def is_share(name):
    return name.split(" ")[-1] not in PLAIN


def student(free):
    """The t that leaves 5% outside, two-sided, with `free` degrees of freedom."""
    values = list(range(free + 1))  # any will do: the interval is t s / sqrt(n) to each side
    low, high = common.ci95_mean(values)
    return (high - low) / 2 * math.sqrt(free + 1) / statistics.stdev(values)


def ci95_difference(a, n, b, m):
    """95% interval of share a of n trials less share b of m others: Newcombe's, from Wilson's."""
    (low_a, high_a), (low_b, high_b) = common.ci95(round(a * n), n), common.ci95(round(b * m), m)
    below = math.hypot(a - low_a, high_b - b)
    return a - b - below, a - b + math.hypot(high_a - a, b - low_b)


def mean_of(pairs):
    """[(value, trials)] of several seeds, or of one -> value, low, high; nan where unknown."""
    values = [value for value, _ in pairs]
    if len(values) > 1:
        return statistics.fmean(values), *common.ci95_mean(values)
    value, trials = pairs[0]
    return value, *(common.ci95(round(value * trials), trials) if trials else (math.nan, math.nan))


def difference(ours, theirs):
    """{seed: (value, trials)} of two sides -> difference, low, high, how it was found."""
    seeds = sorted(ours.keys() & theirs.keys())
    if len(seeds) > 1:
        by_seed = [ours[s][0] - theirs[s][0] for s in seeds]
        return statistics.fmean(by_seed), *common.ci95_mean(by_seed), f"{len(seeds)} seeds"
    if min(len(ours), len(theirs)) > 1:  # no seeds in common: the fewer runs' t, to be careful
        sides = [[value for value, _ in side.values()] for side in (ours, theirs)]
        gap = statistics.fmean(sides[0]) - statistics.fmean(sides[1])
        half = math.sqrt(sum(statistics.variance(side) / len(side) for side in sides))
        half *= student(min(map(len, sides)) - 1)
        return gap, gap - half, gap + half, "runs, seeds not paired"
    if seeds:
        ours, theirs = ({s: side[s] for s in seeds} for side in (ours, theirs))
    a, n = pooled(ours.values())
    b, m = pooled(theirs.values())
    if n and m:
        return a - b, *ci95_difference(a, n, b, m), "episodes"
    return a - b, math.nan, math.nan, "no interval"


def pooled(pairs):
    """[(share, trials)] -> share of all trials together, trials (0 where they are unknown)."""
    pairs = list(pairs)
    total = sum(n or 0 for _, n in pairs)
    if not all(n for _, n in pairs):
        return statistics.fmean(value for value, _ in pairs), 0
    return sum(value * n for value, n in pairs) / total, total


def text(name, value, low, high, sign=""):
    """A measure with its interval, in words; shares in percent."""
    scale, digits = (100, 1) if is_share(name) else (1, 0 if name == "train_seconds" else 2)
    words = f"{scale * value:{sign}.{digits}f}"
    if math.isnan(low):
        return words
    return f"{words} ({scale * low:.{digits}f} to {scale * high:.{digits}f})"


# --- two sides ------------------------------------------------------------------------------------


def differing(ours, theirs):
    """Settings that both sides have, and not the same -> {name: (values here, values there)}."""
    rows = {}
    for name in settings_of(ours):
        if name in settings_of(theirs):
            a, b = ({json.dumps(m.settings.get(name)) for m in side} for side in (ours, theirs))
            if a != b:
                rows[name] = ", ".join(sorted(a)), ", ".join(sorted(b))
    return rows


def settings_of(side):
    return dict.fromkeys(name for m in side for name in m.settings if name not in NO_MATTER)


def by_seed(side, name):
    """-> {seed: (value, trials)} of one measure; runs of one seed get a number besides."""
    found = {}
    for i, made in enumerate(side):
        value, trials = measures(made.result).get(name, (None, None))
        last = name.split(" ")[-1]
        if last in common.ABILITIES and made.settings.get("questions"):
            trials = made.settings["questions"] // (2 if last == "mme" else 1)  # asked in pairs
        if value is not None:
            seed = made.settings.get("seed", i)
            found[seed if seed not in found else f"{seed}, run {i}"] = value, trials
    return found


def compare(ours, theirs):
    """-> [(measure, ours (value, low, high), theirs, difference (value, low, high, how))]."""
    names = [n for n in measures(ours[0].result) if n in measures(theirs[0].result)]
    rows = []
    for name in names:
        a, b = by_seed(ours, name), by_seed(theirs, name)
        pairs = mean_of(list(a.values())), mean_of(list(b.values()))
        rows.append((name, *pairs, difference(a, b)))
    return rows


def mean_curve(side, term):
    """The mean of a side's runs at the steps that all of them logged."""
    lines = [dict(made.curves[term]) for made in side if term in made.curves]
    steps = sorted(set.intersection(*(set(line) for line in lines))) if lines else []
    return [(step, statistics.fmean(line[step] for line in lines)) for step in steps]


def draw_rates(path, rows, names):
    """PNG: shares of both sides with their intervals, and the difference with its own; what of an
    interval lies outside the scale (0 to 100%, -50 to 50 points) is cut off."""
    rows = [row for row in rows if is_share(row[0]) and not math.isnan(row[1][1])]
    font, height, left, width = ImageFont.load_default(14), 44, 190, 420
    sheet = Image.new("RGB", (left + 2 * width + 40, 60 + height * len(rows)), "white")
    pen = ImageDraw.Draw(sheet)

    def bar(where, value, low, high, colour):
        (x, y), scale = where, (width - 40) / 100
        at = [x + scale * 100 * v for v in (low, value, high)]
        pen.line([at[0], y, at[2], y], colour, 3)
        pen.ellipse([at[1] - 5, y - 5, at[1] + 5, y + 5], colour)

    middle = left + width + (width - 40) / 2
    for i, name in enumerate(names):
        pen.text((left + i * width / 2, 8), name[:26], pictures.INKS[i], font)
    pen.text((middle, 8), "difference, points", "black", font, "ma")
    pen.line([middle, 30, middle, sheet.height - 20], "#999999", 1)
    for i, (name, a, b, d) in enumerate(rows):
        y = 50 + height * i
        pen.text((8, y - 2), name, "black", font)
        pen.line([left, y + 20, left + width - 40, y + 20], "#dddddd", 1)
        for k, side in enumerate((a, b)):
            bar((left, y + 12 * k), *(max(0.0, min(1.0, x)) for x in side), pictures.INKS[k])
        bar((middle, y + 6), *(max(-0.5, min(0.5, x)) for x in d[:3]), pictures.INKS[3])
    sheet.save(path)


def report(ours, theirs, names, out):
    rows = compare(ours, theirs)
    for setting, (a, b) in differing(ours, theirs).items():
        print(f"--{setting.replace('_', '-'):20} {a:>28} {b:>28}")
    alone = [
        sum(n not in settings_of(b) for n in settings_of(a))
        for a, b in ((ours, theirs), (theirs, ours))
    ]
    if any(alone):
        print(f"settings that one side alone has: {alone[0]} of A, {alone[1]} of B")
    if not rows:
        print("no result to compare: the runs are not finished (loss curves alone)")
    for name, a, b, d in rows:
        ours_, theirs_ = text(name, *a), text(name, *b)
        apart = f"{text(name, *d[:3], sign='+')}, {d[3]}"
        print(f"{name:22} {ours_:>28} {theirs_:>28}   difference {apart}")
    out.mkdir(parents=True, exist_ok=True)
    terms = [t for t in ours[0].curves if t in theirs[0].curves]
    for term in terms:
        series = {name: mean_curve(side, term) for name, side in zip(names, (ours, theirs))}
        title = f"{term}, mean of {len(ours)} and {len(theirs)} run(s)"
        picture = out / f"loss-{term.replace(' ', '-')}.png"
        pictures.plot_curves(picture, series, title, "step", "loss", smooth=0.6)
    if rows:
        draw_rates(out / "rates.png", rows, names)
    print(f"pictures: {out}")


# --- the reference --------------------------------------------------------------------------------


def smooth(line, span):
    """[(step, value)] -> each step's mean over the `span` steps up to it."""
    line, first, total, means = sorted(line), 0, 0.0, []
    for i, (step, value) in enumerate(line):
        total += value
        while line[first][0] <= step - span:
            total -= line[first][1]
            first += 1
        means.append((step, total / (i + 1 - first)))
    return means


def at(line, step):
    """The value of a curve at any step: a straight line between its points."""
    i = bisect_left(line, (step,))
    if i == 0 or i == len(line):
        return line[min(i, len(line) - 1)][1]
    (x0, y0), (x1, y1) = line[i - 1], line[i]
    return y0 + (y1 - y0) * (step - x0) / (x1 - x0)


def band(lines, steps):
    """Reference curves [[(step, loss)]] -> span they were smoothed over, offset of the logarithm,
    [(low, middle, high)] at the steps."""
    total, n = max(step for step, _ in lines[0]), len(lines)
    offset = 0.01 * statistics.median(value for line in lines for _, value in line) + 1e-12
    span = total / 10
    logs = [[(s, math.log(v + offset)) for s, v in smooth(line, span)] for line in lines]
    grid = [step for step, _ in logs[0]]
    spread = [statistics.variance(at(line, step) for line in logs) for step in grid]
    width, found = student(n - 1) * math.sqrt(1 + 1 / n), []
    for step in steps:
        near = [v for s, v in zip(grid, spread) if abs(s - step) <= total / 8]
        half = width * math.sqrt(max(statistics.fmean(near), 1e-4))  # no narrower than 1% a run
        middle = statistics.fmean(at(line, step) for line in logs)
        found.append(tuple(math.exp(middle + k * half) - offset for k in (-1, 0, 1)))
    return span, found


def left_at(line, lines):
    """A run's curve against the reference's -> None, or (step, its smoothed loss, low, high) where
    it left the band; and the share of its points that lie outside."""
    total = max(step for step, _ in lines[0])
    line = [point for point in sorted(line) if point[0] <= total and math.isfinite(point[1])]
    if not line:
        return None, math.nan
    span, limits = band(lines, [step for step, _ in line])
    means = smooth(line, span)
    outside = [not low <= v <= high for (_, v), (low, _, high) in zip(means, limits)]
    for i, (step, value) in enumerate(means):
        stays = [o for (s, _), o in zip(means[i:], outside[i:]) if s <= step + span]
        if all(stays) and len(stays) >= 3:
            return (step, value, limits[i][0], limits[i][2]), sum(outside) / len(outside)
    return None, sum(outside) / len(outside)


def reference_file(name):
    return ROOT / "assets" / "reference" / f"{name}.jsonl"


def read_reference(name):
    file = reference_file(name)
    if not file.exists():
        known = ", ".join(sorted(p.stem for p in file.parent.glob("*.jsonl"))) or "none"
        how = f"python bench/compare.py RUN_0 RUN_1 RUN_2 --make-reference {name}"
        raise common.UserError(
            f"no reference {name} yet (assets/reference holds {known}), so this curve cannot be "
            f"judged; three finished runs of different seeds make one: {how}"
        )
    return read_lines(file)


def portable(command, settings):
    """A run's command and settings without the places of the machine it ran on."""
    words = [Path(x).name if x.endswith(".py") else x for x in shlex.split(command)]
    if "--out" in words:
        at = words.index("--out")
        del words[at : at + 2]
    return shlex.join(words), settings | {"out": f"runs/{Path(settings['out']).name}"}


def make_reference(runs, name):
    """Finished runs of one setting and several seeds -> assets/reference/NAME.jsonl and .png."""
    from bench.study import machine

    seeds = [made.settings.get("seed") for made in runs]
    if len(runs) < 3 or len(set(seeds)) < len(seeds):
        raise common.UserError(f"--make-reference {name}: at least three runs, each its own seed")
    for made in runs:
        if odd := differing(runs[:1], [made]):
            raise common.UserError(f"{made.name} differs from {runs[0].name} in {', '.join(odd)}")
        if not made.result:
            raise common.UserError(f"{made.name} is not finished: no result.json")
    file = reference_file(name)
    file.parent.mkdir(parents=True, exist_ok=True)
    rows = []
    for made in runs:
        facts = {k: made.facts.get(k) for k in ("command", "torch", "transformers", "threads")}
        facts["command"], settings = portable(facts["command"], made.settings)
        facts |= {"machine": machine(), "seed": settings["seed"], "result": made.result}
        rows.append(facts | {"settings": settings, "curves": made.curves})
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    for term in runs[0].curves:
        draw_band(file.with_name(f"{name}-{term.replace(' ', '-')}.png"), rows, term)
    print(f"wrote {file}; each run against the others:")
    for i, made in enumerate(runs):
        words = [f"{term}: {verdict}" for term, verdict, _ in check(made, rows[:i] + rows[i + 1 :])]
        print(f"  seed {made.settings['seed']}: {'; '.join(words)}")


def draw_band(path, rows, term, line=None):
    lines = [[tuple(p) for p in row["curves"][term]] for row in rows if term in row["curves"]]
    steps = [step for step, _ in lines[0]]
    span, limits = band(lines, steps)
    names = ("95% band, lower edge", "mean", "95% band, upper edge")
    series = {n: [(s, v[i]) for s, v in zip(steps, limits)] for i, n in enumerate(names)}
    if line:
        series["this run"] = smooth(line, span)
    series = {n: [(s, math.log10(max(v, 1e-6))) for s, v in c] for n, c in series.items()}
    title = f"{term}, {len(lines)} reference runs"
    pictures.plot_curves(path, series, title, "step", "loss", log=True)


def check(made, rows):
    """-> [(loss, verdict in words, whether it left the band)]; losses that the run lacks left."""
    found = []
    for term in rows[0]["curves"]:
        lines = [[tuple(p) for p in row["curves"][term]] for row in rows if term in row["curves"]]
        if term not in made.curves:
            found.append((term, "not logged by this run", True))
            continue
        if sum(math.isfinite(value) for _, value in made.curves[term]) < 3:
            raise common.UserError(f"{term}: fewer than three values logged, it cannot be told")
        left, share = left_at(made.curves[term], lines)
        words = f"within the band ({share:.0%} of its points outside)"
        if left:
            step, value, low, high = left
            side = "above" if value > high else "below"
            words = f"left the band at step {step}, {side} it: {value:.4g}, {low:.4g} to {high:.4g}"
        found.append((term, words, bool(left)))
    return found


def check_curve(made, name, out):
    """Prints the verdict on every loss -> whether one of them left the band."""
    rows = read_reference(name)
    theirs = [Made(name, row["settings"], {}, {}, {}) for row in rows]
    for setting, (a, b) in differing([made], theirs).items():
        print(f"--{setting.replace('_', '-')} is {a} here, {b} in the reference")
    out.mkdir(parents=True, exist_ok=True)
    found = check(made, rows)
    for term, words, _ in found:
        print(f"{term}: {words}")
        if term in made.curves:
            draw_band(out / f"band-{term.replace(' ', '-')}.png", rows, term, made.curves[term])
    print(f"{len(rows)} reference runs on {rows[0]['machine']}; pictures: {out}")
    return any(left for _, _, left in found)


def arguments(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("runs", nargs="+", metavar="RUN", help="run folder, or METHOD:ARM")
    parser.add_argument("--against", nargs="+", default=[], metavar="RUN", help="the other side")
    parser.add_argument("--check-curve", action="store_true", help="is RUN within the band?")
    parser.add_argument("--reference", default="", help="whose band; else its own script's")
    parser.add_argument("--make-reference", default="", metavar="NAME")
    parser.add_argument(
        "--out", type=Path, default=Path("runs/compare"), help="folder for pictures"
    )
    return parser.parse_args(argv)


def main(argv=None):
    args = arguments(argv)
    if args.make_reference:
        return make_reference(read_side(args.runs), args.make_reference)
    if args.check_curve or args.reference:
        if len(args.runs) != 1 or args.against:
            raise common.UserError("--check-curve takes one run folder")
        made = read_run(args.runs[0])
        own = "-".join(filter(None, (made.facts["method"], made.settings.get("preset"))))
        sys.exit(int(check_curve(made, args.reference or own, args.out)))
    if not args.against and len(args.runs) != 2:
        raise common.UserError("two runs, or --against between the sides")
    sides = (args.runs, args.against) if args.against else (args.runs[:1], args.runs[1:])
    ours, theirs = (read_side(side) for side in sides)
    names = [side[0].name + f" ({len(side)} runs)" * (len(side) > 1) for side in (ours, theirs)]
    print(f"A: {names[0]}\nB: {names[1]}")
    report(ours, theirs, names, args.out)


if __name__ == "__main__":
    common.run_main(main)
