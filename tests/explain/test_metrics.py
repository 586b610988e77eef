"""Localisation metrics against loops over pixels, closed forms, and their edges; controls against what they must see."""

from __future__ import annotations

import math
import pickle
from operator import attrgetter

import numpy as np
import pytest
import torch
from torch import nn

pytest.importorskip("torchmetrics", reason="extra [explain]", exc_type=ImportError)

from torchmetrics import MetricCollection

from sib_fast.explain import metrics
from sib_fast.explain.metrics import localisation


def problem(images=7, height=9, width=8, seed=0):
    generator = torch.Generator().manual_seed(seed)
    maps = torch.randn(images, 1, height, width, generator=generator)
    mask = torch.rand(images, 1, height, width, generator=generator) > 0.6
    return maps, mask


def by_loop(name, a, m):
    """One image, from the definition, in numpy and plain Python. a [H, W], m [H, W] bool."""
    a = np.maximum(a, 0).ravel().astype(float)
    m = m.ravel()
    if name == "energy":
        return sum(v for v, inside in zip(a, m, strict=True) if inside) / sum(a)
    if name == "energy_gain":
        return (a[m].sum() / a.sum()) / (m.sum() / m.size)
    if name == "rank_accuracy":
        top = np.argsort(-a, kind="stable")[: m.sum()]
        return sum(m[i] for i in top) / m.sum()
    if name == "pointing_game":
        return float(m[int(np.argmax(a))])
    if name == "iou":
        shown = (a - a.min()) / (a.max() - a.min()) >= 0.5
        return (shown & m).sum() / (shown | m).sum()
    if name == "log_background":
        return math.log10(a[~m].mean() / a[m].mean())
    if name == "background_variance":
        return np.var(np.where(m, 0.0, a), ddof=1) / np.var(a, ddof=1)
    raise AssertionError(name)


@pytest.mark.parametrize("name", list(localisation()))
def test_against_the_definition(name):
    maps, mask = problem()
    metric = localisation()[name]
    want = [by_loop(name, a.numpy(), m.numpy()) for a, m in zip(maps[:, 0], mask[:, 0], strict=True)]
    torch.testing.assert_close(metric.scores(maps, mask), torch.tensor(want, dtype=torch.float64), rtol=1e-9, atol=1e-12)
    for part in (slice(0, 3), slice(3, 7)):
        metric.update(maps[part], mask[part])
    torch.testing.assert_close(metric.compute(), torch.tensor(np.mean(want), dtype=torch.float64), rtol=1e-9, atol=1e-12)
    assert metric.undefined == 0


def test_perfect_uniform_and_inverted_maps():
    _, mask = problem()
    collection = localisation()
    share = mask.double().mean((1, 2, 3)).mean().item()
    collection.update(mask.float(), mask)
    best = {name: value.item() for name, value in collection.compute().items()}
    assert best["energy"] == best["rank_accuracy"] == best["pointing_game"] == best["iou"] == 1
    assert best["log_background"] == -6
    assert best["background_variance"] == 0
    collection.reset()
    collection.update(torch.full_like(mask, 0.3, dtype=torch.float32), mask)
    even = {name: value.item() for name, value in collection.compute().items()}
    assert even["energy"] == pytest.approx(share)
    assert even["rank_accuracy"] == pytest.approx(share)  # all tied: the seats are shared out
    assert even["pointing_game"] == pytest.approx(share)
    assert even["energy_gain"] == pytest.approx(1)
    assert even["log_background"] == pytest.approx(0, abs=1e-12)
    assert math.isnan(even["background_variance"])
    collection.reset()
    collection.update((~mask).float(), mask)
    worst = {name: value.item() for name, value in collection.compute().items()}
    assert worst["energy"] == worst["pointing_game"] == worst["iou"] == 0
    assert worst["background_variance"] == 1
    assert math.isnan(worst["log_background"])  # no relevance inside: the ratio is not defined


