"""Tables of results in Markdown, and the model card of a trained bundle."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image


def table(rows: dict[str, object]) -> str:
    return "\n".join(["| | |", "|---|---|", *(f"| {k} | {v} |" for k, v in rows.items())])


def write_card(bundle: Path, *, command: str, notes: Sequence[str], data: dict[str, object],
               settings: dict[str, object], scores: dict[str, object], meanings: Mapping[str, str],
               plots: dict[str, Image.Image], grids: dict[str, tuple[str, Image.Image]]) -> None:
    """Write README.md and the pictures it shows, in `card/`.

    notes: what a reader should know first, a sentence each.  `meanings` has a phrase for each
    score.  `grids`: name -> (what it shows, picture).
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
    explained = "\n".join(["| score | value | what it says |", "|---|---|---|", *(
        f"| {name} | {value} | {meanings[name]} |" for name, value in scores.items())])
    (bundle / "README.md").write_text(f"""# {bundle.name}

A text-to-image model made with clipgen: VQGAN and GPT learned from images alone, without a caption.

```bash
scripts/generate --weights {where} "what the images should show"
COG_WEIGHTS={where} scripts/serve 5000
```

## Data

{table(data)}

## Results

{said}

{explained}

{shown}

## Settings

{table(settings)}

Made by

```bash
{command}
```

{curves}

## Limits

It draws what its images show and nothing else. Licence and origin of the images: to be filled in by
whoever publishes this model.
""", encoding="utf-8")


def print_table(titles: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
    """To stdout, a line for each row."""
    for row in (titles, ["---"] * len(titles), *rows):
        print("|", " | ".join(map(str, row)), "|")


def print_named(rows: Mapping[str, Mapping[str, Any]]) -> None:
    """The same of rows by name and column; a row lacks what it has no value for."""
    columns = list(dict.fromkeys(key for row in rows.values() for key in row))
    print_table(["", *columns], [[name, *(row.get(key, "") for key in columns)]
                                 for name, row in rows.items()])
