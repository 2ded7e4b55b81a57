"""data.py: recordings in the formats of others. Each dataset here is written from its layout."""

import base64
import io
import json
import os
import pickle
import re
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

import data
from common import Dist, UserError
from parts import asked, formats
from worlds import events

TASKS = ["push the red block", "open the drawer"]
LENGTHS = [5, 7, 4, 6]
SIZE = 32  # of the pictures


@pytest.fixture(autouse=True)
def places(tmp_path, monkeypatch):
    monkeypatch.setattr(data, "CACHE", tmp_path / "cache")
    monkeypatch.setattr(formats, "DATA", tmp_path / "data")
    monkeypatch.chdir(tmp_path)


def picture(episode, t, camera=0):
    """A picture that tells its episode, step and camera, also after a video codec."""
    image = np.zeros((SIZE, SIZE, 3), np.uint8)
    image[: SIZE // 2] = 40 * episode + 20, 30 * t + 20, 120 * camera + 40
    image[SIZE // 2 :, : SIZE // 2] = 200
    return image


def png(image):
    file = io.BytesIO()
    Image.fromarray(image).save(file, "png")
    return file.getvalue()


def numbers(episode, T, width):
    rng = np.random.default_rng([episode, width])
    return rng.normal(size=(T, width)).astype(np.float32)


def close(one, other):
    return np.abs(one.astype(int) - other.astype(int)).mean() < 12


# --- writers --------------------------------------------------------------------------------------


def write_video(path, images, fps=10, codec="mpeg4", **options):
    av = pytest.importorskip("av")
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w") as file:
        stream = file.add_stream(codec, fps, options=options)
        stream.width = stream.height = SIZE
        stream.pix_fmt, stream.gop_size, stream.bit_rate = "yuv420p", 3, 4_000_000
        for image in images:
            file.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
        file.mux(stream.encode())


def columns(episode, T, cameras, first=0, fixed=False, frame_index=True, dims=(8, 7), A=None):
    """A parquet table of one episode; cameras: those whose pictures are in it."""
    pa = pytest.importorskip("pyarrow")

    def rows(x):
        if fixed:
            flat = pa.array(x.ravel(), pa.float32())
            return pa.FixedSizeListArray.from_arrays(flat, x.shape[1])
        return pa.array(list(x), pa.list_(pa.float32()))

    out = {
        "observation.state": rows(numbers(episode, T, dims[0])),
        "action": rows(numbers(episode, T, dims[1]) if A is None else A),
        "timestamp": pa.array(np.arange(T, dtype=np.float32) / 10),
        "episode_index": pa.array([episode] * T, pa.int64()),
        "index": pa.array(range(first, first + T), pa.int64()),
        "task_index": pa.array([episode % 2] * T, pa.int64()),
    }
    if frame_index:
        out["frame_index"] = pa.array(range(T), pa.int64())
    for camera, key in cameras:
        cells = [{"bytes": png(picture(episode, t, camera)), "path": ""} for t in range(T)]
        out[key] = pa.array(cells, pa.struct([("bytes", pa.binary()), ("path", pa.string())]))
    return pa.table(out)


KEYS = ["observation.images.front", "observation.images.wrist"]


def info(root, version, video, dims=(8, 7), **more):
    kind = "video" if video else "image"
    features = {key: {"dtype": kind, "shape": [SIZE, SIZE, 3], "names": None} for key in KEYS}
    features["observation.state"] = {"dtype": "float32", "shape": [dims[0]], "names": None}
    features["action"] = {"dtype": "float32", "shape": [dims[1]], "names": {"motors": []}}
    about = {"codebase_version": version, "fps": 10, "chunks_size": 2, "features": features} | more
    (root / "meta").mkdir(parents=True, exist_ok=True)
    (root / "meta/info.json").write_text(json.dumps(about))


def lines(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def write_v2(root, video, version="v2.1", **how):
    """Two episodes to a chunk; how: see `columns`."""
    pq = pytest.importorskip("pyarrow.parquet")
    name = "episode_{episode_index:06d}"
    info(root, version, video, how.get("dims", (8, 7)),
         data_path="data/chunk-{episode_chunk:03d}/" + name + ".parquet",
         video_path="videos/chunk-{episode_chunk:03d}/{video_key}/" + name + ".mp4")  # fmt: skip
    lines(root / "meta/tasks.jsonl", [{"task_index": i, "task": t} for i, t in enumerate(TASKS)])
    lines(root / "meta/episodes.jsonl", [{"episode_index": e, "tasks": [TASKS[e % 2]], "length": T}
                                         for e, T in enumerate(LENGTHS)])  # fmt: skip
    for e, T in enumerate(LENGTHS):
        chunk = f"chunk-{e // 2:03d}"
        (root / "data" / chunk).mkdir(parents=True, exist_ok=True)
        table = columns(e, T, [] if video else list(enumerate(KEYS)), **how)
        pq.write_table(table, root / f"data/{chunk}/episode_{e:06d}.parquet")
        for c, key in enumerate(KEYS if video else []):
            path = root / f"videos/{chunk}/{key}/episode_{e:06d}.mp4"
            write_video(path, [picture(e, t, c) for t in range(T)])
    return root


def write_v3(root, video, **how):
    """Data files hold episodes (0, 1), (2, 3); video files (0), (1, 2), (3)."""
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    name = "file-{file_index:03d}"
    info(root, "v3.0", video,
         data_path="data/chunk-{chunk_index:03d}/" + name + ".parquet",
         video_path="videos/{video_key}/chunk-{chunk_index:03d}/" + name + ".mp4")  # fmt: skip
    starts = np.cumsum([0, *LENGTHS]).tolist()
    table = pa.table({"task_index": [0, 1], "__index_level_0__": TASKS})
    pq.write_table(table, root / "meta/tasks.parquet")
    rows, in_video = [], [(0, 0), (1, 0), (1, LENGTHS[1]), (2, 0)]
    for e, T in enumerate(LENGTHS):
        row = {"episode_index": e, "tasks": [TASKS[e % 2]], "length": T, "stats/x": [0.0],
               "dataset_from_index": starts[e], "dataset_to_index": starts[e + 1],
               "data/chunk_index": 0, "data/file_index": e // 2}  # fmt: skip
        for key in KEYS if video else []:
            file, before = in_video[e]
            row |= {f"videos/{key}/chunk_index": 0, f"videos/{key}/file_index": file,
                    f"videos/{key}/from_timestamp": before / 10,
                    f"videos/{key}/to_timestamp": (before + T) / 10}  # fmt: skip
        rows.append(row)
    for k in (0, 1):  # two files of episodes as well
        path = root / f"meta/episodes/chunk-000/file-{k:03d}.parquet"
        path.parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(pa.Table.from_pylist(rows[2 * k : 2 * k + 2]), path)
        inside = [] if video else list(enumerate(KEYS))
        both = [columns(e, LENGTHS[e], inside, starts[e], **how) for e in (2 * k, 2 * k + 1)]
        path = root / f"data/chunk-000/file-{k:03d}.parquet"
        path.parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(pa.concat_tables(both), path, row_group_size=4)  # groups cut episodes
    for c, key in enumerate(KEYS if video else []):
        for f, held in enumerate([[0], [1, 2], [3]]):
            images = [picture(e, t, c) for e in held for t in range(LENGTHS[e])]
            write_video(root / f"videos/{key}/chunk-000/file-{f:03d}.mp4", images)
    return root


def write_calvin(root, annotated=True, protocol=4):
    for split, first in (("training", 100), ("validation", 500)):
        folder = root / split
        (folder / "lang_annotations").mkdir(parents=True)
        for t in range(first, first + 12):
            np.savez_compressed(
                folder / f"episode_{t:07d}.npz", rgb_static=picture(t % 4, t % 5),
                rgb_gripper=picture(t % 4, t % 5, 1)[:20, :20], robot_obs=numbers(t, 1, 15)[0],
                rel_actions=np.r_[numbers(t, 1, 6)[0], 1.0 if t % 2 else -1.0])  # fmt: skip
        np.save(folder / "ep_start_end_ids.npy", np.array([[first, first + 11]]))
        note = {"language": {"ann": TASKS, "task": ["push", "open"], "emb": np.zeros((2, 1, 3))},
                "info": {"indx": [(first, first + 3), (first + 4, first + 9)],
                         "episodes": []}}  # fmt: skip
        if annotated:
            save_object(folder / "lang_annotations/auto_lang_ann.npy", note)
        scenes = {"calvin_scene_A": [first, first + 3], "calvin_scene_B": [first + 4, first + 11]}
        save_object(folder / "scene_info.npy", scenes)
    return root


def save_object(path, what):
    np.save(path, np.array(what, dtype=object), allow_pickle=True)


def write_libero(root, demos=2):
    h5py = pytest.importorskip("h5py")
    root.mkdir(parents=True, exist_ok=True)
    for k, task in enumerate(TASKS):
        with h5py.File(root / f"task_{k}_demo.hdf5", "w") as file:
            group = file.create_group("data")
            group.attrs["problem_info"] = json.dumps({"language_instruction": f'"{task}"'})
            for d in range(demos):
                T, demo = LENGTHS[d], group.create_group(f"demo_{d}")
                action = numbers(d, T, 7).astype(np.float64)
                action[:, -1] = np.where(np.arange(T) < 2, -1, 1)  # open, then closed
                demo["actions"] = action
                demo["obs/ee_states"] = numbers(d, T, 6)
                demo["obs/gripper_states"] = np.ones((T, 2))
                for c, name in enumerate(("agentview_rgb", "eye_in_hand_rgb")):
                    demo[f"obs/{name}"] = np.stack([picture(d, t, c) for t in range(T)])
    return root


# --- LeRobot --------------------------------------------------------------------------------------

LEROBOT = {
    "v2.0-video": lambda root: write_v2(root, True, "v2.0", frame_index=False),
    "v2.1-images": lambda root: write_v2(root, False, fixed=True),
    "v3.0-video": lambda root: write_v3(root, True, fixed=True),
    "v3.0-images": lambda root: write_v3(root, False, frame_index=False),
}


@pytest.mark.parametrize("frame_index", [True, False], ids=["", "no frame_index"])
@pytest.mark.parametrize("fixed", [True, False], ids=["fixed-size", "list"])
@pytest.mark.parametrize("video", [True, False], ids=["video", "images"])
@pytest.mark.parametrize("version", ["v2.0", "v2.1", "v3.0"])
def test_every_kind_of_lerobot(version, video, fixed, frame_index, tmp_path):
    how = {"fixed": fixed, "frame_index": frame_index}
    if version == "v3.0":
        root = write_v3(tmp_path / "set", video, **how)
    else:
        root = write_v2(tmp_path / "set", video, version, **how)
    episodes = data.open_episodes(root)
    assert len(episodes) == len(LENGTHS) == len(list(episodes))
    assert episodes.lengths == LENGTHS
    for e in (2, 0, 3, 1):
        episode, T = episodes[e], LENGTHS[e]
        assert np.array_equal(episode.state, numbers(e, T, 8))
        assert np.array_equal(episode.action, numbers(e, T, 7))
        assert episode.action.dtype == np.float32 and episode.fps == 10
        assert episode.instruction == TASKS[e % 2] and list(episode.images) == ["front", "wrist"]
        for c, frames in enumerate(episode.images.values()):
            assert len(frames) == T
            for t in [*range(T), 0, T - 1, -1]:  # forwards and back
                assert frames[t].dtype == np.uint8 and frames[t].shape == (SIZE, SIZE, 3)
                assert close(frames[t], picture(e, t % T, c)), (e, t)
            assert frames[1:3].shape == (2, SIZE, SIZE, 3)
    with pytest.raises(IndexError):
        episodes[4]


OPEN = "open-gop=1:keyint=12:min-keyint=12:scenecut=0:bframes=3:b-adapt=0"


@pytest.mark.parametrize("codec, options", [
    ("mpeg4", {}), ("libx264", {}), ("libx264", {"x264-params": OPEN}),
    ("libx265", {"x265-params": OPEN + ":log-level=none"}),
])  # fmt: skip
def test_a_whole_video_is_read_in_any_order(codec, options, tmp_path):
    av = pytest.importorskip("av")
    try:
        av.Codec(codec, "w")
    except ValueError:  # what `av` raises for a codec that it was built without
        pytest.skip(f"this av was built without {codec}")
    images = [picture(t % 4, t % 6) for t in range(40)]
    write_video(tmp_path / "a.mp4", images, codec=codec, **options)
    video = formats.Video(tmp_path / "a.mp4")
    for t in np.random.default_rng(0).permutation(40):
        assert close(video.at(t / 10, 0.05), images[t]), t


@pytest.mark.parametrize("name", ["v21_image", "v30_video"])
def test_what_lerobots_own_writer_left(name):
    root = Path(os.environ.get("ONEFILE_VLA_SAMPLES", "")) / name
    if not root.exists():
        pytest.skip(f"ONEFILE_VLA_SAMPLES has no {name}, a small dataset that lerobot itself wrote")
    (part,) = data.load(str(root))
    assert len(part.episodes) == 10 and sum(part.episodes.lengths) == 345
    for episode in part.episodes:
        assert list(episode.images) == ["front", "wrist"] and episode.instruction
        assert episode.state.shape[1] == 8 and episode.action.shape[1] == 7
        assert all(frames[len(frames) // 2].shape == (96, 96, 3)
                   for frames in episode.images.values())  # fmt: skip


@pytest.mark.parametrize("kind", ["v2.1-images", "v3.0-video"])
def test_windows_of_a_recording(kind, tmp_path):
    episodes = data.open_episodes(LEROBOT[kind](tmp_path / "set"))
    stats = data.statistics(episodes)
    pairs = [(numbers(e, T, 8), numbers(e, T, 7)) for e, T in enumerate(LENGTHS)]
    eager = [data.Episode({}, state, action, "") for state, action in pairs]
    assert stats == data.statistics(eager)  # over all steps, to the last bit
    windows = data.Windows(episodes, stats, 3, augment=2, sides=(64, 16))
    assert len(windows) == sum(LENGTHS)
    mixture = data.Mixture([windows], seed=0)
    sample = mixture[5]
    assert [image.shape for image in sample["images"]] == [(64, 64, 3), (16, 16, 3)]
    assert sample["state"].shape == (8,)
    again = data.open_episodes(tmp_path / "set")
    again = data.Windows(again, stats, 3, augment=2, sides=(64, 16))
    for i in range(8):
        one, other = mixture[i], data.Mixture([again], seed=0)[i]
        assert all(np.array_equal(a, b) for a, b in zip(one["images"], other["images"]))
        assert np.array_equal(one["action"], other["action"]) and one["mask"].any()


def test_the_parts_of_gr1(tmp_path, monkeypatch):
    root = write_v2(tmp_path / "gr1_set", False, frame_index=False, dims=(9, 6))
    slices = {"left": {"start": 0, "end": 2}, "legs": {"start": 2, "end": 4},
              "right": {"start": 4, "end": 6}}  # fmt: skip
    modality = {"state": slices, "action": slices, "annotation": {"human.coarse_action": {}}}
    (root / "meta/modality.json").write_text(json.dumps(modality))
    row = data.Source("me/gr1_set", ("wrist",), parts=("right", "left"))
    monkeypatch.setitem(data.SOURCES, "mine", row)
    (tmp_path / "data").mkdir()
    root.rename(tmp_path / "data" / "gr1_set")
    episode = data.open_episodes("mine")[1]
    assert list(episode.images) == ["wrist"] and episode.state.shape == (7, 4)
    assert np.array_equal(episode.action, numbers(1, 7, 6)[:, [4, 5, 0, 1]])


def test_the_cameras_of_modality_json(tmp_path, monkeypatch):
    root = write_v2(tmp_path / "data/seen", False)
    video = {"ego_view": {"original_key": KEYS[0]}, "hand/left": {"original_key": "none such"}}
    (root / "meta/modality.json").write_text(json.dumps({"video": video}))
    for camera, index in (("ego_view", 0), ("front", 0), ("wrist", 1)):  # by its own name as well
        monkeypatch.setitem(data.SOURCES, "mine", data.Source("me/seen", (camera,)))
        (frames,) = data.open_episodes("mine")[1].images.values()
        assert np.array_equal(frames[2], picture(1, 2, index))
    monkeypatch.delitem(data.SOURCES, "mine")
    assert list(data.open_episodes(root)[0].images) == ["ego_view", "wrist"]
    for bad in ({"a/b": {"original_key": KEYS[0]}}, {"ego_view": 3}):
        (root / "meta/modality.json").write_text(json.dumps({"video": bad}))
        with pytest.raises(UserError, match="a name with a /|modality.json, video"):
            data.open_episodes(root)


def change_columns(path, drop=(), **more):
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    table = pq.read_table(path).drop_columns(list(drop))
    for name, cells in more.items():
        table = table.append_column(name, pa.array(cells))
    pq.write_table(table, path)


@pytest.mark.parametrize("kind", ["v2.1-images", "v3.0-images"])
def test_columns_that_are_not_needed(kind, tmp_path):
    root = LEROBOT[kind](tmp_path / "set")
    want = [(e.action, e.instruction) for e in data.open_episodes(root)]
    for path in root.glob("data/*/*.parquet"):
        rows = pytest.importorskip("pyarrow.parquet").read_metadata(path).num_rows
        uneven = [[1.0] * (t % 3) for t in range(rows)]
        change_columns(path, ["episode_index", "timestamp"], subgoals=uneven)
    formats.parquet_numbers.cache_clear()
    for episode, (action, words) in zip(data.load(str(root))[0].episodes, want, strict=True):
        assert np.array_equal(episode.action, action) and episode.instruction == words


def test_gripper_signs_become_one(tmp_path, monkeypatch):
    root = write_v2(tmp_path / "signed", False)
    raw = [data.open_episodes(root)[0].action[:, -1]]
    for sign, want in (("1", raw[0]), ("+1", (1 + raw[0]) / 2), ("-1", (1 - raw[0]) / 2)):
        monkeypatch.setitem(data.SOURCES, "mine", data.Source("me/signed", gripper=sign))
        episodes = data.open_episodes(root)
        for _ in range(2):  # before and after the statistics, which are of what is trained on
            assert np.allclose(episodes[0].action[:, -1], want)
            stats = data.statistics(episodes)
        assert stats["action"]["max"][-1] == max(e.action[:, -1].max() for e in episodes)


# --- CALVIN, LIBERO, the tabletop -----------------------------------------------------------------


@pytest.mark.parametrize("split", ["training", "validation", ""])
def test_calvin(split, tmp_path):
    episodes = data.open_episodes(write_calvin(tmp_path / "task_ABC_D") / split)
    first = 500 if split == "validation" else 100
    assert episodes.lengths == [4, 6] and [e.instruction for e in episodes] == TASKS
    for k, start in enumerate((first, first + 4)):
        for t, frame in enumerate(range(start, start + episodes.lengths[k])):
            episode = episodes[k]
            assert np.array_equal(episode.images["rgb_static"][t], picture(frame % 4, frame % 5))
            assert episode.images["rgb_gripper"][t].shape == (20, 20, 3)
            assert np.array_equal(episode.state[t], numbers(frame, 1, 15)[0])
            assert np.array_equal(episode.action[t, :6], numbers(frame, 1, 6)[0])
            assert episode.action[t, 6] == frame % 2  # 1 open
    assert data.statistics(episodes)["action"]["min"][6] == 0


def test_calvin_scenes_and_play(tmp_path, monkeypatch):
    root = write_calvin(tmp_path / "data/task_ABC_D")
    row = data.SOURCES["calvin_abc_d"]
    assert len(data.open_episodes("calvin_abc_d")) == 2
    monkeypatch.setitem(data.SOURCES, "calvin_b", data.Source(row.hub, scenes=("calvin_scene_B",)))
    assert [e.instruction for e in data.open_episodes("calvin_b")] == TASKS[1:]
    (root / "training/lang_annotations/auto_lang_ann.npy").unlink()
    assert data.open_episodes(root / "training").lengths == [12]  # play, without words


def test_libero(tmp_path):
    root = write_libero(tmp_path / "libero_goal")
    for path, count in ((root, 4), (root / "task_0_demo.hdf5", 2)):
        episodes = data.open_episodes(path)
        assert [e.instruction for e in episodes] == ["task 0", "task 0", "task 1", "task 1"][:count]
        episode = episodes[1]
        assert list(episode.images) == ["image", "wrist_image"]
        assert np.array_equal(episode.images["image"][3], picture(1, 3)[::-1, ::-1])
        assert episode.action[:, -1].tolist() == [1, 1, 0, 0, 0, 0, 0]  # 1 open
        assert episode.state.shape == (7, 8) and (episode.state[:, 6:] == 1).all()


@pytest.mark.parametrize("inside", [True, False], ids=["", "no problem_info"])
def test_liberos_words_are_the_benchmarks(inside, tmp_path):
    """They are the file's name; the file names things otherwise, or (rewritten ones) not at all."""
    root = write_libero(tmp_path / "libero_goal")
    name = "KITCHEN_SCENE3_put_the_bowl_on_top_of_the_cabinet"
    (root / "task_0_demo.hdf5").rename(root / f"{name}_demo.hdf5")
    (root / "task_1_demo.hdf5").rename(root / "mine.hdf5")
    if not inside:
        with pytest.importorskip("h5py").File(root / f"{name}_demo.hdf5", "a") as file:
            del file["data"].attrs["problem_info"]
    words = {e.instruction for e in data.open_episodes(root)}
    assert words == {"put the bowl on top of the cabinet", TASKS[1]}


@pytest.mark.parametrize("mark", ["is_depth_map", "video.is_depth_map"])
@pytest.mark.parametrize("place", ["info", "video_info"])
def test_depth_is_no_camera(mark, place, tmp_path):
    root = write_v2(tmp_path / "deep", False)
    about = json.loads((root / "meta/info.json").read_text())
    about["features"][KEYS[1]] |= {"info": {"video.fps": 10}} | {place: {mark: True}}
    (root / "meta/info.json").write_text(json.dumps(about))
    assert list(data.open_episodes(root)[0].images) == ["front"]


def test_whether_a_gripper_is_known(tmp_path, monkeypatch):
    """Of a LeRobot dataset only a row of SOURCES knows; a store knows what its dataset knew."""
    root = write_v2(tmp_path / "signed", False)
    cfg = SimpleNamespace(data="", world="", skip_bad=False, normalise="auto")

    def known():
        (part,), _ = data.recordings(cfg, Dist(0, 1, None))
        return part.stats["gripper"]

    for sign, want in (("", ""), ("-1", "unit")):
        monkeypatch.setitem(data.SOURCES, "mine", data.Source("me/signed", gripper=sign))
        cfg.data = str(root)
        assert known() == want
        cfg.data = str(tmp_path / f"store{sign}")
        data.write_store(data.open_episodes(root), Path(cfg.data), True)
        assert known() == want


def test_an_observation_has_the_action_that_follows_it(tmp_path):
    """LIBERO's own script stores beside an action what was seen after it."""
    as_stored = data.open_episodes(write_libero(tmp_path / "rewritten"))[1]
    root = write_libero(tmp_path / "libero_goal")
    for path in root.glob("*.hdf5"):
        with pytest.importorskip("h5py").File(path, "a") as file:
            file["data"].attrs["macros_image_convention"] = "opengl"  # which it writes
    episode = data.open_episodes(root)[1]
    assert len(episode.action) == len(episode.state) == len(episode.images["image"]) == 6
    assert np.array_equal(episode.action, as_stored.action[1:])
    assert np.array_equal(episode.state, as_stored.state[:6])
    assert np.array_equal(episode.images["image"][5], as_stored.images["image"][5])


def test_the_tabletop_by_name(tmp_path):
    episodes = [data.record("tabletop:bridge", seed, 32, 16, 0.3) for seed in range(2)]
    with open(tmp_path / "mine.npz", "wb") as file:
        data.save_demonstrations(file, episodes)
    read = data.open_episodes(tmp_path / "mine.npz")
    assert np.array_equal(read[1].action, episodes[1].action)
    assert data.load(str(tmp_path / "mine.npz"))[0].stats == data.statistics(episodes)


# --- questions ------------------------------------------------------------------------------------


def write_questions(root, kind):
    root.mkdir(exist_ok=True)
    (root / "a.png").write_bytes(png(picture(1, 2)))
    said = [("human", "<image>\nWhat is it?"), ("gpt", "A block."), ("human", "Which colour?"),
            ("gpt", "Red.")]  # fmt: skip
    turns = [{"from": who, "value": text} for who, text in said]
    rows = [{"id": i, "image": "a.png", "conversations": turns} for i in range(3)]
    path = root / f"q.{kind}"
    if kind == "json":
        path.write_text(json.dumps(rows))
    elif kind == "jsonl":
        lines(path, rows)
    else:
        image = base64.b64encode(png(picture(1, 2))).decode()
        cells = [["index", "image", "question", "A", "B", "answer"],
                 ["0", image, "Is it\tred?".replace("\t", " "), "yes", "no", "A"],
                 ["1", "0", "What?", "", "", "a block"]]  # fmt: skip
        path.write_text("\n".join("\t".join(row) for row in cells))
    return path


@pytest.mark.parametrize("kind, count", [("json", 6), ("jsonl", 6), ("tsv", 2)])
def test_questions(kind, count, tmp_path):
    part = data.open_episodes(write_questions(tmp_path / "q", kind))
    assert len(part) == count
    first, second = (part.get(i, None) for i in (0, 1))
    assert set(first) == {"images", "question", "answer"}
    assert all(np.array_equal(s["images"][0], picture(1, 2)) for s in (first, second))
    if kind == "tsv":
        assert first["question"] == "Is it red?\nA. yes\nB. no" and first["answer"] == "A"
        assert second["question"] == "What?" and second["answer"] == "a block"
    else:
        assert (first["question"], first["answer"]) == ("What is it?", "A block.")
        assert second["question"] == "What is it?\nA block.\nWhich colour?"
    mixture = data.Mixture([part, data.Questions(32, 16)], weights=[1, 1])
    assert all("question" in mixture[i] for i in range(6))
    assert data.load(str(part.path))[0].stats is None


def test_a_picture_of_a_later_row(tmp_path):
    path = write_questions(tmp_path / "q", "tsv")
    head, first, second = path.read_text().split("\n")
    path.write_text("\n".join([head, second, first]))  # row 1 names row 0, which comes after it
    part = data.open_episodes(path)
    for i in range(2):
        assert np.array_equal(part.get(i)["images"][0], picture(1, 2))
    path.write_text("\n".join([head, second.replace("\t0\t", "\t1\t"), first]))
    with pytest.raises(UserError, match="item 1"):  # itself
        data.open_episodes(path)


# --- names and weights ----------------------------------------------------------------------------


def test_the_table_holds_what_the_papers_trained_on():
    assert len(data.GROUPS["oxe"]) == 20 and formats.MEAN * 20 == 254_786
    assert len(data.GROUPS["gr1"]) == 24 and len(data.GROUPS["libero"]) == 4
    for group in data.GROUPS.values():
        assert set(group) <= set(data.SOURCES)
        assert np.mean([*group.values()]) == pytest.approx(1)
    assert {"bridge", "fractal", "calvin_abc_d"} <= set(data.SOURCES)
    assert all(row.hub and row.cameras and row.action for row in data.SOURCES.values())


def test_a_known_dataset_in_another_place_is_read_as_its_row(tmp_path):
    row, name = data.SOURCES["libero_goal"], "libero_goal_no_noops_1.0.0_lerobot"
    hub = f"datasets--IPEC-COMMUNITY--{name}/snapshots/0123abc"
    none = data.Source()
    for place, want in ((name, row), (f"{name}/sub", row), (hub, row), ("other/one", none)):
        (tmp_path / place).mkdir(parents=True, exist_ok=True)
        assert formats.locate(str(tmp_path / place)) == (tmp_path / place, want)


@pytest.mark.parametrize("spec, words", [
    ("bridge", "hf download IPEC-COMMUNITY/bridge_orig_lerobot --repo-type dataset --local-dir"),
    ("libero", "hf download IPEC-COMMUNITY/libero_spatial_no_noops_1.0.0_lerobot"),
    ("gr1", "--include 'gr1_unified.PnPBottleToCabinetClose_GR1ArmsAndWaistFourierHands_1000/*'"),
    ("calvin_abc_d", "wget http://calvin.cs.uni-freiburg.de/dataset/task_ABC_D.zip"),
    ("someone/else", "hf download someone/else"), ("brigde", "did you mean bridge?"),
    ("/no/such/folder", "no dataset or path"),
    ("bridge=x", "--data bridge=x: takes a number, not 'x'"),
    ("bridge=-1,fractal", "--data bridge=-1: a weight is above 0"),
    ("bridge=nan", "--data bridge=nan: takes a number"), ("bridge=inf", "a weight is above 0"),
])  # fmt: skip
def test_what_is_not_on_disk_says_how_to_get_it(spec, words):
    with pytest.raises(UserError, match="(?s)" + re.escape(words)) as error:
        data.load(spec)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("verb", ["inspect", "cache"])
@pytest.mark.parametrize("group", data.GROUPS)
def test_a_group_is_looked_at_one_by_one(verb, group, status):
    code, _, error = status(data.main, verb, group)
    assert code == 2 and error.startswith(f"error: {group} is several datasets, name one of them: ")
    assert all(name in error for name in data.GROUPS[group]) and "mean" not in error


def test_weights_and_names(tmp_path):
    one = write_v2(tmp_path / "data/bridge_orig_lerobot", False)
    row = data.SOURCES["bridge"]
    with pytest.raises(UserError, match="no camera image_0; there are front, wrist"):
        data.load("bridge")
    two = write_libero(tmp_path / "libero")
    parts = data.load(f"{one.rename(tmp_path / 'mine')}=0.5,{two}")
    assert [(p.weight, len(p.episodes), p.normalise) for p in parts] == [
        (0.5, 4, "q99"), (1.0, 4, "q99")]  # fmt: skip
    assert row.normalise == "q99" and data.SOURCES["libero_10"].normalise == "minmax"
    narrow = write_v2(tmp_path / "narrow", False, dims=(8, 3))
    with pytest.raises(UserError, match="different widths"):
        data.load(f"{narrow},{two}")


# --- faults ---------------------------------------------------------------------------------------


def test_reasoning_beside_a_dataset(tmp_path):
    root = LEROBOT["v3.0-images"](tmp_path / "set")
    said = [{"episode": e, "reasoning": [f"{e} {t}" for t in range(T)]}
            for e, T in enumerate(LENGTHS) if e != 1]  # fmt: skip
    lines(root / "reasoning.jsonl", said)
    data.main(["cache", str(root), "--out", str(tmp_path / "store")])
    for place in (root, tmp_path / "store"):
        episodes = data.open_episodes(place)
        assert episodes[2].reasoning == said[1]["reasoning"] and not episodes[1].reasoning
    lines(root / "reasoning.jsonl", [{"episode": 3, "reasoning": ["one too few"]}])
    with pytest.raises(UserError, match="episode 3.*field reasoning: 1 for"):
        data.load(str(root))
    lines(root / "reasoning.jsonl", [{"episode": 4, "reasoning": []}])
    with pytest.raises(UserError, match="episode 4: there is none of this number"):
        data.open_episodes(root)
    lines(root / "reasoning.jsonl", [{"said": 3}])
    with pytest.raises(UserError, match="reasoning.jsonl, fields episode, reasoning"):
        data.load(str(root))



def truncate(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def rewrite(root, **change):
    """Episode 2 of a v2.1 image dataset, written again with something wrong."""
    pq = pytest.importorskip("pyarrow.parquet")
    how = {"dims": (8, 7), "fixed": True, "T": LENGTHS[2]} | change
    keys = how.pop("cameras", list(enumerate(KEYS)))
    path = root / "data/chunk-001/episode_000002.parquet"
    pq.write_table(columns(2, how.pop("T"), keys, **how), path)


def bad_actions(root):
    action = numbers(2, LENGTHS[2], 7)
    action[3, 1] = np.nan
    rewrite(root, A=action)


def bad_picture(root, t=-1):
    """A picture of episode 2 is cut short, the last one if not told."""
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    path = root / "data/chunk-001/episode_000002.parquet"
    table = pq.read_table(path)
    cells = table[KEYS[1]].to_pylist()
    cells[t]["bytes"] = cells[t]["bytes"][:40]
    at = table.column_names.index(KEYS[1])
    pq.write_table(table.set_column(at, KEYS[1], pa.array(cells, table.schema.types[at])), path)


def bad_packet(path, t):
    """The middle of frame t's packet in a video is overwritten."""
    with pytest.importorskip("av").open(str(path)) as file:
        places = [(p.pos, p.size) for p in file.demux(video=0) if p.size]
    (at, size), content = places[t], bytearray(path.read_bytes())
    content[at + size // 2 : at + 2 * size // 3] = bytes(2 * size // 3 - size // 2)
    path.write_bytes(content)


def empty(root):
    path = root / "meta/episodes.jsonl"
    path.write_text(path.read_text().replace('"length": 4', '"length": 0'))
    rewrite(root, T=0)


PARQUET = "data/chunk-001/episode_000002.parquet"
MP4 = f"videos/chunk-001/{KEYS[1]}/episode_000002.mp4"
LONG_MP4 = f"videos/chunk-000/{KEYS[1]}/episode_000001.mp4"
V3_MP4 = f"videos/{KEYS[0]}/chunk-000/file-001.mp4"


def two_tasks(root):
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    table = pq.read_table(root / PARQUET)
    at = table.column_names.index("task_index")
    pq.write_table(table.set_column(at, "task_index", pa.array([0, 0, 1, 1])), root / PARQUET)


FAULTS = {  # dataset, what is done to it, words of the message, what is left
    "missing parquet": ("v2.1-images", lambda r: (r / PARQUET).unlink(), "no such file", 3),
    "truncated parquet": ("v2.1-images", lambda r: truncate(r / PARQUET), "000002.parquet", 3),
    "nan": ("v2.1-images", bad_actions, "field action: not a finite number at step 3", 3),
    "dimension": ("v2.1-images", lambda r: rewrite(r, dims=(8, 6)), r"field action is \(4, 6\)", 3),
    "length": ("v2.1-images", lambda r: rewrite(r, T=3), r"field state is \(3, 8\)", 3),
    "camera": ("v2.1-images", lambda r: rewrite(r, cameras=[]), KEYS[0], 3),
    "tasks": ("v2.1-images", two_tasks, "field task_index: several tasks in one episode", 3),
    "empty": ("v2.1-images", empty, "the episode is empty", 3),
    "picture": ("v2.1-images", bad_picture, f"episode 2, field {KEYS[1]}, frame 3", 3),
    "missing mp4": ("v2.0-video", lambda r: (r / MP4).unlink(), "wrist/episode_000002.mp4", 3),
    "truncated mp4": ("v2.0-video", lambda r: truncate(r / MP4), "wrist/episode_000002.mp4", 3),
    "damaged mp4": ("v2.0-video", lambda r: bad_packet(r / MP4, 3), "frame 3: damaged at 0.30", 3),
    "corrupt mp4": ("v2.0-video", lambda r: (r / MP4).write_bytes(b"\0" * 999), "000002.mp4", 3),
    "mp4 of two": ("v3.0-video", lambda r: (r / V3_MP4).unlink(), "front/chunk-000/file-001", 2),
}


def test_a_camera_absent_in_one_episode_of_v3(tmp_path):
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    root = write_v3(tmp_path / "set", True)
    path = root / "meta/episodes/chunk-000/file-001.parquet"
    rows = pq.read_table(path).to_pylist()
    for field in ("chunk_index", "file_index", "from_timestamp", "to_timestamp"):
        rows[0][f"videos/{KEYS[1]}/{field}"] = None
    pq.write_table(pa.Table.from_pylist(rows), path)
    with pytest.raises(UserError, match=f"episode 2: field {KEYS[1]}: this episode has no video"):
        data.load(str(root))
    assert len(data.load(str(root), skip_bad=True)[0].episodes) == 3


@pytest.mark.parametrize("fault", FAULTS)
def test_faults_of_lerobot(fault, tmp_path, capsys):
    kind, damage, words, left = FAULTS[fault]
    root = LEROBOT[kind](tmp_path / "set")
    damage(root)
    with pytest.raises(UserError, match=words) as error:
        data.load(str(root))
    message = str(error.value)
    assert str(root) in message and "--skip-bad" in message and "\n" not in message
    part = data.load(str(root), skip_bad=True)[0]
    assert len(part.episodes) == left and len(part.episodes.faults) == len(LENGTHS) - left
    T = [len(e.action) for e in part.episodes if np.isfinite(e.action).all()]
    assert len(T) == left and len(data.Windows(part.episodes, part.stats, 2)) == sum(T)
    with pytest.raises(UserError, match=words):  # the good part's numbers do not hide the bad one
        data.statistics(data.open_episodes(root))
    with pytest.raises(UserError, match=f"{len(LENGTHS) - left} faults"):
        data.inspect(str(root), tmp_path / "sheet.png")
    assert message.split(" [")[0] in capsys.readouterr().out


def no_gripper(root, t=102):
    path = root / f"training/episode_{t:07d}.npz"
    with np.load(path) as file:
        arrays = {name: file[name] for name in file.files if name != "rgb_gripper"}
    np.savez(path, **arrays)


def no_picture(root):
    (root / "b.png").write_bytes(b"garbage")
    (root / "q.jsonl").write_text((root / "q.jsonl").read_text().replace("a.png", "b.png", 1))


MIDDLE = {  # where neither the first nor the last picture of an episode is wrong
    "picture": (LEROBOT["v2.1-images"], lambda r: bad_picture(r, 2), "frame 2: ", 3),
    "video": (LEROBOT["v2.0-video"], lambda r: bad_packet(r / LONG_MP4, 4), "frame 4: damaged", 3),
    "video of two": (LEROBOT["v3.0-video"], lambda r: bad_packet(r / V3_MP4, 5),
                     "file-001.mp4, episode 1.*frame 5: damaged", 3),
    "calvin": (write_calvin, no_gripper, "rgb_gripper, frame 2: no field", 1),
    "questions": (lambda root: write_questions(root, "jsonl").parent, no_picture,
                  "item 1, field image: this is no picture", 4),
}  # fmt: skip


@pytest.mark.parametrize("fault", MIDDLE)
def test_faults_in_the_middle_are_found_by_trying_every_picture(fault, tmp_path, monkeypatch):
    write, damage, words, left = MIDDLE[fault]
    root = write(tmp_path / "set")
    damage(root)
    spec = str(root / "q.jsonl" if fault == "questions" else root)
    data.load(spec)  # the ends alone were tried
    (part,) = data.load(spec, skip_bad=True)
    assert len(part.episodes) == left and len(part.episodes.faults) == 1
    assert re.search(words, part.episodes.faults[0])
    monkeypatch.setattr(data, "write_store", None)  # what was found is remembered
    monkeypatch.setattr(asked, "decode", None)
    assert data.load(spec, skip_bad=True)[0].episodes.faults == part.episodes.faults
    with pytest.raises(UserError, match=words):
        data.load(spec)
    monkeypatch.undo()
    monkeypatch.setattr(data, "CACHE", tmp_path / "cache")
    with pytest.raises(UserError, match="1 faults"):  # not forgotten by a look at the ends
        data.inspect(spec, tmp_path / "sheet.png")
    with pytest.raises(UserError, match=words):
        data.load(spec)


def test_that_nothing_whole_is_left_is_remembered(tmp_path, status):
    root = write_calvin(tmp_path / "set")
    no_gripper(root, 102)
    no_gripper(root, 106)
    code, out, error = status(data.main, "inspect", str(root))
    assert code == 2 and out.count("fault: ") == 2 and error == f"error: {root}: 2 faults\n"
    for skip_bad in (False, True):
        with pytest.raises(UserError, match="rgb_gripper, frame 2.*2 faults"):
            data.load(str(root), skip_bad)
    for words in ([], ["--skip-bad"]):
        assert status(data.main, "cache", str(root), "--out", "kept", *words)[0] == 2
    assert not (tmp_path / "kept").exists()


def test_what_was_remembered_of_pictures_is_looked_up_again_where_it_is_damaged(tmp_path):
    path = write_questions(tmp_path / "q", "jsonl")
    no_picture(path.parent)
    for _ in range(2):
        assert len(data.open_episodes(path, skip_bad=True)) == 4
        truncate(*(tmp_path / "cache").glob("q.jsonl-*.json"))
    (path.parent / "b.png").write_bytes(png(picture(0, 0)))
    assert len(data.load(str(path))[0].episodes) == 6  # mended: another picture, looked at anew


@pytest.mark.parametrize("damage", [
    bad_actions, lambda root: rewrite(root, dims=(8, 6)), lambda root: rewrite(root, T=3)])
def test_what_was_recorded_wrongly_is_not_to_be_fetched_again(damage, tmp_path):
    damage(LEROBOT["v2.1-images"](tmp_path / "set"))
    with pytest.raises(UserError, match="; --skip-bad leaves the episode out") as error:
        data.load(str(tmp_path / "set"))
    assert "fetch" not in str(error.value)


def test_inspect_prints_every_fault(tmp_path, status):
    root, sheet = LEROBOT["v2.1-images"](tmp_path / "set"), tmp_path / "sheet.png"
    bad_picture(root, 1)  # of what is shown, though not tried
    words = ["inspect", str(root), "--sheet", str(sheet)]
    code, out, error = status(data.main, *words)
    assert code == 2 and error == f"error: {root}: 1 faults\n" and sheet.exists()
    assert out.count("fault: ") == 1 and "frame 1: " in out and "contact sheet" in out
    for path in root.glob("data/*/*.parquet"):
        path.unlink()
    code, out, error = status(data.main, *words)
    assert code == 2 and error == f"error: {root}: 4 faults\n"
    assert out.count("fault: ") == 4 and "data.py inspect" not in out


def test_a_link_to_nowhere(tmp_path):
    root = LEROBOT["v2.1-images"](tmp_path / "set")
    (root / "README.md").symlink_to(tmp_path / "nowhere")
    assert len(data.load(str(root))[0].episodes) == 4  # it is nobody's business
    (root / PARQUET).unlink()
    (root / PARQUET).symlink_to(tmp_path / "nowhere")
    with pytest.raises(UserError, match="000002.parquet.*no such file"):
        data.load(str(root))


@pytest.mark.parametrize("name, text", [
    ("meta/info.json", '{"fps": 10'), ("meta/info.json", "{}"), ("meta/tasks.jsonl", '{"task'),
    ("meta/episodes.jsonl", '{"episode_index": 0, "tasks": []\n'), ("meta/episodes.jsonl", ""),
    ("meta/episodes.jsonl", '{"episode_index": "x", "length": 1}'),
])  # fmt: skip
def test_faults_of_meta_files(name, text, tmp_path):
    root = write_v2(tmp_path / "set", False)
    (root / name).write_text(text)
    for skip_bad in (False, True):  # nothing can be left out of what says what there is
        with pytest.raises(UserError) as error:
            data.load(str(root), skip_bad)
        assert name.split(".")[0].split("/")[0] in str(error.value) or not text


@pytest.mark.parametrize("field", ["episode_index", "data/chunk_index", "dataset_from_index"])
def test_episodes_of_v3_without_a_field(field, tmp_path):
    pq, root = pytest.importorskip("pyarrow.parquet"), write_v3(tmp_path / "set", False)
    for path in root.glob("meta/episodes/*/*.parquet"):
        pq.write_table(pq.read_table(path).drop_columns([field]), path)
    with pytest.raises(UserError, match="set/meta, episodes: (no field '|unsupported)"):
        data.open_episodes(root)
    about = json.loads((root / "meta/info.json").read_text())
    about["features"][KEYS[0]].pop("dtype")
    (root / "meta/info.json").write_text(json.dumps(about))
    with pytest.raises(UserError, match="info.json: no field 'dtype'"):
        data.open_episodes(root)


def rename(root, old, new):
    """Gives a camera of a v2.1 image dataset another name."""
    pq = pytest.importorskip("pyarrow.parquet")
    path = root / "meta/info.json"
    path.write_text(path.read_text().replace(json.dumps(old), json.dumps(new)))
    for path in root.glob("data/*/*.parquet"):
        table = pq.read_table(path)
        names = [{old: new}.get(name, name) for name in table.schema.names]
        pq.write_table(table.rename_columns(names), path)


def test_a_cameras_name_names_no_other_file(tmp_path):
    root, aim = write_v2(tmp_path / "set", False), tmp_path / "aim"
    rename(root, KEYS[0], "observation.images.action")
    data.main(["cache", str(root), "--out", "kept"])
    assert list(data.load("kept")[0].episodes[0].images) == ["observation.images.action", "wrist"]
    rename(root, "observation.images.action", f"observation.images.{aim}")
    with pytest.raises(UserError, match="a name with a /"):
        data.main(["cache", str(root), "--out", "other"])
    index = json.loads((tmp_path / "kept/index.json").read_text())
    index["sizes"][str(aim)] = index["sizes"].pop("wrist")
    (tmp_path / "kept/index.json").write_text(json.dumps(index))
    with pytest.raises(UserError, match="a camera's name has a /"):
        data.load("kept")
    assert not aim.exists()


def test_only_pictures_are_decoded():
    """Pillow would run Ghostscript for this one, found in a file of the user's."""
    with pytest.raises(ValueError, match="this is no picture"):
        formats.decode(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\nshowpage\n%%EOF\n")


def test_faults_of_calvin(tmp_path):
    root = write_calvin(tmp_path / "calvin")
    truncate(root / "training/episode_0000102.npz")
    (root / "training/episode_0000104.npz").rename(root / "training/aside")
    with pytest.raises(UserError, match="episode_0000102.npz.*2 faults"):
        data.load(str(root))
    with pytest.raises(UserError, match="episode_0000102.npz"):  # nothing is left
        data.load(str(root), skip_bad=True)
    (root / "training/aside").rename(root / "training/episode_0000104.npz")
    part = data.load(str(root), skip_bad=True)[0]
    assert [e.instruction for e in part.episodes] == TASKS[1:] and len(part.episodes.faults) == 1


def test_what_is_left_out_of_training_is_listed_once(tmp_path, capsys):
    root = LEROBOT["v2.1-images"](tmp_path / "set")
    (root / PARQUET).unlink()
    asked = write_questions(tmp_path / "q", "jsonl")
    asked.write_text(asked.read_text().replace("a.png", "b.png", 1))
    cfg = SimpleNamespace(data=f"{root},{asked}", skip_bad=True, normalise="auto")
    for rank in (0, 1):
        data.recordings(cfg, Dist(rank, 1, None))
        lines = capsys.readouterr().out.splitlines()
        found = [line for line in lines if line.startswith("left out: ")]
        assert len(found) == 2 * (rank == 0)


def test_calvins_words_are_as_many_as_its_segments(tmp_path):
    root = write_calvin(tmp_path / "calvin")
    note = {"language": {"ann": TASKS[:1]}, "info": {"indx": [(100, 103), (104, 109)]}}
    save_object(root / "training/lang_annotations/auto_lang_ann.npy", note)
    with pytest.raises(UserError, match="auto_lang_ann.npy: zip.* shorter"):
        data.open_episodes(root)


def test_faults_of_libero(tmp_path):
    h5py, root = pytest.importorskip("h5py"), write_libero(tmp_path / "libero")
    truncate(root / "task_0_demo.hdf5")
    with h5py.File(root / "task_1_demo.hdf5", "a") as file:
        del file["data/demo_1/obs/eye_in_hand_rgb"]
    with pytest.raises(UserError, match="task_0_demo.hdf5.*2 faults"):
        data.load(str(root))
    part = data.load(str(root), skip_bad=True)[0]
    assert len(part.episodes) == 1 and "demo_1" in part.episodes.faults[1]
    assert "eye_in_hand_rgb" in part.episodes.faults[1]


@pytest.mark.parametrize("kind, damage, words", [
    ("jsonl", lambda text: text[:-30], "item 3"), ("json", lambda text: text[:-30], "q.json"),
    ("jsonl", lambda text: text.replace("a.png", "b.png", 1), "item 1: field image: no file b.png"),
    ("jsonl", lambda text: text.replace('"image": "a.png", ', "", 1), "item 1: field image: none"),
    ("jsonl", lambda text: text.replace("Red.", " ", 1), "item 1: an empty answer"),
    ("tsv", lambda text: text.replace("iVBOR", "?", 1), "item 1"),
])  # fmt: skip
def test_faults_of_questions(kind, damage, words, tmp_path):
    path = write_questions(tmp_path / "q", kind)
    path.write_text(damage(path.read_text()))
    with pytest.raises(UserError, match=words):
        data.load(str(path))
    if kind == "jsonl":
        part = data.open_episodes(path, skip_bad=True)
        assert len(part) == 4 and len(part.faults) == 1


def test_without_the_extra_one_line_says_what_to_install(tmp_path, monkeypatch):
    root = write_v2(tmp_path / "set", False)
    monkeypatch.setitem(__import__("sys").modules, "pyarrow", None)
    monkeypatch.setitem(__import__("sys").modules, "pyarrow.parquet", None)
    with pytest.raises(UserError, match=r"pip install 'onefile-vla\[data\]'"):
        data.open_episodes(root, skip_bad=True)


# --- pickles --------------------------------------------------------------------------------------


class Evil:
    """Writes a file when a pickle of it is executed."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.makedirs, (self.path, 0o700, True)


def evil_array(path, mark):
    save_object(path, {"language": {"ann": [Evil(mark)]}, "calvin_scene_A": Evil(mark)})


@pytest.mark.parametrize("name", [
    "lang_annotations/auto_lang_ann.npy", "ep_start_end_ids.npy", "scene_info.npy",
    "episode_0000101.npz",
])  # fmt: skip
def test_no_pickle_runs_in_calvin(name, tmp_path, monkeypatch):
    root, mark = write_calvin(tmp_path / "data/task_ABC_D"), tmp_path / "mark"
    hub = data.SOURCES["calvin_abc_d"].hub
    monkeypatch.setitem(data.SOURCES, "here", data.Source(hub, scenes=("calvin_scene_A",)))
    if name == "ep_start_end_ids.npy":  # only read where nothing is annotated
        (root / "training/lang_annotations/auto_lang_ann.npy").unlink()
    if name.endswith(".npz"):
        evil = {"rel_actions": np.array([Evil(mark)], dtype=object)}
        np.savez(root / "training" / name, **evil)
    else:
        evil_array(root / "training" / name, mark)
    with pytest.raises(UserError, match=name.rpartition("/")[2]):
        data.load("here")
    assert not mark.exists()
    evil_array(tmp_path / "check.npy", mark)
    np.load(tmp_path / "check.npy", allow_pickle=True)
    assert mark.exists()  # it does bite where pickles are executed


@pytest.mark.parametrize("name", ["a.npy", "a.pt", "a.pth", "a.pkl", "a.npz", "a.json", "a.tsv",
                                  "a.hdf5", "set/meta/info.json", "set/index.json"])  # fmt: skip
def test_no_pickle_runs_at_any_entry(name, tmp_path):
    path, mark = tmp_path / name, tmp_path / "mark"
    path.parent.mkdir(parents=True, exist_ok=True)
    if name == "a.hdf5":
        pytest.importorskip("h5py")
    if name == "a.npz":
        np.savez(path, text=np.array([Evil(mark)], dtype=object))
    else:
        path.write_bytes(pickle.dumps(Evil(mark)))
    spec = str(tmp_path / name.split("/")[0])
    for skip_bad in (False, True):
        with pytest.raises(UserError, match=name.split("/")[0]):
            data.load(spec, skip_bad)
    assert not mark.exists()


def planted(path, mark):
    path.write_bytes(pickle.dumps(Evil(mark)))


@pytest.mark.parametrize("name", ["index.json", "action", "front", "reasoning.jsonl"])
@pytest.mark.parametrize("way", ["own", "array"])
def test_no_pickle_runs_in_a_store(name, way, tmp_path):
    root, mark = write_v2(tmp_path / "set", False), tmp_path / "mark"
    data.main(["cache", str(root), "--out", "kept"])
    plant = planted if way == "own" else evil_array
    plant(tmp_path / "evil.npy", mark)
    (tmp_path / "evil.npy").rename(tmp_path / "kept" / name)
    for skip_bad in (False, True):
        with pytest.raises(UserError, match=f"kept/{name}"):
            data.load("kept", skip_bad)
    assert not mark.exists()


@pytest.mark.parametrize("name", ["index.json", "state", "action"])
def test_no_pickle_runs_among_remembered_numbers(name, tmp_path):
    first = data.load(str(write_v2(tmp_path / "set", False)))[0]
    (kept,) = (tmp_path / "cache").iterdir()
    planted(kept / name, tmp_path / "mark")
    assert data.load(str(tmp_path / "set"))[0].stats == first.stats  # read again from the recording
    assert not (tmp_path / "mark").exists()


# --- stores, inspect, the command line ------------------------------------------------------------


@pytest.mark.parametrize("kind", ["v2.0-video", "v3.0-images"])
def test_the_frame_store_is_the_dataset(kind, tmp_path, capsys):
    root = LEROBOT[kind](tmp_path / "set")
    data.main(["cache", str(root), "--out", "kept"])
    read, kept = data.open_episodes(root), data.open_episodes("kept")
    mapped = kept[0].images["front"].flags  # a file opened for reading, no copy
    assert not mapped.owndata and not mapped.writeable and kept.lengths == read.lengths
    assert data.statistics(kept) == data.statistics(read)
    for one, other in zip(read, kept):
        assert np.array_equal(one.action, other.action) and one.instruction == other.instruction
        for camera, frames in one.images.items():
            assert np.array_equal(frames[:], other.images[camera])
    with pytest.raises(UserError, match="kept exists"):
        data.main(["cache", str(root), "--out", "kept"])
    data.main(["cache", str(root), "--out", "small", "--size", "16"])
    assert data.open_episodes("small")[1].images["wrist"].shape == (7, 16, 16, 3)
    data.main(["inspect", "small"])
    truncate(tmp_path / "small/front")
    with pytest.raises(UserError, match="small/front.*write it again"):
        data.load("small")


def test_a_store_leaves_out_what_it_was_told_to(tmp_path, capsys):
    root = LEROBOT["v2.1-images"](tmp_path / "set")
    bad_picture(root)
    with pytest.raises(UserError, match="episode 2, field .* frame 3"):
        data.main(["cache", str(root), "--out", "kept"])
    assert {path.name for path in tmp_path.iterdir()} == {"set"}  # no half of a store either
    data.main(["cache", str(root), "--out", "kept", "--skip-bad"])
    assert "left out: " in capsys.readouterr().out
    assert data.open_episodes("kept").names[2].endswith("episode 3")


def test_numbers_kept_by_a_machine_that_went_down_are_read_again(tmp_path):
    first = data.load(str(write_v2(tmp_path / "set", False)))[0]
    (kept,) = (tmp_path / "cache").iterdir()
    truncate(kept / "action")
    assert data.load(str(tmp_path / "set"))[0].stats == first.stats


def test_two_runs_that_read_the_same_dataset_at_once(tmp_path, monkeypatch):
    spec = str(write_v2(tmp_path / "set", False))
    replace = os.replace

    def late(source, target):  # the other run is there in between
        if Path(source).name == "store":
            Path(target).mkdir()
            (Path(target) / "index.json").write_text("the other's")
        replace(source, target)

    monkeypatch.setattr(formats.os, "replace", late)
    with formats.drafted(tmp_path / "there"):
        pass
    assert (tmp_path / "there/index.json").read_text() == "the other's"
    monkeypatch.setattr(formats.os, "replace", replace)
    with formats.drafted(tmp_path / "there") as draft:  # what was there gives way
        data.load(spec)
        (draft / "index.json").write_text("mine")
    assert (tmp_path / "there/index.json").read_text() == "mine"
    assert not list(tmp_path.glob("*.part-*"))


def test_drafts_of_killed_runs_are_removed_after_a_day(tmp_path):
    names = ["set-1.part-abcd_123", "set-2.part-abcd_124", "my.part-1"]
    for name in names:
        (tmp_path / name / "store").mkdir(parents=True)
        (tmp_path / name / "store/action").write_bytes(b"123")
    old = os.stat(tmp_path).st_mtime - 2 * 86400
    for name in (names[0], names[2]):
        for path in (tmp_path / name / "store/action", tmp_path / name / "store"):
            os.utime(path, (old, old))
    with formats.drafted(tmp_path / "there"):
        pass
    assert {path.name for path in tmp_path.iterdir()} == {*names[1:], "there"}


@pytest.mark.parametrize("task, words", [
    ({"task_name": "t-0", "task": "push"}, "push"), ({"extra": 7, "__index_level_0__": "push"},
    "push"), ({"instruction": "push"}, "push"), ({"extra": 7}, ""), ({}, ""), ({"task": 7}, ""),
])  # fmt: skip
def test_a_task_is_named_by_its_sentence(task, words):
    if words:
        assert formats.sentence({"task_index": 3} | task) == words
        return
    with pytest.raises(ValueError, match="task 3 has no words"):
        formats.sentence({"task_index": 3} | task)


def test_what_changes_behind_a_link_is_read_again(tmp_path):
    """However the path is written, and whatever is drawn beside it."""
    root, shown = write_v2(tmp_path / "disk", False), tmp_path / "shown"
    shown.mkdir()
    for part in ("meta", "data"):
        (shown / part).symlink_to(root / part)
    (root / "data/back").symlink_to(root)  # a ring
    first = data.load(str(shown))[0].stats
    (tmp_path / "other").symlink_to(shown)
    (shown / "sheet.png").write_bytes(b"drawn")
    assert data.load(str(tmp_path / "other"))[0].stats == first
    assert len(list((tmp_path / "cache").iterdir())) == 1
    rewrite(root, A=numbers(2, LENGTHS[2], 7) * 9)
    assert data.load(str(shown))[0].stats != first


def test_files_of_libero_are_found_behind_a_link(tmp_path):
    write_libero(tmp_path / "disk")
    (tmp_path / "set").mkdir()
    (tmp_path / "set/suite").symlink_to(tmp_path / "disk")
    assert len(data.open_episodes(tmp_path / "set")) == 4


def test_a_row_may_name_a_folder_and_a_folder_may_be_named_anyhow(tmp_path, monkeypatch):
    root = write_v2(tmp_path / "a=1,b", False)
    monkeypatch.setitem(data.SOURCES, "mine", data.Source(str(root)))
    assert len(data.load("mine")[0].episodes) == len(data.load(str(root))[0].episodes) == 4
    monkeypatch.chdir(root)
    assert data.robot_name(".") == "a=1,b"


def test_scores_of_another_detector_go_by_an_episodes_number(tmp_path):
    root = write_v2(tmp_path / "set", False)
    bad_picture(root)  # of episode 2
    (part,) = data.load(str(root), skip_bad=True)
    rows = {str(e): np.eye(T)[2].tolist() if e == 3 else [0.0] * T for e, T in enumerate(LENGTHS)}
    (tmp_path / "scores.json").write_text(json.dumps(rows))
    found = events.from_file(tmp_path / "scores.json", part.episodes)
    assert found == [[], [], [2]]
    with pytest.raises(UserError, match="several datasets count from 0"):
        events.from_file(tmp_path / "scores.json", [*part.episodes, *part.episodes])


def test_a_json_of_something_else_is_no_question_file(tmp_path):
    (tmp_path / "q.json").write_text('{"conversations": []}')
    with pytest.raises(UserError, match="q.json: not a list of conversations"):
        data.open_episodes(tmp_path / "q.json")


def test_a_run_goes_on_with_the_recordings_that_it_began_with(tmp_path):
    root, alone = write_v2(tmp_path / "set", False), Dist(0, 1, None)
    bad_picture(root)
    cfg = SimpleNamespace(data=str(root), world="none", skip_bad=True, normalise="auto")
    (part,), _ = data.recordings(cfg, alone)
    meta = {"robots": {part.name: part.stats}}
    resumed = SimpleNamespace(meta=meta, path="RUN", train_state={"seconds": 1.0})
    assert data.recordings(cfg, alone, resumed)[0][0].stats == part.stats
    write_v2(root, False)  # the picture is mended
    with pytest.raises(UserError, match="--resume RUN: .*set has 4 episodes now, 3 when the run"):
        data.recordings(cfg, alone, resumed)
    resumed.train_state = {}  # another run begins with what this one has learned
    assert len(data.recordings(cfg, alone, resumed)[0][0].episodes) == 4


def test_statistics_are_read_once(tmp_path, monkeypatch):
    root = write_v2(tmp_path / "set", False)
    first = data.load(str(root))[0]
    monkeypatch.setattr(data, "write_store", None)
    again = data.load(str(root))[0]
    assert again.stats == first.stats and len(again.episodes) == 4
    assert np.array_equal(again.episodes[2].action, first.episodes[2].action)
    monkeypatch.undo()
    monkeypatch.setattr(data, "CACHE", tmp_path / "cache")
    rewrite(root, A=numbers(2, LENGTHS[2], 7) * 9)
    assert data.load(str(root))[0].stats != first.stats  # other content, other statistics


def test_inspect_shows_and_warns(tmp_path, capsys):
    root = write_v2(tmp_path / "set", False)
    action = numbers(2, LENGTHS[2], 7) * 0 - 1
    action[2, 3] = 500
    rewrite(root, A=action)
    data.main(["inspect", str(root), "--sheet", str(tmp_path / "sheet.png")])
    out = capsys.readouterr().out
    for words in ("LeRobot: 4 episodes of 4 to 7 steps, 22 in all", "camera wrist: 32 x 32",
                  "2 instructions: open the drawer; push the red block", "action 6",
                  "warning: gripper: not 0 to 1"):  # fmt: skip
        assert words in out, out
    assert Image.open(tmp_path / "sheet.png").width > 3 * SIZE
    data.main(["inspect", str(write_calvin(tmp_path / "calvin"))])
    data.main(["inspect", str(write_libero(tmp_path / "libero"))])
    out = capsys.readouterr().out
    assert "Calvin: 2 episodes" in out and "Libero: 4 episodes" in out
    assert "state 6, 7: never changes" in out
    for kind in ("json", "tsv"):
        data.main(["inspect", str(write_questions(tmp_path / "q", kind))])


def test_what_warnings_are_for(tmp_path):
    rng = np.random.default_rng(0)
    action = rng.normal(size=(1000, 3)).astype(np.float32)
    action[:, 1], action[7, 0] = 0.5, 100
    action[:, 2] = np.arange(1000) > 100  # closed at the start, by the convention
    episode = data.Episode({}, action[:, :2], action, "")
    part = data.Part("x", [episode], data.statistics([episode]), 1.0, "q99")
    said = "\n".join(data.warnings(part))
    for words in ("action 1: never changes", "action 0: 2.0% clipped", "perhaps the other sign",
                  "1 episodes have no instruction"):  # fmt: skip
        assert words in said, said


def test_the_command_line(status, tmp_path):
    code, out, _ = status(data.main, "-h")
    assert code == 0 and "inspect" in out and "cache" in out
    code, out, error = status(data.main, "inspect", str(tmp_path / "nothing"))
    assert code == 2 and error.startswith("error: no dataset or path") and error.count("\n") == 1
    path = write_questions(tmp_path / "q", "json")
    assert status(data.main, "cache", str(path))[0] == 2


# --- what would otherwise pass in silence ---------------------------------------------------------


def edit_info(root, **fields):
    path = root / "meta/info.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def edit_row(path, pick, **fields):
    """Changes the first row of a meta parquet that pick() takes."""
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    rows = pq.read_table(path).to_pylist()
    next(row for row in rows if pick(row)).update(fields)
    pq.write_table(pa.Table.from_pylist(rows), path)


@pytest.mark.parametrize("kind", ["v2", "v3"])
def test_a_lost_file_of_meta_is_noticed(kind, tmp_path):
    if kind == "v2":
        root = write_v2(tmp_path / "set", False)
        path = root / "meta/episodes.jsonl"
        path.write_text("\n".join(path.read_text().splitlines()[:2]) + "\n")
    else:
        root = write_v3(tmp_path / "set", False)
        (root / "meta/episodes/chunk-000/file-001.parquet").unlink()
    edit_info(root, total_episodes=4)
    with pytest.raises(UserError, match="meta, episodes: 2 of the 4 that info.json counts; fetch"):
        data.load(str(root))
    (part,) = data.load(str(root), skip_bad=True)
    assert len(part.episodes) == 2 and len(part.episodes.faults) == 1


def test_an_episode_that_is_described_twice(tmp_path):
    root = write_v2(tmp_path / "set", False)
    path = root / "meta/episodes.jsonl"
    path.write_text(path.read_text() + path.read_text().splitlines()[0] + "\n")
    with pytest.raises(UserError, match="field episode_index: a number is there twice; mend it"):
        data.load(str(root), skip_bad=True)


@pytest.mark.parametrize("fields, words", [
    ({"fps": 0}, "field fps: 0.0"), ({"fps": float("nan")}, "field fps: nan"),
    ({"features": {}}, "field action: no column actions"),
])  # fmt: skip
def test_what_info_json_cannot_say(fields, words, tmp_path):
    root = write_v2(tmp_path / "set", False)
    edit_info(root, **fields)
    with pytest.raises(UserError, match=words):
        data.load(str(root))


def test_a_dataset_without_a_camera(tmp_path, status):
    root = write_v2(tmp_path / "set", True)
    features = json.loads((root / "meta/info.json").read_text())["features"]
    edit_info(root, features={k: v for k, v in features.items() if k not in KEYS})
    with pytest.raises(UserError, match="no camera at all; there are none"):
        data.load(str(root))
    assert status(data.main, "inspect", str(root))[0] == 2


def test_numbers_beyond_float32_are_not_finite(tmp_path):
    pa = pytest.importorskip("pyarrow")
    root = write_v2(tmp_path / "set", False)
    action = numbers(1, LENGTHS[1], 7).astype(np.float64)
    action[2, 3] = 1e300
    path = root / "data/chunk-000/episode_000001.parquet"
    change_columns(path, ["action"], action=pa.array(list(action), pa.list_(pa.float64())))
    with pytest.raises(UserError, match="episode 1: field action: not a finite number at step 2"):
        data.load(str(root))


def test_complex_numbers_are_refused():
    with pytest.raises(ValueError, match="field state holds complex64, no real numbers"):
        formats.finite("state", np.zeros((2, 3), np.complex64), (2, 3))


def test_v3_videos_are_as_long_as_their_episodes(tmp_path):
    root = write_v3(tmp_path / "set", True)
    path = root / "meta/episodes/chunk-000/file-000.parquet"
    key = f"videos/{KEYS[0]}/from_timestamp"
    edit_row(path, lambda row: row["episode_index"] == 1, **{key: 0.4})
    with pytest.raises(UserError, match=r"episode 1: field .*front: 0.30 s of video for 7 steps"):
        data.load(str(root))


def test_a_video_of_a_lower_rate_does_not_repeat_its_pictures(tmp_path):
    root = write_v2(tmp_path / "set", True)
    path = root / f"videos/chunk-000/{KEYS[0]}/episode_000001.mp4"
    write_video(path, [picture(1, t) for t in range(LENGTHS[1])], fps=5)
    with pytest.raises(UserError, match="frame 1: no picture at 0.10 s"):
        data.open_episodes(root)[1].images["front"][1]


@pytest.mark.parametrize("image", [
    np.zeros((SIZE, SIZE, 3)), np.zeros((SIZE, SIZE), np.uint8),
    np.zeros((SIZE, SIZE, 4), np.uint8), np.zeros((0, 0, 3), np.uint8)])  # fmt: skip
def test_what_is_no_picture_in_the_middle_of_an_episode(image, tmp_path, status):
    root = write_calvin(tmp_path / "set")
    path = root / "training/episode_0000102.npz"
    with np.load(path) as file:
        np.savez(path, **dict(file) | {"rgb_static": image})
    (part,) = data.load(str(root))  # the ends of each episode are pictures
    windows = data.Windows(part.episodes, part.stats, 2, sides=(16, 16))
    with pytest.raises(UserError, match="rgb_static, frame 2: .* is no picture"):
        [windows.get(i, np.random.default_rng(0)) for i in range(len(windows))]
    code, out, _ = status(data.main, "inspect", str(root), "--sheet", str(tmp_path / "s.png"))
    assert code == 2 and "frame 2" in out


def npz(path, **change):
    """Our own demonstrations, two of them, in a file that was changed."""
    episodes = [
        data.Episode({"static": np.stack([picture(e, t) for t in range(T)])}, numbers(e, T, 8),
                     numbers(e, T, 7), TASKS[e], phase=[0] * T)
        for e, T in enumerate(LENGTHS[:2])
    ]  # fmt: skip
    with open(path, "wb") as file:
        data.save_demonstrations(file, episodes)
    with np.load(path) as file:
        arrays = dict(file)
    for name, how in change.items():
        name = name.replace("image", "image.static")
        arrays[name] = how(arrays[name]) if how else arrays.pop(name)
    np.savez(path, **{n: a for n, a in arrays.items() if change.get(n, True)})
    return path


def test_demonstrations_in_a_file(tmp_path):
    assert len(data.load(str(npz(tmp_path / "mine.npz")))[0].episodes) == 2


@pytest.mark.parametrize("change, words", [
    ({"action": lambda x: x * np.nan}, "field action: not a finite number at step 0"),
    ({"state": lambda x: x[:-1]}, "field state: float32 .11, 8. for 12 steps"),
    ({"image": lambda x: x[:-1]}, "field image.static: uint8"),
    ({"image": lambda x: x / 255}, "field image.static: float64"),
    ({"length": lambda x: x * 2}, ".*for 24 steps"),
    ({"length": lambda x: x * 0}, "fields length, text"),
    ({"text": lambda x: np.frombuffer(b"[]", np.uint8)}, "fields length, text: 2 and 0 episodes"),
])  # fmt: skip
def test_faults_of_demonstrations_in_a_file(change, words, tmp_path):
    with pytest.raises(UserError, match=f"mine.npz: {words}.*; mend it") as error:
        data.load(str(npz(tmp_path / "mine.npz", **change)))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("said", [
    [], [{"from": "human", "value": "what"}],
    [{"from": "human", "value": "what"}, {"from": "model", "value": "a cup"}],
])  # fmt: skip
def test_a_conversation_without_an_answer_is_a_fault(said, tmp_path):
    path = write_questions(tmp_path / "q", "json")
    rows = json.loads(path.read_text())
    path.write_text(json.dumps([rows[0] | {"conversations": said}, *rows[1:]]))
    with pytest.raises(UserError, match="item 1: field conversations: no turn from gpt"):
        data.load(str(path))
    twice = [{"from": "human", "value": "<image><image> and"}, {"from": "gpt", "value": "a cup"}]
    path.write_text(json.dumps([rows[0] | {"conversations": twice}, *rows[1:]]))
    with pytest.raises(UserError, match="item 1: field conversations: 2 marks <image>, 1 pictures"):
        data.load(str(path))


def test_a_folder_of_a_hub_is_its_owners(tmp_path, monkeypatch):
    monkeypatch.setattr(formats, "DATA", tmp_path / "data")
    (tmp_path / "data/somebody/pusht").mkdir(parents=True)
    assert formats.locate("somebody/pusht")[0] == tmp_path / "data/somebody/pusht"
    with pytest.raises(UserError, match="lerobot/pusht --repo-type dataset --local-dir .*lerobot"):
        formats.locate("lerobot/pusht")


def test_more_numbers_than_memory_are_a_fault_of_the_file(tmp_path):
    h5py, root = pytest.importorskip("h5py"), write_libero(tmp_path / "set")
    with h5py.File(root / "task_0_demo.hdf5", "a") as file:
        del file["data/demo_1/actions"]
        file["data/demo_1"].create_dataset("actions", (10**13, 7), chunks=(1024, 7))
    with pytest.raises(UserError, match="task_0_demo.hdf5, demo_1: Unable to allocate"):
        data.load(str(root))


@pytest.mark.parametrize("rows", [
    [{"episode": 0, "reasoning": "abcde"}], [{"episode": 0, "reasoning": [None] * 5}],
    [{"episode": 0, "reasoning": ["a"] * 5}] * 2])  # fmt: skip
def test_reasoning_is_one_list_of_texts_an_episode(rows, tmp_path):
    root = write_v2(tmp_path / "set", False)
    lines(root / "reasoning.jsonl", rows)
    with pytest.raises(UserError, match="reasoning.jsonl, .*episode 0: one line, a list of texts"):
        data.open_episodes(root)


@pytest.mark.parametrize("change", [
    {"names": ["one"]}, {"text": []}, {"lengths": [0, 11, 5, 6]}, {"stats": {}}, {"fps": None},
    {"normalise": "q9"}])  # fmt: skip
def test_an_index_whose_fields_do_not_fit(change, tmp_path):
    data.write_store(data.open_episodes(write_v2(tmp_path / "set", False)), tmp_path / "kept", True)
    index = json.loads((tmp_path / "kept/index.json").read_text()) | change
    (tmp_path / "kept/index.json").write_text(json.dumps(index))
    with pytest.raises(UserError, match="index.json|normalise 'q9'"):
        data.load(str(tmp_path / "kept"))


@pytest.mark.parametrize("field", [
    {"gripper": "+-1"}, {"gripper": 1}, {"normalise": "q9"}, {"cameras": "front"}])
def test_a_row_of_ones_own_is_checked(field):
    (name,) = field
    with pytest.raises(UserError, match=f"a row of SOURCES has {name}"):
        data.Source("me/mine", **field)


@pytest.mark.parametrize("words, says", [
    (["--sheet", "sheet.txt"], "--sheet sheet.txt: a .png"),
    (["--sheet", "nowhere/sheet.png"], "No such file or directory: .*sheet.png"),
])  # fmt: skip
def test_where_a_contact_sheet_cannot_go(words, says, tmp_path, status, monkeypatch):
    root = write_v2(tmp_path / "set", False)
    monkeypatch.chdir(tmp_path)
    code, _, error = status(data.main, "inspect", str(root), *words)
    assert code == 2 and error.count("\n") == 1 and re.search(says, error)
