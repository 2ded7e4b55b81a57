"""CALVIN: a thousand rows of five sub-tasks in scene D, unseen in training (ABC to D).

  python worlds/calvin.py --calvin DIR --server 127.0.0.1:8000             # the paper's 1000 chains
  python worlds/calvin.py --calvin DIR --server 127.0.0.1:8000 --episodes 10
  python worlds/calvin.py --calvin DIR --record demos --episodes 60        # without CALVIN's data

Install, in an environment of its own (numpy below 2), with Python 3.10 or 3.11; --calvin (or
CALVIN_ROOT) is the clone:

  git clone --recurse-submodules https://github.com/mees/calvin.git
  pip install --no-deps pybullet
  pip install "numpy<2" gym opencv-python-headless hydra-core hydra-colorlog omegaconf gitpython \\
      scipy pandas numba numpy-quaternion cloudpickle "setuptools<81" websockets msgpack pillow

Protocol (the clone's own evaluation; VITA-VLA, Table 1): 1000 chains of five sub-tasks, drawn once
for all with fixed seeds; the arm and the scene are set before each chain and never within it; 360
steps for each sub-task, the next one only after success; the first validation sentence of a
sub-task is its instruction; what counts as done is the clone's task oracle. Two cameras, 200 and 84
pixels, as they are; state: the 15 numbers of robot_obs. Actions: relative, xyz and Euler angles in
-1..1, gripper +1 open and -1 closed. The policy plans at each step. Which of VITA-VLA's three
predictions is executed, the second, is the served policy's affair (--act-index 1 in training).
Fewer --episodes are the first of the thousand. --dataset takes the cameras and the scene from a
downloaded dataset instead of the clone's configuration; --egl renders as the authors did, on a GPU.

CALVIN's own recordings are hundreds of gigabytes. --record makes small ones of the same layout, so
that training, server and chains can be tried from the clone alone: an expert does rows of the eight
sub-tasks that take no grasp (PUSHES: drawer, slider, LED, lightbulb), five in a row from CALVIN's
own starts. --rows pushes acts in rows of these, other ones than are recorded.
"""

import ast
import contextlib
import hashlib
import itertools
import json
import os
import shutil
import sys
from pathlib import Path

if __name__ == "__main__":  # else this folder would hide packages of the same names
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import numpy as np

from worlds import client

PROTOCOL = {"episodes": 1000, "steps": 360, "execute": 1, "ensemble": 0}
DIGEST = "840cb992c69ce9b6d59f6020966b6300c15233f8e0b9667b6486c1962424d308"  # of the 1000 chains
PAPERS = {  # VITA-VLA, Table 1: in a row, average length
    "VITA-VLA": (92.5, 77.1, 61.0, 49.2, 38.2, 3.18),
    "only fine-tuned": (86.0, 73.2, 60.4, 49.4, 39.8, 3.08),
    "its Seer-Large": (88.4, 80.9, 74.8, 69.6, 62.1, 3.76),
}
MODELS = Path("calvin_models")
SEQUENCES = MODELS / "calvin_agent/evaluation/multistep_sequences.py"
STATES = MODELS / "calvin_agent/evaluation/utils.py"
ORACLE = MODELS / "conf/callbacks/rollout/tasks/new_playtable_tasks.yaml"
SENTENCES = MODELS / "conf/annotations/new_playtable_validation.yaml"
INSTALL = client.install(__doc__)
PUSHES = {  # sub-task: a part of the table; how a closed hand goes past it, in metres from it
    "turn_on_led": ("base__button", ((0, 0, 0.1), (0, 0, -0.03))),
    "turn_off_led": ("base__button", ((0, 0, 0.1), (0, 0, -0.03))),
    "open_drawer": ("base__drawer", ((0, -0.18, 0.15), (0, -0.15, 0.02), (0, -0.36, 0.02))),
    "close_drawer": ("base__drawer", ((0, -0.25, 0.15), (0, -0.24, 0.02), (0, 0.06, 0.02))),
    "move_slider_left": ("base__slide", ((0.4, -0.15, -0.03), (0.4, -0.09, -0.03),
                                         (0.06, -0.09, -0.03))),
    "move_slider_right": ("base__slide", ((0.25, -0.15, -0.03), (0.25, -0.09, -0.03),
                                          (0.55, -0.09, -0.03))),
    "turn_on_lightbulb": ("base__switch", ((0, -0.07, 0.02), (0, -0.06, -0.03), (0, 0.09, 0.06))),
    "turn_off_lightbulb": ("base__switch", ((0, -0.06, 0.08), (0, -0.035, 0.04),
                                            (0, -0.05, -0.08))),
}  # fmt: skip


