"""Recordings -> training samples.

recording -> `Episode` -> window (observation at t, action chunk t..t+H-1, mask of padded steps)
-> normalised sample -> batch. Sample i is a pure function of (seed, i): resuming at any step, or on
any number of processes, reads the samples that one uninterrupted process would have read.
How others keep recordings, and the names of known ones (`SOURCES`): `parts/formats.py`.

    python data.py inspect PATH     what is there, and everything wrong with it
    python data.py cache PATH       decode all pictures once, for training at full speed

Letters: T steps of an episode, H chunk length, A action, S state.
"""

import argparse
import hashlib
import json
import os
import re
import shutil
import sys
import time
from collections import Counter, namedtuple
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from functools import lru_cache, partial
from pathlib import Path

import numpy as np
from tqdm import tqdm

from common import UserError, convert, nearest, run_main
from parts.asked import QuestionFile, Questions, question_sets  # noqa: F401, for the scripts
from parts.formats import (
    GROUPS,
    MEND,
    SOURCES,
    Calvin,
    LeRobot,
    Libero,
    Source,
    Store,
    drafted,
    fingerprint,
    finite,
    flat,
    locate,
    opened,
    parquet_groups,
    parquet_numbers,
    parquet_pictures,
    read_lines,
    reading,
    stopped_by,
    whole,
)
from parts.units import (  # noqa: F401, some for the scripts
    bounds,
    normalise,
    resized,
    scaled,
    shift,
    squeeze,
    summary,
    unnormalise,
)
from worlds import drawing, loop, pictures

CACHE = Path(os.environ.get("ONEFILE_VLA_CACHE", Path.home() / ".cache" / "onefile-vla"))


@dataclass
class Episode:
    """One demonstration; `reasoning` and `phase` (index of the sub-goal) per step, if recorded."""

    images: dict[str, np.ndarray]  # camera -> (T, height, width, 3) uint8
    state: np.ndarray  # (T, S) float32
    action: np.ndarray  # (T, A) float32
    instruction: str
    fps: float = 5.0
    reasoning: list[str] = field(default_factory=list)
    phase: list[int] = field(default_factory=list)
    task: str = ""  # the world's name for what is demonstrated
    failed: list[str] = field(default_factory=list)  # tasks at which the expert failed before
    number: int = -1  # what a dataset on disk counts it as


# --- A world's own demonstrations -----------------------------------------------------------------


@lru_cache(maxsize=1)
def place(world, size, wrist_size):
    """The world of a name, made once in a process for one recording after the other."""
    World, suite = loop.find(world)
    return World(suite, size, wrist_size)


def record(world, seed, size, wrist_size, noise, tries=20):
    """One successful demonstration of the scripted expert; a failed try is drawn again."""
    world, failed = place(world, size, wrist_size), []
    for attempt in range(tries):
        observation = world.reset(seed * tries + attempt)
        expert = world.expert(seed=seed, noise=noise)
        steps, reasoning, phase = [], [], []
        while not world.success and len(steps) < world.max_steps:
            action = expert.act()
            steps.append((observation, action))
            reasoning.append(expert.reasoning)
            phase.append(expert.phase)
            world.step(action)
            observation = world.observe()
        if world.success:
            break
        failed.append(world.task)
    else:
        raise UserError(f"the expert failed {tries} times at seed {seed}: lower --noise {noise}")
    cameras = steps[0][0]["images"]
    return Episode(
        images={name: np.stack([o["images"][name] for o, _ in steps]) for name in cameras},
        state=np.stack([o["state"] for o, _ in steps]),
        action=np.stack([a for _, a in steps]).astype(np.float32),
        instruction=world.instruction,
        fps=world.fps,
        reasoning=reasoning,
        phase=phase,
        task=world.task,
        failed=failed,
    )


def _record_many(world, seeds, **how):
    return [record(world, seed, **how) for seed in seeds]


