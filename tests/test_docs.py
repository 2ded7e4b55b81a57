"""docs/: tables made from result files, commands that parse and run, answers that are true; and
bench/compare.py, which the pages send their readers to."""

import ast
import base64
import io
import json
import math
import os
import random
import re
import shlex
import subprocess
import sys
import types
from dataclasses import replace

import numpy as np
import pytest
import readme_tables as tables
import torch
from PIL import Image
from transformers import AttentionInterface

import common
import data
import dualvla
import twinbrain
import vita_vla
from bench import compare, diagram, memory
from parts import scale, seer
from worlds import calvin, serve

ROOT, SCRIPTS = tables.ROOT, tables.SCRIPTS
PAGES = sorted((ROOT / "docs").glob("*.md"))
TEXT = {page.name: page.read_text() for page in PAGES}
GUIDES = ("guide.md", "ablation.md")
NAMES = set("AMD AMX AVX CPU CUDA EGL EPYC GB GPT GPUs JSON MB MIT MuJoCo PyTorch README SIGTERM "
            "TSV VITA VL WSL macOS nanoGPT starVLA".split())  # fmt: skip
CLAIMS = tables.claims_file()
SMALL = {  # what makes a command of the guide a matter of seconds
    "twinbrain": "--steps 2 --batch 4 --demos 20 --episodes 1 --questions 2 --width 32 --depth 2 "
    "--heads 2 --domains in --execute 8 --gifs 1 --optimizer adamw",
    "vita_vla": "--steps 2 --batch 4 --demos 20 --episodes 1 --width 32 --depth 1 --heads 2 "
    "--optimizer adamw",
    "dualvla": "--steps 2 --batch 4 --demos 20 --episodes 1 --questions 2 --width 32 --depth 2 "
    "--heads 2 --queries 2 --rank 2 --talk 2 --events phase --score-episodes 1 --execute 8 "
    "--optimizer adamw",
}


# --- tables and numbers ---------------------------------------------------------------------------


@pytest.mark.parametrize("name", tables.FILES)
def test_tables_are_those_of_the_result_files(name):
    assert tables.outdated(ROOT / name) is None, "python tests/readme_tables.py --write"


def test_a_changed_number_is_noticed_and_mended(tmp_path, capsys):
    page = tmp_path / "page.md"
    page.write_text(
        "<!-- table: twinbrain -->\n| typed by hand |\n<!-- end -->\n"
        "It is <!-- value: twinbrain t1-twin-t1-vanilla out -->99<!-- end --> "
        "<!-- fact: joint-layers-k0 -->many<!-- end -->\n"
    )
    for words, code in (([], 1), (["--write"], 0), ([], 0)):
        with pytest.raises(SystemExit) as end:
            tables.main([*words, str(page)])
        assert end.value.code == code
    text = page.read_text()
    assert "typed by hand" not in text and "99<" not in text and "many" not in text
    twin, vanilla = (tables.arm("twinbrain", f"t1-{n}") for n in ("twin", "vanilla"))
    gaps = [a["success_out"] - b["success_out"] for a, b in zip(twin, vanilla)]
    low, high = common.ci95_mean(gaps)
    wanted = f"{100 * sum(gaps) / len(gaps):+.1f} ({100 * low:.1f} to {100 * high:.1f})"
    assert f"-->{wanted}<!--" in text and f"| {wanted} |" in text


@pytest.mark.parametrize("text, names", [
    ("<!-- table: twinbran -->\n<!-- end -->", "did you mean twinbrain"),
    ("<!-- table: twinbrain -->\n", "needs one `<!-- end -->`"),
    ("a <!-- value: twinbrain t1-twn in --><!-- end -->", "no arm t1-twn"),
    ("a <!-- fact: joint --><!-- end -->", "no fact joint"),
    ("<!-- fact: joint-layers-k0 --><!-- end -->", "begins with a comment"),
])  # fmt: skip
def test_a_bad_marker_is_one_clear_line(text, names, tmp_path):
    page = tmp_path / "page.md"
    page.write_text(text)
    with pytest.raises(common.UserError, match=re.escape(names)):
        tables.main([str(page)])


def test_chains_and_stages_have_their_tables(monkeypatch):
    facts = dict(samples=1, episodes=100, train_seconds=1.0, machine="m", torch="t", seed=0)
    chain = {"chain": {"success": 0.7, "episodes": 100, "at": [0.7, 0.4, 0.2, 0.1, 0.0]}}
    monkeypatch.setattr(tables, "lines", lambda method: [
        {"arm": "two-stage", "flags": "", "domains": chain, "length": 1.4} | facts])  # fmt: skip
    want = compare.text("chain 2", 0.4, *common.ci95(40, 100))
    assert f"| {want} |" in tables.chain_table() and "| 1.40 |" in tables.chain_table()
    forms = {"plain": {"domains": {"in": {"success": 0.5, "episodes": 4}}, "ms": 7.0, "words": 3}}
    expert = {"forms": forms, "answers": 0.25, "vla_score": {"score": 0.4}}
    stages = {name: expert | {"samples": 6, "train_seconds": 3.0} for name in ("expert", "dual")}
    monkeypatch.setattr(tables, "lines", lambda method: [
        {"arm": "ours", "flags": "", "stages": stages} | facts])  # fmt: skip
    row = next(x for x in tables.stages_table().splitlines() if "specialist" in x).split(" | ")
    assert row[1].startswith("50.0 (") and row[2:4] == ["", "25.0"] and len(row) == 7
    assert row[4] == "0.40 (A I B)"
    assert "12 samples each" in tables.stages_table() and "6 to 6 s of" in tables.stages_table()


def test_every_result_line_says_where_it_comes_from():
    facts = ("command", "seed", "machine", "torch", "transformers", "samples", "train_seconds")
    for method, script in SCRIPTS.items():
        seen = set()
        for line in tables.lines(method):
            assert all(line.get(fact) not in (None, "") for fact in facts), line["arm"]
            _, name, *words = shlex.split(line["command"])
            cfg = common.parse(script.Config, script.PRESETS, script.ABLATIONS, words)
            assert (name, cfg.ablation, cfg.seed) == (f"{method}.py", line["arm"], line["seed"])
            assert (line["arm"], line["seed"], line["flags"]) not in seen
            seen.add((line["arm"], line["seed"], line["flags"]))


