"""Fast matrix products of few rows on a CPU: weights packed by oneDNN, or weights of 8 bits.

With nn.Linear the rounding of a row depends on the number of rows.  With packed weights it may not:
`rows_agree` tests that, and where it holds, a few images take less time than many.  The operators
are private ones of torch: those of oneDNN, which torch.compile uses on a CPU, and those of torch's
quantized modules.  Only this file uses them.  Where oneDNN is missing, modules stay as they are.
docs/speed.md has measurements.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from clipgen.gpt import LinearGELU, LinearSquaredReLU, squared_relu

# The activation that oneDNN applies before it writes the product.
ACTIVATED = {LinearGELU: ("gelu", [], "none"), LinearSquaredReLU: ("relu", [], "")}


class PackedLinear(nn.Module):
    """An nn.Linear for inference, packed for inputs of `rows` rows; other counts are slower.

    The weight is not in the state dict: it cannot be saved, moved or trained.
    """

    def __init__(self, linear: nn.Linear, rows: int):
        super().__init__()
        with torch.no_grad():
            self._weight = torch.ops.mkldnn._reorder_linear_weight(linear.weight, rows)
        self._bias = linear.bias.detach()
        self._then = next((then for activated, then in ACTIVATED.items()
                           if isinstance(linear, activated)), ("none", [], ""))
        self._squared = isinstance(linear, LinearSquaredReLU)
        # The operator chooses its algorithm by these.
        self.kind = type(linear), *linear.weight.shape, linear.weight.dtype, rows

    def forward(self, x: Tensor) -> Tensor:
        y = torch.ops.mkldnn._linear_pointwise(x, self._weight, self._bias, *self._then)
        return y.square_() if self._squared else y


class Int8Linear(nn.Module):
    """An nn.Linear for inference on a CPU, computed in 8 bits.

    Weights are rounded with one scale for each output, inputs with one scale for each row.  The
    error is about 1 % where no input is much larger than the rest of its row.  Sums of integers are
    exact, so no row depends on other rows.
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
        # Scale and zero point of an unsigned byte: -1 becomes 1, and 1 becomes 255.
        y = torch.ops.quantized.linear_with_input_q_dq_qweight_dq_output_fp32(
            x / largest, 1 / 127, 128, self._weight)
        return self._then(torch.addcmul(self._bias, y, largest))


def _check_int8(device: torch.device) -> None:
    """ValueError, in one sentence, where `Int8Linear` cannot run or would give wrong results."""
    if device.type != "cpu":
        raise ValueError(f"dtype int8 is for CPUs, got device {device}: give device cpu, or leave "
                         "dtype out")
    # Older instructions add two products in 16 bits, and larger sums are cut off.
    if not torch.cpu._is_vnni_supported():
        raise ValueError("dtype int8 needs a CPU with AVX-512 VNNI instructions, which this one "
                         "lacks: use float32")


def rounded(module: nn.Module) -> nn.Module:
    """A copy of a float32 `module` with `Int8Linear` for every nn.Linear; the rest is shared.

    ValueError where `Int8Linear` cannot run or would give wrong results.
    """
    _check_int8(next(module.parameters()).device)
    return _copy(module, Int8Linear)


def packed(module: nn.Module, rows: int) -> nn.Module:
    """A copy of `module` with `PackedLinear` for every nn.Linear; the rest is shared.

    Returns `module` itself where packing is not possible: on another device than a CPU, in a dtype
    that oneDNN does not support on this CPU, in a torch without the operators.
    """
    if not _possible(next(module.parameters())):
        return module
    return _copy(module, lambda linear: PackedLinear(linear, rows))


@torch.no_grad()
def rows_agree(module: nn.Module, counts: Sequence[int]) -> bool:
    """Whether a row's products are bit-identical in inputs of any of these numbers of rows.

    False if a weight of `module` is not packed; weights of 8 bits always agree.  Tests one weight
    of each kind, with the current number of threads.
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
    """A packed weight of that kind, and `count` rows whose exact products are 0.

    The results are rounding errors alone, which even a short dtype can represent.  Every input
    occurs twice, in random order; the two weights have opposite signs.
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
