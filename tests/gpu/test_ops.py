"""The head's ops on a GPU: parity at sizes that fill it, same bits every time, streams, graphs, no synchronisation, size."""

from __future__ import annotations

import pytest
import torch

from sib_fast import foreground_mask, region_statistics
from sib_fast.ops.foreground_mask import MaskOptions, mask_with_ranks
from sib_fast.ops.foreground_mask import reference as mask_reference
from sib_fast.ops.region_statistics import reference as statistics_reference
from sib_fast.testing.assertions import assert_no_worse_than, exact_orders, rank_pixels_of
from tests.gpu.heads import STEPS, inputs

KERNELS = ("cuda", "triton")
real_gpu = pytest.mark.real_gpu
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
# More images than fit a tile, more pixels than fit a block, no power of two; and the headline's images.
SHAPES = [(5, 3, 129, 65), (130, 3, 32, 32), (64, 256, 7, 7), (3, 1, 400, 301), (8, 3, 224, 224)]
SMALL = (6, 3, 40, 33)
steps = pytest.mark.parametrize("step", STEPS.values(), ids=STEPS)


def same_bits(got, want) -> bool:
    return all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_mask_is_no_worse_than_autograd(shape, kernel):
    """SPEC 7, with the ranks of the float64 run given to all sides."""
    vjp, _, _, cotangent = inputs(*shape)
    options = MaskOptions(31, 0.1, 10.0, (0.05, 0.95, 0.8, 0.8), 1e-8)
    orders = exact_orders(vjp, options)
    ranks = rank_pixels_of(orders, options, torch.float32)

    def run(function, value):
        value = value.detach().requires_grad_()
        mask = function(value)
        return mask.detach(), torch.autograd.grad(mask, value, cotangent.to(mask.dtype))[0]

    def plain(value):
        return mask_reference.foreground_mask(value, **options._asdict(), orders=orders)

    got, low, exact = run(lambda v: mask_with_ranks(v, ranks, options, kernel), vjp), run(plain, vjp), run(plain, vjp.double())
    for what, a, b, c in zip(("mask", "grad_vjp"), got, low, exact, strict=True):
        assert_no_worse_than(a, b, c, what=what)


def test_float64_mask_and_gradient_are_the_references(kernel):
    vjp, _, _, cotangent = inputs(*SMALL, dtype=torch.float64)
    options = MaskOptions(9, 0.1, 10.0, (0.05, 0.95, 0.8, 0.8), 1e-8)
    orders = exact_orders(vjp, options)
    leaf = vjp.requires_grad_()
    got = mask_with_ranks(leaf, rank_pixels_of(orders, options, torch.float64), options, kernel)
    want = mask_reference.foreground_mask(leaf, **options._asdict(), orders=orders)
    torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-10)
    grads = [torch.autograd.grad(mask, leaf, cotangent)[0] for mask in (got, want)]
    assert (grads[0] - grads[1]).norm() <= 1e-10 * grads[1].norm()


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_statistics_are_no_worse_than_autograd(shape, kernel):
    from tests.gpu.heads import statistics_step

    made = inputs(*shape)
    mode = {"precision": "ieee"}
    got = statistics_step(*made, backend=kernel, **mode)
    low = statistics_step(*made, backend="reference")
    exact = statistics_step(*(t.double() for t in made), backend="reference")
    for k, (a, b, c) in enumerate(zip(got, low, exact, strict=True)):
        wide = torch.float32
        assert_no_worse_than(a.to(wide), b.to(wide), c, what=str(k))


@real_gpu
@pytest.mark.parametrize("precision", ["ieee", "tf32x3", "tf32"])
@pytest.mark.parametrize("shape", [(128, 3, 64, 64), (97, 3, 40, 50), (16, 256, 28, 28), (256, 3, 32, 32)], ids=str)
def test_precision_modes(precision, shape, kernel):
    """SPEC 7 for ieee and tf32x3; tf32 within the rounding of its operands, 2^-11 each, of the rows' norms."""
    from tests.gpu.heads import statistics_step

    made = inputs(*shape)
    got = statistics_step(*made, backend=kernel, precision=precision)
    low = statistics_step(*made, backend="reference")
    exact = statistics_step(*(t.double() for t in made), backend="reference")
    for k, (a, b, c) in enumerate(zip(got, low, exact, strict=True)):
        assert torch.isfinite(a).all()
        if precision == "tf32":
            assert (a.double() - c).norm() <= 2**-10 * c.norm(), k
        else:
            assert_no_worse_than(a.float(), b.float(), c, what=f"{precision} {k}")
    if precision == "tf32":  # a mode that changes nothing is not that mode
        assert not same_bits(got[:2], statistics_step(*made, backend=kernel, precision="ieee")[:2])


@steps
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_twenty_runs_have_the_same_bits(step, dtype, kernel):
    made = inputs(*SMALL, dtype=dtype)
    want = step(*made, backend=kernel)
    for k in range(20):
        junk = torch.randn(1000 + 37 * k)  # moves the scratch about
        assert same_bits(step(*made, backend=kernel), want), k
        del junk


@steps
def test_large_batches_have_the_same_bits_twice(step, kernel):
    made = inputs(130, 3, 64, 64)
    assert same_bits(step(*made, backend=kernel), step(*made, backend=kernel))


@steps
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_output_is_written(step, dtype, kernel, poisoned_memory):
    for tensor in step(*inputs(*SMALL, dtype=dtype), backend=kernel):
        assert not tensor.isnan().any() if dtype == torch.float16 else torch.isfinite(tensor).all()


