"""Recordings -> training samples.

recording -> `Episode` -> window (observation at t, action chunk t..t+H-1, mask of padded steps)
-> normalised sample -> batch. Sample i is a pure function of (seed, i): resuming at any step, or on
any number of processes, reads the samples that one uninterrupted process would have read.

    python data.py inspect PATH     what is there, and everything wrong with it
    python data.py cache PATH       decode all pictures once, for training at full speed

Letters: T steps of an episode, H chunk length, A action, S state.
"""

import argparse
import base64
import csv
import hashlib
import importlib
import io
import json
import os
import pickle
import random
import re
import shutil
from collections import Counter, namedtuple
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import lru_cache, partial
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

from common import UserError, nearest, run_main
from worlds import loop, pictures, questions, tabletop

CACHE = Path(os.environ.get("ONEFILE_VLA_CACHE", Path.home() / ".cache" / "onefile-vla"))
DATA = Path(os.environ.get("ONEFILE_VLA_DATA", Path.home() / ".cache" / "onefile-vla" / "data"))


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
        raise RuntimeError(f"the expert failed {tries} times at seed {seed}: {', '.join(failed)}")
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


def _record_many(arguments):
    world, seeds, *how = arguments
    return [record(world, seed, *how) for seed in seeds]


def demonstrations(world, episodes=1000, seed=0, size=64, wrist_size=32, noise=0.3):
    """The experts' demonstrations of a `--world`: made on first use, on all cores, then cached."""
    World, suite = loop.find(world)
    code = Path(importlib.import_module(World.__module__).__file__).read_bytes()
    source = hashlib.sha256(code + world.encode()).hexdigest()[:12]
    name = re.sub(r"[^\w.-]", "-", world)[:80]
    path = CACHE / f"{name}-{episodes}-{seed}-{size}-{wrist_size}-{noise}-{source}.npz"
    if path.exists():
        return load_demonstrations(path)
    seeds = range(seed * 1_000_000, seed * 1_000_000 + episodes)
    share = 4 if World.slow else 20
    blocks = [list(seeds[i : i + share]) for i in range(0, episodes, share)]
    jobs = [(world, block, size, wrist_size, noise) for block in blocks]
    made, words = [], f"demonstrations of {world} (once, then cached)"
    with ProcessPoolExecutor(max_workers=os.cpu_count()) as pool:
        with tqdm(None, words, episodes, leave=False, disable=None) as bar:
            for block in pool.map(_record_many, jobs):
                made.extend(block)
                bar.update(len(block))
    tqdm.write(f"demonstrations of {world}: {expert_rates(made)}")
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(f".{os.getpid()}.tmp")
    with open(temporary, "wb") as file:
        save_demonstrations(file, made)
    os.replace(temporary, path)
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
    ends = np.cumsum(arrays["length"])
    episodes = []
    for start, end, words in zip(ends - arrays["length"], ends, text):
        images = {n[6:]: a[start:end] for n, a in arrays.items() if n.startswith("image.")}
        state, action = arrays["state"][start:end], arrays["action"][start:end]
        episodes.append(
            Episode(images, state, action, **words, phase=arrays["phase"][start:end].tolist())
        )
    return episodes


# --- Names ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Source:
    """Where a dataset is found and how it is read; one's own dataset is one more row of SOURCES."""

    hub: str = ""  # hub id, then the folder inside it if it holds several; or an address
    cameras: tuple[str, ...] = ()  # which, in this order; empty: all that were recorded
    action: str = ""  # what its numbers mean
    normalise: str = "q99"
    gripper: str = ""  # how the last number says open: 1 (else 0), +1 or -1; read as 1, closed 0
    parts: tuple[str, ...] = ()  # these slices of state and action, named in meta/modality.json
    scenes: tuple[str, ...] = ()  # CALVIN: these scenes only


EEF = "change of xyz and roll, pitch, yaw of the hand; gripper"
OXE = """bridge_orig image_0 25460, fractal20220817_data image 79499, bc_z image 39350,
droid exterior_image_1_left 92233, stanford_hydra_dataset image 550, viola agentview_rgb 135,
berkeley_autolab_ur5 image 896, nyu_franka_play_dataset image 456, jaco_play image 976,
stanford_kuka_multimodal_dataset image 3000, taco_play rgb_static 3242, cmu_stretch image 135,
nyu_door_opening_surprising_effectiveness image 435, austin_buds_dataset image 50,
iamlab_cmu_pickup_insert image 520, berkeley_fanuc_manipulation image 415, dobbe wrist_image 5208,
ucsd_kitchen_dataset image 150, utaustin_mutex image 1500, cmu_play_fusion image 576"""
OXE = {n: (c, int(k)) for n, c, k in map(str.split, OXE.split(","))}  # Table 7: camera, episodes
GR1 = [f"PnP{way}Close" for way in (
    "BottleToCabinet", "CanToDrawer", "CupToDrawer", "MilkToMicrowave", "PotatoToMicrowave",
    "WineToCabinet")] + [f"PosttrainPnPNovelFrom{start}To{end}SplitA" for start, ends in (
    ("Cuttingboard", "Basket Cardboardbox Pan Pot Tieredbasket"),
    ("Placemat", "Basket Bowl Plate Tieredshelf"), ("Plate", "Bowl Cardboardbox Pan Plate"),
    ("Tray", "Cardboardbox Plate Pot Tieredbasket Tieredshelf"),
    ) for end in ends.split()]  # fmt: skip
