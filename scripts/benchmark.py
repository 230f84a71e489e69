"""Measurements; each prints a table on stderr and one JSON line last on stdout.

    python -m scripts.benchmark train    images/s and MFU of GPT training
    python -m scripts.benchmark sample   ms a step, images/s and share of the bandwidth of sampling
    python -m scripts.benchmark serve    what the server adds to the model's time
    python -m scripts.benchmark start    process start to a server that is ready, by part

`python -m scripts.benchmark NAME --help` lists the flags of each.
"""

from __future__ import annotations

import argparse
from importlib import import_module

COMMANDS = ("train", "sample", "serve", "start")  # each is the file benchmark_NAME.py


def main(arguments: list[str] | None = None) -> None:
    p = argparse.ArgumentParser(prog="python -m scripts.benchmark", description=__doc__,
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("command", choices=COMMANDS)
    p.add_argument("arguments", nargs=argparse.REMAINDER, help="of the command")
    a = p.parse_args(arguments)
    import_module(f"scripts.benchmark_{a.command}").main(a.arguments)


if __name__ == "__main__":
    main()
