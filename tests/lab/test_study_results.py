"""The study's pages show what its stored records say."""

import statistics
from pathlib import Path

import pytest

pytest.importorskip("scipy")
from sib_fast.lab.study.records import IN_DISTRIBUTION, SHIFTED, explanation, load_study
from sib_fast.lab.study.report import markdown

ROOT = Path(__file__).parent.parent.parent
STUDY = ROOT / "benchmarks/results/intel-xeon-2-cores/study"


@pytest.fixture(scope="module")
def study():
    return load_study(STUDY)


def test_the_table_is_that_of_the_records(study):
    assert (ROOT / "docs/study/table.md").read_text() == markdown(study)


def test_the_readmes_table_is_that_of_the_records(study):
    rows = {
        "accuracy, backgrounds shifted": SHIFTED,
        "accuracy, backgrounds as in training": IN_DISTRIBUTION,
        "inside the object: vanilla gradient": explanation("saliency", "energy"),
        "inside the object: integrated gradients": explanation("integrated_gradients", "energy"),
        "inside the object: Grad-CAM": explanation("grad_cam", "energy"),
    }
    columns = [(arch, variant) for arch in study.architectures for variant in ("plain", "unmasked", "sib")]
    means = {
        label: [f"{statistics.fmean(study.values(*column, quantity).values()):.3f}" for column in columns]
        for label, quantity in rows.items()
    }
    table = (ROOT / "README.md").read_text().partition("<!-- study -->\n")[2].partition("<!-- /study -->")[0]
    assert {label: cells for label, *cells in (line.strip("| ").split(" | ") for line in table.splitlines()[2:])} == means


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
