"""One test per message: what a wrong call is told. Messages of vjp_map and of masks stand in their own files.

The table for users is docs/errors.md; `test_every_message_is_documented` holds it to the sources.
"""

from __future__ import annotations

import ast
import copy
import math
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

import sib_fast
from sib_fast import SIBLoss, _backends, _checks, estimators, network_checks
from sib_fast.masks import GivenMask
from sib_fast.testing.networks import conv_net, image_batch

# ---- the constructor ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("error", "words", "options"),
    [
        (ValueError, "SIBLoss: lambda_fg must be at least 0, got -0.5", {"lambda_fg": -0.5}),
        (ValueError, "SIBLoss: lambda_bg must be at least 0, got nan", {"lambda_bg": math.nan}),
        (ValueError, "SIBLoss: scalar must be one of 'energy', .* or a callable, got 'entropy'", {"scalar": "entropy"}),
        (ValueError, "SIBLoss: estimator must be one of 'hsic_biased', .* got 'hsic'", {"estimator": "hsic"}),
        (ValueError, "SIBLoss: background must be one of 'variance', .* got 'var'", {"background": "var"}),
        (ValueError, "SIBLoss: objective must be one of 'exp', 'linear', 'expm1' or a callable, got None", {"objective": None}),
        (ValueError, "SIBLoss: mask must be one of 'density' or a callable, got 'none'", {"mask": "none"}),
        (ValueError, "SIBLoss: lambda_bg must be given for background='hsic', got the default", {"background": "hsic"}),
        (
            ValueError,
            f"SIBLoss: backend must be one of {', '.join(map(repr, ('auto', *sib_fast.BACKENDS)))}, got 'tpu'",
            {"backend": "tpu"},
        ),
        (ValueError, "SIBLoss: window_size must be odd and at least 1, got 30", {"window_size": 30}),
        (ValueError, "SIBLoss: window_size must be odd and at least 1, got -3", {"window_size": -3}),
        (TypeError, "SIBLoss: window_size must be an int, got float", {"window_size": 31.0}),
        (TypeError, "SIBLoss: window_size must be an int, got bool", {"window_size": True}),
        (ValueError, "SIBLoss: temperature must be positive and finite, got 0", {"temperature": 0}),
        (ValueError, "SIBLoss: slope must be positive and finite, got nan", {"slope": math.nan}),
        (ValueError, r"SIBLoss: quantiles must be four levels .* in \[0, 1\], got \(0.1, 0.9\)", {"quantiles": (0.1, 0.9)}),
        (
            ValueError,
            r"SIBLoss: quantiles must be four levels .*, got \(0.1, 0.9, 0.8, 1.1\)",
            {"quantiles": (0.1, 0.9, 0.8, 1.1)},
        ),
        (TypeError, "SIBLoss: base_loss must be callable, got str", {"base_loss": "ce"}),
    ],
    ids=lambda v: v[:50] if isinstance(v, str) else "",
)
def test_constructor(error, words, options):
    with pytest.raises(error, match=words):
        SIBLoss(**options)


# ---- the call -----------------------------------------------------------------------------------------------------------


def call(criterion: SIBLoss | None = None, **changed: object) -> Tensor:
    """An explicit call with one argument replaced; a function replaces what it is given."""
    x, target = image_batch()
    x.requires_grad_()
    arguments = {"logits": conv_net()(x), "target": target, "x": x, "mask": None}
    for name, value in changed.items():
        arguments[name] = value(arguments[name]) if callable(value) else value
    return (criterion or SIBLoss(window_size=5))(**arguments)


def test_the_good_call_of_this_section_passes():
    assert call().isfinite()


