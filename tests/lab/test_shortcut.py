"""The shortcut test on networks whose answer is known: one reads the background alone, one the object alone, one nothing."""

from __future__ import annotations

import dataclasses
import json
import math
import re
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

pytest.importorskip("scipy", reason="extra [lab]", exc_type=ImportError)
pytest.importorskip("torchvision", reason="extra [lab]", exc_type=ImportError)
pytest.importorskip("captum", reason="extra [explain]", exc_type=ImportError)
pytest.importorskip("pytorch_grad_cam", reason="extra [explain]", exc_type=ImportError)
from PIL import Image
from torch.utils.data import DataLoader

from sib_fast import cli
from sib_fast.lab.networks import NetworkSpec, build_network, save_network
from sib_fast.lab.shortcut import diagnose, open_network, run
from sib_fast.lab.shortcut.images import gather, open_folder
from sib_fast.lab.shortcut.subject import OTHER, map_classes
from sib_fast.lab.shortcut.verdict import KNOWS_NOTHING, LEANS, NO_SIGN, UNDECIDED
from sib_fast.lab.shortcut.versions import (
    MIXED_NEXT,
    MIXED_RAND,
    MIXED_SAME,
    NO_FG,
    ONLY_BG_B,
    ONLY_BG_T,
    ONLY_FG,
    ORIGINAL,
    VERSIONS,
)
from sib_fast.masks import GivenMask
from tests.lab.ring_images import LEVELS, SIZE, item


def made(count=64, classes=4):
    return [item(i % classes, i) for i in range(count)]


def nearest(greatest):
    """−200 (greatest − level)², without what all logits share: its gradient would vanish at a level."""
    return 400 * greatest * LEVELS - 200 * LEVELS**2


class Reader(nn.Module):
    """The class whose level is nearest to the greatest value of a channel."""

    def __init__(self, channel):
        super().__init__()
        self.channel = channel

    def forward(self, x):
        return nearest(x[:, self.channel].flatten(1).amax(dim=1, keepdim=True))


READS_BACKGROUND, READS_OBJECT = Reader(0), Reader(1)


def quick(network, data, **options):
    return diagnose(network, data, **{"methods": (), "shown": 2, "backgrounds_each": 3} | options)


# ---- networks with known answers ----------------------------------------------------------------------------------------


def test_a_network_that_reads_the_background_alone_leans_on_it():
    data = made()
    found = quick(READS_BACKGROUND, data)
    assert found.verdict.kind == LEANS
    assert found.verdict.headline.startswith("Yes, this network leans strongly on the background: ")
    for version in (ORIGINAL, MIXED_SAME, NO_FG, ONLY_BG_B, ONLY_BG_T):
        assert found.accuracy[version].mean == 1, version
    assert found.accuracy[MIXED_NEXT].mean == 0
    assert found.flips[MIXED_NEXT].mean == 1
    assert found.accuracy[ONLY_FG].mean == 0.25  # black is nearest to the first class
    # of a random background it knows the class of the giver, which the records name
    label_of = {image["name"]: image["label"] for image in found.images}
    right = [
        label_of[a["background"]] == image["label"] == a["answer"]
        for image in found.images
        for a in image["answers"]
        if a["version"] == MIXED_RAND
    ]
    assert found.accuracy[MIXED_RAND].mean == pytest.approx(np.mean(right))
    assert found.measures["gap"].mean == pytest.approx(1 - np.mean(right))
    assert found.measures["worst"].mean == pytest.approx(np.mean(np.reshape(right, (len(data), 3)).all(axis=1)))
    assert found.measures["between_flips"].mean > 0.5
    assert found.measures["background_known"].low > 0


def test_a_network_that_reads_the_object_alone_does_not():
    found = quick(READS_OBJECT, made())
    assert found.verdict.kind == NO_SIGN
    for version in (ORIGINAL, MIXED_SAME, MIXED_RAND, MIXED_NEXT, ONLY_FG):
        assert found.accuracy[version].mean == 1, version
    assert (found.measures["gap"].mean, found.measures["gap"].low, found.measures["gap"].high) == (0, 0, 0)
    assert found.measures["worst"].mean == 1
    assert found.moved[MIXED_RAND].mean == 0
    assert found.worst == ()
    assert "No image: on no background did the probability" in found.to_html()


