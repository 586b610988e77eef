"""The command line parses and hands over; what the commands do is tested with them."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import sib_fast
from sib_fast import cli

ROOT = Path(sib_fast.__file__).parents[1]


def test_version(capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(["--version"])
    assert stop.value.code == 0
    assert capsys.readouterr().out.strip() == sib_fast.__version__


def test_no_command_names_the_commands(capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main([])
    assert stop.value.code == 2
    assert "train" in capsys.readouterr().err


def test_doctor(capsys):
    assert cli.main(["doctor"]) == 0
    assert "backend cpu" in capsys.readouterr().out


def test_a_bad_option_of_train_is_a_sentence(capsys):
    assert cli.main(["train", "--epochs", "0"]) == 2
    assert "epochs must be at least 1, got 0" in capsys.readouterr().err


def test_train_says_its_options_and_defaults(capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(["train", "--help"])
    assert stop.value.code == 0
    said = capsys.readouterr().out
    assert all(word in said for word in ("paper-dogs", "--lambda-bg", "--plain", "default: energy"))


def test_train_without_the_lab_extra_says_what_to_install(tmp_path):
    code = (
        "import sys\n"
        "for name in ('lightning', 'sklearn', 'skimage', 'rich', 'tensorboard'): sys.modules[name] = None\n"
        "from sib_fast import cli\n"
        f"sys.exit(cli.main(['train', '--out', {str(tmp_path / 'out')!r}]))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, timeout=120)
    assert result.returncode == 2, result.stderr
    assert "sib_fast[lab]" in result.stderr


@pytest.mark.skipif(os.name != "posix", reason="sends a signal")
@pytest.mark.parametrize("call", [["-m", "sib_fast"], ["sib-fast"]], ids=["module", "script"])
def test_ctrl_c_while_torch_is_imported_is_a_sentence(call, tmp_path):
    """A torch that takes for ever to import, and says when it began."""
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch" / "__init__.py").write_text("import time\nprint('importing', flush=True)\ntime.sleep(600)\n")
    (tmp_path / "sib-fast").write_text("import sys\nfrom sib_fast.cli import main\nsys.exit(main())\n")
    environment = os.environ | {"PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"}
    options = {
        "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "env": environment, "cwd": tmp_path,
        # As in a terminal, also where these tests run in the background, which ignores the signal.
        "preexec_fn": lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    }  # fmt: skip
    with subprocess.Popen([sys.executable, *call, "doctor"], **options) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == "importing\n"
            process.send_signal(signal.SIGINT)
            _, said = process.communicate(timeout=60)
        finally:
            process.kill()
    assert process.returncode == 130
    assert said == "sib-fast: interrupted. Nothing has been written; the same command starts again.\n"


def test_a_program_that_imports_the_package_keeps_its_ctrl_c():
    code = "import signal as s; before = s.getsignal(s.SIGINT); import sib_fast; print(s.getsignal(s.SIGINT) is before)"
    said = subprocess.run([sys.executable, "-c", code, "-m", "sib_fast"], capture_output=True, text=True, cwd=ROOT, timeout=120)
    assert said.stdout == "True\n", said.stderr


def test_inspect(capsys):
    assert cli.main(["inspect", "sib_fast.testing.networks:conv_net", "--shape", "2", "3", "8", "8"]) == 0
    assert "after sib_fast.prepare(model): yes" in capsys.readouterr().out
    # Fused attention, which is swapped for one that can be differentiated twice.
    assert cli.main(["inspect", "sib_fast.testing.networks:AttentionNet", "--shape", "2", "3", "8", "8"]) == 0
    said = capsys.readouterr().out
    assert "obstacle" in said
    assert "after sib_fast.prepare(model): yes" in said
    assert cli.main(["inspect", f"{__name__}:without_second_derivative", "--shape", "2", "3", "8", "8"]) == 1
    assert "after sib_fast.prepare(model): NO" in capsys.readouterr().out


def without_second_derivative():
    return torch.nn.CrossMapLRN2d(3)


@pytest.mark.parametrize(
    "model", ["resnet50", "torchvision.models:", "no_such_package:f", "sib_fast.testing.networks:f", "timm:f"]
)
def test_inspect_of_no_model_is_a_sentence(capsys, model):
    assert cli.main(["inspect", model]) == 2
    said = capsys.readouterr().err
    assert said.startswith("sib-fast inspect: model must name a function that makes it, ")
    assert f"got {model!r}: " in said
    assert said.count("\n") == 1


def test_inspect_takes_timms_names(capsys):
    pytest.importorskip("timm", exc_type=ImportError)
    assert cli.main(["inspect", "timm:test_convnext.r160_in1k", "--shape", "2", "3", "32", "32"]) == 0
    assert "sib_fast.nn._others.GELU" in capsys.readouterr().out
