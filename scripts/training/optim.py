"""Optimizers, learning rate and moving average that all trainings share.

Muon: matrices move along their orthogonalised momentum (K. Jordan and others, 2024).  torch has one
from 2.9 on; this one also treats query, key and value, which stand on top of each other in one
matrix, as the three that they are.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from clipgen.device import default_dtype

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
    """Two groups for an optimizer, which decays matrices alone, not biases, norms and vectors."""
    parameters = list(parameters)
    return [{"params": [p for p in parameters if p.dim() > 1], "weight_decay": decay},
            {"params": [p for p in parameters if p.dim() <= 1], "weight_decay": 0.0}]


def adamw(module: nn.Module, peak: float, decay: float) -> torch.optim.AdamW:
    """AdamW (0.9, 0.95) that decays matrices alone."""
    parameters = [p for p in module.parameters() if p.requires_grad]
    return torch.optim.AdamW(decay_groups(parameters, decay), lr=peak, betas=BETAS,
                             fused=parameters[0].is_cuda)


class EMA:
    """Exponential moving average of a module's parameters and buffers: `module`, in eval mode."""

    def __init__(self, module: nn.Module, decay: float):
        self.decay = decay
        self.module = copy.deepcopy(module).eval().requires_grad_(False)

    @torch.no_grad()
    def update(self, module: nn.Module, step: int) -> None:
        decay = min(self.decay, (1 + step) / (10 + step))  # early weights are forgotten soon
        mine, now = self.state(), module.state_dict()
        floating = [k for k, v in now.items() if v.is_floating_point()]
        torch._foreach_lerp_([mine[k] for k in floating], [now[k] for k in floating], 1 - decay)
        for name in now.keys() - set(floating):
            mine[name].copy_(now[name])

    def state(self) -> dict[str, Tensor]:
        return self.module.state_dict()

    def load(self, state: dict[str, Tensor]) -> None:
        self.module.load_state_dict(state)


MOMENTUM = 0.95
COEFFICIENTS = 3.4445, -4.7750, 2.0315  # a quintic that takes 0.0015 to 1 near 1 in five steps


def orthogonal(matrices: Tensor) -> Tensor:
    """Matrices (B, rows, columns) with their singular values moved near 1, to 0.68 to 1.2, but for
    those below 0.0015 of the matrix's length.  Five Newton-Schulz steps."""
    tall = matrices.shape[1] > matrices.shape[2]
    x = matrices.mT if tall else matrices
    x = (x / (x.norm(dim=(1, 2), keepdim=True) + 1e-12)).to(default_dtype(x.device))
    long = x.dtype == torch.float32 and x.shape[2] >= 2 * x.shape[1]
    x = by_squares(x) if long else newton_schulz(x)
    return (x.mT if tall else x).to(matrices)


def newton_schulz(x: Tensor) -> Tensor:
    a, b, c = COEFFICIENTS
    for _ in range(5):
        square = x @ x.mT
        x = a * x + (b * square + c * square @ square) @ x
    return x


def by_squares(x: Tensor) -> Tensor:
    """As `newton_schulz`: the steps multiply x from the left, by what its square alone decides, so
    that all but two products are of rows by rows.  A square has twice the digits: float32 alone."""
    a, b, c = COEFFICIENTS
    square = x @ x.mT
    one = torch.eye(x.shape[1], device=x.device)
    product = one.expand_as(square)
    for _ in range(5):
        factor = a * one + torch.baddbmm(square, square, square, beta=b, alpha=c)
        product = factor @ product
        square = factor @ square @ factor
    return product @ x


class Muon(torch.optim.Optimizer):
    """Muon for groups of matrices of one shape.

    A matrix moves along its orthogonalised Nesterov momentum, times 0.2 sqrt(longer side), which
    makes its steps as long as AdamW's usually are: one learning rate and decay suit both
    (arXiv 2502.16982, section 2.2).  `parts` matrices stand on top of each other in each; a
    convolution's weight is one whose rows are its outputs.
    """

    def __init__(self, groups: list[dict[str, Any]], lr: float):
        super().__init__(groups, {"lr": lr, "weight_decay": 0.0, "parts": 1})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        for group in self.param_groups:
            parameters = [p for p in group["params"] if p.grad is not None]
            if not parameters:
                continue
            for p in parameters:
                if not self.state[p]:
                    self.state[p] = {"momentum": torch.zeros_like(p)}
            momenta = [self.state[p]["momentum"] for p in parameters]
            gradients = [p.grad for p in parameters]
            torch._foreach_lerp_(momenta, gradients, 1 - MOMENTUM)
            ahead = torch.stack(torch._foreach_lerp(gradients, momenta, MOMENTUM))
            rows = ahead.flatten(2)  # (B, outputs, inputs * kernel height * kernel width)
            single = rows.reshape(-1, rows.shape[1] // group["parts"], rows.shape[2])
            moves = orthogonal(single) * (0.2 * max(single.shape[1:]) ** 0.5)
            torch._foreach_mul_(parameters, 1 - group["lr"] * group["weight_decay"])
            torch._foreach_add_(parameters, list(moves.reshape(ahead.shape)), alpha=-group["lr"])


def muon_and_adamw(groups: list[dict[str, Any]], module: nn.Module, peak: float,
                   decay: float) -> list[torch.optim.Optimizer]:
    """Muon for the groups, AdamW for what else the module trains."""
    matrices = {p for group in groups for p in group["params"]}
    rest = [p for p in module.parameters() if p.requires_grad and p not in matrices]
    return [Muon(groups, peak), torch.optim.AdamW(decay_groups(rest, decay), lr=peak, betas=BETAS,
                                                  fused=rest[0].is_cuda)]


def muon(gpt: nn.Module, peak: float, decay: float) -> list[torch.optim.Optimizer]:
    """Muon for the matrices of a GPT's blocks; AdamW for all else."""
    kinds: dict[str, list[nn.Parameter]] = {}  # such as "qkv.weight": that of every layer
    for block in gpt.blocks:
        for name, p in block.named_parameters():
            if p.dim() == 2:
                kinds.setdefault(name, []).append(p)
    groups = [{"params": matrices, "weight_decay": decay,
               "parts": 3 if name.startswith("qkv") else 1} for name, matrices in kinds.items()]
    return muon_and_adamw(groups, gpt, peak, decay)


def muon_vqgan(vqgan: nn.Module, peak: float, decay: float) -> list[torch.optim.Optimizer]:
    """Muon for what lies between a VQGAN's first and last convolutions; AdamW for all else."""
    kinds: dict[tuple, list[nn.Parameter]] = {}
    for part in (vqgan.encoder.down, vqgan.encoder.mid, vqgan.decoder.mid, vqgan.decoder.up):
        for name, p in part.named_parameters():
            if p.requires_grad and p.dim() > 1:
                parts = 3 if name.endswith("in_proj_weight") else 1
                kinds.setdefault((parts, *p.shape), []).append(p)
    groups = [{"params": matrices, "weight_decay": decay, "parts": kind[0]}
              for kind, matrices in kinds.items()]
    return muon_and_adamw(groups, vqgan, peak, decay)


def adamw_alone(module: nn.Module, peak: float, decay: float) -> list[torch.optim.Optimizer]:
    """AdamW for all that the module trains."""
    return [adamw(module, peak, decay)]
