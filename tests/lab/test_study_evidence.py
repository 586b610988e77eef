"""The study of evidence terms: what its controls do, its measures on maps with known answers, its statistics, its plan."""

import json
import math
from pathlib import Path

import pytest
import torch

pytest.importorskip("lightning")
pytest.importorskip("captum")
from sib_fast import cli
from sib_fast.lab.data import EmbeddedDigits
from sib_fast.lab.networks import build_network
from sib_fast.lab.study import measures, plan, run, selection
from sib_fast.lab.study.config import StudyConfig
from sib_fast.lab.study.records import PROTOCOLS, SHIFTED, Quantity, explanation, load_study
from sib_fast.lab.study.report import markdown, write_report
from sib_fast.lab.study.statistics import holm, primary, secondary, verdicts
from sib_fast.lab.study.variants import cam_entropy, centred, find_variant, others, random_masks

ROOT = Path(__file__).parent.parent.parent
TINY = {
    "protocol": "evidence",
    "architectures": ["small_conv_net"],
    "epochs": 1,
    "batch_size": 16,
    "width": 4,
    "train_size": 32,
    "test_size": 20,
    "explained": 8,
    "randomisation": False,
    "methods": ["saliency", "constant"],
}


def images(seed=0, size=32, count=6):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, 3, size, size, generator=generator), torch.arange(count) % 10


# ---- variants and controls ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("arch", ["small_conv_net", "small_resnet"])
@pytest.mark.parametrize(
    "spec",
    [
        "area",
        "share",
        "sib_share",
        "share_true",
        "share_others",
        "cam_entropy",
        "feature_norm",
        "map_gradient:lambda_bg=1e9",
        "share:evidence=absolute,every=4",
        "area:scalar=label_logit,target_area=0,weight=3",
    ],
)
def test_a_variant_has_a_finite_loss_and_gradient_beside_cross_entropy(arch, spec):
    torch.manual_seed(0)
    model = build_network(arch, 10, width=4)
    variant = find_variant(arch, spec)
    criterion = variant.criterion(model)
    x, y = images()
    given = {"mask": centred(32).expand(6, -1, -1, -1)} if variant.given_masks else {}
    loss = criterion(model(x), y, **given)
    loss.backward()
    assert loss.item() != pytest.approx(criterion.terms["base"].item())
    assert all(torch.isfinite(p.grad).all() for p in model.parameters())
    json.dumps(variant.settings())


def test_overrides_reach_the_criterion_and_the_record():
    model = build_network("small_conv_net", 10, width=4)
    variant = find_variant("small_conv_net", "share:weight=3,evidence=absolute,normalise_cotangent=false")
    assert {k: variant.settings()[k] for k in ("kind", "weight", "evidence", "normalise_cotangent", "mask")} == {
        "kind": "share",
        "weight": 3.0,
        "evidence": "absolute",
        "normalise_cotangent": False,
        "mask": "density",
    }
    assert variant.criterion(model).evidence.weight == 3.0
    for spec in ("share:lambda_bg=1", "share:every=2.5", "cutout:weight=1", "plain:weight=1"):
        with pytest.raises(ValueError, match="study: variants must"):
            find_variant("small_conv_net", spec)


@pytest.mark.parametrize("count", [2, 3, 50])
def test_others_is_a_permutation_without_a_fixed_point(count):
    order = others(count, torch.Generator().manual_seed(count))
    assert order.sort().values.tolist() == list(range(count))
    assert (order != torch.arange(count)).all()


def test_masks_of_other_images_are_the_density_masks_of_the_batch_moved_by_one():
    variant = find_variant("small_conv_net", "share_others")
    model = build_network("small_conv_net", 10, width=4)
    vjp = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    maker = variant.criterion(model).evidence.mask
    from sib_fast.masks import DensityMask

    own = DensityMask(window_size=7)(vjp)
    assert torch.equal(maker(vjp)[1:], own[:-1])
    assert torch.equal(maker(vjp)[0], own[-1])


def test_random_masks_are_fixed_per_image_have_the_size_of_another_and_no_place():
    data = EmbeddedDigits("train", 64, seed=1)
    first, again = (find_variant("small_conv_net", "share_random").training_set(data) for _ in range(2))
    assert torch.equal(first.masks, again.masks)
    assert not torch.equal(first.masks, data.masks)
    assert torch.equal(data.masks, EmbeddedDigits("train", 64, seed=1).masks)  # the data itself keeps its own
    areas = [m.flatten(1).sum(1).sort().values for m in (first.masks, data.masks)]
    assert torch.equal(*areas)
    assert not torch.equal(first.masks, random_masks(data.masks, seed=2))
    # of 64 masks all over the torus the mean is flat; that of the true ones is a hill
    assert first.masks.float().mean(0).std() < 0.5 * data.masks.float().mean(0).std()
    assert torch.equal(first.images, data.images)


