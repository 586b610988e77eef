"""The Triton kernels of foreground_mask: what the op's own tests cannot force, and what the compiler makes of them.

Numbers run under TRITON_INTERPRET=1 (`make interpret`) or on a GPU; compilation needs neither.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from sib_fast import foreground_mask
from sib_fast.ops.foreground_mask import MaskOptions, selected_ranks
from sib_fast.testing.assertions import rank_pixels_of
from sib_fast.testing.problems import layouts
from tests.triton import aot

pytest.importorskip("triton")
from sib_fast.ops.foreground_mask import triton as kernels

ROOT = Path(__file__).parents[2]
KERNELS = ["triton"]
OPTIONS = MaskOptions(31, 0.1, 10.0, (0.05, 0.95, 0.8, 0.8), 1e-8)
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
compiled_only = pytest.mark.skipif(aot.INTERPRETING, reason="TRITON_INTERPRET=1 leaves no function that could be compiled")


def both(vjp, options=OPTIONS):
    mask, mean_map, levels, ranks = kernels.forward(vjp, None, *options)
    return kernels.backward(torch.ones_like(mask), mask, mean_map, levels, ranks, vjp.shape[1], *options)


def launches_of(shape=(2, 3, 224, 224), dtype=torch.float32, layout="contiguous", options=OPTIONS):
    vjp = layouts(torch.zeros(shape, dtype=dtype))[layout]
    return aot.record(lambda: both(vjp, options))


# ---- compilation ------------------------------------------------------------------------------------------------------------


@pytest.mark.sampled(1)
@compiled_only
@pytest.mark.parametrize("capability", aot.CAPABILITIES)
def test_default_configurations_have_no_stack_and_no_spills(capability, drawn):
    """Every launch of a 3×224×224 map, in every dtype, contiguous and channels_last; the table is kept in build/reports."""
    launches = [
        launch
        for dtype in DTYPES
        for layout in ("contiguous", "channels_last")
        for launch in launches_of(dtype=dtype, layout=layout)
    ]
    assert len({launch.kernel.__name__ for launch in launches}) == 9
    rows = aot.report(drawn(launches, aot.name_of), [capability])
    report = ROOT / f"build/reports/triton_foreground_mask_sm{capability}.txt"
    report.parent.mkdir(parents=True, exist_ok=True)
    report.write_text(aot.table(rows) + "\n")
    assert aot.table(row for row in rows if not row.clean) == aot.table([])


@compiled_only
@pytest.mark.parametrize("dtype", [torch.float32, pytest.param(torch.float64, marks=pytest.mark.long)], ids=str)
def test_tiles_of_a_large_window_fit_the_smallest_shared_memory(dtype):
    """A tile is at least twice as long as its window; what it gathers must fit 99 KiB all the same."""
    launches = launches_of((1, 3, 600, 600), dtype, options=OPTIONS._replace(window_size=301))
    rows = aot.report([one for one in launches if "_columns_" in one.kernel.__name__], [86])
    assert len(rows) == 2
    assert all(row.shared <= 99 * 1024 for row in rows), aot.table(rows)


@compiled_only
def test_a_kernel_that_spills_is_seen():
    import triton
    import triton.language as tl

    # What must be held at once is twice what a thread's 255 registers can hold.
    source = (
        "import triton\nimport triton.language as tl\n\n\n"
        "@triton.jit\ndef kernel(x, y):\n"
        "    at = tl.arange(0, 16384)\n"
        "    values = tl.load(x + at)\n"
        "    tl.store(y + at, values / tl.sum(values, 0))\n"
    )
    folder = ROOT / "build/reports"
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "spilling_kernel.py"  # triton reads a kernel's source from its file
    path.write_text(source)
    scope: dict = {"__name__": "spilling_kernel", "triton": triton, "tl": tl}
    exec(compile(source, str(path), "exec"), scope)
    x = torch.zeros(16384)
    (launch,) = aot.record(lambda: scope["kernel"][1,](x, x, num_warps=1))
    row = aot.resources(launch, 80)
    assert row.local_accesses > 0
    assert not row.clean


# ---- launches ---------------------------------------------------------------------------------------------------------------


class _Seen(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.append(str(function))
        return function(*args, **(kwargs or {}))


@compiled_only
@pytest.mark.parametrize(
    ("size", "forward", "backward"), [(64, 8, 2), (224, 9, 2), (300, 10, 2), (512, 11, 2)], ids=["4096", "2^16", "2^17", "2^18"]
)
def test_launches_and_nothing_else_that_runs_on_the_device(size, forward, backward):
    """README.md states these counts. Nothing is read back or copied from the host, so a CUDA graph can hold it all."""
    vjp = torch.zeros(1, 3, size, size)
    with _Seen() as seen:
        launched = aot.record(lambda: both(vjp))
    assert len(launched) == forward + backward
    free = {
        "aten.new_empty.default",
        "aten.empty_like.default",
        "aten.view.default",
        "aten.view.dtype",
        "aten.ones_like.default",
        "aten.detach.default",
    }
    assert [name for name in seen.names if name not in free] == ["aten.new_zeros.default"]


@compiled_only
def test_launches_do_not_depend_on_the_batch():
    """Everything but the grid and the number of images: an image's bits are the same in every batch."""
    one, many = launches_of((1, 3, 224, 224)), launches_of((64, 3, 224, 224))
    assert [launch.key for launch in one] == [launch.key for launch in many]
    assert all(64 * a.grid[0] == b.grid[0] for a, b in zip(one, many, strict=True))


