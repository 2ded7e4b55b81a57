"""Questions about a tabletop scene, and four small benchmarks in the form of published ones.

    world = Tabletop(); world.scatter(seed=3)
    ask(world, random.Random(0), "relation")  ->  Question("relation", "where is ...", "left", ...)
    for images, question, answer, options in benchmark("pope", n=200, seed=0): ...

Places are written with 32 words per axis, <loc_0> .. <loc_31>: x to the right, y away from the
viewer, z up. A scene does not allow every question (a single thing is on no side of another):
an `ask_*` function then returns None.
"""

import math
import random
from collections import Counter
from dataclasses import dataclass

from worlds.tabletop import COLOURS, FIXTURES, MOVABLES, TARGETS, WORDS, Tabletop

CELLS = 32
TOP = 0.40  # height of the highest <loc> of the z axis
FIRST_TEST_SEED = 1_000_000_000  # benchmarks draw their scenes from here on, training from below
NUMBERS = [str(n) for n in range(8)]
SIDES = ["left", "right", "front", "behind"]
CORNERS = ["front left", "front right", "back left", "back right"]
TRAITS = ["hot", "cold", "heavy", "light", "new", "old", "clean", "soft"]
YES_NO = ["yes", "no"]
LETTERS = "ABCD"


@dataclass
class Question:
    kind: str
    question: str
    answer: str
    choices: tuple = ()  # all answers of that kind, where they are few


# --- reading the scene ----------------------------------------------------------------------------


def name(thing):
    if thing.colour == "gray":
        return "gray box"
    return thing.name if is_coloured(thing) else thing.kind


def with_article(words):
    return ("an " if words[0] in "aeiou" else "a ") + words


def is_coloured(thing):
    return thing.colour in COLOURS and thing.kind not in FIXTURES


def coloured(world):
    return [thing for thing in world.things if is_coloured(thing)]


def unique(things, key):
    """The things that nobody else shares the key with."""
    counts = Counter(key(thing) for thing in things)
    return [thing for thing in things if counts[key(thing)] == 1]


def cell(value, top=1.0):
    return f"<loc_{min(CELLS - 1, max(0, int(value / top * CELLS)))}>"


def place(thing):
    x, y = thing.handle if thing.kind == "drawer" else (thing.x, thing.y)
    return cell(x) + cell(y)


def side_of(a, b):
    """Where a is, seen from b."""
    dx, dy = a.x - b.x, a.y - b.y
    if abs(dx) > abs(dy):
        return "left" if dx < 0 else "right"
    return "front" if dy < 0 else "behind"


def apart(a, b):
    """Whether it is clear on which side of b a is."""
    clear = abs(abs(a.x - b.x) - abs(a.y - b.y)) > 0.05
    return clear and a.on is not b and b.on is not a


def corner_of(thing):
    """Which quarter of the table, and how far the nearest border between quarters is."""
    word = ("front " if thing.y < 0.5 else "back ") + ("left" if thing.x < 0.5 else "right")
    return word, min(abs(thing.x - 0.5), abs(thing.y - 0.5))


def support(thing):
    return name(thing.on) if thing.on is not None else "table"


def alone(world, thing):
    """Whether nothing else lies at a thing's place, so that the place names it."""
    others = [t for t in world.things if t is not thing]
    return all(math.hypot(t.x - thing.x, t.y - thing.y) > 0.08 for t in others)


def pick(rng, items):
    return items[rng.randrange(len(items))] if items else None


def draw_pair(rng, things):
    return rng.sample(things, 2) if len(things) > 1 else (None, None)


# --- one function per kind of question: (world, rng) -> Question or None --------------------------


def ask_colour(world, rng):
    thing = pick(rng, unique(coloured(world), lambda t: t.kind))
    if thing is None:
        return None
    if rng.random() < 0.3 and alone(world, thing):
        text = f"what colour is the thing at {place(thing)}"
    else:
        text = pick(rng, ["what colour is the {}", "which colour does the {} have"])
        text = text.format(thing.kind)
    return Question("colour", text, thing.colour, tuple(COLOURS))