@real_gpu
@steps
def test_a_side_stream_equals_the_default_one(step, kernel):
    """The inputs are made on the side stream behind a long wait: a kernel on another stream would read them too early."""
    made = inputs(*SMALL)
    want = step(*made, backend=kernel)
    torch.cuda.synchronize()
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        late = [torch.full_like(t, 0.5) for t in made]
        torch.cuda._sleep(50_000_000)
        for t, source in zip(late, made, strict=True):
            t.copy_(source)
        got = step(*late, backend=kernel)
    side.synchronize()
    assert same_bits(got, want)


@real_gpu
@steps
def test_graph_replay_follows_its_inputs(step, kernel):
    static, other = inputs(*SMALL), inputs(*SMALL, seed=7)
    wants = [step(*made, backend=kernel) for made in (static, other)]
    assert not same_bits(*wants)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(2):
            step(*static, backend=kernel)
    torch.cuda.current_stream().wait_stream(side)
    first = [t.clone() for t in static]
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = step(*static, backend=kernel)
    for made, want in zip((first, other, first), (*wants, wants[0]), strict=True):
        for t, source in zip(static, made, strict=True):
            t.copy_(source)
        for t in out:
            t.fill_(float("nan"))
        graph.replay()
        assert same_bits(out, want)


@real_gpu
@steps
def test_nothing_synchronises_with_the_host(step, kernel, request):
    made = inputs(*SMALL)
    step(*made, backend=kernel)
    request.getfixturevalue("no_synchronisation")
    step(*made, backend=kernel)


@real_gpu
@steps
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one GPU")
def test_the_tensors_device_is_used_not_the_current_one(step, kernel):
    made = inputs(*SMALL)
    want = step(*made, backend=kernel)
    got = step(*(t.to("cuda:1") for t in made), backend=kernel)
    assert {t.device.index for t in got} == {1}
    assert same_bits([t.to("cuda:0") for t in got], want)
    assert torch.cuda.current_device() == 0


@pytest.mark.parametrize("layout", ["channels_last", "strided"])
def test_layouts_of_large_maps(layout, kernel):
    vjp, x, mask, _ = inputs(5, 3, 129, 66)
    want = foreground_mask(vjp, window_size=9, backend=kernel)
    other = (
        vjp.contiguous(memory_format=torch.channels_last) if layout == "channels_last" else torch.stack([vjp, vjp], -1)[..., 0]
    )
    assert torch.equal(foreground_mask(other, window_size=9, backend=kernel), want)
    a, b = (region_statistics(v, x, mask, backend=kernel) for v in (vjp, other))
    torch.testing.assert_close(a.gram_vjp, b.gram_vjp, rtol=1e-5, atol=1e-6 * a.gram_vjp.abs().max().item())


@real_gpu
def test_more_than_two_to_the_31_elements(kernel):
    """704×3×1024×1024 bfloat16: offsets beyond int32. Each image's mask is what the image alone gives, to the bit."""
    shape = (704, 3, 1024, 1024)
    assert shape[0] * shape[1] * shape[2] * shape[3] > 2**31
    if torch.cuda.mem_get_info()[0] < 70 * 2**30:
        pytest.skip("needs 70 GiB of free memory")
    vjp = torch.randn(shape, dtype=torch.bfloat16)
    x = torch.randn(shape, dtype=torch.bfloat16)
    some = [0, 351, 703]
    with torch.no_grad():
        mask = foreground_mask(vjp, window_size=31, backend=kernel)
        for n in some:
            assert torch.equal(mask[n : n + 1], foreground_mask(vjp[n : n + 1], window_size=31, backend=kernel)), n
    leaf = vjp.requires_grad_()
    out = region_statistics(leaf, x, mask, backend=kernel)
    small = vjp[some].detach().double().requires_grad_()
    want = statistics_reference.region_statistics(small, x[some].double(), mask[some].double(), background_grams=False)
    for name in ("gram_vjp", "gram_x"):
        got, exact = getattr(out, name)[some][:, some], getattr(want, name)
        assert (got - exact).norm() <= 1e-5 * exact.norm(), name
    torch.testing.assert_close(out.background_variance[some], want.background_variance, rtol=1e-5, atol=0)
    # The diagonal's cotangent keeps the images apart, so that three of them can be checked alone.
    (grad,) = torch.autograd.grad(out.gram_vjp.diagonal().sum() + out.background_variance.sum(), leaf)
    (exact,) = torch.autograd.grad(want.gram_vjp.diagonal().sum() + want.background_variance.sum(), small)
    assert (grad[some].double() - exact).norm() <= 1e-2 * exact.norm()  # returned in bfloat16


@real_gpu
def test_memory_of_the_head_is_a_fraction_of_naives(kernel):
    """The goal: extra memory at most 15 % of the naive head's, at its own size or an eighth of it."""
    from benchmarks import timing
    from benchmarks.baselines import heads_for, natural_inputs, value_and_gradient

    device = torch.device("cuda")
    vjp, x = natural_inputs(32, 3, 224, device=device)
    heads = heads_for(device)
    extra = {
        name: timing.peak_extra_bytes(lambda name=name: value_and_gradient(heads[name], vjp, x), device)
        for name in ("naive", f"ours_{kernel}")
    }
    assert extra[f"ours_{kernel}"] <= 0.15 * extra["naive"], extra
