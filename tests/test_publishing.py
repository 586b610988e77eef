"""What publishes: workflows call the Makefile, dist/ is looked at, the self-test for other processors notices differences."""

from __future__ import annotations

import importlib.util
import re
import zipfile
from pathlib import Path

import pytest

import sib_fast

ROOT = Path(__file__).parent.parent
WORKFLOWS = sorted((ROOT / ".github/workflows").glob("*.yml"))


def load(name: str):
    spec = importlib.util.spec_from_file_location(name, ROOT / f"tools/{name}.py")
    tool = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tool)
    return tool


@pytest.fixture
def check_dist():
    return load("check_dist")


@pytest.fixture
def self_test():
    return load("self_test")


def targets() -> set[str]:
    return set(re.findall(r"^([a-z][\w-]*):(?!=)", (ROOT / "Makefile").read_text(), re.MULTILINE))


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_steps_of_workflows_are_targets_of_the_makefile(path):
    yaml = pytest.importorskip("yaml", reason="comes with the extras")
    workflow = yaml.safe_load(path.read_text())
    assert workflow["name"] == path.stem
    assert workflow[True], "yaml reads the key `on` as True"
    calls = 0
    for job in workflow["jobs"].values():
        if "uses" in job:  # another workflow of this repository
            assert (ROOT / job["uses"]).is_file()
            continue
        assert {"runs-on", "timeout-minutes", "steps"} <= job.keys()
        for step in job["steps"]:
            if "run" in step:
                called = re.fullmatch(r"make ([a-z][\w-]*)( [A-Z]+=\S.*)?", step["run"])
                assert called, step["run"]
                assert called[1] in targets()
                calls += 1
            else:
                assert re.fullmatch(r"(actions)/[\w-]+@v\d+", step["uses"])
    assert calls
    assert "unverified" in path.read_text().splitlines()[0], "until a machine has run it"


def test_there_is_a_workflow_for_wheels_docs_and_releases():
    assert [path.stem for path in WORKFLOWS] == ["docs", "release", "wheels"]
    assert {"aarch64", "wheels", "test"} <= targets(), "the search itself must find something"


def test_settings_of_cibuildwheel_name_what_exists():
    text = (ROOT / "pyproject.toml").read_text().split("[tool.cibuildwheel]")[1].split("\n[tool.ruff]")[0]
    (script,) = re.findall(r"\{project\}/(\S+?)[\"\s]", text)
    assert (ROOT / script).is_file()
    assert all(f"--exclude 'lib{name}" in text for name in ("torch*.so", "c10*.so", "cudart.so*"))


def wheel(folder: Path, tag: str = "manylinux_2_27_x86_64.manylinux_2_28_x86_64", holds=("sib_fast/lib/libsib_fast_cpu.so",)):
    folder.mkdir(exist_ok=True)
    path = folder / f"sib_fast-{sib_fast.__version__}-py3-none-{tag}.whl"
    with zipfile.ZipFile(path, "w") as archive:
        for name in holds:
            archive.writestr(name, "content")
    return path


def test_a_whole_release_is_accepted(check_dist, tmp_path):
    wheel(tmp_path)
    wheel(tmp_path, "manylinux_2_28_aarch64")
    (tmp_path / f"sib_fast-{sib_fast.__version__}.tar.gz").touch()
    assert check_dist.faults(tmp_path, f"v{sib_fast.__version__}") == []


@pytest.mark.parametrize(
    ("tag", "holds", "fault"),
    [
        ("linux_x86_64", ("sib_fast/lib/libsib_fast_cpu.so",), "must be named as"),
        ("manylinux_2_28_x86_64", (), "must hold sib_fast/lib/libsib_fast_cpu.so"),
        ("manylinux_2_28_x86_64", ("sib_fast/lib/libsib_fast_cpu.so", "sib_fast.libs/libtorch_cpu-1f.so"), "libtorch_cpu"),
        ("manylinux_2_28_x86_64", ("sib_fast/lib/libsib_fast_cpu.so", "sib_fast.libs/libgomp.so.1"), "libgomp"),
        ("manylinux_2_28_x86_64", ("sib_fast/lib/libsib_fast_cpu.so", "sib_fast/_blocks.so"), "_blocks"),
    ],
)
def test_wheels_that_must_not_be_published(tag, holds, fault, check_dist, tmp_path):
    wheel(tmp_path, tag, holds)
    (found,) = check_dist.faults(tmp_path, None)
    assert fault in found


def test_a_wheel_for_one_python_or_too_large_or_missing(check_dist, tmp_path, monkeypatch):
    assert "dist is empty" in check_dist.faults(tmp_path, None)[0]
    one = wheel(tmp_path)
    one.rename(tmp_path / one.name.replace("py3-none", "cp311-cp311"))
    assert "must be named as" in check_dist.faults(tmp_path, None)[0]
    (tmp_path / one.name.replace("py3-none", "cp311-cp311")).unlink()
    wheel(tmp_path)
    monkeypatch.setattr(check_dist, "LARGEST", 10)
    assert "must be at most" in check_dist.faults(tmp_path, None)[0]
    assert "the tag must be v" in check_dist.faults(tmp_path, "v99")[1]
    missing = check_dist.faults(tmp_path, "v99")[2:]
    assert missing == [f"a release needs sib_fast-…{end}" for end in (".tar.gz", "_aarch64.whl")]


def test_the_self_test_tells_roundings_from_faults(self_test):
    eps = self_test.EPS["float32"]
    here = {"a": ("float32", [1.0, -4.0]), "bits": ("exact", [3.0, 0.0])}
    assert self_test.compare(here, {**here, "a": ("float32", [1.0 + 8 * eps, -4.0])}) == []
    for value in (1.0 + 4 * (self_test.ROUNDINGS + 1) * eps, float("nan"), float("inf")):
        assert len(self_test.compare(here, {**here, "a": ("float32", [value, -4.0])})) == 1
    assert len(self_test.compare(here, {**here, "a": ("float32", [1.0])})) == 1
    assert len(self_test.compare(here, {**here, "bits": ("exact", [3.0, 1.0])})) == 1
    assert len(self_test.compare(here, {"a": here["a"]})) == 1
