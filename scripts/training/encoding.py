"""Encoding images once: shards of codes and CLIP embeddings, which a GPT learns from."""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import PartialState
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from clipgen.clip import CLIP
from clipgen.vqgan import VQGAN
from scripts.data import shards
from scripts.data.dataset import open_parts
from scripts.data.files import write_text
from scripts.data.images import Images, UnreadableImage, draw
from scripts.data.reading import ReadingSettings
from scripts.data.transforms import centre_view, least_side, random_view
from scripts.training.cli import positive, scale, seed, setting, whole
from scripts.training.loading import CODES, IMAGE_TOWER, fingerprint, load_clip, load_vqgan
from scripts.training.settings import require_same

IMAGES_PER_SHARD = 1024  # so many, per process, are encoded again after a kill
CROP = 2  # separates the crops stored here from the random streams of scripts.data.transforms
NAMED = 20  # unreadable images on stderr; the manifest names all


@dataclass(kw_only=True)
class EncodeSettings(ReadingSettings):
    """Settings of `scripts.encode_images`."""

    images: str = setting(help="folder, zip, tar, 'shards/{000..099}.tar' or PRESET:DIRECTORY",
                          positional=True)
    out: Path = setting(help="directory of the shards", type=Path, positional=True)
    clip: str = setting(help="bundle, run of train_clip, or open_clip's NAME:PRETRAINED")
    vqgan: str = setting(help="bundle or run of train_vqgan")
    validation: str | None = setting(None, "images that are not trained on, another source")
    held_out: float = setting(0.05, "else this share of the images is not trained on, at most "
                              "5,000", type=float)
    crops: int = setting(4, "squares of each image", type=positive)
    scale: float = setting(0.85, "smallest side of a random square, as a share of the image's "
                           "shorter side", type=scale)
    flip: bool = setting(True, "mirror no square")
    captions: Path | None = setting(None, "NAME<TAB>caption lines or COCO captions JSON", type=Path)
    limit: int | None = setting(None, "encode at most this many images of each part, for a trial",
                                type=positive)
    batch: int = setting(64, "squares at once; for memory and speed", type=positive)
    workers: int = setting(0, "processes that read images beside this one", type=whole)
    seed: int = setting(0, "of the random squares", type=seed)


class Crops(Dataset):
    """Maps i to uint8 (crops, 3, S, S), the centre square first; to a text if it is unreadable."""

    def __init__(self, images: Images, settings: dict[str, Any]):
        self.images, self.settings = images, settings

    def __getitem__(self, i: int) -> Tensor | str:
        s = self.settings
        try:
            image = self.images.image(i, least_side(s["size"], s["scale"]))
        except UnreadableImage as error:
            return str(error)
        rng = np.random.default_rng((s["seed"], CROP, i))
        return torch.stack([centre_view(image, s["size"]), *(
            random_view(image, s["size"], rng, s["scale"], s["flip"])
            for _ in range(1, s["crops"]))])


