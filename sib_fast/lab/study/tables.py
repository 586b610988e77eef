"""The tables of a study's report."""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence

from sib_fast.lab.page import Cell, Table
from sib_fast.lab.study.cells import interval, p_value, seeds_of, setting, spread, summary
from sib_fast.lab.study.measures import CONSTANT
from sib_fast.lab.study.records import IN_DISTRIBUTION, METHOD_LABELS, METRICS, SHIFTED, Quantity, Study, explanation
from sib_fast.lab.study.sentences import step_cost
from sib_fast.lab.study.statistics import (
    LEVEL,
    by_method,
    comparisons,
    counts,
    difference,
    judged,
    primary,
    secondary,
    summary_quantities,
    verdicts,
)
from sib_fast.lab.study.timing import LABELS

_NOTE = (
    "Mean ± standard deviation over seeds; paired difference [95 % CI]. **Bold**: the interval excludes 0 on the better "
    "side; (worse): on the other."
)


def _comparison(
    study: Study, arch: str, title: str, rows: Sequence[tuple[str, Quantity]], note: str = _NOTE, of: str = ""
) -> Table:
    """Rows of quantities; columns: the baseline, the headline variant, the paired difference. of: heading of the first column."""
    header = (of, study.label(study.baseline), study.label(study.headline), "difference [95 % CI]")
    made = []
    for label, quantity in rows:
        spreads = [spread(study, arch, v, quantity) for v in (study.baseline, study.headline)]
        change = interval(difference(study, arch, study.headline, study.baseline, quantity))
        made.append([Cell(label, "head"), *spreads, change])
    return Table(title, header, made, note)


def _methods(study: Study) -> tuple[str, ...]:
    """The protocol's, and their mean."""
    return (*study.protocol.methods, study.protocol.mean)


def headline(study: Study, arch: str) -> Table:
    """Energy for the protocol's methods and their mean, and the accuracies."""
    rows = [(METHOD_LABELS[m], explanation(m, "energy")) for m in _methods(study)]
    rows += [(q.kind.heading, q) for q in (SHIFTED, IN_DISTRIBUTION)]
    seeds = {n.seed for v in (study.baseline, study.headline) for n in study.of(arch, v)}
    areas = [a for v in study.present(arch) for a in study.values(arch, v, Quantity("mask_area")).values()]
    note = f"Seeds {seeds_of(seeds) or 'none'}. {_NOTE}"
    if areas:
        note += f" The object covers {statistics.fmean(areas):.3f} of an image: the energy of a uniform map."
    return _comparison(study, arch, study.architectures[arch], rows, note, METRICS["energy"].heading)


def variants(study: Study, arch: str) -> Table:
    """One row per variant: accuracies, energy, background, and the differences from the baseline."""
    baseline = study.label(study.baseline)
    columns = (SHIFTED, *(explanation(study.protocol.mean, metric) for metric in ("energy", "log_background")))
    header = ["", "seeds", IN_DISTRIBUTION.kind.heading]
    for quantity in columns:
        header += [quantity.kind.heading, f"− {baseline} [95 %]"]
    rows = []
    for variant, label in study.present(arch).items():
        row = [Cell(label, "head"), Cell(str(len(study.of(arch, variant)))), spread(study, arch, variant, IN_DISTRIBUTION)]
        for quantity in columns:
            itself = variant == study.baseline
            change = Cell("") if itself else interval(difference(study, arch, variant, study.baseline, quantity))
            row += [spread(study, arch, variant, quantity), change]
        rows.append(row)
    note = f"Energy and background: mean of the {study.protocol.several}. {_NOTE}"
    return Table(f"Variants, {study.architectures[arch]}", tuple(header), rows, note)


def against_variants(study: Study, arch: str) -> Table:
    """The headline variant minus every other one: what each ingredient, and the mask itself, is worth."""
    label = study.label(study.headline)
    columns = (SHIFTED, IN_DISTRIBUTION, *(explanation(study.protocol.mean, m) for m in ("energy", "log_background")))
    rows = []
    for variant, other in study.present(arch).items():
        if variant not in (study.headline, study.baseline) and study.of(arch, study.headline):
            parts = [difference(study, arch, study.headline, variant, q) for q in columns]
            rows.append([Cell(other, "head"), Cell(str(max(d.n for d in parts))), *map(interval, parts)])
    header = (f"{label} minus", "pairs", *(q.kind.heading for q in columns))
    title = f"{label} against the other variants, {study.architectures[arch]}"
    return Table(title, header, rows, f"Bold: {label} is ahead, the interval excludes 0; (worse): behind.")


