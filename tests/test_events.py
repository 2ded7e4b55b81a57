"""Event boundaries, the judges of the VLA Score, and benchmark files."""

import json
import threading
import time
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import common
import data
from dualvla import Config
from worlds import benchmarks, events, loop, score, tabletop

# --- event boundaries -----------------------------------------------------------------------------


def test_labels_and_their_reach():
    assert events.boundaries([0, 0, 1, 1, 2, 0]) == [2, 4, 5]
    assert events.dilate([2], 6, 1).tolist() == [0, 1, 1, 1, 0, 0]
    assert events.dilate([0, 5], 6, 0).tolist() == [1, 0, 0, 0, 0, 1]


def test_peaks_are_strict_and_above_the_threshold():
    scores = np.array([0.9, 0.1, 0.8, 0.3, 0.6, 0.6, 0.2, 0.4, 0.7])
    assert events.peaks(scores, 0.5) == [2, 8]  # a tie is no peak, nor is the first frame
    assert events.peaks(scores, 0.75) == [2]
    assert events.peaks(scores, 0.5, radius=6) == []  # 0.9 hides 2, which hides 8


def test_f1_by_relative_distance():
    truth, found = [[5, 10]], [[6, 9, 15]]
    assert events.f1(found, truth, [20], 0.05) == pytest.approx(2 * 2 / 5)
    assert events.f1(found, truth, [20], 0.02) == 0
    assert events.f1([[5, 5.4]], [[5]], [20]) == pytest.approx(2 / 3)  # each boundary counts once
    assert events.f1([[], [3]], [[4], [3]], [20, 20]) == pytest.approx(2 / 3)  # pooled


def test_pictures_read_one_by_one_are_those_of_an_array():
    """A recording that is not cached gives its frames when asked for them, and of any size."""
    film = np.random.default_rng(0).integers(0, 256, (4, 40, 56, 3), dtype=np.uint8)
    stored, lazy = (SimpleNamespace(images={"a": x, "b": x}) for x in (film, list(film)))
    frames = events.frames_of(stored)
    assert frames.shape == (4, 6, events.SIDE, events.SIDE) and frames.max() <= 1
    assert torch.equal(frames, events.frames_of(lazy))


def test_windows_repeat_the_ends():
    rows = events.windows(3)
    assert rows.shape == (3, 11) and rows[0].tolist() == [0] * 6 + [1] + [2] * 4


def test_difference_maps_see_a_change_the_detector_learns():
    """Films whose colour jumps: a few steps are enough for a boundary as plain as that."""
    rng, films = np.random.default_rng(0), []
    for _ in range(8):
        phase = np.repeat(np.arange(4), rng.integers(3, 7, 4))
        shade = rng.integers(0, 255, 4)[phase]
        images = np.repeat(shade[:, None, None, None], 64, 1).repeat(64, 2).repeat(3, 3)
        action = np.zeros((len(phase), 7), np.float32)
        films.append(data.Episode({"static": images.astype(np.uint8)}, action, action, "", 5.0, [],
                                  phase.tolist()))  # fmt: skip
    before = torch.get_rng_state()
    said = []
    made = events.detector("ddm", films, say=said.append, steps=20)
    assert torch.equal(before, torch.get_rng_state()) and "F1@0.05" in said[0]
    found = [made.boundaries(f) for f in films]
    truth, lengths = [events.boundaries(f.phase) for f in films], [len(f.action) for f in films]
    assert events.f1(found, truth, lengths) > 0.6
    logits = made(made.encode(events.frames_of(films[0]))[:, events.windows(lengths[0])])
    assert logits.shape == (3, lengths[0], 2)  # fused, pictures, maps
    plain = events.detector("similarity", films, say=said.append)
    assert events.f1([plain.boundaries(f) for f in films], truth, lengths) > 0.3


def test_names_of_moves():
    state = np.zeros((4, 8))
    assert events.move_name(state, 0) == "stop"
    state[3] = [-0.1, 0.1, 0, 0, 0.1, -0.1, 0, 1]
    want = "move left forward and tilt up and turn right and open the fingers"
    assert events.move_name(state, 0) == want


