"""Every way of calling SIBLoss, in each of its forms, against a step in plain PyTorch that shares no line with the package.

A row plays the same training twice, on a network with SIBLoss and on one with the plain loss, and compares what was trained.
What cannot work is a row whose error is named.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from sib_fast import SIBLoss, compile_step, prepare
from sib_fast.testing.networks import conv_net, image_batch, plain_hsic, plain_mask

LAMBDA_FG, LAMBDA_BG, WINDOW = 3.0, 1000.0, 5
FORMS = ("explicit", "attached", "layer")
TOLERANCE = 1e-10


class Ours:
    """A network and its SIBLoss in one of the three forms."""

    def __init__(self, net: nn.Module, form: str, row: Row, criterion: SIBLoss) -> None:
        self.net, self.form, self.row, self.criterion = net, form, row, criterion
        if form != "explicit":
            criterion.attach(net, layer=row.layer if form == "layer" else None)
        self.step = compile_step(net, criterion, backend="eager") if row.compiled else None

    def loss(self, x: Tensor, target: Tensor, mask: Tensor | None = None) -> Tensor:
        if self.step is not None:
            return self.step(x, target, mask).loss
        if self.form != "explicit":
            return self.criterion(self.net(x), target, mask=mask)
        leaf = x.clone().requires_grad_()
        return self.criterion(self.net(leaf), target, leaf, mask)

    def one_step(self):
        return self.criterion.one_step()

    def copied(self) -> Ours:
        return Ours(copy.deepcopy(self.net), self.form, self.row, copy.deepcopy(self.criterion))


class Plain:
    """The same in plain PyTorch: SPEC 2-5 by autograd, at the image or at a layer's output."""

    def __init__(self, net: nn.Module, form: str, row: Row) -> None:
        self.net, self.form, self.row, self.steps = net, form, row, 0

    def loss(self, x: Tensor, target: Tensor, mask: Tensor | None = None) -> Tensor:
        cut = self.row.cut if self.form == "layer" else 0
        h = self.net[:cut](x) if cut else x
        h = h if h.requires_grad else h.clone().requires_grad_()
        logits = self.net[cut:](h.clone())
        base = self.row.base_loss(logits, target)
        every = self.row.options.get("every", 1)
        if not self.row.applies or self.steps % every:
            return base
        (vjp,) = torch.autograd.grad(self.row.scalar(logits, target), h, create_graph=True)
        mask = plain_mask(vjp, WINDOW) if mask is None else mask.double() / mask.double().max().clamp(min=1)
        data = h.detach()
        foreground = self.row.foreground((vjp * mask).flatten(1), (data * mask).flatten(1))
        background = (vjp * (1 - mask)).flatten(1).var(dim=1, unbiased=True).mean()
        return base + every * LAMBDA_BG * torch.exp(background) + every * LAMBDA_FG * torch.exp(-foreground)

    @contextmanager
    def one_step(self) -> Iterator[None]:
        yield
        self.steps += 1

    def copied(self) -> Plain:
        return Plain(copy.deepcopy(self.net), self.form, self.row)


# ---- how a step is made: each gets a side and returns the modules to compare ------------------------------------------


def batches(count: int = 3, images: int = 6) -> list[tuple[Tensor, Tensor]]:
    return [(x.double(), target) for x, target in (image_batch(images, seed=seed) for seed in range(count))]


def sgd(side: Ours | Plain) -> torch.optim.Optimizer:
    return torch.optim.SGD(side.net.parameters(), 0.05, momentum=0.9)


def train(side: Ours | Plain, make: Callable = batches, **given: Any) -> list[nn.Module]:
    optimiser = sgd(side)
    for x, target in make():
        before = x.clone()
        optimiser.zero_grad()
        side.loss(x, target, **given).backward()
        optimiser.step()
        # With a layer the model gets the caller's tensor itself, as without us.
        assert torch.equal(x, before) or side.form == "layer"
    return [side.net]


