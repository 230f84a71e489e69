"""Where the bundle lies that is used when none is named.  Imports nothing that is slow."""

from __future__ import annotations

from pathlib import Path

HERE = Path(__file__).parent
# Of the installed package, which brings emoji along, and of a checkout.
FOLDERS = HERE / "weights", HERE.parent / "weights"
NAMES = "coco", "emoji"  # the first that is there


def default_bundle() -> Path:
    """The folder of the default bundle; ValueError, in one sentence, where there is none."""
    for folder in FOLDERS:
        for name in NAMES:
            if (folder / name).is_dir():
                return folder / name
    raise ValueError(f"there is no default bundle in {' or '.join(map(str, FOLDERS))}: name the "
                     "folder of one, such as weights/emoji of the project's repository")