GR1_HUB = "nvidia/PhysicalAI-Robotics-GR00T-X-Embodiment-Sim/gr1_unified."
GR1_ENDING = "_GR1ArmsAndWaistFourierHands_1000"
ARMS = ("left_arm", "right_arm", "left_hand", "right_hand", "waist")  # 7 + 7 + 6 + 6 + 3
LIBERO = ("libero_spatial", "libero_object", "libero_goal", "libero_10")
IPEC = "IPEC-COMMUNITY/{}_lerobot"
SOURCES = {
    **{n: Source(IPEC.format(n), (c,), EEF, gripper="1") for n, (c, _) in OXE.items()},
    "stanford_kuka_multimodal_dataset": Source(
        "lerobot/stanford_kuka_multimodal_dataset", ("image",), EEF),
    **{n: Source(IPEC.format(n + "_no_noops_1.0.0"), ("image", "wrist_image"), EEF, "minmax", "1")
       for n in LIBERO},
    **{f"gr1_{n}": Source(GR1_HUB + n + GR1_ENDING, ("ego_view",), "positions of the joints",
                          "minmax", parts=ARMS) for n in GR1},
    **{f"calvin_{n.lower()}": Source(
        f"http://calvin.cs.uni-freiburg.de/dataset/task_{n}.zip", ("rgb_static", "rgb_gripper"),
        EEF, "minmax", "+1") for n in ("D_D", "ABC_D", "ABCD_D")},
}  # fmt: skip
SOURCES |= {"bridge": SOURCES["bridge_orig"], "fractal": SOURCES["fractal20220817_data"]}
GROUPS = {  # name -> {row of SOURCES: weight}
    "oxe": {name: float(episodes) for name, (_, episodes) in OXE.items()},
    "libero": dict.fromkeys(LIBERO, 1.0),
    "gr1": {f"gr1_{name}": 1.0 for name in GR1},
}


def locate(spec):
    """A row of SOURCES, a hub id or a path -> (path on this disk, its row)."""
    source, path = SOURCES.get(spec), Path(spec).expanduser()
    if source is None and path.exists():
        rows = reversed(SOURCES.values())  # the first of a name wins
        known = {row.hub.rpartition("/")[2].removesuffix(".zip"): row for row in rows}
        mine = [known[p.name] for p in (path.resolve(), path.resolve().parent) if p.name in known]
        return path, (mine + [Source()])[0]
    if source is None and not re.fullmatch(r"[\w.-]+/[\w.-]+", spec):
        names = [*SOURCES, *GROUPS, *loop.WORLDS]
        raise UserError(f"no dataset or path {spec!r} (did you mean {nearest(spec, names)}?)")
    source = source or next((s for s in SOURCES.values() if s.hub == spec), Source(spec))
    if source.hub.startswith("http"):
        place = DATA / source.hub.rpartition("/")[2].removesuffix(".zip")
        command = f"wget {source.hub} and unzip it there"
    else:
        owner, name, *inside = source.hub.split("/")
        place = DATA.joinpath(name, *inside)
        only = f" --include '{inside[0]}/*'" if inside else ""
        command = f"hf download {owner}/{name} --repo-type dataset{only} --local-dir {DATA / name}"
    if not place.exists():
        here = f"{spec}: not at {place} (ONEFILE_VLA_DATA names the folder) nor a path here"
        raise UserError(f"{here}; to fetch it: {command}")
    return place, source


# --- Reading with care ----------------------------------------------------------------------------


def need(module):
    """The module, or how to install it."""
    try:
        return importlib.import_module(module)
    except ImportError:
        name = module.partition(".")[0]
        raise UserError(f"reading this needs {name}: pip install 'onefile-vla[data]'") from None


@contextmanager
def reading(place):
    """Whatever fails inside becomes one line with the place and the remedy."""
    try:
        yield
    except (UserError, MemoryError):
        raise
    except Exception as error:  # six libraries' worth of kinds, all of them a damaged file
        missing = isinstance(error, FileNotFoundError)
        words = "no such file" if missing else " ".join(str(error).split()) or repr(error)
        remedy = "fetch it again, or leave its episodes out with --skip-bad"
        raise UserError(f"{place}: {words[:300]}; {remedy}") from error


def first_of(faults, path):
    if not faults:
        return f"{path}: there is nothing in it"
    return f"{faults[0]} [{len(faults)} faults; all: python data.py inspect {path}]"


def read_json(path):
    with reading(path):
        return json.loads(path.read_text("utf-8"))


def read_lines(path):
    """A .jsonl file -> list."""
    with reading(path):
        lines = [line for line in path.read_text("utf-8").split("\n") if line.strip()]
    rows = []
    for number, line in enumerate(lines, 1):
        with reading(f"{path}, line {number}"):
            rows.append(json.loads(line))
    return rows


class Unpickler(pickle.Unpickler):
    """Builds numpy arrays of text, numbers, lists and dicts; what wants more is refused."""

    def find_class(self, module, name):
        if (module.replace("_core", "core"), name) not in (
            ("numpy.core.multiarray", "_reconstruct"), ("numpy.core.multiarray", "scalar"),
            ("numpy", "ndarray"), ("numpy", "dtype"),
        ):  # fmt: skip
            raise ValueError(f"refused: it wants {module}.{name}, which no recording needs")
        return super().find_class(module, name)


def unpickle(path):
    """The dict in a pickled .npy, CALVIN's way to keep annotations."""
    with reading(path), open(path, "rb") as file:
        major, _ = np.lib.format.read_magic(file)
        file.read(int.from_bytes(file.read(2 if major == 1 else 4), "little"))  # skip the header
        return Unpickler(file).load().item()


class Frames:
    """The pictures of one camera in one episode, each decoded when asked for."""

    def __init__(self, place, count, picture):
        self.place, self.count, self.picture = place, count, picture

    def __len__(self):
        return self.count

    def __getitem__(self, t):
        """-> (height, width, 3) uint8; of a slice, all of them in one array."""
        if isinstance(t, slice):
            return np.stack([self[i] for i in range(*t.indices(self.count))])
        if not -self.count <= t < self.count:
            raise IndexError(t)
        t = int(t) % self.count
        with reading(f"{self.place}, frame {t}"):
            return self.picture(t)


