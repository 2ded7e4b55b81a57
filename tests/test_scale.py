"""Training at any size: on one process, two and four the same; stopped anywhere, nothing lost."""

import errno
import inspect
import itertools
import json
import multiprocessing
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import test_dualvla
import test_twinbrain
import test_vita_vla
import torch
from safetensors.torch import save_file
from torch._dynamo.utils import counters
from transformers import Qwen3VLConfig, Qwen3VLForConditionalGeneration

import common
import data
import dualvla
import twinbrain
import vita_vla
from parts import backbones, checkpoints, runs, scale, seer
from worlds import serve

SCRIPTS = {"twinbrain": twinbrain, "vita_vla": vita_vla, "dualvla": dualvla}
TINY = [
    "--steps", "2", "--save-every", "1", "--log-every", "1", "--demos", "6", "--width", "32",
    "--depth", "2", "--heads", "2", "--threads", "1", "--device", "cpu", "--dtype", "fp32",
    "--optimizer", "adamw", "--batch", "8",
]  # fmt: skip
OWN = {  # what differs between the scripts
    "twinbrain": ["--questions", "2", "--repeats", "1"],
    "vita_vla": ["--stage", "finetune", "--size", "32", "--patch", "8", "--history", "2"],
    "dualvla": ["--stage", "expert", "--queries", "2", "--rank", "4", "--repeats", "1"],
}
ALONE = common.Dist(0, 1, torch.device("cpu"))
FORKS = multiprocessing.get_context("forkserver")  # imports the scripts once for all processes
FORKS.set_forkserver_preload(list(SCRIPTS))


def work(name, words, env, spoil):
    """One process of a run, without the evaluation after training; `spoil` harms it beforehand."""
    os.environ.update(env)
    for stream in (sys.stdout, sys.stderr):
        os.dup2(os.open(env["LOG"], os.O_WRONLY | os.O_CREAT | os.O_APPEND), stream.fileno())
    script, train = SCRIPTS[name], SCRIPTS[name].train

    def only_train(*args):
        train(*args)
        args[1].barrier()
        os._exit(0)

    if "CHAIN" in env:  # all stages, of whose films and scores nothing is asked here
        script.loop.evaluate = lambda *args: {}
        script.pictures.draw_run = lambda *args: None
    else:
        script.train = only_train
    if name == "vita_vla" and "CHAIN" not in env:  # its finetune begins from nothing, just here
        script.check = lambda cfg: cfg
    if spoil:
        spoil(script)
    common.run_main(lambda: script.main(words))


