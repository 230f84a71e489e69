"""clipgen: text-to-image models that train from images alone (CLIP-GEN, arXiv 2203.00386)."""

from clipgen.device import is_out_of_memory
from clipgen.pipeline import ClipGen, GeneratedImage, NothingToDraw, TextTruncated, UnknownWords
from clipgen.recipe import VERSION as __version__
from clipgen.recipe import read_recipe

__all__ = ["ClipGen", "GeneratedImage", "NothingToDraw", "TextTruncated", "UnknownWords",
           "__version__", "is_out_of_memory", "read_recipe"]
