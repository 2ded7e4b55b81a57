"""VITA-VLA (arXiv 2510.09607): a VLM learns to act from a small action model, in two stages.

  teacher, Seer        pictures, words, state at steps 1..S
  [ frozen encoders ] -> [ GPT-2 blocks ] -> hidden states of 3 action tokens -> [ decoder D ] -> a
                                                      ^                               |
                               stage 1, align: L2     |                               | reused
                                                      v                               v
  [ VLM: ... <img> words <state> <act> <act> <act> ...] -> a_h -> [ mapper M ] -> [ decoder D ] -> a
                                                      stage 2, fine-tune: L1 and 0.01 BCE

Conventions: arm actions are normalised to [-1, 1] (`--normalise`) and leave the decoder through a
tanh; the gripper's label is 1 for open (paper: closed; its code: open on CALVIN, closed on LIBERO).
Steps are consecutive frames, oldest first. Letters: B batch, S steps of history, N = 3 future
actions, T tokens, D width of the VLM, H width of Seer, A numbers of an action.
Words: docs/glossary.md. parts/seer.py holds Seer, parts/history.py what is kept between steps.

Equation map
  Eq. 1  [img][text][state][act][act][act] per step  -> chat()
  Eq. 2  a_h, last-layer states of the action tokens -> VitaVLA.hidden()
  Eq. 3  alignment loss                              -> align_loss()
  (unnumbered) L_total = L_arm + 0.01 L_gripper      -> action_losses(), total_loss()
Table map (`--ablation list`): Tables 1 and 3 and Section 4.2: two-stage, only-finetune, freeze-vlm;
Section 3.2: separate-tokens, state-text; Appendix A.1: mapper-decoder, image-size; others: ours.

Assumptions and decisions, where paper and released code differ or are silent
  A1  Eq. 3 is the squared distance (`--align-loss mse`); the released code takes its root (`norm`).
  A2  L_arm is the mean absolute error, over joints too (`--arm-loss mae`); the released code has
      `smooth`. Neither paper says where gradients are clipped: at 1 (Seer's code: 0.1).
  A3  The gripper term counts, 0.05 on the laptop; in the released code it is lost (`no-gripper`).
  A4  One causal chat of S turns, in words of ours: a step sees all before it, act_2 sees act_1.
  A5  History grows from one step, as in every window of training; nothing is repeated.
  A6  Actions past an episode's end leave the losses; foresight shows its last picture there.
  A7  Executed is the prediction for now (`--act-index 0`; a teacher's always); released, the next.
  A8  The teacher stands still in stage 1: no dropout, no gradient (the released code drops out).
  A9  On the laptop Seer's encoders are the tiny backbone's vision tower and, of an instruction, the
      mean of its words' states halfway up the language model (`--eyes backbone`; paper: MAE, CLIP,
      `mae`). assets/seer has seen 12,000 demonstrations, a student sees 3,000 (paper: the same).
  A10 There, with 16 and 4 tokens a picture, the resampler is left out: with it, learning is slower.
  A11 A released Seer (`--teacher seer.pth`) speaks of the arm as recorded, in [-1, 1]: `--normalise
      raw`, as in the presets. LIBERO's has seen pictures as the renderer leaves them, half a turn
      from ours, and says 1 for closed: `--released libero` (parts/seer.py).
Errata: the "3-layer MLP" connector of Section 3.2 has two layers; the 13 steps of a sample are 10
observed and 3 future ones; Table 7's captions (b) and (c) are exchanged.

  python vita_vla.py                                              # laptop: both stages
  python vita_vla.py --teacher train                              # laptop: a teacher first
  torchrun vita_vla.py --backbone Qwen3-VL-4B                     # one GPU, the embedded world
  torchrun --nproc-per-node 8 vita_vla.py --preset calvin --data calvin_abc_d --teacher seer.pth
"""

import math
import time
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

import common
import data
from parts import history, runs, seer
from worlds import ablations, loop, pictures
from worlds.ablations import row

# --- Config: the defaults are the laptop's run ----------------------------------------------------


