"""What the loss did and what the model predicted, in torchtune's own metric logger.

A config asks for the one with ``log_loss_stats: True``, beside torchtune's ``log_peak_memory_stats``, and for the other
with the loss's own ``metrics``. Nothing is attached, and nothing costs anything, where none does.
"""

import logging
from collections.abc import Callable, Mapping

import torch
import torch.distributed as dist
from omegaconf import DictConfig
from torch import Tensor
from torchtune.utils import get_logger, log_rank_zero

from torchtune_lce.implementations.memory import OutputAdapter, Problem, loss_memory
from torchtune_lce.inputs import filtering
from torchtune_lce.loss import Batch, LinearCrossEntropyLoss
from torchtune_lce.model import output_adapter

LOSS_SETTING = "log_loss_stats"
# What each of the loss's metrics is called in the log, where a name that ends in `loss` would be taken for the loss.
TOKEN_KEYS = {"accuracy": "token_accuracy", "entropy": "token_entropy", "nll": "token_nll", "z_loss": "token_z"}


def is_asked_for(cfg: DictConfig) -> bool:
    """Whether ``cfg`` wants the loss's statistics. Raises ValueError for what is neither True nor False."""
    found = cfg.get(LOSS_SETTING) or False
    if not isinstance(found, bool):
        raise ValueError(f"{LOSS_SETTING} must be True or False, got {found!r}")
    return found


def say_nothing_comes(cfg: DictConfig, why: str) -> None:
    """To who asks for it in a recipe that has nothing to tell. Raises as :func:`is_asked_for`."""
    if is_asked_for(cfg):
        log_rank_zero(get_logger(), f"The key {LOSS_SETTING} does nothing here: {why}.", level=logging.WARNING)


def attach(recipe, cfg: DictConfig, loss: LinearCrossEntropyLoss) -> None:
    """What ``cfg`` asks for, to a torchtune recipe that has been set up with this loss."""
    logger = getattr(recipe, "_metric_logger", None)  # one rank of several has it
    if is_asked_for(cfg) and logger is not None:
        logger = recipe._metric_logger = LossStatistics(logger, loss)
    if loss.metrics:
        batches = BatchStatistics(recipe, loss)
        if logger is not None:
            recipe._metric_logger = AddsToRecords(logger, batches.of_step)


class AddsToRecords:
    """Stands in for a recipe's metric logger: each record gets what ``more`` returns for its step."""

    def __init__(self, logger, more: Callable[[int], Mapping[str, float]]):
        self._logger = logger
        self._more = more

    def log_dict(self, payload: Mapping, step: int) -> None:
        self._logger.log_dict({**payload, **self._more(step)}, step=step)

    def __getattr__(self, name: str):
        """All else is the logger's own."""
        return getattr(self._logger, name)


