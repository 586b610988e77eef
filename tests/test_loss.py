"""SIBLoss, called explicitly: against the plain-PyTorch step, its options, targets, masks, terms, degenerate batches."""

from __future__ import annotations

import copy
import importlib
import math
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import sib_fast
from sib_fast import SIBLoss, foreground_mask, region_statistics, vjp_map
from sib_fast.estimators import BACKGROUNDS, ESTIMATORS
from sib_fast.loss import OBJECTIVES
from sib_fast.masks import collate
from sib_fast.testing.networks import conv_net, image_batch, parameter_gradients, plain_step, relative_error
from sib_fast.vjp import SCALARS

# Weights at which the S-IB terms make up about half of every gradient of `conv_net`, so that an error in them shows.
WEIGHTS = {"lambda_fg": 3.0, "lambda_bg": 1000.0, "window_size": 5}
TERMS = ("loss", "base", "foreground", "background")


def run(net: nn.Module, x: Tensor, target: Tensor, given: object = None, **options) -> tuple[SIBLoss, Tensor, Tensor]:
    """One explicit step. Returns (criterion, loss, x as a leaf)."""
    criterion = SIBLoss(**{**WEIGHTS, **options})
    x = x.detach().clone().requires_grad_()
    return criterion, criterion(net(x), target, x, given), x


def gradients(loss: Tensor, net: nn.Module, x: Tensor) -> dict[str, Tensor]:
    (grad_x,) = torch.autograd.grad(loss, x, retain_graph=True)
    return {**parameter_gradients(loss, net), "x": grad_x}


def assert_same_step(net: nn.Module, x: Tensor, target: Tensor, tolerance: float, **options) -> None:
    """Terms, every parameter gradient and the input's gradient, ours against the plain step."""
    plain_net = copy.deepcopy(net)
    plain_options = {k: v for k, v in {**WEIGHTS, **options}.items() if k != "backend"}
    plain = plain_step(plain_net, x, target, **plain_options)
    criterion, loss, leaf = run(net, x, target, **options)
    for name in TERMS:
        assert relative_error(criterion.terms[name], getattr(plain, name)) < tolerance, name
    assert relative_error(criterion.terms["mask_area"], plain.mask.mean()) < tolerance
    assert torch.equal(loss, criterion.terms["loss"])
    exact = gradients(plain.loss, plain_net, plain.x)
    for name, got in gradients(loss, net, leaf).items():
        assert exact[name].any(), f"{name}: a zero gradient shows nothing"
        assert relative_error(got, exact[name]) < tolerance, name


# ---- against plain PyTorch ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("norm", ["batch", "group"])
def test_equals_the_plain_step_in_float64(backend, norm):
    x, target = image_batch()
    assert_same_step(conv_net(norm=norm).double(), x.double(), target, 1e-11, backend=backend)


def test_the_terms_alone_equal_the_plain_step(backend):
    # No base loss to hide behind.
    x, target = image_batch(seed=3)
    zero = lambda logits, _: 0.0 * logits.sum()  # noqa: E731
    plain = plain_step(conv_net().double(), x.double(), target, base_loss=zero, **WEIGHTS)
    assert plain.base == 0
    net = conv_net().double()
    _, loss, leaf = run(net, x.double(), target, base_loss=zero, backend=backend)
    plain_net = conv_net().double()
    exact = gradients((p := plain_step(plain_net, x.double(), target, base_loss=zero, **WEIGHTS)).loss, plain_net, p.x)
    for name, got in gradients(loss, net, leaf).items():
        assert relative_error(got, exact[name]) < 1e-11, name


def test_the_weights_of_this_file_let_an_error_show():
    x, target = image_batch()
    net = conv_net().double()
    _, loss, leaf = run(net, x.double(), target)
    _, base, base_leaf = run(net, x.double(), target, lambda_fg=0.0, lambda_bg=0.0)
    full, plain = gradients(loss, net, leaf), gradients(base, net, base_leaf)
    assert min(relative_error(plain[name], full[name]) for name in full) > 0.2


