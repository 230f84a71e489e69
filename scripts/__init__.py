"""Commands, and in folders what they are made of.  Image sources and networks register here."""

import scripts.emoji  # noqa: F401
