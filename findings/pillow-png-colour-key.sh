#!/usr/bin/env bash
# Pillow 13.0.0: the transparent grey of a PNG (chunk tRNS) of 2, 4 or 16 bits is not found.
# Pixels are scaled to 8 bits on reading, the grey in info["transparency"] is not, so that
# convert("RGBA") compares the two on different scales.  At 1 and 8 bits it is found.
set -eu
folder="$(mktemp -d)"
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check pillow==13.0.0
"$folder/venv/bin/python" - <<'PYTHON'
import io
import struct
import sys
import zlib

import PIL
from PIL import Image


def chunk(name, content):
    return (struct.pack(">I", len(content)) + name + content
            + struct.pack(">I", zlib.crc32(name + content)))


def png(bits, grey):
    """One row of pixels whose value is `grey`, which tRNS declares transparent."""
    width = 8
    row = int("".join(format(grey, f"0{bits}b") for _ in range(width)), 2).to_bytes(width * bits // 8)
    return (b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", width, 1, bits, 0, 0, 0, 0))
            + chunk(b"tRNS", struct.pack(">H", grey)) + chunk(b"IDAT", zlib.compress(b"\0" + row))
            + chunk(b"IEND", b""))


seen = {}
for bits, grey in ((1, 1), (2, 2), (4, 5), (8, 77), (16, 20000)):
    image = Image.open(io.BytesIO(png(bits, grey)))
    alpha = image.convert("RGBA").getchannel("A").getextrema()
    seen[bits] = "transparent" if alpha == (0, 0) else "opaque"
    print(f"{bits:2} bits, grey {grey}: mode {image.mode}, transparency {image.info['transparency']}, "
          f"pixel {image.getpixel((0, 0))}, as RGBA {seen[bits]}")
print("Pillow", PIL.__version__)
expected = {1: "transparent", 2: "opaque", 4: "opaque", 8: "transparent", 16: "opaque"}
sys.exit(0 if seen == expected else f"changed: {seen}")
PYTHON
