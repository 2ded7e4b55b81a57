"""Training at any size: what memory it takes, LoRA, recomputing, shards, the loader, clipping.

What trains is float32, with float32 gradients and optimizer state (8 bits by adamw8bit); autocast
rounds it to bfloat16 in the products. `--frozen bf16` stores the rest so.
"""

import inspect
import math
import os
import re
import signal
import sys
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import (
    FSDPModule,
    MixedPrecisionPolicy,
    fully_shard,
    register_fsdp_forward_method,
)
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader

from parts.backbones import ask_hub, check_weights
from parts.checkpoints import torchao, write_state
from parts.process import Muon, UserError, in_bf16, size, to_device

SAVERS = {  # flags that save memory, and whether a Config leaves them unused
    "--grad-checkpoint": lambda cfg, dist: not cfg.grad_checkpoint,
    "--frozen bf16": lambda cfg, dist: cfg.frozen == "fp32",
    "--lora 32": lambda cfg, dist: not getattr(cfg, "lora", 1),
    "--optimizer adamw8bit": lambda cfg, dist: (
        cfg.optimizer != "adamw8bit" and shares(cfg, dist) == 1
    ),
    "--shard full on more GPUs": lambda cfg, dist: shares(cfg, dist) == 1,
}


def vision_blocks(model):
    """The vision tower's layers, of a Qwen-VL, an Eagle2 or VITA-1.5."""
    if hasattr(model, "visual"):
        return model.visual.blocks
    tower = getattr(model, "vision_tower", None) or model.vision
    return tower.encoder.layers if hasattr(tower.encoder, "layers") else tower.encoder.layer


class LoRA(nn.Module):
    """A frozen matrix with a low-rank change: W x + 2 B A x (alpha / r = 2)."""

    def __init__(self, base, rank):
        super().__init__()
        self.base = base
        self.down = nn.Parameter(torch.randn(rank, base.in_features) / base.in_features**0.5)
        self.up = nn.Parameter(torch.zeros(base.out_features, rank))

    def forward(self, x):
        return self.base(x) + 2.0 * (x @ self.down.mT) @ self.up.mT

    def merged(self):
        """The matrix with the change in it."""
        whole = self.base.weight.data.float()  # 16 bits would round most of the change away
        self.base.weight.data = whole + 2.0 * self.up @ self.down
        return self.base


def swap(model, kind, make):
    """Puts make(module) in the place of every module of a kind."""
    for name in [n for n, m in model.named_modules() if isinstance(m, kind)]:
        parent, _, leaf = name.rpartition(".")
        parent = model.get_submodule(parent)
        setattr(parent, leaf, make(getattr(parent, leaf)))


def add_lora(layers, rank):
    """Puts a LoRA around every matrix of `layers`, a ModuleList; all else in them stands still."""
    layers.requires_grad_(False)
    swap(layers, nn.Linear, lambda matrix: LoRA(matrix, rank))


def merge_lora(model):
    """What `add_lora` put around the matrices joins them: an ordinary model again."""
    swap(model, LoRA, LoRA.merged)


def place(model, cfg, dist, say, replicate=None, beside=()):
    """A built model, ready to train on `dist.device`: `model.blocks()` one by one compiled,
    recomputed, sharded as the flags say; `replicate`: a part that --shard leaves whole where it
    stands still; `beside`: {name: another model that stands still on the device}. Says what it
    takes, by part; what cannot fit is a UserError that names the flags which would help."""
    if dist.rank:  # all began alike; from here on each drops out what it draws itself
        torch.manual_seed(cfg.seed + dist.rank)
    store_frozen(model, cfg, dist.device)
    split = shares(cfg, dist)
    whole = replicate.parameters() if replicate is not None else ()
    copied = {p for p in whole if not p.requires_grad}
    rows = memory_rows(model, cfg, split, copied, beside)
    say(f"{'memory of a process:':24} {'weights':>10} {'gradients':>10} {'optimizer':>10}")
    for name, parts in rows.items():
        say(f"  {name:22} " + " ".join(f"{size(n):>10}" for n in parts))
    say(f"  sum {left_of_device(rows, cfg, dist)} are left for activations")
    for block in model.blocks():
        enclose(block, cfg, getattr(model, "gates", None))
    if split > 1:
        shard(model, cfg, dist, copied)
    return model.to(dist.device)


