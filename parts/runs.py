"""A run of any of the scripts, around what its paper says: flags that cannot be, --resume and
--eval-only, what a policy sees, what a result says, and a chain of stages, each a run in a folder
of its own. S + A are the numbers of a state and an action."""

import dataclasses
import math
import time
from pathlib import Path

import numpy as np

import common
import data
from worlds import loop, pictures

FREE = (  # what a resumed or evaluated run of any script may change
    "steps", "episodes", "domains", "execute", "ensemble", "parallel", "gifs", "render", "out",
    "log_every", "save_every", "workers", "threads", "device", "eval_only", "robot", "compile",
    "grad_checkpoint", "shard",
)  # fmt: skip
NOT_NEGATIVE = (
    "lr", "lr_head", "lr_teacher", "min_lr", "warmup", "weight_decay", "noise", "augment",
    "workers", "gifs", "qa_every", "cotrain", "distill_weight", "kd_weight", "alpha", "talk",
    "gripper_weight", "foresight_weight", "foresight_steps", "resampler", "mix", "reason",
    "motion", "steps", "interval", "lora", "future", "reach", "score_episodes",
)  # fmt: skip
SHARES = ("dropout", "attention_dropout", "embedding_dropout", "min_lr", "hide_foresight")


def check(cfg, *counts):
    """What no type can say about the flags that a script has: `counts` and their like are at least
    1, NOT_NEGATIVE at least 0, SHARES at most 1."""
    common.positive(cfg, "batch", "accumulate", "demos", "episodes", "parallel", "log_every",
                    "save_every", "size", "wrist_size", "width", *counts)  # fmt: skip
    most = dict.fromkeys(NOT_NEGATIVE, math.inf) | dict.fromkeys(SHARES, 1.0)
    for name, end in most.items():
        value, flag = getattr(cfg, name, 0), "--" + name.replace("_", "-")
        if not 0 <= value <= end or value == math.inf:
            words = "at least 0" + (f", at most {end:g}" if end < math.inf else ", finite")
            raise common.UserError(f"{flag} {value}: {words}")
    if not cfg.clip > 0:
        raise common.UserError(f"--clip {cfg.clip}: above 0; inf clips nothing")
    scores = getattr(cfg, "event_scores", "")
    if scores and not (cfg.resume or cfg.eval_only or Path(scores).is_file()):
        raise common.UserError(f"--event-scores {scores}: no such file")
    stage, brain = (getattr(cfg, name, "") for name in ("stage", "brain"))
    reads = {"distill": brain == "vanilla", "student": stage == "finetune"}
    for name in ("distill", "student", "expert", "generalist"):
        given = reads.get(name, True) and getattr(cfg, name, "")
        if given and not (cfg.resume or cfg.eval_only or list(Path(given).glob("**/meta.json"))):
            common.load_checkpoint(given, "")  # says what is not there, before anything is made
    loop.check(cfg)
    data.named(cfg.data)
    common.find_backbone(cfg.backbone)


def begin(cfg, dist, method, free, load_policy):
    """-> the Config; the checkpoint that --resume goes on from; the Policy of --eval-only, its
    outputs in a folder of their own. Both keep the run's settings but those in `free`, and
    --eval-only may take it to another world, seed and precision."""
    resumed, policy = None, None
    if cfg.resume and cfg.eval_only:
        words = "--resume goes on with a run, --eval-only takes it as it is: one of them"
        raise common.UserError(words)
    if cfg.resume:
        resumed = common.load_checkpoint(cfg.resume, method, dist=dist)
        cfg = resume(cfg, resumed, dist, free)
    if cfg.eval_only:
        policy = load_policy(cfg.eval_only, dist.device, cfg.robot)
        free = (*free, "world", "seed", "dtype", "ablation")
        cfg = common.resume_config(cfg, dataclasses.asdict(policy.cfg), free)
        if cfg.out == policy.cfg.out:
            cfg.out = str(Path(cfg.eval_only) / time.strftime("eval-%Y%m%d-%H%M%S"))
        policy.cfg = policy.model.cfg = cfg
        if cfg.dtype == "fp32":
            policy.model.float()  # --frozen bf16 may have stored parts of it in 16 bits
    return cfg, resumed, policy


