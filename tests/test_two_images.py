"""A model with two image branches: two files for each answer, from the recipe to the device."""

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
from torch import Tensor, nn

from bitferry.device.errors import InputError
from bitferry.device.preprocess import Preprocessing
from bitferry.pipeline import dataset
from bitferry.pipeline.augmentation import Augmentation
from bitferry.pipeline.cache import Cache
from bitferry.pipeline.data import leaks
from bitferry.pipeline.data.split import Split
from bitferry.pipeline.load import Deployable
from bitferry.pipeline.loader import _flipped
from bitferry.pipeline.measure.metrics import Task
from tests.conftest import Project, subset

FACTORY = '''
"""A user's own model with a branch for each image; it says whether they show the same kind of garment."""
import torch
from torch import nn

class Pair(nn.Module):
    def __init__(self):
        super().__init__()
        self.left, self.right = self.branch(), self.branch()
        self.head = nn.Sequential(nn.Linear(96, 32), nn.ReLU(), nn.Linear(32, 2))
    @staticmethod
    def branch():
        return nn.Sequential(nn.Conv2d(3, 16, 3, 2, 1), nn.BatchNorm2d(16), nn.ReLU(),
                             nn.Conv2d(16, 32, 3, 2, 1), nn.BatchNorm2d(32), nn.ReLU())
    def forward(self, first, second):
        a, b = self.left(first).mean((2, 3)), self.right(second).mean((2, 3))
        return self.head(torch.cat([a, b, a * b], 1))

def make():
    return Pair()
'''
RECIPE = """
name = "pairs"
version = "1.0.0"
precision = "int8"
classes = ["different", "same"]
[model]
source = "module:pairmodel:make"
[preprocessing]
height = 16
width = 16
views = 2
[data]
train = "train.npz"
calibration = "calibration.tsv"
evaluation = "evaluation.npz"
[training]
epochs = 5
batch_size = 64
learning_rate = 1e-2
validation = 0
[budget]
accuracy_drop_pp = 5.0
"""


def paired(split: str, count: int) -> dict[str, NDArray[Any]]:
    """Pair T-shirts and trousers at random: 1 where both are of one kind."""
    arrays = subset(split, 2 * count, classes=2)
    order = np.random.default_rng(0).permutation(2 * count).reshape(count, 2)
    labels = arrays["labels"][order]
    return {"images": arrays["images"][order], "labels": (labels[:, 0] == labels[:, 1]).astype(np.int64)}


def write_project(folder: Path) -> Project:
    folder.mkdir(parents=True)
    (folder / "pairmodel.py").write_text(FACTORY)
    (folder / "small.toml").write_text(RECIPE)
    np.savez(folder / "train.npz", **paired("train", 600))  # type: ignore[arg-type]
    np.savez(folder / "evaluation.npz", **paired("evaluation", 240))  # type: ignore[arg-type]
    lines = []
    for i, (views, label) in enumerate(zip(*paired("calibration", 32).values(), strict=True)):
        for side, view in zip("ab", views, strict=True):
            Image.fromarray(view).save(folder / f"{i}|{side}.png")
        lines.append(f"{i}|a.png\t{i}|b.png\t{label}\n")
    (folder / "calibration.tsv").write_text("".join(lines))
    return Project(folder)


@pytest.fixture(scope="module")
def shipped(tmp_path_factory: pytest.TempPathFactory) -> tuple[Project, dict[str, Any]]:
    """Give the project after a deployment to ONNX Runtime, with its verdict; tests must not change it."""
    project = write_project(tmp_path_factory.mktemp("pairs") / "project")
    done = project.bitferry("deploy", "small.toml", "--target", "onnxruntime", "--quick", "--json")
    assert done.returncode == 0, done.stderr
    return project, json.loads(done.stdout)[0]


