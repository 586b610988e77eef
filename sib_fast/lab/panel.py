"""``sib-fast explain``: a picture of where trained networks find their evidence, by every explanation method.

Importing this module needs no extra. Figures are made without pyplot: nobody's current figure or backend changes.
"""

from __future__ import annotations

import argparse
import io
import sys
import textwrap
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from sib_fast import _checks, foreground_mask
from sib_fast.explain import METHODS, REPORTED, UndefinedMethodError, explain
from sib_fast.lab.evaluate import gradient_map, inside_share
from sib_fast.lab.networks import NetworkSpec, load_network
from sib_fast.lab.results import write_atomically

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from PIL.Image import Image

_OP = "explain"
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
_METHODS = (*REPORTED, *(method for method in METHODS if method not in REPORTED))
_CAMS = tuple(method for method in METHODS if "cam" in method)
_WINDOW = 31  # of sib_fast.SIBLoss

# Inches and points. Six columns are then 8 in wide: on a page of 900 px a title is 17 px high, on a phone 7.
_CELL, _GAP, _LEFT, _MARGIN = 1.2, 0.06, 0.46, 0.1
_TITLE_SIZE, _TEXT_SIZE = 11.5, 10
_TITLE_HEIGHT, _LINE_HEIGHT, _BAND_GAP = 0.44, 0.17, 0.14
_DPI = 150
_CHARACTER = 0.58  # of the font size: wider than the mean character of matplotlib's font, so that what is wrapped by it fits
_COLOURS, _MARK = "inferno", "#c8511b"


@dataclass(frozen=True)
class _Row:
    """What one network makes of one image: image [3, H, W] in [0, 1], mask [1, H, W] bool, maps [1, H, W] or why not."""

    label: str
    image: Tensor
    mask: Tensor | None
    maps: Mapping[str, Tensor | str]


@dataclass(frozen=True)
class _Block:
    """All rows of one image, the lines above them, and the words on the image."""

    rows: Sequence[_Row]
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
        row = [_Row(label, images[i], mask, {column: values[i] for column, values in maps.items()}) for label, maps in rows]
        blocks.append(_Block(row, note="" if notes is None else notes[i]))
    return _draw(blocks, caption=caption, marked=marked, wrap=wrap)


def explanation_panel(
    checkpoints: Sequence[Path | str],
    images: Sequence[Path | str],
    masks: Sequence[Path | str] | None = None,
    *,
    target: str | int | None = None,
    methods: Sequence[str] = _METHODS,
    layer: str | None = None,
    window_size: int | None = None,
) -> Figure:
    """The picture of ``sib-fast explain``: image, masks, VJP and explanations of each image by each network.

    Every network sees an image as its own file says: short side resized to its image size, centre crop, its normalisation.

    Args:    checkpoints: files of :func:`sib_fast.lab.networks.save_network`, with the same classes. masks: one file per image,
             in order; nonzero is the object. target: the class to explain, by name or index; None is each network's own
             prediction. layer: for the CAMs, a name in the networks; default :func:`sib_fast.explain.find_layer`, and a
             network without such a layer has the reason in place of its CAMs. window_size: of the S-IB mask; default what
             the first file says that has it in its notes on training, or 31; at most the image's size.
    Errors:  FileNotFoundError, ValueError, TypeError; ImportError that names the extra.
    """
    return _draw_explanations(_explained(checkpoints, images, masks, target, methods, layer, window_size), target)


# ---- what is drawn ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Network:
    label: str
    spec: NetworkSpec
    model: nn.Module