@compiled_only
@pytest.mark.parametrize(
    "shape", [(64, 3, 1536, 1536), (4096, 3, 224, 224), (100_000, 3, 32, 32), (1, 3, 40_000, 40_000)], ids=str
)
def test_every_grid_is_one_that_a_device_takes(shape):
    with torch.device("meta"):
        for dtype in (torch.float64, torch.float32):
            launches = launches_of(shape, dtype)
            assert max(launch.grid[0] for launch in launches) > 65535
            aot.assert_grids_fit(launches)


@compiled_only
def test_every_launch_is_under_the_device_guard(monkeypatch):
    inside = []

    class Guard:
        def __init__(self, tensor):
            self.tensor = tensor

        def __enter__(self):
            inside.append(self.tensor.device)

        def __exit__(self, *_):
            inside.pop()

    monkeypatch.setattr(torch.cuda, "device_of", Guard)
    guarded = []
    real = aot._launch
    monkeypatch.setattr(aot, "_launch", lambda *a: guarded.append(bool(inside)) or real(*a))
    assert len(launches_of()) == len(guarded)
    assert all(guarded)


def test_usable_without_any_compiled_library():
    """A CUDA machine without a compiler: no native library, the ops and the fake kernels are there all the same."""
    code = (
        "import torch, sib_fast\n"
        "assert sib_fast.why_not('cpu') is not None and sib_fast.why_not('cuda') is not None\n"
        "assert sib_fast.why_not('triton') is None, sib_fast.why_not('triton')\n"
        "vjp = torch.randn(2, 3, 12, 10, dtype=torch.float64, requires_grad=True)\n"
        "masks = [sib_fast.foreground_mask(vjp, window_size=3, backend=b) for b in ('triton', 'reference')]\n"
        "grads = [torch.autograd.grad(mask.square().sum(), vjp)[0] for mask in masks]\n"
        "torch.testing.assert_close(*masks, rtol=1e-10, atol=1e-10)\n"
        "torch.testing.assert_close(*grads, rtol=1e-9, atol=1e-9)\n"
    )
    environment = {**os.environ, "SIB_FAST_LOAD": "0", "TRITON_INTERPRET": "1", "PYTHONPATH": str(ROOT)}
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, timeout=300)
    assert result.returncode == 0, result.stderr


# ---- numbers ----------------------------------------------------------------------------------------------------------------


def check_ranks(vjp, options, kernel):
    """Exactly the pixels that a stable sort of what the kernel ranked puts there; window 1 keeps d in the order of g."""
    mean_map, _, ranks = selected_ranks(vjp, options, kernel)
    order = mean_map.flatten(1).abs().argsort(dim=1, stable=True)
    want = rank_pixels_of((order, order), options, vjp.dtype)
    assert torch.equal(ranks, want)


def coarse(shape, zeros, dtype=torch.float64):
    """Values on a grid of 1/8, `zeros` of them 0."""
    values = (torch.rand(shape, dtype=dtype) * 8).ceil() / 8
    return torch.where(torch.rand(shape, dtype=dtype) < zeros, 0.0, values)


