"""The three published CLIP-GEN checkpoints (.pt) to a bundle.

    python -m scripts.convert_weights --clip clip_vit_b32.pt --vqgan vqgan_coco.pt \\
        --gpt gpt_coco.pt weights/coco

Progress goes to stderr; the last line of stdout is one JSON object.  The bundle appears whole or
not at all.  A checkpoint is a bare state dict or a dict with the state dict under "model".
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import signal
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from clipgen.bundle import FILES, BundleError, SamplingDefaults, refuse_other_files, save_bundle
from clipgen.clip import CLIP, CLIPConfig
from clipgen.gpt import GPT, GPTConfig
from clipgen.vqgan import VQGAN, VQGANConfig

SOURCE = "https://github.com/HFAiLab/clip-gen/releases/tag/v0.1.0"
SAMPLING = SamplingDefaults(temperature=1.0, top_k=500, top_p=0.95)  # those of the public demo
DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}
MARKS = {"clip": "visual.class_embedding", "vqgan": "quantizer.embedding.weight", "gpt": "pos_emb"}
DROPPED = re.compile(r"discriminator\..*|blocks\.\d+\.mask")  # of use in training only
CARD = f"""# CLIP-GEN, MS-COCO

The three published CLIP-GEN checkpoints (arXiv 2203.00386), converted: CLIP ViT-B/32, a VQGAN for
256x256 images (16x16 codes of 16,384) and a GPT of 24 layers.  Source and licence: {SOURCE}
"""


class ConversionError(ValueError):
    """A checkpoint or an output directory that the converter cannot use; one sentence."""


def published_gpt_name(name: str) -> str:
    """The published name of one of our GPT's tensors."""
    if name == "position":
        return "pos_emb"
    name = re.sub(r"^code_embedding\.", "tok_emb.", name)
    name = re.sub(r"^condition\.", "cond_proj.", name)
    match = re.fullmatch(r"blocks\.(\d+)\.(norm1|qkv|proj|norm2|fc1|fc2)\.(weight|bias)", name)
    if not match:
        return name
    block, layer, kind = match.groups()
    theirs = {"qkv": f"self_attn.in_proj_{kind}", "proj": f"self_attn.out_proj.{kind}",
              "fc1": f"linear1.{kind}", "fc2": f"linear2.{kind}"}
    return f"blocks.{block}.encoder." + theirs.get(layer, f"{layer}.{kind}")


def read_checkpoint(path: Path) -> dict[str, Tensor]:
    """The state dict of a .pt file, memory-mapped where its format allows."""
    if not path.is_file():
        raise ConversionError(f"{path} is missing: give the path of the downloaded file")
    if not os.access(path, os.R_OK):
        raise ConversionError(f"{path} cannot be read: check its permissions")
    try:
        with warnings.catch_warnings(action="ignore"):  # all that matters ends up in an error below
            try:
                data = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
            except RuntimeError as error:
                if "mmap can only be used" not in str(error):
                    raise
                data = torch.load(path, map_location="cpu", weights_only=True)  # the pre-1.6 format
    except Exception as error:  # of any kind: what unpickling makes of a foreign file is open
        if "TorchScript" in str(error):
            raise ConversionError(f"{path} is a TorchScript archive: take the state dict published "
                                  f"at {SOURCE} instead") from None
        raise ConversionError(f"{path} is not a checkpoint of tensors, or is cut short: download "
                              "it again") from None
    if isinstance(data, dict) and isinstance(data.get("model"), dict):
        data = data["model"]
    if not isinstance(data, dict) or not data or not all(
            isinstance(name, str) and isinstance(value, Tensor) for name, value in data.items()):
        raise ConversionError(f"{path} holds no state dict: give a file published at {SOURCE}")
    return data