def decode(content):
    """A PNG or JPEG, as bytes or a path -> (height, width, 3) uint8."""
    try:
        with Image.open(io.BytesIO(content) if isinstance(content, bytes) else content) as image:
            return np.array(image.convert("RGB"))
    except Image.UnidentifiedImageError:
        raise ValueError("this is no picture") from None


class Video:
    """One video file, decoded forwards from the nearest key frame."""

    def __init__(self, path):
        self.file = need("av").open(str(path))
        self.stream = self.file.streams.video[0]
        self.stream.codec_context.thread_count = 1  # the loader's workers are the threads
        self.painter = need("av.video.reformatter").VideoReformatter()  # sets itself up once
        self.how = {"format": "rgb24"}
        if "threads" in (self.painter.reformat.__doc__ or ""):  # newer ones start a pool otherwise
            self.how["threads"] = 1
        self.half, self.coming, self.now = 0.5 / float(self.stream.average_rate or 30), None, None

    def at(self, time, tolerance):
        first = self.now.time - self.half if self.now else np.inf
        if not first <= time <= first + 8 * self.half:
            where = int(max(time, 0) / self.stream.time_base)
            self.file.seek(where, stream=self.stream, backward=True)
            self.coming, self.now = self.file.decode(self.stream), None
        while self.now is None or self.now.time < time - self.half:
            self.now = next(self.coming, None)
            if self.now is None:
                raise ValueError(f"the video ends before {time:.2f} s")
        if self.now.time > time + tolerance:
            raise ValueError(f"no picture at {time:.2f} s")
        return self.painter.reformat(self.now, **self.how).to_ndarray()


@lru_cache(maxsize=32)
def opened(kind, path, process):
    """An open file, per process: a forked worker must not move its parent's place in it."""
    return kind(path)


def video_picture(path, start, fps, t):
    return opened(Video, path, os.getpid()).at(start + t / fps, 0.5 / fps)


@lru_cache(maxsize=8)
def parquet_numbers(path):
    """Every column of numbers -> {name: (rows,) or (rows, n)}; a list's lengths must agree."""
    pq, pc, out = need("pyarrow.parquet"), need("pyarrow.compute"), {}
    schema = pq.read_schema(path)
    names = [f.name for f in schema if re.search("int|float|double|bool", str(f.type))]
    names = [name for name in names if "struct" not in str(schema.field(name).type)]
    table = pq.read_table(path, columns=names, use_threads=False)  # it may be a forked worker
    for name in table.column_names:
        column = table[name].combine_chunks()
        if "list" in str(column.type):
            widths = pc.list_value_length(column).to_numpy(zero_copy_only=False)
            if len(set(widths)) > 1:
                odd = int(np.argmax(widths != widths[0]))
                raise ValueError(f"row {odd}, {name}: {widths[odd]} numbers, {widths[0]} before")
            flat = column.flatten().to_numpy(zero_copy_only=False)
            out[name] = flat.reshape(len(column), -1)
        else:
            out[name] = column.to_numpy(zero_copy_only=False)
    return out


@lru_cache(maxsize=4)
def parquet_pictures(path, key, group):
    file = need("pyarrow.parquet").ParquetFile(path)
    return file.read_row_group(group, [key], use_threads=False)[key].to_pylist()


@lru_cache(maxsize=1024)
def parquet_groups(path):
    meta = need("pyarrow.parquet").ParquetFile(path).metadata
    return np.cumsum([0] + [meta.row_group(g).num_rows for g in range(meta.num_row_groups)])


def parquet_picture(root, path, key, first, t):
    groups = parquet_groups(path)
    group = int(np.searchsorted(groups, first + t, side="right")) - 1
    cell = parquet_pictures(path, key, group)[first + t - int(groups[group])]
    if cell is None:
        raise ValueError("no picture in this row")
    return decode(cell["bytes"] or root / cell["path"])


def npz_picture(root, start, key, t):
    with np.load(root / f"episode_{start + t:07d}.npz", allow_pickle=False) as file:
        return file[key]


def hdf5_picture(path, demo, key, t):
    file = opened(need("h5py").File, path, os.getpid())
    return np.ascontiguousarray(file[f"data/{demo}/obs/{key}"][t][::-1, ::-1])


# --- Formats: names, lengths, fps, dims (S, A); numbers(i), frames(i) -----------------------------


