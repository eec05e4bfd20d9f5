"""`bitferry init`: the model told from its file, the layout of the images, and guesses that were tried on them."""

import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import timm
import torch
import torchvision
from onnx import TensorProto, helper
from PIL import Image
from torch import Tensor, nn

from bitferry.device.errors import InputError
from bitferry.pipeline import checkpoint, unwrapped
from bitferry.pipeline.init import architecture, pictures
from bitferry.pipeline.recipe import read
from tests.conftest import Project, subset

SIDE = 32
HALF = 0.5
NAMES = ("pullover", "shirt", "trouser")
"""Sorted: the embedded labels 0, 1 and 2 are 1, 2 and 0 here."""


def probe(model: nn.Module, head: nn.Linear, images: Tensor, labels: Tensor) -> None:
    """Fit a random network's norms and head to images, in a second: it is mostly right after the same preprocessing."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = None
    with torch.no_grad():
        model.train()(images)
    model.eval()
    kept: list[Tensor] = []
    hook = head.register_forward_pre_hook(lambda _, given: kept.append(given[0]))
    with torch.no_grad():
        model(images)
        hook.remove()
        features = torch.cat([kept[0], torch.ones(len(images), 1)], 1)
        wanted = 2 * nn.functional.one_hot(labels.long(), head.out_features).float() - 1
        ridge = features.T @ features + 1e-1 * torch.eye(features.shape[1])
        solved = torch.linalg.solve(ridge, features.T @ wanted)
        head.weight.copy_(solved[:-1].T)
        head.bias.copy_(solved[-1])


@pytest.fixture(scope="module")
def mine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `mine.pth`, a tiny ResNet for three classes at 32×32 and 0.5/0.5, and `photos/`, images of those."""
    folder = tmp_path_factory.mktemp("mine")
    torch.manual_seed(0)
    model = timm.create_model("test_resnet", num_classes=3)
    train = subset("train", 240)
    order = np.array([1, 2, 0])  # embedded label → the label by sorted names
    pixels = torch.from_numpy(train["images"]).float()[:, None].expand(-1, 3, -1, -1) / 255
    given = (nn.functional.interpolate(pixels, SIDE, mode="bilinear") - HALF) / HALF
    head = next(m for m in model.modules() if isinstance(m, nn.Linear))
    probe(model, head, given, torch.from_numpy(order[train["labels"]]))
    torch.save(
        {"epoch": 3, "state_dict": {f"module.{k}": v for k, v in model.state_dict().items()}}, folder / "mine.pth"
    )
    write_photos(folder / "photos", subset("evaluation", 160), order)
    return folder


def write_photos(folder: Path, arrays: Mapping[str, Any], order: Any) -> None:
    for index, (image, label) in enumerate(zip(arrays["images"], arrays["labels"], strict=True)):
        place = folder / NAMES[order[label]]
        place.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(place / f"{index}.png")


def written(project: Project, *arguments: str, name: str = "small.toml") -> dict[str, Any]:
    done = project.bitferry("init", *arguments, "--output", name)
    assert done.returncode == 0, done.stderr
    return tomllib.loads((project.folder / name).read_text())


def test_the_guess_is_tried_and_the_recipe_deploys(mine: Path, tmp_path: Path) -> None:
    user = Project(tmp_path)
    found = written(user, str(mine / "mine.pth"), str(mine / "photos"))
    text = user.recipe.read_text()
    assert found["model"]["source"] == "timm:test_resnet"
    assert found["classes"] == list(NAMES)
    assert found["preprocessing"]["mean"] == [HALF] * 3
    assert found["preprocessing"]["height"] == SIDE
    assert "A GUESS" in text
    assert "evidence, not proof" in text
    assert "The images are grey" in text
    lists = [
        set((tmp_path / f"small-{part}.tsv").read_text().splitlines()[1:]) for part in ("calibration", "evaluation")
    ]
    assert len(lists[0]) + len(lists[1]) == 160
    assert not lists[0] & lists[1]
    assert "move it away" in user.refused(
        "init", str(mine / "mine.pth"), str(mine / "photos"), "--output", "small.toml"
    )
    user.edit(("accuracy_drop_pp = 1.0", "accuracy_drop_pp = 20.0"))
    done = user.bitferry("deploy", "small.toml", "--target", "onnxruntime", "--precision", "float32", "--quick")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "dist/small-onnxruntime-0.1.0/run.pyz").is_file()


