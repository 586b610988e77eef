"""timm: the task API, and the plain loop of its older versions."""

from __future__ import annotations

import pytest
import torch
from torch import nn

timm = pytest.importorskip("timm", reason="extra [timm]", exc_type=ImportError)
pytest.importorskip("timm.task", reason="timm without a task API", exc_type=ImportError)

from timm.loss import LabelSmoothingCrossEntropy  # noqa: E402
from timm.optim import create_optimizer_v2  # noqa: E402

from sib_fast import EvidenceLoss, SIBLoss  # noqa: E402
from sib_fast.integrations.timm import SIBTask  # noqa: E402
from sib_fast.testing.networks import conv_net  # noqa: E402
from tests.integrations.steps import WEIGHTS, assert_same_parameters, batches_of, explicit_steps  # noqa: E402


def train(task, batches, lr=0.1, accumulate=1):
    """The core of timm's train.py: task(input, target), loss /= accumulation steps, backward, step."""
    optimiser = torch.optim.SGD(task.parameters(), lr=lr)
    task.train()
    results = []
    for i, (x, target) in enumerate(batches):
        result = task(x, target)
        loss = result["loss"]
        if accumulate > 1:
            loss /= accumulate
        loss.backward()
        if (i + 1) % accumulate == 0:
            optimiser.step()
            optimiser.zero_grad()
        results.append(result)
    return results


@pytest.mark.filterwarnings("ignore:.*fewer than 7×7")
def test_a_task_with_evidence_alone():
    net = conv_net()
    results = train(SIBTask(net, EvidenceLoss("share", window_size=5), verbose=False), batches_of(4), accumulate=2)
    wanted = explicit_steps(batches_of(4), lr=0.1, every=2, criterion=EvidenceLoss("share", window_size=5))
    assert_same_parameters(net, wanted)
    assert results[0].keys() == {"loss", "output", "base", "share", "evidence_dead", "object_cells"}


@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_task_trains_as_the_explicit_form_does(accumulate):
    net = conv_net()
    results = train(SIBTask(net, SIBLoss(**WEIGHTS), verbose=False), batches_of(4), accumulate=accumulate)
    assert_same_parameters(net, explicit_steps(batches_of(4), lr=0.1, every=accumulate))
    assert results[0].keys() == {"loss", "output", "base", "foreground", "background", "mask_area"}
    assert all(torch.isfinite(value).all() for value in results[-1].values())


def test_validation_sees_the_base_loss():
    net = conv_net()
    task = SIBTask(net, SIBLoss(**WEIGHTS), verbose=False)
    (x, target), *_ = batches_of(1)
    task.eval()
    with torch.inference_mode():
        result = task(x, target)
        wanted = nn.functional.cross_entropy(net(x), target)
    assert torch.equal(result["loss"], wanted)
    assert result.keys() == {"loss", "output", "base"}


def test_a_network_in_eval_mode():
    """timm's loop calls task.train(), which reaches the network; a loop that does not is warned."""
    (x, target), *_ = batches_of(1)
    net = conv_net().eval()
    train(SIBTask(net, SIBLoss(**WEIGHTS), verbose=False), batches_of(2))
    assert_same_parameters(net, explicit_steps(batches_of(2), lr=0.1))
    task = SIBTask(conv_net().eval(), SIBLoss(**WEIGHTS), verbose=False)
    with pytest.warns(UserWarning, match="SIBLoss: the attached model must be in training mode"):
        task(x, target)["loss"].backward()
    task = SIBTask(conv_net().eval(), SIBLoss(**WEIGHTS, train_in_eval_mode=True), verbose=False)
    assert task(x, target)["foreground"] > 0


def test_soft_targets_of_mixup():
    x, target = batches_of(1)[0]
    mixup = timm.data.Mixup(mixup_alpha=0.8, cutmix_alpha=1.0, num_classes=5)
    mixed, soft = mixup(x.clone(), target)
    result = SIBTask(conv_net(), SIBLoss(**WEIGHTS), verbose=False).train()(mixed, soft)
    assert result["foreground"] > 0


def test_the_call_of_train_py():
    """docs/trainers.md: its own loss goes inside, the other arguments stay."""
    x, target = batches_of(1)[0]
    own = LabelSmoothingCrossEntropy(smoothing=0.1)
    criterion = SIBLoss(**WEIGHTS, base_loss=own, objective="expm1")
    net = conv_net()
    task = SIBTask(model=net, criterion=criterion, device=torch.device("cpu"), dtype=None, verbose=False).train()
    result = task(x, target)
    torch.testing.assert_close(result["base"], own(net(x), target))
    assert result["loss"] < 100  # with "exp" it is above lambda_bg


def test_an_average_of_the_weights_carries_no_hook():
    net = conv_net()
    task = SIBTask(net, SIBLoss(**WEIGHTS), verbose=False)
    task.setup_ema(decay=0.5)
    train(task, batches_of(1))
    task.update_ema()
    (x, _), *_ = batches_of(1)
    ema = task.get_trainable_module(ema=True)
    assert torch.isfinite(ema(x)).all()
    assert task.criterion.attached


def test_a_timm_network_and_its_checkpoint():
    net = timm.create_model("resnet10t", num_classes=5)
    task = SIBTask(net, SIBLoss(**WEIGHTS), verbose=False)
    x = torch.randn(4, 3, 48, 48)
    train(task, [(x, torch.arange(4))])
    state = task.get_checkpoint_state()
    plain = timm.create_model("resnet10t", num_classes=5)
    assert plain.load_state_dict(state["state_dict"])
    SIBTask(plain, SIBLoss(**WEIGHTS), verbose=False).load_checkpoint_state(state["state_dict"], state.get("task_state"))


def test_a_vision_transformer_needs_nothing():
    """SIBTask prepares it, attention included; a model that is not prepared is told so."""
    x, target = torch.randn(2, 3, 32, 32), torch.tensor([0, 1])
    net = timm.create_model("vit_tiny_patch16_224", num_classes=5, img_size=32, depth=2, embed_dim=48, num_heads=3)
    criterion = SIBLoss(**WEIGHTS).attach(net)
    if net.blocks[0].attn.fused_attn:
        with pytest.raises(RuntimeError, match=r"fused attention must not be used.*sib_fast\.prepare"):
            criterion(net(x), target)
    criterion.remove()
    SIBTask(net, SIBLoss(**WEIGHTS), verbose=False).train()(x, target)["loss"].backward()


def test_what_would_fail_is_refused_in_words():
    wanted = r"SIBTask: criterion must be a SIBLoss or an EvidenceLoss, got CrossEntropyLoss.*SIBLoss\(base_loss="
    with pytest.raises(TypeError, match=wanted):
        SIBTask(conv_net(), nn.CrossEntropyLoss(), verbose=False)
    task = SIBTask(conv_net(), verbose=False)
    with pytest.raises(RuntimeError, match=r"SIBTask\.compile: the model must not be compiled by itself"):
        task.compile()
    with pytest.raises(RuntimeError, match="static_graph must be False"):
        task.prepare_distributed(static_graph=True)


def test_the_plain_loop():
    """timm's train.py before tasks: loss_fn(model(x), target)."""
    net = conv_net()
    criterion = SIBLoss(**WEIGHTS).attach(net)
    optimiser = create_optimizer_v2(net, opt="momentum", lr=0.1, momentum=0.0)
    for x, target in batches_of(3):
        loss = criterion(net(x), target)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    wanted = explicit_steps(batches_of(3), lr=0.1, fast=False)
    assert_same_parameters(net, wanted)