def test_equals_the_plain_step_in_float32(backend):
    # 132 pixels: no two ranks are within float32's rounding of each other, so the same pixels are selected on both sides.
    x, target = image_batch()
    assert_same_step(conv_net(), x, target, 1e-5, backend=backend)


def test_float32_is_no_further_from_float64_than_plain_float32_is(backend):
    x, target = image_batch(seed=2)
    nets = {dtype: conv_net().to(dtype) for dtype in (torch.float64, torch.float32)}
    plain = {d: plain_step(net, x.to(d), target, **WEIGHTS) for d, net in nets.items()}
    exact, low = (gradients(plain[d].loss, nets[d], plain[d].x) for d in nets)
    net = conv_net()
    _, loss, leaf = run(net, x, target, backend=backend)
    for name, got in gradients(loss, net, leaf).items():
        floor = 8 * torch.finfo(torch.float32).eps
        assert relative_error(got, exact[name]) <= 1.5 * relative_error(low[name], exact[name]) + floor, name


def test_every_parameter_gradient_of_resnet18_in_train_mode(backend):
    try:
        from torchvision.models import resnet18
    except Exception as error:  # a torchvision built for another torch fails with more than ImportError
        pytest.skip(f"torchvision does not import: {error}")
    x, target = image_batch(4, 3, 48, 48, classes=10)
    assert_same_step(resnet18(num_classes=10).double().train(), x.double(), target, 1e-10, window_size=9, backend=backend)


def test_batch_norm_statistics_are_updated_once(backend):
    x, target = image_batch()
    net, plain = conv_net(), conv_net()
    plain(x)
    _, loss, _ = run(net, x, target, backend=backend)
    loss.backward()
    for (name, got), exact in zip(net.named_buffers(), plain.buffers(), strict=True):
        assert torch.equal(got, exact), name
    assert net[1].num_batches_tracked == 1


def test_training_moves_both_terms():
    x, target = image_batch()
    end = {}
    for weight in (0.0, 1.0):
        net = conv_net(norm="group")
        optimiser = torch.optim.SGD(net.parameters(), 0.05)
        for _ in range(30):
            criterion, loss, _ = run(net, x, target, lambda_fg=10 * weight, lambda_bg=1e6 * weight, objective="linear")
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
        end[weight] = {name: term.item() for name, term in criterion.terms.items()}
    assert end[1.0]["foreground"] > end[0.0]["foreground"]
    assert end[1.0]["background"] < end[0.0]["background"]


def test_two_backwards_with_a_retained_graph(backend):
    x, target = image_batch()
    net = conv_net().double()
    _, loss, _ = run(net, x.double(), target, backend=backend)
    first = torch.autograd.grad(loss, tuple(net.parameters()), retain_graph=True)
    second = torch.autograd.grad(loss, tuple(net.parameters()), torch.tensor(-2.0).double())
    for a, b in zip(first, second, strict=True):
        assert relative_error(b, -2 * a) < 1e-12


def test_channels_last_gives_the_same_numbers(backend):
    x, target = image_batch()
    net = conv_net().double()
    _, exact, leaf = run(net, x.double(), target, backend=backend)
    wanted = gradients(exact, net, leaf)
    last = x.double().contiguous(memory_format=torch.channels_last)
    _, loss, leaf = run(net.to(memory_format=torch.channels_last), last, target, backend=backend)
    assert leaf.is_contiguous(memory_format=torch.channels_last)
    assert relative_error(loss, exact) < 1e-12
    for name, got in gradients(loss, net, leaf).items():
        assert relative_error(got, wanted[name]) < 1e-10, name


