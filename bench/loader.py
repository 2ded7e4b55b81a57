"""Samples a second of data.py's loader beside lerobot's own and a plain pyarrow + PyAV reader.

  python bench/loader.py [--lerobot-python PATH] [--workers 0,1,2 --episodes 100 --side 256]

Writes demonstrations of the tabletop as a LeRobot v3.0 dataset (two cameras, AV1, a key frame every
two, as lerobot encodes) and its frame store, then reads batches of 32 (two pictures, state, a chunk
of 16 actions) in random order from each, the readers taking turns. `--lerobot-python` names an
interpreter with `pip install lerobot==0.4.4`; without it that row is left out. "pictures float":
converted to what lerobot hands out, (B, 3, H, W) float32 in 0..1; "uint8": as scripts read them.
"copying alone": only the bytes of random pictures of the store, in one process: no loader that
copies them is faster; "memcpy": the same arrays from one end to the other. Scaling: what a reader
gains over itself without workers. Memory: what workers and parent hold for themselves, early and
late; and at the start, in the middle and at the end of a whole epoch from the store, with all that
they map (RSS) besides.
"""

import argparse
import gc
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

os.environ.setdefault("SVT_LOG", "1")  # the encoder says errors alone

import numpy as np  # noqa: E402
import torch  # noqa: E402
from PIL import Image  # noqa: E402
from study import append, machine  # noqa: E402
from torch.utils.data import DataLoader, Dataset  # noqa: E402

import common  # noqa: E402
import data  # noqa: E402
from parts import formats  # noqa: E402

BATCH, H, FPS = 32, 16, 10
CAMERAS = ("static", "wrist")
LIMITS = ("copying alone", "memcpy")  # physical ones


# --- the dataset ----------------------------------------------------------------------------------


def write_video(path, images):
    av = formats.need("av")
    path.parent.mkdir(parents=True)
    with av.open(str(path), "w") as file:
        stream = file.add_stream("libsvtav1", FPS, options={"g": "2", "crf": "30", "preset": "12"})
        stream.width, stream.height, stream.pix_fmt = images[0].shape[1], len(images[0]), "yuv420p"
        for image in images:
            file.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
        file.mux(stream.encode())


def write_meta(root, episodes, side):
    """info, stats, tasks and the table of episodes; everything lies in one file of each kind."""
    pa, pq = formats.need("pyarrow"), formats.need("pyarrow.parquet")
    words = sorted({e.instruction for e in episodes})
    video = {"dtype": "video", "shape": [side, side, 3], "names": ["height", "width", "channels"]}
    video["info"] = {"video.fps": FPS, "video.codec": "av1", "video.is_depth_map": False}
    keys = [f"observation.images.{camera}" for camera in CAMERAS]
    features = dict.fromkeys(keys, video)
    for name, kind, width in (
        ("observation.state", "float32", 8), ("action", "float32", 7), ("timestamp", "float32", 1),
        *((name, "int64", 1) for name in ("frame_index", "episode_index", "index", "task_index")),
    ):  # fmt: skip
        features[name] = {"dtype": kind, "shape": [width], "names": None}
    name = "chunk-{chunk_index:03d}/file-{file_index:03d}"
    total = sum(len(e.action) for e in episodes)
    info = {"codebase_version": "v3.0", "robot_type": "tabletop", "total_episodes": len(episodes),
            "total_frames": total, "total_tasks": len(words), "chunks_size": 1000, "fps": FPS,
            "data_files_size_in_mb": 100, "video_files_size_in_mb": 200, "features": features,
            "splits": {"train": f"0:{len(episodes)}"}, "data_path": f"data/{name}.parquet",
            "video_path": f"videos/{{video_key}}/{name}.mp4"}  # fmt: skip
    (root / "meta/episodes/chunk-000").mkdir(parents=True)
    (root / "meta/info.json").write_text(json.dumps(info))
    (root / "meta/stats.json").write_text("{}")
    # lerobot reads this one with pandas, whose index the words are
    about = [dict(name=n, field_name=n or "__index_level_0__", pandas_type=kind, numpy_type=word,
                  metadata=None) for n, kind, word in (("task_index", "int64", "int64"),
                                                       (None, "unicode", "object"))]  # fmt: skip
    index = {"index_columns": ["__index_level_0__"], "columns": about, "column_indexes": []}
    tasks = pa.table({"task_index": range(len(words)), "__index_level_0__": words})
    tasks = tasks.replace_schema_metadata({"pandas": json.dumps(index)})
    pq.write_table(tasks, root / "meta/tasks.parquet")
    rows, start = [], 0
    for number, e in enumerate(episodes):
        end = start + len(e.action)
        row = {"episode_index": number, "tasks": [e.instruction], "length": len(e.action),
               "data/chunk_index": 0, "data/file_index": 0, "dataset_from_index": start,
               "dataset_to_index": end}  # fmt: skip
        for key in keys:
            row |= {f"videos/{key}/chunk_index": 0, f"videos/{key}/file_index": 0}
            row |= {f"videos/{key}/from_timestamp": start / FPS}
            row |= {f"videos/{key}/to_timestamp": end / FPS}
        rows, start = [*rows, row], end
    pq.write_table(pa.Table.from_pylist(rows), root / "meta/episodes/chunk-000/file-000.parquet")
    return words


