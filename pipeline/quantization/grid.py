"""The grid that a tensor is rounded to: what an annotation puts on it, and what every step reads and sets."""

from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, Literal, cast

import torch
from torch import Tensor
from torchao.quantization.pt2e import ObserverBase

Mode = Literal["off", "observe", "round"]
SMALLEST = 2**-40
"""Of any scale: the product of two, as an int32 bias has it, stays far above the smallest normal float32, 2⁻¹²⁶."""
OF_NOTHING = 2**-12
"""The scale of a value that was 0 in every image, and may be something in another."""


@dataclass
class Seen:
    """What went through a grid: of every image the extremes, and where asked for some values and the sum."""

    low: list[Tensor] = field(default_factory=list)
    high: list[Tensor] = field(default_factory=list)
    values: list[Tensor] = field(default_factory=list)
    total: Tensor | float = 0.0
    rows: int = 0
    calls: int = 0
    """How many tensors of the images at hand went through: those of a concatenation share one grid."""


class Grid(ObserverBase):  # type: ignore[misc]
    """An observer whose scale and zero point the steps choose; it can also round what goes through, as int8 would.

    Of a tensor as a whole, or of each output channel of a weight.
    """

    def __init__(self, dtype: torch.dtype, qscheme: torch.qscheme, quant_min: int, quant_max: int, **more: Any) -> None:
        super().__init__(dtype, more.get("is_dynamic", False))
        self.qscheme, self.quant_min, self.quant_max = qscheme, quant_min, quant_max
        self.ch_axis = more.get("ch_axis") or 0
        self.per_channel = qscheme is torch.per_channel_symmetric
        self.mode: Mode = "off"
        self.samples, self.sums, self.batch = 0, False, 1
        self.batch_axis: int | None = 0
        """Of what goes through: L×N×E has 1; None where all images are in one value."""
        self.seen = Seen()
        self.scale, self.zero_point = torch.ones(1), torch.zeros(1, dtype=torch.int64)
        self.stand_in: Any = None
        """What is called in this one's place, while a step looks at it or learns it."""

    def calculate_qparams(self) -> tuple[Tensor, Tensor]:
        return self.scale, self.zero_point

    def forward(self, x: Tensor) -> Tensor:
        if self.stand_in is not None:
            return cast(Tensor, self.stand_in(x))
        if self.mode == "observe" and not self.per_channel:
            self._observe(x)
        return self.rounded(x) if self.mode == "round" else x

    def rounded(self, x: Tensor) -> Tensor:
        """Round as the quantize and dequantize operators do; several times as fast as torch's fake quantize."""
        scale, zero = self.scale, int(self.zero_point.flatten()[0])
        scale = scale.view(-1, *[1] * (x.ndim - 1)) if self.per_channel else scale
        found = (x * (1 / scale)).round_()
        return found.clamp_(self.quant_min - zero, self.quant_max - zero).mul_(scale)

    def step(self, low: Tensor, high: Tensor) -> Tensor:
        """Give the distance of two values of the grid, were it to reach from `low` to `high`."""
        width = 2 * torch.maximum(-low, high) if self.qscheme is torch.per_tensor_symmetric else high - low
        return width / (self.quant_max - self.quant_min)

    def set_range(self, low: float, high: float) -> None:
        """Choose scale and zero point so that the range, with 0 in it, just fits."""
        low, high = min(low, 0.0), max(high, 0.0)
        steps = self.quant_max - self.quant_min
        least = SMALLEST if high > low else OF_NOTHING
        if self.qscheme is torch.per_tensor_symmetric:
            scale, zero = 2 * max(-low, high) / steps, (self.quant_max + self.quant_min + 1) // 2
        else:
            scale = max((high - low) / steps, least)
            zero = min(max(round(self.quant_min - low / scale), self.quant_min), self.quant_max)
        self.scale, self.zero_point = torch.tensor([max(scale, least)]), torch.tensor([zero])

    def fit_channels(self, weight: Tensor, least: Tensor | float = 0.0) -> None:
        """Choose each channel's scale so that its largest weight just fits, and not below `least`."""
        largest = weight.detach().flatten(1).abs().amax(1) / self.quant_max
        self.scale = torch.maximum(largest, torch.as_tensor(least)).clamp(min=SMALLEST)
        self.zero_point = torch.zeros(len(weight), dtype=torch.int64)

    def by_image(self, x: Tensor) -> tuple[Tensor, int]:
        """Move the axis of the images to the front; give how many there are, 1 where they cannot be told apart."""
        moved = x.movedim(self.batch_axis, 0) if self.batch_axis and x.ndim > self.batch_axis else x
        apart = self.batch_axis is not None and moved.ndim and len(moved) and len(moved) % self.batch == 0
        return moved, self.batch if apart else 1

    def forget(self) -> None:
        """Let go of what was seen."""
        self.seen = Seen()

    def _observe(self, x: Tensor) -> None:
        """Keep each image's own statistics, so that they are the same whatever the batch."""
        x, rows = self.by_image(x.detach())
        last = channels_last(x)
        images = (x.movedim(1, -1) if last else x).reshape(rows, -1)
        extremes = [torch.aminmax(image) for image in images]  # along an axis it is slower
        lows, highs = [low for low, _ in extremes], [high for _, high in extremes]
        values = list(_some(images, self.samples, x.shape[1] if last else 1)) if self.samples else []
        if self.seen.calls and rows <= len(self.seen.low):
            values = [torch.cat(pair) for pair in zip(values, self.seen.values[-rows:], strict=bool(values))]
            del self.seen.values[len(self.seen.values) - len(values) :]
            lows = list(map(torch.minimum, lows, self.seen.low[-rows:]))
            highs = list(map(torch.maximum, highs, self.seen.high[-rows:]))
            del self.seen.low[-rows:], self.seen.high[-rows:]
        self.seen.low += lows
        self.seen.high += highs
        self.seen.values += values
        self.seen.calls += 1
        if self.seen.calls > 1:
            self.sums, self.seen.rows = False, 0  # the mean of several tensors is no layer's input
        if self.sums and x.ndim and self.batch_axis is not None:
            self.seen.total = self.seen.total + _total(x).double()
            self.seen.rows += len(x)


def channels_last(x: Tensor) -> bool:
    """Say whether N×C×H×W lies in memory as N×H×W×C, so that its values in any other order had to be copied."""
    return x.ndim == 4 and x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()


def _total(x: Tensor) -> Tensor:
    """Sum over the first axis, kept as 1, in the order that the values lie in memory."""
    if not channels_last(x):
        return x.sum(0, keepdim=True)
    _, channels, height, width = x.shape
    return x.movedim(1, -1).reshape(len(x), -1).sum(0).view(1, height, width, channels).movedim(-1, 1)


def _some(images: Tensor, count: int, channels: int) -> Tensor:
    """Draw values of each row, the same places of every tensor of a size; of rows with channels last their number."""
    of = images.shape[1]
    if of <= count:
        return images.clone()
    places = _places(of, count)
    return images[:, places % (of // channels) * channels + places // (of // channels)]


@lru_cache(maxsize=1024)
def _places(of: int, count: int) -> Tensor:
    return torch.randint(of, (count,), generator=torch.Generator().manual_seed(of)).sort().values
