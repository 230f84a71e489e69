"""Put the three trained parts together: a directory that `scripts/generate` and Cog take as it is.

    python -m scripts.make_bundle weights/mine --clip runs/clip --vqgan runs/vqgan --gpt runs/gpt

`--trained-on` takes what config.json should say of the data; a README.md in the bundle is kept.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from safetensors.torch import load_file

from clipgen.bundle import SamplingDefaults, save_bundle
from clipgen.gpt import GPT, GPTConfig
from scripts.encode_images import CODES, fingerprint
from scripts.train_vqgan import load_clip_run, load_vqgan_run


def load_gpt_run(directory: Path) -> GPT:
    """The GPT that `train_gpt` left in its run directory."""
    gpt = GPT(GPTConfig(**json.loads((directory / "gpt.json").read_text())))
    gpt.load_state_dict(load_file(directory / "gpt.safetensors"))
    return gpt.eval()


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__,
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("out", type=Path, help="directory of the bundle")
    p.add_argument("--clip", type=Path, required=True, help="run directory of train_clip")
    p.add_argument("--vqgan", type=Path, required=True, help="run directory of train_vqgan")
    p.add_argument("--gpt", type=Path, required=True, help="run directory of train_gpt")
    p.add_argument("--trained-on", default="", help="what config.json says of the data")
    p.add_argument("--temperature", type=float, default=1.0)
    p.add_argument("--top-k", type=int, default=0)
    p.add_argument("--top-p", type=float, default=1.0)
    p.add_argument("--guidance", type=float, default=1.0)
    a = p.parse_args()
    clip, vqgan = load_clip_run(a.clip), load_vqgan_run(a.vqgan)
    manifest = json.loads((a.gpt / "shards.json").read_text())
    for name, path, found in (("clip", a.clip, fingerprint(clip)),
                              ("vqgan", a.vqgan, fingerprint(vqgan, *CODES))):
        if manifest[f"{name}_sha256"] != found:
            raise SystemExit(f"{a.gpt} was trained on shards of another {name} than {path}: give "
                             "that one, or encode and train again")
    save_bundle(a.out, clip=clip, vqgan=vqgan, gpt=load_gpt_run(a.gpt),
                trained_on={"data": a.trained_on},
                sampling=SamplingDefaults(a.temperature, a.top_k, a.top_p, a.guidance))
    sizes = {f.name: f.stat().st_size for f in sorted(a.out.glob("*.safetensors"))}
    print(json.dumps({"bundle": str(a.out), "bytes": sizes}))


if __name__ == "__main__":
    main()
