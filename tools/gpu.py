"""Proof and measurement on a GPU, in phases, within a time budget, with no network: `bash tools/gpu.sh OUT [phase …]`.

build      the libraries against the machine's own torch and architecture; where that fails, the prebuilt ones of build/gpu/lib
smoke      one parity check of every kernel family and op
tests      tests/gpu, then each backend's tests (the verdicts that benchmarks ask for), then the loss on each backend
ceilings   copy bandwidth, matrix rates, error against chain length, naive's kernels one by one
head       benchmarks.head: baselines and every green backend, in every product mode
ops        the pytest-benchmark suites
step       benchmarks.step --preset issue: ResNet-50 in bf16 first, then the rest of the table as far as the time goes
choice     benchmarks.convolution_choice: what the rules of the convolution on CUDA should be; asked for
sanitizer  compute-sanitizer memcheck and racecheck over every kernel on small shapes, caching off

OUT gets summary.json (rewritten after every phase), log.txt and one JSON a measurement: 9 files, none large. A backend whose
tests are red is left out of the timings, and the table at the end says so. Verdicts and ceilings of an earlier call on the same
machine and commit are used again (build/gpu-results). --prepare, on the machine that has git and a compiler, writes build/gpu:
the prebuilt libraries and the commit. --dry-run runs the same code on the CPU, with small sizes.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import sysconfig
import time
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
LIBRARIES, CARRIED, KEPT = ROOT / "sib_fast/lib", ROOT / "build/gpu", ROOT / "build/gpu-results"
# In the order of what the ledger wants first; seconds that a phase may take at most.
PHASES = {
    "build": 240, "smoke": 90, "tests": 420, "ceilings": 60, "head": 300, "ops": 240, "step": 300, "choice": 180,
    "sanitizer": 300,
}  # fmt: skip
DEFAULT = [phase for phase in PHASES if phase not in ("choice", "sanitizer")]


class Run:
    """One call: its clock, its log, and its results as they come."""

    def __init__(self, out: Path, budget: float, dry: bool) -> None:
        self.out, self.dry, self.deadline = out, dry, time.monotonic() + budget
        out.mkdir(parents=True, exist_ok=True)
        (out / "log.txt").write_text("")
        self.device, self.backends = ("cpu", ["cpu"]) if dry else ("cuda", ["cuda", "triton"])
        self.summary: dict[str, Any] = {"dry_run": dry, "python": sys.executable, "phases": {}}

    def left(self, at_most: float) -> float:
        return max(1.0, min(at_most, self.deadline - time.monotonic()))

    def command(self, *command: object, timeout: float, **environment: str) -> tuple[int, str]:
        """(exit status, end of the output); 124 where the time ran out. The whole of it goes to the log."""
        line = " ".join(map(str, command))
        print(f"$ {line}  (at most {timeout:.0f} s)", flush=True)
        env = {**os.environ, "PYTHONUNBUFFERED": "1", **environment}
        process = subprocess.Popen(
            [str(c) for c in command], cwd=ROOT, env=env, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            start_new_session=True,
        )  # fmt: skip
        try:
            text, _ = process.communicate(timeout=timeout)
            status = process.returncode
        except subprocess.TimeoutExpired:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, 9)  # pytest's and inductor's own workers too
            text, _ = process.communicate()
            status = 124
        with (self.out / "log.txt").open("a") as log:
            log.write(f"$ {line}\n{text[-200_000:]}\nexit status {status}\n\n")
        return status, text[-3000:]

    def python(self, *arguments: object, timeout: float, **environment: str) -> tuple[int, str]:
        return self.command(sys.executable, *arguments, timeout=timeout, **environment)

    def write(self) -> None:
        partial = self.out / "summary.partial"
        partial.write_text(json.dumps(self.summary, indent=1) + "\n")
        partial.replace(self.out / "summary.json")

    def kept(self, name: str) -> Path | None:
        """A result of this call, or of an earlier one on this machine at this commit."""
        sys.path.insert(0, str(ROOT))
        from benchmarks.provenance import commit

        for path in (self.out / name, KEPT / name):
            if path.is_file() and json.loads(path.read_text()).get("commit") == commit():
                return path
        return None

    def keep(self, name: str) -> None:
        if (self.out / name).is_file() and not self.dry:
            KEPT.mkdir(parents=True, exist_ok=True)
            shutil.copy(self.out / name, KEPT / name)


# ---- phases: each returns what goes into the summary; "ok" decides the table ------------------------------------------------


def build(run: Run, seconds: float) -> dict[str, Any]:
    found: dict[str, Any] = {"how": None}
    if run.dry:
        found["how"] = "dry run: what is built here"
    else:
        found["how"] = _compile(run, seconds)
        if found["how"] is None and (CARRIED / "lib").is_dir():
            shutil.rmtree(LIBRARIES, ignore_errors=True)
            shutil.copytree(CARRIED / "lib", LIBRARIES)
            found["how"] = "prebuilt (the build here failed: log.txt)"
    status, text = run.python("-m", "sib_fast", "doctor", timeout=run.left(60))
    return {"ok": found["how"] is not None and status == 0, **found, "doctor": text.strip().splitlines()}


def _compile(run: Run, seconds: float) -> str | None:
    """How it was built, or None. With _blocks and the emulation where Python's headers and pybind11 are."""
    import torch

    major, minor = torch.cuda.get_device_capability()
    architecture = f"{major}.{minor}{'a' if (major, minor) == (9, 0) else ''}"
    blocks = (Path(sysconfig.get_path("include")) / "Python.h").is_file() and importlib.util.find_spec("pybind11")
    for with_blocks in ("1", "0") if blocks else ("0",):
        status, _ = run.python(
            "setup.py", "build_ext", "--inplace", timeout=run.left(seconds), SIB_FAST_CPU="1", SIB_FAST_CUDA="1",
            SIB_FAST_BLOCKS=with_blocks, TORCH_CUDA_ARCH_LIST=architecture, MAX_JOBS=str(os.cpu_count()),
        )  # fmt: skip
        if status == 0:
            return f"built here for {architecture}, {'with' if with_blocks == '1' else 'without'} _blocks"
    # A setuptools too old for pyproject.toml, say: CMake alone, which setup.py only drives.
    if _cmake(run, seconds, architecture.replace(".", "") + "-real", LIBRARIES):
        return f"built here for {architecture} by CMake alone"
    return None


