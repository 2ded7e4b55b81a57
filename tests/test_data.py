"""data.py: normalisation, windows, mixtures, and the tabletop's cached demonstrations."""

import os
import pickle
from itertools import islice

import numpy as np
import pytest
from test_formats import Evil

import common
import data
from worlds import loop, tabletop


def made_up(T, seed=0, S=3, A=2):
    """An episode whose every number can be told from every other."""
    rng = np.random.default_rng(seed)
    images = {"static": rng.integers(0, 256, (T, 8, 8, 3), np.uint8),
              "wrist": rng.integers(0, 256, (T, 4, 4, 3), np.uint8)}  # fmt: skip
    state, action = rng.normal(size=(T, S)), rng.normal(size=(T, A))
    return data.Episode(images, np.float32(state), np.float32(action), f"task {seed}")


EPISODES = [made_up(5, 0), made_up(1, 1), made_up(7, 2)]
STATS = data.statistics(EPISODES)


def same(one, other):
    """Equal through nested dicts, lists and arrays."""
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, list):
        return len(one) == len(other) and all(map(same, one, other))
    return np.array_equal(one, other)


# --- normalisation --------------------------------------------------------------------------------


@pytest.mark.parametrize("key", ["state", "action"])
def test_statistics_are_the_quantiles_of_all_steps(key):
    columns = np.concatenate([getattr(e, key) for e in EPISODES]).T
    for d, values in enumerate(columns):
        values = sorted(float(v) for v in values)
        for name, share in (("q01", 0.01), ("q99", 0.99), ("min", 0.0), ("max", 1.0)):
            place = share * (len(values) - 1)  # between the two values around it
            low = int(place)
            high = min(low + 1, len(values) - 1)
            want = values[low] + (place - low) * (values[high] - values[low])
            assert data.statistics(EPISODES)[key][name][d] == pytest.approx(want)
    assert len(STATS[key]["q01"]) == len(columns)


@pytest.mark.parametrize("how", ["q99", "minmax"])
def test_normalising_there_and_back(how):
    stats, rng = STATS["action"] | {"how": how}, np.random.default_rng(0)
    low, high = data.bounds(stats)
    inside = low + (high - low) * rng.random((20, 4, 2))
    there = data.normalise(inside, stats)
    assert there.dtype == np.float32 and np.abs(there).max() <= 1
    assert np.allclose(data.unnormalise(there, stats), inside, atol=1e-5)
    edges = data.normalise(np.stack([low, high, high + 9]), stats)
    assert edges[:, 0].tolist() == [-1, 1, 1]
    names = ("q01", "q99") if how == "q99" else ("min", "max")
    assert np.allclose([low, high], [stats[name] for name in names])


def test_what_never_moves_becomes_zero():
    still = made_up(6)
    still.action[:, 1] = 0.25
    stats = data.statistics([still])["action"]
    there = data.normalise(still.action, stats)
    assert not there[:, 1].any() and there[:, 0].any()
    assert np.allclose(data.unnormalise(there, stats)[:, 1], 0.25)
    guess = data.unnormalise(np.full((1, len(stats["min"])), 0.3), stats)
    assert guess[0, 1] == np.float32(0.25)  # what a policy makes of it moves nothing


def test_what_hardly_ever_moves_has_its_least_and_greatest_as_bounds():
    rare = made_up(400)
    rare.action[:, 1] = 0.0
    rare.action[7, 1] = 0.5
    stats = data.statistics([rare])["action"]
    assert stats["q01"][1] == stats["q99"][1] == 0
    low, high = data.bounds(stats)
    assert (low[1], high[1]) == (0, 0.5) and low[0] == np.float32(stats["q01"][0])
    there = data.normalise(rare.action, stats)
    assert there[7, 1] == 1 and there[8, 1] == -1
    assert np.allclose(data.unnormalise(there, stats)[:, 1], rare.action[:, 1])


