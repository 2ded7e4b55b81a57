"""Serves a trained policy over websocket and msgpack, for the clients of openpi and starVLA.

  python worlds/serve.py --checkpoint RUN                     # a run of any of the three scripts
  python worlds/serve.py --checkpoint RUN --client droid      # the keys that DROID's client sends
  python worlds/serve.py --checkpoint RUN --images cam/front,cam/hand --state joints,gripper

      client 1 ---observation--->  [ asyncio: reads, checks, resizes ]        [ one thread: the   ]
      client 2 ---observation--->  [ each client by itself           ] -----> [ policy, over all  ]
      client 3 <--action chunk---  [                                 ] <----- [ that waits at once ]

On connecting a client gets the metadata: what the policy is, sees and answers. Then each message is
a map and gets one answer:
  {image keys, state keys, prompt key}        {"actions" (H, A), "server_timing", "policy_timing"}
  {"examples": [{"image", "lang", "state"}]}  starVLA's answer, {"data": {"actions" (B, H, A)}, ...}
  {"reset": True}, alone or with the above    a new episode: what the policy remembers is forgotten
  {"stop": True}                              the same, and "actions" (0, A): nothing more to do
What a policy remembers belongs to one connection, and ends with a reset, another prompt, a pause
of --forget seconds, or the connection. A text frame is an error: one line that says what the
message lacks; the connection stays open. Only an error of the server's own closes it (1011).
GET /healthz answers OK.

Nothing is unpickled, arrays are numbers of a known size, pages in a browser are refused, and a
client that is slow, silent, too loud or gone holds up nobody else.
"""

import asyncio
import concurrent.futures
import dataclasses
import hmac
import importlib
import ipaddress
import itertools
import json
import logging
import math
import os
import queue
import re
import signal
import statistics
import sys
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np  # noqa: E402

import common  # noqa: E402
import data  # noqa: E402
from common import UserError  # noqa: E402
from worlds import loop  # noqa: E402

try:
    import msgpack
    from websockets.asyncio.server import serve as listen
    from websockets.exceptions import ConnectionClosed
except ImportError:
    msgpack = None

METHODS = ("twinbrain", "vita_vla", "dualvla")


@dataclass
class Config:
    checkpoint: str = ""  # run folder of twinbrain.py, vita_vla.py or dualvla.py, or a stage's
    host: str = "127.0.0.1"  # address to listen on; this one is reached from this machine alone
    port: int = 8000  # 0: any free one
    token: str = ""  # what clients must send (openpi's api_key); or set ONEFILE_VLA_TOKEN
    # what clients call things; a key may be a path into nested maps, a/b
    client: str = "libero"  # libero | droid | aloha | own: whose names are expected, see CLIENTS
    images: tuple[str, ...] = ()  # keys of the pictures, in the order of the policy's cameras
    state: tuple[str, ...] = ()  # keys of the state's parts, joined in this order
    prompt: str = ""  # key of the instruction
    aspect: float = 0.0  # pictures come with bars: width / height inside; 0: without (droid: 1.78)
    default_prompt: str = ""  # the instruction where a message has none
    # how the policy answers
    robot: str = ""  # whose recordings to act like; empty: as the run was evaluated
    gripper: str = ""  # unit | plus | minus | closed: open is 1 (closed 0), +1, -1, or 0 (closed 1)
    execute: int = 0  # actions sent of each chunk (receding horizon); 0: all of them
    ensemble: bool = False  # one action, blended from the last 7 chunks: for asking at every step
    form: str = ""  # plain | reason: how DualVLA is asked, at once or with words before
    seed: int = 0  # of the noise that actions are made from, the same for each connection
    batch: int = 16  # observations planned at once, at most
    wait_ms: float = 3.0  # for the other clients' observations, at most
    # bounds
    max_message_mb: float = 16.0  # size of a message
    max_rate: float = 60.0  # messages a second of each client; more are read later
    max_clients: int = 16  # connected at once
    timeout: float = 60.0  # seconds for a ping to be answered, a plan to be made, a reply taken
    idle: float = 3600.0  # seconds that a client may stay without a message
    forget: float = 0.0  # pause in seconds after which an episode is new; 0: when it says so
    device: str = "auto"  # auto | cpu | cuda
    threads: int = 0  # CPU threads; 0: torch's choice


@dataclass
class Keys:
    """What a kind of client calls the pictures, the parts of the state, and the instruction."""

    images: tuple[str, ...]
    state: tuple[str, ...]
    prompt: str = "prompt"


