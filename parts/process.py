"""What runs a script: errors of the user, files, processes, precision, Muon, stopping.

A mistake of the user raises `UserError`; `run_main` turns it into one line and exit status 2.
"""

import ctypes
import dataclasses
import datetime
import difflib
import errno
import hashlib
import os
import platform
import random
import signal
import sys
from contextlib import suppress
from pathlib import Path

import numpy as np
import torch
import torch.distributed


class UserError(Exception):
    """A mistake the user can mend; the message is one line."""


FAULTS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO,
          errno.EEXIST, errno.ENOTDIR, errno.EISDIR, errno.ENOENT, errno.ENAMETOOLONG)  # fmt: skip


SPARING = {  # settings of a script, and how they save memory
    "accumulate": "half of --batch with twice --accumulate", "grad_checkpoint": "--grad-checkpoint",
    "frozen": "--frozen bf16", "lora": "--lora 32", "shard": "--shard full on several GPUs",
}  # fmt: skip


def run_main(main) -> None:
    """Runs `main()`; what the user can mend ends in one line instead of a traceback."""
    try:
        return main()
    except UserError as error:  # of a loader's worker it comes with the worker's traceback
        message = str(error).strip().rpartition("parts.process.UserError: ")[2]
    except torch.OutOfMemoryError:
        Config = getattr(main, "__globals__", {}).get("Config")  # of the script
        flags = ", ".join(words for name, words in SPARING.items() if hasattr(Config, name))
        message = "the GPU is out of memory" + (f"; what helps: {flags}" if flags else "")
    except BrokenPipeError:  # whoever read the output has left
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        sys.exit(0)
    except OSError as error:
        if error.errno not in FAULTS:
            raise
        message = f"{error.strerror}: {error.filename or 'while writing'}"
    except RuntimeError as error:
        if not str(error).startswith("DataLoader worker"):
            raise
        message = "a loader process was killed; go on with --resume, with fewer --workers if the "
        message += "machine's memory was full"
    except KeyboardInterrupt:
        sys.exit(130)
    print(f"error: {message}", file=sys.stderr)
    sys.exit(2)


# --- files ----------------------------------------------------------------------------------------


def stamp(files, words):
    """A digest of these files' names, sizes and times, and of words."""
    digest = hashlib.sha256(words.encode())
    for path in files:
        digest.update(os.fsencode(path))
        with suppress(OSError):  # a link to nowhere has its name alone
            stat = os.stat(path)
            digest.update(f" {stat.st_size} {stat.st_mtime_ns}".encode())
    return digest.hexdigest()[:16]


def files_of(path):
    """Every file under a path but those in hidden folders, behind links too; a file itself."""
    if not path.is_dir():
        yield path
    been = set()
    for folder, folders, names in os.walk(path, followlinks=True):
        place = os.stat(folder)
        if (place.st_dev, place.st_ino) in been:  # a link may lead back
            folders[:] = names[:] = []
        been.add((place.st_dev, place.st_ino))
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        yield from (os.path.join(folder, name) for name in sorted(names))


# --- processes ------------------------------------------------------------------------------------


@dataclasses.dataclass
class Dist:
    """This process among `processes`; alone, every call is free."""

    rank: int
    processes: int
    device: torch.device

    @property
    def main(self) -> bool:
        return self.rank == 0

    def gather(self, item) -> list:
        """Every rank's item, on every rank."""
        items = [item] * self.processes
        if self.processes > 1:
            torch.distributed.all_gather_object(items, item)
        return items

    def barrier(self) -> None:
        self.gather(None)

    def share(self, item):
        """Rank 0's item, on every rank."""
        return self.gather(item)[0]

    def first(self, make):
        """make() on rank 0, then on one process of each other machine, whose disk may be its own,
        then on the rest, who find what these cached; an error is everybody's."""
        local = int(os.environ.get("LOCAL_RANK", self.rank))
        made, fault, mine = None, "", 0 if self.main else 2 if local else 1
        for turn in range(3):
            if turn == mine:
                try:
                    made = make()
                except UserError as error:
                    fault = str(error)
            if faults := [*filter(None, self.gather(fault))]:
                raise UserError(faults[0])
        return made

    def any(self, flag: bool) -> bool:
        """True on every rank as soon as one rank says so."""
        return any(self.gather(flag))

    def mean(self, values: dict[str, float]) -> dict[str, float]:
        rows = self.gather(values)
        return {name: sum(row[name] for row in rows) / len(rows) for name in values}

    def destroy(self) -> None:
        if self.processes > 1:
            torch.distributed.destroy_process_group()


