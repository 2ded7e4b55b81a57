"""RoboCasa's GR1 tabletop tasks: 24, a humanoid's two arms, two hands and waist (TwinBrainVLA).

  python worlds/robocasa.py --server 127.0.0.1:8000                       # 24 tasks, 50 episodes
  python worlds/robocasa.py --server 127.0.0.1:8000 --tasks PnPCanToDrawerClose --episodes 10

Install, in an environment of its own with Python 3.10 (the last line downloads the assets; its
gigabytes and its renderer, MUJOCO_GL=egl, want a GPU):

  git clone https://github.com/ARISE-Initiative/robosuite.git
  git clone https://github.com/robocasa/robocasa-gr1-tabletop-tasks.git
  pip install -e robosuite -e robocasa-gr1-tabletop-tasks websockets msgpack pillow
  cd robocasa-gr1-tabletop-tasks && python robocasa/scripts/download_tabletop_assets.py -y

Protocol (starVLA's, after Isaac-GR00T; TwinBrainVLA, Table 8): 50 episodes of each task, 720 steps
at 20 Hz; 12 of a chunk's 16 actions are executed, without an ensemble, and success is looked for
after each of these dozens. One camera, `ego_view` cropped and padded to 256 pixels; the instruction
as the environment says it. Actions are the joints' positions: left arm 7, right arm 7, left hand 6,
right hand 6, waist 3. The state, the same 29 numbers, is sent; the paper's policy reads none. The
authors seed nothing: here episode i has seed --seed + i.
"""

import sys
from pathlib import Path

if __name__ == "__main__":  # else this folder would hide packages of the same names
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import numpy as np

from worlds import client

PROTOCOL = {"episodes": 50, "steps": 720, "execute": 12, "ensemble": 0, "seed": 0}
PARTS = {"left_arm": 7, "right_arm": 7, "left_hand": 6, "right_hand": 6, "waist": 3}
CAMERA = "video.ego_view_bg_crop_pad_res256_freq20"
SENTENCE = "annotation.human.coarse_action"
WHOSE = ("TwinBrainVLA 4B", "TwinBrainVLA 3B", "QwenGR00T 4B", "GR00T N1.6")
TABLE = """
BottleToCabinet 74 62 46 51.5         CanToDrawer 72 66 80 13           CupToDrawer 52 46 54 8.5
MilkToMicrowave 60 52 48 14           PotatoToMicrowave 36 56 28 41.5   WineToCabinet 46 58 46 16.5
CuttingboardToBasket 62 50 48 58      CuttingboardToCardboardbox 46 44 40 46.5
CuttingboardToPan 70 64 68 68.5       CuttingboardToPot 66 60 52 65
CuttingboardToTieredbasket 52 52 56 46.5
PlacematToBasket 30 56 42 58.5        PlacematToBowl 54 59 44 57.5      PlacematToPlate 64 62 48 63
PlacematToTieredshelf 38 28 18 28.5   PlateToBowl 60 62 60 57           PlateToPan 56 56 54 51
PlateToCardboardbox 58 52 50 43.5     PlateToPlate 66 68 70 78.7        TrayToPot 56 60 50 64.5
TrayToCardboardbox 46 40 38 51.5      TrayToPlate 72 56 56 71
TrayToTieredbasket 46 42 36 57        TrayToTieredshelf 28 34 16 31.5
""".split()
NUMBERS = {TABLE[i]: [float(x) for x in TABLE[i + 1 : i + 5]] for i in range(0, len(TABLE), 5)}
CLOSE = ("Cabinet", "Drawer", "Microwave")  # what is closed in the end


def full_name(short):
    """BottleToCabinet -> PnPBottleToCabinetClose; PlateToPan -> PosttrainPnPNovelFromPlate..."""
    if short.endswith(CLOSE):
        return f"PnP{short}Close"
    return f"PosttrainPnPNovelFrom{short}SplitA"


TASKS = {full_name(short): short for short in NUMBERS}
AVERAGES = (54.6, 53.5, 47.8, 47.6)
PAPERS = {
    whose: {full_name(short): n[k] for short, n in NUMBERS.items()} | {"average": AVERAGES[k]}
    for k, whose in enumerate(WHOSE)
}


def make(task, seed):
    try:
        import gymnasium as gym
        import robocasa  # noqa: F401
        import robocasa.utils.gym_utils.gymnasium_groot  # noqa: F401
    except ImportError as error:
        words = client.install(__doc__)
        raise client.UserError(f"RoboCasa GR1 cannot be imported ({error}); {words}") from None
    name = f"gr1_unified/{task}_GR1ArmsAndWaistFourierHands_Env"
    try:
        return gym.make(name, enable_render=True, seed=seed)
    except FileNotFoundError as error:
        words = "the assets are missing: python robocasa/scripts/download_tabletop_assets.py -y"
        raise client.UserError(f"RoboCasa GR1: {words} ({error.filename})") from None


class RoboCasa:
    """One task after another; one environment for all episodes of a task."""

    width, max_steps = sum(PARTS.values()), PROTOCOL["steps"]

    def __init__(self, seed=0, execute=PROTOCOL["execute"], make=make):
        self.make, self.seed, self.execute, self.task, self.env = make, seed, execute, None, None

    def reset(self, seed, task):
        if task != self.task:
            if self.env is not None:
                self.env.close()
            self.env, self.task = self.make(task, self.seed), task
        self.raw, _ = self.env.reset(seed=self.seed + seed)
        self.instruction, self.steps, self.success = self.raw[SENTENCE], 0, False
        return self.observe()

    def observe(self):
        state = np.concatenate([np.ravel(self.raw[f"state.{part}"]) for part in PARTS])
        return {"images": {"static": self.raw[CAMERA]}, "state": state.astype(np.float32)}

    def step(self, action):
        """action (29,): positions of the joints"""
        parts = np.split(np.asarray(action, np.float64), np.cumsum(list(PARTS.values()))[:-1])
        sent = {f"action.{part}": values for part, values in zip(PARTS, parts)}
        self.raw, _, _, _, info = self.env.step(sent)
        self.steps += 1
        if self.steps % self.execute == 0:
            self.success = self.success or bool(info["success"])
        return self.observe()


def rows(done):
    some = {task: done["tasks"].get(task) for task in TASKS}
    return some | {"average": client.mean(some.values())}


def main(argv=None):
    p = client.parser(__doc__, "robocasa", "episodes of each task (50)", seeded=True)
    p.add_argument("--tasks", default="", metavar="A,B", help=", ".join(TASKS))
    args = p.parse_args(argv)
    tasks = client.chosen(args.tasks, TASKS, "--tasks")
    protocol = client.settings(args, PROTOCOL)
    world = RoboCasa(protocol["seed"], protocol["execute"])
    world.reset(0, tasks[0])  # before a server is asked for
    policy = client.Server(args.server, args.token, args.gripper)
    versions = {n: n for n in ("robocasa", "robosuite", "mujoco")}
    results = client.Results("robocasa", args.out, protocol, policy, versions, args.gifs)
    client.evaluate(world, policy, protocol, results, dict.fromkeys(tasks, protocol["episodes"]))
    client.close(results, protocol, rows, PAPERS, full=len(tasks) == len(TASKS))


if __name__ == "__main__":
    client.run_main(main)
