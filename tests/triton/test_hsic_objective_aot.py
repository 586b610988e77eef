"""hsic_objective's Triton kernels, compiled for GPUs that are not here: registers, stack, and weights that stay float64."""

from __future__ import annotations

import pytest
import torch

from sib_fast import _backends
from sib_fast.ops.hsic_objective import OBJECTIVES

aot = pytest.importorskip("tests.triton.aot")

if _backends.why_not("triton") is not None:
    pytest.skip(f"backend 'triton' is not usable here: {_backends.why_not('triton')}", allow_module_level=True)
if aot.INTERPRETING:
    pytest.skip("TRITON_INTERPRET=1 makes no kernels that can be compiled", allow_module_level=True)


def launches(images, dtype, objective, needs):
    from sib_fast.ops.hsic_objective import triton as kernels

    base = torch.zeros((), dtype=dtype)
    gram, variance = torch.zeros(images, images, dtype=torch.float64), torch.zeros(images, dtype=torch.float64)
    rows, totals = torch.zeros(4, images, dtype=torch.float64), torch.zeros(4, dtype=torch.float64)
    weights = (0.01, 1000.0, objective)

    def step():
        kernels.forward(base, gram, gram, variance, *weights)
        kernels.backward(base, None, None, gram, gram, rows, totals, *weights, *needs)

    return aot.record(step)


def test_a_step_is_three_launches_and_weights_are_float64():
    made = launches(128, torch.float32, OBJECTIVES["exp"], (True, True, True))
    assert [launch.kernel.__name__ for launch in made] == ["hsic_rows_kernel", "hsic_combine_kernel", "hsic_gradient_kernel"]
    assert [launch.grid for launch in made] == [(32,), (1,), (32,)]
    weights = [
        kind
        for launch in made
        for name, kind in launch.signature.items()
        if name in ("lambda_fg", "lambda_bg", "mean_scale", "hsic_scale")
    ]
    assert len(weights) == 9
    assert set(weights) == {"fp64"}


@pytest.mark.sampled(1)
@pytest.mark.parametrize("capability", aot.CAPABILITIES)
def test_no_stack_and_no_spills(capability, drawn):
    """Default options: aligned and odd N, all gradients and the VJP's alone, every objective's combine."""
    every, training, exp = (True, True, True), (True, False, True), OBJECTIVES["exp"]
    cases = [(128, torch.float32, exp, every), (128, torch.float32, exp, training), (33, torch.float64, exp, every)]
    made = [launch for case in cases for launch in launches(*case)]
    made += [launches(128, torch.float32, kind, every)[1] for kind in OBJECTIVES.values()]
    rows = aot.report(drawn(made, aot.name_of), [capability])
    assert len({row.kernel for row in rows}) == 3
    assert [row for row in rows if not row.clean] == [], "\n" + aot.table(rows)
