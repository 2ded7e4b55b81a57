"""Where the time of a training step goes, and what the step costs beside what one would use else.

  python bench/step.py [--steps 20] [--random] [the script's own flags: --batch 64 --backbone ...]
  python bench/step.py --method vita_vla --stage align      # or finetune, teacher
  python bench/step.py --method dualvla --stage dual        # or expert, generalist

A step is what the loop does: losses, backward, clipping, optimizer; the batch lies in memory ready,
and what a loader's worker spends on one is said below the table. Medians of `--steps` steps, after
some for warming up; the variants take turns on the same weights and batch, and ratios are medians
of neighbours. `--random`: a backbone of its published size with random weights, of which nothing is
needed; where the GPU is too small, methods.SMALLER says what is tried. "of_peak" counts all that is
computed, with --grad-checkpoint some of it twice.

TwinBrainVLA's variants: the vanilla VLA (the right brain alone; with a frozen left brain the
arithmetic alone makes it 4/3), and the public lockstep form: both brains walked layer by layer
together, eager attention with one dense mask over left and right, DeepStack dropped, vocabulary
logits made and thrown away, the head's conditions repeated for each noise draw. Its vision tower,
mask's rule, head and optimizer are ours, so the ratio is that of the form alone.
"""

import argparse
import signal
import statistics
import sys
import warnings
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import methods  # noqa: E402
import torch  # noqa: E402
from study import append, machine  # noqa: E402
from torch.utils.flop_counter import FlopCounterMode  # noqa: E402
from transformers.models.qwen3_vl.modeling_qwen3_vl import apply_rotary_pos_emb  # noqa: E402

import common  # noqa: E402
import dualvla  # noqa: E402
import twinbrain  # noqa: E402

CUDA = methods.DEVICE.type == "cuda"
PEAKS = {"H100": 989.0, "H200": 989.0, "A100": 312.0}  # TFLOP/s, dense bfloat16, of SXM cards


# --- the public form ------------------------------------------------------------------------------


def eager(q, k, v, mask):
    """softmax(q k^T / sqrt(d) + mask) v with grouped heads, the softmax in float32."""
    groups = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(groups, dim=1), v.repeat_interleave(groups, dim=1)
    scores = q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5 + mask
    return scores.softmax(-1, dtype=torch.float32).to(v.dtype) @ v


def dense(sees):
    """(B, 1, T, T') True where a query looks -> 0 there, the lowest number elsewhere; in the dtype
    of products."""
    kind, dtype = sees.device.type, torch.float32
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else dtype
    mask = torch.zeros(sees.shape, device=sees.device, dtype=dtype)
    return mask.masked_fill(~sees, torch.finfo(dtype).min)


def enter(vlm, prompt, batch, *state):
    """-> the embedded prompt with the last layer's picture features alone, its cos and sin."""
    x = twinbrain.embed(vlm, prompt, *state)
    x = common.put(x, prompt["pictures"], common.see(vlm.model, batch)[0])
    return x, vlm.model.language_model.rotary_emb(x, prompt["position_ids"])


def project(layer, x, turn):
    """-> q, k, v (B, heads, T, d) of a layer, q and k turned by their positions."""
    x, a = layer.input_layernorm(x), layer.self_attn
    q, k, v = (f(x).unflatten(-1, (-1, a.head_dim)) for f in (a.q_proj, a.k_proj, a.v_proj))
    q, k, v = (z.transpose(1, 2) for z in (a.q_norm(q), a.k_norm(k), v))
    return *apply_rotary_pos_emb(q, k, *turn), v


def leave(layer, x, y):
    """Attention's y and the MLP added to x."""
    x = x + layer.self_attn.o_proj(y.transpose(1, 2).flatten(2))
    return x + layer.mlp(layer.post_attention_layernorm(x))


def walk(model, batch):
    """Both brains, layer by layer together -> H_R (B, T, D)."""
    left, right = batch["left"], batch["right"]
    with torch.no_grad():
        x_L, turn_L = enter(model.left, left, batch)
    state = model.phi(batch["state"]) if model.cfg.state else None
    x_R, turn_R = enter(model.right, right, batch, state, model.processor.pad_token_id)
    mask_L = dense(common.causal_mask(left["real"]))
    mask_R = dense(twinbrain.joint_mask(left["real"], right["real"], "all"))
    texts = (vlm.model.language_model for vlm in (model.left, model.right))
    for layer_L, layer_R in zip(*(text.layers for text in texts)):
        with torch.no_grad():
            q, k_L, v_L = project(layer_L, x_L, turn_L)
            x_L = leave(layer_L, x_L, eager(q, k_L, v_L, mask_L))
        q, k_R, v_R = project(layer_R, x_R, turn_R)
        k, v = torch.cat([k_L, k_R], dim=2), torch.cat([v_L, v_R], dim=2)
        x_R = leave(layer_R, x_R, eager(q, k, v, mask_R))
    return model.right.model.language_model.norm(x_R)


