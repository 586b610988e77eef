"""Networks that a second derivative cannot pass through, recognised before they fail, each with what to do about it.

Evidence for every entry: docs/design.md, "What cannot be differentiated twice".
"""

from __future__ import annotations

from torch import nn
from torch.autograd.graph import Node
from torch.nn.parallel import DistributedDataParallel

_STATIC_GRAPH = (
    "DistributedDataParallel(static_graph=True) must not be used: with a gradient taken before backward it stops "
    "synchronising gradients in silence. Leave static_graph at False"
)
_SYNC_BATCH_NORM = (
    "SyncBatchNorm must not be used: PyTorch has no second derivative for it (pytorch#61222). Call sib_fast.prepare(model) "
    "first, whose SyncBatchNorm has one, or use a normalisation that does not depend on other processes, such as GroupNorm"
)
_COMPILED = (
    "a module under torch.compile must not be used: compiled code has no second derivative in PyTorch. Leave the model uncompiled"
)
_FUSED_ATTENTION = (
    "fused attention must not be used: PyTorch has no second derivative for it. Run the forward under "
    "torch.nn.attention.sdpa_kernel(SDPBackend.MATH); with timm call timm.layers.set_fused_attn(False) before the model is "
    "made; with Hugging Face pass attn_implementation='eager'"
)
_REENTRANT = (
    "reentrant checkpointing must not be used: it cannot be differentiated with torch.autograd.grad. Pass "
    "use_reentrant=False to torch.utils.checkpoint.checkpoint"
)
_CUDNN_RNN = (
    "a cuDNN RNN must not be used: it has no second derivative. Run the forward under torch.backends.cudnn.flags(enabled=False)"
)

# Prefix of an autograd node's name -> what to say.
_NODES = (
    ("CompiledFunction", _COMPILED),
    ("ScaledDotProductFlash", _FUSED_ATTENTION),
    ("ScaledDotProductEfficient", _FUSED_ATTENTION),
    ("ScaledDotProductCudnn", _FUSED_ATTENTION),
    ("ScaledDotProductFused", _FUSED_ATTENTION),
    ("EfficientAttention", _FUSED_ATTENTION),
    ("FlashAttention", _FUSED_ATTENTION),
    ("SyncBatchNorm", _SYNC_BATCH_NORM),
    ("CheckpointFunction", _REENTRANT),
    ("CudnnRnn", _CUDNN_RNN),
)


def check_module(op: str, model: nn.Module) -> None:
    """Raises RuntimeError if the module tree shows a known obstacle. Looks at types only."""
    if isinstance(model, DistributedDataParallel) and model.static_graph:
        raise RuntimeError(f"{op}: {_STATIC_GRAPH}")
    if isinstance(model, nn.DataParallel):
        raise RuntimeError(
            f"{op}: DataParallel must not be used: its replicas run their own forward passes, out of a hook's reach. Use "
            "DistributedDataParallel"
        )
    for name, module in model.named_modules():
        where = f" (module {name!r})" if name else ""
        if isinstance(module, nn.SyncBatchNorm) and not getattr(module, "differentiable_twice", False):
            raise RuntimeError(f"{op}: {_SYNC_BATCH_NORM}{where}")
        # OptimizedModule, or nn.Module.compile() in place; both keep the compiled call under this name.
        if type(module).__name__ == "OptimizedModule" or getattr(module, "_compiled_call_impl", None) is not None:
            raise RuntimeError(f"{op}: {_COMPILED}{where}")


def check_graph(op: str, root: Node | None) -> None:
    """Walks the autograd graph of the logits and raises RuntimeError at a node known not to be differentiable twice.

    Costs about two microseconds a node in Python (0.6 ms on a ResNet-50), so callers walk once per network, not every step.
    """
    seen: set[Node] = set()
    stack = [root] if root is not None else []
    while stack:
        node = stack.pop()
        if node in seen:
            continue
        seen.add(node)
        name = node.name()
        for prefix, message in _NODES:
            if name.startswith(prefix):
                raise RuntimeError(f"{op}: {message} (found {name} in the graph of the logits)")
        if name.startswith("_DDPSink"):
            ddp = getattr(node, "ddp_weakref", lambda: None)()
            if ddp is not None and ddp.static_graph:
                raise RuntimeError(f"{op}: {_STATIC_GRAPH}")
        stack.extend(parent for parent, _ in node.next_functions if parent is not None)
