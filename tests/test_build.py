"""What is compiled for which GPUs: the rules of setup.py and tools/build.py, without compiling anything."""

from __future__ import annotations

import importlib.util
import json
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
EVERY = ["80-real", "80-virtual", "90a-real", "100-real", "120-real", "120-virtual"]
KNOWN = [75, 80, 86, 89, 90, 100, 103, 120]
pytest.importorskip("setuptools")


@pytest.fixture
def build(monkeypatch, tmp_path):
    """tools/build.py, on a machine with a toolkit and no GPU, where nothing was built."""
    spec = importlib.util.spec_from_file_location("build_tool", ROOT / "tools/build.py")
    tool = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tool)
    monkeypatch.delenv("TORCH_CUDA_ARCH_LIST", raising=False)
    monkeypatch.setattr(tool, "PACKAGE", tmp_path)
    monkeypatch.setattr(tool.setup, "find_nvcc", lambda: Path("nvcc"))
    monkeypatch.setattr(tool.setup, "cuda_obstacle", lambda: None)
    monkeypatch.setattr(tool.setup, "known_to", lambda nvcc: KNOWN)
    monkeypatch.setattr(tool.setup, "visible_gpus", list)
    return tool


def seen(build, monkeypatch, *gpus):
    monkeypatch.setattr(build.setup, "visible_gpus", lambda: list(gpus))


def test_every_architecture_where_no_gpu_is_visible(build):
    assert build.setup.chosen_architectures() == EVERY


@pytest.mark.parametrize(
    ("gpus", "want"),
    [
        ((80,), ["80-real", "80-virtual"]),
        ((90,), ["90a-real", "90-virtual"]),
        ((86, 120), ["86-real", "120-real", "120-virtual"]),
        ((75, 89), ["89-real", "89-virtual"]),
        ((121,), ["120-virtual"]),  # newer than the compiler: the driver compiles the PTX
        ((75,), EVERY),
    ],
)
def test_visible_gpus_and_ptx_of_the_newest(gpus, want, build, monkeypatch):
    seen(build, monkeypatch, *gpus)
    assert build.setup.chosen_architectures() == want


def test_the_list_decides_over_the_gpus(build, monkeypatch, capsys):
    seen(build, monkeypatch, 90)
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "7.5 8.6;12.0+PTX")
    for target in ("demo", "test", "all"):
        assert build.wanted(target) == ["86-real", "120-real", "120-virtual"]
    assert "left out: 7.5" in capsys.readouterr().err
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "7.5")
    with pytest.raises(SystemExit, match=r"must name at least one architecture from 8\.0 on, got '7\.5'"):
        build.setup.chosen_architectures()
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "Hopper")
    with pytest.raises(SystemExit, match=r"must hold entries like 8\.0, 9\.0a or 12\.0\+PTX, got 'Hopper'"):
        build.setup.chosen_architectures()


def test_an_old_compiler_builds_what_it_knows(build, monkeypatch, capsys):
    monkeypatch.setattr(build.setup, "known_to", lambda nvcc: [75, 80, 86, 89, 90])
    assert build.setup.chosen_architectures() == ["80-real", "80-virtual", "90a-real"]
    assert "too old for 100-real 120-real 120-virtual" in capsys.readouterr().err


def test_targets_build_what_they_run_on(build, monkeypatch):
    assert build.wanted("demo") == []
    assert build.wanted("test") == ["90a-real"]
    assert build.wanted("all") == EVERY
    seen(build, monkeypatch, 89)
    assert build.wanted("demo") == build.wanted("test") == ["89-real", "89-virtual"]
    assert build.wanted("all") == EVERY
    monkeypatch.setattr(build.setup, "cuda_obstacle", lambda: "no nvcc")
    assert build.wanted("all") == []


def test_what_is_built_is_kept_where_it_suffices(build, monkeypatch, tmp_path):
    (tmp_path / "lib").mkdir()
    info = tmp_path / "lib/build_info.json"
    info.write_text(json.dumps({"cuda_architectures": " ".join(EVERY)}))
    assert build.wanted("demo") == build.wanted("test") == EVERY
    info.write_text(json.dumps({"cuda_architectures": "80-real"}))
    assert build.wanted("demo") == ["80-real"]
    assert build.wanted("test") == ["90a-real"]
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "9.0")
    assert build.wanted("demo") == ["90-real"]


def test_no_driver_no_gpus(build, monkeypatch):
    def missing(name):
        raise OSError(name)

    fresh = build.load_setup()
    monkeypatch.setattr(fresh.ctypes, "CDLL", missing)
    assert fresh.visible_gpus() == []


def test_pages_name_the_default_list(build):
    for page in ("docs/environment.md", "setup.py"):
        assert build.setup.DEFAULT_ARCHITECTURES in (ROOT / page).read_text(), page
    assert re.fullmatch(r"(\d+\.\da?(\+PTX)?;?)+", build.setup.DEFAULT_ARCHITECTURES)
