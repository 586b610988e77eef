"""The picture of `sib-fast explain`: what is drawn is what was computed, of the files as they are, or a sentence says why not."""

from __future__ import annotations

import io
import re
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

pytest.importorskip("captum", reason="extra [explain]", exc_type=ImportError)
pytest.importorskip("pytorch_grad_cam", reason="extra [explain]", exc_type=ImportError)
pytest.importorskip("matplotlib", reason="extra [explain]", exc_type=ImportError)
from PIL import Image

import sib_fast
from sib_fast import cli
from sib_fast.explain import METHODS, REPORTED, explain
from sib_fast.explain.metrics import EnergyPointingGame
from sib_fast.lab import networks
from sib_fast.lab.grid import MASK, TITLES, VJP, draw_panel, png
from sib_fast.lab.networks import NetworkSpec, load_network, save_network
from sib_fast.lab.panel import explanation_panel

CLASSES = ("ant", "bee", "cat", "dog")


def spec_of(image_size=16, classes=CLASSES, **options):
    fields = {"mean": (0.5, 0.4, 0.3), "std": (0.2, 0.25, 0.3), "options": {"width": 4}} | options
    return NetworkSpec("small_conv_net", classes, image_size, **fields)


def save(path, seed, spec):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = spec.build()
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.running_mean.normal_(std=0.1)
    save_network(path, spec, model)
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Two networks, a picture that is neither square nor of their size, and its object."""
    folder = tmp_path_factory.mktemp("files")
    save(folder / "plain.pt", 0, spec_of())
    save(folder / "sib.pt", 1, spec_of(training={"window_size": 5}))
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (5, 8, 3), dtype=np.uint8)
    Image.fromarray(pixels).resize((48, 24), Image.Resampling.BICUBIC).save(folder / "bug.png")
    mask = np.zeros((24, 48), dtype=np.uint8)
    mask[4:15, 16:30] = 1  # any nonzero value is the object
    Image.fromarray(mask).save(folder / "bug-mask.png")
    return folder


def cells(figure):
    """Axes by their label, "network: column"; a picture that several networks share has the first one's name."""
    return {axes.get_label(): axes for axes in figure.axes}


def picture(axes):
    (image,) = axes.images
    return torch.as_tensor(np.asarray(image.get_array()))


def words(artist):
    return [text.get_text() for text in artist.texts]


def header(figure):
    return " ".join(figure.texts[0].get_text().split())


def image_and_mask(folder):
    """What a network of size 16 sees of files of 48×24: resized to 32×16, the middle of that."""
    pixels, values = (
        np.array(Image.open(folder / name).resize((32, 16), how))[:, 8:24]
        for name, how in (("bug.png", Image.Resampling.BILINEAR), ("bug-mask.png", Image.Resampling.NEAREST))
    )
    return torch.as_tensor(pixels).permute(2, 0, 1) / 255, torch.as_tensor(values > 0)[None]


@pytest.fixture(scope="module")
def drawn(folder):
    return explanation_panel([folder / "plain.pt", folder / "sib.pt"], [folder / "bug.png"], [folder / "bug-mask.png"])


@pytest.mark.parametrize("name", ["plain", "sib"])
def test_every_cell_holds_the_map_over_its_maximum_and_the_share_inside(folder, drawn, name):
    image, mask = image_and_mask(folder)
    spec, model = load_network(folder / f"{name}.pt")
    x = ((image - torch.tensor(spec.mean)[:, None, None]) / torch.tensor(spec.std)[:, None, None])[None]
    x.requires_grad_()
    logits = model(x)
    (vjp,) = torch.autograd.grad(0.5 * logits.softmax(1).square().sum(), x)
    maps = {VJP: vjp.mean(1, keepdim=True).abs()} | {method: explain(model, x, None, method) for method in METHODS}
    axes = cells(drawn)
    for column, expected in maps.items():
        axis = axes[f"{name}: {column}"]
        assert expected.max() > 0
        torch.testing.assert_close(picture(axis), expected[0, 0] / expected.max(), rtol=2e-4, atol=2e-5)
        share = EnergyPointingGame().scores(expected, mask[None]).item()
        assert words(axis) == [f"{share:.2f}"], column
        assert axis.images[0].get_clim() == (0, 1)
        assert len(axis.collections) == 1  # the outline
    # the window that one of the files was trained with
    expected = sib_fast.foreground_mask(vjp, window_size=5)[0, 0]
    torch.testing.assert_close(picture(axes[f"{name}: {MASK}"]), expected, rtol=1e-4, atol=1e-5)
    assert axes[f"{name}: {MASK}"].images[0].get_clim() == (0, 1)
    probability, best = logits.double().softmax(1)[0].max(0)
    said = f"{name} predicts {CLASSES[best]}, probability {probability:.2f}; a uniform map has {mask.double().mean():.2f} inside"
    assert said in header(drawn)