CLIENTS = {
    "libero": Keys(("observation/image", "observation/wrist_image"), ("observation/state",)),
    "droid": Keys(
        ("observation/exterior_image_1_left", "observation/wrist_image_left"),
        ("observation/joint_position", "observation/gripper_position"),
    ),
    "aloha": Keys(
        ("images/cam_high", "images/cam_left_wrist", "images/cam_right_wrist"), ("state",)
    ),
    "own": Keys(("images/static", "images/wrist"), ("state",)),
}


# --- messages -------------------------------------------------------------------------------------

MAX_TEXT = 4096  # bytes of a word in a message
MAX_PROMPT = 500  # characters of an instruction: a longer one would slow the whole batch
GRIPPERS = {  # closed, open
    "unit": (0.0, 1.0), "plus": (-1.0, 1.0), "minus": (1.0, -1.0), "closed": (1.0, 0.0),
}  # fmt: skip
UNNORM_KEYS = {  # starVLA's names of recordings
    "oxe_bridge": ("bridge", "bridge_orig"), "oxe_rt1": ("fractal", "fractal20220817_data"),
}  # fmt: skip
MAX_SIDE = 8192  # pixels of a picture
MAX_VALUES = 20_000  # maps, lists and what they hold; an array counts as one
NUMBER = re.compile(r"[<>|=]?(b1|[iu][1248]|f[248])")


def short(value):
    """A client's value as it may stand in a line; a large one is not written out."""
    if isinstance(value, (str, bytes)):
        return ascii(value) if len(value) <= 60 else ascii(value[:60]) + "..."
    few = isinstance(value, list) and len(value) <= 4 and all(type(n) is int for n in value)
    plain = few or value is None or isinstance(value, (bool, int, float))
    return ascii(value) if plain else f"a {type(value).__name__}"


def read_array(fields):
    """A map {"__ndarray__", "data", "dtype", "shape"} -> array, read-only."""
    code, shape, content = (fields.get(name) for name in (b"dtype", b"shape", b"data"))
    if not (isinstance(code, str) and NUMBER.fullmatch(code)):
        raise UserError(f"an array of dtype {short(code)}: only numbers are read")
    whole = isinstance(shape, list) and len(shape) <= 4
    if not (whole and all(type(n) is int and n > 0 for n in shape)):
        raise UserError(f"an array of shape {short(shape)}: up to four numbers above zero")
    size = math.prod(shape) * int(code[-1])
    if not isinstance(content, bytes) or len(content) != size:
        has = len(content) if isinstance(content, bytes) else short(content)
        raise UserError(f"an array {code} of shape {short(shape)} has {size} bytes, not {has}")
    return np.frombuffer(content, code).reshape(shape)


def decode(raw):
    """Bytes of a message -> map of words, numbers, lists, maps and arrays. Anything else, or more
    than a message needs, is an error; memory stays within a small multiple of the message."""
    count = 0

    def add(items):
        nonlocal count
        count += 1 + len(items)
        if count > MAX_VALUES:
            raise UserError(f"a message of more than {MAX_VALUES} values")
        return items

    def on_map(fields):
        add(fields)
        if b"__ndarray__" in fields:
            return read_array(fields)
        if b"__npgeneric__" in fields:
            value = fields.get(b"data")
            if isinstance(value, (bool, int, float)):
                return value
            raise UserError(f"a scalar {short(value)}: only numbers are read")
        return fields

    try:
        message = msgpack.unpackb(
            raw, object_hook=on_map, list_hook=add, max_str_len=MAX_TEXT, max_array_len=1024,
            max_map_len=256, max_ext_len=0,
        )  # fmt: skip
    except (ValueError, TypeError, OverflowError, RecursionError) as error:
        why = str(error) or type(error).__name__
        raise UserError(f"this is no message in msgpack: {short(why)}") from None
    if not isinstance(message, dict):
        raise UserError(f"a message is a map, not {short(message)}")
    return message


def write_array(value):
    if isinstance(value, np.ndarray):
        return {
            b"__ndarray__": True,
            b"data": value.tobytes(),
            b"dtype": value.dtype.str,
            b"shape": value.shape,
        }
    raise TypeError(f"{type(value)} has no place in a message")


def encode(message):
    return msgpack.packb(message, default=write_array)


# --- observations ---------------------------------------------------------------------------------


def find(message, key):
    """What stands under the key or, if a/b is none, under b in the map (or list) under a."""
    if isinstance(message, list):
        message = {str(i): item for i, item in enumerate(message)}
    if not isinstance(message, dict) or key in message:
        return message.get(key) if isinstance(message, dict) else None
    head, _, rest = key.partition("/")
    return find(message.get(head), rest) if rest else None


