"""The documentation: what pages show runs, figures are those of their files, the reference has every public name and no other."""

from __future__ import annotations

import ast
import csv
import functools
import importlib
import importlib.util
import inspect
import itertools
import json
import re
import statistics
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import sib_fast
from sib_fast.testing.networks import conv_net, image_batch

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
STUDY = ROOT / "benchmarks/results/intel-xeon-2-cores/study/results"


def blocks(page: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", (DOCS / page).read_text(encoding="utf-8"), re.DOTALL)


# ---- what pages show ----------------------------------------------------------------------------------------------------
def names() -> dict[str, object]:
    """What the reader of a page is said to have."""
    model, (x, target) = conv_net(), image_batch()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    return {"torch": torch, "nn": nn, "F": F, "sib_fast": sib_fast, "model": model, "x": x, "target": target} | {
        "loader": [(x, target)], "optimizer": optimizer, "criterion": sib_fast.SIBLoss(window_size=5)
    }  # fmt: skip


def in_order(page: str, extra: dict[str, object] | None = None, edit: dict[str, str] | None = None) -> dict[str, object]:
    having = names() | (extra or {})
    for block in blocks(page):
        for old, new in (edit or {}).items():
            assert old in block
            block = block.replace(old, new)
        exec(compile(block, page, "exec"), having)
    return having


def needs(*packages: str) -> None:
    for package in packages:
        pytest.importorskip(package, reason=f"{package} is not installed", exc_type=ImportError)


def start(tmp_path, monkeypatch):
    needs("captum", "pytorch_grad_cam")
    having = in_order("start.md")
    assert having["criterion"].terms.keys() == {"loss", "base", "foreground", "background", "mask_area"}
    assert having["maps"].shape == (len(having["x"]), 1, *having["x"].shape[2:])


def concepts(tmp_path, monkeypatch):
    having = in_order("concepts.md")
    assert having["vjp"].shape == having["x"].shape
    (having["foreground"] + having["background"]).backward()
    assert all(p.grad is not None for p in having["model"].parameters() if p.dim() > 1)


def weights(tmp_path, monkeypatch):
    assert in_order("weights.md")["criterion"].terms["background"] > 0


def step(tmp_path, monkeypatch):
    # Everything but the compiler: tests/test_step.py has that.
    monkeypatch.setattr(sib_fast, "compile_step", functools.partial(sib_fast.compile_step, backend="eager"))
    assert in_order("step.md")["out"].loss.isfinite()


def explain(tmp_path, monkeypatch):
    needs("captum", "pytorch_grad_cam")
    having = in_order("explain.md")
    assert having["maps"].shape == (len(having["x"]), 1, *having["x"].shape[2:])


def data(tmp_path, monkeypatch):
    needs("scipy", "torchvision")
    from tests.lab.test_datasets import write_dogs

    write_dogs(tmp_path)
    edit = {
        "/data/dogs": str(tmp_path),
        "image_size=224": "image_size=16",
        "batch_size=97": "batch_size=2",
        "num_workers=8": "num_workers=0",
    }
    having = in_order("data.md", edit=edit)
    assert having["image"].shape == (2, 3, 16, 16)
    assert having["mask"].dtype == torch.bool


def diagnose(tmp_path, monkeypatch):
    needs("scipy", "skimage", "captum", "pytorch_grad_cam")
    from sib_fast.lab.data import EmbeddedDigits
    from sib_fast.lab.models import SmallConvNet
    from sib_fast.lab.shortcut import run

    monkeypatch.chdir(tmp_path)
    quick = functools.partial(run.diagnose, images=20, explained=2, methods=("saliency",), mean=(0.5,) * 3, std=(0.25,) * 3)
    monkeypatch.setattr("sib_fast.lab.shortcut.diagnose", quick)
    torch.manual_seed(0)
    in_order("diagnose.md", {"model": SmallConvNet().eval(), "dataset": EmbeddedDigits("test", 40)})
    assert (tmp_path / "runs/diagnosis/diagnosis.html").is_file()


def estimators(tmp_path, monkeypatch):
    having = in_order("api/estimators.md")
    assert all(0 < having["criterion"].terms[name] <= 1 for name in ("foreground", "background"))
    assert all(p.grad.isfinite().all() for p in having["model"].parameters())
    rows = torch.randn(6, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    rows[1], rows[2] = 0.0, rows[3]
    rows.requires_grad_()
    value = having["distance_correlation"](rows @ rows.T, rows[:, :2] @ rows[:, :2].T)
    assert 0 < value < 1
    assert torch.autograd.grad(value, rows)[0].isfinite().all()
    assert having["distance_correlation"]((rows * torch.nan) @ rows.T, rows @ rows.T).isnan()


RUN_HERE = {f.__name__: f for f in (start, concepts, weights, step, explain, data, diagnose, estimators)}
RUN_ELSEWHERE = {"trainers": "tests/integrations/test_pages.py", "input_gradients": "tests/test_input_gradients.py"}


def test_every_page_with_code_is_run():
    assert {page.stem for page in DOCS.rglob("*.md") if blocks(str(page.relative_to(DOCS)))} == {*RUN_HERE, *RUN_ELSEWHERE}
    assert all((ROOT / path).is_file() for path in RUN_ELSEWHERE.values())


@pytest.mark.parametrize("page", RUN_HERE)
def test_what_a_page_shows_runs(page, tmp_path, monkeypatch):
    RUN_HERE[page](tmp_path, monkeypatch)


# ---- the notebook -------------------------------------------------------------------------------------------------------
NOTEBOOK = ROOT / "examples/quickstart.ipynb"


def test_the_notebooks_cells_run_at_tiny_size(monkeypatch):
    needs("skimage", "captum", "pytorch_grad_cam")
    monkeypatch.setenv("MPLBACKEND", "agg")
    having: dict[str, object] = {}
    with torch.random.fork_rng():
        for cell in json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]:
            assert not cell.get("outputs"), "outputs are not stored"
            if cell["cell_type"] == "code":
                source = cell["source"].replace("%pip", "raise ImportError  # ")
                source = source.replace("EPOCHS = 40", "EPOCHS = 1").replace("range(200)", "range(20)").replace(", 512)", ", 64)")
                exec(compile(source, NOTEBOOK.name, "exec"), having)
    sys.modules["matplotlib.pyplot"].close("all")
    assert having["EPOCHS"] == 1
    assert having["results"].keys() == {"plain", "S-IB"}


@pytest.mark.long
def test_the_notebook_shows_what_it_says():
    """As a hosted notebook runs it: in a kernel of its own, unchanged."""
    needs("nbclient", "ipykernel", "skimage", "captum", "pytorch_grad_cam")
    import nbclient
    import nbformat

    notebook = nbformat.read(NOTEBOOK, as_version=4)
    nbformat.validate(notebook)
    nbclient.NotebookClient(notebook, timeout=1200, kernel_name="python3", resources={"metadata": {"path": str(ROOT)}}).execute()
    printed = "".join(out.get("text", "") for cell in notebook.cells for out in cell.get("outputs", []))
    found = {name: ast.literal_eval(text) for name, text in re.findall(r"^(plain|S-IB) (\{.*\})$", printed, re.MULTILINE)}
    assert found["S-IB"]["energy inside"] > found["plain"]["energy inside"] + 0.05
    assert any("image/png" in out.get("data", {}) for cell in notebook.cells for out in cell.get("outputs", []))


# ---- the reference ------------------------------------------------------------------------------------------------------
# Modules whose public names are those of their __all__, and those whose are what they define.
LISTED = ["", ".nn", ".ops", ".masks", ".estimators", ".explain", ".lab.datasets", ".lab.shortcut"]
DEFINED = [
    ".estimators.background", ".explain.metrics", ".explain.controls", ".lab.networks",
    *(f".integrations.{path.stem}" for path in sorted((ROOT / "sib_fast/integrations").glob("[a-z]*.py"))),
]  # fmt: skip
# Named on pages, in modules whose other names are the commands' own.
SINGLE = ["sib_fast.lab.panel.draw_panel", "sib_fast.lab.panel.explanation_panel"]
# What a module keeps for its own commands and tests.
INTERNAL = {"sib_fast.lab.networks.timm_config", "sib_fast.lab.networks.classifier_parameters"}


def entries() -> list[str]:
    found = []
    for page in sorted((DOCS / "api").glob("*.md")):
        module = None
        for kind, name in re.findall(r"^\.\. (?:py:)?(\w+):: ([\w.]+)$", page.read_text(encoding="utf-8"), re.MULTILINE):
            if kind in ("module", "currentmodule"):
                module = name
            else:
                found.append(f"{module}.{name}")
    return found


def defined_in(path: Path) -> list[str]:
    """Public classes and functions of a file, which need not be importable here."""
    tree = ast.parse(path.read_text(encoding="utf-8")).body
    return [node.name for node in tree if isinstance(node, (ast.ClassDef, ast.FunctionDef)) and not node.name.startswith("_")]


def listed_in(path: Path) -> list[str]:
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == "__all__":
            return ast.literal_eval(node.value)
    raise AssertionError(f"{path} has no __all__")


def public_names() -> set[str]:
    folder = ROOT / "sib_fast"
    out: dict[str, str] = {}
    again = {"nn.prepare", "nn.restore", "ops.foreground_mask", "ops.region_statistics"}  # sib_fast has them too
    for module in LISTED:
        inside = folder.joinpath(*module.split(".")[1:])
        for name in listed_in(inside / "__init__.py"):
            is_module = (inside / name / "__init__.py").exists() or (inside / f"{name}.py").exists()
            of_the_package = module + "." + name in {".nn", ".masks", ".estimators", ".estimators.background"}
            if not (is_module and of_the_package) and f"{module}.{name}".lstrip(".") not in again:
                out[f"sib_fast{module}.{name}"] = name
    for module in DEFINED:
        for name in defined_in(folder.joinpath(*module.split(".")[1:]).with_suffix(".py")):
            out[f"sib_fast{module}.{name}"] = name
    return {*out, *SINGLE} - INTERNAL


def test_every_public_name_has_one_entry_and_every_entry_a_name():
    found = entries()
    assert len(found) > 80
    assert sorted(found) == sorted(public_names())


def test_what_the_reference_leaves_out_exists():
    assert all(
        name.rsplit(".", 1)[1] in (ROOT / f"{name.rsplit('.', 1)[0].replace('.', '/')}.py").read_text() for name in INTERNAL
    )


def resolves(dotted: str) -> bool:
    parts = dotted.split(".")
    for cut in range(len(parts), 0, -1):
        try:
            found = importlib.import_module(".".join(parts[:cut]))
        except ModuleNotFoundError as error:
            if not (error.name or "").startswith("sib_fast"):
                return True  # an extra is not installed here
            continue
        except ImportError:
            return True
        for part in parts[cut:]:
            if not hasattr(found, part):
                return part in getattr(found, "__annotations__", {})
            found = getattr(found, part)
        return True
    return False


def test_names_on_pages_exist():
    pages = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *DOCS.rglob("*.md")]
    named = {name for page in pages for name in re.findall(r"\bsib_fast(?:\.[A-Za-z_]\w*)+", page.read_text(encoding="utf-8"))}
    files = ("md", "py", "h", "pth", "network", "egg", "so")
    assert len(named) > 30
    assert [name for name in sorted(named | {*entries()}) if name.split(".")[1] not in files and not resolves(name)] == []


