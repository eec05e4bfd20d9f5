"""QAT: the quantized program, weights, biases and ranges, is trained a little more on the recipe's training images.

It starts at what quantization without training gave, and the float model is its teacher, so that every task has the
same loss: the noise of the scores over their power, which is what all other steps are judged by. Weights are rounded on
the way forward and the gradient passes straight through (Jacob et al. 2018, "Quantization and Training of Neural
Networks for Efficient Integer-Arithmetic-Only Inference"); ranges are learned as in `learned.py`. Batch norms are
folded into the convolutions before, so there are no statistics to go astray.
"""

import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn

from bitferry.device.arrays import Images
from bitferry.device.errors import StageFailed, first_line
from bitferry.pipeline import interrupt, progress
from bitferry.pipeline.quantization.graph import Layer, activations, forward, grids, layers, set_mode
from bitferry.pipeline.quantization.learned import LearnedRange, noise
from bitferry.pipeline.training.settings import Training

SECONDS = 30.0
"""Between two checkpoints."""
MOST_PIXELS = 32 * 224 * 224
"""Of all images of a step: all that a step backward needs of them is held in memory."""
LEAST = 1e-3
"""Of the size that a rate is relative to: a bias of zeros moves, too."""


@dataclass(frozen=True)
class Course:
    """What to train on, how long, and where to keep how far it is."""

    images: Images
    """N×H×W×3 uint8, read batch by batch."""
    teacher: nn.Module
    epochs: int
    rate: float
    """A step of Adam moves each value by about this share of its tensor's root mean square."""
    training: Training
    """The recipe's: batch size, mirroring and seed."""
    checkpoint: Path

    @property
    def size(self) -> int:
        """Give the images of a step: the recipe's batch, or as many as are a moderate number of pixels."""
        each = int(self.images[0].size) // 3
        return max(1, min(self.training.fixed_batch, len(self.images), MOST_PIXELS // each))

    @property
    def steps(self) -> int:
        return self.epochs * (len(self.images) // self.size)

    def batches(self, first: int) -> Iterator[Tensor]:
        """Give the images of each step from `first` on, the same whether training was interrupted or not."""
        order = torch.Generator().manual_seed(self.training.seed)
        each = self.steps // self.epochs * self.size
        drawn = [torch.randperm(len(self.images), generator=order)[:each] for _ in range(self.epochs)]
        for step, picked in enumerate(torch.split(torch.cat(drawn), self.size)):
            if step >= first:
                yield self._mirrored(torch.from_numpy(self.images[picked.numpy()]), step)

    def _mirrored(self, images: Tensor, step: int) -> Tensor:
        if not self.training.horizontal_flip:
            return images
        random = torch.Generator().manual_seed((self.training.seed << 32) + step)
        mirrored = torch.rand(len(images), generator=random) < 0.5
        return torch.where(mirrored.view(-1, *[1] * (images.ndim - 1)), images.flip(-2), images)


class StraightThrough(nn.Module):
    """Stands in for a weight's grid: fits it to the weight as it is now, and rounds; the gradient passes."""

    def __init__(self, layer: Layer) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, weight: Tensor) -> Tensor:
        with torch.no_grad():
            self.layer.fit()
            rounded = self.layer.weight_grid.rounded(weight)
        return weight + (rounded - weight).detach()


def finetune(model: fx.GraphModule, course: Course) -> int:
    """Train a calibrated graph; go on where a run that was killed left off. Give how many layers were trained."""
    chosen = layers(model)
    if not chosen:
        return 0
    ranges = {grid: LearnedRange(grid) for grid in activations(model)}
    for grid, learned in ranges.items():
        learned.zero.requires_grad_(False)
        grid.stand_in = learned
    for layer in chosen:
        layer.weight_grid.stand_in = StraightThrough(layer)
    set_mode(model, "round")
    unique = {id(tensor): tensor for layer in chosen for tensor in (layer.weight, layer.bias) if tensor is not None}
    try:
        _train(model, course, list(unique.values()), [learned.log_scale for learned in ranges.values()])
    finally:
        for tensor in unique.values():
            tensor.requires_grad_(False)
        for any_grid in grids(model):
            any_grid.stand_in = None
        set_mode(model, "off")
    for grid, learned in ranges.items():
        learned.settle(grid)
    for layer in chosen:
        layer.fit()
    return len(chosen)


def _train(model: fx.GraphModule, course: Course, tensors: list[Tensor], scales: list[nn.Parameter]) -> None:
    for tensor in tensors:
        tensor.requires_grad_(True)
    parts: list[dict[str, Any]] = [
        {"params": [one], "lr": course.rate * max(LEAST, float(one.detach().square().mean().sqrt()))} for one in tensors
    ]
    optimizer = torch.optim.Adam([*parts, {"params": scales, "lr": course.rate}])
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, course.steps)
    whole = _Whole([*tensors, *scales], optimizer, schedule)
    done, saved = whole.load(course.checkpoint), time.monotonic()
    rest = progress.track(course.batches(done), "fine-tune", total=course.steps - done)
    step = done
    try:
        with torch.enable_grad():
            for step, batch in enumerate(rest, done + 1):
                with torch.no_grad():
                    wanted = course.teacher(batch)
                loss = noise(forward(model, batch), wanted)
                optimizer.zero_grad()
                loss.backward()  # type: ignore[no-untyped-call]
                optimizer.step()
                schedule.step()
                if time.monotonic() - saved > SECONDS:
                    whole.save(course.checkpoint, step)
                    saved = time.monotonic()
    except interrupt.Stopped:  # between two steps
        whole.save(course.checkpoint, step)
        raise


@dataclass(frozen=True)
class _Whole:
    """All that a training is made of, to be kept and brought back."""

    tensors: list[Tensor]
    optimizer: torch.optim.Optimizer
    schedule: torch.optim.lr_scheduler.LRScheduler

    def save(self, path: Path, step: int) -> None:
        """Write beside and rename, so that a kill leaves the old file or the new."""
        state = {
            "step": step,
            "tensors": [tensor.detach() for tensor in self.tensors],
            "optimizer": self.optimizer.state_dict(),
            "schedule": self.schedule.state_dict(),
        }
        beside = path.with_suffix(".new")
        torch.save(state, beside)
        beside.replace(path)

    def load(self, path: Path) -> int:
        """Give how many steps were done before; 0 where there is no file."""
        if not path.exists():
            return 0
        try:
            state = torch.load(path, weights_only=True)
            for tensor, kept in zip(self.tensors, state["tensors"], strict=True):
                tensor.data.copy_(kept)
            self.optimizer.load_state_dict(state["optimizer"])
            self.schedule.load_state_dict(state["schedule"])
        except Exception as error:  # torch.load raises many kinds for a file that was damaged
            raise StageFailed(f"{path} cannot be read ({first_line(error)}); delete it to fine-tune anew") from error
        progress.stage("fine-tune", f"goes on at step {state['step']}, from {path}")
        return int(state["step"])
