"""What a study's report says in sentences: what was seen, what a step costs, what is missing."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable

from sib_fast.lab.study.cells import interval, number, seeds_of
from sib_fast.lab.study.records import IN_DISTRIBUTION, METHOD_LABELS, SHIFTED, Quantity, Study, explanation
from sib_fast.lab.study.statistics import ENERGY_MARK, MET, Difference, by_method, counts, difference, judged, reaches
from sib_fast.lab.study.timing import FIXED

_SHOWN_GAPS = 40


def seen(study: Study) -> list[str]:
    """Three sentences for a reader who knows no term of the trade: the evidence, the accuracy, and what else was asked.

    What was not run is not mentioned.
    """
    ours, theirs = (study.label(v) for v in (study.headline, study.baseline))
    energy = explanation(study.protocol.mean, "energy")
    found = {}
    for arch in study.reported:
        against = (study.baseline, study.baseline, study.baseline, study.control, study.control)
        quantities = (energy, SHIFTED, IN_DISTRIBUTION, energy, SHIFTED)
        parts = [difference(study, arch, study.headline, v, q) for v, q in zip(against, quantities, strict=True)]
        if all(d.n for d in parts[:3]):
            found[arch] = parts
    if not found:
        return [f"No {ours} and {theirs} network of the same seed have finished: there is nothing to compare yet."]

    def sentence(clauses: dict[str, str]) -> str:
        several = len(found) > 1
        text = "; ".join(f"on the {study.architectures[a]}, {c}" if several else c for a, c in clauses.items())
        return f"{text[:1].upper()}{text[1:]}."

    areas = [area for arch in found for area in study.values(arch, study.headline, Quantity("mask_area")).values()]
    evidence, accuracy, mask = {}, {}, {}
    for arch, parts in found.items():
        (on, on_plain), (other, other_plain), (usual, usual_plain), *control = (_percent(study, d) for d in parts)
        judged = [_judged(d) for d in parts]
        evidence[arch] = f"{on} of the explanations' weight lies on the object with {ours}, {on_plain} with {theirs}: {judged[0]}"
        accuracy[arch] = (
            f"{other} of the images are recognised with {ours}, {other_plain} with {theirs} where the background does not belong "
            f"to the class: {judged[1]}; where it is as in training, {usual} and {usual_plain}: {judged[2]}"
        )
        if all(d.n for d in parts[3:]):
            (on, on_control), (other, other_control) = control
            mask[arch] = (
                f"{on} of the weight lies on the object with {ours}, {on_control} with {study.protocol.without}: {judged[3]}; "
                f"{other} and {other_control} of the images on other backgrounds are recognised: {judged[4]}"
            )
    chance = f" The object covers {_mean_percent(areas)} of an image." if areas else ""
    third = mask or {arch: _by_method(study, arch) for arch in found}
    return [sentence(evidence) + chance, sentence(accuracy), sentence(third)]


def _mean_percent(values: Iterable[float]) -> str:
    return f"{100 * statistics.fmean(values):.0f} %"


def _percent(study: Study, part: Difference) -> list[str]:
    """Both means, over the seeds that both have."""
    both = [study.values(part.arch, variant, part.quantity) for variant in (part.variant, part.against)]
    return [_mean_percent(values[seed] for seed in part.seeds) if part.n else "" for values in both]


def _judged(part: Difference) -> str:
    """What a comparison of shares, more of which is better, says in words, as far as its seeds carry."""
    if part.n == 1:
        return "one pair of networks, which cannot tell an effect from chance"
    if part.effect == "unclear":
        return f"a difference that chance could make, with {part.n} pairs of networks"
    return {"better": "clearly more", "worse": "clearly less"}.get(part.effect, "")


def _by_method(study: Study, arch: str) -> str:
    """Which of the methods moved."""
    names: dict[str, list[str]] = {"better": [], "worse": [], "unclear": []}
    for d in by_method(study, arch, study.headline, study.baseline, "energy"):
        if d.n:
            names[d.effect].append(METHOD_LABELS[d.quantity.method])
    words = {"better": "clearly more on the object for", "worse": "clearly less for", "unclear": "no clear change for"}
    return "by method, " + "; ".join(f"{words[k]} {', '.join(v)}" for k, v in names.items() if v)


def step_cost(study: Study, arch: str) -> str:
    """What an S-IB step takes beside a plain one, and how much of it is there because the network is small."""
    seconds = study.step_seconds[arch]
    plain, ours = seconds["plain"], seconds["prepared"]
    text = f"{ours / plain:.1f} times the time of a plain training step ({1e3 * ours:.0f} ms, {1e3 * plain:.0f} ms)"
    fixed, fixed_plain = (seconds.get(name + FIXED, 0.0) for name in ("prepared", "plain"))
    rest = (ours - fixed) / (plain - fixed_plain) if plain > fixed_plain > 0 else math.inf
    if 0 < rest < ours / plain:
        text += (
            f". {1e3 * fixed:.0f} ms of it, and {1e3 * fixed_plain:.0f} ms of the plain one, are there for two images already: "
            f"the calls, which a network this small cannot hide. What grows with the images costs {rest:.1f} times as much"
        )
    return f"{text}. Larger networks: docs/step.md."


def answer(study: Study) -> list[str]:
    """The same in numbers: where the energy went, what accuracy did, and what the control, where it ran, and the losses say."""
    label, baseline = study.label(study.headline), study.label(study.baseline)
    energy, shifted, inside, control, losses = [], [], [], [], []
    for arch in study.reported:
        name = f"the {study.architectures[arch]}"
        six, *accuracies = (
            difference(study, arch, study.headline, study.baseline, q)
            for q in (explanation(study.protocol.mean, "energy"), SHIFTED, IN_DISTRIBUTION)
        )
        reached = sum(reaches(d, ENERGY_MARK) == MET for d in by_method(study, arch, study.headline, study.baseline, "energy"))
        energy.append(
            f"{_moved(six)} on {name} (by at least {ENERGY_MARK:.2f} for {reached} of the {study.protocol.several.split()[0]})"
        )
        for sentence, part in zip((shifted, inside), accuracies, strict=True):
            sentence.append(f"{_moved(part)} on {name}")
        ahead = [difference(study, arch, study.headline, study.control, q) for q in study.protocol.primary[::-1]]
        if all(d.n for d in ahead):
            control.append(f"energy {interval(ahead[0]).text} and shifted accuracy {interval(ahead[1]).text} on {name}")
        tally = counts(judged(study, arch, study.headline, study.baseline))
        losses.append(f"{tally['better']} are better, {tally['worse']} worse and {tally['unclear']} unclear on {name}")
    if not energy:
        return ["No network has finished yet."]
    against = f"{label} minus “{study.label(study.control)}”: {'; '.join(control)}. " if control else ""
    return [
        f"With {label} instead of {baseline}, energy inside the object (mean of {study.protocol.several}) {'; '.join(energy)}.",
        f"Accuracy on shifted backgrounds {'; '.join(shifted)}. In distribution it {'; '.join(inside)}.",
        f"{against}Of all comparisons with {baseline}, methods by metrics, {'; '.join(losses)}.",
    ]


def _moved(part: Difference) -> str:
    if part.n == 0:
        return "is unknown (no pair of seeds)"
    if part.n == 1:
        return f"changed by {number(part.mean)} (one seed, no interval)"
    verb = {"better": "rose", "worse": "fell", "unclear": "did not change clearly,"}[part.effect]
    by = "by " if part.effect != "unclear" else ""
    return f"{verb} {by}{number(part.mean)} [{number(part.low)}, {number(part.high)}] (n = {part.n})"


def status_lines(study: Study) -> list[str]:
    """What a reader must know before the first number of an unfinished study."""
    lines = []
    if study.status != "complete" or study.missing:
        done = f"{len(study.networks)} of {len(study.planned)} planned" if study.planned else str(len(study.networks))
        lines.append(f"A partial study (status: {study.status}): {done} networks.")
    if study.unplanned:
        lines.append(f"{len(study.unplanned)} results that were not planned are left out.")
    return lines


def gaps(study: Study) -> list[str]:
    """Everything that is missing, undefined or uneven, one line each."""
    lines = []
    by_cell: dict[tuple[str, str], list[int]] = {}
    for arch, variant, seed in study.missing:
        by_cell.setdefault((arch, variant), []).append(seed)
    for (arch, variant), seeds in by_cell.items():
        lines.append(f"Missing: {study.architectures[arch]}, {study.label(variant)}: seeds {seeds_of(seeds)}.")
    for arch, variant, seed in study.unplanned:
        lines.append(f"Left out, not planned: {arch}, {variant}, seed {seed}.")
    undefined: dict[tuple[str, str], dict[str, float]] = {}
    lost = []
    for network in study.networks:
        where = f"{study.architectures[network.arch]}, {study.label(network.variant)}, seed {network.seed}"
        required = [IN_DISTRIBUTION, SHIFTED, *(explanation(m, "energy") for m in study.protocol.methods)]
        names = [q.label for q in required if q not in network.values]
        names += [q.label for q, v in network.values.items() if math.isnan(v) and q.method != study.protocol.mean]
        if names:
            more = f" and {len(names) - 6} more" if len(names) > 6 else ""
            lost.append(f"Without a value: {where}: {', '.join(names[:6])}{more}.")
        for quantity, value in network.values.items():
            if quantity.metric == "undefined" and value > 0:
                each = undefined.setdefault((network.arch, quantity.method), {})
                each[network.variant] = each.get(network.variant, 0) + value
    lines += lost[:_SHOWN_GAPS]
    if len(lost) > _SHOWN_GAPS:
        lines.append(f"… and {len(lost) - _SHOWN_GAPS} more networks without some value.")
    for (arch, method), each in undefined.items():
        where = f"{study.architectures[arch]}, {METHOD_LABELS.get(method, method or 'VJP')}"
        listed = ", ".join(f"{study.label(variant)} {images:.0f}" for variant, images in each.items())
        lines.append(f"Maps left out (zero everywhere, or an empty mask), images over all seeds: {where}: {listed}.")
    for name, what in (("test_images", "test images"), ("explained_images", "explained images"), ("steps", "training steps")):
        values = sorted({n.values[Quantity(name)] for n in study.networks if Quantity(name) in n.values})
        if len(values) > 1:
            lines.append(f"Networks differ in {what}: {', '.join(f'{v:.0f}' for v in values)}.")
    commits = sorted({n.commit for n in study.networks if n.commit})
    if len(commits) > 1:
        lines.append(f"Networks were trained at {len(commits)} commits: {', '.join(c[:12] for c in commits)}.")
    return lines
