"""Fused linear losses beside the plain form and Liger-Kernel: peak memory and time of a step.

  python bench/losses.py [--tokens 4096 --vocabulary 151936 --width 2560 --repeats 10]

Forward and backward of cross-entropy and of the KL to a teacher, from hidden states; the head
trained or frozen; bfloat16 on a GPU, float32 on a CPU (there with a vocabulary of 16,384 and a
width of 128: the plain form needs 20 GB at full size). "peak" is what exists beyond the inputs at
the worst moment, "work" the same without the gradients that any form returns. All forms take turns;
each is held against the plain one first. Liger-Kernel wants `pip install liger-kernel` and a GPU.
"""

import argparse
import ctypes
import importlib.util
import statistics
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from study import append, machine  # noqa: E402

import common  # noqa: E402

CUDA = torch.cuda.is_available()
T = 2.0  # temperature of the KL


def plain_cross_entropy(x):
    return F.cross_entropy((x["h"] @ x["head"].T).float(), x["words"])


def fused_cross_entropy(x):
    return common.linear_cross_entropy(x["h"], x["head"], x["words"])[0]


def liger_cross_entropy(x):
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

    return LigerFusedLinearCrossEntropyLoss()(x["head"], x["h"], x["words"])


def plain_kl(x):
    log_q = ((x["h"] @ x["head"].T).float() / T).log_softmax(-1)
    with torch.no_grad():
        log_p = ((x["h_teacher"] @ x["head_teacher"].T).float() / T).log_softmax(-1)
    return F.kl_div(log_q, log_p, log_target=True, reduction="batchmean")


def fused_kl(x):
    return common.linear_kl(x["h"], x["head"], x["h_teacher"], x["head_teacher"], T)


def liger_kl(x):
    from liger_kernel.transformers import LigerFusedLinearJSD

    loss = LigerFusedLinearJSD(jsd_beta=0.0, temperature=T)
    return loss(x["h"], x["head"], x["h_teacher"], x["head_teacher"], None)


FORMS = {
    "cross-entropy": {
        "plain": plain_cross_entropy, "ours": fused_cross_entropy, "liger": liger_cross_entropy,
    },
    "kl": {"plain": plain_kl, "ours": fused_kl, "liger": liger_kl},
}  # fmt: skip


def make(args, trained):
    device, dtype = ("cuda", torch.bfloat16) if CUDA else ("cpu", torch.float32)
    torch.manual_seed(0)
    n, V, D = args.tokens, args.vocabulary, args.width
    x = {name: torch.randn(n, D, device=device, dtype=dtype) for name in ("h", "h_teacher")}
    for name in ("head", "head_teacher"):
        x[name] = torch.randn(V, D, device=device, dtype=dtype) * D**-0.5
    x["words"] = torch.randint(V, (n,), device=device)
    x["h"].requires_grad_(), x["head"].requires_grad_(trained)
    return x


def step(form, x):
    """-> loss and the seconds of forward and backward; gradients stay in x."""
    x["h"].grad = x["head"].grad = None
    if CUDA:
        torch.cuda.synchronize()
    began = time.perf_counter()
    loss = form(x)
    loss.backward()
    if CUDA:
        torch.cuda.synchronize()
    return loss.detach(), time.perf_counter() - began


def peak(args, kind, name, trained):
    """Bytes beyond the inputs at the worst moment of a step."""
    x = make(args, trained)
    step(FORMS[kind][name], x)  # what is set up once is not counted
    x["h"].grad = x["head"].grad = None
    if CUDA:
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step(FORMS[kind][name], x)
        return torch.cuda.max_memory_allocated() - before
    ctypes.CDLL(None).malloc_trim(0)  # what was freed goes back to the system
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark falls to what is held now
    before = held("VmRSS")
    step(FORMS[kind][name], x)
    return held("VmHWM") - before


def held(field):
    """Bytes of this process, from the kernel."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(field))


def forms(kind):
    found = dict(FORMS[kind])
    if not CUDA or importlib.util.find_spec("liger_kernel") is None:
        reason = "there is no GPU" if not CUDA else "pip install liger-kernel"
        print(f"liger, {kind}: skipped, {reason}")
        del found["liger"]
    return found


def compare(args, kind, trained):
    """Prints and keeps a row for each form -> whether ours is among them."""
    found, x = forms(kind), make(args, trained)
    wanted, _ = step(found["plain"], x)
    leaves = [p for p in (x["h"], x["head"]) if p.requires_grad]
    grads = [p.grad.float() for p in leaves]
    for name, form in list(found.items()):
        try:
            loss, _ = step(form, x)
            apart = [(p.grad.float() - g).norm() / g.norm() for p, g in zip(leaves, grads)]
            apart = max(abs(loss / wanted - 1), *apart)
            if not apart < 0.03:
                raise ValueError(f"{apart:.3f} away from the plain form")
        except Exception as error:  # one that does not run here must not end the others
            print(f"{name}, {kind}: skipped, {str(error).splitlines()[0][:90]}")
            del found[name]
    times = [[step(form, x)[1] for form in found.values()] for _ in range(args.repeats + 1)][1:]
    returned = sum(p.nbytes for p in leaves)
    del leaves, grads
    x.clear()
    peaks = {name: peak(args, kind, name, trained) for name in found}
    for name, column in zip(found, zip(*times)):
        row = {"loss": kind, "head": "trained" if trained else "frozen", "form": name}
        row |= {"ms": round(1000 * statistics.median(column), 2), "peak_mb": peaks[name] >> 20}
        row["time_of_plain"] = round(
            statistics.median(c[list(found).index(name)] / c[0] for c in times), 3
        )
        row["plain_peak_over_it"] = round(peaks["plain"] / peaks[name], 2)
        row["work_mb"] = max(peaks[name] - returned, 0) >> 20
        print("{loss:14} {head:8} {form:6} {ms:10.1f} ms {time_of_plain:6.2f} of plain  "
              "{peak_mb:7} MB peak, plain has {plain_peak_over_it:5.1f} x  "
              "{work_mb:7} MB work".format(**row))  # fmt: skip
        sizes = {"tokens": args.tokens, "vocabulary": args.vocabulary, "width": args.width}
        append("losses", row | sizes | {"note": args.note})
    return "ours" in found


def arguments(words):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--vocabulary", type=int, default=151936 if CUDA else 16384)
    parser.add_argument("--width", type=int, default=2560 if CUDA else 128)
    parser.add_argument("--repeats", type=int, default=10 if CUDA else 3)
    parser.add_argument("--note", default="", help="said beside the numbers")
    return parser.parse_args(words)


def main():
    args, stood = arguments(sys.argv[1:]), []
    for kind in FORMS:
        for trained in (True, False):
            try:
                stood.append(compare(args, kind, trained))
            except torch.OutOfMemoryError:  # of the plain form, without which nothing is compared
                print(f"{kind}, head {'trained' if trained else 'frozen'}: out of memory")
    print(f"{args.tokens} tokens, vocabulary {args.vocabulary}, width {args.width}; {machine()}; "
          f"torch {torch.__version__}; {args.note}")  # fmt: skip
    if not all(stood):
        raise common.UserError("our form failed, see above")


if __name__ == "__main__":
    common.run_main(main)