def test_what_pasting_does_is_no_gap():
    """A network that fails on every pasted object, whatever is behind it."""

    def disturbed(x):
        whole = x[:, 2].sum((1, 2)) > 80  # the object with the inside of its ring
        return torch.where(whole[:, None], READS_OBJECT(x), READS_OBJECT(x).roll(1, dims=1))

    found = quick(disturbed, made())
    assert (found.accuracy[ORIGINAL].mean, found.accuracy[MIXED_SAME].mean) == (1, 0)
    assert (found.measures["gap"].mean, found.measures["loss"].mean, found.measures["paste"].mean) == (0, 1, 1)
    assert found.verdict.kind == NO_SIGN


def test_images_that_all_agree_rule_a_gap_out_only_if_they_are_enough():
    assert quick(READS_OBJECT, made(32)).verdict.kind == UNDECIDED


@pytest.mark.parametrize("bias", [0.0, 3.0])
def test_a_network_that_knows_nothing_cannot_be_judged(bias):
    found = quick(lambda x: torch.tensor([0.0, bias, 0.0, 0.0]).repeat(len(x), 1), made())
    assert found.verdict.kind == KNOWS_NOTHING
    assert f"answers “{int(bias > 0)}” to every image" in found.verdict.headline
    assert found.measures["gap"].mean == 0
    assert found.verdict.advice


def test_a_network_whose_classes_are_in_another_order_is_told_to_check_them():
    found = quick(lambda x: READS_OBJECT(x).roll(1, dims=1), made())
    assert found.verdict.kind == KNOWS_NOTHING
    assert "it is right in 0 %" in found.verdict.headline
    assert "the classes are in the network's order" in found.verdict.advice[0]


def test_backgrounds_that_do_not_tell_the_class_show_no_gap_but_that_answers_change():
    """The object decides but for every fourth background: what the classes' backgrounds have in common is nothing."""
    data = []
    for i in range(128):
        image, label, mask = item(i % 4, i)
        image[0][~mask[0]] = LEVELS[(i // 4) % 4]
        data.append((image, label, mask))
    found = quick(lambda x: torch.where(x[:, 0].amax((1, 2))[:, None] > 0.8, READS_OBJECT(x).roll(1, 1), READS_OBJECT(x)), data)
    assert found.verdict.kind != LEANS
    assert any("though here it does not give the class away" in sentence for sentence in found.verdict.sentences)


def test_classes_of_one_image_have_no_gap_and_the_page_says_why():
    found = quick(READS_OBJECT, made(4))
    assert found.measures["gap"].n == 0
    assert math.isnan(found.measures["gap"].mean)
    assert found.accuracy[MIXED_RAND].n == 4
    assert found.verdict.kind == UNDECIDED
    assert "a BG-Gap needs two images of a class" in found.verdict.headline
    assert "no image has such a partner" in found.to_html()
    assert json.loads(found.to_json())["measures"]["gap"]["mean"] is None


def test_the_same_call_gives_the_same_numbers_and_leaves_everything_as_it_was():
    model = nn.Sequential(nn.Flatten(), nn.Dropout(), nn.Linear(3 * SIZE * SIZE, 4)).train()
    before, drawn = {k: v.clone() for k, v in model.state_dict().items()}, torch.get_rng_state()
    documents = []
    for _ in range(2):
        document = json.loads(quick(model, made(12)).to_json())
        documents.append({name: value for name, value in document.items() if name != "environment"})
    assert documents[0] == documents[1]
    assert all(module.training for module in model.modules())
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), drawn)


def test_energies_stand_beside_maps_that_know_nothing():
    data = made(12)
    found = diagnose(READS_OBJECT, data, methods=("saliency", "grad_cam"), explained=6, shown=0)
    assert found.energy["saliency"].share.mean == 1  # the gradient is at the greatest value of the object
    assert found.energy["saliency"].above_constant.mean == pytest.approx(1 - found.constant.mean)
    assert found.energy["saliency"].above_place.mean == pytest.approx(1 - found.place.mean)
    assert found.energy["saliency"].above_constant.low > 0
    assert found.constant.mean == pytest.approx(72 / SIZE**2)
    assert found.place.mean > found.constant.mean  # the objects overlap
    assert found.energy["grad_cam"].share.n == 0
    assert "layer must be given for this network" in found.energy["grad_cam"].reason
    assert "layer must be given for this network" in found.to_html()
    assert diagnose(READS_BACKGROUND, data, methods=("saliency",), explained=6, shown=0).energy["saliency"].share.mean == 0


