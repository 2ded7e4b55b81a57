"""LIBERO: four suites of ten tasks (TwinBrainVLA, Table 3; VITA-VLA, Table 2).

  python worlds/libero.py --server 127.0.0.1:8000                         # 4 suites, 2,000 episodes
  python worlds/libero.py --server 127.0.0.1:8000 --suites spatial --episodes 5
  python worlds/libero.py --server 127.0.0.1:8000 --paper vita            # VITA-VLA's protocol

Install, in an environment of its own (a GPU is of use, MUJOCO_GL=egl; osmesa works without):

  pip install --no-deps hf-libero==0.1.4 robosuite==1.4.0 bddl==1.0.1
  pip install "mujoco<3.9" numpy scipy numba opencv-python-headless pyyaml easydict h5py \\
      cloudpickle gymnasium future jupytext networkx termcolor packaging matplotlib psutil \\
      huggingface_hub websockets msgpack pillow

The first episode downloads 206 MB of assets; or --assets names a folder that has them, such as
libero/libero/assets in a clone of Lifelong-Robot-Learning/LIBERO. MuJoCo 3.3.3 and later draw
darker floors than the recordings have.

Protocol: a task's first N recorded starts; some steps of waiting until things have settled; success
ends an episode. Both pictures turned by half, as in the recordings that are trained with. State:
xyz, axis-angle, two fingers. Actions: changes of xyz and rotation, gripper -1 open and +1 closed.
  --paper twinbrain  50 episodes a task, 10 steps of waiting with the hand open, then at most 220
                     (spatial), 280 (object), 300 (goal), 520 (long); pictures 256; 8 actions
                     of each chunk executed; seed 7. openpi's protocol is this with --execute 5.
  --paper vita       50 episodes a task, 20 in long; 5 steps of waiting with zeros, then at most
                     600; pictures 128; the policy plans at each step and blends its own
                     predictions (train with --preset libero). The seed is not stated; 7 here. The
                     authors' code shows the policy the picture from before the waiting first; here
                     it sees the one after it.
"""

import math
import os
import pickle
import re
import sys
import tempfile
import zipfile
from importlib.util import find_spec
from pathlib import Path

if __name__ == "__main__":  # else this folder would hide packages of the same names
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import numpy as np

from worlds import client

SUITES = {"spatial": 220, "object": 280, "goal": 300, "long": 520}  # steps, as openpi bounds them
FOLDER = {"spatial": "libero_spatial", "object": "libero_object", "goal": "libero_goal",
          "long": "libero_10"}  # fmt: skip
PROTOCOLS = {
    "twinbrain": {"episodes": 50, "wait": 10, "hand": -1.0, "steps": SUITES, "size": 256,
                  "execute": 8, "ensemble": 0, "seed": 7},
    "vita": {"episodes": 50, "wait": 5, "hand": 0.0, "steps": dict.fromkeys(SUITES, 600),
             "size": 128, "execute": 1, "ensemble": 0, "seed": 7, "long": 20},
}  # fmt: skip
PAPERS = {
    "TwinBrainVLA": dict(spatial=99.2, object=99.0, goal=96.8, long=95.4, average=97.6),
    "VITA-VLA": dict(spatial=98.0, object=99.8, goal=97.9, long=93.5, average=97.3),
    "pi-0.5": dict(spatial=98.8, object=98.2, goal=98.0, long=92.4, average=96.9),
    "OpenVLA": dict(spatial=87.4, object=88.4, goal=79.2, long=53.7, average=76.5),
}  # as TwinBrainVLA's Table 3 and, VITA-VLA, its own Table 2 print them
INSTALL = client.install(__doc__)


# --- files ----------------------------------------------------------------------------------------


class Numpy(pickle.Unpickler):
    """Reads arrays; refuses whatever is not one."""

    known = {("numpy", "ndarray"), ("numpy", "dtype"), ("_codecs", "encode")}
    known |= {(f"numpy.{core}.multiarray", "_reconstruct") for core in ("core", "_core")}

    def find_class(self, module, name):
        if (module, name) not in self.known:
            raise pickle.UnpicklingError(f"it wants {module}.{name}, which no start needs")
        return super().find_class(module, name)


