"""Drives a world by hand: what its cameras see as coloured characters, keys as actions.

    python worlds/tabletop.py [SUITE[:TASK]] [SEED]         # starts at once
    python -m worlds.terminal metaworld:push-v3 [SEED]      # any world

Needs a terminal with true colour, here or over ssh; leaves it as it was, after Ctrl-C too.
"""

import os
import select
import shutil
import signal
import sys
import termios
import tty

import numpy as np

from worlds import pictures

MOVES = {  # key: (which number of the action, its value)
    "a": (0, -1), "d": (0, 1), "s": (1, -1), "w": (1, 1), "f": (2, -1), "r": (2, 1),
    "\x1b[D": (0, -1), "\x1b[C": (0, 1), "\x1b[B": (1, -1), "\x1b[A": (1, 1),
    "j": (3, -1), "u": (3, 1), "k": (4, -1), "i": (4, 1), "e": (5, -1), "q": (5, 1),
}  # fmt: skip
HELP = "w a s d or arrows, r f up down, space hand, p expert, n next, x end"
TURNS = "; u j roll, i k pitch, q e yaw"
ENTER, LEAVE = "\x1b[?1049h\x1b[?25l", "\x1b[0m\x1b[?25h\x1b[?1049l"  # another screen, no cursor


def split(text):
    """What came from the keyboard -> keys; an arrow is three characters."""
    keys = []
    while text:
        n = 3 if text.startswith("\x1b[") and len(text) > 2 else 1
        keys.append(text[:n])
        text = text[n:]
    return keys


class Hand:
    """What keys do to a world: a step for each, but for n (next scene)."""

    def __init__(self, world, seed, task, width):
        self.world, self.seed, self.task, self.width = world, seed, task, width
        self.restart()

    def restart(self):
        self.world.reset(self.seed, self.task)
        self.expert, self.grip, self.steps = self.world.expert(0, 0.0), 1.0, 0

    def press(self, key):
        action = np.zeros(self.width, np.float32)
        if key == "n":
            self.seed += 1
            return self.restart()
        if key == "p":
            action = self.expert.act()
            self.grip = 1.0 if action[-1] > 0 else -1.0
        elif key == " ":
            self.grip = -self.grip
        elif key in MOVES and MOVES[key][0] < self.width - 1:
            place, value = MOVES[key]
            action[place] = value
        else:
            return
        action[-1] = action[-1] if key == "p" else self.grip
        self.world.step(action)
        self.steps += 1

    def screen(self):
        """Pictures side by side and three lines of words, as large as the terminal allows."""
        columns, lines = shutil.get_terminal_size()
        views = list(self.world.observe()["images"].values())
        side = len(views[0])
        views = [v.repeat(-(-side // len(v)), 0).repeat(-(-side // len(v)), 1) for v in views]
        sheet = np.concatenate([v[:side, :side] for v in views], axis=1)
        state = "open" if self.grip > 0 else "closed"
        success = "   SUCCESS" if self.world.success else ""
        words = [f"{self.world.instruction}{success}", f"step {self.steps}, hand {state}"]
        words.append(HELP + TURNS * (self.width > 4))
        picture = pictures.blocks(sheet, columns, lines - len(words) - 1)
        return "\r\n".join([picture, *(line[:columns] for line in words)])


def drive(world, seed=0, task=None):
    """Until x, Ctrl-C or the end of the input."""
    if not (sys.stdin.isatty() and sys.stdout.isatty()):
        print("error: this needs a terminal, as its keyboard and its screen", file=sys.stderr)
        return 2
    world.reset(seed, task)
    hand = Hand(world, seed, task, len(world.expert(0, 0.0).act()))
    inside, before = sys.stdin.fileno(), termios.tcgetattr(sys.stdin)
    stop = signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        tty.setcbreak(inside)
        sys.stdout.write(ENTER)
        while True:
            sys.stdout.write("\x1b[H\x1b[J" + hand.screen())
            sys.stdout.flush()
            text = os.read(inside, 64).decode(errors="ignore")
            while text and select.select([inside], [], [], 0)[0]:  # keys faster than pictures
                more = os.read(inside, 64).decode(errors="ignore")
                text = text + more if more else text + "x"
            for key in split(text) or ["x"]:
                if key in ("x", "\x04"):
                    return 0
                hand.press(key)
    except KeyboardInterrupt:
        return 130
    finally:
        termios.tcsetattr(inside, termios.TCSADRAIN, before)
        sys.stdout.write(LEAVE)
        sys.stdout.flush()
        signal.signal(signal.SIGTERM, stop)


def main(World, words):
    """Words of a command line: SUITE, SUITE:TASK or TASK of a world, and a seed."""
    if "-h" in words or "--help" in words:
        print(__doc__)
        return 0
    suite, _, task = (words[0] if words else "").partition(":")
    try:
        tasks, _ = World.offers(suite)
        if task and task not in tasks:
            raise LookupError(task, list(tasks))
        seed = int(words[1]) if len(words) > 1 else 0
    except LookupError as error:
        word, known = error.args
        print(f"error: no {word}: there are {', '.join(known)}", file=sys.stderr)
        return 2
    except ValueError:
        print(f"error: the seed is a whole number, not {words[1]}", file=sys.stderr)
        return 2
    return drive(World(suite, 96, 96), seed, task or None)


if __name__ == "__main__":
    from common import run_main
    from worlds import loop

    name, _, suite = (sys.argv[1] if len(sys.argv) > 1 else "tabletop").partition(":")
    sys.exit(run_main(lambda: main(loop.find(name)[0], [suite, *sys.argv[2:]])))
