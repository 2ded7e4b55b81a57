"""InstructVLA (arXiv 2507.17520), the base model of dualvla.py: what it is made of.

Here: LoRA experts around matrices, words for actions, decoding with the caches of two passes, the
flow expert. Gates and queries, and what is learned of whom, are in dualvla.py. Letters: B batch, T
and N tokens, n new ones, V vocabulary, D width of the VLM, d of a head; of the flow expert R noise
draws, H chunk, A action, S state, P tokens of its prefix.
"""

import math

import torch
import torch.nn.functional as F
from torch import nn
from transformers import DynamicCache

from parts.backbones import export_backbone
from parts.kernels import attend, causal_mask
from parts.process import UserError
from parts.scale import swap

# --- Experts --------------------------------------------------------------------------------------


class Mixture(nn.Module):
    """A frozen matrix and low-rank experts: W_0 x + sum_i lambda_i (alpha / r) B_i A_i x, where all
    of a model read the lambdas of each token from the same gates.now; None: W_0 alone."""

    def __init__(self, base, experts, rank, alpha, gates):
        super().__init__()
        self.base, self.alpha, self.gates = base, alpha, gates
        self.down = nn.ParameterList(
            nn.Parameter(torch.randn(rank, base.in_features) / base.in_features**0.5)
            for _ in range(experts)
        )
        self.up = nn.ParameterList(
            nn.Parameter(torch.zeros(base.out_features, rank)) for _ in range(experts)
        )

    def forward(self, x):
        y, lambdas = self.base(x), self.gates.now  # (B, T, experts) or (1, 1, experts)
        if lambdas is not None:
            A, B = torch.cat([*self.down]), torch.cat([*self.up], dim=1)  # all experts at once
            low = F.linear(x, A).unflatten(-1, (len(self.down), -1))  # (B, T, experts, r)
            low = self.alpha * lambdas[..., None] * low
            y = y + F.linear(low.flatten(-2), B)
        return y

    def merged(self):
        """The matrix with its one expert in it."""
        whole = self.base.weight.data.float()  # 16 bits would round most of the change away
        self.base.weight.data = whole + self.alpha * self.up[0] @ self.down[0]
        return self.base


def add_experts(layers, experts, rank, alpha, gates):
    """Puts a Mixture in the place of each matrix of a language model's layers."""
    swap(layers, nn.Linear, lambda matrix: Mixture(matrix, experts, rank, alpha, gates))


def export_expert(policy, run, out):
    """--export: the VLM of a run as an ordinary checkpoint, where there is an equal one. E's one
    expert counts fully everywhere, so it can join the frozen matrices."""
    if policy.model.gate is not None:
        raise UserError(
            f"--export {run}: its two LoRA experts are weighted anew for each token, so no "
            "ordinary checkpoint equals it; --benchmark FILE asks it, --tune full can be exported"
        )
    swap(policy.model, Mixture, Mixture.merged)
    export_backbone(policy.model.vlm, policy.cfg.backbone, policy.processor.tokenizer, out)


# --- Decoding -------------------------------------------------------------------------------------

BINS = 256  # of an action's dimension, where actions are words


def to_tokens(action, first):
    """Normalised actions (H, A) -> ids, one word a dimension, the present action first."""
    return tuple(int(i) for i in first + ((action + 1) / 2 * BINS).clip(0, BINS - 1).ravel())


def from_tokens(ids, first, action_dim):
    """(B, H * A) ids -> (B, H, A), the middles of the bins."""
    return ((ids - first + 0.5) / BINS * 2 - 1).unflatten(-1, (-1, action_dim))


