"""MultiheadAttention: PyTorch's numbers and both derivatives, without asking for PyTorch's math kernel."""

from __future__ import annotations

import copy
import io
from typing import Optional

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

import sib_fast
from sib_fast import network_checks
from sib_fast.nn.attention import attention
from sib_fast.nn.prepare import fast_class


def make(dtype=torch.float64, **options):
    """A layer and a batch for it, both seeded."""
    torch.manual_seed(0)
    layer = nn.MultiheadAttention(12, 3, **options).to(dtype)
    for parameter in layer.parameters():
        nn.init.normal_(parameter, std=0.4)
    return layer, torch.randn(4, 5, 12, dtype=torch.float64).to(dtype)


def second_order(layer, x, seed=None):
    """y, its gradients, and the gradients of a function of the first one."""
    g = torch.Generator().manual_seed(1)
    leaf = x.detach().clone().requires_grad_()
    cotangent, u = (torch.randn(x.shape, generator=g, dtype=torch.float64).to(x.dtype) for _ in range(2))
    if seed is not None:
        torch.manual_seed(seed)
    y, weights = layer(leaf, leaf, leaf, need_weights=False)
    assert weights is None
    (first,) = torch.autograd.grad(y, leaf, cotangent.requires_grad_(), create_graph=True)
    parameters = list(layer.parameters())
    plain = torch.autograd.grad(y, parameters, cotangent, retain_graph=True)
    second = torch.autograd.grad(first, [cotangent, leaf, *parameters], u, allow_unused=True)
    return [t.detach() for t in (y, first, *plain, *second) if t is not None]


@pytest.mark.parametrize("options", [{"batch_first": True}, {}, {"bias": False, "batch_first": True}], ids=str)
def test_float64_agrees_with_pytorchs_math_kernel(options):
    plain, x = make(**options)
    fast = sib_fast.prepare(copy.deepcopy(plain))
    assert type(fast) is sib_fast.nn.MultiheadAttention
    with sdpa_kernel(SDPBackend.MATH):
        want = second_order(plain, x)
    got = second_order(fast, x)
    # PyTorch returns zeros for what does not depend on the output's bias.
    want = [w for w in want if w.abs().max() > 0]
    got = [g for g in got if g.abs().max() > 0]
    for k, (a, b) in enumerate(zip(got, want, strict=True)):
        assert (a - b).norm() <= 1e-12 * max(b.norm(), 1e-2), k


def test_float32_is_no_worse_than_pytorchs_own():
    plain, x = make(torch.float32, batch_first=True)
    with sdpa_kernel(SDPBackend.MATH):
        low = second_order(plain, x)
        exact = second_order(copy.deepcopy(plain).double(), x.double())
    got = second_order(sib_fast.prepare(plain), x)
    pairs = [(a, b) for a, b in zip(low, exact, strict=True) if b.abs().max() > 0]
    got = [g for g in got if g.abs().max() > 0]
    for k, (a, (b, c)) in enumerate(zip(got, pairs, strict=True)):
        error, allowed = (a - c).norm(), 1.5 * (b - c).norm() + 16 * torch.finfo(torch.float32).eps * c.norm()
        assert error <= allowed, k