@dataclass
class Config:
    backbone: str = "tiny"  # tiny, VITA-1.5, Qwen3-VL-2B/4B/8B, Qwen2.5-VL-3B/7B, Eagle2-2B, DIR
    world: str = "tabletop:abc_d"  # where to act; its suite also gives the demonstrations
    data: str = ""  # recordings to train on, `bridge,fractal=2,FOLDER`; empty: the world's own
    skip_bad: bool = False  # leave out recordings that cannot be read, and list them
    robot: str = ""  # whose recordings to act like; empty: the first of --data
    out: str = ""  # run folder; empty: runs/vita_vla-<seed>-<time>, one for each stage
    steps: int = 0  # optimizer steps of a stage; 0: see teacher-steps, align-steps, finetune-steps
    seed: int = 0  # everything random follows from it
    resume: str = ""  # run folder (stage's or chain's) to go on from; auto: --out's, or start it
    eval_only: str = ""  # run folder to evaluate, without training
    ablation: str = ""  # a row of the paper's tables; `list` prints them all
    preset: str = ""  # a named configuration, see below; of a --backbone but tiny: larger
    describe: bool = False  # prints the parameters of each part, without weights, and leaves
    export: str = ""  # run folder of a student whose VLM becomes a Hugging Face checkpoint in --out
    episodes: int = 100  # evaluation episodes in each domain (paper: 1000 chains on CALVIN)
    # what is trained
    stage: str = "chain"  # chain | teacher | align | finetune | frozen: one, or all of the recipe's
    recipe: str = "two-stage"  # two-stage | only-finetune | freeze-vlm: Section 4's settings
    teacher: str = "auto"  # auto | tiny | train | RUN | a released Seer's .pth: choose_teacher()
    student: str = ""  # finetune: run folder of the student to start from
    freeze_vlm: bool = False  # finetune: the VLM as it is stays frozen (--stage frozen)
    teacher_steps: int = 1500  # optimizer steps of the teacher's stage
    align_steps: int = 500  # of stage 1 (paper: 3 epochs)
    finetune_steps: int = 1000  # of stage 2 (paper: 2 epochs)
    # the teacher, Seer
    eyes: str = "backbone"  # backbone | mae: frozen encoders, the backbone's or MAE and CLIP (A9)
    released: str = "calvin"  # calvin | libero: whose pictures, gripper a released Seer has (A11)
    width: int = 128  # H (paper: 1024 on CALVIN, 384 on LIBERO)
    depth: int = 4  # GPT-2 blocks (paper: 24)
    heads: int = 4  # attention heads (paper: 16, 12)
    resampler: int = 0  # layers of the perceiver resampler; 0: a picture's tokens as they are (A10)
    queries: int = 6  # resampled tokens of a picture (paper: 16, 6)
    foresight: int = 4  # foresight tokens of a picture, a square number (paper: 16, 9)
    foresight_weight: float = 0.1  # of the predicted pictures' loss
    foresight_steps: int = 1  # of a window's last steps that predict pictures; 0: all (Seer)
    patch: int = 8  # pixels of a predicted patch (paper: 16)
    dropout: float = 0.0  # what the GPT-2 blocks add to their input (paper: 0.1)
    attention_dropout: float = 0.0  # of the GPT-2 blocks' attention (paper: 0.1)
    embedding_dropout: float = 0.0  # of what enters the GPT-2 blocks (paper: 0.1)
    goal: int = 0  # pre-training: foresight sees the state so many steps ahead (Seer: 4, then 0)
    action_sees: str = "all"  # all | pictures | pictures-state: pictures are Seer's atten_only_obs
    hide_foresight: float = 0.0  # share hidden from actions, drawn for each batch (Seer: 0, 0.5)
    # the student
    history: int = 3  # S, observed steps (paper: 10 on CALVIN, 7 on LIBERO)
    future: int = 3  # N, actions predicted at each step
    tokens: str = "shared"  # shared | separate: one action token repeated, or one for each action
    mapper: str = "mlp"  # mlp | decoder: M is three linear layers, or a transformer decoder
    state_input: str = "encoder"  # encoder | text: the state as one token, or as digits
    gripper_state: str = "onehot"  # onehot | raw: the last number open or not, or the last two
    align_loss: str = "mse"  # mse | norm (A1)
    arm_loss: str = "mae"  # mae | smooth (A2)
    gripper_weight: float = 0.05  # of the gripper's BCE (paper: 0.01; A3)
    # training
    batch: int = 48  # windows per process and step (paper: 8, then 4, on each of 8 GPUs)
    lr: float = 1e-3  # the VLM in stage 2 (paper: 1e-4)
    lr_head: float = 2e-3  # everything else of the student (paper: 1e-4)
    lr_teacher: float = 6e-3  # the teacher (Seer: 1e-3)
    min_lr: float = 0.0  # where the cosine ends, as a share of the peak
    warmup: int = 50  # steps of linear warm-up
    weight_decay: float = 1e-4  # of AdamW
    clip: float = 1.0  # gradient norm (Seer: 0.1)
    optimizer: str = "muon"  # adamw | adamw8bit | muon: matrices alone (paper: adamw)
    muon: str = ""  # bf16 | fp32: products inside Muon; empty: as --dtype
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
    lora: int = 0  # rank R: stage 2 trains a LoRA on the VLM's language model; 0: its weights
    # demonstrations of the embedded world
    demos: int = 3000  # episodes
    noise: float = 0.3  # disturbances while the expert demonstrates, for recovery
    size: int = 64  # static camera, pixels (paper: 200); VITA-1.5 reads both cameras at this size
    wrist_size: int = 32  # wrist camera, pixels
    augment: int = 2  # random shift of the pictures, in 64ths of their side
    normalise: str = "auto"  # auto | q99 | minmax | raw: bounds of actions, state; raw: see A11
    # evaluation and logging
    domains: tuple[str, ...] = ()  # what differs from training; empty: chain in abc_d, else all
    execute: int = 1  # actions executed of each plan: one, as the history is made of every step
    act_index: int = 0  # which of the N predictions is executed (A7)
    ensemble: bool = False  # blend what the last plans say about now (released: on LIBERO)
    cache: bool = True  # keep keys, values and pictures of the history between control steps
    parallel: int = 50  # episodes acted side by side
    gifs: int = 2  # rollouts drawn in each domain
    render: str = "gif"  # gif | mp4 | show: what they become; show plays them in the terminal too
    log_every: int = 20  # steps between log lines
    save_every: int = 500  # steps between checkpoints


# Of about 930,000 windows (LIBERO 270,000), 256 a step on 8 GPUs, 3 and 2 epochs, 1 to warm up;
# Seer has 20 (40). In stage 2 Table 5 has 128 a step, and warms up in both epochs
CALVIN = dict(
    teacher_steps=72_600, align_steps=11_000, finetune_steps=7_300, warmup=3_600, accumulate=4,
    backbone="VITA-1.5", eyes="mae", width=1024, depth=24, heads=16, resampler=3, queries=16,
    foresight=16, patch=16, dropout=0.1, attention_dropout=0.1, embedding_dropout=0.1,
    foresight_steps=0, history=10, batch=8, lr=1e-4, lr_head=1e-4, lr_teacher=1e-3, augment=0,
    gripper_weight=0.01, optimizer="adamw", size=200, wrist_size=84, act_index=1, episodes=1000,
    workers=4, normalise="raw", frozen="bf16", shard="full",
)  # fmt: skip
LIBERO = dict(teacher_steps=42_000, align_steps=3_200, finetune_steps=2_100, warmup=1_000,
              width=384, heads=12, queries=6, foresight=9, history=7, act_index=0, ensemble=True,
              gripper_state="raw", released="libero", wrist_size=200, episodes=500)  # fmt: skip
