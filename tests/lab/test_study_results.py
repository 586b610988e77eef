"""The study's pages show what its stored records say."""

import statistics
from pathlib import Path

import pytest

pytest.importorskip("scipy")
from sib_fast.lab.study.cells import interval
from sib_fast.lab.study.records import IN_DISTRIBUTION, METHOD_LABELS, SHIFTED, Quantity, explanation, load_study
from sib_fast.lab.study.report import markdown
from sib_fast.lab.study.statistics import difference

ROOT = Path(__file__).parent.parent.parent
STUDY = ROOT / "benchmarks/results/intel-xeon-2-cores/study"
EVIDENCE = ROOT / "benchmarks/results/amd-epyc-2-cores/study_evidence/main"


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


# ---- evidence terms -------------------------------------------------------------------------------------------------

MAIN = ("plain", "unmasked", "sib", "share", "area", "sib_share", "sib_area")


@pytest.fixture(scope="module")
def evidence():
    return load_study(EVIDENCE)


def test_the_table_of_evidence_terms_is_that_of_the_records(evidence):
    assert (ROOT / "docs/study-evidence/table.md").read_text() == markdown(evidence)


def test_the_seven_forms_are_paired_on_seeds_that_nothing_was_chosen_on(evidence):
    seeds = {arch: [{n.seed for n in evidence.of(arch, variant)} for variant in MAIN] for arch in evidence.architectures}
    for found in seeds.values():
        assert all(s == found[0] for s in found)
        assert min(found[0]) >= 200
        assert len(found[0]) >= 5


def comparison(study) -> str:
    """The table of `docs/which.md`: both networks in every cell."""
    quantities = {
        "accuracy, backgrounds shifted": SHIFTED,
        "as in training": IN_DISTRIBUTION,
        "answers changed by another background": Quantity("background", "", "swap_changed"),
        "evidence on the object, five methods": explanation("mean_not_optimised", "energy"),
        "occlusion": explanation("occlusion", "energy"),
    }
    lines = ["| | " + " | ".join(quantities) + " |", "| --- |" + " ---: |" * len(quantities)]
    for variant in MAIN:
        cells = [
            " · ".join(f"{statistics.fmean(study.values(arch, variant, quantity).values()):.3f}" for arch in study.architectures)
            for quantity in quantities.values()
        ]
        lines.append(f"| {study.label(variant)} | {' | '.join(cells)} |")
    for knows_nothing in ("constant", "centre"):
        scores = study.values("small_conv_net", "plain", explanation(knows_nothing, "energy")).values()
        cells = ["", "", "", *[f"{statistics.fmean(scores):.3f}"] * 2]
        lines.append(f"| {METHOD_LABELS[knows_nothing]} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def paired_differences(study) -> str:
    """The table of `docs/study-evidence/README.md`: what the protocol compares, both networks in every cell."""
    energy = explanation("mean_not_optimised", "energy")
    pairs = (("share", "area"), ("area", "plain"), ("share", "plain"), ("area", "sib"), ("share", "sib"), ("area", "unmasked"))
    pairs += (("share", "unmasked"), ("sib_area", "sib"), ("sib_share", "sib"), ("sib_share", "sib_area"), ("sib_area", "area"))
    lines = ["| | accuracy, backgrounds shifted | evidence on the object, five methods |", "| --- | --- | --- |"]
    for pair in pairs:
        cells = [
            " · ".join(interval(difference(study, arch, *pair, quantity)).text for arch in study.architectures)
            for quantity in (SHIFTED, energy)
        ]
        lines.append(f"| {' − '.join(map(study.label, pair))} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


@pytest.mark.parametrize(
    ("page", "block", "made"),
    [("which.md", "evidence", comparison), ("study-evidence/README.md", "differences", paired_differences)],
)
def test_the_pages_on_evidence_terms_show_the_records(evidence, page, block, made):
    shown = (ROOT / "docs" / page).read_text().partition(f"<!-- {block} -->\n")[2].partition(f"<!-- /{block} -->")[0]
    assert shown == made(evidence)
