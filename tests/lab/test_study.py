"""A study in a few steps: its files, what a variant trains with, interruption and continuation, options."""

import io
import json

import pytest
import torch

pytest.importorskip("lightning")
pytest.importorskip("captum")
from rich.console import Console

from sib_fast import SIBLoss
from sib_fast.explain import explain
from sib_fast.explain.controls import insertion_deletion
from sib_fast.explain.metrics import EnergyPointingGame
from sib_fast.lab.data import EmbeddedDigits
from sib_fast.lab.evaluate import accuracy, gradient_map
from sib_fast.lab.networks import load_network
from sib_fast.lab.study import network, run, timing
from sib_fast.lab.study.records import file_stem
from sib_fast.lab.study.run import StudyConfig
from sib_fast.lab.study.variants import ARCHITECTURES, LABELS, find_variant, variants

TINY = {
    "architectures": ("small_conv_net",),
    "variants": ("plain", "sib", "true_mask"),
    "seeds": (0, 1),
    "epochs": 2,
    "batch_size": 16,
    "width": 4,
    "train_size": 32,
    "test_size": 24,
    "explained": 10,
    "methods": ("saliency", "grad_cam"),
    "jobs": 1,
    "progress": False,
}


def study(out, **changes) -> str:
    """Run it; what it printed."""
    console = Console(file=io.StringIO(), width=200, highlight=False)
    run.run(StudyConfig(**TINY | changes | {"out": out}), console)
    return console.file.getvalue()


def records(out) -> dict[str, dict]:
    return {path.stem: json.loads(path.read_text()) for path in sorted((out / "results").glob("*.json"))}


def without_clock(found: dict[str, dict]) -> dict[str, dict]:
    return {k: {n: v for n, v in r.items() if n not in ("train_seconds", "evaluate_seconds")} for k, r in found.items()}


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    out = tmp_path_factory.mktemp("study")
    return out, study(out, timing_steps=1)


def test_a_study_leaves_every_network_its_record_and_a_report(finished):
    out, printed = finished
    stems = {f"small_conv_net.{variant}.seed{seed}" for variant in TINY["variants"] for seed in (0, 1)}
    assert set(records(out)) == stems
    assert {p.stem for p in (out / "networks").iterdir()} == stems
    for stem in stems:
        assert (out / "logs" / stem / "metrics.csv").is_file()
    document = json.loads((out / "study.json").read_text())
    assert document["status"] == "complete"
    assert list(document["variants"]) == ["plain", "sib", "true_mask"]
    assert (out / "report.html").is_file()
    assert "naive head" in printed
    assert str(out / "report.html") in printed


def test_scores_can_be_computed_again_from_the_files(finished):
    out, _ = finished
    for record in records(out).values():
        spec, model = load_network(out / record["weights"])
        data = EmbeddedDigits("test", 24, correlation=0.0, seed=record["seed"])
        same = EmbeddedDigits("test", 24, correlation=0.4, seed=record["seed"])
        assert record["accuracy"] == {"in_distribution": accuracy(model, same), "shifted": accuracy(model, data)}
        images, labels, masks = data.images[:10], data.labels[:10], data.masks[:10]
        assert record["mask_area"] == masks.double().mean().item()
        energy = EnergyPointingGame()
        energy.update(gradient_map(model, images), masks)
        assert record["vjp"]["energy"] == pytest.approx(float(energy.compute()))
        maps = explain(model, images, labels, "grad_cam")
        energy = EnergyPointingGame()
        energy.update(maps, masks)
        found = record["explanations"]["grad_cam"]
        if energy.defined:
            assert found["energy"] == pytest.approx(float(energy.compute()))
        assert found["undefined"] == energy.undefined
        insertion, deletion = insertion_deletion(model, images[:2], labels[:2], maps[:2])
        assert (found["insertion"], found["deletion"]) == (
            pytest.approx(float(insertion.mean())),
            pytest.approx(float(deletion.mean())),
        )
        assert spec.denormalise(spec.normalise(torch.full((3, 1, 1), 0.3))).flatten().tolist() == pytest.approx([0.3] * 3)


@pytest.mark.long
def test_two_processes_compute_the_bits_of_one(finished, tmp_path):
    study(tmp_path, jobs=2, seeds=(1,))
    ours, alone = without_clock(records(tmp_path)), without_clock(records(finished[0]))
    assert ours == {stem: alone[stem] for stem in ours}
    assert len(ours) == 3


def test_an_interrupted_study_reports_and_goes_on(finished, tmp_path, monkeypatch):
    real, started = network.run_network, []

    def interrupted(arch, variant, seed, settings, out):
        started.append((variant.name, seed))
        if len(started) == 3:
            raise KeyboardInterrupt
        return real(arch, variant, seed, settings, out)

    monkeypatch.setattr(network, "run_network", interrupted)
    with pytest.raises(KeyboardInterrupt):
        study(tmp_path)
    assert json.loads((tmp_path / "study.json").read_text())["status"] == "interrupted"
    assert len(records(tmp_path)) == 2
    assert (tmp_path / "report.html").is_file()
    printed = study(tmp_path)
    assert "2 of 6 networks are there already" in printed
    assert started[3:] == [("true_mask", 0), ("plain", 1), ("sib", 1), ("true_mask", 1)]
    assert without_clock(records(tmp_path)) == without_clock(records(finished[0]))