def start(name, folder, *words, processes=1, spoil=None, env=()):
    """Starts a run in `folder` -> its processes."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    if "--resume" not in words or "auto" in words:
        words = [*TINY, *OWN[name], *words]
    words = list(words)
    words += ["--out", str(folder)] if "--out" not in words else []
    same = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": str(processes),
            "LOG": f"{folder}.log", **dict(env)}  # fmt: skip
    made = [
        FORKS.Process(target=work, args=(name, words, same | {"RANK": str(rank)}, spoil))
        for rank in range(processes)
    ]
    for process in made:
        process.start()
    return made


def run(*args, code=0, **settings):
    """The same, to its end; returns what it printed."""
    made = start(*args, **settings)
    for process in made:
        process.join(120)
    log = Path(f"{args[1]}.log").read_text()
    assert [process.exitcode for process in made] == [code] * len(made), log[-3000:]
    return log


def weights(folder, step=2):
    (file,) = Path(folder).glob(f"**/step_{step:08d}/meta.json")
    return common.load_checkpoint(file.parent, json.loads(file.read_text())["method"]).tensors


def metrics(folder):
    (file,) = Path(folder).glob("**/metrics.jsonl")
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    return [[v for k, v in line.items() if k not in ("time", "samples/s")] for line in lines]


def assert_close(folder, other, step=2):
    """Losses and gradient norms, and the weights; a step moves these by 4e-5 and more."""
    assert torch.allclose(*(torch.tensor(metrics(f)) for f in (folder, other)), rtol=2e-4)
    one, two = weights(folder, step), weights(other, step)
    assert one.keys() == two.keys() and one
    for name in one:
        assert torch.allclose(one[name], two[name], atol=1e-5), name


def assert_equal(folder, other, step=2):
    one, two = weights(folder, step), weights(other, step)
    assert one.keys() == two.keys() and all(torch.equal(one[n], two[n]) for n in one)


# --- any number of processes ----------------------------------------------------------------------


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """Each script on one process, two steps of eight samples."""
    folder = tmp_path_factory.mktemp("alone")

    class Runs:
        def __truediv__(self, name):
            if not (folder / name).exists():
                run(name, folder / name)
            return folder / name

    return Runs()


SLOW = pytest.mark.slow
EACH = ["twinbrain", *(pytest.param(name, marks=SLOW) for name in ("vita_vla", "dualvla"))]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["twinbrain", "vita_vla", "dualvla"])
def test_two_processes_with_copies_are_one(alone, tmp_path, name):
    run(name, tmp_path / "run", "--batch", "2", "--accumulate", "2", processes=2)
    assert_close(tmp_path / "run", alone / name)


@SLOW
@pytest.mark.parametrize("name", SCRIPTS)
def test_two_processes_with_shards_are_one(alone, tmp_path, name):
    run(name, tmp_path / "run", "--batch", "4", "--shard", "full", processes=2)
    assert_close(tmp_path / "run", alone / name)


@SLOW
def test_four_processes_with_copies_are_one(alone, tmp_path):
    run("twinbrain", tmp_path / "run", "--batch", "2", processes=4)
    assert_close(tmp_path / "run", alone / "twinbrain")


@SLOW
def test_frozen_weights_of_16_bits_train_alike_in_shards(tmp_path):
    words = ["--frozen", "bf16", "--dtype", "bf16"]
    run("twinbrain", tmp_path / "one", *words)
    run("twinbrain", tmp_path / "two", *words, "--batch", "4", "--shard", "full", processes=2)
    one, two = (torch.tensor(metrics(tmp_path / name)) for name in ("one", "two"))
    assert torch.allclose(one, two, rtol=0.05)


@SLOW
def test_a_run_goes_on_with_other_processes_and_shards(alone, tmp_path):
    folder = tmp_path / "run"
    run("twinbrain", folder, "--steps", "1", "--batch", "4", "--shard", "full", processes=2)
    words = ["--resume", str(folder), "--steps", "2", "--replicate-left"]
    run("twinbrain", folder, *words, processes=4)
    assert_close(folder, alone / "twinbrain")
    saved = json.loads((folder / "checkpoints/step_00000002/meta.json").read_text())
    assert (saved["processes"], saved["config"]["batch"]) == (4, 2)
    run("twinbrain", folder, "--resume", str(folder), "--steps", "3", "--shard", "none")
    saved = json.loads((folder / "checkpoints/step_00000003/meta.json").read_text())
    got = saved["config"]["batch"], saved["config"]["accumulate"], saved["processes"]
    assert got == (2, 4, 1)
    three = common.Dist(0, 3, ALONE.device)
    resumed = common.load_checkpoint(folder, "twinbrain", dist=three)
    cfg = common.resume_config(twinbrain.Config(), resumed.meta["config"])
    with pytest.raises(common.UserError, match="8 samples a step do not divide among 3 processes"):
        common.same_samples(cfg, resumed, three)


@SLOW
def test_a_left_brain_that_trains_is_sharded_whatever_the_flag_says(tmp_path):
    words = ["--brain", "nofreeze", "--steps", "1"]
    run("twinbrain", tmp_path / "one", *words)
    words += ["--batch", "4", "--shard", "full", "--replicate-left"]
    run("twinbrain", tmp_path / "two", *words, processes=2)
    assert_close(tmp_path / "two", tmp_path / "one", step=1)


@SLOW
def test_sharded_models_are_whole_for_questions_and_at_the_end(tmp_path):
    words = ["--steps", "1", "--qa-every", "1", "--batch", "4", "--shard", "full"]
    run("twinbrain", tmp_path / "run", *words, processes=2)
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    found = [json.loads(line).get("abilities") for line in lines]
    assert found[0]["right"].keys() == found[2]["left"].keys() and found[1] is None


@pytest.mark.slow
def test_stage_1_takes_its_teachers_decoder_when_it_is_sharded(tmp_path):
    teacher, words = tmp_path / "teacher", [*TINY, *OWN["vita_vla"], "--stage"]
    cfg = common.parse(vita_vla.Config, {}, {}, [*words, "teacher"])
    robots = {part.name: part.stats for part in data.recordings(cfg, ALONE)[0]}
    meta = {"method": "vita_vla", "config": asdict(cfg), "robots": robots}
    tensors = vita_vla.build(cfg)[0].state_dict()
    common.save_checkpoint(teacher / "checkpoints", 1, tensors, {}, {}, meta, ALONE)
    words = ["--stage", "align", "--teacher", str(teacher), "--shard", "full"]
    run("vita_vla", tmp_path / "run", *words, "--steps", "1", processes=2)
    got, given = weights(tmp_path / "run", 1), weights(teacher, 1)
    assert all(torch.equal(got[n], given[n]) for n in given if n.startswith(seer.DECODER))


@pytest.fixture
def group():
    """A process group of this process alone."""
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0,
                                         world_size=1)  # fmt: skip
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("flags", [{}, {"lora": 4}], ids=str)
def test_frozen_weights_of_16_bits_are_sharded_beside_what_trains(episodes, group, flags):
    flags = flags | dict(frozen="bf16", dtype="bf16", optimizer="adamw", shard="full")
    got = []
    for sharded in (False, True):
        case = test_twinbrain.Case(episodes, **flags)
        common.store_frozen(case.model, case.cfg, ALONE.device)
        if sharded:
            scale.shard(case.model, case.cfg, ALONE, set())
        with common.autocast(ALONE.device, "bf16"):
            losses, grads = case.step([])
        got.append((losses["action"], {n: g for n, g in grads.items() if g is not None}))
    (loss, want), (shared, grads) = got
    assert shared == pytest.approx(loss, rel=0.02) and want.keys() == grads.keys()
    for name, grad in grads.items():
        near = torch.cosine_similarity(grad.full_tensor().flatten(), want[name].flatten(), dim=0)
        assert near > 0.9 or want[name].norm() < 1e-3, name
    kinds = {p.dtype for p in case.model.parameters()}
    assert kinds == {torch.float32, torch.bfloat16}


def test_shards_keep_no_whole_gradients_between_batches(episodes, group):
    case = test_twinbrain.Case(episodes, optimizer="adamw", shard="full")
    scale.shard(case.model, case.cfg, ALONE, set())
    norms = []
    for last in (False, True):
        common.synchronise(case.model, last)
        grads = [g for g in case.step([])[1].values() if g is not None]
        norms.append(torch.stack([g.full_tensor().norm() for g in grads]))
    assert len(norms[0]) > 0  # each process has its share after the first batch already
    assert torch.allclose(2 * norms[0], norms[1], rtol=1e-3)


def save_shards(folder, step):
    mesh = torch.distributed.init_device_mesh("cpu", (1,))
    whole = {"a": step * torch.arange(6.0).view(3, 2), "b": torch.ones(1, dtype=torch.bfloat16)}
    tensors = {n: torch.distributed.tensor.distribute_tensor(t, mesh) for n, t in whole.items()}
    tensors |= {"tied": tensors["a"], "plain": torch.zeros(2)}
    p = torch.nn.Parameter(tensors["a"].clone())
    p.grad, opt = tensors["a"], torch.optim.AdamW([p])
    opt.step()
    state = {"optimizers": [opt.state_dict()]}
    meta = {"method": "m", "config": {}}
    common.save_checkpoint(folder / "checkpoints", step, tensors, state, {}, meta, ALONE)
    return whole


def test_shares_of_a_checkpoint_are_read_whole_or_refused(group, tmp_path):
    whole = save_shards(tmp_path, 1)
    got = common.load_checkpoint(tmp_path, "m", ALONE)
    assert torch.equal(got.tensors["a"], whole["a"]) and torch.equal(got.tensors["b"], whole["b"])
    assert torch.equal(got.tensors["tied"], whole["a"]) and got.tensors["plain"].tolist() == [0, 0]
    assert got.train_state["optimizers"][0]["state"][0]["exp_avg"] is None  # each reads its share
    p = torch.nn.Parameter(torch.zeros(3, 2))
    opt = torch.optim.AdamW([p])
    common.load_optimizers([opt], got)
    assert torch.allclose(opt.state[p]["exp_avg"], 0.1 * whole["a"])  # beta_1 is 0.9
    assert opt.state[p]["step"] == 1
    assert not got.tensors and not got.train_state["optimizers"]  # no second copy while it trains
    (share,) = got.path.glob("shards/*")
    assert not [file for file in got.path.rglob("*") if file.name == ".metadata"]
    with open(got.path / "shards" / ".metadata", "wb") as index:  # a pickle, as the usual index is
        torch.save(Evil(tmp_path / "mark"), index)
    assert torch.equal(common.load_checkpoint(tmp_path, "m", ALONE).tensors["a"], whole["a"])
    assert not (tmp_path / "mark").exists()
    content = share.read_bytes()
    share.write_bytes(content[:-3])
    with pytest.raises(common.UserError, match=f"{share.name} is damaged or cut short"):
        common.load_checkpoint(tmp_path, "m")
    share.unlink()
    with pytest.raises(common.UserError, match=f"the checkpoint lacks .*{share.name}"):
        common.load_checkpoint(tmp_path, "m")


def test_a_share_that_cannot_be_written_leaves_the_checkpoint_before(group, tmp_path, monkeypatch):
    save_shards(tmp_path, 1)

    def full(*args):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(common.UserError) as error:
            save_shards(tmp_path, 2)
    assert "No space left on device; checkpoints before it are intact" in str(error.value)
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step_00000001"]
    assert common.load_checkpoint(tmp_path, "m").step == 1


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full here")
def test_a_full_disk_is_called_so_however_large_the_state():
    for count in (1, 1_000_000):
        with pytest.raises(OSError, match="No space left on device"):
            checkpoints.write_state("/dev/full", {"x": torch.zeros(count), "y": torch.ones(count)})


def test_weights_of_other_shapes_are_one_line(episodes, tmp_path):
    case = test_twinbrain.Case(episodes)
    tensors = {n: t for n, t in case.model.state_dict().items() if n not in case.model.untouched}
    name = next(n for n in tensors if n.startswith("expert."))
    for wrong in ({name: torch.zeros(3, 1)}, {"new.weight": torch.zeros(1)}):
        made = common.Checkpoint(tmp_path, 1, tensors | wrong, {}, {}, {})
        with pytest.raises(common.UserError, match=f"{tmp_path} does not fit tiny: ") as error:
            twinbrain.build(case.cfg, 8, 7, made)
        assert next(iter(wrong)) in str(error.value) and "\n" not in str(error.value)


def test_muon_is_refused_under_shards():
    cfg, two = replace(twinbrain.Config(), optimizer="muon"), common.Dist(0, 2, ALONE.device)
    with pytest.raises(common.UserError, match="--optimizer muon needs whole matrices; take adamw"):
        scale.shard(None, cfg, two, set())


# --- memory ---------------------------------------------------------------------------------------


def gradients(case):
    """Of one step of a `Case` of the scripts' tests."""
    common.seed_all(5)
    case.model.train()
    if isinstance(case.model, dualvla.DualVLA):
        return case.step()[1]
    if isinstance(case.model, twinbrain.TwinBrain):
        return case.step([])[1]
    losses = case.model(case.batch)
    sum(losses.values()).backward()
    return {n: p.grad for n, p in case.model.named_parameters() if p.grad is not None}


