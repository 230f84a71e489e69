"""What is said of a training that was too short, and of one that was not."""

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from scripts.training.cli import duration
from scripts.training.verdict import FEW, faults, in_words, verdict

GOOD = {"psnr_db": 25.3, "token_ce": 2.4, "unigram_ce": 6.5}


@pytest.mark.parametrize("scores, steps, said", [
    (GOOD, {"vqgan": 5000, "gpt": 5000}, []),
    (GOOD, {"vqgan": 60, "gpt": 10}, []),  # what it can do counts
    ({}, {"gpt": 5000}, []),
    (GOOD | {"psnr_db": 19.9}, {}, ["reach 19.9 dB"]),
    (GOOD | {"psnr_db": 20.0}, {}, []),
    (GOOD | {"token_ce": 5.9}, {}, ["spends 5.90 nats on a code, hardly less than the 6.50"]),
    (GOOD | {"token_ce": 5.8}, {}, []),
    (GOOD | {"psnr_db": 12.0, "token_ce": 6.4}, {"vqgan": 60, "gpt": 10},
     ["12.0 dB", "6.40 nats", "the VQGAN took 60 steps", "the GPT took 10 steps"]),
    ({"psnr_db": 12.0}, {"vqgan": 6000}, ["12.0 dB"]),
])
def test_what_is_found(scores, steps, said):
    found = faults(scores, steps)
    assert len(found) == len(said) and all(a in b for a, b in zip(said, found, strict=True))
    sentence = verdict(scores, steps, 600)
    assert sentence.startswith("undertrained: ") == bool(said)
    assert all(each in sentence for each in found)


@given(st.integers(1, 5000), st.floats(60, 1e6))
def test_the_time_it_asks_for_is_enough_for_the_fewest_steps(steps, seconds):
    sentence = verdict({"psnr_db": 3.0}, {"vqgan": steps, "gpt": 5000}, seconds)
    asked = duration(re.search("at least ([0-9]+[mh])$", sentence)[1])
    assert asked >= 2 * seconds * 0.999 and steps * asked / seconds >= FEW * 0.999


@pytest.mark.parametrize("seconds, text", [(1, "1m"), (60, "1m"), (61, "2m"), (7140, "119m"),
                                           (7200, "2h"), (7201, "3h"), (36000, "10h")])
def test_times_are_rounded_up(seconds, text):
    assert in_words(seconds) == text and duration(text) >= seconds
