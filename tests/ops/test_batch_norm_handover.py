"""batch_norm's two gradients of x, added where the second is written: in every pass what plain autograd gives."""

from __future__ import annotations

import gc
import threading
import weakref

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from sib_fast.ops.batch_norm import batch_norm
from sib_fast.testing.counting import OpLog

SHAPE = (4, 3, 5, 6)
BACKWARD = "_batch_norm_backward.default"


class Forward:
    """One forward pass z = sin(leaf) -> batch norm -> y, and losses of y and of its VJP, by one backend."""

    def __init__(self, backend: str, need_x: bool = True, through=None) -> None:
        draw = torch.Generator("cpu").manual_seed(3)

        def drawn(*shape):
            return torch.randn(shape, generator=draw, dtype=torch.float64, device="cpu").to(torch.get_default_device())

        self.leaf = drawn(*SHAPE).requires_grad_(need_x)
        self.weight, self.bias = (drawn(SHAPE[1]).requires_grad_() for _ in range(2))
        self.factor = drawn(*SHAPE)
        self.z = self.leaf.sin()
        self.y = (through or (lambda f, z: f(z)))(lambda z: batch_norm(z, self.weight, self.bias, backend=backend)[0], self.z)

    def vjp(self, power: int = 3):
        """A VJP at z, kept in the graph."""
        return torch.autograd.grad(self.y.pow(power).sum(), self.z, create_graph=True)[0]

    def loss(self, *vjps):
        return (self.y.sigmoid() * self.factor).sum() + sum((v.sin() * self.factor).sum() for v in vjps)

    @property
    def parameters(self):
        return [t for t in (self.leaf, self.weight, self.bias) if t.requires_grad]

    @property
    def grads(self):
        return [t.grad for t in self.parameters]


def a_step(make):
    f = make()
    f.loss(f.vjp()).backward()
    return f.grads


def two_passes(make):
    f = make()
    loss = f.loss(f.vjp())
    loss.backward(retain_graph=True)
    once = [g.clone() for g in f.grads]
    loss.backward()
    return [*once, *f.grads]


def two_vjps_in_one_pass(make):
    f = make()
    f.loss(f.vjp(), f.vjp(2)).backward()
    return f.grads


def two_vjps_in_two_passes(make):
    f = make()
    first, second = f.loss(f.vjp()), f.loss(f.vjp(2))
    first.backward(retain_graph=True)
    second.backward()
    return f.grads


def the_vjp_alone(make):
    """y's own gradient does not exist in the last pass: its cotangent is a constant."""
    f = make()
    (vjp,) = torch.autograd.grad(f.y, f.z, f.factor, create_graph=True)
    return [*torch.autograd.grad(vjp.sin().sum(), [f.leaf, f.weight])]


def a_pass_with_respect_to_x(make):
    f = make()
    return torch.autograd.grad(f.loss(f.vjp()), [f.leaf])


def a_pass_with_respect_to_z_and_leaf(make):
    f = make()
    return torch.autograd.grad(f.loss(f.vjp()), [f.z, f.leaf])


def a_pass_with_respect_to_y(make):
    f = make()
    return torch.autograd.grad(f.loss(f.vjp()), [f.y])


def a_pass_with_respect_to_y_and_x(make):
    f = make()
    return torch.autograd.grad(f.loss(f.vjp()), [f.y, f.z])


def a_pass_with_respect_to_the_weight(make):
    f = make()
    return torch.autograd.grad(f.loss(f.vjp()), [f.weight])


def backward_with_inputs(make):
    f = make()
    f.loss(f.vjp()).backward(inputs=[f.weight, f.leaf])
    return [f.weight.grad, f.leaf.grad]


def a_pass_with_a_graph(make):
    f = make()
    first = torch.autograd.grad(f.loss(f.vjp()), f.parameters, create_graph=True)
    return [t.detach() for t in first]


def x_used_elsewhere(make):
    f = make()
    (f.loss(f.vjp()) + (f.z.exp() * f.factor).sum()).backward()
    return f.grads


def x_unneeded(make):
    f = make(need_x=False)
    f.loss().backward()
    return f.grads


def hooks_of_x_see_the_whole_gradient(make):
    f, seen = make(), []
    loss = f.loss(f.vjp())
    f.z.retain_grad()
    f.z.register_hook(seen.append)
    loss.backward()
    assert len(seen) == 1
    return [f.z.grad, *seen, *f.grads]


def a_hook_of_x_changes_it(make):
    f = make()
    loss = f.loss(f.vjp())
    f.z.register_hook(lambda grad: 3 * grad)
    loss.backward()
    return f.grads


def checkpointed(make):
    f = make(through=lambda function, z: checkpoint(function, z, use_reentrant=False))
    f.loss(f.vjp()).backward()
    return f.grads


def saved_elsewhere(make):
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t.clone(), lambda t: t):
        f = make()
        f.loss(f.vjp()).backward()
    return f.grads


