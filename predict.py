"""The model as Cog serves it: a text, a picture or both in, image files out.

Cog's build parses this file without running it. Types, ranges and defaults are therefore plain
literals, each description is one string on one line, optional inputs are spelled `Optional[...]`,
and `predict` has no decorator; `python -m scripts.cog_schema` refuses what Cog would not read.
"""
# ruff: noqa: B008, UP045

import inspect
import reprlib
import secrets
import shutil
import tempfile
import time
import warnings
from typing import Any, Optional, get_args

import torch
from cog import BasePredictor, Input, Path

from clipgen import ClipGen, GeneratedImage, is_out_of_memory


class Predictor(BasePredictor):
    def setup(self, weights: Optional[Path] = None) -> None:
        """Load `weights` (Cog passes COG_WEIGHTS), else weights/coco if it exists, else emoji."""
        coco, emoji = Path("weights/coco"), Path("weights/emoji")
        bundle = weights or (coco if coco.is_dir() else emoji)
        print(f"Serving the bundle {bundle}")
        self.model = ClipGen.load(str(bundle))
        self.outputs = tempfile.TemporaryDirectory(prefix="clipgen-")

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
        given = {name: checked(name, value) for name, value in given.items()}
        if given["image"] is None and not given["text"].strip():
            raise ValueError("text must be 1 to 1000 characters and not blank, unless an image is "
                             f"given, got {reprlib.repr(given['text'])}.")
        empty(Path(self.outputs.name))  # Cog deletes no outputs
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
        images = self.generate(num_images=given.pop("num_outputs"), progress=Percent(), **given)
        seconds = time.perf_counter() - start

        paths = []
        for index, image in enumerate(images):
            print(f"output {index}: seed {image.seed}, score {image.score:.2f}")
            paths.append(folder / f"output_{index}_seed_{image.seed}.{suffix}")
            image.save(paths[-1], quality, metadata)
        codes = given["candidates"] * images[0].codes.size
        self.record_metric("seeds", [image.seed for image in images])
        self.record_metric("scores", [round(float(image.score), 4) for image in images])
        self.record_metric("candidates", given["candidates"])
        self.record_metric("codes_per_second", round(codes / seconds, 1))
        return paths

    def generate(self, **inputs: Any) -> list[GeneratedImage]:
        """`ClipGen.generate` with its warnings in the log and one sentence when memory runs out."""
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            try:
                return self.model.generate(**inputs)
            except (MemoryError, RuntimeError) as error:
                if not is_out_of_memory(error):
                    raise
                # Raised below: within this block the error would keep its tensors alive.
            finally:
                for warning in caught:
                    print(f"Warning: {warning.message}")
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