def make(root, count, side):
    """Demonstrations -> a LeRobot v3.0 dataset, pictures enlarged to side x side."""
    pa, pq = formats.need("pyarrow"), formats.need("pyarrow.parquet")
    episodes = [data.record("tabletop:bridge", seed, 64, 32, 0.3) for seed in range(count)]
    words = write_meta(root, episodes, side)
    column, lengths = {}, [len(e.action) for e in episodes]
    for name, kind in (("observation.state", "state"), ("action", "action")):
        x = np.concatenate([getattr(e, kind) for e in episodes]).astype(np.float32)
        column[name] = pa.FixedSizeListArray.from_arrays(pa.array(x.ravel()), x.shape[1])
    frames = np.concatenate([np.arange(n) for n in lengths])
    column["timestamp"] = pa.array((frames / FPS).astype(np.float32))
    column["frame_index"] = pa.array(frames)
    column["episode_index"] = pa.array(np.repeat(np.arange(count), lengths))
    column["index"] = pa.array(np.arange(len(frames)))
    said = [words.index(e.instruction) for e in episodes]
    column["task_index"] = pa.array(np.repeat(said, lengths))
    (root / "data/chunk-000").mkdir(parents=True)
    pq.write_table(pa.table(column), root / "data/chunk-000/file-000.parquet")
    for camera in CAMERAS:
        small = [Image.fromarray(image) for e in episodes for image in e.images[camera]]
        images = [np.asarray(s.resize((side, side), Image.Resampling.BICUBIC)) for s in small]
        write_video(root / f"videos/observation.images.{camera}/chunk-000/file-000.mp4", images)


# --- the readers ----------------------------------------------------------------------------------


def collate(samples, to_float):
    """Samples of `Windows.get` -> one batch of tensors."""
    batch = {name: torch.from_numpy(np.stack([s[name] for s in samples])) for name in ("state",
             "action", "mask")}  # fmt: skip
    for camera, images in zip(CAMERAS, zip(*(s["images"] for s in samples))):
        x = torch.from_numpy(np.stack(images))
        batch[camera] = x.permute(0, 3, 1, 2).float().div_(255) if to_float else x
    return batch | {"instruction": [s["instruction"] for s in samples]}


class Collate:
    def __init__(self, to_float):
        self.to_float = to_float

    def __call__(self, samples):
        return collate(samples, self.to_float)


def ours(path, to_float, workers, steps):
    """data.py's own way, as the scripts use it."""
    torch.set_num_threads(1)
    episodes = data.open_episodes(str(path))
    windows = data.Windows(episodes, data.statistics(episodes), H)
    batches = data.Batches([data.Mixture([windows])], Collate(to_float), BATCH)
    return DataLoader(batches, batch_size=None, sampler=range(steps), num_workers=workers)


class Plain(Dataset):
    """What one writes in an afternoon: numbers in memory, each picture looked up in the video."""

    def __init__(self, root):
        table = formats.need("pyarrow.parquet").read_table(root / "data/chunk-000/file-000.parquet")
        read = {name: table[name].to_pylist() for name in ("observation.state", "action")}
        self.state, self.action = (np.array(x, np.float32) for x in read.values())
        self.episode, self.root = table["episode_index"].to_numpy(), root
        self.av, self.files = formats.need("av"), {}

    def __len__(self):
        return len(self.state)

    def picture(self, camera, index):
        if camera not in self.files:
            place = self.root / f"videos/observation.images.{camera}/chunk-000/file-000.mp4"
            self.files[camera] = self.av.open(str(place))
        file = self.files[camera]
        stream = file.streams.video[0]
        file.seek(int(index / FPS / stream.time_base), stream=stream)
        for frame in file.decode(stream):
            if frame.time > (index - 0.5) / FPS:
                return torch.from_numpy(frame.to_ndarray(format="rgb24")).permute(2, 0, 1) / 255

    def __getitem__(self, index):
        last = np.flatnonzero(self.episode == self.episode[index])[-1]
        steps = np.arange(index, index + H)
        sample = {camera: self.picture(camera, index) for camera in CAMERAS}
        action = self.action[np.minimum(steps, last)]
        return sample | {"state": self.state[index], "action": action, "mask": steps <= last}


