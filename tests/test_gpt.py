"""The GPT: the cached step is the full pass, whatever the size."""

import math
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from clipgen.gpt import GPT, NEIGHBOURS, GPTConfig, KVCache, neighbour_places, squared_relu
from scripts.training.cli import parse_settings
from scripts.training.gpt import NEW, GPTSettings, make_gpt
from tests.micro import micro_gpt

ADDED = st.fixed_dictionaries({"neighbours": st.integers(0, len(NEIGHBOURS)),
                               "layouts": st.integers(0, 3),
                               **{name: st.booleans() for name in
                                  ("modulated", "squared_relu")}})


@settings(deadline=None, max_examples=30)
@given(layers=st.integers(1, 3), heads=st.sampled_from([1, 2, 4]), rows=st.integers(1, 5),
       block_size=st.integers(1, 17), added=ADDED, exact=st.booleans(), spare=st.integers(1, 17),
       seed=st.integers(0, 99))
def test_cached_logits_equal_the_full_pass(layers, heads, rows, block_size, added, exact, spare,
                                           seed):
    torch.manual_seed(seed)
    block_size = math.isqrt(block_size) ** 2 if added["neighbours"] else block_size
    config = GPTConfig(layers, 32, heads, 50, block_size, 8, **added)
    gpt = GPT(config).eval()
    with torch.no_grad():
        gpt.position.normal_(std=0.5)
        if config.layouts:
            gpt.initialise()
            gpt.layout_tables.weight.normal_(std=0.5)
        embedding = torch.randn(rows, 8)
        codes = torch.randint(50, (rows, block_size - 1))
        full = gpt(embedding, codes)
        cache = KVCache(config, rows, torch.device("cpu"), torch.float32)
        # What is not read may be what an earlier image that overflowed has left.
        cache.store.fill_(torch.nan if exact else 0)
        x = gpt.condition(embedding)
        modulations = gpt.modulate(x) if config.modulated else None
        layout = gpt.lay_out(x) if config.layouts else None
        places = neighbour_places(config, codes.device)
        for i in range(block_size):
            cache.position.fill_(i)
            cache.look_at(i + 1 if exact else min(i + spare, block_size), exact)
            torch.testing.assert_close(gpt.step(x, cache, modulations, layout), full[:, i],
                                       atol=5e-5, rtol=0)
            if i < block_size - 1:
                x = gpt.code_embedding(codes[:, i])
            if i < block_size - 1 and config.neighbours:
                # Later codes are not there yet; the last column is that of no code.
                sofar = torch.full((rows, block_size + 1), 50)
                sofar[:, :i + 1] = codes[:, :i + 1]
                x = x + gpt.beside(sofar, places[i + 1:i + 2])[:, 0]


