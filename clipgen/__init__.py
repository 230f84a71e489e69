"""clipgen: text-to-image models that train from images alone (CLIP-GEN, arXiv 2203.00386)."""

from clipgen.device import is_out_of_memory
from clipgen.pipeline import ClipGen, GeneratedImage, TextTruncated, UnknownWords

__all__ = ["ClipGen", "GeneratedImage", "TextTruncated", "UnknownWords", "is_out_of_memory"]
