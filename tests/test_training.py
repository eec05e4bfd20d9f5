"""Training: what it starts from, learns, keeps, records, and that it goes on exactly where it was killed."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchvision
from numpy.typing import NDArray
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from bitferry.device.errors import InputError, StageFailed, TargetUnavailable
from bitferry.device.preprocess import Preprocessing
from bitferry.pipeline import cache
from bitferry.pipeline.artifacts import Weights
from bitferry.pipeline.figures import Change
from bitferry.pipeline.judge import _recorded
from bitferry.pipeline.load import Deployable
from bitferry.pipeline.nightly.inputs import _settings
from bitferry.pipeline.recipe import Recipe, read
from bitferry.pipeline.run import Run
from bitferry.pipeline.train import train
from bitferry.pipeline.training import batch, freezing, holdout, losses, machine, start
from bitferry.pipeline.training.optimizer import Average, optimizer, schedule
from bitferry.pipeline.training.record import Record
from bitferry.pipeline.training.settings import Training
from tests.conftest import EMBEDDED, FACTORY, ROOT, Project, subset, write_project

KILLED = """
import sys
from bitferry.pipeline import cli
from bitferry.pipeline.training import course
course.SECONDS = float(sys.argv.pop(1))
cli.main()
"""
FIVE = [
    ('["T-shirt", "Trouser", "Pullover"]', '["a", "b", "c", "d", "e"]'),
    ('source = "module:smallmodel:make"', 'source = "module:smallmodel:make"\noptions = {classes = 5}'),
]
QUICK = [("epochs = 6", "epochs = 2"), ("batch_size = 32", "batch_size = 64")]


@pytest.fixture(scope="module", autouse=True)
def alone() -> Iterator[None]:
    """Train on one CPU: with models this small, threads that wait for each other take longer than they save."""
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {sorted(before)[os.getpid() % len(before)]})
    yield
    os.sched_setaffinity(0, before)


def made(project: Project, *edits: tuple[str, str]) -> tuple[Recipe, Run]:
    project.edit(*edits)
    recipe = read(project.recipe)
    return recipe, Run(recipe, project.recipe, cache.Cache(project.folder / "build/small"))


def taught(project: Project, *edits: tuple[str, str], processes: int = 1) -> Weights:
    """Train the small project's model, with one thread: on few images more are slower."""
    recipe, run = made(project, *edits)
    return train(recipe, run.training, run.build, folder=project.folder, processes=processes)


def of(project: Project, name: str, code: str) -> None:
    """Give the project another model; in this process a module is imported once, so each has a name of its own."""
    (project.folder / f"{name}.py").write_text(code)
    project.edit(("module:smallmodel:make", f"module:{name}:make"))


def told(weights: Weights) -> list[dict[str, float]]:
    return [json.loads(line) for line in weights.path.with_name("metrics.jsonl").read_text().splitlines()]


def percents(weights: Weights) -> list[float]:
    return [line["validation/top-1"] for line in told(weights) if "validation/top-1" in line]


DEEP = """
from torch import nn

def block(before, after):
    return nn.Sequential(nn.Conv2d(before, after, 3, 1, 1), nn.GroupNorm(4, after), nn.ReLU(), nn.MaxPool2d(2))

def make(classes=3):
    body = block(3, 32), block(32, 32), block(32, 64), nn.Flatten(), nn.Linear(256, 64), nn.ReLU()
    return nn.Sequential(*body, nn.Linear(64, classes))
"""


@pytest.fixture(scope="module")
def deep(tmp_path_factory: pytest.TempPathFactory) -> Weights:
    """Give a deeper model's weights, trained on the first five classes."""
    project = write_project(tmp_path_factory.mktemp("deep") / "project")
    np.savez(project.folder / "train.npz", **subset("train", 2000, classes=5))  # type: ignore[arg-type]
    project.edit(*FIVE)
    of(project, "deepmodel", DEEP)
    return taught(project, ("epochs = 6", "epochs = 4"), ("learning_rate = 5e-3", "learning_rate = 2e-3"))


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Project, Weights]:
    """Give a project whose model was trained on its first five classes; tests must not change it."""
    project = write_project(tmp_path_factory.mktemp("five") / "project")
    np.savez(project.folder / "train.npz", **subset("train", 1200, classes=5))  # type: ignore[arg-type]
    return project, taught(project, *FIVE, ("epochs = 6", "epochs = 8\nprecision = 'float32'"))


