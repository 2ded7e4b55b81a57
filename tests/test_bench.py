"""What the scripts in bench/ rest on: the peer computes what ours does, parts add up, models of the
published sizes can be made from random weights, bench/gpu.sh's commands start."""

import argparse
import importlib
import os
import shlex
import signal
import subprocess
import sys
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "bench"))

import figure  # noqa: E402
import fp8  # noqa: E402
import guide  # noqa: E402
import latency  # noqa: E402
import loader  # noqa: E402
import methods  # noqa: E402
import step  # noqa: E402
import study  # noqa: E402

import common  # noqa: E402
import dualvla  # noqa: E402
import twinbrain  # noqa: E402
from parts import backbones, process  # noqa: E402

PAPERS = {"twinbrain": "Qwen3-VL-4B", "vita_vla": "VITA-1.5", "dualvla": "Eagle2-2B"}
TINY = ["--batch", "2", "--dtype", "fp32", "--threads", "1"]


@pytest.mark.parametrize("method, words, says", [
    ("twinbrain", "--brain vanilla", "--variants vanilla"), ("twinbrain", "--head oft", "no flow"),
    ("dualvla", "--actions tokens", "no flow"),
])  # fmt: skip
def test_what_is_not_timed_is_refused(method, words, says):
    with pytest.raises(common.UserError, match=says):
        methods.config(method, words.split(), "dual" if method == "dualvla" else "")


def test_the_lockstep_peer_computes_the_same():
    cfg = twinbrain.Config(batch=2, deepstack=False, dtype="fp32")
    model, processor = methods.build("twinbrain", cfg, False)
    batch, found = methods.batches("twinbrain", cfg, processor)[0], []
    noise = twinbrain.draw_noise(cfg, 0, 7, common.setup(cfg))
    for losses in (model(batch, noise), step.lockstep(model, batch, noise)):
        losses["action"].backward()
        grads = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
        model.zero_grad()
        found.append((losses["action"].item(), grads))
    (ours, wanted), (theirs, grads) = found
    assert theirs == pytest.approx(ours, rel=1e-5) and grads.keys() == wanted.keys()
    for name, grad in grads.items():
        assert (grad - wanted[name]).norm() <= 1e-3 * wanted[name].norm() + 1e-7, name


def test_a_part_counts_without_the_parts_inside_it(monkeypatch):
    clock, ticks = methods.Clock(), iter(range(100))
    clock.now = lambda: next(ticks)
    clock.mark("rest")  # 0
    with clock.part("outer"):  # 1
        with clock.part("inner"):  # 2
            pass  # 3
        with clock.part("inner"):  # 4
            pass  # 5
    spent = clock.read()  # 6: outer ends, 7: the end
    assert spent == {"rest": 2, "outer": 3, "inner": 2} and clock.marks == []


def test_the_backward_pass_belongs_to_the_part_whose_gradient_has_come():
    clock, net = methods.Clock(), torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 1))
    for module, name in zip(net, ("first", "second")):
        clock.watch(module, "forward", name)
    clock.mark("rest")
    loss = net(torch.randn(2, 4)).sum()
    clock.mark("loss, backward")
    loss.backward()
    named = [part for part, _ in clock.marks]
    assert named[-3:] == ["loss, backward", "second, backward", "first, backward"]


@pytest.mark.parametrize("method, stage, parts", [
    ("twinbrain", "", {"left vision", "left language", "right vision", "right language", "head"}),
    ("vita_vla", "align", {"teacher", "language", "head"}),  # the teacher's eyes see for both
    ("vita_vla", "finetune", {"vision", "language", "head", "language, backward"}),
    ("dualvla", "dual", {"teachers", "vision", "language", "head", "words' losses"}),
])  # fmt: skip
def test_a_step_has_its_parts(method, stage, parts):
    flags = [*TINY, "--optimizer", "adamw"]
    stepper = step.Stepper(method, methods.config(method, flags, stage), False)
    spent = stepper.step(stepper.variants[-2 if method == "twinbrain" else 0])
    assert parts | {"clip, optimizer", "head, backward"} <= spent.keys()
    assert all(spent[part] > 0 for part in parts)


