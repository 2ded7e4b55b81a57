"""Checkpoints: written whole or not at all, resumed exactly, in shards where the model is.

Weights are safetensors; what a run needs besides is read by `torch.load(weights_only=True)`.
"""

import dataclasses
import json
import os
import pickle
import random
import shutil
import sys
import warnings
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.tensor import DTensor, distribute_tensor

from parts.process import Dist, UserError


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


def reseed(state: dict, seed: int) -> None:
    """torch's generators of a state, by which a model drops out, begin anew."""
    state["torch"] = torch.Generator().manual_seed(seed).get_state()
    if torch.cuda.is_available():
        state["cuda"] = [torch.Generator("cuda").manual_seed(seed).get_state()]


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


def read_json(path: Path, *keys: str) -> dict:
    """A file that a run wrote down, as a dict with these keys; any other file is a UserError."""
    try:
        content = json.loads(path.read_text())
        if isinstance(content, dict) and all(key in content for key in keys):
            return content
    except ValueError:
        pass
    raise UserError(f"{path} is damaged or cut short")


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
    value = value.to(like.device, non_blocking=True)
    if isinstance(like, DTensor):
        return distribute_tensor(value, like.device_mesh, like.placements, src_data_rank=None)
    return value


def load_optimizers(opts, resumed: Checkpoint) -> None:
    """A checkpoint's states into optimizers whose weights may be sharded; it keeps no copy of them,
    nor of the weights, which the model has by now."""
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
    resumed.tensors.clear()
    states.clear()


def discard(path: Path) -> None:
    """Deletes a folder that is never seen half deleted under its name."""
    if path.exists():
        gone = path.rename(path.with_name("gone_" + path.name))
        shutil.rmtree(gone)


def save_checkpoint(folder, step, tensors, train_state, local_state, meta, dist) -> Path:
    """Called on all ranks. Writes step_<step> whole or not at all, keeps the one before it.

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
        kept = [final, *older[-1:]]
        for path in set(final.parent.glob("step_*")) - set(kept):  # later: of a run resumed before
            discard(path)
    dist.barrier()
    return final


def save_run(run, step, model, opts, seconds, meta):
    """A run's checkpoint: what trains, optimizers, the random state of each process."""
    tensors = {n: t for n, t in model.state_dict().items() if n not in model.untouched}
    state = {"optimizers": [opt.state_dict() for opt in opts], "seconds": seconds}
    local, folder = {"rng": rng_state()}, run.folder / "checkpoints"
    save_checkpoint(folder, step, tensors, state, local, meta, run.dist)


def torchao():
    """torchao's optimizers; with them loaded, their states can be read from a checkpoint."""
    try:
        import torchao.optim
    except ImportError:
        raise UserError("--optimizer adamw8bit: pip install 'onefile-vla[scale]'") from None
    return torchao.optim


def load_checkpoint(path, method: str, dist: Dist | None = None, hint: str = "") -> Checkpoint:
    """The newest complete checkpoint in a run folder (or one step folder).

    With `dist` also what resuming needs; without, weights and meta only. hint: what to say where
    there is none.
    """
    places = ("meta.json", "step_*/meta.json", "checkpoints/step_*/meta.json")
    found = sorted(meta.parent for place in places for meta in Path(path).glob(place))
    if not found:
        reason = "" if Path(path).exists() else ": no such folder"
        reason = ": a file, name the run's folder" if Path(path).is_file() else reason
        if (Path(path) / "metrics.jsonl").exists():  # it was stopped before its first
            reason = f"; --resume auto --out {path} begins it again"
        raise UserError(f"no checkpoint in {path}{reason}{hint}")
    path = found[-1].resolve()
    beside, own = {f.name for f in path.parents[1].glob("*.py")}, Path(sys.argv[0]).name
    if beside and not beside & {own, f"{method}.py"}:
        print(f"{path.parents[1]} was trained by {min(beside)}, whose code may differ from "
              f"{method}.py's, which reads it now")  # fmt: skip
    file, train_state, local_state = path / "meta.json", {}, {}
    try:
        meta = json.loads(file.read_text())
        if meta["method"] != method:
            raise UserError(f"{path} is a checkpoint of {meta['method']}, not of {method}")
        step, processes = meta["step"], meta["processes"]
        if meta["config"].get("optimizer") == "adamw8bit" and dist:
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
            file = path / f"rank{dist.rank % processes}.pt"
            local_state = torch.load(file, map_location="cpu", weights_only=True)
            if dist.rank >= processes and "rng" in local_state:  # two must not drop out alike
                reseed(local_state["rng"], meta["config"].get("seed", 0) + step + dist.rank)
    except FileNotFoundError:
        raise UserError(f"the checkpoint lacks {file}") from None
    except (
        SafetensorError, ValueError, KeyError, TypeError, AttributeError, EOFError, RuntimeError,
        pickle.PickleError,
    ) as error:  # fmt: skip
        if "can't allocate memory" in str(error):
            raise UserError(f"{file} does not fit in this machine's memory") from None
        hint = f"; remove {path} to use the one before" if len(found) > 1 else ""
        raise UserError(f"{file} is damaged or cut short{hint}") from None
    return Checkpoint(path, step, tensors, meta, train_state, local_state)


def fill(model, checkpoint: Checkpoint, to: str, fresh: tuple[str, ...] = ()) -> None:
    """Its weights into the model; only what is the backbone's own, or ends like `fresh`, may be
    absent. What does not fit is named. to: what it should fit."""
    try:
        missing, surplus = model.load_state_dict(checkpoint.tensors, strict=False)
    except RuntimeError as error:  # of other shapes: the second line has the first of them
        missing, surplus = [], [str(error).splitlines()[1].strip()]
    missing = [n for n in missing if n not in model.untouched and not n.endswith(fresh)]
    if missing or surplus:
        raise UserError(f"{checkpoint.path} does not fit {to}: {(missing + surplus)[0]}")


def resume_auto(cfg, dist, *marks):
    """--resume auto, and every restart by torchrun: goes on with the run in --out, if there is one
    (a checkpoint, or a file of a chain, `marks`), else starts it; so one command does for both."""
    # a node that begins again because another one failed does not count that
    restarted = dist.any(int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)) > 0)
    may = int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", 0))
    if may > 0 and not (cfg.out or cfg.resume or cfg.eval_only):
        raise UserError(f"--max-restarts {may} would start anew each time: add --out DIR")
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
