"""DualVLA (arXiv 2511.22134): a robot model that reasons, and still acts as well as a specialist.

      recordings --> E, the specialist --> G, the generalist ---> DualVLA, the student
                     acts, is silent       acts, reasons,           ^            ^
                                           answers                  |            |
      pruned reasoning  --------------------------------------------+            |
      on robot data     E says how to act,      Eq. 5 ---\\                       |
      on questions      G says how to answer,   Eq. 6 ---- dual teachers, Eq. 7 -+

      pictures, "what to do" --> [ VLM, two LoRA experts, learned gates ] --> reasoning (or none)
                                         | latent action queries (B, N, D)
      eye (pictures), state, noise --> [ flow expert ] --> action chunk (B, H, A)

Conventions: x_t = (1 - t) x_0 + t x_1 with the noise x_0 at t = 0 and the action x_1 at t = 1, so
the velocity is u_t = x_1 - x_0; actions and state are normalised to [-1, 1] between q01 and q99;
prompts are padded on the left. Letters: B batch, T tokens, D width, N queries, H chunk, A action,
S state, R noise draws, n positions, V vocabulary.
Words: docs/glossary.md. parts/instructvla.py holds LoRA and flow expert of the base model,
worlds/events.py what finds event boundaries, worlds/score.py judges, parts/runs.py has a chain.

Equation map (Eq. 1 names the policy; Eq. 9 of the appendix is Eq. 3 as an expectation)
  Eq. 2   specialist: -log pi(a | o, i)       -> action_loss()
  Eq. 3   generalist: reasoning and action    -> vla_loss()
  Eq. 4   action label of a frame             -> acceleration_keyframes()
  Eq. 5   KL to the action teacher            -> action_distillation()
  Eq. 6   KL to the reasoning teacher         -> reason_distillation()
  Eq. 7   L_VLA + lambda L_KD                 -> total_loss()
  Eq. 8   VLA Score of a trajectory           -> vla_score()
Table map (`--ablation list`), of pruning and teachers: base, base-ft, no-*, random-pruning, ours;
beside them tokens, masked, keep-either, full-weights, degeneration.

Assumptions, where the paper is silent
  A1  Frames are kept where both labels are 1; `--reach` widens a scene label around its boundary,
      for detectors whose peaks and accelerations never meet.
  A2  Eq. 4: second difference, angles unwrapped, metres and radians in one norm; the ends of a
      trajectory have no acceleration, neither in the label nor in the mean. A change of the gripper
      marks the first frame with the new value. `events.hand()`: where a recording says both.
  A3  A pruned sample keeps its question (`Say why.`) and loses the answer, so the model learns when
      to talk (`--masking ignore` keeps the words and takes them out of the loss). An episode that
      was recorded without reasoning is not pruned: where a move is asked for, it is named.
  A4  Where actions are continuous, Eq. 5 is the KL of two Gaussians with the velocities as means,
      at the same noise and time and one variance, `--sigma` squared. `--actions tokens`: itself.
  A5  T = 1; the KL is a mean over positions, as the losses are; one question for `--mix` robot
      samples (InstructVLA: 7).
  A6  The base model is InstructVLA: Eagle2, r-LoRA on every matrix of its language model, two gates
      a token from the hidden state of a pass without LoRA, here twice a softmax, so that G starts
      as E; the vision tower is frozen; E's flow expert is trained with E and frozen then. Ours:
      the prompts (TwinBrainVLA's, so that one recording reads alike in all three scripts); LoRA on
      the gates of its MLPs too and without dropout; E names no moves; the queries begin amid the
      embeddings of words (begun elsewhere, E may stay on a plateau) and the first has a label;
      words are said anew with each plan; robot data and questions share a step.
  A7  The flow expert's eye is a small convolutional net in the place of DINOv2, with FiLM; how its
      layers differ from InstructVLA's is in docs/claims.md.
  A8  A specialist is not asked for reasoning: its RA is 1 and R leaves Eq. 8. Of those that are, a
      trajectory without a word has R = RA = 0 from the offline judge, hence a score of 0.
  A9  A real VLM has read the words in which a robot explains itself, `tiny` has not (its questions
      are about scenes), so G and the student learn those, drawn anew (`--no-new-words`).
  A10 When to reason is not said. Of the steps that a student learned from, five in six are silent,
      and a greedy one hardly speaks: ours does where words in sum are likelier than `--speak`.

  python dualvla.py                                          # laptop: E, G, DualVLA, evaluation
  torchrun dualvla.py --backbone Eagle2-2B                   # one GPU, the embedded world
  torchrun --nproc-per-node 8 dualvla.py --preset paper      # eight GPUs, in the embedded world
"""

import math
import time
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from torch import nn

import common
import data
from parts import instructvla, runs
from parts.instructvla import BINS, FlowExpert, Thread
from worlds import ablations, benchmarks, events, loop, pictures, reports, score
from worlds.ablations import row

# --- Config: the defaults are the laptop's run ----------------------------------------------------


