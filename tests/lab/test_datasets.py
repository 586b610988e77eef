"""Every data set on a tiny tree in its true format, written here: lists, labels, masks, and what is said of damaged ones."""

from __future__ import annotations

import pickle
import re
import shutil

import numpy as np
import pytest
import scipy.io
import torch
import torchvision
from PIL import Image
from torch import nn
from torch.utils.data import DataLoader

from sib_fast import SIBLoss
from sib_fast.lab.data import EmbeddedDigits
from sib_fast.lab.datasets import NAMES, open_dataset
from sib_fast.masks import GivenMask
from tests.lab.cutout_tree import write_cutouts

SIZE = 14  # of a shorter side of 16, which evaluation then leaves as it is and crops: masks can be compared pixel by pixel
HEIGHT, WIDTH = 16, 20


def middle(mask):
    """What evaluation shows of a [16, 20] mask."""
    return torch.as_tensor(np.asarray(mask))[None, 1:15, 3:17]


def save_jpeg(path, grey, height=HEIGHT, width=WIDTH):
    """One grey tells the images apart, also after compression."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (width, height), (grey,) * 3).save(path, "JPEG")


def save_values(path, values, palette=False):
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.fromarray(np.asarray(values, dtype=np.uint8))
    if palette:
        image = image.copy()
        image.putpalette([(37 * k) % 256 for k in range(768)])
    image.save(path)


def rectangle(top, bottom, left, right, value=1, rest=0):
    values = np.full((HEIGHT, WIDTH), rest)
    values[top:bottom, left:right] = value
    return values


def greys(data):
    """The grey that every item's file was saved with, so that image and label are known to belong together."""
    return [round(float(data.denormalise(image).mean() * 255)) for image, _, _ in data]


def voc_xml(objects, width=WIDTH, height=HEIGHT):
    """An annotation of VOC and ImageNet; objects: (name, xmin, ymin, xmax, ymax, further lines)."""
    things = "".join(
        f"<object>\n<name>{name}</name><pose>Left</pose><truncated>0</truncated><difficult>0</difficult>\n"
        f"<bndbox><xmin>{x0}</xmin><ymin>{y0}</ymin><xmax>{x1}</xmax><ymax>{y1}</ymax></bndbox>{more}</object>\n"
        for name, x0, y0, x1, y1, more in objects
    )
    return (
        "<annotation>\n<folder>02085620</folder><filename>%s</filename><source><database>ImageNet database</database></source>\n"
        f"<size><width>{width}</width><height>{height}</height><depth>3</depth></size>\n<segmented>0</segmented>\n{things}</annotation>"
    )


# ---- the trees ----------------------------------------------------------------------------------------------------------

TRIMAP = rectangle(4, 12, 6, 16, value=3, rest=2)
TRIMAP[6:10, 8:14] = 1


def write_pets(root):
    base = root / "oxford-iiit-pet"
    lists = {
        "trainval": [("Abyssinian_1", 1), ("american_bulldog_7", 2), ("Abyssinian_2", 1)],
        "test": [("american_bulldog_12", 2)],
    }
    lists["test"] += [("Abyssinian_33", 1)]
    grey = 10
    for name, entries in lists.items():
        (base / "annotations").mkdir(parents=True, exist_ok=True)
        text = "".join(f"{image} {label} 1 {label}\n" for image, label in entries)
        (base / "annotations" / f"{name}.txt").write_text(text)
        for image, _ in entries:
            save_jpeg(base / "images" / f"{image}.jpg", grey)
            save_values(base / "annotations" / "trimaps" / f"{image}.png", TRIMAP)
            grey += 20
    (base / "images" / "Abyssinian_100.mat").write_bytes(b"")  # the official archive holds a few such files


def write_voc(root):
    base = root / "VOCdevkit" / "VOC2012"
    dog = rectangle(4, 12, 6, 16, value=255)
    dog[6:10, 8:14] = 12
    # a person with a head, which is a part and no second object
    head = "<part><name>head</name><bndbox><xmin>1</xmin><ymin>1</ymin><xmax>3</xmax><ymax>3</ymax></bndbox></part>"
    person = rectangle(2, 9, 3, 8, value=15)
    both = dog.copy()
    both[0:3, 0:3] = 15
    images = {
        "2007_000032": ("train", dog, [("dog", 6, 4, 16, 12, "")] * 2),
        "2007_000039": ("train", person, [("person", 3, 2, 8, 9, head)]),
        "2007_000063": ("train", both, [("dog", 6, 4, 16, 12, ""), ("person", 0, 0, 3, 3, "")]),
        # a cat so difficult that the segmentation shows it as void
        "2007_000068": ("train", dog, [("dog", 6, 4, 16, 12, ""), ("cat", 6, 4, 16, 12, "<difficult>1</difficult>")]),
        "2007_000033": ("val", person, [("person", 3, 2, 8, 9, "")]),
    }
    for k, (name, (_, segmentation, objects)) in enumerate(images.items()):
        save_jpeg(base / "JPEGImages" / f"{name}.jpg", 10 + 20 * k)
        save_values(base / "SegmentationClass" / f"{name}.png", segmentation, palette=True)
        (base / "Annotations").mkdir(exist_ok=True)
        (base / "Annotations" / f"{name}.xml").write_text(voc_xml(objects) % name)
    (base / "ImageSets" / "Segmentation").mkdir(parents=True)
    for part in ("train", "val"):
        names = [name for name, (where, *_) in images.items() if where == part]
        (base / "ImageSets" / "Segmentation" / f"{part}.txt").write_text("\n".join(names) + "\n")