def test_entries_of_functions_and_classes_have_docstrings():
    missing = []
    for name in entries():
        module, attribute = name.rsplit(".", 1)
        try:
            found = getattr(importlib.import_module(module), attribute)
        except ImportError:
            continue
        if (inspect.isclass(found) or inspect.isfunction(found)) and not (found.__doc__ or "").strip():
            missing.append(name)
    assert missing == []


# ---- the site -----------------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def site():
    spec = importlib.util.spec_from_file_location("docs_tool", ROOT / "tools/docs.py")
    tool = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tool)
    return tool


def test_every_page_is_in_the_sites_contents(site):
    """What Sphinx would say after half a minute."""
    pages = {name.removesuffix(".md"): source for source, name in site.places().items()}
    shown = {"index"}
    for name, source in pages.items():
        for contents in re.findall(r"```\{toctree\}\n(.*?)```", source.read_text(encoding="utf-8"), re.DOTALL):
            for entry in (line for line in contents.splitlines() if line and not line.startswith(":")):
                pattern = (Path(name).parent / (re.search(r"<(.+)>", entry) or [None, entry])[1]).as_posix()
                matched = {page for page in pages if Path(page).match(pattern) and page.count("/") == pattern.count("/")}
                assert matched, f"{name} lists {entry}, which is no page"
                shown |= matched
    assert shown == pages.keys()