def test_who_is_told_to_end_has_measured_what_it_has():
    class Stepper:
        variants, turns = ["vanilla", "twin"], []
        warm, forget = lambda self, name: {"tflop": 1}, lambda self: None

        def step(self, name):
            self.turns.append(name)
            os.kill(os.getpid(), signal.SIGTERM)
            return {"head": 1.0}

    before = signal.getsignal(signal.SIGTERM)
    try:
        facts, times = step.measure(Stepper(), 5, None)
    finally:
        signal.signal(signal.SIGTERM, before)
    assert Stepper.turns == ["vanilla", "twin"] and list(facts) == list(times) == Stepper.turns
    assert times["twin"] == [{"head": 1.0}]


def test_the_vanilla_variant_leaves_the_left_brain_out():
    stepper = step.Stepper("twinbrain", methods.config("twinbrain", TINY), False)
    seen = {variant: stepper.step(variant).keys() for variant in ("vanilla", "twin", "lockstep")}
    assert "left language" in seen["twin"] and "left language" not in seen["vanilla"]
    assert {"both languages", "vocabulary logits"} <= seen["lockstep"]


def small(settings):
    """A published config.json with its form, and a laptop's widths."""
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 2, "depth": 3,
             "num_key_value_heads": 1, "num_hidden_layers": 2, "num_heads": 2, "head_dim": 32,
             "out_hidden_size": 64, "deepstack_visual_indexes": [0, 1]}  # fmt: skip
    out = {k: small(v) if isinstance(v, dict) else sizes.get(k, v) for k, v in settings.items()}
    if "mrope_section" in settings:
        out["mrope_section"] = [8, 4, 4]
    return out


@pytest.fixture
def shrunken(monkeypatch):
    monkeypatch.setattr(backbones, "settings_of", lambda name, real=backbones.settings_of: small(
        real(name)))  # fmt: skip


SMALL = [*TINY, "--frozen", "bf16", "--width", "64", "--depth", "2", "--heads", "2"]


@pytest.mark.parametrize("method", [
    "twinbrain", *(pytest.param(name, marks=pytest.mark.slow) for name in ("vita_vla", "dualvla"))
])  # fmt: skip
def test_the_papers_configurations_train_and_act_with_random_weights(method, shrunken):
    flags = ["--preset", latency.PRESETS[method], *SMALL]
    cfg = methods.config(method, flags, latency.STAGES[method][-1])
    assert cfg.backbone == PAPERS[method]
    short = {"vita_vla": {"history": 2}, "dualvla": {"talk": 2, "euler": 2}}
    cfg = replace(cfg, **short.get(method, {}))
    spent = step.Stepper(method, cfg, True).step("twin")
    assert spent["head, backward"] > 0
    policy = methods.policy(method, cfg, True)
    world = latency.place(cfg)
    out = policy.act([world.reset(0) | {"memory": {}}], [world.instruction],
                     np.random.default_rng(0))  # fmt: skip
    assert out.shape[-1] == 7 and np.isfinite(out).all()


@pytest.mark.parametrize("method, gigabytes", [("twinbrain", (75, 85)), ("dualvla", (10, 20)),
                                               ("vita_vla", (110, 125))])  # fmt: skip
def test_memory_of_the_papers_configurations(method, gigabytes, monkeypatch):
    monkeypatch.setattr(process, "multiplies_bf16", lambda device: True)
    flags = ["--preset", latency.PRESETS[method], "--frozen", "bf16"]
    cfg = methods.config(method, flags, latency.STAGES[method][-1])
    model, _, teachers = methods.build_all(method, cfg, True, "meta")
    rows = [r for m in (model, *teachers) for r in common.memory_rows(m, cfg).values()]
    assert gigabytes[0] < sum(map(sum, rows)) / 1e9 < gigabytes[1]


@pytest.mark.parametrize("method, head, prepare", [("twinbrain", "expert", "keys"),
                                                   ("dualvla", "flow", "prefix")])  # fmt: skip
def test_keys_made_anew_lead_to_the_same_actions(method, head, prepare, monkeypatch):
    cfg = methods.config(method, TINY, latency.STAGES[method][0])
    policy = methods.policy(method, cfg, False)
    policy.form = "plain"
    head, calls, plans = getattr(policy.model, head), [], []
    make = getattr(head, prepare)
    monkeypatch.setattr(head, prepare, lambda *a: calls.append(1) or make(*a))
    world = latency.place(cfg)
    observation = world.reset(0)
    for way in (nullcontext(), latency.keys_anew(head, prepare)):
        with way:
            plans.append(policy.act([observation], [""], np.random.default_rng(0)))
    assert len(calls) == 1 + cfg.euler
    assert np.allclose(*plans, atol=1e-5)