def save_dogs_list(path, entries):
    """file_list and annotation_list are cell arrays [n, 1], labels a column of doubles: MATLAB's, as in lists.tar."""

    def cells(texts):
        array = np.empty((len(texts), 1), dtype=object)
        array[:, 0] = texts
        return array

    path.parent.mkdir(parents=True, exist_ok=True)
    content = {
        "file_list": cells([f"{stem}.jpg" for stem, _ in entries]),
        "annotation_list": cells([stem for stem, _ in entries]),
        "labels": np.array([[label] for _, label in entries], dtype=np.float64),
    }
    scipy.io.savemat(path, content)


DOGS = {
    "n02085620-Chihuahua/n02085620_5927": (1, "train", [("Chihuahua", 4, 3, 11, 9, "")], (WIDTH, HEIGHT)),
    "n02086240-Shih-Tzu/n02086240_11": (
        2,
        "train",
        [("Shih-Tzu", 4, 3, 8, 6, ""), ("Shih-Tzu", 10, 8, 15, 13, "")],
        (WIDTH, HEIGHT),
    ),
    # annotated at twice the width and three times the height
    "n02086240-Shih-Tzu/n02086240_2": (2, "test", [("Shih-Tzu", 8, 9, 22, 27, "")], (2 * WIDTH, 3 * HEIGHT)),
    "n02085620-Chihuahua/n02085620_7": (1, "test", [("Chihuahua", 0, 0, WIDTH + 3, HEIGHT, "")], (WIDTH, HEIGHT)),
}


def write_dogs(root):
    for k, (stem, (_, _, objects, (width, height))) in enumerate(DOGS.items()):
        save_jpeg(root / "Images" / f"{stem}.jpg", 10 + 20 * k)
        path = root / "Annotation" / stem  # no suffix
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(voc_xml(objects, width, height))  # the files of the archive say %s for their name, too
    for part in ("train", "test"):
        save_dogs_list(root / f"{part}_list.mat", [(stem, label) for stem, (label, where, *_) in DOGS.items() if where == part])


VOTES = rectangle(4, 12, 6, 16, value=102)
VOTES[5:11, 7:15] = 153
VOTES[6:10, 8:14] = 255


def write_cub(root, segmentations=True):
    base = root / "CUB_200_2011"
    images = [
        ("001.Black_footed_Albatross/Black_Footed_Albatross_0046_18", 1, 0, "4.0 3.0 7.0 6.0"),
        ("001.Black_footed_Albatross/Black_Footed_Albatross_0009_34", 1, 1, "0.0 0.0 20.0 16.0"),
        ("002.Laysan_Albatross/Laysan_Albatross_0002_1027", 2, 1, "5.0 5.0 2.0 9.0"),
        ("002.Laysan_Albatross/Laysan_Albatross_0003_1033", 2, 0, "5.0 5.0 2.0 9.0"),
    ]
    base.mkdir()
    for name, lines in {
        "images": [f"{image}.jpg" for image, *_ in images],
        "image_class_labels": [label for _, label, *_ in images],
        "train_test_split": [flag for _, _, flag, _ in images],
        "bounding_boxes": [box for *_, box in images],
        "classes": ["001.Black_footed_Albatross", "002.Laysan_Albatross"],
    }.items():
        (base / f"{name}.txt").write_text("".join(f"{k} {line}\n" for k, line in enumerate(lines, 1)))
    for k, (image, *_) in enumerate(images):
        save_jpeg(base / "images" / f"{image}.jpg", 10 + 20 * k)
        if segmentations:
            save_values(root / "segmentations" / f"{image}.png", VOTES)


def write_folder(root):
    for k, path in enumerate(("train/ant/a.jpg", "train/bee/b.jpg", "train/bee/c.jpg", "val/ant/d.jpg", "val/bee/e.jpg")):
        save_jpeg(root / path, 10 + 20 * k)


WRITERS = {"pets": write_pets, "voc": write_voc, "dogs": write_dogs, "cub": write_cub, "folder": write_folder}


@pytest.fixture
def tree(tmp_path):
    def write(name):
        root = tmp_path / name
        root.mkdir()
        (WRITERS | {"cutouts": write_cutouts})[name](root)
        return root

    return write


