"""Images of a folder, zip, tar or WebDataset shards: read one by one, where they lie.

Opening lists the names and where each image lies; pixels are read when asked for, and nothing is
ever unpacked to disk.  NAME.txt beside an image holds its captions, one a line, NAME.json its
labels; as in WebDataset, NAME may also end at the first dot.
"""

from __future__ import annotations

import concurrent.futures
import functools
import hashlib
import json
import os
import sys
from collections import Counter
from collections.abc import Iterable, Sequence

import numpy as np
from PIL import Image
from tqdm import tqdm

from clipgen.images import UnreadableImage, decode_image
from scripts.data.archives import Place, Reader, list_files

ENDINGS = (".png", ".jpg", ".jpeg", ".jfif", ".webp", ".bmp", ".gif", ".tif", ".tiff")
# Place without its path, whose number in a list stands for it: a million take 60 MB.
PLACE = np.dtype([("path", "i4"), ("offset", "i8"), ("size", "i8"), ("how", "i1")])
NOWHERE = (-1, 0, 0, 0)
IMAGE, TEXT, LABELS = range(3)  # columns of places


class Images:
    """Named images in a fixed order; picklable, and safe to use in forked and spawned workers."""

    def __init__(self, names: list[str], paths: list[str], places: np.ndarray,
                 table: dict[str, list[str]] | None = None):
        """`places`: PLACE (N, 3), where each image lies, its captions and its labels.

        `table`: captions by name, instead of those beside the images.
        """
        self.names = names
        self._paths, self._places, self._table = paths, places, table
        self._reader = Reader()

    def __len__(self) -> int:
        return len(self.names)

    def image(self, i: int, least: int | None = None) -> Image.Image:
        """Image i as `decode_image` makes it; UnreadableImage says `NAME: reason`."""
        data = self._read(i, IMAGE)
        try:
            return decode_image(data, least)
        except UnreadableImage as error:
            raise UnreadableImage(f"{self.names[i]}: {error}") from None

    def captions(self, i: int) -> list[str]:
        """The captions of image i; empty without any.  UnreadableImage: their file is damaged."""
        if self._table is not None:
            return next((self._table[k] for k in keys_of(self.names[i]) if k in self._table), [])
        lines = self._read(i, TEXT).decode("utf-8-sig", errors="replace").splitlines()
        return [line.strip() for line in lines if line.strip()]

    def labels(self, i: int) -> dict:
        """What NAME.json holds for image i; empty without one.  ValueError: it is damaged."""
        data = self._read(i, LABELS)
        try:
            labels = json.loads(data or "{}")
        except ValueError:
            raise ValueError(f"the .json beside {self.names[i]} is not valid JSON: mend or remove "
                             "it") from None
        return labels if isinstance(labels, dict) else {"label": labels}

    def subset(self, indices: Iterable[int]) -> Images:
        """The images at `indices`, in that order."""
        indices = [int(i) for i in indices]
        return Images([self.names[i] for i in indices], self._paths, self._places[indices],
                      self._table)

    def with_captions(self, table: dict[str, list[str]]) -> Images:
        """The same images with the captions of `table`, by name with or without its ending."""
        return Images(self.names, self._paths, self._places, table)

    def fingerprint(self) -> str:
        """sha256 over names and sizes in bytes: which images these are."""
        digest = hashlib.sha256()
        for name, size in zip(self.names, self._places["size"][:, IMAGE].tolist(), strict=True):
            digest.update(name.encode("utf-8", "surrogateescape") + b"\0%d\n" % size)
        return digest.hexdigest()

    def _read(self, i: int, kind: int) -> bytes:
        """The content of a file; empty where there is none.  UnreadableImage: `NAME: reason`."""
        path, *rest = self._places[i, kind].item()
        if path < 0:
            return b""
        try:
            return self._reader.read(Place(self._paths[path], *rest))
        except (ValueError, OSError) as error:
            reason = error.strerror if isinstance(error, OSError) else error
            raise UnreadableImage(f"{self.names[i]}: {reason}") from None


