"""torch.nn.functional, but for its attention, layer norm and group norm: what a prepared module's own forward finds as `F`."""

from __future__ import annotations

from typing import Any, List, Optional  # noqa: UP035  torch.jit.script reads the types

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.fx import Proxy

from sib_fast.nn import layer_norm as norms
from sib_fast.nn._autocast import lowered
from sib_fast.nn._torchs_own import torchs_own_runs
from sib_fast.nn.attention import attention


def scaled_dot_product_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Optional[Tensor] = None,  # noqa: UP045
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: Optional[float] = None,  # noqa: UP045
    enable_gqa: bool = False,
) -> Tensor:
    """torch.nn.functional's, by products and a fused softmax where it can be: with gradients, and with no mask or a learned bias.

    Any other mask may close a row off as a whole, for which PyTorch has an answer of its own.
    """
    if torch.jit.is_scripting():
        return F.scaled_dot_product_attention(
            query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
        )
    else:  # noqa: RET505  as in Layer
        return _attention(query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa)


def _attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    dropout: float,
    is_causal: bool,
    scale: float | None,
    enable_gqa: bool,
) -> Tensor:
    # The proxy first: FX has one in the place of every argument.
    if isinstance(query, Proxy) or is_causal or enable_gqa or not _is_plain(query, key, value, mask):
        options = {"is_causal": is_causal, "scale": scale, "enable_gqa": enable_gqa}
        return F.scaled_dot_product_attention(query, key, value, mask, dropout, **options)
    query, key, value, mask = lowered(query, key, value, mask)
    heads = query.shape[:-2]
    if mask is not None:
        mask = mask.expand(*heads, query.shape[-2], key.shape[-2]).flatten(0, -3)
    return attention(*(t.flatten(0, -3) for t in (query, key, value)), dropout, scale, mask).unflatten(0, heads)


def _is_plain(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> bool:
    if torchs_own_runs() or not torch.is_grad_enabled() or query.is_nested:
        return False
    one_shape = query.ndim > 2 and query.shape[:-2] == key.shape[:-2] == value.shape[:-2]
    return one_shape and (mask is None or (mask.requires_grad and mask.is_floating_point()))


def layer_norm(
    input: Tensor,
    normalized_shape: List[int],  # noqa: UP006
    weight: Optional[Tensor] = None,  # noqa: UP045
    bias: Optional[Tensor] = None,  # noqa: UP045
    eps: float = 1e-5,
) -> Tensor:
    """torch.nn.functional's, with a fused double backward."""
    if torch.jit.is_scripting():
        return F.layer_norm(input, normalized_shape, weight, bias, eps)
    else:  # noqa: RET505
        own = isinstance(input, Proxy) or torchs_own_runs()
        return (F if own else norms).layer_norm(input, normalized_shape, weight, bias, eps)


def group_norm(
    input: Tensor,
    num_groups: int,
    weight: Optional[Tensor] = None,  # noqa: UP045
    bias: Optional[Tensor] = None,  # noqa: UP045
    eps: float = 1e-5,
) -> Tensor:
    """torch.nn.functional's, with a fused double backward."""
    if torch.jit.is_scripting():
        return F.group_norm(input, num_groups, weight, bias, eps)
    else:  # noqa: RET505
        own = isinstance(input, Proxy) or torchs_own_runs()
        return (F if own else norms).group_norm(input, num_groups, weight, bias, eps)


def __getattr__(name: str) -> Any:
    return getattr(F, name)