def test_a_function_that_torch_cannot_differentiate_has_accuracies_all_the_same():
    def with_numpy(x):
        return nearest(torch.from_numpy(x.detach().numpy()[:, 0].reshape(len(x), -1).max(axis=1, keepdims=True)))

    found = diagnose(with_numpy, made(), methods=("saliency",), explained=4)
    assert found.verdict.kind == LEANS
    assert "cannot differentiate" in found.energy["saliency"].reason


def test_outputs_of_hugging_face_are_answers_without_maps():
    found = diagnose(lambda x: SimpleNamespace(logits=READS_OBJECT(x)), made(), methods=("saliency",), explained=4)
    assert found.accuracy[ORIGINAL].mean == 1
    assert "must return logits" in found.energy["saliency"].reason


def test_the_page_needs_nothing_else_and_holds_what_the_json_does(tmp_path):
    data = [(image, label, mask) for image, label, mask in made(20)]
    found = diagnose(
        READS_BACKGROUND, data, classes=("<a>", "b & c", "d", "e"), methods=("saliency",), explained=4, command="x <y>"
    )
    page, document = (path.read_text() for path in found.save(tmp_path / "new" / "folder"))
    assert re.findall(r'(?:src|href)="(?!data:image/jpeg;base64,|#)', page) == []
    assert "<a>" not in page
    assert "&lt;a&gt;" in page
    assert "x &lt;y&gt;" in page
    assert page.count("<table>") == 4
    assert all(version in page for version in VERSIONS)
    assert set(re.findall(r'href="#(\w+)"', page)) <= set(re.findall(r'id="(\w+)"', page))
    assert len(found.worst) == 8
    assert len(found.worst[0].cells) == 6  # with the map
    numbers = json.loads(document)
    assert numbers["format"] == run.FORMAT
    assert numbers["accuracy"][MIXED_RAND]["mean"] == found.accuracy[MIXED_RAND].mean
    assert f"{100 * found.measures['gap'].mean:+.1f} [" in page
    assert len(numbers["images"]) == 20
    assert not list(tmp_path.rglob("*.partial"))


# ---- classes ------------------------------------------------------------------------------------------------------------


def test_logits_are_mapped_by_a_map_by_name_or_by_order():
    names = ("ant", "bee", "cat", "dog")
    by_map = map_classes(4, names, ("pet", "insect"), {"pet": ["cat", 3], "insect": [0]})
    assert by_map.index.tolist() == [1, 2, 0, 0]  # bee is in none
    logits = torch.tensor([[0.0, 3.0, 2.0, 2.5], [0.0, 0.0, 5.0, 0.0]])
    assert by_map.predictions(logits).tolist() == [2, 0]
    softmax = logits.double().softmax(1)
    assert torch.allclose(by_map.probabilities(logits)[0], torch.stack([softmax[0, 2:].sum(), softmax[0, 0], softmax[0, 1]]))
    assert map_classes(4, names, ("dog", "ant"), None).index.tolist() == [1, 2, 2, 0]
    assert map_classes(2, None, ("x", "y"), None).index.tolist() == [0, 1]
    assert "by order" in map_classes(2, ("a", "b"), ("x", "y"), None).said


@pytest.mark.parametrize(
    ("logits", "network", "given", "words"),
    [
        (1000, None, None, "mapping must be given, got 1000 logits for 2 classes"),
        (4, None, {"pet": [0], "insect": []}, "must have logits for every class of the data, got none for insect"),
        (4, None, {"pet": [0], "bird": [1]}, "must name classes of the data, got 'bird'"),
        (4, None, {"pet": [0], "insect": [4]}, "must hold indices below 4 .*got 4"),
        (4, None, {"pet": [0], "insect": ["ant"]}, "got 'ant'; the network's classes have no names"),
        (4, None, {"pet": [0, 1], "insect": [1]}, "must give a logit to one class, got 1 for 'pet' and 'insect'"),
        (4, ("a", "b"), None, "must be as many as its 4 logits, got 2"),
    ],
)
def test_maps_that_cannot_be(logits, network, given, words):
    with pytest.raises(ValueError, match=words):
        map_classes(logits, network, ("pet", "insect"), given)


