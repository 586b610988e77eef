"""Plants one fault at a time and says which test goes red.

    python tools/plant_faults.py /tmp/faults [word]                            every fault, or those whose name holds the word
    python tools/plant_faults.py /tmp/faults --sample 60 --seed 7 --out FILE   as many of them, from as many files as there are

Works on a copy of the tree, builds it there, and runs the short suite: first the tests next to the faulty file, then, where those
are green, everything that `make quick` runs. A fault that no test notices is printed as SURVIVED, and the exit status is then 1.
Hours for all of them; not part of `make test`. A new kernel, layer or part of the lab adds its faults to tools/faults.py.

--out gets JSON, rewritten after every fault: commit, machine, seed, and of each fault its file, verdict and first red test.
A run that was cut short goes on where it was: verdicts of the same commit and seed are kept, and what is red without a fault.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import shutil
import subprocess
import sys
import time
from collections import defaultdict
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.provenance import provenance, write_json  # noqa: E402
from tools.faults import FAULTS  # noqa: E402

# Where the tests of a file stand; the first that fits.
NEAR = [
    (r".*/triton(/.*)?\.py", ["tests/ops", "tests/triton", "-k", "triton"]),
    (r"csrc/.*|sib_fast/ops/.*", ["tests/ops", "tests/cuda"]),
    (r"sib_fast/nn/.*|sib_fast/network_checks\.py", ["tests/nn"]),
    (r"sib_fast/lab/.*", ["tests/lab"]),
    (r"sib_fast/explain/.*", ["tests/explain"]),
    (r"sib_fast/estimators/.*|sib_fast/masks/.*", ["tests/estimators", "tests/masks"]),
    (
        r"sib_fast/.*",
        ["tests/test_loss.py", "tests/test_attach.py", "tests/test_vjp.py", "tests/test_lazy.py", "tests/test_step.py"],
    ),
]
FITS = "tests/test_architecture.py::test_every_fault_fits_its_source"  # red of every planted fault
EVERYTHING = ["-m", "not packaging", "-n", "2", "--dist", "loadfile", f"--deselect={FITS}"]


def run(command: list[str], tree: Path, **more: str) -> subprocess.CompletedProcess:
    environment = {**os.environ, "PYTHONPATH": str(tree), "SIB_FAST_CUDA": "0", "SIB_FAST_BLOCKS": "1", **more}
    environment["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{environment['PATH']}"
    return subprocess.run(command, cwd=tree, env=environment, capture_output=True, text=True)


def pytest(tree: Path, *arguments: str, **more: str) -> tuple[bool, str]:
    """(green, the first test that failed)."""
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *arguments]
    tested = run(command, tree, OMP_NUM_THREADS="1", **more)
    red = re.search(r"^(?:FAILED|ERROR) (?:tests/)?(.+?)(?: - .*)?$", tested.stdout, re.MULTILINE)
    if red is None and (died := re.search(r'File ".*/tests/(.+?)", line \d+ in (test_\w+)', tested.stdout + tested.stderr)):
        return False, f"{died[1]}::{died[2]}, in which the interpreter dies"
    # Exit status 5: nothing was selected, which is no proof of anything.
    return tested.returncode in (0, 5), red.group(1) if red else tested.stdout[-300:] + tested.stderr[-300:]


def near(file: str) -> tuple[list[str], dict[str, str]]:
    """pytest's arguments and environment for the tests next to a file: of an op its own, where they can be told by name."""
    arguments = next(arguments for pattern, arguments in NEAR if re.fullmatch(pattern, file))
    more = {"TRITON_INTERPRET": "1"} if "/triton" in file else {}
    ops = sorted((path.name for path in (ROOT / "sib_fast/ops").iterdir() if path.is_dir()), key=len, reverse=True)
    if arguments[0] == "tests/ops" and (op := next((op for op in ops if op in file), None)):
        own = [str(path.relative_to(ROOT)) for where in arguments[:2] for path in ROOT.glob(f"{where}/test_*{op}*.py")]
        arguments = [*own, *arguments[2:]]
    return arguments, more


def build(tree: Path) -> str | None:
    """The compiler's complaint, or None."""
    built = run([sys.executable, "setup.py", "-q", "build_ext", "--inplace"], tree)
    return None if built.returncode == 0 else f"DOES NOT COMPILE: {(built.stdout + built.stderr)[-300:]}"


