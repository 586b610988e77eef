"""Settings chosen on seeds that are never reported: the rule, and the table it looks at.

python -m sib_fast.lab.study.selection runs/evidence-selection/selection [--csv FILE]
"""

from __future__ import annotations

import argparse
import csv
import io
import math
import statistics
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from sib_fast.lab.results import write_atomically
from sib_fast.lab.study.records import IN_DISTRIBUTION, SHIFTED, Quantity, Study, explanation, load_study

ACCURACY_MARGIN = 0.01
"""By this much may a choice's mean shifted accuracy lie below the best of its group."""
ENERGY_MARGIN = 0.01
"""By this much must another choice's mean energy exceed the default's to replace it."""


@dataclass(frozen=True)
class Choice:
    """A group of variants that differ in one setting, and which of them the rule takes.

    Attributes:
        candidates: name -> (shifted accuracy, energy), means over the architectures and seeds that all of the group have.
        default: the candidate without the setting, None for a group that has none.
    """

    group: str
    candidates: dict[str, tuple[float, float]]
    default: str | None
    chosen: str


def choose(candidates: dict[str, tuple[float, float]], default: str | None) -> str:
    """The candidate of the highest energy among those whose accuracy is near the best; the default, unless clearly behind."""
    best = max(accuracy for accuracy, _ in candidates.values())
    near = {name: energy for name, (accuracy, energy) in candidates.items() if accuracy >= best - ACCURACY_MARGIN}
    chosen = max(near, key=lambda name: near[name])
    return default if default in near and near[default] >= near[chosen] - ENERGY_MARGIN else chosen


def choices(study: Study) -> list[Choice]:
    """One per variant and setting that was varied."""
    groups: dict[tuple[str, tuple[str, ...]], list[str]] = {}
    for variant in study.variants:
        name, _, overrides = variant.partition(":")
        if overrides:
            groups.setdefault((name, tuple(pair.partition("=")[0] for pair in overrides.split(","))), []).append(variant)
    found = []
    for (name, settings), members in groups.items():
        default = name if name in study.variants else None
        members = [*members, *([default] if default else [])]
        means = _means(study, members)
        if means:
            found.append(Choice(f"{name}: {', '.join(settings)}", means, default, choose(means, default)))
    return found


def _means(study: Study, members: list[str]) -> dict[str, tuple[float, float]]:
    """Over the networks of which every member has one of the same architecture and seed; nothing where there are none."""
    quantities = study.protocol.primary
    values = {m: {q: _by_network(study, m, q) for q in quantities} for m in members}
    shared = set.intersection(*(set(each[q]) for each in values.values() for q in quantities))
    if not shared:
        return {}
    return {m: tuple(statistics.fmean(each[q][key] for key in shared) for q in quantities) for m, each in values.items()}


def _by_network(study: Study, variant: str, quantity: Quantity) -> dict[tuple[str, int], float]:
    return {(arch, s): v for arch in study.architectures for s, v in study.values(arch, variant, quantity).items()}


def kept_of_best_gain(study: Study, name: str, quantity: Quantity) -> dict[str, float]:
    """Of the best weight's gain over plain training, what each weight of a variant keeps."""
    members = [v for v in study.variants if v == name or (v.startswith(f"{name}:weight=") and "," not in v)]
    means = _means(study, [*members, study.baseline])
    if not means:
        return {}
    index = study.protocol.primary.index(quantity)
    gains = {m: means[m][index] - means[study.baseline][index] for m in members}
    best = max(gains.values())
    return {m: gain / best if best > 0 else math.nan for m, gain in gains.items()}


def table(study: Study) -> str:
    """A row per network, for a file that is published with the results."""
    quantities = [SHIFTED, IN_DISTRIBUTION, *(explanation(m, "energy") for m in (study.protocol.mean, *study.protocol.methods))]
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    names = [q.name if q.name != "explanation" else f"{q.method}_energy" for q in quantities]
    writer.writerow(("arch", "variant", "seed", "image_size", *names, "commit"))
    for n in study.networks:
        writer.writerow((*n.key, study.settings["image_size"], *(round(n.values[q], 6) for q in quantities), n.commit))
    return text.getvalue()


def lines(study: Study) -> Iterable[str]:
    for choice in choices(study):
        yield choice.group
        for name, (accuracy, energy) in choice.candidates.items():
            yield f"  {'→' if name == choice.chosen else ' '} {accuracy:.4f} shifted, {energy:.4f} energy: {name}"
    for name in ("area", "share"):
        for quantity in study.protocol.primary:
            kept = kept_of_best_gain(study, name, quantity)
            if kept:
                yield f"{name}, kept of the best gain in {quantity.label}: " + ", ".join(f"{m} {k:.2f}" for m, k in kept.items())


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--csv", type=Path)
    args = parser.parse_args()
    found = load_study(args.folder)
    print("\n".join(lines(found)))
    if args.csv is not None:
        write_atomically(args.csv, table(found).encode())
