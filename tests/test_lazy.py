"""Lazy S-IB: which steps apply the terms, with which weight, at which cost, and what survives a restart."""

from __future__ import annotations

import copy
import pickle
from contextlib import suppress

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sib_fast import SIBLoss, prepare
from sib_fast.testing.counting import OpLog
from sib_fast.testing.networks import conv_net, image_batch, parameter_gradients

WEIGHTS = {"lambda_fg": 3.0, "lambda_bg": 1000.0, "window_size": 5}


def is_active(criterion: SIBLoss) -> bool:
    return "foreground" in criterion.terms


def train_calls(criterion: SIBLoss, net: nn.Module, calls: int) -> list[bool]:
    """Whether each of so many training calls applied the terms; `active` must have said so before the forward."""
    x, target = image_batch()
    applied = []
    for _ in range(calls):
        said = criterion.active
        criterion(net(x), target).backward()
        assert is_active(criterion) == said
        applied.append(said)
    return applied


@pytest.mark.parametrize(
    ("every", "accumulation_steps", "pattern"),
    [(1, 1, "111111"), (2, 1, "101010"), (3, 1, "100100"), (2, 2, "11001100"), (1, 4, "1111")],
)
def test_every_kth_step_applies(every, accumulation_steps, pattern):
    net = conv_net()
    criterion = SIBLoss(**WEIGHTS, every=every, accumulation_steps=accumulation_steps).attach(net)
    assert train_calls(criterion, net, len(pattern)) == [mark == "1" for mark in pattern]


def test_the_default_applies_always_and_keeps_no_state():
    net = conv_net()
    criterion = SIBLoss(**WEIGHTS).attach(net)
    assert criterion.every == 1
    before = dict(vars(criterion))
    assert all(train_calls(criterion, net, 3))
    changed = {name for name, value in vars(criterion).items() if value is not before[name]}
    assert changed == {"_terms", "_graph_checked"}
    assert criterion.state_dict() == {}


def test_validation_does_not_count():
    x, target = image_batch()
    net = conv_net()
    criterion = SIBLoss(**WEIGHTS, every=3).attach(net)
    assert train_calls(criterion, net, 1) == [True]
    net.eval()
    assert not criterion.active
    with torch.inference_mode():
        criterion(net(x), target)
    criterion(net(x), target)  # with gradients on, but in eval mode
    net.train()
    criterion.eval()
    criterion(net(x), target)
    criterion.train()
    with torch.no_grad():
        assert not criterion.active
        criterion(net(x), target)
    assert train_calls(criterion, net, 5) == [False, False, True, False, False]


def test_a_call_that_raised_does_not_count():
    x, target = image_batch()
    net = conv_net()
    criterion = SIBLoss(**WEIGHTS, every=2).attach(net)
    with pytest.raises(ValueError, match="target must be"):
        criterion(net(x), target[:-1])
    assert train_calls(criterion, net, 2) == [True, False]


def test_the_explicit_form_is_lazy_too():
    x, target = image_batch()
    net, criterion, seen = conv_net(), SIBLoss(**WEIGHTS, every=2), []
    for _ in range(4):
        leaf = x.clone().requires_grad_()
        criterion(net(leaf), target, leaf)
        seen.append(is_active(criterion))
    assert seen == [True, False, True, False]


# ---- weights ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("objective", ["exp", "linear", "expm1"])
@pytest.mark.parametrize(("every_weight", "times"), [("sum", 4), ("mean", 1)])
def test_an_applying_step_has_the_terms_times_every_or_once(every_weight, times, objective):
    x, target = image_batch()
    plain, lazy = conv_net(), conv_net()
    weights = {"lambda_fg": 3.0 * times, "lambda_bg": 1000.0 * times, "window_size": 5, "objective": objective}
    exact = SIBLoss(**weights).attach(plain)(plain(x), target)
    criterion = SIBLoss(**WEIGHTS, objective=objective, every=4, every_weight=every_weight).attach(lazy)
    loss = criterion(lazy(x), target)
    assert torch.equal(loss, exact)
    wanted = parameter_gradients(exact, plain)
    for name, got in parameter_gradients(loss, lazy).items():
        assert torch.equal(got, wanted[name]), name


