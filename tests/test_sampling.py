"""Sampling: filters against a slow reference, draws against theory, seeds that stand alone."""

import copy
import functools
import math
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from clipgen import packed as packing
from clipgen import sampling
from clipgen.gpt import NEIGHBOURS
from clipgen.sampling import (
    FEW,
    ROWS,
    Sampler,
    Settings,
    StaticRowBlock,
    draw,
    filter_logits,
    uniforms,
)
from tests.marks import INT8, NEEDS_INT8
from tests.micro import micro_gpt

# What a GPT can have beyond the published one.
ALL = {"neighbours": len(NEIGHBOURS), "layouts": 3, "modulated": True, "squared_relu": True}
ADDED = st.fixed_dictionaries({"neighbours": st.integers(0, len(NEIGHBOURS)),
                               "layouts": st.sampled_from([0, 3]),
                               **{name: st.booleans() for name in list(ALL)[2:]}})
PLAIN = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "guidance": 1.0}


def kept_slowly(logits: list[float], temperature: float, top_k: int, top_p: float) -> set[int]:
    order = sorted(range(len(logits)), key=lambda i: -logits[i])[:top_k or len(logits)]
    weights = [math.exp((logits[i] - logits[order[0]]) / temperature) for i in order]
    before = [sum(weights[:i]) / sum(weights) for i in range(len(order))]
    assert all(i == 0 or top_p == 1 or abs(b - top_p) > 1e-5 for i, b in enumerate(before))
    return {c for i, c in enumerate(order) if i == 0 or top_p == 1 or before[i] <= top_p}


@settings(deadline=None, max_examples=300)
@given(size=st.integers(1, 60), seed=st.integers(0, 10**6),
       temperature=st.sampled_from([0.05, 0.5, 1.0, 2.0, 4.0]),
       top_k=st.one_of(st.integers(0, 70), st.sampled_from([0, 1])),
       top_p=st.one_of(st.floats(0, 1), st.sampled_from([0.0, 1.0])))
def test_kept_sets_equal_a_slow_reference(size, seed, temperature, top_k, top_p):
    logits = 3 * torch.randn(size, generator=torch.Generator().manual_seed(seed))
    try:
        expected = kept_slowly(logits.tolist(), temperature, top_k, top_p)
    except AssertionError:
        return  # top_p falls on a step of the distribution: rounding decides
    probabilities, codes = filter_logits(logits[None], temperature, top_k, top_p)
    assert set(codes[probabilities > 0].tolist()) <= expected  # far codes may underflow to 0
    missing = expected - set(codes[probabilities > 0].tolist())
    assert all((logits[c] - logits.max()) / temperature < -80 for c in missing)
    whole = (logits / temperature).softmax(0)[codes[0]].where(probabilities[0] > 0, 0)
    torch.testing.assert_close(probabilities[0] / probabilities.sum(), whole / whole.sum())


@pytest.mark.parametrize("temperature, top_k, top_p",
                         [(1.0, 0, 1.0), (0.7, 12, 1.0), (1.5, 0, 0.8), (1.0, 20, 0.9)])
def test_draws_follow_the_filtered_softmax(temperature, top_k, top_p):
    count, size = 20_000, 40
    generator = torch.Generator().manual_seed(5)
    logits = torch.randn(1, size, generator=generator)
    probabilities, codes = filter_logits(logits, temperature, top_k, top_p)
    u = torch.rand(count, generator=generator)
    drawn = draw(probabilities.expand(count, -1).contiguous(), codes.expand(count, -1), u)
    observed = torch.bincount(drawn, minlength=size).float()[codes[0]]
    expected = count * probabilities[0] / probabilities.sum()
    kept = expected > 0
    assert observed[~kept].sum() == 0
    chi2 = ((observed - expected)[kept].square() / expected[kept]).sum().item()
    degrees = int(kept.sum()) - 1
    assert chi2 < degrees + 4 * math.sqrt(2 * degrees)  # about 4 standard deviations


def test_draw_never_reaches_a_removed_code():
    probabilities = torch.tensor([[0.6, 0.3, 0.0, 0.0]])
    codes = torch.tensor([[9, 4, 2, 7]])
    for u in (0.0, 0.5, 0.999999, 1.0 - 2**-24, 1.0):
        assert draw(probabilities, codes, torch.tensor([u])).item() in (9, 4)


