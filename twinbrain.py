"""TwinBrainVLA (arXiv 2601.14133): a frozen VLM, its trainable twin, and a flow-matching action expert. One file.

      picture, instruction                        picture, instruction, robot state
             |                                                |
      [ left brain, frozen ]  -- keys, values, layer by -->  [ right brain, trained ]      AsyMoT, Eq. 3-6
             |                   layer, no gradient           |
      answers as the untouched                             H_R (B, T, D)
      VLM would: nothing to forget                            |
                                      noise a_0 --> [ DiT, 4 Euler steps ] --> action chunk (B, H, A)      Eq. 7

Conventions: x_t = (1 - t) a_0 + t a_1 with a_0 noise at t = 0 and a_1 the action at t = 1, velocity u_t = a_1 - a_0;
actions and state are normalised to [-1, 1] between q01 and q99 (`data.normalise`); prompts are padded on the left.
Letters: B batch, T tokens (T_L left, T_R right), D width, H chunk, A action, S state, R noise draws, N DiT tokens.

Equation map
  Eq. 1   left input [V(I); T(T)]            -> TwinBrain.think()
  Eq. 2   right input [V(I); T(T); phi(s)]   -> embed()
  Eq. 3   left layers, frozen, to themselves -> TwinBrain.think()
  Eq. 4   K_joint = [sg(K_L); K_R]           -> AsyMoT.update()
  Eq. 5   V_joint = [sg(V_L); V_R]           -> AsyMoT.update()
  Eq. 6   one softmax over both halves       -> joint_attention()
  Eq. 7   flow-matching loss                 -> flow_loss()
  Eq. 8   train on the action loss alone     -> total_loss()
  Eq. 9   distillation of hidden states      -> feature_loss()
  Eq. 10  student's objective                -> total_loss()
Table map (`--ablation list` prints the paper's numbers beside ours): Table 1 t1-*, Table 5 t5-*, Table 6 t6-*, Table 9
t9-*, Figure 2 f2-*, Appendix C c-*; not in the paper: visibility-index, no-deepstack, no-state.

Assumptions, where the paper is silent
  A1  Visibility: the right brain sees every left token and is causal on itself (`--visibility all`); the only public
      code hides left tokens behind the right token's own index (`--visibility index`).
  A2  Interval k: layer l is joint when l % (k + 1) == 0, plain self-attention otherwise.
  A3  DeepStack stays on in both brains (the public code drops it, so its left brain is not the pretrained model).
  A4  The DiT is the framework's: even blocks look at H_R, odd blocks at the action tokens, t ~ 1 - Beta(1.5, 1), R draws
      of noise a sample, learning rate 10 x the backbone's.
  A5  The state token phi(s) is the last token of the right prompt. Simulation at paper scale runs without (App. B).
  A6  Actions past an episode's end are masked out of the loss (the public code repeats the last one unmasked).
  A7  Co-training adds an equal number of questions to each step (1:1), their loss weighted 0.1 as in the framework.
  A8  QwenPI: every layer of the VLM gets one cross-attention and one self-attention block.
Errata: Eq. 3 and 6 write Attn + FFN(H); the layers are the usual pre-norm blocks, residuals included. Appendix C calls
QwenOFT discrete and autoregressive; the framework's is continuous, parallel and trained with L1, and so is ours.

  python twinbrain.py                                          # laptop: trains, acts, writes runs/...
  torchrun twinbrain.py --backbone Qwen3-VL-4B                 # one GPU, the embedded world
  torchrun --nproc-per-node 8 twinbrain.py --preset paper --batch 32 --backbone Qwen3-VL-4B
"""

import copy
import dataclasses
import json
import math
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, Subset
from transformers import AttentionInterface, AttentionMaskInterface, DynamicCache
from transformers.masking_utils import sdpa_mask

import common
import data
from worlds import pictures, questions, tabletop

# --- Config: the defaults are the laptop's run ----------------------------------------------------


@dataclass
class Config:
    backbone: str = "tiny"  # tiny, Qwen3-VL-2B/4B/8B, Qwen2.5-VL-3B/7B, a folder or a hub id
    world: str = "tabletop:bridge"  # where to act; its suite also gives the demonstrations
    data: str = ""  # recordings to train on; empty: the world's own demonstrations
    out: str = ""  # run folder; empty: runs/<method>-<world>-<seed>-<time>
    steps: int = 1500  # optimizer steps (paper: 40000)
    seed: int = 0  # everything random follows from it
    resume: str = ""  # run folder to go on from, exactly
    eval_only: str = ""  # run folder whose checkpoint is evaluated, without training
    ablation: str = ""  # a row of the paper's tables; `list` prints them
    preset: str = ""  # a named configuration: paper, libero, forget
    episodes: int = 200  # evaluation episodes in each domain (paper: 480 on SimplerEnv)
    # the brains
    brain: str = "twin"  # twin | vanilla | nofreeze: two brains (Sec. 4), one, or two that both train (Table 5)
    interval: int = 0  # k: plain self-attention layers between joint ones (Table 6)
    visibility: str = "all"  # all | index: which left tokens a right token sees (A1)
    deepstack: bool = True  # DeepStack features in both brains (A3)
    state: bool = True  # state token phi(s) in the right brain (Eq. 2; paper: off in simulation)
    # the action expert
    head: str = "flow"  # flow | pi | oft | fast: the paper's DiT (QwenGR00T's), or a baseline of Appendix C
    horizon: int = 8  # H, actions in a chunk (paper: 16, LIBERO 8)
    width: int = 128  # DiT width (paper: 768)
    depth: int = 4  # DiT blocks (paper: 16)
    heads: int = 4  # DiT attention heads (paper: 12)
    future: int = 4  # learned future tokens beside the action tokens (paper: 32)
    dropout: float = 0.0  # inside the DiT (paper: 0.2)
    repeats: int = 8  # R, noise draws a sample (framework: 4)
    euler: int = 4  # integration steps when acting
    # training
    batch: int = 64  # samples a process and step (paper: 16 on each of 16 GPUs)
    lr: float = 5e-4  # backbone (paper: 1e-5)
    lr_head: float = 1e-3  # DiT and state encoder (framework: 1e-4)
    min_lr: float = 0.0  # where the cosine ends, as a share of the peak
    warmup: int = 50  # steps of linear warm-up (framework: 5000)
    weight_decay: float = 1e-8  # AdamW
    clip: float = 1.0  # gradient norm
    optimizer: str = "adamw"  # adamw | muon: muon takes the matrices, AdamW the rest
    cotrain: float = 0.0  # weight of the question loss, questions 1:1 with actions (Figure 2; A7)
    distill: str = ""  # teacher's run folder for Twin-to-One (Appendix G)
    distill_weight: float = 1.0  # lambda of Eq. 10
    dtype: str = "auto"  # auto | bf16 | fp32: arithmetic of the matrix products
    device: str = "auto"  # auto | cpu | cuda
    threads: int = 0  # CPU threads of a process; 0: torch's choice
    workers: int = 0  # loader processes
    # demonstrations of the embedded world
    demos: int = 1000  # episodes
    noise: float = 0.3  # disturbances while the expert demonstrates, for recovery
    size: int = 64  # static camera, pixels
    wrist_size: int = 32  # wrist camera, pixels
    augment: int = 2  # random picture shifts, pixels of 64
    normalise: str = "q99"  # q99 | minmax: bounds of actions and state (LIBERO: minmax)
    # evaluation and logging
    domains: tuple[str, ...] = ("in", "look", "colour", "shape", "pair", "wording")  # what differs from training
    execute: int = 4  # actions executed of each chunk (receding horizon; LIBERO: all 8, GR1: 12 of 16)
    ensemble: bool = False  # act every step on the adaptive ensemble of the last 7 chunks (SimplerEnv)
    parallel: int = 50  # episodes acted side by side
    gifs: int = 2  # rollouts drawn in each domain
    questions: int = 100  # of each of the four kinds (POPE, SEED-Bench, ScienceQA, MME)
    qa_every: int = 0  # steps between measurements of the general abilities; 0: only at the end
    log_every: int = 20  # steps between log lines
    save_every: int = 500  # steps between checkpoints


