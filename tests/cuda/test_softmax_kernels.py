"""The CUDA kernel of softmax's double backward: cuts, alignments, neighbours' values, schedules."""

from __future__ import annotations

import pytest
import torch

from sib_fast.ops.softmax import _double_backward_composed

KERNELS = ["emulated", "cuda"]
# Rows in registers of one lane, of some, of a warp (an attention row of a ViT), of several, the most that are held, and more.
SHAPES = [(70, 1), (9, 8), (5, 3, 19), (2, 3, 5, 197), (3, 380), (3, 1501), (2, 3072), (2, 9001), (1, 9000)]
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


def draw(shape, seed, dtype):
    generator = torch.Generator("cpu").manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64, device="cpu").to(dtype).to(torch.get_default_device())


def problem(shape, dtype):
    """u, grad_y, y. The weights are as uneven as those of attention."""
    y = torch.softmax(3 * draw(shape, 2, torch.float64), -1)
    return draw(shape, 0, dtype), draw(shape, 1, dtype), y.to(dtype)


def assert_close(got, made, dtype):
    exact = _double_backward_composed(*(t.double() for t in made), True, True)
    half = dtype in (torch.float16, torch.bfloat16)
    wide = 8 * torch.finfo(torch.float32 if half else dtype).eps
    for a, b in zip(got, exact, strict=True):
        assert a.dtype == dtype
        # to_y cancels from terms of order 1; to_grad_y is small where y is, and as exact.
        torch.testing.assert_close(a.double(), b, rtol=0.51 * torch.finfo(dtype).eps if half else wide, atol=wide)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_cut(shape, dtype, registered, poisoned_memory):
    made = problem(shape, dtype)
    got = registered._softmax_double_backward(*made, True, True)
    assert_close(got, made, dtype)
    for needs in ((True, False), (False, True), (False, False)):
        for need, a, b in zip(needs, registered._softmax_double_backward(*made, *needs), got, strict=True):
            assert torch.equal(a, b) if need else a.shape == (0,)


@pytest.mark.parametrize("offsets", [(1, 0, 0), (1, 1, 1), (3, 11, 3), (0, 4, 0), (2, 1, 0)], ids=str)
@pytest.mark.parametrize("shape", [(5, 32), (5, 37), (2, 9001)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16], ids=str)
def test_every_alignment(shape, offsets, dtype, registered):
    """Tensors that start anywhere, each elsewhere, NaN around them: the same numbers."""
    made = problem(shape, dtype)
    moved = []
    for t, offset in zip(made, offsets, strict=True):
        held = torch.full((t.numel() + 16,), float("nan"), dtype=dtype)
        moved.append(held[offset : offset + t.numel()].view(shape).copy_(t))
    assert_close(registered._softmax_double_backward(*moved, True, True), made, dtype)


@pytest.mark.parametrize("shape", [(5, 37), (3, 9001)], ids=str)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), 6e4])
def test_a_rows_values_stay_its_own(shape, value, registered):
    made = problem(shape, torch.float16)
    want = registered._softmax_double_backward(*made, True, True)
    for t in made:
        t[1] = value
    rest = [r for r in range(shape[0]) if r != 1]
    for a, b in zip(registered._softmax_double_backward(*made, True, True), want, strict=True):
        assert torch.equal(a[rest], b[rest])


def test_65536_halves_of_one_sign(registered):
    """Σ y·u where y is flat and u is 3: summed in halves it stops growing, in float16 y itself is below a subnormal's half."""
    y = torch.full((1, 65536), 1 / 65536, dtype=torch.bfloat16)
    u, grad_y = torch.full_like(y, 3), torch.full_like(y, -2)
    to_grad_y, to_y = registered._softmax_double_backward(u, grad_y, y, True, True)
    assert (to_grad_y == 0).all()
    assert (to_y == 3 * (-2 + 2) - 3 * -2).all()


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_equal_bits_twice_and_in_any_schedule(shape, registered, monkeypatch):
    made = problem(shape, torch.float32)
    want = registered._softmax_double_backward(*made, True, True)
    for seed in (1, 2):
        monkeypatch.setenv("SIB_FAST_EMULATION_SEED", str(seed))
        got = registered._softmax_double_backward(*made, True, True)
        assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def test_what_protects_memory_is_checked(registered):
    x = torch.randn(3, 4, 5)
    for k, name in enumerate(("u", "grad_y", "x")):
        with pytest.raises(RuntimeError, match=f"{name} must be contiguous, in the shape of x"):
            registered._softmax_double_backward(*(x.mT.contiguous().mT if t == k else x for t in range(3)), True, True)
    with pytest.raises(RuntimeError, match="u must be contiguous, in the shape of x"):
        registered._softmax_double_backward(x[:2], x, x, True, True)
    with pytest.raises(RuntimeError, match="grad_y must have the dtype of x"):
        registered._softmax_double_backward(x, x.double(), x, True, True)
    with pytest.raises(RuntimeError, match="x must be float64"):
        registered._softmax_double_backward(x.int(), x.int(), x.int(), True, True)
    with pytest.raises(RuntimeError, match="x must have a last dimension"):
        registered._softmax_double_backward(*(torch.tensor(1.0) for _ in range(3)), True, True)
