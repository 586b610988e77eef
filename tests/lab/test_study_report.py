"""The study's report on made-up studies with known answers: its sentences, its tables, every file, and files that are refused."""

import csv
import dataclasses
import json
import re
from html.parser import HTMLParser

import numpy as np
import pytest

pytest.importorskip("scipy")
pytest.importorskip("matplotlib")

from sib_fast.explain import REPORTED
from sib_fast.lab.study import figures, report, sentences, tables
from sib_fast.lab.study.records import IN_DISTRIBUTION, METRICS, SHIFTED, Quantity, explanation, load_study
from sib_fast.lab.study.statistics import (
    by_method,
    comparisons,
    counts,
    difference,
    judged,
    verdicts,
)
from tests.lab.made_up_studies import TRIPLE, VARIANTS, record, study, write

# ---- what is written ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """A report of three variants × three seeds, with hostile labels, a gap, a worsening and a picture."""
    from PIL import Image

    records = [record("plain", s) for s in (1, 2, 3)]
    for s in (1, 2, 3):
        noise = 0.001 * s
        records.append(
            record("sib", s, energy=0.15 + noise, shifted=0.04 + noise, log_background=-0.3, deletion=0.03 + noise, iou=-0.02)
        )
    records += [record("unmasked", s, energy=0.05, shifted=0.04) for s in (1, 2)]
    records[4]["explanations"]["saliency"]["energy"] = None
    planned = [["net", v, s] for v in VARIANTS for s in (1, 2, 3)]
    labels = VARIANTS | {"unmasked": 'no <mask> | "control" & co'}
    out = write(
        tmp_path_factory.mktemp("study") / "s", records, planned=planned, variants=labels, status="interrupted", command="go & do"
    )
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (700, 700, 3), dtype=np.uint8)).save(out / "panel.png")
    made = load_study(out)
    return made, report.write_report(made)


class Page(HTMLParser):
    """Checks nesting, and keeps text, ids and every address that a browser would fetch."""

    EMPTY = ("meta", "img", "br", "hr", "link", "input")

    def __init__(self, content):
        super().__init__()
        self.open, self.tags, self.ids, self.fetched, self.anchors, self.text = [], [], [], [], [], []
        self.feed(content)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        for name, value in attributes:
            if name == "id":
                self.ids.append(value)
            elif name in ("src", "srcset", "data", "poster", "style") or (name == "href" and tag != "a"):
                self.fetched.append(value)
            elif name == "href":
                self.anchors.append(value)
            assert not name.startswith("on")
        if tag not in self.EMPTY:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


def test_the_page_is_whole_and_needs_nothing_else(written):
    made, paths = written
    content = (made.out / "report.html").read_text()
    assert len(content) < 2_000_000
    page = Page(content)
    assert not {"script", "link", "iframe", "object"} & set(page.tags)
    assert page.fetched
    assert all(address.startswith("data:image/") for address in page.fetched)
    assert "url(" not in content
    assert "@import" not in content
    assert sorted(page.anchors) == sorted(f"#{name}" for name in page.ids)
    assert page.tags.count("img") == 4 + 1  # the plots, and the panel: noise of 1.5 MB, so made smaller
    assert (made.out / "panel.png").stat().st_size > 1_000_000
    assert sum(address.startswith("data:image/jpeg") for address in page.fetched) == 1
    text = "".join(page.text)
    assert 'no <mask> | "control" & co' in text
    assert "go & do" in text
    for metric in METRICS.values():
        assert metric.definition in text
    for verdict in verdicts(made, "net"):
        assert verdict.expectation in text
    for line in (*sentences.answer(made), *sentences.gaps(made), *sentences.status_lines(made)):
        assert line in text
    assert [p for p in paths if not p.is_file()] == []
    assert not list(made.out.rglob("*.partial"))


def test_csv_files_hold_every_number(written):
    made, _ = written
    with (made.out / "results.csv").open() as file:
        rows = list(csv.DictReader(file))
    read = {}
    for r in rows:
        key = (r["arch"], r["variant"], int(r["seed"]))
        read.setdefault(key, {})[Quantity(r["quantity"], r["method"], r["metric"])] = float(r["value"])
    assert set(read) == {n.key for n in made.networks}
    for network in made.networks:
        np.testing.assert_equal(read[network.key], network.values)  # exact, NaN equal to NaN
    with (made.out / "differences.csv").open() as file:
        rows = {(r["variant"], r["against"], r["quantity"], r["method"], r["metric"]): r for r in csv.DictReader(file)}
    row = rows["sib", "plain", "explanation", "saliency", "energy"]
    assert (row["n"], row["seeds"], row["dropped"], row["better"], row["effect"]) == ("2", "1 3", "2", "higher", "better")
    assert float(row["mean"]) == pytest.approx(0.152)
    row = rows["sib", "unmasked", "accuracy_shifted", "", ""]
    assert (row["seeds"], row["dropped"], float(row["mean"])) == ("1 2", "3", pytest.approx(0.0015))
    assert rows["sib", "plain", "explanation", "saliency", "deletion"]["better"] == "lower"


