"""The CUDA kernels of foreground_mask on their own edges: crowds beyond the buffers, the longest windows, wide rows, splits."""

from __future__ import annotations

import pytest
import torch

from sib_fast import _backends, foreground_mask
from sib_fast.ops.foreground_mask import MaskOptions, mask_with_ranks, reference, selected_ranks
from sib_fast.testing.assertions import assert_no_worse_than, exact_orders, rank_pixels_of

KERNELS = ["emulated", "cuda"]
DEFAULTS = MaskOptions(5, 0.1, 10.0, (0.05, 0.95, 0.8, 0.8), 1e-8)


def window_means(mean_map: torch.Tensor, levels: torch.Tensor, options: MaskOptions) -> torch.Tensor:
    """d [N, P] in float64 from the kernel's own mean map and levels: what then remains is the rounding of h and of the sums."""
    m, level = mean_map.double(), levels.double()
    range_ = (level[:, 1] - level[:, 0]).clamp_min(0) + options.eps
    h = torch.sigmoid(options.slope * (m.abs() - level[:, 2, None, None]) / range_[:, None, None])
    return torch.nn.functional.avg_pool2d(h[:, None], options.window_size, 1, options.window_size // 2).flatten(1)


def assert_stable_sort(vjp: torch.Tensor, options: MaskOptions, kernel: str) -> None:
    """rank_pixels of g are those of a stable sort of the kernel's own mean map; those of d of its own window sums, by value."""
    mean_map, levels, ranks = selected_ranks(vjp, options, kernel)
    g = mean_map.flatten(1).abs()
    order = g.argsort(dim=1, stable=True)
    want = rank_pixels_of((order, order), options, mean_map.dtype)
    assert torch.equal(ranks[:, :3], want[:, :3])
    for level in range(3):
        exact = reference.soft_quantile(g.double(), options.quantiles[level], options.temperature)
        # The window leaves out e^-17 (float64: e^-40) of the weight: a rounding of the range of g (SPEC 3).
        roundings = 4 * torch.finfo(mean_map.dtype).eps
        torch.testing.assert_close(levels[:, level].double(), exact, rtol=0, atol=roundings * g.max().item())
    d = window_means(mean_map, levels, options)
    inside = ranks[:, 3] >= 0
    assert (inside == (want[:, 3] >= 0)).all()
    got = d.gather(1, ranks[:, 3].long().clamp_min(0))
    exact = d.gather(1, rank_pixels_of((order, d.argsort(dim=1, stable=True)), options, mean_map.dtype)[:, 3].long().clamp_min(0))
    assert ((got - exact).abs() <= 32 * torch.finfo(mean_map.dtype).eps)[inside].all()
    for n in range(vjp.shape[0]):
        chosen = ranks[n, 3][inside[n]].tolist()
        assert len(set(chosen)) == len(chosen)


def crowded(kind: str, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    vjp = torch.randn(shape, dtype=torch.float64)
    if kind == "zeros":  # the window of lo lies among thousands of equal pixels
        vjp[torch.rand(shape) < 0.3] = 0
    elif kind == "constant":
        vjp[:] = 0.25
    elif kind == "two-values":  # the window of hi begins in one crowd and ends in another
        vjp = torch.where(torch.rand(shape) < 0.95, 1.0, 2.0).double()
    elif kind == "one-ulp-apart":  # one bin of the histogram, several values of few bits' difference
        vjp = 1 + torch.randint(0, 4, shape).double() * torch.finfo(dtype).eps
    elif kind == "outlier":  # everything else in the lowest bin
        vjp = 1e-3 * vjp
        vjp[..., 0, 0] = 1e30
    elif kind == "all-zero":
        vjp[:] = 0
    return vjp.to(dtype)


KINDS = ["zeros", "constant", "two-values", "one-ulp-apart", "outlier", "all-zero"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_crowds_beyond_the_candidate_buffer(kind, dtype, kernel):
    """64 × 72 pixels have 256 bins and candidates a window; kRankable is 512: these crowds take the further passes."""
    assert_stable_sort(crowded(kind, (2, 1, 64, 72), dtype), DEFAULTS, kernel)


@pytest.mark.parametrize("temperature", [1e-3, 0.1, 0.8])
@pytest.mark.parametrize("kind", ["natural", "zeros"])
def test_windows_of_any_length(kind, temperature, kernel):
    """0.8 makes 31 entries; 33 are more than the gradient adds apart from its running sums."""
    options = DEFAULTS._replace(temperature=temperature)
    vjp = crowded(kind, (2, 2, 40, 48), torch.float32)
    assert_stable_sort(vjp, options, kernel)
    gradient_matches(vjp, options, kernel)


def test_the_registered_ops_refuse_what_their_kernels_do_not_take(registered):
    vjp, wide = torch.randn(1, 2, 40, 48), torch.randn(1, 1, 1, 12289)
    with pytest.raises(
        RuntimeError, match=r"temperature must leave a rank window of at most 32 entries .* got 0\.9, which takes 35"
    ):
        registered._foreground_mask(vjp, None, *DEFAULTS._replace(temperature=0.9))
    with pytest.raises(RuntimeError, match="vjp must be at most 12288 pixels wide for the CUDA kernels, got 12289"):
        registered._foreground_mask(wide, None, *DEFAULTS)
    plane, levels = torch.rand(1, 1, 40, 48), torch.rand(1, 4)
    ranks = torch.zeros(1, 4, 35, dtype=torch.int32)
    with pytest.raises(RuntimeError, match="temperature must leave a rank window of at most 32 entries"):
        registered._foreground_mask_backward(plane, plane, plane[0], levels, ranks, 2, *DEFAULTS._replace(temperature=0.9))


def gradient_matches(vjp: torch.Tensor, options: MaskOptions, kernel: str) -> None:
    cotangent = torch.rand(vjp.shape[0], 1, *vjp.shape[2:], dtype=vjp.dtype)
    orders = exact_orders(vjp, options)
    ranks = rank_pixels_of(orders, options, vjp.dtype)

    def run(function, value):
        value = value.detach().requires_grad_()
        mask = function(value)
        return mask.detach(), torch.autograd.grad(mask, value, cotangent.to(mask.dtype))[0]

    got = run(lambda v: mask_with_ranks(v, ranks, options, kernel), vjp)
    low, exact = (run(lambda v: reference.foreground_mask(v, **options._asdict(), orders=orders), v) for v in (vjp, vjp.double()))
    for a, b, c, what in zip(got, low, exact, ("mask", "grad_vjp"), strict=True):
        if vjp.dtype == torch.float64:
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9 * b.abs().max().item())
        else:
            assert_no_worse_than(a, b, c, what=what)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize(
    ("shape", "window"),
    [
        ((1, 1, 2, 12288), 3),  # the widest: a row in double takes more than 48 KiB
        ((1, 2, 1, 12001), 9001),
        ((1, 1, 300, 2), 31),  # more bands than a block has warps
        ((1, 1, 6, 2049), 2047),  # one row a block in float64
        ((1, 2, 90, 33), 63),  # 64-bit sums in float32; a strip of one column
        ((1, 1, 45, 45), 75),  # a window larger than the image
        ((3, 1, 33, 31), 33),
    ],
    ids=str,
)
def test_any_size_of_image_and_window(shape, window, dtype, kernel):
    vjp = torch.randn(shape, dtype=dtype)
    options = DEFAULTS._replace(window_size=window)
    assert_stable_sort(vjp, options, kernel)
    gradient_matches(vjp, options, kernel)


@pytest.mark.parametrize("window", [31, 33])
def test_fixed_point_is_rounded_to_nearest(window, kernel):
    """22 bits at w = 31: rounded to nearest the errors of 961 pixels cancel, truncated they are 1.2e-7 of every window.

    The float32 steepness leaves up to 6e-8·u·h(1-h) < 1.4e-8 an image, the rounding of t 3e-8, of either sign.
    """
    options = DEFAULTS._replace(window_size=window)
    vjp = torch.randn((8, 1, 64, 64), generator=torch.Generator("cpu").manual_seed(3), device="cpu")
    mean_map, levels, _ = selected_ranks(vjp.to(torch.get_default_device()), options, kernel)
    d = window_means(mean_map, levels, options)
    errors = levels[:, 3].double() - reference.soft_quantile(d, options.quantiles[3], options.temperature)
    assert errors.mean().abs() < 4e-8
    assert errors.abs().max() < 1e-7


def test_equal_windows_tie_to_the_bit(kernel):
    """Fixed point: rows with the same content give the same window sums, so their ranks follow the pixel order."""
    row = torch.randn(1, 1, 1, 40)
    vjp = row.expand(1, 1, 60, 40).contiguous()
    mask = foreground_mask(vjp, window_size=7, backend=kernel)[0, 0, 3:-3]
    assert (mask == mask[0]).all()


@pytest.mark.parametrize("offset", [0, 1])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_unaligned_maps_take_scalar_loads(dtype, offset, kernel):
    flat = torch.randn(2 * 3 * 16 * 16 + 1).to(dtype)
    vjp = flat[offset : offset + 2 * 3 * 16 * 16].view(2, 3, 16, 16)
    mean_map, *_ = selected_ranks(vjp, DEFAULTS, kernel)
    wide = vjp.double() if dtype == torch.float64 else vjp.float()
    want = ((wide[:, 0] + wide[:, 1]) + wide[:, 2]) * torch.tensor(1 / 3, dtype=wide.dtype)
    assert torch.equal(mean_map, want)


@pytest.mark.parametrize("channels", [16, 18])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_packed_channels_give_the_same_bits(dtype, channels, kernel):
    """16 channels fill whole loads of channels_last maps in every type, 18 do not; a slice of a larger map has other strides."""
    vjp = torch.randn(2, channels, 9, 8).to(dtype)
    want = selected_ranks(vjp, DEFAULTS, kernel)[0]
    last = vjp.contiguous(memory_format=torch.channels_last)
    wider = torch.cat([vjp, vjp], dim=1).contiguous(memory_format=torch.channels_last)[:, :channels]
    cut = torch.cat([last, last], dim=3)[..., :8]
    for same in (last, wider, cut):
        assert torch.equal(selected_ranks(same, DEFAULTS, kernel)[0], want)
    ascending = torch.zeros_like(want)
    for plane in vjp.unbind(1):
        ascending = ascending + plane.to(want.dtype)
    assert torch.equal(want, ascending * torch.tensor(1 / channels, dtype=want.dtype))


def test_an_image_s_bits_do_not_depend_on_its_batch(kernel):
    vjp = torch.randn(5, 2, 70, 130)
    cotangent = torch.randn(5, 1, 70, 130)

    def run(v, c):
        v = v.detach().requires_grad_()
        mask = foreground_mask(v, window_size=9, backend=kernel)
        return mask.detach(), torch.autograd.grad(mask, v, c)[0]

    mask, grad = run(vjp, cotangent)
    for n in (0, 4):
        alone, grad_alone = run(vjp[n : n + 1], cotangent[n : n + 1])
        assert torch.equal(alone, mask[n : n + 1])
        assert torch.equal(grad_alone, grad[n : n + 1])


@pytest.mark.parametrize("seed", ["1", "2", "3", "4", "5"])
@pytest.mark.parametrize("temperature", [0.1, 0.8])
def test_every_schedule_gives_the_same_bits(seed, temperature, kernel, monkeypatch):
    """A race or a missing barrier would show here. More than one block an image in every kernel: P > 8192."""
    generator = torch.Generator("cpu").manual_seed(7)
    vjp = torch.randn((2, 1, 72, 130), generator=generator)
    vjp[1][torch.rand(vjp[1].shape, generator=generator) < 0.4] = 0
    cotangent = torch.rand((2, 1, 72, 130), generator=generator)
    options = DEFAULTS._replace(temperature=temperature, window_size=9)

    def run():
        v = vjp.to(torch.get_default_device()).requires_grad_()
        mask = mask_with_ranks(v, None, options, kernel)
        return mask.detach(), torch.autograd.grad(mask, v, cotangent.to(mask.device))[0], *selected_ranks(v, options, kernel)

    monkeypatch.setenv("SIB_FAST_EMULATION_SEED", "0")
    want = run()
    monkeypatch.setenv("SIB_FAST_EMULATION_SEED", seed)
    for a, b in zip(run(), want, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("kib", ["48", "99", "163", "227"])
def test_one_variant_serves_every_shared_memory(kib, kernel, monkeypatch):
    monkeypatch.setenv("SIB_FAST_EMULATION_SHARED", kib)
    for dtype, shape in ((torch.float64, (1, 1, 3, 6144)), (torch.float32, (1, 1, 64, 1024))):
        vjp = torch.randn(shape, dtype=dtype, requires_grad=True)
        foreground_mask(vjp, window_size=5, backend=kernel).sum().backward()


@pytest.mark.parametrize("where", ["one-nan", "all-nan", "most-inf"])
def test_what_is_not_finite_stays_with_its_image(where, kernel):
    vjp = torch.randn(3, 1, 40, 40)
    if where == "one-nan":
        vjp[1, 0, 5, 5] = float("nan")
    elif where == "all-nan":
        vjp[1] = float("nan")
    else:
        vjp[1, 0, :36] = float("inf")
    mask = foreground_mask(vjp, window_size=5, backend=kernel)
    assert mask[1].isnan().any()
    assert torch.equal(mask[[0, 2]], foreground_mask(vjp[[0, 2]], window_size=5, backend=kernel))
    assert torch.isfinite(mask[[0, 2]]).all()


@pytest.mark.skipif(_backends.MISSING["cpu"] is not None, reason="the CPU kernels are the twin")
def test_selection_agrees_with_the_cpu_twin(kernel):
    for seed in range(3):
        vjp = torch.randn((2, 3, 60, 50), generator=torch.Generator("cpu").manual_seed(seed), device="cpu")
        mine = selected_ranks(vjp.to(torch.get_default_device()), DEFAULTS, kernel)
        twin = selected_ranks(vjp, DEFAULTS, "cpu")
        assert torch.equal(mine[0].cpu(), twin[0])
        assert torch.equal(mine[2][:, :3].cpu(), twin[2][:, :3])
        torch.testing.assert_close(mine[1].cpu(), twin[1], rtol=1e-6, atol=0)