def test_a_model_of_two_images_ships_with_a_verdict(shipped: tuple[Project, dict[str, Any]]) -> None:
    project, verdict = shipped
    assert verdict["accuracy"]["judged"]["float_percent"] > 85
    assert verdict["execution"]["summary"].startswith("int8 requested; 4 of 4 convolutions int8")
    assert {layer["name"].partition(".")[0] for layer in verdict["ladder"]["layers"]} == {"left", "right", "head"}
    assert not [rung for rung in verdict["ladder"]["rungs"] if rung["missing"]]
    assert verdict["ladder"]["suspects"] == []
    page = (project.folder / "build/pairs/reports/onnxruntime-int8/report.html").read_text()
    assert 'width="160" height="80"' in page  # of the worst images, both views side by side


def test_the_bundle_answers_for_as_many_files_as_there_are_views(shipped: tuple[Project, dict[str, Any]]) -> None:
    project = shipped[0]
    bundle = project.folder / "dist/pairs-onnxruntime-1.0.0"
    expected = json.loads((bundle / "golden/expected.json").read_text())["files"]
    assert expected["golden-1.jpg"]["views"] == ["golden-1.jpg", "golden-1-view-2.jpg"]
    run = [sys.executable, str(bundle / "run.pyz")]
    subprocess.run([*run, "selftest"], capture_output=True, check=True)
    files = [f"{i}|{side}.png" for i in range(12) for side in "ab"]
    labels = [int(line.split("\t")[2]) for line in (project.folder / "calibration.tsv").read_text().splitlines()[:12]]
    done = subprocess.run(
        [*run, "predict", *files, "--json", "--top", "1"],
        capture_output=True,
        text=True,
        check=True,
        cwd=project.folder,
    )
    answers = [json.loads(line) for line in done.stdout.splitlines()]
    assert [answer["images"] for answer in answers] == [files[i : i + 2] for i in range(0, 24, 2)]
    right = [answer["classes"] == [("different", "same")[label]] for answer, label in zip(answers, labels, strict=True)]
    assert sum(right) >= 9
    message = project.refused("predict", str(bundle), *files[:3])
    assert "looks at 2 images at a time; 3 do not divide into those" in message