def test_x_may_be_a_feature_map():
    x, target = image_batch()
    net = conv_net().double()
    feature = net[:3](x.double().requires_grad_())
    criterion = SIBLoss(**WEIGHTS)
    loss = criterion(net[3:](feature), target, feature)
    tail = copy.deepcopy(net[3:])
    exact = plain_step(tail, feature, target, **WEIGHTS)
    assert relative_error(criterion.terms["foreground"], exact.foreground) < 1e-11
    wanted = parameter_gradients(exact.loss, tail)
    for name, got in parameter_gradients(loss, net[3:]).items():
        assert relative_error(got, wanted[name]) < 1e-10, name


@pytest.mark.parametrize(("logits_dtype", "x_dtype"), [("float64", "float32"), ("float32", "float64"), ("float32", "float32")])
def test_float64_if_logits_or_x_are(backend, logits_dtype, x_dtype):
    logits_dtype, x_dtype = getattr(torch, logits_dtype), getattr(torch, x_dtype)
    x, target = image_batch()
    x = x.to(x_dtype).requires_grad_()
    net = conv_net().double()
    criterion = SIBLoss(**WEIGHTS, backend=backend)
    loss = criterion(net(x.double()).to(logits_dtype), target, x)
    wide = torch.float64 in (logits_dtype, x_dtype)
    assert loss.dtype == (torch.float64 if wide else torch.float32)
    assert {t.dtype for t in criterion.terms.values()} == {loss.dtype}
    loss.backward()
    exact = plain_step(conv_net().double(), x.detach().double(), target, **WEIGHTS)
    for name in TERMS:
        assert relative_error(criterion.terms[name], getattr(exact, name)) < 1e-4, name


# ---- options ------------------------------------------------------------------------------------------------------------


def by_hand(net, x, target, *, scalar="energy", estimator="hsic_biased", background="variance", objective="exp"):
    """The composition from the package's own parts."""
    x = x.detach().clone().requires_grad_()
    logits = net(x)
    vjp = vjp_map(logits, x, scalar, target)
    mask = foreground_mask(vjp, window_size=WEIGHTS["window_size"])
    s = region_statistics(vjp, x.detach(), mask, background_grams=True)
    fg, bg = ESTIMATORS[estimator](s.gram_vjp, s.gram_x), BACKGROUNDS[background](s)
    base, lambda_fg, lambda_bg = F.cross_entropy(logits, target), WEIGHTS["lambda_fg"], WEIGHTS["lambda_bg"]
    loss = {
        "exp": base + lambda_bg * bg.exp() + lambda_fg * (-fg).exp(),
        "linear": base + lambda_bg * bg - lambda_fg * fg,
        "expm1": base + lambda_bg * (bg.exp() - 1) + lambda_fg * ((-fg).exp() - 1),
    }[objective]
    return loss, fg, bg


OPTIONS = [
    *(("scalar", name) for name in SCALARS),
    *(("estimator", name) for name in ESTIMATORS),
    *(("background", name) for name in BACKGROUNDS),
    *(("objective", name) for name in OBJECTIVES),
]


@pytest.mark.parametrize(("option", "name"), OPTIONS, ids=lambda v: v)
def test_every_option_is_its_own_part(option, name):
    x, target = image_batch()
    net = conv_net().double()
    criterion, loss, _ = run(net, x.double(), target, **{option: name})
    exact, fg, bg = by_hand(net, x.double(), target, **{option: name})
    assert relative_error(loss, exact) < 1e-12
    assert relative_error(criterion.terms["foreground"], fg) < 1e-12
    assert relative_error(criterion.terms["background"], bg) < 1e-12
    wanted = parameter_gradients(exact, net)
    for key, got in parameter_gradients(loss, net).items():
        assert relative_error(got, wanted[key]) < 1e-9, key


def test_options_differ():
    x, target = image_batch()
    net = conv_net().double()
    losses = [by_hand(net, x.double(), target, **{option: name})[0].item() for option, name in OPTIONS]
    assert len(set(losses)) == len(OPTIONS) - 3  # four groups share the default


