"""A small tabletop robot: kinematic physics, two cameras, tasks in words, and a scripted expert.

    from worlds.tabletop import Expert, Tabletop
    world = Tabletop("bridge", size=64, wrist_size=32)
    obs, expert = world.reset(seed=0), Expert(world)
    while not world.success:
        world.step(expert.act())

The table is [0, 1] x [0, 1]; x points right, y away from the viewer, z up; angles are radians.
Everything is plain Python floats and one `random.Random(seed)`, so equal seeds and equal actions
give equal pixels; drawing.py paints them.

`python worlds/tabletop.py` lets a person drive, in a terminal.

The hand has seven actions: three moves, three turns and the fingers. Each matters in some task:
roll presses the tilted button, pitch reaches the drawer's handle, yaw fits the hand to a bar.
Bars are asked for in the domain `shape` alone: demonstrations turn only to undo a disturbance.
"""

import math
import random
import sys
from dataclasses import dataclass
from pathlib import Path

if __name__ == "__main__":  # else this folder would hide packages of the same names
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import numpy as np

from worlds.drawing import (
    CABINET_Y,
    COLOURS,
    HANDLE_Z,
    LOOKS,
    MOVABLES,
    TARGETS,
    TRAVEL,
    Canvas,
    Labels,
    paint_scene,
)

# --- what there is --------------------------------------------------------------------------------

KNOWN = ("red", "green", "blue")  # the colours in the demonstrations
UNSEEN = ("yellow", "purple", "orange")  # only the pretrained backbone has seen these
FIXTURES = ("drawer", "button")

# kind: (radius of its footprint, height); the walls of a bowl and a basket are as high as they are
SIZE = {
    "block": (0.045, 0.09), "bar": (0.040, 0.06), "ball": (0.045, 0.09), "cup": (0.045, 0.10),
    "spoon": (0.045, 0.04), "carrot": (0.045, 0.055), "eggplant": (0.045, 0.07),
    "plate": (0.10, 0.012), "towel": (0.11, 0.008), "bowl": (0.09, 0.06), "basket": (0.13, 0.09),
    "drawer": (0.13, 0.15), "button": (0.06, 0.09),
}
FLOOR = {"plate": 0.012, "towel": 0.008, "bowl": 0.015, "basket": 0.01}  # where things rest inside


@dataclass(eq=False)
class Thing:
    """Something on the table; (x, y) is its middle, z the height of its lowest point."""
    kind: str
    colour: str
    x: float
    y: float
    z: float = 0.0
    yaw: float = 0.0
    opened: float = 0.0  # drawer: 0 closed .. 1 open
    pressed: bool = False  # button
    tilt: float = 0.0  # button: how far its cap leans to the right
    on: "Thing | None" = None  # what it lies on; None is the table

    @property
    def radius(self):
        return SIZE[self.kind][0]

    @property
    def top(self):
        return self.z + SIZE[self.kind][1]

    @property
    def name(self):
        return f"{self.colour} {self.kind}".strip()

    @property
    def handle(self):
        """(x, y) of a drawer's handle."""
        return self.x, CABINET_Y - 0.03 - TRAVEL * self.opened



# --- tasks and their words ------------------------------------------------------------------------

SUITES = {
    "bridge": ("spoon_on_towel", "carrot_on_plate", "stack_block", "eggplant_in_basket"),
    "spatial": ("left_to_basket", "right_to_basket", "front_to_basket", "behind_to_basket",
                "left_to_towel", "right_to_towel", "front_to_towel", "behind_to_towel",
                "on_plate_to_basket", "on_table_to_towel"),
    "object": ("red_block", "blue_block", "green_ball", "red_ball", "blue_cup", "green_cup",
               "red_carrot", "green_carrot", "blue_eggplant", "red_eggplant"),
    "goal": ("open_drawer", "close_drawer", "press_button", "block_on_plate", "block_in_bowl",
             "cup_on_plate", "stack", "push_left", "push_right", "push_front"),
    "long": ("block_in_basket+press_button", "block_in_basket+ball_in_basket",
             "block_on_plate+press_button", "ball_in_basket+close_drawer", "stack+press_button",
             "block_on_plate+ball_in_basket", "open_drawer+press_button",
             "close_drawer+press_button", "ball_on_plate+block_in_basket", "stack+ball_on_plate"),
    "abc_d": ("put_on", "put_in", "stack", "shove_left", "shove_right", "open_drawer",
              "close_drawer", "press_button"),
    "franka": ("pick_red", "pick_green", "pick_blue", "pick_all"),
}
DOMAINS = ("in", "colour", "shape", "pair", "wording", "look")  # how an evaluation differs
TRAIN_TASKS = SUITES | {"franka": SUITES["franka"][:3]}  # what demonstrations contain
UNTOUCHED = {  # domain: how the sub-tasks begin that may stay as they were demonstrated
    "colour": ("open_", "close_", "press_"),
    "shape": ("open_", "close_", "press_", "cup_", "ball_", "put_"),
    "pair": ("open_", "close_", "press_", "push_"),
}
BOUND = {"put": 50, "push": 45, "shove": 40, "drawer": 45, "press": 30}  # steps allowed for a goal

# kind of goal: (wordings in the demonstrations, wordings only evaluation uses)
WORDS = {
    "on": (("put the {o} on the {t}", "place the {o} on the {t}", "move the {o} onto the {t}"),
           ("set the {o} down on the {t}", "lay the {o} upon the {t}")),
    "in": (("put the {o} in the {t}", "place the {o} in the {t}", "move the {o} into the {t}"),
           ("drop the {o} inside the {t}", "the {o} belongs in the {t}")),
    "stack": (("stack the {o} on the {t}", "put the {o} on top of the {t}",
               "place the {o} on top of the {t}"),
              ("set the {o} down on the {t}", "pile the {o} onto the {t}")),
    "box": (("pick up the {o} and put it into the {t}",),
            ("grab the {o} and drop it into the {t}", "the {o} belongs in the {t}")),
    "push": (("push the {o} {s} the {t}", "slide the {o} {s} the {t}"),
             ("shove the {o} until it is {s} the {t}",)),
    "shove": (("push the {o} to the {s}", "slide the {o} to the {s}"),
              ("shove the {o} over to the {s}",)),
    "open": (("open the drawer", "pull the drawer open"), ("pull out the drawer",)),
    "close": (("close the drawer", "push the drawer shut"), ("slide the drawer back in",)),
    "press": (("press the button", "push the button down"), ("hit the button",)),
    "all": (("pick up all blocks and put them into the {t}",),) * 2,
}