def _cmake(run: Run, seconds: float, architectures: str, output: Path) -> bool:
    """Configures and builds as setup.py does, without it. No architectures: without CUDA."""
    import torch

    folder, nvcc = ROOT / "build/cmake-alone", shutil.which("nvcc", path=os.environ["PATH"] + ":/usr/local/cuda/bin")
    configure = [
        "cmake", "-S", ROOT, "-B", folder, "-DCMAKE_BUILD_TYPE=Release", f"-DSIB_FAST_OUTPUT_DIR={output}",
        f"-DSIB_FAST_TORCH_ROOT={Path(torch.__file__).parent}", f"-DSIB_FAST_CUDA_ARCHITECTURES={architectures}",
        *([f"-DCMAKE_CUDA_COMPILER={nvcc}"] if architectures and nvcc else []), *(["-GNinja"] if shutil.which("ninja") else []),
    ]  # fmt: skip
    compile_ = ["cmake", "--build", folder, "--parallel", os.cpu_count()]
    return all(run.command(*command, timeout=run.left(seconds))[0] == 0 for command in (configure, compile_))


def smoke(run: Run, seconds: float) -> dict[str, Any]:
    path = run.out / "smoke.partial"
    status, text = run.python("-m", "tests.gpu.smoke", path, *run.backends, timeout=run.left(seconds))
    found = json.loads(path.read_text()) if path.is_file() else {"end": text}
    path.unlink(missing_ok=True)
    return {"ok": status == 0, "checks": found}


