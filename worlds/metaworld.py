"""Meta-World's fifty tasks on MuJoCo, with its own scripted experts; needs the `[sim]` extra.

    python twinbrain.py --world metaworld                    # the ten of TEN
    python twinbrain.py --world metaworld:push-v3,reach-v3   # any of the fifty; mt10, mt50

What MuJoCo draws needs libegl1 (MUJOCO_GL=egl, the default without a display) or libosmesa6
(MUJOCO_GL=osmesa), no GPU. Action: dx dy dz in centimetres, then the hand, which opens above 0.
State: x y z of the hand, how open it is. The place of the object and the goal's are only seen.

Unlike the benchmark's, an episode ends after 300 steps, and its goals are drawn from all that
a task allows, anew in each episode.
"""

import atexit
import importlib
import os
import random
import sys
import warnings

import numpy as np
from PIL import Image

import common

# The usual ten: their experts never fail, and their goals can be seen.
TEN = ("push", "pick-place", "drawer-open", "drawer-close", "button-press", "button-press-topdown",
       "window-open", "faucet-open", "handle-press", "coffee-button")  # fmt: skip
MT10 = ("reach", "push", "pick-place", "door-open", "drawer-open", "drawer-close",
        "button-press-topdown", "peg-insert-side", "window-open", "window-close")  # fmt: skip

# name: what is handled | what is to be done | in other words | in words that only evaluation uses;
# an indented line goes on with the one above
WORDS = """
assembly: ring | put the ring on the peg | fit the ring over the peg | thread the ring on the stick
basketball: ball | put the ball in the hoop | drop the ball into the hoop | dunk the ball
bin-picking: block | move the block to the other bin | put the block in the blue bin | change the
    bin of the block
box-close: lid | close the box | put the lid on the box | cover the box
button-press: button | press the button | push the button in | hit the button
button-press-topdown: button | press the button down | push the button from above | hit the button
    from the top
button-press-topdown-wall: button | press the button down behind the wall | push the button behind
    the wall from above | hit the button beyond the wall from the top
button-press-wall: button | press the button behind the wall | push the button in behind the wall |
    hit the button beyond the wall
coffee-button: button | start the coffee machine | press the button of the coffee machine | make
    coffee
coffee-pull: cup | pull the cup from the coffee machine | move the cup away from the coffee machine
    | take the cup off the coffee machine
coffee-push: cup | push the cup under the coffee machine | move the cup to the coffee machine |
    place the cup below the coffee machine
dial-turn: dial | turn the dial | rotate the dial | twist the knob
disassemble: ring | take the ring off the peg | lift the ring from the peg | remove the ring from
    the stick
door-close: door | close the door | push the door shut | shut the door
door-lock: lock | lock the door | turn the lock down | bolt the door
door-open: door | open the door | pull the door open | swing the door wide
door-unlock: lock | unlock the door | turn the lock aside | unbolt the door
drawer-close: drawer | close the drawer | push the drawer shut | slide the drawer back in
drawer-open: drawer | open the drawer | pull the drawer open | pull out the drawer
faucet-close: faucet | close the faucet | turn the faucet off | shut the tap
faucet-open: faucet | open the faucet | turn the faucet on | let the tap run
hammer: hammer | hammer the nail in | hit the nail with the hammer | drive in the nail
hand-insert: block | put the block in the hole | place the block into the hole | sink the block in
    the hole
handle-press: handle | press the handle down | push the handle down | lower the handle
handle-press-side: handle | press the side handle down | push the side handle down | lower the side
    handle
handle-pull: handle | pull the handle up | lift the handle | raise the handle
handle-pull-side: handle | pull the side handle up | lift the side handle | raise the side handle
lever-pull: lever | pull the lever up | lift the lever | raise the lever
peg-insert-side: peg | put the peg in the hole | insert the peg into the hole | slide the peg in
peg-unplug-side: plug | pull the plug out | unplug the peg | draw the plug from its socket
pick-out-of-hole: block | take the block out of the hole | lift the block from the hole | get the
    block out of the pit
pick-place: puck | pick up the puck and bring it to the goal | lift the puck to the goal | carry the
    puck to the ball
pick-place-wall: puck | bring the puck over the wall to the goal | lift the puck over the wall to
    the goal | carry the puck past the wall
plate-slide: plate | slide the plate into the goal | push the plate into the goal | shove the plate
    into the net
plate-slide-back: plate | slide the plate back | pull the plate back out | bring the plate back to
    the front
plate-slide-back-side: plate | slide the plate back to the side | pull the plate out to the side |
    bring the plate back sideways
plate-slide-side: plate | slide the plate to the side into the goal | push the plate sideways into
    the goal | shove the plate sideways into the net
push: puck | push the puck to the goal | slide the puck to the goal | shove the puck until it is at
    the goal
push-back: block | push the block back to the goal | pull the block back to the goal | bring the
    block back to the goal
push-wall: puck | push the puck around the wall to the goal | slide the puck around the wall to the
    goal | shove the puck past the wall to the goal
reach: hand | move the hand to the goal | reach for the goal | bring the fingers to the goal
reach-wall: hand | move the hand over the wall to the goal | reach over the wall for the goal |
    bring the fingers past the wall to the goal
shelf-place: block | put the block on the shelf | place the block on the shelf | set the block down
    on the shelf
soccer: ball | push the ball into the goal | roll the ball into the goal | kick the ball into the
    net
stick-pull: stick | pull the bottle with the stick | hook the bottle and pull it | draw the bottle
    near with the stick
stick-push: stick | push the bottle with the stick | move the bottle away with the stick | shove the
    bottle using the stick
sweep: block | sweep the block off the table | push the block off the table | wipe the block off the
    table
sweep-into: block | sweep the block into the hole | push the block into the hole | wipe the block
    into the pit
window-close: window | close the window | push the window shut | slide the window closed
window-open: window | open the window | push the window open | slide the window aside
"""
ROWS = (line.partition(": ") for line in WORDS.replace("\n    ", " ").strip().splitlines())
TASKS = {f"{name}-v3": tuple(words.split(" | ")) for name, _, words in ROWS}
GROUPS = {"": TEN, "mt10": MT10, "mt50": [name.removesuffix("-v3") for name in TASKS]}

