"""The embedded data set: deterministic, exact masks, the requested correlation, nothing shared by train and test."""

import math

import pytest
import torch

from sib_fast.lab.data import (
    NUM_CLASSES,
    SOURCES,
    EmbeddedDigits,
    background_crop,
    denormalise,
    load_digits,
    load_photograph,
    strips,
)


def test_ten_distinct_colour_photographs_load_without_a_network():
    photographs = [load_photograph(k) for k in range(NUM_CLASSES)]
    for name, photograph in zip(SOURCES, photographs, strict=True):
        assert photograph.dtype == torch.float32, name
        assert photograph.shape[0] == 3, name
        assert 0 <= photograph.min() < photograph.max() <= 1, name
    assert len({p.double().mean().item() for p in photographs}) == NUM_CLASSES


@pytest.mark.parametrize("split", ["train", "test"])
def test_equal_arguments_give_equal_bits_and_seeds_differ(split):
    first, again, other = (EmbeddedDigits(split, 40, seed=seed) for seed in (3, 3, 4))
    for name in ("images", "masks", "labels", "digits", "crops"):
        assert torch.equal(getattr(first, name), getattr(again, name)), name
        assert not torch.equal(getattr(first, name), getattr(other, name)), name


@pytest.mark.parametrize("image_size", [16, 32, 45])
def test_outside_the_mask_the_image_is_the_background_bit_for_bit(image_size):
    data = EmbeddedDigits("train", 30, image_size=image_size, seed=1)
    for i in range(len(data)):
        image, _, mask = data[i]
        background = background_crop(*data.crops[i].tolist(), image_size)
        assert mask.shape == (1, image_size, image_size)
        assert torch.equal(image * ~mask, background * ~mask)
        # ink differs from the photograph almost everywhere; equal values can only be a coincidence of colours
        assert (image != background).any(dim=0)[mask[0]].float().mean() > 0.95


def test_items_are_views_of_the_attributes_with_the_digits_label():
    data = EmbeddedDigits("test", 20, seed=2)
    image, label, mask = data[7]
    assert torch.equal(image, data.images[7])
    assert torch.equal(mask, data.masks[7])
    assert label == load_digits()[1][data.digits[7]]
    assert data.images.shape == (20, 3, 32, 32)
    assert data.images.dtype == torch.float32
    assert data.masks.dtype == torch.bool


@pytest.mark.parametrize("correlation", [0.0, 0.4, 1.0])
def test_own_background_comes_as_often_as_requested(correlation):
    data = EmbeddedDigits("train", 1200, correlation=correlation, image_size=16, seed=5)
    own = (data.crops[:, 0] == data.labels).double().mean().item()
    expected = correlation + (1 - correlation) / NUM_CLASSES
    # four standard deviations of a binomial share: one false alarm in 16,000
    assert abs(own - expected) <= 4 * math.sqrt(expected * (1 - expected) / len(data))


def test_shifted_backgrounds_do_not_depend_on_the_class():
    data = EmbeddedDigits("test", 2000, correlation=0.0, image_size=16, seed=6)
    counts = torch.zeros(NUM_CLASSES, NUM_CLASSES, dtype=torch.float64)
    counts.index_put_((data.labels, data.crops[:, 0]), torch.ones(len(data), dtype=torch.float64), accumulate=True)
    expected = counts.sum(1, keepdim=True) / NUM_CLASSES
    statistic = ((counts - expected) ** 2 / expected).sum().item()
    # chi-square with 90 degrees of freedom has mean 90 and standard deviation 13.4
    assert statistic < 90 + 5 * 13.4


def test_the_two_test_sets_show_the_same_objects():
    same, shifted = (EmbeddedDigits("test", 60, correlation=c, seed=7) for c in (0.4, 0.0))
    for name in ("digits", "labels", "masks"):
        assert torch.equal(getattr(same, name), getattr(shifted, name)), name
    assert not torch.equal(same.crops, shifted.crops)


def test_train_and_test_share_no_digit_and_no_pixel_of_a_photograph():
    train, test = (EmbeddedDigits(split, 1500, image_size=16, seed=8) for split in ("train", "test"))
    assert not set(train.digits.tolist()) & set(test.digits.tolist())
    for source in range(NUM_CLASSES):
        _, height, width = load_photograph(source).shape
        seen = {}
        for data in (train, test):
            columns = torch.zeros(width, dtype=torch.bool)
            for _, top, left, side in data.crops[data.crops[:, 0] == source].tolist():
                columns[left : left + side] = True
                assert 0 <= top <= height - side
            seen[data.split] = columns
        assert not (seen["train"] & seen["test"]).any(), SOURCES[source]
        assert seen["train"].any(), SOURCES[source]
        assert seen["test"].any(), SOURCES[source]


def test_strips_of_the_splits_cover_every_column_once():
    for width in (451, 640):
        columns = [c for split in ("train", "test") for begin, end in strips(split, width) for c in range(begin, end)]
        assert sorted(columns) == list(range(width))


def test_every_digit_of_the_split_is_used_once_before_one_is_used_twice():
    data = EmbeddedDigits("test", 600, image_size=16, seed=9)
    counts = torch.bincount(data.digits)[-500:]
    assert set(counts.tolist()) == {1, 2}


def test_denormalise_gives_the_pixels_back():
    data = EmbeddedDigits("train", 2, seed=1)
    pixels = denormalise(data.images)
    assert 0 <= pixels.min() <= pixels.max() <= 1
    assert torch.allclose((pixels - 0.5) / 0.25, data.images, atol=1e-6)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("validation", 10), "split must be 'train' or 'test', got 'validation'"),
        (("train", 0), "size must be at least 1, got 0"),
        (("train", 10, {"correlation": 1.5}), r"correlation must be in \[0, 1\], got 1.5"),
        (("train", 10, {"image_size": 8}), "image_size must be at least 16, got 8"),
        (("train", 10, {"seed": -1}), "seed must not be negative, got -1"),
    ],
)
def test_bad_arguments_are_named(arguments, message):
    split, size, *options = arguments
    with pytest.raises(ValueError, match=f"^EmbeddedDigits: {message}"):
        EmbeddedDigits(split, size, **(options[0] if options else {}))
