"""CONTRIBUTING's two recipes: the files that it names hold what it says, and a backend that is added so works."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from sib_fast import SIBLoss, _backends
from sib_fast.estimators import BACKGROUNDS, ESTIMATORS
from sib_fast.loss import OBJECTIVES
from sib_fast.masks import MASKS

ROOT = Path(__file__).parent.parent


def rows(name: str) -> dict[str, str]:
    """The table of a recipe: file -> what."""
    page = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    table = page.partition(f"<!-- {name} -->")[2].partition(f"<!-- /{name} -->")[0]
    return dict(re.findall(r"^\| `([^`]+)` \| (.+) \|$", table, re.MULTILINE))


@pytest.mark.parametrize("name", [*ESTIMATORS, *BACKGROUNDS])
def test_every_estimator_is_in_the_files_that_the_recipe_names(name):
    files = [file.replace("<name>", name if name in ESTIMATORS else "background") for file in rows("estimator")]
    assert len(files) == 7
    values = "tests/estimators/test_values.py"
    files[files.index(values)] = values if name in ESTIMATORS else values.replace("values", "backgrounds")
    # A fault names the file, and those of the background terms have one file.
    words = {"tools/faults.py": f"sib_fast/estimators/{name if name in ESTIMATORS else 'background'}.py"}
    assert [file for file in files if not re.search(rf"\b{words.get(file, name)}\b", (ROOT / file).read_text())] == []


@pytest.mark.parametrize("recipe", ["estimator", "backend"])
def test_the_recipes_files_hold_what_they_are_said_to(recipe):
    example = {"<name>": "cka", "<backend>": "triton", "<op>": "hsic_objective"}
    for file, what in rows(recipe).items():
        for mark, value in example.items():
            file, what = file.replace(mark, value), what.replace(mark, value)
        text = (ROOT / file).read_text()
        said = [word for word in re.findall(r"`([^`]+)`", what) if not word.endswith(".py") and word != "test_names"]
        assert [word for word in said if word not in text] == [], file


def test_the_losss_docstring_has_every_name():
    names = [*ESTIMATORS, *BACKGROUNDS, *OBJECTIVES, *MASKS]
    assert [name for name in names if f'"{name}"' not in SIBLoss.__doc__] == []


@pytest.mark.skipif(_backends.MISSING["cpu"] is not None, reason="the new backend's kernels are the CPU's")
def test_a_backend_that_is_added_as_the_recipe_says(tmp_path):
    """In a copy of the package: chosen, refused and reported under its name."""
    ignore = shutil.ignore_patterns("lib", "lab", "explain", "integrations", "__pycache__", "*.so")
    package = shutil.copytree(ROOT / "sib_fast", tmp_path / "sib_fast", ignore=ignore)
    (package / "lib").symlink_to(ROOT / "sib_fast/lib")
    kernels = (
        "import torch\nforward = torch.ops.sib_fast._hsic_objective\nbackward = torch.ops.sib_fast._hsic_objective_backward\n"
    )
    edits = {
        "sib_fast/_extension.py": lambda text: text + '\nMISSING["abacus"] = None\n',
        "sib_fast/_backends.py": lambda text: text.replace("KERNEL_DEVICES = {", 'KERNEL_DEVICES = {"abacus": "cpu", '),
        "sib_fast/ops/<op>/<backend>.py": lambda _: kernels,
        "sib_fast/ops/<op>/__init__.py": lambda text: text.replace("KERNELS = [", 'KERNELS = ["abacus", '),
    }
    assert edits.keys() == rows("backend").keys()
    for file, edit in edits.items():
        path = tmp_path / file.replace("<op>", "hsic_objective").replace("<backend>", "abacus")
        path.write_text(edit(path.read_text() if path.exists() else ""))
    program = (
        "import torch, sib_fast\n"
        "from sib_fast import doctor\n"
        "from sib_fast.ops import hsic_objective\n"
        "rows = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)\n"
        "def run(backend):\n"
        "    loss = hsic_objective(rows.sum(), rows @ rows.T, rows @ rows.T, rows[:, 0], lambda_fg=1, lambda_bg=1,\n"
        "                          backend=backend)[0]\n"
        "    return loss, *torch.autograd.grad(loss, rows)\n"
        "print(all(torch.equal(a, b) for a, b in zip(run('abacus'), run('cpu'))))\n"
        "print('sib_fast.ops.hsic_objective.abacus' in __import__('sys').modules, 'abacus' in sib_fast.BACKENDS)\n"
        "try: sib_fast.foreground_mask(torch.ones(1, 1, 2, 2), backend='abacus')\n"
        "except RuntimeError as error: print(error)\n"
        "print(dict(doctor.report())['backend abacus'])\n"
        "print(dict(doctor.report())['auto on cpu'])\n"
    )
    result = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        cwd="/",
        env={**os.environ, "PYTHONPATH": str(tmp_path), "OMP_NUM_THREADS": "1"},
    )
    assert result.stdout.splitlines() == [
        "True",
        "True True",
        "foreground_mask: backend 'abacus' has no kernel of this op. Use one of 'auto', 'reference', 'cpu', 'cuda', 'triton'",
        "usable",
        "mask by cpu, statistics by cpu, objective by abacus",
    ], result.stdout + result.stderr