def test_exp_and_expm1_have_the_same_gradients():
    x, target = image_batch()
    net = conv_net().double()
    losses = {name: run(net, x.double(), target, objective=name)[1] for name in ("exp", "expm1")}
    assert math.isclose(losses["exp"].item() - losses["expm1"].item(), 1003.0, rel_tol=1e-12)
    exp, expm1 = (parameter_gradients(loss, net) for loss in losses.values())
    for name in exp:
        assert relative_error(exp[name], expm1[name]) < 1e-11


def test_expm1_keeps_a_small_background_in_float32():
    # 1000·exp(1e-8) is 1000 in float32; expm1 must not lose what exp does.
    base = torch.tensor(0.0)
    fg, bg = torch.tensor(0.0, dtype=torch.float64), torch.tensor(1e-8, dtype=torch.float64)
    assert OBJECTIVES["exp"](base, fg, bg, 0.0, 1000.0).float() == 1000
    assert math.isclose(OBJECTIVES["expm1"](base, fg, bg, 0.0, 1000.0).float().item(), 1e-5, rel_tol=1e-6)


def test_callables_take_every_role():
    x, target = image_batch()
    seen = {}

    def scalar(logits, labels):
        seen["scalar"] = (logits.dtype, labels)
        return logits.square().sum()

    def estimator(gram_vjp, gram_x):
        seen["estimator"] = (gram_vjp.shape, gram_x.shape)
        return (gram_vjp * gram_x).sum()

    def background(statistics):
        seen["background"] = type(statistics), statistics.background_gram_vjp
        return statistics.vjp_variance.sum()

    def objective(base, fg, bg, lambda_fg, lambda_bg):
        seen["objective"] = lambda_fg, lambda_bg
        return base + 2 * fg + 3 * bg

    def mask(vjp):
        seen["mask"] = vjp.shape
        return torch.sigmoid(1e4 * vjp.mean(1, keepdim=True))

    net = conv_net().double()
    criterion, loss, _ = run(
        net, x.double(), target, scalar=scalar, estimator=estimator, background=background, objective=objective, mask=mask
    )
    assert seen["scalar"][0] == torch.float64
    assert torch.equal(seen["scalar"][1], target)
    assert seen["estimator"] == ((6, 6), (6, 6))
    assert seen["background"] == (sib_fast.RegionStatistics, None)
    assert seen["objective"] == (3.0, 1000.0)
    assert seen["mask"] == (6, 3, 12, 11)
    terms = criterion.terms
    assert torch.allclose(loss, terms["base"] + 2 * terms["foreground"] + 3 * terms["background"], rtol=1e-12)
    loss.backward()
    assert net[0].weight.grad.isfinite().all()


@pytest.mark.parametrize(
    "changed",
    [{"window_size": 3}, {"temperature": 0.5}, {"slope": 3.0}, {"quantiles": (0.1, 0.9, 0.6, 0.7)}],
    ids=lambda c: next(iter(c)),
)
def test_mask_settings_reach_the_mask(changed):
    x, target = image_batch()
    net = conv_net(norm="group").double()
    criterion, _, leaf = run(net, x.double(), target, **changed)
    exact = foreground_mask(vjp_map(net(leaf), leaf), **{"window_size": WEIGHTS["window_size"], **changed}).mean()
    assert relative_error(criterion.terms["mask_area"], exact) < 1e-12
    assert relative_error(run(net, x.double(), target)[0].terms["mask_area"], exact) > 1e-6


def test_vjp_scale_reaches_the_vjp():
    x, target = image_batch()
    with pytest.raises(ValueError, match=r"vjp_map: scale must be a power of two, .* got 3.0"):
        run(conv_net(), x, target, vjp_scale=3.0)
    assert torch.equal(run(conv_net(), x, target, vjp_scale=64.0)[1], run(conv_net(), x, target)[1])


def test_backend_reaches_every_op(monkeypatch):
    x, target = image_batch()
    asked = []
    for op in ("foreground_mask", "region_statistics", "hsic_objective"):
        module = importlib.import_module(f"sib_fast.ops.{op}")
        resolve = module.resolve

        def recorder(name, backend, *rest, resolve=resolve, **options):
            asked.append((name, backend))
            return resolve(name, backend, *rest, **options)

        monkeypatch.setattr(module, "resolve", recorder)
    run(conv_net(), x, target, backend="reference")
    assert asked == [(op, "reference") for op in ("foreground_mask", "region_statistics", "hsic_objective")]


