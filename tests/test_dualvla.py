"""dualvla.py against its paper: a test for each equation, then what the equations rest on."""

import ast
import fnmatch
import inspect
import json
import re
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import common
import data
import dualvla
import twinbrain
from dualvla import ABLATIONS, Config, acceleration_keyframes, keep
from parts import instructvla, runs
from parts.instructvla import Mixture, Thread
from worlds import events

SMALL = replace(
    Config(), dtype="fp32", batch=4, horizon=4, width=32, depth=2, heads=2, queries=4, rank=4,
    repeats=2, augment=0, optimizer="adamw", mix=2, talk=12, events="phase",
    new_words=False,
)  # fmt: skip
SMALL.explicit = ()
FOLDERS = {stage: Path("nowhere") / stage for stage in dualvla.ORDER}
ALONE = common.Dist(0, 1, torch.device("cpu"))
SOURCE = Path(dualvla.__file__).read_text()


def small(stage="dual", **flags):
    base = replace(SMALL, **flags)
    base.explicit = ()
    return dualvla.staged(base, stage, FOLDERS)


def stirred(model, seed):
    """LoRA begins at zero and new words at random: gives both something to say."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name.startswith("gate.") or name.startswith("vlm.") and ".up." in name:
                p += 0.05 * torch.randn(p.shape, generator=generator)
    return model


class Case:
    """A model of one stage and a batch: reasoning kept, pruned, plain, a move; two questions."""

    def __init__(self, episodes, stage="dual", seed=1, **flags):
        self.cfg = cfg = small(stage, **flags)
        self.model, self.processor = dualvla.build(cfg, 8, 7)
        stirred(self.model, seed).eval()
        self.stats = data.statistics(episodes)
        kept = dualvla.keep_labels(episodes, cfg)
        self.samples = dualvla.Samples(episodes, self.stats, cfg, kept)
        forms = [("reason", True), ("reason", False), ("plain", True), ("motion", True)]
        rows = [self.samples.get(t, np.random.default_rng(0)) for t in (5, 25, 44, 50)]
        words = ["the cup is in the hand so i lift it", "", "", "move left"]
        self.robot = [
            row | {"form": form, "said": said, "learn": learn}
            for row, (form, learn), said in zip(rows, forms, words)
        ]
        self.asked = data.question_sets(["pope"], 2)["pope"]
        both = self.robot + (self.asked if cfg.mix else [])
        self.batch = dualvla.collate(both, cfg, self.processor)
        self.noise = dualvla.draw_noise(cfg, 0, 7, ALONE)
        self.policy = dualvla.Policy(
            self.model, cfg, self.processor, {"tabletop": self.stats}, ALONE.device
        )

    def step(self, teachers=(None, None)):
        """Losses by name and gradients of what trains."""
        soft = dualvla.teach(teachers, self.batch, self.noise)
        losses = self.model(self.batch, self.noise, soft)
        dualvla.total_loss(losses, self.cfg).backward()
        self.model.forget_words()
        grads = {n: p.grad for n, p in self.model.named_parameters() if p.requires_grad}
        self.model.zero_grad(set_to_none=True)
        return {name: float(loss.detach()) for name, loss in losses.items()}, grads


@pytest.fixture(scope="module")
def case(episodes):
    return Case(episodes)


@pytest.fixture(scope="module")
def teachers(episodes):
    """E and G, each with weights of its own."""
    expert, generalist = Case(episodes, "expert", 2), Case(episodes, "generalist", 3)
    return expert.model, generalist.model


@pytest.fixture(scope="module")
def spelled(episodes):
    """The same with actions as words, and its two teachers."""
    made = [Case(episodes, stage, seed, actions="tokens")
            for seed, stage in enumerate(("dual", "expert", "generalist"), 1)]  # fmt: skip
    return made[0], made[1].model, made[2].model


def log_softmax(logits):
    logits = np.asarray(logits, float)
    shifted = logits - logits.max()
    return shifted - np.log(np.exp(shifted).sum())


def logits_of(model, sample, form=""):
    """Logits (T, V) and labels (T,) of one sample alone."""
    cfg, processor = model.cfg, model.processor
    with torch.no_grad():
        batch = dualvla.sense([sample], cfg, processor, form)
        h = model.read(batch["prompt"], batch)[0]
        return model.vlm.lm_head(h).numpy(), batch["prompt"]["labels"][0].tolist()


def divergence(teacher, student, T):
    """KL(teacher || student) of two rows of logits, word by word."""
    log_p, log_q = log_softmax(teacher / T), log_softmax(student / T)
    return sum(np.exp(p) * (p - q) for p, q in zip(log_p, log_q))


# --- one test for each equation -------------------------------------------------------------------


def test_eq2_specialist_loss_of_velocities(case):
    x_0, t = (x.numpy() for x in case.noise)
    x_t, u_t = dualvla.interpolate(case.batch["robot"]["action"], *case.noise)
    rng, means = np.random.default_rng(0), []
    v = rng.standard_normal(x_t.shape).astype(np.float32)
    for b, sample in enumerate(case.robot):
        errors = []
        for r, h, a in np.ndindex(2, 4, 7):
            x_1 = sample["action"][h, a]
            want = (1 - t[b, r]) * x_0[b, r, h, a] + t[b, r] * x_1
            assert float(x_t[b, r, h, a]) == pytest.approx(float(want), abs=1e-5)
            if sample["mask"][h]:
                errors.append((v[b, r, h, a] - (x_1 - x_0[b, r, h, a])) ** 2)
        means.append(np.mean(errors))
    loss = dualvla.action_loss(torch.from_numpy(v), u_t, case.batch["robot"]["mask"])
    assert float(loss) == pytest.approx(np.mean(means), 1e-4)


def test_eq2_specialist_loss_of_words(episodes):
    expert = Case(episodes, "expert", actions="tokens")
    total, count = 0.0, 0
    for sample in expert.robot:
        sample = sample | {"form": "plain", "said": ""}
        logits, labels = logits_of(expert.model, sample)
        for k in range(1, len(labels)):
            if labels[k] >= 0:
                total, count = total - log_softmax(logits[k - 1])[labels[k]], count + 1
    batch = dualvla.sense(expert.robot, expert.cfg, expert.processor, form="plain")
    h = expert.model.read(batch["prompt"], batch)
    head, first = expert.model.vlm.lm_head, expert.model.first
    losses = dualvla.token_losses(head, h, batch["prompt"], first)
    inside = sum(int(sample["mask"].sum()) for sample in expert.robot)
    assert count == 7 * inside < 4 * 4 * 7 and float(losses["text"].detach()) == 0
    assert float(losses["action"].detach()) == pytest.approx(total / count, 1e-4)


def test_eq3_reasoning_and_action_are_one_sequence(spelled):
    case = spelled[0]
    total, count = 0.0, 0
    for sample in case.robot:
        logits, labels = logits_of(case.model, sample)
        for k in range(1, len(labels)):
            if labels[k] >= 0:  # y_t: reasoning first, then the action
                total, count = total - log_softmax(logits[k - 1])[labels[k]], count + 1
    with torch.no_grad():
        losses = case.model(case.batch, None)
        answers = losses.pop("answer")
    inside = sum(int(sample["mask"].sum()) for sample in case.robot)
    assert 7 * inside < count and float(answers) > 0
    assert float(dualvla.vla_loss(losses)) == pytest.approx(total / count, 1e-4)


def test_eq4_acceleration_and_gripper():
    rng = np.random.default_rng(0)
    pose = rng.standard_normal((30, 6)).cumsum(0) * 0.1
    gripper = (np.arange(30) // 7) % 2
    norms = []
    for k in range(1, 29):
        norms.append(sum((pose[k + 1, d] - 2 * pose[k, d] + pose[k - 1, d]) ** 2 for d in range(6)))
    norms = [0, *np.sqrt(norms), 0]
    mean = sum(norms) / 28
    want = [norms[k] > mean or (k > 0 and gripper[k] != gripper[k - 1]) for k in range(30)]
    assert acceleration_keyframes(pose, gripper).tolist() == want and 5 < sum(want) < 25


@pytest.mark.parametrize("T", [1.0, 2.0])
def test_eq5_action_teacher_without_reasoning(spelled, T):
    case, expert, _ = spelled
    cfg = replace(case.cfg, temperature=T)
    rows = []
    for sample in case.robot:
        said, labels = logits_of(case.model, sample)  # (o, i, r)
        silent, plain = logits_of(expert, sample, form="plain")  # (o, i)
        first = case.model.first
        ours = [k - 1 for k, label in enumerate(labels) if label >= first]
        its = [k - 1 for k, label in enumerate(plain) if label >= first]
        inside = 7 * int(sample["mask"].sum())
        assert len(ours) == len(its) == inside  # aligned by the action's index, not by the place
        rows += [divergence(silent[j], said[i], T) for i, j in zip(ours, its)]
    case.model.cfg = cfg
    with torch.no_grad():
        soft = dualvla.teach((expert, None), case.batch, case.noise)
        loss = float(case.model(case.batch, None, soft)["kd_action"])
    case.model.cfg = case.cfg
    assert loss == pytest.approx(T**2 * np.mean(rows), 1e-3) and loss > 1e-4


def test_eq5_of_two_gaussians_is_a_distance(case, teachers):
    with torch.no_grad():
        soft = dualvla.teach((teachers[0], None), case.batch, case.noise)
        losses = case.model(case.batch, case.noise, soft)
        robot = case.batch["robot"]
        x_t, _ = dualvla.interpolate(robot["action"], *case.noise)
        h = case.model.read(robot["prompt"], robot)
        v = case.model.flow(x_t, case.noise[1], case.model.keys(h, robot))
        h = teachers[0].read(case.batch["plain"], robot)  # not a word of reasoning in it
        v_E = teachers[0].flow(x_t, case.noise[1], teachers[0].keys(h, robot))
    means, normal = [], torch.distributions.Normal
    for b in range(4):
        mine, its = (normal(x[b][:, robot["mask"][b]], case.cfg.sigma) for x in (v, v_E))
        means.append(torch.distributions.kl_divergence(its, mine).mean())
    assert float(losses["kd_action"]) == pytest.approx(np.mean(means), 1e-4) and np.mean(means) > 0


@pytest.mark.parametrize("T", [1.0, 3.0])
def test_eq6_reasoning_teacher(case, teachers, T):
    rows, logits = [], []
    for model in (case.model, teachers[1]):
        with torch.no_grad():
            h = model.read(case.batch["questions"]["prompt"], case.batch["questions"])
            logits.append(model.vlm.lm_head(h).numpy())
    labels = case.batch["questions"]["prompt"]["labels"].numpy()
    for b, k in np.argwhere(labels >= 0):
        rows.append(divergence(logits[1][b, k - 1], logits[0][b, k - 1], T))
    with torch.no_grad():
        soft = dualvla.teach((None, teachers[1]), case.batch, case.noise)
        h = case.model.read(case.batch["questions"]["prompt"], case.batch["questions"])
        h, _ = common.spoken(h, case.batch["questions"]["prompt"])
        cfg = replace(case.cfg, temperature=T)
        loss = dualvla.reason_distillation(*soft["reason"], h, case.model.vlm.lm_head.weight, cfg)
    assert len(rows) == 4 and float(loss) == pytest.approx(T**2 * np.mean(rows), 1e-3)


def test_eq7_hard_labels_and_a_share_of_the_teachers():
    losses = dict(text=1.0, action=2.0, answer=3.0, kd_action=10.0, kd_reason=20.0)
    assert Config().kd_weight == 0.15
    assert dualvla.total_loss(losses, Config()) == pytest.approx(6 + 0.15 * 30)
    assert dualvla.total_loss(dict(text=1.0, action=2.0), Config()) == 3.0


def test_eq8_vla_score():
    for R, A, I, RA, B in np.random.default_rng(0).random((20, 5)):  # noqa: E741
        B = float(B > 0.5)
        got = dualvla.vla_score(R, A, I, RA, B)
        assert got == pytest.approx(((R + A * I) / 2) * RA * B)
        inner = dualvla.vla_score(R, A, I, RA, B, bracket="inner")
        assert inner == pytest.approx(((R + A) / 2) * I * RA * B)
        assert dualvla.vla_score(R, A, I, RA, B, reasons=False) == pytest.approx(A * I * B)
    means = np.array([[0.9, 0.9, 1.0, 1.0, 1], [0.5, 0.1, 0.2, 0.4, 0]])  # a success, a failure
    each = [dualvla.vla_score(*row) for row in means]
    assert np.mean(each) != pytest.approx(dualvla.vla_score(*means.mean(0)))  # hence per trajectory


# --- the map of the paper -------------------------------------------------------------------------


def functions(tree, prefix=""):
    """-> {"DualVLA.look": (first line, last line)}"""
    found = {}
    for node in tree.body:
        if isinstance(node, ast.ClassDef):
            found |= functions(node, node.name + ".")
        elif isinstance(node, ast.FunctionDef):
            found[prefix + node.name] = node.lineno, node.end_lineno
    return found


def test_equation_map_tags_and_tests_agree():
    entries = re.findall(r"^  Eq\. (\d+) .*-> ([\w.]+)\(\)$", dualvla.__doc__, re.M)
    assert [int(n) for n, _ in entries] == list(range(2, 9))
    places, lines = functions(ast.parse(SOURCE)), SOURCE.splitlines()
    tags = {n: [] for n, _ in entries}
    for number, line in enumerate(lines, 1):
        for n in re.findall(r"# Eq\. \((\d+)\)", line):
            tags[n].append(number)
    for n, name in entries:
        first, last = places[name]
        assert len(tags[n]) == 1 and first < tags[n][0] <= last, f"Eq. {n} in {name}"
    tested = re.findall(r"^def test_eq(\d+)_", Path(__file__).read_text(), re.M)
    assert set(tested) == set(tags)


def test_every_named_ablation_exists():
    text = dualvla.__doc__.partition("Table map")[2].partition("Assumptions")[0]
    words = re.findall(r"[a-z][\w*-]+", text.partition("teachers")[2])
    for name, row in ABLATIONS.items():
        assert any(fnmatch.fnmatch(name, pattern) for pattern in words), name
        assert set(row) - {"_paper", "_row"} <= set(Config.__dataclass_fields__), name
    for rows in dualvla.STAGES.values():
        assert set(rows) <= set(Config.__dataclass_fields__)


def test_the_loop_is_that_of_the_other_scripts():
    ours, its = (
        [line for line in inspect.getsource(m.train).splitlines() if "# [method]" not in line]
        for m in (dualvla, twinbrain)
    )
    assert ours == its


# --- pruning on trajectories made by hand ---------------------------------------------------------


def still(T=9):
    return np.zeros((T, 6)), np.ones(T)


def marked(pose, gripper):
    return np.flatnonzero(acceleration_keyframes(pose, gripper)).tolist()


def test_constant_speed_has_no_keyframes():
    pose, gripper = still()
    assert marked(pose + np.arange(9)[:, None] * [0.01, 0, 0, 0, 0, 0.1], gripper) == []
    assert marked(pose, gripper) == []


def test_rounding_of_recorded_poses_is_no_jerk():
    """Recordings are float32: their second differences at constant speed are not quite zero."""
    way = np.arange(30)[:, None] * np.array([0.013, -0.007, 0.003, 0, 0, 0.1], np.float32)
    assert marked((0.3 + way).astype(np.float32), np.ones(30)) == []


def test_one_jerk_marks_its_frame():
    pose, gripper = still()
    pose[5:, 0] = 0.05 * np.arange(1, 5)  # stands until frame 4, then moves on evenly
    assert marked(pose, gripper) == [4]


@pytest.mark.parametrize("at", [1, 4, 8])
def test_a_gripper_marks_the_first_frame_of_its_new_value(at):
    pose, gripper = still()
    gripper[at:] = 0
    assert marked(pose, gripper) == [at]


def test_angles_wrap():
    pose, gripper = still()
    yaw = np.linspace(3.0, 3.6, 9)
    pose[:, 5] = (yaw + np.pi) % (2 * np.pi) - np.pi  # jumps from pi to -pi at constant speed
    assert np.abs(np.diff(pose[:, 5])).max() > 6 and marked(pose, gripper) == []


def test_two_frames_and_one():
    assert marked(np.random.rand(2, 6), np.array([1, 0])) == [1]
    assert marked(np.random.rand(1, 6), np.array([1])) == []


def test_keep_rules():
    scene, action = np.array([1, 1, 0, 0], bool), np.array([1, 0, 1, 0], bool)
    want = {"both": 0b1000, "action": 0b1010, "scene": 0b1100, "either": 0b1110, "none": 0b1111}
    for rule, bits in want.items():
        got = keep(scene, action, rule)
        assert "".join(str(int(k)) for k in got) == f"{bits:04b}", rule
        assert got is not scene and got is not action
    counts = np.zeros(4)
    for seed in range(400):
        got = keep(scene, action, "random", np.random.default_rng(seed))
        assert got.sum() == 1  # as many as "both"
        counts += got
    assert counts.min() > 60


def test_pruned_samples_keep_everything_but_the_words(episodes):
    kept = [np.zeros(len(e.action), bool) for e in episodes]
    kept[0][:] = True
    cfg = replace(small(), reason=1.0)
    samples = dualvla.Samples(episodes, data.statistics(episodes), cfg, kept)
    rng = np.random.default_rng
    for index, said in ((3, episodes[0].reasoning[3]), (samples.starts[1] + 3, "")):
        whole = data.Windows.get(samples, index, rng(0))
        got = samples.get(index, rng(0))
        assert (got["form"], got["said"], got["learn"]) == ("reason", said, bool(said))
        assert all(np.array_equal(a, b) for a, b in zip(got["images"], whole["images"]))
        assert all(np.array_equal(got[k], whole[k]) for k in whole if k != "images")
    samples.cfg = replace(cfg, masking="ignore")
    got = samples.get(samples.starts[1] + 3, rng(0))
    assert got["said"] == episodes[1].reasoning[3] and not got["learn"]


def test_masked_words_are_read_but_not_learned(case):
    sample = case.robot[0]
    learned, masked = (
        dualvla.sense([sample | {"learn": learn}], case.cfg, case.processor)["prompt"]
        for learn in (True, False)
    )
    assert torch.equal(learned["input_ids"], masked["input_ids"])
    words = len(case.processor.tokenizer.encode(sample["said"]))
    assert (learned["labels"] >= 0).sum() == words + 1  # and when to act
    assert (masked["labels"] >= 0).sum() == 1


def test_forms_come_at_their_shares(episodes):
    cfg = replace(small(), reason=0.5, motion=0.2)
    kept = [np.ones(len(e.action), bool) for e in episodes]
    samples = dualvla.Samples(episodes, data.statistics(episodes), cfg, kept)
    forms = [samples.get(7, np.random.default_rng(i))["form"] for i in range(600)]
    for form, share in (("reason", 0.5), ("motion", 0.2), ("plain", 0.3)):
        assert forms.count(form) / 600 == pytest.approx(share, abs=0.06)


def test_episodes_without_reasoning_are_asked_plainly_and_keep_their_moves(episodes):
    mute = [replace(e, reasoning=[]) for e in episodes]
    cfg = replace(small(), reason=0.5, motion=0.2)
    kept = dualvla.keep_labels([*episodes, *mute], cfg)
    assert all(k.all() for k in kept[4:]) and not any(k.all() for k in kept[:4])
    samples = dualvla.Samples(mute, data.statistics(mute), cfg, kept[4:])
    rows = [samples.get(7, np.random.default_rng(i)) for i in range(600)]
    forms = [row["form"] for row in rows]
    assert set(forms) == {"plain", "motion"}
    assert forms.count("motion") / 600 == pytest.approx(0.2, abs=0.06)
    assert all(bool(row["said"]) == (row["form"] == "motion") for row in rows)


# --- two teachers ---------------------------------------------------------------------------------


def test_the_action_teacher_is_asked_without_reasoning(case):
    plain, robot = case.batch["plain"]["input_ids"], case.batch["robot"]["prompt"]["input_ids"]
    texts = [[case.processor.words(row) for row in ids] for ids in (plain, robot)]
    assert all("Say why" not in t and "lift" not in t for t in texts[0])
    assert "Say why" in texts[1][0] and "so i lift it" in texts[1][0]
    assert "Say why" in texts[1][1] and "so i" not in texts[1][1]  # pruned: asked, unanswered
    assert "Name the move" in texts[1][3] and "move left" in texts[1][3]


def test_each_sample_has_the_teacher_of_its_domain(case, teachers):
    both = dualvla.teach(teachers, case.batch, case.noise)
    assert set(both) == {"action", "reason"}
    robot = {k: v for k, v in case.batch.items() if k != "questions"}
    assert set(dualvla.teach(teachers, robot, case.noise)) == {"action"}
    moved = dict(case.batch, robot=dict(case.batch["robot"], action=torch.zeros(4, 4, 7)))
    for batch in (case.batch, moved):  # what the robot did does not reach the reasoning teacher
        with torch.no_grad():
            soft = dualvla.teach(teachers, batch, case.noise)
            loss = case.model(batch, case.noise, soft)["kd_reason"]
        assert torch.equal(soft["reason"][0], both["reason"][0])
        assert float(loss) > 0


def test_no_gradient_from_the_other_teacher(case, teachers):
    """Gradients of a KL with respect to the hidden states of robot data and of questions."""
    seen, read = [], type(case.model).read

    def noted(self, prompt, batch, caches=(None, None)):
        h = read(self, prompt, batch, caches)
        if h.requires_grad:
            h.retain_grad()
            seen.append(h)
        return h

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(case.model), "read", noted)
        for name, silent in (("kd_action", 1), ("kd_reason", 0)):
            seen.clear()
            soft = dualvla.teach(teachers, case.batch, case.noise)
            case.model(case.batch, case.noise, soft)[name].backward()
            assert seen[silent].grad is None and seen[1 - silent].grad.any()  # robot, questions
    assert all(p.grad is None for t in teachers for p in t.vlm.lm_head.parameters())
    case.model.zero_grad(set_to_none=True)


@pytest.mark.parametrize("chunk", [1, 4, 64])
def test_fused_kl_is_the_naive_one_with_its_gradients(chunk):
    generator = torch.Generator().manual_seed(0)
    h, head, h_t, head_t = (torch.randn(*s, generator=generator, dtype=torch.float64)
                            for s in ((10, 6), (37, 6), (10, 5), (37, 5)))  # fmt: skip
    found = []
    for fused in (True, False):
        x, w = h.clone().requires_grad_(), head.clone().requires_grad_()
        if fused:
            loss = common.linear_kl(x, w, h_t, head_t, 2.0, chunk)
        else:
            p = (h_t @ head_t.T / 2.0).log_softmax(-1)
            q = (x @ w.T / 2.0).log_softmax(-1)
            loss = (p.exp() * (p - q)).sum(-1).mean()
        (3 * loss).backward()
        found.append((loss.detach(), x.grad, w.grad))
    for ours, want in zip(*found):
        assert torch.allclose(ours.double(), want, atol=1e-5)


def test_fused_kl_never_holds_the_vocabulary_for_all_positions(monkeypatch):
    sizes, softmax = [], torch.Tensor.log_softmax

    def noted(x, dim):
        sizes.append(len(x))
        return softmax(x, dim)

    monkeypatch.setattr(torch.Tensor, "log_softmax", noted)
    h = torch.randn(1000, 4, requires_grad=True)
    common.linear_kl(h, torch.randn(50, 4), torch.randn(1000, 4), torch.randn(50, 4)).backward()
    assert max(sizes) == 256 and sum(sizes) == 2000


def test_a_teacher_of_other_units_is_refused(case):
    robots = {"mine": case.stats}
    runs.same_units("expert", "RUN", {"its": case.stats}, robots)
    wide = json.loads(json.dumps(case.stats))
    wide["action"]["q99"][0] *= 1.5
    narrow = json.loads(json.dumps(case.stats))
    narrow["state"] = {name: row[:7] for name, row in narrow["state"].items()}
    for other in (wide, narrow):
        with pytest.raises(common.UserError, match="--expert RUN learned from its") as error:
            runs.same_units("expert", "RUN", {"its": other}, robots)
        assert "\n" not in str(error.value) and "mine" in str(error.value)


# --- the model ------------------------------------------------------------------------------------


def test_mixture_of_lora_experts_written_out():
    common.seed_all(0)
    gates = SimpleNamespace(now=None)
    m = Mixture(torch.nn.Linear(5, 3), 2, 2, 0.5, gates)
    for up in m.up:
        torch.nn.init.normal_(up)
    x, gates.now = torch.randn(1, 4, 5), torch.rand(1, 4, 2)
    W, b = (p.detach().numpy() for p in (m.base.weight, m.base.bias))
    for t in range(4):
        want = W @ x[0, t].numpy() + b
        for i in range(2):
            A, B = m.down[i].detach().numpy(), m.up[i].detach().numpy()
            want += float(gates.now[0, t, i]) * 0.5 * (B @ (A @ x[0, t].numpy()))
        assert np.allclose(m(x)[0, t].detach().numpy(), want, atol=1e-5)
    gates.now = None
    assert torch.equal(m(x), m.base(x))


def test_g_begins_as_e(episodes):
    expert = Case(episodes, "expert")
    student, _ = dualvla.build(small("generalist"), 8, 7)
    own = expert.model.untouched
    tensors = {n: t for n, t in expert.model.state_dict().items() if n not in own}
    missing, surplus = student.load_state_dict(tensors, strict=False)
    assert not surplus and {n.split(".")[0] for n in missing} == {"vlm", "gate"}
    with torch.no_grad():
        h = [m.eval().read(expert.batch["robot"]["prompt"], expert.batch["robot"])
             for m in (expert.model, student)]  # fmt: skip
    real = expert.batch["robot"]["prompt"]["real"]
    assert torch.allclose(h[0][real], h[1][real], atol=1e-4)


def test_before_training_the_vlm_is_the_librarys(case):
    library, _ = common.load_backbone("tiny")
    model = dualvla.build(small("expert"), 8, 7)[0].eval()
    asked = case.batch["questions"]
    words = {"pixel_values": asked["pixel_values"], "image_grid_thw": torch.tensor(asked["grids"])}
    words |= {k: asked["prompt"][k] for k in ("input_ids", "position_ids")}
    words["attention_mask"] = common.causal_mask(asked["prompt"]["real"])
    with torch.no_grad():
        want = library.model(**words).last_hidden_state
        got = model.read(asked["prompt"], asked)
    assert torch.allclose(got[asked["prompt"]["real"]], want[asked["prompt"]["real"]], atol=1e-4)


def test_queries_begin_amid_the_words_that_were_trained():
    model, processor = dualvla.build(small("expert"), 8, 7)
    words = model.vlm.get_input_embeddings().weight.detach()
    trained = words[~common.untrained(model.vlm, model.first)]
    queries = model.queries.detach()
    assert 0.7 < queries.norm(dim=1).mean() / trained.norm(dim=1).mean() < 1.4
    assert torch.cosine_similarity(queries.mean(0), trained.mean(0), dim=0) > 0.5
    assert torch.cosine_similarity(queries[0], queries[1:]).max() < 0.9, "each its own"
    assert not torch.equal(queries, dualvla.build(small("expert", seed=1), 8, 7)[0].queries)


@pytest.mark.parametrize("stage", dualvla.ORDER)
def test_who_trains_in_which_stage(episodes, stage, teachers):
    case = Case(episodes, stage)
    _, grads = case.step(teachers if stage == "dual" else (None, None))
    parts = {re.sub(r"^vlm.*\.(down|up)\.(\d)$", r"lora \2", n).split(".")[0] for n in grads}
    if stage == "expert":
        assert parts == {"lora 0", "vlm", "queries", "flow"}
        (words,) = [g for n, g in grads.items() if "embed_tokens" in n]
        rows = words.abs().sum(1).nonzero()[:, 0].tolist()
        assert rows and all(case.model.first <= r < case.model.first + 256 for r in rows)
    else:
        assert parts == {"lora 0", "lora 1", "queries", "gate"}
    still = {n for n, g in grads.items() if g is None or not g.any()}
    assert still <= {"flow.eye.camera"}  # FiLM begins at zero: the cameras come a step later


def test_action_words_come_back(case):
    actions = np.random.default_rng(0).uniform(-1, 1, (4, 7))
    actions[0, :2] = -1, 1
    ids = instructvla.to_tokens(actions, 100)
    assert len(ids) == 28 and min(ids) == 100 and max(ids) == 355
    back = instructvla.from_tokens(torch.tensor([ids]), 100, 7)[0].numpy()
    assert np.abs(back - actions).max() <= 1 / 256 + 1e-9


@pytest.mark.parametrize("actions", ["flow", "tokens"])
def test_speaking_word_by_word_equals_one_pass(episodes, case, spelled, actions):
    """Rows that say different numbers of words, then act, against each row's prompt in one pass."""
    case = case if actions == "flow" else spelled[0]
    form, model = "reason", case.model
    plain = [{k: s[k] for k in ("images", "instruction", "robot", "state")} for s in case.robot]
    batch = dualvla.sense(plain, case.cfg, case.processor, form)
    stops, count = [2, 1, 5, 3], [0]

    def stop(ids):
        if len(ids) > len(stops):  # which words of all may not come first
            return torch.zeros_like(ids, dtype=torch.bool)
        count[0] += 1
        return torch.tensor([count[0] > n for n in stops])

    with torch.no_grad():
        thread = Thread(model, batch)
        said = thread.speak(9, stop, 0.0)
    assert [len(words) for words in said] == stops
    for b, (sample, words) in enumerate(zip(plain, said)):
        alone = dualvla.sense([sample], case.cfg, case.processor, form)
        row = alone["prompt"]["input_ids"][0].tolist() + words
        alone["prompt"] = case.processor.pad([row], [alone["grids"]])
        with torch.no_grad():
            h = model.read(alone["prompt"], alone)[0]
        assert torch.allclose(thread.h[b], h[-1], atol=1e-4)
        for i, word in enumerate(words):
            assert int(model.vlm.lm_head(h[len(row) - len(words) + i - 1]).argmax()) == word


