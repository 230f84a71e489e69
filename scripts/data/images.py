"""Images of a folder, zip, tar or WebDataset shards: read one by one, where they lie.

Opening lists the names and where each image lies; pixels are read when asked for, and nothing is
ever unpacked to disk.  NAME.txt beside an image holds its captions, one a line, NAME.json its
labels; as in WebDataset, NAME may also end at the first dot.  Of several images of one WebDataset
sample one is used.
"""

from __future__ import annotations

import concurrent.futures
import functools
import hashlib
import json
import mmap
import os
import sys
from collections import Counter
from collections.abc import Iterable, Sequence

import numpy as np
from PIL import Image
from tqdm import tqdm

from clipgen.images import FORMATS, NOTES, WHITE, UnreadableImage, decode_image, is_image
from scripts.data.archives import RARE, RARELY, SLICE, Place, Reader, list_files
from scripts.data.reading import PLAIN, Reading

ENDINGS = (".png", ".jpg", ".jpeg", ".jfif", ".webp", ".bmp", ".gif", ".tif", ".tiff",
           *((".avif",) if "AVIF" in FORMATS else ()),
           *((".jp2", ".j2k", ".jpx", ".jpf") if "JPEG2000" in FORMATS else ()))
ARCHIVES = {".tar", ".zip", ".tgz", ".gz", ".bz2", ".xz", ".zst"}
MOST_TEXT = 2**20  # bytes of the captions or labels of one image
# Place without its path, whose number in a list stands for it: a million take 60 MB.
PLACE = np.dtype([("path", "i4"), ("offset", "i8"), ("size", "i8"), ("how", "i1")])
NOWHERE = (-1, 0, 0, 0)
IMAGE, TEXT, LABELS = range(3)  # columns of places


class Notes:
    """Tells on stderr what was a guess about images: the first of each kind, then how many so far.

    Forked workers share the count, so that each image counts once, however often it is read.
    """

    def __init__(self, count: int):
        self._count = count
        self._seen = np.frombuffer(mmap.mmap(-1, max(1, count)), np.uint8)  # bits, one a kind

    def __reduce__(self) -> tuple[type, tuple[int]]:
        return Notes, (self._count,)  # a spawned worker counts on its own

    def add(self, i: int, name: str, note: str) -> None:
        bit = 1 << NOTES.index(note)
        if self._seen[i] & bit:
            return
        self._seen[i] |= bit
        count = int((self._seen & bit > 0).sum())
        if count == 1:
            print(f"{name}: {note}", file=sys.stderr)
        elif count in (10, 100) or count % 1000 == 0:
            print(f"{count:,} images so far: {note}", file=sys.stderr)


class Images:
    """Named images in a fixed order; picklable, and safe to use in forked and spawned workers."""

    def __init__(self, names: list[str], paths: list[str], places: np.ndarray,
                 table: dict[str, list[str]] | None = None, reading: Reading = PLAIN):
        """`places`: PLACE (N, 3), where each image lies, its captions and its labels.

        `table`: captions by name, instead of those beside the images.
        """
        self.names = names
        self._paths, self._places, self._table, self._reading = paths, places, table, reading
        self._reader = Reader()
        self._notes, self._numbers = Notes(len(names)), np.arange(len(names))

    def __len__(self) -> int:
        return len(self.names)

    def image(self, i: int, least: int | None = None) -> Image.Image:
        """Image i as `decode_image` makes it; UnreadableImage says `NAME: reason`.

        Its notes go to stderr: the first of each kind, and how many there are.
        """
        data = self._read(i, IMAGE)
        try:
            image = decode_image(data, least, self._reading.background)
        except UnreadableImage as error:
            raise UnreadableImage(f"{self.names[i]}: {error}") from None
        for note in image.info["notes"]:
            self._notes.add(int(self._numbers[i]), self.names[i], note)
        return image

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
        except (ValueError, RecursionError):
            raise ValueError(f"the .json beside {self.names[i]} is not valid JSON: mend or remove "
                             "it") from None
        return labels if isinstance(labels, dict) else {"label": labels}

    def subset(self, indices: Iterable[int]) -> Images:
        """The images at `indices`, in that order."""
        indices = [int(i) for i in indices]
        part = Images([self.names[i] for i in indices], self._paths, self._places[indices],
                      self._table, self._reading)
        part._notes, part._numbers = self._notes, self._numbers[indices]
        return part

    def with_captions(self, table: dict[str, list[str]]) -> Images:
        """The same images with the captions of `table`, by name with or without its ending."""
        whole = self.subset(range(len(self)))
        whole._table = table
        return whole

    def fingerprint(self) -> str:
        """sha256 over names, sizes in bytes and the background: which images these are."""
        digest = hashlib.sha256()
        if self._reading.background != WHITE:
            digest.update(bytes(self._reading.background))
        for name, size in zip(self.names, self._places["size"][:, IMAGE].tolist(), strict=True):
            digest.update(name.encode("utf-8", "surrogateescape") + b"\0%d\n" % size)
        return digest.hexdigest()

    def _read(self, i: int, kind: int) -> bytes:
        """The content of a file; empty where there is none.  UnreadableImage: `NAME: reason`."""
        path, *rest = self._places[i, kind].item()
        if path < 0:
            return b""
        place = Place(self._paths[path], *rest)
        try:
            if kind != IMAGE and place.size > MOST_TEXT:
                raise ValueError(f"its text file has {place.size:,} bytes, {MOST_TEXT:,} are "
                                 "allowed")
            return self._reader.read(place)
        except (ValueError, OSError) as error:
            reason = error.strerror if isinstance(error, OSError) else error
            raise UnreadableImage(f"{self.names[i]}: {reason}") from None