def test_defaults_are_the_authors():
    criterion = SIBLoss()
    assert (criterion.lambda_fg, criterion.lambda_bg, criterion.scalar) == (0.01, 1000.0, "energy")
    assert criterion.mask == sib_fast.masks.DensityMask(31, 0.1, 10.0, (0.05, 0.95, 0.8, 0.8), "auto")
    assert criterion.estimator is ESTIMATORS["hsic_biased"]
    assert criterion.background is BACKGROUNDS["variance"]
    assert criterion.objective is OBJECTIVES["exp"]
    assert isinstance(criterion.base_loss, nn.CrossEntropyLoss)


@pytest.mark.parametrize("background", ["hsic", "relative_variance", lambda statistics: statistics.background_variance])
def test_a_background_of_another_scale_wants_its_own_weight(background):
    name = "<lambda>" if callable(background) else repr(background)
    with pytest.raises(ValueError, match=f"SIBLoss: lambda_bg must be given for background={name}, got the default"):
        SIBLoss(background=background)
    SIBLoss(background=BACKGROUNDS["variance"])
    for weight in (1000.0, 1000, 0.5):  # the default's number is fine where the caller says it
        assert SIBLoss(lambda_bg=weight, background=background).lambda_bg == weight


# ---- masks --------------------------------------------------------------------------------------------------------------


def segmentation() -> Tensor:
    mask = torch.zeros(6, 1, 12, 11)
    mask[:, :, 2:8, 3:9] = 1.0
    return mask


def test_a_given_segmentation_is_the_mask(backend):
    x, target = image_batch()
    net, plain_net = conv_net().double(), conv_net().double()
    criterion, loss, _ = run(net, x.double(), target, segmentation(), backend=backend)
    plain = plain_step(plain_net, x.double(), target, mask=segmentation().double(), **WEIGHTS)
    assert relative_error(criterion.terms["foreground"], plain.foreground) < 1e-12
    assert relative_error(criterion.terms["background"], plain.background) < 1e-12
    assert relative_error(criterion.terms["mask_area"], segmentation().mean()) < 1e-6
    wanted = parameter_gradients(plain.loss, plain_net)
    for name, got in parameter_gradients(loss, net).items():
        assert relative_error(got, wanted[name]) < 1e-11, name
    # … and of the public op.
    vjp = plain.vjp.detach()
    s = region_statistics(vjp, x.double(), segmentation().double(), backend=backend)
    assert relative_error(criterion.terms["foreground"], ESTIMATORS["hsic_biased"](s.gram_vjp, s.gram_x)) < 1e-12


def test_images_that_are_not_annotated_keep_their_density_mask():
    x, target = image_batch()
    net = conv_net(norm="group").double()
    boxes = torch.tensor([[3, 2, 9, 8]])
    given = collate([None, boxes, segmentation()[0], None, boxes[0], None], 12, 11)
    criterion, loss, leaf = run(net, x.double(), target, given)
    density = foreground_mask(vjp_map(net(leaf), leaf), window_size=5)
    mixed = torch.where(given.annotated.view(6, 1, 1, 1), segmentation().double(), density)
    assert relative_error(criterion.terms["mask_area"], mixed.mean()) < 1e-12
    exact, exact_loss, _ = run(net, x.double(), target, mixed.detach())
    assert relative_error(criterion.terms["foreground"], exact.terms["foreground"]) < 1e-11
    # The annotated masks are constants, the others are differentiated: the gradients differ from those of all-constant ones.
    grads = [torch.autograd.grad(value, net[0].weight)[0] for value in (loss, exact_loss)]
    assert relative_error(*grads) > 1e-3


