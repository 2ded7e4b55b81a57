"""How others keep recordings: their names, LeRobot, CALVIN, LIBERO, stores of our own.

A reader of episodes has names, lengths, fps, dims (S, A), numbers(i) and frames(i).
"""

import errno
import importlib
import io
import json
import os
import pickle
import re
import shutil
import tempfile
import time
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path

import numpy as np
from PIL import Image

from parts.process import UserError, files_of, nearest, stamp
from worlds import libero, loop

DATA = Path(os.environ.get("ONEFILE_VLA_DATA", Path.home() / ".cache" / "onefile-vla" / "data"))


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

    def __post_init__(self):
        known = {"normalise": ("q99", "minmax"), "gripper": ("", "1", "+1", "-1")}
        bad = [name for name, there in known.items() if getattr(self, name) not in there]
        bad += [n for n in ("cameras", "parts", "scenes") if isinstance(getattr(self, n), str)]
        for name in bad:
            what = f"one of {', '.join(map(repr, known[name]))}" if name in known else "a tuple"
            raise UserError(f"a row of SOURCES has {name} {getattr(self, name)!r}: {what}")


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
MEAN = sum(episodes for _, episodes in OXE.values()) / len(OXE)
GROUPS = {  # name -> {row of SOURCES: weight}, 1 in the mean, as a dataset named beside them has
    "oxe": {name: episodes / MEAN for name, (_, episodes) in OXE.items()},
    "libero": dict.fromkeys(LIBERO, 1.0),
    "gr1": {f"gr1_{name}": 1.0 for name in GR1},
}


def locate(spec):
    """A row of SOURCES, a hub id or a path -> (path on this disk, its row)."""
    source, path = SOURCES.get(spec), Path(spec).expanduser()
    if spec in GROUPS and not path.exists():
        raise UserError(f"{spec} is several datasets, name one of them: {', '.join(GROUPS[spec])}")
    if source is None and path.exists():
        rows = reversed(SOURCES.values())  # the first of a name wins
        known = {row.hub.rpartition("/")[2].removesuffix(".zip"): row for row in rows}
        here = path.resolve()  # its folder may be one of several inside, or a snapshot of the hub's
        names = [p.name.rpartition("--")[2] for p in (here, *list(here.parents)[:2])]
        return path, ([known[name] for name in names if name in known] + [Source()])[0]
    if source is None and not re.fullmatch(r"[\w.-]+/[\w.-]+", spec):
        names = [*SOURCES, *GROUPS, *loop.WORLDS]
        raise UserError(f"no dataset or path {spec!r} (did you mean {nearest(spec, names)}?)")
    source = source or next((s for s in SOURCES.values() if s.hub == spec), Source(spec))
    if source.hub and (folder := Path(source.hub).expanduser()).exists():
        return folder, source
    if source.hub.startswith("http"):
        place = DATA / source.hub.rpartition("/")[2].removesuffix(".zip")
        command = f"wget {source.hub} and unzip it there"
    else:
        owner, name, *inside = source.hub.split("/")
        root = DATA / (name if source in SOURCES.values() else f"{owner}/{name}")
        place, only = root.joinpath(*inside), f" --include '{inside[0]}/*'" if inside else ""
        command = f"hf download {owner}/{name} --repo-type dataset{only} --local-dir {root}"
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


MEND = "mend it, or fetch it again"  # what no --skip-bad can leave out