# --- the thousand chains --------------------------------------------------------------------------


def literal(path, name):
    """A table that a file of the clone assigns to a name, without running the file."""
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == name:
            return ast.literal_eval(node.value)
    raise client.UserError(f"{path} holds no table {name}: is it a clone of mees/calvin?")


def after(state, effects):
    """The state that a sub-task leaves; None unless exactly one of its conditions holds."""

    def holds(condition):
        return all(state[k] in v if isinstance(v, list) else state[k] == v
                   for k, v in condition.items())  # fmt: skip

    found = [state | e["effect"] for e in effects if holds(e["condition"])]
    return found[0] if len(found) == 1 else None


def possible(state, plan, tasks, kinds):
    """Whether the sub-tasks, each of another kind, can follow each other from a state."""
    if len({kinds[name] for name in plan}) < len(plan):
        return False
    for name in plan:
        state = after(state, tasks[name])
        if state is None:
            return False
    return True


def chains(root, n=1000, names=()):
    """The benchmark's chains -> [(start {thing: where}, (sub-task, ...))], drawn as the authors do:
    for each start its own generator, then one shuffle. Of some names only: kinds may repeat."""
    tasks, kinds = (literal(root / SEQUENCES, name) for name in ("tasks", "task_categories"))
    kinds = {name: name for name in names} or kinds
    blocks = ("red_block", "blue_block", "pink_block")
    values = {"led": (0, 1), "lightbulb": (0, 1), "slider": ("right", "left"),
              "drawer": ("closed", "open"),
              **dict.fromkeys(blocks, ("table", "slider_right", "slider_left")),
              "grasped": (0,)}  # fmt: skip
    starts = [dict(zip(values, v)) for v in itertools.product(*values.values())
              if v.count("table") in (1, 2) and v.count("slider_right") < 2
              and v.count("slider_left") < 2]  # fmt: skip
    names, rows = list(names or tasks), []
    for i, share in enumerate(np.array_split(range(n), len(starts))):
        rng, found = np.random.RandomState(i), 0
        while found < len(share):
            plan = tuple(names[j] for j in rng.permutation(len(names))[:5])
            if possible(starts[i], plan, tasks, kinds):
                rows.append((starts[i], plan))
                found += 1
    np.random.RandomState(0).shuffle(rows)
    return rows


def kept_chains(root):
    """The thousand chains, from the cache if they are there: to draw them takes minutes."""
    folder = Path(os.environ.get("ONEFILE_VLA_CACHE", "~/.cache/onefile-vla")).expanduser()
    source = hashlib.sha256((root / SEQUENCES).read_bytes()).hexdigest()[:12]
    path = folder / f"calvin-chains-{source}.json"
    if path.exists():
        return [(start, tuple(plan)) for start, plan in json.loads(path.read_text())]
    print("drawing the thousand chains (minutes, once; then cached)", flush=True)
    rows = chains(root)
    folder.mkdir(parents=True, exist_ok=True)
    draft = path.with_suffix(f".{os.urandom(4).hex()}.tmp")
    draft.write_text(json.dumps(rows))
    os.replace(draft, path)
    return rows


def digest(rows):
    plain = [[start, list(plan)] for start, plan in rows]
    return hashlib.sha256(json.dumps(plain).encode()).hexdigest()


