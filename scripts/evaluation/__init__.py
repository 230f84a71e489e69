"""Scores, pictures and reports of what was trained."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

# By name a function from a device to the `features.Network` there.  Packages that bring one add it.
NETWORKS: dict[str, Callable[[Any], Any]] = {}
