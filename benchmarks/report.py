"""Tables and plots from stored results: `python -m benchmarks.report results/<device>/*.json --out report/`.

Writes report.md and, where there are enough sizes, time_against_n.png, time_against_pixels.png and roofline.png. Figures of
ops whose tests were red, or not run to the end, are refused: they are listed as such and the exit status is 1.
"""

from __future__ import annotations

import argparse
import io
import sys
from pathlib import Path
from typing import Any

from benchmarks.stored import Figure, figures, load, machine, refusal
from benchmarks.timing import head_phases
from sib_fast.lab.results import write_atomically

ITEM = {"float32": 4, "bfloat16": 2, "float16": 2, "float64": 8}


def accepted(data: dict[str, Any]) -> tuple[list[Figure], list[str]]:
    """(figures that count, sentences about those that do not)."""
    good, refused = [], {}
    for figure in figures(data):
        why = refusal(data, figure.variant, figure.rest.get("needs"))
        if why is None:
            good.append(figure)
        else:
            refused[figure.variant] = why
    return good, [f"{variant}: {why}" for variant, why in sorted(refused.items())]


def _number(value: float | None, digits: int = 3) -> str:
    return "–" if value is None else f"{value:.{digits}g}" if abs(value) < 1000 else f"{value:,.0f}"


def _table(found: list[Figure]) -> list[str]:
    lines = [
        "| case | variant | ms | spread | over naive | over tuned | % of copy | over floor | extra MiB | eager ms |",
        "| --- | --- | ---: | ---: | ---: | ---: | ---: | --- | ---: | ---: |",
    ]
    median = {(f.case, f.variant): f.median for f in found}
    for f in found:
        over = (median.get((f.case, slow)) for slow in ("naive", "tuned"))
        floor = ", ".join(f"{mode} {_number(x)}" for mode, x in f.rest.get("over_floor", {}).items()) or "–"
        cells = [
            "×".join(map(str, f.case)), f.variant, _number(f.median, 4), _number(f.spread, 2),
            *("–" if slow is None else _number(slow / f.median) for slow in over),
            _number(f.rest.get("percent_of_copy")), floor, _number(f.rest.get("peak_extra_mib")),
            _number(f.rest.get("eager_ms", {}).get("median")),
        ]  # fmt: skip
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def markdown(path: Path, data: dict[str, Any], good: list[Figure], refused: list[str]) -> list[str]:
    of = data if "commit" in data else next((b["extra_info"] for b in data.get("benchmarks", []) if b["extra_info"]), {})
    lines = [
        f"## {path.name}",
        "",
        f"{machine(data)}; torch {of.get('torch')}; commit {str(of.get('commit'))[:20]}; {of.get('date')}.",
    ]
    if of.get("gpu"):
        gpu = of["gpu"]
        lines.append(f"Driver {gpu['driver']}, CUDA {gpu['cuda']}, triton {gpu['triton']}.")
    if data.get("ceilings"):
        lines.append(
            "Measured ceilings: " + ", ".join(f"{k} {v:.4g}" for k, v in data["ceilings"].items()) + " (bytes/s, flops/s)."
        )
    for suite in dict.fromkeys(f.suite for f in good):
        lines += ["", f"### {suite}", "", *_table([f for f in good if f.suite == suite])]
    failed = [
        (row["case"], name, one["error"])
        for row in data.get("rows", [])
        for name, one in row.get("variants", {}).items()
        if "error" in one
    ]
    lines += ["", *(f"Failed: {name} at {list(case.values())}: {error}" for case, name, error in failed)]
    lines += [f"**Refused** {sentence}" for sentence in refused]
    lines += [f"Failed: {row['item']}: {row['failed']}" for row in data.get("rows", []) if "failed" in row and "item" in row]
    return [*lines, ""]


