"""The scripts on a stand-in for a GPU: all tensors are where they have to be, nothing waits."""

import importlib
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import standin
import test_dualvla
import test_twinbrain
import test_vita_vla
import torch
from standin import GPU, Elsewhere, OnGPU

import common
import data
import dualvla
import twinbrain
import vita_vla
from worlds import tabletop

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "bench"))
import methods  # noqa: E402

SLOW = pytest.mark.slow


@pytest.fixture
def gpu(monkeypatch):
    standin.install(monkeypatch)
    with Elsewhere():
        yield
    torch.__future__.set_swap_module_params_on_conversion(False)


def test_the_stand_in_is_one(gpu):
    x, w = torch.ones(2, 3, device="cuda"), torch.nn.Linear(3, 2).to("cuda")
    assert x.device == w.weight.device == GPU and isinstance(w(x), OnGPU)
    with pytest.raises(RuntimeError, match=r"\(3,\) is still on the CPU"):
        x + torch.ones(3)
    with pytest.raises(TypeError):
        x.numpy()
    w(x).sum().backward()
    assert w.weight.grad.device == GPU and (w.weight.grad.cpu() == 2).all()
    assert [what for what, _ in OnGPU.waits] == ["to the GPU", "to the GPU", "to the CPU"]
    assert x[x > 0].sum().item() == 6 and np.shape(x.cpu().numpy()) == (2, 3)
    assert [what for what, _ in OnGPU.waits[3:]] == ["index", "_local_scalar_dense", "to the CPU"]


def learn(script, case, losses):
    """Steps of a Case on the GPU. losses(batch) of a fresh batch: nobody waits until the norm."""
    case.model.to(GPU)
    opts = script.make_optimizers(case.model, case.cfg)
    trained = [p for p in case.model.parameters() if p.requires_grad]
    before = [p.cpu().clone() for p in trained]
    for _ in range(2):
        batch = common.to_device(case.batch, GPU)
        OnGPU.waits.clear()
        with common.autocast(GPU, "bf16"):
            script.total_loss(losses(batch), case.cfg).backward()
        norm = common.clip(trained, 1.0)
        for opt in opts:
            opt.param_groups[0]["lr"] = 0.1
            opt.step()
            opt.zero_grad(set_to_none=True)
        assert OnGPU.waits == [] and 0 < norm() < 1e9
    assert any(not torch.equal(a, p.cpu()) for a, p in zip(before, trained, strict=True))


@pytest.mark.parametrize("flags", [
    {"cotrain": 0.1, "visibility": "index"}, {"brain": "nofreeze", "optimizer": "muon"},
    pytest.param({"head": "pi", "lora": 2}, marks=SLOW), pytest.param({"head": "oft"}, marks=SLOW),
    pytest.param({"head": "fast", "brain": "vanilla"}, marks=SLOW),
], ids=str)  # fmt: skip
def test_a_step_of_twinbrain_waits_for_nothing(gpu, episodes, flags):
    case = test_twinbrain.Case(episodes, **flags)
    noise = common.to_device([*case.noise], GPU)
    learn(twinbrain, case, lambda batch: case.model(batch, noise))


@pytest.mark.parametrize("flags", [
    {"stage": "teacher"}, {"stage": "align"}, {},
    pytest.param({"state_input": "text", "lora": 2}, marks=SLOW),
], ids=str)  # fmt: skip
def test_a_step_of_vita_waits_for_nothing(gpu, episodes, flags):
    case, teacher = test_vita_vla.Case(episodes, **flags), None
    if case.cfg.stage == "align":
        teacher = test_vita_vla.Case(episodes, stage="teacher").model.to(GPU).requires_grad_(False)

    def losses(batch):
        return case.model(batch, teacher.hidden(batch)[0] if teacher else None)

    learn(vita_vla, case, losses)


@pytest.mark.parametrize("flags", [
    {}, pytest.param({"stage": "expert"}, marks=SLOW), pytest.param({"tune": "full"}, marks=SLOW),
], ids=str)  # fmt: skip
def test_a_step_of_dualvla_waits_for_nothing(gpu, episodes, flags):
    case, teachers = test_dualvla.Case(episodes, **flags), (None, None)
    if not flags:
        both = (test_dualvla.Case(episodes, stage) for stage in ("expert", "generalist"))
        teachers = [other.model.to(GPU).requires_grad_(False) for other in both]
    noise = common.to_device([*case.noise], GPU)

    def losses(batch):
        soft = dualvla.teach(teachers, batch, noise)
        return case.model(batch, noise, soft)

    learn(dualvla, case, losses)


