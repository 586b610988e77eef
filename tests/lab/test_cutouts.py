"""Objects on backgrounds, on a tree drawn here: which go together, what is unseen in tests, masks, and what is refused."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest
import torch
from PIL import Image

from sib_fast.lab.datasets import open_dataset
from sib_fast.lab.datasets.cutouts import _OBJECT_SHARE, Cutouts
from tests.lab.cutout_tree import BACKGROUNDS, CLASSES, KINDS, OBJECTS, write_cutouts

SIZE = 32


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return write_cutouts(tmp_path_factory.mktemp("cutouts"))


def names(data, part):
    return {str(Path(*Path(getattr(c, part)).parts[-2:])) for c in data.composites}


def pixels(data, index):
    return (data.denormalise(data[index][0]) * 255).round().int()


def test_an_image_shows_the_object_of_its_label_where_the_mask_is_and_the_background_elsewhere(root):
    data = open_dataset("cutouts", root, "train", image_size=SIZE, size=30)
    assert data.classes == CLASSES
    for index, composite in enumerate(data.composites):
        _, label, mask = data[index]
        thing, background = (str(Path(*Path(p).parts[-2:])) for p in (composite.object, composite.background))
        assert thing.startswith(CLASSES[label] + "/")
        rgb = pixels(data, index)
        rows, columns = mask[0].any(1).nonzero().flatten(), mask[0].any(0).nonzero().flatten()
        assert mask[0, rows.min() : rows.max() + 1, columns.min() : columns.max() + 1].all()  # the objects are rectangles
        assert len(columns) / SIZE == pytest.approx(composite.place[0], abs=1 / SIZE)
        assert _OBJECT_SHARE[0] <= composite.place[0] <= _OBJECT_SHARE[1]
        assert len(rows) / len(columns) == pytest.approx(8 / 12, abs=0.1)
        assert rgb[:, mask[0]].unique(dim=1).flatten().tolist() == list(OBJECTS[thing])
        assert rgb[:, ~mask[0]].unique(dim=1).flatten().tolist() == list(BACKGROUNDS[background])


def test_an_outline_takes_no_colour_from_transparent_pixels(tmp_path):
    """Half-transparent black on grey can only be darker than grey; the white behind it must not show."""
    write_cutouts(tmp_path)
    path = tmp_path / "objects" / "ant" / "0.png"
    image = Image.new("RGBA", (16, 16), (255, 255, 255, 0))
    image.paste((0, 0, 0, 255), (4, 4, 12, 12))
    for other in ("0", "1", "2", "3"):
        image.save(path.with_name(f"{other}.png"))
    data = open_dataset("cutouts", tmp_path, "train", image_size=SIZE, size=30, backgrounds="grey")
    for index in range(0, 30, 3):
        assert pixels(data, index).max() <= 128


def test_tests_have_objects_and_backgrounds_that_training_has_not(root):
    train, test, val = (open_dataset("cutouts", root, split, image_size=SIZE, size=300) for split in ("train", "test", "val"))
    for part, everything in (("object", OBJECTS), ("background", BACKGROUNDS)):
        seen, unseen = names(train, part), names(test, part)
        assert not seen & unseen
        assert seen | unseen == set(everything)
        assert {n.split("/")[0] for n in seen} == {n.split("/")[0] for n in unseen}
    assert test.composites == val.composites


def test_groups_are_never_split(tmp_path):
    write_cutouts(tmp_path)
    for tree, folder, part in (("objects", "bee", "object"), ("backgrounds", "sand", "background")):
        group = tmp_path / tree / folder / "pair"
        group.mkdir()
        for name in ("0.png", "1.png"):
            (tmp_path / tree / folder / name).rename(group / name)
        sides = set()
        for seed in range(8):
            train, test = (Cutouts(tmp_path, s, SIZE, size=200, split_seed=seed) for s in ("train", "test"))
            held = [{c for c in names(d, part) if c.startswith("pair/")} for d in (train, test)]
            assert sorted(map(len, held)) == [0, 2]
            sides.add(len(held[0]))
        assert sides == {0, 2}  # both happen


def test_labels_are_balanced_and_every_object_is_shown_before_one_comes_again(root):
    data = Cutouts(root, "train", SIZE, size=60)
    assert data.labels == [i % 3 for i in range(60)] == [int(data[i][1]) for i in range(60)]
    for label in range(3):
        shown = Counter(c.object for c in data.composites if c.label == label)
        assert max(shown.values()) - min(shown.values()) <= 1


@pytest.mark.parametrize("correlation", [0.0, 0.5, 1.0])
def test_a_class_has_its_kind_as_often_as_the_correlation_says(root, correlation):
    data = Cutouts(root, "train", SIZE, size=3000, correlation=correlation)
    assert data.kinds == KINDS
    own = sum(c.kind == KINDS[c.label] for c in data.composites) / len(data)
    assert own == pytest.approx(correlation + (1 - correlation) / 3, abs=0.03)


def test_shifted_backgrounds_are_never_the_classs_own_and_nothing_else_changes(root):
    forms = {b: Cutouts(root, "test", SIZE, size=90, correlation=0.95, backgrounds=b) for b in ("correlated", "shifted", "grey")}
    assert not [c for c in forms["shifted"].composites if c.kind == KINDS[c.label]]
    assert {c.kind for c in forms["shifted"].composites} == set(KINDS)
    for form in ("shifted", "grey"):
        for a, b in zip(forms["correlated"].composites, forms[form].composites, strict=True):
            assert a._replace(background=None, kind=None) == b._replace(background=None, kind=None)
    for index in range(3):
        assert torch.equal(forms["grey"][index][2], forms["shifted"][index][2])
        assert pixels(forms["grey"], index)[:, ~forms["grey"][index][2][0]].unique().tolist() == [128]


def test_composites_depend_on_the_seed_alone_and_a_longer_set_begins_with_the_shorter(root):
    data = Cutouts(root, "train", SIZE, size=12, seed=3)
    again = Cutouts(root, "train", SIZE, size=40, seed=3)
    assert data.composites == again.composites[:12]
    assert torch.equal(data[5][0], again[5][0])
    assert Cutouts(root, "train", SIZE, size=12, seed=4).composites != data.composites
    # the split is the same: tests of any seed are unseen by a training of any other
    seen = [names(Cutouts(root, "train", SIZE, size=200, seed=seed), "object") for seed in (3, 4)]
    assert seen[0] == seen[1]
    splits = {frozenset(names(Cutouts(root, "train", SIZE, size=200, split_seed=seed), "object")) for seed in range(4)}
    assert len(splits) > 1


def test_the_kind_of_a_class_can_be_named(tmp_path):
    write_cutouts(tmp_path)
    (tmp_path / "kinds.json").write_text(json.dumps({"ant": "snow", "bee": "snow", "cat": "grass"}))
    data = Cutouts(tmp_path, "train", SIZE, size=30, correlation=1.0)
    assert {(CLASSES[c.label], c.kind) for c in data.composites} == {("ant", "snow"), ("bee", "snow"), ("cat", "grass")}
    shifted = Cutouts(tmp_path, "train", SIZE, size=90, backgrounds="shifted")
    assert {c.kind for c in shifted.composites if c.label == 1} == {"grass", "sand"}


def test_augmentation_moves_the_mask_with_the_image(root):
    data = open_dataset("cutouts", root, "train", image_size=SIZE, size=6, correlation=1.0, augment=True)
    torch.manual_seed(0)
    masks = set()
    for index in [0, 1, 2] * 8:
        image, _, mask = data[index]
        masks.add(mask.numpy().tobytes())
        red = data.denormalise(image)[0]  # objects have red, backgrounds none
        assert ((red > max(0.1, red.max() / 2)) != mask[0]).float().mean() < 0.02  # resizing blurs the outline
    assert len(masks) > 15


def test_boxes(root):
    data, boxes = (open_dataset("cutouts", root, "train", image_size=SIZE, size=6, masks=m) for m in ("auto", "box"))
    assert (data.mask_kind, boxes.mask_kind) == ("segmentation", "box")
    for i in range(6):
        assert torch.equal(data[i][2], boxes[i][2])  # of a rectangle


def test_a_box_goes_around_its_object_and_nothing_around_nothing():
    from sib_fast.lab.datasets.cutouts import _around

    mask = torch.zeros(1, 5, 6, dtype=torch.bool)
    assert not _around(mask).any()
    mask[0, 1, 4] = mask[0, 3, 2] = True
    expected = torch.zeros_like(mask)
    expected[0, 1:4, 2:5] = True
    assert torch.equal(_around(mask), expected)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"size": 0}, "size must be at least 1, got 0"),
        ({"correlation": 1.5}, r"correlation must be in \[0, 1\], got 1.5"),
        ({"seed": -1}, "seed must not be negative, got -1"),
        ({"split_seed": -1}, "split_seed must not be negative, got -1"),
        ({"image_size": 4}, "image_size must be at least 8, got 4"),
        ({"backgrounds": "blue"}, "backgrounds must be one of 'correlated', 'shifted', 'grey', got 'blue'"),
        ({"masks": "outline"}, "masks must be one of 'auto', 'segmentation', 'box', got 'outline'"),
    ],
)
def test_options_that_make_no_set(root, options, message):
    with pytest.raises(ValueError, match=f"cutouts: {message}"):
        open_dataset("cutouts", root, "train", **{"image_size": SIZE} | options)


def opaque(root):
    for k in range(4):
        Image.new("RGB", (8, 8)).save(root / "objects" / "ant" / f"{k}.png")


def empty_object(root):
    for k in range(4):
        Image.new("RGBA", (8, 8)).save(root / "objects" / "ant" / f"{k}.png")


def cut_short(root):
    for k in range(4):
        path = root / "objects" / "ant" / f"{k}.png"
        path.write_bytes(path.read_bytes()[:60])


def one_object(root):
    for k in range(3):
        (root / "objects" / "ant" / f"{k}.png").unlink()


def one_kind(root):
    for kind in KINDS[1:]:
        (root / "backgrounds" / kind).rename(root / kind)


def bad_kinds(root):
    (root / "kinds.json").write_text('{"ant": "mud", "bee": "sand", "cat": "sand"}')


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (opaque, r"ant/\d\.png must have an alpha channel that cuts an object out, got no transparent pixel"),
        (empty_object, r"ant/\d\.png must have an alpha channel that cuts an object out, got no opaque pixel"),
        (cut_short, r"ant/\d\.png must be a readable image"),
        (one_object, "ant must hold at least two images or groups, one for training and one for tests, got 1"),
        (one_kind, r"backgrounds must hold at least two folders, got \['grass'\]"),
        (bad_kinds, r"kinds\.json must give every class .* one of the kinds .*'mud'|kinds\.json .*\['ant'\]"),
    ],
)
def test_trees_that_are_refused(tmp_path, damage, message):
    damage(write_cutouts(tmp_path))
    with pytest.raises(ValueError, match=message):
        open_dataset("cutouts", tmp_path, "train", image_size=SIZE)[0]


def test_a_missing_folder_is_named_with_the_layout(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"cutouts: root must hold .*objects.*the layout is objects/<class>"):
        open_dataset("cutouts", tmp_path, "train", image_size=SIZE)
