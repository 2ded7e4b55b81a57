"""What the files of the real simulators share: a policy server's client, the loop, the results.

A simulator lives in an environment of its own, without torch and without this project's other
parts: this file needs numpy and pillow and, to reach a server, websockets and msgpack.

  server = client.Server("127.0.0.1:8000")    # worlds/serve.py, or any server of openpi's protocol
  won = client.play(world, server)            # one goal

A world has what `worlds/tabletop.py` has too: reset(seed, task), observe() -> {"images" {"static",
"wrist"}, "state"}, step(action), success, instruction, steps, max_steps.
"""

import argparse
import atexit
import contextlib
import difflib
import json
import math
import os
import platform
import shlex
import subprocess
import sys
import time
from importlib import metadata
from pathlib import Path

import numpy as np

from worlds import pictures

KEYS = {"static": "observation/image", "wrist": "observation/wrist_image"}  # openpi's, for LIBERO
STATE, PROMPT = "observation/state", "prompt"
OPEN = {"unit": lambda g: g > 0.5, "plus": lambda g: g > 0, "minus": lambda g: g < 0,
        "closed": lambda g: g < 0.5}  # fmt: skip
REFUSALS = {401: "asks for the --token that it was started with",
            503: "is full: its --max-clients are there"}  # fmt: skip


class UserError(getattr(sys.modules.get("common"), "UserError", Exception)):
    """A mistake the user can mend, in one line. Where the models are loaded it is their kind."""


# --- a policy server ------------------------------------------------------------------------------


def pack_array(value):
    """numpy in a message, as openpi writes it."""
    if isinstance(value, np.ndarray) and value.dtype.kind in "biuf":
        return {b"__ndarray__": True, b"data": value.tobytes(), b"dtype": value.dtype.str,
                b"shape": value.shape}  # fmt: skip
    if isinstance(value, np.generic):
        return value.item()
    raise TypeError(f"{type(value).__name__} has no place in a message")


def unpack_array(fields):
    """The reverse; numbers only."""
    if b"__ndarray__" in fields:
        dtype = np.dtype(fields[b"dtype"])
        if dtype.kind not in "biuf":
            raise ValueError(f"an array of {dtype}")
        return np.frombuffer(fields[b"data"], dtype).reshape(fields[b"shape"])
    return fields[b"data"] if b"__npgeneric__" in fields else fields


class Server:
    """A policy behind a websocket. `metadata` is what it said of itself."""

    def __init__(self, address, token="", gripper="", patience=600.0):
        try:
            import msgpack
            from websockets.exceptions import InvalidStatus, WebSocketException
            from websockets.sync.client import connect
        except ImportError as error:
            words = "reaching a policy server needs `pip install websockets msgpack`"
            raise UserError(f"{words} ({error})") from None
        host, _, port = address.partition("://")[2 * ("://" in address)].rpartition(":")
        if not host or not port.isdigit() or not 0 < int(port) < 65536:
            raise UserError(f"--server {address}: HOST:PORT is needed, such as 127.0.0.1:8000")
        self.address, self.patience = address, patience
        self.msgpack, self.broken = msgpack, WebSocketException
        about = {"compression": None, "max_size": 2**26, "open_timeout": 10}
        if token:
            about["additional_headers"] = {"Authorization": f"Api-Key {token}"}
        if int(metadata.version("websockets").partition(".")[0]) >= 15:
            # A server that compiles its first plan answers no pings meanwhile: patience bounds it.
            about |= {"proxy": None, "ping_interval": None}
        try:
            link = connect(address if "://" in address else f"ws://{address}", **about)
            self.socket = contextlib.ExitStack().enter_context(link)
            atexit.register(self.socket.close)
            self.metadata = self.read()
            self.reset()
        except (OSError, ValueError, WebSocketException) as error:
            status = error.response.status_code if isinstance(error, InvalidStatus) else 0
            if status in REFUSALS:
                raise UserError(f"the policy server {address} {REFUSALS[status]}") from None
            why = getattr(error, "strerror", None) or str(error) or type(error).__name__
            raise UserError(
                f"no policy server on host {host}, port {port} ({why}): start one there with "
                f"`python worlds/serve.py --checkpoint RUN --port {port}`"
            ) from None
        said, opens = (self.metadata.get(name) for name in ("gripper", "opens"))
        self.gripper = gripper or (opens if opens in OPEN else "unit")
        if said in OPEN and said != self.gripper:
            raise UserError(f"the policy server {address} has --gripper {said}: say so here too")
        low = self.metadata.get("action_low") or [0.0]
        if self.gripper == "unit" and low[-1] < -0.5 and not self.metadata.get("opens", "said"):
            words = "begins at -1, and its recordings do not say whether that is open"
            raise UserError(f"the policy server {address}: the gripper {words}: --gripper plus or "
                            "minus says it")  # fmt: skip

    def read(self):
        """The server's next message, a map; what it says in words is an error."""
        raw = self.socket.recv(timeout=self.patience)
        if isinstance(raw, str):
            raise UserError(f"the policy server {self.address} answers: {raw.strip()[-500:]}")
        try:
            message = self.msgpack.unpackb(raw, object_hook=unpack_array)
        except (TypeError, KeyError, ValueError) as error:
            raise UserError(f"the policy server {self.address} sent no map ({error})") from None
        if not isinstance(message, dict):
            raise UserError(f"the policy server {self.address} sent {type(message).__name__}")
        return message

    def reset(self):
        """A new goal begins: what the policy remembers of the last one is forgotten."""
        self.fresh = self.metadata.get("server") == "onefile-vla"  # openpi's remember nothing

    def infer(self, observation, prompt, width):
        """A world's observation and instruction -> actions (H, width) float64, in its units. An
        arm's gripper, the seventh number, becomes 1 open and 0 closed."""
        message = {KEYS[camera]: image for camera, image in observation["images"].items()}
        if observation.get("state") is not None:
            message[STATE] = np.asarray(observation["state"], np.float32)
        message |= {PROMPT: prompt} | ({"reset": True} if self.fresh else {})
        self.fresh = False
        try:
            self.socket.send(self.msgpack.packb(message, default=pack_array))
            actions = self.read().get("actions")
        except (OSError, self.broken) as error:  # a timeout is an OSError
            why = str(error) or f"no answer in {self.patience:.0f} s"
            raise UserError(f"the policy server {self.address} is gone: {why}") from None
        if not isinstance(actions, np.ndarray) or actions.ndim != 2 or not actions.size:
            raise UserError(f"the policy server {self.address} sent no actions (H, {width})")
        if actions.shape[1] != width:
            many = f"actions of {actions.shape[1]} numbers, this world takes {width}"
            raise UserError(f"the policy server {self.address} sent {many}: another policy?")
        if not np.isfinite(actions).all():
            raise UserError(f"the policy server {self.address} sent actions that are not finite")
        actions = actions.astype(np.float64)
        if width == 7:
            actions[:, 6] = OPEN[self.gripper](actions[:, 6])
        return actions


