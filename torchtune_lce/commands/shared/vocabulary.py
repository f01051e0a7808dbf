"""Where the entries that a text uses lie in a vocabulary that was made for more."""

import torch
from torch import Tensor

# How much denser the entries in use lie at the start of the vocabulary, where its most frequent ones are.
_DENSITY_FALL = 20.0


def spread(entries: int, vocab: int) -> Tensor:
    """[entries] int64: rising places in a vocabulary of ``vocab``, drawn without repetition, denser at the start."""
    density = 1 / (1 + _DENSITY_FALL * torch.arange(vocab) / vocab)
    return torch.multinomial(density, entries, generator=torch.Generator().manual_seed(0)).sort().values
