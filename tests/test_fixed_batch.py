"""A model whose code fixes the number of images: captured, quantized and deployed one image at a time."""

from pathlib import Path

import numpy as np
import pytest
import torch

from bitferry.device.errors import InputError
from bitferry.pipeline import recipe
from bitferry.pipeline.cache import Cache
from bitferry.pipeline.measure import layers, sensitivity
from bitferry.pipeline.run import Deployment, Run
from bitferry.pipeline.statistics import sqnr_db
from bitferry.pipeline.verify import eager, load_artifact
from tests.conftest import write_project
from tests.test_targets import target_or_skip

NETS = '''
"""Windows of tokens: the number of images is worked out from theirs, or taken to be one."""
import torch
from torch import nn

class Windows(nn.Module):
    def __init__(self, classes, alone):
        super().__init__()
        torch.manual_seed(0)
        self.alone = alone
        self.patches, self.norm = nn.Conv2d(3, 16, 2, 2), nn.BatchNorm2d(16)
        self.mix, self.head = nn.Linear(16, 16), nn.Linear(16, classes)

    def forward(self, x):
        x = torch.relu(self.norm(self.patches(x))).permute(0, 2, 3, 1)
        n, h, w, c = x.shape
        x = x.view(n, h // 4, 4, w // 4, 4, c).permute(0, 1, 3, 2, 4, 5).reshape(-1, 16, c)
        x = x + torch.relu(self.mix(x))
        n = 1 if self.alone else int(x.shape[0] / (h * w / 16))
        x = x.view(n, h // 4, w // 4, 4, 4, c).permute(0, 1, 3, 2, 4, 5).reshape(n, h, w, c)
        return self.head(x.mean((1, 2)))

def counted(classes=3):
    return Windows(classes, False)

def alone(classes=3):
    return Windows(classes, True)
'''
EVERY_STEP = '[quantization]\nrounding = "layers"\nbias_correction = "full"\nranges = "learned"\niterations = 2\n'


def run_of(folder: Path, net: str, more: str = "") -> Run:
    project = write_project(folder)
    (folder / "windows.py").write_text(NETS)
    project.edit(('"module:smallmodel:make"', f'"module:windows:{net}"\nweights = "weights.pt"'))
    project.recipe.write_text(project.recipe.read_text() + more)
    namespace: dict[str, object] = {}
    exec(NETS, namespace)  # noqa: S102 - the text above
    torch.save(namespace[net]().state_dict(), folder / "weights.pt")  # type: ignore[operator]
    return Run(recipe.read(project.recipe), project.recipe, Cache(folder / "build/small"))


@pytest.mark.parametrize(
    ("net", "name", "more"),
    [
        ("counted", "openvino", EVERY_STEP),
        ("counted", "executorch", ""),
        ("counted", "torchscript", ""),
        ("alone", "onnxruntime", ""),
    ],
)
def test_a_fixed_number_of_images_is_deployed_one_by_one(tmp_path: Path, net: str, name: str, more: str) -> None:
    target_or_skip(name)
    run = run_of(tmp_path / "project", net, more)
    images = run.evaluation.images[:8].copy()
    wanted = eager(run.model.module())(images)
    assert len(np.unique(wanted.argmax(1))) > 1
    for precision in ("float32", "int8"):
        made = Deployment(run, name, precision)
        found = load_artifact(made.compiled)(images)
        assert sqnr_db(wanted, found) > (80 if precision == "float32" else 18), precision
    assert {layer.name for layer in layers.compare(made.program, images)} == {"patches", "mix", "head"}
    assert {blame.name for blame in sensitivity.blames(made.program, images)} == {"patches", "mix", "head"}


def test_another_batch_is_refused_by_the_number(tmp_path: Path) -> None:
    run = run_of(tmp_path / "project", "counted", "[targets.onnxruntime]\nbatch = 4\n")
    with pytest.raises(
        InputError, match=r"fixes the number of images at 1, and \[targets\.onnxruntime\] asks for batch = 4"
    ):
        _ = Deployment(run, "onnxruntime", "float32").compiled