def test_markdown_table(written):
    made, _ = written
    text = (made.out / "table.md").read_text()
    assert "A partial study (status: interrupted): 8 of 9 planned networks." in text
    cells = next(line.split(" | ") for line in text.splitlines() if line.startswith("| integrated gradients"))
    d = difference(made, *TRIPLE, explanation("integrated_gradients", "energy"))
    assert cells[3].strip(" |*") == f"+{d.mean:.3f} [+{d.low:.3f}, +{d.high:.3f}]"
    assert cells[3].startswith("**")
    assert 'no <mask> \\| "control" & co' in text
    blocks = [b.splitlines() for b in re.findall(r"(?:^\|.*\n)+", text, re.M)]
    assert len(blocks) == 3
    for block in blocks:
        assert len({len(re.findall(r"(?<!\\)\|", line)) for line in block}) == 1  # as many cells in every row
    assert len(blocks[1]) == 2 + len(made.present("net"))


def test_what_got_worse_has_its_place(written):
    made, _ = written
    worse, unclear, others = tables.not_improved(made, "net")
    # deletion rose and IoU fell for all eight methods; nothing else did
    assert len(worse.rows) == 16
    assert {row[0].text.split(": ")[1] for row in worse.rows} == {"deletion ↓", "IoU ↑"}
    assert all(row[3].tone == "worse" and row[3].text.endswith("(worse)") for row in worse.rows)
    assert worse.note == f"16 of {len(judged(made, *TRIPLE))} comparisons."
    assert len(unclear.rows) == counts(judged(made, *TRIPLE))["unclear"] > 0
    # behind the control in the same two
    assert {row[0].text for row in others.rows} == {f"S-IB − {made.variants['unmasked']}"}
    assert [row[1].text for row in others.rows] == ["mean of six: IoU ↑", "mean of six: deletion ↓"]
    assert "16 worse" in sentences.answer(made)[2]


def test_the_answer_says_which_way_things_went(tmp_path):
    up = study(tmp_path / "up", {"energy": 0.15, "shifted": 0.05, "inside": -0.03}, {})
    first, second, third = sentences.answer(up)
    assert "rose by +0.150 [+0.150, +0.150] (n = 5) on the small net (by at least 0.10 for 6 of the six)" in first
    assert "shifted backgrounds rose by +0.050" in second
    assert "In distribution it fell by −0.030" in second
    assert "energy +0.150 [+0.150, +0.150] and shifted accuracy +0.050" in third
    same = study(tmp_path / "same", [{"shifted": d} for d in (-0.01, 0.0, 0.01, 0.0, 0.0)], {})
    assert "did not change clearly" in sentences.answer(same)[1]


def test_plots_show_the_differences(written):
    made, _ = written
    panels = figures.figures(made, "net")["differences"][0].axes

    def drawn(panel, comparison):
        return np.array(panel.containers[comparison].lines[0].get_xdata(), dtype=float)

    energy = drawn(panels[0], 0)
    expected = [
        difference(made, *TRIPLE, q).mean for q in (*(explanation(m, "energy") for m in REPORTED), SHIFTED, IN_DISTRIBUTION)
    ]
    np.testing.assert_allclose(energy, expected)
    deletion = [d.mean for d in by_method(made, "net", "sib", "unmasked", "deletion")]
    np.testing.assert_allclose(drawn(panels[3], 1), deletion)
    (bars,) = panels[3].containers[0].lines[2]
    part = difference(made, *TRIPLE, explanation(REPORTED[0], "deletion"))
    np.testing.assert_allclose(bars.get_segments()[0][:, 0], [part.low, part.high])


def test_the_same_study_gives_the_same_bytes(written):
    made, paths = written
    before = {p: p.read_bytes() for p in paths}
    report.write_report(load_study(made.out))
    assert [p.name for p in paths if p.read_bytes() != before[p]] == []


# ---- for a reader who knows no term of the trade -------------------------------------------------------------------------


