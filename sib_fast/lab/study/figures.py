"""The plots of a study: one matplotlib figure per idea and architecture, narrow enough for a phone."""

from __future__ import annotations

import io
import statistics
import textwrap
from typing import TYPE_CHECKING

from sib_fast.lab.study.records import (
    IN_DISTRIBUTION,
    METHOD_LABELS,
    METRICS,
    SHIFTED,
    Quantity,
    Study,
    explanation,
)
from sib_fast.lab.study.statistics import difference

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito's colours without yellow, which white paper swallows; with ten markers no two of 70 variants look alike.
_COLOURS = ("#000000", "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00")
_MARKERS = ("o", "s", "^", "D", "v", "P", "X", "<", ">", "p")
_WIDTH = 5.2  # inches: at 380 pixels across, 9 points are still 9 pixels
_GREY = "#777777"
_LEGEND = {"loc": "outside lower center", "fontsize": 8, "frameon": False, "borderaxespad": 0.8}


def figures(study: Study, arch: str) -> dict[str, tuple[Figure, str]]:
    """name -> (figure, caption) for one architecture; nothing for one without networks. Needs matplotlib (extra [lab])."""
    if not study.of(arch):
        return {}
    label = study.architectures[arch]
    made = {
        "energy": (_energy(study, arch), "Energy inside the object per method and variant. Dots: seeds; bar: their mean."),
        "accuracy": (
            _scatter(study, arch, IN_DISTRIBUTION, SHIFTED, diagonal=True),
            "Accuracy on shifted backgrounds against accuracy in distribution; grey: equal. Small: seeds; large: their mean.",
        ),
        "differences": (
            _forest(study, arch),
            "Paired differences over seeds with 95 % intervals. The arrow says which side is better; an interval that "
            "crosses the line is no clear change.",
        ),
        "trade-off": (
            _scatter(study, arch, explanation(study.protocol.mean, "energy"), SHIFTED),
            f"Concentration against accuracy: energy inside ({METHOD_LABELS[study.protocol.mean]}) and accuracy on shifted "
            "backgrounds. "
            "Small: seeds; large: their mean.",
        ),
    }
    for figure, _ in made.values():
        figure.suptitle(label, fontsize=11)
    return {name: (figure, f"{label}. {caption}") for name, (figure, caption) in made.items()}


def rendered(figure: Figure) -> dict[str, bytes]:
    """The figure as "png" and "svg"; equal figures give equal bytes."""
    from matplotlib import rc_context

    contents = {}
    # text as paths: the reader's fonts do not matter. No date and no random ids: a report made again changes no byte.
    with rc_context({"svg.hashsalt": "sib_fast", "svg.fonttype": "path"}):
        for kind in ("png", "svg"):
            content = io.BytesIO()
            figure.savefig(content, format=kind, dpi=160, metadata={"Date": None} if kind == "svg" else {})
            contents[kind] = content.getvalue()
            if kind == "png":
                # Laid out once: it is most of the time. Its solver's last digits change from run to run, and with them ids.
                figure.set_layout_engine("none")
                for axis in figure.axes:
                    axis.set_position([round(edge, 6) for edge in axis.get_position().bounds])
    return contents


def _figure(height: float) -> Figure:
    from matplotlib.figure import Figure

    return Figure(figsize=(_WIDTH, height), layout="constrained", facecolor="white")


def _style(study: Study, variant: str) -> dict[str, str]:
    i = list(study.variants).index(variant)
    return {"color": _COLOURS[i % len(_COLOURS)], "marker": _MARKERS[i % len(_MARKERS)]}


