"""What vita_vla.py's student keeps of its history from one control step to the next.

A picture's tokens are kept as long as its step is in the window; the VLM's keys and values while
the window still grows. Once it slides, all positions change and the window is read anew.
A memory holds "steps" (each with its "state", "grid" and "seen" of its pictures), "length", the
number of steps that were read, and "past", [(keys, values)] by layer, each (heads, tokens, dim).
Letters: n histories, W tokens to read, P kept ones, D width of the VLM, N actions.
"""

import torch
import torch.nn.functional as F
from transformers import DynamicCache

from parts.kernels import causal_mask
from parts.process import to_device
from parts.sight import flat


def keep_pictures(memories, seen, grids):
    """The pictures of the newest steps, a history after the other: seen [(tokens, D)] by level of
    the vision tower, grids [(1, H/P, W/P)]."""
    n, cameras = len(memories), len(grids) // len(memories)
    parts = zip(*(level.unflatten(0, (n, -1)) for level in seen))
    for i, (memory, mine) in enumerate(zip(memories, parts)):
        memory["steps"][-1] |= {"grid": grids[i * cameras :][:cameras], "seen": mine}


def grids_of(memory):
    """The grids of a history's pictures, step by step."""
    return [grid for step in memory["steps"] for grid in step["grid"]]


def newest(model, rows, memories, words):
    """Prompts (ids) of histories -> states of the newest steps' action tokens (n, N, D). words:
    the ids that stand for other vectors."""
    out = [None] * len(rows)
    for grow, which in groups(memories):
        some = [rows[i] for i in which], [memories[i] for i in which]
        for i, states in zip(which, read_on(model, *some, grow, words)):
            out[i] = states
    return torch.stack(out)


def groups(memories):
    """-> [(grow, which)]: histories that are one step longer than what was read of them, others."""
    grows = [m.get("length", 0) + 1 == len(m["steps"]) > 1 for m in memories]
    kinds = ((kind, [i for i, grow in enumerate(grows) if grow is kind]) for kind in (True, False))
    return [(grow, which) for grow, which in kinds if which]


def read_on(model, rows, memories, grow, words):
    """The VLM over what is new in each prompt, behind what is kept of it (grow), or over all of it
    -> (n, N, D) as `newest()`; the memories keep its keys and values."""
    device, processor, N = model.action_token.device, model.processor, model.cfg.future
    kept = [m["past"][0][0].shape[1] if grow else 0 for m in memories]
    fresh = [len(row) - k for row, k in zip(rows, kept)]  # tokens to read
    prompt = processor.pad(rows, [grids_of(m) for m in memories])
    W, P = max(fresh), max(kept)
    prompt = {k: prompt[k][..., -W:] for k in ("input_ids", "position_ids")}
    prompt["real"] = torch.arange(W) >= W - torch.tensor(fresh)[:, None]  # (n, W)
    prompt |= processor.find(prompt, pictures=processor.image_token_id, **words)
    ends = torch.searchsorted(prompt["acts"], W * torch.arange(1, len(rows) + 1))
    prompt["newest"] = prompt["acts"][ends[:, None] + torch.arange(-N, 0)]  # (n, N)
    behind = torch.arange(P) >= P - torch.tensor(kept)[:, None]  # (n, P)
    real = [flat(row) for row in torch.cat([behind, prompt["real"]], dim=1)]
    steps = [step for m in memories for step in (m["steps"][-1:] if grow else m["steps"])]
    state = torch.stack([torch.from_numpy(step["state"]) for step in steps])
    prompt, behind, real, state = to_device([prompt, behind, real, state], device)
    cache = DynamicCache()
    for layer in range(model.vlm.language.config.num_hidden_layers if grow else 0):
        both = zip(*(m["past"][layer] for m in memories))
        padded = [[F.pad(x, (0, 0, P - x.shape[1], 0)) for x in xs] for xs in both]
        cache.update(*(torch.stack(xs) for xs in padded), layer)
    seen = [torch.cat(level) for level in zip(*(step["seen"] for step in steps))]
    x = model.embed(prompt, state)
    mask = behind[:, None, None].expand(-1, 1, W, -1)
    mask = torch.cat([mask, causal_mask(prompt["real"])], dim=-1)
    h = model.vlm.read(x, prompt, mask, seen, cache)
    for i, memory in enumerate(memories):
        memory["length"] = len(memory["steps"])
        if memory["length"] == model.cfg.history:  # from now on the window slides
            memory.pop("past", None)
            continue
        kept = ((layer.keys[i], layer.values[i]) for layer in cache.layers)
        memory["past"] = [(k[:, real[i]], v[:, real[i]]) for k, v in kept]
    return h.flatten(0, 1)[prompt["newest"]]
