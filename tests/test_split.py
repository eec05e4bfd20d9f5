"""One source divided: every class in proportion, groups whole, the same again; and near duplicates across splits."""

import io
import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image, ImageEnhance

from bitferry.device.errors import InputError
from bitferry.device.preprocess import Preprocessing
from bitferry.pipeline import dataset, recipe
from bitferry.pipeline.cache import Cache
from bitferry.pipeline.data import near, splitting
from bitferry.pipeline.data.sample import Sample, pixels
from bitferry.pipeline.data.source import Part, Sizes
from bitferry.pipeline.data.split import Split
from tests.conftest import EMBEDDED, Project, subset

CONTRACT = Preprocessing(height=32, width=32)
CLASSES = tuple(str(i) for i in range(10))


def samples(labels: Sequence[tuple[int, ...]], groups: Sequence[str] | None = None) -> list[Sample]:
    """Make samples that differ in their pixels."""
    found = []
    for i, label in enumerate(labels):
        content = np.full((2, 2, 3), 0, np.uint8)
        content[0, 0] = [i % 256, i // 256, 0]
        found.append(Sample((pixels(f"{i}", content),), label, group=groups[i] if groups else ""))
    return found


def shares(names: Sequence[str], labels: Sequence[tuple[int, ...]], label: int) -> Counter[str]:
    return Counter(name for name, one in zip(names, labels, strict=True) if label in one)


def test_every_class_is_in_every_split_in_proportion() -> None:
    random = np.random.default_rng(0)
    labels = [(int(label),) for label in random.choice(4, 2000, p=[0.7, 0.2, 0.08, 0.02])]
    names = splitting.assign(samples(labels), Sizes(evaluation=0.2, calibration=100))
    assert Counter(names) == {"evaluation": 400, "calibration": 100, "train": 1500}
    for label, count in Counter(labels).items():
        got = shares(names, labels, label[0])
        assert abs(got["evaluation"] - 0.2 * count) <= 2
        assert abs(got["calibration"] - 0.05 * count) <= 2
    assert names == splitting.assign(samples(labels), Sizes(evaluation=0.2, calibration=100))
    assert names != splitting.assign(samples(labels), Sizes(evaluation=0.2, calibration=100, seed=1))


def test_rare_labels_of_several_are_divided_first() -> None:
    random = np.random.default_rng(0)
    rates = np.array([0.5, 0.3, 0.02, 0.01])
    labels = [tuple(np.flatnonzero(random.random(4) < rates).tolist()) for _ in range(2000)]
    names = splitting.assign(samples(labels), Sizes(evaluation=0.25, calibration=0.25))
    assert Counter(names) == {"evaluation": 500, "calibration": 500, "train": 1000}
    for label in range(4):
        got = shares(names, labels, label)
        assert abs(got["evaluation"] - got.total() / 4) <= 1 + 0.02 * got.total()


def test_a_group_and_the_same_content_are_never_in_two_splits() -> None:
    random = np.random.default_rng(0)
    patients = [f"p{i}" for i in random.integers(0, 60, 600)]
    sick = {patient: int(random.integers(2)) for patient in set(patients)}
    labels = [(sick[patient],) for patient in patients]
    found = samples(labels, patients)
    found += [Sample(one.views, one.labels) for one in found[:20]]  # copies, of nobody
    names = splitting.assign(found, Sizes(evaluation=0.3, calibration=0.1))
    for patient in set(patients):
        assert len({name for name, one in zip(names, found, strict=True) if one.group == patient}) == 1
    assert names[:20] == names[600:]
    counts = Counter(names)
    assert abs(counts["evaluation"] - 186) <= 12
    assert abs(counts["calibration"] - 62) <= 12
    with pytest.raises(InputError, match=r"leaves no image for .*: there are 600 images in 1 groups that stay whole"):
        splitting.assign(samples(labels, ["one"] * 600), Sizes())
    with pytest.raises(InputError, match="data.split asks for 700 images, and there are 600"):
        splitting.assign(samples(labels), Sizes(evaluation=600, calibration=100))
    left = splitting.assign(samples(labels), Sizes(evaluation=100, calibration=100, train=50))
    assert Counter(left) == {"unused": 350, "evaluation": 100, "calibration": 100, "train": 50}


@pytest.fixture
def divided(project: Project) -> Project:
    """Give the small project with one array file that is divided."""
    np.savez(project.folder / "all.npz", **subset("train", 300))  # type: ignore[arg-type]
    project.edit(
        ('train = "train.npz"\n', ""),
        ('calibration = "calibration.npz"\n', ""),
        ('evaluation = "evaluation.npz"', 'source = "all.npz"\nsplit = {evaluation = 0.3, calibration = 40}'),
    )
    return project


def parts(project: Project, **more: object) -> dict[str, Split]:
    build = Cache(project.folder / "build/small")
    fields = {"source": project.folder / "all.npz"} | more
    return {
        name: dataset.split(name, Part.model_validate(fields | {"part": name}), CLASSES[:3], CONTRACT, build)
        for name in splitting.NAMES
    }


def test_a_manifest_says_where_each_image_went_and_pins_it(divided: Project) -> None:
    sizes = {"evaluation": 0.3, "calibration": 40}
    found = parts(divided, split=sizes)
    assert {name: len(one) for name, one in found.items()} == {"evaluation": 90, "calibration": 40, "train": 170}
    assert len({digest for one in found.values() for digest in one.digests}) == 300
    written = divided.folder / "build/small/split.json"
    told = json.loads(written.read_text())
    assert Counter(one["split"] for one in told["images"]) == {"evaluation": 90, "calibration": 40, "train": 170}
    assert told["sizes"]["seed"] == 0
    pinned = divided.folder / "pinned.json"
    pinned.write_text(written.read_text())
    whole = subset("train", 300)
    np.savez(divided.folder / "all.npz", **{name: one[::-1] for name, one in whole.items()})  # type: ignore[arg-type]
    again = parts(divided, manifest=pinned)
    assert {name: set(one.digests) for name, one in again.items()} == {n: set(one.digests) for n, one in found.items()}
    assert again["evaluation"].labels.sum() == found["evaluation"].labels.sum()
    np.savez(divided.folder / "all.npz", **{name: one[:299] for name, one in whole.items()})  # type: ignore[arg-type]
    with pytest.raises(
        InputError, match=r"1 of the 300 images of .*pinned.json are not in .*all.npz, or changed since"
    ):
        parts(divided, manifest=pinned)
    np.savez(divided.folder / "all.npz", images=whole["images"], labels=(whole["labels"] + 1) % 3)
    with pytest.raises(InputError, match="is labelled .*, in .*pinned.json"):
        parts(divided, manifest=pinned)
    pinned.write_text('{"images": []}')
    with pytest.raises(InputError, match="pinned.json is not a split.json that bitferry wrote"):
        parts(divided, manifest=pinned)


def test_a_divided_source_is_trained_on(divided: Project) -> None:
    done = divided.bitferry("train", "small.toml")
    assert done.returncode == 0, done.stderr
    assert "90 evaluation, 40 calibration, 170 train images" in done.stderr


def test_evaluation_images_of_their_own_leave_the_source_to_the_others(divided: Project) -> None:
    np.savez(divided.folder / "test.npz", **subset("train", 60, skip=300))  # type: ignore[arg-type]
    divided.edit(
        ("split = {evaluation = 0.3, calibration = 40}", 'split = {calibration = 40}\nevaluation = "test.npz"')
    )
    made = recipe.read(divided.recipe)
    found = {name: dataset.split(name, one, made.classes, made.preprocessing, Cache(divided.folder / "build"))
             for name, one in made.data.splits().items()}  # fmt: skip
    assert {name: len(one) for name, one in found.items()} == {"calibration": 40, "evaluation": 60, "train": 260}


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('source = "all.npz"\ntrain = "all.npz"', "`source` is divided into every split; take out `train`"),
        ('evaluation = "all.npz"\ncalibration = "all.npz"\nsplit = {}', "`split` is about one source that is divided"),
        ('source = "all.npz"\nmanifest = "x.json"\nsplit = {}', "`manifest` pins how the source is divided"),
        ('source = "all.npz"\nsplit = {evaluation = 0.9, calibration = 0.2}', "the shares come to 1.1 of the images"),
        ('source = "all.npz"\nevaluation = "e.npz"\nsplit = {evaluation = 9}', "take out `split.evaluation`"),
        ('source = "all.npz"\nsplit = {evaluation = 1.5}', "a share is below 1, and a number of images is whole"),
        ('source = "all.npz"\nsplit = {evaluatoin = 0.5}', "did you mean 'evaluation'?"),
        ('source = "all.npz"\nmanifest = "x.json"', "x.json is not a split.json that bitferry wrote: No such file"),
    ],
)
def test_a_division_that_cannot_be_meant_is_told(divided: Project, line: str, message: str) -> None:
    divided.edit(('source = "all.npz"\nsplit = {evaluation = 0.3, calibration = 40}', line))
    assert message in divided.refused("quantize", "small.toml")


