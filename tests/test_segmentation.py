"""A class for every pixel: masks in, mIoU judged by image, the whole way to a device that writes masks."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image

from bitferry.device import kept, pixels
from bitferry.device.arrays import Outputs
from bitferry.device.errors import InputError, StageFailed
from bitferry.device.kept import Kept
from bitferry.device.preprocess import Preprocessing
from bitferry.pipeline import dataset, load, recheck
from bitferry.pipeline.cache import Cache
from bitferry.pipeline.data.split import Split
from bitferry.pipeline.measure import segmentation
from bitferry.pipeline.recipe import Recipe
from bitferry.pipeline.report import record
from bitferry.pipeline.statistics import paired_bootstrap
from tests.board import Board
from tests.conftest import Project, subset

CLASSES = ("background", "T-shirt", "Trouser", "Pullover")
Masks = NDArray[np.uint8]

FACTORY = '''
"""A user's own segmentation model: down, up, and torchvision's way to answer."""
import torch
from torch import nn
from torch.nn import functional as F

class Small(nn.Module):
    def __init__(self, classes):
        super().__init__()
        self.down = nn.Sequential(nn.Conv2d(3, 16, 3, 2, 1), nn.BatchNorm2d(16), nn.ReLU(),
                                  nn.Conv2d(16, 32, 3, 2, 1), nn.BatchNorm2d(32), nn.ReLU())
        self.head = nn.Conv2d(48, classes, 3, 1, 1)
        self.first = nn.Conv2d(3, 16, 3, 1, 1)
    def forward(self, x):
        coarse = F.interpolate(self.down(x), size=x.shape[-2:], mode="bilinear", align_corners=False)
        return {"out": self.head(torch.cat([coarse, torch.relu(self.first(x))], 1)), "aux": coarse}

def make(classes=4):
    return Small(classes)
'''
RECIPE = """
name = "masks"
version = "1.0.0"
precision = "int8"
task = "segmentation"
classes = ["background", "T-shirt", "Trouser", "Pullover"]
[model]
source = "module:maskmodel:make"
[preprocessing]
height = 16
width = 16
[data]
train = "train.npz"
calibration = "calibration.tsv"
evaluation = "evaluation.npz"
[training]
epochs = 6
batch_size = 32
learning_rate = 1e-2
horizontal_flip = true
[budget]
accuracy_drop_pp = 5.0
"""


def masked(split: str, count: int) -> dict[str, NDArray[Any]]:
    """Label each garment's pixels by its class, the rest as background, and its faint edge as no part of either."""
    arrays = subset(split, count)
    images, labels = arrays["images"], arrays["labels"]
    masks = np.where(images > 60, labels[:, None, None] + 1, 0).astype(np.uint8)
    masks[(images > 20) & (images <= 60)] = pixels.IGNORED
    return {"images": images, "labels": masks}


def write_project(folder: Path) -> Project:
    folder.mkdir(parents=True)
    (folder / "maskmodel.py").write_text(FACTORY)
    (folder / "small.toml").write_text(RECIPE)
    np.savez(folder / "train.npz", **masked("train", 320))  # type: ignore[arg-type]
    np.savez(folder / "evaluation.npz", **masked("evaluation", 240))  # type: ignore[arg-type]
    lines = []
    for i, (image, mask) in enumerate(zip(*masked("calibration", 48).values(), strict=True)):
        Image.fromarray(image).save(folder / f"{i}.png")
        pixels.write(mask, folder / f"{i}-mask.png")
        lines.append(f"{i}.png\t{i}-mask.png\n")
    (folder / "calibration.tsv").write_text("".join(lines))
    return Project(folder)


@pytest.fixture(scope="module")
def shipped(tmp_path_factory: pytest.TempPathFactory) -> tuple[Project, dict[str, Any]]:
    """Give the project after a deployment to OpenVINO, with its verdict; tests must not change it."""
    project = write_project(tmp_path_factory.mktemp("masks") / "project")
    done = project.bitferry("deploy", "small.toml", "--target", "openvino", "--quick", "--json")
    assert done.returncode == 0, done.stderr
    return project, json.loads(done.stdout)[0]