def test_short_tables_have_a_row_for_each_arm_with_its_flags_or_suite(monkeypatch):
    def line(arm, flags, seed, success, world="tabletop:bridge"):
        domains = {"in": {"success": success, "episodes": 100}}
        facts = dict(samples=32000, episodes=100, train_seconds=500.0, machine="m", torch="t")
        return facts | dict(arm=arm, flags=flags, seed=seed, domains=domains, world=world)

    short = "--preset short"
    made = [line("t1-vanilla", short, s, 0.5 + s / 10) for s in range(2)]
    made += [line("t1-twin", short, s, 0.8) for s in range(2)]
    made += [line("t1-vanilla", short + " --augment 2", 0, 0.6), line("t1-twin", "", 0, 0.9)]
    made += [line("t9-student", short + " --distill runs/t1-twin-{seed}", 0, 0.7)]
    made += [line("t1-twin", short + " --world tabletop:franka", 0, 0.4, "tabletop:franka")]
    monkeypatch.setattr(tables, "lines", lambda method: made)
    found = [row.split(" | ") for row in tables.short_table().splitlines() if row.startswith("| `")]
    arms = ["| `t1-twin`", "| `t1-vanilla`", "| `t1-vanilla --augment 2`", "| `t9-student`"]
    assert [row[0] for row in found] == arms and found[0][3].startswith("80.0")
    assert "-25.0" in found[1][5] and found[2][5].startswith("-20.0")
    suites = [row.split(" | ") for row in tables.suites_table().splitlines()[2:-2]]
    assert [row[0] for row in suites] == ["| bridge", "| bridge", "| franka"]
    assert suites[1][2] == "by seed 50.0, 60.0"  # without the arms of other flags
    assert suites[2][1] == "`t1-twin`" and suites[2][2].startswith("40.0") and suites[2][3] == ""


def test_a_difference_is_of_runs_in_one_precision(monkeypatch):
    """Seed 0: both have bfloat16. 1: float32 is what both have. 2: nothing in common."""
    runs = {"a": [(0, ""), (0, "fp32"), (1, "fp32"), (2, "")], "b": [(0, ""), (1, ""), (1, "fp32"),
            (2, "fp32")]}  # fmt: skip
    made = [
        {"arm": arm, "seed": seed, "flags": f"--steps 9 --dtype {dtype}" if dtype else "--steps 9"}
        for arm, mine in runs.items() for seed, dtype in mine
    ]  # fmt: skip
    monkeypatch.setattr(tables, "lines", lambda method: made)
    pair = tables.side_by_side("any", ("a", "--steps 9"), ("b", "--steps 9"))
    found = [[(x["arm"], x["seed"], tables.FLOAT in x["flags"]) for x in some] for some in pair]
    assert found == [[("a", 0, False), ("a", 1, True)], [("b", 0, False), ("b", 1, True)]]
    alone = [(x["seed"], tables.FLOAT in x["flags"]) for x in tables.arm("any", "b", "--steps 9")]
    assert alone == [(0, False), (1, False), (2, True)]


@pytest.mark.parametrize("name", ["results.md", "claims.md", "speed.md"])
def test_no_result_is_typed_by_hand(name):
    typed = tables.VALUE.sub("", tables.BLOCK.sub("", TEXT[name]))
    assert not re.findall(r"\d+\.\d|\d+ ?%(?! (?:interval|t-interval))", typed.replace("95%", ""))


def test_readmes_count_of_tests_is_near(request):
    """The count belongs to a measured time, so it may lag behind a little; known in a whole run."""
    files = {item.path.name for item in request.session.items}
    if files != {path.name for path in (ROOT / "tests").glob("test_*.py")}:
        pytest.skip("only in a run of all tests")
    said = int(re.search(r"(\d+) tests in \d+ s", (ROOT / "README.md").read_text())[1])
    assert abs(said - len(request.session.items)) <= 0.1 * len(request.session.items)


# --- claims ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("expect, gaps, want", [
    ("more", (0.05, 0.06, 0.07), "held"), ("less", (0.05, 0.06, 0.07), "did not hold"),
    ("more", (-0.05, 0.06, 0.07), "undecided"), ("same", (0.01, 0.0, -0.01), "held"),
    ("same", (0.2, 0.21, 0.22), "did not hold"), ("same", (0.2, -0.2, 0.1), "undecided"),
    ("more", (0.3,), "undecided"), ("more", (0.05,), "undecided"), ("more", (), "not run yet"),
])  # fmt: skip
def test_verdicts(expect, gaps, want, monkeypatch):
    def line(arm, seed, success):
        domains = {"in": {"success": success, "episodes": 200}}
        return {"arm": arm, "flags": "", "seed": seed, "domains": domains}

    made = [line("a", s, 0.5 + gap) for s, gap in enumerate(gaps)]
    made += [line("b", s, 0.5) for s in range(3)]
    monkeypatch.setattr(tables, "lines", lambda method: made)
    test = dict(method="m", arm="a", measure="in", against="b", against_measure="in")
    test |= {"flags": "", "against_flags": "", "expect": expect}
    assert tables.verdict({"test": test})[0] == want


def test_a_claim_may_be_left_undecided_with_its_reason(monkeypatch):
    monkeypatch.setattr(tables, "side_by_side", lambda *arms: ([], []))
    monkeypatch.setattr(tables, "gap", lambda *some: (0.8, 0.7, 0.9, "3 seeds"))
    test = dict(method="m", arm="a", measure="in", against="b", against_measure="in")
    test |= {"flags": "", "against_flags": "", "expect": "more"}
    monkeypatch.setattr(tables, "lines", lambda method: [])
    assert tables.verdict({"test": test})[0] == "held"
    outcome, numbers = tables.verdict({"test": test, "undecided": "b is cut short"})
    assert outcome == "undecided" and numbers.endswith("; b is cut short")


def test_numbers_of_evening_four():
    """How many seeds would tell: two-sided t of 95% for 8 and 23 degrees of freedom."""
    arms = [tables.arm("twinbrain", name) for name in ("t1-twin", "t1-vanilla")]
    _, low, high, _ = tables.gap(*arms, "look")
    s = 100 * (high - low) / 2 / 4.303 * 3**0.5
    assert f"s = {s:.0f} points" in TEXT["guide.md"]
    assert 2.306 * s / 9**0.5 < 17.7 and 2.069 * s / 24**0.5 < 9.35


