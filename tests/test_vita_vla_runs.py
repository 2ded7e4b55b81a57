"""Whole runs of vita_vla.py: its stages, the chain of them, and what a user can get wrong."""

import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import common
import data
import vita_vla
from parts import checkpoints, seer
from vita_vla import Config
from worlds import loop

pytestmark = pytest.mark.usefixtures("brief")

TINY = [
    "--steps", "4", "--save-every", "2", "--log-every", "1", "--demos", "20", "--episodes", "2",
    "--gifs", "1", "--batch", "4", "--width", "32", "--depth", "1", "--heads", "2", "--queries",
    "2", "--foresight", "1", "--history", "2", "--threads", "1", "--device", "cpu", "--dtype",
    "fp32", "--optimizer", "adamw", "--dropout", "0.1", "--resampler", "1",
]  # fmt: skip
ALONE = common.Dist(0, 1, torch.device("cpu"))
STAGES = ("teacher", "align", "finetune", "frozen")
DECODER = ("action_decoder.", "arm_action_decoder.", "gripper_action_decoder.")
SCORE = {"chain": {"success": 0.5, "ci95": (0.1, 0.9), "episodes": 2, "per_task": {"chain": 0.5},
                   "at": [0.5, 0, 0, 0, 0], "length": 0.5}}  # fmt: skip


def unscored(policy, cfg, dist, folder, say=print):
    """Stands in for the closed loop where a test is about training."""
    return SCORE


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr(loop, "evaluate", unscored)


@pytest.fixture(scope="module")
def chained(tmp_path_factory):
    """A finished chain of all four stages; the fine-tuned student acted for its result."""
    folder, evaluate = tmp_path_factory.mktemp("runs") / "chain", loop.evaluate

    def some(policy, cfg, *more):
        acts = cfg.stage == "finetune" and not cfg.freeze_vlm
        return (evaluate if acts else unscored)(policy, cfg, *more)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "evaluate", some)
        vita_vla.main([*TINY, "--recipe", "freeze-vlm", "--out", str(folder)])
    return folder


@pytest.fixture
def copied(chained, tmp_path):
    """The same chain, free to be changed."""
    return shutil.copytree(chained, tmp_path / "copied")


def result(folder):
    return json.loads((folder / "result.json").read_text())


def config(folder):
    return json.loads((folder / "config.json").read_text())["config"]


def metrics(folder, *names):
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [[line[name] for name in ("step", *names)] for line in lines]


def weights(folder, step=4):
    return load_file(folder / "checkpoints" / f"step_{step:08d}" / "model.safetensors")


def same(one, two):
    return one.keys() == two.keys() and all(torch.equal(one[n], two[n]) for n in one)


# --- the chain ------------------------------------------------------------------------------------


def test_a_chain_leaves_a_run_for_each_stage(chained):
    assert {p.name for p in chained.iterdir()} == {"chain.json", "result.json", *STAGES}
    whole = result(chained)
    assert whole.pop("stages") == {name: result(chained / name) for name in STAGES}
    assert whole == result(chained / "frozen")
    for name in STAGES:
        folder = chained / name
        files = "config.json metrics.jsonl result.json vita_vla.py loss.png first_batch.png"
        assert set(files.split()) <= {p.name for p in folder.iterdir()}
        got, stage = result(folder), "finetune" if name == "frozen" else name
        assert (got["method"], got["stage"], got["samples"]) == ("vita_vla", stage, 16)
        assert {"backbone", "world", "seed", "train_seconds", "success", "ci95"} <= set(got)
    student = result(chained / "finetune")
    assert 0 <= student["length"] <= 5 and student["episodes"] == 2
    assert (chained / "finetune" / "rollout-chain-0.gif").exists()
    terms = {"teacher": ("arm", "gripper", "foresight"), "align": ("align",)}
    for name in STAGES:
        lines = metrics(chained / name, *terms.get(name, ("arm", "gripper")))
        assert [line[0] for line in lines] == [1, 2, 3, 4] and np.isfinite(lines).all()