def _explained(
    checkpoints: Sequence[Path | str],
    images: Sequence[Path | str],
    masks: Sequence[Path | str] | None,
    target: str | int | None,
    methods: Sequence[str],
    layer: str | None,
    window_size: int | None,
) -> list[_Block]:
    """A block per image. Everything that can be wrong with the arguments is found before the first explanation."""
    for method in methods:
        _checks.require_choice(_OP, "method", method, _METHODS)
    if not methods or not checkpoints or not images:
        raise ValueError(
            f"{_OP}: checkpoints, images and methods must each hold at least one, got {len(checkpoints)}, {len(images)} and "
            f"{len(methods)}"
        )
    if layer is not None and not set(methods) & set(_CAMS):
        raise ValueError(f"{_OP}: layer must be left out without one of {', '.join(_CAMS)} among the methods, got {layer!r}")
    if masks is not None and len(masks) != len(images):
        raise ValueError(f"{_OP}: masks must be as many as images, in their order, got {len(masks)} for {len(images)}")
    if window_size is not None:
        _checks.require_window(_OP, window_size)
    _require_extras(methods)
    pictures = [_open(path, "image") for path in images]
    objects = [None if masks is None else _open_mask(masks[i], picture) for i, picture in enumerate(pictures)]
    networks = _load(checkpoints, layer)
    # One window for all, or masks side by side could not be compared.
    noted = (network.spec.training.get("window_size") for network in networks)
    window = window_size or next(filter(None, noted), _WINDOW)
    index = None if target is None else _class_index(target, networks[0].spec.classes)
    inputs = [[_crops(n.spec, p, o) for n in networks] for p, o in zip(pictures, objects, strict=True)]
    for path, crops in zip(masks or (), inputs, strict=False):
        for _, mask in crops:
            if not mask.any():
                raise ValueError(f"{_OP}: mask must mark a pixel of the centre crop that the network sees, got none in {path}")
    blocks = []
    for path, crops in zip(images, inputs, strict=True):
        rows, lines = [], [Path(path).name]
        for network, (image, mask) in zip(networks, crops, strict=True):
            row, said = _explain_row(network, image, mask, index, tuple(dict.fromkeys(methods)), layer, window)
            rows.append(row)
            lines.append(said)
        blocks.append(_Block(rows, header="\n".join(lines)))
    return blocks


def _explain_row(
    network: _Network,
    image: Tensor,
    mask: Tensor | None,
    target: int | None,
    methods: Sequence[str],
    layer: str | None,
    window: int,
) -> tuple[_Row, str]:
    spec, x = network.spec, network.spec.normalise(image)[None]
    with torch.no_grad():
        probabilities = network.model(x).double().softmax(dim=1)[0]
    best = int(probabilities.argmax())
    said = f"{network.label} predicts {spec.classes[best]}, probability {probabilities[best]:.2f}"
    if target is not None:
        said += f"; explained: {spec.classes[target]}, probability {probabilities[target]:.2f}"
    vjp = gradient_map(network.model, x)
    window = min(window, spec.image_size - 1 + spec.image_size % 2)  # the largest odd one within the image
    # The mask looks at |mean over channels| only, which is what gradient_map returns.
    maps: dict[str, Tensor | str] = {MASK: foreground_mask(vjp, window_size=window)[0], VJP: vjp[0]}
    for method in methods:
        at = layer if method in _CAMS else None
        try:
            maps[method] = explain(network.model, x, best if target is None else target, method, layer=at)[0]
        except UndefinedMethodError as error:
            maps[method] = str(error).split(": ")[1]  # the rule and what was found, without the op and the advice
    return _Row(network.label, image, mask, maps), said


def _load(checkpoints: Sequence[Path | str], layer: str | None) -> list[_Network]:
    paths = [Path(path) for path in checkpoints]
    labels = _labels(paths)
    networks = []
    for i, path in enumerate(paths):
        if not path.is_file():
            raise FileNotFoundError(f"{_OP}: checkpoint must be an existing file, got {path}")
        spec, model = load_network(path)
        networks.append(_Network(labels[i], spec, model))
        if spec.classes != networks[0].spec.classes:
            raise ValueError(
                f"{_OP}: checkpoints must have the same classes, got {_listed(networks[0].spec.classes)} in {paths[0]} and "
                f"{_listed(spec.classes)} in {path}"
            )
        if layer is not None and (not layer or layer not in dict(model.named_modules())):
            first = _listed([name for name, _ in model.named_children()])
            raise ValueError(f"{_OP}: layer must be a name in every network's named_modules(), got {layer!r}; {path} has {first}")
    return networks