def demonstrations(world, episodes=1000, seed=0, size=64, wrist_size=32, noise=0.3):
    """The experts' demonstrations of a `--world`: made on first use, on all cores, then cached."""
    World, suite = loop.find(world)
    makers = [sys.modules[kind.__module__] for kind in World.__mro__[:-1]] + [drawing]
    code = b"".join(Path(module.__file__).read_bytes() for module in makers)
    source = hashlib.sha256(code + world.encode()).hexdigest()[:12]
    name = re.sub(r"[^\w.-]", "-", world)[:80]
    path = CACHE / f"{name}-{episodes}-{seed}-{size}-{wrist_size}-{noise}-{source}.npz"
    temporary = path.with_suffix(f".{os.urandom(4).hex()}.tmp")
    if path.exists():
        try:
            with reading(path):
                return load_demonstrations(path)
        except UserError:
            print(f"{path} is damaged: made anew", flush=True)
    try:  # now, not after the recording
        CACHE.mkdir(parents=True, exist_ok=True)
        temporary.touch()
        temporary.unlink()
    except OSError as error:
        words = f"cannot be written ({error.strerror}); ONEFILE_VLA_CACHE names another folder"
        raise UserError(f"{CACHE}: {words}") from None
    seeds = range(seed * 1_000_000, seed * 1_000_000 + episodes)
    share = 4 if World.slow else 20
    shares = [seeds[i : i + share] for i in range(0, episodes, share)]
    made = []
    print(f"recording {episodes} demonstrations of {world} (once, then cached)", flush=True)
    how = partial(_record_many, world, size=size, wrist_size=wrist_size, noise=noise)
    with ProcessPoolExecutor(max_workers=os.cpu_count()) as pool:
        with tqdm(total=episodes, leave=False, disable=None) as bar:
            for block in pool.map(how, shares):
                made.extend(block)
                bar.update(len(block))
    tqdm.write(f"demonstrations of {world}: {expert_rates(made)}")
    for draft in CACHE.glob(f"*.{8 * '[0-9a-f]'}.tmp"):  # of a run killed while it wrote
        if time.time() - draft.stat().st_mtime > 86400:
            draft.unlink(missing_ok=True)
    try:
        with open(temporary, "wb") as file:
            save_demonstrations(file, made)
        os.replace(temporary, path)
    finally:  # where the disk is full
        temporary.unlink(missing_ok=True)
    return made


def expert_rates(episodes):
    """How often the experts succeeded, in all and in the tasks where they did not always, in words;
    what failed was drawn again."""
    won, lost = Counter(e.task for e in episodes), Counter(t for e in episodes for t in e.failed)
    some = [f"{task} {won[task]} of {won[task] + n}" for task, n in sorted(lost.items())]
    share = won.total() / (won.total() + lost.total())
    return f"the expert succeeded in {share:.1%} of its tries {', '.join(some)}".strip()


def save_demonstrations(file, episodes):
    words = ("instruction", "fps", "reasoning", "task", "failed")
    text = [{name: getattr(e, name) for name in words} for e in episodes]
    cameras = episodes[0].images
    images = {f"image.{c}": np.concatenate([e.images[c] for e in episodes]) for c in cameras}
    np.savez(
        file,
        **images,
        state=np.concatenate([e.state for e in episodes]),
        action=np.concatenate([e.action for e in episodes]),
        phase=np.concatenate([np.asarray(e.phase, np.int16) for e in episodes]),
        length=np.array([len(e.action) for e in episodes]),
        text=np.frombuffer(json.dumps(text).encode(), np.uint8),
    )


def load_demonstrations(path):
    with np.load(path, allow_pickle=False) as file:
        arrays = {name: file[name] for name in file.files}
    text = json.loads(arrays["text"].tobytes())
    lengths = whole(arrays, text)
    ends, episodes = np.cumsum(lengths), []
    for start, end, words in zip(ends - lengths, ends, text):
        images = {n[6:]: a[start:end] for n, a in arrays.items() if n.startswith("image.")}
        state, action = arrays["state"][start:end], arrays["action"][start:end]
        episodes.append(
            Episode(images, state, action, **words, phase=arrays["phase"][start:end].tolist())
        )
    return episodes