# --- the world ------------------------------------------------------------------------------------

HOME = (0.5, 0.40, 0.28, 0.0, 0.0, 0.0)
LIMITS = ((0.05, 0.95), (0.05, 0.95), (0.02, 0.40), (-0.8, 0.8), (-0.8, 0.8),
          (-math.pi / 2, math.pi / 2))
MOVE, TURN, SQUEEZE = 0.06, 0.25, 0.5  # the most one step changes: metres, radians, opening
GRASP_RADIUS, STACK_RADIUS = 0.05, 0.045
FINGER = 0.02  # radius of the closed fingers
IN_SIGHT = 24  # pixels, of 64 x 64, that show enough of a thing to name it


class Tabletop:
    """A suite of tasks. reset(), then observe() and step() until success or max_steps."""

    slow, fps = False, 5.0

    @staticmethod
    def offers(suite):
        """Tasks and domains of a suite, as worlds/__init__.py asks it of a world."""
        suite = suite or "bridge"
        if suite not in SUITES:
            raise LookupError(suite, list(SUITES))
        more = {"abc_d": ("chain",), "franka": ("pick_all",)}.get(suite, ())
        everywhere = ("long", "abc_d", "franka")  # anything is put on or in anything
        pair = ("pair",) if suite not in everywhere else ()
        return TRAIN_TASKS[suite], ("in", "look", "colour", "shape", *pair, "wording", *more)

    @staticmethod
    def untouched(suite, domain):
        """Tasks that may stay as they were demonstrated: no evaluation of that domain."""
        begin, tasks = UNTOUCHED.get(domain, ()), TRAIN_TASKS[suite or "bridge"]
        return [t for t in tasks if all(part.startswith(begin) for part in t.split("+"))]

    def expert(self, seed=0, noise=0.0):
        return Expert(self, seed, noise)

    def __init__(self, suite="bridge", size=64, wrist_size=32):
        self.suite, self.size, self.wrist_size = suite or "bridge", size, wrist_size
        self.scatter(0)

    def _clear(self, look):
        self.things, self.held, self.offset = [], None, (0.0, 0.0)
        self.pose, self.opening = list(HOME), 1.0
        self.look, self.instruction, self.task, self.domain = look, "", "", "in"
        self.goals, self.done, self.steps = [], [], 0
        self.plan = []  # what is left of a chain: (instruction, task, goal)
        self.nudge = None  # an Expert's disturbance of the next step

    def scatter(self, seed, look=None):
        """A random scene without a task: every kind, all six colours, any pose of the hand."""
        rng = random.Random(f"scatter-{seed}")
        self._scatter(rng, look)
        while not self.in_sight():
            self._scatter(rng, look)
        return self.observe()

    def _scatter(self, rng, look):
        self._clear(look or rng.choice(sorted(LOOKS)))
        if rng.random() < 0.25:
            self._add_drawer(rng.choice((0.22, 0.78)), rng.choice((0.0, 0.0, 1.0, rng.random())))
        if rng.random() < 0.25:
            self._add_button(rng, rng.choice(list(COLOURS)))
            self.things[-1].pressed = rng.random() < 0.5
        for _ in range(rng.randint(1, 6)):
            kind = rng.choice(MOVABLES if rng.random() < 0.65 else TARGETS)
            self._add(rng, kind, rng.choice(list(COLOURS)))
        movables = [t for t in self.things if t.kind in MOVABLES]
        for t in movables:
            under = [b for b in self.things if b.kind in TARGETS + ("block",) and b is not t
                     and b.on is None and self._carrying(b) is None]
            if under and rng.random() < 0.3 and self._carrying(t) is None:
                base = rng.choice(under)
                t.x, t.y = base.x + rng.uniform(-0.03, 0.03), base.y + rng.uniform(-0.03, 0.03)
                self._land(t)
        low = (0.15, 0.14, 0.05, -0.3, -0.3, -0.8)
        high = (0.85, 0.86, 0.38, 0.3, 0.3, 0.8)
        self.pose = [rng.uniform(a, b) for a, b in zip(low, high)]
        if rng.random() < 0.5:
            self.pose[3:] = [0.0, 0.0, 0.0]
        self.opening = rng.choice((0.0, 1.0))
        free = [t for t in movables if self._carrying(t) is None]
        if free and rng.random() < 0.25:
            self.pose[2] = max(0.14, self.pose[2])
            self._hold(rng.choice(free))

    def in_sight(self):
        """Whether the static camera shows every coloured thing: what another one or the hand hides
        nobody can name."""
        coloured = [t for t in self.things if t.kind in MOVABLES + TARGETS and t.colour in COLOURS]
        labels = Labels(self.look, 64, self.things)
        paint_scene(labels, self.things, self.held, self.pose, self.gap)
        shown = labels.pixels()
        return all(shown[self._index(t)] >= IN_SIGHT for t in coloured)

    def reset(self, seed, task=None, domain="in"):
        """Starts an episode; equal arguments give equal episodes. -> observation"""
        rng = random.Random(f"{self.suite}-{task}-{domain}-{seed}")
        if task is None:
            task = rng.choice(TRAIN_TASKS[self.suite])
        if task not in SUITES[self.suite] or domain not in DOMAINS:
            raise ValueError(f"suite {self.suite}: no task {task!r} or no domain {domain!r}")
        for _ in range(1000):  # until everything finds room
            look = {"bridge": "E"}.get(self.suite, "D") if domain == "look" else "A"
            if self.suite == "abc_d":
                look = "D" if domain == "look" else rng.choice("ABC")
            self._clear(look)
            self.task, self.rng, self.domain = task, rng, domain
            if BUILD[self.suite](self, task):
                break
        wide = 4.0 if self.suite == "abc_d" else 1.0  # in a chain the hand begins anywhere
        self.pose[0] += rng.uniform(-0.08, 0.08) * wide
        self.pose[1] += rng.uniform(-0.06, 0.08) * wide
        self.pose[2] += rng.uniform(-0.04, 0.02) * wide
        return self.observe()

    def chain(self, seed, n=5, domain="look"):
        """Starts a row of sub-tasks (suite abc_d) to be done one after another without a reset.

        -> [(instruction, task), ...]; the first is set, next_goal() sets the one after it.
        """
        while True:  # a crowded scene may not allow n sub-tasks: try the next one
            self.reset(f"chain-{seed}", "put_on", domain)
            plan = plan_chain(self, n)
            if len(plan) == n:
                break
            seed = f"{seed}+"
        self.plan = plan
        self.next_goal()
        return [(instruction, task) for instruction, task, _ in plan]

    def next_goal(self):
        """Sets the next sub-task of a chain -> whether there was one."""
        if not self.plan:
            return False
        (self.instruction, self.task, goal), self.plan = self.plan[0], self.plan[1:]
        if goal[0] == "shove":  # counts from where the thing is now
            goal = (*goal[:3], self.things[goal[1]].x)
        self._want(goal)
        self.steps = 0
        return True

    @property
    def success(self):
        """Whether every goal has been reached since the episode (or the sub-task) began."""
        return bool(self.goals) and all(self.done)

    @property
    def max_steps(self):
        return 10 + sum(BOUND[g[0]] for g in self.goals)

    @property
    def goal(self):
        """The first goal not yet reached: ("put", number of thing, number of target), or None."""
        return next((g for g, done in zip(self.goals, self.done) if not done), None)

    def _phrase(self, kind, **names):
        """An instruction in one of the wordings of the domain."""
        return self.rng.choice(WORDS[kind][self.domain == "wording"]).format(**names)

    def _want(self, *goals):
        self.goals, self.done = list(goals), [False] * len(goals)

    def _index(self, thing):
        return next(i for i, t in enumerate(self.things) if t is thing)

    def _check(self):
        """Marks the goals reached by now."""
        for i, (kind, *rest) in enumerate(self.goals):
            t = self.things[rest[0]]
            if kind == "put":
                reached = t is not self.held and rests_on(t, self.things[rest[1]])
            elif kind == "push":
                reached = t is not self.held and math.hypot(t.x - rest[1], t.y - rest[2]) < 0.06
            elif kind == "shove":
                reached = t is not self.held and (t.x - rest[2]) * rest[1] >= 0.10
            elif kind == "drawer":
                reached = t.opened > 0.85 if rest[1] else t.opened < 0.08
            else:
                reached = t.pressed
            self.done[i] = self.done[i] or reached

    # - placing things -

    def _add(self, rng, kind, colour, where=None, gap=0.04):
        """Adds a thing at a free place (x0, x1, y0, y1); a crowded table gets smaller gaps."""
        radius = SIZE[kind][0]
        x0, x1, y0, y1 = where or (0.18, 0.82, 0.16, 0.84)
        edge = max(0.0, radius - 0.08)
        for attempt in range(400):
            space = gap if attempt < 200 else gap * (400 - attempt) / 200 - 0.02
            x, y = rng.uniform(x0 + edge, x1 - edge), rng.uniform(y0 + edge, y1 - edge)
            if all(distance(x, y, t) > radius + space for t in self.things):
                break
        else:
            return None
        yaw = 0.0
        if kind == "bar":
            yaw = rng.uniform(-1.2, 1.2)
        elif kind in ("spoon", "carrot", "eggplant", "cup"):
            yaw = rng.uniform(-0.6, 0.6)
        elif kind == "towel":
            yaw = rng.uniform(-0.15, 0.15)
        thing = Thing(kind, colour, x, y, yaw=yaw)
        self.things.append(thing)
        return thing

    def _add_drawer(self, x, opened):
        self.things.append(Thing("drawer", "", x, CABINET_Y + 0.06, opened=opened))
        return self.things[-1]

    def _add_button(self, rng, colour):
        thing = self._add(rng, "button", colour, (0.18, 0.82, 0.45, 0.84))
        thing.tilt = rng.choice((-0.5, 0.5))
        return thing

    # - physics -

    def step(self, action):
        """action (7,) in [-1, 1]: dx dy dz, droll dpitch dyaw, fingers (> 0 opens)"""
        a = [max(-1.0, min(1.0, float(v))) for v in action]
        move = [v * (MOVE if i < 3 else TURN) for i, v in enumerate(a[:6])]
        slip = False
        if self.nudge is not None:
            move = [m + n for m, n in zip(move, self.nudge)]
            slip, self.nudge = self.nudge[6] > 0, None
        new = [max(lo, min(hi, p + m)) for p, m, (lo, hi) in zip(self.pose, move, LIMITS)]
        if self.held is not None and self.held.kind == "drawer":
            self._pull(new)
        else:
            self._move(new)
        self._fingers(slip or a[6] > 0)
        self.steps += 1
        self._check()

    def _body(self):
        """What the hand pushes with: (radius, bottom, top) relative to the fingertips, or None."""
        if self.held is not None:
            return self.held.radius, self.offset[0], self.offset[0] + SIZE[self.held.kind][1]
        return (FINGER, 0.0, 0.1) if self.opening < 0.5 else None

    def _pull(self, new):
        """Moves the hand with the drawer in it: along y only."""
        drawer = self.held
        drawer.opened = max(0.0, min(1.0, (CABINET_Y - 0.03 - new[1]) / TRAVEL))
        self.pose = [*drawer.handle, *new[2:]]
        self.pose[2] = HANDLE_Z

    def _move(self, new):
        """Moves the hand: walls stop it; what it carries, or its closed fingers, push things."""
        x, y, z = self.pose[:3]
        front = CABINET_Y - 0.02
        for t in self.things:
            if t.kind == "drawer" and abs(new[0] - t.x) < 0.14 and new[1] > front and new[2] < 0.15:
                if y <= front:
                    new[1] = front
                elif z >= 0.15:
                    new[2] = 0.15
                else:
                    new[0] = x
        body = self._body()
        low = max(z, new[2]) + (min(0.0, body[1]) if body else 0.0)
        if self._wall(x, y, new[0], y, low):
            new[0] = x
        if self._wall(new[0], y, new[0], new[1], low):
            new[1] = y
        if body:
            high = max(z, new[2]) + body[2]
            for t in self.things:
                if t.kind in MOVABLES and t is not self.held and low < t.top - 0.004 and high > t.z:
                    self._push_out(t, new[0], new[1], body[0] + t.radius)
                elif t.kind == "drawer" and self.held is None and new[2] < 0.13:
                    hx, hy = t.handle
                    if abs(new[0] - hx) < 0.12 and hy < new[1] + 0.005 < CABINET_Y + 0.02:
                        t.opened = max(0.0, (CABINET_Y - 0.03 - new[1]) / TRAVEL)
            for t in self.things:  # coming down on something, it stops there
                if t.kind not in (*MOVABLES, "button") or t is self.held:
                    continue
                top = 0.07 if t.kind == "button" else t.top
                over = math.hypot(new[0] - t.x, new[1] - t.y) < 0.8 * (body[0] + t.radius)
                if over and z + body[1] > top - 0.02:
                    new[2] = max(new[2], top - body[1])
            new[2] = max(new[2], -body[1])
        self.pose = new
        if self.held is not None:
            self._carry()

    def _wall(self, x0, y0, x1, y1, low):
        """Whether the way from (x0, y0) to (x1, y1) at a height crosses a wall."""
        for t in self.things:
            if t.kind in ("bowl", "basket") and low < t.z + SIZE[t.kind][1] - 0.005:
                if inside(t, x0, y0) != inside(t, x1, y1):
                    return True
            elif t.kind == "button" and low < 0.06:
                if math.hypot(x1 - t.x, y1 - t.y) < min(0.08, math.hypot(x0 - t.x, y0 - t.y)):
                    return True
        return False

    def _push_out(self, t, x, y, reach, depth=0):
        """Moves a thing along the line from (x, y) until it is at least reach away."""
        dx, dy = t.x - x, t.y - y
        d = math.hypot(dx, dy)
        if d >= reach:
            return
        ux, uy = (dx / d, dy / d) if d > 1e-6 else (0.0, 1.0)
        nx, ny = x + ux * reach, y + uy * reach
        nx, ny = max(0.05, min(0.95, nx)), max(0.05, min(0.95, ny))
        drawer = self.things[0] if self.things[0].kind == "drawer" else None
        if drawer and abs(nx - drawer.x) < 0.14 and ny > CABINET_Y - TRAVEL * drawer.opened - 0.04:
            return
        if self._wall(t.x, t.y, nx, ny, t.z):
            return
        riders = [r for r in self.things if r.on is t and r is not self.held]
        for r in riders:
            r.x, r.y = r.x + nx - t.x, r.y + ny - t.y
        t.x, t.y = nx, ny
        self._land(t)
        for r in riders:
            self._land(r)
        if depth < 3:
            self._make_room(t, depth + 1)

    def _make_room(self, t, depth=0):
        """Pushes away what overlaps a thing at its own height."""
        for o in self.things:
            if o.kind in MOVABLES and o is not t and o is not self.held and o.on is not t \
                    and t.on is not o and o.z < t.top - 0.004 and t.z < o.top - 0.004:
                self._push_out(o, t.x, t.y, 0.9 * (t.radius + o.radius), depth)

    def _fingers(self, opening):
        """Opens or closes by one step; grasps or lets go on the way."""
        before = self.opening
        self.opening = max(0.0, min(1.0, before + (SQUEEZE if opening else -SQUEEZE)))
        if self.held is not None:
            if not opening:
                self.opening = 0.3
            else:
                thing, self.held = self.held, None
                if thing.kind != "drawer":
                    self._land(thing)
                    self._make_room(thing)
        elif before >= 0.5 > self.opening:
            thing = self._within_grasp()
            if thing is not None:
                self._hold(thing)
        for t in self.things:
            if t.kind == "button" and self.opening < 0.5 and self.pose[2] < 0.10 \
                    and math.hypot(t.x - self.pose[0], t.y - self.pose[1]) < 0.045 \
                    and abs(self.pose[3] - t.tilt) < 0.25:
                t.pressed = True

    def _within_grasp(self):
        """The nearest thing the closing fingers would get hold of, or None."""
        x, y, z, roll, pitch, yaw = self.pose
        found, best = None, GRASP_RADIUS
        for t in self.things:
            if t.kind == "drawer":
                hx, hy = t.handle
                if math.hypot(hx - x, hy - y) < 0.05 and abs(z - HANDLE_Z) < 0.045 and pitch > 0.4:
                    return t
            if t.kind not in MOVABLES or self._carrying(t) is not None:
                continue
            d = math.hypot(t.x - x, t.y - y)
            height = SIZE[t.kind][1]
            if d > best or z > t.top - 0.2 * height or max(abs(roll), abs(pitch)) > 0.35:
                continue
            if t.kind == "bar" and abs(math.sin(t.yaw - yaw)) > math.sin(math.radians(25)):
                continue
            found, best = t, d
        return found

    def _carrying(self, base):
        """The thing that lies on a movable base, if any."""
        return next((t for t in self.things if t.on is base and t is not self.held), None)

    def _hold(self, thing):
        self.held, self.opening = thing, 0.3
        if thing.kind != "drawer":
            thing.on = None
            self.offset = (min(-0.005, thing.z - self.pose[2]), thing.yaw - self.pose[5])
            self._carry()

    def _carry(self):
        t = self.held
        t.x, t.y = self.pose[:2]
        t.z = max(0.0, self.pose[2] + self.offset[0])
        t.yaw = self.pose[5] + self.offset[1]

    def _land(self, thing):
        """Lets a thing drop onto what lies below it."""
        thing.on, thing.z = None, 0.0
        for base in self.things:
            if base is thing or base is self.held or rests_on(base, thing):
                continue
            if base.kind in TARGETS and inside(base, thing.x, thing.y):
                height = base.z + FLOOR[base.kind]
            elif base.kind == "block" and near(thing, base, STACK_RADIUS):
                height = base.top
            else:
                continue
            if height > thing.z:
                thing.on, thing.z = base, height

    def state_dict(self):
        """Everything that decides what happens next, as plain data."""
        keys = ("look", "instruction", "task", "domain", "opening", "steps")
        index = {id(t): i for i, t in enumerate(self.things)}
        things = [{**vars(t), "on": index.get(id(t.on))} for t in self.things]
        return {"things": things, "held": index.get(id(self.held)), "pose": list(self.pose),
                "offset": list(self.offset), "goals": [list(g) for g in self.goals],
                "done": list(self.done), "plan": [[i, t, list(g)] for i, t, g in self.plan],
                "nudge": self.nudge, **{k: getattr(self, k) for k in keys}}

    def load_state_dict(self, state):
        for key in ("look", "instruction", "task", "domain", "opening", "steps", "nudge"):
            setattr(self, key, state[key])
        self.things = [Thing(**{**t, "on": None}) for t in state["things"]]
        for thing, saved in zip(self.things, state["things"]):
            thing.on = None if saved["on"] is None else self.things[saved["on"]]
        self.held = None if state["held"] is None else self.things[state["held"]]
        self.pose, self.offset = list(state["pose"]), tuple(state["offset"])
        self.goals, self.done = [tuple(g) for g in state["goals"]], list(state["done"])
        self.plan = [(i, t, tuple(g)) for i, t, g in state["plan"]]

    # - seeing -

    def observe(self):
        """-> images {"static": (S, S, 3), "wrist": (W, W, 3)} uint8, state (8,) float32"""
        x, y, z, roll, pitch, yaw = self.pose
        state = np.array([x, y, z, roll, pitch, yaw, 0.0, self.opening], np.float32)
        images = {"static": self.render(self.size), "wrist": self.render(self.wrist_size, True)}
        return {"images": images, "state": state}

    def render(self, size, wrist=False):
        """One camera's picture at any size -> (size, size, 3) uint8"""
        x, y, z, _, _, yaw = self.pose
        canvas = Canvas(self.look, size, (x, y, z, yaw) if wrist else None)
        paint_scene(canvas, self.things, self.held, self.pose, self.gap)
        return canvas.array()

    @property
    def gap(self):
        """Half the space between the fingers."""
        if self.held is None or self.held.kind == "drawer":
            return 0.006 + 0.058 * self.opening
        return 0.024 if self.held.kind in ("bar", "spoon", "carrot") else 0.045