@contextmanager
def reading(place, remedy="fetch it again, or leave its episodes out with --skip-bad"):
    """Whatever fails inside becomes one line with the place and the remedy."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # six libraries' worth of kinds, all of them a damaged file
        missing = isinstance(error, FileNotFoundError)
        words = "no such file" if missing else " ".join(str(error).split()) or repr(error)
        words = f"no field {words}" if isinstance(error, KeyError) else words
        raise UserError(f"{place}: {words[:300]}; {remedy}") from error


def stopped_by(faults, path):
    """The error that names the first fault, and has them all in `.faults`."""
    words = f"{path}: there is nothing in it"
    if faults:
        words = f"{faults[0]} [{len(faults)} faults; all: python data.py inspect {path}]"
    error = UserError(words)
    error.faults = list(faults)
    return error


def read_json(path):
    with reading(path, MEND):
        return json.loads(path.read_text("utf-8"))


def read_lines(path):
    """A .jsonl file -> list."""
    with reading(path, MEND):
        lines = [line for line in path.read_text("utf-8").split("\n") if line.strip()]
    rows = []
    for number, line in enumerate(lines, 1):
        with reading(f"{path}, line {number}", MEND):
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
            image = self.picture(t)
            if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 or not image.size:
                raise ValueError(f"{image.dtype} {image.shape} is no picture")
            return image


PICTURES = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF")  # Pillow starts programs for some others


def decode(content):
    """A picture, as bytes or a path -> (height, width, 3) uint8."""
    file = io.BytesIO(content) if isinstance(content, bytes) else content
    try:
        with Image.open(file, formats=PICTURES) as image:
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

    def step(self, time):
        """The next picture on the way to the one at time."""
        frame = next(self.coming, None)
        if frame is None:
            raise ValueError(f"the video ends before {time:.2f} s")
        if frame.is_corrupt:  # the decoder painted over what it could not read
            raise ValueError(f"damaged at {frame.time:.2f} s")
        return frame

    def seek(self, time):
        """The first picture decoded from a key frame before time; one further back if that is too
        late: a key frame may lie in the file before pictures that are shown before it."""
        second = round(1 / self.stream.time_base)
        for where in range(round(max(time, 0) / self.stream.time_base), -second, -second):
            self.file.seek(max(where, 0), stream=self.stream, backward=True)
            self.coming = self.file.decode(self.stream)
            frame = self.step(time)
            if frame.time <= time + self.half:
                break
        return frame

    def at(self, time, tolerance):
        now, self.now = self.now, None  # stays so if this fails: the next call seeks
        first = now.time - self.half if now else np.inf
        if not first <= time <= first + 8 * self.half:
            now = self.seek(time)
        while now.time < time - self.half:
            now = self.step(time)
        self.now = now
        if abs(now.time - time) > 1.01 * tolerance:
            raise ValueError(f"no picture at {time:.2f} s")
        return self.painter.reformat(now, **self.how).to_ndarray()


@lru_cache(maxsize=32)
def opened(kind, path, process):
    """An open file, per process: a forked worker must not move its parent's place in it."""
    return kind(path)


def video_picture(path, start, fps, t):
    return opened(Video, path, os.getpid()).at(start + t / fps, 0.5 / fps)


@lru_cache(maxsize=8)
def parquet_numbers(path, wanted):
    """Those of these columns that are there and hold numbers -> {name: (rows,) or (rows, n)}; a
    list's lengths must agree."""
    pq, pc, out = need("pyarrow.parquet"), need("pyarrow.compute"), {}
    kinds = {f.name: str(f.type) for f in pq.read_schema(path) if f.name in wanted}
    numeric = re.compile("(?!.*struct).*(int|float|double|bool)")
    names = [name for name, kind in kinds.items() if numeric.match(kind)]
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
    if cell is None or not (cell["bytes"] or cell["path"]):
        raise ValueError("no picture in this row")
    return decode(cell["bytes"] or root / cell["path"])


def npz_picture(root, start, key, t):
    with np.load(root / f"episode_{start + t:07d}.npz", allow_pickle=False) as file:
        return file[key]


def hdf5_picture(path, demo, key, t):
    file = opened(need("h5py").File, path, os.getpid())
    return np.ascontiguousarray(file[f"data/{demo}/obs/{key}"][t][::-1, ::-1])


def finite(kind, x, shape):
    """The numbers of an episode in float32, if they are what they should be."""
    if x.shape != shape:
        raise ValueError(f"field {kind} is {x.shape}, not {shape}")
    if x.dtype.kind not in "fiub":
        raise ValueError(f"field {kind} holds {x.dtype}, no real numbers")
    with np.errstate(over="ignore"):
        x = np.asarray(x, np.float32)
    if not (there := np.isfinite(x).all(1)).all():
        raise ValueError(f"field {kind}: not a finite number at step {there.argmin()}")
    return x


