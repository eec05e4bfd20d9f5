"""Calibration images: how many are enough, which to pick, every one used, and none of noise."""

import json
import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from bitferry.pipeline import pick, recipe
from bitferry.pipeline.cache import Cache
from bitferry.pipeline.data.senseless import likeness
from bitferry.pipeline.division import LEAST
from bitferry.pipeline.run import Run
from tests.conftest import Project, subset


@pytest.fixture
def own(deployed: Project, tmp_path: Path) -> Project:
    return Project(Path(shutil.copytree(deployed.folder, tmp_path / "own")))


def test_images_are_doubled_until_more_bring_nothing(own: Project) -> None:
    np.savez(own.folder / "calibration.npz", **subset("calibration", 300, classes=10))  # type: ignore[arg-type]
    own.edit(("[budget]", '[quantization]\nimages = "enough"\n[budget]'))
    done = own.bitferry("deploy", "small.toml", "-t", "openvino", "--quick", "-o", "out")
    assert done.returncode == 0, done.stderr
    assert "calibration images to fit on: 16 " in done.stderr
    used = json.loads((own.folder / "out/small-openvino-1.0.0/manifest.json").read_text())["calibration"]
    counts = [int(count) for count in used["sqnr_db_by_count"]]
    assert counts[:-1] == [16 * 2**i for i in range(len(counts) - 1)]
    assert used["validation"] == LEAST
    assert counts[-1] == min(2 * counts[-2], 300 - LEAST)
    assert used["images"] == counts[-1] + LEAST <= used["given"] == 300
    worth = list(used["sqnr_db_by_count"].values())
    flat = worth[-1] - worth[-3] < 0.1
    assert flat or counts[-1] == 300 - LEAST  # all of them
    assert ("more bring nothing" if counts[-1] < 300 - LEAST else "more may be better") in done.stderr
    assert all(late - early >= 0.1 for early, late in zip(worth[:-3], worth[2:-1], strict=True))


def test_the_manifest_counts_the_images_that_were_used(deployed: Project) -> None:
    done = deployed.bitferry("deploy", "small.toml", "-t", "openvino", "--quick", "-o", "counted")
    assert done.returncode == 0, done.stderr
    manifest = json.loads((deployed.folder / "counted/small-openvino-1.0.0/manifest.json").read_text())
    assert manifest["calibration"] == {"images": 64, "given": 64, "sqnr_db_by_count": {}, "validation": 32}


def test_calibration_needs_no_labels(own: Project) -> None:
    images = subset("calibration", 40)["images"]
    folder = own.folder / "photos/deeper"
    folder.mkdir(parents=True)
    for i, image in enumerate(images):
        Image.fromarray(image).save(folder / f"{i}.png")
    (own.folder / "list.txt").write_text("".join(f"photos/deeper/{i}.png\n" for i in range(40)))
    np.savez(own.folder / "bare.npz", images=images)
    for source in ("photos", "list.txt", "bare.npz"):
        own.recipe.write_text(
            own.recipe.read_text().replace('calibration = "calibration.npz"', f'calibration = "{source}"')
        )
        run = Run(recipe.read(own.recipe), own.recipe, Cache(own.folder / "build/small"))
        assert len(run.calibration) == 40
        own.recipe.write_text(
            own.recipe.read_text().replace(f'calibration = "{source}"', 'calibration = "calibration.npz"')
        )
    own.edit(('evaluation = "evaluation.npz"', 'evaluation = "list.txt"'))
    assert "list.txt:1: expected `file<TAB>label`" in own.refused("verify", "small.toml", "-t", "openvino")


def test_noise_is_refused(own: Project) -> None:
    images = np.random.default_rng(0).integers(0, 256, (32, 28, 28, 3), dtype=np.uint8)
    np.savez(own.folder / "calibration.npz", images=images)
    told = own.refused("verify", "small.toml", "-t", "openvino")
    assert "the calibration images look like random noise: pixels correlate with those nearby by" in told


def test_likeness_of_pictures_of_noise_and_of_one_colour() -> None:
    assert likeness(np.repeat(subset("calibration", 32)["images"][..., None], 3, -1)) > 0.5
    assert abs(likeness(np.random.default_rng(0).integers(0, 256, (8, 32, 32, 3), dtype=np.uint8))) < 0.1
    assert likeness(np.full((4, 8, 8, 3), 7, np.uint8)) == likeness(np.full((4, 8, 1, 3), 7, np.uint8)) == 1


def test_picks_are_balanced_and_unlike_each_other(own: Project) -> None:
    found = subset("calibration", 240, classes=3)
    folder = own.folder / "photos"
    folder.mkdir()
    order = np.argsort(found["labels"], kind="stable")[:150]  # many of the first class, few of the last
    for i in order:
        Image.fromarray(found["images"][i]).save(folder / f"{i}.png")
    shutil.copy(folder / f"{order[0]}.png", folder / "copy.png")
    for name in ("broken.png", "torn.png"):
        (folder / name).write_bytes(b"no image")
    done = own.bitferry("pick", "small.toml", "photos", "--count", "30", "-o", "lists/calibration.tsv")
    assert done.returncode == 0, done.stderr
    assert "left out 1: copies of others" in done.stderr
    assert "left out 2: cannot be read, for example:" in done.stderr
    lines = (own.folder / "lists/calibration.tsv").read_text().splitlines()
    assert len(set(lines)) == 30
    picked = Counter(int(found["labels"][int(Path(line).stem)]) for line in lines)
    assert max(picked.values()) <= 14  # most of the images are of the first class
    own.edit(('calibration = "calibration.npz"', 'calibration = "lists/calibration.tsv"'))
    assert own.bitferry("quantize", "small.toml", "-t", "openvino").returncode == 0


def test_a_choice_takes_turns_and_the_farthest() -> None:
    angles = np.array([0.0, 0.01, 0.02, 1.0, 2.0, 0.0, 0.01])
    scores = np.stack([np.cos(angles), np.sin(angles)], 1).astype(np.float32) * np.arange(1, 8)[:, None]
    chosen = pick.choose(scores, [0, 0, 0, 0, 0, 1, 1], 5)
    assert sorted(one for one in chosen if one < 5) == [0, 3, 4]
    assert sorted(one for one in chosen if one >= 5) == [5, 6]
    assert pick.choose(scores, [0] * 7, 99) == pytest.approx(pick.choose(scores, [0] * 7, 7))
    assert sorted(pick.choose(scores, [0] * 7, 99)) == list(range(7))


def test_picking_says_what_is_wrong(own: Project) -> None:
    assert "nowhere is no folder with images" in own.refused("pick", "small.toml", "nowhere")