def test_nothing_annotated_is_the_density_mask_and_all_annotated_the_given_one():
    x, target = image_batch()
    net = conv_net(norm="group").double()
    nothing = run(net, x.double(), target, collate([None] * 6, 12, 11))[1]
    assert torch.equal(nothing, run(net, x.double(), target)[1])
    everything = run(net, x.double(), target, collate(list(segmentation()), 12, 11))[1]
    assert torch.equal(everything, run(net, x.double(), target, segmentation())[1])


# ---- targets ------------------------------------------------------------------------------------------------------------


def test_probability_targets():
    x, target = image_batch()
    one_hot = F.one_hot(target, 5).double()
    net = conv_net().double()
    index, probability = (run(net, x.double(), t)[1] for t in (target, one_hot))
    assert relative_error(probability, index) < 1e-12
    mixed = torch.softmax(torch.randn(6, 5), 1)
    criterion, loss, _ = run(net, x.double(), mixed)
    assert relative_error(criterion.terms["base"], F.cross_entropy(net(x.double()), mixed.double())) < 1e-12
    loss.backward()


@pytest.mark.parametrize("scalar", ["label_logit", "label_log_probability"])
def test_label_scalars_take_the_likeliest_class_of_a_probability_target(scalar):
    x, target = image_batch()
    soft = 0.7 * F.one_hot(target, 5) + 0.06
    net = conv_net().double()
    hard, probability = (run(net, x.double(), t, scalar=scalar)[0].terms for t in (target, soft))
    assert torch.equal(probability["foreground"], hard["foreground"])
    assert not torch.equal(probability["base"], hard["base"])


def test_label_smoothing_through_base_loss():
    x, target = image_batch()
    net = conv_net().double()
    criterion, loss, _ = run(net, x.double(), target, base_loss=nn.CrossEntropyLoss(label_smoothing=0.2))
    exact = F.cross_entropy(net(x.double()), target, label_smoothing=0.2)
    assert relative_error(criterion.terms["base"], exact) < 1e-12
    plain = run(net, x.double(), target)[0].terms
    assert relative_error(loss - plain["loss"], exact - plain["base"]) < 1e-9


def test_base_loss_gets_the_wide_logits_and_the_target():
    x, target = image_batch()
    seen = []
    soft = torch.softmax(torch.randn(6, 5), 1).half()
    leaf = x.requires_grad_()
    criterion = SIBLoss(**WEIGHTS, base_loss=lambda z, t: seen.append((z.dtype, t.dtype)) or F.cross_entropy(z, t))
    criterion(conv_net()(leaf).bfloat16(), soft, leaf)
    criterion(conv_net()(leaf).bfloat16(), target, leaf)
    assert seen == [(torch.float32, torch.float32), (torch.float32, torch.int64)]


# ---- terms --------------------------------------------------------------------------------------------------------------


def test_terms_are_detached_scalars():
    x, target = image_batch()
    criterion, _, _ = run(conv_net(), x, target)
    assert set(criterion.terms) == {"loss", "base", "foreground", "background", "mask_area"}
    for name, term in criterion.terms.items():
        assert not term.requires_grad, name
        assert term.shape == (), name
        assert term.dtype == torch.float32, name


@pytest.mark.parametrize("active", [True, False])
def test_terms_stay_when_a_trainer_divides_the_loss_in_place(active):
    # timm's train.py does: loss /= accumulation_steps
    x, target = image_batch()
    net = conv_net(norm="group")
    criterion = SIBLoss(**WEIGHTS).train(active)
    leaf = x.requires_grad_()
    loss = criterion(net(leaf), target, leaf)
    before = {name: term.clone() for name, term in criterion.terms.items()}
    loss /= 4
    loss.backward()
    for name, term in criterion.terms.items():
        assert torch.equal(term, before[name]), name


class OpLog(TorchDispatchMode):
    """Every op that runs inside, with its output dtypes."""

    def __init__(self) -> None:
        super().__init__()
        self.ops: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.ops.append(str(func))
        return func(*args, **(kwargs or {}))


