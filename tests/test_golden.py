"""Golden files: each kind decodes upright, torchvision agrees, another machine's answers are held to a limit."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from bitferry.device.arrays import Images, Outputs
from bitferry.device.preprocess import Preprocessing
from bitferry.pipeline.cache import Cache
from bitferry.pipeline.data.split import Split
from bitferry.pipeline.measure import golden
from tests.conftest import ROOT, Project

CONTRACT = Preprocessing(height=48, width=64)
PHOTOGRAPHS = ROOT.parent / "shared/data/natural-images"


@pytest.fixture(scope="module")
def evaluation() -> Split:
    """Smooth coloured pictures, no two corners alike, so that a turned or mirrored one shows."""
    y, x = np.mgrid[0:48, 0:64]
    pictures = [np.stack([4 * x - k, 5 * y, 255 - 2 * x - 2 * y], axis=-1).clip(0, 255) for k in (0, 9, 20, 40)]
    return Split("evaluation", np.array(pictures, np.uint8), np.arange(4) % 2, (), (), "pictures")


@pytest.fixture(scope="module")
def files(evaluation: Split, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return golden.make(evaluation, CONTRACT, Cache(tmp_path_factory.mktemp("build") / "golden"))


def scores(images: Images) -> Outputs:
    return images.reshape(len(images), -1)[:, ::501].astype(np.float32)


def test_each_kind_is_what_it_says(files: Path) -> None:
    for name, kind in golden.KINDS.items():
        with Image.open(files / name) as image:
            assert image.format == ("JPEG" if "JPEG" in kind else "PNG")
            assert (image.mode == "L") == kind.startswith("grey")
            turned = image.getexif().get(golden.EXIF_ORIENTATION) == golden.TURNED
            assert turned == kind.endswith("EXIF")
            assert image.size == ((72, 80) if turned else (80, 72))


def test_every_file_gives_its_picture_back_upright(files: Path, evaluation: Split) -> None:
    for (name, kind), picture in zip(golden.KINDS.items(), evaluation.images, strict=True):
        found = CONTRACT.load((files / name).read_bytes(), name).astype(float)
        wanted = picture.astype(float)
        if kind.startswith("grey"):
            wanted = (wanted @ [0.299, 0.587, 0.114])[..., None].repeat(3, axis=-1)
        assert np.abs(found - wanted).mean() < 4, kind


@pytest.mark.parametrize("color", ["RGB", "BGR"])
@pytest.mark.parametrize("resize", [None, 72])
@pytest.mark.parametrize("interpolation", ["nearest", "bilinear", "bicubic"])
def test_torchvision_agrees(files: Path, color: str, resize: int | None, interpolation: str) -> None:
    contract = replace(CONTRACT, color=color, resize=resize, interpolation=interpolation)  # type: ignore[arg-type]
    for name in golden.KINDS:
        content = (files / name).read_bytes()
        other = golden.second_opinion(contract, content)
        assert other is not None
        assert np.abs(other.astype(int) - contract.load(content, name)).mean() <= golden.TORCHVISION_LIMIT


def test_torchvision_has_no_lanczos(files: Path) -> None:
    contract = replace(CONTRACT, interpolation="lanczos")
    assert golden.second_opinion(contract, (files / "golden-1.jpg").read_bytes()) is None
    proved = golden.prove(files, contract, scores, np.zeros((4, 1), np.float32), scores)
    assert all(file.torchvision_mean is None for file in proved.files)


@pytest.mark.skipif(not PHOTOGRAPHS.is_dir(), reason="the photographs are not beside this checkout")
def test_torchvision_agrees_on_photographs() -> None:
    contract = Preprocessing(height=224, width=224, resize=256)
    for path in sorted(PHOTOGRAPHS.glob("*.jpg"))[:24]:
        other = golden.second_opinion(contract, path.read_bytes())
        assert other is not None
        assert (
            np.abs(other.astype(int) - contract.load(path.read_bytes(), path.name)).mean() <= golden.TORCHVISION_LIMIT
        )


def test_a_fault_in_preprocessing_is_seen_by_the_second_opinion(files: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each fault in our own code: colours swapped, orientation ignored, another crop."""
    right = Preprocessing.load
    faults = {
        "golden-1.jpg": lambda self, c, n: right(self, c, n)[..., ::-1],
        "golden-4.jpg": lambda self, c, n: right(self, c, n)[::-1],
        "golden-3.png": lambda self, c, n: np.roll(right(self, c, n), 8, axis=1),
    }
    for name, fault in faults.items():
        monkeypatch.setattr(Preprocessing, "load", fault)
        proved = golden.prove(files, CONTRACT, scores, np.zeros((4, 1), np.float32), scores)
        (found,) = [file for file in proved.files if file.name == name]
        assert found.torchvision_mean is not None
        assert found.torchvision_mean > golden.TORCHVISION_LIMIT, name


def test_the_limit_follows_the_distance_from_float(files: Path) -> None:
    pixels = np.stack([CONTRACT.load((files / name).read_bytes(), name) for name in golden.KINDS])
    here = scores(pixels)
    proved = golden.prove(files, CONTRACT, scores, here + 0.5, lambda images: scores(images) * 1.02)
    largest = float(np.abs(here).max())
    assert proved.score_limit == pytest.approx(2 * 0.02, rel=1e-3)
    assert [file.score_difference for file in proved.files] == pytest.approx([0.5 / largest] * 4)
    far = golden.prove(files, CONTRACT, scores, here, lambda images: scores(images) * 5)
    assert far.score_limit == golden.MOST_LIMIT


def test_the_bundle_carries_them_with_what_to_expect(deployed: Project, tmp_path: Path) -> None:
    bundle = Path(shutil.copytree(deployed.folder / "dist/small-openvino-1.0.0", tmp_path / "bundle"))
    expected = json.loads((bundle / "golden/expected.json").read_text())
    assert set(expected["files"]) == set(golden.KINDS)
    assert all(len(file["scores"]) == 3 for file in expected["files"].values())
    verdict = json.loads((bundle / "verdict.json").read_text())
    assert expected["score_limit"] == verdict["golden"]["score_limit"]
    assert max(file["score_difference"] for file in verdict["golden"]["files"]) < 1e-3