def whole(arrays, text):
    """The lengths of the episodes in our own .npz, if its arrays fit each other."""
    lengths, cameras = arrays["length"], [name for name in arrays if name.startswith("image.")]
    if len(lengths) != len(text) or not len(text) or (lengths < 1).any() or not cameras:
        words = f"fields length, text: {len(lengths)} and {len(text)} episodes, of some steps each"
        raise ValueError(words if cameras else "there is no camera in it")
    for name in ("state", "action", "phase", *cameras):
        x = arrays[name]
        picture = x.dtype == np.uint8 and x.shape[3:] == (3,)
        if len(x) != lengths.sum() or (name in cameras and not picture):
            raise ValueError(f"field {name}: {x.dtype} {x.shape} for {lengths.sum()} steps")
        if name in ("state", "action"):
            arrays[name] = finite(name, x, (len(x), x.shape[-1]))
    return lengths


def fingerprint(path, source):
    """Of all that is in a dataset, and of how it is read; not of a picture drawn beside it."""
    root, drawn = path.resolve(), (".png", ".jpg", ".webp")
    files = [file for file in map(Path, files_of(root))
             if file.parent != root or file.suffix.lower() not in drawn]  # fmt: skip
    files += [] if root.is_dir() else [root.parent / "reasoning.jsonl"]
    return stamp(files, f"3 {source} {root}")


# --- Formats: names, lengths, fps, dims (S, A); numbers(i), frames(i) -----------------------------


def sentence(task):
    """A row of LeRobot's meta/tasks -> its words; in v3.0 they may be the index of a pandas table,
    which then has a name of pandas' own."""
    named = [task[key] for key in ("task", "__index_level_0__") if key in task]
    words = (named + [v for v in task.values() if isinstance(v, str)] + [None])[0]
    if not isinstance(words, str):
        raise ValueError(f"task {task['task_index']} has no words")
    return words