@dataclass
class Config:
    backbone: str = "tiny"  # tiny, Qwen3-VL-2B/4B/8B, Qwen2.5-VL-3B/7B, Eagle2-2B, folder or hub id
    world: str = "tabletop:bridge"  # where to act; its suite also gives the demonstrations
    data: str = ""  # recordings to train on, `bridge,fractal=2,FOLDER`; empty: the world's own
    skip_bad: bool = False  # leave out recordings that cannot be read, and list them
    robot: str = ""  # whose recordings to act like; empty: the first of --data
    out: str = ""  # run folder, with a folder for each stage; empty: runs/dualvla-<seed>-<time>
    stage: str = "chain"  # chain | expert | generalist | dual: last stage; those it needs run first
    expert: str = ""  # E's run folder, instead of training E
    generalist: str = ""  # G's run folder, instead of training G
    steps: int = 0  # optimizer steps of each stage; 0: as in STAGES
    seed: int = 0  # everything random follows from it
    resume: str = ""  # run folder to go on from, exactly; auto: --out's, or start it
    eval_only: str = ""  # run folder to evaluate, without training
    ablation: str = ""  # a row of the paper's tables; `list` prints them all
    preset: str = ""  # a named configuration, see below; of a --backbone but tiny: larger
    describe: bool = False  # prints the parameters of each part, without weights, and leaves
    export: str = ""  # run of E or --tune full whose VLM becomes a Hugging Face checkpoint in --out
    show: str = ""  # pruning or pareto: prints a table, draws a picture, and leaves
    benchmark: str = ""  # a question file (VLMEvalKit's TSV) to answer after --eval-only
    episodes: int = 200  # evaluation episodes in each domain
    # pruning (Sec. 3.2.1)
    prune: str = "both"  # both | action | scene | either | random | none: whose labels keep a frame
    events: str = "ddm"  # ddm | similarity | phase: scene labels; phase: the recording's own
    event_scores: str = ""  # scores of another detector: {"episode": [score per frame]} as JSON
    event_demos: int = 120  # labelled recordings that the detector learns from
    reach: int = 0  # frames around a boundary that its label covers (A1)
    masking: str = "delete"  # delete | ignore: what becomes of pruned reasoning (A3)
    # distillation (Sec. 3.2.2)
    teachers: str = "both"  # both | action | reason | none
    kd_weight: float = 0.15  # lambda of Eq. 7
    temperature: float = 1.0  # T of Eq. 5 and 6, where words are compared
    sigma: float = 0.05  # of actions as Gaussians (A4): the smaller, the more E is heeded
    # the model
    tune: str = "lora"  # lora | full: full trains every weight of the VLM in each stage
    rank: int = 32  # of LoRA (InstructVLA: 128)
    alpha: float = 2.0  # LoRA's scale, alpha / r (InstructVLA: 256 / 128)
    actions: str = "flow"  # flow | tokens: flow expert, or 256 bins a dimension as words
    new_words: bool = True  # G, dual: train the embeddings of what is said on robot data (A9)
    queries: int = 8  # N, latent action queries (InstructVLA: 64)
    horizon: int = 8  # H, actions in a chunk (InstructVLA: 16)
    width: int = 128  # flow expert's width (InstructVLA: 768)
    depth: int = 4  # its layers (InstructVLA: 12)
    heads: int = 4  # its attention heads (InstructVLA: 12)
    state: bool = True  # the robot's state among what the flow expert reads
    repeats: int = 4  # R, noise draws a sample
    euler: int = 4  # integration steps when acting (InstructVLA: 10)
    # training
    batch: int = 64  # robot samples per process and step
    mix: int = 2  # robot samples for one question, stages G and dual (InstructVLA: 7)
    reason: float = 0.5  # share of robot samples asked to reason first (InstructVLA: 0.4)
    motion: float = 0.1  # share asked to name the move (InstructVLA: 0.08)
    lr: float = 0.0  # of the VLM; 0: as in STAGES (DualVLA: 2e-5)
    lr_head: float = 2e-3  # flow expert, queries, gates
    min_lr: float = 0.0  # where the cosine ends, as a share of the peak (DualVLA: 1, constant)
    warmup: int = 50  # steps of linear warm-up
    weight_decay: float = 0.0  # of AdamW and Muon
    clip: float = 1.0  # gradient norm
    optimizer: str = "muon"  # adamw | adamw8bit | muon: muon takes the matrices, AdamW the rest
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
    # demonstrations of the embedded world
    demos: int = 2000  # episodes
    noise: float = 0.3  # disturbances while the expert demonstrates, for recovery
    size: int = 64  # static camera, pixels
    wrist_size: int = 32  # wrist camera, pixels
    augment: int = 2  # random shift of the pictures, in 64ths of their side
    normalise: str = "auto"  # auto | q99 | minmax: bounds of actions, state; auto: see SOURCES
    # evaluation and logging
    domains: tuple[str, ...] = ("in",)  # what differs from training; empty: all the suite knows
    talk: int = 40  # words of reasoning at most, when acting (InstructVLA: 50)
    speak: float = 0.15  # says why where words are likelier than this (A10; 0.5: about greedy)
    execute: int = 2  # actions executed of each chunk
    ensemble: bool = False  # plan every step, blend the last 7 chunks (SimplerEnv)
    parallel: int = 100  # episodes acted side by side; they share a generator of noise
    gifs: int = 2  # rollouts drawn in each domain
    render: str = "gif"  # gif | mp4 | show: what they become; show plays them in the terminal too
    questions: int = 100  # of each of the four kinds (POPE, SEED-Bench, ScienceQA, MME)
    qa_every: int = 0  # steps between measurements of actions and answers; 0: at the end
    score_episodes: int = 40  # trajectories for the VLA Score
    bracket: str = "outer"  # outer | inner: (R + A I) / 2 or (R + A) / 2 I in Eq. 8
    judge: str = "offline"  # offline (the world's truth), an http(s) address, or local:BACKBONE
    judge_model: str = "gpt-4o"  # its name at that address; the key is in OPENAI_API_KEY
    judge_price: float = 2.5  # dollars for a million tokens read, for the estimate
    judge_examples: str = ""  # annotated trajectories (JSONL) to show the judge
    log_every: int = 20  # steps between log lines
    save_every: int = 250  # steps between checkpoints


ORDER = ("expert", "generalist", "dual")
ALONE = dict(prune="none", teachers="none")
STAGES = {  # what differs between the stages; --steps and --lr hold for all of them
    "expert": dict(steps=1000, lr=2e-3, mix=0, reason=0.0, motion=0.0, qa_every=0) | ALONE,
    "generalist": dict(steps=300, lr=1e-3) | ALONE,
    "dual": dict(steps=400, lr=1e-3),
}
# DualVLA itself states that the learning rate is 2e-5 and fixed. What is marked "ours" nobody
# states; the rest is its base model's, InstructVLA's, of whose sizes of pictures (448 for the VLM,
# 224 for the flow expert's eye) one serves here, and whose crops and changes of colour none does.
PAPER = dict(
    backbone="Eagle2-2B", rank=128, queries=64, horizon=16, width=768, depth=12, heads=12,
    euler=10,
    batch=16, mix=7, reason=0.4, motion=0.08, optimizer="adamw",
    lr=2e-5,  # DualVLA's, for E and G too
    lr_head=5e-5,
    min_lr=1.0,  # DualVLA's
    warmup=0,
    steps=20_000,  # ours
    size=224, wrist_size=224, augment=0, state=False, execute=1, ensemble=True, repeats=1,
    workers=4, frozen="bf16",  # ours
    talk=50, new_words=False,
    speak=0.5,  # ours: about greedy, as InstructVLA decodes
)  # fmt: skip
LARGER = {k: PAPER[k] for k in ("optimizer", "lr", "lr_head", "rank", "queries", "width", "depth",
                                "heads", "batch", "size", "wrist_size", "workers", "new_words",
                                "talk", "frozen")}  # fmt: skip
PRESETS = {"paper": PAPER, "larger": LARGER}