@pytest.mark.parametrize("temperature", [1e-300, 1e-46, 1e-38, 1e-6])
def test_the_smallest_temperatures_are_the_argmax(temperature):
    logits = torch.tensor([[1.0, 5.0, 4.9, -3.0]])
    probabilities, codes = filter_logits(logits, temperature, 0, 0.9)
    assert probabilities.tolist() == [[1, 0, 0, 0]]  # and not NaN, which draw would forgive
    assert draw(probabilities, codes, torch.tensor([0.99])).item() == 1


@pytest.mark.parametrize("int8", [False, pytest.param(True, marks=NEEDS_INT8)])
@pytest.mark.parametrize("part", ["head", "blocks.0.norm1"])
def test_logits_that_are_not_finite_are_an_error(part, int8):
    gpt = micro_gpt()
    with torch.no_grad():
        gpt.get_submodule(part).bias[3] = float("nan")
    with pytest.raises(FloatingPointError, match="not finite.* damaged"):
        Sampler(gpt, int8).sample(torch.zeros(1, 32), [0], **PLAIN)
    if not int8:
        with pytest.raises(FloatingPointError, match="do not fit torch.bfloat16: use float32"):
            Sampler(gpt.bfloat16()).sample(torch.zeros(1, 32), [0], **PLAIN)


def test_threads_that_share_a_sampler_wait_for_each_other(gpt):
    sampler, embeddings = Sampler(gpt), torch.randn(6, 32)
    alone = [sampler.sample(e[None], [i], **PLAIN) for i, e in enumerate(embeddings)]
    with ThreadPoolExecutor(6) as threads:
        drawn = threads.map(lambda i: sampler.sample(embeddings[i:i + 1], [i], **PLAIN),
                            [*range(6)] * 4)
    assert all(torch.equal(a, b) for a, b in zip(drawn, alone * 4, strict=True))


@pytest.mark.parametrize("added", [{}, ALL])
@pytest.mark.parametrize("guided", [False, True])
def test_the_step_needs_no_value_on_the_cpu(guided, added):
    """What a CUDA graph captures must not look at a tensor; on meta there is nothing to see."""
    gpt = micro_gpt(null_embedding=True, added=added)
    block = StaticRowBlock(gpt.to("meta"), ROWS, guided)
    with torch.no_grad():
        block.begin(torch.zeros(ROWS, 32, device="meta"), torch.zeros(ROWS, 16),
                    Settings(0.7, 5, 0.9, 2.0))
        block.advance(0)
    assert block.codes.shape == (ROWS, 16)


def test_uniforms_belong_to_the_seed():
    many = uniforms([3, 0, 2**31 - 1], 20)
    assert torch.equal(many[1:2], uniforms([0], 20))
    assert not torch.equal(many[0], many[1])
    assert (many >= 0).all() and (many < 1).all()


@pytest.fixture(scope="module")
def gpt():
    torch.manual_seed(1)
    return micro_gpt(null_embedding=True)


def codes_plainly(gpt, embeddings, seeds, temperature, top_k, top_p, guidance):
    """The definition: a full pass for every code, everything sorted; also how clear each draw was:
    the distance of its uniform number from the nearest end of the drawn code's interval, and of
    top-p from the nearest step of the distribution."""
    u, codes = uniforms(seeds, 16), torch.zeros(len(seeds), 0, dtype=torch.int64)
    clear = []
    for i in range(16):
        logits = gpt(embeddings, codes)[:, -1].double()
        if guidance != 1:
            null = gpt(gpt.null_embedding.expand(len(seeds), -1), codes)[:, -1].double()
            logits = null + guidance * (logits - null)
        values, order = logits.sort(1, descending=True)
        values, order = values[:, :top_k or None], order[:, :top_k or None]
        values = (values / (temperature or 1)) if temperature else values[:, :1]
        cumulative = values.softmax(1).cumsum(1)
        before = cumulative - values.softmax(1)
        kept = (before <= (top_p if top_p < 1 else 2)).sum(1, keepdim=True).clamp(min=1)
        aim = u[:, i:i + 1].double() * cumulative.gather(1, kept - 1)
        index = (cumulative <= aim).sum(1, keepdim=True).minimum(kept - 1)
        gaps = torch.cat([cumulative - aim, before[:, 1:] - (top_p if top_p < 1 else 2)], dim=1)
        clear.append(gaps.abs().amin(1) > 1e-5)
        codes = torch.cat([codes, order.gather(1, index)], dim=1)
    return codes, torch.stack(clear, 1)


