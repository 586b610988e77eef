"""Proof and measurement on a GPU, in phases, within a time limit, with no network: `bash tools/gpu.sh OUT [phase …]`.

setup      the libraries that came along; where they do not load, built against the machine's own torch and architecture
parity     every kernel family, op and direction against the reference, small and at the headline's size
ceilings   copy bandwidth, matrix rates, error against chain length, naive's kernels one by one
headline   benchmarks.head at 128×3×224²: baselines and every op that is not red, in every product mode
resnet50   benchmarks.step: ResNet-50 in bf16, and as the authors run it
tests      the rest of each op's tests: the verdicts by family, op and direction that a figure needs to be reported
gpu        tests/gpu: same bits, streams, graphs, no synchronisation, more than 2^31 elements, memory; and the Triton kernels' own
head       benchmarks.head at every size
loss       the loss's tests on each family
step       benchmarks.step: every model, precision and layout, eager
ops        the pytest-benchmark suites
compiled   what torch.compile makes of the step and of the baselines: minutes each
choice     benchmarks.convolution_choice: what the rules of the convolution on CUDA should be; asked for
sanitizer  compute-sanitizer memcheck and racecheck, a process for each op, caching off; asked for

Every result is a line of OUT/results.jsonl as soon as it is there (benchmarks/journal.py), so a run may be cut at any moment; the
next call goes on where this one stopped, from what lies in build/gpu-results or is named by --earlier. Beside it summary.json and
log.txt. A test or a measurement that hangs or crashes costs itself alone: it is noted, and the rest go on in another process.

--bundle   here, with a compiler: build/gpu, the libraries for the GPU and what they were made from; --collect FOLDER FILE … turns
lines into the files that benchmarks/results stores. --dry-run runs the same phases on the CPU with small sizes.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tools")]
import triton_cache  # noqa: E402
from gpu_bundle import CARRIED, LIBRARIES, bundle, collect, stale, table  # noqa: E402
from gpu_run import Limits, Run, outcome, supervise  # noqa: E402

# In the order of what is worth most.
PHASES = {
    "setup": Limits(300, 300), "parity": Limits(180, 90), "ceilings": Limits(60, 60), "headline": Limits(150, 90),
    "resnet50": Limits(200, 120), "tests": Limits(330, 90), "gpu": Limits(240, 120), "head": Limits(240, 90),
    "loss": Limits(150, 90), "step": Limits(500, 120), "ops": Limits(240, 60), "compiled": Limits(540, 300),
    "choice": Limits(400, 60), "sanitizer": Limits(500, 240),
}  # fmt: skip
ASKED = ("choice", "sanitizer")


# ---- phases: each returns what goes into the summary; "ok" decides the table ------------------------------------------------


def setup(run: Run, limits: Limits) -> dict[str, Any]:
    how = "what is built here"
    if not run.dry and (CARRIED / "lib").is_dir():
        shutil.copytree(CARRIED / "lib", LIBRARIES, dirs_exist_ok=True)
        how = "the libraries that came along"
    kernels = 0
    if not run.dry and (CARRIED / "triton.tar.xz").is_file() and not (CARRIED / "triton").is_dir():
        with tarfile.open(CARRIED / "triton.tar.xz") as archive:
            archive.extractall(CARRIED / "triton", filter="data")
        kernels = triton_cache.localise(CARRIED / "triton")
    status, text = run.python("-m", "sib_fast", "doctor", timeout=run.left(90))
    if not run.dry and (status != 0 or "launched on" not in text):
        how = _compile(run, limits.phase)
        status, text = run.python("-m", "sib_fast", "doctor", timeout=run.left(90))
    return {
        "ok": how is not None and status == 0,
        "how": how,
        "triton_kernels_brought": kernels,
        "doctor": text.strip().splitlines(),
    }


def _compile(run: Run, seconds: float) -> str | None:
    """How it was built, or None."""
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


def _pytest(run: Run, *arguments: object, suite: str = "tests") -> list[object]:
    return [
        sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "benchmarks.streaming", "--tb=short",
        "--show-capture=no", f"--suite={suite}", f"--families={','.join(run.families)}", *arguments,
    ]  # fmt: skip


def parity(run: Run, limits: Limits) -> dict[str, Any]:
    found = supervise(run, "tests", _pytest(run, "tests/ops/test_parity.py"), limits, run.cores)
    return {**found, "verdicts": verdicts(run)}


def tests(run: Run, limits: Limits) -> dict[str, Any]:
    where = ["tests/ops/test_parity.py", "tests/ops/test_softmax.py"] if run.dry else ["tests/ops", "tests/test_benchmarks.py"]
    found = supervise(run, "tests", _pytest(run, *([] if run.dry else ["--whole"]), *where), limits, run.cores)
    return {**found, "verdicts": verdicts(run)}


def gpu(run: Run, limits: Limits) -> dict[str, Any]:
    """What is large or measures memory has the card to itself."""
    files, alone = ["tests/gpu"] if run.dry else ["tests/gpu", "tests/triton"], "two_to_the_31 or memory"
    command = _pytest(run, *files, "-k", f"not ({alone})", suite="gpu")
    supervise(run, "gpu", command, limits._replace(phase=limits.phase * 0.7), run.cores)
    return supervise(run, "gpu", _pytest(run, *files, "-k", alone, suite="gpu"), limits)


def loss(run: Run, limits: Limits) -> dict[str, Any]:
    files = ["tests/test_autocast.py"] if run.dry else ["tests/test_loss.py", "tests/test_autocast.py", "tests/test_compile.py"]
    return supervise(run, "loss", _pytest(run, *files, suite="loss"), limits, run.cores)


def _module(run: Run, name: str, *options: object) -> list[object]:
    return [sys.executable, "-m", f"benchmarks.{name}", "--device", run.device, *options]


def ceilings(run: Run, limits: Limits) -> dict[str, Any]:
    return supervise(run, "machine", _module(run, "machine", *(["--small"] if run.dry else [])), limits)


def headline(run: Run, limits: Limits) -> dict[str, Any]:
    return _head(run, limits, "smoke" if run.dry else "headline")


def head(run: Run, limits: Limits) -> dict[str, Any]:
    """Triton's kernels are compiled on all cores first."""
    preset = "smoke" if run.dry else run.summary["preset"]
    warm = _module(run, "head", "--preset", preset, "--warm", *_precisions(run))
    supervise(run, "warm", warm, limits._replace(phase=limits.phase * 0.4), run.cores)
    return _head(run, limits, preset)