def distance(x, y, thing):
    """From a point to a thing's edge; a drawer counts with the way it slides out."""
    if thing.kind == "drawer":
        front = CABINET_Y - TRAVEL - 0.12  # the open drawer, and room for the hand before it
        return math.hypot(max(0.0, abs(x - thing.x) - 0.13), max(0.0, front - y))
    if thing.kind == "basket":
        return math.hypot(max(0.0, abs(x - thing.x) - 0.13), max(0.0, abs(y - thing.y) - 0.13))
    return math.hypot(x - thing.x, y - thing.y) - thing.radius


def inside(target, x, y):
    """Whether a point lies within a receptacle."""
    dx, dy = abs(x - target.x), abs(y - target.y)
    if target.kind in ("towel", "basket"):
        reach = 0.11 if target.kind == "towel" else 0.12
        return dx < reach and dy < reach
    return math.hypot(dx, dy) < (0.10 if target.kind == "plate" else 0.085)


def near(a, b, reach):
    return math.hypot(a.x - b.x, a.y - b.y) < reach


def rests_on(thing, base):
    """Whether a thing lies on a base, directly or on top of other things."""
    while thing.on is not None:
        thing = thing.on
        if thing is base:
            return True
    return False


# --- the suites -----------------------------------------------------------------------------------

