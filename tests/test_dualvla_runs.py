"""Whole runs of dualvla.py: the chain of its stages, resuming, and what a user can get wrong."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from test_formats import LENGTHS, write_v2

import common
import data
import dualvla
from parts import runs
from worlds import benchmarks, reports

pytestmark = pytest.mark.usefixtures("brief")

TINY = [
    "--steps", "2", "--save-every", "1", "--log-every", "1", "--demos", "20", "--episodes", "2",
    "--gifs", "0", "--execute", "8", "--questions", "2", "--batch", "4", "--domains", "in",
    "--width", "32", "--depth", "2", "--heads", "2", "--queries", "2", "--rank", "2", "--talk", "2",
    "--threads", "1", "--device", "cpu", "--events", "phase", "--score-episodes", "1",
    "--parallel", "2",
]  # fmt: skip


UNSCORED = {"answers": 0.5, "vla_score": None, "forms": {"plain": {"domains": {}}}}


@pytest.fixture
def quick(monkeypatch):
    """Nothing acts or answers where a test is about training."""
    monkeypatch.setattr(dualvla, "evaluate", lambda *_: UNSCORED)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A finished chain: E, G and DualVLA."""
    folder = tmp_path_factory.mktemp("runs") / "finished"
    dualvla.main([*TINY, "--out", str(folder)])
    return folder


@pytest.fixture
def copied(finished, tmp_path):
    return shutil.copytree(finished, tmp_path / "copied")


def result(folder):
    return json.loads((folder / "result.json").read_text())


def weights(folder, step=2):
    return load_file(folder / "checkpoints" / f"step_{step:08d}" / "model.safetensors")


def test_the_chain_leaves_what_is_needed_to_read_it(finished):
    for stage in dualvla.ORDER:
        names = "config.json metrics.jsonl result.json first_batch.png loss.png"
        names += " scores.jsonl score.html"
        assert set(names.split()) <= {p.name for p in (finished / stage).iterdir()}, stage
        got = result(finished / stage)
        assert got["stage"] == stage and set(got["vqa"]) == set(common.ABILITIES)
        assert got["vla_score"]["judge"] == "offline" and 0 <= got["vla_score"]["score"] <= 1
        assert set(got["forms"]) == ({"plain"} if stage == "expert" else {"plain", "reason"})
        assert all(form["ms"] > 0 for form in got["forms"].values())
    whole = result(finished)
    assert whole["stage"] == "dual" and list(whole["stages"]) == list(dualvla.ORDER)
    assert result(finished / "generalist")["kept"] == 1 > result(finished / "dual")["kept"] > 0
    lines = [json.loads(x) for x in (finished / "dual" / "metrics.jsonl").read_text().splitlines()]
    assert {"kd_action", "kd_reason", "text", "action", "answer"} <= set(lines[-1])
    assert not any(".base." in n or "visual" in n for n in weights(finished / "dual"))
    tokenizer = common.load_backbone("tiny")[1].tokenizer
    ids = [tokenizer.encode(f" {word}")[0] for word in ("because", "must")]  # drawn anew for G
    for stage, apart in (("expert", False), ("generalist", True), ("dual", True)):
        words = weights(finished / stage)["vlm.model.language_model.embed_tokens.weight"][ids]
        assert (torch.cosine_similarity(*words, dim=0) < 0.9) == apart, stage


def test_resuming_equals_never_having_stopped(finished, copied, quick):
    """E is done, G was stopped after a step, DualVLA had not begun."""
    shutil.rmtree(copied / "dual")
    shutil.rmtree(copied / "generalist" / "checkpoints" / "step_00000002")
    for name in (copied / "generalist" / "result.json", copied / "result.json"):
        name.unlink()
    before = (copied / "expert" / "result.json").stat().st_mtime_ns
    dualvla.main(["--resume", str(copied)])
    assert (copied / "expert" / "result.json").stat().st_mtime_ns == before
    for stage in dualvla.ORDER:
        want, got = weights(finished / stage), weights(copied / stage)
        assert want.keys() == got.keys() and all(torch.equal(want[n], got[n]) for n in want), stage
    assert result(finished)["kept"] == result(copied)["kept"]


