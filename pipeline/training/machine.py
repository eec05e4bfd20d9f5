"""Where a training runs: its device, the precision it computes in, and its process among others; by accelerate."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import torch

from bitferry.device.errors import InputError, TargetUnavailable
from bitferry.pipeline.training.settings import Training
from bitferry.targets import has_bfloat16, usable_cpus

if TYPE_CHECKING:
    from accelerate import Accelerator

Precision = Literal["float32", "bfloat16", "float16"]
NAMES: dict[Precision, str] = {"float32": "no", "bfloat16": "bf16", "float16": "fp16"}
"""As accelerate calls them."""
HOUR = timedelta(hours=1)


def kind() -> str:
    """Give the kind of device that trains here: cuda, mps or cpu."""
    return "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"


def name() -> str:
    """Name the device, for what is kept of a measurement on it."""
    return torch.cuda.get_device_name() if kind() == "cuda" else f"{kind()} {usable_cpus()}"


def precision(training: Training) -> Precision:
    """Choose the precision that layers compute in; raise TargetUnavailable for one that this machine cannot."""
    device = kind()
    if training.precision == "auto":
        if device == "cuda":
            return "bfloat16" if torch.cuda.is_bf16_supported(including_emulation=False) else "float16"
        return "bfloat16" if device == "cpu" and has_bfloat16() else "float32"
    if training.precision == "float16" and device == "cpu":
        raise TargetUnavailable(
            "training.precision = 'float16' needs a GPU, and PyTorch finds none here; "
            "set 'auto', 'bfloat16' or 'float32'"
        )
    return training.precision


def check_processes(processes: int) -> None:
    """Raise InputError for more processes than GPUs where there are GPUs."""
    if processes > 1 and kind() == "cuda" and processes > torch.cuda.device_count():
        count = torch.cuda.device_count()
        raise InputError(f"--processes {processes} needs a GPU for each, and there are {count}; give at most {count}")


@contextmanager
def accelerator(
    chosen: Precision, processes: int = 1, meeting: Path | None = None, *, threads: int | None = None
) -> Iterator["Accelerator"]:
    """Give accelerate's way to the device, for as long as it lasts; `meeting` is the file where processes meet.

    Sums are made in the same order every time: a training that goes on gives the bits of one that never stopped.
    """
    from accelerate import Accelerator, InitProcessGroupKwargs  # noqa: PLC0415 - a second to import
    from accelerate.state import AcceleratorState, GradientState  # noqa: PLC0415

    torch.set_num_threads(threads or max(1, usable_cpus() // processes))
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS is deterministic with it alone
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    handlers = [InitProcessGroupKwargs(init_method=f"file://{meeting}", timeout=HOUR)] if meeting else []
    _forget(AcceleratorState, GradientState)
    try:
        made = Accelerator(
            mixed_precision=NAMES[chosen],
            cpu=kind() == "cpu",
            kwargs_handlers=handlers,
        )
        torch.use_deterministic_algorithms(made.device.type == "cuda", warn_only=True)
        yield made
        made.end_training()
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
        _forget(AcceleratorState, GradientState)


def _forget(*states: type) -> None:
    """Let the next training choose another precision: accelerate keeps the first one's for the whole process."""
    for state in states:
        state._reset_state(*([True] if state.__name__ == "AcceleratorState" else []))  # type: ignore[attr-defined]
