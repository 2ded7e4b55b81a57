"""What no equation's test sees: who gets which rate, which words each brain reads, whose head and
whose place in the sequence count. Each of these, turned into its opposite, once went unnoticed."""

from dataclasses import replace

import numpy as np
import pytest
import test_dualvla
import test_twinbrain
import test_vita_vla
import torch
import torch.nn.functional as F

import common
import data
import dualvla
import twinbrain
import vita_vla  # noqa: F401, found by its name
from parts import instructvla, seer


def groups(make, model, cfg, monkeypatch):
    """-> {name of a weight: (peak, decay, whether Muon takes it)}."""
    rows = []
    monkeypatch.setattr(common, "optimizers", lambda cfg, given: rows.extend(given))
    make(model, cfg)
    names = {id(p): name for name, p in model.named_parameters()}
    return {names[id(p)]: (peak, decay, muon) for p, peak, decay, muon in rows}


RATES = dict(lr=0.1, lr_head=0.2, weight_decay=0.3)


@pytest.mark.parametrize("method", ["twinbrain", "vita_vla", "dualvla"])
def test_who_learns_at_which_rate(method, episodes, monkeypatch):
    tests = {"twinbrain": test_twinbrain, "vita_vla": test_vita_vla, "dualvla": test_dualvla}
    script, flags = globals()[method], {"brain": "nofreeze"} if method == "twinbrain" else {}
    case = tests[method].Case(episodes, **RATES, **flags)
    got = groups(script.make_optimizers, case.model, case.cfg, monkeypatch)
    assert set(got) == {n for n, p in case.model.named_parameters() if p.requires_grad}
    words = ("embed", "lm_head") + ("token", "latents") * (method == "vita_vla")
    for name, (peak, decay, muon) in got.items():
        vlm = name.startswith(("left.", "right.", "vlm."))
        assert peak == (0.1 if vlm else 0.2) and decay == 0.3, name
        matrix = dict(case.model.named_parameters())[name].dim() == 2
        assert muon == (matrix and not any(w in name for w in words)) or name == "queries", name
    assert {muon for _, _, muon in got.values()} == {True, False}
    if method == "vita_vla":
        case = tests[method].Case(episodes, stage="teacher", lr_teacher=0.7, **RATES)
        got = groups(script.make_optimizers, case.model, case.cfg, monkeypatch)
        assert {peak for peak, *_ in got.values()} == {0.7}


# --- TwinBrainVLA ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def twin(episodes):
    return test_twinbrain.Case(episodes, euler=3, dropout=0.5)


def test_each_brain_reads_its_own_words(twin):
    words = {side: twin.processor.words(twin.batch[side]["input_ids"][0]) for side in
             ("left", "right")}  # fmt: skip
    told = "You will be provided with observation", "Robot Type: tabletop"
    assert all(word in words["right"] and word not in words["left"] for word in told)
    assert twinbrain.SYSTEM_L in words["left"] and twinbrain.SYSTEM_R in words["right"]


def test_each_brain_embeds_with_its_own_table(episodes, monkeypatch):
    case, seen = test_twinbrain.Case(episodes), []
    with torch.no_grad():
        case.model.left.get_input_embeddings().weight.add_(1.0)
    look = case.model.look
    monkeypatch.setattr(case.model, "look", lambda vlm, x, *a: seen.append((vlm, x)) or
                        look(vlm, x, *a))  # fmt: skip
    case.h_R()
    for (vlm, x), side in zip(seen, ("left", "right"), strict=True):
        assert vlm is getattr(case.model, side)
        ids = case.batch[side]["input_ids"]
        want = vlm.get_input_embeddings()(ids)
        same = (x == want).all(-1) | (ids == case.processor.pad_token_id)
        assert same.all() and same.sum() > 20


def test_acting_is_eulers_way_from_the_noise_that_was_drawn(twin, episodes):
    e, model = episodes[0], twin.model
    seen = {"images": {name: frames[3] for name, frames in e.images.items()}, "state": e.state[3]}
    model.train()  # which acting ends: dropout would show
    plan = twin.policy.act([seen], [e.instruction], np.random.default_rng(5))
    a = torch.from_numpy(np.random.default_rng(5).standard_normal((1, 4, 7), np.float32))
    with torch.no_grad():
        batch = twin.policy.batch([seen], [e.instruction])
        h_R = model.think(batch)[0].last_hidden_state
        keys = model.expert.keys([h_R], batch["right"]["real"])
        for t in (0.0, 1 / 3, 2 / 3):
            a = a + model.expert(a[:, None], torch.full((1, 1), t), keys)[:, 0] / 3
    want = data.unnormalise(a.clamp(-1, 1).numpy(), twin.stats["action"])
    assert np.allclose(plan, want, atol=1e-5)


