"""Turns a text into images: the best --num of --candidates drawn, as new files in the folder --out.

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
FORMATS = ("png", "jpg", "webp")
LONGEST = 60  # characters of the text in a file's name


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
        help="images are added to what is in it (out)")
    add("--format", choices=FORMATS, default="png", help="of the files (png)")
    add("--force", action="store_true", help="replace files of the same name; else new ones get a "
        "number behind theirs")
    add("--no-metadata", action="store_true", help="do not write into a file how it was made")
    add("--image", type=Path, metavar="FILE", help="what the images should resemble; the text may "
        "then be blank")
    add("--image-weight", type=number(float, 0, 1), default=0.5,
        help="of --image beside the text: 0 is the text alone, 1 the image alone (0.5)")
    add("--negative", metavar="TEXT", help="what to steer away from; needs --guidance above 1")
    add("--init", type=Path, metavar="FILE", help="a picture of which a part stays; with --mask or "
        "--keep")
    add("--mask", type=Path, metavar="FILE", help="white where --init is drawn anew")
    add("--keep", type=number(float, 0, 1), help="the share of --init's rows that stays, from the "
        "top")
    args, unknown = parser.parse_known_args(arguments)
    if unknown:
        parser.error(f"{' '.join(unknown)!r} is no flag; put the whole text in quotes")
    if not args.text.strip() and not args.image:
        parser.error("the text is blank: say what the images should show, or give --image")
    if args.weights is None:
        args.weights = WEIGHTS / ("coco" if (WEIGHTS / "coco").is_dir() else "emoji")
    return args


def generate(args: argparse.Namespace) -> list:
    """The images, best first; warnings about the text are printed, a line each."""
    import torch

    from clipgen import ClipGen, NothingToDraw, TextTruncated, UnknownWords, is_out_of_memory

    dtype = getattr(torch, args.dtype) if args.dtype else None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for category in (TextTruncated, UnknownWords, NothingToDraw):
            warnings.simplefilter("always", category)
        warnings.showwarning = lambda message, *_: print(f"clipgen: {message}", file=sys.stderr)
        if sys.stderr.isatty():
            print(f"clipgen: loading {args.weights}", file=sys.stderr)
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
                image=args.image,
                image_weight=args.image_weight,
                negative_text=args.negative,
                init_image=args.init,
                mask=args.mask,
                keep=args.keep,
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


def write(images: list, args: argparse.Namespace) -> list[Path]:
    """Adds the images to the folder, named by text and seed; a file is there as a whole or not.

    A name that is taken gets a number behind it, unless --force replaces the file.
    """
    folder, hidden = args.out, []
    with alone_in(folder):
        taken = set() if args.force else {path.name for path in folder.iterdir()}
        paths = []
        for image in images:
            paths.append(folder / free_name(args.text, image.seed, args.format, taken))
            taken.add(paths[-1].name)
        try:
            for image, path in zip(images, paths, strict=True):
                hidden.append(path.with_name(f".{path.name}"))
                image.save(hidden[-1], metadata=not args.no_metadata)
            for path, final in zip(hidden, paths, strict=True):
                os.replace(path, final)
        finally:
            for path in hidden:
                path.unlink(missing_ok=True)
    return paths


def free_name(text: str, seed: int, suffix: str, taken: set[str]) -> str:
    """As in a-red-apple-seed-7.png, or a-red-apple-seed-7-2.png where that is taken."""
    words = re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")[:LONGEST].rstrip("-") or "image"
    name, number = f"{words}-seed-{seed}", 1
    while f"{name}{f'-{number}' if number > 1 else ''}.{suffix}" in taken:
        number += 1
    return f"{name}{f'-{number}' if number > 1 else ''}.{suffix}"


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
        paths = write(images, args)
    for path, image in zip(paths, images, strict=True):
        print(f"{path}  seed {image.seed}  score {image.score:.3f}")


if __name__ == "__main__":
    # Not as an exception: one that is raised while torch is imported may be lost there.
    signal.signal(signal.SIGINT, lambda *_: os._exit(130))
    main()
