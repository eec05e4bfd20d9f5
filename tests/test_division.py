"""Calibration images divided by content: the order of a list changes nothing, and who judges was not fitted on."""

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from torch import Tensor, nn

from bitferry.device.arrays import Images
from bitferry.device.errors import InputError
from bitferry.pipeline import progress
from bitferry.pipeline.artifacts import FloatModel, FloatOnnx
from bitferry.pipeline.cache import Cache
from bitferry.pipeline.data.split import Split
from bitferry.pipeline.division import FEWEST, LEAST, divide, drawn
from bitferry.pipeline.export import export, simplify
from bitferry.pipeline.load import Deployable
from bitferry.pipeline.onnx_in import quantize as onnx_quantize
from bitferry.pipeline.quantization import correct, steps
from bitferry.pipeline.quantization.graph import answers, grids, layers, rounded_answers, set_mode
from bitferry.pipeline.quantize import quantize
from bitferry.pipeline.recipe import Quantization
from bitferry.pipeline.statistics import is_less
from bitferry.targets import Scheme
from tests.conftest import subset
from tests.given import CONTRACT as ONNX_CONTRACT
from tests.given import MEAN, STD, exported, fitted
from tests.test_quantization import prepared


@pytest.fixture(scope="module")
def images() -> Images:
    found = subset("calibration", 64, classes=10)
    pixels = found["images"][np.argsort(found["labels"], kind="stable")]
    return np.ascontiguousarray(pixels if pixels.ndim == 4 else np.repeat(pixels[..., None], 3, -1))


@pytest.mark.parametrize(
    ("count", "validation"), [(1, 0), (2, 0), (17, 0), (31, 0), (32, 16), (64, 32), (200, 100), (500, 128), (2000, 256)]
)
def test_half_judge_of_few_and_a_quarter_of_many(count: int, validation: int) -> None:
    pixels = np.arange(count, dtype=np.uint32).view(np.uint8).reshape(count, 1, 4, 1)
    found = divide(pixels)
    assert (len(found.fitting), len(found.validation)) == (count - validation, validation)
    assert sorted([*found.fitting, *found.validation]) == list(range(count))


def test_large_images_are_judged_by_fewer() -> None:
    large = np.zeros((1200, 2000, 1, 3), np.uint8)
    large[:, :2, 0, 0] = np.arange(1200, dtype=np.uint16).view(np.uint8).reshape(1200, 2)
    assert len(divide(large).validation) == 256
    assert len(divide(np.repeat(large, 30, 2)).validation) == LEAST


def test_copies_count_once_and_never_on_both_sides(images: Images) -> None:
    doubled = np.concatenate([images, images[::-1]])
    found = divide(doubled)
    assert found.copies == len(images)
    assert len(np.unique(doubled[[*found.fitting, *found.validation]], axis=0)) == len(images)
    assert np.array_equal(drawn(doubled, None), drawn(images, None))


def test_a_count_is_drawn_evenly_from_a_folder_sorted_by_class() -> None:
    found = subset("calibration", 500, classes=10)
    order = np.argsort(found["labels"], kind="stable")
    division = divide(found["images"][order], 100)
    labels = found["labels"][order][[*division.fitting, *division.validation]]
    assert len(labels) == 100
    assert np.bincount(labels, minlength=10).min() > 0
    assert set(map(bytes, drawn(found["images"], 50))) <= set(map(bytes, drawn(found["images"], 100)))


SETTINGS: dict[str, dict[str, Any]] = {
    "default": {},
    "few": {"images": 40},
    "enough": {"images": "enough"},
    "steps": {"rounding": "layers", "bias_correction": "full", "ranges": "learned", "iterations": 2},
}


@pytest.mark.parametrize("name", SETTINGS)
def test_another_order_gives_the_same_program(name: str, images: Images) -> None:
    found = []
    for seed in (None, 1):
        order = np.arange(64) if seed is None else np.random.default_rng(seed).permutation(64)
        given = torch.from_numpy(images[order])
        model = prepared(torch.from_numpy(images))
        with torch.no_grad():
            steps.calibrate(model, given, Quantization(**SETTINGS[name]))
            found.append((rounded_answers(model, torch.from_numpy(images)), [grid.scale for grid in grids(model)]))
    assert torch.equal(found[0][0], found[1][0])
    assert all(torch.equal(*pair) for pair in zip(found[0][1], found[1][1], strict=True))