def setup(cfg) -> Dist:
    """Device, threads, seeds and, under torchrun, the process group."""
    rank, processes = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    device = torch.device("cpu")
    if not 0 <= cfg.seed < 2**31:
        raise UserError(f"--seed {cfg.seed}: from 0 to 2147483647")
    if cfg.threads < 0:
        raise UserError(f"--threads {cfg.threads}: at least 0")
    if cfg.device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: PyTorch sees no GPU here")
    if cfg.device != "cpu" and torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        if device.index >= (gpus := torch.cuda.device_count()):
            raise UserError(f"process {device.index} has no GPU: torchrun --nproc-per-node {gpus}")
        torch.cuda.set_device(device)
        torch.set_float32_matmul_precision("high")  # TF32 where autocast leaves float32
    if cfg.threads:
        torch.set_num_threads(cfg.threads)
    keep_memory()
    if processes > 1:
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        store = next(torch.distributed.rendezvous("env://"))[0]
        # torchrun's restart finds the old addresses; of several nodes, whose counts may differ, all
        # have TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1, for a new store
        if os.environ.get("GROUP_WORLD_SIZE") == "1":
            attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
            store = torch.distributed.PrefixStore(f"attempt_{attempt}", store)
        # rank 0 may read a dataset for hours; torchrun ends who waits for a process that died
        torch.distributed.init_process_group(
            backend, store=store, rank=rank, world_size=processes,
            timeout=datetime.timedelta(hours=12),
        )  # fmt: skip
    seed_all(cfg.seed)
    return Dist(rank, processes, device)


def keep_memory() -> None:
    """What a step frees the next one gets, without the system between: glibc hands back the top of
    its heap, 20 MB a step of the laptop's run, and is given it page by page, a tenth of the time.
    Where MALLOC_... in the environment says otherwise, or elsewhere, nothing happens."""
    told = any(name.startswith("MALLOC_") for name in os.environ)
    libc = ctypes.CDLL(None) if platform.libc_ver()[0] == "glibc" and not told else None
    for option, most in ((-1, 2**31 - 1), (-3, 2**25)) if libc else ():
        libc.mallopt(option, most)  # M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, at their largest


