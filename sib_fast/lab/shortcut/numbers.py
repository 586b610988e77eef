"""Means of per-image values with bootstrap intervals: over the images, and over the classes.

Everything that is compared is compared image by image: a difference is a column of differences, and every column is resampled
with the same draws. A value that is not defined on an image is NaN there and left out of that column alone.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

LEVEL = 0.95
DRAWS = 2000
FEWEST_CLASSES = 5  # below, resampled classes say nothing about classes
_CHUNK = 100  # draws at a time: [_CHUNK, images] of counts


@dataclass(frozen=True)
class Estimate:
    """A mean over images.

    Attributes:
        n: images on which it is defined; with 0, mean is NaN, with fewer than 2 low and high.
        low, high: the 95 % percentile interval over images.
        class_low, class_high: the same over classes, with all of a class's images; NaN for fewer than FEWEST_CLASSES.
    """

    mean: float
    low: float
    high: float
    n: int
    class_low: float = math.nan
    class_high: float = math.nan

    @property
    def at_most(self) -> float:
        """What the mean does not exceed, one side. Where all images agree no resampling moves it: then what n images that all
        say no can say of the next, 1 − 0.05^(1/n), about 3/n."""
        if self.n == 0:
            return math.inf
        return max(self.high, self.mean + 1 - (1 - LEVEL) ** (1 / self.n)) if self.low == self.high else self.high


def estimates(columns: dict[str, np.ndarray], labels: np.ndarray, seed: int = 0, draws: int = DRAWS) -> dict[str, Estimate]:
    """One for each column [N]."""
    names = list(columns)
    values = np.stack([np.asarray(columns[name], dtype=np.float64) for name in names], axis=1)
    defined = np.isfinite(values)
    filled = np.where(defined, values, 0.0)
    classes = np.unique(labels, return_inverse=True)[1]
    over_images = _resampled(filled, defined, np.arange(len(values)), np.random.default_rng([seed, 0]), draws)
    over_classes = _resampled(filled, defined, classes, np.random.default_rng([seed, 1]), draws)
    found = {}
    for column, name in enumerate(names):
        here = defined[:, column]
        n = int(here.sum())
        mean = float(filled[:, column].sum() / n) if n else math.nan
        low, high = _interval(over_images[:, column]) if n > 1 else (math.nan, math.nan)
        several = len(np.unique(classes[here])) >= FEWEST_CLASSES
        found[name] = Estimate(mean, low, high, n, *(_interval(over_classes[:, column]) if several else (math.nan, math.nan)))
    return found


def _resampled(filled: np.ndarray, defined: np.ndarray, unit: np.ndarray, rng: np.random.Generator, draws: int) -> np.ndarray:
    """Means [draws, columns] over resampled units; unit [N] says which one an image belongs to. NaN where a draw has none."""
    units = int(unit.max()) + 1
    parts = []
    for begin in range(0, draws, _CHUNK):
        counts = rng.multinomial(units, np.full(units, 1 / units), size=min(_CHUNK, draws - begin))[:, unit].astype(np.float64)
        totals = counts @ defined.astype(np.float64)
        parts.append(np.divide(counts @ filled, totals, out=np.full_like(totals, np.nan), where=totals > 0))
    return np.concatenate(parts)


def _interval(means: np.ndarray) -> tuple[float, float]:
    tail = (1 - LEVEL) / 2
    low, high = np.nanquantile(means, (tail, 1 - tail))
    return float(low), float(high)