# ---- what all have in common --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("augment", [True, False])
@pytest.mark.parametrize("name", NAMES)
def test_items_are_alike_in_every_set(tree, name, augment):
    root, size = None if name == "digits" else tree(name), {"size": 6} if name in ("digits", "cutouts") else {}
    for split in ("train", "test", "val"):
        data = open_dataset(name, root, split, image_size=16, augment=augment, **size)
        assert data.image_size == 16
        assert len(data.mean) == len(data.std) == 3
        assert all(isinstance(c, str) and c for c in data.classes)
        assert data.has_masks == (data.mask_kind != "none") == (name != "folder")
        assert data.labels == [int(data[index][1]) for index in range(len(data))]
        for index in range(len(data)):
            image, label, mask = data[index]
            assert (image.dtype, image.shape) == (torch.float32, (3, 16, 16))
            assert (label.dtype, label.shape) == (torch.int64, ())
            assert 0 <= label < len(data.classes)
            values = mask if data.has_masks else mask.values
            assert (values.dtype, values.shape) == (torch.bool, (1, 16, 16))
            assert 0 <= data.denormalise(image).min() <= data.denormalise(image).max() <= 1
        with pytest.raises(IndexError):
            data[len(data)]
        image, label, mask = next(iter(DataLoader(data, batch_size=2)))
        count = len(label)
        assert image.shape == (count, 3, 16, 16)
        assert (mask if data.has_masks else mask.values).shape == (count, 1, 16, 16)


@pytest.mark.parametrize("name", WRITERS)
def test_train_and_test_share_no_image_and_all_classes(tree, name):
    root = tree(name)
    train, test, val = (open_dataset(name, root, split, image_size=SIZE) for split in ("train", "test", "val"))
    assert train.classes == test.classes
    assert not {s.image for s in train.samples} & {s.image for s in test.samples}
    assert test.samples == val.samples


def test_only_augmented_items_change(tree):
    root = tree("pets")
    for augment in (True, False):
        data = open_dataset("pets", root, "train", image_size=SIZE, augment=augment)
        torch.manual_seed(0)
        assert (len({data[0][2].numpy().tobytes() for _ in range(10)}) > 1) == augment


@pytest.mark.parametrize("name", WRITERS)
def test_a_relative_root_and_a_string_do(tree, name, monkeypatch):
    monkeypatch.chdir(tree(name))
    assert len(open_dataset(name, ".", "train", image_size=SIZE)) >= 2


@pytest.mark.long
def test_spawned_workers_read_the_same_items(tree):
    data = open_dataset("dogs", tree("dogs"), "train", image_size=SIZE)
    assert len(pickle.dumps(data)) < 10_000  # paths, not pixels
    loader = DataLoader(data, batch_size=2, num_workers=2, multiprocessing_context="spawn")
    for got, expected in zip(next(iter(loader)), next(iter(DataLoader(data, batch_size=2))), strict=True):
        assert torch.equal(got, expected)


# ---- the sets -----------------------------------------------------------------------------------------------------------


def test_pets(tree):
    root = tree("pets")
    train, test = (open_dataset("pets", root, split, image_size=SIZE) for split in ("train", "test"))
    assert train.classes == ("Abyssinian", "American Bulldog")
    assert [int(label) for _, label, _ in train] == [0, 1, 0]
    assert [int(label) for _, label, _ in test] == [1, 0]
    assert (greys(train), greys(test)) == ([10, 30, 50], [70, 90])
    for data in (train, test):
        for _, _, mask in data:
            assert torch.equal(mask, middle(TRIMAP != 2))  # the band of 3 counts as animal


@pytest.mark.parametrize(("split", "official"), [("train", "trainval"), ("test", "test")])
def test_pets_are_what_torchvision_reads(tree, split, official):
    root = tree("pets")
    data = open_dataset("pets", root, split, image_size=SIZE)
    theirs = torchvision.datasets.OxfordIIITPet(str(root), official, target_types=["category", "segmentation"])
    assert data.classes == tuple(theirs.classes)
    for (image, label, mask), (their_image, (their_label, trimap)) in zip(data, theirs, strict=True):
        assert label == their_label
        assert torch.equal(mask, middle(np.asarray(trimap) != 2))
        assert (data.denormalise(image).mean() * 255 - np.asarray(their_image).mean()).abs() < 1e-3


def test_voc_keeps_the_images_of_one_class(tree):
    root = tree("voc")
    train, test = (open_dataset("voc", root, split, image_size=SIZE) for split in ("train", "test"))
    assert len(train.classes) == 20
    # 2007_000063 shows a dog and a person, 2007_000068 a dog and a difficult cat
    assert [train.classes[label] for _, label, _ in train] == ["dog", "person"]
    assert [test.classes[label] for _, label, _ in test] == ["person"]
    assert (greys(train), greys(test)) == ([10, 30], [90])
    assert torch.equal(train[0][2], middle(rectangle(4, 12, 6, 16)).bool())  # the void band counts as object
    assert torch.equal(train[1][2], middle(rectangle(2, 9, 3, 8)).bool())


def test_voc_masks_are_the_labels_class(tree):
    root = tree("voc")
    base = root / "VOCdevkit" / "VOC2012"
    values = rectangle(4, 12, 6, 16, value=12)
    values[0:4, 0:10] = 9  # a chair that the annotation does not name
    save_values(base / "SegmentationClass" / "2007_000032.png", values, palette=True)
    assert torch.equal(open_dataset("voc", root, "train", image_size=SIZE)[0][2], middle(values == 12))


