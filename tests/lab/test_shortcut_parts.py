"""What the shortcut test is made of, by hand: the versions of an image, the intervals, the verdict."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
import torch

pytest.importorskip("scipy", reason="extra [lab]", exc_type=ImportError)
pytest.importorskip("torchvision", reason="extra [lab]", exc_type=ImportError)
pytest.importorskip("captum", reason="extra [explain]", exc_type=ImportError)
pytest.importorskip("pytorch_grad_cam", reason="extra [explain]", exc_type=ImportError)

from sib_fast.lab.shortcut import run, verdict, versions
from sib_fast.lab.shortcut.numbers import Estimate, estimates
from sib_fast.lab.shortcut.verdict import KNOWS_NOTHING, LEANS, NO_SIGN, UNDECIDED
from sib_fast.lab.shortcut.versions import (
    MIXED_NEXT,
    MIXED_RAND,
    MIXED_SAME,
    NO_FG,
    ONLY_BG_B,
    ONLY_BG_T,
    ONLY_FG,
    ORIGINAL,
    VERSIONS,
    Shot,
    backgrounds,
    compose,
    draw_shots,
)
from tests.lab.ring_images import LEVELS, item

# ---- versions -----------------------------------------------------------------------------------------------------------


def test_every_version_by_hand():
    images, _, masks = (torch.stack([torch.as_tensor(x) for x in part]) for part in zip(item(0, 0), item(3, 4), strict=True))
    own = backgrounds(masks)
    assert own.usable.all()
    assert not own.outlined.any()
    mask, image = masks[0, 0], images[0]
    donor = torch.tensor([1, 0])

    def shown(version):
        return compose(Shot(version, donor), images, masks, own, 0)

    mixed = shown(MIXED_RAND)
    assert torch.equal(mixed[:, mask], image[:, mask])
    assert (mixed[0, ~mask] == LEVELS[3]).all(), "nothing of the other object, nor of the own background"
    assert (mixed[1:, ~mask] == 0).all(), "nor of what lies inside the other object's box"
    assert torch.equal(shown(ONLY_FG), torch.where(mask, image, 0.0))
    assert torch.equal(shown(NO_FG), torch.where(mask, 0.0, image))
    box = torch.zeros_like(mask)
    box[1:12, 1:12] = True  # one pixel of margin
    assert torch.equal(shown(ONLY_BG_B), torch.where(box, 0.0, image))
    assert torch.equal(shown(ORIGINAL), image)
    assert compose(Shot(MIXED_SAME, torch.tensor([-1, -1])), images, masks, own, 0) is None
    tiled = compose(Shot(ONLY_BG_T, torch.tensor([0, 1])), images, masks, own, 0)
    assert torch.equal(tiled[0], torch.full_like(tiled[0], LEVELS[0]))
    assert (tiled[1:] == 0).all()


def test_the_filling_is_the_rectangle_reflected():
    image = torch.arange(16 * 16.0).view(1, 16, 16)
    mask = torch.zeros(1, 16, 16, dtype=torch.bool)
    mask[0, 1:5, 1:15] = True  # with its margin the rows 0 to 5
    own = backgrounds(mask[None])
    assert own.tile[0].tolist() == [6, 0, 10, 16]
    filled = own.of(image[None], 0)
    for row in range(6):
        assert torch.equal(filled[0, row], image[0, 11 - row])
    assert torch.equal(filled[0, 6:], image[0, 6:])


@pytest.mark.parametrize("seed", range(4))
def test_the_rectangle_is_the_largest(seed):
    hole = torch.from_numpy(np.random.default_rng(seed).random((9, 11)) < 0.2)
    best = 0
    for top in range(9):
        for left in range(11):
            for bottom in range(top + 2, 10):
                for right in range(left + 2, 12):
                    if not hole[top:bottom, left:right].any():
                        best = max(best, (bottom - top) * (right - left))
    top, left, height, width = versions._largest_rectangle(hole, 2)
    assert height * width == best > 0
    assert not hole[top : top + height, left : left + width].any()


def test_large_images_are_searched_by_cells_and_the_rectangle_is_free():
    hole = torch.zeros(150, 224, dtype=torch.bool)
    hole[40:90, 60:221] = True
    top, left, height, width = versions._largest_rectangle(hole, 14)
    assert not hole[top : top + height, left : left + width].any()
    assert height * width >= 0.9 * 60 * 224


def test_objects_that_leave_no_rectangle_are_outlined_or_give_nothing():
    masks = torch.zeros(2, 1, 32, 32, dtype=torch.bool)
    for i in range(32):  # a diagonal: its box is everything
        masks[0, 0, i, max(0, i - 1) : i + 2] = True
    masks[1] = True
    masks[1, 0, 0, 0] = False
    own = backgrounds(masks)
    assert own.usable.tolist() == [True, False]
    assert own.outlined[0]
    shots = draw_shots(torch.tensor([0, 0]), own.usable, 1, 1, 1, 0)
    assert {s.version: s.donor.tolist() for s in shots if s.donor is not None} == {
        MIXED_SAME: [-1, 0], MIXED_RAND: [-1, 0], MIXED_NEXT: [-1, -1], ONLY_BG_T: [0, -1],
    }  # fmt: skip


def test_who_gives_whose_background():
    rng = np.random.default_rng(0)
    labels = torch.from_numpy(np.repeat([0, 1, 3, 4], [300, 30, 20, 1]))  # class 2 has no image, class 4 one
    usable = torch.from_numpy(rng.random(len(labels)) < 0.8)
    usable[-1] = True
    shots = draw_shots(labels, usable, 5, 40, 2, seed=1)
    assert [s.version for s in shots].count(MIXED_RAND) == 40
    at = torch.arange(len(labels))
    for shot in shots:
        if shot.donor is None or shot.version == ONLY_BG_T:
            continue
        given = shot.donor >= 0
        assert (shot.donor[given] != at[given]).all()
        assert usable[shot.donor[given]].all()
        theirs = labels[shot.donor[given]]
        if shot.version == MIXED_SAME:
            assert torch.equal(theirs, labels[given])
            assert given.tolist() == [True] * 350 + [False]
        elif shot.version == MIXED_NEXT:
            assert torch.equal(theirs, torch.tensor([1, 3, -1, 4, 0])[labels])
        else:
            assert given.all()
    drawn = labels[torch.stack([s.donor[:-1] for s in shots if s.version == MIXED_RAND])]
    for k in (0, 1, 3, 4):  # every class alike, however many images it has
        assert (drawn == k).double().mean() == pytest.approx(0.25, abs=0.02)
    again = draw_shots(labels, usable, 5, 40, 2, seed=1)
    assert all(s.donor is None or torch.equal(s.donor, t.donor) for s, t in zip(shots, again, strict=True))
    assert any(
        s.donor is not None and not torch.equal(s.donor, t.donor)
        for s, t in zip(shots, draw_shots(labels, usable, 5, 40, 2, seed=2), strict=True)
    )


# ---- numbers ------------------------------------------------------------------------------------------------------------


def test_intervals_are_those_of_the_mean_and_paired():
    rng = np.random.default_rng(0)
    common, effect = rng.normal(0, 10, 400), rng.normal(1, 1, 400)
    labels = np.arange(400) % 8
    found = estimates({"a": common, "b": common + effect, "b − a": effect}, labels)
    standard_error = effect.std(ddof=1) / 20
    assert found["b − a"].mean == pytest.approx(effect.mean())
    assert found["b − a"].low == pytest.approx(effect.mean() - 1.96 * standard_error, abs=0.15 * standard_error)
    assert found["b − a"].high == pytest.approx(effect.mean() + 1.96 * standard_error, abs=0.15 * standard_error)
    assert found["b"].high - found["b"].low > 5 * (found["b − a"].high - found["b − a"].low)


def test_what_is_not_defined_is_left_out_of_its_column_alone():
    found = estimates(
        {"a": np.array([1.0, np.nan, 0.0, 1.0]), "none": np.full(4, np.nan), "one": np.array([2.0, *[np.nan] * 3])}, np.zeros(4)
    )
    assert (found["a"].mean, found["a"].n) == (pytest.approx(2 / 3), 3)
    assert found["none"].n == 0
    assert math.isnan(found["none"].mean)
    assert (found["one"].mean, found["one"].n) == (2, 1)
    assert math.isnan(found["one"].low)


def test_classes_that_differ_make_the_interval_over_classes_wider_and_few_have_none():
    labels = np.repeat(np.arange(6), 50)
    values = np.random.default_rng(0).normal(labels, 1)
    found = estimates({"a": values}, labels)["a"]
    assert found.class_high - found.class_low > 4 * (found.high - found.low)
    assert math.isnan(estimates({"a": values[:200]}, labels[:200])["a"].class_low)


def test_what_all_images_agree_on_is_bounded_by_their_number():
    assert Estimate(0.0, 0.0, 0.0, 59).at_most == pytest.approx(1 - 0.05 ** (1 / 59))
    assert Estimate(0.0, 0.0, 0.0, 59).at_most < 0.05 < Estimate(0.0, 0.0, 0.0, 58).at_most
    assert Estimate(0.1, 0.05, 0.2, 59).at_most == 0.2


# ---- the verdict --------------------------------------------------------------------------------------------------------


def facts(gap, known=(0.5, 0.4, 0.6), n=200, **changed):
    def estimate(mean, low, high, n=n):
        return Estimate(mean, low, high, n)

    half = estimate(0.6, 0.5, 0.7)
    measures = {name: estimate(0.0, -0.1, 0.1) for name in run.MEASURES}
    measures |= {"gap": estimate(*gap), "known": estimate(*known), "between_flips": estimate(0.01, 0, 0.02)}
    values = {
        "accuracy": dict.fromkeys(VERSIONS, half), "measures": measures, "guessing": 0.1, "always": "cat", "one_answer": None,
        "backgrounds_each": 5, "boxes": False, "energy": {},
    }  # fmt: skip
    return verdict.Facts(**values | changed)


@pytest.mark.parametrize(
    ("gap", "kind", "words"),
    [
        ((0.30, 0.20, 0.40), LEANS, "leans strongly on the background"),
        ((0.08, 0.04, 0.12), LEANS, "leans on the background"),
        ((0.03, 0.001, 0.06), LEANS, "leans a little on the background"),
        ((0.03, 0.0, 0.06), UNDECIDED, "Not decided by 200 images"),
        ((0.01, -0.02, 0.04), NO_SIGN, "A gap above 4 points can be ruled out"),
        ((0.01, -0.03, 0.05), UNDECIDED, "would tell a gap of 5 points from none"),
        ((-0.10, -0.15, -0.05), NO_SIGN, "No sign"),
    ],
)
def test_the_verdict_follows_the_gap_and_its_interval(gap, kind, words):
    found = verdict.judge(facts(gap))
    assert found.kind == kind
    assert words in found.headline


def test_whether_it_knows_anything_comes_first():
    assert verdict.judge(facts((0.3, 0.2, 0.4), known=(0.05, -0.01, 0.1))).kind == KNOWS_NOTHING
    assert verdict.judge(facts((0.3, 0.2, 0.4), one_answer="cat")).kind == KNOWS_NOTHING


def test_what_pasting_costs_is_said_to_be_sure_or_not():
    def said(low):
        gap = facts((0.3, 0.2, 0.4))
        sentences = verdict.judge(
            dataclasses.replace(gap, measures={**gap.measures, "paste": Estimate(0.04, low, 0.1, 200)})
        ).sentences
        return next(sentence for sentence in sentences if sentence.startswith("The pasting itself"))

    assert "is not sure to cost anything: 4 points" in said(-0.14)
    assert "class, costs 4 points" in said(0.01)


def test_a_verdict_reads_alike_on_the_page_and_in_a_terminal():
    for found in (facts((0.3, 0.2, 0.4)), facts((0.3, 0.2, 0.4), one_answer="cat")):
        assert not any("below" in sentence for sentence in verdict.judge(found).advice)


def test_boxes_are_said_to_hide_some_of_it():
    said = verdict.judge(facts((0.3, 0.2, 0.4), boxes=True)).sentences
    assert sum("boxes" in sentence for sentence in said) == 1
    assert not any("boxes" in sentence for sentence in verdict.judge(facts((0.3, 0.2, 0.4))).sentences)


@pytest.mark.parametrize(
    ("value", "words"),
    [(0.123, "12 points"), (0.0123, "1.2 points"), (-0.01, "−1 point"), (0.0, "0 points"), (-1e-4, "0 points"), (math.nan, "–")],
)
def test_points_in_words(value, words):
    assert verdict.points(value) == words
