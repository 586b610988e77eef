"""A whole run in a few steps: files, numbers that can be computed again, interruption and resumption, options."""

import argparse
import csv
import dataclasses
import io
import json
import signal
import statistics
import subprocess
import sys

import numpy as np
import pytest
import torch

pytest.importorskip("lightning")
from rich.console import Console

from sib_fast.lab import recipe, train
from sib_fast.lab.data import EmbeddedDigits
from sib_fast.lab.evaluate import accuracy, gradient_map, inside_share
from sib_fast.lab.report import paired_differences, save_panel, summary, tables
from sib_fast.lab.results import Results, commit, write_atomically
from sib_fast.lab.train import TrainConfig, add_arguments, load_network, main, run, time_steps

TINY = {
    "epochs": 2,
    "batch_size": 16,
    "train_size": 48,
    "test_size": 24,
    "width": 4,
    "seeds": (0, 1),
    "timing_steps": 2,
    "progress": False,
    "threads": 1,
}


def quiet_console() -> Console:
    return Console(file=io.StringIO(), width=160, highlight=False)


def read_csv(path) -> list[dict[str, str]]:
    with path.open() as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """One run of four small networks, and what it printed."""
    console = quiet_console()
    results = run(TrainConfig(**TINY, out=tmp_path_factory.mktemp("run")), console)
    return results, console.file.getvalue()


def test_run_leaves_exactly_the_promised_files(finished):
    results, _ = finished
    names = ("plain-seed0", "sib-seed0", "plain-seed1", "sib-seed1")
    expected = {f"networks/{name}.pt" for name in names} | {f"logs/{name}/metrics.csv" for name in names}
    expected |= {"results.json", "results.csv", "panel.png"}
    found = {str(p.relative_to(results.out)) for p in results.out.rglob("*") if p.is_file()}
    assert found == expected
    assert results.status == "complete"
    assert [(n.method, n.seed) for n in results.networks] == [("plain", 0), ("sib", 0), ("plain", 1), ("sib", 1)]


def test_reported_numbers_can_be_computed_again_from_the_files(finished):
    results = Results.load(finished[0].out)
    assert results.networks == finished[0].networks
    for network in results.networks:
        model = load_network(results, network)
        same, shifted = (EmbeddedDigits("test", TINY["test_size"], correlation=c, seed=network.seed) for c in (0.4, 0.0))
        assert network.accuracy_in_distribution == accuracy(model, same)
        assert network.accuracy_shifted == accuracy(model, shifted)
        assert network.mask_area == shifted.masks.double().mean().item()
        for data, reported in ((same, network.inside_share_in_distribution), (shifted, network.inside_share)):
            assert reported == pytest.approx(np.nanmean(independent_shares(model, data)), rel=1e-4)


def independent_shares(model, data):
    """The metric with autograd on the energy itself, in float64, and numpy for the rest."""
    model = model.double().eval()
    x = data.images.double().requires_grad_()
    energy = 0.5 * model(x).softmax(dim=1).square().sum()
    gradient = torch.autograd.grad(energy, x)[0].numpy()
    model.float()
    magnitude = np.abs(gradient.mean(axis=1))
    inside = np.where(data.masks[:, 0].numpy(), magnitude, 0.0)
    return inside.sum(axis=(1, 2)) / magnitude.sum(axis=(1, 2))


def test_table_shows_the_mean_and_spread_of_the_networks(finished):
    results, printed = finished
    for quantity in ("accuracy_in_distribution", "accuracy_shifted", "inside_share"):
        plain = [n for n in results.networks if n.method == "plain"]
        sib = [n for n in results.networks if n.method == "sib"]
        for group in (plain, sib):
            values = [getattr(n, quantity) for n in group]
            assert f"{np.mean(values):.3f} ± {np.std(values, ddof=1):.3f}" in printed
        differences = [getattr(s, quantity) - getattr(p, quantity) for p, s in zip(plain, sib, strict=True)]
        assert paired_differences(results, quantity) == differences
        assert f"{np.mean(differences):+.3f}" in printed
    for seconds in results.step_seconds.values():
        assert f"{seconds:.4f}" in printed
    assert str(results.out / "panel.png") in printed