def picture(value, key, side, aspect=0.0):
    """A client's picture, (h, w, 3) or (3, h, w), uint8 or 0..1 -> (side, side, 3) uint8, resized
    as for training. aspect: width / height of what is inside its bars."""
    shape = value.shape if isinstance(value, np.ndarray) else ()
    if len(shape) != 3 or 3 not in (shape[0], shape[2]) or max(shape) > MAX_SIDE:
        has = f"{value.dtype} {shape}" if shape else short(value)
        raise UserError(f"{key} is {has}, not a picture (h, w, 3) or (3, h, w), {MAX_SIDE} at most")
    if shape[2] != 3:
        value = value.transpose(1, 2, 0)
    if value.dtype.kind == "f":
        if not (value.min() >= 0 and value.max() <= 1):  # false for nan, too
            raise UserError(f"{key} is {value.dtype}: such pictures have values from 0 to 1")
        value = np.rint(255 * value.astype(np.float32)).astype(np.uint8)
    if value.dtype != np.uint8:
        raise UserError(f"{key} is {value.dtype}: pictures are uint8, or floats from 0 to 1")
    if aspect:
        h, w = value.shape[:2]
        rows, columns = min(h, round(w / aspect)), min(w, round(h * aspect))
        top, left = (h - rows) // 2, (w - columns) // 2
        value = value[top : top + rows, left : left + columns]
    return data.resized(np.ascontiguousarray(value), side)


def wordy(value):
    """Whether a client's value is a word, or a list with one in it."""
    return isinstance(value, (str, bytes)) or isinstance(value, list) and any(map(wordy, value))


def numbers(value, key):
    """A client's part of the state -> float32 vector."""
    try:
        with np.errstate(over="ignore"):
            vector = np.asarray(value, np.float32).reshape(-1)
        if wordy(value):  # numpy reads "1" as a number
            raise ValueError
    except (ValueError, TypeError, OverflowError):
        raise UserError(f"{key} is {short(value)}, not numbers") from None
    if not np.isfinite(vector).all():
        raise UserError(f"{key} holds a number that is not finite")
    return vector


def source(policy):
    """The name of the recordings that a policy acts like, one of those it was trained on."""
    return policy.cfg.robot or next(iter(policy.robots))


def cameras(policy, images):
    """What a policy sees, in the order of its training -> {camera: side of its pictures}."""
    cfg, names = policy.cfg, policy.stats.get("cameras") or images
    if not names:
        raise UserError("the checkpoint does not tell its cameras: --images names a key for each, "
                        "in the order of the recordings")  # fmt: skip
    return {camera: cfg.wrist_size if i else cfg.size for i, camera in enumerate(names)}


def opens(policy):
    """How the last number of an action says open, as trained: a key of GRIPPERS, "": not known."""
    name = source(policy)
    row, own = data.SOURCES.get(name), name.partition(":")[0] in loop.WORLDS
    known = "plus" if own else "unit" if row and row.gripper else ""
    return policy.stats.get("gripper") or known


def gripper(policy, want):
    """--gripper -> (scale, offset) for the last number of an action as trained."""
    if not want:
        return 1.0, 0.0
    if not (own := opens(policy)):
        words = f"{source(policy)} does not tell what its last number means"
        raise UserError(f"--gripper {want}: {words}")
    (closed, open_), (to_closed, to_open) = GRIPPERS[own], GRIPPERS[want]
    scale = (to_open - to_closed) / (open_ - closed)
    return scale, to_closed - scale * closed


