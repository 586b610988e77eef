"""`pip install` that shows what it does in a few lines: `python tools/install.py [--extra NAME] [pip's arguments]`.

--extra NAME   the requirements of that extra of pyproject.toml, without the package

A line for every package that is fetched or built. Of pip's warnings those stay out that concern its search (an index that is not
there, one line a package). Where pip fails all that it said is shown.
"""

from __future__ import annotations

import re
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

try:
    import tomllib
except ModuleNotFoundError:  # Python 3.10
    from pip._vendor import tomli as tomllib

SHOWN = re.compile(r"\s*(Downloading|Using cached|Building|Installing|Successfully|ERROR|WARNING|error:)")
NOISE = re.compile(r"\s*WARNING: (Location|Url) '.*' is ignored|\s*(Building|Downloading) .*\.metadata")


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


def progress(line: str, shown: int) -> int:
    """Of pip's "Progress <bytes> of <bytes>" every tenth, where the whole is large enough to be waited for."""
    done, whole = (int(number) for number in re.findall(r"\d+", line)[:2])
    tenth = 10 * done // max(whole, 1)
    if whole > 100 * 2**20 and tenth != shown:
        print(f"    {10 * tenth} % of {whole >> 20} MiB", flush=True)
    return tenth


def install(arguments: list[str]) -> int:
    raw = int(version("pip").split(".")[0]) >= 25  # which an old pip refuses
    options = ["--disable-pip-version-check", "--progress-bar", "raw" if raw else "off"]
    print("pip install", " ".join(arguments), flush=True)
    said, shown = [], 0
    command = [sys.executable, "-u", "-m", "pip", "install", *options, *arguments]
    with subprocess.Popen(command, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as process:
        for line in process.stdout:
            if re.match(r"\s*Progress \d+ of \d+", line):
                shown = progress(line, shown)
                continue
            said.append(line)
            if SHOWN.match(line) and not NOISE.match(line):
                print(f"  {line.strip()[:150]}", flush=True)
    if process.returncode != 0:
        print("".join(line for line in said if not NOISE.match(line)), file=sys.stderr)
    return process.returncode


if __name__ == "__main__":
    arguments = sys.argv[1:]
    if arguments[:1] == ["--extra"]:
        project = tomllib.loads((Path(__file__).parent.parent / "pyproject.toml").read_text())["project"]
        arguments = requirements(project["optional-dependencies"], arguments[1]) + arguments[2:]
    sys.exit(install(arguments))