def test_each_stage_starts_where_it_should(chained):
    teacher, align, finetune, frozen = (config(chained / name) for name in STAGES)
    assert align["teacher"] == str(chained / "teacher") and align["student"] == ""
    assert finetune["student"] == str(chained / "align") and not finetune["freeze_vlm"]
    assert frozen["student"] == str(chained / "finetune") and frozen["freeze_vlm"]
    held = {name: weights(chained / name) for name in STAGES}
    for part in DECODER:
        for n in (n for n in held["teacher"] if n.startswith(part)):
            assert torch.equal(held["teacher"][n], held["align"][n]), "fixed in stage 1"
            assert not torch.equal(held["align"][n], held["finetune"][n])
    assert not any(n.startswith("eyes.") for n in held["teacher"])
    for name in ("align", "frozen"):
        assert not any(n.startswith("vlm.") for n in held[name])
    vlm = {n for n in held["finetune"] if n.startswith("vlm.")}
    assert vlm and all(n.startswith("vlm.model.language_model.") for n in vlm)


def test_freeze_vlm_joins_what_was_trained_to_the_vlm_as_it_is(chained):
    saved = config(chained / "frozen")
    cfg = replace(vita_vla.Config(), **{k: v for k, v in saved.items() if k != "domains"})
    model, _ = vita_vla.build(cfg)
    tuned, ours = weights(chained / "finetune"), model.state_dict()
    fresh = common.load_vlm("tiny")[0].state_dict()
    for n in (n for n in ours if n.startswith("vlm.")):
        assert torch.equal(ours[n], fresh[n.removeprefix("vlm.")])
    assert all(torch.equal(ours[n], t) for n, t in tuned.items() if not n.startswith("vlm."))
    assert not any(p.requires_grad for n, p in model.named_parameters() if n.startswith("vlm."))


@pytest.mark.parametrize("stage", ["teacher", "align", "finetune"])
def test_resuming_equals_never_having_stopped(stage, chained, copied, quick):
    folder = copied / stage
    shutil.rmtree(folder / "checkpoints" / "step_00000004")
    vita_vla.main(["--resume", str(folder)])
    assert same(weights(chained / stage), weights(folder))
    states = [torch.load(f / "checkpoints/step_00000004/train.pt", weights_only=True)
              for f in (chained / stage, folder)]  # fmt: skip
    for ours, its in zip(*(s["optimizers"] for s in states)):
        for a, b in zip(ours["state"].values(), its["state"].values()):
            assert all(torch.equal(a[key], b[key]) for key in a)
    names = ("lr", "norm", "align" if stage == "align" else "arm")
    assert metrics(chained / stage, *names) == metrics(folder, *names)


def test_resuming_a_chain_does_only_what_is_left(chained, copied, quick):
    shutil.rmtree(copied / "align" / "checkpoints" / "step_00000004")
    (copied / "align" / "result.json").unlink()
    shutil.rmtree(copied / "frozen")
    shutil.rmtree(copied / "finetune")
    done = (copied / "teacher" / "result.json").stat().st_mtime_ns
    vita_vla.main(["--resume", str(copied), "--episodes", "1"])
    assert (copied / "teacher" / "result.json").stat().st_mtime_ns == done
    went_on = json.loads((copied / "align" / "config-00000002.json").read_text())
    assert went_on["config"]["episodes"] == config(copied / "frozen")["episodes"] == 1
    for name in STAGES[1:]:
        assert same(weights(chained / name), weights(copied / name)), name


@pytest.mark.parametrize("named", [".", "align"])  # as the line of who stopped it says
def test_a_chain_stopped_before_its_first_checkpoint_goes_on(copied, quick, named):
    for name in ("frozen", "finetune"):
        shutil.rmtree(copied / name)
    (copied / "align" / "result.json").unlink()
    shutil.rmtree(copied / "align" / "checkpoints")  # metrics.jsonl has lines by then
    vita_vla.main(["--resume", str(copied / named), "--steps", "1"])
    assert result(copied / "align")["stage"] == "align"
    assert result(copied)["stages"].keys() == set(STAGES)


@pytest.mark.parametrize("text", ["{", "[]", "{}", "\x80"])
def test_a_chain_of_damaged_settings_is_one_line(text, tmp_path, status, quick):
    (tmp_path / "chain.json").write_bytes(text.encode("latin-1"))
    code, _, err = status(vita_vla.main, "--resume", str(tmp_path))
    assert code == 2 and err == f"error: {tmp_path / 'chain.json'} is damaged or cut short\n"


