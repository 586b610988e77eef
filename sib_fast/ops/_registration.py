"""Kernels behind registered ops, whatever language they are written in: one namespace per family, the same schemas in each.

torch.ops.sib_fast         C++ and CUDA (csrc/common/schemas.h)
torch.ops.sib_fast_triton  Triton: defined here, so that a machine without a compiler has it too

Registered, and not plain calls, so that fake tensors, opcheck and `torch.compile(fullgraph=True)` see one opaque op.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable

import torch

from sib_fast._backends import INTERPRETING_TRITON

TRITON = "sib_fast_triton"
_library = torch.library.Library(TRITON, "DEF")


def define_triton_op(schema: str, module: str, function: str) -> None:
    """`torch.ops.sib_fast_triton.<name>`, run by `function` of `module`. The first call imports it, and triton with it."""
    name = schema.split("(", 1)[0]
    _library.define(schema)

    def run(*arguments):
        return getattr(importlib.import_module(module), function)(*arguments)

    for key in ("CUDA", "CPU") if INTERPRETING_TRITON else ("CUDA",):
        _library.impl(name, run, key)


def register_fakes(namespace: str, fakes: Iterable[tuple[str, Callable]]) -> None:
    """Shapes and dtypes of the ops' outputs, for a family whose ops exist in this process."""
    for name, fake in fakes:
        torch.library.register_fake(f"{namespace}::{name}", fake)