def _head(run: Run, limits: Limits, preset: str, *options: object) -> dict[str, Any]:
    rounds = ["--rounds", 3] if run.dry else []
    return supervise(run, "head", _module(run, "head", "--preset", preset, *rounds, *options, *_precisions(run)), limits)


def _precisions(run: Run) -> list[str]:
    return [] if run.dry else ["--precisions", "ieee", "tf32x3", "tf32"]


def _step(run: Run, limits: Limits, preset: str) -> dict[str, Any]:
    small = ["--models", "resnet18", "--variants", "ours", "--images", 2, "--size", 32, "--rounds", 1, "--no-memory"]
    return supervise(run, "step", _module(run, "step", *(small if run.dry else ["--preset", preset, "--profile"])), limits)


def resnet50(run: Run, limits: Limits) -> dict[str, Any]:
    return _step(run, limits, "goals")


def step(run: Run, limits: Limits) -> dict[str, Any]:
    return _step(run, limits, "table")


def compiled(run: Run, limits: Limits) -> dict[str, Any]:
    _step(run, limits, "compiled")
    return _head(run, limits, "smoke" if run.dry else "headline", *([] if run.dry else ["--compiled"]))


def ops(run: Run, limits: Limits) -> dict[str, Any]:
    """Forward and step of each op: the head has a phase of its own."""
    preset = "smoke" if run.dry else run.summary["preset"]
    command = _pytest(
        run, "benchmarks", "--benchmark-only", "--device", run.device, "--preset", preset, "-k",
        "not test_head and not reference", suite="benchmarks",
    )  # fmt: skip
    return supervise(run, "benchmarks", command, limits)


def choice(run: Run, limits: Limits) -> dict[str, Any]:
    small = ["--images", 1, "--rounds", 1] if run.dry else []
    return supervise(run, "convolution_choice", _module(run, "convolution_choice", *small), limits)


def sanitizer(run: Run, limits: Limits) -> dict[str, Any]:
    """A process for each op, tool and family, several at once; Triton's kernels are compiled before, without the tool."""
    tool = shutil.which("compute-sanitizer", path=os.environ["PATH"] + ":/usr/local/cuda/bin")
    if tool is None and not run.dry:
        return {"ok": False, "why": "no compute-sanitizer on PATH"}
    deadline = run.clock() + run.left(limits.phase)

    def one(numbered: tuple[int, tuple[str, str, str]]) -> None:
        worker, (check, family, op) = numbered
        item = f"{check} {family} {op}"
        if deadline - run.clock() < 5 or not run.journal.wants("sanitizer", item):
            return
        before = [] if run.dry or check == "plain" else [tool, "--tool", check, "--error-exitcode", 9, "--print-limit", 20]
        run.journal.write("sanitizer", item, "began")
        status, text = run.command(
            *before, sys.executable, "-m", "tests.gpu.sanitize", family, op, worker=worker,
            timeout=min(limits.item, deadline - run.clock()), PYTORCH_NO_CUDA_MEMORY_CACHING="1",
        )  # fmt: skip
        state = {0: "passed", 124: "cut"}.get(status, "failed")
        run.journal.write("sanitizer", item, state, why=text[-600:] if status else None)

    from tests.gpu.heads import steps

    pairs = [(family, op) for family in run.families for op in steps(family)]
    with ThreadPoolExecutor(2 if run.dry else 6) as pool:
        for checks in (("plain",),) if run.dry else (("plain",), ("memcheck", "racecheck")):
            list(pool.map(one, enumerate((check, *pair) for check in checks for pair in pairs)))
    return outcome(run, "sanitizer")