@pytest.mark.parametrize("passes", [0, 1, 2])
@pytest.mark.parametrize("zeros", [0.0, 0.3, 0.7, 0.97])
def test_ties_beyond_the_candidates_of_a_window(zeros, passes, kernel, monkeypatch):
    """Each of 8 values fills hundreds of pixels, 0 thousands: more than are ranked pair by pair."""
    monkeypatch.setattr(kernels, "_passes", lambda plan, of_floats: passes)
    vjp = coarse((1, 1, 64, 63), zeros)
    options = OPTIONS._replace(window_size=1, slope=2.0, quantiles=(0.05, 0.95, 0.5, 0.8))
    check_ranks(vjp, options, kernel)


@pytest.mark.parametrize("passes", [0, 2])
@pytest.mark.parametrize("start", [1497, 1498, 1500, 1503])  # 1500 and 1503 are the first ranks of a value
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_ranks_between_two_crowded_values(dtype, start, passes, kernel, monkeypatch):
    """A window over the last of 1,500 equal values, a few of their own, and the first of 1,500 others."""
    monkeypatch.setattr(kernels, "_passes", lambda plan, of_floats: passes)
    values = torch.cat([torch.full((1500,), 0.25), torch.tensor([0.3, 0.27, 0.27]), torch.full((1500,), 0.5)]).to(dtype)
    vjp = values[torch.randperm(len(values), device="cpu").to(values.device)].view(1, 1, 39, 77)
    half = 5 if dtype == torch.float64 else 3
    middle = (start + half) / 3002
    options = OPTIONS._replace(window_size=1, temperature=0.1, slope=2.0, quantiles=(0.2, 0.9, middle, middle))
    check_ranks(vjp, options, kernel)


@pytest.mark.parametrize("scale", [1e-30, 1e-4, 1e30])
@pytest.mark.parametrize("passes", [0, 1, 2])
def test_any_scale_is_ranked(scale, passes, kernel, monkeypatch):
    """Below 2^-56 and above 2^8 every value falls into one bin of the first histogram."""
    monkeypatch.setattr(kernels, "_passes", lambda plan, of_floats: passes)
    vjp = scale * torch.randn(1, 2, 40, 41, dtype=torch.float64)
    mean_map, _, ranks = selected_ranks(vjp, OPTIONS, kernel)
    order = mean_map.flatten(1).abs().argsort(dim=1, stable=True)
    assert torch.equal(ranks[:, :3], rank_pixels_of((order, order), OPTIONS, vjp.dtype)[:, :3])


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # numpy's word on Inf - Inf, in the interpreter
def test_what_is_not_finite_is_ranked(dtype, bad, kernel, monkeypatch, poisoned_memory):
    """The bin of NaN reaches to the largest key, through every histogram: its end may not wrap around to below 0."""
    monkeypatch.setattr(kernels, "_passes", lambda plan, of_floats: 2)
    vjp = torch.randn(1, 1, 40, 40, dtype=dtype)
    vjp[:, :, torch.rand(40, 40) < 0.3] = bad
    mean_map, _, ranks = selected_ranks(vjp, OPTIONS, kernel)
    order = mean_map.flatten(1).abs().argsort(dim=1, stable=True)
    assert torch.equal(ranks[:, :3], rank_pixels_of((order, order), OPTIONS, dtype)[:, :3])


@pytest.mark.parametrize("temperature", [1.0, 3.1])
def test_long_windows_are_ranked(temperature, kernel):
    vjp = coarse((2, 1, 24, 25), 0.3)
    check_ranks(vjp, OPTIONS._replace(window_size=1, slope=2.0, temperature=temperature), kernel)


@pytest.mark.parametrize(("window_size", "temperature"), [(9, 0.1), (9, 2.0), (61, 0.5)])
def test_a_rank_of_t_reaches_every_tile_within_its_window(window_size, temperature, kernel, monkeypatch):
    """Its term is left out of tiles beyond: with tiles of few columns there are many on either side."""
    vjp = torch.randn(1, 2, 50, 61, dtype=torch.float64, requires_grad=True)

    def gradient(backend):
        mask = foreground_mask(vjp, window_size=window_size, temperature=temperature, slope=2.0, backend=backend)
        return torch.autograd.grad(mask, vjp, torch.linspace(0, 1, mask.numel()).view_as(mask))[0]

    want = gradient("reference")
    real = kernels._tiling
    monkeypatch.setattr(
        kernels, "_tiling", lambda tile, most, *rest, **more: real(tile, 1 if most == 16 else most, *rest, **more)
    )
    assert (gradient(kernel) - want).norm() <= 1e-9 * want.norm()


