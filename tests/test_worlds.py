"""The contract of worlds/__init__.py, held by a toy; Meta-World behind it; films; the keyboard."""

import copy
import importlib.util
import os
import pty
import re
import select
import signal
import subprocess
import sys
import termios
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import common
import data
import dualvla
import twinbrain
import vita_vla
from worlds import events, loop, metaworld, pictures, score, terminal
from worlds.tabletop import Tabletop

ROOT = Path(__file__).resolve().parent.parent
ALONE = common.Dist(0, 1, torch.device("cpu"))


PAGE = (ROOT / "docs" / "use.md").read_text()
WORLD = re.search(r"```python\n(import numpy.*?)```", PAGE, re.DOTALL)[1]  # the page's own example
made = {"__name__": __name__}
exec(compile(WORLD, "docs/use.md", "exec"), made)


class Floor(made["Floor"]):
    """The page's, with a suite and a second domain."""

    @staticmethod
    def offers(suite):
        if suite not in ("", "dim"):
            raise LookupError(suite, ["dim"])
        return ("red", "blue"), ("in", "wording")

    def reset(self, seed, task=None, domain="in"):
        seen = super().reset(seed, task, domain)
        if domain == "wording":
            self.instruction = self.instruction.replace("go to", "touch")
        return seen


night = re.search(r"```python\n(from worlds.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)[1]
exec(compile(night, "README.md", "exec"), made)
Night = made["Night"]


class SlowFloor(Floor):
    slow = True


class Guide:
    """The floor's expert as a policy that sees only observations: it finds the block's colour."""

    said = None

    def act(self, observations, instructions, rng):
        plans = np.zeros((len(observations), 4, 3), np.float32)
        for plan, o, words in zip(plans, observations, instructions):
            ink = [200, 0, 0] if "red" in words else [0, 0, 200]
            top = o["images"]["top"].astype(int)
            hit = np.argwhere((np.abs(top - ink).sum(-1)) < 40)
            block = (hit.mean(0) + 0.5 - len(top) * (0.5 + 1 / 80)) / len(top) * 1.2 + 0.5
            plan[:, :2] = 2.5 * (block - o["state"][:2])
        self.said = [f"i see {words}" for words in instructions]
        return plans


@pytest.fixture
def floors(monkeypatch):
    monkeypatch.setitem(loop.WORLDS, "floor", f"{__name__}:Floor")
    monkeypatch.setitem(loop.WORLDS, "slow", f"{__name__}:SlowFloor")
    monkeypatch.setitem(loop.WORLDS, "night", f"{__name__}:Night")
    monkeypatch.setitem(sys.modules, __name__, sys.modules[__name__])
    yield
    data.place.cache_clear()


# --- the contract ---------------------------------------------------------------------------------


@pytest.mark.parametrize("world", ["floor", "night:goal", "tabletop:goal", "tabletop:abc_d"])
def test_a_world_keeps_the_contract(floors, world):
    World, suite = loop.find(world)
    tasks, domains = World.offers(suite)
    assert domains[0] == "in" and World.fps > 0
    here, there = World(suite, 32, 16), World(suite, 32, 16)
    for seed, task, domain in [(3, None, "in"), (4, tasks[0], domains[1]), (3, None, "in")]:
        one, two = here.reset(seed, task, domain), there.reset(seed, task, domain)
        pairs = [(one["images"][c], two["images"][c]) for c in one["images"]]
        assert all(np.array_equal(a, b) and a.dtype == np.uint8 for a, b in pairs)
        assert [len(a) for a, _ in pairs] == [32, 16] and one["state"].dtype == np.float32
        assert here.instruction == there.instruction and not here.success and here.task in tasks
    expert, steps = here.expert(0, 0.0), 0
    while not here.success and steps < here.max_steps:
        here.step(expert.act())
        assert isinstance(expert.reasoning, str) and int(expert.phase) == expert.phase
        steps += 1
    assert here.success and here.observe()["state"].shape == one["state"].shape


class Exact(Floor):
    """Its expert takes what the contract says, no less; and it can be copied."""

    def expert(self, seed, noise):
        return super().expert(seed, noise)

    def state_dict(self):
        return copy.deepcopy(vars(self))

    def load_state_dict(self, state):
        vars(self).update(state)


def test_an_expert_is_asked_for_as_the_contract_says():
    world, scratch = Exact("", 32, 16), Exact("", 32, 16)
    assert score.sight(world, 3, 1)["images"].keys() == {"top", "wrist"}
    assert loop.measures(world) == (["top", "wrist"], 3) and "i must" in score.truth(world)
    assert 0 < score.steps_to_go(world, scratch) < 30 and scratch.success and not world.success


def test_the_readmes_world_is_another_ones_by_night(floors):
    day, dark = (loop.find(name)[0]("bridge", 32, 16).reset(5) for name in ("tabletop", "night"))
    assert all(np.array_equal(dark["images"][c], day["images"][c] // 3) for c in day["images"])


@pytest.mark.parametrize("world, words", [
    ("tabeltop", "unknown --world tabeltop: did you mean tabletop?"),
    ("tabletop:brigde", "did you mean tabletop:bridge?"),
    ("floor:din", "did you mean floor:dim?"),
    ("metaworld:push-v3,rech-v3", "did you mean metaworld:push-v3,reach-v3?"),
    ("metaworld:mt1", "did you mean metaworld:mt"),
])  # fmt: skip
def test_an_unknown_world_names_the_nearest(floors, world, words):
    with pytest.raises(common.UserError) as error:
        loop.find(world)
    assert words in str(error.value).replace("-v3-v3", "-v3") and "\n" not in str(error.value)


def test_a_suite_of_several_tasks_is_one_name_in_a_mixture(floors):
    """`--world metaworld:push-v3,reach-v3` demonstrates itself, also among other --data."""
    wanted = {"metaworld:push-v3,reach-v3": 2.0, "floor": 1.0, "tabletop:goal": 1.0}
    spec = "metaworld:push-v3,reach-v3=2,floor,tabletop:goal"
    assert data.named(spec) == wanted
    assert data.named("metaworld:push-v3,reach-v3") == {"metaworld:push-v3,reach-v3": 1.0}


@pytest.mark.parametrize("world", ["floor", "slow"])
def test_a_policy_that_looks_reaches_every_goal(floors, world, tmp_path):
    """In this process or in others; the film shows cameras, trace, words and the end."""
    cfg = replace(twinbrain.Config(), world=world, episodes=7, parallel=4, gifs=1, size=64)
    said = []
    got = loop.evaluate(Guide(), cfg, ALONE, tmp_path, said.append)
    assert {d: r["success"] for d, r in got.items()} == {"in": 1.0, "wording": 1.0}
    assert got["in"]["per_task"] == {"red": 1.0, "blue": 1.0} and got["in"]["episodes"] == 7
    film = Image.open(tmp_path / "rollout-in-0.gif")
    assert 1 < film.n_frames < 30 and film.width > 3 * 256  # two cameras and a trace
    film.seek(film.n_frames - 1)
    green = film.convert("RGB").getpixel((0, 40))
    assert green[1] > 120 > max(green[0], green[2])


def test_a_crews_mistake_comes_home(floors):
    with loop.Crew("slow", 3, 32, 16) as crew:
        crew.ask({i: ("reset", i) for i in range(3)})
        seen = crew.ask({2: ("observe",), 0: ("observe",)})
        assert set(seen) == {0, 2} and crew.facts[1][0] is False
        alone = Floor("", 32, 16)
        assert np.array_equal(alone.reset(2)["images"]["top"], seen[2]["images"]["top"])
        with pytest.raises(RuntimeError, match="no_such"):
            crew.ask({1: ("no_such",)})
        assert not crew.hands
    assert score.knows("tabletop") and not score.knows("floor")


def test_demonstrations_of_any_world_are_cached(floors, monkeypatch, tmp_path):
    monkeypatch.setattr(data, "CACHE", tmp_path)
    made = data.demonstrations("slow:dim", 5, 0, 32, 16, 0.0)
    monkeypatch.setattr(data, "ProcessPoolExecutor", None)
    read = data.demonstrations("slow:dim", 5, 0, 32, 16, 0.0)
    assert len(made) == len(read) == 5 and [p.name[:9] for p in tmp_path.iterdir()] == ["slow-dim-"]
    for a, b in zip(made, read):
        assert a.action.shape == (len(a.reasoning), 3) and a.state.shape[1] == 3 and a.fps == 10.0
        assert np.array_equal(a.action, b.action) and a.task == b.task in ("red", "blue")
    made[0].failed = ["red"]
    assert data.expert_rates(made).startswith("the expert succeeded in 83.3% of its tries red ")
    labels = dualvla.action_labels(made[0])
    assert labels.shape == (len(made[0].action),) and labels.dtype == bool
    assert events.move_name(events.hand(made[0]), 0).startswith("move ")


SMALL = ["--world", "floor", "--demos", "6", "--steps", "2", "--log-every", "1", "--episodes", "2",
         "--gifs", "1", "--batch", "4", "--width", "32", "--depth", "1", "--heads", "2",
         "--threads", "1", "--device", "cpu", "--parallel", "2", "--domains", "in"]  # fmt: skip
OWN = {
    "twinbrain": ["--questions", "2", "--execute", "8"],
    "vita_vla": ["--queries", "2", "--foresight", "1", "--history", "2", "--recipe",
                 "only-finetune"],
    "dualvla": ["--stage", "expert", "--questions", "2", "--queries", "2", "--rank", "2", "--talk",
                "2", "--events", "phase", "--execute", "8"],
}  # fmt: skip


@pytest.mark.parametrize("script", [
    twinbrain, *(pytest.param(s, marks=pytest.mark.slow) for s in (vita_vla, dualvla)),
], ids=list(OWN))  # fmt: skip
def test_a_script_takes_its_sizes_from_the_world(floors, script, tmp_path):
    """Three numbers of action and of state, where the tabletop has seven and eight."""
    script.main([*SMALL, *OWN[script.__name__], "--out", str(tmp_path / "run")])
    (folder,) = {p.parent for p in tmp_path.rglob("rollout-in-0.gif")} - {
        tmp_path / "run" / "teacher"
    }
    policy = script.load_policy(folder, torch.device("cpu"))
    assert len(policy.stats["action"]["q01"]) == len(policy.stats["state"]["q01"]) == 3
    world = Floor("", 64, 32)
    seen = world.reset(1) | {"memory": {}}
    plan = policy.act([seen], [world.instruction], np.random.default_rng(0))
    assert plan.shape[0] == 1 and plan.shape[2] == 3 and np.isfinite(plan).all()


# --- Meta-World, without its simulator ------------------------------------------------------------


class FakeSimulator:
    """What MetaWorld uses of an environment: seed(), reset(), step() and where the goal is. The
    hand moves a centimetre a step and takes the puck along; see the test of the real one."""

    def seed(self, seed):
        self.rng = np.random.default_rng(seed)

    def obs(self):
        rest = np.zeros(29)
        return np.concatenate([self.hand, [self.gap], self.puck, rest, self._target_pos])

    def reset(self):
        self.hand, self.gap = np.array([0.0, 0.6, 0.2]), 1.0
        self.puck = np.array([*self.rng.uniform([-0.1, 0.6], [0.1, 0.7]), 0.02])
        self._target_pos = np.array([*self.rng.uniform([-0.1, 0.8], [0.1, 0.9]), 0.02])
        return self.obs(), {}

    def step(self, action):
        assert action.shape == (4,) and np.abs(action).max() <= 1
        self.gap = 1.0 if action[3] <= 0 else 0.4  # an effort closes
        before, self.hand = self.hand, self.hand + action[:3] / 100
        if np.linalg.norm(before - self.puck) < 0.05 and self.gap < 0.5:
            self.puck = self.puck + [*(self.hand - before)[:2], 0]
        near = np.linalg.norm(self.puck - self._target_pos) < 0.05
        return self.obs(), 0.0, False, False, {"success": float(near)}


class FakeScript:
    def get_action(self, obs):
        hand, puck, goal = obs[:3], obs[4:7], obs[-3:]
        above = np.linalg.norm((hand - puck)[:2]) > 0.02
        held = np.linalg.norm(hand - puck) < 0.04
        aim = puck + [0, 0, 0.15] if above else goal + [0, 0, 0.03] if held else puck + [0, 0, 0.03]
        return np.array([*(10 * 10 * (aim - hand)), 0.6 if held else 0.0])


def fake_draw(env, task, side):
    views = [np.zeros((side, side, 3), np.uint8) for _ in range(2)]
    for view in views:
        view[tuple((side * np.clip(env.puck[:2], 0, 0.99)).astype(int))] = 255
    return views


@pytest.fixture
def faked(monkeypatch):
    monkeypatch.setattr(metaworld, "need", lambda: None)
    monkeypatch.setattr(metaworld, "simulator", lambda task: FakeSimulator())
    monkeypatch.setattr(metaworld, "script", lambda task: FakeScript())
    monkeypatch.setattr(metaworld, "draw", fake_draw)
    data.place.cache_clear()
    yield
    data.place.cache_clear()


def test_fifty_tasks_have_words():
    assert len(metaworld.TASKS) == 50
    for task, (thing, *words) in metaworld.TASKS.items():
        assert task.endswith("-v3") and thing and len(set(words)) == 3, task
    for name, many in (("", 10), ("mt10", 10), ("mt50", 50), ("push,reach-v3", 2)):
        tasks, domains = metaworld.MetaWorld.offers(name)
        assert len(tasks) == many and domains == ("in", "wording")
        assert all(task in metaworld.TASKS for task in tasks)
    seen = [words for _, *known, unseen in metaworld.TASKS.values() for words in known]
    assert not {row[3] for row in metaworld.TASKS.values()} & set(seen)


@pytest.mark.parametrize("noise", [0.0, 1.0])
def test_metaworld_is_recorded_through_its_interface(faked, noise):
    made = [data.record("metaworld:push-v3", seed, 32, 16, noise) for seed in range(4)]
    again = data.record("metaworld:push-v3", 3, 32, 16, noise)
    assert np.array_equal(made[3].action, again.action)  # nothing is left of those before it
    for e in made:
        T = len(e.action)
        assert e.action.shape == (T, 4) and np.abs(e.action).max() <= 1 and e.state.shape == (T, 4)
        assert e.images["static"].shape == (T, 32, 32, 3) and e.images["wrist"].shape[1] == 16
        assert e.task == "push-v3" and e.instruction in metaworld.TASKS["push-v3"][1:3]
        assert set(e.action[:, 3]) == {np.float32(1), np.float32(-0.6)}  # open, or its effort
        phases = [metaworld.PHASES[p] for p in e.phase]
        assert phases[0] in ("reach", "descend") and phases[-1] == "work" and "descend" in phases
        assert all(s.endswith("because i must push the puck to the goal") for s in e.reasoning)
    alike = [np.diff(e.state[:, :3], axis=0) * 100 - e.action[:-1, :3] for e in made]
    assert (max(np.abs(d).max() for d in alike) > 0.1) == (noise > 0)  # labels stay the script's


def test_new_seeds_bring_new_goals_and_new_words(faked):
    world = metaworld.MetaWorld("push-v3", 32, 16)
    goals = set()
    for seed in range(5):
        world.reset(seed)
        goals.add(tuple(world.env._target_pos))
    assert len(goals) == 5
    world.reset(0, "push-v3", "wording")
    assert world.instruction == metaworld.TASKS["push-v3"][3]


@pytest.mark.parametrize("where, words", [
    ((0.0, 0.01, -0.2), "below"), ((0.0, 0.01, -0.01), "at"), ((0.2, 0.1, 0.0), "right of"),
    ((-0.2, 0.1, 0.0), "left of"), ((0.0, 0.3, 0.0), "behind"), ((0.1, -0.3, 0), "in front of"),
])  # fmt: skip
def test_where_a_thing_is_in_words(where, words):
    assert metaworld.relation(np.array(where)) == words


def test_without_the_extra_one_line_says_so(monkeypatch, status, tmp_path):
    monkeypatch.setitem(sys.modules, "metaworld", None)
    monkeypatch.setattr(data, "CACHE", tmp_path)
    out = ["--out", str(tmp_path / "run")]
    code, _, err = status(twinbrain.main, "--world", "metaworld:push-v3", "--demos", "1", *out)
    assert code == 2 and err.splitlines()[-1].startswith("error: ") and "onefile-vla[sim]" in err


# --- Meta-World itself ----------------------------------------------------------------------------

installed = pytest.mark.skipif(
    importlib.util.find_spec("metaworld") is None or importlib.util.find_spec("mujoco") is None,
    reason="the [sim] extra is not installed",
)


@pytest.fixture(scope="module")
def real():
    try:
        world = metaworld.MetaWorld("push-v3,drawer-open-v3", 64, 32)
        world.reset(1)
    except common.UserError as error:
        pytest.skip(str(error))
    return world


@installed
def test_the_experts_of_metaworld_succeed(real):
    for task in real.tasks:
        real.reset(7, task)
        before, expert, said = real.env._target_pos.copy(), real.expert(0, 0.3), set()
        while not real.success and real.steps < real.max_steps:
            real.step(expert.act())
            said.add(expert.reasoning)
        assert real.success and 20 < real.steps < 200 and len(said) > 3
        real.reset(8, task)
        assert not np.allclose(real.env._target_pos, before)


@installed
def test_metaworld_repeats_itself(real):
    seen = []
    for other in (5, 6):  # whatever came before
        real.reset(other, "push-v3")
        real.step(np.ones(4))
        observation = real.reset(4, "push-v3")
        seen.append((observation["images"]["static"], real.obs.copy(), real.instruction))
    assert np.array_equal(seen[0][0], seen[1][0]) and np.allclose(seen[0][1], seen[1][1])
    assert seen[0][2] == seen[1][2]


@installed
def test_the_goal_is_seen_where_it_is(real):
    """Its green ball, also after a step, which moves its mark elsewhere."""
    sums = []
    for seed in (1, 2):
        real.reset(seed, "push-v3")
        real.step(np.zeros(4))
        static = real.observe()["images"]["static"].astype(int)
        green = static[..., 1] - np.maximum(static[..., 0], static[..., 2])
        assert green.max() > 60
        sums.append(np.argwhere(green > 40).mean(0))
    assert np.linalg.norm(sums[0] - sums[1]) > 1


@installed
def test_the_fake_is_like_the_real_one(real):
    real.reset(3, "push-v3")
    fake = FakeSimulator()
    fake.seed(0)
    (ours, _), (its, _) = fake.reset(), real.env.reset()
    assert ours.shape == its.shape == (39,) and np.allclose(its[-3:], real.env._target_pos)
    a, b = fake.step(np.zeros(4)), real.env.step(np.zeros(4, np.float32))
    assert len(a) == len(b) and a[0].shape == b[0].shape and set(a[4]) <= set(b[4])
    assert metaworld.script("push-v3").get_action(its).shape == FakeScript().get_action(its).shape


# --- films ----------------------------------------------------------------------------------------


def test_blocks_are_two_pixels_a_character():
    image = np.zeros((4, 3, 3), np.uint8)
    image[0], image[1] = (255, 0, 0), (0, 0, 255)
    rows = pictures.blocks(image, 3, 2).split("\r\n")
    assert len(rows) == 2 and rows[0].count("▀") == 3
    assert rows[0].startswith("\x1b[38;2;255;0;0;48;2;0;0;255m▀")
    assert len(pictures.blocks(np.zeros((64, 64, 3), np.uint8), 20, 5).split("\r\n")) == 5


def test_a_trace_is_high_where_the_action_is():
    sheet = pictures.trace([np.array([1.0, -1.0])] * 60, 100)
    assert sheet.shape == (100, 100, 3)
    ink = np.argwhere((sheet < 200).any(-1))[:, 0]
    assert (ink < 10).any() and (ink > 90).any() and not ((ink > 40) & (ink < 60)).any()


def test_a_film_becomes_mp4(tmp_path):
    av = pytest.importorskip("av", reason="the [data] extra is not installed")
    frames = [Image.new("RGB", (65, 41 + i), (40 * i, 0, 0)) for i in range(5)]
    pictures.render(tmp_path / "film", frames, 10, "mp4")
    with av.open(str(tmp_path / "film.mp4")) as file:
        shots = [frame.to_ndarray(format="rgb24") for frame in file.decode(video=0)]
    assert len(shots) == 5 and shots[0].shape == (44, 64, 3) and shots[4][10, 10, 0] > 120


def test_a_film_that_cannot_be_is_refused_before_the_run(monkeypatch, status, tmp_path):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda n: None if n == "av" else find(n))
    for how, words in (("mp4", "needs av: pip install 'onefile-vla[data]'"), ("show", "terminal")):
        code, _, err = status(twinbrain.main, "--render", how, "--out", str(tmp_path / "run"))
        assert code == 2 and words in err and not (tmp_path / "run").exists()


def test_a_film_is_played(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    frames = [Image.new("RGB", (8, 8), "red"), Image.new("RGB", (8, 8), "blue")]
    pictures.render(tmp_path / "film", frames, 10, "show")
    out = capsys.readouterr().out
    assert (tmp_path / "film.gif").exists() and out.count("\x1b[H") == 2
    assert out.index("38;2;255;0;0") < out.index("38;2;0;0;255")


# --- by hand --------------------------------------------------------------------------------------


class Driven:
    """`python worlds/tabletop.py` on a terminal of its own."""

    def __init__(self, *words):
        self.ours, theirs = pty.openpty()
        termios.tcsetwinsize(theirs, (24, 90)) if hasattr(termios, "tcsetwinsize") else None
        self.before, self.theirs = termios.tcgetattr(theirs), theirs
        env = os.environ | {"COLUMNS": "90", "LINES": "24"}
        how = dict(stdin=theirs, stdout=theirs, stderr=theirs, env=env, start_new_session=True)
        # where the tests run in the background Ctrl-C is ignored, and a child inherits that
        how["preexec_fn"] = lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)
        command = [sys.executable, "worlds/tabletop.py", *words]
        self.process = subprocess.Popen(command, cwd=ROOT, **how)

    def read_until(self, words, seconds=30):
        text, end = "", time.monotonic() + seconds
        while words not in text and time.monotonic() < end:
            if select.select([self.ours], [], [], 0.1)[0]:
                text += os.read(self.ours, 65536).decode(errors="ignore")
        assert words in text, text[-300:]
        return text

    def press(self, keys):
        os.write(self.ours, keys.encode())

    def end(self, code):
        rest = self.read_until("\x1b[?1049l")
        assert self.process.wait(10) == code
        assert termios.tcgetattr(self.theirs) == self.before  # as it was
        os.close(self.ours), os.close(self.theirs)
        return rest


def test_a_person_drives_with_keys():
    driven = Driven("goal:press_button", "3")
    first = driven.read_until("step 0, hand open")
    assert "\x1b[?1049h" in first and "button" in first and first.count("▀") > 500
    driven.press("d")
    assert driven.read_until("step 1, hand open").count("▀") > 500
    driven.press(" ")
    driven.read_until("step 2, hand closed")
    driven.press("\x1b[A\x1b[A?")  # arrows, and a key that means nothing
    driven.read_until("step 4,")
    driven.press("p" * 60)
    driven.read_until("SUCCESS")
    driven.press("n")
    driven.read_until("step 0,")
    driven.press("x")
    driven.end(0)


@pytest.mark.parametrize("number, code", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_the_terminal_is_given_back(number, code):
    driven = Driven()
    driven.read_until("step 0,")
    driven.process.send_signal(number)
    driven.end(code)


def test_keys_move_what_they_should():
    world = Tabletop("bridge", 16, 16)
    hand = terminal.Hand(world, 3, None, 7)
    for key, place, way in (("d", 0, 1), ("w", 1, 1), ("f", 2, -1), ("u", 3, 1), ("e", 5, -1)):
        before = list(world.pose)
        hand.press(key)
        change = np.subtract(world.pose, before)
        assert np.sign(change[place]) == way and np.abs(np.delete(change, place)).max() < 1e-9
    assert terminal.split("a\x1b[Aq\x1b") == ["a", "\x1b[A", "q", "\x1b"]


def test_driving_needs_a_terminal_and_a_task(capsys):
    for words, named in (
        (["bridge"], "terminal"), (["brigde"], "bridge"), (["bridge:stak"], "stack_block"),
        (["bridge", "one"], "one"),
    ):  # fmt: skip
        assert terminal.main(Tabletop, words) == 2
        assert named in capsys.readouterr().err