def keys_of(name: str) -> tuple[str, str, str]:
    """What an image is called: its name, the name without the ending, and up to the first dot."""
    folder, slash, base = name.rpartition("/")
    return name, folder + slash + base.rpartition(".")[0], folder + slash + base.partition(".")[0]


def _list(path: str) -> tuple[list[str], list[str], np.ndarray, Counter[str]]:
    """names, paths, places (N, 3) of one source, and how often its other files' endings occur."""
    files: dict[str, Place] = {}  # of two members of one name the later one counts, as in tar
    others: Counter[str] = Counter()
    for name, place in list_files(path):
        ending = os.path.splitext(name)[1].lower()
        if ending in (*ENDINGS, ".txt", ".json"):
            files[name] = place
        else:
            others[ending or "without an ending"] += 1
    names = [name for name in files if name.lower().endswith(ENDINGS)]
    paths: dict[str, int] = {}
    places = np.full((len(names), 3), np.array(NOWHERE, PLACE))
    for i, name in enumerate(names):
        _, stem, key = keys_of(name)
        beside = [files.get(stem + ending) or files.get(key + ending)
                  for ending in (".txt", ".json")]
        for kind, place in enumerate([files[name], *beside]):
            if place:
                places[i, kind] = (paths.setdefault(place.path, len(paths)), *place[1:])
    return names, list(paths), places, others


def open_all(paths: Sequence[str], source: str) -> Images:
    """The images of `source`; where it stands for several shards, their names start with a shard's.

    ValueError: no image in any.
    """
    above = os.path.commonpath([os.path.dirname(os.path.abspath(path)) for path in paths])
    if len(paths) > 8:  # a shard of 10,000 images takes a core most of a second
        with concurrent.futures.ProcessPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
            listed = list(tqdm(pool.map(_list, paths), "listing", len(paths), unit=" shards"))
    else:
        listed = [_list(path) for path in paths]
    names, on_disk, places, others = [], [], [], Counter()
    for path, (found, where, place, other) in zip(paths, listed, strict=True):
        others += other
        prefix = "" if path == source else f"{os.path.relpath(path, above)}/"
        names += [prefix + name for name in found]
        place["path"][place["path"] >= 0] += len(on_disk)
        on_disk += where
        places.append(place)
    if not names:
        hint = ("; it holds archives: give one, or several as 'FOLDER/{0000..0099}.tar'"
                if {".tar", ".zip"} & others.keys() else ": give a folder, zip or tar of images")
        raise ValueError(f"{source} holds no image ({', '.join(ENDINGS)}){hint}")
    if others:
        _say(f"{source}: not used, as these are no images that can be read here: "
             + ", ".join(f"{count:,} {ending}" for ending, count in others.most_common(9)))
    order = sorted(range(len(names)), key=names.__getitem__)
    return Images(names, on_disk, np.concatenate(places)).subset(order)


@functools.cache  # once a process
def _say(text: str) -> None:
    print(text, file=sys.stderr)


def by_hash(images: Images) -> list[int]:
    """Indices in an order that depends on nothing but the names."""
    return sorted(range(len(images)), key=lambda i: hashlib.sha256(
        images.names[i].encode("utf-8", "surrogateescape")).digest())


def draw(images: Images, count: int) -> Images:
    """`count` images chosen by a hash of their names, in the order they had; all if fewer."""
    return images.subset(sorted(by_hash(images)[:count]))


def split(images: Images, share: float, most: int = 5000) -> tuple[Images, Images]:
    """(rest, held out): `share` of the images, at most `most`, chosen by a hash of their names.

    The latter in the order of the hash, so that the first n of them are a fair draw.  At least one
    image ends up on each side.  ValueError: a share outside 0 to 1 (both excluded), or fewer than 2
    images.
    """
    if not 0 < share < 1:
        raise ValueError(f"the held-out share must lie between 0 and 1, got {share}")
    if len(images) < 2:
        raise ValueError(f"{len(images)} image cannot be split: give more, or give the validation "
                         "images yourself")
    count = max(1, min(round(share * len(images)), most, len(images) - 1))
    order = by_hash(images)
    return images.subset(sorted(order[count:])), images.subset(order[:count])
