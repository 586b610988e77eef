"""The study's pages show what its stored records say."""

from pathlib import Path

import pytest

pytest.importorskip("scipy")
from sib_fast.lab.study.records import load_study
from sib_fast.lab.study.report import markdown

ROOT = Path(__file__).parent.parent.parent
STUDY = ROOT / "benchmarks/results/intel-xeon-2-cores/study"


@pytest.fixture(scope="module")
def study():
    return load_study(STUDY)


def test_the_table_is_that_of_the_records(study):
    assert (ROOT / "docs/study/table.md").read_text() == markdown(study)


def test_the_readme_quotes_the_table(study):
    table = set(markdown(study).splitlines())
    readme = (ROOT / "README.md").read_text().partition("## Does it work?")[2].partition("## Install")[0]
    rows = [line for line in readme.splitlines() if line.startswith("|")]
    assert len(rows) > 8
    assert [row for row in rows if row not in table] == []


def test_every_planned_network_is_reported_on_seeds_that_settings_were_not_chosen_on(study):
    assert study.missing == []
    assert study.unplanned == ()
    seeds = {n.seed for n in study.networks}
    assert min(seeds) >= 100
    assert len(seeds) >= 5
    for network in study.networks:
        assert network.seed in seeds
    for arch in study.architectures:
        for variant in study.present(arch):
            assert {n.seed for n in study.of(arch, variant)} == seeds, (arch, variant)
