"""Encode images once: shards of codes (uint16) and embeddings (float16), read memory-mapped.

    python -m scripts.encode_images runs/scenes.tar runs/shards --clip runs/clip --vqgan runs/vqgan

Every image is stored twice, as it is and mirrored.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
from pathlib import Path

import numpy as np
import torch
from torch import nn

from scripts.images import read_images
from scripts.train_vqgan import load_clip_run, load_vqgan_run

# What codes depend on; the decoder may be trained further.
CODES = ("encoder.", "quantizer.")


def fingerprint(module: nn.Module, *parts: str) -> str:
    """sha256 of the tensors whose names start with one of `parts` (all without any)."""
    digest = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        if name.startswith(parts or ("",)):
            digest.update(name.encode() + tensor.cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__,
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("images", type=Path)
    p.add_argument("out", type=Path, help="directory of the shards")
    p.add_argument("--clip", type=Path, required=True, help="run directory of train_clip")
    p.add_argument("--vqgan", type=Path, required=True, help="run directory of train_vqgan")
    p.add_argument("--limit", type=int, help="encode this many images, the first ones")
    a = p.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    clip, vqgan = load_clip_run(a.clip).to(device), load_vqgan_run(a.vqgan).to(device)
    if vqgan.config.codebook_size > 65536:
        raise SystemExit(f"codes are stored in 16 bits, {vqgan.config.codebook_size} do not fit")
    images = read_images(a.images, vqgan.config.image_size)
    a.out.mkdir(parents=True, exist_ok=True)
    (a.out / "manifest.json").unlink(missing_ok=True)  # written last: without it no shards
    count, length = min(len(images), a.limit or len(images)), vqgan.config.grid**2
    codes = np.lib.format.open_memmap(a.out / "codes.npy", "w+", np.uint16, (count, 2, length))
    embeddings = np.lib.format.open_memmap(a.out / "embeddings.npy", "w+", np.float16,
                                           (count, 2, clip.embedding_dim))
    for start in range(0, count, 64):
        index = torch.arange(start, min(start + 64, count))
        pixels = images.batch(index).to(device)
        for crop, view in enumerate((pixels, pixels.flip(3))):
            codes[index.numpy(), crop] = vqgan.encode(view).flatten(1).cpu().numpy()
            embeddings[index.numpy(), crop] = clip.embed_pixels(view).cpu().numpy()
        if start % 6400 == 0:
            print(f"{start}/{count} images", file=sys.stderr, flush=True)
    codes.flush()
    embeddings.flush()
    manifest = {"images": count, "crops": 2, "codebook_size": vqgan.config.codebook_size}
    manifest["vqgan_sha256"] = fingerprint(vqgan, *CODES)
    manifest["clip_sha256"] = fingerprint(clip)
    (a.out / "manifest.json").write_text(json.dumps(manifest, indent=1))
    print(json.dumps(manifest))


if __name__ == "__main__":
    main()
