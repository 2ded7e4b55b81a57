"""common.py: command line, exact checkpoints, run folder, processes, pictures, numbers."""

import json
import math
import os
import random
import signal
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from types import FunctionType

import numpy as np
import pytest
import torch
from PIL import Image

import common
from parts import checkpoints, process
from worlds import pictures


@dataclass
class Config:
    world: str = "table"  # where to act
    actions: str = "flow"  # flow | tokens: how actions are made
    lr: float = 1e-3  # Appendix B
    batch_size: int = 32  # samples of a step
    ema: bool = True  # average the weights
    suites: tuple[str, ...] = ("a",)  # evaluated ones
    steps: int = 10  # optimizer steps
    seed: int = 0  # all randomness
    device: str = "cpu"  # auto | cpu | cuda
    threads: int = 0  # 0: PyTorch's choice
    out: str = ""  # run folder
    resume: str = ""  # run folder to go on with
    preset: str = ""  # a set of flags
    ablation: str = ""  # a row of a table


ALONE = common.Dist(0, 1, torch.device("cpu"))
PRESETS = {"paper": {"lr": 1e-5, "batch_size": 128, "_note": "Table 1"}}


def parse(*words):
    return common.parse(Config, PRESETS, {"T6b": {"ema": False}}, list(words))


def test_flags_beat_ablation_beats_preset_beats_defaults():
    cfg = parse("--preset", "paper", "--ablation=T6b", "--lr", "2e-5", "--suites", "b,c")
    assert (cfg.lr, cfg.batch_size, cfg.ema, cfg.suites) == (2e-5, 128, False, ("b", "c"))
    assert set(cfg.explicit) == {"preset", "ablation", "lr", "suites", "ema"}
    saved = dict(vars(parse()), ema=True)
    saved.pop("explicit")
    acted = common.resume_config(parse("--ablation", "T6b"), saved, ("ablation", "ema"))
    assert acted.ema is False, "an arm that a finished run may be asked for is not ignored"
    assert parse("--ablation", "T6b", "--ema").ema and parse("--no-ema").ema is False
    assert parse("--seed", "-1").seed == -1 and parse("--ablation", "list").ablation == "list"


@pytest.mark.parametrize("words, message", [
    (["--batch-sise", "3"], "unknown flag --batch-sise (did you mean --batch-size?)"),
    (["--batch_size", "3"], "unknown flag --batch_size (did you mean --batch-size?)"),
    (["lr=3"], "unknown flag lr (did you mean --lr?)"),
    (["--lr", "fast"], "--lr takes a number, not 'fast'"),
    (["--lr", "nan"], "--lr takes a number, not 'nan'"),
    (["--steps", "1.5"], "--steps takes a whole number, not '1.5'"),
    (["--actions", "token"], "--actions takes flow, tokens; not 'token' (did you mean tokens?)"),
    (["--lr"], "--lr needs a value"),
    (["--lr", "--ema"], "--lr needs a value"),
    (["--ema=1"], "--ema takes no value: there is --[no-]ema"),
    (["--preset", "papr"], "unknown preset 'papr' (did you mean paper?)"),
])  # fmt: skip
def test_a_wrong_command_line_is_one_line(words, message):
    with pytest.raises(common.UserError) as error:
        parse(*words)
    assert str(error.value) == message


def test_help_shows_each_comment_and_default_in_one_column(capsys):
    with pytest.raises(SystemExit) as end:
        parse("-h")
    text = capsys.readouterr().out
    assert end.value.code == 0 and "presets: paper" in text and "ablations: list, T6b" in text
    assert "  --actions str     flow | tokens: how actions are made [flow]\n" in text
    assert "  --suites a,b,...  evaluated ones [a]\n" in text
    assert "  --[no-]ema        average the weights [True]\n" in text
    flags = [line for line in text.splitlines() if line.startswith("  --")]
    assert len(flags) == len(Config.__dataclass_fields__)
    assert all(line[18:20] == "  " != line[20:22] for line in flags)


