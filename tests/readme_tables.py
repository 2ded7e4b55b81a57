"""The tables and numbers of README.md and docs/, made from the result files they stand for.

  python tests/readme_tables.py                   # names what is out of date; exit status 1 if so
  python tests/readme_tables.py --write           # brings it up to date
  python tests/readme_tables.py --write FILE.md   # in these files alone

A table stands between `<!-- table: NAME -->` and `<!-- end -->`, each on a line of its own; NAME is
one of TABLES. A number in a sentence is `<!-- value: METHOD ARM MEASURE -->88.3<!-- end -->`, with
`ARM-OTHER`, two arms, for a difference. MEASURE is what bench/compare.py prints; `seeds`, `samples`
and `episodes` count. `<!-- fact: NAME -->` is one of FACTS: counted in the code itself.
"""

import argparse
import inspect
import json
import re
import statistics
import sys
from functools import lru_cache
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import common  # noqa: E402
import dualvla  # noqa: E402
import twinbrain  # noqa: E402
import vita_vla  # noqa: E402
from bench import compare, memory  # noqa: E402

SCRIPTS = {"twinbrain": twinbrain, "vita_vla": vita_vla, "dualvla": dualvla}
FILES = ("README.md", "docs/results.md", "docs/claims.md", "docs/guide.md",
         "docs/ablation.md", "docs/speed.md")  # fmt: skip
BLOCK = re.compile(r"(<!-- table: (\S+) -->\n)(.*?)(<!-- end -->)", re.DOTALL)
FACT = re.compile(r"(<!-- fact: (\S+) -->)(.*?)(<!-- end -->)", re.DOTALL)
VALUE = re.compile(r"(<!-- value: (\S+) (\S+) ([^>]+?) -->)(.*?)(<!-- end -->)", re.DOTALL)
DOMAINS = {
    "in": "in the demonstrations' domain", "colour": "unseen colour", "shape": "unseen shape",
    "pair": "unseen pair", "wording": "unseen wording",
    "out": "out of domain: colour, shape, pair, wording",
    "look": "unseen look",
}  # fmt: skip
SHORT = "--preset short"  # ablations over seeds, of fewer steps
FLOAT = "--dtype fp32"  # on a machine without bfloat16
TEACHER = "--eval-only assets/seer"  # VITA-VLA's, as it is shipped
AGAIN = ("--eval-only runs/dual/{}-{{seed}} --episodes 20 --gifs 0 --score-episodes 0 "
         "--questions 1000")  # fmt: skip
AGAINST = {"base": "G", "no-pruning": "DualVLA unpruned", "ours": "DualVLA"}  # asked again so


# --- result files ---------------------------------------------------------------------------------


@lru_cache
def lines(method):
    """The result lines of a method, oldest first; [] where there are none yet."""
    return common.result_lines(method)


def arm(method, name, flags=""):
    """Runs of an arm with these flags, by seed; float32 where a seed has no run in bfloat16."""
    mine, found = [x for x in lines(method) if x["arm"] == name], {}
    for wanted in (flags, f"{flags} {FLOAT}".strip()):
        for x in mine:
            if x["flags"] == wanted:
                found.setdefault(x["seed"], x)
    return [found[seed] for seed in sorted(found)]


def side_by_side(method, *arms):
    """Two arms, (name, flags) each -> the runs of both whose difference counts: seeds that both
    have in one precision, in bfloat16 where that is on file."""
    found = []
    for name, flags in arms:
        both = flags, f"{flags} {FLOAT}".strip()
        some = [x for x in lines(method) if x["arm"] == name and x["flags"] in both]
        found.append({(x["seed"], FLOAT in x["flags"]): x for x in some})
    shared = dict(sorted(found[0].keys() & found[1].keys(), reverse=True))
    return [[some[pair] for pair in sorted(shared.items())] for some in found]


def by_seed(some, measure):
    """Result lines -> {seed: (value, trials)} of those that have the measure."""
    found = {x["seed"]: compare.measures(x).get(measure) for x in some}
    return {seed: pair for seed, pair in found.items() if pair}


def seeds(some, measure):
    """Seed by seed: "84.0, 73.0, 62.0"."""
    pairs, none = by_seed(some, measure), float("nan")
    return ", ".join(compare.text(measure, pairs[s][0], none, none) for s in sorted(pairs))


def cell(some, measure):
    """ "88.3 (81.1 to 95.6)", or "not run"; seed by seed where no share can have the interval."""
    pairs = by_seed(some, measure)
    if not pairs:
        return "not run"
    value, low, high = compare.mean_of([*pairs.values()])
    if compare.is_share(measure) and (low < 0 or high > 1):
        return f"by seed {seeds(some, measure)}"
    return compare.text(measure, value, low, high)


def gap(ours, theirs, measure, other=None):
    """The difference of two arms with its interval, or nothing where one was not run."""
    a, b = by_seed(ours, measure), by_seed(theirs, other or measure)
    return compare.difference(a, b) if a and b else None


def apart(ours, theirs, measure):
    """The difference in words; seed by seed where its interval is wider than shares can differ."""
    found = gap(ours, theirs, measure)
    if not found:
        return ""
    if compare.is_share(measure) and max(-found[1], found[2]) > 1:
        a, b = by_seed(ours, measure), by_seed(theirs, measure)
        gaps = [f"{100 * (a[s][0] - b[s][0]):+.1f}" for s in sorted(a.keys() & b.keys())]
        return f"by seed {', '.join(gaps)}"
    return compare.text(measure, *found[:3], sign="+")


