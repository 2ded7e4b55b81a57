"""The policy server: what it reads, what it refuses, and that no client harms another."""

import asyncio
import json
import os
import random
import signal
import socket
import subprocess
import sys
import threading
import time
import tracemalloc
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

pytest.importorskip("websockets", reason="needs the extra [serve]")
msgpack = pytest.importorskip("msgpack", reason="needs the extra [serve]")

from websockets.exceptions import ConnectionClosed, InvalidStatus  # noqa: E402
from websockets.sync.client import connect  # noqa: E402

import common  # noqa: E402
import data  # noqa: E402
import dualvla  # noqa: E402
import parts.runs  # noqa: E402
import twinbrain  # noqa: E402
import vita_vla  # noqa: E402
from worlds import client, loop, serve, tabletop  # noqa: E402

ALONE = common.Dist(0, 1, torch.device("cpu"))
SMALL = dict(width=32, depth=1, heads=2, dtype="fp32", device="cpu")
WORDS = "put the red spoon on the towel"


def openpi(name):
    reason = "pip install --no-deps openpi-client: it asks for numpy below 2"
    return pytest.importorskip(f"openpi_client.{name}", reason=reason)


def reply(raw):
    """A binary answer -> its map, arrays read as openpi's client reads them."""

    def hook(fields):
        if b"__ndarray__" in fields:
            return np.ndarray(fields[b"shape"], fields[b"dtype"], fields[b"data"])
        return fields

    return msgpack.unpackb(raw, object_hook=hook)


class Fake:
    """A policy that counts what it sees at once; prompts make it wait, fail or answer nan."""

    def __init__(self, horizon=4):
        self.cfg = SimpleNamespace(
            size=8, wrist_size=8, state=True, backbone="none", world="tabletop:bridge", data="",
            robot="", execute=2, horizon=horizon,
        )  # fmt: skip
        bounds = {
            name: [sign] * 8 for name, sign in zip(("q01", "q99", "min", "max"), (-1.0, 1.0) * 2)
        }
        self.stats = {"state": bounds, "action": {k: v[:7] for k, v in bounds.items()}}
        self.stats |= {"cameras": ["static", "wrist"], "fps": 5.0}
        self.processor = SimpleNamespace(
            tokenizer=SimpleNamespace(get_added_vocab=lambda: {"<|image_pad|>": 7})
        )
        self.robots = {"tabletop:bridge": self.stats}
        self.batches, self.go, self.begun = [], threading.Event(), threading.Event()

    def act(self, observations, instructions, rng):
        self.batches.append(len(observations))
        self.begun.set()
        if "wait" in instructions:
            self.go.wait(20)
        if "fail" in instructions:
            raise RuntimeError("this prompt breaks the policy")
        shape = len(observations), self.cfg.horizon, 7
        self.said = [f"to {words}" for words in instructions]
        bad = np.array([np.nan if words == "nan" else 0.0 for words in instructions])
        return rng.standard_normal(shape, np.float32) + bad[:, None, None]

    view = None


@contextmanager
def serving(policy, method="twinbrain", **flags):
    """A server in a thread -> its port, the lines it says."""
    flags = {"port": 0, "max_rate": 1e4} | flags
    lines, loop, stop, said = [], asyncio.new_event_loop(), asyncio.Event(), threading.Event()

    def say(line):
        lines.append(line)
        if line.startswith("listening"):
            said.set()

    server = serve.Server(policy, method, serve.Config(**flags), say)
    thread = threading.Thread(target=loop.run_until_complete, args=(server.run(stop),))
    thread.start()
    assert said.wait(10)
    try:
        yield SimpleNamespace(
            port=int(lines[0].split("/healthz")[0].rsplit(":", 1)[1]), lines=lines, server=server,
            stop=lambda: loop.call_soon_threadsafe(stop.set), thread=thread,
        )  # fmt: skip
    finally:
        loop.call_soon_threadsafe(stop.set)
        thread.join(20)
        assert not thread.is_alive()
        loop.close()


class Caller:
    """A client of its own making; `get()` returns a map, or the text of an error."""

    def __init__(self, port, **options):
        opened = connect(f"ws://127.0.0.1:{port}", compression=None, max_size=None, **options)
        self.ws = opened.__enter__()
        self.metadata = reply(self.ws.recv(10))

    def ask(self, message):
        self.ws.send(message if isinstance(message, (bytes, str)) else serve.encode(message))
        return self.get()

    def get(self):
        answer = self.ws.recv(20)
        return answer if isinstance(answer, str) else reply(answer)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.ws.close()


def message(words=WORDS, side=8, seed=0, **more):
    """What openpi's LIBERO example sends."""
    rng = np.random.default_rng(seed)
    images = rng.integers(0, 256, (2, side, side, 3), np.uint8)
    return {
        "observation/image": images[0],
        "observation/wrist_image": images[1],
        "observation/state": rng.uniform(-1, 1, 8),
        "prompt": words,
    } | more


def reader(policy=None, method="twinbrain", **flags):
    return serve.Reader(policy or Fake(), method, serve.Config(**flags))


# --- messages -------------------------------------------------------------------------------------


@pytest.mark.parametrize("code", ["<f4", ">f8", "<f2", "|u1", "<i8", "|b1"])
def test_arrays_of_the_client_package_arrive(code):
    packer = openpi("msgpack_numpy")
    sent = (np.arange(6).reshape(2, 3) % 2).astype(code)
    got = serve.decode(packer.packb({"a": {"b": sent}, "c": np.float32(2.5), "d": [1, "x"]}))
    assert np.array_equal(got["a"]["b"], sent) and got["a"]["b"].dtype == sent.dtype
    assert got["c"] == 2.5 and got["d"] == [1, "x"]
    back = packer.unpackb(serve.encode({"actions": sent}))["actions"]
    assert np.array_equal(back, sent) and back.dtype == sent.dtype


