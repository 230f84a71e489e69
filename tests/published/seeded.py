"""Stand-ins for the three published checkpoints: same names and shapes, numbers from (seed, name).

The real files are too large for a test suite.  `state_dicts.json` lists their tensors; `golden.npz`
holds what the public implementation returned on the stand-ins of seed 0.

    python -m tests.published.seeded OUT [--seed 0]        writes 1.9 GB
"""

from __future__ import annotations

import argparse
import json
import zlib
from pathlib import Path

import numpy as np
import torch

HERE = Path(__file__).parent
FILES = {"clip": "clip_vit_b32.pt", "vqgan": "vqgan_coco.pt", "gpt": "gpt_coco.pt"}


def values(seed: int, name: str, shape: list[int], dtype: str) -> np.ndarray:
    """One tensor, called MODEL.TENSOR; the recipe is the recording's, so keep every bit."""
    if dtype == "int64":  # a batch norm's counter
        return np.zeros(shape, np.int64)
    if dtype == "bool":  # a causal mask, True above the diagonal
        return np.triu(np.ones(shape, bool), 1)
    if name == "clip.logit_scale":
        return np.full(shape, np.log(1 / 0.07), np.float32)
    rng = np.random.default_rng([seed, zlib.crc32(name.encode())])
    normal = rng.standard_normal(shape, dtype=np.float32)
    if name.endswith("running_var"):
        return 1 + 0.1 * np.abs(normal)
    if name.endswith("running_mean"):
        return 0.1 * normal
    if name.endswith("bias"):
        return 0.05 * normal
    if len(shape) == 1 and name.endswith("weight"):  # the scale of a norm
        return 1 + 0.1 * normal
    fan_in = int(np.prod(shape[1:])) if len(shape) > 1 else shape[0]
    return np.float32(1.4 / np.sqrt(fan_in)) * normal  # numpy 2 would make it float64


def state_dict(seed: int, model: str) -> dict[str, torch.Tensor]:
    """Every tensor of the published "clip", "vqgan" or "gpt" file."""
    tensors = json.loads((HERE / "state_dicts.json").read_text())[model]
    return {name: torch.from_numpy(np.asarray(values(seed, f"{model}.{name}", *spec)))
            for name, spec in tensors.items()}


def write(directory: Path, seed: int = 0) -> dict[str, Path]:
    """Write the three files in the published format: {"clip": path, "vqgan": path, "gpt": path}."""
    directory.mkdir(parents=True, exist_ok=True)
    paths = {}
    for model, file in FILES.items():
        tensors = state_dict(seed, model)
        paths[model] = directory / file
        # the published CLIP file is a bare state dict, the other two are training checkpoints
        torch.save(tensors if model == "clip" else {"model": tensors, "epoch": 1}, paths[model])
    return paths


def image(seed: int, size: int) -> np.ndarray:
    """A smooth test image, uint8 (size, size, 3): six plane waves a channel."""
    rng = np.random.default_rng([seed, 99])
    y, x = np.mgrid[0:size, 0:size] / size
    out = np.zeros((size, size, 3))
    for channel in range(3):
        for _ in range(6):
            fx, fy, phase = rng.uniform(-6, 6), rng.uniform(-6, 6), rng.uniform(0, 6.28)
            out[..., channel] += np.sin(2 * np.pi * (fx * x + fy * y) + phase)
    out = (out - out.min()) / (out.max() - out.min())
    return np.round(out * 255).astype(np.uint8)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    for path in write(args.out, args.seed).values():
        print(path)


if __name__ == "__main__":
    main()
