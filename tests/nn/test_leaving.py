"""A prepared model leaves training: files that load without this package, graphs with its layers as leaves, tools that refuse."""

from __future__ import annotations

import copy
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize

import sib_fast
from sib_fast.nn.prepare import SWAPS

# What reads a file where sib_fast cannot be imported.
READER = """
import sys
class Blocked:
    def find_spec(self, name, *_):
        if name.partition(".")[0] == "sib_fast":
            raise ImportError("blocked")
sys.meta_path.insert(0, Blocked())
import torch
x = torch.load("x.pt")
for name in sys.argv[1:]:
    if name.endswith(".onnx"):
        from onnx.reference import ReferenceEvaluator
        model = ReferenceEvaluator(name)
        y = torch.from_numpy(model.run(None, {model.input_names[0]: x.numpy()})[0])
    else:
        y = (torch.export.load(name).module() if name.endswith(".pt2") else torch.jit.load(name))(x)
    torch.save(y.detach(), name + ".y")
assert "sib_fast" not in sys.modules
"""


class Net(nn.Module):
    """A layer of most kinds, attention among them."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.maps = nn.Sequential(
            nn.Conv2d(3, 8, 3, padding=1),
            nn.BatchNorm2d(8),
            nn.SiLU(inplace=True),
            nn.MaxPool2d(2),
            nn.Conv2d(8, 8, 3, padding=1, groups=8),
            nn.GroupNorm(2, 8),
            nn.Hardswish(inplace=True),
            nn.AvgPool2d(2),
            nn.LeakyReLU(0.1),
            nn.Hardtanh(),
        )
        self.norm, self.attention = nn.LayerNorm(8), nn.MultiheadAttention(8, 2, batch_first=True)
        self.head = nn.Sequential(nn.Linear(8, 5), nn.GELU(), nn.Softplus(), nn.ELU(), nn.Sigmoid(), nn.Tanh(), nn.ReLU6())

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.norm(self.maps(x).flatten(2).transpose(1, 2))
        mixed, _ = self.attention(tokens, tokens, tokens, need_weights=False)
        return self.head(mixed.mean(1))


def prepared() -> tuple[nn.Module, Tensor, Tensor]:
    """A prepared model in eval mode, an input, and what PyTorch's own layers make of it."""
    plain = Net().eval()
    x = torch.randn(2, 3, 12, 12)
    return sib_fast.prepare(copy.deepcopy(plain)), x, plain(x).detach()


def assert_readable(names: list[str], x: Tensor, want: Tensor, folder: Path) -> None:
    """In one process, since it imports torch."""
    torch.save(x, folder / "x.pt")
    command = [sys.executable, "-W", "ignore", "-c", READER, *names]
    done = subprocess.run(command, capture_output=True, text=True, cwd=folder, check=False)
    assert done.returncode == 0, done.stderr
    for name in names:
        torch.testing.assert_close(torch.load(folder / f"{name}.y"), want, rtol=1e-5, atol=1e-6, msg=name)


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")  # PyTorch's attention looks at shapes
def test_files_load_where_the_package_is_not(tmp_path):
    model, x, want = prepared()
    torch.jit.save(torch.jit.script(model), tmp_path / "scripted.pt")
    with torch.no_grad():  # PyTorch's attention has another path then, and the tracer compares
        torch.jit.save(torch.jit.trace(model, x), tmp_path / "traced.pt")
    torch.export.save(torch.export.export(model, (x,)), tmp_path / "exported.pt2")
    torch.export.save(torch.export.export(model, (x,), strict=True), tmp_path / "strictly.pt2")
    assert type(model.maps[0]) is sib_fast.nn.Conv2d  # the model itself stays prepared
    assert_readable(["scripted.pt", "traced.pt", "exported.pt2", "strictly.pt2"], x, want, tmp_path)


@pytest.mark.filterwarnings("ignore")  # the exporters' own
def test_onnx(tmp_path):
    onnx = pytest.importorskip("onnx")
    pytest.importorskip("onnxscript")
    model, x, want = prepared()
    for dynamo in (False, True):
        file = tmp_path / f"{dynamo}.onnx"
        torch.onnx.export(model, (x,), str(file), dynamo=dynamo, external_data=False)
        assert {node.domain for node in onnx.load(file).graph.node} == {""}
    assert_readable(["False.onnx", "True.onnx"], x, want, tmp_path)


def test_a_model_in_training_mode_exports_without_our_ops():
    graph = torch.export.export(sib_fast.prepare(Net()), (torch.randn(2, 3, 12, 12),)).graph
    assert not [node.target for node in graph.nodes if "sib_fast" in str(node.target)]


def test_fx_sees_leaves():
    plain = Net()
    want = torch.fx.symbolic_trace(plain)
    graph = torch.fx.symbolic_trace(sib_fast.prepare(copy.deepcopy(plain)))
    assert [(n.op, str(n.target)) for n in graph.graph.nodes] == [(n.op, str(n.target)) for n in want.graph.nodes]
    assert type(graph.get_submodule("maps.0")) is sib_fast.nn.Conv2d
    # A layer that is traced itself is the root, whose forward PyTorch's is.
    for layer in (nn.Conv2d(3, 4, 3), nn.Softplus()):
        graphs = [torch.fx.symbolic_trace(module).graph for module in (copy.deepcopy(layer), sib_fast.prepare(layer))]
        assert [(n.op, n.target) for n in graphs[0].nodes] == [(n.op, n.target) for n in graphs[1].nodes]