def named(thing, things):
    """A receptacle's colour is said only where two of its kind stand on the table."""
    if thing.colour == "gray":
        return "gray box"
    alone = sum(t.kind == thing.kind for t in things) == 1
    return thing.kind if alone and thing.kind in TARGETS else thing.name


def other(rng, choices, *used):
    return rng.choice([c for c in choices if c not in used])


BRIDGE = {  # task: what goes where, and which receptacles it never meets in the demonstrations
    "spoon_on_towel": ("spoon", "towel", ("plate", "basket")),
    "carrot_on_plate": ("carrot", "plate", ("towel", "basket")),
    "eggplant_in_basket": ("eggplant", "basket", ("plate", "towel")),
    "stack_block": ("block", "block", ()),
}
STACKED = {"red": "green", "green": "blue", "blue": "red"}  # demonstrated: red goes on green ...


def build_bridge(world, task):
    rng, domain = world.rng, world.domain
    kind, target, unmet = BRIDGE[task]
    colour = rng.choice(UNSEEN if domain == "colour" else KNOWN)
    if domain == "shape":
        kind = rng.choice(("ball", "cup"))
    if domain == "pair" and unmet:
        target = rng.choice(unmet)
    if task == "stack_block":
        base = STACKED.get(colour) or rng.choice(KNOWN)
        if domain == "pair":
            base = other(rng, KNOWN, colour, base)
        t = world._add(rng, target, base)
    else:
        base = other(rng, KNOWN, colour)
        t = world._add(rng, target, base)
    o = world._add(rng, kind, colour)
    world._add(rng, kind, other(rng, KNOWN, colour, base if kind == target else ""))
    if target != "block" and rng.random() < 0.25:
        world._add(rng, target, other(rng, KNOWN, base))
    for _ in range(rng.choice((0, 1, 1, 2))):
        extra = other(rng, MOVABLES, kind, target)
        world._add(rng, extra, rng.choice(KNOWN))
    if o is None or t is None:
        return False
    world._want(("put", world._index(o), world._index(t)))
    verb = {"block": "stack", "basket": "in", "bowl": "in"}.get(target, "on")
    world.instruction = world._phrase(verb, o=o.name, t=named(t, world.things))
    return True


