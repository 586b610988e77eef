"""A study in a few steps: its files, what a variant trains with, interruption and continuation, options."""

import io
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

pytest.importorskip("lightning")
pytest.importorskip("captum")
from rich.console import Console

from sib_fast import SIBLoss, cli
from sib_fast.explain import explain
from sib_fast.explain.controls import insertion_deletion
from sib_fast.explain.metrics import EnergyPointingGame
from sib_fast.lab.data import EmbeddedDigits
from sib_fast.lab.evaluate import accuracy, gradient_map
from sib_fast.lab.networks import load_network
from sib_fast.lab.study import measures, network, progress, report, run, timing
from sib_fast.lab.study.config import StudyConfig
from sib_fast.lab.study.records import file_stem
from sib_fast.lab.study.variants import ARCHITECTURES, LABELS, find_variant, variants

ROOT = Path(__file__).parent.parent.parent
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
    assert "naive head" in (out / "report.html").read_text()
    said = printed.splitlines()
    assert [line for line in said if line.startswith("[")][-1].startswith("[6/6] S-IB with the true mask (upper bound), seed 1: ")
    # the picture comes with its two networks, before the others
    assert said.index(f"picture: {out / 'panel.png'}") < next(i for i, line in enumerate(said) if line.startswith("[3/6]"))
    end = said[said.index("What was seen") :]
    assert end[1].startswith("  1. ")
    assert f"The picture: {out / 'panel.png'}" in end
    assert str(out / "report.html") in printed
    assert "What next" in end


def test_records_without_their_networks_go_on_without_a_picture(finished, tmp_path):
    shutil.copytree(finished[0] / "results", tmp_path / "results")
    shutil.copy(finished[0] / "study.json", tmp_path)
    printed = study(tmp_path)
    assert f"picture: left out, {tmp_path / 'networks' / 'small_conv_net.plain.seed0.pt'} is missing" in printed
    assert not (tmp_path / "panel.png").exists()
    assert (tmp_path / "report.html").is_file()


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

    def interrupted(arch, variant, seed, settings, out, tell):
        started.append((variant.name, seed))
        if len(started) == 3:
            raise KeyboardInterrupt
        return real(arch, variant, seed, settings, out, tell)

    monkeypatch.setattr(network, "run_network", interrupted)
    with pytest.raises(KeyboardInterrupt, match=r"2 of 6 networks are finished and kept in .*; the same command goes on"):
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


def test_a_later_run_without_timing_keeps_the_step_times(finished, tmp_path):
    out = shutil.copytree(finished[0], tmp_path / "s")
    times = json.loads((out / "study.json").read_text())["step_seconds"]
    assert set(times["small_conv_net"]) == {f"{name}{end}" for name in timing.LABELS for end in ("", timing.FIXED)}
    study(out, seeds=(0,))
    assert json.loads((out / "study.json").read_text())["step_seconds"] == times
    assert "A training step, small convolutional network" in (out / "report.html").read_text()


# ---- Ctrl-C, kills, progress ------------------------------------------------------------------------------------------


@pytest.mark.sampled(2)
@pytest.mark.parametrize("moment", ["training", "scoring", "writing a network", "writing the report"])
def test_ctrl_c_at_any_moment_keeps_what_is_finished_and_the_next_run_ends_alike(finished, tmp_path, monkeypatch, capsys, moment):
    options = {"seeds": (0,), "variants": ("plain",)}
    owner, name = {
        "training": (torch.optim.AdamW, "step"),
        "scoring": (measures, "explain"),
        "writing a network": (os, "replace"),
        "writing the report": (report, "figures"),
    }[moment]
    real, calls = getattr(owner, name), []

    def interrupted(*arguments, **named):
        calls.append(arguments)
        if moment != "writing a network" or str(arguments[1]).endswith(".pt"):
            monkeypatch.setattr(owner, name, real)
            signal.raise_signal(signal.SIGINT)
        return real(*arguments, **named)

    monkeypatch.setattr(owner, name, interrupted)
    flags = [f for k, v in (TINY | options).items() if k != "progress" for f in (f"--{k.replace('_', '-')}", *_words(v))]
    assert cli.main(["study", "--no-progress", "--out", str(tmp_path), *flags]) == 130
    kept = int(moment == "writing the report")
    said = capsys.readouterr().err
    assert said == (
        f"sib-fast study: interrupted. {kept} of 1 networks are finished and kept in {tmp_path}; the same command goes on from "
        "there.\n"
    )
    assert json.loads((tmp_path / "study.json").read_text())["status"] == "interrupted"
    assert not list(tmp_path.rglob("*.partial"))
    (tmp_path / "results" / ".x.json.1.partial").write_bytes(b"what a kill in the middle of a write leaves")
    study(tmp_path, **options)
    assert not list(tmp_path.rglob("*.partial"))
    ours, alone = without_clock(records(tmp_path)), without_clock(records(finished[0]))
    assert ours == {stem: alone[stem] for stem in ("small_conv_net.plain.seed0",)}
    weights = [(out / "networks" / "small_conv_net.plain.seed0.pt").read_bytes() for out in (tmp_path, finished[0])]
    assert weights[0] == weights[1]