def test_timeline_shows_what_is_kept(episodes, tmp_path):
    T = len(episodes[0].action)
    label = np.arange(T) % 3 == 0
    events.timeline(tmp_path / "t.png", episodes[0], {"action": label, "kept": label})
    image = np.asarray(score.Image.open(tmp_path / "t.png"))
    assert image.shape[1] > T * 100
    first, second = image[:128, 70:198], image[:128, 198:326]
    assert second.mean() > first.mean() + 20  # what is not kept is pale


# --- the offline judge ----------------------------------------------------------------------------


class Scripted:
    """The world's expert as a policy that says what it does, truly or not."""

    def __init__(self, words=None):
        self.words, self.said, self.worlds = words, [], []

    def act(self, seen, instructions, rng):
        chunks, self.said = [], []
        for world in [w for w in self.worlds if not (w.success or w.steps >= w.max_steps)]:
            copy = tabletop.Tabletop("bridge", 8, 8)
            copy.load_state_dict(world.state_dict())
            expert = tabletop.Expert(copy)
            first = expert.act()
            self.said.append(expert.reasoning if self.words is None else self.words)
            chunk = [first]
            for _ in range(3):
                copy.step(chunk[-1])
                chunk.append(expert.act())
            chunks.append(np.stack(chunk))
        return chunks


@pytest.fixture
def runs(monkeypatch):
    """-> function: words -> trajectories of the scripted expert."""
    made = []
    init = tabletop.Tabletop.__init__

    def noted(self, *args, **kwargs):
        init(self, *args, **kwargs)
        made.append(self)

    def act(words=None, n=2):
        policy = Scripted(words)
        made.clear()
        with monkeypatch.context() as patch:
            patch.setattr(tabletop.Tabletop, "__init__", noted)
            starts = loop.starts_of("tabletop:bridge", "in", n, 0)
            policy.worlds = made  # the first n are the loop's own
            del made[n:]
            original = policy.act
            policy.act = lambda *a: (made.__delitem__(slice(n, None)), original(*a))[1]
            return score.trajectories(policy, Config(), "tabletop:bridge", starts)

    return act


def test_the_expert_is_judged_well_and_a_liar_badly(runs):
    true = [score.judge_offline(r, True) for r in runs()]
    false = [score.judge_offline(r, True) for r in runs("the cup is red so i rest because why")]
    for good, bad in zip(true, false):
        assert good["Reasoning"] == 10 and bad["Reasoning"] <= 1
        assert good["Alignment"] >= 7 > bad["Alignment"]
        assert good["Action"] >= 8 and good["Intention"] >= 8
    silent = [score.judge_offline(r, True) for r in runs("")]
    assert all(marks["Reasoning"] == marks["Alignment"] == 0 for marks in silent)
    assert set(score.judge_offline(runs("")[0], False)) == {"Action", "Intention"}


