"""Kernels behind registered ops, whatever language they are written in: one namespace per family, the same schemas in each.

torch.ops.sib_fast            the compiled libraries: C++ and CUDA (csrc/common/schemas.h)
torch.ops.sib_fast_<backend>  a backend written in Python, such as Triton: defined here, for machines without a compiler too

Registered, and not plain calls, so that fake tensors, opcheck and `torch.compile(fullgraph=True)` see one opaque op.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence

import torch

from sib_fast._backends import KERNEL_DEVICES
from sib_fast._extension import MISSING

# The backends of the compiled libraries. The kernels of every other one are Python.
COMPILED = ("cpu", "cuda")
LIBRARIES: dict[str, torch.library.Library] = {}


def namespace_of(backend: str) -> str:
    """Where the ops that `backend` runs are: torch.ops.<this>."""
    return "sib_fast" if backend in COMPILED else f"sib_fast_{backend}"


def _define_python_op(backend: str, schema: str, module: str, function: str) -> None:
    """An op of a backend written in Python, run by `function` of `module`. The first call imports it, and triton with it."""
    if backend not in LIBRARIES:
        LIBRARIES[backend] = torch.library.Library(namespace_of(backend), "DEF")

    def run(*arguments):
        return getattr(importlib.import_module(module), function)(*arguments)

    LIBRARIES[backend].define(schema)
    LIBRARIES[backend].impl(schema.split("(", 1)[0], run, KERNEL_DEVICES[backend].upper())


def register_fakes(namespace: str, fakes: Sequence[tuple[str, Callable]]) -> None:
    """Shapes and dtypes of the ops' outputs, for a family whose ops exist in this process."""
    for name, fake in fakes:
        torch.library.register_fake(f"{namespace}::{name}", fake)


def register_head_op(
    op: str,
    kernels: Sequence[str],
    schemas: tuple[str, str],
    fakes: Sequence[tuple[str, Callable]],
    add_kernels: Callable[[str, str], None],
) -> None:
    """The value and the gradient of one op of the head, in every backend of `kernels` that exists in this process.

    schemas, fakes: of the two, value first. The schemas are those of csrc/common/schemas.h (a test compares). The kernels of a
    backend written in Python are `forward` and `backward` of sib_fast/ops/<op>/<backend>.py. add_kernels(backend, namespace).
    """
    # The CPU's library holds the schemas of both compiled ones.
    present = [name for name in kernels if MISSING["cpu" if name in COMPILED else name] is None]
    for backend in present:
        if backend not in COMPILED:
            for schema, function in zip(schemas, ("forward", "backward"), strict=True):
                _define_python_op(backend, schema, f"sib_fast.ops.{op}.{backend}", function)
        add_kernels(backend, namespace_of(backend))
    for namespace in dict.fromkeys(map(namespace_of, present)):
        register_fakes(namespace, fakes)
