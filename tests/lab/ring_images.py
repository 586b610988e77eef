"""Images for the shortcut test.

Channel 0 is the background's, whose level says the class; channel 1 the object's, whose level says it too; channel 2 marks the
object and the inside of its box.
"""

from __future__ import annotations

import torch

SIZE = 24
LEVELS = torch.tensor([0.3, 0.5, 0.7, 0.9])


def item(label, place, image_size=SIZE):
    """A ring as object, so that its box has background inside it."""
    top, left = 2 + place % 7, 2 + place % 5
    mask = torch.zeros(1, image_size, image_size, dtype=torch.bool)
    mask[:, top : top + 9, left : left + 9] = True
    mask[:, top + 3 : top + 6, left + 3 : left + 6] = False
    image = torch.zeros(3, image_size, image_size)
    image[0] = LEVELS[label]
    image[2, top : top + 9, left : left + 9] = 1.0
    image[0, mask[0]] = 0.0
    image[1, mask[0]] = LEVELS[label]
    return image, label, mask
