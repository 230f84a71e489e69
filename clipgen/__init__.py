"""clipgen: text-to-image models that train from images alone (CLIP-GEN, arXiv 2203.00386)."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from clipgen.recipe import VERSION as __version__
from clipgen.recipe import read_recipe

if TYPE_CHECKING:
    from clipgen.device import is_out_of_memory
    from clipgen.pipeline import (
        ClipGen,
        GeneratedImage,
        NothingToDraw,
        TextTruncated,
        UnknownWords,
    )

__all__ = ["ClipGen", "GeneratedImage", "NothingToDraw", "TextTruncated", "UnknownWords",
           "__version__", "is_out_of_memory", "read_recipe"]


def __getattr__(name: str) -> Any:
    """What needs torch, at its first use: the command answers --help and mistakes without it."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module = "clipgen.device" if name == "is_out_of_memory" else "clipgen.pipeline"
    globals()[name] = value = getattr(import_module(module), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