def ask_shape(world, rng):
    if rng.random() < 0.5:
        thing = pick(rng, unique(coloured(world), lambda t: t.colour))
        if thing is None:
            return None
        text = pick(rng, ["what is the {} thing", "what kind of thing is {}"]).format(thing.colour)
        return Question("shape", text, thing.kind, MOVABLES + TARGETS)
    thing = pick(rng, [t for t in world.things if alone(world, t)])
    return thing and Question("shape", f"what is at {place(thing)}", name(thing))


def ask_count(world, rng):
    things, numbers = coloured(world), tuple(NUMBERS)
    if rng.random() < 0.2:
        return Question("count", "how many coloured things are there", str(len(things)), numbers)
    if rng.random() < 0.5:
        colour = pick(rng, list(COLOURS) + [t.colour for t in things])
        n, what = sum(t.colour == colour for t in things), f"{colour} things"
    else:
        kind = pick(rng, list(MOVABLES + TARGETS) + [t.kind for t in things])
        n, what = sum(t.kind == kind for t in things), kind + "s"
    text = pick(rng, ["how many {} are there", "count the {}"]).format(what)
    return Question("count", text, str(n), numbers)


def ask_position(world, rng):
    thing = pick(rng, unique(coloured(world), name))
    if thing is None:
        return None
    across = rng.random() < 0.5
    value = thing.x if across else thing.y
    if abs(value - 0.5) < 0.05:  # too close to the middle to say
        return None
    words = ("left", "right") if across else ("front", "back")
    text = f"is the {name(thing)} at the {words[0]} or at the {words[1]}"
    return Question("position", text, words[value > 0.5], words)


def ask_relation(world, rng):
    a, b = draw_pair(rng, unique(world.things, name))
    if a is None:
        return None
    if is_coloured(a) and rng.random() < 0.25:
        below = "hand" if a is world.held else support(a)
        return Question("relation", f"what is the {name(a)} on", below)
    if not apart(a, b):
        return None
    text = pick(rng, ["where is the {} seen from the {}", "on which side is the {} of the {}"])
    return Question("relation", text.format(name(a), name(b)), side_of(a, b), tuple(SIDES))


def absent(world, rng, how):
    """The name of a thing that is not there, chosen as in POPE: random | popular | adversarial."""
    here = {name(t) for t in coloured(world)}
    colours, kinds = list(COLOURS), list(MOVABLES + TARGETS)
    if how == "popular":  # what scenes of this world show most
        kinds = ["block", "plate"]
    if how == "adversarial" and here:  # half of the name fits a thing that is there
        thing = pick(rng, coloured(world))
        colours, kinds = ([thing.colour], kinds) if rng.random() < 0.5 else (colours, [thing.kind])
    names = [f"{c} {k}" for c in colours for k in kinds if f"{c} {k}" not in here]
    return pick(rng, names)


def ask_exist(world, rng, answer=None, how=None):
    answer = answer or pick(rng, YES_NO)
    how = how or pick(rng, ["random", "popular", "adversarial"])
    things = coloured(world)
    what = absent(world, rng, how) if answer == "no" else things and name(pick(rng, things))
    text = what and f"is there {with_article(what)} in the image"
    return Question("exist", text, answer, tuple(YES_NO)) if what else None


def options(rng, answer, others):
    """Four options in random order, as a text, and the letter of the right one."""
    chosen = rng.sample([o for o in dict.fromkeys(others) if o != answer], 3) + [answer]
    rng.shuffle(chosen)
    text = " ".join(f"{letter}. {option}" for letter, option in zip(LETTERS, chosen))
    return text, LETTERS[chosen.index(answer)]


def multiple_choice(rng, text, answer, others):
    shown, letter = options(rng, answer, others)
    return Question("choice", f"{text} {shown}", letter, tuple(LETTERS))


