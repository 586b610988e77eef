"""SIBLoss.attach: the one-line swap, what it captures, when it is active, and what happens to copies and wrappers."""

from __future__ import annotations

import copy
import gc
import io
import weakref
from contextlib import nullcontext

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel

from sib_fast import SIBLoss
from sib_fast.testing.networks import (
    AttentionNet,
    CheckpointNet,
    KeywordNet,
    conv_net,
    image_batch,
    parameter_gradients,
    relative_error,
)

WEIGHTS = {"lambda_fg": 3.0, "lambda_bg": 1000.0, "window_size": 5}


def explicit(net: nn.Module, x: Tensor, target: Tensor, **options) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss and the parameter gradients of the explicit form."""
    leaf = x.detach().clone().requires_grad_()
    loss = SIBLoss(**{**WEIGHTS, **options})(net(leaf), target, leaf)
    return loss, parameter_gradients(loss, net)


def assert_equals_explicit(net: nn.Module, plain: nn.Module, loss: Tensor, x: Tensor, target: Tensor) -> None:
    """Bit for bit: the attached form runs the same operations on the same numbers."""
    exact, wanted = explicit(plain, x, target)
    assert torch.equal(loss, exact)
    for name, got in parameter_gradients(loss, net).items():
        assert torch.equal(got, wanted[name]), name


def is_active(criterion: SIBLoss) -> bool:
    return "foreground" in criterion.terms


# ---- the swap -----------------------------------------------------------------------------------------------------------


def test_equals_the_explicit_form_bit_for_bit():
    x, target = image_batch()
    net, plain = conv_net(), conv_net()
    criterion = SIBLoss(**WEIGHTS)
    assert criterion.attach(net) is criterion
    assert "attached=True" in repr(criterion)
    assert_equals_explicit(net, plain, criterion(net(x), target), x, target)
    for got, exact in zip(net.buffers(), plain.buffers(), strict=True):
        assert torch.equal(got, exact)


def test_the_callers_tensor_is_untouched():
    x, target = image_batch()
    before = x.clone()
    net = conv_net()
    criterion = SIBLoss(**WEIGHTS).attach(net)
    criterion(net(x), target).backward()
    assert x.grad is None
    assert not x.requires_grad
    assert x.is_leaf
    assert torch.equal(x, before)


def test_the_hook_copies_nothing_once_the_model_is_known_to_leave_its_input_alone():
    x, target = image_batch()
    seen = []
    net = conv_net()
    net[0].register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    criterion = SIBLoss().attach(net)
    for _ in range(3):
        criterion(net(x), target)
    criterion.remove()
    assert [tensor.data_ptr() == x.data_ptr() for tensor in seen] == [False, True, True]
    assert all(tensor.requires_grad for tensor in seen)


def test_an_input_that_requires_grad_is_used_as_it_is():
    x, target = image_batch()
    net, plain = conv_net(), conv_net()
    criterion = SIBLoss(**WEIGHTS).attach(net)
    gain = torch.tensor(2.0, requires_grad=True)
    moved = gain * x  # an augmentation that is trained along: it must stay in the graph
    loss = criterion(net(moved), target)
    (grad_gain,) = torch.autograd.grad(loss, gain, retain_graph=True)
    assert grad_gain != 0
    assert_equals_explicit(net, plain, loss, moved, target)


@pytest.mark.parametrize("call", [lambda n, x: n(pixel_values=x), lambda n, x: n(x), lambda n, x: n(flag=False, pixel_values=x)])
def test_keyword_inputs(call):
    x, target = image_batch()
    net = KeywordNet()
    criterion = SIBLoss(**WEIGHTS).attach(net)
    assert_equals_explicit(net, KeywordNet(), criterion(call(net, x), target), x, target)


def test_other_arguments_pass_through():
    class Several(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = conv_net()

        def forward(self, ids, x, *, scale, again):
            assert ids.dtype == torch.int64
            assert not again.requires_grad  # only the first image-like argument is the input
            return self.body(x) * scale

    x, target = image_batch()
    net, plain = Several(), conv_net()
    criterion = SIBLoss(**WEIGHTS).attach(net)
    loss = criterion(net(torch.arange(6), x, scale=1.0, again=x), target)
    assert torch.equal(loss, explicit(plain, x, target)[0])


def test_an_explicit_x_wins_over_the_captured_one():
    x, target = image_batch()
    net = conv_net(norm="group")
    criterion = SIBLoss(**WEIGHTS).attach(net)
    leaf = x.clone().requires_grad_()
    logits = net(leaf)
    net(x)
    assert torch.equal(criterion(logits, target, leaf), explicit(net, x, target)[0])


def test_an_inference_tensor_as_input():
    with torch.inference_mode():
        x, target = image_batch()
    net, plain = conv_net(), conv_net()
    criterion = SIBLoss(**WEIGHTS).attach(net)
    assert_equals_explicit(net, plain, criterion(net(x), target.clone()), x.clone(), target.clone())


def test_a_training_loop_of_several_steps_equals_the_explicit_one():
    batches = [image_batch(images, seed=seed) for seed, images in enumerate((6, 6, 4))]
    net, plain = conv_net(), conv_net()
    criterion = SIBLoss(**WEIGHTS).attach(net)
    optimisers = [torch.optim.SGD(n.parameters(), 1e-3) for n in (net, plain)]
    for x, target in batches:
        leaf = x.clone().requires_grad_()
        for loss, optimiser in (
            (criterion(net(x), target), optimisers[0]),
            (SIBLoss(**WEIGHTS)(plain(leaf), target, leaf), optimisers[1]),
        ):
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
    for got, exact in zip(net.parameters(), plain.parameters(), strict=True):
        assert torch.equal(got, exact)


# ---- when it is active --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["model.eval", "criterion.eval", "no_grad", "inference_mode"])
def test_inactive_is_the_base_loss_and_nothing_else(how):
    x, target = image_batch()
    net = conv_net(norm="group")
    exact = F.cross_entropy(net(x), target)
    criterion = SIBLoss(**WEIGHTS).attach(net)
    net.train(how != "model.eval")
    criterion.train(how != "criterion.eval")
    mode = {"no_grad": torch.no_grad, "inference_mode": torch.inference_mode}.get(how, torch.enable_grad)
    seen = []
    net[0].register_forward_pre_hook(lambda module, args: seen.append(args[0].requires_grad))
    with mode():
        loss = criterion(net(x), target)
    assert torch.equal(loss, exact)
    assert criterion.terms.keys() == {"loss", "base"}
    assert seen == [False]  # the forward is the one it would have been
    assert loss.requires_grad == (mode is torch.enable_grad)
    if loss.requires_grad:
        with pytest.warns(UserWarning, match="in eval mode") if how == "model.eval" else nullcontext():
            loss.backward()


def test_validation_between_steps_changes_nothing():
    x, target = image_batch()
    net, plain = conv_net(norm="group"), conv_net(norm="group")
    criterion = SIBLoss(**WEIGHTS).attach(net)
    logits = net(x)
    net.eval()
    with torch.inference_mode():
        criterion(net(2 * x), target)
    net.train()
    assert_equals_explicit(net, plain, criterion(logits, target), x, target)


def test_active_without_a_captured_forward():
    x, target = image_batch()
    net = conv_net()
    criterion = SIBLoss(**WEIGHTS).attach(net)
    words = "SIBLoss: no input was captured: the attached model has not run forward in training mode with grad enabled"
    with pytest.raises(RuntimeError, match=words):
        criterion(conv_net()(x), target)  # another model's logits
    with torch.no_grad():
        net(x)
    with pytest.raises(RuntimeError, match=words):
        criterion(conv_net()(x), target)


def test_logits_of_a_forward_without_grad():
    x, target = image_batch()
    net = conv_net()
    criterion = SIBLoss(**WEIGHTS).attach(net)
    net(x)
    with torch.no_grad():
        logits = net(x)
    with pytest.raises(RuntimeError, match="SIBLoss: logits must have a graph"):
        criterion(logits, target)


def test_only_the_latest_forward_is_held():
    x, target = image_batch()
    net, plain = conv_net(norm="group"), conv_net(norm="group")
    criterion = SIBLoss(**WEIGHTS).attach(net)
    first = x + 1
    alive = weakref.ref(first.untyped_storage())
    older = net(first)
    newer = net(x)
    with pytest.raises(RuntimeError, match="vjp_map: logits must be computed from x, but their graph does not reach it"):
        criterion(older, target)
    assert_equals_explicit(net, plain, criterion(newer, target), x, target)
    del first, older
    gc.collect()
    assert alive() is None


def test_several_losses_on_one_forward():
    x, target = image_batch()
    net = conv_net(norm="group")
    criterion = SIBLoss(**WEIGHTS).attach(net)
    logits = net(x)
    first, second = criterion(logits, target), criterion(logits, (target + 1) % 5)
    exact = [explicit(net, x, t)[0] for t in (target, (target + 1) % 5)]
    assert torch.equal(first, exact[0])
    assert torch.equal(second, exact[1])
    (first + second).backward()


def test_two_criteria_on_one_model():
    x, target = image_batch()
    net, plain = conv_net(norm="group"), conv_net(norm="group")
    criteria = [SIBLoss(**{**WEIGHTS, "window_size": w}).attach(net) for w in (3, 5)]
    logits = net(x)
    for criterion, window in zip(criteria, (3, 5), strict=True):
        assert torch.equal(criterion(logits, target), explicit(plain, x, target, window_size=window)[0])


# ---- removing -----------------------------------------------------------------------------------------------------------


def test_remove_undoes_attach():
    x, target = image_batch()
    net = conv_net(norm="group")
    criterion = SIBLoss(**WEIGHTS).attach(net)
    net(x)
    criterion.remove()
    assert not net._forward_pre_hooks
    assert "attached=False" in repr(criterion)
    with pytest.raises(
        RuntimeError, match=r"SIBLoss: x must be given while the loss is active: call criterion\(logits, target, x\)"
    ):
        criterion(net(x), target)
    criterion.remove()  # twice is fine
    other = conv_net(norm="group", seed=1)
    assert torch.equal(criterion.attach(other)(other(x), target), explicit(other, x, target)[0])


def test_attach_twice():
    criterion = SIBLoss().attach(conv_net())
    with pytest.raises(
        RuntimeError, match=r"SIBLoss.attach: the criterion is attached to a model already; call remove\(\) first"
    ):
        criterion.attach(conv_net())


def test_a_failed_attach_leaves_nothing_behind():
    net = nn.Sequential(conv_net(), nn.SyncBatchNorm(5))
    criterion = SIBLoss()
    with pytest.raises(RuntimeError, match="SyncBatchNorm"):
        criterion.attach(net)
    assert not net._forward_pre_hooks
    criterion.attach(conv_net())


def test_neither_keeps_the_other_alive():
    x, target = image_batch()
    net = conv_net()
    criterion = SIBLoss(**WEIGHTS).attach(net)
    criterion(net(x), target).backward()
    alive = weakref.ref(net)
    del net
    gc.collect()
    assert alive() is None
    with pytest.raises(RuntimeError, match=r"SIBLoss: the attached model no longer exists; call remove\(\), then attach\(\)"):
        criterion(torch.ones(6, 5, requires_grad=True), target)
    net = conv_net()
    criterion = SIBLoss().attach(net)
    net(x)
    alive = weakref.ref(criterion)
    del criterion
    gc.collect()
    assert alive() is None
    assert not net(x).isnan().any()  # the orphaned hook does nothing


# ---- copies -------------------------------------------------------------------------------------------------------------


def save_and_load(module: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


COPIERS = {
    "deepcopy": copy.deepcopy,
    "save": save_and_load,
    "AveragedModel": lambda net: AveragedModel(net).module,
}


@pytest.mark.parametrize("copier", COPIERS.values(), ids=COPIERS)
@pytest.mark.parametrize("after_a_step", [False, True])
def test_a_copy_of_the_model_carries_no_live_hook(copier, after_a_step):
    x, target = image_batch()
    net, plain = conv_net(norm="group"), conv_net(norm="group")
    criterion = SIBLoss(**WEIGHTS).attach(net)
    if after_a_step:
        criterion(net(x), target).backward()
        net.zero_grad()
    other = copier(net)
    seen = []
    other[0].register_forward_pre_hook(lambda module, args: seen.append(args[0].requires_grad))
    logits = net(x)
    other(2 * x)  # captures nothing: the held forward is still the model's own
    assert seen == [False]
    assert_equals_explicit(net, plain, criterion(logits, target), x, target)
    own = SIBLoss(**WEIGHTS).attach(other)
    assert_equals_explicit(other, plain, own(other(x), target), x, target)


def test_averaged_model_follows_training():
    x, target = image_batch()
    net = conv_net()
    criterion = SIBLoss(**WEIGHTS).attach(net)
    average = AveragedModel(net)
    criterion(net(x), target).backward()
    torch.optim.SGD(net.parameters(), 1e-3).step()
    average.update_parameters(net)
    assert torch.equal(average.module[0].weight, net[0].weight)
    assert average(x).shape == (6, 5)


@pytest.mark.parametrize("copier", [copy.deepcopy, save_and_load], ids=["deepcopy", "pickle"])
def test_a_copy_of_the_criterion_is_not_attached(copier):
    x, target = image_batch()
    net = conv_net(norm="group")
    criterion = SIBLoss(**WEIGHTS).attach(net)
    criterion(net(x), target)
    other = copier(criterion)
    assert "attached=False" in repr(other)
    assert other.terms == {}
    with pytest.raises(RuntimeError, match="SIBLoss: x must be given"):
        other(net(x), target)
    # … and the original still is.
    assert torch.equal(criterion(net(x), target), explicit(net, x, target)[0])
    new = conv_net(norm="group")
    assert torch.equal(other.attach(new)(new(x), target), explicit(new, x, target)[0])


class HoldsItsCriterion(nn.Module):
    """As a LightningModule does. Shapes: [N, 3, H, W] -> [N, 5]."""

    def __init__(self) -> None:
        super().__init__()
        self.body = conv_net(norm="group")
        self.criterion = SIBLoss(**WEIGHTS).attach(self)

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x)


def test_a_model_may_hold_its_criterion():
    x, target = image_batch()
    module = HoldsItsCriterion()
    exact = explicit(conv_net(norm="group"), x, target)[0]
    assert torch.equal(module.criterion(module(x), target), exact)
    module.eval()
    assert module.criterion(module(x), target) < 10
    module.train()
    for other in (copy.deepcopy(module), save_and_load(module)):
        with pytest.raises(RuntimeError, match="SIBLoss: x must be given"):
            other.criterion(other(x), target)
        assert torch.equal(other.criterion.attach(other)(other(x), target), exact)
    assert "criterion" not in "".join(module.state_dict())
    alive = weakref.ref(module)
    del module
    gc.collect()
    assert alive() is None


# ---- wrappers and layers ------------------------------------------------------------------------------------------------


@pytest.fixture
def process_group(tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize("inner", [False, True], ids=["attach(ddp)", "attach(inner)"])
@pytest.mark.parametrize("options", [{}, {"find_unused_parameters": True}, {"gradient_as_bucket_view": True}], ids=str)
def test_distributed_data_parallel(process_group, inner, options):
    x, target = image_batch()
    net, plain = conv_net(), conv_net()
    ddp = DistributedDataParallel(net, **options)
    criterion = SIBLoss(**WEIGHTS).attach(net if inner else ddp)
    exact, wanted = explicit(plain, x, target)
    loss = criterion(ddp(x), target)
    loss.backward()
    assert torch.equal(loss, exact)
    for name, parameter in net.named_parameters():
        assert torch.equal(parameter.grad, wanted[name]), name
    assert x.grad is None
    # Either way it is the inner module that is attached: its own forward counts too.
    net.zero_grad()
    assert torch.equal(criterion(net(x), target), exact)
    ddp.eval()
    assert criterion(ddp(x), target) < 10
    assert not is_active(criterion)


def test_static_graph_is_refused_at_attach(process_group):
    ddp = DistributedDataParallel(conv_net(), static_graph=True)
    with pytest.raises(
        RuntimeError, match=r"SIBLoss.attach: DistributedDataParallel\(static_graph=True\) must not be used: .* in silence"
    ):
        SIBLoss().attach(ddp)


@pytest.mark.parametrize("form", ["attached to the inner module", "explicit"])
def test_static_graph_is_refused_at_the_first_loss(process_group, form):
    x, target = image_batch()
    net = conv_net()
    ddp = DistributedDataParallel(net, static_graph=True)
    criterion = SIBLoss(**WEIGHTS)
    leaf = x
    if form == "explicit":
        leaf = x.requires_grad_()
    else:
        criterion.attach(net)
    with pytest.raises(RuntimeError, match=r"SIBLoss: DistributedDataParallel\(static_graph=True\) must not be used"):
        criterion(ddp(leaf), target, leaf if form == "explicit" else None)


def test_fused_attention_is_refused_and_the_math_kernel_works():
    x, target = image_batch(6, 3, 8, 8)
    net = AttentionNet()
    criterion = SIBLoss(**WEIGHTS).attach(net)
    with pytest.raises(RuntimeError, match=r"SIBLoss: fused attention must not be used: .*sdpa_kernel\(SDPBackend.MATH\)"):
        criterion(net(x), target)
    with sdpa_kernel(SDPBackend.MATH):
        logits = net(x)
    loss = criterion(logits, target)
    loss.backward()
    assert is_active(criterion)
    assert net.patches.weight.grad.isfinite().all()


def test_reentrant_checkpointing_is_refused():
    x, target = image_batch()
    net = CheckpointNet(use_reentrant=True)
    criterion = SIBLoss(**WEIGHTS).attach(net)
    with pytest.raises(RuntimeError, match=r"SIBLoss: reentrant checkpointing must not be used: .* use_reentrant=False"):
        criterion(net(x), target)


def test_non_reentrant_checkpointing_works():
    x, target = image_batch()
    net, plain = CheckpointNet(use_reentrant=False), CheckpointNet(use_reentrant=False)
    criterion = SIBLoss(**WEIGHTS).attach(net)
    loss = criterion(net(x), target)
    exact, wanted = explicit(plain.body, x, target)
    assert torch.equal(loss, exact)
    for name, got in parameter_gradients(loss, net.body).items():
        assert relative_error(got, wanted[name]) < 1e-5, name


def test_the_graph_is_walked_once_per_attached_model():
    # The refusal comes at the first loss after attach(); a later model of the same criterion is looked at again.
    x, target = image_batch()
    good, bad = conv_net(), CheckpointNet(use_reentrant=True)
    criterion = SIBLoss(**WEIGHTS).attach(good)
    criterion(good(x), target)
    criterion.remove()
    criterion.attach(bad)
    with pytest.raises(RuntimeError, match="SIBLoss: reentrant checkpointing must not be used"):
        criterion(bad(x), target)


# ---- a model in eval mode -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layer", [None, "2"])
def test_training_the_base_loss_because_of_eval_mode_warns_once(layer):
    x, target = image_batch()
    net = conv_net().eval()
    criterion = SIBLoss(**WEIGHTS).attach(net, layer)
    exact = parameter_gradients(F.cross_entropy(net(x), target), net)
    with torch.no_grad():
        criterion(net(x), target)
    criterion(net(x), target)  # a validation pass that forgot no_grad: there is no backward, and no word
    words = r"SIBLoss: the attached model must be in training mode .*train_in_eval_mode=True.*criterion\.eval\(\)"
    loss = criterion(net(x), target)
    loss /= 4
    with pytest.warns(UserWarning, match=words):
        (4 * loss).backward()
    for name, parameter in net.named_parameters():
        assert torch.equal(parameter.grad, exact[name]), name
    criterion(net(x), target).backward()  # once is enough: a warning is an error here
    other = SIBLoss(**WEIGHTS).attach(net, layer)
    with pytest.warns(UserWarning, match=words):
        torch.autograd.grad(other(net(x), target), list(net.parameters()))


@pytest.mark.parametrize("every", [2, 3])
def test_it_warns_whatever_the_schedule(every):
    x, target = image_batch()
    net = conv_net()
    criterion = SIBLoss(**WEIGHTS, every=every).attach(net)
    criterion(net(x), target).backward()
    net.eval()
    with pytest.warns(UserWarning, match="in eval mode"):
        criterion(net(x), target).backward()


def test_what_is_meant_does_not_warn():
    x, target = image_batch()
    net = conv_net()
    criterion = SIBLoss(**WEIGHTS).attach(net)
    net.eval(), criterion.eval()
    criterion(net(x), target).backward()
    net.train()
    criterion(net(x), target).backward()
    criterion.train()
    criterion(net(x), target).backward()
    assert is_active(criterion)
    lazy = SIBLoss(**WEIGHTS, every=2, train_in_eval_mode=True).attach(net.eval())
    for _ in range(2):
        lazy(net(x), target).backward()
    assert not is_active(lazy)
    explicit = SIBLoss(**WEIGHTS)
    leaf = x.clone().requires_grad_()
    explicit(net(leaf), target, leaf).backward()
    assert is_active(explicit)


def test_eval_of_a_model_that_holds_its_criterion_warns():
    x, target = image_batch()
    module = HoldsItsCriterion().eval()
    with pytest.warns(
        UserWarning, match=r"SIBLoss: the criterion must be in training mode .*together with the model that holds it"
    ):
        module.criterion(module(x), target).backward()
    assert not is_active(module.criterion)
    module.criterion.train()
    module.criterion.train_in_eval_mode = True
    module.criterion(module(x), target).backward()
    assert is_active(module.criterion)


def test_the_warning_keeps_no_criterion_alive():
    x, target = image_batch()
    net = conv_net().eval()
    criterion = SIBLoss(**WEIGHTS).attach(net)
    loss = criterion(net(x), target)
    alive = weakref.ref(criterion)
    del criterion
    assert alive() is None
    loss.backward()  # nobody is left to warn for


# ---- a model that changes its input -------------------------------------------------------------------------------------


class Centres(nn.Module):
    """conv_net behind a change of its input in place, where `changes` says so. Shapes: [N, 3, H, W] -> [N, 5]."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.changes = conv_net(norm="group"), True

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x.sub_(0.5) if self.changes else x)


