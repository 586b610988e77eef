"""Image files become RGB, and whatever happens to an image happens to its mask."""

import pickle

import numpy as np
import pytest
import torch
from PIL import Image

from sib_fast.lab.transforms import IMAGENET_MEAN, IMAGENET_STD, JointTransform, read_rgb

SIZE = 16


def blob(height=40, width=57):
    """An asymmetric object, so that a flip, a shift or a transposition shows."""
    mask = torch.zeros(1, height, width, dtype=torch.bool)
    mask[:, 5 : height // 2, 8 : width // 3] = True
    mask[:, height // 3 : height - 6, width // 4 : width // 2] = True
    return mask


def as_image(mask):
    return mask.to(torch.uint8).expand(3, -1, -1).contiguous() * 255


def pixels(image):
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (IMAGENET_MEAN, IMAGENET_STD))
    return image * std + mean


@pytest.mark.parametrize("augment", [True, False])
def test_image_and_mask_move_together(augment):
    transform, mask, seen = JointTransform(SIZE, augment), blob(), set()
    for seed in range(60):
        torch.manual_seed(seed)
        image, moved = transform(as_image(mask), mask)
        assert image.shape == (3, SIZE, SIZE)
        assert moved.shape == (1, SIZE, SIZE)
        assert (image.dtype, moved.dtype) == (torch.float32, torch.bool)
        # the image is a picture of the mask, so its bright half must be the mask, pixel for pixel
        assert torch.equal(pixels(image) > 0.5, moved.expand(3, -1, -1)), seed
        seen.add(moved.numpy().tobytes())
    assert len(seen) == 1 if not augment else len(seen) > 50


def test_training_flips_half_of_the_images():
    # a ramp tells a flip from a crop; 400 draws of a fair coin stay within 4 standard deviations (40)
    ramp = (torch.arange(50) * 5).to(torch.uint8).expand(3, 50, 50).contiguous()
    transform = JointTransform(SIZE, augment=True)
    torch.manual_seed(0)
    flipped = sum(bool(image[0, 0, 0] > image[0, 0, -1]) for image in (transform(ramp, None)[0] for _ in range(400)))
    assert abs(flipped - 200) <= 40


def test_masks_are_not_shifted_by_resizing():
    # nearest neighbours, torchvision's way with masks, move this disc by 0.50 px
    side, out = 500, 224
    y, x = torch.meshgrid(torch.arange(side) + 0.5, torch.arange(side) + 0.5, indexing="ij")
    disc = ((x - side / 2) ** 2 + (y - side / 2) ** 2 < 120**2)[None]
    _, mask = JointTransform(out, augment=False)(as_image(disc), disc)
    centre = mask[0].nonzero().double().mean(0) + 0.5
    assert torch.allclose(centre, torch.full((2,), out / 2, dtype=torch.float64), atol=0.05)
    scale = 256 / side  # the shorter side becomes 8/7 of 224
    assert abs(mask.sum().item() / (torch.pi * (120 * scale) ** 2) - 1) < 0.005


def test_evaluation_is_the_resized_middle_whatever_the_seed():
    # a shorter side of 16 is 8/7 of 14: nothing is resampled
    image = torch.randint(0, 256, (3, 16, 20), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    mask = image[:1] > 127
    transform = JointTransform(14, augment=False)
    for seed in (0, 1):
        torch.manual_seed(seed)
        got, moved = transform(image, mask)
        assert torch.equal((pixels(got) * 255).round().to(torch.uint8), image[:, 1:15, 3:17])
        assert torch.equal(moved, mask[:, 1:15, 3:17])


def test_training_draws_from_torchs_generator_and_a_mask_changes_no_draw():
    image = torch.randint(0, 256, (3, 40, 57), dtype=torch.uint8, generator=torch.Generator().manual_seed(2))
    transform, results = JointTransform(SIZE, augment=True), []
    for seed, mask in ((3, blob()), (3, None), (4, None)):
        torch.manual_seed(seed)
        results.append(transform(image, mask)[0])
    assert torch.equal(results[0], results[1])
    assert not torch.equal(results[1], results[2])


def test_no_mask_stays_no_mask():
    assert JointTransform(SIZE, augment=True)(as_image(blob()), None)[1] is None


def test_images_are_normalised_with_imagenets_mean_and_std():
    colour = torch.tensor([10, 100, 200], dtype=torch.uint8)
    image, _ = JointTransform(4, augment=False)(colour.view(3, 1, 1).expand(3, 9, 9), None)
    expected = (colour / 255 - torch.tensor((0.485, 0.456, 0.406))) / torch.tensor((0.229, 0.224, 0.225))
    torch.testing.assert_close(image, expected.view(3, 1, 1).expand(3, 4, 4))


def test_a_transform_can_be_sent_to_a_spawned_worker():
    transform = pickle.loads(pickle.dumps(JointTransform(SIZE, augment=True)))
    torch.manual_seed(0)
    first = JointTransform(SIZE, augment=True)(as_image(blob()), blob())
    torch.manual_seed(0)
    assert all(torch.equal(a, b) for a, b in zip(first, transform(as_image(blob()), blob()), strict=True))


def test_a_size_of_nothing_is_refused():
    with pytest.raises(ValueError, match="dataset: image_size must be at least 1, got 0"):
        JointTransform(0, augment=False)


# ---- files --------------------------------------------------------------------------------------------------------------


def palette_image(transparency=None):
    image = Image.new("P", (5, 4), 1)
    image.putpalette([0, 0, 0, 255, 0, 0])
    return image, {} if transparency is None else {"transparency": transparency}


@pytest.mark.parametrize(
    ("name", "image", "options", "colour"),
    [
        ("rgb.png", Image.new("RGB", (5, 4), (255, 0, 0)), {}, (255, 0, 0)),
        ("grey.png", Image.new("L", (5, 4), 90), {}, (90, 90, 90)),
        ("grey_alpha.png", Image.new("LA", (5, 4), (90, 7)), {}, (90, 90, 90)),
        ("bit.png", Image.new("1", (5, 4), 1), {}, (255, 255, 255)),
        ("rgba.png", Image.new("RGBA", (5, 4), (255, 0, 0, 0)), {}, (255, 0, 0)),
        ("palette.png", *palette_image(), (255, 0, 0)),
        ("palette_alpha.png", *palette_image(b"\x00\x80"), (255, 0, 0)),
        ("palette.gif", *palette_image(), (255, 0, 0)),
        ("cmyk.jpg", Image.new("CMYK", (5, 4), (0, 255, 255, 0)), {}, (254, 0, 0)),
        ("a_png.jpg", Image.new("RGB", (5, 4), (255, 0, 0)), {"format": "PNG"}, (255, 0, 0)),
    ],
    ids=lambda v: v if isinstance(v, str) else "",
)
def test_every_kind_of_image_becomes_rgb(tmp_path, name, image, options, colour):
    image.save(tmp_path / name, **options)
    got = read_rgb(str(tmp_path / name))
    assert got.dtype == torch.uint8
    assert got.shape == (3, 4, 5)
    assert (got.int() - torch.tensor(colour).view(3, 1, 1)).abs().max() <= 1  # JPEG rounds


def test_images_that_cannot_be_read_are_named(tmp_path):
    Image.fromarray(np.full((4, 5), 40_000, dtype=np.uint16)).save(tmp_path / "deep.png")
    (tmp_path / "text.jpg").write_text("404 not found")
    noise = np.random.default_rng(0).integers(0, 256, (40, 40, 3), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / "whole.jpg")
    (tmp_path / "cut.jpg").write_bytes((tmp_path / "whole.jpg").read_bytes()[:900])
    for name, words in (("deep.png", "I;16"), ("text.jpg", "cannot identify"), ("cut.jpg", "truncated")):
        with pytest.raises(ValueError, match=rf"dataset: .*{name} must be a readable image of 8 bits a channel, got .*{words}"):
            read_rgb(str(tmp_path / name))
    with pytest.raises(FileNotFoundError, match=r"gone\.jpg"):
        read_rgb(str(tmp_path / "gone.jpg"))