SHORT = dict(align_steps=250, finetune_steps=500)  # half the length, for ablations over seeds
LARGER = dict(optimizer="adamw", lr=1e-4, lr_head=1e-4, frozen="bf16", lora=32)  # on one GPU
PRESETS = {"calvin": CALVIN, "libero": CALVIN | LIBERO, "short": SHORT, "larger": LARGER}

ABLATIONS = {  # the paper's first-task success in % and average length on CALVIN, the row, flags
    "two-stage": row("92.5, 3.18", "Table 1, two-stage"),
    "only-finetune": row("86.0, 3.08", "Table 1, only-finetune", recipe="only-finetune"),
    "freeze-vlm": row("45.3", "Section 4.2, freeze-vlm", recipe="freeze-vlm"),
    "separate-tokens": row(None, "Section 3.2, one token for each action", tokens="separate"),
    "state-text": row(None, "Section 3.2, the state as text", state_input="text"),
    "mapper-decoder": row(None, "App. A.1, a decoder as mapper", mapper="decoder"),
    "image-size": row(None, "App. A.1, larger pictures, own teacher", size=96),
    "align-norm": row(None, "released code: L2 norm in Eq. 3", align_loss="norm"),
    "smooth-l1": row(None, "released code: smooth L1", arm_loss="smooth"),
    "no-gripper": row(None, "released code: no gripper term", gripper_weight=0.0),
    "ensemble": row(None, "LIBERO's temporal ensemble", ensemble=True),
}


def ours(line):
    """A line of assets/results -> what `--ablation list` shows, % of first tasks and length."""
    return 100 * line["domains"].get("chain", line)["success"], line["length"]


# --- Prompt, and the one path from observations to tensors ----------------------------------------

SYSTEM = "You are a helpful robot brain that can understand images and texts."
STATE, ACT = "<|video_pad|>", "<|endoftext|>"  # words no instruction has: places for other vectors


@lru_cache(maxsize=65536)
def encode(tokenizer, text):
    return tuple(tokenizer.encode(text, add_special_tokens=False))


def places(tokenizer):
    """-> ids of the words that stand for other vectors."""
    return {n: tokenizer.convert_tokens_to_ids(w) for n, w in (("states", STATE), ("acts", ACT))}


