"""A model of two towers, images and text, as a classifier: the prompts' features are baked into what is deployed."""

from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch

from bitferry.pipeline import load, recipe
from tests.conftest import Project, write_project

FACTORY = '''
"""A small model as CLIP is: an image tower and a text tower; the classes are prompts, as token ids."""
import torch
import torch.nn.functional as F
from torch import Tensor, nn

class TwoTowers(nn.Module):
    def __init__(self, prompts, words, width=16):
        super().__init__()
        self.image = nn.Sequential(nn.Conv2d(3, 16, 3, 2, 1), nn.ReLU(), nn.Conv2d(16, 32, 3, 2, 1), nn.ReLU(),
                                   nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, width))
        self.words = nn.Embedding(words, 24, padding_idx=0)
        self.text = nn.Linear(24, width)
        self.scale = nn.Parameter(torch.tensor(2.0))
        length = max(map(len, prompts))
        tokens = torch.tensor([[*prompt, *[0] * (length - len(prompt))] for prompt in prompts])
        self.register_buffer("tokens", tokens, persistent=False)
        self.register_buffer("baked", torch.zeros(len(prompts), width), persistent=False)

    def features(self) -> Tensor:
        """Give what the text tower makes of the prompts, K x width."""
        there = (self.tokens > 0).float()[..., None]
        return F.normalize(self.text((self.words(self.tokens) * there).sum(1) / there.sum(1)), dim=1)

    def train(self, mode: bool = True):
        """Bake the prompts' features as soon as the weights no longer change."""
        super().train(mode)
        if not mode:
            self.baked = (self.features() * self.scale.exp()).detach()
        return self

    def forward(self, images: Tensor) -> Tensor:
        text = self.features() * self.scale.exp() if self.training else self.baked
        return F.normalize(self.image(images), dim=1) @ text.T

def make(prompts, words=40, num_classes=None):
    return TwoTowers(prompts, words)
'''
PROMPTS = [[5, 9, 11], [5, 9, 12, 7], [5, 9, 13]]


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> tuple[Project, Path]:
    """Give the project, trained, and its ONNX in int8; tests must not change it."""
    project = write_project(tmp_path_factory.mktemp("prompts") / "project")
    (project.folder / "towers.py").write_text(FACTORY)
    project.edit(('"module:smallmodel:make"', f'"module:towers:make"\noptions = {{prompts = {PROMPTS}}}'))
    done = project.bitferry("export", "small.toml", "--target", "onnxruntime")
    assert done.returncode == 0, done.stderr
    return project, project.folder / done.stdout.strip().split("\t")[1]


def test_the_text_tower_is_not_in_what_is_deployed(exported: tuple[Project, Path]) -> None:
    model = onnx.load(exported[1])
    assert [one.name for one in model.graph.input] == ["images"]
    assert not {"Gather", "Embedding"} & {node.op_type for node in model.graph.node}
    shapes = {tuple(one.dims) for one in model.graph.initializer}
    assert (40, 24) not in shapes
    assert {(3, 16), (16, 3)} & shapes


def test_the_deployed_model_answers_as_both_towers_do(exported: tuple[Project, Path]) -> None:
    project, path = exported
    read = recipe.read(project.recipe)
    (weights,) = (project.folder / "build/small").glob("train-*/weights.safetensors")
    model = load.load(read, weights, folder=project.folder)
    with np.load(project.folder / "evaluation.npz") as arrays:
        images, labels = np.stack([read.preprocessing.fit(one) for one in arrays["images"]]), arrays["labels"]
    answered = onnxruntime.InferenceSession(path).run(None, {"images": images})[0].argmax(1)
    with torch.no_grad():
        wanted = model.module()(torch.from_numpy(images)).argmax(1).numpy()
    assert (wanted == labels).mean() > 0.8
    assert (answered == wanted).mean() > 0.97
