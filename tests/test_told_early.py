"""Messages of a command line and a recipe: what was expected, before anything is decoded or built."""

import io
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from bitferry.device.errors import InputError
from bitferry.device.preprocess import Preprocessing, decode
from bitferry.pipeline import dataset, recipe
from bitferry.pipeline.cache import Cache
from bitferry.pipeline.data import labels
from bitferry.pipeline.data.split import Split
from tests.conftest import Project


def test_a_precision_that_there_is_not_is_told_with_those_that_there_are(project: Project) -> None:
    expected = "expected one of int8, float32, bfloat16, float16, float8, auto"
    with pytest.raises(InputError, match=f"--precision int4: {expected}"):
        recipe.read(project.recipe, precision="int4")
    text = project.recipe.read_text()
    project.recipe.write_text('task = "boxes"\n' + text)
    with pytest.raises(InputError, match=r"task: expected one of 'classification', 'multilabel', 'seg.* 'boxes'\)$"):
        recipe.read(project.recipe)


def test_a_recipe_that_is_not_there_is_to_be_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="does not exist; name a recipe, as in `bitferry deploy mine.toml`"):
        recipe.read(tmp_path / "none.toml")


def png(largest: int) -> bytes:
    pixels, stream = np.zeros((4, 4), np.uint16), io.BytesIO()
    pixels[1, 2] = largest
    Image.fromarray(pixels).save(stream, "PNG")
    return stream.getvalue()


@pytest.mark.parametrize("largest", [0, 200, 4095, 65535])
def test_16_bits_keep_the_top_8_however_dark_a_frame_is(largest: int) -> None:
    assert np.asarray(decode(png(largest), "x.png")).max() == largest >> 8


@pytest.mark.parametrize("largest", [(200, 1023), (4095, 0), (4096, 30), (0, 0)])
def test_values_of_fewer_bits_in_16_bits_are_refused_in_a_split(largest: tuple[int, int], tmp_path: Path) -> None:
    """By all of its images together: one that is dark is none of 12 bits."""
    contract = Preprocessing(height=4, width=4)
    (tmp_path / "photos").mkdir()
    for place, one in enumerate(largest):
        (tmp_path / f"photos/{place}.png").write_bytes(png(one))
    (tmp_path / "photos/grey.png").write_bytes(png(0))
    Image.new("RGB", (4, 4), (250, 9, 9)).save(tmp_path / "photos/eight.jpg")

    def read() -> Split:
        return dataset.split("calibration", tmp_path / "photos", ("a", "b"), contract, Cache(tmp_path / "build"))

    if 0 < max(largest) < 4096:
        told = f"the largest pixel of the 3 calibration images of 16 bits is {max(largest)}, as of {{}}-bit data"
        with pytest.raises(InputError, match=told.format(max(largest).bit_length())):
            read()
    else:
        assert len(read()) == 4


def test_a_dark_frame_is_answered_in_the_field(deployed: Project, tmp_path: Path) -> None:
    """A bundle reduces it as verification does; it is no fault of a frame that the night is dark."""
    (tmp_path / "night.png").write_bytes(png(300))
    bundle = deployed.folder / "dist/small-openvino-1.0.0"
    done = subprocess.run(
        [sys.executable, bundle / "run.pyz", "predict", tmp_path / "night.png"], capture_output=True, check=False
    )
    assert done.returncode == 0, done.stderr


def test_a_mask_too_large_to_decode_is_refused() -> None:
    stream = io.BytesIO()
    Image.new("1", (20_000, 20_000)).save(stream, "PNG")
    with pytest.raises(InputError, match="the mask m.png: 20000×20000 pixels, more than the"):
        labels.decode_mask(stream.getvalue(), "m.png", ("a", "b"))


def test_a_wrong_model_is_told_before_the_data_is_read(project: Project) -> None:
    project.edit(("module:smallmodel:make", "torchvision:resnt18"))
    line = project.refused("deploy", "small.toml", "--targets", "onnxruntime")
    assert "no image classifier called 'resnt18'" in line
    assert not list(project.folder.rglob("images.npy"))


def test_the_version_is_printed(project: Project) -> None:
    assert project.bitferry("--version").stdout.startswith("bitferry ")