# --- A dataset on disk ----------------------------------------------------------------------------


class Episodes:
    """A recorded dataset: `len`, `[i]`, iteration. An Episode is read when it is asked for."""

    def __init__(self, path, source, reader):
        self.path, self.source, self.reader, self.store = path, source, reader, None
        self.names, self.lengths, self.recent, self.faults = reader.names, reader.lengths, {}, []
        if isinstance(reader, Store):
            self.store, self.kept = reader, range(len(reader.names))
            self.source = Source(normalise=reader.normalise)
        self.gripper = self.source.gripper or reader.gripper
        said = (path if path.is_dir() else path.parent) / "reasoning.jsonl"  # a line an episode
        self.reasoning = {}
        with reading(f"{said}, fields episode, reasoning", MEND):
            for row in read_lines(said) if said.exists() else ():
                number, words = int(row["episode"]), row["reasoning"]
                texts = isinstance(words, list) and all(isinstance(w, str) for w in words)
                if number in self.reasoning or not texts:
                    raise ValueError(f"episode {number}: one line, a list of texts")
                self.reasoning[number] = words
            # LeRobot numbers its episodes, others' are counted
            self.numbered = getattr(reader, "numbered", range(len(reader.names)))
            if strange := self.reasoning.keys() - set(self.numbered):
                raise ValueError(f"episode {min(strange)}: there is none of this number")

    def __len__(self):
        return len(self.lengths)

    def __getitem__(self, i):
        if not -len(self) <= i < len(self):
            raise IndexError(i)
        i = int(i) % len(self)
        if i not in self.recent:
            if len(self.recent) >= 1024:  # numbers and places alone, a few kilobytes each
                self.recent.clear()
            self.recent[i] = self.read(i)
        return self.recent[i]

    def read(self, i):
        """Episode i, checked in everything but its pictures."""
        place = self.kept[i] if self.store else i
        number = self.numbered[place]
        said = self.reasoning.get(number, [])
        with reading(self.names[i]):
            frames = self.reader.frames(place)
            if self.lengths[i] < 1:
                raise ValueError("the episode is empty")
            state, action, words = (self.store or self.reader).numbers(i)
        with reading(self.names[i], "--skip-bad leaves the episode out"):
            S, A = self.reader.dims
            state = finite("state", state, (self.lengths[i], S))
            action = np.array(finite("action", action, (self.lengths[i], A)))
            if said and len(said) != self.lengths[i]:
                raise ValueError(f"field reasoning: {len(said)} for {self.lengths[i]} steps")
            absent = [name for name in self.source.cameras if name not in frames]
            if absent or not frames:
                there = ", ".join(frames) or "none"
                raise ValueError(f"no camera {(absent or ['at all'])[0]}; there are {there}")
        if self.gripper in ("+1", "-1") and not self.store:
            action[:, -1] = (1 + float(self.gripper) * action[:, -1]) / 2
        frames = {name: frames[name] for name in self.source.cameras or frames}
        return Episode(frames, state, action, words, self.reader.fps, said, number=number)

    def settle(self, skip_bad=False, every=False, again=False):
        """Reads everything once, keeps the numbers in CACHE; faults stop it, or are left out. What
        was found when `every` picture was tried is what counts from then on."""
        if self.store is None:
            name = self.path.resolve().name
            folder = CACHE / f"{name}-{fingerprint(self.path, self.source)}"
            deep = folder.with_name(f"{folder.name}-deep")
            every = every or deep.exists()
            folder = deep if every else folder
            try:
                known = None if again else Store(folder)
            except UserError:  # there is none yet, or the machine went down with it half on disk
                known = None
            if known is None or (known.faults and not skip_bad and not every):
                write_store(self, folder, every=every)
            self.store = Store(folder)
            self.kept, self.names = self.store.kept, self.store.names
            self.lengths, self.faults, self.recent = self.store.lengths, self.store.faults, {}
        if (self.faults and not skip_bad) or not self.names:
            raise stopped_by(self.faults, self.path)
        return self.store