def of_classes(first: int, count: int) -> dict[str, NDArray[np.uint8]]:
    """Take training images of three classes from `first` on, with labels from 0."""
    with np.load(EMBEDDED / "train.npz") as arrays:
        images, labels = arrays["images"], arrays["labels"]
    chosen = np.flatnonzero((labels >= first) & (labels < first + 3))[:count]
    return {"images": images[chosen], "labels": labels[chosen] - first}


class TestStart:
    def test_a_fine_tune_learns_more_from_few_images_than_a_training_from_scratch(
        self, deep: Weights, project: Project
    ) -> None:
        of(project, "deepmodel", DEEP)
        np.savez(project.folder / "train.npz", **of_classes(2, 200))  # type: ignore[arg-type]
        project.edit(("batch_size = 32", "batch_size = 20\nprecision = 'float32'\nvalidation = 0.5"))
        scratch = [taught(project, ("epochs = 6", "epochs = 3"))]
        scratch += [taught(project, ("learning_rate = 5e-3", "learning_rate = 1e-3"))]
        begun = f"epochs = 3\nstart = '{deep.path}'\nfreeze = ['backbone']"
        frozen = taught(project, ("epochs = 3", begun), ("learning_rate = 1e-3", "learning_rate = 0.05"))
        thaw = ("freeze = ['backbone']", "freeze = ['backbone']\nunfreeze = 2\nbackbone_learning_rate = 0.05")
        thawed = taught(project, thaw)
        best = max(percents(one)[-1] for one in scratch)
        assert percents(frozen)[-1] > best + 5
        assert percents(thawed)[-1] > best + 5
        before, after, free = (load_file(one.path) for one in (deep, frozen, thawed))
        assert {name for name, tensor in after.items() if not torch.equal(tensor, before[name])} == {
            "6.weight",
            "6.bias",
        }
        assert not torch.equal(free["0.0.weight"], before["0.0.weight"])

    def test_statistics_of_frozen_batch_norms_stay(self, trained: tuple[Project, Weights], project: Project) -> None:
        begun = f"epochs = 2\nstart = '{trained[1].path}'\nfreeze = ['first']"
        frozen = load_file(taught(project, *QUICK, ("epochs = 2", begun)).path)
        before = load_file(trained[1].path)
        same = {name for name, tensor in frozen.items() if name in before and torch.equal(tensor, before[name])}
        assert same == {name for name in before if name.startswith("first.")}

    def test_the_head_is_named_and_all_else_must_match(
        self, trained: tuple[Project, Weights], capsys: pytest.CaptureFixture[str]
    ) -> None:
        state = load_file(trained[1].path)
        model = nn.Sequential()
        model.add_module("first", nn.Linear(3, 3))
        with pytest.raises(InputError, match="is not a state dict of this model: 2 missing: first.weight, first.bias"):
            start.fit(model, state, Path("w"))
        small = torchvision.models.resnet18(num_classes=3)
        other = torchvision.models.resnet18(num_classes=7).state_dict()
        assert start.fit(small, other, Path("w")) == ("fc.weight", "fc.bias")
        assert "fc.weight starts anew ([7, 512] in the file, [3, 512] here)" in capsys.readouterr().err
        assert torch.equal(small.conv1.weight, other["conv1.weight"])
        wrapped = {f"model.{name}": tensor for name, tensor in other.items()}
        assert start.fit(small, wrapped, Path("w")) == ("fc.weight", "fc.bias")
        assert start.head(small, ("fc.weight", "fc.bias")) == start.head(small, ()) == ("fc",)
        vit = torchvision.models.VisionTransformer(16, 8, 1, 2, 8, 16, num_classes=3)
        larger = torchvision.models.VisionTransformer(32, 8, 1, 2, 8, 16, num_classes=5).state_dict()
        new = start.fit(vit, {f"model.{name}": tensor for name, tensor in larger.items()}, Path("w"))
        assert start.head(vit, new) == ("encoder.pos_embedding", "heads.head")
        with pytest.raises(InputError, match="it is of another model"):
            start.fit(nn.Linear(4, 4), nn.Linear(5, 5).state_dict(), Path("w"))

    def test_a_library_s_weights_come_from_its_cache_and_are_fetched_only_if_allowed(
        self, project: Project, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        monkeypatch.setenv("TORCH_HOME", str(tmp_path / "hub"))
        monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
        recipe, _ = made(project, ("epochs = 6", "epochs = 6\nstart = 'torchvision:IMAGENET1K_V1'"))
        with pytest.raises(InputError, match="is for a model of torchvision, and model.source is 'module:"):
            start.find(recipe, download=False)
        recipe, _ = made(project, ("module:smallmodel:make", "torchvision:resnet18"))
        with pytest.raises(InputError, match=r"resnet18 are not at .*resnet18-f37072fd.pth; pass --download"):
            start.find(recipe, download=False)
        place = tmp_path / "hub/hub/checkpoints/resnet18-f37072fd.pth"
        place.parent.mkdir(parents=True)
        torch.save(torchvision.models.resnet18().state_dict(), place)
        assert start.find(recipe, download=False) == place
        assert "was trained with mean = [0.485, 0.456, 0.406]" in capsys.readouterr().err
        recipe, _ = made(project, ("IMAGENET1K_V1", "IMAGENET9"))
        with pytest.raises(InputError, match="no weights 'IMAGENET9' of resnet18; it has IMAGENET1K_V1, and DEFAULT"):
            start.find(recipe, download=False)
        recipe, _ = made(project, ("torchvision:IMAGENET9", "timm:pretrained"), ("torchvision:res", "timm:res"))
        with pytest.raises(InputError, match="the weights timm:pretrained of resnet18 are not in .*; pass --download"):
            start.find(recipe, download=False)
        recipe, _ = made(project, ("timm:pretrained", "absent.pth"))
        with pytest.raises(InputError, match="training.start: the file .*absent.pth does not exist"):
            start.find(recipe, download=False)

    def test_a_night_tells_two_files_of_one_name_apart(self, project: Project) -> None:
        project.edit(("epochs = 6", "epochs = 6\nstart = 'w.pt'"))
        found = []
        for content in (b"one", b"two"):
            (project.folder / "w.pt").write_bytes(content)
            found.append(_settings(read(project.recipe), "openvino")["training.start"])
        assert found[0] != found[1]
        assert str(project.folder) not in "".join(found)


class TestFreezing:
    def test_parts_join_at_their_epochs_and_rest_as_on_the_device(self) -> None:
        model = torchvision.models.resnet18(num_classes=3)
        training = Training(start="w.pt", freeze=("conv1", "layer1", "layer2"), unfreeze=(3, 2, 1))
        plan = freezing.plan(model, training, ("fc",))
        learning = []
        for epoch in range(4):
            plan.apply(model, epoch)
            learning.append([model.conv1.weight.requires_grad, model.layer1[0].bn1.training, model.layer2.training])
        assert learning == [[False] * 3, [False, False, True], [False, True, True], [True] * 3]
        assert plan.apply(model, 0)
        assert not plan.apply(model, 0)

    def test_what_cannot_be_frozen_is_said(self) -> None:
        model = torchvision.models.resnet18(num_classes=3)
        with pytest.raises(InputError, match="no module 'layer9'; did you mean 'layer"):
            freezing.plan(model, Training(start="w", freeze=("layer9",)), ("fc",))
        with pytest.raises(InputError, match="leaves nothing to learn"):
            freezing.plan(model, Training(start="w", freeze=("backbone", "fc")), ("fc",))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("freeze = ['fc']", "training.freeze is for weights that know something already"),
        ("start = 'w.pt'\nunfreeze = 2", "training.unfreeze says when training.freeze ends, which is not set"),
        ("start = 'w.pt'\nfreeze = ['a', 'b']\nunfreeze = [1]", "has 1 epochs for the 2 parts of training.freeze"),
        ("start = 'w.pt'\nfreeze = ['a']\nunfreeze = 6", "training.unfreeze = 6 never comes: training ends after 6"),
        ("loss = 'focal'\nlabel_smoothing = 0.1", "label_smoothing does not go with training.loss = 'focal'"),
        ("gamma = 1.0", "training.gamma is for training.loss = 'focal'"),
        ("momentum = 0.5", "training.momentum is for training.optimizer = 'sgd'"),
        ("validation = 0.0\npatience = 2", "training.patience needs images held out; set training.validation above 0"),
        ("patience = 2\nkeep = 'last'", "would throw away what training.patience waited for"),
        ("optimizer = 'sgd'\nmomentum = 0.0", "training.nesterov needs a momentum"),
    ],
)
def test_settings_that_do_not_fit_together(project: Project, text: str, message: str) -> None:
    project.edit(("epochs = 6", f"epochs = 6\n{text}"))
    assert message in project.refused("train", "small.toml")