def test_claims_name_arms_and_measures_that_exist():
    domains = "in look colour shape pair wording out chain pick_all length train_seconds answers "
    known = domains.split() + [f"{s} {a}" for s in ("left", "right") for a in common.ABILITIES]
    known += ["vla_score", "reason in", "reason ms_mean", "plain in"]
    for claim in CLAIMS["claims"]:
        assert claim["paper"] in tables.BASES and claim["claim"].endswith(".")
        if test := claim.get("test"):
            script = SCRIPTS[test["method"]]
            assert {test["arm"], test["against"]} <= script.ABLATIONS.keys()
            for name in (test["measure"], test["against_measure"]):
                assert name.split(": ")[-1] in known, name
            assert test["expect"] in ("more", "less", "same")
            assert f" {test['method']} " in claim["command"] and test["arm"] in claim["command"]
    assert len(CLAIMS["claims"]) >= 25


@pytest.mark.parametrize("choice", CLAIMS["choices"], ids=lambda c: c["what"][:30])
def test_every_choice_has_its_flag(choice):
    script = SCRIPTS[tables.BASES[choice["paper"]]]
    common.parse(script.Config, script.PRESETS, script.ABLATIONS, shlex.split(choice["flag"]))
    assert choice["flag"] or choice["here"]


def test_flags_of_choices_show_their_defaults():
    for flag, want in (("--visibility index", "`--visibility index` (all)"), ("", ""),
                       ("--no-deepstack", "`--no-deepstack` (on)"),
                       ("--ablation t1-vanilla", "`--ablation t1-vanilla`")):  # fmt: skip
        assert tables.flag_cell(twinbrain, flag) == want
    assert "| `--lr` | 0.002 | 1e-05 | 1e-05 |" in tables.preset_table("twinbrain")


def test_computed_memory_is_still_true():
    """One row anew; the others come from the same function."""
    row = {x["backbone"]: x for x in tables.measured("memory")}["Qwen3-VL-4B"]
    for kind in ("TwinBrainVLA", f"twin, `{memory.SPARING}`"):
        assert row["bytes"][kind] == memory.needs(*memory.KINDS[kind], "Qwen3-VL-4B")
    assert set(common.BACKBONES) == {x["backbone"] for x in tables.measured("memory")}


def test_the_diagram_is_what_its_script_draws(tmp_path, monkeypatch):
    monkeypatch.setattr(diagram, "ROOT", tmp_path)
    diagram.main()
    name = "assets/figures/methods.png"
    drawn, kept = (Image.open(root / name).convert("L") for root in (tmp_path, ROOT))
    assert drawn.size == kept.size
    apart = np.abs(np.asarray(drawn, int) - np.asarray(kept, int))
    assert (apart > 60).mean() < 0.002  # letters differ a little between versions


# --- commands, paths, flags -----------------------------------------------------------------------


def blocks(name, kind):
    return re.findall(rf"^```{kind}\n(.*?)^```$", TEXT[name], re.DOTALL | re.MULTILINE)


def commands():
    """Every line of the pages' bash blocks, and every command in backticks or in the claims."""
    found = [line for n in TEXT for block in blocks(n, "bash") for line in block.splitlines()]
    starts = r"`((?:python|torchrun) [^`]+)`"
    found += [c for text in TEXT.values() for c in re.findall(starts, text)]
    return sorted({*found, *(claim["command"] for claim in CLAIMS["claims"])} - {""})


def check_command(line):
    """Raises where a command could not start: an unknown file, flag, arm or reference."""
    line = line.replace("$seed", "0").replace("{seed}", "0").replace("mine.py", "twinbrain.py")
    for part in re.split(r";|\||&&|\bdo\b", line):
        words = shlex.split(part, comments=True)
        if not words or words[0] not in ("python", "torchrun"):
            continue
        start = next(i for i, word in enumerate(words) if word.endswith(".py"))
        path, words = words[start], words[start + 1 :]
        name = path.removesuffix(".py")
        assert (ROOT / path).exists(), path
        if name in SCRIPTS and words != ["-h"]:
            script = SCRIPTS[name]
            common.parse(script.Config, script.PRESETS, script.ABLATIONS, words)
        elif name == "bench/compare":
            compare.arguments(words)
        elif name == "worlds/serve":
            common.parse(serve.Config, {}, {}, words)
        elif name == "worlds/calvin":
            calvin.arguments(words)
        elif name == "bench/study":
            flags = words[words.index("--") + 1 :] if "--" in words else []
            words = words[: words.index("--")] if "--" in words else words
            script, stop = SCRIPTS[words[0]], words.index("--seeds")
            assert set(words[1:stop]) <= script.ABLATIONS.keys() and int(words[stop + 1]) > 0
            common.parse(script.Config, script.PRESETS, script.ABLATIONS, flags)


@pytest.mark.parametrize("line", commands())
def test_every_command_parses(line):
    check_command(line)


@pytest.mark.parametrize("line", ["python twinbrian.py", "python twinbrain.py --step 2",
                                  "python bench/study.py twinbrain t1-twn --seeds 3"])  # fmt: skip
def test_a_wrong_command_would_be_noticed(line):
    with pytest.raises((AssertionError, common.UserError)):
        check_command(line)


@pytest.mark.parametrize("name", TEXT)
def test_paths_links_and_flags_exist(name):
    left_by_runs = {"metrics.jsonl", "result.json", "first_batch.png", "mine.py", "pruning.png",
                    "rollout-in-0.gif", "loss-action.png", "rates.png",
                    "reasoning.jsonl"}  # fmt: skip
    for path in re.findall(r"`([\w./-]+\.(?:py|md|json|jsonl|png|gif|ipynb))`", TEXT[name]):
        assert path in left_by_runs or path.startswith("dual/") or (ROOT / path).exists(), path
    for link in re.findall(r"\]\(([\w./-]+)\)", TEXT[name]):
        assert (ROOT / "docs" / link).exists(), link
    scripts = (*SCRIPTS.values(), serve)
    known = {f.replace("_", "-") for s in scripts for f in s.Config.__dataclass_fields__}
    known |= {"against", "check-curve", "degeneration", "keep", "forgetting", "make-reference"}
    known |= {"seeds", "write", "calvin", "record", "rows", "quick"}
    known |= {"no-cache", "no-state", "no-deepstack"}
    known |= {"nproc-per-node", "nnodes", "rdzv-backend", "rdzv-endpoint", "max-restarts"}
    known |= {"requeue", "signal", "ntasks-per-node", "gpus-per-node"}  # Slurm's; above torchrun's
    for flag in re.findall(r"(?<![\w-])--([a-z][a-z-]+)", re.sub(r"<!--.*?-->", "", TEXT[name])):
        assert flag in known, flag


