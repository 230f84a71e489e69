"""Train a small CLIP on images with captions (for bundles that bring their own).

    python -m scripts.train_clip runs/scenes.tar --run runs/clip [--steps 4000]
    accelerate launch -m scripts.train_clip ...      on several devices

Captions are read from NAME.txt beside each image, one a line; one is drawn at every use.  The
vocabulary keeps the tokens that occur in them, so that the bundle can say which words it never saw.
The loss is CLIP's symmetric cross-entropy (arXiv 2103.00020) over the batches of all processes.
"""

from __future__ import annotations

from typing import Any

from scripts.training.cli import one_sentence, parse_settings
from scripts.training.clip import CLIPSettings, train_clip
from scripts.training.run_directory import report
from scripts.training.trainer import start


def parse(arguments: list[str] | None) -> CLIPSettings:
    return parse_settings(CLIPSettings, arguments, __doc__)


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    settings = parse(arguments)
    with one_sentence():
        return train_clip(settings, start(settings.dtype, settings.seed))


if __name__ == "__main__":
    report(main())