class LossStatistics(AddsToRecords):
    """Each record gets what the loss did since the one before.

    ``impl_is_<name>`` is 1 for the implementation that ran: loggers take numbers alone. ``loss_memory_planned`` is what
    the largest batch was to take in it, in GiB as torchtune logs memory, by the formulas of ``tune-lce plan``: the
    allocator's peak would have to be reset to measure it, which is torchtune's to do. Where it filters gradients,
    ``kept_fraction`` is that of the softmax's tiles that the gradients were made of, and ``largest_dropped_mass``
    bounds the softmax mass that was left out of any token's; see :mod:`torchtune_lce.inputs.filtering`. Both are
    collected on the device and read only when torchtune logs, which waits for the device anyway. On several devices
    they are those of the one that logs.
    """

    def __init__(self, logger, loss: LinearCrossEntropyLoss):
        super().__init__(logger, self._take)
        self._workspace_mib = loss.workspace_mib
        self._impl: str | None = None
        self._records: list[filtering.FilterRecord] = []
        self._recording = None
        self._tiles: Tensor | None = None  # [2] int64: kept and all
        self._dropped: Tensor | None = None  # float32
        self._planned: int | None = None  # bytes
        loss.register_forward_pre_hook(self._begin)
        loss.register_forward_hook(self._end, always_call=True)
        loss.after_batch.append(self._plan)

    def _begin(self, loss: LinearCrossEntropyLoss, inputs: tuple) -> None:
        self._collect()
        self._impl = loss.implementation(inputs[0])
        self._recording = filtering.recording()
        self._records = self._recording.__enter__()

    def _end(self, *_) -> None:
        if self._recording is not None:
            self._recording.__exit__(None, None, None)
            self._recording = None

    def _plan(self, batch: Batch) -> None:
        planned = loss_memory(self._impl, _problem(batch, self._workspace_mib)).peak
        self._planned = max(planned, self._planned or 0)

    def _collect(self) -> None:
        """Adds up what the calls before have left, their backward included, without waiting for the device."""
        for record in self._records:
            if record.tiles is not None:  # a validation has no backward
                self._tiles = record.tiles if self._tiles is None else self._tiles + record.tiles
            if record.dropped_mass.numel():
                largest = record.dropped_mass.max()
                self._dropped = largest if self._dropped is None else torch.maximum(self._dropped, largest)
        self._records = []

    def _take(self, step: int) -> dict[str, float]:
        self._collect()
        found = {} if self._impl is None else {f"impl_is_{self._impl}": 1}
        if self._tiles is not None:
            kept, tiles = self._tiles.tolist()
            found["kept_fraction"] = kept / max(tiles, 1)
        if self._dropped is not None:
            found["largest_dropped_mass"] = self._dropped.item()
        if self._planned is not None:
            found["loss_memory_planned"] = self._planned / 2**30
        self._tiles = self._dropped = self._planned = None
        return found


def _problem(batch: Batch, workspace_mib: int) -> Problem:
    vocabulary, features = batch.weight.shape
    layer, adapter = batch.adapter, None
    if layer is not None:
        dropout = getattr(layer.dropout, "p", 0.0) > 0
        adapter = OutputAdapter(layer.lora_a.out_features, dropout, output_adapter.is_dora(layer))
    return Problem(
        tokens=batch.targets.numel(),
        features=features,
        vocabulary=vocabulary,
        itemsize=batch.hidden.itemsize,
        trained_head=batch.weight.requires_grad,
        workspace_mib=workspace_mib,
        adapter=adapter,
    )


class BatchStatistics:
    """Means of the loss's ``metrics`` over all labels of a step: those of its micro-batches, and of all devices.

    Collected only for steps that torchtune logs, on the device, and read when it does. Only one of several devices has
    a logger, and only calls of the loss are made by all of them: so each adds an all-reduce of five numbers at most.
    Under tensor parallelism the same labels count once for every rank of it, in numerator and denominator.
    """

    def __init__(self, recipe, loss: LinearCrossEntropyLoss):
        self._recipe = recipe
        self._metrics = loss.metrics
        self._ignore_index = loss.ignore_index
        self._step: int | None = None
        self._sums: Tensor | None = None  # of that step: one for each metric, and the number of labels
        loss.after_batch.append(self._add)

    def of_step(self, step: int) -> dict[str, float]:
        if step != self._step:
            return {}
        means = (self._sums[:-1] / self._sums[-1]).tolist()
        return {TOKEN_KEYS[name]: mean for name, mean in zip(self._metrics, means, strict=True)}

    def _add(self, batch: Batch) -> None:
        step = self._recipe.global_step + 1  # counted once it is done
        if step % self._recipe._log_every_n_steps:
            return
        values = {"nll": batch.nll, "z_loss": batch.z_loss}
        if not values.keys() >= set(self._metrics):
            values["entropy"], values["accuracy"] = batch.statistics()
        labels = batch.targets != self._ignore_index
        tokens = *(values[name] for name in self._metrics), labels
        sums = torch.stack([x.sum(dtype=batch.nll.dtype) for x in tokens])
        if dist.is_available() and dist.is_initialized():
            dist.all_reduce(sums)
        self._sums = self._sums + sums if step == self._step else sums
        self._step = step
