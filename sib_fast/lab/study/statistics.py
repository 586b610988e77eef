"""Paired differences over seeds, and what they say about the expectations. The unit is the network (seed), never the image.

A seed fixes data, initial weights and order of the batches, so two variants of one seed are a pair:

    d_k = variant_k − against_k        mean d̄, standard deviation s over the n seeds that both have (divisor n − 1)
    95 % interval:  d̄ ± t_{.975, n−1} · s / √n        none for n = 1
    p:              two-sided, of the same t               none for n = 1
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cache

import numpy as np

from sib_fast.lab.study.records import (
    IN_DISTRIBUTION,
    PROTOCOLS,
    SHIFTED,
    Quantity,
    Study,
    explanation,
)

LEVEL = 0.95
MET, NOT_MET, NOT_DECIDABLE = "met", "not met", "not decidable"
ENERGY_MARK, METHODS_NEEDED, ACCURACY_MARK = 0.10, 5, 0.02  # the expectations, as the protocol words them
_ROUNDING = 1e-9  # 0.65 − 0.55 is below 0.10 in float64

DEFINITIONS = {
    "paired difference": (
        "Variant minus what it is compared with, seed by seed, then the mean over seeds. A seed fixes data, initial weights and "
        "order of the batches. The unit is the network (seed), not the image: n counts seeds."
    ),
    "95 % interval": (
        "Student's t interval of the paired differences (standard error s/√n, n − 1 degrees of freedom); none for one seed. "
        "It is about new seeds of this recipe on this data, not about other data. Not adjusted for the number of comparisons."
    ),
    "p, Holm": (
        "Two-sided p of the same paired t test, and the same corrected by Holm's procedure for the number of quantities that are "
        "judged together: the primary ones of a comparison on all networks, or the secondary ones of a comparison on one network."
    ),
    "better, worse, no clear change": (
        "The 95 % interval of the paired difference excludes 0 on that side (“clearly more”, “clearly less”); or it contains 0 "
        "(“a difference that chance could make”)."
    ),
    "met": (
        "The mean paired difference reaches the mark and its interval excludes 0. For a count over methods: enough methods do. "
        "For “not worse”: no interval excludes 0 on the worse side; that is no proof of equality, so the least favourable "
        "interval is given too."
    ),
    "not met": "The mean is short of the mark; for “not worse”: an interval excludes 0 on the worse side.",
    "not decidable": (
        "Too few seeds: fewer than two pairs, or the mean reaches the mark but its interval contains 0; or a variant is missing."
    ),
}


@dataclass(frozen=True)
class Difference:
    """variant − against, paired by seed.

    Attributes:
        seeds: the pairs. dropped: seeds of either side without a defined value on both.
        mean, sd: NaN without pairs, sd for one pair too.
        low, high: the ends of the 95 % interval; NaN for fewer than two pairs.
        p: of the paired t test; NaN for fewer than two pairs, 1 where all differences are 0.
    """

    arch: str
    variant: str
    against: str
    quantity: Quantity
    seeds: tuple[int, ...]
    dropped: tuple[int, ...]
    mean: float
    sd: float
    low: float
    high: float
    p: float

    @property
    def n(self) -> int:
        return len(self.seeds)

    @property
    def gain(self) -> tuple[float, float]:
        """Mean, and the interval's end nearer to "worse", both counted so that more is better."""
        return (self.mean, self.low) if self.quantity.kind.direction >= 0 else (-self.mean, -self.high)

    @property
    def effect(self) -> str:
        """ "better" or "worse" where the interval excludes 0, "unclear" where not, "" for what is not judged or has no pair."""
        direction = self.quantity.kind.direction
        if direction == 0 or self.n == 0:
            return ""
        if self.low > 0 or self.high < 0:
            return "better" if self.mean * direction > 0 else "worse"
        return "unclear"


def difference(study: Study, arch: str, variant: str, against: str, quantity: Quantity) -> Difference:
    """The paired difference of one quantity. Needs scipy (extra [lab])."""
    ours, theirs = (study.values(arch, v, quantity) for v in (variant, against))
    seeds = tuple(sorted(ours.keys() & theirs.keys()))
    every = {n.seed for v in (variant, against) for n in study.of(arch, v)}
    pairs = np.array([ours[seed] - theirs[seed] for seed in seeds])
    mean = float(pairs.mean()) if seeds else math.nan
    sd = float(pairs.std(ddof=1)) if len(seeds) > 1 else math.nan
    error = sd / math.sqrt(len(seeds)) if len(seeds) > 1 else math.nan
    half = _t_quantile(len(seeds) - 1) * error if len(seeds) > 1 else math.nan
    dropped = tuple(sorted(every - set(seeds)))
    p = _p_value(mean, error, len(seeds) - 1)
    return Difference(arch, variant, against, quantity, seeds, dropped, mean, sd, mean - half, mean + half, p)