# --- the loop -------------------------------------------------------------------------------------


def blend(chunks):
    """Adaptive ensemble: chunks [(H, A)] made one step apart, newest last -> present action (A,).

    Each chunk's opinion on the present step, weighted by exp(0.1 cosine similarity to the newest).
    """
    opinions = [c[age] for age, c in enumerate(reversed(chunks)) if age < len(c)]  # newest first
    opinions = np.stack(opinions)
    norm = np.linalg.norm(opinions, axis=1) * np.linalg.norm(opinions[0]) + 1e-7
    weights = np.exp(0.1 * (opinions @ opinions[0]) / norm)
    return (weights[:, None] * opinions).sum(0) / weights.sum()


def play(world, policy, execute=1, ensemble=0, watch=lambda world: None):
    """Acts from where the world is until its goal or its step limit -> whether it was reached.

    `execute` actions of each chunk are carried out (all, if it has fewer). With `ensemble`, a chunk
    is made at each step instead and the last so many are blended. `watch` sees the world first and
    after each step.
    """
    chunks, used = [], 0
    policy.reset()
    watch(world)
    while not world.success and world.steps < world.max_steps:
        if not chunks or ensemble or used == min(execute, len(chunks[-1])):
            chunk = policy.infer(world.observe(), world.instruction, world.width)
            chunks, used = (chunks + [chunk])[-max(1, ensemble) :], 0
        world.step(blend(chunks) if ensemble else chunks[-1][used])
        used += 1
        watch(world)
    return bool(world.success)


# --- the command line -----------------------------------------------------------------------------


class Parser(argparse.ArgumentParser):
    """argparse, with errors of one line."""

    def error(self, message):
        known = [flag for action in self._actions for flag in action.option_strings]
        wrong = next((w for w in message.split() if w.startswith("--")), "")
        near = difflib.get_close_matches(wrong.partition("=")[0], known, 1, 0.0)
        raise UserError(message + (f" (did you mean {near[0]}?)" if "unrecogn" in message else ""))


