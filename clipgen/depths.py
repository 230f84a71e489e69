"""Pixel values of every bit depth and meaning to 8 bits, 0 black and 255 white."""

from __future__ import annotations

import numpy as np
from PIL import ExifTags, Image

BITS, MEANING, EXTRA, FORMAT = (ExifTags.Base[name].value for name in (
    "BitsPerSample", "PhotometricInterpretation", "ExtraSamples", "SampleFormat"))
WHITE_IS_ZERO, SIGNED = 0, 2  # values of MEANING and FORMAT
SIGNED_NOTE = ("its pixels are signed numbers, which have no fixed range: its own smallest value "
               "became black, its largest white")


def readable_tiff(data: bytes) -> tuple[bytes, bool]:
    """(the file, False), or for a kind of TIFF that Pillow refuses, big-endian 16-bit grey in which
    0 is white, (the same with 0 as black, True): its values must then be inverted."""
    if not data.startswith(b"MM\0*"):
        return data, False
    start = int.from_bytes(data[4:8], "big") + 2
    count = int.from_bytes(data[start - 2:start], "big")
    at = {}  # where the value of a tag lies; only single numbers of 16 bits are looked for
    for entry in range(start, start + 12 * count, 12):
        if data[entry + 2:entry + 8] == b"\0\3\0\0\0\1":
            at[int.from_bytes(data[entry:entry + 2], "big")] = entry + 8
    bits, meaning = (at[tag] if tag in at else len(data) for tag in (BITS, MEANING))
    if data[bits:bits + 2] != b"\0\20" or data[meaning:meaning + 2] != b"\0\0":
        return data, False
    return data[:meaning] + b"\0\1" + data[meaning + 2:], True


def scale_colour_key(image: Image.Image) -> None:
    """Give an opened PNG's transparent colour (tRNS) the scale of the pixels that Pillow makes.

    The file has it at its own bit depth, of which the lower bits count alone.  For colours of 16
    bits this is their upper half; `is_key` looks at both.
    """
    key = image.info.get("transparency")
    if image.format != "PNG" or not image.tile or not isinstance(key, int | tuple):
        return
    layout = image.tile[0].args
    for bits, stored in ((2, "L;2"), (4, "L;4"), (8, "L")):
        if layout == stored:
            image.info["transparency"] = (key % 2**bits) * 255 // (2**bits - 1)
    if layout == "RGB":
        image.info["transparency"] = tuple(value % 256 for value in key)
    if layout == "RGB;16B":
        image.info["transparency"] = tuple(value >> 8 for value in key)


def lower_bytes(image: Image.Image) -> None:
    """Let an opened PNG of 16-bit colours, of which Pillow takes the upper bytes, yield the lower
    ones."""
    image.tile = [tile._replace(args="RGB;16L") for tile in image.tile]


def to_8_bits(image: Image.Image, inverted: bool = False) -> tuple[Image.Image, list[str]]:
    """The image in a mode of 8 bits, and notes on what was a guess.

    `inverted`: its values mean the opposite.  Transparency stays; an extra band of a TIFF that no
    tag calls alpha is dropped.  ValueError: floating-point pixels.
    """
    tags = image.tag_v2 if image.format == "TIFF" and hasattr(image, "tag_v2") else {}
    signed = SIGNED in tags.get(FORMAT, ())
    if image.mode == "F":
        raise ValueError("floating-point pixels have no fixed range")
    if image.mode.startswith("I"):
        bits = tags.get(BITS, (16,))[0]
        values = np.asarray(image)
        if bits == 32 and not signed:  # Pillow reads them as signed
            values = values.view(np.uint32)
        inverted = inverted or tags.get(MEANING) == WHITE_IS_ZERO
    elif image.mode == "L" and signed:
        bits, values = 8, np.asarray(image).view(np.int8)
    elif image.mode == "La":
        return image.convert("LA"), []
    elif image.mode == "RGBA" and tags and EXTRA not in tags:
        return image.convert("RGB"), []
    else:
        return image, []
    low, high = (int(values.min()), int(values.max())) if signed else (0, 2**bits - 1)
    if values.dtype.itemsize == 2:  # a table of all values takes less memory
        grey = _scaled(np.arange(2**16), low, high)[values]
    else:
        grey = _scaled(values, low, high)
    key = image.info.get("transparency")
    result = Image.fromarray(255 - grey if inverted else grey)
    if isinstance(key, int):
        result.putalpha(Image.fromarray(np.where(values == key, 0, 255).astype(np.uint8)))
    result.info["icc_profile"] = image.info.get("icc_profile")
    return result, [SIGNED_NOTE] if signed else []


def _scaled(values: np.ndarray, low: int, high: int) -> np.ndarray:
    """`low` becomes 0 and `high` 255, rounded; values beyond are clipped."""
    scaled = (values.astype(np.int64).clip(low, high) - low) * 255 + (high - low) // 2
    return (scaled // max(high - low, 1)).astype(np.uint8)