def _labels(paths: Sequence[Path]) -> list[str]:
    """File names without suffix, with as many folders before them as tell them apart."""
    for length in range(1, 1 + max(len(path.parts) for path in paths)):
        labels = ["/".join(path.with_suffix("").parts[-length:]) for path in paths]
        if len(set(labels)) == len(labels):
            break
    return labels


def _class_index(target: str | int, classes: Sequence[str]) -> int:
    if target in classes:
        return classes.index(target)
    if str(target).isdecimal() and int(target) < len(classes):
        return int(target)
    raise ValueError(
        f"{_OP}: target must be a class's name or its index below {len(classes)}, got {target!r}; classes: {_listed(classes)}"
    )


def _listed(names: Sequence[str], most: int = 12) -> str:
    return f"{len(names)} ({', '.join(names[:most])}{', …' if len(names) > most else ''})"


def _require_extras(methods: Sequence[str]) -> None:
    needed = {"PIL": "pillow", "matplotlib": "matplotlib"}
    if set(methods) - set(_CAMS):
        needed["captum"] = "captum"
    if set(methods) & set(_CAMS):
        needed["pytorch_grad_cam"] = "grad-cam"
    for module, package in needed.items():
        try:
            __import__(module)
        except ImportError as error:
            raise ImportError(f"{_OP}: {package} must be installed, got {error}; pip install 'sib_fast[explain]'") from error


# ---- files --------------------------------------------------------------------------------------------------------------


def _open(path: Path | str, what: str) -> Image:
    """The picture as a viewer shows it: turned as its EXIF orientation says."""
    import PIL.Image
    import PIL.ImageOps

    if not Path(path).is_file():
        raise FileNotFoundError(f"{_OP}: {what} must be an existing file, got {path}")
    try:
        with PIL.Image.open(path) as file:
            picture = PIL.ImageOps.exif_transpose(file)
            picture.load()
            return picture.convert("RGB") if what == "image" else picture
    except Exception as error:  # whatever a decoder can throw at a foreign file
        got = f"{type(error).__name__}: {error}"
        raise ValueError(f"{_OP}: {what} must be an image that pillow can read, got {path} ({got})") from error


def _open_mask(path: Path | str, picture: Image) -> Image:
    """255 at the object, 0 elsewhere. A palette's entry is its index, and opacity does not count."""
    import PIL.Image

    mask = _open(path, "mask")
    if mask.mode in ("LA", "PA", "RGBA", "La", "RGBa"):
        mask = mask.convert("RGB")
    (width, height), (its_width, its_height) = picture.size, mask.size
    # Equal up to the rounding of a resize.
    if abs(width * its_height - its_width * height) > max(width, height, its_width, its_height):
        raise ValueError(
            f"{_OP}: mask must have the image's proportions, got {its_width}×{its_height} for {width}×{height} in {path}"
        )
    values = np.asarray(mask)
    values = values.any(axis=2) if values.ndim == 3 else values != 0
    return PIL.Image.fromarray(values.astype(np.uint8) * 255)


def _crops(spec: NetworkSpec, picture: Image, mask: Image | None) -> tuple[Tensor, Tensor | None]:
    """Image [3, S, S] in [0, 1] and mask [1, S, S] bool: the same centred square of both, the whole short side."""
    from PIL.Image import Resampling
    from PIL.ImageOps import fit

    size = (spec.image_size, spec.image_size)
    pixels = np.asarray(fit(picture, size, Resampling.BILINEAR), dtype=np.float32) / 255
    image = torch.from_numpy(pixels).permute(2, 0, 1).contiguous()
    return image, None if mask is None else torch.from_numpy(np.asarray(fit(mask, size, Resampling.NEAREST)) > 0)[None]