class TestLosses:
    scores = torch.randn(6, 3, generator=torch.Generator().manual_seed(0))
    labels = torch.tensor([0, 0, 0, 1, 1, 2])

    def test_parts_add_up_to_pytorch_s_own_mean(self) -> None:
        masks = torch.tensor([[0, 255], [1, 2]]).repeat(6, 1, 1)
        maps = torch.randn(6, 3, 2, 2, generator=torch.Generator().manual_seed(1))
        smooth = losses.Loss("classification", Training(label_smoothing=0.1), torch.tensor([1.0, 2.0, 3.0]))
        expected = F.cross_entropy(self.scores, self.labels, torch.tensor([1.0, 2.0, 3.0]), label_smoothing=0.1)
        parts = [slice(0, 2), slice(2, 6)]
        size = sum(smooth.sizes(self.labels[part]) for part in parts)
        torch.testing.assert_close(sum(smooth.sum(self.scores[p], self.labels[p]) for p in parts) / size, expected)
        pixels = losses.Loss("segmentation", Training())
        found = pixels.sum(maps, masks) / pixels.sizes(masks)
        torch.testing.assert_close(found, F.cross_entropy(maps, masks, ignore_index=255))

    def test_focal_is_cross_entropy_for_gamma_0_and_counts_the_easy_less(self) -> None:
        for task, labels in (("classification", self.labels), ("multilabel", F.one_hot(self.labels))):
            plain = losses.Loss(task, Training())  # type: ignore[arg-type]
            zero = losses.Loss(task, Training(loss="focal", gamma=0))  # type: ignore[arg-type]
            two = losses.Loss(task, Training(loss="focal", gamma=2))  # type: ignore[arg-type]
            torch.testing.assert_close(zero.sum(self.scores, labels), plain.sum(self.scores, labels))
            sure = 8.0 * (2 * F.one_hot(self.labels) - 1)
            assert two.sum(sure, labels) < 1e-4 * plain.sum(sure, labels)
        right = self.scores.softmax(1)[torch.arange(6), self.labels]
        focal = losses.Loss("classification", Training(loss="focal", gamma=2))
        torch.testing.assert_close(focal.sum(self.scores, self.labels), (-right.log() * (1 - right) ** 2).sum())
        sure = torch.tensor([[200.0, 0.0]], requires_grad=True)
        root = losses.Loss("classification", Training(loss="focal", gamma=0.5))
        (slope,) = torch.autograd.grad(root.sum(sure, self.labels[:1]), sure)
        assert slope.isfinite().all()

    def test_balanced_weights_make_classes_count_alike(self) -> None:
        balanced = Training(class_weights="balanced")
        one = losses.loss("classification", balanced, self.labels.numpy(), 4).weights
        assert one is not None
        assert (one[:3] * torch.tensor([3, 2, 1])).tolist() == pytest.approx([2, 2, 2])
        assert one[3] == 1
        masks = np.array([[[0, 0, 0, 255, 1, 255]]], np.uint8)
        pixel = losses.loss("segmentation", balanced, masks, 2).weights
        several = losses.loss("multilabel", balanced, np.array([[1, 0], [1, 0], [1, 0], [0, 1]]), 2).weights
        assert pixel is not None
        assert several is not None
        assert pixel.tolist() == pytest.approx([2 / 3, 2])
        assert several.tolist() == pytest.approx([1 / 3, 3])