CASES = {
    "twin": lambda e: test_twinbrain.Case(e, cotrain=0.1, dropout=0.3),
    "vanilla": lambda e: test_twinbrain.Case(e, brain="vanilla", interval=1, head="pi"),
    "seer": lambda e: test_vita_vla.Case(e, stage="teacher", dropout=0.3),
    "vita": lambda e: test_vita_vla.Case(e),
    "dualvla": lambda e: test_dualvla.Case(e),
}


@pytest.mark.parametrize("name", CASES)
def test_recomputed_blocks_give_the_same_gradients(episodes, name):
    case = CASES[name](episodes)
    blocks, calls = case.model.blocks(), []
    for module in blocks[0].children():
        module.register_forward_hook(lambda *_: calls.append(1))

    want, once = gradients(case), len(calls)
    case.model.zero_grad(set_to_none=True)
    cfg, gates = replace(case.cfg, grad_checkpoint=True), getattr(case.model, "gates", None)
    for block in blocks:
        scale.enclose(block, cfg, gates)
    got, twice = gradients(case), len(calls) - once
    assert want.keys() == got.keys() and twice > once > 0
    assert all(torch.equal(want[n], got[n]) for n in want if want[n] is not None)
    assert any(grad is not None and grad.abs().max() > 0 for grad in want.values())


@SLOW
def test_compiled_blocks_give_the_same_gradients(episodes, monkeypatch):
    case = test_twinbrain.Case(episodes)
    want, compiled = gradients(case), torch.compile
    monkeypatch.setattr(torch, "compile", lambda f: compiled(f, backend="aot_eager"))
    case.model.zero_grad(set_to_none=True)
    for block in case.model.expert.blocks:
        scale.enclose(block, replace(case.cfg, compile=True, grad_checkpoint=True))
    got = gradients(case)
    assert all(torch.allclose(want[n], got[n], atol=1e-6) for n in want if want[n] is not None)


@SLOW
@pytest.mark.skipif("isolate_recompiles" not in inspect.signature(torch.compile).parameters,
                    reason="an older torch keeps eight versions for all blocks")  # fmt: skip
def test_every_layer_is_compiled_however_many_there_are(episodes, monkeypatch):
    case, compiled = test_twinbrain.Case(episodes), torch.compile

    def light(f, isolate_recompiles=False):
        return compiled(f, backend="aot_eager", isolate_recompiles=isolate_recompiles)

    monkeypatch.setattr(torch, "compile", light)
    layers = case.model.right.model.language_model.layers
    for block in layers:
        scale.enclose(block, replace(case.cfg, compile=True))
    torch._dynamo.reset()
    counters.clear()
    with torch._dynamo.config.patch(recompile_limit=2), torch.no_grad():
        case.model(case.batch, case.noise)
    assert counters["stats"]["unique_graphs"] == len(layers)


def test_lora_joins_16_bits_without_rounding_away():
    torch.manual_seed(0)
    base = torch.nn.Linear(64, 64, bias=False).requires_grad_(False).bfloat16()
    layers, before = torch.nn.ModuleList([base]), base.weight.float()
    scale.add_lora(layers, 4)
    layers[0].up.data.normal_(std=1e-4)
    change = 2.0 * layers[0].up @ layers[0].down
    common.merge_lora(layers)
    assert torch.allclose(layers[0].weight.data - before, change, atol=1e-3 * change.max().item())


def test_processes_drop_out_each_its_own(episodes):
    drawn = []
    for rank in (0, 0, 1, 2):
        case = test_twinbrain.Case(episodes, brain="vanilla", optimizer="adamw")
        common.seed_all(5)
        common.place(case.model, case.cfg, replace(ALONE, rank=rank), lambda text: None)
        drawn.append(torch.rand(1).item())
    assert drawn[0] == drawn[1] and len({*drawn}) == 3


