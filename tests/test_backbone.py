"""common.py: backbones, pixels, positions and attention against the library's; action tokens.

Both families are checked on small random checkpoints that the library itself has saved, with the
tokenizer of the embedded backbone.
"""

import copy
import json
import math
import shutil
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers import AutoConfig, AutoModelForImageTextToText, AutoTokenizer
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

import common
from parts import backbones, kernels

SIZES = dict(depth=3, hidden_size=32, intermediate_size=48, num_heads=2, patch_size=8,
             out_hidden_size=32, spatial_merge_size=2, temporal_patch_size=2)  # fmt: skip
VISION = {
    "qwen2_5_vl": SIZES | dict(window_size=32, fullatt_block_indexes=[1]),  # 2 x 2 tokens a window
    "qwen3_vl": SIZES | dict(num_position_embeddings=64, deepstack_visual_indexes=[1]),
}
CLIP = dict(image_mean=[0.48145466, 0.4578275, 0.40821073],
            image_std=[0.26862954, 0.26130258, 0.27577711])  # fmt: skip
HALF = dict(image_mean=[0.5] * 3, image_std=[0.5] * 3)


GRAIN = dict(patch_size=8, merge_size=2, temporal_patch_size=2)
PIXELS = {  # each family's way of writing its limits
    "qwen2_5_vl": GRAIN | CLIP | dict(min_pixels=768, max_pixels=8192),
    "qwen3_vl": GRAIN | HALF | dict(size=dict(shortest_edge=768, longest_edge=8192)),
}


@dataclass
class Case:
    folder: Path
    saved: torch.nn.Module  # as the library made it
    vlm: torch.nn.Module  # as load_backbone returns it
    processor: backbones.Processor


