"""A chain of stages, each a run in a folder of its own: begun, gone on with, or given; S + A are
the numbers of a state and an action."""

import dataclasses
import time
from pathlib import Path

import numpy as np

import common
import data


def begin(cfg, dist, method, order, free, check):
    """A new chain's folder, or --resume's with its own flags -> Config, the folder."""
    cfg = common.resume_auto(cfg, dist, "config.json")
    new = time.strftime(f"runs/{method}-{cfg.seed}-%Y%m%d-%H%M%S")
    out = Path(cfg.resume or cfg.out or new)
    out = Path(dist.share(str(out.parent if cfg.resume and out.name in order else out)))
    if cfg.resume:
        if not (out / "config.json").exists():
            raise common.UserError(f"--resume {out}: no run in this folder")
        saved = common.read_json(out / "config.json", "config")
        cfg = common.resume_config(cfg, saved["config"], free)
        check(cfg)
    elif (out / "config.json").exists():
        raise common.UserError(f"{out} holds a run: --resume {out}, or another --out")
    return cfg, out


def folders(cfg, dist, method, order, out):
    """-> {stage: its folder}: in `out`, or where the flag of its name has it; writes down there how
    the chain was started."""
    found = {stage: out / stage for stage in order}
    for name in order[:-1]:
        if given := getattr(cfg, name):
            inner = Path(given, name)
            found[name] = inner if inner.exists() else Path(given)
            theirs = common.load_checkpoint(found[name], method).meta["config"]["stage"]
            if theirs != name:
                raise common.UserError(f"--{name} {given} is a run of --stage {theirs}")
    if dist.main:
        out.mkdir(parents=True, exist_ok=True)
        facts = {"method": method, "config": dataclasses.asdict(cfg), **common.start_facts(dist)}
        common.write_json(out / "config.json", facts)
    return found


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


def same_units(name, given, theirs, robots):
    """What the run given by --name reads and says lies between the bounds of its own recordings,
    `theirs`: of each of ours, one of them must have about the same, within a twentieth of the
    range."""
    for recordings, stats in robots.items():
        ours, *others = (
            np.hstack([data.bounds(s[kind]) for kind in ("state", "action")])  # (2, S + A)
            for s in (stats, *theirs.values())
        )
        near = (ours[1] - ours[0]) / 20
        if not any(a.shape == ours.shape and (abs(a - ours) <= near).all() for a in others):
            words = f"--{name} {given} learned from {', '.join(theirs)}, whose bounds of state and"
            raise common.UserError(f"{words} action are not those of {recordings}: train one on "
                                   f"it, --stage {name}")  # fmt: skip
