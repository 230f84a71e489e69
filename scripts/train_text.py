"""Fit the text tower of a CLIP to the embeddings of its image tower, on images with captions.

    python -m scripts.train_text runs/scenes.tar --clip runs/clip --run runs/text [--steps 1500]
    accelerate launch -m scripts.train_text ...      on several devices

The image tower stays as it is: a GPT trained on its embeddings fits the result without another
step, and understands texts better (make_bundle --gpt takes it).  Captions are read as train_clip
reads them.
"""

from __future__ import annotations

from typing import Any

from scripts.training.cli import one_sentence, parse_settings
from scripts.training.run_directory import report
from scripts.training.text import TextSettings, train_text
from scripts.training.trainer import start


def parse(arguments: list[str] | None) -> TextSettings:
    return parse_settings(TextSettings, arguments, __doc__)


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    settings = parse(arguments)
    with one_sentence():
        return train_text(settings, start(settings.dtype, settings.seed))


if __name__ == "__main__":
    report(main())
