"""How much matrix and convolution work our ops are, for torch.utils.flop_counter.FlopCounterMode, which counts 0 without.

Importing that module imports triton, so the formulas are handed over when somebody else imports it.
"""

from __future__ import annotations

import importlib.machinery
import sys
from collections.abc import Callable
from typing import Any

from torch._ops import OpOverloadPacket

_COUNTER = "torch.utils.flop_counter"
_FORMULAS: dict[OpOverloadPacket, Callable[..., int]] = {}


def register_flops(op: OpOverloadPacket, formula: Callable[..., int]) -> None:
    """formula(*arguments of the op, out_val=its result) -> flops, 2 a multiply-add; it may import torch.utils.flop_counter."""
    _FORMULAS[op] = formula
    if _COUNTER in sys.modules:
        _hand_over(sys.modules[_COUNTER])


def _hand_over(counter: Any) -> None:
    for op, formula in _FORMULAS.items():
        if op not in counter.flop_registry:
            counter.register_flop_formula(op, get_raw=True)(formula)


class _WhenImported:
    """A finder for that one module: the usual one's answer, and then the formulas."""

    @staticmethod
    def find_spec(name: str, path: Any = None, target: Any = None) -> importlib.machinery.ModuleSpec | None:
        spec = importlib.machinery.PathFinder.find_spec(name, path) if name == _COUNTER else None
        if spec is not None and spec.loader is not None:
            run = spec.loader.exec_module

            def exec_module(module: Any) -> None:
                run(module)
                _hand_over(module)

            spec.loader.exec_module = exec_module
        return spec


sys.meta_path.insert(0, _WhenImported)
