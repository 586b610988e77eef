"""Masks that are given: boxes, segmentations, images that nobody annotated, and what is refused."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from sib_fast.masks import GivenMask, boxes_to_mask, collate, resolve_given

# ---- boxes --------------------------------------------------------------------------------------------------------------


def rectangle(height: int, width: int, y0: int, y1: int, x0: int, x1: int) -> Tensor:
    mask = torch.zeros(1, height, width)
    mask[0, y0:y1, x0:x1] = 1
    return mask


def test_a_box_of_whole_pixels():
    got = boxes_to_mask(torch.tensor([[1, 2, 4, 6]]), 8, 5)
    assert got.shape == (1, 8, 5)
    assert got.dtype == torch.float32
    assert torch.equal(got, rectangle(8, 5, 2, 6, 1, 4))


def test_a_single_box_needs_no_list():
    box = torch.tensor([1.0, 2.0, 4.0, 6.0])
    assert torch.equal(boxes_to_mask(box, 8, 5), boxes_to_mask(box[None], 8, 5))


@pytest.mark.parametrize(
    ("box", "y0", "y1", "x0", "x1"),
    [
        ((0.4, 0.0, 2.0, 1.0), 0, 1, 0, 2),  # left edge before the first centre (0.5): the pixel is in
        ((0.6, 0.0, 2.0, 1.0), 0, 1, 1, 2),  # behind it: out
        ((0.5, 0.5, 1.5, 1.5), 0, 1, 0, 1),  # on the centre: in at the low edge, out at the high edge
        ((0.0, 0.0, 1.6, 1.4), 0, 1, 0, 2),
        ((-3.0, -3.0, 99.0, 99.0), 0, 4, 0, 4),  # reaching over the image
        ((-3.0, -3.0, -1.0, -1.0), 0, 0, 0, 0),  # outside
        ((2.0, 2.0, 2.0, 4.0), 0, 0, 0, 0),  # no width
        ((3.0, 3.0, 1.0, 1.0), 0, 0, 0, 0),  # corners the wrong way round
    ],
)
def test_fractional_and_odd_boxes(box, y0, y1, x0, x1):
    assert torch.equal(boxes_to_mask(torch.tensor(box), 4, 4), rectangle(4, 4, y0, y1, x0, x1))


def test_union_of_boxes_stays_within_one():
    boxes = torch.tensor([[0, 0, 3, 3], [2, 1, 5, 4]])
    exact = torch.maximum(rectangle(6, 7, 0, 3, 0, 3), rectangle(6, 7, 1, 4, 2, 5))
    assert torch.equal(boxes_to_mask(boxes, 6, 7), exact)


def test_no_boxes_give_zeros():
    assert torch.equal(boxes_to_mask(torch.zeros(0, 4), 3, 2), torch.zeros(1, 3, 2))


def test_a_box_of_nan_holds_no_pixel():
    assert not boxes_to_mask(torch.tensor([math.nan, 0.0, 2.0, 2.0]), 3, 3).any()


def test_boxes_compile_as_one_graph():
    boxes = torch.tensor([[0.2, 0.6, 3.0, 3.0], [2.0, 1.0, 5.0, 4.0]])
    compiled = torch.compile(boxes_to_mask, backend="aot_eager", fullgraph=True)
    assert torch.equal(compiled(boxes, 6, 7), boxes_to_mask(boxes, 6, 7))


# ---- collate ------------------------------------------------------------------------------------------------------------


def test_collate_of_every_kind():
    segmentation = torch.rand(5, 6)
    box = torch.tensor([1.0, 1.0, 3.0, 4.0])
    empty = torch.zeros(0, 4)
    values, annotated = batch = collate([segmentation, None, segmentation[None] > 0.5, box, empty, box[None]], 5, 6)
    assert isinstance(batch, GivenMask)
    assert values.shape == (6, 1, 5, 6)
    assert values.dtype == torch.float32
    assert annotated.dtype == torch.bool
    assert annotated.tolist() == [True, False, True, True, True, True]
    assert torch.equal(values[0, 0], segmentation)
    assert torch.equal(values[2, 0], (segmentation > 0.5).float())
    assert torch.equal(values[3], rectangle(5, 6, 1, 4, 1, 3))
    assert torch.equal(values[3], values[5])
    assert not values[1].any()
    assert not values[4].any()


def test_a_segmentation_wins_over_boxes_where_the_shape_is_both():
    annotation = torch.tensor([[1.0, 0.0, 0.5, 0.25]])
    assert torch.equal(collate([annotation], 1, 4).values[0, 0], annotation)


def test_to_moves_both():
    moved = collate([None], 2, 2).to("meta")
    assert moved.values.device.type == moved.annotated.device.type == "meta"


# ---- resolve_given ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bool, torch.float16, torch.float64], ids=str)
def test_values_take_the_dtype_of_the_vjp(dtype):
    vjp, mask = torch.randn(2, 3, 4, 5), (torch.rand(2, 1, 4, 5) > 0.5).to(dtype)
    values, annotated = resolve_given("op", mask, vjp)
    assert annotated is None
    assert values.dtype == torch.float32
    assert torch.equal(values, mask.float())


def test_annotated_is_handed_on():
    batch = collate([None, torch.ones(4, 5)], 4, 5)
    values, annotated = resolve_given("op", batch, torch.randn(2, 3, 4, 5))
    assert torch.equal(values, batch.values)
    assert torch.equal(annotated, batch.annotated)


def test_resolve_compiles_as_one_graph():
    batch, vjp = collate([None, torch.ones(4, 5)], 4, 5), torch.randn(2, 3, 4, 5)
    compiled = torch.compile(resolve_given, backend="aot_eager", fullgraph=True)
    assert torch.equal(compiled("op", batch, vjp)[0], batch.values)


# ---- bad input: one test per message ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("error", "words", "call"),
    [
        (TypeError, "given mask: boxes must be a tensor, got list", lambda: boxes_to_mask([0, 0, 1, 1], 2, 2)),
        (
            ValueError,
            r"given mask: boxes must have shape \[K, 4\] or \[4\] \(x0, y0, x1, y1\), got \[2, 5\]",
            lambda: boxes_to_mask(torch.ones(2, 5), 2, 2),
        ),
        (ValueError, r"given mask: boxes must have .*, got \[1, 2, 4\]", lambda: boxes_to_mask(torch.ones(1, 2, 4), 2, 2)),
        (
            ValueError,
            r"given mask: annotation 1 must be a segmentation \[2, 3\] or \[1, 2, 3\], boxes \[K, 4\], or None, "
            r"got shape \[3, 2\]",
            lambda: collate([None, torch.ones(3, 2)], 2, 3),
        ),
        (ValueError, r"given mask: annotation 0 must be .*, got shape \[\]", lambda: collate([torch.tensor(1.0)], 2, 3)),
        (TypeError, "given mask: annotation 1 must be a tensor, got list", lambda: collate([None, [0, 0, 1, 1]], 2, 3)),
    ],
    ids=lambda v: v[:60] if isinstance(v, str) else "",
)
def test_bad_annotation(error, words, call):
    with pytest.raises(error, match=words):
        call()


GOOD = torch.ones(2, 1, 4, 5)


@pytest.mark.parametrize(
    ("error", "words", "mask"),
    [
        (TypeError, "op: mask must be a tensor, got ndarray", GOOD.numpy()),
        (ValueError, r"op: mask must have shape \[2, 1, 4, 5\] to go with x, got \[2, 4, 5\]", GOOD[:, 0]),
        (TypeError, "op: mask must be float64, float32, bfloat16 or float16, got torch.uint8", GOOD.byte()),
        (RuntimeError, r"op: mask must be on the device of x \(cpu\), got meta", GOOD.to("meta")),
        (
            ValueError,
            r"op: mask.annotated must have shape \[2\] to go with x, got \[2, 1\]",
            GivenMask(GOOD, torch.ones(2, 1).bool()),
        ),
        (
            RuntimeError,
            r"op: mask.annotated must be on the device of x \(cpu\), got meta",
            GivenMask(GOOD, torch.ones(2, device="meta").bool()),
        ),
        (TypeError, "op: mask.annotated must be bool, got torch.float32", GivenMask(GOOD, torch.ones(2))),
        (TypeError, "op: mask.annotated must be a tensor, got list", GivenMask(GOOD, [True, False])),
    ],
    ids=lambda v: v[:60] if isinstance(v, str) else "",
)
def test_bad_given_mask(error, words, mask):
    with pytest.raises(error, match=words):
        resolve_given("op", mask, torch.randn(2, 3, 4, 5))


def test_the_good_masks_of_this_section_pass():
    resolve_given("op", GOOD, torch.randn(2, 3, 4, 5))
    resolve_given("op", GivenMask(GOOD, torch.ones(2).bool()), torch.randn(2, 3, 4, 5))