def test_random_weights_reason_to_the_end():
    """Among a real VLM's words nearly all come after the first action's: none would be said."""
    policy = methods.policy("dualvla", methods.config("dualvla", TINY, "generalist"), False)
    world = latency.place(policy.cfg)
    seen, first = world.reset(0), policy.model.first
    policy.model.first = 5
    for random, said in ((False, False), (True, True)):
        with latency.reasoning(policy, random):
            policy.act([seen | {"memory": {}}], [world.instruction], np.random.default_rng(0))
        assert bool(policy.said[0]) == said and policy.model.first == 5 < first
    assert policy.cfg.speak == dualvla.Config().speak


def test_a_rate_counts_the_plans_of_all_worlds():
    class Policy:
        cfg, now = replace(twinbrain.Config(), execute=4), 0.0

        def act(self, observations, instructions, rng):
            Policy.now += 1.0
            return np.zeros((len(observations), 8, 7))

    policy = Policy()
    policy.cfg.ensemble = False
    args = latency.arguments(["--seconds", "10", "--busy"])[0]
    clock = methods.Clock
    try:
        methods.Clock = lambda busy: type("Clock", (), {"now": staticmethod(lambda: Policy.now)})
        rates = [latency.episodes_a_minute(policy, n, args) for n in (1, 3)]
    finally:
        methods.Clock = clock
    world = latency.place(policy.cfg)
    world.reset(*latency.loop.starts_of(policy.cfg.world, "in", 1, 0)[0])
    assert rates[0] == pytest.approx(60 * 4 / world.max_steps, rel=0.11)
    assert rates[1] == pytest.approx(3 * rates[0], rel=0.01)


@pytest.mark.parametrize("flags", [[], ["--cpu"]])
def test_commands_of_gpu_sh_parse(flags):
    command = ["bash", ROOT / "bench" / "gpu.sh", "--dry-run", *flags]
    environment = os.environ | {"PYTHON": "true", "RUNS": ""}  # which parses nothing: this does
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    lines = [line.split("true ")[1] for line in done.stdout.splitlines() if line.startswith("  ")]
    for script, *words in map(shlex.split, lines):
        if script == "-m":
            assert {"tests/test_kernels.py", "tests/test_scale.py"} <= set(words)
            continue
        given = importlib.import_module(Path(script).stem).arguments(words)
        if "step.py" in script:
            assert given[0].random == (given[1].backbone != "tiny")
    for words in ("paper", "--stage align", "--stage finetune", "--method dualvla", "losses.py"):
        assert flags or words in done.stdout
    assert ("latency.py --random" in done.stdout) == (not flags)


