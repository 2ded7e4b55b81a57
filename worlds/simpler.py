"""SimplerEnv: Bridge's WidowX (TwinBrainVLA, DualVLA) and the Google robot (DualVLA).

  python worlds/simpler.py --server 127.0.0.1:8000                        # WidowX, 480 episodes
  python worlds/simpler.py --server 127.0.0.1:8000 --suite google         # 2,289 episodes
  python worlds/simpler.py --server 127.0.0.1:8000 --tasks stack --episodes 24

Install, in an environment of its own with Python 3.10 or 3.11, on a machine with an NVIDIA GPU
(SAPIEN finds no device without one):

  git clone --recurse-submodules https://github.com/simpler-env/SimplerEnv
  pip install numpy==1.24.4 -e SimplerEnv/ManiSkill2_real2sim -e SimplerEnv \\
      websockets msgpack pillow

Protocol (the repository's scripts, as starVLA and InstructVLA run them): the environment's own
instruction; one camera, no state; the policy plans at each step, and the actions executed are an
adaptive ensemble of the last 7 chunks (WidowX) or 2 (Google robot). An episode always lasts to its
step limit, and counts if the goal holds at its last step. Rotations arrive as roll, pitch, yaw and
leave as axis and angle.
  widowx  24 starts a task, 5 times each (TwinBrainVLA: Avg@480), 120 steps at 5 Hz; gripper +1
          open, -1 closed.
  google  80 steps at 3 Hz (drawers 113); "-vm" visual matching: four recoloured arms over a real
          photograph; "-va" variants: other backgrounds, lights, tables, distractors (the altered
          cameras are left out, as in the authors' average). The gripper's action is a change, and a
          change is repeated for 10 steps.
"""

import itertools
import math
import sys
from pathlib import Path

if __name__ == "__main__":  # else this folder would hide packages of the same names
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import numpy as np

from worlds import client

PROTOCOLS = {
    "widowx": {"episodes": 120, "execute": 1, "ensemble": 7},
    "google": {"episodes": 0, "execute": 1, "ensemble": 2},
}
PAPERS = {
    "widowx": {  # TwinBrainVLA, Table 1; DualVLA, Table 2
        "TwinBrainVLA 4B": dict(spoon=87.5, carrot=58.3, stack=33.3, eggplant=79.1, average=64.5),
        "TwinBrainVLA 3B": dict(spoon=83.3, carrot=41.7, stack=31.5, eggplant=77.1, average=58.4),
        "vanilla VLA 4B": dict(spoon=87.5, carrot=50.0, stack=29.2, eggplant=54.2, average=55.2),
        "DualVLA": dict(spoon=50.0, carrot=50.0, stack=8.3),
        "InstructVLA-G": dict(spoon=33.3, carrot=29.2, stack=12.5),
    },
    "google": {  # DualVLA, Table 2
        "DualVLA": {"drawer-vm": 63.9, "drawer-va": 64.0, "can-vm": 93.3, "can-va": 82.7,
                    "near-vm": 60.9, "near-va": 75.3},
        "InstructVLA-G": {"drawer-vm": 55.0, "drawer-va": 55.2, "can-vm": 77.2, "can-va": 90.8,
                          "near-vm": 54.1, "near-va": 70.0},
    },
}  # fmt: skip
CONTROL = {
    "widowx": "arm_pd_ee_target_delta_pose_align2_gripper_pd_joint_pos",
    "google": "arm_pd_ee_delta_pose_align_interpolate_by_planner_"
    "gripper_pd_joint_target_delta_pos_interpolate_by_planner",
}
CAMERA = {"widowx": "3rd_view_camera", "google": "overhead_camera"}
STICKY = 10  # steps that a change of the Google robot's gripper lasts

# --- the episodes ---------------------------------------------------------------------------------
# An episode: (environment, what it is built with, what it is reset with). Numbers and names are
# those of the repository's scripts.

WIDOWX = {
    "spoon": "PutSpoonOnTableClothInScene-v0",
    "carrot": "PutCarrotOnPlateInScene-v0",
    "stack": "StackGreenCubeOnYellowCubeBakedTexInScene-v0",
    "eggplant": "PutEggplantInBasketScene-v0",
}
ARMS = (None, "recolor_tabletop_visual_matching_1", "recolor_tabletop_visual_matching_2",
        "recolor_cabinet_visual_matching_1")  # fmt: skip
TABLE = "google_pick_coke_can_1_v4"
SCENES = ({}, {"scene_name": TABLE + "_alt_background"},
          {"scene_name": TABLE + "_alt_background_2"},
          {"slightly_darker_lighting": True}, {"slightly_brighter_lighting": True},
          {"scene_name": "Baked_sc1_staging_objaverse_cabinet1_h870"},
          {"scene_name": "Baked_sc1_staging_objaverse_cabinet2_h870"})  # fmt: skip