class Reader:
    """Messages -> observations as the worlds give them, for one policy."""

    def __init__(self, policy, method, cfg):
        self.sides = cameras(policy, cfg.images)
        low, high = (np.array(policy.stats["state"][name]) for name in ("min", "max"))
        self.width, used = len(low), np.flatnonzero((low != 0) | (high != 0))
        self.least = int(used[-1]) + 1 if len(used) else 1  # zeros fill up to another robot's width
        reads = method == "vita_vla" or policy.cfg.state
        self.blind = not (reads and self.width)  # it reads no state
        self.words = set(policy.processor.tokenizer.get_added_vocab())
        self.default, self.most, self.aspect = cfg.default_prompt, cfg.batch, cfg.aspect
        self.robots, self.robot = [*policy.robots], source(policy)
        names, n = CLIENTS[cfg.client], len(self.sides)
        images = cfg.images or names.images[:n]
        self.keys = Keys(images, cfg.state or names.state, cfg.prompt or names.prompt)
        self.star = Keys(tuple(f"image/{i}" for i in range(n)), ("state",), "lang")
        if len(images) != n:
            many = f"{n} cameras ({', '.join(self.sides)})"
            raise UserError(f"the policy has {many}: --images names {n} keys, in this order")

    def get(self, message, key, what, flag, keys):
        """What stands under the key; nothing is an error that says which flag helps."""
        if (value := find(message, key)) is not None:
            return value
        has = ", ".join(short(name) for name in list(message)[:12])
        hint = f": --{flag} names the key" if keys is self.keys else ""
        raise UserError(f"the message lacks {key} ({what}), it has {has}{hint}")

    def observation(self, message, keys):
        """A map with pictures, state, instruction under these keys -> observation, instruction."""
        images, state = {}, np.zeros(self.width, np.float32)
        for (camera, side), key in zip(self.sides.items(), keys.images):
            value = self.get(message, key, f"camera {camera}", "images", keys)
            images[camera] = picture(value, key, side, self.aspect)
        if not self.blind:
            what = f"state, {self.width} numbers in all"
            parts = [self.get(message, key, what, "state", keys) for key in keys.state]
            parts = [numbers(part, key) for part, key in zip(parts, keys.state)]
            state = np.concatenate(parts)
            if not self.least <= len(state) <= self.width:
                widths = ", ".join(f"{key} {len(part)}" for part, key in zip(parts, keys.state))
                has = f"the state has {len(state)} numbers ({widths})"
                raise UserError(f"{has}, {self.width} were trained with: --state names the keys")
        return {"images": images, "state": state}, self.prompt(message, keys)

    def prompt(self, message, keys):
        if self.default and find(message, keys.prompt) is None:
            return self.default
        words = self.get(message, keys.prompt, "instruction", "prompt or --default-prompt", keys)
        if not isinstance(words, str) or not words.strip() or len(words) > MAX_PROMPT:
            raise UserError(f"{keys.prompt} is {short(words)}, not 1 to {MAX_PROMPT} characters")
        for special in self.words:
            if special in words:
                has = f"{keys.prompt} holds {short(special)}"
                raise UserError(f"{has}, which means something else to the tokenizer")
        return words

    def rows(self, message):
        """-> [(observation, instruction)]: one of openpi's, or starVLA's list of examples."""
        payload = message.get("payload", message)
        if not isinstance(payload, dict) or "examples" not in payload:
            return [self.observation(message, self.keys)]
        examples, n, name = payload["examples"], len(self.sides), payload.get("unnorm_key")
        known = UNNORM_KEYS.get(name, (name,)) if isinstance(name, str) else (None,)
        if len(self.robots) > 1 and name is not None and self.robot not in known:
            words = f"this server acts like {self.robot}, of {', '.join(self.robots)} (--robot)"
            raise UserError(f"unnorm_key {short(name)}: {words}")
        if not isinstance(examples, list) or not 1 <= len(examples) <= self.most:
            raise UserError(f"examples is no list of 1 to {self.most} maps (--batch)")
        for example in examples:
            shots = find(example, "image")
            if not isinstance(shots, list) or len(shots) != n:
                raise UserError(f"an example's image: {n} pictures, {', '.join(self.sides)}")
        return [self.observation(example, self.star) for example in examples]


# --- the thread that plans ------------------------------------------------------------------------


@dataclass
class Episode:
    """What lasts from one observation to the next: the policy's memory, and its random numbers."""

    rng: np.random.Generator
    memory: dict = field(default_factory=dict)
    words: str = ""


@dataclass
class Request:
    """An observation that waits -> (chunk, words said before it, seconds in the policy)."""

    observation: dict
    words: str
    episode: Episode
    noise: np.ndarray | None = None
    memory: dict = field(default_factory=dict)  # the episode's, once this is answered
    answer: concurrent.futures.Future = field(default_factory=concurrent.futures.Future)


class Noise:
    """A numpy generator to the policy, but each request draws from its own client's numbers: what a
    client is answered does not hang on who else is there."""

    def __init__(self, requests):
        self.requests = requests

    def standard_normal(self, shape, dtype=np.float64):
        for r in self.requests:
            if r.noise is None:
                r.noise = r.episode.rng.standard_normal(shape[1:], dtype)
        return np.stack([r.noise for r in self.requests])


