"""A verdict as a piece of HTML for a notebook: its figures, reasons and the images that changed most."""

from collections.abc import Mapping
from pathlib import Path

from bitferry.device.arrays import Images
from bitferry.pipeline.report import page, terminal
from bitferry.pipeline.verdict import Built, Verdict

SHOWN = 6
"""Images, at most."""


def html(
    verdict: Built, *, images: Mapping[int, Images] | None = None, path: Path | None = None, size_bytes: int = 0
) -> str:
    """Give the piece; `images` holds evaluation images H×W×3 by their index, `path` is where its bundle lies."""
    measured = verdict if isinstance(verdict, Verdict) else None
    worst = measured.accuracy.worst[:SHOWN] if measured else ()
    shown = [(one, page.thumbnail(images[one.index])) for one in worst if images and one.index in images]
    template = page.environment().get_template("fragment.html.jinja")
    return template.render(
        v=verdict,
        rows=terminal.rows(measured) if measured else {},
        ran=measured.execution.summary if measured else "",
        images=shown,
        path=path,
        size=size_bytes,
    )
