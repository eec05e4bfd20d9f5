"""Which parts of a model learn in which epoch; a part that does not learn runs as it will on the device."""

from dataclasses import dataclass
from difflib import get_close_matches

from torch import nn

from bitferry.device.errors import InputError
from bitferry.pipeline.training.settings import BACKBONE, Training


def _within(name: str, part: str) -> bool:
    return not part or name == part or name.startswith(f"{part}.")


@dataclass(frozen=True)
class Freezing:
    """The frozen parts, each with the epoch from which it learns, None for never."""

    thaws: dict[str, int | None]
    head: tuple[str, ...]
    """Modules that "backbone" leaves out."""

    def frozen(self, name: str, epoch: int) -> bool:
        """Say whether the module or parameter of that path is kept as it is in that epoch."""
        return any(self._covers(part, name) for part, thaw in self.thaws.items() if thaw is None or epoch < thaw)

    def _covers(self, part: str, name: str) -> bool:
        return not self.in_head(name) if part == BACKBONE else _within(name, part)

    def in_head(self, name: str) -> bool:
        """Say whether the module or parameter of that path belongs to the head."""
        return any(_within(name, part) for part in self.head)

    def apply(self, model: nn.Module, epoch: int) -> bool:
        """Set the model to train as it does in that epoch; say whether other parameters learn than before."""
        for name, module in model.named_modules():
            module.training = not (name and self.frozen(name, epoch))
        changed = False
        for name, parameter in model.named_parameters():
            learns = not self.frozen(name, epoch)
            changed |= parameter.requires_grad != learns
            parameter.requires_grad_(learns)
        return changed


def plan(model: nn.Module, training: Training, head: tuple[str, ...]) -> Freezing:
    """Read the settings; raise InputError where a part is not in the model, or nothing is left to learn at first."""
    modules = [name for name, _ in model.named_modules() if name]
    for part in training.thaws:
        if part != BACKBONE and part not in modules:
            close = get_close_matches(part, modules, n=1)
            hint = f"did you mean '{close[0]}'?" if close else f"its first are {', '.join(modules[:5])}"
            raise InputError(f"training.freeze: the model has no module '{part}'; {hint}")
    freezing = Freezing(training.thaws, head)
    if all(freezing.frozen(name, 0) for name, _ in model.named_parameters()):
        raise InputError("training.freeze leaves nothing to learn; take out what holds the head")
    return freezing
