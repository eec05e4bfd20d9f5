"""Completion for shells: what may stand after `bitferry …`. Neither torch nor pydantic is imported for it."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

Shell = Literal["bash", "zsh", "fish"]
NAME = "bitferry"
VARIABLE = f"_{NAME.upper()}_COMPLETE"
"""Which a shell sets when it asks for completions."""
HIDDEN = (".git", ".venv", "__pycache__", "build", "dist")


def script(shell: Shell) -> str:
    """Give what the shell is to read once, to complete the command from then on."""
    from typer import completion  # noqa: PLC0415 - for this alone

    return completion.get_completion_script(  # type: ignore[attr-defined]  # of no __all__
        prog_name=NAME, complete_var=VARIABLE, shell=shell
    )


def prepare() -> None:
    """Let a shell's question be answered, where this process was started for one."""
    if VARIABLE in os.environ:
        from typer import completion  # noqa: PLC0415 - for this alone

        completion.completion_init()  # type: ignore[attr-defined]  # of no __all__


def recipes(incomplete: str) -> list[str]:
    """Give recipe files, and folders that may hold some, below what was typed."""
    return sorted(_files(incomplete, ".toml"))


def bundles(incomplete: str) -> list[str]:
    """Give folders, since a bundle is one."""
    return sorted(_files(incomplete, None))


def target_names(incomplete: str) -> list[str]:
    """Give targets by name, or `all`; after a comma those that were not named yet."""
    from bitferry import targets  # noqa: PLC0415 - NumPy with it, whose absence no other command should die of

    before, comma, last = incomplete.rpartition(",")
    known = [name for name in [*targets.names(), *([] if comma else ["all"])] if name not in before.split(",")]
    return [f"{before}{comma}{name}" for name in known if name.startswith(last)]


def precisions(incomplete: str) -> list[str]:
    """Give the precisions that a recipe may name."""
    from bitferry import targets  # noqa: PLC0415 - as above

    return [name for name in ("auto", *targets.PRECISIONS) if name.startswith(incomplete)]


def _files(incomplete: str, ending: str | None) -> Iterator[str]:
    typed = Path(incomplete)
    folder = typed if incomplete.endswith(os.sep) or not incomplete else typed.parent
    prefix = "" if incomplete.endswith(os.sep) else typed.name
    shown = incomplete.removesuffix(prefix) if prefix else incomplete  # as it was typed
    try:
        entries = list(folder.iterdir())
    except OSError:
        return
    for path in entries:
        if path.name.startswith(prefix) and path.name not in HIDDEN and (prefix or path.name[0] != "."):
            if path.is_dir():
                yield f"{shown}{path.name}{os.sep}"
            elif path.suffix == ending:
                yield f"{shown}{path.name}"