def test_gpu_sh_fails_when_a_part_does():
    environment = os.environ | {"PYTHON": "false", "RUNS": ""}
    command = ["bash", ROOT / "bench" / "gpu.sh", "--cpu"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 1 and "a step, tiny: failed (1)" in done.stdout
    environment |= {"PYTHON": "true", "LIMIT": "35"}  # of 80, 60, 80, 80 and 60 seconds
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0 and "joint attention: done" in done.stdout
    assert "a step, tiny: skipped, it may take 80 s, 3" in done.stdout


def test_gpu_sh_takes_parts_by_name_and_keeps_what_they_printed(tmp_path):
    environment = os.environ | {"PYTHON": "echo", "RUNS": "", "ONLY": "fused", "OUT": str(tmp_path)}
    command = ["bash", ROOT / "bench" / "gpu.sh", "--cpu"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0 and "fused losses: done" in done.stdout
    assert "joint attention" not in done.stdout and (tmp_path / "step.jsonl").exists()
    assert (tmp_path / "gpu.log").read_text().startswith("bench/losses.py")


def test_a_matrix_in_float8_is_exact_where_float8_is():
    """Rows whose largest number is 448 times a power of two have a scale that rounds nothing."""
    numbers = torch.tensor([[448.0, -3.25, 0.0625, 13.0], [-112.0, 28.0, 0.5, 0.0]])
    linear = torch.nn.Linear(4, 2)
    linear.weight.data, linear.bias.data = numbers, torch.tensor([1.0, -2.0])
    x = torch.tensor([[[1.75, 0.5, 0.0, -1.0]], [[-7.0, 3.5, 1.0, 0.25]]])
    exact = (x.unsqueeze(-2) * numbers).sum(-1) + linear.bias  # (2, 1, 2)
    for states in (True, False):
        with torch.autocast("cpu", torch.bfloat16):
            y = fp8.Float8(linear, states)(x)
        assert y.dtype == torch.bfloat16 and torch.allclose(y.float(), exact, rtol=2**-7)


def test_float8_rounds_to_four_bits():
    x = torch.randn(64, 256, generator=torch.Generator().manual_seed(0))
    x8, scale = fp8.rounded(x)
    error = (x8.float() * scale - x).abs()
    grain = torch.maximum(x.abs() * 2**-4, scale * 2**-10)  # half of a step; half of the least one
    assert scale.shape == (64, 1) and (error <= grain * 1.001).all() and error.max() > 0


def test_a_left_brain_in_8_bits_answers_and_its_keys_hardly_move(monkeypatch, capsys):
    kept = []
    monkeypatch.setattr(fp8, "append", lambda name, row: kept.append(row))
    words = ["fp8.py", "--questions", "10", "--batch", "2", "--threads", "1"]
    monkeypatch.setattr(sys, "argv", words)
    fp8.main()
    plain, weights, both = kept
    assert plain["keys"] == plain["changed"] == 0 and plain["asked"] == weights["asked"]
    assert 0.005 < weights["keys"] < both["keys"] < 0.2
    assert min(both["answers"].values()) > 0.5 and "answers changed" in capsys.readouterr().out


def test_drawn_weights_are_never_looked_for():
    """Every module that asks `blank` whether there is anything to load is told that there is not,
    and asks again afterwards."""
    asks = [m for m in [*sys.modules.values()] if vars(m).get("blank") is backbones.blank]
    with methods.drawn("cpu"):
        assert len(asks) > 2 and all(m.blank() for m in asks)
    assert not any(m.blank() for m in asks)


def test_what_stands_still_is_drawn_in_16_bits_and_what_trains_in_32(monkeypatch):
    monkeypatch.setattr(methods.process, "multiplies_bf16", lambda device: True)
    for method, stage, more in (("vita_vla", "align", []), ("twinbrain", "", ["--lora", "4"])):
        flags = ["--backbone", "tiny", "--frozen", "bf16", *more]
        model = methods.build(method, methods.config(method, flags, stage), True)[0]
        dtypes = {(p.requires_grad, p.dtype) for p in model.parameters()}
        assert dtypes == {(True, torch.float32), (False, torch.bfloat16)}


def test_warming_up_begins_each_step_without_gradients(monkeypatch):
    stepper = step.Stepper("twinbrain", methods.config("twinbrain", TINY), False)
    held, backward = [], stepper.backward

    def spy(variant):
        held.append([p for p in stepper.parameters if p.grad is not None])
        backward(variant)

    monkeypatch.setattr(stepper, "backward", spy)
    stepper.warm("twin")
    assert held == [[], []]


def test_a_worker_does_not_wait_for_a_decoder_of_its_parent(tmp_path):
    """Both readers of a video, first in this process, then in one that forks from it."""
    pytest.importorskip("av")
    loader.make(tmp_path / "set", 5, 32)
    for workers in (0, 1):
        for reader in (loader.plain, lambda *a: loader.ours(a[0], True, a[1], 9)):
            assert loader.timed(reader(tmp_path / "set", workers), 0.1)[0] > 0


def test_a_server_that_ends_before_it_listens_is_not_waited_for():
    pytest.importorskip("websockets")
    server = argparse.Namespace(stdout=iter(["its last words\n"]))
    with pytest.raises(common.UserError, match="the server ended"):
        importlib.import_module("bench.serve").report(None, server, b"")


@pytest.mark.parametrize("family, name", [("25", "AMD EPYC, "), ("26", "AMD EPYC (Zen 5), ")])
def test_generations_of_one_name_are_told_apart(family, name, monkeypatch):
    facts = f"model name\t: AMD EPYC\ncpu family\t: {family}\nflags\t: a b\n"
    monkeypatch.setattr(process, "cpu_facts", lambda: facts)
    assert study.machine().startswith(name)


def test_arms_begin_where_the_stages_of_another_ended(tmp_path, monkeypatch):
    asked = []

    def pretend(command, **_):
        out = Path(command[command.index("--out") + 1])
        out.mkdir(parents=True)
        (out / "result.json").write_text('{"samples": 7, "train_seconds": 3.0}')
        if "dualvla.py" not in str(command):  # it logs in its stages' folders
            (out / "metrics.jsonl").write_text("")
        asked.append(command)
        return subprocess.CompletedProcess(command, 0, "")

    monkeypatch.setattr(study.subprocess, "run", pretend)
    args = argparse.Namespace(keep=str(tmp_path), after="ours", parallel=1)
    for place in ("ours-2/expert", "ours-2/generalist", "two-stage-1/align"):
        pretend(["--out", tmp_path / place])
    pretend(["--out", tmp_path / "two-stage-1" / "finetune"])
    asked.clear()
    line = study.run("dualvla", "no-pruning", 2, [], args)
    given = dict(zip(asked[0], asked[0][1:]))
    assert given["--expert"] == str(tmp_path / "ours-2" / "expert")
    assert given["--generalist"] == str(tmp_path / "ours-2" / "generalist")
    assert line["arm"] == "no-pruning" and line["flags"] == ""
    args.after = ""
    study.run("dualvla", "no-distillation", 2, [], args)
    assert "--expert" not in asked[1]
    args.after = "two-stage"
    line = study.run("vita_vla", "freeze-vlm", 1, [], args)
    words = ["--stage", "frozen", "--student", str(tmp_path / "two-stage-1" / "finetune")]
    assert set(words) < set(asked[2]) and not set(words) & set(line["command"].split())
    part = {"samples": 7, "train_seconds": 3.0}
    assert line["stages"] == {"align": part, "finetune": part, "frozen": part}
    study.run("vita_vla", "only-finetune", 1, [], args)
    assert not {"--student", "--teacher"} & set(asked[3])


@pytest.mark.parametrize("method, head", [("twinbrain", "out-of-domain %"),
                                          ("vita_vla", "average length"), ("dualvla", "answers %")])
def test_a_study_tabulates_the_lines_of_each_method(method, head, capsys):
    lines = common.result_lines(method)
    study.table(lines)
    first, *rows = capsys.readouterr().out.splitlines()
    assert head in first and len(rows) == len({(x["arm"], x["flags"]) for x in lines})


def test_the_forgetting_figure_takes_each_brain_by_its_arm():
    def scores(share):
        return {"pope": share, "seed": share, "scienceqa": share, "mme": 0.0}

    twin = [[0, {"right": scores(1.0), "left": scores(1.0)}],
            [100, {"right": scores(0.0), "left": scores(1.0)}]]  # fmt: skip
    lines = [{"arm": "f2-twin", "seed": 0, "curve": twin}, {"arm": "t1-twin", "seed": 0},
             {"arm": "f2-vla", "seed": 1, "curve": twin}]  # fmt: skip
    series = figure.forgetting(lines)
    assert series == {"twin, right brain": [(0, 75.0), (100, 0.0)],
                      "twin, left brain": [(0, 75.0), (100, 75.0)]}  # fmt: skip


def test_the_figure_of_degeneration_has_actions_and_answers():
    curve = [[0, {"actions": {"success": 0.9}, "answers": {"pope": 0.0, "mme": 0.5}}],
             [10, {"actions": {"success": 0.4}, "answers": {"pope": 1.0, "mme": 0.5}}]]  # fmt: skip
    lines = [{"arm": "ours", "seed": 0}, {"arm": "degeneration", "seed": 0, "curve": curve}]
    series = figure.degeneration(lines)
    assert series == {"tasks done": [(0, 90), (10, 40)], "questions answered": [(0, 25), (10, 75)]}
    assert figure.degeneration([]) == {"tasks done": [], "questions answered": []}


def test_the_guide_is_timed_as_it_stands(tmp_path):
    known = guide.evenings()
    assert [*known] == ["1", "2", "3", "4", "tour"] and all(known.values())
    assert [len(known[n]) for n in "123"] == [3, 3, 2]
    compile(guide.cells(), "tour", "exec")
    (tmp_path / "run").mkdir()
    log = '{"step": 0}\\n{"action": 2}\\n{"action": 1}'
    program = f"open('run/metrics.jsonl', 'w').write('{log}')"
    line = f"python -c {shlex.quote(program)} --out run"
    row = guide.measure("1", line, tmp_path, os.environ)
    assert row["action"] == [2, 1] and 0 <= row["seconds"] < 60
    with pytest.raises(subprocess.CalledProcessError):
        guide.measure("1", "python -c 'raise SystemExit(3)'", tmp_path, os.environ)


@pytest.mark.slow
@pytest.mark.parametrize("evening", guide.evenings())
def test_an_evening_runs_as_it_stands(evening, tmp_path):
    """At its own size, as a group would: with the shipped teacher, each under five minutes."""
    env = guide.prepare(tmp_path)
    for line in guide.evenings()[evening]:
        assert guide.measure(evening, line, tmp_path, env)["seconds"] < 300, line
