"""The study's picture: the first test images, and where each of two networks finds its evidence."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sib_fast.explain import REPORTED, explain
from sib_fast.lab.data import denormalise
from sib_fast.lab.evaluate import gradient_map
from sib_fast.lab.grid import VJP, draw_panel, png
from sib_fast.lab.networks import load_network
from sib_fast.lab.results import write_atomically
from sib_fast.lab.study.composites import composites
from sib_fast.lab.study.measures import method_options
from sib_fast.lab.study.records import file_stem
from sib_fast.lab.study.variants import ARCHITECTURES, LABELS

_IMAGES = 4
_SHORT = {"plain": "plain", "sib": "S-IB"}


def save_picture(out: Path, arch: str, variants: Sequence[str], seed: int, settings: dict[str, Any]) -> Path:
    """Write ``panel.png``: shifted test images, the VJP and the six reported methods, a row per variant.

    The images are the first of the first classes, not chosen by eye.
    """
    data = composites("test", settings, seed, shifted=True)
    first = [int((data.labels == k).nonzero()[0]) for k in data.labels.unique()][:_IMAGES]
    images, labels = data.images[first], data.labels[first]
    rows = []
    for variant in variants:
        _, model = load_network(out / "networks" / f"{file_stem(arch, variant, seed)}.pt")
        maps = {VJP: gradient_map(model, images)}
        maps |= {m: explain(model, images, labels, m, **method_options(m)) for m in REPORTED}
        rows.append((_SHORT.get(variant, variant), maps))
    names = " and ".join(LABELS.get(v, v) for v in variants)
    caption = (
        f"{names[:1].upper()}{names[1:]}, {ARCHITECTURES[arch]}, seed {seed}. "
        "Test images on backgrounds that do not belong to their class, "
        "the first of each class. Each map over its own maximum; line: outline of the true object; number: share of the map "
        "inside it. VJP: what S-IB trains on. Bar: the six reported methods, explaining the true class."
    )
    figure = draw_panel(
        rows, denormalise(images), data.masks[first], notes=[str(int(k)) for k in labels], caption=caption, marked=REPORTED
    )
    write_atomically(out / "panel.png", png(figure))
    return out / "panel.png"