def array(**fields):
    good = {b"__ndarray__": True, b"data": bytes(4), b"dtype": "<f4", b"shape": [1]}
    return {"a": good | {k.encode(): v for k, v in fields.items()}}


BAD = [
    (array(dtype="|O"), "dtype '|O': only numbers"), (array(dtype="V4"), "of dtype 'V4'"),
    (array(dtype=[["x", "<f4"]]), "a list: only numbers"), (array(dtype="<U1"), "dtype '<U1'"),
    (array(shape=[2]), "has 8 bytes, not 4"), (array(shape=[-1]), "shape [-1]: up to four"),
    (array(shape=[1] * 9), "a list: up to four"), (array(shape=[True]), "up to four numbers"),
    (array(shape=[2**62, 2]), "has 36893488147419103232 bytes"), (array(data="0000"), "'0000'"),
    (array(shape=[0, 2**32]), "[0, 4294967296]"), ({"a": {b"__npgeneric__": 1}}, "a scalar None"),
]  # fmt: skip


@pytest.mark.parametrize("sent, why", BAD, ids=lambda x: x if isinstance(x, str) else "")
def test_other_arrays_are_refused(sent, why):
    with pytest.raises(common.UserError) as error:
        serve.decode(msgpack.packb(sent))
    assert why in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("raw", [
    b"", b"\xc1", b"\x01", b"\x91" * 5000, b"\xdd\x7f\xff\xff\xff", b"\xc6\xff\xff\xff\xff",
    b"\xd6\xff0000", b"\x81\xa1a\xda\xff\xff" + b"x" * 65535, msgpack.packb([1]), b"\x80\x80",
    b"\x81\xa1a\xdc\x03\xe8" + (b"\xdc\x03\xe8" + b"\x80" * 1000) * 1000,
])  # fmt: skip
def test_what_is_no_message_is_refused_at_little_cost(raw):
    tracemalloc.start()
    with pytest.raises(common.UserError):
        serve.decode(raw)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 20e6


def mutated(raw, rng):
    """A few changes: bits, bytes, cuts, copies of parts, lengths that lie."""
    raw = bytearray(raw)
    for _ in range(rng.choice((1, 1, 2, 4))):
        at, n = rng.randrange(max(len(raw), 1)), rng.randint(1, 16)
        kind = rng.randrange(6)
        if kind == 0 and raw:
            raw[at] ^= 1 << rng.randrange(8)
        elif kind == 1:
            raw[at : at + n] = rng.randbytes(n)
        elif kind == 2:
            del raw[at : at + n]
        elif kind == 3:
            other = rng.randrange(max(len(raw), 1))
            raw[at:at] = raw[other : other + n]
        elif kind == 4 and raw:
            raw[at] = rng.choice(b"\xc0\xc1\xc4\xc6\xc7\xca\xcb\xd4\xd9\xdb\xdc\xdd\xde\xdf\xff")
        else:
            del raw[at:]
    return bytes(raw)


def test_ten_thousand_mutated_messages_are_read_or_refused():
    rng, read, counts = random.Random(0), reader(), {"read": 0, "refused": 0}
    star = {"examples": [{"image": [np.zeros((4, 4, 3), np.uint8)] * 2, "lang": WORDS,
                          "state": [0.5] * 8}]}  # fmt: skip
    whole = [serve.encode(m) for m in (message(side=4), message(reset=True), star)]
    for i in range(10_000):
        try:
            for observation, words in read.rows(serve.decode(mutated(whole[i % 3], rng))):
                assert [x.shape for x in observation["images"].values()] == [(8, 8, 3)] * 2
                assert observation["state"].shape == (8,) and isinstance(words, str)
                assert np.isfinite(observation["state"]).all()
            counts["read"] += 1
        except common.UserError as error:
            assert "\n" not in str(error) and str(error).isprintable() and len(str(error)) < 900
            counts["refused"] += 1
    assert min(counts.values()) > 500, counts


# --- observations ---------------------------------------------------------------------------------


def test_a_picture_arrives_as_training_saw_it(episodes):
    large = {k: np.kron(v, np.ones((1, 3, 3, 1), np.uint8)) for k, v in episodes[0].images.items()}
    recorded = replace(episodes[0], images=large)
    sample = data.Windows([recorded], data.statistics(episodes), 4, sides=(64, 32)).get(3, None)
    policy = Fake()
    policy.cfg.size, policy.cfg.wrist_size = 64, 32
    shots = [frames[3] for frames in large.values()]
    for turn in (lambda x: x, lambda x: x.transpose(2, 0, 1), lambda x: x / 255.0):
        sent = message() | dict(zip(serve.CLIENTS["libero"].images, map(turn, shots)))
        ((seen, words),) = reader(policy).rows(serve.decode(serve.encode(sent)))
        assert words == WORDS and list(seen["images"]) == list(recorded.images)
        for got, want in zip(seen["images"].values(), sample["images"]):
            assert np.array_equal(got, want)


def without(key):
    return {k: v for k, v in message().items() if k != key}