def test_another_class_is_a_wrong_answer():
    found = quick(
        lambda x: torch.cat([READS_OBJECT(x), torch.full((len(x), 1), 999.0)], dim=1),
        made(8),
        mapping={str(k): [k] for k in range(4)},
    )
    assert found.accuracy[ORIGINAL].mean == 0
    assert f"answers “{OTHER}” to every image" in found.verdict.headline


def test_one_logit_is_two_classes():
    data = made(40, classes=2)
    found = quick(lambda x: 100 * (x[:, 1].amax((1, 2))[:, None] - 0.4), data)
    assert found.accuracy[ORIGINAL].mean == 1


# ---- data ---------------------------------------------------------------------------------------------------------------


def test_masks_in_every_form_and_what_cannot_be_tested():
    image, _, mask = item(0, 0)
    outside = torch.zeros(0, 4)
    data = [
        (image, 0, mask), (image, 1, mask[0].float()), (image, 0, mask.to(torch.uint8) * 255),
        (image, torch.tensor(1), torch.tensor([[2.0, 2.0, 11.0, 11.0]])), (image, 0, GivenMask(mask, torch.tensor(True))),
        (image, 0, GivenMask(mask, torch.tensor(False))), (image, 0, None), (image, 0, torch.zeros_like(mask)),
        (image, 0, torch.ones_like(mask)), (image, 0, outside), (image, 0, mask * 7),
    ]  # fmt: skip
    found = gather(data, 100)
    assert sorted(found.names) == [f"item {i}" for i in range(5)]
    reasons = dict(found.left_out)
    assert "not annotated" in reasons["item 5"]
    assert "not annotated" in reasons["item 6"]
    assert "empty mask" in reasons["item 7"]
    assert "full mask" in reasons["item 8"]
    assert "empty mask" in reasons["item 9"]
    assert "0 and 1 or 0 and 255" in reasons["item 10"]
    assert int(found.masks[found.names.index("item 3")].sum()) == 81


def test_loaders_and_grey_images_are_taken_and_all_forms_give_the_same():
    grey = [(image[:1], label, mask) for image, label, mask in made(10)]
    loader = DataLoader(grey, batch_size=3)
    found = gather(loader, 7)
    assert (found.pixels.shape, found.names[-1]) == ((7, 1, SIZE, SIZE), "item 6")
    assert torch.equal(found.pixels[4], grey[4][0])
    result = quick(lambda x: nearest(x.flatten(1).amax(1, keepdim=True)), loader)
    assert result.accuracy[ORIGINAL].mean == 1


def test_normalised_images_need_their_mean_and_std():
    data = [((image - 0.5) / 0.25, label, mask) for image, label, mask in made(8)]
    with pytest.raises(ValueError, match=r"data must give images in \[0, 1\].*normalised images need their mean and std"):
        gather(data, 8)
    found = gather(data, 8, mean=(0.5,) * 3, std=(0.25,) * 3)
    assert torch.allclose(found.pixels[0], data[int(found.names[0].split()[1])][0] * 0.25 + 0.5)
    seen = []

    def network(x):
        seen.append(x)
        return READS_OBJECT(x * 0.25 + 0.5)

    assert quick(network, data, mean=(0.5,) * 3, std=(0.25,) * 3).accuracy[ORIGINAL].mean == 1
    assert seen[0].min() == pytest.approx(-2)  # black, as the network's images are


@pytest.mark.parametrize(
    ("data", "error", "words"),
    [
        ([item(0, 0), item(1, 1, image_size=30)], ValueError, "images of one size"),
        ([item(0, 0)] * 3, ValueError, "two classes or more, got 3 of '0' alone"),
        ([(item(0, 0)[0], 0)] * 3, TypeError, r"\(image, label, mask\), got tuple"),
        ([(item(0, 0)[0].byte(), 0, None)], TypeError, "floating-point tensors"),
        (
            [(item(0, 0)[0], 0, None)] * 40,
            ValueError,
            "two images or more with object and background, got 0; item .*not annotated",
        ),
        ([(*item(0, 0)[:1], -1, item(0, 0)[2]), item(0, 0)], ValueError, "labels must lie in"),
    ],
)
def test_data_that_cannot_be_tested(data, error, words):
    with pytest.raises(error, match=words):
        quick(READS_OBJECT, data)


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"images": 1}, ValueError, "images must be an int of at least 2, got 1"),
        ({"backgrounds_each": 1}, ValueError, "backgrounds_each must be"),
        ({"methods": ("lime",)}, ValueError, "methods must be one of"),
        ({"explained": -1}, ValueError, "must not be negative"),
        ({"mean": (0.5,)}, ValueError, "mean and std must be given together"),
        ({"layer": "nowhere"}, ValueError, "layer must be a name in the network's named_modules"),
    ],
)
def test_bad_options(options, error, words):
    with pytest.raises(error, match=words):
        diagnose(READS_OBJECT, made(4), **options)