def test_the_order_of_tied_pixels_does_not_matter():
    maps, mask = problem()
    coarse = (maps * 2).round()
    shuffle = torch.randperm(72, generator=torch.Generator().manual_seed(1))
    for name, metric in localisation().items():
        there = metric.scores(coarse, mask)
        back = metric.scores(coarse.flatten(2)[..., shuffle].view_as(coarse), mask.flatten(2)[..., shuffle].view_as(mask))
        torch.testing.assert_close(there, back, rtol=1e-12, atol=1e-12, equal_nan=True, msg=name)


def test_undefined_images_are_left_out_and_counted():
    maps, mask = problem()
    collection, alone = localisation(), localisation()
    alone.update(maps, mask)
    empty = torch.zeros_like(mask[:1])
    collection.update(torch.cat([maps, maps[:1], -maps[:1].abs()]), torch.cat([mask, empty, mask[:1]]))
    for name, metric in collection.items():
        if name == "background_variance":
            assert metric.undefined == 1  # an empty mask is all background; a zero map has no variance
            continue
        assert metric.undefined == 2, name
        assert metric.images == 9
        torch.testing.assert_close(metric.compute(), alone[name].compute(), rtol=0, atol=0)


def test_nothing_defined_is_nan_and_not_zero():
    collection = localisation()
    collection.update(torch.zeros(2, 1, 4, 4), torch.ones(2, 1, 4, 4))
    assert all(value.isnan() for value in collection.compute().values())


ALIKE = {
    **{name: type(metric) for name, metric in localisation().items()},
    "iou_half": metrics.IoU,
    "iou_third": lambda **options: metrics.IoU(1 / 3, **options),
    "higher_floor": lambda **options: metrics.BackgroundSuppression(1e-2, **options),
    "close_floor": lambda **options: metrics.BackgroundSuppression(1e-2 + 1e-12, **options),
}


@pytest.mark.parametrize("first", ["nothing defined", "all scores equal"])
def test_a_users_collection_keeps_the_scores_apart(first):
    """torchmetrics merges metrics whose states look alike after the first update; every score is one of its own."""
    maps, mask = problem()
    start = (torch.zeros_like(maps), mask) if first == "nothing defined" else (mask.float(), mask)
    batches = [start, (maps[:3], mask[:3]), (maps[3:], mask[3:])]

    def alone(batches):
        metrics = {name: make() for name, make in ALIKE.items()}
        for metric in metrics.values():
            for batch in batches:
                metric.update(*batch)
        return {name: metric.compute() for name, metric in metrics.items()}

    together = MetricCollection({name: make() for name, make in ALIKE.items()})
    for count, batch in enumerate(batches, 1):
        together.update(*batch)
        torch.testing.assert_close(together.compute(), alone(batches[:count]), rtol=0, atol=0, equal_nan=True)
    assert len(set(map(float, together.compute().values()))) >= len(localisation())
    for same in (together.clone(), pickle.loads(pickle.dumps(together))):
        torch.testing.assert_close(same.compute(), together.compute(), rtol=0, atol=0)
        same.update(*batches[1])
        torch.testing.assert_close(same.compute(), alone([*batches, batches[1]]), rtol=0, atol=0)
    together.reset()
    assert all(metric.images == 0 for metric in together.values())
    for batch in batches[1:]:
        together.update(*batch)
    torch.testing.assert_close(together.compute(), alone(batches[1:]), rtol=0, atol=0)


def test_state_names_belong_to_one_score_with_its_parameters():
    names = [tuple(make()._defaults) for make in ALIKE.values()]
    assert len(set(names)) == len(names) - 1  # "iou" and "iou_half" are one score
    assert names[list(ALIKE).index("iou")] == names[list(ALIKE).index("iou_half")]


@pytest.mark.parametrize("name", ALIKE)
def test_states_are_summed_over_processes_and_stored(name):
    maps, mask = problem()
    metric, alone = ALIKE[name](), ALIKE[name]()
    for one in (metric, alone):
        one.update(maps, mask)
    metric.sync(lambda state, group: [state, state], process_group="two", distributed_available=lambda: True)
    assert (metric.images, metric.defined) == (14, 2 * alone.defined)
    torch.testing.assert_close(metric.total, 2 * alone.total)
    metric.unsync()
    torch.testing.assert_close(metric.compute(), alone.compute())
    alone.persistent(True)
    loaded = ALIKE[name]()
    loaded.persistent(True)
    loaded.load_state_dict(alone.state_dict())
    torch.testing.assert_close(loaded.total, alone.total, rtol=0, atol=0)