class TestHoldout:
    def test_every_class_gives_its_share(self) -> None:
        labels = np.repeat([0, 1, 2], [400, 200, 40])
        found = holdout.hold_out(labels, "classification", 0.1, 0)
        assert np.bincount(labels[found.held_out]).tolist() == [40, 20, 4]
        assert sorted([*found.learnt, *found.held_out]) == list(range(640))
        again, other = (holdout.hold_out(labels, "classification", 0.1, seed) for seed in (0, 1))
        assert found.held_out.tolist() == again.held_out.tolist() != other.held_out.tolist()
        several = np.zeros((200, 3), np.uint8)
        several[:100, 0], several[:20, 1] = 1, 1
        drawn = holdout.hold_out(several, "multilabel", 0.1, 0).held_out
        assert several[drawn].sum(0).tolist() == [10, 2, 0]
        assert len(holdout.hold_out(labels, "classification", 0, 0).held_out) == 0

    def test_processes_share_each_batch(self) -> None:
        both = holdout.divide(103, Training(accumulate=2), 16, 2)
        assert both.part == 4
        order = np.arange(103)
        mine = [both.of(order, process).reshape(-1, 8) for process in (0, 1)]
        for step, (one, other) in enumerate(zip(*mine, strict=True)):
            assert sorted([*one, *other]) == list(range(16 * step, 16 * step + 16))
        with pytest.raises(InputError, match="a batch of 6 images does not divide among 2 processes and 2 parts"):
            holdout.divide(100, Training(accumulate=2), 6, 2)


