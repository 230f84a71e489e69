"""Image files to pixels: the one reader of training, image prompts and evaluation."""

from __future__ import annotations

import io
import os
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF")  # an ending may lie, the content decides
Picture = Image.Image | str | os.PathLike  # what stands for an image: itself, or a file's path


class UnreadableImage(ValueError):
    """An image that cannot be decoded; the message is `NAME: reason`."""


def decode_image(data: bytes, least: int | None = None) -> Image.Image:
    """The image in a file: RGB, upright, transparency on white, 16 bits scaled to 8.

    Of an animation the first frame.  With `least` a JPEG may come at a half, quarter or eighth of
    its size, shorter side at least `least`, which is many times faster.  UnreadableImage: the
    reason, without a name; Pillow refuses more than 178,956,970 pixels before it decodes any.
    """
    return _or_a_reason(lambda: _decode(data, least))


def read_picture(picture: Picture, name: str, least: int | None = None) -> Image.Image:
    """A picture that somebody gave, as `decode_image` makes it; a PIL image is left as it is.

    UnreadableImage: a sentence that begins with `name`, what the picture was given as.
    """
    if not isinstance(picture, Picture):
        raise ValueError(f"{name} must be a PIL image or the path of a file, got {picture!r}")
    own = isinstance(picture, Image.Image)
    try:
        if own:
            return _or_a_reason(lambda: _to_rgb(ImageOps.exif_transpose(picture)))
        return _or_a_reason(lambda: _decode(Path(picture).read_bytes(), least))
    except UnreadableImage as error:
        shown = name if own else f"{name} {Path(picture).name!r}"
        raise UnreadableImage(f"{shown} cannot be read ({error}): give a {', '.join(FORMATS[:-1])} "
                              f"or {FORMATS[-1]} picture") from None


def centre_square(image: Image.Image, size: int) -> np.ndarray:
    """The centre square of an RGB image, scaled: uint8 (size, size, 3)."""
    side = min(image.size)
    return square(image, (image.width - side) // 2, (image.height - side) // 2, side, size)


def square(image: Image.Image, left: int, top: int, side: int, size: int) -> np.ndarray:
    """A square of an RGB image, scaled: uint8 (size, size, 3); untouched where side is size."""
    box = (left, top, left + side, top + side)
    if side != size:  # first to at least 3 times the size by whole factors: as good, much faster
        image = image.resize((size, size), Image.Resampling.BICUBIC, box=box, reducing_gap=3.0)
    elif image.size != (size, size):
        image = image.crop(box)
    return np.asarray(image)


def _or_a_reason(read: Callable[[], Image.Image]) -> Image.Image:
    try:
        with warnings.catch_warnings(action="ignore"):  # what matters ends up in an error
            return read()
    except UnreadableImage:
        raise
    except UnidentifiedImageError:
        raise UnreadableImage("no image of a known format") from None
    except OSError as error:  # Pillow's own carry no strerror
        raise UnreadableImage(error.strerror or str(error) or "unreadable") from None
    except Exception as error:  # Pillow raises many kinds for damaged files
        raise UnreadableImage(str(error) or type(error).__name__) from None


def _decode(data: bytes, least: int | None) -> Image.Image:
    if not data:
        raise UnreadableImage("the file is empty")
    image = Image.open(io.BytesIO(data), formats=FORMATS)
    if least:
        shrink = min(image.size) / least
        image.draft(None, (int(image.width / shrink), int(image.height / shrink)))
    ImageOps.exif_transpose(image, in_place=True)
    return _to_rgb(image)


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode == "F":
        raise UnreadableImage("floating-point pixels have no fixed range")
    if image.mode.startswith("I"):  # Pillow would clip 16 bits at 255
        grey = np.asarray(image).astype(np.int64).clip(0, 65535)
        return Image.fromarray(((grey + 128) // 257).astype(np.uint8)).convert("RGB")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")
