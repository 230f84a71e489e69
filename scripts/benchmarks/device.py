"""The device and the size that a benchmark takes where none is given."""

from __future__ import annotations

import argparse

from clipgen.device import find_device


def settle(a: argparse.Namespace) -> bool:
    """Fill in device and size where they are not given; whether the device is CUDA.

    ValueError: a device that is not here.
    """
    a.device = find_device(a.device).type
    a.size = a.size or ("published" if a.device == "cuda" else "weights/emoji")
    return a.device == "cuda"
