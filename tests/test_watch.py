"""scripts/serving/watch.py: how often, after which pauses; tests/test_server.py kills for real."""

import contextlib
import subprocess
import sys
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from scripts.serving import watch

LF = b"\n"
ILL, CALM = watch.Ended("ill"), watch.Ended("ill", calm=True)


def serve(endings, restarts, told_in_pause=None):
    """(exit status, pauses) where servers end one after the other as `endings` says."""
    pauses, left = [], list(endings)

    class Signals:
        def wait(self, seconds):
            pauses.append(seconds)
            return len(pauses) == told_in_pause

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(watch, "Signals", Signals)
        patch.setattr(watch, "server", lambda *_: contextlib.nullcontext((None, None)))
        patch.setattr(watch, "watch", lambda *_: left.pop(0))
        return watch.serve(5000, restarts), pauses


def test_restarts_are_bounded_with_longer_pauses(capsys):
    assert serve([ILL] * 6, 5) == (1, [1, 2, 4, 8, 16])
    told = capsys.readouterr().err.splitlines()
    assert told[0] == "clipgen: ill: restart 1 of 5 in 1 s"
    assert told[-1].startswith("clipgen: ill after 5 restarts: giving up")
    assert serve([ILL], 0) == (1, [])
    assert max(serve([ILL] * 20, 19)[1]) == watch.LONGEST


@given(st.lists(st.sampled_from([ILL, CALM]), min_size=1, max_size=30), st.integers(0, 6))
def test_a_server_that_ran_for_long_starts_the_count_again(endings, restarts):
    status, pauses = serve([*endings, watch.Ended("")], restarts)
    in_a_row = longest = 0
    for ended in endings:
        in_a_row = 1 if ended.calm else in_a_row + 1
        longest = max(longest, in_a_row)
    assert status == (longest > restarts)
    assert status or len(pauses) == len(endings)


def test_it_ends_as_it_is_told():
    assert serve([watch.Ended("")], 5) == (0, [])
    assert serve([watch.Ended("", 3)], 5) == (3, [])  # as where the port is taken
    assert serve([ILL, ILL, ILL], 5, told_in_pause=2) == (0, [1, 2])


@pytest.mark.parametrize(("message", "module", "lost"), [
    ("PermitInUse dropped without state transition", "permit::pool", True),
    ("Slot poisoned - capacity permanently reduced", "permit::pool", True),
    ("Starting prediction", "prediction", False), ("a poisoned apple", "user", False)])
def test_what_cogs_log_says_of_a_lost_place(message, module, lost):
    line = f'{{"level":"ERROR","fields":{{"message":"{message}"}},"target":"coglet::{module}"}}\n'
    assert bool(watch.LOST.search(line.encode())) == lost


@pytest.mark.parametrize("line", [b"Slot poisoned: coglet::permit::pool", b"Starting prediction"])
def test_a_server_that_lost_its_place_for_predictions_is_left(line, capfdbinary):
    """A real process that says it in its log, as Cog's does where it cannot make its folders."""
    process = subprocess.Popen(
        [sys.executable, "-c", f"import sys, time; sys.stderr.buffer.write({line + LF!r}); "
         "sys.stderr.flush(); time.sleep(60)"], stderr=subprocess.PIPE)
    log, looks = watch.Log(process), []

    class Signals:
        def wait(self, seconds):  # for the line; a signal comes once it is there
            looks.append(seconds)
            while len(looks) == 1 and not capfdbinary.readouterr().err:
                time.sleep(0.01)
            return len(looks) > 1 or b"poisoned" not in line

    try:
        ended = watch.watch(process, log, 1, Signals(), was_ready=True)
    finally:
        process.kill()
        process.wait()
    assert ended.reason == ("Cog's server is BUSY for good, its log says why"
                            if b"poisoned" in line else "")
