"""What step.py and latency.py share: each method's model at any size, trained or with weights drawn
at random, batches of a few demonstrations, and a clock of its parts."""

import importlib.util
import sys
import tempfile
import time
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np  # noqa: E402
import torch  # noqa: E402
from transformers import AutoTokenizer  # noqa: E402

import common  # noqa: E402
import data  # noqa: E402
import dualvla  # noqa: E402
import twinbrain  # noqa: E402
import vita_vla  # noqa: E402
from parts import backbones, process, seer  # noqa: E402

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
SCRIPTS = {"twinbrain": twinbrain, "vita_vla": vita_vla, "dualvla": dualvla}
SMALLER = ({}, {"optimizer": "adamw8bit"}, {"lora": 32})  # tried in turn where a GPU is too small


def config(method, flags, stage=""):
    """A script's own flags -> its Config, of one stage; what no flag says is that stage's."""
    script = SCRIPTS[method]
    cfg = common.parse(script.Config, script.PRESETS, script.ABLATIONS, flags)
    common.refuse({
        f"--brain {getattr(cfg, 'brain', '')}: the twin is timed here, and with --variants vanilla "
        "its right brain alone": getattr(cfg, "brain", "twin") == "vanilla",
        "--head oft, fast and --actions tokens have no flow, which is timed here":
            getattr(cfg, "head", "flow") in ("oft", "fast")
            or getattr(cfg, "actions", "flow") == "tokens",
    })  # fmt: skip
    if method == "dualvla":
        kept = {name: getattr(cfg, name) for name in cfg.explicit}
        cfg = replace(cfg, **dualvla.STAGES[stage] | {"lr": cfg.lr or 1e-3} | kept)
    cfg = replace(cfg, shard="none")  # as the scripts do where one process runs alone
    return replace(cfg, stage=stage) if stage else cfg


# --- models ---------------------------------------------------------------------------------------


@contextmanager
def drawn(device, dtype=torch.float32):
    """In here a backbone has its published size, and weights drawn at random on the device."""
    load, load_vlm, blank = common.load_backbone, common.load_vlm, common.blank

    def load_drawn(name, *_):
        vlm, processor = load(name)
        vision = vlm.config.vision_config
        if vlm.config.model_type == "internvl":
            processor = eagle_processor(vision)
        else:
            common.quick_vision(vlm)
            processor.patch, processor.merge = vision.patch_size, vision.spatial_merge_size
            processor.temporal = vision.temporal_patch_size
            if name != "tiny":  # as their preprocessor_config.json says
                processor.min_pixels = 65536 if processor.patch == 16 else 3136
                processor.max_pixels = 16777216
        vlm.config.image_token_id = processor.image_token_id
        for p in vlm.parameters():
            p.data = p.data.to(dtype)
        return vlm, processor

    def load_vlm_drawn(name, size=200, *_):
        torch.set_default_dtype(dtype)
        try:
            return load_vlm(name, size)
        finally:
            torch.set_default_dtype(torch.float32)

    common.load_backbone = backbones.load_backbone = load_drawn
    common.load_vlm = load_vlm_drawn
    common.blank = backbones.blank = seer.blank = lambda: True
    try:
        with torch.device(device):
            yield
    finally:
        common.load_backbone = backbones.load_backbone = load
        common.load_vlm = load_vlm
        common.blank = backbones.blank = seer.blank = blank


def eagle_processor(vision):
    """Eagle2's, with the embedded words and its marks of a picture."""
    tokenizer = AutoTokenizer.from_pretrained(common.BACKBONES["tiny"])
    tokenizer.add_tokens(["<img>", "<IMG_CONTEXT>", "</img>"], special_tokens=True)
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        return common.EagleProcessor(folder, vision)


def clip_words(texts, **_):
    """In the place of CLIP's tokenizer: 77 words for each text."""
    return {"input_ids": torch.randint(1000, (len(texts), 77))}


def build(method, cfg, random, device=DEVICE):
    """-> model on the device, its processor. random: weights drawn, none loaded."""
    dims = () if method == "vita_vla" else (8, 7)
    if random:  # its files are on the hub
        seer.clip_tokenizer = lambda: clip_words
    half = cfg.frozen == "bf16" and process.in_bf16(DEVICE, cfg.dtype)  # never whole in float32
    dtype = torch.bfloat16 if half else torch.float32
    with drawn(device, dtype) if random else nullcontext():
        model, processor = SCRIPTS[method].build(cfg, *dims)
    common.store_frozen(model, cfg, DEVICE)
    return model.to(device), processor


def build_all(method, cfg, random, device=DEVICE):
    """-> model, processor, the frozen teachers of this stage: none, Seer, or E and G."""
    model, processor = build(method, cfg, random, device)
    known = {("vita_vla", "align"): ["teacher"], ("dualvla", "dual"): ["expert", "generalist"]}
    teachers = []
    for stage in known.get((method, getattr(cfg, "stage", "")), []):
        teacher = build(method, replace(cfg, stage=stage), random, device)[0].eval()
        common.store_frozen(teacher.requires_grad_(False), cfg, DEVICE)
        teachers.append(teacher)
    return model, processor, teachers


