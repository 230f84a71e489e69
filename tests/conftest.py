"""Where a shell starts the tests in the background, Ctrl-C is ignored by all that they start: not
here, for some send it."""

import os
import signal
import sys

import hypothesis
import pytest

signal.signal(signal.SIGINT, signal.default_int_handler)

# Trainings in this process run where those in others do: on CPUs, whatever the machine has.
os.environ.setdefault("ACCELERATE_USE_CPU", "true")

# No assertion about time: a busy machine is no fault.
hypothesis.settings.register_profile("untimed", deadline=None)
hypothesis.settings.load_profile("untimed")


@pytest.fixture(autouse=True)
def denormal_numbers():
    """A training in this process takes them as zero from then on; the next test has them again."""
    yield
    if "torch" in sys.modules:
        sys.modules["torch"].set_flush_denormal(False)
