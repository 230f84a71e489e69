"""The model as Cog serves it: a text, a picture or both in, image files out.

Cog's build parses this file without running it. Types, ranges and defaults are therefore plain
literals, each description is one string on one line, optional inputs are spelled `Optional[...]`,
and `predict` has no decorator; `python -m scripts.cog_schema` refuses what Cog would not read.
"""
# ruff: noqa: B008, UP045

import contextlib
import inspect
import os
import reprlib
import secrets
import shutil
import tempfile
import time
import warnings
from collections.abc import Iterator
from typing import Any, Optional, get_args

import clipgen.threads  # noqa: F401  # before torch

# isort: split
import torch
from cog import BasePredictor, Input, Path

from clipgen import AllAlike, ClipGen, GeneratedImage, is_out_of_memory


class Predictor(BasePredictor):
    def setup(self, weights: Optional[Path] = None) -> None:
        """Load `weights` (Cog passes COG_WEIGHTS), else weights/coco if it exists, else emoji."""
        coco, emoji = Path("weights/coco"), Path("weights/emoji")
        bundle = weights or (coco if coco.is_dir() else emoji)
        print(f"Serving the bundle {printable(str(bundle))}")
        self.model = ClipGen.load(str(bundle))
        self.outputs = tempfile.TemporaryDirectory(prefix="clipgen-")
        # Cog fetches pictures to temporary files, and leaves one whose fetch failed.
        tempfile.template = f"{self.outputs.name.rpartition('/')[2]}-"
        self.began = time.time()

    def predict(
        self,
        text: str = Input(
            description="What the images should show. Empty only where an image is given.",
            max_length=1000
        ),
        num_outputs: int = Input(
            description="How many images to return, best first.", ge=1, le=8, default=4
        ),
        candidates: int = Input(
            description="How many images to draw; the best ones are returned. More is slower.",
            ge=1, le=64, default=16
        ),
        seed: Optional[int] = Input(
            description="The same seed gives the same images. Omitted: a random one.",
            ge=0, le=2147483647, default=None
        ),
        temperature: Optional[float] = Input(
            description="Higher is more varied, 0 the single likeliest. Omitted: the model's own.",
            ge=0, le=4, default=None
        ),
        top_k: Optional[int] = Input(
            description="Draw from the k likeliest codes, 0 is all. Omitted: the model's own.",
            ge=0, le=16384, default=None
        ),
        top_p: Optional[float] = Input(
            description="Draw from the likeliest codes of this total. Omitted: the model's own.",
            ge=0, le=1, default=None
        ),
        guidance: Optional[float] = Input(
            description="How strongly the text steers, 1 is least. Omitted: the model's own.",
            ge=1, le=20, default=None
        ),
        output_format: str = Input(
            description="File format of the images.", choices=["webp", "jpg", "png"], default="webp"
        ),
        output_quality: int = Input(
            description="Quality of webp and jpg, 100 is best. No effect on png.",
            ge=0, le=100, default=80
        ),
        image: Optional[Path] = Input(
            description="A picture that the images should resemble.", default=None
        ),
        image_weight: float = Input(
            description="With text and image: 0 is the text alone, 1 the image alone.",
            ge=0, le=1, default=0.5
        ),
        negative_text: Optional[str] = Input(
            description="What the images should not show. Needs guidance above 1.",
            max_length=1000, default=None
        ),
        init_image: Optional[Path] = Input(
            description="A picture of which a part stays. Needs mask or keep.", default=None
        ),
        mask: Optional[Path] = Input(
            description="A picture, white where init_image is drawn anew.", default=None
        ),
        keep: Optional[float] = Input(
            description="The share of init_image that stays, from the top.",
            ge=0, le=1, default=None
        ),
        metadata: bool = Input(
            description="Write into each file how it was made.", default=True
        ),
    ) -> list[Path]:
        """Image files, best first. A bad value or too little memory raises one clear sentence."""
        given = {
            "text": text, "num_outputs": num_outputs, "candidates": candidates, "seed": seed,
            "temperature": temperature, "top_k": top_k, "top_p": top_p, "guidance": guidance,
            "output_format": output_format, "output_quality": output_quality, "image": image,
            "image_weight": image_weight, "negative_text": negative_text,
            "init_image": init_image, "mask": mask, "keep": keep, "metadata": metadata}
        try:
            return self.draw({name: checked(name, value) for name, value in given.items()})
        except Exception as error:
            raise one_line(error) from None

    def draw(self, given: dict[str, Any]) -> list[Path]:
        """The files of a prediction whose inputs were checked."""
        if given["image"] is None and not given["text"].strip():
            raise ValueError("text must be 1 to 1000 characters and not blank, unless an image is "
                             f"given, got {reprlib.repr(given['text'])}.")
        with writing(self.outputs.name):
            self.clean([given[name] for name in ("image", "init_image", "mask")])
            folder = Path(tempfile.mkdtemp(dir=self.outputs.name))

        if given["candidates"] < given["num_outputs"]:
            given["candidates"] = given["num_outputs"]
            print(f"candidates raised to {given['candidates']}, one for each output")
        if given["seed"] is None:
            given["seed"] = secrets.randbelow(2**31)
        print(f"Using seed: {given['seed']}")

        suffix, quality = given.pop("output_format"), given.pop("output_quality")
        metadata = given.pop("metadata")
        start = time.perf_counter()
        images, alike = self.generate(num_images=given.pop("num_outputs"), progress=Percent(),
                                      **given)
        seconds = time.perf_counter() - start

        paths = []
        for index, image in enumerate(images):
            print(f"output {index}: seed {image.seed}, score {image.score:.3f}")
            paths.append(folder / f"output_{index}_seed_{image.seed}.{suffix}")
            with writing(self.outputs.name):
                image.save(paths[-1], quality, metadata)
        candidates = 1 if alike else given["candidates"]
        codes = candidates * images[0].codes.size
        self.record_metric("seeds", [image.seed for image in images])
        self.record_metric("scores", [round(float(image.score), 4) for image in images])
        self.record_metric("candidates", candidates)
        self.record_metric("codes_per_second", round(codes / seconds, 1))
        return paths

    def clean(self, pictures: list[Optional[Path]]) -> None:
        """Remove what earlier predictions left on the disk, which Cog does not."""
        empty(Path(self.outputs.name))
        for path in Path(tempfile.gettempdir()).glob(f"{tempfile.template}*"):
            if path.is_file() and path not in pictures:
                path.unlink(missing_ok=True)
        remove_folders(FOLDERS, self.began)
        self.began = time.time()

    def generate(self, **inputs: Any) -> tuple[list[GeneratedImage], bool]:
        """`ClipGen.generate` with its warnings in the log and one sentence when memory runs out.

        Also whether a single image was drawn, as all would have been alike.
        """
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            try:
                images = self.model.generate(**inputs)
                return images, any(warning.category is AllAlike for warning in caught)
            except (MemoryError, RuntimeError) as error:
                if not is_out_of_memory(error):
                    raise
                # Raised below: within this block the error would keep its tensors alive.
            finally:
                for warning in caught:
                    print(f"Warning: {printable(str(warning.message))}")
        torch.cuda.empty_cache()
        candidates = inputs["candidates"]
        raise RuntimeError(f"Out of memory with candidates {candidates}: try a lower number, or "
                           "guidance 1, which halves the work.")


