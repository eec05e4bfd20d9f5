"""Which page of the documentation helps with an error: one table, by what the message says."""

import re
from pathlib import Path

from bitferry.device.errors import BitferryError

FOLDER = "docs/"
TARGETS = Path(__file__).parents[1] / "targets"
"""Not imported: NumPy comes with it, whose absence can be what is told."""
PAGES: tuple[tuple[str, str], ...] = (
    (r"^target '(\w+)' (?:needs|cannot be loaded)", "targets/{}.md"),
    (r"--source|no model of torchvision or timm|pass --trust", "first-minutes.md#the-model"),
    (r"class folders|file<TAB>label lines, or an \.npz with", "first-minutes.md#the-images"),
    (r"^the model gives .* scores, and the images|counted from 1, or", "first-minutes.md#the-classes"),
    (r"budget\.metric", "recipes.md#metrics"),
    (r"masks?\b.*(class|pixel)|task = \"segmentation\"", "recipes.md#masks"),
    (r"images are copies of others|images are also in the|look like images of", "data.md"),
    (r"^the ONNX file|onnx:", "onnx-in.md"),
    (r"training\.|--processes", "training.md"),
    (r"calibration images", "quantization.md"),
    (r"labels? .*(out of range|neither a class)|no class of this recipe", "recipes.md#labels"),
    (r"data\.manifest", "recipes.md#splits"),
    (r"is not a bundle|manifest", "manifest.md"),
    (r"signature|is not trusted|no trusted key", "security.md"),
    (r"state dict|more than tensors|the weights ", "recipes.md#models"),
    (r"^no target|^unknown target|^target '\w+' cannot run", "targets/README.md"),
    (r"^recipe ", "recipes.md"),
    (r"history|night", "nightly.md"),
)
"""A pattern that the message holds → the page, relative to docs/; the first that fits."""


def told(error: Exception) -> str:
    """Give an error's text, and the page that helps where there is one."""
    text = str(error)
    found = page(text) if isinstance(error, BitferryError) else None
    return text if found is None or FOLDER in text else f"{text.rstrip('.')}; see {FOLDER}{found}"


def page(text: str) -> str | None:
    """Find the page that helps with a message."""
    for pattern, name in PAGES:
        match = re.search(pattern, text)
        if match and "{}" not in name:
            return name
        if match and _ours(match[1]):
            return name.format(match[1])
    return None


def _ours(target: str) -> bool:
    """Say whether a target is in bitferry's own folder, and so has a page."""
    return (TARGETS / f"{target}.py").is_file()