def soft(side: Ours | Plain) -> list[nn.Module]:
    generator = torch.Generator().manual_seed(3)
    weights = [torch.rand(6, 5, generator=generator, dtype=torch.float64).softmax(1) for _ in range(3)]
    return train(side, lambda: [(x, w) for (x, _), w in zip(batches(), weights, strict=True)])


def one_image(side: Ours | Plain) -> list[nn.Module]:
    return train(side, lambda: batches(images=1))


def labelled(label: Callable[[Tensor], Tensor]) -> Callable:
    """Training with targets made of the class indices."""
    return lambda side: train(side, lambda: [(x, label(target)) for x, target in batches()])


def multi_hot(target: Tensor) -> Tensor:
    return F.one_hot(target, 5) | F.one_hot((target + 2) % 5, 5)


def given_mask(dtype: torch.dtype, times: float = 1) -> Callable:
    def play(side: Ours | Plain) -> list[nn.Module]:
        values = torch.rand(6, 1, 12, 11, generator=torch.Generator().manual_seed(4))
        return train(side, mask=times * (values if dtype.is_floating_point else values > 0.6).to(dtype))

    return play


def lbfgs(side: Ours | Plain) -> list[nn.Module]:
    """Several calls of the criterion a step."""
    optimiser = torch.optim.LBFGS(side.net.parameters(), lr=0.02, max_iter=3, history_size=3)
    for x, target in batches():

        def closure(x: Tensor = x, target: Tensor = target) -> Tensor:
            optimiser.zero_grad()
            loss = side.loss(x, target)
            loss.backward()
            return loss

        with side.one_step():
            optimiser.step(closure)
    return [side.net]


def sam(side: Ours | Plain, rho: float = 0.05) -> list[nn.Module]:
    """Sharpness-aware minimisation: the gradient at the top of a small hill is applied at its foot."""
    optimiser, parameters = sgd(side), list(side.net.parameters())
    for x, target in batches():
        with side.one_step():
            optimiser.zero_grad()
            side.loss(x, target).backward()
            norm = torch.stack([p.grad.norm() for p in parameters]).norm()
            moves = [rho * p.grad / norm for p in parameters]
            with torch.no_grad():
                for p, move in zip(parameters, moves, strict=True):
                    p.add_(move)
            optimiser.zero_grad()
            side.loss(x, target).backward()
            with torch.no_grad():
                for p, move in zip(parameters, moves, strict=True):
                    p.sub_(move)
            optimiser.step()
    return [side.net]


def mixup(side: Ours | Plain) -> list[nn.Module]:
    """Two calls a step, one for each of the mixed labels."""
    optimiser = sgd(side)
    for x, target in batches():
        with side.one_step():
            optimiser.zero_grad()
            (0.3 * side.loss(x, target) + 0.7 * side.loss(x, (target + 1) % 5)).backward()
            optimiser.step()
    return [side.net]


def accumulate(side: Ours | Plain) -> list[nn.Module]:
    """Two micro-batches a step, counted by accumulation_steps; the loss is divided in place, as timm does."""
    optimiser, parts = sgd(side), batches(6)
    for first, second in zip(parts[::2], parts[1::2], strict=True):
        with nullcontext() if isinstance(side, Ours) else side.one_step():
            for x, target in (first, second):
                loss = side.loss(x, target)
                loss /= 2
                loss.backward()
        optimiser.step()
        optimiser.zero_grad()
    return [side.net]


def accumulate_in_a_block(side: Ours | Plain) -> list[nn.Module]:
    optimiser, parts = sgd(side), batches(6)
    for first, second in zip(parts[::2], parts[1::2], strict=True):
        with side.one_step():
            for x, target in (first, second):
                (side.loss(x, target) / 2).backward()
        optimiser.step()
        optimiser.zero_grad()
    return [side.net]