def test_functions_named_in_the_guide_exist():
    start, *evenings = re.split(r"^## Evening", TEXT["guide.md"], flags=re.MULTILINE)
    shared = [
        ROOT / f for f in ("worlds/events.py", "worlds/score.py", "parts/seer.py", "parts/units.py")
    ]
    files = {name: [ROOT / f"{name}.py"] for name in SCRIPTS}
    files["all"] = [*(ROOT / f"{name}.py" for name in SCRIPTS), ROOT / "data.py"]
    assert len(evenings) == 4
    for names, text in zip([*files.values(), files["all"]], [*evenings, start]):
        source = "".join(file.read_text() for file in [*names, *shared])
        for name in re.findall(r"`(?:\w+\.)*(\w+)\(\)`", text):
            assert f"def {name}(" in source, name


def test_abbreviations_are_in_the_glossary():
    """Words in capitals that a first-year student may not know, of the README and the guides."""
    text = (ROOT / "README.md").read_text() + "".join(TEXT[n] for n in (*GUIDES, "use.md"))
    text = re.sub(r"```.*?```|`[^`]*`|<!--.*?-->|\]\(.*?\)", "", text, flags=re.DOTALL)
    used = set(re.findall(r"\b[A-Za-z]*[A-Z][a-z]*[A-Z][A-Za-z]*\b", text))
    explained = set(re.findall(r"[A-Za-z]+", TEXT["glossary.md"].partition("# Every number")[0]))
    assert used - explained <= NAMES, used - explained - NAMES


# --- the glossary ---------------------------------------------------------------------------------


def logged_keys(script):
    """Keys that a script's source logs: of its losses, of evaluate() and of what run.result gets;
    and those that the closed loop and the scores add."""
    found = set()
    shared = [ROOT / "worlds" / "loop.py", ROOT / "parts" / "runs.py"]
    files = [ROOT / f"{script.__name__}.py", *shared]
    for node in (n for file in files for n in ast.walk(ast.parse(file.read_text()))):
        if isinstance(node, ast.Subscript) and isinstance(node.slice, ast.Constant):
            if getattr(node.value, "id", "") in ("losses", "results", "result"):
                found.add(node.slice.value)
        inside = isinstance(node, ast.FunctionDef) and node.name in (
            "evaluate", "action_losses", "token_losses", "facts", "session", "tally",
        )  # fmt: skip
        for inner in ast.walk(node) if inside else ():
            keys = inner.keys if isinstance(inner, ast.Dict) else ()
            found |= {key.value for key in keys if isinstance(key, ast.Constant)}
    return {key for key in found if isinstance(key, str)} - {"config"}


def defined():
    rows = re.findall(r"^\| (`.*?) \|", TEXT["glossary.md"], re.MULTILINE)
    return {word for row in rows for word in re.findall(r"`([^`]+)`", row)}


@pytest.mark.parametrize("script", SCRIPTS.values(), ids=lambda s: s.__name__)
def test_every_logged_key_is_in_the_glossary(script):
    keys = logged_keys(script)
    assert len(keys) > 10 and {"success", "ci95"} <= keys
    assert keys <= defined(), keys - defined()


# --- answers of the guide -------------------------------------------------------------------------


def diffs():
    return [(name, diff) for name in GUIDES for diff in blocks(name, "diff")]


def patched(diff):
    """A diff of the pages -> name of the script, its source after the change. Each hunk must fit
    one place, after the definition it names."""
    head, *hunks = re.split(r"^@@ (.+) @@\n", diff, flags=re.MULTILINE)
    name = re.search(r"^--- (\w+)\.py$", head, re.MULTILINE)[1]
    source = (ROOT / f"{name}.py").read_text()
    for where, hunk in zip(hunks[::2], hunks[1::2]):
        rows = hunk.splitlines(keepends=True)
        old, new = ("".join(r[1:] for r in rows if r[0] in sign) for sign in (" -", " +"))
        assert source.count(old) == 1, f"{where}: {source.count(old)} places for\n{old}"
        assert where in source[: source.index(old)], where
        source = source.replace(old, new)
    return name, source


@pytest.fixture
def forked():
    """A diff -> the changed script as a module; what it registers is taken back afterwards."""
    kept = {n: f for n, f in AttentionInterface().items() if n.startswith("asymot")}

    def make(diff):
        name, source = patched(diff)
        module = types.ModuleType(f"forked_{name}")
        module.__file__ = str(ROOT / f"{name}.py")
        sys.modules[module.__name__] = module
        exec(compile(source, module.__name__, "exec"), module.__dict__)
        return module

    yield make
    for name, function in kept.items():
        AttentionInterface.register(name, function)
    for name in SCRIPTS:
        sys.modules.pop(f"forked_{name}", None)


@pytest.mark.parametrize("page, diff", diffs())
def test_every_diff_applies(page, diff):
    name, source = patched(diff)
    compile(source, name, "exec")
    assert max(map(len, source.splitlines())) <= 100


def diff_with(text):
    (found,) = (diff for _, diff in diffs() if text in diff)
    return found


def gradients(module, brain="twin"):
    vlm, processor = common.load_backbone("tiny")
    cfg = twinbrain.Config(batch=2, brain=brain, width=32, depth=2, heads=2, dtype="fp32")
    torch.manual_seed(0)
    model = module.TwinBrain(cfg, vlm, processor, 8, 7)
    rng, samples = np.random.default_rng(0), []
    for _ in range(2):
        images = [rng.integers(0, 255, (s, s, 3), np.uint8) for s in (64, 32)]
        sample = {"images": images, "instruction": "put the red block on the blue plate"}
        sample |= {"robot": "tabletop", "state": rng.standard_normal(8).astype(np.float32)}
        action = rng.uniform(-1, 1, (8, 7)).astype(np.float32)
        samples.append(sample | {"action": action, "mask": np.ones(8, bool)})
    alone = common.Dist(0, 1, torch.device("cpu"))
    noise = twinbrain.draw_noise(cfg, 0, 7, alone)
    module.total_loss(model(module.sense(samples, cfg, processor), noise), cfg).backward()
    return {n: p.grad for n, p in model.named_parameters()}


