"""The fused losses and the kernels: torch's form, Triton's in its interpreter, a GPU if there is."""

import os
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F

import common

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


def test_parts_of_a_sum_and_no_words_at_all():
    h, head = draw("cpu", (4, 6), (50, 6))
    words = torch.arange(4)
    parts = [common.linear_cross_entropy(h[m], head, words[m], 4)[0] for m in (words < 1, words > 0)]
    assert torch.allclose(sum(parts), F.cross_entropy(h @ head.T, words))
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
