"""The real simulators' files against recorded interfaces: fake environments with the observations,
shapes and action spaces of the real ones. No simulator is needed."""

import json
import math
import pickle
import threading
from functools import lru_cache
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

import common
import data
from parts import formats
from worlds import calvin, client, libero, loop, robocasa, simpler

FILES = {"calvin": calvin, "libero": libero, "simpler": simpler, "robocasa": robocasa}


@lru_cache
def picture(*shape):
    return np.random.default_rng(0).integers(0, 256, shape, np.uint8)


# --- the client -----------------------------------------------------------------------------------


class Box:
    """A world that ends after `goal` steps."""

    width, instruction = 7, "do it"

    def __init__(self, goal=99, max_steps=10):
        self.goal, self.max_steps, self.steps, self.done = goal, max_steps, 0, []

    @property
    def success(self):
        return self.steps >= self.goal

    def observe(self):
        return {"images": {"static": picture(8, 8, 3)}, "state": np.arange(8)}

    def step(self, action):
        self.steps += 1
        self.done.append(action)


class Planner:
    """Chunk k is full of k's, but for the row's number in front."""

    metadata = {"server": "a test"}

    def __init__(self, H):
        self.H, self.asked, self.resets = H, 0, 0

    def reset(self):
        self.resets += 1

    def infer(self, observation, prompt, width):
        self.asked += 1
        return np.hstack([np.arange(self.H)[:, None], np.full((self.H, width - 1), self.asked)])


@pytest.fixture
def served():
    """Starts a server that answers with reply(message) -> its address; `seen` holds messages."""
    pytest.importorskip("websockets")
    msgpack = pytest.importorskip("msgpack")
    from websockets.sync.server import serve

    running, seen = [], []

    def start(reply, about=None):
        def handle(socket):
            socket.send(msgpack.packb(about or {"server": "onefile-vla"}))
            for raw in socket:
                seen.append(msgpack.unpackb(raw, object_hook=client.unpack_array))
                answer = reply(seen[-1])
                words = isinstance(answer, str)
                socket.send(answer if words else msgpack.packb(answer, default=client.pack_array))

        server = serve(handle, "127.0.0.1", 0)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        running.append(server)
        return f"127.0.0.1:{server.socket.getsockname()[1]}"

    yield SimpleNamespace(start=start, seen=seen)
    for server in running:
        server.shutdown()


def test_what_goes_over_the_wire(served):
    actions = np.full((4, 7), 0.25, np.float32)
    policy = client.Server(served.start(lambda message: {"actions": actions}))
    world = Box(goal=5)
    assert client.play(world, policy, execute=2) and len(served.seen) == 3
    first, second, _ = served.seen
    assert set(first) == {"observation/image", "observation/state", "prompt", "reset"}
    assert first["observation/image"].dtype == np.uint8 and first["prompt"] == "do it"
    assert first["observation/state"].dtype == np.float32 and "reset" not in second
    assert np.array_equal(first["observation/image"], world.observe()["images"]["static"])


def test_a_foreign_server_gets_no_reset(served):
    reply = {"actions": np.zeros((1, 7), np.float32)}
    policy = client.Server(served.start(lambda message: reply, {"model": "pi0"}))
    client.play(Box(goal=1), policy)
    assert "reset" not in served.seen[0]


def test_a_server_that_compiles_is_waited_for(served):
    """openpi's answers no pings while it plans; whoever pings it gives up after 40 s."""
    policy = client.Server(served.start(lambda message: {"actions": np.zeros((1, 7))}))
    assert getattr(policy.socket, "ping_interval", None) is None


@pytest.mark.parametrize("says, value, opened", [
    ("unit", 0.7, 1), ("unit", 0.3, 0), ("plus", 0.3, 1), ("plus", -1, 0), ("minus", -0.2, 1),
    ("minus", 1, 0)])  # fmt: skip
def test_the_grippers_convention(served, says, value, opened):
    reply = {"actions": np.full((2, 7), value, np.float32)}
    policy = client.Server(served.start(lambda message: reply), gripper=says)
    chunk = policy.infer(Box().observe(), "go", 7)
    assert chunk[:, 6].tolist() == [opened] * 2 and np.allclose(chunk[:, :6], value)


def test_the_gripper_of_the_server_is_the_clients(served):
    """Else the hand would close where it should open, and no episode would tell why."""
    address = served.start(None, {"gripper": "minus"})
    with pytest.raises(common.UserError, match="has --gripper minus: say so here too"):
        client.Server(address)
    client.Server(address, gripper="minus")
    with pytest.raises(common.UserError, match="has --gripper closed"):
        client.Server(served.start(None, {"gripper": "closed"}))
    for about in ({"gripper": "trained"}, {"server": "pi0"}):
        client.Server(served.start(None, about))


@pytest.mark.parametrize("reply, words", [
    ("error: the message lacks observation/state", "lacks observation/state"),
    ({"actions": np.zeros((2, 8))}, "actions of 8 numbers, this world takes 7"),
    ({"actions": np.full((2, 7), np.nan)}, "not finite"),
    ({"answer": 1}, "sent no actions"),
    ([1, 2], "sent list")])  # fmt: skip
