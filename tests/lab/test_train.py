"""Training one network: what lands in the folder, resuming after a kill, averaging, several processes, options."""

import argparse
import contextlib
import csv
import dataclasses
import errno
import inspect
import io
import json
import math
import os
import pickle
import shutil
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("lightning")
pytest.importorskip("torchvision")
pytest.importorskip("tensorboard")
from rich.console import Console

from sib_fast import SIBLoss
from sib_fast.lab import recipe, train
from sib_fast.lab.config import EvidenceOptions
from sib_fast.lab.data import EmbeddedDigits
from sib_fast.lab.models import SmallConvNet
from sib_fast.lab.networks import load_network
from sib_fast.lab.train import SIBOptions, TrainConfig, add_arguments, main, run, settings

TINY = {
    "arch": "small_conv_net",
    "width": 4,
    "image_size": 32,
    "epochs": 2,
    "batch_size": 8,
    "train_size": 24,
    "test_size": 13,
    "seed": 1,
    "threads": 1,
    "device": "cpu",
    "progress": False,
}
SIB = SIBOptions(lambda_fg=1.0, lambda_bg=1e5, window_size=7, objective="expm1")


def quiet_console() -> Console:
    return Console(file=io.StringIO(), width=200, highlight=False)


def train_one(out, *, resume=False, **options):
    return run(TrainConfig(**TINY | {"sib": SIB} | options, out=out), resume=resume, console=quiet_console())


def read_log(out) -> list[dict[str, str]]:
    with (out / recipe.LOG).open() as file:
        return list(csv.DictReader(file))


def weights(path) -> dict[str, torch.Tensor]:
    return load_network(path)[1].state_dict()


def assert_same_network(first, second):
    first, second = weights(first), weights(second)
    assert first.keys() == second.keys()
    assert [name for name in first if not torch.equal(first[name], second[name])] == []


def accuracy_of(path, config: TrainConfig) -> float:
    model, data = load_network(path)[1], config.open("test")
    return sum(
        int(model(image[None]).argmax()) == int(label) for image, label, _ in map(data.__getitem__, range(len(data)))
    ) / len(data)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    out = tmp_path_factory.mktemp("train") / "run"
    console = quiet_console()
    spec = run(TrainConfig(**TINY, sib=SIB, out=out), console=console)
    return out, spec, console.file.getvalue()


@pytest.fixture(scope="module")
def image_folder(tmp_path_factory):
    """Two classes of noise images, one brighter."""
    from PIL import Image

    root, generator = tmp_path_factory.mktemp("images"), torch.Generator().manual_seed(0)
    for split, count in (("train", 9), ("val", 4)):
        for k, name in enumerate(("dark", "light")):
            folder = root / split / name
            folder.mkdir(parents=True)
            for i in range(count):
                pixels = torch.randint(0, 128, (40, 44, 3), generator=generator, dtype=torch.uint8) + 127 * k
                Image.fromarray(pixels.to(torch.uint8).numpy()).save(folder / f"{i}.png")
    return root


# ---- what a run leaves ----------------------------------------------------------------------------------------------


def test_a_run_leaves_exactly_the_promised_files(finished):
    out, _, printed = finished
    files = {str(p.relative_to(out)) for p in out.rglob("*") if p.is_file()}
    events = {name for name in files if "tfevents" in name}
    assert len(events) == 1
    expected = {"network.pt", "best.pt", "settings.json", "checkpoints/last.ckpt", "logs/metrics.csv"}
    assert files - events == expected | {"logs/tensorboard/hparams.yaml"}
    assert str(out / "network.pt") in printed
    assert f"validation accuracy {accuracy_of(out / 'network.pt', TrainConfig(**TINY)):.4f}" in printed


def test_a_run_says_how_much_the_background_term_weighed(finished, tmp_path):
    out, _, printed = finished
    row = read_log(out)[-1]
    share = SIB.lambda_bg * float(row["background"]) / float(row["base"])
    assert f"lambda_bg x background was {share:.2g} of the base loss in the last epoch; docs/weights.md aims" in printed
    for sib in (None, dataclasses.replace(SIB, lambda_bg=0.0)):
        console = quiet_console()
        run(TrainConfig(**TINY | {"epochs": 1, "sib": sib}, out=tmp_path / str(sib is None)), console=console)
        assert "validation accuracy" in console.file.getvalue()
        assert "lambda_bg" not in console.file.getvalue()


def test_a_warning_of_the_criterion_is_said_once(tmp_path):
    with pytest.warns(UserWarning, match="fewer than 7×7") as said:
        train_one(tmp_path, term=EvidenceOptions("area"), sib=None, image_size=16, epochs=1)
    assert len([w for w in said if "fewer than 7×7" in str(w.message)]) == 1


def test_the_network_file_says_how_it_was_trained_and_is_what_was_validated(finished):
    out, spec, _ = finished
    loaded, _ = load_network(out / "network.pt")
    assert loaded == spec
    assert (loaded.arch, loaded.options, loaded.image_size) == ("small_conv_net", {"width": 4}, 32)
    assert loaded.classes == tuple("0123456789")
    assert (loaded.mean, loaded.std) == ((0.5,) * 3, (0.25,) * 3)
    assert (loaded.training["method"], loaded.training["lambda_bg"], loaded.training["epoch"]) == ("sib", 1e5, 1)
    log = read_log(out)
    assert (
        float(log[-1]["val_accuracy"]) == loaded.training["val_accuracy"] == accuracy_of(out / "network.pt", TrainConfig(**TINY))
    )
    best = max(log, key=lambda row: float(row["val_accuracy"]))
    assert load_network(out / "best.pt")[0].training["epoch"] == int(best["epoch"])
    assert accuracy_of(out / "best.pt", TrainConfig(**TINY)) == float(best["val_accuracy"])


