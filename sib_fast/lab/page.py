"""What the HTML pages share: tables as data, and the templates' style and macros. A page is one file that loads nothing."""

from __future__ import annotations

import base64
import re
from dataclasses import dataclass
from typing import Any, NamedTuple


class Cell(NamedTuple):
    """tone: "better", "worse" or "" as the interval says; "head" for a row's title."""

    text: str
    tone: str = ""


@dataclass(frozen=True)
class Table:
    """One table for the console, Markdown and HTML alike."""

    title: str
    header: tuple[str, ...]
    rows: list[list[Cell]]
    note: str = ""


def render(name: str, **values: Any) -> str:
    """The page of a template, which is named by its path below this package. Needs jinja2, which torch brings."""
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader(__package__, ""), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {"unbroken": _unbroken, "plain": _plain}
    return environment.get_template(name).render(**values)


def data_url(kind: str, content: bytes) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"


def _unbroken(text: str) -> str:
    """Where a narrow screen may break a number: before ± and before an interval, not within."""
    return re.sub(r"\[[^]]*\]|\(n = \d+\)|± \S+", lambda found: found[0].replace(" ", "\u00a0"), text)


def _plain(text: str) -> str:
    return text.replace("**", "")
