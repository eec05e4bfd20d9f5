"""How far a training is: everything that decides how it goes on, in one file that is old or new and never half."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from bitferry.device.errors import InputError, StageFailed, first_line
from bitferry.pipeline import progress
from bitferry.pipeline.training.optimizer import Average

if TYPE_CHECKING:
    from accelerate import Accelerator

Kept = dict[str, Tensor]
Line = dict[str, float | int | None]


@dataclass
class Position:
    """Where a training is, and what it knows by then. Random numbers of a step come from its number (`course`)."""

    step: int = 0
    """Steps done, of all epochs."""
    steps: int = 0
    """How many those have."""
    best: float | None = None
    """The best value of the validation, higher being better."""
    best_epoch: int = 0
    percent: float | None = None
    """The last validation's metric · 100."""
    over: bool = False
    """Whether patience ended."""
    lines: list[Line] = field(default_factory=list)
    """What was told so far (`curves`)."""


@dataclass(frozen=True)
class Whole:
    """All that is kept of a training, and brought back."""

    path: Path
    model: nn.Module
    optimizer: torch.optim.Optimizer
    schedule: torch.optim.lr_scheduler.LRScheduler
    accelerator: "Accelerator"
    average: Average | None
    best: Kept
    """The best weights; empty before there are any, or where the last are kept."""
    position: Position

    def save(self) -> None:
        """Write beside and rename, so that a kill leaves the old file or the new."""
        state = {
            "position": vars(self.position),
            "processes": self.accelerator.num_processes,
            "device": self.accelerator.device.type,
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "schedule": self.schedule.state_dict(),
            "scaler": self.accelerator.scaler.state_dict() if self.accelerator.scaler else None,
            "average": self.average.state if self.average else None,
            "best": self.best,
        }
        beside = self.path.with_suffix(".new")
        torch.save(state, beside)
        beside.replace(self.path)

    def load(self) -> bool:
        """Bring back what was kept; say whether there was anything."""
        if not self.path.exists():
            return False
        try:
            state = torch.load(self.path, weights_only=True, map_location="cpu")
            self._compare(state)
            self._restore(state)
        except InputError:
            raise
        except Exception as error:  # torch.load raises many kinds for a file that was damaged
            raise StageFailed(f"{self.path} cannot be read ({first_line(error)}); delete it to train anew") from error
        if self.accelerator.is_main_process:
            told = f"goes on at step {self.position.step}, from {self.path}"
            here = {"processes": self.accelerator.num_processes, "device": self.accelerator.device.type}
            others = [f"{name} {state[name]}" for name in here if state[name] != here[name]]
            exact = f", begun with {' and '.join(others)}: not quite as if it had not stopped" if others else ""
            progress.stage("train", told + exact)
        return True

    def _compare(self, state: Mapping[str, Any]) -> None:
        """Raise InputError where a batch of another size, of so many processes, makes for another number of steps."""
        before, now = state["position"]["steps"], self.position.steps
        if before != now:
            raise InputError(
                f"{self.path} is of a training of {before} steps by --processes {state['processes']}, and by so many "
                f"as now it has {now}; give the number it was begun with, or delete the file to train anew"
            )

    def _restore(self, state: Mapping[str, Any]) -> None:
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.schedule.load_state_dict(state["schedule"])
        if self.accelerator.scaler and state["scaler"]:
            self.accelerator.scaler.load_state_dict(state["scaler"])
        if self.average and state["average"]:
            self.average.load(state["average"])
        self.best.update(state["best"])
        vars(self.position).update(state["position"])


def remove(path: Path) -> None:
    """Throw away what was kept of a training that is done."""
    for one in (path, path.with_suffix(".new")):
        one.unlink(missing_ok=True)


def copied(state: Mapping[str, Tensor]) -> Kept:
    """Take tensors as they are now, to the CPU."""
    take: Callable[[Tensor], Tensor] = lambda t: t.detach().cpu().contiguous().clone()  # noqa: E731 - one word for it
    return {name: take(tensor) for name, tensor in state.items()}
