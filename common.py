"""What every method script needs and no paper is about, under one name.

Here: the command line, a run's folder and log, numbers, action tokens. Taken in from `parts/`:
backbones and tokenisation, CUDA kernels and their references, processes, checkpoints, training at
any size. Letters: H chunk, A action.
"""

import dataclasses
import inspect
import json
import math
import platform
import re
import shlex
import shutil
import statistics
import subprocess
import sys
import time
import typing
from functools import lru_cache
from importlib import metadata
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, models, trainers
from tqdm import tqdm

from parts.backbones import (
    ASSETS,
    BACKBONES,
    EagleProcessor,
    blank,
    describe,
    drop_deepstack,
    export_backbone,
    find_backbone,
    load_backbone,
    load_vlm,
    mrope_positions,
    patchify,
    quiet,
)
from parts.checkpoints import (
    Checkpoint,
    fill,
    load_checkpoint,
    load_optimizers,
    read_json,
    resume_auto,
    rng_state,
    save_checkpoint,
    save_run,
    set_rng_state,
    spread,
    write_json,
)
from parts.kernels import (
    attend,
    attend_joint,
    causal_mask,
    has_triton,
    joint_attention,
    linear_cross_entropy,
    linear_kl,
    triton_runs,
)
from parts.process import (
    Dist,
    Muon,
    Stop,
    UserError,
    autocast,
    human,
    multiplies_bf16,
    nearest,
    run_main,
    seed_all,
    setup,
    size,
    to_device,
)
from parts.scale import (
    add_lora,
    clip,
    device_memory,
    feed,
    foresee,
    gather,
    gathered,
    halt_at_nan,
    memory_rows,
    merge_lora,
    optimizers,
    parallel,
    place,
    same_samples,
    store_frozen,
    synchronise,
    vision_blocks,
    widen,
)
from parts.sight import flat, put, quick_vision, read, see

# --- command line ---------------------------------------------------------------------------------


@lru_cache
def field_notes(Config) -> dict[str, tuple[tuple[str, ...], str]]:
    """Field -> (choices, comment), from the source; a comment `a | b | c: text` lists choices."""
    notes = {}
    for line in inspect.getsource(Config).splitlines():
        code, _, comment = line.partition("  # ")
        if field := re.match(r"\s+(\w+)\s*:", code):
            listed = re.match(r"[\w.-]+( \| [\w.-]+)+(?=: |$)", comment)
            notes[field[1]] = tuple(listed[0].split(" | ")) if listed else (), comment
    return notes


def convert(flag: str, word: str, kind, choices: tuple[str, ...]):
    """A word of the command line as a value of type `kind`."""
    if typing.get_origin(kind) is tuple:
        element = typing.get_args(kind)[0]
        return tuple(convert(flag, part, element, choices) for part in word.split(",") if part)
    if choices and word not in choices:
        best = nearest(word, choices)
        raise UserError(f"{flag} takes {', '.join(choices)}; not {word!r} (did you mean {best}?)")
    try:
        value = kind(word)
        if value == value:  # a literal nan is not: no setting means it
            return value
    except ValueError:
        pass
    name = {int: "a whole number", float: "a number"}[kind]
    raise UserError(f"{flag} takes {name}, not {word!r}")


def usage(Config, presets: dict, ablations: dict) -> str:
    """The -h text: a flag a line with its comment and its default."""
    notes, defaults, rows = field_notes(Config), Config(), []
    for name, kind in typing.get_type_hints(Config).items():
        value, flag = getattr(defaults, name), name.replace("_", "-")
        word = "a,b,..." if isinstance(value, tuple) else kind.__name__
        value = ",".join(map(str, value)) if isinstance(value, tuple) else value
        rows.append((f"--[no-]{flag}" if kind is bool else f"--{flag} {word}", name, value))
    width = max(len(head) for head, _, _ in rows)
    lines = [f"usage: {Path(sys.argv[0]).name} [--flag value ...]", ""]
    lines += [f"  {head:{width}}  {notes[name][1]} [{value}]" for head, name, value in rows]
    lines += ["", "presets: " + ", ".join(presets)] if presets else []
    lines += ["ablations: " + ", ".join(["list", *ablations])] if ablations else []
    return "\n".join(lines)