def test_without_the_stop_gradient_nothing_changes(forked):
    fork = forked(diff_with("if False:"))
    ours, theirs = gradients(twinbrain), gradients(fork)
    assert ours.keys() == theirs.keys()
    for name, grad in ours.items():
        assert (
            (grad is None) == (theirs[name] is None) == (name.startswith("left.") or grad is None)
        )
        assert grad is None or torch.equal(grad, theirs[name]), name


def test_a_velocity_turned_around_still_arrives(forked):
    fork = forked(diff_with("a_0 - a_1"))
    torch.manual_seed(0)
    a_0, a_1, t = torch.randn(2, 3, 8, 7), torch.rand(2, 8, 7), torch.rand(2, 3)
    mask, back = torch.ones(2, 8, dtype=torch.bool), lambda x, t, keys=None: a_0 - a_1[:, None]
    assert fork.flow_loss(back, None, a_1, mask, a_0, t) == 0
    assert twinbrain.flow_loss(back, None, a_1, mask, a_0, t) > 1
    start = a_0[:, 0]
    reached = fork.integrate(lambda x, t: (start - a_1)[:, None], start, 4)
    assert torch.allclose(reached, a_1, atol=1e-6)


def test_sums_done_by_hand():
    """The guide's ten ideas, with the code's own functions."""
    text = " ".join(re.search(r"## In five minutes(.*?)\n## ", TEXT["guide.md"], re.S)[1].split())

    def says(*words):
        assert all(word in text for word in words), words

    assert data.squeeze(np.array([5.0]), np.array([2.0]), np.array([6.0])) == 0.5
    says("= 0.5* (`normalise()`", f"0.99^40 = {0.99**40:.0%}", "36 / 2 = 18 plans")
    assert (twinbrain.Config.horizon, twinbrain.Config.execute) == (8, 2)
    scores, values = torch.tensor([0.0, 0.0, math.log(2)]), torch.tensor([4.0, 8.0, 2.0])
    k, one = scores[None, None, :, None], torch.ones(1, 1, 1, 1)
    seen = torch.ones(1, 1, 1, 3, dtype=torch.bool)
    assert float(common.attend(one, k, values[None, None, :, None], seen, 1.0)) == pytest.approx(4)
    a_0, a_1, t, way = torch.tensor([[[-1.0]]]), torch.tensor([[[0.5]]]), torch.tensor([[0.25]]), []

    def velocity(x, t, keys=None):
        way.append(float(x))
        return torch.full_like(x, 1.5)

    inside = torch.ones(1, 1, dtype=torch.bool)
    assert twinbrain.flow_loss(velocity, None, a_1, inside, a_0[:, None], t) == 0
    assert way.pop() == -0.625 and twinbrain.integrate(velocity, a_0, 4) == 0.5
    assert way == [-1, -0.625, -0.25, 0.125]
    says("= -0.625, velocity 1.5.", "-0.625, -0.25, 0.125, 0.5*", "(3, 4) apart is 25")
    p, q = torch.tensor([[0.5, 0.5]]).log(), torch.tensor([[0.75, 0.25]]).log()
    kl = common.linear_kl(q, torch.eye(2), p, torch.eye(2), 1.0)
    says(f"0.5 ln 2 = {float(kl):.3f}*")
    lora = scale.LoRA(torch.nn.Linear(128, 128, bias=False).requires_grad_(False), 4)
    says(f"{common.param_counts(lora)['trainable']:,} numbers", f"of {128 * 128:,}")
    says("{:.1%} to {:.1%}".format(*common.ci95(18, 20)))
    says("{:.1%} to {:.1%}".format(*common.ci95_mean([0.80, 0.83, 0.89])), "84 ± 4.303 * 4.58")


def test_counts_of_the_masks():
    left, right = torch.ones(1, 3, dtype=torch.bool), torch.ones(1, 4, dtype=torch.bool)
    counts = [int(twinbrain.joint_mask(left, right, v).sum()) for v in ("all", "index")]
    assert counts == [22, 19] and "22 and 19." in TEXT["guide.md"]
    assert tables.joint_layers(4) == tables.joint_layers(8)  # the guide says so
    assert int(seer.seer_mask(2, 3, 2, 1).sum()) == 58 and "\n58. " in TEXT["guide.md"]


def test_numbers_of_evening_two():
    h, steps = torch.tensor([[[[3.0, 4.0]]]]), torch.ones(1, 1, dtype=torch.bool)
    losses = [float(vita_vla.align_loss(h, 0 * h, steps, how)) for how in ("mse", "norm")]
    assert losses == pytest.approx([25, 5]) and "25 and 5 " in TEXT["guide.md"]
    vlm, processor = common.load_vlm("tiny")
    sizes = []
    for tokens in ("shared", "separate"):
        cfg = vita_vla.Config(stage="align", tokens=tokens, width=32, heads=2)
        sizes.append(common.param_counts(vita_vla.VitaVLA(cfg, vlm, processor))["total"])
    assert f"{sizes[1] - sizes[0]:,}" == tables.FACTS["extra-action-tokens"]()


def test_numbers_of_evening_three():
    pose = np.zeros((12, 6))
    pose[:, 0] = np.minimum(np.arange(12), 5)
    assert list(dualvla.acceleration_keyframes(pose, np.zeros(12)).nonzero()[0]) == [5]
    score = dualvla.vla_score(0.74, 0.648, 0.747, 0.51, 0.61)
    assert f"{100 * score:.1f}" == "19.0" and "\n19.0. " in TEXT["guide.md"]
    v, mask = torch.full((1, 1, 2, 7), 0.1), torch.ones(1, 2, dtype=torch.bool)
    for sigma, share in ((0.5**0.5, "0.0015"), (0.05, "0.3")):  # question 5
        cfg = types.SimpleNamespace(actions="flow", sigma=sigma)
        kl = dualvla.action_distillation(0 * v, v, None, None, mask, cfg)
        assert f"{0.15 * kl:.4f}".rstrip("0") == share and share in TEXT["guide.md"]
    rng = np.random.default_rng(0)
    scene, action = rng.random(200) < 0.4, rng.random(200) < 0.4
    kept = {r: int(dualvla.keep(scene, action, r, rng).sum()) for r in
            ("both", "action", "scene", "either", "random")}  # fmt: skip
    assert kept["both"] <= min(kept["action"], kept["scene"]) and kept["random"] == kept["both"]
    assert max(kept["action"], kept["scene"]) <= kept["either"]