ABLATIONS = {  # the paper's average of robots and answers in %, what it calls the row, flags
    "base": row(52.5, "Base, InstructVLA-G", stage="generalist"),
    "base-ft": row(54.8, "Base (ft): no pruning, no teachers", prune="none", teachers="none"),
    "no-pruning": row(55.6, "w/o pruning", prune="none"),
    "no-distillation": row(54.5, "w/o distillation", teachers="none"),
    "random-pruning": row(50.4, "random pruning, as many frames kept", prune="random"),
    "no-action-layer": row(55.7, "w/o action layer", prune="scene"),
    "no-scene-layer": row(52.1, "w/o scene layer", prune="action"),
    "no-action-teacher": row(53.0, "w/o action teacher", teachers="reason"),
    "no-reason-teacher": row(46.6, "w/o reasoning teacher", teachers="action"),
    "ours": row(56.6, "Ours, DualVLA"),
    "tokens": row(None, "OpenVLA-Dual's kind: action tokens", actions="tokens"),
    "masked": row(None, "ours: pruned words read, not learned", masking="ignore"),
    "keep-either": row(None, "ours: either label keeps a frame", prune="either"),
    "full-weights": row(None, "ours: every weight, no LoRA", tune="full"),
    "degeneration": row(None, "ours: G measured along the way", stage="generalist", qa_every=100),
}


def ours(line):
    """A line of assets/results -> what `--ablation list` shows, % success and answers."""
    return 100 * line["success"], 100 * line["answers"]


# --- Prompts, and the one path from observations to tensors ---------------------------------------

SYSTEM = "You are a helpful robot brain that can understand images and texts."
USER = (
    "\nInstruction: {instruction}\nRobot Type: {robot}"
    "\nPredict the next action for the robot based on the observation, instruction and robot type."
)
FORMS = {"plain": "", "motion": " Name the move.", "reason": " Say why."}


def first_action(processor):
    """Id of <robot_action_0>: the first query, or the first of the 256 action words."""
    return processor.tokenizer.convert_tokens_to_ids("<robot_action_0>")