def test_a_stage_starts_from_given_folders(finished, tmp_path, capsys, quick):
    given = ["--expert", str(finished), "--generalist", str(finished / "generalist")]
    words = [*TINY, "--steps", "1", "--ablation", "no-reason-teacher", *given]
    dualvla.main([*words, "--out", str(tmp_path / "run")])
    assert [p.name for p in (tmp_path / "run").iterdir() if p.is_dir()] == ["dual"]
    line = json.loads((tmp_path / "run" / "dual" / "metrics.jsonl").read_text().splitlines()[-1])
    assert "kd_action" in line and "kd_reason" not in line
    said = capsys.readouterr().out  # the memory that a process takes
    assert "  teacher expert " in said and "teacher generalist" not in said
    assert result(tmp_path / "run")["arm"] == "no-reason-teacher"


def test_who_begins_from_a_generalist_trains_no_expert_that_nobody_asks(finished, tmp_path, quick):
    words = [*TINY, "--steps", "1", "--ablation", "no-action-teacher"]
    words += ["--generalist", str(finished / "generalist"), "--out", str(tmp_path / "run")]
    dualvla.main(words)
    assert [p.name for p in (tmp_path / "run").iterdir() if p.is_dir()] == ["dual"]
    assert result(tmp_path / "run")["arm"] == "no-action-teacher"


def test_a_teacher_of_another_stage_is_refused(finished, tmp_path, status):
    words = [*TINY, "--expert", str(finished / "generalist"), "--out", str(tmp_path / "run")]
    code, _, err = status(dualvla.main, *words)
    assert code == 2 and err.count("\n") == 1 and "is a run of --stage generalist" in err


@pytest.mark.slow  # the twin's is asked each time
def test_evaluation_alone_repeats_the_runs_own(copied, tmp_path):
    words = ["--eval-only", str(copied / "dual"), "--gifs", "1", "--out", str(tmp_path / "again")]
    dualvla.main(words)
    assert (tmp_path / "again" / "rollout-in-0.gif").exists()
    again = result(tmp_path / "again")
    for key in ("success", "success_plain", "vqa", "per_task", "steps", "samples"):
        assert again[key] == result(copied / "dual")[key], key


def test_a_benchmark_file_is_answered(copied, tmp_path, capsys):
    file = tmp_path / "POPE_tabletop.tsv"
    benchmarks.export("pope", 4, file)
    dualvla.main(["--eval-only", str(copied), "--benchmark", str(file)])
    assert "POPE_tabletop.tsv (yesno): accuracy" in capsys.readouterr().out


def test_show_pruning_prints_and_draws(tmp_path, capsys):
    words = ["--show", "pruning", "--demos", "20", "--events", "phase", "--out", str(tmp_path)]
    dualvla.main(words)
    rows = capsys.readouterr().out.partition("--prune")[2].splitlines()[1:7]
    rows = [line.split() for line in rows]
    kept = {row[0]: int(row[2]) for row in rows}
    assert kept["both"] == kept["random"] < min(kept["action"], kept["scene"]) < kept["either"]
    assert kept["either"] < kept["none"] == int(rows[0][1])
    assert (tmp_path / "pruning.png").stat().st_size > 1000


def test_show_pruning_says_that_there_is_no_reasoning(tmp_path, status):
    root = str(write_v2(tmp_path / "mute", False))
    code, _, err = status(dualvla.main, "--show", "pruning", "--data", root)
    assert code == 2 and err.count("\n") == 1 and "mute has no reasoning to prune" in err


def test_a_chain_that_never_acted_has_a_summary_too():
    said = []
    reports.stages({"dual": UNSCORED}, said.append)
    assert said[1].split() == ["dual", "plain", "-", "50.0%", "-", "-", "-"]


