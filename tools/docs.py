"""The documentation site: `python tools/docs.py [OUT]`, build/site by default. Warnings are errors; nothing is fetched.

The site is docs/ and a few pages that lie where they belong: an op's story beside its kernels, the ledger beside its results.
They are brought together under build/site-pages, where links between pages are links of the site, and links to other files of the
repository are their names.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PAGES = ROOT / "build" / "site-pages"
# What the site shows of the rest of the repository: its place there, where it lies.
ELSEWHERE = {
    "contributing.md": "CONTRIBUTING.md",
    "changelog.md": "CHANGELOG.md",
    "ledger.md": "benchmarks/results/README.md",
    "examples.md": "examples/README.md",
    **{f"ops/{path.parent.name}.md": str(path.relative_to(ROOT)) for path in sorted(ROOT.glob("sib_fast/ops/*/README.md"))},
}
_LINK = re.compile(r"(?<!!)\[((?:[^\[\]]|\[[^\]]*\])*)\]\(([^)\s#:]*)(#[^)\s]*)?\)")
_CODE = re.compile(r"(```.*?```|``[^`]+``|`[^`\n]*`(?!\]))", re.DOTALL)


def places() -> dict[Path, str]:
    """Each page's file -> its name in the site."""
    own = {path: str(path.relative_to(ROOT / "docs")) for path in sorted((ROOT / "docs").rglob("*.md"))}
    return own | {ROOT / file: name for name, file in ELSEWHERE.items()}


def rewritten(text: str, source: Path, pages: dict[Path, str]) -> str:
    """A page's text with its links as the site needs them."""
    here = Path(pages[source]).parent

    def link(found: re.Match[str]) -> str:
        words, path, anchor = found[1], found[2], found[3] or ""
        if not path:
            return found[0]
        target = Path(os.path.normpath(source.parent / path))
        for candidate in (target, target / "README.md"):
            if candidate in pages:
                return f"[{words}]({os.path.relpath(pages[candidate], here)}{anchor})"
        if target.exists() and target.is_relative_to(ROOT / "docs") and source.is_relative_to(ROOT / "docs"):
            return found[0]
        name = f"`{target.relative_to(ROOT)}`"
        return words if words.strip("`") == name.strip("`") else f"{words} ({name})"

    pieces = _CODE.split(text)
    pieces[::2] = [_LINK.sub(link, piece) for piece in pieces[::2]]
    text = "".join(pieces)
    # Tables that a program wrote have no heading.
    return text if re.search(r"^# ", text, re.MULTILINE) else f"# {source.stem.capitalize()}\n\n{text}"


def gather() -> None:
    pages = places()
    shutil.rmtree(PAGES, ignore_errors=True)
    shutil.copytree(ROOT / "docs", PAGES)
    for source, name in pages.items():
        (PAGES / name).parent.mkdir(parents=True, exist_ok=True)
        (PAGES / name).write_text(rewritten(source.read_text(encoding="utf-8"), source, pages), encoding="utf-8")


def main() -> int:
    out = Path(sys.argv[1] if len(sys.argv) > 1 else ROOT / "build" / "site").resolve()
    gather()
    command = [sys.executable, "-m", "sphinx", "-W", "--keep-going", "-q", "-b", "html", str(PAGES), str(out)]
    return subprocess.run(command, cwd=ROOT, check=False).returncode


if __name__ == "__main__":
    raise SystemExit(main())
