"""Event boundaries in recordings: the frames where one thing ends and the next begins.

    found = detector("ddm", labelled_episodes, seed=0).boundaries(episode)     # [frame, ...]

A small detector after DDM-Net (Tang et al., CVPR 2022): features of several depths and time scales,
a map of their differences between all frames of a window, a classifier for the window's middle,
balanced training with cross-entropy on both branches and their fusion, peaks above a threshold.
Smaller than the original: a conv net of four layers for ResNet-50, attention over the rows of the
maps for its transformer decoders, a window of 11 frames at the recording's own rate.

Letters: T frames, B windows, W frames of a window, L levels, S time scales, C channels.
"""

import json
import math
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from torch import nn

import common
import data
from worlds import pictures

WINDOW, SIDE = 11, 64  # frames of a window; pixels that a frame is brought to
# What DDM-Net makes boundaries of its scores by: above 0.53 and all others within 5 places, none
# among the first 2 and the last 3. `--event-scores` are read so. The tabletop's sub-goals are 2 to
# 4 frames apart and its last one is reached at the end: there the F1 of the detector below is 0.91
# with a radius of 1, 0.48 with 5, 0.29 without the ends. It takes 1.
THRESHOLD, RADIUS, ENDS = 0.53, 5, (2, 3)


# --- labels and how well they are found -----------------------------------------------------------


def boundaries(phase):
    """Sub-goal of each frame -> the frames where a new one begins."""
    return [t for t in range(1, len(phase)) if phase[t] != phase[t - 1]]


def dilate(found, length, reach):
    """Boundaries -> labels (T,) bool, true up to `reach` frames away."""
    label = np.zeros(length, bool)
    for t in found:
        label[max(t - reach, 0) : t + reach + 1] = True
    return label


def peaks(scores, threshold, radius=1, ends=(1, 0)):
    """Frames whose score is above the threshold and above all others within the radius, but for so
    many at either end; an episode does not begin with a boundary."""
    found = []
    for t in range(ends[0], len(scores) - ends[1]):
        around = np.delete(scores, t)[max(t - radius, 0) : t + radius]
        if scores[t] > threshold and (scores[t] > around).all():
            found.append(t)
    return found


def matches(found, truth, reach):
    """How many true boundaries, in order, have a found one at most `reach` away, their nearest of
    those that no other has taken."""
    left, hits = list(found), 0
    for t in sorted(truth):
        nearest = min(left, key=lambda f: abs(f - t), default=math.inf)
        if abs(nearest - t) <= reach:
            left.remove(nearest)
            hits += 1
    return hits


def f1(found, truth, lengths, distance=0.05):
    """F1 by relative distance, pooled over episodes; found, truth: boundaries of each episode.

    As in Kinetics-GEBD a boundary counts as found within `distance` of the episode's duration.
    """
    hits = sum(matches(f, t, distance * n) for f, t, n in zip(found, truth, lengths))
    return 2 * hits / max(sum(map(len, found)) + sum(map(len, truth)), 1)


def from_file(path, episodes):
    """Scores of another detector as JSON -> boundaries per episode. {"0": scores, ...}, one of each
    frame, or as DDM-Net gives them, of some frames: {"0": {"frame_idx": [...], "scores": [...]}}.
    """
    flag = f"--event-scores {path}"
    try:
        table = json.loads(Path(path).read_text())
        numbers = [i if e.number < 0 else e.number for i, e in enumerate(episodes)]
        if len(set(numbers)) < len(numbers):
            raise ValueError("several datasets count from 0, this file is of one")
        rows = [table[str(number)] for number in numbers]
        frames = [r["frame_idx"] if isinstance(r, dict) else range(len(r)) for r in rows]
        rows = [np.array(r["scores"] if isinstance(r, dict) else r, float) for r in rows]
    except (OSError, ValueError, TypeError) as error:
        raise common.UserError(f"{flag}: not a JSON file of scores ({error})") from None
    except KeyError as error:
        raise common.UserError(f"{flag}: no scores for episode {error}") from None
    found = []
    for i, at, scores, episode in zip(numbers, frames, rows, episodes):
        T = len(episode.action)
        whole = len(at) == T if isinstance(at, range) else all(t in range(T) for t in at)
        if not whole or scores.shape != (len(at),):
            words = f"{scores.size} scores of {len(at)} frames"
            raise common.UserError(f"{flag}: episode {i} has {T} frames, this has {words}")
        found.append([int(at[t]) for t in peaks(scores, THRESHOLD, RADIUS, ENDS)])
    return found


def told(episodes):
    """Whether there is anything to look for boundaries for."""
    return any(e.reasoning for e in episodes)


