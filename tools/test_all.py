"""`make test-all`: every step of `make test` with nothing left to a sample, and a record of it that is kept.

    python tools/test_all.py [steps]     benchmarks/results/test_all.json: commit, machine, and of every step seconds and counts

The record is rewritten after every step, so that a run that was cut short shows how far it came.
"""

from __future__ import annotations

import re
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.provenance import provenance, write_json  # noqa: E402

STEPS = ["check", "quick", "interpret", "old", "old-triton37", "pinned", "packaging", "site"]
RECORD = ROOT / "benchmarks/results/test_all.json"


def step(name: str) -> dict[str, object]:
    """Runs `make <name> LONG=1`, its output as it comes, and adds up what pytest says at the end of each of its runs."""
    began, counts = time.monotonic(), Counter()
    command = ["make", "--no-print-directory", name, "LONG=1"]
    with subprocess.Popen(command, cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as process:
        for line in process.stdout:
            print(line, end="", flush=True)
            if re.search(r"\d+ (?:passed|failed).* in [\d.]+s", line):
                counts.update({word: int(n) for n, word in re.findall(r"(\d+) (passed|failed|skipped|deselected|error)", line)})
    return {"green": process.returncode == 0, "seconds": round(time.monotonic() - began), **counts}


def main() -> int:
    record = {**provenance(), "steps": {}}
    for name in sys.argv[1:] or STEPS:
        record["steps"][name] = step(name)
        write_json(RECORD, record)
    red = [name for name, found in record["steps"].items() if not found["green"]]
    print(f"test-all: {'red: ' + ', '.join(red) if red else 'green'}; {RECORD.relative_to(ROOT)}")
    return 1 if red else 0


if __name__ == "__main__":
    sys.exit(main())
