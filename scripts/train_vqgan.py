"""Train a VQGAN on images: no captions, no labels.

    python -m scripts.train_vqgan IMAGES --run runs/vqgan --clip runs/clip
    accelerate launch -m scripts.train_vqgan ...      on several devices

Loss: L1 + L2 + perceptual + quantizer + hinge GAN from `--gan-start`.  New models have codes of 8
dimensions and unit length (ViT-VQGAN, arXiv 2110.04627); `--published` has the public recipe's.

`--from` fine-tunes the VQGAN of a bundle or run.  `--decoder-of` trains its decoder alone: codes,
and shards made of them, stay valid, so that this can run beside `train_gpt`.
"""

from __future__ import annotations

from typing import Any

from scripts.training.cli import one_sentence, parse_settings
from scripts.training.run_directory import report
from scripts.training.trainer import start
from scripts.training.vqgan import PUBLISHED, VQGANSettings, train_vqgan


def parse(arguments: list[str] | None) -> VQGANSettings:
    return parse_settings(VQGANSettings, arguments, __doc__,
                          defaults_with={"published": PUBLISHED})


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    settings = parse(arguments)
    with one_sentence():
        return train_vqgan(settings, start(settings.dtype, settings.seed))


if __name__ == "__main__":
    report(main())