def embedded(name: str, count: int) -> NDArray[np.uint8]:
    with np.load(EMBEDDED / f"{name}.npz") as arrays:
        images: NDArray[np.uint8] = arrays["images"][:count]
    return images


def split(name: str, images: Sequence[Image.Image], folder: Path) -> Split:
    (folder / name).mkdir(exist_ok=True)
    lines = []
    for i, image in enumerate(images):
        image.save(folder / name / f"{i}.png")
        lines.append(f"{name}/{i}.png\t{i % 10}\n")
    (folder / f"{name}.tsv").write_text("".join(lines))
    return dataset.split(name, folder / f"{name}.tsv", CLASSES, CONTRACT, Cache(folder / "build"))


def again(image: Image.Image, how: int) -> Image.Image:
    """Save a picture as somebody would who did not mean to copy it."""
    if how == 0:
        stream = io.BytesIO()
        image.save(stream, "JPEG", quality=70)
        return Image.open(io.BytesIO(stream.getvalue())).convert("RGB")
    if how == 1:
        return ImageEnhance.Contrast(image).enhance(0.85)
    return image.resize((image.width * 2, image.height * 2), Image.Resampling.BICUBIC)


def test_pictures_saved_again_are_found_and_others_are_not(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pictures = [Image.fromarray(one).convert("RGB") for one in embedded("evaluation", 400)]
    mine = split("evaluation", pictures[:200], tmp_path)
    other = split("train", [*pictures[200:], *(again(one, i % 3) for i, one in enumerate(pictures[:30]))], tmp_path)
    found = near.between(other, mine)
    right = {(200 + i, i) for i in range(30)}
    assert len(right & {pair[:2] for pair in found}) >= 27
    assert len({pair[:2] for pair in found} - right) <= 1
    build = Cache(tmp_path / "build")
    with pytest.raises(
        InputError, match=r"of the 200 evaluation images look like images of another split: .* set data\.near"
    ):
        near.refuse([mine, other], build, allow=False)
    pairs = near.refuse([mine, other], build, allow=True)
    assert {pair.other_split for pair in pairs} == {"evaluation"}
    assert "evaluation images look like" in capsys.readouterr().err


def test_the_search_misses_no_pair_within_its_bits() -> None:
    random = np.random.default_rng(0)
    left = random.integers(0, 1 << 16, (300, near.WORDS), dtype=np.uint16)
    right = left[random.permutation(300)].copy()
    for row, flips in enumerate(random.integers(0, 30, 300)):
        for bit in random.choice(256, flips, replace=False):
            right[row, bit // 16] ^= np.uint16(1 << (bit % 16))
    apart = np.bitwise_count(left[:, None] ^ right[None]).sum(2)
    assert near.pairs_within(left, right) == [(int(i), int(j)) for i, j in np.argwhere(apart <= near.BITS)]


def test_the_embedded_images_are_hardly_alike(tmp_path: Path) -> None:
    build = Cache(tmp_path / "build")
    made = [
        dataset.split(name, EMBEDDED / f"{name}.npz", CLASSES, CONTRACT, build)
        for name in ("calibration", "evaluation")
    ]
    assert len(near.refuse(made, build, allow=False)) <= 4  # of 4,000