def test_lora_starts_as_the_backbone_and_shares_it_with_the_left_brain(episodes):
    plain, case = (test_twinbrain.Case(episodes, lora=rank, state=False) for rank in (0, 4))
    model = case.model
    assert torch.equal(plain.h_R(), case.h_R())
    train = {n for n, p in model.named_parameters() if p.requires_grad}
    assert {n for n in train if n.startswith("right.")} == {
        n for n in model.state_dict() if n.endswith((".down", ".up"))
    }
    left = model.left.model.language_model.layers[0].mlp.up_proj
    right = model.right.model.language_model.layers[0].mlp.up_proj
    assert left.weight is right.base.weight
    want = left.weight.clone()
    opts = twinbrain.make_optimizers(model, case.cfg)
    grads = [case.step(opts)[1] for _ in range(2)][1]
    assert all(grads[n].abs().max() > 0 for n in train if n.endswith((".down", ".up")))
    assert torch.equal(left.weight, want) and not torch.equal(plain.h_R(), case.h_R())
    saved = {n for n in model.state_dict() if n not in model.untouched}
    assert train == saved and len(plain.model.untouched) > 0


@SLOW
def test_a_run_with_lora_resumes(tmp_path):
    for name in ("twinbrain", "vita_vla"):
        folder = tmp_path / name
        words = ["--batch", "2", "--lora", "2", "--frozen", "bf16"]
        run(name, folder, *words)
        run(name, tmp_path / f"{name}2", *words, "--steps", "1")
        run(name, tmp_path / f"{name}2", "--resume", str(tmp_path / f"{name}2"), "--steps", "2")
        ours = weights(folder)
        assert any(n.endswith(".up") for n in ours) and not any("base" in n for n in ours)


def test_what_cannot_fit_is_refused_with_flags_that_help(episodes, monkeypatch):
    case, said = test_twinbrain.Case(episodes, optimizer="muon"), []
    monkeypatch.setattr(scale, "device_memory", lambda device: 20e6)
    with pytest.raises(common.UserError) as error:
        common.place(case.model, case.cfg, ALONE, said.append)
    assert "do not fit in this machine's 20.00 MB" in str(error.value)
    for flag in ("--grad-checkpoint", "--frozen bf16", "--lora 32", "--shard full"):
        assert flag in str(error.value)
    assert [line.split()[0] for line in said] == ["memory", "left", "right", "phi", "expert"]
    right = common.param_counts(case.model.right)["total"]
    assert said[2].split()[1] == said[2].split()[3] == f"{4 * right / 1e6:.2f}"
    rows = common.memory_rows(case.model, replace(case.cfg, optimizer="adamw8bit"), split=2)
    assert rows["right"] == [2 * right, 2 * right, right] and rows["left"][1:] == [0, 0]


def test_four_billion_weights_with_lora_leave_half_of_24_gb_to_activations():
    sizes = dict(hidden_size=2560, num_hidden_layers=36, num_attention_heads=32, head_dim=128,
                 num_key_value_heads=8, intermediate_size=9728, vocab_size=151936)  # fmt: skip
    eyes = dict(depth=24, hidden_size=1024, intermediate_size=4096, out_hidden_size=2560)
    flags = dict(lora=32, frozen="bf16", dtype="bf16", shard="none")  # as prepare() has it alone
    cfg = replace(twinbrain.Config(), **twinbrain.PAPER | flags)
    _, processor = common.load_backbone("tiny")
    with torch.device("meta"):
        shape = Qwen3VLConfig(text_config=sizes, vision_config=eyes, tie_word_embeddings=True)
        vlm = Qwen3VLForConditionalGeneration(shape)
        model = twinbrain.TwinBrain(cfg, vlm, processor, 8, 7)
    common.store_frozen(model, cfg, ALONE.device)
    parts = common.memory_rows(model, cfg)
    assert 8e9 < parts["left"][0] < 9.5e9 and sum(map(sum, parts.values())) < 13e9


EIGHT = common.Dist(0, 8, torch.device("cpu"))


def foreseen(cfg, dist, *models):
    """Whether such a run may begin, or what it says instead."""
    try:
        return common.foresee(cfg, dist, *models)
    except common.UserError as error:
        return str(error)


def test_the_papers_command_fits_eight_gpus_of_80_gb_but_not_one(monkeypatch):
    """`--preset paper` by itself, on GPUs that multiply bfloat16."""
    cfg = replace(twinbrain.Config(), **twinbrain.PAPER, dtype="bf16")
    make = lambda: twinbrain.build(cfg, 8, 7)[0]  # noqa: E731
    monkeypatch.setattr(scale, "device_memory", lambda device: 80e9)
    monkeypatch.setattr(scale, "machine_memory", lambda now=False: 100e9)
    asked = []
    monkeypatch.setattr(backbones, "cached_file", lambda *what: asked.append(what))
    eight = replace(EIGHT)
    eight.gather = lambda item: [item]
    assert foreseen(cfg, eight, make) is None
    assert asked == [("Qwen/Qwen3-VL-4B-Instruct", "config.json")]  # before demonstrations are made
    assert "do not fit in this machine's 80.00 GB" in foreseen(cfg, ALONE, make)
    assert "--shard full on more GPUs" in foreseen(cfg, ALONE, make)
    monkeypatch.setattr(scale, "machine_memory", lambda now=False: 40e9 if now else 100e9)
    assert foreseen(cfg, eight, make) is None
    monkeypatch.setattr(scale, "machine_memory", lambda now=False: 20e9 if now else 100e9)
    said = foreseen(cfg, eight, make)
    assert said.startswith("27.2") and "weights, which each process loads first" in said
    assert "do not fit in this machine's free 20.00 GB; what helps: a smaller" in said
    assert foreseen(cfg, eight, make, make).startswith("45.")  # beside a teacher
    assert common.foresee(replace(cfg, backbone="tiny"), ALONE, None) is None


