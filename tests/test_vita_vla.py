"""vita_vla.py against its paper: a test for each equation, then what the equations rest on."""

import ast
import json
import math
import re
import shutil
from dataclasses import replace
from functools import lru_cache
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import transformers
from safetensors.torch import load_file, save_file
from test_backbones import never_runs_its_own, plant
from torch import nn
from transformers.models.gpt2.modeling_gpt2 import GPT2Block

import common
import data
import vita_vla
from parts import backbones
from parts import seer as small_model
from vita_vla import ABLATIONS, Config, Histories, Seer, VitaVLA, sense
from worlds import tabletop

SMALL = Config(
    dtype="fp32", batch=2, width=32, depth=2, heads=2, queries=3, foresight=1, history=3,
    augment=0, optimizer="adamw", stage="finetune", foresight_steps=0, resampler=3,
    gripper_weight=0.01,
)  # fmt: skip
ALONE = common.Dist(0, 1, torch.device("cpu"))
TINY = Path(common.BACKBONES["tiny"])
SOURCE = Path(vita_vla.__file__).read_text()
STUDENT = ("arm_state_encoder", "gripper_state_encoder", "state_projector", "action_token",
           "mapper")  # fmt: skip
DECODER = ("action_decoder", "arm_action_decoder", "gripper_action_decoder")


def cut(sample, n):
    """The first n steps of a sample, as after n steps of an episode."""
    steps = ("images", "ahead", "state", "action", "mask")
    return {k: v[:n] if k in steps else v for k, v in sample.items()}


class Case:
    """A small model, its data, and one batch whose histories and prompts differ in length."""

    def __init__(self, episodes, **flags):
        self.cfg = cfg = replace(SMALL, **flags)
        self.vlm, self.processor = common.load_vlm(cfg.backbone)
        self.stats = data.statistics(episodes)
        self.windows = Histories(episodes, self.stats, cfg)
        common.seed_all(0)
        if cfg.stage == "teacher":
            self.model = Seer(cfg, small_model.BackboneEyes(self.vlm)).eval()
            for token in (self.model.action_pred_token, self.model.obs_tokens):
                nn.init.normal_(token)  # as after some training
        else:
            self.model = VitaVLA(cfg, self.vlm, self.processor).eval()
        rng, last = np.random.default_rng(0), self.windows.starts[2] - 1
        self.samples = [self.windows.get(i, rng) for i in (3, int(last), 8)]
        self.samples[2] = cut(self.samples[2], max(cfg.history - 1, 1))
        self.batch = sense(self.samples, cfg, self.processor)

    def policy(self, **flags):
        cfg = replace(self.cfg, **flags)
        return vita_vla.Policy(
            self.model, cfg, self.processor, {"tabletop": self.stats}, ALONE.device
        )

    def hidden(self, batch=None):
        with torch.no_grad():
            out = self.model.hidden(batch or self.batch)
        return out[0] if self.cfg.stage == "teacher" else out

    def step(self, opts=(), h_teacher=None):
        """One training step -> losses, and the gradients by name."""
        losses = self.model(self.batch, h_teacher)
        vita_vla.total_loss(losses, self.cfg).backward()
        grads = {n: p.grad for n, p in self.model.named_parameters() if p.requires_grad}
        for opt in opts:
            opt.step()
            opt.zero_grad(set_to_none=True)
        return {name: float(loss.detach()) for name, loss in losses.items()}, grads


@pytest.fixture(scope="module")
def case(episodes):
    """The default student; tests that change it build their own."""
    return Case(episodes)


@pytest.fixture(scope="module")
def teacher(episodes):
    return Case(episodes, stage="teacher")


@pytest.fixture(scope="module")
def library():
    """The backbone as the library loads it, with the library's own attention throughout."""
    load = transformers.AutoModelForImageTextToText.from_pretrained
    return load(TINY, dtype=torch.float32).eval()


# --- one test for each equation -------------------------------------------------------------------


def letters(case, ids):
    """A prompt as one letter a token: p picture, s state, a action, . word or mark."""
    known = {"<|image_pad|>": "p", "<|video_pad|>": "s", "<|endoftext|>": "a"}
    return "".join(known.get(case.processor.tokenizer.decode([i]), ".") for i in ids)


def test_eq1_order_of_a_steps_tokens(case):
    for sample in case.samples:
        grids = case.processor.images(sum(sample["images"], []))[1]
        ids = vita_vla.chat(sample, grids, case.cfg, case.processor)
        want = f"<|im_start|>system\n{vita_vla.SYSTEM}<|im_end|>\n"
        for _ in sample["images"]:
            want += "<|im_start|>user\n"
            for n in (16, 4):  # static camera, wrist camera
                want += "<|vision_start|>" + n * "<|image_pad|>" + "<|vision_end|>"
            want += f"\nInstruction: {sample['instruction']}" + "<|video_pad|><|im_end|>\n"
            want += "<|im_start|>assistant\n" + 3 * "<|endoftext|>" + "<|im_end|>\n"
        assert case.processor.tokenizer.decode(ids) == want
        step = r"\.+p{16}\.+p{4}\.+s\.+aaa"
        assert re.fullmatch(rf"(?:{step}){{{len(sample['images'])}}}\.", letters(case, ids))


def inputs_by_hand(case, library, b):
    """The vectors of prompt b, token by token -> (T, D), without padding."""
    batch, model = case.batch, case.model
    first = 2 * sum(len(s["images"]) for s in case.samples[:b])
    with torch.no_grad():
        grids = torch.tensor(batch["grids"])
        seen = library.model.get_image_features(batch["pixel_values"], grids)
    pictures = iter(torch.cat(seen.pooler_output[first:]).numpy())
    words = library.get_input_embeddings().weight.detach().numpy()
    arm, grip, join = (
        [x.detach().numpy() for x in (layer.weight, layer.bias)]
        for layer in (model.arm_state_encoder, model.gripper_state_encoder, model.state_projector)
    )
    states, rows = iter(case.samples[b]["state"]), []
    ids = batch["prompt"]["input_ids"][b][batch["prompt"]["real"][b]].tolist()
    for letter, token in zip(letters(case, ids), ids):
        if letter == "s":
            s = next(states)
            onehot = np.array([0.0, 1.0]) if s[7] > 0 else np.array([1.0, 0.0])
            both = np.concatenate([arm[0] @ s[:6] + arm[1], grip[0] @ onehot + grip[1]])
            rows.append(join[0] @ both + join[1])
        elif letter == "a":
            rows.append(model.action_token.detach().numpy()[0])
        else:
            rows.append(next(pictures) if letter == "p" else words[token])
    return np.stack(rows).astype(np.float32), ids, seen


def test_eq1_vectors_at_the_tokens(case, library, monkeypatch):
    inputs, read = [], case.vlm.language.forward
    keep = lambda **words: inputs.append(words["inputs_embeds"]) or read(**words)  # noqa: E731
    monkeypatch.setattr(case.vlm.language, "forward", keep)
    case.hidden()
    for b in range(3):
        want = inputs_by_hand(case, library, b)[0]
        assert np.allclose(inputs[0][b, -len(want) :].numpy(), want, atol=1e-5)


