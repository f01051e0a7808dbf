"""A call with its settings in one object, and with a low rank beside the weight, which no public function takes."""

from dataclasses import replace

from torch import Tensor

from torchtune_lce import functional
from torchtune_lce.inputs.call import checked
from torchtune_lce.inputs.low_rank import LowRank
from torchtune_lce.inputs.options import Options


def compute(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None = None,
    *,
    options: Options,
    impl: str,
    reduction: str = "mean",
    shift: int = 0,
    return_lse: bool = False,
    low_rank: LowRank | None = None,
):
    call = replace(checked(hidden, weight, targets, bias, options=options, shift=shift), low_rank=low_rank)
    return functional.compute(call, reduction=reduction, impl=impl, return_lse=return_lse)