def rows(head, body):
    """Markdown of a table."""
    body = [["" if c is None else str(c).replace("|", "\\|") for c in row] for row in body]
    lines = ["| " + " | ".join(row) + " |" for row in [head, *body]]
    return "\n".join([lines[0], "|" + "---|" * len(head), *lines[1:]])


def spent(line, key):
    """Samples or seconds of a run: of all stages, where it has several."""
    return sum(stage[key] for stage in line.get("stages", {"": line}).values())


def source(*groups):
    """What stands behind numbers, in a sentence: seeds, samples, episodes, machines, seconds."""
    some = [line for group in groups for line in group]
    if not some:
        return "No run is on file yet."
    seeds = sorted({x["seed"] for x in some})
    facts = [f"Seeds {', '.join(map(str, seeds))}"]
    facts.append(listed(f"{spent(x, 'samples'):,}" for x in some) + " samples each")
    if any(x["episodes"] for x in some):
        facts.append(listed(str(x["episodes"]) for x in some) + " episodes a domain and seed")
    seconds = [s for x in some if (s := spent(x, "train_seconds"))]  # none of --eval-only
    if seconds:
        facts.append(f"{min(seconds):.0f} to {max(seconds):.0f} s of training a run")
    facts.append(listed(x["machine"] for x in some))
    facts.append("torch " + listed(x["torch"] for x in some))
    return "; ".join(facts) + ". Intervals: 95%, over seeds; of one seed, over its episodes."


def listed(words):
    return " or ".join(dict.fromkeys(words))


# --- the tables -----------------------------------------------------------------------------------


def twin_table(names=tuple(DOMAINS)):
    """Table 1 at this scale: with and without the left brain, by domain."""
    twin, vanilla = arm("twinbrain", "t1-twin"), arm("twinbrain", "t1-vanilla")
    body = [
        [DOMAINS[name], cell(twin, name), cell(vanilla, name), apart(twin, vanilla, name)]
        for name in names
    ]
    paper = [twinbrain.ABLATIONS[name]["_paper"] for name in ("t1-twin", "t1-vanilla")]
    body.append(["paper, SimplerEnv average", *(f"{p} (paper)" for p in paper), ""])
    head = ["success %", "TwinBrainVLA", "vanilla VLA (no left brain)", "difference"]
    return rows(head, body) + "\n\n" + source(twin, vanilla)


def forgetting_table():
    """What is left of the four abilities, seed by seed."""
    body, used = [], []
    for words, name, side, flags in (
        ("the untouched backbone = the left brain afterwards", "t1-twin", "left", ""),
        ("right brain of the twin", "t1-twin", "right", ""),
        ("vanilla VLA", "t1-vanilla", "right", ""),
        ("vanilla VLA, 1,000 steps", "t1-vanilla", "right", SHORT),
        ("the same, questions mixed in", "f2-cotrain", "right", SHORT),
    ):
        some = sorted(arm("twinbrain", name, flags), key=lambda x: x["seed"])
        used += some
        shares = [[x["vqa"][side][a] for x in some] for a in common.ABILITIES]
        cells = [", ".join(f"{100 * v:.0f}" for v in row) or "not run" for row in shares]
        body.append([words, *cells])
    body.append(["paper, Qwen3-VL-4B, VLA training", "88.87 to 0.04 (paper)", "", "", ""])
    head = ["% right, by seed, of the tabletop's questions", "existence, as in POPE",
            "four letters, as in SEED-Bench", "as in ScienceQA", "pairs, as in MME"]  # fmt: skip
    return rows(head, body) + "\n\n" + source(used)


def chain_brief():
    """VITA-VLA for the README: first tasks and chains, seed by seed, beside the paper's."""
    body = []
    for words, name, flags in (
        ("teacher (Seer)", "two-stage", TEACHER), ("two-stage", "two-stage", ""),
        *((f"{name}, half of the length", name, SHORT) for name in vita_vla.STAGES),
    ):  # fmt: skip
        some, paper = arm("vita_vla", name, flags), vita_vla.ABLATIONS[name]["_paper"]
        paper = "88.4, 3.76" if flags == TEACHER else paper  # Table 1, Seer-Large
        row = [words, *(seeds(some, n) or "not run" for n in ("chain", "length"))]
        body.append([*row, f"{paper} (paper)" if paper else ""])
    return rows(["", "first task %", "tasks in a row", "the paper's, on CALVIN"], body)


def chain_table():
    """VITA-VLA's Table 1 at this scale: goals of a chain reached in a row."""
    body = []
    for words, name, flags in (
        ("teacher (Seer)", "two-stage", TEACHER), ("two-stage", "two-stage", ""),
        *((f"{name}, half the length", name, SHORT) for name in vita_vla.STAGES),
    ):  # fmt: skip
        some = arm("vita_vla", name, flags)
        names = [*(f"chain {k}" for k in range(1, 6)), "length"]
        body.append([words, *(cell(some, name) for name in names)])
    for name in ("two-stage", "only-finetune", "freeze-vlm"):
        first, _, length = vita_vla.ABLATIONS[name]["_paper"].partition(", ")
        row = [f"{name}, CALVIN (paper)", f"{first} (paper)", "", "", "", ""]
        body.append([*row, length and f"{length} (paper)"])
    head = ["goals reached in a row, %", "1", "2", "3", "4", "5", "average length"]
    some = [arm("vita_vla", n, f) for n in vita_vla.STAGES for f in ("", SHORT)]
    some.append(arm("vita_vla", "two-stage", TEACHER))
    return rows(head, body) + "\n\n" + source(*some)