class Planner(threading.Thread):
    """The one thread that runs the policy, over all observations that wait. crowd: () -> how many
    clients there are; it waits no longer once each has asked."""

    def __init__(self, policy, cfg, crowd):
        super().__init__(name="planner", daemon=True)
        self.policy, self.cfg, self.crowd = policy, cfg, crowd
        self.queue, self.stopping = queue.SimpleQueue(), False
        self.scale, self.offset = gripper(policy, cfg.gripper)

    def stop(self):
        """The batch that runs is finished, what waits behind it is not begun."""
        self.stopping = True
        self.queue.put(None)

    def run(self):
        while (first := self.queue.get()) is not None:
            requests = self.gather(first)
            if self.stopping:
                for r in requests:
                    r.answer.cancel()
            requests = [r for r in requests if r.answer.set_running_or_notify_cancel()]
            if requests:
                self.plan(requests)
        while not self.queue.empty():
            if (r := self.queue.get()) is not None:
                r.answer.cancel()

    def gather(self, first):
        requests, end = [first], time.monotonic() + self.cfg.wait_ms / 1000
        while len(requests) < self.cfg.batch:
            left = end - time.monotonic() if len(requests) < self.crowd() else 0.0
            try:
                request = self.queue.get(timeout=max(left, 0.0))
            except queue.Empty:
                break
            if request is None:
                self.queue.put(None)
                break
            requests.append(request)
        return requests

    def plan(self, requests):
        try:
            self.act(requests)
        except Exception as error:
            if len(requests) == 1:
                requests[0].answer.set_exception(error)
            else:  # who caused it is alone with it
                for r in requests:
                    self.plan([r])

    def act(self, requests):
        memories = [dict(r.episode.memory) for r in requests]
        seen = [r.observation | {"memory": m} for r, m in zip(requests, memories)]
        began = time.perf_counter()
        chunks = self.policy.act(seen, [r.words for r in requests], Noise(requests))
        took = time.perf_counter() - began
        if not np.isfinite(chunks).all():
            raise FloatingPointError("the policy's actions are not finite")
        if self.cfg.ensemble:
            for m, chunk in zip(memories, chunks):
                m["chunks"] = (m.get("chunks", []) + [chunk])[-7:]
            chunks = np.stack([loop.blend(m["chunks"])[None] for m in memories])
        chunks = chunks[:, : self.cfg.execute or None].astype(np.float32)  # (n, H, A)
        chunks[..., -1] = self.scale * chunks[..., -1] + self.offset
        said = getattr(self.policy, "said", None) or [""] * len(requests)
        for r, memory, chunk, words in zip(requests, memories, chunks, said):
            r.memory = memory
            r.answer.set_result((chunk, words, took))


# --- the server -----------------------------------------------------------------------------------


class Client:
    """One connection, and what belongs to it."""

    def __init__(self, number, socket, seed):
        self.number, self.socket, self.seed = number, socket, seed
        self.episodes, self.busy, self.due = [], False, 0.0  # due: when it may be read again
        self.requests, self.errors, self.times, self.last = 0, 0, [], None  # last: seconds
        self.heard = math.inf  # when it was answered

    def reset(self):
        self.episodes = [Episode(episode.rng) for episode in self.episodes]

    def episode(self, row, words):
        """What the row-th observation of each message goes on with; another prompt starts anew."""
        if row == len(self.episodes):
            self.episodes.append(Episode(np.random.default_rng(self.seed)))
        if self.episodes[row].words != words:
            self.episodes[row] = Episode(self.episodes[row].rng, words=words)
        return self.episodes[row]


