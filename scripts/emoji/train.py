"""Train the default bundle, weights/emoji: all its parts, from drawn scenes, in one command.

    python -m scripts.emoji.train [--preset cpu|gpu] [--out weights/emoji] [--minutes 9]
        [--training 12]

Each part is a command of its own, which is printed.  Stop it at any moment, or after so many
`--minutes`: the same command goes on from there.  The last line of stdout is JSON, the seconds of
each part.  It needs the emoji font (see scripts.emoji.scenes), then a judge of the same world:
python -m scripts.emoji.judge --train --objects N.

preset cpu: 64 x 64 pixels, 16 x 16 codes, the first 40 objects of the world, on two cores.
preset gpu: 128 x 128 pixels, 16 x 16 codes, all objects, on one H100 or alike.  How many steps each
part does follows from its share of `--training` minutes and from the speed it finds; drawing and
encoding the scenes come on top, by estimate three minutes on 14 cores.
"""

from __future__ import annotations

import argparse
import json
import re
import shlex
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from scripts.data.files import write_text
from scripts.training.cli import amount, positive

HELD, VALIDATION = "first=310000000", "first=300000000"  # seeds that nothing is trained on


@dataclass(frozen=True)
class Preset:
    """The size of the world, and what each part is given beyond what all presets share."""

    world: str
    count: int  # scenes
    clip: str
    vqgan: str
    encode: str
    gpt: str
    decoder: str
    keep: str = ""  # scenes of the CLIP, which sees each many times


PRESETS = {
    "cpu": Preset(
        "objects=40,size=64", 200_000,
        clip="--size 64 --steps 700 --batch 128",
        vqgan="--size 64 --patch 4 --channels 128 --codebook-size 1024 --steps 6000 --batch 4 "
              "--lr 2e-3 --gan 0",
        encode="--limit 160000",
        gpt="--layers 6 --width 192 --heads 6 --steps 15300 --batch 32 --lr 1.5e-3",
        decoder="--steps 8200 --batch 8 --gan-start 0.3"),
    "gpu": Preset(
        "size=128", 400_000,
        clip="--size 128 --time 12% --batch 512 --dtype bfloat16 --workers 14",
        vqgan="--size 128 --channels 48,96,128,160 --codebook-size 2048 --time 33% --batch 64 "
              "--lr 5e-4 --optimizer adamw --dtype bfloat16 --workers 14",
        encode="--workers 14",
        gpt="--layers 8 --width 288 --heads 6 --time 40% --batch 128 --lr 1e-3 --dtype bfloat16",
        decoder="--time 15% --batch 64 --gan-start 0.3 --dtype bfloat16 --workers 14",
        keep=",keep")}


def parts(preset: Preset, run: Path, out: Path, training: float = 12) -> dict[str, str]:
    """Part by part the command: a module of this folder and its arguments.

    training: minutes of which a preset's `--time` is a share.
    """
    commands = _parts(preset, run, out)
    return {name: re.sub("--time ([0-9]+)%", lambda m: f"--time {0.6 * training * int(m[1]):.0f}s",
                         command) for name, command in commands.items()}


def _parts(preset: Preset, run: Path, out: Path) -> dict[str, str]:
    scenes, world = f"scenes:{preset.count},{preset.world}", preset.world
    clip, vqgan, shards, gpt, decoder = (run / name for name in (
        "clip", "vqgan", "shards", "gpt", "decoder"))
    held = f"--validation scenes:256,{world},held-out,{HELD}"
    exact = "--scale 1 --no-flip"  # a scene is seen as it was drawn
    return {
        "clip": f"train_clip scenes:60000,{world}{preset.keep} --validation "
                f"scenes:2000,{world},{VALIDATION} --run {clip} {preset.clip}",
        "vqgan": f"train_vqgan {scenes} {held} --run {vqgan} --clip {clip} {exact} {preset.vqgan}",
        "encode": f"encode_images {scenes} {shards} --validation scenes:1000,{world},{VALIDATION} "
                  f"--clip {clip} --vqgan {vqgan} --crops 1 {exact} {preset.encode}",
        "gpt": f"train_gpt {shards} --run {gpt} --vqgan {vqgan} --noise 0.4 {preset.gpt}",
        # Alone, on codes that stay, it goes on learning, and a discriminator makes it sharp.
        "decoder": f"train_vqgan {scenes} {held} --run {decoder} --clip {clip} --decoder-of "
                   f"{vqgan} {exact} --optimizer adamw --warmup 50 --lr 6e-4 {preset.decoder}",
        "bundle": f"make_bundle {out} --clip {clip} --vqgan {decoder} --gpt {gpt} "
                  f"--guidance 3 --top-p 0.95 --force --trained-on {scenes}"}


def run_part(command: str, end: float) -> int:
    """The exit status of a part.

    At the time `end`, and when this process is told to stop, the part is told so too, saves, and is
    waited for.
    """
    module, *flags = shlex.split(command)
    process = subprocess.Popen([sys.executable, "-m", f"scripts.{module}", *flags],
                               stdout=sys.stderr, start_new_session=True)

    def stop(*_: object) -> None:
        process.send_signal(signal.SIGTERM)

    before = [signal.signal(each, stop) for each in (signal.SIGINT, signal.SIGTERM)]
    try:
        while (status := process.poll()) is None:
            if time.monotonic() > end:
                stop()
                return process.wait()
            time.sleep(0.1)
        return status
    finally:
        for each, handler in zip((signal.SIGINT, signal.SIGTERM), before, strict=True):
            signal.signal(each, handler)


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
    run.mkdir(parents=True, exist_ok=True)
    kept, end = run / "parts.json", time.monotonic() + 60 * a.minutes
    # By part: its command, the seconds it took so far, whether it is done.
    state: dict[str, dict] = json.loads(kept.read_text()) if kept.is_file() else {}
    for name, command in parts(PRESETS[a.preset], run, a.out, a.training).items():
        old = state.get(name)
        if old and old["done"]:
            if old["command"] != command:
                raise SystemExit(f"{run} holds {name} made by other settings: give another --run")
            continue
        if time.monotonic() > end:
            raise SystemExit(f"{name} is not begun: the same command goes on")
        print(f"python -m scripts.{command}", file=sys.stderr)
        began = time.monotonic()
        status = run_part(command, end)
        spent = (old["seconds"] if old else 0) + time.monotonic() - began
        state[name] = {"command": command, "seconds": round(spent, 1), "done": status == 0}
        write_text(kept, json.dumps(state, indent=1))
        if status in (-signal.SIGTERM, 128 + signal.SIGTERM, 128 + signal.SIGINT):
            raise SystemExit(f"{name} is not finished: the same command goes on")
        if status:
            raise SystemExit(f"{name} failed with status {status}")
    spent = {name: part["seconds"] for name, part in state.items()}
    return spent | {"all": round(sum(spent.values()), 1)}


if __name__ == "__main__":
    print(json.dumps(main()))