def test_a_model_of_masks_ships_with_a_verdict_on_its_overlap(shipped: tuple[Project, dict[str, Any]]) -> None:
    accuracy, ladder = shipped[1]["accuracy"], shipped[1]["ladder"]
    judged = accuracy["judged"]
    assert (judged["metric"], judged["method"]) == ("mIoU", "bootstrap")
    assert judged["float_percent"] > 50
    assert judged["drop_lower_pp"] <= judged["drop_pp"] <= judged["drop_upper_pp"] <= 5
    assert [other["metric"] for other in accuracy["others"]] == ["pixel accuracy"]
    assert [one["name"] for one in accuracy["classes"]] == list(CLASSES)
    assert 0 < accuracy["flips"]["pixels_percent"] < 10
    assert not [rung for rung in ladder["rungs"] if rung["missing"]]
    assert ladder["suspects"] == []
    assert 0 < ladder["pixels"] <= ladder["images"] * 256
    assert shipped[1]["execution"]["summary"].startswith("int8 requested; 4 of 4 convolutions int8")


def test_what_is_left_behind_is_small_and_its_figures_come_back(shipped: tuple[Project, dict[str, Any]]) -> None:
    project, verdict = shipped
    folder = project.folder / "build/masks/reports/openvino-int8"
    found = record.read_answers(folder / record.ANSWERS)
    assert found.answers is not None
    assert found.labels.shape == found.float_answers.shape == found.answers.shape == (240, 4, 2)
    before, after = (segmentation.unpacked(found.labels, one) for one in (found.float_answers, found.answers))
    change = segmentation.change("mIoU", before, after, 0.95)
    assert change.drop_upper_pp == verdict["accuracy"]["judged"]["drop_upper_pp"]
    page = (folder / record.REPORT).read_text()
    assert "intersection over union" in page
    assert "Confusions" not in page
    assert page.count("data:image/png") == len(verdict["accuracy"]["worst"]) == 12


def test_another_machine_s_maps_make_the_verdict(shipped: tuple[Project, dict[str, Any]], board: Board) -> None:
    bundle, data = shipped[0].folder / "dist/masks-openvino-1.0.0", shipped[0].folder / "evaluation.npz"
    there, here = board.verify(bundle, data), recheck.verify(bundle, data, effort="quick")
    assert (there.outcome, there.images) == ("pass", 240)
    assert there.accuracy == here.accuracy
    assert there.golden == here.golden


def test_the_bundle_writes_masks_as_large_as_the_images(shipped: tuple[Project, dict[str, Any]]) -> None:
    project = shipped[0]
    bundle = project.folder / "dist/masks-openvino-1.0.0"
    expected = json.loads((bundle / "golden/expected.json").read_text())["files"]["golden-1.jpg"]["scores"]
    assert np.array(expected).shape == (4, 256)
    run = [sys.executable, str(bundle / "run.pyz")]
    subprocess.run([*run, "selftest"], capture_output=True, check=True)
    given = project.folder / "given"
    given.mkdir()
    np.savez(given / "images.npz", images=np.zeros((3, 16, 16, 3), np.uint8))
    measured = [*run, "measure", "--json", "--seconds", "0.1", "--images", str(given / "images.npz")]
    subprocess.run(measured, capture_output=True, check=True)
    answered = kept.read(given)
    assert answered.scores.shape == (3, 4, 256)
    assert answered.maps is not None
    assert answered.maps.shape == (3, 16, 16)
    out = project.folder / "found"
    asked = [*run, "predict", "0.png", "1.png", "--out", str(out), "--json", "--top", "4"]
    done = subprocess.run(asked, capture_output=True, text=True, check=True, cwd=project.folder)
    for i, answer in enumerate(map(json.loads, done.stdout.splitlines())):
        assert sum(answer["shares"]) == pytest.approx(1, abs=1e-4)
        with Image.open(out / f"{i}.png") as mask, Image.open(project.folder / f"{i}-mask.png") as truth:
            assert (mask.mode, mask.size) == ("P", (28, 28))
            counted = np.asarray(truth) != pixels.IGNORED
            assert (np.asarray(mask) == np.asarray(truth))[counted].mean() > 0.7
    again = subprocess.run([*run, "predict", "0.png", "--out", "."], capture_output=True, text=True, check=False, cwd=project.folder)  # fmt: skip
    assert again.returncode == 2
    assert "0.png would be written over" in again.stderr


