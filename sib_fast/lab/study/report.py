"""A study as sentences, CSV, tables (Markdown), plots and one self-contained HTML page: everything computed, nothing assumed.

    write_report(load_study(out))      # also of a study that is still running: what is missing is listed

Needs the extra [lab]; importing this module does not.
"""

from __future__ import annotations

import csv
import io
import json
import math
import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from sib_fast.lab.page import Cell, Table, data_url, render
from sib_fast.lab.results import write_atomically
from sib_fast.lab.study.figures import figures, rendered
from sib_fast.lab.study.measures import CONSTANT
from sib_fast.lab.study.records import (
    IN_DISTRIBUTION,
    METHOD_LABELS,
    METRICS,
    SHIFTED,
    Quantity,
    Study,
    explanation,
    file_stem,
    load_study,
)
from sib_fast.lab.study.statistics import (
    DEFINITIONS,
    ENERGY_MARK,
    LEVEL,
    MET,
    Difference,
    by_method,
    comparisons,
    counts,
    difference,
    differences,
    judged,
    primary,
    reaches,
    secondary,
    summary_quantities,
    verdicts,
)
from sib_fast.lab.study.timing import FIXED, LABELS

__all__ = ["Study", "closing_lines", "load_study", "write_report"]

_PANEL_BYTES = 600_000  # of panel.png, beyond which the page takes a smaller copy
_SHOWN_GAPS = 40
_NOTE = (
    "Mean ± standard deviation over seeds; paired difference [95 % CI]. **Bold**: the interval excludes 0 on the better "
    "side; (worse): on the other."
)


def write_report(study: Study) -> list[Path]:
    """Write results.csv, differences.csv, table.md, figures/*.png and *.svg and report.html; each in one step.

    Errors:  ImportError without the extra [lab].
    """
    found = differences(study)
    contents = {
        "results.csv": _results_csv(study),
        "differences.csv": _differences_csv(found),
        "table.md": markdown(study),
    }
    (study.out / "figures").mkdir(exist_ok=True)
    pictures = []
    encoded: dict[str, bytes] = {}
    for arch in study.architectures:
        for name, (figure, caption) in figures(study, arch).items():
            files_of = rendered(figure)
            encoded |= {f"figures/{name}-{arch}.{kind}": content for kind, content in files_of.items()}
            pictures.append((data_url("svg+xml", files_of["svg"]), caption))
    encoded |= {name: text.encode() for name, text in contents.items()}
    encoded["report.html"] = _html(study, pictures).encode()
    for name, content in encoded.items():
        write_atomically(study.out / name, content)
    return [study.out / name for name in encoded]


def closing_lines(study: Study, program: str) -> list[str]:
    """What a finished run ends with: where the picture is, what was seen, what can be done next.

    Args:    program: how this package's command is called here.
    """
    out, architectures = study.out, _reported(study)
    lines = ["", "What was seen"]
    lines += [f"  {i}. {sentence}" for i, sentence in enumerate(seen(study), 1)]
    lines += [f"  What it costs: {step_cost(study, arch)}" for arch in study.step_seconds if arch in architectures]
    lines.append("")
    if (out / "panel.png").is_file():
        lines.append(f"The picture: {out / 'panel.png'}")
    lines += [f"Every number, plot and verdict: {out / 'report.html'}", "", "What next"]
    first = [study.of(arch, v)[:1] for arch in architectures[:1] for v in (study.baseline, study.headline)]
    pair = " ".join(f"--checkpoint {out / 'networks' / file_stem(*n.key)}.pt" for found in first for n in found)
    suggestions = {
        f"{program} explain {pair} --image FILE --out maps.png": "where these networks find the evidence in a picture of yours",
        f"{program} train --data folder --root FOLDER --out runs/mine": "S-IB on your own images (docs/data.md)",
        f"{program} study": "more ways of training, a control without a mask, a second network; an hour or more",
    }
    for command, what in suggestions.items():
        if command not in study.command.split(" && "):
            lines += [f"  {command}", f"      {what}"]
    return lines


