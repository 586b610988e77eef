"""The house rules that a machine can check: imports, names, documentation."""

from __future__ import annotations

import inspect
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import sib_fast
from tests import selection
from tools import faults, plant_faults

ROOT = Path(__file__).parent.parent
PYTHON_FILES = sorted((ROOT / "sib_fast").rglob("*.py"))


def run(code: str, **environment: str) -> subprocess.CompletedProcess:
    """Code in a fresh process, away from the source tree's working directory."""
    return subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        cwd="/",
        env={**os.environ, "PYTHONPATH": str(ROOT), **environment},
        timeout=120,
    )


def test_import_is_light():
    """The command line's, which is the package's and that of every command's options: no extra, no compiler, no counter."""
    result = run(
        "import sys, sib_fast.cli\n"
        "try: sib_fast.cli.main(['explain', '--help'])\n"
        "except SystemExit: pass\n"
        "heavy = {'triton', 'lightning', 'torchvision', 'matplotlib', 'sklearn', 'skimage', 'rich', 'tensorboard', 'captum',\n"
        "         'pytorch_grad_cam', 'PIL', 'torchmetrics', 'torch._dynamo', 'torch.utils.flop_counter'}\n"
        "ours = {f'sib_fast.ops.{op}.triton' for op in ('foreground_mask', 'region_statistics', 'hsic_objective')}\n"
        "print(sorted((heavy | ours) & set(sys.modules)))"
    )
    assert "--window-size" in result.stdout, result.stderr
    assert result.stdout.splitlines()[-1] == "[]", result.stdout + result.stderr


def test_without_compiled_libraries_it_imports_explains_itself_and_runs_the_reference():
    result = run(
        "import warnings, torch\n"
        "with warnings.catch_warnings(record=True) as caught:\n"
        "    warnings.simplefilter('always')\n"
        "    import sib_fast\n"
        "    mask = sib_fast.foreground_mask(torch.randn(2, 3, 8, 8), window_size=3)\n"
        "    sib_fast.foreground_mask(torch.randn(2, 3, 8, 8), window_size=3)\n"
        "print(tuple(mask.shape), len(caught), caught[0].message, caught[0].filename)\n"
        "print(sib_fast.why_not('cpu'))\n"
        "try:\n"
        "    sib_fast.foreground_mask(torch.randn(2, 3, 8, 8), backend='cpu')\n"
        "except RuntimeError as error:\n"
        "    print(error)\n"
        "from sib_fast import cli\n"
        "cli.main(['doctor'])\n",
        SIB_FAST_LOAD="0",
    )
    lines = result.stdout.splitlines()
    assert lines[0].startswith("(2, 1, 8, 8) 1 sib_fast: 'auto' runs the reference on cpu tensors"), result.stdout + result.stderr
    assert lines[0].endswith("<string>"), "the warning must point at the caller"
    assert lines[1] == "SIB_FAST_LOAD=0 is set"
    assert "is not usable here: SIB_FAST_LOAD=0 is set" in lines[2]
    assert_doctor_reports(lines[3:], loaded=False)


def test_without_triton():
    result = run("import sys; sys.modules['triton'] = None\nimport sib_fast; print(sib_fast.why_not('cpu'))")
    assert result.returncode == 0, result.stderr


def assert_doctor_reports(lines: list[str], loaded: bool) -> None:
    rows = dict(re.split(r"\s{2,}", line, maxsplit=1) for line in lines)
    assert rows["sib_fast"] == sib_fast.__version__
    assert rows["backend reference"] == "usable"
    assert rows["backend cpu"] == ("usable" if loaded else "SIB_FAST_LOAD=0 is set")
    chosen = "cpu" if loaded else "reference"
    assert rows["auto on cpu"] == f"mask by {chosen}, statistics by {chosen}, objective by {chosen}"
    assert {"torch", "Python", "built with", "CUDA architectures", "CUDA library", "triton"} <= set(rows)
    assert ("to do" in rows) == (not loaded)


def test_doctor():
    """As a command; where no library is loaded: the test above."""
    result = subprocess.run(
        [sys.executable, "-m", "sib_fast", "doctor"],
        capture_output=True,
        text=True,
        env={**os.environ, "SIB_FAST_LOAD": "1"},
        cwd=ROOT,
    )
    assert result.returncode == 0, result.stderr
    assert_doctor_reports(result.stdout.splitlines(), loaded=True)


def test_doctor_says_what_to_type(monkeypatch):
    from sib_fast import _extension, doctor

    monkeypatch.setattr(doctor.shutil, "which", lambda name: None)
    monkeypatch.setattr(doctor, "_version_of", lambda package: None)
    monkeypatch.setitem(_extension.MISSING, "cpu", "it was not built")
    rows = dict(doctor.report())
    for row in ("compiler here", "cmake here", "triton", "lightning", "torchvision", "to do"):
        assert re.search(r"(pip|apt-get) install", rows[row]), row
    assert torch.version.cuda is None or "install the CUDA toolkit" in rows["nvcc here"]
    monkeypatch.setitem(_extension.MISSING, "cpu", None)
    monkeypatch.setitem(_extension.MISSING, "cuda", "it was not built")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(doctor, "_cuda_launch", lambda: "not usable")
    assert "install nvcc (above), then: SIB_FAST_CUDA=1 pip install" in dict(doctor.report())["to do"]


