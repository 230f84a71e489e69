"""Matrix products of few rows on a CPU: weights in the order that is read fastest, or of 8 bits.

So packed, a row of the product need not depend on the rows beside it, to the last bit, as it does
with nn.Linear: `rows_agree` looks, and where it is so few images cost less than many.  The
operators, oneDNN's that torch.compile's CPU backend uses and those of torch's quantized modules,
are private: this file alone knows them, and without oneDNN's everything runs as it does elsewhere.
docs/speed.md has the figures.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from clipgen.gpt import LinearGELU, LinearSquaredReLU, squared_relu

# What oneDNN does with the products before it writes them.
ACTIVATED = {LinearGELU: ("gelu", [], "none"), LinearSquaredReLU: ("relu", [], "")}


class PackedLinear(nn.Module):
    """An nn.Linear for inference, packed for inputs of `rows` rows; others work, more slowly.

    Its weight is in nobody's state dict: it cannot be saved, moved or trained.
    """

    def __init__(self, linear: nn.Linear, rows: int):
        super().__init__()
        with torch.no_grad():
            self._weight = torch.ops.mkldnn._reorder_linear_weight(linear.weight, rows)
        self._bias = linear.bias.detach()
        self._then = next((then for activated, then in ACTIVATED.items()
                           if isinstance(linear, activated)), ("none", [], ""))
        self._squared = isinstance(linear, LinearSquaredReLU)
        # All that the operator's way of computing can depend on.
        self.kind = type(linear), *linear.weight.shape, linear.weight.dtype, rows

    def forward(self, x: Tensor) -> Tensor:
        y = torch.ops.mkldnn._linear_pointwise(x, self._weight, self._bias, *self._then)
        return y.square_() if self._squared else y


class Int8Linear(nn.Module):
    """An nn.Linear for inference on a CPU whose weights are rounded to 8 bits, with a scale for
    each output, and whose inputs are, with a scale for each row.

    About 1 % of noise on the result where no input is far larger than the others of its row.  Sums
    of whole numbers are exact: no row depends on others.
    """

    def __init__(self, linear: nn.Linear):
        super().__init__()
        with torch.no_grad():
            weight = linear.weight.float()
            scales = (weight.abs().amax(1) / 127).clamp(min=1e-12)
            zeros = torch.zeros(len(scales), dtype=torch.int64)
            bytes_ = torch.quantize_per_channel(weight, scales, zeros, 0, torch.qint8)
            self._weight = torch.ops.quantized.linear_prepack(bytes_, None)
            self._bias = linear.bias.detach().float()
        self._then = (F.gelu if isinstance(linear, LinearGELU) else squared_relu
                      if isinstance(linear, LinearSquaredReLU) else nn.Identity())

    def forward(self, x: Tensor) -> Tensor:
        largest = x.abs().amax(-1, keepdim=True).clamp(min=1e-12)
        # Scale and zero point of an unsigned byte: from -1 to 1 are 1 to 255.
        y = torch.ops.quantized.linear_with_input_q_dq_qweight_dq_output_fp32(
            x / largest, 1 / 127, 128, self._weight)
        return self._then(torch.addcmul(self._bias, y, largest))


def _check_int8(device: torch.device) -> None:
    """ValueError, in one sentence, where `Int8Linear` cannot run or would be wrong."""
    if device.type != "cpu":
        raise ValueError(f"dtype int8 is for CPUs, got device {device}: give device cpu, or leave "
                         "dtype out")
    # Older instructions add pairs of products in 16 bits, and what does not fit is cut.
    if not torch.cpu._is_vnni_supported():
        raise ValueError("dtype int8 needs a CPU with AVX-512 VNNI instructions, which this one "
                         "lacks: use float32")


def rounded(module: nn.Module) -> nn.Module:
    """A copy of a float32 `module` whose nn.Linear are `Int8Linear`; it shares all else with it.

    ValueError where they cannot run or would be wrong.
    """
    _check_int8(next(module.parameters()).device)
    return _copy(module, Int8Linear)


def packed(module: nn.Module, rows: int) -> nn.Module:
    """A copy of `module` whose nn.Linear are packed; it shares everything else with it.

    `module` itself where packing is not possible: on another device than a CPU, in a dtype that
    this CPU's oneDNN lacks, in a torch without the operators.
    """
    if not _possible(next(module.parameters())):
        return module
    return _copy(module, lambda linear: PackedLinear(linear, rows))


@torch.no_grad()
def rows_agree(module: nn.Module, counts: Sequence[int]) -> bool:
    """Whether the weights of `module`, all of them packed, give a row the same products, bit by
    bit, in inputs of any of these counts of rows.  With 8 bits they do.

    Looks at one weight of each kind, at this number of threads.
    """
    parts = list(module.modules())
    if any(isinstance(part, nn.Linear) for part in parts):
        return False
    for kind in {part.kind for part in parts if isinstance(part, PackedLinear)}:
        linear, x = _cancelling(*kind, max(counts))
        whole = linear(x)
        if not all(torch.equal(torch.cat([linear(rows) for rows in x.split(count)]), whole)
                   for count in counts):
            return False
    return True


def _cancelling(kind: type[nn.Linear], outputs: int, inputs: int, dtype: torch.dtype, rows: int,
                count: int) -> tuple[PackedLinear, Tensor]:
    """A packed weight of that kind and `count` rows whose products are 0 but for rounding: no
    dtype is too short to show how it was rounded.

    Half of the inputs are the other half again, in any order, and their weights those negated.
    """
    generator = torch.Generator().manual_seed(0)
    order = torch.randperm(inputs, generator=generator)
    x, weight = (torch.randn(n, inputs // 2, generator=generator).to(dtype) for n in (count, 16))
    x, weight = (F.pad(torch.cat(halves, dim=1), (0, inputs % 2))[:, order]
                 for halves in ((x, x), (weight, -weight)))
    linear = kind(inputs, outputs, device="meta", dtype=dtype)
    linear.weight = nn.Parameter(weight.repeat(outputs // 16 + 1, 1)[:outputs])
    linear.bias = nn.Parameter(torch.zeros(outputs, dtype=dtype))
    return PackedLinear(linear, rows), x


def _possible(weight: Tensor) -> bool:
    ops = torch.ops.mkldnn
    return (weight.device.type == "cpu" and torch.backends.mkldnn.is_available()
            and hasattr(ops, "_reorder_linear_weight") and hasattr(ops, "_linear_pointwise")
            and (weight.dtype is torch.float32
                 or weight.dtype is torch.bfloat16 and ops._is_mkldnn_bf16_supported()))


def _copy(module: nn.Module, pack: Callable[[nn.Linear], nn.Module]) -> nn.Module:
    if isinstance(module, nn.Linear):
        return pack(module)
    children = {name: _copy(child, pack) for name, child in module.named_children()}
    if all(child is getattr(module, name) for name, child in children.items()):
        return module
    twin = copy.copy(module)
    twin._modules = children
    return twin