@settings(deadline=None, max_examples=40)
@given(kind=st.sampled_from(["block", "static", "packed"]), count=st.integers(1, 18),
       seed=st.integers(0, 10**6), temperature=st.sampled_from([0, 0.3, 1.0, 2.0]),
       top_k=st.sampled_from([0, 1, 5, 63, 64, 99]), top_p=st.sampled_from([0.0, 0.3, 0.95, 1.0]),
       guidance=st.sampled_from([1.0, 2.5]), added=ADDED)
def test_codes_equal_the_plain_implementations(kind, count, seed, temperature, top_k, top_p,
                                               guidance, added):
    torch.manual_seed(seed)
    gpt = micro_gpt(null_embedding=True, added=added)
    embeddings, seeds = F.normalize(torch.randn(count, 32), dim=1), range(seed, seed + count)
    with torch.no_grad(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(sampling, "FEW", 6)  # small as the model: so that every way is taken
        patch.setattr(sampling, "SORTED", 8)
        patch.setattr(sampling, "BUCKET", 4)
        if kind == "static":
            patch.setattr(sampling, "RowBlock", StaticRowBlock)
        if kind != "packed":
            patch.setattr(packing, "_possible", lambda weight: False)
        ours = Sampler(gpt).sample(embeddings, seeds, temperature, top_k, top_p, guidance)
        plain, clear = codes_plainly(gpt, embeddings, seeds, temperature, top_k, top_p, guidance)
    # Up to the first draw that rounding could decide; argmax has nothing to decide.
    sure = clear.cumprod(1).bool() if temperature else torch.ones_like(clear)
    assert torch.equal(ours[sure], plain[sure])
    assert clear.float().mean() > 0.8  # else this compared too little


def test_top_p_sorts_few_codes_where_few_are_kept_and_all_where_many_are():
    steep, flat = torch.linspace(0, -60, 4 * FEW), torch.linspace(0, -1, 4 * FEW)
    for logits, width in ((steep[None], FEW), (torch.stack([steep, flat]), 4 * FEW)):
        probabilities, codes = filter_logits(logits, 1.0, 0, 0.9)
        assert probabilities.shape == codes.shape == (len(logits), width)


@settings(deadline=None, max_examples=30)
@given(seed=st.integers(0, 10**6), top_p=st.sampled_from([0.3, 0.9, 0.99]))
def test_the_company_of_a_row_changes_nothing_about_it(seed, top_p):
    """A flat row beside it makes all codes be sorted; a steep one draws from the same ones still,
    to the last bit."""
    torch.manual_seed(seed)
    steep, flat = 9 * torch.randn(1, 4 * FEW), torch.zeros(1, 4 * FEW)
    steep = steep.bfloat16().float()  # with ties
    alone = filter_logits(steep, 1.0, 0, top_p)
    beside = filter_logits(torch.cat([steep, flat]), 1.0, 0, top_p)
    assert alone[0].shape[1] == FEW < beside[0].shape[1]
    assert all(torch.equal(a[0], b[0, :FEW]) for a, b in zip(alone, beside, strict=True))
    assert beside[0][0, FEW:].sum() == 0
    for u in torch.rand(20):
        assert draw(*alone, u[None]) == draw(beside[0][:1], beside[1][:1], u[None])


@settings(deadline=None, max_examples=20)
@given(count=st.integers(1, 19), start=st.integers(0, 2**31 - 20), guidance=st.sampled_from([1, 3]),
       top_k=st.sampled_from([0, 5]),
       kind=st.sampled_from(["plain", "packed", "bfloat16", *(["int8"] if INT8 else [])]))
def test_an_image_depends_on_its_own_seed_alone(gpt, count, start, guidance, top_k, kind):
    embeddings = F.normalize(torch.randn(count, 32), dim=1)
    settings_ = PLAIN | {"guidance": guidance, "top_k": top_k}
    with pytest.MonkeyPatch.context() as patch:
        if kind == "plain":
            patch.setattr(packing, "_possible", lambda weight: False)
        own = copy.deepcopy(gpt).bfloat16() if kind == "bfloat16" else gpt
        sampler = Sampler(own, int8=kind == "int8")
    assert len(sampler.sizes) == 1 or kind != "plain"
    together = sampler.sample(embeddings, range(start, start + count), **settings_)
    for i in {0, count // 2, count - 1}:
        alone = sampler.sample(embeddings[i:i + 1], [start + i], **settings_)
        assert torch.equal(alone[0], together[i])


def test_few_images_take_a_small_block_where_products_of_any_size_agree(gpt, monkeypatch):
    monkeypatch.setattr(sampling, "rows_agree", lambda *_: True)
    sampler = Sampler(gpt)
    assert [sampler.block(n, True).rows for n in (1, 2, 3, 7, 9, 16)] == [1, 2, 4, 8, 16, 16]
    assert sampler.block(3, False) is sampler.block(4, False) is not sampler.block(4, True)
    small = sampler.block(1, False)
    assert small is sampler.block(1, False) is not sampler.block(2, False)
    assert len(sampler.blocks) == 2  # a cache is large: the last one alone is kept
    monkeypatch.setattr(sampling, "rows_agree", lambda *_: False)
    assert Sampler(gpt).block(1, True).rows == ROWS


def test_temperature_zero_is_the_argmax_of_the_full_pass(gpt):
    embeddings = F.normalize(torch.randn(3, 32), dim=1)
    codes = Sampler(gpt).sample(embeddings, [0, 1, 2], **PLAIN | {"temperature": 0, "top_k": 3})
    with torch.no_grad():
        assert torch.equal(gpt(embeddings, codes[:, :-1]).argmax(2), codes)


def test_guidance_extrapolates_from_the_null_embedding(gpt):
    embeddings = F.normalize(torch.randn(2, 32), dim=1)
    codes = Sampler(gpt).sample(embeddings, [0, 1], **PLAIN | {"temperature": 0, "guidance": 4.0})
    with torch.no_grad():
        null = gpt(gpt.null_embedding.expand(2, -1), codes[:, :-1])
        logits = null + 4 * (gpt(embeddings, codes[:, :-1]) - null)
    assert torch.equal(logits.argmax(2), codes)


def test_a_broken_off_image_leaves_nothing_behind(gpt, monkeypatch):
    sampler = Sampler(gpt)
    embedding = F.normalize(torch.randn(1, 32), dim=1)
    expected = sampler.sample(embedding, [5], **PLAIN)
    steps = iter(range(9))
    original = gpt.code_embedding.forward
    monkeypatch.setattr(gpt.code_embedding, "forward", lambda c: (next(steps), original(c))[1])
    with pytest.raises(StopIteration):
        sampler.sample(-embedding, [6], **PLAIN)
    monkeypatch.undo()
    assert torch.equal(sampler.sample(embedding, [5], **PLAIN), expected)


@pytest.mark.parametrize("change, words", [
    ({"temperature": -1}, "temperature must be a number from 0 to 1000, got -1"),
    ({"temperature": float("nan")}, "temperature .* got nan"),
    ({"temperature": "1"}, "temperature must be a number .* got '1'"),
    ({"top_k": True}, "top_k must be a whole number.* got True"),
    ({"top_p": True}, "top_p must be a number .* got True"),
    ({"guidance": 1e38}, "guidance must be a number from 0 to 1000, got 1e"),
    ({"top_k": -3}, "top_k .* got -3"),
    ({"top_k": 2.5}, "top_k must be a whole number.* got 2.5"),
    ({"top_p": 1.5}, "top_p must be a number from 0 to 1, got 1.5"),
    ({"guidance": -2}, "guidance .* got -2")])
def test_settings_out_of_range_are_named(gpt, change, words):
    with pytest.raises(ValueError, match=words):
        Sampler(gpt).sample(torch.zeros(1, 32), [0], **PLAIN | change)


def test_guidance_without_a_null_embedding_is_refused():
    with pytest.raises(ValueError, match="guidance 2.0 needs a GPT .* use guidance 1"):
        Sampler(micro_gpt()).sample(torch.zeros(1, 32), [0], **PLAIN | {"guidance": 2.0})


def test_wrong_shapes_are_named(gpt):
    with pytest.raises(ValueError, match=r"shape \(N, 32\), got \(1, 5\)"):
        Sampler(gpt).sample(torch.zeros(1, 5), [0], **PLAIN)
    with pytest.raises(ValueError, match="embeddings must be finite"):
        Sampler(gpt).sample(torch.full((1, 32), float("nan")), [0], **PLAIN)
    with pytest.raises(ValueError, match="2 embeddings need as many seeds, got 1"):
        Sampler(gpt).sample(torch.zeros(2, 32), [0], **PLAIN)
    assert Sampler(gpt).sample(torch.zeros(0, 32), [], **PLAIN).shape == (0, 16)


# Forced codes and negatives


@functools.lru_cache
def sampler_of(kind, gpt):
    with pytest.MonkeyPatch.context() as patch:
        if kind != "packed":
            patch.setattr(packing, "_possible", lambda weight: False)
        sampler = Sampler(gpt)
    if kind == "static":  # else made at the first call, of the kind that suits the device
        sampler.blocks = {guided: StaticRowBlock(gpt, ROWS, guided) for guided in (False, True)}
        sampler.sizes = (ROWS,)
    return sampler


@settings(deadline=None, max_examples=20)
@given(kind=st.sampled_from(["block", "static", "packed"]), count=st.integers(1, 19),
       seed=st.integers(0, 10**6), guidance=st.sampled_from([1.0, 2.5]),
       share=st.sampled_from([0.0, 0.3, 0.7, 1.0]))
def test_forced_codes_are_written_and_steer_the_others(gpt, kind, count, seed, guidance, share):
    generator = torch.Generator().manual_seed(seed)
    sampler, drawn = sampler_of(kind, gpt), PLAIN | {"guidance": guidance}
    embeddings = F.normalize(torch.randn(count, 32, generator=generator), dim=1)
    seeds = range(seed, seed + count)
    codes = torch.randint(64, (count, 16), generator=generator)
    forced = codes.where(torch.rand(count, 16, generator=generator) < share, -1)
    free = sampler.sample(embeddings, seeds, **drawn)
    made = sampler.sample(embeddings, seeds, **drawn, forced=forced)
    assert torch.equal(made[forced >= 0], forced[forced >= 0])
    if share == 0:
        assert torch.equal(made, free)
    if share == 1:
        assert torch.equal(made, codes)
    # The codes drawn before the first forced one know nothing of it.
    before = (forced >= 0).cumsum(1) == 0
    assert torch.equal(made[before], free[before])
    # What is made is what the same codes, forced one after the other, make of the next one.
    again = made.where(torch.arange(16) < 9, forced)
    assert torch.equal(sampler.sample(embeddings, seeds, **drawn, forced=again), made)
    # A row stands alone, and leaves nothing behind.
    alone = sampler.sample(embeddings[-1:], seeds[-1:], **drawn, forced=forced[-1:])
    assert torch.equal(alone[0], made[-1])
    assert torch.equal(sampler.sample(embeddings, seeds, **drawn), free)


@pytest.mark.parametrize("kind", ["block", "static"])
def test_a_negative_takes_the_null_embeddings_place(gpt, kind):
    embeddings, negative = F.normalize(torch.randn(3, 32), dim=1).split([2, 1])
    argmax = PLAIN | {"temperature": 0, "guidance": 4.0}
    codes = sampler_of(kind, gpt).sample(embeddings, [0, 1], **argmax, negative=negative[0])
    with torch.no_grad():
        away = gpt(negative.expand(2, -1), codes[:, :-1])
        logits = away + 4 * (gpt(embeddings, codes[:, :-1]) - away)
    assert torch.equal(logits.argmax(2), codes)
    same = sampler_of(kind, gpt).sample(embeddings, [0, 1], **argmax,
                                        negative=gpt.null_embedding.detach())
    assert torch.equal(same, sampler_of(kind, gpt).sample(embeddings, [0, 1], **argmax))


def test_a_negative_needs_no_null_embedding():
    e = F.normalize(torch.randn(2, 32), dim=1)
    codes = Sampler(micro_gpt()).sample(e[:1], [0], **PLAIN | {"guidance": 3.0}, negative=e[1])
    assert codes.shape == (1, 16)


def test_progress_counts_every_code_once(gpt):
    seen = []
    Sampler(gpt).sample(torch.zeros(19, 32), range(19), **PLAIN,
                        progress=lambda *counts: seen.append(counts))
    assert len(seen) == 2 * 16 and seen == sorted(seen)
    assert {total for _, total in seen} == {19 * 16} and seen[-1][0] == 19 * 16


@pytest.mark.parametrize("forced, words", [
    (torch.zeros(2, 16), "forced codes must be whole numbers, got torch.float32"),
    (torch.zeros(2, 16, dtype=torch.bool), "whole numbers, got torch.bool"),
    (torch.zeros(2, 15, dtype=torch.int64), r"shape \(2, 16\), got \(2, 15\)"),
    (torch.full((2, 16), 64), "from 0 to 63, or -1 where a code is drawn, got 64"),
    (torch.full((2, 16), -2), "got -2")])
def test_forced_codes_that_cannot_be_are_named(gpt, forced, words):
    with pytest.raises(ValueError, match=words):
        Sampler(gpt).sample(torch.zeros(2, 32), [0, 1], **PLAIN, forced=forced)
    with pytest.raises(ValueError, match=r"negative must have shape \(32,\), got \(1, 32\)"):
        Sampler(gpt).sample(torch.zeros(1, 32), [0], **PLAIN, negative=torch.zeros(1, 32))
