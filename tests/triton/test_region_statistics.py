"""The Triton kernels of region_statistics: what the op's own tests cannot force, and what the compiler makes of them.

Numbers run under TRITON_INTERPRET=1 or on a GPU; compilation needs neither.
"""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from sib_fast import region_statistics
from sib_fast.testing.problems import layouts
from tests.triton import aot

pytest.importorskip("triton")
from sib_fast.ops.region_statistics import triton as kernels
from sib_fast.ops.region_statistics.triton import operands, tiles

KERNELS = ["triton"]
TABLES = ("80", "86", "90", "100", "120")
TABLE_OF = {80: "80", 86: "86", 89: "86", 90: "90", 100: "100", 120: "120"}
LIMIT = {80: 163, 86: 99, 89: 99, 90: 227, 100: 227, 120: 99}  # KiB of shared memory that a block may have
KINDS = {"tensor": (torch.float32, "tf32x3"), "ieee": (torch.float32, "ieee"), "float64": (torch.float64, "ieee")}
compiled_only = pytest.mark.skipif(aot.INTERPRETING, reason="TRITON_INTERPRET=1 leaves no function that could be compiled")


def inputs_of(shape, dtype=torch.float32, seed=0):
    g = torch.Generator("cpu").manual_seed(seed)
    vjp, x = (torch.randn(shape, generator=g, dtype=torch.float64, device="cpu") for _ in range(2))
    mask = torch.rand((shape[0], 1, *shape[2:]), generator=g, dtype=torch.float64, device="cpu")
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    to = torch.get_default_device()
    return vjp.to(to, dtype), x.to(to, dtype), mask.to(to, wide)


def value_and_grads(inputs, backend, precision=None):
    """Every output and the gradient of a fixed combination of them, the Grams' cotangents not symmetric."""
    leaves = [t.detach().requires_grad_() for t in inputs]
    out = region_statistics(*leaves, background_grams=True, backend=backend, precision=precision)
    weights = (torch.arange(t.numel(), dtype=torch.float64).view(t.shape).cos() for t in out)
    grads = torch.autograd.grad(sum((t * w).sum() for t, w in zip(out, weights, strict=True)), leaves)
    return [t.detach() for t in (*out, *grads)]


def assert_matches(inputs, got, bound):
    want = value_and_grads([t.double() for t in inputs], "reference")
    for index, (a, b) in enumerate(zip(got, want, strict=True)):
        assert torch.isfinite(a).all()
        assert (a.double() - b).norm() <= bound * b.norm(), index


def force(monkeypatch, table, multiprocessors=132):
    monkeypatch.setattr(tiles, "machine_of", lambda device: tiles.Machine(table, multiprocessors))


def force_tile(monkeypatch, tile, multiprocessors):
    """One tile for everything, and few programs to share the work."""
    for table in (tiles.GRAM, tiles.RESIDENT_GRADIENT, tiles.STREAMED_GRADIENT):
        monkeypatch.setitem(table, "interpreter", dict.fromkeys(KINDS, (tile,)))
    force(monkeypatch, "interpreter", multiprocessors)


# ---- numbers ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("images", "kind"),
    # All batches in the arithmetic of the default; the others' tiles are smaller, and the interpreter takes as long a tile.
    [*((n, "tensor") for n in (1, 2, 3, 16, 33, 130, 300)), (33, "ieee"), (3, "float64"), (33, "float64")],
)
def test_any_batch_in_the_tiles_of_a_gpu(images, kind, kernel, monkeypatch):
    """The GPUs' own tiles, and with float32 and one small tile several row tiles, chains and partial sums."""
    force(monkeypatch, "90")
    dtype, precision = KINDS[kind]
    inputs = inputs_of((images, 1, 2, 6), dtype)
    assert_matches(inputs, value_and_grads(inputs, kernel, precision), 1e-12 if dtype == torch.float64 else 1e-6)


