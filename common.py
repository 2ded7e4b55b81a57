"""What every method script needs and no paper is about. A rule `# ---` opens each section.

A mistake of the user raises `UserError`; `run_main` turns it into one line and exit status 2.
Letters: B batch, T tokens, D width of a head, P patch, M merge, H chunk (or height), A action.
"""

import dataclasses
import difflib
import errno
import importlib.util
import inspect
import json
import math
import os
import pickle
import platform
import random
import re
import resource
import shlex
import shutil
import signal
import statistics
import subprocess
import sys
import time
import typing
import warnings
from contextlib import contextmanager
from functools import lru_cache
from importlib import metadata
from pathlib import Path

import numpy as np
import torch
import torch.distributed
import transformers
from huggingface_hub import snapshot_download
from PIL import Image
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, trainers
from torch import nn
from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import (
    FSDPModule,
    MixedPrecisionPolicy,
    fully_shard,
    register_fsdp_forward_method,
)
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.functional import scaled_dot_product_attention
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader
from tqdm import tqdm
from transformers import AttentionInterface, AutoConfig, AutoModelForImageTextToText, AutoTokenizer
from transformers.image_processing_base import ImageProcessingMixin
from transformers.masking_utils import sdpa_mask
from transformers.utils import cached_file
from transformers.utils.logging import disable_progress_bar


class UserError(Exception):
    """A mistake the user can mend; the message is one line."""


FAULTS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO)


def run_main(main) -> None:
    """Runs `main()`; what the user can mend ends in one line instead of a traceback."""
    try:
        return main()
    except UserError as error:  # of a loader's worker it comes with the worker's traceback
        message = str(error).strip().rpartition("common.UserError: ")[2]
    except torch.OutOfMemoryError:
        message = "the GPU is out of memory: half of --batch with twice --accumulate, or "
        message += "--grad-checkpoint, --frozen bf16, --lora 32, --shard full on several GPUs"
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


# --- command line ---------------------------------------------------------------------------------


@lru_cache
def field_notes(Config) -> dict[str, tuple[tuple[str, ...], str]]:
    """Field -> (choices, comment), from the source; a comment `a | b | c: text` lists choices."""
    notes = {}
    for line in inspect.getsource(Config).splitlines():
        code, _, comment = line.partition("  # ")
        if field := re.match(r"\s+(\w+)\s*:", code):
            listed = re.match(r"[\w.-]+( \| [\w.-]+)+(?=: |$)", comment)
            notes[field[1]] = tuple(listed[0].split(" | ")) if listed else (), comment
    return notes


def convert(flag: str, word: str, kind, choices: tuple[str, ...]):
    """A word of the command line as a value of type `kind`."""
    if typing.get_origin(kind) is tuple:
        element = typing.get_args(kind)[0]
        return tuple(convert(flag, part, element, choices) for part in word.split(",") if part)
    if choices and word not in choices:
        best = nearest(word, choices)
        raise UserError(f"{flag} takes {', '.join(choices)}; not {word!r} (did you mean {best}?)")
    try:
        value = kind(word)
        if value == value:  # a literal nan is not: no setting means it
            return value
    except ValueError:
        pass
    name = {int: "a whole number", float: "a number"}[kind]
    raise UserError(f"{flag} takes {name}, not {word!r}")


def nearest(word: str, known) -> str:
    return difflib.get_close_matches(word, list(known), n=1, cutoff=0.0)[0]


def usage(Config, presets: dict, ablations: dict) -> str:
    """The -h text: a flag a line with its comment and its default."""
    notes, defaults, rows = field_notes(Config), Config(), []
    for name, kind in typing.get_type_hints(Config).items():
        value, flag = getattr(defaults, name), name.replace("_", "-")
        word = "a,b,..." if isinstance(value, tuple) else kind.__name__
        value = ",".join(map(str, value)) if isinstance(value, tuple) else value
        rows.append((f"--[no-]{flag}" if kind is bool else f"--{flag} {word}", name, value))
    width = max(len(head) for head, _, _ in rows)
    lines = [f"usage: {Path(sys.argv[0]).name} [--flag value ...]", ""]
    lines += [f"  {head:{width}}  {notes[name][1]} [{value}]" for head, name, value in rows]
    lines += ["", "presets: " + ", ".join(presets)] if presets else []
    lines += ["ablations: " + ", ".join(["list", *ablations])] if ablations else []
    return "\n".join(lines)


def parse(Config, presets: dict[str, dict], ablations: dict[str, dict], argv=None):
    """Command line -> Config: defaults < preset < ablation < flags; `.explicit` names the flags.

    Keys of a preset that start with "_" (a row's meaning, a paper's number) are not settings.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    kinds, notes = typing.get_type_hints(Config), field_notes(Config)
    if "-h" in words or "--help" in words:
        print(usage(Config, presets, ablations))
        sys.exit(0)
    options = {"--" + name.replace("_", "-"): (name, True) for name in kinds}
    options |= {"--no-" + n.replace("_", "-"): (n, False) for n in kinds if kinds[n] is bool}
    given = {}
    while words:
        flag, has_value, value = words.pop(0).partition("=")
        if flag not in options:
            raise UserError(f"unknown flag {flag} (did you mean {nearest(flag, options)}?)")
        name, on = options[flag]
        if kinds[name] is bool:
            if has_value:
                raise UserError(f"{flag} takes no value: there is --[no-]{name.replace('_', '-')}")
            given[name] = on
        elif not has_value and (not words or words[0].startswith("--")):
            raise UserError(f"{flag} needs a value")
        else:
            word = value if has_value else words.pop(0)
            given[name] = convert(flag, word, kinds[name], notes[name][0])
    settings = {}
    for kind, table in (("preset", presets), ("ablation", {**ablations, "list": {}})):
        row = given.get(kind, "")
        if row and row not in table:
            raise UserError(f"unknown {kind} {row!r} (did you mean {nearest(row, table)}?)")
        settings |= {k: v for k, v in table.get(row, {}).items() if not k.startswith("_")}
    settings |= given
    if settings.get("data") and not re.search("tabletop|metaworld", settings["data"]):
        settings.setdefault("world", "none")  # who learns from other recordings acts elsewhere
    cfg = Config(**settings)
    cfg.explicit = tuple(given)
    return cfg


def resume_config(cfg, saved: dict, free: tuple[str, ...] = ()):
    """The saved run's Config; only explicit flags named in `free` (and --resume) may differ."""
    unknown = set(saved) - set(typing.get_type_hints(type(cfg)))
    if unknown:
        raise UserError(f"the checkpoint has settings of another version: {', '.join(unknown)}")
    merged = type(cfg)(**{k: tuple(v) if isinstance(v, list) else v for k, v in saved.items()})
    merged.explicit = getattr(cfg, "explicit", ())  # a Config that parse() did not make has none
    for name in merged.explicit:
        value, before = getattr(cfg, name), getattr(merged, name)
        if value != before and name in saved and name not in (*free, "resume"):
            flag = "--" + name.replace("_", "-")
            raise UserError(f"{flag} {value} differs from {before} in the checkpoint")
        setattr(merged, name, value)
    return merged


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
        """make() on rank 0, then on the others, who find what it cached; its error is theirs."""
        made, fault = None, None
        if self.main:
            try:
                made = make()
            except UserError as error:
                fault = str(error)
        if fault := self.share(fault):
            raise UserError(fault)
        return made if self.main else make()

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
    if cfg.device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: PyTorch sees no GPU here")
    if cfg.device != "cpu" and torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(device)
        torch.set_float32_matmul_precision("high")  # TF32 where autocast leaves float32
    if cfg.threads:
        torch.set_num_threads(cfg.threads)
    if processes > 1:
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        store = next(torch.distributed.rendezvous("env://"))[0]
        if os.environ.get("GROUP_WORLD_SIZE") == "1":  # torchrun's restart finds the old addresses
            attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
            store = torch.distributed.PrefixStore(f"attempt_{attempt}", store)
        torch.distributed.init_process_group(backend, store=store, rank=rank, world_size=processes)
    seed_all(cfg.seed)
    return Dist(rank, processes, device)


def seed_all(seed: int) -> None:
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def multiplies_bf16(device: torch.device) -> bool:
    """Whether matrix products in bfloat16 are fast there; elsewhere they are dozens of times slower
    than in float32."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


def in_bf16(device: torch.device, dtype: str) -> bool:
    """dtype: auto | bf16 | fp32; auto is bf16 where the hardware multiplies it, else fp32."""
    return dtype == "bf16" or (dtype == "auto" and multiplies_bf16(device))


def autocast(device: torch.device, dtype: str = "auto"):
    return torch.autocast(device.type, torch.bfloat16, enabled=in_bf16(device, dtype))


class Muon(torch.optim.Muon):
    """PyTorch's Muon with its settings and state, but matrices of one shape go as one batch, and in
    float32 where bfloat16 is not fast (PyTorch's own then takes seconds a step)."""

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            batches = {}
            for p in group["params"]:
                if p.grad is not None:
                    momentum = self.state[p].setdefault("momentum_buffer", torch.zeros_like(p.grad))
                    momentum.lerp_(p.grad, 1 - group["momentum"])
                    batches.setdefault(p.shape, []).append((p, momentum))
            for (rows, columns), pairs in batches.items():
                updates = torch.stack([p.grad.lerp(m, group["momentum"]) for p, m in pairs])
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


def orthogonal(x: torch.Tensor, group: dict) -> torch.Tensor:
    """Newton-Schulz steps towards the nearest matrix with orthogonal rows, (N, rows, columns)."""
    a, b, c = group["ns_coefficients"]
    x = x.bfloat16() if multiplies_bf16(x.device) else x.float()
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=group["eps"])
    for _ in range(group["ns_steps"]):
        square = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(square, square, square, beta=b, alpha=c), x, beta=a)
    return x


def to_device(batch, device: torch.device):
    """Moves every tensor of a nested dict."""
    if isinstance(batch, dict):
        return {name: to_device(item, device) for name, item in batch.items()}
    if isinstance(batch, list):
        return [to_device(item, device) for item in batch]
    return batch.to(device, non_blocking=True) if isinstance(batch, torch.Tensor) else batch


class Stop:
    """Ctrl-C or SIGTERM asks the loop to save and leave; a second one ends the process at once."""

    def __init__(self):
        self.requested, self.pid = False, os.getpid()
        self.before = {n: signal.signal(n, self.ask) for n in (signal.SIGINT, signal.SIGTERM)}

    def ask(self, number, frame) -> None:
        if os.getpid() != self.pid:  # a forked loader worker: the trainer decides when it ends
            if number == signal.SIGTERM:
                os._exit(143)
            return
        self.requested = True
        for each in self.before:
            signal.signal(each, signal.SIG_DFL)
        os.write(2, b"\nstopping after this step; once more ends at once\n")

    def restore(self) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)


