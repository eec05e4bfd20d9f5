"""A verdict as one HTML page, report.html, that needs nothing else: no network, no script, no font."""

import base64
import io
import os
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path

import numpy as np
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from PIL import Image

from bitferry.device.arrays import Images
from bitferry.pipeline.figures import ClassChange
from bitferry.pipeline.measure.suspicion import by_weight
from bitferry.pipeline.report import charts
from bitferry.pipeline.verdict import Built, LayerError, Verdict

SHOWN = 20
"""Rows of a long table that are open; the rest is folded away."""
SIDE_PX = 160
"""Longest side of an embedded image."""
SPACE = "\N{NO-BREAK SPACE}"
MINUS = "\N{MINUS SIGN}"
NONE = "—"
WHY_NO_PERCENTILE = (
    "A bound at 99 % confidence needs 11 calls for p50, 64 for p90 and 662 for p99 (MLPerf's early stopping); "
    "with fewer, the percentile is left out."
)


def write(verdict: Verdict, images: Mapping[int, Images], path: Path, *, others: Sequence[Verdict] = ()) -> None:
    """Write the page to `path`.

    `images` holds the worst images, H×W×3, by their index in the evaluation data; one that is missing is left blank.
    The candidates of `others`, the same recipe's verdicts for other targets and precisions, join the trade-off chart.
    """
    part = path.with_name(f".{path.name}.{os.getpid()}")
    part.write_text(render(verdict, images, others=others), encoding="utf-8")
    part.replace(path)


def render(verdict: Verdict, images: Mapping[int, Images], *, others: Sequence[Verdict] = ()) -> str:
    """Give the page as text."""
    measured = [candidate for _, candidate in charts.measured(verdict, others)]
    return (
        environment()
        .get_template("report.html.jinja")
        .render(
            v=verdict,
            by_weight=by_weight,
            charts=charts,
            trade_off=partial(charts.trade_off, verdict, others),
            left_out=[candidate.name for candidate in measured if candidate.accuracy_percent is None],
            classes=by_change(verdict.accuracy.classes),
            layers=by_own_error(verdict.ladder.layers),
            precisions=Counter(layer.precision for layer in verdict.execution.layers).most_common(),
            thumbnails={index: thumbnail(image) for index, image in images.items()},
            shown=SHOWN,
            why_no_percentile=WHY_NO_PERCENTILE,
        )
    )


def write_built(built: Built, path: Path) -> None:
    """Write the page of an artifact that was built and not measured."""
    path.write_text(environment().get_template("built.html.jinja").render(v=built), encoding="utf-8")


def environment() -> Environment:
    """Make what renders the templates of this folder: everything escaped, a name that is missing an error."""
    made = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    made.filters |= FORMATS
    return made


def by_change(classes: Sequence[ClassChange]) -> list[ClassChange]:
    """Sort classes by their change, the largest loss first; those without a figure last."""
    return sorted(classes, key=lambda c: (gain(c) is None, gain(c) or 0.0))


def gain(change: ClassChange) -> float | None:
    """Give the percentage points that a class gained."""
    if change.percent is None or change.float_percent is None:
        return None
    return change.percent - change.float_percent


def by_own_error(layers: Sequence[LayerError]) -> list[LayerError]:
    """Sort layers by the error of their own, the largest first; those without one last."""
    return sorted(layers, key=lambda layer: (layer.own_sqnr_db is None, layer.own_sqnr_db or 0.0))


def grid(pictures: Sequence[Images]) -> Images:
    """Put pictures two in a row, a narrower one beside white; the first row's may be of another width."""
    rows = [np.concatenate(pictures[i : i + 2], axis=1) for i in range(0, len(pictures), 2)]
    width = max(row.shape[1] for row in rows)
    padded = [np.pad(row, ((0, 0), (0, width - row.shape[1]), (0, 0)), constant_values=255) for row in rows]
    return np.concatenate(padded)


def thumbnail(image: Images) -> tuple[str, int, int]:
    """Give an image as a PNG data address with its width and height, at most 160 pixels a side."""
    picture = Image.fromarray(image)
    longest = max(picture.size)
    if longest > SIDE_PX:
        picture.thumbnail((SIDE_PX, SIDE_PX))
    else:
        factor = SIDE_PX // longest
        picture = picture.resize((picture.width * factor, picture.height * factor), Image.Resampling.NEAREST)
    file = io.BytesIO()
    picture.save(file, "PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode(), *picture.size


def number(value: float, decimals: int = 2) -> str:
    """Write a number with a real minus sign, and thousands apart."""
    text = f"{value:,.{decimals}f}".replace(",", "\N{NARROW NO-BREAK SPACE}")
    return text.replace("-", MINUS) if float(f"{value:.{decimals}f}") else text.lstrip("-")


def signed(value: float, decimals: int = 2) -> str:
    """Write a change: with a plus sign where it is above zero."""
    text = number(value, decimals)
    return text if text.startswith(MINUS) or not text.strip("0.") else f"+{text}"


def figures(value: float, count: int = 3) -> str:
    """Write a number with so many significant figures, without an exponent."""
    decimals = max(0, count - 1 - int(f"{value:.{count - 1}e}".partition("e")[2])) if value else 0
    return number(value, decimals)


def milliseconds(value: float) -> str:
    """Write a time in the unit that suits it."""
    if value >= 9999.5:
        return f"{figures(value / 1000)}{SPACE}s"
    if value < 0.1:
        return f"{figures(value * 1000)}{SPACE}µs"
    return f"{figures(value)}{SPACE}ms"


def size(value: float) -> str:
    """Write a number of bytes in decimal units."""
    for unit, factor in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if value >= factor:
            return f"{figures(value / factor)}{SPACE}{unit}"
    return f"{value:.0f}{SPACE}B"


def percent(value: float) -> str:
    """Write a percentage with two decimals."""
    return f"{number(value)}{SPACE}%"


def share(value: float) -> str:
    """Write a share of one as a percentage, short, however small it is."""
    if value and abs(value) < 5e-6:
        return f"{'<' if value > 0 else f'>{MINUS}'}0.0005{SPACE}%"
    return f"{figures(value * 100, 2)}{SPACE}%"


def probability(value: float) -> str:
    """Write a p-value."""
    return "p < 0.001" if value < 0.001 else f"p = {figures(value, 2)}"


def times(value: float) -> str:
    """Write a ratio."""
    return f"{figures(value)}×"


def optional(form: Callable[[float], str]) -> Callable[[float | None], str]:
    """Let a format write a dash for None."""
    return lambda value: NONE if value is None else form(value)


FORMATS: dict[str, Callable[..., object]] = {
    "ms": optional(milliseconds),
    "size": optional(size),
    "percent": optional(percent),
    "points": optional(lambda value: f"{number(value)}{SPACE}pp"),
    "signed_points": optional(lambda value: f"{signed(value)}{SPACE}pp"),
    "db": lambda value: "equal" if value is None else f"{number(value, 1)}{SPACE}dB",
    "share": optional(share),
    "probability": probability,
    "times": times,
    "number": number,
    "figures": figures,
    "count": lambda value: number(value, 0),
    "signed_count": lambda value: signed(value, 0),
    "plain": lambda value: f"{value:g}".replace("-", MINUS),
    "gain": gain,
}