def test_dropout_is_pytorchs_at_the_same_seed():
    plain, x = make(batch_first=True, dropout=0.4)
    fast = sib_fast.prepare(copy.deepcopy(plain))
    with sdpa_kernel(SDPBackend.MATH):
        want = second_order(plain, x, seed=3)
    got = second_order(fast, x, seed=3)
    torch.testing.assert_close(got[0], want[0], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(got[1], want[1], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(second_order(fast.eval(), x)[0], second_order(fast, x, seed=5)[0], rtol=0, atol=0)
    assert not torch.equal(got[0], second_order(fast.eval(), x)[0])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_halves_are_calculated_in_float32_as_pytorchs_math_kernel_does(dtype):
    """One rounding, at the end; rounded weights would be off by several."""
    query, key, value = (2 * torch.randn(6, 9, 8).to(dtype) for _ in range(3))
    got, exact = attention(query, key, value), attention(query.double(), key.double(), value.double())
    assert got.dtype == dtype
    torch.testing.assert_close(got.double(), exact, rtol=0.51 * torch.finfo(dtype).eps, atol=2e-6)
    plain, x = make(dtype, batch_first=True)
    with sdpa_kernel(SDPBackend.MATH):
        want = plain(x, x, x, need_weights=False)[0]
    got = sib_fast.prepare(plain)(x, x, x, need_weights=False)[0]
    assert got.dtype == want.dtype
    # A bfloat16 or float16 rounding that falls the other way, in front of the output's projection.
    assert (got - want).norm() <= torch.finfo(dtype).eps * want.norm()


def test_autocast():
    plain, x = make(torch.float32, batch_first=True)
    fast = sib_fast.prepare(copy.deepcopy(plain))
    with torch.autocast("cpu", torch.bfloat16):
        with sdpa_kernel(SDPBackend.MATH):
            want = plain(x, x, x, need_weights=False)[0]
        leaf = x.clone().requires_grad_()
        got = fast(leaf, leaf, leaf, need_weights=False)[0]
    assert got.dtype == want.dtype
    assert (got - want).norm() <= 2e-2 * want.norm()
    (first,) = torch.autograd.grad(got.float().pow(2).sum(), leaf, create_graph=True)
    assert all(torch.isfinite(g).all() for g in torch.autograd.grad(first.pow(2).sum(), [fast.in_proj_weight, leaf]))


CALLS = {
    "weights": lambda layer, x: layer(x, x, x),
    "mask": lambda layer, x: layer(x, x, x, need_weights=False, attn_mask=torch.eye(5, dtype=torch.bool)),
    "padding": lambda layer, x: layer(x, x, x, need_weights=False, key_padding_mask=torch.arange(5).expand(4, 5) > 3),
    "causal": lambda layer, x: layer(
        x, x, x, need_weights=False, attn_mask=nn.Transformer.generate_square_subsequent_mask(5).double(), is_causal=True
    ),
    "cross": lambda layer, x: layer(x, x + 1, x - 1, need_weights=False),
    "unbatched": lambda layer, x: layer(x[0], x[0], x[0], need_weights=False),
}


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_every_other_call_is_pytorchs_own(call):
    plain, x = make(batch_first=True)
    fast = sib_fast.prepare(copy.deepcopy(plain))
    for a, b in zip(call(fast, x), call(plain, x), strict=True):
        assert (a is None) == (b is None)
        assert a is None or torch.equal(a, b)


@pytest.mark.parametrize("options", [{"add_bias_kv": True}, {"add_zero_attn": True}], ids=str)
def test_other_layers_are_pytorchs_own(options):
    plain, x = make(batch_first=True, **options)
    fast = sib_fast.prepare(copy.deepcopy(plain))
    assert torch.equal(fast(x, x, x, need_weights=False)[0], plain(x, x, x, need_weights=False)[0])


def test_without_gradients_it_is_pytorchs_fast_path():
    plain, x = make(batch_first=True)
    fast = sib_fast.prepare(copy.deepcopy(plain)).eval()
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            assert torch.equal(fast(x, x, x, need_weights=False)[0], plain.eval()(x, x, x, need_weights=False)[0])


class Attends(nn.Module):
    """Attention as people write it: a forward of its own that calls PyTorch's."""

    def __init__(self, bias: str = "none", scale: Optional[float] = None, dropout: float = 0.0) -> None:  # noqa: UP045
        super().__init__()
        self.qkv, self.out = nn.Linear(12, 36), nn.Linear(12, 12)
        self.scale, self.dropout = scale, dropout
        shape = {"none": (), "learned": (5, 5), "learned-per-head": (1, 3, 5, 5)}[bias]
        self.bias = nn.Parameter(torch.randn(shape)) if shape else None

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = self.qkv(x).unflatten(-1, (3, 3, 4)).movedim(-3, 0).transpose(-2, -3).unbind(0)
        dropout = self.dropout if self.training else 0.0
        out = F.scaled_dot_product_attention(query, key, value, self.bias, dropout, scale=self.scale)
        return self.out(out.transpose(-2, -3).flatten(-2))


def twice(layer, x, seed=3):
    """y, all first derivatives, and all derivatives of a function of the input's."""
    torch.manual_seed(seed)
    leaf = x.clone().requires_grad_()
    y = layer(leaf)
    g = torch.Generator().manual_seed(1)
    first = torch.autograd.grad(y.mul(torch.randn(y.shape, generator=g).to(y)).sum(), leaf, create_graph=True)
    wanted = [leaf, *layer.parameters()]
    plain = torch.autograd.grad(y.pow(3).sum(), wanted, retain_graph=True)
    second = torch.autograd.grad(first[0].pow(3).sum(), wanted, allow_unused=True)
    return [t.detach() for t in (y, *first, *plain, *second) if t is not None and t.abs().max() > 0]


@pytest.mark.parametrize("shape", [(5,), (2, 5), (2, 3, 5)], ids=str)
@pytest.mark.parametrize("options", [{}, {"scale": 0.3}, {"dropout": 0.4}], ids=str)
@pytest.mark.parametrize("bias", ["none", "learned", "learned-per-head"])
def test_a_module_that_calls_pytorchs_attention(bias, options, shape):
    """The forward stays the module's own, whoever wrote it; its attention becomes one that can be differentiated twice."""
    if bias == "learned-per-head" and len(shape) == 1:
        pytest.skip("no batch for the bias's first dimension")
    torch.manual_seed(0)
    plain = Attends(bias, **options).double()
    fast = sib_fast.prepare(copy.deepcopy(plain))
    assert isinstance(fast, Attends)
    assert type(fast) is not Attends
    assert type(fast).__name__ == "Attends"
    x = torch.randn(*shape, 12, dtype=torch.float64)
    with sdpa_kernel(SDPBackend.MATH):
        want = twice(plain, x)
    got = twice(fast, x)
    assert not network_checks_of(fast(x.requires_grad_())).intersection({"ScaledDotProductFlashAttentionForCpuBackward0"})
    for k, (a, b) in enumerate(zip(got, want, strict=True)):
        assert (a - b).norm() <= 1e-12 * max(b.norm(), 1e-2), k
    with torch.no_grad():
        assert torch.equal(fast.eval()(x), plain.eval()(x))
    assert type(sib_fast.restore(fast)) is Attends


def network_checks_of(y: Tensor) -> set[str]:
    return {node.name() for node in network_checks.nodes_of(y.grad_fn)}


ATTENTION_CALLS = {
    "no mask": {},
    "mask": {"attn_mask": torch.tensor([[True, False, True, True]])},
    "closed row": {"attn_mask": torch.tensor([True, False, True])[:, None].expand(3, 4)},
    "constant bias": {"attn_mask": torch.randn(3, 4, generator=torch.Generator().manual_seed(2))},
    "causal": {"is_causal": True},
    "grouped": {"enable_gqa": True},
}


class Calls(nn.Module):
    def __init__(self, **options):
        super().__init__()
        self.options = options

    def forward(self, query, key, value):
        return F.scaled_dot_product_attention(query, key, value, **self.options)


@pytest.mark.parametrize("name", ATTENTION_CALLS)
def test_other_calls_of_pytorchs_attention_are_its_own(name):
    heads = 2 if name == "grouped" else 4
    query = torch.randn(2, 4, 3, 8, requires_grad=True)
    key, value = (torch.randn(2, heads, 4, 8) for _ in range(2))
    fast = sib_fast.prepare(Calls(**ATTENTION_CALLS[name]))
    got, want = fast(query, key, value), F.scaled_dot_product_attention(query, key, value, **ATTENTION_CALLS[name])
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)
    ours = any("sib_fast" in node for node in network_checks_of(got))
    assert ours == (name == "no mask")
    assert ours or torch.equal(got, want)


def test_autocast_lowers_what_pytorchs_attention_would():
    """With a norm of queries and keys, which autocast leaves in float32, beside values in bfloat16."""
    fast, query = sib_fast.prepare(Calls()), torch.randn(2, 4, 3, 8, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        got = fast(query, query, query.bfloat16())
        want = F.scaled_dot_product_attention(query, query, query.bfloat16())
    assert got.dtype == want.dtype == torch.bfloat16
    torch.testing.assert_close(got, want, rtol=2e-2, atol=2e-2)


def test_a_module_that_no_name_finds_is_left_alone():
    class Attends(nn.Module):
        def forward(self, x):
            return F.scaled_dot_product_attention(x, x, x)

    assert fast_class(Attends) is None
    assert type(sib_fast.prepare(Attends())) is Attends
    assert fast_class(nn.Identity) is None


@pytest.mark.filterwarnings("ignore:.*torch.jit.script:FutureWarning")
def test_a_module_with_our_attention_is_pickled_scripted_traced_and_exported():
    x = torch.randn(2, 5, 12)
    fast = sib_fast.prepare(Attends().eval())
    buffer = io.BytesIO()
    torch.save(fast, buffer)
    buffer.seek(0)
    assert type(torch.load(buffer, weights_only=False)) is type(fast)
    want = fast(x)
    scripted = torch.jit.script(fast)
    graphs = [torch.fx.symbolic_trace(fast), torch.export.export(fast, (x,)).module()]
    for model in (scripted, *graphs):
        torch.testing.assert_close(model(x), want)
    for graph in graphs:
        assert any("scaled_dot_product_attention" in str(node.target) for node in graph.graph.nodes)


def vision_transformer(layers: int) -> nn.Module:
    models = pytest.importorskip("torchvision.models", reason="torchvision does not import", exc_type=ImportError)
    torch.manual_seed(0)
    model = models.VisionTransformer(32, 8, num_layers=layers, num_heads=2, hidden_dim=16, mlp_dim=32, num_classes=5)
    nn.init.normal_(model.heads.head.weight, std=0.3)  # torchvision starts it at zero, which makes the VJP zero too
    return model.double()


def vit_batch():
    draw = torch.Generator().manual_seed(1)
    return torch.randn(4, 3, 32, 32, generator=draw).double(), torch.randint(0, 5, (4,), generator=draw)


def test_a_prepared_vit_trains_without_being_told_of_the_math_kernel():
    model, (x, y) = vision_transformer(2), vit_batch()
    results = []
    for net in (copy.deepcopy(model), sib_fast.prepare(copy.deepcopy(model))):
        criterion = sib_fast.SIBLoss(1.0, 1e4, window_size=5).attach(net)
        if net.encoder.layers[0].ln_1.__class__ is nn.LayerNorm:
            with pytest.raises(RuntimeError, match="fused attention must not be used"):
                criterion(net(x), y)
            with sdpa_kernel(SDPBackend.MATH):
                criterion(net(x), y).backward()
        else:
            criterion(net(x), y).backward()
        results.append([p.grad for p in net.parameters()])
    scale = max(w.norm() for w in results[0])
    for a, b in zip(*results, strict=True):
        assert (a - b).norm() <= 1e-10 * scale


def timms_vision_transformer() -> nn.Module:
    timm = pytest.importorskip("timm", exc_type=ImportError)
    torch.manual_seed(0)
    options = {"num_classes": 5, "img_size": 32, "patch_size": 8, "depth": 2, "embed_dim": 16, "num_heads": 2, "qk_norm": True}
    return timm.models.VisionTransformer(**options).double()


def test_a_prepared_vit_of_timm_trains_with_fused_attention():
    model, (x, y) = timms_vision_transformer(), vit_batch()
    assert model.blocks[0].attn.fused_attn
    results = []
    for net, kernel in ((copy.deepcopy(model), SDPBackend.MATH), (sib_fast.prepare(model), SDPBackend.FLASH_ATTENTION)):
        criterion = sib_fast.SIBLoss(1.0, 1e4, window_size=5).attach(net)
        with sdpa_kernel(kernel):
            criterion(net(x), y).backward()
        results.append([p.grad for p in net.parameters()])
    scale = max(w.norm() for w in results[0])
    for a, b in zip(*results, strict=True):
        assert (a - b).norm() <= 1e-10 * scale


@pytest.mark.sampled(1)
@pytest.mark.skipif(not hasattr(torch._dynamo.config, "trace_autograd_ops"), reason="this torch cannot trace autograd.grad")
@pytest.mark.parametrize("low", [False, True], ids=["float64", "autocast"])
@pytest.mark.parametrize("make", [lambda: vision_transformer(1), timms_vision_transformer], ids=["torchvision", "timm"])
def test_a_compiled_step_of_a_prepared_vit_is_the_eager_one(make, low):
    """Attention, layer norms and GELU in one region; under autocast attention leaves it and comes back."""
    net, (x, y) = sib_fast.prepare(make()), vit_batch()
    net, x = (net.float(), x.float()) if low else (net, x)
    twin, criterion = copy.deepcopy(net), sib_fast.SIBLoss(1.0, 1e4, window_size=5)
    base = copy.deepcopy(net)
    with torch.autocast("cpu", torch.bfloat16, enabled=low):
        sib_fast.compile_step(net, criterion, backend="aot_eager")(x, y).loss.backward()
        leaf = x.clone().requires_grad_()
        criterion(twin(leaf), y, leaf).backward()
        nn.functional.cross_entropy(base(x), y).backward()
    scale = max(p.grad.norm() for p in twin.parameters())
    bound = 2e-2 if low else 1e-11
    for a, b in zip(net.parameters(), twin.parameters(), strict=True):
        assert (a.grad - b.grad).norm() <= bound * scale
    second_order = max((a.grad - b.grad).norm() for a, b in zip(twin.parameters(), base.parameters(), strict=True))
    assert second_order > (5 if low else 1000) * bound * scale
