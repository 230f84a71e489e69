"""The race of two recipes: whose turn it is, when values are reached, and the whole of it."""

import json
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from scripts import benchmark
from scripts.benchmarks import speedrun
from scripts.data import shards
from tests.micro import micro_bundle


class Learner:
    """A training whose score falls by `rate` a step and whose steps cost `cost` on a clock."""

    def __init__(self, clock, cost, rate):
        self.clock, self.cost, self.rate, self.done = clock, cost, rate, 0

    def step(self, step):
        assert step == self.done
        self.done += 1
        self.clock[0] += self.cost
        return {"loss": torch.tensor(0.0)}

    def validate(self):
        self.clock[0] += 1000  # outside of what counts
        return {"token_ce": 10 - self.rate * self.done}, {}


@pytest.fixture
def clock(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(speedrun.time, "perf_counter", lambda: now[0])
    return now


@pytest.mark.parametrize("rate, cost", [(2, 1), (1, 2), (4, 0.5), (1, 1)])
def test_a_race_gives_each_its_time_and_the_ratio_of_the_times(clock, rate, cost):
    runners = speedrun.race({"today": lambda steps: Learner(clock, 1, 0.01),
                             "new": lambda steps: Learner(clock, cost, 0.01 * rate)},
                            60, 6, ["token_ce"])
    assert [r.spent for r in runners.values()] == pytest.approx([60, 60])
    assert [len(r.curve) for r in runners.values()] == [7, 7]
    assert [p["seconds"] for p in runners["today"].curve] == pytest.approx(range(0, 70, 10))
    found = speedrun.ratios({k: r.curve for k, r in runners.items()}, {"token_ce": True})
    faster = rate / cost
    ratio = found["token_ce"]["ratio"]
    assert ratio == (pytest.approx(faster) if faster >= 1 else None)


@given(st.lists(st.floats(-5, 5), min_size=1, max_size=9), st.floats(-5, 5), st.booleans())
def test_a_value_is_reached_where_the_curve_first_crosses_it(values, wanted, less):
    curve = [{"seconds": 10.0 * (i + 1), "score": v} for i, v in enumerate(values)]
    good = [v <= wanted if less else v >= wanted for v in values]
    found = speedrun.reached(curve, "score", wanted, less)
    if True not in good:
        assert found is None
    else:
        first = good.index(True)
        assert max(10, 10 * first) <= found <= 10 * (first + 1)


@pytest.mark.parametrize("text", ["", "{}", '{"gpt": 3}', '{"gpt": [3]}', "[]"])
def test_a_recipe_that_is_none_is_one_sentence(tmp_path, text):
    path = tmp_path / "recipe.json"
    path.write_text(text)
    with pytest.raises(ValueError, match="holds no list of flags for gpt: give"):
        speedrun.flags_of(path, "gpt")


def write_shards(directory):
    """4 x 4 random codes of 64, with captions for the validation images."""
    rng, parts = np.random.default_rng(0), {}
    for part, count in ("train", 20), ("validation", 6):
        shards.write_shard(directory, part, 0, {
            "codes": rng.integers(64, size=(count, 1, 16)), "images": np.arange(count),
            "embeddings": rng.standard_normal((count, 1, 32)),
            **({"texts": rng.standard_normal((count, 32))} if part == "validation" else {})})
        parts[part] = [shards.describe_shard(directory, part, 0)]
    shards.write_manifest(directory, {"crops": 1, "grid": [4, 4], "codebook_size": 64,
                                      "embedding_dim": 32, "parts": parts})


def race(tmp_path, capsys, kind, source, small, *flags):
    """The result of a race between two such recipes, of which the second one's rate is lower."""
    for name, more in ("against", []), ("new", ["--lr=1e-4"]):
        (tmp_path / f"{name}.json").write_text(json.dumps({kind: [*small, *more]}))
    benchmark.main(["speedrun", kind, str(source), "--minutes", "0.02", "--points", "2",
                    "--against", str(tmp_path / "against.json"),
                    "--recipe", str(tmp_path / "new.json"), "--plot", str(tmp_path / "plot.png"),
                    *flags])
    out, err = capsys.readouterr()
    assert "is reached" in err
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")
    data = json.loads(out.splitlines()[-1])
    assert [len(curve) for curve in data["curves"].values()] == [3, 3]
    for name in data["ratios"]:
        assert all(math.isfinite(p[name]) for c in data["curves"].values() for p in c)
    return data


@pytest.mark.slow
def test_two_vqgans_race_for_a_moment(tmp_path, capsys):
    rng = np.random.default_rng(0)
    (tmp_path / "images").mkdir()
    for i in range(12):
        pixels = rng.integers(256, size=(16, 16, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / "images" / f"{i}.png")
    data = race(tmp_path, capsys, "vqgan", tmp_path / "images",
                ["--size=16", "--channels=8,8", "--patch=1", "--codebook-size=16", "--batch=2",
                 "--held-out=0.3"], "--clip", str(micro_bundle(tmp_path / "bundle")))
    assert set(data["ratios"]) == {"psnr_db", "perceptual"}


@pytest.mark.slow
def test_two_gpts_race_for_a_moment(tmp_path, capsys):
    directory = tmp_path / "shards"
    directory.mkdir()
    write_shards(directory)
    data = race(tmp_path, capsys, "gpt", directory,
                ["--layers=1", "--width=16", "--heads=2", "--batch=2"])
    assert set(data["ratios"]) == {"token_ce", "token_ce_text"}