@pytest.mark.parametrize(
    ("error", "words", "changed"),
    [
        (TypeError, "SIBLoss: logits must be a tensor, got list", {"logits": [[0.0]]}),
        (TypeError, "SIBLoss: logits must be float64, .* got torch.int64", {"logits": lambda z: z.long()}),
        (ValueError, r"SIBLoss: logits must have shape \[N, classes\], got \[30\]", {"logits": lambda z: z.flatten()}),
        (RuntimeError, "vjp_map: logits must have a graph", {"logits": lambda z: z.detach()}),
        (TypeError, "SIBLoss: x must be a tensor, got ndarray", {"x": lambda x: x.detach().numpy()}),
        (ValueError, r"SIBLoss: x must have shape \[N, C, H, W\], got \[6, 396\]", {"x": lambda x: x.flatten(1)}),
        (
            ValueError,
            r"SIBLoss: x must have at least one image, channel and pixel, got \[6, 0, 12, 11\]",
            {"x": lambda x: x[:, :0]},
        ),
        (TypeError, "SIBLoss: x must be float64, .* got torch.uint8", {"x": lambda x: x.byte()}),
        (ValueError, "SIBLoss: x must hold the 6 images of logits, got 5", {"x": lambda x: x[:5]}),
        (RuntimeError, r"SIBLoss: x must be on the device of logits \(cpu\), got meta", {"x": lambda x: x.to("meta")}),
        (RuntimeError, r"vjp_map: x must require grad before the forward pass", {"x": lambda x: x.detach()}),
        (RuntimeError, "vjp_map: logits must be computed from x, but their graph does not reach it", {"x": lambda x: x.clone()}),
        (RuntimeError, r"SIBLoss: x must be given while the loss is active: .*criterion.attach\(model\) once", {"x": None}),
        (TypeError, "SIBLoss: target must be a tensor, got list", {"target": [0] * 6}),
        (
            ValueError,
            r"SIBLoss: target must be class indices \[6\] or probabilities \[6, 5\], got \[6, 1\]",
            {"target": lambda t: t[:, None]},
        ),
        (ValueError, r"SIBLoss: target must be class indices \[6\] or .*, got \[5\]", {"target": lambda t: t[:5]}),
        (
            ValueError,
            r"SIBLoss: mask must have shape \[6, 1, 12, 11\] to go with x, got \[6, 12, 11\]",
            {"mask": torch.ones(6, 12, 11)},
        ),
        (TypeError, "SIBLoss: mask must be a tensor, got str", {"mask": "density"}),
        (TypeError, "SIBLoss: mask.annotated must be bool", {"mask": GivenMask(torch.ones(6, 1, 12, 11), torch.ones(6))}),
    ],
    ids=lambda v: v[:50] if isinstance(v, str) else "",
)
def test_call(error, words, changed):
    with pytest.raises(error, match=words):
        call(**changed)


@pytest.mark.parametrize("active", [True, False])
def test_a_base_loss_per_image(active):
    criterion = SIBLoss(window_size=5, base_loss=nn.CrossEntropyLoss(reduction="none")).train(active)
    with pytest.raises(
        ValueError, match=r"SIBLoss: base_loss must return a 0-d tensor \(reduction='mean' or 'sum'\), got shape \[6\]"
    ):
        call(criterion)


def test_a_mask_maker_of_the_wrong_shape():
    criterion = SIBLoss(mask=lambda vjp: vjp.sigmoid())
    with pytest.raises(ValueError, match=r"SIBLoss: mask must have shape \[6, 1, 12, 11\] to go with x, got \[6, 3, 12, 11\]"):
        call(criterion)


def test_a_single_value_per_image():
    x, target = torch.randn(6, 1, 1, 1, requires_grad=True), torch.zeros(6).long()
    with pytest.raises(ValueError, match=r"region_statistics: vjp must have C·H·W >= 2, .* got \[6, 1, 1, 1\]"):
        SIBLoss()(torch.cat([x.flatten(1), -x.flatten(1)], 1), target, x)


@pytest.mark.parametrize(
    ("options", "images", "words"),
    [
        ({}, 1, "N >= 2 images for hsic_biased, got 1"),
        ({"estimator": "hsic_gaussian"}, 1, "N >= 2 images for hsic_gaussian, got 1"),
        ({"estimator": "cka"}, 1, "N >= 2 images for cka, got 1"),
        ({"estimator": "hsic_unbiased"}, 3, "N >= 4 images for hsic_unbiased, got 3"),
        ({"estimator": lambda k, el: k.sum(), "background": "hsic", "lambda_bg": 1.0}, 1, "N >= 2 images for hsic, got 1"),
    ],
    ids=lambda v: v if isinstance(v, str) else "",
)
def test_too_few_images(options, images, words):
    x, target = image_batch(images)
    x.requires_grad_()
    criterion = SIBLoss(window_size=5, **options)
    with pytest.raises(
        ValueError, match=rf"SIBLoss: the batch must hold {words}: drop the last partial batch, DataLoader\(drop_last=True\)"
    ):
        criterion(conv_net(norm="group")(x), target, x)
    enough, target = image_batch(images + 1)
    enough.requires_grad_()
    assert criterion(conv_net(norm="group")(enough), target, enough).isfinite()


