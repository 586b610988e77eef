"""batch_norm on a GPU: parity at sizes that fill it, same bits every time, graphs, no synchronisation, size."""

from __future__ import annotations

import pytest
import torch

from sib_fast.ops.batch_norm import batch_norm, reference
from sib_fast.ops.batch_norm.running import running_batch_norm
from sib_fast.testing.assertions import assert_no_worse_than
from sib_fast.testing.counting import OpLog
from tests.derivatives import same_bits, step

KERNELS = ("cuda",)
real_gpu = pytest.mark.real_gpu
LAYOUTS = pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["contiguous", "channels_last"])
# A ResNet-50's first and last, whole channels, no power of two, one channel.
SHAPES = [(32, 64, 56, 56), (32, 2048, 7, 7), (16, 600, 30, 31), (9, 130, 29, 43), (7, 1, 113, 127)]


def inputs(shape, dtype=torch.float32, layout=torch.contiguous_format, seed=0):
    """x, grad_y, u, weight, bias: the same numbers on every device."""
    g = torch.Generator("cpu").manual_seed(seed)
    maps = [torch.randn(shape, generator=g, device="cpu") for _ in range(3)]
    maps[0] = 2 * maps[0] + 3
    channels = [torch.randn(shape[1], generator=g, device="cpu") for _ in range(2)]
    device = torch.get_default_device()
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    return [t.to(device, dtype).contiguous(memory_format=layout) for t in maps], [t.to(device, wide) for t in channels]


def by_kernel(kernel):
    return lambda x, w, b: batch_norm(x, w, b, backend=kernel)[0]


def by_reference(x, w, b):
    return reference.batch_norm(x, w, b, 1e-5)[0]


@real_gpu  # for their size
@LAYOUTS
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_float32_is_no_worse_than_autograd(shape, layout, kernel):
    maps, channels = inputs(shape, layout=layout)
    got = step(maps, channels, by_kernel(kernel))
    low = step(maps, channels, by_reference)
    exact = step([t.double() for t in maps], [t.double() for t in channels], by_reference)
    for k, (a, b, c) in enumerate(zip(got, low, exact, strict=True)):
        assert_no_worse_than(a, b, c, what=str(k))


@real_gpu
@LAYOUTS
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", SHAPES[:3], ids=str)
def test_halves_are_float64s_to_one_rounding(shape, dtype, layout, kernel):
    maps, channels = inputs(shape, dtype, layout)
    exact = step([t.double() for t in maps], [t.double() for t in channels], by_reference)
    for k, (a, b) in enumerate(zip(step(maps, channels, by_kernel(kernel)), exact, strict=True)):
        assert torch.isfinite(a).all(), k
        # A rounding to nearest leaves 0.3 of eps in the mean square.
        bound = 0.35 * torch.finfo(dtype).eps if a.ndim > 1 else 1e-5
        assert (a.double() - b).norm() <= bound * b.norm(), (k, (a.double() - b).norm() / b.norm())


@LAYOUTS
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_twenty_runs_have_the_same_bits_and_every_output_is_written(dtype, layout, kernel, poisoned_memory):
    maps, channels = inputs((9, 70, 29, 43), dtype, layout)
    want = step(maps, channels, by_kernel(kernel))
    assert all(torch.isfinite(t).all() for t in want)
    for k in range(20):
        junk = torch.randn(1000 + 37 * k)  # moves the scratch about
        assert same_bits(step(maps, channels, by_kernel(kernel)), want), k
        del junk


def last_pass(maps, channels, normalise):
    """The gradients of x, weight and bias by a pass that y and a VJP have in common: x has two."""
    x, grad_y, u = maps
    leaves = [t.detach().requires_grad_() for t in (x, *channels)]
    y = normalise(*leaves)
    (vjp,) = torch.autograd.grad(y, leaves[0], grad_y, create_graph=True)
    return list(torch.autograd.grad([vjp, y], leaves, [u, 3 * u]))


@real_gpu
@LAYOUTS
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_what_is_handed_over_is_added(shape, layout, kernel):
    maps, channels = inputs(shape, layout=layout)
    with OpLog() as log:
        got = last_pass(maps, channels, by_kernel(kernel))
    assert not any(name.startswith("aten.add") and maps[0].shape in shapes for name, shapes in log.ops)
    low = last_pass(maps, channels, by_reference)
    exact = last_pass([t.double() for t in maps], [t.double() for t in channels], by_reference)
    for k, (a, b, c) in enumerate(zip(got, low, exact, strict=True)):
        assert_no_worse_than(a, b, c, what=str(k))