def markdown(study: Study) -> str:
    """For a README: energy and accuracy, then the variants, one block per architecture."""
    blocks = [f"{text}\n" for text in status_lines(study)]
    for arch in _reported(study):
        tables = [headline(study, arch), variants(study, arch), verdict_table(study, arch)]
        if study.protocol.secondary:
            first = [primary_table(study)] if arch == _reported(study)[0] else []
            tables = [*first, energies(study, arch), compared(study, arch), *secondary_tables(study, arch), tables[-1]]
        for table in tables:
            lines = [f"**{table.title}**", ""]
            lines.append("| " + " | ".join(map(_escape, table.header)) + " |")
            lines.append("|---" + "|---:" * (len(table.header) - 1) + "|")
            for row in table.rows:
                cells = (f"**{_escape(c.text)}**" if c.tone == "better" else _escape(c.text) for c in row)
                lines.append("| " + " | ".join(cells) + " |")
            if table.note:
                lines += ["", table.note]
            blocks.append("\n".join(lines) + "\n")
    return "\n".join(blocks)


def _escape(text: str) -> str:
    return text.replace("|", "\\|")


# ---- numbers as text ----------------------------------------------------------------------------------------------------


def _number(value: float) -> str:
    return f"{value:+.3f}".replace("-", "−")


def _summary(values: Sequence[float]) -> str:
    """Mean, and the sample standard deviation if there are two values or more; a dash for none."""
    if not values:
        return "–"
    mean = f"{statistics.fmean(values):.3f}"
    return mean if len(values) == 1 else f"{mean} ± {statistics.stdev(values):.3f}"


def _spread(study: Study, arch: str, variant: str, quantity: Quantity) -> Cell:
    """Mean ± standard deviation, of the seeds where it is defined; says so if some are not."""
    values = study.values(arch, variant, quantity)
    text = _summary(list(values.values())).replace("-", "−")
    networks = len(study.of(arch, variant))
    return Cell(text if len(values) in (0, networks) else f"{text} (n = {len(values)})")


def _change(part: Difference) -> Cell:
    """Mean of the differences [interval]; as many words as the case needs."""
    if part.n == 0:
        return Cell("–")
    if part.n == 1:
        return Cell(f"{_number(part.mean)} (one seed)")
    text = f"{_number(part.mean)} [{_number(part.low)}, {_number(part.high)}]"
    if part.dropped:
        text += f" (n = {part.n})"
    return Cell(f"{text} (worse)", "worse") if part.effect == "worse" else Cell(text, "better" if part.effect == "better" else "")


def _seeds(seeds: Iterable[int]) -> str:
    return ", ".join(map(str, sorted(seeds)))


def _label(study: Study, variant: str) -> str:
    return study.variants.get(variant, variant)


def _reported(study: Study) -> list[str]:
    return [arch for arch in study.architectures if study.of(arch)]


# ---- tables -------------------------------------------------------------------------------------------------------------


def _comparison(
    study: Study, arch: str, title: str, rows: Sequence[tuple[str, Quantity]], note: str = _NOTE, of: str = ""
) -> Table:
    """Rows of quantities; columns: the baseline, the headline variant, the paired difference. of: heading of the first column."""
    header = (of, _label(study, study.baseline), _label(study, study.headline), "difference [95 % CI]")
    made = []
    for label, quantity in rows:
        spreads = [_spread(study, arch, v, quantity) for v in (study.baseline, study.headline)]
        change = _change(difference(study, arch, study.headline, study.baseline, quantity))
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
    note = f"Seeds {_seeds(seeds) or 'none'}. {_NOTE}"
    if areas:
        note += f" The object covers {statistics.fmean(areas):.3f} of an image: the energy of a uniform map."
    return _comparison(study, arch, study.architectures[arch], rows, note, METRICS["energy"].heading)


def variants(study: Study, arch: str) -> Table:
    """One row per variant: accuracies, energy, background, and the differences from the baseline."""
    baseline = _label(study, study.baseline)
    columns = (SHIFTED, *(explanation(study.protocol.mean, metric) for metric in ("energy", "log_background")))
    header = ["", "seeds", IN_DISTRIBUTION.kind.heading]
    for quantity in columns:
        header += [quantity.kind.heading, f"− {baseline} [95 %]"]
    rows = []
    for variant, label in study.present(arch).items():
        row = [Cell(label, "head"), Cell(str(len(study.of(arch, variant)))), _spread(study, arch, variant, IN_DISTRIBUTION)]
        for quantity in columns:
            itself = variant == study.baseline
            change = Cell("") if itself else _change(difference(study, arch, variant, study.baseline, quantity))
            row += [_spread(study, arch, variant, quantity), change]
        rows.append(row)
    note = f"Energy and background: mean of the {study.protocol.several}. {_NOTE}"
    return Table(f"Variants, {study.architectures[arch]}", tuple(header), rows, note)


