"""What a float model must give: scores of each image alone, which chance and the batch leave as they are."""

from pathlib import Path

import pytest
import torch

from bitferry.device.errors import InputError
from bitferry.pipeline.load import load
from tests.test_load import of

NETS = """
import torch
from torch import nn
from torch.nn import functional as F


class Net(nn.Module):
    def __init__(self, kind):
        super().__init__()
        torch.manual_seed(0)
        self.kind = kind
        self.stem, self.second, self.head = nn.Conv2d(3, 8, 3, 2, 1), nn.Conv2d(8, 8, 3, 2, 1), nn.Linear(8, 10)
        self.free, self.normal = nn.BatchNorm2d(8, track_running_stats=False), nn.BatchNorm2d(8)
        self.drop, self.group = nn.Dropout(0.5), nn.GroupNorm(2, 8)
        self.attention = nn.TransformerEncoderLayer(8, 2, 16)

    def forward(self, x):
        y = F.relu(self.stem(x))
        match self.kind:
            case "dropout":
                y = F.dropout(y, 0.3)
            case "monte carlo":
                y = self.drop.train()(y)
            case "noise":
                y = y + 0.01 * torch.randn_like(y)
            case "free norm":
                y = self.free(y)
            case "training norm":
                y = F.batch_norm(y, None, None, training=True)
            case "batch mean":
                y = y - y.mean(0, keepdim=True)
            case "after":
                y = y.cumsum(0)
            case "largest":
                y = y / y.abs().max()
            case "count":
                y = y / x.shape[0]
            case "norm":
                y = self.group(self.normal(y))
        y = F.relu(self.second(y))
        match self.kind:
            case "tokens" | "tokens in the wrong order":
                order = (2, 0, 1) if self.kind == "tokens" else (0, 2, 1)
                back = (1, 2, 0) if self.kind == "tokens" else (0, 2, 1)
                y = self.attention(y.flatten(2).permute(order)).permute(back).reshape(y.shape)
            case "windows":
                n, c, h, w = y.shape
                t = y.view(n, c, h // 2, 2, w // 2, 2).permute(0, 2, 4, 1, 3, 5).reshape(-1, c, 2, 2)
                t = (t + t.mean((2, 3), keepdim=True)).view(n, h // 2, w // 2, c, 2, 2)
                y = t.permute(0, 3, 1, 4, 2, 5).reshape(n, c, h, w)
            case "one image":
                y = y.reshape(1, 8, 8, 8)
        scores = self.head(y.mean((2, 3)))
        forms = {"two": (scores, y), "named": {"scores": scores}, "text": scores[:, None].repeat(1, 5, 1),
                 "half": scores.half(), "number": scores.argmax(1), "single": scores[:, :1]}
        return forms.get(self.kind, scores)


def make(kind, dtype="float32"):
    return Net(kind).to(getattr(torch, dtype))


def channels(count, side=0):
    end = nn.Linear(4 * (side - 2) ** 2, 10) if side else nn.Linear(4, 10)
    return nn.Sequential(nn.Conv2d(count, 4, 3), nn.Identity() if side else nn.AdaptiveAvgPool2d(1), nn.Flatten(), end)


class Casting(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 10, 32)

    def forward(self, x):
        return self.stem(x.half()).flatten(1)
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("nets")
    (made / "strangernets.py").write_text(NETS)
    return made


@pytest.mark.parametrize(
    ("kind", "told"),
    [
        ("dropout", r"other scores each time: bernoulli_\S+, strangernets.py line \d+: y = F.dropout\(y, 0.3\) is random"),
        ("monte carlo", r"'drop' \(Dropout\), .*: y = self.drop.train\(\)\(y\) is random"),
        ("noise", r"randn_like.*: y = y \+ 0.01 \* torch.randn_like\(y\) is random"),
        ("free norm", r"answer depends on the others in its batch: layer 'free' \(BatchNorm2d\), native_batch_norm"),
        ("training norm", r"batch: layer native_batch_norm.*: y = F.batch_norm\(y, None, None, training=True\)"),
        ("batch mean", r"batch: layer mean.*: y = y - y.mean\(0, keepdim=True\)"),
        ("after", r"batch: layer cumsum.*: y = y.cumsum\(0\)"),
        ("largest", r"batch: layer \S+, strangernets.py line \d+: y = y / y.abs\(\).max\(\)"),
        ("tokens in the wrong order", r"batch: layer 'attention.self_attn' \(MultiheadAttention\)"),
        ("count", "other scores alone than beside another"),
        ("two", r"gives a tuple of 2: 2×10, 2×8×8×8 for 2 images.*wrap it in a factory of your own"),
        ("named", r"gives a dict of 1: scores 2×10 for 2 images"),
        ("text", r"gives \(2, 5, 10\) for 2 images.*no text \(N×T×K\), no boxes \(N×C×A\)"),
        ("half", "gives scores in float16; float32 was expected: take casts to float16 out of it"),
        ("number", r"gives \(2,\) for 2 images.*argmax"),
        ("single", r"gives \(2, 1\) for 2 images.*of one score for two classes make two"),
    ],
)  # fmt: skip
def test_what_chance_or_the_batch_decides_is_refused_by_its_layer(folder: Path, kind: str, told: str) -> None:
    with pytest.raises(InputError, match=told):
        load(of("module:strangernets:make", options={"kind": kind}), None, folder=folder)


@pytest.mark.parametrize("kind", ["plain", "norm", "tokens", "windows"])
def test_what_mixes_no_images_is_taken(folder: Path, kind: str) -> None:
    load(of("module:strangernets:make", options={"kind": kind}), None, folder=folder)


def test_a_model_of_one_image_at_a_time_is_taken_and_said_so(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    load(of("module:strangernets:make", options={"kind": "one image"}), None, folder=folder)
    assert "takes one image at a time; with two: RuntimeError: shape '[1, 8, 8, 8]'" in capsys.readouterr().err


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float64"])
def test_weights_of_other_widths_are_made_float32_and_said_so(
    folder: Path, dtype: str, capsys: pytest.CaptureFixture[str]
) -> None:
    model = load(of("module:strangernets:make", options={"kind": "plain", "dtype": dtype}), None, folder=folder)
    assert {tensor.dtype for tensor in model.module().parameters()} == {torch.float32}
    assert f"has weights in {dtype}; made float32, it is the float model" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("source", "options", "told"),
    [
        ("channels", {"count": 1}, r"takes images of 1 channel.*model\(x.mean\(1, keepdim=True\)\)"),
        ("channels", {"count": 4}, "takes images of 4 channels, and bitferry gives every model 3"),
        ("channels", {"count": 1, "side": 28}, "takes images of 28×28 of 1 channel"),
        ("channels", {"count": 3, "side": 28}, "it takes 28×28: set preprocessing height = 28, width = 28"),
        ("Casting", {}, "take casts to Half out of the model's code"),
    ],
)
def test_what_a_model_takes_instead_is_told(folder: Path, source: str, options: dict[str, int], told: str) -> None:
    with pytest.raises(InputError, match=told):
        load(of(f"module:strangernets:{source}", options=options), None, folder=folder)