def test_errors_end_in_one_line_and_status_2(capsys):
    def main():
        parse("--sead", "1")

    with pytest.raises(SystemExit) as end:
        common.run_main(main)
    shown = capsys.readouterr().err
    assert end.value.code == 2 and shown == "error: unknown flag --sead (did you mean --seed?)\n"


@dataclass
class Small:
    accumulate: int = 1  # batches of a step
    frozen: str = "fp32"  # fp32 | bf16


def test_a_full_gpu_names_the_flags_that_its_script_has(capsys):
    def message(**names):
        def main():
            raise torch.OutOfMemoryError("CUDA")

        script = FunctionType(main.__code__, {"torch": torch, **names})
        with pytest.raises(SystemExit):
            common.run_main(script)
        return capsys.readouterr().err

    said = message(Config=Small)
    assert said == ("error: the GPU is out of memory; what helps: half of --batch with twice "
                    "--accumulate, --frozen bf16\n")  # fmt: skip
    assert message() == "error: the GPU is out of memory\n"


def test_resume_keeps_the_saved_settings():
    saved = json.loads(json.dumps(asdict(parse("--lr", "0.5", "--suites", "b,c"))))
    cfg = common.resume_config(parse("--resume", "x", "--steps", "20"), saved, free=("steps",))
    assert (cfg.lr, cfg.suites, cfg.steps, cfg.resume) == (0.5, ("b", "c"), 20, "x")
    assert common.resume_config(Config(), saved) == parse("--lr", "0.5", "--suites", "b,c")
    with pytest.raises(common.UserError, match="--lr 0.1 differs from 0.5 in the run"):
        common.resume_config(parse("--lr", "0.1"), saved, free=("steps",))
    with pytest.raises(common.UserError, match="of another version: width"):
        common.resume_config(parse(), {**saved, "width": 3})


def save(run, step, dist=ALONE, **changes):
    weight = torch.full((2, 3), float(step))
    tensors = {"embed": weight, "head": weight, "bf16": torch.ones(2, dtype=torch.bfloat16)}
    meta = {"method": "m", "config": {}, "stats": {"low": np.zeros(2)}, **changes}
    state = {"optimizer": {"state": {0: {"exp_avg": weight}}, "param_groups": [{"lr": 0.1}]}}
    folder = run / "checkpoints"
    return common.save_checkpoint(folder, step, tensors, state, {"at": step}, meta, dist)


def test_checkpoint_returns_what_was_saved_and_keeps_two(tmp_path):
    for step in (1, 2, 10, 10):
        save(tmp_path, step)
    names = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    assert names == ["step_00000002", "step_00000010"]
    got = common.load_checkpoint(tmp_path, "m", dist=ALONE)
    assert (got.step, got.run, got.local_state) == (10, tmp_path.resolve(), {"at": 10})
    assert got.tensors["bf16"].dtype == torch.bfloat16 and got.meta["stats"]["low"] == [0, 0]
    assert got.tensors["head"] is got.tensors["embed"] and got.tensors["head"][1, 2] == 10
    assert got.train_state["optimizer"]["param_groups"] == [{"lr": 0.1}]
    older = common.load_checkpoint(got.path.with_name("step_00000002"), "m")
    assert older.step == 2 and older.train_state == {}


def test_a_resumed_run_drops_the_later_checkpoints_it_replaces(tmp_path):
    for step in (1, 2, 3):
        save(tmp_path, step)
    (tmp_path / "checkpoints" / "step_00000003").rename(tmp_path / "checkpoints" / "step_00000009")
    save(tmp_path, 4)
    names = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    assert names == ["step_00000002", "step_00000004"]


