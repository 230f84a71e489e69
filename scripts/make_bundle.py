"""Put the three trained parts together: a directory that `scripts/generate` and Cog take as it is.

    python -m scripts.make_bundle weights/mine --clip runs/clip --vqgan runs/vqgan --gpt runs/gpt

`--trained-on` takes what config.json should say of the data; a README.md in the bundle is kept.
"""

from __future__ import annotations

import json
from typing import Any

from scripts.training.bundling import BundleSettings, make_bundle
from scripts.training.cli import one_sentence, parse_settings


def parse(arguments: list[str] | None) -> BundleSettings:
    return parse_settings(BundleSettings, arguments, __doc__)


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    settings = parse(arguments)
    with one_sentence():
        return make_bundle(settings)


if __name__ == "__main__":
    print(json.dumps(main()))