WRONG = [
    (without("observation/image"), "lacks observation/image (camera static)", "--images"),
    (without("observation/wrist_image"), "lacks observation/wrist_image (camera", "--images"),
    (without("observation/state"), "lacks observation/state (state, 8 numbers", "--state"),
    (without("prompt"), "lacks prompt (instruction)", "--prompt or --default-prompt"),
    (message() | {"observation/state": np.zeros(14)}, "state has 14 numbers", "8 were", "--state"),
    (message() | {"observation/state": [0.0] * 7 + [np.inf]}, "not finite"),
    (message() | {"observation/state": "home"}, "observation/state is 'home', not numbers"),
    (message() | {"observation/state": [*range(7), "7"]}, "observation/state is a list, not num"),
    (message() | {"observation/state": {"x": 1}}, "observation/state is a dict, not numbers"),
    (message() | {"observation/image": np.zeros((8, 8), np.uint8)}, "(8, 8), not a picture"),
    (message() | {"observation/image": np.zeros((8, 8, 3), int)}, "int64: pictures are uint8"),
    (message() | {"observation/image": np.full((8, 8, 3), 7.0)}, "values from 0 to 1"),
    (message() | {"observation/image": np.full((8, 8, 3), np.nan)}, "values from 0 to 1"),
    (message() | {"observation/image": np.zeros((1, 9000, 3), np.uint8)}, "8192 at most"),
    (message() | {"observation/image": b"jpeg"}, "is b'jpeg', not a picture"),
    (message("x" * 501), "not 1 to 500 characters"), (message(" "), "not 1 to 500"),
    (message("look <|image_pad|>"), "holds '<|image_pad|>'"), (message(["a"]), "prompt is a list"),
    ({"examples": []}, "list of 1 to 16"), ({"examples": [3]}, "an example's image: 2 pictures"),
    ({"examples": [{"image": [np.zeros((4, 4, 3), np.uint8)] * 3}]}, "2 pictures, static, wrist"),
    ({"payload": {"examples": [{"image": [1, 2]}]}}, "image/0 is 1, not a picture"),
]  # fmt: skip


@pytest.mark.parametrize("case", WRONG, ids=lambda case: case[1])
def test_a_wrong_observation_is_an_error_that_names_the_key(case):
    sent, *words = case
    with pytest.raises(common.UserError) as error:
        reader().rows(serve.decode(serve.encode(sent)))
    assert all(word in str(error.value) for word in words), error.value


DROID = {
    "observation/exterior_image_1_left": np.full((9, 9, 3), 1, np.uint8),
    "observation/wrist_image_left": np.full((9, 9, 3), 2, np.uint8),
    "observation/joint_position": np.full(7, 0.5), "observation/gripper_position": np.full(1, 0.25),
    "prompt": WORDS,
}  # fmt: skip
ALOHA = {"images": {"cam_high": np.full((3, 9, 9), 1, np.uint8),
                    "cam_left_wrist": np.full((3, 9, 9), 2, np.uint8)},
         "state": np.array([0.5] * 7 + [0.25])}  # fmt: skip
MINE = {"cams": [np.full((9, 9, 3), 1, np.uint8), {"rgb": np.full((9, 9, 3), 2, np.uint8)}],
        "arm": [0.5] * 7, "hand": 0.25, "task": WORDS}  # fmt: skip


@pytest.mark.parametrize("sent, flags", [
    (DROID, {"client": "droid"}), (ALOHA, {"client": "aloha", "default_prompt": WORDS}),
    (MINE, {"images": ("cams/0", "cams/1/rgb"), "state": ("arm", "hand"), "prompt": "task"}),
])  # fmt: skip
def test_the_names_of_other_clients(sent, flags):
    ((seen, words),) = reader(**flags).rows(serve.decode(serve.encode(sent)))
    assert [int(x.mean()) for x in seen["images"].values()] == [1, 2] and words == WORDS
    assert np.allclose(seen["state"], [0.5] * 7 + [0.25])


def test_a_policy_of_recordings_without_a_state_is_asked_without_one():
    policy = Fake()
    policy.stats["state"] = {name: [] for name in ("q01", "q99", "min", "max")}
    sent = message()
    del sent["observation/state"]
    ((seen, _),) = reader(policy).rows(serve.decode(serve.encode(sent)))
    assert seen["state"].shape == (0,)


def test_a_checkpoint_tells_its_cameras_and_its_rate():
    policy, about = Fake(), serve.Config(images=("a", "b"))
    policy.stats |= {"cameras": ["image", "wrist_image"], "fps": 10.0}
    seen = reader(policy, images=("a", "b"))
    assert list(seen.sides) == ["image", "wrist_image"] and seen.keys.images == ("a", "b")
    assert serve.describe(policy, "twinbrain", about, seen)["control_hz"] == 10
    with pytest.raises(common.UserError, match="2 cameras .image, wrist_image.: --images names 2"):
        reader(policy, images=("a",))
    del policy.stats["cameras"], policy.stats["fps"]  # a checkpoint of before
    assert list(reader(policy, images=("front", "a/b", "c")).sides) == ["front", "a/b", "c"]
    with pytest.raises(common.UserError, match="does not tell its cameras: --images"):
        reader(policy)


def test_the_gripper_speaks_the_clients_way():
    policy = Fake()
    for name, closed, open_ in (("tabletop:bridge", -1, 1), ("bridge", 0, 1)):
        policy.robots = {name: policy.stats}
        for want, said in serve.GRIPPERS.items():
            scale, offset = serve.gripper(policy, want)
            assert (scale * closed + offset, scale * open_ + offset) == said
    assert serve.gripper(policy, "") == (1, 0)
    policy.robots = {"my/folder": policy.stats}
    with pytest.raises(common.UserError, match="my/folder does not tell what its last number"):
        serve.gripper(policy, "minus")
    policy.stats["gripper"] = "unit"  # its reader knew
    assert serve.gripper(policy, "minus") == (-2, 1)
    policy.robots, policy.stats["gripper"] = {"tabletop": policy.stats}, ""
    with serving(policy, gripper="minus") as s, Caller(s.port) as c:
        got = c.ask(message())["actions"]
    want = np.random.default_rng(0).standard_normal((4, 7), np.float32)
    assert np.array_equal(got[:, :6], want[:, :6]) and np.array_equal(got[:, 6], -want[:, 6])


