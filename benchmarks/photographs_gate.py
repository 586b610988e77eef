"""The gate before a study on photographs: does any term on input gradients or evidence maps gain on shifted backgrounds?

    python tools/photographs.py                                             # the data, once
    python -m benchmarks.photographs_gate run --root ~/.cache/sib_fast/photographs --out runs/gate
    python -m benchmarks.photographs_gate run --out runs/gate --only plain --root …   # some of them
    python -m benchmarks.photographs_gate report --out runs/gate            # tables and the rules' verdicts, at any time

One network after the other in the order of docs/photographs/gate.md, one JSON file each, written when it is done: killed at any
moment, `run` goes on with the network that was running. Several processes may work on one folder.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.photographs_training import METHODS, SETTINGS, Records, Setting, Variant, load, parse, run, run_network
from sib_fast.evidence import FORMS

SEEDS = (0, 1)
MOST_LOST = 0.03  # in distribution


def first_variants(setting: Setting) -> list[Variant]:
    """What runs in any case, in this order: the frame first, then forms with masks, then those without."""
    variants = [Variant("plain"), Variant("backgrounds", mask="true")]
    for at in setting.maps:
        variants += [Variant("share", at, form, 1.0, "true") for form in forms_at(at)]
    for at in setting.maps:
        # without an annotation one form is enough to see whether there is anything: the one that is safe at this map
        variants += [Variant("share", at, "rectified" if at == "last" else "absolute", 1.0, "own")]
        variants += [Variant("area", at, "rectified" if at == "last" else "absolute", 1.0)]
    return variants + [Variant("sib", weight=weight) for weight in setting.lambdas]


def forms_at(at: str) -> tuple[str, ...]:
    """Before an average pooling and a linear layer R is the same in every cell, so that its square has no place to be."""
    return tuple(form for form in FORMS if not (form == "squared" and at == "last"))


def further_variants(variant: Variant) -> list[Variant]:
    """The higher weights of a form with true masks."""
    if variant.term != "share" or variant.mask != "true" or variant.weight != 1.0:
        return []
    return [Variant(variant.term, variant.at, variant.evidence, weight, variant.mask) for weight in (3.0, 10.0)]


def mean(records: Records, name: str, variant: str, *keys: str) -> float:
    """Over the selection seeds; NaN until all of them are there."""
    total = 0.0
    for seed in SEEDS:
        value: Any = records.get((name, variant, seed))
        for key in keys:
            value = None if value is None else value.get(key)
        total += math.nan if value is None else value
    return total / len(SEEDS)


def gain(records: Records, name: str, variant: str, *keys: str) -> float:
    """Of the mean, over plain training."""
    return mean(records, name, variant, *keys) - mean(records, name, "plain", *keys)


def variants_of(records: Records, name: str) -> list[Variant]:
    """Those with a record, in the order of their names."""
    options = {variant: record["options"] for (setting, variant, _), record in records.items() if setting == name}
    return [Variant(**options[variant]) for variant in sorted(options)]


def choose(records: Records, name: str, variants: list[Variant]) -> Variant:
    """Rule 3: the best shifted accuracy of those that cost at most 0.03 in distribution; where all cost more, of all.

    Errors:  ValueError where one of them has not run on every selection seed.
    """
    shifted = {variant: gain(records, name, variant.name, "accuracy", "shifted") for variant in variants}
    missing = [variant.name for variant, value in shifted.items() if math.isnan(value)]
    if missing or not variants:
        raise ValueError(f"photographs: every form must have run on the seeds {SEEDS} before one is chosen, missing: {missing}")
    cheap = [v for v in variants if gain(records, name, v.name, "accuracy", "correlated") >= -MOST_LOST]
    return max(cheap or variants, key=lambda variant: shifted[variant])


def worth_more(records: Records, name: str, variant: Variant) -> bool:
    """Whether a form's higher weights run: not where weight 1 already costs 0.1 of the accuracy in distribution."""
    return gain(records, name, variant.name, "accuracy", "correlated") > -0.1


