"""Products of matrices in a dtype of 16 bits whose results are not rounded to it, in bounded memory.

Where a student is near its teacher, the gradient is a difference of their logits: rounded first, it would be lost.
CUDA's own products give float32. Other devices, ROCm among them, have none that do: there the factors are widened, tile
by tile.
"""

import torch
from torch import Tensor

from torchtune_lce.implementations.walk import has_wide_product
from torchtune_lce.inputs.dtypes import accumulation_dtype

# Of rows that are widened at once, however small the workspace, or the products would be slow.
_LEAST = 16


def wide_logits(operands, part: slice, workspace: int, scaled: bool = True) -> Tensor:
    """Logits [N, n] of the entries ``part`` in the accumulation dtype, without their scale unless ``scaled``.

    ``operands`` are those of :mod:`torchtune_lce.divergence.chunked`; at most ``workspace`` bytes beside the logits.
    """
    logits = _wide_product(operands.hidden, operands.weight[part], workspace)
    if operands.bias is not None:
        logits += operands.bias[part]
    if operands.low is not None:
        up, low = operands.up[part], operands.low.to(logits.dtype)
        rows = max(workspace // (up.shape[1] * logits.itemsize), _LEAST)
        for columns, some in zip(logits.split(rows, 1), up.split(rows), strict=True):
            columns.addmm_(low, some.T.to(logits.dtype))
    if scaled and operands.scale is not None:
        logits *= operands.scale[part]
    return logits


def add_product(sums: Tensor, left: Tensor, right: Tensor, workspace: int) -> None:
    """``sums`` [n, m], in the accumulation dtype, grow by ``left`` [n, k] times ``right`` [k, m], which have one dtype.

    At most ``workspace`` bytes beside them, or on CUDA as many as ``sums`` has.
    """
    if left.dtype == sums.dtype:
        sums.addmm_(left, right)
    elif has_wide_product(left):
        sums += torch.mm(left, right, out_dtype=sums.dtype)
    else:
        some = max(workspace // (sum(sums.shape) * sums.itemsize), _LEAST)
        for columns, rows in zip(left.split(some, 1), right.split(some), strict=True):
            sums.addmm_(columns.to(sums.dtype), rows.to(sums.dtype))


def _wide_product(left: Tensor, right: Tensor, workspace: int) -> Tensor:
    """``left`` [n, k] times the transpose of ``right`` [m, k], in the accumulation dtype."""
    wide = accumulation_dtype(left.dtype)
    if left.dtype == wide:
        return left @ right.T
    if has_wide_product(left):
        return torch.mm(left, right.T, out_dtype=wide)
    result = left.new_empty(left.shape[0], right.shape[0], dtype=wide)
    rows = max(workspace // (2 * left.shape[1] * wide.itemsize), _LEAST)
    for some, lines in zip(left.split(rows), result.split(rows), strict=True):
        some = some.to(wide)
        for others, tile in zip(right.split(rows), lines.split(rows, 1), strict=True):
            torch.mm(some, others.T.to(wide), out=tile)
    return result
