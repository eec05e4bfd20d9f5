"""What a recipe's [data] may say: where each split comes from, or one source that is divided."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, JsonValue, Tag, field_validator, model_validator

from bitferry.pipeline.section import Beside, Section

SPLITS = ("calibration", "evaluation", "train")
BROKEN_SHARE = 0.01
Column = Annotated[str, Field(min_length=1)]


class Table(Section):
    """A source that takes more than a path: columns by their names, two arrays, or one of torchvision's data sets."""

    path: Beside | None = None
    image: tuple[Column, ...] = ()
    """Columns of a Parquet file or a `datasets` folder, or endings of the members of shards; one for each view."""
    label: Column | None = None
    mask: Column | None = None
    group: Column | None = None
    """What images that belong together share, as a patient: they never end in two splits."""
    images: Beside | None = None
    labels: Beside | None = None
    torchvision: Column | None = None
    root: Beside | None = None
    options: dict[str, JsonValue] = Field(default_factory=dict)
    """Of torchvision's constructor: every key that is none of these."""

    @model_validator(mode="before")
    @classmethod
    def _options_of_torchvision(cls, given: object) -> object:
        if not isinstance(given, Mapping) or "torchvision" not in given or "options" in given:
            return given
        known = {name: value for name, value in given.items() if name in ("torchvision", "root")}
        return known | {"options": {name: value for name, value in given.items() if name not in known}}

    @field_validator("image", mode="before")
    @classmethod
    def _one_or_several(cls, value: object) -> object:
        return (value,) if isinstance(value, str) else value

    @model_validator(mode="after")
    def _says_one_thing(self) -> "Table":
        if sum(one is not None for one in (self.path, self.images, self.torchvision)) != 1:
            raise ValueError(
                "a table names one source: `path` (with the columns `image`, `label`, `mask`, `group`), `images` and "
                "`labels` (.npy files), or `torchvision` and `root`"
            )
        if self.torchvision is not None and self.root is None:
            raise ValueError(f"torchvision = '{self.torchvision}' needs `root`, the folder that holds its files")
        if self.labels is not None and self.images is None:
            raise ValueError("`labels` goes with `images`, each a .npy file")
        return self


def _kind(value: object) -> str:
    if isinstance(value, Part) or (isinstance(value, Mapping) and "part" in value):
        return "part"
    return "table" if isinstance(value, Mapping | Table) else "path"


Whole = Annotated[
    Annotated[Beside, Tag("path")] | Annotated[Table, Tag("table")],
    Discriminator(_kind),
]


class Sizes(Section):
    """How one source is divided: shares of it below 1, or numbers of images; the rest is for training."""

    evaluation: Annotated[float, Field(ge=0)] = 0.2
    """0 where these are named by themselves."""
    calibration: Annotated[float, Field(gt=0)] = 0.05
    train: Annotated[float, Field(ge=0)] | None = None
    """None for all that is left; 0 for no training images."""
    seed: int = 0

    @field_validator("evaluation", "calibration", "train")
    @classmethod
    def _share_or_count(cls, value: float | None) -> float | None:
        if value is not None and value >= 1 and value != int(value):
            raise ValueError("a share is below 1, and a number of images is whole")
        return value

    @model_validator(mode="after")
    def _no_more_than_there_is(self) -> "Sizes":
        shares = [one for one in (self.evaluation, self.calibration, self.train or 0.0) if one < 1]
        if sum(shares) > 1:
            raise ValueError(f"the shares come to {sum(shares):g} of the images, more than there are")
        return self


class Part(Section):
    """One split of a source that is divided, as `data.source` asks."""

    part: Literal["calibration", "evaluation", "train"]
    source: Whole
    split: Sizes = Sizes()
    manifest: Beside | None = None


Source = Annotated[
    Annotated[Beside, Tag("path")] | Annotated[Table, Tag("table")] | Annotated[Part, Tag("part")],
    Discriminator(_kind),
]


class Data(Section):
    """Where each split's images are, or one source that is divided into those not named (docs/data.md)."""

    calibration: Source
    evaluation: Source
    train: Source | None = None
    near_duplicates: Literal["refuse", "allow"] = "refuse"
    """Whether more than `near.MOST` of a split may look like images of another."""
    broken_share: Annotated[float, Field(ge=0, lt=1)] = BROKEN_SHARE
    """Of a split's images: so many may be broken, and are left out."""

    @model_validator(mode="before")
    @classmethod
    def _divided(cls, given: object) -> object:
        """Turn `source`, `split` and `manifest` into the parts that they mean."""
        if not isinstance(given, Mapping):
            return given
        asked = {name: given[name] for name in ("source", "split", "manifest") if name in given}
        if not asked:
            return given
        _refuse_both(given, asked)
        rest = {name: value for name, value in given.items() if name not in asked}
        sizes = asked.get("split", {})
        if "evaluation" in given and isinstance(sizes, Mapping):
            asked |= {"split": {**sizes, "evaluation": 0}}
        left = isinstance(sizes, Mapping) and sizes.get("train") == 0
        names = [name for name in SPLITS if name not in given and (name != "train" or not left)]
        return rest | {name: asked | {"part": name} for name in names}

    def splits(self) -> dict[str, Any]:
        """Give the source of each split that there is, by the split's name."""
        return {name: source for name in SPLITS if (source := getattr(self, name)) is not None}


def _refuse_both(given: Mapping[str, Any], asked: Mapping[str, Any]) -> None:
    if "source" not in asked:
        raise ValueError(f"`{next(iter(asked))}` is about one source that is divided; name it as `source`")
    named = [name for name in SPLITS if name in given and name != "evaluation"]
    if named:
        raise ValueError(f"`source` is divided into every split; take out `{named[0]}`, or `{next(iter(asked))}`")
    if "split" in asked and "manifest" in asked:
        raise ValueError("`manifest` pins how the source is divided; take out `split`")
    sizes = asked.get("split")
    if "evaluation" in given and isinstance(sizes, Mapping) and "evaluation" in sizes:
        raise ValueError("`evaluation` names its images, so that `split` leaves it none; take out `split.evaluation`")


def title(source: Path | Table | Part) -> str:
    """Name a source in a message."""
    if isinstance(source, Part):
        return title(source.source)
    if isinstance(source, Path):
        return str(source)
    if source.torchvision is not None:
        told = "".join(f", {name} = {value}" for name, value in source.options.items())
        return f"torchvision's {source.torchvision} in {source.root}{told}"
    return str(source.path or source.images)


def base_name(source: Path | Table | Part) -> str:
    """Name a source without the folder that it is in."""
    if isinstance(source, Table) and source.torchvision is not None:
        return ", ".join([source.torchvision, *(f"{name}={value}" for name, value in source.options.items())])
    if isinstance(source, Part):
        return f"{base_name(source.source)}, {source.part}"
    return Path(title(source)).name


def paths(source: Path | Table | Part) -> Iterator[Path]:
    """List the paths that a source names."""
    if isinstance(source, Path):
        yield source
    elif isinstance(source, Part):
        yield from paths(source.source)
        yield from [source.manifest] if source.manifest else []
    else:
        yield from (one for one in (source.path, source.images, source.labels, source.root) if one is not None)


def written(loc: Sequence[str | int]) -> list[str]:
    """Give where a fault is as the recipe writes it: what is divided stands there once, and no kind is named."""
    names = [str(one) for one in loc]
    if names[2:3] == ["part"]:
        names = [names[0], *names[3:]]
    return [name for i, name in enumerate(names) if not (i == 2 and name in ("table", "path") and names[1] != "split")]