def test_every_term_is_logged_and_the_terms_make_up_the_loss(finished):
    log = read_log(finished[0])
    assert [(int(row["epoch"]), int(row["step"])) for row in log] == [(0, 3), (1, 6)]
    for row in log:
        assert row.keys() >= {"mask_area", "train_accuracy", "val_loss", "val_accuracy", "lr"}
        value = {name: float(text) for name, text in row.items()}
        terms = SIB.lambda_bg * math.expm1(value["background"]) + SIB.lambda_fg * math.expm1(-value["foreground"])
        assert value["loss"] == pytest.approx(value["base"] + terms, rel=1e-3)
        assert (value["train_accuracy"] * 24) % 1 == 0
        assert (value["val_accuracy"] * 13) % 1 == 0


def tensorboard_scalars(out) -> dict[str, list[tuple[int, float]]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(out / "logs" / "tensorboard")).Reload()
    return {name: [(e.step, e.value) for e in events.Scalars(name)] for name in events.Tags()["scalars"]}


def assert_tensorboard_has_the_csv(out):
    log, scalars = read_log(out), tensorboard_scalars(out)
    assert scalars.keys() == log[0].keys() - {"step"}
    for name, points in scalars.items():
        assert points == [(int(row["step"]), pytest.approx(float(row[name]), rel=1e-6)) for row in log if row[name]]


def test_tensorboard_has_the_same_log(finished):
    assert_tensorboard_has_the_csv(finished[0])


def test_weights_zero_train_as_plain_training_bit_for_bit(tmp_path):
    zero = dataclasses.replace(SIB, lambda_fg=0.0, lambda_bg=0.0, prepare=False)
    for name, sib in (("plain", None), ("zero", zero), ("sib", SIB)):
        train_one(tmp_path / name, sib=sib, epochs=1)
    assert_same_network(tmp_path / "plain" / "network.pt", tmp_path / "zero" / "network.pt")
    with pytest.raises(AssertionError):
        assert_same_network(tmp_path / "sib" / "network.pt", tmp_path / "zero" / "network.pt")


def test_true_masks_are_the_masks_of_the_data(tmp_path):
    options = {"epochs": 1, "train_size": 8, "test_size": 2}
    train_one(tmp_path, true_masks=True, **options)
    masks = EmbeddedDigits("train", 8, seed=TINY["seed"]).masks
    assert float(read_log(tmp_path)[0]["mask_area"]) == pytest.approx(masks.float().mean().item(), rel=1e-6)


def test_true_masks_of_a_set_without_any_are_refused(image_folder, tmp_path):
    options = {"data": "folder", "root": image_folder, "epochs": 1, "train_size": 512, "test_size": 1000, "correlation": 0.4}
    with pytest.raises(
        ValueError, match=r"true_masks must come with data that has masks, got data 'folder'; your own belong in .*masks/t"
    ):
        train_one(tmp_path, true_masks=True, **options)
    assert not list(tmp_path.iterdir())


def test_the_masks_of_a_folder_reach_the_loss(image_folder, tmp_path):
    from PIL import Image

    root = tmp_path / "images"
    shutil.copytree(image_folder, root)
    inside = torch.zeros(40, 44, dtype=torch.uint8)
    inside[8:28, 10:30] = 255
    for path in (root / "train").rglob("*.png"):
        mask = root / "masks" / path.relative_to(root)
        mask.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(inside.numpy()).save(mask)
    options = {"data": "folder", "root": root, "epochs": 1, "train_size": 512, "test_size": 1000}
    train_one(tmp_path / "out", true_masks=True, **options)
    data = TrainConfig(**TINY | options).open("train")
    assert float(read_log(tmp_path / "out")[0]["mask_area"]) == pytest.approx(data[0][2].float().mean().item(), rel=1e-6)
    # for some of the images: a share has its own masks beside them, and needs the image for those
    for path in list((root / "masks" / "train").rglob("*.png"))[::2]:
        path.unlink()
    for sib in (SIB, None):
        out = tmp_path / f"some-{sib is None}"
        term = EvidenceOptions("share", evidence_window=5)
        console = Console(file=io.StringIO(), width=200)
        config = TrainConfig(**TINY | options | {"progress": True}, out=out, true_masks=True, sib=sib, term=term)
        run(config, console=console)
        assert "(9 with a mask)" in console.file.getvalue()
        assert 0 < float(read_log(out)[0]["share"]) < 1
    with pytest.raises(ValueError, match=r"annotated must be 1 for data whose masks are those of some images, got 0.5 for 9"):
        train_one(tmp_path / "half", true_masks=True, annotated=0.5, **options)


def test_the_progress_bar_counts_epochs_from_one():
    bar = recipe._ProgressBar()
    bar._trainer = SimpleNamespace(max_epochs=3)
    assert [bar._get_train_description(epoch).rstrip() for epoch in range(3)] == ["Epoch 1/3", "Epoch 2/3", "Epoch 3/3"]