def test_doctor_in_a_clone_after_pip_install(tmp_path):
    """Python takes the package of the folder that it is started in, where pip has built nothing: installing again is no help."""
    shutil.copytree(ROOT / "sib_fast", tmp_path / "sib_fast", ignore=shutil.ignore_patterns("lib", "*.so", "__pycache__"))
    (tmp_path / "csrc").mkdir()
    shutil.copy(ROOT / "csrc/library.cpp", tmp_path / "csrc")
    call = {"capture_output": True, "text": True, "cwd": tmp_path, "env": {**os.environ, "PYTHONPATH": str(ROOT)}}
    result = subprocess.run([sys.executable, "-m", "sib_fast", "doctor"], **call)
    rows = dict(re.split(r"\s{2,}", line, maxsplit=1) for line in result.stdout.splitlines())
    assert rows["backend cpu"].startswith(f"it was not built in {tmp_path}, the source tree that Python was started in")
    assert "`sib-fast doctor`" in rows["to do"]
    assert "--force-reinstall" not in result.stdout


@pytest.mark.sampled(1)
@pytest.mark.parametrize("capability", ["baseline", "avx2"])
def test_ops_on_every_instruction_set(capability, request):
    """The suite of the ops again, on the kernels that an older CPU would run: a sample of it, or the whole with --long."""
    blocks = pytest.importorskip("sib_fast._blocks")
    sets = ["baseline", "avx2", "avx512"]
    if sets.index(blocks.capability()) < sets.index(capability):
        pytest.skip(f"this CPU has no {capability}")
    environment = {**os.environ, "SIB_FAST_CPU_CAPABILITY": capability}
    probe = "from sib_fast import _blocks; print(_blocks.capability())"
    chosen = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, env=environment, cwd=ROOT)
    assert chosen.stdout.strip() == capability, chosen.stderr
    result = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "tests/ops/test_foreground_mask.py",
         "tests/ops/test_region_statistics.py", "tests/ops/test_hsic_objective.py", "-k", "cpu and not compiles and not opcheck",
         *selection.passed_on(request.config)],
        capture_output=True, text=True, env=environment, cwd=ROOT,
    )  # fmt: skip
    assert result.returncode == 0, result.stdout[-3000:]


def lint_imports(root: Path) -> subprocess.CompletedProcess:
    tool = Path(sys.executable).with_name("lint-imports")
    if not tool.exists():
        pytest.skip("import-linter is not installed here (extra [test])")
    return subprocess.run(
        [tool, "--no-cache"], capture_output=True, text=True, cwd=root, env={**os.environ, "PYTHONPATH": str(root)}
    )


@pytest.mark.parametrize(
    ("file", "line"),
    [
        (None, None),
        ("sib_fast/ops/foreground_mask/__init__.py", "import sib_fast.estimators"),
        ("sib_fast/ops/foreground_mask/__init__.py", "import sib_fast.ops.region_statistics"),
        ("sib_fast/loss.py", "import sib_fast.ops.foreground_mask.reference"),
        ("sib_fast/vjp.py", "import sib_fast.testing.problems"),
        ("sib_fast/lab/study/config.py", "import sib_fast.lab.study.run"),  # a circle
        ("sib_fast/of_no_layer.py", "import torch"),
    ],
)
def test_import_rules_hold_and_a_planted_breach_is_caught(file, line, tmp_path):
    shutil.copytree(ROOT / "sib_fast", tmp_path / "sib_fast", ignore=shutil.ignore_patterns("*.so", "lib", "__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    if file is not None:
        path = tmp_path / file
        with path.open("a") as module:
            module.write(f"\n{line}\n")
    result = lint_imports(tmp_path)
    assert (result.returncode == 0) == (file is None), result.stdout[-2000:]


def test_every_fault_fits_its_source(request):
    """One that does not is found stale hours into a run of tools/plant_faults.py, which must leave this test out."""
    assert request.node.nodeid == plant_faults.FITS
    assert f"--deselect={plant_faults.FITS}" in plant_faults.EVERYTHING
    sources = {file: (ROOT / file).read_text() for _, file, _, _ in faults.FAULTS}
    assert [what for what, file, text, _ in faults.FAULTS if sources[file].count(text) != 1] == []
    assert len({what for what, *_ in faults.FAULTS}) == len(faults.FAULTS)


def test_every_environment_switch_is_documented():
    documented = (ROOT / "docs/environment.md").read_text()
    sources = [*PYTHON_FILES, ROOT / "setup.py", *(ROOT / "csrc").rglob("*.cpp")]
    used = {name for path in sources for name in re.findall(r"[\"'](SIB_FAST_[A-Z_]+)[\"']", path.read_text())}
    assert used, "the search itself must find something"
    assert sorted(name for name in used if f"`{name}`" not in documented) == []


@pytest.mark.parametrize("name", ["foreground_mask", "region_statistics", "vjp_map", "SIBLoss"])
def test_public_docstrings_say_what_a_user_needs(name):
    text = inspect.getdoc(getattr(sib_fast, name))
    for section in ("Shapes:", "Scale:", "Errors:", "Source:"):
        assert section in text, f"{name}: {section}"


@pytest.mark.parametrize("name", sorted(sib_fast.estimators.ESTIMATORS))
def test_estimators_state_their_scale_and_source(name):
    text = inspect.getdoc(sib_fast.estimators.ESTIMATORS[name])
    assert "Shapes:" in text
    assert "Scale:" in text
    assert "Source:" in text


def test_kernel_objects_share_no_inline_code():
    """A function that two instruction sets both emit as a weak symbol could be linked from the wrong one."""
    objects = sorted(ROOT.glob("build/**/sib_fast_kernels_*.dir/**/*.o"))
    if not objects or shutil.which("nm") is None:
        pytest.skip("no object files of an in-place build here, or no nm")
    for path in objects:
        symbols = subprocess.run(["nm", "-C", str(path)], capture_output=True, text=True, check=True).stdout
        weak = [line for line in symbols.splitlines() if re.search(r"^[0-9a-f]+ [WVu] ", line)]
        assert weak == [], path.name
