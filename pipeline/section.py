"""What the sections of a recipe have in common: unknown keys are refused, and paths start at the recipe's folder."""

from pathlib import Path
from typing import Annotated

from pydantic import AfterValidator, BaseModel, ConfigDict, ValidationInfo


class Section(BaseModel):
    """A table of a recipe."""

    model_config = ConfigDict(extra="forbid", frozen=True)


def beside_recipe(path: Path, info: ValidationInfo) -> Path:
    """Make a relative path start at the recipe's own folder."""
    return Path((info.context or {}).get("folder", "."), path.expanduser())


Beside = Annotated[Path, AfterValidator(beside_recipe)]
"""A path; a relative one starts at the recipe's own folder."""
