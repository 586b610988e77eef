"""`make test-all`: every step of `make test` with nothing left to a sample, and a record of it that is kept.

    python tools/test_all.py            benchmarks/results/test_all.json: of every step commit, date, machine, seconds and counts
    python tools/test_all.py quick old  these steps; what the record says of the others stays

The record is rewritten after every step, so that a run that was cut short shows how far it came, and the other steps can follow.
"""

from __future__ import annotations

import json
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
    chosen = sys.argv[1:] or STEPS
    record = json.loads(RECORD.read_text()) if sys.argv[1:] and RECORD.is_file() else {}
    # Here, for one step alone too: what makes the others needs fewer architectures, and leaves what is there.
    subprocess.run(["make", "--no-print-directory", ".venv/.built-all"], cwd=ROOT, check=True)
    for name in chosen:
        ran = {key: value for key, value in provenance().items() if key in ("commit", "date", "cpu", "cores", "torch")}
        record[name] = ran | step(name)
        write_json(RECORD, record)
    red = [name for name in chosen if not record[name]["green"]]
    print(f"test-all: {'red: ' + ', '.join(red) if red else 'green'}; {RECORD.relative_to(ROOT)}")
    return 1 if red else 0


if __name__ == "__main__":
    sys.exit(main())
