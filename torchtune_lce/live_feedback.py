"""What the loss did, in torchtune's own metric logger: which implementation ran, and what filtering left out.

A config asks for it with ``log_loss_stats: True``, beside torchtune's ``log_peak_memory_stats``. Nothing is attached,
and nothing costs anything, where none does.
"""

from collections.abc import Mapping

import torch

from torchtune_lce import filtering
from torchtune_lce.loss import LinearCrossEntropyLoss

SETTING = "log_loss_stats"


class LossStatistics:
    """Stands in for a recipe's metric logger: each record gets what the loss did since the one before.

    ``impl_is_<name>`` is 1 for the implementation that ran: loggers take numbers alone. Where it filters gradients,
    ``kept_fraction`` is that of the softmax's tiles that the gradients were made of, and ``largest_dropped_mass``
    bounds the softmax mass that was left out of any token's; see :mod:`torchtune_lce.filtering`. Both are collected on
    the device and read only when torchtune logs, which waits for the device anyway. On several devices they are those
    of the one that logs.
    """

    def __init__(self, logger, loss: LinearCrossEntropyLoss):
        self._logger = logger
        self._impl: str | None = None
        self._records: list[filtering.FilterRecord] = []
        self._recording = None
        self._tiles: torch.Tensor | None = None  # [2] int64: kept and all
        self._dropped: torch.Tensor | None = None  # float32
        loss.register_forward_pre_hook(self._begin)
        loss.register_forward_hook(self._end, always_call=True)

    def log_dict(self, payload: Mapping, step: int) -> None:
        self._logger.log_dict({**payload, **self._take()}, step=step)

    def __getattr__(self, name: str):
        """All else is the logger's own."""
        return getattr(self._logger, name)

    def _begin(self, loss: LinearCrossEntropyLoss, inputs: tuple) -> None:
        self._collect()
        self._impl = loss.implementation(inputs[0])
        self._recording = filtering.recording()
        self._records = self._recording.__enter__()

    def _end(self, *_) -> None:
        if self._recording is not None:
            self._recording.__exit__(None, None, None)
            self._recording = None

    def _collect(self) -> None:
        """Adds up what the calls before have left, their backward included, without waiting for the device."""
        for record in self._records:
            if record.tiles is not None:  # a validation has no backward
                self._tiles = record.tiles if self._tiles is None else self._tiles + record.tiles
            if record.dropped_mass.numel():
                largest = record.dropped_mass.max()
                self._dropped = largest if self._dropped is None else torch.maximum(self._dropped, largest)
        self._records = []

    def _take(self) -> dict[str, float]:
        self._collect()
        found = {} if self._impl is None else {f"impl_is_{self._impl}": 1}
        if self._tiles is not None:
            kept, tiles = self._tiles.tolist()
            found["kept_fraction"] = kept / max(tiles, 1)
        if self._dropped is not None:
            found["largest_dropped_mass"] = self._dropped.item()
        self._tiles = self._dropped = None
        return found
