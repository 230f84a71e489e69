"""Packed weights: the products are those of the plain ones, and the model given stays as it was."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from clipgen import packed as packing
from clipgen.gpt import LinearGELU, LinearSquaredReLU
from clipgen.packed import Int8Linear, PackedLinear, packed, rounded, rows_agree
from clipgen.sampling import Sampler
from tests.marks import NEEDS_INT8
from tests.micro import micro_gpt

# Linear layers, and what they do with their products.
KINDS = {nn.Linear: lambda x: x, LinearGELU: F.gelu,
         LinearSquaredReLU: lambda x: x.clamp(min=0) ** 2}
DTYPES = [dtype for dtype in (torch.float32, torch.bfloat16)
          if packing._possible(torch.zeros(1, dtype=dtype))]


def test_this_torch_has_the_operators():
    assert torch.float32 in DTYPES  # else nothing below would be tested


@settings(deadline=None, max_examples=60)
@given(shape=st.tuples(st.integers(1, 300), st.integers(1, 300)), rows=st.integers(1, 40),
       given_rows=st.integers(1, 40), dtype=st.sampled_from(DTYPES),
       kind=st.sampled_from(list(KINDS)), seed=st.integers(0, 10**6))
@torch.inference_mode()
def test_products_equal_the_plain_ones(shape, rows, given_rows, dtype, kind, seed):
    torch.manual_seed(seed)
    linear = kind(*shape, dtype=dtype)
    x = torch.randn(given_rows, 1, shape[0], dtype=dtype)
    exact = F.linear(x.double(), linear.weight.double(), linear.bias.double())
    exact = KINDS[kind](exact)
    ours = PackedLinear(linear, rows)(x)
    assert ours.dtype == dtype
    tolerance = {"atol": 1e-4, "rtol": 1e-5} if dtype is torch.float32 else {"atol": 2e-2,
                                                                            "rtol": 1e-2}
    torch.testing.assert_close(ours.double(), exact, **tolerance)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("added", [{}, {"neighbours": 3, "layouts": 3, "modulated": True,
                                         "squared_relu": True}])
def test_a_packed_gpt_answers_as_the_plain_one_which_stays_trainable(dtype, added):
    gpt = micro_gpt(added=added).to(dtype)
    before = {name: tensor.clone() for name, tensor in gpt.state_dict().items()}
    twin = packed(gpt, 8)
    kinds = [type(module) for module in twin.modules()]
    assert PackedLinear in kinds and nn.Linear not in kinds
    assert twin.code_embedding is gpt.code_embedding and twin.position is gpt.position
    embedding, codes = F.normalize(torch.randn(3, 32), dim=1), torch.randint(64, (3, 15))
    with torch.no_grad():
        tolerance = 1e-5 if dtype is torch.float32 else 0.1
        torch.testing.assert_close(twin(embedding, codes), gpt(embedding, codes), rtol=0,
                                   atol=tolerance)
    assert nn.Linear in map(type, gpt.modules()) and PackedLinear not in map(type, gpt.modules())
    assert all(torch.equal(before[name], tensor) for name, tensor in gpt.state_dict().items())
    gpt(embedding, codes).float().sum().backward()
    assert gpt.blocks[0].qkv.weight.grad is not None


@settings(deadline=None, max_examples=60)
@given(shape=st.tuples(st.integers(1, 40), st.integers(1, 80)), odd=st.integers(0, 15),
       dtype=st.sampled_from(DTYPES), kind=st.sampled_from(list(KINDS)),
       seed=st.integers(0, 10**6))
@torch.inference_mode()
def test_where_rows_agree_a_row_does_not_depend_on_the_rows_beside_it(shape, odd, dtype, kind,
                                                                      seed):
    torch.manual_seed(seed)
    outputs, inputs = (16 * n + odd for n in shape)
    linear = PackedLinear(kind(inputs, outputs, dtype=dtype), 16)
    x = torch.randn(32, inputs, dtype=dtype)
    together = linear(x)
    if rows_agree(linear, (1, 2, 8, 16, 32)):
        for start, count in (0, 1), (31, 1), (7, 2), (16, 8), (0, 16):
            assert torch.equal(linear(x[start:start + count]), together[start:start + count])


@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_that_do_not_agree_are_noticed(monkeypatch, dtype):
    """Also where they differ by float32's rounding alone, which bfloat16 would mostly hide."""
    assert not rows_agree(nn.Linear(4, 4), (1, 2))  # not packed
    linear = PackedLinear(nn.Linear(256, 256, dtype=dtype), 2)
    agree = rows_agree(linear, (1, 2))
    assert agree or dtype is not torch.float32  # in bfloat16, where it is emulated, they do not

    def forward(self, x):
        """Added up in two parts where there is one row."""
        assert self is not linear  # its numbers need not show it
        weight = self._weight.to_dense().float()
        cut = 100 if len(x) == 1 else 0
        x = x.float()
        return (x[:, :cut] @ weight[:, :cut].T + x[:, cut:] @ weight[:, cut:].T).to(dtype)

    monkeypatch.setattr(PackedLinear, "forward", forward)
    assert not rows_agree(linear, (1, 2))


def test_without_the_operators_all_runs_plainly(monkeypatch):
    gpt = micro_gpt()
    arguments = F.normalize(torch.randn(2, 32), dim=1), [1, 2], 1.0, 0, 1.0, 1.0
    fast = Sampler(gpt).sample(*arguments)
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    assert packed(gpt, 8) is gpt
    assert torch.equal(Sampler(gpt).sample(*arguments), fast)


@NEEDS_INT8
@settings(deadline=None, max_examples=40)
@given(shape=st.tuples(st.integers(1, 300), st.integers(1, 300)), rows=st.integers(1, 40),
       scale=st.sampled_from([1e-20, 1.0, 1e6]), seed=st.integers(0, 10**6))
@torch.inference_mode()
def test_int8_products_are_near_and_each_row_for_itself(shape, rows, scale, seed):
    torch.manual_seed(seed)
    linear = nn.Linear(*shape)
    x = scale * torch.randn(rows, 1, shape[0])
    x[0] = 0
    ours, exact = Int8Linear(linear)(x), linear(x)
    # Each of the two roundings is off by at most half of 1/127 of the largest.
    w, bound = linear.weight.abs(), 0.5 / 127
    error = bound * (x.abs().sum(-1, keepdim=True) * w.amax(1)
                     + x.abs().amax(-1, keepdim=True) * w.sum(1) * 1.01)
    assert ((ours - exact).abs() <= error + 1e-5 * exact.abs() + 1e-6).all()
    for i in {0, rows // 2, rows - 1}:
        assert torch.equal(Int8Linear(linear)(x[i:i + 1])[0], ours[i])


@NEEDS_INT8
def test_with_int8_every_weight_is_rounded_and_small_blocks_do():
    sampler = Sampler(micro_gpt(), int8=True)
    kinds = [type(module) for module in sampler.gpt.modules()]
    assert Int8Linear in kinds and nn.Linear not in kinds and PackedLinear not in kinds
    assert sampler.sizes[0] == 1


def test_int8_where_it_cannot_be_is_one_sentence(monkeypatch):
    with pytest.raises(ValueError, match="^dtype int8 is for CPUs, got device meta"):
        rounded(micro_gpt().to("meta"))
    monkeypatch.setattr(torch.cpu, "_is_vnni_supported", lambda: False)
    with pytest.raises(ValueError, match="^dtype int8 needs a CPU with .* use float32$"):
        rounded(micro_gpt())