class Server:
    def __init__(self, policy, method, cfg, say=print):
        self.cfg, self.say, self.reader = cfg, say, Reader(policy, method, cfg)
        self.A = len(policy.stats["action"]["q01"])
        self.metadata = describe(policy, method, cfg, self.reader)
        self.clients, self.count, self.stopping = set(), itertools.count(1), False
        self.planner = Planner(policy, cfg, lambda: len(self.clients))

    def admit(self, connection, request):
        """Before the handshake: health, who may come in, and for how many there is room."""
        if request.path == "/healthz":
            well = self.planner.is_alive() and not self.stopping
            return connection.respond(200 if well else 503, "OK\n" if well else "stopping\n")
        given = request.headers.get_all("Authorization")
        known = [f"{scheme} {self.cfg.token}".encode() for scheme in ("Api-Key", "Bearer")]
        if self.cfg.token and not any(
            hmac.compare_digest(g.encode(errors="replace"), k) for g in given for k in known
        ):
            return connection.respond(401, "a token is needed: api_key of openpi's client\n")
        if len(self.clients) >= self.cfg.max_clients:
            return connection.respond(503, f"{len(self.clients)} clients are here already\n")
        return None

    async def handle(self, socket):
        if len(self.clients) >= self.cfg.max_clients:
            return await socket.close(1013, "no room")
        client, why = Client(next(self.count), socket, self.cfg.seed), ""
        self.clients.add(client)
        host, port = (socket.remote_address or ("?", "?"))[:2]
        self.say(f"client {client.number} {host}:{port} connected ({len(self.clients)} here)")
        try:
            await socket.send(encode(self.metadata))
            while not self.stopping:
                await self.turn(client)
            await socket.close(1001, "the server stops")
        except ConnectionClosed as error:
            why = f" ({error.rcvd.code})" if error.rcvd else " (vanished)"
        except asyncio.TimeoutError:
            why = " (too slow)"
            await socket.close(1008, "too slow")
        finally:
            self.clients.discard(client)
            words = f"client {client.number} left{why}: {client.requests} requests"
            if client.times:
                words += f", median {1000 * statistics.median(client.times):.1f} ms"
            self.say(words + (f", {client.errors} errors" if client.errors else ""))

    async def turn(self, client):
        """One message, one answer."""
        clock, socket = asyncio.get_running_loop().time, client.socket
        client.due = max(client.due + 1 / self.cfg.max_rate, clock())
        await asyncio.sleep(client.due - clock())
        raw = await asyncio.wait_for(socket.recv(), self.cfg.idle)
        client.busy, began = True, clock()
        if 0 < self.cfg.forget < began - client.heard:
            client.reset()
        try:
            reply = await self.answer(client, raw)
            await asyncio.wait_for(socket.send(reply), self.cfg.timeout)
        except (ConnectionClosed, asyncio.TimeoutError):
            raise
        except asyncio.CancelledError:  # it waited behind the last batch
            if not self.stopping:
                raise
            return
        except Exception as error:
            self.say(f"client {client.number}: {type(error).__name__}: {short(str(error))}")
            await socket.send(f"error in the server: {type(error).__name__}")
            return await socket.close(1011, "an error in the server, named in the frame before")
        finally:
            client.busy, client.heard = False, clock()
        client.last = client.heard - began
        client.times = [*client.times[-999:], client.last]
        client.requests += 1

    async def answer(self, client, raw):
        """A message -> its answer: bytes, or the text of an error."""
        star, name = False, "default"
        try:
            if isinstance(raw, str):
                raise UserError("a text frame: messages are msgpack in binary frames")
            message = await asyncio.to_thread(decode, raw)
            kind, given = message.get("type"), message.get("request_id")
            calls = isinstance(kind, str) and kind in ("ping", "init", "reset")
            star = calls or "examples" in message or isinstance(message.get("payload"), dict)
            name = given if isinstance(given, (str, int)) else name
            reset, stop = (message.pop(word, False) for word in ("reset", "stop"))
            if not (isinstance(reset, bool) and isinstance(stop, bool)):
                has = f"reset is {short(reset)}, stop is {short(stop)}"
                raise UserError(f"{has}: each is true or false")
            if reset or stop or (calls and kind != "ping"):
                client.reset()
                if stop:
                    return encode({"stopped": True, "actions": np.zeros((0, self.A), np.float32)})
                if not message:
                    return encode({"reset": True})
            if calls:
                return encode({"status": "ok", "ok": True, "type": kind, "request_id": name})
            rows = await asyncio.to_thread(self.reader.rows, message)
            return await self.plan(client, rows, star, name)
        except UserError as error:
            client.errors += 1
            if not star:
                return f"error: {error}"
            failed = {"status": "error", "ok": False, "error": {"message": str(error)}}
            return encode(failed | {"type": "inference_result", "request_id": name})

    async def plan(self, client, rows, star, name):
        """Observations and instructions of one message -> the answer with their chunks."""
        began = time.perf_counter()
        requests = [
            Request(o, words, client.episode(i, words)) for i, (o, words) in enumerate(rows)
        ]
        for r in requests:
            self.planner.queue.put(r)
        answers = asyncio.gather(*(asyncio.wrap_future(r.answer) for r in requests))
        try:
            made = await asyncio.wait_for(answers, self.cfg.timeout)
        except asyncio.TimeoutError:  # an old picture's actions are worse than none
            raise UserError(f"no plan within --timeout {self.cfg.timeout:g} s") from None
        for r in requests:  # a plan that failed or came too late is forgotten
            r.episode.memory = r.memory
        took = max(seconds for _, _, seconds in made)
        timing = {"infer_ms": 1000 * took, "wait_ms": 1000 * (time.perf_counter() - began - took)}
        if client.last is not None:
            timing["prev_total_ms"] = 1000 * client.last
        if star:
            done = {"status": "ok", "ok": True, "type": "inference_result", "request_id": name}
            done["data"] = {"actions": np.stack([chunk for chunk, _, _ in made])}  # (B, H, A)
            return encode(done | {"server_timing": timing})
        chunk, said, _ = made[0]
        done = {"actions": chunk, "policy_timing": {"infer_ms": 1000 * took}}
        return encode(done | {"server_timing": timing} | ({"said": said} if said else {}))

    async def run(self, stop):
        """Serves until the event `stop`; the batch that runs then is still answered."""
        cfg, bound = self.cfg, int(self.cfg.max_message_mb * 2**20)
        self.planner.start()
        try:
            server = await listen(
                self.handle, cfg.host, cfg.port, process_request=self.admit, compression=None,
                origins=[None], max_size=bound, max_queue=1, open_timeout=min(cfg.timeout, 10),
                ping_interval=min(cfg.timeout, 20), ping_timeout=cfg.timeout, close_timeout=3,
            )  # fmt: skip
        except OSError as error:
            why = error.strerror or error
            raise UserError(
                f"cannot listen on --host {cfg.host} --port {cfg.port}: {why}"
            ) from None
        port = next(iter(server.sockets)).getsockname()[1]
        self.say(f"listening on ws://{cfg.host}:{port}, health on http://{cfg.host}:{port}/healthz")
        await stop.wait()
        self.stopping = True
        server.close(close_connections=False)
        self.planner.stop()
        idle = [c.socket.close(1001, "the server stops") for c in self.clients if not c.busy]
        await asyncio.gather(*idle, return_exceptions=True)
        while self.planner.is_alive():
            await asyncio.sleep(0.01)
        try:
            await asyncio.wait_for(server.wait_closed(), 5)
        except asyncio.TimeoutError:
            pass  # a handshake that nobody finishes