# --- checkpoints ----------------------------------------------------------------------------------


@dataclasses.dataclass
class Checkpoint:
    path: Path  # <run>/checkpoints/step_00000100
    step: int
    tensors: dict[str, torch.Tensor]
    meta: dict
    train_state: dict
    local_state: dict

    @property
    def run(self) -> Path:
        return self.path.parent.parent


def rng_state() -> dict:
    """All generators of this process, in types that `torch.load(weights_only=True)` accepts."""
    name, keys, *rest = np.random.get_state()
    cuda = [torch.cuda.get_rng_state()] if torch.cuda.is_available() else []
    numpy = (name, keys.tolist(), *rest)
    return dict(python=random.getstate(), numpy=numpy, torch=torch.get_rng_state(), cuda=cuda)


def set_rng_state(state: dict) -> None:
    random.setstate(state["python"])
    np.random.set_state(state["numpy"])
    torch.set_rng_state(state["torch"])
    if state["cuda"] and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"][0])


def sync(path: Path) -> None:
    """Waits until a file or folder is on the disk."""
    handle = os.open(path, os.O_RDONLY)
    os.fsync(handle)
    os.close(handle)


def write_json(path: Path, content) -> None:
    """Atomic: a reader sees the old file or the new one."""
    draft = Path(f"{path}.tmp")
    draft.write_text(json.dumps(content, indent=1, default=lambda array: array.tolist()) + "\n")
    sync(draft)
    draft.replace(path)


def write_state(path: Path, state: dict) -> None:
    with open(path, "wb") as file:  # through Python's file: torch's own hides why it failed
        try:
            torch.save(state, file)
        except RuntimeError as error:  # of closing the archive, after the disk's own fault
            fault = error.__context__
            raise fault if isinstance(fault, OSError) else error from None
    sync(path)


def tied_names(tensors: dict[str, torch.Tensor]) -> dict[str, str]:
    """{name: owner} of the tensors that are another one's, and are stored once."""
    owners, tied = {}, {}
    for name, tensor in tensors.items():
        storage = tensor.to_local() if isinstance(tensor, DTensor) else tensor
        key = storage.data_ptr() or name, tensor.shape, tensor.dtype
        owner = owners.setdefault(key, name)
        if owner != name:
            tied[name] = owner
    return tied


def write_weights(path: Path, tensors: dict[str, torch.Tensor]) -> None:
    save_file({name: tensor.detach().contiguous() for name, tensor in tensors.items()}, path)
    sync(path)


def set_apart(tree, place, shards):
    """A nest of states without its sharded tensors: these go into `shards`, by their place."""
    if isinstance(tree, DTensor):
        shards[place] = tree
    elif isinstance(tree, dict):
        return {name: set_apart(item, f"{place}.{name}", shards) for name, item in tree.items()}
    elif isinstance(tree, list):
        return [set_apart(item, f"{place}.{i}", shards) for i, item in enumerate(tree)]
    return None if isinstance(tree, DTensor) else tree


def shard_places(folder) -> dict:
    """{place: size and dtype of the whole tensor} of what processes wrote by shares."""
    if not Path(folder).exists():
        return {}
    return HuggingFaceStorageReader(folder).read_metadata().state_dict_metadata


def read_shards(folder, tensors: dict[str, torch.Tensor]) -> None:
    """Fills {place: tensor}; of a sharded one each process reads its own share."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # each process reads for itself, as is meant
        if tensors:
            dcp.load(tensors, storage_reader=HuggingFaceStorageReader(folder), no_dist=True)


def spread(value, like):
    """A tensor that each process has whole -> on the device of `like`, sharded as it is."""
    value = value.to(like.device)
    if isinstance(like, DTensor):
        return distribute_tensor(value, like.device_mesh, like.placements, src_data_rank=None)
    return value


def load_optimizers(opts, resumed: Checkpoint) -> None:
    """A checkpoint's states into optimizers whose weights may be sharded."""
    folder, states, wanted = resumed.path / "shards", resumed.train_state["optimizers"], {}
    by_shares = shard_places(folder)
    for k, (opt, saved) in enumerate(zip(opts, states)):
        params = [p for group in opt.param_groups for p in group["params"]]
        for i, state in saved["state"].items():
            for name, value in state.items():
                place = f"train.optimizers.{k}.state.{i}.{name}"
                if place in by_shares:
                    state[name] = wanted[place] = torch.zeros_like(params[i])
                elif value.shape == params[i].shape:
                    state[name] = spread(value, params[i])
    read_shards(folder, wanted)
    for opt, saved in zip(opts, states):
        opt.load_state_dict(saved)


def discard(path: Path) -> None:
    """Deletes a folder that is never seen half deleted under its name."""
    if path.exists():
        gone = path.rename(path.with_name("gone_" + path.name))
        shutil.rmtree(gone)


def save_checkpoint(folder, step, tensors, train_state, local_state, meta, dist, keep=2) -> Path:
    """Called on all ranks. Writes step_<step> whole or not at all, keeps the `keep` last ones.

    tensors, train_state (optimizer): of rank 0, where they are not sharded; local_state (RNG, data
    position): every rank's. What is sharded is written by torch.distributed.checkpoint, a share by
    each rank, as safetensors: its usual index is a pickle, its Hugging Face form needs none. All
    ranks see one folder. A run resumes on any number of processes, and is evaluated on one.
    """
    tied, shards = dist.share(tied_names(tensors)), {}
    tensors = {n: t for n, t in tensors.items() if n not in tied}
    tensors = set_apart(tensors, "model", shards)
    train_state = set_apart(train_state, "train", shards)
    tensors = {n: t for n, t in tensors.items() if t is not None}
    final, draft = Path(folder) / f"step_{step:08d}", Path(folder) / f"tmp_{step:08d}"
    failure = ""
    if dist.main:
        shutil.rmtree(draft, ignore_errors=True)  # of a run killed here, maybe with more shares
    dist.barrier()
    try:
        if shards:  # fails on all ranks or on none
            writer = HuggingFaceStorageWriter(draft / "shards", save_distributed=True)
            dcp.save(shards, storage_writer=writer)
        draft.mkdir(parents=True, exist_ok=True)
        write_state(draft / f"rank{dist.rank}.pt", local_state)
        if dist.main:
            write_weights(draft / "model.safetensors", tensors)
            write_state(draft / "train.pt", train_state)
            facts = {"step": step, "processes": dist.processes, "tied": tied}
            facts["shards"] = sorted(file.name for file in draft.glob("shards/*"))
            write_json(draft / "meta.json", {**meta, **facts})
    except (OSError, SafetensorError, dcp.CheckpointException) as error:
        if isinstance(error, dcp.CheckpointException):
            error = next(iter(error.failures.values()))[0]
        failure = f"could not save {final}: {error}; checkpoints before it are intact"
    if dist.any(bool(failure)):
        shutil.rmtree(draft, ignore_errors=True)
        raise UserError(failure or f"could not save {final}: another process failed to write")
    if dist.main:
        sync(draft)
        for path in final.parent.glob("gone_*"):  # of a run killed while it deleted
            shutil.rmtree(path)
        discard(final)  # the same step, saved before a resume
        draft.rename(final)
        sync(final.parent)
        older = sorted(path for path in final.parent.glob("step_*") if path < final)
        kept = [final, *older[len(older) + 1 - keep :]]
        for path in set(final.parent.glob("step_*")) - set(kept):  # later: of a run resumed before
            discard(path)
    dist.barrier()
    return final


def torchao():
    """torchao's optimizers; with them loaded, their states can be read from a checkpoint."""
    try:
        import torchao.optim
    except ImportError:
        raise UserError("--optimizer adamw8bit: pip install 'onefile-vla[scale]'") from None
    return torchao.optim


def load_checkpoint(path, method: str, dist: Dist | None = None) -> Checkpoint:
    """The newest complete checkpoint in a run folder (or one step folder).

    With `dist` also what resuming needs; without, weights and meta only.
    """
    places = ("meta.json", "step_*/meta.json", "checkpoints/step_*/meta.json")
    found = sorted(meta.parent for place in places for meta in Path(path).glob(place))
    if not found:
        reason = "" if Path(path).exists() else ": no such folder"
        raise UserError(f"no checkpoint in {path}{reason}")
    path = found[-1].resolve()
    file, train_state, local_state = path / "meta.json", {}, {}
    try:
        meta = json.loads(file.read_text())
        if meta["method"] != method:
            raise UserError(f"{path} is a checkpoint of {meta['method']}, not of {method}")
        if meta["config"].get("optimizer") == "adamw8bit":
            torchao()
        file = path / "model.safetensors"
        tensors = load_file(file)
        for name in meta.get("shards", ()):  # an absent share would leave a hole, not an error
            file = path / "shards" / name
            safe_open(file, "pt")
        shards = {
            place: torch.empty(about.size, dtype=about.properties.dtype)
            for place, about in shard_places(path / "shards").items() if place.startswith("model.")
        }  # fmt: skip
        read_shards(path / "shards", shards)
        tensors |= {n.removeprefix("model."): t for n, t in shards.items()}
        tensors |= {name: tensors[owner] for name, owner in meta["tied"].items()}
        if dist:
            file = path / "train.pt"
            train_state = torch.load(file, map_location="cpu", weights_only=True)
            file = path / f"rank{dist.rank % meta['processes']}.pt"
            local_state = torch.load(file, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise UserError(f"the checkpoint lacks {file}") from None
    except (SafetensorError, ValueError, KeyError, EOFError, RuntimeError, pickle.PickleError):
        hint = f"; remove {path} to use the one before" if len(found) > 1 else ""
        raise UserError(f"{file} is damaged or cut short{hint}") from None
    return Checkpoint(path, meta["step"], tensors, meta, train_state, local_state)


def resume_auto(cfg, dist, *marks):
    """--resume auto, and every restart by torchrun: goes on with the run in --out, if there is one
    (a checkpoint, or a file of a chain, `marks`), else starts it; so one command does for both."""
    restarted = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)) > 0
    if cfg.resume != "auto" and not (restarted and cfg.out and not cfg.resume):
        return cfg
    if not cfg.out:
        raise UserError("--resume auto needs --out RUN")
    places, out = ("checkpoints/step_*/meta.json", *marks), Path(cfg.out)
    found = dist.share(any(list(out.glob(place)) for place in places))
    cfg.resume = cfg.out if found else ""
    if dist.main and not found:  # stopped before its first checkpoint
        (out / "metrics.jsonl").unlink(missing_ok=True)
    dist.barrier()
    return cfg


