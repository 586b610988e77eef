"""The study's numbers on made-up studies: intervals by hand, effects, verdicts at their boundaries."""

import math

import numpy as np
import pytest

pytest.importorskip("scipy")
pytest.importorskip("matplotlib")
from scipy import stats

from sib_fast.explain import REPORTED
from sib_fast.lab.study import sentences, tables
from sib_fast.lab.study.records import MEAN_OF_SIX, SHIFTED, explanation, load_study
from sib_fast.lab.study.statistics import (
    MET,
    NOT_DECIDABLE,
    NOT_MET,
    at_least,
    by_method,
    comparisons,
    counts,
    difference,
    judged,
    verdicts,
)
from tests.lab.made_up_studies import TRIPLE, record, study, write


def only(verdict_list, words):
    (found,) = (v for v in verdict_list if words in v.expectation)
    return found.verdict


# ---- intervals ----------------------------------------------------------------------------------------------------------


def test_an_interval_computed_by_hand(tmp_path):
    found = difference(study(tmp_path / "s", [{"shifted": d} for d in (0.01, 0.02, 0.03)], seeds=(1, 2, 3)), *TRIPLE, SHIFTED)
    # mean .02, standard deviation .01, t_{.975, 2} = 4.302652730 (tables), over √3
    half = 4.302652730 * 0.01 / 1.7320508075688772
    assert (found.n, found.seeds) == (3, (1, 2, 3))
    assert (found.mean, found.sd) == pytest.approx((0.02, 0.01), abs=1e-12)
    assert (found.low, found.high) == pytest.approx((0.02 - half, 0.02 + half), abs=1e-10)
    assert found.effect == "unclear"


def test_intervals_are_scipys_paired_ones_and_not_the_unpaired(tmp_path):
    random = np.random.default_rng(0)
    shifts = [{"energy": d, "deletion": -d} for d in random.normal(0.05, 0.01, 6)]
    made = study(tmp_path / "s", shifts, seeds=tuple(range(100, 106)))
    for metric in ("energy", "deletion"):
        quantity = explanation("smoothgrad", metric)
        ours, theirs = (list(made.values("net", v, quantity).values()) for v in ("sib", "plain"))
        expected = stats.ttest_rel(ours, theirs).confidence_interval(0.95)
        found = difference(made, *TRIPLE, quantity)
        assert (found.low, found.high) == pytest.approx((expected.low, expected.high), abs=1e-12)
        assert found.effect == "better"
        unpaired = stats.ttest_ind(ours, theirs).confidence_interval(0.95)
        assert unpaired.high - unpaired.low > 3 * (found.high - found.low)  # or the comparison would prove nothing


def test_seeds_without_both_networks_are_dropped_and_named(tmp_path):
    records = [record("plain", s) for s in (1, 2, 3, 4)]
    records += [record("sib", s, shifted=d) for s, d in ((2, 0.1), (3, 0.1), (5, 0.2))]
    found = difference(load_study(write(tmp_path / "s", records)), *TRIPLE, SHIFTED)
    assert (found.seeds, found.dropped) == ((2, 3), (1, 4, 5))
    assert found.mean == pytest.approx(0.1)


@pytest.mark.parametrize("value", [None, math.nan, math.inf, "absent"], ids=str)
def test_a_value_that_is_not_defined_drops_its_pair_and_is_listed(tmp_path, value):
    records = [record(v, s, energy=0.2 * (v == "sib")) for v in ("plain", "sib") for s in (1, 2, 3)]
    scores = records[4]["explanations"]["grad_cam"]  # S-IB, seed 2
    assert (records[4]["variant"], records[4]["seed"]) == ("sib", 2)
    scores["undefined"] = 50
    if value == "absent":
        del scores["energy"]
    else:
        scores["energy"] = value
    made = load_study(write(tmp_path / "s", records))
    hit, other = (difference(made, *TRIPLE, explanation(m, "energy")) for m in ("grad_cam", "saliency"))
    assert (hit.seeds, hit.dropped) == ((1, 3), (2,))
    assert hit.mean == pytest.approx(0.2)
    assert other.seeds == (1, 2, 3)
    # five methods are no mean of six
    assert difference(made, *TRIPLE, explanation(MEAN_OF_SIX, "energy")).seeds == (1, 3)
    lines = "\n".join(sentences.gaps(made))
    assert "Without a value: small net, S-IB, seed 2: Grad-CAM: energy inside ↑" in lines
    assert "images over all seeds: small net, Grad-CAM: S-IB 50" in lines
    cells = tables.headline(made, "net").rows[list(REPORTED).index("grad_cam")]
    assert cells[2].text.endswith("(n = 2)")
    assert cells[3].text.endswith("(n = 2)")


