"""ONNX files as a user has them: exported by PyTorch, or written node by node, in every form that bitferry reads."""

from collections.abc import Callable
from pathlib import Path
from typing import cast

import numpy as np
import onnx
import torch
from numpy.typing import NDArray
from onnx import ModelProto, TensorProto, helper, numpy_helper
from torch import Tensor, nn

from bitferry.device.preprocess import Preprocessing
from tests.conftest import Project, subset, write_project

SIZE, CLASSES = 16, 3
MEAN, STD = 0.3, 0.35
CONTRACT = Preprocessing(height=SIZE, width=SIZE, mean=(MEAN,) * 3, std=(STD,) * 3)
Array = NDArray[np.generic]


class Fitted(nn.Module):
    """Random convolutions with a residual addition, and a head that fits the training images by least squares."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.first_norm = nn.Conv2d(3, 24, 3, 2, 1, bias=False), nn.BatchNorm2d(24)
        self.second, self.second_norm = nn.Conv2d(24, 24, 3, 1, 1, bias=False), nn.BatchNorm2d(24)
        self.pool = nn.AvgPool2d(4)
        self.head = nn.Linear(96, CLASSES)
        for norm in (self.first_norm, self.second_norm):
            nn.init.uniform_(norm.weight, 0.5, 1.5)
            nn.init.uniform_(cast(Tensor, norm.running_var), 0.5, 1.5)
            nn.init.uniform_(norm.bias, -0.2, 0.2)

    def features(self, x: Tensor) -> Tensor:
        first = torch.relu(self.first_norm(self.first(x)))
        found: Tensor = self.pool(torch.relu(first + self.second_norm(self.second(first)))).flatten(1)
        return found

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.head(self.features(x))
        return found


def fitted() -> Fitted:
    """Give the model, fitted."""
    model = Fitted().eval()
    data = subset("train", 300)
    images = np.stack([CONTRACT.fit(image) for image in data["images"]]).transpose(0, 3, 1, 2)
    with torch.no_grad():
        found = model.features((torch.from_numpy(images) / 255 - MEAN) / STD)
        wanted = 8 * (torch.nn.functional.one_hot(torch.from_numpy(data["labels"]).long(), CLASSES) - 1 / CLASSES)
        rows = torch.cat([found, torch.ones(len(found), 1)], 1)
        solved = torch.linalg.lstsq(rows.T @ rows + torch.eye(rows.shape[1]), rows.T @ wanted).solution
        model.head.weight.copy_(solved[:-1].T)
        model.head.bias.copy_(solved[-1])
    return model


def exported(model: nn.Module, path: Path) -> None:
    """Export as a user would, batch dynamic."""
    batch = torch.export.Dim("batch")
    program = torch.onnx.export(
        model, (torch.zeros(2, 3, SIZE, SIZE),), dynamo=True, dynamic_shapes=({0: batch},), verbose=False
    )
    assert program is not None
    program.save(path, external_data=False)


def weights(model: Fitted) -> dict[str, Array]:
    """Give the folded weights by the names that `written` uses."""
    found: dict[str, Array] = {"w3": model.head.weight.detach().numpy(), "b3": model.head.bias.detach().numpy()}
    for place, (convolution, norm) in enumerate([(model.first, model.first_norm), (model.second, model.second_norm)]):
        factor = (norm.weight / torch.sqrt(cast(Tensor, norm.running_var) + norm.eps)).detach()
        found[f"w{place + 1}"] = (convolution.weight.detach() * factor[:, None, None, None]).numpy()
        found[f"b{place + 1}"] = norm.bias.detach().numpy()  # its mean is 0
    return found


def written(
    model: Fitted,
    *,
    batch: int | str = 1,
    last: bool = False,
    kind: int = TensorProto.FLOAT,
    opset: int = 17,
    maps: bool = False,
) -> ModelProto:
    """Write the graph node by node, its nodes without names; `last` has channels last, `maps` gives scores H×W."""
    floats = TensorProto.FLOAT16 if kind == TensorProto.FLOAT16 else TensorProto.FLOAT
    add = helper.make_node
    nodes, value = [], "image"
    if kind == TensorProto.UINT8:
        nodes += [add("Cast", [value], ["whole"], to=TensorProto.FLOAT), add("Mul", ["whole", "unit"], ["scaled"]),
                  add("Sub", ["scaled", "mean"], ["middle"]), add("Div", ["middle", "std"], ["ready"])]  # fmt: skip
        value = "ready"
    if last:
        nodes.append(add("Transpose", [value], ["first"], perm=[0, 3, 1, 2]))
        value = "first"
    nodes += [
        add("Conv", [value, "w1", "b1"], ["c1"], strides=[2, 2], pads=[1, 1, 1, 1]),
        add("Relu", ["c1"], ["r1"]),
        add("Conv", ["r1", "w2", "b2"], ["c2"], pads=[1, 1, 1, 1]),
        add("Add", ["r1", "c2"], ["sum"]),
        add("Relu", ["sum"], ["r2"]),
    ]
    constants = weights(model) | {"unit": np.array(1 / 255), "mean": np.array(MEAN), "std": np.array(STD)}
    if maps:
        constants |= {"w3": model.head.weight.detach().numpy()[:, :24, None, None], "sizes": np.array([1, 1, 2, 2])}
        nodes += [add("Conv", ["r2", "w3", "b3"], ["small"]), add("Resize", ["small", "", "sizes"], ["score"])]
    else:
        nodes += [add("AveragePool", ["r2"], ["p"], kernel_shape=[4, 4], strides=[4, 4]),
                  add("Reshape", ["p", "shape"], ["f"]), add("Gemm", ["f", "w3", "b3"], ["score"], transB=1)]  # fmt: skip
    tensors = [numpy_helper.from_array(np.asarray(one, helper.tensor_dtype_to_np_dtype(floats)), name)
               for name, one in constants.items()]  # fmt: skip
    tensors.append(numpy_helper.from_array(np.array([batch if isinstance(batch, int) else -1, 96]), "shape"))
    if maps:
        tensors = [numpy_helper.from_array(constants["sizes"].astype(np.float32), "sizes") if t.name == "sizes" else t
                   for t in tensors]  # fmt: skip
    shape = [batch, SIZE, SIZE, 3] if last else [batch, 3, SIZE, SIZE]
    given = helper.make_tensor_value_info("image", kind, shape)
    scores = [batch, CLASSES, SIZE, SIZE] if maps else [batch, CLASSES]
    graph = helper.make_graph(
        nodes, "given", [given], [helper.make_tensor_value_info("score", floats, scores)], tensors
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=8)


def changed(model: ModelProto, change: Callable[[ModelProto], object]) -> ModelProto:
    """Change a copy of a model."""
    copied = ModelProto()
    copied.CopyFrom(model)
    change(copied)
    return copied


def project(folder: Path, model: ModelProto | None = None, *changes: tuple[str, str]) -> Project:
    """Write a project whose recipe gives `model.onnx`."""
    made = write_project(folder)
    made.edit(("module:smallmodel:make", "onnx:model.onnx"), ('train = "train.npz"\n', ""), *changes)
    if model is not None:
        onnx.save(model, folder / "model.onnx")
    return made