SYNCHRONISING = ("_local_scalar_dense", "nonzero", "is_nonzero", "equal.default", "masked_select", "unique", "aten.item")


def synchronising(ops: list[str]) -> list[str]:
    return [op for op in ops if any(word in op for word in SYNCHRONISING)]


@pytest.mark.parametrize(("option", "name"), [("objective", "exp"), *OPTIONS[: -len(OBJECTIVES)]], ids=lambda v: v)
def test_nothing_synchronises(backend, option, name, monkeypatch):
    x, target = image_batch()
    net = conv_net()
    leaf = x.requires_grad_()
    logits = net(leaf)
    given = collate([None, *segmentation()[1:]], 12, 11)
    soft = torch.softmax(logits.detach(), 1)
    # As on a device, where values are looked at in the first batch alone.
    monkeypatch.setattr("sib_fast.criterion._is_on_the_host", lambda tensor: False)
    criteria = [SIBLoss(**{**WEIGHTS, option: name}, backend=backend) for _ in range(2)]
    for criterion in criteria:
        criterion(logits, soft, leaf, given)
    with OpLog() as log:
        for criterion, mask, y in zip(criteria, (None, given), (target, soft), strict=True):
            criterion(logits, y, leaf, mask).backward(retain_graph=True)
    assert len(log.ops) > 100
    assert synchronising(log.ops) == []


@pytest.mark.parametrize(("option", "name"), [o for o in OPTIONS if o[0] != "scalar"], ids=lambda v: v)
def test_the_defaults_with_every_objective_run_the_fused_finaliser(option, name):
    if sib_fast.why_not("cpu"):
        pytest.skip(f"backend 'cpu' is not usable here: {sib_fast.why_not('cpu')}")
    x, target = image_batch()
    leaf = x.requires_grad_()
    logits = conv_net()(leaf)
    with OpLog() as log:
        SIBLoss(**WEIGHTS, **{option: name}, backend="cpu")(logits, target, leaf).backward()
    launched = [sum(op.startswith(f"sib_fast._hsic_objective{part}.") for op in log.ops) for part in ("", "_backward")]
    assert launched == ([1, 1] if name in ("hsic_biased", "variance", *OBJECTIVES) else [0, 0])


def test_the_detector_of_synchronisation_detects():
    with OpLog() as log:
        torch.ones(2).sum().item()
        F.one_hot(torch.tensor([0, 1]), 3)
    assert len(synchronising(log.ops)) >= 2


# ---- inactive -----------------------------------------------------------------------------------------------------------


def test_an_explicit_call_is_inactive_without_grad_or_in_eval():
    x, target = image_batch()
    net = conv_net(norm="group")
    criterion = SIBLoss(**WEIGHTS)
    exact = F.cross_entropy(net(x), target)

    def check(logits: Tensor) -> None:
        loss = criterion(logits, target)  # x is not even asked for
        assert torch.equal(loss, exact)
        assert criterion.terms.keys() == {"loss", "base"}
        assert all(torch.equal(t, exact) and not t.requires_grad for t in criterion.terms.values())

    with torch.no_grad():
        check(net(x))
    with torch.inference_mode():
        check(net(x))
    criterion.eval()
    check(net(x))
    criterion.train()
    leaf = x.requires_grad_()
    assert criterion(net(leaf), target, leaf) > 100


# ---- as a module --------------------------------------------------------------------------------------------------------


def test_state_dict_is_empty():
    assert SIBLoss().state_dict() == {}
    assert list(SIBLoss().parameters()) == []


@pytest.mark.parametrize(
    "copier", [copy.deepcopy, copy.copy, lambda c: pickle.loads(pickle.dumps(c))], ids=["deepcopy", "copy", "pickle"]
)
def test_copies_compute_the_same(copier):
    x, target = image_batch()
    net = conv_net(norm="group")
    criterion = SIBLoss(**WEIGHTS, estimator="cka", background="hsic", objective="linear")
    leaf = x.requires_grad_()
    exact = criterion(net(leaf), target, leaf)
    other = copier(criterion)
    assert other.terms == {}
    assert torch.equal(other(net(leaf), target, leaf), exact)


