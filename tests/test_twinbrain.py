"""twinbrain.py against its paper: a test for each equation, then what the equations rest on."""

import ast
import copy
import fnmatch
import json
import re
import shutil
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForImageTextToText, Qwen2_5_VLConfig

import common
import data
import twinbrain
from parts import sight, starvla
from twinbrain import ABLATIONS, AsyMoT, Config, TwinBrain, joint_attention, joint_mask
from worlds import tabletop

SMALL = Config(
    dtype="fp32", batch=2, horizon=4, width=32, depth=2, heads=2, future=2, repeats=2, execute=4,
    augment=0, optimizer="adamw",
)  # fmt: skip
ALONE = common.Dist(0, 1, torch.device("cpu"))
TINY = Path(common.BACKBONES["tiny"])
SOURCE = Path(twinbrain.__file__).read_text()


class Case:
    """A small model, its data, and one batch whose prompts differ in length."""

    def __init__(self, episodes, base=SMALL, backbone=None, **flags):
        self.cfg = cfg = replace(base, **flags)
        vlm, self.processor = common.load_backbone(cfg.backbone)
        vlm = backbone or vlm
        self.stats = data.statistics(episodes)
        self.windows = data.Windows(episodes, self.stats, cfg.horizon, cfg.augment)
        if cfg.head == "fast":
            common.Fast.extend(vlm, self.processor.tokenizer)
            fast = common.Fast.fit(self.windows.chunks(5), self.processor.tokenizer)
            self.processor.fast = fast
        common.seed_all(0)
        self.model = TwinBrain(cfg, vlm, self.processor, len(self.stats["state"]["q01"]), 7).eval()
        lengths = [len(e.instruction.split()) for e in episodes]
        first, last = int(np.argmin(lengths)), int(np.argmax(lengths))
        rows = [self.windows.starts[first] + 3, self.windows.starts[last + 1] - 2]
        self.samples = [self.windows.get(int(i), np.random.default_rng(0)) for i in rows]
        self.batch = twinbrain.sense(self.samples, cfg, self.processor)
        if cfg.cotrain:
            asked = data.question_sets(["pope"], 2)["pope"]
            self.batch["questions"] = common.ask(asked, self.processor, twinbrain.SYSTEM_L)
        self.noise = twinbrain.draw_noise(cfg, 0, 7, ALONE)
        robots = {"tabletop": self.stats}
        self.policy = twinbrain.Policy(self.model, cfg, self.processor, robots, ALONE.device)

    def h_R(self):
        with torch.no_grad():
            return self.model.think(self.batch)[0].last_hidden_state[self.batch["right"]["real"]]

    def step(self, opts, step=0, teacher=None):
        """One training step -> losses, and the gradients by name."""
        noise = twinbrain.draw_noise(self.cfg, step, 7, ALONE)
        h = teacher.think(self.batch)[0].last_hidden_state.detach() if teacher else None
        losses = self.model(self.batch, noise, h)
        twinbrain.total_loss(losses, self.cfg).backward()
        grads = {n: p.grad for n, p in self.model.named_parameters() if p.requires_grad}
        for opt in opts:
            opt.step()
            opt.zero_grad(set_to_none=True)
        return {name: float(loss.detach()) for name, loss in losses.items()}, grads


@pytest.fixture(scope="module")
def case(episodes):
    """The default model; tests that change it build their own."""
    return Case(episodes)


@pytest.fixture(scope="module")
def library():
    """The backbone as the library loads it, with the library's own attention throughout."""
    return AutoModelForImageTextToText.from_pretrained(TINY, dtype=torch.float32).eval()


def watch(module, act):
    """Calls act() -> what the module was called with (keywords) and what it gave, per call."""
    calls = []
    see = lambda m, args, words, out: calls.append((words, out))  # noqa: E731
    handle = module.register_forward_hook(see, with_kwargs=True)
    with torch.no_grad():
        act()
    handle.remove()
    return calls


# --- one test for each equation -------------------------------------------------------------------


def inputs_by_hand(case, library, side, state=None):
    """[V(I); T(T)] or [V(I); T(T); phi(s)], token by token."""
    batch, prompt = case.batch, case.batch[side]
    with torch.no_grad():
        grids = torch.tensor(batch["grids"])
        seen = library.model.get_image_features(batch["pixel_values"], grids)
    features, rows = iter(torch.cat(tuple(seen.pooler_output)).numpy()), []
    words = library.get_input_embeddings().weight.detach().numpy()
    for b, ids in enumerate(prompt["input_ids"].tolist()):
        for t, token in enumerate(ids):
            if state is not None and t == len(ids) - 1:
                rows.append(state[b])
            elif token == case.processor.image_token_id:
                rows.append(next(features))
            else:
                rows.append(words[token])
    assert next(features, None) is None
    return np.stack(rows).reshape(*prompt["input_ids"].shape, -1)


def test_eq1_left_input(case, library):
    text_model = case.model.left.model.language_model
    ((words, _),) = watch(text_model, lambda: case.model.think(case.batch))
    want = inputs_by_hand(case, library, "left")
    assert np.allclose(words["inputs_embeds"].numpy(), want, atol=1e-5)