def test_a_bad_answer_is_one_line(served, reply, words):
    policy = client.Server(served.start(lambda message: reply))
    with pytest.raises(common.UserError, match=words):
        policy.infer(Box().observe(), "go", 7)


def test_nobody_answers():
    pytest.importorskip("websockets")
    with pytest.raises(common.UserError) as error:
        client.Server("127.0.0.1:9")
    words = str(error.value)
    assert "host 127.0.0.1, port 9" in words and "worlds/serve.py" in words and "\n" not in words
    for address in ("nowhere", "host:", "host:99999", ":8000"):
        with pytest.raises(common.UserError, match="HOST:PORT"):
            client.Server(address)


def test_only_numbers_are_unpacked():
    fields = {b"__ndarray__": True, b"data": b"", b"dtype": "|O", b"shape": [0]}
    with pytest.raises(ValueError, match="object"):
        client.unpack_array(fields)


def test_chunks_are_executed_as_asked():
    world, policy = Box(max_steps=10), Planner(H=4)
    assert not client.play(world, policy, execute=3)
    assert policy.resets == 1 and policy.asked == 4 and world.steps == 10
    assert [a[0] for a in world.done] == [0, 1, 2, 0, 1, 2, 0, 1, 2, 0]
    world, policy = Box(max_steps=6), Planner(H=2)  # a shorter chunk: all of it
    client.play(world, policy, execute=12)
    assert [a[0] for a in world.done] == [0, 1] * 3


def test_the_ensemble_blends_the_last_chunks():
    world, policy = Box(max_steps=5), Planner(H=16)
    client.play(world, policy, ensemble=2)
    chunks = [Planner(16)]
    made = [chunks[0].infer(None, "", 7) for _ in range(5)]
    assert policy.asked == 5 and np.allclose(world.done[0], made[0][0])
    for t in range(1, 5):
        assert np.allclose(world.done[t], client.blend(made[t - 1 : t + 1]))
    assert loop.blend is client.blend


def test_intervals_are_those_of_the_models():
    for won, n in ((0, 0), (0, 5), (3, 7), (24, 24), (171, 480)):
        assert np.allclose(client.ci95(won, n), common.ci95(won, n))


def test_an_average_lies_in_its_interval():
    """Tasks with few episodes count as much as others, and make it less sure."""
    even = client.mean([client.rate([1] * 30 + [0] * 20), client.rate([1] * 10 + [0] * 40)])
    assert even["success"] == 0.4 and np.allclose(even["ci95"], common.ci95(40, 100))
    odd = client.mean([client.rate([1] * 10), client.rate([0] * 1000), None])
    low, high = odd["ci95"]
    assert odd["success"] == 0.5 and odd["episodes"] == 1010
    assert low < 0.5 < high and np.allclose(odd["ci95"], common.ci95(19.8, 39.6), atol=0.001)


def test_every_start_of_every_task_is_acted_from_once(tmp_path):
    begun, said, policy = [], [], Planner(H=4)
    world = Box(goal=2)
    world.reset = lambda i, task: (begun.append((task, i)), setattr(world, "steps", 0))
    results = client.Results("libero", tmp_path / "r.json", {}, policy, {})
    many = {t: libero.episodes(libero.PROTOCOLS["vita"] | {"episodes": 30}, t)
            for t in ("goal/a", "long/b")}  # fmt: skip
    client.evaluate(world, policy, {"execute": 4, "ensemble": 0}, results, many, said.append)
    assert begun == [("goal/a", i) for i in range(30)] + [("long/b", i) for i in range(20)]
    assert len(said) == policy.resets == 50 and said[-1].startswith("long/b 20: success; so far")


def test_films_show_the_first_goals(tmp_path):
    """Every second step and the end, with a border that tells how it ended."""
    results = client.Results("libero", tmp_path / "r.json", {}, Planner(1), {}, gifs=2)
    world = Box(goal=3)
    world.reset = lambda i, task: setattr(world, "steps", 0)
    many = {"goal/a": 3}
    client.evaluate(world, Planner(H=4), {"execute": 4, "ensemble": 0}, results, many, str)
    films = sorted(path.name for path in tmp_path.glob("*.gif"))
    assert films == ["r-000-goal-a.gif", "r-001-goal-a.gif"]
    film = Image.open(tmp_path / films[0])
    assert film.n_frames >= 3
    film.seek(film.n_frames - 1)
    red, green, blue = film.convert("RGB").getpixel((1, 1))
    assert green > 120 > max(red, blue)  # reached


def test_a_gripper_of_unknown_sign_is_asked_for(served):
    about = {"server": "onefile-vla", "gripper": "trained", "action_low": [-0.1] * 6 + [-1.0]}
    for opens in ("unit", "plus"):
        client.Server(served.start(None, about | {"opens": opens}))
    address = served.start(None, about | {"opens": ""})
    with pytest.raises(common.UserError, match="--gripper plus or minus says it"):
        client.Server(address)
    client.Server(address, gripper="minus")