def test_labels_in_a_wrong_order_are_doubted(mine: Path, tmp_path: Path) -> None:
    write_photos(tmp_path / "photos", subset("evaluation", 90), np.array([0, 1, 2]))
    user = Project(tmp_path)
    found = written(user, str(mine / "mine.pth"), "photos", "--size", str(SIDE))
    assert "NONE IS BETTER THAN CHANCE" in user.recipe.read_text()
    assert found["preprocessing"]["mean"] == [HALF] * 3  # what is usual for the architecture


def test_a_head_of_other_classes_is_told_with_what_to_do(mine: Path, tmp_path: Path) -> None:
    write_photos(tmp_path / "photos", subset("evaluation", 60, classes=2), np.array([0, 1, 2]))
    user = Project(tmp_path)
    told = user.refused("init", str(mine / "mine.pth"), "photos")
    assert "gives 3 scores, and the images are of 2 classes (pullover, shirt)" in told
    assert "--classes" in told
    assert not list(tmp_path.glob("*.t*"))
    (tmp_path / "names.txt").write_text("\n".join(NAMES))
    found = written(user, str(mine / "mine.pth"), "photos", "--classes", "names.txt", "--size", str(SIDE))
    assert found["classes"] == list(NAMES)
    evaluation = read(user.recipe).data.evaluation
    assert isinstance(evaluation, Path)
    assert evaluation.is_file()


def test_every_layout_of_images_is_split_without_a_leak(tmp_path: Path) -> None:
    arrays = subset("evaluation", 60)
    for part, skip in (("train", 0), ("val", 60)):
        write_photos(tmp_path / "divided" / part, subset("evaluation", 60, skip=skip), np.array([1, 2, 0]))
    divided = pictures.find(tmp_path / "divided")
    assert {name: len(lines) > 0 for name, lines in divided.lines.items()} == dict.fromkeys(
        ("train", "calibration", "evaluation"), True
    )
    assert all(path.is_relative_to(tmp_path / "divided/val") for path, _ in divided.lines["evaluation"])
    files = [str(path) for lines in divided.lines.values() for path, _ in lines]
    assert len(set(files)) == len(files) == 120
    lines = [f"{path.relative_to(tmp_path)}\t{label}" for path, label in divided.lines["evaluation"]]
    (tmp_path / "list.tsv").write_text("\n".join(["file\tlabel", *lines]))
    listed = pictures.find(tmp_path / "list.tsv")
    assert listed.classes == NAMES
    assert sum(map(len, listed.lines.values())) == 60
    np.savez(tmp_path / "images.npz", **arrays)  # type: ignore[arg-type]
    parts = pictures.find(tmp_path / "images.npz").arrays
    assert sorted(len(images) for images, _ in parts.values()) == [14, 46]
    assert set(np.unique(parts["calibration"][1])) == {0, 1, 2}


def write_masks(folder: Path) -> None:
    for name in ("images", "masks"):
        (folder / name).mkdir(parents=True)
    for number, image in enumerate(subset("evaluation", 12)["images"]):
        Image.fromarray(image).save(folder / f"images/{number}.jpg")
        Image.fromarray((image > 60).astype(np.uint8)).save(folder / f"masks/{number}.png")


def test_a_segmentation_model_wants_masks(mine: Path, tmp_path: Path) -> None:
    torch.manual_seed(0)
    make = torchvision.models.segmentation.lraspp_mobilenet_v3_large
    torch.save({"model_ema": make(num_classes=2, weights_backbone=None).state_dict()}, tmp_path / "mine.pth")
    write_masks(tmp_path / "scenes")
    user = Project(tmp_path)
    found = written(user, "mine.pth", "scenes", "--size", "64")
    assert found["task"] == "segmentation"
    assert found["model"]["source"] == "torchvision:lraspp_mobilenet_v3_large"
    assert found["classes"] == 2
    assert "expected a folder" in user.refused("init", "mine.pth", str(mine / "photos"), "-o", "other.toml")