class LeRobot:
    """LeRobot v2.0, v2.1 and v3.0, pictures in videos or parquet; GR1's modality.json."""

    gripper, faults = "1", ()

    def __init__(self, root, source):
        self.root, self.info, meta = root, read_json(root / "meta/info.json"), root / "meta"
        with reading(meta / "info.json"):
            version, self.fps = str(self.info["codebase_version"]), float(self.info["fps"])
            features = self.info["features"]
            if version[:2] not in ("v2", "v3"):
                raise UserError(f"{root}: LeRobot {version}; v2.0 to v3.0 are read: convert it")
            self.key = {"action": "action" if "action" in features else "actions"}
            self.key["state"] = "observation.state" if "observation.state" in features else "state"
            shapes = {kind: features.get(key, {"shape": [0]}) for kind, key in self.key.items()}
            width = {kind: feature["shape"][0] for kind, feature in shapes.items()}
        parts = meta / "modality.json"
        self.modality = read_json(parts) if parts.exists() else {}
        self.cuts, self.cameras, self.v3 = {}, {}, version.startswith("v3")
        for kind in ("state", "action") if source.parts else ():
            with reading(f"{parts}, {kind} of {', '.join(source.parts)}"):
                spans = [self.modality[kind][part] for part in source.parts]
                self.cuts[kind] = np.r_[tuple(slice(s["start"], s["end"]) for s in spans)]
                width[kind] = len(self.cuts[kind])
        self.dims = width["state"], width["action"]
        for key, feature in features.items():
            about = feature.get("info") or feature.get("video_info") or {}
            if feature["dtype"] in ("video", "image") and not about.get("video.is_depth_map"):
                name = key.rpartition(".")[2]
                self.cameras[key if name in self.cameras else name] = key
                need("av" if feature["dtype"] == "video" else "pyarrow")
        noted = self.modality.get("annotation", {}).items()  # name -> where its task number is
        said = [at.get("original_key", f"annotation.{name}") for name, at in noted]
        said = [key for key in said if key in features and "valid" not in key]
        self.words = (said + ["task_index"])[0]
        if self.v3:
            files = sorted(meta.glob("episodes/*/*.parquet"))
            self.rows = [row for file in files for row in self.table(file)]
            tasks = self.table(meta / "tasks.parquet")
        else:
            self.rows, tasks = read_lines(meta / "episodes.jsonl"), read_lines(meta / "tasks.jsonl")
        with reading(f"{meta}, tasks"):
            text = [next(v for k, v in task.items() if k != "task_index") for task in tasks]
            self.tasks = {task["task_index"]: words for task, words in zip(tasks, text)}
        with reading(f"{meta}, episodes"):
            self.numbered = [int(row["episode_index"]) for row in self.rows]
            self.lengths = [int(row["length"]) for row in self.rows]
        self.first = {}  # v3.0: data file -> number of its first row in the whole dataset
        for row in self.rows if self.v3 else ():
            file, at = self.path(row), row["dataset_from_index"]
            self.first[file] = min(at, self.first.get(file, at))
        self.names = [f"{self.path(r)}, episode {n}" for r, n in zip(self.rows, self.numbered)]

    def table(self, path):
        with reading(path):
            pq = need("pyarrow.parquet")
            names = [n for n in pq.read_schema(path).names if not n.startswith("stats/")]
            return pq.read_table(path, columns=names).to_pylist()

    def path(self, row, camera=None):
        """The file of an episode's numbers, or of one of its videos."""
        kind, number = f"videos/{camera}" if camera else "data", row["episode_index"]
        return self.root / self.info["video_path" if camera else "data_path"].format(
            episode_chunk=number // self.info.get("chunks_size", 1000), episode_index=number,
            chunk_index=row.get(f"{kind}/chunk_index"), file_index=row.get(f"{kind}/file_index"),
            video_key=camera)  # fmt: skip

    def numbers(self, i):
        """-> state (T, S), action (T, A), instruction."""
        row, path, T = self.rows[i], self.path(self.rows[i]), self.lengths[i]
        table = parquet_numbers(path)
        first = row["dataset_from_index"] - self.first[path] if self.v3 else 0
        end = first + T if self.v3 else None
        table = {name: column[first:end] for name, column in table.items()}
        if (table.get("episode_index", self.numbered[i]) != self.numbered[i]).any():
            raise ValueError("field episode_index: rows of another episode, meta does not fit data")
        if "timestamp" in table and len(table["timestamp"]) == T:
            late = np.abs(table["timestamp"].reshape(-1) - np.arange(T) / self.fps) > 0.5 / self.fps
            if late.any():
                raise ValueError(f"field timestamp: step {late.argmax()} is not at its time")
        out = []
        for kind in ("state", "action"):
            if kind == "state" and self.key[kind] not in self.info["features"]:
                table[self.key[kind]] = np.zeros((T, 0))
            if self.key[kind] not in table:
                raise ValueError(f"field {kind}: no column {self.key[kind]}")
            out.append(table[self.key[kind]].reshape(len(table[self.key[kind]]), -1))
            if kind in self.cuts:
                out[-1] = out[-1][:, self.cuts[kind]]
        number = int(table[self.words].reshape(-1)[0]) if self.words in table and T else None
        if number is not None and number not in self.tasks:
            raise ValueError(f"field {self.words}: no task {number} in meta/tasks")
        return *out, self.tasks.get(number) or (row.get("tasks") or [""])[0]

    def frames(self, i):
        row, T, out = self.rows[i], self.lengths[i], {}
        for name, key in self.cameras.items():
            if self.info["features"][key]["dtype"] == "image":
                path = self.path(row)
                first = row["dataset_from_index"] - self.first[path] if self.v3 else 0
                picture = partial(parquet_picture, self.root, path, key, first)
            else:
                start = row.get(f"videos/{key}/from_timestamp") if self.v3 else 0.0
                if start is None:
                    raise ValueError(f"field {key}: this episode has no video of it")
                path = self.path(row, key)
                picture = partial(video_picture, path, start, self.fps)
            out[name] = Frames(f"{path}, episode {self.numbered[i]}, field {key}", T, picture)
        return out


class Calvin:
    """A split of CALVIN, an .npz per frame: its annotated segments; where none are, all play."""

    gripper, fps, dims, faults = "+1", 30.0, (15, 7), ()

    def __init__(self, root, source):
        split = root if (root / "ep_start_end_ids.npy").exists() else root / "training"
        notes = split / "lang_annotations" / "auto_lang_ann.npy"
        self.root, spans = split, split / "ep_start_end_ids.npy"
        with reading(notes if notes.exists() else spans):
            if notes.exists():
                notes = unpickle(notes)
                spans, text = notes["info"]["indx"], notes["language"]["ann"]
            else:
                spans = np.load(spans, allow_pickle=False)
                text = [""] * len(spans)
            rows = [(int(a), int(b), str(words)) for (a, b), words in zip(spans, text)]
        if source.scenes:
            with reading(split / "scene_info.npy"):
                inside = [unpickle(split / "scene_info.npy")[scene] for scene in source.scenes]
                rows = [r for r in rows if any(a <= r[0] and r[1] <= b for a, b in inside)]
        self.rows, self.lengths = rows, [b - a + 1 for a, b, _ in rows]
        self.names = [f"{split}, frames {a} to {b}" for a, b, _ in rows]

    def numbers(self, i):
        start, end, words = self.rows[i]
        state, action = [], []
        for t in range(start, end + 1):
            path = self.root / f"episode_{t:07d}.npz"
            with reading(path), np.load(path, allow_pickle=False) as file:
                state.append(file["robot_obs"])
                action.append(file["rel_actions"])
        return np.stack(state), np.stack(action), words

    def frames(self, i):
        place, start, T = self.names[i], self.rows[i][0], self.lengths[i]
        return {key: Frames(f"{place}, field {key}", T, partial(npz_picture, self.root, start, key))
                for key in ("rgb_static", "rgb_gripper")}  # fmt: skip