def test_too_few_images_for_an_estimator_without_a_name():
    class Needy:
        minimum_batch = 9

        def __call__(self, gram_vjp, gram_x):
            return gram_vjp.sum()

    with pytest.raises(ValueError, match=r"SIBLoss: the batch must hold N >= 9 images for Needy, got 6"):
        call(SIBLoss(estimator=Needy()))


@pytest.mark.parametrize(
    ("words", "options"),
    [
        (
            r"estimator must return a 0-d tensor computed from the Grams, got shape \[6\]",
            {"estimator": lambda g, h: (g * h).sum(1)},
        ),
        ("estimator must return .*, got float", {"estimator": lambda g, h: (g * h).sum().item()}),
        (r"estimator must return .*, got shape \[\] without a graph", {"estimator": lambda g, h: (g * h).sum().detach()}),
        (
            r"background must return a 0-d tensor computed from the statistics, got shape \[6\]",
            {"lambda_bg": 1.0, "background": lambda s: s.background_variance},
        ),
        ("background must return .*, got NoneType", {"lambda_bg": 1.0, "background": lambda s: None}),
        (
            r"objective must return a 0-d tensor computed from its arguments, got shape \[6\]",
            {"objective": lambda b, *_: b.expand(6)},
        ),
    ],
    ids=lambda v: v[:45] if isinstance(v, str) else "",
)
def test_a_function_of_the_callers_that_returns_no_number(words, options):
    with pytest.raises(ValueError, match=f"SIBLoss: {words}"):
        call(SIBLoss(**{"estimator": lambda g, h: (g * h).sum(), **options}))


@pytest.mark.parametrize("case", ["frozen", "cut"])
def test_a_vjp_without_a_graph(case):
    # A scalar that is linear in the logits: R hangs on the parameters alone.
    x, target = image_batch()
    x.requires_grad_()
    net = nn.Linear(396, 5).requires_grad_(case == "cut")
    logits = net(x.flatten(1)) if case == "frozen" else _Cut.apply(x.flatten(1), net.weight)
    with pytest.raises(
        RuntimeError, match=r"SIBLoss: the VJP must depend on the network's parameters, but it came back without a graph"
    ):
        SIBLoss(scalar="label_logit", window_size=5)(logits, target, x)


class _Cut(torch.autograd.Function):
    """A linear layer whose backward forgets its parameters."""

    @staticmethod
    def forward(ctx, x, weight):
        ctx.weight = weight.detach()
        return x @ weight.T

    @staticmethod
    def backward(ctx, grad):
        return grad @ ctx.weight, None


def test_the_same_scalar_with_a_graph():
    x, target = image_batch()
    x.requires_grad_()
    net = nn.Linear(396, 5)
    SIBLoss(scalar="label_logit", window_size=5)(net(x.flatten(1)), target, x).backward()
    assert net.weight.grad.isfinite().all()


# ---- attaching ----------------------------------------------------------------------------------------------------------


def test_attach_to_no_module():
    with pytest.raises(TypeError, match=r"SIBLoss.attach: model must be a torch.nn.Module, got function"):
        SIBLoss().attach(lambda x: x)


@pytest.mark.parametrize(
    ("inputs", "described"),
    [
        ((torch.zeros(6, 3, 12, 11, dtype=torch.uint8),), r"\['torch.uint8 \[6, 3, 12, 11\]'\]"),
        ((torch.zeros(6, 396),), r"\['torch.float32 \[6, 396\]'\]"),
        (([torch.zeros(6, 3, 12, 11)], None), r"\['list', 'NoneType'\]"),
    ],
    ids=["uint8", "rank", "list"],
)
def test_an_attached_model_called_without_an_image(inputs, described):
    net = nn.Identity()
    net.forward = lambda *args: args
    criterion = SIBLoss().attach(net)
    words = rf"SIBLoss: the attached model must be called with a floating-point \[N, C, H, W\] tensor, got {described}"
    with pytest.raises(RuntimeError, match=words):
        net(*inputs)
    criterion.eval()
    net(*inputs)  # inactive: nothing is asked of it


