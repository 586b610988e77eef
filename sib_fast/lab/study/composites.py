"""The data of a network of a study."""

from __future__ import annotations

from typing import Any

from sib_fast.lab.data import EmbeddedDigits, Split


def composites(split: Split, settings: dict[str, Any], seed: int, *, shifted: bool = False) -> EmbeddedDigits:
    """The training or a test set of a seed, as the study's settings have it. shifted: backgrounds independent of the class."""
    least, greatest = settings["object_share"]
    return EmbeddedDigits(
        split,
        settings[f"{split}_size"],
        correlation=0.0 if shifted else settings["correlation"],
        image_size=settings["image_size"],
        seed=seed,
        object_share=(least, greatest),
        contrast=settings["contrast"],
    )