def test_a_temperature_quietens_the_teacher(forked):
    fork = forked(diff_with("KL(pi_G"))
    torch.manual_seed(0)
    h, weight, theirs = torch.randn(6, 8), 0.1 * torch.randn(20, 8), torch.randn(6, 8)
    norms = {}
    for module in (dualvla, fork):
        for T in (1.0, 4.0):
            x = h.clone().requires_grad_()
            cfg = types.SimpleNamespace(temperature=T)
            module.reason_distillation(theirs, weight, x, weight, cfg).backward()
            norms[module, T] = float(x.grad.norm())
    assert norms[dualvla, 4.0] == pytest.approx(norms[dualvla, 1.0], rel=0.3)
    assert norms[fork, 1.0] / norms[fork, 4.0] == pytest.approx(16, rel=0.3)


def test_twins_agree_on_answers_at_first(forked):
    """Evening 4's diff: no loss where the brains are one model; then one, for the right alone."""
    fork = forked(diff_with("self.left.lm_head.weight"))
    vlm, processor = common.load_backbone("tiny")
    cfg = twinbrain.Config(cotrain=0.1, width=32, depth=2, heads=2, dtype="fp32", state=False)
    torch.manual_seed(0)
    model = fork.TwinBrain(cfg, vlm, processor, 8, 7)
    image, rng = np.zeros((64, 64, 3), np.uint8), np.random.default_rng(0)
    sample = {"images": [image], "instruction": "wait", "robot": "tabletop"}
    sample |= {"state": np.zeros(8, np.float32), "mask": np.ones(8, bool)}
    sample["action"] = rng.random((8, 7), np.float32)
    asked = {"images": [image], "question": "is there a red block?", "answer": "no"}
    batch = fork.collate([sample, asked], cfg, processor)
    noise = torch.randn(1, 4, 8, 7), torch.rand(1, 4)
    assert model(batch, noise)["reason"].item() == pytest.approx(0, abs=1e-6)
    with torch.no_grad():
        model.right.model.language_model.norm.weight *= torch.linspace(0.5, 1.5, 128)
    losses = model(batch, noise)
    assert losses["reason"].item() > 1e-3
    fork.total_loss(losses, cfg).backward()
    assert all(p.grad is None for p in model.left.parameters())
    weight = model.right.model.language_model.layers[-1].mlp.down_proj.weight
    assert weight.grad.abs().sum() > 0


def test_the_forks_right_brain_sees_pictures_alone(forked):
    """The worked fork changes what is learned; and with no left brain, nothing."""
    fork = forked(diff_with("+++ mine.py"))
    ours, theirs = gradients(twinbrain), gradients(fork)
    assert any(g is not None and not torch.equal(g, theirs[n]) for n, g in ours.items())
    ours, theirs = gradients(twinbrain, "vanilla"), gradients(fork, "vanilla")
    assert all(g is None or torch.equal(g, theirs[n]) for n, g in ours.items())


def test_widths_of_intervals_over_seeds():
    said = re.search(
        r"is (\S+) for two seeds, (\S+) for three, (\S+) for four", TEXT["ablation.md"]
    )
    widths = [f"{compare.student(n - 1) / math.sqrt(n):.1f}" for n in (2, 3, 4)]
    assert [word.strip(".") for word in said.groups()] == widths


# --- bench/compare.py -----------------------------------------------------------------------------


def curve(seed, effect=0.03, noise=0.08, steps=1500, late=None, rate=200.0):
    """A made-up training loss, logged every 20 steps; late: where it stops falling and climbs."""
    rng = random.Random(seed)
    own, line = rng.gauss(0, effect), []
    for step in range(20, steps + 1, 20):
        value = (0.06 + 0.6 * math.exp(-step / rate)) * math.exp(own + rng.gauss(0, noise))
        line.append((step, value * (1 + max(0, step - late) / 200 if late else 1)))
    return line


