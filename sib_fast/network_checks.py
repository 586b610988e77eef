"""Networks that a second derivative cannot pass through, recognised before they fail, each with what to do about it.

Evidence for every entry: docs/design.md, "What cannot be differentiated twice".
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import AbstractContextManager

import torch
from torch import Tensor, nn
from torch.autograd.function import BackwardCFunction
from torch.autograd.graph import Node
from torch.nn.parallel import DistributedDataParallel
from torch.utils._pytree import tree_leaves

from sib_fast._copy import copy_of

_STATIC_GRAPH = (
    "DistributedDataParallel(static_graph=True) must not be used: with a gradient taken before backward it stops "
    "synchronising gradients in silence. Leave static_graph at False"
)
_DATA_PARALLEL = (
    "DataParallel must not be used: its replicas run their own forward passes, out of a hook's reach. Use DistributedDataParallel"
)
_SYNC_BATCH_NORM = (
    "SyncBatchNorm must not be used: PyTorch has no second derivative for it (pytorch#61222). Call sib_fast.prepare(model) "
    "first, whose SyncBatchNorm has one, or use a normalisation that does not depend on other processes, such as GroupNorm"
)
_COMPILED = (
    "a module under torch.compile must not be used: compiled code has no second derivative in PyTorch. Leave the model uncompiled"
)
_FUSED_ATTENTION = (
    "fused attention must not be used: PyTorch has no second derivative for it. Call sib_fast.prepare(model) first, which gives "
    "one to nn.MultiheadAttention on itself without masks and to modules whose forward calls F.scaled_dot_product_attention, as "
    "most of timm's do; or run the forward under torch.nn.attention.sdpa_kernel(SDPBackend.MATH); with timm set "
    "TIMM_FUSED_ATTN=0 in the environment; with Hugging Face pass attn_implementation='sib_fast' after "
    "importing sib_fast.integrations.huggingface"
)
_REENTRANT = (
    "reentrant checkpointing must not be used: it cannot be differentiated with torch.autograd.grad. Pass "
    "use_reentrant=False to torch.utils.checkpoint.checkpoint"
)
_CUDNN_RNN = (
    "a cuDNN RNN must not be used: it has no second derivative. Run the forward under torch.backends.cudnn.flags(enabled=False)"
)
_OTHER_RNN = (
    "MIOpen's, MPS's or oneDNN's RNN must not be used: it has no second derivative. Write the loop over nn.LSTMCell, nn.GRUCell "
    "or nn.RNNCell, which have one"
)
_HARDSIGMOID = (
    "Hardsigmoid must not be used: PyTorch has no second derivative for it. Call sib_fast.prepare(model) first, whose "
    "Hardsigmoid has one; in the place of a call of torch.nn.functional.hardsigmoid write relu6(x + 3) / 6"
)
_TORCHVISION = (
    "roi_align, roi_pool, ps_roi_align, ps_roi_pool and deform_conv2d must not be used: torchvision has no second derivative for "
    "them. Attach the criterion to a layer behind the op, attach(model, layer=...), or replace it"
)
_NO_SECOND_DERIVATIVE = (
    "an op without a second derivative must not be used: PyTorch has none for it. Compose it of other ops, or attach the "
    "criterion to a layer behind it, attach(model, layer=...)"
)
_FSDP = (
    "a model under FSDP2 must not be used as it is: it frees its parameters after the VJP, which the second backward needs. "
    "Call sib_fast.integrations.fsdp.allow_double_backward(model, optimizer) once, before training"
)

_CUSTOM_FUNCTION = (
    "a custom autograd.Function must not be used: inside a compiled region PyTorch drops its second derivative in silence. "
    "Register an op with torch.library.register_autograd, on the op and on its backward op, or do not compile"
)

# Prefix of an autograd node's name, its namespaces aside -> what to say. Complete for torch 2.14: these are the backward ops that
# have no derivative there, or one that raises, and torchvision's, as C++ (before) and as registered in Python.
_NODES = (
    ("CompiledFunction", _COMPILED),
    ("ScaledDotProductFlash", _FUSED_ATTENTION),
    ("ScaledDotProductEfficient", _FUSED_ATTENTION),
    ("ScaledDotProductCudnn", _FUSED_ATTENTION),
    ("ScaledDotProductFused", _FUSED_ATTENTION),
    ("EfficientAttention", _FUSED_ATTENTION),
    ("FlashAttention", _FUSED_ATTENTION),
    ("CudnnAttention", _FUSED_ATTENTION),
    ("SyncBatchNorm", _SYNC_BATCH_NORM),
    ("CheckpointFunction", _REENTRANT),
    ("CudnnRnn", _CUDNN_RNN),
    *((name, _OTHER_RNN) for name in ("MiopenRnn", "LstmMps", "MkldnnRnnLayer")),
    ("Hardsigmoid", _HARDSIGMOID),
    *(
        (prefix, _TORCHVISION)
        for op, name in (
            ("roi_align", "ROIAlign"),
            ("roi_pool", "ROIPool"),
            ("ps_roi_align", "PSROIAlign"),
            ("ps_roi_pool", "PSROIPool"),
            ("deform_conv2d", "DeformConv2d"),
        )
        for prefix in (f"GeneratedBackwardFor_torchvision_{op}", f"{name}Function")
    ),
    *(
        (name, _NO_SECOND_DERIVATIVE)
        for name in (
            "CrossMapLRN2d",
            "CtcLoss",
            "CudnnAffineGridGenerator",
            "CudnnCtcLoss",
            "EmbeddingBag",
            "FakeQuantizeLearnable",
            "MaskedSoftmax",
            "MiopenCtcLoss",
            "MkldnnAdaptiveAvgPool",
            "MkldnnLinear",
            "MkldnnMaxPool",
            "MpsConvolutionTranspose",
            "MultiMarginLoss",
            "MultilabelMarginLoss",
            "SegmentReduce",
            "SparseMmReduceImpl",
        )
    ),
    # Its backward got a derivative in a later torch than the oldest that we support.
    *(
        (name, _NO_SECOND_DERIVATIVE)
        for name in ("GridSampler2D", "GridSampler3D", "CudnnGridSampler")
        if not hasattr(torch._C._functions, f"{name}BackwardBackward0")
    ),
)


def obstacle_in(module: nn.Module) -> str | None:
    """What is wrong with this one module, its children aside. Looks at types only."""
    if isinstance(module, DistributedDataParallel) and module.static_graph:
        return _STATIC_GRAPH
    if isinstance(module, nn.DataParallel):
        return _DATA_PARALLEL
    if type(module) is nn.SyncBatchNorm:
        return _SYNC_BATCH_NORM
    if is_compiled(module):
        return _COMPILED
    return None


def is_compiled(module: nn.Module) -> bool:
    """An OptimizedModule, or one that nn.Module.compile() compiled in place; both keep the compiled call under this name."""
    return type(module).__name__ == "OptimizedModule" or getattr(module, "_compiled_call_impl", None) is not None


def check_module(op: str, model: nn.Module, *, whole: bool = True) -> None:
    """Raises RuntimeError if the module tree shows a known obstacle. Looks at types only.

    whole: all layers are differentiated twice. Otherwise only some are, and a layer is an obstacle where it lies among these,
    which the graph shows; what wraps the model stays one.
    """
    for name, module in model.named_modules():
        if hasattr(module, "set_reshard_after_backward") and not getattr(model, "_sib_fast_double_backward", False):
            raise RuntimeError(f"{op}: {_FSDP}")
        message = obstacle_in(module)
        if message is not None and (whole or message in (_STATIC_GRAPH, _DATA_PARALLEL)):
            raise RuntimeError(f"{op}: {message}" + (f" (module {name!r})" if name else ""))


def obstacles_in_graph(root: Node | None, x: Tensor | None = None) -> Iterator[tuple[str, str]]:
    """Autograd nodes known not to be differentiable twice: (name, what to say), a name once.

    x: only nodes between root and this tensor count, as a gradient with respect to it passes through no other.
    """
    target = torch.autograd.graph.get_gradient_edge(x).node if x is not None and x.requires_grad else None
    seen = set()
    for node in nodes_of(root, target):
        if node is target:  # of the op that made x
            continue
        name = node.name()
        stem = name.rpartition("::")[2]
        if name not in seen:
            for prefix, message in _NODES:
                if stem.startswith(prefix) and (target is None or any(below is target for below in nodes_of(node, target))):
                    seen.add(name)
                    yield name, message
        if name.startswith("_DDPSink"):
            ddp = getattr(node, "ddp_weakref", lambda: None)()
            if ddp is not None and ddp.static_graph:
                yield name, _STATIC_GRAPH


def check_graph(op: str, root: Node | None, x: Tensor | None = None) -> None:
    """Walks the autograd graph from the logits to x and raises RuntimeError at a node known not to be differentiable twice.

    Costs about two microseconds a node in Python (0.6 ms on a ResNet-50), so callers walk once per network, not every step.
    """
    for name, message in obstacles_in_graph(root, x):
        where = "" if message is _STATIC_GRAPH else f" (found {name} in the graph of the logits)"
        raise RuntimeError(f"{op}: {message}{where}")


def nodes_of(root: Node | None, last: Node | None = None) -> Iterator[Node]:
    """Every node of an autograd graph, once; none that only `last` leads to."""
    seen: set[Node] = set()
    stack = [root] if root is not None else []
    while stack:
        node = stack.pop()
        if node in seen:
            continue
        seen.add(node)
        yield node
        if node is not last:
            stack.extend(parent for parent, _ in node.next_functions if parent is not None)


def custom_functions(root: Node | None) -> list[str]:
    """Names of the user's autograd.Functions in a graph. A registered op's own is none of them: a compiler sees the op.

    Made by torch.library, or at the dispatcher's Autograd key by a class that says so (`of_registered_op`).
    """
    functions = [node for node in nodes_of(root) if isinstance(node, BackwardCFunction)]
    names = {node.name() for node in functions if not getattr(node._forward_cls, "of_registered_op", False)}
    return sorted(name.removesuffix("Backward") for name in names if not name.startswith("GeneratedBackwardFor_"))


def forward_on_fake_tensors(model: nn.Module, x: Tensor, train: bool = False) -> tuple[Tensor, Tensor, AbstractContextManager]:
    """The model's output with its graph, its input, and the mode to go on in: tensors without data, so nothing is computed.

    On a copy (in training mode, if asked): no buffer and no random state changes, and nothing that a model keeps of a forward
    pass stays in it. Shapes: x as the model takes it -> the first floating-point tensor of what it returns.
    """
    from torch._subclasses.fake_tensor import FakeCopyMode, FakeTensorMode

    mode = FakeTensorMode(allow_non_fake_inputs=True)
    with FakeCopyMode(mode):
        twin = copy_of(model)
    if train:
        twin.train()
    with mode, torch.enable_grad():
        leaf = mode.from_tensor(x.detach())
        leaf = leaf.requires_grad_() if leaf.is_floating_point() else leaf
        output = next(o for o in tree_leaves(twin(leaf.clone())) if isinstance(o, Tensor) and o.is_floating_point())
    return output, leaf, mode


def check_before_compiling(op: str, model: nn.Module, x: Tensor) -> None:
    """Raises RuntimeError at what a compiled step cannot differentiate twice; warns if that could not be found out.

    What `check_graph` knows, and custom autograd.Functions: eager PyTorch differentiates them, a compiled region drops them.
    """
    try:
        output, leaf, _ = forward_on_fake_tensors(model, x)
    except Exception as error:
        warnings.warn(
            f"{op}: could not look for custom autograd.Functions, whose second derivative a compiled step drops in silence: the "
            f"model does not run on fake tensors ({type(error).__name__}: {str(error)[:200]})",
            stacklevel=3,
        )
        return
    check_graph(op, output.grad_fn, leaf)
    names = custom_functions(output.grad_fn)
    if names:
        raise RuntimeError(f"{op}: {_CUSTOM_FUNCTION} (found {', '.join(names)})")
