"""A study as sentences, CSV, tables (Markdown), plots and one self-contained HTML page: everything computed, nothing assumed.

    write_report(load_study(out))      # also of a study that is still running: what is missing is listed

Needs the extra [lab]; importing this module does not.
"""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from sib_fast.lab.page import data_url, render
from sib_fast.lab.results import write_atomically
from sib_fast.lab.study.cells import setting
from sib_fast.lab.study.figures import figures, rendered
from sib_fast.lab.study.records import METRICS, Quantity, Study, file_stem, load_study
from sib_fast.lab.study.sentences import answer, gaps, seen, status_lines, step_cost
from sib_fast.lab.study.statistics import DEFINITIONS, LEVEL, Difference, differences
from sib_fast.lab.study.tables import (
    against_variants,
    compared,
    controls,
    counts_table,
    differing_settings,
    energies,
    everything,
    headline,
    not_improved,
    primary_table,
    secondary_tables,
    step_table,
    variants,
    verdict_table,
)

__all__ = ["Study", "closing_lines", "load_study", "write_report"]

_PANEL_BYTES = 600_000  # of panel.png, beyond which the page takes a smaller copy


def write_report(study: Study) -> list[Path]:
    """Write results.csv, differences.csv, table.md, figures/*.png and *.svg and report.html; each in one step.

    Errors:  ImportError without the extra [lab].
    """
    found = differences(study)
    contents = {
        "results.csv": _results_csv(study),
        "differences.csv": _differences_csv(found),
        "table.md": markdown(study),
    }
    (study.out / "figures").mkdir(exist_ok=True)
    pictures = []
    encoded: dict[str, bytes] = {}
    for arch in study.architectures:
        for name, (figure, caption) in figures(study, arch).items():
            files_of = rendered(figure)
            encoded |= {f"figures/{name}-{arch}.{kind}": content for kind, content in files_of.items()}
            pictures.append((data_url("svg+xml", files_of["svg"]), caption))
    encoded |= {name: text.encode() for name, text in contents.items()}
    encoded["report.html"] = _html(study, pictures).encode()
    for name, content in encoded.items():
        write_atomically(study.out / name, content)
    return [study.out / name for name in encoded]


def closing_lines(study: Study, program: str) -> list[str]:
    """What a finished run ends with: where the picture is, what was seen, what can be done next.

    Args:    program: how this package's command is called here.
    """
    out, architectures = study.out, study.reported
    lines = ["", "What was seen"]
    lines += [f"  {i}. {sentence}" for i, sentence in enumerate(seen(study), 1)]
    lines += [f"  What it costs: {step_cost(study, arch)}" for arch in study.step_seconds if arch in architectures]
    lines.append("")
    if (out / "panel.png").is_file():
        lines.append(f"The picture: {out / 'panel.png'}")
    lines += [f"Every number, plot and verdict: {out / 'report.html'}", "", "What next"]
    first = [study.of(arch, v)[:1] for arch in architectures[:1] for v in (study.baseline, study.headline)]
    pair = " ".join(f"--checkpoint {out / 'networks' / file_stem(*n.key)}.pt" for found in first for n in found)
    suggestions = {
        f"{program} explain {pair} --image FILE --out maps.png": "where these networks find the evidence in a picture of yours",
        f"{program} train --data folder --root FOLDER --out runs/mine": "S-IB on your own images (docs/data.md)",
        f"{program} study": "more ways of training, a control without a mask, a second network; an hour or more",
    }
    for command, what in suggestions.items():
        if command not in study.command.split(" && "):
            lines += [f"  {command}", f"      {what}"]
    return lines


