"""A text in words that a small vocabulary has: accents, digits, emoji and unseen characters."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Iterator

NUMBERS = "zero one two three four five six seven eight nine ten eleven twelve".split()
# In the name of an emoji: words that join others, and words that say nothing of a thing alone.
LINKS = frozenset("a an and at by for in of on or the to under up with without".split())
QUALITIES = frozenset("black blue brown dark front green grey heavy high large left orange pink "
                      "plain purple red right side small white yellow".split())
SAME = {"automobile": "car"}  # where Unicode's name is not the usual word
SKIN = re.compile("[\U0001F3FB-\U0001F3FF]")  # modifiers of an emoji


def in_known_words(text: str, unknown: Callable[[str], list[str]]) -> str:
    """The text, what the vocabulary lacks in another form where it knows that better.

    `unknown(text)` lists the words that the vocabulary lacks.  A word is tried without unseen
    characters (U+200B, soft hyphens), without accents, with digits as words (2: two) and with an
    emoji as the known words of its Unicode name (CAT FACE: cat).  What none of these makes better
    stays as it is.
    """
    words = []
    for word in text.split():
        forms = list(_forms(word, unknown)) if unknown(word) else [word]
        words.append(min(forms, key=lambda form: len(unknown(form))))  # the first of the best
    return " ".join(words)


def _forms(word: str, unknown: Callable[[str], list[str]]) -> Iterator[str]:
    bare = SKIN.sub("", word)
    for space in ("", " "):  # characters without width join a word or part two
        form = "".join(space if unicodedata.category(c) == "Cf" else c for c in bare)
        without = "".join(c for c in unicodedata.normalize("NFKD", form)
                          if unicodedata.category(c) != "Mn")
        for each in (form, without):
            yield each
            yield _spelled(each, unknown)
    yield word


def _spelled(text: str, unknown: Callable[[str], list[str]]) -> str:
    """Digits and emoji as words."""
    text = re.sub(r"\d+", lambda match: f" {_number(match[0], unknown)} ", text)
    parts = [f" {_name(c, unknown)} " if unicodedata.category(c) == "So" else c for c in text]
    return " ".join("".join(parts).split())


def _number(digits: str, unknown: Callable[[str], list[str]]) -> str:
    value = int(digits) if len(digits) < 3 else len(NUMBERS)
    for word in ([*NUMBERS[value:value + 1], *(["a"] if value == 1 else [])]):
        if not unknown(word):
            return word
    return digits


def _name(emoji: str, unknown: Callable[[str], list[str]]) -> str:
    """The longest known part of the emoji's name that names a thing; without one the emoji."""
    words = unicodedata.name(emoji, "").lower().replace("-", " ").split()
    words = [SAME.get(word, word) for word in words]
    known = [not unknown(word) for word in words]
    best = ""
    for start in range(len(words)):
        for end in range(start + 1, len(words) + 1):
            if not known[end - 1]:
                break
            part = " ".join(words[start:end])
            if words[start] not in LINKS and words[end - 1] not in LINKS | QUALITIES and (
                    len(part) > len(best)):
                best = part
    return best or emoji