@LAYOUTS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_what_is_handed_over_has_the_same_bits_every_time(dtype, layout, kernel, poisoned_memory):
    maps, channels = inputs((9, 70, 29, 43), dtype, layout)
    want = last_pass(maps, channels, by_kernel(kernel))
    assert all(torch.isfinite(t).all() for t in want)
    for _ in range(5):
        assert same_bits(last_pass(maps, channels, by_kernel(kernel)), want)


@real_gpu
@LAYOUTS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_eval_mode_is_no_worse_than_pytorchs_own(shape, dtype, layout, kernel, request):
    """By aten's ops: VJP, double backward and last pass; no copy of the layout and no synchronisation."""
    maps, channels = inputs(shape, dtype, layout)
    mean, variance = torch.randn_like(channels[0]), 0.5 + torch.rand_like(channels[0])

    def ours(x, weight, bias):
        return running_batch_norm(x, weight, bias, *(t.to(weight.dtype) for t in (mean, variance)), 1e-5)

    def own(x, weight, bias):
        return torch.nn.functional.batch_norm(x, mean.to(weight.dtype), variance.to(weight.dtype), weight, bias, eps=1e-5)

    got, low = (last_pass(maps, channels, function) for function in (ours, own))
    exact = last_pass([t.double() for t in maps], [t.double() for t in channels], own)
    for k, (a, b, c) in enumerate(zip(got, low, exact, strict=True)):
        assert_no_worse_than(a, b, c, what=str(k))
    assert got[0].stride() == maps[0].stride()
    request.getfixturevalue("no_synchronisation")
    last_pass(maps, channels, ours)


@real_gpu
@LAYOUTS
def test_graph_replay_follows_its_inputs(layout, kernel):
    static, other = inputs((9, 70, 29, 43), layout=layout), inputs((9, 70, 29, 43), layout=layout, seed=7)
    wants = [step(*made, by_kernel(kernel)) for made in (static, other)]
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(2):
            step(*static, by_kernel(kernel))
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = step(*static, by_kernel(kernel))
    for t, source in zip((*static[0], *static[1]), (*other[0], *other[1]), strict=True):
        t.copy_(source)
    for t in out:
        t.fill_(float("nan"))
    graph.replay()
    assert same_bits(out, wants[1])


@real_gpu
@LAYOUTS
def test_nothing_synchronises_with_the_host(layout, kernel, request):
    made = inputs((9, 70, 29, 43), layout=layout)
    for run in (step, last_pass):
        run(*made, by_kernel(kernel))
    request.getfixturevalue("no_synchronisation")
    for run in (step, last_pass):
        run(*made, by_kernel(kernel))


@real_gpu
@LAYOUTS
def test_more_than_two_to_the_31_elements(layout, kernel):
    """2,400×8×344×344 bfloat16: offsets beyond int32, in both layouts. The last image is written by its channels' own numbers."""
    shape = (2400, 8, 344, 344)
    assert shape[0] * shape[1] * shape[2] * shape[3] > 2**31
    if torch.cuda.mem_get_info()[0] < 40 * 2**30:
        pytest.skip("needs 40 GiB of free memory")
    x = torch.empty(shape, dtype=torch.bfloat16, memory_format=layout).normal_()
    with torch.no_grad():
        y, mean, variance = batch_norm(x, backend=kernel)
        for n in (0, 1199, 2399):
            exact = (x[n].double() - mean[:, None, None]) / (variance + 1e-5).sqrt()[:, None, None]
            assert (y[n].double() - exact).norm() <= 0.35 * 2**-7 * exact.norm(), n
        parts = [x[n : n + 200].double() for n in (0, 2200)]
    assert all((p.mean((0, 2, 3)) - mean).abs().max() < 1e-3 for p in parts)
    leaf = x.requires_grad_()
    y = batch_norm(leaf, backend=kernel)[0]
    (grad,) = torch.autograd.grad(y, leaf, y.detach())
    hat = y.detach()[2399].double()
    # The gradient along y itself is what is left of y by taking its mean and its own direction away: rounding.
    assert grad[2399].double().norm() <= 2**-7 * hat.norm()