# ---- networks that cannot be differentiated twice -----------------------------------------------------------------------


def optimized() -> nn.Module:
    return nn.Sequential(nn.Identity(), torch.compile(nn.Conv2d(3, 5, 1), backend="eager"))


def compiled_in_place() -> nn.Module:
    net = conv_net()
    net.compile(backend="eager")
    return net


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: torch.compile(conv_net(), backend="eager"), r"a module under torch.compile must not be used: .*uncompiled$"),
        (optimized, r"a module under torch.compile must not be used: .* \(module '1'\)"),
        (compiled_in_place, "a module under torch.compile must not be used"),
        (
            lambda: nn.Sequential(nn.Sequential(nn.SyncBatchNorm(3))),
            r"SyncBatchNorm must not be used: .* GroupNorm \(module '0.0'\)",
        ),
        (lambda: nn.SyncBatchNorm.convert_sync_batchnorm(conv_net()), r"SyncBatchNorm must not be used: .*\(module '1'\)"),
        (lambda: nn.DataParallel(conv_net()), "DataParallel must not be used: .* Use DistributedDataParallel"),
    ],
    ids=["compiled", "compiled child", "compiled in place", "SyncBatchNorm", "converted", "DataParallel"],
)
def test_attach_refuses(make, words):
    with pytest.raises(RuntimeError, match=rf"SIBLoss.attach: {words}"):
        SIBLoss().attach(make())


def test_a_compiled_model_is_refused_in_the_explicit_form():
    x, target = image_batch()
    x.requires_grad_()
    net = torch.compile(nn.Sequential(nn.Flatten(), nn.Linear(396, 5)), backend="aot_eager")
    with pytest.raises(
        RuntimeError, match=r"SIBLoss: a module under torch.compile must not be used: .*\(found CompiledFunctionBackward"
    ):
        SIBLoss(window_size=5)(net(x), target, x)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # torch.compile's, before our words
def test_a_model_compiled_after_attach_is_refused():
    x, target = image_batch()
    net = nn.Sequential(nn.Flatten(), nn.Linear(396, 5))
    criterion = SIBLoss(window_size=5).attach(net)
    with pytest.raises(RuntimeError, match=r"SIBLoss: a module under torch.compile must not be used"):
        criterion(torch.compile(net, backend="aot_eager")(x), target)


def node(name: str, *parents: object) -> SimpleNamespace:
    """A stand-in for an autograd node: what a graph with layers that this machine cannot run looks like."""
    return _Node(name=lambda: name, next_functions=tuple((parent, 0) for parent in parents))


class _Node(SimpleNamespace):
    __hash__ = object.__hash__


NODES = {
    "CompiledFunctionBackward": "a module under torch.compile must not be used",
    "ScaledDotProductFlashAttentionBackward0": "fused attention must not be used",
    "ScaledDotProductFlashAttentionForCpuBackward0": "fused attention must not be used",
    "ScaledDotProductEfficientAttentionBackward0": "fused attention must not be used",
    "ScaledDotProductCudnnAttentionBackward0": "fused attention must not be used",
    "ScaledDotProductFusedAttentionOverrideableBackward0": "fused attention must not be used",
    "EfficientAttentionBackward0": "fused attention must not be used",
    "FlashAttentionBackward0": "fused attention must not be used",
    "SyncBatchNormBackward": "SyncBatchNorm must not be used",
    "CheckpointFunctionBackward": "reentrant checkpointing must not be used",
    "CudnnAttentionBackward0": "fused attention must not be used",
    "CudnnRnnBackward0": "a cuDNN RNN must not be used: .* torch.backends.cudnn.flags",
    **dict.fromkeys(
        ("MiopenRnnBackward0", "LstmMpsBackward0", "MkldnnRnnLayerBackward0"),
        "MIOpen's, MPS's or oneDNN's RNN must not be used: .* nn.LSTMCell",
    ),
    "HardsigmoidBackward0": r"Hardsigmoid must not be used: .* sib_fast.prepare\(model\)",
    **{
        name: "roi_align, .* must not be used: .* behind the op, attach"
        for op, function in (
            ("roi_align", "ROIAlign"),
            ("roi_pool", "ROIPool"),
            ("ps_roi_align", "PSROIAlign"),
            ("ps_roi_pool", "PSROIPool"),
            ("deform_conv2d", "DeformConv2d"),
        )
        for name in (
            f"GeneratedBackwardFor_torchvision_{op}_defaultBackward",
            f"torch::autograd::CppNode<vision::ops::(anonymous namespace)::{function}Function>",
        )
    },
    **{
        f"{prefix}Backward0": "an op without a second derivative must not be used: .* Compose it"
        for prefix, message in network_checks._NODES
        if message is network_checks._NO_SECOND_DERIVATIVE
    },
}