def test_trajectories_are_acted_as_the_closed_loop_acts(episodes):
    """--execute steps of a plan, or with --ensemble a plan each step, the last seven blended."""
    starts, count = loop.starts_of("tabletop:bridge", "in", 1, 0), [0]

    def act(seen, instructions, rng):
        count[0] += 1
        return [np.full((8, 7), 0.01 * count[0])]

    policy = SimpleNamespace(act=act, said=["so it is"])
    for ensemble in (False, True):
        count[0], cfg = 0, replace(Config(), execute=4, ensemble=ensemble)
        (run,) = score.trajectories(policy, cfg, "tabletop:bridge", starts)
        plans, steps = len(run["said"]), len(run["actions"])
        assert run["execute"] == (1 if ensemble else 4)
        assert plans == (steps if ensemble else -(-steps // 4))
        tenth = run["actions"][9][0]  # without: of the third plan; with: plans 4 to 10
        assert tenth == pytest.approx(0.07 if ensemble else 0.03, abs=0.002)


# --- judges at an address, well behaved and not ---------------------------------------------------


def fake_runs(n=6):
    rng = np.random.default_rng(0)
    films = rng.integers(0, 255, (n, 3, 8, 8, 3)).astype(np.uint8)
    return [
        {"start": f"s{i}", "task": f"put cup {i} on the plate", "said": ["i lift it"], "success": 1,
         "actions": [[0.1 * i]], "frames": list(film)}
        for i, film in enumerate(films)
    ]  # fmt: skip


GOOD = {"Thought": "fine", "Result": {"Action": 7, "Intention": 8, "Reasoning": 6, "Alignment": 9}}


class Stub(BaseHTTPRequestHandler):
    """Answers as the list of faults says, then well."""

    faults, asked = [], []

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        fault = self.faults.pop(0) if self.faults else "good"
        self.asked.append((body, fault))
        if fault == "reset":
            self.connection.close()
            return
        if fault == "slow":
            time.sleep(0.6)
        code = fault if isinstance(fault, int) else 200
        text = {"half": '{"Thought": "', "eleven": json.dumps({"Result": {"Action": 11}}),
                "words": "I think it did well."}.get(fault, json.dumps(GOOD))  # fmt: skip
        answer = json.dumps({"choices": [{"message": {"content": text}}]}).encode()
        answer = b"<html>" if fault == "html" else answer
        try:
            self.send_response(code)
            self.send_header("Content-Length", str(len(answer)))
            self.end_headers()
            self.wfile.write(answer)
        except OSError:  # the client no longer waits
            pass

    def log_message(self, *args):
        pass


@pytest.fixture
def stub():
    server = ThreadingHTTPServer(("127.0.0.1", 0), Stub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    Stub.faults, Stub.asked = [], []
    yield f"http://127.0.0.1:{server.server_port}/v1"
    server.shutdown()
    server.server_close()


def judge(cfg, file, runs, said=None):
    how = dict(pause=0.01, timeout=0.3, say=(said if said is not None else []).append)
    return score.judge_all(runs, cfg, file, True, **how)


def test_no_trajectory_is_lost_or_scored_twice(stub, tmp_path):
    cfg, runs, said = replace(Config(), judge=stub), fake_runs(), []
    Stub.faults = ["slow", 429, 500, "reset", "half", "good", "words", "eleven", "html", 503]
    rows = judge(cfg, tmp_path / "scores.jsonl", runs, said)
    assert [r["task"] for r in rows] == [r["task"] for r in runs]
    assert all(r["Action"] == 7 and r["Alignment"] == 9 for r in rows)
    lines = (tmp_path / "scores.jsonl").read_text().splitlines()
    assert len(lines) == len({json.loads(x)["key"] for x in lines}) == 6
    assert len(Stub.asked) == 6 + 9 and "about" in said[0] and "$" in said[0]
    before = len(Stub.asked)
    assert judge(cfg, tmp_path / "scores.jsonl", runs) == rows and len(Stub.asked) == before
    body, _ = Stub.asked[0]
    parts = body["messages"][0]["content"]
    assert body["model"] == "gpt-4o" and [p["type"] for p in parts] == ["text"] + ["image_url"] * 3


def test_an_interrupted_judgement_goes_on(stub, tmp_path):
    cfg, runs, file = replace(Config(), judge=stub), fake_runs(), tmp_path / "scores.jsonl"
    Stub.faults = ["good", "good"] + [500] * 6  # the third is given up
    with pytest.raises(common.UserError, match="1 of 6 trajectories could not be judged"):
        judge(cfg, file, runs)
    whole = file.read_text().splitlines()
    assert len(whole) == 5
    file.write_text("\n".join(whole[:3]) + "\n" + whole[3][:20])  # torn by a crash
    Stub.asked.clear()
    assert len(judge(cfg, file, runs)) == 6 and len(Stub.asked) == 3
    changed = [dict(runs[0], said=["other words"]), *runs[1:]]
    Stub.asked.clear()
    judge(cfg, file, changed)
    assert len(Stub.asked) == 1  # another trajectory is another question


def test_a_refused_request_is_the_users_to_mend(stub, tmp_path):
    Stub.faults = [401]
    with pytest.raises(common.UserError, match=r"--judge .*: 401"):
        judge(replace(Config(), judge=stub), tmp_path / "scores.jsonl", fake_runs())
    assert len(Stub.asked) == 1


def test_similar_annotated_runs_are_shown(stub, tmp_path):
    file, runs = tmp_path / "annotated.jsonl", fake_runs(1)
    tasks = {"press the button": 1, "put cup 0 on the towel": 4}
    rows = [{"task": task, "Action": mark} for task, mark in tasks.items()]
    file.write_text("\n".join(json.dumps(r) for r in rows))
    judge(replace(Config(), judge=stub, judge_examples=str(file)), tmp_path / "scores.jsonl", runs)
    text = Stub.asked[0][0]["messages"][0]["content"][0]["text"]
    assert "A similar run (put cup 0 on the towel) was rated by experts: Action 4." in text
    with pytest.raises(common.UserError, match="no such file"):
        score.examples_of("nowhere.jsonl")


@pytest.mark.parametrize("text", [
    "", "[]", "{}", '{"Result": {"Action": 7}}', json.dumps(GOOD).replace("7", "7.5"),
    json.dumps(GOOD).replace("7", "true"), json.dumps(GOOD).replace("7", '"7"'),
    json.dumps(GOOD).replace("7", "-1"), json.dumps(GOOD)[:-1],
])  # fmt: skip
def test_only_the_json_asked_for_is_a_mark(text):
    with pytest.raises(ValueError):
        score.parse_marks(text, True)


def test_report_is_one_safe_page(tmp_path):
    runs = fake_runs(2)
    runs[0]["said"] = ["<script>alert(1)</script>"]
    rows = [dict(Action=7, Intention=8, Reasoning=6, Alignment=9, success=1, score=0.5)] * 2
    score.report(tmp_path / "r.html", runs, rows, Config())
    text = (tmp_path / "r.html").read_text()
    assert "VLA Score 0.500" in text and text.count("<img") == 6 and "ground truth" in text
    assert "<script>" not in text and "http" not in text


def test_a_local_vlm_judges_or_says_that_it_cannot(tmp_path):
    cfg = replace(Config(), judge="local:tiny")
    with pytest.raises(common.UserError, match="1 of 1 trajectories could not be judged"):
        judge(cfg, tmp_path / "scores.jsonl", fake_runs(1))


# --- benchmark files ------------------------------------------------------------------------------


def test_vqa_accuracy_on_published_examples():
    """VQA: min(1, humans that said it / 3), averaged over the ten subsets of nine."""
    ten = ["yes"] * 8 + ["no"] * 2
    assert benchmarks.vqa("Yes.", ten) == 1.0
    assert benchmarks.vqa("no", ten) == pytest.approx((8 * 2 / 3 + 2 * 1 / 3) / 10)
    assert benchmarks.vqa("maybe", ten) == 0
    assert benchmarks.vqa("the cup", ["cup"]) == 1.0


def test_anls_on_worked_examples():
    assert benchmarks.edits("kitten", "sitting") == 3
    assert benchmarks.anls("sitting", ["kitten", "sittin"]) == pytest.approx(1 - 1 / 7)
    assert benchmarks.anls("kitten", ["sitting"]) == pytest.approx(1 - 3 / 7)
    assert benchmarks.anls("abc", ["xyzw"]) == 0  # less than a half
    assert benchmarks.anls("New  York", ["new york"]) == 1


@pytest.mark.parametrize("said, letter", [
    ("B", "B"), ("(B)", "B"), ("B.", "B"), ("the ball", "A"), ("a Cup", "B"), ("E", ""),
    ("it may be a cup", "B"), ("cup or ball", ""), ("", ""),
])  # fmt: skip
def test_letters_are_read_from_answers(said, letter):
    options = {"A": "ball", "B": "cup", "C": "spoon"}
    assert benchmarks.choice(said, options) == letter


def test_files_of_the_world_and_pairs(tmp_path):
    file = tmp_path / "MME_tabletop.tsv"
    benchmarks.export("mme", 8, file)
    rows = benchmarks.read(file)
    assert len(rows) == 8 and benchmarks.metric_of(file, rows) == "pairs"
    assert rows[0]["images"][0].shape == (64, 64, 3) and rows[0]["group"] == rows[1]["group"]
    found = benchmarks.run(file, lambda *asked: [r["answers"][0] for r in rows], None, str)
    assert found == {"accuracy": 1, "accuracy+": 1, "score": 200, "questions": 8}
    half = benchmarks.total([1, 1, 1, 0, 1, 1, 1, 1], rows, "pairs")
    assert half["accuracy"] == 7 / 8 and half["accuracy+"] == 3 / 4


@pytest.mark.parametrize("text, names", [
    ("", "needs the columns"), ("question\tanswer\n", "and a row"),
    ("index\tquestion\n1\twhat\n", "needs the columns"),
    ("index\timage\tquestion\tanswer\n1\t" + "A" * 80 + "\tq\ta\n", "row 1 has no readable image"),
    ("index\timage\tquestion\tanswer\n1\t7\tq\ta\n", "row 1 has no readable image"),
    ("index\timage_path\tquestion\tanswer\n1\tno.png\tq\ta\n", "row 1 has no readable image"),
])  # fmt: skip
def test_bad_files_are_named(tmp_path, text, names):
    file = tmp_path / "bad.tsv"
    file.write_text(text)
    with pytest.raises(common.UserError, match="--benchmark .*bad.tsv") as error:
        benchmarks.read(file)
    assert names in str(error.value)
    with pytest.raises(common.UserError):
        benchmarks.read(tmp_path / "missing.tsv")


def test_answers_written_as_lists():
    assert benchmarks.several("left") == ["left"]
    assert benchmarks.several("['a', \"b\"]") == ["a", "b"]
    assert benchmarks.several('["a"') == ['["a"']
    assert benchmarks.contains("It says STOP 4", ["stop4"]) == 1


class Writer:
    """Says what it is told to, and notes how many words it was allowed."""

    def __init__(self, *said):
        self.said, self.limits = said, []

    def __call__(self, samples, limit):
        self.limits.append(limit)
        return self.said


def table(path, *rows):
    path.write_text("\n".join("\t".join(row) for row in rows))
    return path


def test_mmbench_counts_a_question_that_is_right_however_its_options_are_turned(tmp_path):
    shot = score.png(np.zeros((8, 8, 3), np.uint8))
    rows = [
        ("index", "image", "question", "answer", "A", "B"),
        ("7", shot, "which", "A", "cup", "ball"), ("1000007", "7", "which", "B", "ball", "cup"),
        ("9", shot, "who", "B", "I", "you"), ("1000009", "9", "who", "A", "you", "I"),
    ]  # fmt: skip
    write = Writer("A", "B", "B", "B")
    found = benchmarks.run(table(tmp_path / "MMBench_DEV_EN_V11.tsv", *rows), write, None, str)
    assert found == {"accuracy": 0.5, "questions": 2, "of each turn": 0.75} and write.limits == [64]


def test_a_row_may_have_several_pictures(tmp_path):
    shots = [np.full((8, 8, 3), shade, np.uint8) for shade in (0, 200)]
    for name, shot in zip("ab", shots):
        score.Image.fromarray(shot).save(tmp_path / f"{name}.png")
    rows = [
        ("index", "image", "image_path", "question", "answer"),
        ("1", str([score.png(shot) for shot in shots]), "", "q", "x"),
        ("2", "", "['a.png', 'b.png']", "q", "x"), ("3", "1", "", "q", "x"),
    ]  # fmt: skip
    for row in benchmarks.read(table(tmp_path / "MMMU_DEV_VAL.tsv", *rows)):
        assert [image.mean() for image in row["images"]] == [0, 200]


def test_a_judge_of_answers_that_stays_silent_is_one_line(stub, tmp_path, monkeypatch):
    monkeypatch.setattr(score.time, "sleep", lambda seconds: None)
    benchmarks.export("pope", 1, tmp_path / "MMVet.tsv")
    Stub.faults, write = [500] * 6, Writer("yes")
    with pytest.raises(common.UserError, match="question 0, no usable answer after 6") as error:
        benchmarks.run(tmp_path / "MMVet.tsv", write, replace(Config(), judge=stub), str)
    assert "\n" not in str(error.value) and len(Stub.asked) == 6 and write.limits == [512]


# --- the hand's way in recordings of any layout ---------------------------------------------------


def recorded(state, action):
    """An episode as it comes from a disk."""
    return data.Episode({}, np.asarray(state, np.float32), np.asarray(action, np.float32), "go")


def test_the_hand_of_worlds_and_of_bridge_is_in_the_state(episodes):
    for e in (episodes[0], recorded(episodes[0].state, np.zeros((len(episodes[0].action), 7)))):
        path = events.hand(e)
        assert np.array_equal(path[:, :6], e.state[:, :6])
        assert np.array_equal(path[:, 6], e.state[:, 7])


def test_other_recordings_say_in_the_action_how_open_the_hand_is():
    action = np.zeros((5, 7))
    action[3:, 6] = 1
    fingers = np.random.default_rng(0).random((5, 8))  # LIBERO: two joints at the end
    path = events.hand(recorded(fingers, action))
    assert path.shape == (5, 7) and path[:, 6].tolist() == [0, 0, 0, 1, 1]
    assert np.allclose(path[:, :6], fingers[:, :6], atol=1e-6)


def test_a_quaternion_becomes_a_turn_whatever_its_sign():
    angles, q = 0.1 * np.arange(6), np.zeros((6, 8))
    q[:, 5], q[:, 6] = np.sin(0.3 + angles / 2), np.cos(0.3 + angles / 2)  # about z
    q[::2, 3:7] *= -1
    path = events.hand(recorded(q, np.zeros((6, 7))))
    assert np.allclose(path[:, 3:6], angles[:, None] * [0, 0, 1], atol=1e-5)


def test_without_a_state_the_actions_are_the_way():
    action = np.random.default_rng(0).random((5, 7))
    path = events.hand(recorded(np.zeros((5, 0)), action))
    assert path.shape == (5, 7) and not path[0, :6].any()
    assert np.allclose(np.diff(path[:, :6], axis=0), action[:-1, :6], atol=1e-6)


def test_scores_of_ddm_net_are_read_as_it_reads_them(tmp_path):
    """Above 0.53, highest within 5 frames, none among the first 2 and the last 3."""
    scores = np.zeros(20)
    scores[[1, 5, 9, 15, 17]] = 0.9, 0.54, 0.7, 0.6, 0.8
    (tmp_path / "s.json").write_text(json.dumps({"0": scores.tolist()}))
    (found,) = events.from_file(tmp_path / "s.json", [recorded(np.zeros((20, 8)), scores[:, None])])
    assert found == [9]  # 1 and 17 lie at the ends, and 17 hides 15; 9 hides 5
    assert events.peaks(scores, 0.53) == [1, 5, 9, 15, 17]


def test_boundaries_are_looked_for_where_there_is_reasoning(monkeypatch):
    still = recorded(np.zeros((6, 8)), np.zeros((6, 7)))
    said = recorded(np.zeros((6, 8)), np.zeros((6, 7)))
    said.reasoning = ["why"] * 6
    made = SimpleNamespace(boundaries=lambda e: [2])
    monkeypatch.setattr(events, "detector", lambda *a: made)
    cfg = replace(Config(), world="none", events="similarity")
    labels = events.scene_labels([still, said], cfg, None)
    assert [label.tolist() for label in labels] == [[0] * 6, [0, 0, 1, 0, 0, 0]]
    assert not events.scene_labels([still], replace(cfg, events="ddm"), None)[0].any()
    with pytest.raises(common.UserError, match="--events ddm learns from a world's marks"):
        events.scene_labels([said], replace(cfg, events="ddm"), None)
