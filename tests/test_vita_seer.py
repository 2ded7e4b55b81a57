"""parts/seer.py: what of a released Seer is not in its file, and what its pre-training asks for."""

import copy
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import save_file
from test_vita_vla import ALONE, SEER, SMALL, Case, PictureStub, drawn, saved

import common
import data
import vita_vla
from parts import formats, seer
from vita_vla import Config, Histories, Seer, sense

# --- its eyes -------------------------------------------------------------------------------------


def small_mae():
    common.seed_all(0)
    return transformers.ViTMAEModel(transformers.ViTMAEConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=48,
        image_size=48, patch_size=16,
    ))  # fmt: skip


def as_timm(model):
    """Its weights by the names of mae_pretrain_vit_base.pth, which timm has kept."""
    out = {}
    for name, value in model.state_dict().items():
        name = name.replace("embeddings.patch_embeddings.projection", "patch_embed.proj")
        name = name.replace("embeddings.position_embeddings", "pos_embed")
        name = name.replace("embeddings.cls_token", "cls_token").replace("layers.", "blocks.")
        name = name.replace("layernorm_before", "norm1").replace("layernorm_after", "norm2")
        name = name.replace("layernorm.", "norm.").replace("attention.o_proj", "attn.proj")
        name = name.replace("attention.q_proj", "attn.qkv")
        if "attention." in name:  # k and v come after q
            part = name.replace("k_proj", "qkv").replace("v_proj", "qkv")
            part = part.replace("attention", "attn")
            out[part] = torch.cat([out[part], value])
        else:
            out[name] = value
    return {name: value.contiguous() for name, value in out.items()}


def test_mae_is_read_as_its_authors_released_it(tmp_path):
    model, blank = small_mae(), small_mae()
    with torch.no_grad():
        for p in model.parameters():
            p += 0.1 * torch.randn_like(p)
    tensors = as_timm(model)
    assert tensors["blocks.1.attn.qkv.weight"].shape == (96, 32) and "norm.bias" in tensors
    save_file(tensors, tmp_path / "mae.safetensors")
    got, want = seer.load_mae(tmp_path / "mae.safetensors", blank).state_dict(), model.state_dict()
    assert got.keys() == want.keys() and all(torch.equal(got[n], want[n]) for n in want)


@pytest.mark.parametrize("change", ["decoder", "less", "wider"])
def test_another_vision_transformer_is_not_taken_for_it(change, tmp_path):
    tensors = as_timm(small_mae())
    if change == "decoder":  # as in the weights made to draw pictures
        tensors["decoder_embed.weight"] = torch.zeros(2, 2)
    elif change == "less":
        del tensors["norm.bias"]
    else:
        tensors["cls_token"] = torch.zeros(1, 1, 64)
    save_file(tensors, tmp_path / "mae.safetensors")
    with pytest.raises(common.UserError, match="mae.safetensors is not MAE's ViT-B/16: .* not fit"):
        seer.load_mae(tmp_path / "mae.safetensors", small_mae())


def test_the_mae_that_is_asked_for(monkeypatch):
    """Not facebook/vit-mae-base: its pixels were not normalised, and its features are others."""
    asked = []

    def unreachable(name, file):
        asked.append(name)
        raise OSError("no network")

    monkeypatch.setattr(seer, "hf_hub_download", unreachable)
    with pytest.raises(common.UserError, match="hf download timm/vit_base_patch16_224.mae"):
        seer.paper_eyes()
    assert asked == ["timm/vit_base_patch16_224.mae"]


# --- its units ------------------------------------------------------------------------------------


