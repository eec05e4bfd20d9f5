"""Images and labels that are broken, bombs, senseless or wrong: told by name, and odd but whole ones read alike."""

import io
import json
import shutil
import struct
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from bitferry.device.errors import InputError
from bitferry.pipeline import dataset, recipe
from bitferry.pipeline.cache import Cache
from tests.conftest import Project, subset, write_project

NAMES = ("T-shirt", "Trouser", "Pullover")


def pictures(folder: Path, split: str, count: int) -> None:
    """Write real images into class folders."""
    data = subset(split, count)
    for index, (image, label) in enumerate(zip(data["images"], data["labels"], strict=True)):
        (folder / NAMES[label]).mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(folder / NAMES[label] / f"{index}.png")


@pytest.fixture
def user(tmp_path: Path) -> Project:
    """Give the small project, evaluated on a folder of images."""
    made = write_project(tmp_path / "project")
    pictures(made.folder / "pictures", "evaluation", 24)
    made.edit(('evaluation = "evaluation.npz"', 'evaluation = "pictures"'))
    return made


def png(width: int, height: int) -> bytes:
    """Write the smallest PNG that says it has so many pixels."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


def encoded(kind: str) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(subset("evaluation", 1)["images"][0]).resize((200, 200)).save(stream, kind)
    return stream.getvalue()


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (b"", "the file is empty"),
        (b"hello", "not an image (5 bytes that begin with b'hello')"),
        (encoded("PNG")[:-300], "a broken image"),
        (encoded("JPEG")[:500], "a broken image"),
        (encoded("PNG")[:30], "not an image"),
    ],
    ids=["empty", "text", "png", "jpeg", "head"],
)
def test_49_images_that_are_broken(user: Project, content: bytes, told: str) -> None:
    (user.folder / "pictures/Trouser/odd.jpg").write_bytes(content)
    line = user.refused("deploy", "small.toml")
    assert "odd.jpg: " in line
    assert told in line
    assert [path.name.split("-")[0] for path in (user.folder / "build/small").glob("data-*")] == ["data"]  # calibration


def test_49_the_ending_does_not_matter(deployed: Project, tmp_path: Path) -> None:
    for name in ("photo.png", "photo.jpg", "photo"):
        (tmp_path / name).write_bytes(encoded("PNG"))
    done = deployed.bitferry("predict", "dist/small-onnxruntime-1.0.0", *map(str, sorted(tmp_path.iterdir())))
    assert done.returncode == 0, done.stderr
    assert len({line.split("\t")[1] for line in done.stdout.splitlines()}) == 1


@pytest.mark.parametrize(("width", "height"), [(60_000, 60_000), (2**31 - 1, 2**31 - 1), (2**31 - 1, 1)])
def test_50_a_decompression_bomb(user: Project, width: int, height: int) -> None:
    (user.folder / "pictures/Trouser/bomb.png").write_bytes(png(width, height))
    line = user.refused("deploy", "small.toml")
    assert f"bomb.png: {width}×{height} pixels, more than the 178956970 allowed" in line


def test_50_an_array_that_says_it_is_endless(user: Project) -> None:
    with np.load(user.folder / "calibration.npz") as arrays:
        labels = arrays["labels"]
    stream = io.BytesIO()
    np.lib.format.write_array_header_1_0(
        stream, {"descr": "|u1", "fortran_order": False, "shape": (10**9, 1000, 1000, 3)}
    )
    np.savez(user.folder / "calibration.npz", labels=labels)
    with zipfile.ZipFile(user.folder / "calibration.npz", "a") as archive:
        archive.writestr("images.npy", stream.getvalue())
    line = user.refused("deploy", "small.toml")
    assert "calibration.npz says that it holds more than this machine has memory for" in line
    np.savez_compressed(user.folder / "calibration.npz", images=np.zeros((4000, 200, 200), np.uint8), labels=labels)
    assert "calibration.npz is a decompression bomb: its images.npy has " in user.refused("deploy", "small.toml")


def grey() -> Image.Image:
    return Image.fromarray(subset("evaluation", 1)["images"][0]).convert("L")


def turned(path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    grey().transpose(Image.Transpose.ROTATE_90).save(path.with_suffix(".png"), exif=exif)


ODD: dict[str, Callable[[Path], None]] = {
    "plain": lambda path: grey().convert("RGB").save(path.with_suffix(".png")),
    "grey": lambda path: grey().save(path.with_suffix(".png")),
    "alpha": lambda path: grey().convert("RGBA").save(path.with_suffix(".png")),
    "grey alpha": lambda path: grey().convert("LA").save(path.with_suffix(".png")),
    "palette": lambda path: grey().convert("P").save(path.with_suffix(".png")),
    "cmyk": lambda path: grey().convert("RGB").convert("CMYK").save(path.with_suffix(".tiff")),
    "16 bit": lambda path: Image.fromarray(np.asarray(grey()).astype(np.uint16) * 257).save(path.with_suffix(".png")),
    "turned": turned,
}


def test_51_the_same_picture_in_every_mode_is_answered_alike(deployed: Project, tmp_path: Path) -> None:
    for name, write in ODD.items():
        write(tmp_path / name)
    files = sorted(tmp_path.iterdir())
    assert len(files) == len(ODD)
    done = deployed.bitferry("predict", "dist/small-onnxruntime-1.0.0", "--json", *map(str, files))
    assert done.returncode == 0, done.stderr
    answers = [json.loads(line) for line in done.stdout.splitlines()]
    assert len({tuple(zip(one["classes"], one["probabilities"], strict=True)) for one in answers}) == 1


def test_52_calibration_images_that_are_none(project: Project) -> None:
    path = project.folder / "calibration.npz"
    good = subset("calibration", 16)
    np.savez(path, images=good["images"][:0])
    assert "the calibration data calibration.npz holds no images" in project.refused("deploy", "small.toml")
    np.savez(path, images=np.repeat(good["images"][:1], 16, 0))
    assert "15 of the 16 calibration images are copies of others" in project.refused("deploy", "small.toml")
    np.savez(path, images=np.stack([np.full((28, 28, 3), shade, np.uint8) for shade in range(0, 256, 16)]))
    line = project.refused("deploy", "small.toml")
    assert "every calibration image is of one colour, and the evaluation images are not" in line


@pytest.mark.parametrize("form", ["folder", "list"])
def test_52_calibration_images_of_one_class(project: Project, form: str) -> None:
    pictures(project.folder / "pictures", "calibration", 48)
    chosen = sorted((project.folder / "pictures/Trouser").iterdir())
    if form == "folder":
        for name in {*NAMES} - {"Trouser"}:
            shutil.rmtree(project.folder / "pictures" / name)
        project.edit(('calibration = "calibration.npz"', 'calibration = "pictures"'))
    else:
        (project.folder / "list.tsv").write_text("".join(f"{path}\tTrouser\n" for path in chosen))
        project.edit(('calibration = "calibration.npz"', 'calibration = "list.tsv"'))
    line = project.refused("deploy", "small.toml")
    assert f"all {len(chosen)} calibration images in " in line
    assert "are of the class 'Trouser'; give some of every class" in line


def test_53_the_same_image_in_calibration_and_evaluation(project: Project) -> None:
    parts = (subset("evaluation", 30), subset("calibration", 2))
    both = {name: np.concatenate([part[name] for part in parts]) for name in ("images", "labels")}
    np.savez(project.folder / "evaluation.npz", **both)  # type: ignore[arg-type]
    line = project.refused("deploy", "small.toml")
    assert "2 evaluation images are also in the calibration data, for example evaluation.npz[30]" in line


def test_54_labels_out_of_range(project: Project) -> None:
    data = subset("evaluation", 60, classes=5)
    np.savez(project.folder / "evaluation.npz", **data)  # type: ignore[arg-type]
    line = project.refused("deploy", "small.toml")
    assert "labels out of range (3, 4); there are 3 classes, counted from 0" in line


def test_54_permuted_labels_miss_the_known_accuracy(deployed: Project, tmp_path: Path) -> None:
    user = Project(Path(shutil.copytree(deployed.folder, tmp_path / "project")))
    data = subset("evaluation", 600)
    data["labels"] = np.array([1, 0, 2], np.uint8)[data["labels"]]
    np.savez(user.folder / "evaluation.npz", **data)  # type: ignore[arg-type]
    user.edit(("accuracy_drop_pp = 5.0", "accuracy_drop_pp = 5.0\nfloat_percent = 90.0"))
    done = user.bitferry("deploy", "small.toml", "--target", "onnxruntime", "--quick", "--json")
    assert done.returncode == 1
    (verdict,) = json.loads(done.stdout)
    assert verdict["outcome"] == "fail"
    (told,) = [one for one in verdict["reasons"] if "the float model itself" in one]
    assert "not the 90 % that budget.float_percent records" in told
    assert "check labels, class order, weights and preprocessing" in told
    assert verdict["bundle"] is None


def test_55_a_folder_without_class_folders(user: Project) -> None:
    for path in (user.folder / "pictures").glob("*/*"):
        path.rename(path.parents[1] / f"{path.parent.name}-{path.name}")
    for folder in [path for path in (user.folder / "pictures").iterdir() if path.is_dir()]:
        folder.rmdir()
    line = user.refused("deploy", "small.toml")
    assert "has no class folders; expected pictures/T-shirt/… with images, or use a list file" in line
    (user.folder / "pictures/Trouser").mkdir()
    assert "the evaluation data pictures holds no images" in user.refused("deploy", "small.toml")


def test_a_few_broken_images_are_left_out_and_listed(user: Project) -> None:
    pictures(user.folder / "pictures", "evaluation", 150)
    whole = [len([*(user.folder / "pictures" / name).iterdir()]) for name in NAMES]
    (user.folder / "pictures/T-shirt/0-odd.jpg").write_bytes(b"")
    done = user.bitferry("train", "small.toml")
    assert done.returncode == 0, done.stderr
    assert (
        "evaluation: left out 1 of 151 that are broken, for example pictures/T-shirt/0-odd.jpg: not an" in done.stderr
    )
    (user.folder / "pictures/T-shirt/1-odd.jpg").write_bytes(encoded("JPEG")[:500])
    line = user.refused("train", "small.toml")
    assert "2 of the 152 evaluation images are broken, more than data.broken_share = 0.01 allows: pictures/T-" in line
    listed = json.loads((user.folder / "build/small/broken-evaluation.json").read_text())
    assert [one.partition(": ")[0] for one in listed] == [f"pictures/T-shirt/{i}-odd.jpg" for i in (0, 1)]
    user.edit(('evaluation = "pictures"', 'evaluation = "pictures"\nbroken_share = 0.02'))
    read, build = recipe.read(user.recipe), Cache(user.folder / "build/small")
    how = dataset.Handling(read.data.broken_share)
    found = dataset.split("evaluation", read.data.evaluation, read.classes, read.preprocessing, build, how=how)
    assert np.bincount(found.labels).tolist() == whole
    for image, source in zip(found.images, found.sources, strict=True):
        np.testing.assert_array_equal(image, read.preprocessing.load(Path(source).read_bytes(), source))
    with pytest.raises(InputError, match="2 of the 152 evaluation images are broken"):  # as it was kept before, too
        dataset.split("evaluation", read.data.evaluation, read.classes, read.preprocessing, build)