def test_out_names_a_file(tmp_path):
    for out in (tmp_path, tmp_path / "none" / "r.json"):
        with pytest.raises(common.UserError, match="--out .*: a file's name is needed"):
            client.Results("libero", out, {}, Planner(1), {})


def test_results_are_written_as_they_come(tmp_path):
    policy, path = SimpleNamespace(metadata={"method": "x"}), tmp_path / "r.json"
    results = client.Results("calvin", path, {"episodes": 2}, policy, {"numpy": "numpy"})
    for task, won in (("a", True), ("a", False), ("b", True)):
        results.add(task, won, 7)
    results.lengths = [2, 0]
    results.write()
    out = json.loads(path.read_text())
    assert out["tasks"]["a"] == {"success": 0.5, "ci95": list(common.ci95(1, 2)), "episodes": 2}
    assert [c["success"] for c in out["chain"]] == [0.5, 0.5, 0, 0, 0] and out["length"] == 1
    assert out["steps"] == 21 and out["versions"]["numpy"] == np.__version__
    assert not out["complete"] and out["server"] == {"method": "x"}


def test_results_say_their_command_but_no_secret(tmp_path, monkeypatch):
    for secret in (["--token", "geheim"], ["--token=geheim"]):
        argv = ["worlds/libero.py", "--episodes", "3", *secret, "--gifs", "1"]
        monkeypatch.setattr(client.sys, "argv", argv)
        results = client.Results("libero", tmp_path / "r.json", {}, Planner(1), {})
        results.write()
        text = (tmp_path / "r.json").read_text()
        assert "geheim" not in text and "python worlds/libero.py --episodes 3 --token" in text
        assert json.loads(text)["command"].endswith(" --gifs 1") and json.loads(text)["machine"]


def test_another_protocol_is_no_comparison(tmp_path):
    results = client.Results("libero", tmp_path / "r.json", {}, Planner(1), {})
    for published, full, warned in ((1, 1, False), (0, 1, True), (1, 0, True)):
        lines = []
        client.close(results, {"published": published}, lambda done: {}, {}, full, lines.append)
        assert any("not the paper's protocol" in line for line in lines) is warned


def test_a_papers_number_says_that_it_is():
    lines = []
    rows = {"a": client.rate([1, 0]), "b": None}
    client.table(rows, {"P": {"a": 87.5}}, lines.append)
    assert "50.0" in lines[1] and "87.5 (paper)" in lines[1]
    assert "not run" in lines[2] and "(paper)" not in lines[2]


# --- the command lines ----------------------------------------------------------------------------


@pytest.mark.parametrize("name", FILES)
def test_help_states_the_install_command(status, name):
    code, out, err = status(FILES[name].main, "-h")
    assert code == 0 and "pip install" in out and "--server" in out and not err


@pytest.mark.parametrize("name", FILES)
def test_an_absent_simulator_is_one_line(status, name, monkeypatch):
    monkeypatch.delenv("CALVIN_ROOT", raising=False)
    monkeypatch.setattr(libero, "find_spec", lambda name: None)
    for package in ("mani_skill2_real2sim", "mani_skill2_real2sim.envs", "robocasa"):
        monkeypatch.setitem(__import__("sys").modules, package, None)
    code, _, err = status(FILES[name].main)
    assert code == 2 and err.count("\n") == 1 and "pip install" in err


@pytest.mark.parametrize("name", FILES)
def test_an_unknown_flag_names_the_nearest(status, name):
    code, _, err = status(FILES[name].main, "--episode", "3")
    assert code == 2 and err.count("\n") == 1 and "--episodes" in err


def test_the_command_line_changes_the_protocol():
    p = client.parser("", "x", "", seeded=True)
    protocol = {"episodes": 50, "execute": 8, "ensemble": 7, "seed": 3}
    same = client.settings(p.parse_args([]), protocol, suite="a")
    assert same == protocol | {"suite": "a", "gripper": "unit", "published": True}
    words = "--episodes 2 --execute 4 --ensemble 0 --seed 0 --gripper minus".split()
    other = client.settings(p.parse_args(words), protocol)
    assert other == {"episodes": 2, "execute": 4, "ensemble": 0, "seed": 0, "gripper": "minus",
                     "published": False}  # fmt: skip
    for words, same in (("--seed 1", True), ("--execute 8", True), ("--ensemble 0", False)):
        assert client.settings(p.parse_args(words.split()), protocol)["published"] is same
    for flag in ("--episodes", "--execute", "--ensemble", "--seed"):
        with pytest.raises(common.UserError, match=flag):
            client.settings(p.parse_args([flag, "-2"]), protocol)


def test_unknown_tasks_name_the_nearest(status):
    for main, words, near in ((simpler.main, ("--tasks", "carot"), "carrot"),
                              (libero.main, ("--suites", "gaol"), "goal"),
                              (robocasa.main, ("--tasks", "PnPCan"), "PnPCanTo")):  # fmt: skip
        code, _, err = status(main, *words)
        assert code == 2 and near in err