def test_a_bundle_of_pairs_is_verified_alone(shipped: tuple[Project, dict[str, Any]]) -> None:
    project, verdict = shipped
    done = project.bitferry(
        "verify", "dist/pairs-onnxruntime-1.0.0", "--data", "evaluation.npz", "--quick", "--json"
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["accuracy"]["percent"] == verdict["accuracy"]["judged"]["percent"]
    assert max(found["golden"].values()) <= found["score_limit"]


class Difference(nn.Module):
    """Tell its arguments apart."""

    def forward(self, first: Tensor, second: Tensor) -> Tensor:
        return (first - 2 * second).mean((2, 3))


def test_each_view_is_an_argument_by_the_same_contract() -> None:
    contract = Preprocessing(height=4, width=5, views=2, mean=(0.1, 0.2, 0.3), std=(0.5, 0.6, 0.7))
    images = torch.randint(0, 256, (3, *contract.shape), dtype=torch.uint8)
    assert images.shape == (3, 2, 4, 5, 3)
    plain = (images.float() / 255 - torch.tensor(contract.mean)) / torch.tensor(contract.std)
    expected = (plain[:, 0] - 2 * plain[:, 1]).mean((1, 2))
    torch.testing.assert_close(Deployable(Difference(), contract)(images), expected, atol=1e-4, rtol=1e-4)


def test_all_views_of_an_answer_are_mirrored_together() -> None:
    images = (
        np.random.default_rng(1)
        .permutation(np.arange(40 * 2 * 3 * 4 * 3) % 251)
        .astype(np.uint8)
        .reshape(40, 2, 3, 4, 3)
    )
    masks = images[:, 0, :, :, 0].copy()
    how, random = Augmentation(horizontal_flip=True), np.random.default_rng(0)
    found, mirrored = _flipped(images.copy(), masks, how, random, masked=True)
    for before, after, mask in zip(torch.from_numpy(images), found, mirrored, strict=True):
        assert torch.equal(after, before) or torch.equal(after, before.flip(2))
        assert torch.equal(mask, after[0, :, :, 0])
    assert 10 < int((found != torch.from_numpy(images)).flatten(1).any(1).sum()) < 30


CONTRACT = Preprocessing(height=8, width=8, views=2)


def read(source: Path, folder: Path, *, name: str = "evaluation", task: Task = "classification") -> Split:
    return dataset.split(name, source, ("cat", "dog"), CONTRACT, Cache(folder / "build"), task=task)


def pictures(folder: Path, count: int) -> list[Path]:
    rng = np.random.default_rng(0)
    for i in range(count):
        Image.fromarray(rng.integers(0, 256, (8, 8, 3), np.uint8)).save(folder / f"{i}.png")
    return [folder / f"{i}.png" for i in range(count)]


def test_a_list_names_a_file_for_each_view(tmp_path: Path) -> None:
    files = pictures(tmp_path, 4)
    (tmp_path / "list.tsv").write_text("file\tfile\tlabel\n0.png\t1.png\tcat\n2.png\t3.png\tdog\n")
    found = read(tmp_path / "list.tsv", tmp_path)
    assert found.images.shape == (2, 2, 8, 8, 3)
    assert found.labels.tolist() == [0, 1]
    assert found.sources[1] == f"{files[2]} + {files[3]}"
    np.testing.assert_array_equal(found.images[1, 0], np.asarray(Image.open(files[2])))
    (tmp_path / "list.tsv").write_text("0.png\t1.png\tcat|dog\n2.png\t3.png\t\n")
    assert read(tmp_path / "list.tsv", tmp_path, task="multilabel").labels.tolist() == [[1, 1], [0, 0]]
    (tmp_path / "list.tsv").write_text("0.png\tcat\n")
    with pytest.raises(InputError, match="list.tsv:1: expected `file<TAB>file<TAB>label`, found"):
        read(tmp_path / "list.tsv", tmp_path)


def test_arrays_have_a_dimension_of_views(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    for shape in ((3, 2, 9, 9), (3, 2, 9, 9, 3)):
        images = rng.integers(0, 256, shape, np.uint8)
        np.savez(tmp_path / "a.npz", images=images, labels=np.array([0, 1, 1]))
        found = read(tmp_path / "a.npz", tmp_path)
        np.testing.assert_array_equal(found.images[2, 1], CONTRACT.fit(images[2, 1]))
    np.savez(tmp_path / "a.npz", images=np.zeros((3, 9, 9, 3), np.uint8), labels=np.array([0, 1, 1]))
    with pytest.raises(InputError, match=r"expected `images` N×2×H×W or N×2×H×W×3 uint8, found uint8 \(3, 9, 9, 3\)"):
        read(tmp_path / "a.npz", tmp_path)
    (tmp_path / "folder/cat").mkdir(parents=True)
    with pytest.raises(InputError, match="a folder, which does not say which 2 images belong together"):
        read(tmp_path / "folder", tmp_path)


def test_a_view_may_come_again_but_not_a_whole_pair(tmp_path: Path) -> None:
    pictures(tmp_path, 4)
    (tmp_path / "a.tsv").write_text("0.png\t1.png\tcat\n0.png\t2.png\tdog\n")
    (tmp_path / "b.tsv").write_text("0.png\t3.png\tcat\n1.png\t0.png\tdog\n")
    calibration, evaluation = (read(tmp_path / f"{one}.tsv", tmp_path, name=one) for one in "ab")
    leaks.refuse(calibration, evaluation)
    (tmp_path / "b.tsv").write_text("0.png\t1.png\tcat\n")
    with pytest.raises(InputError, match=r"1 b images are also in the a data, .*0\.png \+ .*1\.png"):
        leaks.refuse(calibration, read(tmp_path / "b.tsv", tmp_path, name="b"))


@pytest.mark.parametrize("views", [0, 17])
def test_a_number_of_views_that_cannot_be_meant_is_refused(views: int) -> None:
    with pytest.raises(ValueError, match=f"views = {views} must be 1 to 16"):
        Preprocessing(height=8, width=8, views=views)
