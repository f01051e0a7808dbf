"""A plan for one config: what every loss allocates in a step, and how much of a batch a card takes."""

from collections.abc import Callable
from functools import cached_property

import torch
from omegaconf import DictConfig
from torch import nn
from torchtune.modules.peft import get_adapter_params
from torchtune.modules.tied_linear import TiedLinear

from torchtune_lce.commands.plan import activations
from torchtune_lce.commands.plan.activations import Activations
from torchtune_lce.commands.plan.distillation_memory import PLANNED, Distillation
from torchtune_lce.commands.plan.step import Fixed, Step, fixed, step, teacher_forward
from torchtune_lce.commands.shared.distillation import check_vocabularies, distils
from torchtune_lce.commands.shared.errors import CommandError
from torchtune_lce.implementations.memory import OutputAdapter, Problem, obstacle
from torchtune_lce.inputs.options import Options
from torchtune_lce.model.model_output import find_decoder
from torchtune_lce.model.output_adapter import Adapter, is_dora

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
        self.model = activations.build(config, "model", dtype)
        self.decoder = find_decoder(self.model)
        self.teacher = activations.build(config, "teacher_model", dtype) if distils(config) else None
        if self.teacher is not None:
            check_vocabularies(self.model, self.teacher)
        self._counted: dict[tuple[nn.Module, int], Activations] = {}  # of one row, by its length
        if self.teacher is not None and (not get_adapter_params(self.model) or self.adapter is not None):
            raise CommandError(
                "model: a distillation is planned with LoRA on the student, as torchtune's recipes have it, and none "
                f"on its output, got {config.model._component_}"
            )

    @cached_property
    def fixed(self) -> Fixed:
        teacher = 0 if self.teacher is None else _bytes(self.teacher)
        whole = fixed(self.config, self.model, self.decoder, self.dtype, teacher)
        if self._devices == 1:
            return whole
        models = [self.model] if self.teacher is None else [self.model, self.teacher]
        layers = [[_bytes(layer) for layer in model.layers] for model in models]
        root = sum(map(_bytes, models)) - sum(map(sum, layers))
        return whole.sharded(self._devices, root, max(map(max, layers)))

    @cached_property
    def distillation(self) -> Distillation | None:
        if self.teacher is None:
            return None
        workspace = self.config.kd_loss.get("workspace_mib", Options.workspace_mib)
        name = self.config.kd_loss._component_.rpartition(".")[2]
        divergence = next(kind for kind in ("Forward", "Reverse", "Symmetric") if kind in name)
        return Distillation(divergence, _head_weight(self.teacher).shape[1], workspace)

    @property
    def max_seq_len(self) -> int:
        """Tokens of a row that the model takes, and the teacher if there is one."""
        models = [self.decoder] if self.teacher is None else [self.decoder, self.teacher]
        return min(model.max_seq_len for model in models)

    def obstacle(self, loss: str) -> str | None:
        """Why there is no plan for this loss with such a config, or None."""
        if self.teacher is not None and loss not in PLANNED:
            return "is not planned for a distillation; stock, chunked and cce are"
        return obstacle(loss, self.adapter)

    def problem(self, rows: int, sequence: int) -> Problem:
        weight = _head_weight(self.decoder)
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
        return self._activations(self.model, rows, sequence)

    def _activations(self, model: nn.Module, rows: int, sequence: int) -> Activations:
        if (model, sequence) not in self._counted:
            self._counted[model, sequence] = activations.count(model, 1, sequence)
        return self._counted[model, sequence].times(rows)

    def step(self, loss: str, rows: int, sequence: int) -> Step:
        counted, problem = self.activations(rows, sequence), self.problem(rows, sequence)
        if self.teacher is None:
            return step(self.fixed, counted, loss, problem)
        of_teacher = teacher_forward(self._activations(self.teacher, rows, sequence))
        return step(self.fixed, counted, loss, problem, self.distillation, of_teacher)

    def most_rows(self, loss: str, sequence: int, memory: float) -> int:
        """The largest batch of such rows whose peak fits ``memory`` bytes; 0 if none does."""
        return _largest(lambda rows: self.step(loss, rows, sequence).peak <= memory, _MOST_ROWS)

    def longest(self, loss: str, rows: int, memory: float) -> int:
        """The longest sequence, in steps of 256, of which so many rows fit, within the model's own limit; or 0."""
        most = self.max_seq_len // _SEQUENCE_STEP
        fits = _largest(lambda steps: self.step(loss, rows, steps * _SEQUENCE_STEP).peak <= memory, most)
        return fits * _SEQUENCE_STEP


def _head_weight(decoder: nn.Module) -> nn.Parameter:
    output = decoder.output
    return (output.tied_module if isinstance(output, TiedLinear) else output).weight


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