def test_co_training_weighs_the_answers(twin):
    losses = {"action": torch.tensor(1.0), "answer": torch.tensor(2.0)}
    assert float(twinbrain.total_loss(losses, replace(twin.cfg, cotrain=0.1))) == pytest.approx(1.2)


@pytest.mark.parametrize("script", [twinbrain, dualvla], ids=["twinbrain", "dualvla"])
def test_batches_of_a_step_share_its_draws(script):
    base = test_twinbrain.SMALL if script is twinbrain else test_dualvla.small()
    whole = script.draw_noise(replace(base, batch=4), 3, 7, test_twinbrain.ALONE)
    halves = replace(base, batch=2, accumulate=2)
    parts = [script.draw_noise(halves, 3, 7, test_twinbrain.ALONE, part) for part in range(2)]
    assert all(torch.equal(torch.cat(two), one) for two, one in zip(zip(*parts), whole))


def test_a_block_shifts_and_scales_what_it_reads():
    torch.manual_seed(0)
    block, x, time = twinbrain.Block(8, 2), torch.randn(1, 2, 3, 8), torch.randn(1, 2, 8)
    out = block(x, time)
    for draw in range(2):
        z = time[0, draw] * torch.sigmoid(time[0, draw])
        scale, shift = (block.modulate.weight @ z + block.modulate.bias).split(8)
        rows = F.layer_norm(x[0, draw], (8,)) * (1 + scale) + shift
        q, (k, v) = block.q(rows), block.kv(rows).split(8, dim=-1)
        heads = [
            (q[:, h] @ k[:, h].T / 2).softmax(-1) @ v[:, h] for h in (slice(0, 4), slice(4, 8))
        ]
        y = x[0, draw] + block.o(torch.cat(heads, dim=-1))
        y = y + block.down(F.gelu(block.up(F.layer_norm(y, (8,)))))
        assert torch.allclose(out[0, draw], y, atol=1e-5)


def test_future_tokens_are_each_one_of_its_own(twin):
    model, real = twin.model.eval(), twin.batch["right"]["real"]
    h, (x, t) = torch.randn(2, real.shape[1], 128), twin.noise
    keys = model.expert.keys([h], real)
    with torch.no_grad():
        model.expert.future.copy_(torch.randn_like(model.expert.future))
        before = model.expert(x, t, keys)
        model.expert.future.copy_(model.expert.future.mean(0).expand(2, -1))
        assert not torch.allclose(model.expert(x, t, keys), before, atol=1e-5)


def test_oft_reads_its_slots_in_order_and_learns_their_distance(episodes):
    case = test_twinbrain.Case(episodes, head="oft")
    slots, mask = case.batch["right"]["slots"], case.batch["mask"]
    with torch.no_grad():
        h = case.model.think(case.batch)[0].last_hidden_state
        out = case.model.expert(h, slots)
        error = (out - case.batch["action"]).abs().mean(-1)  # (B, H)
        want = torch.stack([row[inside].mean() for row, inside in zip(error, mask)]).mean()
        assert not mask.all()
        assert torch.allclose(case.model(case.batch)["action"], want, atol=1e-6)
        h[0, slots[1]] += torch.randn(h.shape[-1])
        moved = (case.model.expert(h, slots) != out).any(-1)
    assert moved.tolist() == [[False, True, False, False], [False] * 4]


# --- VITA-VLA -------------------------------------------------------------------------------------


def test_the_mapper_is_three_layers_with_gelu_between(episodes):
    model = test_vita_vla.Case(episodes).model
    x = torch.randn(5, model.action_token.shape[1])
    first, second, third = (layer for layer in model.mapper if hasattr(layer, "weight"))
    gelu = lambda z: z * (1 + torch.erf(z / 2**0.5)) / 2  # noqa: E731
    assert torch.allclose(model.mapper(x), third(gelu(second(gelu(first(x))))), atol=1e-6)
    words = model.vlm.language.get_input_embeddings().weight
    assert 0.7 < float((model.action_token.std() / words.std()).detach()) < 1.4  # at home there