def test_the_centre_is_a_fifth_of_the_image_and_in_its_middle():
    for size in (32, 64):
        mask = centred(size)
        assert mask.mean().item() == pytest.approx(0.2, abs=0.02)
        assert torch.equal(mask, mask.flip(1))
        assert torch.equal(mask, mask.flip(2))
    data = find_variant("small_conv_net", "share_centre").training_set(EmbeddedDigits("train", 4, seed=0))
    assert torch.equal(data[3][2], centred(32).bool())


def test_cutout_blanks_one_square_anew_at_every_look_and_repeats_with_the_seed():
    data = EmbeddedDigits("train", 8, seed=0)
    variant = find_variant("small_conv_net", "cutout:side=12")
    sets = [variant.training_set(data) for _ in range(2)]
    looks = [[torch.stack([s[i][0] for i in range(8)]) for _ in range(2)] for s in sets]
    assert torch.equal(looks[0][0], looks[1][0])
    assert torch.equal(looks[0][1], looks[1][1])
    assert not torch.equal(looks[0][0], looks[0][1])
    blank = (looks[0][0] == 0).all(1)
    assert blank.flatten(1).sum(1).tolist() == [144] * 8
    assert torch.equal(torch.where(blank[:, None], data.images, looks[0][0]), data.images)


def test_cam_entropy_is_1_for_a_constant_map_0_for_one_cell_and_has_a_gradient_at_zero_cells():
    maps = torch.zeros(3, 1, 4, 4)
    maps[0], maps[1, 0, 2, 1], maps[2, 0, 0, :2] = 2.0, 5.0, 1.0
    maps.requires_grad_()
    value = cam_entropy(maps)
    assert value.tolist() == pytest.approx([1.0, 0.0, 0.25], abs=1e-6)  # log 2 / log 16
    value.sum().backward()
    assert torch.isfinite(maps.grad).all()


# ---- data ---------------------------------------------------------------------------------------------------------------


def test_an_object_on_its_own_background_is_the_image_and_size_and_contrast_do_what_they_say():
    data = EmbeddedDigits("test", 40, seed=3)
    assert torch.equal(data.on(data.backgrounds(40)), data.images)
    moved = data.on(data.backgrounds(40).flip(0))
    outside = (~data.masks).expand_as(moved)
    assert torch.equal(moved[outside], data.backgrounds(40).flip(0)[outside])
    small, large = (EmbeddedDigits("test", 200, seed=3, object_share=s) for s in ((0.3, 0.44), (1.0, 1.0)))
    assert small.masks.double().mean().item() == pytest.approx(0.05, abs=0.006)
    assert large.masks.double().mean().item() == pytest.approx(0.38, abs=0.02)
    faint = EmbeddedDigits("test", 40, seed=3, contrast=0.4)
    assert torch.equal(faint.masks, data.masks)
    difference = [(d.images - d.backgrounds(40)).abs().sum() for d in (faint, data)]
    assert difference[0].item() == pytest.approx(0.4 * difference[1].item(), rel=1e-4)
    for bad in ({"object_share": (0.5, 0.4)}, {"object_share": (0.0, 0.4)}, {"contrast": 0.0}, {"contrast": 1.5}):
        with pytest.raises(ValueError, match=f"EmbeddedDigits: {next(iter(bad))} must be"):
            EmbeddedDigits("test", 1, **bad)


def test_what_the_earlier_studys_page_says_of_a_constant_map():
    """The page of the first study says what a map scores that knows nothing, on its own data."""
    from sib_fast.explain.metrics import EnergyPointingGame

    energy = EnergyPointingGame()
    for seed in range(100, 105):
        train, test = EmbeddedDigits("train", 512, seed=seed), EmbeddedDigits("test", 500, correlation=0.0, seed=seed)
        energy.update(train.masks.float().mean(0).expand(500, -1, -1, -1), test.masks)
    assert f"scores {energy.compute():.3f}" in (ROOT / "docs/study/README.md").read_text()