def test_eq2_right_input_ends_with_the_state(case, library):
    text_model = case.model.right.model.language_model
    ((words, _),) = watch(text_model, lambda: case.model.think(case.batch))
    one, two = (
        [x.detach().numpy().astype(float) for x in (layer.weight, layer.bias)]
        for layer in (case.model.phi[0], case.model.phi[2])
    )
    state = []
    for s in case.batch["state"].numpy():
        hidden = one[0] @ s + one[1]
        state.append(two[0] @ (hidden / (1 + np.exp(-hidden))) + two[1])
    want = inputs_by_hand(case, library, "right", state)
    assert np.allclose(words["inputs_embeds"].numpy(), want, atol=1e-5)


def test_eq3_left_brain_is_the_librarys(case, library):
    prompt, cfg = case.batch["left"], library.config
    assert not prompt["real"].all(), "one prompt should be padded"
    text_model = case.model.left.model.language_model
    ((words, out),) = watch(text_model, lambda: case.model.think(case.batch))
    with torch.no_grad():
        want = library(
            input_ids=prompt["input_ids"],
            attention_mask=prompt["real"].long(),
            mm_token_type_ids=(prompt["input_ids"] == cfg.image_token_id).int(),
            pixel_values=case.batch["pixel_values"],
            image_grid_thw=torch.tensor(case.batch["grids"]),
            output_hidden_states=True,
            use_cache=True,
        )
    real, cache = prompt["real"], words[sight.CACHE]
    assert torch.allclose(out.last_hidden_state[real], want.hidden_states[-1][real], atol=1e-4)
    assert len(cache.layers) == len(want[sight.CACHE].layers) == 4
    for ours, its in zip(cache.layers, want[sight.CACHE].layers):
        for a, b in ((ours.keys, its.keys), (ours.values, its.values)):
            assert torch.allclose(a.transpose(1, 2)[real], b.transpose(1, 2)[real], atol=1e-4)