@pytest.mark.parametrize("name", ["metaworld:push-v3,reach-v3", "night", "tabletop:bridge"])
def test_above_zero_opens_in_every_world(name, monkeypatch):
    """As worlds/__init__.py has it; its name is that of what was trained on."""
    monkeypatch.setitem(loop.WORLDS, "night", "worlds.tabletop:Tabletop")
    policy = Fake()
    policy.cfg.data, policy.robots = f"qa.json,{name}", {name: policy.stats}
    about = serve.describe(policy, "twinbrain", serve.Config(gripper="unit"), reader(policy))
    assert about["opens"] == "unit" and about["available_unnorm_keys"] == [name]
    assert serve.opens(policy) == "plus" and about["action_low"][-1] == 0


def test_our_client_opens_as_the_server_says(tmp_path):
    with serving(Fake()) as s:
        theirs = client.Server(f"127.0.0.1:{s.port}")
        seen = {"images": {k: np.zeros((8, 8, 3), np.uint8) for k in client.KEYS}, "state": [0] * 8}
        got = theirs.infer(seen, WORDS, 7)[:, 6]
        assert client.Server(f"127.0.0.1:{s.port}", gripper="minus").gripper == "minus"
    want = np.random.default_rng(0).standard_normal((4, 7), np.float32)[:, 6]
    assert np.array_equal(got, want > 0) and not np.array_equal(got, want > 0.5)
    about = client.Results("x", tmp_path / "r.json", {"gripper": "unit"}, theirs, {}).about
    assert about["protocol"] == {"gripper": "plus"}


def test_a_policy_without_state_asks_for_none():
    policy = Fake()
    policy.cfg.state = False
    ((seen, _),) = reader(policy).rows(without("observation/state"))
    assert seen["state"].shape == (8,)


# --- the three methods, by way of their run folders -----------------------------------------------


def untrained(method, stats):
    """Config, model, meta of a policy as it begins."""
    if method == "twinbrain":
        cfg = twinbrain.Config(**SMALL)
        return cfg, twinbrain.build(cfg, 8, 7)[0]
    if method == "vita_vla":
        cfg = vita_vla.Config(**SMALL, stage="finetune", history=3)
        return cfg, vita_vla.build(cfg)[0]
    cfg = dualvla.Config(**SMALL, stage="expert", queries=2, rank=2)
    return cfg, dualvla.build(cfg, 8, 7)[0]


@pytest.fixture(scope="module")
def runs(tmp_path_factory, episodes):
    """A run folder of each method, saved before its first step."""
    folders, stats = {}, data.statistics(episodes)
    for method in serve.METHODS:
        cfg, model = untrained(method, stats)
        folder = folders[method] = tmp_path_factory.mktemp(method)
        meta = {
            "method": method,
            "config": asdict(cfg),
            "robots": {"tabletop:bridge": stats | {"cameras": ["static", "wrist"], "fps": 5.0}},
        }
        tensors = {n: t for n, t in model.state_dict().items() if n not in model.untouched}
        common.save_checkpoint(folder / "checkpoints", 1, tensors, {}, {}, meta, ALONE)
        (folder / "config.json").write_text(json.dumps({"method": method}))
    return folders


@pytest.fixture(scope="module")
def loaded(runs):
    return {method: serve.load(serve.Config(checkpoint=str(folder), device="cpu", threads=1))[0]
            for method, folder in runs.items()}  # fmt: skip


def steps_of(policy, n):
    """n observations of an episode, as the world gives them and as a client sends them."""
    world = tabletop.Tabletop("bridge", policy.cfg.size, policy.cfg.wrist_size)
    world.reset(5)
    rng = np.random.default_rng(0)
    for _ in range(n):
        seen = world.observe()
        images = dict(zip(serve.CLIENTS["libero"].images, seen["images"].values()))
        yield seen, images | {"observation/state": seen["state"], "prompt": world.instruction}
        world.step(rng.uniform(-1, 1, 7))


def in_the_loop(policy, steps, seed=0):
    """What the closed loop would get for these observations, one after the other."""
    memory, rng = {}, np.random.default_rng(seed)
    return [policy.act([o | {"memory": memory}], [sent["prompt"]], rng)[0].astype(np.float32)
            for o, sent in steps]  # fmt: skip


@pytest.mark.parametrize("method", serve.METHODS)
def test_a_client_gets_what_the_closed_loop_gets(method, loaded):
    policy = loaded[method]
    steps = list(steps_of(policy, 5))
    want = in_the_loop(policy, steps)
    with serving(policy, method) as s, Caller(s.port) as c:
        got, about = [c.ask(sent) for _, sent in steps], c.metadata
    assert about["method"] == method and about["action_dim"] == 7 and about["state_dim"] == 8
    assert about["action_horizon"] == len(want[0]) and about["control_hz"] == 5
    assert about["cameras"]["wrist"] == {"key": "observation/wrist_image", "side": 32}
    for answer, chunk in zip(got, want):
        assert np.array_equal(answer["actions"], chunk)
        assert answer["server_timing"]["infer_ms"] > 0 < answer["policy_timing"]["infer_ms"]
    assert "prev_total_ms" in got[1]["server_timing"]