# --- training at any size: memory, LoRA, recomputing, shards --------------------------------------
# No equation of a paper. What trains is float32, with float32 gradients and optimizer state (8 bits
# by adamw8bit); autocast rounds it to bfloat16 in the products. `--frozen bf16` stores the rest so.

SAVERS = {  # flags that save memory, and whether a Config leaves them unused
    "--grad-checkpoint": lambda cfg, dist: not cfg.grad_checkpoint,
    "--frozen bf16": lambda cfg, dist: cfg.frozen == "fp32",
    "--lora 32": lambda cfg, dist: not getattr(cfg, "lora", 1),
    "--optimizer adamw8bit": lambda cfg, dist: cfg.optimizer != "adamw8bit" and cfg.shard == "none",
    "--shard full on more GPUs": lambda cfg, dist: cfg.shard == "none",
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


def add_lora(layers, rank):
    """Puts a LoRA around every matrix of `layers`, a ModuleList; all else in them stands still."""
    layers.requires_grad_(False)
    for name in [n for n, m in layers.named_modules() if isinstance(m, nn.Linear)]:
        parent, _, leaf = name.rpartition(".")
        parent = layers.get_submodule(parent)
        setattr(parent, leaf, LoRA(getattr(parent, leaf), rank))


def place(model, cfg, dist, say, replicate=None):
    """A built model, ready to train on `dist.device`: `model.blocks()` one by one compiled,
    recomputed, sharded as the flags say; `replicate`: a part that --shard leaves whole. Says what
    it takes, by part; what cannot fit is a UserError that names the flags which would help."""
    store_frozen(model, cfg, dist.device)
    split = dist.processes if cfg.shard == "full" else 1
    copied = {*replicate.parameters()} if replicate is not None else set()
    rows, there = memory_rows(model, cfg, split, copied), device_memory(dist.device)
    need, kind = sum(map(sum, rows.values())), "GPU" if dist.device.type == "cuda" else "machine"
    say(f"{'memory of a process:':24} {'weights':>10} {'gradients':>10} {'optimizer':>10}")
    for name, parts in rows.items():
        say(f"  {name:22} " + " ".join(f"{size(n):>10}" for n in parts))
    if need > there:
        flags = ", ".join(flag for flag, unused in SAVERS.items() if unused(cfg, dist))
        raise UserError(f"{size(need)} for weights, gradients and optimizer do not fit in this "
                        f"{kind}'s {size(there)}; what helps: {flags or 'more GPUs'}")  # fmt: skip
    say(f"  sum {size(need)}; {size(there - need)} of this {kind} are left for activations")
    for block in model.blocks():
        enclose(block, cfg, getattr(model, "gates", None))
    if split > 1:
        shard(model, cfg, dist, copied)
    return model.to(dist.device)


def store_frozen(model, cfg, device):
    """--frozen bf16, where products are in bfloat16 anyway."""
    if cfg.frozen == "bf16" and in_bf16(device, cfg.dtype):
        for p in model.parameters():
            if not p.requires_grad:
                p.data = p.data.bfloat16()


def size(n):
    """Bytes -> 1.5 GB"""
    return f"{n / 1e9:.2f} GB" if n >= 1e9 else f"{n / 1e6:.2f} MB"


def memory_rows(model, cfg, split=1, copied=()):
    """-> {part of the model: bytes of (weights, gradients, optimizer) in one of `split` shares}."""
    rows = {}
    for name, p in model.named_parameters():
        row = rows.setdefault(name.partition(".")[0], [0, 0, 0])
        n = p.numel() / (1 if p in copied else split)
        muon = cfg.optimizer == "muon" and p.dim() == 2 and "embed" not in name
        state = 2 if cfg.optimizer == "adamw8bit" else 4 if muon else 8
        for i, each in enumerate((p.element_size(), 4 * p.requires_grad, state * p.requires_grad)):
            row[i] += n * each
    return rows


def device_memory(device):
    """Bytes that this process may fill: of its GPU, or its share of the machine's memory."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device)
    physical = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return physical / int(os.environ.get("LOCAL_WORLD_SIZE", 1))


def enclose(block, cfg, gates=None):
    """Compiles a block (--compile), and keeps its input alone for the backward pass, which computes
    the rest anew (--grad-checkpoint) with what `gates.now` was at the time."""
    # all blocks have one code, of which torch keeps eight versions: a block's number makes another
    known = "isolate_recompiles" in inspect.signature(torch.compile).parameters
    apart = {"isolate_recompiles": True} if known else {}
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
            f"--shard full: --optimizer {cfg.optimizer} needs whole matrices; take adamw"
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
    """Gradients are averaged over the processes in a step's last micro-batch alone."""
    if isinstance(ddp, DistributedDataParallel):
        ddp.require_backward_grad_sync = last
    elif isinstance(ddp, FSDPModule):
        ddp.set_requires_gradient_sync(last)


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
    """A Config resumed on another number of processes: the same samples in each step, by other
    --batch and --accumulate."""
    wrote, now = resumed.meta["processes"], dist.processes
    total = cfg.batch * cfg.accumulate * wrote
    if wrote == now:
        return cfg
    if total % now:
        raise UserError(f"{total} samples a step do not divide among {now} processes")
    cfg.batch = math.gcd(cfg.batch, total // now)
    cfg.accumulate = total // now // cfg.batch
    return cfg


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


def feed(batches, todo, workers):
    """The batches `todo`, in order; what goes wrong with them ends in one line."""
    loader = DataLoader(  # with a generator of its own it leaves the global one alone: exact resume
        batches, batch_size=None, sampler=todo, num_workers=workers, generator=torch.Generator()
    )
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


# --- run folder -----------------------------------------------------------------------------------


class Run:
    """runs/<method>-<world>-<seed>-<time>: config.json, script copy, metrics.jsonl, result.json."""

    def __init__(self, cfg, method, script, dist, total, resumed: Checkpoint | None = None):
        self.dist, self.total, self.bar = dist, total, None
        first = resumed.step if resumed else 0
        name = f"{method}-{cfg.world}-{cfg.seed}-{time.strftime('%Y%m%d-%H%M%S')}"
        new = Path("runs", re.sub(r"[^\w.-]", "-", name))
        while new.exists():  # two runs in one second
            new = new.with_name(new.name + "+")
        folder = resumed.run if resumed else cfg.out or new
        self.folder = Path(dist.share(str(folder)))
        kept = [self.folder / name for name in ("metrics.jsonl", "result.json")]
        if not resumed and dist.share(any(file.exists() and file.stat().st_size for file in kept)):
            raise UserError(f"{folder} holds a run: --resume {folder}, or another --out")
        if not dist.main:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        config = {"method": method, "config": dataclasses.asdict(cfg), **start_facts(dist)}
        write_json(self.folder / (f"config-{first:08d}.json" if first else "config.json"), config)
        shutil.copy(script, self.folder)
        metrics = self.folder / "metrics.jsonl"
        lines = metrics.read_text().splitlines(keepends=True) if metrics.exists() else []
        whole = [line for line in lines if line.endswith("\n")]  # a crash may have torn the last
        draft = metrics.with_suffix(".tmp")
        draft.write_text("".join(line for line in whole if json.loads(line)["step"] <= first))
        draft.replace(metrics)
        self.file = open(metrics, "a", buffering=1)
        self.bar = tqdm(total=total, initial=first, disable=None, leave=False)  # None: terminals

    def say(self, text: str) -> None:
        if self.dist.main:
            tqdm.write(text)
            sys.stdout.flush()

    def record(self, step: int, values: dict) -> None:
        if self.dist.main:
            line = {"step": step, "time": round(time.time(), 2), **values}
            self.file.write(json.dumps(line, default=lambda array: array.tolist()) + "\n")

    def log(self, step: int, values: dict[str, float]) -> None:
        """One aligned line on the console, one line in metrics.jsonl."""
        self.record(step, values)
        text = f"step {step:>{len(str(self.total))}}/{self.total}"
        for name, value in values.items():
            text += f"  {name} {human(value) if abs(value) >= 1e6 else f'{value:.4g}':<9}"
        self.say(text.rstrip())

    def progress(self, step: int) -> None:
        if self.bar is not None:
            self.bar.update(step - self.bar.n)

    def result(self, values: dict) -> None:
        if self.dist.main:
            write_json(self.folder / "result.json", values)

    def close(self) -> None:
        if self.dist.main:
            self.bar.close()
            self.file.close()


def start_facts(dist: Dist) -> dict:
    """What is needed to repeat a start of a run: command, commit, versions, kind of machine."""
    git = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]
    commit = shutil.which("git") and subprocess.run(git, capture_output=True, text=True).stdout
    cuda = dist.device.type == "cuda"
    return {
        "command": shlex.join(["python", *sys.argv]),
        "commit": (commit or "").strip(),
        "python": platform.python_version(),
        **{name: metadata.version(name) for name in ("torch", "transformers", "numpy")},
        "device": torch.cuda.get_device_name() if cuda else platform.machine() + " CPU",
        "threads": torch.get_num_threads(),
        "processes": dist.processes,
    }


# --- numbers --------------------------------------------------------------------------------------


def ci95(successes: int, n: int) -> tuple[float, float]:
    """95% Wilson interval of a success rate, in 0..1."""
    if n == 0:
        return 0.0, 1.0
    z, rate = 1.959964, successes / n
    centre = (rate + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(rate * (1 - rate) / n + z * z / (4 * n * n))
    return max(centre - half, 0.0), min(centre + half, 1.0)


def ci95_mean(values: list[float]) -> tuple[float, float]:
    """95% t-interval of a mean over seeds; one value says nothing about its spread: nan."""
    free = len(values) - 1
    if free < 1:
        return math.nan, math.nan
    table = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228)
    t = table[free - 1] if free <= 10 else 1.96 + 2.372 / free + 2.82 / free**2  # to 0.001
    half = t * statistics.stdev(values) / math.sqrt(len(values))
    return statistics.fmean(values) - half, statistics.fmean(values) + half


def lr_at(step: int, base: float, warmup: int, total: int, min_lr: float = 0.0) -> float:
    """Linear warm-up, then half a cosine from `base` to `min_lr`; steps count from 0."""
    if step < warmup:
        return base * (step + 1) / warmup
    done = min((step - warmup) / max(total - warmup, 1), 1.0)
    return min_lr + (base - min_lr) * 0.5 * (1 + math.cos(math.pi * done))


def param_counts(model: torch.nn.Module) -> dict[str, int]:
    total = sum(p.numel() for p in model.parameters())
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    return {"total": total, "trainable": trainable, "frozen": total - trainable}


def human(n: float) -> str:
    """1800000 -> 1.8M"""
    for unit in ("", "K", "M", "B"):
        if abs(n) < 999.95 or unit == "B":
            return f"{n:.3g}{unit}"
        n /= 1000


def peak_memory() -> int:
    """Bytes: the GPU's peak if there is one in use, else this process's."""
    unit = 1 if sys.platform == "darwin" else 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    return torch.cuda.max_memory_allocated() or peak


# --- backbone -------------------------------------------------------------------------------------

BACKBONES = {
    "tiny": str(Path(__file__).resolve().parent / "assets" / "tiny"),
    "Qwen2.5-VL-3B": "Qwen/Qwen2.5-VL-3B-Instruct",
    "Qwen2.5-VL-7B": "Qwen/Qwen2.5-VL-7B-Instruct",
    "Qwen3-VL-2B": "Qwen/Qwen3-VL-2B-Instruct",
    "Qwen3-VL-4B": "Qwen/Qwen3-VL-4B-Instruct",
    "Qwen3-VL-8B": "Qwen/Qwen3-VL-8B-Instruct",
    "VITA-1.5": "VITA-MLLM/VITA-1.5",
    "Eagle2-2B": "nvidia/Eagle2-2B",
}
named = inspect.signature(transformers.Qwen2Model.forward).parameters
CACHE = "cache" if "cache" in named else "past_key_values"  # so called until transformers 5.23
SIZES = Path(__file__).resolve().parent / "assets" / "backbones.json"  # published configurations


def blank() -> bool:
    """Under `torch.device("meta")`, for --describe: models have their sizes and no weights."""
    return torch.get_default_device().type == "meta"


@contextmanager
def quiet():
    """No warnings of the library in here."""
    level = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()
    try:
        yield
    finally:
        transformers.logging.set_verbosity(level)


def settings_of(name) -> dict:
    """A backbone's config.json; where nothing is to be loaded, the published one kept here."""
    sizes = json.loads(SIZES.read_text())
    if blank() and name in sizes:
        return sizes[name]["config"]
    path = BACKBONES.get(name, name)
    if file := cached_file(path, "config.json"):
        return json.loads(Path(file).read_text())
    raise OSError(f"{path} has no config.json")


def load_backbone(name, dtype=torch.float32):
    """A name, folder or hub id -> (Qwen3-VL, Qwen2.5-VL or Eagle2 in eval mode, its Processor).

    The model is the library's; only a Qwen's vision tower attends to all equal-sized images in one
    call. On the meta device: without weights, and with the embedded backbone's Processor.
    """
    path, flag = BACKBONES.get(name, name), f"--backbone {name}"
    if not Path(path).is_dir() and not re.fullmatch(r"\w[\w.-]*/[\w.-]+", path):
        near, known = nearest(name, BACKBONES), ", ".join(BACKBONES)
        raise UserError(f"unknown {flag}: did you mean {near}? ({known}, DIR or OWNER/NAME)")
    if path == BACKBONES["VITA-1.5"]:
        raise UserError(f"{flag}: only vita_vla.py takes it, as it is read without its head")
    disable_progress_bar()
    try:
        settings = settings_of(name)
        family = settings.get("model_type", "model without model_type")
        eagle = family.startswith("eagle")
        if not eagle and family not in ("qwen3_vl", "qwen2_5_vl"):
            raise UserError(f"{flag} is a {family}: take a Qwen3-VL, a Qwen2.5-VL or an Eagle2")
        if blank():
            config = eagle_config(settings) if eagle else AutoConfig.for_model(**settings)
            tiny = BACKBONES["tiny"]
            vlm = AutoModelForImageTextToText.from_config(config)
            vlm.config.words = settings.get("words")
            return vlm.eval(), Processor(tiny, AutoConfig.from_pretrained(tiny))
        if eagle:
            return load_eagle(path, eagle_config(settings), dtype)
        vlm = AutoModelForImageTextToText.from_pretrained(
            path, dtype=dtype, use_safetensors=True
        )
        processor = Processor(path, vlm.config)
    except SafetensorError as error:
        files = " or ".join(sorted(str(file) for file in Path(path).glob("*.safetensors"))) or path
        raise UserError(f"{flag}: {files} is damaged or cut short, fetch it again") from error
    except (OSError, ValueError) as error:
        reason, known = str(error).partition("\n")[0], Path(path).is_dir()
        hint = "" if known else f"; `hf download {path} --local-dir DIR`, then --backbone DIR"
        raise UserError(f"{flag}: cannot load {path} ({reason}){hint}") from error
    return quick_vision(vlm).eval(), processor


@lru_cache(maxsize=8192)
def chat_ids(tokenizer, system, user, counts, answer):
    """One conversation, pictures of these many tokens first in the user's turn -> (ids of the
    prompt, ids of the answer and its end, or none)."""
    content = [{"type": "image"}] * len(counts) + [{"type": "text", "text": user}]
    messages = [{"role": "system", "content": [{"type": "text", "text": system}]}] if system else []
    messages += [{"role": "user", "content": content}]
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    sizes = iter(counts)
    text = re.sub(r"<\|image_pad\|>", lambda mark: mark[0] * next(sizes), text)
    end = answer + tokenizer.eos_token if answer else ""
    return tuple(tuple(tokenizer.encode(t, add_special_tokens=False)) for t in (text, end))


class Processor:
    """Text and pictures -> the arrays a Qwen-VL reads, in the loader's workers and when acting."""

    image = "<|image_pad|>"  # the word that a picture's tokens stand for

    def __init__(self, path, config):
        self.tokenizer = AutoTokenizer.from_pretrained(path)
        self.image_token_id = config.image_token_id
        self.pad_token_id = self.tokenizer.pad_token_id
        settings, _ = ImageProcessingMixin.get_image_processor_dict(path)
        self.patch, self.merge = settings["patch_size"], settings["merge_size"]
        self.temporal = settings["temporal_patch_size"]
        self.mean, self.std = settings["image_mean"], settings["image_std"]
        size = settings.get("size") or {}
        self.min_pixels = settings.get("min_pixels") or size["shortest_edge"]
        self.max_pixels = settings.get("max_pixels") or size["longest_edge"]

    def images(self, images):
        """list of (height, width, 3) uint8 -> pixel_values (patches, C) float32, their grids."""
        grain = self.patch, self.merge
        fitted = [fit(image, *grain, self.min_pixels, self.max_pixels) for image in images]
        parts = [patchify(f, *grain, self.temporal, self.mean, self.std) for f in fitted]
        grids = tuple((1, len(f) // self.patch, len(f[0]) // self.patch) for f in fitted)
        return np.concatenate(parts), grids

    def prompt(self, system, user, grids, answer=""):
        """-> (ids of the prompt, ids of the answer and its end, or none); see `chat_ids`."""
        counts = tuple(math.prod(grid) // self.merge**2 for grid in grids)
        return chat_ids(self.tokenizer, system, user, counts, answer)

    def mark(self, n):
        """How a picture of n tokens stands in a text."""
        return "<|vision_start|>" + self.image * n + "<|vision_end|>"

    def words(self, ids):
        """Ids -> readable text, without padding and with each picture as one mark."""
        text = self.tokenizer.decode(ids).replace(self.tokenizer.pad_token, "")
        return re.sub(f"({re.escape(self.image)})+", "<image>", text)

    def pad(self, rows, grids):
        """Rows of ids, the grids of each row's images -> left-padded input_ids (B, T), real (B, T)
        and position_ids (3, B, T)."""
        B, T = len(rows), max(len(ids) for ids in rows)
        input_ids, real = np.full((B, T), self.pad_token_id), np.zeros((B, T), bool)
        position_ids = np.zeros((3, B, T), np.int64)
        for b, (ids, grid) in enumerate(zip(rows, grids)):
            where = known_positions(tuple(ids), tuple(grid), self.image_token_id, self.merge)
            input_ids[b, -len(ids) :], real[b, -len(ids) :] = ids, True
            position_ids[:, b, -len(ids) :] = where
        arrays = {"input_ids": input_ids, "real": real, "position_ids": position_ids}
        return {name: torch.from_numpy(array) for name, array in arrays.items()}


# --- pixels and positions -------------------------------------------------------------------------


def fit(image, patch=16, merge=2, min_pixels=65536, max_pixels=16777216):
    """image (H, W, 3) uint8 -> the same picture with sides that are multiples of patch * merge."""
    sides, unit = np.array(image.shape[:2]), patch * merge
    fitted = np.round(sides / unit) * unit
    if fitted.prod() > max_pixels:
        shrink = math.sqrt(sides.prod() / max_pixels)
        fitted = np.maximum(np.floor(sides / shrink / unit), 1) * unit
    elif fitted.prod() < min_pixels:
        grow = math.sqrt(min_pixels / sides.prod())
        fitted = np.ceil(sides * grow / unit) * unit
    if (fitted == sides).all():
        return image
    height, width = fitted.astype(int).tolist()
    return np.asarray(Image.fromarray(image).resize((width, height), Image.Resampling.BICUBIC))


def patchify(image, patch=16, merge=2, temporal=2, mean=0.5, std=0.5):
    """image (..., H, W, 3) uint8 -> patches (..., H/P * W/P, C) float32, in merge x merge blocks.

    Each value is (image / 255 - mean) / std; a still picture fills `temporal` equal frames.
    """
    lead, (height, width, _) = image.shape[:-3], image.shape[-3:]
    rows, columns = height // patch // merge, width // patch // merge
    levels = (np.arange(256.0)[:, None] * (1 / 255)).astype(np.float32)
    levels = (levels - np.float32(mean)) / np.float32(std)  # all possible values, (256, 1 or 3)
    x = np.broadcast_to(levels, (256, 3))[image, (0, 1, 2)]
    x = x.reshape(-1, rows, merge, patch, columns, merge, patch, 3)
    x = x.transpose(0, 1, 4, 2, 5, 7, 3, 6)  # (B, rows, columns, M, M, 3, P, P)
    x = np.repeat(x[..., None, :, :], temporal, axis=-3)  # (..., 3, temporal, P, P)
    return x.reshape(*lead, rows * columns * merge**2, -1)


def mrope_positions(ids, grids, image_token_id, merge=2):
    """ids (T,) of one prompt, grids [(1, H/P, W/P)] of its images in order -> positions (3, T).

    Text counts up on all three axes; an image sits at one time, with its own rows and columns, and
    the text behind it goes on after the larger of the two. The same for Qwen2.5-VL and Qwen3-VL.
    """
    ids, at, now = np.asarray(ids), 0, 0
    positions = np.zeros((3, len(ids)), np.int64)
    for _, h, w in grids:
        h, w = int(h) // merge, int(w) // merge
        text = int(np.argmax(ids[at:] == image_token_id))  # tokens before the image
        positions[:, at : at + text] = now + np.arange(text)
        at, now = at + text, now + text
        positions[:, at : at + h * w] = now + np.indices((1, h, w)).reshape(3, -1)
        at, now = at + h * w, now + max(h, w)
    positions[:, at:] = now + np.arange(len(ids) - at)
    return positions


known_positions = lru_cache(maxsize=8192)(mrope_positions)  # prompts come again and again


# --- attention ------------------------------------------------------------------------------------


def attend(q, k, v, mask=None, scale=None):
    """softmax(q k^T * scale) v for (B, heads, T, d); the mask broadcasts, True where a query looks.

    On a GPU the library's fused kernel. On a CPU, with prompts as short as the tiny backbone's, the
    written-out form: the fused kernel's backward pass takes five times as long in bfloat16 there.
    """
    if q.is_cuda:
        return scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)
    scores = (q * (scale or q.shape[-1] ** -0.5)) @ k.transpose(-1, -2)
    if mask is not None:
        lowest = torch.finfo(scores.dtype).min
        scores = scores + torch.zeros_like(mask, dtype=scores.dtype).masked_fill_(~mask, lowest)
    return scores.softmax(-1) @ v


def causal_mask(real):
    """real (B, T) bool -> (B, 1, T, T), True where a query may look; padding sees itself alone."""
    T = real.shape[1]
    causal = torch.ones(T, T, dtype=torch.bool, device=real.device).tril()
    own = torch.eye(T, dtype=torch.bool, device=real.device)
    return ((causal & real[:, None, :] & real[:, :, None]) | own)[:, None]


def image_rows(bounds):
    """Where images begin and the last one ends -> their patches' rows, [(images, length)] by
    length, and the order back. Kept at the tensor, which all layers of a tower are given: finding
    the lengths makes a GPU wait."""
    if not hasattr(bounds, "rows"):
        starts, lengths = bounds[:-1], bounds.diff()
        rows = [
            starts[lengths == length, None] + torch.arange(length, device=bounds.device)
            for length in lengths.unique().tolist()
        ]
        bounds.rows = rows, torch.cat([r.flatten() for r in rows]).argsort()
    return bounds.rows


def block_attention(module, q, k, v, attention_mask=None, scaling=None, cu_seq_lens_q=None, **_):
    """Attention inside each image: (1, heads, all patches, D) -> (1, all patches, heads, D).

    All images (or windows) of one length share one call, where the library calls once per image.
    """
    packed = [x[0].transpose(0, 1) for x in (q, k, v)]  # (all patches, heads, D)
    groups, back = image_rows(cu_seq_lens_q)
    out = []
    for rows in groups:
        picked = (x.index_select(0, rows.flatten()).unflatten(0, rows.shape) for x in packed)
        q, k, v = (x.transpose(1, 2) for x in picked)  # (images, heads, length, D)
        out.append(attend(q, k, v, scale=scaling).transpose(1, 2).flatten(0, 1))
    return torch.cat(out).index_select(0, back)[None], None


class WholePatch(nn.Conv3d):
    """A convolution whose kernel covers its input: the product that it is, several times faster."""

    def forward(self, x):
        return nn.functional.linear(x.flatten(1), self.weight.flatten(1), self.bias)


def quick_vision(model):
    """Lets the vision tower of a Qwen-VL attend within all its images at once, and read a patch by
    one product; weights and their names stay."""
    model.model.visual.patch_embed.proj.__class__ = WholePatch
    # The library tells image boundaries only to implementations with "flash" in their name.
    AttentionInterface.register("flash_blocks", block_attention)
    model.set_attn_implementation({"vision_config": "flash_blocks"})
    return model


# --- a backbone as see() and read() ---------------------------------------------------------------


def short_attention(module, q, k, v, mask, scaling=None, **_):
    groups = module.num_key_value_groups
    k, v = k.repeat_interleave(groups, dim=1), v.repeat_interleave(groups, dim=1)
    return attend(q, k, v, mask, scaling).transpose(1, 2), None


AttentionInterface.register("short", short_attention)
transformers.AttentionMaskInterface.register("short", sdpa_mask)


class QwenVL(nn.Module):
    """A Qwen-VL, or an Eagle2, without its vocabulary head, which no loss here needs."""

    def __init__(self, vlm):
        super().__init__()
        self.model = vlm.model
        self.model.language_model.config._attn_implementation = "short"
        self.width = vlm.config.get_text_config().hidden_size
        self.model.requires_grad_(False)  # what sees is frozen in every stage
        self.language.requires_grad_(True)

    @property
    def language(self):
        return self.model.language_model

    @torch.no_grad()
    def see(self, pixels, grids):
        """-> list of (picture tokens, D): what goes in at the bottom, then DeepStack's layers."""
        out = self.model.get_image_features(pixels, image_grid_thw=grids, return_dict=True)
        levels = [out.pooler_output, *(getattr(out, "deepstack_features", None) or [])]
        return [torch.cat(tuple(pictures)) for pictures in levels]

    def read(self, x, prompt, mask, places, seen, cache=None):
        """x (B, T, D) embedded, places (B, T) of the pictures' tokens `seen` -> (B, T, D)."""
        deep = {}
        if len(seen) > 1:
            deep = dict(visual_pos_masks=places, deepstack_visual_embeds=seen[1:])
        return self.language(
            inputs_embeds=x, attention_mask=mask, position_ids=prompt["position_ids"],
            use_cache=cache is not None, **{CACHE: cache}, **deep,
        ).last_hidden_state  # fmt: skip


class Vita15(nn.Module):
    """VITA-1.5 without audio: InternViT, two-layer projector, Qwen2.5; pixels (n, 3, h, w)."""

    def __init__(self, config, vision_config):
        super().__init__()
        self.vision = transformers.InternVLVisionModel(vision_config)
        self.language = transformers.Qwen2Model(config)
        self.width, C = config.hidden_size, 4 * vision_config.hidden_size
        self.projector = nn.Sequential(
            nn.Linear(C, self.width), nn.GELU(), nn.Linear(self.width, self.width)
        )
        self.language.config._attn_implementation = "short"
        self.vision.requires_grad_(False)
        self.projector.requires_grad_(False)

    @torch.no_grad()
    def see(self, pixels, grids):
        h = 0.5 * self.vision(pixels).last_hidden_state[:, 1:]  # without the class token
        rows, columns = (int(g) // 2 for g in grids[0, 1:])
        h = h.unflatten(1, (rows, 2, columns, 2)).transpose(2, 3)  # 2 x 2 patches become one token
        return [self.projector(h.reshape(-1, 4 * h.shape[-1]))]

    read = QwenVL.read


class VitaProcessor(Processor):
    """Pictures as squares of `size` pixels (VITA-VLA: 200, 49 tokens) and prompts for `Vita15`."""

    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)

    def __init__(self, path, patch, size=200):
        with quiet():  # the library wonders at a config.json that it does not know
            self.tokenizer = AutoTokenizer.from_pretrained(path)
        self.image_token_id = self.tokenizer.convert_tokens_to_ids(self.image)
        self.pad_token_id = self.tokenizer.convert_tokens_to_ids("<|endoftext|>")
        self.patch, self.merge, self.size = patch, 2, size
        for word in (self.image, "<|video_pad|>", "<|endoftext|>"):
            if word not in self.tokenizer.get_vocab():
                raise UserError(f"{path}: its tokenizer lacks {word}, a place for other vectors")
        if size // patch % 2 or size < 2 * patch:
            near = max(round(size / patch / 2), 1) * 2 * patch
            raise UserError(f"--size {size}: {path} reads 2 x 2 patches of {patch} pixels as one "
                            f"token; take {near}")  # fmt: skip

    def images(self, images):
        shape = self.size, self.size
        fitted = [Image.fromarray(i).resize(shape, Image.Resampling.BICUBIC) for i in images]
        x = np.stack([np.asarray(i, np.float32) / 255 for i in fitted])
        x = (x - np.float32(self.mean)) / np.float32(self.std)
        side = self.size // self.patch
        return x.transpose(0, 3, 1, 2), ((1, side, side),) * len(images)

    def mark(self, n):
        return self.image * n

    def pad(self, rows, grids):
        prompt = super().pad(rows, [()] * len(rows))  # text positions alone: no grids
        return prompt | {"position_ids": prompt["position_ids"][0]}


def vita_name(name):
    """A released VITA-1.5 weight's name -> ours; None for what is not used (audio, lm_head)."""
    if name.startswith(("model.audio_encoder.", "lm_head.")):
        return None
    if name.startswith("model.mm_projector."):
        return name.replace("model.mm_projector", "projector")
    head, _, rest = name.partition("model.vision_tower.vision_tower.")
    if head:
        return name.replace("model.", "language.", 1)
    for old, new in (
        ("encoder.layers", "encoder.layer"), ("class_embedding", "cls_token"),
        ("position_embedding", "position_embeddings"), (".ls1", ".lambda_1"), (".ls2", ".lambda_2"),
        ("patch_embedding", "patch_embeddings.projection"), (".norm1", ".layernorm_before"),
        (".norm2", ".layernorm_after"), ("attn.proj", "attention.projection_layer"),
        (".attn.", ".attention."),
    ):  # fmt: skip
        rest = rest.replace(old, new)
    return "vision." + rest


def qwen2_config(settings):
    """What a released config.json says of its Qwen2.5 -> the library's configuration."""
    known = {k: v for k, v in settings.items() if k in transformers.Qwen2Config().to_dict()}
    rope = {"rope_type": "default", "rope_theta": settings.get("rope_theta", 1e6)}
    return transformers.Qwen2Config(**(known | {"model_type": "qwen2", "rope_parameters": rope}))


INTERN_VIT = dict(
    attention_bias=True, use_qk_norm=False, use_absolute_position_embeddings=True,
    use_mean_pooling=True, norm_type="layer_norm", layer_norm_eps=1e-6,
)  # fmt: skip


def load_vita(path, size=200):
    """A folder with VITA-1.5's released files -> Vita15, VitaProcessor. A weight that is missing or
    surplus is an error that names it."""
    folder, tensors = Path(path), {}
    settings = json.loads((folder / "config.json").read_text())
    for file in sorted(folder.glob("*.safetensors")):
        try:
            with safe_open(file, "pt") as opened:
                for name in filter(vita_name, opened.keys()):
                    tensors[vita_name(name)] = opened.get_tensor(name).float()
        except SafetensorError:
            raise UserError(f"{file} is damaged or cut short, fetch it again") from None
    for name in [n for n in tensors if ".attention.qkv." in n]:  # three matrices in one
        for part, value in zip("qkv", tensors.pop(name).chunk(3)):
            tensors[name.replace("qkv", f"{part}_proj")] = value
    try:
        patches = tensors["vision.embeddings.patch_embeddings.projection.weight"]
        places = tensors["vision.embeddings.position_embeddings"].shape[1] - 1
        hidden, patch = patches.shape[0], patches.shape[-1]
        vision_config = transformers.InternVLVisionConfig(
            **INTERN_VIT, hidden_size=hidden, num_attention_heads=max(hidden // 64, 1),
            num_hidden_layers=len({n.split(".")[3] for n in tensors if "encoder.layer." in n}),
            intermediate_size=tensors["vision.encoder.layer.0.mlp.fc1.bias"].shape[0],
            patch_size=patch, image_size=round(math.sqrt(places)) * patch,
        )  # fmt: skip
        config = qwen2_config(settings)
        model = Vita15(config, vision_config)
        missing, surplus = model.load_state_dict(tensors, strict=False)
    except (KeyError, RuntimeError) as error:
        raise UserError(f"{path} is no VITA-1.5: {str(error).splitlines()[-1]}") from None
    if missing or surplus:
        what = f"lacks {missing[0]}" if missing else f"has a surplus weight, {surplus[0]}"
        raise UserError(f"{path} does not fit VITA-1.5: it {what}")
    return model.eval(), VitaProcessor(path, patch, size)


def released(name):
    """A backbone's folder; of one on the hub, all its files, downloaded."""
    path = BACKBONES.get(name, name)
    if Path(path).is_dir():
        return path
    try:
        return snapshot_download(path)
    except (OSError, ValueError) as error:
        raise UserError(f"--backbone {name}: `hf download {path} --local-dir DIR`, then "
                        "--backbone DIR") from error  # fmt: skip


def load_vlm(name, size=200):
    """`--backbone` -> a VLM with see() and read(), its processor. size: of VITA-1.5's pictures."""
    path = BACKBONES.get(name, name)
    if path == BACKBONES["VITA-1.5"] and blank():
        settings = settings_of("VITA-1.5")
        vision = transformers.InternVLVisionConfig(**INTERN_VIT, **settings["vision_config"])
        tiny = BACKBONES["tiny"]
        return Vita15(qwen2_config(settings), vision), VitaProcessor(tiny, vision.patch_size[0])
    path = released(name) if path == BACKBONES["VITA-1.5"] else path
    config = Path(path) / "config.json"
    if config.exists() and "vita" in json.loads(config.read_text()).get("model_type", "").lower():
        return load_vita(path, size)
    vlm, processor = load_backbone(name)
    return QwenVL(vlm), processor


# --- Eagle2, InstructVLA's VLM: SigLIP, pixel shuffle, LayerNorm and MLP, Qwen2.5 -----------------

EAGLE = {  # released names -> those of the library's InternVL, which has the same parts
    "vision_model.vision_model.": "model.vision_tower.",
    "language_model.model.": "model.language_model.",
    "language_model.lm_head.": "lm_head.",
    "mlp1.0.": "model.multi_modal_projector.layer_norm.",
    "mlp1.1.": "model.multi_modal_projector.linear_1.",
    "mlp1.3.": "model.multi_modal_projector.linear_2.",
}


def eagle_config(settings):
    """Eagle2's config.json -> an InternVL with SigLIP in the place of its InternViT."""
    text = qwen2_config(settings.get("llm_config") or settings["text_config"])
    wanted = transformers.SiglipVisionConfig().to_dict()
    vision = {k: v for k, v in settings["vision_config"].items() if k in wanted}
    vision |= {"model_type": "siglip_vision_model", "vision_use_head": False}  # patches alone
    return transformers.InternVLConfig(
        text_config=text, vision_config=transformers.SiglipVisionConfig(**vision),
        downsample_ratio=settings.get("downsample_ratio", 0.5),
        vision_feature_layer=settings.get("select_layer", -1),
        vision_feature_select_strategy="full", tie_word_embeddings=text.tie_word_embeddings,
    )  # fmt: skip


def load_eagle(path, config, dtype):
    """Eagle2's released files -> the library's model, EagleProcessor. A weight that is missing,
    surplus or of another shape is an error that names it."""
    processor = EagleProcessor(path, config.vision_config)
    config.image_token_id = processor.image_token_id
    with quiet():  # what does not fit is said below
        vlm, report = transformers.InternVLForConditionalGeneration.from_pretrained(
            path, config=config, dtype=dtype, output_loading_info=True,
            ignore_mismatched_sizes=True, key_mapping={f"^{k}": v for k, v in EAGLE.items()},
        )  # fmt: skip
    surplus = [n for n in report["unexpected_keys"] if ".head." not in n]  # SigLIP's pooling
    shapes = [entry[0] for entry in report["mismatched_keys"]]
    for what, names in (("lacks", report["missing_keys"]), ("has a surplus weight,", surplus),
                        ("has another shape of", shapes)):  # fmt: skip
        if names:
            raise UserError(f"{path} does not fit Eagle2: it {what} {eagle_name(min(names))}")
    return vlm.eval(), processor


def eagle_name(name):
    """The library's name of a weight -> the released one."""
    for old, new in EAGLE.items():
        if name.startswith(new):
            return name.replace(new, old, 1)
    return name


@lru_cache(maxsize=8192)
def plain_chat(tokenizer, system, user, answer):
    """One conversation in Qwen's markup -> (ids of the prompt, ids of the answer and its end)."""
    text = f"<|im_start|>system\n{system}<|im_end|>\n" if system else ""
    text += f"<|im_start|>user\n{user}<|im_end|>\n<|im_start|>assistant\n"
    end = answer + tokenizer.eos_token if answer else ""
    return tuple(tuple(tokenizer.encode(t, add_special_tokens=False)) for t in (text, end))


class EagleProcessor(VitaProcessor):
    """One tile a picture (448 pixels, 256 tokens) and InstructVLA's prompts."""

    image, mean, std = "<IMG_CONTEXT>", (0.5,) * 3, (0.5,) * 3

    def __init__(self, path, vision):
        super().__init__(path, vision.patch_size, vision.image_size)

    def mark(self, n):
        return f"<img>{self.image * n}</img>"

    def prompt(self, system, user, grids, answer=""):
        marks = [self.mark(math.prod(grid) // self.merge**2) for grid in grids]
        if len(marks) > 1:
            marks = [f"<image {i + 1}>{mark}" for i, mark in enumerate(marks)]
        user = "\n".join([*marks, user.removeprefix("\n")])
        return plain_chat(self.tokenizer, system, user, answer)


# --- what a backbone consists of, and what became of it -------------------------------------------


def describe(name, load, builds) -> None:
    """--describe: parameters by part of a backbone, load(name) -> (model, processor), and of each
    of the models around it, {what: function -> model}."""
    with torch.device("meta"):
        models = {f"backbone {name}": load(name)[0]} | {w: build() for w, build in builds.items()}
    said = json.loads(SIZES.read_text()).get(name, {}).get("published", "embedded or your own")
    for what, model in models.items():
        parts = {}
        for full, p in model.named_parameters():
            part = re.match(r"(?:(\w+)\.)??(?:model\.)?(visual|vision\w*|multi_modal_projector|"
                            r"projector|language\w*|lm_head)\.", full)  # fmt: skip
            part = ".".join(filter(None, part.groups())) if part else full.partition(".")[0]
            counts = parts.setdefault(part, [0, 0])
            counts[0] += p.numel()
            counts[1] += p.numel() * p.requires_grad
        parts["all"] = [sum(column) for column in zip(*parts.values())]
        print(f"{what:32} {'total':>15} {'trainable':>15} {'frozen':>15}")
        for part, (total, trained) in parts.items():
            print(f"  {part:30} {total:15,} {trained:15,} {total - trained:15,}")
        if what.startswith("backbone"):
            print(f"  published: {said:,}" if isinstance(said, int) else f"  published: {said}")


PROCESSOR_FILES = ("preprocessor_config.json", "processor_config.json", "chat_template.json",
                   "video_preprocessor_config.json", "generation_config.json")  # fmt: skip


def export_backbone(vlm, name, tokenizer, out) -> None:
    """--export: a trained VLM as an ordinary Hugging Face checkpoint with the files that its
    tokenizer and processor are made of; name: the backbone it began as."""
    if vlm.config.model_type == "internvl":
        return export_eagle(vlm, name, tokenizer, out)
    out = new_folder(out)
    vlm.save_pretrained(out)
    tokenizer.save_pretrained(out)
    for file in PROCESSOR_FILES:
        path = BACKBONES.get(name, name)
        if found := cached_file(path, file, _raise_exceptions_for_missing_entries=False):
            shutil.copy(found, out)
    print(f"AutoModelForImageTextToText.from_pretrained({str(out)!r}) loads it")


def export_eagle(vlm, name, tokenizer, out) -> None:
    """The same in Eagle2's released layout, which the library has no class for."""
    folder, out = released(name), new_folder(out)
    copy_files(folder, out, leave=(".safetensors", ".index.json"))
    settings = json.loads((out / "config.json").read_text())
    text = settings.get("llm_config") or settings["text_config"]
    text["vocab_size"] = vlm.lm_head.out_features
    write_json(out / "config.json", settings)
    tensors = {eagle_name(n): t for n, t in vlm.state_dict().items()}
    write_weights(out / "model.safetensors", tensors)
    tokenizer.save_pretrained(out)
    print(f"{out} has Eagle2's released layout: what reads {name} reads it")


def export_vita(model, name, out) -> None:
    """A trained Vita15 in VITA-1.5's released layout: in its files, the language model replaced."""
    folder, out, ours = released(name), new_folder(out), model.state_dict()
    copy_files(folder, out, leave=(".safetensors",))
    for file in sorted(Path(folder).glob("*.safetensors")):
        tensors = load_file(file)
        for name in tensors:
            if (vita_name(name) or "").startswith("language."):
                tensors[name] = ours[vita_name(name)].contiguous()
        save_file(tensors, out / file.name, {"format": "pt"})
    print(f"{out} has VITA-1.5's released layout: what reads that reads it")


def copy_files(folder, out, leave) -> None:
    """Files and folders, without those whose names end so."""
    for item in Path(folder).iterdir():
        if item.is_dir():
            shutil.copytree(item, out / item.name)
        elif not item.name.endswith(leave):
            shutil.copy(item, out)


def new_folder(folder) -> Path:
    folder = Path(folder)
    if folder.exists() and any(folder.iterdir()):
        raise UserError(f"{folder} is not empty: another --out")
    folder.mkdir(parents=True, exist_ok=True)
    return folder


# --- action tokens --------------------------------------------------------------------------------


def cosines(H):
    """Orthonormal DCT-II (H, H): coefficients = cosines(H) @ chunk; its transpose inverts it."""
    k, n = np.arange(H)[:, None], np.arange(H)[None]
    basis = np.sqrt(2 / H) * np.cos(np.pi * k * (2 * n + 1) / (2 * H))
    basis[0] /= np.sqrt(2)
    return basis


class Fast:
    """Chunks (H, A) of normalised actions <-> ids of the vocabulary's <robot_action_i> tokens."""

    SCALE = 10  # coefficients are rounded to tenths

    def __init__(self, state, tokenizer):
        self.kept, self.bpe = state, Tokenizer.from_str(state["bpe"])
        self.low, self.high, self.H, self.A = (state[key] for key in ("low", "high", "H", "A"))
        self.first = tokenizer.convert_tokens_to_ids("<robot_action_0>")
        self.end = tokenizer.eos_token_id

    @classmethod
    def load(cls, state, tokenizer):
        return cls(state, tokenizer)

    def state(self):
        return self.kept

    @staticmethod
    def extend(vlm, tokenizer, count=2048):
        """Gives a backbone without action tokens `count` of them; --describe, which has no
        tokenizer of a published backbone, knows how many words that one has."""
        known, size = getattr(vlm.config, "words", None), vlm.get_input_embeddings().num_embeddings
        if known:
            vlm.resize_token_embeddings(max(known + count, size), mean_resizing=False)
        elif "<robot_action_0>" not in tokenizer.get_vocab():
            tokenizer.add_tokens([f"<robot_action_{i}>" for i in range(count)])
            with quiet():  # the library explains how it draws new words
                vlm.resize_token_embeddings(max(len(tokenizer), size))

    @classmethod
    def fit(cls, chunks, tokenizer):
        """Learns the byte pairs from a list of chunks (H, A)."""
        H, A = chunks[0].shape
        rounded = np.stack([cls.SCALE * cosines(H) @ c for c in chunks]).round().astype(int)
        low, high = int(rounded.min()), int(rounded.max())
        letters = [chr(256 + i) for i in range(high - low + 1)]
        size = sum(token.startswith("<robot_action_") for token in tokenizer.get_vocab())
        if len(letters) > size:
            raise UserError(f"--head fast: {len(letters)} coefficient values, {size} action tokens")
        lines = ["".join(letters[v - low] for v in values.ravel()) for values in rounded]
        bpe = Tokenizer(models.BPE())
        how = trainers.BpeTrainer(vocab_size=size, initial_alphabet=letters, show_progress=False)
        bpe.train_from_iterator(lines, how)
        return cls({"bpe": bpe.to_str(), "low": low, "high": high, "H": H, "A": A}, tokenizer)

    def encode(self, chunk):
        """(H, A) -> ids, closed by the end of turn; low frequencies of all dimensions first."""
        values = (self.SCALE * cosines(self.H) @ chunk).round().clip(self.low, self.high)
        letters = "".join(chr(256 + int(v) - self.low) for v in values.ravel())
        return tuple(self.first + i for i in self.bpe.encode(letters).ids) + (self.end,)

    def decode(self, rows):
        """(B, n) ids -> (B, H, A) float32; a coefficient that the model left unsaid is zero."""
        values = np.zeros((len(rows), self.H * self.A))
        for out, ids in zip(values, rows.tolist()):
            said = ids[: ids.index(self.end)] if self.end in ids else ids
            pieces = [self.bpe.id_to_token(i - self.first) for i in said if i >= self.first]
            letters = "".join(piece or "" for piece in pieces)[: len(out)]
            out[: len(letters)] = [ord(letter) - 256 + self.low for letter in letters]
        chunks = cosines(self.H).T @ values.reshape(-1, self.H, self.A) / self.SCALE
        return torch.from_numpy(chunks.astype(np.float32))


# --- fused linear losses --------------------------------------------------------------------------


class LinearLoss(torch.autograd.Function):
    """Sum over rows of a loss of the logits h @ head.T, which exist for `chunk` rows at a time.

    rows(part, logits, train) -> the losses of those rows (float32) and, to train, their slopes by
    the logits. Gradients are made on the way, in the dtypes of h and head, and only scaled in the
    backward pass, in place: it runs once.
    """

    @staticmethod
    def forward(ctx, h, head, rows, chunk, train):
        weight, total = head.to(h.dtype), h.new_zeros((), dtype=torch.float32)  # (V, D)
        grad_h = torch.empty_like(h) if train else None
        grad_head = torch.zeros_like(head) if train and ctx.needs_input_grad[1] else None
        for i in range(0, len(h), chunk):
            part = slice(i, i + chunk)
            losses, slopes = rows(part, h[part] @ weight.T, train)  # slopes (chunk, V)
            total += losses.sum()
            if train:
                grad_h[part] = slopes @ weight
            if grad_head is not None and head.dtype == h.dtype:
                grad_head.addmm_(slopes.T, h[part])
            elif grad_head is not None:  # a product of another dtype, never as large as the head
                for j in range(0, len(head), WORDS):
                    grad_head[j : j + WORDS] += slopes[:, j : j + WORDS].T @ h[part]
        ctx.grads = grad_h, grad_head
        return total

    @staticmethod
    def backward(ctx, slope):
        (grad_h, grad_head), ctx.grads = ctx.grads, None
        if grad_head is not None:
            grad_head.mul_(slope)
        return grad_h.mul_(slope), grad_head, None, None, None


WORDS = 16384  # of the vocabulary at a time


def linear_loss(h, head, rows, chunk):
    """`LinearLoss` with the products in autocast's dtype; chunk 0: 512 rows on a GPU, else 256."""
    device = h.device.type
    if torch.is_autocast_enabled(device):
        h = h.to(torch.get_autocast_dtype(device))
    train = torch.is_grad_enabled() and (h.requires_grad or head.requires_grad)
    chunk = chunk or (512 if h.is_cuda else 256)  # fewer read and write the head's gradient less
    with torch.autocast(device, enabled=False):
        return LinearLoss.apply(h, head, rows, chunk, train)


def linear_kl(h, head, h_teacher, head_teacher, T=1.0, chunk=0):
    """Mean over rows of KL(softmax(teacher / T) || softmax(student / T)); the teacher gets no
    gradient. h, h_teacher (n, D) and (n, D'), heads (V, D) and (V, D')."""
    h_teacher = h_teacher.detach()
    if torch.is_autocast_enabled(h.device.type):
        h_teacher = h_teacher.to(torch.get_autocast_dtype(h.device.type))
    weight_teacher = head_teacher.detach().to(h_teacher.dtype)

    def rows(part, logits, train):
        teacher = h_teacher[part] @ weight_teacher.T  # (chunk, V)
        if triton_runs(logits):
            losses = logits.new_empty(len(logits), dtype=torch.float32)
            V, sizes = logits.shape[1], dict(BLOCK=4096, TRAIN=train, num_warps=8)
            kernel(kl_rows)[(len(logits),)](logits, teacher, losses, V, 1 / T, **sizes)
            return losses, logits
        log_q, log_p = ((x.float() / T).log_softmax(-1) for x in (logits, teacher))
        p = log_p.exp()
        losses = (p * (log_p - log_q)).sum(-1)
        return losses, log_q.exp_().sub_(p).div_(T).to(logits.dtype) if train else None

    return linear_loss(h, head, rows, chunk) / len(h)


def linear_cross_entropy(h, head, words, count=0, chunk=0):
    """h (n, D), head (V, D), words (n,) -> sum of -log softmax(h @ head.T)[word] over `count` (0:
    n, the mean), the likeliest words (n,)."""
    best = torch.empty_like(words)

    def rows(part, logits, train):
        said = words[part]
        if triton_runs(logits):
            losses = logits.new_empty(len(logits), dtype=torch.float32)
            V, sizes = logits.shape[1], dict(BLOCK=8192, TRAIN=train, num_warps=8)
            run = kernel(cross_entropy_rows)[(len(logits),)]
            run(logits, said, losses, best[part], V, **sizes)
            return losses, logits
        best[part] = logits.argmax(-1)
        log_p = logits.float().log_softmax(-1)
        losses = -log_p.gather(1, said[:, None])
        if not train:
            return losses, None
        slopes = log_p.exp_()
        slopes.scatter_add_(1, said[:, None], -torch.ones_like(losses))
        return losses, slopes.to(logits.dtype)

    return linear_loss(h, head, rows, chunk) / (count or len(words)), best


# --- kernels in Triton's language -----------------------------------------------------------------
# Triton is imported with the first kernel; a CPU needs none. In Triton's interpreter
# (TRITON_INTERPRET=1) the kernels run on a CPU too, slowly: that is how they are tested there.


class tl:
    """Stands for `triton.language` until `kernel` imports it: what the signatures below name."""

    class constexpr:
        """An argument that is fixed when the kernel is compiled."""


@lru_cache
def kernel(function):
    """A function in Triton's language -> its kernel."""
    global tl
    import triton
    import triton.language as tl

    return triton.jit(function)


@lru_cache
def has_triton():
    return importlib.util.find_spec("triton") is not None


def triton_runs(x):
    """Whether kernels take this tensor: on a GPU, or in the interpreter."""
    interpreted = os.environ.get("TRITON_INTERPRET") == "1" and x.dtype != torch.float64
    return (x.is_cuda or interpreted) and has_triton()


def cross_entropy_rows(logits, words, losses, best, V, BLOCK: tl.constexpr, TRAIN: tl.constexpr):
    """A program a row: its loss, its likeliest word; to train, its logits become slopes."""
    row = tl.program_id(0).to(tl.int64)
    logits, word, columns = logits + row * V, tl.load(words + row), tl.arange(0, BLOCK)
    at_word, top, total, likeliest = tl.load(logits + word).to(tl.float32), -1e30, 0.0, 0
    for first in range(0, V, BLOCK):
        z = tl.load(logits + first + columns, first + columns < V, other=-float("inf"))
        z = z.to(tl.float32)
        high = tl.max(z, 0)
        likeliest = tl.where(high > top, first + tl.argmax(z, 0), likeliest)
        high = tl.maximum(high, top)
        total = total * tl.exp(top - high) + tl.sum(tl.exp(z - high), 0)
        top = high
    tl.store(losses + row, tl.log(total) + top - at_word)
    tl.store(best + row, likeliest)
    if TRAIN:
        for first in range(0, V, BLOCK):
            inside = first + columns < V
            z = tl.load(logits + first + columns, inside, other=-float("inf")).to(tl.float32)
            slope = tl.exp(z - top) / total - tl.where(first + columns == word, 1.0, 0.0)
            tl.store(logits + first + columns, slope, inside)


def kl_rows(student, teacher, losses, V, inverse, BLOCK: tl.constexpr, TRAIN: tl.constexpr):
    """A program a row: KL(teacher || student) at temperature 1 / inverse; to train, the student's
    logits become slopes."""
    row = tl.program_id(0).to(tl.int64)
    student, teacher, columns = student + row * V, teacher + row * V, tl.arange(0, BLOCK)
    top_s, total_s, top_t, total_t, cross = -1e30, 0.0, -1e30, 0.0, 0.0
    for first in range(0, V, BLOCK):
        inside = first + columns < V
        s = tl.load(student + first + columns, inside, other=-float("inf")).to(tl.float32) * inverse
        t = tl.load(teacher + first + columns, inside, other=-float("inf")).to(tl.float32) * inverse
        high_s, high_t = tl.maximum(tl.max(s, 0), top_s), tl.maximum(tl.max(t, 0), top_t)
        total_s = total_s * tl.exp(top_s - high_s) + tl.sum(tl.exp(s - high_s), 0)
        weight, shrink = tl.exp(t - high_t), tl.exp(top_t - high_t)
        total_t = total_t * shrink + tl.sum(weight, 0)
        cross = cross * shrink + tl.sum(tl.where(inside, weight * (t - s), 0.0), 0)
        top_s, top_t = high_s, high_t
    loss = cross / total_t - (top_t + tl.log(total_t)) + (top_s + tl.log(total_s))
    tl.store(losses + row, loss)
    if TRAIN:
        for first in range(0, V, BLOCK):
            inside = first + columns < V
            s = tl.load(student + first + columns, inside, other=0.0).to(tl.float32) * inverse
            t = tl.load(teacher + first + columns, inside, other=0.0).to(tl.float32) * inverse
            slope = tl.exp(s - top_s) / total_s - tl.exp(t - top_t) / total_t
            tl.store(student + first + columns, slope * inverse, inside)


class JointAttention(torch.autograd.Function):
    """Attention of right queries to left keys, all of them, and to right keys, causally, for
    prompts padded on the left in both halves. What is left gets no gradient."""

    @staticmethod
    def forward(ctx, q, k, v, first_L, first_R, scale):
        q, k, v = q.contiguous(), k.contiguous(), v.contiguous()
        (B, heads, T_R, D), (_, kv_heads, T, _) = q.shape, k.shape
        out, lse = torch.empty_like(q), q.new_empty(B, heads, T_R, dtype=torch.float32)
        side = 64 if q.element_size() * D <= 256 else 32  # of a block, for shared memory
        ctx.sizes = heads, heads // kv_heads, T - T_R, T_R, scale, D, side, side
        grid = -(-T_R // side), B * heads
        kernel(joint_forward)[grid](q, k, v, out, lse, first_L, first_R, *ctx.sizes, num_warps=8)
        ctx.save_for_backward(q, k, v, out, lse, first_L, first_R)
        return out

    @staticmethod
    def backward(ctx, slope):
        q, k, v, out, lse, *first = ctx.saved_tensors
        slope, (B, heads, T_R, _) = slope.contiguous(), q.shape
        delta = (slope.float() * out.float()).sum(-1)
        grads = torch.empty_like(q), torch.zeros_like(k), torch.zeros_like(v)
        given, blocks = (q, k, v, slope, lse, delta), -(-T_R // ctx.sizes[-1])
        run = kernel(joint_backward_q)[blocks, B * heads]
        run(*given, grads[0], *first, *ctx.sizes, num_warps=8)
        run = kernel(joint_backward_kv)[blocks, B * k.shape[1]]
        run(*given, *grads[1:], first[1], *ctx.sizes, num_warps=8)
        return *grads, None, None, None


def joint_attention(q, k, v, first_L, first_R, scale):
    """q (B, heads, T_R, d), k, v (B, kv heads, T_L + T_R, d), d a power of two from 16 on; the
    first real token of each half (B,) int32 -> (B, heads, T_R, d). Padding sees itself alone."""
    return JointAttention.apply(q, k, v, first_L, first_R, scale)


def joint_forward(
    q, k, v, out, lse, first_L, first_R, heads, groups, T_L, T_R, scale,
    D: tl.constexpr, M: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    """A program for M queries of one head, online softmax over blocks of N keys."""
    at, head = tl.program_id(0) * M, tl.program_id(1).to(tl.int64)
    m, n, d = at + tl.arange(0, M), tl.arange(0, N), tl.arange(0, D)
    start_L, start_R = tl.load(first_L + head // heads), tl.load(first_R + head // heads)
    mine, keys = head * T_R, head // groups * (T_L + T_R) * D  # where this head begins
    tile = m[:, None] * D + d[None]
    x = tl.load(q + mine * D + tile, m[:, None] < T_R, other=0.0)
    top, total = tl.full([M], -1e30, tl.float32), tl.zeros([M], tl.float32)
    sums = tl.zeros([M, D], tl.float32)
    start = tl.where(at + M > start_R, start_L, T_L + at) // N * N  # only padding: itself alone
    for first in range(start, tl.minimum(T_L + at + M, T_L + T_R), N):
        j = first + n
        place = j[:, None] * D + d[None]
        y = tl.load(k + keys + place, j[:, None] < T_L + T_R, other=0.0)
        s = tl.dot(x, tl.trans(y)) * scale
        real = m[:, None] >= start_R
        sees = (real & (j[None] >= start_L) & (j[None] < T_L)) | (j[None] - T_L == m[:, None])
        sees |= real & (j[None] - T_L >= start_R) & (j[None] - T_L < m[:, None])
        s = tl.where(sees, s, -float("inf"))
        high = tl.maximum(top, tl.max(s, 1))
        p, shrink = tl.exp(s - high[:, None]), tl.exp(top - high)
        total = total * shrink + tl.sum(p, 1)
        y = tl.load(v + keys + place, j[:, None] < T_L + T_R, other=0.0)
        sums = sums * shrink[:, None] + tl.dot(p.to(y.dtype), y)
        top = high
    tl.store(lse + mine + m, top + tl.log(total), m < T_R)
    tl.store(out + mine * D + tile, sums / total[:, None], m[:, None] < T_R)


def joint_backward_q(
    q, k, v, slope, lse, delta, grad_q, first_L, first_R, heads, groups, T_L, T_R, scale,
    D: tl.constexpr, M: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    """A program for M queries of one head: their gradient, over the keys that they saw."""
    at, head = tl.program_id(0) * M, tl.program_id(1).to(tl.int64)
    m, n, d = at + tl.arange(0, M), tl.arange(0, N), tl.arange(0, D)
    start_L, start_R = tl.load(first_L + head // heads), tl.load(first_R + head // heads)
    mine, keys = head * T_R, head // groups * (T_L + T_R) * D
    tile = m[:, None] * D + d[None]
    x = tl.load(q + mine * D + tile, m[:, None] < T_R, other=0.0)
    g = tl.load(slope + mine * D + tile, m[:, None] < T_R, other=0.0)
    norm = tl.load(lse + mine + m, m < T_R, other=0.0)[:, None]
    own = tl.load(delta + mine + m, m < T_R, other=0.0)[:, None]
    sums = tl.zeros([M, D], tl.float32)
    start = tl.where(at + M > start_R, start_L, T_L + at) // N * N
    for first in range(start, tl.minimum(T_L + at + M, T_L + T_R), N):
        j = first + n
        place = j[:, None] * D + d[None]
        y = tl.load(k + keys + place, j[:, None] < T_L + T_R, other=0.0)
        z = tl.load(v + keys + place, j[:, None] < T_L + T_R, other=0.0)
        real = m[:, None] >= start_R
        sees = (real & (j[None] >= start_L) & (j[None] < T_L)) | (j[None] - T_L == m[:, None])
        sees |= real & (j[None] - T_L >= start_R) & (j[None] - T_L < m[:, None])
        p = tl.where(sees, tl.exp(tl.dot(x, tl.trans(y)) * scale - norm), 0.0)
        ds = p * (tl.dot(g, tl.trans(z)) - own)
        sums += tl.dot(ds.to(y.dtype), y)
    tl.store(grad_q + mine * D + tile, sums * scale, m[:, None] < T_R)


def joint_backward_kv(
    q, k, v, slope, lse, delta, grad_k, grad_v, first_R, heads, groups, T_L, T_R, scale,
    D: tl.constexpr, M: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    """A program for N right keys and values of one head: their gradients, over all the queries
    that saw them, in every query head of the group."""
    at, head = tl.program_id(0) * N, tl.program_id(1).to(tl.int64)
    j, d = at + tl.arange(0, N), tl.arange(0, D)
    start_R = tl.load(first_R + head * groups // heads)
    keys, place = (head * (T_L + T_R) + T_L) * D, j[:, None] * D + d[None]
    y = tl.load(k + keys + place, j[:, None] < T_R, other=0.0)
    z = tl.load(v + keys + place, j[:, None] < T_R, other=0.0)
    sums_k, sums_v = tl.zeros([N, D], tl.float32), tl.zeros([N, D], tl.float32)
    for group in range(groups):
        mine = (head * groups + group) * T_R
        for first in range(at // M * M, T_R, M):
            m = first + tl.arange(0, M)
            tile = m[:, None] * D + d[None]
            x = tl.load(q + mine * D + tile, m[:, None] < T_R, other=0.0)
            g = tl.load(slope + mine * D + tile, m[:, None] < T_R, other=0.0)
            norm = tl.load(lse + mine + m, m < T_R, other=0.0)[:, None]
            own = tl.load(delta + mine + m, m < T_R, other=0.0)[:, None]
            sees = (j[None] >= start_R) & (j[None] < m[:, None]) | (j[None] == m[:, None])
            sees &= m[:, None] < T_R
            p = tl.where(sees, tl.exp(tl.dot(x, tl.trans(y)) * scale - norm), 0.0)
            sums_v += tl.dot(tl.trans(p.to(g.dtype)), g)
            ds = p * (tl.dot(g, tl.trans(z)) - own)
            sums_k += tl.dot(tl.trans(ds.to(x.dtype)), x)
    tl.store(grad_k + keys + place, sums_k * scale, j[:, None] < T_R)
    tl.store(grad_v + keys + place, sums_v, j[:, None] < T_R)