@pytest.mark.parametrize("name", ["model.safetensors", "train.pt", "rank0.pt", "meta.json"])
def test_a_damaged_checkpoint_names_the_file(tmp_path, name):
    save(tmp_path, 1)
    file = save(tmp_path, 2) / name
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    with pytest.raises(common.UserError, match=f"{name} is damaged or cut short; remove .*00002"):
        common.load_checkpoint(tmp_path, "m", dist=ALONE)
    if name != "meta.json":
        file.unlink()
        with pytest.raises(common.UserError, match=f"the checkpoint lacks .*{name}"):
            common.load_checkpoint(tmp_path, "m", dist=ALONE)


def test_what_a_killed_run_left_half_written_is_never_read(tmp_path):
    path = save(tmp_path, 1)
    for name in ("tmp_00000009", "gone_step_00000008"):
        (path.with_name(name) / "shards").mkdir(parents=True)
        (path.with_name(name) / "meta.json").write_text("{")
    for file in (path / "meta.json.tmp", tmp_path / "config.json.tmp", tmp_path / "metrics.tmp"):
        file.write_text("{")
    got = common.load_checkpoint(tmp_path, "m", dist=ALONE)
    assert got.step == 1
    common.Run(parse("--seed", "3"), "m", __file__, ALONE, 10, got).close()
    assert (tmp_path / "metrics.jsonl").read_text() == ""
    save(tmp_path, 9)
    assert common.load_checkpoint(tmp_path, "m").step == 9


@pytest.mark.parametrize("text", [
    "[]", "3", '"m"', "{}", '{"method": "m"}', '{"method": "m", "step": 1, "processes": 1}',
    '{"method": "m", "step": 1, "processes": 1, "config": [], "tied": {}}',
])  # fmt: skip
def test_facts_of_another_kind_are_called_damaged(tmp_path, text):
    (save(tmp_path, 1) / "meta.json").write_text(text)
    for dist in (None, ALONE):
        with pytest.raises(common.UserError, match="meta.json is damaged or cut short"):
            common.load_checkpoint(tmp_path, "m", dist=dist)


def test_more_processes_than_wrote_a_checkpoint_draw_each_its_own(tmp_path):
    folder = tmp_path / "checkpoints"
    meta = {"method": "m", "config": {"seed": 7}}
    common.save_checkpoint(folder, 1, {}, {}, {"rng": common.rng_state()}, meta, ALONE)
    drawn = []
    for rank in (0, 1, 2, 2):
        got = common.load_checkpoint(tmp_path, "m", dist=common.Dist(rank, 3, ALONE.device))
        common.set_rng_state(got.local_state["rng"])
        drawn.append(torch.rand(1).item())
    assert drawn[2] == drawn[3] and len({*drawn}) == 3


def test_a_checkpoint_that_does_not_fit_is_not_called_damaged(tmp_path, monkeypatch):
    save(tmp_path, 1), save(tmp_path, 2)
    monkeypatch.setattr(checkpoints, "load_file", lambda file: torch.empty(2**58))
    with pytest.raises(common.UserError, match="model.safetensors does not fit in this machine's"):
        common.load_checkpoint(tmp_path, "m")


def test_a_foreign_checkpoint_is_refused(tmp_path):
    with pytest.raises(common.UserError, match="no checkpoint in .*: no such folder"):
        common.load_checkpoint(tmp_path / "nowhere", "m")
    save(tmp_path, 1, method="other")
    with pytest.raises(common.UserError, match="is a checkpoint of other, not of m"):
        common.load_checkpoint(tmp_path, "m")
    third = common.Dist(2, 3, torch.device("cpu"))  # more processes than wrote it: any rank's
    assert common.load_checkpoint(tmp_path, "other", dist=third).local_state == {"at": 1}


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs a device that is always full")
@pytest.mark.parametrize("name", ["train.pt", "rank0.pt", "meta.json.tmp"])
def test_a_full_disk_leaves_the_last_checkpoint(tmp_path, monkeypatch, name):
    save(tmp_path, 1)
    draft, mkdir = tmp_path / "checkpoints" / "tmp_00000002", Path.mkdir

    def full(path, *args, **words):
        mkdir(path, *args, **words)
        if path == draft:
            (path / name).symlink_to("/dev/full")

    monkeypatch.setattr(Path, "mkdir", full)
    with pytest.raises(common.UserError, match="could not save .*00002: .*No space") as error:
        save(tmp_path, 2)
    assert "\n" not in str(error.value) and not draft.exists()
    assert common.load_checkpoint(tmp_path, "m", dist=ALONE).step == 1


