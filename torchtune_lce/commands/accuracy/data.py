"""Rows of three kinds: an untrained model's, a trained one's, and rows that are as good as certain."""

import torch

from torchtune_lce.commands.shared.batches import Batch, random_batch
from torchtune_lce.commands.shared.shapes import Shape
from torchtune_lce.commands.shared.trained_batches import trained_batch

# Enough features for the trained kind, enough of the vocabulary that its entries are as small as a real one's.
SHAPE = Shape(tokens=512, hidden=256, vocab=32_768)
_MARGINS = (6.0, 14.0)  # of the target's logit over the log-sum-exp of the others: p from 0.9975 to 1 - 1e-6


def confident_batch(shape: Shape, dtype: torch.dtype, device: torch.device, seed: int = 0) -> Batch:
    """Every target has p > 0.99: the row's hidden state lies along the target's weight row, as far as that takes.

    There a gradient is p - 1, and whoever rounds p before subtracting 1 has nothing left.
    """
    generator = torch.Generator(device).manual_seed(seed)

    def normal(*size: int) -> torch.Tensor:
        return torch.randn(*size, generator=generator, device=device, dtype=torch.float64)

    weight = normal(shape.vocab, shape.hidden) / shape.hidden**0.5
    targets = torch.randint(shape.vocab, (shape.tokens,), generator=generator, device=device)
    rows = weight[targets]
    directions = rows / rows.square().sum(1, keepdim=True)  # a hidden state of 1 gives the target a logit of 1
    margins = torch.linspace(*_MARGINS, shape.tokens, device=device, dtype=torch.float64)
    others = directions @ weight.T  # their logits for a target's logit of 1
    others.scatter_(1, targets[:, None], -torch.inf)
    logit = margins
    for _ in range(8):  # the others' logits grow with the hidden state: found by repetition
        logit = margins + (others * logit[:, None]).logsumexp(1)
    hidden = directions * logit[:, None]
    return Batch("confident", "confident", hidden.to(dtype), weight.to(dtype), targets)


KINDS = {"random": random_batch, "trained": trained_batch, "confident": confident_batch}
