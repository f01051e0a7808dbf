"""Which rows of a vocabulary a rank has, where tensor parallelism splits it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh


@dataclass(frozen=True)
class VocabularyShard:
    """Rows [start, start + rows) of ``vocabulary``, those of this rank of ``mesh`` (one-dimensional).

    ``sums_hidden``: hidden states come as plain tensors, the same on all ranks, so their gradients are added up.
    """

    mesh: DeviceMesh
    start: int
    rows: int
    vocabulary: int
    sums_hidden: bool = True