# --- main -----------------------------------------------------------------------------------------


def method_of(folder):
    """--checkpoint -> the script that made it; where it is a chain's, the newest stage serves."""
    folder = Path(folder)
    places = ("config.json", "meta.json", "step_*/meta.json", "*/config.json", "*/*/meta.json")
    found = [file for place in places for file in sorted(folder.glob(place))]
    if not found:
        raise UserError(f"--checkpoint {folder}: no run folder of {', '.join(METHODS)}")
    try:
        method = json.loads(found[0].read_text()).get("method")
    except (ValueError, AttributeError):
        raise UserError(f"{found[0]} is damaged: no method in it") from None
    if method not in METHODS:
        raise UserError(f"{found[0]} is a run of {short(method)}; served are {', '.join(METHODS)}")
    return method


def describe(policy, method, cfg, reader):
    """The metadata that a client gets on connecting."""
    theirs, keys = policy.cfg, reader.keys
    H = getattr(theirs, "horizon", 1)
    H = 1 if cfg.ensemble else min(cfg.execute or H, H)
    low, high = data.bounds(policy.stats["action"])
    scale, offset = gripper(policy, cfg.gripper)
    low[-1], high[-1] = sorted((scale * low[-1] + offset, scale * high[-1] + offset))
    seen = zip(reader.sides.items(), keys.images)
    return {
        "server": "onefile-vla", "method": method, "backbone": theirs.backbone,
        "stage": getattr(theirs, "stage", ""), "world": theirs.world,
        "action_dim": len(low), "action_horizon": H, "action_chunk_size": H,
        "execute": min(theirs.execute, H), "ensemble": cfg.ensemble,
        "action_low": low.tolist(), "action_high": high.tolist(),
        "normalise": policy.stats["action"].get("how", "q99"), "gripper": cfg.gripper or "trained",
        "opens": cfg.gripper or opens(policy), "remembers": cfg.ensemble or method == "vita_vla",
        "cameras": {name: {"key": key, "side": side} for (name, side), key in seen},
        "state_dim": 0 if reader.blind else reader.width, "state_keys": list(keys.state),
        "prompt_key": keys.prompt, "control_hz": policy.stats.get("fps"),
        "available_unnorm_keys": [reader.robot], "default_unnorm_key": reader.robot,
    }  # fmt: skip


