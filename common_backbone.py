"""Images and positions for Qwen-VL backbones: the library's, without its loops over a batch.

Letters: B images, H W pixels, P patch, M merge, C values of a patch, T tokens of a prompt.
"""

import math

import numpy as np
import torch
from PIL import Image
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface


def fit(image, patch=16, merge=2, min_pixels=65536, max_pixels=16777216):
    """image (H, W, 3) uint8 -> the same picture with sides that are multiples of patch * merge."""
    height, width = image.shape[:2]
    unit = patch * merge
    h, w = round(height / unit) * unit, round(width / unit) * unit
    if h * w > max_pixels:
        shrink = math.sqrt(height * width / max_pixels)
        h = max(unit, math.floor(height / shrink / unit) * unit)
        w = max(unit, math.floor(width / shrink / unit) * unit)
    elif h * w < min_pixels:
        grow = math.sqrt(min_pixels / (height * width))
        h, w = math.ceil(height * grow / unit) * unit, math.ceil(width * grow / unit) * unit
    if (h, w) == (height, width):
        return image
    return np.asarray(Image.fromarray(image).resize((w, h), Image.Resampling.BICUBIC))


def patchify(image, patch=16, merge=2, temporal=2, mean=0.5, std=0.5):
    """image (..., H, W, 3) uint8 -> patches (..., H/P * W/P, C) float32, in merge x merge blocks.

    Each value is (image / 255 - mean) / std; a still picture fills `temporal` equal frames.
    """
    lead, (height, width, _) = image.shape[:-3], image.shape[-3:]
    rows, columns = height // patch // merge, width // patch // merge
    levels = (np.arange(256.0)[:, None] * (1 / 255)).astype(np.float32)
    levels = (levels - np.float32(mean)) / np.float32(std)  # all possible values, (256, 1 or 3)
    x = np.broadcast_to(levels, (256, 3))[image, (0, 1, 2)]
    x = x.reshape(-1, rows, merge, patch, columns, merge, patch, 3)
    x = x.transpose(0, 1, 4, 2, 5, 7, 3, 6)  # (B, rows, columns, M, M, 3, P, P)
    x = np.repeat(x[..., None, :, :], temporal, axis=-3)  # (.., 3, temporal, P, P)
    return x.reshape(*lead, rows * columns * merge**2, -1)


def mrope_positions(ids, grids, image_token_id, merge=2):
    """ids (T,) of one prompt, grids [(1, H/P, W/P)] of its images in order -> positions (3, T).

    Text counts up on all three axes; an image sits at one time, with its own rows and columns, and
    the text behind it goes on after the larger of the two. The same for Qwen2.5-VL and Qwen3-VL.
    """
    ids = np.asarray(ids)
    positions = np.zeros((3, len(ids)), np.int64)
    grids, at, now = iter(grids), 0, 0
    while at < len(ids):
        if ids[at] == image_token_id:
            _, h, w = (int(n) for n in next(grids))
            h, w = h // merge, w // merge
            positions[0, at : at + h * w] = now
            positions[1, at : at + h * w] = now + np.repeat(np.arange(h), w)
            positions[2, at : at + h * w] = now + np.tile(np.arange(w), h)
            at, now = at + h * w, now + max(h, w)
        else:
            positions[:, at] = now
            at, now = at + 1, now + 1
    return positions


def block_attention(
    module, query, key, value, attention_mask, scaling=None, cu_seq_lens_q=None, **_
):
    """Attention inside each image: q, k, v (1, heads, patches, D) -> (1, patches, heads, D).

    All images (or windows) of one length share one call, where the library calls once per image.
    """
    lengths = cu_seq_lens_q.diff()
    starts = cu_seq_lens_q[:-1]
    packed = [x[0].transpose(0, 1) for x in (query, key, value)]  # (patches, heads, D)
    out, order = [], []
    for length in lengths.unique().tolist():
        if length == 0:
            continue
        rows = starts[lengths == length, None] + torch.arange(length, device=starts.device)
        q, k, v = (x[rows].transpose(1, 2) for x in packed)  # (images, heads, length, D)
        y = attend(q, k, v, scale=scaling)
        out.append(y.transpose(1, 2).flatten(0, 1))
        order.append(rows.flatten())
    return torch.cat(out)[torch.cat(order).argsort()][None], None


def register_block_attention(model):
    """Let the vision tower of a Qwen-VL model attend within all its images at once."""
    # The library hands the image boundaries only to implementations with "flash" in their name.
    AttentionInterface.register("flash_blocks", block_attention)
    for module in model.modules():
        config = getattr(module, "config", None)
        if config is not None and "vision" in getattr(config, "model_type", ""):
            config._attn_implementation = "flash_blocks"
    return model


def attend(q, k, v, mask=None, scale=None):
    """softmax(q k^T * scale) v for (B, heads, T, d); mask broadcasts, True where a query looks."""
    if q.is_cuda:
        return scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)
    scores = (q * (scale or q.shape[-1] ** -0.5)) @ k.transpose(-1, -2)
    if mask is not None:
        scores = scores + torch.zeros_like(mask, dtype=scores.dtype).masked_fill_(
            ~mask, torch.finfo(scores.dtype).min
        )
    return scores.softmax(-1) @ v