def test_voc_class_numbers_are_the_official_ones():
    from sib_fast.lab.datasets.voc import CLASSES

    assert list(CLASSES) == sorted(CLASSES)  # the development kit numbers them alphabetically from 1
    assert (CLASSES.index("aeroplane"), CLASSES.index("person"), CLASSES.index("tvmonitor")) == (0, 14, 19)


@pytest.mark.parametrize("place", ["", "lists"])
def test_dogs(tree, place):
    root = tree("dogs")
    if place:  # copies of the set often have the lists in a folder
        (root / place).mkdir()
        for part in ("train", "test"):
            shutil.move(root / f"{part}_list.mat", root / place)
    train, test = (open_dataset("dogs", root, split, image_size=SIZE) for split in ("train", "test"))
    assert train.mask_kind == test.mask_kind == "box"
    assert train.classes == ("Chihuahua", "Shih-Tzu")
    assert [int(label) for _, label, _ in train] == [0, 1]
    assert [int(label) for _, label, _ in test] == [1, 0]
    assert (greys(train), greys(test)) == ([10, 30], [50, 70])
    two = rectangle(3, 6, 4, 8) | rectangle(8, 13, 10, 15)
    for (_, _, mask), expected in zip(train, (rectangle(3, 9, 4, 11), two), strict=True):
        assert torch.equal(mask, middle(expected).bool())
    assert torch.equal(test[0][2], middle(rectangle(3, 9, 4, 11)).bool())  # annotated at another size
    assert test[1][2].all()  # a box that reaches over the edge


def test_cub_with_segmentations(tree):
    root = tree("cub")
    train, test = (open_dataset("cub", root, split, image_size=SIZE) for split in ("train", "test"))
    assert train.mask_kind == "segmentation"
    assert train.classes == ("Black_footed_Albatross", "Laysan_Albatross")
    assert [int(label) for _, label, _ in train] == [0, 1]
    assert [int(label) for _, label, _ in test] == [0, 1]
    assert (greys(train), greys(test)) == ([30, 50], [10, 70])
    assert all(torch.equal(mask, middle(rectangle(5, 11, 7, 15)).bool()) for _, _, mask in train)  # three of five votes
    shutil.move(root / "segmentations", root / "CUB_200_2011")
    moved = open_dataset("cub", root, "train", image_size=SIZE, masks="segmentation")
    assert torch.equal(moved[0][2], middle(rectangle(5, 11, 7, 15)).bool())


def test_cub_with_boxes(tmp_path):
    write_cub(tmp_path, segmentations=False)
    data = open_dataset("cub", tmp_path, "test", image_size=SIZE)
    assert data.mask_kind == "box"
    assert torch.equal(data[0][2], middle(rectangle(3, 9, 4, 11)).bool())
    assert torch.equal(data[1][2], middle(rectangle(5, 14, 5, 7)).bool())
    with pytest.raises(FileNotFoundError, match=r"segmentations.*w9d68-gec53"):
        open_dataset("cub", tmp_path, "test", image_size=SIZE, masks="segmentation")


def test_cub_takes_boxes_on_request(tree):
    data = open_dataset("cub", tree("cub"), "test", image_size=SIZE, masks="box")
    assert data.mask_kind == "box"
    assert torch.equal(data[0][2], middle(rectangle(3, 9, 4, 11)).bool())


def test_folder(tree):
    root = tree("folder")
    train = open_dataset("folder", root, "train", image_size=SIZE)
    assert train.classes == ("ant", "bee")
    assert [int(label) for _, label, _ in train] == [0, 1, 1]
    assert greys(train) == [10, 30, 50]
    for split in ("test", "val"):  # there is only val/
        assert greys(open_dataset("folder", root, split, image_size=SIZE)) == [70, 90]
    for label in ("ant", "bee"):
        save_jpeg(root / "test" / label / "f.jpg", 150)
    assert greys(open_dataset("folder", root, "test", image_size=SIZE)) == [150, 150]
    assert greys(open_dataset("folder", root, "val", image_size=SIZE)) == [70, 90]


def test_a_folder_with_masks_of_ones_own(tree):
    root = tree("folder")
    for k, place in enumerate(("train/ant/a.png", "train/bee/b_mask.png", "train/bee/c.bmp")):
        save_values(root / "masks" / place, rectangle(3, 9, 4, 11 + k, value=255 if k else 1))
    train = open_dataset("folder", root, "train", image_size=SIZE)
    assert (train.mask_kind, greys(train)) == ("segmentation", [10, 30, 50])
    for k, (_, _, mask) in enumerate(train):
        assert torch.equal(mask, middle(rectangle(3, 9, 4, 11 + k)).bool())
    assert open_dataset("folder", root, "test", image_size=SIZE).mask_kind == "none"  # masks/val is not there
    save_values(root / "masks/train/ant/a.png", np.repeat(np.repeat(rectangle(3, 9, 4, 11), 2, 0), 2, 1))  # of twice the size
    assert torch.equal(train[0][2], middle(rectangle(3, 9, 4, 11)).bool())


