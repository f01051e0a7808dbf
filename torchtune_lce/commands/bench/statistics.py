"""How peaked a softmax is, and how much of it tiles can leave out: what the speed of a filtering loss depends on."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from torchtune_lce.commands.shared.batches import IGNORE_INDEX, Batch

EPS = 2.0**-12
TILE = 128


@dataclass(frozen=True)
class Statistics:
    """Means over tokens; ``kept_*`` are fractions of 128x128 tiles with an entry over 2^-12 or a target."""

    loss: float
    entropy: float  # nats
    entries: float  # over 2^-12, a token
    kept_natural: float
    kept_by_mean_logit: float
    kept_by_active_blocks: float

    def __str__(self) -> str:
        return (
            f"loss {self.loss:.2f}, entropy {self.entropy:.2f} nats, {self.entries:.0f} entries over 2^-12 a token; "
            f"128x128 tiles kept: {self.kept_natural:.2f} in natural order, {self.kept_by_mean_logit:.2f} by mean "
            f"logit, {self.kept_by_active_blocks:.2f} by active row blocks"
        )


@torch.no_grad()
def softmax_statistics(batch: Batch) -> Statistics:
    """Of all tokens of ``batch``, holding the logits of 128 of them at a time."""
    tokens, vocab = batch.shape.tokens, batch.shape.vocab
    totals = torch.zeros(3, dtype=torch.float64, device=batch.hidden.device)
    active = torch.zeros(-(-tokens // TILE), vocab, dtype=torch.bool, device=batch.hidden.device)
    for block, start in enumerate(range(0, tokens, TILE)):
        targets = batch.targets[start : start + TILE]
        logits = torch.mm(batch.hidden[start : start + TILE], batch.weight.T).float()
        log_softmax = logits.sub_(logits.logsumexp(-1, keepdim=True))
        totals[0] += F.nll_loss(log_softmax, targets, ignore_index=IGNORE_INDEX, reduction="sum")
        softmax = log_softmax.exp()
        large = softmax >= EPS
        totals[1] -= softmax.mul_(log_softmax).sum()
        totals[2] += large.sum()
        active[block] = large.any(0)
        active[block, targets[targets != IGNORE_INDEX]] = True
    mean_logits = batch.weight.float() @ batch.hidden.float().mean(0)
    valid = (batch.targets != IGNORE_INDEX).sum().item()
    loss, entropy, entries = totals.tolist()
    return Statistics(
        loss=loss / max(valid, 1),
        entropy=entropy / tokens,
        entries=entries / tokens,
        kept_natural=_kept(active),
        kept_by_mean_logit=_kept(active[:, mean_logits.argsort(descending=True)]),
        kept_by_active_blocks=_kept(active[:, order_of_use(active)]),
    )


def order_of_use(active: Tensor) -> Tensor:
    """The order [V] in which kernels/kept_tiles.py has the vocabulary, of active [row blocks, V].

    By the power of two in how many row blocks an entry is active, then by the first of them.
    """
    counts = active.sum(0)
    powers = torch.where(counts > 0, counts.clamp(min=1).log2().floor() + 1, 0).long()
    return (powers * len(active) - active.int().argmax(0)).argsort(descending=True, stable=True)


def _kept(active: Tensor) -> float:
    """Fraction of tiles with an active entry; ``active`` is [row blocks, V] in the order of the vocabulary."""
    padded = F.pad(active, (0, -active.shape[1] % TILE))
    return padded.view(active.shape[0], -1, TILE).any(-1).float().mean().item()
