"""Encode images once: shards of codes (uint16) and CLIP embeddings (float16) for `train_gpt`.

    python -m scripts.encode_images photos/ runs/shards --clip weights/emoji --vqgan runs/vqgan
    accelerate launch -m scripts.encode_images ...      on several devices

IMAGES is what `data.images` opens: a folder, zip or tar, 'data/{0000..0099}.tar', or a preset
such as coco:/data/coco.  Each image is stored as its centre square and as random squares, each with
the embedding of that very square.  The validation images are those of --validation, else the
source's own, else a share of it; where they have captions, one of each is embedded too.

The same command goes on where it was stopped.  The last line of stdout is JSON.
"""

from __future__ import annotations

import sys
from typing import Any

from scripts.training.cli import one_sentence, parse_settings
from scripts.training.encoding import EncodeSettings, encode_images
from scripts.training.run_directory import report
from scripts.training.trainer import say_interrupted


def parse(arguments: list[str] | None) -> EncodeSettings:
    return parse_settings(EncodeSettings, arguments, __doc__, "python -m scripts.encode_images")


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    """Encode; returns the manifest without its long lists, which is what is printed."""
    settings = parse(arguments)
    sys.excepthook = say_interrupted
    with one_sentence():
        return encode_images(settings)


if __name__ == "__main__":
    report(main())
