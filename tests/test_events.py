"""Event boundaries and the judges of the VLA Score."""

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
from worlds import events, loop, score, tabletop

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
    assert events.matches([5, 7.5], [3.5, 6], 2) == 2  # true boundaries choose, in order
    assert events.matches([4], [3, 5], 1) == 1 and events.matches([], [3], 1) == 0


def test_scores_of_some_frames_are_boundaries_of_those(tmp_path):
    """DDM-Net scores every few frames: its radius and ends count in places of its own list."""
    film, file = SimpleNamespace(action=np.zeros((60, 7)), number=-1), tmp_path / "scores.json"
    at = list(range(1, 60, 3))
    scores = [0.9 if t in (16, 43) else 0.1 for t in at]
    for rows in ({"frame_idx": [float(t) for t in at], "scores": scores}, np.eye(60)[20].tolist()):
        file.write_text(json.dumps({"0": rows}))
        want = [16, 43] if isinstance(rows, dict) else [20]
        found = events.from_file(file, [film])
        assert found == [want] and all(type(t) is int for t in found[0])
    for bad in ({"frame_idx": [70], "scores": [1]}, {"frame_idx": at, "scores": [1]}, [0.5] * 59):
        file.write_text(json.dumps({"0": bad}))
        with pytest.raises(common.UserError, match="episode 0 has 60 frames"):
            events.from_file(file, [film])


def test_a_detector_needs_the_cameras_it_has_learned(episodes, monkeypatch):
    monkeypatch.setattr(data, "demonstrations", lambda *_: episodes)
    alone = replace(episodes[0], images={"static": episodes[0].images["static"]})
    with pytest.raises(common.UserError, match="other cameras than --data"):
        events.scene_labels([alone], Config())


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
    state = np.zeros((4, 8))
    state[:, 5] = [3.10, 3.12, -3.14, -3.10]  # over pi, the short way
    assert events.move_name(state, 0) == "turn left"


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


def test_a_local_vlm_judges_or_says_that_it_cannot(tmp_path, monkeypatch):
    cfg, runs = replace(Config(), judge="local:tiny"), fake_runs(4)
    with pytest.raises(common.UserError, match="4 of 4 trajectories could not be judged"):
        judge(cfg, tmp_path / "scores.jsonl", runs)
    asked, load = [], common.load_backbone

    def loaded(*args):
        vlm, processor = load(*args)
        ids = processor.tokenizer.encode("x", add_special_tokens=False)

        def generate(input_ids, **given):
            asked.append(given)
            return torch.cat([input_ids, torch.tensor([ids])], dim=1)

        monkeypatch.setattr(vlm, "generate", generate)
        return vlm, processor

    monkeypatch.setattr(common, "load_backbone", loaded)
    monkeypatch.setattr(score, "parse_marks", lambda text, reasons: GOOD["Result"])
    rows = judge(cfg, tmp_path / "scores.jsonl", runs)
    assert [r["Alignment"] for r in rows] == [9] * 4 and len(asked) == 4
    assert asked[0]["image_grid_thw"].shape == (3, 3)  # the pictures of a run


def test_whoever_judges_must_be_there_before_anything_is_spent(stub):
    score.check(replace(Config(), judge=stub))
    for wrong, says in (("local:nowhere", "unknown --backbone nowhere"),
                        ("http://127.0.0.1:1/v1", "nobody answers there"),
                        ("http://127.0.0.1:port/v1", "nobody answers there")):  # fmt: skip
        with pytest.raises(common.UserError, match=says):
            score.check(replace(Config(), judge=wrong))


def test_a_judge_that_is_gone_is_not_asked_on_and_on(stub, tmp_path):
    Stub.faults = [500] * 18  # six tries of three trajectories
    with pytest.raises(common.UserError, match="6 of 6 .* with --resume"):
        judge(replace(Config(), judge=stub), tmp_path / "scores.jsonl", fake_runs())
    assert len(Stub.asked) == 18


def test_trajectories_of_a_judge_that_looks_are_acted_once(stub, tmp_path, monkeypatch):
    cfg, runs = replace(Config(), judge=stub, score_episodes=2), fake_runs(2)
    acted = []
    monkeypatch.setattr(score, "trajectories", lambda *a: acted.append(a) or runs)
    policy = SimpleNamespace(device="cpu")

    def formula(R, A, intent, RA, B, reasons, bracket):
        return A

    first = score.judged(policy, cfg, tmp_path, print, formula, True)
    before = len(Stub.asked)
    assert score.judged(policy, cfg, tmp_path, print, formula, True) == first
    assert len(acted) == 1 and len(Stub.asked) == before == 2
    for changed in ({"seed": 1}, {"euler": 7}, {"eval_only": "another"}):
        score.judged(policy, replace(cfg, **changed), tmp_path, print, formula, True)
    policy.trained = 4, 1
    score.judged(policy, replace(cfg, **changed), tmp_path, print, formula, True)
    assert len(acted) == 5


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
    labels = events.scene_labels([still, said], cfg)
    assert [label.tolist() for label in labels] == [[0] * 6, [0, 0, 1, 0, 0, 0]]
    assert not events.scene_labels([still], replace(cfg, events="ddm"))[0].any()
    with pytest.raises(common.UserError, match="--events ddm learns from a world's marks"):
        events.scene_labels([said], replace(cfg, events="ddm"))
