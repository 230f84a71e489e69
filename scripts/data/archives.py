"""Files in a folder, a zip or a tar, found once and read where they lie; nothing is unpacked."""

from __future__ import annotations

import os
import stat
import sys
import tarfile
import zipfile
import zlib
from collections.abc import Iterator
from typing import IO, NamedTuple

MOST_BYTES = 2**30  # of one file
SLACK = 1024  # compressed bytes that may come before the first ones of the content
MOST_OPEN = 128  # archives at once, well below the usual limit of 1,024 files
MOST_FOLDERS = 100  # of one in another
# How a place is read; from 0 on it is a zip's compression method: 0 stored, 8 deflated.
RARE, WHOLE, SLICE = -3, -2, -1  # a zip's member that cannot be read, a file, a part of a tar
RARELY = "encrypted or compressed by a rare method: unpack the zip and give the folder"


class Place(NamedTuple):
    """Where the content of a file lies."""

    path: str  # on disk: the file itself (WHOLE) or the archive it is in
    offset: int  # of the content in a tar, of the member's header in a zip
    size: int  # bytes on disk
    how: int


class Reader:
    """Reads places; picklable, and safe to share with threads and forked workers.

    Archives are opened where first used and read by os.pread, which moves no position that others
    might rely on.
    """

    def __init__(self) -> None:
        self._open: dict[str, IO[bytes]] = {}

    def __getstate__(self) -> dict:
        return {"_open": {}}

    def read(self, place: Place, most: int | None = None) -> bytes:
        """The content; with `most` its first bytes, at most so many.

        OSError, or ValueError with the reason: damaged, cut short, too large.
        """
        if place.size > MOST_BYTES and most is None:
            raise ValueError(f"{place.size:,} bytes are too many")
        if place.how == RARE:
            raise ValueError(RARELY)
        if place.how == WHOLE:
            with open(place.path, "rb") as opened:
                return opened.read(-1 if most is None else most)
        if place.path not in self._open:
            if len(self._open) >= MOST_OPEN:
                self._open.pop(next(iter(self._open)))
            self._open[place.path] = open(place.path, "rb", buffering=0)
        file = self._open[place.path]
        size = place.size if most is None else min(place.size, most + SLACK)
        if place.how == SLICE:
            return read_slice(file, place.offset, size)[:most]
        header = read_slice(file, place.offset, 30)
        if not header.startswith(b"PK\x03\x04"):
            raise ValueError("the zip is damaged")
        fields = sum(int.from_bytes(header[at:at + 2], "little") for at in (26, 28))  # name, extra
        data = read_slice(file, place.offset + 30 + fields, size)
        try:
            return (zlib.decompressobj(-15).decompress(data, most or MOST_BYTES) if place.how
                    else data[:most])
        except zlib.error:
            raise ValueError("the zip is damaged") from None


def read_slice(file: IO[bytes], offset: int, size: int) -> bytes:
    data = os.pread(file.fileno(), size, offset)
    if len(data) < size:
        raise ValueError("the archive is cut short")
    return data


def list_files(path: str) -> Iterator[tuple[str, Place]]:
    """(name, place) of every file of a folder at any depth, a zip or a tar.

    Names are relative; they never become paths on disk, so those in an archive may be anything.
    Hidden files, links and devices in archives, and what macOS adds to zips are left out.  Of two
    members of one name both come, in the archive's order.  ValueError, one sentence: `path` is
    missing, unreadable or none of these.
    """
    if os.path.isdir(path):
        return _list_folder(path, "", set(), 0)
    try:
        with open(path, "rb") as file:
            start = file.read(6)
    except FileNotFoundError:
        raise ValueError(f"{path} does not exist: give a folder, zip or tar of images") from None
    except OSError as error:
        raise ValueError(f"{path} cannot be read ({error.strerror}): check its permissions"
                         ) from None
    for magic, tool in ((b"\x1f\x8b", "gunzip"), (b"BZh", "bunzip2"), (b"\xfd7zXZ", "unxz"),
                        (b"\x28\xb5\x2f\xfd", "unzstd")):
        if start.startswith(magic):
            raise ValueError(f"{path} is compressed, so no image in it can be read without all "
                             f"before it: run `{tool} --keep {path}` once and give the tar "
                             "(images hardly shrink anyway)")
    try:
        tarfile.open(path, "r:").close()  # before zip: a tar may end with a zip
        return _list_tar(path)
    except tarfile.TarError:
        if zipfile.is_zipfile(path):
            return _list_zip(path)
    raise ValueError(f"{path} is no folder, zip or tar: give one that holds images")