def check(episodes, cfg):
    """Refuses what --event-scores or --events cannot do for these episodes -> those that a detector
    learns from: demonstrations of the world, whose sub-goals are marked."""
    if cfg.event_scores:
        from_file(cfg.event_scores, episodes)
    elif cfg.events == "phase" and told(episodes):
        if not any(boundaries(e.phase) for e in episodes):
            raise common.UserError("--events phase: these recordings mark no sub-goals; take "
                                   "--events similarity or --event-scores FILE")  # fmt: skip
    elif told(episodes):
        if cfg.events == "ddm" and cfg.world == "none":
            raise common.UserError("--events ddm learns from a world's marks: take "
                                   "--events similarity or --event-scores FILE")  # fmt: skip
        how = cfg.event_demos, cfg.seed + 500, cfg.size, cfg.wrist_size, cfg.noise
        known = data.demonstrations(cfg.world, *how) if cfg.world != "none" else []
        if cfg.events == "ddm" and len(known[0].images) != len(episodes[0].images):
            raise common.UserError(f"--events ddm learns from --world {cfg.world}, which has other "
                                   "cameras than --data: take --events similarity")  # fmt: skip
        return known
    return []


def scene_labels(episodes, cfg, say=print):
    """Event boundaries, from a file (--event-scores), marked or found (--events) -> labels (T,)
    bool of each episode."""
    known = check(episodes, cfg)
    if cfg.event_scores:
        found = from_file(cfg.event_scores, episodes)
    elif cfg.events == "phase":
        found = [boundaries(e.phase) for e in episodes]
    elif not told(episodes):
        found = [[] for _ in episodes]
    else:
        made = detector(cfg.events, known, cfg.seed, say)
        found = [made.boundaries(e) if e.reasoning else [] for e in episodes]
    return [dilate(f, len(e.action), cfg.reach) for f, e in zip(found, episodes)]


# --- without training -----------------------------------------------------------------------------


def frames_of(episode):
    """All cameras, (T, 3 * cameras, SIDE, SIDE) in 0..1."""
    return torch.cat([torch.cat([shrink(v[t]) for t in range(len(v))])
                      for v in episode.images.values()], dim=1)  # fmt: skip


def shrink(picture):
    """uint8 (h, w, 3), of whatever size it was recorded in -> (1, 3, SIDE, SIDE) in 0..1."""
    picture = torch.from_numpy(np.array(picture)).permute(2, 0, 1)[None].float() / 255
    return F.interpolate(picture, (SIDE, SIDE), mode="bilinear", antialias=True)


def windows(length):
    """(T, W) frame numbers around each frame, the ends repeated."""
    around = torch.arange(length)[:, None] + torch.arange(WINDOW) - WINDOW // 2
    return around.clamp(0, length - 1)


