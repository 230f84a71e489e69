"""The GPT: the cached step is the full pass, whatever the size."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from clipgen.gpt import GPT, GPTConfig, KVCache
from tests.micro import micro_gpt


@settings(deadline=None, max_examples=15)
@given(layers=st.integers(1, 3), heads=st.sampled_from([1, 2, 4]), rows=st.integers(1, 5),
       block_size=st.integers(1, 17), exact=st.booleans(), spare=st.integers(1, 17),
       seed=st.integers(0, 99))
def test_cached_logits_equal_the_full_pass(layers, heads, rows, block_size, exact, spare, seed):
    torch.manual_seed(seed)
    gpt = GPT(GPTConfig(layers, 32, heads, 50, block_size, 8)).eval()
    with torch.no_grad():
        gpt.position.normal_(std=0.5)
        embedding = torch.randn(rows, 8)
        codes = torch.randint(50, (rows, block_size - 1))
        full = gpt(embedding, codes)
        cache = KVCache(gpt.config, rows, torch.device("cpu"), torch.float32)
        # What is not read may be what an earlier image that overflowed has left.
        cache.store.fill_(torch.nan if exact else 0)
        x = gpt.condition(embedding)
        for i in range(block_size):
            cache.position.fill_(i)
            cache.look_at(i + 1 if exact else min(i + spare, block_size), exact)
            torch.testing.assert_close(gpt.step(x, cache), full[:, i], atol=1e-5, rtol=0)
            if i < block_size - 1:
                x = gpt.code_embedding(codes[:, i])


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


@pytest.mark.parametrize("change", [{"layers": 0}, {"heads": 3}, {"block_size": 0}])
def test_impossible_sizes_are_refused(change):
    sizes = {"layers": 1, "width": 32, "heads": 4, "codebook_size": 8, "block_size": 4,
             "embedding_dim": 8}
    with pytest.raises(ValueError, match=next(iter(change))):
        GPTConfig(**sizes | change)