def test_liberos_seer_says_closed_where_calvins_says_open(tmp_path):
    path, h = saved(tmp_path / "seer.pth", drawn()), torch.randn(2, 3, 32)
    said = {}
    for name in ("calvin", "libero"):
        model = Seer(SEER, PictureStub()).eval()
        seer.load_seer(model, path, name)
        with torch.no_grad():
            said[name] = seer.decode(model, h)
    assert torch.equal(said["calvin"][0], said["libero"][0])
    assert torch.allclose(said["calvin"][1], -said["libero"][1], atol=1e-6)
    recorded = np.array([-1, 1])
    label = (recorded + 1) // 2  # Seer's
    calvin, libero = ((1 + float(reader.gripper) * recorded) / 2  # ours, as recordings are read
                      for reader in (formats.Calvin, formats.Libero))  # fmt: skip
    assert (calvin == label).all() and (libero == 1 - label).all()


def test_liberos_seer_sees_as_the_renderer_draws():
    images = np.random.default_rng(0).integers(0, 256, (2, 64, 64, 3), np.uint8)
    turned = seer.clip_pixels(images[:, ::-1, ::-1].copy())
    assert np.allclose(seer.clip_pixels(images, "libero"), turned, atol=0.02)
    assert not np.allclose(seer.clip_pixels(images), turned, atol=0.02)


def test_actions_stay_as_recorded(episodes):
    """--normalise raw: what the decoder says is what the arm does, and 1 or 0 is the gripper's."""
    case = Case(episodes, stage="teacher")
    case.stats = copy.deepcopy(case.stats)
    gripper = [case.stats["action"][key][-1] for key in ("min", "max")]
    seer.as_recorded({"tabletop": case.stats})
    low, high = data.bounds(case.stats["action"])
    assert (low[:-1] == -1).all() and (high[:-1] == 1).all() and [low[-1], high[-1]] == gripper
    assert np.allclose(data.normalise(episodes[0].action, case.stats["action"])[:, :-1],
                       episodes[0].action[:, :-1], atol=1e-6)  # fmt: skip
    images = {name: frames[0] for name, frames in episodes[0].images.items()}
    seen = {"images": images, "state": episodes[0].state[0], "memory": {}}
    policy = case.policy()
    plan = policy.act([seen], [episodes[0].instruction], None)[0, 0]
    sample = policy.remember(seen | {"memory": {}}, episodes[0].instruction)
    with torch.no_grad():
        h = case.hidden(sense([sample], case.cfg, case.processor))
        arm, logit = seer.decode(case.model, h)
    assert np.allclose(plan[:-1], arm[0, 0, 0], atol=1e-5)
    assert plan[-1] == gripper[int(logit[0, 0, 0] > 0)]


def test_recordings_in_other_units_are_not_taken_as_they_are():
    many = {"min": [-3.0, 0.0], "max": [0.5, 1.0], "q01": [0, 0], "q99": [0, 0]}
    with pytest.raises(common.UserError, match="raw: metres has actions of 3, beyond 1"):
        seer.as_recorded({"metres": {"action": many, "state": dict(many)}})


def test_recordings_of_another_shape_are_refused(episodes):
    stats = data.statistics(episodes) | {"cameras": ["front"]}
    one = SimpleNamespace(name="mine", episodes=episodes, stats=stats)
    with pytest.raises(common.UserError, match="mine: VITA-VLA reads a static and a wrist camera"):
        seer.check_recordings([one])


@pytest.mark.parametrize("gripper", [[1.0] * 400, [0.0] * 400, [1.0] * 399 + [0.0]], ids=len)
def test_a_hand_that_hardly_ever_moves_is_open_or_closed_as_it_is(episodes, gripper):
    T = len(gripper)
    action = np.zeros((T, 7), np.float32)
    action[:, -1], still = gripper, {n: v[:1].repeat(T, 0) for n, v in episodes[0].images.items()}
    episode = replace(episodes[0], images=still, action=action, state=np.zeros((T, 8), np.float32))
    stats = data.statistics([episode])
    seer.open_and_closed(stats["action"])
    said = Histories([episode], stats, SMALL).get(0, np.random.default_rng(0))["action"][..., -1]
    assert ((said > 0) == (gripper[0] > 0.5)).all()  # the label of the gripper's loss
    executed = data.unnormalise(np.array([[0.0] * 6 + [1.0], [0.0] * 6 + [-1.0]]), stats["action"])
    assert executed[:, -1].tolist() == [1.0, 0.0]


