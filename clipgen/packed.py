"""Matrix products of few rows on a CPU, with weights in the order oneDNN reads fastest.

So packed, a row of the product does not depend on the rows beside it, to the last bit, as it does
with nn.Linear: `rows_agree` looks.  The operators are those that torch.compile's CPU backend uses;
they are private, so this file alone knows them, and without them everything runs as it does
elsewhere.  docs/speed.md has the figures.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from torch import Tensor, nn

PAYS = 2**19  # numbers in a weight; measured: below, calling the operator costs more than it saves


class PackedLinear(nn.Module):
    """An nn.Linear for inference, packed for inputs of `rows` rows; others work, more slowly.

    Its weight is in nobody's state dict: it cannot be saved, moved or trained.
    """

    def __init__(self, linear: nn.Linear, rows: int):
        super().__init__()
        with torch.no_grad():
            self._weight = torch.ops.mkldnn._reorder_linear_weight(linear.weight, rows)
        self._bias = linear.bias.detach()
        self.shape = linear.weight.shape  # (outputs, inputs)

    def forward(self, x: Tensor) -> Tensor:
        return torch.ops.mkldnn._linear_pointwise(x, self._weight, self._bias, "none", [], "")


def packed(module: nn.Module, rows: int) -> nn.Module:
    """A copy of `module` whose large nn.Linear are packed; it shares everything else with it.

    `module` itself where packing is not possible: on another device than a CPU, in a dtype that
    this CPU's oneDNN lacks, in a torch without the operators.
    """
    return _copy(module, rows) if _possible(next(module.parameters())) else module


@torch.no_grad()
def rows_agree(module: nn.Module, counts: Sequence[int]) -> bool:
    """Whether the products of `module`, all of them packed, give a row the same numbers, bit by
    bit, in inputs of any of these counts of rows.

    Looks at one weight of each shape, and at float32 alone: short numbers hide what differs.
    """
    parts = list(module.modules())
    if any(isinstance(part, nn.Linear)
           or isinstance(part, PackedLinear) and part._bias.dtype is not torch.float32
           for part in parts):
        return False
    for linear in {part.shape: part for part in parts if isinstance(part, PackedLinear)}.values():
        x = torch.randn(max(counts), linear.shape[1], generator=torch.Generator().manual_seed(0))
        whole = linear(x)
        if not all(torch.equal(linear(x[-count:]), whole[-count:]) for count in counts):
            return False
    return True


def _possible(weight: Tensor) -> bool:
    ops = torch.ops.mkldnn
    return (weight.device.type == "cpu" and torch.backends.mkldnn.is_available()
            and hasattr(ops, "_reorder_linear_weight") and hasattr(ops, "_linear_pointwise")
            and (weight.dtype is torch.float32
                 or weight.dtype is torch.bfloat16 and ops._is_mkldnn_bf16_supported()))


def _copy(module: nn.Module, rows: int) -> nn.Module:
    if isinstance(module, nn.Linear):
        return PackedLinear(module, rows) if module.weight.numel() >= PAYS else module
    children = {name: _copy(child, rows) for name, child in module.named_children()}
    if all(child is getattr(module, name) for name, child in children.items()):
        return module
    twin = copy.copy(module)
    twin._modules = children
    return twin