# ---- the cost of a step between -----------------------------------------------------------------------------------------

# The value that `terms` holds is one copied number; nothing else may differ from a plain step.
LOGGING = [("aten.detach.default", ()), ("aten.clone.default", ())]


def ops_of(step) -> list[tuple[str, tuple]]:
    with OpLog() as log:
        step()
    return log.ops


@pytest.mark.parametrize("prepared", [False, True])
def test_a_step_between_is_a_plain_step_op_for_op(prepared):
    x, target = image_batch()
    plain, lazy = conv_net(), conv_net()
    if prepared:
        prepare(plain), prepare(lazy)
    criterion = SIBLoss(**WEIGHTS, every=2).attach(lazy)
    train_calls(criterion, lazy, 1)
    F.cross_entropy(plain(x), target).backward()  # both have gradients to accumulate into
    wanted = ops_of(lambda: F.cross_entropy(plain(x), target).backward())
    got = ops_of(lambda: criterion(lazy(x), target).backward())
    assert len(wanted) > 30
    at = next(i for i, (a, b) in enumerate(zip(got, wanted, strict=False)) if a != b)
    assert got[at : at + 2] == LOGGING
    assert got[:at] + got[at + 2 :] == wanted
    applying = ops_of(lambda: criterion(lazy(x), target).backward())
    assert len(applying) > 2 * len(wanted), "the log must be able to tell a step that applies"


def test_a_step_between_asks_no_input_gradient():
    x, target = image_batch()
    net = conv_net()
    criterion = SIBLoss(**WEIGHTS, every=2).attach(net)
    train_calls(criterion, net, 1)
    seen: list[Tensor] = []
    net[0].register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    criterion(net(x), target).backward()
    assert seen[0] is x


# ---- the counter --------------------------------------------------------------------------------------------------------


def test_a_resumed_run_continues_where_it_stopped():
    net = conv_net()
    first = SIBLoss(**WEIGHTS, every=3, accumulation_steps=2).attach(net)
    train_calls(first, net, 3)
    state = first.state_dict()
    assert list(state) == ["calls"]
    assert int(state["calls"]) == 3
    first.remove()
    second = SIBLoss(**WEIGHTS, every=3, accumulation_steps=2).attach(net)
    second.load_state_dict(state)
    assert train_calls(second, net, 5) == [False, False, False, True, True]


def test_the_counter_travels_inside_the_model_that_holds_the_criterion():
    def holder(every):
        module = conv_net()
        module.criterion = SIBLoss(**WEIGHTS, every=every)
        return module

    lazy, plain = holder(2), holder(1)
    lazy.criterion._calls = 5
    state = lazy.state_dict()
    assert int(state["criterion.calls"]) == 5
    assert "criterion.calls" not in plain.state_dict()
    # `every` may change between runs, either way, under strict loading.
    plain.load_state_dict(state)
    other = holder(2)
    other.load_state_dict(state)
    assert other.criterion._calls == 5
    other.load_state_dict(plain.state_dict())
    assert other.criterion._calls == 5
    with pytest.raises(RuntimeError, match="Unexpected key"):
        other.load_state_dict({**state, "criterion.other": torch.zeros(())})


@pytest.mark.parametrize("copier", [copy.deepcopy, lambda c: pickle.loads(pickle.dumps(c))], ids=["deepcopy", "pickle"])
def test_copies_carry_the_counter(copier):
    net = conv_net()
    criterion = SIBLoss(**WEIGHTS, every=3).attach(net)
    train_calls(criterion, net, 2)
    other = copier(criterion)
    criterion.remove()
    assert train_calls(other.attach(net), net, 2) == [False, True]


@pytest.mark.parametrize("name", ["every", "accumulation_steps"])
@pytest.mark.parametrize("value", [0, -1, 1.5, True, "2"])
def test_bad_counts(name, value):
    with pytest.raises(ValueError, match=f"SIBLoss: {name} must be an int of at least 1, got"):
        SIBLoss(**{name: value})


