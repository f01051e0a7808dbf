"""An output projection in two parts: a matrix, and beside it a product of low rank that is never added to it."""

from typing import NamedTuple

from torch import Tensor


class LowRank(NamedTuple):
    """With it the logits are ``(hidden @ weight.T + bias + low @ up.T) * scale``, before any softcap.

    So LoRA and DoRA need no [V, D] sum of weight and adapter and no gradient of that shape, and ``low`` may come from
    hidden states that dropout has thinned out while ``weight`` takes them whole.
    """

    low: Tensor  # [N, r], dtype of hidden
    up: Tensor  # [V, r]
    scale: Tensor | None  # [V], in the accumulation dtype