def test_soft_masks_and_bad_input():
    maps, mask = problem()
    metric = metrics.EnergyPointingGame()
    assert torch.equal(metric.scores(maps, mask.float() * 0.6), metric.scores(maps, mask))
    for error, words, arguments in (
        (ValueError, r"maps must have shape \[7, 1, 9, 8\]", (maps.expand(7, 3, 9, 8), mask)),
        (ValueError, r"mask must have shape", (maps, mask[:, :, :4])),
        (ValueError, r"maps must be finite, got NaN or Inf", (maps / 0, mask)),
        (TypeError, r"maps must be floating point|maps must be", (mask, mask)),
    ):
        with pytest.raises(error, match=f"EnergyPointingGame: {words}"):
            metric.update(*arguments)
    with pytest.raises(ValueError, match=r"IoU: threshold must lie in \(0, 1\), got 1"):
        metrics.IoU(1)
    with pytest.raises(ValueError, match="BackgroundSuppression: floor must be positive, got 0"):
        metrics.BackgroundSuppression(0)


# ---- controls -----------------------------------------------------------------------------------------------------------


class OnePixel(nn.Module):
    """Knows a class by pixel (2, 3) alone. [N, 1, 6, 6] -> [N, 2]."""

    def __init__(self):
        super().__init__()
        self.gain = nn.Linear(1, 2)
        with torch.no_grad():
            self.gain.weight.copy_(torch.tensor([[4.0], [-4.0]]))
            self.gain.bias.zero_()

    def forward(self, x):
        return self.gain(x[:, :, 2, 3])


def test_insertion_and_deletion_in_closed_form():
    from sib_fast.explain.controls import insertion_deletion

    net, x, target = OnePixel(), torch.ones(1, 1, 6, 6), torch.tensor([0])
    right, wrong = torch.zeros(2, 1, 1, 6, 6)
    right[0, 0, 2, 3] = 1
    wrong += 1
    wrong[0, 0, 2, 3] = 0
    p, half, n = torch.sigmoid(torch.tensor(8.0)).item(), 0.5, 36
    inserted, deleted = insertion_deletion(net, x, target, right, steps=n)
    # shown first: from the first step on it is p; blanked first: from the first step on it is 1/2
    assert inserted.item() == pytest.approx((half + p) / 2 / n + p * (n - 1) / n)
    assert deleted.item() == pytest.approx((half + p) / 2 / n + half * (n - 1) / n)
    inserted, deleted = insertion_deletion(net, x, target, wrong, steps=n)
    assert inserted.item() == pytest.approx((half + p) / 2 / n + half * (n - 1) / n)
    assert deleted.item() == pytest.approx((half + p) / 2 / n + p * (n - 1) / n)
    assert net.training
    with pytest.raises(ValueError, match=r"steps must lie in \[1, 36\], got 37"):
        insertion_deletion(net, x, target, right, steps=37)


def test_randomisation_sees_whether_the_network_matters():
    from sib_fast.explain import controls
    from sib_fast.testing.networks import conv_net, image_batch

    pytest.importorskip("captum", exc_type=ImportError)
    x, target = image_batch(images=8, height=24, width=24)
    depends = controls.randomisation(conv_net(), x, target)
    assert depends.abs().mean() < 0.5
    copied = controls._spearman(x.abs().sum(1).flatten(1), (x.abs().sum(1) ** 3).flatten(1))
    torch.testing.assert_close(copied, torch.ones(8, dtype=torch.float64))


def normed_weights(net, *names):
    return {name: net.get_submodule(name).weight.detach().clone() for name in names}