def resume(cfg, resumed, dist, free):
    """-> the Config to go on with: the run's, and flags in `free`. Flags may repeat the --batch and
    --accumulate that the run was begun with; its own follow from the number of processes."""
    saved = resumed.meta["config"] | resumed.meta.get("begun", {})
    cfg = common.resume_config(cfg, saved, free)
    if 0 < cfg.steps < resumed.step:
        words = f"this run has trained {resumed.step}; --eval-only acts with it"
        raise common.UserError(f"--steps {cfg.steps}: {words}")
    return common.same_samples(cfg, resumed, dist)


def about(method, cfg, robots, resumed):
    """What acting and going on need to know of a run beside its weights."""
    begun = {"batch": cfg.batch, "accumulate": cfg.accumulate}
    begun = resumed.meta.get("begun", begun) if resumed else begun
    config = dataclasses.asdict(cfg)
    return {"method": method, "config": config, "begun": begun, "robots": robots}


def counted(acts, windows, model):
    """What is trained on, and how much trains, in words."""
    names = ", ".join(p.name for p in acts[:3]) + " ..." * (len(acts) > 3)
    episodes, steps = sum(len(p.episodes) for p in acts), sum(map(len, windows))
    sizes = (f"{name} {common.human(n)}" for name, n in common.param_counts(model).items())
    return f"{names}: {episodes} episodes, {steps} steps; parameters: {', '.join(sizes)}"


def first_batch(run, images, prompt, processor, marks=()):
    """Draws some samples' pictures over their words, as the model reads them. marks: {word that
    stands for another vector: how it is shown}."""
    rows = zip(images, prompt["input_ids"], prompt["real"])
    rows = [(seen, processor.words(ids[real], marks)) for seen, ids, real in rows]
    pictures.contact_sheet(run.folder / "first_batch.png", rows)


def seen(observations, instructions, cfg, robot, stats):
    """What a policy sees of its worlds -> samples, for the script's `sense()`."""
    return [
        {
            "images": data.scaled(o["images"].values(), (cfg.size, cfg.wrist_size)),
            "instruction": words,
            "robot": robot,
            "state": data.normalise(o["state"], stats["state"]),
        }
        for o, words in zip(observations, instructions)
    ]


def facts(method, cfg, arm, steps, processes, seconds):
    """What a result says of its run: which it was, and how much it has learned from."""
    return {
        "method": method, "arm": cfg.ablation or arm, "backbone": cfg.backbone,
        "world": cfg.world, "seed": cfg.seed, "steps": steps,
        "samples": steps * cfg.accumulate * cfg.batch * processes,
        "train_seconds": round(seconds, 1),
    }  # fmt: skip


# --- a chain of stages ----------------------------------------------------------------------------


def chain_of(folder):
    """A chain's folder, or a stage's in it -> the chain's; else None."""
    folder = Path(folder)
    if (folder / "chain.json").exists():
        return folder
    file = folder.parent / "chain.json"
    known = file.exists() and common.read_json(file, "stages")["stages"]
    return folder.parent if known and folder.name in known else None


KEPT = ("metrics.jsonl", "result.json", "*/metrics.jsonl", "*/result.json")  # what a run has done