def test_norms_and_biases_do_not_decay_and_the_backbone_has_its_own_rate() -> None:
    model = torchvision.models.resnet18(num_classes=3)
    training = Training(start="w", backbone_learning_rate=0.1, learning_rate=1e-2, weight_decay=0.5)
    made = optimizer(model, training, freezing.plan(model, training, ("fc",)), torch.device("cpu"))
    groups = {(round(g["lr"], 6), g["weight_decay"]): {id(p) for p in g["params"]} for g in made.param_groups}
    assert groups[1e-2, 0.5] == {id(model.fc.weight)}
    assert groups[1e-2, 0.0] == {id(model.fc.bias)}
    assert id(model.conv1.weight) in groups[1e-3, 0.5]
    assert id(model.bn1.weight) in groups[1e-3, 0.0]
    assert sum(map(len, groups.values())) == len(list(model.parameters()))


@pytest.mark.parametrize("kind", ["one-cycle", "cosine"])
def test_schedules_rise_for_their_share_and_end_at_nothing(kind: str) -> None:
    made = torch.optim.SGD([torch.zeros(1, requires_grad=True)], 1.0, momentum=0.9)
    rates = schedule(made, Training.model_validate({"schedule": kind, "warm_up": 0.25}), 40)
    seen = []
    for _ in range(40):
        seen.append(made.param_groups[0]["lr"])
        made.step()
        rates.step()
    assert seen.index(max(seen)) in (9, 10)
    assert max(seen) == pytest.approx(1, abs=0.05)
    assert seen[0] < 0.1
    assert seen[-1] < 0.01


def test_an_average_follows_slowly_and_forgets_the_first_weights() -> None:
    model = nn.Linear(1, 1, bias=False)
    average = Average(model, 0.9)
    with torch.no_grad():
        model.weight.fill_(1.0)
    for step in range(1, 200):
        average.update(model, step)
    assert average.state["weight"].item() == pytest.approx(1, abs=1e-6)
    with torch.no_grad():
        model.weight.fill_(2.0)
    average.update(model, 200)
    assert average.state["weight"].item() == pytest.approx(1.1)