# --- CALVIN ---------------------------------------------------------------------------------------

TABLES = '''
task_categories = {"open": 1, "close": 1, "push": 2, "light": 3, "dark": 3, "lift": 4, "place": 5,
                   "slide": 6}
tasks = {
    "open": [{"condition": {"drawer": "closed", "grasped": 0}, "effect": {"drawer": "open"}}],
    "close": [{"condition": {"drawer": "open", "grasped": 0}, "effect": {"drawer": "closed"}}],
    "push": [{"condition": {"red_block": ["table", "slider_left"]}, "effect": {}}],
    "light": [{"condition": {"led": 0}, "effect": {"led": 1}}],
    "dark": [{"condition": {"led": 1}, "effect": {"led": 0}}],
    "lift": [{"condition": {"grasped": 0}, "effect": {"grasped": 1}}],
    "place": [{"condition": {"grasped": 1}, "effect": {"grasped": 0}}],
    "slide": [{"condition": {"slider": "left"}, "effect": {"slider": "right"}},
              {"condition": {"slider": "right"}, "effect": {"slider": "left"}}],
}
'''  # fmt: skip
PLACING = """
import a_package_that_is_not_there

def get_env_state_for_initial_condition(initial_condition):
    with temp_seed(hasher(str(initial_condition.values()))):
        return np.arange(15.0), np.random.uniform(0, pi, 24)
"""


@pytest.fixture
def clone(tmp_path, monkeypatch):
    """What a clone of mees/calvin looks like, as far as it is read."""
    for name, text in ((calvin.SEQUENCES, TABLES), (calvin.STATES, PLACING)):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    for name in (calvin.ORACLE, calvin.SENTENCES, calvin.Path("calvin_env/conf/x")):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("")
    draw = calvin.chains
    monkeypatch.setattr(calvin, "kept_chains", lambda root: draw(root, 40))
    tasks = calvin.literal(tmp_path / calvin.SEQUENCES, "tasks")
    made = PlayTable(), Oracle(), {task: [f"please {task}"] for task in tasks}
    monkeypatch.setattr(calvin, "build", lambda root, dataset, egl: made)
    return tmp_path


class PlayTable:
    """calvin_env's PlayTableSimEnv as its step, reset, get_obs and get_info look."""

    def __init__(self):
        self.got, self.count, self.resets = [], 0, 0

    def obs(self):
        shots = {"rgb_static": picture(200, 200, 3), "rgb_gripper": picture(84, 84, 3)}
        return {"rgb_obs": shots, "depth_obs": {}, "robot_obs": np.zeros(15),
                "scene_obs": np.zeros(24)}  # fmt: skip

    def reset(self, robot_obs, scene_obs):
        assert robot_obs.shape == (15,) and scene_obs.shape == (24,)
        self.resets += 1
        return self.obs()

    def get_info(self):
        return {"count": self.count}

    def step(self, action):
        assert action.dtype == np.float64 and action.shape == (7,) and action[6] in (-1, 1)
        self.got.append(action)
        self.count += 1
        return self.obs(), 0, False, self.get_info()


class Oracle:
    """A sub-task takes three steps; "open" is never done."""

    def get_task_info_for_set(self, start, end, tasks):
        return {t for t in tasks if end["count"] - start["count"] >= 3 and t != "open"}


def test_chains_are_possible_and_always_the_same(clone):
    rows = calvin.chains(clone, 40)
    tasks, kinds = (
        calvin.literal(clone / calvin.SEQUENCES, n) for n in ("tasks", "task_categories")
    )
    assert len(rows) == 40 and calvin.digest(rows) == calvin.digest(calvin.chains(clone, 40))
    for start, plan in rows:
        blocks = [start[b] for b in ("red_block", "blue_block", "pink_block")]
        assert blocks.count("table") in (1, 2) and len(plan) == 5
        assert len({kinds[t] for t in plan}) == 5
        state = dict(start)
        for task in plan:
            found = [e for e in tasks[task] if all(
                state[k] in v if isinstance(v, list) else state[k] == v
                for k, v in e["condition"].items())]  # fmt: skip
            assert len(found) == 1
            state |= found[0]["effect"]


def test_the_hash_that_seeds_the_blocks(clone):
    assert calvin.fnv1("test") == 3910690890  # pyhash's own test vector for text
    place, start = calvin.placing(clone), {"led": 1}
    assert np.array_equal(place(start)[1], place(start)[1])
    assert not np.array_equal(place(start)[1], place({"led": 0})[1])


def test_calvin_speaks_as_its_environment_does(clone):
    world = calvin.Calvin(clone)
    plan = world.chain(0)
    seen = world.observe()
    assert seen["images"]["static"].shape == (200, 200, 3) and seen["state"].shape == (15,)
    assert seen["images"]["wrist"].shape == (84, 84, 3) and seen["state"].dtype == np.float32
    assert world.instruction == f"please {plan[0]}" and world.max_steps == 360
    world.step(np.array([0.1] * 6 + [1.0]))
    world.step(np.array([0.1] * 6 + [0.0]))
    assert [a[6] for a in world.env.got] == [1, -1] and not world.success