def test_only_a_run_that_goes_on_needs_its_optimizer(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torchao.optim", None)
    save(tmp_path, 1, config={"optimizer": "adamw8bit"})
    assert common.load_checkpoint(tmp_path, "m").step == 1
    with pytest.raises(common.UserError, match="adamw8bit: pip install"):
        common.load_checkpoint(tmp_path, "m", dist=ALONE)


def test_what_comes_from_a_gpu_is_waited_for(monkeypatch):
    calls, to = [], torch.Tensor.to
    monkeypatch.setattr(torch.Tensor, "to", lambda x, *a, **w: calls.append(w) or to(x, *a, **w))
    for device in ("cpu", "meta"):
        common.to_device({"a": [torch.ones(2)]}, torch.device(device))
    assert [call["non_blocking"] for call in calls] == [False, True]


class Turns(common.Dist):
    """One of several processes; the others say `said` when they meet."""

    met, said = 0, ""

    def gather(self, item):
        self.met += 1
        return [item, self.said]


def test_the_first_process_of_each_machine_reads_before_the_rest(monkeypatch):
    for rank, local, before in ((0, 0, 0), (1, 1, 2), (2, 0, 1), (3, 1, 2)):
        monkeypatch.setenv("LOCAL_RANK", str(local))
        dist = Turns(rank, 4, ALONE.device)
        assert dist.first(lambda dist=dist: dist.met) == before and dist.met == 3

        def torn():
            raise common.UserError("torn")

        with pytest.raises(common.UserError, match="torn"):
            Turns(rank, 4, ALONE.device).first(torn)
        dist.said = "torn elsewhere"
        with pytest.raises(common.UserError, match="torn elsewhere"):
            dist.first(lambda: None)


def test_what_no_process_can_start_with(monkeypatch):
    with pytest.raises(common.UserError, match="--seed -1: from 0 to 2147483647"):
        common.setup(parse("--seed", "-1"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setenv("LOCAL_RANK", "4")
    with pytest.raises(common.UserError, match="process 4 has no GPU: torchrun --nproc-per-node 4"):
        common.setup(parse("--device", "auto"))


def test_rng_state_survives_a_file(tmp_path):
    torch.save(common.rng_state(), tmp_path / "rng.pt")
    draw = lambda: (random.random(), np.random.rand(), torch.rand(1).item())  # noqa: E731
    first = draw()
    common.set_rng_state(torch.load(tmp_path / "rng.pt", weights_only=True))
    assert draw() == first
    common.seed_all(3)
    first = draw()
    common.seed_all(3)
    assert draw() == first


def test_stop_waits_for_the_step_and_then_for_nothing():
    before = signal.getsignal(signal.SIGINT)
    stop = common.Stop()
    try:
        assert not stop.requested
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.requested and signal.getsignal(signal.SIGINT) == signal.SIG_DFL
    finally:
        stop.restore()
    assert signal.getsignal(signal.SIGINT) == before


def test_run_folder_and_its_resume(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    cfg = parse("--world", "tabletop:bridge")
    run = common.Run(cfg, "m", __file__, ALONE, 10)
    assert run.folder.name.startswith("m-tabletop-bridge-0-")
    for step in (1, 2, 3):
        run.log(step, {"loss": 1 / step, "memory": 2.5e9})
        save(run.folder, step)
        run.record(step, {"abilities": {"pope": 0.0}})  # before the next step: measured again
    run.close()
    assert "step  3/10  loss 0.3333     memory 2.5B" in capsys.readouterr().out
    with open(run.folder / "metrics.jsonl", "a") as file:
        file.write('{"step": 4, "lo')  # torn by a crash
    resumed = common.load_checkpoint(run.folder / "checkpoints" / "step_00000002", "m", dist=ALONE)
    again = common.Run(cfg, "m", __file__, ALONE, 10, resumed)
    again.record(3, {"loss": np.float32(0.5)})
    again.result({"success": 0.5})
    again.close()
    lines = [json.loads(line) for line in (run.folder / "metrics.jsonl").read_text().splitlines()]
    told = [(line["step"], line.get("loss", "abilities")) for line in lines]
    assert told == [(1, 1.0), (1, "abilities"), (2, 0.5), (3, 0.5)]
    names = {"config.json", "config-00000002.json", "result.json", "test_common.py"}
    assert names < {path.name for path in run.folder.iterdir()}


def test_a_run_folder_is_not_overwritten(tmp_path):
    cfg = parse("--out", str(tmp_path / "run"))
    common.Run(cfg, "m", __file__, ALONE, 10).close()  # nothing came of it
    run = common.Run(cfg, "m", __file__, ALONE, 10)
    run.log(1, {"loss": 1.0})
    run.close()
    with pytest.raises(common.UserError, match="holds a run"):
        common.Run(cfg, "m", __file__, ALONE, 10)
    facts = json.loads((tmp_path / "run" / "config.json").read_text())
    assert facts["config"]["lr"] == 1e-3 and torch.__version__.startswith(facts["torch"])


def both(rank, folder):
    os.environ.update(RANK=str(rank), WORLD_SIZE="2", LOCAL_RANK=str(rank))
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(20000 + os.getppid() % 20000))
    dist = common.setup(parse("--threads", "1"))
    assert dist.main == (rank == 0) and dist.share(rank) == 0 and dist.gather(rank) == [0, 1]
    assert dist.any(rank == 1) and not dist.any(False) and dist.mean({"a": rank}) == {"a": 0.5}
    save(folder, 1, dist)
    got = common.load_checkpoint(folder, "m", dist=dist)
    assert got.step == 1 and (got.path / f"rank{rank}.pt").exists()
    if rank == 1:  # its disk is full from now on
        checkpoints.write_state = lambda *_: open("/dev/full", "wb", 0).write(b"x")
    with pytest.raises(common.UserError, match="No space" if rank else "another process"):
        save(folder, 2, dist)
    dist.destroy()


@pytest.mark.slow  # test_scale.py trains on two
def test_two_processes_agree(tmp_path):
    torch.multiprocessing.spawn(both, (tmp_path,), nprocs=2)


def test_pictures_open_again(tmp_path):
    curve = [(x, math.exp(-x / 100) + 0.1 * math.sin(x)) for x in range(0, 400, 2)]
    series = {"loss": curve, "five": [(0, 0.5), (200, 0.2), (399, math.nan)], "none": []}
    pictures.plot_curves(tmp_path / "a.png", series, "Training", "step", "loss", smooth=0.9)
    pictures.plot_curves(tmp_path / "b.png", {"flat": [(1, 2)]}, "", "", "")
    static, wrist = np.full((64, 64, 3), 200, np.uint8), np.zeros((32, 32, 3), np.uint8)
    frame = pictures.caption_frame([static, wrist], ["put the red block on the plate"], 3, True)
    pictures.save_gif(tmp_path / "c.gif", [frame, static, wrist], fps=5)
    pictures.contact_sheet(tmp_path / "d.png", [([static, wrist], "text " * 60), ([static], "\n")])
    assert frame.width == 2 * 3 * 64 + 18 and frame.getpixel((0, 0)) == (44, 154, 63)
    with Image.open(tmp_path / "c.gif") as gif:
        assert (gif.size, gif.n_frames, gif.info["duration"]) == (frame.size, 3, 200)
    for name in ("a.png", "b.png", "d.png"):
        assert min(Image.open(tmp_path / name).size) > 100


def test_a_film_keeps_its_colours(tmp_path):
    """A purple spoon among the wood's hundred shades stays purple: Euclid's distance below 24."""
    rng = np.random.default_rng(0)
    wood = (np.array([190, 140, 90]) + rng.integers(-40, 40, (64, 64, 1))).astype(np.uint8)
    purple = wood.copy()
    purple[30:34, 30:34] = 140, 50, 190
    pictures.save_gif(tmp_path / "a.gif", [wood, purple])
    with Image.open(tmp_path / "a.gif") as gif:
        gif.seek(1)
        shown = np.asarray(gif.convert("RGB"), float)
    assert np.linalg.norm(shown[31, 31] - (140, 50, 190)) < 24
    assert np.abs(shown - purple).mean() < 6


def test_tick_marks_are_round_and_enclose():
    assert pictures.tick_marks(0, 1) == pytest.approx([0, 0.2, 0.4, 0.6, 0.8, 1])
    assert pictures.tick_marks(-3, 47) == [-10, 0, 10, 20, 30, 40, 50]
    for low, high in ((0, 0), (5, 5), (1e-9, 2e-9), (-1e6, 3e5), (0.999, 1.001)):
        ticks = pictures.tick_marks(low, high)
        assert ticks[0] <= low and high <= ticks[-1] and 2 <= len(ticks) <= 8


def test_intervals_against_tables():
    assert common.ci95(8, 10) == pytest.approx((0.4902, 0.9433), abs=1e-4)  # Wilson (1927)
    assert common.ci95(0, 0) == (0, 1) and common.ci95(0, 20)[0] == 0
    assert common.ci95(20, 20)[1] == 1
    low, high = common.ci95_mean([1.0, 2.0, 3.0])
    assert (low + high) / 2 == pytest.approx(2) and high - 2 == pytest.approx(4.303 / 3**0.5)
    low, high = common.ci95_mean([0.0, 1.0] * 13)  # 25 degrees of freedom: t = 2.0595
    assert (high - 0.5) * 26**0.5 / np.std([0, 1] * 13, ddof=1) == pytest.approx(2.0595, abs=1e-3)
    assert math.isnan(common.ci95_mean([0.4])[0])


def test_learning_rate_and_counts():
    rates = [common.lr_at(step, 1.0, 4, 12, 0.1) for step in range(14)]
    assert rates[:5] == [0.25, 0.5, 0.75, 1, 1] and rates[8] == pytest.approx(0.55)
    assert rates[12] == rates[13] == pytest.approx(0.1) and common.lr_at(0, 1.0, 0, 0) == 1.0
    model = torch.nn.Linear(3, 2)
    model.bias.requires_grad_(False)
    assert common.param_counts(model) == {"total": 8, "trainable": 6, "frozen": 2}
    assert [common.human(n) for n in (7, 1500, 1.83e6, 999999, 4e9)] == "7 1.5K 1.83M 1M 4B".split()


def test_autocast_follows_the_flag():
    product = lambda dtype: torch.ones(2, 2) @ torch.ones(2, 2)  # noqa: E731
    for flag, dtype in (("bf16", torch.bfloat16), ("fp32", torch.float32)):
        with common.autocast(torch.device("cpu"), flag):
            assert product(flag).dtype == dtype
    with common.autocast(torch.device("cpu"), "auto"):
        assert product("auto").dtype in (torch.bfloat16, torch.float32)


@pytest.mark.parametrize("dot, tiles, maker, fast", [
    (False, False, "AuthenticAMD", False), (True, False, "AuthenticAMD", True),
    (True, False, "GenuineIntel", False), (True, True, "GenuineIntel", True),
])  # fmt: skip
def test_auto_takes_bfloat16_where_its_products_are_the_faster_ones(
    dot, tiles, maker, fast, monkeypatch
):
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: dot)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: tiles)
    monkeypatch.setattr(process, "cpu_facts", lambda: f"vendor_id : {maker}")
    assert process.in_bf16(torch.device("cpu"), "auto") == fast


def test_another_backbone_takes_the_preset_larger_unless_one_is_named():
    def parse(words):
        presets = {"paper": {"lr": 1e-5, "steps": 9}, "larger": {"lr": 1e-4}}
        return common.parse(Grown, presets, {}, words.split())

    @dataclass
    class Grown:
        backbone: str = "tiny"  # of it
        preset: str = ""  # its name
        ablation: str = ""  # a row
        steps: int = 2  # of training
        lr: float = 2e-3  # rate

    usual = Grown()
    grown = parse("--backbone Qwen3-VL-4B --steps 7")
    assert (grown.lr, grown.steps, grown.preset) == (1e-4, 7, "larger")
    assert grown.explicit == ("backbone", "steps")
    assert parse("--backbone=Qwen3-VL-4B --lr 0.1").lr == 0.1
    assert parse("--backbone Qwen3-VL-4B --preset paper").steps == 9
    for words in ("", "--backbone tiny"):
        assert (parse(words).lr, parse(words).preset) == (usual.lr, "")


@pytest.mark.parametrize("env, told", [({}, [-1, -3]), ({"MALLOC_ARENA_MAX": "1"}, [])], ids=str)
def test_what_a_step_frees_stays_unless_the_environment_says_otherwise(env, told, monkeypatch):
    class Libc:
        def mallopt(self, option, value):
            asked.append(option)
            assert value >= 2**25

    asked = []
    for name in [n for n in os.environ if n.startswith("MALLOC_")]:
        monkeypatch.delenv(name)
    for name, value in env.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(process.ctypes, "CDLL", lambda name: Libc())
    monkeypatch.setattr(process.platform, "libc_ver", lambda: ("glibc", "2.36"))
    process.keep_memory()
    assert asked == told


def test_muon_multiplies_in_the_precision_it_is_told():
    """In bfloat16 the update is another one, by about a rounding; the weights stay float32."""
    start, grad, after = torch.randn(16, 16), torch.randn(16, 16), {}
    for dtype in ("fp32", "bf16"):
        p = torch.nn.Parameter(start.clone())
        p.grad = grad.clone()
        common.Muon([p], dtype, lr=0.02).step()
        after[dtype] = (p.detach() - start).flatten()
        assert p.dtype == torch.float32
    assert not torch.equal(after["fp32"], after["bf16"])
    assert torch.cosine_similarity(after["fp32"], after["bf16"], dim=0) > 0.99


@pytest.mark.parametrize("adjust", ["original", "match_rms_adamw"])
@pytest.mark.parametrize("most", [2**27, 100])
def test_muon_steps_as_pytorchs_own(adjust, most, monkeypatch):
    monkeypatch.setattr(process, "AT_ONCE", most)
    torch.manual_seed(0)
    start = [torch.randn(shape) for shape in ((8, 8), (6, 12), (12, 6), (8, 8), (6, 12))]
    after = []
    for kind in (torch.optim.Muon, common.Muon):
        params = [torch.nn.Parameter(p.clone()) for p in start]
        opt = kind(params, lr=0.02, weight_decay=0.1, adjust_lr_fn=adjust)
        torch.manual_seed(1)
        for _ in range(3):
            for p in params:
                p.grad = torch.randn(p.shape)
            opt.step()
        after.append((params, [opt.state[p]["momentum_buffer"] for p in params]))
    for i, p in enumerate(start):
        moved = (after[0][0][i] - p).norm()
        assert (after[0][0][i] - after[1][0][i]).norm() < 0.05 * moved  # PyTorch's has 8 bits
        assert torch.equal(after[0][1][i], after[1][1][i])
