"""Every recipe runs on data in its originals' layout, and says where those come from."""

import csv
import json
import re
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from torchvision import models
from torchvision.models import vgg

from bitferry import targets
from bitferry.device.arrays import Outputs
from bitferry.pipeline import recipe as recipes
from bitferry.pipeline.cache import Cache
from bitferry.pipeline.data import source as sources
from bitferry.pipeline.measure import accuracy
from bitferry.pipeline.recipe import Recipe
from bitferry.pipeline.run import Deployment, Run
from recipes import chexpert
from tests import originals
from tests.conftest import ROOT, Project, subset

FOLDER = ROOT / "recipes"
NAMES = sorted(path.stem for path in FOLDER.glob("*.toml"))


def copied(folder: Path, name: str, *edits: tuple[str, str]) -> Project:
    """Copy a recipe and what lies beside it, and make it small; a text that is not in it is a mistake in the test."""
    folder.mkdir()
    for path in [FOLDER / f"{name}.toml", *FOLDER.glob("*.py"), *FOLDER.glob("*.txt")]:
        shutil.copy(path, folder / path.name)
    text = (folder / f"{name}.toml").read_text()
    for old, new in edits:
        assert text.count(old) == 1, old
        text = text.replace(old, new)
    (folder / f"{name}.toml").write_text(text)
    return Project(folder)


@pytest.fixture(autouse=True)
def own_models() -> Iterator[None]:
    """Forget the models beside a recipe, which are of another folder in the next test."""
    yield
    for name in [path.stem for path in FOLDER.glob("*.py")]:
        sys.modules.pop(name, None)


def verdict(project: Project, name: str, *options: str, code: int = 0) -> dict[str, Any]:
    """Deploy a recipe for OpenVINO, and give the verdict."""
    done = project.bitferry("deploy", f"{name}.toml", "--target", "openvino", "--quick", "--json", *options)
    assert done.returncode == code, done.stderr
    (project.folder / "stderr.txt").write_text(done.stderr)
    found: dict[str, Any] = json.loads(done.stdout)[0]
    return found


def compiled(project: Project, name: str) -> tuple[Run, Outputs]:
    """Train where that is asked, and compile in float32; the answers to the evaluation images are the float model's."""
    path = project.folder / f"{name}.toml"
    run = Run(recipes.read(path, precision="float32"), path, Cache(project.folder / "build"))
    run.check_data()
    made = Deployment(run, "openvino", "float32").compiled
    images = run.evaluation.images
    scores = targets.get("openvino").load(made.path, precision="float32", options=made.options)(images)
    with torch.inference_mode():
        wanted = run.model.module()(torch.from_numpy(images.copy())).numpy()
    np.testing.assert_allclose(scores, wanted, atol=1e-3 * np.abs(wanted).max())
    return run, scores


@pytest.mark.slow
def test_cifar10_from_the_original_batches_is_trained_and_deployed_as_int8(tmp_path: Path) -> None:
    project = copied(
        tmp_path / "recipes", "cifar10-resnet18", ("calibration = 512", "calibration = 20"), ("epochs = 30", "epochs = 1"),
        ("batch_size = 128", "batch_size = 16"), ("learning_rate = 0.1", "learning_rate = 0.02"),
        ("accuracy_drop_pp = 0.5", "accuracy_drop_pp = 100"),
    )  # fmt: skip
    originals.cifar10(project.folder / "data/cifar10", each=24, test=40)
    found = verdict(project, "cifar10-resnet18")
    assert found["precision"] == "int8"
    assert found["accuracy"]["images"] == 40
    assert "20 of 20 convolutions int8" in found["execution"]["summary"]
    told = (project.folder / "stderr.txt").read_text()
    assert "0 evaluation, 20 calibration, 100 train images" in told