@settings(deadline=None, max_examples=20)
@given(count=st.integers(0, 9), seed=st.integers(0, 99))
def test_the_gradient_of_the_squared_relu_is_its_own(count, seed):
    x = torch.randn(count, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    assert torch.equal(squared_relu(x), x.clamp(min=0) ** 2)
    assert torch.autograd.gradcheck(squared_relu, x.requires_grad_(True))


def test_neighbours_are_those_of_the_square():
    config = GPTConfig(1, 8, 1, 8, 16, 8, neighbours=5)
    none = 16
    places = neighbour_places(config, torch.device("cpu"))
    assert places[0].tolist() == [none] * 5
    assert places[7].tolist() == [3, none, 2, 5, none]  # row 1, column 3
    assert places[12].tolist() == [8, 9, none, none, 4]  # row 3, column 0
    assert places[16].tolist() == [none] * 5  # after the last


def test_a_layout_says_what_is_where():
    """Each place's input is another mix of the tables; as initialised they add nothing."""
    gpt = GPT(GPTConfig(1, 8, 1, 8, 4, 8, layouts=3)).eval()
    gpt.initialise()
    condition = torch.randn(5, 8)
    with torch.no_grad():
        assert not gpt.lay_out(condition).any()
        gpt.layout_tables.weight.normal_()
        tables = gpt.layout_tables.weight.view(4, 8, 3)
        mix = gpt.layout_mix(gpt.layout_hidden(condition))
        expected = torch.einsum("nk,pck->npc", mix, tables) + gpt.layout_tables.bias.view(4, 8)
        torch.testing.assert_close(gpt.lay_out(condition), expected)


@pytest.mark.parametrize("added", [{"modulated": True}, {"neighbours": 1}, {"squared_relu": True},
                                   {"layouts": 2}])
def test_each_addition_changes_the_forecasts(added):
    torch.manual_seed(0)
    plain, other = (GPT(GPTConfig(1, 32, 4, 50, 16, 8, **more)).eval() for more in ({}, added))
    for gpt in (plain, other):
        with torch.no_grad():
            for p in gpt.parameters():
                own = torch.Generator().manual_seed(p.dim())
                p.copy_(0.3 * torch.randn(p.shape, generator=own))
    embedding, codes = torch.randn(2, 8), torch.randint(50, (2, 15))
    assert not torch.allclose(plain(embedding, codes), other(embedding, codes), atol=1e-3)


SHARDS = SimpleNamespace(manifest={"codebook_size": 8}, length=16, embedding_dim=8)


def settings_with(*flags):
    return parse_settings(GPTSettings, ["shards", "--run", "run", "--layers", "1", "--width", "8",
                                        "--heads", "1", *flags], "")


def test_flags_make_the_published_gpt_or_more():
    bare = ("--neighbours", "0", "--layouts", "0", *(f"--{name}=no" for name in
                                   ("modulated", "squared-relu")))
    published = GPTConfig(1, 8, 1, 8, 16, 8, null_embedding=True)
    assert make_gpt(settings_with(*bare), SHARDS).config == published
    config = make_gpt(settings_with(), SHARDS).config
    assert {name: getattr(config, name) for name in NEW} == NEW | {"layers": 1, "width": 8,
                                                                   "heads": 1}


def test_flags_that_cannot_be_are_one_sentence(monkeypatch, capsys):
    with pytest.raises(SystemExit):
        settings_with("--modulated", "maybe")
    assert "'maybe' is not yes or no" in capsys.readouterr().err
    with pytest.raises(ValueError, match="neighbours must be from 0 to 5, got 6"):
        make_gpt(settings_with("--neighbours", "6"), SHARDS)
    given = GPT(GPTConfig(1, 8, 1, 8, 16, 8))
    monkeypatch.setattr("scripts.training.gpt.load_gpt", lambda source: given)
    settings_ = parse_settings(GPTSettings, ["shards", "--run", "run", "--from", "x",
                                             "--squared-relu", "yes"], "")
    with pytest.raises(ValueError, match="--squared-relu yes is not that of x, no: leave "
                                         "--squared-relu out"):
        make_gpt(settings_, SHARDS)


def test_a_forecast_depends_on_the_condition_and_on_earlier_codes_alone():
    gpt = micro_gpt()
    codes = torch.randint(64, (1, 15))
    e = torch.randn(1, 32)
    with torch.no_grad():
        base = gpt(e, codes)
        changed = codes.clone()
        changed[0, 7] = (changed[0, 7] + 1) % 64
        other = gpt(e, changed)
        assert torch.equal(base[:, :8], other[:, :8])
        assert not torch.allclose(base[:, 8:], other[:, 8:])
        assert not torch.allclose(base, gpt(-e, codes))


def test_shapes_and_limits():
    gpt = micro_gpt()
    with torch.no_grad():
        assert gpt(torch.randn(3, 32), torch.zeros(3, 0, dtype=torch.int64)).shape == (3, 1, 64)
        assert gpt(torch.randn(3, 32), torch.zeros(3, 15, dtype=torch.int64)).shape == (3, 16, 64)
        with pytest.raises(ValueError, match="16 codes given.* at most 15"):
            gpt(torch.randn(1, 32), torch.zeros(1, 16, dtype=torch.int64))


@pytest.mark.parametrize("change", [{"layers": 0}, {"heads": 3}, {"block_size": 0},
                                    {"neighbours": 6}, {"layouts": -1},
                                    {"neighbours": 1, "block_size": 5}])
def test_impossible_sizes_are_refused(change):
    sizes = {"layers": 1, "width": 32, "heads": 4, "codebook_size": 8, "block_size": 4,
             "embedding_dim": 8}
    with pytest.raises(ValueError, match=next(iter(change))):
        GPTConfig(**sizes | change)