def begin_chain(cfg, dist, method, free, check):
    """A new chain's folder, or --resume's with its own flags -> Config, the folder. A stage that
    was stopped before its first checkpoint will begin again."""
    new = time.strftime(f"runs/{method}-{cfg.seed}-%Y%m%d-%H%M%S")
    out = chain_of(cfg.resume) if cfg.resume else Path(cfg.out or new)
    if not out:
        raise common.UserError(f"--resume {cfg.resume}: no run of {method} in this folder")
    out = Path(dist.share(str(out)))
    if cfg.resume:
        saved = common.read_json(out / "chain.json", "method", "config")
        if saved["method"] != method:
            raise common.UserError(f"{out} is a chain of {saved['method']}, not of {method}")
        cfg = common.resume_config(cfg, saved["config"], free)
        check(cfg)
        for log in out.glob("*/metrics.jsonl") if dist.main else ():
            if standing(log.parent) == "new":
                log.unlink()
    elif dist.share(any(f.stat().st_size for name in KEPT for f in out.glob(name))):
        raise common.UserError(f"{out} holds a run: --resume {out}, or another --out")
    return cfg, out


def note_chain(cfg, dist, method, stages, out):
    """Writes down how a chain was started last, and its stages."""
    if dist.main:
        out.mkdir(parents=True, exist_ok=True)
        about = {"method": method, "stages": stages, "config": dataclasses.asdict(cfg)}
        common.write_json(out / "chain.json", about | common.start_facts(dist))


def folders(cfg, method, order, out):
    """-> {stage: its folder}: in `out`, or where the flag of its name has it."""
    found = {stage: out / stage for stage in order}
    for name in order[:-1]:
        if given := getattr(cfg, name):
            inner = Path(given, name)
            found[name] = inner if inner.exists() else Path(given)
            theirs = common.load_checkpoint(found[name], method).meta["config"]["stage"]
            if theirs != name:
                raise common.UserError(f"--{name} {given} is a run of --stage {theirs}")
    return found


def standing(folder):
    """How far a stage's folder is: done, begun (there is a checkpoint to go on from) or new."""
    if (folder / "result.json").exists():
        return "done"
    return "begun" if list(folder.glob("checkpoints/step_*/meta.json")) else "new"


def newest(folder, order):
    """A chain's folder -> that of its last stage that has a checkpoint; else the folder itself."""
    inner = [Path(folder, name) for name in order if Path(folder, name, "checkpoints").exists()]
    return inner[-1] if inner else folder


def finish(out, folders):
    """{stage: its folder} -> {stage: its result}; the chain's own is its last one's, and all."""
    files = {stage: folder / "result.json" for stage, folder in folders.items()}
    results = {stage: common.read_json(f) for stage, f in files.items() if f.exists()}
    common.write_json(out / "result.json", list(results.values())[-1] | {"stages": results})
    return results


def same_flags(name, given, theirs, cfg, flags):
    """The run given by --name, of the Config `theirs`, must have these flags as this run has."""
    for flag in flags:
        mine, its = getattr(cfg, flag), getattr(theirs, flag)
        if mine != its:
            words = "--" + flag.replace("_", "-")
            raise common.UserError(f"--{name} {given} has {words} {its}, this run {mine}")


def export(cfg, policy, vlm):
    """--export: a run's VLM as an ordinary checkpoint, its LoRA merged into its weights."""
    common.merge_lora(vlm)
    out = cfg.out or f"{cfg.export}/export"
    common.export_backbone(vlm, policy.cfg.backbone, policy.processor.tokenizer, out)


def same_units(name, given, theirs, robots, parts=20):
    """What the run given by --name reads and says lies between the bounds of its own recordings,
    `theirs`: of each of ours, one of them must have about the same, within one of so many parts of
    the range."""
    for recordings, stats in robots.items():
        ours, *others = (
            np.hstack([data.bounds(s[kind]) for kind in ("state", "action")])  # (2, S + A)
            for s in (stats, *theirs.values())
        )
        near = (ours[1] - ours[0]) / parts
        if not any(a.shape == ours.shape and (abs(a - ours) <= near).all() for a in others):
            words = f"--{name} {given} learned from {', '.join(theirs)}, whose bounds of state and"
            raise common.UserError(f"{words} action are not those of {recordings}: more --demos "
                                   "(200 or more), its --data and --seed, or train one on these")