# ---- measures -----------------------------------------------------------------------------------------------------------


def test_evidence_measures_on_a_map_whose_answers_are_known():
    evidence = torch.tensor([[3.0, 1.0], [-2.0, -2.0]]).expand(2, 1, 2, 2)
    masks = torch.zeros(2, 1, 8, 8, dtype=torch.bool)
    masks[:, :, 1, 1] = True  # one pixel makes the first cell an object's
    found = measures.evidence_measures(evidence, masks)
    assert found == {
        "positive_outside": pytest.approx(1 / 4),
        "negative_outside": pytest.approx(1.0),
        "negative_background": pytest.approx(4 / 8),
        "negative_images": 2,
        "effective_area": pytest.approx(16 / (4 * 10)),
        "cells": 4,
    }
    nothing = measures.evidence_measures(evidence.abs(), masks)
    assert (nothing["negative_background"], nothing["negative_images"]) == (0.0, 0)
    assert math.isnan(nothing["negative_outside"])


class ByPatch(torch.nn.Module):
    """The logit of class 0 is the mean of the image's upper left quarter, that of class 1 the mean of the rest."""

    def __init__(self):
        super().__init__()
        self.features = torch.nn.Identity()

    def forward(self, x):
        x = self.features(x)
        half = x.shape[-1] // 2
        quarter = x[..., :half, :half].mean((1, 2, 3))
        return 9 * torch.stack([quarter, (4 * x.mean((1, 2, 3)) - quarter) / 3], 1)


def test_occlusion_lies_where_the_logit_comes_from_and_a_constant_map_is_the_mask():
    x, y = torch.ones(3, 3, 32, 32), torch.zeros(3, dtype=torch.int64)
    mean_mask = torch.rand(1, 32, 32, generator=torch.Generator().manual_seed(0))
    maps = measures.maps_of(ByPatch(), "small_conv_net", x, y, "occlusion", mean_mask)
    assert maps.shape == (3, 1, 32, 32)
    assert (maps[..., :12, :12] > 0).all()
    assert maps[..., 20:, :].abs().max() < 1e-6
    constant = measures.maps_of(ByPatch(), "small_conv_net", x, y, "constant", mean_mask)
    assert torch.equal(constant[2], mean_mask)


def test_the_evidence_map_is_gradient_times_features_of_the_true_classs_logit():
    torch.manual_seed(0)
    model = build_network("small_conv_net", 10, width=4).eval()
    x, y = images()
    found = measures.evidence_map(model, x, y)
    # pooling and a linear layer above: the gradient is the class's weights over the number of cells
    features = model.features(x)
    expected = (model.classifier.weight[y][:, :, None, None] * features).sum(1, keepdim=True) / 64
    torch.testing.assert_close(found, expected)
    assert not model.features._forward_hooks


def test_background_measures_tell_a_network_of_backgrounds_from_one_of_nothing():
    data = EmbeddedDigits("test", 30, seed=0)

    class ByCorner(torch.nn.Module):
        def forward(self, x):
            return torch.nn.functional.one_hot((x[:, :, :2, :2].mean((1, 2, 3)) > 0).long(), 2) * 20.0

    found = measures.background_measures(ByCorner(), data, 30)
    corner = data.backgrounds(30)[:, :, :2, :2].mean((1, 2, 3)) > 0
    order = others(30, torch.Generator().manual_seed(0))
    assert (~data.masks[:, :, :2, :2]).all()  # or the object would be in the corner
    assert found["erase_changed"] == found["erase_distance"] == 0
    assert found["swap_changed"] == pytest.approx((corner != corner[order]).double().mean().item())
    assert found["swap_distance"] == pytest.approx(found["swap_changed"], abs=1e-6)


# ---- statistics and report ----------------------------------------------------------------------------------------------


def test_holm_by_hand():
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.5, math.nan, 0.6]) == pytest.approx([1.0, math.nan, 1.0], nan_ok=True)
    assert holm([]) == []


