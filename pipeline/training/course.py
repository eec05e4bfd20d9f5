"""A training from its first step to its last: the same whether it was interrupted or not."""

import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from accelerate.utils import broadcast, set_seed
from safetensors.torch import save_file
from torch import Tensor
from torch.func import functional_call

from bitferry.device.errors import StageFailed
from bitferry.pipeline import checkpoint, interrupt, loader, progress
from bitferry.pipeline.data.split import Split
from bitferry.pipeline.load import Deployable, architecture
from bitferry.pipeline.measure import metrics
from bitferry.pipeline.recipe import Recipe
from bitferry.pipeline.training import curves, freezing, holdout, losses, record, start
from bitferry.pipeline.training.machine import Precision
from bitferry.pipeline.training.optimizer import Average, optimizer, schedule
from bitferry.pipeline.training.state import Line, Position, Whole, copied
from bitferry.pipeline.training.validate import Validation

if TYPE_CHECKING:
    from accelerate import Accelerator

WEIGHTS = "weights.safetensors"
SECONDS = 30.0
"""Between two checkpoints."""
LINES = 20
"""Told in an epoch."""
ORDER, STEP = 2, 3
"""What a seed is for, beside those of `holdout`."""
Parts = tuple[tuple[Tensor, Tensor], ...]
Told = Callable[[int, float], None]
"""Hears of each validation: epochs done, and the metric · 100, negative where lower is better."""


@dataclass(frozen=True)
class Job:
    """All that a training is made from; another process can be given it."""

    recipe: Recipe
    folder: Path
    """Where a `module:` source is looked for."""
    data: Split
    start: Path | None
    batch: int
    precision: Precision
    checkpoint: Path
    curves: Path | None
    out: Path
    every: float = SECONDS
    """Seconds between two checkpoints."""


def _seed(*parts: int) -> int:
    return int(np.random.SeedSequence(parts).generate_state(1)[0])