def sense(samples, cfg, processor, form=""):
    """Samples with "images", "instruction", "state", and to learn from "action", "mask", "form",
    "said", "learn" -> batch. form: ask all in this one, and leave out what was said. At the end
    stand the queries, unless it is to reason before them, or the action words to learn from."""
    pixels, grids, rows, labels = [], [], [], []
    first = first_action(processor)
    for sample in samples:
        patches, grid = processor.images(sample["images"])
        asked = USER.format(instruction=sample["instruction"], robot=sample["robot"])
        asked += FORMS[form or sample["form"]]
        said = "" if form else sample["said"]
        said = tuple(processor.tokenizer.encode(said, add_special_tokens=False))
        act, learned = (), []
        if cfg.actions == "tokens" and "action" in sample:  # past an episode's end none is learned
            act = instructvla.to_tokens(sample["action"], first)
            inside = np.repeat(sample["mask"], len(act) // len(sample["mask"]))
            learned = [t if real else -100 for t, real in zip(act, inside)]
        elif cfg.actions == "flow" and form != "reason":
            act = tuple(range(first, first + cfg.queries))
            learned = [first] + [-100] * (cfg.queries - 1)  # when to act, not which follows which
        pixels.append(patches)
        grids.append(grid)
        rows.append(processor.prompt(SYSTEM, asked, grid)[0] + said + act)
        labels.append([t if sample["learn"] else -100 for t in said] + learned)
    batch = common.pack(rows, labels, pixels, grids, processor) | {
        "state": torch.from_numpy(np.stack([s["state"] for s in samples])),  # (B, S)
        "views": {  # for the flow expert's eye: camera -> (B, h, w, 3)
            str(i): torch.from_numpy(np.stack(view))
            for i, view in enumerate(zip(*(s["images"] for s in samples)))
        },
    }
    if "action" in samples[0]:
        batch["action"] = torch.from_numpy(np.stack([s["action"] for s in samples]))  # (B, H, A)
        batch["mask"] = torch.from_numpy(np.stack([s["mask"] for s in samples]))  # (B, H)
    return batch


def collate(samples, cfg, processor):
    """Robot samples and questions -> one batch; "plain": what the action teacher is asked."""
    robot = [s for s in samples if "action" in s]
    asked = [s for s in samples if "question" in s]
    batch = {"robot": sense(robot, cfg, processor)}
    if cfg.teachers in ("both", "action"):
        batch["plain"] = sense(robot, cfg, processor, form="plain")["prompt"]
    return batch | ({"questions": common.ask(asked, processor, SYSTEM)} if asked else {})


# --- Model: two LoRA experts behind learned gates, latent action queries --------------------------


class DualVLA(nn.Module):
    """E, G or the student: a Qwen-VL with LoRA experts and gates, queries, and a flow expert."""

    def __init__(self, cfg, vlm, processor, state_dim, action_dim):
        super().__init__()
        self.cfg, self.processor, self.action_dim = cfg, processor, action_dim
        self.vlm, self.first = vlm, first_action(processor)
        self.end = processor.tokenizer.eos_token_id
        vlm.model.language_model.config._attn_implementation = "short"
        D, alone = vlm.config.get_text_config().hidden_size, cfg.stage == "expert"
        self.gates, self.gate = SimpleNamespace(now=None), None  # now (B, T, experts): see look()
        self.words = []  # those whose embeddings train; none where all or no weights do
        self.untouched = set()  # weights that stay the backbone's own: no checkpoint holds them
        if cfg.tune == "lora":
            vlm.requires_grad_(False)
            layers, experts = vlm.model.language_model.layers, 1 if alone else 2
            instructvla.add_experts(layers, experts, cfg.rank, cfg.alpha, self.gates)
            new = (".down.", ".up.", "embed_tokens.", "lm_head.")
            self.untouched = {n for n in self.state_dict() if not any(x in n for x in new)}
            if alone or cfg.new_words:  # which ones G learns, `prepare()` finds  # ASSUMPTION A9
                self.learn_words(range(self.first, self.first + BINS) if alone else ())
            if not alone:
                widths = [(D, 128), (128, 128), (128, 128), (128, 2)]  # four layers
                parts = [m for i, o in widths for m in (nn.Linear(i, o), nn.ReLU())]
                self.gate = nn.Sequential(*parts[:-1])
                nn.init.zeros_(self.gate[-1].weight)
                nn.init.zeros_(self.gate[-1].bias)
        if cfg.actions == "flow":
            words = common.draw_words(vlm, self.first, cfg.queries)  # ASSUMPTION A6
            self.queries = nn.Parameter(words)
            self.flow = FlowExpert(cfg, D, state_dim, action_dim)
            if not alone:  # ASSUMPTION A6
                self.flow.requires_grad_(False)

    def learn_words(self, ids):
        """The embeddings of these words train: E's are those of actions, G's of what is said."""
        self.words = [*ids]
        self.vlm.get_input_embeddings().requires_grad_(True)
        self.vlm.lm_head.requires_grad_(True)

    def forget_words(self):
        """After the backward pass: no gradient for the embeddings of other words."""
        if self.words:
            for weight in {self.vlm.get_input_embeddings().weight, self.vlm.lm_head.weight}:
                if weight.grad is not None:
                    rows = torch.zeros(len(weight), 1)
                    rows[self.words] = 1.0
                    weight.grad.mul_(common.spread(rows, weight.grad))

    def blocks(self):
        """What is recomputed, compiled or sharded by itself."""
        blocks = [*self.vlm.model.language_model.layers, *common.vision_blocks(self.vlm.model)]
        return blocks + ([*self.flow.blocks] if self.cfg.actions == "flow" else [])

    def see(self, batch):
        """The vision tower's tokens of a batch's pictures; frozen, it sees once for all three."""
        if self.cfg.tune == "full":
            return common.see(self.vlm.model, batch)
        if "seen" not in batch:
            with torch.no_grad():
                batch["seen"] = common.see(self.vlm.model, batch)
        return batch["seen"]

    def look(self, x, prompt, mask, seen=(), caches=(None, None)):
        """Embedded tokens -> last states (B, T, D). caches: of the passes without LoRA and with."""
        given = self.vlm.model.language_model, x, prompt, mask, seen
        if self.gate is not None:
            self.gates.now = None
            with torch.no_grad():
                h_0 = common.read(*given, caches[0]).last_hidden_state
            self.gates.now = 2 * self.gate(h_0).softmax(-1)  # (B, T, 2)  # ASSUMPTION A6
        else:
            self.gates.now = x.new_ones(1, 1, 1)
        return common.read(*given, caches[1]).last_hidden_state

    def embed(self, ids):
        """(B, T) ids -> (B, T, D); in the queries' places, where actions flow, the queries."""
        x = self.vlm.get_input_embeddings()(ids)
        if self.cfg.actions == "flow":
            place = (ids - self.first).clamp(0, self.cfg.queries - 1)
            is_query = (ids >= self.first) & (ids < self.first + self.cfg.queries)
            x = torch.where(is_query[..., None], self.queries[place].to(x.dtype), x)
        return x

    def read(self, prompt, batch, caches=(None, None)):
        """A prompt with its pictures -> hidden states (B, T, D)."""
        x, mask = self.embed(prompt["input_ids"]), common.causal_mask(prompt["real"])
        return self.look(x, prompt, mask, self.see(batch), caches)

    def keys(self, h, batch):
        """Hidden states that end with the queries' -> what the flow expert's layers look at."""
        return self.flow.prefix(h[:, -self.cfg.queries :], batch["views"], batch["state"])

    def forward(self, batch, noise=None, soft=None):
        """Losses of one step, by name. noise: x_0 (B, R, H, A), t (B, R); soft: of `teach()`."""
        cfg, robot, soft, losses = self.cfg, batch["robot"], soft or {}, {}
        h = self.read(robot["prompt"], robot)  # (B, T, D)
        if cfg.actions == "flow":
            losses["text"] = text_loss(self.vlm.lm_head, h, robot["prompt"])
            x_t, u_t = interpolate(robot["action"], *noise)
            v_t = self.flow(x_t, noise[1], self.keys(h, robot))
            losses["action"] = action_loss(v_t, u_t, robot["mask"])
        else:
            losses |= token_losses(self.vlm.lm_head, h, robot["prompt"], self.first)
            v_t = None
        if "action" in soft:
            said = None if v_t is not None else spoken_actions(h, robot["prompt"], self.first)
            losses["kd_action"] = action_distillation(
                soft["action"], v_t, said, self.vlm.lm_head.weight, robot["mask"], cfg
            )
        if "questions" in batch:
            asked = batch["questions"]["prompt"]
            h = self.read(asked, batch["questions"])
            losses["answer"] = text_loss(self.vlm.lm_head, h, asked)
            if "reason" in soft:
                h = common.spoken(h, asked)[0]
                losses["kd_reason"] = reason_distillation(
                    *soft["reason"], h, self.vlm.lm_head.weight, cfg
                )
        return losses

    @torch.no_grad()
    def answer(self, asked):
        """-> (B,) whether greedy decoding would write the answer: one pass decides."""
        h, words = common.spoken(self.read(asked["prompt"], asked), asked["prompt"])
        return common.all_right(self.vlm.lm_head(h).argmax(-1) == words, asked["prompt"])

    @torch.no_grad()
    def act(self, batch, x_0, form, limit):
        """Batch without actions, noise x_0 (B, H, A) -> chunks (B, H, A), ids of what was said."""
        cfg, said = self.cfg, [[] for _ in x_0]
        if form == "plain" and cfg.actions == "flow":
            h = self.read(batch["prompt"], batch)  # nothing to say: one pass
        else:
            done = lambda ids: (ids >= self.first) | (ids == self.end)  # noqa: E731
            thread = Thread(self, batch)
            said = thread.speak(0 if form == "plain" else limit, done, cfg.speak)
            if cfg.actions == "tokens":
                ids = thread.act(self.first, cfg.horizon * self.action_dim)
                return instructvla.from_tokens(ids, self.first, self.action_dim), said
            queries = self.queries.to(thread.h.dtype).expand(len(x_0), -1, -1)
            h = thread.go_on(queries, torch.ones_like(queries[..., 0], dtype=torch.bool))
        keys = self.keys(h, batch)
        return integrate(lambda x, t: self.flow(x, t, keys), x_0, cfg.euler), said


def integrate(velocity, x_0, steps):
    """Euler from noise x_0 (B, H, A) at t = 0 to t = 1; velocity(x (B, 1, H, A), t (B, 1))."""
    x = x_0[:, None]
    for i in range(steps):
        t = torch.full(x.shape[:2], i / steps, device=x.device)
        x = x + velocity(x, t) / steps
    return x[:, 0]


# --- Loss -----------------------------------------------------------------------------------------


def draw_noise(cfg, step, action_dim, dist, part=0):
    """x_0 (B, R, H, A) Gaussian; t (B, R) = 0.999 (1 - b), b ~ Beta(1.5, 1), mostly noisy.

    Drawn for a step's samples of all processes and batches (`part` of them), then cut: however
    these are split, the draws are the same.
    """
    generator = torch.Generator().manual_seed(cfg.seed * 1_000_003 + step)
    total = cfg.batch * dist.processes * cfg.accumulate
    x_0 = torch.randn(total, cfg.repeats, cfg.horizon, action_dim, generator=generator)
    b = torch.rand(total, cfg.repeats, generator=generator) ** (1 / 1.5)  # inverse CDF of the Beta
    first = (part * dist.processes + dist.rank) * cfg.batch
    mine = slice(first, first + cfg.batch)
    return x_0[mine], 0.999 * (1 - b[mine])


def interpolate(x_1, x_0, t):
    """Actions x_1 (B, H, A), noise x_0 (B, R, H, A), t (B, R) -> x_t, u_t (B, R, H, A)."""
    x_1, s = x_1[:, None], t[:, :, None, None]
    return (1 - s) * x_0 + s * x_1, x_1 - x_0


def masked_mean(x, mask):
    """x (B, R, H, A), mask (B, H) True inside the episode -> mean over what is inside."""
    inside = mask[:, None, :, None].expand_as(x).flatten(1)
    return ((x.flatten(1) * inside).sum(1) / inside.sum(1)).mean()


def action_loss(v_t, u_t, mask):
    """The specialist's loss where actions flow, (B, R, H, A) each: ||v_t - u_t||^2 stands for
    -sum_k log pi(a_k | o, i, a_<k); `token_losses()` has that sum itself."""
    return masked_mean((v_t - u_t) ** 2, mask)  # Eq. (2)


def spoken_actions(h, prompt, first):
    """The states (n, D) that predict an action word, in order."""
    h, words = common.spoken(h, prompt)
    return h[words >= first]


def text_loss(head, h, prompt):
    """Mean of -log pi(y_k | o, i, y_<k) over the labelled words."""
    h, words = common.spoken(h, prompt)
    return common.linear_cross_entropy(h, head.weight, words)[0]


def token_losses(head, h, prompt, first):
    """The same where actions are words; the sum of both parts is the mean over y, Eq. 3."""
    h, words = common.spoken(h, prompt)
    parts, count = {"text": words < first, "action": words >= first}, len(words) or 1
    return {
        name: common.linear_cross_entropy(h[mine], head.weight, words[mine], count)[0]
        for name, mine in parts.items()
    }


def vla_loss(losses):
    """Hard labels: reasoning and action on robot data, the answer on questions (no action)."""
    return losses["text"] + losses["action"] + losses.get("answer", 0.0)  # Eq. (3)


def action_distillation(teacher, v_t, h, weight, mask, cfg):
    """KL from E, asked without reasoning, to a student that has reasoned. teacher: E's velocities,
    as v_t (B, R, H, A), or its states at action words and head, as h (n, D) and weight (V, D)."""
    if cfg.actions == "flow":  # ASSUMPTION A4
        return masked_mean((v_t - teacher.detach()) ** 2, mask) / (2 * cfg.sigma**2)
    # T^2 KL(pi_E(a | o, i) || pi(a | o, i, r))
    kl = common.linear_kl(h, weight, *teacher, cfg.temperature)
    return cfg.temperature**2 * kl  # Eq. (5)


def reason_distillation(h_teacher, head_teacher, h, weight, cfg):
    """KL from G, which the student was, on questions: h (n, D) at the answers' words, heads."""
    kl = common.linear_kl(h, weight, h_teacher, head_teacher, cfg.temperature)
    return cfg.temperature**2 * kl  # T^2 KL(pi_G(r | o, i) || pi(r | o, i))  # Eq. (6)


def total_loss(losses, cfg):
    """A sample has one teacher: that of its domain."""
    kd = losses.get("kd_action", 0.0) + losses.get("kd_reason", 0.0)
    return vla_loss(losses) + cfg.kd_weight * kd  # L_VLA + lambda L_KD  # Eq. (7)


@torch.no_grad()
def teach(teachers, batch, noise):
    """What the frozen teachers say: "action": E of robot data, "reason": G of questions."""
    expert, generalist = teachers
    robot, soft = batch["robot"], {}
    if expert is not None:
        h = expert.read(batch["plain"], robot)
        if expert.cfg.actions == "flow":
            x_t, _ = interpolate(robot["action"], *noise)
            soft["action"] = expert.flow(x_t, noise[1], expert.keys(h, robot))
        else:
            h = spoken_actions(h, batch["plain"], expert.first)
            soft["action"] = h, expert.vlm.lm_head.weight
    if generalist is not None and "questions" in batch:
        asked = batch["questions"]
        h, _ = common.spoken(generalist.read(asked["prompt"], asked), asked["prompt"])
        soft["reason"] = h, generalist.vlm.lm_head.weight
    return soft


# --- Data: pruning (Section 3.2.1) ----------------------------------------------------------------


def acceleration_keyframes(pose, gripper):
    """pose (T, 6) x y z and three angles (or without), gripper (T,) 0 or 1 -> labels (T,) bool."""
    pose = np.array(pose, np.float64)
    pose[:, 3:] = np.unwrap(pose[:, 3:], axis=0)
    a, label = np.zeros(len(pose)), np.zeros(len(pose), bool)  # ASSUMPTION A2
    if len(pose) > 2:
        a[1:-1] = np.linalg.norm(pose[2:] - 2 * pose[1:-1] + pose[:-2], axis=1)
        rounding = 8 * np.finfo(np.float32).eps * np.abs(pose).max()  # of poses in float32
        # ||T''(t_k)|| > 1/N sum_i ||T''(t_i)||, or G changes at t_k
        label = a > a[1:-1].mean() + rounding  # Eq. (4)
    label[1:] |= np.asarray(gripper[1:]) != np.asarray(gripper[:-1])
    return label


def keep(scene, action, rule, rng=None):
    """Scene and action labels (T,) bool -> (T,) bool: whose reasoning stays."""
    kept = {
        "both": scene & action, "action": action, "scene": scene, "either": scene | action,
        "none": np.ones_like(scene), "random": np.zeros_like(scene),
    }[rule].copy()  # fmt: skip
    if rule == "random":  # as many as "both"
        kept[rng.permutation(len(scene))[: (scene & action).sum()]] = True
    return kept


def action_labels(episode):
    path = events.hand(episode)
    return acceleration_keyframes(path[:, :-1], path[:, -1] > 0.5)


def keep_labels(episodes, cfg, say=print):
    """-> for each episode (T,) bool, after `--prune`."""
    everywhere = [np.ones(len(e.action), bool) for e in episodes]
    if cfg.prune == "none":
        return everywhere
    rng = np.random.default_rng(cfg.seed)
    action = [action_labels(e) for e in episodes]
    scene = action if cfg.prune == "action" else events.scene_labels(episodes, cfg, say)
    return [
        keep(s, a, cfg.prune, rng) if e.reasoning else whole  # ASSUMPTION A3
        for e, s, a, whole in zip(episodes, scene, action, everywhere)
    ]


class Samples(data.Windows):
    """Windows that carry a form of prompt and, where it was kept, what is to be said."""

    def __init__(self, episodes, stats, cfg, kept, robot="tabletop"):
        sides = cfg.size, cfg.wrist_size
        super().__init__(episodes, stats, cfg.horizon, cfg.augment, sides, robot)
        self.cfg, self.kept = cfg, kept

    def get(self, index, rng):
        sample, u = super().get(index, rng), rng.random()
        e = int(np.searchsorted(self.starts, index, side="right")) - 1
        t, episode, cfg = index - int(self.starts[e]), self.episodes[e], self.cfg
        form, said, kept = "plain", "", bool(self.kept[e][t])
        if u < cfg.reason and episode.reasoning:
            form, said = "reason", episode.reasoning[t]
        elif cfg.reason <= u < cfg.reason + cfg.motion:
            form, said = "motion", events.move_name(events.hand(episode), t)
        said = said if kept or cfg.masking == "ignore" else ""  # ASSUMPTION A3
        return sample | {"form": form, "said": said, "learn": kept}


# --- Eval: acting with and without reasoning, answering, VLA Score --------------------------------


class Policy:
    """A trained model with its normalisation: what `worlds.loop` acts with."""

    def __init__(self, model, cfg, processor, robots, device):
        """robots: {what was trained on: its statistics}; --robot says like which to act."""
        self.model, self.cfg, self.processor, self.robots = model, cfg, processor, robots
        self.robot, self.stats = data.acting(robots, cfg.robot)
        self.device, self.said = device, []
        self.form = "plain" if cfg.stage == "expert" else "reason"  # how it is asked

    def batch(self, observations, instructions):
        samples = runs.seen(observations, instructions, self.cfg, self.robot, self.stats)
        batch = sense(samples, self.cfg, self.processor, self.form)
        return common.to_device(batch, self.device)

    def act(self, observations, instructions, rng):
        """n observations and instructions -> action chunks (n, H, A) in the world's units;
        `said`: what it said before each."""
        shape = len(observations), self.cfg.horizon, len(self.stats["action"]["q01"])
        x_0 = torch.from_numpy(rng.standard_normal(shape, np.float32))
        x_0 = common.to_device(x_0, self.device)
        self.model.eval()
        with common.autocast(self.device, self.cfg.dtype):
            batch = self.batch(observations, instructions)
            a, said = self.model.act(batch, x_0, self.form, self.cfg.talk)
        self.said = [self.processor.tokenizer.decode(ids).strip() for ids in said]
        a = a.clamp(-1, 1).cpu().numpy()  # as training clipped them
        return data.unnormalise(a, self.stats["action"])

    def write(self, samples, limit):
        """Samples with "images" and "question" -> its answers, of `limit` words at most."""
        with common.autocast(self.device, self.cfg.dtype), torch.no_grad():
            samples = [s | {"answer": ""} for s in samples]
            asked = common.to_device(common.ask(samples, self.processor, SYSTEM), self.device)
            thread = Thread(self.model.eval(), asked)
            ids = thread.speak(limit, lambda ids: ids == self.model.end, 0.0)
        return [self.processor.tokenizer.decode(row).strip() for row in ids]


def along_the_way(policy, cfg, sets):
    """Answers and actions in the middle of training: the curves of degeneration."""
    scores = {"answers": common.abilities(policy.model.answer, sets, policy, SYSTEM)}
    if cfg.world == "none":
        return scores
    policy.form = "plain"  # what E, G and the student can all be asked
    starts = loop.starts_of(cfg.world, "in", min(cfg.episodes, 50), cfg.seed)
    reached, _ = loop.rollout(policy, cfg, cfg.world, starts)
    return scores | {"actions": {"success": float(np.mean([n > 0 for n in reached]))}}


def vla_score(R, A, intent, RA, B, reasons=True, bracket="outer"):
    """Scores of one trajectory in 0..1, success B 0 or 1 -> its VLA Score in 0..1."""
    if not reasons:
        return A * intent * B  # ASSUMPTION A8
    if bracket == "inner":
        return (R + A) / 2 * intent * RA * B
    return (R + A * intent) / 2 * RA * B  # ((R + A I) / 2) RA B  # Eq. (8)


def evaluate(policy, cfg, dist, folder, say, sets):
    """Everything that a stage's result reports."""
    results, acts = {}, cfg.world != "none"
    for form in ("plain", "reason") if cfg.stage != "expert" else ("plain",):
        policy.form = form
        say(f"asked in the form {form!r}:")
        quiet = cfg if form == "reason" or cfg.stage == "expert" else replace(cfg, gifs=0)
        results[form] = {"domains": loop.evaluate(policy, quiet, dist, folder, say)}
        if dist.main and acts:
            results[form] |= score.speed(policy, cfg)
    vqa = common.abilities(policy.model.answer, sets, policy, SYSTEM)
    say("  questions: " + ", ".join(f"{name} {share:.1%}" for name, share in vqa.items()))
    vla = None
    if dist.main and acts and cfg.score_episodes:
        reasons = policy.form != "plain"
        vla = score.judged(policy, cfg, folder, say, vla_score, reasons)
    plain, head = (loop.headline(results[f]["domains"]) for f in ("plain", policy.form))
    return head | {
        "success_plain": plain["success"], "forms": results, "vqa": vqa,
        "answers": float(np.mean([*vqa.values()])), "vla_score": vla,
    }  # fmt: skip


# --- Train ----------------------------------------------------------------------------------------


def make_optimizers(model, cfg):
    """AdamW over what trains, or Muon over the matrices and AdamW over the rest; two rates."""
    rows = []
    for name, p in model.named_parameters():
        if p.requires_grad:
            peak = cfg.lr if name.startswith("vlm.") else cfg.lr_head
            matrix = p.dim() == 2 and name.endswith(("weight", ".0", ".1"))  # .0, .1: LoRA's
            words = "embed" in name or "lm_head" in name
            # where some words train alone (`forget_words()`), decay would shrink all others
            decay = 0.0 if words and model.words else cfg.weight_decay
            rows.append((p, peak, decay, matrix and not words))
    return common.optimizers(cfg, rows)


def train(cfg, dist, run, model, batches, meta, resumed, measure, teacher=None):  # [method]
    """The loop, flat -> seconds. measure: () -> abilities; meta: what acting needs to know."""
    opts = make_optimizers(model, cfg)
    start, began = 0, time.perf_counter()
    if resumed:
        start, began = resumed.step, began - resumed.train_state["seconds"]
        common.load_optimizers(opts, resumed)
        common.set_rng_state(resumed.local_state["rng"])
    ddp = common.parallel(model, dist, True)  # [method] an untied head may go unasked
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
                soft = teach(teacher, batch, noise)  # [method]
                losses = ddp(batch, noise, soft)  # [method]
                loss = total_loss(losses, cfg) / cfg.accumulate
            loss.backward()
            for name, value in losses.items():
                mean[name] = mean.get(name, 0.0) + value.detach() / cfg.accumulate
        model.forget_words()  # [method]
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

FREE = (  # what a resumed or evaluated run may change
    *runs.FREE, "questions", "benchmark", "euler", "talk", "speak", "score_episodes", "bracket",
    "judge", "judge_model", "judge_price", "judge_examples", "events", "event_scores",
    "event_demos",
)  # fmt: skip


def build(cfg, state_dim, action_dim, checkpoint=None):
    """-> model and processor; weights from the backbone and, for all that trained, a checkpoint."""
    vlm, processor = common.load_backbone(cfg.backbone, cfg.frozen)
    common.Fast.extend(vlm, processor.tokenizer, BINS)
    common.seed_all(cfg.seed)
    model = common.widen(DualVLA(cfg, vlm, processor, state_dim, action_dim))
    if checkpoint:
        fresh = ()  # G's second expert and its gates
        if checkpoint.meta["config"]["stage"] == "expert" and cfg.stage != "expert":
            gate = [n for n in model.state_dict() if n.startswith("gate.")]
            fresh = (".down.1", ".up.1", *gate)
        common.fill(model, checkpoint, cfg.backbone, fresh)
    return model, processor


def load_policy(folder, device, robot=""):
    """A run folder, one of its stages, or one checkpoint -> Policy."""
    checkpoint = common.load_checkpoint(runs.newest(folder, ORDER), "dualvla")
    cfg = common.resume_config(Config(), checkpoint.meta["config"])
    cfg.robot = robot or cfg.robot
    robots = checkpoint.meta["robots"]
    model, processor = build(cfg, *data.dims(robots), checkpoint)
    common.store_frozen(model, cfg, device)
    policy = Policy(model.to(device).eval().requires_grad_(False), cfg, processor, robots, device)
    policy.trained = checkpoint.step, checkpoint.meta["processes"]
    return policy


def teaching(cfg):
    """The stages whose models teach, as --teachers says."""
    domains = {"expert": "action", "generalist": "reason"}
    return [name for name, domain in domains.items() if cfg.teachers in ("both", domain)]


def load_teachers(cfg, device):
    """-> {"expert": E, "generalist": G}, those that teach, as frozen policies; they must read what
    the student reads, and E act as it does."""
    found, reads = {}, ("backbone", "size", "wrist_size")
    for name in teaching(cfg):
        found[name] = policy = load_policy(getattr(cfg, name), device)
        same = reads + (("actions", "queries", "horizon") if name == "expert" else ())
        runs.same_flags(name, getattr(cfg, name), policy.cfg, cfg, same)
        common.store_frozen(policy.model, cfg, device)
    return found


def prepare(cfg, dist, run, resumed, teachers, last):
    """Demonstrations, pruning, statistics, model -> Policy, batches, meta. last: the chain's."""
    before = {"expert": "", "generalist": cfg.expert, "dual": cfg.generalist}[cfg.stage]
    start = resumed or (common.load_checkpoint(before, "dualvla") if before else None)
    acts, asks = data.recordings(cfg, dist, start)
    robots = {part.name: part.stats for part in acts}
    loop.foresee(cfg, data.acting(robots, cfg.robot)[1])
    views = {name: stats["cameras"] for name, stats in robots.items()}
    if len({len(names) for names in views.values()}) > 1 or len(max(views.values(), key=len)) > 4:
        raise common.UserError(f"--data: as many cameras in each, at most 4, not {views}")
    for name, teacher in teachers.items():
        runs.same_units(name, getattr(cfg, name), teacher.robots, robots)
    model, processor = build(cfg, *data.dims(robots), start)
    episodes = [e for part in acts for e in part.episodes]
    bits = resumed.meta["kept"] if resumed else None
    if not resumed:
        early = cfg.data or cfg.event_scores or cfg.events == "phase"
        if early and dist.main and last.prune not in ("none", "action"):
            events.check(episodes, last)  # now, not after E's and G's steps
        kept = keep_labels(episodes, cfg, run.say) if dist.main else []
        bits = dist.share(["".join(str(int(k)) for k in row) for row in kept])
    if cfg.new_words and cfg.tune == "lora" and cfg.stage != "expert":
        model.learn_words(events.all_words(episodes, processor.tokenizer))
        if cfg.stage == "generalist" and not resumed:
            common.redraw_untrained(model.vlm, model.words, only=model.words)
    kept = [np.array(list(row)) == "1" for row in bits]
    ends = np.cumsum([len(p.episodes) for p in acts])
    samples = [
        Samples(p.episodes, p.stats, cfg, kept[n - len(p.episodes) : n], data.robot_name(p.name))
        for p, n in zip(acts, ends)
    ]
    mixtures = [data.Mixture(samples, [p.weight for p in acts], cfg.seed)]
    if cfg.mix:
        asked = [p.episodes for p in asks] or [data.Questions(cfg.size, cfg.wrist_size)]
        mixtures.append(data.Mixture(asked, [p.weight for p in asks], cfg.seed))
    run.say(runs.counted(acts, samples, model))
    told = [k for k, e in zip(kept, episodes) if e.reasoning]
    share = float(np.concatenate(told).mean()) if told else None
    if cfg.reason and told:
        run.say(f"reasoning stays at {share:.1%} of the steps")
    if dist.main and not resumed:
        shown = [mixtures[0][i] for i in range(4)]
        seen, prompt = [s["images"] for s in shown], sense(shown, cfg, processor)["prompt"]
        runs.first_batch(run, seen, prompt, processor)
    join = partial(collate, cfg=cfg, processor=processor)
    batches = data.Batches(mixtures, join, cfg.batch, dist.rank, dist.processes, cfg.mix)
    meta = runs.about("dualvla", cfg, robots, resumed) | {"kept": bits, "share": share}
    beside = {name: teacher.model for name, teacher in teachers.items()}
    model = common.place(model, cfg, dist, run.say, beside=beside)
    return Policy(model, cfg, processor, robots, dist.device), batches, meta


def check(cfg):
    """What no type can say about the flags, before anything is spent on them."""
    runs.check(cfg, "repeats", "queries", "rank", "euler", "depth", "heads", "horizon")
    score.check(cfg)
    benchmarks.check(cfg)
    common.refuse({
        f"--width {cfg.width}: a multiple of 8 and of --heads {cfg.heads}":
            cfg.width % 8 or cfg.width % cfg.heads,
        f"--queries {cfg.queries}: at most {BINS}": cfg.queries > BINS,
        f"--event-demos {cfg.event_demos}: at least 2": cfg.event_demos < 2,
        f"--execute {cfg.execute}: from 1 to --horizon {cfg.horizon}":
            not 1 <= cfg.execute <= cfg.horizon,
        f"--speak {cfg.speak}: a probability, from 0 to below 1": not 0 <= cfg.speak < 1,
        f"--temperature {cfg.temperature}: above 0": cfg.temperature <= 0,
        f"--sigma {cfg.sigma}: above 0": cfg.sigma <= 0,
        f"--reason {cfg.reason} and --motion {cfg.motion}: shares, together at most 1":
            cfg.reason + cfg.motion > 1,
        f"--show {cfg.show}: pruning or pareto": cfg.show not in ("", "pruning", "pareto"),
    })  # fmt: skip


def show(cfg):
    """--show: tables and pictures that need no training of the model."""
    folder = Path(cfg.out or ".")
    folder.mkdir(parents=True, exist_ok=True)
    if cfg.show == "pareto":
        return reports.pareto(ABLATIONS, ours, folder)
    acts, _ = data.recordings(cfg, common.setup(cfg))
    episodes = [e for part in acts for e in part.episodes]
    if not any(e.reasoning for e in episodes):
        raise common.UserError(f"--show pruning: {cfg.data} has no reasoning to prune; a "
                               "reasoning.jsonl beside the recordings holds it")  # fmt: skip
    scene = events.scene_labels(episodes, cfg)
    told = [(e, s, action_labels(e)) for e, s in zip(episodes, scene) if e.reasoning]
    reports.pruning(told, keep, cfg.seed, common.load_backbone(cfg.backbone)[1].tokenizer, folder)


def last_stage(cfg):
    return ORDER[-1] if cfg.stage == "chain" else cfg.stage


def staged(cfg, stage, folders):
    """The Config of one stage: its own settings, where it stands, what it starts from."""
    own = STAGES[stage] | {"steps": cfg.steps or STAGES[stage]["steps"]}
    own["lr"] = cfg.lr or STAGES[stage]["lr"]
    arm = cfg.ablation if stage == last_stage(cfg) else ""
    needs = {"expert": "", "generalist": "", "ablation": arm}
    needs |= {name: str(folders[name]) for name in ORDER[: ORDER.index(stage)]}
    begun = str(folders[stage]) if runs.standing(folders[stage]) == "begun" else ""
    made = replace(cfg, **own, **needs, stage=stage, out=str(folders[stage]), resume=begun)
    made.explicit = tuple(name for name in cfg.explicit if name in FREE)
    return made


def session(cfg, dist, last=None):
    """Trains a stage, or goes on with it, or takes a run as it is (--eval-only); then acts, asks
    and scores. last: the Config of the chain's last stage."""
    where = cfg.expert, cfg.generalist
    cfg, resumed, policy = runs.begin(cfg, dist, "dualvla", FREE, load_policy)
    if resumed:
        cfg.expert, cfg.generalist = where  # they are by now
    if policy:  # a chain's flags were checked before its first stage
        check(cfg)
    if cfg.benchmark:
        return benchmarks.run(cfg.benchmark, policy.write, cfg) if dist.main else None
    run = common.Run(cfg, "dualvla", __file__, dist, cfg.steps, resumed)
    run.say(f"stage {cfg.stage}: {run.folder}; {dist.processes} process(es) on {dist.device}")
    sets = data.question_sets(common.ABILITIES, cfg.questions, cfg.size, cfg.wrist_size)
    seconds, about = 0.0, {"stage": cfg.stage}
    if not policy:
        needed = [replace(cfg, stage=name) for name in (cfg.stage, *teaching(cfg))]
        common.foresee(cfg, dist, *(lambda c=c: build(c, 8, 7)[0] for c in needed))
        frozen = load_teachers(cfg, dist.device)
        policy, batches, meta = prepare(cfg, dist, run, resumed, frozen, last)
        teachers = [frozen[name].model if name in frozen else None for name in ORDER[:2]]
        measure = partial(along_the_way, policy, cfg, sets)
        seconds = train(cfg, dist, run, policy.model, batches, meta, resumed, measure, teachers)
        about |= {"kept": meta["share"], "params": common.param_counts(policy.model)}
    learned = policy.trained if cfg.eval_only else (cfg.steps, dist.processes)
    result = runs.facts("dualvla", cfg, cfg.stage, *learned, seconds) | about
    run.result(result | evaluate(policy, cfg, dist, run.folder, run.say, sets))
    run.close()
    if dist.main:
        pictures.draw_run(run.folder, ("action", "text", "answer", "kd_action", "kd_reason"))
    run.say(f"result.json, pictures, films and scores are in {run.folder}")


def main(argv=None):
    cfg = common.parse(Config, PRESETS, ABLATIONS, argv)
    if cfg.ablation == "list":
        return ablations.show("dualvla", ABLATIONS, "paper %", "% success, answers", ours)
    if not (cfg.resume or cfg.eval_only):  # of these the run's own flags are checked
        check(cfg)
    if cfg.describe:
        builds = {
            f"DualVLA --stage {stage}": lambda s=stage: build(replace(cfg, stage=s), 8, 7)[0]
            for stage in ORDER[: ORDER.index(last_stage(cfg)) + 1]
        }
        return common.describe(cfg.backbone, common.load_backbone, builds)
    if cfg.export:
        policy = load_policy(cfg.export, torch.device("cpu"))
        return instructvla.export_expert(policy, cfg.export, cfg.out or f"{cfg.export}/export")
    if cfg.show:
        return show(cfg)
    dist = common.setup(cfg)
    if cfg.eval_only:
        return session(cfg, dist)
    cfg = common.resume_auto(cfg, dist, "chain.json")
    cfg, out = runs.begin_chain(cfg, dist, "dualvla", FREE, check)
    folders = runs.folders(cfg, "dualvla", ORDER, out)
    runs.note_chain(cfg, dist, "dualvla", ORDER, out)
    folders = {n: folders[n] for n in ORDER[: ORDER.index(last_stage(cfg)) + 1]}
    last = staged(cfg, last_stage(cfg), folders)
    idle = {"expert"} - {last.stage, *teaching(last)} if cfg.generalist else ()
    for stage, folder in folders.items():
        if folder == out / stage and stage not in idle and runs.standing(folder) != "done":
            session(staged(cfg, stage, folders), dist, last)
    if dist.main:
        reports.stages(runs.finish(out, folders))
        print(f"results, pictures, films and scores of each stage are in {out}")
    dist.destroy()


if __name__ == "__main__":
    common.run_main(main)
