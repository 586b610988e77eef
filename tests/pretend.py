"""A device that is not the CPU, for machines that have nothing else: `python -m pytest -p tests.pretend tests/ops -k cuda`.

Tensors say that they live on "meta" and hold real numbers on the CPU. They refuse to meet a CPU tensor of one or more
dimensions, a CPU generator or NumPy, as CUDA tensors do; so a test, or a line of the package, that forgets the device is
found without a GPU. Backend "cuda" then runs the CPU's kernels on them. It says nothing about any CUDA kernel.
"""

from __future__ import annotations

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

DEVICE = "meta"
# What may take both: copies between devices, and the ops that index by a CPU tensor, as in PyTorch.
_CROSSING = ("_to_copy", "copy_", "index.Tensor", "index_put", "_index_put_impl_", "is_same_size", "item", "_local_scalar_dense")


class DeviceMismatch(RuntimeError):
    pass


class PretendTensor(torch.Tensor):
    """Real numbers in `held`, which lives on the CPU; every property of the tensor but its device is that of `held`."""

    held: torch.Tensor

    @staticmethod
    def __new__(cls, real: torch.Tensor):
        self = torch.Tensor._make_wrapper_subclass(
            cls, real.shape, strides=real.stride(), storage_offset=real.storage_offset(), dtype=real.dtype, device=DEVICE
        )
        self.held = real
        return self

    def __repr__(self, **_) -> str:
        return f"Pretend({self.held!r})"

    def numpy(self, *_, **__):
        raise TypeError("can't convert a device tensor to numpy; use Tensor.cpu()")

    def __format__(self, spec: str) -> str:
        return format(self.held.detach(), spec)

    def tolist(self):
        return self.held.detach().tolist()

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return dispatch(func, args, kwargs or {})


def dispatch(func, args, kwargs):
    device = kwargs.get("device")
    seen_device = False

    def look(value):
        nonlocal seen_device
        seen_device |= isinstance(value, PretendTensor)
        return value

    tree_map(look, (args, kwargs))
    name = func._schema.name.split("::")[-1] + "." + func._overloadname
    on_device = torch.device(device).type == DEVICE if device is not None else seen_device
    if seen_device and not any(name.startswith(crossing) for crossing in _CROSSING):

        def refuse(value):
            if isinstance(value, torch.Tensor) and not isinstance(value, PretendTensor) and value.ndim > 0:
                raise DeviceMismatch(f"{name}: all tensors must be on one device, got a CPU tensor of {list(value.shape)} too")

        tree_map(refuse, (args, kwargs))
    if on_device and isinstance(kwargs.get("generator"), torch.Generator):
        raise DeviceMismatch(f"{name}: generator must be on the device, got one of the CPU")
    plain = tree_map(lambda v: v.held if isinstance(v, PretendTensor) else v, (args, kwargs))
    if device is not None and torch.device(device).type == DEVICE:
        plain[1]["device"] = torch.device("cpu")
        plain[1].pop("pin_memory", None)
    out = func(*plain[0], **plain[1])
    if not on_device:
        return out
    if func._schema.is_mutable and seen_device and isinstance(args[0], PretendTensor) and out is plain[0][0]:
        return args[0]
    return tree_map(lambda v: PretendTensor(v) if isinstance(v, torch.Tensor) and not isinstance(v, PretendTensor) else v, out)


class PretendMode(TorchDispatchMode):
    """Factory functions that ask for the device."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return dispatch(func, args, kwargs or {})


class _Autocast(torch.autocast):
    def __init__(self, device_type, *args, **kwargs):
        super().__init__("cpu" if device_type == DEVICE else device_type, *args, **kwargs)


@pytest.fixture(autouse=True)
def _pretend(monkeypatch):
    from sib_fast import _backends

    monkeypatch.setattr(torch, "autocast", _Autocast)
    # torch.tensor places its data below the dispatcher, and Module.to swaps what a tensor subclass does not let it swap.
    make = torch.tensor
    monkeypatch.setattr(
        torch,
        "tensor",
        lambda data, *, device=None, requires_grad=False, **kwargs: (
            make(data, device="cpu", **kwargs).to(device or torch.empty(0).device).requires_grad_(requires_grad)
        ),
    )
    monkeypatch.setattr(torch.__future__, "_swap_module_params_on_conversion", True)
    monkeypatch.setitem(_backends.KERNEL_DEVICES, "cuda", DEVICE)
    monkeypatch.setitem(_backends.MISSING, "cuda", None)
    with PretendMode():
        yield


def pytest_configure(config):
    config.pretend_device = DEVICE


def pytest_collection_modifyitems(items):
    for item in items:
        if "compile" in item.name or "opcheck" in item.name:
            item.add_marker(pytest.mark.skip(reason="the pretend device cannot be traced"))
        if item.originalname in ("test_loss_and_terms_are_float32", "test_half_precision_images"):
            item.add_marker(pytest.mark.skip(reason="autocast does nothing to a network on the pretend device"))
