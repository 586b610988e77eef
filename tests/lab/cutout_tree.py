"""A tiny tree of cut-outs: every object and every background has a colour that says which it is."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

CLASSES = ("ant", "bee", "cat")
KINDS = ("grass", "sand", "snow")
# red names the object, green and blue the background
OBJECTS = {f"{name}/{k}.png": (250 - 10 * (5 * c + k), 0, 0) for c, name in enumerate(CLASSES) for k in range(4)}
BACKGROUNDS = {f"{kind}/{k}.png": (0, 100 + 40 * c, 20 * k) for c, kind in enumerate(KINDS) for k in range(3)}


def write_cutouts(root: Path) -> Path:
    """Objects are rectangles of 12x8 in images of 20x16 whose rest is transparent and white; backgrounds are of one colour."""
    for name, colour in OBJECTS.items():
        pixels = np.full((16, 20, 4), 255, np.uint8)
        pixels[..., 3] = 0
        pixels[3:11, 5:17] = (*colour, 255)
        path = root / "objects" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(path)
    for name, colour in BACKGROUNDS.items():
        path = root / "backgrounds" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (40, 30), colour).save(path)
    return root