@pytest.mark.slow
def test_pets_start_from_weights_with_a_new_head_and_end_as_int8(tmp_path: Path) -> None:
    project = copied(
        tmp_path / "recipes", "pets-vgg16", ("height = 224", "height = 32"), ("width = 224", "width = 32"),
        ("resize = 256", "resize = 36"), ("calibration = 370", "calibration = 37"), ("epochs = 12", "epochs = 2"),
        ("unfreeze = 3 ", "unfreeze = 1 "), ("batch_size = 32", "batch_size = 16"),
        ("accuracy_drop_pp = 1.0", "accuracy_drop_pp = 100"),
    )  # fmt: skip
    breeds = recipes.read(project.folder / "pets-vgg16.toml").classes
    originals.pets(project.folder / "data/pets", breeds, trainval=3, test=1)
    originals.vgg16(vgg.make_layers(vgg.cfgs["D"]), project.folder / "weights/vgg16-397923af.pth")
    found = verdict(project, "pets-vgg16")
    assert found["precision"] == "int8"
    assert found["accuracy"]["images"] == 37
    told = (project.folder / "stderr.txt").read_text()
    assert "classifier.6.weight starts anew ([1000, 9] in the file, [37, 512] here)" in told
    assert "features.0.weight starts anew" not in told


@pytest.mark.slow
def test_two_x_rays_of_a_patient_are_answered_together(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    project = copied(
        tmp_path / "recipes", "chest-xray-densenet121", ("height = 224", "height = 32"), ("width = 224", "width = 32"),
        ("evaluation = 0.1, calibration = 512", "evaluation = 0.4, calibration = 8"), ("epochs = 5", "epochs = 1"),
        ("batch_size = 32", "batch_size = 8"),
    )  # fmt: skip
    made = originals.chexpert(project.folder / "data/CheXpert-v1.0-small", patients=40)
    assert chexpert.main([str(made)]) == 0
    originals.old_densenet(models.densenet121(), project.folder / "weights/densenet121-a639ec97.pth")
    run, scores = compiled(project, "chest-xray-densenet121")
    assert run.recipe.metric == "AUC"
    assert 0 < accuracy.percent(scores, run.evaluation, run.recipe) < 100
    told = capsys.readouterr().err
    assert "classifier.weight starts anew ([1000, 1024] in the file, [14, 2048] here)" in told
    split = json.loads(next((project.folder / "build").rglob("split.json")).read_text())
    where: dict[str, set[str]] = {}
    for image in split["images"]:
        where.setdefault(image["group"], set()).add(image["split"])
    assert len(where) == 40
    assert all(len(one) == 1 for one in where.values())


@pytest.mark.slow
def test_voc_s_palette_masks_are_learned_from_and_judged(tmp_path: Path) -> None:
    project = copied(
        tmp_path / "recipes", "voc-lraspp", ("height = 384", "height = 64"), ("width = 384", "width = 64"),
        ("calibration = 128", "calibration = 6"), ("epochs = 15", "epochs = 1"), ("batch_size = 16", "batch_size = 8"),
        ("accuracy_drop_pp = 1.0", "accuracy_drop_pp = 100"), ("patience = 5\n", ""),
    )  # fmt: skip
    originals.voc(project.folder / "data/voc", train=30, val=16)
    published = models.segmentation.lraspp_mobilenet_v3_large(weights=None, weights_backbone=None, num_classes=21)
    originals.checkpoint(published, project.folder / "weights/lraspp_mobilenet_v3_large-d234d4ea.pth")
    found = verdict(project, "voc-lraspp", "--precision", "float32")
    assert found["accuracy"]["judged"]["metric"] == "mIoU"
    assert found["accuracy"]["images"] == 16


@pytest.mark.slow
def test_a_transformer_is_trained_on_the_embedded_images(tmp_path: Path) -> None:
    project = copied(
        tmp_path / "recipes", "fashion-vit", ("epochs = 8", "epochs = 2"), ("batch_size = 128", "batch_size = 32"),
        ("accuracy_drop_pp = 1.0", "accuracy_drop_pp = 100"),
    )  # fmt: skip
    embedded = tmp_path / "calibration_data/fashion_mnist"
    embedded.mkdir(parents=True)
    for name, count in (("train", 400), ("calibration", 32), ("evaluation", 100)):
        np.savez(embedded / f"{name}.npz", **subset(name, count, classes=10))  # type: ignore[arg-type]
    found = verdict(project, "fashion-vit")
    assert found["precision"] == "int8"
    assert found["accuracy"]["images"] == 100


IMAGENET = {
    "imagenet-mobilenetv2": "mobilenet_v2-b0353104.pth",
    "imagenet-resnet50": "resnet50-11ad3fa6.pth",
    "imagenet-efficientnet-lite0": "efficientnet_lite0_ra-37913777.pth",
    "imagenet-vit-tiny": "deit_tiny_patch16_224-a1311bcf.pth",
}


def photographed(folder: Path, name: str, *edits: tuple[str, str], **options: int) -> Project:
    """Copy one of ImageNet's recipes, with lists of photographs and weights that know nothing."""
    source = recipes.read(FOLDER / f"{name}.toml").model.source
    smaller = [("height = 224", "height = 64"), ("width = 224", "width = 64")]
    if options:
        told = ", ".join(f"{key} = {value}" for key, value in options.items())
        smaller.append((f'source = "{source}"', f'source = "{source}"\noptions = {{{told}}}'))
    project = copied(folder, name, *smaller, *edits)
    originals.imagenet(project.folder / "imagenet", calibration=8, evaluation=24)
    library, _, model = source.partition(":")
    made = models.get_model(model) if library == "torchvision" else timm.create_model(model, **options)
    originals.checkpoint(made, project.folder / "weights" / IMAGENET[name])
    return project


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("imagenet-mobilenetv2", {}),
        ("imagenet-resnet50", {}),
        ("imagenet-efficientnet-lite0", {}),
        ("imagenet-vit-tiny", {"img_size": 64, "depth": 3}),
    ],
)
def test_imagenet_s_models_are_compiled_to_what_their_weights_say(
    name: str, options: dict[str, int], tmp_path: Path
) -> None:
    project = photographed(tmp_path / "recipes", name, **options)
    run, scores = compiled(project, name)
    assert scores.shape == (24, 1000)
    assert len(run.calibration) == 8