def made_up(out, seeds=(200, 201, 202, 203)):
    """A study in which share and area are both better than plain, and share moves energy more."""
    protocol = PROTOCOLS["evidence"]
    shifts = {"plain": 0.0, "sib": 0.05, "unmasked": 0.02, "area": 0.2, "share": 0.3}
    (out / "results").mkdir(parents=True)
    planned = []
    for variant, shift in shifts.items():
        for seed in seeds:
            luck = 0.03 * math.sin(7.0 * seed) + (0.002 * math.cos(seed) if variant == "share" else 0.0)
            scores = {m: {"energy": 0.3 + luck + shift, "insertion": 0.5, "deletion": 0.2} for m in protocol.methods}
            scores |= {"grad_cam": {"energy": 0.5 + shift}, "constant": {"energy": 0.44}}
            document = {
                "arch": "small_conv_net",
                "variant": variant,
                "seed": seed,
                "accuracy": {"in_distribution": 0.9 + luck / 10, "shifted": 0.6 + luck + shift / 3},
                "explanations": scores,
                "evidence": {"negative_background": 0.1 + luck},
                "background": {"swap_changed": 0.2 - shift / 2 + luck},
            }
            planned.append(["small_conv_net", variant, seed])
            (out / "results" / f"small_conv_net.{variant}.seed{seed}.json").write_text(json.dumps(document))
    study = {
        "settings": {"image_size": 32},
        "variants": {v: v for v in shifts},
        "architectures": {"small_conv_net": "net"},
        "environment": {},
        "status": "complete",
        "planned": planned,
        "baseline": "plain",
        "protocol": "evidence",
    }
    (out / "study.json").write_text(json.dumps(study))
    return load_study(out)


def test_the_report_of_evidence_terms_judges_the_primary_comparison_and_corrects_the_rest(tmp_path):
    made = made_up(tmp_path / "s")
    assert (made.headline, made.control) == ("share", "area")
    parts = {part.quantity: (part, p) for part, p in primary(made, "share", "area")}
    assert set(parts) == {SHIFTED, explanation("mean_not_optimised", "energy")}
    part, corrected = parts[explanation("mean_not_optimised", "energy")]
    assert part.mean == pytest.approx(0.1, abs=2e-3)
    assert part.p <= corrected <= 2 * part.p
    found = secondary(made, "small_conv_net", "share", "area")
    assert Quantity("background", "", "swap_changed") in found
    assert min(found.values()) >= min(p for p in found.values())
    said = {v.expectation: v.verdict for v in verdicts(made, "small_conv_net")}
    assert said["share over plain: Energy inside, mean of five not optimised, ≥ +0.15"] == "met"
    assert said["area over sib: Accuracy, shifted, ≥ +0.02"] == "met"
    write_report(made)
    page = (tmp_path / "s" / "report.html").read_text()
    for words in ("The primary comparison", "p, Holm", "at the map that the terms act on", PROTOCOLS["evidence"].title):
        assert words in page
    text = markdown(made)
    row = next(line for line in text.splitlines() if line.startswith("| constant map: the mean training mask |"))
    assert set(row.split("|")[3:-1]) == {" 0.440 ± 0.000 "}


# ---- selection and plan -------------------------------------------------------------------------------------------------


def test_the_rule_takes_the_highest_energy_near_the_best_accuracy_and_keeps_the_default_in_a_tie():
    candidates = {"a": (0.80, 0.5), "a:x=1": (0.795, 0.6), "a:x=2": (0.78, 0.9)}
    assert selection.choose(candidates, "a") == "a:x=1"
    assert selection.choose(candidates | {"a": (0.80, 0.595)}, "a") == "a"
    assert selection.choose(candidates | {"a": (0.70, 0.595)}, "a") == "a:x=1"
    assert selection.choose(candidates, None) == "a:x=1"