def test_csv_and_json_hold_the_same_numbers_with_settings_and_versions(finished):
    results, _ = finished
    document = json.loads((results.out / "results.json").read_text())
    rows = read_csv(results.out / "results.csv")
    assert len(rows) == len(document["networks"]) == 4
    for row, network in zip(rows, document["networks"], strict=True):
        assert row["method"] == network["method"]
        for name in ("seed", "accuracy_shifted", "inside_share", "mask_area", "train_seconds"):
            assert float(row[name]) == network[name]
        for name, value in network["terms"].items():
            assert float(row[f"term_{name}"]) == value
        assert float(row["step_seconds_sib"]) == document["step_seconds"]["sib"]
        assert float(row["config_lambda_bg"]) == TrainConfig().lambda_bg
        assert row["environment_torch"] == document["environment"]["torch"]
    assert set(document["step_seconds"]) == {"plain", "naive", "sib"}
    assert document["environment"]["commit"] == commit()
    assert document["environment"]["backend"] in ("cpu", "reference")


def test_every_term_of_the_criterion_is_logged_for_every_epoch(finished):
    results, _ = finished
    sib, plain = results.network("sib", 0), results.network("plain", 0)
    assert set(sib.terms) >= {"loss", "base", "foreground", "background", "mask_area"}
    assert "loss" in plain.terms
    log = read_csv(results.out / sib.log)
    assert [int(row["epoch"]) for row in log] == [0, 1]
    for name in ("loss", "base", "foreground", "background", "mask_area"):
        assert float(log[-1][name]) == pytest.approx(sib.terms[name])
    # the logged terms make up the logged loss: objective expm1
    last = sib.terms
    config = TrainConfig()
    expected = last["base"] + config.lambda_bg * np.expm1(last["background"])
    expected += config.lambda_fg * np.expm1(-last["foreground"])
    assert last["loss"] == pytest.approx(expected, rel=1e-3)


def test_panel_is_a_picture_of_some_size(finished):
    import matplotlib.image

    picture = matplotlib.image.imread(finished[0].out / "panel.png")
    assert picture.shape[0] > 300
    assert picture.shape[1] > 900
    assert picture[..., :3].std() > 0.1


def test_panel_of_zero_maps_and_of_one_image(tmp_path):
    data = EmbeddedDigits("test", 1, seed=0)
    save_panel(tmp_path / "p.png", data.images, data.masks, data.labels, {"sib": torch.zeros(1, 1, 32, 32)})
    assert (tmp_path / "p.png").read_bytes().startswith(b"\x89PNG")


def test_equal_settings_give_equal_networks(finished, tmp_path):
    results, _ = finished
    again = run(TrainConfig(**TINY | {"seeds": (1,), "timing_steps": 0}, out=tmp_path), quiet_console())
    assert again.step_seconds == {}
    for method in ("plain", "sib"):
        first, second = (load_network(r, r.network(method, 1)).state_dict() for r in (results, again))
        for name in first:
            assert torch.equal(first[name], second[name]), (method, name)


def test_sib_training_changes_the_network(finished):
    results, _ = finished
    plain, sib = (load_network(results, results.network(m, 0)) for m in ("plain", "sib"))
    assert not torch.equal(plain.classifier.weight, sib.classifier.weight)


# ---- the metric ----------------------------------------------------------------------------------------------------


def test_inside_share_of_known_maps():
    mask = torch.zeros(3, 1, 4, 4, dtype=torch.bool)
    mask[:, :, :2] = True
    gradient = torch.zeros(3, 1, 4, 4)
    gradient[0] = 1.0
    gradient[1, 0, 0, 0], gradient[1, 0, 3, 3] = 3.0, 1.0
    share = inside_share(gradient, mask)
    assert share[:2].tolist() == [0.5, 0.75]
    assert share[2].isnan()


def test_gradient_map_leaves_the_network_and_the_images_alone():
    from sib_fast.lab.models import SmallConvNet

    model, data = SmallConvNet(width=2).train(), EmbeddedDigits("test", 3, seed=0)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    maps = gradient_map(model, data.images)
    assert maps.shape == (3, 1, 32, 32)
    assert not maps.requires_grad
    assert (maps >= 0).all()
    assert not data.images.requires_grad
    assert all(p.grad is None for p in model.parameters())
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    # each image's map is its own: eval mode does not mix the batch
    torch.testing.assert_close(gradient_map(model, data.images[1:2]), maps[1:2])


def test_summary_is_mean_and_sample_deviation():
    values = [0.25, 0.5, 0.9]
    assert summary(values) == f"{statistics.fmean(values):.3f} ± {statistics.stdev(values):.3f}"
    assert summary([0.125], signed=True) == "+0.125"
    assert summary([]) == "–"


