"""Time of one training step, TwinBrainVLA beside the vanilla VLA, alternating in one process.

  python bench/step.py [--steps 20 --batch 64 --backbone tiny --random]

Prints the median of each and of the ratio of neighbours; forward, backward and optimizer, the batch
ready in memory. With a frozen left brain the arithmetic alone gives about 4/3 for the brains.
`--random`: a backbone of that size with random weights, of which only the configuration is needed.
"""

import argparse
import statistics
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np  # noqa: E402
import torch  # noqa: E402
from study import append, machine  # noqa: E402

import common  # noqa: E402
import twinbrain  # noqa: E402
from worlds import tabletop  # noqa: E402


def random_model(cfg, device):
    """The model at the backbone's true size, all weights drawn; the embedded words are enough."""
    with torch.device("meta"):
        vlm, processor = common.load_backbone(cfg.backbone)
        vision = vlm.config.vision_config
        processor.patch, processor.merge = vision.patch_size, vision.spatial_merge_size
        processor.temporal = vision.temporal_patch_size
        vlm.config.image_token_id = processor.image_token_id
        model = twinbrain.TwinBrain(cfg, vlm, processor, 8, 7)
    model = model.float().to_empty(device=device)  # as load_backbone gives it
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.dim() > 1:
                p.normal_(std=0.02)
            else:
                p.fill_(float(not name.endswith("bias")))
        for buffer in model.buffers():  # rotary frequencies
            if buffer.is_floating_point():
                buffer.uniform_()
    return model, processor


def make_stepper(cfg, dist, samples, drawn):
    """-> a function that trains one step and returns its seconds."""
    if drawn:
        model, processor = random_model(cfg, dist.device)
    else:
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
    parser.add_argument("--random", action="store_true", help="random weights of its size")
    parser.add_argument("--side", type=int, default=64, help="pixels of the pictures")
    parser.add_argument("--note", default="", help="said beside the numbers")
    args = parser.parse_args()
    cfgs = [
        twinbrain.Config(brain=b, batch=args.batch, backbone=args.backbone)
        for b in ("vanilla", "twin")
    ]
    dist, rng = common.setup(cfgs[0]), np.random.default_rng(0)
    world, samples = tabletop.Tabletop("bridge", args.side), []
    for i in range(args.batch):
        seen = world.reset(i)
        action = rng.uniform(-1, 1, (cfgs[0].horizon, 7)).astype(np.float32)
        sample = {"images": list(seen["images"].values()), "state": seen["state"]}
        sample |= {"instruction": world.instruction, "robot": "tabletop", "action": action}
        samples.append(sample | {"mask": np.ones(cfgs[0].horizon, bool)})
    vanilla, twin = (make_stepper(cfg, dist, samples, args.random) for cfg in cfgs)
    times = [(vanilla(i), twin(i)) for i in range(args.steps + 3)][3:]
    ratio = statistics.median(b / a for a, b in times)
    for name, column in zip(("vanilla", "twin"), zip(*times)):
        middle = statistics.median(column)
        row = {"brain": name, "ms": round(1000 * middle, 1), "backbone": args.backbone}
        append("step", row | {"batch": args.batch, "random": args.random, "note": args.note})
        print(f"{name:8} {1000 * middle:7.1f} ms a step, {args.batch / middle:6.0f} samples/s")
    print(f"twin / vanilla {ratio:.2f}; {args.backbone}, batch {args.batch}, {machine()}")


if __name__ == "__main__":
    common.run_main(main)
