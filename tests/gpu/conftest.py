"""What needs a GPU. Without one every test here skips; on the pretend device (tests/pretend.py) those not marked real_gpu run."""

from __future__ import annotations

import warnings

import pytest
import torch

from sib_fast import _backends


def pytest_configure(config):
    config.addinivalue_line("markers", "real_gpu: uses streams, graphs, memory or kernels that only CUDA has")


@pytest.fixture(autouse=True)
def _needs_a_gpu(request):
    pretended = _backends.KERNEL_DEVICES["cuda"] != "cuda"
    if not torch.cuda.is_available() and (not pretended or request.node.get_closest_marker("real_gpu")):
        pytest.skip("torch sees no GPU")


@pytest.fixture
def on_gpu(_on_device_of):
    """Factory functions put their tensors on the GPU."""
    _on_device_of("cuda")


@pytest.fixture
def no_synchronisation():
    """Inside, an op that makes the host wait for the device raises."""
    torch.cuda.synchronize()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that the mode is a prototype
        torch.cuda.set_sync_debug_mode("error")
    yield
    torch.cuda.set_sync_debug_mode("default")