def lockstep(model, batch, noise):
    """TwinBrainVLA's losses in the public form."""
    h_R, R, (a_0, t) = walk(model, batch), model.cfg.repeats, noise
    model.right.lm_head(h_R)  # (B, T, V), which nobody reads
    given = h_R, batch["right"]["real"], batch["action"], batch["mask"]
    h_R, real, a_1, mask = (z.repeat_interleave(R, dim=0) for z in given)
    keys = model.expert.keys([h_R] * ((model.cfg.depth + 1) // 2), real)
    a_0, t = a_0.flatten(0, 1)[:, None], t.flatten(0, 1)[:, None]  # each draw a sample
    return {"action": twinbrain.flow_loss(model.expert, keys, a_1, mask, a_0, t)}


# --- a step ---------------------------------------------------------------------------------------


class Stepper:
    """One method's model, optimizer and batch; `variants` name what may be asked of `step`."""

    def __init__(self, method, cfg, random, busy=False):
        self.method, self.script, self.cfg = method, methods.SCRIPTS[method], cfg
        self.dist, self.clock, self.turn = common.setup(cfg), methods.Clock(busy), 0
        model, processor, self.teachers = methods.build_all(method, cfg, random)
        self.model = common.place(model, cfg, self.dist, print).train()
        self.opts = self.script.make_optimizers(self.model, cfg)
        self.parameters = [p for p in self.model.parameters() if p.requires_grad]
        self.batches = methods.batches(method, cfg, processor)
        self.batch = common.to_device(self.batches[0], self.dist.device)
        methods.watch(method, self.model, self.clock)
        self.variants, self.left = [getattr(cfg, "stage", "")], None
        if method == "twinbrain":
            self.variants, self.left = ["vanilla", "twin"], self.model.left
            if self.left.config.model_type == "qwen3_vl":
                self.variants.append("lockstep")
                self.clock.watch(sys.modules[__name__], "walk", "both languages")
                self.clock.watch(self.model.right.lm_head, "forward", "vocabulary logits")
        if method == "dualvla" and self.teachers:
            self.clock.watch(self.teachers[0], "see", "vision")  # the tower is everybody's

    def losses(self, variant):
        batch, cfg = common.to_device(self.batch, self.dist.device), self.cfg  # a fresh dict
        if self.method == "vita_vla":
            with self.clock.part("teacher"), torch.no_grad():
                h = self.teachers[0].hidden(batch)[0] if self.teachers else None
            return self.model(batch, h)
        noise = self.script.draw_noise(cfg, self.turn, 7, self.dist)
        noise = common.to_device([*noise], self.dist.device)
        if self.method == "dualvla":
            with self.clock.part("teachers"):
                soft = dualvla.teach(self.teachers or (None, None), batch, noise)
            return self.model(batch, noise, soft)
        self.model.left = None if variant == "vanilla" else self.left
        if variant == "lockstep":
            return lockstep(self.model, batch, noise)
        return self.model(batch, noise)

    def backward(self, variant):
        with common.autocast(self.dist.device, self.cfg.dtype):
            loss = self.script.total_loss(self.losses(variant), self.cfg)
        self.clock.mark("head, backward")
        loss.backward()

    def step(self, variant):
        """-> {part: seconds} of one step; together they are the whole of it."""
        self.turn += 1
        self.clock.mark("rest")
        self.backward(variant)
        self.clock.mark("clip, optimizer")
        if self.method == "dualvla":
            self.model.forget_words()
        common.clip(self.parameters, self.cfg.clip)
        for opt in self.opts:
            opt.step()
            opt.zero_grad(set_to_none=True)
        return self.clock.read()

    def forget(self):
        """No gradients and no marks, as the loop begins a step."""
        self.clock.marks = []
        for opt in self.opts:
            opt.zero_grad(set_to_none=True)

    def warm(self, variant):
        """Some steps for warming up -> TFLOP of one, its host synchronisations, its peak memory,
        without a brain that the variant leaves out."""
        facts = {}
        if not self.cfg.compile:  # compiled blocks hide what they do
            with FlopCounterMode(display=False) as counter:
                self.backward(variant)
            facts["tflop"] = round(counter.get_total_flops() / 1e12, 6)
            self.forget()
        self.step(variant)
        if CUDA:
            with warnings.catch_warnings(record=True) as waits:
                warnings.simplefilter("always")
                torch.cuda.set_sync_debug_mode("warn")
                try:
                    self.backward(variant)
                finally:
                    torch.cuda.set_sync_debug_mode("default")
            facts["waits"] = sum("called a synchroniz" in str(w.message) for w in waits)
            self.forget()
            torch.cuda.reset_peak_memory_stats()
            self.step(variant)
            left = self.left.parameters() if self.left is not None else ()
            idle = sum(p.nbytes for p in {*left} - {*self.model.parameters()})
            facts["peak_gb"] = round((torch.cuda.max_memory_allocated() - idle) / 1e9, 1)
        return facts


def measure(stepper, steps, wanted):
    """-> {variant: facts}, {variant: [{part: seconds}]}, the variants taking turns. Who is told to
    end (SIGTERM) has so far measured what it has."""
    facts, ended = {}, []

    def end(*_):
        ended.append(True)
        if not facts:
            sys.exit("ended before a step was warm")

    signal.signal(signal.SIGTERM, end)
    for variant in [v for v in stepper.variants if v in (wanted or stepper.variants)]:
        if ended and facts:
            break
        try:
            facts[variant] = stepper.warm(variant)
        except torch.OutOfMemoryError:
            print(f"{variant}: out of the GPU's memory")
        stepper.forget()
        torch.cuda.empty_cache()
    times = {variant: [] for variant in facts}
    if not times:
        raise common.UserError("no variant fits in this GPU's memory")
    for i in range(steps):
        if ended and i:
            break
        for variant, mine in times.items():
            mine.append(stepper.step(variant))
    return facts, times


def loading(stepper, count=3):
    """Seconds that one process spends on a batch."""
    times = []
    for i in range(count):
        began = stepper.clock.now()
        stepper.batches[i + 1]
        times.append(stepper.clock.now() - began)
    return statistics.median(times)


def report(args, stepper, facts, times):
    cfg, rows = stepper.cfg, {}
    whole = {v: [sum(spent.values()) for spent in mine] for v, mine in times.items()}
    for variant, mine in times.items():
        parts = dict.fromkeys(part for spent in mine for part in spent)
        middle = statistics.median(whole[variant])
        rows[variant] = {
            "method": args.method, "variant": variant, "ms": round(1000 * middle, 1),
            "samples_s": round(cfg.batch / middle, 2),
            "parts_ms": {p: round(1000 * statistics.median(s.get(p, 0.0) for s in mine), 2)
                         for p in parts}, **facts[variant],
        }  # fmt: skip
        if work := facts[variant].get("tflop"):
            rows[variant]["tflops"] = round(work / middle, 4)
            for name, peak in PEAKS.items():
                if CUDA and name in torch.cuda.get_device_name():
                    rows[variant]["of_peak"] = round(work / middle / peak, 3)
    loader = loading(stepper)
    print(f"{'ms of a step':28}" + "".join(f"{v:>12}" for v in rows))
    for part in dict.fromkeys(p for row in rows.values() for p in row["parts_ms"]):
        cells = (row["parts_ms"].get(part) for row in rows.values())
        print(f"  {part:26}" + "".join(f"{'' if c is None else f'{c:.1f}':>12}" for c in cells))
    for name in ("ms", "samples_s", "tflop", "tflops", "of_peak", "waits", "peak_gb"):
        if any(name in row for row in rows.values()):
            print(f"{name:28}" + "".join(f"{row.get(name, ''):>12}" for row in rows.values()))
    pairs = [("twin", "vanilla"), ("lockstep", "twin")]
    for a, b in [pair for pair in pairs if rows.keys() >= set(pair)]:
        ratio = statistics.median(x / y for x, y in zip(whole[a], whole[b]))
        rows[a][f"over_{b}"] = round(ratio, 3)
        print(f"{a} / {b} {ratio:.2f}")
    print(f"a batch takes the loader {1000 * loader:.0f} ms in one process")
    about = {"backbone": cfg.backbone, "batch": cfg.batch, "random": args.random}
    about |= {"optimizer": cfg.optimizer, "lora": getattr(cfg, "lora", 0), "compile": cfg.compile}
    about |= {"busy": args.busy, "note": args.note}
    for row in rows.values():
        append("step", row | {"loader_ms": round(1000 * loader, 1)} | about)
    how = f"{cfg.optimizer}, LoRA {about['lora'] or 'none'}" + ", compiled" * cfg.compile
    print(f"{cfg.backbone}, batch {cfg.batch}, {how}; {machine()}; {args.note}")


def arguments(words):
    """-> this script's own, the Config of the method."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--method", choices=methods.SCRIPTS, default="twinbrain")
    parser.add_argument("--stage", default="", help="of vita_vla (finetune) or dualvla (dual)")
    parser.add_argument("--steps", type=int, default=20)
    variants = ["vanilla", "twin", "lockstep"]
    parser.add_argument("--variants", nargs="+", choices=variants, help="some of them alone")
    parser.add_argument("--random", action="store_true", help="random weights of its size")
    parser.add_argument("--busy", action="store_true", help="the processor's seconds, not wall's")
    parser.add_argument("--note", default="", help="said beside the numbers")
    args, flags = parser.parse_known_args(words)
    usual = {"vita_vla": "finetune", "dualvla": "dual"}
    return args, methods.config(args.method, flags, args.stage or usual.get(args.method, ""))


def main():
    args, cfg = arguments(sys.argv[1:])
    stepper = Stepper(args.method, methods.fitting(args.method, cfg), args.random, args.busy)
    report(args, stepper, *measure(stepper, args.steps, args.variants))


if __name__ == "__main__":
    common.run_main(main)