def fnv1(words):
    """The 32-bit FNV-1 hash that seeds a start's blocks: over UTF-16, from zero."""
    h = 0
    for byte in words.encode("utf-16-le"):
        h = h * 0x01000193 % 2**32 ^ byte
    return h


@contextlib.contextmanager
def seeded(seed):
    kept = np.random.get_state()
    np.random.seed(seed)
    try:
        yield
    finally:
        np.random.set_state(kept)


def placing(root):
    """The clone's function from a start to (robot_obs (15,), scene_obs (24,)), without what its
    file imports besides."""
    name = "get_env_state_for_initial_condition"
    body = ast.parse((root / STATES).read_text()).body
    found = [node for node in body if isinstance(node, ast.FunctionDef) and node.name == name]
    if not found:
        raise client.UserError(f"{root / STATES} holds no {name}: is it a clone of mees/calvin?")
    names = {"np": np, "pi": np.pi, "hasher": fnv1, "temp_seed": seeded}
    exec(compile(ast.Module(found, []), str(root / STATES), "exec"), names)
    return names[name]


# --- the world ------------------------------------------------------------------------------------


def build(root, dataset="", egl=False):
    """-> environment of scene D with its two cameras, task oracle, {sub-task: [sentence]}"""
    sys.path.insert(0, str(root / "calvin_env"))
    try:
        import hydra
        from calvin_env.envs import play_table_env  # noqa: F401
        from omegaconf import OmegaConf
    except ImportError as error:
        raise client.UserError(f"CALVIN cannot be imported ({error}); {INSTALL}") from None
    if dataset:
        path = Path(dataset) / "validation" / ".hydra" / "merged_config.yaml"
        if not path.exists():
            raise client.UserError(f"--dataset {dataset}: there is no {path}")
        cfg = OmegaConf.load(path)
        for name in set(cfg.cameras) - {"static", "gripper"}:
            del cfg.cameras[name]
    else:
        conf = str((root / "calvin_env" / "conf").resolve())
        with hydra.initialize_config_dir(conf, version_base=None):
            words = ["cameras=static_and_gripper", "scene=calvin_scene_D"]
            cfg = hydra.compose("config_data_collection", words)
    more = {"show_gui": False, "use_vr": False, "use_scene_info": True, "use_egl": egl}
    env = hydra.utils.instantiate(cfg.env, **more)
    oracle = hydra.utils.instantiate(OmegaConf.load(root / ORACLE))
    return env, oracle, OmegaConf.to_container(OmegaConf.load(root / SENTENCES))


class Calvin:
    """Scene D. chain() sets a start and its row of goals; reset() a start and one goal."""

    width, max_steps = 7, PROTOCOL["steps"]

    def __init__(self, root="", dataset="", egl=False, rows="published"):
        if not root:
            raise client.UserError(f"CALVIN: --calvin DIR names a clone of it; {INSTALL}")
        self.root = Path(root).expanduser()
        for file in (SEQUENCES, STATES, ORACLE, SENTENCES, Path("calvin_env/conf")):
            if not (self.root / file).exists():
                raise client.UserError(f"CALVIN: no {file} in {self.root}; {INSTALL}")
        self.env, self.oracle, self.sentences = build(self.root, dataset, egl)
        own = rows == "pushes"
        self.chains = chains(self.root, names=PUSHES) if own else kept_chains(self.root)
        self.place = placing(self.root)

    def reset(self, seed, task=None):
        """The start of chain `seed`, with one sub-task as the goal (the chain's first)."""
        start, plan = self.chains[seed]
        robot, scene = self.place(start)
        self.raw = self.env.reset(robot_obs=robot, scene_obs=scene)
        self.plan = [task] if task else list(plan)
        self.next_goal()
        return self.observe()

    def chain(self, seed):
        """Sets chain `seed` and its first goal -> the five sub-tasks."""
        self.reset(seed)
        return self.chains[seed][1]

    def next_goal(self):
        """Sets the next sub-task of the chain -> whether there was one."""
        if not self.plan:
            return False
        self.task, self.plan = self.plan[0], self.plan[1:]
        self.instruction, self.steps, self.success = self.sentences[self.task][0], 0, False
        self.before = self.env.get_info()
        return True

    def observe(self):
        shots = self.raw["rgb_obs"]
        images = {"static": shots["rgb_static"], "wrist": shots["rgb_gripper"]}
        return {"images": images, "state": np.asarray(self.raw["robot_obs"], np.float32)}

    def step(self, action):
        """action (7,): dx dy dz droll dpitch dyaw in -1..1, gripper (open above a half)"""
        hand = 1.0 if action[6] > 0.5 else -1.0
        self.raw, _, _, info = self.env.step(np.array([*action[:6], hand], np.float64))
        done = self.oracle.get_task_info_for_set(self.before, info, {self.task})
        self.steps, self.success = self.steps + 1, bool(done)
        return self.observe()


