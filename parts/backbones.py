"""Backbones by name or folder, each as `see()` and `read()`: Qwen-VL, VITA-1.5, Eagle2.

Letters: B batch, T tokens, P patch, M merge, H height.
"""

import json
import math
import re
import shutil
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
import transformers
from huggingface_hub import snapshot_download
from PIL import Image
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AttentionInterface, AutoConfig, AutoModelForImageTextToText, AutoTokenizer
from transformers.image_processing_base import ImageProcessingMixin
from transformers.masking_utils import sdpa_mask
from transformers.utils import cached_file
from transformers.utils.logging import disable_progress_bar

from parts.checkpoints import tied_names, write_json, write_weights
from parts.kernels import attend
from parts.process import UserError, nearest
from parts.sight import flat, quick_vision, read, see

ASSETS = Path(__file__).resolve().parents[1] / "assets"
BACKBONES = {
    "tiny": str(ASSETS / "tiny"),
    "Qwen2.5-VL-3B": "Qwen/Qwen2.5-VL-3B-Instruct",
    "Qwen2.5-VL-7B": "Qwen/Qwen2.5-VL-7B-Instruct",
    "Qwen3-VL-2B": "Qwen/Qwen3-VL-2B-Instruct",
    "Qwen3-VL-4B": "Qwen/Qwen3-VL-4B-Instruct",
    "Qwen3-VL-8B": "Qwen/Qwen3-VL-8B-Instruct",
    "VITA-1.5": "VITA-MLLM/VITA-1.5",
    "Eagle2-2B": "nvidia/Eagle2-2B",
}
OURS = {"trust_remote_code": False}  # a folder's own Python never runs: the library's alone does
SIZES = ASSETS / "backbones.json"  # published configurations


def blank() -> bool:
    """Under `torch.device("meta")`, for --describe: models have their sizes and no weights."""
    return torch.get_default_device().type == "meta"


@contextmanager
def quiet():
    """No warnings of the library in here."""
    level = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()
    try:
        yield
    finally:
        transformers.logging.set_verbosity(level)


def settings_of(name) -> dict:
    """A backbone's config.json; where nothing is to be loaded, the published one kept here."""
    sizes = json.loads(SIZES.read_text())
    if blank() and name in sizes:
        return sizes[name]["config"]
    path = BACKBONES.get(name, name)
    if file := cached_file(path, "config.json"):
        settings = json.loads(Path(file).read_text())
        if isinstance(settings, dict):
            return settings
    raise OSError(f"{path} has no config.json, or none that describes a model")


def damaged(folder) -> list[str]:
    """The weight files in here that are cut short or hold none; their headers alone are read."""
    bad = []
    for file in sorted(Path(folder).glob("*.safetensors")):
        try:
            safe_open(file, "pt")
        except SafetensorError:
            bad.append(str(file))
    return bad


@contextmanager
def loading(name, path):
    """What cannot be loaded from this folder or hub id is one line that says why."""
    flag = f"--backbone {name}"
    try:
        yield
    except SafetensorError as error:
        files = " or ".join(damaged(path)) or path
        raise UserError(f"{flag}: {files} is damaged or cut short, fetch it again") from error
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:  # a foreign file
        reason, known = str(error).partition("\n")[0], Path(path).is_dir()
        hint = "" if known else f"; `hf download {path} --local-dir DIR`, then --backbone DIR"
        raise UserError(f"{flag}: cannot load {path} ({reason}){hint}") from error


def find_backbone(name) -> str:
    """A name, folder or hub id -> folder or hub id; what can be none of these is an error."""
    path = BACKBONES.get(name, name)
    if not Path(path).is_dir() and not re.fullmatch(r"\w[\w.-]*/[\w.-]+", path):
        near, known = nearest(name, BACKBONES), ", ".join(BACKBONES)
        words = f"did you mean {near}? ({known}, DIR or OWNER/NAME)"
        raise UserError(f"unknown --backbone {name}: {words}")
    return path


