"""How images are read: what counts as one, and what transparent ones lie on; and its flags."""

from __future__ import annotations

import argparse
import re
from dataclasses import dataclass

from PIL import ImageColor

from clipgen.images import WHITE, Colour
from scripts.training.cli import setting


@dataclass(frozen=True)
class Reading:
    """How a source is read."""

    background: Colour = WHITE  # what transparent images lie on
    any_ending: bool = False  # files with other endings, or none, count too if they hold an image
    sample_image: str = ""  # the ending, after the first dot, of the image of a WebDataset sample


PLAIN = Reading()


def colour(text: str) -> str:
    """An argparse type: a colour that Pillow knows, as in white, #ff8800 or rgb(255, 136, 0)."""
    try:
        ImageColor.getcolor(text, "RGB")
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no colour: give one as in white, black or "
                                         "#ff8800") from None
    return text


def ending(text: str) -> str:
    """An argparse type: what follows the first dot of a file's name, as in seg.png."""
    if not re.fullmatch(r"\w+(\.\w+)*", text.removeprefix(".")):
        raise argparse.ArgumentTypeError(f"{text!r} is no ending: give one as in jpg or seg.png")
    return text.removeprefix(".")


@dataclass(kw_only=True)
class ReadingSettings:
    """The flags of `Reading`; free, since the images' digest tells what changed in them."""

    background: str = setting("white", "what transparent images lie on: a colour", type=colour,
                              free=True)
    any_ending: bool = setting(False, "files with other endings or none count too, if they hold an "
                               "image", free=True)
    sample_image: str | None = setting(None, "which image of a WebDataset sample, as in seg.png "
                                       "(default: the first without a second dot)", type=ending,
                                       free=True)

    @property
    def reading(self) -> Reading:
        return Reading(ImageColor.getcolor(self.background, "RGB")[:3], self.any_ending,
                       self.sample_image or "")