def parser(doc, name, episodes, seeded=False):
    """The flags that every simulator has. doc: the -h text, with the install commands; seeded:
    whether anything depends on --seed."""
    p = Parser(name, description=doc, formatter_class=argparse.RawDescriptionHelpFormatter,
               allow_abbrev=False)  # fmt: skip
    add = p.add_argument
    add("--server", default="127.0.0.1:8000", metavar="HOST:PORT",
        help="policy server: python worlds/serve.py --checkpoint RUN (%(default)s)")  # fmt: skip
    add("--token", default=os.environ.get("ONEFILE_VLA_TOKEN", ""), help="what the server asks for")
    add("--episodes", type=int, default=0, metavar="N", help=episodes)
    add("--execute", type=int, default=0, metavar="N", help="actions of each chunk (the paper's)")
    add("--ensemble", type=int, default=-1, metavar="N",
        help="plan at each step, blend the last N chunks; 0: do not (the paper's)")  # fmt: skip
    add("--gripper", default="", choices=list(OPEN),
        help="how the policy says open: unit (1, closed 0), plus (1, closed -1), minus (-1, closed "
        "1; openpi's for LIBERO) or closed (0, closed 1); as its server says, or unit")  # fmt: skip
    add("--gifs", type=int, default=0, metavar="N", help="films of the first N goals, beside --out")
    if seeded:
        add("--seed", type=int, help="of the simulator (the protocol's)")
    add("--out", default="", metavar="FILE", help=f"results (./{name}-DATE.json)")
    return p


def install(doc):
    """The install commands of a file's docstring, in one line."""
    lines = doc.replace("\\\n", "").splitlines()
    found = [line for line in lines if line.startswith(("  git ", "  pip ", "  cd "))]
    return "install it with: " + " && ".join(" ".join(line.split()) for line in found)


def chosen(words, known, flag):
    """`a,b` -> the known names it holds; empty: all. An unknown one is an error."""
    names = [word for word in words.split(",") if word]
    for word in names:
        if word not in known:
            near = difflib.get_close_matches(word, list(known), 1, 0.0)
            raise UserError(f"unknown {flag} {word}: did you mean {near[0]}?")
    return names or list(known)


def settings(args, protocol, **more):
    """The protocol with what the command line changes of it, to be written with the results."""
    out = dict(protocol) | more | {"gripper": args.gripper or "unit"}
    seed = getattr(args, "seed", None)
    if args.execute < 0 or args.ensemble < -1 or (seed or 0) < 0:
        raise UserError("--execute, --ensemble and --seed: at least 0")
    out |= {"execute": args.execute} if args.execute else {}
    out |= {"ensemble": args.ensemble} if args.ensemble >= 0 else {}
    out |= {} if seed is None else {"seed": seed}
    if args.episodes < 0:
        raise UserError(f"--episodes {args.episodes}: at least 1, or 0 for the protocol's")
    out["episodes"] = args.episodes or out["episodes"]
    published = all(out[name] == value for name, value in protocol.items() if name != "seed")
    return out | {"published": published}


def run_main(main):
    """Runs `main()`; what the user can mend ends in one line and status 2."""
    try:
        return main()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
    except KeyboardInterrupt:
        sys.exit(130)
    sys.exit(2)


def version(name):
    """The version of an installed package, or the commit of a clone; "" if there is none."""
    if isinstance(name, Path):
        words = ["git", "-C", str(name), "rev-parse", "HEAD"]
        with contextlib.suppress(OSError):
            return subprocess.run(words, capture_output=True, text=True).stdout.strip()
        return ""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return ""


def processor():
    """The kind of machine, without its name."""
    with contextlib.suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
        return f"{names[0]}, {os.cpu_count()} cores" if names else platform.machine()
    return platform.machine()


def say(words):
    print(words, flush=True)


# --- results --------------------------------------------------------------------------------------