def test_a_torchvision_network_on_a_folder_of_images(image_folder, tmp_path):
    options = {"data": "folder", "root": image_folder, "train_size": 512, "test_size": 1000, "batch_size": 18, "epochs": 1}
    spec = train_one(tmp_path, arch="resnet18", width=None, normalise=(0.5, 0.5), schedule="constant", **options)
    assert spec.classes == ("dark", "light")
    assert (spec.mean, spec.std) == ((0.5,) * 3, (0.5,) * 3)
    assert [row["step"] for row in read_log(tmp_path)] == ["1"]
    # the file's normalisation gives the pixels that were validated on
    data = TrainConfig(**TINY | options).open("test")
    _, model = load_network(tmp_path / "network.pt")
    right = [
        int(model(spec.normalise(data.denormalise(image))[None]).argmax()) == int(label) for image, label, _ in data_items(data)
    ]
    assert sum(right) / len(right) == spec.training["val_accuracy"]


def data_items(data):
    return [data[i] for i in range(len(data))]


def test_a_normalisation_of_ones_own_reaches_the_network(image_folder):
    config = TrainConfig(data="folder", root=image_folder, image_size=32, normalise=(0.4, 0.2), augment=True, device="cpu")
    data = config.open("train")
    items = recipe._SeededItems(data, train._spec(config, data), seed=3)
    image, label, _ = items[5, 2]
    assert torch.equal(image, items[5, 2][0])
    assert not torch.equal(image, items[6, 2][0])  # augmentation: another epoch, another crop
    assert int(label) == int(data[2][1])
    pixels = image * 0.2 + 0.4
    assert -1e-6 <= pixels.min() < pixels.max() <= 1 + 1e-6
    torch.testing.assert_close(
        data.denormalise((pixels - torch.tensor(data.mean).view(3, 1, 1)) / torch.tensor(data.std).view(3, 1, 1)), pixels
    )


def test_items_leave_the_random_state_alone(image_folder):
    config = TrainConfig(data="folder", root=image_folder, image_size=32, augment=True, device="cpu")
    data = config.open("train")
    before = torch.get_rng_state()
    recipe._SeededItems(data, train._spec(config, data), seed=3)[0, 1]
    assert torch.equal(before, torch.get_rng_state())


# ---- averaging, accumulation, precision, schedules ------------------------------------------------------------------


def test_the_average_is_what_is_validated_and_saved(tmp_path):
    decay = 0.5
    train_one(tmp_path, ema=decay, epochs=1, batch_size=8, train_size=16, schedule="constant")
    checkpoint = torch.load(tmp_path / recipe.CHECKPOINT, weights_only=True)
    raw, average = checkpoint["current_model_state"], checkpoint["state_dict"]
    saved = weights(tmp_path / "network.pt")
    for name, value in saved.items():
        assert torch.equal(value, average[f"model.{name}"]), name
    assert not torch.equal(saved["classifier.weight"], raw["model.classifier.weight"])
    # after two steps it is decay · first + (1 − decay) · second, and the second is the raw one
    train_one(tmp_path / "one", epochs=1, batch_size=8, train_size=16, schedule="constant")
    assert_close = torch.testing.assert_close
    first = 2 * (saved["classifier.weight"] - (1 - decay) * raw["model.classifier.weight"])
    moved = (raw["model.classifier.weight"] - first).abs().max()
    assert 0 < moved <= 2.5e-3  # one AdamW step of rate 1e-3
    assert_close(weights(tmp_path / "one" / "network.pt")["classifier.weight"], raw["model.classifier.weight"], rtol=0, atol=0)
    config = TrainConfig(**TINY)
    assert float(read_log(tmp_path)[0]["val_accuracy"]) == accuracy_of(tmp_path / "network.pt", config)


def test_accumulated_batches_are_one_step_and_count_as_one(tmp_path, monkeypatch):
    seen = []
    original = SIBLoss.forward

    def forward(self, *arguments, **named):
        if self.training and torch.is_grad_enabled():
            seen.append(self.active)
        return original(self, *arguments, **named)

    monkeypatch.setattr(SIBLoss, "forward", forward)
    # 7 batches of 4: three steps of two, the seventh is left to another epoch
    sib = dataclasses.replace(SIB, every=2)
    train_one(tmp_path, sib=sib, batch_size=4, train_size=28, accumulate=2)
    assert seen[0]  # the rehearsal
    assert seen[1:] == [True, True, False, False, True, True, False, False, True, True, False, False]
    assert [row["step"] for row in read_log(tmp_path)] == ["3", "6"]


def test_bfloat16(tmp_path):
    train_one(tmp_path, precision="bf16-mixed", epochs=1)
    row = read_log(tmp_path)[0]
    assert all(math.isfinite(float(value)) for value in row.values())
    assert weights(tmp_path / "network.pt")["classifier.weight"].dtype == torch.float32


@pytest.mark.parametrize("schedule", train.SCHEDULES)
def test_schedules(schedule):
    warm_up = 1.0 if schedule == "cosine" else 0.0
    config = TrainConfig(schedule=schedule, warm_up_epochs=warm_up, epochs=4, lr=0.1, device="cpu")
    module = recipe.Training(config, SmallConvNet(width=2), config.criterion(), 40, 1)
    chosen = module.configure_optimizers()
    optimiser, rates = chosen["optimizer"], []
    for _ in range(40):
        rates.append(optimiser.param_groups[0]["lr"])
        optimiser.step()
        if "lr_scheduler" in chosen:
            chosen["lr_scheduler"]["scheduler"].step()
    if schedule == "constant":
        assert set(rates) == {0.1}
    elif schedule == "cosine":
        expected = [0.1 * (k + 1) / 10 for k in range(10)] + [0.05 * (1 + math.cos(math.pi * k / 30)) for k in range(30)]
        assert rates == pytest.approx(expected)
    else:
        assert max(rates) == pytest.approx(0.1, rel=0.02)
        assert rates[0] == pytest.approx(0.1 / 25)
        assert rates[-1] < 1e-4


