"""The activations' double backward and the convolution's rules on a GPU: parity at sizes that fill it, streams, graphs."""

from __future__ import annotations

import pytest
import torch

from sib_fast.nn import Conv2d
from sib_fast.ops import activation as activation_op
from sib_fast.ops.activation import KINDS

KERNELS = ("cuda",)
real_gpu = pytest.mark.real_gpu
PARAMETERS = {"elu": [0.7], "softplus": [1.5, 20.0]}
SMOOTH = [kind for kind, rule in KINDS.items() if rule.second is not None]
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
# More tiles than blocks, a rest, and the largest activation of a ConvNeXt-T at 64 images.
COUNTS = [1, 4097, 16 * 132 * 2048 + 1234, 64 * 96 * 56 * 56]


def inputs(count: int, dtype: torch.dtype, kind: str):
    draw = torch.Generator("cpu").manual_seed(0)
    u, g, x = (torch.randn(count, generator=draw, device="cpu").to(torch.get_default_device(), dtype) for _ in range(3))
    return u, g, torch.tanh(x) if KINDS[kind].saves_result else 3 * x


def run(u, g, saved, kind):
    return torch.ops.sib_fast_activation.double_backward(u, g, saved, kind, PARAMETERS.get(kind, []), True, True)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", SMOOTH)
def test_the_kernel_is_the_formula_in_float64_rounded_once(kind, dtype, kernel):
    for count in COUNTS[:3]:
        u, g, saved = inputs(count, dtype, kind)
        wide = (t.double() for t in (u, g, saved))
        exact = activation_op._double_backward_composed(*wide, kind, PARAMETERS.get(kind, []), True, True)
        for got, want in zip(run(u, g, saved, kind), exact, strict=True):
            assert got.dtype == dtype
            eps = torch.finfo(dtype).eps
            torch.testing.assert_close(got.double(), want, rtol=4 * eps, atol=4 * eps * want.abs().max().item())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_views_between_two_packs_have_the_same_bits(dtype, kernel):
    u, g, x = inputs(COUNTS[2], dtype, "silu")
    got = run(u[1:], g[1:], x[1:], "silu")
    want = run(u, g, x, "silu")
    assert all(torch.equal(a, b[1:]) for a, b in zip(got, want, strict=True))


