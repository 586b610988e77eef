"""LayerNorm, GroupNorm and modules that call their functions: PyTorch's numbers and state, swapped and given back."""

from __future__ import annotations

import copy
import io

import pytest
import torch
import torch.nn.functional as functional
from torch import nn

import sib_fast
from sib_fast import _backends, network_checks
from sib_fast.nn import inspect
from sib_fast.nn.prepare import fast_class, plain_class
from sib_fast.ops.layer_norm import reference

LAYERS = {
    "layer": (lambda: nn.LayerNorm(10), (3, 7, 10)),
    "layer-two-dimensions": (lambda: nn.LayerNorm((7, 10), eps=1e-3), (3, 7, 10)),
    "layer-no-bias": (lambda: nn.LayerNorm(10, bias=False), (3, 7, 10)),
    "layer-plain": (lambda: nn.LayerNorm(10, elementwise_affine=False), (3, 7, 10)),
    "group": (lambda: nn.GroupNorm(2, 6), (3, 6, 5, 5)),
    "group-plain": (lambda: nn.GroupNorm(3, 6, eps=1e-3, affine=False), (3, 6, 5)),
    "group-pixels": (lambda: nn.GroupNorm(6, 6), (3, 6, 4)),
}


class OwnNorm2d(nn.Module):
    """As many a ConvNeXt has it, under another name for torch.nn.functional, with another call of it, and one by keyword."""

    def __init__(self, channels: int):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))

    def forward(self, x):
        y = functional.layer_norm(x.permute(0, 2, 3, 1), self.weight.shape, self.weight, self.bias, eps=1e-4)
        return functional.softplus(y.permute(0, 3, 1, 2))


class Named(nn.Module):
    """Whose layer only has the function's name."""

    def __init__(self):
        super().__init__()
        self.layer_norm = nn.Identity()

    def forward(self, x):
        return self.layer_norm(functional.relu(x))


class Inherited(nn.LayerNorm):
    """A subclass with a constructor alone."""


def other_layers() -> dict:
    """Classes that are none of torch.nn's; of other packages, where they are installed."""
    found = {"own-2d": OwnNorm2d, "inherited": Inherited}
    for module, name in (
        ("torchvision.models.convnext", "LayerNorm2d"),
        ("timm.layers.norm", "LayerNorm2d"),
        ("timm.layers", "LayerNorm"),
        ("timm.layers.norm", "GroupNorm1"),
        ("timm.layers.norm_act", "GroupNorm1Act"),
        ("timm.layers.norm_act", "LayerNormAct2d"),
    ):
        try:
            found[f"{module.split('.')[0]}-{name}"] = getattr(__import__(module, fromlist=[name]), name)
        except ImportError:
            continue
    return found


OTHERS = other_layers()


def takes_maps(name: str) -> bool:
    return "2d" in name or "Group" in name


def randomised(layer: nn.Module) -> nn.Module:
    for parameter in layer.parameters():
        nn.init.normal_(parameter)
    return layer.double()


def derivatives(layer, x):
    """y, its gradients, and the gradients of a function of the first one."""
    leaf = x.detach().clone(memory_format=torch.preserve_format).requires_grad_()
    y = layer(leaf)
    g = torch.Generator().manual_seed(1)
    cotangent, u = (torch.randn(x.shape, generator=g, dtype=torch.float64) for _ in range(2))
    inputs = [leaf, *layer.parameters()]
    first = torch.autograd.grad(y, inputs, cotangent.requires_grad_(), create_graph=True)
    second = torch.autograd.grad(first[0], [cotangent, *inputs[:2]], u)
    return [t.detach() for t in (y, *first, *second)]