def test_the_client_package_is_served(loaded):
    client = openpi("websocket_client_policy").WebsocketClientPolicy
    policy = loaded["twinbrain"]
    steps = list(steps_of(policy, 2))
    want = in_the_loop(policy, steps)
    with serving(policy, token="s3cret") as s:
        theirs = client("127.0.0.1", s.port, api_key="s3cret")
        assert theirs.get_server_metadata()["action_horizon"] == 8
        for (_, sent), chunk in zip(steps, want):
            assert np.array_equal(theirs.infer(sent)["actions"], chunk)
        with pytest.raises(RuntimeError, match="lacks prompt"):
            theirs.infer({k: v for k, v in steps[0][1].items() if k != "prompt"})
        theirs.reset()
        assert theirs.infer(steps[0][1])["actions"].shape == (8, 7)
        theirs._ws.close()
        with pytest.raises(InvalidStatus):
            client("127.0.0.1", s.port, api_key="wrong")


def test_the_brokers_receding_horizon(loaded):
    client = openpi("websocket_client_policy").WebsocketClientPolicy
    broker = openpi("action_chunk_broker").ActionChunkBroker
    policy = loaded["twinbrain"]
    ((_, sent),) = steps_of(policy, 1)
    want = np.concatenate(in_the_loop(policy, [({**_}, sent)] * 2))
    with serving(policy, execute=4) as s:
        theirs = client("127.0.0.1", s.port)
        acts = broker(theirs, action_horizon=theirs.get_server_metadata()["action_horizon"])
        got = [acts.infer(sent)["actions"] for _ in range(6)]
        theirs._ws.close()
    assert np.array_equal(got, want[[0, 1, 2, 3, 8, 9]])


def test_memory_ends_with_reset_prompt_or_connection(loaded):
    policy = loaded["vita_vla"]
    steps = list(steps_of(policy, 3))
    first, second, third = in_the_loop(policy, steps)
    alone = in_the_loop(policy, steps[1:2])[0]
    assert not np.array_equal(second, alone)  # the history tells
    with serving(policy, "vita_vla") as s, Caller(s.port) as a, Caller(s.port) as b:

        def same(answer, chunk):
            return np.allclose(answer["actions"], chunk, atol=1e-5)

        asked = [sent for _, sent in steps]
        assert same(a.ask(asked[0]), first) and same(b.ask(asked[1]), alone)  # each its own
        assert same(a.ask(asked[1]), second)
        assert a.ask({"reset": True}) == {"reset": True} and same(a.ask(asked[1]), alone)
        assert same(a.ask(asked[1] | {"reset": True}), alone)
        a.ask(asked[0] | {"prompt": "another"})
        assert same(a.ask(asked[1]), alone)
        stopped = a.ask({"stop": True})
        assert stopped["stopped"] is True and stopped["actions"].shape == (0, 7)
        assert same(a.ask(asked[0]), first) and same(a.ask(asked[1]), second)
        with Caller(s.port) as c:
            assert same(c.ask(asked[0]), first)
        assert "lacks" in a.ask({"prompt": asked[1]["prompt"]})  # an error changes nothing
        assert same(a.ask(asked[2]), third)


def test_clients_at_once_get_what_each_gets_alone(loaded):
    policy, act, sizes = loaded["twinbrain"], loaded["twinbrain"].act, []
    steps = [list(steps_of(policy, 3))[i:] + list(steps_of(policy, i)) for i in range(4)]
    want = [in_the_loop(policy, mine) for mine in steps]
    counted = SimpleNamespace(**vars(policy))
    counted.act = lambda o, words, rng: sizes.append(len(o)) or act(o, words, rng)
    got = [[] for _ in steps]
    with serving(counted, wait_ms=200.0) as s:

        def work(mine, out):
            with Caller(s.port) as caller:
                ready.wait()
                out += [caller.ask(sent)["actions"] for _, sent in mine]

        ready = threading.Barrier(4)
        threads = [threading.Thread(target=work, args=pair) for pair in zip(steps, got)]
        [t.start() for t in threads]
        [t.join() for t in threads]
    assert np.allclose(got, want, atol=1e-4) and max(sizes) > 1


def test_starvlas_messages(loaded):
    policy = loaded["twinbrain"]
    rows = [{"image": [*seen["images"].values()], "lang": sent["prompt"],
             "state": seen["state"][None]} for seen, sent in steps_of(policy, 2)]  # fmt: skip
    (want,) = in_the_loop(policy, list(steps_of(policy, 1)))
    with serving(policy) as s, Caller(s.port) as c:
        assert c.metadata["action_chunk_size"] == 8
        ping = {"type": "ping", "request_id": "p"}
        assert c.ask(ping) == {"status": "ok", "ok": True} | ping
        flat = c.ask({"examples": rows, "do_sample": False, "unnorm_key": "x"})
        assert flat["ok"] and flat["type"] == "inference_result"
        assert flat["data"]["actions"].shape == (2, 8, 7)
        assert np.allclose(flat["data"]["actions"][0], want, atol=1e-4)
        packed = {"type": "infer", "request_id": "7", "payload": {"examples": rows[:1]}}
        assert c.ask(packed)["request_id"] == "7"
        failed = c.ask({"examples": [{"image": rows[0]["image"], "lang": "x"}], "request_id": 9})
        assert not failed["ok"] and failed["request_id"] == 9
        assert "lacks state (state, 8 numbers" in failed["error"]["message"]