@pytest.mark.parametrize("name, words", [
    ("twinbrain", []), ("twinbrain", ["--brain", "vanilla"]), ("vita_vla", ["--stage", "teacher"]),
    *(pytest.param(name, [], marks=pytest.mark.slow) for name in ("vita_vla", "dualvla")),
])  # fmt: skip
def test_a_backbone_too_large_is_refused_before_anything_is_read(
    name, words, monkeypatch, status, tmp_path
):
    for script in SCRIPTS.values():
        monkeypatch.setattr(script.data, "recordings", None)
    monkeypatch.setattr(scale, "machine_memory", lambda now=False: 16e9)
    words = [*words, "--backbone", "Qwen3-VL-8B", "--device", "cpu", "--out", str(tmp_path / "run")]
    words += ["--frozen", "fp32"]
    code, _, err = status(SCRIPTS[name].main, *words)
    assert code == 2 and err.count("\n") == 1 and "do not fit in this machine's 16.00 GB" in err
    assert "--frozen bf16" in err and "--shard full on more GPUs" in err


def test_a_container_and_its_processes_share_a_machines_memory(monkeypatch, tmp_path):
    whole, free = scale.machine_memory(), scale.machine_memory(now=True)
    assert 0 < free <= whole
    (tmp_path / "meminfo").write_text("MemTotal:  9 kB\nMemAvailable:    2000000 kB\n")
    monkeypatch.setattr(scale, "MEMORY", tmp_path / "meminfo")
    monkeypatch.setattr(scale, "LIMITS", [tmp_path / "memory.max"])
    assert scale.machine_memory(now=True) == 2000000 * 1024
    (tmp_path / "memory.max").write_text("max\n")
    assert scale.machine_memory(now=True) == 2000000 * 1024
    (tmp_path / "memory.max").write_text("1000000\n")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert scale.machine_memory(now=True) == scale.machine_memory() == 250000
    assert scale.device_memory(ALONE.device) == 250000


def test_frozen_weights_are_halved_where_products_are_bfloat16(episodes):
    case = test_twinbrain.Case(episodes, frozen="bf16", dtype="bf16")
    before = common.memory_rows(case.model, case.cfg)
    common.place(case.model, case.cfg, ALONE, lambda text: None)
    after = common.memory_rows(case.model, case.cfg)
    assert after["left"][0] * 2 == before["left"][0] and after["right"] == before["right"]
    with common.autocast(ALONE.device, "bf16"):
        losses, _ = case.step(twinbrain.make_optimizers(case.model, case.cfg))
    assert 0 < losses["action"] < 10
    other = test_twinbrain.Case(episodes, frozen="bf16", dtype="fp32")
    common.store_frozen(other.model, other.cfg, ALONE.device)
    assert {p.dtype for p in other.model.parameters()} == {torch.float32}


@pytest.mark.parametrize("name, flags", [
    ("twinbrain", {}), ("twinbrain", {"lora": 4}), ("twinbrain", {"brain": "nofreeze"}),
    ("vita_vla", {"stage": "finetune"}), ("vita_vla", {"stage": "align", "lora": 4}),
    ("dualvla", {"stage": "generalist"}),
], ids=str)  # fmt: skip
def test_weights_loaded_as_stored_are_those_that_float32_would_give(name, flags, monkeypatch):
    """Nothing of 16 bits is ever twice as large in memory, and what trains is float32."""
    script = SCRIPTS[name]
    cfg = replace(script.Config(), frozen="bf16", dtype="bf16", width=32, heads=2, **flags)
    loaders = {n: getattr(common, n) for n in ("load_backbone", "load_vlm")}
    dims, built = () if name == "vita_vla" else (8, 7), []
    for how in ("bf16", "fp32"):
        for loader, load in loaders.items():
            monkeypatch.setattr(common, loader, lambda *words, load=load, how=how: load(
                *words[:-1], how))  # fmt: skip
        model = script.build(cfg, *dims)[0]
        assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
        kinds = {p.dtype for p in model.parameters() if not p.requires_grad}
        assert (torch.bfloat16 in kinds) == (how == "bf16" and "brain" not in flags)
        common.store_frozen(model, cfg, ALONE.device)
        built.append(model.state_dict())
    assert built[0].keys() == built[1].keys()
    for key, ours in built[0].items():
        assert ours.dtype == built[1][key].dtype, key
        rounded = "action_token" in key or ("embed_tokens" in key and name == "dualvla")
        torch.testing.assert_close(ours, built[1][key], rtol=0, atol=0.01 if rounded else 0)


def test_eight_bit_adam_or_how_to_get_it(monkeypatch, tmp_path):
    p = torch.nn.Parameter(torch.ones(64, 64))
    cfg = replace(twinbrain.Config(), optimizer="adamw8bit")
    groups = [{"params": [p], "lr": 0.1, "peak": 0.1}]
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "torchao", None)
        patch.setitem(sys.modules, "torchao.optim", None)
        with pytest.raises(common.UserError, match=r"pip install 'onefile-vla\[scale\]'"):
            scale.adamw(groups, cfg)
    pytest.importorskip("torchao")
    opt = scale.adamw(groups, cfg)
    for _ in range(2):
        opt.param_groups[0]["lr"] = 0.1
        p.grad = torch.ones_like(p)
        opt.step()
    assert torch.allclose(p, torch.full_like(p, 0.8), atol=1e-3)
    checkpoints.write_state(tmp_path / "train.pt", opt.state_dict())
    saved = torch.load(tmp_path / "train.pt", weights_only=True)
    other = torch.nn.Parameter(p.detach().clone())
    again = scale.adamw([{"params": [other], "lr": 0.1, "peak": 0.1}], cfg)
    resumed = common.Checkpoint(tmp_path, 2, {}, {}, {"optimizers": [saved]}, {})
    common.load_optimizers([again], resumed)
    assert "8bit" in type(again.state[other]["exp_avg"]).__name__
    for each, q in ((opt, p), (again, other)):
        each.param_groups[0]["lr"] = 0.1
        q.grad = torch.full_like(q, 0.3)
        each.step()
    assert torch.equal(p, other)


# --- nothing lost ---------------------------------------------------------------------------------


def save(run_folder, step):
    tensors = {"weight": torch.full((100,), float(step))}
    state, meta = {"optimizers": [{"at": step}]}, {"method": "m", "config": {}}
    return common.save_checkpoint(
        run_folder / "checkpoints", step, tensors, state, {"at": step}, meta, ALONE
    )


def killed_at(moment, act):
    """Does act() in a child that is killed at its moment-th call to the file system -> whether."""
    child = os.fork()
    if child == 0:
        calls = []

        def count(event, arguments):
            if event.startswith(("open", "os.", "shutil.")) and event != "os.kill":
                calls.append(event)
                if len(calls) > moment:
                    os.kill(os.getpid(), signal.SIGKILL)

        try:
            sys.addaudithook(count)
            act()
        finally:
            os._exit(0)
    return os.WIFSIGNALED(os.waitpid(child, 0)[1])