def foresee(cfg, dist, build, *others):
    """Before anything is made or loaded: a UserError where a backbone's files are damaged, or where
    what build() makes, to train, cannot fit beside what `others` make, that stands still: on the
    device, or all of it in the memory of this machine, where every process loads it first. The
    embedded backbone is not asked."""
    if cfg.backbone == "tiny":
        return
    check_weights(cfg.backbone)
    with torch.device("meta"):
        model, *beside = (make() for make in (build, *others))
    for m in (model, *(other.requires_grad_(False) for other in beside)):
        store_frozen(m, cfg, dist.device)
    loaded = sum(p.nbytes for m in (model, *beside) for p in m.parameters())
    rows = memory_rows(model, cfg, shares(cfg, dist), beside=dict(enumerate(beside)))
    left_of_device(rows, cfg, dist)
    free = min(dist.gather(machine_memory(now=True)))  # asked before any process loads
    if loaded > free:
        raise UserError(f"{size(loaded)} of weights, which each process loads first, do not fit in "
                        f"this machine's free {size(free)}; what helps: a smaller --backbone, "
                        "fewer processes on a machine")  # fmt: skip
    ask_hub(cfg.backbone)


def shares(cfg, dist):
    """Into how many shares the model goes."""
    return dist.processes if cfg.shard == "full" else 1


def left_of_device(rows, cfg, dist):
    """Rows of memory_rows() -> their sum and what it leaves of the device, in words."""
    need, there = sum(map(sum, rows.values())), device_memory(dist.device)
    kind = "GPU" if dist.device.type == "cuda" else "machine"
    if need > there:
        flags = ", ".join(flag for flag, unused in SAVERS.items() if unused(cfg, dist))
        raise UserError(f"{size(need)} for weights, gradients and optimizer do not fit in this "
                        f"{kind}'s {size(there)}; what helps: {flags or 'more GPUs'}")  # fmt: skip
    return f"{size(need)}; {size(there - need)} of this {kind}"


def widen(model):
    """-> the model; what trains is float32, whatever its file has."""
    for p in model.parameters():
        if p.requires_grad:
            p.data = p.data.float()
    return model


def store_frozen(model, cfg, device):
    """--frozen bf16, where products are in bfloat16 anyway; else what stands still is float32."""
    half = cfg.frozen == "bf16" and in_bf16(device, cfg.dtype)
    for p in model.parameters():
        if not p.requires_grad:
            p.data = p.data.to(torch.bfloat16 if half else torch.float32)


def memory_rows(model, cfg, split=1, copied=(), beside=()):
    """-> {part of the model: bytes of (weights, gradients, optimizer) in one of `split` shares}; of
    the models `beside` it their weights."""
    rows = {}
    for name, p in model.named_parameters():
        row = rows.setdefault(name.partition(".")[0], [0, 0, 0])
        n = p.numel() / (1 if p in copied else split)
        words = "embed" in name or "lm_head" in name
        muon = cfg.optimizer == "muon" and p.dim() == 2 and not words
        state = 2 if cfg.optimizer == "adamw8bit" else 4 if muon else 8
        for i, each in enumerate((p.element_size(), 4 * p.requires_grad, state * p.requires_grad)):
            row[i] += n * each
    for name, other in dict(beside).items():
        rows[f"teacher {name}"] = [sum(p.nbytes for p in other.parameters()), 0, 0]
    return rows