def tests(run: Run, seconds: float) -> dict[str, Any]:
    began, jobs = time.monotonic(), 1 if run.dry else 6

    def left() -> float:
        return run.left(seconds - (time.monotonic() - began))

    gpu = _pytest(run, "tests/gpu", timeout=left() * 0.5)
    run.python(
        "-m", "benchmarks.gate", "--out", run.out / "tests.json", "--timeout", int(left() * 0.4), "--jobs", jobs, *run.backends,
        timeout=left(),
    )  # fmt: skip
    run.keep("tests.json")
    path = run.kept("tests.json")
    verdicts = json.loads(path.read_text())["verdicts"] if path else {}
    wanted = " or ".join([*run.backends, "auto"])
    loss = _pytest(run, "tests/test_loss.py", "tests/test_autocast.py", "tests/test_compile.py", "-k", wanted, timeout=left())
    ok = gpu["ok"] and loss["ok"] and all(verdicts.get(b, {}).get("green") for b in run.backends)
    return {"ok": ok, "tests/gpu": gpu, "backends": verdicts, "loss": loss}


def _pytest(run: Run, *arguments: str, timeout: float) -> dict[str, Any]:
    """Counts, failures with their first words, and the slowest; from a junit file, which a run cut short does not leave."""
    report = run.out / "junit.partial"
    command = ["-m", "pytest", "-q", "-p", "no:cacheprovider", f"--junitxml={report}", *arguments]
    if run.dry:
        command += ["-x"] if "tests/gpu" in arguments else ["--collect-only"]
    status, text = run.python(*command, timeout=timeout)
    if run.dry and status == 0 and not report.is_file():
        return {"ok": True, "end": text[-200:]}
    if not report.is_file():
        return {"ok": False, "status": status, "end": text}
    cases = list(ElementTree.parse(report).iter("testcase"))
    report.unlink()
    red = {}
    for case in cases:
        bad = next((case.find(kind) for kind in ("failure", "error") if case.find(kind) is not None), None)
        if bad is not None:
            red[f"{case.get('classname')}::{case.get('name')}"] = (bad.get("message") or "")[:400]
    skipped = sum(case.find("skipped") is not None for case in cases)
    slowest = sorted(((float(case.get("time", 0)), case.get("name")) for case in cases), reverse=True)[:5]
    counts = {"passed": len(cases) - len(red) - skipped, "failed": len(red), "skipped": skipped}
    return {"ok": status == 0, **counts, "red": dict(list(red.items())[:40]), "slowest": slowest}


def ceilings(run: Run, seconds: float) -> dict[str, Any]:
    small = ["--small"] if run.dry else []
    path = run.out / "ceilings.json"
    status, text = run.python(
        "-m", "benchmarks.machine", "--out", path, "--device", run.device, *small, timeout=run.left(seconds)
    )  # fmt: skip
    run.keep("ceilings.json")
    found = json.loads(path.read_text()) if path.is_file() else {}
    return {"ok": status == 0, "ceilings": found.get("ceilings"), "chain_error": found.get("chain_error"), "end": text[-200:]}


def _measured(run: Run) -> list[object]:
    """What an earlier phase found, so that the benchmarks neither test nor measure it again."""
    out: list[object] = []
    for name, option in (("tests.json", "--tests"), ("ceilings.json", "--ceilings")):
        path = run.kept(name)
        out += [option, path] if path else []
    return out


def head(run: Run, seconds: float) -> dict[str, Any]:
    seconds = run.left(seconds)
    path = run.out / "head.json"
    options = ["--preset", "smoke", "--rounds", 3] if run.dry else ["--compiled", "--budget", int(seconds * 0.75)]
    options += [] if run.dry else ["--precisions", *_precisions()]
    options += ["--preset", run.summary["preset"]] if not run.dry else []
    status, text = run.python(
        "-m", "benchmarks.head", "--out", path, "--device", run.device, *options, *_measured(run), timeout=seconds
    )  # fmt: skip
    rows = json.loads(path.read_text())["rows"] if path.is_file() else []
    return {"ok": status == 0 and bool(rows), "rows": [_short(row) for row in rows], "end": text[-500:]}


def _precisions() -> list[str]:
    """The product modes that this version of region_statistics has."""
    code = (
        "import inspect, sib_fast\n"
        "print('ieee tf32x3 tf32' if 'precision' in inspect.signature(sib_fast.region_statistics).parameters else '')"
    )
    return subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True).stdout.split()


