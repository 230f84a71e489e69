"""Muon: its steps are orthogonal and as long as AdamW's, and what is no matrix gets AdamW's."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from scripts.training.optim import Muon, adamw_alone, muon, muon_vqgan, orthogonal
from tests.micro import micro_gpt, micro_vqgan


@settings(deadline=None, max_examples=50)
@given(rows=st.integers(1, 40), columns=st.integers(1, 40), scale=st.sampled_from([1e-6, 1, 1e6]),
       seed=st.integers(0, 10**6))
def test_singular_values_come_near_1_and_singular_vectors_stay(rows, columns, scale, seed):
    torch.manual_seed(seed)
    u, _, v = torch.linalg.svd(torch.randn(2, rows, columns), full_matrices=False)
    values = torch.rand(2, min(rows, columns))
    values = values.clamp(min=0.0016 * values.norm(dim=1).max())
    found = u.mT @ orthogonal(scale * u * values[:, None] @ v) @ v.mT
    new = found.diagonal(dim1=1, dim2=2)
    assert new.min() > 0.67 and new.max() < 1.21
    torch.testing.assert_close(found, torch.diag_embed(new), atol=1e-3, rtol=0)


def trained(make, steps, decay=0.1):
    """A micro GPT before and after steps along random gradients."""
    torch.manual_seed(0)
    gpt = micro_gpt(null_embedding=True).train().requires_grad_(True)
    before = copy.deepcopy(gpt)
    optimizers = make(gpt, 1e-3, decay)
    for _ in range(steps):
        for p in gpt.parameters():
            p.grad = torch.randn_like(p)
        take_a_step(optimizers)
    return dict(before.named_parameters()), dict(gpt.named_parameters()), optimizers


def take_a_step(optimizers):
    for optimizer in optimizers:
        optimizer.step()


def test_the_matrices_of_the_blocks_get_muon_and_all_else_adamw():
    before, ours, _ = trained(muon, 3)
    _, theirs, _ = trained(adamw_alone, 3)
    for name, p in ours.items():
        hidden = name.startswith("blocks.") and p.dim() == 2
        assert torch.equal(p, theirs[name]) != hidden, name
        assert not torch.equal(p, before[name])


def test_a_step_is_orthogonal_in_query_key_and_value_each_and_decays():
    before, after, _ = trained(muon, 1, decay=100)
    for name, parts in ("blocks.0.qkv.weight", 3), ("blocks.1.fc1.weight", 1):
        move = (0.9 * before[name] - after[name]).detach() / 1e-3  # decay: 1e-3 * 100
        for part in move.chunk(parts):
            values = torch.linalg.svdvals(part) / (0.2 * max(part.shape) ** 0.5)
            assert values.min() > 0.5 and values.max() < 1.35
        assert move.pow(2).mean().sqrt() == pytest.approx(0.2, rel=0.3)  # as AdamW's usually are


def test_momentum_carries_a_step_past_one_opposite_gradient():
    torch.manual_seed(0)
    p = torch.nn.Parameter(torch.zeros(4, 4))
    optimizer = Muon([{"params": [p], "parts": 1, "weight_decay": 0.0}], lr=1.0)
    gradient = torch.randn(4, 4)
    moves = []
    for sign in (1, 1, 1, -1):
        before = p.detach().clone()
        p.grad = sign * gradient
        optimizer.step()
        moves.append((p - before).flatten() @ gradient.flatten())
    assert max(moves) < 0


def test_its_state_goes_on_where_it_was():
    _, gpt, optimizers = trained(muon, 2)
    other = micro_gpt(null_embedding=True).requires_grad_(True)
    other.load_state_dict({k: v.detach().clone() for k, v in gpt.items()}, strict=False)
    resumed = muon(other, 1e-3, 0.1)
    for new, old in zip(resumed, optimizers, strict=True):
        new.load_state_dict(copy.deepcopy(old.state_dict()))
    for name, p in other.named_parameters():
        p.grad = torch.randn_like(p)
        gpt[name].grad = p.grad.clone()
    take_a_step(optimizers)
    take_a_step(resumed)
    assert all(torch.equal(p, gpt[name]) for name, p in other.named_parameters())


def test_convolutions_between_the_first_and_the_last_move_as_matrices():
    torch.manual_seed(0)
    vqgan = micro_vqgan(levels=2).train().requires_grad_(True)
    vqgan.to(memory_format=torch.channels_last)
    before = {name: p.detach().clone() for name, p in vqgan.named_parameters()}
    optimizers = muon_vqgan(vqgan, 1e-3, 0.0)
    for p in vqgan.parameters():
        p.grad = torch.randn_like(p)
    take_a_step(optimizers)
    for name, p in vqgan.named_parameters():
        move = (before[name] - p.detach()) / 1e-3
        hidden = p.dim() > 1 and name.split(".")[1] in ("down", "mid", "up")
        for part in move.flatten(1).chunk(3 if "in_proj" in name else 1) if hidden else ():
            values = torch.linalg.svdvals(part) / (0.2 * max(part.shape) ** 0.5)
            # The least value of a square random matrix may be too small to be raised.
            assert values[:-1].min() > 0.5 and values.max() < 1.35, name
        if not hidden:  # AdamW's first step: the sign of each gradient
            torch.testing.assert_close(move.abs(), torch.ones_like(move), atol=1e-2, rtol=0)


def test_a_decoder_alone_is_all_that_moves():
    vqgan = micro_vqgan(levels=2).train().requires_grad_(True)
    for part in (vqgan.encoder, vqgan.quantizer):
        part.requires_grad_(False)
    given = {p for optimizer in muon_vqgan(vqgan, 1e-3, 0.0)
             for group in optimizer.param_groups for p in group["params"]}
    assert given == set(vqgan.decoder.parameters())
