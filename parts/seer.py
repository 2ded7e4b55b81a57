"""Seer (arXiv 2412.15109), the teacher of vita_vla.py: the small action model itself.

Here: its layers, by the names of its released files; its frozen encoders, and what these read; who
sees whom; the model; a released checkpoint into it. The losses, and what is learned from it, are in
vita_vla.py. Letters: n pictures, P patches, Q resampled tokens, B batch, S steps, N actions, H
width of Seer; of a step C tokens of context and G of foresight a picture.

Three things of a released Seer are not as here, and none can be told from its file:
  - its eyes: MAE's encoder, `mae_pretrain_vit_base.pth`, of which no checkpoint holds a copy. Its
    twin on the hub is timm/vit_base_patch16_224.mae; facebook/vit-mae-base was trained on other
    targets (pixels that are not normalised, for pictures of the reconstruction) and does not fit;
  - its units: states and actions as recorded (`read_recorded`, `--normalise raw`);
  - LIBERO's pictures and gripper (`--released libero`): the renderer's, half a turn from ours, and
    a label of 1 for closed, where ours and CALVIN's is 1 for open.
"""

import math
import re
from functools import lru_cache

import numpy as np
import torch
import torch.nn.functional as F
import transformers
from huggingface_hub import hf_hub_download
from PIL import Image
from safetensors.torch import load_file
from torch import nn

from parts.backbones import OURS, blank
from parts.kernels import attend, causal_mask
from parts.process import UserError
from parts.sight import put

# --- Layers ---------------------------------------------------------------------------------------


class PerceiverAttention(nn.Module):
    """The latents look at a picture's features and at themselves; names as in Seer's files."""

    def __init__(self, dim, heads=8, head_dim=64):
        super().__init__()
        self.heads = heads
        self.norm_media, self.norm_latents = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.to_q = nn.Linear(dim, heads * head_dim, bias=False)
        self.to_kv = nn.Linear(dim, 2 * heads * head_dim, bias=False)
        self.to_out = nn.Linear(heads * head_dim, dim, bias=False)

    def forward(self, x, latents):
        """x (n, P, dim), latents (n, Q, dim) -> (n, Q, dim)."""
        x, latents = self.norm_media(x), self.norm_latents(latents)
        k, v = self.to_kv(torch.cat([x, latents], dim=1)).chunk(2, dim=-1)
        q, k, v = (
            z.unflatten(-1, (self.heads, -1)).transpose(1, 2) for z in (self.to_q(latents), k, v)
        )
        return self.to_out(attend(q, k, v).transpose(1, 2).flatten(2))


class PerceiverResampler(nn.Module):
    """Any number of picture features -> Q tokens."""

    def __init__(self, dim, queries, depth):
        super().__init__()
        self.latents = nn.Parameter(torch.randn(queries, dim))

        def mlp():
            wide = nn.Linear(dim, 4 * dim, bias=False), nn.Linear(4 * dim, dim, bias=False)
            return nn.Sequential(nn.LayerNorm(dim), wide[0], nn.GELU(), wide[1])

        self.layers = nn.ModuleList(
            nn.ModuleList([PerceiverAttention(dim), mlp()]) for _ in range(depth)
        )
        self.norm = nn.LayerNorm(dim)

    def forward(self, x):
        latents = self.latents.expand(len(x), -1, -1)
        for attention, mlp in self.layers:
            latents = latents + attention(x, latents)
            latents = latents + mlp(latents)
        return self.norm(latents)


class Attention(nn.Module):
    def __init__(self, width, heads, fused, out, dropout=0.0):
        super().__init__()
        self.heads, self.fused, self.out, self.dropout = heads, fused, out, dropout
        self.add_module(fused, nn.Linear(width, 3 * width))
        self.add_module(out, nn.Linear(width, width))

    def forward(self, x, mask=None):
        q, k, v = self.get_submodule(self.fused)(x).chunk(3, dim=-1)
        q, k, v = (z.unflatten(-1, (self.heads, -1)).transpose(1, 2) for z in (q, k, v))
        if self.training and self.dropout:
            y = F.scaled_dot_product_attention(q, k, v, mask, self.dropout)
        else:
            y = attend(q, k, v, mask)
        return self.get_submodule(self.out)(y.transpose(1, 2).flatten(2))