def test_without_a_mask_nothing_is_inside(folder):
    figure = explanation_panel([folder / "plain.pt"], [folder / "bug.png"], methods=["saliency"])
    assert "inside" not in header(figure)


@pytest.mark.parametrize(("given", "used"), [(None, 15), (7, 7), (99, 15)])
def test_the_window_is_given_or_31_and_within_the_image(folder, given, used):
    figure = explanation_panel([folder / "plain.pt"], [folder / "bug.png"], methods=["saliency"], window_size=given)
    spec, model = load_network(folder / "plain.pt")
    x = spec.normalise(image_and_mask(folder)[0])[None].requires_grad_()
    (vjp,) = torch.autograd.grad(0.5 * model(x).softmax(1).square().sum(), x)
    expected = sib_fast.foreground_mask(vjp, window_size=used)[0, 0]
    torch.testing.assert_close(picture(cells(figure)[f"plain: {MASK}"]), expected, rtol=1e-4, atol=1e-5)


def test_the_image_and_the_true_object_are_the_centre_of_the_files(folder, drawn):
    image, mask = image_and_mask(folder)
    assert 0 < mask.double().mean() < 1
    axes = cells(drawn)
    torch.testing.assert_close(picture(axes["plain: image"]).permute(2, 0, 1), image, rtol=0, atol=0)
    assert torch.equal(picture(axes["plain: true object"]), mask[0])
    assert "sib: image" not in axes  # the same picture, drawn once


def test_the_outline_is_the_mask_s(folder, drawn):
    _, mask = image_and_mask(folder)
    rows, columns = (torch.where(mask[0].any(dim))[0] for dim in (1, 0))
    box = cells(drawn)["sib: saliency"].collections[0].get_paths()[0].get_extents()
    edges = (columns[0] - 0.5, rows[0] - 0.5, columns[-1] + 0.5, rows[-1] + 0.5)
    assert (box.x0, box.y0, box.x1, box.y1) == pytest.approx([float(edge) for edge in edges])


def test_the_six_that_are_reported_come_first_and_are_marked(drawn):
    columns = [label.removeprefix("plain: ") for label in cells(drawn) if label.startswith("plain: ")]
    assert columns == ["image", "true object", MASK, VJP, *REPORTED, *(m for m in METHODS if m not in REPORTED)]
    bars = {line.get_label(): line.get_xdata() for line in drawn.artists}
    assert tuple(bars) == REPORTED
    places = cells(drawn)
    for method, (left, right) in bars.items():
        box = places[f"plain: {method}"].get_position()
        assert left == pytest.approx(box.x0)
        assert right >= box.x1 - 1e-9


def test_titles_stand_above_their_columns(drawn):
    axes = cells(drawn)
    for column in ("image", "true object", MASK, VJP, *METHODS):
        (title,) = [text for text in drawn.texts if text.get_text() == TITLES.get(column, column)]
        box = axes[f"plain: {column}"].get_position()
        assert title.get_position()[0] == pytest.approx((box.x0 + box.x1) / 2)
        if column not in ("image", "true object"):  # half way down their rows
            assert 0 < title.get_position()[1] - box.y1 < 0.02