def test_a_part_follows_the_schedule_at_its_own_rate():
    for schedule, peak in (("one_cycle", 0.99), ("cosine", 1.0), ("constant", 1.0)):
        config = TrainConfig(schedule=schedule, epochs=4, lr=0.1, part_lr=("classifier=0.5",), device="cpu")
        chosen = recipe.Training(config, SmallConvNet(width=2), config.criterion(), 40, 1).configure_optimizers()
        optimiser, rates = chosen["optimizer"], []
        for _ in range(40):
            rates.append([group["lr"] for group in optimiser.param_groups])
            optimiser.step()
            if "lr_scheduler" in chosen:
                chosen["lr_scheduler"]["scheduler"].step()
        assert all(part == pytest.approx(5 * rest) for rest, part in rates)
        assert max(part for _, part in rates) >= 0.5 * peak


def test_mixing_reaches_the_loss_and_resumes_to_the_same_bits(tmp_path):
    train_one(tmp_path / "mixed", true_masks=True, mixup=0.4, cutmix=1.0)
    train_one(tmp_path / "plain", true_masks=True)
    with pytest.raises(AssertionError):
        assert_same_network(tmp_path / "mixed" / "network.pt", tmp_path / "plain" / "network.pt")
    train_one(tmp_path / "again", true_masks=True, mixup=0.4, cutmix=1.0)
    assert_same_network(tmp_path / "mixed" / "network.pt", tmp_path / "again" / "network.pt")


def test_random_backgrounds_train_on_other_images(tmp_path):
    """In plain training too, with all masks or some."""
    losses = {}
    for name, options in {
        "plain": {},
        "half": {"random_backgrounds": 0.5},
        "annotated": {"random_backgrounds": 0.5, "annotated": 0.5},
        "nobody": {"random_backgrounds": 1.0, "annotated": 0.0},
    }.items():
        config = TrainConfig(**TINY | {"epochs": 1, "lr": 1e-9}, sib=None, out=tmp_path / name, **options)
        assert TrainConfig.from_flat(json.loads(json.dumps(config.flat()))) == config
        assert main(parse(*words(config))) == 0
        losses[name] = float(read_log(tmp_path / name)[0]["loss"])
    assert losses["plain"] == losses["nobody"]
    assert len(set(losses.values())) == 3


def test_random_backgrounds_go_with_masks_of_the_loss_and_with_mixing(tmp_path):
    train_one(tmp_path, true_masks=True, annotated=0.5, random_backgrounds=0.5, cutmix=1.0, epochs=1)
    assert float(read_log(tmp_path)[0]["mask_area"]) > 0


def test_a_tenth_of_the_masks(tmp_path):
    """At annotated 0 the loss has its own masks, at 1 the data's, and between something else."""
    areas = {}
    for share in (0.0, 0.25, 1.0):
        train_one(tmp_path / str(share), true_masks=True, annotated=share, epochs=1, train_size=8, test_size=2)
        areas[share] = float(read_log(tmp_path / str(share))[0]["mask_area"])
    train_one(tmp_path / "own", epochs=1, train_size=8, test_size=2)
    assert areas[0.0] == float(read_log(tmp_path / "own")[0]["mask_area"])
    true = EmbeddedDigits("train", 8, seed=TINY["seed"]).masks.float().mean().item()
    assert areas[1.0] == pytest.approx(true, rel=1e-6)
    assert areas[0.25] not in (areas[0.0], areas[1.0])


@pytest.mark.parametrize("sib", [None, SIB], ids=["plain", "sib"])
def test_evidence_terms_beside_either_training(tmp_path, sib, capsys):
    """By the command line, with all that a term can be given; the log says what it came to."""
    for name, term, more in (
        ("area", EvidenceOptions("area", evidence_form="absolute", evidence_area=0.2, evidence_at="features.11"), {}),
        ("own", EvidenceOptions("share", evidence_window=5), {}),
        ("given", EvidenceOptions("share", evidence_weight=3.0), {"true_masks": True}),
        ("half", EvidenceOptions("share"), {"true_masks": True, "annotated": 0.5}),
    ):
        config = TrainConfig(**TINY | {"epochs": 1}, sib=sib, term=term, out=tmp_path / name, **more)
        assert TrainConfig.from_flat(json.loads(json.dumps(config.flat()))) == config
        # where every image has a mask, none is made, and the image is not differentiated to
        assert name == "area" or config.criterion().evidence.mask == ("given" if name == "given" else "density")
        assert main(parse(*words(config))) == 0, capsys.readouterr().err
        row = {key: float(value) for key, value in read_log(tmp_path / name)[0].items()}
        value = row["area" if name == "area" else "share"]
        assert 0 < value < 1
        if sib is None and name != "area":  # the area has a hinge, which means of terms do not show
            assert row["loss"] == pytest.approx(row["base"] + term.evidence_weight * value, rel=1e-4)
        assert ("background" in row) == (sib is not None)


def test_an_evidence_term_alone_at_every_other_step(tmp_path):
    """Three steps, of which two have the term; the log is of those two."""
    config = TrainConfig(**TINY | {"epochs": 1}, sib=None, term=EvidenceOptions("share", evidence_every=2), out=tmp_path)
    criterion = config.criterion()
    assert (criterion.every, criterion.every_weight) == (2, "sum")
    assert main(parse(*words(config))) == 0
    assert 0 < float(read_log(tmp_path)[0]["share"]) < 1