@pytest.mark.parametrize("words, names", [
    (["--stage", "duel"], "--stage takes chain, expert, generalist, dual; not 'duel'"),
    (["--prune", "and"], "--prune takes both"),
    (["--ablation", "no-teachers"], "unknown ablation 'no-teachers'"),
    (["--temperature", "0"], "--temperature 0.0: above 0"),
    (["--sigma", "0"], "--sigma 0.0: above 0"),
    (["--expert", "nowhere"], "no checkpoint in nowhere: no such folder"),
    (["--resume", "nowhere"], "--resume nowhere: no run of dualvla in this folder"),
    (["--eval-only", "nowhere"], "no checkpoint in nowhere: no such folder"),
    (["--judge", "gpt"], "--judge gpt: offline, http(s)://..., or local:BACKBONE"),
    (["--reason", "0.9", "--motion", "0.2"], "0.9 and --motion 0.2: shares, together at most 1"),
    (["--questions", "3"], "--questions 3"),
    (["--rank", "0"], "--rank 0: at least 1"),
    (["--width", "36"], "--width 36: a multiple of 8 and of --heads 2"),
    (["--queries", "300"], "--queries 300: at most 256"),
    (["--event-demos", "1"], "--event-demos 1: at least 2"),
    (["--reach", "-1"], "--reach -1: at least 0"),
    (["--score-episodes", "-3"], "--score-episodes -3: at least 0"),
    (["--judge", "local:nowhere"], "unknown --backbone nowhere"),
    (["--mix", "-1"], "--mix -1: at least 0, finite"),
    (["--steps", "-1"], "--steps -1: at least 0"),
    (["--kd-weight", "-1"], "--kd-weight -1.0: at least 0"),
    (["--event-scores", "nowhere.json"], "--event-scores nowhere.json: no such file"),
])  # fmt: skip
def test_bad_flags_end_in_one_line(words, names, status, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, _, err = status(dualvla.main, *TINY, *words)
    assert code == 2 and err.startswith("error: ") and err.count("\n") == 1 and names in err
    assert not (tmp_path / "runs").exists(), "a mistake leaves no run folder behind"


def test_a_finished_folder_is_not_written_over(copied, status):
    code, _, err = status(dualvla.main, *TINY, "--out", str(copied))
    assert code == 2 and f"holds a run: --resume {copied}" in err
    code, _, err = status(dualvla.main, "--resume", str(copied), "--eval-only", str(copied))
    assert code == 2 and "--eval-only takes it as it is: one of them" in err


def test_a_chain_begins_in_no_folder_of_another_run(tmp_path, status):
    """Nor does it go on with another script's chain, or with a run that lies in it by chance."""
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "metrics.jsonl").write_text("{}\n")
    code, _, err = status(dualvla.main, *TINY, "--out", str(tmp_path))
    assert code == 2 and f"holds a run: --resume {tmp_path}" in err
    (tmp_path / "config.json").rename(tmp_path / "chain.json")
    about = {"method": "vita_vla", "config": {}, "stages": ["teacher"]}
    (tmp_path / "chain.json").write_text(json.dumps(about))
    code, _, err = status(dualvla.main, "--resume", str(tmp_path))
    assert code == 2 and "is a chain of vita_vla, not of dualvla" in err
    assert runs.chain_of(tmp_path / "teacher") == tmp_path == runs.chain_of(tmp_path)
    assert runs.chain_of(tmp_path / "frozen") is None


def test_another_models_weights_are_refused(finished, tmp_path, status):
    words = [*TINY, "--queries", "3", "--expert", str(finished), "--out", str(tmp_path / "run")]
    code, _, err = status(dualvla.main, *words)
    assert code == 2 and "does not fit tiny" in err and err.count("\n") == 1


@pytest.mark.parametrize("flags, names", [
    ({"size": 32}, "has --size 64, this run 32"), ({"queries": 3}, "has --queries 2, this run 3"),
    ({"actions": "tokens"}, "has --actions flow, this run tokens"),
], ids=str)  # fmt: skip
def test_a_teacher_reads_and_acts_as_its_student(finished, flags, names):
    expert = str(finished / "expert")
    cfg = common.load_checkpoint(finished / "dual", "dualvla").meta["config"]
    cfg = replace(common.resume_config(dualvla.Config(), cfg), expert=expert, **flags)
    with pytest.raises(common.UserError, match=f"--expert {expert} {names}"):
        dualvla.load_teachers(cfg, torch.device("cpu"))


def test_teachers_are_stored_as_frozen_says(finished):
    cfg = common.load_checkpoint(finished / "dual", "dualvla").meta["config"]
    cfg = replace(common.resume_config(dualvla.Config(), cfg), frozen="bf16", dtype="bf16")
    for teacher in dualvla.load_teachers(cfg, torch.device("cpu")).values():
        assert {p.dtype for p in teacher.model.parameters()} == {torch.bfloat16}


def test_event_scores_of_another_detector(tmp_path, status):
    file = tmp_path / "scores.json"
    words = ["--show", "pruning", "--demos", "20", "--event-scores", str(file)]
    for text, names in (("{", "not a JSON file"), ("{}", "no scores for episode"),
                        ('{"0": [1]}', "episode")):  # fmt: skip
        file.write_text(text)
        code, _, err = status(dualvla.main, *words)
        assert code == 2 and names in err and err.count("\n") == 1
    episodes = data.demonstrations("tabletop:bridge", 20, 0, 64, 32, 0.3)
    places = [list(range(0, len(e.action), 2)) for e in episodes]
    rows = [{"frame_idx": at, "scores": [t == 4 for t in at]} for at in places]
    file.write_text(json.dumps(dict(enumerate(rows))))
    code, out, _ = status(dualvla.main, *words, "--out", str(tmp_path))
    kept = next(line.split() for line in out.splitlines() if line.startswith("scene"))
    assert code == 0 and int(kept[2]) == 20, "the fourth frame of each recording"