def test_masks_of_some_images_alone(tree):
    root = tree("folder")
    save_values(root / "masks/train/bee/b.png", rectangle(3, 9, 4, 11))
    data = open_dataset("folder", root, "train", image_size=SIZE)
    assert (data.mask_kind, len(data), data.annotated, data.has_masks) == ("segmentation", 3, 1, True)
    _, _, mask = next(iter(DataLoader(data, batch_size=3)))
    assert mask.annotated.tolist() == [False, True, False]
    assert torch.equal(mask.values[1], middle(rectangle(3, 9, 4, 11)).bool())
    assert not mask.values[[0, 2]].any()


def test_boxes_of_ones_own(tree):
    root = tree("folder")
    (root / "boxes").mkdir()
    table = root / "boxes/train.csv"
    table.write_text("image,x0,y0,x1,y1\nant/a.jpg,4,3,11,9\nbee/b.jpg,4,3,8,9\nbee/b.jpg,8,3,11,9\n")
    data = open_dataset("folder", root, "train", image_size=SIZE)
    assert (data.mask_kind, data.annotated) == ("box", 2)
    _, _, mask = next(iter(DataLoader(data, batch_size=3)))
    assert mask.annotated.tolist() == [True, True, False]
    for k in (0, 1):  # two boxes of an image are a union
        assert torch.equal(mask.values[k], middle(rectangle(3, 9, 4, 11)).bool())
    with open(table, "a") as file:
        file.write("bee/c.jpg,4,3,11,9\n")
    whole = open_dataset("folder", root, "train", image_size=SIZE)
    assert torch.equal(whole[2][2], middle(rectangle(3, 9, 4, 11)).bool())
    save_values(root / "masks/train/ant/a.png", rectangle(1, 9, 4, 11))  # outlines come before boxes, unless those are asked for
    assert open_dataset("folder", root, "train", image_size=SIZE).mask_kind == "segmentation"
    assert open_dataset("folder", root, "train", image_size=SIZE, masks="box").mask_kind == "box"


@pytest.mark.parametrize("masks", ["segmentation", "box"])
def test_a_photograph_of_ones_own_is_turned_as_viewers_show_it(tree, masks):
    """So is a mask or a box of it what was drawn on the screen."""
    root = tree("folder")
    path = root / "train/ant/a.jpg"
    exif = Image.Exif()
    exif[0x0112] = 6  # stored lying on its left side: turn by 90° clockwise to show it
    shown = np.zeros((16, 20, 3), np.uint8)
    shown[3:9, 4:11] = 255
    Image.fromarray(np.rot90(shown).copy()).save(path, quality=100, exif=exif)
    if masks == "box":
        (root / "boxes").mkdir()
        (root / "boxes/train.csv").write_text("image,x0,y0,x1,y1\nant/a.jpg,4,3,11,9\n")
    else:
        save_values(root / "masks/train/ant/a.png", rectangle(3, 9, 4, 11))
    image, _, mask = open_dataset("folder", root, "train", image_size=SIZE)[0]
    inside = mask.values[0]
    assert torch.equal(inside[None], middle(rectangle(3, 9, 4, 11)).bool())
    assert image[0][inside].mean() > 1.5
    assert image[0][~inside].mean() < -1


def test_masks_of_ones_own_that_do_not_fit_are_named(tree):
    root = tree("folder")
    with pytest.raises(ValueError, match=r"masks.train must hold annotations of images by their path, such as 'ant/a', got none"):
        open_dataset("folder", root, "train", image_size=SIZE, masks="segmentation")
    with pytest.raises(FileNotFoundError, match=r"folder: boxes must be an existing file, got .*boxes.train\.csv"):
        open_dataset("folder", root, "train", image_size=SIZE, masks="box")
    save_values(root / "masks/train/ant/a.png", rectangle(3, 9, 4, 11))
    save_values(root / "masks/train/bee/b.png", rectangle(3, 9, 4, 11).T)
    save_values(root / "masks/train/bee/see.png", rectangle(3, 9, 4, 11))
    with pytest.raises(ValueError, match=r"such as 'ant/a', got 'bee/see' \(1 of 3 have no image\); images without"):
        open_dataset("folder", root, "train", image_size=SIZE)
    (root / "masks/train/bee/see.png").unlink()
    save_values(root / "masks/train/bee/c.png", rectangle(3, 9, 4, 11)[:4])
    data = open_dataset("folder", root, "train", image_size=SIZE)
    with pytest.raises(
        ValueError, match=r"folder: mask must have the image's proportions, got 16x20 for 20x16 in .*b\.png; it must"
    ):
        data[1]
    with pytest.raises(ValueError, match=r"got 20x4 for 20x16 in .*c\.png$"):
        data[2]
    (root / "masks/train/bee/c.png").write_bytes(b"")
    with pytest.raises(ValueError, match=r"folder: .*c\.png must not be empty, got 0 bytes"):
        open_dataset("folder", root, "train", image_size=SIZE)


