"""Making an image again from the recipe in its file."""

from __future__ import annotations

import os
from typing import Any

from clipgen.recipe import VERSION, read_recipe

DRAWN = "temperature", "top_k", "top_p", "guidance"
NEEDED = "text", "seed", *DRAWN, "device", "dtype", "bundle", "version"
PICTURES = {"image": "--image", "init_image": "--init", "mask": "--mask"}
DTYPES = "float32", "bfloat16", "float16", "int8"


class Again:
    """What an image file says of how it was made, to make it again.

    ValueError, in one sentence: a file without a recipe or with half of one, or other `pictures`
    (by name, None where not given) than it was made of.
    """

    def __init__(self, path: str | os.PathLike, pictures: dict[str, os.PathLike | None]):
        self.path, self.recipe = path, read_recipe(path)
        for name in NEEDED:
            if name not in self.recipe:
                raise ValueError(f"{path} does not say its {name}, so it cannot be made again: "
                                 "give an image as clipgen wrote it")
        for name in ("text", "device", "dtype", "negative_text"):
            if not isinstance(self.recipe.get(name, ""), str):
                raise ValueError(f"{path} says {self.recipe[name]!r:.60} for {name}, which is no "
                                 "text: give an image as clipgen wrote it")
        if self.recipe["dtype"] not in DTYPES:
            raise ValueError(f"{path} says {self.recipe['dtype']!r:.60} for dtype, which is none "
                             f"of {', '.join(DTYPES)}: give an image as clipgen wrote it")
        for name, flag in PICTURES.items():
            if name in self.recipe and pictures[name] is None:
                raise ValueError(f"{path} was made of a picture, of which it keeps the sha256 "
                                 f"alone: give that picture with {flag}")
            if name not in self.recipe and pictures[name] is not None:
                raise ValueError(f"{flag} contradicts --again: {path} was made without such a "
                                 "picture")

    def settings(self) -> dict[str, Any]:
        """What `ClipGen.generate` takes beside text and pictures."""
        own = {name: self.recipe[name] for name in ("seed", *DRAWN)}
        own |= {name: self.recipe[name] for name in ("image_weight", "negative_text", "keep")
                if name in self.recipe}
        return own | {"num_images": 1, "candidates": 1}

    def differences(self, recipe: dict[str, Any]) -> list[str]:
        """Sentences on why an image that is made like `recipe` here may be another one."""
        then = self.recipe
        return [sentence for name, sentence in (
            ("bundle", f"{self.path} was made with the bundle {then['bundle']!r:.60} and this is "
             f"{recipe['bundle']!r}, so the image will differ: name its own with --weights"),
            ("version", f"{self.path} was made by clipgen {then['version']!r:.60} and this is "
             f"{VERSION!r}, so the image may differ"),
            ("device", f"{self.path} was made on {then['device']!r:.60} and this is "
             f"{recipe['device']}, so the image will differ in what is rounded"),
        ) if then[name] != recipe[name]]

    def check_pictures(self, recipe: dict[str, Any]) -> None:
        """ValueError, in one sentence, where an image was made of other pictures.

        Of another bundle's size a picture has another sha256, so that nothing can be said.
        """
        if recipe["bundle"] != self.recipe["bundle"]:
            return
        for name, flag in PICTURES.items():
            if recipe.get(name) != self.recipe.get(name):
                raise ValueError(f"{flag} names another picture than the one that {self.path} was "
                                 "made of: give that one")
