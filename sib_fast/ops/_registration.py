"""Kernels behind registered ops, whatever language they are written in: one namespace per family, the same schemas in each.

torch.ops.sib_fast         C++ and CUDA (csrc/common/schemas.h)
torch.ops.sib_fast_triton  Triton: defined here, so that a machine without a compiler has it too

Registered, and not plain calls, so that fake tensors, opcheck and `torch.compile(fullgraph=True)` see one opaque op.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence

import torch

from sib_fast._backends import INTERPRETING_TRITON
from sib_fast._extension import MISSING

TRITON = "sib_fast_triton"
_library = torch.library.Library(TRITON, "DEF")


def _define_triton_op(schema: str, module: str, function: str) -> None:
    """`torch.ops.sib_fast_triton.<name>`, run by `function` of `module`. The first call imports it, and triton with it."""
    name = schema.split("(", 1)[0]
    _library.define(schema)

    def run(*arguments):
        return getattr(importlib.import_module(module), function)(*arguments)

    for key in ("CUDA", "CPU") if INTERPRETING_TRITON else ("CUDA",):
        _library.impl(name, run, key)


def register_fakes(namespace: str, fakes: Sequence[tuple[str, Callable]]) -> None:
    """Shapes and dtypes of the ops' outputs, for a family whose ops exist in this process."""
    for name, fake in fakes:
        torch.library.register_fake(f"{namespace}::{name}", fake)


def register_head_op(
    op: str, schemas: tuple[str, str], fakes: Sequence[tuple[str, Callable]], add_kernels: Callable[[str, str], None]
) -> None:
    """The value and the gradient of one op of the head, in every family that exists in this process.

    schemas, fakes: of the two, value first. The schemas are Triton's, and the same as in csrc/common/schemas.h (a test
    compares); its kernels are `forward` and `backward` of sib_fast/ops/<op>/triton.py. add_kernels(backend, namespace).
    """
    if MISSING["cpu"] is None:
        register_fakes("sib_fast", fakes)
        for backend in ("cpu", "cuda"):
            add_kernels(backend, "sib_fast")
    if MISSING["triton"] is None:
        for schema, function in zip(schemas, ("forward", "backward"), strict=True):
            _define_triton_op(schema, f"sib_fast.ops.{op}.triton", function)
        register_fakes(TRITON, fakes)
        add_kernels("triton", TRITON)