def test_a_chain_ends_at_its_first_failure(clone, tmp_path):
    world, policy = calvin.Calvin(clone), Planner(H=1)
    world.max_steps = 4
    protocol = {"episodes": 12, "execute": 1, "ensemble": 0}
    results = client.Results("calvin", tmp_path / "r.json", protocol, policy, {})
    calvin.evaluate(world, policy, protocol, results, say=lambda words: None)
    plans = [plan for _, plan in world.chains[:12]]
    want = [plan.index("open") if "open" in plan else 5 for plan in plans]
    assert results.lengths == want and world.env.resets == 12
    out = json.loads((tmp_path / "r.json").read_text())
    assert math.isclose(out["length"], np.mean(want))
    assert [c["success"] for c in out["chain"]] == [
        np.mean([n >= k for n in want]) for k in range(1, 6)
    ]
    assert out["tasks"]["open"]["success"] == 0 and policy.resets == sum(n + (n < 5) for n in want)


class Parts:
    """What the expert asks of pybullet: where a part of the table is; and a hand that moves."""

    names = tuple(dict.fromkeys(name for name, _ in calvin.PUSHES.values()))
    places = {name: np.array([0.1 * j, 0.0, 0.5]) for j, name in enumerate(names)}

    def getNumJoints(self, uid, physicsClientId):
        return len(self.names)

    def getJointInfo(self, uid, joint, physicsClientId):
        return joint, self.names[joint].encode()

    def getLinkState(self, uid, joint, *more, physicsClientId):
        return (tuple(self.places[self.names[joint]]),)


class Hand(PlayTable):
    """A hand of CALVIN's step, 2 cm, without what it would bump into."""

    def __init__(self):
        super().__init__()
        self.p, self.cid, self.hand = Parts(), 0, np.array([0.03, -0.23, 0.57])
        self.scene = SimpleNamespace(fixed_objects=[SimpleNamespace(uid=5)])

    def obs(self):
        return super().obs() | {"robot_obs": np.concatenate([self.hand, np.zeros(12)])}

    def reset(self, robot_obs, scene_obs):
        self.hand = np.array([0.03, -0.23, 0.57])
        return super().reset(robot_obs, scene_obs)

    def step(self, action):
        self.hand = self.hand + 0.02 * np.clip(action[:3], -1, 1)
        return super().step(action)

    def get_info(self):
        return {"hand": self.hand}


class Passed:
    """A sub-task is done where the hand is at the end of its way; one part is out of reach."""

    def get_task_info_for_set(self, start, end, tasks):
        name, way = calvin.PUSHES[next(iter(tasks))]
        near = np.abs(end["hand"] - Parts.places[name] - way[-1]).max() < 0.02
        return set(tasks) if near and name != "base__drawer" else set()


@pytest.fixture
def table(clone, monkeypatch):
    """The clone with the eight sub-tasks that take no grasp, and a hand without a table."""
    where = {"led": (0, 1), "lightbulb": (0, 1), "drawer": ("closed", "open"),
             "slider": ("right", "left")}  # fmt: skip
    ends = dict(turn_on_led=("led", 1), turn_off_led=("led", 0), open_drawer=("drawer", "open"),
                close_drawer=("drawer", "closed"), move_slider_left=("slider", "left"),
                move_slider_right=("slider", "right"), turn_on_lightbulb=("lightbulb", 1),
                turn_off_lightbulb=("lightbulb", 0))  # fmt: skip
    tasks = {name: [{"condition": {thing: next(v for v in where[thing] if v != to)},
                     "effect": {thing: to}}] for name, (thing, to) in ends.items()}  # fmt: skip
    kinds = dict.fromkeys(tasks, 1)  # as the lights of the clone share a kind
    (clone / calvin.SEQUENCES).write_text(f"tasks = {tasks}\ntask_categories = {kinds}\n")
    made = Hand(), Passed(), {task: [f"please {task}"] for task in tasks}
    monkeypatch.setattr(calvin, "build", lambda root, dataset, egl: made)
    return clone


def test_the_expert_goes_past_each_part_and_begins_where_it_is_by_then(table):
    world = calvin.Calvin(table, rows="pushes")
    for task in calvin.PUSHES:
        world.reset(0, task)
        expert, y = calvin.Pusher(world, np.random.RandomState(0)), []
        while not world.success and world.steps < 150:
            action = expert.act()
            assert action.shape == (7,) and np.abs(action[:3]).max() <= 1 and action[6] == 0
            y.append(world.env.hand[1])
            world.step(action)
        # backs off before it goes anywhere, and only the drawer is out of this oracle's reach
        assert min(y) < -0.25 and world.success == ("drawer" not in task)
    before, moved = dict(Parts.places), np.array([0.0, 0.05, 0.0])
    world.reset(0, "turn_on_led")
    expert = calvin.Pusher(world, np.random.RandomState(0))
    try:
        Parts.places["base__button"] = before["base__button"] + moved
        while len(expert.way) == 3:
            world.step(expert.act())
        assert np.allclose(expert.way[-1], before["base__button"] + moved + (0, 0, -0.03))
    finally:
        Parts.places.update(before)