def test_a_cycle_of_rates_leaves_the_momentum_of_sgd_alone() -> None:
    made = torch.optim.SGD([torch.zeros(1, requires_grad=True)], 1.0, momentum=0.5)
    schedule(made, Training(optimizer="sgd", momentum=0.5), 40)
    assert made.param_groups[0]["momentum"] == 0.5


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Project, Weights]:
    """A training with all that has to be kept: dropout, momentum, an average, the best weights, parts."""
    project = write_project(tmp_path_factory.mktemp("undisturbed") / "project")
    of(project, "dropping", FACTORY.replace("self.head(x.mean((2, 3)))", DROPPED))
    project.edit(*QUICK, ("learning_rate = 5e-3", WHOLE))
    return project, taught(project)


DROPPED = "self.head(nn.functional.dropout(x.mean((2, 3)), 0.2, self.training))"
WHOLE = """learning_rate = 5e-2
optimizer = "sgd"
schedule = "cosine"
accumulate = 2
clip_norm = 1.0
ema = 0.9
keep = "best"
horizontal_flip = true
class_weights = "balanced"
validation = 0.1
"""


def killed(project: Project, *options: str) -> Path:
    """Train, kill the process and all it started with signal 9 in the midst, train on; give the weights."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    program, command = [sys.executable, "-c", KILLED], ["train", "small.toml", *options]
    with subprocess.Popen(
        [*program, "0", *command], cwd=project.folder, env=environment, start_new_session=True
    ) as running:
        end = time.monotonic() + 60
        while not list(project.folder.glob("build/small/.train-*.pt")):
            assert time.monotonic() < end
            assert running.poll() is None
            time.sleep(0.005)
        os.killpg(running.pid, signal.SIGKILL)
    assert not list(project.folder.glob("build/small/train-*"))
    done = subprocess.run(
        [*program, "30", *command], cwd=project.folder, env=environment, check=True, capture_output=True, text=True
    )
    assert "goes on at step" in done.stderr
    assert not list(project.folder.glob("build/small/.train-*.pt"))
    (path,) = project.folder.glob("build/small/train-*/weights.safetensors")
    return path


def copy(project: Project, folder: Path) -> Project:
    other = write_project(folder)
    for name in ("small.toml", "dropping.py"):
        (folder / name).write_text((project.folder / name).read_text())
    return other


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
def test_killed_in_the_midst_it_goes_on_to_the_very_same_bits(
    undisturbed: tuple[Project, Weights], tmp_path: Path, processes: int
) -> None:
    project, weights = undisturbed
    options = ["--processes", "2"] if processes == 2 else []
    if processes == 2:
        project = copy(project, tmp_path / "two")
        weights = taught(project, processes=2)
    again = killed(copy(project, tmp_path / "killed"), *options)
    assert again.read_bytes() == weights.path.read_bytes()
    past = {"train/images_per_s"}
    lines = [
        [{k: v for k, v in line.items() if k not in past} for line in told(Weights(p, ""))]
        for p in (again, weights.path)
    ]
    assert [line["step"] for line in lines[0]] == [line["step"] for line in lines[1]]
    assert [line for line in lines[0] if "validation/loss" in line] == [
        line for line in lines[1] if "validation/loss" in line
    ]


def test_two_processes_learn_what_one_does(undisturbed: tuple[Project, Weights], tmp_path: Path) -> None:
    """Without batch norm, dropout and flips, whose statistics and chances are each process's own, to rounding."""
    found = []
    for processes in (1, 2):
        project = copy(undisturbed[0], tmp_path / str(processes))
        project.edit(("module:dropping:make", "module:smallmodel:make"))
        of(project, "plain", FACTORY.replace("nn.BatchNorm2d(16)", "nn.Identity()"))
        project.edit(("horizontal_flip = true", "precision = 'float32'"))
        project.edit(("accumulate = 2", f"accumulate = {3 - processes}"))
        found.append(load_file(taught(project, processes=processes).path))
    for name, tensor in found[0].items():
        torch.testing.assert_close(tensor, found[1][name], rtol=1e-3, atol=1e-5)


