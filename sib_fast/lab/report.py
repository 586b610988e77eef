"""The closing table and the picture, both made from a run's results alone."""

from __future__ import annotations

import io
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from torch import Tensor

from sib_fast.lab.data import denormalise
from sib_fast.lab.evaluate import inside_share
from sib_fast.lab.results import Results, write_atomically

if TYPE_CHECKING:
    from rich.console import RenderableType

LABELS = {"plain": "plain", "sib": "S-IB"}

_QUANTITIES = (
    ("accuracy, in distribution", "accuracy_in_distribution"),
    ("accuracy, shifted", "accuracy_shifted"),
    ("gradient inside object", "inside_share"),
)
_STEPS = (
    ("plain", "plain training"),
    ("naive", "S-IB, naive head in plain PyTorch"),
    ("sib", "S-IB, sib_fast"),
)


def summary(values: Sequence[float], signed: bool = False) -> str:
    """Mean, and the sample standard deviation if there are two values or more; a dash for none."""
    if not values:
        return "–"
    sign = "+" if signed else ""
    mean = f"{statistics.fmean(values):{sign}.3f}"
    return mean if len(values) == 1 else f"{mean} ± {statistics.stdev(values):.3f}"


def paired_differences(results: Results, quantity: str) -> list[float]:
    """S-IB minus plain for every seed that has both networks, in the order of the seeds."""
    pairs = ((results.network("plain", n.seed), n) for n in results.networks if n.method == "sib")
    return [
        getattr(sib, quantity) - getattr(plain, quantity)
        for plain, sib in sorted(((p, s) for p, s in pairs if p is not None), key=lambda pair: pair[1].seed)
    ]


def tables(results: Results) -> list[RenderableType]:
    """The closing tables for rich's console: quality of the networks, and seconds per step where measured."""
    from rich.table import Table

    methods = [m for m in LABELS if results.values(m, "seed")]
    seeds = sorted({n.seed for n in results.networks})
    listed = ", ".join(map(str, seeds))
    spread = f"mean ± standard deviation over seeds {listed}" if len(seeds) > 1 else f"seed {listed}"
    area = statistics.fmean(n.mask_area for n in results.networks)
    zero = sum(n.zero_gradients for n in results.networks)
    caption = f"{spread}. Shifted: backgrounds independent of the class. Gradient: share of |mean VJP| inside the true "
    caption += f"object, on shifted backgrounds, where the object covers {area:.3f} of the image"
    if zero:
        caption += f"; {zero} images without a gradient left out"
    quality = Table(title="Networks", caption=caption, title_justify="left", caption_justify="left")
    quality.add_column("")
    for method in methods:
        quality.add_column(LABELS[method], justify="right")
    if len(methods) == 2:
        quality.add_column("difference", justify="right")
    for label, quantity in _QUANTITIES:
        row = [summary(results.values(method, quantity)) for method in methods]
        if len(methods) == 2:
            row.append(summary(paired_differences(results, quantity), signed=True))
        quality.add_row(label, *row)
    rendered: list[RenderableType] = [quality]

    if results.step_seconds:
        device = f"{results.environment['device']}, {results.environment['threads']} threads"
        steps = Table(title="Seconds per training step", title_justify="left", caption_justify="left")
        steps.caption = f"median, interleaved on one batch of {results.config['batch_size']}; {device}"
        steps.add_column("")
        steps.add_column("seconds", justify="right")
        steps.add_column("plain = 1", justify="right")
        for key, label in _STEPS:
            if key in results.step_seconds:
                seconds = results.step_seconds[key]
                steps.add_row(label, f"{seconds:.4f}", f"{seconds / results.step_seconds['plain']:.2f}×")
        rendered.append(steps)
    return rendered


def save_panel(path: Path, images: Tensor, masks: Tensor, labels: Tensor, gradients: dict[str, Tensor]) -> None:
    """A PNG of images, masks and gradient maps, in blocks of four columns, written in one step.

    Every map is divided by its own maximum, so all share the colour scale from 0 to 1; the thin line is the object's
    outline and the number the map's share inside it.

    Shapes:  images [N, 3, H, W], normalised as the data set's; masks [N, 1, H, W] bool; labels [N];
             gradients: by method, [N, 1, H, W], non-negative.
    Errors:  ImportError without matplotlib.
    """
    from matplotlib.cm import ScalarMappable
    from matplotlib.figure import Figure

    count, blocks = len(images), 2 if len(images) > 1 else 1
    rows, columns = -(-count // blocks), 2 + len(gradients)
    figure = Figure(figsize=(1.25 * blocks * columns + 0.9, 1.32 * rows + 0.75), layout="constrained")
    axes = figure.subplots(rows, blocks * columns, squeeze=False)
    for axis in axes.flat:
        axis.set_axis_off()
    titles = ["image", "true object", *(f"VJP, {LABELS[method]}" for method in gradients)]
    shares = {method: inside_share(maps, masks) for method, maps in gradients.items()}
    for i in range(count):
        block, row = divmod(i, rows)
        cells = axes[row, block * columns : (block + 1) * columns]
        if row == 0:
            for cell, title in zip(cells, titles, strict=True):
                cell.set_title(title, fontsize=10)
        outline = masks[i, 0].float().numpy()
        cells[0].imshow(denormalise(images[i]).permute(1, 2, 0).numpy())
        _note(cells[0], str(int(labels[i])))
        cells[1].imshow(outline, cmap="gray", vmin=0, vmax=1)
        for cell, (method, maps) in zip(cells[2:], gradients.items(), strict=True):
            peak = maps[i].max().clamp(min=1e-45)  # a zero map stays zero
            cell.imshow((maps[i, 0] / peak).numpy(), cmap="inferno", vmin=0, vmax=1)
            cell.contour(outline, levels=[0.5], colors="white", linewidths=0.6)
            _note(cell, f"{float(shares[method][i]):.2f}")
    if gradients:
        bar = figure.colorbar(ScalarMappable(cmap="inferno"), ax=axes, shrink=0.6, pad=0.01)
        bar.set_label("|mean VJP| over its maximum", fontsize=9)
    figure.suptitle("Shifted backgrounds; number on a map: its share inside the object", fontsize=10)
    content = io.BytesIO()
    figure.savefig(content, format="png", dpi=130)
    write_atomically(path, content.getvalue())


def _note(axis, text: str) -> None:
    box = {"facecolor": "black", "alpha": 0.6, "linewidth": 0, "pad": 1}
    axis.text(0.04, 0.05, text, transform=axis.transAxes, color="white", fontsize=8, bbox=box)