def chat(sample, grids, cfg, processor):
    """All steps of a sample as token ids; grids: of its pictures, step by step."""
    cameras, ids = len(sample["images"][0]), ()
    for i in range(len(sample["images"])):
        text = f"<|im_start|>system\n{SYSTEM}<|im_end|>\n" if i == 0 else ""
        text += "<|im_start|>user\n"
        for grid in grids[i * cameras : (i + 1) * cameras]:
            text += processor.mark(math.prod(grid) // processor.merge**2)
        text += f"\nInstruction: {sample['instruction']}"
        if cfg.state_input == "text":  # ABLATION state-text
            text += "\nState: " + " ".join(f"{v:.2f}" for v in sample["state"][i])
        else:
            text += STATE
        text += "<|im_end|>\n<|im_start|>assistant\n" + ACT * cfg.future + "<|im_end|>\n"
        # [img_1]..[img_n] [text_1]..[text_m] [state] [act_1] [act_2] [act_3]
        ids += encode(processor.tokenizer, text)  # Eq. (1)
    return ids


def sense(samples, cfg, processor):
    """Samples of n <= S steps, with "images" [n][cameras], "instruction", "state" (n, numbers) and,
    in training, "action" (n, N, A), "mask" (n, N), "ahead" [n or fewer][cameras] -> batch, padded
    to S. Training and acting both come through here."""

    def padded(name):
        """-> (B, S, ...), zero where there is no step."""
        return nn.utils.rnn.pad_sequence([torch.from_numpy(s[name]) for s in samples], True)

    S = max(len(s["images"]) for s in samples)
    pixels, grids = zip(*(processor.images(sum(s["images"], [])) for s in samples))
    rows = [chat(s, grid, cfg, processor) for s, grid in zip(samples, grids)]
    words = [encode(processor.tokenizer, s["instruction"]) for s in samples]
    text = [torch.tensor(ids or (processor.pad_token_id,)) for ids in words]
    batch = {
        "prompt": processor.pad(rows, grids, **places(processor.tokenizer)),
        "pixel_values": torch.from_numpy(np.concatenate(pixels)),
        "grids": [g for grid in grids for g in grid],
        "text": nn.utils.rnn.pad_sequence(text, True, -1),  # (B, words), -1 where there is none
        "steps": torch.tensor([[i < len(s["images"]) for i in range(S)] for s in samples]),
        "state": padded("state"),  # (B, S, numbers)
    }
    batch["there"] = common.flat(batch["steps"])  # rows of B * S with a step
    if cfg.eyes == "mae" and cfg.stage != "finetune":
        batch |= seer.mae_inputs(samples, cfg.released)
    if "action" in samples[0]:
        batch["action"] = padded("action")
        batch["mask"] = padded("mask")  # (B, S, N)
    if "action" in samples[0] and cfg.stage == "teacher":
        cameras = zip(*(step for s in samples for step in s["ahead"]))
        batch["ahead"] = [seer.foresight_target(np.stack(a), cfg) for a in cameras]
        last = batch["steps"].sum(1, keepdim=True) - cfg.goal - torch.arange(S)  # 1 for the last
        foresees = (last > 0) & (last <= (cfg.foresight_steps or S))  # (B, S), n True
        batch["foresees"] = common.flat(foresees)
    return batch


# --- Model: the teacher ---------------------------------------------------------------------------


class Seer(seer.Seer):
    """The teacher (parts/seer.py), and what it is trained by."""

    def forward(self, batch, h_teacher=None):
        """Losses of one step, by name; Seer's own, whatever the student's are."""
        h, foresight = self.hidden(batch)
        losses = action_losses(seer.decode(self, h), batch, "smooth")
        errors = []
        foresight = foresight.flatten(0, 1)[batch["foresees"]]
        for half, target in zip(foresight.chunk(2, dim=1), batch["ahead"]):
            picture = self.imagine(half, math.isqrt(target.shape[1]))
            errors.append(((picture - target) ** 2).mean())
        return losses | {"foresight": sum(errors) / 2}


# --- Model: the student ---------------------------------------------------------------------------


class VitaVLA(nn.Module):
    """The VLM with a state token, action tokens, the mapper M and Seer's decoder."""

    def __init__(self, cfg, vlm, processor, arm=6):
        super().__init__()
        D, H, self.cfg, self.vlm, self.processor = vlm.width, cfg.width, cfg, vlm, processor
        seer.add_state_encoder(self, D, arm)
        count = cfg.future if cfg.tokens == "separate" else 1
        std = vlm.language.get_input_embeddings().weight.std()  # at home among the words
        self.action_token = nn.Parameter(std * torch.randn(count, D))
        if cfg.mapper == "decoder":
            self.mapper = seer.DecoderMapper(D, H)  # ABLATION mapper-decoder
        else:
            layers = nn.Linear(D, H), nn.GELU(), nn.Linear(H, H), nn.GELU(), nn.Linear(H, H)
            self.mapper = nn.Sequential(*layers)
        seer.add_decoder(self, H, arm)
        train_vlm = cfg.stage == "finetune" and not cfg.freeze_vlm
        vlm.language.requires_grad_(train_vlm and not cfg.lora)
        if train_vlm and cfg.lora:
            common.add_lora(vlm.language.layers, cfg.lora)
        # weights that stay the backbone's own: no checkpoint holds them
        own = ("vlm.language.", "vlm.model.language_model.") if train_vlm and not cfg.lora else ()
        names = [n for n in self.state_dict() if n.startswith("vlm.") and not n.startswith(own)]
        self.untouched = {n for n in names if not n.endswith((".down", ".up"))}
        for name in seer.DECODER:
            self.get_submodule(name).requires_grad_(cfg.stage == "finetune")
        for name in seer.STATE_ENCODER:
            self.get_submodule(name).requires_grad_(cfg.state_input == "encoder")

    def blocks(self):
        """What is recomputed, compiled or sharded by itself."""
        eyes = common.vision_blocks(getattr(self.vlm, "model", self.vlm))
        return [*self.vlm.language.layers, *eyes]

    def embed(self, prompt, state):
        """Prompt (B, T), states (steps, numbers), in order -> (B, T, D), still without pictures."""
        x = self.vlm.language.get_input_embeddings()(prompt["input_ids"])
        if self.cfg.state_input == "encoder":
            token = seer.encode_state(self, state, self.cfg.gripper_state)
            x = common.put(x, prompt["states"], token)
        token = self.action_token.repeat(len(state) * self.cfg.future // len(self.action_token), 1)
        return common.put(x, prompt["acts"], token)

    def hidden(self, batch):
        """-> a_h (B, S, N, D), zero at steps that are not there."""
        prompt, there, N = batch["prompt"], batch["there"], self.cfg.future
        # in stage 1 the teacher, whose eyes are the same, has left what it saw in the batch
        seen = batch.get("features") or self.vlm.see(batch)
        x = self.embed(prompt, batch["state"].flatten(0, 1)[there])
        h = self.vlm.read(x, prompt, common.causal_mask(prompt["real"]), seen)
        a_h = h.flatten(0, 1)[prompt["acts"]]  # a_h = pi_last(a_q | x, t, s)  # Eq. (2)
        out = a_h.new_zeros(*batch["steps"].shape, N, a_h.shape[-1])
        return common.put(out, there, a_h.unflatten(0, (-1, N)))

    def forward(self, batch, h_teacher=None):
        """Losses of one step, by name."""
        h = self.mapper(self.hidden(batch))  # (B, S, N, H)
        if h_teacher is not None:
            return {"align": align_loss(h, h_teacher, batch["steps"], self.cfg.align_loss)}
        return action_losses(seer.decode(self, h), batch, self.cfg.arm_loss)


# --- Loss -----------------------------------------------------------------------------------------


def masked_mean(x, mask):
    """x, mask (B, S, N) -> mean over each sample's inside, then over samples."""
    return ((x * mask).flatten(1).sum(1) / mask.flatten(1).sum(1).clamp(min=1)).mean()


def align_loss(h_VLA, h_small, steps, how):
    """M(a_h) and the teacher's states, (B, S, N, H) each, steps (B, S) -> scalar."""
    # 1/N sum_i ||M(a_h^VLA,i) - a_h^Small,i||^2
    distance = (h_VLA.float() - h_small.float().detach()).square().sum(-1)  # Eq. (3)
    distance = (distance + 1e-12).sqrt() if how == "norm" else distance  # ASSUMPTION A1
    return masked_mean(distance, steps[..., None].expand_as(distance))


def action_losses(decoded, batch, how):
    """Arm (B, S, N, A - 1) and gripper logit (B, S, N) against batch["action"] (B, S, N, A)."""
    (arm, gripper), target, mask = decoded, batch["action"], batch["mask"]
    error = F.l1_loss if how == "mae" else F.smooth_l1_loss  # ASSUMPTION A2
    arm = masked_mean(error(arm, target[..., :-1], reduction="none").mean(-1), mask)
    open_ = (target[..., -1] > 0).float()
    bce = F.binary_cross_entropy_with_logits(gripper, open_, reduction="none")
    return {"arm": arm, "gripper": masked_mean(bce, mask)}


def total_loss(losses, cfg):
    """Stage 1: the distance; else L_arm + lambda L_gripper, and the teacher's pictures."""
    if "align" in losses:
        return losses["align"]
    total = losses["arm"] + cfg.gripper_weight * losses["gripper"]  # ASSUMPTION A3
    return total + cfg.foresight_weight * losses.get("foresight", 0.0)


# --- Data: windows of S steps ---------------------------------------------------------------------


class Histories:
    """Every window of S consecutive steps of every episode as a training sample."""

    def __init__(self, episodes, stats, cfg):
        self.episodes, self.stats, self.cfg = episodes, stats, cfg
        counts = [max(1, T - cfg.history + 1) * (T > cfg.goal) for T in data.lengths(episodes)]
        self.starts = np.cumsum([0] + counts)

    def __len__(self):
        return int(self.starts[-1])

    def get(self, index, rng):
        """-> "images" [n][cameras], "ahead" (a teacher's): those N steps later, "instruction",
        "state" (n, numbers), "action" (n, N, A), "mask" (n, N), for n <= S steps."""
        cfg, e = self.cfg, int(np.searchsorted(self.starts, index, side="right")) - 1
        episode, t = self.episodes[e], index - int(self.starts[e])
        T = len(episode.action)
        now = np.arange(t, min(t + cfg.history, T))
        learned = now[: len(now) - cfg.goal]  # --goal: steps whose goal is in the window
        foreseen = learned[-cfg.foresight_steps :] if cfg.stage == "teacher" else ()
        ahead = now[:, None] + np.arange(cfg.future)  # (n, N)
        cameras = list(episode.images.values())
        moves = rng.integers(-cfg.augment, cfg.augment + 1, (len(cameras), 2))

        def look(t):  # one shift for a whole window: its pictures fit each other
            frames = [camera[min(t, T - 1)] for camera in cameras]
            frames = data.scaled(frames, (cfg.size, cfg.wrist_size))
            return [data.shift(f, *(m * len(f) / 64).astype(int)) for f, m in zip(frames, moves)]

        action = episode.action[np.minimum(ahead, T - 1)]  # (n, N, A)
        return {
            "images": [look(t) for t in now],
            "ahead": [look(t + cfg.future) for t in foreseen],
            "instruction": episode.instruction,
            "state": data.normalise(episode.state[now], self.stats["state"]),
            "action": data.normalise(action, self.stats["action"]),
            "mask": (ahead < T) & (now <= learned[-1])[:, None],  # ASSUMPTION A6
        }


# --- Eval: acting with a memory -------------------------------------------------------------------


class Policy:
    """A trained teacher or student with its normalisation: what `worlds.loop` acts with."""

    def __init__(self, model, cfg, processor, robots, device):
        """robots: {what was trained on: its statistics}; --robot says like which to act."""
        self.model, self.cfg, self.processor, self.device = model, cfg, processor, device
        self.robots, self.stats = robots, data.acting(robots, cfg.robot)[1]

    def remember(self, observation, words):
        """Adds the observation to its world's memory -> sample of the last S steps."""
        memory = observation.get("memory", {})
        step = runs.seen([observation], [words], self.cfg, "", self.stats)
        memory["steps"] = (memory.get("steps", []) + step)[-self.cfg.history :]
        return {
            "images": [s["images"] for s in memory["steps"]],
            "state": np.stack([s["state"] for s in memory["steps"]]),
            "instruction": words,
        }

    @torch.no_grad()
    def act(self, observations, instructions, rng):
        """n observations and instructions -> plans (n, 1, A) in the world's units."""
        samples = [self.remember(o, words) for o, words in zip(observations, instructions)]
        self.model.eval()
        with common.autocast(self.device, self.cfg.dtype):
            h = self.last_hidden(samples, observations)  # (n, N, H)
            arm, gripper = seer.decode(self.model, h)
        plans = torch.cat([arm, gripper.sigmoid()[..., None]], dim=-1).cpu().numpy()  # (n, N, A)
        now = np.stack([self.choose(o, plan) for o, plan in zip(observations, plans)])  # (n, A)
        now[:, -1] = np.where(now[:, -1] > 0.5, 1.0, -1.0)
        return data.unnormalise(now[:, None], self.stats["action"])

    def last_hidden(self, samples, observations):
        """-> states of the newest step's action tokens in Seer's width (n, N, H)."""
        student = isinstance(self.model, VitaVLA)
        if student and self.cfg.cache:
            return self.model.mapper(self.recall(samples, observations))
        batch = common.to_device(sense(samples, self.cfg, self.processor), self.device)
        h = self.model.mapper(self.model.hidden(batch)) if student else self.model.hidden(batch)[0]
        return h[torch.arange(len(h), device=h.device), batch["steps"].sum(1) - 1]

    def recall(self, samples, observations):
        """As `hidden` at the newest step, (n, N, D), but a picture is encoded once, and keys and
        values are kept while a history grows; once its window slides, the VLM reads it anew."""
        model, memories = self.model, [o["memory"] for o in observations]
        newest = [s | {"images": s["images"][-1:], "state": s["state"][-1:]} for s in samples]
        batch = common.to_device(sense(newest, self.cfg, self.processor), self.device)
        history.keep_pictures(memories, model.vlm.see(batch), batch["grids"])
        grids = [history.grids_of(m) for m in memories]
        rows = [chat(s, grid, self.cfg, self.processor) for s, grid in zip(samples, grids)]
        return history.newest(model, rows, memories, places(self.processor.tokenizer))

    def choose(self, observation, plan):
        """plan (N, A), the gripper a probability -> the action to execute now (A,)."""
        if not self.cfg.ensemble:
            return plan[0 if self.cfg.stage == "teacher" else self.cfg.act_index]
        memory = observation.setdefault("memory", {})
        memory["plans"] = (memory.get("plans", []) + [plan])[-len(plan) :]
        opinions = [p[age] for age, p in enumerate(reversed(memory["plans"]))][::-1]  # oldest first
        weights = np.exp(-0.01 * np.arange(len(opinions)))
        return (np.stack(opinions) * (weights / weights.sum())[:, None]).sum(0)


# --- Train ----------------------------------------------------------------------------------------


def make_optimizers(model, cfg):
    """AdamW over what trains, or Muon over the matrices and AdamW over the rest; two rates."""
    rows = []
    for name, p in model.named_parameters():
        if p.requires_grad:
            peak = cfg.lr if name.startswith("vlm.") else cfg.lr_head
            peak = cfg.lr_teacher if cfg.stage == "teacher" else peak
            tokens = any(word in name for word in ("embed", "token", "latents"))  # cls_token_*, too
            rows.append((p, peak, cfg.weight_decay, p.dim() == 2 and not tokens))
    return common.optimizers(cfg, rows)


def train(cfg, dist, run, model, batches, meta, resumed, teacher=None):  # [method]
    """The loop, flat -> seconds. meta: what acting needs to know; teacher: what stage 1 follows."""
    opts = make_optimizers(model, cfg)
    start, began = 0, time.perf_counter()
    if resumed:
        start, began = resumed.step, began - resumed.train_state["seconds"]
        common.load_optimizers(opts, resumed)
        common.set_rng_state(resumed.local_state["rng"])
    ddp = common.parallel(model, dist, False)  # [method]
    todo = range(start * cfg.accumulate, cfg.steps * cfg.accumulate)
    feed = common.feed(batches, todo, cfg.workers)
    stop = common.Stop()
    for step in range(start, cfg.steps):
        for group in (group for opt in opts for group in opt.param_groups):
            floor = cfg.min_lr * group["peak"]
            group["lr"] = common.lr_at(step, group["peak"], cfg.warmup, cfg.steps, floor)
        model.train()
        mean, seen = {}, []
        for part in range(cfg.accumulate):
            batch = common.to_device(next(feed), dist.device)
            seen.append(batch)
            common.synchronise(ddp, part + 1 == cfg.accumulate)
            with common.autocast(dist.device, cfg.dtype):
                with torch.no_grad():  # [method]
                    h_teacher = teacher and teacher.hidden(batch)[0]  # [method]
                losses = ddp(batch, h_teacher)  # [method]
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
    return time.perf_counter() - began


# --- main -----------------------------------------------------------------------------------------

FREE = (*runs.FREE, "act_index", "cache")  # what a resumed or evaluated run may change


def build(cfg, checkpoint=None, arm=6):
    """-> teacher or student, processor; weights from backbone, teacher, --student or checkpoint.
    arm: numbers of an action before the gripper's."""
    arm = data.dims(checkpoint.meta["robots"])[1] - 1 if checkpoint else arm
    own = cfg.stage == "teacher" and cfg.eyes == "mae"  # such a Seer needs nothing of a VLM
    vlm, processor = common.load_vlm("tiny" if own else cfg.backbone, cfg.size, cfg.frozen)
    common.seed_all(cfg.seed)
    if cfg.stage == "teacher":
        model = Seer(cfg, seer.paper_eyes() if own else seer.BackboneEyes(vlm), arm)
    else:
        model = common.widen(VitaVLA(cfg, vlm, processor, arm))
    if checkpoint:
        common.fill(model, checkpoint, "these flags")
    elif cfg.stage == "finetune" and cfg.student:
        start = common.load_checkpoint(cfg.student, "vita_vla")
        left = "vlm." if cfg.freeze_vlm else ()  # the VLM as it is, all around it as trained
        start.tensors = {n: t for n, t in start.tensors.items() if not n.startswith(left)}
        own = tuple(n for n in model.state_dict() if n.startswith("vlm."))
        common.fill(model, start, "these flags", own)
    return model, processor


RELEASED = (".pth", ".pt")  # how a --teacher ends that is Seer's own file
MAKES_ONE = "`python vita_vla.py --stage teacher --out RUN` makes one"
TINY = common.ASSETS / "seer"  # the laptop's teacher, trained; its result.json has the command
SHAPES = ("width", "future", "history", "size", "wrist_size", "eyes", "released", "normalise")
TEACHES = (*SHAPES, "backbone", "world", "data", "depth", "heads", "resampler", "queries",
           "foresight", "foresight_weight", "foresight_steps", "patch", "goal", "action_sees",
           "hide_foresight", "gripper_state", "lr_teacher", "teacher_steps", "dropout",
           "attention_dropout", "embedding_dropout")  # fmt: skip


def choose_teacher(cfg):
    """--teacher as a place, or empty where the chain trains its own. auto: `tiny`, the one in
    assets/seer, unless a flag makes another teacher or a world that it has not seen."""
    changed = any(getattr(cfg, n) != getattr(Config, n) for n in TEACHES)
    usual = "" if changed or cfg.stage in ("teacher", "finetune") else "tiny"
    cfg.teacher = {"auto": usual, "train": ""}.get(cfg.teacher, cfg.teacher)


def load_teacher(cfg, device):
    """`--teacher` -> Seer, frozen; it must fit the flags."""
    if cfg.teacher.endswith(RELEASED):
        model, _ = build(replace(cfg, stage="teacher"))
        seer.load_seer(model, cfg.teacher, cfg.released)
    else:
        place = TINY if cfg.teacher == "tiny" else cfg.teacher
        checkpoint = common.load_checkpoint(place, "vita_vla", hint="; " + MAKES_ONE)
        theirs = common.resume_config(Config(), checkpoint.meta["config"])
        if theirs.stage != "teacher":
            raise common.UserError(f"--teacher {cfg.teacher} is a run of --stage {theirs.stage}")
        longer = theirs.history > cfg.history  # such a teacher knows shorter windows too
        same = [n for n in SHAPES if not (n == "history" and longer)]
        same += ["backbone"] * (cfg.eyes == "backbone")
        runs.same_flags("teacher", cfg.teacher, theirs, cfg, same)
        model, _ = build(replace(theirs, goal=0), checkpoint)  # no student knows what lies ahead
        model.robots = checkpoint.meta["robots"]
    return model.to(device).eval().requires_grad_(False)


def introduce(teacher, student, robots, cfg, resumed, device):
    """A teacher reads states and speaks of actions in its own recordings' bounds: a released one's
    become the student's, another's must be about the same, up to a quarter of a number's range.
    Its decoder is the student's from then on."""
    if cfg.teacher.endswith(RELEASED):
        state = data.acting(robots, cfg.robot)[1]["state"]
        seer.read_recorded(teacher, *data.bounds(state), cfg.gripper_state)
    else:
        runs.same_units("teacher", cfg.teacher, teacher.robots, robots, 4)
    if not resumed:
        tensors = {n: t for n, t in teacher.state_dict().items() if n.startswith(seer.DECODER)}
        student.load_state_dict(tensors, strict=False)
    common.store_frozen(teacher, cfg, device)


def load_policy(folder, device, robot=""):
    """A run folder, one of its stages, or one checkpoint -> Policy."""
    checkpoint = common.load_checkpoint(runs.newest(folder, STAGES["freeze-vlm"]), "vita_vla")
    cfg = common.resume_config(Config(), checkpoint.meta["config"])
    cfg.robot = robot or cfg.robot
    model, processor = build(replace(cfg, student=""), checkpoint)
    common.store_frozen(model, cfg, device)
    policy = Policy(model.to(device).eval(), cfg, processor, checkpoint.meta["robots"], device)
    policy.trained = checkpoint.step, checkpoint.meta["processes"]
    return policy


def prepare(cfg, dist, run, resumed, teacher=None):
    """Demonstrations, statistics, model -> Policy, batches, meta."""
    acts, asks = data.recordings(cfg, dist, resumed)
    if asks:
        raise common.UserError(f"--data {asks[0].name} asks questions: VITA-VLA learns from none")
    robots = {part.name: part.stats for part in acts}
    loop.foresee(cfg, data.acting(robots, cfg.robot)[1])
    seer.check_recordings(acts)
    if cfg.normalise == "raw":
        seer.as_recorded(robots)  # ASSUMPTION A11
    model, processor = build(cfg, resumed, data.dims(robots)[1] - 1)
    windows = [Histories(part.episodes, part.stats, cfg) for part in acts]
    mixtures = [data.Mixture(windows, [part.weight for part in acts], cfg.seed)]
    run.say(runs.counted(acts, windows, model))
    if dist.main and not resumed:
        samples = [mixtures[0][i] for i in range(4)]
        seen, marks = [sum(s["images"], []) for s in samples], {STATE: "<state>", ACT: "<act>"}
        runs.first_batch(run, seen, sense(samples, cfg, processor)["prompt"], processor, marks)
    join = partial(sense, cfg=cfg, processor=processor)
    batches = data.Batches(mixtures, join, cfg.batch, dist.rank, dist.processes)
    meta = runs.about("vita_vla", cfg, robots, resumed)
    if teacher:
        introduce(teacher, model, robots, cfg, resumed, dist.device)
    elif cfg.teacher and cfg.stage == "teacher" and not resumed:  # Seer's own goes on, or acts
        seer.load_seer(model, cfg.teacher, cfg.released)
        state = data.acting(robots, cfg.robot)[1]["state"]
        seer.read_recorded(model, *data.bounds(state), cfg.gripper_state)
    beside = {"Seer": teacher} if cfg.stage == "align" else {}
    model = common.place(model, cfg, dist, run.say, beside=beside)
    return Policy(model, cfg, processor, robots, dist.device), batches, meta


def check(cfg):
    """What no type can say about the flags, before anything is spent on them."""
    runs.check(cfg, "history", "future", "heads", "patch", "foresight", "depth", "queries",
               "teacher_steps", "align_steps", "finetune_steps")  # fmt: skip
    begun = cfg.resume or cfg.eval_only or cfg.describe
    first = STAGES[cfg.recipe][1] if cfg.stage == "chain" else cfg.stage
    common.refuse({
        f"--teacher {cfg.teacher} speaks of actions as recorded: add --normalise raw":
            cfg.teacher.endswith(RELEASED) and cfg.normalise != "raw" and not begun,
        "--stage teacher begins one from nothing, or goes on with Seer's own file, --teacher X.pth":
            cfg.stage == "teacher" and cfg.teacher and not cfg.teacher.endswith(RELEASED),
        f"--stage align needs --teacher RUN: {MAKES_ONE}":
            cfg.stage == "align" and not (cfg.teacher or cfg.describe),
        "--recipe only-finetune has no --stage align: take finetune":
            cfg.stage == "align" and cfg.recipe == "only-finetune",
        "--stage finetune needs --student RUN, of stage align, or for only-finetune --teacher "
        "RUN, whose decoder it takes":
            cfg.stage == "finetune" and not (cfg.student or cfg.teacher or begun),
        "--freeze-vlm is of --stage finetune; a chain: --recipe freeze-vlm":
            cfg.stage == "chain" and cfg.freeze_vlm,
        "--student is what --stage finetune or frozen starts from":
            cfg.student and first != "finetune" and not begun,
        f"--goal {cfg.goal} is of a teacher's training: --stage teacher":
            cfg.goal and cfg.stage in ("align", "finetune") and not begun,
        f"--goal {cfg.goal}: from 0 to {cfg.history - 1}": not 0 <= cfg.goal < cfg.history,
        "--ensemble blends what is said about now: no --act-index beside it":
            cfg.ensemble and cfg.act_index,
        "--execute is 1 here: the history is made of every step": cfg.execute != 1,
        f"--act-index {cfg.act_index}: from 0 to {cfg.future - 1}":
            not 0 <= cfg.act_index < cfg.future,
        f"--foresight {cfg.foresight}: a square number":
            math.isqrt(cfg.foresight) ** 2 != cfg.foresight,
        f"--heads {cfg.heads} do not divide --width {cfg.width}": cfg.width % cfg.heads,
        f"--mapper decoder: --width {cfg.width} is no multiple of 32":
            cfg.mapper == "decoder" and cfg.width % 32,
        f"--size {cfg.size}: a multiple of --patch {cfg.patch}":
            cfg.eyes == "backbone" and cfg.size % cfg.patch,
        f"--wrist-size {cfg.wrist_size}: a multiple of --patch {cfg.patch}":
            cfg.eyes == "backbone" and cfg.wrist_size % cfg.patch,
    })  # fmt: skip
    chained = cfg.world == "tabletop:abc_d" and not cfg.domains
    return replace(cfg, domains=("chain",)) if chained else cfg


STAGES = {
    "two-stage": ("teacher", "align", "finetune"),
    "only-finetune": ("teacher", "finetune"),
    "freeze-vlm": ("teacher", "align", "finetune", "frozen"),
}


def staged(cfg, name):
    """The Config of one of STAGES; `frozen` is finetune with the VLM as it is."""
    frozen, goal = name == "frozen", cfg.goal if name == "teacher" else 0
    return replace(cfg, stage="finetune" if frozen else name, freeze_vlm=frozen, goal=goal)


def chain(cfg, dist):
    """Yields the Config of each stage that is still to run; each has a folder of its own in the
    chain's, which `--resume` goes on with. A single stage, or one that is done, goes on alone."""
    folder = Path(cfg.resume)
    done = (folder / "result.json").exists() and not (folder / "chain.json").exists()
    alone = cfg.resume and (done or not runs.chain_of(folder))
    if alone or cfg.stage != "chain" or cfg.eval_only:
        yield cfg
        return
    cfg, folder = runs.begin_chain(cfg, dist, "vita_vla", FREE, check)
    runs.note_chain(cfg, dist, "vita_vla", STAGES[cfg.recipe], folder)
    teacher, before = cfg.teacher, cfg.student
    todo = [n for n in STAGES[cfg.recipe] if not (n == "teacher" and cfg.teacher)]
    for name in todo:  # now, not after another stage's steps
        foresee(staged(cfg, name), dist)
    for name in todo:
        here = replace(staged(cfg, name), teacher=teacher, student=before, out=str(folder / name),
                       resume="")  # fmt: skip
        if name == "teacher":  # ABLATION no-gripper: the released student's loss alone lacks it
            usual = PRESETS.get(cfg.preset, {}).get("gripper_weight", Config.gripper_weight)
            here.gripper_weight = cfg.gripper_weight or usual
        here.explicit = tuple(name for name in cfg.explicit if name in FREE and name != "out")
        standing = runs.standing(folder / name)
        if standing == "begun":
            here.resume = str(folder / name)
        if standing != "done":
            yield here
        teacher = teacher or str(folder / "teacher")
        before = "" if name == "teacher" else str(folder / name)
    if dist.main:
        runs.finish(folder, {name: folder / name for name in STAGES[cfg.recipe]})


def foresee(cfg, dist, taught=False):
    """An error where a stage, with the teacher beside it if it is taught, cannot fit."""
    needed = [replace(cfg, stage=s, student="") for s in (cfg.stage, *["teacher"] * taught)]
    common.foresee(cfg, dist, *(lambda c=c: build(c)[0] for c in needed))


def session(cfg, dist):
    """Trains one stage, or goes on with it, and evaluates what acts by then."""
    cfg, resumed, policy = runs.begin(cfg, dist, "vita_vla", FREE, load_policy)
    cfg.steps = cfg.steps or getattr(cfg, f"{cfg.stage}_steps")
    cfg = check(cfg)
    run = common.Run(cfg, "vita_vla", __file__, dist, cfg.steps, resumed)
    run.say(f"{cfg.stage}: run folder {run.folder}; {dist.processes} process(es) on {dist.device}")
    seconds = 0.0
    if not policy:
        begins = cfg.stage == "finetune" and cfg.teacher and not (cfg.student or resumed)
        taught = cfg.stage == "align" or bool(begins)
        foresee(cfg, dist, taught)
        teacher = load_teacher(cfg, dist.device) if taught else None
        policy, batches, meta = prepare(cfg, dist, run, resumed, teacher)
        teacher = teacher if cfg.stage == "align" else None  # else its decoder was all
        seconds = train(cfg, dist, run, policy.model, batches, meta, resumed, teacher)
    learned = policy.trained if cfg.eval_only else (cfg.steps, dist.processes)
    results = loop.evaluate(policy, cfg, dist, run.folder, run.say)
    result = runs.facts("vita_vla", cfg, cfg.recipe, *learned, seconds) | loop.headline(results)
    result |= {"length": results.get("chain", {}).get("length"), "stage": cfg.stage}
    run.result(result | {"domains": results, "params": common.param_counts(policy.model)})
    run.close()
    if dist.main:
        pictures.draw_run(run.folder, ("arm", "gripper", "align", "foresight"))
    run.say(f"result.json, pictures and films are in {run.folder}")


def main(argv=None):
    cfg = common.parse(Config, PRESETS, ABLATIONS, argv)
    if cfg.ablation == "list":
        return ablations.show("vita_vla", ABLATIONS, "paper %, length", "% first, length", ours)
    if cfg.stage == "frozen":  # recipe freeze-vlm's last, by itself
        cfg.stage, cfg.freeze_vlm = "finetune", True
    elif cfg.stage == "finetune" and cfg.recipe == "freeze-vlm" and not cfg.freeze_vlm:
        print("this stage of freeze-vlm trains the VLM; --stage frozen comes after it")
    choose_teacher(cfg)
    check(cfg)
    if cfg.describe:
        alone = "frozen" if cfg.freeze_vlm else cfg.stage
        names = STAGES[cfg.recipe] if cfg.stage == "chain" else (alone,)
        builds = {f"VITA-VLA, {n}": lambda n=n: build(staged(cfg, n))[0] for n in names}
        return common.describe(cfg.backbone, common.load_vlm, builds)
    if cfg.export:
        policy = load_policy(cfg.export, torch.device("cpu"))
        if not isinstance(policy.model, VitaVLA):
            words = "a teacher has no VLM; name a student's run"
            raise common.UserError(f"--export {cfg.export}: {words}")
        return runs.export(cfg, policy, policy.model.vlm)
    dist = common.setup(cfg)
    for stage in chain(common.resume_auto(cfg, dist, "chain.json"), dist):
        session(stage, dist)
    dist.destroy()


if __name__ == "__main__":
    common.run_main(main)