@pytest.mark.parametrize("script, flags", [
    (test_twinbrain, {}), (test_vita_vla, {}), (test_dualvla, {}),
    pytest.param(test_twinbrain, {"head": "oft"}, marks=SLOW),
    pytest.param(test_vita_vla, {"stage": "teacher"}, marks=SLOW),
], ids=lambda x: getattr(x, "__name__", str(x)))  # fmt: skip
def test_a_control_step_waits_for_its_action_alone(gpu, episodes, script, flags):
    case, memories = script.Case(episodes, **flags), [{}, {}]
    policy = case.policy() if script is test_vita_vla else case.policy
    case.model.to(GPU)
    policy.device, policy.form = GPU, "plain"
    for t in range(4):  # VITA-VLA's history of three steps grows, then slides
        seen = [test_vita_vla.observation_of(e, t, m) for e, m in zip(episodes, memories)]
        OnGPU.waits.clear()
        policy.act(seen, [e.instruction for e in episodes[:2]], np.random.default_rng(0))
        assert [what for what, _ in OnGPU.waits] == ["to the CPU"]


def test_a_run_on_a_gpu(gpu, tmp_path, monkeypatch):
    """From the flags to the films; while training, only the loss that is logged is waited for."""
    data.demonstrations("tabletop:bridge", 4)
    monkeypatch.setattr(tabletop.Tabletop, "max_steps", 3)
    shape = ["--width", "32", "--depth", "2", "--heads", "2", "--batch", "2", "--demos", "4"]
    act = ["--domains", "in", "--episodes", "1", "--parallel", "1", "--questions", "2"]
    twinbrain.main([*shape, *act, "--steps", "3", "--log-every", "9", "--out", str(tmp_path)])
    assert json.loads((tmp_path / "result.json").read_text())["success"] == 0
    assert [*tmp_path.glob("*.gif")]
    waits = [what for what, callers in OnGPU.waits if "train" in callers]
    assert waits == ["_local_scalar_dense"]


WHOLE = [
    "twinbrain --brain nofreeze --head oft --qa-every 2",
    "twinbrain --brain vanilla --head fast",
    "twinbrain --head pi --lora 2 --frozen bf16 --ensemble",
    "twinbrain --grad-checkpoint --accumulate 2 --cotrain 0.1 --attention kernel",
    "vita_vla --teacher train",
    "vita_vla --teacher train --recipe freeze-vlm --mapper decoder --no-cache",
    "dualvla --prune action",
    "dualvla --actions tokens --prune none --horizon 2 --execute 2",
]


@SLOW
@pytest.mark.parametrize("words", WHOLE)
def test_whole_runs_on_a_gpu(gpu, words, tmp_path, monkeypatch):
    name, *flags = words.split()
    for world in ("bridge", "abc_d"):
        data.demonstrations(f"tabletop:{world}", 8)
    monkeypatch.setattr(tabletop.Tabletop, "max_steps", 3)
    brief = ["--steps", "2", "--demos", "8", "--episodes", "1", "--parallel", "1", "--batch", "2",
             "--domains", "in", "--width", "32", "--heads", "2"]  # fmt: skip
    script = importlib.import_module(name)
    script.main([*brief, *flags, "--out", str(tmp_path)])
    assert [*tmp_path.rglob("result.json")] and [*tmp_path.rglob("*.gif")]
    run = sorted(tmp_path.rglob("checkpoints"))[-1].parent
    before = (run / "result.json").read_text()
    script.main(["--eval-only", str(run), "--out", str(tmp_path / "again")])
    after = next((tmp_path / "again").rglob("result.json")).read_text()
    assert json.loads(after)["success"] == json.loads(before)["success"]


@SLOW
@pytest.mark.parametrize("words", [
    "step --steps 1 --batch 2", "step --method vita_vla --stage align --steps 1 --batch 2",
    "step --method dualvla --steps 1 --batch 3", "latency --repeats 1 --seconds 0.1",
])  # fmt: skip
def test_a_benchmark_on_a_gpu(gpu, words, monkeypatch, capsys):
    """Its table, in which no training step has waited; nothing is written to bench/results."""
    name, *flags = words.split()
    importlib.reload(methods)  # it has looked for a GPU
    bench, rows = importlib.reload(importlib.import_module(name)), []
    monkeypatch.setattr(bench, "append", lambda kind, row: rows.append(row))
    monkeypatch.setattr(bench, "bf16", lambda policy: policy, raising=False)
    monkeypatch.setattr(sys, "argv", [name, *flags])
    try:
        bench.main()
    finally:
        monkeypatch.undo()
        importlib.reload(methods)
        importlib.reload(bench)
    assert rows and all(row.get("waits", 0) == 0 for row in rows)
    assert "a stand-in" in capsys.readouterr().out
