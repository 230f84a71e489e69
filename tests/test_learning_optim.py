"""Steps of the optimizers, the learning rate and the moving average, against plain lines."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from scripts.training.optim import (
    EMA,
    Muon,
    adamw,
    decay_groups,
    learning_rate,
    muon,
    set_learning_rate,
)
from tests.micro import micro_clip, micro_gpt, micro_vqgan

LR, DECAY = 0.01, 0.1


def adamw_plainly(p: float, gradients: list[float], decay: float) -> float:
    """arXiv 1711.05101, algorithm 2, a number at a time."""
    m = v = 0.0
    for t, g in enumerate(gradients, 1):
        m, v = 0.9 * m + 0.1 * g, 0.95 * v + 0.05 * g * g
        p -= LR * decay * p
        p -= LR * (m / (1 - 0.9**t)) / (math.sqrt(v / (1 - 0.95**t)) + 1e-8)
    return p


def test_adamw_steps_of_a_matrix_decay_and_those_of_a_bias_do_not():
    torch.manual_seed(0)
    module = torch.nn.Linear(2, 2)
    before = {name: p.detach().clone() for name, p in module.named_parameters()}
    optimizer = adamw(module, LR, DECAY)
    gradients = {name: torch.randn(5, *p.shape) for name, p in module.named_parameters()}
    for t in range(5):
        for name, p in module.named_parameters():
            p.grad = gradients[name][t].clone()
        optimizer.step()
    for name, p in module.named_parameters():
        decay = DECAY if name == "weight" else 0.0
        expected = [adamw_plainly(x, g, decay) for x, g in zip(
            before[name].flatten().tolist(), gradients[name].flatten(1).T.tolist(), strict=True)]
        assert p.detach().flatten().tolist() == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("make", [micro_gpt, micro_vqgan, micro_clip])
def test_biases_norms_and_vectors_do_not_decay(make):
    module = make().requires_grad_(True)
    made = [[adamw(module, LR, DECAY)]]
    if hasattr(module, "blocks"):
        made.append(muon(module, LR, DECAY))
    for optimizers in made:
        decays = {id(p): group["weight_decay"] for optimizer in optimizers
                  for group in optimizer.param_groups for p in group["params"]}
        for name, p in module.named_parameters():
            vector = p.dim() < 2
            assert decays.pop(id(p)) == (0.0 if vector else DECAY), name
            assert vector or "bias" not in name
        assert not decays


def test_every_parameter_is_in_one_group_and_frozen_ones_in_none():
    vqgan = micro_vqgan().requires_grad_(True)
    vqgan.encoder.requires_grad_(False)
    held = [p for group in adamw(vqgan, LR, DECAY).param_groups for p in group["params"]]
    assert {id(p) for p in held} == {id(p) for p in vqgan.parameters() if p.requires_grad}
    assert len(held) == len({id(p) for p in held})
    groups = decay_groups(vqgan.decoder.parameters(), DECAY)
    assert [group["weight_decay"] for group in groups] == [DECAY, 0.0]


def muon_plainly(p, gradients, parts):
    """Nesterov momentum, five steps of Newton and Schulz, 0.2 sqrt(longer side), decay."""
    momentum = torch.zeros_like(p)
    for g in gradients:
        momentum = 0.95 * momentum + 0.05 * g
        ahead = 0.95 * momentum + 0.05 * g
        p = p * (1 - LR * DECAY)
        moves = []
        for part in ahead.chunk(parts):
            x = part.T if part.shape[0] > part.shape[1] else part
            x = x / x.norm()
            for _ in range(5):
                x = 3.4445 * x - 4.775 * x @ x.T @ x + 2.0315 * x @ x.T @ x @ x.T @ x
            moves.append(x.T if part.shape[0] > part.shape[1] else x)
        p = p - LR * 0.2 * max(moves[0].shape) ** 0.5 * torch.cat(moves)
    return p


@pytest.mark.parametrize("rows, columns, parts", [(6, 4, 1), (4, 6, 1), (12, 4, 3), (5, 5, 1)])
def test_muon_steps(rows, columns, parts):
    torch.manual_seed(0)
    p = torch.nn.Parameter(torch.randn(rows, columns))
    start, gradients = p.detach().clone(), torch.randn(4, rows, columns)
    optimizer = Muon([{"params": [p], "parts": parts, "weight_decay": DECAY}], lr=LR)
    for g in gradients:
        p.grad = g.clone()
        optimizer.step()
    torch.testing.assert_close(p.detach(), muon_plainly(start, gradients, parts), atol=1e-4,
                               rtol=1e-4)


# The learning rate


@pytest.mark.parametrize("step, expected", [
    (0, 0.01), (49, 0.5), (99, 1.0), (100, 1.0), (550, 0.01 + 0.99 / 2),
    (775, 0.01 + 0.99 * 0.5 * (1 - math.sqrt(0.5))), (1000, 0.01), (5000, 0.01)])
def test_learning_rates_of_known_steps(step, expected):
    assert learning_rate(step, 1000, 1.0, 100) == pytest.approx(expected)


@given(st.integers(1, 3000), st.integers(0, 3000), st.floats(1e-6, 1))
@settings(deadline=None, max_examples=50)
def test_every_step_learns_and_none_more_than_the_peak(steps, warmup, peak):
    rates = [learning_rate(step, steps, peak, warmup) for step in range(steps)]
    assert min(rates) > 0 and max(rates) == pytest.approx(peak)


def test_the_rate_that_is_set_is_the_rate_of_the_step():
    p = torch.nn.Linear(1, 1, bias=False)
    torch.nn.init.zeros_(p.weight)
    optimizer = adamw(p, 1.0, 0.0)
    set_learning_rate(optimizer, 0.125)
    p.weight.grad = torch.ones(1, 1)
    optimizer.step()
    assert p.weight.item() == pytest.approx(-0.125)  # Adam's first step is the rate itself


# The moving average


def test_the_average_is_the_plain_recurrence():
    torch.manual_seed(0)
    module = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.BatchNorm1d(2))
    average = EMA(module, 0.9)
    expected = [x.item() for x in module[0].weight.detach().flatten()]
    for step in range(200):
        with torch.no_grad():
            module[0].weight.add_(torch.randn(2, 3))
            module[1].num_batches_tracked += 1
        average.update(module, step)
        decay = min(0.9, (1 + step) / (10 + step))  # early weights are forgotten soon
        expected = [decay * e + (1 - decay) * x for e, x in
                    zip(expected, module[0].weight.flatten().tolist(), strict=True)]
    assert average.state()["0.weight"].flatten().tolist() == pytest.approx(expected, abs=1e-4)
    assert average.state()["1.num_batches_tracked"] == 200  # counts are copied, not averaged
    assert not torch.equal(average.state()["0.weight"], module[0].weight)


def test_the_average_does_not_share_memory_with_what_it_averages():
    module = torch.nn.Linear(2, 2)
    average = EMA(module, 0.9)
    before = average.state()["weight"].clone()
    with torch.no_grad():
        module.weight.add_(1)
    assert torch.equal(average.state()["weight"], before)