@pytest.mark.parametrize("name", IMAGENET)
def test_imagenet_s_preprocessing_is_that_of_the_weights(name: str) -> None:
    recipe = recipes.read(FOLDER / f"{name}.toml")
    contract = recipe.preprocessing
    library, _, model = recipe.model.source.partition(":")
    weights = IMAGENET[name]
    assert recipe.model.weights == FOLDER / "weights" / weights
    if library == "torchvision":
        known = next(one for one in models.get_model_weights(model) if Path(one.url).name == weights)
        made = known.transforms()
        wanted = (made.crop_size[0], made.resize_size[0], made.interpolation.value, *made.mean, *made.std)
        if recipe.budget.float_percent:
            assert recipe.budget.float_percent == round(known.meta["_metrics"]["ImageNet-1K"]["acc@1"], 2)
    else:
        configs = [timm.models.get_pretrained_cfg(tag) for tag in timm.list_pretrained(f"{model}.*")]
        config = next(one for one in configs if Path(one.url).name == weights)
        side = config.input_size[1]
        wanted = (side, int(side / config.crop_pct), config.interpolation, *config.mean, *config.std)
    found = (contract.height, contract.resize, contract.interpolation, *contract.mean, *contract.std)
    assert _rounded(found) == _rounded(wanted)
    assert contract.height == contract.width


def _rounded(values: tuple[Any, ...]) -> list[Any]:
    return [round(value, 4) if isinstance(value, float) else value for value in values]


@pytest.mark.parametrize("name", NAMES)
def test_a_recipe_reads_and_says_what_it_teaches_and_where_its_data_are(name: str) -> None:
    text = (FOLDER / f"{name}.toml").read_text()
    head = text.partition("\n\n")[0]
    assert all(line.startswith("#") for line in head.splitlines())
    assert head.startswith("# Teaches ")
    assert "needs nothing but this repository" in head.lower().replace("\n# ", " ") or "\n# Data: " in head
    commands = re.findall(r"^#     (make deploy .*|bitferry deploy .*)$", head, re.MULTILINE)
    assert commands
    assert all(f"recipes/{name}.toml" in one or name == "fashion-resnet18" for one in commands)
    assert recipes.read(FOLDER / f"{name}.toml").name == name


@pytest.mark.parametrize("name", NAMES)
def test_what_a_recipe_names_is_here_or_told_to_be_fetched(name: str) -> None:
    head = (FOLDER / f"{name}.toml").read_text().partition("\n\n")[0]
    ignored = (ROOT / ".gitignore").read_text().splitlines()
    named = list(_named(recipes.read(FOLDER / f"{name}.toml")))
    assert len(named) >= 2
    for path in named:
        inside = path.resolve().relative_to(FOLDER.parent)
        if not inside.is_relative_to("recipes") or inside.suffix == ".py":
            assert path.is_file(), path
            continue
        beside = inside.relative_to("recipes")
        assert f"/recipes/{beside.parts[0]}/" in ignored
        assert str(beside) in head, f"{beside} is not told of"


