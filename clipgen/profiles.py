"""Colour profiles: the pixels of an image with an embedded ICC profile to sRGB."""

from __future__ import annotations

import io
from functools import lru_cache

import numpy as np
from PIL import Image, ImageCms

INVISIBLE = 2  # of 255: a profile that moves no colour by more is sRGB
MODES = {"RGB ": "RGB", "GRAY": "L", "CMYK": "CMYK"}  # Pillow's, by a profile's colour space


def to_srgb(image: Image.Image, profile: bytes) -> Image.Image:
    """An image without alpha, its colours as `profile` has them, to sRGB (mode RGB).

    The rendering intent is perceptual.  ValueError: the profile is damaged, or is not for images
    of this kind.
    """
    mode, transform = _transform(profile)
    if mode == "RGB" and image.mode != "CMYK":
        image = image.convert("RGB")
    elif mode == "L" and image.mode == "1":
        image = image.convert("L")
    if image.mode != mode:
        raise ValueError(f"a profile for {mode} in an image of mode {image.mode}")
    return transform.apply(image) if transform else image.convert("RGB")


@lru_cache(maxsize=32)
def _transform(profile: bytes) -> tuple[str, ImageCms.ImageCmsTransform | None]:
    """The mode that a profile is for, and the way to sRGB; None where it is sRGB already."""
    try:
        source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        mode = MODES.get(source.profile.xcolor_space)
        if mode is None:
            raise ValueError(f"a profile for {source.profile.xcolor_space!r}")
        transform = ImageCms.buildTransform(source, ImageCms.createProfile("sRGB"), mode, "RGB")
    except (OSError, TypeError, ImageCms.PyCMSError) as error:
        raise ValueError(str(error)) from None
    if mode == "CMYK":
        return mode, transform
    levels = np.linspace(0, 255, 18).round().astype(np.uint8)
    grid = (np.stack(np.meshgrid(levels, levels, levels), -1).reshape(1, -1, 3) if mode == "RGB"
            else np.arange(256, dtype=np.uint8)[None])
    probe = Image.fromarray(grid)
    moved = np.asarray(transform.apply(probe)).astype(int) - np.asarray(probe.convert("RGB"))
    return mode, transform if np.abs(moved).max() > INVISIBLE else None