def _words(value) -> list[str]:
    return list(map(str, value if isinstance(value, tuple) else (value,)))


def test_ctrl_c_in_a_terminal_ends_every_process_with_one_sentence(tmp_path):
    """A terminal sends the signal to the whole group: to the study and to its workers, which may still be starting."""
    flags = [f for k, v in TINY.items() if k not in ("progress", "jobs") for f in (f"--{k.replace('_', '-')}", *_words(v))]
    command = [sys.executable, "-m", "sib_fast", "study", "--jobs", "2", "--out", str(tmp_path), *flags, "--epochs", "100000"]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, **pipes, env=environment, start_new_session=True) as process:
        assert process.stdout is not None
        try:
            assert "training 6 networks, 2 at a time" in process.stdout.readline()
            assert "making its images" in process.stdout.readline()  # a worker is at work
            os.killpg(process.pid, signal.SIGINT)
            _, said = process.communicate(timeout=120)
        except BaseException:
            os.killpg(process.pid, signal.SIGKILL)
            raise
    assert process.returncode == 130
    kept = f"0 of 6 networks are finished and kept in {tmp_path}; the same command goes on from there."
    assert said == f"sib-fast study: interrupted. {kept}\n"
    assert gone(lambda: os.killpg(process.pid, 0))
    assert json.loads((tmp_path / "study.json").read_text())["status"] == "interrupted"


def gone(probe) -> bool:
    """Whether a process or group ends within a minute."""
    for _ in range(600):
        try:
            probe()
        except ProcessLookupError:
            return True
        time.sleep(0.1)
    return False


def test_a_killed_study_takes_its_workers_with_it():
    code = (
        "import concurrent.futures, multiprocessing, os, time\n"
        "from sib_fast.lab.study import run\n"
        "if __name__ == '__main__':\n"
        "    context = multiprocessing.get_context('spawn')\n"
        "    pool = concurrent.futures.ProcessPoolExecutor(1, context, run._start_worker, (context.SimpleQueue(),))\n"
        "    print(pool.submit(os.getpid).result(), flush=True)\n"
        "    pool.submit(time.sleep, 3600).result()\n"
    )
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, env=environment, text=True) as process:
        assert process.stdout is not None
        worker = int(process.stdout.readline())
        process.kill()
    assert gone(lambda: os.kill(worker, 0))


def test_progress_counts_work_and_says_what_is_left(monkeypatch):
    clock = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: clock[0])
    console = Console(file=io.StringIO(), width=200)
    plain, sib = ("small_conv_net", "plain", 0), ("small_conv_net", "sib", 0)
    settings = StudyConfig(**TINY).settings()
    with progress.Progress(console, [plain, sib], settings, wanted=True) as shown:
        shown.update(plain, "epoch 0 of 2", 0.0)
        assert shown.left is None
        clock[0] = 5.0
        shown.update(plain, "epoch 0 of 2, still", 0.0)  # too soon for another line
        clock[0] = 30.0
        shown.update(plain, "epoch 1 of 2", 0.5)
        done = 0.5 * sum(progress.work(plain, settings)) / sum(sum(progress.work(t, settings)) for t in (plain, sib))
        assert shown.share == pytest.approx(done)
        assert shown.left == pytest.approx(30.0 * (1 - done) / done)
        left = progress.duration(shown.left)
        shown.finish(plain, "done so")
    assert console.file.getvalue().splitlines() == [
        "  0 %, starting: plain training, seed 0: epoch 0 of 2",
        f"  {100 * done:.0f} %, about {left} left: plain training, seed 0: epoch 1 of 2",
        "[1/2] plain training, seed 0: done so",
    ]
    assert [progress.duration(s) for s in (7.6, 160, 3900)] == ["8 s", "2 min 40 s", "1 h 5 min"]