def calvin_table():
    """Rows of the eight sub-tasks without a grasp, acted in CALVIN's own environment."""
    some, body = lines("calvin"), []
    for x in some:
        shares = [f"{100 * c['success']:.0f}" for c in x["chain"]]
        low, high = (100 * v for v in x["chain"][0]["ci95"])
        shares[0] += f" ({low:.0f} to {high:.0f})"
        minutes = f"{x['train_seconds'] / 60:.0f}"
        own = [x["protocol"]["execute"], *shares, f"{x['length']:.2f}", x["episodes"], minutes]
        body.append([f"`{x['train']}`", *own])
    head = ["sub-tasks in a row, %", "actions of a plan", "1", "2", "3", "4", "5",
            "average length", "rows", "minutes of training"]  # fmt: skip
    about = some[0]
    words = (f"Seed 0; {about['demonstrations']} demonstrations (`{about['recorded']}`); acting: "
             f"`{about['command']}`; {about['machine']}, pybullet {about['versions']['pybullet']}. "
             "Interval: 95%, over rows.")  # fmt: skip
    return rows(head, body) + "\n\n" + words


def stages_table():
    """DualVLA's chain: the specialist, the generalist, the student."""
    some, body = arm("dualvla", "ours"), []
    names = ("plain in", "reason in", "answers", "vla_score", "reason words", "reason ms")
    for words, stage in (("E, specialist", "expert"), ("G, generalist", "generalist"),
                         ("DualVLA", "dual")):  # fmt: skip
        silent = stage == "expert"  # it is never asked to reason
        cells = [cell(some, f"{stage}: {n}") for n in names if not (silent and "reason" in n)]
        if silent and cells[-1] != "not run":
            cells[-1] += " (A I B)"  # Eq. 8 without reasoning: of another scale
        row = [words, *cells]
        body.append([*row[:2], "", *row[2:], "", ""] if silent else row)
    head = ["", "success %", "success, reasoning first %", "questions %", "VLA Score",
            "words a plan", "ms a plan"]  # fmt: skip
    return rows(head, body) + "\n\n" + source(some)


def stages_brief():
    """DualVLA for the README: its chain, and the rows that tell what does what."""
    arms = "base", "base-ft", "no-action-teacher", "no-reason-teacher", "no-pruning", "ours"
    names = ("reason in", "answers", "vla_score", "reason words")
    expert = [x["stages"]["expert"] for x in arm("dualvla", "ours")]
    body = [["E, specialist", seeds(expert, "plain in"), cell(expert, "answers"), "", "", ""]]
    for name in arms:
        about, some = dualvla.ABLATIONS[name], arm("dualvla", name)
        words = [seeds(some, n) if i == 0 else cell(some, n) for i, n in enumerate(names)]
        body.append([f"{about['_row']} (`{name}`)", *words, f"{about['_paper']} (paper)"])
    head = ["", "success %, by seed", "questions %", "VLA Score", "words a plan",
            "the paper's average"]  # fmt: skip
    return rows(head, body)


def again_table():
    """Runs of DualVLA asked once more: more questions, and plans timed by median and mean."""
    body, used, found = [], [], {n: arm("dualvla", n, AGAIN.format(n)) for n in AGAINST}
    names = ("answers", "reason words", "reason ms", "reason ms_mean")
    for name, words in AGAINST.items():
        mine = found[name]
        gaps = apart(mine, found["base"], "answers") if name != "base" else ""
        body.append([words, *(cell(mine, n) for n in names), gaps])
        used += mine
    head = ["", "questions %", "words a plan", "ms a plan, median", "mean", "questions, less G's"]
    return rows(head, body) + "\n\n" + source(used)


def short_table(brief=False):
    """Ablations after 1,000 steps; brief: of three seeds, without further settings, where the
    paper's tables have a row on SimplerEnv."""
    body, used = [], []
    for name, about in twinbrain.ABLATIONS.items():
        some = [x for x in lines("twinbrain") if x["arm"] == name and x["flags"].startswith(SHORT)]
        home = [x["flags"] for x in some if x["world"] == twinbrain.Config.world]
        for flags in sorted({flags.removesuffix(FLOAT).rstrip() for flags in home}):
            mine = arm("twinbrain", name, flags)
            more = flags.removeprefix(SHORT).partition(" --distill")[0]
            if brief and (len(mine) < 3 or not about["_paper"] or more):
                continue
            pair = side_by_side("twinbrain", (name, flags), ("t1-twin", SHORT))
            twin = name in ("t1-twin", "f2-twin")
            gaps = ["" if twin else apart(*pair, measure) for measure in ("in", "out")]
            row = [f"`{name}{more}`", about["_row"], about["_paper"] or ""]
            body.append([*row, cell(mine, "in"), cell(mine, "out"), *gaps])
            used += mine
    head = ["arm", "row", "paper", "in %", "out %", "in, less the twin's", "out, less the twin's"]
    words = "\n\nSeeds that ran in float32 are compared with the twin in float32: "
    twin = arm("twinbrain", "t1-twin", f"{SHORT} {FLOAT}")
    words += "% in, ".join(cell(twin, measure) for measure in ("in", "out")) + "% out. "
    return rows(head, body) + words + source(used)