def against_variants(study: Study, arch: str) -> Table:
    """The headline variant minus every other one: what each ingredient, and the mask itself, is worth."""
    label = _label(study, study.headline)
    columns = (SHIFTED, IN_DISTRIBUTION, *(explanation(study.protocol.mean, m) for m in ("energy", "log_background")))
    rows = []
    for variant, other in study.present(arch).items():
        if variant not in (study.headline, study.baseline) and study.of(arch, study.headline):
            parts = [difference(study, arch, study.headline, variant, q) for q in columns]
            rows.append([Cell(other, "head"), Cell(str(max(d.n for d in parts))), *map(_change, parts)])
    header = (f"{label} minus", "pairs", *(q.kind.heading for q in columns))
    title = f"{label} against the other variants, {study.architectures[arch]}"
    return Table(title, header, rows, f"Bold: {label} is ahead, the interval excludes 0; (worse): behind.")


def counts_table(study: Study, arch: str) -> Table:
    """For every metric: for how many of the protocol's methods the interval excludes 0, on which side."""
    others = [v for v in (study.baseline, study.control) if v in study.present(arch)]
    header = [f"of {study.protocol.several}"]
    for against in others:
        header += [f"better than {_label(study, against)}", "worse", "no clear change"]
    rows = []
    for metric, kind in METRICS.items():
        if kind.direction and explanation(study.protocol.mean, metric) in study.quantities(arch):
            row = [Cell(kind.heading, "head")]
            for against in others:
                row += [Cell(str(n)) for n in counts(by_method(study, arch, study.headline, against, metric)).values()]
            rows.append(row)
    title = f"{_label(study, study.headline)}: for how many of the {study.protocol.several} the interval excludes 0"
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


def _p(value: float) -> Cell:
    if math.isnan(value):
        return Cell("–")
    return Cell("< 0.0001" if value < 1e-4 else f"{value:.4f}")


def primary_table(study: Study) -> Table:
    """The comparison that the protocol is about, on all architectures together."""
    ours, theirs = (_label(study, v) for v in (study.headline, study.control))
    rows = []
    for part, corrected in primary(study, study.headline, study.control):
        where = Cell(f"{part.quantity.label}, {study.architectures[part.arch]}", "head")
        spreads = [_spread(study, part.arch, v, part.quantity) for v in (study.headline, study.control)]
        rows.append([where, Cell(str(part.n)), *spreads, _change(part), _p(part.p), _p(corrected)])
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
            *(_spread(study, arch, v, explanation(m, "energy")) for m in methods),
        ]
        for v, label in there.items()
    ]
    for constant in CONSTANT:
        # the same whatever the network; of every seed once
        scores = {s: x for v in there for s, x in study.values(arch, v, explanation(constant, "energy")).items()}
        if scores:
            text = Cell(_summary(list(scores.values())))
            rows.append([Cell(METHOD_LABELS[constant], "head"), Cell(str(len(scores))), *[text] * len(methods)])
    header = ("", "seeds", *(METHOD_LABELS[m] + (f" ({w})" if (w := study.protocol.others.get(m)) else "") for m in methods))
    return Table(f"{METRICS['energy'].heading}, {study.architectures[arch]}", header, rows)


def compared(study: Study, arch: str) -> Table:
    """The primary quantities of every comparison that was planned."""
    rows = []
    for variant, against in dict.fromkeys(comparisons(study, arch)):
        parts = [difference(study, arch, variant, against, q) for q in study.protocol.primary]
        if any(d.n for d in parts):
            row = [Cell(f"{_label(study, variant)} − {_label(study, against)}", "head"), Cell(str(max(d.n for d in parts)))]
            rows.append(row + [cell for d in parts for cell in (_change(d), _p(d.p))])
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
                change = _change(part)
                tone = change.tone if corrected < 1 - LEVEL else ""
                rows.append([Cell(quantity.label, "head"), Cell(change.text, tone), _p(part.p), _p(corrected)])
            title = f"Secondary: {_label(study, variant)} − {_label(study, against)}"
            note = f"Bold: Holm's p below {1 - LEVEL:.2f}, a family of {len(rows)}."
            made.append(Table(title, ("", "difference [95 % CI]", "p", "p, Holm"), rows, note))
    return made