def make_folder(family, folder):
    """A random checkpoint, saved by the library, beside the files that the hub holds."""
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(Path(common.BACKBONES["tiny"]) / name, folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    rope = dict(rope_type="default", rope_theta=1e4, mrope_section=[2, 1, 1])
    text = dict(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, head_dim=8, rope_parameters=rope,
        bos_token_id=0, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    marks = ("image_token", "<|image_pad|>"), ("video_token", "<|video_pad|>")
    ids = {f"{name}_id": tokenizer.convert_tokens_to_ids(mark) for name, mark in marks}
    config = AutoConfig.for_model(family, text_config=text, vision_config=VISION[family], **ids)
    torch.manual_seed(0)
    model = AutoModelForImageTextToText.from_config(config).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(json.dumps(PIXELS[family]))
    return model


@pytest.fixture(scope="module", params=list(VISION))
def case(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    saved = make_folder(request.param, folder)
    return Case(folder, saved, *common.load_backbone(str(folder)))


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(common.BACKBONES["tiny"])


def pictures(*sizes):
    rng = np.random.default_rng(0)
    return [rng.integers(0, 256, (*size, 3), np.uint8) for size in sizes]


# --- loading --------------------------------------------------------------------------------------


def test_a_backbone_is_the_librarys_own(case, capfd):
    vlm, processor = common.load_backbone(str(case.folder))
    assert "Loading weights" not in "".join(capfd.readouterr())
    assert type(vlm) is type(case.saved) and not vlm.training
    saved = case.saved.state_dict()
    assert all(torch.equal(saved[name], tensor) for name, tensor in vlm.state_dict().items())
    assert (processor.patch, processor.merge, processor.temporal) == (8, 2, 2)
    assert (processor.min_pixels, processor.max_pixels) == (768, 8192)
    assert processor.tokenizer.decode([processor.image_token_id]) == "<|image_pad|>"


def test_shards_in_bfloat16_are_one_model(case, tmp_path):
    folder = shutil.copytree(case.folder, tmp_path / "copy")
    (folder / "model.safetensors").unlink()
    saved = copy.deepcopy(case.saved).bfloat16()
    saved.save_pretrained(folder, max_shard_size="100KB")
    assert len(list(folder.glob("model-*.safetensors"))) > 1
    for dtype, frozen in ((torch.bfloat16, "bf16"), (torch.float32, "fp32")):
        vlm, _ = common.load_backbone(str(folder), frozen)
        for name, tensor in vlm.state_dict().items():
            assert tensor.dtype == dtype and torch.equal(tensor, saved.state_dict()[name].to(dtype))


def test_a_wrong_backbone_is_one_line(tmp_path):
    def error(name):
        with pytest.raises(common.UserError) as caught:
            common.load_backbone(name)
        assert "\n" not in str(caught.value)
        return str(caught.value)

    assert "unknown --backbone tinny: did you mean tiny? (tiny, Qwen" in error("tinny")
    assert "unknown --backbone Qwen3-VL-4: did you mean Qwen3-VL-4B?" in error("Qwen3-VL-4")
    assert "unknown --backbone ./no/where: did you mean " in error("./no/where")
    assert "config.json" in error(str(tmp_path))
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    assert error(str(tmp_path)).endswith("is a bert: take a Qwen3-VL, a Qwen2.5-VL or an Eagle2")
    (tmp_path / "config.json").write_text('{"model_type": ')
    assert "cannot load" in error(str(tmp_path))


def test_a_damaged_weight_file_is_named(case, tmp_path):
    folder = shutil.copytree(case.folder, tmp_path / "copy")
    file = folder / "model.safetensors"
    shutil.copy(file, folder / "whole.safetensors")
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    want = f"--backbone {folder}: {file} is damaged or cut short, fetch it again"
    for ask in (backbones.check_weights, common.load_backbone):
        with pytest.raises(common.UserError) as caught:
            ask(str(folder))
        assert str(caught.value) == want
    shutil.move(folder / "whole.safetensors", file)
    backbones.check_weights(str(folder))


def test_a_folder_that_was_not_fetched_whole_is_told_of(case, tmp_path):
    folder = shutil.copytree(case.folder, tmp_path / "copy")
    index = folder / "model.safetensors.index.json"
    for there, said in (
        ({"weight_map": {"a": "model.safetensors", "b": "more.safetensors"}}, "lacks more.safete"),
        ({}, "cannot load .*weight_map"),
    ):
        index.write_text(json.dumps(there))
        with pytest.raises(common.UserError, match=said):
            backbones.check_weights(str(folder))
    index.unlink()
    (folder / "model.safetensors").unlink()
    with pytest.raises(common.UserError, match="it has no [*].safetensors"):
        backbones.check_weights(str(folder))


# --- prompts and positions ------------------------------------------------------------------------


@pytest.mark.parametrize("system", ["", "You are a robot."])
def test_a_prompt_is_the_chat_templates(case, system):
    grids, tokenizer = ((1, 4, 6), (1, 2, 2)), case.processor.tokenizer
    ids, answer = case.processor.prompt(system, "\nInstruction: go", grids, "red block")
    content = [{"type": "image"}, {"type": "image"}, {"type": "text", "text": "\nInstruction: go"}]
    chat = [{"role": "system", "content": [{"type": "text", "text": system}]}] if system else []
    chat.append({"role": "user", "content": content})
    want, tokens = [], iter([6, 1])  # 4 x 6 patches are 2 x 3 tokens
    for token in tokenizer.apply_chat_template(chat, add_generation_prompt=True)["input_ids"]:
        want += [token] * (next(tokens) if token == case.processor.image_token_id else 1)
    assert list(ids) == want and want.count(case.processor.image_token_id) == 7
    assert tokenizer.decode(answer) == "red block" + tokenizer.eos_token
    assert case.processor.prompt(system, "\nInstruction: go", grids) == (ids, ())
    words = case.processor.words([case.processor.pad_token_id, *ids])
    assert words.count("<image>") == 2 and "<|image_pad|>" not in words
    assert words.endswith("go<|im_end|>\n<|im_start|>assistant\n")


def test_positions_of_a_picture_between_words():
    ids, t = [5, 9, 9, 9, 9, 9, 9, 5, 5, 9, 5], 9
    got = common.mrope_positions(ids, [(1, 4, 6), (1, 2, 2)], image_token_id=t)
    assert got.tolist() == [
        [0, 1, 1, 1, 1, 1, 1, 4, 5, 6, 7],  # time
        [0, 1, 1, 1, 2, 2, 2, 4, 5, 6, 7],  # row
        [0, 1, 2, 3, 1, 2, 3, 4, 5, 6, 7],  # column
    ]
    assert common.mrope_positions([5, 5], [], 9).tolist() == [[0, 1]] * 3


def batch_of(processor):
    """Two prompts of different length, the first with two pictures -> both, batch, pixels, grids"""
    first, one = processor.images(pictures((48, 64), (32, 32)))
    second, two = processor.images(pictures((64, 40)))
    rows = [processor.prompt("Be brief.", "Question: red", one, "blue")[0]]
    rows += [processor.prompt("", "Question: what is the colour of the cup", two)[0]]
    pixels = torch.from_numpy(np.concatenate([first, second]))
    return rows, processor.pad(rows, [one, two]), pixels, torch.tensor([*one, *two])


def test_positions_and_padding_are_the_librarys(case):
    rows, batch, _, grids = batch_of(case.processor)
    ids, real = batch["input_ids"], batch["real"]
    kinds = (ids == case.processor.image_token_id).int()
    want, _ = case.saved.model.get_rope_index(ids, kinds, grids, attention_mask=real.int())
    assert torch.equal(batch["position_ids"], want)
    assert real.sum(1).tolist() == [len(row) for row in rows] and real.all(0)[-1]
    assert all(tuple(i[r].tolist()) == row for i, r, row in zip(ids, real, rows))
    assert (ids[~real] == case.processor.pad_token_id).all() and not real.all()


def test_a_padded_batch_gives_each_prompt_the_librarys_logits(case):
    rows, batch, pixels, grids = batch_of(case.processor)
    with torch.no_grad():
        ours = case.vlm(
            input_ids=batch["input_ids"],
            position_ids=batch["position_ids"],
            attention_mask=common.causal_mask(batch["real"]),
            pixel_values=pixels,
            image_grid_thw=grids,
        ).logits
        first = grids[:2].prod(1).sum()  # patches of the first prompt
        parts = (pixels[:first], grids[:2]), (pixels[first:], grids[2:])
        for logits, row, (pixel, grid) in zip(ours, rows, parts):
            ids = torch.tensor([row])
            kinds = (ids == case.processor.image_token_id).int()
            inputs = dict(pixel_values=pixel, image_grid_thw=grid, mm_token_type_ids=kinds)
            want = case.saved(input_ids=ids, **inputs).logits[0]
            torch.testing.assert_close(logits[-len(row) :], want, atol=1e-4, rtol=1e-3)


# --- pixels ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("patch, colours, least, most", [
    (8, HALF, 1024, 65536), (14, CLIP, 3136, 100_000), (16, HALF, 65536, 16777216),
])  # fmt: skip
def test_pixels_are_the_librarys(patch, colours, least, most):
    size = {"shortest_edge": least, "longest_edge": most}
    library = Qwen2VLImageProcessorPil(patch_size=patch, size=size, **colours)
    mean, std = colours.values()
    for shape in [(64, 64), (32, 32), (50, 90), (17, 200), (300, 401), (224, 224), (9, 7)]:
        (image,) = pictures(shape)
        want = library(image, return_tensors="np", input_data_format="channels_last")
        fitted = backbones.fit(image, patch, 2, least, most)
        got = common.patchify(fitted, patch, 2, 2, mean, std)
        assert want["image_grid_thw"].tolist() == [[1, *(s // patch for s in fitted.shape[:2])]]
        assert got.dtype == np.float32 and np.array_equal(got, want["pixel_values"]), shape


def test_processor_images_equal_the_librarys(case):
    images = pictures((48, 64), (100, 30), (10, 10))
    library = Qwen2VLImageProcessorPil.from_pretrained(case.folder)
    want = library(images, return_tensors="np")
    got, grids = case.processor.images(images)
    assert np.array_equal(got, want["pixel_values"])
    assert [list(grid) for grid in grids] == want["image_grid_thw"].tolist()


# --- attention ------------------------------------------------------------------------------------


def test_pictures_attended_at_once_equal_one_after_the_other(case):
    pixels, grids = case.processor.images(pictures((48, 64), (32, 32), (48, 64), (80, 32)))
    results = []
    for vlm in (case.saved, case.vlm):  # the library's loop, ours
        vlm.zero_grad()
        out = vlm.model.visual(torch.from_numpy(pixels), grid_thw=torch.tensor(grids))
        out.pooler_output.square().mean().backward()
        grads = [p.grad for p in vlm.model.visual.blocks.parameters()]
        results.append([out.pooler_output, out.last_hidden_state, *grads])
    assert case.vlm.model.visual.config._attn_implementation == "flash_blocks"
    assert case.saved.model.visual.config._attn_implementation == "sdpa"
    for theirs, ours in zip(*results):
        assert theirs.abs().max() > 0
        torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-3)


def test_the_lengths_of_pictures_are_found_once_for_all_layers(case, monkeypatch):
    """A GPU waits there; a tower of the older family has windows as well as pictures."""
    pixels, grids = case.processor.images(pictures((48, 64), (32, 32)))
    found, tolist = [], torch.Tensor.tolist
    unique = torch.Tensor.unique
    monkeypatch.setattr(torch.Tensor, "unique", lambda x: found.append(tolist(x)) or unique(x))
    case.vlm.model.visual(torch.from_numpy(pixels), grid_thw=torch.tensor(grids))
    kinds = {"qwen2_5_vl": 2, "qwen3_vl": 1}[case.vlm.config.model_type]
    assert len(found) == kinds and len(case.vlm.model.visual.blocks) == 3


def test_attend_is_softmax_attention():
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, 3, n, 8, requires_grad=True) for n in (4, 6, 6))
    mask = torch.rand(2, 1, 4, 6) < 0.6
    mask[..., 0] = True
    for m, scale in ((None, None), (mask, None), (mask, 0.7)):
        ours = common.attend(q, k, v, m, scale)
        want = scaled_dot_product_attention(q, k, v, attn_mask=m, scale=scale)
        torch.testing.assert_close(ours, want)
        pairs = (torch.autograd.grad(out.square().sum(), (q, k, v)) for out in (ours, want))
        for mine, theirs in zip(*pairs):
            torch.testing.assert_close(mine, theirs, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("dtype, lowered, fused", [
    (torch.float32, False, True), (torch.float32, True, False), (torch.bfloat16, False, False),
])  # fmt: skip
def test_bfloat16_on_a_cpu_is_attended_in_products(dtype, lowered, fused, monkeypatch):
    """Under autocast too, where queries come as float32 from their norm."""
    calls = []
    library = scaled_dot_product_attention
    monkeypatch.setattr(kernels, "scaled_dot_product_attention",
                        lambda *a, **b: calls.append(a) or library(*a, **b))  # fmt: skip
    q, k = torch.randn(2, 4, 5, 8, dtype=dtype), torch.randn(2, 2, 7, 8, dtype=dtype)
    with torch.autocast("cpu", torch.bfloat16, enabled=lowered):
        y = common.attend(q, k, k)
    assert bool(calls) == fused
    want = library(q.float(), k.float(), k.float(), enable_gqa=True)
    torch.testing.assert_close(y.float(), want, atol=0.03, rtol=0.03)


def test_causal_mask_of_padded_prompts():
    real = torch.tensor([[False, False, True, True, True], [True, True, True, False, False]])
    masks = common.causal_mask(real)
    pictures = [[" ".join(".x"[int(sees)] for sees in row) for row in mask] for mask in masks[:, 0]]
    assert [f"{left}    {right}" for left, right in zip(*pictures)] == [
        "x . . . .    x . . . .",  # padding sees itself alone
        ". x . . .    x x . . .",
        ". . x . .    x x x . .",
        ". . x x .    . . . x .",
        ". . x x x    . . . . x",
    ]


def test_to_device_reaches_every_tensor():
    batch = {"a": torch.ones(2), "b": {"c": torch.ones(1), "d": "word"}}
    moved = common.to_device(batch, torch.device("meta"))
    assert moved["a"].is_meta and moved["b"]["c"].is_meta and moved["b"]["d"] == "word"


# --- action tokens --------------------------------------------------------------------------------


def chunks(count, H, A):
    """Smooth random motions in [-1, 1]."""
    rng = np.random.default_rng(0)
    steps = rng.normal(0, 0.3, (count, H, A)).cumsum(1)
    return list(np.clip(steps, -1, 1).astype(np.float32))


@pytest.mark.parametrize("H", [1, 5, 8])
def test_cosines_are_the_discrete_cosine_transform(H):
    x = np.random.default_rng(0).normal(size=H)
    want = np.zeros(H)
    for k in range(H):
        for n in range(H):
            want[k] += x[n] * math.cos(math.pi * k * (2 * n + 1) / (2 * H))
        want[k] *= math.sqrt((1 if k == 0 else 2) / H)
    assert common.cosines(H) @ x == pytest.approx(want)
    assert common.cosines(H).T @ want == pytest.approx(x)


def test_action_tokens_return_the_actions(tokenizer):
    H, A = 8, 3
    data = chunks(60, H, A)
    fast = common.Fast.fit(data, tokenizer)
    again = common.Fast(json.loads(json.dumps(fast.state)), tokenizer)
    lengths = []
    for chunk in data:
        ids = fast.encode(chunk)
        assert ids == again.encode(chunk) and ids[-1] == tokenizer.eos_token_id
        names = tokenizer.convert_ids_to_tokens(list(ids[:-1]))
        assert all(name.startswith("<robot_action_") for name in names)
        got = again.decode(torch.tensor([[*ids, 3, 3]]))  # what follows the end does not count
        # each coefficient is off by half a tenth at most, and the transform keeps lengths
        assert (np.linalg.norm(got[0].numpy() - chunk, axis=0) <= 0.05 * math.sqrt(H) + 1e-5).all()
        lengths.append(len(ids) - 1)
    assert np.mean(lengths) < 0.8 * H * A  # shorter than a token a number
    far = fast.decode(torch.tensor([fast.encode(5 * data[0])]))  # beyond what was learnt: clipped
    assert far.shape == (1, H, A) and far.isfinite().all()


def test_cut_off_and_garbage_ids_are_finite_actions(tokenizer):
    fast = common.Fast.fit(chunks(30, 4, 2), tokenizer)
    whole = fast.encode(chunks(1, 4, 2)[0])
    end, rng = tokenizer.eos_token_id, np.random.default_rng(0)
    rows = [[end] * 40, [0] * 40, list(range(40)), [10**6] * 40, rng.integers(0, 2000, 40)]
    rows += [[fast.first + 3] * 40, [*whole[:2], end] + [0] * 37]
    out = fast.decode(torch.tensor(np.array(rows)))
    assert out.shape == (7, 4, 2) and out.dtype == torch.float32 and out.isfinite().all()
    assert not out[:2].any() and out.abs().max() < 100
    assert fast.decode(torch.zeros(3, 0, dtype=torch.long)).shape == (3, 4, 2)


def test_too_few_action_tokens_are_an_error(tokenizer):
    with pytest.raises(common.UserError, match="--head fast: .* coefficients, 256 action"):
        common.Fast.fit([np.full((8, 2), x) for x in (-9.0, 9.0)], tokenizer)


def test_a_backbone_without_action_tokens_gets_them(case, tmp_path):
    folder = shutil.copytree(case.folder, tmp_path / "copy")
    for file in folder.glob("tokenizer*.json"):
        file.write_text(file.read_text().replace("<robot_action_", "<something_else_"))
    vlm, processor = common.load_backbone(str(folder))
    before = vlm.get_input_embeddings().weight.detach().clone()
    common.Fast.extend(vlm, processor.tokenizer, count=300)
    common.Fast.extend(vlm, processor.tokenizer, count=300)  # once is enough
    after = vlm.get_input_embeddings().weight
    assert len(after) == len(before) + 300 == vlm.lm_head.out_features
    assert torch.equal(after[: len(before)], before)
    fast = common.Fast.fit(chunks(30, 4, 2), processor.tokenizer)
    assert fast.first == len(before)
    assert max(fast.encode(chunks(1, 4, 2)[0])) < len(after)