def test_a_robot_of_another_name_is_not_answered():
    policy = Fake()
    policy.robots = {"bridge_orig": policy.stats, "fractal20220817_data": policy.stats}
    policy.cfg.data = "bridge_orig,fractal20220817_data"
    shots = [np.zeros((8, 8, 3), np.uint8)] * 2
    sent = {"examples": [{"image": shots, "lang": "x", "state": np.zeros(8)}]}
    for robot, good, bad in (("", "oxe_bridge", "oxe_rt1"),
                             ("fractal20220817_data", "oxe_rt1", "oxe_bridge")):  # fmt: skip
        policy.cfg.robot = robot
        for key in (good, None, robot or "bridge_orig"):
            assert len(reader(policy).rows(sent | {"unnorm_key": key})) == 1
        for key in (bad, "nonsense", 3):
            with pytest.raises(common.UserError, match="unnorm_key .*: this server acts like"):
                reader(policy).rows(sent | {"unnorm_key": key})


def test_bars_are_cut_off():
    inside = np.random.default_rng(0).integers(0, 256, (18, 32, 3), np.uint8)
    square, tall = np.zeros((32, 32, 3), np.uint8), np.zeros((32, 32, 3), np.uint8)
    square[7:25], tall[:, 7:25] = inside, inside.transpose(1, 0, 2)
    want = serve.picture(inside, "x", 16)
    assert np.array_equal(serve.picture(square, "x", 16, 16 / 9), want)
    assert np.array_equal(serve.picture(inside, "x", 16, 16 / 9), want)  # it came without
    assert np.array_equal(serve.picture(tall, "x", 16, 9 / 16), want.transpose(1, 0, 2))
    assert not np.array_equal(serve.picture(square, "x", 16), want)
    seen, _ = reader(aspect=2.0).rows(message(side=32))[0]
    shot = message(side=32)["observation/image"]
    assert np.array_equal(seen["images"]["static"], data.resized(shot[8:24], 8))


def test_a_pause_begins_an_episode(monkeypatch):
    """openpi's and starVLA's clients send no reset between their episodes."""
    policy, kept = Fake(), []
    monkeypatch.setattr(serve.Client, "reset", lambda self: kept.append(self.requests))
    for forget in (0.3, 0.0):
        with serving(policy, forget=forget) as s, Caller(s.port) as c:
            c.ask(message()), c.ask(message()), time.sleep(0.5), c.ask(message())
    assert kept == [2]


@pytest.mark.parametrize(
    "method, flags, data, said, unsaid",
    [
        ("twinbrain", {}, "tabletop", "1 open, -1 closed", "remembers"),
        ("twinbrain", {"gripper": "minus"}, "tabletop", "-1 open, 1 closed", "openpi"),
        ("twinbrain", {"client": "droid"}, "tabletop", "takes 8 numbers, not 7", "LIBERO"),
        ("twinbrain", {"ensemble": True}, "my/folder", "as it was recorded", "--gripper minus"),
        ("vita_vla", {"forget": 2.0}, "bridge", "--gripper minus", "remembers"),
        ("vita_vla", {}, "bridge", "--forget 2 begins", "DROID"),
    ],
)
def test_what_a_client_should_know_is_said(method, flags, data, said, unsaid):
    policy, lines = Fake(), []
    policy.robots = {data: policy.stats}
    cfg = serve.Config(**flags)
    about = serve.describe(policy, method, cfg, reader(policy))
    serve.hint(cfg, about, lines.append)
    text = "\n".join(lines)
    assert said in text and unsaid not in text


def test_ensemble_answers_with_one_blended_action():
    policy = Fake()
    with serving(policy, ensemble=True) as s, Caller(s.port) as c:
        assert c.metadata["action_horizon"] == 1
        got = [c.ask(message())["actions"] for _ in range(3)]
        assert c.ask(message("sing"))["said"] == "to sing"
    rng = np.random.default_rng(0)
    chunks = [rng.standard_normal((4, 7), np.float32) for _ in range(3)]
    for n, actions in enumerate(got):
        assert np.allclose(actions, serve.loop.blend(chunks[: n + 1])[None], atol=1e-6)


# --- clients that misbehave -----------------------------------------------------------------------


@pytest.fixture
def server():
    with serving(Fake(), max_message_mb=0.1, max_clients=6, wait_ms=20.0) as s:
        yield s


def well(caller):
    return caller.ask(message())["actions"].shape == (4, 7)


def test_an_oversized_message_ends_its_client_alone(server):
    with Caller(server.port) as good, Caller(server.port) as bad:
        bad.ws.send(bytes(200_000))
        with pytest.raises(ConnectionClosed) as closed:
            bad.get()
        assert closed.value.rcvd.code == 1009 and well(good)


def test_whoever_breaks_the_policy_breaks_it_for_itself():
    policy = Fake()
    with serving(policy, wait_ms=1000.0) as s, Caller(s.port) as good:
        for words in ("fail", "nan"):
            with Caller(s.port) as bad:
                bad.ws.send(serve.encode(message(words)))
                assert well(good)
                assert bad.get().startswith("error in the server: ")
                with pytest.raises(ConnectionClosed) as closed:
                    bad.get()
                assert closed.value.rcvd.code == 1011
        assert well(good)
    assert policy.batches[:3] == [2, 1, 1]  # together, then each alone


def test_vanished_slow_and_garbled_clients_hold_up_nobody(server):
    handshake = (
        b"GET / HTTP/1.1\r\nHost: x\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
        b"Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\nSec-WebSocket-Version: 13\r\n\r\n"
    )
    half = b"\x82\xfe\x40\x00" + bytes(100)  # the head of a frame of 16 KiB, and 96 bytes of it
    with Caller(server.port) as good:
        for sent in (b"", b"\x16\x03\x01garbage\r\n\r\n", handshake[:40], handshake + half):
            for vanishes in (True, False):
                raw = socket.create_connection(("127.0.0.1", server.port))
                raw.sendall(sent)
                if not vanishes:
                    server.raw = [*getattr(server, "raw", ()), raw]  # silent from now on
                    continue
                raw.close()
        deaf = Caller(server.port)
        deaf.ws.send(serve.encode(message()))
        deaf.ws.socket.shutdown(socket.SHUT_RDWR)  # gone before its answer
        assert all(well(good) for _ in range(20))
        assert "text frame" in good.ask("hello") and well(good)
        [raw.close() for raw in server.raw]


