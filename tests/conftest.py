"""Fixtures of the whole suite: kernels, seeds, poisoned memory."""

from __future__ import annotations

import importlib
import os
import signal
from pathlib import Path

import hypothesis
import pytest
import torch

from sib_fast import _backends
from sib_fast.ops._registration import namespace_of, register_fakes
from tests import selection

# Before the emulation is added: what a user can ask a whole loss for by name.
PUBLIC_BACKENDS = (_backends.REFERENCE, *selection.kernels_of(*selection.HEAD))
# A shell's `command &` ignores it in all that the command starts: the tests of Ctrl-C would test nothing.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
EMULATION = Path(__file__).parent.parent / "build/in-place/libsib_fast_cuda_emulated.so"


def _add_emulation() -> None:
    """The CUDA kernels on CPU tensors, thread by thread (csrc/cuda/emulation.h), as one more backend of every op's tests."""
    name, namespace = "emulated", namespace_of("emulated")
    _backends.KERNEL_DEVICES[name] = "cpu"
    _backends.BACKENDS += (name,)
    _backends.MISSING[name] = None if EMULATION.is_file() else "not built: SIB_FAST_BLOCKS=1 builds it"
    if _backends.MISSING[name] is None:
        torch.ops.load_library(str(EMULATION))
    for op in (*selection.HEAD, "batch_norm", "layer_norm"):
        module = importlib.import_module(f"sib_fast.ops.{op}")
        module.KERNELS.append(name)
        if hasattr(module, "LIMITS"):
            module.LIMITS[name] = module.LIMITS["cuda"]
        if _backends.MISSING[name] is None:
            register_fakes(namespace, module.FAKES)
            module.add_kernels(name, namespace)
    if _backends.MISSING[name] is None:  # a double backward is not told a backend: its tests put the kernel in the CPU's place
        register_fakes(namespace, importlib.import_module("sib_fast.ops.softmax").FAKES)


_add_emulation()
# Asked for by cuBLAS where a test turns deterministic algorithms on; read when its first handle is made.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")


def pytest_addoption(pluginmanager):
    pluginmanager.register(selection)


def pytest_configure(config):
    # `poisoned_memory` needs deterministic mode for its filling only.
    config.addinivalue_line("filterwarnings", "ignore:.* does not have a deterministic implementation:UserWarning")


# The same examples in every run, so that a red CI is a changed project; `--hypothesis-profile=explore` looks further.
hypothesis.settings.register_profile("fixed", derandomize=True, deadline=None)
hypothesis.settings.register_profile("explore", max_examples=3000, deadline=None)
hypothesis.settings.load_profile("fixed")


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def _usable(name: str) -> str:
    reason = selection.unusable(name)
    if reason is not None:
        pytest.skip(f"backend {name!r} is not usable here: {reason}")
    return name


@pytest.fixture
def _on_device_of():
    """Makes factory functions of the test put their tensors where the backend runs; `Problem.make` follows them."""
    # cuDNN takes tf32 for float32 convolutions by default: 1e-3, where the tests' networks are compared to 1e-5.
    tf32, torch.backends.cudnn.allow_tf32 = torch.backends.cudnn.allow_tf32, False
    yield lambda name: torch.set_default_device(_backends.KERNEL_DEVICES.get(name, "cpu"))
    torch.set_default_device(None)
    torch.backends.cudnn.allow_tf32 = tf32


def pytest_generate_tests(metafunc):
    if "kernel" in metafunc.fixturenames:
        metafunc.parametrize("kernel", selection.kernels_of_tests(metafunc.module), indirect=True)


@pytest.fixture
def kernel(request, _on_device_of) -> str:
    """Every kernel backend of the op under test; one that is not usable here shows as a skip with its reason."""
    name = _usable(request.param)
    _on_device_of(name)
    return name


@pytest.fixture
def registered(kernel):
    """The registered ops that `kernel` runs: torch.ops.<its namespace>."""
    return getattr(torch.ops, namespace_of(kernel))


@pytest.fixture(params=PUBLIC_BACKENDS)
def backend(request, _on_device_of) -> str:
    """Every backend that a user can name for the whole head, the reference among them."""
    name = _usable(request.param)
    _on_device_of(name)
    return name


@pytest.fixture
def poisoned_memory():
    """Every uninitialised buffer, in Python and in C++, is filled with NaN (integers: the largest value) inside the test."""
    before, fill = torch.are_deterministic_algorithms_enabled(), torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(before)
    torch.utils.deterministic.fill_uninitialized_memory = fill