def seed_all(seed: int) -> None:
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def multiplies_bf16(device: torch.device) -> bool:
    """Whether matrix products are faster in bfloat16 there than in float32. A CPU without its
    instructions is dozens of times slower; AVX-512's alone help on AMD's, but not on Intel's, where
    a step takes longer with them (no AMX, as in many virtual machines: `bench/step.py`)."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if torch.cpu._is_amx_tile_supported():
        return True
    return torch.cpu._is_avx512_bf16_supported() and "AuthenticAMD" in cpu_facts()


def cpu_facts() -> str:
    """What the system says about its CPU: maker and model among others."""
    file = Path("/proc/cpuinfo")
    return file.read_text() if file.exists() else platform.processor()


def in_bf16(device: torch.device, dtype: str) -> bool:
    """dtype: auto | bf16 | fp32; auto is bf16 where the hardware multiplies it, else fp32."""
    return dtype == "bf16" or (dtype == "auto" and multiplies_bf16(device))


def autocast(device: torch.device, dtype: str = "auto"):
    return torch.autocast(device.type, torch.bfloat16, enabled=in_bf16(device, dtype))


class Muon(torch.optim.Muon):
    """PyTorch's Muon with its settings and state, but matrices of one shape go as one batch, and in
    float32 where bfloat16 is not fast (PyTorch's own then takes seconds a step), or is not asked
    for. dtype: auto | bf16 | fp32."""

    def __init__(self, params, dtype="auto", **settings):
        super().__init__(params, **settings)
        self.dtype = dtype

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            batches = {}
            for p in group["params"]:
                if p.grad is not None:
                    state = self.state[p]
                    if not state:
                        state["momentum_buffer"] = torch.zeros_like(p.grad)
                    momentum = state["momentum_buffer"]
                    momentum.lerp_(p.grad, 1 - group["momentum"])
                    batches.setdefault(p.shape, []).append((p, momentum))
            for pairs in (part for same in batches.values() for part in portions(same)):
                rows, columns = pairs[0][0].shape
                updates = torch.stack([p.grad.lerp(m, group["momentum"]) for p, m in pairs])
                half = in_bf16(updates.device, self.dtype)
                updates = updates.to(torch.bfloat16 if half else torch.float32)
                if rows > columns:
                    updates = orthogonal(updates.mT, group).mT
                else:
                    updates = orthogonal(updates, group)
                scale = max(1.0, rows / columns) ** 0.5
                if group["adjust_lr_fn"] == "match_rms_adamw":
                    scale = 0.2 * max(rows, columns) ** 0.5
                for (p, _), update in zip(pairs, updates.float()):
                    p.mul_(1 - group["lr"] * group["weight_decay"])
                    p.add_(update, alpha=-group["lr"] * scale)


AT_ONCE = 2**27  # numbers that Muon copies: 0.5 GB, where a large model's matrices have dozens


def portions(pairs: list) -> list[list]:
    """Matrices of one shape, so many at a time."""
    n = max(1, AT_ONCE // pairs[0][0].numel())
    return [pairs[i : i + n] for i in range(0, len(pairs), n)]


def orthogonal(x: torch.Tensor, group: dict) -> torch.Tensor:
    """Newton-Schulz steps towards the nearest matrix with orthogonal rows, (N, rows, columns)."""
    a, b, c = group["ns_coefficients"]
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=group["eps"])
    for _ in range(group["ns_steps"]):
        square = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(square, square, square, beta=b, alpha=c), x, beta=a)
    return x


def to_device(batch, device: torch.device):
    """Moves every tensor of nested dicts and lists; it waits for those that leave a GPU."""
    if isinstance(batch, dict):
        return {name: to_device(item, device) for name, item in batch.items()}
    if isinstance(batch, list | tuple):
        return type(batch)(to_device(item, device) for item in batch)
    if isinstance(batch, torch.Tensor):
        return batch.to(device, non_blocking=device.type != "cpu")
    return batch


class Stop:
    """Ctrl-C or SIGTERM asks the loop to save and leave; a second one ends the process at once."""

    def __init__(self):
        self.requested, self.pid = False, os.getpid()
        self.before = {n: signal.signal(n, self.ask) for n in (signal.SIGINT, signal.SIGTERM)}

    def ask(self, number, frame) -> None:
        if os.getpid() != self.pid:  # a forked loader worker: the trainer decides when it ends
            return
        self.requested = True
        for each in self.before:
            signal.signal(each, signal.SIG_DFL)
        os.write(2, b"\nstopping after this step; once more ends at once\n")

    def restore(self) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)


# --- words ----------------------------------------------------------------------------------------


def nearest(word: str, known) -> str:
    return difflib.get_close_matches(word, list(known), n=1, cutoff=0.0)[0]


def human(n: float) -> str:
    """1800000 -> 1.8M"""
    for unit in ("", "K", "M", "B"):
        if abs(n) < 999.95 or unit == "B":
            return f"{n:.3g}{unit}"
        n /= 1000


def size(n):
    """Bytes -> 1.5 GB"""
    return f"{n / 1e9:.2f} GB" if n >= 1e9 else f"{n / 1e6:.2f} MB"
