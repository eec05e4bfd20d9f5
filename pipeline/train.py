"""Train the recipe's architecture on its training images: seeded, so that the same recipe gives the same weights."""

from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor

from device.errors import StageFailed
from device.pixels import IGNORED
from pipeline import cache, load, progress
from pipeline.artifacts import Split, Weights
from pipeline.load import PACKAGES, Deployable, architecture
from pipeline.measure.metrics import Task
from pipeline.recipe import Recipe
from targets import has_bfloat16, usable_cpus

WARM_UP_SHARE = 0.2
BETAS = (0.9, 0.99)  # 0.999 remembers the first, useless gradients for longer than a short training lasts


def train(recipe: Recipe, data: Split, build: cache.Cache, *, folder: Path = Path()) -> Weights:
    """Train from scratch with AdamW and the one-cycle schedule (Smith & Topin 2018)."""
    bfloat16 = has_bfloat16()
    key = cache.key(
        "train",
        code=__file__,
        packages=PACKAGES[recipe.model.source.partition(":")[0]],
        load=cache.file_hash(Path(load.__file__)),
        own_code=load.own_code(recipe, folder),
        own_imports=load.own_imports(recipe, folder),
        model=recipe.model.model_dump(mode="json"),
        contract=recipe.preprocessing,
        classes=len(recipe.classes),
        task=recipe.task,
        training=recipe.training.model_dump(),
        data=data.key,
        bfloat16=bfloat16,
    )
    done = build.folder("train", key, partial(_train, recipe, data, bfloat16, folder))
    return Weights(done / "weights.safetensors", key)


def _train(recipe: Recipe, data: Split, bfloat16: bool, folder: Path, out: Path) -> None:
    settings = recipe.training
    torch.set_num_threads(usable_cpus())
    torch.manual_seed(settings.seed)
    model = architecture(recipe, folder)
    deployable = Deployable(model, recipe.preprocessing).train()
    batches = max(1, len(data) // settings.batch_size)
    rate = settings.learning_rate
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=rate, betas=BETAS, weight_decay=settings.weight_decay, fused=True
    )
    total = settings.epochs * batches
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=total, pct_start=WARM_UP_SHARE)
    images, labels = torch.from_numpy(data.images.copy()), torch.from_numpy(data.labels.copy())
    order = torch.cat([torch.randperm(len(data))[: batches * settings.batch_size] for _ in range(settings.epochs)])
    steps = torch.split(order, min(settings.batch_size, len(data)))
    for picked in progress.track(steps, "train", total=len(steps)):
        batch, truth = images[picked], labels[picked]
        if settings.horizontal_flip:
            batch, truth = _flipped(batch, truth, recipe.task)
        with torch.autocast("cpu", torch.bfloat16, enabled=bfloat16):
            scores = deployable(batch)
        loss = _loss(recipe, scores.float(), truth.long())
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        schedule.step()
    if not bool(torch.isfinite(loss)):
        raise StageFailed(f"training ended with a loss of {loss.item()}; lower training.learning_rate in the recipe")
    save_file({name: t.contiguous() for name, t in model.state_dict().items()}, out / "weights.safetensors")


def _loss(recipe: Recipe, scores: Tensor, labels: Tensor) -> Tensor:
    """Give the cross entropy of one class per image or pixel, or of each label where there may be several."""
    if recipe.task == "multilabel":
        return F.binary_cross_entropy_with_logits(scores, labels.float())
    ignored = IGNORED if recipe.task == "segmentation" else -1
    return F.cross_entropy(scores, labels, label_smoothing=recipe.training.label_smoothing, ignore_index=ignored)


def _flipped(images: Tensor, labels: Tensor, task: Task) -> tuple[Tensor, Tensor]:
    """Mirror a random half of the images left to right, all views of one together, and their masks with them."""
    mirrored = torch.rand(len(images)) < 0.5
    images = torch.where(mirrored.view(-1, *[1] * (images.ndim - 1)), images.flip(-2), images)
    if task == "segmentation":
        labels = torch.where(mirrored.view(-1, 1, 1), labels.flip(-1), labels)
    return images, labels