def test_a_bundle_is_verified_alone_and_compared_by_overlap(shipped: tuple[Project, dict[str, Any]]) -> None:
    project, verdict = shipped
    bundle = "dist/masks-openvino-1.0.0"
    done = project.bitferry("verify", bundle, "--data", "evaluation.npz", "--quick", "--json")
    assert done.returncode == 0, done.stderr
    found, judged = json.loads(done.stdout)["accuracy"], verdict["accuracy"]["judged"]
    assert found["metric"] == "mIoU"
    assert found["float_percent"] == judged["float_percent"]
    assert found["percent"] == pytest.approx(judged["percent"], abs=0.5)
    done = project.bitferry("compare", bundle, "build/masks/reports/openvino-int8", "--json")
    change = json.loads(done.stdout)["accuracy"]
    assert (change["metric"], change["drop_pp"]) == ("mIoU", 0)


def a_recipe(classes: int = 3, **more: object) -> Recipe:
    fields: dict[str, object] = {
        "name": "r",
        "classes": [f"class {i}" for i in range(classes)],
        "task": "segmentation",
        "model": {"source": "torchvision:fcn_resnet50"},
        "preprocessing": {"height": 8, "width": 8},
        "data": {"calibration": "c", "evaluation": "e"},
    }
    return Recipe.model_validate(fields | more)


def simulated(images: int = 40, classes: int = 3, noise: float = 0.8) -> tuple[Kept, Kept, Split]:
    """Give maps of a float model that is often right, of an artifact near it, and masks with some pixels left out."""
    rng = np.random.default_rng(0)
    masks = rng.integers(0, classes, (images, 8, 8)).astype(np.uint8)
    masks[:30, masks[0] == 2] = 1  # so that many images lack a class
    baseline = rng.normal(size=(images, classes, 8, 8))
    np.put_along_axis(baseline, masks[:, None], np.take_along_axis(baseline, masks[:, None], 1) + 1.5, 1)
    scores = baseline + noise * rng.normal(size=baseline.shape)
    masks[rng.random(masks.shape) < 0.1] = pixels.IGNORED
    pair = [
        Kept(pixels.thin(one), pixels.maps(one)) for one in (baseline.astype(np.float32), scores.astype(np.float32))
    ]
    pictures = np.zeros((images, 8, 8, 3), np.uint8)
    return *pair, Split("evaluation", pictures, masks, tuple(f"{i}.png" for i in range(images)), (), key="k")  # type: ignore[return-value]


def plain_iou(maps: Masks, masks: Masks, classes: int) -> list[float]:
    """Count pixel by pixel."""
    right, union, labelled = ([0] * classes for _ in range(3))
    for found, truth in zip(maps.ravel().tolist(), masks.ravel().tolist(), strict=True):
        if truth == pixels.IGNORED:
            continue
        labelled[truth] += 1
        right[truth] += found == truth
        for k in {found, truth}:
            union[k] += 1
    return [right[k] / union[k] for k in range(classes) if labelled[k]]


def test_overlap_and_pixels_are_those_of_a_plain_loop() -> None:
    before, after, evaluation = simulated()
    masks = np.asarray(evaluation.labels, np.uint8)
    assert before.maps is not None
    assert after.maps is not None
    found = segmentation.measure(before, after, evaluation, a_recipe())
    was, now = (plain_iou(maps, masks, 3) for maps in (before.maps, after.maps))
    assert found.judged.float_percent == pytest.approx(100 * np.mean(was))
    assert found.judged.percent == pytest.approx(100 * np.mean(now))
    assert [one.percent for one in found.classes] == pytest.approx([100 * value for value in now])
    counted = masks != pixels.IGNORED
    assert found.others[0].percent == pytest.approx(100 * (after.maps == masks)[counted].mean())
    assert found.flips.pixels_percent == pytest.approx(100 * (before.maps != after.maps)[counted].mean())
    gains = [int(((a == m) & c).sum() - ((b == m) & c).sum()) for b, a, m, c in zip(before.maps, after.maps, masks, counted, strict=True)]  # fmt: skip
    assert (found.flips.lost, found.flips.gained) == (sum(g < 0 for g in gains), sum(g > 0 for g in gains))
    shares = [(b != a)[c].mean() for b, a, c in zip(before.maps, after.maps, counted, strict=True)]
    assert found.worst[0].index == int(np.argmax(shares))
    assert found.worst[0].change_pp == pytest.approx(100 * max(shares))