def build_franka(world, task):
    rng = world.rng
    x = rng.choice((0.20, 0.70))  # the box stands at the left or at the right
    box = world._add(rng, "basket", "gray", (x - 0.05, x + 0.15, 0.2, 0.8))
    wanted = task.removeprefix("pick_")
    colours = list(KNOWN)
    if task == "pick_all" or world.domain == "colour":
        colours.append("yellow")
        wanted = "all" if task == "pick_all" else "yellow"
    kind = "ball" if world.domain == "shape" else "block"
    rng.shuffle(colours)
    blocks = [world._add(rng, kind, c) for c in colours]
    if box is None or None in blocks:
        return False
    world._want(*[("put", world._index(b), 0) for b in blocks if wanted in (b.colour, "all")])
    words = "all" if wanted == "all" else "box"
    world.instruction = world._phrase(words, o=f"{wanted} {kind}", t="gray box")
    return True


def build_spatial(world, task):
    rng, domain = world.rng, world.domain
    where, _, target = task.rpartition("_to_")
    kind = rng.choice(("ball", "cup")) if domain == "shape" else "block"
    colour = rng.choice(UNSEEN if domain == "colour" else KNOWN)
    if domain == "pair":
        target = "bowl"
    plate = world._add(rng, "plate", other(rng, KNOWN, colour), (0.40, 0.60, 0.40, 0.56))
    places = {"left": (-1, 0), "right": (1, 0), "front": (0, -1), "behind": (0, 1)}
    here = where if where in places else rng.choice(list(places))
    there = other(rng, list(places), here)
    pair = []
    for name in (here, there):
        (a, b), d, e = places[name], rng.uniform(0.18, 0.22), rng.uniform(-0.03, 0.03)
        pair.append(Thing(kind, colour, plate.x + a * d + b * e, plate.y + b * d + a * e))
    world.things += pair
    if where.startswith("on_"):
        pair[0].x = plate.x + rng.uniform(-0.02, 0.02)
        pair[0].y = plate.y + rng.uniform(-0.02, 0.02)
        world._land(pair[0])
    chosen = pair[1] if where == "on_table" else pair[0]
    t = world._add(rng, target, other(rng, KNOWN, colour), gap=0.03)
    world._add(rng, other(rng, MOVABLES, kind), rng.choice(KNOWN), gap=0.03)
    if t is None:
        return False
    at = {"left": "left of the plate", "right": "right of the plate", "behind": "behind the plate",
          "front": "in front of the plate", "on_plate": "on the plate", "on_table": "on the table"}
    world._want(("put", world._index(chosen), world._index(t)))
    words = "on" if target == "towel" else "in"
    world.instruction = world._phrase(words, o=f"{chosen.name} {at[where]}", t=target)
    return True