def test_a_decoder_as_mapper_is_causal():
    torch.manual_seed(0)
    mapper, h = seer.DecoderMapper(16, 64), torch.randn(2, 1, 3, 16)
    before = mapper(h)
    h[:, :, 2] += torch.randn(16)
    assert torch.allclose(mapper(h)[:, :, :2], before[:, :, :2], atol=1e-6)
    assert not torch.allclose(mapper(h)[:, :, 2], before[:, :, 2], atol=1e-3)


def test_the_teacher_learns_by_its_own_loss_whatever_the_students_is(episodes):
    losses = [
        test_vita_vla.Case(episodes, stage="teacher", arm_loss=how).step()[0]
        for how in ("mae", "smooth")
    ]
    assert losses[0] == losses[1]


# --- DualVLA --------------------------------------------------------------------------------------


def test_times_of_the_flow_follow_the_beta_distribution():
    cfg = replace(test_dualvla.small(), batch=4000, repeats=4)
    _, t = dualvla.draw_noise(cfg, 0, 1, test_dualvla.ALONE)
    assert 0 <= t.min() and t.max() <= 0.999
    for place in (0.1, 0.3, 0.6, 0.9):  # b ~ Beta(1.5, 1): P(t <= 0.999 p) = 1 - (1 - p)^1.5
        share = float((t <= 0.999 * place).float().mean())
        assert share == pytest.approx(1 - (1 - place) ** 1.5, abs=0.02)


@pytest.fixture(scope="module")
def dual(episodes):
    return test_dualvla.Case(episodes, kd_weight=0.5, euler=3)


def test_the_flow_expert_reads_the_queries_states(dual):
    model, robot = dual.model, dual.batch["robot"]
    h = torch.randn(*robot["prompt"]["input_ids"].shape, 128)
    with torch.no_grad():
        keys = model.keys(h, robot)
        for place, same in ((0, True), (-5, True), (-4, False), (-1, False)):  # four queries
            other = h.clone()
            other[:, place] += 1.0
            pairs = zip(keys, model.keys(other, robot))
            assert all(torch.equal(a[0], b[0]) for a, b in pairs) == same, place


def test_the_eye_is_modulated_by_the_mean_query_and_actions_by_the_time(dual, monkeypatch):
    flow, robot, seen = dual.model.flow, dual.batch["robot"], []
    latents = torch.randn(len(robot["state"]), 4, 128)
    look = flow.eye.forward
    monkeypatch.setattr(flow.eye, "forward", lambda v, z: seen.append(z) or look(v, z))
    with torch.no_grad():
        keys = flow.prefix(latents, robot["views"], robot["state"])
        assert torch.allclose(seen[0], sum(latents.unbind(1)) / 4, atol=1e-6)
        x, t = dual.noise
        assert not torch.allclose(flow(x, t, keys), flow(x, 0.9 * t, keys), atol=1e-5)


def test_answers_are_learned_where_they_stand(dual):
    asked, model = dual.batch["questions"], dual.model
    with torch.no_grad():
        loss = model(dual.batch, dual.noise)["answer"]
        logits = model.vlm.lm_head(model.read(asked["prompt"], asked)).double()
    ids, labels, found = asked["prompt"]["input_ids"], asked["prompt"]["labels"], []
    for b, t in (labels >= 0).nonzero().tolist():
        assert labels[b, t] == ids[b, t]
        found.append(-logits[b, t - 1].log_softmax(-1)[ids[b, t]])
    assert float(loss) == pytest.approx(float(sum(found) / len(found)), abs=1e-4)


def test_lambda_weighs_what_the_teachers_say(dual):
    losses = dict(zip(("text", "action", "kd_action", "kd_reason"), torch.tensor([1.0, 2, 4, 8])))
    assert float(dualvla.total_loss(losses, dual.cfg)) == 1 + 2 + 0.5 * (4 + 8)


