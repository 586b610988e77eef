"""A grid of images, masks and maps for reading: one row per network, one column per kind of map.

Figures are made without pyplot: nobody's current figure or backend changes.
"""

from __future__ import annotations

import io
import textwrap
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from sib_fast import _checks
from sib_fast.lab.evaluate import inside_share

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

IMAGE, OBJECT, MASK, VJP = "image", "true object", "S-IB mask", "VJP"
TITLES = {
    MASK: "S-IB\nmask",
    OBJECT: "true\nobject",
    "input_x_gradient": "input ×\ngradient",
    "integrated_gradients": "integrated\ngradients",
    "smoothgrad": "SmoothGrad",
    "guided_backprop": "guided\nbackprop",
    "grad_cam": "Grad-CAM",
    "grad_cam_plusplus": "Grad-CAM++",
    "layer_cam": "LayerCAM",
}

# Inches and points. Six columns are then 8 in wide: on a page of 900 px a title is 17 px high, on a phone 7.
_CELL, _GAP, _LEFT, _MARGIN = 1.2, 0.06, 0.46, 0.1
_TITLE_SIZE, _TEXT_SIZE = 11.5, 10
_TITLE_HEIGHT, _LINE_HEIGHT, _BAND_GAP = 0.44, 0.17, 0.14
_DPI = 150
_CHARACTER = 0.58  # of the font size: wider than the mean character of matplotlib's font, so that what is wrapped by it fits
_COLOURS, _MARK = "inferno", "#c8511b"


@dataclass(frozen=True)
class Row:
    """What one network makes of one image: image [3, H, W] in [0, 1], mask [1, H, W] bool, maps [1, H, W] or why not."""

    label: str
    image: Tensor
    mask: Tensor | None
    maps: Mapping[str, Tensor | str]


@dataclass(frozen=True)
class Block:
    """All rows of one image, the lines above them, and the words on the image."""

    rows: Sequence[Row]
    header: str = ""
    note: str = ""


def draw_panel(
    rows: Sequence[tuple[str, Mapping[str, Tensor]]],
    images: Tensor,
    masks: Tensor | None = None,
    *,
    notes: Sequence[str] | None = None,
    caption: str = "",
    marked: Collection[str] = (),
    wrap: int = 9,
) -> Figure:
    """A grid for reading: for every image one row per network, with the image, the true object and a column per kind of map.

    Every map is divided by its own maximum, so all share the colour scale from 0 to 1; the line is the object's outline, the
    number the map's share inside it. The column "S-IB mask" is grey, from 0 to 1 as it is.

    Shapes:  rows: (label, maps by column), maps [N, 1, H, W] non-negative; images [N, 3, H, W] in [0, 1]; masks [N, 1, H, W]
             bool. All rows have the same columns.
    Args:    notes: words on each image. caption: below the grid. marked: columns with a bar above their titles. wrap: greatest
             number of columns side by side; what is beyond continues below, in bands of equal length.
    Errors:  ValueError for shapes that disagree; ImportError without matplotlib.
    """
    if not rows:
        raise ValueError("draw_panel: rows must hold at least one row, got none")
    expected = [len(images), 1, *images.shape[2:]]
    for label, maps in rows:
        if list(maps) != list(rows[0][1]):
            raise ValueError(f"draw_panel: rows must all have the columns {list(rows[0][1])}, got {list(maps)} for {label!r}")
        for column, values in maps.items():
            _checks.require_same_shape("draw_panel", f"rows[{label!r}][{column!r}]", values, "images", expected)
    if masks is not None:
        _checks.require_same_shape("draw_panel", "masks", masks, "images", expected)
    blocks = []
    for i in range(len(images)):
        mask = None if masks is None else masks[i]
        row = [Row(label, images[i], mask, {column: values[i] for column, values in maps.items()}) for label, maps in rows]
        blocks.append(Block(row, note="" if notes is None else notes[i]))
    return draw_blocks(blocks, caption=caption, marked=marked, wrap=wrap)


