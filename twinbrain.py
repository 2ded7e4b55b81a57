"""TwinBrainVLA (arXiv 2601.14133): a frozen VLM, its trainable twin, and a flow-matching expert.

      picture, instruction                   picture, instruction, robot state
             |                                           |
      [ left brain,  ]     keys and values,      [ right brain,  ]
      [ frozen       ] --- layer by layer,  ---> [ trained       ]       AsyMoT, Eq. 3-6
             |             no gradient                   |
      answers questions as                         H_R (B, T, D)
      it always did                                      |
                              noise a_0 ---> [ DiT, 4 Euler steps ] ---> action chunk (B, H, A)

Conventions: x_t = (1 - t) a_0 + t a_1 with the noise a_0 at t = 0 and the action a_1 at t = 1, so
the velocity is u_t = a_1 - a_0; actions and state are normalised to [-1, 1] between q01 and q99;
prompts are padded on the left. Words: docs/glossary.md. Letters: B batch, T tokens (T_L left, T_R
right), D width, H chunk, A action, S state, R noise draws, N tokens of the DiT, d width of a head.

Equation map
  Eq. 1   left input [V(I); T(T)]             -> TwinBrain.think()
  Eq. 2   right input [V(I); T(T); phi(s)]    -> embed()
  Eq. 3   left layers, frozen, to themselves  -> TwinBrain.think()
  Eq. 4   K_joint = [sg(K_L); K_R]            -> AsyMoT.update()
  Eq. 5   V_joint = [sg(V_L); V_R]            -> AsyMoT.update()
  Eq. 6   one softmax over both halves        -> joint_attention()
  Eq. 7   flow-matching loss                  -> flow_loss()
  Eq. 8   the action loss alone               -> total_loss()
  Eq. 9   distillation of hidden states       -> feature_loss()
  Eq. 10  the student's objective             -> total_loss()
Table map (`--ablation list`: the paper's number beside ours): Table 1 t1-*, Table 5 t5-*, Table 6
t6-*, Table 9 t9-*, Figure 2 f2-*, baselines c-*; ours: visibility-index, no-deepstack, no-state.

Assumptions, where the paper is silent
  A1  The right brain sees every left token and is causal on itself (`--visibility all`); the only
      public code hides left tokens behind the right token's own index (`--visibility index`).
  A2  Interval k: layer l is joint if l % (k + 1) == 0, plain self-attention otherwise.
  A3  DeepStack stays on in both brains (the public code drops it: no longer the pretrained model).
  A4  The DiT is the framework's, but its time is continuous and its decoder no wider than it: even
      blocks see H_R, odd ones the action tokens; t is 1 - Beta(1.5, 1); R noise draws; lr 1e-4.
  A5  phi(s) is the last token of the right prompt (QwenOFT's slots and QwenFAST's words follow it).
      At paper scale simulation runs without (App. B).
  A6  Actions past an episode's end leave the loss (public code repeats the last one, unmasked),
      but QwenFAST's, whose words mix all steps of a chunk.
  A7  Co-training adds as many questions as actions to each step, their loss weighted 0.1; it, and
      QwenFAST's, is a mean over the words of a process's batch.
  A8  QwenPI: a cross- and a self-attention block for each layer's output, before DeepStack joins.
Errata: Eq. 3 and 6 write Attn + FFN(H); the layers are ordinary pre-norm blocks with residuals.
Appendix C calls QwenOFT discrete and autoregressive; the framework's, and ours, is continuous,
parallel and trained with L1 (parts/starvla.py).

  python twinbrain.py                                        # laptop: trains, acts, draws
  torchrun twinbrain.py --backbone Qwen3-VL-4B               # one GPU, the embedded world
  torchrun --nproc-per-node 8 twinbrain.py --data bridge,fractal --preset paper --accumulate 2
"""

import copy
import math
import time
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface, DynamicCache
from transformers.masking_utils import sdpa_mask

import common
import data
from parts import runs, starvla
from worlds import ablations, benchmarks, loop, pictures
from worlds.ablations import row

# --- Config: the defaults are the laptop's run ----------------------------------------------------