def device_memory(device):
    """Bytes that this process may fill: of its GPU, or its share of the machine's memory."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device)
    return machine_memory()


MEMORY, LIMITS = Path("/proc/meminfo"), [  # of Linux; and of a container, in cgroups' two versions
    Path("/sys/fs/cgroup", name) for name in ("memory.max", "memory/memory.limit_in_bytes")
]


def machine_memory(now=False):
    """A process's share of this machine's memory, or of what is free of it now, in bytes."""
    there = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if now and MEMORY.exists():
        there = 1024 * int(re.search(r"MemAvailable: *(\d+)", MEMORY.read_text())[1])
    limits = [file.read_text().strip() for file in LIMITS if file.exists()]
    there = min([there, *(int(limit) for limit in limits if limit.isdigit())])
    return there / int(os.environ.get("LOCAL_WORLD_SIZE", 1))


def enclose(block, cfg, gates=None):
    """Compiles a block (--compile), and keeps its input alone for the backward pass, which computes
    the rest anew (--grad-checkpoint) with what `gates.now` was at the time."""
    # all blocks have one code, of which torch keeps eight versions: a block's number makes another
    known = "isolate_recompiles" in inspect.signature(torch.compile).parameters
    apart = {"isolate_recompiles": True} if known else {}
    if cfg.compile and not known:
        torch._dynamo.config.recompile_limit = 256
    forward = torch.compile(block.forward, **apart) if cfg.compile else block.forward

    def recomputed(*args, **words):
        if not torch.is_grad_enabled():
            return forward(*args, **words)
        then = gates and gates.now

        def run(*args, **words):
            if gates is None:
                return forward(*args, **words)
            now, gates.now = gates.now, then
            try:
                return forward(*args, **words)
            finally:
                gates.now = now

        return checkpoint(run, *args, use_reentrant=False, **words)

    if cfg.grad_checkpoint or cfg.compile:
        block.forward = recomputed if cfg.grad_checkpoint else forward


def shard(model, cfg, dist, copied):
    """FSDP2: each process keeps a share of every weight, its gradient and optimizer state, and
    gathers a block's weights (in bfloat16 if products are) while it runs; the rest is one group."""
    if cfg.optimizer != "adamw":
        raise UserError(
            f"--shard full: --optimizer {cfg.optimizer} needs whole matrices; take adamw, or "
            "--shard none"
        )
    mesh = init_device_mesh(dist.device.type, (dist.processes,))
    policy = MixedPrecisionPolicy()
    if in_bf16(dist.device, cfg.dtype):
        half = dict(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
        policy = MixedPrecisionPolicy(**half, cast_forward_inputs=False)
    for block in model.blocks():
        if copied.isdisjoint(block.parameters()):
            fully_shard(block, mesh=mesh, mp_policy=policy)
            for name in ("project", "finish"):  # ways into a block beside its forward
                if hasattr(block, name):
                    register_fsdp_forward_method(block, name)
    fully_shard(model, mesh=mesh, ignored_params=copied)
    model._get_fsdp_state()._lazy_init()  # else a block that is evaluated first thinks it is root


def gather(model):
    """Every process has all of a sharded model from now on, and may call any part of it alone."""
    for unit in (m for m in model.modules() if isinstance(m, FSDPModule)):
        unit.set_reshard_after_forward(False, recurse=False)
        unit.unshard()


@contextmanager
def gathered(model):
    """The same for a while."""
    gather(model)
    yield
    for unit in (m for m in model.modules() if isinstance(m, FSDPModule)):
        unit.reshard()
        unit.set_reshard_after_forward(unit is not model, recurse=False)


def parallel(model, dist, unused):
    """What the loop calls: averages gradients over the processes, unless a sharded model does."""
    if dist.processes == 1 or isinstance(model, FSDPModule):
        return model
    return DistributedDataParallel(
        model, find_unused_parameters=unused, gradient_as_bucket_view=True
    )


def synchronise(ddp, last):
    """Copies average their gradients in a step's last micro-batch alone; shards in each, as what
    waits would be a whole model's gradients in every process."""
    if isinstance(ddp, DistributedDataParallel):
        ddp.require_backward_grad_sync = last


def clip(parameters, limit):
    """Scales the gradients to a norm of at most `limit` -> a function that gives their norm before,
    over all shards. It waits for the backward pass alone: a GPU has the optimizer's step to do."""
    norm = nn.utils.clip_grad_norm_(parameters, limit)
    norm = norm.full_tensor() if isinstance(norm, DTensor) else norm
    copy, copied = norm.to("cpu", non_blocking=True), norm.is_cuda and torch.cuda.Event()
    if copied:
        copied.record()

    def norm_before():
        if copied:
            copied.synchronize()
        return float(copy)

    return norm_before


def same_samples(cfg, resumed, dist):
    """A Config resumed: the same samples in each step, on another number of processes by other
    --batch and --accumulate."""
    saved, now, mix = resumed.meta["config"], dist.processes, getattr(cfg, "mix", 0)
    cfg.batch, cfg.accumulate = saved["batch"], saved["accumulate"]
    total = cfg.batch * cfg.accumulate * resumed.meta["processes"]
    if resumed.meta["processes"] == now:
        return cfg
    if total % now:
        raise UserError(f"{total} samples a step do not divide among {now} processes")
    cfg.batch = math.gcd(cfg.batch, total // now)
    cfg.accumulate = total // now // cfg.batch
    if cfg.batch < min(mix, saved["batch"]):
        raise UserError(f"{cfg.batch} samples on each of {now} processes: fewer than --mix {mix}")
    return cfg


def optimizers(cfg, rows):
    """rows: (parameter, peak learning rate, weight decay, whether it is Muon's) of all that trains
    -> AdamW, and Muon for the matrices if it takes any. A group keeps its rate's peak."""
    groups = {}
    for p, peak, decay, matrix in rows:
        groups.setdefault((cfg.optimizer == "muon" and matrix, peak, decay), []).append(p)
    adam, muon = (
        [{"params": p, "lr": r, "peak": r, "weight_decay": d} for (m, r, d), p in groups.items()
         if m == matrices] for matrices in (False, True)
    )  # fmt: skip
    made = [adamw(adam, cfg)]
    if muon:
        made.append(Muon(muon, cfg.muon or cfg.dtype, adjust_lr_fn="match_rms_adamw"))
    return made


def adamw(groups, cfg):
    """AdamW, or torchao's with its state in 8 bits."""
    settings = dict(betas=(0.9, 0.95), weight_decay=cfg.weight_decay)
    if cfg.optimizer != "adamw8bit":
        on_gpu = all(p.is_cuda for group in groups for p in group["params"])
        return torch.optim.AdamW(groups, **settings, fused=on_gpu or None)  # no copies of weights

    class AdamW8bit(torchao().AdamW8bit):
        def step(self):  # its own takes learning rates as tensors alone
            for group in self.param_groups:
                group["lr"] = torch.tensor(group["lr"])
            super().step()

    return AdamW8bit(groups, **settings)


def outlive(worker):
    """A loader's process goes on at SIGTERM, which torchrun sends it as well: the trainer has a
    step to finish and ends it then."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


def feed(batches, todo, workers):
    """The batches `todo`, in order; what goes wrong with them ends in one line."""
    # forked, whatever Python's default, the workers share what is in memory and mapped from files
    start = "fork" if workers and sys.platform == "linux" else None
    loader = DataLoader(  # with a generator of its own it leaves the global one alone: exact resume
        batches, batch_size=None, sampler=todo, num_workers=workers, generator=torch.Generator(),
        multiprocessing_context=start, worker_init_fn=outlive,
    )  # fmt: skip
    try:
        yield from loader
    except (UserError, OSError) as error:  # a worker's come as one string with its traceback
        lines = str(error).strip().splitlines()
        raise UserError(f"cannot read the training data: {lines[-1] if lines else error}") from None


def halt_at_nan(run, step, batches):
    """The loss or its gradient is not finite: names the step, keeps what it was computed from."""
    file = run.folder / f"nan_step_{step}_rank{run.dist.rank}.pt"
    write_state(file, to_device(batches, torch.device("cpu")))
    raise UserError(f"the loss or its gradient is not finite at step {step}; its batch is in {file}"
                    ", checkpoints before it are intact: lower --lr")  # fmt: skip
