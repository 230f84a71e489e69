"""ClipGen, the whole pipeline: a text or picture to an embedding, codes, images; then a ranking."""

from __future__ import annotations

import hashlib
import os
import random
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from numbers import Real
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from clipgen.bundle import Bundle, load_bundle
from clipgen.canvas import Canvas, lower_rows, make_canvas
from clipgen.default_bundle import default_bundle
from clipgen.device import default_dtype, find_device
from clipgen.images import Picture, centre_square, read_picture
from clipgen.recipe import VERSION, save_image
from clipgen.sampling import SEEDS, Sampler, whole_number

DTYPES = torch.float32, torch.bfloat16, torch.float16, torch.int8  # of a GPT
DECODE_ROWS = {"cpu": 1, "cuda": 8}  # fixed: pixels must not depend on the images beside them


class TextTruncated(UserWarning):
    """A text was longer than CLIP's context, and its end was cut off."""


class UnknownWords(UserWarning):
    """A text has words that are not in the vocabulary of the bundle's CLIP."""


class NothingToDraw(UserWarning):
    """A mask or `keep` selects no part of init_image to be drawn."""


class AllAlike(UserWarning):
    """The settings draw the same image for every seed."""


@dataclass(frozen=True, eq=False)
class GeneratedImage:
    """One generated image, and the settings that make it again."""

    image: Image.Image  # RGB
    seed: int  # generate(text, num_images=1, candidates=1, seed=seed) makes it again
    score: float  # cosine similarity of two CLIP embeddings: of the condition, of the image
    codes: np.ndarray  # int64 (h, w)
    recipe: dict[str, Any]  # all settings, the bundle, the version: values that JSON can hold

    def save(self, path: str | os.PathLike, quality: int = 95, metadata: bool = True) -> None:
        """Write a PNG, JPEG or WebP by the path's ending, with its recipe where `metadata` is true.

        `quality`: 0 to 100, of JPEG and WebP.  `clipgen.read_recipe` reads the recipe again.
        """
        save_image(self.image, path, self.recipe if metadata else None, quality)


