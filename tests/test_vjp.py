"""vjp_map: every scalar against an independent formula, its accuracy near saturation, and its own derivative."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from sib_fast import vjp_map
from sib_fast.testing.networks import conv_net, image_batch, relative_error
from sib_fast.vjp import FLOAT16_SCALE, SCALARS, energy_cotangent
from tests.derivatives import identity_with

# Σ over images of a scalar of the logits, as one would write it without this package.
PLAIN = {
    "energy": lambda z, y: 0.5 * torch.softmax(z, 1).pow(2).sum(),
    "multilabel_energy": lambda z, y: 0.5 * (torch.sigmoid(z).pow(2) + (1 - torch.sigmoid(z)).pow(2)).sum(),
    "logit_sum": lambda z, y: z.sum(),
    "label_logit": lambda z, y: z[torch.arange(len(y)), y].sum(),
    "label_log_probability": lambda z, y: torch.log_softmax(z, 1)[torch.arange(len(y)), y].sum(),
    "predicted_logit": lambda z, y: z.max(1).values.sum(),
}


def problem(dtype: torch.dtype = torch.float64) -> tuple[torch.nn.Module, Tensor, Tensor]:
    x, labels = image_batch()
    return conv_net().to(dtype), x.to(dtype).requires_grad_(), labels


def test_all_scalars_are_tested():
    assert set(PLAIN) == set(SCALARS)


@pytest.mark.parametrize("scalar", SCALARS)
def test_scalar_equals_autograd(scalar):
    net, x, labels = problem()
    logits = net(x)
    (exact,) = torch.autograd.grad(PLAIN[scalar](logits, labels), x, retain_graph=True)
    got = vjp_map(logits, x, scalar, labels)
    assert got.shape == x.shape
    assert got.dtype == torch.float64
    assert relative_error(got, exact) < 1e-13


@pytest.mark.parametrize("scalar", SCALARS)
def test_second_derivative_equals_plain_autograd(scalar):
    net, x, labels = problem()
    logits = net(x)
    weight = torch.randn_like(x)
    wanted = (x, *net.parameters())
    (plain,) = torch.autograd.grad(PLAIN[scalar](logits, labels), x, create_graph=True)
    exact = torch.autograd.grad((weight * plain * plain).sum(), wanted, retain_graph=True, allow_unused=True)
    ours = vjp_map(logits, x, scalar, labels)
    got = torch.autograd.grad((weight * ours * ours).sum(), wanted, allow_unused=True)
    for g, e in zip(got, exact, strict=True):
        # The last bias: no path for the linear scalars.
        assert (g is None or not g.any()) if e is None else relative_error(g, e) < 1e-12


def test_gradcheck_of_the_map():
    torch.manual_seed(0)
    weight = torch.randn(12, 4, dtype=torch.float64)
    x = torch.randn(2, 12, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda t: vjp_map(torch.tanh(t) @ weight, t), (x,))


def test_callable_scalar():
    net, x, labels = problem()
    logits = net(x)
    seen = []

    def entropy(z: Tensor, y: Tensor | None) -> Tensor:
        seen.append((z.dtype, y))
        return torch.special.entr(torch.softmax(z, 1)).sum()

    (exact,) = torch.autograd.grad(torch.special.entr(torch.softmax(logits, 1)).sum(), x, create_graph=True)
    got = vjp_map(logits, x, entropy, labels)
    assert seen == [(torch.float64, labels)]
    assert relative_error(got, exact) < 1e-13
    second = [torch.autograd.grad(r.square().sum(), net[0].weight, retain_graph=True)[0] for r in (got, exact)]
    assert relative_error(*second) < 1e-12


def test_callable_scalar_sees_wide_logits_of_a_half_precision_network():
    # Gap 18: the cotangent, 1.5e-8, is below half of float16's smallest number (6e-8) and must not pass through float16
    # before the scale is applied.
    x = torch.tensor([[18.0, 0.0]], requires_grad=True)
    logits = x.half()
    callable_, built_in = (vjp_map(logits, x, s, scale=2.0**14) for s in (PLAIN["energy"], "energy"))
    assert built_in.abs().min() > 0
    assert relative_error(callable_, built_in) < 1e-3


# ---- saturation ---------------------------------------------------------------------------------------------------------


def sigmoid_pair(gap: float) -> tuple[float, float]:
    """softmax of (gap, 0) without rounding 1 - p. Shapes: p of the top class, p of the other."""
    other = math.exp(-gap) / (1 + math.exp(-gap))
    return 1 - other, other


@pytest.mark.parametrize("gap", [0.5, 10.0, 17.0, 20.0, 40.0, 200.0])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_energy_cotangent_near_saturation(gap, dtype):
    # Two classes, d = gap: E = (p² + q²)/2 and dE/dd = p q (p − q), with q = σ(−d) exact.
    p, q = sigmoid_pair(gap)
    exact = torch.tensor([[p * q * (p - q), -p * q * (p - q)]], dtype=torch.float64)
    got = energy_cotangent(torch.tensor([[gap, 0.0]], dtype=dtype))
    assert got.dtype == torch.float64
    assert relative_error(got, exact) < 1e-13


@pytest.mark.parametrize("gap", [10.0, 17.0, 20.0, 40.0, 200.0])
def test_energy_cotangent_of_many_classes_near_saturation(gap):
    # K−1 equal others of probability q: top = p(K−1)q(p − q), each other −p q (p − q) − … = q(q − ‖p‖²), ‖p‖² = p² + (K−1)q².
    others = 9
    e = math.exp(-gap)
    p, q = 1 / (1 + others * e), e / (1 + others * e)
    top, other = p * others * q * (p - q), q * (q - p * p - others * q * q)
    exact = torch.tensor([[top] + [other] * others], dtype=torch.float64)
    got = energy_cotangent(torch.tensor([[gap] + [0.0] * others]))
    assert ((got - exact).abs() / exact.abs()).max() < 1e-13


@pytest.mark.parametrize("gap", [10.0, 17.0, 20.0, 40.0, 200.0])
def test_second_derivative_of_the_energy_near_saturation(gap):
    # d²E/dd² = p q [2 p q − (p − q)²]
    p, q = sigmoid_pair(gap)
    x = torch.tensor([[gap]], dtype=torch.float64, requires_grad=True)
    logits = torch.cat([x, torch.zeros_like(x)], 1)
    (second,) = torch.autograd.grad(vjp_map(logits, x).sum(), x)
    assert math.isclose(second.item(), p * q * (2 * p * q - (p - q) ** 2), rel_tol=1e-12)


@pytest.mark.parametrize("gap", [17.0, 40.0, 200.0])
def test_the_log_probability_of_a_likely_label_does_not_cancel(gap):
    # ∂log p_y/∂z_y = 1 − p_y, which is 0 in float64 from a gap of 37 on.
    x = torch.tensor([[gap, 0.0]], dtype=torch.float64, requires_grad=True)
    q = sigmoid_pair(gap)[1]
    got = vjp_map(x * 1.0, x, "label_log_probability", torch.tensor([0]))
    assert relative_error(got, torch.tensor([[q, -q]], dtype=torch.float64)) < 1e-13
    (second,) = torch.autograd.grad(got[0, 0], x)
    assert relative_error(second, torch.tensor([[-q * (1 - q), q * (1 - q)]], dtype=torch.float64)) < 1e-12


@pytest.mark.parametrize("gap", [1e3, 1e4, 1e30])
def test_saturated_softmax_gives_zero_and_never_nan(gap):
    x = torch.tensor([[gap, 0.0, -gap]], requires_grad=True)
    vjp = vjp_map(x * 1.0, x)
    (second,) = torch.autograd.grad(vjp.sum(), x)
    assert torch.equal(vjp, torch.zeros_like(vjp))
    assert torch.equal(second, torch.zeros_like(second))


def test_float32_map_keeps_the_float64_cotangent():
    # At a gap of 20 the float32 cotangent of the top class is 0; through float64 the map is right to float32's rounding.
    x = torch.tensor([[20.0, 0.0]], requires_grad=True)
    p, q = sigmoid_pair(20.0)
    assert relative_error(vjp_map(x * 1.0, x)[0, 0], torch.tensor(p * q * (p - q), dtype=torch.float64)) < 1e-7


# ---- scale, dtypes, graph -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scale", [2.0**-8, 0.5, 2.0, 2.0**20])
def test_scale_is_divided_out_exactly(scale):
    net, x, _ = problem(torch.float32)
    logits = net(x)
    assert torch.equal(vjp_map(logits, x, scale=scale), vjp_map(logits, x, scale=1.0))


def half_problem() -> tuple[Tensor, Tensor]:
    """A float16 network whose backward multiplies by 1e-5: what underflows without a scale."""
    x = torch.tensor([[1.0, -0.5, 2.0, 0.25]], requires_grad=True)
    logits = (x.half() * 1e-2) * 1e-3 + torch.tensor([[2.0, 0.0, -1.0, 1.0]]).half()
    return logits, x


def test_float16_logits_are_scaled_by_default():
    logits, x = half_problem()
    exact = 1e-5 * energy_cotangent(logits).float()
    default, unscaled = vjp_map(logits, x), vjp_map(logits, x, scale=1.0)
    assert default.dtype == torch.float32
    assert torch.equal(default, vjp_map(logits, x, scale=FLOAT16_SCALE))
    assert relative_error(default, exact) < 2e-3
    assert relative_error(unscaled, exact) > 2e-2


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_other_dtypes_are_not_scaled_by_default(dtype):
    x = torch.tensor([[1.0, -0.5, 2.0]], requires_grad=True)
    seen = []
    logits = x.to(dtype)
    logits.register_hook(seen.append)
    vjp_map(logits, x)
    assert torch.equal(seen[0], energy_cotangent(logits).to(dtype))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_x_gives_a_float32_map(dtype):
    x = torch.tensor([[1.0, -0.5, 2.0]], dtype=dtype, requires_grad=True)
    assert vjp_map(x.float(), x).dtype == torch.float32


def test_without_create_graph_the_map_has_no_graph():
    net, x, _ = problem()
    logits = net(x)
    got = vjp_map(logits, x, create_graph=False)
    assert not got.requires_grad
    assert relative_error(got, vjp_map(logits, x)) < 1e-13
    logits.sum().backward()  # the network's graph is still there


def test_under_no_grad_a_kept_graph_is_the_whole_graph():
    net, x, _ = problem()
    logits = net(x)
    inside, outside = [], vjp_map(logits, x)
    with torch.no_grad():
        inside.append(vjp_map(logits, x))
        inside.append(vjp_map(logits, x, PLAIN["energy"]))
    exact = torch.autograd.grad(outside.square().sum(), net[0].weight, retain_graph=True)[0]
    for vjp in inside:
        got = torch.autograd.grad(vjp.square().sum(), net[0].weight, retain_graph=True)[0]
        assert relative_error(got, exact) < 1e-12


@pytest.mark.parametrize("shape", [(3, 7), (3, 4, 5), (3, 2, 3, 2, 2)], ids=str)
def test_x_of_any_shape(shape):
    torch.manual_seed(0)
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(x[0].numel(), 4, dtype=torch.float64)
    logits = torch.tanh(x.flatten(1)) @ weight
    (exact,) = torch.autograd.grad(PLAIN["energy"](logits, None), x, retain_graph=True)
    got = vjp_map(logits, x)
    assert got.shape == x.shape
    assert relative_error(got, exact) < 1e-13


def test_x_may_be_a_feature_map():
    net, x, _ = problem()
    feature = net[:3](x)
    logits = net[3:](feature)
    (exact,) = torch.autograd.grad(PLAIN["energy"](logits, None), feature, retain_graph=True)
    got = vjp_map(logits, feature)
    assert got.shape == feature.shape
    assert relative_error(got, exact) < 1e-13
    assert torch.autograd.grad(got.square().sum(), net[0].weight)[0].any()


def test_one_image_does_not_depend_on_its_batch():
    net = conv_net(norm="group").double()
    x = image_batch()[0].double().requires_grad_()
    single = x.detach()[:1].clone().requires_grad_()
    assert relative_error(vjp_map(net(x), x)[:1], vjp_map(net(single), single)) < 1e-13


def test_non_finite_logits_propagate():
    x = torch.tensor([[1.0, math.nan], [1.0, 2.0]], requires_grad=True)
    vjp = vjp_map(x * 1.0, x)
    assert vjp[0].isnan().all()
    assert vjp[1].isfinite().all()


# ---- bad input: one test per message ------------------------------------------------------------------------------------


def raises(error: type[Exception], words: str, **changed: object) -> None:
    x = torch.randn(2, 3, requires_grad=True)
    arguments = {"logits": x * 1.0, "x": x, **changed}
    with pytest.raises(error, match=words):
        vjp_map(**arguments)


def test_the_good_call_of_this_section_passes():
    x = torch.randn(2, 3, requires_grad=True)
    vjp_map(x * 1.0, x)


@pytest.mark.parametrize(
    ("error", "words", "changed"),
    [
        (TypeError, "vjp_map: logits must be a tensor, got list", {"logits": [1.0]}),
        (TypeError, "vjp_map: x must be a tensor, got NoneType", {"x": None}),
        (ValueError, "vjp_map: scalar must be one of 'energy', .* or a callable, got 'entropy'", {"scalar": "entropy"}),
        (TypeError, "vjp_map: logits must be float64, .*, got torch.int64", {"logits": torch.ones(2, 3).long()}),
        (TypeError, "vjp_map: x must be float64, .*, got torch.uint8", {"x": torch.ones(2, 3).byte()}),
        (ValueError, r"vjp_map: logits must have shape \[N, classes\], got \[3\]", {"logits": torch.ones(3)}),
        (ValueError, r"vjp_map: logits must have shape \[N, classes\], got \[0, 3\]", {"logits": torch.ones(0, 3)}),
        (ValueError, "vjp_map: labels must be given for scalar='label_logit', got None", {"scalar": "label_logit"}),
        (
            ValueError,
            "vjp_map: labels must be given for scalar='label_log_probability', got None",
            {"scalar": "label_log_probability"},
        ),
        (TypeError, "vjp_map: labels must be a tensor, got list", {"scalar": "label_logit", "labels": [0, 1]}),
        (
            TypeError,
            "vjp_map: labels must be int64 class indices, got torch.float32",
            {"scalar": "label_logit", "labels": torch.ones(2)},
        ),
        (
            ValueError,
            r"vjp_map: labels must have shape \[2\] to go with logits, got \[3\]",
            {"scalar": "label_logit", "labels": torch.ones(3).long()},
        ),
        (
            RuntimeError,
            r"vjp_map: labels must be on the device of logits \(cpu\), got meta",
            {"scalar": "label_logit", "labels": torch.ones(2, device="meta").long()},
        ),
        (ValueError, "vjp_map: scale must be a power of two, .*, got 3.0", {"scale": 3.0}),
        (ValueError, "vjp_map: scale must be a power of two, .*, got 0", {"scale": 0}),
        (ValueError, "vjp_map: scale must be a power of two, .*, got -2.0", {"scale": -2.0}),
        (ValueError, "vjp_map: scale must be a power of two, .*, got inf", {"scale": math.inf}),
        (
            RuntimeError,
            r"vjp_map: x must require grad before the forward pass: call x.requires_grad_\(\)",
            {"x": torch.ones(2, 3)},
        ),
        (RuntimeError, "vjp_map: logits must have a graph, got logits that do not require grad", {"logits": torch.ones(2, 3)}),
        (
            RuntimeError,
            "vjp_map: logits must be computed from x, but their graph does not reach it",
            {"x": torch.ones(2, 3, requires_grad=True)},
        ),
        (
            ValueError,
            r"vjp_map: scalar must return a 0-d tensor computed from the logits, got shape \[2, 3\]",
            {"scalar": lambda z, y: z},
        ),
        (
            ValueError,
            r"vjp_map: scalar must return a 0-d tensor .*, got shape \[\] without a graph",
            {"scalar": lambda z, y: z.detach().sum()},
        ),
        (ValueError, "vjp_map: scalar must return a 0-d tensor .*, got float", {"scalar": lambda z, y: 1.0}),
    ],
    ids=lambda v: v[:60] if isinstance(v, str) else "",
)
def test_bad_argument(error, words, changed):
    raises(error, words, **changed)


def test_label_out_of_range_is_an_error_on_the_cpu():
    raises(RuntimeError, "out of bounds", scalar="label_logit", labels=torch.tensor([0, 3]))


def test_a_layer_that_cuts_the_graph():
    """Its backward is not differentiable and does not say so."""
    x = torch.randn(2, 3, requires_grad=True)
    with pytest.raises(
        RuntimeError, match=r"vjp_map: the network's backward must be differentiable, but R came back without a graph"
    ):
        vjp_map(identity_with(torch.detach)(x), x)


def refuse(grad):
    """What compiled code did in some releases: it refused create_graph in the first backward."""
    raise RuntimeError("torch.compile with aot_autograd does not currently support double backward")


def test_a_network_that_refuses_at_once():
    x = torch.randn(2, 3, requires_grad=True)
    with pytest.raises(RuntimeError, match=r"vjp_map: the network must be differentiable twice, and a torch\.compile'd module"):
        vjp_map(identity_with(refuse)(x), x)


def test_a_compiled_network_is_never_half_differentiated():
    x = torch.randn(2, 3, requires_grad=True)
    logits = torch.compile(torch.nn.Linear(3, 4), backend="aot_eager")(x)
    with pytest.raises(RuntimeError, match=r"double backward|differentiable twice"):
        vjp_map(logits, x).square().sum().backward()


def test_another_error_of_autograd_passes_through():
    x = torch.randn(2, 3, requires_grad=True)
    logits = x.exp()
    torch.autograd.grad(logits.sum(), x)  # frees the graph
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        vjp_map(logits, x)