def by_bits(x, grad, kind="relu", parameters=()):
    ops = torch.ops.sib_fast_activation
    y, bits = ops.forward_bits(x, kind, list(parameters))
    return y, ops.backward(grad, bits, kind, list(parameters), activation_op._memory_order(y)), bits


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("kind", "parameters"), [("relu", ()), ("hardtanh", (0.0, 6.0)), ("hardtanh", (-0.7, 0.3)), ("leaky_relu", (0.1,))]
)
def test_bits_give_pytorchs_values_and_gradients_to_the_bit(kind, parameters, dtype, kernel):
    """Every special value with every other as its gradient, the signs of zeros and NaN among them; then sizes that fill a GPU."""
    rule = KINDS[kind]
    points = torch.tensor([-torch.inf, -2.0, -0.7, -0.3, -0.0, 0.0, 1e-7, 0.3, 0.7, 2.0, 6.0, torch.inf, torch.nan], dtype=dtype)
    pairs = [t.repeat(64) for t in torch.cartesian_prod(points, points).unbind(1)]
    for x, g in (pairs, *(inputs(count, dtype, kind)[1:] for count in COUNTS)):
        y, grad, _ = by_bits(x, g, kind, parameters)
        want = rule.forward(x, *parameters)
        leaf = x.clone().requires_grad_()
        (want_grad,) = torch.autograd.grad(rule.forward(leaf, *parameters), leaf, g)
        torch.testing.assert_close(y, want, rtol=0, atol=0, equal_nan=True)
        torch.testing.assert_close(grad, want_grad, rtol=0, atol=0, equal_nan=True)
        assert torch.equal(y[~x.isnan()].signbit(), want[~x.isnan()].signbit())
        inside = x.clone()
        torch.ops.sib_fast_activation.forward_bits_(inside, kind, list(parameters))
        torch.testing.assert_close(inside, y, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_bits_of_views_between_two_packs(dtype, kernel):
    _, g, x = inputs(COUNTS[2], dtype, "relu")
    y, grad, _ = by_bits(x[1:], g[1:])
    assert torch.equal(y, x[1:].relu())
    assert torch.equal(grad, torch.where(x > 0, g, 0)[1:])


@real_gpu
def test_relu_keeps_a_bit_an_element_alive(kernel):
    """Nothing keeps y but its reader: a ReLU whose reader keeps nothing costs 1/32 of it."""
    x = torch.randn(COUNTS[3], requires_grad=True)
    before = torch.cuda.memory_allocated()
    kept = activation_op.activation(x, "relu").sum()
    assert kept.requires_grad
    assert torch.cuda.memory_allocated() - before < COUNTS[3] / 8 + 2**21


@real_gpu
def test_twenty_runs_have_the_same_bits_and_nothing_synchronises(kernel, request):
    made = inputs(COUNTS[3], torch.bfloat16, "gelu")
    want = run(*made, "gelu")
    request.getfixturevalue("no_synchronisation")
    results = [run(*made, "gelu") for _ in range(20)]
    bits = [by_bits(*made[1:]) for _ in range(20)]
    torch.cuda.set_sync_debug_mode("default")
    assert all(torch.equal(a, b) for result in bits for a, b in zip(result, bits[0], strict=True))
    assert all(torch.equal(a, b) for result in results for a, b in zip(result, want, strict=True))


@real_gpu
def test_a_side_stream_and_a_graph_follow_their_inputs(kernel):
    static, other = inputs(COUNTS[2], torch.float32, "mish"), [t.flip(0) for t in inputs(COUNTS[2], torch.float32, "mish")]
    want = run(*other, "mish")
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        late = [torch.empty_like(t) for t in other]
        torch.cuda._sleep(50_000_000)
        for t, source in zip(late, other, strict=True):
            t.copy_(source)
        got, got_bits = run(*late, "mish"), by_bits(*late[1:])
    side.synchronize()
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
    want_bits = by_bits(*other[1:])
    assert all(torch.equal(a, b) for a, b in zip(got_bits, want_bits, strict=True))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out, out_bits = run(*static, "mish"), by_bits(*static[1:])
    for t, source in zip(static, other, strict=True):
        t.copy_(source)
    graph.replay()
    assert all(torch.equal(a, b) for a, b in zip(out, want, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(out_bits, want_bits, strict=True))


@real_gpu
def test_more_than_two_to_the_31_elements(kernel):
    if torch.cuda.mem_get_info()[0] < 40 * 2**30:
        pytest.skip("needs 40 GiB of free memory")
    count = 2**31 + 4099
    u, g, x = (torch.randn(count, dtype=torch.bfloat16) for _ in range(3))
    got = run(u, g, x, "tanh")
    for part in (slice(0, 5000), slice(2**31 - 2500, 2**31 + 4099)):
        want = run(u[part].clone(), g[part].clone(), x[part].clone(), "tanh")
        assert all(torch.equal(a[part], b) for a, b in zip(got, want, strict=True))
    del u, got
    y, grad, _ = by_bits(x, g)
    for part in (slice(0, 5000), slice(2**31 - 2500, 2**31 + 4099)):
        assert torch.equal(y[part], x[part].relu())
        assert torch.equal(grad[part], torch.where(x[part] > 0, g[part], 0))


@real_gpu
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize("groups", [1, 32])
def test_a_convolutions_double_backward_launches_no_map_sized_convolution(groups, layout, kernel):
    """Its kernels are those of a plain step, a handful whatever the number of groups, and its numbers PyTorch's."""
    layer = Conv2d(32, 32, 3, padding=1, groups=groups, bias=False).to(memory_format=layout)
    plain = torch.nn.Conv2d(32, 32, 3, padding=1, groups=groups, bias=False).to(memory_format=layout)
    plain.load_state_dict(layer.state_dict())
    results, launches = [], []
    torch.backends.cudnn.allow_tf32 = False
    for module in (layer.double(), plain.double()):
        x = torch.randn(4, 32, 28, 28, dtype=torch.float64, generator=torch.Generator("cuda").manual_seed(0))
        x = x.contiguous(memory_format=layout).requires_grad_()
        (first,) = torch.autograd.grad(module(x).square().sum(), x, create_graph=True)
        loss = first.square().sum()
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            results.append(torch.autograd.grad(loss, module.weight))
            torch.cuda.synchronize()
        launches.append(len([e for e in profile.events() if e.device_type == torch.autograd.DeviceType.CUDA]))
    torch.testing.assert_close(results[0][0], results[1][0], rtol=1e-9, atol=1e-9)
    if groups > 1:
        assert launches[0] < groups < launches[1], "PyTorch no longer loops over groups: is the rule still needed?"
