"""Model sources and weights: every kind loads, every misfit is named, nothing in a checkpoint is run."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
import torchvision
from safetensors.torch import save_file

from bitferry.device.errors import InputError
from bitferry.pipeline import checkpoint, recipe
from bitferry.pipeline.load import load
from tests.conftest import ROOT, Project

Recipe = recipe.Recipe


def of(source: str, classes: int = 10, size: int = 32, options: dict[str, Any] | None = None) -> Recipe:
    return Recipe.model_validate(
        {
            "name": "test",
            "classes": classes,
            "model": {"source": source, "options": options or {}},
            "preprocessing": {"height": size, "width": size, "mean": [0.4, 0.5, 0.6], "std": [0.2, 0.25, 0.3]},
            "data": {"calibration": "c", "evaluation": "e"},
        }
    )


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(1)
    folder = tmp_path_factory.mktemp("weights")
    state = torchvision.models.resnet18(num_classes=10).state_dict()
    torch.save(state, folder / "weights.pth")
    torch.save({"epoch": 3, "state_dict": {f"module.{k}": v for k, v in state.items()}}, folder / "wrapped.pth")
    save_file(state, folder / "weights.safetensors")
    (folder / "safetensors.jpg").write_bytes((folder / "weights.safetensors").read_bytes())
    return folder


def test_the_contract_is_inside_the_graph(weights: Path) -> None:
    model = load(of("torchvision:resnet18"), weights / "weights.pth")
    images = np.random.default_rng(0).integers(0, 256, (3, 32, 32, 3), dtype=np.uint8)
    plain = torchvision.models.resnet18(num_classes=10).eval()
    plain.load_state_dict(torch.load(weights / "weights.pth", weights_only=True))
    mean, std = torch.tensor([0.4, 0.5, 0.6]), torch.tensor([0.2, 0.25, 0.3])
    by_hand = ((torch.from_numpy(images).float() / 255 - mean) / std).permute(0, 3, 1, 2)
    with torch.no_grad():
        torch.testing.assert_close(model.module()(torch.from_numpy(images)), plain(by_hand), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", ["wrapped.pth", "weights.safetensors", "safetensors.jpg"])
def test_every_way_to_store_a_state_dict_gives_the_same_model(weights: Path, name: str) -> None:
    images = torch.randint(0, 256, (2, 32, 32, 3), dtype=torch.uint8)
    with torch.no_grad():
        expected = load(of("torchvision:resnet18"), weights / "weights.pth").module()(images)
        found = load(of("torchvision:resnet18"), weights / name).module()(images)
    torch.testing.assert_close(found, expected, atol=0, rtol=0)


def test_timm_and_own_code(project: Project) -> None:
    assert load(of("timm:resnet10t"), None).module().training is False
    assert load(of("module:smallmodel:make", classes=3), None, folder=project.folder).key
    wider = load(of("module:smallmodel:make", classes=4, options={"classes": 4}), None, folder=project.folder)
    assert wider.module()(torch.zeros(2, 32, 32, 3, dtype=torch.uint8)).shape == (2, 4)


def test_an_exported_program_needs_trust(tmp_path: Path) -> None:
    plain = timm.create_model("resnet10t", num_classes=10).eval()
    batch = {0: torch.export.Dim.DYNAMIC}
    torch.export.save(
        torch.export.export(plain, (torch.zeros(2, 3, 32, 32),), dynamic_shapes=(batch,)), tmp_path / "model.pt2"
    )
    with pytest.raises(InputError, match="can run code when it is loaded; pass --trust"):
        load(of("pt2:model.pt2"), None, folder=tmp_path)
    model = load(of("pt2:model.pt2"), None, folder=tmp_path, trust=True)
    assert model.module()(torch.zeros(5, 32, 32, 3, dtype=torch.uint8)).shape == (5, 10)
    (tmp_path / "broken.pt2").write_bytes(b"PK no")
    with pytest.raises(InputError, match="broken.pt2 is not an exported program"):
        load(of("pt2:broken.pt2"), None, folder=tmp_path, trust=True)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("torchvision:resnet81", r"no image classifier called 'resnet81', did you mean 'torchvision:resnet18'\?"),
        ("torchvision:fcn_resnet50", "no image classifier called 'fcn_resnet50'"),
        ("timm:resnt10t", r"did you mean 'timm:resnet10t'\?"),
        ("module:nowhere:make", "cannot be imported .*No module named 'nowhere'"),
        ("module:json:make", "cannot be imported .*has no attribute 'make'"),
        ("module:json", "names no function; expected module:package.file:function"),
        ("module:json:dumps", "cannot be built with {}: "),
    ],
)
def test_an_unknown_source_is_named(source: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        load(of(source), None)


def test_options_that_the_constructor_does_not_know_are_told() -> None:
    with pytest.raises(InputError, match="cannot be built with {'depth': 3}.*unexpected keyword argument 'depth'"):
        load(of("torchvision:resnet18", options={"depth": 3}), None)


def test_a_state_dict_of_another_model_lists_what_differs(weights: Path) -> None:
    with pytest.raises(InputError) as caught:
        load(of("torchvision:resnet50"), weights / "weights.pth")
    text = str(caught.value)
    assert "is not a state dict of this model" in text
    assert "missing: layer1.0.conv3.weight" in text
    assert "misshapen: layer1.0.conv1.weight [64, 64, 3, 3] where the model has [64, 64, 1, 1]" in text
    assert "more" in text
    assert len(text) < 1500


def test_another_class_count_is_told(weights: Path) -> None:
    with pytest.raises(InputError, match=r"fc.weight \[10, 512\] where the model has \[7, 512\]"):
        load(of("torchvision:resnet18", classes=7), weights / "weights.pth")


def test_a_model_that_does_not_give_a_score_per_class_is_told() -> None:
    with pytest.raises(InputError, match=r"gives \(2, 5\) for 2 images; the recipe has 10 classes"):
        load(of("torchvision:resnet18", options={"num_classes": 5}), None)


ENDINGS = """
from torch import nn