def test_a_fault_in_one_of_several_processes_is_told_once(project: Project) -> None:
    project.edit(("learning_rate = 5e-3", "learning_rate = 1e30"), ("epochs = 6", "epochs = 1"))
    line = project.refused("-q", "train", "small.toml", "--processes", "2")
    assert "training has a loss of" in line
    assert "lower training.learning_rate" in line


class TestKept:
    def test_patience_ends_it_and_the_best_weights_are_kept_with_their_record(self, project: Project) -> None:
        weights = taught(
            project,
            ("epochs = 6", "epochs = 40\npatience = 2\nvalidation = 0.25\noptimizer = 'sgd'\nwarm_up = 0"),
            ("learning_rate = 5e-3", "learning_rate = 0.2"),
        )
        seen = percents(weights)
        assert len(seen) < 40
        assert len(seen) == int(np.argmax(seen)) + 1 + 2
        with safe_open(weights.path, "pt") as stream:
            record = json.loads(stream.metadata()["bitferry"])
        assert record["percent"] == pytest.approx(max(seen), abs=1e-4)
        assert record["metric"] == "top-1"
        assert record["validation_images"] == 240

    def test_the_curves_hold_what_the_lines_do(self, undisturbed: tuple[Project, Weights]) -> None:
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator  # noqa: PLC0415

        project, weights = undisturbed
        (folder,) = (project.folder / "build/small/curves").iterdir()
        events = EventAccumulator(str(folder)).Reload()
        drawn = [round(one.value, 3) for one in events.Scalars("validation/top-1")]
        assert drawn == [round(one, 3) for one in percents(weights)]
        assert len(events.Scalars("learning_rate/0")) == len(events.Scalars("train/images_per_s"))

    def test_nothing_held_out_is_no_record(self, project: Project) -> None:
        weights = taught(project, *QUICK, ("epochs = 2", "epochs = 1\nvalidation = 0.0"))
        assert percents(weights) == []
        with safe_open(weights.path, "pt") as stream:
            assert json.loads(stream.metadata()["bitferry"])["percent"] is None


class TestRecord:
    """Weights trained here, used as `model.weights`."""

    def recipe(self, trained: tuple[Project, Weights], project: Project, *edits: tuple[str, str]) -> Run:
        (project.folder / "w.safetensors").write_bytes(trained[1].path.read_bytes())
        five = ('["T-shirt", "Trouser", "Pullover"]', '["a", "b", "c", "d", "e"]')
        source = 'source = "module:smallmodel:make"\noptions = {classes = 5}\nweights = "w.safetensors"'
        return made(project, five, ('source = "module:smallmodel:make"', source), *edits)[1]

    def test_permuted_classes_are_refused(self, trained: tuple[Project, Weights], project: Project) -> None:
        run = self.recipe(trained, project, ('["a", "b", "c", "d", "e"]', '["a", "c", "b", "d", "e"]'))
        with pytest.raises(InputError, match="the same classes in another order: class 1 was 'b' and is 'c'"):
            _ = run.model

    def test_other_preprocessing_is_said_and_a_far_baseline_fails_by_it(
        self, trained: tuple[Project, Weights], project: Project
    ) -> None:
        np.savez(project.folder / "evaluation.npz", **subset("evaluation", 400, classes=5))  # type: ignore[arg-type]
        self.recipe(trained, project, ("mean = [0.3, 0.3, 0.3]", "mean = [0.95, 0.95, 0.95]"))
        done = project.bitferry("verify", "small.toml", "--quick", "--json", "--precision", "float32")
        assert done.returncode == 1, done.stderr
        (verdict,) = json.loads(done.stdout)
        difference = "mean was [0.3, 0.3, 0.3] and is [0.95, 0.95, 0.95]"
        assert f"was trained with another preprocessing: {difference}" in done.stderr
        reasons = [one for one in verdict["reasons"] if "that its training recorded in the weights' file" in one]
        assert len(reasons) == 1
        assert reasons[0].endswith(f"the preprocessing is another one: {difference}")

    def test_given_weights_are_not_trained_over(self, trained: tuple[Project, Weights], project: Project) -> None:
        run = self.recipe(trained, project)
        with pytest.raises(InputError, match="has model.weights, so there is nothing to train; .* training.start"):
            _ = run.weights

    def test_a_file_of_others_has_no_record(self, trained: tuple[Project, Weights], project: Project) -> None:
        run = self.recipe(trained, project, ('["a", "b", "c", "d", "e"]', '["a", "c", "b", "d", "e"]'))
        save_file(load_file(trained[1].path), project.folder / "w.safetensors")
        assert run.model.record is None


