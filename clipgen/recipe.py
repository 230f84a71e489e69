"""How an image was made, in its file: written where image tools look, and read back.

PNG: a text chunk `parameters`.  WebP and JPEG: EXIF's UserComment, UTF-16 behind `UNICODE`.  The
text is JSON on one line.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from PIL import Image
from PIL.PngImagePlugin import PngInfo

VERSION = "0.1.0"
FORMATS = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG", ".webp": "WEBP"}
EXIF_IFD, USER_COMMENT = 0x8769, 0x9286  # Exif 2.3, tables 4 and 8
UTF_16, PLAIN = b"UNICODE\0", b"ASCII\0\0\0"
MOST = 60_000  # bytes: EXIF in a JPEG holds 65,533 with all around it


def save_image(image: Image.Image, path: str | os.PathLike, recipe: dict[str, Any] | None = None,
               quality: int = 95) -> None:
    """Write an RGB image in the format of the path's ending, with its recipe unless it is None.

    `quality`: 0 to 100, of WebP and JPEG.  ValueError: another ending, or a recipe too long.
    """
    kind = FORMATS.get(Path(path).suffix.lower())
    if kind is None:
        raise ValueError(f"{path} must end in one of {', '.join(FORMATS)}")
    options: dict[str, Any] = {} if kind == "PNG" else {"quality": quality}
    if recipe is not None:
        text = json.dumps(recipe, ensure_ascii=False)
        if any("\ud800" <= c <= "\udfff" for c in text):  # half a character, which JSON can carry
            text = json.dumps(recipe)
        if len(text.encode("utf-16-be")) > MOST:
            raise ValueError(f"the image's description has {len(text)} characters, more than fit "
                             "into an image file: leave it out, or shorten the text")
        if kind == "PNG":
            options["pnginfo"] = PngInfo()
            options["pnginfo"].add_text("parameters", text)
        else:
            exif = Image.Exif()
            exif.get_ifd(EXIF_IFD)[USER_COMMENT] = UTF_16 + text.encode("utf-16-be")
            options["exif"] = exif
    image.save(path, format=kind, **options)


def read_recipe(path: str | os.PathLike) -> dict[str, Any]:
    """The recipe in an image file; ValueError, in one sentence, where there is none."""
    try:
        with Image.open(path, formats=tuple(dict.fromkeys(FORMATS.values()))) as image:
            text = image.info.get("parameters")
            comment = image.getexif().get_ifd(EXIF_IFD).get(USER_COMMENT, b"")
    except FileNotFoundError:
        raise ValueError(f"{path} is not there: give an image that clipgen made") from None
    except Exception as error:  # Pillow raises many kinds for damaged files
        raise ValueError(f"{path} cannot be read ({error}): give an image that clipgen "
                         "made") from None
    if isinstance(comment, bytes) and comment.startswith(UTF_16):
        text = comment.removeprefix(UTF_16).decode("utf-16-be", errors="replace")
    elif isinstance(comment, bytes) and comment.startswith(PLAIN):
        text = comment.removeprefix(PLAIN).decode("ascii", errors="replace")
    try:
        recipe = json.loads(text or "")
    except (ValueError, RecursionError):
        recipe = None
    if not isinstance(recipe, dict) or not {"text", "seed", "bundle"} <= recipe.keys():
        raise ValueError(f"{path} does not say how it was made: give an image that clipgen wrote, "
                         "with its metadata")
    return recipe
