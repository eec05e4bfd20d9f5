"""Batches for training: the order that was asked for, the same chance again from any batch on, masks moved along."""

import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from bitferry.device.preprocess import Preprocessing
from bitferry.pipeline import augment, dataset, loader, recipe
from bitferry.pipeline.augmentation import Augmentation
from bitferry.pipeline.cache import Cache
from bitferry.pipeline.data.split import Split
from bitferry.pipeline.measure.metrics import Task
from tests.conftest import Project, subset

EVERYTHING = Augmentation(
    horizontal_flip=True, vertical_flip=True, crop=(0.3, 1.0), rotate=20, brightness=0.3, contrast=0.3, saturation=0.3,
    hue=0.1, auto="trivial", erase=0.5,
)  # fmt: skip
PLAIN = Augmentation()


def split(images: NDArray[np.uint8], labels: NDArray[np.integer[Any]]) -> Split:
    return Split("train", images, labels, tuple(map(str, range(len(labels)))), (), "key")


@pytest.fixture(scope="module")
def real() -> Split:
    data = subset("train", 50, classes=10)
    return split(np.repeat(data["images"][..., None], 3, -1), data["labels"].astype(np.int64))


def taken(
    data: Split, how: Augmentation, *, seed: int = 0, start: int = 0, task: Task = "classification", size: int = 8
) -> list[tuple[Tensor, Tensor]]:
    order = np.random.default_rng(0).permutation(len(data))
    return list(
        loader.batches(data, order, batch_size=size, augmentation=how, task=task, seed=seed, start=start)
    )  # fmt: skip


def test_images_come_in_the_order_that_was_asked_for(real: Split) -> None:
    order = np.random.default_rng(0).permutation(50)
    found = taken(real, PLAIN)
    assert [len(images) for images, _ in found] == [8, 8, 8, 8, 8, 8, 2]
    np.testing.assert_array_equal(torch.cat([images for images, _ in found]), real.images[order])
    np.testing.assert_array_equal(torch.cat([labels for _, labels in found]), real.labels[order])
    assert not list(
        loader.batches(real, order, batch_size=8, augmentation=PLAIN, task="classification", seed=0, start=7)
    )


@pytest.mark.parametrize("how", [EVERYTHING, Augmentation(horizontal_flip=True), Augmentation(auto="rand")])
def test_a_training_that_is_gone_on_with_sees_the_same(real: Split, how: Augmentation) -> None:
    whole, rest, other = taken(real, how), taken(real, how, start=3), taken(real, how, seed=1)
    for (images, labels), (again, same) in zip(whole[3:], rest, strict=True):
        assert torch.equal(images, again)
        assert torch.equal(labels, same)
    assert any(not torch.equal(a[0], b[0]) for a, b in zip(whole, other, strict=True))
    assert all(torch.equal(a[1], b[1]) for a, b in zip(whole, other, strict=True))


def test_mirroring_whole_batches_gives_what_mirroring_one_by_one_does(real: Split) -> None:
    """The short way of flips alone beside the way of all other changes: the same pictures and masks come of both."""
    how = Augmentation(horizontal_flip=True, vertical_flip=True)
    images, masks = real.images[:3], real.images[:3, ..., 0]
    for image, mask in zip(images, masks, strict=True):
        short, plain = set(), set()
        for seed in range(40):
            found = loader._flipped(
                image[None].copy(), mask[None].copy(), how, np.random.default_rng(seed), masked=True
            )
            short.add((found[0][0].numpy().tobytes(), found[1][0].numpy().tobytes()))
            one = augment.sample(image[None], mask, mask.shape, how, np.random.default_rng(seed))
            plain.add((one[0][0].permute(1, 2, 0).numpy().tobytes(), one[1].numpy().tobytes()))
        assert short == plain
        assert len(short) == 4


def test_who_stops_early_leaves_no_thread(real: Split) -> None:
    found = loader.batches(real, range(50), batch_size=4, augmentation=PLAIN, task="classification", seed=0)
    next(found)
    found.close()  # type: ignore[attr-defined]
    assert not [one.name for one in threading.enumerate() if one.name.startswith("batches")]


def marked(views: int) -> Split:
    """Make pictures whose mask can be told from their pixels: a bright block in the dark."""
    random = np.random.default_rng(0)
    images = np.full((24, views, 32, 32, 3), 20, np.uint8)
    masks = np.zeros((24, 32, 32), np.uint8)
    for i in range(24):
        top, left = random.integers(4, 16, 2)
        images[i, :, top : top + 10, left : left + 12] = 220
        masks[i, top : top + 10, left : left + 12] = 1
    return split(images if views > 1 else images[:, 0], masks)