def test_training_s_ib_counts_as_more_work_and_lazily_as_less():
    settings = StudyConfig(**TINY).settings()
    training = {v: progress.work(("small_conv_net", v, 0), settings)[0] for v in ("plain", "lazy_sum", "sib")}
    assert training["plain"] < training["lazy_sum"] < training["sib"]


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_variants_differ_in_what_they_say(arch):
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(12, 3))
    made = variants(arch)
    assert list(made) == list(LABELS)
    assert isinstance(made["plain"].criterion(model), torch.nn.CrossEntropyLoss)
    at_the_image = {name: v for name, v in made.items() if v.sib is not None and v.layer is None}
    criteria = {name: v.criterion(torch.nn.Sequential(*model)) for name, v in at_the_image.items()}
    sib = criteria["sib"]
    assert all(isinstance(c, SIBLoss) for c in criteria.values())
    assert (criteria["foreground_only"].lambda_bg, criteria["background_only"].lambda_fg) == (0.0, 0.0)
    assert (criteria["background_only"].lambda_bg, sib.lambda_fg) == (sib.lambda_bg, 1.0)
    assert criteria["unmasked"].lambda_fg == 0.0
    vjp = torch.randn(2, 3, 4, 4)
    assert not criteria["unmasked"].mask(vjp).any()
    assert criteria["lazy_sum"].every == criteria["lazy_mean"].every == 4
    assert criteria["sib_relative"].background is not sib.background
    assert [name for name, v in made.items() if v.mask == "true"] == ["true_mask", "share_true"]
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


def test_the_first_steps_of_each_kind_are_not_timed(monkeypatch):
    now, steps = 0.0, 0

    def step():
        nonlocal now, steps
        steps += 1
        now += 100.0 if steps <= 2 * timing._WARM_UP else 1.0  # two sizes of batch take turns

    monkeypatch.setattr(timing, "_steps", lambda arch, settings, images: {"plain": step})
    monkeypatch.setattr(timing.time, "perf_counter", lambda: now)
    assert timing.time_steps("small_resnet", {"batch_size": 6}, 2) == {"plain": 1.0, "plain" + timing.FIXED: 1.0}


def test_timing_times_every_kind():
    settings = StudyConfig(**TINY).settings()
    seconds = timing.time_steps("small_resnet", settings, 2)
    assert list(seconds) == [f"{name}{end}" for end in ("", timing.FIXED) for name in timing.LABELS]
    assert all(value > 0 for value in seconds.values())


def test_a_study_whose_output_nobody_takes_ends(tmp_path):
    """An error ends a study once what runs has ended, and what runs must not wait for a study that no longer listens."""
    code = (
        "import sys, pathlib\n"
        "from sib_fast.lab.study import run\n"
        "def fails(*_): raise OSError('nobody reads')\n"
        "def work(task, settings, out):\n"
        "    for _ in range(5000): run._messages.put((task, 'a stage of some length', 0.5))\n"
        "run._run_in_worker = work\n"
        "class Told:\n"
        "    update = staticmethod(fails)\n"
        "if __name__ == '__main__':\n"
        "    config = run.StudyConfig(jobs=2)\n"
        "    run._train(config, [('small_conv_net', 'plain', 0), ('small_conv_net', 'sib', 0)], Told(), print)\n"
    )
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    script = tmp_path / "study_without_a_reader.py"  # workers import it again
    script.write_text(code)
    result = subprocess.run([sys.executable, script], capture_output=True, text=True, env=environment, timeout=120)
    assert result.returncode == 1
    assert "OSError: nobody reads" in result.stderr