def write_store(episodes, folder, pictures=False, side=0, every=False, skip_bad=True):
    """All numbers of a dataset in flat files, `pictures` too; otherwise each episode's first and
    last picture is tried, or `every` one. What cannot be read is listed and left out or ends it."""
    with drafted(folder) as draft:
        fill_store(draft, episodes, pictures, side, every, skip_bad)


def fill_store(folder, episodes, pictures, side, every, skip_bad):
    reader, fresh = episodes.reader, Episodes(episodes.path, episodes.source, episodes.reader)
    index = {"names": [], "kept": [], "text": [], "lengths": [], "sizes": {}}
    index |= {"faults": list(reader.faults), "fps": reader.fps, "dims": reader.dims}
    for kept in (opened, parquet_numbers, parquet_pictures, parquet_groups):
        kept.cache_clear()  # the files may have been mended since they were last read
    words = f"reading {episodes.path.name} (once)"
    for i in tqdm(range(len(fresh)), words, leave=False, disable=None):
        try:
            episode, arrays = fresh.read(i), {}
            for camera, frames in episode.images.items():
                which = range(len(frames)) if pictures or every else sorted({0, len(frames) - 1})
                with reading(f"{fresh.names[i]}, camera {camera}"):
                    for t in which:
                        image = resized(frames[t], side)
                        if not pictures:  # it was tried, that is all
                            continue
                        size = index["sizes"].setdefault(camera, image.shape)
                        if image.shape != size:
                            raise ValueError(f"not {size} as before: --size makes all of one size")
                        arrays.setdefault(camera, []).append(image)
        except UserError as fault:
            index["faults"].append(str(fault))
            if not skip_bad:
                break
            continue
        if pictures and not index["kept"]:
            needed = sum(reader.lengths) * sum(array[0].nbytes for array in arrays.values())
            if needed > shutil.disk_usage(folder).free:
                raise UserError(f"the store needs {needed / 1e9:.1f} GB, more than is free: --size")
        arrays |= {"state": episode.state, "action": episode.action}
        for name, array in arrays.items():
            with open(folder / name, "ab") as file:
                file.writelines(row.tobytes() for row in array)
        if pictures and episode.reasoning:
            said = {"episode": len(index["kept"]), "reasoning": episode.reasoning}
            with open(folder / "reasoning.jsonl", "a", encoding="utf-8") as file:
                file.write(json.dumps(said) + "\n")
        row = fresh.names[i], i, episode.instruction, len(episode.action)
        for name, value in zip(("names", "kept", "text", "lengths"), row):
            index[name].append(value)
    if (index["faults"] and not skip_bad) or (pictures and not index["kept"]):
        raise stopped_by(index["faults"], episodes.path)
    stats, T = {}, sum(index["lengths"])
    for kind, width in zip(("state", "action"), reader.dims):
        (folder / kind).touch()  # that nothing whole is left is worth remembering as well
        stats[kind] = summary(flat(folder / kind, "f4", (T, width))) if T else {}
    index |= {"stats": stats, "normalise": episodes.source.normalise}
    index |= {"gripper": "1" if episodes.gripper else ""}
    (folder / "index.json").write_text(json.dumps(index))