PAPER = dict(
    backbone="Qwen3-VL-4B", steps=40_000, batch=16, lr=1e-5, lr_head=1e-4, min_lr=0.05, warmup=5000, state=False, horizon=16,
    width=768, depth=16, heads=12, future=32, dropout=0.2, repeats=4, size=224, wrist_size=112, augment=0, execute=1,
    ensemble=True, episodes=480, workers=4, log_every=10,
)  # fmt: skip
PRESETS = {
    "paper": PAPER,  # Appendix B, SimplerEnv
    "libero": PAPER | dict(steps=100_000, horizon=8, normalise="minmax", execute=8, ensemble=False, episodes=500),  # App. F
}
ABLATIONS = {  # name: the paper's row, its average success in % (Qwen3-VL-4B, SimplerEnv), what differs from the default
    "t1-twin": dict(_row="Table 1, TwinBrainVLA", _paper=64.5),
    "t1-vanilla": dict(_row="Table 1, Vanilla VLA", _paper=55.2, brain="vanilla"),
    "t5-no-freezing": dict(_row="Table 5, No Freezing", _paper=58.8, brain="nofreeze"),
    "t6-k1": dict(_row="Table 6, k = 1", _paper=64.1, interval=1),
    "t6-k2": dict(_row="Table 6, k = 2", _paper=66.7, interval=2),
    "t6-k4": dict(_row="Table 6, k = 4", _paper=62.5, interval=4),
    "t6-k8": dict(_row="Table 6, k = 8", _paper=61.9, interval=8),
    "t9-student": dict(_row="Table 9, Twin-to-One student (with --distill RUN)", _paper=58.4, brain="vanilla"),
    "f2-vla": dict(_row="Figure 2, VLA training", _paper=None, brain="vanilla", qa_every=100),
    "f2-cotrain": dict(_row="Figure 2, co-training", _paper=None, brain="vanilla", cotrain=0.1, qa_every=100),
    "f2-twin": dict(_row="Figure 2, TwinBrainVLA", _paper=None, qa_every=100),
    "c-pi": dict(_row="Appendix C, QwenPI (Table 2, GR1: 43.9)", _paper=None, brain="vanilla", head="pi"),
    "c-oft": dict(_row="Appendix C, QwenOFT (Table 2, GR1: 48.8)", _paper=None, brain="vanilla", head="oft"),
    "c-fast": dict(_row="Appendix C, QwenFAST (Table 2, GR1: 39.0)", _paper=None, brain="vanilla", head="fast"),
    "visibility-index": dict(_row="not in the paper: index-causal visibility", _paper=None, visibility="index"),
    "no-deepstack": dict(_row="not in the paper: DeepStack off", _paper=None, deepstack=False),
    "no-state": dict(_row="not in the paper's tables: without phi(s)", _paper=None, state=False),
}  # fmt: skip


# --- Prompts (Appendix E) and the one path from observations to tensors ---------------------------

SYSTEM_L = "You are a helpful robot brain that can understand images and texts."
SYSTEM_R = (
    "You are a helpful robot brain that can understand images, texts, and robot states.\n"
    "You will be provided with observation, an instruction, and the robot state. "
    "Take action to execute the instruction."
)
USER_L = "\nInstruction: {instruction}"
USER_R = (
    "\nInstruction: {instruction}\nRobot Type: {robot}"
    "\nPredict the next action for the robot based on the observation, instruction and robot type."
)
ASK_OFT = " Please predict the next {H} robot actions: <action>{slots}<action>."
SLOT = "🔍"  # QwenOFT reads its actions where these stand


def prompts(instruction, cfg):
    """-> (system, user) of the left brain, (system, user) of the right brain."""
    user_R = USER_R.format(instruction=instruction, robot=cfg.world.partition(":")[0])
    if cfg.head == "oft":
        user_R += ASK_OFT.format(H=cfg.horizon, slots=SLOT * cfg.horizon)
    return (SYSTEM_L, USER_L.format(instruction=instruction)), (SYSTEM_R, user_R)


def sense(samples, cfg, processor, fast=None):
    """samples with "images", "instruction", "state" (normalised) and, in training, "action" (H, A) and "mask" (H,)
    -> batch. Training and acting both come through here, so they cannot differ in what the brains see."""
    pixels, grids, left, right, labels = [], [], [], [], []
    for sample in samples:
        patches, grid = processor.images(sample["images"])
        (system_L, user_L), (system_R, user_R) = prompts(sample["instruction"], cfg)
        pixels.append(patches)
        grids.append(tuple(grid))
        left.append(processor.prompt(system_L, user_L, grids[-1])[0])
        right.append(processor.prompt(system_R, user_R, grids[-1])[0])
        if cfg.state:
            right[-1] += (processor.pad_token_id,)  # phi(s) takes this place
        if cfg.head == "fast":
            labels.append(fast.encode(sample["action"]) if "action" in sample else ())
            right[-1] += labels[-1]
    batch = {
        "left": processor.pad(left, grids),
        "right": processor.pad(right, grids),
        "pixel_values": torch.from_numpy(np.concatenate(pixels)),
        "image_grid_thw": torch.tensor([g for grid in grids for g in grid]),
        "state": torch.from_numpy(np.stack([s["state"] for s in samples])),  # (B, S)
    }
    if "action" in samples[0]:
        batch["action"] = torch.from_numpy(np.stack([s["action"] for s in samples]))  # (B, H, A)
        batch["mask"] = torch.from_numpy(np.stack([s["mask"] for s in samples]))  # (B, H)
        if cfg.head == "fast":
            batch["right"]["labels"] = answer_labels(batch["right"]["input_ids"], labels)
    return batch


def answer_labels(input_ids, answers):
    """(B, T) ids whose rows end with their answers -> (B, T) the answers in place, -100 elsewhere."""
    labels = torch.full_like(input_ids, -100)
    for row, answer in zip(labels, answers):
        row[len(row) - len(answer) :] = torch.tensor(answer)
    return labels