def test_a_narrower_robot_is_filled_with_zeros():
    stats = {name: [*values, 0.0] for name, values in STATS["state"].items()}
    narrow = data.normalise(EPISODES[0].state, stats)
    assert np.array_equal(narrow[:, :-1], data.normalise(EPISODES[0].state, STATS["state"]))
    assert not narrow[:, -1].any()


# --- windows --------------------------------------------------------------------------------------


def test_windows_end_with_their_episode():
    H, windows = 4, data.Windows(EPISODES, STATS, 4)
    index, rng = 0, np.random.default_rng(0)
    for episode in EPISODES:
        for t in range(len(episode.action)):
            got = windows.get(index, rng)
            for h in range(H):
                inside = t + h < len(episode.action)
                action = episode.action[t + h if inside else -1]  # the last one, masked
                assert got["mask"][h] == inside
                assert np.array_equal(got["action"][h], data.normalise(action, STATS["action"]))
            assert np.array_equal(got["state"], data.normalise(episode.state[t], STATS["state"]))
            assert same(got["images"], [frames[t] for frames in episode.images.values()])
            assert got["instruction"] == episode.instruction
            index += 1
    assert len(windows) == index == 13
    chunks = windows.chunks(every=3)
    assert same(chunks, [windows.get(i, rng)["action"] for i in (0, 3, 6, 9, 12)])


@pytest.mark.parametrize("dx, dy", [(0, 0), (2, 0), (-1, 3), (9, -9)])
def test_shift_moves_a_picture_and_repeats_its_edge(dx, dy):
    image = made_up(1).images["static"][0][:6]  # 6 rows, 8 columns
    moved = data.shift(image, dx, dy)
    for y in range(6):
        for x in range(8):
            source = image[min(max(y + dy, 0), 5), min(max(x + dx, 0), 7)]
            assert np.array_equal(moved[y, x], source)