def after_a_pass_that_failed(make):
    """The failure comes when to_x is on its way and has not been added."""
    f = make()
    loss = f.loss(f.vjp())
    armed = [True]

    def fail(grad):
        if armed[0]:
            raise RuntimeError("in between")

    f.y.register_hook(fail)
    with pytest.raises(RuntimeError, match="in between"):
        loss.backward(retain_graph=True)
    assert f.leaf.grad is None
    armed[0] = False
    for t in f.parameters:
        t.grad = None
    loss.backward()
    return f.grads


def a_vjp_that_is_not_used(make):
    f = make()
    f.vjp()
    f.loss().backward()
    return f.grads


def gradients_in_the_last_pass_only(make):
    """A gradient penalty through weight and bias too: u_γ and u_β."""
    f = make()
    parts = torch.autograd.grad(f.y.pow(3).sum(), [f.z, f.weight, f.bias], create_graph=True)
    (f.loss() + sum(t.pow(2).sum() for t in parts)).backward()
    return f.grads


CASES = [
    a_step,
    two_passes,
    two_vjps_in_one_pass,
    two_vjps_in_two_passes,
    the_vjp_alone,
    a_pass_with_respect_to_x,
    a_pass_with_respect_to_z_and_leaf,
    a_pass_with_respect_to_y,
    a_pass_with_respect_to_y_and_x,
    a_pass_with_respect_to_the_weight,
    backward_with_inputs,
    a_pass_with_a_graph,
    x_used_elsewhere,
    x_unneeded,
    hooks_of_x_see_the_whole_gradient,
    a_hook_of_x_changes_it,
    checkpointed,
    saved_elsewhere,
    after_a_pass_that_failed,
    a_vjp_that_is_not_used,
    gradients_in_the_last_pass_only,
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.__name__)
def test_equals_plain_autograd(case, kernel):
    got = case(lambda **options: Forward(kernel, **options))
    want = case(lambda **options: Forward("reference", **options))
    assert len(got) == len(want)
    for k, (a, b) in enumerate(zip(got, want, strict=True)):
        assert (a - b).norm() <= 1e-11 * max(b.norm(), 1e-3), k


def backwards(log: OpLog) -> list[bool]:
    """Of every backward op, in order: whether it got something to add (an absent one is among what is no tensor)."""
    return [arguments.count(None) == 0 for name, arguments in log.calls if name.endswith(BACKWARD)]


def adds(log: OpLog) -> int:
    return sum(name.startswith("aten.add") and SHAPE in shapes for name, shapes in log.ops)


def test_the_last_pass_adds_in_the_layer(kernel):
    f = Forward(kernel)
    with OpLog() as log:
        loss = f.loss(f.vjp())
    assert backwards(log) == [False]
    with OpLog() as log:
        loss.backward()
    assert backwards(log) == [True]
    # What is left meets at y: its gradients by the loss, and by the VJP's cotangent.
    assert adds(log) == 1


def test_what_is_handed_over_alone_needs_no_pass(kernel):
    f = Forward(kernel)
    (vjp,) = torch.autograd.grad(f.y, f.z, f.factor, create_graph=True)
    with OpLog() as log:
        torch.autograd.grad(vjp.sin().sum(), f.leaf)
    assert backwards(log) == []
    assert adds(log) == 0


def test_a_plain_step_has_nothing_to_add(kernel):
    f = Forward(kernel)
    with OpLog() as log:
        f.loss().backward()
    assert backwards(log) == [False]


def test_an_x_without_a_gradient_is_not_asked_for_one(kernel):
    f = Forward(kernel, need_x=False)
    (grad_weight,) = torch.autograd.grad(f.y.pow(3).sum(), f.weight, create_graph=True)
    with OpLog() as log:
        grad_weight.sum().backward()
    assert [arguments[-2:] for name, arguments in log.calls if "_batch_norm_double_backward" in name] == [(True, False)]


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["contiguous", "channels_last"])
def test_whatever_the_layout_of_the_addend(layout, kernel):
    """x in one layout, its cotangents in the other."""
    results = []
    for backend in (kernel, "reference"):
        f = Forward(backend, through=lambda function, z: function(z.contiguous(memory_format=layout)))
        other = torch.channels_last if layout == torch.contiguous_format else torch.contiguous_format
        vjp = f.vjp().contiguous(memory_format=other)
        f.loss(vjp).backward()
        results.append(f.grads)
    for a, b in zip(*results, strict=True):
        assert (a - b).norm() <= 1e-11 * b.norm()


def test_the_third_derivative_is_still_refused(kernel):
    f = Forward(kernel)
    (first,) = torch.autograd.grad(f.loss(f.vjp()), f.leaf, create_graph=True)
    with pytest.raises(NotImplementedError, match="third derivative exists only with backend='reference'"):
        first.sum().backward()


def test_an_input_changed_in_place_is_noticed(kernel):
    f = Forward(kernel)
    f.z.detach().add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        f.loss().backward()


