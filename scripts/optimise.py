"""The optimiser, the learning rate and the moving average that all training runs share."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

BETAS = 0.9, 0.95


def learning_rate(step: int, steps: int, peak: float, warmup: int) -> float:
    """Linear warm-up from peak / warmup (never 0), then a cosine to a hundredth of the peak.

    The warm-up takes `warmup` steps, or a tenth of a run shorter than ten of them.
    """
    warmup = max(1, min(warmup, steps // 10))
    if step < warmup:
        return peak * (step + 1) / warmup
    done = min(1.0, (step - warmup) / max(1, steps - warmup))
    return peak * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * done)))


def set_learning_rate(optimizer: torch.optim.Optimizer, value: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = value


def decay_groups(parameters: Iterable[nn.Parameter], decay: float) -> list[dict[str, Any]]:
    """Two groups for an optimiser, which decays matrices alone, not biases, norms and vectors."""
    parameters = list(parameters)
    return [{"params": [p for p in parameters if p.dim() > 1], "weight_decay": decay},
            {"params": [p for p in parameters if p.dim() <= 1], "weight_decay": 0.0}]


def adamw(module: nn.Module, peak: float, decay: float) -> torch.optim.AdamW:
    """AdamW (0.9, 0.95) that decays matrices alone."""
    parameters = [p for p in module.parameters() if p.requires_grad]
    return torch.optim.AdamW(decay_groups(parameters, decay), lr=peak, betas=BETAS,
                             fused=parameters[0].is_cuda)


class Average:
    """Exponential moving average of a module's parameters and buffers, in float32."""

    def __init__(self, module: nn.Module, decay: float):
        self.decay = decay
        self.state = {k: v.detach().clone() for k, v in module.state_dict().items()}

    @torch.no_grad()
    def update(self, module: nn.Module, step: int) -> None:
        decay = min(self.decay, (1 + step) / (10 + step))  # early weights are forgotten soon
        now = module.state_dict()
        floating = [k for k, v in now.items() if v.is_floating_point()]
        torch._foreach_lerp_([self.state[k] for k in floating], [now[k] for k in floating],
                             1 - decay)
        for name in now.keys() - set(floating):
            self.state[name].copy_(now[name])

    def load(self, state: dict[str, torch.Tensor]) -> None:
        for name, value in state.items():
            self.state[name].copy_(value)