class Percent:
    """Prints a line of tqdm's shape, from which Replicate's page makes a bar, once a second."""

    def __init__(self) -> None:
        self.start = self.last = time.perf_counter()

    def __call__(self, done: int, total: int) -> None:
        now = time.perf_counter()
        if now - self.last < 1:
            return
        self.last, seconds = now, now - self.start
        bar, left = "█" * (10 * done // total), seconds * (total - done) / done
        spent, left = (f"{int(t) // 60:02d}:{int(t) % 60:02d}" for t in (seconds, left))
        print(f"{100 * done // total:3d}%|{bar:10}| {done}/{total} [{spent}<{left}, "
              f"{done / seconds:.1f}code/s]", flush=True)


def printable(text: str, most: int = 1000) -> str:
    """`text` on one line: control characters escaped, cut after `most` characters."""
    words = " ".join(text.split())
    words = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in words)
    return words if len(words) <= most else f"{words[:most]} …"


def one_line(error: Exception) -> Exception:
    """The error that Cog shows as `ValueError: ...` or `RuntimeError: ...`, on one line."""
    words = printable(str(error)) or "no words"
    if isinstance(error, ValueError):
        return ValueError(words)
    if type(error) is not RuntimeError:
        words = f"{type(error).__name__}: {words}"
    return RuntimeError(words)


