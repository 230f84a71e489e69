"""Muon: matrices move along their orthogonalised momentum (K. Jordan and others, 2024).

torch has one from 2.9 on; this one also treats query, key and value, which stand on top of each
other in one matrix, as the three that they are.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from clipgen.pipeline import default_dtype
from scripts.optimise import BETAS, decay_groups

MOMENTUM = 0.95
COEFFICIENTS = 3.4445, -4.7750, 2.0315  # a quintic that takes 0.0015 to 1 near 1 in five steps


def orthogonal(matrices: Tensor) -> Tensor:
    """Matrices (B, rows, columns) with their singular values moved near 1, to 0.68 to 1.2, but for
    those below 0.0015 of the matrix's length.  Five Newton-Schulz steps."""
    a, b, c = COEFFICIENTS
    tall = matrices.shape[1] > matrices.shape[2]
    x = matrices.mT if tall else matrices
    x = (x / (x.norm(dim=(1, 2), keepdim=True) + 1e-12)).to(default_dtype(x.device))
    for _ in range(5):
        square = x @ x.mT
        x = a * x + (b * square + c * square @ square) @ x
    return (x.mT if tall else x).to(matrices)


class Muon(torch.optim.AdamW):
    """Muon for groups with `parts`, matrices of one shape; AdamW for the others.

    A matrix moves along its orthogonalised Nesterov momentum, times 0.2 sqrt(longer side), which
    makes its steps as long as AdamW's usually are: one learning rate and decay suit both
    (arXiv 2502.16982, section 2.2).  `parts` matrices stand on top of each other in each.
    """

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        for group in self.param_groups:
            parameters = [p for p in group["params"] if p.grad is not None]
            if "parts" not in group or not parameters:
                continue
            for p in parameters:
                if not self.state[p]:  # AdamW looks for a step where it loads a state
                    self.state[p] = {"step": torch.tensor(0.0), "momentum": torch.zeros_like(p)}
            momenta = [self.state[p]["momentum"] for p in parameters]
            gradients = [p.grad for p in parameters]
            torch._foreach_lerp_(momenta, gradients, 1 - MOMENTUM)
            ahead = torch.stack(torch._foreach_lerp(gradients, momenta, MOMENTUM))
            single = ahead.view(-1, ahead.shape[1] // group["parts"], ahead.shape[2])
            moves = orthogonal(single) * (0.2 * max(single.shape[1:]) ** 0.5)
            torch._foreach_mul_(parameters, 1 - group["lr"] * group["weight_decay"])
            torch._foreach_add_(parameters, list(moves.view_as(ahead)), alpha=-group["lr"])
            for p in parameters:
                p.grad = None  # used up: AdamW passes over parameters without one
        super().step()


def muon(gpt: nn.Module, peak: float, decay: float) -> Muon:
    """Muon for the matrices of a GPT's blocks; AdamW for all else, as `optimise.adamw`."""
    kinds: dict[str, list[nn.Parameter]] = {}  # such as "qkv.weight": that of every layer
    for block in gpt.blocks:
        for name, p in block.named_parameters():
            if p.dim() == 2:
                kinds.setdefault(name, []).append(p)
    groups = [{"params": matrices, "weight_decay": decay,
               "parts": 3 if name.startswith("qkv") else 1} for name, matrices in kinds.items()]
    hidden = {p for matrices in kinds.values() for p in matrices}
    rest = [p for p in gpt.parameters() if p.requires_grad and p not in hidden]
    # Not fused: a fused step would be asked to pass over infinite gradients by itself.
    return Muon([*groups, *decay_groups(rest, decay)], lr=peak, betas=BETAS)