def plots(data: dict[str, Any], good: list[Figure], out: Path) -> list[Path]:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    head = [f for f in good if f.suite == "head" and len(f.case) == 4]
    written = []

    def line_plot(name: str, wanted: list[Figure], at, label: str) -> None:
        if len({at(f) for f in wanted}) < 2:
            return
        figure, axes = plt.subplots(figsize=(7, 4.5), layout="constrained")
        for variant in dict.fromkeys(f.variant for f in wanted):
            points = sorted((at(f), f.median, f.spread) for f in wanted if f.variant == variant)
            x, y, spread = zip(*points, strict=True)
            axes.errorbar(x, y, yerr=[s / 2 for s in spread], marker="o", label=variant)
        axes.set(xscale="log", yscale="log", xlabel=label, ylabel="ms, forward + backward", title=machine(data))
        axes.legend(fontsize="small")
        written.append(_save(plt, figure, out / name))

    sizes = [f for f in head if f.case[1] == 3 and f.case[3] == "float32"]
    most_common = max({f.case[2] for f in sizes}, key=lambda s: len({f.case[0] for f in sizes if f.case[2] == s}), default=0)
    batch = max({f.case[0] for f in sizes}, key=lambda n: len({f.case[2] for f in sizes if f.case[0] == n}), default=0)
    line_plot("time_against_n.png", [f for f in sizes if f.case[2] == most_common], lambda f: f.case[0], f"N at 3×{most_common}²")
    line_plot(
        "time_against_pixels.png", [f for f in sizes if f.case[0] == batch], lambda f: f.case[2] ** 2, f"pixels at N = {batch}"
    )
    if data.get("ceilings") and head:
        written.append(_roofline(plt, data, head, out / "roofline.png"))
    return written


def _roofline(plt, data: dict[str, Any], head: list[Figure], path: Path) -> Path:
    """Achieved flops against the head's own intensity, under the measured ceilings."""
    ceilings = data["ceilings"]
    figure, axes = plt.subplots(figsize=(7, 4.5), layout="constrained")
    intensities = []
    for variant in dict.fromkeys(f.variant for f in head):
        points = []
        for f in (f for f in head if f.variant == variant):
            images, channels, size, dtype = f.case
            phases = head_phases(images, channels, size, size, ITEM[dtype])
            flops, moved = sum(p.flops for p in phases), sum(p.bytes for p in phases)
            points.append((flops / moved, flops / (f.median / 1e3)))
        intensities += [x for x, _ in points]
        axes.scatter(*zip(*points, strict=True), s=18, label=variant)
    low, high = min(intensities) / 2, max(intensities) * 2
    for mode, rate in ceilings.items():
        if mode != "copy":
            knee = rate / ceilings["copy"]
            x = sorted({low, high, min(max(knee, low), high)})
            axes.plot(x, [min(rate, ceilings["copy"] * v) for v in x], linewidth=1, linestyle="--", label=f"roof {mode}")
    axes.set(xscale="log", yscale="log", xlabel="flops per byte (SPEC 8)", ylabel="flops per second", title=machine(data))
    axes.legend(fontsize="x-small")
    return _save(plt, figure, path)


def _save(plt, figure, path: Path) -> Path:
    image = io.BytesIO()
    figure.savefig(image, dpi=130)
    plt.close(figure)
    write_atomically(path, image.getvalue())
    return path


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="+", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--no-plots", action="store_true")
    args = parser.parse_args(argv)
    args.out.mkdir(parents=True, exist_ok=True)
    lines, any_refused = ["# Benchmarks", ""], False
    for path in args.files:
        data = load(path)
        good, refused = accepted(data)
        any_refused |= bool(refused)
        lines += markdown(path, data, good, refused)
        for sentence in refused:
            print(f"{path}: refused: {sentence}", file=sys.stderr)
        if not args.no_plots and good:
            folder = args.out if len(args.files) == 1 else args.out / path.stem
            folder.mkdir(exist_ok=True)
            lines += [f"![{p.stem}]({p.relative_to(args.out)})" for p in plots(data, good, folder)] + [""]
    write_atomically(args.out / "report.md", "\n".join(lines).encode())
    print(args.out / "report.md")
    return 1 if any_refused else 0


if __name__ == "__main__":
    sys.exit(main())