def test_each_teacher_speaks_for_itself_and_to_the_students_head(episodes, monkeypatch):
    cases = [test_dualvla.Case(episodes, stage, seed, actions="tokens")
             for seed, stage in enumerate(("dual", "expert", "generalist"), 1)]  # fmt: skip
    student, expert, generalist = (case.model for case in cases)
    case, given = cases[0], []
    with torch.no_grad():
        soft = dualvla.teach((expert, generalist), case.batch, case.noise)
        for name, teacher in (("action", expert), ("reason", generalist)):
            assert soft[name][1] is teacher.vlm.lm_head.weight
            other = {"action": generalist, "reason": expert}[name]
            kept = [p.clone() for p in other.parameters()]
            [p.add_(0.1 * torch.randn_like(p)) for p in other.parameters()]
            again = dualvla.teach((expert, generalist), case.batch, case.noise)
            assert torch.equal(again[name][0], soft[name][0])
            [p.copy_(old) for p, old in zip(other.parameters(), kept)]
        kl = common.linear_kl
        monkeypatch.setattr(common, "linear_kl", lambda h, head, *a: given.append((head, *a)) or
                            kl(h, head, *a))  # fmt: skip
        student(case.batch, case.noise, soft)
    for (head, _, theirs, _), teacher in zip(given, (expert, generalist), strict=True):
        assert head is student.vlm.lm_head.weight and theirs is teacher.vlm.lm_head.weight


def test_gates_share_two(dual):
    case = dual
    with torch.no_grad():
        case.model.read(case.batch["robot"]["prompt"], case.batch["robot"])
    now = case.model.gates.now
    assert torch.allclose(now.sum(-1), torch.full(now.shape[:-1], 2.0), atol=1e-5)
    assert (now != 1).any()


def test_acting_after_no_word_is_acting_at_once(dual):
    """The queries behind a prompt, read after it or with it; and Euler's way from there."""
    cfg, model = dual.cfg, dual.model
    samples = [{k: v for k, v in s.items() if k not in ("action", "mask")} for s in dual.robot]
    within = dualvla.sense(samples, cfg, dual.processor, "plain")
    names, processor = ("input_ids", "real", "position_ids"), dual.processor
    prompt = {name: within["prompt"][name][..., : -cfg.queries] for name in names}
    prompt |= processor.find(prompt, pictures=processor.image_token_id)
    behind = within | {"prompt": prompt}
    x_0 = torch.randn(len(samples), cfg.horizon, 7)
    late, said = model.act(behind, x_0, "reason", 0)
    once, _ = model.act(within, x_0, "plain", 0)
    assert said == [[]] * len(samples) and torch.allclose(late, once, atol=1e-4)
    with torch.no_grad():
        keys, x = model.keys(model.read(within["prompt"], within), within), x_0
        for t in (0.0, 1 / 3, 2 / 3):
            x = x + model.flow(x[:, None], torch.full((len(x), 1), t), keys)[:, 0] / 3
    assert torch.allclose(once, x, atol=1e-5)
    assert dual.policy.form == "reason"  # who learned to is asked to


def test_how_open_a_hand_is_does_not_accelerate(episodes):
    e = replace(episodes[0], state=episodes[0].state.copy())
    want = dualvla.action_labels(e)
    open_, some = e.state[:, -1] > 0.5, 0.4 * np.random.default_rng(0).random(len(e.state))
    e.state[:, -1] = np.where(open_, 1 - some, some)
    assert np.array_equal(dualvla.action_labels(e), want) and want.any() and not want.all()


def test_a_pruned_move_is_not_named_and_a_kept_one_is_its_steps(episodes, monkeypatch):
    cfg = test_dualvla.small(reason=0.0, motion=1.0)
    stats = data.statistics(episodes)
    named = [[f"{e}, {t}" for t in range(len(ep.action))] for e, ep in enumerate(episodes)]
    paths = {id(ep): e for e, ep in enumerate(episodes)}
    monkeypatch.setattr(dualvla.events, "hand", lambda ep: paths[id(ep)])
    monkeypatch.setattr(dualvla.events, "move_name", lambda path, t: named[path][t])
    for kept in (True, False):
        keeps = [np.full(len(e.action), kept) for e in episodes]
        samples = dualvla.Samples(episodes, stats, cfg, keeps)
        at = int(samples.starts[1]) + 5
        got = samples.get(at, np.random.default_rng(0))
        assert (got["form"], got["said"]) == ("motion", "1, 5" if kept else "")


def test_pruning_at_random_is_the_seeds(episodes):
    cfg = test_dualvla.small(prune="random")
    first, again = (dualvla.keep_labels(episodes, cfg) for _ in range(2))
    assert all(np.array_equal(a, b) for a, b in zip(first, again))
    other = dualvla.keep_labels(episodes, replace(cfg, seed=7))
    assert any(not np.array_equal(a, b) for a, b in zip(first, other))


def test_bins_of_words_are_equally_wide():
    action = np.linspace(-1, 1, 257)[:-1] + 1 / 256  # their middles
    assert instructvla.to_tokens(action[:, None], 0) == tuple(range(256))