class Libero:
    """LIBERO's .hdf5 files, made to look like the suites of SOURCES: cameras, pictures turned,
    state (xyz, axis-angle, two fingers) and gripper."""

    gripper, fps, dims = "-1", 20.0, (8, 7)
    cameras = {"image": "agentview_rgb", "wrist_image": "eye_in_hand_rgb"}

    def __init__(self, root, source):
        h5py, self.rows, self.lengths, self.faults = need("h5py"), [], [], []
        for path in sorted(root.glob("**/*.hdf5")) if root.is_dir() else [root]:
            try:
                with reading(path), h5py.File(path) as file:
                    words = json.loads(file["data"].attrs["problem_info"])["language_instruction"]
                    words = " ".join(words) if isinstance(words, list) else words.strip('"')
                    for demo in sorted(file["data"], key=lambda name: int(name.split("_")[-1])):
                        self.lengths.append(len(file[f"data/{demo}/actions"]))
                        self.rows.append((path, demo, words))
            except UserError as fault:
                self.faults.append(str(fault))
        self.names = [f"{path}, {demo}" for path, demo, _ in self.rows]

    def numbers(self, i):
        path, demo, words = self.rows[i]
        file = opened(need("h5py").File, path, os.getpid())[f"data/{demo}"]
        state = [file[f"obs/{key}"][:] for key in ("ee_states", "gripper_states")]
        return np.concatenate(state, 1), file["actions"][:], words

    def frames(self, i):
        path, demo, _ = self.rows[i]
        return {name: Frames(f"{path}, {demo}, field {key}", self.lengths[i],
                             partial(hdf5_picture, path, demo, key))
                for name, key in self.cameras.items()}  # fmt: skip


def flat(path, kind, shape):
    """A file of numbers as an array that stays on disk."""
    size = path.stat().st_size
    if size != np.prod(shape) * np.dtype(kind).itemsize:
        raise ValueError(f"{size} bytes do not make {shape}: write it again")
    # a plain array over the file: a memmap's own slices cost more than a small picture's copy
    return np.asarray(np.memmap(path, kind, "r", shape=shape)) if size else np.zeros(shape, kind)


class Store:
    """What `write_store` left: numbers of whole episodes in flat files, pictures too if asked."""

    gripper = "1"

    def __init__(self, root, source=None):
        index = read_json(root / "index.json")
        with reading(root / "index.json"):
            self.names, self.lengths, self.fps = index["names"], index["lengths"], index["fps"]
            self.dims, self.stats, self.kept = index["dims"], index["stats"], index["kept"]
            self.text, self.faults, sizes = index["text"], index["faults"], index["sizes"]
            self.starts, self.normalise = np.cumsum([0, *self.lengths]), index["normalise"]
            shapes = {"state": (self.dims[0],), "action": (self.dims[1],)}
            shapes |= {camera: tuple(size) for camera, size in sizes.items()}
        self.arrays, self.cameras = {}, list(sizes)
        for name, shape in shapes.items():
            with reading(root / name):
                kind, shape = "u1" if name in sizes else "f4", (int(self.starts[-1]), *shape)
                self.arrays[name] = flat(root / name, kind, shape)

    def cut(self, name, i):
        return self.arrays[name][self.starts[i] : self.starts[i + 1]]

    def numbers(self, i):
        return self.cut("state", i), self.cut("action", i), self.text[i]

    def frames(self, i):
        return {camera: self.cut(camera, i) for camera in self.cameras}


# --- A dataset on disk ----------------------------------------------------------------------------


class Episodes:
    """A recorded dataset: `len`, `[i]`, iteration. An Episode is read when it is asked for."""

    def __init__(self, path, source, reader):
        self.path, self.source, self.reader, self.store = path, source, reader, None
        self.names, self.lengths, self.recent, self.faults = reader.names, reader.lengths, {}, []
        if isinstance(reader, Store):
            self.store, self.kept = reader, range(len(reader.names))
            self.source = Source(normalise=reader.normalise)
        said = (path if path.is_dir() else path.parent) / "reasoning.jsonl"  # a line an episode
        self.reasoning = {}
        with reading(f"{said}, fields episode, reasoning"):
            for row in read_lines(said) if said.exists() else ():
                self.reasoning[int(row["episode"])] = [str(words) for words in row["reasoning"]]

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
        number = self.kept[i] if self.store else i
        said = self.reasoning.get(number, [])
        with reading(self.names[i]):
            frames = self.reader.frames(number)
            if self.lengths[i] < 1:
                raise ValueError("the episode is empty")
            state, action, words = (self.store or self.reader).numbers(i)
            for kind, x, width in zip(("state", "action"), (state, action), self.reader.dims):
                if x.shape != (self.lengths[i], width):
                    raise ValueError(f"field {kind} is {x.shape}, not {(self.lengths[i], width)}")
                if self.store is None and not np.isfinite(x).all():
                    step = int(np.argmin(np.isfinite(x).all(1)))
                    raise ValueError(f"field {kind}: not a finite number at step {step}")
            if said and len(said) != self.lengths[i]:
                raise ValueError(f"field reasoning: {len(said)} for {self.lengths[i]} steps")
            absent = [name for name in self.source.cameras if name not in frames]
            if absent:
                raise ValueError(f"no camera {absent[0]}; there are {', '.join(frames)}")
        sign = None if self.store else self.source.gripper or self.reader.gripper
        state, action = np.asarray(state, np.float32), np.array(action, np.float32)
        if sign in ("+1", "-1"):
            action[:, -1] = (1 + float(sign) * action[:, -1]) / 2
        frames = {name: frames[name] for name in self.source.cameras or frames}
        return Episode(frames, state, action, words, self.reader.fps, said)

    def settle(self, skip_bad=False, every=False, again=False):
        """Reads everything once, keeps the numbers in CACHE; faults stop it, or are left out."""
        if self.store is None:
            folder = CACHE / f"{self.path.name}-{fingerprint(self.path, self.source)}"
            known = Store(folder) if (folder / "index.json").exists() and not again else None
            if known is None or (known.faults and not skip_bad):
                write_store(self, folder, every=every)
            self.store = Store(folder)
            self.kept, self.names = self.store.kept, self.store.names
            self.lengths, self.faults, self.recent = self.store.lengths, self.store.faults, {}
        if self.faults and not skip_bad:
            raise UserError(first_of(self.faults, self.path))
        return self.store