@pytest.mark.parametrize("part", ["train", "val"])
def test_what_file_managers_leave_is_no_image(tree, part):
    root = tree("folder")
    clean = {split: open_dataset("folder", root, split, image_size=SIZE).samples for split in ("train", "val")}
    for path in (
        "ant/._a.jpg",
        "._b.jpg",
        ".DS_Store",
        "bee/.DS_Store",
        "bee/Thumbs.db",
        "bee/desktop.ini",
        "ant/.thumbnails/a.jpg",
    ):
        (root / part / path).parent.mkdir(exist_ok=True)
        (root / part / path).write_bytes(b"\x00\x05\x16\x07 a resource fork")
    for path in (".ipynb_checkpoints/a.jpg", "__MACOSX/ant/._a.jpg", "__MACOSX/c.jpg"):
        save_jpeg(root / part / path, 200)
    for split, samples in clean.items():
        data = open_dataset("folder", root, split, image_size=SIZE)
        assert data.classes == ("ant", "bee")
        assert data.samples == samples
        assert all(image.isfinite().all() for image, _, _ in data)
    shutil.rmtree(root / part / "ant")
    shutil.rmtree(root / part / "bee")
    with pytest.raises(FileNotFoundError, match=rf"folder: .*{part} must hold images in every class folder, got no class folder"):
        open_dataset("folder", root, part, image_size=SIZE)


def test_a_folder_within_a_hidden_one_is_not_hidden(tree, tmp_path):
    root = tmp_path / ".cache" / "set"
    shutil.copytree(tree("folder"), root)
    assert len(open_dataset("folder", root, "train", image_size=SIZE)) == 3


@pytest.mark.parametrize("name", WRITERS)
def test_an_empty_image_is_named_when_the_set_is_opened(tree, name):
    root = tree(name)
    path = open_dataset(name, root, "train", image_size=SIZE).samples[-1].image
    open(path, "wb").close()
    with pytest.raises(ValueError, match=rf"{name}: {re.escape(path)} must not be empty, got 0 bytes \(1 of \d+ files are\)"):
        open_dataset(name, root, "train", image_size=SIZE)


@pytest.mark.parametrize("name", WRITERS)
def test_an_image_that_is_cut_short_is_named(tree, name):
    data = open_dataset(name, tree(name), "train", image_size=SIZE)
    path = data.samples[0].image
    with open(path, "r+b") as file:
        file.truncate(200)
    with pytest.raises(ValueError, match=rf"dataset: {re.escape(path)} must be a readable image"):
        data[0]


def test_folder_whose_parts_have_different_classes(tree):
    root = tree("folder")
    shutil.rmtree(root / "val" / "ant")
    with pytest.raises(ValueError, match=r"folder: .*val must have the class folders of .*train, got a difference in \['ant'\]"):
        open_dataset("folder", root, "test", image_size=SIZE)


def test_images_without_masks_train_with_the_losss_own(tree):
    data = open_dataset("folder", tree("folder"), "train", image_size=SIZE)
    image, label, mask = next(iter(DataLoader(data, batch_size=3)))
    assert isinstance(mask, GivenMask)
    assert mask.annotated.tolist() == [False] * 3
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Softplus(), nn.Flatten(), nn.Linear(4 * (SIZE - 2) ** 2, 2))
    x = (image + torch.randn_like(image)).requires_grad_()
    losses = [SIBLoss(window_size=5)(model(x), label, x, **extra) for extra in ({}, {"mask": mask})]
    assert torch.equal(*losses)
    empty = SIBLoss(window_size=5)(model(x), label, x, mask=mask.values)  # "nothing is object" would be something else
    assert not torch.equal(losses[0], empty)


def test_digits_are_the_embedded_set():
    data = open_dataset("digits", None, "test", image_size=20, size=30, correlation=0.0, seed=3)
    expected = EmbeddedDigits("test", 30, correlation=0.0, image_size=20, seed=3)
    for got, item in zip(data, (expected[k] for k in range(30)), strict=True):
        assert all(torch.equal(a, b) for a, b in zip(got, item, strict=True))
    assert data.classes == tuple("0123456789")
    image = data[0][0]
    torch.testing.assert_close(data.denormalise(image), (image * 0.25 + 0.5).clamp(0, 1))


@pytest.mark.parametrize("split", ["train", "test"])
def test_without_a_size_every_digit_of_the_split_is_there_once(split):
    data = open_dataset("digits", None, split, image_size=16)
    counts = torch.bincount(data.embedded.digits)
    assert counts.max() == 1
    assert len(data) == counts.sum() == {"train": 1297, "test": 500}[split]


