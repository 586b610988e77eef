"""EvidenceLoss and EvidenceTerm: the term against a step in plain PyTorch, where it is read, what is refused, what it costs."""

from __future__ import annotations

import copy
import itertools
import pickle
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import sib_fast
from sib_fast import EvidenceLoss, EvidenceTerm, SIBLoss, prepare
from sib_fast.lab.models import SmallConvNet, SmallResNet
from sib_fast.masks import GivenMask
from sib_fast.testing.counting import OpLog
from sib_fast.testing.networks import (
    MappedNet,
    conv_net,
    image_batch,
    parameter_gradients,
    plain_cells,
    plain_evidence,
    relative_error,
)

TOLERANCE = 1e-9
WINDOW = 5
FORMS = ("rectified", "absolute", "squared")
SIZE = {"height": 17, "width": 19}  # a map of 9×10 cells, which no pixel grid divides
SCALARS = {
    "label_logit": lambda z, t: z.gather(1, t[:, None]).sum(),
    "energy": lambda z, t: 0.5 * (torch.softmax(z, 1) ** 2).sum(),
    "label_log_probability": lambda z, t: -F.cross_entropy(z, t, reduction="sum"),
}


def problem(images: int = 5, dtype: torch.dtype = torch.float64, seed: int = 0) -> tuple[Tensor, Tensor]:
    x, target = image_batch(images, seed=seed, **SIZE)
    return x.to(dtype), target


def annotation(which: str) -> Tensor | GivenMask | None:
    generator = torch.Generator().manual_seed(7)
    values = torch.rand(5, 1, SIZE["height"], SIZE["width"], generator=generator) > 0.9
    if which == "partial":
        return GivenMask(values, torch.tensor([True, False, True, True, False]))
    return {"own": None, "given": values, "cells": values[:, :, ::2, ::2].double(), "all annotated": None}[which]


def plainly(net: MappedNet, x: Tensor, target: Tensor, given, *, kind, form, scalar="energy", **options) -> Tensor:
    x = x.detach().clone().requires_grad_()
    features = net.trunk(x)
    logits = net.head(features)
    mask, annotated = given if isinstance(given, GivenMask) else (given, None)
    value = plain_evidence(
        features,
        logits,
        SCALARS[scalar](logits, target),
        kind=kind,
        form=form,
        x=x,
        window_size=WINDOW,
        mask=mask,
        annotated=annotated,
        target_area=0.1,
        **options,
    )
    return F.cross_entropy(logits, target) + value


def ours(net: MappedNet, x: Tensor, target: Tensor, given, how: str, **options) -> tuple[Tensor, EvidenceLoss]:
    """Rectified and normalised where nothing else is said, as `plainly`."""
    criterion = EvidenceLoss(window_size=WINDOW, **{"evidence": "rectified", "normalise_cotangent": True} | options)
    if how == "attached":
        criterion.attach(net)
        return criterion(net(x), target, mask=given), criterion
    x = x.detach().clone().requires_grad_()
    features = net.trunk(x)
    if not features.requires_grad:
        features = features.detach().requires_grad_()
    return criterion(net.head(features), target, x, given, features=features), criterion


def assert_gradients(got: dict[str, Tensor], wanted: dict[str, Tensor], but: dict[str, Tensor]) -> None:
    """Every gradient to 1e-9; what the term adds, far outside of it, or the comparison would show nothing."""
    flat = [torch.cat([g.flatten() for g in grads.values()]) for grads in (got, wanted, but)]
    for name, grad in got.items():
        assert relative_error(grad, wanted[name]) < TOLERANCE, name
    assert relative_error(flat[2], flat[1]) > 1e4 * TOLERANCE


# ---- the term ---------------------------------------------------------------------------------------------------------

MATRIX = [
    (kind, form, scalar, given, how, head, trained)
    for kind, form, scalar, given, how, head, trained in itertools.product(
        ("area", "share"),
        FORMS,
        SCALARS,
        ("own", "given", "cells", "partial"),
        ("attached", "explicit"),
        ("linear", "bent"),
        ("all", "head"),
    )
    # Area reads no mask; rectified is refused below layers that are not linear, for which one scalar is enough.
    if (kind == "share" or given == "own")
    and not (given == "cells" and scalar != "label_logit")
    and (head == "linear" or (form != "rectified" and scalar == "energy"))
]


@pytest.mark.parametrize(("kind", "form", "scalar", "given", "how", "head", "trained"), MATRIX)
def test_equals_a_plain_step(kind, form, scalar, given, how, head, trained):
    x, target = problem()
    nets = [MappedNet(head).double() for _ in range(3)]
    for net in nets:
        net.trunk.requires_grad_(trained == "all")
    mask = annotation(given)
    loss, criterion = ours(nets[0], x, target, mask, how, kind=kind, evidence=form, scalar=scalar)
    wanted = plainly(nets[1], x, target, mask, kind=kind, form=form, scalar=scalar)
    base = F.cross_entropy(nets[2](x), target)
    grads = []
    for net, value in zip(nets, (loss, wanted, base), strict=True):
        value.backward()
        grads.append({name: p.grad for name, p in net.named_parameters() if p.requires_grad})
    assert relative_error(loss, wanted) < TOLERANCE
    assert_gradients(*grads)
    assert criterion.terms["evidence_dead"] == 0
    assert 0 < criterion.terms[kind] < 1