def ask(samples, processor):
    """samples with "images", "question", "answer" -> batch of one prompt, its answers labelled."""
    pixels, grids, rows, answers = [], [], [], []
    for sample in samples:
        patches, grid = processor.images(sample["images"])
        ids, answer = processor.prompt(SYSTEM_L, sample["question"], tuple(grid), sample["answer"])
        pixels.append(patches)
        grids.append(tuple(grid))
        rows.append(ids + answer)
        answers.append(answer)
    prompt = processor.pad(rows, grids)
    prompt["labels"] = answer_labels(prompt["input_ids"], answers)
    grid = torch.tensor([g for grid in grids for g in grid])
    return {"prompt": prompt, "pixel_values": torch.from_numpy(np.concatenate(pixels)), "image_grid_thw": grid}


def collate(samples, cfg, processor, fast=None):
    """Action samples and, when co-training, as many questions -> one batch."""
    batch = sense([s for s in samples if "action" in s], cfg, processor, fast)
    asked = [s for s in samples if "question" in s]
    return batch | ({"questions": ask(asked, processor)} if asked else {})


# --- Model: AsyMoT (Section 4.1) ------------------------------------------------------------------


class AsyMoT(DynamicCache):
    """The right brain's cache: hands each of its layers the left brain's keys and values before its own.

    left: the left brain's filled cache; interval: k of Table 6; sever: stop the gradient (False for Table 5).
    """

    def __init__(self, left, interval, sever):
        super().__init__()
        self.left, self.interval, self.sever = left, interval, sever

    def update(self, k_R, v_R, layer, *args, **kwargs):
        """(B, kv heads, T_R, d) keys after RoPE, values -> (B, kv heads, T_L + T_R, d), or the own ones alone."""
        k_R, v_R = super().update(k_R, v_R, layer, *args, **kwargs)
        if self.left is None or layer % (self.interval + 1):  # ABLATION T6, ASSUMPTION A2
            return k_R, v_R
        k_L, v_L = self.left.layers[layer].keys, self.left.layers[layer].values
        if self.sever:
            k_L, v_L = k_L.detach(), v_L.detach()
        k_joint = torch.cat([k_L, k_R], dim=2)  # Eq. (4)
        v_joint = torch.cat([v_L, v_R], dim=2)  # Eq. (5)
        return k_joint, v_joint


def joint_attention(module, q_R, k, v, mask, scaling=None, **_):
    """Right queries over whatever keys the cache handed out; a layer without left keys takes the mask's right part.

    While `joint_attention.maps` is a list, each joint layer appends its weights (B, heads, T_R, T_L + T_R) (Figure 5).
    """
    mask = mask[..., -k.shape[2] :]
    k, v = (x.repeat_interleave(module.num_key_value_groups, dim=1) for x in (k, v))  # (B, heads, T_L + T_R, d)
    if joint_attention.maps is not None and k.shape[2] > q_R.shape[2]:
        scores = (q_R.float() @ k.float().transpose(-1, -2) * scaling).masked_fill(~mask, -torch.inf)
        joint_attention.maps.append(scores.softmax(-1))
    y = common.attend(q_R, k, v, mask, scaling)  # softmax(Q_R K_joint^T / sqrt(d_k)) V_joint  Eq. (6)
    return y.transpose(1, 2), None


joint_attention.maps = None
AttentionInterface.register("asymot", joint_attention)
AttentionMaskInterface.register("asymot", sdpa_mask)


def joint_mask(real_L, real_R, visibility):
    """real_L (B, T_L), real_R (B, T_R) bool -> (B, 1, T_R, T_L + T_R) bool: which keys a right token sees."""
    own = common.causal_mask(real_R)
    sees = real_R[:, :, None] & real_L[:, None, :]  # ASSUMPTION A1
    if visibility == "index":
        rank_L, rank_R = real_L.cumsum(1), real_R.cumsum(1)  # position among the real tokens
        sees = sees & (rank_L[:, None, :] <= rank_R[:, :, None])
    return torch.cat([sees[:, None], own], dim=-1)


def embed(vlm, prompt, state_token=None, pad=None):
    """(B, T) ids -> (B, T, D) embeddings, with phi(s) in the state's place; pictures go in inside the VLM."""
    x = vlm.get_input_embeddings()(prompt["input_ids"])
    if state_token is not None:
        place = prompt["real"] & (prompt["input_ids"] == pad)  # ASSUMPTION A5
        x = torch.where(place[..., None], state_token[:, None].to(x.dtype), x)  # [V(I); T(T); phi(s)]  Eq. (2)
    return x