def overlaps(figure):
    """Texts that touch another or a picture beside them, and texts that leave the figure or their cell."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    renderer = FigureCanvasAgg(figure).get_renderer()
    figure.draw(renderer)
    texts = [*figure.texts, *(text for axes in figure.axes for text in axes.texts)]
    boxes = [(text.get_text(), text.get_window_extent(renderer)) for text in texts if text.get_text()]
    touching = [(a, b) for i, (a, one) in enumerate(boxes) for b, other in boxes[:i] if one.overlaps(other)]
    pictures = [axes for axes in figure.axes if axes.get_label() != "colour bar"]
    for text in figure.texts:  # titles and labels, which stand beside pictures and not on them
        box = text.get_window_extent(renderer)
        touching += [(text.get_text(), axes.get_label()) for axes in pictures if box.overlaps(axes.get_window_extent(renderer))]
    width, height = figure.get_size_inches() * figure.dpi
    outside = [text for text, box in boxes if box.x0 < 0 or box.y0 < 0 or box.x1 > width or box.y1 > height]
    for axes in figure.axes:
        for text in axes.texts:
            box, cell = text.get_window_extent(renderer), axes.get_window_extent(renderer)
            if box.x0 < cell.x0 or box.x1 > cell.x1 or box.y1 > cell.y1 or box.y0 < cell.y0:
                outside.append(text.get_text())
    return touching + outside


def tiny_vit(num_classes):
    models = pytest.importorskip("torchvision.models", exc_type=ImportError)
    net = models.VisionTransformer(32, 8, num_layers=1, num_heads=2, hidden_dim=8, mlp_dim=8, num_classes=num_classes)
    nn.init.normal_(net.heads.head.weight)  # zero by default
    return net


LONG = ("Staffordshire_bullterrier_of_the_Midlands_and_of_every_county_around", *CLASSES)


@pytest.fixture
def crowded(folder, tmp_path, monkeypatch):
    """Everything that makes a picture full: long names, networks that see different pictures, cells with a reason."""
    monkeypatch.setitem(networks.SMALL, "tiny_vit", tiny_vit)
    name = tmp_path / "a_network_with_a_very_long_name_that_somebody_gave_it.pt"
    save(name, 0, NetworkSpec("tiny_vit", LONG, 32, (0.5,) * 3, (0.5,) * 3))
    other = save(tmp_path / "small.pt", 0, spec_of(classes=LONG))
    figure = explanation_panel([name, other], [folder / "bug.png"] * 2, [folder / "bug-mask.png"] * 2, target=LONG[0])
    return name.stem, figure


def test_no_text_covers_another_or_leaves_its_place(drawn, crowded):
    assert overlaps(drawn) == []
    assert overlaps(crowded[1]) == []


def test_a_network_without_a_feature_map_has_the_reason_in_place_of_its_cams(crowded):
    name, figure = crowded
    axes = cells(figure)
    assert picture(axes[f"{name}: saliency"]).shape == (32, 32)
    assert picture(axes["small: grad_cam"]).max() == 1
    for method in ("grad_cam", "grad_cam_plusplus", "layer_cam"):
        cell = axes[f"{name}: {method}"]
        assert len(cell.images) == 0
        assert "tokens follow its last feature map" in " ".join(words(cell)).replace("\n", " ")
    # its own picture each: their sizes differ
    assert picture(axes[f"{name}: image"]).shape == (32, 32, 3)
    assert picture(axes["small: image"]).shape == (16, 16, 3)


def test_a_named_layer_makes_cams_of_a_transformer(folder, tmp_path, monkeypatch):
    monkeypatch.setitem(networks.SMALL, "tiny_vit", tiny_vit)
    path = save(tmp_path / "vit.pt", 0, NetworkSpec("tiny_vit", CLASSES, 32, (0.5,) * 3, (0.5,) * 3))
    figure = explanation_panel([path], [folder / "bug.png"], methods=["saliency", "layer_cam"], layer="conv_proj")
    assert picture(cells(figure)["vit: layer_cam"]).shape == (32, 32)


@pytest.mark.parametrize("target", ["cat", "2", 2])
def test_the_target_is_what_is_explained(folder, target):
    figure = explanation_panel([folder / "plain.pt"], [folder / "bug.png"], target=target, methods=["saliency"])
    spec, model = load_network(folder / "plain.pt")
    x = spec.normalise(image_and_mask(folder)[0])[None]
    want = explain(model, x, 2)
    torch.testing.assert_close(picture(cells(figure)["plain: saliency"]), want[0, 0] / want.max())
    probability = model(x).softmax(1)[0, 2].item()
    assert f"explained: cat, probability {probability:.2f}" in header(figure)
    assert not torch.equal(want, explain(model, x, 1))


def test_a_class_s_name_is_asked_before_its_index(tmp_path, folder):
    path = save(tmp_path / "turned.pt", 0, spec_of(classes=("3", "2", "1", "0")))
    figure = explanation_panel([path], [folder / "bug.png"], target="3", methods=["saliency"])
    spec, model = load_network(path)
    want = explain(model, spec.normalise(image_and_mask(folder)[0])[None], 0)
    torch.testing.assert_close(picture(cells(figure)["turned: saliency"]), want[0, 0] / want.max())


def test_pictures_are_turned_as_their_exif_says_and_brought_to_rgb(folder, tmp_path):
    upright = Image.open(folder / "bug.png")
    exif = Image.Exif()
    exif[0x0112] = 6  # stored lying on its left side: turn by 90° clockwise to show it
    upright.transpose(Image.Transpose.ROTATE_90).save(tmp_path / "turned.png", exif=exif)
    figures = [
        explanation_panel([folder / "plain.pt"], [path], [folder / "bug-mask.png"], methods=["saliency"])
        for path in (folder / "bug.png", tmp_path / "turned.png")
    ]
    pictures = [picture(cells(figure)["plain: image"]) for figure in figures]
    assert torch.equal(*pictures)
    upright.convert("L").save(tmp_path / "grey.png")
    grey = picture(cells(explanation_panel([folder / "plain.pt"], [tmp_path / "grey.png"], methods=["saliency"]))["plain: image"])
    assert grey.shape == (16, 16, 3)
    assert torch.equal(grey[..., 0], grey[..., 2])


@pytest.mark.parametrize("mode", ["1", "L", "P", "I;16", "RGB", "RGBA"])
def test_any_nonzero_value_of_a_mask_is_the_object(folder, tmp_path, mode):
    inside = np.array(Image.open(folder / "bug-mask.png")) > 0
    if mode == "I;16":
        mask = Image.fromarray((inside * 256).astype(np.uint16))
    elif mode == "P":
        mask = Image.fromarray(inside.astype(np.uint8), mode="L")
        mask.putpalette([9, 9, 9, 0, 0, 0] + [7] * 750)  # entry 1 is black, entry 0 is not
    elif mode in ("RGB", "RGBA"):
        mask = Image.fromarray(np.stack([inside * 0, inside * 0, inside * 1], 2).astype(np.uint8)).convert(mode)
    else:
        mask = Image.fromarray(inside.astype(np.uint8) * 255).convert(mode)
    mask.save(tmp_path / "mask.png")
    with Image.open(tmp_path / "mask.png") as file:
        assert file.mode == mode
    figure = explanation_panel([folder / "plain.pt"], [folder / "bug.png"], [tmp_path / "mask.png"], methods=["saliency"])
    assert torch.equal(picture(cells(figure)["plain: true object"]), image_and_mask(folder)[1][0])


def test_networks_of_one_name_are_told_apart(folder, tmp_path):
    paths = [folder / "plain.pt", tmp_path / "plain.pt"]
    paths[1].write_bytes((folder / "sib.pt").read_bytes())
    labels = set(cells(explanation_panel(paths, [folder / "bug.png"], methods=["saliency"])))
    assert {f"{path.parent.name}/plain: saliency" for path in paths} <= labels


# ---- draw_panel ---------------------------------------------------------------------------------------------------------


def grid(images=3, **options):
    generator = torch.Generator().manual_seed(0)
    pictures = torch.rand(images, 3, 6, 7, generator=generator)
    masks = torch.zeros(images, 1, 6, 7, dtype=torch.bool)
    masks[:, :, 2:, :4] = True  # touches the edge
    rows = [
        (label, {column: torch.rand(images, 1, 6, 7, generator=generator) for column in (VJP, "saliency", "a column of my own")})
        for label in ("plain", "S-IB")
    ]
    rows[0][1]["saliency"][1] = 0
    return rows, pictures, masks, draw_panel(rows, pictures, masks, **options)


@pytest.mark.parametrize("wrap", [9, 3])
def test_a_grid_of_tensors(wrap):
    rows, pictures, masks, figure = grid(notes=["one", "two", "three"], wrap=wrap, caption="what it shows")
    order = [axes for axes in figure.axes if axes.get_label() != "colour bar"]
    for label, maps in rows:
        for column, values in maps.items():
            found = [axes for axes in order if axes.get_label() == f"{label}: {column}"]
            assert len(found) == 3
            for axes, values_of_image, mask in zip(found, values, masks, strict=True):
                peak = values_of_image.max()
                torch.testing.assert_close(picture(axes), values_of_image[0] / (peak if peak > 0 else 1))
                share = (values_of_image * mask).sum() / values_of_image.sum()
                assert words(axes) == (["zero map"] if peak == 0 else [f"{share:.2f}"])
    found = [axes for axes in order if axes.get_label() == "plain: image"]
    assert [words(axes) for axes in found] == [["one"], ["two"], ["three"]]
    for axes, image in zip(found, pictures, strict=True):
        assert torch.equal(picture(axes).permute(2, 0, 1), image)
    assert "what it shows" in {text.get_text() for text in figure.texts}
    assert overlaps(figure) == []
    boxes = [axes.get_position() for axes in figure.axes]
    assert not any(a.shrunk(0.99, 0.99).overlaps(b.shrunk(0.99, 0.99)) for i, a in enumerate(boxes) for b in boxes[:i])
    assert all(0 <= box.x0 < box.x1 <= 1 and 0 <= box.y0 < box.y1 <= 1 for box in boxes)


def test_a_grid_without_masks_has_no_outline_and_no_share():
    rows, pictures, _, _ = grid()
    figure = draw_panel(rows, pictures)
    assert not any(label.endswith("true object") for label in cells(figure))
    axes = cells(figure)["plain: VJP"]
    assert words(axes) == []
    assert len(axes.collections) == 0


def test_pyplot_is_left_alone_and_equal_figures_are_equal_files(folder):
    import matplotlib.pyplot as plt

    before, backend = plt.get_fignums(), plt.get_backend()
    files = [
        png(explanation_panel([folder / "plain.pt"], [folder / "bug.png"], methods=["saliency", "smoothgrad"])) for _ in range(2)
    ]
    assert files[0] == files[1]
    assert (plt.get_fignums(), plt.get_backend()) == (before, backend)


def test_a_grid_that_does_not_fit():
    rows, pictures, masks, _ = grid()
    for message, call in (
        (r"draw_panel: rows must hold at least one row, got none", lambda: draw_panel([], pictures)),
        (r"draw_panel: rows must all have the columns \['VJP', .*\], got \['VJP'\] for 'x'",
         lambda: draw_panel([*rows, ("x", {VJP: rows[0][1][VJP]})], pictures)),
        (r"rows\['plain'\]\['VJP'\] must have shape \[2, 1, 6, 7\] to go with images", lambda: draw_panel(rows, pictures[:2])),
        (r"masks must have shape \[3, 1, 6, 7\] to go with images, got \[2, 1, 6, 7\]",
         lambda: draw_panel(rows, pictures, masks[:2])),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            call()


# ---- the command --------------------------------------------------------------------------------------------------------


def command(folder, *more, checkpoint="plain.pt", image="bug.png"):
    return ["explain", "--checkpoint", str(folder / checkpoint), "--image", str(folder / image), *map(str, more)]


def test_one_file_for_all_images(folder, tmp_path, capsys):
    out = tmp_path / "new" / "panel.png"
    arguments = ["--methods", "saliency", "grad_cam", "--out", out]
    assert (
        cli.main([*command(folder, folder / "bug-mask.png"), "--checkpoint", str(folder / "sib.pt"), *map(str, arguments)]) == 0
    )
    assert capsys.readouterr().out == f"{out}\n"
    figure = explanation_panel(
        [folder / "plain.pt", folder / "sib.pt"], [folder / "bug.png", folder / "bug-mask.png"], methods=["saliency", "grad_cam"]
    )
    assert out.read_bytes() == png(figure)
    size = Image.open(io.BytesIO(out.read_bytes())).size
    assert size == pytest.approx(figure.get_size_inches() * 150, abs=1)
    assert list(out.parent.iterdir()) == [out]


def test_a_folder_has_one_file_per_image(folder, tmp_path, capsys):
    out = tmp_path / "panels"
    assert cli.main([*command(folder, folder / "bug-mask.png", "--methods", "saliency", "--out", out)]) == 0
    assert sorted(path.name for path in out.iterdir()) == ["bug-mask.png", "bug.png"]
    assert capsys.readouterr().out.split() == [str(out / "bug.png"), str(out / "bug-mask.png")]
    alone = explanation_panel([folder / "plain.pt"], [folder / "bug.png"], methods=["saliency"])
    assert (out / "bug.png").read_bytes() == png(alone)


@pytest.fixture
def bad(folder, tmp_path):
    """Files that are not what they should be."""
    for name in ("plain.pt", "bug.png", "bug-mask.png"):
        (tmp_path / name).write_bytes((folder / name).read_bytes())
    (tmp_path / "text.png").write_text("not a picture")
    (tmp_path / "cut.png").write_bytes((folder / "bug.png").read_bytes()[:300])
    torch.save({"weight": torch.zeros(1)}, tmp_path / "weights.pt")
    save(tmp_path / "birds.pt", 0, spec_of(classes=("owl", "tit")))
    Image.fromarray(np.zeros((24, 48), dtype=np.uint8)).save(tmp_path / "empty.png")
    Image.fromarray(np.ones((30, 30), dtype=np.uint8)).save(tmp_path / "square.png")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "bug.png").write_bytes((folder / "bug.png").read_bytes())
    (tmp_path / "file").write_text("")
    (tmp_path / "old.png").write_bytes(b"old")
    return tmp_path


@pytest.mark.parametrize(
    ("words", "options"),
    [
        ("checkpoint must be an existing file, got {}/none.pt", {"--checkpoint": "none.pt"}),
        ("network: {}/weights.pt must be a file that sib-fast train wrote", {"--checkpoint": "weights.pt"}),
        ("network: {}/bug.png must be a file that sib-fast train wrote", {"--checkpoint": "bug.png"}),
        ("image must be an existing file, got {}/none.png", {"--image": "none.png"}),
        ("image must be an image that pillow can read, got {}/text.png (UnidentifiedImageError", {"--image": "text.png"}),
        ("image must be an image that pillow can read, got {}/cut.png (OSError", {"--image": "cut.png"}),
        ("mask must be an existing file, got {}/none.png", {"--mask": "none.png"}),
        ("mask must be an image that pillow can read, got {}/plain.pt", {"--mask": "plain.pt"}),
        ("mask must have the image's proportions, got 30×30 for 48×24 in {}/square.png", {"--mask": "square.png"}),
        ("mask must mark a pixel of the centre crop that the network sees, got none in {}/empty.png", {"--mask": "empty.png"}),
        ("masks must be as many as images, in their order, got 2 for 1", {"--mask": ("bug-mask.png", "bug-mask.png")}),
        ("method must be one of 'saliency', 'integrated_gradients', ", {"--methods": ("saliency", "lime")}),
        ("target must be a class's name or its index below 4, got '4'; classes: 4 (ant, bee, cat, dog)", {"--target": "4"}),
        ("target must be a class's name or its index below 4, got 'cow'", {"--target": "cow"}),
        ("target must be a class's name or its index below 4, got '-1'", {"--target": "-1"}),
        ("layer must be a name in every network's named_modules(), got 'layer4'; {}/plain.pt has 3 (features, pool, classifier)",
         {"--layer": "layer4"}),
        ("layer must be left out without one of grad_cam, ", {"--layer": "features", "--methods": "saliency"}),
        ("layer must return a floating-point [N, C, H, W] tensor, got [1, 4] from 'classifier'", {"--layer": "classifier"}),
        ("window_size must be odd and at least 1, got 4", {"--window-size": "4"}),
        ("window_size must be odd and at least 1, got 0", {"--window-size": "0"}),
        ("checkpoints must have the same classes, got 4 (ant, bee, cat, dog) in {}/plain.pt and 2 (owl, tit) in {}/birds.pt",
         {"second": "birds.pt"}),
        ("out must end in .png or be a folder, got {}/panel.jpg", {"--out": "panel.jpg"}),
        ("out must end in .png or be a folder, got {}/file", {"--out": "file"}),
        ("images must have different names for a folder, got", {"--image": ("bug.png", "other/bug.png"), "--out": "panels"}),
    ],
    ids=lambda v: v[:45] if isinstance(v, str) else "",
)  # fmt: skip
def test_a_bad_option_is_a_sentence_and_changes_no_file(bad, capsys, words, options):
    known = ("--checkpoint", "--image", "--mask", "--out")
    defaults = {"--checkpoint": "plain.pt", "--image": "bug.png", "--out": "old.png"}
    arguments = ["explain"]
    for name, values in (defaults | options).items():
        values = values if isinstance(values, tuple) else (values,)
        values = [str(bad / value) if name in (*known, "second") else value for value in values]
        if name == "--target":
            arguments.append(f"--target={values[0]}")
        else:
            arguments += ["--checkpoint" if name == "second" else name, *values]
    before = {path: path.read_bytes() for path in bad.rglob("*") if path.is_file()}
    assert cli.main(arguments) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.startswith("sib-fast explain: " + words.replace("{}", str(bad))), said.err
    assert said.err.count("\n") == 1
    assert {path: path.read_bytes() for path in bad.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize(
    ("module", "method", "package"),
    [("captum", "saliency", "captum"), ("pytorch_grad_cam", "grad_cam", "grad-cam"), ("matplotlib", "saliency", "matplotlib"),
     ("PIL", "saliency", "pillow")],
)  # fmt: skip
def test_without_the_extra_it_says_what_to_install(folder, tmp_path, monkeypatch, capsys, module, method, package):
    monkeypatch.setitem(sys.modules, module, None)
    assert cli.main(command(folder, "--methods", method, "--out", tmp_path / "p.png")) == 2
    said = capsys.readouterr().err
    assert f"{package} must be installed, got " in said
    assert "pip install 'sib_fast[explain]'" in said
    assert not (tmp_path / "p.png").exists()


def test_an_interrupted_write_leaves_the_old_file(folder, tmp_path, monkeypatch, capsys):
    out = tmp_path / "p.png"
    out.write_bytes(b"old")

    def full(*_):
        raise OSError("no space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    assert cli.main(command(folder, "--methods", "saliency", "--out", out)) == 2
    assert "no space left on device" in capsys.readouterr().err
    assert out.read_bytes() == b"old"


def test_every_message_is_documented():
    table = (Path(__file__).parents[2] / "docs" / "errors.md").read_text()
    source = "".join((Path(sib_fast.__file__).parent / "lab" / name).read_text() for name in ("panel.py", "grid.py"))
    rules = re.findall(r'f?"(?:\{_OP\}|explain|draw_panel): ([^"{]*? must [^"{]*?)(?:, got|;|"|\{|\.$)', source)
    assert len(rules) >= 12
    assert [rule for rule in rules if rule.strip() not in table] == []