@pytest.mark.parametrize(("higher", "outcomes"), [(True, ["fail"]), (False, [])])
def test_what_is_recorded_of_a_metric_where_less_is_better_is_missed_by_more(higher: bool, outcomes: list[str]) -> None:
    change = Change("torchmetrics:X", "bootstrap", 5.0, 5.0, 0.0, 0.0, 0.0, 0.95, higher_is_better=higher)
    found = _recorded(SimpleNamespace(judged=change, images=1000), Record("torchmetrics:X", 40.0, 1000))  # type: ignore[arg-type]
    assert [outcome for outcome, _ in found] == outcomes


class TestPrecision:
    def test_float16_needs_a_gpu_and_bfloat16_does_not(self, project: Project) -> None:
        if torch.cuda.is_available():
            pytest.skip("for machines without a GPU")
        with pytest.raises(TargetUnavailable, match="'float16' needs a GPU, and PyTorch finds none here"):
            machine.precision(Training(precision="float16"))
        found: list[Tensor] = []
        for precision in ("float32", "bfloat16"):
            weights = taught(
                write_project(project.folder / precision),
                *QUICK,
                ("epochs = 2", f"epochs = 2\nprecision = '{precision}'"),
            )
            found.append(load_file(weights.path)["head.weight"])
        assert not torch.equal(*found)
        assert all(one.dtype == torch.float32 for one in found)


def test_the_batch_is_the_largest_that_is_no_slower_and_stays(project: Project) -> None:
    recipe, run = made(project, *QUICK, ("batch_size = 64", 'batch_size = "auto"'))
    data = run.training
    chosen = batch.choose(recipe, data, run.build, "float32", project.folder)
    (file,) = project.folder.glob("build/small/batch-*/batch.json")
    paces = {int(size): pace for size, pace in json.loads(file.read_text())["images_per_s"].items()}
    assert chosen == max(size for size, pace in paces.items() if pace >= 0.95 * max(paces.values()))
    assert chosen <= len(data) // 8
    before = file.stat().st_mtime_ns
    assert batch.choose(recipe, data, run.build, "float32", project.folder) == chosen
    assert file.stat().st_mtime_ns == before


def test_a_training_that_diverges_says_where(project: Project) -> None:
    with pytest.raises(
        StageFailed, match=r"training has a loss of \w+ at step \d+ of \d+; lower training.learning_rate"
    ):
        taught(project, *QUICK, ("learning_rate = 5e-3", "learning_rate = 1e30"))


def test_a_broken_checkpoint_is_named(project: Project) -> None:
    recipe, run = made(project, *QUICK)
    from bitferry.pipeline.train import prepare  # noqa: PLC0415

    job, _ = prepare(recipe, run.training, run.build, folder=project.folder)
    job.checkpoint.write_bytes(b"half")
    with pytest.raises(StageFailed, match=r"\.train-\w+\.pt cannot be read .*; delete it to train anew"):
        taught(project)


def test_models_that_give_more_than_scores_while_they_learn() -> None:
    model = torchvision.models.googlenet(weights=None, num_classes=3, init_weights=False)
    learning = Deployable(model, Preprocessing(height=64, width=64)).train()
    assert learning(torch.zeros(2, 64, 64, 3, dtype=torch.uint8)).shape == (2, 3)
