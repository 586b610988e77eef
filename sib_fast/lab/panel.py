"""``sib-fast explain``: a picture of where trained networks find their evidence, by every explanation method.

Importing this module needs no extra.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn

from sib_fast import _checks, foreground_mask
from sib_fast.explain import METHODS, REPORTED, UndefinedMethodError, explain
from sib_fast.lab.evaluate import gradient_map
from sib_fast.lab.grid import MASK, VJP, Block, Row, draw_blocks, draw_panel, png
from sib_fast.lab.networks import NetworkSpec, load_network
from sib_fast.lab.results import write_atomically

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from PIL.Image import Image

__all__ = ["add_arguments", "draw_panel", "explanation_panel", "main"]

_OP = "explain"
_METHODS = (*REPORTED, *(method for method in METHODS if method not in REPORTED))
_CAMS = tuple(method for method in METHODS if "cam" in method)
_WINDOW = 31  # of sib_fast.SIBLoss


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
) -> list[Block]:
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
        blocks.append(Block(rows, header="\n".join(lines)))
    return blocks


def _explain_row(
    network: _Network,
    image: Tensor,
    mask: Tensor | None,
    target: int | None,
    methods: Sequence[str],
    layer: str | None,
    window: int,
) -> tuple[Row, str]:
    spec, x = network.spec, network.spec.normalise(image)[None]
    with torch.no_grad():
        probabilities = network.model(x).double().softmax(dim=1)[0]
    best = int(probabilities.argmax())
    said = f"{network.label} predicts {spec.classes[best]}, probability {probabilities[best]:.2f}"
    if target is not None:
        said += f"; explained: {spec.classes[target]}, probability {probabilities[target]:.2f}"
    if mask is not None:
        said += f"; a uniform map has {mask.double().mean():.2f} inside"
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
    return Row(network.label, image, mask, maps), said


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
    _checks.require_package(_OP, "pillow", "explain", "PIL")
    _checks.require_package(_OP, "matplotlib", "explain")
    if set(methods) - set(_CAMS):
        _checks.require_package(_OP, "captum", "explain")
    if set(methods) & set(_CAMS):
        _checks.require_package(_OP, "grad-cam", "explain", "pytorch_grad_cam")


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


_EXPLANATION = (
    "Each map over its own maximum. VJP: what S-IB trains on, |mean over channels| of the gradient of ½‖softmax‖²; "
    "S-IB mask: the region that training would take for the object."
)


def _draw_explanations(blocks: Sequence[Block], target: str | int | None) -> Figure:
    first = blocks[0].rows[0]
    caption = _EXPLANATION
    if first.mask is not None:
        caption += " Line: outline of the true object. Number: share of the map inside it."
    if any(method in REPORTED for method in first.maps):
        caption += " Bar above a title: one of the six methods that we report."
    if target is None:
        caption += " Methods explain each network's own prediction."
    return draw_blocks(blocks, caption=caption, marked=REPORTED, wrap=6)


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