def ask_hub(name):
    """Before demonstrations are made: the hub can be reached, or what came from it is here."""
    path = find_backbone(name)
    with loading(name, path):
        if not Path(path).is_dir():
            cached_file(path, "config.json")


def check_weights(name):
    """Before demonstrations are made: a backbone's folder has its weights, none cut short."""
    path = find_backbone(name)
    if not Path(path).is_dir():
        return
    index = Path(path, "model.safetensors.index.json")
    with loading(name, path):
        named = json.loads(index.read_text())["weight_map"].values() if index.exists() else ()
        if lost := sorted(name for name in {*named} if not Path(path, name).exists()):
            raise OSError(f"it lacks {', '.join(lost)}")
        files = [*Path(path).glob("*.safetensors")]
        if not files:
            raise OSError("it has no *.safetensors")
        for file in files:
            safe_open(file, "pt")


def load_backbone(name, frozen="fp32"):
    """A name, folder or hub id -> (Qwen3-VL, Qwen2.5-VL or Eagle2 in eval mode, its Processor).

    The model is the library's; only a Qwen's vision tower attends to all equal-sized images in one
    call. frozen: with bf16, as `--frozen`, weights stay as their file has them, else they become
    float32. On the meta device: without weights, and with the embedded backbone's Processor.
    """
    path, flag = find_backbone(name), f"--backbone {name}"
    dtype = "auto" if frozen == "bf16" else torch.float32
    if path == BACKBONES["VITA-1.5"]:
        raise UserError(f"{flag}: only vita_vla.py takes it, as it is read without its head")
    disable_progress_bar()
    with loading(name, path):
        settings = settings_of(name)
        family = str(settings.get("model_type", "model without model_type"))
        eagle = family.startswith("eagle")
        if not eagle and family not in ("qwen3_vl", "qwen2_5_vl"):
            raise UserError(f"{flag} is a {family}: take a Qwen3-VL, a Qwen2.5-VL or an Eagle2")
        if blank():
            config = eagle_config(settings) if eagle else AutoConfig.for_model(**settings)
            tiny = BACKBONES["tiny"]
            vlm = AutoModelForImageTextToText.from_config(config, **OURS)
            vlm.config.words = settings.get("words")
            return vlm.eval(), Processor(tiny, AutoConfig.from_pretrained(tiny, **OURS))
        if eagle:
            return load_eagle(path, eagle_config(settings), dtype)
        vlm = AutoModelForImageTextToText.from_pretrained(
            path, dtype=dtype, use_safetensors=True, **OURS
        )
        return quick_vision(vlm).eval(), Processor(path, vlm.config)


@lru_cache(maxsize=8192)
def chat_ids(tokenizer, system, user, counts, answer):
    """One conversation, pictures of these many tokens first in the user's turn -> (ids of the
    prompt, ids of the answer and its end, or none)."""
    content = [{"type": "image"}] * len(counts) + [{"type": "text", "text": user}]
    messages = [{"role": "system", "content": [{"type": "text", "text": system}]}] if system else []
    messages += [{"role": "user", "content": content}]
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    sizes = iter(counts)
    text = re.sub(r"<\|image_pad\|>", lambda mark: mark[0] * next(sizes), text)
    end = answer + tokenizer.eos_token if answer else ""
    return tuple(tuple(tokenizer.encode(t, add_special_tokens=False)) for t in (text, end))


