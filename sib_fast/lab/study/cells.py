"""Numbers of a study as the words and cells of its report."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Iterable, Sequence
from typing import Any

from sib_fast.lab.page import Cell
from sib_fast.lab.study.records import Quantity, Study
from sib_fast.lab.study.statistics import Difference


def number(value: float) -> str:
    return f"{value:+.3f}".replace("-", "−")


def summary(values: Sequence[float]) -> str:
    """Mean, and the sample standard deviation if there are two values or more; a dash for none."""
    if not values:
        return "–"
    mean = f"{statistics.fmean(values):.3f}"
    return mean if len(values) == 1 else f"{mean} ± {statistics.stdev(values):.3f}"


def spread(study: Study, arch: str, variant: str, quantity: Quantity) -> Cell:
    """Mean ± standard deviation, of the seeds where it is defined; says so if some are not."""
    values = study.values(arch, variant, quantity)
    text = summary(list(values.values())).replace("-", "−")
    networks = len(study.of(arch, variant))
    return Cell(text if len(values) in (0, networks) else f"{text} (n = {len(values)})")


def interval(part: Difference) -> Cell:
    """Mean of the differences [interval]; as many words as the case needs."""
    if part.n == 0:
        return Cell("–")
    if part.n == 1:
        return Cell(f"{number(part.mean)} (one seed)")
    text = f"{number(part.mean)} [{number(part.low)}, {number(part.high)}]"
    if part.dropped:
        text += f" (n = {part.n})"
    return Cell(f"{text} (worse)", "worse") if part.effect == "worse" else Cell(text, "better" if part.effect == "better" else "")


def seeds_of(seeds: Iterable[int]) -> str:
    return ", ".join(map(str, sorted(seeds)))


def p_value(value: float) -> Cell:
    if math.isnan(value):
        return Cell("–")
    return Cell("< 0.0001" if value < 1e-4 else f"{value:.4f}")


def setting(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