def metaworld_table():
    """The methods on Meta-World's ten tasks, each as it acts: at its first arm's settings."""
    body, used = [], []
    for method, measure in (("twinbrain", "in"), ("vita_vla", "in"), ("dualvla", "reason in")):
        first = MEASURES[method][0]
        some = [x for x in lines(method) if x["world"] == "metaworld" and x["arm"] == first]
        if not some:
            continue
        rates = {t: statistics.fmean(x["per_task"][t] for x in some) for t in some[0]["per_task"]}
        worst = min(rates, key=rates.get)
        minutes = statistics.fmean(spent(x, "train_seconds") for x in some) / 60
        flags = some[0]["flags"].removesuffix(FLOAT).rstrip()
        body.append([f"`{method}.py {flags}`", cell(some, measure),
                     f"{worst.removesuffix('-v3')} {100 * rates[worst]:.0f}", f"{minutes:.0f}"])
        used += some
    head = ["script", "success %", "hardest task %", "minutes of training"]
    return rows(head, body) + "\n\n" + source(used)


def precision_table():
    """Table 1's two arms at both lengths, seed by seed, in each precision of products."""
    kinds = {(1000, "bfloat16"): SHORT, (1000, "float32 inside Muon"): f"{SHORT} --muon fp32",
             (1000, "float32"): f"{SHORT} {FLOAT}", (2000, "bfloat16"): "",
             (2000, "float32"): FLOAT}  # fmt: skip
    body, used = [], []
    for arms in (("t1-twin", "f2-twin"), ("t1-vanilla", "f2-vla")):
        for (steps, kind), flags in kinds.items():
            some = [x for x in lines("twinbrain") if x["arm"] in arms and x["flags"] == flags]
            some = {x["seed"]: x for x in some if x["world"] == twinbrain.Config.world}
            some = [some[seed] for seed in sorted(some)]
            shares = [", ".join(f"{100 * by_seed([x], m)[x['seed']][0]:.1f}" for x in some)
                      for m in ("in", "out")]  # fmt: skip
            seeds = ", ".join(str(x["seed"]) for x in some)
            row = [f"`{arms[0]}`", f"{steps:,}", kind]
            body.append([*row, seeds, *shares] if some else [*row, "", "not run", "not run"])
            used += some
    head = ["arm", "steps", "products in", "seeds", "in %", "out %"]
    return rows(head, body) + "\n\n" + source(used)


def rounding_table():
    """bench/rounding.py: cosines between bfloat16 and float32, on a trained model."""
    head = ["brain", "step", "what", "matrices", "median cosine", "least", "machine"]
    body = [
        [x["brain"], x["step"], x["what"], x["matrices"], f"{x['median']:.4f}",
         f"{x['least']:.3f}", x["machine"]]
        for x in newest("rounding", "brain", "what")
    ]  # fmt: skip
    return rows(head, body)


def boundaries_table():
    """bench/boundaries.py: F1 of event boundaries on held-out recordings."""
    names = {"F1@0.05": "F1 within 5% of the length", "F1@0.25": "within 25%", "mean": "5 to 50%"}
    body = [
        [f"`--events {x['events']}`" if "mean" in x else x["events"],
         *(f"{x[n]:.3f}" if n in x else "" for n in names),
         ", ".join(f"{f:.3f}" for f in x["each"]), x["episodes"], machine_cell(x)]
        for x in newest("boundaries", "events")
    ]  # fmt: skip
    head = ["detector", *names.values(), "at 5%, by seed", "recordings a seed", "machine"]
    return rows(head, body)


def suites_table():
    """The world's suites after 1,000 steps: success in each domain that was evaluated."""
    domains = [d for d in DOMAINS if d not in ("out", "look")] + ["pick_all", "chain"]
    runs, used = {}, []
    for x in lines("twinbrain"):
        about = re.fullmatch(SHORT + "(?: --world .*?)?( --dtype fp32)?", x["flags"])
        if about and x["arm"] in ("t1-twin", "t1-vanilla"):
            name = f"`{x['arm']}{about[1] or ''}`"
            runs.setdefault((x["world"].partition(":")[2], name), []).append(x)
            used.append(x)
    body = [
        [*place, *(cell(mine, d).replace("not run", "") for d in domains), len(mine)]
        for place, mine in sorted(runs.items())
    ]
    return rows(["suite", "arm", *domains, "seeds"], body) + "\n\n" + source(used)


def tasks_table():
    """The suites in LIBERO's shape by task, in the demonstrations' own domain."""
    body = []
    for method in SCRIPTS:
        for x in lines(method):
            suite = x["world"].partition(":")[2]
            if suite in ("spatial", "object", "goal", "long"):
                rates = x["domains"]["in"]["per_task"].items()
                words = ", ".join(f"{t.replace('_', ' ')} {100 * rate:.0f}" for t, rate in rates)
                mean = f"{100 * x['success']:.0f}"
                body.append([suite, f"`{x['arm']}`", mean, words, x["seed"]])
    return rows(["suite", "arm", "in %", "by task, %", "seed"], sorted(body, key=str))


def taught_table():
    """VITA-VLA's arms in the suites in LIBERO's shape, each suite's teacher first."""
    body, used = [], []
    for suite in ("spatial", "object", "goal", "long"):
        here = [x for x in lines("vita_vla") if x["world"] == f"tabletop:{suite}"]
        teachers = [x | x["stages"]["teacher"] for x in here if x["arm"] == "two-stage"]
        rated = {"teacher (Seer)": teachers}
        rated |= {f"`{name}`": [x for x in here if x["arm"] == name] for name in vita_vla.STAGES}
        for name, some in rated.items():
            if some:
                body.append([suite, name, *(cell(some, d) for d in ("in", "colour", "shape"))])
        used += here
    head = ["suite", "arm", "in", "colour", "shape"]
    return rows(head, body) + "\n\n" + source(used)


