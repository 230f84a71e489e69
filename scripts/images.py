"""Images for training, from a folder, a zip or a tar, with the captions beside them if any."""

from __future__ import annotations

import io
import json
import sys
import tarfile
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

ENDINGS = (".png", ".jpg", ".jpeg", ".webp")


@dataclass
class ImageSet:
    pixels: Tensor  # uint8 (N, 3, S, S)
    captions: list[list[str]] = field(default_factory=list)  # lines of NAME.txt, empty without one
    labels: list[dict] = field(default_factory=list)  # NAME.json, empty without one

    def __len__(self) -> int:
        return len(self.pixels)

    def batch(self, index: Tensor) -> Tensor:
        """Pixels float (len(index), 3, S, S) in [0, 1]."""
        return self.pixels[index].float() / 255


def read_files(source: Path) -> Iterator[tuple[str, bytes]]:
    """(name, content) of every file in a folder at any depth, a zip or a tar, not unpacked."""
    if source.is_dir():
        for path in sorted(p for p in source.rglob("*") if p.is_file()):
            yield path.relative_to(source).as_posix(), path.read_bytes()
    elif source.is_file() and zipfile.is_zipfile(source):
        with zipfile.ZipFile(source) as archive:
            for name in sorted(archive.namelist()):
                if not name.endswith("/"):
                    yield name, archive.read(name)
    elif source.is_file() and tarfile.is_tarfile(source):
        with tarfile.open(source) as archive:
            for member in archive:
                if member.isfile():
                    yield member.name, archive.extractfile(member).read()
    else:
        raise ValueError(f"{source} is no folder, zip or tar: give one that holds images")


def decode_image(data: bytes, size: int) -> np.ndarray:
    """The image in a file: uint8 (size, size, 3), upright, alpha on white, centre-cropped."""
    image = ImageOps.exif_transpose(Image.open(io.BytesIO(data)))
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    image = image.convert("RGB")
    if image.size != (size, size):
        image = ImageOps.fit(image, (size, size), Image.Resampling.BICUBIC)
    return np.asarray(image)


def read_images(source: Path, size: int) -> ImageSet:
    """Every readable image of `source`; unreadable ones are counted and named on stderr."""
    pixels: dict[str, np.ndarray] = {}
    captions: dict[str, list[str]] = {}
    labels: dict[str, dict] = {}
    skipped: list[str] = []
    for name, data in read_files(source):
        path = PurePosixPath(name)
        stem, ending = str(path.with_suffix("")), path.suffix.lower()
        if ending in ENDINGS:
            try:
                pixels[stem] = decode_image(data, size)
            except Exception as error:  # Pillow raises many kinds; one file is no reason to stop
                skipped.append(f"{name} ({error})")
        elif ending == ".txt":
            captions[stem] = data.decode(errors="replace").splitlines()
        elif ending == ".json":
            labels[stem] = json.loads(data)
    if skipped:
        print(f"skipped {len(skipped)} unreadable images: {'; '.join(skipped[:20])}",
              file=sys.stderr)
    if not pixels:
        raise ValueError(f"no readable image ({', '.join(ENDINGS)}) in {source}")
    stacked = torch.from_numpy(np.stack(list(pixels.values()))).permute(0, 3, 1, 2).contiguous()
    return ImageSet(stacked, [captions.get(stem, []) for stem in pixels],
                    [labels.get(stem, {}) for stem in pixels])
