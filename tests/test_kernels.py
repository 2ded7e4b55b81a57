"""Fused losses and kernels: torch's form, Triton's in its interpreter, a GPU where there is one."""

import importlib.util
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

import common
import twinbrain
from parts import kernels

CUDA = pytest.param("cuda", marks=pytest.mark.gpu)
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
FORMS = ["torch", "interpreter", CUDA]


@pytest.fixture
def form(request):
    """Where a kernel runs -> its device."""
    if request.param == "interpreter" and not INTERPRETED:
        pytest.skip("runs in the process of test_all_kernels_in_the_interpreter")
    if request.param == "torch" and INTERPRETED:
        pytest.skip("here the kernels run")
    return request.param if request.param == "cuda" else "cpu"


def test_all_kernels_in_the_interpreter():
    """Triton must be imported with TRITON_INTERPRET set: in a process of its own."""
    pytest.importorskip("triton")
    command = [sys.executable, "-m", "pytest", "-q", "-k", "interpreter]", __file__]
    environment = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if "only 0-dimensional arrays can be converted" in done.stdout:
        pytest.skip("the interpreter of this Triton does not run with this numpy")
    assert done.returncode == 0 and " passed" in done.stdout, done.stdout[-2000:]


def draw(device, *shapes, seed=0):
    """Tensors of these shapes, the same on every device."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(*s, generator=generator).to(device) for s in shapes]


def same(found, wanted, tolerance):
    for a, b in zip(found, wanted):
        assert a.isfinite().all() and (a - b).norm() <= tolerance * b.norm()


def plain_cross_entropy(h, head, words):
    return F.cross_entropy(h @ head.T, words), (h @ head.T).argmax(-1)


def plain_kl(h, head, h_teacher, head_teacher, T):
    p, q = (h_teacher @ head_teacher.T / T).log_softmax(-1), (h @ head.T / T).log_softmax(-1)
    return (p.exp() * (p - q)).sum(-1).mean()


def gradients(loss, *leaves):
    return [loss.detach(), *torch.autograd.grad(3 * loss, leaves)]


@pytest.mark.parametrize("form", FORMS, indirect=True)
@pytest.mark.parametrize("chunk", [3, 64])
def test_cross_entropy(form, chunk):
    h, head = (x.requires_grad_() for x in draw(form, (7, 6), (9000, 6)))  # two blocks of words
    words = torch.arange(7, device=form) * 1280
    ours, best = common.linear_cross_entropy(h, head, words, chunk=chunk)
    plain, likeliest = plain_cross_entropy(h, head, words)
    assert torch.equal(best, likeliest)
    tolerance = 5e-3 if form == "cuda" else 1e-5
    same(gradients(ours, h, head), gradients(plain, h, head), tolerance)


@pytest.mark.parametrize("form", FORMS, indirect=True)
@pytest.mark.parametrize("chunk", [3, 64])
def test_kl(form, chunk):
    shapes = (7, 6), (5000, 6), (7, 5), (5000, 5)
    h, head, h_t, head_t = draw(form, *shapes)
    h.requires_grad_(), head.requires_grad_()
    ours = common.linear_kl(h, head, h_t, head_t, 2.0, chunk)
    plain = plain_kl(h, head, h_t, head_t, 2.0)
    same(gradients(ours, h, head), gradients(plain, h, head), 5e-3 if form == "cuda" else 1e-5)


def test_nothing_is_made_for_a_head_that_is_frozen_or_without_gradients(monkeypatch):
    made, slopes = [], torch.zeros_like
    monkeypatch.setattr(torch, "zeros_like", lambda x, **how: made.append(x.shape) or slopes(x))
    h, head = draw("cpu", (4, 6), (50, 6))
    words, h = torch.arange(4), h.requires_grad_()
    common.linear_cross_entropy(h, head, words)[0].backward()
    with torch.no_grad():
        loss, _ = common.linear_cross_entropy(h, head.requires_grad_(), words)
    assert head.shape not in made and not loss.requires_grad and h.grad is not None


@pytest.mark.parametrize("form", FORMS, indirect=True)
def test_words_that_do_not_lie_side_by_side(form):
    h, head = draw(form, (4, 6), (50, 6))
    words = torch.arange(8, device=form)[::2]
    ours, best = common.linear_cross_entropy(h, head, words)
    plain, likeliest = plain_cross_entropy(h, head, words)
    assert torch.equal(best, likeliest)
    assert torch.allclose(ours, plain, rtol=5e-3 if form == "cuda" else 1e-5)


def test_parts_of_a_sum_and_no_words_at_all():
    h, head = draw("cpu", (4, 6), (50, 6))
    words = torch.arange(4)
    halves = [(h[m], head, words[m], 4) for m in (words < 1, words > 0)]
    whole = sum(common.linear_cross_entropy(*half)[0] for half in halves)
    assert torch.allclose(whole, F.cross_entropy(h @ head.T, words))
    assert common.linear_cross_entropy(h[:0], head, words[:0], 4)[0] == 0


def test_in_bfloat16_as_close_as_the_plain_form():
    """The head in float32 under autocast, and all in bfloat16, against float64."""
    h, head = draw("cpu", (300, 32), (500, 32))
    words = torch.arange(300)
    exact = [x.double().requires_grad_() for x in (h, head)]
    wanted = gradients(plain_cross_entropy(*exact, words)[0], *exact)
    for kind, autocast in ((torch.float32, True), (torch.bfloat16, False)):
        leaves = [x.to(kind).requires_grad_() for x in (h, head)]
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            ours = common.linear_cross_entropy(*leaves, words, chunk=64)[0]
        found = gradients(ours, *leaves)
        assert [g.dtype for g in found[1:]] == [kind, kind]
        same([x.double() for x in found], wanted, 0.02)


def looped_attention(q, k, v, first_L, first_R, scale):
    """AsyMoT's attention (visibility all), a query at a time."""
    T_R, groups = q.shape[2], q.shape[1] // k.shape[1]
    T_L, out = k.shape[2] - T_R, torch.zeros_like(q)
    for b in range(len(q)):
        for m in range(T_R):
            sees = [T_L + m]
            if m >= first_R[b]:
                sees = [*range(first_L[b], T_L), *range(T_L + first_R[b], T_L + m + 1)]
            for h in range(q.shape[1]):
                weights = (k[b, h // groups, sees] @ q[b, h, m] * scale).softmax(0)
                out[b, h, m] = weights @ v[b, h // groups, sees]
    return out


@pytest.mark.parametrize("form", FORMS[1:], indirect=True)
@pytest.mark.parametrize("T_L, T_R, first_L, first_R", [
    (66, 70, [0, 65], [3, 66]), (0, 20, [0, 0], [0, 5]),
])  # fmt: skip
def test_joint_attention_is_the_loop(form, T_L, T_R, first_L, first_R):
    B, heads, kv_heads, D, scale = 2, 2, 1, 16, 0.3
    shapes = (B, heads, T_R, D), *[(B, kv_heads, T_L + T_R, D)] * 2, (B, heads, T_R, D)
    q, k, v, slope = draw(form, *shapes)
    leaves = [x.requires_grad_() for x in (q, k, v)]
    starts = [torch.tensor(x, dtype=torch.int32, device=form) for x in (first_L, first_R)]
    found, wanted = [], []
    for attend, out in ((common.joint_attention, found), (looped_attention, wanted)):
        y = attend(*leaves, *(starts if out is found else (first_L, first_R)), scale)
        out += [y.detach(), *torch.autograd.grad(y, leaves, slope)]
    for grad in wanted[2:]:
        grad[:, :, :T_L] = 0  # sg(K_L), sg(V_L)
    same(found, wanted, 1e-2 if form == "cuda" else 1e-5)


@pytest.mark.parametrize("form", FORMS[1:], indirect=True)
def test_joint_attention_in_autocast_takes_what_a_qwen_gives(form):
    """Queries and keys, behind their norms, in float32, values in 16 bits, as SDPA does."""
    kind = torch.float16  # of bfloat16 the interpreter multiplies the bits
    q, k, v, slope = draw(form, (2, 2, 20, 16), *[(2, 1, 30, 16)] * 2, (2, 2, 20, 16))
    leaves, first = [x.requires_grad_() for x in (q, k, v)], torch.zeros(2, 2, dtype=torch.int32)
    with torch.autocast(form, kind):
        y = common.joint_attention(q, k, v.to(kind), *first.to(form), 0.3)
    assert y.dtype == kind
    found = torch.autograd.grad(y, leaves, slope.to(kind))
    assert [g.dtype for g in found] == [torch.float32] * 3
    exact = looped_attention(q, k, v, *first.tolist(), 0.3)
    wanted = torch.autograd.grad(exact, leaves, slope)
    for grad in wanted[1:]:
        grad[:, :, :10] = 0
    same([y, *found], [exact, *wanted], 0.01)


@pytest.mark.skipif(INTERPRETED, reason="here nothing is compiled")
def test_all_kernels_compile_for_a_gpu(monkeypatch, tmp_path):
    """To machine code, for which Triton needs no GPU: the interpreter allows more than it does. At
    the sizes of the papers' models, within the shared memory that a block of an A100 may have."""
    pytest.importorskip("triton")
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, compile

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    counts = "heads groups T_L T_R V".split()
    kinds = dict.fromkeys(counts, "i32") | dict.fromkeys(("scale", "inverse"), "fp32")
    kinds |= dict.fromkeys(("losses", "lse", "delta"), "*fp32") | dict(words="*i64", best="*i64")
    kinds |= dict.fromkeys(("first_L", "first_R"), "*i32")
    fixed = dict(BLOCK=8192, TRAIN=True, D=128, M=64, N=64)
    for function in (kernels.cross_entropy_rows, kernels.kl_rows, kernels.joint_forward,
                     kernels.joint_backward_q, kernels.joint_backward_kv):  # fmt: skip
        names = function.__code__.co_varnames[: function.__code__.co_argcount]
        signature = {n: "constexpr" if n in fixed else kinds.get(n, "*bf16") for n in names}
        known = {n: value for n, value in fixed.items() if n in names}
        pointers = [i for i, kind in enumerate(signature.values()) if kind[0] == "*"]
        aligned = {(i,): [["tt.divisibility", 16]] for i in pointers}  # as PyTorch's tensors are
        source = ASTSource(kernels.kernel(function), signature, known, aligned)
        warps = {"num_warps": 4 if function is kernels.joint_forward else 8}
        made = compile(source, target=GPUTarget("cuda", 90, 32), options=warps)
        assert made.asm["cubin"] and made.metadata.shared <= 163 << 10, function.__name__


@pytest.mark.parametrize("form", FORMS[1:], indirect=True)
def test_the_kernel_takes_the_place_of_the_library_in_the_twin(form):
    real_L = torch.tensor([[0, 1, 1, 1], [1, 1, 1, 1]], dtype=torch.bool, device=form)
    real_R = torch.tensor([[1] * 6, [0, 0, 1, 1, 1, 1]], dtype=torch.bool, device=form)
    mask, module = twinbrain.joint_mask(real_L, real_R, "all"), SimpleNamespace()
    module.num_key_value_groups = 2
    q, k, v = draw(form, (2, 4, 6, 16), (2, 2, 10, 16), (2, 2, 10, 16))
    for T in (10, 6):  # a joint layer; one that the interval skips, or the left brain's own
        given = module, q, k[:, :, -T:], v[:, :, -T:], mask, 0.25
        ours, library = (twinbrain.joint_attention(*given, kernel=k)[0] for k in (True, False))
        same([ours], [library], 1e-2 if form == "cuda" else 1e-5)


def test_triton_stays_unused_where_it_cannot_build(monkeypatch, capsys, tmp_path):
    kernels.has_triton.cache_clear()
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(kernels.sysconfig, "get_paths", lambda: {"include": str(tmp_path)})
    assert not kernels.has_triton()
    assert "Python.h" in capsys.readouterr().out or not importlib.util.find_spec("triton")
    kernels.has_triton.cache_clear()
    (tmp_path / "Python.h").write_text("")
    monkeypatch.setenv("CC", "cc")
    assert kernels.has_triton() == (importlib.util.find_spec("triton") is not None)
    kernels.has_triton.cache_clear()
