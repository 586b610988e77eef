"""Builds and installs the way users do: sdist, wheel, isolated, editable; with and without nvcc. Minutes, so marked."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
import torch

import sib_fast

pytestmark = pytest.mark.packaging
ROOT = Path(__file__).parent.parent
NVCC = Path(os.environ.get("CUDA_HOME", "/usr/local/cuda")) / "bin/nvcc"
WORKS = ROOT / "tests/installed_works.py"


def run(*command: object, cwd: Path, **environment: str) -> subprocess.CompletedProcess:
    env = {**os.environ, **environment}
    return subprocess.run([str(c) for c in command], cwd=cwd, env=env, capture_output=True, text=True, timeout=1200)


def succeed(*command: object, cwd: Path, **environment: str) -> str:
    result = run(*command, cwd=cwd, **environment)
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
    return result.stdout + result.stderr


def without_nvcc() -> dict[str, str]:
    """An environment in which no CUDA toolkit is to be found."""
    keep = [d for d in os.environ["PATH"].split(os.pathsep) if not (Path(d) / "nvcc").exists()]
    tools = Path(sys.executable).parent
    for name in ("g++", "c++", "cmake", "ninja", "git"):  # a tool that shares its folder with nvcc must stay reachable
        found = shutil.which(name)
        if found and str(Path(found).parent) not in keep and not (tools / name).exists():
            (tools / name).symlink_to(found)
    return {"PATH": os.pathsep.join([str(tools), *keep]), "CUDA_HOME": "", "CUDA_PATH": ""}


def with_nvcc() -> dict[str, str]:
    return {
        "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]),
        "CUDA_HOME": str(NVCC.parent.parent),
        "TORCH_CUDA_ARCH_LIST": "9.0a",  # one architecture: that all of them build is checked by the in-place build
    }


needs_nvcc = pytest.mark.skipif(
    not NVCC.exists() or torch.version.cuda is None, reason="no nvcc on this machine, or torch without CUDA"
)
TOOLCHAINS = [pytest.param(without_nvcc, id="without-nvcc"), pytest.param(with_nvcc, id="with-nvcc", marks=needs_nvcc)]


def clang_alone(folder: Path) -> dict[str, str]:
    """clang++ and what a build needs beside a compiler, in a folder that has no gcc."""
    folder.mkdir(parents=True)
    tools = ["clang++", "ld", "ar", "ranlib", "nm", "strip", "objcopy", "objdump", "readelf", "cmake", "ninja"]
    for tool in tools:
        beside = Path(sys.executable).with_name(tool)
        found = beside if beside.exists() else shutil.which(tool)
        if found:
            (folder / tool).symlink_to(found)
    return {"PATH": str(folder), "CXX": "", "CUDA_HOME": "", "CUDA_PATH": ""}


needs_clang = pytest.mark.skipif(shutil.which("clang++") is None, reason="no clang++ on this machine")
OFFLINE = ("--no-index", "--no-build-isolation", "--no-deps")


def cuda_forbidden() -> dict[str, str]:
    """nvcc is there, where it is, and must not be used."""
    return {**(with_nvcc() if NVCC.exists() else without_nvcc()), "SIB_FAST_CUDA": "0"}


@pytest.fixture(scope="module")
def sdist(tmp_path_factory) -> Path:
    """Built from a copy without anything that git ignores, as a clone is."""
    tree = tmp_path_factory.mktemp("tree") / "sib_fast"
    ignore = shutil.ignore_patterns(
        ".git", ".venv*", "build", "dist", "*.egg-info", "lib", "*.so", "__pycache__", ".*_cache", "runs"
    )
    shutil.copytree(ROOT, tree, ignore=ignore)
    out = tmp_path_factory.mktemp("sdist")
    succeed(sys.executable, "-m", "build", "--sdist", "--no-isolation", "--outdir", out, cwd=tree)
    (archive,) = out.glob("*.tar.gz")
    return archive


def assert_works_outside_the_tree(site: Path, backend: str, tmp_path: Path) -> None:
    out = succeed(sys.executable, WORKS, backend, cwd=tmp_path, PYTHONPATH=str(site))
    assert str(site) in out, f"imported another sib_fast: {out}"


def test_sdist_holds_the_sources(sdist):
    with tarfile.open(sdist) as archive:
        names = {name.split("/", 1)[1] for name in archive.getnames() if "/" in name}
    for path in (ROOT / "csrc").rglob("*"):
        if path.is_file():
            assert str(path.relative_to(ROOT)) in names
    assert {
        "CMakeLists.txt",
        "setup.py",
        "LICENSE",
        "README.md",
        "sib_fast/py.typed",
        "sib_fast/lab/page.html.j2",
        "sib_fast/lab/study/report.html.j2",
    } <= names
    assert not [name for name in names if name.endswith(".so")]


# One build on every commit, of the CPU library; where nvcc is, `make test` builds the CUDA library in place, by the same code.
@pytest.mark.parametrize(
    "toolchain",
    [
        pytest.param(cuda_forbidden, id="cuda-forbidden"),
        pytest.param(with_nvcc, id="with-nvcc", marks=[needs_nvcc, pytest.mark.long]),
    ],
)
def test_sdist_to_wheel_to_import(toolchain, sdist, tmp_path):
    environment = toolchain()
    succeed(
        sys.executable, "-m", "pip", "wheel", "--no-build-isolation", "--no-deps", "-w", tmp_path / "wheels", sdist,
        cwd=tmp_path, SIB_FAST_BLOCKS="1", **environment,
    )  # fmt: skip
    (wheel,) = (tmp_path / "wheels").glob("*.whl")
    assert re.fullmatch(rf"sib_fast-{sib_fast.__version__}-py3-none-\w+\.whl", wheel.name), "one wheel for every Python 3"
    names = set(zipfile.ZipFile(wheel).namelist())
    assert "sib_fast/lib/libsib_fast_cpu.so" in names
    assert ("sib_fast/lib/libsib_fast_cuda.so" in names) == (toolchain is with_nvcc)
    assert {
        "sib_fast/py.typed",
        "sib_fast/ops/foreground_mask/README.md",
        "sib_fast/lab/page.html.j2",
        "sib_fast/lab/study/report.html.j2",
    } <= names
    assert any(name.endswith("licenses/LICENSE") for name in names)
    assert not [name for name in names if "_blocks" in name or name.startswith(("tests", "benchmarks"))]
    succeed(sys.executable, "-m", "pip", "install", "--no-deps", "--target", tmp_path / "site", wheel, cwd=tmp_path)
    assert_works_outside_the_tree(tmp_path / "site", "cpu", tmp_path)
    info = json.loads((tmp_path / "site/sib_fast/lib/build_info.json").read_text())
    assert info["cuda_architectures"] == ("90a-real" if toolchain is with_nvcc else "")

    other = ROOT / ".venv-old/bin/python"
    if other.exists():  # another torch release, perhaps another build of it: the same wheel
        out = succeed(other, WORKS, "cpu", cwd=tmp_path, PYTHONPATH=str(tmp_path / "site"))
        assert str(tmp_path / "site") in out


@pytest.mark.long
@pytest.mark.parametrize("toolchain", TOOLCHAINS)
def test_isolated_install(toolchain, sdist, tmp_path):
    """`pip install .` as a user types it: the build environment is made from pyproject.toml alone."""
    # torch is pinned to one at hand, since "torch>=2.11" would download the newest; the oldest one where no CUDA is built.
    version = torch.__version__.split("+")[0]
    if toolchain is without_nvcc and (ROOT / ".venv-old").exists():
        version = succeed(
            ROOT / ".venv-old/bin/python", "-c", "import torch; print(torch.__version__.split('+')[0])", cwd=tmp_path
        ).strip()
    constraint = tmp_path / "constraint.txt"
    constraint.write_text(f"torch=={version}\n")
    with tarfile.open(sdist) as archive:
        archive.extractall(tmp_path / "source", filter="data")
    (source,) = (tmp_path / "source").iterdir()
    environment = toolchain()
    environment["PATH"] = (
        os.pathsep.join(d for d in environment["PATH"].split(os.pathsep) if d != str(Path(sys.executable).parent))
        if toolchain is with_nvcc
        else environment["PATH"]
    )
    succeed(
        sys.executable, "-m", "pip", "install", "--no-deps", "--target", tmp_path / "site", ".", cwd=source,
        PIP_CONSTRAINT=str(constraint), PIP_BUILD_CONSTRAINT=str(constraint), **environment,
    )  # fmt: skip
    assert_works_outside_the_tree(tmp_path / "site", "cpu", tmp_path)
    assert (tmp_path / "site/sib_fast/lib/libsib_fast_cuda.so").exists() == (toolchain is with_nvcc)


def test_editable_install_is_what_runs_here():
    assert Path(sib_fast.__file__).parent == ROOT / "sib_fast"
    assert (ROOT / "sib_fast/lib/libsib_fast_cpu.so").exists()


def in_the_library(kind: str) -> set[str]:
    """What cuobjdump lists in the CUDA library: "elf" for machine code, "ptx"."""
    tools = [NVCC.with_name("cuobjdump"), Path(torch.__file__).parents[1] / "triton/backends/nvidia/bin/cuobjdump"]
    cuobjdump = next((tool for tool in tools if tool.exists()), None)
    if cuobjdump is None:
        pytest.skip("no cuobjdump in this toolkit, nor Triton's")
    listed = succeed(cuobjdump, f"--list-{kind}", ROOT / "sib_fast/lib/libsib_fast_cuda.so", cwd=ROOT)
    return set(re.findall(r"sm_(\d+a?)", listed))


@needs_nvcc
def test_the_library_holds_the_architectures_that_it_was_built_for_and_is_small():
    built = json.loads((ROOT / "sib_fast/lib/build_info.json").read_text())["cuda_architectures"].split()
    assert in_the_library("elf") == {one.removesuffix("-real") for one in built if one.endswith("-real")}
    assert in_the_library("ptx") == {one.removesuffix("-virtual") for one in built if one.endswith("-virtual")}
    assert (ROOT / "sib_fast/lib/libsib_fast_cuda.so").stat().st_size <= 20e6 * min(len(built), 3)


@needs_nvcc
@pytest.mark.long
def test_every_default_architecture_is_in_the_library():
    """`make test-all` builds it for all of them."""
    assert in_the_library("elf") >= {"80", "90a", "100", "120"}
    assert in_the_library("ptx") >= {"80", "120"}


def test_wishes_that_cannot_be_met_are_errors(sdist, tmp_path):
    command = (sys.executable, "-m", "pip", "wheel", "--no-build-isolation", "--no-deps", "-w", tmp_path, sdist)
    result = run(*command, cwd=tmp_path, SIB_FAST_CUDA="1", **without_nvcc())
    assert result.returncode != 0
    assert "SIB_FAST_CUDA=1, but no nvcc (set CUDA_HOME to the CUDA toolkit's folder)" in result.stdout + result.stderr
    result = run(*command, cwd=tmp_path, SIB_FAST_CUDA="yes")
    assert "SIB_FAST_CUDA must be 0 or 1, got 'yes'" in result.stdout + result.stderr


def test_without_a_compiler_the_reference_installs(sdist, tmp_path):
    (tmp_path / "empty").mkdir()
    said = succeed(
        sys.executable, "-m", "pip", "install", "-v", *OFFLINE, "--target", tmp_path / "site", sdist,
        cwd=tmp_path, PATH=str(tmp_path / "empty"), CXX="", CUDA_HOME="", CUDA_PATH="",
    )  # fmt: skip
    assert "not building the library of SIB_FAST_CPU: no C++ compiler on PATH (install g++ or clang++, or set CXX)" in said
    assert not (tmp_path / "site/sib_fast/lib").exists()
    assert_works_outside_the_tree(tmp_path / "site", "reference", tmp_path)


@needs_clang
@pytest.mark.long
def test_offline_with_clang_alone_in_a_path_with_spaces(sdist, tmp_path):
    """pip unpacks and builds in TMPDIR, so that sources, objects and libraries all have the spaces in their paths."""
    place = tmp_path / "a path with spaces"
    site, temporary = place / "site packages", place / "of the build"
    temporary.mkdir(parents=True)
    archive = shutil.copy(sdist, place)
    succeed(
        sys.executable, "-m", "pip", "install", *OFFLINE, "--target", site, archive,
        cwd=place, TMPDIR=str(temporary), **clang_alone(place / "tools"),
    )  # fmt: skip
    assert json.loads((site / "sib_fast/lib/build_info.json").read_text())["compiler"].startswith("Clang ")
    assert_works_outside_the_tree(site, "cpu", place)