@pytest.mark.parametrize("asked", [False, True], ids=["no gradient asked", "requires_grad"])
def test_a_change_in_place_is_not_seen_by_the_caller(asked):
    x, target = image_batch()
    before = x.clone()
    net = Centres()
    criterion = SIBLoss(**WEIGHTS).attach(net)
    x.requires_grad_(asked)
    plain = conv_net(norm="group")
    leaf = before.clone().requires_grad_()
    exact = SIBLoss(**WEIGHTS)(plain(leaf.clone().sub_(0.5)), target, leaf)
    wanted = parameter_gradients(exact, plain)
    for _ in range(3):
        loss = criterion(net(x), target)
        assert torch.equal(loss, exact)
        for name, got in parameter_gradients(loss, net.body).items():
            assert torch.equal(got, wanted[name])
        assert torch.equal(x, before)


def test_a_change_under_no_grad_is_not_seen_by_the_caller():
    class Quietly(Centres):
        def forward(self, x: Tensor) -> Tensor:
            with torch.no_grad():
                x.sub_(0.5)
            return self.body(x)

    x, target = image_batch()
    before, net = x.clone(), Quietly()
    criterion = SIBLoss(**WEIGHTS).attach(net)
    for _ in range(2):
        criterion(net(x), target).backward()
        assert torch.equal(x, before)