def spread(**ends):
    """Five seeds' shifts whose mean lies in the middle and whose interval holds 0."""
    return [{name: low + (high - low) * k / 4 for name, (low, high) in ends.items()} for k in range(5)]


@pytest.mark.parametrize(
    ("sib", "control", "expected"),
    [
        (
            {"energy": 0.15, "shifted": 0.05, "inside": -0.05},
            None,
            (
                "53 % of the explanations' weight lies on the object with S-IB, 38 % with plain training: clearly more. "
                "The object covers 18 % of an image.",
                "78 % of the images are recognised with S-IB, 73 % with plain training where the background does not belong to "
                "the class: clearly more; where it is as in training, 78 % and 83 %: clearly less.",
                "By method, clearly more on the object for vanilla gradient, integrated gradients, SmoothGrad, guided "
                "backpropagation, Grad-CAM, Grad-CAM++.",
            ),
        ),
        (
            {"energy": -0.15, "shifted": -0.05, "inside": 0.05, "saliency.energy": 0.4},
            None,
            (
                "29 % of the explanations' weight lies on the object with S-IB, 38 % with plain training: clearly less.",
                "68 % of the images are recognised with S-IB, 73 % with plain training where the background does not belong to "
                "the class: clearly less; where it is as in training, 88 % and 83 %: clearly more.",
                "By method, clearly more on the object for vanilla gradient; clearly less for integrated gradients, SmoothGrad, "
                "guided backpropagation, Grad-CAM, Grad-CAM++.",
            ),
        ),
        (
            spread(energy=(-0.2, 0.3), shifted=(-0.1, 0.1)),
            None,
            (
                "with plain training: a difference that chance could make, with 5 pairs of networks.",
                "73 % with plain training where the background does not belong to the class: a difference that chance could "
                "make, with 5 pairs of networks; where it is as in training, 83 % and 83 %: a difference that chance could make",
                "By method, no clear change for vanilla gradient, integrated gradients",
            ),
        ),
        (
            {"energy": 0.15, "shifted": 0.05},
            {"energy": 0.05, "shifted": 0.05},
            (
                "53 % of the explanations' weight",
                "78 % of the images",
                "53 % of the weight lies on the object with S-IB, 43 % with a penalty that has no mask: clearly more; 78 % and "
                "78 % of the images on other backgrounds are recognised: a difference that chance could make, with 5 pairs",
            ),
        ),
    ],
    ids=["better", "worse", "undecided", "control"],
)
def test_three_sentences_say_what_was_seen_whichever_way_it_went(tmp_path, sib, control, expected):
    made = study(tmp_path / "s", sib, control)
    said = sentences.seen(made)
    assert len(said) == 3
    for sentence, words in zip(said, expected, strict=True):
        assert words in sentence
    assert ("mask" in said[2]) == (control is not None)


def test_one_pair_of_networks_tells_nothing_from_chance_and_none_nothing_at_all(tmp_path):
    said = sentences.seen(study(tmp_path / "one", {"energy": 0.3, "shifted": 0.1}, seeds=(7,)))
    assert all("which cannot tell an effect from chance" in s for s in said[:2])
    assert "clearly" not in " ".join(said)
    records = [record("plain", 1), record("sib", 2)]
    said = sentences.seen(load_study(write(tmp_path / "none", records)))
    assert said == ["No S-IB and plain training network of the same seed have finished: there is nothing to compare yet."]


STEPS = {"plain": 0.030, "naive": 0.090, "sib": 0.085, "prepared": 0.078}


@pytest.mark.parametrize(
    ("fixed", "words"),
    [
        (
            {"plain_fixed": 0.005, "prepared_fixed": 0.018},
            "18 ms of it, and 5 ms of the plain one, are there for two images already",
        ),
        ({"plain_fixed": 0.005, "prepared_fixed": 0.005}, None),  # then the calls explain nothing
        ({"plain_fixed": 0.031, "prepared_fixed": 0.018}, None),
        ({}, None),
    ],
    ids=["calls", "equal", "noise", "not timed"],
)
def test_the_cost_of_a_step_and_why(tmp_path, fixed, words):
    records = [record(v, s) for v in ("plain", "sib") for s in (1, 2)]
    made = load_study(write(tmp_path / "s", records, step_seconds={"net": STEPS | fixed}))
    said = sentences.step_cost(made, "net")
    assert said.startswith("2.6 times the time of a plain training step (78 ms, 30 ms)")
    assert ("two images" in said) == (words is not None)
    if words:
        assert words in said
        assert "What grows with the images costs 2.4 times as much" in said
        report.write_report(made)
        text = "".join(Page((made.out / "report.html").read_text()).text)
        assert text.count(said) == 2  # among the sentences and below the table
        assert "A training step, small net" in text