# --- demonstrations -------------------------------------------------------------------------------


class Pusher:
    """Does a sub-task of PUSHES: back from the table, up, before the part, then along its way."""

    def __init__(self, world, rng):
        self.world, (self.name, self.past) = world, PUSHES[world.task]
        (x, y, z), (over, near, high) = world.raw["robot_obs"][:3], self.place()[0]
        y = min(y - 0.05, -0.2)
        clear = [(x, y, z), (x, y, 0.62), (over, min(near, -0.2), max(high, 0.62))]
        self.way, self.at, self.tries = [*(clear + rng.normal(0, 0.01, (3, 3)))], 0, 0

    def place(self):
        """The way past the part, from where it is now."""
        env = self.world.env
        table, p, about = env.scene.fixed_objects[0].uid, env.p, {"physicsClientId": env.cid}
        joint = next(j for j in range(p.getNumJoints(table, **about))
                     if p.getJointInfo(table, j, **about)[1].decode() == self.name)  # fmt: skip
        return np.add(p.getLinkState(table, joint, True, True, **about)[0], self.past)

    def act(self):
        """-> (7,), the hand closed"""
        away = self.way[self.at] - self.world.raw["robot_obs"][:3]
        self.tries += 1
        there = np.abs(away).max() < (0.03 if self.at < 3 else 0.012) or self.tries > 30
        if self.at == 2 and there:
            self.way += [*self.place()]  # only now, as what the last sub-task moved may roll on
        if there and self.at + 1 < len(self.way):
            self.at, self.tries = self.at + 1, 0
            return self.act()
        return np.array([*np.clip(away / 0.03, -1, 1), 0, 0, 0, 0])


def shown(world, rng, noise):
    """The present sub-task as the expert does it -> its frames, as CALVIN keeps them: what is
    seen, and the action without the noise that it is carried out with."""
    expert, frames = Pusher(world, rng), []
    while not world.success and world.steps < 200:
        action, raw = expert.act(), world.raw
        seen = raw["rgb_obs"] | {k: raw[k] for k in ("robot_obs", "scene_obs")}
        frames.append(seen | {"rel_actions": np.array([*action[:6], -1.0])})
        world.step(action + [*rng.normal(0, noise, 3), 0, 0, 0, 0])
    return frames


def record(world, out, rows, noise=0.3, say=client.say):
    """The expert's rows, from the last one -> how many sub-tasks it did. A row ends where it
    fails, all of them at Ctrl-C."""
    folder, rng = Path(out) / "training", np.random.RandomState(0)
    draft = folder.with_name("training.part")
    if folder.exists() or draft.exists():
        raise client.UserError(f"--record {out}: there is a recording already; name another folder")
    (draft / "lang_annotations").mkdir(parents=True)
    spans, words, tasks, starts, end = [], [], [], [], 0
    with contextlib.suppress(KeyboardInterrupt):
        for i in range(rows):
            world.chain(len(world.chains) - 1 - i)
            starts.append(end)
            more = True
            while more:
                frames = shown(world, rng, noise)
                if world.success:
                    for t, fields in enumerate(frames, end):
                        np.savez_compressed(draft / f"episode_{t:07d}.npz", **fields)
                    spans.append((end, end + len(frames) - 1))
                    words.append(world.instruction)
                    tasks.append(world.task)
                    end += len(frames)
                more = world.success and world.next_goal()
            say(f"row {i + 1} of {rows}: {len(spans)} sub-tasks, {end} frames")
    if not spans:
        shutil.rmtree(draft)
        raise client.UserError(f"--record {out}: ended before the first sub-task was done")
    notes = {"language": {"ann": words, "task": tasks}, "info": {"indx": spans, "episodes": []}}
    np.save(draft / "lang_annotations" / "auto_lang_ann.npy", notes)
    ends = [(a, b - 1) for a, b in zip(starts, [*starts[1:], end]) if a < b]
    np.save(draft / "ep_start_end_ids.npy", np.array(ends))
    draft.rename(folder)
    return len(spans)


