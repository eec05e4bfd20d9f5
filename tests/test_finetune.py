"""QAT on a real small model and images: what it wins, that a killed run goes on, and what it asks for."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, fx, nn

from bitferry.device.errors import StageFailed
from bitferry.pipeline.load import Deployable
from bitferry.pipeline.quantization import finetune
from bitferry.pipeline.quantization.finetune import Course
from bitferry.pipeline.quantization.graph import layers, quality, rounded_answers
from bitferry.pipeline.training.settings import Training
from bitferry.targets import Scheme
from tests.conftest import Project, subset
from tests.test_quantization import CONTRACT, Inverted, ready

STEPS = 24


@pytest.fixture(scope="module")
def images() -> Tensor:
    return torch.from_numpy(np.repeat(subset("train", 192, classes=10)["images"][..., None], 3, -1))


@pytest.fixture
def course(images: Tensor, tmp_path: Path) -> Course:
    teacher = Deployable(Inverted(), CONTRACT).eval()
    training = Training(batch_size=16, horizontal_flip=True)
    return Course(images.numpy(), teacher, STEPS // 12, 2e-3, training, tmp_path / "checkpoint.pt")


def calibrated(held_out: Tensor) -> tuple[fx.GraphModule, Tensor]:
    return ready(held_out, scheme=Scheme(weight_bits=4))


def test_it_makes_images_it_has_not_seen_better(course: Course) -> None:
    held_out = torch.from_numpy(np.repeat(subset("calibration", 48, classes=10)["images"][..., None], 3, -1))
    model, teacher = calibrated(held_out)
    before = quality(model, held_out, teacher)
    assert finetune.finetune(model, course) == len(layers(model)) == 8
    assert quality(model, held_out, teacher) > before + 1
    assert not any(layer.weight.requires_grad for layer in layers(model))


class Killed(Exception):
    pass


class Mortal(nn.Module):
    """A teacher in whose lesson the run is killed."""

    def __init__(self, teacher: nn.Module, last: int) -> None:
        super().__init__()
        self.teacher, self.left = teacher, last

    def forward(self, images: Tensor) -> Tensor:
        self.left -= 1
        if self.left < 0:
            raise Killed
        found: Tensor = self.teacher(images)
        return found


def test_a_killed_run_goes_on_and_ends_as_if_it_had_not_been(
    course: Course, images: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(finetune, "SECONDS", 0.0)
    undisturbed, _ = calibrated(images[:32])
    finetune.finetune(undisturbed, replace(course, checkpoint=course.checkpoint.with_name("other.pt")))
    killed, _ = calibrated(images[:32])
    with pytest.raises(Killed):
        finetune.finetune(killed, replace(course, teacher=Mortal(course.teacher, 9)))
    resumed, _ = calibrated(images[:32])
    finetune.finetune(resumed, replace(course, teacher=Mortal(course.teacher, STEPS - 9)))  # and not one step more
    assert torch.equal(rounded_answers(resumed, images[:32]), rounded_answers(undisturbed, images[:32]))


def test_a_damaged_checkpoint_is_told(course: Course, images: Tensor) -> None:
    course.checkpoint.write_bytes(b"PK not a checkpoint")
    model, _ = calibrated(images[:32])
    with pytest.raises(StageFailed, match=r"checkpoint.pt cannot be read .*; delete it to fine-tune anew"):
        finetune.finetune(model, course)


def test_a_recipe_with_qat_is_deployed_from_its_own_training_images(deployed: Project, tmp_path: Path) -> None:
    own = Project(Path(shutil.copytree(deployed.folder, tmp_path / "own")))
    own.edit(("[budget]", '[quantization]\nmethod = "qat"\n[budget]'))
    done = own.bitferry("verify", "small.toml", "-t", "openvino", "--quick", "--json")
    assert done.returncode == 0, done.stderr
    assert "fine-tuning" in done.stderr
    (verdict,) = json.loads(done.stdout)
    assert verdict["outcome"] == "pass"
    assert not list((own.folder / "build/small").glob(".fine-tune-*"))


def with_weights(project: Project) -> tuple[str, str]:
    weights = next((project.folder / "build/small").glob("train-*/weights.safetensors"))
    shutil.copy(weights, project.folder / "weights.safetensors")
    return "[model]", '[model]\nweights = "weights.safetensors"'


def test_qat_without_training_images_says_what_it_lacks(deployed: Project, tmp_path: Path) -> None:
    own = Project(Path(shutil.copytree(deployed.folder, tmp_path / "own")))
    own.edit(with_weights(own), ('train = "train.npz"', ""), ("[budget]", '[quantization]\nmethod = "qat"\n[budget]'))
    done = own.bitferry("verify", "small.toml", "-t", "openvino", "--quick")
    assert done.returncode == 2
    assert "has no data.train, which quantization.method 'qat' trains on; its labels are not used" in done.stderr
