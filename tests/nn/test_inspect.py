"""inspect: a model's findings, with and without an example, and that looking changes nothing."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import sib_fast
from sib_fast import SIBLoss
from sib_fast.nn import inspect
from sib_fast.nn.prepare import SWAPS
from sib_fast.testing.networks import AttentionNet, conv_net, image_batch


def kinds(report, status: str) -> dict[str, int]:
    return {entry.kind: len(entry.names) for entry in report.of(status)}


def test_what_prepare_would_swap():
    model = conv_net()
    report = inspect(model)
    swaps = report.of("swap")
    for entry in swaps:
        for name in entry.names:
            assert type(model.get_submodule(name)) in SWAPS
    named = {name for entry in swaps for name in entry.names}
    assert named == {name for name, module in model.named_modules() if type(module) in SWAPS}
    becomes = {entry.kind: entry.becomes for entry in swaps}
    assert becomes["torch.nn.Conv2d"] == "sib_fast.nn.convolution.Conv2d"
    assert becomes["torch.nn.BatchNorm2d"] == "sib_fast.nn.batch_norm.BatchNorm2d"
    sib_fast.prepare(model)
    after = inspect(model)
    assert after.of("swap") == ()
    assert {name for entry in after.of("prepared") for name in entry.names} == named
    for entry in swaps:
        for name in entry.names:
            kind = type(model.get_submodule(name))
            assert entry.becomes == f"{kind.__module__}.{kind.__name__}"


def test_what_is_left_and_why():
    class Own(nn.BatchNorm2d):
        pass

    model = nn.Sequential(nn.Conv2d(3, 4, 3), Own(4), nn.GroupNorm(2, 4), nn.Sequential(nn.Dropout(), nn.Dropout()))
    kept = {entry.kind: entry for entry in inspect(model).of("kept")}
    own = next(entry for kind, entry in kept.items() if kind.endswith("Own"))
    assert own.why == "a subclass of torch.nn.BatchNorm2d has a forward of its own"
    assert own.names == ("1",)
    assert kept["torch.nn.Dropout"].names == ("3.0", "3.1")
    assert "torch.nn.Sequential" not in kept  # a container has nothing to swap
    if nn.GroupNorm not in SWAPS:
        assert "composed of many ops" in kept["torch.nn.GroupNorm"].why


@pytest.mark.parametrize(
    ("model", "kind", "fix"),
    [
        (lambda: nn.Sequential(nn.SyncBatchNorm(3)), "torch.nn.SyncBatchNorm", "GroupNorm"),
        (lambda: nn.Sequential(torch.compile(nn.Linear(2, 2))), "torch._dynamo.eval_frame.OptimizedModule", "uncompiled"),
        (lambda: nn.DataParallel(nn.Linear(2, 2)), "torch.nn.parallel.data_parallel.DataParallel", "DistributedDataParallel"),
        (lambda: nn.Sequential(nn.Hardsigmoid()), "torch.nn.Hardsigmoid", ""),
    ],
)
def test_obstacles_among_the_modules(model, kind, fix):
    model = model()
    found = inspect(model)
    if any(type(module) in SWAPS and type(module).__name__ in kind for module in model.modules()):
        (entry,) = found.of("swap")
        assert entry.kind == kind
        return
    (entry,) = found.of("obstacle")
    assert entry.kind == kind
    assert fix in entry.fix
    assert found.twice_differentiable is None


def test_a_static_graph(tmp_path):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        (entry,) = inspect(DistributedDataParallel(conv_net(), static_graph=True)).of("obstacle")
        assert "static_graph" in entry.why
        assert inspect(DistributedDataParallel(conv_net())).of("obstacle") == ()
    finally:
        torch.distributed.destroy_process_group()


def test_recurrent_layers_and_attention_are_pointed_out():
    class Own(nn.MultiheadAttention):
        pass

    report = inspect(nn.Sequential(nn.LSTM(2, 2), nn.MultiheadAttention(4, 2), Own(4, 2)))
    kept = {entry.kind: entry for entry in report.of("kept")}
    assert "cudnn" in kept["torch.nn.LSTM"].fix
    (own,) = (entry for kind, entry in kept.items() if kind.endswith("Own"))
    assert "fused attention" in own.why
    assert "sdpa_kernel" in own.fix
    (swap,) = report.of("swap")
    assert swap.kind == "torch.nn.MultiheadAttention"
    assert "any other call stays PyTorch's" in swap.why


# ---- with an example ----------------------------------------------------------------------------------------------------


def test_a_model_that_can_be_differentiated_twice():
    report = inspect(conv_net(), image_batch()[0])
    assert report.twice_differentiable is True
    assert report.twice_differentiable_prepared is True
    assert report.of("obstacle") == ()
    assert report.error is None


def test_fused_attention_is_found_in_the_graph():
    x = image_batch(6, 3, 8, 8)[0]
    report = inspect(AttentionNet(), x)
    (entry,) = report.of("obstacle")
    assert entry.kind.startswith("ScaledDotProductFlashAttention")
    assert "sdpa_kernel(SDPBackend.MATH)" in entry.fix
    assert report.twice_differentiable is False
    assert report.twice_differentiable_prepared is True
    (swap,) = (entry for entry in report.of("swap") if entry.kind.endswith("AttentionNet"))
    assert "F.scaled_dot_product_attention" in swap.why
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        assert inspect(AttentionNet(), x).twice_differentiable is True


def test_an_op_without_a_second_derivative_is_found():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Hardsigmoid())
    report = inspect(model, image_batch()[0])
    assert [type(module) for module in model] == [nn.Conv2d, nn.Hardsigmoid]  # it was a copy that was prepared
    assert report.twice_differentiable is False
    assert report.twice_differentiable_prepared is (nn.Hardsigmoid in SWAPS)
    (entry,) = report.of("obstacle")
    assert entry.kind == "HardsigmoidBackward0"
    assert entry.fix.startswith("Call sib_fast.prepare(model) first")


class Cube(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x**3

    @staticmethod
    def backward(ctx, grad):
        return 3 * ctx.saved_tensors[0] ** 2 * grad


class CubeLayer(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return Cube.apply(x)


def test_a_custom_function_is_named():
    report = inspect(nn.Sequential(nn.Conv2d(3, 4, 3), CubeLayer()), image_batch()[0])
    (entry,) = (entry for entry in report.of("kept") if entry.kind == "Cube")
    assert "register_autograd" in entry.fix
    assert report.twice_differentiable is True
    prepared = inspect(sib_fast.prepare(conv_net()), image_batch()[0])
    assert not any("Generated" in entry.kind for entry in prepared.entries)


def test_a_model_that_does_not_run_on_fake_tensors_says_so():
    class Reads(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x * float(x.detach().sum())

    report = inspect(nn.Sequential(Reads()), image_batch()[0])
    assert report.twice_differentiable is None
    assert "does not run on fake tensors" in report.error
    assert "not tried" in str(report)


def test_models_that_return_more_than_a_tensor():
    class Several(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = conv_net()

        def forward(self, x: Tensor) -> dict[str, Tensor]:
            return {"shape": torch.tensor(x.shape), "logits": self.body(x)}

    assert inspect(Several(), image_batch()[0]).twice_differentiable is True


# ---- looking changes nothing --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("prepared", [False, True])
def test_looking_changes_nothing(prepared):
    model = conv_net()
    model.append(nn.Dropout())
    if prepared:
        sib_fast.prepare(model)
    model.eval()
    criterion = SIBLoss(window_size=5).attach(model)
    x, target = image_batch()
    before = copy.deepcopy(model.state_dict())
    modules = [(module, type(module), module.training, dict(vars(module))) for module in model.modules()]
    random, grads, captured = torch.get_rng_state(), [p.grad for p in model.parameters()], criterion._attachment.input.captured
    report = inspect(model, x)
    assert report.twice_differentiable
    assert torch.equal(torch.get_rng_state(), random)
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])
    for module, kind, training, attributes in modules:
        assert type(module) is kind
        assert module.training == training
        assert vars(module) == attributes
    assert [p.grad for p in model.parameters()] == grads
    assert criterion._attachment.input.captured is captured
    assert not x.requires_grad
    model.train()
    assert torch.isfinite(criterion(model(x), target))


# ---- reading it ---------------------------------------------------------------------------------------------------------


def test_the_table_and_the_machine_readable_form():
    report = inspect(nn.Sequential(conv_net(), nn.DataParallel(nn.Identity())))
    lines = str(report).splitlines()
    assert lines[0].split() == ["modules", "kind", "becomes", "why"]
    assert lines[1].startswith("obstacle")
    assert "fix: " in lines[2]
    assert "[1]" in lines[2]
    assert any(line.startswith("swap") and " 2 " in line and "torch.nn.Conv2d" in line for line in lines)
    assert lines[-2] == "can be differentiated twice: not tried"
    data = json.loads(json.dumps(report.as_dict()))
    assert len(data["entries"]) == len(report.entries)
    assert data["entries"][0]["status"] == "obstacle"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("resnet18",), r"inspect: model must be a torch\.nn\.Module, got str"),
        ((nn.ReLU(), (2, 3, 8, 8)), "inspect: example_input must be a tensor or None, got tuple"),
    ],
)
def test_bad_arguments(arguments, words):
    with pytest.raises(TypeError, match=words):
        inspect(*arguments)