@pytest.mark.parametrize("name", LAYERS)
def test_layers_are_torchs_in_value_and_both_derivatives(name):
    make, shape = LAYERS[name]
    plain = randomised(make())
    fast = sib_fast.prepare(copy.deepcopy(plain))
    assert type(fast) is getattr(sib_fast.nn, type(plain).__name__)
    assert str(fast) == str(plain)
    assert list(fast.state_dict()) == list(plain.state_dict())
    x = 2 * torch.randn(shape, dtype=torch.float64) + 1
    for a, b in zip(derivatives(fast, x), derivatives(plain, x), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-11)
    low = x.bfloat16()
    assert fast(x.float()).dtype == torch.float32
    for context in (torch.autocast("cpu", torch.bfloat16), torch.no_grad(), torch.inference_mode()):
        with context:
            got, want = (layer.float()(low) for layer in (fast, plain))
            assert got.dtype == want.dtype
            torch.testing.assert_close(got, want, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize("name", OTHERS)
def test_modules_that_call_the_function(name, layout):
    """The same numbers and layout, the same class after restore."""
    plain = randomised(OTHERS[name](6))
    model = sib_fast.prepare(nn.Sequential(copy.deepcopy(plain)))
    fast = model[0]
    assert isinstance(fast, type(plain))
    assert type(fast) is not type(plain)
    assert plain_class(type(fast)) is type(plain)
    x = torch.randn(3, 6, 5, 4, dtype=torch.float64).contiguous(memory_format=layout)
    x = x if takes_maps(name) else x.transpose(1, 3)
    y = fast(x)
    assert any("sib_fast__layer_norm" in node.name() for node in network_checks.nodes_of(y.grad_fn))
    assert y.stride() == plain(x).stride()
    for a, b in zip(derivatives(fast, x), derivatives(plain, x), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-11)
    (entry,) = (entry for entry in inspect(nn.Sequential(copy.deepcopy(plain))).of("swap") if entry.names == ("0",))
    assert entry.kind.endswith(type(plain).__name__)
    assert inspect(model).of("prepared")[0].names == ("0",)
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    assert type(torch.load(buffer, weights_only=False)[0]) is type(fast)
    sib_fast.restore(model)
    assert type(model[0]) is type(plain)


def test_timms_own_fast_norm_stays_timms():
    norm = pytest.importorskip("timm.layers.norm", exc_type=ImportError)
    plain = norm.LayerNorm(6)
    plain._fast_norm = True
    fast = sib_fast.prepare(copy.deepcopy(plain))
    x = torch.randn(3, 6, requires_grad=True)
    assert type(fast(x).grad_fn) is type(plain(x).grad_fn)


def test_an_unknown_subclass_is_left_alone():
    class LayerNorm2d(nn.LayerNorm):
        def forward(self, x):
            return x

    assert fast_class(LayerNorm2d) is None
    assert fast_class(Named) is None
    assert plain_class(LayerNorm2d) is None
    model = sib_fast.prepare(nn.Sequential(LayerNorm2d(3)))
    assert type(model[0]) is LayerNorm2d
    assert type(sib_fast.restore(model)[0]) is LayerNorm2d
    with pytest.raises(AttributeError, match="has no attribute 'Nothing'"):
        sib_fast.nn.layer_norm.Nothing


@pytest.mark.parametrize(
    "layer", [nn.LayerNorm(5), nn.GroupNorm(2, 4), *[kind(4) for kind in OTHERS.values()]], ids=lambda m: type(m).__name__
)
def test_without_a_kernel_the_layer_is_its_own(layer, monkeypatch):
    """Composed of plain operations, the reference would be slower than what it replaces; nothing warns."""
    for backend in ("cpu", "emulated"):
        monkeypatch.setitem(_backends.MISSING, backend, "it was not built")
    x = torch.randn(2, 4, 3, 4 if type(layer) in OTHERS.values() else 5, requires_grad=True)
    got, want = sib_fast.prepare(copy.deepcopy(layer))(x), layer(x)
    assert torch.equal(got, want)
    nodes = [node.name() for node in network_checks.nodes_of(got.grad_fn)]
    assert not any("sib_fast__layer_norm" in node for node in nodes)
    assert any("NormBackward" in node for node in nodes)


def test_a_nested_tensor_is_pytorchs():
    """Only layer norm takes one."""
    rows = [torch.randn(3, 4), torch.randn(2, 4)]
    x = torch.nested.nested_tensor(rows, layout=torch.jagged, requires_grad=True)
    y = sib_fast.prepare(nn.LayerNorm(4))(x)
    assert torch.equal(y.values(), nn.LayerNorm(4)(torch.cat(rows)))
    y.values().sum().backward()
    assert x.grad.shape == x.shape


@pytest.mark.parametrize("shape", [(2, 4), (0, 4, 3), (1, 4, 1)], ids=str)
def test_one_value_a_group_and_no_images_are_pytorchs(shape):
    x, plain = torch.randn(shape), nn.GroupNorm(4, 4)
    fast = sib_fast.prepare(copy.deepcopy(plain))
    for layer in (plain, fast):
        if shape == (1, 4, 1):
            with pytest.raises(ValueError, match="Expected more than 1 value per channel"):
                layer(x)
    if shape != (1, 4, 1):
        assert torch.equal(fast(x), plain(x))


def test_the_reference_is_torchs():
    x, w, b = torch.randn(3, 6, 4, dtype=torch.float64), *torch.randn(2, 6, dtype=torch.float64)
    torch.testing.assert_close(
        reference.group_norm(x, 2, w, b, 1e-5), nn.functional.group_norm(x, 2, w, b), rtol=1e-12, atol=1e-12
    )
    last = x.transpose(1, 2)
    want = nn.functional.layer_norm(last, (6,), w, b)
    torch.testing.assert_close(reference.layer_norm(last, (6,), w, b, 1e-5), want, rtol=1e-12, atol=1e-12)