MEASURES = {  # what the ablations of a method are read by, and what they are compared with
    "twinbrain": ("t1-twin", ("in", "out")),
    "vita_vla": ("two-stage", ("chain", "length", "in", "look")),
    "dualvla": ("ours", ("reason in", "plain in", "answers", "vla_score", "reason words")),
}


def arms_table(method, usual=""):
    """Every row of `--ablation list`, and runs with flags beyond the usual ones."""
    first, names = MEASURES[method]
    body, base = [], arm(method, first, usual)
    other = names[1] if method == "twinbrain" else names[0]
    runs = dict.fromkeys((name, usual) for name in SCRIPTS[method].ABLATIONS)
    home = [x for x in lines(method) if x["world"] == SCRIPTS[method].Config.world]
    home = [x for x in home if "--eval-only" not in x["flags"]]
    full = [x for x in home if x["flags"].startswith(SHORT) == (usual == SHORT)]
    said = ((x["arm"], x["flags"].removesuffix(FLOAT).rstrip()) for x in full)
    runs |= dict.fromkeys(said)
    found = {n for n in names for run in runs if cell(arm(method, *run), n) != "not run"}
    names = [n for n in names if n in found or n == other]  # measured of any row
    for name, flags in runs:
        about, some = SCRIPTS[method].ABLATIONS[name], arm(method, name, flags)
        if not some and any(x["arm"] == name for x in lines(method)):
            continue
        flag = f"`--ablation {name}{' ' + flags if flags else ''}`"
        row = [flag, about["_row"], about["_paper"] or "", *(cell(some, n) for n in names)]
        row.append(apart(some, base, other) if some and (name, flags) != (first, usual) else "")
        body.append(row + [len(some) or ""])
    head = ["flags", "row", "paper", *names, f"{other}, less {first}'s", "seeds"]
    return rows(head, body) + "\n\n" + source(full)


def sources_table():
    """The command, seeds and machine behind every number."""
    body = []
    for method in SCRIPTS:
        for name, flags in dict.fromkeys((x["arm"], x["flags"]) for x in lines(method)):
            some = [x for x in lines(method) if (x["arm"], x["flags"]) == (name, flags)]
            count = 1 + max(x["seed"] for x in some)  # --seeds 2 runs 0 and 1
            command = f"python bench/study.py {method} {name} --seeds {count}"
            command = f"`{command}{' -- ' + flags if flags else ''}`"
            versions = listed(f"{x['torch']}, {x['transformers']}" for x in some)
            seconds = statistics.fmean(spent(x, "train_seconds") for x in some)
            seeds = ", ".join(str(x["seed"]) for x in some)
            machine = listed(f"{x['machine']}, {x['parallel']} at a time" for x in some)
            body.append([command, seeds, machine, versions, f"{seconds:.0f}"])
    head = ["command", "seeds", "machine", "torch, transformers", "seconds of training, mean"]
    return rows(head, body)


# --- claims ---------------------------------------------------------------------------------------

SAME = 0.05  # "makes no difference": within five points either way
BASES = {"TwinBrainVLA": "twinbrain", "VITA-VLA": "vita_vla", "DualVLA": "dualvla"}


@lru_cache
def claims_file():
    return json.loads((ROOT / "assets" / "claims.json").read_text())


def verdict(claim):
    """-> outcome, numbers behind it. An interval that holds zero decides nothing, and neither does
    one over episodes, which says nothing about another seed."""
    if "cannot" in claim:
        return "cannot be tested at this scale", claim["cannot"]
    test = claim.get("test")
    if not test:
        return "not run yet", ""
    a, b = test["measure"], test["against_measure"]
    arms = (test["arm"], test["flags"]), (test["against"], test["against_flags"])
    found = gap(*side_by_side(test["method"], *arms), a, b)
    if not found:
        return "not run yet", ""
    value, low, high, how = found
    ours, theirs = (arm(test["method"], *each) for each in arms)
    numbers = f"{cell(ours, a)} against {cell(theirs, b)}; difference "
    numbers += f"{compare.text(a, value, low, high, sign='+')}, {how}"
    if low != low or how == "episodes":
        return "undecided", numbers
    if "undecided" in claim:
        return "undecided", f"{numbers}; {claim['undecided']}"
    if test["expect"] == "same":
        held, failed = -SAME <= low and high <= SAME, low > 0 or high < 0
    else:
        if test["expect"] == "less":
            low, high = -high, -low
        held, failed = low > 0, high < 0
    return "held" if held else "did not hold" if failed else "undecided", numbers


def claims_table(paper):
    body = []
    for claim in claims_file()["claims"]:
        if claim["paper"] == paper:
            outcome, numbers = verdict(claim)
            words = f"{claim['claim']} ({claim['where']}: {claim['paper_says']})"
            commands = " and ".join(f"`{claim[k]}`" for k in ("command", "also") if k in claim)
            body.append([words, commands, outcome, numbers])
    return rows(["claim (where: the paper)", "command", "here", "numbers"], body)


def choices_table(paper):
    script = SCRIPTS[BASES[paper]]
    body = [
        [c["what"], c["says"], c["elsewhere"], c["here"], flag_cell(script, c["flag"])]
        for c in claims_file()["choices"]
        if c["paper"] == paper
    ]
    return rows(["what", "the paper", "its tables, code or base", "here", "flag (default)"], body)


