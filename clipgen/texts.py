"""The texts of a command: from its arguments, from files, from standard input; checked."""

from __future__ import annotations

import re
from typing import BinaryIO

MOST_BYTES = 1_000_000  # of a file
MOST_CHARACTERS = 1000  # of a text, as over HTTP; CLIP reads far fewer
SMALL_WORDS = frozenset("a an the in on at of by to and with under over".split())


def read_texts(source: str, stdin: BinaryIO | None) -> list[str]:
    """The lines of a UTF-8 file, or of `stdin` where source is `-`, that are not blank.

    ValueError, in one sentence: it cannot be read, is not UTF-8, too large, or has no text.
    """
    name = "standard input" if source == "-" else source
    try:
        if source != "-":
            with open(source, "rb") as file:
                data = file.read(MOST_BYTES + 1)
        elif stdin is None:
            raise ValueError("standard input is closed: give the texts as arguments or in --texts")
        else:
            data = stdin.read(MOST_BYTES + 1)
    except OSError as error:
        raise ValueError(f"{name} cannot be read ({error.strerror}): give a file of texts, one a "
                         "line") from None
    if len(data) > MOST_BYTES:
        raise ValueError(f"{name} has more than {MOST_BYTES:,} bytes: split it into several files")
    try:
        lines = re.split(r"\r\n|\r|\n", data.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        line = data[:error.start].count(b"\n") + 1
        raise ValueError(f"line {line} of {name} is not UTF-8: save it as a UTF-8 text") from None
    if not (texts := [line.strip() for line in lines if line.strip()]):
        raise ValueError(f"{name} has no text in it: write one a line")
    return texts


def gather(arguments: list[str], files: list[str], stdin: BinaryIO | None) -> list[str]:
    """All texts in their order: the arguments, `-` among them being standard input; then the files.

    ValueError, in one sentence: a file that `read_texts` refuses, standard input named twice,
    several single words that look like one text without quotes.
    """
    if [*arguments, *files].count("-") > 1:
        raise ValueError("'-' is given twice, but standard input can be read only once")
    if len(arguments) > 1 and not any(len(text.split()) > 1 for text in arguments):
        if small := [text for text in arguments if text.lower() in SMALL_WORDS]:
            raise ValueError(f"{small[0]!r} would be a text of its own: put the whole text in "
                             "quotes")
    texts = []
    for text in arguments:
        texts += read_texts("-", stdin) if text == "-" else [text]
    for source in files:
        texts += read_texts(source, stdin)
    return texts


def check(texts: list[str], blank: bool = False, name: str = "text") -> None:
    """ValueError, in one sentence, for the first text that is too long or blank.

    blank: whether a text may be.  name: what the error calls a text.
    """
    for number, text in enumerate(texts, 1):
        which = f"{name} {number} of {len(texts)}" if len(texts) > 1 else f"the {name}"
        if not text.strip() and not blank:
            raise ValueError(f"{which} is blank: say what the images should show, or give --image")
        if len(text) > MOST_CHARACTERS:
            raise ValueError(f"{which} has {len(text):,} characters, {text[:20]!r} and so on, more "
                             f"than {MOST_CHARACTERS}: shorten it")