def test_recorded_rows_are_calvins_layout_and_end_where_they_fail(table, tmp_path, capsys):
    words = ["--calvin", str(table), "--record", str(tmp_path / "demos"), "--episodes", "5"]
    calvin.main(words)
    assert "demonstrations in" in capsys.readouterr().out
    world = calvin.Calvin(table, rows="pushes")
    plans = [plan for _, plan in world.chains[:-6:-1]]
    drawer = [[i for i, t in enumerate(plan) if "drawer" in t] for plan in plans]
    want = [t for plan, at in zip(plans, drawer) for t in plan[: (at or [5])[0]]]
    episodes = data.open_episodes(tmp_path / "demos")
    assert [e.instruction for e in episodes] == [f"please {task}" for task in want] and want
    first = episodes[0]
    assert first.images["rgb_static"][0].shape == (200, 200, 3)
    assert first.state.shape[1] == 15 and first.action.shape[1] == 7
    assert np.abs(first.action[:, :3]).max() <= 1  # the expert's, without the noise of carrying out
    assert (first.action[:, 6] == 0).all()  # -1 is closed in CALVIN's files, 0 in ours
    with pytest.raises(client.UserError, match="name another folder"):
        calvin.main(words)


def test_a_recording_that_ends_at_once_leaves_nothing(table, tmp_path, monkeypatch):
    def stop(world):
        raise KeyboardInterrupt

    monkeypatch.setattr(calvin.Pusher, "act", stop)
    with pytest.raises(client.UserError, match="before the first sub-task was done"):
        calvin.main(["--calvin", str(table), "--record", str(tmp_path / "demos")])
    assert not list((tmp_path / "demos").iterdir())


def test_a_recording_that_is_stopped_keeps_what_is_done(table, tmp_path, monkeypatch):
    world, begun, first = calvin.Calvin(table, rows="pushes"), [], calvin.Pusher.act

    def stop(expert):
        if expert not in begun:
            begun.append(expert)
        if len(begun) == 3:
            raise KeyboardInterrupt
        return first(expert)

    monkeypatch.setattr(calvin.Pusher, "act", stop)
    done = calvin.record(world, tmp_path / "demos", 12, say=str)
    episodes = data.open_episodes(tmp_path / "demos")
    assert 1 <= done == len(episodes) <= 2 and all(len(e.action) > 3 for e in episodes)


def test_rows_of_pushes_repeat_kinds_and_are_not_the_published(table):
    rows = calvin.chains(table, 60, calvin.PUSHES)
    assert len(rows) == 60 and {t for _, plan in rows for t in plan} == set(calvin.PUSHES)
    assert all(len(set(plan)) == 5 for _, plan in rows)


def test_calvins_paper_numbers_add_up():
    for numbers in calvin.PAPERS.values():
        assert abs(sum(numbers[:5]) / 100 - numbers[5]) < 0.02


# --- LIBERO ---------------------------------------------------------------------------------------


class Kitchen:
    """OffScreenRenderEnv as its observations and steps look; done at its 14th step."""

    def __init__(self, size):
        self.size, self.got, self.starts = size, [], []

    def obs(self):
        side = self.size
        shot = picture(side, side, 3)
        return {"agentview_image": shot, "robot0_eye_in_hand_image": shot[::-1],
                "robot0_eef_pos": np.arange(3.0), "robot0_gripper_qpos": np.array([0.04, -0.04]),
                "robot0_eef_quat": np.array([0.0, 0.0, math.sin(0.6), math.cos(0.6)])}  # fmt: skip

    def reset(self):
        self.got = []

    def close(self):
        pass

    def set_init_state(self, start):
        self.starts.append(start)
        return self.obs()

    def step(self, action):
        assert len(action) == 7 and action[6] in (-1, 0, 1)
        self.got.append(np.array(action))
        return self.obs(), 0.0, len(self.got) >= 14, {}


@pytest.fixture
def kitchen(tmp_path, monkeypatch):
    """A world over a package with one task of `goal` and recorded starts, as torch wrote them."""
    for kind, name in (("bddl_files", "x.bddl"), ("init_files", "x.pruned_init")):
        folder = tmp_path / "libero" / "libero" / kind / "libero_goal"
        folder.mkdir(parents=True)
        (folder / name.replace("x", "KITCHEN_SCENE3_turn_on_it")).write_text("")
    states = np.random.default_rng(0).normal(size=(50, 9))
    place = tmp_path / "libero/libero/init_files/libero_goal/KITCHEN_SCENE3_turn_on_it.pruned_init"
    torch.save(states, place)
    spec = SimpleNamespace(submodule_search_locations=[str(tmp_path / "libero")])
    monkeypatch.setattr(libero, "find_spec", lambda name: spec)
    monkeypatch.setenv("LIBERO_CONFIG_PATH", str(tmp_path))
    made = []

    def make(bddl, size, seed, assets):
        made.append((bddl.name, size, seed))
        return Kitchen(size)

    return SimpleNamespace(make=make, made=made, states=states, place=place)