def test_repr_names_what_was_chosen():
    text = repr(SIBLoss(2.0, 3.0, estimator="cka", background="hsic", window_size=7))
    for words in ("lambda_fg=2.0", "lambda_bg=3.0", "scalar='energy'", "estimator=cka", "background=hsic", "window_size=7"):
        assert words in text
    assert "attached=False" in text


# ---- degenerate batches -------------------------------------------------------------------------------------------------


class Constant(nn.Module):
    """Logits that depend on x with derivative zero. Shapes: [N, C, H, W] -> [N, 5]."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(5))

    def forward(self, x: Tensor) -> Tensor:
        return (0.0 * x).sum((1, 2, 3))[:, None] * self.weight + self.weight


class Saturated(nn.Module):
    """Logits of ±1e4. Shapes: [N, C, H, W] -> [N, 5]."""

    def __init__(self) -> None:
        super().__init__()
        self.body = conv_net(norm="group")

    def forward(self, x: Tensor) -> Tensor:
        return 1e4 * torch.tensor([1.0, 0, 0, 0, -1.0]) + self.body(x)


DEGENERATE = {
    "all-zero VJP": (Constant, image_batch()[0]),
    "saturated softmax": (Saturated, image_batch()[0]),
    "constant image": (lambda: conv_net(norm="group"), torch.cat([torch.full((1, 3, 12, 11), 0.5), image_batch()[0][1:]])),
    "constant batch": (lambda: conv_net(norm="none"), torch.full((6, 3, 12, 11), 0.5)),
    "zero batch": (lambda: conv_net(norm="none"), torch.zeros(6, 3, 12, 11)),
    "two images": (conv_net, image_batch(2)[0]),
    "one pixel": (lambda: conv_net(norm="group"), image_batch(6, 3, 1, 1)[0]),
    "one channel": (lambda: conv_net(1), image_batch(6, 1)[0]),
    "one row": (lambda: conv_net(norm="group"), image_batch(6, 3, 1, 9)[0]),
    "one logit": (lambda: conv_net(classes=1), image_batch()[0]),
}


@pytest.mark.parametrize("estimator", [name for name, estimator in ESTIMATORS.items() if estimator.minimum_batch <= 2])
@pytest.mark.parametrize("background", BACKGROUNDS)
@pytest.mark.parametrize("case", DEGENERATE)
def test_degenerate_batches_have_a_finite_loss_and_gradients(backend, case, background, estimator):
    make, x = DEGENERATE[case]
    net, x = make(), x.to(torch.get_default_device())
    target = torch.arange(len(x)) % (2 if case == "one logit" else 5)
    base_loss = nn.BCEWithLogitsLoss() if case == "one logit" else None
    criterion, loss, _ = run(net, x, target, background=background, estimator=estimator, backend=backend, base_loss=base_loss)
    assert all(term.isfinite() for term in criterion.terms.values()), criterion.terms
    loss.backward()
    for name, parameter in net.named_parameters():
        assert parameter.grad.isfinite().all(), name
    if case in ("all-zero VJP", "saturated softmax"):
        assert criterion.terms["background"] == 0


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("given", [False, True], ids=["density", "given mask"])
@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("background", BACKGROUNDS)
def test_non_finite_input_propagates_to_loss_and_terms(backend, bad, given, estimator, background):
    x, target = image_batch()
    x[2, 1, 4, 5] = bad
    criterion, loss, _ = run(
        conv_net(norm="group"),
        x,
        target,
        segmentation() if given else None,
        backend=backend,
        estimator=estimator,
        background=background,
    )
    assert not loss.isfinite()
    for name in ("loss", "base", "foreground", "background") if given else criterion.terms:
        assert not criterion.terms[name].isfinite(), name