def _short(row: dict[str, Any]) -> dict[str, Any]:
    times = {name: one["device_ms"]["median"] if "device_ms" in one else "failed" for name, one in row["variants"].items()}
    return {"case": list(row["case"].values()), "ms": times, "floor_ms": row["floor_ms"]}


def ops(run: Run, seconds: float) -> dict[str, Any]:
    verdicts = run.kept("tests.json")
    green = {name: one["green"] for name, one in json.loads(verdicts.read_text())["verdicts"].items()} if verdicts else {}
    red = [name for name in run.backends if not green.get(name)]
    if len(red) == len(run.backends):
        return {"ok": False, "why": "no backend's tests are green"}
    preset = "smoke" if run.dry else run.summary["preset"]
    # Forward and step of each op: the head has a phase of its own.
    wanted = " and ".join(["not test_head", "not reference", *(f"not {name}" for name in red)])
    path = run.out / "ops.json"
    status, text = run.python(
        "-m", "pytest", "benchmarks", "--benchmark-only", "-q", "-p", "no:cacheprovider", "--no-gate", "--device", run.device,
        "--preset", preset, "-k", wanted, f"--benchmark-json={path}", timeout=run.left(seconds),
    )  # fmt: skip
    return {"ok": status == 0, "left_out": red, "end": text[-500:]}


def step(run: Run, seconds: float) -> dict[str, Any]:
    seconds = run.left(seconds)
    small = ["--models", "resnet18", "--images", 2, "--size", 32, "--rounds", 1]
    what = small if run.dry else ["--preset", "issue", "--budget", int(seconds * 0.75), "--profile"]
    verdicts = run.kept("tests.json")
    gate = ["--tests", verdicts] if verdicts else []
    status, text = run.python(
        "-m", "benchmarks.step", "--out", run.out / "step.json", "--device", run.device, *what, *gate, timeout=seconds
    )  # fmt: skip
    return {"ok": status == 0, "end": text[-2000:]}


def choice(run: Run, seconds: float) -> dict[str, Any]:
    small = ["--images", 1, "--rounds", 1] if run.dry else []
    verdicts = run.kept("tests.json")
    gate = ["--tests", verdicts] if verdicts else []
    status, text = run.python(
        "-m", "benchmarks.convolution_choice", "--out", run.out / "convolution_choice.json", "--device", run.device, *small,
        *gate, timeout=run.left(seconds),
    )  # fmt: skip
    return {"ok": status == 0, "end": text[-2000:]}


def sanitizer(run: Run, seconds: float) -> dict[str, Any]:
    tool = shutil.which("compute-sanitizer")
    if tool is None and not run.dry:
        return {"ok": False, "why": "no compute-sanitizer on PATH"}
    found: dict[str, Any] = {}
    for backend in run.backends:
        for check in ("memcheck", "racecheck"):
            before = [] if run.dry else [tool, "--tool", check, "--error-exitcode", 9, "--print-limit", 20]
            status, text = run.command(
                *before, sys.executable, "-m", "tests.gpu.sanitize", backend,
                timeout=run.left(seconds / (2 * len(run.backends))), PYTORCH_NO_CUDA_MEMORY_CACHING="1",
            )  # fmt: skip
            found[f"{backend} {check}"] = {"status": status, "end": text[-600:]}
            if run.dry:
                break
    return {"ok": all(one["status"] == 0 for one in found.values()), "checks": found}


# ---- before and after -------------------------------------------------------------------------------------------------------


LENT_ARCHITECTURE = "9.0a"  # an H200


