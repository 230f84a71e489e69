"""Putting the three trained parts together into a bundle."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from clipgen.bundle import SamplingDefaults, load_bundle, save_bundle
from clipgen.clip import CLIP
from clipgen.gpt import GPT
from scripts.training.cli import number, setting
from scripts.training.loading import (
    CODES,
    IMAGE_TOWER,
    fingerprint,
    load_clip,
    load_gpt,
    load_vqgan,
    read_json,
)

GUIDED = SamplingDefaults(guidance=2.0, top_p=0.95)  # as the default bundle's, a little gentler
SETTINGS = ("temperature", "top_k", "top_p", "guidance")


def gpt_of(source: Path) -> tuple[GPT, dict, SamplingDefaults]:
    """A GPT, what its shards were encoded with, and settings that it can be sampled with."""
    if (source / "config.json").is_file():
        bundle = load_bundle(source)
        return bundle.gpt, {"clip_sha256": fingerprint(bundle.clip), "means": None,
                            "image_tower_sha256": fingerprint(bundle.clip, *IMAGE_TOWER),
                            "vqgan_sha256": fingerprint(bundle.vqgan, *CODES)}, bundle.sampling
    gpt = load_gpt(source)
    sampling = GUIDED if gpt.config.null_embedding else replace(GUIDED, guidance=1.0)
    return gpt, read_json(source, "shards.json", "gpt"), sampling


def clip_fits(clip: CLIP, made_of: dict[str, Any]) -> bool:
    """Whether a GPT's shards were encoded by this CLIP.  Its text tower may be another one since
    (`train_text`), but not where the mean of its texts was measured."""
    tower = made_of.get("image_tower_sha256")  # older shards do not say
    same_images = tower == fingerprint(clip, *IMAGE_TOWER) and not made_of["means"]
    return same_images or made_of["clip_sha256"] == fingerprint(clip)


@dataclass(kw_only=True)
class BundleSettings:
    """Settings of `scripts.make_bundle`; the sampling settings' default is the GPT's own."""

    out: Path = setting(help="directory of the bundle", type=Path, positional=True)
    clip: str = setting(help="run of train_clip, bundle, or open_clip's name")
    vqgan: str = setting(help="run of train_vqgan, or bundle")
    gpt: Path = setting(help="run of train_gpt, or bundle", type=Path)
    trained_on: str = setting("", "what config.json says of the data")
    temperature: float | None = setting(None, "(1)", type=number(float, 0, 1000))
    top_k: int | None = setting(None, "(0: all codes)", type=number(int, 0, 2**31 - 1))
    top_p: float | None = setting(None, f"({GUIDED.top_p})", type=number(float, 0, 1))
    guidance: float | None = setting(
        None, f"({GUIDED.guidance:g}, or 1 without a null embedding; where --gpt is a bundle, it "
        "and the three above are the bundle's own)", type=number(float, 0, 1000))
    force: bool = setting(False, "replace the bundle in the directory")


def make_bundle(s: BundleSettings) -> dict[str, Any]:
    """Write the bundle; returns its directory and the size of its files.

    One sentence each: ValueError, parts that do not fit or a bundle that is there; OSError.
    """
    if (s.out / "config.json").exists() and not s.force:
        raise ValueError(f"{s.out} holds a bundle already: give another directory, or --force to "
                         "replace it")
    clip, vqgan, (gpt, manifest, sampling) = load_clip(s.clip), load_vqgan(s.vqgan), gpt_of(s.gpt)
    for name, path, fits in (
            ("clip", s.clip, clip_fits(clip, manifest)),
            ("vqgan", s.vqgan, manifest["vqgan_sha256"] == fingerprint(vqgan, *CODES))):
        if not fits:
            raise ValueError(f"{s.gpt} was trained on shards of another {name} than {path}: give "
                             "that one, or encode and train again")
    if means := manifest["means"]:
        clip.config = replace(clip.config, text_embedding_mean=means["text"],
                              image_embedding_mean=means["image"])
    given = {name: getattr(s, name) for name in SETTINGS if getattr(s, name) is not None}
    try:
        save_bundle(s.out, clip=clip, vqgan=vqgan, gpt=gpt, trained_on={"data": s.trained_on},
                    sampling=replace(sampling, **given))
    except OSError as error:
        raise OSError(f"{s.out} cannot be written ({error.strerror}): make room, or name another "
                      "directory, and run the command again") from None
    return {"bundle": str(s.out),
            "bytes": {f.name: f.stat().st_size for f in sorted(s.out.glob("*.safetensors"))}}
