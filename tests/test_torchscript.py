"""TorchScript: frozen files that answer exactly as traced, without torchao; and the small model of three targets' tests."""

import hashlib
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import targets
from device.arrays import Images, Outputs
from device.errors import InputError, StageFailed
from device.preprocess import Preprocessing
from pipeline.artifacts import FloatModel, Program, Split
from pipeline.cache import Cache
from pipeline.quantize import quantize
from pipeline.recipe import Quantization
from pipeline.statistics import sqnr_db
from pipeline.trace import trace
from pipeline.verify import eager
from targets import Layer, Precision
from tests.conftest import subset

torchscript = targets.get("torchscript")
Options: Callable[..., targets.Options] = torchscript.Options
LAYERS = ["stem.0", "deep.0", "deep.3", "head"]
PRECISIONS: tuple[Precision, ...] = ("float32", "int8")


class Small(nn.Module):
    """What runtimes fuse differently: ReLU6, max pooling, a depthwise convolution, a residual addition, a global mean."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 16, 3, 2, 1, bias=False), nn.BatchNorm2d(16), nn.ReLU6())
        self.pool = nn.MaxPool2d(2)
        depthwise = [nn.Conv2d(16, 16, 3, 1, 1, groups=16, bias=False), nn.BatchNorm2d(16), nn.ReLU6()]
        self.deep = nn.Sequential(*depthwise, nn.Conv2d(16, 16, 1))
        self.mean = nn.AdaptiveAvgPool2d(1)
        self.head = nn.Linear(16, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.pool(self.stem(x))
        x = x + self.deep(x)
        scores: Tensor = self.head(self.mean(x).flatten(1))
        return scores


def float_model(model: nn.Module, images: Images) -> FloatModel:
    """Wrap `model` as a recipe would, its batch norms having seen `images`."""
    from pipeline.load import Deployable  # noqa: PLC0415

    contract = Preprocessing(*images.shape[1:3], mean=(0.3, 0.3, 0.3), std=(0.35, 0.35, 0.35))
    whole = Deployable(model, contract)
    with torch.no_grad():
        for _ in range(20):
            whole.train()(torch.from_numpy(images))
    return FloatModel(whole.eval(), contract, tuple("0123456789"), "small")


def split() -> Split:
    images = subset("calibration", 48)["images"]
    return Split("calibration", images, np.zeros(48, np.int64), ("",) * 48, (b"",) * 48, "calibration")


def program(precision: Precision, target: targets.Target[targets.Options], build: Cache) -> Program:
    """Give the small model as a target wants it."""
    torch.manual_seed(0)
    model, scheme = float_model(Small(), split().images), target.SCHEMES[precision]
    return quantize(model, split(), scheme, Quantization(), build) if scheme else model


def answers(made: Program, count: int = 9) -> tuple[Images, Outputs]:
    images = split().images[-count:].copy()
    return images, eager(made.module())(images)