@pytest.mark.parametrize(
    ("network", "error", "words"),
    [
        (3, TypeError, "network must be a module, a function"),
        (Reader, TypeError, "must be an instance, got the class Reader"),
        (lambda x: x, ValueError, r"must return logits \[N, classes\], got \[2, 3, 24, 24\]"),
        (lambda x: torch.full((len(x), 4), math.nan), ValueError, "finite logits"),
        ("nowhere.pt", FileNotFoundError, "checkpoint must be an existing file, got nowhere.pt"),
    ],
)
def test_networks_that_cannot_be_tested(network, error, words):
    with pytest.raises(error, match=words):
        quick(network, made(4))


# ---- folders ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def folders(tmp_path):
    """Six pictures of two classes, of several sizes and kinds, with masks of several kinds."""
    kinds = [("RGB", "png"), ("L", "png"), ("RGBA", "png"), ("P", "png"), ("RGB", "jpg"), ("CMYK", "jpg")]
    for i, (mode, suffix) in enumerate(kinds):
        name = tmp_path / "images" / ("cat", "dog")[i % 2] / f"{i}.{suffix}"
        name.parent.mkdir(parents=True, exist_ok=True)
        height, width = 40 + i, 50 - i
        pixels = np.random.default_rng(i).integers(0, 255, (height, width, 3), dtype=np.uint8)
        Image.fromarray(pixels).convert(mode).save(name)
        inside = np.zeros((height, width), dtype=np.uint8)
        inside[10:25, 12:30] = 1
        mask = tmp_path / "masks" / name.parent.name / f"{i}.png"
        mask.parent.mkdir(parents=True, exist_ok=True)
        if i == 0:  # the object in the opacity
            Image.fromarray(np.dstack([np.full((height, width, 3), 200, np.uint8), 255 * inside])).save(mask)
        elif i == 1:  # soft
            Image.fromarray(np.where(inside, 255, 100).astype(np.uint8)).save(mask)
        elif i == 2:  # twice the size, in colour
            Image.fromarray(np.repeat(np.repeat(np.dstack([inside * 255, inside * 0, inside * 0]), 2, 0), 2, 1)).save(mask)
        else:
            Image.fromarray(inside * (255 if i == 4 else 3)).save(mask.with_name(f"{i}_mask.png") if i == 5 else mask)
    (tmp_path / "images" / ".hidden").mkdir()
    (tmp_path / "images" / "cat" / "._0.png").write_bytes(b"x")
    return tmp_path


def test_a_folder_of_pictures_and_masks_of_every_kind(folders):
    data = open_folder(folders / "images", folders / "masks", None, 32)
    assert data.classes == ("cat", "dog")
    found = gather(data, 100)
    assert found.left_out == ()
    assert len(found) == 6
    for name, mask in zip(found.names, found.masks, strict=True):
        i = int(name.rpartition("/")[2][0])
        wide = 32 * 8 / 7 / min(40 + i, 50 - i)  # what the transform makes of a pixel
        assert int(mask.sum()) == pytest.approx(15 * 18 * wide**2, rel=0.12), name


def test_boxes_from_a_table(folders):
    table = folders / "boxes.csv"
    table.write_text(
        "image,x0,y0,x1,y1,note\ncat/0.png,12,10,30,25,a\ncat/2.png,12,10,20,25,b\ncat/2.png,20,10,30,25,c\ndog/1.png,1,1,20,20,\n"
    )
    data = open_folder(folders / "images", None, table, 32)
    assert data.mask_kind == "box"
    found = gather(data, 100)
    assert sorted(name.rpartition("/")[2] for name in found.names) == ["0.png", "1.png", "2.png"]
    assert len(found.left_out) == 3
    assert found.left_out[0][1] == "no mask: not annotated"
    (a, b) = (found.masks[[name.endswith(end) for name in found.names].index(True)] for end in ("0.png", "2.png"))
    assert abs(int(a.sum()) - int(b.sum())) < 0.15 * int(a.sum())  # two boxes are one union