def open_episodes(spec, skip_bad=False, every=None, again=False):
    """A row of SOURCES, a hub id, a path, or a world -> a sequence of Episode, or of
    questions. skip_bad: what cannot be read is left out and listed in `.faults`; for that all is
    read once, `every` picture too (unless it is False), `again` even if it was before."""
    every = skip_bad if every is None else every
    if str(spec).partition(":")[0] in loop.WORLDS:
        return demonstrations(str(spec))
    path, source = locate(str(spec))
    if path.suffix in (".json", ".jsonl", ".tsv"):
        return QuestionFile(path, CACHE, skip_bad, every, again)
    if path.suffix == ".npz":
        with reading(path, MEND):
            return load_demonstrations(path)
    marks = (("index.json", Store), ("meta/info.json", LeRobot), ("ep_start_end_ids.npy", Calvin),
             ("training/ep_start_end_ids.npy", Calvin))  # fmt: skip
    found = (Reader for mark, Reader in marks if (path / mark).exists())
    Reader = next(found, None) or (Libero if Libero.files(path) else None)
    if Reader is None:
        words = "LeRobot: meta/info.json, CALVIN: ep_start_end_ids.npy, .hdf5, .json, .jsonl, .tsv"
        raise UserError(f"{path}: no dataset is recognised here ({words})")
    episodes = Episodes(path, source, Reader(path, source))
    if skip_bad or episodes.reader.faults:
        episodes.settle(skip_bad, every, again)
    return episodes


Part = namedtuple("Part", "name episodes stats weight normalise")


def there(word):
    return bool(word) and Path(word).expanduser().exists()


def named(spec):
    """`bridge,fractal=2,my/folder` -> {what it names: weight}; what is nowhere is an error."""
    words, wanted = [], {}
    for word in [spec] if there(spec) else filter(None, spec.split(",")):
        if words and loop.known(f"{words[-1]},{word.partition('=')[0]}"):
            words[-1] += f",{word}"  # a world's suite may be a list itself
        else:
            words.append(word)
    for word in words:
        name, _, weight = (word, "", "") if there(word) else word.partition("=")
        weight = convert(f"--data {word}:", weight or "1", float, ())
        if not 0 < weight < np.inf:
            raise UserError(f"--data {word}: a weight is above 0")
        for member, share in GROUPS.get(name, {name: 1.0}).items():
            wanted[member] = weight * share
            if member.partition(":")[0] not in loop.WORLDS:
                locate(member)
    return wanted


def load(spec, skip_bad=False, demonstrate=demonstrations):
    """`bridge,fractal=2,my/folder`: rows, groups or paths, with weights -> list of Part, each read
    through once; the stats of a question file are None. demonstrate: world -> its Episodes."""
    parts = []
    for name, weight in named(spec).items():
        own = name.partition(":")[0] in loop.WORLDS
        episodes = demonstrate(name) if own else open_episodes(name, skip_bad)
        stats = None if isinstance(episodes, QuestionFile) else statistics(episodes)
        how = episodes.source.normalise if isinstance(episodes, Episodes) else "q99"
        parts.append(Part(name, episodes, stats, weight, how))
    widths = {p.name: len(p.stats["action"]["q01"]) for p in parts if p.stats}
    if len(set(widths.values())) > 1:
        raise UserError(f"--data: actions of different widths cannot be mixed: {widths}")
    return parts


def recordings(cfg, dist, resumed=None):
    """What --data names, or else the world's demonstrations -> parts to act like, parts to answer
    like. Their stats, the checkpoint's if there is one, are as wide as the widest robot's and tell
    "how" to normalise, "cameras", "fps", "gripper". Rank 0 reads; its error is everybody's."""

    def demonstrate(world):
        return demonstrations(world, cfg.demos, cfg.seed, cfg.size, cfg.wrist_size, cfg.noise)

    if not cfg.data and cfg.world == "none":
        raise UserError("--world none acts nowhere and demonstrates nothing: add --data")
    parts = dist.first(lambda: load(cfg.data or cfg.world, cfg.skip_bad, demonstrate))
    faults = [fault for p in parts for fault in getattr(p.episodes, "faults", ())]
    if faults and dist.main:
        tqdm.write("\n".join(f"left out: {f}" for f in faults) + f"\n{len(faults)} faults left out")
    acts, asks = ([p for p in parts if bool(p.stats) == act] for act in (True, False))
    if not acts:
        raise UserError(f"--data {cfg.data}: no recordings of a robot, name some as well")
    S = max(len(p.stats["state"]["q01"]) for p in acts)
    for i, part in enumerate(acts):
        stats = {
            kind: {name: v + [0.0] * (kind == "state") * (S - len(v)) for name, v in s.items()}
            | {"how": part.normalise if cfg.normalise == "auto" else cfg.normalise}
            for kind, s in part.stats.items()
        }
        first, unit = part.episodes[0], getattr(part.episodes, "gripper", "") and "unit"
        stats |= {"cameras": list(first.images), "fps": first.fps, "gripper": unit}
        stats |= {"episodes": len(part.episodes), "steps": sum(lengths(part.episodes))}
        known = resumed.meta["robots"].get(part.name, stats) if resumed else stats
        for what in ("episodes", "steps") if resumed and resumed.train_state else ():
            if known.get(what, stats[what]) != stats[what]:  # other samples would follow
                words = f"{stats[what]} {what} now, {known[what]} when the run began"
                raise UserError(f"--resume {resumed.path}: {part.name} has {words}")
        acts[i] = part._replace(stats=known)
    return acts, asks


