"""The documentation site's settings. `tools/docs.py` brings the pages together and calls Sphinx on them."""

from __future__ import annotations

import inspect
import re

from sib_fast import __version__

project = "sib_fast"
author = "the authors of sib_fast"
copyright = "the authors of sib_fast; Apache-2.0"
release = version = __version__

extensions = ["myst_parser", "sphinx.ext.autodoc"]
myst_heading_anchors = 4
exclude_patterns = ["README.md"]
smartquotes = False  # a quote after code would face the wrong way
pygments_style = "friendly"

html_theme = "furo"
html_title = f"sib_fast {release}"
html_static_path = ["_static"]
html_css_files = ["wide_tables.css"]
html_copy_source = False
html_show_sphinx = False

autodoc_member_order = "bysource"
autodoc_typehints = "none"  # "Shapes:" says more than "Tensor"
python_maximum_signature_line_length = 90

_SECTION = re.compile(r"^([A-Z][a-z]+): +(.*)$")
_ROLE = re.compile(r":[a-z:]+:`([^`]+)`")


def _inline(text: str) -> str:
    """One text of a docstring as reStructuredText: what stands in backquotes is code, nothing else is markup."""
    text = _ROLE.sub(r"`\1`", text).replace("``", "`")
    parts = text.split("`")
    parts[::2] = [re.sub(r"([\\*|_])", r"\\\1", part) for part in parts[::2]]
    # An escaped blank after the code lets a letter or a bracket follow.
    return "".join(part if i % 2 == 0 else f"``{part.strip()}``\\ " for i, part in enumerate(parts) if i % 2 == 0 or part.strip())


def _paragraphs(lines: list[str]) -> list[list[str]]:
    out: list[list[str]] = [[]]
    for line in lines:
        indented = line.startswith("    ")
        if not line.strip() or (out[-1] and indented != out[-1][0].startswith("    ")):
            out.append([])
        if line.strip():
            out[-1].append(line.rstrip())
    return [paragraph for paragraph in out if paragraph]


def _arguments(obj: object, text: str) -> list[str]:
    """`a, b: what they are. c: ...` as one text an argument."""
    try:
        names = "|".join(sorted(map(re.escape, inspect.signature(obj).parameters), key=len, reverse=True))
    except (TypeError, ValueError):
        return [text]
    return re.split(rf"(?<=[.);]) (?=(?:{names})(?:, (?:{names}))*: )", text)


def _house_style(app, what, name, obj, options, lines: list[str]) -> None:
    """Docstrings are written to be read as they are (docs/conventions.md): paragraphs, indented formulae and code, and sections
    such as `Shapes:` whose lines are indented on from the first."""
    out: list[str] = []
    prose: list[str] = []

    def flush() -> None:
        for paragraph in _paragraphs(prose):
            if paragraph[0].startswith("    "):
                out.extend(["::", "", *("  " + line for line in paragraph), ""])
            elif any("  " in line.strip() for line in paragraph):  # lines that are aligned with each other
                out.extend([*("| " + _inline(line) for line in paragraph), ""])
            else:
                out.extend([_inline(" ".join(line.strip() for line in paragraph)), ""])
        prose.clear()

    position = 0
    while position < len(lines):
        section = _SECTION.match(lines[position]) or re.match(r"^([A-Z][a-z]+):$()", lines[position])
        if not section:
            prose.append(lines[position])
            position += 1
            continue
        flush()
        body = [section[2]] if section[2] else []
        position += 1
        while position < len(lines) and (lines[position].startswith("    ") or not lines[position].strip()):
            if not lines[position].strip() and not (position + 1 < len(lines) and lines[position + 1].startswith("    ")):
                break
            body.append(lines[position].strip())
            position += 1
        text = [_inline(item) for item in (_arguments(obj, " ".join(body)) if section[1] == "Args" else [" ".join(body)])]
        out.append(f":{section[1]}: " + text[0] if text else f":{section[1]}:")
        out.extend(line for item in text[1:] for line in ("", "    " + item))
        out.append("")
    flush()
    lines[:] = out


def setup(app) -> None:
    app.connect("autodoc-process-docstring", _house_style)