def read_starts(path):
    """A task's recorded starts (n, D), from the archive that torch wrote, without torch."""
    try:
        with zipfile.ZipFile(path) as archive:
            name = next(n for n in archive.namelist() if n.endswith("/data.pkl"))
            with archive.open(name) as file:
                return np.asarray(Numpy(file).load(), np.float64)
    except (OSError, zipfile.BadZipFile, StopIteration, pickle.UnpicklingError, ValueError) as why:
        raise client.UserError(f"{path}: no recorded starts can be read ({why})") from None


def package():
    """The folder of the installed package, configured so that its import asks nothing."""
    found = find_spec("libero")
    places = list(found.submodule_search_locations or []) if found else []
    root = next((Path(p) / "libero" for p in places if (Path(p) / "libero/bddl_files").is_dir()), 0)
    if not root:
        raise client.UserError(f"LIBERO is not installed (no package libero); {INSTALL}")
    config = Path(os.environ.get("LIBERO_CONFIG_PATH", "~/.libero")).expanduser() / "config.yaml"
    if not config.exists():  # it would ask on the terminal
        folder = Path(tempfile.mkdtemp(prefix="libero-"))
        lines = {"benchmark_root": "", "bddl_files": "bddl_files", "init_states": "init_files",
                 "datasets": "datasets", "assets": "assets"}  # fmt: skip
        words = "".join(f"{name}: {root / place}\n" for name, place in lines.items())
        (folder / "config.yaml").write_text(words)
        os.environ["LIBERO_CONFIG_PATH"] = str(folder)
    return root


def tasks_of(root, suite):
    """-> names of a suite's tasks, in the order of their files"""
    names = sorted(path.stem for path in (root / "bddl_files" / FOLDER[suite]).glob("*.bddl"))
    if not names:
        raise client.UserError(f"LIBERO: no tasks in {root / 'bddl_files' / FOLDER[suite]}")
    return names


def sentence(name):
    """KITCHEN_SCENE3_turn_on_the_stove -> turn on the stove"""
    return re.sub(r"^[A-Z_]+SCENE\d+_", "", name).replace("_", " ")


def make(bddl, size, seed, assets=""):
    try:
        import libero.libero
        from libero.libero.envs import OffScreenRenderEnv
    except ImportError as error:
        raise client.UserError(f"LIBERO cannot be imported ({error}); {INSTALL}") from None
    if assets:
        libero.libero._assets_path_cache = str(Path(assets).resolve())
    try:
        env = OffScreenRenderEnv(bddl_file_name=str(bddl), camera_heights=size, camera_widths=size)
    except (FileNotFoundError, ValueError) as error:
        if "assets" not in str(error) and ".xml" not in str(error):
            raise
        words = "--assets names a folder of them, or pip install huggingface_hub to download 206 MB"
        raise client.UserError(f"LIBERO's assets are missing ({error}): {words}") from None
    env.seed(seed)  # places differ with it, even from recorded starts
    return env


# --- the world ------------------------------------------------------------------------------------


def axis_angle(q):
    """Quaternion (x, y, z, w) -> axis times angle (3,), the angle from 0 to 2 pi."""
    w = float(np.clip(q[3], -1.0, 1.0))
    far = math.sqrt(1.0 - w * w)
    return np.zeros(3) if far < 1e-9 else np.asarray(q[:3]) * (2.0 * math.acos(w) / far)


def turned(image):
    """By half a turn: the renderer's pictures are upside down, and the recordings mirrored too."""
    return np.ascontiguousarray(image[::-1, ::-1])


