"""torchtune's LoRALinear and DoRALinear as output projections, their adapter apart from their weight.

With W the weight, b the bias, A and B the adapter's two matrices, s = alpha / rank, their forwards compute

    LoRALinear  h W^T + b + s dropout(h) A^T B^T
    DoRALinear  (h W^T + b + s dropout(h) A^T B^T) * magnitude / |W + s B A|, the norm of each row without gradient

which is a :class:`torchtune_lce.inputs.low_rank.LowRank` with low = s dropout(h) A^T, up = B.
"""

import torch
from torch import Tensor
from torchtune.modules.peft import DoRALinear, LoRALinear

from torchtune_lce.implementations.memory import NORM_BYTES
from torchtune_lce.inputs.autocast import without_autocast
from torchtune_lce.inputs.dtypes import accumulation_dtype
from torchtune_lce.inputs.low_rank import LowRank

Adapter = LoRALinear | DoRALinear


def is_dora(output) -> bool:
    return isinstance(output, DoRALinear)


def low_rank(adapter: Adapter, hidden: Tensor) -> LowRank:
    """The operands for hidden states [..., D]; gradients reach them, both matrices and the magnitude.

    Made in the loss, behind the model: dropout is drawn once, after all of the model's own, as torchtune's module draws
    it, and activation checkpointing, which runs layers of the model again, never draws it a second time. Beside vectors
    autograd keeps the thinned out hidden states and their mask, [N, D] each.

    Raises TypeError for an adapter of another dtype than the hidden states, outside autocast.
    """
    dtype = adapter.lora_a.weight.dtype
    if dtype != hidden.dtype and not torch.is_autocast_enabled(hidden.device.type):
        raise TypeError(
            f"lora_a and lora_b of model.output must have the dtype of hidden, {hidden.dtype}, got {dtype}: cast one "
            "of them, or call under torch.autocast"
        )
    scaling = adapter.scaling if is_dora(adapter) else adapter.alpha / adapter.rank
    low = scaling * adapter.lora_a(adapter.dropout(hidden))
    low, up = low.reshape(-1, low.shape[-1]), adapter.lora_b.weight
    if not is_dora(adapter):
        return LowRank(low, up, None)
    norms = _row_norms(adapter.weight, up, adapter.lora_a.weight, scaling)
    return LowRank(low, up, adapter.magnitude.to(norms.dtype) / norms)


@torch.no_grad()
@without_autocast
def _row_norms(weight: Tensor, up: Tensor, down: Tensor, scaling: float) -> Tensor:
    """Length of each row of ``weight + scaling * up @ down``, [V] in the accumulation dtype, some rows at a time."""
    wide = accumulation_dtype(weight.dtype)
    rows = max(NORM_BYTES // (2 * wide.itemsize * weight.shape[1]), 1)
    down = down.to(wide)
    pieces = zip(weight.split(rows), up.split(rows), strict=True)
    return torch.cat(
        [torch.addmm(part.to(wide), part_up.to(wide), down, alpha=scaling).norm(dim=1) for part, part_up in pieces]
    )
