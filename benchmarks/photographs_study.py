"""The study on photographs: what to do about a pretrained network that leans on backgrounds, with masks and without.

    python -m benchmarks.photographs_study run --root ~/.cache/sib_fast/photographs --gate runs/photographs-gate
    python -m benchmarks.photographs_study report --gate runs/photographs-gate

The gate comes before it (benchmarks/photographs_gate.py): it names the forms.

First the weights that the gate did not choose, on its seeds, then the reported networks, a seed after the other, in the order of
docs/photographs/protocol.md. Killed at any moment, `run` goes on with the network that was running; several processes may work
on one folder.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from benchmarks import photographs_gate as gate
from benchmarks.photographs_training import (
    CORRELATION,
    TESTS,
    Records,
    Variant,
    load,
    parse,
    run,
    run_network,
)
from sib_fast.lab.datasets.cutouts import Cutouts
from sib_fast.lab.networks import NetworkSpec
from sib_fast.lab.shortcut import diagnose
from sib_fast.lab.shortcut.numbers import estimates
from sib_fast.lab.shortcut.subject import Subject
from sib_fast.lab.study.statistics import holm

NAME = "lite0"
SEEDS = (10, 11, 12, 13, 14)
EXPLAINED = 120
TENTH = 0.1
MASK_FREE_GAIN = 0.02  # of rule 1
# three each, as the gate's forms have: the share's own, S-IB's own, and around the weight at which an untrained network's penalty
# is its cross entropy
WEIGHTS = {"guidance": (1.0, 3.0, 10.0), "unmasked": (1e3, 1e5, 1e7), "rrr": (5e-3, 5e-2, 5e-1)}
MEASURES = ("gap", "loss", "worst", "known", "background_known")
PRIMARY = (("share-10", "plain"), ("share-10", "guidance-10"), ("share-10", "rrr-10"))
# beside those against plain training: at equal annotation
COMPARISONS = (
    ("share-10", "backgrounds-10"),
    ("share-100", "guidance-100"),
    ("share-100", "rrr-100"),
    ("share-100", "backgrounds-100"),
    ("both-10", "backgrounds-10"),
    ("both-100", "backgrounds-100"),
)


def candidates(term: str) -> list[Variant]:
    """A competitor at every weight that is tried for it."""
    made = {
        "unmasked": Variant("unmasked"),
        "rrr": Variant("rrr", mask="true"),
        "guidance": Variant("guidance", "last", mask="true"),
    }[term]
    return [replace(made, weight=weight) for weight in WEIGHTS[term]]


def without_masks(gate_records: Records) -> bool:
    """Rule 1 of the gate: whether a form without masks gained, so that the study is about those too."""
    free = [v for v in gate.variants_of(gate_records, NAME) if v.mask != "true" and v.term != "plain"]
    return any(gate.gain(gate_records, NAME, v.name, "accuracy", "shifted") >= MASK_FREE_GAIN for v in free)


def searched(gate_records: Records) -> list[str]:
    """The competitors whose weight the gate did not look for."""
    return ["rrr", "guidance", *(["unmasked"] if without_masks(gate_records) else [])]


def ways(gate_records: Records, records: Records) -> dict[str, Variant]:
    """What is compared, in the order of training. Errors: ValueError where gate or selection have not run."""
    tried = gate.variants_of(gate_records, NAME)
    choose, of_gate = gate.choose, [v for v in tried if v.term == "share" and v.mask == "true"]
    share = choose(gate_records, NAME, of_gate)
    guidance, rrr = (choose(gate_records | records, NAME, candidates(term)) for term in ("guidance", "rrr"))
    backgrounds = Variant("backgrounds", mask="true")
    made = {"plain": Variant("plain")}
    if without_masks(gate_records):
        made["free"] = choose(gate_records, NAME, [v for v in tried if v.term == "area" or v.mask == "own"])
        made["sib"] = choose(gate_records, NAME, [v for v in tried if v.term == "sib"])
        made["unmasked"] = choose(gate_records | records, NAME, candidates("unmasked"))
    masked = {"share": share, "backgrounds": backgrounds, "both": replace(share, beside=True), "guidance": guidance, "rrr": rrr}
    for name, variant in masked.items():
        made |= {f"{name}-100": variant, f"{name}-10": replace(variant, annotated=TENTH)}
    return made


def plan(gate_records: Records, out: Path) -> Iterator[tuple[str, Variant, int]]:
    """The networks in their order, as far as what is done says which there are."""
    for term in searched(gate_records):
        for variant in candidates(term):
            for seed in gate.SEEDS:
                yield NAME, variant, seed
    for seed in SEEDS:
        for variant in ways(gate_records, load(out)).values():
            yield NAME, variant, seed


def diagnosis(model: nn.Module, spec: NetworkSpec, seed: int, root: Path) -> dict[str, Any]:
    """The shortcut test on the composites in distribution: their own objects and backgrounds, exchanged."""
    data = Cutouts(root, "test", spec.image_size, size=TESTS, correlation=CORRELATION, seed=seed, split_seed=seed)
    subject = Subject(model, NAME, spec.classes, spec.image_size, spec.mean, spec.std)
    found = diagnose(subject, data, images=TESTS, explained=0, seed=seed)
    measures = {name: found.measures[name] for name in MEASURES}
    return {
        "diagnosis": {
            "verdict": found.verdict.kind,
            "measures": {name: {"mean": e.mean, "low": e.low, "high": e.high} for name, e in measures.items()},
            "accuracy": {version: estimate.mean for version, estimate in found.accuracy.items()},
        }
    }


# ---- what it comes to -----------------------------------------------------------------------------------------------

QUANTITIES: dict[str, tuple[str, ...]] = {
    "in distribution": ("accuracy", "correlated"),
    "shifted": ("accuracy", "shifted"),
    "grey": ("accuracy", "grey"),
    "worst class": ("worst_class",),
    "BG-Gap": ("diagnosis", "measures", "gap", "mean"),
    "Mixed-Rand": ("diagnosis", "accuracy", "Mixed-Rand"),
    "input gradient": ("energy", "gradient", "mean"),
    "integrated gradients": ("energy", "integrated", "mean"),
    "uniform map": ("energy", "uniform", "mean"),
    "mean mask": ("energy", "mean_mask", "mean"),
    "CPU ms a step": ("cpu_seconds",),
}


def value(record: dict[str, Any], quantity: str) -> float:
    found: Any = record
    for key in QUANTITIES[quantity]:
        found = found[key]
    return 1000 * found / record["steps"] if quantity == "CPU ms a step" else found


def differences(ours: list[dict[str, Any]], theirs: list[dict[str, Any]], quantity: str) -> np.ndarray:
    """Of the seeds that both have."""
    by_seed = {record["seed"]: value(record, quantity) for record in theirs}
    return np.array([value(r, quantity) - by_seed[r["seed"]] for r in ours if r["seed"] in by_seed])


def paired(ours: list[dict[str, Any]], theirs: list[dict[str, Any]], quantity: str) -> tuple[float, float, float]:
    """Mean difference over the seeds that both have, and its 95 % t interval; NaN for fewer than two."""
    from scipy.stats import ttest_1samp

    found = differences(ours, theirs, quantity)
    if len(found) < 2:
        return float(found.mean()) if len(found) else np.nan, np.nan, np.nan
    interval = ttest_1samp(found, 0).confidence_interval(0.95)
    return float(found.mean()), float(interval.low), float(interval.high)


def primary(found: dict[str, list[dict[str, Any]]]) -> list[tuple[str, float]]:
    """The primary comparisons with their p values by Holm, NaN for fewer than two seeds."""
    from scipy.stats import ttest_1samp

    pairs = [differences(found[ours], found[theirs], "shifted") for ours, theirs in PRIMARY]
    corrected = holm(float(ttest_1samp(pair, 0).pvalue) if len(pair) > 1 else np.nan for pair in pairs)
    return [(f"{ours} − {theirs}", p) for (ours, theirs), p in zip(PRIMARY, corrected, strict=True)]


def over_objects(ours: list[dict[str, Any]], theirs: list[dict[str, Any]], form: str = "shifted") -> tuple[float, float, float]:
    """Mean difference of right answers, and its 95 % bootstrap interval over objects, each with all its images of all seeds."""
    by_seed = {record["seed"]: record for record in theirs}
    groups, differences = [], []
    for record in ours:
        other = by_seed.get(record["seed"])
        if other is not None:
            groups += record["objects"]
            differences += [int(a) - int(b) for a, b in zip(record["right"][form], other["right"][form], strict=True)]
    if not groups:
        return np.nan, np.nan, np.nan
    units = np.unique(groups, return_inverse=True)[1]
    found = estimates({"difference": np.array(differences, dtype=float)}, units)["difference"]
    return found.mean, found.class_low, found.class_high


def report(gate_records: Records, out: Path) -> int:
    records = load(out)
    compared = ways(gate_records, records)
    found = {
        way: [r for (_, name, seed), r in sorted(records.items()) if name == variant.name and seed in SEEDS]
        for way, variant in compared.items()
    }
    print("| | is | seeds | " + " | ".join(QUANTITIES) + " |")
    print("|---" * (len(QUANTITIES) + 3) + "|")
    for way, variant in compared.items():
        cells = [f"{np.mean([value(r, q) for r in found[way]]):.3f}" if found[way] else "–" for q in QUANTITIES]
        print(f"| {way} | {variant.name} | {len(found[way])} | {' | '.join(cells)} |")
    print("\n| difference | seeds | shifted, over seeds | shifted, over objects | in distribution | worst class | BG-Gap |")
    print("|---" * 7 + "|")
    pairs = [(way, "plain") for way in found if way != "plain"]
    for ours, theirs in pairs + [pair for pair in (*PRIMARY[1:], *COMPARISONS) if set(pair) <= set(found)]:
        both = {r["seed"] for r in found[ours]} & {r["seed"] for r in found[theirs]}
        cells = [paired(found[ours], found[theirs], "shifted"), over_objects(found[ours], found[theirs])]
        cells += [paired(found[ours], found[theirs], q) for q in ("in distribution", "worst class", "BG-Gap")]
        shown = " | ".join(f"{mean:+.3f} ({low:+.3f} to {high:+.3f})" for mean, low, high in cells)
        print(f"| {ours} − {theirs} | {len(both)} | {shown} |")
    print("\nprimary, shifted accuracy, p by Holm: " + ", ".join(f"{name} {p:.2g}" for name, p in primary(found)))
    return 0


def main(argv: list[str] | None = None) -> int:
    args = parse(__doc__, Path("runs/photographs"), (*gate.SEEDS, *SEEDS), argv, gate=True)
    gate_records = load(args.gate)
    if args.command == "report":
        return report(gate_records, args.out)

    def network(name: str, variant: Variant, seed: int) -> dict[str, Any]:
        return run_network(
            name, variant, seed, args.root, args.out, EXPLAINED, lambda model, spec: diagnosis(model, spec, seed, args.root)
        )

    return run(plan(gate_records, args.out), args.out, args.only, args.seeds, network)


if __name__ == "__main__":
    sys.exit(main())