def test_a_plan_is_announced_whole_and_goes_on_where_it_was_stopped(tmp_path, monkeypatch, capsys):
    path, out = tmp_path / "plan.json", tmp_path / "out"
    stages = [
        {"out": "one", "variants": ["plain"], "seeds": [0]},
        {"out": "two", "variants": ["plain"], "seeds": [0], "contrast": 0.5},
        {"out": "one", "variants": ["plain", "feature_norm"], "seeds": [0, 1]},
    ]
    path.write_text(json.dumps({"common": TINY, "stages": stages}))
    trained = []
    genuine = run._run_task

    def stopped_at_the_second(task, settings, folder, tell):
        if len(trained) == 1:
            raise KeyboardInterrupt
        trained.append((folder.name, *task))
        return genuine(task, settings, folder, tell)

    monkeypatch.setattr(run, "_run_task", stopped_at_the_second)
    command = ["study", "--plan", str(path), "--out", str(out), "--jobs", "1", "--no-progress"]
    assert cli.main(command) == 130
    assert [t[0] for t in trained] == ["one"]
    study = load_study(out / "one")
    assert len(study.missing) == 3  # of a stage that has not begun
    assert load_study(out / "two").status == "interrupted"

    def counted(task, settings, folder, tell):
        trained.append((folder.name, *task))
        return genuine(task, settings, folder, tell)

    monkeypatch.setattr(run, "_run_task", counted)
    assert cli.main(command) == 0
    assert [(t[0], t[2], t[3]) for t in trained] == [
        ("one", "plain", 0),
        ("two", "plain", 0),
        ("one", "feature_norm", 0),
        ("one", "plain", 1),
        ("one", "feature_norm", 1),
    ]
    assert load_study(out / "one").missing == []
    assert json.loads((out / "two" / "study.json").read_text())["settings"]["contrast"] == 0.5
    assert f"--plan {path}" in study.command
    record = json.loads((out / "one/results/small_conv_net.plain.seed1.json").read_text())
    assert set(record["explanations"]) == {"saliency", "constant"}
    assert "randomisation" not in record["explanations"]["saliency"]
    assert {"negative_background", "swap_changed"} <= record["evidence"].keys() | record["background"].keys()
    before = len(trained)
    assert cli.main(command) == 0
    assert len(trained) == before
    assert cli.main([*command, "--seeds", "3"]) == 2
    assert "study: plan must stand alone" in capsys.readouterr().err


def test_a_stage_that_fails_does_not_keep_the_others_from_being_trained(tmp_path, monkeypatch):
    path = tmp_path / "plan.json"
    stages = [{"out": name, "variants": ["plain"], "seeds": [0]} for name in ("one", "two")]
    path.write_text(json.dumps({"common": TINY, "stages": stages}))
    ran = []

    def failing(config, console=None, part_of=None):
        ran.append(config.out.name)
        if config.out.name == "one":
            raise ValueError("broken")

    monkeypatch.setattr(run, "run", failing)
    with pytest.raises(ValueError, match="broken"):
        plan.run_plan(path, tmp_path / "out")
    assert ran == ["one", "two"]


@pytest.mark.parametrize(
    ("document", "words"),
    [
        ("{", "must hold stages"),
        ({"stages": []}, "no stage"),
        ({"stages": [{"variants": ["plain"]}]}, "'out'"),
        ({"stages": [{"out": "a", "colour": 1}]}, "colour"),
        ({"stages": [{"out": "a", "epochs": 1}, {"out": "a", "epochs": 2}]}, "must have one epochs for a folder"),
    ],
)
def test_a_plan_that_is_none_is_refused(tmp_path, document, words):
    path = tmp_path / "plan.json"
    path.write_text(document if isinstance(document, str) else json.dumps(document))
    with pytest.raises(ValueError, match=words):
        plan.read_plan(path, tmp_path)


@pytest.mark.parametrize("name", ["plan", "selection"])
def test_the_published_plans_hold_what_the_protocol_promises(name):
    stages = plan.read_plan(ROOT / f"docs/study-evidence/{name}.json", Path("runs"))
    assert all(stage.protocol == "evidence" for stage in stages)
    seeds = {seed for stage in stages for seed in stage.seeds}
    planned = plan.networks(stages)
    if name == "selection":
        assert max(seeds) < 5
    else:
        assert min(seeds) >= 200
        seven = ("plain", "sib", "unmasked", "area", "share", "sib_area", "sib_share")
        for arch in ("small_conv_net", "small_resnet"):
            for variant in seven:
                assert [t[2] for t in planned[Path("runs/main")] if t[:2] == (arch, variant)] == list(range(200, 210))
        # every variant of a seed stands before the next seed's
        first = planned[Path("runs/main")][: 2 * len(seven) * 3]
        assert [t[2] for t in first] == sorted(t[2] for t in first)


def test_a_folder_from_before_the_new_settings_goes_on(tmp_path):
    config = StudyConfig(**TINY | {"out": tmp_path, "variants": ("plain",), "seeds": (0,)})
    old = {k: v for k, v in config.settings().items() if k not in ("object_share", "contrast")}
    (tmp_path / "study.json").write_text(json.dumps({"settings": old, "planned": []}))
    run.announce(config, config.planned(), "sib-fast study")
    other = StudyConfig(**TINY | {"out": tmp_path, "variants": ("plain",), "seeds": (0,), "contrast": 0.5})
    with pytest.raises(ValueError, match="contrast must be 1"):
        run.announce(other, other.planned(), "sib-fast study")