def test_a_few_masks_among_many_images_are_found(folders):
    """However late the order of the draw comes to them."""
    for k in range(100):
        shutil.copy(folders / "images" / "cat" / "0.png", folders / "images" / "cat" / f"more{k}.png")
    for mask in (folders / "masks").rglob("*.png"):
        if mask.name not in ("0.png", "1.png"):
            mask.unlink()
    kept = len(list((folders / "masks").rglob("*.png")))
    for seed in range(5):
        found = gather(open_folder(folders / "images", folders / "masks", None, 32), 100, seed=seed)
        assert len(found) == kept >= 2
        assert {reason for _, reason in found.left_out} == {"no mask: not annotated"}


def test_files_that_are_broken_or_missing_are_left_out_and_named(folders):
    (folders / "images" / "cat" / "0.png").write_bytes(b"no picture")
    (folders / "masks" / "dog" / "1.png").write_bytes(b"no mask")
    (folders / "masks" / "cat" / "2.png").unlink()
    Image.fromarray(np.ones((10, 99), np.uint8)).save(folders / "masks" / "dog" / "3.png")
    found = gather(open_folder(folders / "images", folders / "masks", None, 32), 100)
    reasons = {name.rpartition("/")[2]: reason for name, reason in found.left_out}
    assert "must be a readable image" in reasons["0.png"]
    assert "mask must be a readable image" in reasons["1.png"]
    assert reasons["2.png"] == "no mask: not annotated"
    assert "mask must have the image's proportions, got 99x10 for 47x43" in reasons["3.png"]
    assert len(found) == 2


@pytest.mark.parametrize(
    ("table", "words"),
    [
        ("file,x0\n", "must have the columns image, x0, y0, x1, y1"),
        ("image,x0,y0,x1,y1\ncat/0.png,1,2,x,4\n", "four numbers a line"),
        ("image,x0,y0,x1,y1\ncat/0.png,9,2,3,4\n", "x0 < x1"),
        ("image,x0,y0,x1,y1\n0.png,1,2,3,4\n", "must name images by their path below"),
    ],
)
def test_tables_of_boxes_that_cannot_be(folders, table, words):
    (folders / "boxes.csv").write_text(table)
    with pytest.raises(ValueError, match=words):
        open_folder(folders / "images", None, folders / "boxes.csv", 32)


def test_folders_that_cannot_be(folders):
    with pytest.raises(ValueError, match="masks or boxes must be given with images"):
        open_folder(folders / "images", None, None, 32)
    with pytest.raises(FileNotFoundError, match="masks must be an existing folder"):
        open_folder(folders / "images", folders / "none", None, 32)
    with pytest.raises(ValueError, match="got no image in a class folder"):
        open_folder(folders / "images" / "cat", folders / "masks", None, 32)


# ---- files of networks --------------------------------------------------------------------------------------------------


def test_a_state_dict_with_its_architecture_in_the_wrappers_of_other_programs(tmp_path):
    torchvision = pytest.importorskip("torchvision")
    with torch.random.fork_rng():
        model = torchvision.models.squeezenet1_1(num_classes=5).eval()
    weights = {f"module.{name}": value for name, value in model.state_dict().items()}
    torch.save({"state_dict": weights, "epoch": 3}, tmp_path / "net.pth")
    found = open_network(tmp_path / "net.pth", "squeezenet1_1", classes=tuple("abcde"))
    x = torch.rand(2, 3, 64, 64)
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (found.mean, found.std))
    assert (found.image_size, found.classes, found.name) == (224, tuple("abcde"), "squeezenet1_1 (net.pth)")
    assert found.mean == (0.485, 0.456, 0.406)
    with torch.no_grad():
        assert torch.allclose(found.logits(x), model((x - mean) / std), atol=1e-5)