def build_object(world, task):
    rng, domain = world.rng, world.domain
    colour, kind = task.split("_")
    if domain == "colour":
        colour = rng.choice(UNSEEN)
    if domain == "shape":
        kind = rng.choice(("bar", "spoon"))
    target = "plate" if domain == "pair" else "basket"
    t = world._add(rng, target, other(rng, KNOWN, colour))
    o = world._add(rng, kind, colour)
    world._add(rng, kind, other(rng, KNOWN, colour))
    for _ in range(rng.randint(1, 3)):
        world._add(rng, other(rng, MOVABLES, kind), rng.choice(KNOWN))
    if o is None or t is None:
        return False
    world._want(("put", world._index(o), world._index(t)))
    world.instruction = world._phrase("on" if target == "plate" else "in", o=o.name, t=target)
    return True


def build_room(world, task):
    """Suites goal, long and abc_d: a drawer, a button, receptacles and four movables."""
    rng, domain = world.rng, world.domain
    names = task.split("+")
    opened = rng.choice((0.0, 1.0))
    if "open_drawer" in names or "close_drawer" in names:
        opened = float("close_drawer" in names)
    world._add_drawer(rng.choice((0.2, 0.8)), opened)
    odd = domain == "colour"
    world._add_button(rng, rng.choice(UNSEEN if odd else KNOWN))
    targets = ("plate", "basket") if world.suite == "long" else ("plate", "bowl")
    found = [world._add(rng, kind, rng.choice(KNOWN), gap=0.03) for kind in targets]
    first = rng.choice(UNSEEN if odd else KNOWN)
    second = other(rng, KNOWN, first)
    if "stack" in names:
        second = STACKED.get(first, second)
        if domain == "pair":
            second = other(rng, KNOWN, first, second)
    unlike = rng.choice(("bar", "eggplant"))  # no demonstration of these suites moves one
    kinds = [unlike if domain == "shape" else "block", "block"]
    kinds.append("ball" if world.suite == "long" else "cup")
    third = rng.choice(UNSEEN if odd else KNOWN)
    found += [world._add(rng, k, c, gap=0.03) for k, c in zip(kinds, (first, second, third))]
    if None in found:
        return False
    if world.suite == "abc_d" and rng.random() < 0.4:  # as an earlier sub-task may have left it
        moved = rng.choice(found[-1:] if task == "stack" or "shove" in task else found[2::2])
        base = rng.choice({"put_on": found[1:2], "put_in": found[:1]}.get(task, found[:2]))
        moved.x, moved.y = base.x, base.y
        world._land(moved)
    goals, phrases = [], []
    for name in names:
        step = subtask(world, name, *found)
        if step is None:
            return False
        goals.append(step[0])
        phrases.append(step[1])
    world._want(*goals)
    world.instruction = " and ".join(phrases)
    return True


def subtask(world, name, plate, vessel, block, base, third):
    """-> (goal, instruction) of one sub-task in a room, or None where it does not fit the scene"""
    rng, index, say = world.rng, world._index, world._phrase
    if name in ("open_drawer", "close_drawer"):
        return ("drawer", 0, int(name == "open_drawer")), say(name.partition("_")[0])
    if name == "press_button":
        return ("press", 1), say("press")
    if name == "stack":
        return ("put", index(block), index(base)), say("stack", o=block.name, t=base.name)
    if name.startswith("shove_"):
        side = 1 if name.endswith("right") else -1
        if not free_way(world, block, block.x + 0.16 * side, block.y):
            return None
        return (("shove", index(block), side, block.x),
                say("shove", o=block.name, s=name.removeprefix("shove_")))
    if name.startswith("push_"):
        side = name.removeprefix("push_")
        dx, dy = {"left": (-0.19, 0.0), "right": (0.19, 0.0), "front": (0.0, -0.19)}[side]
        x, y = plate.x + dx, plate.y + dy
        if not free_way(world, block, x, y):
            return None
        return ("push", index(block), x, y), say("push", o=block.name, s=f"to the {side} of",
                                                 t=plate.kind)
    thing, target = (third if name[:3] in ("cup", "bal") else block), plate
    if name in ("put_on", "put_in"):
        thing = rng.choice((block, third))
    if "_in" in name:
        target = vessel
    if world.domain == "pair" and world.suite != "abc_d":
        thing, target = third, vessel if third.kind == "cup" else plate
    return (("put", index(thing), index(target)),
            say("on" if target is plate else "in", o=thing.name, t=target.kind))


def plan_chain(world, n):
    """Up to n sub-tasks that stay possible one after another -> [(instruction, task, goal), ...]"""
    rng, say, things = world.rng, world._phrase, world.things
    opened, pressed = things[0].opened > 0.5, False
    place = {i: t.on and world._index(t.on) for i, t in enumerate(things) if t.kind in MOVABLES}
    still, plan = {i for i in place if place[i] is None}, []  # still: on the table, not yet moved
    plate, bowl = 2, 3
    while len(plan) < n:
        free = [i for i in place if i not in place.values()]
        options = [("close_drawer" if opened else "open_drawer", ("drawer", 0, int(not opened)))]
        if not pressed:
            options.append(("press_button", ("press", 1)))
        for i in free:
            for j, task in ((plate, "put_on"), (bowl, "put_in")):
                if j not in place.values():
                    options.append((task, ("put", i, j)))
            for j in free:
                if i != j and things[i].kind == things[j].kind == "block" and place[j] != bowl:
                    options.append(("stack", ("put", i, j)))
            for side, task in ((-1, "shove_left"), (1, "shove_right")):
                t = things[i]
                if i in still and free_way(world, t, t.x + 0.16 * side, t.y):
                    options.append((task, ("shove", i, side, t.x)))
        fresh = [o for o in options if all(o[0] != task for _, task, _ in plan)]
        if not fresh and not options:
            break
        name = rng.choice(sorted({task for task, _ in fresh or options}))
        goal = rng.choice([g for task, g in fresh or options if task == name])
        thing, names = things[goal[1]], {}
        if goal[0] == "drawer":
            opened = not opened
        elif goal[0] == "press":
            pressed = True
        elif goal[0] == "put":
            place[goal[1]] = goal[2]
            still -= {goal[1], goal[2]}
            target = things[goal[2]]
            names = {"o": thing.name, "t": target.name if target.kind == "block" else target.kind}
        else:
            still.discard(goal[1])
            names = {"o": thing.name, "s": name.removeprefix("shove_")}
        words = {"put_on": "on", "put_in": "in"}.get(name, name.partition("_")[0])
        plan.append((say(words, **names), name, goal))
    return plan