def parse(Config, presets: dict[str, dict], ablations: dict[str, dict], argv=None):
    """Command line -> Config: defaults < preset < ablation < flags; `.explicit` names the flags
    and what the ablation sets, which a finished run is held to. The defaults are tiny's: another
    --backbone takes the preset `larger`, if there is one and no other is named.

    Keys of a preset that start with "_" (a row's meaning, a paper's number) are not settings.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    kinds, notes = typing.get_type_hints(Config), field_notes(Config)
    if "-h" in words or "--help" in words:
        print(usage(Config, presets, ablations))
        sys.exit(0)
    options = {"--" + name.replace("_", "-"): (name, True) for name in kinds}
    options |= {"--no-" + n.replace("_", "-"): (n, False) for n in kinds if kinds[n] is bool}
    given = {}
    while words:
        flag, has_value, value = words.pop(0).partition("=")
        if flag not in options:
            raise UserError(f"unknown flag {flag} (did you mean {nearest(flag, options)}?)")
        name, on = options[flag]
        if kinds[name] is bool:
            if has_value:
                raise UserError(f"{flag} takes no value: there is --[no-]{name.replace('_', '-')}")
            given[name] = on
        elif not has_value and (not words or words[0].startswith("--")):
            raise UserError(f"{flag} needs a value")
        else:
            word = value if has_value else words.pop(0)
            given[name] = convert(flag, word, kinds[name], notes[name][0])
    grown = "larger" in presets and given.get("backbone", "tiny") != "tiny"
    settings, chosen = {"preset": "larger"} if grown else {}, {}
    for kind, table in (("preset", presets), ("ablation", {**ablations, "list": {}})):
        row = given.get(kind, settings.get(kind, ""))
        if row and row not in table:
            raise UserError(f"unknown {kind} {row!r} (did you mean {nearest(row, table)}?)")
        chosen = {k: v for k, v in table.get(row, {}).items() if not k.startswith("_")}
        settings |= chosen
    settings |= given
    own = r"(^|,)(tabletop|metaworld)([:=,]|$)"
    if settings.get("data") and not re.search(own, settings["data"]):
        settings.setdefault("world", "none")  # who learns from other recordings acts elsewhere
    cfg = Config(**settings)
    cfg.explicit = tuple(chosen | given)  # chosen: of the ablation, which came last
    return cfg


def resume_config(cfg, saved: dict, free: tuple[str, ...] = ()):
    """The saved run's Config; only explicit flags named in `free` (and --resume) may differ."""
    unknown = set(saved) - set(typing.get_type_hints(type(cfg)))
    if unknown:
        raise UserError(f"the checkpoint has settings of another version: {', '.join(unknown)}")
    merged = type(cfg)(**{k: tuple(v) if isinstance(v, list) else v for k, v in saved.items()})
    merged.explicit = getattr(cfg, "explicit", ())  # a Config that parse() did not make has none
    for name in merged.explicit:
        value, before = getattr(cfg, name), getattr(merged, name)
        if value != before and name in saved and name not in (*free, "resume"):
            flag = "--" + name.replace("_", "-")
            words = f"differs from {before!r} in the run: leave it out, or start a new run"
            raise UserError(f"{flag} {value} {words}")
        setattr(merged, name, value)
    return merged


# --- run folder -----------------------------------------------------------------------------------


def positive(cfg, *names: str) -> None:
    """UserError for the first of these flags that is below 1."""
    for name in names:
        if getattr(cfg, name) < 1:
            raise UserError(f"--{name.replace('_', '-')} {getattr(cfg, name)}: at least 1")


def refuse(faults: dict[str, bool]) -> None:
    """UserError for the first of the faults, {what to say: whether it is so}."""
    for words, so in faults.items():
        if so:
            raise UserError(words)


