"""Runs with a time instead of steps: it is kept, by a simulated clock."""

import os
import re
import signal
import tempfile
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from scripts.training import checkpoints, trainer
from scripts.training.cli import Stopped
from tests.processes import saved
from tests.walk import Walk, walk


class Clock:
    """A simulated one: steps and validations move it, by twice as much while others work too."""

    def __init__(self, load, step=3.0, validation=20.0):
        self.now, self.load, self.costs = 0.0, load, {"step": step, "validation": validation}

    def monotonic(self):
        return self.now

    def spend(self, what):
        self.now += self.costs[what] * self.load(self.now)


def timed_walk(directory, clock, monkeypatch, seconds=3000.0, stop_at=None):
    """(result, learning rates) of a walk with --time; with `stop_at`, Ctrl-C in that step."""
    rates = []

    def act(training, step):
        clock.spend("step")
        rates.append(training.optimizer.param_groups[0]["lr"])
        if step == stop_at:
            os.kill(os.getpid(), signal.SIGINT)

    def validate(self, model):
        clock.spend("validation")
        return {"score": model.weight.item()}, {}

    with monkeypatch.context() as patch:
        patch.setattr(trainer, "time", clock)
        patch.setattr(Walk, "validate", validate)
        return walk(directory, f"--time={seconds}s", act=act), rates


@settings(deadline=None, max_examples=25, suppress_health_check=list(HealthCheck))
@given(st.sampled_from([0.5, 0.8, 1.0, 1.5, 2.0]), st.floats(0.02, 0.95), st.booleans())
def test_a_time_is_kept_whatever_else_the_machine_does(factor, when, back):
    """Load that doubles or halves midway, for good or for a fifth of the time."""
    seconds = 3000.0

    def load(now):
        return factor if when <= now / seconds < (when + 0.2 if back else 9) else 1.0

    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        clock = Clock(load)
        result, rates = timed_walk(Path(folder), clock, patch, seconds)
        assert 0.93 * seconds <= clock.now <= 1.03 * seconds  # the bar: a tenth
        assert len(rates) >= result.steps == saved(Path(folder))[0]
        assert rates[-1] < 0.05  # of a peak of 1: it has come to its end


@pytest.mark.parametrize("factor", [0.5, 1, 2])
def test_a_time_is_that_of_all_starts_together(factor, tmp_path, monkeypatch):
    first = Clock(lambda now: 1.0)
    with pytest.raises(Stopped) as stopped:
        timed_walk(tmp_path, first, monkeypatch, stop_at=400)
    assert stopped.value.signal == signal.SIGINT
    later = Clock(lambda now: factor)
    later.now = 1e6  # the clock of another day
    timed_walk(tmp_path, later, monkeypatch)
    assert 0.93 * 3000 <= first.now + later.now - 1e6 <= 1.03 * 3000


def test_the_first_checkpoint_is_there_after_half_a_minute(tmp_path, monkeypatch):
    kept = []
    whole = checkpoints.save

    def save(directory, step, state):
        kept.append(state["seconds"])
        whole(directory, step, state)

    monkeypatch.setattr(checkpoints, "save", save)
    timed_walk(tmp_path, Clock(lambda now: 1.0), monkeypatch)
    probe = 11 * 3 + 20  # steps and a validation that measure its speed
    assert kept[0] - probe <= 30 + 3
    assert all(180 <= b - a <= 205 for a, b in pairwise(kept[:-1]))


def test_too_short_a_time_is_refused_before_anything_is_trained(tmp_path, monkeypatch):
    with pytest.raises(ValueError) as error:
        timed_walk(tmp_path, Clock(lambda now: 1.0), monkeypatch, seconds=200.0)
    steps, longer = map(int, re.fullmatch(
        "([0-9]+) steps fit into 3.3 min, and fewer than 100 learn nothing that could be seen: "
        "give a --time ([0-9]+) times as long, or --anyway", str(error.value)).groups())
    assert 10 <= steps < 100 and saved(tmp_path) == []
    clock = Clock(lambda now: 1.0)
    result, _ = timed_walk(tmp_path, clock, monkeypatch, 200.0 * longer)
    assert result.steps >= 100
    walk(tmp_path / "other", "--time=0.001s", "--anyway")
