"""Where training finds a CLIP, a VQGAN or a GPT: a run, a bundle, or open_clip by name."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from clipgen import bundle
from clipgen.clip import CLIP, CLIPConfig
from clipgen.gpt import GPT, GPTConfig
from clipgen.vqgan import VQGAN, VQGANConfig
from scripts.training.open_clip_models import clip_of_open_clip

CODES = ("encoder.", "quantizer.")  # what codes depend on; the decoder may be trained further
IMAGE_TOWER = ("model.visual.",)  # what image embeddings depend on; the texts' may be too


def load_clip(source: str | Path) -> CLIP:
    """A CLIP from a bundle, a run of `train_clip`, or open_clip as `ARCHITECTURE:PRETRAINED`.

    PRETRAINED is one of open_clip's tags (fetched once over the network) or the path of a file.
    """
    directory = Path(source)
    if (directory / "config.json").is_file():
        return bundle.load_clip(directory)
    if directory.is_dir():
        return of_run(directory, "clip", lambda data: CLIP(CLIPConfig(**data)))
    return clip_of_open_clip(str(source))


def load_vqgan(source: str | Path) -> VQGAN:
    """A VQGAN from a bundle or from a run of `train_vqgan`."""
    directory = Path(source)
    if (directory / "config.json").is_file():
        return bundle.load_vqgan(directory)
    return of_run(directory, "vqgan", lambda data: VQGAN(VQGANConfig(**data)))


def load_gpt(source: str | Path) -> GPT:
    """A GPT from a bundle or from a run of `train_gpt`."""
    directory = Path(source)
    if (directory / "config.json").is_file():
        return bundle.load_bundle(directory).gpt
    return of_run(directory, "gpt", lambda data: GPT(GPTConfig(**data)))


def of_run(directory: Path, part: str, build: Callable[[dict], nn.Module]) -> Any:
    """The part that a finished run left there; `build` makes it, without values, of its JSON."""
    data, path = read_json(directory, f"{part}.json", part), directory / f"{part}.safetensors"
    try:
        module = build(data)
        module.load_state_dict(load_file(path))
    except (OSError, SafetensorError, TypeError, ValueError, RuntimeError) as error:
        raise ValueError(damaged(path, error)) from None
    return module.eval()


def read_json(directory: Path, name: str, part: str) -> Any:
    path = directory / name
    if not path.is_file():
        raise ValueError(f"{directory} is neither a bundle nor a finished run of train_{part}: it "
                         f"has no {name}")
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(damaged(path, error)) from None


def damaged(path: Path, error: Exception) -> str:
    reason = str(error).partition("\n")[0]
    return f"{path} is damaged ({reason}): copy that run again, or train anew"


def fingerprint(module: nn.Module, *parts: str) -> str:
    """sha256 of the tensors whose names start with one of `parts` (all without any), and of the
    means that a CLIP takes off its embeddings."""
    digest = hashlib.sha256()
    if isinstance(module, CLIP) and module.config.image_embedding_mean:
        digest.update(repr(module.config.image_embedding_mean).encode())
    for name, tensor in sorted(module.state_dict().items()):
        if name.startswith(parts or ("",)):
            values = (tensor.cpu() + 0).flatten()  # -0.0 is 0.0
            digest.update(name.encode() + values.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
