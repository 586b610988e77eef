"""The pieces that measure, draw and keep results, each alone."""

import pytest
import torch

pytest.importorskip("skimage")
from sib_fast.lab.data import EmbeddedDigits
from sib_fast.lab.evaluate import gradient_map, inside_share
from sib_fast.lab.models import SmallConvNet
from sib_fast.lab.results import write_atomically


def test_inside_share_of_known_maps():
    mask = torch.zeros(3, 1, 4, 4, dtype=torch.bool)
    mask[:, :, :2] = True
    gradient = torch.zeros(3, 1, 4, 4)
    gradient[0] = 1.0
    gradient[1, 0, 0, 0], gradient[1, 0, 3, 3] = 3.0, 1.0
    share = inside_share(gradient, mask)
    assert share[:2].tolist() == [0.5, 0.75]
    assert share[2].isnan()


def test_gradient_map_leaves_the_network_and_the_images_alone():
    model, data = SmallConvNet(width=2).train(), EmbeddedDigits("test", 3, seed=0)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    maps = gradient_map(model, data.images)
    assert maps.shape == (3, 1, 32, 32)
    assert not maps.requires_grad
    assert (maps >= 0).all()
    assert not data.images.requires_grad
    assert all(p.grad is None for p in model.parameters())
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    # each image's map is its own: eval mode does not mix the batch
    torch.testing.assert_close(gradient_map(model, data.images[1:2]), maps[1:2])


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch):
    path = tmp_path / "numbers"
    write_atomically(path, b"old")

    def full_disk(*arguments):
        raise OSError("no space left")

    monkeypatch.setattr("os.replace", full_disk)
    with pytest.raises(OSError, match="no space left"):
        write_atomically(path, b"new")
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]
