"""The CUDA kernels of region_statistics beyond what every kernel must do: tilings, precision of products, resources.

Under the emulation the tensor cores' sums are truncated, as the hardware's are (csrc/cuda/region_statistics_math.cuh), so
that the error bounds below mean something without a GPU.
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from sib_fast import region_statistics
from sib_fast.ops.region_statistics import PRECISIONS, reference
from sib_fast.testing.assertions import assert_no_worse_than

ROOT = Path(__file__).parents[2]
KERNELS = ["emulated", "cuda"]
EPS = torch.finfo(torch.float32).eps
# Each operand is rounded to 11 bits, so that a product is off by at most 2^-10 of itself.
TF32_BOUND = 2.0**-10
NAMES = ("gram_vjp", "gram_x", "background_variance", "vjp_variance", "background_gram_vjp", "background_gram_x")


def problem(shape, layout=torch.contiguous_format, seed=0):
    g = torch.Generator("cpu").manual_seed(seed)
    images, _, height, width = shape
    maps = [torch.randn(shape, generator=g, device="cpu").contiguous(memory_format=layout) for _ in range(2)]
    mask = torch.rand((images, 1, height, width), generator=g, device="cpu")
    return [(1e-4 * maps[0]).to(torch.get_default_device()), *(t.to(torch.get_default_device()) for t in (maps[1], mask))]


def values_and_gradients(function, inputs):
    leaves = [t.detach().requires_grad_() for t in inputs]
    out = [t for t in function(*leaves) if t is not None]
    g = torch.Generator("cpu").manual_seed(1)
    cotangents = [torch.randn(t.shape, generator=g, dtype=torch.float64, device="cpu").to(t.device) for t in out]
    return [*(t.detach() for t in out), *torch.autograd.grad(out, leaves, cotangents)]


def against_float32_autograd(kernel, inputs, background_grams=False, factor=1.5, **options):
    """Every result of the kernel is no further from float64 than 1.5× autograd in float32 (SPEC 7)."""

    def low(*t):
        return reference.region_statistics(*t, background_grams=background_grams)

    got = values_and_gradients(
        lambda *t: region_statistics(*t, background_grams=background_grams, backend=kernel, **options), inputs
    )
    for i, (a, b, c) in enumerate(
        zip(got, values_and_gradients(low, inputs), values_and_gradients(low, [t.double() for t in inputs]), strict=True)
    ):
        assert_no_worse_than(a, b.to(torch.float32), c, factor=factor, what=f"result {i}")
    return got


# N of every tiling: 16, 32, 64 and 128 images a side, one tile and several, whole and cut.
SIZES = [2, 16, 17, 32, 33, 64, 65, 100, 130, 250]


@pytest.mark.parametrize("precision", ["ieee", "tf32x3"])
@pytest.mark.parametrize("images", SIZES)
def test_every_tiling_is_no_worse_than_autograd(images, precision, kernel):
    grams = against_float32_autograd(kernel, problem((images, 2, 3, 13)), precision=precision)[:2]
    for gram in grams:
        assert torch.equal(gram, gram.T)


@pytest.mark.parametrize("kib", [99, 163, 227])
@pytest.mark.parametrize("images", [20, 100, 130, 250])
def test_every_size_of_shared_memory(images, kib, kernel, monkeypatch):
    """Fewer stages and smaller tiles where a block may have less; on a GPU, what it has."""
    monkeypatch.setenv("SIB_FAST_EMULATION_SHARED", str(kib))
    against_float32_autograd(kernel, problem((images, 2, 2, 9)))


@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_shared_memory_for_less_than_two_stages_is_an_error(direction, registered, kernel, monkeypatch):
    """A block that waits for copies of a stage that it has not started would read what is not there."""
    if kernel == "cuda":
        pytest.skip("every GPU has more")
    monkeypatch.setenv("SIB_FAST_EMULATION_SHARED", "30")
    vjp, x, mask = problem((20, 2, 2, 9))
    gram, vector = torch.ones(20, 20, dtype=torch.float64), torch.ones(20, dtype=torch.float64)
    op, arguments = {
        "forward": (registered._region_statistics, (vjp, x, mask, False)),
        "backward": (
            registered._region_statistics_backward,
            (gram, gram, vector, vector, None, None, vjp, x, mask, vector, vector, True, True, True),
        ),
    }[direction]
    with pytest.raises(RuntimeError, match=r"a block needs \d+ bytes of shared memory, and may have 30720 here"):
        op(*arguments, "ieee")


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
def test_many_chunks(layout, precision, kernel):
    """More elements than a float32 sum may have, in several parts with a cut chunk at the end, and background Grams."""
    inputs = problem((5, 3, 28, 52), layout)
    if precision != "tf32":
        against_float32_autograd(kernel, inputs, background_grams=True, precision=precision)
        return
    # Every product is off by up to TF32_BOUND, its sums by less: errors of either sign. Relative to the largest entry.
    got = values_and_gradients(
        lambda *t: region_statistics(*t, background_grams=True, backend=kernel, precision=precision), inputs
    )
    exact = values_and_gradients(lambda *t: reference.region_statistics(*t, background_grams=True), [t.double() for t in inputs])
    errors = [((a - b).norm() / b.norm()).item() for a, b in zip(got, exact, strict=True)]
    assert max(errors) < TF32_BOUND
    assert min(e for i, e in enumerate(errors) if i not in (2, 3)) > 1e-5, "these products were not rounded to tf32"
    assert max(errors[2:4]) < 8 * EPS, "variances are not products of tensor cores"


def test_a_thousand_images(kernel):
    inputs = problem((1000, 1, 2, 5))
    got = region_statistics(*inputs, backend=kernel)
    want = region_statistics(*(t.double() for t in inputs), backend="reference")
    for name in NAMES[:4]:
        a, b = getattr(got, name), getattr(want, name)
        assert (a - b).norm() <= 8 * EPS * b.norm(), name
    assert torch.equal(got.gram_x, got.gram_x.T)


@pytest.mark.parametrize("precision", ["ieee", "tf32x3"])
def test_sums_of_one_sign(precision, kernel):
    """Rounding that always goes the same way is not averaged out: plain arithmetic rounds to nearest, tensor cores truncate."""
    vjp = torch.rand(2, 3, 100, 100) + 1.0
    mask = torch.ones(2, 1, 100, 100)
    exact = vjp.double().flatten(1) @ vjp.double().flatten(1).T
    got = region_statistics(vjp, vjp, mask, backend=kernel, precision=precision).gram_vjp
    assert ((got - exact).abs() / exact).max() < {"ieee": 2e-8, "tf32x3": 4 * EPS}[precision]


def nearest_tf32(value):
    """What nearest_tf32 of the kernels computes: 8193·a, rounded, minus 8192·a."""
    return ((value * 8193.0).double() - 8192.0 * value.double()).float()


def cut(value):
    """What a tensor core reads of an operand: 10 bits of mantissa."""
    return (value.view(torch.int32) & ~0x1FFF).view(torch.float32).double()


def toward_zero(value):
    near = value.to(torch.float32)
    return torch.where(near.double().abs() > value.abs(), torch.nextafter(near, torch.zeros(())), near).double()


def tf32x3_error(chain: int) -> float:
    """Relative error of sums of `chain` positive products in one accumulator, as tensor cores truncate it."""
    g = torch.Generator().manual_seed(0)
    a, b = (torch.rand(256, chain, generator=g) + 0.5 for _ in range(2))
    big_a, big_b = nearest_tf32(a), nearest_tf32(b)
    small_a, small_b = cut(a - big_a), cut(b - big_b)
    big_a, big_b = cut(big_a), cut(big_b)
    acc = torch.zeros(256, dtype=torch.float64)
    for k in range(0, chain, 8):
        for left, right in ((small_a, big_b), (big_a, small_b), (big_a, big_b)):
            acc = toward_zero(acc + (left[:, k : k + 8] * right[:, k : k + 8]).sum(1))
    exact = (a.double() * b.double()).sum(1)
    return ((acc - exact).norm() / exact.norm()).item()


def test_rounding_to_tf32_by_two_multiplications():
    """11 bits, off by at most half of the last one (a whole one just below a power of two); NaN stays NaN."""
    a = torch.cat([torch.randn(100000) * 10.0 ** torch.randint(-30, 30, (100000,)), torch.tensor([1.9999999, -1.9999, 0.0])])
    big = nearest_tf32(a)
    assert torch.equal(cut(big), big.double())
    off = (big - a).abs() / a.abs().clamp_min(1e-38)
    assert off.max() <= 2.0**-10
    assert (off > 2.0**-11).float().mean() < 1e-3
    assert abs(((big - a) / a.abs().clamp_min(1e-38)).mean()) < 2.0**-16, "rounding must not lean to one side"
    assert nearest_tf32(torch.tensor([float("nan")])).isnan().all()


def test_error_of_tf32x3_grows_with_the_chain():
    """Why a chain has kChain products: twelve times the chain has over six times the error; kChain's is rounding's size."""
    chain = int(re.search(r"kChain = (\d+)", (ROOT / "csrc/cuda/region_statistics_math.cuh").read_text()).group(1))
    assert chain <= 512
    assert tf32x3_error(4608) > 6 * tf32x3_error(384) > 1e-6
    assert tf32x3_error(chain) < 4 * EPS


def test_the_products_follow_the_matmul_precision(kernel):
    inputs = problem((4, 3, 8, 8))
    before = torch.get_float32_matmul_precision()

    def gram(**options):
        return region_statistics(*inputs, backend=kernel, **options).gram_vjp

    compiled = torch.compile(gram, fullgraph=True, backend="aot_eager")
    try:
        for setting, precision in (("highest", "tf32x3"), ("high", "tf32"), ("medium", "tf32")):
            torch.set_float32_matmul_precision(setting)
            assert torch.equal(gram(), gram(precision=precision))
            assert torch.equal(compiled(), gram(precision=precision))
            assert not torch.equal(gram(), gram(precision="ieee"))
    finally:
        torch.set_float32_matmul_precision(before)


def test_gradients_are_computed_in_the_forwards_precision(kernel):
    inputs = problem((4, 3, 8, 8))
    grads = {
        p: values_and_gradients(lambda *t, p=p: region_statistics(*t, backend=kernel, precision=p), inputs)[4:]
        for p in PRECISIONS
    }
    exact = values_and_gradients(
        lambda *t: reference.region_statistics(*t, background_grams=False), [t.double() for t in inputs]
    )[4:]
    for i in range(3):
        ieee, x3, one = (((grads[p][i] - exact[i]).norm() / exact[i].norm()).item() for p in PRECISIONS)
        assert max(ieee, x3) < 8 * EPS
        assert 1e-5 < one < TF32_BOUND


def test_same_bits_under_any_schedule(kernel):
    """The emulation draws another order of threads and blocks for every launch."""
    inputs = problem((40, 3, 20, 20))
    runs = [
        values_and_gradients(lambda *t: region_statistics(*t, background_grams=True, backend=kernel), inputs) for _ in range(3)
    ]
    for other in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(other, runs[0], strict=True))


def test_precision_is_one_of_three(kernel):
    inputs = problem((2, 1, 2, 2))
    with pytest.raises(
        ValueError, match="region_statistics: precision must be None or one of 'ieee', 'tf32x3', 'tf32', got 'fp8'"
    ):
        region_statistics(*inputs, backend=kernel, precision="fp8")
    namespace = "sib_fast_emulated" if kernel == "emulated" else "sib_fast"
    with pytest.raises(RuntimeError, match="precision must be ieee, tf32x3 or tf32, got fp8"):
        getattr(torch.ops, namespace)._region_statistics(*inputs, False, "fp8")
    # The CPU and float64 have one precision.
    wide = [t.cpu().double() for t in inputs]
    assert torch.equal(
        region_statistics(*wide, precision="tf32", backend="cpu").gram_x, region_statistics(*wide, precision="ieee").gram_x
    )
