"""Shards: a directory of codes and embeddings, written once, read memory-mapped.

    manifest.json                    written last: without it the directory is unfinished
    train-codes-00000.npy            uint16 (n, crops, L); crop 0 is the centre, the others random
    train-embeddings-00000.npy       float16 (n, crops, D), CLIP's of the very same crops
    train-images-00000.npy           int64 (n,): which images of the source the rows are
    validation-...                   the same for images held out, and where they have captions
    validation-texts-00000.npy       float16 (n, D), the embedding of a caption; zeros without one

The manifest holds, besides what the shards were made with, `parts`: for each part the list of its
shards, {"codes": FILE, "embeddings": FILE, ..., "images": n, "sha256": {FILE: ...}}.
"""

from __future__ import annotations

import io
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from scripts.data.files import sha256, write_bytes

VERSION = 1
DTYPES = {"codes": np.uint16, "embeddings": np.float16, "texts": np.float16, "images": np.int64}


def file_name(part: str, kind: str, number: int) -> str:
    return f"{part}-{kind}-{number:05d}.npy"


def write_shard(directory: Path, part: str, number: int, arrays: dict[str, np.ndarray]) -> None:
    """Write the arrays of one shard; `images` last, so that where it is the others are."""
    for kind in sorted(arrays, key=lambda kind: kind == "images"):
        buffer = io.BytesIO()
        np.save(buffer, arrays[kind].astype(DTYPES[kind], copy=False))
        write_bytes(directory / file_name(part, kind, number), buffer.getvalue())


def is_written(directory: Path, part: str, number: int) -> bool:
    return (directory / file_name(part, "images", number)).is_file()


def describe_shard(directory: Path, part: str, number: int) -> dict[str, Any]:
    """The manifest's entry for a shard on disk."""
    files = {kind: name for kind in DTYPES
             if (directory / (name := file_name(part, kind, number))).is_file()}
    rows = np.load(directory / files.pop("images"), mmap_mode="r").shape[0]
    return {**files, "images": rows,
            "sha256": {name: sha256(directory / name) for name in files.values()}}


def write_manifest(directory: Path, manifest: dict[str, Any]) -> None:
    text = json.dumps({"version": VERSION, **manifest}, indent=1)
    write_bytes(directory / "manifest.json", text.encode())


def read_manifest(directory: Path) -> dict[str, Any]:
    """ValueError: there is none, or one of another version."""
    path = Path(directory) / "manifest.json"
    if not path.is_file():
        fault = ("unfinished: run the command that encodes it again"
                 if (Path(directory) / "encoding.json").is_file() else
                 "no directory of shards, it has no manifest.json: make some with "
                 "scripts.encode_images")
        raise ValueError(f"{directory} is {fault}")
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        version = manifest.get("version")
    except (ValueError, AttributeError):
        raise ValueError(f"{path} is damaged: encode again into another directory") from None
    if version != VERSION:
        raise ValueError(f"{path} is of format version {version}, this program reads {VERSION}: "
                         "encode again into another directory")
    return manifest