def test_the_mean_by_method_is_of_the_reported_methods(tmp_path):
    made = study(tmp_path / "s", {"saliency.energy": 0.06, "layer_cam.energy": 0.9})
    found = difference(made, *TRIPLE, explanation(MEAN_OF_SIX, "energy"))
    assert found.mean == pytest.approx(0.06 / 6)


def test_comparisons_are_against_the_baseline_and_of_s_ib_against_every_other(tmp_path):
    made = study(tmp_path / "s", {"shifted": 0.05}, {"shifted": 0.02})
    assert comparisons(made, "net") == [("sib", "plain"), ("unmasked", "plain"), ("sib", "unmasked")]
    assert difference(made, "net", "sib", "unmasked", SHIFTED).mean == pytest.approx(0.03)


def test_effects_follow_the_better_side(tmp_path):
    seeds = [{"deletion": d, "insertion": d, "randomisation": d} for d in (0.050, 0.051, 0.049)]
    made = study(tmp_path / "s", seeds, seeds=(1, 2, 3))
    effects = {
        m: difference(made, *TRIPLE, explanation("saliency", m)).effect for m in ("deletion", "insertion", "randomisation")
    }
    assert effects == {"deletion": "worse", "insertion": "better", "randomisation": ""}
    assert counts(by_method(made, *TRIPLE, "deletion")) == {"better": 0, "worse": 6, "unclear": 0}
    assert all(d.quantity.metric != "randomisation" and d.quantity.method != MEAN_OF_SIX for d in judged(made, *TRIPLE))


# ---- verdicts -----------------------------------------------------------------------------------------------------------


def energies(*shifts):
    return {f"{m}.energy": s for m, s in zip(REPORTED, shifts, strict=True)}


@pytest.mark.parametrize(
    ("shifts", "verdict"),
    [
        (energies(0.10, 0.10, 0.10, 0.10, 0.10, -0.2), MET),
        (energies(0.10, 0.10, 0.10, 0.10, 0.0999, 0.0999), NOT_MET),
        (energies(0.3, 0.3, 0.3, 0.3, 0.0, 0.0), NOT_MET),
        (energies(-0.3, -0.3, -0.3, -0.3, -0.3, -0.3), NOT_MET),
    ],
)
def test_energy_must_rise_by_the_mark_for_five_methods(tmp_path, shifts, verdict):
    assert only(verdicts(study(tmp_path / "s", shifts), "net"), "Energy inside up by ≥ 0.10") == verdict


def test_a_rise_whose_interval_contains_zero_decides_nothing(tmp_path):
    wide = [energies(0.5, 0.5, 0.5, 0.5, d, 0.0) for d in (0.4, -0.2)]  # mean .1, interval ± 3.8
    assert only(verdicts(study(tmp_path / "s", wide, seeds=(1, 2)), "net"), "Energy inside up by ≥ 0.10") == NOT_DECIDABLE


def test_a_fall_whose_interval_contains_zero_decides_nothing(tmp_path):
    wide = [{"log_background": d} for d in (-0.4, 0.2)]  # lower is better: the other end of the interval counts
    assert only(verdicts(study(tmp_path / "s", wide, seeds=(1, 2)), "net"), "Background suppression") == NOT_DECIDABLE