class ClipGen:
    """A loaded bundle.  Parts: `clip`, `gpt`, `vqgan`; defaults: `sampling`; `dtype`: the GPT's."""

    def __init__(self, bundle: Bundle, int8: bool = False):
        self.sampling = bundle.sampling
        self.sampler = Sampler(bundle.gpt, int8)
        self.dtype = torch.int8 if int8 else bundle.gpt.position.dtype
        # The sampler's GPT is the only one kept: on a CPU its weights are packed copies.
        self.bundle = replace(bundle, gpt=self.sampler.gpt)
        self.clip, self.gpt, self.vqgan = bundle.clip, self.sampler.gpt, bundle.vqgan
        # channels_last saves a quarter of the published decoder's time on a CPU.  On CUDA GroupNorm
        # does not support it: every layer would convert the layout twice.
        if self.clip.device.type == "cpu" or not self.vqgan.config.norm_groups:
            self.vqgan.decoder.to(memory_format=torch.channels_last)
        # Load and allocate now, not at the first request.
        self.clip.tokenize([""])
        self.sampler.prepare(self.sampling.top_k, self.sampling.guidance)
        if self.clip.device.type == "cuda":  # CUDA loads its kernels at their first use
            self.clip.embed_pixels(self.decode(torch.zeros(1, *self.vqgan.code_grid).long()))

    @classmethod
    def load(cls, directory: str | Path | None = None, device: str | torch.device | None = None,
             dtype: torch.dtype | None = None) -> ClipGen:
        """Load a bundle.  device None: CUDA if there is one, else CPU; dtype is that of the GPT.

        directory None: weights/coco of this checkout if it is there, else weights/emoji, which the
        installed package brings along.

        torch.int8, for large GPTs on a CPU, rounds weights to 8 bits: faster, a little less exact.
        BundleError (a ValueError) says which file is wrong and what to do; ValueError: a device or
        dtype that cannot be had here.
        """
        directory = default_bundle() if directory is None else directory
        device = find_device(device)
        if dtype not in (None, *DTYPES):
            raise ValueError("dtype must be torch.float32, bfloat16, float16 or int8, "
                             f"got {dtype!r}")
        if dtype is torch.int8:
            return cls(load_bundle(directory, device), int8=True)
        return cls(load_bundle(directory, device, dtype or default_dtype(device)))

    def generate(self, text: str | None = None, num_images: int = 4, candidates: int = 16,
                 seed: int | None = None, temperature: float | None = None,
                 top_k: int | None = None, top_p: float | None = None,
                 guidance: float | None = None, image: Picture | None = None,
                 image_weight: float = 0.5, negative_text: str | None = None,
                 init_image: Picture | None = None, mask: Picture | None = None,
                 keep: float | None = None,
                 progress: Callable[[int, int], None] | None = None) -> list[GeneratedImage]:
        """The `num_images` best of `candidates` images of a text, a picture or both, best first.

        Pictures are PIL images or paths; the centre square of each counts, scaled to the model's
        size, transparency on white.

        text: what the images should show; it may be left out where there is an `image`.
        num_images: how many to return, from 1.
        candidates: how many to draw; below num_images it is raised to it.
        seed: 0 to 2**31 - 1; candidate i has (seed + i) mod 2**31.  None: a drawn one.
        temperature: from 0, the likeliest codes alone, up; higher is more varied.
        top_k: only the k likeliest codes are drawn; 0: all.
        top_p: only the likeliest codes of this total probability are drawn, 0 to 1.
        guidance: how strongly text and image steer; 1: not more than in training.
        image: what the images should resemble: variations of a picture.
        image_weight: w from 0 to 1 in normalise((1 - w) text + w image), where both are given;
            embeddings of a CLIP with means are less those means.
        negative_text: what to steer away from, in the null embedding's place:
            logits = negative + guidance (asked - negative).  It needs guidance above 1.
        init_image: a picture of which a part stays.  Needs `mask` or `keep`.
        mask: a picture, white where init_image is drawn anew.  Whole codes are drawn; outside the
            mask the picture's pixels come back, with a soft edge.
        keep: the share of init_image's rows that stays, from the top, 0 to 1.
        progress: called after every step with the codes drawn so far and their number.

        temperature, top_k, top_p and guidance of None are the bundle's own.  ValueError: a value
        out of range, or a picture that cannot be read.  Warns with TextTruncated, UnknownWords,
        NothingToDraw and AllAlike, of which the last means that one image is returned: settings
        that always take the likeliest code make the same for every seed.
        """
        num_images = whole_number("num_images", num_images, 1)
        candidates = max(whole_number("candidates", candidates, 0), num_images)
        seed = (random.SystemRandom().randrange(SEEDS) if seed is None
                else whole_number("seed", seed, 0))
        if seed >= SEEDS:
            raise ValueError(f"seed must lie between 0 and {SEEDS - 1}, got {seed}")
        drawn = self._settings(temperature, top_k, top_p, guidance)
        if candidates > 1 and (cause := always_likeliest(drawn)):
            warnings.warn(f"{cause} draws the same image for every seed: 1 is drawn instead of "
                          f"{candidates}", AllAlike, stacklevel=2)
            num_images = candidates = 1
        recipe = {**drawn, "device": self.clip.device.type, "bundle": self.bundle.fingerprint,
                  "dtype": str(self.dtype).removeprefix("torch."), "version": VERSION}
        wanted = self._condition(text, image, image_weight, recipe)  # (D,)
        negative = self._negative(negative_text, drawn["guidance"], recipe)
        canvas = self._canvas(init_image, mask, keep, recipe)

        seeds = [(seed + i) % SEEDS for i in range(candidates)]
        codes = self.sample(wanted.expand(candidates, -1), seeds, **drawn, negative=negative,
                            forced=canvas and canvas.codes.expand(candidates, -1, -1),
                            progress=progress)
        pixels = self.decode(codes)  # (N, 3, S, S)
        pixels = canvas.paste(pixels) if canvas else pixels
        scores = (self.clip.embed_pixels(pixels) @ wanted).tolist()
        best = sorted(range(candidates), key=lambda i: -scores[i])[:num_images]
        return [GeneratedImage(to_image(pixels[i]), seeds[i], scores[i], codes[i].cpu().numpy(),
                               {"text": text or "", "seed": seeds[i]} | recipe) for i in best]

    def warn_of(self, text: str, stacklevel: int = 2) -> None:
        """Warn with TextTruncated and UnknownWords, as `generate` does, and draw nothing."""
        if self.clip.truncated(text):
            warnings.warn(f"the text is longer than CLIP's {self.clip.context_length} tokens; its "
                          "end was cut off", TextTruncated, stacklevel=stacklevel)
        if unknown := self.clip.unknown_words(text):
            warnings.warn(f"this model never saw {', '.join(map(repr, unknown))} in training and "
                          "will guess", UnknownWords, stacklevel=stacklevel)

    def sample(self, embeddings: Tensor, seeds: Sequence[int], temperature: float | None = None,
               top_k: int | None = None, top_p: float | None = None, guidance: float | None = None,
               forced: Tensor | None = None, negative: Tensor | None = None,
               progress: Callable[[int, int], None] | None = None) -> Tensor:
        """Embeddings (N, D), unit rows of texts or of images, and N seeds -> codes (N, h, w).

        forced: int codes (N, h, w) that stay as they are, -1 where one is drawn.  negative: a unit
        embedding (D,) in the null embedding's place.  progress: as `generate` has it.
        """
        if forced is not None and forced.shape[1:] != self.vqgan.code_grid:
            raise ValueError(f"forced codes must have shape (N, {self.vqgan.code_grid[0]}, "
                             f"{self.vqgan.code_grid[1]}), got {tuple(forced.shape)}")
        codes = self.sampler.sample(
            embeddings, seeds, **self._settings(temperature, top_k, top_p, guidance),
            forced=None if forced is None else forced.flatten(1), negative=negative,
            progress=progress)
        return codes.view(-1, *self.vqgan.code_grid)

    def decode(self, codes: Tensor) -> Tensor:
        """Codes (N, h, w) to pixels float32 (N, 3, S, S) in [0, 1], in blocks of one fixed size.

        FloatingPointError: pixels that are not finite (before clamping, which would hide them).
        """
        rows = DECODE_ROWS["cuda" if self.gpt.position.is_cuda else "cpu"]
        blocks = []
        with torch.no_grad():
            for block in codes.split(rows):
                padded = torch.cat([block, block[-1:].expand(rows - len(block), -1, -1)])
                blocks.append(self.vqgan.decode_raw(padded)[:len(block)])
        raw = torch.cat(blocks)
        if not raw.isfinite().all():
            raise FloatingPointError("the VQGAN decoded to pixels that are not finite: its "
                                     "weights are damaged, make the bundle again")
        return (raw * 0.5 + 0.5).clamp(0, 1)

    def _settings(self, temperature: float | None, top_k: int | None, top_p: float | None,
                  guidance: float | None) -> dict[str, Any]:
        """The settings given, and the bundle's defaults for those of None."""
        own = self.sampling
        return {"temperature": own.temperature if temperature is None else temperature,
                "top_k": own.top_k if top_k is None else top_k,
                "top_p": own.top_p if top_p is None else top_p,
                "guidance": own.guidance if guidance is None else guidance}

    def _condition(self, text: str | None, image: Picture | None, weight: float,
                   recipe: dict[str, Any]) -> Tensor:
        """The unit embedding (D,) to condition on: of the text, the image or both."""
        if not isinstance(text, str | None):
            raise ValueError(f"text must be a text, got {text!r}")
        if image is None and not (text or "").strip():
            raise ValueError(f"text must not be empty, got {text!r}: give a text or an image")
        if not isinstance(weight, Real) or isinstance(weight, bool) or not 0 <= weight <= 1:
            raise ValueError(f"image_weight must be a number from 0 to 1, got {weight!r}")
        if image is None:
            return self._embed_text(text)
        pixels = self._pixels(image, "image", recipe)
        picture = self.clip.embed_pixels(pixels[None])[0]
        if not (text or "").strip():
            return picture
        recipe["image_weight"] = float(weight)
        if weight == 1:
            return picture
        words = self._embed_text(text)
        if weight == 0:
            return words
        return F.normalize((1 - weight) * words + weight * picture, dim=0)

    def _negative(self, text: str | None, guidance: float, recipe: dict[str, Any]) -> Tensor | None:
        """The embedding (D,) to steer away from."""
        if not isinstance(text, str | None):
            raise ValueError(f"negative_text must be a text, got {text!r}")
        if not (text or "").strip():
            return None
        if isinstance(guidance, Real) and guidance <= 1:
            raise ValueError(f"negative_text {text!r} needs guidance above 1, got {guidance}: give "
                             "guidance 3, or leave negative_text out")
        recipe["negative_text"] = text
        return self._embed_text(text)

    def _canvas(self, picture: Picture | None, mask: Picture | None, keep: float | None,
                recipe: dict[str, Any]) -> Canvas | None:
        """Which part of init_image is kept; None without init_image."""
        if picture is None:
            for name, value in (("mask", mask), ("keep", keep)):
                if value is not None:
                    raise ValueError(f"{name} needs init_image, which is missing: give init_image "
                                     f"too, or leave {name} out")
            return None
        if (mask is None) == (keep is None):
            given = "neither mask nor keep" if mask is None else "both"
            raise ValueError("init_image needs either mask (white where it is drawn anew) or keep "
                             f"(the share of rows to keep, from the top), got {given}")
        pixels = self._pixels(picture, "init_image", recipe)  # (3, S, S)
        if mask is not None:
            # Rec. 601 weights, as PIL's mode L has them; half grey is white.
            grey = self._pixels(mask, "mask", recipe).cpu()
            anew = (grey * torch.tensor([0.299, 0.587, 0.114])[:, None, None]).sum(0) >= 0.5
        else:
            if not isinstance(keep, Real) or isinstance(keep, bool) or not 0 <= keep <= 1:
                raise ValueError(f"keep must be a number from 0 to 1, got {keep!r}")
            recipe["keep"] = float(keep)
            anew = lower_rows(keep, pixels.shape[1], self.vqgan.code_grid[0])
        if not anew.any():
            what = "the mask has no white" if mask is not None else f"keep {keep} keeps every row"
            warnings.warn(f"nothing is drawn anew, since {what}: the image is a copy of init_image",
                          NothingToDraw, stacklevel=3)
        return make_canvas(pixels, self.vqgan.encode(pixels[None])[0], anew)

    def _pixels(self, picture: Picture, name: str, recipe: dict[str, Any]) -> Tensor:
        """Centre square of a picture, as training sees it: float (3, S, S) in [0, 1]."""
        size = self.vqgan.config.image_size
        view = centre_square(read_picture(picture, name, 2 * size + 1), size)
        recipe[name] = "sha256:" + hashlib.sha256(view.tobytes()).hexdigest()
        pixels = torch.from_numpy(view.transpose(2, 0, 1).copy())
        return pixels.to(self.clip.device).float() / 255

    def _embed_text(self, text: str) -> Tensor:
        """The embedding (D,) of a text; warns of what CLIP makes nothing of."""
        self.warn_of(text, stacklevel=5)  # of who called `generate`
        return self.clip.embed_texts([text])[0]


def always_likeliest(settings: dict[str, Any]) -> str | None:
    """Which of the settings leaves the likeliest code alone, as `temperature 0`; None: none."""
    for name, value in (("temperature", 0), ("top_k", 1), ("top_p", 0)):
        if settings[name] == value:
            return f"{name} {value}"
    return None


def to_image(pixels: Tensor) -> Image.Image:
    """Pixels float (3, H, W) in [0, 1] to an RGB image."""
    array = (pixels * 255).round().to(torch.uint8).permute(1, 2, 0).cpu().numpy()
    return Image.fromarray(array)