class LeRobot:
    """LeRobot v2.0, v2.1 and v3.0, pictures in videos or parquet; GR1's modality.json."""

    gripper = ""  # not known

    def __init__(self, root, source):
        self.root, self.info, meta = root, read_json(root / "meta/info.json"), root / "meta"
        self.faults = []
        parts = meta / "modality.json"
        self.modality = read_json(parts) if parts.exists() else {}
        with reading(f"{parts}, video, annotation", MEND):
            seen = self.modality.get("video", {}).items()  # name -> the feature it is
            called = {about.get("original_key"): name for name, about in seen}
            noted = self.modality.get("annotation", {}).items()  # name -> where its task number is
            noted = [at.get("original_key", f"annotation.{name}") for name, at in noted]
        with reading(meta / "info.json", MEND):
            version, self.fps = str(self.info["codebase_version"]), float(self.info["fps"])
            if not 0 < self.fps < np.inf:
                raise ValueError(f"field fps: {self.fps}")
            features = self.info["features"]
            if version[:2] not in ("v2", "v3"):
                raise UserError(f"{root}: LeRobot {version}; v2.0 to v3.0 are read: convert it")
            self.key = {"action": "action" if "action" in features else "actions"}
            self.key["state"] = "observation.state" if "observation.state" in features else "state"
            shapes = {kind: features.get(key, {"shape": [0]}) for kind, key in self.key.items()}
            width = {kind: feature["shape"][0] for kind, feature in shapes.items()}
            self.cameras = {}
            for key, feature in features.items():
                about = (feature.get("video_info") or {}) | (feature.get("info") or {})
                depth = about.get("is_depth_map") or about.get("video.is_depth_map")
                if feature["dtype"] in ("video", "image") and not depth:
                    name = key.rpartition(".")[2]
                    if name not in source.cameras:
                        name = called.get(key, name)
                    if "/" in key + name:  # a store names a file by it
                        raise ValueError(f"field {key}: a name with a /")
                    taken = name in (*self.cameras, "state", "action")
                    self.cameras[key if taken else name] = key
                    need("av" if feature["dtype"] == "video" else "pyarrow")
        self.cuts, self.v3 = {}, version.startswith("v3")
        for kind in ("state", "action") if source.parts else ():
            with reading(f"{parts}, {kind} of {', '.join(source.parts)}", MEND):
                spans = [self.modality[kind][part] for part in source.parts]
                self.cuts[kind] = np.r_[tuple(slice(s["start"], s["end"]) for s in spans)]
                width[kind] = len(self.cuts[kind])
        self.dims = width["state"], width["action"]
        said = [key for key in noted if key in features and "valid" not in key]
        self.words = (said + ["task_index"])[0]
        if self.v3:
            files = sorted(meta.glob("episodes/*/*.parquet"))
            self.rows = [row for file in files for row in self.table(file)]
            tasks = self.table(meta / "tasks.parquet")
        else:
            self.rows, tasks = read_lines(meta / "episodes.jsonl"), read_lines(meta / "tasks.jsonl")
        with reading(f"{meta}, tasks", MEND):
            self.tasks = {task["task_index"]: sentence(task) for task in tasks}
        self.first = {}  # v3.0: data file -> number of its first row in the whole dataset
        with reading(f"{meta}, episodes", MEND):
            self.numbered = [int(row["episode_index"]) for row in self.rows]
            count = self.info.get("total_episodes", len(self.rows))
            if len(set(self.numbered)) < len(self.rows):
                raise ValueError("field episode_index: a number is there twice")
            if len(self.rows) != count:
                words = f"{meta}, episodes: {len(self.rows)} of the {count} that info.json counts"
                self.faults.append(f"{words}; fetch the others, or go without: --skip-bad")
            self.lengths = [int(row["length"]) for row in self.rows]
            for row in self.rows if self.v3 else ():
                file, at = self.path(row), row["dataset_from_index"]
                self.first[file] = min(at, self.first.get(file, at))
            self.names = [f"{self.path(r)}, episode {n}" for r, n in zip(self.rows, self.numbered)]

    def table(self, path):
        with reading(path, MEND):
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
        wanted = (*self.key.values(), "episode_index", "timestamp", self.words)
        table = parquet_numbers(path, wanted)
        first = row["dataset_from_index"] - self.first[path] if self.v3 else 0
        end = first + T if self.v3 else None
        table = {name: column[first:end] for name, column in table.items()}
        if "episode_index" in table and (table["episode_index"] != self.numbered[i]).any():
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
        told = table.get(self.words, np.zeros(0)).reshape(-1)
        number = int(told[0]) if len(told) else None
        if (told != number).any():
            raise ValueError(f"field {self.words}: several tasks in one episode, split it")
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
                end = row.get(f"videos/{key}/to_timestamp") if self.v3 else None
                if end is not None and abs(end - start - T / self.fps) > 1.5 / self.fps:
                    raise ValueError(f"field {key}: {end - start:.2f} s of video for {T} steps")
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
            pairs = zip(spans, text, strict=True)
            rows = [(int(a), int(b), str(words)) for (a, b), words in pairs]
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
                for name, rows, n in zip(("robot_obs", "rel_actions"), (state, action), self.dims):
                    rows.append(file[name])
                    if rows[-1].shape != (n,):
                        raise ValueError(f"field {name} is {rows[-1].shape}, not {(n,)}")
        return np.stack(state), np.stack(action), words

    def frames(self, i):
        place, start, T = self.names[i], self.rows[i][0], self.lengths[i]
        return {key: Frames(f"{place}, field {key}", T, partial(npz_picture, self.root, start, key))
                for key in ("rgb_static", "rgb_gripper")}  # fmt: skip


