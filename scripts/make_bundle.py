"""Put the three trained parts together: a directory that `scripts/generate` and Cog take as it is.

    python -m scripts.make_bundle weights/mine --clip runs/clip --vqgan runs/vqgan --gpt runs/gpt

`--trained-on` takes what config.json should say of the data; a README.md in the bundle is kept.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from pathlib import Path

from clipgen.bundle import BundleError, SamplingDefaults, load_bundle, save_bundle
from clipgen.gpt import GPT
from scripts.training.cli import number
from scripts.training.loading import (
    CODES,
    fingerprint,
    load_clip,
    load_gpt,
    load_vqgan,
    of_bundle,
    read_json,
)

GUIDED = SamplingDefaults(guidance=2.0, top_p=0.95)  # as the default bundle's, a little gentler
SETTINGS = ("temperature", "top_k", "top_p", "guidance")


def gpt_of(source: Path) -> tuple[GPT, dict, SamplingDefaults]:
    """A GPT, what its shards were encoded with, and settings that it can be sampled with."""
    if (source / "config.json").is_file():
        bundle = of_bundle(load_bundle, source)
        return bundle.gpt, {"clip_sha256": fingerprint(bundle.clip), "means": None,
                            "vqgan_sha256": fingerprint(bundle.vqgan, *CODES)}, bundle.sampling
    gpt = load_gpt(source)
    sampling = GUIDED if gpt.config.null_embedding else replace(GUIDED, guidance=1.0)
    return gpt, read_json(source, "shards.json", "gpt"), sampling


def main(arguments: list[str] | None = None) -> dict:
    p = argparse.ArgumentParser(description=__doc__,
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("out", type=Path, help="directory of the bundle")
    p.add_argument("--clip", required=True, help="run of train_clip, bundle, or open_clip's name")
    p.add_argument("--vqgan", required=True, help="run of train_vqgan, or bundle")
    p.add_argument("--gpt", type=Path, required=True, help="run of train_gpt, or bundle")
    p.add_argument("--trained-on", default="", help="what config.json says of the data")
    p.add_argument("--temperature", type=number(float, 0, 1000), help="(1)")
    p.add_argument("--top-k", type=number(int, 0, 2**31 - 1), help="(0: all codes)")
    p.add_argument("--top-p", type=number(float, 0, 1), help=f"({GUIDED.top_p})")
    p.add_argument("--guidance", type=number(float, 0, 1000), help=f"({GUIDED.guidance:g}, or 1 "
                   "without a null embedding; where --gpt is a bundle, it and the three above are "
                   "the bundle's own)")
    p.add_argument("--force", action="store_true", help="replace the bundle in the directory")
    a = p.parse_args(arguments)
    if (a.out / "config.json").exists() and not a.force:
        raise SystemExit(f"{a.out} holds a bundle already: give another directory, or --force to "
                         "replace it")
    clip, vqgan, (gpt, manifest, sampling) = load_clip(a.clip), load_vqgan(a.vqgan), gpt_of(a.gpt)
    given = {name: getattr(a, name) for name in SETTINGS if getattr(a, name) is not None}
    for name, path, found in (("clip", a.clip, fingerprint(clip)),
                              ("vqgan", a.vqgan, fingerprint(vqgan, *CODES))):
        if manifest[f"{name}_sha256"] != found:
            raise SystemExit(f"{a.gpt} was trained on shards of another {name} than {path}: give "
                             "that one, or encode and train again")
    if means := manifest["means"]:
        clip.config = replace(clip.config, text_embedding_mean=means["text"],
                              image_embedding_mean=means["image"])
    try:
        save_bundle(a.out, clip=clip, vqgan=vqgan, gpt=gpt, trained_on={"data": a.trained_on},
                    sampling=replace(sampling, **given))
    except (BundleError, ValueError) as error:
        raise SystemExit(str(error)) from None
    except OSError as error:
        raise SystemExit(f"{a.out} cannot be written ({error.strerror}): make room, or name "
                         "another directory, and run the command again") from None
    return {"bundle": str(a.out),
            "bytes": {f.name: f.stat().st_size for f in sorted(a.out.glob("*.safetensors"))}}


if __name__ == "__main__":
    print(json.dumps(main()))