def test_a_chain_does_not_start_over_another(copied, status, quick):
    before = (copied / "chain.json").read_text()
    code, _, err = status(vita_vla.main, *TINY, "--lr", "1", "--out", str(copied))
    assert code == 2 and f"--resume {copied}" in err and err.count("\n") == 1
    assert (copied / "chain.json").read_text() == before


def test_single_stages_are_those_of_the_chain(chained, tmp_path, quick):
    words = [*TINY, "--recipe", "freeze-vlm"]
    teacher, align = str(chained / "teacher"), str(chained / "align")
    vita_vla.main([*words, "--stage", "align", "--teacher", teacher, "--out", str(tmp_path / "a")])
    assert same(weights(tmp_path / "a"), weights(chained / "align"))
    vita_vla.main([*words, "--stage", "finetune", "--student", align, "--out", str(tmp_path / "f")])
    assert same(weights(tmp_path / "f"), weights(chained / "finetune"))
    tuned = str(chained / "finetune")
    vita_vla.main([*words, "--stage", "frozen", "--student", tuned, "--out", str(tmp_path / "z")])
    assert same(weights(tmp_path / "z"), weights(chained / "frozen"))
    assert config(tmp_path / "z")["freeze_vlm"] and not config(tmp_path / "f")["freeze_vlm"]


def test_only_finetune_goes_on_when_its_teacher_is_gone(chained, tmp_path, quick):
    """The decoder that it began with is in its checkpoints."""
    teacher, tuned = shutil.copytree(chained / "teacher", tmp_path / "teacher"), tmp_path / "tuned"
    words = [*TINY, "--stage", "finetune", "--teacher", str(teacher), "--out", str(tuned)]
    vita_vla.main(words)
    whole = weights(tuned)
    for gone in (teacher, *tuned.glob("checkpoints/step_*4")):
        shutil.rmtree(gone)
    vita_vla.main(["--resume", str(tuned)])
    assert same(weights(tuned), whole)


def test_only_finetune_has_the_teachers_decoder_and_no_stage_one(chained, tmp_path, quick):
    words = [*TINY, "--steps", "1", "--warmup", "1000000", "--weight-decay", "0"]
    words += ["--teacher", str(chained / "teacher"), "--out", str(tmp_path / "only")]
    vita_vla.main([*words, "--ablation", "only-finetune"])
    names = {"chain.json", "result.json", "finetune"}
    assert {p.name for p in (tmp_path / "only").iterdir()} == names
    assert result(tmp_path / "only" / "finetune")["arm"] == "only-finetune"
    got, held = weights(tmp_path / "only" / "finetune", 1), weights(chained / "teacher")
    for n in (n for n in held if n.startswith(DECODER)):  # a step so small that it shows nothing
        assert torch.allclose(got[n], held[n], atol=1e-6), n


@pytest.mark.slow  # the twin's is asked each time
def test_evaluation_alone_repeats_the_runs_own(chained, copied):
    """And keeping the history's keys changes nothing. What it was trained on is the checkpoint's
    to say: here by two processes, whatever --steps is now."""
    (*_, meta) = sorted(copied.glob("finetune/checkpoints/*/meta.json"))
    meta.write_text(meta.read_text().replace('"processes": 1', '"processes": 2'))
    shutil.rmtree(copied / "frozen")  # of a chain, the last stage acts
    vita_vla.main(["--eval-only", str(copied), "--no-cache", "--steps", "9"])
    (folder,) = copied.glob("eval-*")
    for key in ("success", "length", "domains", "params", "stage", "steps"):
        assert result(folder)[key] == result(chained / "finetune")[key], key
    assert result(folder)["samples"] == 2 * result(chained / "finetune")["samples"]


def test_a_pre_trained_teacher_teaches_without_looking_ahead(tmp_path, quick, capsys):
    """--goal through all stages: it trains so, but no student could know what lies ahead. In stage
    1 alone it takes memory beside the student."""
    words = [*TINY, "--steps", "1", "--goal", "1", "--hide-foresight", "0.5", "--teacher", "train"]
    vita_vla.main([*words, "--action-sees", "pictures", "--out", str(tmp_path / "chain")])
    goals = [config(tmp_path / "chain" / name)["goal"] for name in STAGES[:3]]
    assert goals == [1, 0, 0] and capsys.readouterr().out.count("  teacher Seer ") == 1
    assert all(np.isfinite(metrics(tmp_path / "chain" / n, "norm")).all() for n in STAGES[:3])
    cfg = common.parse(vita_vla.Config, {}, {}, [*TINY, "--action-sees", "pictures"])
    cfg = replace(cfg, teacher=str(tmp_path / "chain" / "teacher"))
    assert vita_vla.load_teacher(cfg, ALONE.device).cfg.goal == 0


