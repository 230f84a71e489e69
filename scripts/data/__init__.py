"""Images and captions from wherever they lie; shards of codes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

# By name as in NAME:OPTIONS a function from the options to (images, validation images or None).
# Packages that bring a source of their own add it here.
SOURCES: dict[str, Callable[[str], tuple[Any, Any]]] = {}