def test_augmentation_shifts_each_camera_in_its_own_scale():
    whole = data.Windows(EPISODES, STATS, 2).get(0, np.random.default_rng(0))
    augmented = data.Windows(EPISODES, STATS, 2, augment=16).get(0, np.random.default_rng(5))
    moves = np.random.default_rng(5).integers(-16, 17, (2, 2))  # in 64ths of a side
    for before, after, move in zip(whole["images"], augmented["images"], moves):
        dx, dy = (int(m) * len(before) // 64 for m in move)
        assert np.array_equal(after, data.shift(before, dx, dy))
    assert not same(whole["images"], augmented["images"])
    assert np.array_equal(whole["action"], augmented["action"])


# --- mixtures -------------------------------------------------------------------------------------


class Part:
    """Samples that tell where they come from."""

    def __init__(self, name, length):
        self.name, self.length = name, length

    def __len__(self):
        return self.length

    def get(self, index, rng):
        return self.name, index, float(rng.random())


PARTS = [Part("a", 10), Part("b", 1000), Part("c", 30)]


def test_a_sample_follows_from_seed_and_number_alone():
    numbers = np.random.default_rng(0).permutation(300).tolist()
    first = data.Mixture(PARTS, seed=3)
    forward = [first[i] for i in range(300)]
    second = data.Mixture(PARTS, seed=3)
    assert [second[i] for i in numbers] == [forward[i] for i in numbers]
    assert [data.Mixture(PARTS, seed=4)[i] for i in range(300)] != forward
    assert len(set(forward)) == 300
    windows = data.Windows(EPISODES, STATS, 2, augment=4)
    one, other = data.Mixture([windows], seed=1), data.Mixture([windows], seed=1)
    assert all(same(one[i], other[i]) for i in range(20))


@pytest.mark.parametrize("weights, want", [
    ([2, 1, 1], [0.5, 0.25, 0.25]), ([0, 1, 0], [0, 1, 0]), (None, [1 / 104, 100 / 104, 3 / 104]),
])  # fmt: skip
def test_weights_are_the_shares_of_the_parts(weights, want):
    n, mixture = 4000, data.Mixture(PARTS, weights)
    drawn = list(islice(mixture, n))
    for part, share in zip(PARTS, want):
        indices = [index for name, index, _ in drawn if name == part.name]
        assert abs(len(indices) - n * share) <= 4 * (n * share * (1 - share)) ** 0.5
        assert all(0 <= index < len(part) for index in indices)
        if share > 0.2 and len(part) < 100:
            assert set(indices) == set(range(len(part)))  # every window has its turn


def test_two_processes_read_what_one_would():
    mixtures = [data.Mixture(PARTS, seed=0), data.Mixture(PARTS[:1], seed=9)]

    def batches(size, rank=0, processes=1):
        return data.Batches(mixtures, list, size, rank, processes)

    for step in range(5):
        whole = batches(6)[step]
        halves = [batches(3, rank, 2)[step] for rank in (0, 1)]
        firsts, seconds = zip(*((half[:3], half[3:]) for half in halves))
        assert sum(firsts, []) + sum(seconds, []) == whole
        assert whole == [m[i] for m in mixtures for i in range(6 * step, 6 * step + 6)]


def test_a_question_comes_with_every_mix_robot_samples_however_a_step_is_split():
    def read(batch, processes, steps, mix=7):
        parts = [[("robot", i) for i in range(999)], [("asked", i) for i in range(999)]]
        made = [data.Batches(parts, list, batch, r, processes, mix) for r in range(processes)]
        return sorted(x for step in range(steps) for b in made for x in b[step])

    whole = read(64, 1, 2)
    assert len(whole) == len(set(whole)) == 128 + 18  # 128 // 7
    assert whole == read(32, 2, 2) == read(16, 2, 4) == read(8, 8, 2)
    few = read(4, 2, 3)  # a batch smaller than --mix has a question nevertheless
    assert [kind for kind, _ in few].count("asked") == 6 == len(set(few)) - 24


# --- the tabletop's own ---------------------------------------------------------------------------


def test_demonstrations_are_made_once(tmp_path, monkeypatch):
    monkeypatch.setattr(data, "CACHE", tmp_path)
    made = data.demonstrations("tabletop:bridge", episodes=3, seed=1, size=32, wrist_size=16)
    monkeypatch.setattr(data, "ProcessPoolExecutor", None)
    read = data.demonstrations("tabletop:bridge", episodes=3, seed=1, size=32, wrist_size=16)
    assert [path.suffix for path in tmp_path.iterdir()] == [".npz"]
    assert len(made) == len(read) == 3 and all(same(vars(m), vars(r)) for m, r in zip(made, read))
    assert [type(v) for v in vars(made[0]).values()] == [type(v) for v in vars(read[0]).values()]
    alone = data.record("tabletop:bridge", 1_000_002, 32, 16, 0.3)
    assert same(vars(alone), vars(read[2]))  # an episode does not depend on those before it
    for episode in read:
        T = len(episode.action)
        assert episode.images["static"].shape == (T, 32, 32, 3)
        assert episode.images["wrist"].shape == (T, 16, 16, 3)
        assert T == len(episode.state) == len(episode.phase) == len(episode.reasoning)
        assert episode.phase == sorted(episode.phase) and episode.instruction


def test_demonstrations_of_a_world_are_made_anew_when_the_one_it_extends_changed(
    tmp_path, monkeypatch
):
    source = "from worlds.tabletop import Tabletop\nclass Dusk(Tabletop):\n    pass\n"
    (tmp_path / "dusk.py").write_text(source)
    (tmp_path / "changed.py").write_text("another table")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setitem(loop.WORLDS, "dusk", "dusk:Dusk")
    monkeypatch.setattr(data, "CACHE", tmp_path / "cache")
    for files, code in ((1, tabletop.__file__), (1, tabletop.__file__), (2, "changed.py")):
        monkeypatch.setattr(tabletop, "__file__", str(tmp_path / code))
        data.demonstrations("dusk", episodes=1, size=16, wrist_size=16)
        assert len([*(tmp_path / "cache").iterdir()]) == files


def test_drafts_of_demonstrations_are_removed_after_a_day(tmp_path, monkeypatch):
    monkeypatch.setattr(data, "CACHE", tmp_path)
    for name in ("a.0123abcd.tmp", "b.0123abcd.tmp", "theirs.tmp"):
        (tmp_path / name).touch()
    for name in ("a.0123abcd.tmp", "theirs.tmp"):
        os.utime(tmp_path / name, (0, 0))
    data.demonstrations("tabletop:bridge", episodes=1, size=16, wrist_size=16)
    assert {p.name for p in tmp_path.glob("*.tmp")} == {"b.0123abcd.tmp", "theirs.tmp"}


def test_a_cache_that_cannot_be_written_is_known_before_the_recording(tmp_path, monkeypatch):
    (tmp_path / "cache").write_text("a file")
    monkeypatch.setattr(data, "CACHE", tmp_path / "cache")
    monkeypatch.setattr(data, "ProcessPoolExecutor", None)
    with pytest.raises(common.UserError, match="cache: cannot be written .*ONEFILE_VLA_CACHE"):
        data.demonstrations("tabletop:bridge", episodes=1, size=16, wrist_size=16)


def test_a_full_disk_leaves_no_half_of_the_demonstrations(tmp_path, monkeypatch):
    def full(file, made):
        file.write(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(data, "CACHE", tmp_path)
    monkeypatch.setattr(data, "save_demonstrations", full)
    with pytest.raises(OSError, match="No space"):
        data.demonstrations("tabletop:bridge", episodes=1, size=16, wrist_size=16)
    assert not list(tmp_path.iterdir())


def test_a_part_without_a_window_is_refused():
    with pytest.raises(common.UserError, match="no episode long enough"):
        data.Mixture([range(3), ()])


def cut(path, mark):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flip(path, mark):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 255
    path.write_bytes(content)


def plant(path, mark):
    path.write_bytes(pickle.dumps(Evil(mark)))


def plant_array(path, mark):
    np.savez(open(path, "wb"), text=np.array([Evil(mark)], dtype=object))


@pytest.mark.parametrize("damage", [cut, flip, plant, plant_array])
def test_damaged_demonstrations_are_made_anew(damage, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(data, "CACHE", tmp_path / "cache")
    how = {"episodes": 2, "seed": 3, "size": 16, "wrist_size": 16}
    made = data.demonstrations("tabletop:bridge", **how)
    (path,) = (tmp_path / "cache").iterdir()
    damage(path, tmp_path / "mark")
    capsys.readouterr()
    again = data.demonstrations("tabletop:bridge", **how)
    assert f"{path} is damaged: made anew\n" in capsys.readouterr().out
    assert all(same(vars(m), vars(a)) for m, a in zip(made, again, strict=True))
    assert not (tmp_path / "mark").exists()
    assert len(data.load_demonstrations(path)) == 2


def test_a_question_follows_from_its_number():
    one, other = data.Questions(32, 16), data.Questions(32, 16)
    answers = []
    for index in (7, 3, 7, 123_456):
        samples = [q.get(index, np.random.default_rng(index)) for q in (one, other)]
        assert same(*samples) and samples[0]["question"] and samples[0]["answer"]
        assert [len(image) for image in samples[0]["images"]] == [32, 16]
        answers.append(samples[0])
    assert same(answers[0], answers[2]) and not same(answers[0]["images"], answers[1]["images"])
    mixture = data.Mixture([one, data.Windows(EPISODES, STATS, 2)], weights=[1, 1])
    assert {"question" in mixture[i] for i in range(8)} == {True, False}


def test_question_sets_are_the_worlds():
    sets = data.question_sets(["pope", "mme"], 6, 32, 16)
    assert list(sets) == ["pope", "mme"] and all(len(samples) == 6 for samples in sets.values())
    assert {s["answer"] for s in sets["mme"]} == {"yes", "no"}
    assert same(sets, data.question_sets(["pope", "mme"], 6, 32, 16))