def markdown(study: Study) -> str:
    """For a README: energy and accuracy, then the variants, one block per architecture."""
    blocks = [f"{text}\n" for text in status_lines(study)]
    for arch in study.reported:
        tables = [headline(study, arch), variants(study, arch), verdict_table(study, arch)]
        if study.protocol.secondary:
            first = [primary_table(study)] if arch == study.reported[0] else []
            tables = [*first, energies(study, arch), compared(study, arch), *secondary_tables(study, arch), tables[-1]]
        for table in tables:
            lines = [f"**{table.title}**", ""]
            lines.append("| " + " | ".join(map(_escape, table.header)) + " |")
            lines.append("|---" + "|---:" * (len(table.header) - 1) + "|")
            for row in table.rows:
                cells = (f"**{_escape(c.text)}**" if c.tone == "better" else _escape(c.text) for c in row)
                lines.append("| " + " | ".join(cells) + " |")
            if table.note:
                lines += ["", table.note]
            blocks.append("\n".join(lines) + "\n")
    return "\n".join(blocks)


def _escape(text: str) -> str:
    return text.replace("|", "\\|")


def _results_csv(study: Study) -> str:
    """Long format: one row per network and number, NaN where it is undefined."""
    rows = ((*network.key, *quantity, value) for network in study.networks for quantity, value in network.values.items())
    return _csv(("arch", "variant", "seed", "quantity", "method", "metric", "value"), rows)


def _differences_csv(found: Iterable[Difference]) -> str:
    keys = ("arch", "variant", "against", "quantity", "method", "metric", "better", "n", "seeds", "dropped")
    better = {1: "higher", -1: "lower", 0: ""}
    rows = []
    for d in found:
        seeds = (" ".join(map(str, each)) for each in (d.seeds, d.dropped))
        rows.append([d.arch, d.variant, d.against, *d.quantity, better[d.quantity.kind.direction], d.n, *seeds])
        rows[-1] += [d.mean, d.sd, d.low, d.high, d.p, d.effect]
    return _csv((*keys, "mean", "sd", "low", "high", "p", "effect"), rows)


def _csv(header: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(header)
    writer.writerows(rows)
    return text.getvalue()


def _panel(path: Path) -> str | None:
    """panel.png as a data URL, made smaller if it would be most of the page; None where there is none."""
    if not path.is_file():
        return None
    content = path.read_bytes()
    if len(content) <= _PANEL_BYTES:
        return data_url("png", content)
    from PIL import Image

    smaller = io.BytesIO()
    with Image.open(path) as image:
        image = image.convert("RGB")
        image.thumbnail((1600, 2400))
        image.save(smaller, "JPEG", quality=85)
    return data_url("jpeg", smaller.getvalue())


def _html(study: Study, pictures: list[tuple[str, str]]) -> str:
    architectures = [
        {
            "label": study.architectures[arch],
            "verdicts": verdict_table(study, arch),
            "corrected": [energies(study, arch), compared(study, arch), *secondary_tables(study, arch)]
            if study.protocol.secondary
            else [],
            "headline": headline(study, arch),
            "variants": [t for t in (variants(study, arch), against_variants(study, arch)) if t.rows],
            "counts": counts_table(study, arch),
            "controls": controls(study, arch),
            "everything": everything(study, arch),
            "not_improved": not_improved(study, arch),
            "settings": differing_settings(study, arch),
            "steps": step_table(study, arch) if arch in study.step_seconds else None,
        }
        for arch in study.reported
    ]
    seconds = [n.values.get(Quantity("train_seconds"), math.nan) for n in study.networks]
    hours = sum(s for s in seconds if math.isfinite(s)) / 3600
    return render(
        "study/report.html.j2",
        study=study,
        primary=primary_table(study) if study.protocol.secondary else None,
        status=status_lines(study),
        seen=[s.replace(" %", "\u00a0%") for s in seen(study)],
        costs=[step_cost(study, arch) for arch in study.step_seconds if study.of(arch)],
        answer=answer(study),
        architectures=architectures,
        pictures=pictures,
        panel=_panel(study.out / "panel.png"),
        settings={k: setting(v) for k, v in study.settings.items()},
        environment={k: setting(v) for k, v in study.environment.items()} | {"training time, all networks": f"{hours:.2f} hours"},
        metrics=METRICS,
        definitions=DEFINITIONS,
        gaps=gaps(study),
        chance=(1 - LEVEL) / 2,
    )
