"""What a training tells while it learns: a plain file of lines, and TensorBoard's curves where that is installed."""

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from bitferry.pipeline.training.state import Line

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

FILE = "metrics.jsonl"


@dataclass(frozen=True)
class Curves:
    """Both, by the same names."""

    path: Path
    board: "SummaryWriter | None"

    def tell(self, line: Line) -> None:
        """Add a line: `step`, counted from 1, and values by name."""
        with self.path.open("a", encoding="utf-8") as stream:
            stream.write(json.dumps(line) + "\n")
        if self.board:
            for name, value in line.items():
                if name not in ("step", "epoch") and value is not None:
                    self.board.add_scalar(name, value, int(line["step"] or 0))

    def close(self) -> None:
        """Write what is held back."""
        if self.board:
            self.board.close()


def begin(out: Path, folder: Path | None, lines: list[Line]) -> Curves:
    """Begin with the lines that were told before a training was interrupted; what came after them is taken back."""
    path = out / FILE
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    if folder is None:
        return Curves(path, None)
    try:
        from torch.utils.tensorboard import SummaryWriter  # noqa: PLC0415 - an optional package, and slow
    except ModuleNotFoundError:
        return Curves(path, None)
    step = int(lines[-1]["step"] or 0) if lines else 0
    return Curves(path, SummaryWriter(str(folder), purge_step=step + 1))


def validations(out: Path, metric: str) -> list[tuple[int, float | None]]:
    """Read what a training told of its validations: epochs done, and the metric · 100."""
    lines = (json.loads(line) for line in (out / FILE).read_text(encoding="utf-8").splitlines())
    return [(line["epoch"], line[f"validation/{metric}"]) for line in lines if "validation/loss" in line]


def plain(value: float) -> float | None:
    """Give what JSON can hold: None for what is no number."""
    return value if math.isfinite(value) else None
