"""bitferry: PyTorch vision models to edge devices as 8-bit, with proof of what is shipped.

run = bitferry.open("mine.toml")
way = bitferry.to(run, "openvino")
way.program, way.compiled, way.verified    # each made when it is asked for, or reused
way.ship(Path("dist"))
"""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from bitferry.pipeline.api import open as open
    from bitferry.pipeline.api import to as to

__all__ = ["open", "to"]


def __getattr__(name: str) -> object:
    """Import what runs on the engineer's machine when it is first used: `bitferry.device` does without PyTorch."""
    if name in __all__:
        from bitferry.pipeline import api  # noqa: PLC0415

        return getattr(api, name)
    raise AttributeError(f"module 'bitferry' has no attribute '{name}'")
