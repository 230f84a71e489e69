"""Turns texts into images: of each text the best --num of --candidates drawn, as new files in the
folder --out.

Prints a line for each image, best first: path, seed, score (the cosine of CLIP's embeddings of
text and image). The same seed gives the same images; image i has the seed --seed + i before
ranking, so `--num 1 --candidates 1 --seed N` makes the image with seed N again. So does
`--again FILE`, from what is written in the image's file.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import clipgen.threads  # noqa: F401  # before torch
from clipgen.again import Again
from clipgen.arguments import Parser, device, number, seed
from clipgen.default_bundle import default_bundle
from clipgen.folder import Folder, named_by
from clipgen.progress import Progress
from clipgen.recipe import VERSION
from clipgen.sheet import sheet
from clipgen.texts import check, gather

# torch, and all that needs it, is imported once the arguments are known to be good: it takes
# seconds.
if TYPE_CHECKING:
    from clipgen.pipeline import ClipGen, GeneratedImage

FORMATS = {"png": "png", "jpg": "jpg", "jpeg": "jpg", "webp": "webp"}  # by a file's ending
DASHES = "-\u2010\u2011\u2012\u2013\u2014\u2212"  # what editors make of a hyphen
MOST_IN_A_GRID = 500
# What --again takes from the file: names of arguments.
RECIPE = ("text", "texts", "num", "candidates", "seed", "temperature", "top_k", "top_p", "guidance",
          "dtype", "image_weight", "negative", "keep")
DEFAULTS = {"num": 4, "candidates": 16, "image_weight": 0.5}


def make_parser() -> Parser:
    quoted = "put the text in quotes, without a flag before it"
    parser = Parser(
        prog="clipgen",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.instead = {"prompt": quoted, "text": quoted}
    own = "(default: the model's own)"
    add = parser.add_argument
    add("text", nargs="*", metavar="TEXT", help="what the images should show, in quotes; several "
        "texts are drawn one after the other, `-` reads them from standard input, one a line")
    add("--texts", action="append", default=[], metavar="FILE",
        help="more texts, one a line, blank lines skipped; `-` is standard input")
    add("--num", type=number(int, 1, 4096), help="images to keep of each text (4)")
    add("--candidates", type=number(int, 1, 4096),
        help="images to draw of each text; the best --num are kept (16; raised to --num)")
    add("--seed", type=seed, help="whole number, the same for each text (default: random ones)")
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
    add("--device", type=device, help="cpu, cuda or cuda:N (default: cuda if there is one; with "
        "--again what the image was made on)")
    add("--dtype", choices=("float32", "bfloat16", "float16", "int8"),
        help="precision of the GPT (default: what suits the device); int8 makes a large one faster "
             "on a CPU, as does bfloat16 where it has instructions for it")
    add("--out", type=Path, default=Path("out"), metavar="FOLDER",
        help="images are added to what is in it (out)")
    add("--format", choices=tuple(dict.fromkeys(FORMATS.values())),
        help="of the files (png; with --again that of its file)")
    add("--force", action="store_true", help="replace files of the same name; else new ones get a "
        "number behind theirs")
    add("--grid", action="store_true", help="write one sheet of all images of this call too, "
        "grid.png, each with its seed and text")
    add("--no-metadata", action="store_true", help="do not write into a file how it was made")
    add("--again", type=Path, metavar="FILE", help="make the image in a file again, as the file "
        "says that it was made; of pictures it keeps a sha256 alone: give those as well")
    add("--image", type=Path, metavar="FILE", help="what the images should resemble; the text may "
        "then be left out")
    add("--image-weight", type=number(float, 0, 1),
        help="of --image beside the text: 0 is the text alone, 1 the image alone (0.5)")
    add("--negative", metavar="TEXT", help="what to steer away from; needs --guidance above 1")
    add("--init", type=Path, metavar="FILE", help="a picture of which a part stays; with --mask or "
        "--keep")
    add("--mask", type=Path, metavar="FILE", help="white where --init is drawn anew")
    add("--keep", type=number(float, 0, 1), help="the share of --init's rows that stays, from the "
        "top")
    add("--version", action="version", version=f"clipgen {VERSION}")
    return parser


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = make_parser()
    given = sys.argv[1:] if arguments is None else arguments
    end = given.index("--") if "--" in given else len(given)  # what is behind it is all text
    args, unknown = parser.parse_known_intermixed_args(given[:end])
    if unknown:
        parser.refuse(unknown[0])
    for text in args.text:
        name = text.lstrip(DASHES)
        if text[:1] in set(DASHES[1:]) and name.partition("=")[0] in parser.flags():
            parser.error(f"{text!r} begins with a long dash: write --{name}")
    args.text += given[end + 1:]
    if args.again:
        _check_again(parser, args)
    else:
        _complete(parser, args)
    return args


def _check_again(parser: Parser, args: argparse.Namespace) -> None:
    """Refuse by name what --again takes from the file."""
    for name in RECIPE:
        if getattr(args, name) not in (None, []):
            said = "a text" if name == "text" else f"--{name.replace('_', '-')}"
            parser.error(f"--again takes everything from {args.again}: leave {said} out")
    if args.force:
        parser.error("--again replaces nothing: leave --force out")
    args.format = args.format or FORMATS.get(args.again.suffix[1:].lower(), "png")


def _complete(parser: Parser, args: argparse.Namespace) -> None:
    """Read the texts and fill in the defaults."""
    if not args.text and not args.texts:
        if not args.image:
            parser.error("say what the images should show, in quotes, or give --texts, --image or "
                         "--again")
        args.text = [""]
    source = getattr(sys.stdin, "buffer", None)
    if "-" in args.text + args.texts and source and sys.stdin.isatty():
        tell("type the texts, one a line; Ctrl-D ends them")
    try:
        args.text = gather(args.text, args.texts, source)
        check(args.text, blank=args.image is not None)
        check([args.negative or ""], blank=True, name="negative text")
    except ValueError as error:
        stop(error, status=2)
    for name, value in DEFAULTS.items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    args.format = args.format or "png"
    if args.grid and len(args.text) * args.num > MOST_IN_A_GRID:
        parser.error(f"--grid of {len(args.text) * args.num} images is too large, it holds "
                     f"{MOST_IN_A_GRID}: lower --num, or leave it out")


def tell(message: object) -> None:
    print(f"clipgen: {message}", file=sys.stderr)


def stop(message: object, status: int) -> NoReturn:
    tell(message)
    sys.exit(status)


def load(args: argparse.Namespace, again: Again | None) -> ClipGen:
    weights = args.weights or default_bundle()
    if sys.stderr.isatty():
        tell(f"loading {weights}")
    import torch

    from clipgen.device import find_device
    from clipgen.pipeline import ClipGen

    name, dtype = args.device, args.dtype
    if again:
        kind = again.recipe["device"]
        if name is None and (kind == "cpu" or kind == "cuda" and torch.cuda.is_available()):
            name = kind
        dtype = again.recipe["dtype"] if find_device(name).type == kind else None
    return ClipGen.load(weights, name, getattr(torch, dtype) if dtype else None)


def warn_of(model: ClipGen, texts: list[str], negative: str | None) -> None:
    """Say what the model makes nothing of, of all texts before anything is drawn."""
    asked = [("" if len(texts) == 1 else f"text {i} of {len(texts)}: ", text)
             for i, text in enumerate(texts, 1)]
    for which, text in [*asked, ("negative text: ", negative or "")]:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            model.warn_of(text)
        for warning in caught:
            tell(f"{which}{warning.message}")


def settings_of(args: argparse.Namespace) -> dict[str, Any]:
    """What `ClipGen.generate` takes beside text and pictures."""
    return {"num_images": args.num, "candidates": args.candidates, "seed": args.seed,
            "temperature": args.temperature, "top_k": args.top_k, "top_p": args.top_p,
            "guidance": args.guidance, "image_weight": args.image_weight,
            "negative_text": args.negative, "keep": args.keep}


@contextmanager
def drawing(progress: Progress) -> Iterator[None]:
    """Warnings as lines, each once; the line of progress goes away at the end."""
    from clipgen.pipeline import NothingToDraw

    said = set()

    def show(message: Warning | str, *_: object) -> None:
        if str(message) not in said:
            progress.clear()
            tell(message)
        said.add(str(message))

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        warnings.simplefilter("always", NothingToDraw)
        warnings.showwarning = show
        try:
            yield
        finally:
            progress.clear()


def add_images(folder: Folder, text: str, images: list[GeneratedImage],
               args: argparse.Namespace) -> None:
    """Files of one text, and their lines."""
    with writing_to(folder):
        paths = folder.add([(named_by(text, image.seed), args.format,
                             partial(image.save, metadata=not args.no_metadata))
                            for image in images])
    for path, image in zip(paths, images, strict=True):
        # At once: Ctrl-C in a later text must not lose the line.
        print(f"{path}  seed {image.seed}  score {image.score:.3f}", flush=True)


def add_grid(folder: Folder, made: list[tuple[str, GeneratedImage]], columns: int) -> None:
    page = sheet([(f"seed {image.seed}: {text}" if text.strip() else f"seed {image.seed}",
                   image.image) for text, image in made],
                 columns=columns if 1 < columns <= 8 else 8)
    with writing_to(folder):
        path, = folder.add([("grid", "png", page.save)])
    print(f"{path}  {len(made)} images", flush=True)


@contextmanager
def writing_to(folder: Folder) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        stop(f"cannot write to --out {folder.path}: {error.strerror}; name another folder",
             status=2)


@contextmanager
def in_one_sentence(too_many: Callable[[], str]) -> Iterator[None]:
    """What goes wrong ends the command: 2 for what the user gave, 1 for what the machine lacks.

    too_many: which flag to lower where memory runs out.
    """
    try:
        yield
    except ValueError as error:
        stop(error, status=2)
    except FloatingPointError as error:
        stop(error, status=1)
    except (MemoryError, RuntimeError) as error:
        from clipgen.device import is_out_of_memory

        if not is_out_of_memory(error):
            raise
        stop(f"out of memory with {too_many()}: try a lower number, or --guidance 1, which halves "
             "the work", status=1)


def main(arguments: list[str] | None = None) -> None:
    args = parse_arguments(arguments)
    pictures = {"image": args.image, "init_image": args.init, "mask": args.mask}
    again = None

    def too_many() -> str:
        most = "num" if args.num > args.candidates else "candidates"
        return f"--{most} {getattr(args, most)}"

    with in_one_sentence(too_many):
        if args.again:
            again = Again(args.again, pictures)
            args.text, args.num, args.candidates = [again.recipe["text"]], 1, 1
        folder = Folder(args.out, args.force)
        with writing_to(folder):  # fails here, not after the images are made
            folder.prepare()
        with warnings.catch_warnings(action="ignore"):
            model = load(args, again)
        if signal.getsignal(signal.SIGINT) is leave:  # from here on files may be half written
            signal.signal(signal.SIGINT, signal.default_int_handler)
        if again:
            here = {"bundle": model.bundle.fingerprint, "version": VERSION,
                    "device": model.clip.device.type}
            for sentence in again.differences(here):
                tell(sentence)
            settings = again.settings()
        else:
            settings = settings_of(args)
        warn_of(model, args.text, settings.get("negative_text"))
        draw(model, folder, args, settings | pictures, again)


def draw(model: ClipGen, folder: Folder, args: argparse.Namespace, settings: dict[str, Any],
         again: Again | None) -> None:
    """Images of all texts, a text's files as soon as they are made."""
    made, count = [], len(args.text)
    progress = Progress(sys.stderr)
    with drawing(progress):
        for i, text in enumerate(args.text):
            which = "drawing" if count == 1 else f"text {i + 1} of {count}"

            def report(done: int, total: int, i: int = i, which: str = which) -> None:
                progress.update((i + done / total) / count, which)

            images = model.generate(text, progress=report, **settings)
            if again:
                again.check_pictures(images[0].recipe)
            progress.clear()
            add_images(folder, text, images, args)
            made += [(text, image) for image in images] if args.grid else []
        if args.grid:
            add_grid(folder, made, args.num)


def leave(*_: object) -> NoReturn:
    """Ctrl-C while torch is imported or a bundle loaded, where an exception may be lost."""
    os._exit(130)


def run() -> None:
    """The command as a process."""
    signal.signal(signal.SIGINT, leave)
    sys.stdout.reconfigure(errors="surrogateescape")  # folders may have names that are no text
    try:
        main()
    except KeyboardInterrupt:
        os._exit(130)
    except BrokenPipeError:  # nobody reads on, as after `| head -1`
        os._exit(128 + signal.SIGPIPE)
