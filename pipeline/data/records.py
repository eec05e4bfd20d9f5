"""What shards and tables of columns share: a record with encoded images, a label or a mask, and perhaps a group."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from bitferry.device.errors import InputError
from bitferry.pipeline.data import labels, sample
from bitferry.pipeline.data.sample import Picture, Sample, Wanted

LABELS = ("label", "labels")
MASKS = ("mask", "seg", "annotation")
GROUP = "group"


@dataclass(frozen=True)
class Record:
    """One answer's worth of a data set."""

    where: str
    views: tuple[Picture, ...]
    label: object = None
    mask: Callable[[], bytes] | None = None
    group: object = None


def to_sample(record: Record, own: Sequence[int] | None, wanted: Wanted) -> Sample:
    """Give a record as the recipe's task wants it; raise InputError where it lacks that."""
    group = "" if record.group is None else str(record.group)
    if wanted.task == "segmentation" and record.mask is not None:
        mask = sample.encoded_mask(f"{record.where} mask", record.mask, wanted.classes)
        return Sample(record.views, (), mask, group)
    if not wanted.labelled and record.label is None:
        return Sample(record.views, (), group=group)
    if wanted.task == "segmentation":
        raise InputError(f"{record.where} has no mask, which task 'segmentation' needs for each image")
    value = None if isinstance(record.label, float) and math.isnan(record.label) else record.label
    return Sample(record.views, labels.of_value(value, own, wanted.classes, wanted.task, record.where), group=group)
