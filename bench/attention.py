"""Milliseconds of AsyMoT's attention, forward and backward: our kernel beside what PyTorch offers.

  python bench/attention.py [--left 1024 --right 1024 --batch 8 --repeats 20 --dtype bfloat16]

Queries of the right brain over frozen left keys and their own, causally (Eq. 6), with the grouped
heads of Qwen3-VL-4B in bfloat16 (32 over 8, width 128); on a CPU those and the tokens of the tiny
backbone (4 over 2, width 32), in float32 and bfloat16. Two batches: prompts of one length, and
ragged ones, padded on the left by up to an eighth. Candidates: SDPA with a dense mask, its groups'
keys repeated or not, as not all of its kernels know groups; SDPA with `causal_lower_right` (one
length only); FlexAttention (a GPU only); written out (a CPU only); and the kernel of `--attention
kernel` (a GPU only). All take turns in one process; each is held against the dense mask first. The
scripts use the library unless what they have beside it is faster, the kernel at least 1.3 times.
"""

import argparse
import itertools
import statistics
import sys
import time
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch  # noqa: E402
from study import append, machine  # noqa: E402
from torch.nn.attention.bias import causal_lower_right  # noqa: E402
from torch.nn.attention.flex_attention import create_block_mask, flex_attention  # noqa: E402
from torch.nn.functional import scaled_dot_product_attention  # noqa: E402

import common  # noqa: E402
import twinbrain  # noqa: E402
from parts import kernels  # noqa: E402

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def candidates(case, device):
    """-> {name: function of q, k, v}; what cannot run here is left out with its reason."""
    mask, scale, (first_L, first_R) = case["mask"], case["scale"], case["first"]
    T_L, T_R = case["sizes"]

    def dense(q, k, v):
        return scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale, enable_gqa=True)

    def lower_right(q, k, v):
        bias = causal_lower_right(T_R, T_L + T_R)
        return scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=scale, enable_gqa=True)

    def repeated(attend, q, k, v):
        k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
        return attend(q, k, v, mask, scale=scale)

    def kernel(q, k, v):
        return common.joint_attention(q, k, v, first_L, first_R, scale)

    def sees(b, h, m, j):
        left = (j < T_L) & (j >= first_L[b]) & (m >= first_R[b])
        right = (j - T_L <= m) & (j - T_L >= first_R[b])
        return left | right | (j - T_L == m)

    found = {"SDPA, dense mask": dense}
    found["SDPA, dense mask, keys repeated"] = partial(repeated, scaled_dot_product_attention)
    if device == "cpu":
        found["written out"] = partial(repeated, kernels.written_out)
    if not case["ragged"]:
        found["SDPA, causal_lower_right"] = lower_right
    if device == "cuda":
        blocks = create_block_mask(sees, len(first_L), None, T_R, T_L + T_R, device=device)
        flex = torch.compile(flex_attention)
        found["FlexAttention"] = lambda q, k, v: flex(
            q, k, v, block_mask=blocks, scale=scale, enable_gqa=True
        )
        if common.has_triton():
            found["kernel"] = kernel
        else:
            print("kernel: skipped, triton is not installed")
    else:
        print("FlexAttention, kernel: skipped, they need a GPU (no backward pass on a CPU)")
    return found


def make(ragged, args, device, dtype):
    """Inputs as the twin has them: left keys without gradient, a mask from the real tokens."""
    torch.manual_seed(0)
    B, T_L, T_R, D = args.batch, args.left, args.right, args.width
    first = torch.zeros(2, B, dtype=torch.int32, device=device)
    if ragged:
        first = (torch.rand(2, B, device=device) * args.right / 8).int()
    real_L, real_R = (
        torch.arange(T, device=device) >= f[:, None] for T, f in zip((T_L, T_R), first)
    )
    q, k_R, v_R = (torch.randn(B, h, T_R, D, device=device, dtype=dtype, requires_grad=True)
                   for h in (args.heads, args.kv_heads, args.kv_heads))  # fmt: skip
    k_L, v_L = (torch.randn(B, args.kv_heads, T_L, D, device=device, dtype=dtype) for _ in "kv")
    return {"ragged": ragged, "mask": twinbrain.joint_mask(real_L, real_R, "all"), "first": first,
            "sizes": (T_L, T_R), "scale": D**-0.5, "leaves": (q, k_R, v_R), "left": (k_L, v_L),
            "slope": torch.randn_like(q)}  # fmt: skip


def step(attend, case):
    """Forward and backward as in a training step -> y, gradients of q, k_R, v_R."""
    (q, k_R, v_R), (k_L, v_L) = case["leaves"], case["left"]
    k, v = torch.cat([k_L, k_R], 2), torch.cat([v_L, v_R], 2)
    y = attend(q, k, v)
    return y, *torch.autograd.grad(y, (q, k_R, v_R), case["slope"])


def seconds(attend, case):
    if case["slope"].is_cuda:
        torch.cuda.synchronize()
    began = time.perf_counter()
    step(attend, case)
    if case["slope"].is_cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - began


def measure(case, args, device):
    """-> {name: medians in ms}, after each was held against the dense mask."""
    found, exact = candidates(case, device), None
    for name, attend in list(found.items()):
        try:
            out = [x.float() for x in step(attend, case)]
            exact = exact or out
            apart = max((a - b).norm() / b.norm() for a, b in zip(out, exact))
            if not apart < 0.03:
                raise ValueError(f"{apart:.3f} away from the dense mask")
        except Exception as error:  # a candidate that does not run here must not end the others
            print(f"{name}: skipped, {str(error).splitlines()[0][:90]}")
            del found[name]
    times = [[seconds(attend, case) for attend in found.values()] for _ in range(args.repeats + 3)]
    return {name: 1000 * statistics.median(column) for name, column in zip(found, zip(*times[3:]))}


def arguments(words):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    names = "left", "right", "batch", "heads", "kv-heads", "width"
    usual = (1024, 1024, 8, 32, 8, 128) if DEVICE == "cuda" else (88, 112, 32, 4, 2, 32)
    for name, value in zip((*names, "repeats"), (*usual, 20)):
        parser.add_argument(f"--{name}", type=int, default=value)
    both = ["float32", "bfloat16"]
    asked = both[1:] if DEVICE == "cuda" else both
    parser.add_argument("--dtype", choices=both, nargs="+", default=asked)
    parser.add_argument("--note", default="", help="said beside the numbers")
    return parser.parse_args(words)


def main():
    args = arguments(sys.argv[1:])
    for dtype, ragged in itertools.product(args.dtype, (False, True)):
        found = measure(make(ragged, args, DEVICE, getattr(torch, dtype)), args, DEVICE)
        best = min((ms, name) for name, ms in found.items() if name != "kernel")
        kind = "ragged prompts" if ragged else "prompts of one length"
        print(f"{kind}: {args.left} + {args.right} tokens, batch {args.batch}, {dtype}")
        for name, ms in found.items():
            print(f"  {name:32} {ms:9.2f} ms   {best[0] / ms:5.2f} of the best other's speed")
            sizes = {"left": args.left, "right": args.right, "batch": args.batch, "ragged": ragged}
            row = {"candidate": name, "ms": round(ms, 3), "of_best": round(ms / best[0], 3)}
            append("attention", row | {"note": args.note, "dtype": dtype} | sizes)
        if "kernel" in found:
            wins = best[0] >= 1.3 * found["kernel"]
            print(f"  keep {'the kernel' if wins else best[1]}")
    print(f"{machine()}; torch {torch.__version__}; {args.note}")


if __name__ == "__main__":
    common.run_main(main)
