"""Attention without wasted work, losses that never hold the whole vocabulary, Triton's kernels.

Each kernel stands beside its torch reference; without a GPU the reference runs, or Triton's
interpreter (TRITON_INTERPRET=1). Letters: B batch, T tokens, D width of a head.
"""

import importlib.util
import os
import shutil
import sysconfig
from functools import lru_cache

import torch
from torch.nn.functional import scaled_dot_product_attention

# --- attention ------------------------------------------------------------------------------------


def attend(q, k, v, mask=None, scale=None):
    """softmax(q k^T * scale) v for q (B, heads, T, d), k and v (B, heads or fewer, one for a group
    of q's, T', d); the mask broadcasts, True where a query looks.

    The library's fused kernel, but in bfloat16 on a CPU the written-out form: with prompts as short
    as the tiny backbone's, the kernel takes two to three times as long (bench/attention.py), and
    autocast lowers what it is given, which behind a norm is float32.
    """
    lowered = q.dtype == torch.bfloat16 or torch.is_autocast_enabled(q.device.type)
    if not (q.is_cuda or lowered):
        return scaled_dot_product_attention(q, k, v, mask, scale=scale, enable_gqa=True)
    if k.shape[1] < q.shape[1]:  # not all of the kernels on a GPU know groups
        k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
    if q.is_cuda:
        return scaled_dot_product_attention(q, k, v, mask, scale=scale)
    return written_out(q, k, v, mask, scale)


def written_out(q, k, v, mask=None, scale=None):
    """`attend` in three products."""
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


def lowered(x):
    """x in autocast's dtype where that is on, as a product of the library's takes it."""
    kind = x.device.type
    return x.to(torch.get_autocast_dtype(kind)) if torch.is_autocast_enabled(kind) else x


def linear_loss(h, head, rows, chunk):
    """`LinearLoss` with the products in autocast's dtype; chunk 0: 512 rows on a GPU, on a CPU 256,
    of many words 128 (a chunk's logits are most of the memory there)."""
    h = lowered(h)
    train = torch.is_grad_enabled() and (h.requires_grad or head.requires_grad)
    # the fewer the chunks, the less often the head's gradient is read and written
    chunk = chunk or (512 if h.is_cuda else 256 if len(head) < 8192 else 128)
    with torch.autocast(h.device.type, enabled=False):
        return LinearLoss.apply(h, head, rows, chunk, train)


def linear_kl(h, head, h_teacher, head_teacher, T=1.0, chunk=0):
    """Mean over rows of KL(softmax(teacher / T) || softmax(student / T)); the teacher gets no
    gradient. h, h_teacher (n, D) and (n, D'), heads (V, D) and (V, D')."""
    h_teacher = lowered(h_teacher.detach())
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
        said = words[part].contiguous()  # a kernel counts on it
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
    """Whether Triton is there and, unless it interprets, what it builds its launcher with."""
    there = importlib.util.find_spec("triton") is not None
    if not there or os.environ.get("TRITON_INTERPRET") == "1":
        return there
    compiler = os.environ.get("CC") or any(map(shutil.which, ("gcc", "clang", "cc")))
    builds = compiler and os.path.exists(sysconfig.get_paths()["include"] + "/Python.h")
    if not builds:
        print("Triton lacks a C compiler or Python.h (python3-dev): its kernels stay unused")
    return bool(builds)


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
        kernel(joint_forward)[grid](q, k, v, out, lse, first_L, first_R, *ctx.sizes, num_warps=4)
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
    # in autocast a Qwen's norms leave q and k, but not v, in float32
    q, k, v = lowered(q), lowered(k), lowered(v)
    return JointAttention.apply(q, k, v, first_L, first_R, scale)


def attend_joint(q, k, v, mask, scale):
    """`attend()` with right queries in our kernel, where it runs: no dense mask, no gradient work
    for the left keys, which come first and are seen by all, as far as they are real."""
    if not triton_runs(q) or mask.shape[2] == 1:
        return attend(q, k, v, mask, scale)
    sees, T_L = mask[:, 0, -1], k.shape[2] - q.shape[2]  # the last token sees all that is real
    first = [(~half).sum(1, dtype=torch.int32) for half in (sees[:, :T_L], sees[:, T_L:])]
    return joint_attention(q, k, v, *first, scale)


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