def test_the_bounds_are_of_resampled_images_counted_anew() -> None:
    before, after, evaluation = simulated()
    masks = np.asarray(evaluation.labels, np.uint8)
    found = segmentation.measure(before, after, evaluation, a_recipe()).judged

    def plain(drawn: NDArray[np.int64]) -> tuple[float, float]:
        means = [float(np.mean(plain_iou(k.maps[drawn], masks[drawn], 3))) for k in (before, after)]  # type: ignore[index]
        return means[0], means[1]

    counts = [segmentation.counts(k.maps, masks, 3) for k in (before, after)]  # type: ignore[arg-type]
    fast = segmentation.paired("mIoU", *counts)
    rng = np.random.default_rng(5)
    for _ in range(5):
        drawn = rng.integers(40, size=40)
        assert fast(drawn) == pytest.approx(plain(drawn))
    lower, upper = paired_bootstrap(fast, 40, 0.95)
    assert found.drop_lower_pp <= 100 * lower <= found.drop_pp <= 100 * upper <= found.drop_upper_pp


def test_a_class_that_is_nowhere_in_the_masks_changes_no_mean() -> None:
    masks = np.zeros((1, 2, 2), np.uint8)
    masks[0, 0] = 1
    right = segmentation.counts(masks, masks, 3)
    assert segmentation.value("mIoU", right, np.ones(1)) == 1
    strayed = masks.copy()
    strayed[0, 0, 0] = 2  # costs class 1 a pixel; class 2 itself is no class of these images
    found = segmentation.counts(strayed, masks, 3)
    assert segmentation.value("mIoU", found, np.ones(1)) == pytest.approx((1 + 0.5) / 2)


def test_maps_that_are_the_same_for_every_image_are_refused() -> None:
    before, after, evaluation = simulated()
    flat = Kept(np.repeat(before.scores[:1], 40, axis=0), before.maps)
    with pytest.raises(StageFailed, match="the same for every image"):
        segmentation.measure(flat, after, evaluation, a_recipe())
    with pytest.raises(StageFailed, match="scores N×K where a class for every pixel"):
        segmentation.measure(Kept(before.scores), Kept(after.scores), evaluation, a_recipe())


def test_answers_come_in_batches_bounded_by_their_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []

    def predict(images: NDArray[np.uint8]) -> Outputs:
        sizes.append(len(images))
        return np.random.default_rng(0).random((len(images), 4, 32, 32), np.float32)

    monkeypatch.setattr(kept, "BATCH_BYTES", 3 * 4 * 32 * 32 * 4)
    found = kept.answer(predict, np.zeros((8, 32, 32, 3), np.uint8))
    assert sizes == [1, 3, 3, 2]
    assert found.scores.shape == (8, 4, 1024)
    assert found.maps is not None
    assert found.maps.shape == (8, 32, 32)
    wide = pixels.thin(np.zeros((2, 21, 100, 100), np.float32))
    assert wide.shape == (2, 21, 8192 // 21)


CONTRACT = Preprocessing(height=8, width=8, resize=12)


def listed(folder: Path, mask: Image.Image, ending: str = ".png", size: tuple[int, int] = (20, 16)) -> Path:
    """Write one image with one mask, and the list of them."""
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (*size[::-1], 3), np.uint8)).save(folder / "a.png")
    mask.save(folder / f"mask{ending}")
    (folder / "list.tsv").write_text(f"image\tmask\na.png\tmask{ending}\n")
    return folder / "list.tsv"


def read(path: Path, folder: Path, classes: tuple[str, ...] = ("a", "b", "c")) -> Split:
    return dataset.split("evaluation", path, classes, CONTRACT, Cache(folder / "build"), task="segmentation")


@pytest.mark.parametrize("mode", ["L", "P", "I;16"])
def test_a_mask_goes_the_way_of_its_image(tmp_path: Path, mode: str) -> None:
    values = np.zeros((16, 20), np.uint8)
    values[4:12, 6:14] = 2
    values[0] = pixels.IGNORED
    mask = (
        pixels.picture(values)
        if mode == "P"
        else Image.fromarray(values.astype(np.uint16 if mode == "I;16" else np.uint8))
    )
    found = read(listed(tmp_path, mask), tmp_path)
    expected = Image.fromarray(values).resize((15, 12), Image.Resampling.NEAREST).crop((4, 2, 12, 10))
    np.testing.assert_array_equal(found.labels[0], np.asarray(expected))
    assert found.labels.dtype == np.uint8