@dataclass
class Config:
    backbone: str = "tiny"  # tiny, Qwen3-VL-2B/4B/8B, Qwen2.5-VL-3B/7B, Eagle2-2B, folder or hub id
    world: str = "tabletop:bridge"  # where to act; its suite also gives the demonstrations
    data: str = ""  # recordings to train on, `bridge,fractal=2,FOLDER`; empty: the world's own
    skip_bad: bool = False  # leave out recordings that cannot be read, and list them
    robot: str = ""  # whose recordings to act like; empty: the first of --data
    out: str = ""  # run folder; empty: runs/<method>-<world>-<seed>-<time>
    steps: int = 2000  # optimizer steps (paper: 40000)
    seed: int = 0  # everything random follows from it
    resume: str = ""  # run folder to go on from, exactly; auto: --out's, or start it
    eval_only: str = ""  # run folder to evaluate, without training
    ablation: str = ""  # a row of the paper's tables; `list` prints them all
    preset: str = ""  # a named configuration, see below; of a --backbone but tiny: larger
    describe: bool = False  # prints the parameters of each part, without weights, and leaves
    export: str = ""  # run folder whose right brain becomes a Hugging Face checkpoint in --out
    benchmark: str = ""  # a question file (VLMEvalKit's TSV) that each brain answers, --eval-only
    episodes: int = 200  # evaluation episodes in each domain (paper: 480 on SimplerEnv)
    # the brains
    brain: str = "twin"  # twin | vanilla | nofreeze: Sec. 4, one brain, both trained (Table 5)
    interval: int = 0  # k, plain self-attention layers between joint ones (Table 6)
    visibility: str = "all"  # all | index: which left tokens a right token sees (A1)
    deepstack: bool = True  # DeepStack features in both brains (A3)
    attention: str = "library"  # library | kernel: of Eq. 6; bench/attention.py compares
    state: bool = True  # state token phi(s) in the right brain (Eq. 2; paper: off in simulation)
    # the action expert
    head: str = "flow"  # flow | pi | oft | fast: the paper's DiT, or a baseline (App. C, Table 2)
    horizon: int = 8  # H, actions in a chunk (paper: 16, LIBERO 8)
    width: int = 128  # DiT width (paper: 768)
    depth: int = 4  # DiT blocks (paper: 16)
    heads: int = 4  # DiT attention heads (paper: 12)
    future: int = 4  # learned future tokens beside the action tokens (paper: 32)
    dropout: float = 0.0  # inside the DiT (paper: 0.2)
    repeats: int = 4  # R, noise draws a sample (framework: 4)
    euler: int = 4  # integration steps when acting
    # training
    batch: int = 32  # samples of a process in one batch (paper: 16 on each of 16 GPUs)
    lr: float = 2e-3  # backbone (paper: 1e-5)
    lr_head: float = 2e-3  # DiT and state encoder (framework: 1e-4)
    min_lr: float = 0.0  # where the cosine ends, as a share of the peak
    warmup: int = 100  # steps of linear warm-up (framework: 5000)
    weight_decay: float = 1e-8  # of AdamW
    clip: float = 1.0  # gradient norm
    optimizer: str = "muon"  # adamw | adamw8bit | muon: matrices alone (paper: adamw)
    muon: str = ""  # bf16 | fp32: products inside Muon; empty: as --dtype
    cotrain: float = 0.0  # weight of the question loss, questions 1:1 with actions (Figure 2; A7)
    distill: str = ""  # the teacher's run folder, for Twin-to-One (Appendix G)
    distill_weight: float = 1.0  # lambda of Eq. 10
    dtype: str = "auto"  # auto | bf16 | fp32: arithmetic of the matrix products
    device: str = "auto"  # auto | cpu | cuda
    threads: int = 0  # CPU threads of a process; 0: torch's choice
    workers: int = 0  # loader processes
    # memory and processes: what trains is float32, with float32 optimizer state (but adamw8bit's)
    accumulate: int = 1  # batches of a process in one step
    frozen: str = "fp32"  # fp32 | bf16: what stands still is stored so, where products are bf16
    grad_checkpoint: bool = False  # keep a block's input alone, compute the rest again
    compile: bool = False  # torch.compile each block; on a CPU no gain was seen
    shard: str = "none"  # none | full: a copy on each process (DDP), or a share each (FSDP2)
    replicate_left: bool = False  # --shard full leaves the frozen left brain whole everywhere
    lora: int = 0  # rank R: LoRA on the right brain's language model; 0: all of its weights train
    # demonstrations of the embedded world
    demos: int = 2000  # episodes
    noise: float = 0.3  # disturbances while the expert demonstrates, for recovery
    size: int = 64  # static camera, pixels
    wrist_size: int = 32  # wrist camera, pixels
    augment: int = 0  # random shift of the pictures, in 64ths of their side
    normalise: str = "auto"  # auto | q99 | minmax: bounds of actions, state; auto: see SOURCES
    # evaluation and logging
    domains: tuple[str, ...] = ()  # what differs from training; empty: all that the suite knows
    execute: int = 2  # actions executed of each chunk (paper: LIBERO all 8, GR1 12 of 16)
    ensemble: bool = False  # plan every step, blend the last 7 chunks (SimplerEnv)
    parallel: int = 50  # episodes acted side by side; they share a generator of noise
    gifs: int = 2  # rollouts drawn in each domain
    render: str = "gif"  # gif | mp4 | show: what they become; show plays them in the terminal too
    questions: int = 100  # of each of the four kinds (POPE, SEED-Bench, ScienceQA, MME)
    qa_every: int = 0  # steps between measurements of the general abilities; 0: at the end
    log_every: int = 20  # steps between log lines
    save_every: int = 500  # steps between checkpoints


PAPER = dict(
    backbone="Qwen3-VL-4B", steps=40_000, batch=16, optimizer="adamw", lr=1e-5, lr_head=1e-4,
    min_lr=0.05, warmup=5000, state=False, horizon=16, width=768, depth=16, heads=12, future=32,
    dropout=0.2, size=224, wrist_size=224, augment=0, execute=1, ensemble=True, episodes=480,
    workers=4, frozen="bf16", shard="full",  # else no GPU of 80 GB has room for it
)  # fmt: skip
LIBERO = dict(steps=100_000, min_lr=0.1, horizon=8, normalise="minmax", execute=8)
LIBERO |= dict(ensemble=False, episodes=500)
SHORT = dict(steps=1000, episodes=100, domains=("in", "colour", "shape", "pair", "wording"))
LARGER = {k: PAPER[k] for k in ("optimizer", "lr_head", "width", "depth", "heads", "future",
          "batch", "size", "wrist_size", "workers", "frozen")} | dict(lora=32, lr=1e-4)  # one GPU
PRESETS = {"paper": PAPER, "libero": PAPER | LIBERO, "short": SHORT, "larger": LARGER}  # App. B, F

ABLATIONS = {  # the paper's average in % (Qwen3-VL-4B, SimplerEnv), what it calls the row, flags
    "t1-twin": row(64.5, "Table 1, TwinBrainVLA"),
    "t1-vanilla": row(55.2, "Table 1, Vanilla VLA", brain="vanilla"),
    "t5-no-freezing": row(58.8, "Table 5, No Freezing", brain="nofreeze"),
    "t6-k1": row(64.1, "Table 6, k = 1", interval=1),
    "t6-k2": row(66.7, "Table 6, k = 2", interval=2),
    "t6-k4": row(62.5, "Table 6, k = 4", interval=4),
    "t6-k8": row(61.9, "Table 6, k = 8 (tiny has 4 layers: as k = 4)", interval=8),
    "t9-student": row(58.4, "Table 9, Twin-to-One (takes --distill)", brain="vanilla"),
    "f2-vla": row(None, "Figure 2, VLA training", brain="vanilla", qa_every=100),
    "f2-cotrain": row(None, "Figure 2, co-training", brain="vanilla", qa_every=100, cotrain=0.1),
    "f2-twin": row(None, "Figure 2, measured on TwinBrainVLA", qa_every=100),
    "c-pi": row(None, "App. C, QwenPI (GR1: 43.9)", brain="vanilla", head="pi"),
    "c-oft": row(None, "App. C, QwenOFT (GR1: 48.8)", brain="vanilla", head="oft"),
    "c-fast": row(None, "Table 2, QwenFAST (GR1: 39.0)", brain="vanilla", head="fast"),
    "visibility-index": row(None, "ours: index-causal visibility", visibility="index"),
    "no-deepstack": row(None, "ours: without DeepStack", deepstack=False),
    "no-state": row(None, "ours: without phi(s)", state=False),
}


