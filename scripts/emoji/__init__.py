"""The default bundle's own world: its images, its judge, its training and its scores.

To import this makes the image source `scenes:` and the network `judge` known; what they need is
imported where they are used.
"""

from __future__ import annotations

from typing import Any

from scripts.data import SOURCES
from scripts.evaluation import NETWORKS


def open_scenes(options: str) -> tuple[Any, None]:
    from scripts.emoji.scenes import Scenes

    return Scenes.parse(options), None


def judge_network(device: Any) -> Any:
    from scripts.emoji.judge import load_judge
    from scripts.evaluation.features import Network

    found = load_judge().to(device).requires_grad_(False)
    return Network("the penultimate layer of scripts.emoji.judge", found.dimensions,
                   "area, to 64 pixels", found.embed)


SOURCES["scenes"] = open_scenes
NETWORKS["judge"] = judge_network