def test_a_released_seer_reads_the_states_of_all_recordings_alike():
    """Its first layer takes one pair of bounds, so a pose has one number in all of them."""

    def recorded(low, high):
        state = {"min": [low] * 8, "max": [high] * 8, "q01": [low] * 8, "q99": [high] * 8}
        action = {"min": [-1.0] * 6 + [0.0], "max": [1.0] * 7, "q01": [-1.0] * 7, "q99": [1.0] * 7}
        return {"state": state, "action": action}

    robots = {"spatial": recorded(-1.0, 0.5), "long": recorded(-0.2, 3.0)}
    seer.as_recorded(robots)
    pose = np.linspace(-0.1, 0.4, 8)
    one, two = (data.normalise(pose, stats["state"]) for stats in robots.values())
    assert np.allclose(one, two) and np.allclose(one, (pose + 1) / 2 - 1)


def test_the_papers_presets_have_the_released_units():
    for preset, where in (("calvin", "calvin"), ("libero", "libero")):
        cfg = common.parse(Config, vita_vla.PRESETS, {}, ["--preset", preset])
        assert (cfg.normalise, cfg.released) == ("raw", where)
        vita_vla.check(replace(cfg, stage="align", teacher="seer.pth"))
        with pytest.raises(common.UserError, match="seer.pth speaks of actions as recorded"):
            vita_vla.check(replace(cfg, stage="align", teacher="seer.pth", normalise="auto"))


# --- its pre-training -----------------------------------------------------------------------------


def test_with_a_goal_only_steps_whose_goal_is_in_the_window_count(episodes):
    """Seer's labels end `atten_goal` steps before its window does."""
    case = Case(episodes, stage="teacher", goal=1, foresight_steps=1)
    T, (first, last, short) = len(episodes[1].action), case.samples
    assert first["mask"].tolist() == [[True] * 3, [True] * 3, [False] * 3]
    assert not last["mask"][2].any() and last["mask"][0].all() and short["mask"][:1].all()
    cameras, episode = list(episodes[1].images.values()), int(case.windows.starts[1])
    sample = case.windows.get(episode + 2, np.random.default_rng(0))  # steps 2, 3, 4
    assert len(sample["ahead"]) == 1 and T > 6
    assert np.array_equal(sample["ahead"][0][0], cameras[0][3 + 3])  # of step 3, N on
    case.samples[2] = case.samples[0]
    foresees = sense(case.samples, case.cfg, case.processor)["foresees"]
    assert foresees.tolist() == [1, 4, 7]  # of three samples with three steps each, the middle one
    brief = replace(episodes[0], action=episodes[0].action[:1], state=episodes[0].state[:1])
    windows = Histories([brief, episodes[1]], case.stats, replace(SMALL, goal=1))
    assert len(windows) == T - 2 and windows.get(0, np.random.default_rng(0))["mask"][0].all()


# --- in stage 1 -----------------------------------------------------------------------------------


def test_a_teacher_is_stored_as_frozen_says_and_hands_over_its_decoder_whole(episodes):
    teacher, student = Case(episodes, stage="teacher"), Case(episodes, stage="align")
    teacher.model.robots = {"tabletop": teacher.stats}
    decoder = {n: t.clone() for n, t in teacher.model.state_dict().items() if "action_decoder" in n}
    before = teacher.hidden(dict(teacher.batch))
    model = teacher.model.requires_grad_(False)
    cfg = replace(student.cfg, frozen="bf16", dtype="bf16", teacher="run")
    vita_vla.introduce(model, student.model, teacher.model.robots, cfg, None, ALONE.device)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    ours = student.model.state_dict()
    assert all(torch.equal(ours[n], t) for n, t in decoder.items())
    with common.autocast(ALONE.device, "bf16"):
        after = teacher.hidden(dict(teacher.batch)).float()
    assert (after - before).norm() < 0.1 * before.norm()