class Block(nn.Module):
    """A pre-norm block with the names of GPT-2 (Seer's trunk) or of timm (its image decoder)."""

    GPT2 = ("ln_1", "attn", "ln_2", "mlp", "c_attn", "c_proj", "c_fc", "c_proj")
    TIMM = ("norm1", "attn", "norm2", "mlp", "qkv", "proj", "fc1", "fc2")

    def __init__(self, width, heads, names, dropout=0.0, attention_dropout=0.0):
        super().__init__()
        self.names, tanh = names, "tanh" if names is Block.GPT2 else "none"
        first, attention, second, mlp, fused, out, up, down = names
        self.add_module(first, nn.LayerNorm(width))
        self.add_module(attention, Attention(width, heads, fused, out, attention_dropout))
        self.add_module(second, nn.LayerNorm(width))
        parts = {up: nn.Linear(width, 4 * width), "act": nn.GELU(approximate=tanh)}
        self.add_module(mlp, nn.Sequential())
        for name, part in (parts | {down: nn.Linear(4 * width, width)}).items():
            self.get_submodule(mlp).add_module(name, part)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x, mask=None):
        first, attention, second, mlp = (self.get_submodule(name) for name in self.names[:4])
        x = x + self.dropout(attention(first(x), mask))
        return x + self.dropout(mlp(second(x)))