def average(side: Ours | Plain) -> list[nn.Module]:
    """An exponential average of the weights beside the network."""
    ema = AveragedModel(side.net, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.5), use_buffers=True)
    for _ in range(2):
        train(side)
        ema.update_parameters(side.net)
    with torch.no_grad():
        ema(batches(1)[0][0])
    return [side.net, ema.module]


def a_copy(side: Ours | Plain) -> list[nn.Module]:
    train(side)
    other = side.copied()
    train(other)
    return [side.net, other.net]


# ---- networks -------------------------------------------------------------------------------------------------------


def usual() -> nn.Sequential:
    return conv_net()


class Centre(nn.Module):
    """Changes its input in place, whole or channel by channel. Shapes: [N, C, H, W] -> the same."""

    def __init__(self, by_channel: bool = False) -> None:
        super().__init__()
        self.by_channel = by_channel

    def forward(self, x: Tensor) -> Tensor:
        if not self.by_channel:
            return x.sub_(0.4).div_(1.3)
        for channel in range(x.shape[1]):
            x[:, channel].sub_(0.4 + 0.1 * channel).mul_(0.8)
        return x


def one_logit() -> nn.Sequential:
    return conv_net(classes=1)


def changes_its_input() -> nn.Sequential:
    return nn.Sequential(Centre(), *conv_net())


def changes_its_channels() -> nn.Sequential:
    return nn.Sequential(Centre(by_channel=True), *conv_net())


def begins_with_relu_in_place() -> nn.Sequential:
    return nn.Sequential(nn.ReLU(inplace=True), *conv_net())


def frozen_below_in_place() -> nn.Sequential:
    """A frozen stem, whose map the next layer changes in place: it is that map then, as where the stem is trained."""
    net = conv_net()
    net[2] = nn.ReLU(inplace=True)
    net[:2].requires_grad_(False)
    return net


# ---- the rows ---------------------------------------------------------------------------------------------------------


def all_training(net: nn.Module, criterion: SIBLoss | None) -> None:
    net.train()


def all_eval(net: nn.Module, criterion: SIBLoss | None) -> None:
    net.eval()


def frozen_batch_norm(net: nn.Module, criterion: SIBLoss | None) -> None:
    net.train()
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval()


def criterion_in_eval(net: nn.Module, criterion: SIBLoss | None) -> None:
    net.train()
    if criterion is not None:
        criterion.eval()


def both_in_eval(net: nn.Module, criterion: SIBLoss | None) -> None:
    net.eval()
    if criterion is not None:
        criterion.eval()


def energy(logits: Tensor, target: Tensor) -> Tensor:
    return 0.5 * (torch.softmax(logits, dim=1) ** 2).sum()


def energy_of_one_logit(logits: Tensor, target: Tensor) -> Tensor:
    return energy(torch.cat([torch.zeros_like(logits), logits], dim=1), target)


def energy_of_labels(logits: Tensor, target: Tensor) -> Tensor:
    p = torch.sigmoid(logits)
    return 0.5 * (p**2 + (1 - p) ** 2).sum()


def log_probability_of_one_logit(logits: Tensor, target: Tensor) -> Tensor:
    return F.logsigmoid(torch.where(target > 0.5, logits[:, 0], -logits[:, 0])).sum()


def binary(logits: Tensor, target: Tensor) -> Tensor:
    return F.binary_cross_entropy_with_logits(logits, target.double().reshape(logits.shape))


def uncentred(rows: Tensor, others: Tensor) -> Tensor:
    return ((rows @ rows.T) * (others @ others.T)).mean() * 1e3


@dataclass(frozen=True)
class Row:
    """play: the training. options: the criterion's. modes: sets those of network and criterion. applies: whether there are terms.
    layer: that SIBLoss is attached to; cut: where the plain side cuts the network. scalar, base_loss, foreground: the plain
    side's. raises: by form. warns: where a model is attached.
    """

    play: Callable
    options: dict[str, Any] = field(default_factory=dict)
    modes: Callable = all_training
    applies: bool = True
    compiled: bool = False
    network: Callable[[], nn.Sequential] = usual
    layer: str = "2"  # its map has the image's size, so that the window is the same
    cut: int = 3  # the layers above
    scalar: Callable = energy
    base_loss: Callable = F.cross_entropy
    foreground: Callable = plain_hsic
    raises: dict[str, tuple[type[Exception], str]] = field(default_factory=dict)
    warns: str | None = None