def test_annotated_on_the_command_line_says_that_masks_are_used():
    chosen = settings(parse("--annotated", "0.1"))
    assert (chosen.true_masks, chosen.annotated) == (True, 0.1)
    uses = {"": True, "--plain": False, "--plain --evidence area": False, "--plain --evidence share": True}
    for given, of_the_loss in uses.items():
        chosen = settings(parse("--annotated", "0.1", "--random-backgrounds", "0.5", *given.split()))
        assert (chosen.true_masks, chosen.annotated) == (of_the_loss, 0.1)


def test_label_smoothing_reaches_both_losses():
    for sib in (None, SIB):
        criterion = TrainConfig(sib=sib, label_smoothing=0.25, device="cpu").criterion().eval()
        logits, target = torch.tensor([[2.0, -1.0]]), torch.tensor([0])
        assert criterion(logits, target) == torch.nn.functional.cross_entropy(logits, target, label_smoothing=0.25)


# ---- interruption and resumption ------------------------------------------------------------------------------------


def hard_case(image_folder) -> dict:
    """Everything that has a state: dropout, augmentation, an average, a schedule, lazy S-IB, accumulation."""
    return TINY | {
        "data": "folder",
        "root": image_folder,
        "arch": "mobilenet_v3_small",
        "width": None,
        "train_size": 512,
        "test_size": 1000,
        "augment": True,
        "epochs": 3,
        "batch_size": 3,
        "accumulate": 2,
        "schedule": "cosine",
        "warm_up_epochs": 1.0,
        "ema": 0.8,
        "sib": dataclasses.replace(SIB, every=2),
    }


def test_a_killed_run_resumes_to_the_bits_of_one_that_was_not(image_folder, tmp_path):
    options = hard_case(image_folder)
    train_one(tmp_path / "whole", **options)

    out = tmp_path / "killed"
    flat = TrainConfig(**options | {"out": out}).flat()
    code = (
        "import os, signal\n"
        "from sib_fast.lab import recipe, train\n"
        "original = recipe.Training.training_step\n"
        "def training_step(self, batch, index):\n"
        "    if (self.current_epoch, index) == (1, 3): os.kill(os.getpid(), signal.SIGKILL)\n"
        "    return original(self, batch, index)\n"
        "recipe.Training.training_step = training_step\n"
        f"train.run(train.TrainConfig.from_flat({flat!r}))"
    )
    killed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=900)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert killed.stderr == ""
    assert len(read_log(out)) == 1
    (out / "checkpoints" / ".last.ckpt.1.partial").write_bytes(b"what a kill in the middle of a write leaves")

    # a worker makes its first batches as soon as it exists: they must be of the right epoch
    train_one(out, resume=True, **options | {"workers": 1})
    for name in ("network.pt", "best.pt"):
        assert_same_network(tmp_path / "whole" / name, out / name)
    assert (out / recipe.LOG).read_text() == (tmp_path / "whole" / recipe.LOG).read_text()
    assert len(read_log(out)) == 3
    assert_tensorboard_has_the_csv(out)
    assert not list(out.rglob("*.partial"))
    checkpoints = [torch.load(o / recipe.CHECKPOINT, weights_only=True) for o in (tmp_path / "whole", out)]
    assert checkpoints[0]["current_model_state"].keys() == checkpoints[1]["current_model_state"].keys()
    for name, value in checkpoints[0]["current_model_state"].items():
        assert torch.equal(value, checkpoints[1]["current_model_state"][name]), name


def interrupt(monkeypatch, error, epoch=1):
    original = recipe.Training.training_step

    def training_step(self, batch, index):
        if (self.current_epoch, index) == (epoch, 1):
            raise error
        return original(self, batch, index)

    monkeypatch.setattr(recipe.Training, "training_step", training_step)


@pytest.mark.parametrize("epoch", [0, 1])
def test_an_interrupt_leaves_a_usable_folder_and_says_how_to_go_on(finished, tmp_path, capsys, monkeypatch, epoch):
    out = tmp_path / "run"
    with monkeypatch.context() as patched:
        interrupt(patched, KeyboardInterrupt(), epoch)
        handler = signal.getsignal(signal.SIGINT)
        assert main(parse(*words(TrainConfig(**TINY, sib=SIB, out=out)))) == 130
        assert signal.getsignal(signal.SIGINT) is handler
    printed = capsys.readouterr().err
    assert printed.count("\n") == 1
    assert f"sib-fast train: interrupted. {out} holds" in printed
    assert f"sib-fast train --resume --out {out}" in printed
    assert ("no finished epoch yet" in printed) == (epoch == 0)
    assert (out / "network.pt").exists() == (epoch == 1)
    # the folder knows its settings
    assert main(parse("--resume", "--out", str(out), "--no-progress")) == 0
    assert_same_network(out / "network.pt", finished[0] / "network.pt")
    assert (out / recipe.LOG).read_text() == (finished[0] / recipe.LOG).read_text()


@pytest.mark.parametrize("moment", ["validation", "network.pt", "last.ckpt"])
def test_ctrl_c_while_validating_or_writing_loses_at_most_the_epoch(finished, tmp_path, capsys, monkeypatch, moment):
    out = tmp_path / "run"
    owner, name = (recipe.Training, "validation_step") if moment == "validation" else (os, "replace")
    real = getattr(owner, name)

    def interrupted(first, second, *rest):
        # in the second epoch, when every file is there
        if (moment == "validation" or str(second).endswith(moment)) and (out / recipe.CHECKPOINT).exists():
            monkeypatch.setattr(owner, name, real)
            signal.raise_signal(signal.SIGINT)
        return real(first, second, *rest)

    monkeypatch.setattr(owner, name, interrupted)
    assert main(parse(*words(TrainConfig(**TINY, sib=SIB, out=out)))) == 130
    assert capsys.readouterr().err.startswith(f"sib-fast train: interrupted. {out} holds the network and the checkpoint")
    assert main(parse("--resume", "--out", str(out), "--no-progress")) == 0
    assert_same_network(out / "network.pt", finished[0] / "network.pt")
    assert (out / recipe.LOG).read_text() == (finished[0] / recipe.LOG).read_text()


