"""Training at any size: on one process, two and four the same; stopped anywhere, nothing lost."""

import json
import multiprocessing
import os
import signal
import socket
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import common
import dualvla
import scale
import twinbrain
import vita_vla

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

    script.train = only_train
    if spoil:
        spoil(script)
    common.run_main(lambda: script.main(words))


def start(name, folder, *words, processes=1, spoil=None, env=()):
    """Starts a run in `folder` -> its processes."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    words = [*TINY, *OWN[name], *words] if "--resume" not in words else list(words)
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
    (file,) = Path(folder).glob(f"**/step_{step:08d}/model.safetensors")
    return load_file(file)


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


@pytest.mark.parametrize("name", EACH)
def test_two_processes_with_copies_or_shards_are_one(alone, tmp_path, name):
    run(name, tmp_path / "ddp", "--batch", "2", "--accumulate", "2", processes=2)
    assert_close(tmp_path / "ddp", alone / name)
    run(name, tmp_path / "fsdp", "--batch", "4", "--shard", "full", processes=2)
    assert_close(tmp_path / "fsdp", alone / name)