LIMIT = 300  # steps of an episode (the benchmark's: 500); experts take 40 to 180
LOOK_AT, DISTANCE, AZIMUTH, ELEVATION = (0.0, 0.7, 0.12), 1.25, 150, -35  # the static camera's
PHASES = ("reach", "descend", "grasp", "work")


# --- all that touches the simulator ---------------------------------------------------------------


def need():
    """The installed package, its warnings silenced."""
    if sys.platform == "linux" and not os.environ.get("DISPLAY"):
        os.environ.setdefault("MUJOCO_GL", "egl")
    warnings.filterwarnings("ignore", module=r"metaworld|gymnasium|glfw")
    try:
        return importlib.import_module("metaworld.env_dict")
    except ImportError:
        words = "--world metaworld needs Meta-World: pip install 'onefile-vla[sim]'"
        raise common.UserError(words) from None
    except Exception as error:  # MuJoCo looks for its graphics when imported
        raise cannot_draw(error) from None


def cannot_draw(error):
    how = os.environ.get("MUJOCO_GL", "unset")
    remedy = "apt-get install libegl1 libegl-mesa0 and MUJOCO_GL=egl, or libosmesa6 and osmesa"
    why = str(error).partition("\n")[0]
    return common.UserError(f"MuJoCo cannot draw here with MUJOCO_GL={how} ({why}): {remedy}")