def _energy(study: Study, arch: str) -> Figure:
    variants = study.present(arch)
    methods = study.protocol.methods
    rows = -(-len(methods) // 2)
    figure = _figure(0.7 + rows * (0.55 + 0.26 * len(variants)))
    axes = figure.subplots(rows, 2, sharex=True, sharey=True, squeeze=False)
    areas = [value for v in variants for value in study.values(arch, v, Quantity("mask_area")).values()]
    constants = [c for v in variants for c in study.values(arch, v, explanation("constant", "energy")).values()]
    for axis, method in zip(axes.flat, methods, strict=False):
        axis.set_title(METHOD_LABELS[method], fontsize=9, loc="left")
        for row, variant in enumerate(variants):
            values = list(study.values(arch, variant, explanation(method, "energy")).values())
            colour = _style(study, variant)["color"]
            axis.scatter(values, [row] * len(values), s=14, color=colour, alpha=0.45, linewidths=0)
            if values:
                axis.scatter([statistics.fmean(values)], [row], s=110, marker="|", color=colour, linewidths=2)
        if areas:
            axis.axvline(statistics.fmean(areas), color=_GREY, linestyle=":", linewidth=1)
        if constants:
            axis.axvline(statistics.fmean(constants), color=_GREY, linestyle="--", linewidth=1)
        # a long label would leave no room for the right column's titles
        axis.set_yticks(range(len(variants)), [textwrap.fill(label, 24) for label in variants.values()], fontsize=8)
        axis.set_ylim(len(variants) - 0.5, -0.5)
        _tidy(axis)
    for axis in axes[-1]:
        axis.set_xlabel(METRICS["energy"].heading, fontsize=9)
    if areas:
        text = "dotted: a uniform map (the object's share of the image)"
        figure.supxlabel(f"{text}; dashed: the mean training mask" if constants else text, fontsize=8, color=_GREY)
    return figure


def _scatter(study: Study, arch: str, across: Quantity, up: Quantity, diagonal: bool = False) -> Figure:
    variants = study.present(arch)
    figure = _figure(3.9 + 0.2 * -(-len(variants) // 2))
    axis = figure.subplots()
    handles, labels = [], []
    for variant, label in variants.items():
        xs, ys = (study.values(arch, variant, q) for q in (across, up))
        seeds = sorted(xs.keys() & ys.keys())
        style = _style(study, variant)
        x, y = [xs[s] for s in seeds], [ys[s] for s in seeds]
        axis.scatter(x, y, s=14, alpha=0.4, linewidths=0, **style)
        if seeds:
            mean = ([statistics.fmean(x)], [statistics.fmean(y)])
            handles.append(axis.scatter(*mean, s=75, edgecolors="white", linewidths=0.8, zorder=3, **style))
            labels.append(label)
    if diagonal and handles:
        limits = axis.axis()
        axis.axline((0.5, 0.5), slope=1, color=_GREY, linewidth=0.8, zorder=0)
        axis.axis(limits)
    names = [METHOD_LABELS[q.method] if q.method == study.protocol.mean else "" for q in (across, up)]
    titles = [f"{q.kind.heading} ({name})" if name else q.kind.heading for q, name in zip((across, up), names, strict=True)]
    axis.set_xlabel(titles[0], fontsize=9)
    axis.set_ylabel(titles[1], fontsize=9)
    _tidy(axis)
    axis.grid(axis="y", color="#dddddd", linewidth=0.6)
    if handles:
        figure.legend(handles, labels, ncols=2, **_LEGEND)
    return figure


def _forest(study: Study, arch: str) -> Figure:
    """Headline against baseline and against the control, in panels of one unit and one better side each."""
    accuracies = [(q.kind.label, q) for q in (SHIFTED, IN_DISTRIBUTION)]
    panels = [
        ("energy inside and accuracy, better →", [*_each(study, "energy"), *accuracies]),
        ("background (log10), ← better", _each(study, "log_background")),
        ("insertion, better →", _each(study, "insertion")),
        ("deletion, ← better", _each(study, "deletion")),
    ]
    figure = _figure(1.3 + sum(0.5 + 0.24 * len(rows) for _, rows in panels))
    axes = figure.subplots(len(panels), 1, height_ratios=[len(rows) + 1 for _, rows in panels])
    present = study.present(arch)
    against = [v for v in (study.baseline, study.control) if v in present and study.headline in present]
    handles, labels = [], []
    for axis, (title, rows) in zip(axes, panels, strict=True):
        axis.set_title(title, fontsize=9, loc="left")
        axis.axvline(0, color=_GREY, linewidth=0.8)
        for i, variant in enumerate(against):
            parts = [difference(study, arch, study.headline, variant, q) for _, q in rows]
            shift = 0.16 * (2 * i - 1) if len(against) == 2 else 0.0
            bars = axis.errorbar(
                [d.mean for d in parts],
                [row + shift for row in range(len(parts))],
                xerr=[[d.mean - d.low for d in parts], [d.high - d.mean for d in parts]],
                fmt="os"[i],
                color=_COLOURS[1 + i],
                markerfacecolor=(_COLOURS[1], "white")[i],
                markersize=4.5,
                linewidth=1.3,
            )
            if axis is axes[0]:
                handles.append(bars)
                labels.append(f"{study.variants[study.headline]} − {study.variants[variant]}")
        axis.set_yticks(range(len(rows)), [label for label, _ in rows], fontsize=8)
        axis.set_ylim(len(rows) - 0.5, -0.5)
        axis.locator_params(axis="x", nbins=6)
        _tidy(axis)
    if handles:
        figure.legend(handles, labels, **_LEGEND)
    return figure


def _each(study: Study, metric: str) -> list[tuple[str, Quantity]]:
    return [(METHOD_LABELS[method], explanation(method, metric)) for method in study.protocol.methods]


def _tidy(axis: Axes) -> None:
    axis.tick_params(labelsize=8)
    axis.grid(axis="x", color="#dddddd", linewidth=0.6)
    axis.set_axisbelow(True)
    axis.spines[["top", "right"]].set_visible(False)