def test_a_run_ends_with_the_picture_the_sentences_and_what_to_do_next(tmp_path):
    records = [record(v, s) for v in ("plain", "sib") for s in (1, 2)]
    made = load_study(write(tmp_path / "s", records, command="prog study --quick"))
    assert "The picture:" not in "\n".join(report.closing_lines(made, "prog"))
    (made.out / "panel.png").write_bytes(b"")
    lines = report.closing_lines(made, "prog")
    text = "\n".join(lines)
    assert f"The picture: {made.out / 'panel.png'}" in text
    assert [line for line in lines if line.startswith("  1. ")] == [f"  1. {sentences.seen(made)[0]}"]
    assert not re.search("not met|not decidable|not run", text)
    networks = [f"--checkpoint {made.out}/networks/net.{v}.seed1.pt" for v in ("plain", "sib")]
    assert f"prog explain {' '.join(networks)} --image FILE" in text
    assert "  prog study" in lines
    done = load_study(write(tmp_path / "t", records, command="prog study"))
    assert "  prog study" not in report.closing_lines(done, "prog")


def test_what_was_not_run_is_not_mentioned(tmp_path):
    made = study(tmp_path / "s", {"energy": 0.15, "shifted": 0.05})
    report.write_report(dataclasses.replace(made, variants={v: VARIANTS[v] for v in ("plain", "sib")}))
    text = "".join(Page((made.out / "report.html").read_text()).text)
    assert "control)" not in text
    assert "against the other variants" not in text
    assert "unmasked" not in text
    assert "energy –" not in text


def test_the_page_opens_with_the_picture_and_the_sentences(written):
    made, _ = written
    content = (made.out / "report.html").read_text().replace("\u00a0%", " %").replace("&#39;", "'")
    page = content[content.index("<body>") :]
    positions = [page.index(words) for words in ("<figure>", sentences.seen(made)[0], "<table>")]
    assert positions == sorted(positions)


def test_every_cell_names_its_column_for_narrow_screens(written):
    made, _ = written
    content = (made.out / "report.html").read_text()
    table = content[content.index('aria-label="Expectations') :].partition("</table>")[0]
    assert set(re.findall(r'<td data-column="([^"]*)"', table)) == {"verdict", "measured"}
    assert "<td>" not in content


def test_two_architectures_are_told_apart(tmp_path):
    records = [record("plain", s, arch=a) for a in ("net", "other") for s in (1, 2)]
    records += [record("sib", s, arch=a, shifted=d) for a, d in (("net", 0.05), ("other", -0.05)) for s in (1, 2)]
    out = write(tmp_path / "s", records, architectures={"net": "small net", "other": "other net", "third": "third net"})
    made = load_study(out)
    effects = {a: difference(made, a, "sib", "plain", SHIFTED).effect for a in made.architectures}
    assert effects == {"net": "better", "other": "worse", "third": ""}
    assert "rose by +0.050 [+0.050, +0.050] (n = 2) on the small net; fell by −0.050" in sentences.answer(made)[1]
    text = report.markdown(made)
    assert "**other net**" in text
    assert "third net" not in text


@pytest.mark.parametrize("left", ["nothing", "plain only", "one network of S-IB"])
def test_a_study_that_has_just_begun_has_a_report(tmp_path, left):
    records = {"nothing": [], "plain only": [record("plain", s) for s in (1, 2)], "one network of S-IB": [record("sib", 1)]}[left]
    planned = [["net", v, s] for v in VARIANTS for s in (1, 2)]
    made = load_study(write(tmp_path / "s", records, planned=planned, status="running"))
    assert len(made.missing) == 6 - len(records)
    report.write_report(made)
    text = "".join(Page((made.out / "report.html").read_text()).text)
    assert f"{len(records)} of 6 planned networks" in text
    assert "Missing: small net, no mask (control): seeds 1, 2." in text
    assert "there is nothing to compare yet" in "".join(report.closing_lines(made, "prog"))