def flag_cell(script, flag):
    """A flag, and what a run has that is started without it."""
    name = flag.partition(" ")[0].removeprefix("--").removeprefix("no-").replace("-", "_")
    if not flag or name == "ablation":
        return flag and f"`{flag}`"
    return f"`{flag}` ({shown(getattr(script.Config, name))})"


def shown(value):
    if isinstance(value, bool):
        return "on" if value else "off"
    return " ".join(value) or "all" if isinstance(value, tuple) else str(value) or "none"


def preset_table(method):
    """Every flag that the paper's presets set, beside the laptop's default."""
    script = SCRIPTS[method]
    ours = ("short", "larger")
    presets = {name: preset for name, preset in script.PRESETS.items() if name not in ours}
    names = dict.fromkeys(n for preset in presets.values() for n in preset)
    body = []
    for name in names:
        laptop, flag = getattr(script.Config, name), f"`--{name.replace('_', '-')}`"
        values = [shown(preset.get(name, laptop)) for preset in presets.values()]
        body.append([flag, shown(laptop), *values])
    return rows(["flag", "default", *(f"`--preset {p}`" for p in presets)], body)


# --- backbones ------------------------------------------------------------------------------------


def backbone_table():
    """Parameters and memory as bench/memory.py computed them, speed where it was measured."""
    found = {x["backbone"]: x for x in measured("memory")}
    body = []
    for name, x in found.items():
        sizes = [x["bytes"].get(kind) for kind in memory.KINDS]
        gigabytes = [n and f"{n / 1e9:.{1 if n > 1e9 else 2}f}" for n in sizes]
        body.append([f"`{name}`", common.human(x["parameters"]), *gigabytes, speed(name)])
    return rows(["`--backbone`", "parameters", *memory.KINDS, "samples/s, twin"], body)


def measured(name):
    return compare.read_lines(ROOT / "bench" / "results" / f"{name}.jsonl")


def newest(name, *keys):
    """The last line of each kind, on each kind of machine."""
    keys, usual = keys + ("machine",), {"weights": "float32", "lora": 0, "compile": False}
    found = measured(name)
    kinds = (tuple(x.get(k, usual.get(k)) for k in keys) + (in_fp32(x),) for x in found)
    return list(dict(zip(kinds, found)).values())


def in_fp32(x):
    """Whether a measurement is of float32 where bfloat16 is usual: its note says so."""
    return "--dtype fp32" in x.get("note", "") and "without bfloat16" not in x["machine"]


def how_trained(x):
    return f", LoRA {x['lora']}" * bool(x.get("lora")) + ", compiled" * x.get("compile", False)


def script_cell(x):
    return " ".join(filter(None, (f"`{x['method']}.py`", x.get("stage"))))


def machine_cell(x):
    busy = x.get("busy") and "processor seconds" not in x["note"]
    return "; ".join(filter(None, (x["machine"], x.get("note"), busy and "processor seconds")))


def guide_table(evening):
    """bench/guide.py: how long an evening's commands took, one after another."""
    some = [x for x in newest("guide", "evening", "line") if x["evening"] == evening]
    body = []
    for x in some:
        script, *flags = x["line"].split()[1:]
        script = {"tour.py": "docs/tour.ipynb"}.get(script, script)
        loss = " to ".join(dict.fromkeys(f"{loss:.3g}" for loss in x.get("action") or ()))
        body.append([f"`{script} ... {flags[-1]}`" if flags else f"`{script}`",
                     f"{x['seconds']:.0f}", loss])  # fmt: skip
    where = listed(machine_cell(x) for x in some) or "no machine yet"
    head = ["command", "seconds", "loss of actions, first and last line"]
    return rows(head, body) + f"\n\n`python bench/guide.py`, nothing kept from before; {where}."


def latency_table():
    """A plan's milliseconds and its parts' shares."""
    body = []
    for x in newest("latency", "method", "stage", "variant", "backbone", "weights"):
        if x["variant"] != "rollouts":
            parts = sorted(x["parts_ms"].items(), key=lambda part: -part[1])
            shares = ", ".join(f"{name} {ms / x['ms']:.0%}" for name, ms in parts)
            how = x["variant"] + ", in bfloat16" * (x.get("weights") == "bfloat16")
            own = [script_cell(x), x["backbone"], how, f"{x['ms']:.1f}", shares]
            body.append([*own, machine_cell(x)])
    return rows(["script, stage", "backbone", "how", "ms", "of which", "machine"], body)


def rollouts_table():
    """Episodes a minute of one world and of several."""
    body = []
    for x in newest("latency", "method", "stage", "variant", "backbone", "weights"):
        if x["variant"] == "rollouts":
            rates = {int(k.split("_")[-1]): n for k, n in x.items() if k.startswith("episodes_a")}
            (_, alone), (count, many) = sorted(rates.items())
            several = f"{many:.0f} ({count} worlds, {many / alone:.1f} times)"
            body.append([script_cell(x), x["backbone"], f"{alone:.0f}", several, machine_cell(x)])
    return rows(["script, stage", "backbone", "one world", "side by side", "machine"], body)


def steps_table():
    body = []
    for x in newest("step", "method", "stage", "variant", "backbone", "batch", "lora", "compile"):
        over = [f"{n} of the {k[5:]}'s" for k, n in x.items() if k.startswith("over_")]
        how = x["variant"] + how_trained(x)
        own = [script_cell(x), how, x["backbone"], x["batch"], f"{x['ms']:.0f}"]
        body.append([*own, f"{x['samples_s']:.3g}", ", ".join(over), machine_cell(x)])
    head = ["script, stage", "model", "backbone", "batch", "ms", "samples/s", "time", "machine"]
    return rows(head, body)