def test_timm_and_safetensors(tmp_path):
    timm = pytest.importorskip("timm")
    safetensors = pytest.importorskip("safetensors.torch")
    with torch.random.fork_rng():
        model = timm.create_model("test_resnet", num_classes=3).eval()
    safetensors.save_file(model.state_dict(), tmp_path / "net.safetensors")
    found = open_network(tmp_path / "net.safetensors", "timm:test_resnet")
    config = timm.data.resolve_model_data_config(model)
    assert (found.image_size, found.mean) == (config["input_size"][-1], tuple(config["mean"]))
    x = torch.rand(2, 3, 64, 64)
    with torch.no_grad():
        assert torch.allclose(found.logits(x), model(found.prepared(x)), atol=1e-5)
    with pytest.raises(ValueError, match="arch must be timm:<name> of a model of timm"):
        open_network(tmp_path / "net.safetensors", "timm:nothing")


def test_each_architecture_gets_the_normalisation_of_its_published_weights(tmp_path):
    torch.save(build_network("efficientnet_lite0", 3).state_dict(), tmp_path / "lite.pt")
    assert open_network(tmp_path / "lite.pt", "efficientnet_lite0").mean == (127 / 255,) * 3


def test_files_that_are_not_the_network(tmp_path):
    torch.save({"fc.weight": torch.zeros(3, 4), "fc.bias": torch.zeros(3)}, tmp_path / "bare.pt")
    (tmp_path / "text.pt").write_text("no network")
    with pytest.raises(ValueError, match=r"weights of another program need --arch NAME$"):
        open_network(tmp_path / "bare.pt")
    with pytest.raises(ValueError, match=r"must hold the weights of resnet18, got \d+ missing \(conv1.weight"):
        open_network(tmp_path / "bare.pt", "resnet18")
    with pytest.raises(ValueError, match=r"must hold weights of squeezenet1_1, got no classifier\.1\.weight"):
        open_network(tmp_path / "bare.pt", "squeezenet1_1")
    with pytest.raises(ValueError, match="checkpoint must be a file of weights that weights_only=True can read"):
        open_network(tmp_path / "text.pt", "resnet18")


# ---- the command --------------------------------------------------------------------------------------------------------


@pytest.fixture
def network(tmp_path):
    spec = NetworkSpec(
        "small_conv_net", tuple(map(str, range(10))), 32, (0.5,) * 3, (0.25,) * 3, {"width": 4},
        {"data": "digits", "correlation": 0.9, "seed": 3, "test_size": 40},
    )  # fmt: skip
    with torch.random.fork_rng():
        model = spec.build()
    save_network(tmp_path / "network.pt", spec, model)
    return tmp_path / "network.pt"


def test_the_command_tests_a_network_on_the_data_it_was_trained_on(network, tmp_path, capsys):
    out = tmp_path / "found"
    options = ["--out", str(out), "--explained", "4", "--methods", "saliency", "--no-progress"]
    assert cli.main(["diagnose", "--checkpoint", str(network), *options]) == 0
    said = capsys.readouterr().out
    document = json.loads((out / "diagnosis.json").read_text())
    assert said.startswith(document["verdict"]["headline"])
    assert said.splitlines()[-2:] == [str(out / "diagnosis.html"), str(out / "diagnosis.json")]
    assert document["settings"]["images"] == 40
    assert document["settings"]["training"]["correlation"] == 0.9
    assert document["class_map"] == "by name"
    assert document["network"] == "small_conv_net (network.pt)"


def test_the_command_tests_a_folder(network, folders, capsys):
    names = json.dumps({"cat": ["3"], "dog": [5, 6]})
    (folders / "map.json").write_text(names)
    folder = ["--images", str(folders / "images"), "--masks", str(folders / "masks"), "--map", str(folders / "map.json")]
    options = ["--out", str(folders / "out"), "--explained", "0", "--no-progress"]
    assert cli.main(["diagnose", "--checkpoint", str(network), *folder, *options]) == 0
    document = json.loads((folders / "out" / "diagnosis.json").read_text())
    assert (document["classes"], document["energy"]) == (["cat", "dog"], {})
    assert {a["answer"] for image in document["images"] for a in image["answers"]} <= {"cat", "dog", OTHER}


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--data", "folder", "--root", "."], "root must hold"),
        (["--data", "digits", "--masks", "m"], "masks and boxes must come with images"),
        (["--data", "digits", "--images", "m"], "images must take the place of data"),
        (["--images", "nowhere", "--masks", "m"], "images must be an existing folder, got nowhere"),
        (["--map", "nowhere.json"], "map must be an existing file"),
        (["--classes", "nowhere.txt"], "classes must be an existing file"),
        (["--count", "1"], "images must be an int of at least 2"),
        (["--methods", "lime"], "methods must be one of"),
        (["--arch", "resnet999"], "arch must be one of"),
    ],
)
def test_bad_options_are_one_sentence(network, tmp_path, capsys, options, words):
    assert cli.main(["diagnose", "--checkpoint", str(network), "--out", str(tmp_path / "out"), "--no-progress", *options]) == 2
    said = capsys.readouterr().err
    assert said.startswith("sib-fast diagnose: ")
    assert words in said
    assert said.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_data_without_masks_says_what_to_give(network, tmp_path, capsys):
    for part in ("train", "test"):
        (tmp_path / part / "a").mkdir(parents=True)
        Image.new("RGB", (8, 8)).save(tmp_path / part / "a" / "x.png")
    assert cli.main(["diagnose", "--checkpoint", str(network), "--data", "folder", "--root", str(tmp_path)]) == 2
    assert (
        "data must have masks or boxes, got 'folder', which has none: --images FOLDER --masks FOLDER" in capsys.readouterr().err
    )