@pytest.mark.parametrize("prepared", [False, True], ids=["plain layers", "prepared"])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "a slice"])
@pytest.mark.parametrize("kind", ["area", "share"])
def test_layouts_and_prepared_layers(kind, layout, prepared):
    x, target = problem()
    net, plain = MappedNet().double(), MappedNet().double()
    wanted = parameter_gradients(plainly(plain, x, target, None, kind=kind, form="rectified"), plain)
    net = prepare(net) if prepared else net
    if layout == "channels_last":
        net, x = net.to(memory_format=torch.channels_last), x.contiguous(memory_format=torch.channels_last)
    elif layout == "a slice":
        x = torch.cat([x, x], dim=1)[:, :3]
    loss, _ = ours(net, x, target, None, "attached", kind=kind)
    for name, grad in parameter_gradients(loss, net).items():
        assert relative_error(grad, wanted[name]) < TOLERANCE, name


@pytest.mark.parametrize("kind", ["area", "share"])
def test_cotangent_as_it_is(kind):
    x, target = problem()
    net, plain = MappedNet().double(), MappedNet().double()
    loss, _ = ours(net, x, target, None, "attached", kind=kind, scalar="energy", normalise_cotangent=False)
    wanted = plainly(plain, x, target, None, kind=kind, form="rectified", scalar="energy", normalise=False)
    assert relative_error(loss, wanted) < TOLERANCE


def test_every_kind_has_the_form_that_was_chosen_for_it():
    chosen = {kind: EvidenceTerm(kind) for kind in ("area", "share", lambda evidence, mask: evidence.flatten(1).sum(1))}
    assert [(t.evidence, t.normalise_cotangent) for t in chosen.values()] == [
        ("absolute", True),
        ("rectified", False),
        ("rectified", True),
    ]
    x, target = problem()
    for kind, form, normalise in (("area", "absolute", True), ("share", "rectified", False)):
        net, plain = MappedNet().double(), MappedNet().double()
        loss = EvidenceLoss(kind, window_size=WINDOW).attach(net)(net(x), target)
        wanted = plainly(plain, x, target, None, kind=kind, form=form, normalise=normalise)
        assert relative_error(loss, wanted) < TOLERANCE
        assert EvidenceTerm(kind, evidence=form, normalise_cotangent=normalise) == EvidenceTerm(kind)


@pytest.mark.parametrize("how", ["attached", "explicit"])
def test_beside_the_s_ib_terms(how):
    """The published terms, to the bit, and the share with the mask of S-IB's own VJP."""
    x, target = problem()
    options = {"lambda_fg": 3.0, "window_size": WINDOW}
    net, alone = MappedNet().double(), MappedNet().double()
    without = SIBLoss(**options).attach(alone)
    published = without(alone(x), target)
    criterion = SIBLoss(**options, evidence=EvidenceTerm("share", weight=2.0))
    if how == "attached":
        criterion.attach(net)
        loss = criterion(net(x), target)
    else:
        leaf = x.clone().requires_grad_()
        features = net.trunk(leaf)
        loss = criterion(net.head(features), target, leaf, features=features)
    for name in ("base", "foreground", "background", "mask_area"):
        assert torch.equal(criterion.terms[name], without.terms[name])
    leaf = x.clone().requires_grad_()
    plain = MappedNet().double()
    features = plain.trunk(leaf)
    logits = plain.head(features)
    (vjp,) = torch.autograd.grad(SCALARS["energy"](logits, target), leaf, retain_graph=True)
    mask = sib_fast.foreground_mask(vjp, window_size=WINDOW)
    energy = SCALARS["energy"](logits, target)
    value = 2.0 * plain_evidence(features, logits, energy, kind="share", form="rectified", mask=mask)
    added = parameter_gradients(value, plain)
    of_both, of_one = parameter_gradients(loss, net), parameter_gradients(published, alone)
    assert relative_error(loss - published, value) < 1e-8  # 1,000 is in both losses
    for name, grad in of_both.items():
        assert relative_error(grad, of_one[name] + added[name]) < TOLERANCE, name


def test_a_given_mask_beside_the_s_ib_terms():
    x, target = problem()
    net = MappedNet().double()
    mask = annotation("given")
    criterion = SIBLoss(window_size=WINDOW, evidence=EvidenceTerm("share", mask="given")).attach(net)
    criterion(net(x), target, mask=mask)
    share = EvidenceLoss("share", mask="given").attach(other := MappedNet().double())
    share(other(x), target, mask=mask)
    assert torch.equal(criterion.terms["share"], share.terms["share"])


