"""Encode images once: shards of codes (uint16) and CLIP embeddings (float16) for `train_gpt`.

    python -m scripts.encode_images photos/ runs/shards --clip weights/emoji --vqgan runs/vqgan
    accelerate launch -m scripts.encode_images ...      on several devices

IMAGES is what `data.images` opens: a folder, zip or tar, 'data/{0000..0099}.tar', or a preset
such as coco:/data/coco.  Each image is stored as its centre square and as random squares, each with
the embedding of that very square.  The validation images are those of --validation, else the
source's own, else a share of it; where they have captions, one of each is embedded too.

The same command goes on where it was stopped.  The last line of stdout is JSON.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
from collections.abc import Sequence
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
from scripts.data.transforms import centre_view, least_side, random_view
from scripts.training.cli import positive, scale, seed, whole
from scripts.training.loading import CODES, fingerprint, load_clip, load_vqgan
from scripts.training.trainer import report, say_interrupted

IMAGES_PER_SHARD = 1024  # so many, per process, are encoded again after a kill
CROP = 2  # separates the crops stored here from the random streams of scripts.data.transforms
NAMED = 20  # unreadable images on stderr; the manifest names all


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
    """Note what is encoded here.  SystemExit: the directory holds something else."""
    path = out / "encoding.json"
    if state.is_main_process and not path.is_file():
        out.mkdir(parents=True, exist_ok=True)
        if all(file.name == f".{path.name}.part" for file in out.iterdir()):
            write_text(path, json.dumps(settings, indent=1))
    state.wait_for_everyone()
    if not path.is_file():
        raise SystemExit(f"{out} holds other files: give a directory that is empty or new")
    found = json.loads(path.read_text(encoding="utf-8"))
    changed = [f"{name} was {found.get(name)}, is {value}" for name, value in settings.items()
               if found.get(name) != value]
    if changed:
        raise SystemExit(f"{out} was begun with other settings ({'; '.join(changed)}): give those "
                         "again, or another directory")


def write_manifest(out: Path, parts: dict[str, Images], settings: dict[str, Any], clip: CLIP,
                   vqgan: VQGAN) -> None:
    """SystemExit: no image of a part could be read."""
    described, skipped = {}, []
    for part, images in parts.items():
        described[part] = [shards.describe_shard(out, part, n) for n in range(shard_count(images))]
        for n in range(shard_count(images)):
            read = set(np.load(out / shards.file_name(part, "images", n)).tolist())
            skipped += [images.names[i] for i in shard_range(images, n) if i not in read]
        if not any(entry["images"] for entry in described[part]):
            raise SystemExit(f"none of the {len(images)} {part} images can be read: give others")
    manifest = {
        **{f"{part}_images": sum(entry["images"] for entry in entries)
           for part, entries in described.items()},
        "grid": list(vqgan.code_grid), "codebook_size": vqgan.config.codebook_size,
        "embedding_dim": clip.embedding_dim, **settings, "skipped": skipped, "parts": described}
    texts = shards.Shards(out, "validation", manifest).texts()
    manifest["text_mean"] = texts[0].mean(0).tolist() if texts else None
    shards.write_manifest(out, manifest)


def parse(arguments: list[str] | None) -> argparse.Namespace:
    p = argparse.ArgumentParser(prog="python -m scripts.encode_images", description=__doc__,
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    add = p.add_argument
    add("images", help="folder, zip, tar, 'shards/{000..099}.tar' or PRESET:DIRECTORY")
    add("out", type=Path, help="directory of the shards")
    add("--clip", required=True, help="bundle, run of train_clip, or open_clip's NAME:PRETRAINED")
    add("--vqgan", required=True, help="bundle or run of train_vqgan")
    add("--validation", help="images that are not trained on, another source")
    add("--held-out", type=float, default=0.05, help="else this share of the images is not trained "
        "on, at most 5,000 (0.05)")
    add("--crops", type=positive, default=4, help="squares of each image (4)")
    add("--scale", type=scale, default=0.85, help="smallest side of a random square, as a share "
        "of the image's shorter side (0.85)")
    add("--no-flip", action="store_true", help="mirror no square")
    add("--captions", type=Path, help="NAME<TAB>caption lines or COCO captions JSON")
    add("--limit", type=positive, help="encode at most this many images of each part, for a trial")
    add("--batch", type=positive, default=64, help="squares at once; for memory and speed (64)")
    add("--workers", type=whole, default=0, help="processes that read images beside this one (0)")
    add("--seed", type=seed, default=0, help="of the random squares (0)")
    return p.parse_args(arguments)


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    """Encode; returns the manifest without its lists, which is what is printed."""
    a = parse(arguments)
    sys.excepthook = say_interrupted
    # Processes may finish hours apart where one of them reads from slower disks.
    state = PartialState(cpu=not torch.cuda.is_available(), timeout=timedelta(days=1))
    try:
        clip, vqgan = load_clip(a.clip).to(state.device), load_vqgan(a.vqgan).to(state.device)
        images, held, _ = open_parts(a.images, a.validation, a.held_out, a.captions)
        parts = {"train": images, "validation": held}
        if a.limit:
            parts = {part: draw(found, a.limit) for part, found in parts.items()}
        texts_sha256 = text_fingerprint(parts["validation"])
    except ValueError as error:
        raise SystemExit(str(error)) from None
    if vqgan.config.codebook_size > 65536:
        raise SystemExit(f"--vqgan {a.vqgan} has {vqgan.config.codebook_size:,} codes, and codes "
                         "are stored in 16 bits: give one of at most 65,536")
    settings = {
        "size": vqgan.config.image_size, "crops": a.crops, "scale": a.scale, "flip": not a.no_flip,
        "seed": a.seed, "clip_sha256": fingerprint(clip),
        "centred": clip.config.image_embedding_mean is not None,
        "vqgan_sha256": fingerprint(vqgan, *CODES),
        "data_sha256": {part: found.fingerprint() for part, found in parts.items()},
        "texts_sha256": texts_sha256}
    try:
        claim(a.out, settings, state)
        if not (a.out / "manifest.json").is_file():
            encode(a, state, clip, vqgan, parts, settings)
    except OSError as error:
        raise SystemExit(f"{a.out} cannot be written ({error.strerror}): make room, and the same "
                         "command goes on from there") from None
    manifest = shards.read_manifest(a.out)
    lists = ("parts", "skipped", "text_mean", "data_sha256")
    return {k: v for k, v in manifest.items() if k not in lists} | {
        "skipped": len(manifest["skipped"])}


def encode(a: argparse.Namespace, state: PartialState, clip: CLIP, vqgan: VQGAN,
           parts: dict[str, Images], settings: dict[str, Any]) -> None:
    """Write the shards that are missing, dealt out to all processes, then the manifest."""
    all_shards = [(part, n) for part, found in parts.items() for n in range(shard_count(found))]
    mine = all_shards[state.process_index::state.num_processes]
    there = [shard for shard in mine if shards.is_written(a.out, *shard)]
    sizes = {(part, n): len(shard_range(parts[part], n)) for part, n in mine}
    with tqdm(total=sum(sizes.values()), initial=sum(sizes[s] for s in there), unit=" images",
              desc="encoding", disable=not state.is_main_process) as bar:
        encoder = Encoder(a.out, clip, vqgan, settings, a.batch, a.workers, bar)
        # Convolutions on CUDA would round to TF32, and codes must not depend on that.
        with torch.backends.cudnn.flags(enabled=True, deterministic=True, allow_tf32=False):
            try:
                for part, images in parts.items():
                    encoder.encode(part, images, [n for p, n in mine
                                                  if p == part and (p, n) not in there])
            except torch.OutOfMemoryError:
                raise SystemExit(f"--batch {a.batch} does not fit into the memory of "
                                 f"{state.device}: give a smaller one") from None
    state.wait_for_everyone()
    if state.is_main_process:
        write_manifest(a.out, parts, settings, clip, vqgan)
    state.wait_for_everyone()


if __name__ == "__main__":
    report(main())
