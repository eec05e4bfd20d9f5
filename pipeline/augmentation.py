"""What a recipe's [augmentation] says: how training images are changed each time that the model sees them."""

from collections.abc import Mapping
from typing import Annotated, Literal

from pydantic import Field, field_validator

from bitferry.pipeline.section import Section

Share = Annotated[float, Field(ge=0, le=1)]


class Augmentation(Section):
    """How training images are changed at random; all views and the mask of one sample alike in place."""

    horizontal_flip: bool = False
    vertical_flip: bool = False
    crop: tuple[Share, Share] | None = None
    """Smallest and largest share of the image's area that is cut out and resized to the model's input."""
    ratio: tuple[Annotated[float, Field(gt=0)], Annotated[float, Field(gt=0)]] = (3 / 4, 4 / 3)
    """Narrowest and widest of those, as width over height against the input's."""
    margin: Annotated[float, Field(ge=1, le=4)] = 1.25
    """With `crop`, how many times larger images are kept than they are resized to, so that crops have real pixels."""
    rotate: Annotated[float, Field(ge=0, le=180)] = 0.0
    """Degrees, at most, either way."""
    brightness: Share = 0.0
    """A factor between 1 − this and 1 + this; so for the next two."""
    contrast: Share = 0.0
    saturation: Share = 0.0
    hue: Annotated[float, Field(ge=0, le=0.5)] = 0.0
    """Of the colour circle."""
    auto: Literal["none", "trivial", "rand"] = "none"
    """trivial: one change of random strength (Müller & Hutter 2021); rand: two of one strength (Cubuk et al. 2020)."""
    erase: Share = 0.0
    """How often a random rectangle is filled with the image's mean colour; a mask is 255 there."""

    @field_validator("crop", "ratio")
    @classmethod
    def _smallest_first(cls, value: tuple[float, float] | None) -> tuple[float, float] | None:
        if value is not None and not 0 < value[0] <= value[1]:
            raise ValueError("expected the smallest first, above 0")
        return value

    @property
    def room(self) -> float:
        """Give how many times larger images are kept."""
        return 1.0 if self.crop is None else self.margin

    @property
    def only_flips(self) -> bool:
        """Say whether images are mirrored and nothing else, or stay as they are."""
        others = {"horizontal_flip": False, "vertical_flip": False, "ratio": (1, 1), "margin": 1}
        return self.model_copy(update=others) == Augmentation().model_copy(update=others)


def with_alias(given: object) -> object:
    """Put a recipe's `training.horizontal_flip`, an older name of it, into its [augmentation]."""
    if not isinstance(given, Mapping):
        return given
    training, own = given.get("training"), given.get("augmentation", {})
    if isinstance(training, Mapping) and training.get("horizontal_flip") is True and isinstance(own, Mapping):
        return {**given, "augmentation": {"horizontal_flip": True, **own}}
    return given