def draw_blocks(blocks: Sequence[Block], *, caption: str, marked: Collection[str], wrap: int) -> Figure:
    """Strips from top to bottom: an image's header, then for each band of columns its titles and a row per network."""
    _checks.require_package("explain", "matplotlib", "explain")
    from matplotlib.figure import Figure

    first = blocks[0].rows[0]
    columns = [IMAGE, *([] if first.mask is None else [OBJECT]), *first.maps]
    bands = [[str(c) for c in band] for band in np.array_split(columns, -(-len(columns) // wrap))]
    across = max(map(len, bands))
    # Two columns at least, for the colour bar and the words beside it.
    width = _LEFT + max(across, 3) * (_CELL + _GAP) - _GAP + _MARGIN

    strips: list[tuple[float, Callable[[Figure, float], None]]] = [(_MARGIN, lambda figure, top: None)]
    for number, block in enumerate(blocks):
        if block.header:
            header = _fold(block.header, width - 2 * _MARGIN, _TEXT_SIZE)
            strips.append((_LINE_HEIGHT * (header.count("\n") + 1) + 0.04, _text(header, _MARGIN)))
        for band in bands:
            if number == 0 or len(bands) > 1:
                strips.append((_TITLE_HEIGHT, _titles(band, marked, _shared(block) if band is bands[0] else 0)))
            for place in range(len(block.rows)):
                strips.append((_CELL + _GAP, _cells(block, place, band, _shared(block) if band is bands[0] else 0)))
            strips.append((_BAND_GAP, lambda figure, top: None))
    words = _fold(caption, width - _LEFT - 2 * _CELL - 2 * _GAP - _MARGIN, _TEXT_SIZE)
    strips.append((max(0.4, _LINE_HEIGHT * (words.count("\n") + 1)) + _MARGIN, _foot(words)))

    height = sum(high for high, _ in strips)
    figure = Figure(figsize=(width, height), dpi=_DPI, facecolor="white")
    top = 0.0
    for high, draw in strips:
        draw(figure, top)
        top += high
    return figure


def _fold(text: str, width: float, size: float) -> str:
    """Lines broken to a width in inches."""
    characters = max(8, int(width * 72 / (size * _CHARACTER)))
    return "\n".join("\n".join(textwrap.wrap(line, characters)) for line in text.splitlines())


def _axes(figure: Figure, left: float, top: float, width: float, height: float, label: str) -> Axes:
    """Axes at a place in inches from the upper left corner."""
    whole_width, whole_height = figure.get_size_inches()
    place = (left / whole_width, 1 - (top + height) / whole_height, width / whole_width, height / whole_height)
    axes = figure.add_axes(place, label=label)
    axes.set_axis_off()
    return axes


def _write(figure: Figure, left: float, top: float, text: str, **options: Any) -> None:
    whole_width, whole_height = figure.get_size_inches()
    options = {"fontsize": _TEXT_SIZE, "color": "black", "va": "top", "linespacing": 1.15} | options
    figure.text(left / whole_width, 1 - top / whole_height, text, **options)


def _text(text: str, left: float) -> Callable[[Figure, float], None]:
    return lambda figure, top: _write(figure, left, top, text)


def _shared(block: Block) -> int:
    """How many leading columns all networks share, each drawn once: with the same preprocessing they see the same picture."""
    first = block.rows[0]
    return (1 if first.mask is None else 2) if all(torch.equal(row.image, first.image) for row in block.rows) else 0


def _place(column: int, shared: int = 0) -> float:
    """Left edge of a column; the labels of the rows stand between the shared columns and the others."""
    return (_MARGIN if column < shared else _LEFT) + column * (_CELL + _GAP)


def _titles(band: Sequence[str], marked: Collection[str], shared: int) -> Callable[[Figure, float], None]:
    def draw(figure: Figure, top: float) -> None:
        from matplotlib.lines import Line2D

        whole_width, whole_height = figure.get_size_inches()
        for i, column in enumerate(band):
            title = TITLES.get(column) or _fold(column, _CELL, _TITLE_SIZE)
            middle, bottom = _place(i, shared) + _CELL / 2, top + _TITLE_HEIGHT - 0.04
            _write(figure, middle, bottom, title, ha="center", va="bottom", fontsize=_TITLE_SIZE, linespacing=1.0)
            if column in marked:
                end = _place(i) + _CELL + (_GAP if i + 1 < len(band) and band[i + 1] in marked else 0)
                line = Line2D(
                    [_place(i) / whole_width, end / whole_width],
                    [1 - top / whole_height] * 2,
                    color=_MARK,
                    linewidth=2,
                    solid_capstyle="butt",
                )
                line.set_label(column)
                figure.add_artist(line)

    return draw


def _cells(block: Block, place: int, band: Sequence[str], shared: int) -> Callable[[Figure, float], None]:
    row = block.rows[place]

    def draw(figure: Figure, top: float) -> None:
        name = _fold(row.label, _CELL, _TEXT_SIZE).splitlines()
        name = name if len(name) < 3 else [name[0], name[1][:-1] + "…"]
        edge, centre = _place(shared) - 0.06, top + _CELL / 2
        _write(figure, edge, centre, "\n".join(name), ha="right", va="center", rotation=90, multialignment="center")
        for i, column in enumerate(band):
            if i < shared and place > 0:
                continue
            # A shared picture stands half way down its rows.
            lower = (len(block.rows) - 1) * (_CELL + _GAP) / 2 if i < shared else 0.0
            axes = _axes(figure, _place(i, shared), top + lower, _CELL, _CELL, f"{row.label}: {column}")
            if column == IMAGE:
                axes.imshow(row.image.permute(1, 2, 0).numpy(), vmin=0, vmax=1)
                _note(axes, block.note)
            elif column == OBJECT:
                axes.imshow(row.mask[0].numpy(), cmap="gray", vmin=0, vmax=1)
            else:
                _draw_map(axes, column, row.maps[column], row.mask)

    return draw


def _draw_map(axes: Axes, column: str, values: Tensor | str, mask: Tensor | None) -> None:
    from matplotlib.patches import Rectangle

    if isinstance(values, str):
        axes.add_patch(Rectangle((0, 0), 1, 1, transform=axes.transAxes, facecolor="#eeeeee"))
        reason = _fold(values, _CELL, 8)
        axes.text(0.5, 0.5, reason, transform=axes.transAxes, ha="center", va="center", fontsize=8, color="black")
        return
    values = values.detach().cpu()
    if column == MASK:
        axes.imshow(values[0].numpy(), cmap="gray", vmin=0, vmax=1)
    else:
        peak = values.max()
        axes.imshow((values[0] / (peak if peak > 0 else 1)).numpy(), cmap=_COLOURS, vmin=0, vmax=1)
        if not peak > 0:
            _note(axes, "zero map")
        elif mask is not None:
            _note(axes, f"{float(inside_share(values[None], mask[None])):.2f}")
    if mask is not None:
        _outline(axes, mask)


def _outline(axes: Axes, mask: Tensor) -> None:
    from matplotlib.patheffects import withStroke

    # A border of nothing closes the line where the object touches the edge.
    padded = np.pad(mask[0].numpy().astype(float), 1)
    height, width = padded.shape
    lines = axes.contour(
        np.arange(-1, width - 1), np.arange(-1, height - 1), padded, levels=[0.5], colors="white", linewidths=0.9
    )
    lines.set_path_effects([withStroke(linewidth=1.9, foreground="#00000090")])
    axes.set(xlim=(-0.5, width - 2.5), ylim=(height - 2.5, -0.5))


def _note(axes: Axes, text: str) -> None:
    if text:
        box = {"facecolor": "black", "alpha": 0.65, "linewidth": 0, "pad": 1.5}
        text = _fold(text, _CELL, _TITLE_SIZE)
        axes.text(0.05, 0.05, text, transform=axes.transAxes, color="white", fontsize=_TITLE_SIZE, bbox=box)


def _foot(words: str) -> Callable[[Figure, float], None]:
    def draw(figure: Figure, top: float) -> None:
        from matplotlib.cm import ScalarMappable

        axes = _axes(figure, _LEFT, top + 0.02, 2 * _CELL - 0.1, 0.1, "colour bar")
        axes.set_axis_on()
        bar = figure.colorbar(ScalarMappable(cmap=_COLOURS), cax=axes, orientation="horizontal", ticks=[0, 1])
        bar.ax.set_xticklabels(["0", "its maximum"], fontsize=_TEXT_SIZE, color="black")
        bar.ax.get_xticklabels()[1].set_ha("right")
        bar.ax.get_xticklabels()[0].set_ha("left")
        bar.ax.tick_params(length=0, pad=2)
        bar.outline.set_linewidth(0)
        _write(figure, _place(2), top, words)

    return draw


def png(figure: Figure) -> bytes:
    """The figure as a file; equal figures give equal bytes."""
    content = io.BytesIO()
    figure.savefig(content, format="png", dpi=_DPI, metadata={"Software": None})
    return content.getvalue()
