"""What the numbers come to, in plain sentences: does the network lean on the background, how sure, and what to do."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from sib_fast.lab.shortcut.numbers import Estimate
from sib_fast.lab.shortcut.versions import MIXED_RAND, MIXED_SAME, ONLY_BG_T, ORIGINAL

LEANS, NO_SIGN, UNDECIDED, KNOWS_NOTHING = "leans on the background", "no sign of it", "undecided", "cannot be judged"
SMALL_GAP = 0.05  # a BG-Gap below it is called none: the least of ImageNet's usual networks in the paper's table is 0.058
_STRONG, _CLEAR = 0.25, 0.10  # of the accuracy on a background of the right class, lost on one of a random class
_UNSTEADY = 0.10  # answers that change from one foreign background to another


@dataclass(frozen=True)
class Verdict:
    """kind: LEANS, NO_SIGN, UNDECIDED or KNOWS_NOTHING. headline: the answer. sentences: what it rests on. advice: what to do."""

    kind: str
    headline: str
    sentences: tuple[str, ...]
    advice: tuple[str, ...]


@dataclass(frozen=True)
class Facts:
    """What a verdict is made of; accuracy and measures as `Diagnosis` has them.

    Attributes:
        guessing: the accuracy of answering `always`, the commonest class.
        one_answer: the answer, where the network gives the same one to every image in every version.
        boxes: the masks are boxes.
        energy: by method, what its maps have inside the masks beyond a constant map.
    """

    accuracy: Mapping[str, Estimate]
    measures: Mapping[str, Estimate]
    guessing: float
    always: str
    one_answer: str | None
    backgrounds_each: int
    boxes: bool
    energy: Mapping[str, Estimate]


def judge(facts: Facts) -> Verdict:
    kind = _kind(facts)
    headline = {
        LEANS: _leaning,
        NO_SIGN: _no_sign,
        UNDECIDED: _undecided,
        KNOWS_NOTHING: _knows_nothing,
    }[kind](facts)
    sentences = _sentences(facts) if facts.one_answer is None else []
    return Verdict(kind, headline, tuple(sentences), tuple(advice(kind, facts)))


def _kind(facts: Facts) -> str:
    gap = facts.measures["gap"]
    # not "> 0" of an interval that is one point: of two images that are both right nothing follows
    if facts.one_answer is not None or not _surely_positive(facts.measures["known"]):
        return KNOWS_NOTHING
    if gap.n < 2:
        loss = _from_original(facts)
        return NO_SIGN if loss is not None and loss.at_most < SMALL_GAP else UNDECIDED
    if _surely_positive(gap):
        return LEANS
    return NO_SIGN if gap.at_most < SMALL_GAP else UNDECIDED


def _surely_positive(estimate: Estimate) -> bool:
    return estimate.n > 1 and estimate.low > 0


def _from_original(facts: Facts) -> Estimate | None:
    """Original − Mixed-Rand, where there is no Mixed-Same: the loss to the pasting is in it."""
    loss = facts.measures["loss"]
    return loss if loss.n > 1 else None


# ---- the answer ---------------------------------------------------------------------------------------------------------


def _gap_words(facts: Facts) -> str:
    gap, same, rand = facts.measures["gap"], facts.accuracy[MIXED_SAME], facts.accuracy[MIXED_RAND]
    words = (
        f"with the background of another image of its class it is right in {percent(same.mean)}, with one of a random class in "
        f"{percent(rand.mean)}: a BG-Gap of {points(gap.mean)} ({interval(gap)}, {gap.n} images)"
    )
    if not math.isnan(gap.class_low):
        words += f"; drawn over classes, {_range(gap.class_low, gap.class_high, points)}"
    return words


def _leaning(facts: Facts) -> str:
    gap, same = facts.measures["gap"], facts.accuracy[MIXED_SAME]
    part = gap.mean / same.mean if same.mean > 0 else 1.0
    much = "strongly " if part >= _STRONG else "" if part >= _CLEAR else "a little "
    return f"Yes, this network leans {much}on the background: {_gap_words(facts)}."


def _no_sign(facts: Facts) -> str:
    gap = facts.measures["gap"]
    if gap.n < 2:
        loss = _from_original(facts)
        assert loss is not None
        return (
            "No sign that this network leans on the background: on the background of a random class it loses "
            f"{points(loss.mean)} ({interval(loss)}) against the original images."
        )
    return (
        f"No sign that this network leans on the class of the background: {_gap_words(facts)}. A gap above "
        f"{points(gap.at_most)} can be ruled out."
    )


def _undecided(facts: Facts) -> str:
    gap = facts.measures["gap"]
    if gap.n < 2:
        loss = _from_original(facts)
        seen = "" if loss is None else (
            f" On random backgrounds it loses {points(loss.mean)} ({interval(loss)}), but pasting alone may cost as much."
        )  # fmt: skip
        return (
            "Not decided: a BG-Gap needs two images of a class whose backgrounds can be exchanged, and "
            f"{'no image has' if gap.n == 0 else 'one image alone has'} such a partner.{seen}"
        )
    # the interval shrinks with the root of the number of images
    needed = gap.n * (max(gap.high, gap.at_most) - gap.mean) ** 2 / (SMALL_GAP / 2) ** 2
    return (
        f"Not decided by {gap.n} images: {_gap_words(facts)}. About {_rounded_up(max(needed, 2 * gap.n))} images would tell a "
        f"gap of {points(SMALL_GAP)} from none."
    )


def _knows_nothing(facts: Facts) -> str:
    if facts.one_answer is not None:
        return (
            f"This network cannot be judged: it answers “{facts.one_answer}” to every image in every version, so there is "
            "nothing that it could be leaning on."
        )
    return (
        f"This network cannot be judged on these images: as they are, it is right in {percent(facts.accuracy[ORIGINAL].mean)} "
        f"({interval(facts.accuracy[ORIGINAL], percent)}), which is not surely more than always answering “{facts.always}” "
        f"({percent(facts.guessing)})."
    )


# ---- what else was seen -------------------------------------------------------------------------------------------------


def _sentences(facts: Facts) -> list[str]:
    said = []
    alone, known = facts.accuracy[ONLY_BG_T], facts.measures["background_known"]
    if alone.n > 1:
        what = (
            "these backgrounds tell the class, and the network has learned it"
            if _surely_positive(known)
            else "no more than always answering one class would be"
        )
        said.append(
            f"From the background alone, the object taken out, it is right in {percent(alone.mean)} "
            f"({interval(alone, percent)}; always “{facts.always}”: {percent(facts.guessing)}): {what}."
        )
    worst, rand = facts.measures["worst"], facts.accuracy[MIXED_RAND]
    if worst.n:
        said.append(
            f"Shown on {facts.backgrounds_each} other backgrounds each, {percent(worst.mean)} of the objects are recognised on "
            f"every one of them ({interval(worst, percent)}); a single one leaves {percent(rand.mean)}."
        )
    flips = facts.measures["between_flips"]
    if flips.n:
        unsteady = flips.mean >= _UNSTEADY and not _surely_positive(facts.measures["gap"])
        more = ": the background matters, though here it does not give the class away" if unsteady else ""
        said.append(
            f"Exchanging one foreign background for another changes the answer in {percent(flips.mean)} of the cases "
            f"({interval(flips, percent)}){more}."
        )
    paste = facts.measures["paste"]
    if paste.n > 1:
        costs = "costs" if paste.low > 0 else "is not sure to cost anything:"
        said.append(
            f"The pasting itself, onto a background of the right class, {costs} {points(paste.mean)} ({interval(paste)}) "
            "against the original images; the BG-Gap is measured beyond it."
        )
    if facts.energy:
        above = [name for name, e in facts.energy.items() if e.low > 0]
        below = [name for name, e in facts.energy.items() if e.high < 0]
        said.append(
            f"Of {len(facts.energy)} explanation methods {len(above)} put surely more of their weight on the object than a "
            f"map that is the same everywhere, {len(below)} surely less. Explanations are a second look: a network can look "
            "at the object and be misled by the background, so the accuracies above count."
        )
    if facts.boxes:
        said.append(
            "The masks are boxes: their corners are background that stays with the object, so every gap here is smaller than "
            "with outlines."
        )
    return said


# ---- what to do ---------------------------------------------------------------------------------------------------------


def advice(kind: str, facts: Facts) -> list[str]:
    """What a practitioner does next, whatever the network was trained with."""
    if kind == KNOWS_NOTHING:
        return [
            "Check that the classes are in the network's order (“What the logits mean” on the page), and that image size and "
            "normalisation are those of its training: all three make a good network look like this one.",
            "If the numbers are right, the network has to be trained before it can be asked what it looks at. If it does "
            "well on its own images, it may rest on something that these do not have: test it on images like those of its "
            "training.",
        ]
    if kind == UNDECIDED:
        return ["Test more images, with two or more of every class; the command is the same."]
    if kind == NO_SIGN:
        said = [
            "Nothing has to be done about backgrounds of these kinds. The test sees only what the images have: if their "
            "backgrounds do not go with the classes as they did in training, or the network will meet others, add such images "
            "and test again."
        ]
        if facts.measures["between_flips"].mean >= _UNSTEADY:
            said.append(
                "Where its answer must not change with the surroundings, exchange backgrounds in training (sib-fast train "
                "--random-backgrounds 0.5)."
            )
        return said
    return [
        "Look at the worst images on the page: do they show the situations in which the network will be used? If backgrounds "
        "always go with the classes there too, leaning on them may be what you want.",
        "Report accuracy on exchanged backgrounds beside the usual one: a test set that shares the training set's "
        "backgrounds does not show this.",
        "The direct remedy is data: images of every class on the backgrounds of the others. With masks for a part of the "
        "training images you can make them, by pasting objects onto the backgrounds of other images while training (sib-fast "
        "train --random-backgrounds 0.5 does); this removes the rule that the network has learned.",
        "Without masks, or beside it, train so that the evidence lies on the object (S-IB, or masks in the loss), and test again "
        "with the same command: believe the BG-Gap, not the prettier maps.",
    ]


# ---- numbers as words ---------------------------------------------------------------------------------------------------


def percent(value: float) -> str:
    return "–" if math.isnan(value) else f"{100 * value:.0f} %"


def points(value: float) -> str:
    """Of a difference of shares."""
    if math.isnan(value):
        return "–"
    rounded = round(100 * value, 1) + 0.0
    number = f"{rounded:.0f}" if abs(rounded) >= 10 or rounded == int(rounded) else f"{rounded:.1f}"
    return f"{number.replace('-', '−')} {'point' if abs(rounded) == 1 else 'points'}"


def interval(estimate: Estimate, words: Callable[[float], str] = points) -> str:
    """Its 95 % interval, or that there is none to speak of."""
    if math.isnan(estimate.low):
        return "one image"
    if estimate.low == estimate.high:
        return f"all {estimate.n} images alike"
    return f"95 % interval {_range(estimate.low, estimate.high, words)}"


def _range(low: float, high: float, words: Callable[[float], str]) -> str:
    """The unit once."""
    return f"{words(low).rpartition(' ')[0]} to {words(high)}"


def _rounded_up(number: float) -> int:
    """To one leading digit: an order, no figure to rely on."""
    step = 10 ** max(0, math.floor(math.log10(max(number, 1))))
    return math.ceil(number / step) * step
