"""`python -m clipgen` is the command clipgen."""

from clipgen.command import run

run()