def test_it_speaks_where_words_are_likelier_than_the_bar(case):
    plain = [{k: s[k] for k in ("images", "instruction", "robot", "state")} for s in case.robot]
    batch = dualvla.sense(plain, case.cfg, case.processor, "reason")
    with torch.no_grad():
        logits = case.model.vlm.lm_head(case.model.read(batch["prompt"], batch)[:, -1]).float()
    ends = logits.argmax(-1).unique()  # if the likeliest words may not begin, all others decide
    p = 1 - logits.softmax(-1)[:, ends].sum(-1)  # (B,)
    bar = float(p.min() + p.max()) / 2
    with torch.no_grad():
        said = Thread(case.model, batch).speak(1, lambda ids: torch.isin(ids, ends), bar)
    assert [len(words) for words in said] == (p > bar).int().tolist()
    assert any(said) and not all(said) and not {i for row in said for i in row} & set(ends.tolist())


@pytest.mark.parametrize("form", ["plain", "reason"])
@pytest.mark.parametrize("actions", ["flow", "tokens"])
def test_each_form_acts(episodes, case, spelled, actions, form):
    policy = (case if actions == "flow" else spelled[0]).policy
    policy.form = form
    seen = [{"images": {n: v[0] for n, v in e.images.items()}, "state": e.state[0]}
            for e in episodes[:3]]  # fmt: skip
    words = [e.instruction for e in episodes[:3]]
    chunks = policy.act(seen, words, np.random.default_rng(0))
    assert chunks.shape == (3, 4, 7) and np.isfinite(chunks).all() and len(policy.said) == 3
    assert np.array_equal(chunks, policy.act(seen, words, np.random.default_rng(0)))
    low, high = data.bounds(policy.stats["action"])
    assert (chunks >= low - 1e-6).all() and (chunks <= high + 1e-6).all()


