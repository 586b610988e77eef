"""Masks for a part of the images, and masks that are mixed with their images."""

from __future__ import annotations

from collections import Counter

import pytest
import torch

from sib_fast import SIBLoss
from sib_fast.lab.annotation import PartlyAnnotated, choose_annotated
from sib_fast.lab.datasets import open_dataset
from sib_fast.lab.models import SmallConvNet
from sib_fast.lab.transforms import mix, random_backgrounds
from sib_fast.masks import GivenMask

LABELS = [0] * 90 + [1] * 50 + [2] * 7 + [3] * 3


@pytest.mark.parametrize(("share", "count"), [(0.0, 0), (0.01, 2), (0.1, 15), (0.5, 75), (1.0, 150), (1e-6, 1)])
def test_the_share_is_of_all_images_and_of_every_class(share, count):
    for seed in range(5):
        chosen = choose_annotated(LABELS, share, seed)
        assert len(chosen) == count
        for label, members in Counter(LABELS).items():
            assert abs(sum(LABELS[i] == label for i in chosen) - share * members) < 1.5


def test_who_is_annotated_depends_on_the_seed_and_more_holds_fewer():
    assert choose_annotated(LABELS, 0.1, 3) == choose_annotated(LABELS, 0.1, 3) != choose_annotated(LABELS, 0.1, 4)
    assert choose_annotated(LABELS, 0.01, 3) < choose_annotated(LABELS, 0.1, 3) < choose_annotated(LABELS, 0.4, 3)
    times = Counter(i for seed in range(400) for i in choose_annotated(LABELS, 0.1, seed))
    assert min(times[i] for i in range(150)) > 10  # every image can be chosen
    assert max(times.values()) < 100


def test_the_loss_has_the_masks_of_the_chosen_and_its_own_elsewhere():
    data = open_dataset("digits", None, "train", image_size=16, size=8)
    partly = PartlyAnnotated(data, 0.25, seed=0)
    items = [partly[i] for i in range(8)]
    given = GivenMask(*(torch.stack([getattr(m, f) for *_, m in items]) for f in ("values", "annotated")))
    assert given.annotated.nonzero().flatten().tolist() == sorted(partly.annotated)
    assert given.annotated.sum() == 2
    for i in range(8):
        assert torch.equal(given.values[i], data[i][2]) == (i in partly.annotated)
    model = SmallConvNet(width=2).eval()
    x = torch.stack([image for image, *_ in items]).requires_grad_()
    labels = torch.stack([label for _, label, _ in items])
    areas = []
    for mask in (given, GivenMask(given.values, torch.zeros(8, dtype=torch.bool)), None):
        criterion = SIBLoss(window_size=5)
        criterion(model(x), labels, x, mask=mask)
        areas.append(criterion.terms["mask_area"].item())
    assert areas[1] == areas[2] != areas[0]


def test_images_without_masks_stay_so():
    class Without:
        labels, mean, std = (0, 1), (0.5,) * 3, (0.5,) * 3

        def __getitem__(self, index):
            return torch.zeros(3, 4, 4), torch.tensor(index), GivenMask(torch.zeros(1, 4, 4), torch.tensor(False))

    assert not PartlyAnnotated(Without(), 1.0, 0)[1][2].annotated


# ---- mixing ---------------------------------------------------------------------------------------------------------


def coded(count=4, size=16):
    """Images whose value is their mask's, so that both must stay equal whatever moves them; labels 0, 1, 2, …"""
    masks = torch.rand(count, 1, size, size) < 0.4
    return masks.to(torch.float32).expand(-1, 3, -1, -1).clone(), torch.arange(count), masks


@pytest.mark.parametrize("kind", ["mixup", "cutmix"])
def test_masks_are_mixed_as_their_images_are(kind):
    torch.manual_seed(0)
    weights = set()
    for _ in range(20):
        images, targets, masks = coded()
        before = images.clone()
        mixed, soft, mask = mix(kind, 1.0, images, targets, 4, masks)
        assert torch.equal(images, before)
        torch.testing.assert_close(mixed, mask.expand_as(mixed))
        assert mask.dtype == torch.float32
        assert 0 <= mask.min() <= mask.max() <= 1
        # image i holds `weight` of itself and the rest of its neighbour before it
        weight = soft[1, 1].item()
        expected = weight * torch.eye(4) + (1 - weight) * torch.eye(4).roll(1, 0)
        torch.testing.assert_close(soft, expected)
        if kind == "mixup":
            torch.testing.assert_close(mixed, weight * before + (1 - weight) * before.roll(1, 0))
        else:
            assert set(mask.unique().tolist()) <= {0.0, 1.0}
            stays = (mixed == before).all(1, keepdim=True)
            # every pixel is the own or the neighbour's, and as many as the label says are the own
            assert (stays | (mixed == before.roll(1, 0)).all(1, keepdim=True)).all()
            assert stays.all(0).double().mean() >= weight - 1e-6
        weights.add(round(weight, 3))
    assert len(weights) > 10


