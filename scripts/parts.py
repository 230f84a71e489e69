"""Where training finds a CLIP, a VQGAN or a GPT: a run, a bundle, or open_clip by name."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import nn

from clipgen import bundle
from clipgen.clip import CLIP, CLIPConfig
from clipgen.gpt import GPT, GPTConfig
from clipgen.vqgan import VQGAN, VQGANConfig

CODES = ("encoder.", "quantizer.")  # what codes depend on; the decoder may be trained further


def load_clip(source: str | Path) -> CLIP:
    """A CLIP from a bundle, a run of `train_clip`, or open_clip as `ARCHITECTURE:PRETRAINED`.

    PRETRAINED is one of open_clip's tags (fetched once over the network) or the path of a file.
    """
    directory = Path(source)
    if (directory / "config.json").is_file():
        return of_bundle(bundle.load_clip, directory)
    if directory.is_dir():
        data = read_json(directory, "clip.json", "a bundle nor a finished run of train_clip")
        vocabulary = None if data["vocabulary"] is None else tuple(data["vocabulary"])
        clip = CLIP(CLIPConfig(model=data["model"], vocabulary=vocabulary))
        clip.load_state_dict(load_file(directory / "clip.safetensors"))
        return clip.eval()
    return clip_of_open_clip(str(source))


def clip_of_open_clip(name: str) -> CLIP:
    architecture, _, pretrained = name.partition(":")
    import open_clip

    if architecture not in open_clip.list_models() or not pretrained:
        raise SystemExit(f"CLIP {name} is no bundle, no run of train_clip and no "
                         "ARCHITECTURE:PRETRAINED of open_clip: give for example weights/emoji or "
                         "ViT-B-32-quickgelu:openai")
    logging.disable(logging.ERROR)  # what matters is in the sentence below
    try:
        module, _, preprocess = open_clip.create_model_and_transforms(architecture, pretrained)
    except Exception as error:  # open_clip, its hub and the network raise many kinds
        raise SystemExit(f"CLIP {name} cannot be had ({error!s:.120}): check the network, or give "
                         "the CLIP of a bundle, as in --clip weights/emoji") from None
    finally:
        logging.disable(logging.NOTSET)
    model = {key: value for key, value in open_clip.get_model_config(architecture).items()
             if key in ("embed_dim", "vision_cfg", "text_cfg")}
    model["quick_gelu"] = bool(open_clip.get_model_config(architecture).get("quick_gelu"))
    normalise = preprocess.transforms[-1]
    try:
        clip = CLIP(CLIPConfig(model=model, image_mean=tuple(normalise.mean),
                               image_std=tuple(normalise.std)))
    except ValueError as error:
        raise SystemExit(f"CLIP {name} cannot be used: {error}") from None
    clip.model.load_state_dict(module.state_dict())
    return clip.eval()


def load_vqgan(source: str | Path) -> VQGAN:
    """A VQGAN from a bundle or from a run of `train_vqgan`."""
    directory = Path(source)
    if (directory / "config.json").is_file():
        return of_bundle(bundle.load_vqgan, directory)
    data = read_json(directory, "vqgan.json", "a bundle nor a finished run of train_vqgan")
    vqgan = VQGAN(VQGANConfig(**data))
    vqgan.load_state_dict(load_file(directory / "vqgan.safetensors"))
    return vqgan.eval()


def load_gpt(source: str | Path) -> GPT:
    """A GPT from a bundle or from a run of `train_gpt`."""
    directory = Path(source)
    if (directory / "config.json").is_file():
        return of_bundle(bundle.load_bundle, directory).gpt
    data = read_json(directory, "gpt.json", "a bundle nor a finished run of train_gpt")
    gpt = GPT(GPTConfig(**data))
    gpt.load_state_dict(load_file(directory / "gpt.safetensors"))
    return gpt.eval()


def of_bundle(load: Callable[[Path], Any], directory: Path) -> Any:
    try:
        return load(directory)
    except bundle.BundleError as error:
        raise SystemExit(str(error)) from None


def read_json(directory: Path, name: str, otherwise: str) -> Any:
    path = directory / name
    if not path.is_file():
        raise SystemExit(f"{directory} is neither {otherwise}: it has no {name}")
    return json.loads(path.read_text(encoding="utf-8"))


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
