"""Recordings -> training samples.

recording -> `Episode` -> window (observation at t, action chunk t..t+H-1, mask of padded steps)
-> normalised sample -> batch. Sample i is a pure function of (seed, i): resuming at any step, or on
any number of processes, reads the samples that one uninterrupted process would have read.

Letters: T steps of an episode, H chunk length, A action, S state.
"""

import hashlib
import json
import os
import random
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from tqdm import tqdm

from worlds import questions, tabletop

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


# --- The tabletop's own demonstrations ------------------------------------------------------------


def record(suite, seed, size, wrist_size, noise, tries=20):
    """One successful demonstration of the scripted expert; a failed try is drawn again."""
    for attempt in range(tries):
        world = tabletop.Tabletop(suite, size, wrist_size)
        observation = world.reset(seed * tries + attempt)
        expert = tabletop.Expert(world, seed=seed, noise=noise)
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
    else:
        raise RuntimeError(f"suite {suite}: the expert failed {tries} times at seed {seed}")
    cameras = steps[0][0]["images"]
    return Episode(
        images={name: np.stack([o["images"][name] for o, _ in steps]) for name in cameras},
        state=np.stack([o["state"] for o, _ in steps]),
        action=np.stack([a for _, a in steps]).astype(np.float32),
        instruction=world.instruction,
        reasoning=reasoning,
        phase=phase,
    )


def _record_many(arguments):
    suite, seeds, size, wrist_size, noise = arguments
    return [record(suite, seed, size, wrist_size, noise) for seed in seeds]


def demonstrations(suite, episodes=1000, seed=0, size=64, wrist_size=32, noise=0.3):
    """The expert's demonstrations of a suite: made on first use, on all cores, then cached."""
    source = hashlib.sha256(Path(tabletop.__file__).read_bytes()).hexdigest()[:12]
    name = f"tabletop-{suite}-{episodes}-{seed}-{size}-{wrist_size}-{noise}-{source}.npz"
    path = CACHE / name
    if path.exists():
        return load_demonstrations(path)
    seeds = range(seed * 1_000_000, seed * 1_000_000 + episodes)
    blocks = [seeds[i : i + 20] for i in range(0, episodes, 20)]
    jobs = [(suite, list(block), size, wrist_size, noise) for block in blocks]
    made = []
    with ProcessPoolExecutor(max_workers=os.cpu_count()) as pool:
        words = f"demonstrations of tabletop:{suite} (once, then cached)"
        done = pool.map(_record_many, jobs)
        for block in tqdm(done, words, len(jobs), leave=False, disable=None):
            made.extend(block)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(f".{os.getpid()}.tmp")
    with open(temporary, "wb") as file:
        save_demonstrations(file, made)
    os.replace(temporary, path)
    return made


def save_demonstrations(file, episodes):
    text = [dict(instruction=e.instruction, fps=e.fps, reasoning=e.reasoning) for e in episodes]
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
    ends = np.cumsum(arrays["length"])
    episodes = []
    for start, end, words in zip(ends - arrays["length"], ends, text):
        images = {n[6:]: a[start:end] for n, a in arrays.items() if n.startswith("image.")}
        state, action = arrays["state"][start:end], arrays["action"][start:end]
        episodes.append(
            Episode(images, state, action, **words, phase=arrays["phase"][start:end].tolist())
        )
    return episodes


# --- Normalisation --------------------------------------------------------------------------------


def statistics(episodes):
    """Over all steps, for each dimension of state and action: q01, q99, min, max as lists."""
    out = {}
    for key in ("state", "action"):
        x = np.concatenate([getattr(e, key) for e in episodes]).astype(np.float64)
        q01, q99 = np.quantile(x, [0.01, 0.99], axis=0)
        out[key] = {"q01": q01, "q99": q99, "min": x.min(0), "max": x.max(0)}
    return {k: {n: [float(v) for v in a] for n, a in d.items()} for k, d in out.items()}


def bounds(stats, how):
    """how: q99 | minmax -> (low, high) float32; one to either side of what never moves."""
    low, high = ("q01", "q99") if how == "q99" else ("min", "max")
    low, high = np.array(stats[low], np.float32), np.array(stats[high], np.float32)
    still = high - low < 1e-6
    return np.where(still, low - 1, low), np.where(still, high + 1, high)