@pytest.mark.parametrize("table", ["80", "120"])
@pytest.mark.parametrize("images", [20, 72])
def test_every_table(table, images, kernel, monkeypatch):
    force(monkeypatch, table)
    inputs = inputs_of((images, 2, 3, 5))
    assert_matches(inputs, value_and_grads(inputs, kernel, "tf32x3"), 1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_several_chains_partial_sums_and_row_tiles(kind, kernel, monkeypatch):
    """More than 1,024 products in one program, more than 512 images in one product, more tiles than one."""
    dtype, precision = KINDS[kind]
    monkeypatch.setattr(kernels, "_LEAST_PRODUCTS", 256)
    force_tile(monkeypatch, tiles.Tile(16, 256, 4, 1, 16), multiprocessors=6)
    for shape in ((18, 3, 25, 50), (520, 1, 1, 3)) if kind == "tensor" else ((18, 3, 25, 50),):
        inputs = inputs_of(shape, dtype)
        assert_matches(inputs, value_and_grads(inputs, kernel, precision), 1e-12 if dtype == torch.float64 else 1e-6)


@pytest.mark.parametrize(
    "shape", [(3, 70, 2, 3), (3, 3, 4, 5), (2, 130, 1, 1), (2, 40, 4, 4), (2, 2, 9, 30), (3, 5, 6, 1)], ids=str
)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "strided", "transposed"])
def test_every_walk(shape, layout, kernel, monkeypatch):
    """Planes, channels, and both with short rows run together; blocks smaller than a row, so that each walk has several.

    Few programs: the VJP's part of the mask gradient is then added to x's where it stands.
    """
    force_tile(monkeypatch, tiles.Tile(16, 32, 4, 1, 16), multiprocessors=1)
    inputs = inputs_of(shape, torch.float64)
    laid_out = (*(layouts(t)[layout] for t in inputs[:2]), inputs[2])
    assert_matches(inputs, value_and_grads(laid_out, kernel), 1e-12)


@pytest.mark.parametrize(("kind", "multiprocessors"), [("float64", 200), ("tensor", 3)])
def test_maps_that_are_cut_differently_are_merged_together(kind, multiprocessors, kernel, monkeypatch):
    """x channels last: another number of splits, or float64 partial sums for x's sake alone."""
    dtype, precision = KINDS[kind]
    monkeypatch.setattr(kernels, "_LEAST_PRODUCTS", 32)
    force_tile(monkeypatch, tile := tiles.Tile(16, 32, 4, 1, 16), multiprocessors)
    vjp, x, mask = inputs_of((3, 70, 5, 7), dtype)
    laid_out = vjp, x.contiguous(memory_format=torch.channels_last), mask
    units = [kernels._order(map_, kernels._walk(map_), tile.block_d)[2] for map_ in laid_out[:2]]
    (of_vjp,), (of_x,) = (kernels._cuts(of_map, 3, tile, 2, 2 * multiprocessors) for of_map in units)
    if kind == "float64":
        assert 1 < of_vjp.splits < of_x.splits
    else:
        assert of_vjp.units * tile.block_d <= operands.PARTIAL.value < of_x.units * tile.block_d
    made, launch = [], kernels.gram_partials_kernel

    class Watched:
        def __getitem__(self, grid):
            return lambda map_, mask, out, *rest, **options: (
                made.append(out.dtype),
                launch[grid](map_, mask, out, *rest, **options),
            )

    monkeypatch.setattr(kernels, "gram_partials_kernel", Watched())
    assert_matches(laid_out, value_and_grads(laid_out, kernel, precision), 1e-12 if kind == "float64" else 1e-6)
    # In float32 the error of the longer sums is still below that bound at this size.
    assert made == [torch.float64] * 2


@pytest.mark.parametrize("multiprocessors", [1, 46, 114, 160])
def test_any_number_of_multiprocessors(multiprocessors, kernel, monkeypatch):
    monkeypatch.setattr(kernels, "_LEAST_PRODUCTS", 64)
    force_tile(monkeypatch, tiles.Tile(16, 64, 4, 1, 16), multiprocessors)
    inputs = inputs_of((18, 3, 30, 31), torch.float64)
    assert_matches(inputs, value_and_grads(inputs, kernel), 1e-12)


def test_channels_split_over_programs(kernel):
    """Few pixels and many channels: a pixel's mask gradient comes from several programs, added in a launch of its own."""
    inputs = inputs_of((3, 80, 4, 5), torch.float64)
    assert_matches(inputs, value_and_grads(inputs, kernel), 1e-12)