def test_the_prefix_mixes_no_kinds_and_actions_no_draws(case):
    flow, robot = case.model.flow, case.batch["robot"]
    latents, x_t, t = torch.randn(4, 4, 128), torch.randn(4, 2, 4, 7), torch.rand(4, 2)
    with torch.no_grad():
        keys = flow.prefix(latents, robot["views"], robot["state"])
        v = flow(x_t, t, keys)
        other = flow.prefix(latents, robot["views"], robot["state"] + 1)
        for (k, _), (k_2, _) in zip(keys, other):
            same = (k - k_2).abs().amax((0, 1, 3)) < 1e-6
            assert same[:-1].all() and not same[-1]  # the state alone has changed
        x_t[1, 0, 2] += 1.0
        moved = (flow(x_t, t, keys) - v).abs().amax(-1) > 1e-6  # (B, R, H)
    want = torch.zeros(4, 2, 4, dtype=torch.bool)
    want[1, 0] = True
    assert torch.equal(moved, want)


@pytest.mark.parametrize("steps", [1, 4])
def test_integration_reaches_the_target(steps):
    x_0, x_1 = torch.randn(2, 3, 4, 7, generator=torch.Generator().manual_seed(0))
    straight = dualvla.integrate(lambda x, t: (x_1 - x_0)[:, None], x_0, steps)
    assert torch.allclose(straight, x_1, atol=1e-5)


