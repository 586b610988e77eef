"""Many studies by one command: the stages of a file, the most telling first, so that whatever time there is goes to the best.

    sib-fast study --plan docs/study-evidence/plan.json --out runs/evidence --jobs 2

    {"common": {"protocol": "evidence", "explained": 200},
     "stages": [{"out": "main", "variants": ["plain", "share"], "seeds": [200, 201, 202]}, …]}

A stage holds options of `sib-fast study`; stages that share a folder add networks to one study. All is planned before the first
network is trained, so that the report of an unfinished study says what is missing.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sib_fast.lab.study import run as study
from sib_fast.lab.study.config import StudyConfig

if TYPE_CHECKING:
    from rich.console import Console

    from sib_fast.lab.study.progress import Task


def read_plan(path: Path, out: Path, **options: Any) -> list[StudyConfig]:
    """The stages of a file, with their folders under ``out``.

    Args:    options: of every stage: jobs, progress.
    Errors:  ValueError that names the file, for one that is no plan and for stages of one folder with different settings.
    """
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
        stages = [document.get("common", {}) | stage for stage in document["stages"]]
        made = [StudyConfig(**stage | options | {"out": out / stage["out"]}) for stage in stages]
        if not made:
            raise ValueError("no stage")
    except FileNotFoundError as error:
        raise ValueError(f"study: plan must be a file, got {path}") from error
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(f"study: plan {path} must hold stages of study options, each with its out, got {error!r}") from error
    first: dict[Path, dict[str, Any]] = {}
    for config in made:
        earlier = first.setdefault(config.out, config.settings())
        for name, value in config.settings().items():
            if earlier[name] != value:
                got = f"{earlier[name]!r} and {value!r}"
                raise ValueError(f"study: plan {path} must have one {name} for a folder, got {got} for {config.out}")
    return made


def networks(stages: list[StudyConfig]) -> dict[Path, list[Task]]:
    """Folder -> its networks, each once, in the order of training."""
    found: dict[Path, dict[Task, None]] = {}
    for stage in stages:
        found.setdefault(stage.out, {}).update(dict.fromkeys(stage.planned()))
    return {folder: list(tasks) for folder, tasks in found.items()}


def run_plan(path: Path, out: Path, console: Console | None = None, **options: Any) -> None:
    """Train what is missing, stage by stage. What fails does not keep the other stages from being trained.

    Errors:  as :func:`sib_fast.lab.study.run.run`; of several stages that failed, the first one's, at the end.
    """
    stages = read_plan(path, out, **options)
    planned, command = networks(stages), f"sib-fast study --plan {path} --out {out}"
    for folder, tasks in planned.items():
        study.announce(next(stage for stage in stages if stage.out == folder), tasks, command)
    failed: list[Exception] = []
    for stage in stages:
        if study.missing(stage):
            with _kept(failed):
                study.run(stage, console, (planned[stage.out], command))
    if failed:
        raise failed[0]
    for folder in planned:
        study.write_pages(folder)


@contextlib.contextmanager
def _kept(failed: list[Exception]) -> Iterator[None]:
    try:
        yield
    except Exception as error:
        failed.append(error)
