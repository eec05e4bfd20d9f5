"""Image bytes in, pixels out: against torchvision's own transforms, and on files that are odd or broken."""

import io
from typing import Any

import numpy as np
import pytest
from PIL import Image
from torchvision.transforms import v2

from bitferry.device.errors import InputError
from bitferry.device.preprocess import Preprocessing

RNG = np.random.default_rng(0)


def photo(width: int = 97, height: int = 61) -> Image.Image:
    """Make a smooth colour image that is different in every corner."""
    small = RNG.integers(0, 256, (6, 8, 3), dtype=np.uint8)
    return Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC)


def encoded(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


@pytest.mark.parametrize(("width", "height"), [(97, 61), (61, 97), (80, 80), (33, 200)])
def test_resize_and_crop_agree_with_torchvision(width: int, height: int) -> None:
    image = photo(width, height)
    contract = Preprocessing(height=40, width=40, resize=48)
    ours = contract.load(encoded(image), "photo.png")
    theirs = v2.Compose([v2.Resize(48), v2.CenterCrop(40)])(image)  # on PIL images, with PIL's resampling
    np.testing.assert_array_equal(ours, np.asarray(theirs))


def test_without_resize_the_image_is_stretched() -> None:
    image = photo()
    ours = Preprocessing(height=20, width=30).load(encoded(image), "photo.png")
    np.testing.assert_array_equal(ours, np.asarray(v2.Resize((20, 30))(image)))


def test_raw_pixels_and_a_file_of_them_give_the_same() -> None:
    contract = Preprocessing(height=32, width=32)
    grey = np.asarray(photo(28, 28).convert("L"))
    np.testing.assert_array_equal(contract.fit(grey), contract.load(encoded(Image.fromarray(grey)), "grey.png"))


def test_bgr_is_rgb_with_the_channels_turned() -> None:
    content = encoded(photo())
    rgb = Preprocessing(height=8, width=8).load(content, "x")
    bgr = Preprocessing(height=8, width=8, color="BGR").load(content, "x")
    np.testing.assert_array_equal(rgb[..., ::-1], bgr)


def test_exif_orientation_is_applied() -> None:
    image = photo(40, 20)
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned: rotate by 270 degrees to see it upright
    turned = Preprocessing(height=40, width=20).load(encoded(image, exif=exif), "turned.png")
    np.testing.assert_array_equal(turned, np.asarray(image.transpose(Image.Transpose.ROTATE_270)))


@pytest.mark.parametrize("mode", ["L", "LA", "RGBA", "P", "CMYK", "1"])
def test_every_colour_mode_becomes_rgb(mode: str) -> None:
    image = photo().convert(mode)
    kind = "TIFF" if mode == "CMYK" else "PNG"
    array = Preprocessing(height=8, width=8).load(encoded(image, kind), "x")
    assert array.shape == (8, 8, 3)
    assert array.std() > 5  # a picture, not one flat colour


def test_sixteen_bit_keeps_its_top_eight_bits() -> None:
    wide = np.linspace(0, 65535, 64 * 64, dtype=np.uint16).reshape(64, 64)
    array = Preprocessing(height=64, width=64).load(encoded(Image.fromarray(wide)), "x")
    np.testing.assert_array_equal(array[..., 0], (wide >> 8).astype(np.uint8))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "the file is empty"),
        (b"just some text, not a picture", "not an image"),
        (encoded(photo(), "JPEG")[:300], "a broken image"),
        (encoded(photo())[:-40], "a broken image"),
        (b"DDS " + (124).to_bytes(4, "little") + bytes(120), "a broken image"),
        (encoded(Image.fromarray(np.full((8, 8), 200, np.int32)), "TIFF"), "pixels of 32 bits have no fixed range"),
    ],
)
def test_a_broken_file_is_named(content: bytes, message: str) -> None:
    with pytest.raises(InputError, match="cat.jpg.*" + message):
        Preprocessing(height=8, width=8).load(content, "cat.jpg")


def test_an_image_that_grows_beyond_all_bounds_is_refused() -> None:
    with pytest.raises(InputError, match="30000×1 is too narrow: resized it has 7680000×256"):
        Preprocessing(height=224, width=224, resize=256).load(encoded(Image.new("L", (30_000, 1))), "line.png")


def test_a_decompression_bomb_is_refused_before_decoding() -> None:
    bomb = encoded(Image.new("1", (20_000, 20_000)))
    assert len(bomb) < 100_000
    with pytest.raises(InputError, match="20000×20000 pixels, more than"):
        Preprocessing(height=8, width=8).load(bomb, "bomb.png")


@pytest.mark.parametrize(
    "fields", [{"height": 0}, {"resize": 4}, {"std": (0.0, 1.0, 1.0)}, {"scale": 0.0}, {"width": 100_000}]
)
def test_an_impossible_contract_is_refused(fields: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="must be|is not between"):
        Preprocessing(**({"height": 8, "width": 8} | fields))


def test_pixels_of_no_known_range_are_refused() -> None:
    with pytest.raises(InputError, match=r"depth\.tiff: pixels of mode F have no fixed range"):
        Preprocessing(height=8, width=8).load(
            encoded(Image.fromarray(RNG.random((8, 8), dtype=np.float32)), "TIFF"), "depth.tiff"
        )