# ---- drawing ------------------------------------------------------------------------------------------------------------

_EXPLANATION = (
    "Each map over its own maximum. VJP: what S-IB trains on, |mean over channels| of the gradient of ½‖softmax‖²; "
    "S-IB mask: the region that training would take for the object."
)


def _draw_explanations(blocks: Sequence[_Block], target: str | int | None) -> Figure:
    first = blocks[0].rows[0]
    caption = _EXPLANATION
    if first.mask is not None:
        caption += " Line: outline of the true object. Number: share of the map inside it."
    if any(method in REPORTED for method in first.maps):
        caption += " Bar above a title: one of the six methods that we report."
    if target is None:
        caption += " Methods explain each network's own prediction."
    return _draw(blocks, caption=caption, marked=REPORTED, wrap=6)


def _draw(blocks: Sequence[_Block], *, caption: str, marked: Collection[str], wrap: int) -> Figure:
    """Strips from top to bottom: an image's header, then for each band of columns its titles and a row per network."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError(f"{_OP}: matplotlib must be installed, got {error}; pip install 'sib_fast[explain]'") from error

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


def _shared(block: _Block) -> int:
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


def _cells(block: _Block, place: int, band: Sequence[str], shared: int) -> Callable[[Figure, float], None]:
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


# ---- the command --------------------------------------------------------------------------------------------------------


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``sib-fast explain``."""
    parser.add_argument("--checkpoint", type=Path, action="append", required=True, metavar="FILE", dest="checkpoints",
                        help="a network that sib-fast train wrote; again for another one to compare with")  # fmt: skip
    parser.add_argument("--image", type=Path, nargs="+", required=True, metavar="FILE", dest="images", help="what to explain")
    parser.add_argument("--mask", type=Path, nargs="+", metavar="FILE", dest="masks",
                        help="an image per --image, in the same order, that is nonzero at the true object")  # fmt: skip
    parser.add_argument("--target", metavar="CLASS", help="name or index (default: each network's own prediction)")
    parser.add_argument("--methods", nargs="+", default=_METHODS, metavar="METHOD", help=f"default: {' '.join(_METHODS)}")
    parser.add_argument("--layer", metavar="NAME", help="for the CAMs (default: the last feature map)")
    parser.add_argument("--window-size", type=int, metavar="PIXELS",
                        help=f"of the S-IB mask (default: a checkpoint's own or {_WINDOW}, at most the image)")  # fmt: skip
    parser.add_argument("--out", type=Path, required=True, metavar="PATH",
                        help="a .png for all images in one picture, or a folder for one .png per image")  # fmt: skip


def main(args: argparse.Namespace) -> int:
    """Run with the options of :func:`add_arguments`. Returns 0, 2 for a bad option; then no file has changed."""
    try:
        paths = _outputs(args.out, args.images)
        blocks = _explained(args.checkpoints, args.images, args.masks, args.target, args.methods, args.layer, args.window_size)
        pictures = [blocks] if len(paths) == 1 else [[block] for block in blocks]
        files = [png(_draw_explanations(picture, args.target)) for picture in pictures]
        for path, content in zip(paths, files, strict=True):
            path.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(path, content)
            print(path)
    except (ValueError, TypeError, ImportError, OSError) as error:
        print(f"sib-fast explain: {str(error).removeprefix('explain: ')}", file=sys.stderr)
        return 2
    return 0


def _outputs(out: Path, images: Sequence[Path]) -> list[Path]:
    """The files to write: one for all images, or one for each."""
    if out.suffix.lower() == ".png" and not out.is_dir():
        return [out]
    if out.is_file() or (out.suffix and not out.is_dir()):
        raise ValueError(f"{_OP}: out must end in .png or be a folder, got {out}")
    names = [f"{image.stem}.png" for image in images]
    if len(set(names)) < len(names):
        raise ValueError(f"{_OP}: images must have different names for a folder, got {', '.join(map(str, images))}")
    return [out / name for name in names]