# --- main -----------------------------------------------------------------------------------------


def evaluate(world, policy, protocol, results, say=client.say):
    """The first --episodes chains."""
    for i in range(protocol["episodes"]):
        length = 0
        for task in world.chain(i):
            how = protocol["execute"], protocol["ensemble"]
            won = client.play(world, policy, *how, results.watch)
            results.add(task, won, world.steps)
            if not won:
                break
            length += 1
            world.next_goal()
        results.lengths.append(length)
        done = results.write()
        rates = " ".join(f"{100 * r['success']:.1f}" for r in done["chain"])
        say(f"chain {i + 1}: {length} of 5; so far {rates}, average length {done['length']:.2f}")


def rows(done):
    return {f"{k} in a row": done["chain"][k - 1] for k in range(1, 6)}


def arguments(argv=None):
    p = client.parser(__doc__, "calvin", "chains, the first of the thousand (1000)")
    p.add_argument("--calvin", default=os.environ.get("CALVIN_ROOT", ""), metavar="DIR",
                   help="clone of mees/calvin with calvin_env in it (CALVIN_ROOT)")  # fmt: skip
    p.add_argument("--dataset", default="", metavar="DIR", help="task_ABC_D, for its configuration")
    p.add_argument("--egl", action="store_true", help="render on a GPU")
    p.add_argument("--rows", default="published", choices=["published", "pushes"],
                   help="the thousand, or ones of eight sub-tasks that take no grasp")  # fmt: skip
    p.add_argument("--record", default="", metavar="DIR",
                   help="demonstrate --episodes rows of pushes, for --data DIR")  # fmt: skip
    return p.parse_args(argv)


def main(argv=None):
    args = arguments(argv)
    protocol = client.settings(args, PROTOCOL, egl=args.egl, dataset=args.dataset, rows=args.rows)
    if protocol["episodes"] > PROTOCOL["episodes"]:
        raise client.UserError(f"--episodes {args.episodes}: there are 1000 chains")
    world = Calvin(args.calvin, args.dataset, args.egl, "pushes" if args.record else args.rows)
    if args.record:
        done = record(world, args.record, args.episodes or 60)
        return print(f"{done} demonstrations in {args.record}: train with --data {args.record}")
    protocol["official_chains"] = digest(world.chains) == DIGEST
    if not protocol["official_chains"] and args.rows == "published":
        print("warning: these are not the published thousand chains: another clone or numpy")
    policy = client.Server(args.server, args.token, args.gripper)
    versions = {"calvin": world.root, "calvin_env": world.root / "calvin_env",
                "pybullet": "pybullet"}  # fmt: skip
    results = client.Results("calvin", args.out, protocol, policy, versions, args.gifs)
    evaluate(world, policy, protocol, results)
    papers = {whose: {f"{k + 1} in a row": x for k, x in enumerate(numbers[:5])}
              for whose, numbers in PAPERS.items()}  # fmt: skip
    done = client.close(results, protocol, rows, papers, protocol["official_chains"])
    theirs = ", ".join(f"{whose} {numbers[5]:g} (paper)" for whose, numbers in PAPERS.items())
    print(f"average length {done['length']:.2f} measured; {theirs}")


if __name__ == "__main__":
    client.run_main(main)