def _of_one_architecture() -> Path:
    """The built libraries; anew, for the lent GPU alone, where they hold more: all of them together are too much to travel."""
    info = LIBRARIES / "build_info.json"
    built = json.loads(info.read_text()).get("cuda_architectures", "").split() if info.is_file() else []
    if len(built) <= 1:
        return LIBRARIES
    folder = ROOT / "build/gpu-one"
    command = [sys.executable, "setup.py", "-q", "build_ext", "--build-lib", folder / "lib", "--build-temp", folder / "temp"]
    environment = {**os.environ, "TORCH_CUDA_ARCH_LIST": LENT_ARCHITECTURE, "SIB_FAST_CPU": "1", "SIB_FAST_BLOCKS": "0"}
    environment["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{environment['PATH']}"
    subprocess.run(command, cwd=ROOT, check=True, env=environment)
    return folder / "lib/sib_fast/lib"


def prepare() -> int:
    """build/gpu: the libraries of this tree, stripped, and its commit, for a machine that has neither git nor our .venv."""
    sys.path.insert(0, str(ROOT))
    shutil.rmtree(CARRIED, ignore_errors=True)
    CARRIED.mkdir(parents=True)
    from benchmarks.provenance import commit

    (CARRIED / "commit").write_text(commit() + "\n")
    libraries = _of_one_architecture()
    if libraries.is_dir():
        shutil.copytree(libraries, CARRIED / "lib")
        for library in (CARRIED / "lib").glob("*.so"):
            if shutil.which("strip"):
                subprocess.run(["strip", "--strip-unneeded", library], check=True)
    size = sum(path.stat().st_size for path in CARRIED.rglob("*") if path.is_file()) / 2**20
    print(f"{CARRIED.relative_to(ROOT)}: commit {commit()[:12]}, {size:.1f} MiB. Carry it: docs/benchmarks.md has the calls.")
    return 0


def table(summary: dict[str, Any]) -> str:
    lines = []
    for name, one in summary["phases"].items():
        word = "ok" if one["ok"] else "RED"
        lines.append(f"{name:<10} {word:<4} {one['seconds']:>5.0f} s  {one.get('why') or one.get('how') or ''}")
    for backend, one in summary["phases"].get("tests", {}).get("backends", {}).items():
        lines.append(f"  {backend}: {'green' if one['green'] else 'LEFT OUT of the timings: ' + str(one['why'])[:300]}")
    for row in summary["phases"].get("head", {}).get("rows", []):
        lines.append(f"  {row['case']} ms {row['ms']} floors {row['floor_ms']}")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, nargs="?")
    parser.add_argument("phases", nargs="*", help=f"of {', '.join(PHASES)}; default all but choice and sanitizer")
    parser.add_argument("--budget", type=float, default=560, help="seconds for the whole call (the lent machine gives 600)")
    parser.add_argument("--preset", default="quick", help="sizes of head and ops: quick or full")
    parser.add_argument("--dry-run", action="store_true")
    parser.add_argument("--prepare", action="store_true")
    args = parser.parse_intermixed_args()
    if args.prepare:
        return prepare()
    unknown = sorted(set(args.phases) - PHASES.keys())
    if args.out is None or unknown:
        parser.error(f"unknown phase: {', '.join(unknown)}" if unknown else "OUT must be given")
    run = Run(args.out.resolve(), args.budget, args.dry_run)
    run.summary["preset"] = args.preset
    if not args.dry_run:
        import torch

        if not torch.cuda.is_available():
            print("gpu.py: torch sees no GPU here (--dry-run runs the same phases on the CPU)", file=sys.stderr)
            return 2
    for phase in args.phases or DEFAULT:
        began = time.monotonic()
        if run.deadline - began < 5:
            run.summary["phases"][phase] = {"ok": False, "why": "no time left", "seconds": 0}
        else:
            try:
                found = globals()[phase](run, PHASES[phase])
            except Exception as error:  # a phase that breaks must not take the others' results with it
                found = {"ok": False, "why": f"{type(error).__name__}: {error}"[:500]}
            run.summary["phases"][phase] = {"seconds": round(time.monotonic() - began, 1), **found}
        run.write()
        if phase == "build" and "provenance" not in run.summary:
            run.summary["provenance"] = _provenance()
            run.write()
    print(table(run.summary), flush=True)
    return 0 if all(one["ok"] for one in run.summary["phases"].values()) else 1


def _provenance() -> dict[str, Any] | str:
    """In a process of its own: the library that this one would load may have been built since."""
    code = "import json; from benchmarks.provenance import provenance; print(json.dumps(provenance()))"
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    return json.loads(result.stdout.splitlines()[-1]) if result.returncode == 0 else result.stderr[-500:]


if __name__ == "__main__":
    sys.exit(main())
