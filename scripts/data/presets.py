"""Image sources: a folder, zip, tar, shards, or a preset such as coco:DIR.

    images, validation = open_images("photos/")           # any depth; or photos.zip, photos.tar
    images, validation = open_images("data/{0000..0099}.tar")
    images, validation = open_images("coco:/data/coco")   # PRESETS below
    images, validation = open_images("scenes:80000")      # one of SOURCES
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path

from scripts.data import SOURCES
from scripts.data.captions import read_captions
from scripts.data.images import Images, keys_of, open_all
from scripts.data.reading import PLAIN, Reading


def _expand(pattern: str) -> list[str]:
    from braceexpand import UnbalancedBracesError, braceexpand

    try:
        paths = list(braceexpand(pattern))
    except UnbalancedBracesError:
        raise ValueError(f"{pattern} has braces that do not match: write it as in "
                         "'FOLDER/{0000..0099}.tar'") from None
    missing = [path for path in paths if not os.path.isfile(path)]
    if missing:
        raise ValueError(f"{len(missing)} of the {len(paths)} shards of {pattern} do not exist, "
                         f"the first is {missing[0]}: shards must be files on this disk")
    return sorted(set(paths))


def _needed(preset: str, root: Path, layout: str, *names: str) -> list[Path]:
    """root/NAME for each name.  ValueError: the first that is missing."""
    for name in ("", *names):
        if not (root / name).exists():
            raise ValueError(f"{preset}:{root} needs {root / name}, which does not exist: the "
                             f"layout is {layout}")
    return [root / name for name in names]


def _coco(root: Path, reading: Reading) -> tuple[Images, Images]:
    train, val, train_captions, val_captions = _needed(
        "coco", root, "train2017/, val2017/ and annotations/captions_{train,val}2017.json",
        "train2017", "val2017", "annotations/captions_train2017.json",
        "annotations/captions_val2017.json")
    images, validation = (open_all([str(part)], str(part), reading) for part in (train, val))
    return (images.with_captions(read_captions(train_captions)),
            validation.with_captions(read_captions(val_captions)))


def _imagenet(root: Path, reading: Reading) -> tuple[Images, Images]:
    train, val = _needed("imagenet", root, "train/CLASS/*.JPEG and val/, with or without classes",
                         "train", "val")
    return open_all([str(train)], str(train), reading), open_all([str(val)], str(val), reading)


def _googlecc(root: Path, reading: Reading) -> tuple[Images, Images | None]:
    """What img2dataset makes of Conceptual Captions: 00000.tar ... of key.jpg, .txt and .json."""
    layout = "img2dataset's 00000.tar, 00001.tar ..., directly or in train/ and val/"
    _needed("googlecc", root, layout)

    def shards(folder: Path) -> Images:
        paths = sorted(str(path) for path in folder.glob("*.tar"))
        if not paths:
            raise ValueError(f"googlecc:{root} finds no .tar in {folder}: the layout is {layout}")
        return open_all(paths, str(folder), reading)

    if not (root / "train").is_dir():
        return shards(root), None
    return shards(root / "train"), shards(root / "val") if (root / "val").is_dir() else None


PRESETS = {"coco": _coco, "imagenet": _imagenet, "googlecc": _googlecc}


def open_images(source: str | Path, captions: Path | None = None,
                reading: Reading = PLAIN) -> tuple[Images, Images | None]:
    """The images of `source` and, where a preset has them, its validation images.

    `captions`: a file that `read_captions` takes, used instead of what lies beside the images.
    `reading`: what counts as an image, and how one is read.
    ValueError, one sentence: the source is missing, empty, of another layout or unreadable.
    """
    source = str(source)
    preset, _, root = source.partition(":")
    if preset in SOURCES:
        if captions:
            raise ValueError(f"{source} has captions of its own: leave {captions} out")
        return SOURCES[preset](root)
    if re.fullmatch("[a-z]{2,}", preset) and root and preset not in PRESETS and not (
            os.path.exists(source) or "{" in source):
        raise ValueError(f"{source}: {preset} is no source of images; there are "
                         f"{', '.join(sorted([*PRESETS, *SOURCES]))}, folders, zips, tars and "
                         "shards")
    if preset in PRESETS and root:
        images, validation = PRESETS[preset](Path(root).expanduser(), reading)
    elif "{" in source and not os.path.exists(source):
        images, validation = open_all(_expand(source), source, reading), None
    else:
        images, validation = open_all([source], source, reading), None
    if captions:
        table = read_captions(captions)
        _report_unmatched(captions, table, [images, validation] if validation else [images])
        images = images.with_captions(table)
        validation = validation.with_captions(table) if validation else None
    return images, validation


def _report_unmatched(path: Path, table: dict[str, list[str]], sets: Sequence[Images]) -> None:
    unmatched = table.keys() - {key for images in sets for name in images.names
                                for key in keys_of(name)}
    if len(unmatched) == len(table):
        raise ValueError(f"none of the {len(table)} names in {path} is that of an image such as "
                         f"{sets[0].names[0]}: names are paths relative to the source")
    if unmatched:
        print(f"{path}: {len(unmatched)} of {len(table)} names match no image, such as "
              f"{min(unmatched)}", file=sys.stderr)