def acting(robots, name):
    """{recordings: stats} -> the robot's name and the stats to act by: --robot's, or the first."""
    if name and name not in robots:
        near = nearest(name, list(robots))
        raise UserError(f"--robot {name} was not trained on: did you mean {near}?")
    name = name or next(iter(robots))
    return robot_name(name), robots[name]


def robot_name(recordings):
    """What a prompt calls the robot of these recordings: bridge, tabletop, a folder's name."""
    return Path(os.path.abspath(recordings)).name.partition(":")[0]


def dims(robots):
    """{recordings: stats} -> how many numbers a state and an action have."""
    stats = next(iter(robots.values()))
    return len(stats["state"]["q01"]), len(stats["action"]["q01"])


def statistics(episodes):
    """Over all steps, for each dimension of state and action: q01, q99, min, max as lists."""
    if isinstance(episodes, Episodes):
        return episodes.settle(bool(episodes.faults)).stats
    keys = ("state", "action")
    return {k: summary(np.concatenate([getattr(e, k) for e in episodes])) for k in keys}


# --- Windows and mixtures -------------------------------------------------------------------------


def lengths(episodes):
    recorded = isinstance(episodes, Episodes)  # known without reading them
    return episodes.lengths if recorded else [len(e.action) for e in episodes]


class Windows:
    """Every step of every episode as a training sample."""

    def __init__(self, episodes, stats, horizon, augment=0, sides=(0, 0), robot="tabletop"):
        """sides: of the first camera's pictures and the others' (0: as recorded)."""
        self.episodes, self.horizon = episodes, horizon
        self.bounds = {kind: bounds(stats[kind]) for kind in ("state", "action")}
        self.augment, self.sides, self.robot = augment, sides, robot
        self.starts = np.cumsum([0, *lengths(episodes)])

    def __len__(self):
        return int(self.starts[-1])

    def chunks(self, every=1):
        """Every `every`-th normalised action chunk -> list of (H, A)."""
        return [self.chunk(*self.find(i))[0] for i in range(0, len(self), every)]

    def find(self, index):
        """-> the episode, the step in it."""
        e = int(np.searchsorted(self.starts, index, side="right")) - 1
        return self.episodes[e], index - int(self.starts[e])

    def chunk(self, episode, t):
        """-> the normalised actions from step t on (H, A), whether each is inside (H,)."""
        steps = np.arange(t, t + self.horizon)
        action = episode.action[np.minimum(steps, len(episode.action) - 1)]
        return squeeze(action, *self.bounds["action"]), steps < len(episode.action)

    def get(self, index, rng):
        """-> "images", "instruction", "robot", "state" (S,), "action" (H, A), "mask" (H,)."""
        episode, t = self.find(index)
        action, inside = self.chunk(episode, t)
        images = scaled([frames[t] for frames in episode.images.values()], self.sides)
        if self.augment:
            moves = rng.integers(-self.augment, self.augment + 1, (len(images), 2))
            images = [shift(i, *(m * len(i) / 64).astype(int)) for i, m in zip(images, moves)]
        return {
            "images": images,
            "instruction": episode.instruction,
            "robot": self.robot,
            "state": squeeze(episode.state[t], *self.bounds["state"]),  # (S,)
            "action": action,
            "mask": inside,
        }


