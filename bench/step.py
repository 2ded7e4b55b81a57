"""Time of one training step, TwinBrainVLA beside the vanilla VLA, alternating in one process.

  python bench/step.py [--steps 20 --batch 64 --backbone tiny]

Prints the median of each and of the ratio of neighbours; forward, backward and optimizer, the batch
ready in memory. With a frozen left brain the arithmetic alone gives about 4/3 for the brains.
"""

import argparse
import statistics
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np  # noqa: E402
import torch  # noqa: E402
from study import machine  # noqa: E402

import common  # noqa: E402
import twinbrain  # noqa: E402
from worlds import tabletop  # noqa: E402


def make_stepper(cfg, dist, samples):
    """-> a function that trains one step and returns its seconds."""
    vlm, processor = common.load_backbone(cfg.backbone)
    model = twinbrain.TwinBrain(cfg, vlm, processor, 8, 7).to(dist.device)
    opts = twinbrain.make_optimizers(model, cfg)
    batch = common.to_device(twinbrain.collate(samples, cfg, processor), dist.device)

    def step(i):
        began = time.perf_counter()
        noise = [x.to(dist.device) for x in twinbrain.draw_noise(cfg, i, 7, dist)]
        with common.autocast(dist.device, cfg.dtype):
            loss = twinbrain.total_loss(model(batch, noise), cfg)
        loss.backward()
        for opt in opts:
            opt.step()
            opt.zero_grad()
        if dist.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - began

    return step


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--backbone", default="tiny")
    args = parser.parse_args()
    cfgs = [
        twinbrain.Config(brain=b, batch=args.batch, backbone=args.backbone)
        for b in ("vanilla", "twin")
    ]
    dist, rng = common.setup(cfgs[0]), np.random.default_rng(0)
    world, samples = tabletop.Tabletop("bridge"), []
    for i in range(args.batch):
        seen = world.reset(i)
        action = rng.uniform(-1, 1, (cfgs[0].horizon, 7)).astype(np.float32)
        sample = {"images": list(seen["images"].values()), "state": seen["state"]}
        sample |= {"instruction": world.instruction, "robot": "tabletop", "action": action}
        samples.append(sample | {"mask": np.ones(cfgs[0].horizon, bool)})
    vanilla, twin = (make_stepper(cfg, dist, samples) for cfg in cfgs)
    times = [(vanilla(i), twin(i)) for i in range(args.steps + 3)][3:]
    ratio = statistics.median(b / a for a, b in times)
    for name, column in zip(("vanilla", "twin"), zip(*times)):
        middle = statistics.median(column)
        print(f"{name:8} {1000 * middle:7.1f} ms a step, {args.batch / middle:6.0f} samples/s")
    print(f"twin / vanilla {ratio:.2f}; {args.backbone}, batch {args.batch}, {machine()}")


if __name__ == "__main__":
    main()
