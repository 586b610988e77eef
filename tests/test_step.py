"""compile_step: the whole step in one compiled region, exact against eager, and what it refuses."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import sib_fast
from sib_fast import SIBLoss, compile_step
from sib_fast.nn.prepare import SWAPS
from sib_fast.testing.networks import AttentionNet, conv_net, image_batch

pytestmark = pytest.mark.skipif(
    not hasattr(torch._dynamo.config, "trace_autograd_ops"), reason="this torch cannot trace torch.autograd.grad"
)

WEIGHTS = {"lambda_fg": 1.0, "lambda_bg": 1e4, "window_size": 5}
TOLERANCE = 1e-11  # float64, relative to the largest gradient: rounding in another order


def eager_step(net: nn.Module, criterion: SIBLoss, x: Tensor, target: Tensor) -> tuple[Tensor, Tensor, dict]:
    leaf = x.detach().clone().requires_grad_()
    logits = net(leaf)
    loss = criterion(logits, target, leaf)
    return loss, logits.detach(), criterion.terms


def gradients(net: nn.Module, step, x: Tensor, target: Tensor) -> tuple[tuple, list[Tensor]]:
    net.zero_grad()
    out = step(x, target)
    out[0].backward()
    return out, [torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in net.parameters()]


def assert_step_is_eager(net: nn.Module, step, criterion: SIBLoss, x: Tensor, target: Tensor, tolerance: float = TOLERANCE):
    """Loss, logits, terms, parameter gradients and buffers of one compiled step are the eager ones'."""
    twin = copy.deepcopy(net)
    twin_criterion = copy.deepcopy(criterion)
    (loss, logits, terms), wanted = gradients(twin, lambda x, y: eager_step(twin, twin_criterion, x, y), x, target)
    out, got = gradients(net, step, x, target)
    torch.testing.assert_close(out.loss, loss, rtol=tolerance, atol=0)
    torch.testing.assert_close(out.logits, logits, rtol=tolerance, atol=tolerance)
    assert out.terms.keys() == terms.keys()
    for name, term in terms.items():
        torch.testing.assert_close(out.terms[name], term, rtol=100 * tolerance, atol=1e-14, msg=name)
    scale = max(w.norm() for w in wanted)
    for a, b in zip(got, wanted, strict=True):
        assert (a - b).norm() <= tolerance * scale
    for (name, a), b in zip(net.named_buffers(), twin.buffers(), strict=True):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance, msg=name)
    # Dropping the second derivative in silence leaves the base loss's gradients: far outside the tolerance.
    _, base = gradients(twin, lambda x, y: (F.cross_entropy(twin(x), y),), x, target)
    assert max((w - b).norm() for w, b in zip(wanted, base, strict=True)) > 1000 * tolerance * scale


# ---- every layer of nn --------------------------------------------------------------------------------------------------


def conv(**options) -> nn.Module:
    return nn.Conv2d(6, 6, 3, padding=1, **options)


class Tokens(nn.Module):
    """A layer over the last dimension, as transformers have it. Shapes: [N, C, H, W] -> the same."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x.flatten(2).transpose(1, 2)).transpose(1, 2).reshape(x.shape)


class SelfAttention(nn.Module):
    """Attention of tokens to each other, as a ViT has it. Shapes: [N, L, E] -> the same."""

    def __init__(self, layer: nn.MultiheadAttention) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x, x, x, need_weights=False)[0]


class Volume(nn.Module):
    """A 3d layer over a map of depth one. Shapes: [N, C, H, W] -> the same."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x[:, :, None]).squeeze(2)


