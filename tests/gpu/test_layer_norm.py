"""layer_norm, group_norm and softmax's double backward on a GPU: parity at sizes that fill it, same bits, graphs, size."""

from __future__ import annotations

import pytest
import torch

from sib_fast.ops.layer_norm import group_norm, layer_norm, reference
from sib_fast.ops.softmax import _double_backward_composed
from sib_fast.testing.assertions import assert_no_worse_than
from tests.derivatives import same_bits, step

KERNELS = ("cuda",)
real_gpu = pytest.mark.real_gpu
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
# x, and the number of groups or None for a layer norm of the last dimension: a ViT-B, a ConvNeXt-T's first stage, rows of a
# block and longer than registers, no power of two; group norms of a ResNet-50's first and last, one group, one channel each.
PROBLEMS = [
    ((64, 197, 768), None),
    ((32, 56, 56, 96), None),
    ((3000, 3001), None),
    ((5, 300_007), None),
    ((32, 64, 56, 56), 32),
    ((32, 2048, 7, 7), 32),
    ((9, 130, 29, 43), 1),
    ((7, 6, 113, 127), 6),
]
SMALL = [((9, 29, 770), None), ((5, 70, 29, 43), 10)]
problems = pytest.mark.parametrize(("shape", "groups"), PROBLEMS, ids=str)
small = pytest.mark.parametrize(("shape", "groups"), SMALL, ids=["layer", "group"])
softmax = torch.ops.sib_fast_softmax.double_backward


def inputs(shape, groups, dtype=torch.float32, seed=0):
    """x, grad_y, u; weight, bias: the same numbers on every device."""
    g = torch.Generator("cpu").manual_seed(seed)
    maps = [torch.randn(shape, generator=g, device="cpu") for _ in range(3)]
    maps[0] = 2 * maps[0] + 3
    channels = [torch.randn(shape[-1 if groups is None else 1], generator=g, device="cpu") for _ in range(2)]
    device = torch.get_default_device()
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    return [t.to(device, dtype) for t in maps], [t.to(device, wide) for t in channels]


def by_kernel(kernel, groups):
    if groups is None:
        return lambda x, w, b: layer_norm(x, x.shape[-1:], w, b, backend=kernel)
    return lambda x, w, b: group_norm(x, groups, w, b, backend=kernel)


def by_reference(groups):
    if groups is None:
        return lambda x, w, b: reference.layer_norm(x, x.shape[-1:], w, b, 1e-5)
    return lambda x, w, b: reference.group_norm(x, groups, w, b, 1e-5)


def wide(maps, channels):
    return [t.double() for t in maps], [t.double() for t in channels]


@real_gpu  # for their size
@problems
def test_float32_is_no_worse_than_autograd(shape, groups, kernel):
    made = inputs(shape, groups)
    got, low = (step(*made, f) for f in (by_kernel(kernel, groups), by_reference(groups)))
    exact = step(*wide(*made), by_reference(groups))
    for k, (a, b, c) in enumerate(zip(got, low, exact, strict=True)):
        assert_no_worse_than(a, b, c, what=str(k))


@real_gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@problems
def test_halves_are_float64s_to_one_rounding(shape, groups, dtype, kernel):
    made = inputs(shape, groups, dtype)
    exact = step(*wide(*made), by_reference(groups))
    for k, (a, b) in enumerate(zip(step(*made, by_kernel(kernel, groups)), exact, strict=True)):
        assert torch.isfinite(a).all(), k
        # A rounding to nearest leaves 0.3 of eps in the mean square.
        bound = 0.35 * torch.finfo(dtype).eps if a.ndim > 1 else 1e-5
        assert (a.double() - b).norm() <= bound * b.norm(), (k, (a.double() - b).norm() / b.norm())


@small
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_twenty_runs_have_the_same_bits_and_every_output_is_written(dtype, shape, groups, kernel, poisoned_memory):
    made = inputs(shape, groups, dtype)
    want = step(*made, by_kernel(kernel, groups))
    assert all(torch.isfinite(t).all() for t in want)
    for k in range(20):
        junk = torch.randn(1000 + 37 * k)  # moves the scratch about
        assert same_bits(step(*made, by_kernel(kernel, groups)), want), k
        del junk


