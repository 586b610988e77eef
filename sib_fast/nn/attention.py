"""MultiheadAttention that can be differentiated twice, with a fused softmax: drop-in for torch.nn's."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx import Proxy

from sib_fast import _checks
from sib_fast.nn._torchs_own import Layer, fx_call, torchs_own_runs
from sib_fast.ops.softmax import softmax


def attention(
    query: Tensor, key: Tensor, value: Tensor, dropout: float = 0.0, scale: float | None = None, bias: Tensor | None = None
) -> Tensor:
    """softmax(scale·Q Kᵀ + bias) V, of products and a softmax: differentiable twice, on any device.

    Shapes:  query [B, L, E], key [B, S, E], value [B, S, F], bias [B, L, S] or None -> [B, L, F], one head of one image a batch
             entry. bfloat16 and float16 are calculated in float32, as PyTorch's math kernel does.
    Scale:   on the query, 1/sqrt(E) by default. dropout: of the weights, before they meet the values.
    Source:  Vaswani et al. 2017; torch.nn.functional.scaled_dot_product_attention.
    """
    dtype = query.dtype
    with torch.autocast(query.device.type, enabled=False):
        query, key, value = (t.to(_checks.accumulation_dtype(dtype)) for t in (query, key, value))
        scores = torch.bmm(query * (1 / math.sqrt(query.shape[-1]) if scale is None else scale), key.transpose(1, 2))
        weights = softmax(scores if bias is None else scores + bias)
        return torch.bmm(F.dropout(weights, dropout) if dropout else weights, value).to(dtype)


class MultiheadAttention(Layer, nn.MultiheadAttention):
    """torch.nn.MultiheadAttention that can be differentiated twice, for self-attention as in a ViT: one [N, L, E] (or [L, N, E])
    tensor for query, key and value, need_weights=False, no masks. Every other call, and any call without gradients, is
    PyTorch's own, whose fused kernels have no second derivative."""

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        if torch.jit.is_scripting():
            return self._torchs_own(query, key, value, key_padding_mask, need_weights, attn_mask, average_attn_weights, is_causal)
        else:  # noqa: RET505  as in Layer
            options = (key_padding_mask, need_weights, attn_mask, average_attn_weights, is_causal)
            if isinstance(query, Proxy):
                return fx_call(self, query, query, key, value, *options)
            if torchs_own_runs() or not self._is_plain_self_attention(query, key, value, *options):
                return self._torchs_own(query, key, value, *options)
            return self._fast(query), None

    def _is_plain_self_attention(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None,
        need_weights: bool,
        attn_mask: Tensor | None,
        _: bool,
        is_causal: bool,
    ) -> bool:
        masked = key_padding_mask is not None or attn_mask is not None or is_causal
        extended = self.bias_k is not None or self.add_zero_attn or not self._qkv_same_embed_dim
        one_batch = query is key and key is value and query.ndim == 3 and not query.is_nested
        return not (need_weights or masked or extended) and one_batch and torch.is_grad_enabled()

    def _fast(self, x: Tensor) -> Tensor:
        # Unbound before it is transposed: the gradients of q, k and v are then stacked where the projection's backward wants
        # them, without zeros and without a copy.
        projected = F.linear(x, self.in_proj_weight, self.in_proj_bias).unflatten(-1, (3, self.num_heads, self.head_dim))
        order = (0, 2, 1, 3) if self.batch_first else (1, 2, 0, 3)  # to [N, heads, L, head_dim]
        heads = [t.permute(order).flatten(0, 1) for t in projected.unbind(2)]
        out = attention(*heads, self.dropout if self.training else 0.0)
        out = out.unflatten(0, (-1, self.num_heads))
        back = (0, 2, 1, 3) if self.batch_first else (2, 0, 1, 3)
        return F.linear(out.permute(back).flatten(2), self.out_proj.weight, self.out_proj.bias)