def ours(line):
    """A line of assets/results -> what `--ablation list` shows, % in-domain and out of domain."""
    outside = [line["domains"][n]["success"] for n in loop.OUTSIDE if n in line["domains"]]
    return 100 * line["success"], 100 * np.mean(outside) if outside else np.nan


# --- Prompts (Appendix E), and the one path from observations to tensors --------------------------

SYSTEM_L = "You are a helpful robot brain that can understand images and texts."
SYSTEM_R = (
    "You are a helpful robot brain that can understand images, texts, and robot states.\n"
    "You will be provided with observation, an instruction, and the robot state. "
    "Take action to execute the instruction."
)
USER_L = "\nInstruction: {instruction}"
USER_R = (
    USER_L + "\nRobot Type: {robot}"
    "\nPredict the next action for the robot based on the observation, instruction and robot type."
)


def sense(samples, cfg, processor):
    """Samples with "images", "instruction", "robot", "state" (normalised) and, in training,
    "action" (H, A), "mask" (H,) -> batch. Training and acting come through here: they see alike."""
    pixels, grids, left, right, said = [], [], [], [], []
    for sample in samples:
        words = dict(instruction=sample["instruction"], robot=sample["robot"])
        patches, grid = processor.images(sample["images"])
        pixels.append(patches)
        grids.append(grid)
        left.append(processor.prompt(SYSTEM_L, USER_L.format(**words), grid)[0])
        right.append(processor.prompt(SYSTEM_R, USER_R.format(**words), grid)[0])
        if cfg.state:
            right[-1] += (processor.pad_token_id,)  # phi(s) will stand here
        if cfg.head == "oft":
            right[-1] += starvla.ask(processor.tokenizer, cfg.horizon)
        if cfg.head == "fast" and "action" in sample:
            said.append(processor.fast.encode(sample["action"]))
            right[-1] += said[-1]
    slots = {"slots": starvla.slot(processor.tokenizer)} if cfg.head == "oft" else {}
    batch = {
        "left": processor.pad(left, grids),
        "right": processor.pad(right, grids, **slots),
        "pixel_values": torch.from_numpy(np.concatenate(pixels)),
        "grids": [g for grid in grids for g in grid],
        "state": torch.from_numpy(np.stack([s["state"] for s in samples])),  # (B, S)
    }
    if said:
        common.label(batch["right"], said)
    if "action" in samples[0]:
        batch["action"] = torch.from_numpy(np.stack([s["action"] for s in samples]))  # (B, H, A)
        batch["mask"] = torch.from_numpy(np.stack([s["mask"] for s in samples]))  # (B, H)
    return batch


def collate(samples, cfg, processor):
    """Action samples and, when co-training, as many questions -> one batch."""
    batch = sense([s for s in samples if "action" in s], cfg, processor)
    asked = [s for s in samples if "question" in s]
    return batch | ({"questions": common.ask(asked, processor, SYSTEM_L)} if asked else {})


# --- Model: two brains joined by AsyMoT (Section 4.1) ---------------------------------------------


class AsyMoT(DynamicCache):
    """The right brain's cache: hands each layer the left brain's keys and values before its own.

    left: the left brain's filled cache, or None; interval: k of Table 6; sever: stop the gradient;
    keep: for decoding; without, a layer may be computed twice, as --grad-checkpoint does.
    """

    def __init__(self, left, interval=0, sever=True, keep=True):
        super().__init__()
        self.left, self.interval, self.sever, self.keep = left, interval, sever, keep

    def update(self, k_R, v_R, layer, *args, **kwargs):
        """(B, kv heads, T_R, d) keys (after RoPE) and values -> the same over T_L + T_R."""
        if self.keep:
            k_R, v_R = super().update(k_R, v_R, layer, *args, **kwargs)
        if self.left is None or layer % (self.interval + 1):  # ABLATION T6, ASSUMPTION A2
            return k_R, v_R
        k_L, v_L = self.left.layers[layer].keys, self.left.layers[layer].values
        if self.sever:
            k_L, v_L = k_L.detach(), v_L.detach()
        k_joint = torch.cat([k_L, k_R], dim=2)  # [sg(K_L); K_R]  # Eq. (4)
        v_joint = torch.cat([v_L, v_R], dim=2)  # [sg(V_L); V_R]  # Eq. (5)
        return k_joint, v_joint


def joint_attention(module, q_R, k, v, mask, scaling=None, kernel=False, **_):
    """Right queries over the keys the cache handed out; without left ones, the mask's right part.

    While `joint_attention.maps` is a list, each joint layer appends what the last token looks at,
    (B, heads, T_L + T_R): Figure 5.
    """
    mask = mask[..., -k.shape[2] :]
    if joint_attention.maps is not None and k.shape[2] > q_R.shape[2]:
        k_all = k.repeat_interleave(module.num_key_value_groups, dim=1)
        scores = (k_all.float() * q_R[:, :, -1:]).sum(-1) * scaling
        joint_attention.maps.append(scores.masked_fill(~mask[:, :, -1], -torch.inf).softmax(-1))
    attend = common.attend_joint if kernel else common.attend
    # softmax(Q_R K_joint^T / sqrt(d)) V_joint
    y = attend(q_R, k, v, mask, scaling)  # Eq. (6)
    return y.transpose(1, 2), None


joint_attention.maps = None
for name in ("asymot", "asymot_kernel"):
    AttentionInterface.register(name, partial(joint_attention, kernel=name == "asymot_kernel"))
    AttentionMaskInterface.register(name, sdpa_mask)


def joint_mask(real_L, real_R, visibility):
    """real_L (B, T_L), real_R (B, T_R) bool -> (B, 1, T_R, T_L + T_R): what a right token sees."""
    sees = real_R[:, :, None] & real_L[:, None, :]  # ASSUMPTION A1
    if visibility == "index":
        order_L, order_R = real_L.cumsum(1), real_R.cumsum(1)  # place among the real tokens
        sees = sees & (order_L[:, None, :] <= order_R[:, :, None])
    return torch.cat([sees[:, None], common.causal_mask(real_R)], dim=-1)


def embed(vlm, prompt, state_token=None, pad=None):
    """Prompt ids (B, T) -> (B, T, D), phi(s) in its place; the pictures go in inside the VLM."""
    x = vlm.get_input_embeddings()(prompt["input_ids"])  # (B, T, D)
    if state_token is not None:
        place = (prompt["real"] & (prompt["input_ids"] == pad))[..., None]  # ASSUMPTION A5
        # H_R^0 = [V(I); T(T); phi(s)]
        x = torch.where(place, state_token[:, None].to(x.dtype), x)  # Eq. (2)
    return x