def test_settings_of_the_mask_are_those_of_the_loss_beside_it():
    like = sib_fast.masks.DensityMask(window_size=9, slope=4.0)
    assert EvidenceTerm("share").maker("auto", like) == like
    assert EvidenceTerm("share", slope=2.0).maker("auto", like) == sib_fast.masks.DensityMask(window_size=9, slope=2.0)
    assert EvidenceTerm("share").maker("reference") == sib_fast.masks.DensityMask(backend="reference")


def test_the_default_is_the_published_form_without_a_hook_more():
    net = MappedNet()
    criterion = SIBLoss().attach(net)
    assert criterion.evidence is None
    assert sum(len(m._forward_hooks) for m in net.modules()) == 0
    assert sum(len(m._forward_pre_hooks) for m in net.modules()) == 1


def test_area_of_one_cell_and_of_a_constant_map():
    """1/P and 1, whatever the size of the evidence, and a hinge below which nothing is lowered."""
    features = torch.zeros(2, 3, 4, 5, dtype=torch.float64)
    features[0, :, 1, 2] = 1e-3
    features[1] = 1e3
    features.requires_grad_()
    logits = features.mean(dim=(2, 3))
    target = torch.tensor([0, 1])
    criterion = EvidenceLoss("area", scalar="label_logit", target_area=0.0)
    with pytest.warns(UserWarning, match="has 4×5 cells, fewer than 7×7"):
        loss = criterion(logits, target, features=features)
    assert criterion.terms["area"].item() == pytest.approx((1 / 20 + 1) / 2, rel=1e-12)
    assert (loss - criterion.terms["base"]).item() == pytest.approx(criterion.terms["area"].item(), rel=1e-12)
    criterion = EvidenceLoss("area", scalar="label_logit", target_area=0.25)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        loss = criterion(logits, target, features=features)
    assert (loss - criterion.terms["base"]).item() == pytest.approx((0 + 0.75) / 2, rel=1e-12)


def test_a_cell_with_some_object_is_none_of_the_background():
    mask = torch.zeros(1, 1, 17, 19)
    mask[0, 0, 16, 18] = mask[0, 0, 8, 9] = 1
    cells = F.adaptive_max_pool2d(mask, (9, 10))
    assert torch.equal(cells, plain_cells(mask, 9, 10))
    assert cells.sum() == 3  # the middle pixel lies in two cells, as sizes do not divide


