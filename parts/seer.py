"""Seer (arXiv 2412.15109), the teacher of vita_vla.py: what the small model itself is made of.

Here: its layers, by the names of its released files; its frozen encoders, and what these read; a
released checkpoint into `vita_vla.Seer`. Who sees whom, the losses and what is learned from it are
in vita_vla.py. Letters: n pictures, P patches, Q resampled tokens, B batch, H width of Seer.

Three things of a released Seer are not as here, and none can be told from its file:
  - its eyes: MAE's encoder, `mae_pretrain_vit_base.pth`, of which no checkpoint holds a copy. Its
    twin on the hub is timm/vit_base_patch16_224.mae; facebook/vit-mae-base was trained on other
    targets (pixels that are not normalised, for pictures of the reconstruction) and does not fit;
  - its units: states and actions as recorded (`read_recorded`, `--normalise raw`);
  - LIBERO's pictures and gripper (`--released libero`): the renderer's, half a turn from ours, and
    a label of 1 for closed, where ours and CALVIN's is 1 for open.
"""

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
        grids = batch["image_grid_thw"].prod(1)  # patches of each picture
        levels = self.vlm.see(batch["pixel_values"], batch["image_grid_thw"])
        tokens, batch["features"] = levels[0], levels  # in stage 1 the student has the same eyes
        patches_of_a_token = int(grids.sum()) // len(tokens)
        sizes = (grids[:cameras] // patches_of_a_token).tolist()
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


def as_recorded(name, stats):
    """Changes the bounds of these recordings: the arm's actions stay as they are, in [-1, 1]; the
    gripper and the state lie between their least and greatest."""
    action, arm = stats["action"], len(stats["action"]["min"]) - 1
    reach = max(map(abs, action["min"][:arm] + action["max"][:arm]))
    if reach > 1:
        raise UserError(f"--normalise raw: {name} has actions of {reach:.3g}, which is beyond 1")
    action["min"][:arm], action["max"][:arm] = [-1.0] * arm, [1.0] * arm
    action["how"] = stats["state"]["how"] = "minmax"


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
