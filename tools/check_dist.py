"""What is about to be published: `python tools/check_dist.py [tag]`, or `make check-dist RELEASE=tag`.

Every file of dist/ must be an sdist of this version, or a wheel of it for every Python 3 and a platform that pip takes from an
index; a wheel must hold the CPU library, nothing that is for tests, and no more than LARGEST. With a tag: that of this version,
and wheels for both processors.
"""

from __future__ import annotations

import re
import sys
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
LARGEST = 60e6  # bytes: what the CUDA library for the default architectures may take
PROCESSORS = ("x86_64", "aarch64")


def version() -> str:
    return re.search(r'__version__ = "(.+)"', (ROOT / "sib_fast/_version.py").read_text())[1]


def faults_of(path: Path) -> list[str]:
    if path.name == f"sib_fast-{version()}.tar.gz":
        return []
    # manylinux_2_28 and older_2_17.manylinux2014 alike; plain linux_x86_64 is what auditwheel has not seen.
    tag = re.fullmatch(rf"sib_fast-{re.escape(version())}-py3-none-(.+)\.whl", path.name)
    if tag is None or not re.fullmatch(rf"(manylinux\w+_({'|'.join(PROCESSORS)})\.?)+", tag[1]):
        return ["must be named as the sdist of this version, or as its wheel py3-none-manylinux…; `make wheels` names them so"]
    faults = []
    if path.stat().st_size > LARGEST:
        faults.append(f"must be at most {LARGEST / 1e6:.0f} MB, got {path.stat().st_size / 1e6:.1f} MB")
    with zipfile.ZipFile(path) as wheel:
        names = wheel.namelist()
    if "sib_fast/lib/libsib_fast_cpu.so" not in names:
        faults.append("must hold sib_fast/lib/libsib_fast_cpu.so: it was built without a compiler or torch")
    # auditwheel must leave torch's libraries to torch, and so nothing beside ours.
    extra = [n for n in names if re.search(r"\.so(\.|$)", n) and not n.startswith("sib_fast/lib/libsib_fast_c")]
    extra += [n for n in names if n.startswith(("tests/", "benchmarks/"))]
    return faults + ([f"must not hold {', '.join(extra)}"] if extra else [])


def faults(folder: Path, tag: str | None) -> list[str]:
    files = sorted(folder.iterdir()) if folder.is_dir() else []
    out = [f"{path.name}: {fault}" for path in files for fault in faults_of(path)]
    if not files:
        out.append("dist is empty: `make sdist` and `make wheels` fill it")
    if tag:
        if tag != f"v{version()}":
            out.append(f"the tag must be v{version()}, as sib_fast/_version.py says, got {tag}")
        wanted = {".tar.gz", *(f"_{processor}.whl" for processor in PROCESSORS)}
        out += [f"a release needs sib_fast-…{end}" for end in sorted(wanted) if not any(p.name.endswith(end) for p in files)]
    return out


if __name__ == "__main__":
    found = faults(ROOT / "dist", next(iter(sys.argv[1:]), None))
    print("\n".join(found) or "dist is what it should be")
    sys.exit(1 if found else 0)