class Mixture:
    """Draws sample i, a part by weight, then one of its windows, from (seed, i) alone."""

    def __init__(self, parts, weights=None, seed=0):
        weights = np.array(weights if weights else [len(p) for p in parts], np.float64)
        if not all(map(len, parts)):
            raise UserError("--data: a part of it has no episode long enough to learn from")
        self.parts, self.share, self.seed = parts, np.cumsum(weights / weights.sum()), seed

    def __getitem__(self, i):
        rng = np.random.default_rng([self.seed, i])
        which = min(int(np.searchsorted(self.share, rng.random(), "right")), len(self.parts) - 1)
        part = self.parts[which]
        return part.get(int(rng.integers(len(part))), rng)


class Batches:
    """Item `step` is this process's batch of that step: `batch` samples from the first mixture and,
    for `mix` of them or for all if that is fewer, one from the second. Which one follows from how
    many came before, so that each is read once, however many processes share a step."""

    def __init__(self, mixtures, collate, batch, rank=0, processes=1, mix=1):
        self.mixtures, self.collate, self.batch = mixtures, collate, batch
        self.rank, self.processes, self.mix = rank, processes, min(mix, batch)

    def __getitem__(self, step):
        first, samples = (step * self.processes + self.rank) * self.batch, []
        for mixture, n in zip(self.mixtures, (1, self.mix)):
            samples += [mixture[i] for i in range(first // n, (first + self.batch) // n)]
        return self.collate(samples)


# --- What is there, and everything wrong with it --------------------------------------------------


def warnings(part):
    """What no format forbids and most mistakes look like -> lines."""
    lines, stats = [], part.stats["action"]
    for kind, s in part.stats.items():
        still = [str(d) for d in np.flatnonzero(np.subtract(s["max"], s["min"]) < 1e-6)]
        lines += [f"{kind} {', '.join(still)}: never changes"] if still else []
    low, high = bounds(stats | {"how": part.normalise})
    actions = np.concatenate([e.action for e in part.episodes])
    clipped = ((actions < low) | (actions > high)).mean(0)
    far = np.maximum(stats["max"] - high, low - stats["min"]) / (high - low)
    for d in np.flatnonzero((clipped > 0.03) | (far > 4)):
        words = f"action {d}: {clipped[d]:.1%} clipped, at most {far[d]:.1f} ranges outside"
        lines.append(words)
    if stats["min"][-1] < -0.5:
        lines.append("gripper: not 0 to 1; if the last is one, a row of SOURCES names its sign")
    elif (start := np.mean([e.action[0, -1] for e in part.episodes])) < 0.3:
        lines.append(f"gripper: {start:.2f} at the start (1 is open): perhaps the other sign")
    silent = sum(not e.instruction for e in part.episodes)
    return lines + ([f"{silent} episodes have no instruction"] if silent else [])


def describe(name, episodes):
    """Prints counts, lengths, instructions, ranges and warnings."""
    recorded = isinstance(episodes, Episodes)
    kind = type(episodes.reader).__name__ if recorded else "world"
    how = episodes.source.normalise if recorded else "q99"
    part = Part(name, episodes, statistics(episodes), 1.0, how)
    T, first = [len(e.action) for e in episodes], episodes[0]
    print(f"{kind}: {len(T)} episodes of {min(T)} to {max(T)} steps, {sum(T)} in all")
    if first.task:
        print(expert_rates(episodes))
    for camera, frames in first.images.items():
        print(f"camera {camera}: {frames[0].shape[1]} x {frames[0].shape[0]}")
    words = sorted({e.instruction for e in episodes})
    print(f"{len(words)} instructions: " + "; ".join(words[:5] + ["..."] * (len(words) > 5)))
    print(f"{'':12}      min       q01       q99       max")
    for kind, s in part.stats.items():
        for d, row in enumerate(zip(s["min"], s["q01"], s["q99"], s["max"])):
            print(f"{kind + ' ' + str(d):12}" + "".join(f"{v:9.4f} " for v in row))
    for line in warnings(part):
        print(f"warning: {line}")


def pick(episodes, i):
    """A row of the contact sheet: a question, or the start, middle and end of an episode."""
    if isinstance(episodes, QuestionFile):
        sample = episodes.get(i)
        return sample["images"], f"{sample['question']}\n{sample['answer']}"
    cameras, places = episodes[i].images.values(), (0, 0.5, 1)
    return [f[int(p * (len(f) - 1))] for p in places for f in cameras], episodes[i].instruction


def inspect(spec, sheet, quick=False):
    """Prints what was recognised, draws a contact sheet, lists every fault."""
    rows, episodes = [], []
    try:
        episodes = open_episodes(spec, True, not quick, again=True)
        faults = list(getattr(episodes, "faults", ()))
    except UserError as error:  # perhaps because nothing whole is left
        if not (faults := getattr(error, "faults", None)):
            raise
    if isinstance(episodes, QuestionFile):
        print(f"{episodes.path.suffix[1:]}: {len(episodes)} questions")
    elif episodes:
        describe(spec, episodes)
    for i in np.unique(np.linspace(0, len(episodes) - 1, 5).astype(int)) if episodes else ():
        try:
            rows.append(pick(episodes, i))
        except UserError as fault:
            faults.append(str(fault))
    if rows:
        pictures.contact_sheet(sheet, rows, max(1, 128 // len(rows[0][0][0])))
        print(f"contact sheet: {sheet}")
    for fault in faults:
        print(f"fault: {fault}")
    if faults:
        raise UserError(f"{spec}: {len(faults)} faults")


def main(argv=None):
    parser = argparse.ArgumentParser(prog="data.py", description="Recorded datasets.")
    verbs = parser.add_subparsers(dest="verb", required=True)
    look = verbs.add_parser("inspect", help="what is there, and everything wrong with it")
    keep = verbs.add_parser("cache", help="all pictures decoded once, for training at full speed")
    for verb in (look, keep):
        verb.add_argument("path", help="folder, file, hub id, or one of " + ", ".join(SOURCES))
    look.add_argument("--sheet", default="contact_sheet.png", help="where the picture goes")
    look.add_argument("--quick", action="store_true", help="decode an episode's ends only")
    keep.add_argument("--out", help="the folder to write, then used as --data [NAME-frames]")
    keep.add_argument("--size", type=int, default=0, help="resize to this side [0: as recorded]")
    keep.add_argument("--skip-bad", action="store_true", help="leave out what cannot be read")
    args = parser.parse_args(argv)
    if args.verb == "inspect":
        if Path(args.sheet).suffix.lower() not in (".png", ".jpg", ".webp"):
            raise UserError(f"--sheet {args.sheet}: a .png, .jpg or .webp")
        return inspect(args.path, args.sheet, args.quick)
    episodes = open_episodes(args.path, args.skip_bad, every=False)
    if not isinstance(episodes, Episodes):
        raise UserError(f"{args.path}: its pictures are not in files that need decoding")
    folder = Path(args.out or f"{episodes.path.name}-frames")
    if folder.exists():
        raise UserError(f"{folder} exists: name another with --out")
    write_store(episodes, folder, True, args.size, skip_bad=args.skip_bad)
    kept = Store(folder)
    print(*(f"left out: {fault}\n" for fault in kept.faults), sep="", end="")
    print(f"{len(kept.names)} episodes, {sum(kept.lengths)} steps in {folder}: --data {folder}")


if __name__ == "__main__":
    run_main(main)