def plain(root, workers):
    return DataLoader(Plain(root), BATCH, shuffle=True, num_workers=workers)


def held(pid, field="RssAnon"):
    """Bytes that a process and its children hold, by default without mapped files."""
    found, proc = 0, Path("/proc")
    for process in (pid, *children(pid)):
        status = proc / str(process) / "status"
        lines = status.read_text().splitlines() if status.exists() else []
        found += sum(1024 * int(line.split()[1]) for line in lines if line.startswith(field))
    return found


def children(pid):
    place = Path(f"/proc/{pid}/task/{pid}/children")
    return [int(word) for word in place.read_text().split()] if place.exists() else []


def timed(loader, seconds, watch=None):
    """-> samples a second over about `seconds`, after three batches; (memory early, late)."""
    gc.collect()  # a forked worker that frees this process's old decoder waits for its threads
    batches, memory, count = iter(loader), [], 0
    for _ in range(3):
        next(batches, None)
    began = time.perf_counter()
    for batch in batches:
        count += len(batch["state"] if "state" in batch else batch["observation.state"])
        if watch and count % (8 * BATCH) == 0:
            memory.append(held(watch))
        if time.perf_counter() - began > seconds:
            break
    if not count:
        raise common.UserError("--episodes: too few, a reader was through with them at once")
    return count / (time.perf_counter() - began), memory


