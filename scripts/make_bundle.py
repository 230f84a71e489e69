"""Put the three trained parts together: a directory that `scripts/generate` and Cog take as it is.

    python -m scripts.make_bundle weights/mine --clip runs/clip --vqgan runs/vqgan --gpt runs/gpt

`--trained-on` takes what config.json should say of the data; a README.md in the bundle is kept.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from pathlib import Path

from clipgen.bundle import BundleError, SamplingDefaults, save_bundle
from scripts.parts import CODES, fingerprint, load_clip, load_gpt, load_vqgan, read_json


def made_of(gpt: Path) -> dict:
    """What a GPT's shards were encoded with."""
    if (gpt / "config.json").is_file():
        return {"clip_sha256": fingerprint(load_clip(gpt)), "means": None,
                "vqgan_sha256": fingerprint(load_vqgan(gpt), *CODES)}
    return read_json(gpt, "shards.json", "a bundle nor a finished run of train_gpt")


def main(arguments: list[str] | None = None) -> dict:
    p = argparse.ArgumentParser(description=__doc__,
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("out", type=Path, help="directory of the bundle")
    p.add_argument("--clip", required=True, help="run of train_clip, bundle, or open_clip's name")
    p.add_argument("--vqgan", required=True, help="run of train_vqgan, or bundle")
    p.add_argument("--gpt", type=Path, required=True, help="run of train_gpt, or bundle")
    p.add_argument("--trained-on", default="", help="what config.json says of the data")
    p.add_argument("--temperature", type=float, default=1.0)
    p.add_argument("--top-k", type=int, default=0)
    p.add_argument("--top-p", type=float, default=1.0)
    p.add_argument("--guidance", type=float, default=1.0)
    a = p.parse_args(arguments)
    clip, vqgan, gpt = load_clip(a.clip), load_vqgan(a.vqgan), load_gpt(a.gpt)
    manifest = made_of(a.gpt)
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
                    sampling=SamplingDefaults(a.temperature, a.top_k, a.top_p, a.guidance))
    except (BundleError, ValueError) as error:
        raise SystemExit(str(error)) from None
    except OSError as error:
        raise SystemExit(f"{a.out} cannot be written ({error.strerror}): make room, or name "
                         "another directory, and run the command again") from None
    return {"bundle": str(a.out),
            "bytes": {f.name: f.stat().st_size for f in sorted(a.out.glob("*.safetensors"))}}


if __name__ == "__main__":
    print(json.dumps(main()))