def fingerprint(path, source):
    """Of every file's name, size and time, and of how it is read."""
    digest = hashlib.sha256(f"1 {source} {path.resolve()}".encode())
    alone = [(path.parent, [], [path.name])]
    for folder, folders, names in os.walk(path) if path.is_dir() else alone:
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(names):
            stat = os.stat(os.path.join(folder, name))
            digest.update(f"{folder}/{name} {stat.st_size} {stat.st_mtime_ns}".encode())
    return digest.hexdigest()[:16]


def resized(image, side):
    """The picture at side x side, bicubic; 0: as it is."""
    if not side or image.shape[:2] == (side, side):
        return image
    return np.asarray(Image.fromarray(image).resize((side, side), Image.BICUBIC))


def shots(frames, which, side):
    """Those pictures, seen to be pictures."""
    out = [resized(frames[t], side) for t in which]
    for t, shot in zip(which, out):
        if shot.dtype != np.uint8 or shot.ndim != 3 or shot.shape[2] != 3:
            raise ValueError(f"frame {t} is {shot.dtype} {shot.shape}, not a picture")
    return out


def write_store(episodes, folder, pictures=False, side=0, every=False):
    """All numbers of a dataset in flat files, `pictures` too; otherwise each episode's first and
    last picture is tried, or `every` one. What cannot be read is listed and left out."""
    reader, fresh = episodes.reader, Episodes(episodes.path, episodes.source, episodes.reader)
    index = {"names": [], "kept": [], "text": [], "lengths": [], "sizes": {}}
    index |= {"faults": list(reader.faults), "fps": reader.fps, "dims": reader.dims}
    temporary = folder.with_name(f"{folder.name}.{os.getpid()}.part")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    for kept in (opened, parquet_numbers, parquet_pictures, parquet_groups):
        kept.cache_clear()  # the files may have been mended since they were last read
    words = f"reading {episodes.path.name} (once)"
    for i in tqdm(range(len(fresh)), words, leave=False, disable=None):
        try:
            episode, arrays = fresh.read(i), {}
            for camera, frames in episode.images.items():
                which = range(len(frames)) if pictures or every else sorted({0, len(frames) - 1})
                with reading(f"{fresh.names[i]}, camera {camera}"):
                    taken = shots(frames, which, side)
                    if pictures:
                        size = index["sizes"].setdefault(camera, taken[0].shape)
                        if any(shot.shape != size for shot in taken):
                            raise ValueError(f"not {size} as before: --size makes all of one size")
                        arrays[camera] = np.stack(taken)
        except UserError as fault:
            index["faults"].append(str(fault))
            continue
        if pictures and not index["kept"]:
            needed = sum(reader.lengths) * sum(array[0].nbytes for array in arrays.values())
            if needed > shutil.disk_usage(temporary).free:
                raise UserError(f"{folder} needs {needed / 1e9:.1f} GB, more than is free: --size")
        arrays |= {"state": episode.state, "action": episode.action}
        for name, array in arrays.items():
            with open(temporary / name, "ab") as file:
                file.write(array.tobytes())
        if pictures and episode.reasoning:
            said = {"episode": len(index["kept"]), "reasoning": episode.reasoning}
            with open(temporary / "reasoning.jsonl", "a", encoding="utf-8") as file:
                file.write(json.dumps(said) + "\n")
        row = fresh.names[i], i, episode.instruction, len(episode.action)
        for name, value in zip(("names", "kept", "text", "lengths"), row):
            index[name].append(value)
    if not index["kept"]:
        raise UserError(first_of(index["faults"], episodes.path))
    stats, T = {}, sum(index["lengths"])
    for kind, width in zip(("state", "action"), reader.dims):
        stats[kind] = summary(flat(temporary / kind, "f4", (T, width)))
    index |= {"stats": stats, "normalise": episodes.source.normalise}
    (temporary / "index.json").write_text(json.dumps(index))
    shutil.rmtree(folder, ignore_errors=True)
    os.replace(temporary, folder)