class Similarity:
    """Frames of one side of a boundary are alike, frames across it are not."""

    threshold = 0.0

    def scores(self, episode):
        """(T,) similarity within the halves of a window less that across them, less its mean."""
        x = F.adaptive_avg_pool2d(frames_of(episode), 16).flatten(1)  # (T, C)
        x = F.normalize(x - x.mean(0), dim=1)
        near = windows(len(x))[:, WINDOW // 2 - 2 : WINDOW // 2 + 2]  # two frames to each side
        alike = x[near] @ x[near].transpose(1, 2)  # (T, 4, 4)
        within = alike[:, :2, :2].mean((1, 2)) + alike[:, 2:, 2:].mean((1, 2))
        novelty = within / 2 - alike[:, :2, 2:].mean((1, 2))
        return (novelty - novelty.mean()).numpy()

    def boundaries(self, episode):
        return peaks(self.scores(episode), self.threshold)


# --- DDM-Net --------------------------------------------------------------------------------------


class DDMNet(nn.Module):
    """Scores of the middle frames of windows, from pictures and from their difference maps."""

    def __init__(self, channels, width=32):
        super().__init__()
        sizes = [channels, 16, 32, 48, 64]
        self.convs = nn.ModuleList(
            nn.Conv2d(i, o, 3, stride=2, padding=1) for i, o in zip(sizes, sizes[1:])
        )
        self.levels = nn.ModuleList(nn.Linear(16 * o, width) for o in sizes[2:])
        self.times = nn.ModuleList(
            nn.ModuleList(nn.Conv1d(width, width, k, padding=k // 2) for k in (1, 3, 3))
            for _ in sizes[2:]
        )
        self.maps = nn.Sequential(
            nn.Conv2d(9, width, 3, padding=1), nn.ReLU(), nn.Conv2d(width, width, 3, padding=1),
            nn.ReLU(),
        )  # fmt: skip
        self.look = nn.Conv2d(width, 1, 1)  # how much each column of a row counts
        self.rgb = nn.Conv1d(9 * width, width, 3, padding=1)
        self.ddm = nn.Conv1d(width, width, 3, padding=1)
        self.heads = nn.ModuleList(nn.Linear(width, 2) for _ in range(2))
        self.alpha = nn.Parameter(torch.zeros(()))

    def encode(self, frames):
        """(T, 3 * cameras, SIDE, SIDE) -> features (L, T, C) of three depths."""
        levels, x = [], frames - 0.5
        for i, conv in enumerate(self.convs):
            x = F.relu(conv(x))
            if i:
                levels.append(self.levels[i - 1](F.adaptive_avg_pool2d(x, 4).flatten(1)))
        return torch.stack(levels)

    def forward(self, features):
        """Features (L, B, W, C) of windows -> logits (3, B, 2): fused, pictures, maps."""
        series = []
        for x, (one, three, more) in zip(features.transpose(2, 3), self.times):  # x (B, C, W)
            near = three(x)
            series += [x + 0.5 * y for y in (one(x), near, more(F.relu(near)))]
        even = [F.instance_norm(x).transpose(1, 2) for x in series]  # S * L of (B, W, C)
        maps = torch.stack([-torch.cdist(x, x.detach()) for x in even], dim=1)  # (B, 9, W, W)
        maps = self.maps(maps)  # (B, C, W, W)
        rows = (maps * self.look(maps).softmax(-1)).sum(-1)  # (B, C, W)
        rgb, ddm = self.rgb(torch.cat(series, dim=1)), self.ddm(rows)
        middle = [F.relu(x)[:, :, WINDOW // 2] for x in (rgb, ddm)]
        rgb, ddm = (head(x) for head, x in zip(self.heads, middle))  # (B, 2)
        share = self.alpha.sigmoid()
        return torch.stack([share * rgb + (1 - share) * ddm, rgb, ddm])

    @torch.no_grad()
    def scores(self, episode):
        """(T,) probability that something new begins at each frame."""
        x = self.encode(frames_of(episode))
        return self(x[:, windows(x.shape[1])])[0].softmax(-1)[:, 1].numpy()

    def boundaries(self, episode):
        return peaks(self.scores(episode), self.threshold)

    def fit(self, episodes, seed=0, steps=400, at_once=6, lr=2e-3):
        """Learns the boundaries of labelled episodes, as many other frames beside them."""
        rng, generator = np.random.default_rng(seed), torch.Generator().manual_seed(seed)
        opt = torch.optim.AdamW(self.parameters(), lr=lr, weight_decay=1e-2)
        for step in range(steps):
            for group in opt.param_groups:
                group["lr"] = common.lr_at(step, lr, 20, steps)
            chosen = [episodes[i] for i in rng.integers(len(episodes), size=at_once)]
            places, labels, first = [], [], 0
            for e in chosen:
                places.append(first + windows(len(e.action)))
                labels.append(torch.from_numpy(dilate(boundaries(e.phase), len(e.action), 0)))
                first += len(e.action)
            features = self.encode(torch.cat([frames_of(e) for e in chosen]))
            labels = torch.cat(labels)
            yes, no = labels.nonzero()[:, 0], (~labels).nonzero()[:, 0]
            no = no[torch.randperm(len(no), generator=generator)[: len(yes)]]
            picked = torch.cat([yes, no])
            logits = self(features[:, torch.cat(places)[picked]])  # (3, B, 2)
            loss = sum(F.cross_entropy(branch, labels[picked].long()) for branch in logits)
            opt.zero_grad()
            loss.backward()
            opt.step()
        truth, lengths = [boundaries(e.phase) for e in episodes], [len(e.action) for e in episodes]
        scores = [self.scores(e) for e in episodes]

        def worth(threshold):
            return f1([peaks(s, threshold) for s in scores], truth, lengths)

        self.threshold = max(np.linspace(0.2, 0.9, 15).tolist(), key=worth)
        return self


def detector(kind, episodes, seed=0, say=print, steps=400):
    """ddm: trained on the labelled episodes, a sixth of them kept for the F1 it reports."""
    made = Similarity()
    held = episodes[-max(len(episodes) // 6, 1) :]
    if kind == "ddm":
        state = torch.get_rng_state()
        torch.manual_seed(seed)
        made = DDMNet(3 * len(episodes[0].images))
        torch.set_rng_state(state)  # nobody else's randomness depends on this
        made.fit(episodes[: len(episodes) - len(held)] or episodes, seed, steps)
    if held:
        rows = ", ".join(f"{name} {value:.3f}" for name, value in worth(made, held))
        say(f"event boundaries ({kind}): {rows}")
    return made


def worth(made, episodes):
    """F1 at relative distances 0.05, 0.25 and on average, and of marking every second frame."""
    truth, lengths = [boundaries(e.phase) for e in episodes], [len(e.action) for e in episodes]
    found = [made.boundaries(e) for e in episodes]
    rows = [(f"F1@{d}", f1(found, truth, lengths, d)) for d in (0.05, 0.25)]
    steps = np.arange(1, 11) / 20
    rows.append(("mean", float(np.mean([f1(found, truth, lengths, d) for d in steps]))))
    every = [list(range(1, n, 2)) for n in lengths]
    return [*rows, ("every second frame F1@0.05", f1(every, truth, lengths))]


# --- the hand's way -------------------------------------------------------------------------------


def hand(episode):
    """-> (T, D): x y z of the hand, its angles as far as there are any, and last how open it is.

    States of a world begin and end so, and those of recordings with the tabletop's eight numbers,
    whose seventh is always 0 (Bridge). Elsewhere the state need not say how open the hand is
    (LIBERO's ends with two finger joints), but the action does. Without a state the actions, which
    are changes of the pose, add up to it.
    """
    state, action = episode.state, episode.action
    S = state.shape[1]
    if episode.task or (S == 8 and not state[:, 6].any()):
        return np.concatenate([state[:, :-1][:, :6], state[:, -1:]], axis=1)
    pose = state[:, :6] if S else (action.cumsum(0) - action)[:, :-1][:, :6]
    if S > 6 and np.allclose(np.linalg.norm(state[:, 3:7], axis=1), 1, atol=0.01):
        pose = np.concatenate([state[:, :3], turned(state[:, 3:7])], axis=1)
    return np.concatenate([pose, action[:, -1:] > 0.5], axis=1)


def turned(q):
    """Unit quaternions (T, 4), x y z w, of either sign -> turn since the first, axis times angle
    (T, 3)."""
    v, w, v_0, w_0 = q[:, :3], q[:, 3:], q[:1, :3], q[:1, 3:]
    real = w * w_0 + (v * v_0).sum(1, keepdims=True)  # of q times the first one's conjugate
    axis = v * w_0 - w * v_0 - np.cross(v, v_0)
    axis, long = np.where(real < 0, -axis, axis), np.linalg.norm(axis, axis=1, keepdims=True)
    return axis / np.maximum(long, 1e-9) * 2 * np.arctan2(long, np.abs(real))


# --- pictures and words ---------------------------------------------------------------------------


def timeline(path, episode, labels, scale=2):
    """PNG: the frames of an episode, under each a mark for every label {"name": (T,) bool}; what
    the last label keeps is shown, the rest is pale."""
    frames = next(iter(episode.images.values()))
    side, font = len(frames[0]) * scale, ImageFont.load_default(13)
    left, line = 70, 18
    height = side + line * len(labels) + 24
    sheet = Image.new("RGB", (left + side * len(frames), height), "white")
    pen, kept = ImageDraw.Draw(sheet), list(labels.values())[-1]
    for t, frame in enumerate(frames):
        image = Image.fromarray(frame).resize((side, side), Image.Resampling.NEAREST)
        pale = Image.blend(image, Image.new("RGB", image.size, "white"), 0.0 if kept[t] else 0.75)
        sheet.paste(pale, (left + t * side, 0))
    for row, (name, label) in enumerate(labels.items()):
        y = side + 4 + row * line
        pen.text((4, y), name, "black", font)
        for t, on in enumerate(label):
            box = [left + t * side + 4, y + 2, left + (t + 1) * side - 4, y + line - 4]
            pen.rectangle(box, pictures.INKS[row] if on else "#eeeeee")
    pen.text((4, height - 18), episode.instruction, "black", font)
    sheet.save(path)


MOVES = (("right", "left"), ("forward", "back"), ("up", "down"), (), ("tilt up", "tilt down"),
         ("turn left", "turn right"))  # fmt: skip


def every_move():
    """-> all that `move_name` puts a name together from."""
    names = [name for pair in MOVES for name in pair]
    return [f"move {n} and {n}" for n in names] + ["stop", "open the fingers", "close the fingers"]


def all_words(episodes, tokenizer):
    """-> ids of all words in which these recordings explain a step or name a move."""
    said = {text for e in episodes for text in e.reasoning or ()} | set(every_move())
    return sorted({i for text in said for i in tokenizer.encode(text, add_special_tokens=False)})


def move_name(path, t, window=3, threshold=0.02):
    """A hand's way (T, D), of `hand()` -> what it does next: "move left up and close the fingers",
    or "stop"."""
    change = np.array(path[min(t + window, len(path) - 1)] - path[t])
    change[3:-1] = (change[3:-1] + np.pi) % (2 * np.pi) - np.pi  # angles, the short way round
    turns = zip(MOVES, change[:-1])
    way = [names[int(d < 0)] for names, d in turns if names and abs(d) > threshold]
    straight = [word for word in way if " " not in word]
    words = ["move " + " ".join(straight)] if straight else []
    words += [word for word in way if " " in word]
    if abs(change[-1]) > threshold:
        words.append(f"{'open' if change[-1] > 0 else 'close'} the fingers")
    return " and ".join(words) or "stop"