class Encoder:
    """Makes and writes the shards of a part."""

    def __init__(self, out: Path, clip: CLIP, vqgan: VQGAN, settings: dict[str, Any], batch: int,
                 workers: int, bar: tqdm):
        self.out, self.clip, self.vqgan, self.settings = out, clip, vqgan, settings
        self.images_at_once = max(1, batch // settings["crops"])
        self.workers, self.bar, self.skipped = workers, bar, 0

    def encode(self, part: str, images: Images, numbers: Sequence[int]) -> None:
        """Write the shards `numbers`; workers read on across shards."""
        chunks = {n: self.chunks(shard_range(images, n)) for n in numbers}
        loader = iter(DataLoader(
            Crops(images, self.settings), batch_sampler=[c for n in numbers for c in chunks[n]],
            num_workers=self.workers, collate_fn=list, generator=torch.Generator()))
        for n in numbers:
            rows = [self.encode_chunk(chunk, next(loader)) for chunk in chunks[n]]
            arrays = {kind: np.concatenate([row[kind] for row in rows]) for kind in rows[0]}
            if self.settings["texts_sha256"] and part == "validation":
                arrays["texts"] = self.embed_texts(images, arrays["images"])
            shards.write_shard(self.out, part, n, arrays)

    def chunks(self, indices: range) -> list[list[int]]:
        n = self.images_at_once
        return [list(indices[start:start + n]) for start in range(0, len(indices), n)]

    @torch.no_grad()
    def encode_chunk(self, indices: list[int], loaded: list[Tensor | str]) -> dict[str, np.ndarray]:
        """Arrays of the readable ones of the images `indices`."""
        views = {i: crops for i, crops in zip(indices, loaded, strict=True)
                 if isinstance(crops, Tensor)}
        for message in (m for m in loaded if isinstance(m, str)):
            self.skipped += 1
            if self.skipped <= NAMED:
                tqdm.write(f"skipped {message}", file=sys.stderr)
        self.bar.update(len(indices))
        shape = len(views), self.settings["crops"], -1
        if not views:
            return {"codes": np.empty((*shape[:2], self.vqgan.config.grid**2)),
                    "embeddings": np.empty((*shape[:2], self.clip.embedding_dim)),
                    "images": np.empty(0)}
        pixels = torch.cat(list(views.values())).to(self.clip.device).float() / 255
        return {"codes": self.vqgan.encode(pixels).view(shape).cpu().numpy(),
                "embeddings": self.clip.embed_pixels(pixels).view(shape).cpu().numpy(),
                "images": np.array(list(views))}

    def embed_texts(self, images: Images, indices: np.ndarray) -> np.ndarray:
        """(n, D): the first caption of each image embedded, zeros where it has none."""
        texts = [first_caption(images, int(i)) for i in indices]
        rows = self.clip.embed_texts(texts).cpu().numpy()
        rows[[not text for text in texts]] = 0
        return rows


def first_caption(images: Images, i: int) -> str:
    return next(iter(images.captions(i)), "")


def text_fingerprint(images: Images) -> str | None:
    """sha256 of the first captions of all images; None if there is no caption."""
    texts = [first_caption(images, i) for i in range(len(images))]
    return hashlib.sha256(json.dumps(texts).encode()).hexdigest() if any(texts) else None


def shard_count(images: Images) -> int:
    return -(-len(images) // IMAGES_PER_SHARD)


def shard_range(images: Images, number: int) -> range:
    """The images of a shard, readable or not."""
    return range(number * IMAGES_PER_SHARD, min((number + 1) * IMAGES_PER_SHARD, len(images)))


def claim(out: Path, settings: dict[str, Any], state: PartialState) -> None:
    """Note what is encoded here.  ValueError: the directory holds something else."""
    path = out / "encoding.json"
    if state.is_main_process and not path.is_file():
        out.mkdir(parents=True, exist_ok=True)
        if all(file.name == f".{path.name}.part" for file in out.iterdir()):
            write_text(path, json.dumps(settings, indent=1))
    state.wait_for_everyone()
    if not path.is_file():
        raise ValueError(f"{out} holds other files: give a directory that is empty or new")
    require_same(out, json.loads(path.read_text(encoding="utf-8")), settings,
                 "give those again, or another directory")


def write_manifest(out: Path, parts: dict[str, Images], settings: dict[str, Any], clip: CLIP,
                   vqgan: VQGAN) -> None:
    """ValueError: no image of a part could be read."""
    described, skipped = {}, []
    for part, images in parts.items():
        described[part] = [shards.describe_shard(out, part, n) for n in range(shard_count(images))]
        for n in range(shard_count(images)):
            read = set(np.load(out / shards.file_name(part, "images", n)).tolist())
            skipped += [images.names[i] for i in shard_range(images, n) if i not in read]
        if not any(entry["images"] for entry in described[part]):
            raise ValueError(f"none of the {len(images)} {part} images can be read: give others")
    manifest = {
        **{f"{part}_images": sum(entry["images"] for entry in entries)
           for part, entries in described.items()},
        "grid": list(vqgan.code_grid), "codebook_size": vqgan.config.codebook_size,
        "embedding_dim": clip.embedding_dim, **settings, "skipped": skipped, "parts": described}
    texts = shards.Shards(out, "validation", manifest).texts()
    manifest["image_tower_sha256"] = fingerprint(clip, *IMAGE_TOWER)
    manifest["text_mean"] = texts[0].mean(0).tolist() if texts else None
    shards.write_manifest(out, manifest)


def encode_images(s: EncodeSettings) -> dict[str, Any]:
    """Encode what is not encoded yet; returns the manifest without its long lists.

    One sentence each: ValueError, settings that do not fit or a directory that holds other things;
    OSError, a disk that is full; MemoryError.
    """
    # Processes may finish hours apart where one of them reads from slower disks.
    state = PartialState(cpu=not torch.cuda.is_available(), timeout=timedelta(days=1))
    clip, vqgan = load_clip(s.clip).to(state.device), load_vqgan(s.vqgan).to(state.device)
    images, held, _ = open_parts(s.images, s.validation, s.held_out, s.captions, s.reading)
    parts = {"train": images, "validation": held}
    if s.limit:
        parts = {part: draw(found, s.limit) for part, found in parts.items()}
    if vqgan.config.codebook_size > 65536:
        raise ValueError(f"--vqgan {s.vqgan} has {vqgan.config.codebook_size:,} codes, and codes "
                         "are stored in 16 bits: give one of at most 65,536")
    settings = {
        "size": vqgan.config.image_size, "crops": s.crops, "scale": s.scale, "flip": s.flip,
        "seed": s.seed, "clip_sha256": fingerprint(clip),
        "centred": clip.config.image_embedding_mean is not None,
        "vqgan_sha256": fingerprint(vqgan, *CODES),
        "data_sha256": {part: found.fingerprint() for part, found in parts.items()},
        "texts_sha256": text_fingerprint(parts["validation"])}
    try:
        claim(s.out, settings, state)
        if not (s.out / "manifest.json").is_file():
            write_shards(s, state, clip, vqgan, parts, settings)
    except OSError as error:
        raise OSError(f"{s.out} cannot be written ({error.strerror}): make room, and the same "
                      "command goes on from there") from None
    manifest = shards.read_manifest(s.out)
    lists = ("parts", "skipped", "text_mean", "data_sha256")
    return {k: v for k, v in manifest.items() if k not in lists} | {
        "skipped": len(manifest["skipped"])}


def write_shards(s: EncodeSettings, state: PartialState, clip: CLIP, vqgan: VQGAN,
                 parts: dict[str, Images], settings: dict[str, Any]) -> None:
    """Write the shards that are missing, dealt out to all processes, then the manifest."""
    all_shards = [(part, n) for part, found in parts.items() for n in range(shard_count(found))]
    mine = all_shards[state.process_index::state.num_processes]
    there = [shard for shard in mine if shards.is_written(s.out, *shard)]
    sizes = {(part, n): len(shard_range(parts[part], n)) for part, n in mine}
    with tqdm(total=sum(sizes.values()), initial=sum(sizes[s] for s in there), unit=" images",
              desc="encoding", disable=not state.is_main_process) as bar:
        encoder = Encoder(s.out, clip, vqgan, settings, s.batch, s.workers, bar)
        # Convolutions on CUDA would round to TF32, and codes must not depend on that.
        with torch.backends.cudnn.flags(enabled=True, deterministic=True, allow_tf32=False):
            try:
                for part, images in parts.items():
                    encoder.encode(part, images, [n for p, n in mine
                                                  if p == part and (p, n) not in there])
            except torch.OutOfMemoryError:
                raise MemoryError(f"--batch {s.batch} does not fit into the memory of "
                                 f"{state.device}: give a smaller one") from None
    state.wait_for_everyone()
    if state.is_main_process:
        write_manifest(s.out, parts, settings, clip, vqgan)
    state.wait_for_everyone()