def test_eq2_last_states_of_the_action_tokens(case, library):
    """Each prompt alone, by the library with its own attention and positions."""
    got, grids = case.hidden().numpy(), torch.tensor(case.batch["grids"])
    assert not case.batch["steps"].all() and not case.batch["prompt"]["real"].all()
    for b, sample in enumerate(case.samples):
        n, first = len(sample["images"]), 2 * sum(len(s["images"]) for s in case.samples[:b])
        x, ids, seen = inputs_by_hand(case, library, b)
        ids = torch.tensor([ids])
        pictures = ids == library.config.image_token_id
        grid = grids[first : first + 2 * n]
        positions, _ = library.model.get_rope_index(ids, pictures.int(), image_grid_thw=grid)
        before = int(grids[:first].prod(1).sum()) // 4
        deep = [torch.cat(f)[before : before + len(ids[pictures])]
                for f in seen.deepstack_features]  # fmt: skip
        with torch.no_grad():
            h = library.model.language_model(
                inputs_embeds=torch.from_numpy(x)[None], position_ids=positions,
                visual_pos_masks=pictures, deepstack_visual_embeds=deep,
            ).last_hidden_state[0].numpy()  # fmt: skip
        acts = [t for t, letter in enumerate(letters(case, ids[0].tolist())) if letter == "a"]
        for i, t in enumerate(acts):
            assert np.allclose(got[b, i // 3, i % 3], h[t], atol=1e-4), (b, i)
        assert len(acts) == 3 * n and not got[b, n:].any()


@pytest.mark.parametrize("how", ["mse", "norm"])
def test_eq3_alignment_loss(how):
    rng = np.random.default_rng(0)
    student, small = rng.standard_normal((2, 2, 3, 3, 5)).astype(np.float32)  # (B, S, N, H) each
    steps = np.array([[1, 1, 1], [1, 0, 0]], bool)
    means = []
    for b in range(2):
        distances = []
        for s, i in np.ndindex(3, 3):
            if steps[b, s]:
                squared = sum((student[b, s, i, d] - small[b, s, i, d]) ** 2 for d in range(5))
                distances.append(squared if how == "mse" else squared**0.5)
        means.append(sum(distances) / len(distances))
    h_VLA, h_small = (torch.from_numpy(x).requires_grad_() for x in (student, small))
    loss = vita_vla.align_loss(h_VLA, h_small, torch.from_numpy(steps), how)
    loss.backward()
    assert float(loss.detach()) == pytest.approx(np.mean(means), 1e-5)
    assert h_small.grad is None and h_VLA.grad[~torch.from_numpy(steps)].eq(0).all()


def test_alignment_takes_the_mapped_states(episodes, case, teacher):
    small = teacher.hidden()
    with torch.no_grad():
        losses = case.model(case.batch, small)
        mapped = case.model.mapper(case.hidden())
    distance = ((mapped - small) ** 2).sum(-1).numpy()  # (B, S, N)
    want = np.mean([distance[b, : len(s["images"])].mean() for b, s in enumerate(case.samples)])
    assert set(losses) == {"align"} and float(losses["align"]) == pytest.approx(want, 1e-4)


def test_the_student_takes_over_what_its_teachers_eyes_saw(case, teacher, monkeypatch):
    batch, alone = dict(case.batch), case.hidden(dict(case.batch))
    teacher.hidden(batch)
    monkeypatch.setattr(case.vlm, "see", None)
    assert torch.equal(case.hidden(batch), alone)


@pytest.mark.parametrize("how", ["mae", "smooth"])
def test_action_losses(how):
    rng = np.random.default_rng(1)
    arm, target = rng.uniform(-1, 1, (2, 3, 2, 3, 7)).astype(np.float32)[:, :2]  # (B, S, N, A)
    arm[0, 0, 0, 0], target[0, 0, 0, 0] = 1.0, -1.0  # an error above 1, where smooth L1 is straight
    logit, mask = rng.standard_normal((2, 2, 3)).astype(np.float32), np.ones((2, 2, 3), bool)
    mask[1, 1, 1:], mask[1, 0, 2] = False, False  # past the episode's end
    arms, grips = [], []
    for b in range(2):
        one, two = [], []
        for s, i in np.ndindex(2, 3):
            if mask[b, s, i]:
                off = np.abs(arm[b, s, i, :6] - target[b, s, i, :6])
                smooth = [0.5 * e * e if e < 1 else e - 0.5 for e in off]
                one.append(np.mean(off if how == "mae" else smooth))
                p, opened = 1 / (1 + np.exp(-logit[b, s, i])), target[b, s, i, 6] > 0
                two.append(-np.log(p) if opened else -np.log(1 - p))
        arms.append(np.mean(one))
        grips.append(np.mean(two))
    decoded = torch.from_numpy(arm[..., :6]), torch.from_numpy(logit)
    batch = {"action": torch.from_numpy(target), "mask": torch.from_numpy(mask)}
    losses = vita_vla.action_losses(decoded, batch, how)
    assert float(losses["arm"]) == pytest.approx(np.mean(arms), 1e-5)
    assert float(losses["gripper"]) == pytest.approx(np.mean(grips), 1e-5)


def test_total_loss():
    losses = {"arm": torch.tensor(2.0), "gripper": torch.tensor(30.0)}
    total = vita_vla.total_loss
    assert float(total(losses, SMALL)) == pytest.approx(2.3)
    assert float(total(losses, replace(SMALL, gripper_weight=0.0))) == 2.0
    assert float(total({"align": torch.tensor(5.0)}, SMALL)) == 5.0
    seer = losses | {"foresight": torch.tensor(4.0)}
    assert float(total(seer, SMALL)) == pytest.approx(2.7)


def test_without_the_gripper_term_the_teacher_keeps_its_own(tmp_path, monkeypatch):
    """The released student lost its gripper term; the Seer it learns from was trained with one."""
    words = ["--ablation", "no-gripper", "--teacher", "train", "--out", str(tmp_path / "chain")]
    cfg = common.parse(Config, vita_vla.PRESETS, ABLATIONS, words)
    vita_vla.choose_teacher(cfg)
    monkeypatch.setattr(vita_vla.runs, "finish", lambda *_: None)  # no stage runs
    weight = {stage.stage: stage.gripper_weight for stage in vita_vla.chain(cfg, ALONE)}
    assert weight == {"teacher": Config().gripper_weight, "align": 0.0, "finetune": 0.0}


@pytest.mark.parametrize("words, chosen", [
    ("", "tiny"), ("--stage align", "tiny"), ("--recipe only-finetune", "tiny"),
    ("--align-steps 5 --demos 20 --seed 4 --mapper decoder", "tiny"),
    ("--stage teacher", ""), ("--stage finetune", ""), ("--teacher train", ""),
    ("--width 64", ""), ("--history 2", ""), ("--backbone Qwen3-VL-2B", ""), ("--dropout 0.1", ""),
    ("--world tabletop:goal", ""), ("--teacher-steps 9", ""), ("--preset calvin", ""),
    ("--width 64 --teacher tiny", "tiny"), ("--teacher runs/t", "runs/t"),
    ("--preset calvin --teacher seer.pth", "seer.pth"),
])  # fmt: skip
def test_the_shipped_teacher_is_taken_where_it_fits(words, chosen):
    cfg = common.parse(Config, vita_vla.PRESETS, ABLATIONS, words.split())
    vita_vla.choose_teacher(cfg)
    assert cfg.teacher == chosen


# --- the map of the paper -------------------------------------------------------------------------


def functions(tree, prefix=""):
    """-> {"VitaVLA.embed": (first line, last line)}"""
    found = {}
    for node in tree.body:
        if isinstance(node, ast.ClassDef):
            found |= functions(node, node.name + ".")
        elif isinstance(node, ast.FunctionDef):
            found[prefix + node.name] = node.lineno, node.end_lineno
    return found


def test_equation_map_tags_and_tests_agree():
    table = vita_vla.__doc__.partition("Equation map")[2].partition("Table map")[0]
    entries = re.findall(r"^  (Eq\. \d+|\(unnumbered\)) .*?-> (.+)$", table, re.M)
    assert [n for n, _ in entries] == ["Eq. 1", "Eq. 2", "Eq. 3", "(unnumbered)"]
    places, lines = functions(ast.parse(SOURCE)), SOURCE.splitlines()
    for n, names in entries:
        names = re.findall(r"([\w.]+)\(\)", names)
        assert names and all(name in places for name in names), names
        if n.startswith("Eq."):
            tag = f"# Eq. ({n[4:]})"
            (line,) = (i for i, text in enumerate(lines, 1) if tag in text)
            spans = [places[name] for name in names]
            assert any(first < line <= last for first, last in spans), f"{n} in {names}"
    tested = re.findall(r"^def test_eq(\d+)_", Path(__file__).read_text(), re.M)
    assert set(tested) == set(re.findall(r"# Eq\. \((\d+)\)", SOURCE)) == {"1", "2", "3"}


def test_every_named_ablation_exists():
    table = vita_vla.__doc__.partition("Table map")[2].partition("Assumptions")[0]
    named = {name for name in re.findall(r"[a-z]+-[a-z]+", table) if name != "no-gripper"}
    assert named <= set(ABLATIONS), named - set(ABLATIONS)
    for name, row in ABLATIONS.items():
        assert set(row) - {"_paper", "_row"} <= set(Config.__dataclass_fields__), name
        assert name in named or row["_paper"] is None, name


# --- who sees what --------------------------------------------------------------------------------


@pytest.mark.parametrize("goal, want", [
    (0, """
###...|......
###...|......
###...|......
###...|......
####..|......
####..|......
###...|###...
###...|###...
###...|###...
###...|###...
###...|####..
###...|####.."""),
    (1, """
###...|......
###...|......
###...|......
###...|.#....
####..|......
####..|......
###...|###...
###...|###...
###...|###...
###...|###...
###...|####..
###...|####.."""),
], ids=["goal 0", "goal 1"])  # fmt: skip
def test_seers_mask(goal, want):
    """Two steps of words, state, picture, foresight and two actions; a row is a token's view."""
    mask = small_model.seer_mask(2, context=3, foresight=1, actions=2, goal=goal)
    rows = ["".join(".#"[int(see)] for see in row) for row in mask]
    assert "\n" + "\n".join(row[:6] + "|" + row[6:] for row in rows) == want


@pytest.mark.parametrize("action_sees, want", [
    ("pictures", "......|..###."), ("pictures-state", "......|.####."),
])  # fmt: skip
def test_seers_actions_may_see_their_own_steps_pictures_alone(action_sees, want):
    """Two steps of words, state, picture, two foresight tokens and an action, the last's view."""
    mask, free = (small_model.seer_mask(2, 3, 2, 1, action_sees=a) for a in (action_sees, "all"))
    row = "".join(".#"[int(see)] for see in mask[11])
    assert row[:6] + "|" + row[6:] == want
    others = [i for i in range(12) if i % 6 != 5]
    assert torch.equal(mask[others], free[others])


def test_part_of_the_foresight_stays_hidden_from_actions():
    torch.manual_seed(1)
    free, half = (small_model.seer_mask(4, 3, 6, 2, hide=h) for h in (0.0, 0.5))
    lost = (free & ~half).nonzero().tolist()
    assert {row % 11 for row, _ in lost} == {9, 10}
    assert {column % 11 for _, column in lost} <= {*range(3, 9)}
    for step in range(4):
        first, second = ([c for r, c in lost if r == step * 11 + a] for a in (9, 10))
        assert first == second and len(first) == 3


def test_what_is_hidden_is_drawn_for_each_batch_of_training_alone(episodes):
    """As Seer's forward() in pre-training; who teaches or acts hides nothing."""
    case = Case(episodes, stage="teacher", foresight=4, hide_foresight=0.5)
    plain = Case(episodes, stage="teacher", foresight=4)
    before = torch.get_rng_state()
    assert torch.equal(case.hidden(), plain.hidden())
    assert torch.equal(torch.get_rng_state(), before), "nothing is drawn where nothing is hidden"
    case.model.train()
    assert not torch.equal(case.hidden(), case.hidden())


@pytest.mark.parametrize("flag", ["dropout", "attention_dropout", "embedding_dropout"])
def test_gpt2s_dropouts_are_of_training_alone(flag, episodes):
    case, plain = Case(episodes, stage="teacher", **{flag: 0.5}), Case(episodes, stage="teacher")
    assert torch.equal(case.hidden(), plain.hidden())
    for each, moves in ((case, True), (plain, False)):
        each.model.train()
        assert torch.equal(each.hidden(), each.hidden()) is not moves, flag


def test_goal_is_the_state_so_many_steps_ahead():
    masks = (small_model.seer_mask(6, 4, 2, 3, goal=goal) for goal in (4, 0))
    with_goal, without = masks
    extra = (with_goal & ~without).nonzero().tolist()
    n = 9
    assert extra == [[i * n + 4 + f, (i + 4) * n + 1] for i in (0, 1) for f in (0, 1)]


@pytest.mark.parametrize("which", ["teacher", "case"])
def test_later_steps_do_not_reach_earlier_ones(which, request):
    case = request.getfixturevalue(which)
    before, batch = case.hidden(), dict(case.batch)
    patches = torch.tensor(batch["grids"]).prod(1)
    ends = patches.cumsum(0)
    batch["state"], batch["pixel_values"] = batch["state"].clone(), batch["pixel_values"].clone()
    for b, step in ((0, 0), (1, 2)):  # the first step of the one, the last of the other
        batch["state"][b, step, :6] += 1.0
        first = 6 * b + 2 * step  # its static picture
        batch["pixel_values"][int(ends[first] - patches[first]) : int(ends[first])] *= -1
    changed = ((case.hidden(batch) - before).abs() > 1e-5).flatten(2).any(-1)
    assert changed[0].all()  # its first step reaches all
    assert changed[1].tolist() == [False, False, True] and not changed[2].any()


def test_nobody_sees_a_teachers_action_and_foresight_tokens(teacher):
    model, S = teacher.model, teacher.cfg.history
    h, ahead = model.hidden(teacher.batch)
    token, obs, some = model.action_pred_token, model.obs_tokens, torch.arange(32.0)

    def pull(x, on):
        return torch.autograd.grad((x * some).sum(), on, retain_graph=True)[0]

    assert not pull(ahead, token).any()
    for i in range(3):
        assert [bool(g.any()) for g in pull(h[:, :, i], token)[0, 0]] == [j == i for j in range(3)]
    grad = pull(ahead[:, :, 0], obs)
    assert grad[0, 0, 0].any() and not grad[0, 0, 1].any()
    assert pull(h[:, S - 1], obs).any()  # an action looks at its step's foresight


def test_a_students_second_action_sees_its_first(episodes):
    case = Case(episodes, tokens="separate")
    h = case.model.hidden(case.batch)  # (B, S, N, D)
    for i in range(3):
        pull = (h[0, 0, i] * torch.arange(128.0)).sum()
        (grad,) = torch.autograd.grad(pull, case.model.action_token, retain_graph=True)
        assert [bool(g.any()) for g in grad] == [j <= i for j in range(3)]


def test_a_students_mask(episodes):
    """Two steps, of each one token of either picture and of the words, the state, three actions: a
    row is what reaches that token's last state. One causal sequence, unlike the teacher's mask; in
    the shorter prompt beside it padding (the last column) reaches nobody."""
    case = Case(episodes, history=2)
    batch, model, views = case.batch, case.model, []
    prompt, seen = batch["prompt"], model.vlm.see(batch)
    x, pictures = model.embed(prompt, batch["state"][batch["steps"]]), seen[0].requires_grad_()
    h = model.vlm.read(x, prompt, common.causal_mask(prompt["real"]), seen)
    for b in (0, 2):  # two steps; one, padded
        step = re.compile(r".*?(p)(?=\.).*?(p)(?=\.).*?(\.)(?=s)(s).*?(a)(a)(a)")
        found = [m for m in step.finditer(letters(case, prompt["input_ids"][b]))
                 if prompt["real"][b, m.start(4)]]
        at = [m.start(i) for m in found for i in range(1, 8)]
        hidden = (~prompt["real"][b]).nonzero().flatten().tolist()
        for row in at:
            pull = (h[b, row] * torch.arange(128.0)).sum()
            grads = torch.autograd.grad(pull, (x, pictures), retain_graph=True)
            grad = common.put(grads[0], prompt["pictures"], grads[1])
            reach = grad[b].any(-1)
            views.append("".join(".#"[int(reach[c])] for c in at) + ".#"[int(reach[hidden].any())])
        assert not grad[[i for i in range(3) if i != b]].any(), "another sample's"
    want = ["#" * (i + 1) + "." * (n - i) for n in (14, 7) for i in range(n)]
    assert views == want


@pytest.mark.parametrize("H, heads, queries, foresight, tokens", [
    (384, 12, 6, 9, 37), (1024, 16, 16, 16, 71)])  # fmt: skip
def test_tokens_of_a_step(H, heads, queries, foresight, tokens):
    cfg = replace(SMALL, width=H, heads=heads, queries=queries, foresight=foresight, depth=1,
                  eyes="mae", patch=16)  # fmt: skip
    model, seen = Seer(cfg, PictureStub()).eval(), []
    model.embedding_layer_norm.register_forward_hook(lambda m, args, out: seen.append(out.shape))
    batch = {"steps": torch.ones(1, 2, dtype=torch.bool), "state": torch.zeros(1, 2, 8)}
    batch["there"] = torch.arange(2)
    with torch.no_grad():
        h, ahead = model.hidden(batch)
    assert seen == [(1, 2 * tokens, H)]
    assert h.shape == (1, 2, 3, H) and ahead.shape == (1, 2, 2 * foresight, H)


# --- who learns -----------------------------------------------------------------------------------


def parts(names, cut="vlm.model.language_model"):
    return {cut if n.startswith(cut) else n.split(".")[0] for n in names}


def test_who_trains_in_which_stage(episodes, teacher):
    language, h = {"vlm.model.language_model"}, teacher.hidden()
    for flags, want, small in (
        (dict(stage="align"), set(STUDENT), h),
        (dict(stage="finetune"), {*STUDENT, *DECODER} | language, None),
        (dict(stage="finetune", freeze_vlm=True), {*STUDENT, *DECODER}, None),
    ):
        case = Case(episodes, **flags)
        before = {n: t.clone() for n, t in case.model.state_dict().items()}
        opts = vita_vla.make_optimizers(case.model, case.cfg)
        count = sum(p.numel() for o in opts for g in o.param_groups for p in g["params"])
        assert count == common.param_counts(case.model)["trainable"]
        _, grads = case.step(opts, small)
        after = case.model.state_dict()
        moved = {n for n, t in before.items() if not torch.equal(t, after[n])}
        trained = {n for n, g in grads.items() if g is not None and g.any()}
        assert parts(grads) == want and trained == set(grads) == moved
    assert not any("lm_head" in n for n in after), "no vocabulary is scored"


def test_the_teacher_trains_all_but_its_eyes(teacher):
    _, grads = teacher.step()
    frozen = {n for n, p in teacher.model.named_parameters() if not p.requires_grad}
    assert frozen and all(n.startswith("eyes.") for n in frozen)
    assert not any(n.startswith("eyes.") for n in grads)
    assert {n for n, g in grads.items() if g is None or not g.any()} == set()


class Wide(nn.Module):
    """A VLM of which only the width is known."""

    def __init__(self, width):
        super().__init__()
        self.width, self.language = width, nn.Module()
        self.language.words = nn.Embedding(8, width)
        self.language.get_input_embeddings = lambda: self.language.words


@pytest.mark.parametrize("preset, H, want", [("calvin", 1024, 31_503_360),
                                             ("libero", 384, 27_405_440)])  # fmt: skip
def test_stage_one_trains_30_million_at_the_papers_size(preset, H, want):
    cfg = replace(Config(**vita_vla.PRESETS[preset]), stage="align")
    with torch.device("meta"):
        model = VitaVLA(cfg, Wide(3584), None)
    assert cfg.width == H and common.param_counts(model)["trainable"] == want
    names = {n for n, p in model.named_parameters() if p.requires_grad}
    assert parts(names) == set(STUDENT)


def test_one_batch_overfits(episodes):
    case = Case(episodes, lr=4e-3, lr_head=1e-2)
    opts = vita_vla.make_optimizers(case.model, case.cfg)
    first = case.step(opts)[0]
    for _ in range(20):
        last = case.step(opts)[0]
    assert last["arm"] < first["arm"] / 3


def base(episodes, flags):
    """Losses and trained names of both stages under these flags."""
    out = {}
    if "size" in flags:
        how = flags["size"], 32, 0.3
        episodes = [data.record("tabletop:bridge", seed, *how) for seed in range(2)]
    for stage in ("align", "finetune"):
        case = Case(episodes, stage=stage, **flags)
        rng = torch.Generator().manual_seed(0)
        h = torch.randn(3, 3, 3, 32, generator=rng) if stage == "align" else None
        opts = vita_vla.make_optimizers(case.model, case.cfg)
        losses, grads = case.step(opts, h)
        assert all(np.isfinite(v) for v in losses.values())
        total = vita_vla.total_loss({k: torch.tensor(v) for k, v in losses.items()}, case.cfg)
        out[stage] = float(total), set(grads), len(case.batch["prompt"]["input_ids"][0])
    return out


@pytest.fixture(scope="module")
def usual(episodes):
    return base(episodes, {})


@pytest.mark.parametrize("name", ABLATIONS)
def test_each_ablation_trains_and_differs(name, episodes, usual):
    flags = {k: v for k, v in ABLATIONS[name].items() if not k.startswith("_")}
    recipe = flags.pop("recipe", "two-stage")
    if recipe != "two-stage":  # other stages, each of them as usual
        stages = vita_vla.STAGES[recipe]
        assert stages != vita_vla.STAGES["two-stage"] and stages[0] == "teacher"
        flags = {"freeze_vlm": True} if "frozen" in stages else {}
    got = base(episodes, flags)
    differs = {stage for stage in got if got[stage] != usual[stage]}
    only = {"align-norm": {"align"}, "smooth-l1": {"finetune"}, "no-gripper": {"finetune"},
            "freeze-vlm": {"finetune"}, "two-stage": set(), "only-finetune": set(),
            "ensemble": set()}  # fmt: skip
    assert differs == only.get(name, {"align", "finetune"})


# --- the teacher, part by part --------------------------------------------------------------------


class PictureStub(nn.Module):
    """Stands in for MAE and CLIP: random features of their shapes, the same at every call."""

    picture_width, text_width = 768, 512

    def forward(self, batch, cameras):
        rng, steps = torch.Generator().manual_seed(0), int(batch["steps"].sum())
        features = [torch.randn(steps, 197, 768, generator=rng) for _ in range(cameras)]
        return features, torch.randn(len(batch["steps"]), 512, generator=rng)


def released(H, depth, queries, foresight, steps, make):
    """The names and shapes of a released Seer checkpoint, its tensors from `make`."""
    half, E, shapes = H // 2, 768, {}

    def linear(name, enter, leave, bias=True):
        shapes[name + ".weight"] = leave, enter
        if bias:
            shapes[name + ".bias"] = (leave,)

    def conv(name, enter, leave):  # GPT-2 keeps its weights the other way round
        shapes[name + ".weight"], shapes[name + ".bias"] = (enter, leave), (leave,)

    def norm(name, width):
        shapes[name + ".weight"] = shapes[name + ".bias"] = (width,)

    shapes["action_pred_token"], shapes["obs_tokens"] = (1, 1, 3, H), (1, 1, 2 * foresight, H)
    shapes["transformer_backbone_position_embedding"] = 1, steps, 1, H
    shapes["mask_token"], shapes["perceiver_resampler.latents"] = (1, 1, H), (queries, E)
    linear("text_projector", 512, H)
    for arm, grip, both in (
        ("arm_state_encoder", "gripper_state_encoder", "state_projector"),
        ("action_pose_encoder", "action_gripper_position_encoder", "action_projector"),
    ):
        linear(arm, 6, H), linear(grip, 2, H), linear(both, 2 * H, H)
    for i in range(3):
        name = f"perceiver_resampler.layers.{i}."
        norm(name + "0.norm_media", E), norm(name + "0.norm_latents", E), norm(name + "1.0", E)
        linear(name + "0.to_q", E, 512, False), linear(name + "0.to_kv", E, 1024, False)
        linear(name + "0.to_out", 512, E, False)
        linear(name + "1.1", E, 4 * E, False), linear(name + "1.3", 4 * E, E, False)
    norm("perceiver_resampler.norm", E)
    for camera in ("primary", "wrist"):
        linear(f"image_{camera}_projector", E, H), linear(f"cls_token_{camera}_projector", E, H)
    norm("embedding_layer_norm", H)
    for i in range(depth):
        name = f"transformer_backbone.h.{i}."
        norm(name + "ln_1", H), norm(name + "ln_2", H), conv(name + "attn.c_attn", H, 3 * H)
        conv(name + "attn.c_proj", H, H), conv(name + "mlp.c_fc", H, 4 * H)
        conv(name + "mlp.c_proj", 4 * H, H)
        shapes[name + "attn.masked_bias"] = ()
    norm("transformer_backbone.ln_f", H)
    for state in ("action_decoder", "recon_state_decoder"):
        linear(state + ".0", H, half), linear(state + ".2", half, half)
    for kind in ("arm_action", "recon_arm_state"):
        linear(kind + "_decoder.0", half, 6)
    for kind in ("gripper_action", "recon_gripper_state"):
        linear(kind + "_decoder.0", half, 1)
    linear("image_decoder_obs_pred_projector", H, H), norm("image_decoder_norm", H)
    linear("image_decoder_pred", H, 768)
    for i in range(2):
        name = f"image_decoder.{i}."
        norm(name + "norm1", H), norm(name + "norm2", H), linear(name + "attn.qkv", H, 3 * H)
        linear(name + "attn.proj", H, H), linear(name + "mlp.fc1", H, 4 * H)
        linear(name + "mlp.fc2", 4 * H, H)
    return {"module." + name: make(name, shape) for name, shape in shapes.items()}


@lru_cache(maxsize=4)
def drawn(H=32, depth=2, queries=3, foresight=4, steps=14):
    rng = torch.Generator().manual_seed(0)

    def make(name, shape):
        x = 0.2 * torch.randn(shape, generator=rng)
        return 1 + x if name.endswith("weight") and len(shape) == 1 else x

    return released(H, depth, queries, foresight, steps, make)


SEER = replace(SMALL, stage="teacher", eyes="mae", patch=16, foresight=4, history=3)


def saved(path, state):
    """As Seer's trainer writes it."""
    content = {"epoch": 4, "model_state_dict": state, "optimizer_state_dict": {"state": {}},
               "lr_scheduler_state_dict": {"last_epoch": 7}}  # fmt: skip
    torch.save(content, path)
    return str(path)


@pytest.fixture(scope="module")
def seer(tmp_path_factory):
    """A Seer with 16 heads in its image decoder, from a released file of small shapes."""
    model = Seer(SEER, PictureStub()).eval()
    small_model.load_seer(model, saved(tmp_path_factory.mktemp("seer") / "seer.pth", drawn()))
    return model


@pytest.mark.parametrize("H, heads, queries, foresight", [(384, 12, 6, 9), (1024, 16, 16, 16)])
def test_released_checkpoints_fit_at_their_own_size(H, heads, queries, foresight, tmp_path):
    with torch.device("meta"):  # shapes without memory
        cfg = replace(SEER, width=H, heads=heads, queries=queries, foresight=foresight, depth=24,
                      history=10)  # fmt: skip
        model = Seer(cfg, PictureStub())
        state = released(H, 24, queries, foresight, 14, lambda name, shape: torch.empty(shape))
    small_model.load_seer(model, saved(tmp_path / "seer.pth", state))
    del state["module.obs_tokens"]
    with pytest.raises(common.UserError, match="obs_tokens: no there"):
        small_model.load_seer(model, saved(tmp_path / "seer.pth", state))


def context_by_hand(weights, features, words, state):
    """-> (B, S, 4 + 2 Q, H) of one camera feature list, with plain tensor products."""

    def linear(name, x):
        return x @ weights[name + ".weight"].T + weights.get(name + ".bias", 0.0)

    def norm(name, x):
        mean, var = x.mean(-1, keepdim=True), x.var(-1, unbiased=False, keepdim=True)
        x = (x - mean) / (var + 1e-5).sqrt()
        return x * weights[name + ".weight"] + weights[name + ".bias"]

    def resample(x):
        latents = weights["perceiver_resampler.latents"].expand(len(x), -1, -1)
        for i in range(3):
            a, b = (f"perceiver_resampler.layers.{i}.{k}." for k in (0, 1))
            z = norm(a + "norm_latents", latents)
            q = linear(a + "to_q", z).unflatten(-1, (8, 64)) / 8.0
            both = linear(a + "to_kv", torch.cat([norm(a + "norm_media", x), z], 1))
            k, v = (y.unflatten(-1, (8, 64)) for y in (both[..., :512], both[..., 512:]))
            share = torch.einsum("nqhd,nkhd->nhqk", q, k).softmax(-1)
            y = torch.einsum("nhqk,nkhd->nqhd", share, v).flatten(2)
            latents = latents + linear(a + "to_out", y)
            latents = latents + linear(b + "3", F.gelu(linear(b + "1", norm(b + "0", latents))))
        return norm("perceiver_resampler.norm", latents)

    onehot = torch.stack([(state[..., 7] <= 0).float(), (state[..., 7] > 0).float()], -1)
    both = [linear("arm_state_encoder", state[..., :6]), linear("gripper_state_encoder", onehot)]
    tokens = [linear("text_projector", words)[:, None, None].expand(-1, state.shape[1], -1, -1),
              linear("state_projector", torch.cat(both, -1))[:, :, None]]  # fmt: skip
    shape = (state.shape[0], state.shape[1])
    for part, kind in ((slice(1, None), "image"), (slice(0, 1), "cls_token")):
        for x, camera in zip(features, ("primary", "wrist")):
            x = resample(x[:, part]) if kind == "image" else x[:, part]
            tokens.append(linear(f"{kind}_{camera}_projector", x).unflatten(0, shape))
    return torch.cat(tokens, 2)


def normed(x, weights, name):
    return F.layer_norm(x, x.shape[-1:], weights[name + ".weight"], weights[name + ".bias"])


def test_a_released_seer_computes_what_it_did(seer):
    """Against GPT-2's own blocks with the very weights of the file, and a mask by its rules."""
    weights = {n.removeprefix("module."): t for n, t in drawn().items()}
    S, A, n, rng = 2, 4 + 2 * 3, 4 + 2 * 3 + 2 * 4 + 3, torch.Generator().manual_seed(3)
    state = torch.randn(2, S, 8, generator=rng)
    batch = {"steps": torch.ones(2, S, dtype=torch.bool), "state": state}
    batch["there"] = torch.arange(2 * S)
    x = context_by_hand(weights, *PictureStub()(batch, 2), batch["state"])
    more = [weights[k].expand(2, S, -1, -1) for k in ("obs_tokens", "action_pred_token")]
    x = torch.cat([x, *more], 2) + weights["transformer_backbone_position_embedding"][:, :S]
    x = normed(x.flatten(1, 2), weights, "embedding_layer_norm")
    mask = torch.full((S * n, S * n), -math.inf)
    for i, j in np.ndindex(S * n, S * n):
        context = j % n < A and j // n <= i // n
        foresight = i // n == j // n and A <= j % n < A + 8 <= i % n
        mask[i, j] = 0.0 if context or foresight else -math.inf
    config = transformers.GPT2Config(n_embd=32, n_head=2, attn_implementation="eager")
    for i in range(2):
        block, name = GPT2Block(config, layer_idx=i).eval(), f"transformer_backbone.h.{i}."
        own = {k.removeprefix(name): t for k, t in weights.items() if k.startswith(name)}
        block.load_state_dict({k: t for k, t in own.items() if k != "attn.masked_bias"})
        x = block(x, attention_mask=mask[None, None])
    x = normed(x, weights, "transformer_backbone.ln_f").unflatten(1, (S, n))
    with torch.no_grad():
        h, ahead = seer.hidden(batch)
    assert torch.allclose(h, x[:, :, -3:], atol=1e-4)
    assert torch.allclose(ahead, x[:, :, A:-3], atol=1e-4)
    check_decoder(seer, weights, h)


def check_decoder(model, weights, h):
    def linear(name, x):
        return x @ weights[name + ".weight"].T + weights[name + ".bias"]

    x = linear("action_decoder.2", linear("action_decoder.0", h).clamp(min=0)).clamp(min=0)
    with torch.no_grad():
        arm, gripper = small_model.decode(model, h)
    assert torch.allclose(arm, linear("arm_action_decoder.0", x).tanh(), atol=1e-5)
    assert torch.allclose(gripper, linear("gripper_action_decoder.0", x)[..., 0], atol=1e-5)


def test_a_longer_windows_places_are_cut(seer):
    name = "transformer_backbone_position_embedding"
    assert torch.equal(seer.state_dict()[name], drawn()["module." + name][:, :3])


def test_foresight_decoder(seer):
    """Against torch's own pre-norm encoder layers and sine positions written out."""
    weights = {n.removeprefix("module."): t for n, t in drawn().items()}
    code, D, h = [], 32, torch.randn(2, 4, 32, generator=torch.Generator().manual_seed(0))
    for side in (2, 14):
        for row, column in np.ndindex(side, side):
            turns = [[at / 10000 ** (i / (D // 4)) for i in range(D // 4)] for at in (column, row)]
            code.append(np.concatenate([f(t) for t in turns for f in (np.sin, np.cos)]))
    x = F.linear(h, *(weights[f"image_decoder_obs_pred_projector.{k}"] for k in ("weight", "bias")))
    x = torch.cat([x, weights["mask_token"].expand(2, 196, -1)], 1)
    x = x + torch.tensor(np.stack(code), dtype=torch.float32)
    for i in range(2):
        how = dict(batch_first=True, norm_first=True)
        layer = nn.TransformerEncoderLayer(D, 16, 4 * D, 0.0, "gelu", **how)
        theirs = dict(norm1="norm1", norm2="norm2", linear1="mlp.fc1", linear2="mlp.fc2")
        theirs |= {"self_attn.in_proj_": "attn.qkv.", "self_attn.out_proj": "attn.proj"}
        state = {}
        for mine, name in theirs.items():
            for kind in ("weight", "bias"):
                dot = "" if mine.endswith("_") else "."
                state[mine + dot + kind] = weights[f"image_decoder.{i}.{name.strip('.')}.{kind}"]
        layer.load_state_dict(state)
        x = layer.eval()(x)
    x = normed(x[:, -196:], weights, "image_decoder_norm")
    want = F.linear(x, weights["image_decoder_pred.weight"], weights["image_decoder_pred.bias"])
    with torch.no_grad():
        assert torch.allclose(seer.imagine(h, 14), want, atol=1e-4)


@pytest.mark.parametrize("steps", [0, 1, 2])
def test_foresight_loss(steps, episodes):
    """Of each window's last steps (0: of all), both cameras alike."""
    teacher = Case(episodes, stage="teacher", foresight_steps=steps)
    model, half, p, wholes = teacher.model, teacher.cfg.foresight, teacher.cfg.patch, []
    with torch.no_grad():
        ahead, loss = model.hidden(teacher.batch)[1], float(model(teacher.batch)["foresight"])
    for camera in range(2):
        errors = []
        for b, sample in enumerate(teacher.samples):
            n = len(sample["images"])
            some = range(n - min(steps or n, n), n)
            assert len(sample["ahead"]) == len(some)
            for s, pictures in zip(some, sample["ahead"]):
                image = pictures[camera].astype(np.float64)
                with torch.no_grad():
                    tokens = ahead[b, s, camera * half : (camera + 1) * half]
                    said = model.imagine(tokens[None], len(image) // p)[0].numpy()
                for i, (row, column) in enumerate(np.ndindex(2 * (len(image) // p,))):
                    x = image[row * p : row * p + p, column * p : column * p + p].reshape(-1)
                    errors.append(np.mean((said[i] - (x - x.mean()) / (x.std() + 1e-3)) ** 2))
        wholes.append(np.mean(errors))
    assert loss == pytest.approx(np.mean(wholes), 1e-3)


class Bomb:
    """Writes a file when unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (Path(self.path),)


def damaged(kind, tmp_path):
    path, state = tmp_path / "seer.pth", dict(drawn())
    if kind == "wider":
        state = dict(drawn(H=48))
    elif kind == "shorter":
        state = dict(drawn(steps=2))
    elif kind == "surplus":
        state["module.new_head.weight"] = torch.zeros(2)
    elif kind == "bomb":
        state["module.text_projector.bias"] = Bomb(tmp_path / "boom")
    saved(path, state)
    if kind == "cut":
        path.write_bytes(path.read_bytes()[:5000])
    elif kind == "text":
        path.write_text("not a checkpoint at all")
    elif kind == "tensor":
        torch.save(torch.zeros(3), path)
    elif kind == "no state":
        torch.save({"epoch": 3}, path)
    elif kind == "missing":
        path.unlink()
    return str(path)


@pytest.mark.parametrize("kind, names", [
    ("wider", "action_pred_token: (1, 1, 3, 48) there, (1, 1, 3, 32) here"),
    ("shorter", "position_embedding: (1, 2, 1, 32) there, (1, 3, 1, 32) here"),
    ("surplus", "new_head.weight: (2,) there, no here"),
    ("bomb", ""), ("cut", ""), ("text", ""), ("tensor", ""), ("no state", ""), ("missing", ""),
])  # fmt: skip
def test_a_bad_seer_checkpoint_is_one_clear_line(kind, names, tmp_path):
    path = damaged(kind, tmp_path)
    with pytest.raises(common.UserError) as error:
        small_model.load_seer(Seer(SEER, PictureStub()), path)
    text = str(error.value)
    assert "\n" not in text and text.startswith(f"--teacher {path}: ") and names in text
    assert not (tmp_path / "boom").exists(), "nothing of a checkpoint is executed"


# --- the teacher's eyes ---------------------------------------------------------------------------


@pytest.fixture(scope="module")
def eyes():
    """SeerEyes with small random encoders, for pictures of 3 x 3 patches."""
    common.seed_all(0)
    vision = transformers.ViTMAEConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=48,
        image_size=48, patch_size=16,
    )  # fmt: skip
    text = transformers.CLIPTextConfig(
        vocab_size=99, hidden_size=32, intermediate_size=48, projection_dim=24,
        num_hidden_layers=2, num_attention_heads=2, max_position_embeddings=12, eos_token_id=98,
    )  # fmt: skip
    models = transformers.ViTMAEModel(vision), transformers.CLIPTextModelWithProjection(text)
    return small_model.SeerEyes(*models).eval()


def test_without_a_resampler_a_pictures_tokens_stay(episodes):
    case = Case(episodes, stage="teacher", resampler=0)
    with torch.no_grad():
        tokens = case.model.context(case.batch)  # words, state, 16 and 4 tokens, two summaries
        seen = case.model.eyes(case.batch, 2)[0]
        static = case.model.image_primary_projector(seen[0])
        wrist = case.model.image_wrist_projector(seen[1])
    assert tokens.shape == (3, 3, 24, 32) and not tokens[2, 2, 2:].any()
    assert torch.allclose(tokens[case.batch["steps"]][:, 2:18], static, atol=1e-5)
    assert torch.allclose(tokens[case.batch["steps"]][:, 18:22], wrist, atol=1e-5)
    assert not any("resampler" in n for n in case.model.state_dict())


def test_paper_eyes_keep_the_patches_in_order(eyes):
    rng = torch.Generator().manual_seed(0)
    pixels = torch.randn(2, 3, 48, 48, generator=rng)
    text = torch.randint(1, 97, (2, 12), generator=rng)
    text[0, 5:], text[1, 9:] = 98, 98
    with torch.no_grad():
        (one, two), words = eyes({"seen": [pixels, pixels.flip(0)], "text": text}, 2)
        place = eyes.vision.embeddings.position_embeddings[0]  # (1 + 9, 32)
        kernel = eyes.vision.embeddings.patch_embeddings.projection
        x = [eyes.vision.embeddings.cls_token[0].expand(2, -1) + place[0]]
        for i, (row, column) in enumerate(np.ndindex(3, 3)):
            at = pixels[:, :, 16 * row : 16 * row + 16, 16 * column : 16 * column + 16]
            x.append(kernel(at)[:, :, 0, 0] + place[1 + i])
        x = torch.stack(x, 1)
        for layer in eyes.vision.layers:
            x = layer(x)
        want = eyes.vision.layernorm(x)
        states = eyes.text.text_model(text).last_hidden_state
        said = [eyes.text.text_projection(states[b, end]) for b, end in ((0, 5), (1, 9))]
    assert torch.allclose(one, want, atol=1e-5) and torch.allclose(two, want.flip(0), atol=1e-5)
    assert torch.allclose(words, torch.stack(said), atol=1e-5)
    assert torch.equal(eyes({"seen": [pixels], "text": text}, 1)[0][0], one), "no patch is masked"


def test_a_teacher_with_paper_eyes_trains(eyes, episodes, monkeypatch):
    """The whole path, at 48 pixels where the paper has 224."""
    fit, cfg = small_model.clip_pixels, replace(SEER, queries=2, foresight=1)
    monkeypatch.setattr(small_model, "clip_pixels", lambda images, how: fit(images, how, 48))
    told = []

    def tokenizer(words, padding, truncation, return_tensors):
        told.extend(words)
        assert padding == "max_length" and truncation
        return {"input_ids": torch.full((len(words), 12), 98)}

    monkeypatch.setattr(small_model, "clip_tokenizer", lambda: tokenizer)
    monkeypatch.setattr(eyes, "picture_width", 32, raising=False)
    monkeypatch.setattr(eyes, "text_width", 24, raising=False)
    case = Case(episodes, stage="teacher")  # its processor and samples
    batch = sense(case.samples, cfg, case.processor)
    assert [x.shape for x in batch["seen"]] == [(8, 3, 48, 48)] * 2  # 3 + 3 + 2 steps
    assert [g.shape for g in batch["ahead"]] == [(8, 9, 768)] * 2
    assert told == [s["instruction"] for s in case.samples]
    model = Seer(cfg, eyes)
    losses = model(batch)
    vita_vla.total_loss(losses, cfg).backward()
    assert all(torch.isfinite(v) for v in losses.values())
    assert not any(p.grad is not None for p in model.eyes.parameters())


def test_a_student_alone_needs_neither_mae_nor_clip(case, monkeypatch):
    """What only the teacher reads is not made where there is none."""
    monkeypatch.setattr(small_model, "clip_tokenizer", lambda: pytest.fail("CLIP was asked"))
    batch = sense(case.samples, replace(case.cfg, eyes="mae"), case.processor)
    assert "seen" not in batch


@pytest.mark.parametrize("how", ["onehot", "raw"])
def test_a_released_teacher_reads_states_as_recorded(how):
    stats = {"min": [-2.0, 0.0, 0.1, -3.0, -1.0, 0.5, -1.0, 0.0], "how": "minmax"}
    stats |= {"max": [1.0, 0.5, 0.7, 3.0, 2.0, 0.6, 1.0, 0.04]}
    stats |= {"q01": stats["min"], "q99": stats["max"]}
    low, high = np.array(stats["min"]), np.array(stats["max"])
    raw = np.random.default_rng(0).uniform(low, high, (5, 8)).astype(np.float32)
    ours = torch.from_numpy(data.normalise(raw, stats))
    model = nn.Module()
    small_model.add_state_encoder(model, 16, 6)
    asked = torch.from_numpy(raw)
    if how == "onehot":  # open or closed, of either scale
        asked[:, -1] = ours[:, -1]
    with torch.no_grad():
        want = small_model.encode_state(model, asked, how)
        small_model.read_recorded(model, *data.bounds(stats), how)
        assert torch.allclose(small_model.encode_state(model, ours, how), want, atol=1e-5)


def test_a_released_file_is_a_teacher_beside_which_no_second_vlm_is_read(tmp_path, monkeypatch):
    monkeypatch.setattr(small_model, "paper_eyes", PictureStub)
    cfg = replace(SEER, stage="align", teacher=saved(tmp_path / "seer.pth", drawn()))
    cfg.backbone = str(tmp_path)  # none is there
    model = vita_vla.load_teacher(cfg, ALONE.device)
    assert not model.training and not any(p.requires_grad for p in model.parameters())
    assert torch.equal(model.text_projector.weight, drawn()["module.text_projector.weight"])


def test_a_released_file_goes_on_training_or_becomes_a_run(tmp_path, monkeypatch):
    """With a learning rate of 0 the run holds the released weights, and acts by the first
    prediction whatever --act-index is the student's."""
    words = type("Words", (), {"__call__": lambda self, texts, **_: {
        "input_ids": torch.ones(len(texts), 77, dtype=torch.long)}})  # fmt: skip
    monkeypatch.setattr(small_model, "clip_tokenizer", words)
    monkeypatch.setattr(small_model, "paper_eyes", PictureStub)
    file, out = saved(tmp_path / "seer.pth", drawn()), tmp_path / "run"
    flags = "--stage teacher --eyes mae --steps 1 --lr-teacher 0 --demos 4 --episodes 1 --gifs 0"
    flags += " --normalise raw --width 32 --depth 2 --heads 2 --queries 3 --foresight 4 --patch 16"
    flags += " --resampler 3 --history 3 --act-index 1 --batch 2 --threads 1 --gripper-state raw"
    flags += " --optimizer adamw"
    monkeypatch.setattr(vita_vla.loop, "evaluate", lambda *_: {})
    vita_vla.main([*flags.split(), "--teacher", file, "--out", str(out)])
    policy, theirs = vita_vla.load_policy(out, ALONE.device), drawn()
    for name in ("action_pred_token", "arm_action_decoder.0.weight", "text_projector.weight"):
        assert torch.equal(policy.model.state_dict()[name], theirs["module." + name]), name
    plan = np.arange(21.0).reshape(3, 7)
    assert (policy.choose({}, plan) == plan[0]).all() and policy.cfg.act_index == 1
    low, high = data.bounds(policy.stats["state"])
    middle = torch.from_numpy((low + high) / 2)[:6]
    bias = theirs["module.arm_state_encoder.bias"]
    bias = bias + theirs["module.arm_state_encoder.weight"] @ middle.to(bias)
    assert torch.allclose(policy.model.arm_state_encoder.bias, bias, atol=1e-5)


def test_pictures_for_clip():
    image = np.random.default_rng(0).integers(0, 256, (224, 224, 3), np.uint8)
    mean, std = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
    got = small_model.clip_pixels([image])
    for c, row, column in ((0, 0, 0), (1, 17, 200), (2, 223, 5)):
        want = (image[row, column, c] / 255 - mean[c]) / std[c]
        assert got[0, c, row, column] == pytest.approx(want, abs=1e-5)
    big = small_model.clip_pixels(np.repeat(image[None, :64, :64], 2, 0))
    assert big.shape == (2, 3, 224, 224) and big.dtype == np.float32


def test_a_recording_without_words_is_read(teacher):
    samples = [s | {"instruction": ""} for s in teacher.samples[:1]] + teacher.samples[1:]
    for some in (samples, samples[:1]):
        losses = teacher.model(sense(some, teacher.cfg, teacher.processor))
        assert all(torch.isfinite(loss) for loss in losses.values())


def test_backbone_eyes_tell_the_cameras_apart(teacher):
    batch = teacher.batch
    (static, wrist), words = teacher.model.eyes(batch, 2)
    assert static.shape[:2] == (8, 16) and wrist.shape[:2] == (8, 4)
    step = 0
    for sample in teacher.samples:
        for pictures in sample["images"]:
            for picture, got in zip(pictures, (static[step], wrist[step])):
                pixels, grid = teacher.processor.images([picture])
                alone = {"pixel_values": torch.from_numpy(pixels), "grids": grid}
                alone = teacher.vlm.see(alone)[0]
                assert torch.allclose(got, alone, atol=1e-4)
            step += 1
    language, caught = teacher.vlm.language, []
    hook = language.layers[1].register_forward_hook(lambda layer, x, out: caught.append(out))
    for b, sample in enumerate(teacher.samples):  # alone, without padding, two layers of four
        ids = teacher.processor.tokenizer.encode(sample["instruction"], add_special_tokens=False)
        caught.clear()
        x = language.get_input_embeddings().weight[ids][None]
        causal = torch.ones(1, 1, len(ids), len(ids), dtype=torch.bool).tril()
        language(inputs_embeds=x, attention_mask=causal, use_cache=False)
        states = caught[0][0].detach().double().numpy()
        states = states - states.mean(1, keepdims=True)
        states = states / np.sqrt((states**2).mean(1, keepdims=True) + 1e-5)
        assert np.allclose(words[b], states.mean(0), atol=1e-5)
    hook.remove()


# --- VITA-1.5 -------------------------------------------------------------------------------------


def to_released(name):
    """A weight of transformers' InternVLVisionModel -> its name in VITA-1.5's files."""
    rename = {"cls_token": "class_embedding", "position_embeddings": "position_embedding",
              "projection": "patch_embedding", "lambda_1": "ls1", "lambda_2": "ls2",
              "layernorm_before": "norm1", "layernorm_after": "norm2",
              "projection_layer": "proj", "attention": "attn", "layer": "layers"}  # fmt: skip
    words = [rename.get(w, w) for w in name.split(".") if w != "patch_embeddings"]
    return "model.vision_tower.vision_tower." + ".".join(words)


RELEASED = dict(
    model_type="vita-Qwen2", architectures=["VITAQwen2ForCausalLM"], hidden_size=64,
    num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, intermediate_size=96,
    rms_norm_eps=1e-6, rope_theta=1e6, max_position_embeddings=32768, vocab_size=1000,
    tie_word_embeddings=False, use_sliding_window=False, sliding_window=32768, bos_token_id=1,
    eos_token_id=2, hidden_act="silu", mm_hidden_size=512, mm_projector_type="mlp2x_gelu",
    mm_vision_tower="OpenGVLab/InternViT-300M-448px", image_aspect_ratio="square",
    tokenizer_model_max_length=6200, torch_dtype="bfloat16", transformers_version="4.44.2",
)  # fmt: skip


class Vita:
    """VITA-1.5 scaled down: transformers' parts, and a folder with the released files' names."""

    def __init__(self, folder):
        common.seed_all(0)
        vision = transformers.InternVLVisionConfig(
            hidden_size=128, num_hidden_layers=2, num_attention_heads=2, intermediate_size=160,
            image_size=112, patch_size=14, attention_bias=True, use_qk_norm=False,
            use_absolute_position_embeddings=True, layer_norm_eps=1e-6, use_mean_pooling=True,
        )  # fmt: skip
        text = dict(hidden_size=64, num_hidden_layers=2, num_attention_heads=4, vocab_size=1000,
                    num_key_value_heads=2, intermediate_size=96, rms_norm_eps=1e-6)  # fmt: skip
        rope = {"rope_type": "default", "rope_theta": 1e6}
        self.folder, self.vision = folder, transformers.InternVLVisionModel(vision).eval()
        self.text = transformers.Qwen2Model(transformers.Qwen2Config(**text, rope_parameters=rope))
        self.text.eval()
        self.projector = nn.Sequential(nn.Linear(512, 64), nn.GELU(), nn.Linear(64, 64))
        with torch.no_grad():
            for model in (self.vision, self.text, self.projector):
                for p in model.parameters():  # bfloat16 on the disk, so nothing is lost there
                    p.copy_((p + 0.1 * torch.randn_like(p)).bfloat16())
        (folder / "config.json").write_text(json.dumps(RELEASED))
        for name in ("tokenizer.json", "tokenizer_config.json"):
            shutil.copy(TINY / name, folder)
        self.write(self.released())
        plant(folder)

    def released(self):
        out, qkv = {}, {}
        for name, t in self.vision.state_dict().items():
            if found := re.search(r"(.*)\.([qkv])_proj\.(\w+)$", name):
                qkv.setdefault((found[1], found[3]), {})[found[2]] = t
            else:
                out[to_released(name)] = t
        for (name, kind), three in qkv.items():
            joined = torch.cat([three[k] for k in "qkv"])
            out[to_released(name) + ".qkv." + kind] = joined
        out |= {"model." + n: t for n, t in self.text.state_dict().items()}
        out |= {"model.mm_projector." + n: t for n, t in self.projector.state_dict().items()}
        out |= {"lm_head.weight": torch.zeros(1000, 64), "model.audio_encoder.x": torch.zeros(3)}
        return {n: t.bfloat16() for n, t in out.items()}

    def write(self, tensors):
        names, index = sorted(tensors), {}
        for part, some in ((1, names[::2]), (2, names[1::2])):
            file = f"model-0000{part}-of-00002.safetensors"
            save_file({n: tensors[n].contiguous() for n in some}, self.folder / file)
            index |= {n: file for n in some}
        content = {"metadata": {}, "weight_map": index}
        (self.folder / "model.safetensors.index.json").write_text(json.dumps(content))

    def see(self, pixels):
        """-> (n, 49, 64): half the patches' states, 2 x 2 of them a token, projected."""
        out = []
        for h in 0.5 * self.vision(pixels).last_hidden_state[:, 1:]:
            h = h.reshape(14, 14, 128)
            out.append(torch.stack([
                torch.cat([h[2 * r, 2 * c], h[2 * r, 2 * c + 1],
                           h[2 * r + 1, 2 * c], h[2 * r + 1, 2 * c + 1]])
                for r, c in np.ndindex(7, 7)
            ]))  # fmt: skip
        return self.projector(torch.stack(out))


@pytest.fixture(scope="module")
def vita(tmp_path_factory):
    return Vita(tmp_path_factory.mktemp("vita"))


def test_vita_is_composed_as_released(vita):
    model, processor = common.load_vlm(str(vita.folder))
    rng = np.random.default_rng(0)
    images = [rng.integers(0, 256, (size, size, 3), np.uint8) for size in (200, 84, 200)]
    pixels, grids = processor.images(images)
    assert pixels.shape == (3, 3, 200, 200) and grids == ((1, 14, 14),) * 3
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    assert pixels[0, 1, 7, 9] == pytest.approx((images[0][7, 9, 1] / 255 - mean[1]) / std[1], 1e-4)
    with torch.no_grad():
        want = vita.see(torch.from_numpy(pixels))
        (seen,) = model.see({"pixel_values": torch.from_numpy(pixels), "grids": grids})
        assert want.shape == (3, 49, 64) and torch.allclose(seen, want.flatten(0, 1), atol=1e-4)
        h = 0.5 * vita.vision(torch.from_numpy(pixels)).last_hidden_state[:, 1:]
        shuffle = transformers.InternVLModel.pixel_shuffle
        folded = shuffle(None, h.unflatten(1, (14, 14)), scale_factor=0.5)
        assert torch.allclose(vita.projector(folded.flatten(1, 2)), want, atol=1e-5)


def test_a_vita_folder_is_sized_without_its_weights(vita):
    with torch.device("meta"):
        model, _ = common.load_vlm(str(vita.folder))
    loaded, _ = common.load_vlm(str(vita.folder))
    assert all(p.is_meta for p in model.parameters())
    assert common.param_counts(model)["total"] == common.param_counts(loaded)["total"]


def test_vita_stays_in_the_16_bits_of_its_files(vita):
    whole, half = (common.load_vlm(str(vita.folder), 200, how)[0] for how in ("fp32", "bf16"))
    for name, tensor in whole.state_dict().items():
        assert tensor.dtype == torch.float32
        kept = half.state_dict()[name]
        assert kept.dtype == torch.bfloat16 and torch.equal(kept.float(), tensor), name
    for model in (whole, half):  # in no file
        assert torch.equal(model.language.rotary_emb.inv_freq, vita.text.rotary_emb.inv_freq)
    assert not any(t.is_meta for t in (*half.parameters(), *half.buffers()))


def test_vitas_own_code_never_runs(vita, monkeypatch):
    never_runs_its_own(vita.folder, common.load_vlm, monkeypatch)


@pytest.mark.parametrize("name, text, says", [
    ("tokenizer_config.json", '{"auto_map": {"AutoTokenizer": ["p.X", "p.X"]}}', "cannot load"),
    ("tokenizer_config.json", "[]", "cannot load"), ("tokenizer.json", "{}", "cannot load"),
    ("config.json", "[]", "describes a model"), ("config.json", "{", "cannot load"),
])  # fmt: skip
def test_a_vita_folder_that_cannot_be_read_is_one_line(name, text, says, vita, tmp_path):
    folder = shutil.copytree(vita.folder, tmp_path / "vita")
    (folder / name).write_text(text)
    with pytest.raises(common.UserError, match=says) as error:
        common.load_vlm(str(folder))
    assert "\n" not in str(error.value) and str(folder) in str(error.value)


def test_vita_reads_as_released(vita):
    model, processor = common.load_vlm(str(vita.folder))
    rows = [tuple(range(5, 45)), tuple(range(100, 127))]
    prompt = processor.pad(rows, [(), ()])
    with torch.no_grad():
        x = vita.text.get_input_embeddings()(prompt["input_ids"])
        h = model.read(x, prompt, common.causal_mask(prompt["real"]), ())
        for b, row in enumerate(rows):
            alone = vita.text(input_ids=torch.tensor([row])).last_hidden_state[0]
            assert torch.allclose(h[b, -len(row) :], alone, atol=1e-4)


def test_size_is_what_vita_sees(vita):
    cfg = replace(SMALL, stage="finetune", backbone=str(vita.folder), size=112)
    _, processor = vita_vla.build(cfg)
    pixels, grids = processor.images([np.zeros((200, 200, 3), np.uint8)])
    assert pixels.shape == (1, 3, 112, 112) and grids == ((1, 8, 8),)
    with pytest.raises(common.UserError, match="--size 100: .* 2 x 2 patches of 14 .*; take 112"):
        vita_vla.build(replace(cfg, size=100))


def test_vita_is_exported_in_its_released_layout(vita, tmp_path):
    model, _ = common.load_vlm(str(vita.folder))
    with torch.no_grad():
        for p in model.language.parameters():
            p += 0.1
    common.export_backbone(model, str(vita.folder), None, tmp_path / "out")
    again, _ = common.load_vlm(str(tmp_path / "out"))
    kept = model.state_dict()
    assert all(torch.equal(kept[n], t) for n, t in again.state_dict().items())
    names = {n for f in (tmp_path / "out").glob("*.safetensors") for n in load_file(f)}
    assert names == set(vita.released())  # the audio encoder and the head are there too


def test_vita_keeps_the_released_rotation(vita):
    model, _ = common.load_vlm(str(vita.folder))
    assert model.language.config.rope_parameters["rope_theta"] == 1e6
    assert torch.equal(model.language.rotary_emb.inv_freq, vita.text.rotary_emb.inv_freq)


def test_vita_trains_and_acts(vita, episodes):
    case = Case(episodes, backbone=str(vita.folder))
    before = case.hidden()
    ids = case.batch["prompt"]["input_ids"][0][case.batch["prompt"]["real"][0]].tolist()
    assert re.fullmatch(r"(?:\.+p{98}\.+s\.+aaa){3}\.", letters(case, ids))
    losses, grads = case.step(vita_vla.make_optimizers(case.model, case.cfg))
    assert all(np.isfinite(v) for v in losses.values())
    assert all(g is not None and g.any() for g in grads.values())
    assert {*parts(grads, "vlm.language")} == {*STUDENT, *DECODER, "vlm.language"}
    assert not torch.allclose(case.hidden(), before)
    check_cache(case, episodes[:2], steps=5)


@pytest.mark.parametrize("change, names", [
    ("without", "lacks model.norm.weight"),
    ("without vision", "position_embedding"),
    ("surplus", "surplus weight, model.extra.weight"),
    ("shape", "mm_projector.2.weight|projector.2.weight"),
    ("cut", "model-00002-of-00002.safetensors"),
])  # fmt: skip
def test_a_weight_that_does_not_fit_is_named(change, names, vita, tmp_path):
    folder = shutil.copytree(vita.folder, tmp_path / "vita")
    for file in folder.glob("*.safetensors"):
        tensors = load_file(file)
        if change == "without":
            tensors.pop("model.norm.weight", None)
        elif change == "without vision":
            tensors.pop("model.vision_tower.vision_tower.embeddings.position_embedding", None)
        elif change == "surplus" and "00001" in file.name:
            tensors["model.extra.weight"] = torch.zeros(2)
        elif change == "shape" and "model.mm_projector.2.weight" in tensors:
            tensors["model.mm_projector.2.weight"] = torch.zeros(3, 3)
        save_file(tensors, file)
    if change == "cut":
        file = folder / "model-00002-of-00002.safetensors"
        file.write_bytes(file.read_bytes()[:9000])
    with pytest.raises(common.UserError, match=names) as error:
        common.load_vlm(str(folder))
    assert "\n" not in str(error.value) and str(folder) in str(error.value)


def test_vita_needs_the_words_it_puts_vectors_at(vita, tmp_path):
    """A tokenizer without <|image_pad|> would leave the pictures out without a word."""
    folder = shutil.copytree(vita.folder, tmp_path / "vita")
    text = (folder / "tokenizer.json").read_text()
    (folder / "tokenizer.json").write_text(text.replace("<|image_pad|>", "<|other|>"))
    text = (folder / "tokenizer_config.json").read_text()
    (folder / "tokenizer_config.json").write_text(text.replace("<|image_pad|>", "<|other|>"))
    with pytest.raises(common.UserError, match="image_pad"):
        common.load_vlm(str(folder))


def test_vita_by_its_name_says_how_to_get_it(monkeypatch):
    def unreachable(path):
        raise OSError("no network")

    monkeypatch.setattr(backbones, "snapshot_download", unreachable)
    with pytest.raises(common.UserError, match="hf download VITA-MLLM/VITA-1.5 --local-dir DIR"):
        common.load_vlm("VITA-1.5")


def test_vita_by_its_name_is_fetched(vita, monkeypatch):
    wanted = {"VITA-MLLM/VITA-1.5": str(vita.folder)}
    monkeypatch.setattr(backbones, "snapshot_download", wanted.__getitem__)
    assert isinstance(common.load_vlm("VITA-1.5")[0], backbones.Vita15)


# --- windows --------------------------------------------------------------------------------------


def test_windows_are_consecutive_steps(episodes):
    short = replace(episodes[0], images={k: v[:2] for k, v in episodes[0].images.items()},
                    state=episodes[0].state[:2], action=episodes[0].action[:2])  # fmt: skip
    some, stats = [episodes[1], short, episodes[2]], data.statistics(episodes)
    teacher, rng = replace(SMALL, stage="teacher"), np.random.default_rng(0)
    windows = Histories(some, stats, teacher)
    wanted = [(e, t) for e in some for t in range(max(1, len(e.action) - 3 + 1))]
    assert len(windows) == len(wanted)
    low, high = data.bounds(stats["action"])
    for index, (e, t) in enumerate(wanted):
        got, T = windows.get(index, rng), len(e.action)
        steps = [s for s in range(t, t + 3) if s < T]
        assert len(got["images"]) == len(got["ahead"]) == len(got["state"]) == len(steps)
        assert got["instruction"] == e.instruction
        for i, s in enumerate(steps):
            for c, camera in enumerate(e.images.values()):
                assert np.array_equal(got["images"][i][c], camera[s])
                assert np.array_equal(got["ahead"][i][c], camera[min(s + 3, T - 1)])
            for j in range(3):
                assert got["mask"][i, j] == (s + j < T)
                if s + j < T:
                    want = 2 * (e.action[s + j] - low) / (high - low) - 1
                    assert np.allclose(got["action"][i, j], want.clip(-1, 1), atol=1e-5)
    assert not windows.get(len(windows) - 1, rng)["mask"][2, 1:].any()
    student = Histories(some, stats, SMALL).get(4, rng)  # reads no picture that nobody looks at
    assert student["ahead"] == []
    assert np.array_equal(student["images"][2][0], windows.get(4, rng)["images"][2][0])
    fewer = Histories(some, stats, replace(teacher, foresight_steps=1)).get(4, rng)["ahead"]
    assert len(fewer) == 1 and np.array_equal(fewer[0][0], windows.get(4, rng)["ahead"][2][0])


def test_one_shift_moves_a_whole_window(episodes):
    stats = data.statistics(episodes)
    windows = Histories(episodes[:1], stats, replace(SMALL, augment=2))
    still, rng, seen = Histories(episodes[:1], stats, SMALL), np.random.default_rng(0), set()
    for _ in range(20):
        got, want = windows.get(2, rng), still.get(2, rng)
        for c, (far, side) in enumerate(((2, 64), (1, 32))):
            fits = {(dx, dy) for dx in range(-far, far + 1) for dy in range(-far, far + 1)
                    if all(np.array_equal(a[c], data.shift(b[c], dx, dy))
                           for key in ("images", "ahead")
                           for a, b in zip(got[key], want[key]))}  # fmt: skip
            assert fits and len(got["images"][0][c]) == side
            seen |= {(c, *fit) for fit in fits}
    assert len(seen) > 10


def test_padding_changes_nothing(case, teacher):
    for some in (case, teacher):
        together = some.hidden()
        for b, sample in enumerate(some.samples):
            alone = some.hidden(sense([sample], some.cfg, some.processor))[0]
            assert torch.allclose(together[b, : len(alone)], alone, atol=1e-4)


def test_a_short_history_is_that_of_an_episodes_start(case):
    """What is predicted at step i of a window is what is predicted after i steps of acting."""
    whole = case.hidden(sense([case.samples[0]], case.cfg, case.processor))[0]
    for n in (1, 2):
        alone = case.hidden(sense([cut(case.samples[0], n)], case.cfg, case.processor))[0]
        assert torch.allclose(alone, whole[:n], atol=1e-4)


# --- acting ---------------------------------------------------------------------------------------


def observation_of(episode, t, memory):
    images = {name: frames[t] for name, frames in episode.images.items()}
    return {"images": images, "state": episode.state[t], "memory": memory}


def test_training_and_acting_see_the_same(case, episodes):
    world = tabletop.Tabletop("bridge", 64, 32)
    live = world.reset(0) | {"memory": {}}
    seen = observation_of(episodes[0], 0, {})
    assert all(np.array_equal(live["images"][n], x) for n, x in seen["images"].items())
    policy, window = case.policy(), case.windows.get(0, np.random.default_rng(0))
    for first in (live, seen):
        for t in range(3):
            observation = first if t == 0 else observation_of(episodes[0], t, first["memory"])
            sample = policy.remember(observation, episodes[0].instruction)
            acted = sense([sample], case.cfg, case.processor)
            trained = sense([cut(window, t + 1)], case.cfg, case.processor)
            assert set(trained) - set(acted) == {"action", "mask"}
            for key in acted["prompt"]:
                assert torch.equal(acted["prompt"][key], trained["prompt"][key]), (t, key)
            assert acted["grids"] == trained["grids"]
            for key in set(acted) - {"prompt", "grids"}:
                assert torch.equal(acted[key], trained[key]), (t, key)


def play(policy, episodes, steps, restart):
    """Acts along recordings; at step `restart` world 0 begins anew, and its last joins late."""
    memories, out, at = [{} for _ in episodes], [], [0] * len(episodes)
    for step in range(steps):
        if step == restart:
            memories[0], at[0] = {}, 7
        live = [i for i in range(len(episodes)) if step > 0 or i + 1 < len(episodes)]
        seen = [observation_of(episodes[i], at[i], memories[i]) for i in live]
        samples = [policy.remember(o, episodes[i].instruction) for o, i in zip(seen, live)]
        with torch.no_grad():
            out.append(policy.last_hidden(samples, seen))
        for i in live:
            at[i] += 1
    return out


def check_cache(case, episodes, steps=6):
    seen, see = [], case.model.vlm.see
    case.model.vlm.see = lambda batch: seen.append(len(batch["grids"])) or see(batch)
    with_cache = play(case.policy(cache=True), episodes, steps, restart=3)
    del case.model.vlm.see
    n = len(episodes)
    assert seen == [2 * (n - 1)] + [2 * n] * (steps - 1), "a picture is seen once"
    without = play(case.policy(cache=False), episodes, steps, restart=3)
    for step, (a, b) in enumerate(zip(with_cache, without)):
        assert torch.allclose(a, b, atol=1e-4), step


@pytest.mark.parametrize("flags", [{}, {"state_input": "text"}, {"tokens": "separate"},
                                   {"mapper": "decoder"}, {"history": 1}], ids=str)  # fmt: skip
def test_a_kept_history_acts_as_one_read_anew(flags, episodes):
    check_cache(Case(episodes, **flags), episodes[:3])


def test_keys_are_kept_only_while_a_history_grows(case, episodes, monkeypatch):
    read, widths = case.vlm.read, []
    monkeypatch.setattr(case.vlm, "read", lambda x, *more: widths.append(x.shape[1]) or read(
        x, *more))  # fmt: skip
    play(case.policy(cache=True), episodes[:1] * 2, 1, restart=9)  # one world
    first = widths.pop()
    policy, memory = case.policy(cache=True), {}
    for t in range(5):
        seen = [observation_of(episodes[0], t, memory)]
        policy.act(seen, [episodes[0].instruction], None)
    step = widths[1]
    assert widths[:3] == [first, step, step] and step < first
    assert widths[3] == widths[4] == first + 2 * step  # a window that slides is read anew


@pytest.mark.parametrize("stage", ["teacher", "finetune"])
def test_actions_are_in_the_worlds_units(stage, episodes):
    case = Case(episodes, stage=stage)
    policy, memories = case.policy(), [{} for _ in range(3)]
    low, high = data.bounds(case.stats["action"])
    for t in range(2):
        seen = [observation_of(e, t, m) for e, m in zip(episodes, memories)]
        plans = policy.act(seen, [e.instruction for e in episodes[:3]], None)
        assert plans.shape == (3, 1, 7) and np.isfinite(plans).all()
        assert (plans >= low - 1e-5).all() and (plans <= high + 1e-5).all()
        assert set(np.unique(plans[:, 0, 6])) <= {low[6], high[6]}, "a gripper is open or closed"
    sample = policy.remember(observation_of(episodes[0], 2, memories[0]), episodes[0].instruction)
    batch = sense([sample], case.cfg, case.processor)
    h = case.hidden(batch)[:, -1]
    with torch.no_grad():
        h = h if stage == "teacher" else case.model.mapper(h)
        arm, gripper = small_model.decode(case.model, h)
    memories[0]["steps"].pop()
    got = policy.act([observation_of(episodes[0], 2, memories[0])], [sample["instruction"]], None)
    want = [*arm[0, 0].numpy(), 1.0 if gripper[0, 0] > 0 else -1.0]
    assert np.allclose(got[0, 0], (np.array(want) + 1) / 2 * (high - low) + low, atol=1e-4)


@pytest.mark.parametrize("index", [0, 1, 2])
def test_act_index_takes_that_prediction(index, case):
    plan = np.random.default_rng(0).uniform(size=(3, 7))
    policy = case.policy(act_index=index)
    assert np.array_equal(policy.choose({"memory": {}}, plan), plan[index])


def test_ensembling_against_a_written_out_loop(case):
    """exp(-0.01 i), i from the oldest plan that still speaks of now, as on LIBERO."""
    rng, policy, memory, plans = np.random.default_rng(0), case.policy(ensemble=True), {}, []
    for now in range(6):
        plans.append(rng.uniform(size=(3, 7)))
        got = policy.choose({"memory": memory}, plans[-1])
        total, weights, i = np.zeros(7), 0.0, 0
        for made in range(len(plans)):  # oldest first
            if now - made < 3:
                total += math.exp(-0.01 * i) * plans[made][now - made]
                weights, i = weights + math.exp(-0.01 * i), i + 1
        assert np.allclose(got, total / weights) and i == min(now + 1, 3)
    assert np.allclose(policy.choose({"memory": {}}, plans[0]), plans[0][0]), "a new goal is new"


def test_an_ensembles_gripper_is_decided_last(case):
    """The blended probability is compared with a half, not a vote of decisions."""
    policy, memory = case.policy(ensemble=True), {}
    closing, opening = np.zeros((3, 7)), np.zeros((3, 7))
    closing[:, 6], opening[:, 6] = 0.4, 0.9
    policy.choose({"memory": memory}, closing)
    policy.choose({"memory": memory}, closing)
    assert 0.5 < policy.choose({"memory": memory}, opening)[6] < 0.6