def keys_of(name: str) -> tuple[str, str, str]:
    """What an image is called: its name, the name without the ending, and up to the first dot."""
    folder, slash, base = name.rpartition("/")
    return name, folder + slash + base.rpartition(".")[0], folder + slash + base.partition(".")[0]


def _list(path: str, reading: Reading
          ) -> tuple[list[str], list[str], np.ndarray, Counter[str], list[str]]:
    """names, paths, places (N, 3) of one source; how often its other files' endings occur; the
    images left out, as others of their samples are used."""
    files: dict[str, Place] = {}  # of two members of one name the later one counts, as in tar
    others: Counter[str] = Counter()
    names: dict[str, None] = {}
    reader = Reader()
    for name, place in list_files(path):
        ending = os.path.splitext(name)[1].lower()
        if ending in ENDINGS or ending not in (".txt", ".json") and (
                reading.any_ending and _holds_image(reader, place)):
            names[name] = None
            files[name] = place
        elif ending in (".txt", ".json"):
            files[name] = place
        else:
            others[ending or "without an ending"] += 1
    if names and all(files[name].how == RARE for name in names):
        raise ValueError(f"{path} holds {next(iter(names))} and all other images {RARELY}")
    used = list(names)
    if any(place.how == SLICE for place in files.values()):
        used = _one_a_sample(list(names), files, reading.sample_image)
    paths: dict[str, int] = {}
    places = np.full((len(used), 3), np.array(NOWHERE, PLACE))
    for i, name in enumerate(used):
        _, stem, key = keys_of(name)
        beside = [files.get(stem + ending) or files.get(key + ending)
                  for ending in (".txt", ".json")]
        for kind, place in enumerate([files[name], *beside]):
            if place:
                places[i, kind] = (paths.setdefault(place.path, len(paths)), *place[1:])
    left = names.keys() - set(used)
    return used, list(paths), places, others, sorted(left)


def _holds_image(reader: Reader, place: Place) -> bool:
    try:
        return is_image(reader.read(place, 32))
    except (ValueError, OSError):
        return False


def _one_a_sample(names: list[str], files: dict[str, Place], ending: str) -> list[str]:
    """The images of an archive, of each WebDataset sample one: the one that ends in `ending` after
    its first dot, else the first without a second dot, else the first.

    Images of one key are a sample where a file KEY.ENDING without a second dot is among them: names
    that merely hold dots, as those of screenshots do, have none.
    """
    samples: dict[str, list[str]] = {}
    for name in names:
        samples.setdefault(keys_of(name)[2], []).append(name)
    plain = {keys_of(name)[2] for name in files if keys_of(name)[1] == keys_of(name)[2]}
    used = []
    for key, group in samples.items():
        wanted = [name for name in group if ending and name.lower() == f"{key}.{ending}".lower()]
        if wanted:
            used += wanted[:1]
        elif len(group) > 1 and key in plain:
            used.append(min(group, key=lambda name: keys_of(name)[1] != key))  # the first such
        else:
            used += group
    return used


def open_all(paths: Sequence[str], source: str, reading: Reading = PLAIN) -> Images:
    """The images of `source`; where it stands for several shards, their names start with a shard's.

    ValueError: no image in any.
    """
    above = os.path.commonpath([os.path.dirname(os.path.abspath(path)) for path in paths])
    read = functools.partial(_list, reading=reading)
    if len(paths) > 8:  # a shard of 10,000 images takes a core most of a second
        with concurrent.futures.ProcessPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
            listed = list(tqdm(pool.map(read, paths), "listing", len(paths), unit=" shards"))
    else:
        listed = [read(path) for path in paths]
    names, on_disk, places, others, left = [], [], [], Counter(), []
    for path, (found, where, place, other, beside) in zip(paths, listed, strict=True):
        others += other
        prefix = "" if path == source else f"{os.path.relpath(path, above)}/"
        names += [prefix + name for name in found]
        left += [prefix + name for name in beside]
        place["path"][place["path"] >= 0] += len(on_disk)
        on_disk += where
        places.append(place)
    if not names:
        hint = ("; it holds archives: give one, or several as 'FOLDER/{0000..0099}.tar'"
                if ARCHIVES & others.keys() else ": give a folder, zip or tar of images")
        raise ValueError(f"{source} holds no image ({', '.join(ENDINGS)}){hint}")
    if others:
        _say(f"{source}: not used, as these are no images that can be read here: "
             + ", ".join(f"{count:,} {ending}" for ending, count in others.most_common(9))
             + ("" if reading.any_ending else "; --any-ending looks into them"))
    if left:
        _say(f"{source}: not used, as one image of each WebDataset sample is: {len(left):,}, such "
             f"as {left[0]}; --sample-image {keys_of(left[0])[0][len(keys_of(left[0])[2]) + 1:]} "
             "takes those instead")
    order = sorted(range(len(names)), key=names.__getitem__)
    return Images(names, on_disk, np.concatenate(places), reading=reading).subset(order)


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