@real_gpu
@small
def test_graph_replay_follows_its_inputs(shape, groups, kernel):
    static, other = inputs(shape, groups), inputs(shape, groups, seed=7)
    wants = [step(*made, by_kernel(kernel, groups)) for made in (static, other)]
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(2):
            step(*static, by_kernel(kernel, groups))
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = step(*static, by_kernel(kernel, groups))
    for t, source in zip((*static[0], *static[1]), (*other[0], *other[1]), strict=True):
        t.copy_(source)
    for t in out:
        t.fill_(float("nan"))
    graph.replay()
    assert same_bits(out, wants[1])


@real_gpu
@small
def test_nothing_synchronises_with_the_host(shape, groups, kernel, request):
    made = inputs(shape, groups)
    step(*made, by_kernel(kernel, groups))
    request.getfixturevalue("no_synchronisation")
    step(*made, by_kernel(kernel, groups))


@real_gpu
@pytest.mark.parametrize("groups", [None, 2], ids=["layer", "group"])
def test_more_than_two_to_the_31_elements(groups, kernel):
    """Offsets beyond int32, in the activation and in the number of its rows; the last rows by their own numbers."""
    shape = (2_830_000, 768) if groups is None else (2400, 8, 344, 344)
    if torch.cuda.mem_get_info()[0] < 40 * 2**30:
        pytest.skip("needs 40 GiB of free memory")
    x = torch.empty(shape, dtype=torch.bfloat16).normal_()
    assert x.numel() > 2**31
    leaf = x.requires_grad_()
    y = by_kernel(kernel, groups)(leaf, None, None)
    for part in (slice(0, 2), slice(shape[0] - 2, shape[0])):
        exact = by_reference(groups)(x.detach()[part].double(), None, None)
        assert (y.detach()[part].double() - exact).norm() <= 0.35 * 2**-7 * exact.norm()
    (grad,) = torch.autograd.grad(y, leaf, y.detach())
    # The gradient along y itself is what is left of y by taking its mean and its own direction away: rounding.
    assert grad[-2:].double().norm() <= 2**-7 * y.detach()[-2:].double().norm()


# ---- softmax ------------------------------------------------------------------------------------------------------------------


def weights(shape, dtype):
    """u, grad_y, y."""
    g = torch.Generator("cpu").manual_seed(0)
    u, grad_y, x = (torch.randn(shape, generator=g, device="cpu").to(torch.get_default_device()) for _ in range(3))
    return u.to(dtype), grad_y.to(dtype), torch.softmax(3 * x, -1).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(96, 197, 197), (64, 49, 49), (30, 4096), (3, 50_001)], ids=str)
def test_softmaxs_double_backward_is_the_composed_one_rounded_once(shape, dtype, kernel):
    made = weights(shape, dtype)
    exact = _double_backward_composed(*(t.double() for t in made), True, True)
    got = softmax(*made, True, True)
    half = dtype in (torch.bfloat16, torch.float16)
    limit = 8 * torch.finfo(torch.float32 if half else dtype).eps
    for a, b in zip(got, exact, strict=True):
        assert a.dtype == dtype
        torch.testing.assert_close(a.double(), b, rtol=0.51 * torch.finfo(dtype).eps if half else limit, atol=limit)
    for _ in range(20):
        assert same_bits(softmax(*made, True, True), got)


@real_gpu
def test_softmax_in_a_graph_and_without_synchronisation(kernel, request):
    static, other = weights((192, 197, 197), torch.float32), [t.flip(0) for t in weights((192, 197, 197), torch.float32)]
    want = softmax(*other, True, True)
    request.getfixturevalue("no_synchronisation")
    softmax(*other, True, True)
    torch.cuda.set_sync_debug_mode("default")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = softmax(*static, True, True)
    for t, source in zip(static, other, strict=True):
        t.copy_(source)
    graph.replay()
    assert same_bits(out, want)