def choose_identity(world, rng):
    side = pick(rng, SIDES)
    value = {
        "left": lambda t: t.x,
        "right": lambda t: -t.x,
        "front": lambda t: t.y,
        "behind": lambda t: -t.y,
    }[side]
    order = sorted(coloured(world), key=value)
    if len(order) < 2 or value(order[1]) - value(order[0]) < 0.05:
        return None
    everything = [f"{c} {k}" for c in COLOURS for k in MOVABLES + TARGETS]
    others = [name(t) for t in order[1:]][:2] + rng.sample(everything, 6)
    word = "back" if side == "behind" else side
    return multiple_choice(rng, f"what is nearest to the {word}", name(order[0]), others)


def choose_attribute(world, rng):
    thing = pick(rng, unique(coloured(world), lambda t: t.kind))
    return thing and multiple_choice(rng, f"what colour is the {thing.kind}", thing.colour, COLOURS)


def choose_location(world, rng):
    thing = pick(rng, unique(coloured(world), name))
    if thing is None or corner_of(thing)[1] < 0.05:
        return None
    return multiple_choice(rng, f"where is the {name(thing)}", corner_of(thing)[0], CORNERS)


def choose_count(world, rng):
    question = ask_count(world, rng)
    return multiple_choice(rng, question.question, question.answer, NUMBERS[:7])


def choose_relation(world, rng):
    a, b = draw_pair(rng, unique(coloured(world), name))
    if a is None or not apart(a, b):
        return None
    text = f"where is the {name(a)} seen from the {name(b)}"
    return multiple_choice(rng, text, side_of(a, b), SIDES)


def choose_with_hint(world, rng):
    """A sentence says which things have a trait, the picture the rest (ScienceQA's context)."""
    trait = pick(rng, TRAITS)
    if rng.random() < 0.5:
        thing = pick(rng, unique(coloured(world), lambda t: t.colour))
        if thing is None:
            return None
        text = f"hint: {thing.colour} things are {trait}. what is {trait}"
        return multiple_choice(rng, text, thing.kind, MOVABLES + TARGETS)
    thing = pick(rng, unique(coloured(world), lambda t: t.kind))
    if thing is None:
        return None
    text = f"hint: {thing.kind}s are {trait}. what colour is the {trait} thing"
    return multiple_choice(rng, text, thing.colour, COLOURS)


SEED_TYPES = (choose_identity, choose_attribute, choose_location, choose_count, choose_relation)


def ask_choice(world, rng):
    return pick(rng, SEED_TYPES + (choose_with_hint,))(world, rng)


def statement_pair(world, rng, about=None):
    """One question to be answered yes and one to be answered no, about the same (MME's pairs)."""
    about = about or pick(rng, ["existence", "count", "position", "colour", "state"])
    things = coloured(world)
    thing = pick(rng, unique(things, name))
    if about == "state":
        return state_pair(world, rng)
    if thing is None:
        return None
    if about == "existence":
        other = absent(world, rng, pick(rng, ["random", "adversarial"]))
        return [f"is there {with_article(what)} in this image" for what in (name(thing), other)]
    if about == "count":
        question = ask_count(world, rng)
        what = question.question.removeprefix("how many ").removesuffix(" are there")
        n = int(question.answer)
        wrong = pick(rng, [k for k in (n - 1, n + 1) if k >= 0])
        return [f"is the number of {what.removeprefix('count the ')} {k}" for k in (n, wrong)]
    if about == "position":
        other = pick(rng, [t for t in unique(things, name) if t is not thing])
        if other is None or not apart(thing, other):
            return None
        side = side_of(thing, other)
        opposite = {"left": "right", "right": "left", "front": "behind", "behind": "front"}[side]
        words = {"left": "left of", "right": "right of", "front": "in front of", "behind": "behind"}
        return [f"is the {name(thing)} {words[s]} the {name(other)}" for s in (side, opposite)]
    thing = pick(rng, unique(things, lambda t: t.kind))
    if thing is None:
        return None
    wrong = pick(rng, [c for c in COLOURS if c != thing.colour])
    return [f"is the {thing.kind} {colour}" for colour in (thing.colour, wrong)]


