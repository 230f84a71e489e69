"""Captions by image name: lines of name, tab, caption, or COCO's JSON."""

from __future__ import annotations

import json
from pathlib import Path

from scripts.data.archives import clean


def read_captions(path: Path) -> dict[str, list[str]]:
    """Captions by image name, of lines `NAME<TAB>caption` or of COCO's JSON (ending .json).

    ValueError: the file is missing, of another form, or holds none.
    """
    table: dict[str, list[str]] = {}
    try:
        text = Path(path).read_text(encoding="utf-8-sig", errors="surrogateescape")
    except OSError as error:
        raise ValueError(f"the captions {path} cannot be read: {error.strerror}") from None
    if Path(path).suffix.lower() == ".json":
        try:
            data = json.loads(text)
            names = {image["id"]: image["file_name"] for image in data["images"]}
            for annotation in data["annotations"]:
                table.setdefault(names[annotation["image_id"]], []).append(
                    shown(annotation["caption"].strip()))
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            raise ValueError(f"{path} is no COCO captions file: it needs images (id, file_name) "
                             "and annotations (image_id, caption)") from None
    else:
        for number, line in enumerate(text.split("\n"), 1):
            name, tab, caption = line.partition("\t")
            if tab and caption.strip():
                table.setdefault(clean(name.strip()), []).append(shown(caption.strip()))
            elif line.strip():
                raise ValueError(f"{path}, line {number} is not NAME<TAB>caption: "
                                 f"{line[:60]!r}")
    if not table:
        raise ValueError(f"{path} holds no caption: give lines of NAME<TAB>caption")
    return table


def shown(text: str) -> str:
    """The text as UTF-8 can hold it: a file name may be no UTF-8, its odd bytes become ?."""
    return text.encode("utf-8", "replace").decode()