def test_ablation_list_prints_every_row(status):
    code, out, _ = status(dualvla.main, "--ablation", "list")
    assert code == 0
    assert [line.split()[0] for line in out.splitlines()[1:]] == list(dualvla.ABLATIONS)


def test_pareto_draws_the_arms_and_their_specialist(tmp_path, monkeypatch, status):
    lines = [{"arm": arm, "flags": "", "world": "tabletop:bridge", "success": s, "answers": a,
              "stages": {"expert": {"success": 0.99, "answers": 0.0}}}
             for arm, s, a in (("base", 0.6, 0.9), ("ours", 0.95, 0.94), ("ours", 0.97, 0.92))]
    monkeypatch.setattr(common, "result_lines", lambda method: lines)
    drawn = []
    monkeypatch.setattr(reports.pictures, "plot_curves", lambda *a: drawn.append(a))
    code, out, _ = status(dualvla.main, "--show", "pareto", "--out", str(tmp_path))
    assert code == 0 and "pareto.png" in out
    want = {"base": (90, 60), "ours": (93, 96), "E, silent": (0, 99)}
    unbeaten = drawn[0][1].pop("unbeaten")
    assert {n: pytest.approx(p[0]) for n, p in drawn[0][1].items()} == want
    assert [tuple(p) for p in unbeaten] == [pytest.approx((0, 99)), pytest.approx((93, 96))]


def test_foreign_checkpoints_are_refused(copied, status):
    for path in copied.glob("*/checkpoints/*/meta.json"):
        path.write_text(path.read_text().replace('"method": "dualvla"', '"method": "twinbrain"'))
    code, _, err = status(dualvla.main, "--eval-only", str(copied))
    assert code == 2 and "is a checkpoint of twinbrain, not of dualvla" in err


@pytest.fixture
def blind(tmp_path):
    """Flags for recordings with reasoning, without a state."""
    root = write_v2(tmp_path / "blind", False)
    about = json.loads((root / "meta/info.json").read_text())
    del about["features"]["observation.state"]
    (root / "meta/info.json").write_text(json.dumps(about))
    said = [{"episode": e, "reasoning": [f"step {t}" for t in range(T)]} for e, T in
            enumerate(LENGTHS[:-1])]  # fmt: skip
    (root / "reasoning.jsonl").write_text("\n".join(map(json.dumps, said)))
    at = TINY.index("--domains")
    return [*TINY[:at], *TINY[at + 2 :], "--data", str(root), "--out", str(tmp_path / "run")]


@pytest.mark.parametrize("words, names", [
    (["--events", "ddm"], "--events ddm learns from a world's marks"),
    (["--events", "phase"], "these recordings mark no sub-goals"),
    (["--event-scores", "none.json"], "--event-scores none.json: no such file"),
    (["--events", "ddm", "--world", "tabletop:bridge"], "tabletop:bridge, which has other cameras"),
], ids=str)  # fmt: skip
def test_events_that_cannot_be_found_are_known_before_e_trains(
    blind, words, names, status, monkeypatch
):
    alone = [SimpleNamespace(images={"front": None})]
    monkeypatch.setattr(data, "demonstrations", lambda *_: alone)
    code, _, err = status(dualvla.main, *blind, *words)
    assert code == 2 and names in err and err.count("\n") == 1
    assert not list(Path(blind[-1]).glob("*/checkpoints"))


def test_recordings_without_a_state_are_pruned_and_trained_on(blind, tmp_path, capsys):
    dualvla.main([*blind, "--events", "similarity"])
    *told, mute = common.load_checkpoint(tmp_path / "run" / "dual", "dualvla").meta["kept"]
    share = "".join(told).count("1") / sum(LENGTHS[:-1])
    assert 0 < share < 1 and "0" not in mute, "what was recorded without a word counts nowhere"
    assert result(tmp_path / "run" / "dual")["kept"] == pytest.approx(share)
    assert f"reasoning stays at {share:.1%} of" in capsys.readouterr().out