def state_pair(world, rng):
    """Open or closed, pressed or not, on something or not."""
    thing = pick(rng, unique(world.things, name))
    if thing is None:
        return None
    if thing.kind == "drawer":
        words = ["is the drawer open", "is the drawer closed"]
        return None if 0.15 < thing.opened < 0.35 else words[:: 1 if thing.opened > 0.25 else -1]
    if thing.kind == "button":
        return ["is the button pressed", "is the button up"][:: 1 if thing.pressed else -1]
    if thing is world.held:
        return None
    targets = [t for t in coloured(world) if t.kind in TARGETS and t is not thing.on]
    wrong = name(pick(rng, targets)) if targets else "table"
    if thing.kind not in MOVABLES or wrong == support(thing):
        return None
    return [f"is the {name(thing)} on the {what}" for what in (support(thing), wrong)]


def ask_yesno(world, rng):
    pair = statement_pair(world, rng)
    answer = rng.randrange(2)
    return pair and Question("yesno", pair[answer], YES_NO[answer], tuple(YES_NO))


def caption(world):
    """Every thing from left to right: <loc of x><loc of y> colour kind."""
    order = sorted(world.things, key=lambda t: (int(t.x * CELLS), t.y))
    return " ".join(f"{place(thing)} {name(thing)}" for thing in order)


def ask_caption(world, rng):
    text = pick(rng, ["describe the image", "what is on the table", "name all things"])
    return Question("caption", text, caption(world)) if world.things else None


def ask_point(world, rng):
    thing = pick(rng, unique(world.things, name))
    text = pick(rng, ["point to the {}", "where is the {}"])
    return thing and Question("point", text.format(name(thing)), place(thing))


def ask_hand(world, rng):
    about = rng.randrange(3)
    if about == 0:
        return Question("hand", "where is the hand", hand_place(world))
    if about == 1:
        words = ("open", "closed")
        clear = abs(world.opening - 0.5) > 0.1
        text = "is the hand open or closed"
        return Question("hand", text, words[world.opening < 0.5], words) if clear else None
    held = name(world.held) if world.held else "nothing"
    return Question("hand", "what does the hand hold", held)


def hand_place(world):
    x, y, z = world.pose[:3]
    return cell(x) + cell(y) + cell(z, TOP)


def ask_lean(world, rng):
    """Which way the button's wedge leans: the hand must come down with the same lean."""
    tilts = [thing.tilt for thing in world.things if thing.kind == "button"]
    words = ("left", "right")
    text = pick(rng, ["the button leans to which side", "where to leans the button"])
    return Question("lean", text, words[tilts[0] > 0], words) if tilts else None


# --- instructions, answered by pointing at what they speak of -------------------------------------


def ask_instruction(world, rng):
    """The places of the hand (x, y, z), of the thing to act on, and of where it is to go."""
    if world.goal is not None and rng.random() < 0.7:
        thing = world.things[world.goal[1]]
        return point_at(world, world.instruction, thing, goal_place(world, *world.goal))
    things = unique(world.things, name)
    thing = pick(rng, things)
    if thing is None:
        return None
    if thing.kind in FIXTURES:
        kind = rng.choice(["open", "close"]) if thing.kind == "drawer" else "press"
        return point_at(world, wording(rng, kind), thing, place(thing))
    bases = [t for t in things if t is not thing and t.kind in MOVABLES + TARGETS]
    base, what = pick(rng, bases), short(rng, thing, world)
    if base is None or rng.random() < 0.15:
        side, dx = rng.choice([("left", -REACH), ("right", REACH)])
        return point_at(world, wording(rng, "shove", o=what, s=side), thing, at(thing, dx, 0.0))
    if rng.random() < 0.15:
        side, dx, dy = rng.choice(BESIDE)
        text = wording(rng, "push", o=what, s=f"to the {side} of", t=short(rng, base, world))
        return point_at(world, text, thing, at(base, dx, dy))
    kind = "on" if base.kind in ("plate", "towel") else "in" if base.kind in TARGETS else "stack"
    if name(base) == "gray box":
        kind = "box"
    text = wording(rng, kind, o=what, t=short(rng, base, world))
    return point_at(world, text, thing, place(base))