def _p_value(mean: float, error: float, freedom: int) -> float:
    from scipy.stats import t

    if not error > 0:
        return math.nan if math.isnan(error) else float(mean == 0)
    return float(2 * t.sf(abs(mean) / error, freedom))


def holm(values: Iterable[float]) -> list[float]:
    """p values of a family, corrected for their number: the i-th smallest of m times m − i + 1, never falling, at most 1.

    NaN stays NaN and counts for nothing. Source: Holm 1979.
    """
    values = list(values)
    order = sorted((i for i, p in enumerate(values) if not math.isnan(p)), key=lambda i: values[i])
    corrected, greatest = list(values), 0.0
    for rank, i in enumerate(order):
        greatest = max(greatest, min(1.0, (len(order) - rank) * values[i]))
        corrected[i] = greatest
    return corrected


def secondary(study: Study, arch: str, variant: str, against: str) -> dict[Quantity, float]:
    """Holm's p of the protocol's secondary quantities, one comparison on one architecture being a family."""
    there = [q for q in study.protocol.secondary if q in study.quantities(arch)]
    return dict(zip(there, holm(difference(study, arch, variant, against, q).p for q in there), strict=True))


def primary(study: Study, variant: str, against: str) -> list[tuple[Difference, float]]:
    """The primary quantities of a comparison with Holm's p; both quantities on all architectures are one family."""
    parts = [difference(study, arch, variant, against, q) for arch in study.architectures for q in study.protocol.primary]
    return [(d, p) for d, p in zip(parts, holm(d.p for d in parts), strict=True) if d.n]


@cache
def _t_quantile(freedom: int) -> float:
    from scipy.stats import t

    return float(t.ppf((1 + LEVEL) / 2, freedom))


def comparisons(study: Study, arch: str) -> list[tuple[str, str]]:
    """(variant, against): every variant against the baseline, and the headline against every other variant."""
    present = study.present(arch)
    pairs = [(v, study.baseline) for v in present if v != study.baseline]
    pairs += [(study.headline, v) for v in present if v not in (study.headline, study.baseline)]
    pairs += study.protocol.against
    return [(v, w) for v, w in pairs if v in present and w in present]


def differences(study: Study) -> list[Difference]:
    """Every quantity of every comparison of every architecture."""
    return [
        difference(study, arch, variant, against, quantity)
        for arch in study.architectures
        for variant, against in comparisons(study, arch)
        for quantity in study.quantities(arch)
    ]


def judged(study: Study, arch: str, variant: str, against: str) -> list[Difference]:
    """What has a better direction: accuracies, every method × metric, the VJP. Not the means of methods, which repeat them.

    Of a protocol that names what is secondary, the primary quantities and those alone.
    """
    chosen = [q for q in study.quantities(arch) if q.kind.direction and q.method != study.protocol.mean]
    if study.protocol.secondary:
        chosen = [q for q in (*study.protocol.primary, *study.protocol.secondary) if q in study.quantities(arch)]
    return [d for d in (difference(study, arch, variant, against, q) for q in chosen) if d.n]


def counts(found: Iterable[Difference]) -> dict[str, int]:
    """How many are better, worse and unclear."""
    effects = [d.effect for d in found]
    return {effect: effects.count(effect) for effect in ("better", "worse", "unclear")}


def by_method(study: Study, arch: str, variant: str, against: str, metric: str) -> list[Difference]:
    """One metric for each of the protocol's methods."""
    return [difference(study, arch, variant, against, explanation(method, metric)) for method in study.protocol.methods]


@dataclass(frozen=True)
class Verdict:
    """One expectation of the protocol on one architecture.

    Attributes:
        verdict: ``"met"``, ``"not met"`` or ``"not decidable"``: DEFINITIONS.
        summary: the count or the difference that it rests on.
        parts: the differences behind it.
    """

    arch: str
    expectation: str
    verdict: str
    summary: str
    parts: tuple[Difference, ...]


def verdicts(study: Study, arch: str) -> list[Verdict]:
    """The expectations of the protocol, judged on one architecture."""
    return _evidence_verdicts(study, arch) if study.protocol is PROTOCOLS["evidence"] else _sib_verdicts(study, arch)