class QuestionFile:
    """LLaVA's JSON or JSONL, or a VLMEvalKit TSV: samples like those of `Questions`."""

    def __init__(self, path, skip_bad=False):
        self.path, self.samples, self.faults, self.pasted = path, [], [], {}
        for number, row in enumerate(self.rows(), 1):
            try:
                with reading(f"{path}, item {number}"):
                    row = json.loads(row) if isinstance(row, str) else row
                    self.samples += self.ask(row) if "conversations" in row else [self.choose(row)]
            except UserError as fault:
                self.faults.append(str(fault))
        if (self.faults and not skip_bad) or not self.samples:
            raise UserError(first_of(self.faults, path))

    def rows(self):
        with reading(self.path):
            if self.path.suffix == ".json":
                return json.loads(self.path.read_text("utf-8"))
            if self.path.suffix == ".jsonl":
                return [line for line in self.path.read_text("utf-8").split("\n") if line.strip()]
            csv.field_size_limit(2**31 - 1)
            with open(self.path, newline="", encoding="utf-8") as file:
                return list(csv.DictReader(file, delimiter="\t"))

    def find(self, name):
        for folder in (self.path.parent, self.path.parent / "images", DATA):
            if (folder / name).is_file():
                return folder / name
        raise ValueError(f"field image: no file {name} beside it, in images/ or in {DATA}")

    def ask(self, row):
        """A conversation -> a sample for each answer; what was said before it comes first."""
        images, said = row.get("image", []), row["conversations"]
        images = [self.find(name) for name in ([images] if isinstance(images, str) else images)]
        if not images:
            raise ValueError("field image: none; questions without a picture are not for this")
        text, out = "", []
        for turn in said:
            if turn["from"] in ("gpt", "assistant"):
                out.append((images, text.strip(), turn["value"]))
            text += turn["value"].replace("<image>", "").strip() + "\n"
        return out

    def choose(self, row):
        """A row of a TSV: base64 or a path; a short entry is the index of the row that has it."""
        image = row.get("image") or ""
        if image:
            self.pasted[row["index"]] = image = self.pasted.get(image, image)
            image = json.loads(image.replace("'", '"')) if image.startswith("[") else [image]
            image = [base64.b64decode(part, validate=True) for part in image]
        else:
            image = [self.find(row["image_path"])]
        options = [f"{letter}. {row[letter]}" for letter in "ABCDEFGH" if row.get(letter)]
        return image, "\n".join([row["question"], *options]), row["answer"]

    def __len__(self):
        return len(self.samples)

    def get(self, index, rng=None):
        images, question, answer = self.samples[index]
        with reading(f"{self.path}, sample {index}, field image"):
            return {"images": [decode(i) for i in images], "question": question, "answer": answer}


def open_episodes(spec, skip_bad=False, every=False, again=False):
    """A row of SOURCES, a hub id, a path, or a world -> a sequence of Episode, or of
    questions. skip_bad: what cannot be read is left out and listed in `.faults`; for that all is
    read once, `every` picture too if wanted, `again` even if it was before."""
    if str(spec).partition(":")[0] in loop.WORLDS:
        return demonstrations(str(spec))
    path, source = locate(str(spec))
    if path.suffix in (".json", ".jsonl", ".tsv"):
        return QuestionFile(path, skip_bad)
    if path.suffix == ".npz":
        with reading(path):
            return load_demonstrations(path)
    marks = (("index.json", Store), ("meta/info.json", LeRobot), ("ep_start_end_ids.npy", Calvin),
             ("training/ep_start_end_ids.npy", Calvin), ("**/*.hdf5", Libero))  # fmt: skip
    found = (Reader for mark, Reader in marks if path.is_dir() and any(path.glob(mark)))
    Reader = Libero if path.suffix in (".hdf5", ".h5") else next(found, None)
    if Reader is None:
        words = "LeRobot, CALVIN, LIBERO .hdf5, .json, .jsonl, .tsv; pickles are never read"
        raise UserError(f"{path}: no dataset is recognised here ({words})")
    episodes = Episodes(path, source, Reader(path, source))
    if skip_bad or episodes.reader.faults:
        episodes.settle(skip_bad, every, again)
    return episodes


Part = namedtuple("Part", "name episodes stats weight normalise")


def named(spec):
    """`bridge,fractal=2,my/folder` -> {what it names: weight}; what is nowhere is an error."""
    wanted = {}
    for word in filter(None, spec.split(",")):
        name, _, weight = word.partition("=")
        with reading(f"--data {word}"):
            weight = float(weight or 1)
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
    """What --data names, or else the world's own demonstrations -> parts to act like, parts to
    answer like. Their stats are the checkpoint's if there is one, say how to normalise ("how"), are
    as wide as the widest robot's, and name the "cameras" in their order and the steps in a second
    ("fps"). Rank 0 reads first; its error is everybody's."""

    def demonstrate(world):
        return demonstrations(world, cfg.demos, cfg.seed, cfg.size, cfg.wrist_size, cfg.noise)

    parts = dist.first(lambda: load(cfg.data or cfg.world, cfg.skip_bad, demonstrate))
    acts, asks = ([p for p in parts if bool(p.stats) == act] for act in (True, False))
    if not acts:
        raise UserError(f"--data {cfg.data}: questions alone; name recordings of a robot as well")
    S = max(len(p.stats["state"]["q01"]) for p in acts)
    for i, part in enumerate(acts):
        stats = {
            kind: {name: v + [0.0] * (kind == "state") * (S - len(v)) for name, v in s.items()}
            | {"how": part.normalise if cfg.normalise == "auto" else cfg.normalise}
            for kind, s in part.stats.items()
        }
        first = part.episodes[0]
        stats |= {"cameras": list(first.images), "fps": first.fps}
        known = resumed.meta["robots"] if resumed else {}
        acts[i] = part._replace(stats=known.get(part.name, stats))
    return acts, asks


def acting(robots, name):
    """{recordings: stats} -> the robot's name and the stats to act by: those asked for (--robot),
    or the first of the training."""
    if name and name not in robots:
        near = nearest(name, list(robots))
        raise UserError(f"--robot {name} was not trained on: did you mean {near}?")
    name = name or next(iter(robots))
    return robot_name(name), robots[name]


def robot_name(recordings):
    """What a prompt calls the robot of these recordings: bridge, tabletop, a folder's name."""
    return Path(recordings).name.partition(":")[0]


