"""Measurements; each prints a table on stderr and one JSON line last on stdout.

    python -m scripts.benchmark train    images/s and MFU of GPT training
    python -m scripts.benchmark sample   ms a step, images/s and share of the bandwidth of sampling
    python -m scripts.benchmark serve    what the server adds to the model's time
    python -m scripts.benchmark start    process start to a server that is ready, by part
    python -m scripts.benchmark speedrun how much faster than a frozen recipe training learns
    python -m scripts.benchmark denormals  what too small numbers cost a VQGAN's training
    python -m scripts.benchmark gpu      half an hour of a GPU: tests, speed, the large model

`python -m scripts.benchmark NAME --help` lists the flags of each.
"""

from __future__ import annotations

import argparse
import json
import sys
from importlib import import_module

from clipgen import is_out_of_memory
from scripts.training.cli import one_sentence

# Each is the file benchmarks/NAME.py, of which `parse` takes the arguments, `measure` makes the
# result and `table` shows it.
COMMANDS = ("train", "sample", "serve", "start", "speedrun", "denormals", "gpu")


def main(arguments: list[str] | None = None) -> None:
    p = argparse.ArgumentParser(prog="python -m scripts.benchmark", description=__doc__,
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("command", choices=COMMANDS)
    p.add_argument("arguments", nargs=argparse.REMAINDER, help="of the command")
    given = p.parse_args(arguments)
    command = import_module(f"scripts.benchmarks.{given.command}")
    with one_sentence():
        a = command.parse(given.arguments)
        try:
            result = command.measure(a)
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            if given.command in ("speedrun", "denormals"):
                raise MemoryError("out of memory: give a smaller --batch") from None
            rows = f"--batch {a.batch}" if given.command == "train" else f"--rows {max(a.rows)}"
            raise MemoryError(f"{rows} does not fit into the memory of {a.device}: give fewer"
                              ) from None
    print(command.table(result), file=sys.stderr)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