@pytest.mark.parametrize("steps, next_step", [
    ((1, 2), 3), pytest.param((2, 3), 3, marks=SLOW), pytest.param((2, 5), 3, marks=SLOW),
])  # fmt: skip
def test_killed_at_any_moment_of_saving_a_checkpoint_is_whole(tmp_path, steps, next_step):
    moment, killed = 0, True
    while killed:
        folder = tmp_path / str(moment)
        for step in steps:  # (2, 5): a run that went on from 2 and had been further before
            save(folder, step)
        killed = killed_at(moment, lambda folder=folder: save(folder, next_step))
        got = common.load_checkpoint(folder, "m", dist=ALONE)
        assert got.step in (*steps, next_step) and (killed or got.step == next_step)
        assert set(got.tensors["weight"].tolist()) == {float(got.step)}
        assert got.train_state["optimizers"][0]["at"] == got.local_state["at"] == got.step
        save(folder, 9)
        names = [path.name for path in (folder / "checkpoints").iterdir()]
        assert common.load_checkpoint(folder, "m", dist=ALONE).step == 9
        assert not [name for name in names if name.startswith("gone_")]
        moment += 1
    assert moment > 20


def first_kill(script):
    """The last process is killed in the middle of its second step, the first time."""
    if os.environ["RANK"] == str(int(os.environ["WORLD_SIZE"]) - 1):
        total_loss, calls = script.total_loss, []

        def loss(*args):
            calls.append(1)
            if len(calls) == 2 and not os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") > "0":
                os.kill(os.getpid(), signal.SIGKILL)
            return total_loss(*args)

        script.total_loss = loss


@SLOW
def test_a_process_killed_in_mid_step_loses_no_step(alone, tmp_path):
    folder = tmp_path / "run"
    words = ["--batch", "4", "--resume", "auto"]
    made = start("twinbrain", folder, *words, processes=2, spoil=first_kill)
    made[1].join(120)
    made[0].join(30)  # hears that its neighbour is gone; torchrun would end it
    assert made[1].exitcode == -signal.SIGKILL and made[0].exitcode not in (0, None)
    assert common.load_checkpoint(folder, "twinbrain").step == 1
    run("twinbrain", folder, *words, processes=2, env={"TORCHELASTIC_RESTART_COUNT": "1"})
    assert_close(folder, alone / "twinbrain")


def test_resume_auto_starts_goes_on_and_starts_anew(tmp_path):
    out = tmp_path / "run"
    cfg = replace(twinbrain.Config(), resume="auto", out=str(out))
    assert common.resume_auto(cfg, ALONE).resume == ""
    out.mkdir()
    (out / "metrics.jsonl").write_text("{}\n")  # stopped before its first checkpoint
    assert common.resume_auto(replace(cfg, resume="auto"), ALONE).resume == ""
    assert not (out / "metrics.jsonl").exists()
    save(out, 1)
    assert common.resume_auto(replace(cfg, resume="auto"), ALONE).resume == str(out)
    assert common.resume_auto(replace(cfg, resume=""), ALONE).resume == ""
    with pytest.raises(common.UserError, match="--resume auto needs --out RUN"):
        common.resume_auto(replace(cfg, resume="auto", out=""), ALONE)


def test_a_node_that_begins_again_because_another_failed_goes_on_too(tmp_path):
    """It counts no restart of its own, but whether to go on is asked of all at once."""
    save(tmp_path, 1)
    others = replace(ALONE)
    others.any = lambda mine: True
    cfg = replace(twinbrain.Config(), out=str(tmp_path))
    assert common.resume_auto(cfg, others).resume == str(tmp_path)


def test_the_command_that_began_a_run_goes_on_with_it_on_other_machines():
    def started(words, processes, meta):
        cfg = common.parse(dualvla.Config, {}, {}, words)
        dist, resumed = common.Dist(0, processes, ALONE.device), SimpleNamespace(meta=meta)
        cfg = runs.resume(cfg, resumed, dist, dualvla.FREE) if meta else cfg
        meta = runs.about("dualvla", cfg, {}, resumed if meta else None)
        return meta | {"processes": processes}

    words = ["--batch", "16", "--accumulate", "2", "--mix", "2"]
    meta = started(words, 8, {})
    for processes, want in ((4, (16, 4)), (16, (16, 1)), (32, (8, 1)), (8, (8, 4))):
        meta = started(words, processes, meta)
        assert (meta["config"]["batch"], meta["config"]["accumulate"]) == want
    with pytest.raises(common.UserError, match="--batch 8 differs from 16 in the run"):
        started(["--batch", "8"], 8, meta)
    with pytest.raises(common.UserError, match="1 samples on each of 256 .* fewer than --mix 2"):
        started(words, 256, meta)


def test_restarts_that_would_start_anew_are_refused(monkeypatch):
    cfg = replace(twinbrain.Config())
    monkeypatch.setenv("TORCHELASTIC_MAX_RESTARTS", "0")  # torchrun's default
    assert common.resume_auto(cfg, ALONE) is cfg
    monkeypatch.setenv("TORCHELASTIC_MAX_RESTARTS", "3")
    with pytest.raises(common.UserError, match="--max-restarts 3 .* add --out DIR"):
        common.resume_auto(cfg, ALONE)
    for flags in ({"out": "x"}, {"resume": "x"}, {"eval_only": "x"}):
        assert common.resume_auto(replace(cfg, **flags), ALONE).resume == flags.get("resume", "")


def test_a_loss_that_is_not_finite_stops_and_keeps_the_batch(tmp_path, status, monkeypatch):
    folder, total_loss, calls = tmp_path / "run", twinbrain.total_loss, []

    def loss(*args):  # the second is none
        calls.append(1)
        return total_loss(*args) * (float("nan") if len(calls) == 2 else 1.0)

    monkeypatch.setattr(twinbrain, "total_loss", loss)
    words = [*TINY, *OWN["twinbrain"], "--batch", "2", "--out", str(folder)]
    code, _, line = status(twinbrain.main, *words)
    file = folder / "nan_step_2_rank0.pt"
    assert code == 2 and "not finite at step 2" in line and str(file) in line
    (batch,) = torch.load(file, weights_only=True)
    assert batch["action"].shape == (2, 8, 7)
    assert common.load_checkpoint(folder, "twinbrain", dist=ALONE).step == 1