def counts_table(study: Study, arch: str) -> Table:
    """For every metric: for how many of the protocol's methods the interval excludes 0, on which side."""
    others = [v for v in (study.baseline, study.control) if v in study.present(arch)]
    header = [f"of {study.protocol.several}"]
    for against in others:
        header += [f"better than {study.label(against)}", "worse", "no clear change"]
    rows = []
    for metric, kind in METRICS.items():
        if kind.direction and explanation(study.protocol.mean, metric) in study.quantities(arch):
            row = [Cell(kind.heading, "head")]
            for against in others:
                row += [Cell(str(n)) for n in counts(by_method(study, arch, study.headline, against, metric)).values()]
            rows.append(row)
    title = f"{study.label(study.headline)}: for how many of the {study.protocol.several} the interval excludes 0"
    return Table(title, tuple(header), rows)


def controls(study: Study, arch: str) -> Table:
    rows = [
        (explanation(method, metric).label, explanation(method, metric))
        for metric in ("insertion", "deletion", "randomisation")
        for method in _methods(study)
    ]
    return _comparison(study, arch, "Are the maps faithful, or merely prettier?", rows)


def everything(study: Study, arch: str) -> list[Table]:
    """All methods by all localisation metrics, the VJP that S-IB acts on, and what is no map's."""
    quantities = study.quantities(arch)
    made = []
    for metric in METRICS:
        rows = [(METHOD_LABELS[m], explanation(m, metric)) for m in _methods(study)]
        rows += [(f"{METHOD_LABELS[m]} ({what})", explanation(m, metric)) for m, what in study.protocol.others.items()]
        rows.append((f"VJP, as in training (not of the {study.protocol.several.split()[0]})", Quantity("vjp", "", metric)))
        rows += [(METRICS[metric].label, Quantity(block, "", metric)) for block in ("evidence", "background")]
        rows = [(label, quantity) for label, quantity in rows if quantity in quantities]
        if rows:
            made.append(_comparison(study, arch, METRICS[metric].heading, rows, METRICS[metric].definition))
    return made


def primary_table(study: Study) -> Table:
    """The comparison that the protocol is about, on all architectures together."""
    ours, theirs = (study.label(v) for v in (study.headline, study.control))
    rows = []
    for part, corrected in primary(study, study.headline, study.control):
        where = Cell(f"{part.quantity.label}, {study.architectures[part.arch]}", "head")
        spreads = [spread(study, part.arch, v, part.quantity) for v in (study.headline, study.control)]
        rows.append([where, Cell(str(part.n)), *spreads, interval(part), p_value(part.p), p_value(corrected)])
    header = ("", "pairs", ours, theirs, "difference [95 % CI]", "p", "p, Holm")
    return Table(f"The primary comparison: {ours} minus {theirs}", header, rows, _NOTE)


def energies(study: Study, arch: str) -> Table:
    """Energy inside by variant and method, with what maps score that know nothing."""
    methods = [*_methods(study), *(m for m in study.protocol.others if m not in CONSTANT)]
    methods = [m for m in methods if explanation(m, "energy") in study.quantities(arch)]
    there = study.present(arch)
    rows = [
        [
            Cell(label, "head"),
            Cell(str(len(study.of(arch, v)))),
            *(spread(study, arch, v, explanation(m, "energy")) for m in methods),
        ]
        for v, label in there.items()
    ]
    for constant in CONSTANT:
        # the same whatever the network; of every seed once
        scores = {s: x for v in there for s, x in study.values(arch, v, explanation(constant, "energy")).items()}
        if scores:
            text = Cell(summary(list(scores.values())))
            rows.append([Cell(METHOD_LABELS[constant], "head"), Cell(str(len(scores))), *[text] * len(methods)])
    header = ("", "seeds", *(METHOD_LABELS[m] + (f" ({w})" if (w := study.protocol.others.get(m)) else "") for m in methods))
    return Table(f"{METRICS['energy'].heading}, {study.architectures[arch]}", header, rows)


def compared(study: Study, arch: str) -> Table:
    """The primary quantities of every comparison that was planned."""
    rows = []
    for variant, against in dict.fromkeys(comparisons(study, arch)):
        parts = [difference(study, arch, variant, against, q) for q in study.protocol.primary]
        if any(d.n for d in parts):
            row = [Cell(f"{study.label(variant)} − {study.label(against)}", "head"), Cell(str(max(d.n for d in parts)))]
            rows.append(row + [cell for d in parts for cell in (interval(d), p_value(d.p))])
    header = ("", "pairs", *(text for q in study.protocol.primary for text in (q.label, "p")))
    return Table(f"Every comparison, primary quantities, {study.architectures[arch]}", header, rows, "p: not corrected.")


