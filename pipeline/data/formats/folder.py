"""root/CLASS/**/IMAGE, the layout of torchvision's ImageFolder; unlabelled, images in any folders."""

from collections.abc import Iterable, Sequence
from pathlib import Path

from bitferry.device.errors import InputError
from bitferry.pipeline.data import labels, sample
from bitferry.pipeline.data.formats.lists import form
from bitferry.pipeline.data.sample import Sample, Wanted
from bitferry.pipeline.data.source import Whole

ENDINGS = {".jpg", ".jpeg", ".png", ".ppm", ".pgm", ".bmp", ".tif", ".tiff", ".webp", ".gif", ".avif"}


def reads(source: Whole) -> bool:
    """Take any folder that no other format knows."""
    return isinstance(source, Path) and source.is_dir()


def files(source: Whole) -> Iterable[Path]:
    """Give nothing: each image is a file of its own."""
    return ()


def read(source: Whole, wanted: Wanted) -> list[Sample]:
    """Read the images below each class's folder."""
    assert isinstance(source, Path)  # noqa: S101 - `reads`
    if not wanted.labelled and wanted.contract.views == 1:
        return [Sample((sample.file(path),), ()) for path in image_files(source)]
    if wanted.task in labels.FOLDER_HINTS:
        raise InputError(f"{source} is a folder, {labels.FOLDER_HINTS[wanted.task]}")
    if wanted.contract.views > 1:
        raise InputError(
            f"{source} is a folder, which does not say which {wanted.contract.views} images belong together; for "
            f"preprocessing.views = {wanted.contract.views} give a list of {form(wanted)} lines, or an .npz"
        )
    return _labelled(source, wanted.classes)


def _labelled(root: Path, classes: Sequence[str]) -> list[Sample]:
    folders = sorted(path for path in root.iterdir() if path.is_dir() and not path.name.startswith("."))
    if not folders:
        raise InputError(f"{root} has no class folders; expected {root}/{classes[0]}/… with images, or use a list file")
    found = labels.of_folders([folder.name for folder in folders], classes, root)
    return [
        Sample((sample.file(path),), (label,))
        for folder, label in zip(folders, found, strict=True)
        for path in image_files(folder)
    ]


def image_files(folder: Path) -> list[Path]:
    """List the images below a folder by their endings, in order; what is hidden is left out."""
    found = (path for path in sorted(folder.rglob("*")) if path.suffix.lower() in ENDINGS and path.is_file())
    return [path for path in found if not any(part.startswith(".") for part in path.relative_to(folder).parts)]
