"""Train the default bundle, weights/emoji: all its parts, from drawn scenes, in one command.

    python -m scripts.emoji.train [--preset cpu|gpu|micro] [--out weights/emoji] [--minutes 9]
        [--training 12]

Each part is what a command of its own does (train_clip, train_text, train_vqgan, encode_images,
train_gpt, make_bundle); its settings are printed.  Stop it at any moment, or after so many
`--minutes`: the same command goes on from there.  The last line of stdout is JSON, the seconds of
each part.  It needs the emoji font (see scripts.emoji.scenes), then a judge of the same world:
python -m scripts.emoji.judge --train --objects N.

preset cpu: 128 x 128 pixels, 16 x 16 codes, the first 64 objects of the world, on two cores.
preset micro: all of it in a minute, to see that it runs; what comes out draws nothing.
preset gpu: the same with all objects, on one H100 or alike.  How many steps each
part does follows from its share of `--training` minutes and from the speed it finds; drawing and
encoding the scenes come on top, by estimate three minutes on 14 cores.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from scripts.data.files import write_text
from scripts.emoji.world import FAMILY
from scripts.training.bundling import BundleSettings, make_bundle
from scripts.training.cli import Stopped, amount, one_sentence, positive
from scripts.training.clip import CLIPSettings, train_clip
from scripts.training.encoding import EncodeSettings, encode_images
from scripts.training.gpt import GPTSettings, train_gpt
from scripts.training.settings import RunSettings, identity, require_same
from scripts.training.stages import as_flags
from scripts.training.text import TextSettings, train_text
from scripts.training.trainer import start
from scripts.training.vqgan import VQGANSettings, train_vqgan

HELD, VALIDATION = "first=310000000", "first=300000000"  # seeds that nothing is trained on
PAIRS = 60  # of a hundred scenes that the GPT learns from show two things: they are harder
TRAININGS = {CLIPSettings: train_clip, TextSettings: train_text, VQGANSettings: train_vqgan,
             GPTSettings: train_gpt}
COMMANDS = {EncodeSettings: encode_images, BundleSettings: make_bundle}


@dataclass(frozen=True)
class Preset:
    """The size of the world, and what each part is given beyond what all presets share."""

    world: str
    size: int  # pixels a side; the CLIP sees scenes of its own size
    count: int  # scenes that the VQGAN and the GPT learn from
    captioned: tuple[int, int]  # scenes that the CLIP, and its text tower alone, learn from
    clip: dict[str, Any]
    text: dict[str, Any]
    vqgan: dict[str, Any]
    encode: dict[str, Any]
    gpt: dict[str, Any]
    decoder: dict[str, Any]
    shares: dict[str, float] = field(default_factory=dict)  # of `--training`, instead of steps


FAST = {"dtype": "bfloat16", "workers": 14}
PRESETS = {
    "cpu": Preset(  # a GAN of so few steps draws dots along the white edges
        "objects=64,stickers", 128, 200_000, (80_000, 40_000),
        clip={"size": 64, "steps": 2600, "batch": 128}, text={"steps": 800},
        vqgan={"patch": 4, "channels": "64,128", "codebook_size": 2048, "steps": 6500,
               "batch": 4, "lr": 2e-3, "gan": 0},
        encode={"limit": 40_000},
        gpt={"layers": 6, "width": 192, "heads": 6, "steps": 8000, "batch": 16, "lr": 5e-3,
             "corruption": 0.6},
        decoder={"steps": 3000, "batch": 4, "gan": 0}),
    "gpu": Preset(
        "objects=244,stickers", 128, 400_000, (80_000, 40_000),
        clip={"size": 128, "batch": 512, **FAST}, text={"workers": 14},
        vqgan={"channels": "48,96,128,160", "codebook_size": 2048, "batch": 64,
               "lr": 5e-4, "optimizer": "adamw", "middle_attention": True, **FAST},
        encode={"workers": 14},
        gpt={"layers": 8, "width": 288, "heads": 6, "batch": 128, "lr": 1e-3,
             "corruption": 0.6, "dtype": "bfloat16"},
        decoder={"batch": 64, "gan_start": 0.3, **FAST},
        shares={"clip": 0.12, "vqgan": 0.33, "gpt": 0.4, "decoder": 0.15}),
    "micro": Preset(
        "objects=8,stickers", 64, 64, (2000, 64),
        clip={"size": 32, "width": 8, "text_width": 32, "text_layers": 1, "steps": 3, "batch": 8},
        text={"steps": 3, "batch": 8},
        vqgan={"patch": 4, "channels": "16,32", "codebook_size": 64, "steps": 3, "batch": 2,
               "gan": 0},
        encode={},
        gpt={"layers": 1, "width": 32, "heads": 2, "steps": 3, "batch": 4, "corruption": 0.6},
        decoder={"steps": 3, "batch": 2, "gan": 0})}


def parts(preset: Preset, run: Path, out: Path, training: float = 12) -> dict[str, Any]:
    """Part by part its settings.  training: minutes that the `shares` of a preset are of."""
    world = f"{preset.world},size={preset.size}"
    scenes, small = f"scenes:{preset.count},{world}", f"{preset.world},size={preset.clip['size']}"
    some = min(1000, preset.count)
    held = f"scenes:{min(256, some)},{world},held-out,{HELD}"
    clip, text, vqgan, shards, gpt, decoder = (run / name for name in (
        "clip", "text", "vqgan", "shards", "gpt", "decoder"))
    pairs = f"{world},pairs={PAIRS}"
    exact: dict[str, Any] = {"scale": 1.0, "flip": False}  # a scene is seen as it was drawn
    times = {name: {"time": 60 * training * share} for name, share in preset.shares.items()}

    def own(name: str) -> dict[str, Any]:
        return getattr(preset, name) | times.get(name, {})

    return {
        # It sees each scene several times, so they are kept; families are its hard negatives.
        "clip": CLIPSettings(
            images=f"scenes:{preset.captioned[0]},{small},families,keep", run=clip, together=FAMILY,
            validation=f"scenes:{2 * some},{small},{VALIDATION}", **own("clip")),
        # What it then says of texts is what its image tower says of the GPT's pictures.
        "text": TextSettings(
            images=f"scenes:{preset.captioned[1]},{pairs}", run=text, clip=str(clip),
            validation=f"scenes:{some},{pairs},{VALIDATION}", **own("text")),
        "vqgan": VQGANSettings(images=scenes, validation=held, run=vqgan, clip=str(clip), **exact,
                               size=preset.size, **own("vqgan")),
        "encode": EncodeSettings(
            images=f"scenes:{preset.count},{pairs}", out=shards,
            validation=f"scenes:{some},{world},{VALIDATION}",
            clip=str(text), vqgan=str(vqgan), crops=1, **exact, **own("encode")),
        "gpt": GPTSettings(shards=shards, run=gpt, vqgan=str(vqgan), noise=0.2, **own("gpt")),
        # Alone, on codes that stay, it goes on learning; a discriminator can make it sharp.
        "decoder": VQGANSettings(
            images=scenes, validation=held, run=decoder, clip=str(clip), decoder_of=str(vqgan),
            **exact, optimizer="adamw", warmup=50, lr=6e-4, **own("decoder")),
        "bundle": BundleSettings(
            out=out, clip=str(text), vqgan=str(decoder), gpt=gpt, guidance=2.0, top_p=0.95,
            force=True, trained_on=scenes)}


def do(settings: Any) -> None:
    """Do a part, or what is left of it."""
    if isinstance(settings, RunSettings):
        TRAININGS[type(settings)](settings, start(settings.dtype, settings.seed))
    else:
        COMMANDS[type(settings)](settings)


@contextmanager
def stopping_at(end: float) -> Iterator[None]:
    """At the time `end`, of `time.monotonic`, this process is told to stop, as by SIGTERM.

    A training then saves and raises `Stopped`; everything else is interrupted by it.
    """
    def stop(number: int, _: object) -> None:
        raise Stopped("stopped: the same command goes on from there", number)

    before = signal.signal(signal.SIGTERM, stop)
    left = min(max(0.0, end - time.monotonic()), threading.TIMEOUT_MAX)
    timer = threading.Timer(left, os.kill, (os.getpid(), signal.SIGTERM))
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
        signal.signal(signal.SIGTERM, before)


def do_all(run: Path, todo: dict[str, Any], end: float,
           do: Callable[[Any], None] = do) -> dict[str, float]:
    """Do the parts that are not done; returns the seconds of each, over all starts.

    ValueError: a part was done with other settings.  `Stopped`: at the time `end`, or when told to.
    """
    run.mkdir(parents=True, exist_ok=True)
    kept = run / "parts.json"
    # By part: its settings, the seconds it took so far, whether it is done.
    state: dict[str, dict] = json.loads(kept.read_text()) if kept.is_file() else {}
    for name, settings in todo.items():
        old, now = state.get(name), identity(settings)
        if old and old["done"]:
            require_same(run, {name: old["settings"]}, {name: now})
            continue
        print(f"{name}: {as_flags(given(settings))}", file=sys.stderr)
        began, done = time.monotonic(), False
        try:
            with stopping_at(end):
                do(settings)
            done = True
        finally:
            spent = (old["seconds"] if old else 0) + time.monotonic() - began
            state[name] = {"settings": now, "seconds": round(spent, 1), "done": done}
            write_text(kept, json.dumps(state, indent=1))
    spent = {name: part["seconds"] for name, part in state.items()}
    return spent | {"all": round(sum(spent.values()), 1)}


def given(settings: Any) -> dict[str, Any]:
    """The settings that are not as by default."""
    return {name: value for name, value in vars(settings).items()
            if value != getattr(type(settings), name, None)}


def main(arguments: list[str] | None = None) -> dict[str, float]:
    p = argparse.ArgumentParser(prog="python -m scripts.emoji.train",
                                description=__doc__,
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--preset", choices=PRESETS, default="cpu")
    p.add_argument("--out", type=Path, default=Path("weights/emoji"), help="the bundle")
    p.add_argument("--run", type=Path, help="directory of the work (runs/emoji-PRESET)")
    p.add_argument("--minutes", type=amount, default=float("inf"),
                   help="save and stop after so many; saving itself takes some seconds (no limit)")
    p.add_argument("--training", type=positive, default=12, help="minutes that preset gpu trains "
                   "for, its four parts together (12)")
    a = p.parse_args(arguments)
    run = a.run or Path(f"runs/emoji-{a.preset}")
    end = time.monotonic() + 60 * a.minutes
    with one_sentence():
        return do_all(run, parts(PRESETS[a.preset], run, a.out, a.training), end)


if __name__ == "__main__":
    print(json.dumps(main()))