def test_results_that_were_not_planned_are_left_out_and_named(tmp_path):
    records = [record(v, s) for v in ("plain", "sib") for s in (1, 2)] + [record("sib", 3), record("odd", 1)]
    made = load_study(write(tmp_path / "s", records, planned=[["net", v, s] for v in ("plain", "sib") for s in (1, 2)]))
    assert sorted(n.seed for n in made.networks) == [1, 1, 2, 2]
    assert made.unplanned == (("net", "odd", 1), ("net", "sib", 3))
    assert "Left out, not planned: net, sib, seed 3." in sentences.gaps(made)
    assert sentences.status_lines(made) == ["2 results that were not planned are left out."]


def test_uneven_networks_are_named(tmp_path):
    records = [record(v, s) for v in ("plain", "sib") for s in (1, 2)]
    records[1] |= {"test_images": 400, "commit": "def"}
    lines = sentences.gaps(load_study(write(tmp_path / "s", records)))
    assert "Networks differ in test images: 400, 500." in lines
    assert "Networks were trained at 2 commits: abc, def." in lines


def test_unknown_keys_and_metrics_are_kept_and_not_judged(tmp_path):
    records = [record(v, s) | {"note": "x", "peak_memory": 12.5} for v in ("plain", "sib") for s in (1, 2)]
    for r in records:
        r["explanations"]["saliency"]["sharpness"] = 1.0 + (r["variant"] == "sib")
    made = load_study(write(tmp_path / "s", records, future=1))
    assert made.networks[0].values[Quantity("peak_memory")] == 12.5
    assert difference(made, *TRIPLE, explanation("saliency", "sharpness")).effect == ""


# ---- what is refused ----------------------------------------------------------------------------------------------------


def change(**changed):
    return lambda text: json.dumps(json.loads(text) | changed)


@pytest.mark.parametrize(
    ("file", "edit", "words"),
    [
        ("study.json", lambda text: text[:40], "study.json must be JSON, got"),
        ("study.json", change(status="done"), "study.json: status must be one of running, interrupted, complete, got 'done'"),
        ("study.json", change(baseline="none"), "study.json: baseline must be one of plain, sib, unmasked, got 'none'"),
        ("study.json", change(variants=["plain"]), r"study.json: variants must be an object, got \['plain'\]"),
        ("study.json", change(planned=[["net", "sib"]]), r"study.json: planned must hold \[arch, variant, seed\] .*got \['net'"),
        ("study.json", change(planned=[["net", "new", 1]]), r"study.json: planned must hold .*got \['net', 'new', 1\]"),
        ("results/net.sib.seed1.json", lambda _: "[]", r"net.sib.seed1.json: it must be a JSON object, got \[\]"),
        ("results/net.sib.seed1.json", change(seed=2), "the file's name must be net.sib.seed2.json, got 'net.sib.seed1.json'"),
        ("results/net.sib.seed1.json", change(seed="1"), "net.sib.seed1.json: seed must be an integer, got '1'"),
        ("results/net.sib.seed1.json", change(arch=None), "net.sib.seed1.json: arch must be a string, got None"),
        ("results/net.sib.seed1.json", change(settings=[1]), r"net.sib.seed1.json: settings must be an object, got \[1\]"),
        (
            "results/net.sib.seed1.json",
            change(accuracy={"shifted": 85.0}),
            r"net.sib.seed1.json: accuracy_shifted must be a share in \[0, 1\], got 85.0",
        ),
        (
            "results/net.sib.seed1.json",
            change(explanations={"saliency": {"energy": "0.5"}}),
            "net.sib.seed1.json: explanations.saliency.energy must be a number or null, got '0.5'",
        ),
        ("results/net.sib.seed1.json", change(vjp=[1]), r"net.sib.seed1.json: vjp must be an object, got \[1\]"),
    ],
)
def test_a_bad_file_is_named(tmp_path, file, edit, words):
    out = write(tmp_path / "s", [record("plain", 1), record("sib", 1)])
    (out / file).write_text(edit((out / file).read_text()))
    with pytest.raises(ValueError, match=words):
        load_study(out)


def test_a_folder_without_a_study(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"study: out must hold study.json, got .*: run `sib-fast study` first"):
        load_study(tmp_path)


def test_labels_of_the_study_name_its_headline_and_control(tmp_path):
    """Other names for the two judged variants may stand in study.json."""
    records = [record("plain", 1), record("best", 1), record("grey", 1)]
    out = write(tmp_path / "s", records, variants={v: v for v in ("plain", "best", "grey")}, headline="best", control="grey")
    made = load_study(out)
    assert comparisons(made, "net") == [("best", "plain"), ("grey", "plain"), ("best", "grey")]
    assert dataclasses.replace(made, headline="sib").present("net") == made.present("net")