class TwinBrain(nn.Module):
    """Brains and action expert; `--brain vanilla` is the framework's QwenGR00T."""

    def __init__(self, cfg, vlm, processor, state_dim, action_dim):
        super().__init__()
        self.cfg, self.processor = cfg, processor
        if not cfg.deepstack:
            common.drop_deepstack(vlm)
        name = "asymot" if cfg.attention == "library" else "asymot_kernel"
        vlm.model.language_model.config._attn_implementation = name
        tied = vlm.lm_head.weight is vlm.get_input_embeddings().weight
        # with LoRA both brains have the same frozen matrices: one copy, where none is sharded
        same = vlm.parameters() if cfg.lora and cfg.shard == "none" else ()
        same = {id(p): p for p in same}
        self.left = None if cfg.brain == "vanilla" else copy.deepcopy(vlm, same)
        if self.left is not None:
            self.left.requires_grad_(cfg.brain == "nofreeze")  # ABLATION T5
            if not tied:
                self.left.lm_head.requires_grad_(False)
        self.right = vlm
        if not (tied or cfg.cotrain or cfg.head == "fast"):
            vlm.lm_head.requires_grad_(False)  # no loss reaches it
        if cfg.lora:
            vlm.requires_grad_(False)
            common.add_lora(vlm.model.language_model.layers, cfg.lora)
        # weights that stay the backbone's own: no checkpoint holds them
        alone = (("left.",) if cfg.brain != "nofreeze" else ()) + (("right.",) if cfg.lora else ())
        names = [n for n in self.state_dict() if not n.endswith((".down", ".up"))]
        self.untouched = {n for n in names if n.startswith(alone)}
        text = vlm.config.get_text_config()
        D, layers = text.hidden_size, text.num_hidden_layers
        if cfg.state:
            self.phi = nn.Sequential(nn.Linear(state_dim, D), nn.SiLU(), nn.Linear(D, D))
        if cfg.head == "oft":
            self.expert = starvla.OFT(D, action_dim, cfg.horizon)
        elif cfg.head != "fast":
            depth = 2 * layers if cfg.head == "pi" else cfg.depth  # ASSUMPTION A8
            self.expert = DiT(cfg, D, action_dim, depth)

    def brains(self):
        return {"right": self.right} | ({"left": self.left} if self.left is not None else {})

    def blocks(self):
        """What is recomputed, compiled or sharded by itself; the left of nofreeze keeps a cache
        with gradients, which recomputing would fill twice."""
        frozen = self.cfg.brain != "nofreeze"
        brains = [self.right] + ([self.left] if self.left is not None and frozen else [])
        blocks = [b for vlm in brains for b in vlm.model.language_model.layers]
        blocks += [b for vlm in brains for b in common.vision_blocks(vlm.model)]
        return blocks + ([*self.expert.blocks] if self.cfg.head in ("flow", "pi") else [])

    def look(self, vlm, x, prompt, mask, cache, batch):
        """One pass of a brain over its embedded prompt (B, T, D) with the pictures put in."""
        seen, text = common.see(vlm.model, batch), vlm.model.language_model
        each = {"output_hidden_states": self.cfg.head == "pi"}
        return common.read(text, x, prompt, mask, seen, cache, **each)

    def think(self, batch):
        """-> the right brain's output (last_hidden_state is H_R (B, T_R, D)) and its cache."""
        left, right, frozen = batch["left"], batch["right"], self.cfg.brain != "nofreeze"
        left_cache, real_L = None, left["real"][:, :0]
        if self.left is not None:
            left_cache, real_L = DynamicCache(), left["real"]
            with torch.set_grad_enabled(torch.is_grad_enabled() and not frozen):
                x = embed(self.left, left)  # H_L^0 = [V(I); T(T)]  # Eq. (1)
                mask = common.causal_mask(real_L)
                self.look(self.left, x, left, mask, left_cache, batch)  # left to left  # Eq. (3)
        state_token = self.phi(batch["state"]) if self.cfg.state else None  # (B, D)
        x = embed(self.right, right, state_token, self.processor.pad_token_id)
        mask = joint_mask(real_L, right["real"], self.cfg.visibility)
        cache = AsyMoT(left_cache, self.cfg.interval, frozen, keep=not torch.is_grad_enabled())
        return self.look(self.right, x, right, mask, cache, batch), cache

    def forward(self, batch, noise=None, h_teacher=None):
        """Losses of one step, by name. noise: a_0 (B, R, H, A) and t (B, R)."""
        cfg, real, losses = self.cfg, batch["right"]["real"], {}
        out, _ = self.think(batch)
        h_R = out.last_hidden_state
        if cfg.head == "fast":
            losses["action"] = answer_loss(self.right, h_R, batch["right"])[0]
        elif cfg.head == "oft":
            error = (self.expert(h_R, batch["right"]["slots"]) - batch["action"]).abs()
            losses["action"] = masked_mean(error, batch["mask"])
        else:
            keys = self.expert.keys(self.conditions(out), real)
            losses["action"] = flow_loss(self.expert, keys, batch["action"], batch["mask"], *noise)
        if h_teacher is not None:
            losses["feature"] = feature_loss(h_R, h_teacher, real)
        if cfg.cotrain:
            losses["answer"] = self.answer(self.right, batch["questions"])[0]
        return losses

    def conditions(self, out):
        """What each cross-attention block reads: H_R (the paper), or layer i's states (QwenPI)."""
        if self.cfg.head == "pi":
            return list(out.hidden_states[1:])
        return [out.last_hidden_state] * ((self.cfg.depth + 1) // 2)

    def answer(self, vlm, asked):
        """Questions to one brain by itself -> cross-entropy, (B,) whether greedy decoding is right.

        Greedy decoding writes the answer if and only if each of its tokens is the likeliest one
        after those before it, so one pass decides.
        """
        prompt = asked["prompt"]
        x, mask = embed(vlm, prompt), common.causal_mask(prompt["real"])
        h = self.look(vlm, x, prompt, mask, None, asked).last_hidden_state
        return answer_loss(vlm, h, prompt)

    @torch.no_grad()
    def act(self, batch, a_0):
        """Batch without actions, noise a_0 (B, H, A) -> normalised action chunks (B, H, A)."""
        if self.cfg.head == "fast":
            fast = self.processor.fast
            return fast.decode(self.speak(batch, fast.H * fast.A, fast.end))
        out, _ = self.think(batch)
        if self.cfg.head == "oft":
            return self.expert(out.last_hidden_state, batch["right"]["slots"]).float()
        keys = self.expert.keys(self.conditions(out), batch["right"]["real"])
        return integrate(lambda x, t: self.expert(x, t, keys), a_0, self.cfg.euler)

    def speak(self, batch, limit, end=-1):
        """What the right brain says after its prompt, as QwenFAST does."""
        out, cache = self.think(batch)
        real_L = batch["left"]["real"] if self.left is not None else batch["left"]["real"][:, :0]
        sees = partial(joint_mask, real_L, visibility=self.cfg.visibility)
        return starvla.decode(self.right, out, cache, batch["right"], sees, limit, end)

    def write(self, vlm, asked, limit, end):
        """What one brain by itself says to questions."""
        prompt, cache = asked["prompt"], DynamicCache()
        mask = common.causal_mask(prompt["real"])
        out = self.look(vlm, embed(vlm, prompt), prompt, mask, cache, asked)
        return starvla.decode(vlm, out, cache, prompt, common.causal_mask, limit, end)


# --- Model: the flow-matching action expert (Section 4.2) -----------------------------------------


def sinusoid(t, width):
    """t (...,) in [0, 1] -> (..., width); a unit of time is the framework's thousand buckets."""
    rates = torch.exp(-math.log(1e4) * torch.arange(width // 2, device=t.device) / (width // 2))
    angle = 1000 * t[..., None] * rates
    return torch.cat([angle.cos(), angle.sin()], dim=-1)


class Block(nn.Module):
    """Attention, to the brain's tokens or among the action's, modulated by the time; then MLP."""

    def __init__(self, width, heads, condition=None, dropout=0.0):
        super().__init__()
        self.heads, self.dropout, self.cross = heads, nn.Dropout(dropout), condition is not None
        self.modulate = nn.Linear(width, 2 * width)
        self.norm = nn.LayerNorm(width, elementwise_affine=False)
        self.q = nn.Linear(width, width)
        self.kv = nn.Linear(condition or width, 2 * width)
        self.o = nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def split(self, x):
        """(B, N, width) -> (B, heads, N, d)."""
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)

    def project(self, h):
        """The brain's states (B, T, D) -> keys and values, (B, heads, T, d) each."""
        return [self.split(z) for z in self.kv(h).chunk(2, dim=-1)]

    def forward(self, x, time, keys=None):
        """x (B, R, N, width), time (B, R, width), keys: k, v, mask of the brain's tokens."""
        scale, shift = self.modulate(F.silu(time))[:, :, None].chunk(2, dim=-1)
        h = self.norm(x) * (1 + scale) + shift
        if self.cross:  # the R draws of a sample read the same keys: R * N queries, one attention
            y = common.attend(self.split(self.q(h).flatten(1, 2)), *keys)
        else:
            h = h.flatten(0, 1)  # (B * R, N, width)
            k, v = (self.split(z) for z in self.kv(h).chunk(2, dim=-1))
            y = common.attend(self.split(self.q(h)), k, v)
        y = self.dropout(self.o(y.transpose(1, 2).reshape(x.shape)))
        x = x + self.dropout(y)  # twice, as in the framework
        h = self.dropout(F.gelu(self.up(self.norm(x))))
        return x + self.dropout(self.down(h))


class DiT(nn.Module):
    """Velocity v_psi(x_t, t, H_R) of an action chunk."""

    def __init__(self, cfg, condition, action_dim, depth):
        super().__init__()
        D, self.horizon = cfg.width, cfg.horizon
        self.action_in = nn.Linear(action_dim, D)
        self.mix = nn.Sequential(nn.Linear(2 * D, D), nn.SiLU(), nn.Linear(D, D))
        self.time = nn.Sequential(nn.Linear(D, D), nn.SiLU(), nn.Linear(D, D))
        self.position = nn.Parameter(0.02 * torch.randn(cfg.horizon, D))
        self.future = nn.Parameter(0.02 * torch.randn(cfg.future, D))
        self.blocks = nn.ModuleList(
            Block(D, cfg.heads, condition if i % 2 == 0 else None, cfg.dropout)  # ASSUMPTION A4
            for i in range(depth)
        )
        self.norm, self.modulate = nn.LayerNorm(D, elementwise_affine=False), nn.Linear(D, 2 * D)
        self.out = nn.Sequential(nn.Linear(D, D), nn.ReLU(), nn.Linear(D, action_dim))

    def keys(self, conditions, real):
        """Brain states (B, T, D) per cross block, real (B, T) -> their k, v, mask, for all t."""
        mask, crossing = real[:, None, None], self.blocks[::2]
        return [(*block.project(h), mask) for block, h in zip(crossing, conditions)]

    def forward(self, x_t, t, keys):
        """x_t (B, R, H, A), t (B, R), keys of `keys()` -> velocity (B, R, H, A), float32."""
        wave = sinusoid(t, self.position.shape[1])  # (B, R, width)
        time, a = self.time(wave), self.action_in(x_t)  # a (B, R, H, width)
        a = self.mix(torch.cat([a, wave[:, :, None].expand_as(a)], dim=-1)) + self.position
        future = self.future.expand(*t.shape, -1, -1)
        x = torch.cat([future, a.to(future.dtype)], dim=2)  # (B, R, N, width)
        for i, block in enumerate(self.blocks):
            x = block(x, time, keys[i // 2] if block.cross else None)
        scale, shift = self.modulate(F.silu(time))[:, :, None].chunk(2, dim=-1)
        x = self.norm(x[:, :, -self.horizon :]) * (1 + scale) + shift  # (B, R, H, width)
        return self.out(x).float()


def integrate(velocity, a_0, steps):
    """Euler from noise a_0 (B, H, A) at t = 0 to t = 1; velocity(x (B, 1, H, A), t (B, 1))."""
    x = a_0[:, None]
    for i in range(steps):
        t = torch.full(x.shape[:2], i / steps, device=x.device)
        x = x + velocity(x, t) / steps
    return x[:, 0]


# --- Loss -----------------------------------------------------------------------------------------


def draw_noise(cfg, step, action_dim, dist, part=0):
    """a_0 (B, R, H, A) Gaussian; t (B, R) = 1 - b / 0.999 with b ~ Beta(1.5, 1), mostly noisy.

    Drawn for a step's samples of all processes and batches (`part` of them), then cut: however
    these are split, the draws are the same.
    """
    generator = torch.Generator().manual_seed(cfg.seed * 1_000_003 + step)
    total = cfg.batch * dist.processes * cfg.accumulate
    a_0 = torch.randn(total, cfg.repeats, cfg.horizon, action_dim, generator=generator)
    b = torch.rand(total, cfg.repeats, generator=generator) ** (1 / 1.5)  # inverse CDF of the Beta
    first = (part * dist.processes + dist.rank) * cfg.batch
    mine = slice(first, first + cfg.batch)
    return a_0[mine], (1 - b / 0.999).clamp(min=0)[mine]


def masked_mean(x, mask):
    """x (B, H, A) or (B, R, H, A), mask (B, H) True inside the episode -> mean over each sample's
    inside, then over samples: however the batch is split over processes, the mean is the same."""
    mask = mask[:, None, :, None] if x.dim() == 4 else mask[..., None]  # ASSUMPTION A6
    inside = mask.expand_as(x).flatten(1)
    return ((x.flatten(1) * inside).sum(1) / inside.sum(1)).mean()


def flow_loss(velocity, keys, a_1, mask, a_0, t):
    """Actions a_1 (B, H, A), mask (B, H), noise a_0 (B, R, H, A), t (B, R) -> scalar."""
    a_1, s = a_1[:, None], t[:, :, None, None]
    x_t = (1 - s) * a_0 + s * a_1
    v_t = velocity(x_t, t, keys)
    return masked_mean((v_t - (a_1 - a_0)) ** 2, mask)  # ||v_psi - (a_1 - a_0)||^2  # Eq. (7)


def feature_loss(h_student, h_teacher, real):
    """(B, T, D) hidden states, real (B, T) -> mean over a prompt's tokens, then over prompts."""
    distance = (h_student.float() - h_teacher.float().detach()).square().sum(-1)  # (B, T)
    # 1/L sum_i ||H_student^i - sg(H_teacher^i)||^2
    return ((distance * real).sum(1) / real.sum(1)).mean()  # Eq. (9)


def answer_loss(vlm, h, prompt):
    """h (B, T, D) of a prompt with labels -> cross-entropy, (B,) whether all words are right."""
    h, words = common.spoken(h, prompt)
    loss, best = common.linear_cross_entropy(h, vlm.lm_head.weight, words)
    return loss, common.all_right(best == words, prompt)


def total_loss(losses, cfg):
    """Actions alone for the twin; features too for a student, answers too when co-training."""
    total = losses["action"]  # L_total = L_action  # Eq. (8)
    if "feature" in losses:
        total = total + cfg.distill_weight * losses["feature"]  # + lambda L_feat  # Eq. (10)
    if "answer" in losses:
        total = total + cfg.cotrain * losses["answer"]  # ASSUMPTION A7
    return total


# --- Eval: acting, answering, and where the right brain looks -------------------------------------


class Policy:
    """A trained model with its normalisation: what `worlds.loop` acts with."""

    def __init__(self, model, cfg, processor, robots, device):
        """robots: {what was trained on: its statistics}; --robot says like which to act."""
        self.model, self.cfg, self.processor, self.device = model, cfg, processor, device
        self.robots, (self.robot, self.stats) = robots, data.acting(robots, cfg.robot)

    def batch(self, observations, instructions):
        samples = runs.seen(observations, instructions, self.cfg, self.robot, self.stats)
        return common.to_device(sense(samples, self.cfg, self.processor), self.device)

    def act(self, observations, instructions, rng):
        """n observations and instructions -> action chunks (n, H, A) in the world's units."""
        shape = len(observations), self.cfg.horizon, len(self.stats["action"]["q01"])
        a_0 = torch.from_numpy(rng.standard_normal(shape, np.float32))
        a_0 = common.to_device(a_0, self.device)
        self.model.eval()
        with common.autocast(self.device, self.cfg.dtype):
            a = self.model.act(self.batch(observations, instructions), a_0)
        a = a.clamp(-1, 1).cpu().numpy()  # as training clipped them
        return data.unnormalise(a, self.stats["action"])

    @torch.no_grad()
    def write(self, vlm, samples, limit):
        """Samples with "images" and "question" -> answers of a brain, of `limit` words at most."""
        words, samples = self.processor.tokenizer, [s | {"answer": ""} for s in samples]
        asked = common.to_device(common.ask(samples, self.processor, SYSTEM_L), self.device)
        with common.autocast(self.device, self.cfg.dtype):
            ids = self.model.write(vlm, asked, limit, words.eos_token_id)
        return [words.decode(row).partition(words.eos_token)[0].strip() for row in ids]

    @torch.no_grad()
    def views(self, observations, instructions):
        """Figure 5: the first camera, bright where the last right token looks in the left brain."""
        if self.model.left is None:
            return None
        batch = self.batch(observations, instructions)
        joint_attention.maps = maps = []
        try:
            with common.autocast(self.device, self.cfg.dtype):
                self.model.think(batch)
        finally:  # else whatever runs next would go on collecting
            joint_attention.maps = None
        merge = self.processor.merge
        _, rows, columns = (n // merge for n in batch["grids"][0])
        seen, heat = [], torch.stack(maps).mean((0, 2))  # (B, T_L + T_R)
        for o, ids, weights in zip(observations, batch["left"]["input_ids"], heat):
            tokens = (ids == self.processor.image_token_id).nonzero()[: rows * columns, 0]
            weights = weights[tokens].view(rows, columns)  # of the first camera
            seen.append(pictures.glow(next(iter(o["images"].values())), weights.cpu().numpy()))
        return seen


def abilities(policy, sets):
    """Share of questions each brain answers by itself -> {"right": {"pope": ...}, "left": ...}:
    Figure 2. sets: {name: samples}."""
    model, how = policy.model, (sets, policy, SYSTEM_L)
    return {
        side: common.abilities(lambda asked, vlm=vlm: model.answer(vlm, asked)[1], *how)
        for side, vlm in model.brains().items()
    }


# --- Train ----------------------------------------------------------------------------------------


def make_optimizers(model, cfg):
    """AdamW over what trains, or Muon over the matrices and AdamW over the rest; two rates."""
    rows = []
    for name, p in model.named_parameters():
        if p.requires_grad:
            peak = cfg.lr if name.startswith(("right.", "left.")) else cfg.lr_head
            words = "embed" in name or "lm_head" in name
            rows.append((p, peak, cfg.weight_decay, p.dim() == 2 and not words))
    return common.optimizers(cfg, rows)


def train(cfg, dist, run, model, batches, meta, resumed, measure, teacher=None):  # [method]
    """The loop, flat -> seconds. measure: () -> abilities; meta: what acting needs to know."""
    opts = make_optimizers(model, cfg)
    start, began = 0, time.perf_counter()
    if resumed:
        start, began = resumed.step, began - resumed.train_state["seconds"]
        common.load_optimizers(opts, resumed)
        common.set_rng_state(resumed.local_state["rng"])
    ddp = common.parallel(model, dist, cfg.brain == "nofreeze")  # [method] its last MLP is idle
    todo = range(start * cfg.accumulate, cfg.steps * cfg.accumulate)
    feed = common.feed(batches, todo, cfg.workers)
    action_dim = data.dims(meta["robots"])[1]  # [method]
    stop = common.Stop()
    for step in range(start, cfg.steps):
        for group in (group for opt in opts for group in opt.param_groups):
            floor = cfg.min_lr * group["peak"]
            group["lr"] = common.lr_at(step, group["peak"], cfg.warmup, cfg.steps, floor)
        if cfg.qa_every and step % cfg.qa_every == 0:  # [method]
            with common.gathered(model):  # [method]
                run.record(step, {"abilities": dist.main and measure()})  # [method]
        model.train()
        mean, seen = {}, []
        for part in range(cfg.accumulate):
            batch = common.to_device(next(feed), dist.device)
            seen.append(batch)
            common.synchronise(ddp, part + 1 == cfg.accumulate)
            with common.autocast(dist.device, cfg.dtype):
                noise = draw_noise(cfg, step, action_dim, dist, part)  # [method]
                noise = common.to_device([*noise], dist.device)  # [method]
                with torch.no_grad():  # [method]
                    h_teacher = teacher and teacher.think(batch)[0].last_hidden_state  # [method]
                losses = ddp(batch, noise, h_teacher)  # [method]
                loss = total_loss(losses, cfg) / cfg.accumulate
            loss.backward()
            for name, value in losses.items():
                mean[name] = mean.get(name, 0.0) + value.detach() / cfg.accumulate
        norm_before = common.clip(model.parameters(), cfg.clip)
        for opt in opts:
            opt.step()
            opt.zero_grad(set_to_none=True)
        norm = norm_before()
        if not math.isfinite(norm):
            common.halt_at_nan(run, step + 1, seen)
        run.progress(step + 1)
        seconds = time.perf_counter() - began
        if (step + 1) % cfg.log_every == 0 or step + 1 == cfg.steps:
            values = dist.mean({name: float(value) for name, value in mean.items()})
            rate = (step + 1) * cfg.batch * cfg.accumulate * dist.processes / seconds
            lr = opts[0].param_groups[0]["lr"]
            run.log(step + 1, values | {"lr": lr, "norm": norm, "samples/s": rate})
        stopping = dist.any(stop.requested)
        if (step + 1) % cfg.save_every == 0 or step + 1 == cfg.steps or stopping:
            common.save_run(run, step + 1, model, opts, seconds, meta)
        if stopping and step + 1 < cfg.steps:
            run.say(f"stopped at step {step + 1}; go on with --resume {run.folder}")
            run.close()
            raise KeyboardInterrupt
    stop.restore()
    common.gather(model)
    if cfg.qa_every and dist.main:  # [method]
        run.record(cfg.steps, {"abilities": measure()})  # [method]
    return time.perf_counter() - began


# --- main -----------------------------------------------------------------------------------------

# what a resumed or evaluated run may change
FREE = (*runs.FREE, "questions", "benchmark", "euler", "replicate_left")


def build(cfg, state_dim, action_dim, checkpoint=None):
    """-> model and processor; weights from the backbone or, for what trains, a checkpoint."""
    vlm, processor = common.load_backbone(cfg.backbone, cfg.frozen)
    if cfg.head == "fast":
        common.Fast.extend(vlm, processor.tokenizer)
    if cfg.head == "fast" and checkpoint:  # else prepare() learns its words
        processor.fast = common.Fast(checkpoint.meta["fast"], processor.tokenizer)
    common.seed_all(cfg.seed)
    model = common.widen(TwinBrain(cfg, vlm, processor, state_dim, action_dim))
    if checkpoint:
        common.fill(model, checkpoint, cfg.backbone)
    return model, processor


def load_policy(folder, device, robot=""):
    """A run folder (or one checkpoint of it) -> Policy."""
    checkpoint = common.load_checkpoint(folder, "twinbrain")
    cfg = common.resume_config(Config(), checkpoint.meta["config"])
    cfg.robot, cfg.shard = robot or cfg.robot, "none"  # it acts on one process
    robots = checkpoint.meta["robots"]
    model, processor = build(cfg, *data.dims(robots), checkpoint)
    common.store_frozen(model, cfg, device)
    policy = Policy(model.to(device).eval(), cfg, processor, robots, device)
    policy.trained = checkpoint.step, checkpoint.meta["processes"]
    return policy


def prepare(cfg, dist, run, resumed):
    """Demonstrations, statistics, model -> Policy, batches, meta, the teacher if there is one."""
    whole, alone = cfg, dist.processes == 1  # on more processes it goes on in shards
    cfg = replace(cfg, shard="none") if alone else cfg  # with LoRA both brains keep one copy then
    common.foresee(cfg, dist, *[lambda: build(cfg, 8, 7)[0]] * (2 if cfg.distill else 1))
    acts, asks = data.recordings(cfg, dist, resumed)
    robots = {part.name: part.stats for part in acts}
    loop.foresee(cfg, data.acting(robots, cfg.robot)[1])
    if cfg.state and not data.dims(robots)[0]:
        raise common.UserError(f"--data {cfg.data} holds no state of a robot: add --no-state")
    teacher = load_teacher(cfg, dist.device, robots) if cfg.distill else None
    model, processor = build(cfg, *data.dims(robots), resumed)
    if cfg.head in ("oft", "fast") and not (resumed or cfg.lora):
        word = starvla.SLOT if cfg.head == "oft" else "<robot_action_0>"
        common.redraw_untrained(model.right, processor.tokenizer.encode(word)[:1])
    how = cfg.horizon, cfg.augment, (cfg.size, cfg.wrist_size)
    windows = [data.Windows(p.episodes, p.stats, *how, data.robot_name(p.name)) for p in acts]
    mixtures = [data.Mixture(windows, [p.weight for p in acts], cfg.seed)]
    if asks and not cfg.cotrain:
        raise common.UserError(f"--data {asks[0].name} asks questions: add --cotrain 0.1")
    if cfg.cotrain:
        asked = [p.episodes for p in asks] or [data.Questions(cfg.size, cfg.wrist_size)]
        mixtures.append(data.Mixture(asked, [p.weight for p in asks], cfg.seed))
    if cfg.head == "fast" and not resumed:
        chunks = sum((w.chunks(7) for w in windows), [])
        processor.fast = common.Fast.fit(chunks, processor.tokenizer)
    run.say(runs.counted(acts, windows, model))
    if dist.main and not resumed:
        samples = [mixtures[0][i] for i in range(4)]
        seen, marks = [s["images"] for s in samples], {processor.tokenizer.pad_token: "<state>"}
        runs.first_batch(run, seen, sense(samples, cfg, processor)["right"], processor, marks)
    join = partial(collate, cfg=cfg, processor=processor)
    batches = data.Batches(mixtures, join, cfg.batch, dist.rank, dist.processes)
    meta = runs.about("twinbrain", whole, robots, resumed)
    meta |= {"fast": processor.fast.state} if cfg.head == "fast" else {}
    copied = model.left if cfg.replicate_left else None
    beside = {"teacher": teacher} if teacher else {}
    model = common.place(model, cfg, dist, run.say, copied, beside)
    return Policy(model, cfg, processor, robots, dist.device), batches, meta, teacher


def check(cfg):
    """What no type can say about the flags, before anything is spent on them."""
    runs.check(cfg, "steps", "repeats", "euler", "depth", "heads", "horizon")
    benchmarks.check(cfg)
    common.refuse({
        "--attention kernel: no --visibility index, no --brain nofreeze":
            cfg.attention == "kernel" and (cfg.visibility == "index" or cfg.brain == "nofreeze"),
        "--ablation t9-student needs --distill RUN, a twin's run folder":
            cfg.ablation == "t9-student" and not cfg.distill,
        "--distill teaches a single brain: add --brain vanilla":
            cfg.distill and cfg.brain != "vanilla",
        "--lora trains no word embeddings (--head fast) and no left brain: --lora 0":
            cfg.lora and (cfg.head == "fast" or cfg.brain == "nofreeze"),
        f"--width {cfg.width}: even, and a multiple of --heads {cfg.heads}":
            cfg.width % 2 or cfg.width % cfg.heads,
        f"--execute {cfg.execute}: from 1 to --horizon {cfg.horizon}":
            not 1 <= cfg.execute <= cfg.horizon,
    })  # fmt: skip


def load_teacher(cfg, device, robots):
    """--distill: the twin whose features a single brain learns; both must read the same prompt, and
    the same numbers in its state or its action tokens."""
    policy = load_policy(cfg.distill, device)
    teacher = policy.model.requires_grad_(False)
    common.store_frozen(teacher, cfg, device)
    names = ["backbone", "head", "state", "deepstack", "size", "wrist_size"]
    names += ["horizon"] * (cfg.head in ("oft", "fast"))  # these have it in the prompt
    runs.same_flags("distill", cfg.distill, teacher.cfg, cfg, names)
    if cfg.state or cfg.head == "fast":  # bounds that are the same
        runs.same_units("distill", cfg.distill, policy.robots, robots, parts=1e6)
    return teacher


def session(cfg, dist):
    """Trains, or goes on with a run, or takes one as it is; then acts, asks and draws."""
    cfg, resumed, policy = runs.begin(cfg, dist, "twinbrain", FREE, load_policy)
    check(cfg)
    if cfg.benchmark:
        for side, vlm in policy.model.brains().items() if dist.main else ():
            benchmarks.run(cfg.benchmark, partial(policy.write, vlm), cfg, who=side)
        return
    run = common.Run(cfg, "twinbrain", __file__, dist, cfg.steps, resumed)
    run.say(f"run folder {run.folder}; {dist.processes} process(es) on {dist.device}")
    if not policy:
        policy, batches, meta, teacher = prepare(cfg, dist, run, resumed)  # [method]
    sets = data.question_sets(common.ABILITIES, cfg.questions, cfg.size, cfg.wrist_size)
    measure = partial(abilities, policy, sets)
    seconds = 0.0
    if not cfg.eval_only:
        seconds = train(cfg, dist, run, policy.model, batches, meta, resumed, measure, teacher)
    results = loop.evaluate(policy, cfg, dist, run.folder, run.say)
    vqa = measure()
    for side, scores in vqa.items():
        words = ", ".join(f"{name} {share:.1%}" for name, share in scores.items())
        run.say(f"  questions to the {side} brain alone: {words}")
    learned = policy.trained if cfg.eval_only else (cfg.steps, dist.processes)
    outside = [results[name]["success"] for name in loop.OUTSIDE if name in results]
    result = runs.facts("twinbrain", cfg, cfg.brain, *learned, seconds) | loop.headline(results)
    result |= {"success_out": sum(outside) / len(outside) if outside else None}
    result |= {"domains": results, "vqa": vqa, "params": common.param_counts(policy.model)}
    run.result(result)
    run.close()
    if dist.main:
        pictures.draw_run(run.folder, ("action", "feature", "answer"))
    run.say(f"result.json, pictures and films are in {run.folder}")


def main(argv=None):
    cfg = common.parse(Config, PRESETS, ABLATIONS, argv)
    if cfg.ablation == "list":
        return ablations.show("twinbrain", ABLATIONS, "paper %", "% in-domain, out of domain", ours)
    if cfg.describe:
        builds = {f"TwinBrainVLA --brain {cfg.brain}": lambda: build(cfg, 8, 7)[0]}
        return common.describe(cfg.backbone, common.load_backbone, builds)
    if cfg.export:
        policy = load_policy(cfg.export, torch.device("cpu"))
        return runs.export(cfg, policy, policy.model.right)
    dist = common.setup(cfg)
    session(common.resume_auto(cfg, dist), dist)
    dist.destroy()


if __name__ == "__main__":
    common.run_main(main)
