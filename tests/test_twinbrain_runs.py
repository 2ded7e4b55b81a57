"""Whole runs of twinbrain.py, and the closed loop that scores them."""

import json
import os
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import common
import data
import twinbrain
from parts import runs
from worlds import loop, tabletop

pytestmark = pytest.mark.usefixtures("brief")

TINY = [
    "--steps", "4", "--save-every", "2", "--log-every", "1", "--demos", "20", "--episodes", "4",
    "--gifs", "1", "--questions", "2", "--batch", "8", "--domains", "in", "--width", "32",
    "--depth", "2", "--heads", "2", "--threads", "1", "--device", "cpu", "--execute", "8",
    "--optimizer", "adamw",
]  # fmt: skip
ALONE = common.Dist(0, 1, torch.device("cpu"))


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A finished run, with dropout so that training reads the global random state."""
    folder = tmp_path_factory.mktemp("runs") / "finished"
    words = ["--optimizer", "muon", "--dropout", "0.2", "--out", str(folder)]
    twinbrain.main([*TINY, *words])
    return folder


@pytest.fixture
def quick(monkeypatch):
    """Nothing acts where a test is about training."""
    monkeypatch.setattr(loop, "evaluate", lambda *_: {})


@pytest.fixture
def copied(finished, tmp_path):
    """The same run, free to be changed."""
    return shutil.copytree(finished, tmp_path / "copied")


def result(folder):
    return json.loads((folder / "result.json").read_text())


def metrics(folder, *names):
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [[line[name] for name in ("step", *names)] for line in lines]


def weights(folder, step=4):
    return load_file(folder / "checkpoints" / f"step_{step:08d}" / "model.safetensors")


# --- the run folder -------------------------------------------------------------------------------


def test_a_run_leaves_what_is_needed_to_read_it(finished):
    names = "config.json metrics.jsonl result.json twinbrain.py loss.png first_batch.png"
    assert {*names.split(), "rollout-in-0.gif"} <= {path.name for path in finished.iterdir()}
    got = result(finished)
    for key in ("method", "backbone", "world", "seed", "steps", "samples", "train_seconds"):
        assert key in got
    assert (got["method"], got["arm"], got["samples"]) == ("twinbrain", "twin", 32)
    assert got["episodes"] == 4 and set(got["per_task"]) == set(tabletop.TRAIN_TASKS["bridge"])
    assert 0 <= got["ci95"][0] <= got["success"] <= got["ci95"][1] <= 1
    assert got["vqa"].keys() == {"left", "right"}
    assert got["vqa"]["left"].keys() == {"pope", "seed", "scienceqa", "mme"}
    params = got["params"]
    assert params["total"] == params["trainable"] + params["frozen"]
    assert [step for step, _ in metrics(finished, "action")] == [1, 2, 3, 4]
    assert not any(name.startswith("left.") for name in weights(finished))


def test_resuming_equals_never_having_stopped(finished, copied, quick):
    shutil.rmtree(copied / "checkpoints" / "step_00000004")
    twinbrain.main(["--resume", str(copied)])
    want, got = weights(finished), weights(copied)
    assert want.keys() == got.keys() and all(torch.equal(want[n], got[n]) for n in want)
    states = [torch.load(f / "checkpoints/step_00000004/train.pt") for f in (finished, copied)]
    for ours, its in zip(*(s["optimizers"] for s in states)):
        for a, b in zip(ours["state"].values(), its["state"].values()):
            assert all(torch.equal(a[key], b[key]) for key in a)
    assert metrics(finished, "action", "lr", "norm") == metrics(copied, "action", "lr", "norm")
    assert result(finished)["vqa"] == result(copied)["vqa"]


def test_evaluation_alone_repeats_the_runs_own(finished, copied):
    meta = copied / "checkpoints/step_00000004/meta.json"
    meta.write_text(meta.read_text().replace('"processes": 1', '"processes": 2'))
    twinbrain.main(["--eval-only", str(copied), "--steps", "9"])
    (folder,) = copied.glob("eval-*")
    for key in ("success", "per_task", "domains", "vqa", "params", "steps"):
        assert result(folder)[key] == result(finished)[key], key
    assert result(folder)["samples"] == 64, "4 steps of 8 samples, by two processes"
    film = "rollout-in-0.gif"
    assert (folder / film).read_bytes() == (finished / film).read_bytes()


def test_what_stands_in_16_bits_is_evaluated_in_32_if_asked():
    cfg = replace(twinbrain.Config(), frozen="bf16", dtype="bf16")
    model = torch.nn.Linear(2, 2, dtype=torch.bfloat16)
    asked = replace(cfg, eval_only="RUN", dtype="fp32", out="again")
    asked.explicit = ("eval_only", "dtype", "out")
    given = runs.begin(asked, ALONE, "twinbrain", twinbrain.FREE,
                       lambda *_: SimpleNamespace(cfg=cfg, model=model))  # fmt: skip
    assert given[0].dtype == "fp32" and given[2].model.weight.dtype == torch.float32


def test_a_student_follows_the_teachers_features(finished, tmp_path, quick):
    words = [*TINY, "--ablation", "t9-student", "--distill", str(finished), "--out", str(tmp_path)]
    twinbrain.main([*words, "--steps", "1"])
    ((_, feature),) = metrics(tmp_path, "feature")
    assert feature > 0 and result(tmp_path)["arm"] == "t9-student"
    assert result(tmp_path)["vqa"].keys() == {"right"}


def test_a_student_and_its_teacher_read_alike(finished, tmp_path, status):
    words = [*TINY, "--ablation", "t9-student", "--distill", str(finished), "--out", str(tmp_path)]
    for flags, said in (
        (["--demos", "19"], "learned from tabletop:bridge, whose bounds of state"),
        (["--head", "oft"], "has --head flow, this run oft"),
    ):
        code, _, err = status(twinbrain.main, *words, *flags)
        assert code == 2 and f"error: --distill {finished} {said}" in err


def test_forgetting_is_measured_along_the_way(tmp_path, quick):
    words = [*TINY, "--ablation", "f2-cotrain", "--qa-every", "1", "--out", str(tmp_path)]
    twinbrain.main([*words, "--steps", "2"])
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "abilities" in line] == [0, 1, 2]
    assert [line["step"] for line in lines if "answer" in line] == [1, 2]
    assert (tmp_path / "forgetting.png").exists()


@pytest.mark.slow  # test_scale.py has it with shards beside it
def test_two_processes_take_the_step_of_one(tmp_path):
    words = [*TINY, "--dtype", "fp32", "--episodes", "2", "--steps", "3", "--gifs", "0"]
    words += ["--optimizer", "adamw"]  # Muon rounds to bfloat16 and magnifies the last bits
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    ours = [twinbrain.__file__, *words, "--batch", "4", "--out", str(tmp_path / "two")]
    env = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run([*launch, *ours], capture_output=True, text=True, env=env, timeout=600)
    assert done.returncode == 0, done.stderr[-2000:]
    twinbrain.main([*words, "--batch", "8", "--out", str(tmp_path / "one")])
    one, two = weights(tmp_path / "one", 3), weights(tmp_path / "two", 3)
    assert one.keys() == two.keys()
    for name in one:
        assert torch.allclose(one[name], two[name], atol=1e-5), name
    losses = [np.array(metrics(tmp_path / name, "action", "norm")) for name in ("one", "two")]
    assert np.allclose(*losses, rtol=1e-4)
    assert result(tmp_path / "one")["samples"] == result(tmp_path / "two")["samples"] == 24


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_saves_and_says_how_to_go_on(tmp_path, monkeypatch, status, number):
    progress = common.Run.progress

    def ask(run, step):
        progress(run, step)
        if step == 1:
            os.kill(os.getpid(), number)

    monkeypatch.setattr(common.Run, "progress", ask)
    before = [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)]
    try:
        code, out, err = status(twinbrain.main, *TINY, "--out", str(tmp_path / "run"))
    finally:
        for n, handler in zip((signal.SIGINT, signal.SIGTERM), before):
            signal.signal(n, handler)
    assert code == 130 and "Traceback" not in err
    last = out.splitlines()[-1]
    assert last == f"stopped at step 1; go on with --resume {tmp_path / 'run'}"
    assert common.load_checkpoint(tmp_path / "run", "twinbrain", dist=ALONE).step == 1


# --- what a user can get wrong --------------------------------------------------------------------


@pytest.mark.parametrize("words, names", [
    (["--stepps", "3"], "--stepps (did you mean --steps?)"),
    (["--world", "tabletop:brigde"], "--world tabletop:brigde: did you mean tabletop:bridge?"),
    (["--backbone", "Qwen3-VL-4"], "--backbone Qwen3-VL-4: did you mean Qwen3-VL-4B?"),
    (["--ablation", "t6-k3"], "unknown ablation 't6-k3' (did you mean t6-k"),
    (["--ablation", "t9-student"], "t9-student needs --distill"),
    (["--distill", "x"], "--distill teaches a single brain"),
    (["--domains", "in,colours"], "--domains colours for bridge: did you mean colour?"),
    (["--execute", "9"], "--execute 9: from 1 to --horizon 8"),
    (["--execute", "0"], "--execute 0: from 1 to --horizon 8"),
    (["--resume", "nowhere"], "no checkpoint in nowhere: no such folder"),
    (["--eval-only", "nowhere"], "no checkpoint in nowhere: no such folder"),
    (["--head", "flows"], "--head takes flow, pi, oft, fast; not 'flows'"),
    (["--questions", "3"], "--questions 3"),
    (["--episodes", "0"], "--episodes 0"),
    (["--batch", "0"], "--batch 0"),
    (["--depth", "0"], "--depth 0: at least 1"),
    (["--horizon", "0"], "--horizon 0: at least 1"),
    (["--size", "0"], "--size 0: at least 1"),
    (["--width", "0"], "--width 0: at least 1"),
    (["--clip", "0"], "--clip 0.0: above 0; inf clips nothing"),
    (["--lr", "inf"], "--lr inf: at least 0, finite"),
    (["--lr", "nan"], "--lr"),
    (["--warmup", "-5"], "--warmup -5: at least 0"),
    (["--min-lr", "2"], "--min-lr 2.0: at least 0, at most 1"),
    (["--dropout", "2"], "--dropout 2.0: at least 0, at most 1"),
    (["--augment", "-1"], "--augment -1: at least 0"),
    (["--noise", "-1"], "--noise -1.0: at least 0"),
    (["--seed", "99999999999999999999"], "--seed 99999999999999999999: from 0 to 2147483647"),
    (["--threads", "-1"], "--threads -1: at least 0"),
    (["--interval", "-2"], "--interval -2: at least 0"),
    (["--heads", "3"], "--width 32: even, and a multiple of --heads 3"),
])  # fmt: skip
def test_bad_flags_end_in_one_line(words, names, status, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, _, err = status(twinbrain.main, *TINY, "--steps", "1", *words)
    lines = [line for line in err.splitlines() if "demonstrations" not in line]
    assert code == 2 and len(lines) == 1 and lines[0].startswith("error: ")
    assert names in lines[0]
    assert not (tmp_path / "runs").exists(), "a mistake leaves no run folder behind"


@pytest.mark.parametrize("out", ["afile", "afile/run", "/proc/run"])
def test_a_run_folder_that_cannot_be(out, status, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "afile").write_text("")
    code, _, err = status(twinbrain.main, *TINY, "--steps", "1", "--out", out)
    assert code == 2 and err.count("\n") == 1 and out in err


def test_a_run_that_was_killed_before_it_saved_anything(status, tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    (run / "metrics.jsonl").write_text("{}\n")
    code, _, err = status(twinbrain.main, "--resume", str(run))
    assert code == 2
    assert err == f"error: no checkpoint in {run}; --resume auto --out {run} begins it again\n"


def test_a_failed_start_can_be_repeated(tmp_path, status):
    (tmp_path / "empty").mkdir()
    for _ in range(2):  # the second time the folder is there, but no run is in it
        words = [*TINY, "--backbone", str(tmp_path / "empty"), "--out", str(tmp_path / "run")]
        code, _, err = status(twinbrain.main, *words)
        assert code == 2 and "empty: cannot load" in err and (tmp_path / "run").exists()


def test_damaged_files_are_named(copied, tmp_path, status, monkeypatch):
    """A backbone's before demonstrations are made for it."""
    monkeypatch.setattr(data, "recordings", None)
    backbone = shutil.copytree(common.BACKBONES["tiny"], tmp_path / "backbone")
    for folder in (backbone, copied / "checkpoints" / "step_00000004"):
        file = folder / "model.safetensors"
        file.write_bytes(file.read_bytes()[:10_000])
    out = ["--out", str(tmp_path / "run")]
    code, _, err = status(twinbrain.main, *TINY, "--backbone", str(backbone), *out)
    assert code == 2 and err.count("\n") == 1 and f"--backbone {backbone}" in err
    for flag in ("--resume", "--eval-only"):
        code, _, err = status(twinbrain.main, flag, str(copied))
        assert code == 2 and "step_00000004/model.safetensors is damaged" in err