def words(config: TrainConfig) -> list[str]:
    """A command line that says all of a configuration."""
    flat = config.flat()
    line = [f"--{flat.pop('method')}"]
    for name, value in flat.items():
        flag = name.replace("_", "-")
        if isinstance(value, bool):
            line.append(f"--{flag}" if value else f"--no-{flag}")
        elif value is not None:
            line += [f"--{flag}", *(map(str, value) if isinstance(value, list) else [str(value)])]
    return line


def test_a_full_disk_leaves_the_last_checkpoint_and_says_so(finished, tmp_path, capsys, monkeypatch):
    out, original = tmp_path / "run", os.replace

    def replace(source, target):
        if str(target).endswith("last.ckpt") and os.path.exists(target):
            raise OSError(errno.ENOSPC, "No space left on device")
        original(source, target)

    with monkeypatch.context() as patched:
        patched.setattr(os, "replace", replace)
        assert main(parse(*words(TrainConfig(**TINY, sib=SIB, out=out)))) == 1
    captured = capsys.readouterr()
    assert "stopped by a full disk" in captured.out
    assert "No space left on device" in captured.err
    assert not list(out.rglob("*.partial"))
    train_one(out, resume=True)
    assert_same_network(out / "network.pt", finished[0] / "network.pt")


def test_resuming_a_finished_run_changes_nothing(finished):
    out, spec, _ = finished
    before = weights(out / "network.pt"), (out / recipe.LOG).read_text()
    assert train_one(out, resume=True) == spec
    assert (out / recipe.LOG).read_text() == before[1]
    assert all(torch.equal(value, before[0][name]) for name, value in weights(out / "network.pt").items())


def test_more_epochs_where_the_schedule_does_not_depend_on_their_number(finished, tmp_path):
    train_one(tmp_path / "two", schedule="constant", sib=None)
    train_one(tmp_path / "two", schedule="constant", sib=None, epochs=3, resume=True)
    train_one(tmp_path / "three", schedule="constant", sib=None, epochs=3)
    assert_same_network(tmp_path / "two" / "network.pt", tmp_path / "three" / "network.pt")
    with pytest.raises(ValueError, match=r"^train: resume needs the earlier run's settings, epochs 2, got 3"):
        train_one(finished[0], epochs=3, resume=True)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lr": 7.0}, r"lr 0\.001, got 7\.0"),
        ({"sib": None}, r"method 'sib', got 'plain'"),
        ({"sib": dataclasses.replace(SIB, window_size=9)}, "window_size 7, got 9"),
        ({"devices": 2, "batch_size": 4}, "batch_size 8, got 4"),
    ],
)
def test_resuming_with_other_settings_is_refused(finished, options, message):
    with pytest.raises(ValueError, match=rf"^train: resume needs the earlier run's settings, {message}"):
        train_one(finished[0], resume=True, **options)


def test_resuming_nothing_and_training_over_a_run_are_refused(finished, tmp_path):
    with pytest.raises(ValueError, match=r"^train: resume needs an earlier run in .*, got no settings\.json there"):
        train_one(tmp_path, resume=True)
    with pytest.raises(ValueError, match=r"^train: out must be a new folder, got .*, which holds a run: --resume"):
        train_one(finished[0])
    (tmp_path / "settings.json").write_text(json.dumps({"format": "another"}))
    with pytest.raises(ValueError, match=r"settings\.json must be written by this version"):
        train_one(tmp_path, resume=True)


class Code:
    def __reduce__(self):
        return (os.putenv, ("SIB_FAST_TEST_RAN_CODE", "1"))


def test_no_code_in_a_checkpoint_runs(finished, tmp_path):
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "settings.json").write_bytes((finished[0] / "settings.json").read_bytes())
    torch.save({"state_dict": Code()}, tmp_path / recipe.CHECKPOINT)
    with pytest.raises(pickle.UnpicklingError, match=r"putenv"):
        train_one(tmp_path, resume=True)


def test_a_checkpoint_is_the_old_or_the_new_one(tmp_path, monkeypatch):
    plugin, path = recipe._AtomicCheckpoints(), tmp_path / "new" / "last.ckpt"
    plugin.save_checkpoint({"a": 1}, path)
    content = path.read_bytes()
    during = []

    def replace(source, target):
        during.append((path.read_bytes() == content, os.stat(source).st_dev == os.stat(path).st_dev))
        raise OSError("power cut")

    monkeypatch.setattr(os, "replace", replace)
    with pytest.raises(OSError, match="power cut"):
        plugin.save_checkpoint({"a": 2}, path)
    assert during == [(True, True)]
    assert path.read_bytes() == content
    assert list(path.parent.iterdir()) == [path]


# ---- several processes ----------------------------------------------------------------------------------------------