def test_starts_are_read_without_torch_and_without_trust(kitchen, tmp_path):
    assert np.array_equal(libero.read_starts(kitchen.place), kitchen.states)
    torch.save({"a": torch.zeros(2)}, tmp_path / "bad")
    with pytest.raises(common.UserError, match="no recorded starts"):
        libero.read_starts(tmp_path / "bad")
    (tmp_path / "worse").write_bytes(pickle.dumps(print))
    with pytest.raises(common.UserError):
        libero.read_starts(tmp_path / "worse")


@pytest.mark.parametrize("paper, wait, hand, steps, size", [
    ("twinbrain", 10, -1, 300, 256), ("vita", 5, 0, 600, 128)])  # fmt: skip
def test_liberos_protocols(kitchen, paper, wait, hand, steps, size):
    world = libero.Libero(paper, make=kitchen.make)
    world.reset(3, "goal/KITCHEN_SCENE3_turn_on_it")
    assert kitchen.made == [("KITCHEN_SCENE3_turn_on_it.bddl", size, 7)]
    assert len(world.env.got) == wait and all(a.tolist() == [0] * 6 + [hand] for a in world.env.got)
    assert np.array_equal(world.env.starts[0], kitchen.states[3]) and world.max_steps == steps
    assert world.instruction == "turn on it" and world.steps == 0
    client.play(world, Planner(H=8), execute=8)
    assert world.success and world.steps == 14 - wait


def test_libero_speaks_as_its_recordings_do(kitchen):
    world = libero.Libero(make=kitchen.make)
    seen = world.reset(0, "goal/KITCHEN_SCENE3_turn_on_it")
    assert np.array_equal(seen["images"]["static"], picture(256, 256, 3)[::-1, ::-1])
    assert seen["images"]["wrist"].shape == (256, 256, 3)
    want = [0, 1, 2, 0, 0, 1.2, 0.04, -0.04]
    assert np.allclose(seen["state"], want) and seen["state"].dtype == np.float32
    world.step(np.array([0.5] * 6 + [1.0]))
    world.step(np.array([0.5] * 6 + [0.0]))
    assert [a[6] for a in world.env.got[-2:]] == [-1, 1]  # open is -1, closed +1


def test_a_recorded_picture_and_the_same_from_the_world_are_equal(tmp_path):
    h5py = pytest.importorskip("h5py")
    raw = picture(128, 128, 3)
    with h5py.File(tmp_path / "a.hdf5", "w") as file:
        file["data/demo_0/obs/agentview_rgb"] = raw[None]
    read = formats.hdf5_picture(tmp_path / "a.hdf5", "demo_0", "agentview_rgb", 0)
    assert np.array_equal(read, libero.turned(raw))


def test_liberos_rows_average_over_suites():
    done = {"tasks": {"goal/a": client.rate([1, 1]), "goal/b": client.rate([0, 0]),
                      "long/a": client.rate([1, 1])}}  # fmt: skip
    rows = libero.rows(done)
    assert rows["spatial"] is None and rows["goal"]["success"] == 0.5
    assert rows["average"]["success"] == 0.75 and rows["average"]["episodes"] == 6


# --- SimplerEnv -----------------------------------------------------------------------------------


class Table:
    """ManiSkill2's environment as its observations and steps look; `goal`: steps with success."""

    def __init__(self, name, built, goal=()):
        self.name, self.built, self.goal, self.got = name, built, goal, []
        self.unwrapped = self
        self.camera = simpler.CAMERA["widowx" if built["robot"].startswith("widowx") else "google"]

    def obs(self):
        return {"image": {self.camera: {"rgb": picture(480, 640, 3)}}, "agent": {}, "extra": {}}

    def reset(self, options):
        self.options = options
        return self.obs(), {}

    def close(self):
        pass

    def get_language_instruction(self):
        return "put the spoon on the towel"

    def step(self, action):
        assert action.shape == (7,)
        self.got.append(action)
        return self.obs(), 0.0, len(self.got) in self.goal, False, {}


def test_the_grids_of_simplerenv():
    counts = {"spoon": 24, "carrot": 24, "stack": 24, "eggplant": 24, "can-vm": 300, "can-va": 675,
              "near-vm": 240, "near-va": 480, "drawer-vm": 216, "drawer-va": 378}  # fmt: skip
    assert {task: len(simpler.starts(task)) for task in counts} == counts
    assert set(counts) == set(simpler.WIDOWX) | set(simpler.GOOGLE)
    name, built, options = simpler.starts("drawer-vm")[0]
    assert built["max_episode_steps"] == 113 and built["shader_dir"] == "rt"
    assert name == "OpenTopDrawerCustomInScene-v0" and built["overlay"] == "open_drawer_a0.png"
    turn = options["robot_init_options"]["init_rot_quat"]
    assert np.allclose(turn, [math.sin(0.015), 0, 0, math.cos(0.015)])
    assert all("overlay" not in built for _, built, _ in simpler.starts("can-va"))