class Run:
    """runs/<method>-<world>-<seed>-<time>: config.json, script copy, metrics.jsonl, result.json."""

    def __init__(self, cfg, method, script, dist, total, resumed: Checkpoint | None = None):
        self.dist, self.total, self.bar = dist, total, None
        first = resumed.step if resumed else 0
        name = f"{method}-{cfg.world}-{cfg.seed}-{time.strftime('%Y%m%d-%H%M%S')}"
        new = Path("runs", re.sub(r"[^\w.-]", "-", name))
        while new.exists():  # two runs in one second
            new = new.with_name(new.name + "+")
        folder = resumed.run if resumed else cfg.out or new
        self.folder = Path(dist.share(str(folder)))
        kept = [self.folder / name for name in ("metrics.jsonl", "result.json")]
        if not resumed and dist.share(any(file.exists() and file.stat().st_size for file in kept)):
            raise UserError(f"{folder} holds a run: --resume {folder}, or another --out")
        if not dist.main:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        config = {"method": method, "config": dataclasses.asdict(cfg), **start_facts(dist)}
        write_json(self.folder / (f"config-{first:08d}.json" if first else "config.json"), config)
        shutil.copy(script, self.folder)
        metrics = self.folder / "metrics.jsonl"
        lines = metrics.read_text().splitlines(keepends=True) if metrics.exists() else []
        whole = [line for line in lines if line.endswith("\n")]  # a crash may have torn the last
        draft = metrics.with_suffix(".tmp")
        rows = [(line, json.loads(line)) for line in whole]  # abilities: measured before a step
        past = [line for line, row in rows if row["step"] + ("abilities" in row) <= first]
        draft.write_text("".join(past))
        draft.replace(metrics)
        self.file = open(metrics, "a", buffering=1)
        self.bar = tqdm(total=total, initial=first, disable=None, leave=False)  # None: terminals

    def say(self, text: str) -> None:
        if self.dist.main:
            tqdm.write(text)
            sys.stdout.flush()

    def record(self, step: int, values: dict) -> None:
        if self.dist.main:
            line = {"step": step, "time": round(time.time(), 2), **values}
            self.file.write(json.dumps(line, default=lambda array: array.tolist()) + "\n")

    def log(self, step: int, values: dict[str, float]) -> None:
        """One aligned line on the console, one line in metrics.jsonl."""
        self.record(step, values)
        text = f"step {step:>{len(str(self.total))}}/{self.total}"
        for name, value in values.items():
            text += f"  {name} {human(value) if abs(value) >= 1e6 else f'{value:.4g}':<9}"
        self.say(text.rstrip())

    def progress(self, step: int) -> None:
        if self.bar is not None:
            self.bar.update(step - self.bar.n)

    def result(self, values: dict) -> None:
        if self.dist.main:
            write_json(self.folder / "result.json", values)

    def close(self) -> None:
        if self.dist.main:
            self.bar.close()
            self.file.close()


def result_lines(method: str) -> list[dict]:
    """What `bench/study.py` measured: the lines of assets/results/<method>.jsonl."""
    file = Path(__file__).parent / "assets" / "results" / f"{method}.jsonl"
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def start_facts(dist: Dist) -> dict:
    """What is needed to repeat a start of a run: command, commit, versions, kind of machine."""
    git = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]
    commit = shutil.which("git") and subprocess.run(git, capture_output=True, text=True).stdout
    cuda = dist.device.type == "cuda"
    return {
        "command": shlex.join(["python", *sys.argv]),
        "commit": (commit or "").strip(),
        "python": platform.python_version(),
        **{name: metadata.version(name) for name in ("torch", "transformers", "numpy")},
        "device": torch.cuda.get_device_name() if cuda else platform.machine() + " CPU",
        "threads": torch.get_num_threads(),
        "processes": dist.processes,
    }


# --- numbers --------------------------------------------------------------------------------------


def ci95(successes: int, n: int) -> tuple[float, float]:
    """95% Wilson interval of a success rate, in 0..1."""
    if n == 0:
        return 0.0, 1.0
    z, rate = 1.959964, successes / n
    centre = (rate + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(rate * (1 - rate) / n + z * z / (4 * n * n))
    return max(centre - half, 0.0), min(centre + half, 1.0)


def ci95_mean(values: list[float]) -> tuple[float, float]:
    """95% t-interval of a mean over seeds; one value says nothing about its spread: nan."""
    free = len(values) - 1
    if free < 1:
        return math.nan, math.nan
    table = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228)
    t = table[free - 1] if free <= 10 else 1.96 + 2.372 / free + 2.82 / free**2  # to 0.001
    half = t * statistics.stdev(values) / math.sqrt(len(values))
    return statistics.fmean(values) - half, statistics.fmean(values) + half