def made_run(folder, seed=0, line=None, success=0.5, **settings):
    folder.mkdir(parents=True)
    config = {"config": {"seed": seed, "lr": 0.001, "out": str(folder)} | settings}
    config |= {"command": f"python {folder}/x.py --out {folder} --seed {seed}", "method": "made-up"}
    (folder / "config.json").write_text(json.dumps(config))
    rows = [{"step": s, "time": 1.0, "action": v, "lr": 1e-3, "norm": 1.0}
            for s, v in line or curve(seed)]  # fmt: skip
    (folder / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    domains = {"in": {"success": success, "episodes": 100, "ci95": [0, 1], "per_task": {}}}
    (folder / "result.json").write_text(json.dumps({"domains": domains, "seed": seed}))
    return str(folder)


def test_difference_of_two_proportions():
    """The examples of Newcombe's paper (1998, method 10)."""
    for (a, n, b, m), want in (((56, 70, 48, 80), (0.0524, 0.3339)),
                               ((9, 10, 3, 10), (0.1705, 0.8090))):  # fmt: skip
        assert compare.ci95_difference(a / n, n, b / m, m) == pytest.approx(want, abs=5e-4)
    assert [round(compare.student(n), 3) for n in (1, 2, 9)] == [12.706, 4.303, 2.262]


def test_the_band_holds_19_of_20_and_notices_the_rest():
    left = [compare.left_at(curve(100 + 10 * i), [curve(100 + 10 * i + k) for k in (1, 2, 3)])[0]
            for i in range(60)]  # fmt: skip
    assert sum(map(bool, left)) <= 6  # of 60 runs like the reference's own
    lines = [curve(seed) for seed in range(3)]
    (step, value, low, high), _ = compare.left_at(curve(7, late=800), lines)
    assert 820 <= step <= 1300 and value > high > low > 0
    (step, *_), _ = compare.left_at(curve(7, rate=600.0), lines)  # learns three times slower
    assert step <= 300
    assert compare.left_at(curve(7)[:30], lines)[0] is None  # still going on


def test_three_curves_that_cross_do_not_pinch_the_band():
    lines = [[(s, 1.0 + slope * (s - 500)) for s in range(20, 1001, 20)]
             for slope in (0.0004, 0.0, -0.0004)]  # fmt: skip
    _, limits = compare.band(lines, [500, 1000])
    assert all(high / low > 1.2 for low, _, high in limits)


def test_losses_may_begin_at_zero():
    lines = [[(s, s * (1 + 0.01 * k)) for s in range(0, 1000, 20)] for k in range(3)]
    assert compare.left_at([(s, 1.01 * s) for s in range(0, 1000, 20)], lines)[0] is None


def test_a_reference_is_made_and_asked(tmp_path, monkeypatch, capsys):
    """Three runs of one kind, one that stays with them, and one whose loss is threefold from step
    600 on."""
    monkeypatch.setattr(compare, "ROOT", tmp_path)
    runs = [made_run(tmp_path / f"run-{s}", s) for s in range(3)]
    with pytest.raises(common.UserError, match="no reference made-up yet .* --make-reference made"):
        compare.main(["--check-curve", runs[0]])
    compare.main([*runs, "--make-reference", "made-up"])
    row = json.loads((tmp_path / "assets/reference/made-up.jsonl").read_text().splitlines()[0])
    assert row["machine"] and row["seed"] == 0 and row["command"] == "python x.py --seed 0"
    assert str(tmp_path) not in json.dumps(row)
    assert (tmp_path / "assets/reference/made-up-action.png").exists()
    broken = [(step, loss * (3 if step >= 600 else 1)) for step, loss in curve(9)]
    for run, code in ((made_run(tmp_path / "good", 5), 0),
                      (made_run(tmp_path / "bad", 9, broken, lr=0.1), 1)):  # fmt: skip
        capsys.readouterr()
        with pytest.raises(SystemExit) as end:
            compare.main(["--check-curve", run, "--out", str(tmp_path / "out")])
        said = capsys.readouterr().out
        assert end.value.code == code and ("action: within the band" in said) == (code == 0)
        assert ("--lr is 0.1 here, 0.001 in the reference" in said) == bool(code)
    left = re.search(r"left the band at step (\d+), above it: ([\d.]+), ([\d.]+) to ([\d.]+)", said)
    assert 600 <= int(left[1]) <= 660 and float(left[2]) > float(left[4]) > float(left[3])
    assert left[0] in TEXT["ablation.md"]
    with pytest.raises(common.UserError, match="no reference made-up-short yet"):
        compare.main(["--check-curve", made_run(tmp_path / "short", preset="short")])
    assert (tmp_path / "out" / "band-action.png").exists()


@pytest.mark.parametrize("words, names", [
    (["nowhere", "nowhere"], "nowhere: no run here"),
    (["a", "--reference", "nothing"], "no reference nothing yet .*holds none"),
    (["a", "b", "--check-curve"], "one run folder"),
    (["a"], "two runs"), (["a", "a", "a", "--make-reference", "x"], "each its own seed"),
    (["a", "b", "c", "--make-reference", "x"], "differs from a in lr"),
    (["a", "b", "torn"], "two runs"), (["a", "torn"], "no JSON"),
])  # fmt: skip
def test_what_cannot_be_compared_is_one_clear_line(words, names, tmp_path, monkeypatch):
    monkeypatch.setattr(compare, "ROOT", tmp_path)
    monkeypatch.chdir(tmp_path)
    for i, name in enumerate("abc"):
        made_run(tmp_path / name, i, lr=0.1 * i)
    made_run(tmp_path / "torn")
    (tmp_path / "torn" / "metrics.jsonl").write_text("{not json}\n")
    with pytest.raises(common.UserError, match=names):
        compare.main(words)


def test_two_sides_by_seed(tmp_path, capsys):
    ours = [made_run(tmp_path / f"a{s}", s, success=0.6 + 0.01 * s) for s in range(3)]
    theirs = [made_run(tmp_path / f"b{s}", s, success=0.5 + 0.02 * s, lr=0.5) for s in range(3)]
    compare.main([*ours, "--against", *theirs, "--out", str(tmp_path / "out")])
    said = capsys.readouterr().out
    low, high = common.ci95_mean([0.1, 0.09, 0.08])
    assert f"difference +9.0 ({100 * low:.1f} to {100 * high:.1f}), 3 seeds" in said
    assert re.search(r"--lr +0.001 +0.5\n", said) and "--seed" not in said
    for name in ("loss-action.png", "rates.png"):
        assert len(set(Image.open(tmp_path / "out" / name).convert("L").tobytes())) > 3
    compare.main([ours[0], theirs[0], "--out", str(tmp_path / "out")])
    low, high = compare.ci95_difference(0.6, 100, 0.5, 100)
    wanted = f"+10.0 ({100 * low:.1f} to {100 * high:.1f}), episodes"
    assert wanted in capsys.readouterr().out


def test_seeds_that_are_not_paired():
    """Two runs a side, no seed in common: Welch's interval with one degree of freedom."""
    ours, theirs = ({s: (v, 100) for s, v in side} for side in
                    (((0, 0.5), (1, 0.7)), ((2, 0.4), (3, 0.4))))  # fmt: skip
    gap, low, high, how = compare.difference(ours, theirs)
    assert (gap, high - gap) == pytest.approx((0.2, 12.706 * 0.1)) and "not paired" in how
    assert low == pytest.approx(gap - 12.706 * 0.1)


def test_the_comparison_shown_is_the_one_printed(tmp_path, capsys):
    _, _, shown = TEXT["ablation.md"].partition("`python bench/compare.py twinbrain:t1-twin")
    compare.main(["twinbrain:t1-twin", "twinbrain:t1-vanilla", "--out", str(tmp_path)])
    shown, printed = shown.split("```")[1].split("\n")[1:-1], capsys.readouterr().out.split("\n")
    assert len(shown) == 5 and {*shown} <= {*printed}


def test_one_seed_in_common_is_compared_alone():
    ours, theirs = {0: (0.5, 100)}, {0: (0.6, 100), 1: (0.9, 100), 2: (0.9, 100)}
    gap, low, high, how = compare.difference(ours, theirs)
    assert gap == pytest.approx(-0.1) and low < -0.1 < high and how == "episodes"


def test_a_chain_has_the_losses_of_its_stages(tmp_path):
    for stage in ("align", "teacher"):
        made_run(tmp_path / "chain" / stage, 0, [(1, 2.0)])
    (tmp_path / "chain" / "chain.json").write_text('{"config": {"seed": 4}}')
    made = compare.read_run(tmp_path / "chain")
    assert list(made.curves) == ["teacher action", "align action"]
    assert made.settings == {"seed": 4} and made.result["domains"]


# --- the notebook ---------------------------------------------------------------------------------


def cells():
    return json.loads((ROOT / "docs" / "tour.ipynb").read_text())


def code_cells():
    return ["".join(c["source"]) for c in cells()["cells"] if c["cell_type"] == "code"]


def test_the_notebook_is_one():
    book = cells()
    assert (book["nbformat"], book["nbformat_minor"]) == (4, 5)
    ids = [cell["id"] for cell in book["cells"]]
    assert len(set(ids)) == len(ids)
    for cell in book["cells"]:
        assert cell["cell_type"] in ("markdown", "code") and isinstance(cell["source"], list)
        if cell["cell_type"] == "code":  # results are the reader's own
            assert cell["outputs"] == [] and cell["execution_count"] is None
    installs = [source for source in code_cells() if "pip" in source]
    assert installs == code_cells()[:1]
    for source in code_cells():
        ast.parse(source)


# --- slow: everything really runs -----------------------------------------------------------------


@pytest.mark.slow
def test_the_notebook_runs_from_top_to_bottom(tmp_path):
    """Its cells in one program; what IPython would show is counted and must be pictures."""
    shown = tmp_path / "IPython"
    shown.mkdir()
    (shown / "__init__.py").write_text("")
    (shown / "display.py").write_text(
        "class Image:\n    def __init__(self, data=None, **_):\n        self.data = data\n"
        "def display(thing):\n    import base64\n"
        "    data = thing.data if isinstance(thing, Image) else None\n"
        "    print('SHOWN', base64.b64encode(data).decode() if data else 'words')\n"
    )
    program = tmp_path / "tour.py"
    program.write_text("\n\n".join(code_cells()))
    env = os.environ | {"PYTHONPATH": f"{ROOT}:{tmp_path}", "TOUR_STEPS": "4"}
    done = subprocess.run([sys.executable, str(program)], cwd=ROOT / "docs", env=env,
                          capture_output=True, text=True, timeout=900)  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    lines = [x.split()[1] for x in done.stdout.splitlines() if x.startswith("SHOWN ")]
    pictures = [Image.open(io.BytesIO(base64.b64decode(x))) for x in lines if x != "words"]
    assert len(pictures) >= 7 and sum(p.format == "GIF" for p in pictures) >= 1


def runnable(name):
    lines = [line for block in blocks(name, "bash") for line in block.splitlines()]
    return [line for line in lines if "RUN" not in line and "study" not in line]


def small(line):
    """A command of the pages with the flags of SMALL behind its own: later ones win."""
    for script, flags in SMALL.items():
        name = "(?:twinbrain|mine)" if script == "twinbrain" else script
        start = rf"python {name}\.py (?!-h|--ablation list)[^;|]*?"
        line = re.sub(rf"({start})(?=\s*(?:;|\||$))", rf"\1 {flags} --threads 1", line)
    return line


@pytest.mark.slow
@pytest.mark.parametrize("name", GUIDES)
def test_every_command_runs(name, tmp_path):
    """In order, in one folder, each made small."""
    for source in ROOT.iterdir():
        if source.name not in ("runs", ".git", "docs", "tests", "README.md"):
            (tmp_path / source.name).symlink_to(source)
    (tmp_path / "tests").mkdir()
    env = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    for line in map(small, runnable(name)):
        if "readme_tables" in line or "git " in line:
            continue
        line = line.replace("python ", f"{shlex.quote(sys.executable)} ").replace("| less", "")
        done = subprocess.run(["bash", "-c", line], cwd=tmp_path, env=env, capture_output=True,
                              text=True, timeout=1200)  # fmt: skip
        wanted = (0, 1) if line.startswith("diff ") else (0,)
        assert done.returncode in wanted, f"{line}\n{done.stdout[-500:]}\n{done.stderr[-2000:]}"


def all_keys(thing):
    """The keys of nested dicts, less the names of tasks, domains and parameters."""
    names = {"in", "look", "colour", "plain", "reason", "left", "right", "chain", "total"}
    for key, value in thing.items() if isinstance(thing, dict) else ():
        yield from () if key in names else (key,)
        if key not in ("per_task", "params", "stages", "vla_score"):
            yield from all_keys(value)


@pytest.mark.slow
@pytest.mark.parametrize("name", SCRIPTS)
def test_every_key_of_a_run_is_in_the_glossary(name, tmp_path):
    words = shlex.split(SMALL[name]) + ["--log-every", "1", "--gifs", "0", "--domains", "in"]
    words += ["--device", "cpu", "--threads", "1", "--out", str(tmp_path / "run")]
    SCRIPTS[name].main(words)
    files = [*(tmp_path / "run").rglob("metrics.jsonl"), *(tmp_path / "run").rglob("result.json")]
    keys = {key for file in files for line in file.read_text().splitlines()[:5]
            if file.suffix == ".jsonl" for key in all_keys(json.loads(line))}  # fmt: skip
    keys |= {k for f in files if f.suffix == ".json" for k in all_keys(json.loads(f.read_text()))}
    assert len(keys) > 15 and keys <= defined(), keys - defined()


@pytest.mark.slow
def test_hidden_action_tokens_stay_hidden(forked):
    """Evening 2's last diff: another first action token leaves the second one's state as it was."""
    fork = forked(diff_with("own = torch.eye"))
    vlm, processor = common.load_vlm("tiny")
    cfg = vita_vla.Config(stage="finetune", tokens="separate", width=32, heads=2, history=2)
    torch.manual_seed(0)
    rng = np.random.default_rng(0)
    images = [[rng.integers(0, 255, (s, s, 3), np.uint8) for s in (64, 32)] for _ in range(2)]
    sample = {"images": images, "instruction": "put the red block on the blue plate"}
    sample["state"] = rng.standard_normal((2, 8)).astype(np.float32)
    batch = vita_vla.sense([sample], replace(cfg), processor)
    for module, same in ((fork, True), (vita_vla, False)):
        model = module.VitaVLA(cfg, vlm, processor).eval()
        with torch.no_grad():
            before = model.hidden(batch)
            model.action_token[0] += 1.0
            after = model.hidden(batch)
        assert not torch.equal(before[:, :, 0], after[:, :, 0])
        assert torch.allclose(before[:, :, 1:], after[:, :, 1:], atol=1e-5) is same