def free_way(world, thing, x, y):
    """Whether a thing can be pushed to (x, y): room behind it, on the way and at the end."""
    dx, dy = x - thing.x, y - thing.y
    far = math.hypot(dx, dy)
    if not (0.12 < far < 0.45 and 0.10 < x < 0.90 and 0.10 < y < 0.84):
        return False
    back = 0.10 / far
    points = [(thing.x - back * dx, thing.y - back * dy, 0.03)]
    points += [(thing.x + k * dx / 8, thing.y + k * dy / 8, 0.055) for k in range(1, 9)]
    flat = ("plate", "towel")
    return all(0.06 < px < 0.94 and 0.06 < py < 0.94 and
               all(t is thing or t.kind in flat or distance(px, py, t) > r for t in world.things)
               for px, py, r in points)


BUILD = {"bridge": build_bridge, "spatial": build_spatial, "object": build_object,
         "goal": build_room, "long": build_room, "abc_d": build_room, "franka": build_franka}


# --- the expert -----------------------------------------------------------------------------------

GAIN = 0.7  # share of the way to the aim that one step covers: the hand slows down near it
PHASES = ("reach", "descend", "grasp", "lift", "carry", "lower", "release", "approach", "push",
          "rest")


class Expert:
    """Solves any task from the world's state alone, so it recovers from whatever happens.

    With noise > 0 the world disturbs the hand now and then (pushes of a few steps, rarely a drop);
    the labels stay the expert's own, so that the recordings show how to recover.
    """

    def __init__(self, world, seed=0, noise=0.0):
        self.world, self.noise = world, noise
        self.rng = random.Random(f"expert-{seed}")
        self.phase = 0
        self.push, self.left = None, 0

    def act(self):
        """-> action (7,) float32 for the world as it is now"""
        w = self.world
        if self.noise:
            self._disturb()
        goal = w.goal
        held = w.held
        if goal is None:
            x, y, z = w.pose[:3]
            return self._go("rest", x, y, max(z, 0.22), grip=1)
        if held is not None and (held is not w.things[goal[1]] or goal[0] in ("push", "shove")):
            return self._set_down(held)
        return getattr(self, f"_{goal[0]}")(*goal[1:])

    @property
    def reasoning(self):
        """One sentence for the frame of the last act(): what is seen, what is done now, and why."""
        w, goal = self.world, self.world.goal
        if goal is None:
            return "everything is done so i rest"
        phase, thing = PHASES[self.phase], w.things[goal[1]]
        kind, name, it = goal[0], f"the {thing.name}", "it"
        if kind == "put":
            target = w.things[goal[2]]
            to = f"the {named(target, w.things)}"
            seen = f"{name} is {relation(thing, target)} {to}"
            why = f"it must go {'in' if target.kind in ('bowl', 'basket') else 'on'} {to}"
        elif kind in ("push", "shove"):
            x = goal[2] if kind == "push" else thing.x + goal[2]
            ahead = abs(x - thing.x) < abs(goal[3] - thing.y) if kind == "push" else False
            way = ("back" if goal[3] > thing.y else "front") if ahead else side_of(x, thing.x)
            seen = f"{name} is {relation(thing, Thing('', '', *w.pose[:2]))} the hand"
            why = f"it must move to the {way}"
        elif kind == "drawer":
            seen = f"the drawer is {'open' if thing.opened > 0.5 else 'closed'}"
            why = f"it must be {'open' if goal[2] else 'closed'}"
        else:
            seen, why = f"the button leans to the {side_of(thing.tilt, 0)}", "it must be pressed"
            name = "the button"
        if w.held is thing:
            seen = f"{name} is in the hand"
        elif w.held is not None:
            seen, why = f"the {w.held.name} is in the hand", f"i need {name}"
        if kind == "drawer" and goal[2]:
            it = "its handle"
        act = {"reach": "move above {}", "descend": "lower the hand to {}", "lift": "lift {}",
               "grasp": "close the fingers on {}", "carry": "carry {} there", "lower": "lower {}",
               "release": "open the fingers", "approach": "move the closed hand to {}",
               "push": "pull {}" if kind == "drawer" and goal[2] else "push {}", "rest": "rest"}
        return f"{seen} so i {act[phase].format(it)} because {why}"

    def _disturb(self):
        """Now and then pushes the hand for a few steps; rarely makes it drop what it holds."""
        rng = self.rng
        if self.left == 0 and rng.random() < 0.06 * self.noise:
            self.left = rng.randint(2, 4)
            self.push = [rng.uniform(-0.045, 0.045) for _ in range(3)]
            self.push += [rng.uniform(-0.12, 0.12) for _ in range(3)]
        slip = self.world.held is not None and rng.random() < 0.012 * self.noise
        if self.left or slip:
            self.world.nudge = (self.push if self.left else [0.0] * 6) + [float(slip)]
            self.left = max(0, self.left - 1)

    def _go(self, phase, x, y, z, roll=0.0, pitch=0.0, yaw=0.0, grip=1):
        """One slowing step towards a pose."""
        self.phase = PHASES.index(phase)
        aim = (x, y, z, roll, pitch, yaw)
        action = [GAIN * (a - p) / (MOVE if i < 3 else TURN)
                  for i, (a, p) in enumerate(zip(aim, self.world.pose))]
        return np.clip(np.array(action + [grip]), -1.0, 1.0).astype(np.float32)

    def _over(self, names, x, y, low, high, grip, roll=0.0, pitch=0.0, yaw=0.0, width=0.06):
        """Flies above (x, y) and sinks to it as through a funnel -> (action, is it there)"""
        p = self.world.pose
        far = math.hypot(x - p[0], y - p[1])
        turn = abs(roll - p[3]) + abs(pitch - p[4]) + abs(yaw - p[5])
        share = max(0.0, min(1.0, (far + 0.1 * turn - 0.015) / width))
        z = low + (high - low) * share
        if names[0] == "approach" and self.world.opening >= 0.5:  # close before going down
            share, z = 1.0, high
        if share == 1.0 and p[2] < high - 0.05:  # first up, then across
            x, y = p[0], p[1]
        there = far < 0.014 and abs(p[2] - low) < 0.014 and turn < 0.15
        phase = names[0] if share == 1.0 else names[1]
        return self._go(phase, x, y, z, roll, pitch, yaw, grip), there

    def _clearance(self):
        """The height that keeps a thing above everything that stands on the table."""
        return 0.03 + max(0.10, *(t.top for t in self.world.things if t is not self.world.held))

    def _put(self, i, j):
        w = self.world
        thing, target = w.things[i], w.things[j]
        if w.held is None:
            low = max(0.02, thing.z + 0.4 * SIZE[thing.kind][1])
            yaw = nearest_turn(thing.yaw) if thing.kind == "bar" else 0.0
            high, phases = max(0.16, thing.top + 0.06), ("reach", "descend")
            action, there = self._over(phases, thing.x, thing.y, low, high, 1, yaw=yaw)
            return self._go("grasp", *w.pose[:5], yaw, grip=-1) if there else action
        x, y, floor = self._spot(thing, target)
        low, high = (h - w.offset[0] for h in (floor + 0.01, max(floor + 0.04, self._clearance())))
        action, there = self._over(("carry", "lower"), x, y, low, min(0.4, high), -1, width=0.05)
        if there:
            return self._go("release", *w.pose[:3], grip=1)
        if self.phase == PHASES.index("carry") and w.pose[2] < high - 0.05:
            self.phase = PHASES.index("lift")
        return action

    def _spot(self, thing, target):
        """A free place in or on a target -> x, y, height of its floor"""
        if target.kind not in TARGETS:
            return target.x, target.y, target.top
        step = {"basket": 0.058, "towel": 0.05, "plate": 0.05, "bowl": 0.03}[target.kind]
        there = [t for t in self.world.things if rests_on(t, target) and t is not thing]
        spots = [(0, 0)] if not there else [(a, b) for b in (1, -1) for a in (-1, 1)]
        x, y = max(((target.x + a * step, target.y + b * step) for a, b in spots),
                   key=lambda p: min([math.hypot(p[0] - t.x, p[1] - t.y) for t in there] + [0.09]))
        floor = target.z + FLOOR[target.kind]
        for t in there:  # too full: let it drop from above
            if math.hypot(x - t.x, y - t.y) < 0.9 * (t.radius + thing.radius):
                floor = max(floor, t.top)
        return x, y, floor

    def _shut(self):
        """Fingers to close, but not low on the table where they could take hold of something."""
        return -1 if self.world.opening < 0.5 or self.world.pose[2] > 0.13 else 1

    def _shove(self, i, side, start):
        return self._push(i, start + 0.15 * side, self.world.things[i].y)

    def _push(self, i, x, y):
        """Comes down behind a thing and pushes it along the line to (x, y)."""
        w, thing = self.world, self.world.things[i]
        dx, dy = x - thing.x, y - thing.y
        far = max(1e-6, math.hypot(dx, dy))
        ux, uy = dx / far, dy / far
        touch = thing.radius + FINGER
        hx, hy = w.pose[0] - thing.x, w.pose[1] - thing.y
        behind, aside = -(hx * ux + hy * uy), abs(hx * uy - hy * ux)
        if w.pose[2] < 0.06 and w.opening < 0.5 and aside < 0.035 and 0.6 * touch < behind < 0.13:
            reach = touch - min(0.04, GAIN * far)
            return self._go("push", *(p + (g - p) / GAIN for p, g in zip(
                w.pose, (thing.x - reach * ux, thing.y - reach * uy))), 0.035, grip=-1)
        bx, by = thing.x - (touch + 0.03) * ux, thing.y - (touch + 0.03) * uy
        return self._over(("approach", "approach"), bx, by, 0.035, self._clearance() + 0.05,
                          self._shut())[0]

    def _drawer(self, i, opening):
        w, drawer = self.world, self.world.things[i]
        x, y = drawer.handle
        if opening:
            if w.held is drawer:
                y = CABINET_Y - 0.03 - 1.05 * TRAVEL
                return self._go("push", x, y, HANDLE_Z, pitch=0.6, grip=-1)
            action, there = self._over(("reach", "descend"), x, y, HANDLE_Z, 0.20, 1, pitch=0.6)
            return self._go("grasp", *w.pose[:5], grip=-1) if there else action
        if w.held is drawer:
            return self._set_down(drawer)
        before = abs(w.pose[0] - x) < 0.06 and w.pose[1] < y + 0.01
        if before and w.pose[2] < 0.12 and w.opening < 0.5:
            return self._go("push", x, CABINET_Y, HANDLE_Z, grip=-1)
        return self._over(("approach", "approach"), x, y - 0.06, HANDLE_Z, self._clearance() + 0.05,
                          self._shut())[0]

    def _press(self, i):
        button = self.world.things[i]
        return self._over(("approach", "push"), button.x, button.y, 0.07, self._clearance() + 0.05,
                          self._shut(), roll=button.tilt, width=0.05)[0]

    def _set_down(self, held):
        """Lets go of a wrong thing, low above the table."""
        w = self.world
        if held.kind == "drawer" or w.pose[2] + w.offset[0] < 0.02:
            return self._go("release", *w.pose, grip=1)
        return self._go("lower", w.pose[0], w.pose[1], 0.01 - w.offset[0], grip=-1)