class Breaking(nn.Module):
    """Scores that are infinite for an image that is white all over."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second, self.head = nn.Conv2d(3, 8, 3, 2), nn.Conv2d(8, 8, 3, 2), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        white = (x.mean((1, 2, 3)) > (0.99 - MEAN) / STD).float()
        features = torch.relu(self.second(torch.relu(self.first(x)))).mean((2, 3))
        scores: Tensor = self.head(features) / (1 - white)[:, None]
        return scores


def with_a_white_one(images: Images, role: str) -> tuple[Images, int]:
    """Replace the image at place 13 by a white one that the division gives a role; and one after it by its copy."""
    given = images[:48].copy()
    for value in range(200):
        given[13] = 255
        given[13, 0, 0, 0] = value
        given[29] = given[13]
        division = divide(given)
        if 13 in (division.validation if role == "validation" else division.fitting):
            return given, 13
    raise AssertionError("the hash of no white image falls on this side")


@pytest.mark.parametrize("role", ["validation", "fitting"])
@pytest.mark.parametrize("way", ["PyTorch", "ONNX"])
@pytest.mark.parametrize("more", [{}, {"images": "enough"}, {"equalize": False, "images": 30}])
def test_an_image_whose_scores_are_not_finite_is_named(
    way: str, role: str, more: dict[str, Any], images: Images, tmp_path: Path
) -> None:
    """By its place in the user's list and its file, whatever order and part of the list is at work."""
    pixels = np.stack([ONNX_CONTRACT.fit(image) for image in images])
    given, place = with_a_white_one(pixels, role)
    if more.get("images") == 30:
        given = np.concatenate([given[13:14], given[:13], given[14:20]])  # too few to divide
        place = 0
    names = tuple(f"photos/{i}.png" for i in range(len(given)))
    split = Split("calibration", given, np.zeros((len(given), 0), np.int64), names, (), "key")
    model = FloatModel(Deployable(Breaking(), ONNX_CONTRACT).eval(), ONNX_CONTRACT, tuple("01234"), "key")
    build, settings = Cache(tmp_path / "build"), Quantization(**more)
    wanted = rf"scores of photos/{place}\.png, number {place + 1} of {len(given)} calibration images, are not finite"
    if way == "PyTorch":
        with pytest.raises(InputError, match=wanted):
            quantize(model, split, Scheme(), settings, build)
        return
    fine = Split("calibration", pixels[30:], np.zeros((len(pixels) - 30, 0), np.int64), (), (), "fine")
    simplified = simplify(export(model, fine, build), fine, build)
    baseline = FloatOnnx(simplified.path, simplified.path, ONNX_CONTRACT, model.classes, "key")
    with pytest.raises(InputError, match=wanted):
        onnx_quantize.quantize(baseline, simplified, split, Scheme(), settings, build)


@pytest.mark.parametrize("more", [{}, {"images": 40}, {"images": "enough"}])
def test_another_order_gives_the_same_onnx(more: dict[str, Any], tmp_path: Path) -> None:
    exported(fitted(), tmp_path / "model.onnx")
    pixels = np.stack([ONNX_CONTRACT.fit(image) for image in subset("calibration", 64)["images"]])
    given = onnx.load(tmp_path / "model.onnx").graph.input[0].type.tensor_type
    if given.elem_type == onnx.TensorProto.FLOAT:
        pixels = pixels.transpose(0, 3, 1, 2).astype(np.float32)
    made = []
    for place, one in enumerate((pixels, pixels[np.random.default_rng(1).permutation(len(pixels))])):
        out = tmp_path / str(place)
        out.mkdir()
        settings = Quantization(**more)
        onnx_quantize._quantize(tmp_path / "model.onnx", one, Scheme(), settings, out, equalize=False)
        made.append((out / "model.onnx").read_bytes())
    assert made[0] == made[1]