@pytest.mark.parametrize("views", [1, 2])
@pytest.mark.parametrize(
    "how",
    [
        Augmentation(horizontal_flip=True, vertical_flip=True),
        Augmentation(crop=(0.4, 0.9)),
        Augmentation(rotate=40),
        Augmentation(crop=(0.5, 1), rotate=20, brightness=0.2, erase=1),
    ],
)
def test_masks_and_views_move_with_their_image(views: int, how: Augmentation) -> None:
    data = marked(views)
    images, masks = (torch.cat(part) for part in zip(*taken(data, how, task="segmentation"), strict=True))
    assert images.shape == (24, *data.images.shape[1:])
    if views > 1:
        assert torch.equal(images[:, 0], images[:, 1])
        images = images[:, 0]
    bright, counted = images[..., 0] > 120, masks != 255
    agreed = (bright == (masks == 1))[counted].float().mean()
    assert agreed > 0.97
    assert counted.float().mean() > 0.5


@pytest.mark.parametrize(
    ("how", "changed"),
    [
        (Augmentation(crop=(0.2, 0.6)), "size"),
        (Augmentation(brightness=0.5), "mean"),
        (Augmentation(erase=1.0), "place"),
        (Augmentation(auto="rand"), "some"),
        (Augmentation(auto="trivial"), "some"),
        (Augmentation(hue=0.5, saturation=0.5), "some"),
    ],
)
def test_each_change_changes_and_stays_in_range(how: Augmentation, changed: str) -> None:
    random = np.random.default_rng(0)
    base = random.integers(60, 200, (1, 3, 8, 8)).astype(np.uint8)
    views = torch.from_numpy(base).repeat_interleave(4, 2).repeat_interleave(4, 3)
    given = views.permute(0, 2, 3, 1).numpy()
    found = [augment.sample(given, None, (32, 32), how, np.random.default_rng(i))[0] for i in range(40)]
    assert all(one.dtype == torch.uint8 and one.shape == views.shape for one in found)
    different = sum(not torch.equal(one, views) for one in found)
    assert different >= (20 if changed == "some" else 38)
    if changed == "mean":
        means = [float(one.float().mean() / views.float().mean()) for one in found]
        assert min(means) < 0.75
        assert max(means) > 1.2
    if changed == "place":
        shares = [float((one != views).any(1).float().mean()) for one in found]
        assert 0.01 < min(shares) < max(shares) < 0.4


def test_crops_are_of_more_pixels_than_the_model_takes(tmp_path: Path) -> None:
    big = np.random.default_rng(0).integers(0, 256, (3, 90, 60, 3), np.uint8)
    np.savez(tmp_path / "a.npz", images=big, labels=np.arange(3))
    contract = Preprocessing(height=20, width=20, resize=24)
    how = Augmentation(crop=(0.25, 1.0), margin=2)
    made = dataset.split(
        "train",
        tmp_path / "a.npz",
        ("a", "b", "c"),
        contract,
        Cache(tmp_path / "build"),
        how=dataset.Handling(room=how.room),
    )
    assert made.roomy is not None
    assert made.roomy.images.shape == (3, 48, 48, 3)
    expected = np.asarray(Image.fromarray(big[1]).resize((48, 72), Image.Resampling.BILINEAR))[12:60]
    np.testing.assert_allclose(made.roomy.images[1].astype(int), expected, atol=2)
    np.testing.assert_array_equal(made.images[1], contract.fit(big[1]))
    images, _ = next(loader.batches(made, [0, 1, 2], batch_size=3, augmentation=how, task="classification", seed=0))
    assert images.shape == (3, 20, 20, 3)


def test_a_recipe_says_how_and_the_old_key_stays(project: Project) -> None:
    assert recipe.read(project.recipe).augmentation == PLAIN
    project.edit(("epochs = 6", "epochs = 6\nhorizontal_flip = true"))
    assert recipe.read(project.recipe).augmentation == Augmentation(horizontal_flip=True)
    project.edit(("[budget]", '[augmentation]\ncrop = [0.5, 1.0]\nauto = "trivial"\n[budget]'))
    read = recipe.read(project.recipe).augmentation
    assert (read.horizontal_flip, read.crop, read.auto) == (True, (0.5, 1.0), "trivial")
    project.edit(("crop = [0.5, 1.0]", "crop = [1.0, 0.5]\nerse = 1"))
    line = project.refused("train", "small.toml")
    assert "augmentation.crop: expected the smallest first, above 0" in line
    assert "unknown key 'augmentation.erse', did you mean 'erase'?" in line