class Rows(nn.Module):
    """A 1d layer over flattened maps. Shapes: [N, C, H, W] -> the same."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x.flatten(2)).view(x.shape)


# How each layer stands in a network; one that is not named here is an activation.
PLACES = {
    nn.BatchNorm1d: lambda: Rows(nn.BatchNorm1d(6)),
    nn.BatchNorm2d: lambda: nn.BatchNorm2d(6),
    nn.BatchNorm3d: lambda: Volume(nn.BatchNorm3d(6)),
    nn.Conv2d: lambda: conv(groups=2),
    nn.Conv1d: lambda: Rows(nn.Conv1d(6, 6, 3, padding=1)),
    nn.Conv3d: lambda: Volume(nn.Conv3d(6, 6, (1, 3, 3), padding=(0, 1, 1))),
    nn.GroupNorm: lambda: nn.GroupNorm(2, 6),
    nn.LayerNorm: lambda: Tokens(nn.LayerNorm(6)),
    nn.MultiheadAttention: lambda: Tokens(SelfAttention(nn.MultiheadAttention(6, 2, batch_first=True))),
    nn.MaxPool2d: lambda: nn.MaxPool2d(3, 2, 1),
    nn.AvgPool2d: lambda: nn.AvgPool2d(2),
    nn.AdaptiveAvgPool2d: lambda: nn.AdaptiveAvgPool2d(4),
    nn.Linear: lambda: Tokens(nn.Linear(6, 6)),
    nn.SyncBatchNorm: None,  # needs a process group
}


def network(layer: type[nn.Module]) -> nn.Module:
    """The layer between convolutions and Softplus, whose curvature gives every layer below a second-order part."""
    torch.manual_seed(0)
    middle = PLACES.get(layer, layer)()
    return nn.Sequential(
        nn.Conv2d(3, 6, 3, padding=1), nn.Softplus(), middle, conv(), nn.Softplus(), nn.AdaptiveAvgPool2d(2), nn.Flatten(),
        nn.Linear(24, 5),
    ).double()  # fmt: skip


def batch(images: int = 6) -> tuple[Tensor, Tensor]:
    x, target = image_batch(images)
    return x.double(), target


@pytest.mark.sampled(7)
@pytest.mark.parametrize("layer", [layer for layer in SWAPS if PLACES.get(layer, layer) is not None], ids=lambda c: c.__name__)
def test_every_layer_of_nn_is_exact(layer):
    net = sib_fast.prepare(network(layer))
    assert any(type(module) is SWAPS[layer] for module in net.modules())
    criterion = SIBLoss(**WEIGHTS)
    assert_step_is_eager(net, compile_step(net, criterion, backend="aot_eager"), criterion, *batch())


@pytest.mark.sampled(2)
@pytest.mark.parametrize("layer", [nn.ReLU, nn.LeakyReLU, nn.SiLU, nn.Hardswish], ids=lambda c: c.__name__)
def test_activations_in_place(layer):
    """As torchvision's networks have them. Their graph is made by a Function of ours, which is no custom one of the user's."""
    net, criterion = network(layer), SIBLoss(**WEIGHTS)
    net[2] = layer(inplace=True)
    sib_fast.prepare(net)
    assert_step_is_eager(net, compile_step(net, criterion, backend="aot_eager"), criterion, *batch())


def test_pytorchs_own_layers_are_exact():
    net, criterion = conv_net().double(), SIBLoss(**WEIGHTS)
    assert_step_is_eager(net, compile_step(net, criterion, backend="aot_eager"), criterion, *batch())


@pytest.mark.packaging  # the default compiler builds C++: a minute
def test_the_default_compiler_is_exact():
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Softplus(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 5)
    )
    net, criterion = sib_fast.prepare(net.double()), SIBLoss(**WEIGHTS)
    assert_step_is_eager(net, compile_step(net, criterion), criterion, *batch(), tolerance=1e-9)


# ---- what a step does ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("attached", [False, True])
def test_an_attached_criterion_is_used_in_explicit_form(attached):
    net, criterion = sib_fast.prepare(conv_net().double()), SIBLoss(**WEIGHTS)
    if attached:
        criterion.attach(net)
    x, target = batch()
    step = compile_step(net, criterion, backend="aot_eager")
    twin = copy.deepcopy(net)
    exact = eager_step(twin, copy.deepcopy(criterion), x, target)[0]
    out = step(x, target)
    torch.testing.assert_close(out.loss, exact, rtol=TOLERANCE, atol=0)
    assert not x.requires_grad
    assert criterion.terms is out.terms
    # … and stays attached for eager use.
    if attached:
        assert torch.isfinite(criterion(net(x), target))


def test_training_with_an_optimiser_and_changing_batch_sizes():
    net, twin = sib_fast.prepare(conv_net().double()), sib_fast.prepare(conv_net().double())
    criterion, eager = SIBLoss(**WEIGHTS), SIBLoss(**WEIGHTS)
    step = compile_step(net, criterion, backend="aot_eager")
    optimisers = [torch.optim.SGD(n.parameters(), 1e-3, momentum=0.9) for n in (net, twin)]
    for images in (6, 6, 4, 7, 3):
        x, target = batch(images)
        for loss, optimiser in zip((step(x, target).loss, eager_step(twin, eager, x, target)[0]), optimisers, strict=True):
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
    for (name, a), b in zip(net.state_dict().items(), twin.state_dict().values(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-10, msg=name)
    assert int(net[1].num_batches_tracked) == 5


def test_no_gradient_of_x_is_computed_but_the_vjp():
    from functorch.compile import make_boxed_func
    from torch._dynamo.backends.common import aot_autograd

    graphs: list[list[tuple]] = []

    def keep(graph, inputs):
        calls = [n for n in graph.graph.nodes if "convolution.backward" in str(n.target).replace("_backward", ".backward")]
        graphs.append([(tuple(n.args[1].meta["val"].shape)[1], n.args[-3:-1]) for n in calls if "sib_fast" in str(n.target)])
        return make_boxed_func(graph)

    net, criterion = sib_fast.prepare(conv_net().double()), SIBLoss(**WEIGHTS)
    x, target = batch()
    compile_step(net, criterion, backend=aot_autograd(fw_compiler=keep, bw_compiler=keep))(x, target).loss.backward()
    forward, backward = graphs
    assert sorted(forward) == [(3, (True, False)), (6, (True, False))]
    assert sorted(backward) == [(3, (False, True)), (3, (False, True)), (6, (False, True)), (6, (True, True))]


def test_an_input_that_requires_grad_gets_its_gradient():
    net, criterion = conv_net(norm="group").double(), SIBLoss(**WEIGHTS)
    x, target = batch()
    x.requires_grad_()
    compile_step(net, criterion, backend="aot_eager")(x, target).loss.backward()
    leaf = x.detach().clone().requires_grad_()
    criterion(net(leaf), target, leaf).backward()
    torch.testing.assert_close(x.grad, leaf.grad, rtol=1e-9, atol=1e-14)


@pytest.mark.sampled(1)
@pytest.mark.parametrize("where", ["outside", "inside"])
def test_autocast(where):
    class Inside(nn.Module):
        def __init__(self, body: nn.Module) -> None:
            super().__init__()
            self.body = body

        def forward(self, x: Tensor) -> Tensor:
            with torch.autocast("cpu", dtype=torch.bfloat16):
                return self.body(x)

    torch.manual_seed(0)
    body = sib_fast.prepare(conv_net())
    net = Inside(body) if where == "inside" else body
    criterion = SIBLoss(**WEIGHTS)
    step = compile_step(net, criterion, backend="aot_eager")
    x, target = image_batch()
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=where == "outside"):
        twin = copy.deepcopy(net)
        (loss, logits, _), wanted = gradients(twin, lambda x, y: eager_step(twin, criterion, x, y), x, target)
        out, got = gradients(net, step, x, target)
    assert logits.dtype == torch.bfloat16
    assert out.loss.dtype == torch.float32
    torch.testing.assert_close(out.loss, loss)
    # The same bfloat16 operations on both sides: only the order of float32 sums may differ.
    scale = max(w.norm() for w in wanted)
    for a, b in zip(got, wanted, strict=True):
        assert (a - b).norm() <= 2e-2 * scale


def test_validation_and_steps_between_run_the_plain_function():
    net = conv_net().double()
    criterion = SIBLoss(**WEIGHTS, every=2).attach(net)
    step = compile_step(net, criterion, backend="aot_eager")
    x, target = batch()
    applied = []
    for _ in range(3):
        out = step(x, target)
        applied.append("foreground" in out.terms)
        if not applied[-1]:
            torch.testing.assert_close(out.loss, F.cross_entropy(copy.deepcopy(net)(x), target), rtol=1e-12, atol=0)
        out.loss.backward()
    assert applied == [True, False, True]
    net.eval()
    with torch.no_grad():
        out = step(x, target)
    assert out.terms.keys() == {"loss", "base"}
    torch.testing.assert_close(out.loss, F.cross_entropy(net(x), target), rtol=1e-12, atol=0)
    net.train()
    assert "foreground" not in step(x, target).terms  # validation did not count
    assert "foreground" in step(x, target).terms


def test_eval_mode_and_blocks_are_the_criterions():
    net = conv_net().double()
    criterion = SIBLoss(**WEIGHTS, every=2).attach(net)
    step = compile_step(net, criterion, backend="eager")
    x, target = batch()
    applied = []
    for calls in (2, 1, 1):
        with criterion.one_step():
            applied += ["foreground" in step(x, target).terms for _ in range(calls)]
    assert applied == [True, True, False, True]
    net.eval()
    loss = step(x, target).loss
    with pytest.warns(UserWarning, match="SIBLoss: the attached model must be in training mode"):
        loss.backward()
    step(x, target).loss.backward()


def test_a_model_may_change_its_input_in_place():
    class Centres(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = conv_net(norm="group")

        def forward(self, x: Tensor) -> Tensor:
            return self.body(x.sub_(0.4))

    net, criterion = Centres().double(), SIBLoss(**WEIGHTS)
    x, target = batch()
    before = x.clone()
    leaf = x.clone().requires_grad_()
    exact = criterion(net.body(leaf - 0.4), target, leaf)
    step = compile_step(net, criterion, backend="aot_eager")
    for asked in (False, True):
        torch.testing.assert_close(step(x.requires_grad_(asked), target).loss, exact, rtol=TOLERANCE, atol=0)
        assert torch.equal(x, before)


def test_each_of_the_two_functions_compiles_once():
    from torch._dynamo.utils import counters

    net = conv_net().double()
    criterion = SIBLoss(**WEIGHTS, every=2).attach(net)
    step = compile_step(net, criterion, backend="aot_eager")
    counters.clear()
    for _ in range(5):
        step(*batch()).loss.backward()
    assert counters["stats"]["unique_graphs"] == 2


def test_a_given_mask():
    net, criterion = conv_net(norm="group").double(), SIBLoss(**WEIGHTS)
    x, target = batch()
    mask = torch.rand(6, 1, 12, 11, dtype=torch.float64)
    leaf = x.clone().requires_grad_()
    exact = criterion(net(leaf), target, leaf, mask)
    out = compile_step(net, criterion, backend="aot_eager")(x, target, mask)
    torch.testing.assert_close(out.loss, exact, rtol=TOLERANCE, atol=0)


def test_an_inference_tensor_as_input():
    net, criterion = conv_net(norm="group").double(), SIBLoss(**WEIGHTS)
    with torch.inference_mode():
        x, target = batch()
    out = compile_step(net, criterion, backend="aot_eager")(x, target.clone())
    exact = eager_step(net, criterion, x.clone(), target.clone())[0]
    torch.testing.assert_close(out.loss, exact, rtol=TOLERANCE, atol=0)


def test_the_switch_is_never_global():
    net, criterion = conv_net(), SIBLoss(**WEIGHTS)
    step = compile_step(net, criterion, backend="aot_eager")
    assert torch._dynamo.config.trace_autograd_ops is False
    step(*image_batch())
    assert torch._dynamo.config.trace_autograd_ops is False


# ---- what is refused ----------------------------------------------------------------------------------------------------


class Square(torch.autograd.Function):
    """x², with a backward that PyTorch can differentiate in eager mode."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x * x

    @staticmethod
    def backward(ctx, grad):
        return 2 * ctx.saved_tensors[0] * grad