def test_feature_extraction():
    torchvision = pytest.importorskip("torchvision")
    extraction = pytest.importorskip("torchvision.models.feature_extraction")
    model, x, nodes = (
        torchvision.models.resnet18().double().eval(),
        torch.randn(1, 3, 32, 32).double(),
        ["layer2", "layer3.0.relu"],
    )
    names, want = extraction.get_graph_node_names(model), extraction.create_feature_extractor(model, nodes)(x)
    sib_fast.prepare(model)
    assert extraction.get_graph_node_names(model) == names
    extractor = extraction.create_feature_extractor(model, nodes)
    assert any(type(module) in SWAPS.values() for module in extractor.modules())
    for name, got in extractor(x).items():
        torch.testing.assert_close(got, want[name], rtol=1e-10, atol=1e-10)


@pytest.mark.filterwarnings("ignore:torch.ao.quantization is deprecated", "ignore:Please use quant_min and quant_max")
def test_quantisation_says_restore():
    from torch.ao import quantization
    from torch.ao.quantization.quantize_fx import prepare_fx

    model, x = sib_fast.prepare(nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Linear(4, 2))), torch.randn(1, 3, 6, 6)
    mapping = quantization.QConfigMapping().set_object_type(nn.Conv2d, quantization.default_qconfig)
    model.qconfig = quantization.get_default_qat_qconfig()  # the container's: not ours
    for quantise in (
        lambda m: quantization.prepare_qat(m.train()),
        lambda m: quantization.prepare(m.eval()),
        lambda m: prepare_fx(m.eval(), mapping, (x,)),
        lambda m: quantization.quantize_dynamic(m, {nn.Linear}),
    ):
        with pytest.raises(RuntimeError, match=r"Conv2d must be PyTorch's own for torch\.ao\.quantization.*restore\(model\)"):
            quantise(copy.deepcopy(model))
    observed = quantization.prepare_qat(sib_fast.restore(model).train())
    assert type(observed[0]) is not nn.Conv2d
    assert not hasattr(sib_fast.nn.ReLU(), "qconfig")


def test_backpack_says_restore():
    with pytest.raises(RuntimeError, match=r"ReLU must be PyTorch's own for BackPACK.*restore\(model\)"):
        sib_fast.nn.ReLU()._backpack_extend = True  # as backpack.extend does


def weight_normed(layer: nn.Module) -> nn.Module:
    torch.manual_seed(0)
    return parametrizations.weight_norm(layer)


def second_order(layer: nn.Module) -> list[Tensor]:
    x = torch.randn(2, 3, 6, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(3)).requires_grad_()
    (first,) = torch.autograd.grad(layer(x).pow(2).sum(), x, create_graph=True)
    parameters = [p for name, p in layer.named_parameters() if name != "bias"]
    return [first.detach(), *torch.autograd.grad(first.pow(2).sum(), [x, *parameters])]


@pytest.mark.parametrize("order", ["parametrised first", "prepared first"])
def test_parametrised_layers(order):
    layer = nn.Conv2d(3, 4, 3).double()
    want = second_order(weight_normed(copy.deepcopy(layer)))
    if order == "parametrised first":
        weight_normed(layer)
        other = copy.deepcopy(layer)
        sib_fast.prepare(layer)
        assert not isinstance(other, sib_fast.nn.Conv2d)  # it had the same class
    else:
        weight_normed(sib_fast.prepare(layer))
    assert isinstance(layer, sib_fast.nn.Conv2d)
    assert parametrize.is_parametrized(layer, "weight")
    assert [entry.status for entry in sib_fast.nn.inspect(layer).entries] == ["prepared", "kept"]
    for a, b in zip(second_order(layer), want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-11)
    assert not isinstance(sib_fast.restore(layer), sib_fast.nn.Conv2d)
    assert parametrize.is_parametrized(layer, "weight")
    sib_fast.prepare(layer)
    assert type(parametrize.remove_parametrizations(layer, "weight")) is sib_fast.nn.Conv2d
    assert type(sib_fast.restore(layer)) is nn.Conv2d


def test_a_parametrisation_runs_once_a_forward():
    """Spectral norm counts its calls in training mode: a second one would move its vectors."""
    states = []
    for change in (lambda layer: layer, sib_fast.prepare):
        torch.manual_seed(0)
        layers = [nn.Conv2d(3, 4, 3), nn.LayerNorm([4, 4, 4]), nn.BatchNorm2d(4)]
        net = nn.Sequential(*layers).double()
        parametrizations.spectral_norm(layers[0])
        change(net)
        x = torch.linspace(-1, 1, 2 * 3 * 36, dtype=torch.float64).view(2, 3, 6, 6)
        net(x)
        states.append(net.state_dict())
    for (name, a), b in zip(states[1].items(), states[0].values(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12, msg=name)