def test_links_are_the_sites_own(site):
    pages = site.places()
    page = DOCS / "explain.md"
    assert site.rewritten("[a](errors.md#b) [c](https://d.e)", page, pages) == "# Explain\n\n[a](errors.md#b) [c](https://d.e)"
    assert "[a](contributing.md)" in site.rewritten("[a](../CONTRIBUTING.md)", page, pages)
    assert "[a](examples.md)" in site.rewritten("[a](../examples)", page, pages)
    assert "a (`tools/docs.py`)" in site.rewritten("[a](../tools/docs.py)", page, pages)
    assert "`[a](../tools/docs.py)`" in site.rewritten("`[a](../tools/docs.py)`", page, pages)
    assert "[a](../errors.md)" in site.rewritten("[a](../../../docs/errors.md)", ROOT / "sib_fast/ops/softmax/README.md", pages)


# ---- figures and lists --------------------------------------------------------------------------------------------------
def marked(page: str, mark: str) -> str:
    return re.search(rf"<!-- {mark} -->\n?(.*?)<!-- /{mark} -->", (DOCS / page).read_text(encoding="utf-8"), re.DOTALL)[1]


TERMS = {"plain": "none", "sib": "`variance`", "sib_relative": "`relative_variance`", "foreground_only": "none"}


