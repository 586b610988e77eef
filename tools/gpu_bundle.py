"""What travels to a GPU's machine (build/gpu), and the files of benchmarks/results that what comes back makes."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path
from typing import Any

import triton_cache
from gpu_run import CARRIED, ROOT

from benchmarks.journal import Journal, read, sources

LIBRARIES = ROOT / "sib_fast/lib"
LARGEST = 60 * 2**20  # bytes of tree and bundle: what may be brought to a machine without a network
ARCHITECTURE = "9.0a"  # H100 and H200: what the bundle is for, unless it is told another


def _of_one_architecture() -> Path:
    """The built libraries; anew, for one architecture alone, where they hold more: together they are too much to travel."""
    info = LIBRARIES / "build_info.json"
    built = json.loads(info.read_text()).get("cuda_architectures", "").split() if info.is_file() else []
    made = min((path.stat().st_mtime for path in LIBRARIES.glob("*.so")), default=0.0)
    if built == [ARCHITECTURE.replace(".", "") + "-real"] and all(p.stat().st_mtime <= made for p in (ROOT / "csrc").rglob("*")):
        return LIBRARIES
    folder = ROOT / "build/gpu-one"
    command = [sys.executable, "setup.py", "-q", "build_ext", "--build-lib", folder / "lib", "--build-temp", folder / "temp"]
    environment = {**os.environ, "TORCH_CUDA_ARCH_LIST": ARCHITECTURE, "SIB_FAST_CPU": "1", "SIB_FAST_BLOCKS": "0"}
    environment["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{environment['PATH']}"
    subprocess.run(command, cwd=ROOT, check=True, env=environment)
    return folder / "lib/sib_fast/lib"


def bundle(triton: str | None = None) -> int:
    """build/gpu: the libraries of this tree, stripped, its commit and the digest of its sources. triton: a python with the torch
    and the Triton of the GPU's machine, which then compiles Triton's kernels here."""
    from benchmarks.provenance import commit

    shutil.rmtree(CARRIED, ignore_errors=True)
    CARRIED.mkdir(parents=True)
    shutil.copytree(_of_one_architecture(), CARRIED / "lib")
    for library in (CARRIED / "lib").glob("*.so"):
        if shutil.which("strip"):
            subprocess.run(["strip", "--strip-unneeded", library], check=True)
    if triton:
        with tempfile.TemporaryDirectory() as folder:
            subprocess.run([triton, ROOT / "tools/triton_cache.py", folder], cwd=ROOT, check=True)
            triton_cache.localise(Path(folder))
            with tarfile.open(CARRIED / "triton.tar.xz", "w:xz") as archive:
                for path in sorted(p for p in Path(folder).glob("*/*") if p.name.endswith(triton_cache.KEPT)):
                    archive.add(path, path.relative_to(folder))
    (CARRIED / "stamp.json").write_text(json.dumps({"commit": commit(), "sources": sources()}) + "\n")
    tracked = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True).stdout.split("\0")
    size, tree = (
        sum(path.stat().st_size for path in paths if path.is_file())
        for paths in (CARRIED.rglob("*"), (ROOT / name for name in tracked))
    )
    print(f"{CARRIED}: commit {commit()[:12]}, {size / 2**20:.1f} MiB beside a tree of {tree / 2**20:.1f}")
    if size + tree > LARGEST:
        print(f"gpu.py: together more than {LARGEST / 2**20:.0f} MiB, which is what may travel", file=sys.stderr)
        return 1
    return 0


def stale() -> str | None:
    """Why the bundle that lies here is not this tree's, or None."""
    stamp = CARRIED / "stamp.json"
    if not stamp.is_file():
        return "its stamp.json is missing" if CARRIED.is_dir() else None
    made = json.loads(stamp.read_text())["sources"]
    return None if made == sources() else f"it was made from sources {made}, this tree is {sources()}"


def collect(folder: Path, files: list[Path]) -> int:
    """The files that benchmarks/results stores, from the lines of one or more calls on this tree; each holds the verdicts."""
    from benchmarks import gate
    from benchmarks.provenance import file_of, write_json

    runs = [line["run"] for path in files for line in read(path) if line["run"].startswith(sources())]
    if not runs:
        print("gpu.py: no line of these files is of this tree's sources", file=sys.stderr)
        return 1
    lines = Journal(earlier=files, run=runs[-1]).lines()
    source, found = next((line["row"] for line in reversed(lines) if line["suite"] == "run"), {}), gate.verdicts(lines)
    suites = dict.fromkeys(line["suite"] for line in lines)
    for suite in (suite for suite in ("head", "step", "convolution_choice") if suite in suites):
        write_json(folder / f"{suite}.json", file_of(lines, suite, found, source))
    benches = list({line["id"]: line["row"] for line in lines if line["suite"] == "benchmarks" and "row" in line}.values())
    machine = {line["id"]: line["row"] for line in lines if line["suite"] == "machine" and "row" in line}
    others = {"ops": {"tests": found, "benchmarks": benches}, "machine": {**source, **machine}}
    others["tests"] = {**source, "verdicts": found, "red": _red(lines)}
    for name, data in others.items():
        if len(data) > 0 and (name != "ops" or benches) and (name != "machine" or machine):
            write_json(folder / f"{name}.json", data)
    print("\n".join(table(found, lines)))
    return 0


def _red(lines: list[dict[str, Any]]) -> dict[str, str]:
    last = {line["id"]: line for line in lines if line["suite"] in ("tests", "gpu", "loss", "sanitizer")}
    return {item: str(line.get("why"))[:400] for item, line in last.items() if line["state"] in ("failed", "crashed")}


def table(found: dict[str, Any], lines: list[dict[str, Any]]) -> list[str]:
    """Verdicts, the heads' times and the step's ratios, as far as they are there."""
    from benchmarks.head import line_of
    from benchmarks.provenance import rows_of
    from benchmarks.step import goals

    out = [f"  {name}: {one['why'] or 'green'}"[:300] for name, one in found.items()]
    out += [f"  {line_of(row)}" for row in rows_of(lines, "head") if "variants" in row]
    steps = rows_of(lines, "step")
    for row in (row for row in steps if "ratio_to_plain" in row):
        out.append(f"  {row['model']} {row['precision']} {row['layout']} over plain {row['ratio_to_plain']}")
    return [*out, f"  goals: {goals(steps)}"]
