"""Fixtures that the tests of the method scripts share."""

import copy
import os
import sys
from functools import cache

os.environ.setdefault("OMP_NUM_THREADS", "1")  # tests are tiny: threads would wait for each other

import pytest  # noqa: E402
import torch  # noqa: E402

import common  # noqa: E402
import data  # noqa: E402
from parts import backbones  # noqa: E402
from worlds import loop, score  # noqa: E402


@pytest.fixture(scope="session", autouse=True)
def demonstrations(tmp_path_factory):
    """Demonstrations made here go into a folder of their own, for child processes too."""
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("demonstrations")
        patch.setenv("ONEFILE_VLA_CACHE", str(folder))
        patch.setattr(data, "CACHE", folder)
        yield folder


@pytest.fixture(scope="session", autouse=True)
def few_sights():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(score, "SIGHTS", 3)
        yield


def copying(read):
    """A from_pretrained that reads the embedded backbone once and hands out copies."""
    once = cache(lambda how: read(common.BACKBONES["tiny"], **dict(how)))

    def copied(path, **how):
        known = path == common.BACKBONES["tiny"]
        return copy.deepcopy(once(tuple(how.items()))) if known else read(path, **how)

    return copied


@pytest.fixture(scope="session", autouse=True)
def tiny_once():
    with pytest.MonkeyPatch.context() as patch:
        for library in (backbones.AutoModelForImageTextToText, backbones.AutoTokenizer):
            patch.setattr(library, "from_pretrained", copying(library.from_pretrained))
        yield


@pytest.fixture(scope="module")
def brief():
    """Who has not learned to act need not fail for as long as a world allows."""
    call, evaluate = loop.call, loop.evaluate

    def soon_over(world, *what):
        answer, (success, instruction, limit) = call(world, *what)
        return answer, (success, instruction, min(limit, 12))

    def evaluated(policy, *more, **words):
        with pytest.MonkeyPatch.context() as patch:
            if hasattr(policy, "model"):  # else an expert
                patch.setattr(loop, "call", soon_over)
            return evaluate(policy, *more, **words)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "evaluate", evaluated)
        yield


@pytest.fixture(scope="session")
def episodes():
    return [data.record("tabletop:bridge", seed, 64, 32, 0.3) for seed in range(4)]


@pytest.fixture
def status(capsys, monkeypatch):
    """Calls main(words) as the command line would -> exit status, stdout, stderr."""

    def call(main, *words):
        monkeypatch.setattr(sys, "argv", ["prog", *words])
        capsys.readouterr()
        code = 0
        try:
            common.run_main(main)
        except SystemExit as end:
            code = end.code
        return code, *capsys.readouterr()

    return call


def pytest_collection_modifyitems(items):
    """Tests marked `gpu` are skipped where there is none."""
    if not torch.cuda.is_available():
        for item in items:
            if "gpu" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="there is no GPU"))
