"""Installs the requirements of one extra of pyproject.toml, without the package: `python tools/install_extras.py all`.

The package itself is built in place afterwards, against the torch that is installed already.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

try:
    import tomllib
except ModuleNotFoundError:  # Python 3.10
    from pip._vendor import tomli as tomllib


def requirements(extras: dict[str, list[str]], name: str) -> list[str]:
    """The extra's requirements, with `sib_fast[a,b]` replaced by what stands under a and b."""
    out: list[str] = []
    for requirement in extras[name]:
        if requirement.startswith("sib_fast["):
            for part in requirement.removeprefix("sib_fast[").removesuffix("]").split(","):
                out += requirements(extras, part.strip())
        else:
            out.append(requirement)
    return sorted(set(out))


if __name__ == "__main__":
    project = tomllib.loads((Path(__file__).parent.parent / "pyproject.toml").read_text())["project"]
    wanted = requirements(project["optional-dependencies"], sys.argv[1])
    sys.exit(subprocess.call([sys.executable, "-m", "pip", "install", "--quiet", *wanted]))