class Thread:
    """Decoding in progress: caches of both passes, which tokens count, the newest hidden state.

    A row that has said all it has to say is carried on with tokens that nobody looks at.
    """

    def __init__(self, model, batch):
        prompt = batch["prompt"]
        self.model, self.caches = model, (DynamicCache(), DynamicCache())
        self.real, self.position = prompt["real"], prompt["position_ids"][..., -1:]
        self.h = model.read(prompt, batch, caches=self.caches)[:, -1]  # (B, D)

    def go_on(self, x, use):
        """New tokens x (B, n, D), use (B, n): which of them are real -> hidden states (B, n, D)."""
        self.real = torch.cat([self.real, use], dim=1)
        place = self.position + use.cumsum(1)  # (3, B, n), or (B, n) where rows do not count
        mask = causal_mask(self.real)[:, :, -x.shape[1] :]
        h = self.model.look(x, {"position_ids": place}, mask, caches=self.caches)
        self.position = place[..., -1:]
        self.h = torch.where(use[:, -1:], h[:, -1], self.h)
        return h

    def speak(self, limit, stop, bar):
        """Greedy decoding, at most `limit` words; stop(ids) says which words end it -> lists of
        ids. It begins where words, all together, are likelier than `bar`."""
        vlm, said = self.model.vlm, [[] for _ in self.h]
        live = torch.ones_like(self.real[:, 0])
        for i in range(limit):
            logits = vlm.lm_head(self.h)  # (B, V)
            if i == 0:
                ends = stop(torch.arange(logits.shape[-1], device=logits.device))  # (V,)
                live = logits.float().softmax(-1)[:, ~ends].sum(-1) > bar
                logits = logits.masked_fill(ends, -math.inf)
            ids = logits.argmax(-1)  # (B,)
            live = live & ~stop(ids)
            if not live.any():
                break
            for words, word, more in zip(said, ids.tolist(), live.tolist()):
                words += [word] if more else []
            self.go_on(vlm.get_input_embeddings()(ids[:, None]), live[:, None])
        return said

    def act(self, first, count):
        """So many action words, each the likeliest of its 256 -> ids (B, count)."""
        vlm, ids = self.model.vlm, []
        for _ in range(count):
            logits = vlm.lm_head(self.h)[:, first : first + BINS]
            ids.append(first + logits.argmax(-1, keepdim=True))  # (B, 1)
            real = torch.ones_like(ids[-1], dtype=torch.bool)
            self.go_on(vlm.get_input_embeddings()(ids[-1]), real)
        return torch.cat(ids, dim=1)


# --- The flow expert ------------------------------------------------------------------------------