def everywhere(kind: type[Exception], words: str) -> dict[str, tuple[type[Exception], str]]:
    return dict.fromkeys(FORMS, (kind, words))


TOO_FEW = everywhere(ValueError, "the batch must hold N >= 2 images")
EVAL_MODE = "the attached model must be in training mode for the S-IB terms, got one in eval mode"
NO_LAYER = {"layer": (RuntimeError, "criterion must be attached to the model's input or to none")}
LAZY = {"every": 2}
IN_PLACE = {"explicit": (RuntimeError, r"leaf Variable that requires grad (is being|has been) used in an in-place operation")}

BINARY = {"base_loss": nn.BCEWithLogitsLoss()}
ONE_LOGIT = {"network": one_logit, "base_loss": binary, "scalar": energy_of_one_logit}
LABELS = {"base_loss": binary, "scalar": energy_of_labels}
NO_MASK = everywhere(ValueError, "mask must hold 0 and 1 or 0 and 255 alone")

ROWS = {
    "train": Row(train),
    "model in eval": Row(train, modes=all_eval, applies=False, warns=EVAL_MODE),
    "model in eval, asked for": Row(train, {"train_in_eval_mode": True}, modes=all_eval),
    "model in train, asked for": Row(train, {"train_in_eval_mode": True}),
    "frozen batch norm": Row(train, modes=frozen_batch_norm),
    "criterion in eval": Row(train, modes=criterion_in_eval, applies=False),
    "criterion in eval, asked for": Row(train, {"train_in_eval_mode": True}, modes=both_in_eval, applies=False),
    "soft targets": Row(soft),
    "one logit, int64 [N]": Row(labelled(lambda t: t % 2), BINARY, **ONE_LOGIT),
    "one logit, bool [N, 1]": Row(labelled(lambda t: t[:, None] % 2 == 1), BINARY, **ONE_LOGIT),
    "one logit, float [N]": Row(labelled(lambda t: t % 2 * 1.0), BINARY, **ONE_LOGIT),
    "one logit, label_log_probability": Row(
        labelled(lambda t: t % 2),
        {**BINARY, "scalar": "label_log_probability"},
        **{**ONE_LOGIT, "scalar": log_probability_of_one_logit},
    ),
    "one logit, model in eval, asked for": Row(
        labelled(lambda t: t % 2), {**BINARY, "train_in_eval_mode": True}, modes=all_eval, **ONE_LOGIT
    ),
    "one logit, cross-entropy": Row(
        labelled(lambda t: t % 2), network=one_logit, raises=everywhere(ValueError, "base_loss must not be cross-entropy")
    ),
    **{
        f"several labels, {dtype}": Row(
            labelled(lambda t, dtype=dtype: multi_hot(t).to(dtype)), {**BINARY, "scalar": "multilabel_energy"}, **LABELS
        )
        for dtype in (torch.float64, torch.float32, torch.int64, torch.bool)
    },
    "several labels, a label's scalar": Row(
        labelled(lambda t: multi_hot(t).bool()),
        {**BINARY, "scalar": "label_logit"},
        raises=everywhere(TypeError, "target must be class indices or floating-point probabilities"),
    ),
    "N = 1": Row(one_image, raises=TOO_FEW),
    "N = 1, an estimator that takes it": Row(
        one_image, {"estimator": lambda gram_vjp, gram_x: (gram_vjp * gram_x).mean() * 1e3}, foreground=uncentred
    ),
    "N = 1, base loss": Row(one_image, modes=criterion_in_eval, applies=False),
    **{
        f"given mask, {dtype}": Row(given_mask(dtype))
        for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.bool, torch.uint8, torch.int64)
    },
    "given mask, 0 and 255": Row(given_mask(torch.uint8, 255)),
    "given mask, labels": Row(given_mask(torch.int64, 15), raises=NO_MASK),
    "given mask, 0 to 255": Row(given_mask(torch.float32, 255), raises=everywhere(ValueError, r"mask must lie in \[0, 1\]")),
    "LBFGS": Row(lbfgs),
    "LBFGS, every=2": Row(lbfgs, LAZY),
    "SAM": Row(sam),
    "SAM, every=2": Row(sam, LAZY),
    "mixup of two losses": Row(mixup),
    "mixup of two losses, every=2": Row(mixup, LAZY),
    "accumulation": Row(accumulate, {"accumulation_steps": 2}),
    "accumulation, every=2": Row(accumulate, {"accumulation_steps": 2, **LAZY}),
    "accumulation in a block, every=2": Row(accumulate_in_a_block, LAZY),
    "blocks and accumulation_steps": Row(
        accumulate_in_a_block, {"accumulation_steps": 2}, raises=everywhere(ValueError, "accumulation_steps must be 1, got 2")
    ),
    "EMA": Row(average),
    "deepcopy": Row(a_copy),
    "input changed in place": Row(train, network=changes_its_input, layer="3", cut=4, raises=IN_PLACE),
    "input changed by channels": Row(
        train,
        network=changes_its_channels,
        layer="3",
        cut=4,
        raises={"explicit": (RuntimeError, "a view of a leaf Variable that requires grad")},
    ),
    "first ReLU in place": Row(train, network=begins_with_relu_in_place, layer="3", cut=4, raises=IN_PLACE),
    "frozen stem, ReLU in place": Row(train, network=frozen_below_in_place, layer="1", cut=3),
    "compiled, input changed in place": Row(train, network=changes_its_input, compiled=True, raises=NO_LAYER),
    "compiled": Row(train, compiled=True, raises=NO_LAYER),
    "compiled, model in eval, asked for": Row(
        train, {"train_in_eval_mode": True}, modes=all_eval, compiled=True, raises=NO_LAYER
    ),
    "compiled SAM, every=2": Row(sam, LAZY, compiled=True, raises=NO_LAYER),
}