@lru_cache(maxsize=16)
def grid_code(side, width):
    """MAE's fixed sine and cosine positions of a square -> (side * side, width)."""
    rate = 1 / 10000 ** (torch.arange(width // 4) / (width / 4))
    y, x = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
    waves = [v.flatten()[:, None] * rate for v in (x, y)]  # the column goes first
    return torch.cat([part for w in waves for part in (w.sin(), w.cos())], dim=1)


# --- Frozen encoders, and what they read ----------------------------------------------------------

MAE = "timm/vit_base_patch16_224.mae"
MAE_NAMES = {  # timm's -> the library's
    r"^pos_embed": "embeddings.position_embeddings", r"^cls_token": "embeddings.cls_token",
    r"^patch_embed\.proj": "embeddings.patch_embeddings.projection", r"^norm\.": "layernorm.",
    r"^blocks": "layers", r"\.norm1": ".layernorm_before", r"\.norm2": ".layernorm_after",
    r"attn\.proj": "attention.o_proj", r"attn\.": "attention.",
}  # fmt: skip


class BackboneEyes(nn.Module):
    """ASSUMPTION A9: the VLM's frozen vision tower, and half of its language model."""

    def __init__(self, vlm):
        super().__init__()
        self.vlm = vlm
        self.picture_width = self.text_width = vlm.width

    def forward(self, batch, cameras):
        """-> picture features by camera [(steps, P, dim)], words (B, dim)."""
        grids = [math.prod(grid) for grid in batch["grids"]]  # patches of each picture
        levels = self.vlm.see(batch)
        tokens, batch["features"] = levels[0], levels  # in stage 1 the student has the same eyes
        patches_of_a_token = sum(grids) // len(tokens)
        sizes = [patches // patches_of_a_token for patches in grids[:cameras]]
        parts = tokens.unflatten(0, (len(grids) // cameras, -1)).split(sizes, dim=1)
        real = batch["text"] >= 0
        x = self.vlm.language.get_input_embeddings()(batch["text"].clamp(min=0))
        layers = self.vlm.language(
            inputs_embeds=x, attention_mask=causal_mask(real), use_cache=False,
            output_hidden_states=True,
        ).hidden_states  # fmt: skip
        h = F.layer_norm(layers[len(layers) // 2].float(), x.shape[-1:])  # (B, words, dim)
        return parts, (h * real[..., None]).sum(1) / real.sum(1, keepdim=True)


class SeerEyes(nn.Module):
    """Seer's frozen encoders: MAE ViT-B/16 sees, CLIP ViT-B/32 reads."""

    CLIP = "openai/clip-vit-base-patch32"
    picture_width, text_width = 768, 512

    def __init__(self, vision=None, text=None):
        super().__init__()
        if blank():  # the library's default configurations are these two models'
            vision = transformers.ViTMAEModel(transformers.ViTMAEConfig())
            text = transformers.CLIPTextModelWithProjection(transformers.CLIPTextConfig())
        self.vision = vision  # `paper_eyes` reads the weights that Seer was trained behind
        clip = transformers.CLIPTextModelWithProjection
        self.text = text or clip.from_pretrained(self.CLIP, **OURS)
        self.vision.config.mask_ratio = 0.0

    def forward(self, batch, cameras):
        """-> features by camera [(steps, 1 + P, 768)], the class token first; words (B, 512)."""
        features = []
        for pixels in batch["seen"]:
            order = torch.arange((pixels.shape[-1] // 16) ** 2, device=pixels.device)
            noise = order.float().expand(len(pixels), -1)  # keeps the patches in their order
            features.append(self.vision(pixels, noise=noise).last_hidden_state)
        return features, self.text(batch["text"]).text_embeds


def paper_eyes():
    """Seer's own: MAE ViT-B/16 with the weights that Seer was trained behind, CLIP ViT-B/32."""
    if blank():
        return SeerEyes()
    try:
        path = hf_hub_download(MAE, "model.safetensors")
    except (OSError, ValueError) as error:
        raise UserError(f"--eyes mae: no {MAE} here; to fetch it: `hf download {MAE}`") from error
    return SeerEyes(load_mae(path, transformers.ViTMAEModel(transformers.ViTMAEConfig())))


def load_mae(path, model):
    """MAE's encoder as timm keeps it -> the library's model; an error names what does not fit."""
    tensors = {}
    for name, value in load_file(path).items():
        for theirs, ours in MAE_NAMES.items():
            name = re.sub(theirs, ours, name)
        if ".qkv." in name:  # three matrices in one
            for part, matrix in zip("qkv", value.chunk(3)):
                tensors[name.replace("qkv", f"{part}_proj")] = matrix
        else:
            tensors[name] = value
    ours = model.state_dict()
    for name in sorted({*ours, *tensors}):
        if name not in tensors or name not in ours or tensors[name].shape != ours[name].shape:
            raise UserError(f"--eyes mae: {path} is not MAE's ViT-B/16: {name} does not fit")
    model.load_state_dict(tensors)
    return model


def clip_pixels(images, released="calvin", size=224):
    """Pictures -> (n, 3, 224, 224) float32 in CLIP's normalisation, which Seer's MAE reads."""
    mean, std = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
    fitted = [Image.fromarray(i).resize((size, size), Image.Resampling.BICUBIC) for i in images]
    x = np.stack([np.asarray(i, np.float32) / 255 for i in fitted])
    x = x[:, ::-1, ::-1] if released == "libero" else x  # as the renderer left them
    return ((x - np.float32(mean)) / np.float32(std)).transpose(0, 3, 1, 2)


@lru_cache(maxsize=1)
def clip_tokenizer():
    return transformers.AutoTokenizer.from_pretrained(SeerEyes.CLIP, **OURS)


def foresight_target(images, cfg):
    """(n, height, width, 3) uint8 -> (n, P, p * p * 3): each patch with mean 0 and deviation 1."""
    if cfg.eyes == "mae":
        images = clip_pixels(images, cfg.released).transpose(0, 2, 3, 1)
    n, height, width, _ = images.shape
    p = cfg.patch
    x = images.astype(np.float32).reshape(n, height // p, p, width // p, p, 3)
    x = x.transpose(0, 1, 3, 2, 4, 5).reshape(n, -1, p * p * 3)
    return torch.from_numpy((x - x.mean(-1, keepdims=True)) / (x.std(-1, keepdims=True) + 1e-3))


def mae_inputs(samples, released):
    """-> "seen", by camera (real steps, 3, 224, 224), and "text", CLIP's 77 words (B, 77)."""
    steps = [step for s in samples for step in s["images"]]
    seen = [torch.from_numpy(clip_pixels(images, released)) for images in zip(*steps)]
    words = [s["instruction"] for s in samples]
    ids = clip_tokenizer()(words, padding="max_length", truncation=True, return_tensors="pt")
    return {"seen": seen, "text": ids["input_ids"]}


# --- What a student has too: the state's encoder, the decoder -------------------------------------


def add_state_encoder(model, width, arm):
    """Section 3.2: the arm and the gripper each through a linear layer, joined by a third."""
    model.arm_state_encoder = nn.Linear(arm, width)
    model.gripper_state_encoder = nn.Linear(2, width)
    model.state_projector = nn.Linear(2 * width, width)


def encode_state(model, state, how):
    """Normalised state (..., numbers), the arm's first, the gripper's last -> (..., width)."""
    gripper = state[..., -2:]
    if how == "onehot":  # closed or open
        gripper = F.one_hot((state[..., -1] > 0).long(), 2).to(state.dtype)
    arm = model.arm_state_encoder.in_features
    both = model.arm_state_encoder(state[..., :arm]), model.gripper_state_encoder(gripper)
    return model.state_projector(torch.cat(both, dim=-1))


def add_decoder(model, H, arm):
    """Seer's action decoder, which the student takes over."""
    half = H // 2
    layers = nn.Linear(H, half), nn.ReLU(), nn.Linear(half, half), nn.ReLU()
    model.action_decoder = nn.Sequential(*layers)
    model.arm_action_decoder = nn.Sequential(nn.Linear(half, arm), nn.Tanh())
    model.gripper_action_decoder = nn.Sequential(nn.Linear(half, 1))  # its sigmoid: in the loss


def decode(model, h):
    """(..., H) -> arm (..., A - 1) in [-1, 1], logit (...) that the gripper is to be open."""
    h = model.action_decoder(h)
    return model.arm_action_decoder(h).float(), model.gripper_action_decoder(h)[..., 0].float()


STATE_ENCODER = ("arm_state_encoder", "gripper_state_encoder", "state_projector")
DECODER = ("action_decoder", "arm_action_decoder", "gripper_action_decoder")


# --- The model ------------------------------------------------------------------------------------


def seer_mask(S, context, foresight, actions, goal=0, action_sees="all", hide=0.0):
    """(S * n, S * n) True where a token looks, n tokens a step: at the context (words, state,
    pictures) of its own and earlier steps, an action token also at its step's foresight; nobody at
    anything else, itself included.

    As Seer pre-trains: with goal > 0, foresight sees the state (second token) of that many steps
    ahead; of the context, actions see their own step's pictures only, or these and its state; and
    a share `hide` of each step's foresight, drawn anew at each call, stays hidden from them."""
    n = context + foresight + actions
    step, kind = torch.arange(S * n) // n, torch.arange(S * n) % n
    sees = (step[None] <= step[:, None]) & (kind < context)[None]
    is_foresight = (kind >= context) & (kind < context + foresight)
    is_action, same = (kind >= context + foresight)[:, None], step[None] == step[:, None]
    if action_sees != "all":
        first = 1 if action_sees == "pictures-state" else 2
        sees &= ~is_action | (same & (kind >= first)[None])
    shown = is_foresight.clone()
    for i in range(S) if hide else ():
        hidden = torch.randperm(foresight)[: int(hide * foresight)]
        shown[i * n + context + hidden] = False
    sees |= same & is_action & shown[None]
    if goal:
        sees |= is_foresight[:, None] & (kind == 1)[None] & (step[None] == step[:, None] + goal)
    return sees


class Seer(nn.Module):
    """Seer: from pictures, words and state of S steps to three actions and the pictures to come."""

    cameras = ("primary", "wrist")

    def __init__(self, cfg, eyes, arm=6):
        super().__init__()
        H, self.cfg, self.eyes = cfg.width, cfg, eyes.requires_grad_(False)
        E = eyes.picture_width
        self.text_projector = nn.Linear(eyes.text_width, H)
        add_state_encoder(self, H, arm)
        if cfg.resampler:
            self.perceiver_resampler = PerceiverResampler(E, cfg.queries, cfg.resampler)
        for camera in self.cameras:
            self.add_module(f"image_{camera}_projector", nn.Linear(E, H))
            self.add_module(f"cls_token_{camera}_projector", nn.Linear(E, H))
        self.action_pred_token = nn.Parameter(torch.zeros(1, 1, cfg.future, H))
        self.obs_tokens = nn.Parameter(torch.zeros(1, 1, 2 * cfg.foresight, H))
        place = 0.02 * torch.randn(1, cfg.history, 1, H)
        self.transformer_backbone_position_embedding = nn.Parameter(place)
        self.embedding_layer_norm = nn.LayerNorm(H)
        self.transformer_backbone = nn.Module()
        self.transformer_backbone.h = nn.ModuleList(
            Block(H, cfg.heads, Block.GPT2, cfg.dropout, cfg.attention_dropout)
            for _ in range(cfg.depth)
        )
        self.transformer_backbone.ln_f = nn.LayerNorm(H)
        add_decoder(self, H, arm)
        self.mask_token = nn.Parameter(0.02 * torch.randn(1, 1, H))
        self.image_decoder_obs_pred_projector = nn.Linear(H, H)
        heads = 16 if cfg.eyes == "mae" else cfg.heads
        blocks = (Block(H, heads, Block.TIMM) for _ in range(2))
        self.image_decoder = nn.Sequential(*blocks)
        self.image_decoder_norm = nn.LayerNorm(H)
        self.image_decoder_pred = nn.Linear(H, 3 * cfg.patch**2)
        self.untouched = {n for n in self.state_dict() if n.startswith("eyes.")}

    def blocks(self):
        """What is recomputed, compiled or sharded by itself."""
        return [*self.transformer_backbone.h]

    def context(self, batch):
        """-> (B, S, C, H): words, state, Q (or all) tokens of each picture, a summary of each."""
        steps = batch["steps"]  # (B, S)
        with torch.no_grad():
            features, words = self.eyes(batch, len(self.cameras))
        text = self.text_projector(words)[:, None].expand(-1, steps.shape[1], -1)
        state = encode_state(self, batch["state"], self.cfg.gripper_state)
        tokens, summaries = [], []
        for camera, x in zip(self.cameras, features):  # x (real steps, P, E)
            summary, x = (x[:, :1], x[:, 1:]) if self.cfg.eyes == "mae" else (x.mean(1, True), x)
            x = self.perceiver_resampler(x) if self.cfg.resampler else x
            tokens.append(self.get_submodule(f"image_{camera}_projector")(x))
            summaries.append(self.get_submodule(f"cls_token_{camera}_projector")(summary))
        seen = torch.cat(tokens + summaries, dim=1)
        out = put(seen.new_zeros(*steps.shape, *seen.shape[1:]), batch["there"], seen)
        return torch.cat([text[:, :, None].to(out.dtype), state[:, :, None].to(out.dtype), out], 2)

    def hidden(self, batch):
        """-> states after the last norm: action tokens (B, S, N, H), foresight (B, S, 2 G, H)."""
        cfg, x = self.cfg, self.context(batch)
        B, S, C, _ = x.shape
        more = self.obs_tokens.expand(B, S, -1, -1), self.action_pred_token.expand(B, S, -1, -1)
        x = torch.cat([x, *(m.to(x.dtype) for m in more)], dim=2)
        x = x + self.transformer_backbone_position_embedding[:, :S]
        x = self.embedding_layer_norm(x.flatten(1, 2))  # (B, S * n, H)
        x = F.dropout(x, cfg.embedding_dropout, self.training)
        how = cfg.goal, cfg.action_sees, cfg.hide_foresight if self.training else 0.0
        mask = seer_mask(S, C, 2 * cfg.foresight, cfg.future, *how).to(x.device, non_blocking=True)
        for block in self.transformer_backbone.h:
            x = block(x, mask)
        x = self.transformer_backbone.ln_f(x).unflatten(1, (S, -1))  # (B, S, n, H)
        return x[:, :, -cfg.future :], x[:, :, C : -cfg.future]

    def imagine(self, h, side):
        """One camera's foresight states (n, G, H) -> its picture's patches (n, P, p * p * 3)."""
        h = self.image_decoder_obs_pred_projector(h)
        mask = self.mask_token.expand(len(h), side**2, -1)
        width, own = h.shape[-1], math.isqrt(h.shape[1])
        where = torch.cat([grid_code(own, width), grid_code(side, width)])
        where = where.to(h, non_blocking=True)
        h = self.image_decoder(torch.cat([h, mask.to(h.dtype)], dim=1) + where)
        return self.image_decoder_pred(self.image_decoder_norm(h[:, -(side**2) :])).float()


class DecoderMapper(nn.Module):
    """vita_vla.py --mapper decoder: action states look at each other, in Seer's width."""

    def __init__(self, D, H):
        super().__init__()
        self.enter = nn.Linear(D, H)
        self.blocks = nn.ModuleList(Block(H, H // 32, Block.GPT2) for _ in range(2))

    def forward(self, h):
        lead, h = h.shape[:-2], self.enter(h).flatten(0, -3)  # (B * S, N, H)
        mask = torch.ones(h.shape[1], h.shape[1], dtype=torch.bool, device=h.device).tril()
        for block in self.blocks:
            h = block(h, mask)
        return h.unflatten(0, lead)


# --- Released checkpoints -------------------------------------------------------------------------


def read_seer(path) -> dict[str, torch.Tensor]:
    """A released Seer checkpoint -> its weights by our names: `module.` stripped, Conv1D
    transposed, frozen and unused parts left out. Nothing in the file is executed."""
    try:
        saved = torch.load(path, map_location="cpu", weights_only=True)["model_state_dict"]
        if not all(isinstance(value, torch.Tensor) for value in saved.values()):
            raise ValueError("model_state_dict holds more than tensors")
    except FileNotFoundError:
        raise UserError(f"--teacher {path}: no such file") from None
    except Exception as error:  # whatever a damaged or foreign file leads to
        why = str(error).splitlines()[0]
        raise UserError(f"--teacher {path}: no Seer checkpoint ({why})") from None
    unused = ("vision_encoder.", "clip_model.", "recon_", "action_pose_encoder.", "attention_mask",
              "action_gripper_position_encoder.", "action_projector.", "image_decoder_position")
    tensors = {}
    for name, value in saved.items():
        name = name.removeprefix("module.")
        if name.startswith(unused) or name.endswith((".masked_bias", ".attn.bias")):
            continue
        conv = name.startswith("transformer_backbone.h.") and value.dim() == 2
        tensors[name] = value.T.float() if conv else value.float()
    return tensors


def load_seer(model, path, released="calvin"):
    """A released Seer checkpoint into the model; what does not fit is an error that names it."""
    tensors = read_seer(path)
    place = "transformer_backbone_position_embedding"
    ours = model.state_dict()
    if place in tensors and tensors[place].shape[1] > ours[place].shape[1]:
        tensors[place] = tensors[place][:, : ours[place].shape[1]]  # a teacher of longer windows
    for name in [n for n in ours if not n.startswith("eyes.")] + list(tensors):
        if name not in tensors or name not in ours or tensors[name].shape != ours[name].shape:
            there, here = (tuple(d[name].shape) if name in d else "no" for d in (tensors, ours))
            hint = "--width, --depth, --history, --queries, --foresight"
            raise UserError(f"--teacher {path}: {name}: {there} there, {here} here ({hint})")
    if released == "libero":  # 1 - sigmoid(z) = sigmoid(-z): closed there, open here
        for name in ("gripper_action_decoder.0.weight", "gripper_action_decoder.0.bias"):
            tensors[name] = -tensors[name]
    model.load_state_dict(tensors, strict=False)


def check_recordings(acts):
    """Recordings (data.Part) must be such as Seer and its student can read: two cameras, a state of
    the arm's numbers and, at its end, the gripper's. Sets the bounds of a gripper that is still."""
    widths = {part.name: part.episodes[0].state.shape[1] for part in acts}
    if len(set(widths.values())) > 1:
        raise UserError(f"--data: states of different widths cannot be mixed here: {widths}")
    for name, stats in ((part.name, part.stats) for part in acts):
        arm, cameras = len(stats["action"]["min"]) - 1, stats["cameras"]
        if len(cameras) != 2:
            raise UserError(f"{name}: VITA-VLA reads a static and a wrist camera, this has "
                            f"{', '.join(cameras)}")  # fmt: skip
        if widths[name] <= arm:
            raise UserError(f"{name}: VITA-VLA reads {arm} numbers of an arm's state and the "
                            f"gripper's last, this has {widths[name]}")  # fmt: skip
        open_and_closed(stats["action"])


def open_and_closed(stats):
    """Bounds of actions whose gripper hardly ever moves: what it does not do lies between them too,
    else a hand that stays open would be one that is neither open nor closed."""
    ends = (-1.0, 1.0) if stats["min"][-1] < -0.5 else (0.0, 1.0)
    for low, high in (("q01", "q99"), ("min", "max")):
        if stats[high][-1] - stats[low][-1] < 1e-6:
            stats[low][-1], stats[high][-1] = ends


def as_recorded(robots):
    """Changes the bounds of {recordings: stats}: the arm's actions stay as they are, in [-1, 1];
    the gripper lies between its least and greatest, a state between those of all recordings, which
    Seer reads on one scale."""
    for name, stats in robots.items():
        action, arm = stats["action"], len(stats["action"]["min"]) - 1
        reach = max(map(abs, action["min"][:arm] + action["max"][:arm]))
        if reach > 1:
            raise UserError(f"--normalise raw: {name} has actions of {reach:.3g}, beyond 1")
        action["min"][:arm], action["max"][:arm] = [-1.0] * arm, [1.0] * arm
        action["how"] = stats["state"]["how"] = "minmax"
    states = [stats["state"] for stats in robots.values()]
    low = np.min([s["min"] for s in states], axis=0).tolist()
    high = np.max([s["max"] for s in states], axis=0).tolist()
    for state in states:
        state["min"], state["max"] = list(low), list(high)


def read_recorded(model, low, high, how):
    """A released Seer has read the state as recorded; its first matrices now take ours, normalised
    between low and high: W x = W (half x' + middle)."""
    low, high = torch.from_numpy(low), torch.from_numpy(high)
    half, middle = (high - low) / 2, (high + low) / 2
    parts = [(model.arm_state_encoder, slice(model.arm_state_encoder.in_features))]
    parts += [(model.gripper_state_encoder, slice(-2, None))] if how == "raw" else []
    for layer, part in parts:
        layer.bias.data += layer.weight.data @ middle[part].to(layer.weight)
        layer.weight.data *= half[part].to(layer.weight)