def scaled(kind: str, form: str, size: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The term, and its gradient to A, of a map and a head whose R and A have this size."""
    generator = torch.Generator().manual_seed(3)
    weight = torch.rand(5, 4 * 64, generator=generator, dtype=torch.float64) - 0.4
    features = torch.rand(3, 4, 8, 8, generator=generator, dtype=torch.float64)
    features = features.to(dtype).requires_grad_()
    logits = features.flatten(1) @ (size * weight).to(dtype).requires_grad_().T
    options = {"scalar": "label_logit", "normalise_cotangent": False}
    criterion = EvidenceLoss(kind, evidence=form, mask="given", target_area=0.0, **options)
    mask = torch.rand(3, 1, 8, 8, generator=generator) if kind == "share" else None
    loss = criterion(logits, torch.tensor([0, 1, 2]), mask=mask, features=features)
    (grad,) = torch.autograd.grad(loss - F.cross_entropy(logits, torch.tensor([0, 1, 2])), features)
    return criterion.terms[kind], grad


@pytest.mark.parametrize("size", [1e-30, 1e-18, 1e18])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kind", ["area", "share"])
def test_ratios_do_not_depend_on_the_size_of_the_evidence(kind, form, size):
    """In float32, squares of 1e-30 are 0 and those of 1e30 are Inf; float64 at size 1 is the truth."""
    value, _ = scaled(kind, form, size, torch.float32)
    exact, grad_exact = scaled(kind, form, 1.0, torch.float64)
    assert relative_error(value, exact) < 1e-6
    _, grad = scaled(kind, form, 1e-30, torch.float32)
    assert torch.isfinite(grad).all()
    if form != "squared":  # Σ R² does not depend on A above a linear head
        assert relative_error(grad, grad_exact) < 1e-5


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kind", ["area", "share"])
def test_dead_maps_count_in_no_mean(kind, form):
    x, target = problem()
    net, few = MappedNet(norm="group").double(), MappedNet(norm="group").double()
    with torch.no_grad():
        for n in (net, few):
            n.head[-1].bias.zero_()
    dead = torch.tensor([1, 4])
    alive = torch.tensor([0, 2, 3])
    mask = torch.rand(5, 1, 17, 19, generator=torch.Generator().manual_seed(1))

    def step(net, images):
        features = net.trunk(x[images])
        logits = net.head(features)
        # Logits that the map has no part in.
        gone = torch.isin(images, dead)[:, None].double()
        logits = (1 - gone) * logits + gone * logits.detach()
        criterion = EvidenceLoss(kind, evidence=form, mask="given", scalar="predicted_logit")
        given = mask[images] if kind == "share" else None
        loss = criterion(logits, target[images], mask=given, features=features)
        return loss - criterion.terms["base"], criterion.terms, net

    value, terms, _ = step(net, torch.arange(5))
    wanted, _, _ = step(few, alive)
    assert terms["evidence_dead"] == 2
    assert relative_error(value, wanted) < 1e-12
    base = F.cross_entropy(net(x), target)
    for grad in parameter_gradients(value + 0 * base, net).values():
        assert torch.isfinite(grad).all()


def test_all_dead_is_the_base_loss():
    x, target = problem()
    net = MappedNet().double()
    with torch.no_grad():
        net.head[-1].weight.zero_()
    criterion = EvidenceLoss("area").attach(net)
    loss = criterion(net(x), target)
    assert criterion.terms["evidence_dead"] == 5
    assert criterion.terms["area"] == 0
    assert torch.equal(loss, F.cross_entropy(net(x), target))
    assert all(torch.isfinite(g).all() for g in parameter_gradients(loss, net).values())


def test_functions_as_kind_and_evidence():
    """The controls of a study: a gradient penalty at A, the entropy of a CAM, the L1 norm of A."""
    x, target = problem()
    net = MappedNet().double()
    seen = []

    def entropy(evidence, mask):
        seen.append(mask)
        q = evidence.flatten(1) / evidence.flatten(1).sum(1, keepdim=True)
        return -(q * (q + 1e-12).log()).sum(1)

    criterion = EvidenceLoss(entropy, mask=None, weight=0.5).attach(net)
    loss = criterion(net(x), target)
    assert seen == [None]
    assert torch.isclose(loss, criterion.terms["base"] + 0.5 * criterion.terms["evidence"])
    criterion.remove()
    criterion = EvidenceLoss(lambda e, m: e.flatten(1).sum(1), evidence=lambda r, a: a.abs().sum(1, keepdim=True), mask=None)
    criterion.attach(net)
    criterion(net(x), target)
    assert torch.isclose(criterion.terms["evidence"], net.trunk(x).abs().sum(dim=(1, 2, 3)).mean())
    criterion.remove()
    criterion = EvidenceLoss(lambda e, m: (m * e).flatten(1).sum(1), window_size=WINDOW).attach(net)
    criterion(net(x), target)
    assert 0 < criterion.terms["object_cells"] < 1


def test_the_description_is_compared_printed_and_pickled():
    term = EvidenceTerm("share", evidence="absolute", at="trunk", quantiles=[0.1, 0.9, 0.8, 0.8])
    assert pickle.loads(pickle.dumps(term)) == term
    assert term.quantiles == (0.1, 0.9, 0.8, 0.8)
    assert "absolute" in repr(EvidenceLoss("share", evidence="absolute"))


# ---- where it is read -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "name"),
    [
        (MappedNet, "trunk"),
        (lambda: SmallConvNet(5), "features"),
        (lambda: SmallResNet(5), "features"),
        (conv_net, "5"),
        (lambda: prepare(SmallResNet(5)), "features"),
    ],
)
def test_the_map_is_found(make, name):
    net = make()
    x, target = image_batch(4, height=32, width=32)
    criterion = EvidenceLoss("area").attach(net)
    hooks = sum(len(m._forward_hooks) for m in net.modules())
    first = criterion(net(x), target)
    assert criterion._attachment.map_name == name
    assert sum(len(m._forward_hooks) for m in net.modules()) == 1 < hooks
    assert torch.equal(first, criterion(net(x), target))
    criterion.remove()
    assert sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in net.modules()) == 0


@pytest.mark.parametrize("kind", ["area", "share"])
def test_a_frozen_trunk_after_the_map_was_found(kind):
    """At the first step every module's output starts a graph, afterwards the map alone does: the same gradients."""
    x, target = problem()
    net = MappedNet().double()
    net.trunk.requires_grad_(False)
    criterion = EvidenceLoss(kind, window_size=WINDOW).attach(net)
    first, *others = (parameter_gradients_of_head(net, criterion(net(x), target)) for _ in range(4))
    for other in others:
        assert all(torch.equal(a, b) for a, b in zip(first, other, strict=True))
    assert all(p.grad is None for p in net.trunk.parameters())


def parameter_gradients_of_head(net, loss):
    return torch.autograd.grad(loss, list(net.head.parameters()))


@pytest.mark.parametrize("at", ["trunk", "module", "trunk.5"])
def test_the_map_is_named(at):
    x, target = problem()
    net, other = MappedNet().double(), MappedNet().double()
    named = EvidenceLoss("area", at=net.trunk if at == "module" else at).attach(net)
    found = EvidenceLoss("area").attach(other)
    assert torch.equal(named(net(x), target), found(other(x), target))


class Functional(nn.Module):
    """An activation and a pooling that are no modules, as DenseNet's; in place, or not."""

    def __init__(self, inplace: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.features = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8))
        self.fc = nn.Linear(8, 5)
        self.inplace = inplace

    def forward(self, x):
        x = F.relu(self.features(x), inplace=self.inplace)
        return self.fc(F.dropout(F.adaptive_avg_pool2d(x, 1).flatten(1), 0.2, self.training, inplace=True))


