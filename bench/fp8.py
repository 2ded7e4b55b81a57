"""A frozen left brain in 8 bits: what becomes of its answers and keys, and whether it is faster.

  python bench/fp8.py [--questions 1000] [the script's own flags: --backbone Qwen3-VL-4B ...]
  python bench/fp8.py --random --preset paper      # of its published size, for the time alone

The rows of each matrix in its language model, and what each token brings to it, are rounded to
float8 (e4m3: 4 bits of exponent, 3 of mantissa), a scale for each; products add up in wider
numbers. From Hopper on a GPU multiplies them as they are, `torch._scaled_mm`; elsewhere the same
numbers meet in bfloat16, which holds each of them, so answers can be asked on any machine, and
times compared on such a GPU alone. "Weights" rounds the matrices and nothing else.
"""

import argparse
import copy
import statistics
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import methods  # noqa: E402
import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from study import append, machine  # noqa: E402
from torch import nn  # noqa: E402
from transformers import DynamicCache  # noqa: E402

import common  # noqa: E402
import data  # noqa: E402
import twinbrain  # noqa: E402
from parts.scale import swap  # noqa: E402

CUDA = methods.DEVICE.type == "cuda"
NATIVE = CUDA and torch.cuda.get_device_capability() >= (8, 9)
LARGEST = torch.finfo(torch.float8_e4m3fn).max  # 448


def rounded(x):
    """x (..., n) -> float8 (..., n), scales (..., 1): x is about their product."""
    scale = x.abs().amax(-1, keepdim=True).float().clamp(min=1e-12) / LARGEST
    return (x.float() / scale).to(torch.float8_e4m3fn), scale


fast_rounded = torch.compile(rounded, dynamic=True) if NATIVE else rounded


class Float8(nn.Module):
    """A frozen matrix in float8, for passes without a gradient."""

    def __init__(self, linear, states=True):
        super().__init__()
        self.weight, self.scale = rounded(linear.weight.detach())  # (m, n), (m, 1)
        self.bias, self.states = linear.bias, states

    def forward(self, x):
        if not self.states:
            return F.linear(x, (self.weight.float() * self.scale).to(x.dtype), self.bias)
        x8, scale = fast_rounded(x.flatten(0, -2))
        if NATIVE:
            y = torch._scaled_mm(x8, self.weight.T, scale, self.scale.T, out_dtype=torch.bfloat16)
        else:
            y = (x8.bfloat16() @ self.weight.bfloat16().T).float() * scale * self.scale.T
        y = y.unflatten(0, x.shape[:-1]).to(torch.bfloat16)
        return y if self.bias is None else y + self.bias.to(y.dtype)


def in_8_bits(language, states=True):
    """Each matrix of a language model's layers becomes a Float8."""
    swap(language.layers, nn.Linear, lambda matrix: Float8(matrix, states))


FORMS = {  # what a language model becomes
    "bfloat16": lambda language: None,
    "weights": partial(in_8_bits, states=False),
    "weights and states": in_8_bits,
}


class Left:
    """A brain by itself over one batch of prompts: the pass whose keys the right brain reads."""

    def __init__(self, cfg, random):
        model, self.processor = methods.build("twinbrain", replace(cfg, brain="vanilla"), random)
        self.model, self.cfg = model.requires_grad_(False).eval(), cfg
        common.store_frozen(model, cfg, methods.DEVICE)  # built, it was to train
        self.vlm = model.right
        self.language = self.vlm.model.language_model  # as loaded; copies of it are changed
        self.batch = common.to_device(methods.batches("twinbrain", cfg, self.processor)[0],
                                      methods.DEVICE)  # fmt: skip
        with torch.no_grad(), common.autocast(methods.DEVICE, cfg.dtype):
            self.seen = common.see(self.vlm.model, self.batch)

    def take(self, form):
        self.vlm.model.language_model = changed = copy.deepcopy(self.language)
        FORMS[form](changed)

    @torch.no_grad()
    def read(self):
        """-> [(keys, values)] by layer, (B, heads, T, d) each."""
        prompt, cache = self.batch["left"], DynamicCache()
        with common.autocast(methods.DEVICE, self.cfg.dtype):
            x, mask = twinbrain.embed(self.vlm, prompt), common.causal_mask(prompt["real"])
            common.read(self.vlm.model.language_model, x, prompt, mask, self.seen, cache)
        return [(layer.keys, layer.values) for layer in cache.layers]

    def answers(self, count):
        """-> {kind: share right}, which of all the questions are."""
        told = []

        @torch.no_grad()
        def right(asked):
            told.append(self.model.answer(self.vlm, asked)[1])
            return told[-1]

        stats = {"tabletop": data.statistics(methods.demonstrations(self.cfg, 1))}
        policy = twinbrain.Policy(self.model, self.cfg, self.processor, stats, methods.DEVICE)
        sides = self.cfg.size, self.cfg.wrist_size
        sets = data.question_sets(common.ABILITIES, count, *sides)
        shares = common.abilities(right, sets, policy, twinbrain.SYSTEM_L)
        return {name: round(share, 4) for name, share in shares.items()}, torch.cat(told)

    def seconds(self, repeats):
        """Of one pass, the median."""
        clock, times = methods.Clock(), []
        for _ in range(repeats + 2):
            clock.mark("pass")
            self.read()
            times.append(clock.read()["pass"])
        return statistics.median(times[2:])


def apart(keys, others):
    """Relative distance of keys and values, the mean over layers."""
    parts = [(a.float() - b.float()).norm() / b.float().norm()
             for layer, other in zip(keys, others) for a, b in zip(layer, other)]  # fmt: skip
    return float(torch.stack(parts).mean())


def arguments(words):
    """-> this script's own, the Config of twinbrain.py."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--questions", type=int, default=1000, help="of each of four kinds")
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--random", action="store_true", help="random weights of its size")
    parser.add_argument("--note", default="", help="said beside the numbers")
    args, flags = parser.parse_known_args(words)
    cfg = methods.config("twinbrain", flags)
    return args, replace(cfg, dtype="bf16", frozen="bf16", lora=0)


def main():
    args, cfg = arguments(sys.argv[1:])
    left, rows, first = Left(cfg, args.random), {}, {}
    for form in FORMS:
        left.take(form)
        keys = left.read()
        row = rows[form] = {"form": form}
        row["keys"] = round(apart(keys, first.setdefault("keys", keys)), 5)
        if not args.random:
            row["answers"], told = left.answers(args.questions)
            changed = (told != first.setdefault("answers", told)).sum()
            row |= {"asked": len(told), "changed": int(changed)}
        if NATIVE and form != "weights":
            row["ms"] = round(1000 * left.seconds(args.repeats), 2)
            row["of_bfloat16"] = round(row["ms"] / rows["bfloat16"]["ms"], 3)
    for row in rows.values():
        asked = f"{row['changed']} of {row['asked']} answers changed" if "asked" in row else ""
        words = ", ".join(f"{name} {share:.1%}" for name, share in row.get("answers", {}).items())
        time = f"{row['ms']:.1f} ms ({row['of_bfloat16']:.2f})" if "ms" in row else ""
        parts = [f"keys and values off by {row['keys']:.2%}", asked, words, time]
        print(f"{row['form']:20}" + "; ".join(part for part in parts if part))
        append("fp8", row | {"backbone": cfg.backbone, "batch": cfg.batch, "note": args.note})
    print(f"{cfg.backbone}, batch {cfg.batch}; {machine()}; {args.note}")


if __name__ == "__main__":
    common.run_main(main)
