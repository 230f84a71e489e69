"""Bytes of an image file to pixels: the one reader of training, image prompts and evaluation."""

from __future__ import annotations

import io
import warnings

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF")  # an ending may lie, the content decides


class UnreadableImage(ValueError):
    """An image that cannot be decoded; the message is `NAME: reason`."""


def decode_image(data: bytes, least: int | None = None) -> Image.Image:
    """The image in a file: RGB, upright, transparency on white, 16 bits scaled to 8.

    Of an animation the first frame.  With `least` a JPEG may come at a half, quarter or eighth of
    its size, shorter side at least `least`, which is many times faster.  UnreadableImage: the
    reason, without a name; Pillow refuses more than 178,956,970 pixels before it decodes any.
    """
    try:
        with warnings.catch_warnings(action="ignore"):  # what matters ends up in an error
            return _decode(data, least)
    except UnreadableImage:
        raise
    except UnidentifiedImageError:
        raise UnreadableImage("no image of a known format") from None
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
    if image.mode == "F":
        raise UnreadableImage("floating-point pixels have no fixed range")
    if image.mode.startswith("I"):  # Pillow would clip 16 bits at 255
        grey = np.asarray(image).astype(np.int64).clip(0, 65535)
        return Image.fromarray(((grey + 128) // 257).astype(np.uint8)).convert("RGB")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")