def test_other_settings_do_not_mix_with_an_earlier_run(finished):
    out, _ = finished
    before = records(out)
    with pytest.raises(ValueError, match=r"study: epochs must be 2 as in the earlier run in .*, got 3; take another folder"):
        study(out, epochs=3)
    assert records(out) == before


@pytest.mark.long
def test_a_later_run_may_add_seeds(finished, tmp_path):
    study(tmp_path, seeds=(0,), variants=("plain",))
    study(tmp_path, seeds=(1,), variants=("plain",))
    study(tmp_path, seeds=(0,), variants=("plain",))
    document = json.loads((tmp_path / "study.json").read_text())
    assert document["planned"] == [["small_conv_net", "plain", 0], ["small_conv_net", "plain", 1]]
    commands = document["command"].split(" && ")
    assert len(commands) == 2  # the third run repeated the first
    assert "--seeds 0 " in commands[0]
    assert "--seeds 1 " in commands[1]


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_variants_differ_in_what_they_say(arch):
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(12, 3))
    made = variants(arch)
    assert list(made) == list(LABELS)
    assert isinstance(made["plain"].criterion(model), torch.nn.CrossEntropyLoss)
    criteria = {name: v.criterion(torch.nn.Sequential(*model)) for name, v in made.items() if name != "plain"}
    sib = criteria["sib"]
    assert all(isinstance(c, SIBLoss) for c in criteria.values())
    assert (criteria["foreground_only"].lambda_bg, criteria["background_only"].lambda_fg) == (0.0, 0.0)
    assert (criteria["background_only"].lambda_bg, sib.lambda_fg) == (sib.lambda_bg, 1.0)
    assert criteria["unmasked"].lambda_fg == 0.0
    vjp = torch.randn(2, 3, 4, 4)
    assert not criteria["unmasked"].mask(vjp).any()
    assert criteria["lazy_sum"].every == criteria["lazy_mean"].every == 4
    assert criteria["sib_relative"].background is not sib.background
    assert [name for name, v in made.items() if v.mask == "true"] == ["true_mask"]
    assert [name for name, v in made.items() if v.precision != "32-true"] == ["sib_bf16"]
    for name in ("lazy_sum", "lazy_mean", "true_mask", "sib_bf16"):
        assert (criteria[name].lambda_fg, criteria[name].lambda_bg) == (sib.lambda_fg, sib.lambda_bg), name


def test_a_variant_with_another_weight():
    variant = find_variant("small_resnet", "sib:lambda_bg=3e5,lambda_fg=2")
    assert (variant.sib["lambda_bg"], variant.sib["lambda_fg"]) == (3e5, 2.0)
    assert variant.name == "sib:lambda_bg=3e5,lambda_fg=2"
    assert file_stem("small_resnet", variant.name, 3) == "small_resnet.sib@lambda_bg=3e5,lambda_fg=2.seed3"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"variants": ("lasso",)}, "variants must be among plain, sib, .*, got 'lasso'"),
        ({"variants": ("sib:lambda_bg=much",)}, "variants must have lambda_fg=<number> or lambda_bg=<number> after the colon"),
        ({"variants": ("plain:lambda_bg=1",)}, "variants must not override the settings of plain"),
        ({"variants": ("sib", "sib")}, "variants must be distinct"),
        ({"architectures": ("resnet18",)}, "architectures must be distinct and among small_conv_net, small_resnet, got resnet18"),
        ({"methods": ("saliency", "lime")}, "methods must be distinct and among saliency"),
        ({"seeds": (1, 1)}, "seeds must be distinct and not negative"),
        ({"epochs": 0}, "epochs must be at least 1, got 0"),
        ({"batch_size": 1}, r"batch_size must lie in \[2, 32\], got 1"),
        ({"explained": 25}, "explained must not exceed test_size 24, got 25"),
        ({"image_size": 8}, "image_size must be at least 16, got 8"),
        ({"correlation": 1.5}, r"correlation must be in \[0, 1\], got 1.5"),
        ({"lr": float("nan")}, "lr must be positive and finite, got nan"),
        ({"weight_decay": -1.0}, "weight_decay must be finite and not negative"),
        ({"timing_steps": -1}, "timing_steps must not be negative, got -1"),
    ],
)
def test_a_bad_option_is_named(changes, message):
    with pytest.raises(ValueError, match=message):
        StudyConfig(**TINY | changes)


def test_the_command_is_the_configuration():
    config = StudyConfig(**TINY)
    assert config.command().startswith("sib-fast study --architectures small_conv_net --variants plain sib true_mask --seeds 0 1")
    assert StudyConfig().command() == "sib-fast study"


def test_timing_times_every_kind():
    settings = StudyConfig(**TINY).settings()
    seconds = timing.time_steps("small_resnet", settings, 2)
    assert list(seconds) == list(timing.LABELS)
    assert all(value > 0 for value in seconds.values())