def test_hundreds_of_mutated_messages_beside_a_client_at_work(server):
    rng, whole, answers = random.Random(1), serve.encode(message(side=2)), []
    done = threading.Event()

    def work():
        with Caller(server.port) as good:
            while not done.is_set():
                answers.append(well(good))

    thread = threading.Thread(target=work)
    thread.start()
    with Caller(server.port) as bad:
        got = [bad.ask(mutated(whole, rng)) for _ in range(400)]
    done.set()
    thread.join()
    refused = [answer for answer in got if isinstance(answer, str)]
    assert 50 < len(refused) < 400 and all(r.startswith("error: ") for r in refused)
    assert answers and all(answers)


def test_no_more_clients_than_there_is_room_for(server):
    callers = [Caller(server.port) for _ in range(6)]
    with pytest.raises(InvalidStatus) as refused:
        Caller(server.port)
    assert refused.value.response.status_code == 503 and health(server.port)[0] == 200
    with pytest.raises(common.UserError, match="[0-9] is full: its --max-clients"):
        client.Server(f"127.0.0.1:{server.port}")
    callers.pop().ws.close()
    for _ in range(100):
        if len(server.server.clients) < 6:
            break
        time.sleep(0.02)
    callers.append(Caller(server.port))
    assert all(well(c) for c in callers)
    [c.ws.close() for c in callers]


def test_rate_is_bounded():
    with serving(Fake(), max_rate=50.0) as s, Caller(s.port) as c:
        began = time.perf_counter()
        assert all(well(c) for _ in range(11))
        assert time.perf_counter() - began > 0.19


def test_a_plan_that_comes_too_late_is_none():
    policy = Fake()
    with serving(policy, timeout=1.0) as s, Caller(s.port) as c:
        assert "no plan within --timeout 1 s" in c.ask(message("wait"))
        policy.go.set()
        assert well(c)


class Counting(Fake):
    """It says how many plans it remembers."""

    def act(self, observations, instructions, rng):
        for o in observations:
            o["memory"]["n"] = o["memory"].get("n", 0) + 1
        chunks = super().act(observations, instructions, rng)
        self.said = [str(o["memory"]["n"]) for o in observations]
        return chunks


def test_a_plan_that_comes_too_late_is_not_remembered():
    policy = Counting()
    with serving(policy, timeout=1.0, ensemble=True) as s, Caller(s.port) as c:
        assert "no plan within" in c.ask(message("wait"))
        policy.go.set()
        assert [c.ask(message("wait"))["said"] for _ in range(2)] == ["1", "2"]
        (theirs,) = s.server.clients
        assert len(theirs.episodes[0].memory["chunks"]) == 2 and policy.batches == [1, 1, 1]


@pytest.mark.parametrize("wrong", [{"reset": 1}, {"stop": "yes"}])
def test_a_reset_is_true_or_false(wrong):
    with serving(Counting()) as s, Caller(s.port) as c:
        assert c.ask(message())["said"] == "1" and "true or false" in c.ask(message() | wrong)
        assert c.ask(message(reset=False))["said"] == "2"
        assert c.ask(message(reset=True))["said"] == "1"


def test_who_says_nothing_is_let_go():
    with serving(Fake(), idle=0.2) as s, Caller(s.port) as c:
        with pytest.raises(ConnectionClosed) as closed:
            c.get()
        assert closed.value.rcvd.code == 1008
    assert any("too slow" in line for line in s.lines)


# --- who may come in, health, the end -------------------------------------------------------------


def health(port):
    import urllib.error
    import urllib.request

    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/healthz", timeout=5) as answer:
            return answer.status, answer.read()
    except urllib.error.HTTPError as error:
        return error.code, error.read()


def test_token_origin_and_health():
    with serving(Fake(), token="s3cret") as s:
        assert health(s.port) == (200, b"OK\n")
        for given in (None, "wrong", "Api-Key wrong", "Basic s3cret"):
            headers = {"Authorization": given} if given else None
            with pytest.raises(InvalidStatus) as refused:
                Caller(s.port, additional_headers=headers)
            assert refused.value.response.status_code == 401
        for given in ("", "wrong"):
            with pytest.raises(common.UserError, match="[0-9] asks for the --token"):
                client.Server(f"127.0.0.1:{s.port}", given)
        for scheme in ("Api-Key", "Bearer"):
            headers = {"Authorization": f"{scheme} s3cret"}
            with Caller(s.port, additional_headers=headers) as c:
                assert well(c)
        with pytest.raises(InvalidStatus) as refused:  # a page in a browser
            Caller(s.port, origin="http://evil.example", additional_headers=headers)
        assert refused.value.response.status_code == 403


def test_stopping_finishes_the_running_batch():
    policy = Fake()
    with serving(policy, batch=1) as s, Caller(s.port) as a, Caller(s.port) as b:
        idle = Caller(s.port)
        a.ws.send(serve.encode(message("wait")))
        assert policy.begun.wait(5)
        b.ws.send(serve.encode(message()))  # waits behind it
        time.sleep(0.2)
        s.stop()
        time.sleep(0.2)
        policy.go.set()
        assert a.get()["actions"].shape == (4, 7)
        for caller in (a, b, idle):
            with pytest.raises(ConnectionClosed) as closed:
                caller.get()
            assert closed.value.rcvd.code == 1001
        s.thread.join(10)
    assert policy.batches == [1]


