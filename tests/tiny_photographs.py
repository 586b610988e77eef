"""The photographs' gate and study at a size that tests can train."""

from __future__ import annotations

import dataclasses

import pytest

from benchmarks import photographs_gate, photographs_training


def shrink(monkeypatch: pytest.MonkeyPatch, tests: int) -> None:
    """The small setting alone, two steps of training."""
    setting = dataclasses.replace(
        photographs_training.SETTINGS["small"],
        options={"width": 2},
        image_size=32,
        epochs=1,
        batch_size=6,
        window=7,
        lambdas=(1e5,),
    )
    for module in (photographs_gate, photographs_training):
        monkeypatch.setattr(module, "SETTINGS", {"small": setting})
    for name, value in {"TRAINING": 12, "TESTS": tests, "EXPLAINED": 6}.items():
        monkeypatch.setattr(photographs_training, name, value)