@contextlib.contextmanager
def writing(folder: str) -> Iterator[None]:
    """What cannot be written names the folder, which the system does not for a full disk."""
    try:
        yield
    except OSError as error:
        raise RuntimeError(f"The images cannot be written to {folder}: {error.strerror or error}. "
                           "Free space there, or set TMPDIR to a folder that has some.") from None


def empty(folder: Path) -> None:
    """Leave an empty folder there, also where it is gone or something else stands in its place."""
    if folder.is_symlink() or folder.is_file():  # a link is removed, not followed
        folder.unlink()
    folder.mkdir(parents=True, exist_ok=True)
    for previous in folder.iterdir():
        if previous.is_dir() and not previous.is_symlink():
            shutil.rmtree(previous)
        else:
            previous.unlink()


FOLDERS = Path("/tmp/coglet/predictions")  # Cog's, wherever TMPDIR is: three a prediction
WORKER = b"coglet.server._run_worker"  # in the command line of Cog's workers
DAY = 24 * 60 * 60


def remove_folders(parent: Path, before: float) -> None:
    """Remove the empty folders of predictions that began before that time, all of them ended.

    Other Cog servers of this machine use the same place: beside one, a day before.  Of an id that a
    client sends again the folders are old while they are in use, which does no harm: this server
    has read them by now, and it writes its images elsewhere.
    """
    try:
        folders = [] if parent.is_symlink() else list(parent.iterdir())
    except OSError:  # not there, or another user's
        return
    if folders and other_workers():
        before -= DAY
    for folder in folders:
        with contextlib.suppress(OSError):  # not empty, another user's, gone already
            if not folder.is_symlink() and folder.stat().st_mtime < before:
                for path, _, _ in os.walk(folder, topdown=False):
                    os.rmdir(path)


def other_workers() -> bool:
    """Whether workers of other Cog servers run on this machine, as far as Linux tells."""
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):  # ended meanwhile
            if int(path.parent.name) != os.getpid() and WORKER in path.read_bytes():
                return True
    return False


INPUTS = dict(list(inspect.signature(Predictor.predict).parameters.items())[1:])  # without self


def checked(name: str, value: Any) -> Any:
    """`value` in the type of the input `name`, or a ValueError of one sentence.

    Cog checks only where its schema file is in place, and even then lets 2.0 pass for an int.
    """
    field = INPUTS[name].default
    kind, *optional = get_args(INPUTS[name].annotation) or [INPUTS[name].annotation]
    if value is None and optional:
        return None
    if field.choices:
        fits, wanted = value in field.choices, f"one of {', '.join(field.choices)}"
    elif kind is str:
        fits = isinstance(value, str) and len(value) <= field.max_length
        wanted = f"a text of at most {field.max_length} characters"
    elif kind is Path:  # a plain string would be a file of the server's own
        fits, wanted = isinstance(value, Path), "a file, or a URL that begins with data: or http"
    elif kind is bool:
        fits, wanted = isinstance(value, bool), "true or false"
    else:
        fits = type(value) in (int, float) and field.ge <= value <= field.le
        fits = fits and kind(value) == value
        wanted = f"a {'whole ' * (kind is int)}number from {field.ge} to {field.le}"
    if not fits:
        raise ValueError(f"{name} must be {wanted}, got {reprlib.repr(value)}.")
    return kind(value)