class TwinBrain(nn.Module):
    """Brains and action expert. `brain="vanilla"` has no left brain and is the framework's QwenGR00T."""

    def __init__(self, cfg, vlm, processor, state_dim, action_dim):
        super().__init__()
        self.cfg, self.processor = cfg, processor
        if not cfg.deepstack and hasattr(vlm.model.visual, "deepstack_visual_indexes"):
            vlm.model.visual.deepstack_visual_indexes = []
            vlm.model.visual.deepstack_merger_list = nn.ModuleList()
        self.left = None if cfg.brain == "vanilla" else copy.deepcopy(vlm)
        if self.left is not None:
            self.left.requires_grad_(cfg.brain == "nofreeze")  # ABLATION T5
            self.left.lm_head.requires_grad_(False)
        self.right = vlm
        for brain in (self.left, self.right):
            if brain is not None:
                brain.model.language_model.config._attn_implementation = "asymot"
        speaks = cfg.cotrain > 0 or cfg.head == "fast"
        if not speaks and self.right.lm_head.weight is not self.right.get_input_embeddings().weight:
            self.right.lm_head.requires_grad_(False)  # no loss reaches it
        text = vlm.config.get_text_config()
        D, layers = text.hidden_size, text.num_hidden_layers
        if cfg.state:
            self.phi = nn.Sequential(nn.Linear(state_dim, D), nn.SiLU(), nn.Linear(D, D))
        if cfg.head in ("flow", "pi"):
            self.expert = DiT(cfg, D, action_dim, depth=2 * layers if cfg.head == "pi" else cfg.depth)
        elif cfg.head == "oft":
            self.expert = OFT(D, action_dim)

    def think(self, batch):
        """-> per layer the right brain's hidden states, each (B, T_R, D); the last one is H_R."""
        left = None
        if self.left is not None:
            left = DynamicCache()
            prompt = batch["left"]
            with torch.set_grad_enabled(torch.is_grad_enabled() and self.cfg.brain == "nofreeze"):
                x = embed(self.left, prompt)  # [V(I); T(T)]  Eq. (1)
                self.look(self.left, x, prompt, common.causal_mask(prompt["real"]), left, batch)  # Eq. (3)
        prompt = batch["right"]
        state_token = self.phi(batch["state"]) if self.cfg.state else None
        x = embed(self.right, prompt, state_token, self.processor.pad_token_id)
        real_L = batch["left"]["real"] if left else prompt["real"][:, :0]
        mask = joint_mask(real_L, prompt["real"], self.cfg.visibility)
        cache = AsyMoT(left, self.cfg.interval, sever=self.cfg.brain != "nofreeze")
        return self.look(self.right, x, prompt, mask, cache, batch), cache

    def look(self, vlm, x, prompt, mask, cache, batch):
        """One pass of a brain over its prompt with the pictures in it."""
        return vlm.model(
            inputs_embeds=x,
            attention_mask=mask,
            position_ids=prompt["position_ids"],
            past_key_values=cache,
            pixel_values=batch["pixel_values"],
            image_grid_thw=batch["image_grid_thw"],
            output_hidden_states=self.cfg.head == "pi",
        )

    def forward(self, batch, noise=None, teacher=None):
        """One training step's losses -> dict of scalars. noise: (a_0 (B, R, H, A), t (B, R)); teacher: H_teacher."""
        cfg, losses = self.cfg, {}
        out, _ = self.think(batch)
        h_R = out.last_hidden_state
        real = batch["right"]["real"]
        if cfg.head == "fast":
            losses["action"] = answer_loss(self.right, h_R, batch["right"]["labels"])
        elif cfg.head == "oft":
            a = self.expert(h_R, batch["right"]["input_ids"] == self.slot, cfg.horizon)
            losses["action"] = masked_mean((a - batch["action"]).abs(), batch["mask"])
        else:
            keys = self.expert.keys(self.conditions(out), real)
            losses["action"] = flow_loss(self.expert, keys, batch["action"], batch["mask"], *noise)
        if teacher is not None:
            losses["feature"] = feature_loss(h_R, teacher, real)
        if cfg.cotrain:
            losses["answer"] = self.answer(self.right, batch["questions"])[0]
        return losses

    def conditions(self, out):
        """What each cross-attention block reads: H_R for all (the paper), or layer i's states for block i (QwenPI)."""
        if self.cfg.head == "pi":
            return list(out.hidden_states[1:])
        return [out.last_hidden_state] * self.expert.crosses

    @property
    def slot(self):
        return self.processor.tokenizer.convert_tokens_to_ids(SLOT)

    def answer(self, vlm, batch):
        """Questions to one brain by itself -> cross-entropy of the answers, (B,) bool: every token of it right.

        Right at each token given the ones before is exactly what greedy decoding would have written.
        """
        prompt = batch["prompt"]
        mask = common.causal_mask(prompt["real"])
        out = self.look(vlm, embed(vlm, prompt), prompt, mask, None, batch)
        h, labels = out.last_hidden_state[:, :-1], prompt["labels"][:, 1:]
        logits = vlm.lm_head(h[labels >= 0])  # only where an answer stands: (answer tokens, vocabulary)
        loss = F.cross_entropy(logits.float(), labels[labels >= 0])
        wrong = torch.zeros_like(labels)
        wrong[labels >= 0] = (logits.argmax(-1) != labels[labels >= 0]).long()
        return loss, wrong.sum(1) == 0

    def speak(self, batch, limit):
        """Greedy decoding of at most `limit` tokens after the right prompt (QwenFAST) -> (B, n) ids."""
        out, cache = self.think(batch)
        h, prompt = out.last_hidden_state, batch["right"]
        real, position, spoken = prompt["real"], prompt["position_ids"][:, :, -1:], []
        real_L = batch["left"]["real"] if self.left is not None else real[:, :0]
        for _ in range(limit):
            spoken.append(self.right.lm_head(h[:, -1:]).argmax(-1))
            real, position = F.pad(real, (0, 1), value=True), position + 1
            mask = joint_mask(real_L, real, self.cfg.visibility)[:, :, -1:]
            h = self.right.model(
                inputs_embeds=self.right.get_input_embeddings()(spoken[-1]),
                attention_mask=mask,
                position_ids=position,
                past_key_values=cache,
            ).last_hidden_state
        return torch.cat(spoken, dim=1)

    @torch.no_grad()
    def act(self, batch, a_0, fast=None):
        """batch without actions, noise a_0 (B, H, A) -> normalised action chunks (B, H, A)."""
        if self.cfg.head == "fast":
            return fast.decode(self.speak(batch, limit=6 * self.cfg.horizon)).to(a_0)
        out, _ = self.think(batch)
        if self.cfg.head == "oft":
            mask = batch["right"]["input_ids"] == self.slot
            return self.expert(out.last_hidden_state, mask, self.cfg.horizon).float()
        keys = self.expert.keys(self.conditions(out), batch["right"]["real"])
        return integrate(lambda x, t: self.expert(x, t, keys), a_0, self.cfg.euler)


# --- Model: the flow-matching action expert (Section 4.2) -----------------------------------------


