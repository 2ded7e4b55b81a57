"""How a language model sees: a vision tower's tokens of all pictures, and where they go in.

What a Qwen's tower needs to know of its pictures' sizes, and where pictures stand in a prompt, is
found on the CPU: whatever is asked of a GPU's own numbers waits for all that it has to do. Letters:
B batch, T tokens, D width.
"""

import inspect

import torch
import transformers
from torch import nn
from transformers import AttentionInterface, vision_utils

from parts.kernels import attend
from parts.process import to_device

CACHE = "past_key_values"  # so called until transformers 5.23
if "cache" in inspect.signature(transformers.Qwen2Model.forward).parameters:
    CACHE = "cache"


def image_rows(bounds):
    """Where images begin and the last one ends -> their patches' rows, [(images, length)] by
    length, and the order back. Kept at the tensor, which all layers of a tower are given."""
    if not hasattr(bounds, "rows"):
        starts, lengths = bounds[:-1], bounds.diff()
        rows = [
            starts[lengths == length, None] + torch.arange(length, device=bounds.device)
            for length in lengths.unique().tolist()
        ]
        bounds.rows = rows, torch.cat([r.flatten() for r in rows]).argsort()
    return bounds.rows


def block_attention(module, q, k, v, attention_mask=None, scaling=None, cu_seq_lens_q=None, **_):
    """Attention inside each image: (1, heads, all patches, D) -> (1, all patches, heads, D).

    All images (or windows) of one length share one call, where the library calls once per image.
    """
    packed = [x[0].transpose(0, 1) for x in (q, k, v)]  # (all patches, heads, D)
    groups, back = image_rows(cu_seq_lens_q)
    out = []
    for rows in groups:
        picked = (x.index_select(0, rows.flatten()).unflatten(0, rows.shape) for x in packed)
        q, k, v = (x.transpose(1, 2) for x in picked)  # (images, heads, length, D)
        out.append(attend(q, k, v, scale=scaling).transpose(1, 2).flatten(0, 1))
    return torch.cat(out).index_select(0, back)[None], None


class WholePatch(nn.Conv3d):
    """A convolution whose kernel covers its input: the product that it is, several times faster."""

    def forward(self, x):
        return nn.functional.linear(x.flatten(1), self.weight.flatten(1), self.bias)


def quick_vision(model):
    """Lets the vision tower of a Qwen-VL attend within all its images at once, and read a patch by
    one product; weights and their names stay."""
    model.model.visual.patch_embed.proj.__class__ = WholePatch
    # The library tells image boundaries only to implementations with "flash" in their name.
    AttentionInterface.register("flash_blocks", block_attention)
    model.set_attn_implementation({"vision_config": "flash_blocks"})
    if hasattr(model.model.language_model, "_deepstack_process"):
        model.model.language_model._deepstack_process = deepen
    return model


def see(model, batch):
    """A batch's pictures, pixel_values and grids -> their tokens [(tokens, D)]: those that go in at
    the bottom, then DeepStack's."""
    pixels = batch["pixel_values"]
    if not hasattr(model, "visual"):
        return [model.get_image_features(pixels, return_dict=True).pooler_output.flatten(0, 1)]
    where = layout(model.visual, tuple(map(tuple, batch["grids"])), pixels.device)
    out = model.visual(pixels.to(model.visual.dtype), return_dict=True, **where)
    return [out.pooler_output, *(getattr(out, "deepstack_features", None) or [])]


def layout(visual, grids, device):
    """What a Qwen's vision tower makes of its pictures' grids, for its forward(); kept."""
    kept = visual.__dict__.setdefault("layouts", {})
    if (grids, device) not in kept:
        if len(kept) == 64:  # pictures of many sizes, mixed anew in each batch
            kept.clear()
        grid, merge = torch.tensor(grids), visual.spatial_merge_size
        bounds, longest = vision_utils.get_vision_attention_seqlens(grid, visual.config)
        made = {"cu_seqlens": bounds, "max_seqlen": longest, "grid_thw": grid}
        made["position_ids"] = vision_utils.get_vision_position_ids(grid, merge)
        if visual.config.model_type.startswith("qwen3_vl"):
            names = "interp_indices", "interp_weights"
            found = vision_utils.get_vision_interpolation_indices_and_weights(
                grid, visual.num_grid_per_side, visual.interpolation_mode,
                visual.interpolation_align_corners, merge,
            )  # fmt: skip
        else:
            names = "window_index", "cu_window_seqlens"
            sizes = merge, visual.window_size, visual.patch_size
            found = vision_utils.get_vision_window_index(grid, *sizes)
            made["max_window_seqlen"] = int(found[1].diff().max())
        made |= dict(zip(names, found))
        kept[grids, device] = there = to_device(made, device)
        for name in there.keys() & {"cu_seqlens", "cu_window_seqlens"}:
            there[name].rows = to_device(image_rows(made[name]), device)
    return kept[grids, device]


def read(language, x, prompt, mask, seen=(), cache=None, **words):
    """x (B, T, D) embedded, `seen` of its pictures' tokens -> what the language model gives out."""
    if seen:
        x = put(x, prompt["pictures"], seen[0])
    if len(seen) > 1:
        words |= dict(visual_pos_masks=prompt["pictures"], deepstack_visual_embeds=seen[1:])
    return language(
        inputs_embeds=x, attention_mask=mask, position_ids=prompt["position_ids"],
        use_cache=cache is not None, **{CACHE: cache}, **words,
    )  # fmt: skip


def flat(where):
    """where (B, T) bool -> the rows of (B * T, ...) at which it is True."""
    return where.flatten().nonzero()[:, 0]


def put(x, places, values):
    """x (B, T, D) with values (n, D) in the rows `places` (n,) of the batch's B * T."""
    return x.flatten(0, 1).index_copy(0, places, values.to(x.dtype)).view_as(x)


def deepen(x, places, values):
    """x (B, T, D), values (n, D) of a DeepStack level added in the rows `places`; a mask (B, T),
    which the library's own forward() has for them, makes a GPU wait."""
    places = flat(places) if places.dtype == torch.bool else places
    return x.flatten(0, 1).index_add(0, places, values.to(x.dtype)).view_as(x)