def normalise(x, stats, how="q99", clip=1.0):
    """(..., A) in the recording's units -> [-1, 1] between the bounds, clipped at +-clip."""
    low, high = bounds(stats, how)
    return np.clip(2 * (x - low) / (high - low) - 1, -clip, clip).astype(np.float32)


def unnormalise(x, stats, how="q99"):
    """The inverse of `normalise` inside the bounds."""
    low, high = bounds(stats, how)
    return (np.asarray(x) + 1) / 2 * (high - low) + low


# --- Windows and mixtures -------------------------------------------------------------------------


def shift(image, dx, dy):
    """The picture (height, width, 3) moved by whole pixels, its edge repeated."""
    height, width = image.shape[:2]
    rows = np.clip(np.arange(height) + dy, 0, height - 1)
    columns = np.clip(np.arange(width) + dx, 0, width - 1)
    return image[rows][:, columns]


class Windows:
    """Every step of every episode as a training sample."""

    def __init__(self, episodes, stats, horizon, how="q99", augment=0):
        self.episodes, self.stats, self.horizon = episodes, stats, horizon
        self.how, self.augment = how, augment
        self.starts = np.cumsum([0] + [len(e.action) for e in episodes])

    def __len__(self):
        return int(self.starts[-1])

    def chunks(self, every=1):
        """Every `every`-th normalised action chunk -> list of (H, A)."""
        rng = np.random.default_rng(0)
        return [self.get(i, rng)["action"] for i in range(0, len(self), every)]

    def get(self, index, rng):
        """-> "images", "instruction", "state" (S,), "action" (H, A), "mask" (H,) of one step."""
        e = int(np.searchsorted(self.starts, index, side="right")) - 1
        t = index - int(self.starts[e])
        episode = self.episodes[e]
        steps = np.arange(t, t + self.horizon)
        inside = steps < len(episode.action)  # (H,)
        action = episode.action[np.minimum(steps, len(episode.action) - 1)]
        images = [frames[t] for frames in episode.images.values()]
        if self.augment:
            moves = rng.integers(-self.augment, self.augment + 1, (len(images), 2))
            images = [shift(i, *(m * len(i) / 64).astype(int)) for i, m in zip(images, moves)]
        return {
            "images": images,
            "instruction": episode.instruction,
            "state": normalise(episode.state[t], self.stats["state"], self.how),
            "action": normalise(action, self.stats["action"], self.how),  # (H, A)
            "mask": inside,
        }


def question_sets(names, count, size=64, wrist_size=32):
    """The world's question sets in the forms of published benchmarks -> {name: [sample]}."""
    return {
        name: [
            {"images": list(images.values()), "question": question, "answer": answer}
            for images, question, answer, _ in questions.benchmark(name, count, 0, size, wrist_size)
        ]
        for name in names
    }


class Questions:
    """Questions about tabletop scenes, an endless supply: sample i is drawn from its own seed."""

    def __init__(self, size=64, wrist_size=32, seed=0):
        self.world, self.seed = tabletop.Tabletop("bridge", size, wrist_size), seed

    def __len__(self):
        return 10_000_000

    def get(self, index, rng):
        question = None
        while question is None:  # a scene does not allow every kind of question
            observation = self.world.scatter(self.seed * len(self) + index)
            question = questions.ask(self.world, random.Random(int(rng.integers(2**31))))
        return {
            "images": list(observation["images"].values()),
            "question": question.question,
            "answer": question.answer,
        }


class Mixture:
    """Draws sample i, a part by weight, then one of its windows, from (seed, i) alone."""

    def __init__(self, parts, weights=None, seed=0):
        weights = np.array(weights if weights else [len(p) for p in parts], np.float64)
        self.parts, self.share, self.seed = parts, np.cumsum(weights / weights.sum()), seed

    def __getitem__(self, i):
        rng = np.random.default_rng([self.seed, i])
        which = min(int(np.searchsorted(self.share, rng.random(), "right")), len(self.parts) - 1)
        part = self.parts[which]
        return part.get(int(rng.integers(len(part))), rng)


class Batches:
    """Item `step` is this process's batch of that step, `batch` samples from each mixture."""

    def __init__(self, mixtures, collate, batch, rank=0, processes=1):
        self.mixtures, self.collate, self.batch = mixtures, collate, batch
        self.rank, self.processes = rank, processes

    def __getitem__(self, step):
        first = (step * self.processes + self.rank) * self.batch
        return self.collate([m[i] for m in self.mixtures for i in range(first, first + self.batch)])