@pytest.mark.parametrize(("shape", "window_size"), [((1, 2, 270, 9), 5), ((1, 2, 7, 290), 9), ((2, 1, 40, 37), 15)])
def test_tiles_leave_no_seam(shape, window_size, kernel, monkeypatch):
    """Several tiles along each axis, by size and by force: d is exact, so the mask has the same bits in any tiling."""
    vjp = torch.randn(shape, dtype=torch.float64)

    def run(backend):
        value = vjp.clone().requires_grad_()
        mask = foreground_mask(value, window_size=window_size, backend=backend)
        return mask.detach(), torch.autograd.grad(mask, value, torch.linspace(-1, 1, mask.numel()).view_as(mask))[0]

    got, want = run(kernel), run("reference")
    monkeypatch.setattr(kernels, "_tile", lambda extent, reach: max(16, 4 * (1 << (2 * reach).bit_length())))
    forced = run(kernel)
    assert torch.equal(got[0], forced[0])
    for mask, grad in (got, forced):
        torch.testing.assert_close(mask, want[0], rtol=1e-10, atol=1e-12)
        assert (grad - want[1]).norm() <= 1e-9 * want[1].norm()


def test_a_NaN_makes_its_whole_image_NaN_and_no_other(kernel):
    """d is held in integers, which cannot carry it; plain autograd's quantiles are NaN as soon as one pixel is."""
    for dtype in (torch.float64, torch.float32):
        vjp = torch.randn(3, 2, 20, 20, dtype=dtype)
        vjp[1, 0, 5, 6] = float("nan")
        mask = foreground_mask(vjp, window_size=3, backend=kernel)
        assert mask[1].isnan().all()
        assert torch.isfinite(mask[[0, 2]]).all()


@pytest.mark.parametrize("axis", ["image", "channel", "row"])
def test_offsets_beyond_2_to_the_31(axis, kernel, tmp_path):
    """Strides of a map of over 2^31 elements, in a sparse file of which a few pages exist."""
    if torch.get_default_device().type != "cpu":
        pytest.skip("the sparse file is CPU memory")
    # Each stride fits 32 bits, so that only the product with an index can overflow.
    far, width = 2**30 + 4096, 12
    strides = {"image": (far, 200, width, 1), "channel": (512, far, width, 1), "row": (1024, 512, far // 3, 1)}[axis]
    shape = (3, 3, 8, width)
    size = 1 + sum((extent - 1) * stride for extent, stride in zip(shape, strides, strict=True))
    storage = torch.from_file(str(tmp_path / "sparse"), shared=True, size=size, dtype=torch.bfloat16)
    vjp = storage.as_strided(shape, strides)
    vjp.copy_(torch.randn(shape))
    mask = foreground_mask(vjp, window_size=3, backend=kernel)
    assert torch.equal(mask, foreground_mask(vjp.contiguous(), window_size=3, backend=kernel))


def test_opcheck(kernel):
    op = torch.ops.sib_fast_triton
    for dtype in (torch.float32, torch.bfloat16):
        vjp = torch.randn(2, 3, 9, 10).to(dtype)
        arguments = OPTIONS._replace(window_size=5)
        torch.library.opcheck(op._foreground_mask.default, (vjp, None, *arguments))
        mask, mean_map, levels, ranks = op._foreground_mask(vjp, None, *arguments)
        torch.library.opcheck(
            op._foreground_mask_backward.default, (torch.randn_like(mask), mask, mean_map, levels, ranks, 3, *arguments)
        )


def test_many_channels_add_up_accurately(kernel):
    """2,000 channels that nearly cancel: sums in groups, within a few roundings of their size."""
    vjp = torch.randn(1, 2000, 4, 5) + 1.0
    mean_map, _, _ = selected_ranks(vjp, OPTIONS, kernel)
    exact = vjp.double().mean(dim=1)
    assert (mean_map.double() - exact).abs().max() <= 16 * 2**-24 * exact.abs().max()