def test_an_activation_in_place_belongs_to_the_map():
    x, target = image_batch(4, height=12, width=12)
    net = Functional(inplace=True)
    criterion = EvidenceLoss("area", evidence="rectified").attach(net)
    for _ in range(2):
        criterion(net(x), target).backward()
    assert criterion._attachment.map_name == "features"
    with pytest.raises(RuntimeError, match="non-linear layers above it, got the map at 'features' with ReluBackward0"):
        EvidenceLoss("area", evidence="rectified").attach(net := Functional(inplace=False))(net(x), target)


class Head(nn.Module):
    """A convolution, what is given, and a linear layer."""

    def __init__(self, *layers: nn.Module, width: int = 8) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv2d(3, 8, 3, padding=1)
        self.layers = nn.Sequential(*layers)
        self.fc = nn.Linear(width, 5)

    def forward(self, x):
        return self.fc(self.layers(self.conv(x)))


POOL = (nn.AdaptiveAvgPool2d(1), nn.Flatten())


class Tokens(nn.Module):
    """Patches, attention between them and a class token, which alone is read."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.patches = nn.Conv2d(3, 8, 2, stride=2)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.last = nn.Identity()
        self.fc = nn.Linear(8, 5)

    def forward(self, x):
        tokens = self.patches(x).flatten(2).transpose(1, 2)
        tokens = torch.cat([tokens.mean(1, keepdim=True), tokens], dim=1)
        tokens = self.last(self.attention(tokens, tokens, tokens)[0])
        return self.fc(tokens[:, 0])


class LayerNormOfChannels(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(8)

    def forward(self, x):
        return self.norm(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


@pytest.mark.parametrize("prepared", [False, True], ids=["plain layers", "prepared"])
@pytest.mark.parametrize(
    ("make", "options", "words"),
    [
        (
            lambda: MappedNet("bent"),
            {"evidence": "rectified"},
            "must not be 'rectified' at a map with non-linear layers above it",
        ),
        (
            lambda: MappedNet(),
            {"at": "trunk.2", "evidence": "rectified"},
            "must not be 'rectified' at a map with non-linear layers above it",
        ),
        (lambda: MappedNet(), {"at": "trunk.3", "evidence": "absolute"}, "batch norm in training mode"),
        (lambda: MappedNet("mean"), {"evidence": "squared"}, "must not be 'squared' directly below a global average"),
        (lambda: Head(*POOL, nn.LayerNorm(8)), {"evidence": "absolute"}, "must not lie directly below a normalisation"),
        (lambda: Head(LayerNormOfChannels(), *POOL), {}, "must be one whose cells can be empty, got 'layers.0'"),
        (Tokens, {"evidence": "absolute"}, "must not lie below attention, got 'patches'"),
        (Tokens, {"at": "last"}, "tokens are no map, and of those after the last attention only the class token is read"),
        (lambda: Head(nn.MaxPool2d(16), nn.Flatten()), {"at": "layers.0"}, "must have more than one cell"),
        (lambda: Head(*POOL, nn.Sigmoid()), {"evidence": "rectified"}, "must not be 'rectified' at a map with non-linear"),
        (lambda: nn.Sequential(nn.Flatten(), nn.Linear(768, 5)), {}, "must have a module, run once, that returns a"),
        (lambda: MappedNet(), {"at": "head.1"}, r"'head.1' must return a floating-point \[N, C, H, W\] map"),
    ],
)
def test_places_that_say_nothing_are_refused(make, options, words, prepared):
    net = prepare(make()) if prepared else make()
    x, target = image_batch(4, height=16, width=16)
    criterion = EvidenceLoss("area", **options).attach(net)
    with pytest.raises((RuntimeError, ValueError), match=words):
        criterion(net(x), target)


def test_a_frozen_batch_norm_above_the_map_is_linear():
    x, target = problem()
    net = MappedNet().double().eval()
    net.head.insert(0, nn.BatchNorm2d(8).double().eval())
    options = {"at": "trunk", "train_in_eval_mode": True}
    EvidenceLoss("area", **options).attach(net)(net(x), target)
    net.head[0].train()
    with pytest.raises(RuntimeError, match="batch norm in training mode"):
        EvidenceLoss("area", **options).attach(net)(net(x), target)


def test_few_cells_are_said_once():
    x, target = image_batch(4, height=12, width=12)
    net = MappedNet()
    criterion = EvidenceLoss("area").attach(net)
    with pytest.warns(UserWarning, match=r"has 6×6 cells.*24×24 pixels in the place of 12×12: about 12×12 cells"):
        criterion(net(x), target)
    criterion(net(x), target)


# ---- nothing wasted ---------------------------------------------------------------------------------------------------


def ops(net, criterion, x, target, **given) -> list[tuple[str, tuple]]:
    criterion.attach(net)
    for _ in range(2):
        criterion(net(x), target, **given).backward()
    with OpLog() as log:
        criterion(net(x), target, **given).backward()
    criterion.remove()
    return log.ops


def test_area_and_given_masks_differentiate_nothing_below_the_map_twice():
    x, target = problem()
    net = MappedNet().double()
    counts = {}
    plain = SIBLoss().eval()
    for name, criterion, given in (
        ("plain", plain, {}),
        ("area", EvidenceLoss("area"), {}),
        ("given", EvidenceLoss("share", mask="given"), {"mask": annotation("given")}),
        ("own", EvidenceLoss("share", window_size=WINDOW), {}),
    ):
        log = ops(net, criterion, x, target, **given)
        counts[name] = sum("convolution" in op for op, _ in log), [s for op, s in log if "convolution_backward" in op]
    assert counts["area"][0] == counts["given"][0] == counts["plain"][0] == 4
    assert counts["own"][0] == 6


def test_the_masks_vjp_makes_no_weight_gradient_and_no_graph(monkeypatch):
    x, target = problem()
    net = MappedNet().double()
    criterion = EvidenceLoss("share", window_size=WINDOW).attach(net)
    criterion(net(x), target)
    logits = net(x)
    with OpLog() as log:
        loss = criterion(logits, target)
    masks = [arguments[-1] for name, arguments in log.calls if "convolution_backward" in name]
    assert [tuple(mask) for mask in masks] == [(True, False, False)] * 2
    loss.backward()
    assert x.grad is None


@pytest.mark.parametrize("given", ["given", "partial"])
def test_a_mask_that_is_given_spares_the_vjp_at_the_image(given, monkeypatch):
    x, target = problem()
    net = MappedNet().double()
    calls = []
    monkeypatch.setattr("sib_fast.evidence.carried_on", lambda *a: (calls.append(1), sib_fast.vjp.carried_on(*a))[1])
    criterion = EvidenceLoss("share", window_size=WINDOW).attach(net)
    criterion(net(x), target, mask=annotation(given))
    assert len(calls) == (given == "partial")
    mask = annotation("given")
    criterion(net(x), target, mask=GivenMask(mask, torch.ones(5, dtype=torch.bool)))
    assert len(calls) == (given == "partial")


@pytest.mark.parametrize("kind", ["area", "share"])
def test_a_compiled_trunk_under_an_eager_head(kind):
    """Only this loss allows it: nothing below the map is differentiated twice."""
    x, target = problem()
    net, eager = MappedNet().double(), MappedNet().double()
    net.trunk = torch.compile(net.trunk, backend="aot_eager")
    given = annotation("given") if kind == "share" else None
    criterion = EvidenceLoss(kind, mask="given").attach(net)
    other = EvidenceLoss(kind, mask="given").attach(eager)
    for _ in range(2):
        loss, wanted = criterion(net(x), target, mask=given), other(eager(x), target, mask=given)
        assert criterion._attachment.map_name == "trunk"
        got = parameter_gradients(loss, net)
        for name, grad in parameter_gradients(wanted, eager).items():
            assert relative_error(got[name.replace("trunk", "trunk._orig_mod")], grad) < TOLERANCE


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")  # dynamo's own look
def test_the_own_mask_through_a_compiled_trunk():
    import torch._functorch.config as config

    x, target = problem()

    def loss_of(net):
        criterion = EvidenceLoss("share", window_size=WINDOW).attach(net)
        criterion(net(x), target)
        return criterion(net(x), target)

    def compiled():
        net = MappedNet().double()
        net.trunk = torch.compile(net.trunk, backend="aot_eager")
        return net

    torch._dynamo.reset()
    with config.patch(donated_buffer=False):
        assert relative_error(loss_of(compiled()), loss_of(MappedNet().double())) < TOLERANCE


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
def test_compiled_layers_in_the_wrong_place_are_refused():
    x, target = problem()
    net = MappedNet().double()
    net.head = torch.compile(net.head, backend="aot_eager")
    with pytest.raises(RuntimeError, match="must not be used: compiled code has no second derivative"):
        EvidenceLoss("area").attach(net)(net(x), target)
    net = MappedNet().double()
    net.trunk = torch.compile(net.trunk, backend="aot_eager")
    with pytest.raises(RuntimeError, match="must not be captured inside compiled code"):
        EvidenceLoss("area", at=net.trunk._orig_mod[5]).attach(net)
    with pytest.raises(RuntimeError, match="criterion must have no evidence term"):
        sib_fast.compile_step(MappedNet(), EvidenceLoss("area"))
    with pytest.raises(RuntimeError, match="criterion must have no evidence term"):
        sib_fast.compile_step(MappedNet(), SIBLoss(evidence=EvidenceTerm()))


# ---- everything it must work with -------------------------------------------------------------------------------------


def test_every_modes_and_state():
    x, target = problem()
    net = MappedNet().double()
    criterion = EvidenceLoss("area", every=2).attach(net)
    values = [(criterion.active, criterion(net(x), target), "area" in criterion.terms) for _ in range(4)]
    assert [(active, has) for active, _, has in values] == [(True, True), (False, False)] * 2
    assert torch.isclose(values[0][1].detach() - F.cross_entropy(net(x), target), 2 * (criterion_area(net, x, target) - 0.1))
    assert criterion.state_dict() == {"calls": torch.tensor(4)}
    assert EvidenceLoss("area").state_dict() == {}
    other = EvidenceLoss("area", every=2)
    other.load_state_dict({"calls": torch.tensor(3)})
    assert not other.active
    net.eval()
    criterion = EvidenceLoss("area").attach(net)
    assert not criterion.active
    criterion.remove()
    criterion = EvidenceLoss("area", train_in_eval_mode=True).attach(net)
    assert criterion.active
    with torch.no_grad():
        assert not criterion.active
        criterion(net(x), target)
    assert "area" not in criterion.terms


def criterion_area(net, x, target):
    """The area, without the hinge, of a network in training mode."""
    criterion = EvidenceLoss("area").attach(twin := copy.deepcopy(net))
    criterion(twin(x), target)
    assert criterion.terms["area"] > 0.1
    return criterion.terms["area"]


def test_a_model_in_eval_mode_warns_in_backward():
    x, target = problem()
    net = MappedNet().double().eval()
    criterion = EvidenceLoss("area").attach(net)
    with pytest.warns(UserWarning, match="EvidenceLoss: the attached model must be in training mode for the evidence term"):
        criterion(net(x), target).backward()


def test_copies_are_not_attached_and_carry_no_live_hook():
    x, target = problem()
    net = MappedNet().double()
    criterion = EvidenceLoss("share", window_size=WINDOW).attach(net)
    before = copy.deepcopy(net), pickle.loads(pickle.dumps(net))
    criterion(net(x), target)
    for other in (*before, copy.deepcopy(net)):
        other(x)
    assert not copy.deepcopy(criterion).attached
    criterion(net(x), target)


@pytest.mark.parametrize("kind", ["area", "share"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(kind, dtype):
    """Half precision below the map and above it; the term itself in float32, and near to the float64 one."""
    x, target = problem(dtype=torch.float32)
    net, exact = MappedNet(), MappedNet().double()
    criterion = EvidenceLoss(kind, window_size=WINDOW).attach(net)
    with torch.autocast("cpu", dtype):
        loss = criterion(net(x), target)
    other = EvidenceLoss(kind, window_size=WINDOW).attach(exact)
    other(exact(x.double()), target)
    assert loss.dtype == torch.float32
    assert relative_error(criterion.terms[kind], other.terms[kind]) < (0.05 if kind == "area" else 0.1)
    loss.backward()
    assert all(torch.isfinite(p.grad).all() for p in net.parameters())


def test_checkpointing():
    x, target = problem()

    class Checkpointed(MappedNet):
        def forward(self, x):
            return self.head(checkpoint(self.trunk, x, use_reentrant=False))

    for kind in ("area", "share"):
        net, other = Checkpointed(norm="group").double(), MappedNet(norm="group").double()
        losses = [EvidenceLoss(kind, window_size=WINDOW).attach(n)(n(x), target) for n in (net, other)]
        assert torch.equal(*losses)
        wanted = parameter_gradients(losses[1], other)
        for name, grad in parameter_gradients(losses[0], net).items():
            assert relative_error(grad, wanted[name]) < TOLERANCE


def test_a_trunk_under_no_grad():
    """As a linear probe is often written: no graph below the map, so no mask of the image's VJP, which is said."""

    class Probe(MappedNet):
        def forward(self, x):
            with torch.no_grad():
                features = self.trunk(x)
            return self.head(features)

    x, target = problem()
    net = Probe().double()
    with pytest.raises(RuntimeError, match="must have a module, run once"):
        EvidenceLoss("area").attach(net)(net(x), target)

    class Given(MappedNet):
        """The trunk's own module ends the no_grad, so that its output can be captured with grad enabled."""

        def __init__(self):
            super().__init__()
            trunk = self.trunk

            class Frozen(nn.Module):
                def __init__(self):
                    super().__init__()
                    self.inner = trunk

                def forward(self, x):
                    with torch.no_grad():
                        return self.inner(x)

            self.trunk = Frozen()

    net = Given().double()
    criterion = EvidenceLoss("area").attach(net)
    for _ in range(2):
        criterion(net(x), target).backward()
    assert criterion._attachment.map_name == "trunk"
    assert net.head[-1].weight.grad.abs().sum() > 0
    with pytest.raises(RuntimeError, match="or the model detaches its input"):
        EvidenceLoss("share").attach(net := Given().double())(net(x), target)


