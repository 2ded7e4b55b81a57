"""What bfloat16 does to a step of a trained twinbrain.py run: its gradients and Muon's updates.

  python bench/rounding.py RUN [--batches 6]

Of each matrix that trains: the cosine of its gradient with products in bfloat16 and in float32, on
the same batches, and of Muon's update of its momentum with Newton-Schulz steps in either. RUN is a
run folder with its checkpoint.
"""

import argparse
import statistics
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402

import common  # noqa: E402
import data  # noqa: E402
import twinbrain  # noqa: E402
from bench import study  # noqa: E402
from parts import process  # noqa: E402


def gradients(model, cfg, batch, noise, dtype):
    """One batch -> {name of a matrix that trains: its gradient}."""
    model.zero_grad(set_to_none=True)
    with common.autocast(batch["state"].device, dtype):
        loss = twinbrain.total_loss(model(batch, noise), cfg)
    loss.backward()
    named = model.named_parameters()
    return {name: p.grad for name, p in named if p.grad is not None and p.dim() == 2}


def updates(opt):
    """{id of a matrix: (its update in bfloat16, in float32)}; a tall one lies on its side."""
    found, group = {}, opt.param_groups[0]
    for p in (p for group in opt.param_groups for p in group["params"]):
        momentum = opt.state[p]["momentum_buffer"]
        momentum = (momentum if momentum.shape[0] <= momentum.shape[1] else momentum.T)[None]
        half, full = momentum.bfloat16(), momentum.float()
        found[id(p)] = [process.orthogonal(x, group).float() for x in (half, full)]
    return found


def cosine(a, b):
    return torch.cosine_similarity(a.flatten(), b.flatten(), dim=0).item()


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", help="run folder of twinbrain.py")
    parser.add_argument("--batches", type=int, default=6)
    args = parser.parse_args()
    dist = common.Dist(0, 1, torch.device("cpu"))
    checkpoint = common.load_checkpoint(args.run, "twinbrain", dist=dist)
    cfg = common.resume_config(twinbrain.Config(), checkpoint.meta["config"])
    acts, _ = data.recordings(cfg, dist, checkpoint)
    model, processor = twinbrain.build(cfg, *data.dims(checkpoint.meta["robots"]), checkpoint)
    how = cfg.horizon, cfg.augment, (cfg.size, cfg.wrist_size)
    windows = [data.Windows(p.episodes, p.stats, *how, data.robot_name(p.name)) for p in acts]
    mixture = data.Mixture(windows, [p.weight for p in acts], cfg.seed)
    opts = twinbrain.make_optimizers(model, cfg)
    common.load_optimizers(opts, checkpoint)
    cosines, step = {}, checkpoint.step
    for i in range(args.batches):
        samples = [mixture[(step + i) * cfg.batch + j] for j in range(cfg.batch)]
        batch = twinbrain.sense(samples, cfg, processor)
        noise = twinbrain.draw_noise(cfg, step + i, batch["action"].shape[-1], dist)
        half, full = (gradients(model, cfg, batch, noise, dtype) for dtype in ("bf16", "fp32"))
        for name in full:
            cosines.setdefault(name, []).append(cosine(half[name], full[name]))
    muon = [cosine(*pair) for opt in opts[1:] for pair in updates(opt).values()]
    rows = {"gradient": [statistics.mean(c) for c in cosines.values()], "Muon's update": muon}
    print(f"{'bfloat16 against float32':26} {'matrices':>8} {'median cosine':>14} {'least':>8}")
    for name, found in rows.items():
        if found:
            median, least = statistics.median(found), min(found)
            print(f"{name:26} {len(found):8} {median:14.5f} {least:8.5f}")
            study.append("rounding", {"what": name, "matrices": len(found), "brain": cfg.brain,
                                      "step": step, "median": median, "least": least})  # fmt: skip


if __name__ == "__main__":
    common.run_main(main)
