"""The model card of a trained bundle: data, settings, loss curves, a grid, scores."""

from __future__ import annotations

import json
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

COLOURS = ("#1f5fbf", "#c2410c", "#15803d", "#7e22ce")


def curves_of(run: Path, names: tuple[str, ...]) -> dict[str, list[tuple[float, float]]]:
    """(step, value) of entries of a run's log.jsonl; those that never occur are left out."""
    curves: dict[str, list[tuple[float, float]]] = {name: [] for name in names}
    for line in (run / "log.jsonl").read_text(encoding="utf-8").splitlines():
        entry = json.loads(line)
        for name in names:
            if name in entry:
                curves[name].append((entry["step"], entry[name]))
    return {name: points for name, points in curves.items() if points}


def plot(title: str, curves: dict[str, list[tuple[float, float]]]) -> Image.Image:
    """Curves over steps, in one frame from the least value to the largest."""
    width, height, left, top, bottom = 480, 240, 56, 24, 24
    font = ImageFont.load_default(11)
    page = Image.new("RGB", (width, height), "white")
    draw = ImageDraw.Draw(page)
    points = [p for curve in curves.values() for p in curve]
    last = max(x for x, _ in points) or 1
    low, high = min(y for _, y in points), max(y for _, y in points)
    span = high - low or 1.0

    def place(x: float, y: float) -> tuple[float, float]:
        return (left + (width - left - 8) * x / last,
                top + (height - top - bottom) * (high - y) / span)

    draw.rectangle([left, top, width - 8, height - bottom], outline="#999999")
    draw.text((left, 6), title, "black", font)
    draw.text((4, top - 6), f"{high:.3g}", "black", font)
    draw.text((4, height - bottom - 8), f"{low:.3g}", "black", font)
    draw.text((width - 70, height - 18), f"step {last:g}", "black", font)
    for i, (name, curve) in enumerate(curves.items()):
        colour = COLOURS[i % len(COLOURS)]
        places = [place(x, y) for x, y in curve]
        draw.line(places, colour, 2) if len(places) > 1 else draw.point(places, colour)
        draw.text((width - 130, 6 + 14 * i), name, colour, font)
    return page


def table(rows: dict[str, object]) -> str:
    return "\n".join(["| | |", "|---|---|", *(f"| {k} | {v} |" for k, v in rows.items())])


def write_card(bundle: Path, *, command: str, data: dict[str, object], settings: dict[str, object],
               scores: dict[str, object], plots: dict[str, Image.Image],
               grids: dict[str, tuple[str, Image.Image]]) -> None:
    """Write README.md and the pictures it shows, in `card/`; `grids`: name -> (what it shows,
    picture)."""
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
    (bundle / "README.md").write_text(f"""# {bundle.name}

A text-to-image model made with clipgen: VQGAN and GPT learned from images alone, without a caption.

```bash
scripts/generate --weights {bundle} "what the images should show"
COG_WEIGHTS={bundle} scripts/serve 5000
```

## Data

{table(data)}

## Results

{table(scores)}

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