# ---- the call ---------------------------------------------------------------------------------------------------------------


def verdicts(run: Run) -> dict[str, Any]:
    from benchmarks import gate

    return gate.verdicts(run.journal.lines())


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, nargs="?")
    parser.add_argument("phases", nargs="*", help=f"of {', '.join(PHASES)}; default all but {' and '.join(ASKED)}")
    parser.add_argument("--budget", type=float, default=560, help="seconds for the whole call")
    parser.add_argument("--preset", default="quick", help="sizes of head and ops: quick or full")
    parser.add_argument("--earlier", type=Path, nargs="*", default=[], help="results.jsonl of earlier calls, to go on from")
    parser.add_argument("--dry-run", action="store_true")
    parser.add_argument("--bundle", action="store_true")
    parser.add_argument(
        "--triton", help="with --bundle: a python with the GPU machine's torch and Triton, to compile its kernels"
    )
    parser.add_argument("--collect", action="store_true")
    args = parser.parse_intermixed_args()
    if args.bundle:
        return bundle(args.triton)
    if args.collect:
        return collect(args.out, [Path(name) for name in args.phases])
    unknown = sorted(set(args.phases) - PHASES.keys())
    if args.out is None or unknown:
        parser.error(f"unknown phase: {', '.join(unknown)}" if unknown else "OUT must be given")
    if not args.dry_run and (why := stale()):
        print(f"gpu.py: build/gpu is stale: {why}. Run `make gpu-bundle` again", file=sys.stderr)
        return 2
    machine = _machine(args.dry_run)
    if machine is None:
        print("gpu.py: torch sees no GPU here (--dry-run runs the same phases on the CPU)", file=sys.stderr)
        return 2
    out = args.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    run = Run(out, args.budget, args.dry_run, tuple(args.earlier), machine)
    run.summary["preset"] = args.preset
    return perform(run, args.phases or [phase for phase in PHASES if phase not in ASKED])


def _machine(dry: bool) -> str | None:
    """The GPU's name; asked in a process of its own, since a context here would hold memory."""
    if dry:
        return "dry"
    code = "import torch; print(torch.cuda.get_device_name() if torch.cuda.is_available() else '')"
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() or None


def perform(run: Run, phases: list[str], known: dict[str, Callable[[Run, Limits], dict[str, Any]]] | None = None) -> int:
    """The phases one after the other; one that breaks takes no other's results with it."""
    for phase in phases:
        began = run.clock()
        print(f"{phase} …", flush=True)
        if run.deadline - began < 5:
            found: dict[str, Any] = {"ok": False, "why": "no time left"}
        else:
            try:
                found = (known or globals())[phase](run, PHASES.get(phase, Limits(60, 60)))
            except Exception as error:
                found = {"ok": False, "why": f"{type(error).__name__}: {error}"[:500]}
        run.summary["phases"][phase] = {"seconds": round(run.clock() - began, 1), **found}
        print(f"{phase:<10} {'ok' if found['ok'] else 'RED':<4} {run.clock() - began:>5.0f} s  "
              f"{found.get('why') or found.get('how') or found.get('counts') or ''}", flush=True)  # fmt: skip
        if phase == "setup":
            run.summary["provenance"] = _provenance()
            run.journal.write("run", run.journal.run, "done", row=run.summary["provenance"])
        run.write()
    if known is None:
        print("\n".join(table(verdicts(run), run.journal.lines())), flush=True)
    shutil.rmtree(run.scratch, ignore_errors=True)
    return 0 if all(one["ok"] for one in run.summary["phases"].values()) else 1


def _provenance() -> dict[str, Any] | str:
    """In a process of its own: the library that this one would load may have been built since."""
    code = "import json; from benchmarks.provenance import provenance; print(json.dumps(provenance()))"
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    return json.loads(result.stdout.splitlines()[-1]) if result.returncode == 0 else {"unknown": result.stderr[-500:]}


if __name__ == "__main__":
    sys.exit(main())