def sinusoid(t, width):
    """t (...,) in [0, 1] -> (..., width), at the framework's thousand buckets a unit."""
    rates = torch.exp(-math.log(10_000) * torch.arange(width // 2, device=t.device) / (width // 2))
    angle = 1000 * t[..., None] * rates
    return torch.cat([angle.cos(), angle.sin()], dim=-1)


class Block(nn.Module):
    """Attention, to the brain's tokens (cross) or among the action tokens, under the time's scale and shift; then MLP."""

    def __init__(self, width, heads, condition=None, dropout=0.0):
        super().__init__()
        self.heads, self.dropout, self.cross = heads, nn.Dropout(dropout), condition is not None
        self.modulate = nn.Linear(width, 2 * width)
        self.norm1 = nn.LayerNorm(width, elementwise_affine=False)
        self.norm2 = nn.LayerNorm(width, elementwise_affine=False)
        self.q = nn.Linear(width, width)
        self.kv = nn.Linear(condition or width, 2 * width)
        self.o = nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def split(self, x):
        """(B, N, width) -> (B, heads, N, d)."""
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)

    def forward(self, x, time, keys=None):
        """x (B, R, N, width), time (B, R, width), keys: (k, v, mask) of the brain's tokens for a cross block."""
        B, R, N, width = x.shape
        scale, shift = self.modulate(F.silu(time))[:, :, None].chunk(2, dim=-1)
        h = self.norm1(x) * (1 + scale) + shift
        if self.cross:  # all R draws of a sample read the same keys: one attention of R * N queries
            k, v, mask = keys
            y = common.attend(self.split(self.q(h).flatten(1, 2)), k, v, mask)
        else:
            h = h.flatten(0, 1)  # (B * R, N, width)
            k, v = (self.split(z) for z in self.kv(h).chunk(2, dim=-1))
            y = common.attend(self.split(self.q(h)), k, v)
        x = x + self.dropout(self.o(y.transpose(1, 2).reshape(B, R, N, width)))
        return x + self.dropout(self.down(F.gelu(self.up(self.norm2(x)), approximate="tanh")))


class DiT(nn.Module):
    """Velocity v_psi(x_t, t, H_R) of an action chunk."""

    def __init__(self, cfg, condition, action_dim, depth):
        super().__init__()
        D, self.horizon = cfg.width, cfg.horizon
        self.crosses = (depth + 1) // 2
        self.action_in = nn.Linear(action_dim, D)
        self.mix = nn.Sequential(nn.Linear(2 * D, D), nn.SiLU(), nn.Linear(D, D))
        self.time = nn.Sequential(nn.Linear(D, D), nn.SiLU(), nn.Linear(D, D))
        self.position = nn.Parameter(0.02 * torch.randn(cfg.horizon, D))
        self.future = nn.Parameter(0.02 * torch.randn(cfg.future, D))
        self.blocks = nn.ModuleList(
            Block(D, cfg.heads, condition if i % 2 == 0 else None, cfg.dropout) for i in range(depth)
        )
        self.norm, self.modulate = nn.LayerNorm(D, elementwise_affine=False), nn.Linear(D, 2 * D)
        self.out = nn.Sequential(nn.Linear(D, D), nn.ReLU(), nn.Linear(D, action_dim))

    def keys(self, conditions, real):
        """Brain states, one (B, T, D) for each cross block, real (B, T) -> their keys and values: once for all t."""
        crosses = self.blocks[::2]
        pairs = [block.kv(h).chunk(2, dim=-1) for block, h in zip(crosses, conditions)]
        return [(b.split(k), b.split(v), real[:, None, None]) for b, (k, v) in zip(crosses, pairs)]

    def forward(self, x_t, t, keys):
        """x_t (B, R, H, A), t (B, R), keys of `keys()` -> velocity (B, R, H, A), float32."""
        B, R = t.shape
        wave = sinusoid(t, self.position.shape[1])  # (B, R, width)
        time, a = self.time(wave), self.action_in(x_t)
        a = self.mix(torch.cat([a, wave[:, :, None].expand_as(a)], dim=-1)) + self.position
        x = torch.cat([self.future.expand(B, R, -1, -1), a], dim=2)  # (B, R, N, width)
        for i, block in enumerate(self.blocks):
            x = block(x, time, keys[i // 2] if block.cross else None)
        scale, shift = self.modulate(F.silu(time))[:, :, None].chunk(2, dim=-1)
        x = self.norm(x[:, :, -self.horizon :]) * (1 + scale) + shift
        return self.out(x).float()


def integrate(velocity, a_0, steps):
    """Euler from noise a_0 (B, H, A) at t = 0 to the action at t = 1; velocity(x (B, 1, H, A), t (B, 1))."""
    x = a_0[:, None]
    for i in range(steps):
        t = torch.full(x.shape[:2], i / steps, device=x.device)
        x = x + velocity(x, t) / steps
    return x[:, 0]


class OFT(nn.Module):
    """QwenOFT's head (Appendix C): one action from the hidden state at each of H slots, all at once."""

    def __init__(self, condition, action_dim):
        super().__init__()
        D = 2 * condition
        self.enter = nn.Sequential(nn.LayerNorm(condition), nn.Linear(condition, D), nn.ReLU())
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(D), nn.Linear(D, D), nn.ReLU()) for _ in range(2)
        )
        self.leave = nn.Sequential(nn.LayerNorm(D), nn.Linear(D, action_dim))

    def forward(self, h_R, slots, horizon):
        """h_R (B, T, D), slots (B, T) True at each row's H slots -> (B, H, A)."""
        x = self.enter(h_R[slots].unflatten(0, (-1, horizon)))  # (B, H, 2D)
        for block in self.blocks:
            x = x + block(x)
        return self.leave(x)


# --- Loss -----------------------------------------------------------------------------------------


def draw_noise(cfg, step, action_dim, dist):
    """a_0 (B, R, H, A) Gaussian, t (B, R) = 1 - b / 0.999 with b ~ Beta(1.5, 1): most draws at the noisy end.

    Drawn for all processes' samples and then cut, so that any number of processes trains on the same draws.
    """
    generator = torch.Generator().manual_seed(cfg.seed * 1_000_003 + step)
    total = cfg.batch * dist.processes
    a_0 = torch.randn(total, cfg.repeats, cfg.horizon, action_dim, generator=generator)
    b = torch.rand(total, cfg.repeats, generator=generator) ** (1 / 1.5)  # inverse CDF of Beta(1.5, 1)
    mine = slice(dist.rank * cfg.batch, (dist.rank + 1) * cfg.batch)
    return a_0[mine], (1 - b / 0.999).clamp(min=0)[mine]  # ASSUMPTION A4


def masked_mean(x, mask):
    """x (B, ..., H, A), mask (B, H) True inside the episode -> mean over the unmasked entries."""
    mask = mask.view(mask.shape[0], *[1] * (x.dim() - 3), mask.shape[1], 1)  # ASSUMPTION A6
    return (x * mask).sum() / (mask.expand_as(x).sum())


def flow_loss(velocity, keys, a_1, mask, a_0, t):
    """a_1 (B, H, A) the actions, mask (B, H), a_0 (B, R, H, A) noise, t (B, R) -> scalar."""
    t_ = t[:, :, None, None]
    a_1 = a_1[:, None]
    x_t = (1 - t_) * a_0 + t_ * a_1
    v_t = velocity(x_t, t, keys)
    return masked_mean((v_t - (a_1 - a_0)) ** 2, mask)  # Eq. (7)


def feature_loss(h_student, h_teacher, real):
    """(B, T, D) hidden states, real (B, T) -> mean over tokens of the squared distance."""
    distance = ((h_student.float() - h_teacher.detach().float()) ** 2).sum(-1)
    return (distance * real).sum() / real.sum()  # Eq. (9)


def answer_loss(vlm, h, labels):
    """h (B, T, D), labels (B, T) with -100 where nothing is asked -> next-token cross-entropy."""
    h, labels = h[:, :-1], labels[:, 1:]
    return F.cross_entropy(vlm.lm_head(h[labels >= 0]).float(), labels[labels >= 0])


def total_loss(losses, cfg):
    """Action alone for the twin; plus features for a student, plus answers for the co-trained baseline."""
    total = losses["action"]  # Eq. (8)
    if "feature" in losses:
        total = total + cfg.distill_weight * losses["feature"]  # Eq. (10)
    if "answer" in losses:
        total = total + cfg.cotrain * losses["answer"]  # ASSUMPTION A7
    return total


# --- Eval: acting in closed loop, general abilities, where the right brain looks ------------------


class Policy:
    """A trained model with its normalisation: observations in, actions in the world's units out."""

    def __init__(self, model, cfg, processor, stats, device, fast=None):
        self.model, self.cfg, self.processor, self.stats = model, cfg, processor, stats
        self.device, self.fast = device, fast
        self.action_dim = len(stats["action"]["q01"])

    def batch(self, observations, instructions):
        state = [data.normalise(o["state"], self.stats["state"], self.cfg.normalise) for o in observations]
        samples = [
            {"images": list(o["images"].values()), "instruction": i, "state": s}
            for o, i, s in zip(observations, instructions, state)
        ]
        return common.to_device(sense(samples, self.cfg, self.processor), self.device)

    def act(self, observations, instructions, rng):
        """n observations, n instructions -> action chunks (n, H, A) in the world's units."""
        self.model.eval()
        a_0 = rng.standard_normal((len(observations), self.cfg.horizon, self.action_dim), np.float32)
        with common.autocast(self.device, self.cfg.dtype):
            batch = self.batch(observations, instructions)
            a = self.model.act(batch, torch.from_numpy(a_0).to(self.device), self.fast)
        return data.unnormalise(a.cpu().numpy(), self.stats["action"], self.cfg.normalise)


def blend(chunks):
    """Adaptive ensemble: chunks [(H, A)], newest last, made one step apart -> the present action (A,).

    Each chunk's opinion on the present step, weighted by exp(0.1 cosine similarity to the newest one).
    """
    opinions = np.stack([c[age] for age, c in enumerate(reversed(chunks)) if age < len(c)])  # newest first
    norm = np.linalg.norm(opinions, axis=1) * np.linalg.norm(opinions[0]) + 1e-7
    weights = np.exp(0.1 * (opinions @ opinions[0]) / norm)
    return (weights[:, None] * opinions).sum(0) / weights.sum()


def rollout(policy, cfg, starts, seed, film=0):
    """Acts in worlds side by side. starts: [(world seed, task, domain)] -> successes [bool], films [[frame]]."""
    suite = cfg.world.partition(":")[2] or "bridge"
    rng = np.random.default_rng(seed)
    worlds = [tabletop.Tabletop(suite, cfg.size, cfg.wrist_size) for _ in starts]
    observations = [w.reset(*start) for w, start in zip(worlds, starts)]
    chunks, films = [[] for _ in worlds], [[] for _ in worlds]
    every = 1 if cfg.ensemble else cfg.execute
    for step in range(max(w.max_steps for w in worlds)):
        live = [i for i, w in enumerate(worlds) if not w.success and step < w.max_steps]
        if not live:
            break
        if step % every == 0:
            seen = [observations[i] for i in live]
            planned = policy.act(seen, [worlds[i].instruction for i in live], rng)
            for i, chunk in zip(live, planned):
                chunks[i] = (chunks[i] + [chunk])[-7:]
        for i in live:
            action = blend(chunks[i]) if cfg.ensemble else chunks[i][-1][step % every]
            worlds[i].step(action)
            if i < film or step % every == every - 1 or cfg.ensemble:
                observations[i] = worlds[i].observe()
            if i < film:
                views = list(observations[i]["images"].values())
                if cfg.brain != "vanilla" and cfg.head != "fast":
                    views.append(gaze(policy, observations[i], worlds[i].instruction))
                words = [worlds[i].instruction, f"step {step + 1}"]
                done = worlds[i].success or None
                films[i].append(pictures.caption_frame(views, words, scale=4, success=done))
    return [w.success for w in worlds], films[:film]


def evaluate(policy, cfg, dist, run):
    """Closed-loop success in every domain -> {domain: {"success", "ci95", "episodes", "per_task"}}; writes GIFs."""
    suite = cfg.world.partition(":")[2] or "bridge"
    tasks, results = tabletop.SUITES[suite], {}
    for domain in cfg.domains:
        starts = [(10_000_000 + cfg.seed * 100_000 + i, tasks[i % len(tasks)], domain) for i in range(cfg.episodes)]
        mine, wins = range(dist.rank, cfg.episodes, dist.processes), {}
        for first in range(0, len(mine), cfg.parallel):
            some = mine[first : first + cfg.parallel]
            film = cfg.gifs if dist.main and first == 0 else 0
            won, films = rollout(policy, cfg, [starts[i] for i in some], cfg.seed, film)
            wins |= dict(zip(some, won))
            for i, frames in enumerate(films):
                pictures.save_gif(run.folder / f"rollout-{domain}-{i}.gif", frames, fps=8)
        wins = {i: won for part in dist.gather(wins) for i, won in part.items()}
        per_task = {t: [won for i, won in wins.items() if starts[i][1] == t] for t in tasks}
        rate = sum(wins.values()) / len(wins)
        results[domain] = {
            "success": rate,
            "ci95": common.ci95(sum(wins.values()), len(wins)),
            "episodes": len(wins),
            "per_task": {t: sum(w) / len(w) for t, w in per_task.items() if w},
        }
        low, high = results[domain]["ci95"]
        run.say(f"  {domain:8} success {rate:6.1%}  (95% {low:.1%} to {high:.1%}, {len(wins)} episodes)")
    return results


@torch.no_grad()
def gaze(policy, observation, instruction):
    """Figure 5: the static camera's picture, bright where the right brain's last token looks in the left brain."""
    image = next(iter(observation["images"].values()))
    batch = policy.batch([observation], [instruction])
    joint_attention.maps = []
    policy.model.think(batch)
    weights, joint_attention.maps = torch.stack(joint_attention.maps), None  # (layers, 1, heads, T_R, T_L + T_R)
    _, rows, columns = (batch["image_grid_thw"][0] // torch.tensor([1, 2, 2])).tolist()
    is_picture = (batch["left"]["input_ids"][0] == policy.processor.image_token_id).nonzero()[: rows * columns, 0]
    heat = weights[:, 0, :, -1, is_picture].mean((0, 1)).view(1, 1, rows, columns).float()
    heat = F.interpolate(heat / heat.max(), image.shape[:2], mode="bilinear")[0, 0, :, :, None].cpu().numpy()
    return (image * (0.25 + 0.75 * heat)).astype(np.uint8)


ABILITIES = ("pope", "seed", "scienceqa", "mme")


@torch.no_grad()
def abilities(model, cfg, processor, device, sets):
    """Accuracy on the four question sets of each brain by itself -> {"right": {...}, "left": {...}}.

    sets: {name: [sample]} of `question_sets`. MME counts a picture only if both its questions are answered right.
    """
    model.eval()
    out = {}
    for side in ("right", "left"):
        vlm = getattr(model, side)
        if vlm is None:
            continue
        out[side] = {}
        for name, samples in sets.items():
            right = []
            for i in range(0, len(samples), 64):
                batch = common.to_device(ask(samples[i : i + 64], processor), device)
                with common.autocast(device, cfg.dtype):
                    right += model.answer(vlm, batch)[1].tolist()
            right = np.array(right, float)
            out[side][name] = float(right.reshape(-1, 2).min(1).mean() if name == "mme" else right.mean())
    return out


def question_sets(cfg):
    """The four benchmarks of Figure 2 in the embedded world's form -> {name: [sample]}."""
    sets = {}
    for name in ABILITIES:
        items = questions.benchmark(name, cfg.questions, 777, cfg.size, cfg.wrist_size)
        sets[name] = [
            {"images": list(images.values()), "question": q, "answer": a} for images, q, a, _ in items
        ]
    return sets


# --- Train ----------------------------------------------------------------------------------------


def make_optimizers(model, cfg):
    """AdamW over everything that trains, or Muon over the matrices and AdamW over the rest; a group keeps its peak rate."""
    groups = {}
    for name, p in model.named_parameters():
        if p.requires_grad:
            peak = cfg.lr if name.startswith(("right.", "left.")) else cfg.lr_head
            matrix = cfg.optimizer == "muon" and p.dim() == 2 and "embed" not in name
            groups.setdefault((matrix, peak), []).append(p)
    sets = {m: [{"params": p, "lr": r, "peak": r} for (k, r), p in groups.items() if k == m] for m in (False, True)}
    made = [torch.optim.AdamW(sets[False], betas=(0.9, 0.95), eps=1e-8, weight_decay=cfg.weight_decay)]
    if sets[True]:
        made.append(torch.optim.Muon(sets[True], weight_decay=cfg.weight_decay, adjust_lr_fn="match_rms_adamw"))
    return made


def train(cfg, dist, run, model, processor, parts, meta, fast=None, resumed=None, teacher=None):
    """The loop, flat: learning rate, step, log, measure, save -> seconds spent training.

    parts: (actions, questions or None) as mixtures; meta: what the checkpoint must know to act ("stats", "fast").
    """
    opts = make_optimizers(model, cfg)
    start, seconds = 0, 0.0
    if resumed:
        for opt, state in zip(opts, resumed.train_state["optimizers"]):
            opt.load_state_dict(state)
        common.set_rng_state(resumed.local_state["rng"])
        start, seconds = resumed.step, resumed.train_state["seconds"]
    model.to(dist.device)
    unused = cfg.brain == "nofreeze"  # the left brain's last layer matters by its keys and values alone
    ddp = DistributedDataParallel(model, find_unused_parameters=unused) if dist.processes > 1 else model
    join = partial(collate, cfg=cfg, processor=processor, fast=fast)
    batches = data.Batches([p for p in parts if p], join, cfg.batch, dist.rank, dist.processes)
    loader = DataLoader(batches, batch_size=None, sampler=range(start, cfg.steps), num_workers=cfg.workers)
    action_dim = len(meta["stats"]["action"]["q01"])
    sets = question_sets(cfg) if cfg.qa_every and dist.main else {}
    parameters = [p for p in model.parameters() if p.requires_grad]
    stop, tick = common.Stop(), time.perf_counter()

    def save(step):
        state = {"optimizers": [opt.state_dict() for opt in opts], "seconds": seconds + time.perf_counter() - tick}
        tensors = {n: t for n, t in model.state_dict().items() if cfg.brain == "nofreeze" or not n.startswith("left.")}
        about = {"method": "twinbrain", "config": dataclasses.asdict(cfg), **meta}
        local = {"rng": common.rng_state()}
        common.save_checkpoint(run.folder / "checkpoints", step, tensors, state, local, about, dist)

    for step, batch in zip(range(start, cfg.steps), loader):
        for group in (g for opt in opts for g in opt.param_groups):
            group["lr"] = common.lr_at(step, group["peak"], cfg.warmup, cfg.steps, cfg.min_lr * group["peak"])
        if sets and step % cfg.qa_every == 0:
            run.record(step, {"abilities": abilities(model, cfg, processor, dist.device, sets)})
        model.train()
        batch = common.to_device(batch, dist.device)
        noise = common.to_device(draw_noise(cfg, step, action_dim, dist), dist.device)
        with common.autocast(dist.device, cfg.dtype):
            with torch.no_grad():
                h_teacher = teacher.think(batch)[0].last_hidden_state if teacher else None
            losses = ddp(batch, noise, h_teacher)
            loss = total_loss(losses, cfg)
        loss.backward()
        norm = nn.utils.clip_grad_norm_(parameters, cfg.clip)
        for opt in opts:
            opt.step()
            opt.zero_grad(set_to_none=True)
        run.progress(step + 1)
        if (step + 1) % cfg.log_every == 0 or step + 1 == cfg.steps:
            values = {name: float(value.detach()) for name, value in losses.items()}
            if not math.isfinite(sum(values.values())):
                raise common.UserError(f"the loss is not finite at step {step + 1}: lower --lr or --lr-head")
            now = seconds + time.perf_counter() - tick
            rate = (step + 1 - start) * cfg.batch * dist.processes / max(time.perf_counter() - tick, 1e-9)
            lr = opts[0].param_groups[0]["lr"]
            run.log(step + 1, values | {"lr": lr, "norm": float(norm), "samples/s": rate, "s": now})
        asked = dist.any(stop.requested)
        if (step + 1) % cfg.save_every == 0 or step + 1 == cfg.steps or asked:
            save(step + 1)
        if asked and step + 1 < cfg.steps:
            run.say(f"stopped at step {step + 1}; go on with: python twinbrain.py --resume {run.folder}")
            raise SystemExit(130)
    stop.restore()
    if sets:
        run.record(cfg.steps, {"abilities": abilities(model, cfg, processor, dist.device, sets)})
    return seconds + time.perf_counter() - tick


# --- main -----------------------------------------------------------------------------------------

FREE = ("steps", "episodes", "domains", "execute", "ensemble", "parallel", "gifs", "questions", "log_every", "save_every",
        "workers", "threads", "device", "euler", "eval_only")  # fmt: skip  # what a resumed run may change


def build(cfg, state_dim, action_dim, checkpoint=None):
    """-> (model, processor), from the backbone's weights or, for what trains, from a checkpoint's."""
    vlm, processor = common.load_backbone(cfg.backbone)
    if cfg.head == "fast":
        common.Fast.extend(vlm, processor.tokenizer)
    common.seed_all(cfg.seed)
    model = TwinBrain(cfg, vlm, processor, state_dim, action_dim)
    if checkpoint:
        missing, surplus = model.load_state_dict(checkpoint.tensors, strict=False)
        missing = [n for n in missing if not n.startswith("left.")]  # the frozen left brain is the backbone itself
        if missing or surplus:
            raise common.UserError(f"{checkpoint.path} does not fit this model: {(missing + surplus)[0]}")
    return model, processor


def load_policy(folder, device, **changes):
    """A run folder -> (Policy, its Config); `changes` are fields that differ from the saved run."""
    checkpoint = common.load_checkpoint(folder, "twinbrain", "cpu")
    cfg = dataclasses.replace(common.resume_config(Config(), checkpoint.meta["config"]), **changes)
    stats = checkpoint.meta["stats"]
    model, processor = build(cfg, len(stats["state"]["q01"]), len(stats["action"]["q01"]), checkpoint)
    fast = common.Fast.load(checkpoint.meta["fast"], processor.tokenizer) if cfg.head == "fast" else None
    return Policy(model.to(device).eval(), cfg, processor, stats, device, fast), cfg


def list_ablations():
    """Each row: the paper's number (its benchmark, its backbone) and ours, where a result file holds one."""
    file = Path(__file__).parent / "assets" / "results" / "twinbrain.jsonl"
    rows = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
    print(f"{'--ablation':18} {'row':58} {'paper %':>8}  ours % (laptop: in-domain | out-of-domain, seeds)")
    for name, row in ABLATIONS.items():
        mine = [r for r in rows if r["arm"] == name]
        ours = "not run"
        if mine:
            ins, outs = ([100 * r[k] for r in mine] for k in ("success", "success_out"))
            ours = f"{np.mean(ins):.1f} | {np.mean(outs):.1f}, {len(mine)}"
        print(f"{name:18} {row['_row']:58} {row['_paper'] or '-':>8}  {ours}")


def show_first_batch(run, mixture, cfg, processor):
    """The first samples as the brains read them: pictures and decoded right prompt."""
    samples = [mixture[i] for i in range(6)]
    ids = sense(samples, cfg, processor)["right"]["input_ids"]
    texts = [processor.tokenizer.decode(row).replace("<|image_pad|>", "") for row in ids]
    rows = [(s["images"], t.replace("<|endoftext|>", "")) for s, t in zip(samples, texts)]
    pictures.contact_sheet(run.folder / "first_batch.png", rows)


def draw_curves(run):
    """loss.png and, where abilities were measured along the way, forgetting.png, from metrics.jsonl."""
    lines = [json.loads(line) for line in (run.folder / "metrics.jsonl").read_text().splitlines()]
    losses = {k: [(r["step"], r[k]) for r in lines if k in r] for k in ("action", "feature", "answer")}
    losses = {k: v for k, v in losses.items() if v}
    if losses:
        pictures.plot_curves(run.folder / "loss.png", losses, "training loss", "step", "loss", smooth=0.8)
    asked = [(r["step"], r["abilities"]) for r in lines if "abilities" in r]
    if len(asked) > 1:
        curves = {f"{k} ({b})": [(s, a[b][k]) for s, a in asked] for b in asked[0][1] for k in ABILITIES}
        pictures.plot_curves(run.folder / "forgetting.png", curves, "general abilities", "step", "accuracy")


def check(cfg):
    """What no type can say about the flags -> the tabletop suite that --world names."""
    world, _, suite = cfg.world.partition(":")
    suite = suite or "bridge"
    if world != "tabletop" or suite not in tabletop.SUITES:
        known = [f"tabletop:{name}" for name in tabletop.SUITES]
        raise common.UserError(f"unknown --world {cfg.world}: did you mean {common.nearest(cfg.world, known)}?")
    if cfg.data:
        raise common.UserError(f"--data {cfg.data}: this version trains on the embedded world's demonstrations alone")
    if cfg.ablation == "t9-student" and not cfg.distill:
        raise common.UserError("--ablation t9-student needs its teacher: python twinbrain.py --out RUN, then --distill RUN")
    if not 1 <= cfg.execute <= cfg.horizon:
        raise common.UserError(f"--execute {cfg.execute} must lie between 1 and --horizon {cfg.horizon}")
    return suite


def finish(cfg, dist, run, policy, seconds):
    """Acts, asks, draws and writes result.json."""
    run.say("closed loop:")
    results = evaluate(policy, cfg, dist, run)
    sets = question_sets(cfg)
    vqa = abilities(policy.model, cfg, policy.processor, dist.device, sets)
    for side, scores in vqa.items():
        run.say(f"  questions to the {side} brain: " + ", ".join(f"{k} {v:.1%}" for k, v in scores.items()))
    first = results[cfg.domains[0]]
    outside = [r["success"] for d, r in results.items() if d not in ("in", "look")]
    run.result({
        "method": "twinbrain", "arm": cfg.ablation or cfg.brain, "backbone": cfg.backbone, "world": cfg.world,
        "seed": cfg.seed, "steps": cfg.steps, "samples": cfg.steps * cfg.batch * dist.processes,
        "train_seconds": round(seconds, 1), "success": first["success"], "ci95": first["ci95"],
        "episodes": first["episodes"], "per_task": first["per_task"], "domains": results,
        "success_out": sum(outside) / len(outside) if outside else None, "vqa": vqa,
        "params": common.param_counts(policy.model),
    })  # fmt: skip
    if dist.main:
        draw_curves(run)
    run.say(f"wrote {run.folder}: result.json, loss.png, rollout-*.gif, first_batch.png, checkpoints")
    run.close()
    dist.destroy()


def main(argv=None):
    cfg = common.parse(Config, PRESETS, ABLATIONS, argv)
    if cfg.ablation == "list":
        return list_ablations()
    dist = common.setup(cfg)
    resumed = None
    if cfg.resume:
        resumed = common.load_checkpoint(cfg.resume, "twinbrain", "cpu", dist)
        cfg = common.resume_config(cfg, resumed.meta["config"], FREE)
    suite = check(cfg)
    if cfg.eval_only:
        policy, saved = load_policy(cfg.eval_only, dist.device)
        out = cfg.out or f"{cfg.eval_only.rstrip('/')}/eval-{time.strftime('%Y%m%d-%H%M%S')}"
        cfg = dataclasses.replace(common.resume_config(cfg, dataclasses.asdict(saved), FREE + ("world", "out", "seed")), out=out)
        policy.cfg = policy.model.cfg = cfg
        run, seconds = common.Run(cfg, "twinbrain", __file__, dist, cfg.steps), 0.0
    else:
        run = common.Run(cfg, "twinbrain", __file__, dist, cfg.steps, resumed)
        run.say(f"run folder {run.folder}")
        made = (suite, cfg.demos, cfg.seed, cfg.size, cfg.wrist_size, cfg.noise)
        episodes = data.demonstrations(*made) if dist.main else None
        dist.barrier()
        episodes = episodes or data.demonstrations(*made)
        stats = data.statistics(episodes)
        state_dim, action_dim = len(stats["state"]["q01"]), len(stats["action"]["q01"])
        model, processor = build(cfg, state_dim, action_dim, resumed)
        windows = data.Windows(episodes, stats, cfg.horizon, cfg.normalise, cfg.augment)
        actions = data.Mixture([windows], seed=cfg.seed)
        asked = data.Mixture([data.Questions(cfg.size, cfg.wrist_size)], seed=cfg.seed + 1) if cfg.cotrain else None
        fast = None
        if cfg.head == "fast":
            fast = common.Fast.fit([windows.get(i, None)["action"] for i in range(0, len(windows), 7)], processor.tokenizer)
        meta = {"stats": stats, "fast": fast.state() if fast else None}
        teacher = load_policy(cfg.distill, dist.device)[0].model if cfg.distill else None
        counts = common.param_counts(model)
        run.say("parameters " + ", ".join(f"{k} {common.human(v)}" for k, v in counts.items())
                + f"; {len(episodes)} demonstrations, {len(windows)} steps; {dist.device}")  # fmt: skip
        if dist.main and not resumed:
            show_first_batch(run, actions, cfg, processor)
        seconds = train(cfg, dist, run, model, processor, (actions, asked), meta, fast, resumed, teacher)
        policy = Policy(model, cfg, processor, stats, dist.device, fast)
    finish(cfg, dist, run, policy, seconds)


if __name__ == "__main__":
    common.run_main(main)