def clean(name: str) -> str:
    """A name in an archive as it would be in a folder."""
    return "/".join(part for part in name.split("/") if part not in ("", "."))


def _hidden(name: str) -> bool:
    return any(part == "__MACOSX" or (part.startswith(".") and part != "..")
               for part in name.split("/"))


def _list_folder(root: str, prefix: str, seen: set[tuple[int, int]], depth: int
                 ) -> Iterator[tuple[str, Place]]:
    """Links are followed, but no folder is listed twice."""
    if depth > MOST_FOLDERS:
        raise ValueError(f"the folder {root[:60]}... lies {depth} folders deep, {MOST_FOLDERS} are "
                         "allowed: move its images up")
    try:
        status = os.stat(root)
        if (status.st_dev, status.st_ino) in seen:
            return
        seen.add((status.st_dev, status.st_ino))
        entries = sorted(os.scandir(root), key=lambda entry: (entry.is_symlink(), entry.name))
    except OSError as error:
        raise ValueError(f"the folder {root} cannot be read ({error.strerror}): check its "
                         "permissions") from None
    for entry in entries:
        if _hidden(entry.name):
            continue
        try:
            status = entry.stat()
        except OSError:  # a dangling link: a file that cannot be read
            yield prefix + entry.name, Place(entry.path, 0, 0, WHOLE)
            continue
        if stat.S_ISREG(status.st_mode):
            yield prefix + entry.name, Place(entry.path, 0, status.st_size, WHOLE)
        elif stat.S_ISDIR(status.st_mode):
            yield from _list_folder(entry.path, f"{prefix}{entry.name}/", seen,
                                    depth + 1)


def _list_zip(path: str) -> Iterator[tuple[str, Place]]:
    try:
        with zipfile.ZipFile(path) as archive:
            members = archive.infolist()
    except (zipfile.BadZipFile, ValueError, NotImplementedError) as error:
        raise ValueError(f"the zip {path} cannot be read ({error}): make it again") from None
    for member in members:
        given = member.filename.replace("\\", "/")  # as some programs for Windows write it
        name = clean(given)
        if given.endswith("/") or _hidden(name) or stat.S_ISLNK(member.external_attr >> 16):
            continue
        rare = member.flag_bits & 1 or member.compress_type not in (zipfile.ZIP_STORED,
                                                                    zipfile.ZIP_DEFLATED)
        yield name, Place(path, member.header_offset, member.compress_size,
                          RARE if rare else member.compress_type)


def _list_tar(path: str) -> Iterator[tuple[str, Place]]:
    """A tar that is cut short is used as far as it goes, with a line on stderr."""
    count = 0
    with tarfile.open(path, "r:") as archive:
        try:
            for member in archive:
                archive.members = []  # tarfile would keep them all
                name = clean(member.name)
                if member.isreg() and not member.issparse() and not _hidden(name):
                    yield name, Place(path, member.offset_data, member.size, SLICE)
                    count += 1
            archive.fileobj.seek(archive.offset)  # tarfile takes a damaged header for the end
            damaged = any(archive.fileobj.read(512))
        except (tarfile.TarError, OSError):
            damaged = True
    if damaged:
        print(f"{path} is damaged or cut short: only its first {count} files are used",
              file=sys.stderr)
