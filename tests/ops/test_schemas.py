"""The head's ops have one schema, written for C++ and again for Triton, which must work where nothing was compiled."""

from __future__ import annotations

import pytest
import torch

from sib_fast import _backends

OPS = ("_foreground_mask", "_region_statistics", "_hsic_objective")


@pytest.mark.parametrize("name", [name + part for name in OPS for part in ("", "_backward")])
def test_triton_ops_have_the_compiled_ops_schemas(name):
    for backend in ("cpu", "triton"):
        if _backends.why_not(backend) is not None:
            pytest.skip(f"backend {backend!r} is not usable here: {_backends.why_not(backend)}")
    compiled, triton = (getattr(getattr(torch.ops, space), name).default._schema for space in ("sib_fast", "sib_fast_triton"))
    assert str(compiled).split("::")[1] == str(triton).split("::")[1]