def test_answers_are_those_of_greedy_decoding(case):
    sets = data.question_sets(["pope"], 6)["pope"]
    with torch.no_grad():
        right = case.model.answer(common.ask(sets, case.processor, dualvla.SYSTEM)).tolist()
    said = case.policy.write(sets, 20)
    assert [s == w["answer"] for s, w in zip(said, sets)] == right


@pytest.mark.parametrize("name", ABLATIONS)
def test_each_ablation_trains_and_differs(name, episodes, case, teachers, spelled):
    flags = {k: v for k, v in ABLATIONS[name].items() if not k.startswith("_")}
    stage = flags.pop("stage", "dual")
    arm = Case(episodes, stage, **flags)
    found = {"flow": teachers, "tokens": spelled[1:]}[arm.cfg.actions]
    wanted = [arm.cfg.teachers in ("both", domain) for domain in ("action", "reason")]
    found = [teacher if want else None for teacher, want in zip(found, wanted)]
    losses, grads = arm.step(found)
    assert all(np.isfinite(loss) for loss in losses.values())
    assert any(g is not None and g.any() for g in grads.values())
    usual, _ = case.step(teachers)
    labels = [np.concatenate(c.samples.kept) for c in (arm, case)]
    trained = {n for n, p in case.model.named_parameters() if p.requires_grad}
    same = losses.keys() == usual.keys() and grads.keys() == trained
    same = same and np.array_equal(*labels) and arm.cfg.masking == case.cfg.masking
    assert same == (name == "ours")
    assert ("kd_action" in losses) == (arm.cfg.teachers in ("both", "action"))
    assert ("kd_reason" in losses) == (arm.cfg.teachers in ("both", "reason"))