def _evidence_verdicts(study: Study, arch: str) -> list[Verdict]:
    there = study.present(arch)
    inside, (insertion, deletion) = (
        explanation(study.protocol.mean, "energy"),
        (explanation(study.protocol.mean, metric) for metric in ("insertion", "deletion")),
    )

    def gain(variant: str, against: str, quantity: Quantity, mark: float) -> Iterable[Verdict]:
        if {variant, against} <= there.keys():
            part = difference(study, arch, variant, against, quantity)
            what = "Energy inside, mean of five not optimised" if quantity is inside else "Accuracy, shifted"
            yield Verdict(
                arch, f"{there[variant]} over {there[against]}: {what}, ≥ {mark:+.2f}", reaches(part, mark), "", (part,)
            )

    found: list[Verdict] = []
    for variant in ("area", "share"):
        found += gain(variant, "plain", inside, 0.15)
        found += gain(variant, "plain", SHIFTED, 0.05)
        for against in ("sib", "unmasked"):
            found += gain(variant, against, SHIFTED, ACCURACY_MARK)
        if {variant, "plain"} <= there.keys():
            parts = tuple(difference(study, arch, variant, "plain", q) for q in (insertion, deletion))
            each = [not_worse(d) for d in parts]
            name = f"{there[variant]} over {there['plain']}: insertion and deletion not worse, mean of five not optimised"
            found.append(Verdict(arch, name, at_least(2, each), f"{each.count(MET)} of 2", parts))
        found += gain(f"sib_{variant}", "plain", inside, 0.22)
    return found


def _sib_verdicts(study: Study, arch: str) -> list[Verdict]:
    pair = (study.headline, study.baseline)
    ahead = (study.headline, study.control)
    label = study.variants.get(study.headline, study.headline)

    def counted(expectation: str, parts: list[Difference], needed: int, judge: Callable[[Difference], str]) -> Verdict:
        each = [judge(d) for d in parts]
        text = f"{each.count(MET)} of {len(each)}"
        if each.count(NOT_DECIDABLE):
            text += f" ({each.count(NOT_DECIDABLE)} not decidable)"
        return Verdict(arch, expectation, at_least(needed, each), text, tuple(parts))

    def single(expectation: str, quantity: Quantity, against: tuple[str, str], mark: float) -> Verdict:
        part = difference(study, arch, *against, quantity)
        return Verdict(arch, expectation, reaches(part, mark), "", (part,))

    six = len(study.protocol.methods)
    energy = by_method(study, arch, *pair, "energy")
    background = by_method(study, arch, *pair, "log_background")
    faithful = [difference(study, arch, *pair, explanation(study.protocol.mean, metric)) for metric in ("insertion", "deletion")]
    result = [
        counted(
            f"Energy inside up by ≥ {ENERGY_MARK:.2f} for at least {METHODS_NEEDED} of the six methods",
            energy,
            METHODS_NEEDED,
            lambda d: reaches(d, ENERGY_MARK),
        ),
        counted("Background suppression better for all six methods", background, six, lambda d: reaches(d, 0.0)),
        single(f"Accuracy on shifted backgrounds up by ≥ {ACCURACY_MARK:.2f}", SHIFTED, pair, ACCURACY_MARK),
        counted("Insertion and deletion not worse, mean of six", faithful, 2, not_worse),
    ]
    if study.control not in study.variants:
        return result
    control = study.variants[study.control]
    result += [
        counted(
            f"{label} ahead of “{control}”: energy inside higher for at least {METHODS_NEEDED} of the six methods",
            by_method(study, arch, *ahead, "energy"),
            METHODS_NEEDED,
            lambda d: reaches(d, 0.0),
        ),
        counted(
            f"{label} against “{control}”: accuracy on shifted backgrounds not worse",
            [difference(study, arch, *ahead, SHIFTED)],
            1,
            not_worse,
        ),
    ]
    return result


def reaches(part: Difference, mark: float) -> str:
    """Whether the gain reaches the mark (exceeds it, for 0) with an interval that excludes 0."""
    if part.n < 2:
        return NOT_DECIDABLE
    gain, nearest_to_worse = part.gain
    if not (gain >= mark - _ROUNDING if mark else gain > 0):
        return NOT_MET
    return MET if nearest_to_worse > 0 else NOT_DECIDABLE


def not_worse(part: Difference) -> str:
    """Whether the interval does not exclude 0 on the worse side."""
    if part.n < 2:
        return NOT_DECIDABLE
    return NOT_MET if part.effect == "worse" else MET


def at_least(needed: int, each: list[str]) -> str:
    """Of several verdicts: met if enough are, not met if the undecided ones could not make enough."""
    if each.count(MET) >= needed:
        return MET
    return NOT_DECIDABLE if each.count(MET) + each.count(NOT_DECIDABLE) >= needed else NOT_MET


def summary_quantities(study: Study, arch: str) -> list[Quantity]:
    """What a variant is summed up by: accuracies, and the mean over methods of every metric."""
    means = [q for q in study.quantities(arch) if q.method == study.protocol.mean and q.kind.direction]
    return [IN_DISTRIBUTION, SHIFTED, *means]