class SquareLayer(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return Square.apply(x)


def test_a_custom_function_is_refused():
    net = nn.Sequential(nn.Conv2d(3, 4, 3), SquareLayer(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 5))
    words = r"compile_step: a custom autograd.Function must not be used: .* in silence.*\(found Square\)"
    with pytest.raises(RuntimeError, match=words):
        compile_step(net, SIBLoss(**WEIGHTS), backend="aot_eager")(*image_batch())


def test_why_a_custom_function_is_refused(monkeypatch):
    """PyTorch still drops the second derivative. When this fails, the refusal can go for the torch that it fails on."""
    monkeypatch.setattr("sib_fast.step.check_before_compiling", lambda *_: None)
    net = nn.Sequential(nn.Conv2d(3, 4, 3), SquareLayer(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 5)).double()
    criterion = SIBLoss(**WEIGHTS)
    with pytest.raises(AssertionError):
        assert_step_is_eager(net, compile_step(net, criterion, backend="aot_eager"), criterion, *batch())


def test_a_model_that_does_not_run_on_fake_tensors_is_warned_about():
    class Reads(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x * 2 if float(x.detach().sum()) > 1e9 else x

    net = nn.Sequential(Reads(), conv_net())
    with pytest.warns(UserWarning, match="compile_step: could not look for custom autograd.Functions"), pytest.raises(Exception):  # noqa: B017
        compile_step(net, SIBLoss(**WEIGHTS), backend="aot_eager")(*image_batch())


def test_fused_attention_does_not_compile_in_silence():
    x, target = image_batch(6, 3, 8, 8)
    with pytest.raises(RuntimeError, match="compile_step: fused attention must not be used"):
        compile_step(AttentionNet(), SIBLoss(**WEIGHTS), backend="aot_eager")(x, target)


@pytest.mark.parametrize(
    ("error", "words", "model", "options"),
    [
        (TypeError, r"compile_step: model must be a torch\.nn\.Module, got str", lambda: "resnet18", {}),
        (ValueError, "compile_step: fullgraph must be True, got False", conv_net, {"fullgraph": False}),
        (RuntimeError, "compile_step: SyncBatchNorm must not be used", lambda: nn.Sequential(nn.SyncBatchNorm(3)), {}),
        (RuntimeError, "compile_step: a module under torch.compile must not be used", lambda: torch.compile(conv_net()), {}),
    ],
)
def test_bad_arguments(error, words, model, options):
    with pytest.raises(error, match=words):
        compile_step(model(), SIBLoss(), **options)


def test_a_criterion_of_another_type():
    with pytest.raises(TypeError, match="compile_step: criterion must be a SIBLoss, got CrossEntropyLoss"):
        compile_step(conv_net(), nn.CrossEntropyLoss())


def test_a_criterion_attached_to_another_model():
    other = conv_net()
    criterion = SIBLoss().attach(other)
    with pytest.raises(RuntimeError, match="compile_step: criterion must be attached to this model or to none"):
        compile_step(conv_net(), criterion)


def test_a_torch_that_cannot_trace_autograd_grad_is_named(monkeypatch):
    import torch._dynamo.config as config

    monkeypatch.delattr(config, "trace_autograd_ops")
    with pytest.raises(RuntimeError, match=r"compile_step: torch must be able to trace torch\.autograd\.grad"):
        compile_step(conv_net(), SIBLoss())
