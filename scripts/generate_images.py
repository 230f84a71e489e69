"""Turns a text into images: the best --num of --candidates drawn, as files in the folder --out.

Prints a line for each image, best first: path, seed, score (the cosine of CLIP's embeddings of
text and image). The same seed gives the same images; image i has the seed --seed + i before
ranking, so `--num 1 --candidates 1 --seed N` makes the image with seed N again.
"""

from __future__ import annotations

import argparse
import fcntl
import os
import re
import signal
import sys
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NoReturn

from scripts.training.cli import Parser, device, number, seed

# torch and clipgen are imported once the arguments are known to be good: they take seconds.

WEIGHTS = Path(__file__).resolve().parent.parent / "weights"
PILLOW_FORMATS = {"png": "PNG", "jpg": "JPEG", "webp": "WEBP"}
OURS = re.compile(r"\.?image-\d+-seed-\d+\.(png|jpg|webp)")


def stop(message: str, status: int) -> NoReturn:
    print(f"clipgen: {message}", file=sys.stderr)
    sys.exit(status)


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    parser = Parser(
        prog="scripts/generate",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    own = "(default: the model's own)"
    add = parser.add_argument
    add("text", help="what the images should show, in quotes")
    add("--num", type=number(int, 1, 4096), default=4, help="images to keep (4)")
    add("--candidates", type=number(int, 1, 4096), default=16,
        help="images to draw; the best --num are kept (16; raised to --num)")
    add("--seed", type=seed, help="whole number (default: a random one)")
    add("--temperature", type=number(float, 0, 4),
        help=f"higher is more varied, 0 the single likeliest {own}")
    add("--top-k", type=number(int, 0, 2**31 - 1),
        help=f"draw from the k likeliest codes, 0 is all {own}")
    add("--top-p", type=number(float, 0, 1),
        help=f"draw from the likeliest codes of this total {own}")
    add("--guidance", type=number(float, 1, 20),
        help=f"how strongly the text steers, 1 is least {own}")
    add("--weights", type=Path, metavar="FOLDER",
        help="the bundle to use (default: weights/coco if it is there, else weights/emoji)")
    add("--device", type=device, help="cpu, cuda or cuda:N (default: cuda if there is one)")
    add("--dtype", choices=("float32", "bfloat16", "float16", "int8"),
        help="precision of the GPT (default: what suits the device); int8 makes a large one faster "
             "on a CPU, as does bfloat16 where it has instructions for it")
    add("--out", type=Path, default=Path("out"), metavar="FOLDER",
        help="images of an earlier run in it are replaced, other files stay (out)")
    add("--format", choices=tuple(PILLOW_FORMATS), default="png", help="of the files (png)")
    args, unknown = parser.parse_known_args(arguments)
    if unknown:
        parser.error(f"{' '.join(unknown)!r} is no flag; put the whole text in quotes")
    if not args.text.strip():
        parser.error("the text is blank: say what the images should show")
    if args.weights is None:
        args.weights = WEIGHTS / ("coco" if (WEIGHTS / "coco").is_dir() else "emoji")
    return args


def generate(args: argparse.Namespace) -> list:
    """The images, best first; warnings about the text are printed, a line each."""
    import torch

    from clipgen import ClipGen, TextTruncated, UnknownWords, is_out_of_memory

    dtype = getattr(torch, args.dtype) if args.dtype else None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for category in (TextTruncated, UnknownWords):
            warnings.simplefilter("always", category)
        warnings.showwarning = lambda message, *_: print(f"clipgen: {message}", file=sys.stderr)
        try:
            model = ClipGen.load(args.weights, device=args.device, dtype=dtype)
            return model.generate(
                args.text,
                num_images=args.num,
                candidates=args.candidates,
                seed=args.seed,
                temperature=args.temperature,
                top_k=args.top_k,
                top_p=args.top_p,
                guidance=args.guidance,
            )
        except ValueError as error:
            stop(str(error), status=2)
        except FloatingPointError as error:
            stop(str(error), status=1)
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
            most = "num" if args.num > args.candidates else "candidates"
            stop(f"out of memory with --{most} {getattr(args, most)}: try a lower number, or "
                 "--guidance 1, which halves the work", status=1)


def write(images: list, folder: Path, suffix: str) -> list[Path]:
    """Puts the images in place of those of an earlier run; a file is there as a whole or not."""
    digits = len(str(len(images) - 1))
    paths = [
        folder / f"image-{index:0{digits}d}-seed-{image.seed}.{suffix}"
        for index, image in enumerate(images)
    ]
    hidden = [path.with_name(f".{path.name}") for path in paths]
    with alone_in(folder):
        try:
            for image, path in zip(images, hidden, strict=True):
                image.image.save(path, format=PILLOW_FORMATS[suffix], quality=95)
            for path, final in zip(hidden, paths, strict=True):
                os.replace(path, final)
        finally:
            for path in hidden:
                path.unlink(missing_ok=True)
        for path in folder.iterdir():
            if path not in paths and OURS.fullmatch(path.name) and path.is_file():
                try:
                    path.unlink()
                except OSError as error:
                    print(f"clipgen: {path}, of an earlier run, stays: {error.strerror}",
                          file=sys.stderr)
    return paths


@contextmanager
def alone_in(folder: Path) -> Iterator[None]:
    """Waits until no other run is writing there."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        with suppress(OSError):  # a file system without locks
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


@contextmanager
def writing_to(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        stop(f"cannot write to --out {folder}: {error.strerror}; name another folder", status=2)


def main(arguments: list[str] | None = None) -> None:
    args = parse_arguments(arguments)
    with writing_to(args.out):  # fails here, not after the images are made
        args.out.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=args.out).close()
    images = generate(args)
    with writing_to(args.out):
        paths = write(images, args.out, args.format)
    for path, image in zip(paths, images, strict=True):
        print(f"{path}  seed {image.seed}  score {image.score:.3f}")


if __name__ == "__main__":
    # Not as an exception: one that is raised while torch is imported may be lost there.
    signal.signal(signal.SIGINT, lambda *_: os._exit(130))
    main()