@pytest.mark.parametrize("name", NODES)
def test_a_node_deep_in_the_graph_is_found(name):
    leaf = node("torch::autograd::AccumulateGrad")
    root = node("AddmmBackward0", leaf, None, node("ReluBackward0", node(name, leaf), leaf))
    with pytest.raises(RuntimeError, match=rf"op: {NODES[name]}.*\(found {re.escape(name)} in the graph of the logits\)"):
        network_checks.check_graph("op", root)


def test_every_known_node_is_tested():
    assert {prefix for prefix, _ in network_checks._NODES} == {
        prefix for prefix, _ in network_checks._NODES for name in NODES if name.rpartition("::")[2].startswith(prefix)
    }


def test_a_good_graph_passes_and_shared_nodes_are_visited_once():
    network_checks.check_graph("op", None)
    visits = []
    shared = node("MulBackward0")
    shared.name = lambda: visits.append(1) or "MulBackward0"
    for _ in range(40):  # 2^40 paths
        shared = node("AddBackward0", shared, shared)
    network_checks.check_graph("op", shared)
    assert len(visits) == 1


def test_layers_that_work_are_not_refused():
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.GroupNorm(2, 4), nn.GELU(), nn.MaxPool2d(2), nn.Dropout(0.1))
    network_checks.check_module("op", copy.deepcopy(net))
    network_checks.check_graph("op", net(torch.randn(2, 3, 8, 8)).grad_fn)


# ---- checks that all share ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("error", "words", "check"),
    [
        (TypeError, "op: a must be a tensor, got int", lambda: _checks.require_tensor("op", "a", 3)),
        (
            TypeError,
            "op: a must be float64, float32, bfloat16 or float16, got torch.complex64",
            lambda: _checks.require_floating("op", "a", torch.ones(1, dtype=torch.complex64)),
        ),
        (
            ValueError,
            r"op: a must have shape \[N, C, H, W\], got \[2, 3\]",
            lambda: _checks.require_map("op", "a", torch.ones(2, 3)),
        ),
        (
            ValueError,
            r"op: a must have at least one image, channel and pixel, got \[0, 3, 2, 2\]",
            lambda: _checks.require_map("op", "a", torch.ones(0, 3, 2, 2)),
        ),
        (
            TypeError,
            "op: a must be float64, .* got torch.bool",
            lambda: _checks.require_map("op", "a", torch.ones(1, 1, 1, 1).bool()),
        ),
        (
            ValueError,
            r"op: a must have shape \[3\] to go with b, got \[2\]",
            lambda: _checks.require_same_shape("op", "a", torch.ones(2), "b", (3,)),
        ),
        (
            RuntimeError,
            r"op: a must be on the device of b \(meta\), got cpu",
            lambda: _checks.require_same_device("op", "a", torch.ones(2), "b", torch.ones(2, device="meta")),
        ),
        (ValueError, "op: a must be one of 'p', 'q', got 'r'$", lambda: _checks.require_choice("op", "a", "r", ("p", "q"))),
        (ValueError, "op: a must be one of 'p', got <built-in", lambda: _checks.require_choice("op", "a", abs, ("p",))),
        (
            ValueError,
            "op: a must be one of 'p' or a callable, got 3",
            lambda: _checks.require_choice("op", "a", 3, ("p",), or_callable=True),
        ),
        (ValueError, "op: a must be positive and finite, got -1", lambda: _checks.require_positive("op", "a", -1)),
        (TypeError, "op: window_size must be an int, got str", lambda: _checks.require_window("op", "3")),
        (ValueError, "op: window_size must be odd and at least 1, got 0", lambda: _checks.require_window("op", 0)),
        (
            ValueError,
            r"op: quantiles must be four levels \(lo, hi, gate, area\)",
            lambda: _checks.require_quantiles("op", (0.1, 0.2, -0.1, 0.3)),
        ),
        (
            ValueError,
            "op: quantiles must be four levels .* got .*nan",
            lambda: _checks.require_quantiles("op", (0.1, 0.2, math.nan, 0.3)),
        ),
    ],
    ids=lambda v: v[:50] if isinstance(v, str) else "",
)
def test_check(error, words, check):
    with pytest.raises(error, match=words):
        check()