REACH = 0.17  # how far "to the left" is
BESIDE = [("left", -0.19, 0.0), ("right", 0.19, 0.0), ("front", 0.0, -0.19)]


def point_at(world, instruction, thing, aim):
    return Question("instruction", instruction, hand_place(world) + place(thing) + aim)


def at(thing, dx, dy):
    return cell(thing.x + dx) + cell(thing.y + dy)


def wording(rng, kind, **names):
    """Any wording, also those that no demonstration uses: the backbone has read more than those."""
    seen, unseen = WORDS[kind]
    return pick(rng, seen + unseen).format(**names)


def goal_place(world, kind, thing, *aim):
    """Where a task's next goal wants its thing to be."""
    thing = world.things[thing]
    if kind == "put":
        return place(world.things[aim[0]])
    if kind == "push":
        return cell(aim[0]) + cell(aim[1])
    if kind == "shove":
        return cell(aim[1] + REACH * aim[0]) + cell(thing.y)
    return place(thing)


def short(rng, thing, world):
    """'plate' will do for 'red plate' where there is only one: people say either."""
    alone = sum(t.kind == thing.kind for t in world.things) == 1
    return thing.kind if alone and name(thing) != "gray box" and rng.random() < 0.4 else name(thing)


ASK = {
    "colour": ask_colour,
    "shape": ask_shape,
    "count": ask_count,
    "position": ask_position,
    "relation": ask_relation,
    "exist": ask_exist,
    "choice": ask_choice,
    "yesno": ask_yesno,
    "caption": ask_caption,
    "point": ask_point,
    "hand": ask_hand,
    "lean": ask_lean,
    "instruction": ask_instruction,
}


def ask(world, rng, kind=None):
    """One question about the scene as it is; None if the scene does not allow one of that kind."""
    return ASK[kind or pick(rng, list(ASK))](world, rng)


# --- benchmarks -----------------------------------------------------------------------------------


def benchmark(name, n, seed=0, size=64, wrist_size=32):
    """Yields n times (images, question, answer, options).

    pope       existence, half yes and half no, with random, popular and adversarial absent things
    seed       four options about identity, attribute, location, number, relation in turn
    scienceqa  four options, to be found from a sentence and the picture together
    mme        two questions a picture, one yes and one no: both right count in "accuracy+"
    """
    world, made = Tabletop(size=size, wrist_size=wrist_size), 0
    for scene in range(FIRST_TEST_SEED + seed * 1_000_000, 2 * FIRST_TEST_SEED):
        rng = random.Random(scene)
        images = world.scatter(scene)["images"]
        for question, answer, options in from_scene(name, world, rng, made):
            if made == n:
                return
            yield images, question, answer, options
            made += 1


def from_scene(name, world, rng, turn):
    """The questions of one scene: none, one, or a pair; turn counts the questions so far."""
    if name == "mme":
        about = ["existence", "count", "position", "colour"][turn // 2 % 4]
        pair = statement_pair(world, rng, about)
        return [(text, answer, YES_NO) for text, answer in zip(pair or [], YES_NO)]
    if name == "pope":
        how = ["random", "popular", "adversarial"][turn // 2 % 3]
        q = ask_exist(world, rng, YES_NO[turn % 2], how)
    elif name == "seed":
        q = SEED_TYPES[turn % 5](world, rng)
    elif name == "scienceqa":
        q = choose_with_hint(world, rng)
    else:
        raise ValueError(f"unknown benchmark {name!r}: pope, seed, scienceqa or mme")
    return [(q.question, q.answer, list(q.choices))] if q else []
