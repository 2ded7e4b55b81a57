"""What weights, gradients and optimizer state take by backbone: computed, nothing is loaded or run.

  python bench/memory.py                          # every backbone, into bench/results/memory.jsonl
  python bench/memory.py Qwen3-VL-4B              # one

The sums of the memory table that precedes a run's first step, for models without weights, at the
papers' settings (--preset; of `tiny` the laptop's), with one process, in float32 unless a column
says otherwise. Activations come on top.
"""

import argparse
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import common  # noqa: E402
import dualvla  # noqa: E402
import twinbrain  # noqa: E402
import vita_vla  # noqa: E402
from bench import study  # noqa: E402

SPARING = "--lora 32 --frozen bf16"
KINDS = {  # column -> script, flags
    "vanilla VLA": (twinbrain, "--brain vanilla"),
    "TwinBrainVLA": (twinbrain, ""),
    f"twin, `{SPARING}`": (twinbrain, SPARING),
    "VITA-VLA, stage 2": (vita_vla, "--stage finetune"),
    "DualVLA (LoRA)": (dualvla, "--stage dual"),
}


def needs(script, flags, backbone):
    """-> bytes of one process that trains this model."""
    preset = [] if backbone == "tiny" else ["--preset", next(iter(script.PRESETS))]
    words = [*preset, "--frozen", "fp32", "--shard", "none", "--backbone", backbone, *flags.split()]
    cfg = common.parse(script.Config, script.PRESETS, script.ABLATIONS, words)
    with torch.device("meta"):
        model = script.build(cfg, *(() if script is vita_vla else (8, 7)))[0]
    if cfg.frozen == "bf16":
        for p in model.parameters():
            p.data = p.data if p.requires_grad else p.data.bfloat16()
    return sum(map(sum, common.memory_rows(model, cfg).values()))


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("backbones", nargs="*", metavar="BACKBONE", help="empty: all")
    for name in parser.parse_args().backbones or common.BACKBONES:
        load = common.load_vlm if name == "VITA-1.5" else common.load_backbone
        with torch.device("meta"):
            row = {"backbone": name, "parameters": common.param_counts(load(name)[0])["total"]}
        row["bytes"] = {
            kind: needs(script, flags, name)
            for kind, (script, flags) in KINDS.items()
            if name != "VITA-1.5" or script is vita_vla
        }
        study.append("memory", row)
        sizes = ", ".join(f"{kind} {common.size(n)}" for kind, n in row["bytes"].items())
        print(f"{name}, {common.human(row['parameters'])}: {sizes}")


if __name__ == "__main__":
    common.run_main(main)
