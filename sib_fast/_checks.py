"""Argument checks. Metadata only: a check never reads a tensor's values, which would synchronise with the device.

Grammar of the messages: `<op>: <argument> must <rule>, got <value>`. ValueError for shape and range, TypeError for type
and dtype, RuntimeError for backend and graph, ImportError for what an extra brings.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence

import torch
from torch import Tensor

FLOATING = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
# Device types without float64. What is N×N, N×K or [N] and must be double then lives on the CPU.
NO_FLOAT64 = {"mps"}


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of planes, products and gradients: float64 for float64, float32 for everything else."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def float64_device(device: torch.device) -> torch.device:
    """Where float64 belonging to a tensor on `device` lives: there, or on the CPU if the device has none."""
    return torch.device("cpu") if device.type in NO_FLOAT64 else device


def to_float64(tensor: Tensor) -> Tensor:
    """In float64, on `float64_device`. First moved, then widened: the device could not hold what lies between."""
    return tensor.to(float64_device(tensor.device)).to(torch.float64)


def require_tensor(op: str, name: str, value: object) -> Tensor:
    if not isinstance(value, Tensor):
        raise TypeError(f"{op}: {name} must be a tensor, got {type(value).__name__}")
    return value


def require_floating(op: str, name: str, tensor: Tensor) -> None:
    if tensor.dtype not in FLOATING:
        raise TypeError(f"{op}: {name} must be float64, float32, bfloat16 or float16, got {tensor.dtype}")


def require_map(op: str, name: str, value: object) -> Tensor:
    """A non-empty floating-point [N, C, H, W] tensor."""
    tensor = require_tensor(op, name, value)
    if tensor.ndim != 4:
        raise ValueError(f"{op}: {name} must have shape [N, C, H, W], got {list(tensor.shape)}")
    if 0 in tensor.shape:
        raise ValueError(f"{op}: {name} must have at least one image, channel and pixel, got {list(tensor.shape)}")
    require_floating(op, name, tensor)
    return tensor


def require_same_shape(op: str, name: str, tensor: Tensor, other_name: str, shape: Sequence[int]) -> None:
    if list(tensor.shape) != list(shape):
        raise ValueError(f"{op}: {name} must have shape {list(shape)} to go with {other_name}, got {list(tensor.shape)}")


def require_same_device(op: str, name: str, tensor: Tensor, other_name: str, other: Tensor) -> None:
    if tensor.device != other.device:
        raise RuntimeError(f"{op}: {name} must be on the device of {other_name} ({other.device}), got {tensor.device}")


def require_choice(op: str, name: str, value: object, choices: Sequence[str], *, or_callable: bool = False) -> None:
    if or_callable and callable(value):
        return
    if not isinstance(value, str) or value not in choices:
        listed = ", ".join(repr(c) for c in choices)
        raise ValueError(f"{op}: {name} must be one of {listed}{' or a callable' if or_callable else ''}, got {value!r}")


def require_number(op: str, name: str, value: object, of: str) -> Tensor:
    """What a function of the caller's returned: without a graph its term would be shown and train nothing."""
    if isinstance(value, Tensor) and value.ndim == 0 and value.requires_grad:
        return value
    got = f"shape {list(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
    graph = " without a graph" if isinstance(value, Tensor) and not value.requires_grad else ""
    raise ValueError(f"{op}: {name} must return a 0-d tensor computed from {of}, got {got}{graph}")


def require_positive(op: str, name: str, value: float) -> None:
    if not 0 < value < float("inf"):
        raise ValueError(f"{op}: {name} must be positive and finite, got {value!r}")


def require_window(op: str, window_size: int) -> None:
    if isinstance(window_size, bool) or not isinstance(window_size, int):
        raise TypeError(f"{op}: window_size must be an int, got {type(window_size).__name__}")
    if window_size < 1 or window_size % 2 == 0:
        raise ValueError(f"{op}: window_size must be odd and at least 1, got {window_size}")


def require_quantiles(op: str, quantiles: Sequence[float]) -> tuple[float, float, float, float]:
    values = tuple(float(q) for q in quantiles)
    if len(values) != 4 or not all(0.0 <= q <= 1.0 for q in values):
        raise ValueError(f"{op}: quantiles must be four levels (lo, hi, gate, area) in [0, 1], got {tuple(quantiles)!r}")
    return values  # type: ignore[return-value]


def require_package(op: str, package: str, extra: str, module: str | None = None) -> None:
    """Imports what an extra brings. module: the package's name in Python, where that is another one."""
    try:
        importlib.import_module(module or package)
    except ImportError as error:
        raise ImportError(f"{op}: {package} must be installed, got {error}; pip install 'sib_fast[{extra}]'") from error