def fitting(method, cfg):
    """The Config, or the first of SMALLER whose weights, gradients and optimizer leave two fifths
    of this GPU to activations: at the papers' batches they take as much as what trains."""
    if DEVICE.type == "cpu":
        return cfg
    there = common.device_memory(DEVICE)
    for more in SMALLER:
        known = hasattr(cfg, "lora") or "lora" not in more
        if known and (more.get("optimizer") != "adamw8bit" or importlib.util.find_spec("torchao")):
            tried = replace(cfg, **more)
            model, _, teachers = build_all(method, tried, True, "meta")
            rows = [r for m in (model, *teachers) for r in common.memory_rows(m, tried).values()]
            need = sum(map(sum, rows))
            if need < 0.6 * there:
                return tried
    raise common.UserError(f"{common.size(need)} do not fit in this GPU's {common.size(there)}")


# --- batches and policies -------------------------------------------------------------------------


def demonstrations(cfg, count=4):
    return [data.record(cfg.world, i, cfg.size, cfg.wrist_size, cfg.noise) for i in range(count)]


def batches(method, cfg, processor):
    """Batches as training reads them, of a few demonstrations."""
    episodes = demonstrations(cfg)
    stats = data.statistics(episodes)
    if method == "vita_vla":
        windows, join = vita_vla.Histories(episodes, stats, cfg), vita_vla.sense
    elif method == "dualvla":
        kept = [np.ones(len(e.action), bool) for e in episodes]
        windows, join = dualvla.Samples(episodes, stats, cfg, kept), dualvla.collate
    else:
        sides = cfg.size, cfg.wrist_size
        windows = data.Windows(episodes, stats, cfg.horizon, cfg.augment, sides)
        join = twinbrain.collate
    mixtures = [data.Mixture([windows], seed=cfg.seed)]
    mix = getattr(cfg, "mix", 0) or int(getattr(cfg, "cotrain", 0) > 0)
    if mix:
        mixtures.append(data.Mixture([data.Questions(cfg.size, cfg.wrist_size)], seed=cfg.seed))
    join = partial(join, cfg=cfg, processor=processor)
    return data.Batches(mixtures, join, cfg.batch, mix=mix)


def policy(method, cfg, random):
    """An untrained policy."""
    model, processor = build(method, cfg, random)
    stats = data.statistics(demonstrations(cfg, 1))
    return SCRIPTS[method].Policy(model.eval(), cfg, processor, {"tabletop": stats}, DEVICE)


# --- a clock of parts -----------------------------------------------------------------------------


class Clock:
    """A line of marks; the time from each to the next is that of its part. On a GPU they are events
    in its stream, so that it is not waited for. busy: counts the processor's seconds spent for this
    process instead of those of the wall, for a CPU that others use."""

    def __init__(self, busy=False):
        self.now = time.process_time if busy else time.perf_counter
        self.marks, self.open, self.watched = [], ["rest"], set()

    def mark(self, part):
        now = self.now()
        if DEVICE.type == "cuda":
            now = torch.cuda.Event(enable_timing=True)
            now.record()
        self.marks.append((part, now))

    @contextmanager
    def part(self, name):
        """What runs in here is that part's, without the parts that run inside it."""
        self.open.append(name)
        self.mark(name)
        try:
            yield
        finally:
            self.open.pop()
            self.mark(self.open[-1])

    def watch(self, owner, method, name):
        """Calls of `owner.method` are that part's; from when the gradient of what they return is
        there, the backward pass is this part's as well."""
        if (id(owner), method) in self.watched:
            return
        self.watched.add((id(owner), method))
        inner = getattr(owner, method)

        def timed(*args, **words):
            with self.part(name):
                out = inner(*args, **words)
            main = getattr(out, "pooler_output", getattr(out, "last_hidden_state", out))
            for x in [main] if isinstance(main, torch.Tensor) else main or ():
                if isinstance(x, torch.Tensor) and x.requires_grad:
                    x.register_hook(lambda _: self.mark(f"{name}, backward"))
            return out

        setattr(owner, method, timed)

    def read(self):
        """-> {part: seconds} since the last reading; the first mark began it, this one ends it."""
        self.mark("end")
        if DEVICE.type == "cuda":
            torch.cuda.synchronize()
        spent = {}
        for (part, a), (_, b) in zip(self.marks, self.marks[1:]):
            took = a.elapsed_time(b) / 1000 if DEVICE.type == "cuda" else b - a
            spent[part] = spent.get(part, 0.0) + took
        self.marks = []
        return spent


def watch(method, model, clock):
    """Pictures and words, vision, language, head: the parts that a step or a plan has."""
    clock.watch(SCRIPTS[method], "sense", "pictures and words")
    parts = []
    if method == "twinbrain":
        for side, vlm in (("left ", model.left), ("right ", model.right)):
            if vlm is not None:
                eyes = vlm.model, "get_image_features"  # Eagle's
                eyes = (vlm.model.visual, "forward") if hasattr(vlm.model, "visual") else eyes
                parts += [(*eyes, side + "vision")]
                parts += [(vlm.model.language_model, "forward", side + "language")]
        parts += [(model.expert, "keys", "head"), (model.expert, "forward", "head")]
    elif method == "dualvla":
        parts += [(model, "see", "vision")]
        parts += [(model.vlm.model.language_model, "forward", "language")]
        parts += [(model.flow, "prefix", "head"), (model.flow, "forward", "head")]
        parts += [(common, f"linear_{loss}", "words' losses") for loss in ("cross_entropy", "kl")]
    elif isinstance(model, vita_vla.Seer):
        parts += [(model.eyes, "forward", "vision"), (model, "hidden", "language")]
        parts += [(model, "imagine", "head"), (model.action_decoder, "forward", "head")]
    else:
        parts += [(model.vlm, "see", "vision"), (model.vlm.language, "forward", "language")]
        parts += [(model.mapper, "forward", "head"), (model.action_decoder, "forward", "head")]
    for part in parts:
        clock.watch(*part)