ROOMS = ({}, {"scene_name": "modern_bedroom_no_roof"}, {"scene_name": "modern_office_no_roof"},
         {"light_mode": "brighter"}, {"light_mode": "darker"},
         {"station_name": "mk_station2"}, {"station_name": "mk_station3"})  # fmt: skip
CANS = ({"lr_switch": True}, {"upright": True}, {"laid_vertically": True})
DRAWERS = [f"{way}{which}DrawerCustomInScene-v0" for way in ("Open", "Close")
           for which in ("Top", "Middle", "Bottom")]  # fmt: skip
STANDS = {  # photograph: where the robot stands, x, y, yaw
    "a0": (0.644, -0.179, -0.03), "a1": (0.765, -0.182, -0.02), "a2": (0.889, -0.203, -0.06),
    "b0": (0.652, 0.009, 0), "b1": (0.752, 0.009, 0), "b2": (0.851, 0.035, 0),
    "c0": (0.665, 0.224, 0), "c1": (0.765, 0.222, -0.025), "c2": (0.865, 0.222, -0.025),
}  # fmt: skip


def standing(x, y, yaw=0.0):
    """Where the robot stands; the quaternion (w, x, y, z) of half a turn, and then yaw."""
    turn = np.array([-math.sin(yaw / 2), 0, 0, math.cos(yaw / 2)])
    return {"robot_init_options": {"init_xy": np.array([x, y]), "init_rot_quat": turn}}


def at(x, y):
    return {"obj_init_options": {"init_xy": np.array([x, y])}}


def numbered(i):
    return {"obj_init_options": {"episode_id": i}}


def widowx(task):
    sink = task == "eggplant"
    built = {"robot": "widowx_sink_camera_setup" if sink else "widowx", "control_freq": 5,
             "sim_freq": 500, "max_episode_steps": 120,
             "scene_name": "bridge_table_1_v2" if sink else "bridge_table_1_v1",
             "overlay": "bridge_sink.png" if sink else "bridge_real_eval_1.png"}  # fmt: skip
    robot = standing(0.127, 0.06) if sink else standing(0.147, 0.028)
    return [(WIDOWX[task], built, robot | numbered(i)) for i in range(24)]


def google(task):
    what, way = task.split("-")
    matching = way == "vm"
    built = {"robot": "google_robot_static", "control_freq": 3, "sim_freq": 513,
             "max_episode_steps": 113 if what == "drawer" else 80, "scene_name": TABLE}  # fmt: skip
    if what == "can":
        name, photo, robot = "GraspSingleOpenedCokeCan{}InScene-v0", "google_coke_can", (0.35, 0.2)
        grid = itertools.product(np.linspace(-0.35, -0.12, 5), np.linspace(-0.02, 0.42, 5))
        starts = [standing(*robot) | at(x, y) for x, y in grid]
        others = [("Distractor", {}), ("Distractor", {"distractor_config": "more"})]
        kinds = CANS
    elif what == "near":
        name, photo = "MoveNearGoogle{}InScene-v0", "google_move_near"
        starts = [standing(0.35, 0.21, -0.09) | numbered(i) for i in range(60)]
        others, kinds = [("", {"no_distractor": True})], ({},)
    else:
        return drawers(built, matching)
    if matching:
        looks = [("BakedTex" if what == "near" else "", {"urdf_version": arm}) for arm in ARMS]
        built["overlay"] = f"{photo}_real_eval_1.png"
    else:
        looks = [("", scene) for scene in SCENES] + others
    return [(name.format(inner), built | look | kind, start)
            for inner, look in looks for kind in kinds for start in starts]  # fmt: skip


def drawers(built, matching):
    """Ray-traced, since policies read depth from shadows; where the robot stands is what varies."""
    built = built | {"shader_dir": "rt"}
    if matching:
        built |= {"scene_name": "dummy_drawer", "station_name": "mk_station_recolor",
                  "light_mode": "simple", "disable_bad_material": True}  # fmt: skip
        looks = [({"urdf_version": arm, "overlay": f"open_drawer_{photo}.png"}, standing(*where))
                 for arm in ARMS for photo, where in STANDS.items()]  # fmt: skip
    else:
        built["scene_name"] = "frl_apartment_stage_simple"
        grid = itertools.product(np.linspace(0.65, 0.85, 3), np.linspace(-0.2, 0.2, 3))
        looks = [(room, standing(x, y)) for (x, y), room in itertools.product(grid, ROOMS)]
    return [(name, built | look, start | at(0.0, 0.0))
            for name in DRAWERS for look, start in looks]  # fmt: skip


GOOGLE = [f"{what}-{way}" for what in ("drawer", "can", "near") for way in ("vm", "va")]
TASKS = {"widowx": list(WIDOWX), "google": GOOGLE}


def starts(task):
    return widowx(task) if task in WIDOWX else google(task)


# --- the world ------------------------------------------------------------------------------------