# ---- interruption --------------------------------------------------------------------------------------------------


def interrupt_third_network(monkeypatch, error):
    original, calls = train._train_network, []

    def train_network(config, method, seed, *data):
        calls.append((method, seed))
        if len(calls) == 3:
            raise error
        return original(config, method, seed, *data)

    monkeypatch.setattr(train, "_train_network", train_network)
    return calls


@pytest.mark.parametrize("error", [KeyboardInterrupt(), RuntimeError("out of luck")])
def test_interrupted_run_keeps_what_is_finished_and_says_so(finished, tmp_path, monkeypatch, error):
    calls = interrupt_third_network(monkeypatch, error)
    console, config = quiet_console(), TrainConfig(**TINY, out=tmp_path)
    with pytest.raises(type(error)):
        run(config, console)
    printed = console.file.getvalue()
    assert "holds plain seed 0, S-IB seed 0; missing: plain seed 1, S-IB seed 1" in printed
    assert "--resume" in printed

    left = Results.load(tmp_path)
    assert left.status == "interrupted"
    assert [(n.method, n.seed) for n in left.networks] == calls[:2]
    assert all((tmp_path / n.weights).is_file() for n in left.networks)
    assert len(read_csv(tmp_path / "results.csv")) == 2
    assert not list(tmp_path.rglob("*.partial"))

    if not isinstance(error, KeyboardInterrupt):
        return
    resumed = run(dataclasses.replace(config, resume=True, timing_steps=0), quiet_console())
    assert calls[3:] == [("plain", 1), ("sib", 1)]
    assert resumed.status == "complete"
    assert resumed.networks[:2] == left.networks
    for method in ("plain", "sib"):
        whole = finished[0].network(method, 1)
        assert resumed.network(method, 1).inside_share == whole.inside_share


def test_a_finished_network_is_on_disk_before_the_next_one_starts(tmp_path, monkeypatch):
    original, on_disk = train._train_network, []

    def train_network(config, *arguments):
        on_disk.append([(n.method, (tmp_path / n.weights).is_file()) for n in Results.load(tmp_path).networks])
        return original(config, *arguments)

    monkeypatch.setattr(train, "_train_network", train_network)
    run(TrainConfig(**TINY | {"seeds": (0,), "epochs": 1, "timing_steps": 0}, out=tmp_path), quiet_console())
    assert on_disk == [[], [("plain", True)]]


def test_resuming_with_other_settings_or_without_a_run_is_refused(finished, tmp_path):
    config = TrainConfig(**TINY, out=finished[0].out, resume=True)
    with pytest.raises(ValueError, match=r"^train: resume needs the earlier run's settings, lambda_bg .*, got 7\.0"):
        run(dataclasses.replace(config, lambda_bg=7.0), quiet_console())
    with pytest.raises(ValueError, match=r"^train: resume needs an earlier run in .*, got no results\.json there"):
        run(dataclasses.replace(config, out=tmp_path), quiet_console())


def test_interrupt_inside_lightning_arrives_as_one_and_the_next_interrupt_still_works(tmp_path):
    from sib_fast.lab.models import SmallConvNet

    class Interrupting(EmbeddedDigits):
        def __getitem__(self, index):
            raise KeyboardInterrupt

    handler = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        recipe.fit(
            SmallConvNet(width=2),
            torch.nn.CrossEntropyLoss(),
            Interrupting("train", 8, seed=0),
            epochs=1,
            batch_size=4,
            lr=1e-3,
            weight_decay=0.0,
            seed=0,
            device="cpu",
            log_folder=tmp_path / "log",
            progress=False,
        )
    assert signal.getsignal(signal.SIGINT) is handler


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch):
    path = tmp_path / "numbers"
    write_atomically(path, b"old")

    def full_disk(*arguments):
        raise OSError("no space left")

    monkeypatch.setattr("os.replace", full_disk)
    with pytest.raises(OSError, match="no space left"):
        write_atomically(path, b"new")
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_new_run_removes_the_old_picture_and_list(tmp_path, monkeypatch):
    (tmp_path / "panel.png").write_bytes(b"old")
    interrupt = KeyboardInterrupt()

    def train_network(*arguments):
        raise interrupt

    monkeypatch.setattr(train, "_train_network", train_network)
    with pytest.raises(KeyboardInterrupt):
        run(TrainConfig(**TINY, out=tmp_path), quiet_console())
    assert not (tmp_path / "panel.png").exists()
    assert Results.load(tmp_path).networks == []


