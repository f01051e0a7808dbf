"""Whether two loss curves differ by more than rounding."""

import math
from dataclasses import dataclass

import torch

# What rounding explains, in units of eps times the loss.
# float32: torchtune's loss and ours add the same numbers up in different orders. A sum of n terms in blocks loses about
# log2(n) roundings: 15 for 2^15 vocabulary entries, 7 for 128 columns, 9 for 2^9 tokens, 31 in all. As much again for
# the parameters, which carry the gradients' rounding from step to step. Measured over 30 steps: 3.
# bfloat16: sums are float32 in both, but torchtune rounds its logits to bfloat16, by half an eps, and once more the
# gradient by them, where ours rounds neither or only the latter. Gradient filtering adds that entries below eps / 45
# get no gradient; under the recipes' optimizers that shifts the loss by less than rounding may. Measured over 20 steps
# with the strictest filter, entry by entry: 0.4; without a filter: 0.03.
_EPS_OF_LOSS = {torch.float32: 64, torch.bfloat16: 1}
# The same of a small difference of large numbers, in units of eps times these: DPO's beta times the policy's
# log-probabilities of whole answers, the chosen and the rejected one's together.
# float32: the reference's are as large, and each of the four sums is off by a rounding or two of its size. Measured
# over 20 steps: 0.4.
# bfloat16: the logits' roundings are of a token each, and partly cancel in a sum over hundreds of them. Measured over
# 20 steps, without a filter: 0.005.
_EPS_OF_SIZE = {torch.float32: 4, torch.bfloat16: 1 / 32}


@dataclass(frozen=True)
class Comparison:
    """Step by step; both lists have one value for each step."""

    differences: list[float]
    bounds: list[float]

    @property
    def largest(self) -> float:
        """NaN as soon as one difference is."""
        return math.nan if any(map(math.isnan, self.differences)) else max(self.differences)

    @property
    def agrees(self) -> bool:
        return all(difference <= bound for difference, bound in zip(self.differences, self.bounds, strict=True))


def compare(stock: list[float], ours: list[float], dtype: torch.dtype, sizes: list[float] | None = None) -> Comparison:
    """Losses of the same steps of two runs in ``dtype``; a NaN on either side never agrees.

    ``sizes`` are of what each loss is a difference of, where it is one.
    """
    scales = _EPS_OF_LOSS if sizes is None else _EPS_OF_SIZE
    scale = scales[dtype] * torch.finfo(dtype).eps
    return Comparison(
        differences=[abs(a - b) for a, b in zip(stock, ours, strict=True)],
        bounds=[scale * abs(size) for size in (stock if sizes is None else sizes)],
    )