def test_bad_every_weight():
    with pytest.raises(ValueError, match="SIBLoss: every_weight must be one of"):
        SIBLoss(every_weight="max")


# ---- steps of several calls ---------------------------------------------------------------------------------------------


def steps_of(criterion: SIBLoss, net: nn.Module, calls: str) -> list[str]:
    """A block for every digit, with so many training calls in it; what each call applied, as 1 or 0."""
    steps = []
    for count in calls:
        with criterion.one_step():
            steps.append("".join("1" if applied else "0" for applied in train_calls(criterion, net, int(count))))
    return steps


def test_all_calls_of_a_block_are_one_step():
    net = conv_net()
    criterion = SIBLoss(**WEIGHTS, every=2).attach(net)
    assert steps_of(criterion, net, "3210312") == ["111", "00", "1", "", "000", "1", "00"]
    assert int(criterion.state_dict()["calls"]) == 6  # a block without a call is no step
    assert train_calls(criterion, net, 3) == [True, False, True]  # outside, a call is a step


def test_without_a_schedule_a_block_changes_nothing():
    net = conv_net()
    criterion = SIBLoss(**WEIGHTS).attach(net)
    assert steps_of(criterion, net, "12") == ["1", "11"]
    assert criterion.state_dict() == {}


def test_validation_in_a_block_does_not_count():
    x, target = image_batch()
    net = conv_net()
    criterion = SIBLoss(**WEIGHTS, every=2).attach(net)
    with criterion.one_step(), torch.no_grad():
        criterion(net(x), target)
    assert steps_of(criterion, net, "11") == ["1", "0"]


def test_a_block_that_raised_is_no_step_and_leaves_none_open():
    net = conv_net()
    criterion = SIBLoss(**WEIGHTS, every=2).attach(net)
    with suppress(ZeroDivisionError), criterion.one_step():
        train_calls(criterion, net, 1)
        raise ZeroDivisionError
    assert steps_of(criterion, net, "211") == ["11", "0", "1"]


def test_a_block_in_a_block_belongs_to_the_outer_one():
    net = conv_net()
    criterion = SIBLoss(**WEIGHTS, every=2).attach(net)
    with criterion.one_step():
        assert steps_of(criterion, net, "12") == ["1", "11"]
    assert steps_of(criterion, net, "1") == ["0"]


def test_a_step_may_be_told_its_number():
    net = conv_net()
    criterion = SIBLoss(**WEIGHTS, every=3).attach(net)
    seen = []
    for number in (0, 0, 1, 2, 3, 3, 7, 9):  # two micro-batches a number, and a jump, as of a run that goes on
        with criterion.one_step(number):
            seen += train_calls(criterion, net, 1)
    assert seen == [True, True, False, False, True, True, False, True]


def test_steps_and_counted_calls_do_not_mix():
    criterion = SIBLoss(**WEIGHTS, every=2, accumulation_steps=4)
    with (
        pytest.raises(ValueError, match=r"SIBLoss.one_step: accumulation_steps must be 1, got 4: put all micro-batches"),
        criterion.one_step(),
    ):
        pass


@pytest.mark.parametrize("when", ["between", "inside"])
def test_a_run_of_blocks_resumes(when):
    """An old checkpoint, which counted calls, loads as ever; one that was written inside a block repeats that step."""
    net = conv_net()
    first = SIBLoss(**WEIGHTS, every=3).attach(net)
    train_calls(first, net, 1)  # as an earlier version counted
    steps_of(first, net, "22")
    with first.one_step():
        train_calls(first, net, 1)
        inside, twin = first.state_dict(), copy.deepcopy(first)
    state = inside if when == "inside" else first.state_dict()
    first.remove()
    second = SIBLoss(**WEIGHTS, every=3).attach(net)
    second.load_state_dict(state)
    assert steps_of(second, net, "21") == (["11", "0"] if when == "inside" else ["00", "0"])
    second.remove()
    twin.attach(net)
    assert steps_of(twin, net, "21") == ["11", "0"]
