"""CheXpert's train.csv → a list of studies for bitferry: frontal, lateral, findings, patient.

    python recipes/chexpert.py recipes/data/CheXpert-v1.0-small/train.csv

writes studies.tsv beside the csv, or what `--out` names. A study is one visit of a patient: its first frontal and its
first lateral image. Studies without a lateral one are left out, or their frontal image is given twice.

A finding is 1 (there), 0 (not there), −1 (the report is uncertain) or empty (the report says nothing of it). Empty is
taken as not there. What −1 is taken as, `--uncertain` says: `negative`, the default, `positive`, or `leave-out` for
the whole study. Irvin et al. 2019 (CheXpert) compare such policies: which is best depends on the finding.
"""

import argparse
import csv
import re
import sys
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

FINDINGS = (
    "No Finding", "Enlarged Cardiomediastinum", "Cardiomegaly", "Lung Opacity", "Lung Lesion", "Edema",
    "Consolidation", "Pneumonia", "Atelectasis", "Pneumothorax", "Pleural Effusion", "Pleural Other", "Fracture",
    "Support Devices",
)  # fmt: skip
COLUMNS = ("Path", "Frontal/Lateral", *FINDINGS)
VALUES = {"": 0, "0": 0, "0.0": 0, "1": 1, "1.0": 1, "-1": -1, "-1.0": -1}
IMAGE = re.compile(r"(patient\d+)/(study\d+)/[^/]+$")
HEADINGS = ("file", "lateral", "findings", "group")


class Wrong(Exception):
    """What was given is not CheXpert's; the message says where."""


@dataclass
class Study:
    """One visit: images by their view, and what its report says."""

    patient: str
    findings: dict[str, int]
    views: dict[str, str] = field(default_factory=dict)


def studies(rows: Iterable[Mapping[str, str | None]]) -> dict[str, Study]:
    """Gather a csv's rows, one for each image, by study; paths begin beside the csv."""
    found: dict[str, Study] = {}
    for number, row in enumerate(rows, start=2):
        if missing := [name for name in COLUMNS if row.get(name) is None]:
            raise Wrong(f"line {number} has no column '{missing[0]}'; expected {', '.join(COLUMNS)}")
        path, view = str(row["Path"]), str(row["Frontal/Lateral"])
        place = IMAGE.search(path)
        if place is None or view not in ("Frontal", "Lateral"):
            raise Wrong(f"line {number}: expected …/patientNNNNN/studyN/FILE, Frontal or Lateral; found {path}, {view}")
        name = path.partition("/")[2]  # the folder that holds the csv may have been renamed
        findings = {one: _value(str(row[one]), f"line {number}, {one}") for one in FINDINGS}
        study = found.setdefault(name.rpartition("/")[0], Study(place[1], findings))
        study.views.setdefault(view, name)
    return found


def _value(text: str, where: str) -> int:
    if text.strip() not in VALUES:
        raise Wrong(f"{where}: expected 1, 0, -1 or nothing, found {text!r}")
    return VALUES[text.strip()]


def lines(found: Iterable[Study], *, uncertain: str, lateral: str, left_out: dict[str, int]) -> Iterator[str]:
    """Write a study as a line of the list; count in `left_out` those that are not written, by the reason."""
    for study in found:
        frontal = study.views.get("Frontal")
        other = study.views.get("Lateral") or (frontal if lateral == "repeat-frontal" else None)
        if frontal is None or other is None:
            left_out[f"without a {'frontal' if frontal is None else 'lateral'} image"] += 1
        elif uncertain == "leave-out" and -1 in study.findings.values():
            left_out["with an uncertain finding"] += 1
        else:
            there = (1, -1) if uncertain == "positive" else (1,)
            named = "|".join(name for name, value in study.findings.items() if value in there)
            yield "\t".join((frontal, other, named, study.patient))


def convert(source: Path, out: Path, *, uncertain: str = "negative", lateral: str = "required") -> str:
    """Write the list, and say what is in it; raise Wrong for a csv that is not CheXpert's."""
    try:
        with source.open(encoding="utf-8-sig", newline="") as stream:
            found = studies(csv.DictReader(stream))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise Wrong(f"it cannot be read: {getattr(error, 'strerror', None) or error}") from error
    left_out: dict[str, int] = defaultdict(int)
    written = list(lines(found.values(), uncertain=uncertain, lateral=lateral, left_out=left_out))
    if not written:
        raise Wrong(f"no study is left of {len(found)}: {_told(left_out) or 'it has no rows'}")
    base = Path(source.parent.resolve())
    images = {base / name for line in written for name in line.split("\t")[:2]}
    if missing := sorted(path for path in images if not path.is_file()):
        raise Wrong(f"{len(missing)} of {len(images)} images are not there, for example {missing[0]}")
    if out.resolve().parent != base:
        raise Wrong(f"{out} is not in {base}, where the names in the list begin; choose a name there")
    temporary = out.with_name(f".{out.name}.part")
    temporary.write_text("\n".join(("\t".join(HEADINGS), *written)) + "\n", encoding="utf-8")
    temporary.replace(out)
    patients = len({line.rpartition("\t")[2] for line in written})
    rest = f"; left out: {_told(left_out)}" if left_out else ""
    return f"{out}: {len(written)} studies of {patients} patients{rest}"


def _told(left_out: Mapping[str, int]) -> str:
    return ", ".join(f"{count} {why}" for why, count in left_out.items())


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; give its exit code."""
    parser = argparse.ArgumentParser(description=str(__doc__), formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("csv", type=Path, help="train.csv or valid.csv as CheXpert has them")
    parser.add_argument("--out", type=Path, help="the list, in the csv's folder; studies.tsv there by default")
    parser.add_argument("--uncertain", choices=("negative", "positive", "leave-out"), default="negative")
    parser.add_argument("--lateral", choices=("required", "repeat-frontal"), default="required")
    asked = parser.parse_args(arguments)
    out = asked.out or asked.csv.with_name("studies.tsv")
    try:
        told = convert(asked.csv, out, uncertain=asked.uncertain, lateral=asked.lateral)
    except Wrong as error:
        sys.stderr.write(f"error: {asked.csv}: {error}\n")
        return 2
    sys.stderr.write(f"{told}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