def lr_at(step: int, base: float, warmup: int, total: int, min_lr: float = 0.0) -> float:
    """Linear warm-up, then half a cosine from `base` to `min_lr`; steps count from 0."""
    if step < warmup:
        return base * (step + 1) / warmup
    done = min((step - warmup) / max(total - warmup, 1), 1.0)
    return min_lr + (base - min_lr) * 0.5 * (1 + math.cos(math.pi * done))


def param_counts(model: torch.nn.Module) -> dict[str, int]:
    total = sum(p.numel() for p in model.parameters())
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    return {"total": total, "trainable": trainable, "frozen": total - trainable}


# --- questions about pictures ---------------------------------------------------------------------

ABILITIES = ("pope", "seed", "scienceqa", "mme")  # the world's questions in these benchmarks' form


def label(prompt, answers):
    """Gives a prompt whose rows end with their answers "labels" (B, T), -100 everywhere else, and
    "spoken", which of its B * T predict one."""
    prompt["labels"] = labels = torch.full_like(prompt["input_ids"], -100)
    for ids, answer in zip(labels, answers):
        ids[len(ids) - len(answer) :] = torch.tensor(answer)
    prompt["spoken"] = flat(labels >= 0) - 1


def spoken(h, prompt):
    """h (B, T, D) -> states that predict a labelled word (n, D), the words (n,)."""
    at = prompt["spoken"]
    return h.flatten(0, 1).index_select(0, at), prompt["labels"].flatten()[at + 1]


def all_right(right, prompt):
    """right (n,) of the labelled words -> (B,): whether all of a row are."""
    missed = torch.zeros_like(prompt["labels"], dtype=torch.bool).flatten()
    return ~missed.index_copy(0, prompt["spoken"], ~right).view_as(prompt["labels"]).any(1)


def pack(rows, answers, pixels, grids, processor):
    """Rows of ids that end with their answers, pictures -> batch of one prompt, labels in it."""
    prompt = processor.pad(rows, grids)
    label(prompt, answers)
    return {
        "prompt": prompt,
        "pixel_values": torch.from_numpy(np.concatenate(pixels)),
        "grids": [g for grid in grids for g in grid],
    }


def ask(samples, processor, system):
    """Samples with "images", "question", "answer" -> batch, its answers labelled."""
    pixels, grids = zip(*(processor.images(s["images"]) for s in samples))
    pairs = [
        processor.prompt(system, "Question: " + s["question"], grid, s["answer"])
        for s, grid in zip(samples, grids)
    ]
    rows, answers = [ids + answer for ids, answer in pairs], [answer for _, answer in pairs]
    return pack(rows, answers, pixels, grids, processor)


@torch.no_grad()
def abilities(right, sets, policy, system) -> dict[str, float]:
    """{name: samples} -> {name: share answered right}; right(batch) -> (B,) bool. As in MME's
    accuracy+, a picture counts there if both answers are right."""
    policy.model.eval()
    shares = {}
    for name, samples in sets.items():
        told = []
        for i in range(0, len(samples), 50):
            asked = ask(samples[i : i + 50], policy.processor, system)
            asked = to_device(asked, policy.device)
            with autocast(policy.device, policy.cfg.dtype):
                told += right(asked).tolist()
        together = np.reshape(told, (-1, 2 if name == "mme" else 1))
        shares[name] = float(together.all(1).mean())
    return shares


# --- action tokens --------------------------------------------------------------------------------


def cosines(H):
    """Orthonormal DCT-II (H, H): coefficients = cosines(H) @ chunk; its transpose inverts it."""
    k, n = np.arange(H)[:, None], np.arange(H)[None]
    basis = np.sqrt(2 / H) * np.cos(np.pi * k * (2 * n + 1) / (2 * H))
    basis[0] /= np.sqrt(2)
    return basis