def epoch(store, workers):
    """Every sample of the store once -> [(bytes held, RSS)] at its start, middle and end."""
    steps = len(ours(store, False, 0, 1).dataset.mixtures[0].parts[0]) // BATCH
    batches, found = iter(ours(store, False, workers, steps)), []
    for i in range(steps):
        next(batches)
        if i in (min(3, steps // 4), steps // 2, steps - 1):  # the first fill buffers
            found.append((held(os.getpid()), held(os.getpid(), "VmRSS")))
    return found


def copying(store, seconds):
    """Samples a second if nothing but the bytes of the pictures had to be copied."""
    arrays = [np.asarray(store.arrays[camera]) for camera in CAMERAS]
    rng, count, began = np.random.default_rng(0), 0, time.perf_counter()
    out = np.empty((BATCH, len(arrays), *arrays[0].shape[1:]), np.uint8)
    while time.perf_counter() - began < seconds:
        for b, i in enumerate(rng.integers(len(arrays[0]), size=BATCH)):
            for c, array in enumerate(arrays):
                out[b, c] = array[i]
        count += BATCH
    return count / (time.perf_counter() - began)


def memcpy(store, seconds):
    """-> bytes a second of copying the pictures from one end to the other, bytes of a sample."""
    arrays = [np.asarray(store.arrays[camera]) for camera in CAMERAS]
    out, count = [np.empty_like(array) for array in arrays], 0
    for a, b in zip(out, arrays):  # both are in memory from here on
        np.copyto(a, b)
    began = time.perf_counter()
    while time.perf_counter() - began < seconds:
        for a, b in zip(out, arrays):
            np.copyto(a, b)
            count += b.nbytes
    return count / (time.perf_counter() - began), sum(array[0].nbytes for array in arrays)


class Lerobot:
    """lerobot's LeRobotDataset and torch's DataLoader, in a process of their own."""

    def __init__(self, python, root):
        command = [python, str(ROOT / "bench" / "loader_lerobot.py"), str(root)]
        calm = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
        pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=calm)
        self.process = subprocess.Popen(command, **pipes)
        self.about = self.ask("about")

    def ask(self, *words):
        print(json.dumps(words), file=self.process.stdin, flush=True)
        for line in self.process.stdout:
            if line.startswith("answer "):
                return json.loads(line[7:])
        raise common.UserError("--lerobot-python: it ended; its own message is above")


def same_pictures(root, lerobot):
    """Mean distance, in levels of 255, of our pictures and states to lerobot's, some samples."""
    episodes = data.open_episodes(str(root))
    windows, found = data.Windows(episodes, data.statistics(episodes), H), []
    for index in range(0, len(windows), max(1, len(windows) // 20)):
        with tempfile.NamedTemporaryFile(suffix=".npz") as file:
            lerobot.ask("show", index, file.name)
            theirs = np.load(file.name)
            episode, t = windows.find(index)
            for camera in CAMERAS:
                found.append(
                    np.abs(theirs[camera] - episode.images[camera][t].astype(float)).mean()
                )
            assert np.array_equal(theirs["state"], episode.state[t])
            steps = np.minimum(np.arange(t, t + H), len(episode.action) - 1)
            assert np.array_equal(theirs["action"], episode.action[steps])
    return max(found)


def arguments(words):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--episodes", type=int, default=100)
    parser.add_argument("--side", type=int, default=256)
    parser.add_argument("--workers", default="0,1,2")
    parser.add_argument("--seconds", type=float, default=3.0, help="of each measurement")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--lerobot-python", default="", help="an interpreter that has lerobot")
    parser.add_argument("--folder", default="", help="keep the dataset here, and use it again")
    parser.add_argument("--note", default="", help="said beside the numbers")
    return parser.parse_args(words)


def main():
    args = arguments(sys.argv[1:])
    with tempfile.TemporaryDirectory() as scratch:
        run(args, Path(args.folder or scratch))


def run(args, folder):
    root, store = folder / "set", folder / "store"
    if not (root / "meta/info.json").exists():
        make(root, args.episodes, args.side)
    if not store.exists():
        data.write_store(data.open_episodes(str(root)), store, pictures=True)
    lerobot = Lerobot(args.lerobot_python, root) if args.lerobot_python else None
    if lerobot:
        distance = same_pictures(root, lerobot)
        print(f"{lerobot.about}; its numbers are ours, its pictures {distance:.2f} of 255 away")
        lerobot.process.kill()
    epochs, me = 1000 * 1000, os.getpid()
    found, memory = {}, {}
    for workers in map(int, args.workers.split(",")):
        readers = {
            "store, uint8": lambda w=workers: ours(store, False, w, epochs),
            "store, pictures float": lambda w=workers: ours(store, True, w, epochs),
            "video, pictures float": lambda w=workers: ours(root, True, w, epochs),
            "pyarrow + PyAV": lambda w=workers: plain(root, w),
        }
        if lerobot:  # anew: workers that fork from a process that has decoded share its decoder
            lerobot = Lerobot(args.lerobot_python, root)
        for _ in range(args.rounds):
            for name, reader in readers.items():
                rate, seen = timed(reader(), args.seconds, me)
                found.setdefault((name, workers), []).append(rate)
                memory.setdefault((name, workers), []).extend(seen)
            if lerobot:
                rate = lerobot.ask("time", workers, args.seconds)
                found.setdefault(("lerobot", workers), []).append(rate)
            if workers == 0:
                rate = copying(data.Store(store), args.seconds)
                found.setdefault(("copying alone", 0), []).append(rate)
                rate, size = memcpy(data.Store(store), args.seconds)
                found.setdefault(("memcpy", 0), []).append(rate / size)
        if lerobot:
            lerobot.process.kill()
    report(args, found, memory, lerobot)
    for workers in map(int, args.workers.split(",")):
        marks = epoch(store, workers)
        own, whole = ([round(x / 1e6) for x in column] for column in zip(*marks))
        grows = own[-1] / own[0] - 1
        words = "at the start, in the middle, at the end"
        print(f"an epoch from the store, {workers} workers: {own} MB held {words} ({grows:+.1%}), "
              f"RSS {whole} MB")  # fmt: skip
        row = {"reader": "store, uint8, an epoch", "workers": workers, "held_mb": own}
        row |= {"rss_mb": whole, "grows": round(grows, 3), "note": args.note}
        append("loader", row | {"episodes": args.episodes, "side": args.side, "batch": BATCH})
    print(f"{args.episodes} episodes, {args.side} px; {machine()}; {args.note}")


def report(args, found, memory, lerobot):
    print(f"{'reader':24} {'workers':>7} {'samples/s':>10} {'of lerobot':>11} {'scaling':>8}   "
          "private MB")  # fmt: skip
    pictures = len(CAMERAS) * args.side**2 * 3
    for (name, workers), rates in found.items():
        row = {"reader": name, "workers": workers, "samples_s": round(statistics.median(rates), 1)}
        ratio, gain = "", row["samples_s"] * pictures / 1e9
        row["gb_s"] = round(gain, 3)
        gain = f"{gain:.2f} GB/s" if name in LIMITS else ""
        if workers and (name, 0) in found:
            row["scaling"] = round(row["samples_s"] / statistics.median(found[name, 0]), 2)
            gain = f"{row['scaling']:.2f} x"
        if lerobot and name not in LIMITS:
            pairs = zip(rates, found["lerobot", workers])
            row["of_lerobot"] = round(statistics.median(a / b for a, b in pairs), 2)
            ratio = f"{row['of_lerobot']:.1f} x"
        words = ""
        if mine := memory.get((name, workers)):
            row["private_mb"] = [round(mine[0] / 1e6), round(mine[-1] / 1e6)]
            words = "{} to {}".format(*row["private_mb"])
        print(f"{name:24} {workers:7} {row['samples_s']:10.1f} {ratio:>11} {gain:>10}   {words}")
        about = {"lerobot": lerobot.about if lerobot else None, "note": args.note}
        about |= {"episodes": args.episodes, "side": args.side, "batch": BATCH}
        append("loader", row | about)


if __name__ == "__main__":
    common.run_main(main)
