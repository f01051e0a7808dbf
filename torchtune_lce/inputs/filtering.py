"""Gradient filtering: of which gradients, and what it left out of a call, for whoever asks.

Nothing is kept or computed for others.
"""

from collections.abc import Generator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass

import torch
from torch import Tensor

from torchtune_lce.inputs.validation import is_readable


@dataclass(frozen=True)
class Filtering:
    """Which gradients leave out softmax entries below ``filter_eps``."""

    hidden: bool
    weight: bool


UNFILTERED = Filtering(hidden=False, weight=False)


@dataclass
class FilterRecord:
    """Of one call of a ``cce`` implementation, on the device of its inputs; reading a property waits for it.

    ``dropped_mass`` [N], float32 in [0, 1], bounds, for each token, the softmax mass of the entries that the gradients
    may leave out (the kept tiles hold some of it after all, and its mean goes back into the gradient of hidden); 0
    where ignored, and where the token's row block is kept whole. The tile counts are there after the backward. A tile
    is a row block (128 tokens on a card) by as many entries; by one where the hidden states alone have a gradient, or
    nothing is filtered.
    """

    dropped_mass: Tensor
    tiles: Tensor | None = None  # [2] int64: kept and all

    @property
    def kept_fraction(self) -> float:
        """Kept tiles of all tiles, those of ignored tokens too; 1.0 where nothing is filtered or ignored."""
        if self.tiles is None:
            raise RuntimeError("kept_fraction is known after the backward, which has not run for this call")
        kept, tiles = self.tiles.tolist()
        return kept / max(tiles, 1)

    @property
    def largest_dropped_mass(self) -> float:
        """Bound on the softmax mass left out of any token's gradient."""
        return self.dropped_mass.max().item() if self.dropped_mass.numel() else 0.0


_records: ContextVar[list[FilterRecord] | None] = ContextVar("torchtune_lce_filter_records", default=None)


@contextmanager
def recording() -> Generator[list[FilterRecord], None, None]:
    """Collects a :class:`FilterRecord` for each ``cce`` call made inside, in their order.

    Not for calls in code that torch.compile took down: its graph holds the kernels alone. The recipes leave the loss
    module out of what they compile, so it has its records.
    """
    records: list[FilterRecord] = []
    token = _records.set(records)
    try:
        yield records
    finally:
        _records.reset(token)


def open_record(rows: Tensor) -> FilterRecord | None:
    """The record of a call of these tokens that begins, if somebody collects them. A trace has no calls to tell of."""
    records = _records.get()
    if records is None or not is_readable(rows):
        return None
    records.append(FilterRecord(torch.zeros(rows.numel(), dtype=torch.float32, device=rows.device)))
    return records[-1]
