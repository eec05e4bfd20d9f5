"""What `init` takes from lists and models: their columns, their counting, single images, classes, sizes, contracts."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from bitferry.device.errors import InputError
from bitferry.device.preprocess import Preprocessing
from bitferry.pipeline import init, recipe
from bitferry.pipeline.init import contracts, pictures, trial
from tests.conftest import subset

CLASSES = 7
NET = """
import torch
from torch import nn


class Net(nn.Module):
    def __init__(self, kind="", channels=3):
        super().__init__()
        self.kind = kind
        self.stem, self.head = nn.Conv2d(channels, 8, 3, 2), nn.Linear(8, 7)

    def forward(self, x):
        y = self.head(self.stem(x).relu().mean((2, 3)))
        return {"two": (y, y), "text": y[:, None].repeat(1, 5, 1), "boxes": y[:, :, None].repeat(1, 1, 9),
                "named": {"scores": y}}.get(self.kind, y)


def plain():
    return Net()


def two():
    return Net("two")


def text():
    return Net("text")


def boxes():
    return Net("boxes")


def named():
    return Net("named")


def grey():
    return Net(channels=1)
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "listednets.py").write_text(NET)
    for number, image in enumerate(subset("evaluation", 21)["images"]):
        Image.fromarray(image).save(tmp_path / f"{number}.png")
    torch.manual_seed(0)
    state = {"stem.weight": torch.randn(8, 3, 3, 3), "stem.bias": torch.zeros(8)}
    state |= {"head.weight": torch.randn(CLASSES, 8), "head.bias": torch.zeros(CLASSES)}
    torch.save(state, tmp_path / "plain.pth")
    torch.save(state | {"stem.weight": torch.randn(8, 1, 3, 3)}, tmp_path / "grey.pth")
    return tmp_path


def listed(folder: Path, separator: str, heading: str = "", first: int = 0, classes: int = CLASSES) -> Path:
    rows = [f"{number}.png{separator}{number % classes + first}" for number in range(21)]
    (folder / "list.txt").write_text("\n".join([*([heading] if heading else []), *rows]))
    return folder / "list.txt"


def written(folder: Path, images: Path, name: str = "plain", weights: str = "plain", size: str = "32") -> recipe.Recipe:
    asked = init.Asked(
        folder / f"{weights}.pth", images, folder / "r.toml", f"module:listednets:{name}", init.sides(size)
    )
    init.init(asked)
    return recipe.read(folder / "r.toml")


@pytest.mark.parametrize(("separator", "heading"), [("\t", ""), (",", "filename,label"), (";", ""), (" ", "")])
def test_every_usual_list_is_read_and_classes_are_the_model_s(folder: Path, separator: str, heading: str) -> None:
    made = written(folder, listed(folder, separator, heading, classes=3))
    assert len(made.classes) == CLASSES
    assert len((folder / "r-calibration.tsv").read_text().splitlines()) > 1


def test_labels_counted_from_1_are_recognized(folder: Path) -> None:
    written(folder, listed(folder, "\t", first=1))
    lines = (folder / "r-evaluation.tsv").read_text().splitlines()[1:]
    assert {line.split("\t")[1] for line in lines} == {str(label) for label in range(CLASSES)}


def test_one_image_of_each_class_leaves_some_for_calibration(folder: Path) -> None:
    found = pictures.find(listed(folder, "\t", classes=21)).lines
    assert len(found["calibration"]) == 5
    assert len(found["evaluation"]) == 16


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("two", "gives a tuple of 2: 2×7, 2×7; expected one tensor of scores, N×K"),
        ("named", "gives a dict of 1: scores 2×7; expected one tensor"),
        ("text", "gives 2×5×7 for 2 images; expected one tensor"),
        ("boxes", r"gives 2×7×9 for 2 images; .* no boxes \(N×C×A\)"),
        ("grey", "takes images of 1 channel, and bitferry gives every model 3"),
    ],
)
def test_what_gives_no_scores_is_refused_and_nothing_written(folder: Path, name: str, told: str) -> None:
    with pytest.raises(InputError, match=told):
        written(folder, listed(folder, "\t"), name, "grey" if name == "grey" else "plain")
    assert not list(folder.glob("r*.t*"))


def test_a_size_may_have_two_sides(folder: Path) -> None:
    made = written(folder, listed(folder, "\t"), size="48x32")
    assert (made.preprocessing.height, made.preprocessing.width) == (48, 32)
    assert init.sides("224") == (224, 224)
    assert init.sides("64,48") == init.sides("64×48") == (64, 48)
    for text in ("0", "x", "1x2x3", "-3", "abc"):
        with pytest.raises(InputError, match="expected one number, or HEIGHTxWIDTH"):
            init.sides(text)


def tried(name: str, right: list[int]) -> trial.Tried:
    return trial.Tried(name, Preprocessing(height=8, width=8), "m", np.array(right, float))


def test_the_usual_one_stays_unless_another_surely_wins() -> None:
    usual, other = tried("usual", [1] * 6 + [0] * 7), tried("other", [1] * 7 + [0] * 6)
    assert trial.likeliest([usual, other]) is usual
    winner = tried("winner", [1] * 13)
    assert trial.likeliest([tried("usual", [0] * 13), winner, tried("as good", [1] * 13)]) is winner


def test_the_standard_crop_and_known_means_are_tried(folder: Path) -> None:
    for number in range(4):
        Image.fromarray(np.full((90, 120, 3), 40 * number, np.uint8)).save(folder / f"c{number}.png")
    (folder / "c.txt").write_text("\n".join(f"c{number}.png\t{number % 2}" for number in range(4)))
    found = pictures.find(folder / "c.txt")
    ways = contracts.candidates(found, None, (224, 224))
    assert (ways[0][1].height, ways[0][1].resize, ways[0][1].interpolation) == (224, 256, "bilinear")
    others = [way for _, way in contracts.variants(ways[0][1], found)]
    assert (256, "bicubic") in [(way.resize, way.interpolation) for way in others]
    assert (None, "bilinear") in [(way.resize, way.interpolation) for way in others]
    small = np.random.default_rng(0).integers(0, 256, (8, 32, 32, 3), np.uint8)
    np.savez(folder / "s.npz", images=small, labels=np.arange(8) % 2)
    assert any("CIFAR-10" in name for name, _ in contracts.candidates(pictures.find(folder / "s.npz"), None, None))
