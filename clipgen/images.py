"""Image files to pixels: the one reader of training, image prompts and evaluation."""

from __future__ import annotations

import io
import os
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image, ImageChops, ImageOps, UnidentifiedImageError, features

from clipgen.depths import SIGNED_NOTE, lower_bytes, readable_tiff, scale_colour_key, to_8_bits
from clipgen.profiles import to_srgb

# An ending may lie, the content decides.  Not every build of Pillow has the last two.
FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF", *(
    name for name, feature in (("AVIF", "avif"), ("JPEG2000", "jpg_2000"))
    if features.check(feature)))
Picture = Image.Image | str | os.PathLike  # what stands for an image: itself, or a file's path
Colour = tuple[int, int, int]
WHITE: Colour = (255, 255, 255)

# Notes on what was a guess, in `info["notes"]` of a decoded image.
PROFILE_NOTE = "its colour profile cannot be used, so its colours are taken for sRGB"
ALPHA_NOTE = "its alpha varies as a picture does: is it a further band of another meaning?"
ONE_COLOUR_NOTE = ("it is transparent, and on its background of one single colour: give another "
                   "--background")
NOTES = (PROFILE_NOTE, SIGNED_NOTE, ALPHA_NOTE, ONE_COLOUR_NOTE)


class UnreadableImage(ValueError):
    """An image that cannot be decoded; the message is `NAME: reason`."""


def decode_image(data: bytes, least: int | None = None, background: Colour = WHITE) -> Image.Image:
    """The image in a file: sRGB, upright, transparency on `background`, all bit depths as 8 bits.

    Of an animation the first frame.  With `least` a JPEG may come at a half, quarter or eighth of
    its size, shorter side at least `least`, which is many times faster.  `info["notes"]` is a tuple
    of sentences on what was a guess.  UnreadableImage: the reason, without a name; Pillow refuses
    more than 178,956,970 pixels before it decodes any.
    """
    return _or_a_reason(lambda: _decode(data, least, background))


def read_picture(picture: Picture, name: str, least: int | None = None) -> Image.Image:
    """A picture that somebody gave, as `decode_image` makes it; a PIL image is left as it is.

    UnreadableImage: a sentence that begins with `name`, what the picture was given as.
    """
    if not isinstance(picture, Picture):
        raise ValueError(f"{name} must be a PIL image or the path of a file, got {picture!r}")
    own = isinstance(picture, Image.Image)
    try:
        if own:
            return _or_a_reason(lambda: _to_rgb(ImageOps.exif_transpose(picture), WHITE))
        return _or_a_reason(lambda: _decode(Path(picture).read_bytes(), least, WHITE))
    except UnreadableImage as error:
        shown = name if own else f"{name} {Path(picture).name!r}"
        raise UnreadableImage(f"{shown} cannot be read ({error}): give a {', '.join(FORMATS[:-1])} "
                              f"or {FORMATS[-1]} picture") from None


def is_image(start: bytes) -> bool:
    """Whether a file that begins with `start` (its first 32 bytes) claims to be an image."""
    Image.init()
    return any(Image.OPEN[name][1](start) for name in FORMATS)


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


def _decode(data: bytes, least: int | None, background: Colour) -> Image.Image:
    if not data:
        raise UnreadableImage("the file is empty")
    data, inverted = readable_tiff(data)
    try:
        image = Image.open(io.BytesIO(data), formats=FORMATS)
    except UnidentifiedImageError:
        if data.startswith((b"II*\0", b"MM\0*")):
            raise UnreadableImage("a TIFF with pixels of a kind that cannot be read: save it with "
                                  "8 or 16 bits a channel") from None
        raise
    key = _is_key(data, image.info["transparency"]) if (
        image.format == "PNG" and image.tile and image.tile[0].args == "RGB;16B"
        and "transparency" in image.info) else None
    scale_colour_key(image)
    if least:
        shrink = min(image.size) / least
        image.draft(None, (int(image.width / shrink), int(image.height / shrink)))
    ImageOps.exif_transpose(image, in_place=True)
    if key:
        image.info.pop("transparency")
        image.putalpha(ImageChops.invert(key))
    return _to_rgb(image, background, inverted)


def _is_key(data: bytes, colour: Colour) -> Image.Image:
    """Of a PNG of 16-bit colours: mode L, 255 where a pixel is the transparent colour."""
    same = None
    for shift in (8, 0):
        half = Image.open(io.BytesIO(data), formats=["PNG"])
        if shift == 0:
            lower_bytes(half)
        ImageOps.exif_transpose(half, in_place=True)
        wanted = [value >> shift & 255 for value in colour]
        for band, value in zip(half.split(), wanted, strict=True):
            here = band.point([255 * (level == value) for level in range(256)])
            same = ImageChops.multiply(same, here) if same else here
    return same


def _to_rgb(image: Image.Image, background: Colour, inverted: bool = False) -> Image.Image:
    profile, tiff = image.info.get("icc_profile"), image.format == "TIFF"
    image, notes = to_8_bits(image, inverted)
    alpha = None
    if image.has_transparency_data:
        image = image if image.mode == "LA" else image.convert("RGBA")
        alpha = image.getchannel("A")
        if tiff and _varies(alpha):
            notes.append(ALPHA_NOTE)
        image = image.convert(image.mode[:-1])
    if profile and image.mode != "LAB":
        try:
            image = to_srgb(image, profile)
        except ValueError:
            notes.append(PROFILE_NOTE)
    image = image.convert("RGB")
    if alpha:
        image.putalpha(alpha)
        image = Image.alpha_composite(Image.new("RGBA", image.size, background), image)
        image = image.convert("RGB")
        if alpha.getextrema()[0] < 255 and all(low == high for low, high in image.getextrema()):
            notes.append(ONE_COLOUR_NOTE)
    image.info = {"notes": tuple(notes)}
    return image


def _varies(alpha: Image.Image) -> bool:
    """Whether most pixels are neither clear nor opaque, with many values among them."""
    counts = np.array(alpha.histogram()[1:-1])
    return counts.sum() > alpha.width * alpha.height / 2 and (counts > 0).sum() > 32