# ---- options and imports -------------------------------------------------------------------------------------------


def parse(*words):
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    return parser.parse_args(words)


def test_options_cover_every_setting_with_its_default():
    default = TrainConfig()
    arguments = parse()
    assert {f.name for f in dataclasses.fields(default)} == set(vars(arguments))
    assert TrainConfig(**vars(arguments)) == default


def test_options_reach_the_settings():
    words = "--sib --seeds 3 4 --lambda-fg 0.5 --lambda-bg 2e4 --window-size 9 --background relative_variance"
    config = TrainConfig(**vars(parse(*words.split(), "--objective", "linear", "--no-progress", "--resume")))
    assert (config.which, config.seeds, config.progress, config.resume) == ("sib", (3, 4), False, True)
    criterion = config.criterion()
    assert (criterion.lambda_fg, criterion.lambda_bg) == (0.5, 2e4)
    assert criterion.background.__name__ == "relative_variance"
    with pytest.raises(SystemExit):
        parse("--sib", "--plain")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--epochs 0", "train: epochs must be at least 1, got 0"),
        ("--batch-size 99", "train: batch_size must not exceed train_size 48, got 99"),
        ("--batch-size 1", "train: batch_size must be at least 2 for S-IB, got 1"),
        ("--seeds 1 1", "train: seeds must be distinct and not negative, got [1, 1]"),
        ("--seeds -1", "train: seeds must be distinct and not negative, got [-1]"),
        ("--image-size 8", "train: image_size must be at least 16, got 8"),
        ("--correlation 2", "train: correlation must be in [0, 1], got 2.0"),
        ("--lr 0", "train: lr must be positive and finite, got 0.0"),
        ("--lambda-bg -1", "train: lambda_bg must be finite and not negative, got -1.0"),
        ("--lambda-fg nan", "train: lambda_fg must be finite and not negative, got nan"),
        ("--threads 0", "train: threads must be at least 1, got 0"),
        ("--device tpu", "train: device must be 'cpu' or 'cuda', got 'tpu'"),
        ("--window-size 8", "window_size must"),
        ("--background median", "background must"),
        ("--backend magic", "backend must"),
        ("--estimator hsic_unbiased --batch-size 3", "train: batch_size must be at least 4 for S-IB, got 3"),
    ],
)
def test_bad_options_are_named_before_anything_is_trained(words, message, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(train, "_train_network", lambda *arguments: pytest.fail("training began"))
    code = main(parse("--train-size", "48", "--out", str(tmp_path / "out"), *words.split()))
    assert code == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_main_turns_an_interrupt_into_its_exit_code(tmp_path, monkeypatch):
    def interrupted(config):
        raise KeyboardInterrupt

    monkeypatch.setattr(train, "run", interrupted)
    assert main(parse("--out", str(tmp_path))) == 130


def test_only_one_method_gives_a_table_without_a_difference(tmp_path):
    results = run(TrainConfig(**TINY | {"which": "plain", "seeds": (0,), "batch_size": 8}, out=tmp_path), quiet_console())
    assert {n.method for n in results.networks} == {"plain"}
    assert set(results.step_seconds) == {"plain"}
    assert [column.header for column in tables(results)[0].columns] == ["", "plain"]


def test_naive_is_not_timed_where_it_computes_something_else(tmp_path):
    config = TrainConfig(**TINY | {"background": "relative_variance", "timing_steps": 1}, out=tmp_path)
    assert set(time_steps(config)) == {"plain", "sib"}


def test_importing_the_package_or_the_options_loads_no_extra():
    code = (
        "import sys, sib_fast, sib_fast.lab.train; "
        "print(sorted({'lightning', 'matplotlib', 'rich', 'skimage', 'sklearn'} & set(sys.modules)))"
    )
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert output.strip() == "[]"


def test_a_run_prints_no_framework_noise(tmp_path):
    code = (
        "import sys; from sib_fast.lab.train import TrainConfig, run; "
        f"run(TrainConfig(epochs=1, batch_size=8, train_size=16, test_size=8, width=2, seeds=(0,), timing_steps=0, "
        f"progress=False, threads=1, out={str(tmp_path)!r}))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=tmp_path)
    assert done.stderr == ""
    assert "Tip" not in done.stdout
    assert "GPU" not in done.stdout
    assert {p.name for p in tmp_path.iterdir()} == {"logs", "networks", "panel.png", "results.csv", "results.json"}
