"""--data: the three scripts trained on recordings of several robots, from disk to acting."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from test_formats import truncate, write_questions, write_v2, write_v3

import common
import data
import dualvla
import twinbrain
import vita_vla

pytestmark = pytest.mark.usefixtures("brief")

ROOT = Path(__file__).resolve().parents[1]
TINY = [
    "--steps", "2", "--save-every", "1", "--log-every", "1", "--episodes", "2", "--gifs", "0",
    "--batch", "4", "--width", "32", "--depth", "1", "--heads", "2", "--threads", "1",
    "--device", "cpu",
]  # fmt: skip
MORE = {
    twinbrain: ["--questions", "2", "--cotrain", "0.1", "--execute", "8"],
    vita_vla: ["--stage", "teacher", "--foresight", "1", "--history", "2"],
    dualvla: ["--stage", "generalist", "--questions", "2", "--queries", "2", "--rank", "2",
              "--score-episodes", "0", "--talk", "2", "--execute", "8"],
}  # fmt: skip


@pytest.fixture
def both(tmp_path):
    """Two robots, the second with fewer numbers of state, and a file of questions."""
    write_v3(tmp_path / "wide", False)
    write_v2(tmp_path / "narrow", False, dims=(7, 7))
    return tmp_path, f"{tmp_path / 'wide'}=2,{tmp_path / 'narrow'}"


@pytest.mark.parametrize("script", MORE, ids=lambda script: script.__name__)
def test_training_on_recordings_and_acting_like_one_of_them(script, both, capsys):
    folder, spec = both
    questions = write_questions(folder / "asked", "json")
    out = folder / "run"
    words = spec if script is vita_vla else f"{spec},{questions}"
    if script is vita_vla:  # reads the gripper in the last number of a state
        with pytest.raises(common.UserError, match="states of different widths cannot be mixed"):
            script.main([*TINY, *MORE[script], "--data", words, "--out", str(folder / "refused")])
        shutil.rmtree(folder / "narrow")
        write_v2(folder / "narrow", False)
    script.main([*TINY, *MORE[script], "--data", words, "--out", str(out)])
    said = capsys.readouterr().out
    assert "wide, " in said and "8 episodes" in said and "not acted" in said
    stage = out / "generalist" if script is dualvla else out
    got = json.loads((stage / "result.json").read_text())
    assert got["success"] is None and got["episodes"] == 0 and got["world"] == "none"
    meta = common.load_checkpoint(stage, script.__name__).meta
    wide, narrow = meta["robots"].values()
    assert len(wide["state"]["q01"]) == len(narrow["state"]["q01"]) == 8
    assert len(wide["cameras"]) == 2 and wide["fps"] == narrow["fps"] > 0
    filled = script is not vita_vla
    assert wide["state"]["max"][7] != 0 and (narrow["state"]["max"][7] == 0) == filled
    acting = ["--eval-only", str(stage), "--world", "tabletop:bridge", "--domains", "in"]
    script.main([*acting, "--robot", str(folder / "narrow"), "--episodes", "1"])
    assert "closed loop:" in capsys.readouterr().out
    with pytest.raises(common.UserError, match="--robot wide was not trained on: did you mean"):
        script.main([*acting, "--robot", "wide"])


def test_where_it_cannot_act_is_known_before_it_trains(both, tmp_path):
    """And a folder that has a world's name in its own is not that world."""
    folder = write_v2(tmp_path / "tabletop_metaworld", False, dims=(8, 5))
    assert common.parse(twinbrain.Config, {}, {}, ["--data", str(folder)]).world == "none"
    for script, flags in MORE.items():
        words = ["--data", str(folder), "--world", "tabletop:bridge", "--out", str(tmp_path / "x")]
        with pytest.raises(common.UserError, match="--world tabletop:bridge has 2 cameras"):
            script.main([*TINY, *flags, *words])
        assert not list((tmp_path / "x").glob("**/checkpoints"))
        shutil.rmtree(tmp_path / "x")


@pytest.mark.parametrize("script, cure", [
    (twinbrain, "no state of a robot: add --no-state"), (vita_vla, "6 numbers of an arm's state"),
], ids=str)  # fmt: skip
def test_a_script_that_reads_states_says_so(script, cure, tmp_path):
    root = write_v2(tmp_path / "blind", False)
    about = json.loads((root / "meta/info.json").read_text())
    del about["features"]["observation.state"]
    (root / "meta/info.json").write_text(json.dumps(about))
    words = [*TINY, *MORE[script], "--data", str(root), "--out", str(tmp_path / "run")]
    with pytest.raises(common.UserError, match=cure):
        script.main(words)


def test_questions_that_nobody_would_answer_are_not_ignored(both):
    folder, spec = both
    words = f"{spec},{write_questions(folder / 'asked', 'json')}"
    for script, flags, cure in (
        (twinbrain, [], "add --cotrain 0.1"), (vita_vla, MORE[vita_vla], "VITA-VLA learns"),
    ):  # fmt: skip
        with pytest.raises(common.UserError, match=f"asks questions: {cure}"):
            script.main([*TINY, *flags, "--data", words, "--out", str(folder / script.__name__)])


def test_the_recordings_are_trained_on_by_their_weights(both):
    folder, spec = both
    cfg = twinbrain.Config(data=spec, normalise="minmax")
    acts, asks = data.recordings(cfg, common.Dist(0, 1, None))
    assert [p.weight for p in acts] == [2, 1] and not asks
    assert acts[0].stats["state"]["how"] == "minmax"
    windows = [data.Windows(p.episodes, p.stats, 4, robot=data.robot_name(p.name)) for p in acts]
    mixture = data.Mixture(windows, [p.weight for p in acts], seed=0)
    names = [mixture[i]["robot"] for i in range(300)]
    assert set(names) == {"wide", "narrow"} and 160 < names.count("wide") < 240


def test_a_broken_picture_met_by_a_loaders_worker_is_one_line(both, tmp_path, status):
    folder, _ = both
    data.load(str(folder / "wide"))  # counted while whole
    broken = sorted((folder / "wide" / "data").rglob("*.parquet"))[0]
    times = broken.stat()
    content = bytearray(broken.read_bytes())
    at = content.find(b"IHDR")
    while at >= 0:
        content[at : at + 4] = b"torn"
        at = content.find(b"IHDR")
    broken.write_bytes(bytes(content))
    os.utime(broken, ns=(times.st_atime_ns, times.st_mtime_ns))
    more = ["--data", str(folder / "wide"), "--workers", "1", "--out", str(tmp_path / "run")]
    code, _, err = status(twinbrain.main, *TINY, *MORE[twinbrain][:2], *more, "--steps", "40")
    assert code == 2 and err.count("\n") == 1, err
    assert err.startswith("error: ") and "wide" in err and "picture" in err or "image" in err


@pytest.mark.slow
def test_two_processes_end_in_the_same_line(both):
    folder, _ = both
    truncate(sorted((folder / "wide" / "data").rglob("*.parquet"))[0])
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    command += [str(ROOT / "twinbrain.py"), *TINY, "--questions", "2"]
    command += ["--data", str(folder / "wide"), "--out", str(folder / "run")]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=100)
    lines = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert done.returncode and len(set(lines)) == 1, done.stderr  # the first to end ends the other
    assert "wide" in lines[0] and not (folder / "run" / "checkpoints").exists()