class Shards:
    """One part of a directory of shards, as if it were single arrays."""

    def __init__(self, directory: Path, part: str, manifest: dict[str, Any],
                 check: bool = False):
        self.manifest = manifest
        self.crops: int = manifest["crops"]
        self.length: int = manifest["grid"][0] * manifest["grid"][1]
        self.embedding_dim: int = manifest["embedding_dim"]
        shapes = {"codes": (self.crops, self.length), "texts": (self.embedding_dim,),
                  "embeddings": (self.crops, self.embedding_dim)}
        self._arrays: dict[str, list[np.ndarray]] = {"codes": [], "embeddings": [], "texts": []}
        for entry in (e for e in manifest["parts"][part] if e["images"]):
            for kind, found in self._arrays.items():
                if kind in entry:
                    path, shape = directory / entry[kind], (entry["images"], *shapes[kind])
                    found.append(_map(path, shape, DTYPES[kind]))
                    if check and sha256(path) != entry["sha256"][entry[kind]]:
                        raise ValueError(f"{path} is not what was written: encode again into "
                                         "another directory")
        counts = [len(array) for array in self._arrays["codes"]]
        self._ends = np.cumsum(counts)

    def __len__(self) -> int:
        return int(self._ends[-1])

    def rows(self, index: Tensor, crop: Tensor) -> tuple[Tensor, Tensor]:
        """Codes int64 (B, L) and unit embeddings float32 (B, D) of images `index`, crops `crop`.

        Both int64 (B,).
        """
        index, crop = np.asarray(index), np.asarray(crop)
        shard = np.searchsorted(self._ends, index, side="right")
        row = index - np.concatenate([[0], self._ends])[shard]
        places = list(zip(shard.tolist(), row.tolist(), crop.tolist(), strict=True))
        codes, embeddings = (np.stack([self._arrays[kind][s][r, c] for s, r, c in places])
                             for kind in ("codes", "embeddings"))
        return (torch.from_numpy(codes.astype(np.int64)),
                F.normalize(torch.from_numpy(embeddings.astype(np.float32)), dim=1))

    def texts(self) -> tuple[Tensor, Tensor] | None:
        """Unit embeddings float32 (M, D) of the M captions and the rows int64 (M,) of their images.

        None without captions.
        """
        if not self._arrays["texts"]:
            return None
        texts = torch.from_numpy(np.concatenate(self._arrays["texts"]).astype(np.float32))
        captioned = texts.any(1).nonzero().flatten()
        return (F.normalize(texts[captioned], dim=1), captioned) if len(captioned) else None

    def code_counts(self) -> Tensor:
        """How often each code occurs, over all crops: int64 (codebook_size,)."""
        size = self.manifest["codebook_size"]
        counts = sum(np.bincount(array.ravel(), minlength=size) for array in self._arrays["codes"])
        return torch.from_numpy(counts)

    def mean_embedding(self) -> Tensor:
        """Mean of the unit embeddings of all crops: float32 (D,)."""
        total = torch.zeros(self.embedding_dim, dtype=torch.float64)
        for array in self._arrays["embeddings"]:
            rows = torch.from_numpy(array.astype(np.float32)).flatten(0, 1)
            total += F.normalize(rows, dim=1).sum(0, dtype=torch.float64)
        return (total / (len(self) * self.crops)).float()


def _map(path: Path, shape: tuple[int, ...], dtype: type) -> np.ndarray:
    if not path.is_file():
        raise ValueError(f"{path} is missing: copy it from where the shards were made, or encode "
                         "again into another directory")
    damaged = ValueError(f"{path} is damaged or cut short: copy it again, or encode again into "
                         "another directory")
    try:
        with open(path, "rb") as file:
            np.lib.format.read_magic(file)
            header = np.lib.format.read_array_header_1_0(file)
            start, end = file.tell(), file.seek(0, io.SEEK_END)
    except (ValueError, EOFError):
        raise damaged from None
    except OSError as error:
        raise ValueError(f"{path} cannot be read ({error.strerror}): check it") from None
    if header != (shape, False, np.dtype(dtype)) or end - start != math.prod(shape) * np.dtype(
            dtype).itemsize:
        raise damaged
    # np.memmap would keep a file open for each of these, of which there may be thousands.
    mapped = torch.from_file(str(path), size=end, dtype=torch.uint8).numpy()
    return mapped[start:].view(dtype).reshape(shape)


def read_shards(directory: str | Path, part: str = "train", check: bool = False) -> Shards:
    """The part `train` or `validation` of a finished directory of shards, memory-mapped.

    `check` compares the sha256 of every file.  ValueError, one sentence: no or an unfinished
    directory, no such part, a file that is missing, cut short or (with `check`) altered.
    """
    directory = Path(directory)
    manifest = read_manifest(directory)
    if not manifest["parts"].get(part):
        raise ValueError(f"{directory} holds no {part} images: encode again, with --validation or "
                         "a --held-out share above 0")
    return Shards(directory, part, manifest, check)