def test_passes_in_several_threads(kernel):
    """One graph, passes at the same time: each has its own sums."""
    f, reference = Forward(kernel), Forward("reference")
    losses = [[g.loss(g.vjp(power)) for power in (2, 3, 4)] for g in (f, reference)]
    results: list = [None] * 3

    def work(k: int) -> None:
        for _ in range(5):
            results[k] = torch.autograd.grad(losses[0][k], f.parameters, retain_graph=True)

    threads = [threading.Thread(target=work, args=(k,)) for k in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for got, loss in zip(results, losses[1], strict=True):
        for a, b in zip(got, torch.autograd.grad(loss, reference.parameters, retain_graph=True), strict=True):
            assert (a - b).norm() <= 1e-11 * b.norm()


@pytest.mark.parametrize("fails", [False, True])
def test_nothing_is_kept(fails, kernel):
    """After the pass, or a pass that failed, and the graph: no activation is alive, without a garbage collection."""
    f = Forward(kernel)
    gc.collect()
    gc.disable()
    try:
        with OpLog() as log:
            y = batch_norm(f.leaf, f.weight, f.bias, backend=kernel)[0]
            node = weakref.ref(y.grad_fn)
            (vjp,) = torch.autograd.grad(y.pow(3).sum(), f.leaf, create_graph=True)
            if fails:
                y.register_hook(lambda grad: 1 / 0)
            loss = y.sin().sum() + vjp.sin().sum()
            try:
                loss.backward()
            except ZeroDivisionError:
                assert fails
            f.leaf.grad = None
            del y, vjp, loss
        alive = [storage for storage in log.alive(f.leaf.numel() * 8) if storage.data_ptr() != f.leaf.data_ptr()]
        assert alive == []
        assert node() is None
    finally:
        gc.enable()


def test_the_addend_has_a_gradient_of_its_own(registered):
    """In a pass with create_graph it is what the next derivative goes through."""
    x, grad_y, u = (torch.randn(SHAPE) for _ in range(3))
    addend = torch.randn(SHAPE, requires_grad=True)
    _, mean, _, invstd = registered._batch_norm(x, None, None, 1e-5)
    grad_x = registered._batch_norm_backward(grad_y, x, None, mean, invstd, addend, True)[0]
    assert torch.equal(torch.autograd.grad(grad_x, addend, u)[0], u)


def test_an_addend_that_lies_otherwise_is_refused(registered):
    x = torch.randn(SHAPE)
    mean = torch.zeros(SHAPE[1], dtype=torch.float64)
    for addend, words in (
        (x.contiguous(memory_format=torch.channels_last), "layout"),
        (x[:2], "shape"),
        (x.double(), "dtype"),
    ):
        with pytest.raises(RuntimeError, match=f"addend must have the {words} of x"):
            registered._batch_norm_backward(x, x, None, mean, mean, addend, True)


@pytest.mark.skipif(not hasattr(torch._dynamo.config, "trace_autograd_ops"), reason="this torch cannot trace torch.autograd.grad")
@pytest.mark.parametrize("compiler", ["aot_eager", pytest.param("inductor", marks=pytest.mark.long)])
def test_compiled_in_one_graph(compiler, kernel):
    """Forward and VJP in one compiled region, as compile_step has them: the same gradients, and the handover in the graph."""
    f = Forward(kernel)

    def step(z, weight, bias):
        leaf = z.detach().requires_grad_() if not z.requires_grad else z
        y = batch_norm(leaf, weight, bias, backend=kernel)[0]
        (vjp,) = torch.autograd.grad(y.pow(3).sum(), leaf, create_graph=True)
        return (y.sigmoid() * f.factor).sum() + (vjp.sin() * f.factor).sum()

    inputs = [t.detach().requires_grad_() for t in (f.z, f.weight, f.bias)]
    want = torch.autograd.grad(step(*inputs), inputs)
    torch._dynamo.reset()
    with torch._dynamo.config.patch(trace_autograd_ops=True):
        loss = torch.compile(step, fullgraph=True, backend=compiler)(*inputs)
    with OpLog() as log:
        got = torch.autograd.grad(loss, inputs)
    for a, b in zip(got, want, strict=True):
        assert (a - b).norm() <= 1e-11 * b.norm()
    assert backwards(log) == [True]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_the_sum_is_rounded_once(dtype, registered):
    """Beside a grad_x, an addend so large that adding the rounded two would round a second time."""
    x, grad_y, addend = (torch.randn(6, 4, 5, 7).to(dtype) for _ in range(3))
    _, mean, _, invstd = registered._batch_norm(x, None, None, 1e-5)
    got = registered._batch_norm_backward(grad_y, x, None, mean, invstd, 4 * addend, True)[0]
    alone = registered._batch_norm_backward(grad_y.double(), x.double(), None, mean, invstd, None, True)[0]
    torch.testing.assert_close(got.double(), alone + 4 * addend.double(), rtol=0.51 * torch.finfo(dtype).eps, atol=2e-6)