def sinusoid(t, width):
    """t (...,) in [0, 1] -> (..., width), periods from a hundredth to one."""
    rates = 2 * math.pi * 100 ** torch.linspace(0, 1, width // 2, device=t.device)
    return torch.cat([(t[..., None] * rates).cos(), (t[..., None] * rates).sin()], dim=-1)


class Eye(nn.Module):
    """The flow expert's own sight: convolutions, modulated by the mean latent action (FiLM)."""

    def __init__(self, condition, width, cameras=4):
        super().__init__()
        sizes = [5, 32, 64, 96, width]  # colours and the place of each pixel first
        self.convs = nn.ModuleList(
            nn.Conv2d(i, o, 3, stride=2, padding=1) for i, o in zip(sizes, sizes[1:])
        )
        self.norms = nn.ModuleList(nn.GroupNorm(8, o) for o in sizes[1:])
        self.films = nn.ModuleList(nn.Linear(condition, 2 * o) for o in sizes[1:])
        self.camera = nn.Parameter(0.02 * torch.randn(cameras, condition))
        for film in self.films:
            nn.init.zeros_(film.weight)
            nn.init.zeros_(film.bias)

    def forward(self, views, latent):
        """views: camera -> (B, h, w, 3) uint8, latent (B, D) -> (B, all cameras' tokens, width)."""
        tokens = []
        for i, view in enumerate(views.values()):
            x = view.permute(0, 3, 1, 2).float() / 127.5 - 1  # (B, 3, h, w)
            lines = [torch.linspace(-1, 1, n, device=x.device) for n in x.shape[2:]]
            grid = torch.stack(torch.meshgrid(*lines, indexing="ij")).expand(len(x), -1, -1, -1)
            x = torch.cat([x, grid], dim=1)
            for conv, norm, film in zip(self.convs, self.norms, self.films):
                gamma, beta = film(latent + self.camera[i])[:, :, None, None].chunk(2, dim=1)
                x = F.silu(norm(conv(x)) * (1 + gamma) + beta)
            tokens.append(x.flatten(2).transpose(1, 2))
        return torch.cat(tokens, dim=1)


class Block(nn.Module):
    """A layer of Llama's kind, no positions rotated; attention itself is where the masks are."""

    def __init__(self, width, heads):
        super().__init__()
        self.heads, inner = heads, 3 * width
        self.norm = nn.RMSNorm(width, elementwise_affine=False)
        self.qkv, self.o = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.gate, self.up = nn.Linear(width, inner), nn.Linear(width, inner)
        self.down = nn.Linear(inner, width)

    def project(self, x):
        """(B, N, width) -> q, k, v (B, heads, N, d)."""
        parts = self.qkv(self.norm(x)).chunk(3, dim=-1)
        return [z.unflatten(-1, (self.heads, -1)).transpose(1, 2) for z in parts]

    def finish(self, x, y):
        """Attention's y (B, heads, N, d) and the MLP added to x."""
        x = x + self.o(y.transpose(1, 2).flatten(2))
        h = self.norm(x)
        return x + self.down(F.silu(self.gate(h)) * self.up(h))


class FlowExpert(nn.Module):
    """Velocity of an action chunk from [eye | latent actions | state | noisy actions]; the parts of
    the prefix look at themselves alone, the actions at everything."""

    def __init__(self, cfg, condition, state_dim, action_dim):
        super().__init__()
        W, self.horizon = cfg.width, cfg.horizon
        self.eye = Eye(condition, W)
        self.latent_in, self.action_in = nn.Linear(condition, W), nn.Linear(action_dim, W)
        self.state_in = nn.Linear(state_dim, W) if cfg.state and state_dim else None
        self.mix = nn.Sequential(nn.Linear(2 * W, W), nn.SiLU(), nn.Linear(W, W))
        self.place = nn.Parameter(0.02 * torch.randn(cfg.horizon, W))
        self.blocks = nn.ModuleList(Block(W, cfg.heads) for _ in range(cfg.depth))
        self.norm = nn.RMSNorm(W, elementwise_affine=False)
        self.out = nn.Sequential(nn.Linear(W, W), nn.SiLU(), nn.Linear(W, action_dim))

    def prefix(self, latents, views, state):
        """latents (B, N, D), state (B, S) -> keys and values of each layer."""
        parts = [self.eye(views, latents.mean(1)), self.latent_in(latents)]
        if self.state_in is not None:
            parts.append(self.state_in(state)[:, None])
        kind = [i for i, part in enumerate(parts) for _ in range(part.shape[1])]
        kind = torch.tensor(kind).to(latents.device, non_blocking=True)
        mask, keys = (kind[:, None] == kind)[None, None], []  # (1, 1, P, P)
        x = torch.cat(parts, dim=1)  # (B, P, width)
        for block in self.blocks:
            q, k, v = block.project(x)
            keys.append((k, v))
            x = block.finish(x, attend(q, k, v, mask))
        return keys

    def forward(self, x_t, t, keys):
        """x_t (B, R, H, A), t (B, R) -> velocity (B, R, H, A), float32; draws do not mix."""
        B, R, H, _ = x_t.shape
        a = self.action_in(x_t)  # (B, R, H, width)
        time = sinusoid(t, a.shape[-1])[:, :, None].expand(a.shape)
        x = (self.mix(torch.cat([a, time], dim=-1)) + self.place).flatten(1, 2)
        draw = torch.arange(R, device=x.device).repeat_interleave(H)
        own = draw[:, None] == draw  # (R * H, R * H)
        mask = F.pad(own, (keys[0][0].shape[2], 0), value=True)[None, None]
        for block, (k_P, v_P) in zip(self.blocks, keys):
            q, k, v = block.project(x)
            k, v = torch.cat([k_P, k], dim=2), torch.cat([v_P, v], dim=2)
            x = block.finish(x, attend(q, k, v, mask))
        return self.out(self.norm(x)).float().unflatten(1, (R, H))