def test_two_processes_train_one_network_and_count_every_image_once(tmp_path):
    out = tmp_path / "run"
    config = TrainConfig(
        **TINY
        | {"epochs": 1, "devices": 2, "batch_size": 4, "test_size": 17, "sib": dataclasses.replace(SIB, gather=True), "out": out}
    )
    command = [sys.executable, "-m", "sib_fast", "train", *words(config)]
    environment = {k: v for k, v in os.environ.items() if k not in ("LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")}
    done = subprocess.run(command, capture_output=True, text=True, timeout=900, env=environment)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("validation accuracy") == 1
    (row,) = read_log(out)
    assert row["step"] == "3"  # 24 images, 4 on each of two
    assert (float(row["train_accuracy"]) * 24) % 1 == pytest.approx(0, abs=1e-9)
    # 17 images on two processes: one stands in both shares
    assert float(row["val_accuracy"]) == pytest.approx(accuracy_of(out / "network.pt", config), abs=1e-12)
    model, data = load_network(out / "network.pt")[1], config.open("test")
    images, labels = (torch.stack([item[i] for item in data_items(data)]) for i in (0, 1))
    with torch.no_grad():
        loss = torch.nn.functional.cross_entropy(model(images), labels)
    assert float(row["val_loss"]) == pytest.approx(float(loss), rel=1e-5)


@pytest.mark.long
@pytest.mark.skipif(os.name != "posix", reason="sends a signal to a group")
def test_ctrl_c_in_a_terminal_ends_both_processes_with_one_sentence(tmp_path):
    """A terminal sends the signal to both; Lightning started the second."""
    out = tmp_path / "run"
    config = TrainConfig(**TINY | {"epochs": 100_000, "devices": 2, "batch_size": 4, "out": out})
    command = [sys.executable, "-m", "sib_fast", "train", *words(config)]
    options = {
        "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "start_new_session": True,
        "preexec_fn": lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # in the background it is ignored
    }  # fmt: skip
    with subprocess.Popen(command, **options) as process:
        try:
            end = time.monotonic() + 300
            while not (out / recipe.CHECKPOINT).is_file() and process.poll() is None and time.monotonic() < end:
                time.sleep(0.1)
            os.killpg(process.pid, signal.SIGINT)
            _, said = process.communicate(timeout=120)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode == 130
    assert said.startswith(
        f"sib-fast train: interrupted. {out} holds the network and the checkpoint of the latest finished epoch"
    )
    assert said.count("\n") == 1
    assert not list(out.rglob("*.partial"))
    load_network(out / "network.pt")


# ---- options --------------------------------------------------------------------------------------------------------


def parse(*words):
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    return parser.parse_args(words)


def test_options_cover_every_setting():
    config = TrainConfig(
        **TINY
        | {
            "sib": dataclasses.replace(
                SIB, gather=True, prepare=False, quantiles=(0.1, 0.9, 0.7, 0.6), layer="features.0", every=3
            ),
            "normalise": (0.5, 0.5),
            "ema": 0.9,
            "workers": 2,
        }
    )
    assert settings(parse(*words(config))) == config
    assert TrainConfig.from_flat(json.loads(json.dumps(config.flat()))) == config
    plain = dataclasses.replace(config, sib=None)
    assert settings(parse(*words(plain))) == plain
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    flags = {action.dest for action in parser._actions} - {"help", "resume", "recipe"}
    assert flags == {"method"} | {f.name for c in train._OPTIONS for f in dataclasses.fields(c)} - {"sib", "term"}
    assert "default: 0.01" in parser.format_help()


def test_sib_options_are_the_loss_s_with_its_defaults():
    signature = inspect.signature(SIBLoss).parameters
    ours = {f.name: f.default for f in dataclasses.fields(SIBOptions)}
    for name in ("layer", "prepare"):
        del ours[name]
    left_out = ("base_loss", "accumulation_steps", "train_in_eval_mode", "evidence")
    theirs = {name: p.default for name, p in signature.items() if name not in left_out}
    assert ours.keys() == theirs.keys()
    assert {n: v for n, v in ours.items() if n != "lambda_bg"} == {n: v for n, v in theirs.items() if n != "lambda_bg"}
    assert SIBOptions().criterion().lambda_bg == theirs["lambda_bg"]
    criterion = SIBOptions(0.5, 2e4, background="relative_variance", slope=3.0, every=2).criterion(accumulation_steps=4)
    assert (criterion.lambda_fg, criterion.lambda_bg, criterion.mask.slope) == (0.5, 2e4, 3.0)
    assert (criterion.every, criterion.accumulation_steps) == (2, 4)
    assert criterion.background.__name__ == "relative_variance"