@pytest.mark.parametrize(
    ("shift", "verdict"), [(-0.01, MET), (0.01, NOT_MET), (0.0, NOT_MET)], ids=["suppressed", "raised", "same"]
)
def test_background_must_fall_for_all_six(tmp_path, shift, verdict):
    shifts = {f"{m}.log_background": -0.2 for m in REPORTED[1:]} | {f"{REPORTED[0]}.log_background": shift}
    assert only(verdicts(study(tmp_path / "s", shifts), "net"), "Background suppression") == verdict


@pytest.mark.parametrize(("shift", "verdict"), [(0.02, MET), (0.0199, NOT_MET), (-0.02, NOT_MET)])
def test_shifted_accuracy_must_rise_by_two_points(tmp_path, shift, verdict):
    assert only(verdicts(study(tmp_path / "s", {"shifted": shift}), "net"), "shifted backgrounds up by") == verdict


@pytest.mark.parametrize(
    ("shifts", "verdict"),
    [
        ([{}, {}, {}], MET),
        ([{"insertion": 0.1, "deletion": -0.1}] * 3, MET),
        ([{"saliency.insertion": -0.01}] * 3, NOT_MET),
        ([{"grad_cam.deletion": 0.01}] * 3, NOT_MET),
        ([{"grad_cam.deletion": d} for d in (0.01, 0.0, 0.0)], MET),  # worse, but the interval contains 0
        ([{"layer_cam.deletion": 0.1}] * 3, MET),  # not one of the six
    ],
    ids=["same", "better", "insertion falls", "deletion rises", "noise", "seventh method"],
)
def test_insertion_and_deletion_not_worse(tmp_path, shifts, verdict):
    assert only(verdicts(study(tmp_path / "s", shifts, seeds=(1, 2, 3)), "net"), "Insertion and deletion") == verdict


_ABOVE_IN_ONE = {f"{REPORTED[0]}.energy": 0.2}
_ABOVE_IN_TWO = _ABOVE_IN_ONE | {f"{REPORTED[1]}.energy": 0.2}


@pytest.mark.parametrize(
    ("sib", "control", "energy", "accuracy"),
    [
        ({"energy": 0.1, "shifted": 0.05}, {"energy": 0.05, "shifted": 0.02}, MET, MET),
        ({"energy": 0.1, "shifted": 0.05}, {"energy": 0.15, "shifted": 0.05}, NOT_MET, MET),
        ({"energy": 0.1, "shifted": 0.05}, {"energy": 0.05, "shifted": 0.06} | _ABOVE_IN_ONE, MET, NOT_MET),
        ({"energy": 0.1, "shifted": 0.05}, {"energy": 0.05, "shifted": 0.02} | _ABOVE_IN_TWO, NOT_MET, MET),
        ({"energy": 0.1, "shifted": 0.05}, None, NOT_DECIDABLE, NOT_DECIDABLE),
    ],
    ids=["ahead", "behind and equal", "behind in one method and accuracy", "behind in two methods", "no control"],
)
def test_ahead_of_the_control(tmp_path, sib, control, energy, accuracy):
    found = verdicts(study(tmp_path / "s", sib, control), "net")
    assert only(found, ": energy inside higher") == energy
    assert only(found, ": accuracy on shifted") == accuracy


def test_one_seed_decides_nothing_and_has_no_interval(tmp_path):
    made = study(tmp_path / "s", {"energy": 0.5, "shifted": 0.1, "log_background": -1.0}, {}, seeds=(7,))
    assert {v.verdict for v in verdicts(made, "net")} == {NOT_DECIDABLE}
    found = difference(made, *TRIPLE, SHIFTED)
    assert found.mean == pytest.approx(0.1)
    assert all(map(math.isnan, (found.sd, found.low, found.high)))
    assert "(one seed)" in tables.headline(made, "net").rows[-2][3].text


@pytest.mark.parametrize(
    ("needed", "each", "verdict"),
    [
        (2, [MET, MET, NOT_MET], MET),
        (3, [MET, MET, NOT_MET], NOT_MET),
        (3, [MET, MET, NOT_DECIDABLE], NOT_DECIDABLE),
        (3, [MET, NOT_DECIDABLE, NOT_MET], NOT_MET),
    ],
)
def test_enough_of_several(needed, each, verdict):
    assert at_least(needed, each) == verdict