def nearest_turn(yaw):
    """The same direction of a bar, as a turn of at most a quarter."""
    return (yaw + math.pi / 2) % math.pi - math.pi / 2


def relation(a, b):
    """Where a lies as seen from b, in words."""
    dx, dy = a.x - b.x, a.y - b.y
    if math.hypot(dx, dy) < 0.06:
        return "at"
    if abs(dx) > abs(dy):
        return f"{side_of(dx, 0)} of"
    return "behind" if dy > 0 else "in front of"


def side_of(x, middle):
    return "right" if x > middle else "left"


def all_sentences(seed=0, n=2):
    """Instructions and reasoning of n episodes of every suite, task and domain, for a tokenizer."""
    found = set()
    for suite, tasks in SUITES.items():
        world = Tabletop(suite, 8, 8)
        for task in tasks:
            for domain in DOMAINS:
                for i in range(n):
                    world.reset(seed + i, task, domain)
                    expert = Expert(world, i, noise=float(i % 2))
                    found.add(world.instruction)
                    while not world.success and world.steps < world.max_steps:
                        action = expert.act()
                        found.add(expert.reasoning)
                        world.step(action)
    return sorted(found)


if __name__ == "__main__":
    from worlds import terminal

    sys.exit(terminal.main(Tabletop, sys.argv[1:]))
