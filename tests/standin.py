"""A stand-in for a GPU: its tensors compute on the CPU, say that they are on cuda:0, refuse to meet
a tensor of the CPU, and note whatever would make the CPU wait for the GPU."""

import time
import traceback

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_flatten, tree_map_only

from parts import checkpoints, kernels

GPU = torch.device("cuda", 0)
WAITS = {"_local_scalar_dense", "nonzero", "masked_select", "_unique2", "unique_consecutive",
         "repeat_interleave"}  # fmt: skip
MIXES = {"index", "index_put", "_index_put_impl_", "copy_"}  # these take tensors of both


class OnGPU(torch.Tensor):
    """Holds a tensor of the CPU."""

    waits = []  # (operation, names of the functions around it) in order

    @staticmethod
    def __new__(cls, x):
        return torch.Tensor._make_wrapper_subclass(
            cls, x.shape, x.stride(), x.storage_offset(), dtype=x.dtype, device="cpu",
            requires_grad=x.requires_grad,
        )  # fmt: skip

    def __init__(self, x):
        self.held = x.detach()

    device, is_cuda, is_cpu = property(lambda self: GPU), True, False

    def tolist(self):
        note("tolist")
        return self.held.tolist()

    def numpy(self, **_):
        raise TypeError("a tensor of a GPU is none of numpy's")

    __array__ = numpy

    def __repr__(self, **_):
        return f"OnGPU({self.held})"

    @classmethod
    def __torch_dispatch__(cls, operation, types, args=(), words=None):
        words = words or {}
        name = operation._schema.name.partition("::")[2]
        tensors = [x for x in tree_flatten((args, words))[0] if isinstance(x, torch.Tensor)]
        node = torch._C._current_autograd_node()  # what autograd itself makes is always plain
        ours = node is None or isinstance(node, torch.autograd.function.BackwardCFunction)
        lost = [x for x in tensors if x.dim() and not isinstance(x, OnGPU)]
        if lost and ours and name not in MIXES:
            raise RuntimeError(f"{name}: a tensor {tuple(lost[0].shape)} is still on the CPU")
        masks = [x for x in tree_flatten(args[1:2])[0] if isinstance(x, torch.Tensor)]
        if name in WAITS or name.startswith("index") and any(m.dtype == torch.bool for m in masks):
            note(name)
        args, words = plain(args), plain(words)
        known = {id(x.held): x for x in tensors if isinstance(x, OnGPU)}  # those changed in place
        out = operation(*args, **words)
        return tree_map_only(
            torch.Tensor, lambda x: known[id(x)] if id(x) in known else OnGPU(x), out
        )


def note(operation):
    """The CPU waits, and in which functions."""
    callers = [frame.name for frame in traceback.extract_stack()]
    if "clip_grad_norm_" not in callers:  # it asks C++ for a tensor's device, which is the CPU
        OnGPU.waits.append((operation, callers))


def plain(tree):
    return tree_map_only(OnGPU, lambda x: x.held, tree)


def copied(tree):
    """What is written to a disk: each tensor has its own memory."""
    return tree_map_only(OnGPU, lambda x: x.held.clone(), tree)


class Move(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return OnGPU(x.detach().clone())

    @staticmethod
    def backward(ctx, slope):
        return plain(slope)


class Elsewhere(TorchFunctionMode):
    """Makes and moves on the stand-in what is asked for on a GPU."""

    def __torch_function__(self, function, types, args=(), words=None):
        words = dict(words or {})
        if function in (torch.Tensor.to, torch.Tensor.cpu, torch.Tensor.cuda):
            return move(function.__name__, *args, **words)
        made = function is torch.nn.functional.one_hot and isinstance(args[0], OnGPU)
        if made or torch.device(words.get("device") or "cpu").type == "cuda":
            words.pop("device", None)
            out = function(*plain(args), **words)
            return tree_map_only(torch.Tensor, OnGPU, out)
        return function(*args, **words)


def move(name, x, *how, device=None, dtype=None, non_blocking=False, other=None, copy=False):
    """Tensor.to(), which takes a tensor, a device or a dtype by place as well, .cpu(), .cuda()."""
    for one in (*how, other):
        device = one if isinstance(one, str | torch.device) else getattr(one, "device", device)
        dtype = one if isinstance(one, torch.dtype) else getattr(one, "dtype", dtype)
    device = device if name == "to" else name
    there = isinstance(x, OnGPU) if device is None else torch.device(device).type == "cuda"
    if there and not isinstance(x, OnGPU):
        if not non_blocking:  # what is not pinned is waited for
            note("to the GPU")
        x = Move.apply(x)
    elif isinstance(x, OnGPU) and not there:
        if not non_blocking:
            note("to the CPU")
        x = x.held.clone()
    return torch.Tensor.to(x, dtype) if dtype else x


class Event:
    def __init__(self, **_):
        self.now = None

    def record(self):
        self.now = time.perf_counter()

    def synchronize(self):
        """Nothing is under way."""

    def elapsed_time(self, other):
        return 1000 * (other.now - self.now)


def install(patch):
    """Makes PyTorch see the stand-in, in bfloat16, without kernels of Triton."""
    here = lambda kind: "cpu" if kind == "cuda" else kind  # noqa: E731
    asked, given, autocast = torch.is_autocast_enabled, torch.get_autocast_dtype, torch.autocast
    save, save_file = torch.save, checkpoints.save_file

    class Autocast(autocast):
        def __init__(self, kind, *args, **words):
            super().__init__(here(kind), *args, **words)

    patch.setattr(torch, "autocast", Autocast)
    patch.setattr(torch, "is_autocast_enabled", lambda kind="cpu": asked(here(kind)))
    patch.setattr(torch, "get_autocast_dtype", lambda kind: given(here(kind)))
    patch.setattr(torch, "save", lambda x, *to: save(copied(x), *to))
    patch.setattr(checkpoints, "save_file", lambda x, *to: save_file(copied(x), *to))
    patch.setattr(kernels, "triton_runs", lambda x: False)
    for name, value in {
        "is_available": True, "device_count": 1, "set_device": None, "set_rng_state": None,
        "get_rng_state": torch.zeros(16, dtype=torch.uint8), "is_bf16_supported": True,
        "get_device_name": "a stand-in", "mem_get_info": (10**11, 10**11), "memory_reserved": 0,
        "memory_allocated": 0, "max_memory_allocated": 10**9, "reset_peak_memory_stats": None,
        "empty_cache": None, "synchronize": None, "set_sync_debug_mode": None,
        "is_current_stream_capturing": False,
    }.items():  # fmt: skip
        patch.setattr(torch.cuda, name, lambda *_, value=value, **__: value)
    patch.setattr(torch.cuda, "Event", Event)
    torch.__future__.set_swap_module_params_on_conversion(True)
    patch.setattr(OnGPU, "waits", [])