@pytest.mark.parametrize("kind", ["mixup", "cutmix"])
def test_a_mixed_image_is_annotated_where_both_were(kind):
    images, targets, masks = coded()
    given = GivenMask(masks, torch.tensor([True, True, False, True]))
    _, soft, mixed = mix(kind, 1.0, images, targets, 4, given)
    assert mixed.annotated.tolist() == [True, True, False, False]
    assert soft.sum(1).tolist() == pytest.approx([1] * 4)
    assert mix(kind, 1.0, images, targets, 4, None)[2] is None


def test_a_mixed_batch_goes_through_the_loss():
    torch.manual_seed(0)
    images, targets, masks = coded()
    images, soft, masks = mix("mixup", 1.0, images, targets, 4, masks)
    criterion, x = SIBLoss(window_size=5), images.requires_grad_()
    criterion(SmallConvNet(4, width=2)(x), soft, x, mask=masks).backward()
    assert criterion.terms["mask_area"].item() == pytest.approx(masks.mean().item())


# ---- random backgrounds ---------------------------------------------------------------------------------------------


def with_objects(count=40):
    """Image i is i, with an object that is 1000 brighter."""
    images = torch.arange(float(count)).view(-1, 1, 1, 1).expand(-1, 3, 8, 8).clone()
    masks = torch.zeros(count, 1, 8, 8, dtype=torch.bool)
    for i, (top, left) in enumerate(torch.randint(0, 6, (count, 2)).tolist()):
        masks[i, :, top : top + 3, left : left + 3] = True
    return images + 1000 * masks, masks


def test_backgrounds_are_replaced_where_the_mask_is_not_and_by_no_object():
    torch.manual_seed(0)
    images, masks = with_objects()
    before = images.clone()
    mixed = random_backgrounds(images, masks, 0.5, torch.Generator().manual_seed(0))
    assert torch.equal(images, before)
    objects = masks.expand_as(images)
    assert torch.equal(mixed[objects], images[objects])
    changed = (mixed != images).flatten(1).any(1)
    assert 8 < changed.sum() < 32
    # all of it, the place of the giver's object included, is of the image before
    neighbour = images.roll(1, 0)[:, :, -1:, -1:].remainder(1000).expand_as(images)
    torch.testing.assert_close(mixed[changed], torch.where(objects, images, neighbour)[changed])
    assert torch.equal(mixed, random_backgrounds(images, masks.double(), 0.5, torch.Generator().manual_seed(0)))


def test_who_has_no_mask_no_object_or_no_background_is_left_alone():
    images, masks = with_objects(6)
    masks[1] = False  # no object was seen: it gives, and gets nothing
    masks[4] = True
    given = GivenMask(masks, torch.tensor([True, True, False, True, True, True]))
    mixed = random_backgrounds(images, given, 1.0)
    for i in (1, 2, 4):
        assert torch.equal(mixed[i], images[i])
    for i, giver in ((0, 5), (3, 1), (5, 3)):
        outside = mixed[i][:, ~masks[i, 0]]
        background = images[giver][:, ~masks[giver, 0]].mean(1, keepdim=True)
        seen = images[giver][:, ~masks[i, 0]] if giver == 1 else background.expand_as(outside)
        torch.testing.assert_close(outside, seen)
        assert torch.equal(mixed[i][:, masks[i, 0]], images[i][:, masks[i, 0]])


@pytest.mark.parametrize("annotated", [0, 1])
def test_no_other_image_with_a_mask_leaves_all_as_they_are(annotated):
    images, masks = with_objects(5)
    given = GivenMask(masks, torch.arange(5) < annotated)
    assert torch.equal(random_backgrounds(images, given, 1.0), images)
    assert torch.equal(random_backgrounds(images, masks, 0.0), images)