@pytest.mark.gpu
def test_the_norm_is_asked_for_without_waiting_for_the_whole_gpu():
    weight = torch.nn.Parameter(torch.ones(4, device="cuda"))
    weight.grad = torch.ones_like(weight)
    torch.cuda.set_sync_debug_mode("error")
    try:
        norm_before = common.clip([weight], 1e9)
        torch.cuda._sleep(500_000_000)  # stands for the optimizer's step
        assert norm_before() == 2 and not torch.cuda.current_stream().query()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_weights_that_overflow_stop_the_run_before_a_pass_over_them(tmp_path, status):
    """Nothing is logged or saved before step 3, whose pass the library would not survive."""
    rates = ["--lr", "1e30", "--lr-head", "1e30", "--clip", "1e30", "--warmup", "0"]
    words = ["--batch", "2", "--steps", "6", "--save-every", "6", "--log-every", "6", *rates]
    words = [*TINY, *OWN["twinbrain"], *words, "--out", str(tmp_path / "run")]
    code, _, err = status(twinbrain.main, *words)
    assert code == 2 and "error: the loss or its gradient is not finite at step 2" in err
    assert "Traceback" not in err and (tmp_path / "run" / "nan_step_2_rank0.pt").exists()


class Broken:
    """Recordings that vanish, or whose loader process is killed, at the second batch."""

    def __init__(self, how):
        self.how = how

    def __getitem__(self, i):
        if i and self.how == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        return open("/nowhere/recording") if i else torch.ones(1)


@pytest.mark.parametrize("how, workers, says", [
    ("vanished", 0, "cannot read the training data: [Errno 2] No such file or directory: '/no"),
    ("vanished", 1, "cannot read the training data: FileNotFoundError: [Errno 2] No such file"),
    ("killed", 1, "a loader process was killed; go on with --resume"),
])  # fmt: skip
def test_data_that_fails_ends_in_one_line(status, how, workers, says):
    code, _, err = status(lambda: list(common.feed(Broken(how), range(2), workers)))
    (line,) = [line for line in err.splitlines() if line.startswith("error")]
    assert code == 2 and line.startswith("error: " + says) and "Traceback" not in err


def test_a_loaders_process_outlives_the_sigterm_that_torchrun_sends_to_all():
    class Pids:
        def __getitem__(self, i):
            return os.getpid()

    stop = common.Stop()
    try:
        batches = common.feed(Pids(), range(9), 1)
        worker = next(batches)
        os.kill(worker, signal.SIGTERM)
        assert list(batches) == [worker] * 8 and worker != os.getpid()
    finally:
        stop.restore()


@pytest.mark.skipif(sys.platform != "linux", reason="forking is safe on Linux alone")
def test_workers_share_the_recordings_whatever_python_starts_processes_by():
    class Here:  # not to be pickled
        def __getitem__(self, i):
            return i

    before = multiprocessing.get_start_method()
    multiprocessing.set_start_method("forkserver", force=True)  # Python 3.14's own choice
    try:
        assert list(common.feed(Here(), range(3), 1)) == [0, 1, 2]
    finally:
        multiprocessing.set_start_method(before, force=True)


def test_a_read_only_folder_ends_in_one_line(status, monkeypatch, tmp_path):
    def mkdir(path, *args, **words):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(path))

    monkeypatch.setattr(Path, "mkdir", mkdir)
    code, _, err = status(twinbrain.main, *TINY, "--out", str(tmp_path / "run"))
    assert (code, err) == (2, f"error: Read-only file system: {tmp_path / 'run'}\n")


class Evil:
    """Writes a file when a pickle of it is executed."""

    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return open, (str(self.mark), "w")


EVIL = [  # the command that reads a file, the file that is planted
    ("twinbrain --resume {run}", "train.pt"),
    ("vita_vla --resume {run}", "rank0.pt"),
    ("twinbrain --eval-only {run}", "model.safetensors"),
    ("vita_vla --eval-only {run}", "meta.json"),
    ("vita_vla --resume {run}", "chain.json"),
    ("dualvla --resume {run}", "chain.json"),
    ("twinbrain --eval-only {run}", "shards/share.safetensors"),
    ("twinbrain --brain vanilla --distill {run}", "model.safetensors"),
    ("dualvla --expert {run}", "model.safetensors"),
    ("dualvla --generalist {run}", "model.safetensors"),
    ("vita_vla --stage finetune --student {run}", "model.safetensors"),
    ("vita_vla --stage align --teacher {run}", "model.safetensors"),
    ("twinbrain --export {run}", "model.safetensors"),
    ("vita_vla --export {run}", "model.safetensors"),
    ("dualvla --export {run}", "model.safetensors"),
    ("serve --checkpoint {run}", "model.safetensors"),
    ("serve --checkpoint {run}", "config.json"),
    ("twinbrain --backbone {folder}", "pytorch_model.bin"),
    ("twinbrain --backbone {folder}", "tokenizer.json"),
    ("dualvla --backbone {folder}", "tokenizer_config.json"),
    ("vita_vla --backbone {folder}", "preprocessor_config.json"),
    ("vita_vla --backbone {folder}", "config.json"),
    ("vita_vla --stage align --normalise raw --teacher {file}", "seer.pth"),
    ("vita_vla --stage align --normalise raw --teacher {file}", "seer.pt"),
    ("dualvla --show pruning --event-scores {file}", "scores.pt"),
]


@pytest.mark.parametrize("command, name", EVIL)
def test_no_pickle_of_a_users_is_executed(command, name, tmp_path, status):
    folder, mark = tmp_path / "planted", tmp_path / "mark"
    method, *words = command.split()
    checkpoint = save(folder, 1)
    settings = {"stage": "expert"} if "--expert" in words else {}
    facts = {"method": "twinbrain" if method == "serve" else method, "config": settings}
    facts |= {"shards": ["share.safetensors"]} if name.startswith("shards") else {}
    meta = json.loads((checkpoint / "meta.json").read_text()) | facts
    (checkpoint / "meta.json").write_text(json.dumps(meta))
    for file in Path(common.BACKBONES["tiny"]).glob("*"):
        if file.suffix == ".json" or name != "pytorch_model.bin":
            shutil.copy(file, folder)
    if method == "serve":
        (folder / "config.json").write_text(json.dumps(facts))
    file = (checkpoint if (checkpoint / Path(name).parts[0]).exists() else folder) / name
    if name.startswith("shards"):
        file = checkpoint / name
        file.parent.mkdir()
        save_file({"model.x": torch.zeros(2)}, file.with_name("share.safetensors"))
    torch.save({"model_state_dict": Evil(mark)}, file)
    words = [word.format(run=folder, folder=folder, file=file) for word in words]
    if method != "serve":
        words = [*TINY, *words, "--out", str(tmp_path / "run")]
        words += ["--questions", "2"] if method != "vita_vla" else []
    script = serve if method == "serve" else SCRIPTS[method]
    code, _, err = status(script.main, *words)
    assert code == 2 and not mark.exists(), err
    assert err.count("\n") == 1 and (file.name in err or "cannot load" in err), err  # it was read
    torch.load(open(file, "rb"), weights_only=False)
    assert mark.exists()  # it does bite where pickles are executed