def verdict_table(study: Study, arch: str) -> Table:
    rows = []
    for verdict in verdicts(study, arch):
        changes = [(d, _change(d).text) for d in verdict.parts]
        if len(changes) == 1:
            numbers = changes[0][1]
        else:
            worst = min((d for d in verdict.parts if d.n > 1), key=lambda d: d.gain[1], default=None)
            numbers = verdict.summary
            if worst is not None:
                numbers += f"; least favourable: {worst.quantity.label} {_change(worst).text}"
        tone = {"met": "better", "not met": "worse"}.get(verdict.verdict, "")
        rows.append([Cell(verdict.expectation, "head"), Cell(verdict.verdict, tone), Cell(numbers)])
    return Table(f"Expectations, {study.architectures[arch]}", ("expected before the study", "verdict", "measured"), rows)


def not_improved(study: Study, arch: str) -> list[Table]:
    """What got worse and what did not change clearly: the headline variant first, then every other by its summary."""
    pair = (study.headline, study.baseline)
    label = _label(study, study.headline)
    found = judged(study, arch, *pair)
    worse = [d for d in found if d.effect == "worse"]
    # the ones whose mean lies on the worse side first
    unclear = sorted((d for d in found if d.effect == "unclear"), key=lambda d: d.gain[0])
    tables = []
    for title, parts in ((f"{label}: worse than {_label(study, study.baseline)}", worse), (f"{label}: no clear change", unclear)):
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
                    names = f"{_label(study, variant)} − {_label(study, against)}"
                    rows.append([Cell(names, "head"), Cell(quantity.label), _change(part)])
    title = f"Worse in the other comparisons: accuracies and means of the {study.protocol.several}"
    header = ("", "quantity", "difference [95 % CI]")
    tables.append(Table(title, header, rows) if rows else Table(title, (), [], "None."))
    return tables


def differing_settings(study: Study, arch: str) -> Table:
    """What the variants were trained with, as far as they differ."""
    first = {v: study.of(arch, v)[0].settings for v in study.present(arch)}
    keys = [k for k in dict.fromkeys(k for s in first.values() for k in s) if k not in ("seed", "variant")]
    keys = [k for k in keys if len({json.dumps(s.get(k), sort_keys=True) for s in first.values()}) > 1]
    rows = [[Cell(study.variants[v], "head"), *(Cell(_text(s.get(k, "–"))) for k in keys)] for v, s in first.items()]
    return Table(f"What the variants differ in, {study.architectures[arch]}", ("", *keys), rows if keys else [])


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


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


# ---- sentences ----------------------------------------------------------------------------------------------------------


def seen(study: Study) -> list[str]:
    """Three sentences for a reader who knows no term of the trade: the evidence, the accuracy, and what else was asked.

    What was not run is not mentioned.
    """
    ours, theirs = (_label(study, v) for v in (study.headline, study.baseline))
    energy = explanation(study.protocol.mean, "energy")
    found = {}
    for arch in _reported(study):
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
    label, baseline = _label(study, study.headline), _label(study, study.baseline)
    energy, shifted, inside, control, losses = [], [], [], [], []
    for arch in _reported(study):
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
            control.append(f"energy {_change(ahead[0]).text} and shifted accuracy {_change(ahead[1]).text} on {name}")
        tally = counts(judged(study, arch, study.headline, study.baseline))
        losses.append(f"{tally['better']} are better, {tally['worse']} worse and {tally['unclear']} unclear on {name}")
    if not energy:
        return ["No network has finished yet."]
    against = f"{label} minus “{_label(study, study.control)}”: {'; '.join(control)}. " if control else ""
    return [
        f"With {label} instead of {baseline}, energy inside the object (mean of {study.protocol.several}) {'; '.join(energy)}.",
        f"Accuracy on shifted backgrounds {'; '.join(shifted)}. In distribution it {'; '.join(inside)}.",
        f"{against}Of all comparisons with {baseline}, methods by metrics, {'; '.join(losses)}.",
    ]