class Course:
    """One process's part of it. What is random in a step comes from the seed and the step's number alone."""

    def __init__(self, job: Job, accelerator: "Accelerator", told: Told | None = None) -> None:
        self.job, self.accelerator, self.told = job, accelerator, told
        recipe, training = job.recipe, job.recipe.training
        self.training = training
        set_seed(training.seed)
        self.model = architecture(recipe, job.folder)
        new = start.fit(self.model, checkpoint.read(job.start), job.start) if job.start else ()
        self.freezing = freezing.plan(self.model, training, start.head(self.model, new))
        self.deployable = Deployable(self.model, recipe.preprocessing).to(accelerator.device)
        labels = job.data.labels
        self.split = holdout.hold_out(labels, recipe.task, training.validation, training.seed)
        self.batches = holdout.divide(len(self.split.learnt), training, job.batch, accelerator.num_processes)
        counted = self.split.learnt if training.class_weights == "balanced" else slice(0)  # masks are a copy
        self.loss = losses.loss(recipe.task, training, labels[counted], len(recipe.classes))
        self.validation = Validation(recipe, job.data, self.split.held_out, self.loss, self.batches.part)
        options, classes = recipe.budget.metric_options, len(recipe.classes)
        self.sign = 1 if metrics.higher_is_better(recipe.metric, options, recipe.task, classes) else -1
        self._prepare()

    def _prepare(self) -> None:
        raw = optimizer(self.model, self.training, self.freezing, self.accelerator.device)
        average = Average(self.model, self.training.ema) if self.training.ema else None
        rates = schedule(raw, self.training, self.steps)
        kept = self.job.checkpoint
        self.whole = Whole(kept, self.model, raw, rates, self.accelerator, average, {}, Position(steps=self.steps))
        self.whole.load()
        self.wrapped = self.accelerator.prepare_model(self.deployable)
        self.optimizer = self.accelerator.prepare_optimizer(raw)
        self.running = torch.zeros((), device=self.accelerator.device)
        self.since, self.text = (self.position.step, time.perf_counter()), "train"
        self.rates: list[float] = []

    @property
    def position(self) -> Position:
        """Say where it is."""
        return self.whole.position

    @property
    def per_epoch(self) -> int:
        """Give the steps of an epoch."""
        return len(self.split.learnt) // self.batches.size

    @property
    def steps(self) -> int:
        """Give the steps of all epochs."""
        return self.training.epochs * self.per_epoch

    def run(self) -> None:
        """Learn to the end, and write the weights and what was told on the way."""
        main, saved = self.accelerator.is_main_process, time.monotonic()
        board = curves.begin(self.job.out, self.job.curves, self.position.lines) if main else None
        left = 0 if self.position.over else self.steps - self.position.step
        try:
            for epoch, parts in progress.track(self._rest(), "train", total=left, told=lambda: self.text):
                self._learn(parts)
                for line in self._lines(epoch):
                    self.position.lines.append(line)
                    if board:
                        board.tell(line)
                if main and time.monotonic() - saved > self.job.every:
                    self.whole.save()
                    saved = time.monotonic()
        except interrupt.Stopped:  # between two steps
            self.whole.save()
            raise
        finally:
            if board:
                board.close()
        if main:
            self._write()

    def _rest(self) -> Iterator[tuple[int, Parts]]:
        """Give what is left to learn, step by step."""
        first, skipped = divmod(self.position.step, self.per_epoch)
        for epoch in range(first, self.training.epochs):
            if self.position.over:
                return
            self._begin(epoch)
            for parts in self._epoch(epoch, skipped if epoch == first else 0):
                yield epoch, parts

    def _begin(self, epoch: int) -> None:
        """Set which parts learn; processes that share gradients have to agree anew on which there are."""
        if self.freezing.apply(self.model, epoch) and self.accelerator.num_processes > 1:
            plain = self.accelerator.unwrap_model(self.wrapped, keep_fp32_wrapper=False)
            self.wrapped = self.accelerator.prepare_model(plain)

    def _epoch(self, epoch: int, skipped: int) -> Iterator[Parts]:
        seed, process, parts = self.training.seed, self.accelerator.process_index, self.batches.parts
        found = loader.batches(
            self.job.data,
            self.batches.of(holdout.epoch_order(self.split.learnt, seed, epoch), process),
            batch_size=self.batches.part,
            augmentation=self.job.recipe.augmentation,
            task=self.job.recipe.task,
            seed=_seed(seed, ORDER, epoch, process),
            start=skipped * parts,
        )
        return zip(*[found] * parts, strict=False)

    def _learn(self, parts: Parts) -> None:
        accelerator = self.accelerator
        set_seed(_seed(self.training.seed, STEP, self.position.step, accelerator.process_index))
        given = [(images.to(accelerator.device), labels.to(accelerator.device)) for images, labels in parts]
        size = accelerator.reduce(torch.stack([self.loss.sizes(labels) for _, labels in given]).sum(), "sum")
        share = accelerator.num_processes / size.clamp(min=1e-9)  # gradients of processes are averaged
        for number, (images, labels) in enumerate(given, 1):
            with nullcontext() if number == len(given) else accelerator.no_sync(self.wrapped):
                loss = self.loss.sum(self.wrapped(images), labels) * share
                accelerator.backward(loss)
            self.running += loss.detach()
        if self.training.clip_norm:
            accelerator.clip_grad_norm_(self.model.parameters(), self.training.clip_norm)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.rates = [float(group["lr"]) for group in self.whole.optimizer.param_groups]
        if not accelerator.optimizer_step_was_skipped:  # as float16 does with a gradient that is too large for it
            self.whole.schedule.step()
        self.position.step += 1
        if self.whole.average:
            self.whole.average.update(self.model, self.position.step)

    def _lines(self, epoch: int) -> Iterator[Line]:
        """Tell of the steps since the last time, and at an epoch's end of the images held out."""
        within = self.position.step - epoch * self.per_epoch
        if within % math.ceil(self.per_epoch / LINES) == 0 or within == self.per_epoch:
            yield self._line(epoch)
        if within == self.per_epoch and len(self.split.held_out):
            yield self._look(epoch + 1)

    def _line(self, epoch: int) -> Line:
        step, now = self.position.step, time.perf_counter()
        (before, then), self.since = self.since, (step, now)
        loss = float(self.accelerator.reduce(self.running, "mean")) / (step - before)
        self.running.zero_()
        if not math.isfinite(loss):
            raise StageFailed(
                f"training has a loss of {loss} at step {step} of {self.steps}; lower training.learning_rate in the "
                "recipe, or set training.clip_norm"
            )
        pace = (step - before) * self.batches.size / (now - then)
        self.text = f"train {loss:.3f} {pace:,.0f}/s"
        rates = {f"learning_rate/{i}": rate for i, rate in enumerate(self.rates)}
        return {"step": step, "epoch": epoch, "train/loss": loss, "train/images_per_s": round(pace, 1), **rates}

    def _look(self, done: int) -> Line:
        """Validate, remember the best, and see whether it is time to end."""
        position, state = self.position, self._shown()
        if self.accelerator.num_processes > 1:  # statistics are each process's own
            broadcast(list(state.values()))
        self.deployable.eval()
        named = {f"model.{name}": tensor for name, tensor in state.items()}
        found = self.validation.look(
            lambda images: functional_call(self.deployable, named, (images,), tie_weights=False), self.accelerator
        )
        value = self.sign * found.percent
        if math.isfinite(value) and (position.best is None or value > position.best):
            position.best, position.best_epoch = value, done
            if self.training.keeps_best:
                self.whole.best.update(copied(state))
        position.percent = curves.plain(found.percent)
        position.over = bool(self.training.patience) and done - position.best_epoch >= (self.training.patience or 0)
        if position.over and self.accelerator.is_main_process:
            progress.stage("train", f"ends after {done} epochs: none was better than epoch {position.best_epoch}")
        if self.told:
            self.told(done, value)
        name = f"validation/{self.job.recipe.metric}"
        loss, percent = curves.plain(found.loss), curves.plain(found.percent)
        return {"step": position.step, "epoch": done, "validation/loss": loss, name: percent}

    def _shown(self) -> Mapping[str, Tensor]:
        """Give the weights as they are validated and kept."""
        return self.whole.average.state if self.whole.average else self.model.state_dict()

    def _write(self) -> None:
        best = self.training.keeps_best and self.position.best is not None
        percent = self.sign * (self.position.best or 0.0) if best else self.position.percent
        kept = self.whole.best if best else copied(self._shown())
        broken = [name for name, t in kept.items() if t.is_floating_point() and not bool(torch.isfinite(t).all())]
        if broken:
            raise StageFailed(f"training ended with NaN or infinity in {broken[0]}; lower training.learning_rate")
        told = record.metadata(self.job.recipe, percent, len(self.split.held_out))
        save_file(kept, self.job.out / WEIGHTS, told)
