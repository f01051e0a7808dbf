"""Entropy and accuracy of each token's prediction, without gradient, in one bounded pass over the vocabulary.

No implementation of the loss has them at hand, so this computes the logits once more: 2 N D V operations, a third of
what the loss and its gradients take without filtering. Plain PyTorch, on any device.
"""

import torch
from torch import Tensor

from torchtune_lce import chunked
from torchtune_lce.autocast import without_autocast
from torchtune_lce.options import Options
from torchtune_lce.reference import accumulation_dtype

# A custom operator: how many tokens are in use decides its shapes, which a compiler cannot know.
torch.library.define(
    "torchtune_lce::token_statistics",
    "(Tensor hidden, Tensor weight, Tensor? bias, Tensor targets, int ignore_index, float? softcap, "
    "int workspace_mib) -> (Tensor entropy, Tensor correct)",
)


@torch.library.impl("torchtune_lce::token_statistics", "default")
@without_autocast
def _forward(hidden, weight, bias, targets, ignore_index, softcap, workspace_mib):
    rows, kept, labels, chunk = chunked.in_use(hidden, weight, targets, ignore_index, workspace_mib)
    largest = hidden.new_full(rows.shape, -torch.inf, dtype=accumulation_dtype(hidden.dtype))
    place = torch.full_like(rows, -1)
    # Over the entries seen so far, of softmaxes not yet divided by their sum: that sum, and the sum of -e log e.
    total, disorder = torch.zeros_like(largest), torch.zeros_like(largest)
    for start in range(0, weight.shape[0], chunk):
        logits, _ = chunked.chunk_logits(kept, weight, bias, start, chunk, softcap)
        value, index = logits.max(-1)
        # The first of equal ones, as torch.argmax takes on a CPU.
        place = torch.where(value > largest, index + start, place)
        before, largest = largest, torch.maximum(largest, value)
        scale = (before - largest).exp()
        disorder = scale * disorder + torch.special.entr(scale) * total
        logits = logits.sub_(largest[:, None]).exp_()
        total = scale * total + logits.sum(-1)
        disorder += torch.special.entr(logits).sum(-1)
    entropy = torch.zeros(targets.shape, dtype=largest.dtype, device=targets.device)
    correct = torch.zeros_like(targets, dtype=torch.bool)
    entropy[rows] = total.log() + disorder / total
    correct[rows] = place == labels
    return entropy, correct


@torch.library.register_fake("torchtune_lce::token_statistics")
def _(hidden, weight, bias, targets, ignore_index, softcap, workspace_mib):
    dtype = accumulation_dtype(hidden.dtype)
    return hidden.new_empty(targets.shape, dtype=dtype), torch.empty_like(targets, dtype=torch.bool)


def token_statistics(hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, options: Options):
    """Entropy and whether the target is the most likely entry, both [N]; 0 and False where ignored."""
    tensors = (x if x is None else x.detach() for x in (hidden, weight, bias))
    return torch.ops.torchtune_lce.token_statistics(
        *tensors, targets, options.ignore_index, options.softcap, options.workspace_mib
    )