def dims(robots):
    """{recordings: stats} -> how many numbers a state and an action have."""
    stats = next(iter(robots.values()))
    return len(stats["state"]["q01"]), len(stats["action"]["q01"])


def counted(acts, windows):
    """What is trained on, in words."""
    names = ", ".join(p.name for p in acts[:3]) + " ..." * (len(acts) > 3)
    return f"{names}: {sum(len(p.episodes) for p in acts)} episodes, {sum(map(len, windows))} steps"


# --- Normalisation --------------------------------------------------------------------------------


def summary(x):
    """(N, D) -> q01, q99, min, max of each dimension, exact over all N, as lists."""
    columns = [np.asarray(column, np.float64) for column in x.T]
    out = {"q01": [np.quantile(c, 0.01) for c in columns]}
    out |= {"q99": [np.quantile(c, 0.99) for c in columns]}
    out |= {"min": [c.min() for c in columns], "max": [c.max() for c in columns]}
    return {name: [float(v) for v in values] for name, values in out.items()}


def statistics(episodes):
    """Over all steps, for each dimension of state and action: q01, q99, min, max as lists."""
    if isinstance(episodes, Episodes):
        return episodes.settle(bool(episodes.faults)).stats
    keys = ("state", "action")
    return {k: summary(np.concatenate([getattr(e, k) for e in episodes])) for k in keys}


def bounds(stats):
    """-> (low, high) float32, q01 and q99, or min and max where stats["how"] is "minmax"; one to
    either side of what never moves."""
    low, high = ("min", "max") if stats.get("how") == "minmax" else ("q01", "q99")
    low, high = np.array(stats[low], np.float32), np.array(stats[high], np.float32)
    still = high - low < 1e-6
    return np.where(still, low - 1, low), np.where(still, high + 1, high)


def normalise(x, stats, clip=1.0):
    """(..., A) in the recording's units -> [-1, 1] between the bounds, clipped at +-clip; zeros
    take the place of numbers that another robot has and this one has not."""
    return squeeze(x, *bounds(stats), clip)


def squeeze(x, low, high, clip=1.0):
    wider = len(low) - np.shape(x)[-1]
    if wider < 0:
        words = f"a state or action of {np.shape(x)[-1]} numbers, trained on {len(low)}"
        raise UserError(f"another robot: {words}")
    x = np.pad(x, [(0, 0)] * (np.ndim(x) - 1) + [(0, wider)]) if wider else x
    return np.clip(2 * (x - low) / (high - low) - 1, -clip, clip).astype(np.float32)


def unnormalise(x, stats):
    """The inverse of `normalise` inside the bounds."""
    low, high = bounds(stats)
    return (np.asarray(x) + 1) / 2 * (high - low) + low


# --- Windows and mixtures -------------------------------------------------------------------------


def shift(image, dx, dy):
    """The picture (height, width, 3) moved by whole pixels, its edge repeated."""
    height, width = image.shape[:2]
    rows = np.clip(np.arange(height) + dy, 0, height - 1)
    columns = np.clip(np.arange(width) + dx, 0, width - 1)
    return image[rows][:, columns]


def scaled(images, sides):
    """A picture of each camera, the first at sides[0], the others at sides[1] (0: as they are)."""
    return [resized(image, sides[k > 0]) for k, image in enumerate(images)]


def lengths(episodes):
    if isinstance(episodes, Episodes):  # known without reading them
        return episodes.lengths
    return [len(e.action) for e in episodes]


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
        images = [frames[t] for frames in episode.images.values()]
        images = scaled(images, self.sides)
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


def describe(name, episodes, picks):
    """Prints counts, lengths, instructions, ranges and warnings -> rows of a contact sheet."""
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
    shown = [(e.images.values(), e.instruction) for e in (episodes[i] for i in picks)]
    places = (0, 0.5, 1)
    return [([f[int(p * (len(f) - 1))] for p in places for f in c], text) for c, text in shown]


def inspect(spec, sheet, deep=False):
    """Prints what was recognised, draws a contact sheet, lists every fault."""
    episodes = open_episodes(spec, skip_bad=True, every=deep, again=True)
    picks = sorted({int(i) for i in np.linspace(0, len(episodes) - 1, 5)})
    faults, rows = list(getattr(episodes, "faults", [])), []
    if isinstance(episodes, QuestionFile):
        print(f"{episodes.path.suffix[1:]}: {len(episodes)} questions")
        for i in range(len(episodes)) if deep else picks:
            try:
                sample = episodes.get(i)
                rows.append((sample["images"], f"{sample['question']}\n{sample['answer']}"))
            except UserError as fault:
                faults.append(str(fault))
    else:
        rows = describe(spec, episodes, picks)
    if rows:
        pictures.contact_sheet(sheet, rows[:5], max(1, 128 // len(rows[0][0][0])))
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
    look.add_argument("--deep", action="store_true", help="decode every picture, not the ends only")
    keep.add_argument("--out", help="the folder to write, then used as --data [NAME-frames]")
    keep.add_argument("--size", type=int, default=0, help="resize to this side [0: as recorded]")
    keep.add_argument("--skip-bad", action="store_true", help="leave out what cannot be read")
    args = parser.parse_args(argv)
    if args.verb == "inspect":
        return inspect(args.path, args.sheet, args.deep)
    episodes = open_episodes(args.path, args.skip_bad)
    if not isinstance(episodes, Episodes):
        raise UserError(f"{args.path}: its pictures are not in files that need decoding")
    folder = Path(args.out or f"{episodes.path.name}-frames")
    if folder.exists():
        raise UserError(f"{folder} exists: name another with --out")
    write_store(episodes, folder, True, args.size)
    kept = Store(folder)
    print("\n".join(f"left out: {fault}" for fault in kept.faults))
    print(f"{len(kept.names)} episodes, {sum(kept.lengths)} steps in {folder}: --data {folder}")


if __name__ == "__main__":
    run_main(main)