def secondary_tables(study: Study, arch: str) -> list[Table]:
    """The secondary quantities of the comparisons that the protocol names, each a family for Holm's correction."""
    pairs = [
        (study.headline, study.control),
        *((v, study.baseline) for v in (study.headline, study.control)),
        *study.protocol.against,
    ]
    made = []
    for variant, against in pairs:
        if {variant, against} <= study.present(arch).keys():
            rows = []
            for quantity, corrected in secondary(study, arch, variant, against).items():
                part = difference(study, arch, variant, against, quantity)
                change = interval(part)
                tone = change.tone if corrected < 1 - LEVEL else ""
                rows.append([Cell(quantity.label, "head"), Cell(change.text, tone), p_value(part.p), p_value(corrected)])
            title = f"Secondary: {study.label(variant)} − {study.label(against)}"
            note = f"Bold: Holm's p below {1 - LEVEL:.2f}, a family of {len(rows)}."
            made.append(Table(title, ("", "difference [95 % CI]", "p", "p, Holm"), rows, note))
    return made


def verdict_table(study: Study, arch: str) -> Table:
    rows = []
    for verdict in verdicts(study, arch):
        changes = [(d, interval(d).text) for d in verdict.parts]
        if len(changes) == 1:
            numbers = changes[0][1]
        else:
            worst = min((d for d in verdict.parts if d.n > 1), key=lambda d: d.gain[1], default=None)
            numbers = verdict.summary
            if worst is not None:
                numbers += f"; least favourable: {worst.quantity.label} {interval(worst).text}"
        tone = {"met": "better", "not met": "worse"}.get(verdict.verdict, "")
        rows.append([Cell(verdict.expectation, "head"), Cell(verdict.verdict, tone), Cell(numbers)])
    return Table(f"Expectations, {study.architectures[arch]}", ("expected before the study", "verdict", "measured"), rows)


def not_improved(study: Study, arch: str) -> list[Table]:
    """What got worse and what did not change clearly: the headline variant first, then every other by its summary."""
    pair = (study.headline, study.baseline)
    label = study.label(study.headline)
    found = judged(study, arch, *pair)
    worse = [d for d in found if d.effect == "worse"]
    # the ones whose mean lies on the worse side first
    unclear = sorted((d for d in found if d.effect == "unclear"), key=lambda d: d.gain[0])
    tables = []
    for title, parts in ((f"{label}: worse than {study.label(study.baseline)}", worse), (f"{label}: no clear change", unclear)):
        rows = [(d.quantity.label, d.quantity) for d in parts]
        note = f"{len(parts)} of {len(found)} comparisons."
        tables.append(_comparison(study, arch, title, rows, note) if rows else Table(title, (), [], f"None of {len(found)}."))
    others = [(study.headline, study.control), *((v, study.baseline) for v in study.variants if v not in pair)]
    rows = []
    for variant, against in others:
        if {variant, against} <= study.present(arch).keys():
            for quantity in summary_quantities(study, arch):
                part = difference(study, arch, variant, against, quantity)
                if part.effect == "worse":
                    names = f"{study.label(variant)} − {study.label(against)}"
                    rows.append([Cell(names, "head"), Cell(quantity.label), interval(part)])
    title = f"Worse in the other comparisons: accuracies and means of the {study.protocol.several}"
    header = ("", "quantity", "difference [95 % CI]")
    tables.append(Table(title, header, rows) if rows else Table(title, (), [], "None."))
    return tables


def differing_settings(study: Study, arch: str) -> Table:
    """What the variants were trained with, as far as they differ."""
    first = {v: study.of(arch, v)[0].settings for v in study.present(arch)}
    keys = [k for k in dict.fromkeys(k for s in first.values() for k in s) if k not in ("seed", "variant")]
    keys = [k for k in keys if len({json.dumps(s.get(k), sort_keys=True) for s in first.values()}) > 1]
    rows = [[Cell(study.variants[v], "head"), *(Cell(setting(s.get(k, "–"))) for k in keys)] for v, s in first.items()]
    return Table(f"What the variants differ in, {study.architectures[arch]}", ("", *keys), rows if keys else [])


def step_table(study: Study, arch: str) -> Table:
    """What a step of each kind took."""
    seconds = study.step_seconds[arch]
    rows = [
        [Cell(label, "head"), *(Cell(text) for text in (f"{1e3 * seconds[k]:.1f}", f"{seconds[k] / seconds['plain']:.2f}×"))]
        for k, label in LABELS.items()
    ]
    header = ("", "milliseconds", "of plain training's")
    note = f"{step_cost(study, arch)} Medians, taking turns on one batch, with whatever else this machine did: no benchmark."
    return Table(f"A training step, {study.architectures[arch]}", header, rows, note)