def test_soft_targets_and_one_logit():
    x, target = problem()
    net, other = MappedNet().double(), MappedNet().double()
    hard = EvidenceLoss("area", scalar="label_logit").attach(net)
    soft = EvidenceLoss("area", scalar="label_logit").attach(other)
    hard(net(x), target)
    soft(other(x), 0.9 * F.one_hot(target, 5).double() + 0.02)
    assert torch.equal(hard.terms["area"], soft.terms["area"])
    one = MappedNet(classes=1).double()
    criterion = EvidenceLoss("area", base_loss=nn.BCEWithLogitsLoss()).attach(one)
    criterion(one(x), target % 2)
    assert 0 < criterion.terms["area"] <= 1
    several = EvidenceLoss("area", scalar="label_logit", base_loss=nn.BCEWithLogitsLoss()).attach(net := MappedNet().double())
    with pytest.raises(ValueError, match="target must hold one label per image for scalar='label_logit'"):
        several(net(x), torch.ones(5, 5, dtype=torch.float64))


def test_debug_names_what_is_not_finite(monkeypatch):
    monkeypatch.setenv("SIB_FAST_DEBUG", "1")
    x, target = problem()
    net = MappedNet().double()
    criterion = EvidenceLoss("area").attach(net)
    with torch.no_grad():
        net.trunk[3].weight[0] = float("nan")
    with pytest.raises(FloatingPointError, match="logits must be finite"):
        criterion(net(x), target)


