"""Reshaped data and foreign bundles: what a reviewer broke once stays mended."""

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from bitferry.device.preprocess import Preprocessing
from bitferry.pipeline import dataset
from bitferry.pipeline.artifacts import FloatModel
from bitferry.pipeline.cache import Cache
from bitferry.pipeline.load import Deployable
from bitferry.pipeline.measure import layers
from bitferry.pipeline.quantize import quantize
from bitferry.pipeline.recipe import Quantization
from bitferry.targets import Scheme
from tests.conftest import Project

CONTRACT = Preprocessing(height=16, width=16)
CLASSES = ("a", "b")


def test_the_same_bytes_in_another_shape_are_other_pictures(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    wrong = rng.integers(0, 256, (8, 64, 32, 3), dtype=np.uint8)
    build, path = Cache(tmp_path / "build"), tmp_path / "images.npz"
    found = []
    for images in (wrong, wrong.reshape(8, 32, 64, 3)):
        np.savez(path, images=images, labels=np.arange(8) % 2)
        split = dataset.split("evaluation", path, CLASSES, CONTRACT, build)
        np.testing.assert_array_equal(split.images[0], CONTRACT.fit(images[0]))
        found.append(split.key)
    assert found[0] != found[1]


class Tokens(nn.Module):
    """A linear layer with a batch norm over tokens, which quantizing does not fold."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.head = nn.Linear(48, 32), nn.BatchNorm1d(16), nn.Linear(32, 2)

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.flatten(1).reshape(-1, 16, 48)
        scores: Tensor = self.head(torch.relu(self.norm(self.first(tokens))).mean(1))
        return scores


def test_a_norm_that_was_not_folded_is_not_taken_for_its_layer(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    np.savez(tmp_path / "i.npz", images=rng.integers(0, 256, (32, 16, 16, 3), dtype=np.uint8), labels=np.arange(32) % 2)
    build = Cache(tmp_path / "build")
    split = dataset.split("calibration", tmp_path / "i.npz", CLASSES, CONTRACT, build)
    torch.manual_seed(0)
    net = Tokens()
    assert net.norm.running_mean is not None
    net.norm.running_mean.sub_(3.0)
    model = FloatModel(Deployable(net, CONTRACT).eval(), CONTRACT, CLASSES, key="tokens")
    found = layers.compare(quantize(model, split, Scheme(), Quantization(), build), split.images[:])
    assert all(layer.own_sqnr_db is not None and layer.own_sqnr_db > 25 for layer in found)


def outside(manifest: dict[str, Any], bundle: Path) -> None:
    (bundle.parent / "outside").mkdir()
    shutil.copy(bundle / "model.onnx", bundle.parent / "outside/model.onnx")
    manifest["model"]["file"] = "../outside/model.onnx"


def no_hash(manifest: dict[str, Any], bundle: Path) -> None:
    manifest["files"]["model.onnx"] = 5


def too_few_classes(manifest: dict[str, Any], bundle: Path) -> None:
    manifest["classes"] = manifest["classes"][:2]


def peeping(manifest: dict[str, Any], bundle: Path) -> None:
    text = (bundle / "golden/expected.json").read_text().replace("golden-1.jpg", "../../../../../etc/passwd")
    replace(manifest, bundle, "golden/expected.json", text.encode())


def replace(manifest: dict[str, Any], bundle: Path, name: str, content: bytes) -> None:
    (bundle / name).write_bytes(content)
    manifest["files"][name] = {"sha256": hashlib.sha256(content).hexdigest(), "size_bytes": len(content)}


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (outside, "names a model that is not among its files"),
        (no_hash, "lists a file without its sha256"),
        (too_few_classes, "gives scores of shape (1, 3) for 2 classes"),
        (peeping, "which is not a file of the bundle"),
    ],
)
def test_a_foreign_bundle_is_refused_in_one_line(
    change: Callable[[dict[str, Any], Path], None], told: str, deployed: Project, tmp_path: Path
) -> None:
    bundle = Path(shutil.copytree(deployed.folder / "dist/small-onnxruntime-1.0.0", tmp_path / "bundle"))
    manifest = json.loads((bundle / "manifest.json").read_text())
    change(manifest, bundle)
    (bundle / "manifest.json").write_text(json.dumps(manifest))
    assert told in deployed.refused("verify", str(bundle), "--quick")