def test_foreign_checkpoints_are_refused(copied, status, tmp_path):
    for path in copied.glob("checkpoints/*/meta.json"):
        path.write_text(path.read_text().replace('"method": "twinbrain"', '"method": "dualvla"'))
    for flag in ("--resume", "--eval-only", "--distill"):
        words = [flag, str(copied)]
        if flag == "--distill":
            words += [*TINY, "--brain", "vanilla", "--out", str(tmp_path / "run")]
        code, _, err = status(twinbrain.main, *words)
        assert code == 2 and "is a checkpoint of dualvla, not of twinbrain" in err


def test_resume_refuses_other_settings(copied, status):
    code, _, err = status(twinbrain.main, "--resume", str(copied), "--lr", "1")
    want = f"--lr 1.0 differs from {twinbrain.Config().lr} in the run"
    assert code == 2 and want in err


def test_ablation_list_prints_every_row(status, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, out, _ = status(twinbrain.main, "--ablation", "list")
    lines = out.splitlines()[1:]
    assert code == 0 and [line.split()[0] for line in lines] == list(twinbrain.ABLATIONS)
    for line, row in zip(lines, twinbrain.ABLATIONS.values()):
        assert row["_row"] in line and (row["_paper"] is None or str(row["_paper"]) in line)
    assert not list(tmp_path.iterdir())


# --- the closed loop ------------------------------------------------------------------------------


def scene(observation):
    return observation["images"]["static"].tobytes(), observation["state"].tobytes()


class Replay:
    """A policy that looks up what the scripted expert did at the very same sight."""

    def __init__(self, horizon=8):
        self.chunks, self.horizon, self.first = {}, horizon, None

    def learn(self, suite, start, goals=1):
        """Remembers the expert's actions until it has reached `goals` goals in a row."""
        seed, task, domain = start
        world, steps, done = tabletop.Tabletop(suite, 64, 32), [], 0
        world.chain(seed) if task == "chain" else world.reset(seed, task, domain)
        while done < goals:
            expert = tabletop.Expert(world)
            while not world.success:
                steps.append((scene(world.observe()), expert.act()))
                world.step(steps[-1][1])
            done += 1
            world.next_goal()
        for t, (key, _) in enumerate(steps):
            self.chunks[key] = [action for _, action in steps[t : t + self.horizon]]

    def act(self, observations, instructions, rng):
        if self.first is None:
            self.first = [(scene(o), words) for o, words in zip(observations, instructions)]
        plans = np.zeros((len(observations), self.horizon, 7))
        plans[:, :, 6] = 1.0  # lost: open hand, no move
        for plan, observation in zip(plans, observations):
            known = self.chunks.get(scene(observation), [])
            plan[: len(known)] = np.reshape(known, (-1, 7))
        return plans


CFG = replace(twinbrain.Config(), domains=("in",), episodes=4, gifs=1)


@pytest.mark.parametrize("execute", [1, 3, 8])
def test_the_experts_chunks_succeed(execute):
    policy, starts = Replay(), loop.starts_of("tabletop:bridge", "in", 4, seed=0)
    for start in starts[:3]:
        policy.learn("bridge", start)
    cfg = replace(CFG, execute=execute)
    reached, films = loop.rollout(policy, cfg, "tabletop:bridge", starts, film=1)
    assert reached == [1, 1, 1, 0]  # the fourth it has never seen
    assert len(films) == 1 and 5 < len(films[0]) < 100


def test_chains_count_goals_in_a_row(tmp_path):
    policy, starts = Replay(), loop.starts_of("tabletop:abc_d", "chain", 3, seed=0)
    for start, goals in zip(starts, (5, 2, 0)):
        policy.learn("abc_d", start, goals)
    reached, _ = loop.rollout(policy, CFG, "tabletop:abc_d", starts)
    assert reached == [5, 2, 0]
    cfg = replace(CFG, world="tabletop:abc_d", domains=("chain",), episodes=3, parallel=2, gifs=0)
    got = loop.evaluate(policy, cfg, ALONE, tmp_path, say=lambda text: None)["chain"]
    assert got["at"] == pytest.approx([2 / 3, 2 / 3, 1 / 3, 1 / 3, 1 / 3])
    assert got["length"] == pytest.approx(7 / 3) and got["success"] == pytest.approx(2 / 3)
    assert got["episodes"] == 3 and got["per_task"] == {"chain": pytest.approx(2 / 3)}


@pytest.mark.parametrize("words, left", [
    ([], "in colour shape wording"),
    (["--world", "tabletop:bridge"], "in colour shape pair wording"),
    (["--domains", "look"], "look"), (["--domains", "in,pair"], ""),
])  # fmt: skip
def test_of_a_presets_domains_those_stay_that_the_suite_has(words, left):
    """What the command line names is not dropped in silence."""
    words = ["--preset", "short", "--world", "tabletop:long", *words]
    cfg = common.parse(twinbrain.Config, twinbrain.PRESETS, twinbrain.ABLATIONS, words)
    if left:
        twinbrain.check(cfg)
        assert " ".join(cfg.domains) == left
    else:
        with pytest.raises(common.UserError, match="unknown --domains pair for long"):
            twinbrain.check(cfg)


def test_every_policy_starts_at_the_same_sights():
    seen = []
    for horizon in (2, 8):  # two policies that go on differently
        policy = Replay(horizon)
        starts = loop.starts_of("tabletop:bridge", "colour", 3, seed=1)
        policy.learn("bridge", starts[0]) if horizon == 8 else None
        loop.rollout(policy, replace(CFG, execute=2), "tabletop:bridge", starts)
        seen.append(policy.first)
    assert seen[0] == seen[1] and len({words for words in seen[0]}) == 3
    for domain in loop.domains_of("tabletop:abc_d", ()):
        seeds = [seed for seed, _, _ in loop.starts_of("tabletop:abc_d", domain, 5, 0)]
        assert min(seeds) >= loop.FIRST_TEST_SEED and len(set(seeds)) == 5


def test_test_scenes_are_not_demonstrated():
    for run in range(5):  # --seed
        shown = range(20 * run * 1_000_000, 20 * (run * 1_000_000 + 1000))  # of data.record()
        asked = [seed for seed, _, _ in loop.starts_of("tabletop:bridge", "in", 200, run)]
        assert not any(seed in shown for seed in asked)


def test_blending_against_a_written_out_loop():
    rng = np.random.default_rng(0)
    chunks = [rng.standard_normal((4, 7)) for _ in range(6)]  # the two oldest say nothing about now
    newest = chunks[5][0]
    total, weights = np.zeros(7), 0.0
    for age in range(4):
        opinion = chunks[5 - age][age]
        cosine = sum(opinion * newest) / (sum(opinion**2) * sum(newest**2)) ** 0.5
        weight = np.exp(0.1 * cosine)
        total, weights = total + weight * opinion, weights + weight
    assert np.allclose(loop.blend(chunks), total / weights, atol=1e-6)
    assert np.allclose(loop.blend(chunks[:1]), chunks[0][0])


def test_a_new_goal_is_not_blended_with_the_old_one(monkeypatch):
    policy, starts = Replay(), loop.starts_of("tabletop:abc_d", "chain", 1, seed=0)
    policy.learn("abc_d", starts[0], 2)
    asked, sizes, act, blend = [], [], policy.act, loop.blend
    policy.act = lambda seen, words, rng: asked.append(words[0]) or act(seen, words, rng)
    monkeypatch.setattr(loop, "blend", lambda chunks: sizes.append(len(chunks)) or blend(chunks))
    loop.rollout(policy, replace(CFG, ensemble=True), "tabletop:abc_d", starts)
    for i in range(1, len(asked)):
        same = asked[i] == asked[i - 1]
        assert sizes[i] == (min(sizes[i - 1] + 1, 7) if same else 1)
    assert sizes[0] == 1 and len(set(asked)) > 1


def test_ensemble_plans_every_step():
    policy, (start,) = Replay(), loop.starts_of("tabletop:bridge", "in", 1, seed=2)
    policy.learn("bridge", start)
    calls, act = [], policy.act
    policy.act = lambda *args: calls.append(len(args[0])) or act(*args)
    loop.rollout(policy, replace(CFG, ensemble=True), "tabletop:bridge", [start])
    planned = len(calls)
    calls.clear()
    loop.rollout(policy, replace(CFG, execute=4), "tabletop:bridge", [start])
    assert planned > 3 * len(calls) and set(calls) == {1}


# --- data: what a sample is -----------------------------------------------------------------------


def test_shifts_are_even_handed(episodes):
    """No camera drifts: a shift to the left is as likely, and as far, as one to the right."""
    ramp = np.arange(32, dtype=np.uint8)[None, :, None] * np.ones((32, 1, 3), np.uint8)
    episode = replace(
        episodes[0], images={"wrist": np.repeat(ramp[None], len(episodes[0].action), 0)}
    )
    windows = data.Windows([episode], data.statistics(episodes), 4, augment=2)
    rng, moves = np.random.default_rng(0), []
    for _ in range(400):
        moves.append(int(windows.get(0, rng)["images"][0][16, 16, 0]) - 16)
    assert set(moves) == {-1, 0, 1} and abs(moves.count(-1) - moves.count(1)) < 80


def test_a_run_begun_on_one_process_goes_on_in_shards(tmp_path, quick):
    out = tmp_path / "run"
    twinbrain.main([*TINY, "--steps", "1", "--shard", "full", "--out", str(out)])
    saved = common.load_checkpoint(out, "twinbrain").meta["config"]
    policy = twinbrain.load_policy(out, torch.device("cpu"))
    assert (saved["shard"], policy.cfg.shard) == ("full", "none")


def test_a_folder_without_a_teacher_is_known_before_demonstrations_are_made(
    tmp_path, status, monkeypatch
):
    monkeypatch.setattr(data, "recordings", None)
    words = ["--brain", "vanilla", "--distill", str(tmp_path / "nowhere")]
    code, _, err = status(twinbrain.main, *TINY, *words, "--out", str(tmp_path / "run"))
    assert code == 2 and err == f"error: no checkpoint in {tmp_path / 'nowhere'}: no such folder\n"


def test_a_fork_s_run_is_not_read_by_the_original_without_a_word(finished, tmp_path, capsys):
    fork = tmp_path / "fork"
    shutil.copytree(finished, fork)
    (fork / "twinbrain.py").rename(fork / "mine.py")
    for folder, told in ((finished, False), (fork, True)):
        capsys.readouterr()
        common.load_checkpoint(folder, "twinbrain")
        assert ("trained by mine.py" in capsys.readouterr().out) == told


def test_out_of_domain_is_what_no_demonstration_has():
    line = {"success": 0.5, "success_out": 0.9, "domains": {"chain": {"success": 0.9}}}
    assert np.isnan(twinbrain.ours(line)[1])
    line["domains"] |= {"colour": {"success": 0.25}, "pick_all": {"success": 1.0}}
    assert twinbrain.ours(line) == (50.0, 25.0)


def test_nowhere_to_act_and_nothing_to_learn_from(tmp_path, status):
    code, _, err = status(twinbrain.main, *TINY, "--world", "none", "--out", str(tmp_path / "run"))
    assert code == 2 and "--world none acts nowhere and demonstrates nothing: add --data" in err


def test_the_first_batch_shows_where_the_state_stands(finished, monkeypatch):
    policy, seen = twinbrain.load_policy(finished, torch.device("cpu")), []
    world = tabletop.Tabletop("bridge")
    scenes, words = [world.reset(0), world.reset(1)], ["go", "pick up the red block"]
    prompt = policy.batch(scenes, words)["right"]
    monkeypatch.setattr(runs.pictures, "contact_sheet", lambda path, rows: seen.extend(rows))
    marks = {policy.processor.tokenizer.pad_token: "<state>"}
    run = SimpleNamespace(folder=finished)
    runs.first_batch(run, [[], []], prompt, policy.processor, marks)
    assert all(text.startswith("<|im_start|>") and text.count("<state>") == 1 for _, text in seen)
