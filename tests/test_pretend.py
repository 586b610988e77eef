"""The suite's own device-correctness, without a GPU: on a pretend device (tests/pretend.py) the "cuda" half of it runs."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from sib_fast import _backends
from tests import selection
from tests.pretend import DEVICE, DeviceMismatch, PretendMode, PretendTensor

ROOT = Path(__file__).parent.parent


def test_a_tensor_there_is_not_one_of_the_cpu():
    with PretendMode():
        there, here = torch.ones(3, device=DEVICE), torch.ones(3)
        assert isinstance(there, PretendTensor)
        assert there.device.type == DEVICE
        with pytest.raises(DeviceMismatch, match="a CPU tensor of"):
            there + here
        with pytest.raises(DeviceMismatch, match="generator must be on the device"):
            torch.randn(3, device=DEVICE, generator=torch.Generator("cpu"))
        with pytest.raises(TypeError, match="numpy"):
            there.numpy()
        total = there.requires_grad_() * 2 + torch.ones(())  # a CPU scalar may meet any device
        assert torch.equal(torch.autograd.grad(total.sum(), there)[0].cpu(), torch.full((3,), 2.0))
        assert (there.detach().cpu() + here).sum() == 6


@pytest.mark.skipif(_backends.MISSING["cpu"] is not None, reason="runs the CPU's kernels")
@pytest.mark.skipif(
    torch.__version__ < "2.14", reason="a tensor subclass under the second derivative: the newest torch is enough"
)
def test_tests_of_ops_and_loss_put_everything_on_the_device_under_test(request):
    """The quick ones, grids by a sample; all: `python -m pytest --long -p tests.pretend tests/ops tests/test_loss.py -k cuda`."""
    wanted = "cuda and (natural or options or layouts or plain_step or degenerate or half or synchronises)"
    command = [
        sys.executable, "-m", "pytest", "-q", "-x", "-p", "tests.pretend", "-p", "no:cacheprovider", "-k", wanted,
        "tests/ops", "tests/test_loss.py", "tests/test_autocast.py", *selection.passed_on(request.config),
    ]  # fmt: skip
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert result.returncode == 0, result.stdout[-3000:]
    assert int(re.search(r"(\d+) passed", result.stdout).group(1)) > (100 if request.config.option.long else 60)
