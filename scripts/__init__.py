"""Commands, and in folders what they are made of.  Image sources and networks register here."""

import clipgen.threads  # noqa: F401  # before torch, which all commands import later

# isort: split
import scripts.emoji  # noqa: F401