def test_one_batch_overfits(episodes):
    case = Case(episodes, "expert", width=64, lr=1e-2, lr_head=1e-2, optimizer="muon", rank=16)
    opts = dualvla.make_optimizers(case.model, case.cfg)
    for step in range(20):
        losses = case.model(case.batch, case.noise)
        dualvla.total_loss(losses, case.cfg).backward()
        [(opt.step(), opt.zero_grad()) for opt in opts]
        if step == 0:
            first = losses["action"].item()
    assert losses["action"].item() < first / 4


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_decay_leaves_words_alone_that_do_not_train(episodes, optimizer):
    case = Case(episodes, "expert", optimizer=optimizer, weight_decay=0.5, lr=0.1, lr_head=0.1)
    opts = dualvla.make_optimizers(case.model, case.cfg)
    words = case.model.vlm.get_input_embeddings().weight
    (up,) = [p for n, p in case.model.named_parameters() if n.endswith("flow.action_in.weight")]
    before, shrinking = words.detach().clone(), float(up.detach().norm())
    for opt in opts:
        for p in (p for group in opt.param_groups for p in group["params"]):
            p.grad = torch.zeros_like(p)
        opt.step()
    assert torch.equal(words.detach(), before)
    assert float(up.detach().norm()) == pytest.approx(0.95 * shrinking, rel=1e-3)