class Libero:
    """LIBERO's .hdf5 files, made to look like the suites of SOURCES: cameras, pictures turned,
    state (xyz, axis-angle, two fingers) and gripper. What LIBERO's own script wrote has beside an
    action what was seen after it, so there the next action belongs to it. The instruction is the
    benchmark's, which is the file's name: the one inside names things otherwise."""

    gripper, fps, dims = "-1", 20.0, (8, 7)
    cameras = {"image": "agentview_rgb", "wrist_image": "eye_in_hand_rgb"}

    @staticmethod
    def files(root):
        return sorted(p for p in map(Path, files_of(root)) if p.suffix in (".hdf5", ".h5"))

    def __init__(self, root, source):
        h5py, self.rows, self.lengths, self.faults = need("h5py"), [], [], []
        for path in self.files(root):
            try:
                with reading(path), h5py.File(path) as file:
                    if path.stem.endswith("_demo"):
                        words = libero.sentence(path.stem.removesuffix("_demo"))
                    else:
                        words = file["data"].attrs["problem_info"]
                        words = json.loads(words)["language_instruction"]
                        words = " ".join(words) if isinstance(words, list) else words.strip('"')
                    late = int("macros_image_convention" in file["data"].attrs)  # its script's mark
                    for demo in sorted(file["data"], key=lambda name: int(name.split("_")[-1])):
                        self.lengths.append(len(file[f"data/{demo}/actions"]) - late)
                        self.rows.append((path, demo, words, late))
            except UserError as fault:
                self.faults.append(str(fault))
        self.names = [f"{path}, {demo}" for path, demo, *_ in self.rows]

    def numbers(self, i):
        path, demo, words, late = self.rows[i]
        file = opened(need("h5py").File, path, os.getpid())[f"data/{demo}"]
        state = [file[f"obs/{key}"][: -late or None] for key in ("ee_states", "gripper_states")]
        return np.concatenate(state, 1), file["actions"][late:], words

    def frames(self, i):
        path, demo, *_ = self.rows[i]
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


@contextmanager
def drafted(folder):
    """An empty folder that takes the place of `folder` if all goes well, and is gone if not."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    sweep(folder.parent)
    words = dict(prefix=f"{folder.name}.part-", dir=folder.parent, ignore_cleanup_errors=True)
    with tempfile.TemporaryDirectory(**words) as aside:
        draft = Path(aside, "store")
        draft.mkdir()
        yield draft
        with suppress(FileNotFoundError):
            os.replace(folder, Path(aside, "old"))
        try:
            os.replace(draft, folder)
        except OSError as error:  # another run that reads the same may have been faster
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise


def sweep(parent):
    """Removes what killed runs left of their drafts, after a day without a write."""
    for draft in parent.glob("*.part-????????/store"):
        with suppress(OSError):  # another run was faster
            last = max(path.stat().st_mtime for path in (draft, *draft.iterdir()))
            if time.time() - last > 86400:
                shutil.rmtree(draft.parent)


class Store:
    """What `write_store` left: numbers of whole episodes in flat files, pictures too if asked."""

    def __init__(self, root, source=None):
        index = read_json(root / "index.json")
        with reading(root / "index.json"):
            self.names, self.lengths, self.fps = index["names"], index["lengths"], index["fps"]
            self.dims, self.stats, self.kept = index["dims"], index["stats"], index["kept"]
            self.text, self.faults, sizes = index["text"], index["faults"], index["sizes"]
            self.starts, self.normalise = np.cumsum([0, *self.lengths]), index["normalise"]
            self.gripper = index.get("gripper", "")  # "1": read as open 1, closed 0
            shapes = {"state": (self.dims[0],), "action": (self.dims[1],)}
            shapes |= {camera: tuple(size) for camera, size in sizes.items()}
            if any("/" in name for name in shapes):
                raise ValueError("a camera's name has a /")
            counts = {len(self.lengths), len(self.names), len(self.text), len(self.kept)}
            fits = len(counts) == 1 and min([*self.lengths, self.fps]) > 0
            if not fits or not {"state", "action"} <= self.stats.keys():
                raise ValueError("its fields do not fit each other: write it again")
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