def simulator(task):
    """A task's environment, its goals drawn by `seed()` at each `reset()` and told to experts."""
    env = need().ALL_V3_ENVIRONMENTS[task]()
    env._set_task_called, env._freeze_rand_vec, env.seeded_rand_vec = True, False, True
    env._partially_observable = False
    vars(env).pop("sawyer_observation_space", None)  # made for a hidden goal, it would clip to that
    env.model.vis.quality.offsamples = 0  # multisampling and shadows take nine tenths of the time
    return env


def script(task):
    """Meta-World's expert for a task: get_action(obs (39,)) -> (4,), and what it aims at."""
    need()
    return importlib.import_module("metaworld.policies").ENV_POLICY_MAP[task]()


_cameras = {}  # (task, pixels) -> renderer, one for all environments of a task in this process


def draw(env, task, side):
    """-> static and wrist camera, (side, side, 3) uint8, averaged from four times the pixels."""
    import mujoco

    if (task, side) not in _cameras:
        while len(_cameras) >= 16:
            _cameras.pop(next(iter(_cameras))).close()
        try:
            made = mujoco.Renderer(env.model, 2 * side, 2 * side)
        except Exception as error:  # each of its back ends has errors of its own
            raise cannot_draw(error) from None
        for flag in ("SHADOW", "REFLECTION", "SKYBOX", "HAZE"):
            made.scene.flags[getattr(mujoco.mjtRndFlag, f"mjRND_{flag}")] = 0
        if not _cameras:
            atexit.register(close_cameras)
        _cameras[task, side] = made
    renderer, views = _cameras[task, side], []
    for name, place in env._target_site_config:
        env._set_pos_site(name, place)  # stepping puts the mark of the goal back
    static = mujoco.MjvCamera()
    static.lookat[:], static.distance = LOOK_AT, DISTANCE
    static.azimuth, static.elevation = AZIMUTH, ELEVATION
    wrist = mujoco.MjvCamera()
    wrist.type = mujoco.mjtCamera.mjCAMERA_FIXED
    wrist.fixedcamid = env.model.camera("gripperPOV").id
    for camera in (static, wrist):
        everything = mujoco.mjtCatBit.mjCAT_ALL.value
        mujoco.mjv_updateScene(env.model, env.data, mujoco.MjvOption(), None, camera, everything,
                               renderer.scene)  # fmt: skip
        views.append(np.asarray(Image.fromarray(renderer.render()).reduce(2)))
    return views


def close_cameras():
    """Before a process ends: its graphics cannot be freed after that."""
    while _cameras:
        _cameras.popitem()[1].close()


# --- the world ------------------------------------------------------------------------------------


class MetaWorld:
    """See worlds/__init__.py. One environment a task is kept, as making it takes long."""

    slow, fps = True, 80.0

    def __init__(self, suite="", size=64, wrist_size=32):
        self.tasks, _ = self.offers(suite)
        self.size, self.wrist_size, self.made = size, wrist_size, {}
        need()

    @staticmethod
    def offers(suite):
        names = GROUPS.get(suite) or suite.split(",")
        tasks = tuple(name if name.endswith("-v3") else f"{name}-v3" for name in names)
        for task in tasks:
            if task not in TASKS:
                raise LookupError(task.removesuffix("-v3"), [*TASKS, *filter(None, GROUPS)])
        return tasks, ("in", "wording")

    def reset(self, seed, task=None, domain="in"):
        rng = random.Random(f"{task}-{domain}-{seed}")
        self.task = task or rng.choice(self.tasks)
        if self.task not in self.made:
            self.made[self.task] = simulator(self.task)
        self.env = self.made[self.task]
        self.thing, *words = TASKS[self.task]
        self.aim = words[0]
        self.instruction = words[2] if domain == "wording" else rng.choice(words[:2])
        self.env.seed(rng.randrange(2**31))
        self.obs, _ = self.env.reset()
        self.success, self.steps, self.max_steps, self.nudge = False, 0, LIMIT, None
        return self.observe()

    def observe(self):
        side = max(self.size, self.wrist_size)
        views = draw(self.env, self.task, side)
        sides = {"static": self.size, "wrist": self.wrist_size}
        images = {
            name: view if n == side else np.asarray(Image.fromarray(view).resize((n, n), Image.BOX))
            for (name, n), view in zip(sides.items(), views)
        }
        return {"images": images, "state": self.obs[:4].astype(np.float32)}

    def step(self, action):
        """(4,) in [-1, 1]; what the fingers get is an effort to close, the other way round."""
        move = np.clip(np.asarray(action, np.float64), -1, 1)
        if self.nudge is not None:
            move[:3] = np.clip(move[:3] + self.nudge, -1, 1)
            self.nudge = None
        move[3] = -move[3]
        self.obs, _, _, _, info = self.env.step(move.astype(np.float32))
        self.steps += 1
        self.success = self.success or bool(info["success"] > 0.5)

    def expert(self, seed=0, noise=0.0):
        return Expert(self, seed, noise)


