"""CLIPs of open_clip by name: fetched, or from a file of open_clip's or OpenAI's."""

from __future__ import annotations

import contextlib
import logging
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from clipgen.clip import CLIP, CLIPConfig

PATIENCE = 10  # seconds without an answer of the hub; then there is no network


def clip_of_open_clip(name: str) -> CLIP:
    """The CLIP of `ARCHITECTURE:PRETRAINED`, one of open_clip's tags or the path of a file.

    A file is a checkpoint of open_clip's (weights, or a whole training state) or one of OpenAI's
    TorchScript archives, as ViT-B-32.pt, which all have QuickGELU.  ValueError, one sentence: it
    cannot be had or used.
    """
    architecture, _, pretrained = name.partition(":")
    import open_clip

    if architecture not in open_clip.list_models() or not pretrained:
        raise ValueError(f"CLIP {name} is no bundle, no run of train_clip and no "
                         "ARCHITECTURE:PRETRAINED of open_clip: give for example weights/emoji or "
                         "ViT-B-32-quickgelu:openai")
    config, path = dict(open_clip.get_model_config(architecture)), Path(pretrained)
    script = is_torchscript(path)
    if script and not config.get("quick_gelu"):
        print(f"clipgen: {pretrained} is an archive of OpenAI's, so {architecture} gets QuickGELU",
              file=sys.stderr)
        config["quick_gelu"] = True  # as all of theirs have
    if not path.is_file():
        announce(architecture, pretrained)
    logging.disable(logging.ERROR)  # what matters is in the sentence below
    try:
        module, _, preprocess = make(architecture, pretrained, script)
    except ImportError as error:
        raise ValueError(f"CLIP {name} needs a package that cannot be imported ({error}): install "
                         "it, or give another CLIP") from None
    except Exception as error:  # open_clip, its hub and the network raise many kinds
        what = (f"check that {pretrained} is a checkpoint of {architecture}"
                if path.is_file() else "check the network")
        raise unavailable(name, error, what) from None
    finally:
        logging.disable(logging.NOTSET)
    model = {key: value for key, value in config.items()
             if key in ("embed_dim", "vision_cfg", "text_cfg")}
    model["quick_gelu"] = bool(config.get("quick_gelu"))
    normalise = preprocess.transforms[-1]
    try:
        clip = CLIP(CLIPConfig(model=model, image_mean=tuple(normalise.mean),
                               image_std=tuple(normalise.std)))
    except ValueError as error:
        raise ValueError(f"CLIP {name} cannot be used: {error}") from None
    clip.model.load_state_dict(module.state_dict())
    return clip.eval()


def unavailable(name: str, error: Exception, what: str) -> ValueError:
    reason = " ".join(str(error).split())
    return ValueError(f"CLIP {name} cannot be had ({reason:.120}): {what}, or give a bundle "
                      "for its CLIP, as weights/emoji")


def make(architecture: str, pretrained: str, script: bool) -> Any:
    """open_clip's model with those weights, and its transforms."""
    import open_clip

    if not script:
        with numpy_scalars():
            return open_clip.create_model_and_transforms(architecture, pretrained)
    made = open_clip.create_model_and_transforms(architecture)
    state = torch.jit.load(pretrained, map_location="cpu").state_dict()
    for key in ("input_resolution", "context_length", "vocab_size", "attn_mask"):  # no weights
        state.pop(key, None)
    made[0].load_state_dict(state)
    return made


@contextlib.contextmanager
def numpy_scalars() -> Iterator[None]:
    """Training states of open_clip's hold NumPy scalars, which torch.load refuses by default."""
    scalar = np.float64(0).__reduce__()[0]
    kinds = [type(np.dtype(kind)) for kind in ("float16", "float32", "float64", "int32", "int64",
                                               "bool")]
    with torch.serialization.safe_globals(
            [scalar, (scalar, "numpy.core.multiarray.scalar"), np.dtype, *kinds]):
        yield


def is_torchscript(path: Path) -> bool:
    """Whether the file is a TorchScript archive: a zip with code, which weights alone have not."""
    if not path.is_file() or not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as archive:
        return any("/code/" in name for name in archive.namelist())


def announce(architecture: str, tag: str) -> None:
    """Say what is fetched, unless it lies on the disk.  ValueError: the hub does not answer.

    open_clip tries for a minute, and says neither.
    """
    import huggingface_hub
    from open_clip.pretrained import get_pretrained_cfg

    repository, _, file = get_pretrained_cfg(architecture, tag).get("hf_hub", "").rpartition("/")
    if not repository:
        return  # an unknown tag, or a plain address: open_clip tells
    files = [file] if file else ["open_clip_model.safetensors", "open_clip_pytorch_model.bin"]
    if any(isinstance(huggingface_hub.try_to_load_from_cache(repository, each), str)
           for each in files):
        return
    print(f"clipgen: fetching CLIP {architecture}:{tag} from {repository}", file=sys.stderr,
          flush=True)
    from huggingface_hub.errors import EntryNotFoundError

    url = huggingface_hub.hf_hub_url(repository, files[0])
    try:
        huggingface_hub.get_hf_file_metadata(url, timeout=PATIENCE)
    except EntryNotFoundError:
        return  # it answers, and has the other file
    except Exception as error:  # of its HTTP library, which differs by version
        raise unavailable(f"{architecture}:{tag}", error, "check the network") from None