def state(modules: list[nn.Module]) -> Tensor:
    return torch.cat([t.detach().double().flatten() for module in modules for t in module.state_dict().values()])


@pytest.mark.sampled(40, always="plain layers")
@pytest.mark.parametrize("prepared", [False, True], ids=["plain layers", "prepared"])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", ROWS)
def test_trains_as_plain_pytorch_does(name, form, prepared):
    row = ROWS[name]
    if row.warns and form == "explicit":  # x is given: there is no model whose mode could be asked
        row = replace(row, applies=True, warns=None)
    criterion = SIBLoss(LAMBDA_FG, LAMBDA_BG, window_size=WINDOW, **row.options)
    net = prepare(row.network().double()) if prepared else row.network().double()
    row.modes(net, criterion)

    def play() -> list[nn.Module]:
        return row.play(Ours(net, form, row, criterion))

    if form in row.raises:
        kind, words = row.raises[form]
        with pytest.raises(kind, match=words):
            play()
        return
    with pytest.warns(UserWarning, match=row.warns) if row.warns else nullcontext():
        got = state(play())

    def plainly(row: Row) -> Tensor:
        net = row.network().double()
        row.modes(net, None)
        return state(row.play(Plain(net, form, row)))

    start, wanted = state([row.network()]), plainly(row)
    moved = (wanted - start.repeat(len(wanted) // len(start))).norm()
    assert (got - wanted).norm() <= TOLERANCE * moved
    if row.applies:  # a loss without its terms must be far outside the tolerance
        assert (plainly(replace(row, applies=False)) - wanted).norm() > 1e5 * TOLERANCE * moved