def test_recipes_are_defaults_that_options_override():
    assert settings(parse("--window-size", "9")).sib == dataclasses.replace(SIB, lambda_bg=1e6, window_size=9)
    assert settings(parse()).arch == settings(parse("--data", "digits")).arch == "small_conv_net"
    assert settings(parse("--plain")).sib is None
    bare = settings(parse("--data", "pets", "--root", "here"))
    assert bare == TrainConfig(data="pets", root="here")
    dogs = settings(parse("--recipe", "paper-dogs", "--epochs", "3"))
    assert (dogs.data, dogs.arch, dogs.image_size, dogs.batch_size, dogs.lr, dogs.epochs) == (
        "dogs",
        "resnet50",
        224,
        97,
        1e-4,
        3,
    )
    assert (dogs.sib.lambda_fg, dogs.sib.lambda_bg, dogs.sib.window_size, dogs.sib.objective) == (0.01, 1000.0, 31, "exp")
    known = {f.name for c in (TrainConfig, SIBOptions) for f in dataclasses.fields(c)}
    assert all(r.keys() <= known for r in train.RECIPES.values())


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("--epochs 0", "train: epochs must be at least 1, got 0"),
        ("--batch-size 99", "train: batch_size x accumulate x devices must not exceed the 48 training images, got 99 x 1 x 1"),
        ("--batch-size 25 --accumulate 2", "must not exceed the 48 training images, got 25 x 2 x 1"),
        ("--batch-size 1", "train: batch_size must be at least 2 for S-IB, got 1"),
        ("--estimator hsic_unbiased --batch-size 3", "train: batch_size must be at least 4 for S-IB, got 3"),
        ("--seed -1", "train: seed must not be negative, got -1"),
        ("--lr 0", "train: lr must be positive and finite, got 0.0"),
        ("--weight-decay nan", "train: weight_decay must be finite and not negative, got nan"),
        ("--ema 1", "train: ema must be in [0, 1), got 1.0"),
        ("--label-smoothing -0.1", "train: label_smoothing must be in [0, 1), got -0.1"),
        ("--schedule linear", "train: schedule must be one of one_cycle, cosine, constant, got 'linear'"),
        ("--precision 8", "train: precision must be one of"),
        ("--precision 16-mixed", "train: precision must not be 16-mixed on the CPU: use bf16-mixed"),
        ("--warm-up-epochs 1", "train: warm_up_epochs must come with schedule cosine, got one_cycle"),
        ("--schedule cosine --warm-up-epochs 50", "train: warm_up_epochs must be in [0, epochs), got 50.0 of 50"),
        ("--normalise 0 0", "train: normalise must be a mean and a positive standard deviation, got (0.0, 0.0)"),
        ("--strategy fsdp", "train: strategy must be one of auto, ddp, ddp_spawn, got 'fsdp'"),
        ("--device tpu", "train: device must be one of auto, cpu, cuda, got 'tpu'"),
        ("--threads 0", "train: threads must be at least 1, got 0"),
        ("--arch resnet18 --width 8", "train: width must come with arch small_conv_net or small_resnet, got arch 'resnet18'"),
        ("--arch resnet1", "network: arch must be one of"),
        ("--arch squeezenet1_1 --image-size 16", "train: arch must take S-IB or plain steps at image_size 16, got"),
        ("--layer nowhere", "train: arch must take S-IB or plain steps at image_size 32, got"),
        ("--augment", "train: augment must not be given with data digits"),
        ("--data mnist", "open_dataset: name must be one of"),
        ("--data pets", "pets: root must be given"),
        ("--data pets --root {tmp}", "pets: root must hold"),
        (
            "--data folder --root {tmp} --correlation 0.1",
            "train: correlation must come with data digits or cutouts, got data 'folder'",
        ),
        ("--correlation 2", "correlation must be in [0, 1], got 2.0"),
        ("--image-size 8", "image_size must be at least 16, got 8"),
        ("--lambda-bg -1", "lambda_bg must be at least 0, got -1.0"),
        ("--window-size 8", "window_size must be odd"),
        ("--background median", "background must be one of"),
        ("--backend magic", "backend must be one of"),
        ("--gather", "train: gather must come with more than one device, got devices 1"),
        ("--plain --lambda-bg 3", "train: lambda_bg must not be given for plain training, got 3.0"),
        ("--plain --true-masks", "train: true_masks must not be given for plain training, got True"),
        ("--annotated 1.5", "train: annotated must be in [0, 1], got 1.5"),
        ("--annotated 0.5 --no-true-masks", "train: annotated must come with true_masks or random_backgrounds, got"),
        ("--random-backgrounds 2", "train: random_backgrounds must be in [0, 1], got 2.0"),
        ("--plain --annotated 0.5", "train: true_masks must not be given for plain training, got True"),
        ("--plain --evidence area --true-masks", "train: true_masks must not be given for plain training, got True"),
        ("--evidence area --evidence-every 2", "train: evidence_every must be 1 beside S-IB, whose every holds for both, got 2"),
        ("--evidence-form absolute", "train: evidence_form must come with evidence area or share, got 'absolute'"),
        ("--evidence volume", "kind must be one of"),
        ("--evidence area --evidence-at nowhere", "train: arch must take S-IB or plain steps at image_size 32, got"),
        ("--data cutouts", "cutouts: root must be given"),
        ("--mixup -1", "train: mixup must be finite and not negative, got -1.0"),
        ("--init nothing.pt", "train: init must be a file or a name of weights, got nothing.pt"),
        ("--freeze fc", "train: freeze must name stem, classifier or a part of the network (features, classifier, …), got 'fc'"),
        (
            "--part-lr fc=1",
            "train: part_lr must name stem, classifier or a part of the network (features, classifier, …), got 'fc'",
        ),
        ("--part-lr 1e-3", "train: part_lr must be NAME=RATE with a positive rate, got '1e-3'"),
        ("--arch timm:nothing", "network: arch must be timm:<name> of a model of timm"),
    ],
)
def test_bad_options_are_a_sentence_before_anything_is_trained(line, message, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(recipe, "train_network", lambda *arguments: pytest.fail("training began"))
    out = tmp_path / "out"
    (tmp_path / "data").mkdir()
    line = line.format(tmp=tmp_path / "data")
    sized = [] if "--data" in line else ["--train-size", "48", "--test-size", "8"]
    assert main(parse(*sized, "--no-progress", "--out", str(out), *line.split())) == 2
    said = capsys.readouterr().err
    assert message in said
    assert said.count("train: ") == 1
    assert not out.exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_cuda_where_there_is_none(capsys, tmp_path):
    assert main(parse("--device", "cuda", "--out", str(tmp_path / "out"))) == 2
    assert "train: device must be usable, got 'cuda' where torch.cuda.is_available() is False" in capsys.readouterr().err
    assert settings(parse()).device == "cpu"