def test_a_model_that_changes_its_input_later_is_told_by_pytorch():
    x, target = image_batch()
    net = Centres()
    criterion = SIBLoss(**WEIGHTS).attach(net)
    net.changes = False
    net(x)  # no loss: nothing is known yet
    net.changes = True
    criterion(net(x), target)
    net.changes = False
    criterion(net(x), target)
    net.changes = True
    with pytest.raises(RuntimeError, match="a leaf Variable that requires grad is being used in an in-place operation"):
        net(x)


# ---- hooks of criteria that are gone ------------------------------------------------------------------------------------


@pytest.mark.parametrize("layer", [None, "3"])
def test_hooks_go_with_their_criterion(layer):
    x, target = image_batch()
    net = conv_net()
    for _ in range(50):
        criterion = SIBLoss(**WEIGHTS).attach(net, layer)
        criterion(net(x), target)
    hooks = (net._forward_pre_hooks, net[3]._forward_hooks)
    assert [len(h) for h in hooks] == [1, int(layer is not None)]
    cycle = [criterion]
    cycle.append(cycle)
    del criterion, cycle
    gc.collect()
    assert [len(h) for h in hooks] == [0, 0]
    # A model that goes first, and a copy that outlives its model, trouble nobody.
    other = conv_net()
    criterion = SIBLoss(**WEIGHTS).attach(other, layer)
    twin = copy.deepcopy(criterion)
    del other
    criterion.remove()
    del criterion
    gc.collect()
    assert not twin.attached


# ---- inputs that are no images ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "advice"),
    [
        ([torch.zeros(2, 3, 4, 4, dtype=torch.uint8)], "convert integer images to float"),
        ([torch.zeros(2, 3, 5, 4, 4)], "the rank is another: .*fold the slices or frames"),
        ([torch.zeros(3, 4, 4)], "the rank is another: give a single image a batch dimension"),
        ([[torch.zeros(2, 3, 4, 4)]], "pass the image as an argument of its own"),
    ],
    ids=["integers", "5-D", "3-D", "list"],
)
def test_an_input_that_is_no_image_gets_the_advice_that_fits(arguments, advice):
    class Takes(nn.Module):
        def forward(self, x: object) -> None:
            raise AssertionError("the hook comes first")

    net = Takes()
    criterion = SIBLoss().attach(net)
    with pytest.raises(RuntimeError, match=rf"must be called with a floating-point \[N, C, H, W\] tensor, got .*: {advice}"):
        net(*arguments)
    criterion.remove()