@pytest.mark.slow
def test_the_teacher_acts_and_is_scored(chained, tmp_path):
    words = ["--eval-only", str(chained / "teacher"), "--ensemble", "--episodes", "1"]
    vita_vla.main([*words, "--out", str(tmp_path / "eval")])
    assert result(tmp_path / "eval")["episodes"] == 1


@pytest.mark.slow
def test_two_processes_take_the_steps_of_one(tmp_path, quick):
    words = [*TINY, "--steps", "2", "--episodes", "2", "--gifs", "0", "--dropout", "0"]
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    ours = [vita_vla.__file__, *words, "--batch", "4", "--out", str(tmp_path / "two")]
    env = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run([*launch, *ours], capture_output=True, text=True, env=env, timeout=900)
    assert done.returncode == 0, done.stderr[-2000:]
    vita_vla.main([*words, "--batch", "8", "--out", str(tmp_path / "one")])
    for name in STAGES[:3]:
        one, two = (weights(tmp_path / kind / name, 2) for kind in ("one", "two"))
        assert one.keys() == two.keys()
        for n in one:
            assert torch.allclose(one[n], two[n], atol=2e-5), (name, n)
        term = "align" if name == "align" else "arm"
        losses = [np.array(metrics(tmp_path / k / name, term, "norm")) for k in ("one", "two")]
        assert np.allclose(*losses, rtol=1e-3), name
        assert result(tmp_path / "two" / name)["samples"] == 16


# --- what a user can get wrong --------------------------------------------------------------------


@pytest.mark.parametrize("words, names", [
    (["--stage", "align"], "`python vita_vla.py --stage teacher --out RUN`"),
    (["--stage", "align", "--teacher", "nowhere"], "no checkpoint in nowhere: no such folder; "
     "`python vita_vla.py --stage teacher --out RUN` makes one"),
    (["--stage", "align", "--teacher", "seer.pth"], "--teacher seer.pth"),
    (["--stage", "finetune", "--student", "nowhere"], "no checkpoint in nowhere"),
    (["--recipe", "two-stages"], "--recipe takes two-stage, only-finetune, freeze-vlm; not"),
    (["--ablation", "freeze-vlms"], "unknown ablation 'freeze-vlms' (did you mean freeze-vlm?)"),
    (["--preset", "calvn"], "unknown preset 'calvn' (did you mean calvin?)"),
    (["--stage", "distill"], "--stage takes chain, teacher, align, finetune, frozen; not 'dis"),
    (["--stage", "finetune"], "--stage finetune needs --student RUN"),
    (["--stage", "frozen"], "--stage finetune needs --student RUN"),
    (["--stage", "align", "--recipe", "only-finetune", "--teacher", "x"], "has no --stage align"),
    (["--hide-foresight", "2"], "--hide-foresight 2.0: at least 0, at most 1"),
    (["--goal", "2"], "--goal 2: from 0 to 1"),
    (["--stage", "align", "--teacher", "x", "--goal", "1"], "--goal 1 is of a teacher's training"),
    (["--stage", "teacher", "--teacher", "x"], "or goes on with Seer's own file"),
    (["--execute", "2"], "--execute is 1 here"),
    (["--act-index", "3"], "--act-index 3: from 0 to 2"),
    (["--ensemble", "--act-index", "1"], "no --act-index beside it"),
    (["--stage", "align", "--student", "x", "--teacher", "y"], "--student is what --stage fin"),
    (["--stage", "chain", "--student", "x"], "--student is what --stage finetune or frozen"),
    (["--stage", "chain", "--freeze-vlm"], "a chain: --recipe freeze-vlm"),
    (["--foresight", "5"], "--foresight 5: a square number"),
    (["--history", "0"], "--history 0: at least 1"),
    (["--align-steps", "0"], "--align-steps 0: at least 1"),
    (["--steps", "-2"], "--steps -2: at least 0"),
    (["--queries", "0"], "--queries 0: at least 1"),
    (["--embedding-dropout", "1.5"], "--embedding-dropout 1.5: at least 0, at most 1"),
    (["--save-every", "0"], "--save-every 0: at least 1"),
    (["--heads", "0"], "--heads 0: at least 1"),
    (["--foresight", "-1"], "--foresight -1: at least 1"),
    (["--data", "x.parquet"], "no dataset or path 'x.parquet'"),
    (["--domains", "chains"], "--domains chains for abc_d: did you mean chain?"),
    (["--world", "tabletop:abcd"], "did you mean tabletop:abc_d?"),
    (["--resume", "nowhere"], "no checkpoint in nowhere: no such folder"),
    (["--eval-only", "nowhere"], "no checkpoint in nowhere: no such folder"),
    (["--eval-only", "nowhere", "--resume", "nowhere"], "goes on with a run, --eval-only takes it"),
    (["--heads", "3"], "--heads 3"),
    (["--size", "60"], "--size 60"),
])  # fmt: skip
def test_bad_flags_end_in_one_line(words, names, status, tmp_path, monkeypatch, quick):
    monkeypatch.chdir(tmp_path)
    before = [] if "--stage" in words else ["--stage", "teacher"]
    code, _, err = status(vita_vla.main, *TINY, *before, *words)
    lines = err.splitlines()
    assert code == 2 and len(lines) == 1 and lines[0].startswith("error: ")
    assert names in lines[0]
    if before:  # no other run had to be opened
        assert not (tmp_path / "runs").exists(), "a mistake leaves no run folder behind"


