"""What every integration does with the criterion's terms: average them between two log lines without a synchronisation."""

from __future__ import annotations

from torch import Tensor

from sib_fast.criterion import Criterion


class TermAverage:
    """Running means of `criterion.terms`, kept on the device until they are read."""

    def __init__(self) -> None:
        self._sums: dict[str, tuple[Tensor, int]] = {}

    def update(self, criterion: Criterion) -> None:
        for name, value in criterion.terms.items():
            total, count = self._sums.get(name, (0.0, 0))
            self._sums[name] = (total + value.detach(), count + 1)

    def read(self, prefix: str) -> dict[str, float]:
        """Means since the latest read. Synchronises, so it belongs where the framework logs, not in a step."""
        means = {f"{prefix}{name}": float(total) / count for name, (total, count) in self._sums.items()}
        self._sums.clear()
        return means