def test_success_counts_at_the_last_step_alone():
    for goal, won in (({3, 120}, True), ({3, 119}, False)):
        world = simpler.Simpler(make=lambda name, built, goal=goal: Table(name, built, goal))
        world.reset(5, "spoon")
        policy = Planner(H=16)
        assert client.play(world, policy, ensemble=7) is won
        assert world.steps == 120 == policy.asked
        assert world.env.options["obj_init_options"] == {"episode_id": 5}


def test_widowx_speaks_as_its_environment_does():
    world = simpler.Simpler(make=Table)
    seen = world.reset(29, "eggplant")
    assert seen["images"]["static"].shape == (480, 640, 3) and seen["state"] is None
    assert world.env.built["robot"] == "widowx_sink_camera_setup"
    assert world.env.options["obj_init_options"] == {"episode_id": 5}  # the second time around
    world.step(np.array([0.1, 0.2, 0.3, 0.0, 0.0, 0.5, 1.0]))
    world.step(np.array([0.1, 0.2, 0.3, 0.0, 0.0, 0.5, 0.4]))
    assert np.allclose(world.env.got[0], [0.1, 0.2, 0.3, 0, 0, 0.5, 1])
    assert world.env.got[1][6] == -1


def test_the_google_robots_gripper_changes_for_ten_steps():
    world = simpler.Simpler(make=Table)
    world.reset(0, "can-vm")
    for opened in [1.0] * 2 + [0.0] * 14 + [1.0] * 2:
        world.step(np.array([0.0] * 6 + [opened]))
    hand = [a[6] for a in world.env.got]
    assert hand == [0] * 2 + [1] * 10 + [0] * 4 + [-1] * 2


def test_roll_pitch_yaw_become_axis_and_angle():
    def about(axis, a):
        c, s = math.cos(a), math.sin(a)
        i, j = [(1, 2), (2, 0), (0, 1)][axis]
        m = np.eye(3)
        m[i, i], m[i, j], m[j, i], m[j, j] = c, -s, s, c
        return m

    rng = np.random.default_rng(0)
    for roll, pitch, yaw in [(0, 0, 0), *rng.uniform(-1, 1, (20, 3))]:
        v = simpler.axis_angle(roll, pitch, yaw)
        k = np.array([[0, -v[2], v[1]], [v[2], 0, -v[0]], [-v[1], v[0], 0]])
        m = torch.matrix_exp(torch.from_numpy(k)).numpy()
        assert np.allclose(m, about(2, yaw) @ about(1, pitch) @ about(0, roll), atol=1e-9)


# --- RoboCasa -------------------------------------------------------------------------------------


class Humanoid:
    """GrootRoboCasaEnv as its observations and steps look; `goal`: steps with success."""

    def __init__(self, task, seed, goal=()):
        self.goal, self.got, self.seeds = goal, [], []

    def obs(self):
        parts = {f"state.{p}": np.full(n, i, np.float32)
                 for i, (p, n) in enumerate(robocasa.PARTS.items())}  # fmt: skip
        words = "unlocked_waist: pick the can and place it in the drawer"
        return parts | {robocasa.CAMERA: picture(256, 256, 3), robocasa.SENTENCE: words}

    def reset(self, seed):
        self.seeds.append(seed)
        return self.obs(), {"success": False}

    def close(self):
        pass

    def step(self, action):
        assert {k.partition(".")[2]: len(v) for k, v in action.items()} == robocasa.PARTS
        self.got.append(action)
        return self.obs(), 0.0, False, False, {"success": len(self.got) in self.goal}


def test_robocasas_tasks_are_those_of_the_recordings():
    assert list(sorted(robocasa.TASKS)) == sorted(formats.GR1) and len(robocasa.TASKS) == 24
    for k, average in enumerate(robocasa.AVERAGES):  # the paper's rounding
        assert abs(np.mean([n[k] for n in robocasa.NUMBERS.values()]) - average) < 0.15


def test_robocasa_speaks_as_its_environment_does():
    world = robocasa.RoboCasa(seed=100, make=Humanoid)
    seen = world.reset(3, "PnPCanToDrawerClose")
    assert world.env.seeds == [103] and seen["images"]["static"].shape == (256, 256, 3)
    assert seen["state"].tolist() == [0] * 7 + [1] * 7 + [2] * 6 + [3] * 6 + [4] * 3
    assert world.instruction.startswith("unlocked_waist: ")
    world.step(np.arange(29.0))
    got = world.env.got[0]
    assert got["action.left_hand"].tolist() == list(range(14, 20))
    assert got["action.waist"].tolist() == [26, 27, 28]


def test_success_is_looked_for_after_each_dozen():
    for goal, steps in (({12}, 12), ({13}, 720), ({5, 36}, 36)):
        world = robocasa.RoboCasa(make=lambda task, seed, goal=goal: Humanoid(task, seed, goal))
        world.reset(0, "PnPCanToDrawerClose")
        policy = Planner(H=16)
        assert client.play(world, policy, execute=12) is (steps < 720)
        assert world.steps == steps and policy.asked == steps // 12
