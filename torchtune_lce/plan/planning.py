"""A plan for one config: what every loss allocates in a step, and how much of a batch a card takes."""

from collections.abc import Callable
from functools import cached_property

import torch
from omegaconf import DictConfig
from torch import nn
from torchtune.modules.tied_linear import TiedLinear

from torchtune_lce.model_output import find_decoder
from torchtune_lce.options import Options
from torchtune_lce.output_adapter import Adapter, is_dora
from torchtune_lce.plan import activations
from torchtune_lce.plan.activations import Activations
from torchtune_lce.plan.loss_memory import OutputAdapter, Problem
from torchtune_lce.plan.step import Fixed, Step, fixed, step

# For the CUDA context and the gaps that PyTorch's allocator leaves.
USABLE = 0.92
_SEQUENCE_STEP = 256
_MOST_ROWS = 2**16


class Planner:
    """Steps of one config with any batch, sequence and loss, on ``devices`` that FSDP2 shards it over."""

    def __init__(self, config: DictConfig, dtype: torch.dtype, devices: int = 1):
        self.config = config
        self.dtype = dtype
        self._devices = devices
        self.model = activations.build(config.model, dtype)
        self.decoder = find_decoder(self.model)
        self._counted: dict[int, Activations] = {}  # of one row, by its length

    @cached_property
    def fixed(self) -> Fixed:
        whole = fixed(self.config, self.model, self.decoder, self.dtype)
        if self._devices == 1:
            return whole
        layers = [_bytes(layer) for layer in self.decoder.layers]
        return whole.sharded(self._devices, _bytes(self.model) - sum(layers), max(layers))

    def problem(self, rows: int, sequence: int) -> Problem:
        output = self.decoder.output
        weight = (output.tied_module if isinstance(output, TiedLinear) else output).weight
        workspace = self.config.get("loss", {}).get("workspace_mib", Options.workspace_mib)
        return Problem(
            tokens=rows * sequence,
            features=weight.shape[1],
            vocabulary=weight.shape[0],
            itemsize=self.dtype.itemsize,
            trained_head=weight.requires_grad,
            workspace_mib=workspace,
            adapter=self.adapter,
        )

    @property
    def adapter(self) -> OutputAdapter | None:
        """LoRA on the output, if it has that."""
        output = self.decoder.output
        if not isinstance(output, Adapter):
            return None
        dropout = getattr(output.dropout, "p", 0.0) > 0
        return OutputAdapter(output.lora_a.out_features, dropout, is_dora(output))

    def activations(self, rows: int, sequence: int) -> Activations:
        if sequence not in self._counted:
            self._counted[sequence] = activations.count(self.model, 1, sequence)
        return self._counted[sequence].times(rows)

    def step(self, loss: str, rows: int, sequence: int) -> Step:
        return step(self.fixed, self.activations(rows, sequence), loss, self.problem(rows, sequence))

    def most_rows(self, loss: str, sequence: int, memory: float) -> int:
        """The largest batch of such rows whose peak fits ``memory`` bytes; 0 if none does."""
        return _largest(lambda rows: self.step(loss, rows, sequence).peak <= memory, _MOST_ROWS)

    def longest(self, loss: str, rows: int, memory: float) -> int:
        """The longest sequence, in steps of 256, of which so many rows fit, within the model's own limit; or 0."""
        most = self.decoder.max_seq_len // _SEQUENCE_STEP
        fits = _largest(lambda steps: self.step(loss, rows, steps * _SEQUENCE_STEP).peak <= memory, most)
        return fits * _SEQUENCE_STEP


def _bytes(module: nn.Module) -> int:
    return sum(parameter.nbytes for parameter in module.parameters())


def _largest(fits: Callable[[int], bool], most: int) -> int:
    """The largest number up to ``most`` that fits, where all below one that fits fit too; 0 if 1 does not."""
    low, high = 0, most + 1
    while high - low > 1:
        middle = (low + high) // 2
        if fits(middle):
            low = middle
        else:
            high = middle
    return low