def softmax(classes=10):
    return nn.Sequential(nn.Flatten(), nn.Linear(3072, classes), nn.Softmax(1))

def pooled(classes=10):
    return nn.Sequential(nn.Conv2d(3, classes, 1), nn.AdaptiveAvgPool2d(1))
"""


def test_endings_that_are_no_scores_are_told_with_a_way_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "endings.py").write_text(ENDINGS)
    load(of("module:endings:softmax"), None, folder=tmp_path)
    assert "the scores add up to 1, as of a softmax; give the model without it" in capsys.readouterr().err
    with pytest.raises(InputError, match=r"gives \(2, 10, 1, 1\) for 2 images.*; end the model with .flatten\(1\)"):
        load(of("module:endings:pooled"), None, folder=tmp_path)


def test_files_that_are_no_state_dict_are_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"the weights .*nowhere.pth do not exist"):
        checkpoint.read(tmp_path / "nowhere.pth")
    with pytest.raises(InputError, match=r"the weights .* are no file"):
        checkpoint.read(tmp_path)
    torch.save([1, 2], tmp_path / "list.pt")
    with pytest.raises(InputError, match=r"list.pt holds a list of 2, expected a state dict"):
        checkpoint.read(tmp_path / "list.pt")


def test_an_average_of_parameters_alone_takes_the_statistics_beside_it(tmp_path: Path) -> None:
    plain = torch.nn.BatchNorm2d(2).state_dict() | {"running_mean": torch.tensor([1.0, 2.0])}
    averaged = {"weight": torch.tensor([3.0, 4.0]), "bias": torch.zeros(2)}
    torch.save({"model": plain, "model_ema": averaged, "epoch": 3}, tmp_path / "w.pth")
    read = checkpoint.read(tmp_path / "w.pth")
    assert read["weight"].tolist() == [3.0, 4.0]
    assert read["running_mean"].tolist() == [1.0, 2.0]


def test_tensors_that_share_their_memory_are_read_as_two(tmp_path: Path) -> None:
    whole = torch.arange(12.0)
    torch.save({"z": whole[:6], "a": whole[3:9].view(2, 3).T, "same": whole[:6]}, tmp_path / "shared.pt")
    found = checkpoint.read(tmp_path / "shared.pt")
    assert list(found) == ["z", "a", "same"]
    torch.testing.assert_close(found["a"], whole[3:9].view(2, 3).T)
    found["z"].zero_()
    torch.testing.assert_close(found["same"], whole[:6])


HELPED = "import torch\nimport helper\n\ndef make():\n    return helper.Net()\n"
HELPER = """
import torch
class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = torch.nn.Linear(3, 2)
    def forward(self, x):
        return self.fc(x.mean((2, 3))) * SCALE
