"""Beyond plain CNNs: a ViT, hard-swish and squeeze-excite blocks, dense blocks, small, to every target that can."""

from collections.abc import Callable
from functools import cache

import pytest
import torch
from torch import nn

from bitferry import targets
from bitferry.pipeline import recipe
from bitferry.pipeline.cache import Cache
from bitferry.pipeline.run import Deployment, Run
from bitferry.pipeline.statistics import sqnr_db
from bitferry.pipeline.verify import eager, load_artifact
from tests.conftest import write_project
from tests.test_targets import target_or_skip

BLOCKS = '''
"""Real architectures of torchvision and timm, cut down to a few blocks."""
from functools import partial
from timm import create_model
from torch import nn
from torchvision import models

def vit(classes=3):
    return create_model("vit_tiny_patch16_224", num_classes=classes, img_size=32, patch_size=8, depth=2, embed_dim=48,
                        num_heads=3)

def mobilenetv3(classes=3):
    block = partial(models.mobilenetv3.InvertedResidualConfig, width_mult=1.0)
    blocks = [block(16, 3, 16, 16, True, "RE", 2, 1), block(16, 3, 48, 24, False, "RE", 1, 1),
              block(24, 5, 64, 24, True, "HS", 1, 1)]
    return models.mobilenetv3.MobileNetV3(blocks, 64, num_classes=classes)

def efficientnet(classes=3):
    block = partial(models.efficientnet.MBConvConfig, width_mult=1.0, depth_mult=1.0)
    blocks = [block(1, 3, 1, 16, 16, 1), block(4, 3, 2, 16, 24, 2), block(4, 5, 1, 24, 24, 1)]
    return models.efficientnet.EfficientNet(blocks, dropout=0.0, last_channel=64, num_classes=classes)

def densenet(classes=3):
    return models.DenseNet(growth_rate=8, block_config=(2, 2), num_init_features=16, num_classes=classes)
'''
TAKEN = {  # every target takes one or two of them, which keeps the time of the test in bounds
    "vit": ("openvino", "onnxruntime"),
    "mobilenetv3": ("onnxruntime", "executorch"),
    "efficientnet": ("openvino", "tensorrt"),
    "densenet": ("coreml", "torchscript"),
}
PAIRS = [(architecture, name) for architecture, names in TAKEN.items() for name in names]


@pytest.fixture(scope="module")
def run_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Run]:
    """Give a recipe with an architecture, at 32×32, its random weights scaled so that every layer matters."""

    @cache
    def made(architecture: str) -> Run:
        project = write_project(tmp_path_factory.mktemp("architecture") / architecture)
        (project.folder / "blocks.py").write_text(BLOCKS)
        project.edit(
            ('"module:smallmodel:make"', f'"module:blocks:{architecture}"\nweights = "weights.pt"'),
            ("height = 16\nwidth = 16", "height = 32\nwidth = 32"),
        )
        torch.manual_seed(0)
        namespace: dict[str, object] = {}
        exec(BLOCKS, namespace)  # noqa: S102 - the text above
        model = namespace[architecture]()  # type: ignore[operator]
        settle(model)
        torch.save(model.state_dict(), project.folder / "weights.pt")
        return Run(recipe.read(project.recipe), project.recipe, Cache(project.folder / "build/small"))

    return made


def settle(model: nn.Module) -> None:
    """Give batch norms the statistics of noise, so that activations keep their scale through random weights."""
    model.train()
    with torch.no_grad():
        for _ in range(4):
            model(torch.randn(16, 3, 32, 32))
        for layer in model.modules():
            if isinstance(layer, nn.Linear):  # timm's are too small at first for int8 to mean anything
                layer.reset_parameters()


@pytest.mark.parametrize(("architecture", "name"), PAIRS)
def test_int8_answers_like_the_quantized_program(run_of: Callable[[str], Run], architecture: str, name: str) -> None:
    target_or_skip(name)
    run = run_of(architecture)
    way = Deployment(run, name, "int8")
    made = way.compiled
    if made.environment.unmeasured:
        assert made.path.exists()
        return
    images = run.evaluation.images[:16].copy()
    reference = eager(run.model.module())(images)
    wanted, found = (
        sqnr_db(reference, eager(way.program.module())(images)),
        sqnr_db(reference, load_artifact(made)(images)),
    )
    assert wanted > 15
    assert found > wanted - 3
    layers = targets.get(name).executed(made.path, precision="int8", options=made.options)
    assert layers