def test_good_values_pass_the_checks():
    _checks.require_map("op", "a", torch.ones(1, 1, 1, 1).half())
    _checks.require_choice("op", "a", abs, ("p",), or_callable=True)
    _checks.require_window("op", 1)
    assert _checks.require_quantiles("op", [0, 1, 0.5, 0.5]) == (0.0, 1.0, 0.5, 0.5)


# ---- backends -----------------------------------------------------------------------------------------------------------

CPU, META = torch.device("cpu"), torch.device("meta")


def test_why_not_of_an_unknown_backend():
    with pytest.raises(ValueError, match=r"why_not: backend must be one of 'reference', .*'cpu'.*, got 'tpu'"):
        sib_fast.why_not("tpu")


def test_resolve_of_an_unknown_backend():
    with pytest.raises(ValueError, match=r"op: backend must be one of 'auto', 'reference', .*'cpu'.*, got 'tpu'"):
        _backends.resolve("op", "tpu", CPU)


def test_an_explicit_backend_that_is_missing_is_refused(monkeypatch):
    monkeypatch.setitem(_backends.MISSING, "cpu", "it was not built")
    words = (
        r"op: backend 'cpu' is not usable here: it was not built. Use backend='reference' or 'auto', or run `python -m sib_fast"
    )
    with pytest.raises(RuntimeError, match=words):
        _backends.resolve("op", "cpu", CPU)
    assert sib_fast.why_not("cpu") == "it was not built"
    with pytest.raises(RuntimeError, match="foreground_mask: backend 'cpu' is not usable here"):
        sib_fast.foreground_mask(torch.ones(1, 1, 2, 2), backend="cpu")


def test_a_backend_without_a_kernel_of_the_op_is_refused_with_those_that_have_one():
    words = r"op: backend 'triton' has no kernel of this op. Use one of 'auto', 'reference', 'cpu', 'cuda'$"
    with pytest.raises(RuntimeError, match=words):
        _backends.resolve("op", "triton", CPU, ["cpu", "cuda"])


def test_an_explicit_backend_on_another_device_is_refused(monkeypatch):
    monkeypatch.setitem(_backends.MISSING, "cpu", None)
    with pytest.raises(
        RuntimeError, match=r"op: backend 'cpu' runs on cpu tensors, got a tensor on meta. Move the tensor or use backend='auto'"
    ):
        _backends.resolve("op", "cpu", META)


def test_auto_falls_back_and_says_so_once(monkeypatch):
    monkeypatch.setitem(_backends.MISSING, "cpu", "it was not built")
    monkeypatch.setitem(_backends.MISSING, "emulated", "only here")  # the tests' own backend on the CPU
    monkeypatch.setattr(_backends, "_warned", set())
    with pytest.warns(UserWarning, match=r"sib_fast: 'auto' runs the reference on cpu tensors.*: cpu: it was not built"):
        assert _backends.resolve("op", "auto", CPU) == "reference"
    assert _backends.resolve("op", "auto", CPU) == "reference"  # a second warning would be an error in this suite
    monkeypatch.setattr(_backends, "_warned", set())
    with pytest.warns(UserWarning, match="many times slower"):
        sib_fast.foreground_mask(torch.ones(1, 1, 2, 2))


def test_auto_takes_the_kernel_and_the_reference_where_there_is_none(monkeypatch):
    monkeypatch.setitem(_backends.MISSING, "cpu", None)
    assert _backends.resolve("op", "auto", CPU) == "cpu"
    assert _backends.resolve("op", "reference", CPU) == "reference"
    assert _backends.automatic(META, ["cpu", "cuda"]) == "reference"
    assert sib_fast.why_not("reference") is None


