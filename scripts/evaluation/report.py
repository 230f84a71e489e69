"""Tables of results in Markdown, and the model card of a trained bundle."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

MEANINGS: dict[str, str] = {
    "psnr_db": "how close copies of unseen images are: 20 dB can be recognised, 25 are good",
    "ssim": "the same by structure, 1 is equal",
    "token_ce": "nats that the GPT needs for a code of an unseen image, less is better",
    "unigram_ce": "what it would need if it knew only how often each code occurs",
    "token_ce_text": "as token_ce, from a caption's embedding instead of the image's",
    "text_gap": "how much worse that is",
    "codebook_usage": "share of the codes that occur in any image",
    "clip_score": "cosine of samples with their texts, by the model's own CLIP",
    "clip_i": "cosine of samples with the images whose embeddings they were made from",
    "retrieval_r1": "how often a sample's own source is nearest to it",
    "frechet_distance": "distance of samples from images, 0 is equal; it depends on features and "
                        "counts",
    "features": "what the distance was measured with",
    "n_real": "unseen images in it",
    "n_generated": "samples in it",
    "independent": "whether its features had no part in the training",
    "seconds_per_image": "one candidate, on this machine",
    "seconds": "of the whole training",
}


def table(titles: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """In Markdown, a line for each row."""
    return "\n".join(f"| {' | '.join(map(str, row))} |"
                     for row in (titles, ["---"] * len(titles), *rows))


def pairs(rows: Mapping[str, object]) -> str:
    """A table of names and values, without titles."""
    return table(["", ""], rows.items())


def write_card(bundle: Path, *, command: str, notes: Sequence[str], data: dict[str, object],
               settings: dict[str, object], scores: dict[str, object],
               plots: dict[str, Image.Image], grids: dict[str, tuple[str, Image.Image]]) -> None:
    """Write README.md and the pictures it shows, in `card/`.

    notes: what a reader should know first, a sentence each.  Of the scores those that MEANINGS
    explains are shown.  `grids`: name -> (what it shows, picture).
    """
    folder = bundle / "card"
    folder.mkdir(exist_ok=True)
    pictures = []
    for name, (meaning, image) in grids.items():
        image.save(folder / f"{name}.png")
        pictures.append(f"{meaning}\n\n![{meaning}](card/{name}.png)")
    for name, image in plots.items():
        image.save(folder / f"{name}.png")
    curves = " ".join(f"![{name}](card/{name}.png)" for name in plots)
    shown = "\n\n".join(pictures)
    where = f"weights/{bundle.name}" if bundle.is_absolute() else bundle
    said = "\n".join(f"* {note[:1].upper()}{note[1:]}." for note in notes)
    explained = table(["score", "value", "what it says"], [
        (name, scores[name], meaning) for name, meaning in MEANINGS.items() if name in scores])
    (bundle / "README.md").write_text(f"""# {bundle.name}

A text-to-image model made with clipgen: VQGAN and GPT learned from images alone, without a caption.

```bash
scripts/generate --weights {where} "what the images should show"
COG_WEIGHTS={where} scripts/serve 5000
```

## Data

{pairs(data)}

## Results

{said}

{explained}

{shown}

## Settings

{pairs(settings)}

Made by

```bash
{command}
```

{curves}

## Limits

It draws what its images show and nothing else. Licence and origin of the images: to be filled in by
whoever publishes this model.
""", encoding="utf-8")


def print_table(titles: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
    """To stdout."""
    print(table(titles, rows))


def print_named(rows: Mapping[str, Mapping[str, Any]]) -> None:
    """The same of rows by name and column; a row lacks what it has no value for."""
    columns = list(dict.fromkeys(key for row in rows.values() for key in row))
    print_table(["", *columns], [[name, *(row.get(key, "") for key in columns)]
                                 for name, row in rows.items()])
