"""Recipes: what is read, and what is refused with which words."""

from pathlib import Path

import pytest

from device.errors import InputError
from pipeline import recipe
from tests.conftest import ROOT, Project


@pytest.mark.parametrize("path", sorted((ROOT / "recipes").glob("*.toml")), ids=lambda path: path.stem)
def test_the_recipes_in_the_repository_are_valid(path: Path) -> None:
    read = recipe.read(path)
    assert read.name == path.stem
    assert read.data.calibration.parts[: len(ROOT.parts)] == ROOT.parts


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("accuracy_drop_pp", "acuracy_drop_pp", r"unknown key 'budget.acuracy_drop_pp', did you mean 'accuracy_drop_pp'\?"),
        ("height = 16", "hight = 16\nheight = 16", r"unknown key 'preprocessing.hight', did you mean 'height'\?"),
        ("[training]", "[trainig]", r"unknown key 'trainig', did you mean 'training'\?"),
        ("[targets.openvino]", "[targets.openvinno]", r"unknown target 'openvinno'; did you mean 'openvino'\?"),
        ("[targets.openvino]", "[targets.openvino]\nthread = 2", r"unknown key 'targets.openvino.thread', did you mean 'threads'\?"),
        ("epochs = 6", 'epochs = "six"', r"training.epochs: .* \(found 'six'\)"),
        ("accuracy_drop_pp = 5.0", "confidence = 1.5", r"budget.confidence: .*less than 1.* \(found 1.5\)"),
        ('name = "small"', 'name = "../small"', r"name: .*\(found '../small'\)"),
        ('name = "small"', "", "the key 'name' is missing"),
        ("height = 16", "height = 0", "must be 1 to 8192"),
        ("std = [0.35, 0.35, 0.35]", "std = [0.35, 0.0, 0.35]", "must be above zero"),
        ('source = "module:smallmodel:make"', 'source = "smallmodel"', "model.source: "),
        ('"Pullover"]', "", "cannot be read: "),
        ('classes = ["T-shirt", "Trouser", "Pullover"]', 'classes = "names.txt"', "names.txt does not exist"),
        ('classes = ["T-shirt", "Trouser", "Pullover"]', "classes = 1", "classes: a count of classes must be 2 to"),
    ],
)  # fmt: skip
def test_a_fault_is_named(project: Project, old: str, new: str, message: str) -> None:
    project.edit((old, new))
    with pytest.raises(InputError, match=message) as caught:
        recipe.read(project.recipe)
    assert "\n" not in str(caught.value)


def test_several_faults_are_told_at_once(project: Project) -> None:
    project.edit(("epochs = 6", "epochs = 0"), ("height = 16", "heigth = 16"))
    with pytest.raises(InputError) as caught:
        recipe.read(project.recipe)
    assert "training.epochs" in str(caught.value)
    assert "did you mean 'height'" in str(caught.value)


def test_classes_may_be_a_file_or_a_count(project: Project) -> None:
    (project.folder / "names.txt").write_text("a\nb\nc\n")
    project.edit(('classes = ["T-shirt", "Trouser", "Pullover"]', 'classes = "names.txt"'))
    assert recipe.read(project.recipe).classes == ("a", "b", "c")
    project.edit(('"names.txt"', "3"))
    assert recipe.read(project.recipe).classes == ("0", "1", "2")


def test_paths_start_at_the_recipe(project: Project) -> None:
    assert recipe.read(project.recipe).data.calibration == project.folder / "calibration.npz"


def test_a_missing_recipe_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="nowhere.toml does not exist"):
        recipe.read(tmp_path / "nowhere.toml")
