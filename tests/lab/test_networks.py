"""Networks by name, the file that keeps one, and the small architectures."""

import os

import pytest
import torch
from torch import nn

import sib_fast
from sib_fast.lab.models import SmallConvNet, SmallResNet
from sib_fast.lab.networks import SMALL, NetworkSpec, build_network, load_network, save_network

SPEC = NetworkSpec(
    "small_resnet",
    ("cat", "dog", "newt"),
    16,
    (0.5, 0.4, 0.3),
    (0.25, 0.2, 0.1),
    {"width": 4, "blocks": 2},
    {"method": "sib", "lambda_bg": 1e6, "gather": False},
)


def trained(spec: NetworkSpec) -> nn.Module:
    """Weights and statistics that no constructor draws."""
    model = spec.build()
    with torch.no_grad():
        model.train()(torch.randn(4, 3, 16, 16) + 2)
    return model.eval()


# ---- by name --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("arch", SMALL)
@pytest.mark.parametrize("size", [1, 7, 16])
def test_small_architectures_take_any_size_and_can_be_trained(arch, size):
    model = build_network(arch, 3, width=4)
    criterion = sib_fast.SIBLoss(window_size=3, lambda_bg=10.0).attach(sib_fast.prepare(model))
    logits = model(torch.randn(3, 3, size, size))
    assert logits.shape == (3, 3)
    criterion(logits, torch.tensor([0, 1, 2])).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    assert "foreground" in criterion.terms


def test_widths_and_blocks():
    def channels(model):
        return [m.out_channels for m in model.modules() if isinstance(m, nn.Conv2d)]

    assert channels(SmallConvNet(width=2)) == [2, 4, 4, 8, 8]
    # stem; per stage two convolutions, and a projection where the shape changes
    assert channels(SmallResNet(width=2)) == [2, 2, 2, 4, 4, 4, 8, 8, 8]
    assert len(channels(SmallResNet(width=2, blocks=2))) == 9 + 6
    assert SmallResNet(width=2)(torch.randn(2, 3, 8, 8)).shape == (2, 10)
    # two halvings
    assert SmallResNet(width=2).features(torch.randn(1, 2, 16, 16)).shape == (1, 8, 4, 4)
    assert SmallConvNet(width=2).features(torch.randn(1, 3, 16, 16)).shape == (1, 8, 4, 4)


def test_a_residual_block_is_its_convolutions_and_its_input():
    block = SmallResNet(width=4).features[0].eval()
    x = torch.randn(2, 4, 5, 5)
    branch = block.second_norm(block.second(block.first_norm(block.first(x)).relu()))
    torch.testing.assert_close(block(x), (branch + x).relu())


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: SmallConvNet(width=0), "SmallConvNet: width must be at least 1, got 0"),
        (lambda: SmallResNet(width=-1), "SmallResNet: width must be at least 1, got -1"),
        (lambda: SmallResNet(blocks=0), "SmallResNet: blocks must be at least 1, got 0"),
    ],
)
def test_sizes_that_make_no_network(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_networks_of_torchvision():
    pytest.importorskip("torchvision")
    model = build_network("resnet18", 7)
    assert model.fc.out_features == 7
    # a segmentation network, a detection network and a typing error
    for name in ("fcn_resnet50", "retinanet_resnet50_fpn", "resnet1"):
        with pytest.raises(
            ValueError, match=rf"network: arch must be one of small_conv_net, small_resnet, efficientnet_lite0, .*, got '{name}'"
        ):
            build_network(name, 7)


def test_equal_seeds_draw_equal_weights():
    torch.manual_seed(3)
    first = build_network("small_conv_net", 3, width=2).state_dict()
    torch.manual_seed(3)
    second = build_network("small_conv_net", 3, width=2).state_dict()
    assert all(torch.equal(first[name], second[name]) for name in first)


# ---- the file -------------------------------------------------------------------------------------------------------


def test_a_saved_network_is_the_same_network(tmp_path):
    model = trained(SPEC)
    save_network(tmp_path / "n.pt", SPEC, model)
    spec, loaded = load_network(tmp_path / "n.pt")
    assert spec == SPEC
    assert not loaded.training
    x = torch.randn(2, 3, 16, 16)
    assert torch.equal(loaded(x), model(x))
    assert list(tmp_path.iterdir()) == [tmp_path / "n.pt"]


def test_a_prepared_network_is_saved_as_the_plain_one(tmp_path):
    model = trained(SPEC)
    save_network(tmp_path / "n.pt", SPEC, sib_fast.prepare(model))
    loaded = load_network(tmp_path / "n.pt")[1]
    assert {type(m).__module__.partition(".")[0] for m in loaded.modules()} == {"torch", "sib_fast"}
    assert not any(type(m).__module__.startswith("sib_fast.nn") for m in loaded.modules())
    x = torch.randn(2, 3, 16, 16)
    torch.testing.assert_close(loaded(x), model(x))


def test_normalise_and_its_inverse():
    pixels = torch.rand(2, 3, 4, 5)
    normalised = SPEC.normalise(pixels)
    for c in range(3):
        torch.testing.assert_close(normalised[:, c], (pixels[:, c] - SPEC.mean[c]) / SPEC.std[c])
    torch.testing.assert_close(SPEC.denormalise(normalised), pixels)
    torch.testing.assert_close(SPEC.denormalise(normalised[0]), pixels[0])
    assert SPEC.denormalise(torch.full((3, 1, 1), 99.0)).max() == 1


class Code:
    def __reduce__(self):
        return (os.mkdir, ("ran",))


def test_files_that_are_not_networks_are_refused_and_no_code_in_them_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save_network(tmp_path / "good.pt", SPEC, trained(SPEC))
    good = torch.load(tmp_path / "good.pt", weights_only=True)
    bad = {
        "code": {"format": Code()},
        "format": good | {"format": "sib_fast.network.0"},
        "tensor": torch.ones(2),
        "weights": good | {"state_dict": {}},
        "classes": good | {"spec": good["spec"] | {"classes": ("one",)}},
        "field": good | {"spec": good["spec"] | {"new": 1}},
    }
    for name, document in bad.items():
        torch.save(document, tmp_path / f"{name}.pt")
    (tmp_path / "text.pt").write_text("not an archive")
    (tmp_path / "cut.pt").write_bytes((tmp_path / "good.pt").read_bytes()[:-500])
    for name in (*bad, "text", "cut"):
        with pytest.raises(ValueError, match=rf"^network: .*{name}\.pt must be a file that sib-fast train wrote, got \w+: "):
            load_network(tmp_path / f"{name}.pt")
    assert not (tmp_path / "ran").exists()
    with pytest.raises(FileNotFoundError):
        load_network(tmp_path / "none.pt")
