"""Messages of a command line and a recipe: what was expected, before anything is decoded or built."""

import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from device.errors import InputError
from device.preprocess import decode
from pipeline import recipe
from pipeline.data import labels
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


@pytest.mark.parametrize("largest", [200, 1023, 4095])
def test_values_of_fewer_bits_in_16_bits_are_refused(largest: int) -> None:
    with pytest.raises(InputError, match=f"16-bit pixels of which the largest is {largest}, as of"):
        decode(png(largest), "x.png")


@pytest.mark.parametrize("largest", [0, 4096, 65535])
def test_16_bits_and_black_are_taken(largest: int) -> None:
    assert np.asarray(decode(png(largest), "x.png")).max() == largest >> 8


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
