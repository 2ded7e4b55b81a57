"""A chain of stages, each a run in a folder of its own: begun, gone on with, or given."""

import dataclasses
import json
import time
from pathlib import Path

import common


def begin(cfg, dist, method, order, free, check):
    """A new chain's folder, or --resume's with its own flags -> Config, the folder."""
    cfg = common.resume_auto(cfg, dist, "config.json")
    new = time.strftime(f"runs/{method}-{cfg.seed}-%Y%m%d-%H%M%S")
    out = Path(cfg.resume or cfg.out or new)
    out = Path(dist.share(str(out.parent if cfg.resume and out.name in order else out)))
    if cfg.resume:
        if not (out / "config.json").exists():
            raise common.UserError(f"--resume {out}: no run in this folder")
        saved = json.loads((out / "config.json").read_text())
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
