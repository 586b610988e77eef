"""The page of a diagnosis: verdict, pictures, every number with its interval, and what was left out."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from sib_fast.lab.page import Cell, Table, data_url, render
from sib_fast.lab.shortcut.numbers import DRAWS, FEWEST_CLASSES, Estimate
from sib_fast.lab.shortcut.pictures import Strip
from sib_fast.lab.shortcut.verdict import LEANS, NO_SIGN, SMALL_GAP, percent, points
from sib_fast.lab.shortcut.versions import MIXED_RAND, ONLY_BG_T, VERSIONS, WITH_OBJECT

if TYPE_CHECKING:
    from sib_fast.lab.shortcut.run import Diagnosis

_SHOWN_CLASSES = 12
_SHOWN_LEFT_OUT = 40

DEFINITIONS = {
    "Object and background": (
        "What the masks say. A version with the object pasted has its mask's pixels and nothing else of its image. "
        "Backgrounds are those of the other tested images, with their own object's box filled by the largest rectangle of "
        "background beside it, continued by reflection: no other object stands behind the pasted one."
    ),
    "Mixed-Rand": (
        "The class of the background is drawn first, every class alike and the image's own among them, then one of its images. "
        "With K classes a background is of the image's own class once in K."
    ),
    "BG-Gap": (
        "Mixed-Same − Mixed-Rand: right answers that are lost when the background no longer goes with the class. Both are "
        "pasted, so what pasting does to a network is in both."
    ),
    "Worst of k": "An object counts as recognised if it is on every one of k random backgrounds (the challenge's).",
    "Moved": "Total variation between the softmax on this version and on the original: 0 for the same, 1 for nothing in common.",
    "Changed": "Share of images whose answer is not the one given to the original.",
    "Energy inside": (
        "Share of an explanation's weight that lies inside the mask, for the network's own answer. A constant map has the "
        "object's share of the image; “usual place” is the mean mask of the other images: a map that only knows where "
        "objects tend to be."
    ),
    "Intervals": (
        f"95 %, percentile bootstrap with {DRAWS} draws of images; differences are taken image by image and drawn together. "
        "They speak of other images of these classes. “Over classes” draws classes with all their images instead, and is "
        f"given from {FEWEST_CLASSES} classes on: where classes are few, or differ, it is the wider and more careful one. "
        "Images that share a background are treated as independent. Not adjusted for the number of comparisons."
    ),
    "Source": (
        "Xiao, Engstrom, Ilyas, Madry: Noise or Signal: The Role of Image Backgrounds in Object Recognition (ICLR 2021), and "
        "the Backgrounds Challenge. There on ImageNet-9 with its masks; here on your images, so figures are not comparable "
        "with theirs."
    ),
}
_MEASURES = {
    "gap": "BG-Gap: Mixed-Same − Mixed-Rand",
    "loss": "Original − Mixed-Rand",
    "paste": "Original − Mixed-Same: the pasting itself",
    "known": "Original − always one class",
    "background_known": "Only-BG-T − always one class",
}


def html(diagnosis: Diagnosis) -> str:
    """The page; loads nothing."""
    verdict = diagnosis.verdict
    return render(
        "shortcut/report.html.j2",
        d=diagnosis,
        headline=_unbroken(verdict.headline),
        sentences=[_unbroken(sentence) for sentence in verdict.sentences],
        advice=verdict.advice,
        tone={NO_SIGN: "better", LEANS: "worse"}.get(verdict.kind, ""),
        versions=_versions(diagnosis),
        measures=_measures(diagnosis),
        energy=_energy(diagnosis),
        classes=_classes(diagnosis, _SHOWN_CLASSES),
        all_classes=_classes(diagnosis, None) if len(diagnosis.per_class) > _SHOWN_CLASSES else None,
        example=_strip(diagnosis.example),
        worst=[_strip(strip) for strip in diagnosis.worst],
        meanings=VERSIONS,
        tested=_tested(diagnosis),
        left_out=diagnosis.left_out[:_SHOWN_LEFT_OUT],
        more_left_out=max(0, len(diagnosis.left_out) - _SHOWN_LEFT_OUT),
        settings={name: _text(value) for name, value in diagnosis.settings.items()},
        environment={name: _text(value) for name, value in diagnosis.environment.items()},
        definitions=DEFINITIONS,
    )


def _unbroken(sentence: str) -> str:
    return sentence.replace(" %", "\u00a0%").replace(" points", "\u00a0points")


def lines(diagnosis: Diagnosis) -> list[str]:
    """The same for a console, without tables."""
    verdict = diagnosis.verdict
    return [verdict.headline, *(f"  · {s}" for s in verdict.sentences), "What to do", *(f"  · {s}" for s in verdict.advice)]


def _share(estimate: Estimate) -> Cell:
    if not estimate.n:
        return Cell("–")
    return Cell(f"{100 * estimate.mean:.1f} %" + _interval(estimate.low, estimate.high))


def _interval(low: float, high: float) -> str:
    return "" if math.isnan(low) else f" [{100 * low:.1f}, {100 * high:.1f}]".replace("-", "−")


def _points(estimate: Estimate, *, more_is: str = "") -> Cell:
    """more_is: the tone of a difference whose interval lies above 0; below 0 it has the other one."""
    if not estimate.n:
        return Cell("–")
    other = {"better": "worse", "worse": "better", "": ""}[more_is]
    tone = more_is if estimate.low > 0 else other if estimate.high < 0 else ""
    return Cell(f"{100 * estimate.mean:+.1f}".replace("-", "−") + _interval(estimate.low, estimate.high), tone)


def _versions(d: Diagnosis) -> Table:
    rows = []
    for version in VERSIONS:
        accuracy = d.accuracy[version]
        truth = d.truth[version]
        rows.append(
            [
                Cell(version, "head"),
                _share(accuracy),
                Cell("–" if not truth.n else f"{truth.mean:.2f}"),
                Cell("") if version == "Original" else Cell("–" if not accuracy.n else f"{d.moved[version].mean:.2f}"),
                Cell("") if version == "Original" else _share(d.flips[version]),
                Cell(str(accuracy.n)),
            ]
        )
        if version == MIXED_RAND:
            worst = d.measures["worst"]
            name = f"worst of {d.settings['backgrounds_each']} Mixed-Rand"
            rows.append([Cell(name, "head"), _share(worst), Cell(""), Cell(""), Cell(""), Cell(str(worst.n))])
    note = (
        f"Always answering “{d.always}” would be right in {percent(d.guessing)}. In a version with an object "
        f"({', '.join(WITH_OBJECT)}) a right answer is good; in one without, it was read from the background. Right answers "
        f"under {ONLY_BG_T} above that of always one class mean that the network knows the backgrounds."
    )
    header = ("version", "right answers [95 %]", "probability of the class", "moved", "changed [95 %]", "images")
    return Table("Right answers by version", header, rows, note)


def _measures(d: Diagnosis) -> Table:
    rows = []
    for name, title in _MEASURES.items():
        e = d.measures[name]
        over = "–" if math.isnan(e.class_low) else f"[{100 * e.class_low:.1f}, {100 * e.class_high:.1f}]".replace("-", "−")
        tone = {"gap": "worse", "loss": "worse", "paste": "worse", "known": "better", "background_known": "worse"}[name]
        rows.append([Cell(title, "head"), _points(e, more_is=tone), Cell(over), Cell(str(e.n))])
    flips, moved = d.measures["between_flips"], d.measures["between_moved"]
    if flips.n:
        rows.append([Cell("Two random backgrounds: answer changes, %", "head"), _share(flips), Cell("–"), Cell(str(flips.n))])
        rows.append([Cell("Two random backgrounds: moved, %", "head"), _share(moved), Cell("–"), Cell(str(moved.n))])
    note = (
        f"In points of accuracy, paired image by image. The verdict rests on the first row: above 0 the network leans; below "
        f"{points(SMALL_GAP)} with its whole interval, there is no sign of it; otherwise it is not decided."
    )
    return Table("What the background is worth", ("difference", "points [95 %]", "over classes", "images"), rows, note)


def _energy(d: Diagnosis) -> Table | None:
    if not d.energy:
        return None
    rows = [
        [Cell("a constant map", "head"), _share(d.constant), Cell(""), Cell(""), Cell(str(d.constant.n))],
        [Cell("objects' usual place", "head"), _share(d.place), Cell(""), Cell(""), Cell(str(d.place.n))],
    ]
    for method, e in d.energy.items():
        name = Cell(method.replace("_", " "), "head")
        if e.reason:
            rows.append([name, Cell("not for this network"), Cell(""), Cell(""), Cell("0")])
        else:
            above = _points(e.above_constant, more_is="better")
            rows.append([name, _share(e.share), above, _points(e.above_place, more_is="better"), Cell(str(e.share.n))])
    named: dict[str, list[str]] = {}
    for method, e in d.energy.items():
        named.setdefault(e.reason, []).append(method.replace("_", " "))
    reasons = [f"{', '.join(methods)}: {reason}." for reason, methods in named.items() if reason]
    note = " ".join(["Points above and below are paired. An image whose map is zero everywhere counts in no row.", *reasons])
    header = ("method", "inside the mask [95 %]", "beside a constant map", "beside the usual place", "images")
    return Table("Where explanations put their weight", header, rows, note)


def _classes(d: Diagnosis, most: int | None) -> Table:
    ordered = sorted(d.per_class, key=lambda c: (math.isnan(c.gap), -c.gap if not math.isnan(c.gap) else 0, c.name))
    rows = [
        [
            Cell(c.name, "head"),
            *(Cell("–" if math.isnan(v) else f"{100 * v:.0f} %") for v in (c.original, c.mixed_same, c.mixed_rand)),
            Cell("–" if math.isnan(c.gap) else f"{100 * c.gap:+.0f}".replace("-", "−")),
            Cell("–" if math.isnan(c.worst) else f"{100 * c.worst:.0f} %"),
            Cell(c.taken_for or "–"),
            Cell(str(c.images)),
        ]
        for c in ordered[:most]
    ]
    worst = f"worst of {d.settings['backgrounds_each']}"
    header = ("class", "Original", "Mixed-Same", "Mixed-Rand", "BG-Gap, points", worst, "mostly taken for", "images")
    title = (
        "By class, the greatest gap first"
        if most is None or len(ordered) <= most
        else f"The {most} classes with the greatest gap"
    )
    return Table(
        title,
        header,
        rows,
        "No intervals: with few images of a class a gap of its own says little; the order is a hint where to look.",
    )


def _strip(strip: Strip) -> dict[str, Any]:
    cells = [{"url": data_url("jpeg", c.jpeg), "title": c.title, "said": c.said, "right": c.right} for c in strip.cells]
    return {"name": strip.name, "label": strip.label, "cells": cells}


def _tested(d: Diagnosis) -> list[str]:
    count, asked = d.settings["images"], d.settings["images asked for"]
    said = [
        f"{count} images of {len(d.per_class)} classes, {' × '.join(map(str, d.settings['image_size'][::-1]))} pixels"
        f"{'' if count == asked else f' ({asked} were asked for: there are no more)'}; "
        f"{'boxes' if d.mask_kind == 'box' else 'masks'} cover {percent(d.area)} of an image on average.",
        f"What the logits mean was found {d.class_map}.",
    ]
    if d.without_background:
        said.append(
            f"{d.without_background} images have no rectangle of background to fill the object's place with: they get "
            "backgrounds and give none."
        )
    if d.outlined:
        said.append(
            f"In {d.outlined} images the object's box leaves no background: there the outline itself was filled, and its "
            "shape may still be seen in the backgrounds that they give."
        )
    if d.left_out:
        said.append(f"{len(d.left_out)} images were left out, for the reasons below.")
    return said


def _text(value: Any) -> str:
    if isinstance(value, (list, tuple)):
        return ", ".join(map(str, value))
    if isinstance(value, dict):
        return ", ".join(f"{k} {_text(v)}" for k, v in value.items())
    return "–" if value is None else str(value)