SCALE = 1.0
"""


def test_an_edit_in_any_file_of_one_s_own_model_is_a_new_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", list(sys.path))
    keys = []
    for text in (HELPER, HELPER, HELPER.replace("1.0", "2.0")):
        for name in ("helped", "helper"):
            monkeypatch.delitem(sys.modules, name, raising=False)
        (tmp_path / "helped.py").write_text(HELPED)
        (tmp_path / "helper.py").write_text(text)
        torch.manual_seed(0)
        keys.append(load(of("module:helped:make", classes=2), None, folder=tmp_path).key)
    assert keys[0] == keys[1] != keys[2]


MINE = """
import targets
import pipeline
from device import pick

def make():
    assert targets.OUTPUTS == pick()
    return pipeline.Net()
"""


def test_a_model_may_have_modules_of_our_folders_names(tmp_path: Path) -> None:
    """In a process of its own, where nobody else has imported such names."""
    (tmp_path / "targets").mkdir()
    (tmp_path / "targets/__init__.py").write_text("OUTPUTS = 2\n")
    (tmp_path / "device.py").write_text("def pick():\n    return 2\n")
    (tmp_path / "pipeline.py").write_text(HELPER)
    (tmp_path / "mine.py").write_text(MINE)
    program = (
        "import sys; from pathlib import Path; from bitferry import device, targets; "
        "from bitferry.pipeline.load import load, own_code; from tests.test_load import of; "
        "recipe, folder = of('module:mine:make', classes=2), Path(sys.argv[1]); load(recipe, None, folder=folder); "
        "assert targets.names(); print(*sorted(own_code(recipe, folder)))"
    )
    command: list[str | Path] = [sys.executable, "-c", program, tmp_path]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "device.py mine.py pipeline.py targets/__init__.py\n"


def test_another_module_of_the_same_name_is_not_taken_for_the_recipe_s(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "path", list(sys.path))
    for name, text in (("a", ""), ("b", ""), ("c", "# another\n")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "helped.py").write_text(HELPED + text)
        (tmp_path / name / "helper.py").write_text(HELPER)
    for name in ("helped", "helper"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    for name in ("a", "b"):
        load(of("module:helped:make", classes=2), None, folder=tmp_path / name)
    with pytest.raises(InputError, match="the module 'helped' was imported from .*a/helped.py, so .*c/helped.py"):
        load(of("module:helped:make", classes=2), None, folder=tmp_path / "c")


@pytest.mark.parametrize(
    ("code", "message"),
    [
        ("raise RuntimeError('boom')", "cannot be imported .*RuntimeError: boom"),
        ("import sys; sys.exit(0)", "cannot be imported .*SystemExit: 0"),
        ("def make(:", "cannot be imported .*SyntaxError"),
        ("def make(): return [][0]", "cannot be built with {}: IndexError"),
        ("def make(): return 3", "gave a int, expected a torch.nn.Module"),
        ("def make(size): pass", "cannot be built with {}: TypeError: .*missing 1 required"),
        (
            "import torch\nclass N(torch.nn.Module):\n  def forward(self, x): return x.nothing\ndef make(): return N()",
            "cannot take 2 images of 32×32: AttributeError",
        ),
    ],
)
def test_whatever_the_user_s_code_raises_is_told_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: str, message: str
) -> None:
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.delitem(sys.modules, "wild", raising=False)
    (tmp_path / "wild.py").write_text(code)
    with pytest.raises(InputError, match=message) as caught:
        load(of("module:wild:make"), None, folder=tmp_path)
    assert "\n" not in str(caught.value)