def _moved(part: Difference) -> str:
    if part.n == 0:
        return "is unknown (no pair of seeds)"
    if part.n == 1:
        return f"changed by {_number(part.mean)} (one seed, no interval)"
    verb = {"better": "rose", "worse": "fell", "unclear": "did not change clearly,"}[part.effect]
    by = "by " if part.effect != "unclear" else ""
    return f"{verb} {by}{_number(part.mean)} [{_number(part.low)}, {_number(part.high)}] (n = {part.n})"


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
        lines.append(f"Missing: {study.architectures[arch]}, {_label(study, variant)}: seeds {_seeds(seeds)}.")
    for arch, variant, seed in study.unplanned:
        lines.append(f"Left out, not planned: {arch}, {variant}, seed {seed}.")
    undefined: dict[tuple[str, str], dict[str, float]] = {}
    lost = []
    for network in study.networks:
        where = f"{study.architectures[network.arch]}, {_label(study, network.variant)}, seed {network.seed}"
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
        listed = ", ".join(f"{_label(study, variant)} {images:.0f}" for variant, images in each.items())
        lines.append(f"Maps left out (zero everywhere, or an empty mask), images over all seeds: {where}: {listed}.")
    for name, what in (("test_images", "test images"), ("explained_images", "explained images"), ("steps", "training steps")):
        values = sorted({n.values[Quantity(name)] for n in study.networks if Quantity(name) in n.values})
        if len(values) > 1:
            lines.append(f"Networks differ in {what}: {', '.join(f'{v:.0f}' for v in values)}.")
    commits = sorted({n.commit for n in study.networks if n.commit})
    if len(commits) > 1:
        lines.append(f"Networks were trained at {len(commits)} commits: {', '.join(c[:12] for c in commits)}.")
    return lines


# ---- files --------------------------------------------------------------------------------------------------------------


def _results_csv(study: Study) -> str:
    """Long format: one row per network and number, NaN where it is undefined."""
    rows = ((*network.key, *quantity, value) for network in study.networks for quantity, value in network.values.items())
    return _csv(("arch", "variant", "seed", "quantity", "method", "metric", "value"), rows)


def _differences_csv(found: Iterable[Difference]) -> str:
    keys = ("arch", "variant", "against", "quantity", "method", "metric", "better", "n", "seeds", "dropped")
    better = {1: "higher", -1: "lower", 0: ""}
    rows = []
    for d in found:
        seeds = (" ".join(map(str, each)) for each in (d.seeds, d.dropped))
        rows.append([d.arch, d.variant, d.against, *d.quantity, better[d.quantity.kind.direction], d.n, *seeds])
        rows[-1] += [d.mean, d.sd, d.low, d.high, d.p, d.effect]
    return _csv((*keys, "mean", "sd", "low", "high", "p", "effect"), rows)


def _csv(header: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(header)
    writer.writerows(rows)
    return text.getvalue()


def _panel(path: Path) -> str | None:
    """panel.png as a data URL, made smaller if it would be most of the page; None where there is none."""
    if not path.is_file():
        return None
    content = path.read_bytes()
    if len(content) <= _PANEL_BYTES:
        return data_url("png", content)
    from PIL import Image

    smaller = io.BytesIO()
    with Image.open(path) as image:
        image = image.convert("RGB")
        image.thumbnail((1600, 2400))
        image.save(smaller, "JPEG", quality=85)
    return data_url("jpeg", smaller.getvalue())


def _html(study: Study, pictures: list[tuple[str, str]]) -> str:
    architectures = [
        {
            "label": study.architectures[arch],
            "verdicts": verdict_table(study, arch),
            "corrected": [energies(study, arch), compared(study, arch), *secondary_tables(study, arch)]
            if study.protocol.secondary
            else [],
            "headline": headline(study, arch),
            "variants": [t for t in (variants(study, arch), against_variants(study, arch)) if t.rows],
            "counts": counts_table(study, arch),
            "controls": controls(study, arch),
            "everything": everything(study, arch),
            "not_improved": not_improved(study, arch),
            "settings": differing_settings(study, arch),
            "steps": step_table(study, arch) if arch in study.step_seconds else None,
        }
        for arch in _reported(study)
    ]
    seconds = [n.values.get(Quantity("train_seconds"), math.nan) for n in study.networks]
    hours = sum(s for s in seconds if math.isfinite(s)) / 3600
    return render(
        "study/report.html.j2",
        study=study,
        primary=primary_table(study) if study.protocol.secondary else None,
        status=status_lines(study),
        seen=[s.replace(" %", "\u00a0%") for s in seen(study)],
        costs=[step_cost(study, arch) for arch in study.step_seconds if study.of(arch)],
        answer=answer(study),
        architectures=architectures,
        pictures=pictures,
        panel=_panel(study.out / "panel.png"),
        settings={k: _text(v) for k, v in study.settings.items()},
        environment={k: _text(v) for k, v in study.environment.items()} | {"training time, all networks": f"{hours:.2f} hours"},
        metrics=METRICS,
        definitions=DEFINITIONS,
        gaps=gaps(study),
        chance=(1 - LEVEL) / 2,
    )