def axis_angle(roll, pitch, yaw):
    """Turns about the fixed axes x, y, z in that order -> axis times angle (3,)."""
    cr, cp, cy = (math.cos(a / 2) for a in (roll, pitch, yaw))
    sr, sp, sy = (math.sin(a / 2) for a in (roll, pitch, yaw))
    w = cr * cp * cy + sr * sp * sy
    v = np.array([sr * cp * cy - cr * sp * sy, cr * sp * cy + sr * cp * sy,
                  cr * cp * sy - sr * sp * cy])  # fmt: skip
    if w < 0:
        w, v = -w, -v
    far = np.linalg.norm(v)
    return v * (2 * math.atan2(far, w) / far if far > 1e-12 else 2.0)


def make(name, built):
    """One environment of ManiSkill2's real-to-sim set."""
    try:
        import gymnasium as gym
        import mani_skill2_real2sim.envs  # noqa: F401
        from mani_skill2_real2sim import ASSET_DIR
    except ImportError as error:
        words = client.install(__doc__)
        raise client.UserError(f"SimplerEnv cannot be imported ({error}); {words}") from None
    built = dict(built)
    kind = "widowx" if built["robot"].startswith("widowx") else "google"
    if photo := built.pop("overlay", None):
        built["rgb_overlay_path"] = str(ASSET_DIR / "real_inpainting" / photo)
        built["rgb_overlay_cameras"] = [CAMERA[kind]]
    more = {"obs_mode": "rgbd", "control_mode": CONTROL[kind],
            "camera_cfgs": {"add_segmentation": True}}  # fmt: skip
    try:
        return gym.make(name, **more, **built)
    except RuntimeError as error:
        why = str(error).splitlines()[0] if str(error) else "RuntimeError"
        raise client.UserError(f"SAPIEN cannot draw here ({why}): it needs an NVIDIA GPU") from None


class Simpler:
    """A task's starts, by number; a new environment for each, as the authors' evaluator does."""

    width = 7

    def __init__(self, make=make):
        self.make, self.env = make, None

    def reset(self, seed, task):
        known = starts(task)
        name, built, options = known[seed % len(known)]
        if self.env is not None:
            self.env.close()
        self.env = self.make(name, built)
        self.kind = "widowx" if task in WIDOWX else "google"
        self.raw, _ = self.env.reset(options=options)
        self.inner = self.env.unwrapped
        self.instruction = self.inner.get_language_instruction()
        self.max_steps, self.steps, self.done = built["max_episode_steps"], 0, False
        self.open, self.change, self.left = None, 0.0, 0
        return self.observe()

    @property
    def success(self):
        """Judged at the last step alone."""
        return self.steps >= self.max_steps and self.done

    def observe(self):
        return {"images": {"static": self.raw["image"][CAMERA[self.kind]]["rgb"]}, "state": None}

    def hand(self, now):
        """How open the policy wants the hand, 0 to 1 -> the gripper's number."""
        if self.kind == "widowx":
            return 1.0 if now > 0.5 else -1.0
        if self.open is None:
            self.open = now
        change = self.open - now  # above 0 closes
        if abs(change) > 0.5 and not self.left:
            self.change, self.left, self.open = change, STICKY, now
        if self.left:
            self.left -= 1
            change = self.change
        return change

    def step(self, action):
        """action (7,): change of xyz and of roll, pitch, yaw, gripper"""
        whole = np.array([*action[:3], *axis_angle(*action[3:6]), self.hand(action[6])])
        self.raw, _, done, _, _ = self.env.step(whole)
        self.steps, self.done = self.steps + 1, bool(done)
        self.instruction = self.inner.get_language_instruction()
        return self.observe()


# --- main -----------------------------------------------------------------------------------------


def main(argv=None):
    p = client.parser(__doc__, "simpler", "episodes of each task (widowx 120; google: all)")
    p.add_argument("--suite", default="widowx", choices=list(TASKS))
    p.add_argument(
        "--tasks", default="", metavar="A,B", help="; ".join(map(" ".join, TASKS.values()))
    )
    args = p.parse_args(argv)
    tasks = client.chosen(args.tasks, TASKS[args.suite], f"--tasks of {args.suite}")
    protocol = client.settings(args, PROTOCOLS[args.suite], suite=args.suite)
    world = Simpler()
    make(*starts(tasks[0])[0][:2]).close()  # before a server is asked for
    policy = client.Server(args.server, args.token, args.gripper)
    versions = {n: n for n in ("simpler_env", "mani_skill2_real2sim", "sapien")}
    results = client.Results("simpler", args.out, protocol, policy, versions, args.gifs)
    many = {task: protocol["episodes"] or len(starts(task)) for task in tasks}
    client.evaluate(world, policy, protocol, results, many)

    def rows(done):
        some = {task: done["tasks"].get(task) for task in TASKS[args.suite]}
        return some | {"average": client.mean(some.values())}

    full = len(tasks) == len(TASKS[args.suite])
    client.close(results, protocol, rows, PAPERS[args.suite], full)


if __name__ == "__main__":
    client.run_main(main)
