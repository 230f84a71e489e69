"""ClipGen: text to embedding to codes to images, ranked; the only file that knows all the parts."""

from __future__ import annotations

import random
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from clipgen.bundle import Bundle, load_bundle
from clipgen.device import default_dtype, find_device
from clipgen.sampling import SEEDS, Sampler, whole

DTYPES = torch.float32, torch.bfloat16, torch.float16, torch.int8  # of a GPT
DECODE_ROWS = {"cpu": 1, "cuda": 8}  # fixed: pixels must not depend on the images beside them


class TextTruncated(UserWarning):
    """A text longer than CLIP's context was cut."""


class UnknownWords(UserWarning):
    """A text has words that the bundle's CLIP never saw in training."""


@dataclass(frozen=True, eq=False)
class GeneratedImage:
    """One image: what was made, and what makes it again."""

    image: Image.Image  # RGB
    seed: int  # generate(text, num_images=1, candidates=1, seed=seed) makes it again
    score: float  # cosine of CLIP's text and image embeddings
    codes: np.ndarray  # int64 (h, w)


class ClipGen:
    """A loaded bundle.  Parts: `clip`, `gpt`, `vqgan`; defaults: `sampling`; `dtype`: the GPT's."""

    def __init__(self, bundle: Bundle, int8: bool = False):
        self.sampling = bundle.sampling
        self.sampler = Sampler(bundle.gpt, int8)
        self.dtype = torch.int8 if int8 else bundle.gpt.position.dtype
        # The sampler's GPT is the only one kept: on a CPU its weights are packed copies.
        self.bundle = replace(bundle, gpt=self.sampler.gpt)
        self.clip, self.gpt, self.vqgan = bundle.clip, self.sampler.gpt, bundle.vqgan
        # The layout that convolutions want: a quarter off the published decoder's time on a CPU.
        # On CUDA GroupNorm knows it not, and would turn every layer's images round twice.
        if self.clip.device.type == "cpu" or not self.vqgan.config.norm_groups:
            self.vqgan.decoder.to(memory_format=torch.channels_last)
        # Now, not at the first request.
        self.clip.tokenize([""])
        self.sampler.prepare(self.sampling.top_k, self.sampling.guidance)
        if self.clip.device.type == "cuda":  # CUDA's libraries load what they run when they run it
            self.clip.embed_pixels(self.decode(torch.zeros(1, *self.vqgan.code_grid).long()))

    @classmethod
    def load(cls, directory: str | Path, device: str | torch.device | None = None,
             dtype: torch.dtype | None = None) -> ClipGen:
        """Load a bundle.  device None: CUDA if there is one, else CPU; dtype is that of the GPT.

        torch.int8, for large GPTs on a CPU, rounds weights to 8 bits: faster, a little less exact.
        BundleError (a ValueError) says which file is wrong and what to do; ValueError: a device or
        dtype that cannot be had here.
        """
        device = find_device(device)
        if dtype not in (None, *DTYPES):
            raise ValueError("dtype must be torch.float32, bfloat16, float16 or int8, "
                             f"got {dtype!r}")
        if dtype is torch.int8:
            return cls(load_bundle(directory, device), int8=True)
        return cls(load_bundle(directory, device, dtype or default_dtype(device)))

    def generate(self, text: str, num_images: int = 4, candidates: int = 16,
                 seed: int | None = None, temperature: float | None = None,
                 top_k: int | None = None, top_p: float | None = None,
                 guidance: float | None = None) -> list[GeneratedImage]:
        """The `num_images` best of `candidates` images of a text, best first.

        candidates below num_images is raised to it.  Candidate i has seed (seed + i) mod 2**31;
        seed None draws one.  Sampling settings of None are the bundle's own.  ValueError: a value
        out of range.  Warns with TextTruncated and UnknownWords.
        """
        if not isinstance(text, str) or not text.strip():
            raise ValueError(f"text must say something, got {text!r}")
        num_images = whole("num_images", num_images, 1)
        candidates = max(whole("candidates", candidates, 0), num_images)
        seed = random.SystemRandom().randrange(SEEDS) if seed is None else whole("seed", seed, 0)
        if seed >= SEEDS:
            raise ValueError(f"seed must lie between 0 and {SEEDS - 1}, got {seed}")
        self._warn(text)
        seeds = [(seed + i) % SEEDS for i in range(candidates)]
        embedding = self.clip.embed_texts([text])  # (1, D)
        codes = self.sample(embedding.expand(candidates, -1), seeds, temperature, top_k, top_p,
                            guidance)
        pixels = self.decode(codes)  # (N, 3, S, S)
        scores = (self.clip.embed_pixels(pixels) @ embedding[0]).tolist()
        best = sorted(range(candidates), key=lambda i: -scores[i])[:num_images]
        return [GeneratedImage(to_image(pixels[i]), seeds[i], scores[i], codes[i].cpu().numpy())
                for i in best]

    def sample(self, embeddings: Tensor, seeds: Sequence[int], temperature: float | None = None,
               top_k: int | None = None, top_p: float | None = None,
               guidance: float | None = None) -> Tensor:
        """Embeddings (N, D), unit rows of texts or of images, and N seeds -> codes (N, h, w)."""
        own = self.sampling
        codes = self.sampler.sample(
            embeddings, seeds,
            own.temperature if temperature is None else temperature,
            own.top_k if top_k is None else top_k,
            own.top_p if top_p is None else top_p,
            own.guidance if guidance is None else guidance)
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

    def _warn(self, text: str) -> None:
        if self.clip.truncated(text):
            warnings.warn(f"the text is longer than CLIP's {self.clip.context_length} tokens; its "
                          "end was cut off", TextTruncated, stacklevel=3)
        if unknown := self.clip.unknown_words(text):
            warnings.warn(f"this model never saw {', '.join(map(repr, unknown))} in training and "
                          "will guess", UnknownWords, stacklevel=3)


def to_image(pixels: Tensor) -> Image.Image:
    """Pixels float (3, H, W) in [0, 1] to an RGB image."""
    array = (pixels * 255).round().to(torch.uint8).permute(1, 2, 0).cpu().numpy()
    return Image.fromarray(array)