def test_a_step_that_helps_only_the_images_it_is_fitted_on_is_dropped(
    images: Images, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """What is fitted on images is judged on others: here biases are set so that the fitting images' mean is exact."""
    progress.console.quiet = False
    seen: list[Tensor] = []

    def full(model: Any, given: Tensor) -> int:
        seen.append(given)
        last = layers(model)[-1]
        assert last.bias is not None
        set_mode(model, "off")
        last.bias.add_(2 * (answers(model, given[:1]) - answers(model, given)).mean(0))
        return 1

    monkeypatch.setattr(correct, "full", full)
    model = prepared(torch.from_numpy(images))
    with torch.no_grad():
        steps.calibrate(model, torch.from_numpy(images), Quantization(bias_correction="full", equalize=False))
    judged = {bytes(image) for image in images[divide(images).validation]}
    assert not judged & {bytes(image.numpy()) for image in seen[0]}
    told = capsys.readouterr().err
    assert "full bias correction dropped" in told
    assert "on 32 validation images" in told.replace("\n", " ")


@pytest.mark.parametrize("way", ["PyTorch", "ONNX"])
def test_a_figure_says_whether_the_ranges_have_seen_its_images(
    way: str, images: Images, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Ranges of few images gain by the validation images; what is printed of these afterwards is no forecast."""
    progress.console.quiet = False
    if way == "PyTorch":
        model = prepared(torch.from_numpy(images))
        with torch.no_grad():
            steps.calibrate(model, torch.from_numpy(images), Quantization(equalize=False))
    else:
        exported(fitted(), tmp_path / "model.onnx")
        pixels: Any = np.stack([ONNX_CONTRACT.fit(image) for image in images]).transpose(0, 3, 1, 2).astype(np.float32)
        onnx_quantize._quantize(tmp_path / "model.onnx", pixels, Scheme(), Quantization(), tmp_path, equalize=False)
    told = " ".join(capsys.readouterr().err.split())
    chosen, _, after = told.partition("ranges of all images in place of those fitted on: ")
    assert "which the ranges have seen" not in chosen
    assert chosen.count("on 32 validation images") == 1
    assert after.count("on 32 validation images") == after.count("on 32 validation images, which the ranges have seen")
    assert "bias correction" in after
    first, _, then = after.partition(" dB ")[0].partition(" → ")
    assert float(then) >= float(first)


@pytest.mark.parametrize("count", [1, 2, 5, 16, 2 * FEWEST - 1])
def test_too_few_images_choose_nothing(count: int, images: Images, capsys: pytest.CaptureFixture[str]) -> None:
    progress.console.quiet = False
    model = prepared(torch.from_numpy(images))
    settings = Quantization(rounding="layers", ranges="learned")
    with torch.no_grad():
        found = steps.calibrate(model, torch.from_numpy(images[:count]), settings)
    told = " ".join(capsys.readouterr().err.split())
    assert (found.images, found.validation) == (count, 0)
    for name in ("equalization", "rounding", "learning"):
        assert f"{name} is left out: fewer than 32 different calibration images are too few to judge it" in told
    assert "bias correction is taken as it is" in told
    plain = prepared(torch.from_numpy(images))
    with torch.no_grad():
        steps.calibrate(plain, torch.from_numpy(images[:count]), Quantization(observer="histogram", equalize=False))
    pixels = torch.from_numpy(images)
    assert torch.equal(rounded_answers(model, pixels), rounded_answers(plain, pixels))


def test_less_noise_is_less_only_beyond_chance() -> None:
    random = np.random.default_rng(0)
    before = random.chisquare(8, 128)
    assert is_less(0.7 * before * random.lognormal(0, 0.2, 128), before)
    assert not is_less(before * random.lognormal(0, 0.2, 128), before * random.lognormal(0, 0.2, 128))
    heavy = before.copy()
    heavy[3] = 5000
    cured, worse = 1.02 * before, 0.7 * before
    worse[3] = 20000
    assert not is_less(cured, heavy)  # one image alone gained
    assert not is_less(worse, heavy)  # all gained a little, and together they lost
    assert is_less(0.7 * heavy, heavy)
    assert not is_less(before, before)
    assert not is_less(before[:1] / 2, before[:1])


class Rare(nn.Module):
    """Features whose sum only bright images make large: what the first images never reach is cut off in others."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second, self.head = nn.Conv2d(3, 16, 3, 2), nn.Conv2d(16, 32, 3, 2), nn.Linear(32, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.second(torch.relu(self.first(x))))
        scores: Tensor = self.head(torch.exp(1.5 * x.mean((2, 3))))
        return scores


@pytest.mark.parametrize("observer", ["best", "scores"])
def test_ranges_hold_on_images_that_were_not_seen(observer: Any) -> None:
    given = torch.from_numpy(np.repeat(subset("calibration", 500, classes=10)["images"][..., None], 3, -1))
    unseen = torch.from_numpy(np.repeat(subset("evaluation", 400, classes=10)["images"][..., None], 3, -1))
    worth = {}
    for name in ("histogram", observer):
        model = prepared(given, net=Rare())
        with torch.no_grad():
            steps.calibrate(model, given, Quantization(observer=name))
            teacher = answers(model, unseen)
            found = rounded_answers(model, unseen)
        worth[name] = float(10 * torch.log10(teacher.square().sum() / (teacher - found).square().sum()))
    assert worth[observer] > worth["histogram"] - 1