def free_port():
    with socket.create_server(("127.0.0.1", 0)) as held:
        return held.getsockname()[1]


def ask_and_stop(port, number, out):
    """As a client: waits for the server, asks once, has it stopped by a signal."""
    while not out:
        try:
            caller = Caller(port)
        except ConnectionRefusedError:
            time.sleep(0.05)
            continue
        out.append(caller.ask(DROID)["actions"].shape)
        os.kill(os.getpid(), number)
        try:
            caller.get()
        except ConnectionClosed as closed:
            out.append(closed.rcvd.code)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_command_serves_until_a_signal(number, runs, status):
    before, port, out = {n: signal.getsignal(n) for n in (2, 15)}, free_port(), []
    thread = threading.Thread(target=ask_and_stop, args=(port, number, out), daemon=True)
    thread.start()
    words = f"--checkpoint {runs['twinbrain']} --port {port} --threads 1 --device cpu"
    code, said, _ = status(serve.main, *words.split(), "--client", "droid")
    [signal.signal(n, handler) for n, handler in before.items()]
    thread.join(10)
    assert code == 0 and out == [(8, 7), 1001]
    lines = said.splitlines()
    assert "8 actions of 7 numbers; reads observation/exterior_image_1_left" in lines[0]
    assert "1 open, -1 closed" in lines[1] and "takes 8 numbers, not 7" in lines[2]
    assert lines[3].startswith(f"listening on ws://127.0.0.1:{port}, health on http://127.0.0.1:")
    assert lines[4].startswith("client 1 127.0.0.1:") and lines[4].endswith("(1 here)")
    assert lines[5].startswith("client 1 left (1001): 1 requests, median ")


@pytest.mark.slow
def test_the_script_runs_from_anywhere(runs):
    words = [sys.executable, str(Path(serve.__file__)), "--checkpoint", str(runs["twinbrain"])]
    child = subprocess.Popen([*words, "--port", "0"], stdout=subprocess.PIPE, text=True, cwd="/",
                             env=os.environ | {"PYTHONPATH": ""})  # fmt: skip
    line = next(line for line in child.stdout if line.startswith("listening"))
    with Caller(int(line.rsplit(":", 1)[1].split("/")[0])) as caller:
        assert caller.ask(message())["actions"].shape == (8, 7)
    child.send_signal(signal.SIGTERM)
    assert child.wait(20) == 0 and "1 requests, median" in child.stdout.read()


def test_hosts_that_others_reach_are_warned_of():
    for host, token, word in (
        ("127.0.0.1", "", None), ("localhost", "", None), ("::1", "", None),
        ("0.0.0.0", "", "no authentication"), ("robot.lan", "x", "unencrypted"),
    ):  # fmt: skip
        said = []
        serve.warn(serve.Config(host=host, token=token), said.append)
        assert [word in line for line in said] == [True] * bool(word)


@pytest.mark.parametrize("words, want", [
    ([], "--checkpoint RUN is needed"), (["--checkpoint", "/none"], "no run folder of twinbrain"),
    (["--checkpoint", "x", "--port", "70000"], "--port 70000"), (["--hots", "x"], "--host"),
    (["--checkpoint", "x", "--max-rate", "0"], "--max-rate 0.0: a number above 0"),
    (["--checkpoint", "x", "--seed", "-1"], "--seed -1"),
    (["--checkpoint", "x", "--wait-ms", "inf"], "--wait-ms inf"),
    (["--checkpoint", "x", "--client", "liberty"], "did you mean libero"),
    (["--checkpoint", "RUN", "--form", "plain"], "only a run of dualvla"),
    (["--checkpoint", "RUN", "--images", "a,b,c"], "2 cameras (static, wrist)"),
    (["--checkpoint", "RUN", "--port", "TAKEN"], "cannot listen on --host 127.0.0.1"),
])  # fmt: skip
def test_mistakes_end_in_one_line(words, want, runs, status):
    taken = socket.create_server(("127.0.0.1", 0))
    names = {"RUN": str(runs["twinbrain"]), "TAKEN": str(taken.getsockname()[1])}
    code, _, err = status(serve.main, *(names.get(word, word) for word in words))
    taken.close()
    assert code == 2 and err.startswith("error: ") and want in err and err.count("\n") == 1


def test_run_folders_of_others(tmp_path, status, monkeypatch):
    file = tmp_path / "config.json"
    for text, want in (
        ('{"method": "pi0"}', "a run of 'pi0'"),
        ("{", "damaged"),
        ("[]", "damaged"),
    ):
        file.write_text(text)
        code, _, err = status(serve.main, "--checkpoint", str(tmp_path))
        assert code == 2 and want in err and str(file) in err
    monkeypatch.setattr(serve, "msgpack", None)
    assert "onefile-vla[serve]" in status(serve.main, "--checkpoint", str(tmp_path))[2]


def test_the_newest_stage_of_a_chain_is_served(runs, tmp_path):
    (tmp_path / "chain.json").write_text("{}")
    for stage in ("teacher", "finetune"):
        (tmp_path / stage).symlink_to(runs["vita_vla"])
    order = vita_vla.STAGES["freeze-vlm"]
    assert serve.method_of(tmp_path) == "vita_vla"
    assert parts.runs.newest(tmp_path, order) == tmp_path / "finetune"
    assert parts.runs.newest(tmp_path / "teacher", order) == tmp_path / "teacher"