class Expert:
    """Meta-World's script for the task. With noise > 0 the hand is pushed off its way now and then
    for a few steps; the labels stay the script's, so that recordings show how to recover.

    What it says and its phase come from where the hand and the thing are, and where it goes.
    """

    def __init__(self, world, seed=0, noise=0.0):
        self.world, self.noise, self.script = world, noise, script(world.task)
        self.rng, self.left, self.push = random.Random(f"expert-{seed}"), 0, None
        self.first, self.phase = world.obs[4:7].copy(), 0

    def act(self):
        """-> action (4,) float32 for the world as it is now"""
        if self.left == 0 and self.rng.random() < 0.12 * self.noise:
            self.left = self.rng.randint(2, 4)
            self.push = np.array([self.rng.uniform(-2, 2) for _ in range(3)])
        if self.left:
            self.world.nudge, self.left = self.push, self.left - 1
        effort = self.script.get_action(self.world.obs)
        action = np.clip(effort, -1, 1).astype(np.float32)
        # Efforts to close differ; none at all, half open where it is said, works as fully open.
        action[3] = -action[3] if action[3] > 0 else 1.0
        self.phase = self._phase(action)
        return action

    def _phase(self, action):
        hand, thing = self.world.obs[:3], self.world.obs[4:7]
        x, y, z = thing - hand
        if np.linalg.norm(thing - hand) > 0.12:
            self.first = thing.copy()  # whatever moves it there, the hand does not
        if np.linalg.norm(thing - self.first) > 0.01 and self.world.thing != "hand":
            return PHASES.index("work")
        if action[3] < 0 and np.linalg.norm(thing - hand) < 0.1:
            return PHASES.index("grasp")
        return PHASES.index("descend" if np.hypot(x, y) < 0.05 and z < -0.06 else "reach")

    @property
    def reasoning(self):
        """One sentence for the frame of the last act(): what is seen, what is done now, and why."""
        w, phase = self.world, PHASES[self.phase]
        name, where = f"the {w.thing}", self.world.obs[4:7] - self.world.obs[:3]
        if w.thing == "hand":
            where = np.asarray(w.env._target_pos) - w.obs[:3]
            name = "the goal"
        seen = f"{name} is {relation(where)} the hand"
        if phase == "work":
            return f"{seen} so i go on because i must {w.aim}"
        act = {"reach": f"move to {name}", "descend": "lower the hand",
               "grasp": "close the fingers"}[phase]  # fmt: skip
        return f"{seen} so i {act} because i must {w.aim}"


def relation(where):
    """A vector from the hand (3,), x to the right, y away from the robot, in words."""
    x, y, z = where
    if np.hypot(x, y) < 0.04:
        return "below" if z < -0.06 else "at"
    if abs(x) > abs(y):
        return "right of" if x > 0 else "left of"
    return "behind" if y > 0 else "in front of"