def losses_table():
    body = []
    for x in newest("losses", "loss", "head", "form", "tokens", "vocabulary"):
        sizes = f"{x['tokens']:,} x {x['vocabulary']:,}"
        own = [f"{x['loss']}, head {x['head']}", sizes, x["form"]]
        time, peak = f"{x['ms']:.0f} ({x['time_of_plain']:.2f})", x["plain_peak_over_it"]
        body.append([*own, time, f"{x['peak_mb']} (1/{peak:.1f})", machine_cell(x)])
    head = ["loss", "tokens x words", "form", "ms (of plain)", "peak MB (of plain)", "machine"]
    return rows(head, body)


def attention_table():
    body = []
    for x in newest("attention", "candidate", "left", "right", "batch", "ragged", "dtype"):
        sizes = f"{x['batch']} x ({x['left']} + {x['right']})" + ", ragged" * x["ragged"]
        ms = f"{x['ms']:.1f} ({x['of_best']:.2f})"
        body.append([x["candidate"], x["dtype"], sizes, ms, machine_cell(x)])
    return rows(["attention", "dtype", "tokens", "ms (of the fastest)", "machine"], body)


def fp8_table():
    body = []
    for x in newest("fp8", "form", "backbone", "batch"):
        changed = f"{x['changed']} of {x['asked']:,}" if "asked" in x else ""
        right = ", ".join(f"{k} {v:.1%}" for k, v in x.get("answers", {}).items())
        time = f"{x['ms']:.1f} ({x['of_bfloat16']:.2f})" if "ms" in x else "not run"
        own = [x["form"], x["backbone"], f"{x['keys']:.1%}", changed, right, time]
        body.append([*own, machine_cell(x)])
    head = ["in 8 bits", "backbone", "keys and values off by", "answers changed", "right"]
    return rows([*head, "ms of a pass (of bfloat16)", "machine"], body)


def loader_table():
    body = []
    for x in newest("loader", "reader", "workers", "side", "batch"):
        times = f"{x['of_lerobot']:.1f}" if "of_lerobot" in x else ""
        held = x.get("private_mb") or x.get("held_mb", [""])
        own = [x["reader"], f"{x['batch']} of {x['side']} px", x["workers"], x.get("samples_s", "")]
        body.append([*own, times, held[0] and f"{held[0]} to {held[-1]}", machine_cell(x)])
    head = ["reader", "batch", "workers", "samples/s", "of lerobot's", "its own MB", "machine"]
    return rows(head, body)


def world_table():
    body = [
        [x["suite"], *(f"{x[part]:,}" for part in ("physics", "static", "both")), machine_cell(x)]
        for x in newest("world", "suite", "size", "wrist_size")
    ]
    head = ["suite", "physics alone", "with the static picture", "with both pictures", "machine"]
    return rows(head, body)


def length_table():
    """How long the default run of TwinBrainVLA takes to act well: its seeds by their steps."""
    runs = {}
    for x in lines("twinbrain"):
        usual = x["flags"] == SHORT or re.fullmatch(r"(--steps \d+)?", x["flags"])
        how = usual and re.match(r"AMD EPYC( \(Zen 5\))?, 2 cores$", x["machine"])
        if how and x["arm"] in ("t1-twin", "t1-vanilla") and x["seed"] < 3:
            runs.setdefault((x["steps"], x["flags"], x["arm"]), []).append(x)
    body = []
    for (steps, _, name), mine in sorted(runs.items()):
        seconds = ", ".join(f"{x['train_seconds']:.0f}" for x in mine)
        size = f"{steps:,}", f"{mine[0]['samples']:,}"
        body.append([f"`{name}`", *size, seconds, cell(mine, "in"), cell(mine, "out")])
    head = ["arm", "steps", "samples", "seconds of training, by seed", "in %", "out %"]
    return rows(head, body)


def speed(backbone):
    """The last measurement of each kind of machine."""
    found = {}
    for x in measured("step"):
        mine = (x["backbone"], x["variant"]) == (backbone, "twin") and not in_fp32(x)
        if mine and not x["busy"]:
            kind = x["machine"] + how_trained(x)
            found[kind] = f"{x['samples_s']:.0f} ({kind})"
    return "; ".join(found.values()) or "not run"


def tally_table():
    """How the claims came out, by paper."""
    outcomes = ("held", "did not hold", "undecided", "cannot be tested at this scale")
    outcomes += ("not run yet",)
    body = []
    for paper in BASES:
        got = [verdict(c)[0] for c in claims_file()["claims"] if c["paper"] == paper]
        body.append([paper, *(got.count(name) for name in outcomes), len(got)])
    return rows(["claims of", *outcomes, "in all"], body)