@pytest.mark.filterwarnings("ignore:.*weight_norm.* is deprecated")
@pytest.mark.parametrize("prepared", [False, True])
@pytest.mark.parametrize(
    "norm", ["weight_norm", "spectral_norm", "parametrizations.weight_norm", "parametrizations.spectral_norm"]
)
def test_randomisation_draws_what_a_norm_computes_as_the_layer_draws_it(norm, prepared):
    import sib_fast
    from sib_fast.explain import controls
    from sib_fast.testing.networks import conv_net, image_batch

    net = conv_net()
    apply = attrgetter(norm)(torch.nn.utils)
    for name in ("0", "3"):
        apply(net.get_submodule(name))
    if prepared:
        sib_fast.prepare(net)
    x, _ = image_batch()
    net.train()(x)  # spectral norm moves its vectors
    drawn = controls._plain_copy(net)
    drawn(x)
    before = normed_weights(drawn, "0", "3")
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(5)
        for name, module in drawn.named_modules():
            controls._draw(name, module)
    drawn(x)
    with torch.random.fork_rng():
        torch.manual_seed(5)
        fresh = conv_net()
    torch.manual_seed(5)
    for module in fresh.modules():
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()
    for name, weight in normed_weights(drawn, "0", "3").items():
        assert not torch.equal(weight, before[name])
        wanted = fresh.get_submodule(name).weight.detach()
        if "spectral" in norm:
            wanted = wanted / torch.linalg.matrix_norm(wanted.flatten(1), 2)
            torch.testing.assert_close(weight, wanted, rtol=0.05, atol=0)  # the power iteration is one
        else:
            torch.testing.assert_close(weight, wanted)
    for name in ("0", "3"):
        torch.testing.assert_close(drawn.get_submodule(name).bias, fresh.get_submodule(name).bias)


def test_randomisation_refuses_or_says_what_it_cannot_draw():
    from torch.nn.utils import parametrize

    from sib_fast.explain import controls

    class OneWay(torch.nn.Module):
        def forward(self, weight):
            return weight.abs()

    class Token(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.token = torch.nn.Parameter(torch.zeros(3))

    layer = torch.nn.Conv2d(3, 4, 3)
    parametrize.register_parametrization(layer, "weight", OneWay())
    with pytest.raises(ValueError, match=r"stem\.weight must be .* drawn anew, got a parametrised one: .*OneWay"):
        controls._draw("stem", layer)
    cell = torch.nn.LSTM(3, 4)
    torch.nn.utils.parametrizations.weight_norm(cell, "weight_hh_l0")
    with pytest.raises(ValueError, match=r"weight_hh_l0 must be .*LSTM does not draw it"):
        controls._draw("cell", cell)
    with pytest.warns(UserWarning, match=r"Token must have reset_parameters\(\) .* its token stays as trained"):
        controls._draw("", Token())
    attention = torch.nn.MultiheadAttention(4, 2)
    before = attention.in_proj_weight.detach().clone()
    controls._draw("", attention)
    assert not torch.equal(attention.in_proj_weight, before)


def test_rank_correlation_is_scipys():
    stats = pytest.importorskip("scipy.stats", exc_type=ImportError)
    from sib_fast.explain.controls import _spearman

    a, b = (torch.randn(5, 30, generator=torch.Generator().manual_seed(s)).mul(3).round() for s in (0, 1))
    want = [stats.spearmanr(p.numpy(), q.numpy()).statistic for p, q in zip(a, b, strict=True)]
    torch.testing.assert_close(_spearman(a, b), torch.tensor(want))


def test_masks_are_read_and_refused_as_the_loss_does():
    maps, mask = torch.rand(2, 1, 6, 5), torch.rand(2, 1, 6, 5) > 0.5
    wanted = localisation()
    wanted.update(maps, mask)
    for same in (mask.byte(), mask.int() * 255, mask.float()):
        metrics = localisation()
        metrics.update(maps, same)
        assert metrics.compute() == wanted.compute()
    for other, words in ((mask * 15 + 240, "must hold 0 and 1 or 0 and 255 alone"), (mask * 255.0, r"must lie in \[0, 1\]")):
        with pytest.raises(ValueError, match=f"mask {words}"):
            localisation().update(maps, other)