def fill(part: str, path: Path, module: nn.Module, expected: dict[str, tuple[str, Any]]) -> None:
    """Put the checkpoint at `path` into a module built on the meta device.

    `expected`: published name -> (our name, published shape).  ConversionError names the first
    tensor that is missing, extra, mis-shaped or not of floating point.
    """
    tensors = read_checkpoint(path)
    for other, mark in MARKS.items():
        if other != part and mark in tensors:
            raise ConversionError(f"--{part} {path} holds the {other} weights: "
                                  f"give it to --{other}")
    found = {name: tensor for name, tensor in tensors.items() if not DROPPED.fullmatch(name)}
    for name in sorted(expected.keys() ^ found.keys()):
        fault = "lacks the tensor" if name in expected else "has the unknown tensor"
        raise ConversionError(f"--{part} {path} {fault} {name}: it is not the published checkpoint")
    ours = {}
    for name, (our_name, shape) in expected.items():
        tensor = found[name]
        if shape == () and tensor.shape == (1,):  # NumPy makes scalars so: the same number
            tensor = tensor[0]
        if tensor.shape != shape or not tensor.is_floating_point():
            raise ConversionError(
                f"--{part} {path} holds {name} as {tuple(tensor.shape)} {tensor.dtype} instead of "
                f"{tuple(shape)} floating point: it is not the published checkpoint")
        ours[our_name] = tensor[0] if name == "pos_emb" else tensor  # (1, T, C) -> (T, C)
    module.load_state_dict(ours, assign=True)


def load_published(clip_path: Path, vqgan_path: Path, gpt_path: Path) -> tuple[CLIP, VQGAN, GPT]:
    """The three modules, their weights mapped from the published files."""
    clip = CLIP.on_meta(CLIPConfig.published())
    with torch.device("meta"):
        vqgan, gpt = VQGAN(VQGANConfig.published()), GPT(GPTConfig.published())
    for part, path, module in (("clip", clip_path, clip.model), ("vqgan", vqgan_path, vqgan),
                               ("gpt", gpt_path, gpt)):
        expected = {}
        for name, tensor in module.state_dict().items():
            if part != "gpt":
                expected[name] = (name, tensor.shape)
            elif name == "position":
                expected["pos_emb"] = (name, torch.Size([1, *tensor.shape]))
            else:
                expected[published_gpt_name(name)] = (name, tensor.shape)
        fill(part, path, module, expected)
    return clip, vqgan, gpt


def convert(clip: Path, vqgan: Path, gpt: Path, directory: Path, dtype: str, force: bool) -> dict:
    """Write the bundle; returns the line to print.  On failure `directory` is as it was."""
    started = time.monotonic()
    if directory.exists() and not directory.is_dir():
        raise ConversionError(f"{directory} is a file: give a directory for the bundle")
    held = sorted(p.name for p in directory.iterdir()
                  if not p.name.startswith(".")) if directory.exists() else []
    if held and not force:
        raise ConversionError(f"{directory} is not empty, it holds {held[0]}: give another "
                              "directory, or --force to replace the bundle in it")
    if held:
        refuse_other_files(directory)
    modules = load_published(clip, vqgan, gpt)
    # Written beside its destination, then moved: the same file system, so moving is renaming.
    directory.parent.mkdir(parents=True, exist_ok=True)
    temporary = directory.parent / f".{directory.name}.{os.getpid()}.tmp"
    try:
        print(f"convert_weights: writing {directory} in {dtype} ...", file=sys.stderr)
        save_bundle(temporary, clip=modules[0], vqgan=modules[1], gpt=modules[2],
                    sampling=SAMPLING, dtype=DTYPES[dtype],
                    trained_on={"data": "MS-COCO 2017, images only", "source": SOURCE,
                                "files": [clip.name, vqgan.name, gpt.name]})
        sizes = {name: (temporary / name).stat().st_size for name in FILES.values()}
        if not (directory / "README.md").exists():
            (temporary / "README.md").write_text(CARD, encoding="utf-8")
        directory.mkdir(exist_ok=True)
        for path in sorted(temporary.iterdir(), key=lambda p: p.name == "config.json"):
            os.replace(path, directory / path.name)  # config.json last
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return {"directory": str(directory), "dtype": dtype, "files": sizes,
            "bytes": sum(sizes.values()), "seconds": round(time.monotonic() - started, 1)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", type=Path, help="the bundle to make, for example weights/coco")
    for part in FILES:
        parser.add_argument(f"--{part}", type=Path, required=True, metavar="PT",
                            help=f"the published {part} checkpoint")
    parser.add_argument("--dtype", choices=DTYPES, default="float16", help="of the stored weights")
    parser.add_argument("--force", action="store_true", help="replace the bundle in the directory")
    args = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that clean-up runs
    try:
        line = convert(args.clip, args.vqgan, args.gpt, args.directory, args.dtype, args.force)
    except (ConversionError, BundleError) as error:
        raise SystemExit(f"convert_weights: {error}") from None
    except (OSError, SafetensorError) as error:
        raise SystemExit(f"convert_weights: {args.directory} cannot be written: {error}") from None
    print(json.dumps(line))


if __name__ == "__main__":
    main()