class Libero:
    """One task after another ("suite/name"), each with one environment for its episodes."""

    width = 7

    def __init__(self, paper="twinbrain", assets="", seed=None, make=make):
        self.protocol, self.assets, self.make = PROTOCOLS[paper], assets, make
        self.seed = self.protocol["seed"] if seed is None else seed
        self.root, self.task, self.env = package(), None, None

    def reset(self, seed, task):
        """Recorded start `seed` of a task, after things have settled."""
        suite, _, name = task.partition("/")
        if task != self.task:
            if self.env is not None:
                self.env.close()
            place = self.root / "bddl_files" / FOLDER[suite] / f"{name}.bddl"
            self.env = self.make(place, self.protocol["size"], self.seed, self.assets)
            starts = self.root / "init_files" / FOLDER[suite] / f"{name}.pruned_init"
            self.task, self.starts = task, read_starts(starts)
        self.env.reset()
        self.raw = self.env.set_init_state(self.starts[seed % len(self.starts)])
        for _ in range(self.protocol["wait"]):
            self.raw, _, _, _ = self.env.step(np.array([0.0] * 6 + [self.protocol["hand"]]))
        self.instruction, self.max_steps = sentence(name), self.protocol["steps"][suite]
        self.steps, self.success = 0, False
        return self.observe()

    def observe(self):
        raw = self.raw
        images = {"static": turned(raw["agentview_image"]),
                  "wrist": turned(raw["robot0_eye_in_hand_image"])}  # fmt: skip
        state = [raw["robot0_eef_pos"], axis_angle(raw["robot0_eef_quat"]),
                 raw["robot0_gripper_qpos"]]  # fmt: skip
        return {"images": images, "state": np.concatenate(state).astype(np.float32)}

    def step(self, action):
        """action (7,): change of xyz and rotation, gripper (open above a half)"""
        hand = -1.0 if action[6] > 0.5 else 1.0
        self.raw, _, done, _ = self.env.step(np.array([*action[:6], hand], np.float64))
        self.steps, self.success = self.steps + 1, self.success or bool(done)
        return self.observe()


# --- main -----------------------------------------------------------------------------------------


def episodes(protocol, task):
    """How many of a task's recorded starts are acted from."""
    asked = protocol["episodes"]
    return min(asked, protocol.get(task.partition("/")[0], asked))


def rows(done):
    """Each suite, and the average over suites."""
    some = {}
    for suite in SUITES:
        mine = [t for name, t in done["tasks"].items() if name.startswith(suite + "/")]
        some[suite] = client.mean(mine)
    return some | {"average": client.mean(some.values())}


def main(argv=None):
    p = client.parser(__doc__, "libero", "episodes of each task (50)", seeded=True)
    p.add_argument("--paper", default="twinbrain", choices=list(PROTOCOLS), help="whose protocol")
    p.add_argument("--suites", default="", metavar="A,B", help=", ".join(SUITES))
    p.add_argument("--tasks", default="", metavar="WORD", help="only tasks whose name holds this")
    p.add_argument("--assets", default="", metavar="DIR", help="meshes and textures")
    args = p.parse_args(argv)
    suites = client.chosen(args.suites, SUITES, "--suites")
    protocol = client.settings(args, PROTOCOLS[args.paper], paper=args.paper)
    if args.assets and not (Path(args.assets) / "scenes").is_dir():
        raise client.UserError(f"--assets {args.assets}: there are no scenes in it")
    world = Libero(args.paper, args.assets, protocol["seed"])
    every = [f"{suite}/{name}" for suite in suites for name in tasks_of(world.root, suite)]
    tasks = [task for task in every if args.tasks in task]
    if not tasks:
        raise client.UserError(f"--tasks {args.tasks}: no task of {' '.join(suites)} is named so")
    world.reset(0, tasks[0])  # before a server is asked for
    policy = client.Server(args.server, args.token, args.gripper)
    versions = {n: n for n in ("hf-libero", "libero", "robosuite", "mujoco")}
    results = client.Results("libero", args.out, protocol, policy, versions, args.gifs)
    many = {task: episodes(protocol, task) for task in tasks}
    client.evaluate(world, policy, protocol, results, many)
    world.env.close()  # at exit its renderer would complain
    client.close(results, protocol, rows, PAPERS, full=len(tasks) == 40)


if __name__ == "__main__":
    client.run_main(main)