@pytest.mark.parametrize("flags, names", [
    (["--width", "48"], "has --width 32, this run 48"),
    (["--history", "3"], "has --history 2, this run 3"),
    (["--future", "2"], "has --future 3, this run 2"),
    (["--size", "96"], "has --size 64, this run 96"),
])  # fmt: skip
def test_a_teacher_that_does_not_fit(flags, names, chained, status, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words = [*TINY, *flags, "--stage", "align", "--teacher", str(chained / "teacher")]
    code, _, err = status(vita_vla.main, *words)
    assert code == 2 and err.count("\n") == 1 and names in err


def test_a_teacher_of_other_units_is_refused(chained, status, tmp_path):
    """A state that ranges almost twice as far: the same flags, another robot."""
    shutil.copytree(chained / "teacher", tmp_path / "teacher")
    for file in (tmp_path / "teacher").glob("checkpoints/*/meta.json"):
        meta = json.loads(file.read_text())
        for state in (robot["state"] for robot in meta["robots"].values()):
            low, high = (np.array(state[bound]) for bound in ("q01", "q99"))
            more = 0.4 * (high - low)
            state |= {"q01": (low - more).tolist(), "q99": (high + more).tolist()}
        file.write_text(json.dumps(meta))
    words = [*TINY, "--stage", "align", "--teacher", str(tmp_path / "teacher")]
    code, _, err = status(vita_vla.main, *words, "--out", str(tmp_path / "a"))
    assert code == 2 and err.count("\n") == 1 and "bounds of state and action are not" in err


def test_a_shorter_window_than_the_teachers_is_fine(chained):
    cfg = vita_vla.check(replace(common.parse(vita_vla.Config, {}, {}, TINY), history=1))
    teacher = vita_vla.load_teacher(replace(cfg, teacher=str(chained / "teacher")), ALONE.device)
    assert not teacher.training, "the teacher does not drop out"
    assert not any(p.requires_grad for p in teacher.parameters())


def test_a_teacher_that_saw_with_another_backbone_is_refused(chained):
    """Its eyes are its backbone's; the pictures come prepared for this run's."""
    cfg = common.parse(vita_vla.Config, {}, {}, [*TINY, "--teacher", str(chained / "teacher")])
    with pytest.raises(common.UserError, match="--backbone"):
        vita_vla.load_teacher(replace(cfg, backbone="Qwen3-VL-2B"), ALONE.device)


def test_a_student_is_no_teacher_and_does_not_fit_other_flags(chained, status, tmp_path):
    words = [*TINY, "--stage", "align", "--teacher", str(chained / "align")]
    code, _, err = status(vita_vla.main, *words, "--out", str(tmp_path / "a"))
    assert code == 2 and f"--teacher {chained / 'align'} is a run of --stage align" in err
    words = [*TINY, "--stage", "finetune", "--student", str(chained / "align"), "--tokens",
             "separate", "--out", str(tmp_path / "b")]  # fmt: skip
    code, _, err = status(vita_vla.main, *words)
    assert code == 2 and err.count("\n") == 1 and "flags: size mismatch for action_token" in err


class Bomb:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (Path(self.path),)


def test_resuming_executes_nothing_of_a_checkpoint(copied, tmp_path, status, quick):
    file = copied / "finetune" / "checkpoints" / "step_00000004" / "train.pt"
    torch.save({"optimizers": Bomb(tmp_path / "boom")}, file)
    code, _, err = status(vita_vla.main, "--resume", str(copied / "finetune"))
    assert code == 2 and "train.pt is damaged" in err and not (tmp_path / "boom").exists()
    for script in (seer, checkpoints):
        calls = Path(script.__file__).read_text().split("torch.load(")[1:]
        assert calls and all("weights_only=True" in call.split("\n")[0] for call in calls)


def test_resume_refuses_other_settings(copied, status, quick):
    for folder in (copied, copied / "finetune"):
        code, _, err = status(vita_vla.main, "--resume", str(folder), "--lr", "1")
        want = f"--lr 1.0 differs from {vita_vla.Config().lr} in the run"
        assert code == 2 and want in err


def test_ablation_list_prints_every_row(status, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, out, _ = status(vita_vla.main, "--ablation", "list")
    lines = out.splitlines()[1:]
    assert code == 0 and [line.split()[0] for line in lines] == list(vita_vla.ABLATIONS)
    for line, row in zip(lines, vita_vla.ABLATIONS.values()):
        assert row["_row"] in line and (row["_paper"] is None or str(row["_paper"]) in line)
    assert not list(tmp_path.iterdir())


def test_the_shipped_teacher_fits_the_defaults_and_foresees_the_expert():
    """On episodes with seeds that its demonstrations do not have, against the mean action."""
    facts = result(vita_vla.TINY)
    assert facts["stage"] == "teacher" and {"command", "machine", "train_seconds"} <= set(facts)
    policy = vita_vla.load_policy(vita_vla.TINY, ALONE.device)
    for name in vita_vla.TEACHES:
        assert name == "teacher_steps" or getattr(policy.cfg, name) == getattr(Config, name)
    windows = [data.record("tabletop:abc_d", 10**6 + seed, 64, 32, 0.0) for seed in range(6)]
    windows = vita_vla.Histories(windows, policy.stats, replace(policy.cfg, augment=0))
    samples = [windows.get(i, np.random.default_rng(0)) for i in range(0, len(windows), 3)]
    batch = vita_vla.sense(samples, policy.cfg, policy.processor)
    with torch.no_grad():
        arm, gripper = seer.decode(policy.model, policy.model.hidden(batch)[0])
    real, action = batch["mask"], batch["action"][batch["mask"]]
    error = (arm[real] - action[:, :-1]).abs().mean()
    guess = (action[:, :-1].mean(0) - action[:, :-1]).abs().mean()
    assert error < 0.5 * guess
    assert ((gripper[real] > 0) == (action[:, -1] > 0)).float().mean() > 0.9


@pytest.mark.parametrize("preset", ["calvin", "libero"])
def test_presets_are_the_papers_tables(preset):
    cfg = common.parse(vita_vla.Config, vita_vla.PRESETS, {}, ["--preset", preset])
    calvin = preset == "calvin"
    assert (cfg.width, cfg.heads, cfg.queries, cfg.foresight) == (
        (1024, 16, 16, 16) if calvin else (384, 12, 6, 9))  # fmt: skip
    assert cfg.history == (10 if calvin else 7) and cfg.future == 3 and cfg.depth == 24
    assert (cfg.lr, cfg.lr_head, cfg.weight_decay, cfg.optimizer) == (1e-4, 1e-4, 1e-4, "adamw")
    a_step, windows = 8 * cfg.batch * cfg.accumulate, 930_000 if calvin else 270_000  # of 8 GPUs
    stages = cfg.teacher_steps, cfg.align_steps, cfg.finetune_steps, cfg.warmup
    epochs = [steps * a_step / windows for steps in stages]
    assert epochs == pytest.approx([20 if calvin else 40, 3, 2, 1], rel=0.06)
    assert cfg.ensemble == (not calvin) and cfg.gripper_weight == 0.01 and cfg.eyes == "mae"
    assert cfg.act_index == (1 if calvin else 0) and cfg.backbone == "VITA-1.5"
    vita_vla.check(cfg)