def test_the_same_bits_again(kernel):
    inputs = inputs_of((18, 3, 9, 11))
    first, second = (value_and_grads(inputs, kernel) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_splitting_into_two_tf32_numbers_keeps_22_bits(kernel, monkeypatch):
    """Under the interpreter a tf32 product keeps all bits, so what is left out (small·small) and lost can be seen."""
    inputs = inputs_of((16, 3, 20, 20))
    ieee, split, rounded = (value_and_grads(inputs, kernel, mode)[:2] for mode in ("ieee", "tf32x3", "tf32"))
    for a, b, c in zip(ieee, split, rounded, strict=True):
        assert (b - a).norm() <= 3e-7 * a.norm()
        assert 1e-6 * a.norm() < (c - a).norm() <= 2**-11 * a.norm()


def test_a_nan_is_not_rounded_away(kernel):
    for precision in ("tf32x3", "tf32"):
        vjp, x, mask = inputs_of((3, 2, 4, 4))
        vjp.view(torch.int32)[1, 0, 0, 0] = 0x7FFFFFFF  # what a GPU calls NaN
        out = region_statistics(vjp, x, mask, backend=kernel, precision=precision)
        assert out.gram_vjp[1].isnan().all()
        assert out.gram_vjp[:, 1].isnan().all()
        assert torch.isfinite(out.gram_vjp[0, 0])


def test_opcheck_of_the_triton_ops(kernel):
    """Schemas, fakes and aliasing of the registered ops, with and without background Grams."""
    vjp, x, mask = inputs_of((3, 2, 3, 4))
    x = x.contiguous(memory_format=torch.channels_last)
    ops = torch.ops.sib_fast_triton
    checks = ("test_schema", "test_faketensor")
    for background in (False, True):
        arguments = (vjp, x, mask, background, "tf32x3")
        torch.library.opcheck(ops._region_statistics.default, arguments, test_utils=checks)
        out = ops._region_statistics(*arguments)
        gram, vector = torch.ones_like(out[0]), torch.ones_like(out[2])
        grads = (gram, gram, vector, vector, *((gram, gram) if background else (None, None)))
        backward = (*grads, vjp, x, mask, out[4], out[5], True, background, True, "tf32x3")
        torch.library.opcheck(ops._region_statistics_backward.default, backward, test_utils=checks)


# ---- the length of chains, by emulation -------------------------------------------------------------------------------------


def tensor_core_sum(a, b, chain):
    """Σ a·b as a tensor core adds: 8 products at a time, exactly, then towards zero to 24 bits; float32 between chains."""

    def towards_zero(t):
        narrow = t.float()
        return torch.where(narrow.double().abs() > t.abs(), torch.nextafter(narrow, torch.zeros(())), narrow)

    products = (a * b).unflatten(-1, (-1, 8)).sum(-1)
    total = torch.zeros(a.shape[:-1])
    for begin in range(0, products.shape[-1], chain // 8):
        part = torch.zeros_like(total)
        for index in range(begin, min(begin + chain // 8, products.shape[-1])):
            part = towards_zero(part.double() + products[..., index])
        total += part
    return total.double()


def test_error_grows_with_the_chain_and_ours_are_short():
    """Why a chain has an end: the truncations of a long one add up, all to the same side."""
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.rand(64, 4608, generator=generator, dtype=torch.float64) + 0.5 for _ in range(2))
    exact = (a * b).sum(-1)
    error = {n: ((tensor_core_sum(a, b, n) - exact) / exact).abs().mean().item() for n in (32, 512, 4608)}
    assert error[32] < 3e-7
    assert error[512] < 3e-6
    assert 6 < error[4608] / error[512] < 12  # nine times as long
    for name, kind in itertools.product(TABLES, KINDS):
        for tile in tiles.GRAM[name][kind]:
            products = tile.block_d if kind == "tensor" else operands.CHAIN.value
            assert products <= 512
            assert operands.CHAIN.value % tile.block_d == 0
            assert operands.PARTIAL.value % operands.CHAIN.value == 0
        for tile in (*tiles.RESIDENT_GRADIENT[name][kind], *tiles.STREAMED_GRADIENT[name][kind]):
            assert operands.CHAIN.value % tile.block_k == 0


# ---- launches ---------------------------------------------------------------------------------------------------------------


def launches_of(shape, table, kind="tensor", *, background=False, need_x=False, layout="contiguous", multiprocessors=132):
    dtype, precision = KINDS.get(kind, (torch.float32, kind))
    images = shape[0]
    maps = layouts(torch.zeros(shape, dtype=dtype))[layout]
    mask = torch.zeros((images, 1, *shape[2:]), dtype=dtype)
    gram, vector = torch.zeros(images, images, dtype=torch.float64), torch.zeros(images, dtype=torch.float64)
    background_grams = (gram, gram) if background else (None, None)
    before, tiles.machine_of = tiles.machine_of, lambda device: tiles.Machine(table, multiprocessors)
    try:
        forward = aot.record(lambda: kernels.forward(maps, maps, mask, background, precision))
        return forward + aot.record(
            lambda: kernels.backward(
                gram, gram, vector, vector, *background_grams, maps, maps, mask, vector, vector, True, need_x, True, precision
            )
        )
    finally:
        tiles.machine_of = before


@compiled_only
def test_launch_count_and_scratch_at_the_size_of_the_ledger():
    launches = launches_of((128, 3, 224, 224), "90")
    names = [launch.kernel.__name__ for launch in launches]
    assert names == [
        *("gram_partials_kernel", "gram_partials_kernel", "merge_kernel"),
        *("symmetrised_kernel", "gradient_kernel", "gradient_kernel"),
    ]


@compiled_only
@pytest.mark.parametrize("multiprocessors", [114, 132, 148])
def test_programs_are_two_rounds_of_the_devices_multiprocessors(multiprocessors):
    launches = launches_of((128, 3, 224, 224), "90", multiprocessors=multiprocessors)
    programs = [
        math.prod(launch.grid) for launch in launches if launch.kernel.__name__.endswith(("partials_kernel", "gradient_kernel"))
    ]
    # Equal shares of the Grams' blocks of 16 columns and of the gradient's of 32: as many as make the longest share shortest.
    shares = [-(-blocks // (2 * multiprocessors)) for blocks in (3 * 224 * 224 // 16, 224 * 224 // 32)]
    grams, gradient = 3 * 224 * 224 // 16 / shares[0], 224 * 224 / 32 / shares[1]
    assert programs == [math.ceil(grams)] * 2 + [math.ceil(gradient)] * 2
    assert max(programs) <= 2 * multiprocessors


@compiled_only
def test_a_cut_compiles_nothing_new():
    """The number of multiprocessors is in grids and plain arguments; what merges the moments has the next power of two."""
    one, other = (launches_of((128, 3, 224, 224), "90", multiprocessors=count) for count in (132, 140))
    assert [launch.key for launch in one] == [launch.key for launch in other]
    assert [launch.grid for launch in one] != [launch.grid for launch in other]


def test_the_device_is_asked_for_its_multiprocessors(monkeypatch):
    class Properties:
        major, minor, shared_memory_per_block_optin, multi_processor_count = 9, 0, 227 * 1024, 114

    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: Properties)
    tiles.machine_of.cache_clear()
    assert tiles.machine_of(torch.device("cuda:0")) == tiles.Machine("90", 114)
    assert tiles.machine_of(torch.device("cuda:0")).programs == 228
    tiles.machine_of.cache_clear()


@compiled_only
@pytest.mark.parametrize("need_x", [False, True])
def test_nothing_is_allocated_for_outputs_that_nobody_asked_for(need_x):
    empty = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            made = func(*args, **(kwargs or {}))
            if "empty" in func.__name__ and made.numel() == 0:
                empty.append(func.__name__)
            return made

    with Watch():
        launches_of((4, 3, 16, 16), "90", need_x=need_x)
    assert not empty


@compiled_only
@pytest.mark.parametrize("table", TABLES)
@pytest.mark.parametrize(
    ("shape", "layout"),
    [
        ((64, 3, 1536, 1536), "contiguous"),
        ((160, 64, 256, 256), "channels_last"),
        ((160, 512, 256, 256), "channels_last"),
        ((40_000, 3, 32, 32), "contiguous"),
    ],
    ids=str,
)
def test_every_grid_is_one_that_a_device_takes(shape, layout, table):
    """Maps without data: many pixels, many channels, many pairs of tiles."""
    with torch.device("meta"):
        launches = [one for kind in KINDS for one in launches_of(shape, table, kind, layout=layout, background=True, need_x=True)]
    assert max(launch.grid[0] for launch in launches) > 65535  # a later axis could not be as long
    aot.assert_grids_fit(launches)


@compiled_only
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_small_maps_of_every_size_share_their_kernels(layout):
    """Rows that run together have the length of a map or of its channels: compiling for each takes seconds."""
    shapes = [(3, 5, 7, 7), (3, 7, 9, 5), (3, 9, 11, 13)]
    launches = [one for shape in shapes for one in launches_of(shape, "90", layout=layout)]
    keys = {one.key for one in launches if one.kernel is kernels.gram_partials_kernel}
    assert len(keys) == 2  # of R, with its moments, and of x


@pytest.mark.sampled(1)
@compiled_only
@pytest.mark.parametrize("capability", aot.TUNED)
def test_default_configurations_have_no_stack_and_no_spills(capability, drawn):
    table = TABLE_OF[capability]
    launches = [launch for images in (16, 32, 64, 128, 200, 384) for launch in launches_of((images, 3, 64, 64), table)]
    # Both Grams' S beside each other, and every gradient: what asks for the most.
    launches += launches_of((100, 3, 64, 64), table, background=True, need_x=True)
    rows = aot.report(drawn(launches, aot.name_of), [capability])
    assert all(row.clean for row in rows), aot.table(rows)
    assert all(row.shared <= LIMIT[capability] * 1024 for row in rows), aot.table(rows)


@compiled_only
@pytest.mark.long
@pytest.mark.parametrize("kind", [*KINDS, "tf32"])
@pytest.mark.parametrize("capability", aot.CAPABILITIES)
def test_every_configuration_fits_the_shared_memory(capability, kind, drawn):
    launches = [
        launch
        for images, background, need_x in itertools.product((16, 32, 64, 128, 200, 384), (False, True), (False, True))
        for launch in launches_of((images, 3, 64, 64), TABLE_OF[capability], kind, background=background, need_x=need_x)
    ]
    rows = aot.report(drawn(launches, aot.name_of), [capability])
    assert all(row.shared <= LIMIT[capability] * 1024 for row in rows), aot.table(rows)


@pytest.mark.sampled(1)
@compiled_only
@pytest.mark.parametrize(
    ("capability", "kind"), [*((capability, "ieee") for capability in (80, 86, 90, 120)), (80, "float64"), (90, "float64")]
)
def test_other_arithmetic_has_no_stack_and_no_spills(capability, kind, drawn):
    """float64 where it has units of its own: elsewhere it has 1/64 of float32's rate, and a few bytes of stack cost nothing."""
    launches = [one for n in (16, 200) for one in launches_of((n, 3, 64, 64), TABLE_OF[capability], kind)]
    rows = aot.report(drawn(launches, aot.name_of), [capability])
    assert all(row.clean for row in rows), aot.table(rows)


def test_tables_fit_what_a_device_offers():
    kib = 1024
    assert tiles.architecture_of((9, 0), 227 * kib) == "90"
    assert tiles.architecture_of((10, 0), 227 * kib) == "100"
    assert tiles.architecture_of((8, 0), 163 * kib) == "80"
    assert tiles.architecture_of((8, 9), 99 * kib) == tiles.architecture_of((8, 6), 99 * kib) == "86"
    assert tiles.architecture_of((12, 0), 99 * kib) == "120"
    assert tiles.architecture_of((9, 0), 99 * kib) == "86"  # a device that offers a block less than its kind does
    assert tiles.architecture_of((13, 0), 300 * kib) == "86"


def test_offsets_beyond_32_bits():
    """A 2**31-element map would take 16 GiB, so the strides are made large instead: one image's rows lie 2**31 apart."""
    storage_stride = 2**31 + 16
    walk = kernels._walk(torch.empty((2, 3, 4, 4), device="meta").as_strided((2, 3, 4, 4), (storage_stride, 16, 4, 1)))
    assert walk.stride_n == storage_stride
    assert kernels._order(torch.empty((1, 3, 2**15, 2**15), device="meta"), walk, 32)[0] == operands.PLANES.value


@compiled_only
def test_gradients_in_place_of_a_copy_for_channels_last():
    """The kernels read the caller's tensors: no clone, no copy, no transpose among the operators of a step."""
    seen = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            seen.append(func.__name__)
            return func(*args, **(kwargs or {}))

    with Watch():
        launches_of((4, 3, 16, 16), "90", layout="channels_last")
    used = {name for name in seen if any(word in name for word in ("copy", "clone", "to.", "item", "nonzero"))}
    # Making the inputs of the test itself is all that copies: layouts() writes each of seven.
    assert not {name for name in used if "item" in name or "nonzero" in name}, used
