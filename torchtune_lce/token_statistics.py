"""Entropy and accuracy of each token's prediction, without gradient, in one bounded pass over the vocabulary.

No implementation of the loss has them at hand, so this computes the logits once more: 2 N D V operations, a third of
what the loss and its gradients take without filtering. Plain PyTorch, on any device, which it never waits for: that is
why ignored tokens are computed too.
"""

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from torchtune_lce import chunked
from torchtune_lce.autocast import without_autocast
from torchtune_lce.low_rank import LowRank
from torchtune_lce.options import Options
from torchtune_lce.reference import accumulation_dtype

if TYPE_CHECKING:
    from torchtune_lce.tensor_parallel import VocabularyShard


class Predictions(NamedTuple):
    """What some entries of the vocabulary say about each token, [N] each, in the accumulation dtype but for ``place``.

    With e = exp(z - largest) for the logits z of those entries:
    """

    largest: Tensor  # logit
    place: Tensor  # int64: its entry, the first of equal ones; -1 where a logit is NaN
    total: Tensor  # sum of e
    disorder: Tensor  # sum of -e log e, so that the entropy is log(total) + disorder / total

    def measured_from(self, largest: Tensor) -> tuple[Tensor, Tensor]:
        """``total`` and ``disorder`` with respect to another logit, no smaller than this one."""
        # Where no entry so far can be, all are zero, whatever they are measured from.
        scale = (self.largest - largest.where(largest != -torch.inf, 0)).exp()
        return scale * self.total, scale * self.disorder + torch.special.entr(scale) * self.total


# A custom operator: a compiler would unroll the walk over the vocabulary.
torch.library.define(
    "torchtune_lce::predictions",
    "(Tensor hidden, Tensor weight, Tensor? bias, Tensor? low, Tensor? up, Tensor? scale, float? softcap, "
    "int workspace_mib) -> (Tensor largest, Tensor place, Tensor total, Tensor disorder)",
)


@torch.library.impl("torchtune_lce::predictions", "default")
@without_autocast
def _predict(hidden, weight, bias, low, up, scale, softcap, workspace_mib):
    dtype = accumulation_dtype(hidden.dtype)
    low_rank = None if low is None else LowRank(low.to(dtype), up, scale)
    chunk = chunked.entries_per_chunk(hidden.shape[0], weight.shape[0], workspace_mib, hidden.dtype)
    none = hidden.new_zeros(hidden.shape[0], dtype=dtype)
    found = Predictions(none - torch.inf, torch.full_like(none, -1, dtype=torch.int64), none, none)
    for start in range(0, weight.shape[0], chunk):
        logits = chunked.chunk_logits(hidden, weight, bias, low_rank, start, chunk, softcap)
        value, index = logits.max(-1)
        place = torch.where(value > found.largest, index + start, found.place)
        largest = torch.maximum(found.largest, value)
        total, disorder = found.measured_from(largest)
        logits = logits.sub_(largest.where(largest != -torch.inf, 0)[:, None]).exp_()
        total += logits.sum(-1)
        disorder += torch.special.entr(logits).sum(-1)
        found = Predictions(largest, place, total, disorder)
    return tuple(found)


@torch.library.register_fake("torchtune_lce::predictions")
def _(hidden, weight, bias, low, up, scale, softcap, workspace_mib):
    values = [hidden.new_empty(hidden.shape[0], dtype=accumulation_dtype(hidden.dtype)) for _ in range(3)]
    return values[0], hidden.new_empty(hidden.shape[0], dtype=torch.int64), *values[1:]


def token_statistics(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    options: Options,
    low_rank: LowRank | None = None,
    shard: "VocabularyShard | None" = None,
) -> tuple[Tensor, Tensor]:
    """Entropy and whether the target is the most likely entry, both [N]; 0 and False where ignored."""
    tensors = (x if x is None else x.detach() for x in (hidden, weight, bias, *(low_rank or (None, None, None))))
    found = Predictions(*torch.ops.torchtune_lce.predictions(*tensors, options.softcap, options.workspace_mib))
    if shard is not None:
        found = shard.merge_predictions(found)
    valid = targets != options.ignore_index
    entropy = found.total.log() + found.disorder / found.total
    return entropy.where(valid, 0), (found.place == targets) & valid