def test_config_of_the_stages():
    cfg = dualvla.staged(replace_explicit(prune="either", lr=0.5, steps=7), "generalist", FOLDERS)
    assert (cfg.prune, cfg.teachers, cfg.lr, cfg.steps) == ("none", "none", 0.5, 7)
    assert cfg.expert == "nowhere/expert" and cfg.generalist == ""
    cfg = dualvla.staged(replace_explicit(prune="either"), "dual", FOLDERS)
    assert cfg.prune == "either" and cfg.generalist == "nowhere/generalist"
    assert cfg.steps == dualvla.STAGES["dual"]["steps"]
    assert json.dumps(asdict(cfg))


def replace_explicit(**flags):
    cfg = replace(Config(), **flags)
    cfg.explicit = tuple(flags)
    return cfg


def test_g_learns_the_words_in_which_a_robot_explains_itself(episodes):
    weight = Case(episodes, "generalist").model.vlm.get_input_embeddings().weight
    assert not weight.requires_grad, "as InstructVLA has it"
    case = Case(episodes, "generalist", new_words=True)
    tokenizer = case.processor.tokenizer
    ids = events.all_words(episodes, tokenizer)
    for text in (episodes[0].reasoning[5], "move left and close the fingers", "stop"):
        assert set(tokenizer.encode(text, add_special_tokens=False)) <= set(ids)
    assert tokenizer.encode("plate?")[-1] not in ids
    case.model.learn_words(ids)
    _, grads = case.step()
    moved = grads["vlm.model.language_model.embed_tokens.weight"].abs().sum(1) > 0
    assert moved.any() and set(moved.nonzero()[:, 0].tolist()) <= set(ids)