def ci95(successes, n):
    """95% Wilson interval of a success rate, in 0..1."""
    if n == 0:
        return 0.0, 1.0
    z, rate = 1.959964, successes / n
    centre = (rate + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(rate * (1 - rate) / n + z * z / (4 * n * n))
    return max(centre - half, 0.0), min(centre + half, 1.0)


def rate(wins):
    """[whether each was won] -> {"success", "ci95", "episodes"}"""
    n, won = len(wins), sum(map(bool, wins))
    return {"success": won / n if n else None, "ci95": ci95(won, n), "episodes": n}


class Results:
    """What was measured so far, rewritten to --out after each episode; films of the first goals."""

    def __init__(self, name, out, protocol, server, versions, gifs=0):
        self.path = Path(out or time.strftime(f"{name}-%Y%m%d-%H%M%S.json"))
        self.start, self.steps, self.wins, self.lengths = time.time(), 0, {}, []
        self.gifs, self.frames = gifs, []
        if "gripper" in protocol:  # the server may have told it
            protocol = protocol | {"gripper": server.gripper}
        machine = {"python": platform.python_version(), "numpy": np.__version__}
        versions = {n: v for n, v in ({n: version(p) for n, p in versions.items()}).items() if v}
        words = ["..." if sys.argv[i - 1] == "--token" else w for i, w in enumerate(sys.argv)][1:]
        words = ["--token=..." if w.startswith("--token=") else w for w in words]
        command = shlex.join(["python", f"worlds/{name}.py", *words])
        self.about = {"benchmark": name, "command": command, "machine": processor(),
                      "protocol": protocol, "seed": protocol.get("seed"),
                      "versions": machine | versions, "server": server.metadata}  # fmt: skip
        if not self.path.parent.is_dir() or self.path.is_dir():
            raise UserError(f"--out {self.path}: a file's name is needed, in a folder that exists")

    def watch(self, world):
        """Every second step of a film, while there is one to make: cameras, words, the end."""
        if self.gifs > 0 and (world.steps % 2 == 0 or world.success):
            shots, words = world.observe()["images"], [world.instruction, f"step {world.steps}"]
            end = world.success or (False if world.steps >= world.max_steps else None)
            self.frames.append(pictures.caption_frame([*shots.values()], words, 1, end))

    def add(self, task, won, steps):
        done = sum(map(len, self.wins.values()))
        self.wins.setdefault(task, []).append(bool(won))
        self.steps += steps
        if self.frames:
            name = f"{self.path.stem}-{done:03d}-{task.replace('/', '-')}.gif"
            film = self.frames + [self.frames[-1]] * 10  # a second to look at the end
            pictures.save_gif(self.path.with_name(name), film)
            self.gifs, self.frames = self.gifs - 1, []

    def summary(self):
        seconds, wins = time.time() - self.start, [w for some in self.wins.values() for w in some]
        out = self.about | rate(wins)
        if self.lengths:  # goals of each chain reached in a row
            out |= rate([n > 0 for n in self.lengths]) | {
                "chain": [rate([n >= k for n in self.lengths]) for k in range(1, 6)],
                "length": sum(self.lengths) / len(self.lengths),
            }
        return out | {"tasks": {task: rate(some) for task, some in self.wins.items()},
                      "steps": self.steps, "seconds": round(seconds, 1),
                      "steps_per_second": round(self.steps / max(seconds, 1e-9), 2)}  # fmt: skip

    def write(self, complete=False):
        """-> the summary, written too"""
        out = self.summary() | {"complete": complete}
        temporary = self.path.with_suffix(".tmp")
        temporary.write_text(json.dumps(out, indent=1) + "\n")
        os.replace(temporary, self.path)
        return out


def evaluate(world, policy, protocol, results, many, say=say):
    """many: {task: n}; acts from the first n starts of each task."""
    for task, n in many.items():
        for i in range(n):
            world.reset(i, task)
            won = play(world, policy, protocol["execute"], protocol["ensemble"], results.watch)
            results.add(task, won, world.steps)
            done = results.write()["tasks"][task]
            say(f"{task} {i + 1}: {'success' if won else 'failure'}; so far {cell(done)}")


def cell(measured):
    """{"success", "ci95", "episodes"} -> words"""
    if not measured or not measured["episodes"]:
        return "not run"
    low, high = measured["ci95"]
    share, n = 100 * measured["success"], measured["episodes"]
    return f"{share:5.1f} ({100 * low:.1f} to {100 * high:.1f}; {n})"


def table(rows, papers, say=say):
    """rows {name: measured}, papers {whose: {name: %}}: prints one beside the other. A column of a
    paper says so in each line."""
    wide = max(len(name) for name in [*rows, "success % (95%; episodes)"]) + 2
    heads = "".join(f"{whose:>{max(len(whose), 14) + 2}}" for whose in papers)
    say(f"{'success % (95%; episodes)':{wide}}{'measured':<26}{heads}")
    for name, measured in rows.items():
        words = f"{name:{wide}}{cell(measured):<26}"
        for whose, numbers in papers.items():
            theirs = f"{numbers[name]:g} (paper)" if name in numbers else "-"
            words += f"{theirs:>{max(len(whose), 14) + 2}}"
        say(words)


def mean(tasks):
    """The average over tasks as the papers take it. Its interval is that of as many episodes as
    would, spread evenly, tell it as well: all of them if each task has as many."""
    some = [t for t in tasks if t and t["episodes"]]
    if not some:
        return None
    average = sum(t["success"] for t in some) / len(some)
    worth = len(some) ** 2 / sum(1 / t["episodes"] for t in some)
    n = sum(t["episodes"] for t in some)
    return {"success": average, "ci95": ci95(average * worth, worth), "episodes": n}


def close(results, protocol, rows, papers, full, say=say):
    """The end of an evaluation: the table, the file, and whether it is the protocol's."""
    done = results.write(complete=True)
    table(rows(done), papers, say)
    if not (full and protocol["published"]):
        say("not the paper's protocol, in its episodes, tasks or settings: no comparison, a check")
    say(f"{done['steps']} steps, {done['steps_per_second']} a second; written to {results.path}")
    return done