# ---- what is missing, damaged or asked for wrongly ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "gone", "words"),
    [
        ("pets", "oxford-iiit-pet", r"https://www\.robots\.ox\.ac\.uk/~vgg/data/pets/ and unpack both in .*oxford-iiit-pet$"),
        ("pets", "oxford-iiit-pet/annotations/trainval.txt", r"annotations\.tar\.gz"),
        ("pets", "oxford-iiit-pet/annotations/trimaps", r"annotations\.tar\.gz"),
        ("pets", "oxford-iiit-pet/images/american_bulldog_7.jpg", r"\(1 of 6 are missing\).*images\.tar\.gz"),
        ("voc", "VOCdevkit", r"VOCtrainval_11-May-2012\.tar from http://host\.robots\.ox\.ac\.uk/pascal/VOC/voc2012/"),
        ("voc", "VOCdevkit/VOC2012/SegmentationClass", "VOCtrainval"),
        ("voc", "VOCdevkit/VOC2012/Annotations/2007_000032.xml", "VOCtrainval"),
        (
            "dogs",
            "Images",
            r"images\.tar, annotation\.tar and lists\.tar from http://vision\.stanford\.edu/aditya86/ImageNetDogs/",
        ),
        ("dogs", "test_list.mat", r"lists\.tar"),
        ("dogs", "Annotation/n02086240-Shih-Tzu", r"annotation\.tar"),
        ("cub", "CUB_200_2011", r"CUB_200_2011\.tgz from https://data\.caltech\.edu/records/65de6-vp158"),
        ("cub", "CUB_200_2011/bounding_boxes.txt", r"CUB_200_2011\.tgz"),
        ("cub", "segmentations/002.Laysan_Albatross", r"segmentations\.tgz from https://data\.caltech\.edu/records/w9d68-gec53"),
        ("folder", "train", "train/<class>/<image>"),
    ],
)
def test_what_is_missing_is_named_with_where_it_comes_from(tree, name, gone, words):
    root = tree(name)
    path = root / gone
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    with pytest.raises(FileNotFoundError, match=f"^{name}: root must hold {re.escape(str(path))}.*, got no such .*{words}"):
        open_dataset(name, root, "train", image_size=SIZE)


def test_a_folder_without_images(tree):
    root = tree("folder")
    (root / "train" / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match=r"folder: .*train must hold images in every class folder, got .*empty"):
        open_dataset("folder", root, "train", image_size=SIZE)


PET, VOC, DOG, BIRD = "oxford-iiit-pet/annotations", "VOCdevkit/VOC2012", "n02085620-Chihuahua/n02085620_5927", "CUB_200_2011"


@pytest.mark.parametrize(
    ("name", "path", "content", "words"),
    [
        ("pets", f"{PET}/trainval.txt", "Abyssinian_1 1 1\n", r"trainval\.txt line 1 must be 'image class species breed'"),
        ("pets", f"{PET}/trainval.txt", "Abyssinian_1 x 1 1\n", r"trainval\.txt line 1 must be"),
        ("pets", f"{PET}/trainval.txt", "Abyssinian_1 5 1 1\n", r"annotations must name every class from 1 on, got \[1, 2, 5\]"),
        ("voc", f"{VOC}/Annotations/2007_000032.xml", "<annotation>", r"2007_000032\.xml must be a Pascal VOC annotation"),
        ("voc", f"{VOC}/Annotations/2007_000032.xml", voc_xml([]), r"2007_000032\.xml must be a Pascal VOC .* got .*0 objects"),
        (
            "voc",
            f"{VOC}/Annotations/2007_000032.xml",
            voc_xml([("unicorn", 1, 1, 2, 2, "")]),
            r"2007_000032\.xml must name classes of Pascal VOC, got \['unicorn'\]",
        ),
        ("dogs", "train_list.mat", "not matlab", r"train_list\.mat must be a list of lists\.tar"),
        ("cub", f"{BIRD}/images.txt", "1\n", r"images\.txt line 1 must be 'int str', got '1'"),
        ("cub", f"{BIRD}/images.txt", "\n", r"images\.txt line 1 must be"),
        ("cub", f"{BIRD}/bounding_boxes.txt", "1 0 0 5 x\n", r"bounding_boxes\.txt line 1 must be 'int float float float float'"),
        ("cub", f"{BIRD}/bounding_boxes.txt", "1 0 0 5 5\n", r"bounding_boxes\.txt must list the images of .* at image 2"),
        (
            "cub",
            f"{BIRD}/image_class_labels.txt",
            "1 1\n2 1\n3 9\n4 2\n",
            r"class_labels\.txt must hold numbers 1 to 2, got image 3: 9",
        ),
        ("cub", f"{BIRD}/train_test_split.txt", "1 1\n2 2\n3 0\n4 0\n", r"split\.txt must hold numbers 0 to 1, got image 2: 2"),
        ("cub", f"{BIRD}/classes.txt", "1 001.A\n3 003.B\n", r"classes\.txt must name every class from 1 on, got \[1, 3\]"),
    ],
    ids=lambda v: v[:40] if isinstance(v, str) else "",
)
def test_a_damaged_list_is_named_on_opening(tree, name, path, content, words):
    root = tree(name)
    (root / path).write_text(content)
    with pytest.raises(ValueError, match=f"^{name}: .*{words}"):
        open_dataset(name, root, "train", image_size=SIZE)