def test_words_that_train_are_float32_whatever_stands_still_is_stored_in(episodes):
    case = Case(episodes, "generalist", new_words=True, frozen="bf16")
    case.model.learn_words(events.all_words(episodes, case.processor.tokenizer))
    common.store_frozen(case.model, case.cfg, ALONE.device)  # float32 products: all of it is
    assert {p.dtype for p in case.model.parameters()} == {torch.float32}
    common.store_frozen(case.model, replace(case.cfg, dtype="bf16"), ALONE.device)
    half = [n for n, p in case.model.named_parameters() if p.dtype == torch.bfloat16]
    assert half and not any("embed_tokens" in n or "lm_head" in n for n in half)


def test_of_the_words_to_say_those_that_no_text_trained_are_drawn_anew(episodes):
    vlm, processor = common.load_backbone("tiny")
    weight, ids = vlm.get_input_embeddings().weight, events.all_words(episodes, processor.tokenizer)
    before = weight.detach().clone()
    common.redraw_untrained(vlm, ids, only=ids)
    changed = (weight != before).any(1).nonzero()[:, 0]
    assert 0 < len(changed) < len(ids) and set(changed.tolist()) <= set(ids)
    red, because = (processor.tokenizer.encode(f" {w}")[0] for w in ("red", "because"))
    assert because in changed and red in ids and red not in changed
    old, new = (torch.nn.functional.normalize(w[changed], dim=1) for w in (before, weight.detach()))
    assert (old @ old.T).min() > 0.99 and ((new @ new.T) - torch.eye(len(new))).max() < 0.9