def projected(attention, words, part):
    """q, k or v of one attention module from its input, token by token -> (B, heads, T, d)."""
    layer = getattr(attention, f"{part}_proj")
    weight, d = layer.weight.detach().numpy(), attention.head_dim
    x = words["hidden_states"].numpy()
    cos, sin = (c.numpy() for c in words["position_embeddings"])
    out = np.zeros((x.shape[0], len(weight) // d, x.shape[1], d))
    for b, head, t in np.ndindex(out.shape[:3]):
        y = weight[head * d : (head + 1) * d] @ x[b, t]
        if part != "v":
            scale, eps = getattr(attention, f"{part}_norm").weight.detach().numpy(), 1e-6
            y = scale * y / np.sqrt((y**2).mean() + eps)
            turned = np.concatenate([-y[d // 2 :], y[: d // 2]])
            y = y * cos[b, t] + turned * sin[b, t]
        out[b, head, t] = y
    return out


def test_eq3_left_tokens_attend_to_left_tokens(case):
    attention = case.model.left.model.language_model.layers[2].self_attn
    ((words, out),) = watch(attention, lambda: case.model.think(case.batch))
    q, k, v = (projected(attention, words, part) for part in "qkv")
    real, (B, heads, T, d) = case.batch["left"]["real"].numpy(), q.shape
    assert not real.all() and heads == 2 * k.shape[1]
    want = np.zeros((B, T, heads * d))
    for b, head, t in np.ndindex(B, heads, T):
        seen = [j for j in range(t + 1) if real[b, j] and real[b, t]] or [t]  # causal, no padding
        weights = np.exp([q[b, head, t] @ k[b, head // 2, j] / d**0.5 for j in seen])
        y = (weights / weights.sum()) @ v[b, head // 2, seen]
        want[b, t, head * d : (head + 1) * d] = y
    want = want @ attention.o_proj.weight.detach().numpy().T
    assert np.allclose(out[0].numpy()[real], want[real], atol=1e-4)


def joint_call(case, monkeypatch, layer):
    """Left and right attention inputs of a layer, and the right's (q, k, v, mask, scale), y."""
    calls, attend = [], common.attend

    def noted(q, k, v, mask=None, scale=None):
        y = attend(q, k, v, mask, scale)
        calls.append(((q, k, v, mask, scale), y))
        return y

    monkeypatch.setattr(common, "attend", noted)
    left, right = (
        brain.model.language_model.layers[layer].self_attn
        for brain in (case.model.left, case.model.right)
    )
    found = []
    ((words_L, _),) = watch(left, lambda: found.extend(watch(right, lambda: case.h_R())))
    both = case.batch["left"]["real"].shape[1] + case.batch["right"]["real"].shape[1]
    joint = [call for call in calls if call[0][1].shape[2] == both]
    return (left, words_L), (right, found[0][0]), joint[layer]


def check_halves(case, monkeypatch, part, place):
    for layer in (0, 3):
        left, right, (inputs, _) = joint_call(case, monkeypatch, layer)
        halves = [projected(*left, part), projected(*right, part)]
        want = np.concatenate(halves, axis=2)  # [left; right] along the tokens
        got = inputs[place].numpy()
        assert got.shape == want.shape and np.allclose(got, want, atol=1e-4)


def cache_gradient(part, sever):
    """Gradient at the left brain's keys or values of a sum over the joint ones."""
    x = [torch.ones(1, 2, 3, 4, requires_grad=True) for _ in range(4)]
    left = twinbrain.DynamicCache()
    left.update(x[0], x[1], 0)
    joint = AsyMoT(left, sever=sever).update(x[2], x[3], 0)[part]
    joint.sum().backward()
    assert x[2 + part].grad.eq(1).all()
    return x[part].grad


def test_eq4_joint_keys(case, monkeypatch):
    check_halves(case, monkeypatch, "k", 1)
    assert cache_gradient(0, sever=True) is None and cache_gradient(0, sever=False).eq(1).all()


def test_eq5_joint_values(case, monkeypatch):
    check_halves(case, monkeypatch, "v", 2)
    assert cache_gradient(1, sever=True) is None and cache_gradient(1, sever=False).eq(1).all()


def test_eq6_one_softmax_over_both_halves(case, monkeypatch):
    _, (right, _), ((q, k, v, _, _), y) = joint_call(case, monkeypatch, 2)
    assert q.shape[1] == right.num_key_value_groups * k.shape[1] == 4  # two heads share a key
    q, k, v, y = (x.double().numpy() for x in (q, k, v, y))
    real_L, real_R = case.batch["left"]["real"].numpy(), case.batch["right"]["real"].numpy()
    T_L, d = real_L.shape[1], q.shape[-1]
    for b, head, i in np.ndindex(q.shape[:3]):
        if not real_R[b, i]:
            continue
        left = [j for j in range(T_L) if real_L[b, j]]  # all of the left brain
        right = [T_L + j for j in range(i + 1) if real_R[b, j]]  # causal on itself
        seen = left + right
        weights = np.exp([q[b, head, i] @ k[b, head // 2, j] / d**0.5 for j in seen])
        want = sum(w * v[b, head // 2, j] for w, j in zip(weights, seen)) / weights.sum()
        assert np.allclose(y[b, head, i], want, atol=1e-5)


def test_eq7_flow_matching_loss(case):
    (a_0, t), cfg, model = case.noise, case.cfg, case.model
    means = []
    for b, sample in enumerate(case.samples):
        errors = []
        with torch.no_grad():
            alone = twinbrain.sense([sample], cfg, case.processor)
            out = model.think(alone)[0]
            keys = model.expert.keys(model.conditions(out), alone["right"]["real"])
        for r in range(cfg.repeats):
            a_1, noise, time = sample["action"], a_0[b, r].numpy(), float(t[b, r])
            x_t = np.zeros_like(a_1)
            for h, a in np.ndindex(a_1.shape):
                x_t[h, a] = (1 - time) * noise[h, a] + time * a_1[h, a]
            with torch.no_grad():
                x = torch.from_numpy(x_t)[None, None]
                v = model.expert(x, t[b : b + 1, r : r + 1], keys)[0, 0].numpy()
            for h, a in np.ndindex(a_1.shape):
                if sample["mask"][h]:  # inside the episode
                    errors.append(float(v[h, a] - (a_1[h, a] - noise[h, a])) ** 2)
        means.append(np.mean(errors))
    assert not case.batch["mask"].all(), "one chunk should reach past its episode's end"
    with torch.no_grad():
        assert float(model(case.batch, case.noise)["action"]) == pytest.approx(np.mean(means), 1e-4)


def test_eq8_the_twin_learns_from_actions_alone(case):
    with torch.no_grad():
        losses = case.model(case.batch, case.noise)
    assert set(losses) == {"action"}
    assert twinbrain.total_loss(losses, case.cfg) == losses["action"]


def test_eq9_feature_loss():
    rng = np.random.default_rng(0)
    student, teacher = rng.standard_normal((2, 3, 5, 4)).astype(np.float32)
    real = np.array([[0, 0, 1, 1, 1], [0, 1, 1, 1, 1], [1, 1, 1, 1, 1]], bool)
    means = []
    for b in range(3):
        tokens = [i for i in range(5) if real[b, i]]
        distance = [
            sum((student[b, i, d] - teacher[b, i, d]) ** 2 for d in range(4)) for i in tokens
        ]
        means.append(sum(distance) / len(tokens))
    h_S, h_T = (torch.from_numpy(x).requires_grad_() for x in (student, teacher))
    loss = twinbrain.feature_loss(h_S, h_T, torch.from_numpy(real))
    loss.backward()
    assert float(loss.detach()) == pytest.approx(np.mean(means), 1e-5)
    assert h_T.grad is None and h_S.grad[~torch.from_numpy(real)].eq(0).all()


def test_eq10_students_objective(episodes, case):
    student = Case(episodes, brain="vanilla", distill_weight=0.25)
    with torch.no_grad():
        h_T = case.model.think(case.batch)[0].last_hidden_state
        losses = student.model(case.batch, case.noise, h_T)
        h_S = student.model.think(case.batch)[0].last_hidden_state
    real = case.batch["right"]["real"].numpy()
    distance = ((h_S - h_T).numpy().astype(float) ** 2).sum(-1)
    distance = np.mean([row[inside].mean() for row, inside in zip(distance, real)])
    want = float(losses["action"]) + 0.25 * distance
    assert set(losses) == {"action", "feature"} and distance > 0
    assert float(twinbrain.total_loss(losses, student.cfg)) == pytest.approx(want, 1e-5)


# --- the map of the paper -------------------------------------------------------------------------


def functions(tree, prefix=""):
    """-> {"TwinBrain.think": (first line, last line)}"""
    found = {}
    for node in tree.body:
        if isinstance(node, ast.ClassDef):
            found |= functions(node, node.name + ".")
        elif isinstance(node, ast.FunctionDef):
            found[prefix + node.name] = node.lineno, node.end_lineno
    return found


def test_equation_map_tags_and_tests_agree():
    entries = re.findall(r"^  Eq\. (\d+) .*-> ([\w.]+)\(\)$", twinbrain.__doc__, re.M)
    assert [int(n) for n, _ in entries] == list(range(1, 11))
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
    text = twinbrain.__doc__.partition("Table map")[2].partition("Assumptions")[0]
    named = re.findall(r"[a-z]\w*-(?:\*|\w+)", text.partition("): ")[2])
    for pattern in named:
        assert fnmatch.filter(ABLATIONS, pattern), pattern
    for name, row in ABLATIONS.items():
        assert any(fnmatch.fnmatch(name, pattern) for pattern in named), name
        assert set(row) - {"_paper", "_row"} <= set(Config.__dataclass_fields__), name


# --- what a right token sees ----------------------------------------------------------------------


def picture(mask):
    """One sample's mask, (1, T_R, T_L + T_R) -> a line per right token; the last 5 are its own."""
    rows = ["".join(".#"[int(see)] for see in row) for row in mask[0]]
    return "\n".join(row[:-5] + "|" + row[-5:] for row in rows)


@pytest.mark.parametrize("visibility, want", [
    ("all", """
....|#....
....|.#...
.###|..#..
.###|..##.
.###|..###"""),
    ("index", """
....|#....
....|.#...
.#..|..#..
.##.|..##.
.###|..###"""),
], ids=["all", "index"])  # fmt: skip
def test_mask_with_padding_on_the_left(visibility, want):
    real_L = torch.tensor([[0, 1, 1, 1], [1, 1, 1, 1]], dtype=torch.bool)
    real_R = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]], dtype=torch.bool)
    mask = joint_mask(real_L, real_R, visibility)
    assert mask.shape == (2, 1, 5, 9) and "\n" + picture(mask[0]) == want
    full = joint_mask(real_L[1:], real_R[1:], visibility)
    assert torch.equal(mask[1:], full)


def test_padding_changes_nothing(case):
    together = case.model.think(case.batch)[0].last_hidden_state
    for b, sample in enumerate(case.samples):
        alone = twinbrain.sense([sample], case.cfg, case.processor)
        h = case.model.think(alone)[0].last_hidden_state[0]
        assert torch.allclose(together[b, -len(h) :], h, atol=1e-4)


def random_backbone(layers):
    config = AutoConfig.from_pretrained(TINY)
    config.text_config.num_hidden_layers = layers
    common.seed_all(1)
    vlm = AutoModelForImageTextToText.from_config(config, dtype=torch.float32)
    return common.quick_vision(vlm.eval())


def test_interval_leaves_left_keys_to_every_kth_layer(episodes, monkeypatch):
    seen, states = {}, []

    class Watched(AsyMoT):
        def update(self, k, v, layer, *args, **kwargs):
            out = super().update(k, v, layer, *args, **kwargs)
            seen[layer] = out[0].shape[2] > k.shape[2]
            return out

    monkeypatch.setattr(twinbrain, "AsyMoT", Watched)
    vlm = random_backbone(10)
    for k in (0, 1, 2, 4, 8):
        case = Case(episodes, interval=k, backbone=copy.deepcopy(vlm))
        states.append(case.h_R())
        assert [layer for layer in range(10) if seen[layer]] == list(range(0, 10, k + 1))
    for i, j in np.ndindex(5, 5):
        assert i == j or not torch.allclose(states[i], states[j], atol=1e-4)


def test_equal_prompts_and_index_visibility_double_each_key(episodes):
    vanilla = Case(episodes, brain="vanilla", state=False)
    for visibility, same in (("index", True), ("all", False)):
        twin = Case(episodes, state=False, visibility=visibility)
        twin.batch["left"] = twin.batch["right"]
        assert torch.allclose(twin.h_R(), vanilla.h_R(), atol=1e-4) == same


# --- who learns -----------------------------------------------------------------------------------


def test_left_brain_stays_as_it_was(episodes):
    case = Case(episodes)
    opts = twinbrain.make_optimizers(case.model, case.cfg)
    case.model.train()
    for step in range(3):
        case.step(opts, step)
    case.model.eval()
    fresh, _ = common.load_backbone("tiny")
    fresh.model.language_model.config._attn_implementation = "asymot"  # the same arithmetic
    weights, right = case.model.left.state_dict(), case.model.right.state_dict()
    assert all(torch.equal(weights[n], x) for n, x in fresh.state_dict().items())
    assert not torch.equal(right["lm_head.weight"], weights["lm_head.weight"])
    asked = common.ask(data.question_sets(["seed"], 4)["seed"], case.processor, twinbrain.SYSTEM_L)
    words = {"pixel_values": asked["pixel_values"], "image_grid_thw": torch.tensor(asked["grids"])}
    words |= {k: asked["prompt"][k] for k in ("input_ids", "position_ids")}
    words["attention_mask"] = common.causal_mask(asked["prompt"]["real"])
    with torch.no_grad():
        assert torch.equal(case.model.left(**words).logits, fresh(**words).logits)


def test_deepstack_reaches_both_brains(episodes, case):
    off = Case(episodes, deepstack=False)
    assert not torch.allclose(case.h_R(), off.h_R(), atol=1e-3)
    text_models = [c.model.left.model.language_model for c in (case, off)]
    (_, on), (_, without) = (watch(m, c.h_R)[0] for m, c in zip(text_models, (case, off)))
    assert not torch.allclose(on.last_hidden_state, without.last_hidden_state, atol=1e-3)


def silent(cfg, names):
    """Trainable parameters that no loss can reach: see `common.parallel()` in train()."""
    if cfg.brain != "nofreeze":
        return set()
    keys = ("input_layernorm", "k_proj", "k_norm", "v_proj")
    last = [n for n in names if n.startswith("left.model.language_model.layers.3.")]
    return {n for n in last if not any(key in n for key in keys)} | {
        "left.model.language_model.norm.weight"
    }


@pytest.mark.parametrize("name", ABLATIONS)
def test_each_ablation_trains_and_differs(name, episodes, case):
    flags = {k: v for k, v in ABLATIONS[name].items() if not k.startswith("_")}
    arm, base = Case(episodes, **flags), Case(episodes)
    teacher = case.model if name == "t9-student" else None
    losses, grads = arm.step(twinbrain.make_optimizers(arm.model, arm.cfg), teacher=teacher)
    before, usual = base.step([])
    assert all(np.isfinite(loss) for loss in losses.values())
    left = [n for n in grads if n.startswith("left.")]
    right = ["left." + n.removeprefix("right.") for n in grads if n.startswith("right.")]
    assert left == (right if name == "t5-no-freezing" else [])
    assert {n for n, g in grads.items() if g is None or not g.any()} == silent(arm.cfg, left)
    same = losses == before and grads.keys() == usual.keys()
    assert same == (set(flags) <= {"qa_every"})  # t1-twin is the default, f2-twin only measures it
    assert ("feature" in losses) == (name == "t9-student")
    assert ("answer" in losses) == (name == "f2-cotrain")


def test_one_batch_overfits(episodes):
    case = Case(episodes, width=64, lr=2e-3, lr_head=5e-3, repeats=8)
    opts = twinbrain.make_optimizers(case.model, case.cfg)
    first = case.step(opts)[0]["action"]
    for _ in range(30):
        last = case.step(opts)[0]["action"]
    assert last < first / 4


def test_muon_takes_the_matrices(episodes):
    case = Case(episodes, optimizer="muon")
    adam, muon = twinbrain.make_optimizers(case.model, case.cfg)
    count = [sum(len(g["params"]) for g in opt.param_groups) for opt in (adam, muon)]
    assert sum(count) == sum(p.requires_grad for p in case.model.parameters())
    assert all(p.dim() == 2 for g in muon.param_groups for p in g["params"])
    peaks = {g["peak"] for opt in (adam, muon) for g in opt.param_groups}
    assert peaks == {case.cfg.lr, case.cfg.lr_head}
    first = case.step([adam, muon])[0]["action"]
    for _ in range(4):
        last = case.step([adam, muon])[0]["action"]
    assert last < first


@pytest.mark.parametrize("depth", [1, 2])
def test_only_self_attention_mixes_the_actions(depth):
    """Block 0 looks at the brain alone: there, an action's velocity is its own; no draw mixes."""
    common.seed_all(0)
    expert = twinbrain.DiT(replace(SMALL, depth=depth), 128, 7, depth)
    keys = expert.keys([torch.randn(2, 5, 128)], torch.ones(2, 5, dtype=torch.bool))
    x_t, t = torch.randn(2, 2, 4, 7), torch.rand(2, 2)
    with torch.no_grad():
        v = expert(x_t, t, keys)
        x_t[1, 0, 2] += 1.0
        moved = (expert(x_t, t, keys) - v).abs().amax(-1) > 1e-6  # (B, R, H)
    want = torch.zeros(2, 2, 4, dtype=torch.bool)
    want[1, 0, 2 if depth == 1 else slice(None)] = True
    assert torch.equal(moved, want)


# --- the sampler and its noise --------------------------------------------------------------------


@pytest.mark.parametrize("steps", [1, 4, 7])
def test_integration_reaches_the_target(steps):
    a_0, a_1 = torch.randn(2, 3, 4, 7, generator=torch.Generator().manual_seed(0))
    straight = twinbrain.integrate(lambda x, t: (a_1 - a_0)[:, None], a_0, steps)
    assert torch.allclose(straight, a_1, atol=1e-5)
    # the velocity field of a single target: linear in x, a path of constant speed
    toward = twinbrain.integrate(
        lambda x, t: (a_1[:, None] - x) / (1 - t[:, :, None, None]), a_0, steps
    )
    assert torch.allclose(toward, a_1, atol=1e-5)


def test_times_follow_the_beta_distribution():
    cfg = replace(SMALL, batch=4000, repeats=8, horizon=1)
    a_0, t = twinbrain.draw_noise(cfg, 3, 2, ALONE)
    assert a_0.shape == (4000, 8, 1, 2) and t.shape == (4000, 8)
    assert t.min() >= 0 and t.max() <= 1
    assert float(t.mean()) == pytest.approx(1 - 0.6 / 0.999, abs=0.005)  # E[Beta(1.5, 1)] = 0.6
    edges = np.linspace(0, 1, 11)
    share = np.histogram(t, edges)[0] / t.numel()
    below = 1 - np.clip(0.999 * (1 - edges), 0, 1) ** 1.5  # P(1 - b / 0.999 <= edge)
    assert np.allclose(share, np.diff(below), atol=0.01)
    assert abs(float(a_0.mean())) < 0.02 and float(a_0.std()) == pytest.approx(1, abs=0.02)


def test_any_number_of_processes_draws_the_same_noise():
    whole = twinbrain.draw_noise(replace(SMALL, batch=4), 5, 7, ALONE)
    halves = [
        twinbrain.draw_noise(SMALL, 5, 7, common.Dist(rank, 2, torch.device("cpu")))
        for rank in (0, 1)
    ]
    for one, two in zip(whole, zip(*halves)):
        assert torch.equal(one, torch.cat(two))
    other = twinbrain.draw_noise(replace(SMALL, batch=4), 6, 7, ALONE)
    assert not torch.equal(whole[0], other[0])


# --- acting and answering -------------------------------------------------------------------------


def observation_of(episode, t):
    images = {name: frames[t] for name, frames in episode.images.items()}
    return {"images": images, "state": episode.state[t]}


def test_training_and_acting_see_the_same(case, episodes):
    world = tabletop.Tabletop("bridge", 64, 32)
    live = world.reset(0)
    seen = observation_of(episodes[0], 0)
    assert all(np.array_equal(live["images"][n], x) for n, x in seen["images"].items())
    sample = case.windows.get(0, np.random.default_rng(0))
    trained = twinbrain.sense([sample], case.cfg, case.processor)
    for observation in (live, seen):
        acted = case.policy.batch([observation], [episodes[0].instruction])
        assert set(trained) - set(acted) == {"action", "mask"}
        for side in ("left", "right"):
            for key in trained[side]:
                assert torch.equal(trained[side][key], acted[side][key]), (side, key)
        for key in ("pixel_values", "state"):
            assert torch.equal(trained[key], acted[key]), key
        assert trained["grids"] == acted["grids"]


@pytest.mark.parametrize("head", ["flow", "pi", "oft", "fast"])
def test_each_head_acts(episodes, head):
    case = Case(episodes, head=head)
    seen = [observation_of(e, 0) for e in episodes[:3]]
    chunks = case.policy.act(seen, [e.instruction for e in episodes[:3]], np.random.default_rng(0))
    assert chunks.shape == (3, case.cfg.horizon, 7) and np.isfinite(chunks).all()
    low, high = data.bounds(case.stats["action"])
    assert (chunks >= low - 1e-6).all() and (chunks <= high + 1e-6).all()
    again = case.policy.act(seen, [e.instruction for e in episodes[:3]], np.random.default_rng(0))
    assert np.array_equal(chunks, again)


def test_fast_says_what_it_has_learned(episodes):
    flags = dict(head="fast", brain="vanilla", horizon=2, execute=2, optimizer="muon", lr=1e-2)
    case = Case(episodes, **flags)
    sample = case.samples[0]
    said = case.processor.fast.encode(sample["action"])
    case.batch = twinbrain.sense([sample], case.cfg, case.processor)
    opts = twinbrain.make_optimizers(case.model, case.cfg)
    acting = {k: sample[k] for k in ("images", "instruction", "robot", "state")}
    batch, learned = twinbrain.sense([acting], case.cfg, case.processor), False
    for step in range(90):
        case.step(opts)
        with torch.no_grad():
            h, prompt = case.model.think(case.batch)[0].last_hidden_state, case.batch["right"]
            learned = twinbrain.answer_loss(case.model.right, h, prompt)[1].item()
            spoken = case.model.speak(batch, limit=len(said)) if learned or step % 9 == 0 else None
        if spoken is not None:  # decoding writes the chunk if and only if each token is likeliest
            assert (tuple(spoken[0].tolist()) == said) == learned
        if learned:
            break
    a = case.model.act(batch, None)[0].numpy()
    assert learned and np.abs(a - sample["action"]).max() < 0.11  # coefficients are in tenths


def test_speaking_token_by_token_equals_one_pass(episodes):
    case = Case(episodes, head="fast", brain="twin", interval=1)
    keys = ("images", "instruction", "robot", "state")
    acting = [{k: s[k] for k in keys} for s in case.samples]

    class Told:  # stands in for the action tokenizer: the "actions" are the ids themselves
        encode = staticmethod(lambda ids: tuple(ids.tolist()))

    with torch.no_grad():
        batch = twinbrain.sense(acting, case.cfg, case.processor)
        text_model = case.model.right.model.language_model
        calls = watch(text_model, lambda: case.model.speak(batch, limit=5))
        assert len(calls) == 5, "the prompt, then a pass for each word but the last"
        ids = case.model.speak(batch, limit=5)
        mask = np.ones(5, bool)
        told = [s | {"action": row.numpy(), "mask": mask} for s, row in zip(acting, ids)]
        case.processor.fast = Told
        whole = twinbrain.sense(told, case.cfg, case.processor)
        h = case.model.think(whole)[0].last_hidden_state[:, -6:-1]
    assert torch.equal(whole["right"]["input_ids"][:, -5:], ids)
    assert torch.equal(case.model.right.lm_head(h).argmax(-1), ids)
    alone, end = twinbrain.sense(acting[:1], case.cfg, case.processor), int(ids[0, 1])
    with torch.no_grad():
        said = case.model.speak(alone, 5, end)[0].tolist()
    assert said == ids[0].tolist()[: ids[0].tolist().index(end) + 1], "it goes on behind its end"


def test_words_that_no_text_trained_are_drawn_anew():
    vlm, processor = common.load_backbone("tiny")
    words = vlm.get_input_embeddings().weight
    before, ids = words.detach().clone(), processor.tokenizer.convert_tokens_to_ids
    twins = [ids("<robot_action_0>"), ids("<robot_action_7>"), ids(starvla.SLOT)]
    red = ids("Ġred")
    assert torch.cosine_similarity(words[twins[0]], words[twins[1:]]).min() > 0.99
    common.redraw_untrained(vlm, [red])
    assert torch.equal(words, before), "a word that lies alone was trained"
    common.redraw_untrained(vlm, [ids(starvla.SLOT)])
    changed = (words != before).any(1)
    assert changed[twins].all() and not changed[red] and vlm.lm_head.weight is words
    assert torch.cosine_similarity(words[twins[0]], words[twins[1:]]).max() < 0.9
    assert 0.8 < words[changed].norm(dim=1).mean() / words[~changed].norm(dim=1).mean() < 1.25
    drawn = words.detach().clone()
    common.redraw_untrained(vlm, [ids(starvla.SLOT)])
    assert torch.equal(words, drawn)


@pytest.mark.parametrize("scale", [0.3, 3.0])
def test_words_added_to_a_large_vocabulary_are_drawn_anew(scale):
    """The library puts new words where the mean of all is; most of the others were trained."""
    words, new = torch.nn.Embedding(4000, 64), slice(3600, None)
    draw = partial(torch.randn, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        words.weight.copy_(0.02 * scale * draw(64) + 0.03 * draw(4000, 64))
        words.weight[new] = words.weight[:3600].mean(0) + 1e-6 * draw(400, 64)
        before = words.weight.clone()
    vlm = SimpleNamespace(get_input_embeddings=lambda: words)
    common.redraw_untrained(vlm, [3600])
    changed = (words.weight != before).any(1)
    assert changed[new].all() and not changed[:3600].any()


def test_a_slot_is_one_token_of_any_tokenizer(episodes):
    """A byte-level vocabulary has no entry written as the slot is, and still may have its token."""
    case = Case(episodes, brain="vanilla", head="oft")
    slots = case.batch["right"]["input_ids"] == starvla.slot(case.processor.tokenizer)
    assert slots.sum(1).tolist() == [case.cfg.horizon] * len(slots)
    spelled = lambda *ids: lambda text, **how: {"input_ids": [*ids]}  # noqa: E731
    assert starvla.slot(spelled(5)) == 5
    with pytest.raises(common.UserError, match="no single token"):
        starvla.slot(spelled(1, 2))


def test_attention_map(case, episodes):
    joint_attention.maps = []
    case.h_R()
    maps, joint_attention.maps = joint_attention.maps, None
    T_L, T_R = (case.batch[side]["real"].shape[1] for side in ("left", "right"))
    assert len(maps) == 4 and maps[0].shape == (2, 4, T_L + T_R)
    for weights in maps:
        assert torch.allclose(weights.sum(-1), torch.ones(()), atol=1e-5)
        assert 0 < weights[..., :T_L].sum(-1).mean() < 1
        assert (weights[:, :, :T_L].amax(1)[~case.batch["left"]["real"]] == 0).all()
    given = [observation_of(e, 0) for e in episodes[:2]], ["wave", "put it on the green towel"]
    both = case.policy.views(*given)  # of prompts that differ in length
    for i, picture in enumerate(both):
        (alone,) = case.policy.views(*(some[i : i + 1] for some in given))
        assert picture.shape == (64, 64, 3) and picture.dtype == np.uint8 and picture.std() > 1
        assert np.abs(picture.astype(int) - alone).max() <= 1
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(case.policy, "cfg", replace(case.cfg, dtype="bf16"))  # a GPU's
        for fine, coarse in zip(both, case.policy.views(*given), strict=True):
            assert np.abs(fine.astype(int) - coarse).mean() < 3
    assert joint_attention.maps is None
    with pytest.MonkeyPatch.context() as patch, pytest.raises(ZeroDivisionError):
        patch.setattr(case.model, "think", lambda batch: 1 / 0)
        case.policy.views(*given)
    assert joint_attention.maps is None
    assert Case(episodes, brain="vanilla").policy.views(*given) is None


def test_answers_are_those_of_greedy_generation(case, library):
    samples = data.question_sets(["pope"], 6)["pope"] + data.question_sets(["seed"], 4)["seed"]
    other = {"yes": "no", "no": "yes"}
    samples += [s | {"answer": other[s["answer"]]} for s in samples[:6]]
    with torch.no_grad():
        asked = common.ask(samples, case.processor, twinbrain.SYSTEM_L)
        right = case.model.answer(case.model.left, asked)[1]
    want = []
    for sample in samples:
        pixels, grids = case.processor.images(sample["images"])
        words = "Question: " + sample["question"]
        ids, answer = case.processor.prompt(twinbrain.SYSTEM_L, words, grids, sample["answer"])
        ids = torch.tensor([ids])
        said = library.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), do_sample=False,
            mm_token_type_ids=(ids == library.config.image_token_id).int(),
            pixel_values=torch.from_numpy(pixels), image_grid_thw=torch.tensor(grids),
            max_new_tokens=len(answer),
        )  # fmt: skip
        want.append(said[0, ids.shape[1] :].tolist() == list(answer))
    assert right.tolist() == want and {True, False} <= set(want)


def test_abilities_count_both_brains(case):
    sets = data.question_sets(common.ABILITIES, 4)
    scores = twinbrain.abilities(case.policy, sets)
    assert set(scores) == {"left", "right"} and scores["left"] == scores["right"]  # untrained
    assert set(scores["left"]) == set(sets)
    pairs = sets["mme"]
    with torch.no_grad():
        asked = common.ask(pairs, case.processor, twinbrain.SYSTEM_L)
        right = case.model.answer(case.model.left, asked)[1].tolist()
    both = [right[i] and right[i + 1] for i in (0, 2)]
    assert scores["left"]["mme"] == sum(both) / 2


# --- the other backbone ---------------------------------------------------------------------------


@pytest.fixture(scope="module")
def qwen2_5(tmp_path_factory):
    """A random Qwen2.5-VL with the tiny backbone's tokenizer, as a checkpoint folder."""
    folder, tiny = tmp_path_factory.mktemp("qwen2_5"), AutoConfig.from_pretrained(TINY)
    text = dict(
        hidden_size=64, intermediate_size=96, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, vocab_size=tiny.text_config.vocab_size,
        rope_parameters={"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]},
    )  # fmt: skip
    vision = dict(
        depth=3, hidden_size=32, intermediate_size=48, num_heads=2, out_hidden_size=64,
        patch_size=14, window_size=56, fullatt_block_indexes=[1],
    )  # fmt: skip
    ids = ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id")
    ids = {name: getattr(tiny, name) for name in ids}
    config = Qwen2_5_VLConfig(text_config=text, vision_config=vision, **ids)
    common.seed_all(0)
    AutoModelForImageTextToText.from_config(config).save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(TINY / name, folder)
    settings = json.loads((TINY / "preprocessor_config.json").read_text())
    sizes = dict(min_pixels=28 * 28, max_pixels=112 * 112)
    size = {"shortest_edge": 28 * 28, "longest_edge": 112 * 112}
    settings |= {"patch_size": 14, "size": size, **sizes}
    (folder / "preprocessor_config.json").write_text(json.dumps(settings))
    return str(folder)


@pytest.mark.parametrize("brain", ["twin", "vanilla"])
def test_qwen2_5_trains_and_acts(qwen2_5, episodes, brain):
    case = Case(episodes, backbone=None, brain=brain, base=replace(SMALL, backbone=qwen2_5))
    assert case.model.right.config.model_type == "qwen2_5_vl"
    with pytest.raises(common.UserError, match="--no-deepstack"):
        Case(episodes, base=replace(SMALL, backbone=qwen2_5), deepstack=False)
    opts = twinbrain.make_optimizers(case.model, case.cfg)
    before = case.h_R()
    losses, grads = case.step(opts)
    assert np.isfinite(losses["action"]) and all(g is not None and g.any() for g in grads.values())
    assert not any(n.startswith("left.") for n in grads)
    assert not torch.equal(before, case.h_R())
    seen = [observation_of(e, 0) for e in episodes[:2]]
    chunks = case.policy.act(seen, [e.instruction for e in episodes[:2]], np.random.default_rng(0))
    assert chunks.shape == (2, 4, 7) and np.isfinite(chunks).all()