def selection() -> list[str]:
    """The rows of docs/weights.md: means over the selection's seeds."""
    runs: dict[tuple, list[tuple[float, float]]] = {}
    rows = [*csv.DictReader((DOCS / "study/selection.csv").read_text(encoding="utf-8").splitlines())]
    for row in sorted(rows, key=lambda row: (row["arch"], row["variant"] != "plain")):
        of = {"plain": "none", "sib": "`variance`", "sib_relative": "`relative_variance`", "foreground_only": "none"}.get(
            row["variant"]
        )
        if of and (row["variant"] != "foreground_only" or row["lambda_fg"] == "10.0"):
            weight = f"{float(row['lambda_bg']):g}".replace("e+0", "e") if row["lambda_bg"] else "plain training"
            if row["variant"] == "foreground_only":
                weight = f"0, `lambda_fg={float(row['lambda_fg']):g}`"
            runs.setdefault((row["arch"], of, weight), []).append((float(row["accuracy_shifted"]), float(row["vjp_energy"])))
    mean = statistics.fmean
    return [
        f"| `{arch}` | {of} | {weight} | {mean(a for a, _ in found):.3f} | {mean(e for _, e in found):.3f} |"
        for (arch, of, weight), found in runs.items()
    ]


def test_the_table_of_weights_is_the_selections():
    assert marked("weights.md", "selection").strip().splitlines()[2:] == selection()


def test_the_ratio_of_the_terms_is_the_studys():
    ratios = []
    for path in sorted(STUDY.glob("*.sib*.seed*.json")):
        record = json.loads(path.read_text())
        if record["variant"] in ("sib", "sib_relative"):
            weight = {"sib": 1e6, "sib_relative": {"small_conv_net": 0.1, "small_resnet": 0.3}[record["arch"]]}[record["variant"]]
            ratios.append(weight * record["terms"]["background"] / record["terms"]["base"])
    assert len(ratios) == 20
    assert marked("weights.md", "ratio") == f"{min(ratios):.1f} to {max(ratios):.1f}"


def test_every_dependency_has_its_licence():
    tomllib = pytest.importorskip("tomllib", reason="Python 3.11")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    wanted = [
        *project["dependencies"],
        *itertools.chain(*(extras[e] for e in extras.keys() - {"all", "bench", "test", "dev", "docs"})),
    ]
    rows = {row.split("|")[1].strip() for row in marked("policy.md", "licences").splitlines()[2:]}
    assert {re.split(r"[<>=\[]", name)[0] for name in wanted} | {"triton"} == rows


def test_the_citation_has_this_version():
    yaml = pytest.importorskip("yaml", reason="comes with the extras")
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert citation["version"] == sib_fast.__version__
    assert citation["license"] == "Apache-2.0"
    assert "2511.09239" in citation["references"][0]["url"]
