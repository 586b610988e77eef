"""Masks that are given: boxes, segmentations, images that nobody annotated, and what is refused."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from sib_fast import SIBLoss, compile_step
from sib_fast.masks import GivenMask, boxes_to_mask, check_given, collate, labels_to_mask, resolve_given
from sib_fast.testing.networks import conv_net, image_batch

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
        (TypeError, "op: mask must be float64, float32, bfloat16 or float16, got torch.complex64", GOOD + 0j),
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


# ---- values -------------------------------------------------------------------------------------------------------------

INTEGERS = [torch.uint8, torch.int16, torch.int32, torch.int64]
OBJECT = torch.zeros(12, 11).index_fill_(0, torch.tensor([2, 3, 4]), 1)
VOC = (OBJECT * 15).to(torch.uint8).index_fill_(0, torch.tensor([5]), 255)  # a person and the void band below it
TRIMAP = (3 - 2 * OBJECT).to(torch.uint8).index_fill_(0, torch.tensor([8, 9]), 2)  # 1 the animal, 2 background, 3 border
# What is no mask, and what is said of it.
NO_MASKS = {
    "VOC with void": (VOC, r"must hold 0 and 1 or 0 and 255 alone, got \[0, 15, 255\]: .*labels_to_mask"),
    "a trimap": (TRIMAP, r"must hold 0 and 1 or 0 and 255 alone, got \[1, 2, 3\]"),
    "0, 1 and 255": (OBJECT.int().index_fill_(0, torch.tensor([7]), 255), r"got \[0, 1, 255\]"),
    "a grey level": (torch.arange(132).view(12, 11).byte(), r"got \[0, 1, 2, 3, 4, 5\] …"),
    "negative": (-OBJECT.to(torch.int8), r"got \[-1, 0\]"),
    "another constant": (OBJECT.int() * 7, r"got \[0, 7\]"),
    "floats to 255": (OBJECT * 255, r"must lie in \[0, 1\], got values from 0 to 255: divide by 255"),
    "negative floats": (OBJECT - 1, r"must lie in \[0, 1\], got values from -1 to 0"),
    "bicubic overshoot": (OBJECT * 1.05, r"must lie in \[0, 1\], got values from 0 to 1.05"),
    "half": (OBJECT.half() * 2, r"must lie in \[0, 1\], got values from 0 to 2"),
    "bfloat16": (OBJECT.bfloat16() * 255, r"must lie in \[0, 1\], got values from 0 to 255"),
}


def loss_of(mask: object, criterion: SIBLoss | None = None) -> Tensor:
    x, target = image_batch()
    x.requires_grad_()
    return (criterion or SIBLoss(3.0, 1000.0, window_size=5))(conv_net()(x), target, x, mask)


FLOATS = [torch.float16, torch.bfloat16, torch.float32, torch.float64]


@pytest.mark.parametrize(
    ("dtype", "greatest"), [*((d, 1) for d in (torch.bool, *INTEGERS, *FLOATS)), *((d, 255) for d in INTEGERS)], ids=str
)
def test_integers_of_0_and_1_or_0_and_255_and_bools_are_masks(dtype, greatest):
    exact = loss_of(OBJECT.expand(6, 1, 12, 11))
    one = (OBJECT * greatest).to(dtype)
    for mask in (one.expand(6, 1, 12, 11), GivenMask(one.expand(6, 1, 12, 11), torch.ones(6).bool()), collate([one] * 6, 12, 11)):
        assert torch.equal(loss_of(mask), exact)


def test_at_a_layer_integers_are_averaged_as_masks():
    vjp = torch.randn(2, 3, 4, 5)
    mask = (torch.rand(2, 1, 8, 10) > 0.5).to(torch.uint8) * 255
    exact = torch.nn.functional.adaptive_avg_pool2d((mask != 0).float(), (4, 5))
    assert torch.equal(resolve_given("op", mask, vjp, (8, 10))[0], exact)


@pytest.mark.parametrize("case", NO_MASKS)
def test_what_is_no_mask_is_refused_by_collate_and_loss(case):
    annotation, words = NO_MASKS[case]
    with pytest.raises(ValueError, match="given mask: annotation 1 .*" + words):
        collate([None, annotation], 12, 11)
    batch = annotation.expand(6, 1, 12, 11)
    for mask in (batch, GivenMask(batch, torch.ones(6).bool())):
        criterion = SIBLoss(window_size=5)
        for _ in range(2):  # on the CPU at every batch
            with pytest.raises(ValueError, match="SIBLoss: mask .*" + words):
                loss_of(mask, criterion)


def test_what_stands_in_images_without_annotation_is_not_looked_at():
    values = OBJECT.repeat(6, 1, 1, 1)
    values[2] = 255
    annotated = torch.arange(6) != 2
    check_given("op", GivenMask(values, annotated))
    with pytest.raises(ValueError, match=r"op: mask must lie in \[0, 1\]"):
        check_given("op", GivenMask(values, ~annotated))
    assert loss_of(GivenMask(values, annotated)).isfinite()


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_non_finite_masks_show_in_the_loss(bad):
    assert not loss_of(torch.where(OBJECT == 1, bad, 0.0).expand(6, 1, 12, 11)).isfinite()


def test_rounding_of_a_resized_mask_passes():
    resized = torch.nn.functional.interpolate(OBJECT[None, None], (97, 61), mode="bilinear", antialias=True)
    check_given("op", resized)
    check_given("op", resized * (1 + 1e-6))
    check_given("op", (OBJECT * (1 + 2**-7)).bfloat16())


def test_on_a_device_the_first_batch_is_looked_at_and_every_one_under_debug(monkeypatch):
    monkeypatch.setattr("sib_fast.criterion._is_on_the_host", lambda tensor: False)
    good, bad = OBJECT.expand(6, 1, 12, 11), OBJECT.expand(6, 1, 12, 11) * 255
    criterion = SIBLoss(window_size=5)
    loss_of(None, criterion)  # a batch without masks is not the first
    with pytest.raises(ValueError, match="SIBLoss: mask must lie in"):
        loss_of(bad, criterion)
    loss_of(bad, criterion)
    monkeypatch.setenv("SIB_FAST_DEBUG", "1")
    criterion = SIBLoss(window_size=5)
    loss_of(good, criterion)
    with pytest.raises(ValueError, match="SIBLoss: mask must lie in"):
        loss_of(bad, criterion)


@pytest.mark.skipif(not hasattr(torch._dynamo.config, "trace_autograd_ops"), reason="this torch cannot trace autograd.grad")
def test_a_compiled_step_reads_and_refuses_as_an_eager_one_does():
    x, target = image_batch()
    step = compile_step(conv_net(norm="group").eval(), SIBLoss(3.0, 1000.0, window_size=5), backend="aot_eager")
    with pytest.raises(ValueError, match="SIBLoss: mask must hold 0 and 1 or 0 and 255 alone"):
        step(x, target, VOC.expand(6, 1, 12, 11))
    losses = [step(x, target, mask.expand(6, 1, 12, 11)).loss for mask in (OBJECT.byte() * 255, OBJECT)]
    assert torch.equal(*losses)
    with pytest.raises(ValueError, match="SIBLoss: mask must lie in"):
        step(x, target, OBJECT.expand(6, 1, 12, 11) * 255)


def test_class_labels_become_a_mask():
    person, animal = labels_to_mask(VOC, foreground=15, ignore=255), labels_to_mask(TRIMAP, foreground=[1], ignore=(3,))
    assert person.dtype == torch.float32
    assert torch.equal(person, OBJECT.index_fill(0, torch.tensor([5]), 0.5))
    assert torch.equal(animal, torch.where(TRIMAP == 1, 1.0, torch.where(TRIMAP == 2, 0.0, 0.5)))
    assert torch.equal(labels_to_mask(VOC, foreground=range(1, 21), ignore=255), person)
    assert not labels_to_mask(VOC, foreground=7).any()
    assert labels_to_mask(VOC.expand(2, 1, 12, 11), foreground=15).shape == (2, 1, 12, 11)
    loss_of(collate([person, animal, None] * 2, 12, 11))


def test_an_ignored_pixel_counts_a_quarter_in_both_regions():
    # D · variance of the two regions over that of a pixel that lies in one: M² and (1 − M)².
    from sib_fast import region_statistics

    vjp = torch.zeros(1, 1, 12, 11, dtype=torch.float64)
    vjp[0, 0, 5, 3] = 2.0
    mask = labels_to_mask(VOC, foreground=15, ignore=255).double()[None, None]
    inside, outside = (region_statistics(vjp, vjp, torch.full_like(mask, m), background_grams=True) for m in (1.0, 0.0))
    got = region_statistics(vjp, vjp, mask, background_grams=True)
    assert got.gram_vjp / inside.gram_vjp == 0.25
    assert got.background_gram_vjp / outside.background_gram_vjp == 0.25


@pytest.mark.parametrize(
    ("error", "words", "call"),
    [
        (TypeError, "labels_to_mask: labels must be a tensor, got list", lambda: labels_to_mask([1], foreground=1)),
        (TypeError, "labels must be an integer tensor, got torch.float32", lambda: labels_to_mask(OBJECT, foreground=1)),
        (TypeError, "labels must be an integer tensor, got torch.bool", lambda: labels_to_mask(OBJECT > 0, foreground=1)),
        (ValueError, "foreground must hold at least one label, got none", lambda: labels_to_mask(VOC, foreground=())),
        (
            ValueError,
            r"ignore must hold other labels than foreground, got \[3\] in both",
            lambda: labels_to_mask(TRIMAP, foreground=(1, 3), ignore=3),
        ),
        (
            ValueError,
            r"given mask: annotation 1 must hold boxes with x0 <= x1 and y0 <= y1, got \[\[5, 6, 3, 4\]\]: \(x, y, width",
            lambda: collate([None, torch.tensor([[5, 6, 3, 4]])], 12, 11),
        ),
        (
            ValueError,
            "annotation 0 must hold boxes with x0 <= x1",
            lambda: collate([torch.tensor([math.nan, 0.0, 2.0, 2.0])], 12, 11),
        ),
        (
            ValueError,
            r"annotation 0 must hold boxes in pixels, got .* for an image of 12×11: multiply by its width and height",
            lambda: collate([torch.tensor([[0.1, 0.2, 0.5, 0.9], [0.0, 0.0, 1.0, 1.0]])], 12, 11),
        ),
    ],
    ids=lambda v: v[:60] if isinstance(v, str) else "",
)
def test_bad_labels_and_boxes(error, words, call):
    with pytest.raises(error, match=words):
        call()


def test_boxes_of_one_pixel_and_boxes_cut_off_by_a_crop_are_good():
    values = collate(
        [torch.tensor([[0, 0, 1, 1]]), torch.tensor([[3.0, 2.0, 3.0, 2.0]]), torch.tensor([0.5, 0.5, 1.5, 1.5])], 12, 11
    )
    assert [int(v.sum()) for v in values.values] == [1, 0, 1]