# ---- bad input --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "kind", "words"),
    [
        ({"kind": "size"}, ValueError, "kind must be one of 'area', 'share' or a callable"),
        ({"evidence": "gradcam"}, ValueError, "evidence must be one of"),
        ({"scalar": "loss"}, ValueError, "scalar must be one of"),
        ({"mask": "density2"}, ValueError, "mask must be one of 'density', 'given' or a callable"),
        ({"kind": "share", "mask": None}, ValueError, "mask must be given a maker for kind='share'"),
        ({"weight": -1.0}, ValueError, "weight must be at least 0"),
        ({"target_area": 1.0}, ValueError, r"target_area must be in \[0, 1\)"),
        ({"at": 3}, TypeError, "at must be a module or its name"),
        ({"window_size": 4}, ValueError, "window_size must be odd"),
        ({"quantiles": (1,)}, ValueError, "quantiles must be four levels"),
        ({"every": 0}, ValueError, "every must be an int of at least 1"),
        ({"backend": "cublas"}, ValueError, "backend must be one of"),
    ],
)
def test_bad_arguments(arguments, kind, words):
    with pytest.raises(kind, match=words):
        EvidenceLoss(**arguments)


def test_bad_calls():
    x, target = problem()
    net = MappedNet().double()
    with pytest.raises(TypeError, match="evidence must be an EvidenceTerm, got str"):
        SIBLoss(evidence="area")
    with pytest.raises(ValueError, match="at must be one of the model's modules, got 'body'"):
        EvidenceLoss(at="body").attach(net)
    features = net.trunk(x)
    logits = net.head(features)
    with pytest.raises(RuntimeError, match="features must be given while the loss is active"):
        EvidenceLoss()(logits, target)
    with pytest.raises(RuntimeError, match="x must be given for a mask of the VJP at the image"):
        EvidenceLoss("share")(logits, target, features=features)
    with pytest.raises(RuntimeError, match="x must require grad before the forward pass"):
        EvidenceLoss("share")(logits, target, x, features=features)
    with pytest.raises(RuntimeError, match="features must be computed from x"):
        EvidenceLoss("share")(logits, target, x.clone().requires_grad_(), features=features)
    with pytest.raises(ValueError, match="mask must not be given for kind='area'"):
        EvidenceLoss("area")(logits, target, mask=annotation("given"), features=features)
    with pytest.raises(ValueError, match="mask must be given for mask='given', got None"):
        EvidenceLoss("share", mask="given")(logits, target, features=features)
    with pytest.raises(ValueError, match="got an image without one"):
        EvidenceLoss("share", mask="given")(logits, target, mask=annotation("partial"), features=features)
    with pytest.raises(ValueError, match=r"mask must have at least the map's \[9, 10\] cells, got \[3, 3\]"):
        EvidenceLoss("share", mask="given")(logits, target, mask=torch.ones(5, 1, 3, 3), features=features)
    with pytest.raises(ValueError, match="features must hold the 5 images of logits, got 4"):
        EvidenceLoss()(logits, target, features=features[:4])
    with pytest.raises(RuntimeError, match="got a graph that does not reach it"):
        EvidenceLoss()(logits, target, features=net.trunk(x))
    with pytest.raises(ValueError, match="mask must hold 0 and 1 or 0 and 255 alone"):
        EvidenceLoss("share", mask="given")(logits, target, mask=torch.full((5, 1, 17, 19), 7), features=features)
    criterion = EvidenceLoss().attach(net)
    logits = net(x)
    criterion(logits, target)
    with pytest.raises(RuntimeError, match="the map at 'trunk' must have been made since the latest loss"):
        criterion(logits, target)
    features = torch.rand(5, 2, 8, 8).requires_grad_()
    logits = features.flatten(1) @ torch.rand(128, 5)
    with pytest.raises(RuntimeError, match="the evidence must depend on the network's parameters"):
        EvidenceLoss(evidence="squared", scalar="label_logit")(logits, target, features=features)
    shared = nn.Sequential(block := nn.Sequential(nn.Conv2d(3, 3, 3, padding=1), nn.ReLU()), block, *POOL, nn.Linear(3, 5))
    criterion = EvidenceLoss(at="1").attach(shared)
    with pytest.raises(RuntimeError, match="'1' must run once in a forward pass"):
        shared(x.float())
    del criterion
