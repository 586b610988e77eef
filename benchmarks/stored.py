"""Stored results, whichever suite wrote them, as one list of figures: what `report` and `compare` read."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple


class Figure(NamedTuple):
    """One variant of one case. ms; spread is the middle half of the rounds, or half the range where only that was stored."""

    suite: str
    case: tuple
    variant: str
    median: float
    spread: float
    rest: dict[str, Any]

    @property
    def key(self) -> tuple:
        return (self.suite, self.case, self.variant)


def load(path: Path) -> dict[str, Any]:
    data = json.loads(path.read_text())
    if not isinstance(data, dict) or not ("rows" in data or "benchmarks" in data):
        raise SystemExit(f"{path}: no results: neither 'rows' nor pytest-benchmark's 'benchmarks'")
    return data


def machine(data: dict[str, Any]) -> str:
    """GPU, or CPU and threads. pytest-benchmark's files carry it with each benchmark."""
    if "benchmarks" in data:
        data = next((b["extra_info"] for b in data["benchmarks"] if b["extra_info"]), {})
    on_gpu = data.get("gpu") and "cuda" in {data.get("device"), *(row.get("device") for row in data.get("rows", []))}
    return data["gpu"]["name"] if on_gpu else f"{data.get('cpu', 'unknown CPU')}, {data.get('threads', '?')} threads"


def refusal(data: dict[str, Any], variant: str, needs: list[str] | None = None) -> str | None:
    """Why a variant's figure may not be reported, or None. needs: the verdicts behind it; a row of before there were verdicts by
    op names none, and counts where all of its file's are green."""
    tests = data.get("tests", "green")  # pytest-benchmark's suites fail where a backend is red, and store nothing
    if tests == "skipped":
        return "its tests were skipped"
    if not isinstance(tests, dict):
        return None if tests == "green" else f"tests: {tests}"
    if needs is None:
        needs = list(tests) if variant.startswith("ours") else []
    missing = {"green": False, "why": "not judged"}
    return "; ".join(f"{name}: {one['why']}" for name in needs if not (one := tests.get(name, missing))["green"]) or None


def figures(data: dict[str, Any]) -> Iterator[Figure]:
    if "benchmarks" in data:
        for one in data["benchmarks"]:
            info, stats = one["extra_info"], one["stats"]
            device = info.get("device_ms")
            case, variant = _split(one)
            median, spread = (device["median"], device["spread"]) if device else (1e3 * stats["median"], 1e3 * stats["iqr"])
            yield Figure(one["group"], case, variant, median, spread, info)
        return
    for row in data["rows"]:
        if "failed" in row:
            continue
        if "variants" in row:
            for variant, one in row["variants"].items():
                if "error" not in one:
                    time = one["device_ms"]
                    yield Figure(row["suite"], tuple(row["case"].values()), variant, time["median"], time["spread"], one)
        elif "median_ms" in row:
            images, channels, size, _ = row["shape"]
            for variant, median in row["median_ms"].items():
                spread = (row["max_ms"][variant] - row["min_ms"][variant]) / 2
                rest = {"peak_extra_mib": row["peak_extra_mib"].get(variant)}
                yield Figure("head", (images, channels, size, row["dtype"]), variant, median, spread, rest)
        elif "median_s" in row:
            for variant, median in row["median_s"].items():
                spread = row.get("spread_s", {}).get(variant, 0.0)
                case = (row["model"], *row["shape"])
                rest = {"ratio_to_plain": row["ratio_to_plain"][variant]}
                if "needs" in row:
                    rest["needs"] = row["needs"][variant]
                yield Figure("step", case, variant, 1e3 * median, 1e3 * spread, rest)


def _split(one: dict[str, Any]) -> tuple[tuple, str]:
    """Case and variant of a pytest-benchmark entry: the size on one side, the rest of its parameters on the other."""
    parts = one["param"].split("-") if one.get("param") else ["?"]
    return (parts[0],), "-".join(parts[1:])