class Processor:
    """Text and pictures -> the arrays a Qwen-VL reads, in the loader's workers and when acting."""

    image = "<|image_pad|>"  # the word that a picture's tokens stand for

    def __init__(self, path, config):
        self.tokenizer = AutoTokenizer.from_pretrained(path, **OURS)
        self.image_token_id = config.image_token_id
        self.pad_token_id = self.tokenizer.pad_token_id
        settings, _ = ImageProcessingMixin.get_image_processor_dict(path, **OURS)
        self.patch, self.merge = settings["patch_size"], settings["merge_size"]
        self.temporal = settings["temporal_patch_size"]
        self.mean, self.std = settings["image_mean"], settings["image_std"]
        size = settings.get("size") or {}
        self.min_pixels = settings.get("min_pixels") or size["shortest_edge"]
        self.max_pixels = settings.get("max_pixels") or size["longest_edge"]

    def images(self, images):
        """list of (height, width, 3) uint8 -> pixel_values (patches, C) float32, their grids."""
        grain = self.patch, self.merge
        fitted = [fit(image, *grain, self.min_pixels, self.max_pixels) for image in images]
        parts = [patchify(f, *grain, self.temporal, self.mean, self.std) for f in fitted]
        grids = tuple((1, len(f) // self.patch, len(f[0]) // self.patch) for f in fitted)
        return np.concatenate(parts), grids

    def prompt(self, system, user, grids, answer=""):
        """-> (ids of the prompt, ids of the answer and its end, or none); see `chat_ids`."""
        counts = tuple(math.prod(grid) // self.merge**2 for grid in grids)
        return chat_ids(self.tokenizer, system, user, counts, answer)

    def mark(self, n):
        """How a picture of n tokens stands in a text."""
        return "<|vision_start|>" + self.image * n + "<|vision_end|>"

    def words(self, ids, marks=()):
        """Ids -> readable text, without padding and with each picture as one mark; marks: {word:
        what is shown in its place}."""
        text = self.tokenizer.decode(ids)
        for word, shown in {self.tokenizer.pad_token: "", **dict(marks)}.items():
            text = text.replace(word, shown)
        return re.sub(f"({re.escape(self.image)})+", "<image>", text)

    def pad(self, rows, grids, **words):
        """Rows of ids, the grids of each row's images -> left-padded input_ids (B, T), real (B, T),
        position_ids (3, B, T), and what is found: the pictures' tokens and `words`."""
        B, T = len(rows), max(len(ids) for ids in rows)
        input_ids, real = np.full((B, T), self.pad_token_id), np.zeros((B, T), bool)
        position_ids = np.zeros((3, B, T), np.int64)
        for b, (ids, grid) in enumerate(zip(rows, grids)):
            where = known_positions(tuple(ids), tuple(grid), self.image_token_id, self.merge)
            input_ids[b, -len(ids) :], real[b, -len(ids) :] = ids, True
            position_ids[:, b, -len(ids) :] = where
        arrays = {"input_ids": input_ids, "real": real, "position_ids": position_ids}
        prompt = {name: torch.from_numpy(array) for name, array in arrays.items()}
        return prompt | self.find(prompt, pictures=self.image_token_id, **words)

    def find(self, prompt, **words):
        """Of words by name, name=id, the places in a prompt's B * T; on the CPU: see sight.py."""
        ids, real = prompt["input_ids"], prompt["real"]
        return {name: flat(real & (ids == word)) for name, word in words.items()}


def drop_deepstack(vlm) -> None:
    """A Qwen3-VL whose language model reads its pictures at the bottom alone, for an ablation."""
    if vlm.config.model_type != "qwen3_vl":
        raise UserError(f"--no-deepstack: a {vlm.config.model_type} has none, take a Qwen3-VL")
    vlm.model.visual.deepstack_visual_indexes = []
    vlm.config.vision_config.deepstack_visual_indexes = []
    vlm.model.visual.deepstack_merger_list = nn.ModuleList()


# --- pixels and positions -------------------------------------------------------------------------


def fit(image, patch=16, merge=2, min_pixels=65536, max_pixels=16777216):
    """image (H, W, 3) uint8 -> the same picture with sides that are multiples of patch * merge."""
    sides, unit = np.array(image.shape[:2]), patch * merge
    fitted = np.round(sides / unit) * unit
    if fitted.prod() > max_pixels:
        shrink = math.sqrt(sides.prod() / max_pixels)
        fitted = np.maximum(np.floor(sides / shrink / unit), 1) * unit
    elif fitted.prod() < min_pixels:
        grow = math.sqrt(min_pixels / sides.prod())
        fitted = np.ceil(sides * grow / unit) * unit
    if (fitted == sides).all():
        return image
    height, width = fitted.astype(int).tolist()
    return np.asarray(Image.fromarray(image).resize((width, height), Image.Resampling.BICUBIC))


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
    x = np.repeat(x[..., None, :, :], temporal, axis=-3)  # (..., 3, temporal, P, P)
    return x.reshape(*lead, rows * columns * merge**2, -1)


def mrope_positions(ids, grids, image_token_id, merge=2):
    """ids (T,) of one prompt, grids [(1, H/P, W/P)] of its images in order -> positions (3, T).

    Text counts up on all three axes; an image sits at one time, with its own rows and columns, and
    the text behind it goes on after the larger of the two. The same for Qwen2.5-VL and Qwen3-VL.
    """
    ids, at, now = np.asarray(ids), 0, 0
    positions = np.zeros((3, len(ids)), np.int64)
    for _, h, w in grids:
        h, w = int(h) // merge, int(w) // merge
        text = int(np.argmax(ids[at:] == image_token_id))  # tokens before the image
        positions[:, at : at + text] = now + np.arange(text)
        at, now = at + text, now + text
        positions[:, at : at + h * w] = now + np.indices((1, h, w)).reshape(3, -1)
        at, now = at + h * w, now + max(h, w)
    positions[:, at:] = now + np.arange(len(ids) - at)
    return positions


known_positions = lru_cache(maxsize=8192)(mrope_positions)  # prompts come again and again


# --- a backbone as see() and read() ---------------------------------------------------------------


def short_attention(module, q, k, v, mask, scaling=None, **_):
    return attend(q, k, v, mask, scaling).transpose(1, 2), None


AttentionInterface.register("short", short_attention)
transformers.AttentionMaskInterface.register("short", sdpa_mask)


class QwenVL(nn.Module):
    """A Qwen-VL, or an Eagle2, without its vocabulary head, which no loss here needs."""

    def __init__(self, vlm):
        super().__init__()
        self.model = vlm.model
        self.model.language_model.config._attn_implementation = "short"
        self.width = vlm.config.get_text_config().hidden_size
        self.model.requires_grad_(False)  # what sees is frozen in every stage
        self.language.requires_grad_(True)

    @property
    def language(self):
        return self.model.language_model

    @torch.no_grad()
    def see(self, batch):
        return see(self.model, batch)

    def read(self, x, prompt, mask, seen, cache=None):
        """-> (B, T, D); see `read()`."""
        return read(self.language, x, prompt, mask, seen, cache).last_hidden_state


class Vita15(nn.Module):
    """VITA-1.5 without audio: InternViT, two-layer projector, Qwen2.5; pixels (n, 3, h, w)."""

    def __init__(self, config, vision_config):
        super().__init__()
        self.vision = transformers.InternVLVisionModel(vision_config)
        self.language = transformers.Qwen2Model(config)
        self.width, C = config.hidden_size, 4 * vision_config.hidden_size
        self.projector = nn.Sequential(
            nn.Linear(C, self.width), nn.GELU(), nn.Linear(self.width, self.width)
        )
        self.language.config._attn_implementation = "short"
        self.vision.requires_grad_(False)
        self.projector.requires_grad_(False)

    @torch.no_grad()
    def see(self, batch):
        h = self.vision(batch["pixel_values"]).last_hidden_state
        h = 0.5 * h[:, 1:]  # without the class token
        side = math.isqrt(h.shape[1]) // 2  # a square, told without waiting for a GPU
        h = h.unflatten(1, (side, 2, side, 2)).transpose(2, 3)  # 2 x 2 patches become one token
        return [self.projector(h.reshape(-1, 4 * h.shape[-1]))]

    read = QwenVL.read


class VitaProcessor(Processor):
    """Pictures as squares of `size` pixels (VITA-VLA: 200, 49 tokens) and prompts for `Vita15`."""

    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)

    def __init__(self, path, patch, size=200):
        with quiet():  # the library wonders at a config.json that it does not know
            self.tokenizer = AutoTokenizer.from_pretrained(path, **OURS)
        self.image_token_id = self.tokenizer.convert_tokens_to_ids(self.image)
        self.pad_token_id = self.tokenizer.convert_tokens_to_ids("<|endoftext|>")
        self.patch, self.merge, self.size = patch, 2, size
        for word in (self.image, "<|video_pad|>", "<|endoftext|>"):
            if word not in self.tokenizer.get_vocab():
                raise UserError(f"{path}: its tokenizer lacks {word}, a place for other vectors")
        if size // patch % 2 or size < 2 * patch:
            near = max(round(size / patch / 2), 1) * 2 * patch
            raise UserError(f"--size {size}: {path} reads 2 x 2 patches of {patch} pixels as one "
                            f"token; take {near}")  # fmt: skip

    def images(self, images):
        shape = self.size, self.size
        fitted = [Image.fromarray(i).resize(shape, Image.Resampling.BICUBIC) for i in images]
        x = np.stack([np.asarray(i, np.float32) / 255 for i in fitted])
        x = (x - np.float32(self.mean)) / np.float32(self.std)
        side = self.size // self.patch
        return x.transpose(0, 3, 1, 2), ((1, side, side),) * len(images)

    def mark(self, n):
        return self.image * n

    def pad(self, rows, grids, **words):
        prompt = super().pad(rows, [()] * len(rows), **words)  # text positions alone: no grids
        return prompt | {"position_ids": prompt["position_ids"][0]}


def vita_name(name):
    """A released VITA-1.5 weight's name -> ours; None for what is not used (audio, lm_head)."""
    if name.startswith(("model.audio_encoder.", "lm_head.")):
        return None
    if name.startswith("model.mm_projector."):
        return name.replace("model.mm_projector", "projector")
    head, _, rest = name.partition("model.vision_tower.vision_tower.")
    if head:
        return name.replace("model.", "language.", 1)
    for old, new in (
        ("encoder.layers", "encoder.layer"), ("class_embedding", "cls_token"),
        ("position_embedding", "position_embeddings"), (".ls1", ".lambda_1"), (".ls2", ".lambda_2"),
        ("patch_embedding", "patch_embeddings.projection"), (".norm1", ".layernorm_before"),
        (".norm2", ".layernorm_after"), ("attn.proj", "attention.projection_layer"),
        (".attn.", ".attention."),
    ):  # fmt: skip
        rest = rest.replace(old, new)
    return "vision." + rest


def vita_released(name):
    """Our name of a weight -> the released one; in the vision tower, where more differs, ours."""
    for ours, theirs in (("language.", "model."), ("projector.", "model.mm_projector.")):
        if name.startswith(ours):
            return name.replace(ours, theirs, 1)
    return name


def qwen2_config(settings):
    """What a released config.json says of its Qwen2.5 -> the library's configuration."""
    known = {k: v for k, v in settings.items() if k in transformers.Qwen2Config().to_dict()}
    rope = {"rope_type": "default", "rope_theta": settings.get("rope_theta", 1e6)}
    return transformers.Qwen2Config(**(known | {"model_type": "qwen2", "rope_parameters": rope}))


INTERN_VIT = dict(
    attention_bias=True, use_qk_norm=False, use_absolute_position_embeddings=True,
    use_mean_pooling=True, norm_type="layer_norm", layer_norm_eps=1e-6,
)  # fmt: skip


def load_vita(path, size=200, frozen="fp32"):
    """A folder with VITA-1.5's released files -> Vita15, VitaProcessor. A weight that is missing or
    surplus is an error that names it. In memory the weights are but once."""
    folder, tensors = Path(path), {}
    settings = json.loads((folder / "config.json").read_text())
    for file in sorted(folder.glob("*.safetensors")):
        try:
            with safe_open(file, "pt") as opened:
                for name in filter(vita_name, opened.keys()):
                    shape = opened.get_slice(name).get_shape()
                    tensor = torch.empty(shape) if blank() else opened.get_tensor(name)
                    tensors[vita_name(name)] = tensor if frozen == "bf16" else tensor.float()
        except SafetensorError:
            raise UserError(f"{file} is damaged or cut short, fetch it again") from None
    for name in [n for n in tensors if ".attention.qkv." in n]:  # three matrices in one
        for part, value in zip("qkv", tensors.pop(name).chunk(3)):
            tensors[name.replace("qkv", f"{part}_proj")] = value
    try:
        patches = tensors["vision.embeddings.patch_embeddings.projection.weight"]
        places = tensors["vision.embeddings.position_embeddings"].shape[1] - 1
        hidden, patch = patches.shape[0], patches.shape[-1]
        vision_config = transformers.InternVLVisionConfig(
            **INTERN_VIT, hidden_size=hidden, num_attention_heads=max(hidden // 64, 1),
            num_hidden_layers=len({n.split(".")[3] for n in tensors if "encoder.layer." in n}),
            intermediate_size=tensors["vision.encoder.layer.0.mlp.fc1.bias"].shape[0],
            patch_size=patch, image_size=round(math.sqrt(places)) * patch,
        )  # fmt: skip
        config = qwen2_config(settings)
        with torch.device("meta"):
            model = Vita15(config, vision_config)
        missing, surplus = model.load_state_dict(tensors, strict=False, assign=True)
        if not blank():  # what the rotation is made of is in no file
            model.language.rotary_emb = type(model.language.rotary_emb)(config)
    except (KeyError, RuntimeError) as error:
        raise UserError(f"{path} is no VITA-1.5: {str(error).splitlines()[-1]}") from None
    if missing or surplus:
        bad = vita_released((missing or surplus)[0])
        what = f"lacks {bad}" if missing else f"has a surplus weight, {bad}"
        raise UserError(f"{path} does not fit VITA-1.5: it {what}")
    return model.eval(), VitaProcessor(path, patch, size)


def released(name):
    """A backbone's folder; of one on the hub, all its files, downloaded."""
    path = BACKBONES.get(name, name)
    if Path(path).is_dir():
        return path
    try:
        return snapshot_download(path)
    except (OSError, ValueError) as error:
        raise UserError(f"--backbone {name}: `hf download {path} --local-dir DIR`, then "
                        "--backbone DIR") from error  # fmt: skip


def load_vlm(name, size=200, frozen="fp32"):
    """`--backbone` -> a VLM with see() and read(), its processor. size: of VITA-1.5's pictures."""
    path = BACKBONES.get(name, name)
    if path == BACKBONES["VITA-1.5"] and blank():
        settings = settings_of("VITA-1.5")
        vision = transformers.InternVLVisionConfig(**INTERN_VIT, **settings["vision_config"])
        tiny = BACKBONES["tiny"]
        return Vita15(qwen2_config(settings), vision), VitaProcessor(tiny, vision.patch_size[0])
    path = released(name) if path == BACKBONES["VITA-1.5"] else path
    if (Path(path) / "config.json").exists():
        with loading(name, path):
            if "vita" in str(settings_of(path).get("model_type")).lower():
                return load_vita(path, size, frozen)
    vlm, processor = load_backbone(name, frozen)
    return QwenVL(vlm), processor


# --- Eagle2, InstructVLA's VLM: SigLIP, pixel shuffle, LayerNorm and MLP, Qwen2.5 -----------------

EAGLE = {  # released names -> those of the library's InternVL, which has the same parts
    "vision_model.vision_model.": "model.vision_tower.",
    "language_model.model.": "model.language_model.",
    "language_model.lm_head.": "lm_head.",
    "mlp1.0.": "model.multi_modal_projector.layer_norm.",
    "mlp1.1.": "model.multi_modal_projector.linear_1.",
    "mlp1.3.": "model.multi_modal_projector.linear_2.",
}


def eagle_config(settings):
    """Eagle2's config.json -> an InternVL with SigLIP in the place of its InternViT."""
    text = qwen2_config(settings.get("llm_config") or settings["text_config"])
    wanted = transformers.SiglipVisionConfig().to_dict()
    vision = {k: v for k, v in settings["vision_config"].items() if k in wanted}
    vision |= {"model_type": "siglip_vision_model", "vision_use_head": False}  # patches alone
    return transformers.InternVLConfig(
        text_config=text, vision_config=transformers.SiglipVisionConfig(**vision),
        downsample_ratio=settings.get("downsample_ratio", 0.5),
        vision_feature_layer=settings.get("select_layer", -1),
        vision_feature_select_strategy="full", tie_word_embeddings=text.tie_word_embeddings,
    )  # fmt: skip


def load_eagle(path, config, dtype):
    """Eagle2's released files -> the library's model, EagleProcessor. A weight that is missing,
    surplus or of another shape is an error that names it."""
    processor = EagleProcessor(path, config.vision_config)
    config.image_token_id = processor.image_token_id
    with quiet():  # what does not fit is said below
        vlm, report = transformers.InternVLForConditionalGeneration.from_pretrained(
            path, config=config, dtype=dtype, output_loading_info=True, use_safetensors=True,
            ignore_mismatched_sizes=True, key_mapping={f"^{k}": v for k, v in EAGLE.items()},
            **OURS,
        )  # fmt: skip
    surplus = [n for n in report["unexpected_keys"] if ".head." not in n]  # SigLIP's pooling
    shapes = [entry[0] for entry in report["mismatched_keys"]]
    for what, names in (("lacks", report["missing_keys"]), ("has a surplus weight,", surplus),
                        ("has another shape of", shapes)):  # fmt: skip
        if names:
            raise UserError(f"{path} does not fit Eagle2: it {what} {eagle_name(min(names))}")
    return vlm.eval(), processor


def eagle_name(name):
    """The library's name of a weight -> the released one."""
    for old, new in EAGLE.items():
        if name.startswith(new):
            return name.replace(new, old, 1)
    return name


@lru_cache(maxsize=8192)
def plain_chat(tokenizer, system, user, answer):
    """One conversation in Qwen's markup -> (ids of the prompt, ids of the answer and its end)."""
    text = f"<|im_start|>system\n{system}<|im_end|>\n" if system else ""
    text += f"<|im_start|>user\n{user}<|im_end|>\n<|im_start|>assistant\n"
    end = answer + tokenizer.eos_token if answer else ""
    return tuple(tuple(tokenizer.encode(t, add_special_tokens=False)) for t in (text, end))


class EagleProcessor(VitaProcessor):
    """One tile a picture (448 pixels, 256 tokens), in Eagle2's markup."""

    image, mean, std = "<IMG_CONTEXT>", (0.5,) * 3, (0.5,) * 3

    def __init__(self, path, vision):
        super().__init__(path, vision.patch_size, vision.image_size)

    def mark(self, n):
        return f"<img>{self.image * n}</img>"

    def prompt(self, system, user, grids, answer=""):
        marks = [self.mark(math.prod(grid) // self.merge**2) for grid in grids]
        if len(marks) > 1:
            marks = [f"<image {i + 1}>{mark}" for i, mark in enumerate(marks)]
        user = "\n".join([*marks, user.removeprefix("\n")])
        return plain_chat(self.tokenizer, system, user, answer)


# --- what a backbone consists of, and what became of it -------------------------------------------


def describe(name, load, builds) -> None:
    """--describe: parameters by part of a backbone, load(name) -> (model, processor), and of each
    of the models around it, {what: function -> model}."""
    with torch.device("meta"):
        models = {f"backbone {name}": load(name)[0]} | {w: build() for w, build in builds.items()}
    said = json.loads(SIZES.read_text()).get(name, {}).get("published", "embedded or your own")
    for what, model in models.items():
        parts = {}
        for full, p in model.named_parameters():
            part = re.match(r"(?:(\w+)\.)??(?:model\.)?(visual|vision\w*|multi_modal_projector|"
                            r"projector|language\w*|lm_head)\.", full)  # fmt: skip
            part = ".".join(filter(None, part.groups())) if part else full.partition(".")[0]
            counts = parts.setdefault(part, [0, 0])
            counts[0] += p.numel()
            counts[1] += p.numel() * p.requires_grad
        parts["all"] = [sum(column) for column in zip(*parts.values())]
        print(f"{what:32} {'total':>15} {'trainable':>15} {'frozen':>15}")
        for part, (total, trained) in parts.items():
            print(f"  {part:30} {total:15,} {trained:15,} {total - trained:15,}")
        if what.startswith("backbone"):
            print(f"  published: {said:,}" if isinstance(said, int) else f"  published: {said}")


PROCESSOR_FILES = ("preprocessor_config.json", "processor_config.json", "chat_template.json",
                   "video_preprocessor_config.json", "generation_config.json")  # fmt: skip


def export_backbone(vlm, name, tokenizer, out) -> None:
    """--export: a trained VLM as an ordinary Hugging Face checkpoint with the files that its
    tokenizer and processor are made of; name: the backbone it began as. A head that it lacks is
    the backbone's own or, where words are tied, that of its words."""
    if isinstance(vlm, Vita15):
        return export_vita(vlm, name, out)
    if isinstance(vlm, QwenVL):
        whole, _ = load_backbone(name)
        whole.model.load_state_dict(vlm.model.state_dict())
        vlm = whole
    if vlm.config.model_type == "internvl":
        return export_eagle(vlm, name, tokenizer, out)
    out = new_folder(out)
    vlm.save_pretrained(out)
    tokenizer.save_pretrained(out)
    for file in PROCESSOR_FILES:
        path = BACKBONES.get(name, name)
        if found := cached_file(path, file, _raise_exceptions_for_missing_entries=False):
            shutil.copy(found, out)
    print(f"AutoModelForImageTextToText.from_pretrained({str(out)!r}) loads it")


def export_eagle(vlm, name, tokenizer, out) -> None:
    """The same in Eagle2's released layout, which the library has no class for."""
    folder, out = released(name), new_folder(out)
    copy_files(folder, out, leave=(".safetensors", ".index.json"))
    settings = json.loads((out / "config.json").read_text())
    text = settings.get("llm_config") or settings["text_config"]
    text["vocab_size"] = vlm.lm_head.out_features
    write_json(out / "config.json", settings)
    tensors = vlm.state_dict()
    tied = tied_names(tensors)
    tensors = {eagle_name(n): t for n, t in tensors.items() if n not in tied}
    write_weights(out / "model.safetensors", tensors)
    tokenizer.save_pretrained(out)
    print(f"{out} has Eagle2's released layout: what reads {name} reads it")


def export_vita(model, name, out) -> None:
    """A trained Vita15 in VITA-1.5's released layout: in its files, the language model replaced."""
    folder, out, ours = released(name), new_folder(out), model.state_dict()
    copy_files(folder, out, leave=(".safetensors",))
    for file in sorted(Path(folder).glob("*.safetensors")):
        tensors = load_file(file)
        for name in tensors:
            if (vita_name(name) or "").startswith("language."):
                tensors[name] = ours[vita_name(name)].contiguous()
        save_file(tensors, out / file.name, {"format": "pt"})
    print(f"{out} has VITA-1.5's released layout: what reads that reads it")


def copy_files(folder, out, leave) -> None:
    """Files and folders, without those whose names end so."""
    for item in Path(folder).iterdir():
        if item.is_dir():
            shutil.copytree(item, out / item.name)
        elif not item.name.endswith(leave):
            shutil.copy(item, out)


def new_folder(folder) -> Path:
    folder = Path(folder)
    if folder.exists() and any(folder.iterdir()):
        raise UserError(f"{folder} is not empty: another --out")
    folder.mkdir(parents=True, exist_ok=True)
    return folder