def check(cfg):
    """What no type can say about the flags, before a model is loaded."""
    if msgpack is None:
        raise UserError("serving needs websockets and msgpack: pip install 'onefile-vla[serve]'")
    if not cfg.checkpoint:
        raise UserError("--checkpoint RUN is needed: a run folder")
    for name in ("wait_ms", "execute", "port", "seed", "aspect", "forget"):
        if not 0 <= getattr(cfg, name) < math.inf:
            raise UserError(f"--{name.replace('_', '-')} {getattr(cfg, name)}: at least 0, finite")
    for name in ("batch", "max_message_mb", "max_rate", "max_clients", "timeout", "idle"):
        if not 0 < getattr(cfg, name) < math.inf:
            raise UserError(f"--{name.replace('_', '-')} {getattr(cfg, name)}: a number above 0")
    if cfg.port > 65535:
        raise UserError(f"--port {cfg.port}: at most 65535")
    token = cfg.token or os.environ.get("ONEFILE_VLA_TOKEN", "")
    if not (token.isascii() and token.isprintable()):
        raise UserError("--token: printable ASCII characters")
    return dataclasses.replace(cfg, token=token)


def hint(cfg, about, say):
    """What a client must know of the policy, and openpi's do not."""
    kind = about["opens"]
    ends = "{1:g} open, {0:g} closed".format(*GRIPPERS[kind]) if kind else "as it was recorded"
    say(f"the last number of an action, the gripper: {ends}")
    if cfg.client == "libero" and about["action_dim"] == 7 and kind not in ("", "minus"):
        say("openpi's LIBERO client hands it to the simulator as it is: --gripper minus")
    if cfg.client == "droid" and about["action_dim"] != 8:
        say(f"openpi's DROID client takes 8 numbers, not {about['action_dim']}: one of your own")
    if about["remembers"] and not cfg.forget:
        say('it remembers until {"reset": True}, which clients of openpi and starVLA do not send: '
            "--forget 2 begins an episode after two seconds without a message")  # fmt: skip


def warn(cfg, say):
    """What a server that others can reach must be told of."""
    try:
        near = cfg.host == "localhost" or ipaddress.ip_address(cfg.host).is_loopback
    except ValueError:
        near = False
    if not near and cfg.token:
        say(f"warning: --host {cfg.host}: the token and all messages travel unencrypted")
    elif not near:
        say(f"warning: --host {cfg.host} without --token: no authentication, whoever reaches the "
            "port can use the policy")  # fmt: skip


def load(cfg):
    """-> policy, method; as `--eval-only` loads it."""
    method, device = method_of(cfg.checkpoint), common.setup(cfg).device
    policy = importlib.import_module(method).load_policy(cfg.checkpoint, device, cfg.robot)
    if cfg.form and method != "dualvla":
        raise UserError(f"--form {cfg.form}: only a run of dualvla is asked in two ways")
    if cfg.form == "reason" and policy.form == "plain":
        raise UserError("--form reason: the expert's stage was not taught to reason")
    if cfg.form:
        policy.form = cfg.form
    if cfg.ensemble and method == "vita_vla":
        raise UserError("--ensemble: a run of vita_vla blends by itself, if it was trained to")
    return policy, method


async def until_asked(server):
    """Serves until Ctrl-C or SIGTERM; once more ends at once."""
    stop, running = asyncio.Event(), asyncio.get_running_loop()

    def ask():
        print("\nstopping after this batch; once more ends at once", file=sys.stderr, flush=True)
        stop.set()
        for number in (signal.SIGINT, signal.SIGTERM):
            running.remove_signal_handler(number)
            signal.signal(number, signal.SIG_DFL)

    for number in (signal.SIGINT, signal.SIGTERM):
        running.add_signal_handler(number, ask)
    await server.run(stop)


def main(argv=None):
    cfg = check(common.parse(Config, {}, {}, argv))
    logging.getLogger("websockets").setLevel(logging.CRITICAL)  # what strangers send is no news

    def say(words):
        print(words, flush=True)

    policy, method = load(cfg)
    server = Server(policy, method, cfg, say)
    about, keys = server.metadata, server.reader.keys
    say(f"{method} {cfg.checkpoint}: {about['action_horizon']} actions of {about['action_dim']} "
        f"numbers; reads {', '.join(keys.images + keys.state)}, {keys.prompt}")  # fmt: skip
    hint(cfg, about, say)
    warn(cfg, say)
    asyncio.run(until_asked(server))


if __name__ == "__main__":
    common.run_main(main)