@pytest.mark.parametrize(
    ("mask", "ending", "message"),
    [
        (Image.new("RGB", (20, 16)), ".png", "pixels of mode RGB; expected an indexed or grey PNG"),
        (Image.new("L", (20, 16), 7), ".png", r"values that are no class \(7\); there are 3 classes"),
        (Image.new("L", (20, 16)), ".jpg", "is a JPEG file, which does not keep the values"),
        (Image.new("L", (16, 20)), ".png", "mask.png is 16×20 pixels, its image 20×16"),
        (Image.new("L", (20, 16), 255), ".png", "every pixel that counts is left, the others being 255"),
    ],
)  # fmt: skip
def test_a_mask_that_cannot_be_meant_is_refused(tmp_path: Path, mask: Image.Image, ending: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        read(listed(tmp_path, mask, ending), tmp_path)


def test_masks_of_black_and_white_are_not_taken_for_classes(tmp_path: Path) -> None:
    masks = np.zeros((3, 16, 20), np.uint8)
    masks[:, 4:12, 6:14] = 255
    images = np.random.default_rng(0).integers(0, 256, (3, 16, 20), np.uint8)
    np.savez(tmp_path / "a.npz", images=images, labels=masks)
    with pytest.raises(InputError, match="every pixel that counts is of class 'a', the others being 255"):
        read(tmp_path / "a.npz", tmp_path)
    np.savez(tmp_path / "a.npz", images=images, labels=np.zeros((3, 16, 16), np.uint8))
    with pytest.raises(InputError, match=r"expected `labels` of shape \(3, 16, 20\), .* found uint8 \(3, 16, 16\)"):
        read(tmp_path / "a.npz", tmp_path)
    (tmp_path / "pictures/a").mkdir(parents=True)
    with pytest.raises(InputError, match="for task 'segmentation' give a list of `file<TAB>mask.png` lines"):
        read(tmp_path / "pictures", tmp_path)


@pytest.mark.parametrize("resize", [None, 12])
def test_a_map_is_put_back_over_its_image(resize: int | None) -> None:
    contract = Preprocessing(height=8, width=8, resize=resize)
    values = np.kron(np.arange(4, dtype=np.uint8).reshape(2, 2), np.ones((20, 30), np.uint8))
    seen = np.asarray(contract.place(Image.fromarray(values), Image.Resampling.NEAREST))
    back = contract.undo(seen, (60, 40), outside=9)
    assert back.shape == values.shape
    counted = back != 9
    assert (back == values)[counted].mean() > 0.95
    assert counted.mean() == (1.0 if resize is None else pytest.approx(8 * 8 / (12 * 18), abs=0.03))


def test_a_recipe_of_the_task_is_checked() -> None:
    with pytest.raises(ValueError, match="300 classes, at most 255 for task 'segmentation'"):
        a_recipe(300)
    with pytest.raises(ValueError, match=r"'top-1' is no metric for task 'segmentation' \(mIoU, pixel accuracy\)"):
        a_recipe(budget={"metric": "top-1"})
    with pytest.raises(ValueError, match="needs the scores of every pixel, which are not kept"):
        a_recipe(budget={"metric": "torchmetrics:MulticlassF1Score"})


def test_a_model_s_answers_must_be_maps_of_the_input_s_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", list(sys.path))
    coarse = "import torch\nclass N(torch.nn.Module):\n  def forward(self, x): return x[:, :, ::4, ::4]\ndef make(): return N()"
    (tmp_path / "coarse.py").write_text(coarse)
    with pytest.raises(InputError, match=r"gives \(2, 3, 2, 2\) .* resize the scores to the input's size inside"):
        load.load(a_recipe(model={"source": "module:coarse:make"}), None, folder=tmp_path)
    with pytest.raises(InputError, match="no segmentation model called 'resnet18'"):
        load.load(a_recipe(model={"source": "torchvision:resnet18"}), None)
    made = load.load(a_recipe(model={"source": "torchvision:lraspp_mobilenet_v3_large"}), None)
    with torch.no_grad():
        assert made.module()(torch.zeros(2, 8, 8, 3, dtype=torch.uint8)).shape == (2, 3, 8, 8)