def test_a_mat_file_of_something_else_is_named(tree):
    root = tree("dogs")
    scipy.io.savemat(root / "train_list.mat", {"train_data": np.zeros((3, 3))})
    with pytest.raises(ValueError, match=r"dogs: .*train_list\.mat must be a list of lists\.tar, got KeyError\('file_list'\)"):
        open_dataset("dogs", root, "train", image_size=SIZE)


@pytest.mark.parametrize(
    ("name", "path", "content", "words"),
    [
        ("pets", f"{PET}/trimaps/Abyssinian_1.png", "text", "must be a readable annotation image, got UnidentifiedImageError"),
        ("pets", f"{PET}/trimaps/Abyssinian_1.png", TRIMAP * 80, "must be a trimap of values 1, 2 and 3, got 80 to 240"),
        (
            "pets",
            f"{PET}/trimaps/Abyssinian_1.png",
            TRIMAP.T,
            "must hold one 8-bit value per pixel of its 20x16 image, got 16x20",
        ),
        ("voc", f"{VOC}/SegmentationClass/2007_000032.png", TRIMAP * 70, "must hold the classes 0 to 20 or 255, got 140"),
        (
            "voc",
            f"{VOC}/SegmentationClass/2007_000032.png",
            np.zeros((HEIGHT, WIDTH, 3)),
            "must hold one 8-bit value per pixel of its 20x16 image, got 20x16x3",
        ),
        ("dogs", f"Annotation/{DOG}", "<annotation><object></annotation>", "must be a Pascal VOC annotation with objects"),
        ("dogs", f"Annotation/{DOG}", voc_xml([("Chihuahua", "x", 1, 2, 2, "")]), "must be a Pascal VOC .* got ValueError.*'x'"),
        ("dogs", f"Annotation/{DOG}", voc_xml([("Chihuahua", 1, 1, 5, 5, "")], width=0), "must be a Pascal VOC .* size"),
        (
            "dogs",
            f"Annotation/{DOG}",
            voc_xml([("Chihuahua", 8, 3, 4, 9, "")]),
            r"must hold a box with a pixel of its 20x16 image inside, got \[\(8\.0, 3\.0, 4\.0, 9\.0\)\]",
        ),
        ("cub", "segmentations/001.Black_footed_Albatross/Black_Footed_Albatross_0009_34.png", VOTES[1:], "got 20x15 uint8"),
    ],
    ids=lambda v: v[:40] if isinstance(v, str) else "",
)
def test_a_damaged_annotation_is_named_when_its_image_is_read(tree, name, path, content, words):
    root = tree(name)
    (root / path).write_text(content) if isinstance(content, str) else save_values(root / path, content)
    data = open_dataset(name, root, "train", image_size=SIZE)
    with pytest.raises(ValueError, match=f"^{name}: {re.escape(str(root / path))} .*{words}"):
        data[0]


def test_a_box_outside_its_image_is_named(tmp_path):
    write_cub(tmp_path, segmentations=False)
    boxes = "1 0 0 5 5\n2 30.0 2.0 5.0 5.0\n3 0 0 5 5\n4 0 0 5 5\n"
    (tmp_path / "CUB_200_2011" / "bounding_boxes.txt").write_text(boxes)
    with pytest.raises(ValueError, match=r"cub: bounding_boxes\.txt, image 2, must hold a box with a pixel of its 20x16 image"):
        open_dataset("cub", tmp_path, "train", image_size=SIZE)[0]


@pytest.mark.parametrize(
    ("name", "options", "words"),
    [
        (
            "imagenet",
            {},
            "open_dataset: name must be one of 'digits', 'folder', 'pets', 'voc', 'dogs', 'cub', 'cutouts', got 'imagenet'",
        ),
        ("pets", {"split": "trainval"}, "open_dataset: split must be one of 'train', 'test', 'val', got 'trainval'"),
        ("pets", {"masks": "box"}, "pets: masks must be one of 'auto', 'segmentation', got 'box'"),
        ("dogs", {"masks": "segmentation"}, "dogs: masks must be one of 'auto', 'box', got 'segmentation'"),
        ("folder", {"masks": "outline"}, "folder: masks must be one of 'auto', 'segmentation', 'box', got 'outline'"),
        ("dogs", {"root": None}, r"dogs: root must be given, got None; docs/data\.md"),
    ],
)
def test_bad_arguments_are_named(tmp_path, name, options, words):
    arguments = {"root": tmp_path, "split": "train", "image_size": SIZE} | options
    with pytest.raises(ValueError, match=f"^{words}"):
        open_dataset(name, **arguments)


def test_a_missing_torchvision_is_explained(monkeypatch, tmp_path):
    import sys

    for module in [m for m in sys.modules if m.startswith("sib_fast.lab.datasets.pets")]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setitem(sys.modules, "sib_fast.lab.datasets.files", None)
    with pytest.raises(ImportError, match=r"^pets: needs torchvision and the lab extra, got .*; install the torchvision"):
        open_dataset("pets", tmp_path, "train", image_size=SIZE)