def verdict(file: str, tree: Path, seed: int, red_anyway: list[str]) -> tuple[str, str]:
    """("caught" | "SURVIVED" | "STALE", why), with the fault in place."""
    # Of a Python fault too: the fault before it may have been one of the kernels.
    if (complaint := build(tree)) is not None:
        return "STALE", complaint
    arguments, more = near(file)
    selection = f"--sample-seed={seed}"
    green, detail = pytest(tree, *arguments, selection, *(f"--deselect={test}" for test in red_anyway), **more)
    if green:
        green, detail = pytest(tree, *EVERYTHING, selection, *(f"--deselect={test}" for test in red_anyway))
    return ("SURVIVED", "") if green else ("caught", detail)


def drawn(count: int, seed: int) -> list[tuple[str, str, str, str]]:
    """Round by round one fault of every file, until there are enough."""
    draw, by_file = random.Random(seed), defaultdict(list)
    for fault in FAULTS:
        by_file[fault[1]].append(fault)
    for faults in by_file.values():
        draw.shuffle(faults)
    rounds = max(len(faults) for faults in by_file.values())
    order = [faults[r] for r in range(rounds) for faults in by_file.values() if r < len(faults)]
    return order[: max(count, len(by_file))]


def copy(tree: Path) -> None:
    ignore = shutil.ignore_patterns(".git", ".hypothesis", ".venv*", "build", "*.so", "lib", "__pycache__", ".*_cache", "runs")
    shutil.rmtree(tree, ignore_errors=True)
    shutil.copytree(ROOT, tree, ignore=ignore)


def plant(fault: tuple[str, str, str, str], tree: Path, seed: int, red_anyway: list[str]) -> tuple[str, str]:
    _, file, text, replacement = fault
    path = tree / file
    source = path.read_text()
    if source.count(text) != 1:
        return "STALE", f"the text occurs {source.count(text)} times in {file}"
    path.write_text(source.replace(text, replacement))
    try:
        return verdict(file, tree, seed, red_anyway)
    finally:
        path.write_text(source)


def without_a_fault(tree: Path, seed: int) -> list[str] | None:
    """What is red anyway, which proves nothing: a few tests want the git folder, or libraries that are not built here. None where
    it is too much."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *EVERYTHING, f"--sample-seed={seed}"]
    whole = run(command, tree, OMP_NUM_THREADS="1").stdout
    red = re.findall(r"^(?:FAILED|ERROR) (\S+)", whole, re.MULTILINE)
    print(f"without a fault: {whole.strip().splitlines()[-1]} {' '.join(red)}", flush=True)
    return red if len(red) <= 10 and re.search(r"\d+ passed", whole) else None


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tree", type=Path, help="folder for the copy; what is there is deleted")
    parser.add_argument("word", nargs="?", default="", help="only faults whose name holds it")
    parser.add_argument("--sample", type=int, help="how many, at least one of every file")
    parser.add_argument("--seed", type=int, default=0, help="of the sample, and of the tests' own (--sample-seed)")
    parser.add_argument("--out", type=Path, help="JSON")
    args = parser.parse_args()
    tree = args.tree.resolve()
    chosen = [fault for fault in (drawn(args.sample, args.seed) if args.sample else FAULTS) if args.word in fault[0]]
    record = {**provenance(), "seed": args.seed, "of": len(FAULTS), "files": len({fault[1] for fault in chosen}), "faults": []}
    if args.out and args.out.is_file():
        before = json.loads(args.out.read_text())
        if (before["commit"], before["seed"]) == (record["commit"], args.seed):
            record |= {key: before[key] for key in ("faults", "red_anyway")}
    copy(tree)
    if (complaint := build(tree)) is not None:
        print(complaint)
        return 1
    if "red_anyway" not in record:
        found = without_a_fault(tree, args.seed)
        if found is None:
            return 1
        record["red_anyway"] = found
    red_anyway = record["red_anyway"]
    known = {one["fault"] for one in record["faults"]}
    for fault in chosen:
        if fault[0] in known:
            continue
        began = time.monotonic()
        found, detail = plant(fault, tree, args.seed, red_anyway)
        one = {"fault": fault[0], "file": fault[1], "verdict": found, "by": detail, "seconds": round(time.monotonic() - began)}
        record["faults"].append(one)
        print(f"{found:<8}  {fault[0]}: {detail}", flush=True)
        if args.out:
            write_json(args.out, record)
    missed = [one["fault"] for one in record["faults"] if one["verdict"] != "caught"]
    print(f"{len(missed)} of {len(record['faults'])} faults not caught")
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