@pytest.mark.parametrize("where", ["ask", "Diagnosis.to_json", "write_atomically"])
def test_an_interrupt_leaves_no_half_written_file_and_says_what_is_kept(network, tmp_path, capsys, monkeypatch, where):
    def interrupted(*arguments, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr(f"sib_fast.lab.shortcut.run.{where}", interrupted)
    out = tmp_path / "out"
    options = ["--out", str(out), "--explained", "0", "--no-progress"]
    assert cli.main(["diagnose", "--checkpoint", str(network), *options]) == 130
    assert "interrupted. Nothing has been written; the same command starts again." in capsys.readouterr().err
    assert not out.exists() or list(out.iterdir()) == []


def test_an_interrupt_between_the_two_files_says_which_is_there(network, tmp_path, capsys, monkeypatch):
    write, written = run.write_atomically, []

    def once(path, content):
        if written:
            raise KeyboardInterrupt
        write(path, content)
        written.append(path)

    monkeypatch.setattr(run, "write_atomically", once)
    options = ["--out", str(tmp_path), "--explained", "0", "--no-progress"]
    assert cli.main(["diagnose", "--checkpoint", str(network), *options]) == 130
    assert f"{written[0]} is whole, diagnosis.json is not there or an earlier one" in capsys.readouterr().err
    assert written[0].read_text().rstrip().endswith("</html>")


def test_progress_rises_to_one_and_names_what_is_done():
    told = []
    diagnose(READS_OBJECT, made(8), methods=("saliency",), explained=4, tell=lambda stage, share: told.append((stage, share)))
    shares = [share for _, share in told]
    assert shares == sorted(shares)
    assert shares[-1] == pytest.approx(1)
    assert [*dict.fromkeys(stage for stage, _ in told)] == ["reading images", *VERSIONS, "explaining by saliency"]


# ---- trained networks ---------------------------------------------------------------------------------------------------


@pytest.mark.long
@pytest.mark.parametrize(("correlation", "kinds"), [(0.95, {LEANS}), (0.0, {NO_SIGN, UNDECIDED})])
def test_a_network_trained_where_backgrounds_tell_the_class_leans_on_them(tmp_path, correlation, kinds):
    """Both are tested on images whose backgrounds do tell it; without that there is no gap to see."""
    pytest.importorskip("lightning")
    from sib_fast.lab.datasets import open_dataset
    from sib_fast.lab.train import RECIPES, TrainConfig
    from sib_fast.lab.train import run as train

    settings = {
        "method": "plain",
        "correlation": correlation,
        "epochs": 30,
        "out": tmp_path / "run",
        "progress": False,
        "test_size": 100,
    }
    recipe = {
        name: value for name, value in RECIPES["digits"].items() if name in {f.name for f in dataclasses.fields(TrainConfig)}
    }
    train(TrainConfig.from_flat(recipe | settings))
    data = open_dataset("digits", None, "test", image_size=32, correlation=0.95)
    found = diagnose(tmp_path / "run" / "network.pt", data, methods=("saliency",))
    assert found.verdict.kind in kinds, found.verdict
    gap = found.measures["gap"]
    if LEANS in kinds:
        assert gap.low > 0.4
        assert found.measures["background_known"].low > 0.4
    else:
        assert gap.high < 0.1
        assert found.measures["background_known"].low <= 0
        assert found.energy["saliency"].above_constant.low > 0