def _named(recipe: Recipe) -> Iterator[Path]:
    """List the files that a recipe asks for: data, weights, and a model of its own."""
    for source in recipe.data.splits().values():
        yield from sources.paths(source)
    yield from [recipe.model.weights] if recipe.model.weights else []
    yield from [Path(recipe.training.start)] if recipe.training.start else []
    kind, _, name = recipe.model.source.partition(":")
    yield from [FOLDER / f"{name.partition(':')[0]}.py"] if kind == "module" else []


def test_the_tour_lists_every_recipe() -> None:
    rows = re.findall(
        r"^\| \[([\w-]+)\]\(\.\./recipes/([\w-]+)\.toml\) \|", (ROOT / "docs/recipes-tour.md").read_text(), re.MULTILINE
    )
    assert sorted(rows) == [(name, name) for name in NAMES]


def converted(tmp_path: Path, *options: str) -> list[list[str]]:
    """Make eight patients' csv into a list, and give its lines."""
    made = tmp_path / "train.csv"
    if not made.exists():
        originals.chexpert(tmp_path, patients=8)
    assert chexpert.main([str(made), *options]) == 0
    return [line.split("\t") for line in (tmp_path / "studies.tsv").read_text().splitlines()]


def test_chexpert_s_uncertain_findings_are_taken_as_asked(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    negative = converted(tmp_path)
    assert negative[0] == ["file", "lateral", "findings", "group"]
    assert "14 studies of 8 patients; left out: 2 without a lateral image" in capsys.readouterr().err
    with (tmp_path / "train.csv").open() as stream:
        rows = {row["Path"].partition("/")[2]: row for row in csv.DictReader(stream)}
    positive, certain = converted(tmp_path, "--uncertain", "positive"), converted(tmp_path, "--uncertain", "leave-out")
    for ways, line in ((("1.0",), negative), (("1.0", "-1.0"), positive)):
        for frontal, lateral, findings, patient in line[1:]:
            wanted = [name for name in chexpert.FINDINGS if rows[frontal][name] in ways]
            assert findings.split("|") == (wanted or [""])
            assert patient in frontal
            assert lateral == frontal.replace("view1_frontal", "view2_lateral")
    assert negative != positive
    unsure = [line for line in negative[1:] if "-1.0" in rows[line[0]].values()]
    assert unsure
    assert certain[1:] == [line for line in negative[1:] if line not in unsure]
    repeated = converted(tmp_path, "--lateral", "repeat-frontal")
    assert len(repeated) == 1 + 16
    assert sum(frontal == lateral for frontal, lateral, *_ in repeated) == 2


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("Path,Sex", "path,Sex", "line 2 has no column 'Path'; expected Path, Frontal/Lateral, No Finding"),
        ("patient00002/study1/view1_frontal.jpg", "x.jpg", "line 6: expected …/patientNNNNN/studyN/FILE, Frontal or Lateral"),
        ("view1_frontal", "view9_frontal", "14 of 28 images are not there, for example"),
        (",-1.0", ",-2.0", "expected 1, 0, -1 or nothing, found '-2.0'"),
        (",Frontal,", ",Front,", "line 2: expected …/patientNNNNN/studyN/FILE, Frontal or Lateral"),
        (",Lateral,", ",Frontal,", "no study is left of 16: 16 without a lateral image"),
    ],
)  # fmt: skip
def test_a_csv_that_is_not_chexpert_s_is_told_where(
    old: str, new: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made = originals.chexpert(tmp_path, patients=8)
    text = made.read_text()
    assert old in text
    made.write_text(text.replace(old, new))
    assert chexpert.main([str(made)]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "studies.tsv").exists()
    assert chexpert.main([str(tmp_path / "no.csv")]) == 2
    assert "no.csv: it cannot be read: No such file or directory" in capsys.readouterr().err


def test_the_list_of_studies_stays_beside_its_images(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    converted(tmp_path, "--out", str(tmp_path / "studies.tsv"))
    assert [one.name for one in tmp_path.glob("*studies*")] == ["studies.tsv"]
    assert chexpert.main([str(tmp_path / "train.csv"), "--out", str(tmp_path / "train/studies.tsv")]) == 2
    assert "where the names in the list begin; choose a name there" in capsys.readouterr().err