def plan(out: Path) -> Iterator[tuple[str, Variant, int]]:
    """The networks in their order, as far as what is done says which there are."""
    for name, setting in SETTINGS.items():
        for variant in first_variants(setting):
            for seed in SEEDS:
                yield name, variant, seed
    for name, setting in SETTINGS.items():
        for first in first_variants(setting):
            for variant in further_variants(first):
                for seed in SEEDS:
                    if worth_more(load(out), name, first):
                        yield name, variant, seed


def tried(records: Records) -> list[str]:
    """The settings that have records."""
    return [name for name in SETTINGS if any(setting == name for setting, *_ in records)]


def verdicts(records: Records) -> list[str]:
    """The stop rules of docs/photographs/gate.md on what is there."""
    lines = []
    for name in tried(records):
        variants = variants_of(records, name)

        def greatest(values: dict[str, float]) -> tuple[str, float]:
            known = {v: value for v, value in values.items() if not math.isnan(value)}
            return max(known.items(), key=lambda item: item[1]) if known else ("none yet", math.nan)

        free = [v.name for v in variants if v.mask != "true" and v.term != "plain"]
        best, value = greatest({v: gain(records, name, v, "accuracy", "shifted") for v in free})
        lines.append(f"{name}: without masks the best shifted gain is {value:+.3f} ({best})")
        masked = [v.name for v in variants if v.mask == "true" and v.term == "share"]
        best, value = greatest({v: gain(records, name, v, "accuracy", "shifted") for v in masked})
        lines.append(f"{name}: with true masks the best shifted gain is {value:+.3f} ({best})")
        energies = {v: max(gain(records, name, v, "energy", m, "mean") for m in METHODS) for v in masked}
        best, value = greatest(energies)
        lines.append(f"{name}: with true masks the best gain of an energy that no term optimises is {value:+.3f} ({best})")
    return lines


def report(records: Records) -> str:
    """Tables and verdicts as Markdown, of the networks that are there; the seeds side by side."""
    lines = []
    for name in tried(records):
        maps = SETTINGS[name].maps
        columns = ["uniform", "mean_mask", *METHODS, *(f"{c}_{m}" for m in maps for c in ("mean_mask", "cam"))]
        shown = [column.replace("_", " ") for column in columns]
        lines.append(f"| {name} | in distribution | shifted | worst class | grey | {' | '.join(shown)} | CPU s |")
        lines.append("| --- |" + " ---: |" * (len(columns) + 5))
        for variant in sorted((v.name for v in variants_of(records, name)), key=lambda v: (v != "plain", v)):
            found = [r for (n, v, _), r in sorted(records.items()) if (n, v) == (name, variant)]

            def cell(*keys: str, found: list = found) -> str:
                values = []
                for value in found:
                    for key in keys:
                        value = value[key]
                    values.append(value)
                return " · ".join(f"{v:.0f}" if keys == ("cpu_seconds",) else f"{v:.3f}" for v in values)

            accuracies = [cell("accuracy", f) for f in ("correlated", "shifted")]
            accuracies += [cell("worst_class"), cell("accuracy", "grey")]
            energies = [cell("energy", c, "mean") for c in columns]
            lines.append(f"| {variant} | {' | '.join([*accuracies, *energies])} | {cell('cpu_seconds')} |")
        lines.append("")
    return "\n".join(lines + [f"- {line}" for line in verdicts(records)]) + "\n"


def main(argv: list[str] | None = None) -> int:
    args = parse(__doc__, Path("runs/photographs-gate"), SEEDS, argv)
    if args.command == "report":
        print(report(load(args.out)))
        return 0

    def network(name: str, variant: Variant, seed: int) -> dict[str, Any]:
        return run_network(name, variant, seed, args.root, args.out)

    return run(plan(args.out), args.out, args.only, args.seeds, network)


if __name__ == "__main__":
    sys.exit(main())