TABLES = {
    "twinbrain": twin_table,
    "twinbrain-brief": lambda: twin_table(("in", "out", "look")),
    "forgetting": forgetting_table,
    "twinbrain-short": short_table,
    "twinbrain-seeds": lambda: short_table(brief=True),
    "twinbrain-precision": precision_table,
    "rounding": rounding_table,
    "metaworld": metaworld_table,
    "calvin": calvin_table,
    "boundaries": boundaries_table,
    "twinbrain-suites": suites_table,
    "suites-tasks": tasks_table,
    "vita_vla-suites": taught_table,
    "twinbrain-arms": lambda: arms_table("twinbrain"),
    "vita_vla": chain_table,
    "vita_vla-brief": chain_brief,
    "dualvla": stages_table,
    "dualvla-brief": stages_brief,
    "dualvla-again": again_table,
    "vita_vla-arms": lambda: arms_table("vita_vla", SHORT),
    "dualvla-arms": lambda: arms_table("dualvla"),
    "sources": sources_table,
    "tally": tally_table,
    "backbones": backbone_table,
    **{f"guide-{n}": lambda n=n: guide_table(n) for n in ("1", "2", "3", "4", "tour")},
    "latency": latency_table,
    "rollouts": rollouts_table,
    "steps": steps_table,
    "losses": losses_table,
    "attention": attention_table,
    "fp8": fp8_table,
    "loader": loader_table,
    "world": world_table,
    "length": length_table,
    **{f"preset-{m}": lambda m=m: preset_table(m) for m in BASES.values()},
    **{f"claims-{m}": lambda p=p: claims_table(p) for p, m in BASES.items()},
    **{f"choices-{m}": lambda p=p: choices_table(p) for p, m in BASES.items()},
}


# --- facts of the code ----------------------------------------------------------------------------


@lru_cache
def layers():
    """Layers of the embedded backbone's language model, and its width."""
    config = json.loads((ROOT / "assets" / "tiny" / "config.json").read_text())["text_config"]
    return config["num_hidden_layers"], config["hidden_size"]


def joint_layers(k):
    count = layers()[0]
    return f"{len(range(0, count, k + 1))} of {count}"


def own_lines(method):
    """Lines of train() that only this method has."""
    return sum("# [method]" in x for x in inspect.getsource(SCRIPTS[method].train).splitlines())


def band_width(method, term):
    """The end of a reference's band, its high over its low."""
    file = ROOT / "assets" / "reference" / f"{method}.jsonl"
    runs = [json.loads(line)["curves"][term] for line in file.read_text().splitlines()]
    (low, _, high) = compare.band(runs, [runs[0][-1][0]])[1][0]
    return f"{high / low:.2g}"


FACTS = {
    "band-twinbrain": lambda: band_width("twinbrain", "action"),
    "band-vita_vla": lambda: band_width("vita_vla", "finetune gripper"),
    **{f"joint-layers-k{k}": lambda k=k: joint_layers(k) for k in (0, 1, 2, 3, 4, 8)},
    "extra-action-tokens": lambda: f"{2 * layers()[1]:,}",
    **{f"method-lines-{m}": lambda m=m: str(own_lines(m)) for m in SCRIPTS},
    "claims": lambda: str(len(claims_file()["claims"])),
    "choices": lambda: str(len(claims_file()["choices"])),
}


# --- files ----------------------------------------------------------------------------------------


def number(method, names, measure):
    """What stands at a `value:` marker."""
    if method not in SCRIPTS:
        raise common.UserError(f"value: {method}: one of {', '.join(SCRIPTS)}")
    known = sorted({x["arm"] for x in lines(method)} | set(SCRIPTS[method].ABLATIONS), key=len)
    ours = next((k for k in reversed(known) if names == k or names.startswith(k + "-")), names)
    theirs = names[len(ours) + 1 :]
    for name in filter(None, (ours, theirs)):
        if name not in known:
            raise common.UserError(f"value: {method} has no arm {name}")
    some = arm(method, ours)
    if measure in ("seeds", "samples", "episodes"):
        counted = [str(len(some))] if measure == "seeds" else [f"{x[measure]:,}" for x in some]
        return listed(counted) or "no"
    if theirs:
        return apart(some, arm(method, theirs), measure) or "not run"
    return cell(some, measure)


def render(text):
    """A file's text with every table and number made anew."""

    def table(found):
        if found[2] not in TABLES:
            near = common.nearest(found[2], TABLES)
            raise common.UserError(f"no table {found[2]} (did you mean {near}?)")
        return f"{found[1]}{TABLES[found[2]]()}\n{found[4]}"

    def fact(found):
        if found[2] not in FACTS:
            raise common.UserError(f"no fact {found[2]}: one of {', '.join(FACTS)}")
        return f"{found[1]}{FACTS[found[2]]()}{found[4]}"

    text = FACT.sub(fact, BLOCK.sub(table, text))
    return VALUE.sub(lambda f: f[1] + number(f[2], f[3], f[4]) + f[6], text)


def outdated(path):
    """-> the text as it should be, or None where it already is."""
    text = path.read_text()
    if len(re.findall("<!-- (?:table|value|fact): ", text)) != text.count("<!-- end -->"):
        raise common.UserError(f"{path}: each marker needs one `<!-- end -->`")
    if broken := re.search("^<!-- (?:value|fact): .*", text, re.MULTILINE):
        words = "a line that begins with a comment is not markdown"
        raise common.UserError(f"{path}: {words}: {broken[0][:40]}")
    made = render(text)
    return None if made == text else made


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("files", nargs="*", type=Path, help="markdown; empty: README and docs/")
    parser.add_argument("--write", action="store_true", help="bring the files up to date")
    args = parser.parse_args(argv)
    late = 0
    for path in args.files or [ROOT / name for name in FILES]:
        made = outdated(path)
        if made is not None and args.write:
            path.write_text(made)
            print(f"wrote {path}")
        elif made is not None:
            late += 1
            print(f"{path} differs from the result files: --write brings it up to date")
    sys.exit(1 if late else 0)


if __name__ == "__main__":
    common.run_main(main)
