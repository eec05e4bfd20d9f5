"""Recipes: what is read, and what is refused with which words."""

from pathlib import Path

import pytest

from bitferry.device.errors import InputError
from bitferry.pipeline import recipe
from bitferry.pipeline.data import source as sources
from tests.conftest import ROOT, Project


@pytest.mark.parametrize("path", sorted((ROOT / "recipes").glob("*.toml")), ids=lambda path: path.stem)
def test_the_recipes_in_the_repository_are_valid(path: Path) -> None:
    read = recipe.read(path)
    assert read.name == path.stem
    named = [one for source in read.data.splits().values() for one in sources.paths(source)]
    assert named
    assert all(one.is_relative_to(ROOT) for one in named)


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


BUDGET = "accuracy_drop_pp = 5.0"


@pytest.mark.parametrize(
    ("task", "budget", "message"),
    [
        ("classification", 'metric = "top1"', r"'top1' is no metric for task 'classification' \(top-1, top-5, torchmetrics:ClassName\); did you mean 'top-1'\?"),
        ("multilabel", 'metric = "map"', r"'map' is no metric for task 'multilabel' .* did you mean 'mAP'\?"),
        ("multilabel", 'metric = "top-1"', "'top-1' is no metric for task 'multilabel' .* it is for task 'classification'"),
        ("classification", 'metric = "AUC"', "'AUC' is no metric for task 'classification' .* it is for task 'multilabel'"),
        ("classification", 'metric = "nothing"', "name one of these"),
        ("classification", 'metric = "top-5"', "'top-5' needs more than 5 classes; this recipe has 3"),
        ("classification", 'metric_options = {average = "micro"}', "metric_options are for a 'torchmetrics:' metric; take them out for 'top-1'"),
        ("classification", 'metric = "torchmetrics:MulticlassF1"', "no multiclass metric called 'MulticlassF1', did you mean 'torchmetrics:MulticlassF1Score'"),
        ("classification", 'metric = "torchmetrics:MultilabelF1Score"', "no multiclass metric called 'MultilabelF1Score'"),
        ("multilabel", 'metric = "torchmetrics:CohenKappa"', "no multilabel metric called 'CohenKappa'"),
        ("classification", 'metric = "torchmetrics:F1Score"\nmetric_options = {avrage = "macro"}', "cannot be used with {.*'avrage': 'macro'.*}: "),
        ("classification", 'metric = "torchmetrics:Recall"\nmetric_options = {average = "none"}', "gives no single number .* set its `average`"),
        ("classification", 'metric = "torchmetrics:MulticlassROC"', "gives no single number"),
        ("detection", BUDGET, r"task: .*'classification', 'multilabel', 'segmentation' \(found 'detection'\)"),
    ],
)  # fmt: skip
def test_a_metric_that_does_not_fit_is_refused(project: Project, task: str, budget: str, message: str) -> None:
    project.edit(('name = "small"', f'name = "small"\ntask = "{task}"'), (BUDGET, budget))
    with pytest.raises(InputError, match=message) as caught:
        recipe.read(project.recipe)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("task", "budget", "metric"),
    [
        ("classification", BUDGET, "top-1"),
        ("multilabel", BUDGET, "mAP"),
        ("multilabel", 'metric = "AUC"', "AUC"),
        ("classification", 'metric = "torchmetrics:CohenKappa"', "torchmetrics:CohenKappa"),
        ("multilabel", 'metric = "torchmetrics:F1Score"\nmetric_options = {average = "macro"}', "torchmetrics:F1Score"),
    ],
)  # fmt: skip
def test_the_metric_is_the_one_named_or_the_first_of_the_task(
    project: Project, task: str, budget: str, metric: str
) -> None:
    project.edit(('name = "small"', f'name = "small"\ntask = "{task}"'), (BUDGET, budget))
    assert recipe.read(project.recipe).metric == metric


def test_label_smoothing_is_not_for_several_labels(project: Project) -> None:
    project.edit(('name = "small"', 'name = "small"\ntask = "multilabel"'), ("epochs = 6", "label_smoothing = 0.1"))
    with pytest.raises(InputError, match="label_smoothing is for classification only; take it out"):
        recipe.read(project.recipe)


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


def test_the_order_of_colours_reaches_the_target_from_the_preprocessing(project: Project) -> None:
    assert recipe.read(project.recipe).options("openvino").color == "RGB"
    project.edit(("[preprocessing]", '[preprocessing]\ncolor = "BGR"'))
    assert recipe.read(project.recipe).options("openvino").color == "BGR"
    project.edit(("[targets.openvino]", '[targets.openvino]\ncolor = "RGB"'))
    with pytest.raises(InputError, match=r"color belongs under \[preprocessing\], not \[targets.openvino\]"):
        recipe.read(project.recipe)


def test_paths_start_at_the_recipe(project: Project) -> None:
    assert recipe.read(project.recipe).data.calibration == project.folder / "calibration.npz"


def test_a_missing_recipe_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="nowhere.toml does not exist"):
        recipe.read(tmp_path / "nowhere.toml")