# ---- estimators ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", estimators.ESTIMATORS)
def test_estimator(name):
    estimator, eye = estimators.ESTIMATORS[name], torch.eye(5)
    few = estimator.minimum_batch - 1
    for error, words, gram_vjp, gram_x in (
        (TypeError, "gram_vjp must be a tensor, got list", [1.0], eye),
        (TypeError, "gram_x must be a tensor, got NoneType", eye, None),
        (ValueError, r"gram_vjp must have shape \[N, N\], got \[5, 4\]", eye[:, :4], eye),
        (ValueError, r"gram_x must have shape \[N, N\], got \[5\]", eye, eye[0]),
        (ValueError, r"gram_x must have shape \[5, 5\] to go with gram_vjp, got \[4, 4\]", eye, eye[:4, :4]),
        (ValueError, rf"the batch must hold N >= {few + 1} images, got {few}", eye[:few, :few], eye[:few, :few]),
    ):
        with pytest.raises(error, match=f"{name}: {words}"):
            estimator(gram_vjp, gram_x)
    assert estimator(eye[: few + 1, : few + 1], eye[: few + 1, : few + 1]).isfinite()


@pytest.mark.parametrize("sigma", [0.0, -1.0, math.nan])
def test_a_bandwidth_that_is_not_positive(sigma):
    with pytest.raises(ValueError, match=f"hsic_gaussian: sigma must be positive or None, got {sigma!r}"):
        estimators.hsic_gaussian(torch.eye(3), torch.eye(3), sigma)


# ---- the table for users ------------------------------------------------------------------------------------------------

ROOT = Path(__file__).parents[1]
SOURCES = [
    *(
        f"{name}.py"
        for name in (
            "loss",
            "criterion",
            "evidence",
            "evidence_loss",
            "place",
            "attachment",
            "vjp",
            "network_checks",
            "_checks",
            "_backends",
            "_transforms",
        )
    ),
    *("estimators", "integrations", "masks", "nn", "ops"),
]


def literal_text(expression: ast.expr) -> str:
    """The words of a message; an f-string's values become … ."""
    if isinstance(expression, ast.JoinedStr):
        return "".join(p.value if isinstance(p, ast.Constant) else "…" for p in expression.values)
    return expression.value if isinstance(expression, ast.Constant) and isinstance(expression.value, str) else "…"


def messages() -> set[str]:
    """Every rule ("<argument> must …" up to the comma) that the sources can raise."""
    files = [
        f for s in SOURCES for f in ([ROOT / "sib_fast" / s] if s.endswith(".py") else (ROOT / "sib_fast" / s).rglob("*.py"))
    ]
    found = set()
    for tree in (ast.parse(f.read_text(encoding="utf-8")) for f in files):
        for raised in (n for n in ast.walk(tree) if isinstance(n, ast.Raise) and isinstance(n.exc, ast.Call) and n.exc.args):
            if ast.unparse(raised.exc.func) != "AttributeError":  # Python's protocol of __getattr__, read by nobody
                found.add(literal_text(raised.exc.args[0]))
        for constant in (n for n in tree.body if isinstance(n, ast.Assign)):
            if (
                isinstance(constant.value, ast.Constant)
                and isinstance(constant.value.value, str)
                and " must not be used" in constant.value.value
            ):
                found.add(constant.value.value)
    return found


def rule(message: str) -> str:
    """A message without its op, what was got and what to do: the words that the table quotes."""
    return re.split(r", got|: |; |\. ", re.sub(r"^(…|\w+)(\.\w+)?: ", "", message))[0]


def test_every_message_is_documented():
    table = (ROOT / "docs" / "errors.md").read_text(encoding="utf-8")
    rules = {rule(m) for m in messages()} - {"…", "……"}
    assert len(rules) > 40
    assert sorted(r for r in rules if f"`{r}`" not in table) == []


def test_auto_says_once_that_a_device_has_no_kernels(monkeypatch):
    monkeypatch.setattr(_backends, "_warned", set())
    with pytest.warns(UserWarning, match="'auto' runs the reference on cuda tensors.*this version has no kernels for it"):
        assert _backends.resolve("op", "auto", torch.device("cuda")) == "reference"
    assert _backends.resolve("op", "auto", torch.device("cuda")) == "reference"  # a warning is an error in this suite
    assert _backends.resolve("op", "reference", META) == "reference"