class Fast:
    """Chunks (H, A) of normalised actions <-> ids of the vocabulary's <robot_action_i> tokens."""

    SCALE = 10  # coefficients are rounded to tenths

    def __init__(self, state, tokenizer):
        self.state, self.bpe = state, Tokenizer.from_str(state["bpe"])
        self.low, self.high, self.H, self.A = (state[key] for key in ("low", "high", "H", "A"))
        self.first = tokenizer.convert_tokens_to_ids("<robot_action_0>")
        self.end = tokenizer.eos_token_id

    @staticmethod
    def extend(vlm, tokenizer, count=2048):
        """Gives a backbone without action tokens `count` of them; --describe, which has no
        tokenizer of a published backbone, knows how many words that one has."""
        known = getattr(vlm.config, "words", None)
        rows = vlm.get_input_embeddings().num_embeddings
        if known:
            vlm.resize_token_embeddings(max(known + count, rows), mean_resizing=False)
        elif "<robot_action_0>" not in tokenizer.get_vocab():
            tokenizer.add_tokens([f"<robot_action_{i}>" for i in range(count)])
            with quiet():  # the library explains how it draws new words
                vlm.resize_token_embeddings(max(len(tokenizer), rows))

    @classmethod
    def fit(cls, chunks, tokenizer):
        """Learns the byte pairs from a list of chunks (H, A)."""
        H, A = chunks[0].shape
        rounded = np.stack([cls.SCALE * cosines(H) @ c for c in chunks]).round().astype(int)
        low, high = int(rounded.min()), int(rounded.max())
        letters = [chr(256 + i) for i in range(high - low + 1)]
        words = sum(token.startswith("<robot_action_") for token in tokenizer.get_vocab())
        if len(letters) > words:
            raise UserError(f"--head fast: {len(letters)} coefficients, {words} action tokens")
        lines = ["".join(letters[v - low] for v in values.ravel()) for values in rounded]
        bpe = Tokenizer(models.BPE())
        how = trainers.BpeTrainer(vocab_size=words, initial_alphabet=letters, show_progress=False)
        bpe.train_from_iterator(lines, how)
        return cls({"bpe": bpe.to_str(), "low": low, "high": high, "H": H, "A": A}, tokenizer)

    def encode(self, chunk):
        """(H, A) -> ids, closed by the end of turn; low frequencies of all dimensions first."""
        values = (self.SCALE * cosines(self.H) @ chunk).round().clip(self.low, self.high)
        letters = "".join(chr(256 + int(v) - self.low) for v in values.ravel())
        return tuple(self.first + i for i in self.bpe.encode(letters).ids) + (self.end,)

    def decode(self, rows):
        """(B, n) ids -> (B, H, A) float32; a coefficient that the model left unsaid is zero."""
        values = np.zeros((len(rows), self.H * self.A))
        for out, ids in zip(values, rows.tolist()):
            said = ids[: ids.index(self.end)] if self.end in ids else ids
            pieces = [self.bpe.id_to_token(i - self.first) for i in said if i >= self.first]
            letters = "".join(piece or "" for piece in pieces)[: len(out)]
            out[: len(letters)] = [ord(letter) - 256 + self.low for letter in letters]
        chunks = cosines(self.H).T @ values.reshape(-1, self.H, self.A) / self.SCALE
        return torch.from_numpy(chunks.astype(np.float32))


@torch.no_grad()
def untrained(vlm, word: int):
    """(V,) True at the words that no text ever trained, if this one (its id) is of them: they lie
    in one place, where a model cannot tell one from another (7 of 10 of tiny's: letters, slots,
    action tokens). A word that lies alone was trained."""
    directions = F.normalize(vlm.get_input_embeddings().weight.float(), dim=-1)
    beside = directions @ directions[word] > 0.99
    return beside & (beside.sum() > 1)


@torch.no_grad()
def draw_words(vlm, word: int, count: int, generator=None):
    """-> (count, D) new embeddings, float32, amid all words but those that lie with `word`."""
    words = vlm.get_input_embeddings().weight
    if words.is_meta:  # --describe counts them only
        return torch.empty(count, words.shape[1])
    trained = words[~untrained(vlm, word)].float()
    noise = torch.randn(count, words.shape[1], generator=generator)
    return trained.mean(0) + trained.std(0) * noise.to(words.device)


@torch.no_grad()
def redraw_untrained(vlm, ids: list[int], only=None):
    """Draws the words that lie with one of these anew, amid the trained ones; only: of them those
    with these ids, the words that will be trained."""
    words, noise = vlm.get_input_embeddings().weight, torch.Generator().manual_seed(0)
    for word in ids:
        beside = untrained(vlm, word)
        if only is not None:
            beside &= torch.isin(torch.arange(len(words), device=words.device), torch.tensor(only))
        words[beside] = draw_words(vlm, word, int(beside.sum()), noise).to(words.dtype)