@pytest.mark.parametrize("batch", ["n", 7])
def test_an_onnx_file_tells_its_size_and_layout(tmp_path: Path, batch: str | int) -> None:
    weight = helper.make_tensor("w", TensorProto.FLOAT, (3, 3), np.eye(3).ravel().tolist())
    graph = helper.make_graph(
        [
            helper.make_node("ReduceMean", ["x"], ["m"], axes=[1, 2], keepdims=0),
            helper.make_node("MatMul", ["m", "w"], ["y"]),
        ],
        "mean_color",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [batch, 24, 20, 3])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [batch, 3])],
        [weight],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8), tmp_path / "m.onnx")
    write_photos(tmp_path / "photos", subset("evaluation", 60), np.array([0, 1, 2]))
    found = written(Project(tmp_path), "m.onnx", "photos")
    assert found["model"]["source"] == f"onnx:{tmp_path / 'm.onnx'}"
    assert [found["preprocessing"][side] for side in ("height", "width")] == [24, 20]
    assert "N×H×W×3" in (tmp_path / "small.toml").read_text()
    (tmp_path / "cut.onnx").write_bytes((tmp_path / "m.onnx").read_bytes()[:-40])
    told = Project(tmp_path).refused("init", "cut.onnx", "photos", "-o", "cut.toml")
    assert "cut.onnx is no ONNX model that can be opened" in told
    assert "bundle" not in told


def test_an_exported_program_needs_trust_and_works(mine: Path, tmp_path: Path) -> None:
    model = timm.create_model("test_resnet", num_classes=3)
    checkpoint.fill(model, checkpoint.read(mine / "mine.pth"), mine)
    batch = {0: torch.export.Dim("n")}
    torch.export.save(
        torch.export.export(model.eval(), (torch.zeros(2, 3, 32, 32),), dynamic_shapes=(batch,)), tmp_path / "m.pt2"
    )
    user = Project(tmp_path)
    assert "pass --trust" in user.refused("init", "m.pt2", str(mine / "photos"))
    found = written(user, "m.pt2", str(mine / "photos"), "--trust")
    assert found["preprocessing"]["mean"] == [HALF] * 3
    assert read(user.recipe).model.source == f"pt2:{tmp_path / 'm.pt2'}"


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("torchvision:resnet50", "torchvision:resnet50"),
        ("torchvision:regnet_y_400mf", "torchvision:regnet_y_400mf"),
        ("timm:efficientnet_b0", "timm:efficientnet_b0"),
        ("timm:convnext_atto", "timm:convnext_atto"),
    ],
)
def test_architectures_are_told_by_names_and_shapes(name: str, expected: str) -> None:
    state = architecture.build(architecture.Guess(name, 7)).state_dict()
    found = architecture.guesses({f"model._orig_mod.{key}": value for key, value in state.items()})
    assert found[0].source == expected
    assert found[0].classes == 7


def test_a_vision_transformer_s_size_is_told_by_its_positions() -> None:
    with torch.device("meta"):
        model = timm.create_model("vit_tiny_patch16_224", num_classes=5, img_size=96)
    found = architecture.guesses(model.state_dict())[0]
    assert found.source == "timm:vit_tiny_patch16_224"
    assert found.options == {"img_size": 96}
    assert found.usual is not None
    assert (found.usual.size, found.usual.mean) == (96, (0.5, 0.5, 0.5))


def test_what_is_of_no_known_model_is_told_with_the_way_out() -> None:
    with pytest.raises(InputError, match="takes 1 channel, and bitferry gives every model 3"):
        architecture.guesses({"conv1.weight": torch.zeros(8, 1, 3, 3), "fc.weight": torch.zeros(2, 8)})
    with pytest.raises(InputError, match="finds objects"):
        architecture.guesses({"rpn.head.conv.weight": torch.zeros(8, 3, 3, 3)})


def test_averaged_weights_are_taken_before_others_and_wrappers_come_off() -> None:
    plain = {"fc.weight": torch.ones(2, 3), "fc.bias": torch.zeros(2)}
    both = {f"model.{k}": v * 2 for k, v in plain.items()} | {f"ema_model.module.{k}": v for k, v in plain.items()}
    found = unwrapped.fitting(both | {"criterion.weight": torch.ones(2)}, set(plain))
    assert torch.equal(found["fc.weight"], plain["fc.weight"])
    own = {"model.fc.weight": torch.ones(1)}  # a user's own module with a `model` inside keeps it
    assert unwrapped.fitting(own, set(own)) == own


@pytest.mark.parametrize("name", ["resnet18", "vgg11", "mobilenet_v3_small", "swin_t", "vit_b_16"])
def test_the_last_layer_is_found_in_alphabetical_order_too(name: str) -> None:
    with torch.device("meta"):
        state = torchvision.models.get_model(name, num_classes=7).state_dict()
    shapes = {key: tuple(state[key].shape) for key in sorted(state)}
    assert next(architecture._torchvision(shapes)).classes == 7
