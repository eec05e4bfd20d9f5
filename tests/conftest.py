"""What several tests share: a small model of a user's own, a small data set, and the default recipe deployed once."""

import contextlib
import io
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pytest

from bitferry.pipeline import cli
from tests.board import board, sshd  # noqa: F401 - fixtures

ROOT = Path(__file__).parents[1]
EMBEDDED = ROOT / "calibration_data/fashion_mnist"
BITFERRY = Path(sys.executable).with_name("bitferry")

FACTORY = '''
"""A user's own model: two convolutions, a residual addition, a classifier."""
import torch
from torch import nn

class Small(nn.Module):
    def __init__(self, classes):
        super().__init__()
        self.first = nn.Sequential(nn.Conv2d(3, 16, 3, 2, 1, bias=False), nn.BatchNorm2d(16), nn.ReLU())
        self.second = nn.Sequential(nn.Conv2d(16, 16, 3, 1, 1, bias=False), nn.BatchNorm2d(16))
        self.head = nn.Linear(16, classes)
    def forward(self, x):
        x = self.first(x)
        x = torch.relu(x + self.second(x))
        return self.head(x.mean((2, 3)))

def make(classes=3):
    return Small(classes)
'''

RECIPE = """
name = "small"
version = "1.0.0"
precision = "int8"
classes = ["T-shirt", "Trouser", "Pullover"]
[model]
source = "module:smallmodel:make"
[preprocessing]
height = 16
width = 16
mean = [0.3, 0.3, 0.3]
std = [0.35, 0.35, 0.35]
[data]
train = "train.npz"
calibration = "calibration.npz"
evaluation = "evaluation.npz"
[training]
epochs = 6
batch_size = 32
learning_rate = 5e-3
[budget]
accuracy_drop_pp = 5.0
[targets.openvino]
"""


@dataclass(frozen=True)
class Project:
    """A folder as a user would have it: recipe, own model, data."""

    folder: Path

    @property
    def recipe(self) -> Path:
        return self.folder / "small.toml"

    def edit(self, *changes: tuple[str, str]) -> None:
        """Replace text in the recipe; a text that is not there is a mistake in the test."""
        text = self.recipe.read_text()
        for old, new in changes:
            assert old in text
            text = text.replace(old, new)
        self.recipe.write_text(text)

    def bitferry(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        """Run the command line in this folder: its own `main`, in this process to be spared importing torch."""
        stdout, stderr, before = io.StringIO(), io.StringIO(), Path.cwd()
        handler, argv, sys.argv = signal.getsignal(signal.SIGINT), sys.argv, ["bitferry", *arguments]
        os.chdir(self.folder)
        try:
            with contextlib.redirect_stdout(stdout), contextlib.redirect_stderr(stderr):
                cli.main()
        except SystemExit as stop:
            code = stop.code if isinstance(stop.code, int) else 0 if stop.code is None else 1
        finally:
            os.chdir(before)
            sys.argv = argv
            signal.signal(signal.SIGINT, handler)
        return subprocess.CompletedProcess(arguments, code, stdout.getvalue(), stderr.getvalue())

    def bitferry_process(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        """Run the command line in this folder as a user does, in a process of its own."""
        return subprocess.run([BITFERRY, *arguments], cwd=self.folder, capture_output=True, text=True, check=False)

    def refused(self, *arguments: str) -> str:
        """Run a command that must end with 2 and one line of error; return the line."""
        done = self.bitferry(*arguments)
        assert done.returncode == 2, done.stderr
        lines = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
        assert len(lines) == 1, done.stderr
        assert "Traceback" not in done.stderr
        assert done.stderr.splitlines()[-1] == lines[0]
        assert done.stdout == ""
        return lines[0]


def half_made(build: Path, stage: str) -> list[Path]:
    """List the hidden folders of a stage that did not end; the lock of one that failed stays for who waits for it."""
    return [one for one in build.glob(f".{stage}-*") if one.is_dir()]


def subset(
    split: str, count: int, *, classes: int = 3, skip: int = 0
) -> dict[str, np.ndarray[tuple[int, ...], np.dtype[np.uint8]]]:
    """Take real images of the first classes out of an embedded split."""
    with np.load(EMBEDDED / f"{split}.npz") as arrays:
        images, labels = arrays["images"], arrays["labels"]
    chosen = np.flatnonzero(labels < classes)[skip : skip + count]
    return {"images": images[chosen], "labels": labels[chosen]}


def write_project(folder: Path) -> Project:
    """Write the small project into an empty folder."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "smallmodel.py").write_text(FACTORY)
    (folder / "small.toml").write_text(RECIPE)
    np.savez(folder / "train.npz", **subset("train", 960))  # type: ignore[arg-type]
    np.savez(folder / "calibration.npz", **subset("calibration", 64))  # type: ignore[arg-type]
    np.savez(folder / "evaluation.npz", **subset("evaluation", 600))  # type: ignore[arg-type]
    return Project(folder)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with the tests that take minutes, for the processes to end together."""
    items.sort(key=lambda item: item.get_closest_marker("slow") is None)


@pytest.fixture
def project(tmp_path: Path) -> Project:
    return write_project(tmp_path / "project")


@pytest.fixture(scope="session")
def deployed(tmp_path_factory: pytest.TempPathFactory) -> Project:
    """The small project after `bitferry deploy` to both targets; tests must not change it."""
    made = write_project(tmp_path_factory.mktemp("deployed") / "project")
    done = made.bitferry("deploy", "small.toml", "--target", "openvino,onnxruntime", "--quick", "--json")
    assert done.returncode == 0, done.stderr
    (made.folder / "verdicts.json").write_text(done.stdout)
    (made.folder / "stderr.txt").write_text(done.stderr)
    return made


@pytest.fixture(scope="session")
def bare(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An environment with the two runtimes, Pillow and cryptography, and nothing else of ours."""
    folder = tmp_path_factory.mktemp("bare") / "venv"
    uv = Path(sys.executable).with_name("uv")
    packages = [f"{name}=={version(name)}" for name in ("openvino", "onnxruntime", "numpy", "pillow", "cryptography")]
    environment = plain_environment(VIRTUAL_ENV=str(folder))
    subprocess.run([uv, "venv", "--quiet", "--python", sys.executable, folder], check=True, env=environment)
    subprocess.run([uv, "pip", "install", "--quiet", *packages], check=True, env=environment)
    return folder / "bin/python"


@contextlib.contextmanager
def begun(command: list[str | Path], stage: str, project: Project) -> Iterator[subprocess.Popen[str]]:
    """Start a command in a session of its own, and go on as soon as it says that `stage` began."""
    with subprocess.Popen(
        command,
        cwd=project.folder,
        stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        text=True,
        start_new_session=True,
    ) as running:
        assert running.stderr is not None
        for line in running.stderr:
            if line.startswith(stage) and line.rstrip().endswith("…"):
                break
        else:
            raise AssertionError(f"the run ended without beginning {stage}")
        yield running


def verdicts(project: Project) -> dict[str, dict[str, object]]:
    """Read what the deployment printed, by target."""
    return {verdict["target"]: verdict for verdict in json.loads((project.folder / "verdicts.json").read_text())}


def plain_environment(**more: str) -> dict[str, str]:
    """Copy this environment without what make and pytest put in it."""
    return {k: v for k, v in os.environ.items() if not k.startswith(("MAKE", "MFLAGS", "PYTEST"))} | more