# --- slow: whole runs, killed and restarted -------------------------------------------------------


@SLOW
def test_killed_at_twenty_random_moments_the_weights_are_the_same(tmp_path):
    words = ["--batch", "2", "--steps", "6", "--dropout", "0.2", "--resume", "auto"]
    run("twinbrain", tmp_path / "first", *words)  # starts the server of processes
    began = time.time()
    run("twinbrain", tmp_path / "whole", *words)
    length, rng = time.time() - began, random.Random(0)
    assert_equal(tmp_path / "first", tmp_path / "whole", step=6)
    kills, finished, folder = 0, 0, tmp_path / "killed0"
    while kills < 20:
        (process,) = start("twinbrain", folder, *words)
        process.join(length * rng.uniform(0.2, 1.0))
        if process.exitcode is None:
            process.kill()
            kills += 1
        process.join()
        if process.exitcode == 0:
            assert_equal(folder, tmp_path / "whole", step=6)
            finished += 1
            folder = tmp_path / f"killed{finished}"
    run("twinbrain", folder, *words)
    assert_equal(folder, tmp_path / "whole", step=6)


@SLOW
def test_a_chain_killed_at_ten_random_moments_ends_in_the_same_weights(tmp_path):
    words = ["--stage", "chain", "--teacher", "train", "--steps", "3", "--dropout", "0.2",
             "--batch", "2", "--resume", "auto"]  # fmt: skip
    chain = {"env": {"CHAIN": "1"}}
    run("vita_vla", tmp_path / "first", *words, **chain)  # starts the server of processes
    began = time.time()
    run("vita_vla", tmp_path / "whole", *words, **chain)
    length, rng = time.time() - began, random.Random(0)
    kills, at, folders = 0, set(), [tmp_path / "killed0"]
    while kills < 10:
        (process,) = start("vita_vla", folders[-1], *words, **chain)
        process.join(length * rng.uniform(0.2, 0.8))
        if process.exitcode is None:
            process.kill()
            kills += 1
            at.add(len(list(folders[-1].glob("*/result.json"))))
        process.join()
        if process.exitcode == 0:
            folders.append(tmp_path / f"killed{len(folders)}")
    run("vita_vla", folders[-1], *words, **chain)
    assert len(at) > 1, "killed in more than one stage"
    for folder, name in itertools.product(folders, ("teacher", "align", "finetune")):
        assert_equal(folder / name, tmp_path / "whole" / name, step=3)


@SLOW
def test_killed_at_any_moment_of_saving_shares_a_checkpoint_is_whole(tmp_path):
    def shares(folder, step):
        store = torch.distributed.HashStore()
        torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
        save_shards(folder, step)

    def in_a_child(folder, step, moment=10**6):
        return killed_at(moment, lambda: shares(folder, step))

    moment, killed, kept = 0, True, set()
    while killed:
        folder = tmp_path / str(moment)
        assert not in_a_child(folder, 1)
        killed = in_a_child(folder, 2, moment)
        got = common.load_checkpoint(folder, "m", dist=ALONE)
        assert got.step in (1, 2) and (killed or got.step == 2)
        whole = got.step * torch.arange(6.0).view(3, 2)
        assert torch.equal(got.tensors["a"], whole)
        p = torch.nn.Parameter(torch.zeros(3, 2))
        opt = torch.optim.AdamW([p])
        kept.add(got.step)
        common.load_optimizers([opt], got)
        assert torch.allclose(opt.state[p]["exp_avg"], 0.1 * whole)
        assert not in_a_child(folder, 9)
        assert common.load_checkpoint(folder, "m", dist=ALONE).step == 9
        moment += 1
    assert moment > 20 and kept == {1, 2}


TORCHRUN = """
import os, signal, sys
import test_scale, twinbrain
name = os.environ["SPOIL"]
if name:
    getattr(test_scale, name)(twinbrain)
train = twinbrain.train
def only_train(*args):
    train(*args)
    os._exit(0)
twinbrain.train = only_train
import common
common.run_main(lambda: twinbrain.main(sys.argv[1:]))
"""


def torchrun(tmp_path, folder, spoil, *words):
    (tmp_path / "script.py").write_text(TORCHRUN)
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    paths = os.pathsep.join([str(Path(__file__).parent), str(Path(twinbrain.__file__).parent)])
    env = os.environ | {"SPOIL": spoil, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
    words = [*TINY, *OWN["twinbrain"], "--batch", "4", "--out", str(folder), *words]
    script = ["--max-restarts=1", str(tmp_path / "script.py")]
    return subprocess.Popen(
        [*launch, *script, *words], env=env, text=True, stdout=-1, stderr=subprocess.STDOUT
    )


@SLOW
def test_torchrun_restarts_a_killed_process_and_the_run_goes_on(alone, tmp_path):
    folder = tmp_path / "run"
    process = torchrun(tmp_path, folder, "first_kill")
    log = process.communicate(timeout=400)[0]
    assert process.returncode == 0, log[-3000:]
    assert_close(folder, alone / "twinbrain")


def slow_steps(script):
    total_loss = script.total_loss

    def loss(*args):
        time.sleep(3)
        return total_loss(*args)

    script.total_loss = loss


@SLOW
def test_after_sigterm_the_same_command_goes_on(alone, tmp_path):
    folder = tmp_path / "run"
    words = ["--resume", "auto", "--workers", "1"]  # torchrun's signal reaches the loader as well
    process = torchrun(tmp_path, folder, "slow_steps", *words)
    for line in process.stdout:
        if "memory of a process" in line:
            break
    time.sleep(2)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=200)
    assert process.returncode != 0
    assert common.load_checkpoint(folder, "twinbrain").step == 1
    process = torchrun(tmp_path, folder, "", "--resume", "auto")
    log = process.communicate(timeout=400)[0]
    assert process.returncode == 0, log[-3000:]
    assert_close(folder, alone / "twinbrain")
