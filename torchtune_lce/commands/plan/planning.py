"""A plan for one config: what every loss allocates in a step, and how much of a batch a card takes."""

from collections.abc import Callable
from functools import cached_property

import torch
from omegaconf import DictConfig
from torch import nn
from torchtune.modules.peft import get_adapter_params
from torchtune.modules.tied_linear import TiedLinear

from torchtune_lce.commands.plan import activations, distillation_memory, preference_memory
from torchtune_lce.commands.plan.activations import Activations
from torchtune_lce.commands.plan.distillation_memory import Distillation
from torchtune_lce.commands.plan.step import Fixed, Step, StepLoss, fixed, step
from torchtune_lce.commands.shared.distillation import check_vocabularies, distils
from torchtune_lce.commands.shared.errors import CommandError
from torchtune_lce.commands.shared.preferences import prefers
from torchtune_lce.implementations.memory import OutputAdapter, Problem, loss_memory, obstacle
from torchtune_lce.inputs.options import Options
from torchtune_lce.model.model_output import find_decoder
from torchtune_lce.model.output_adapter import Adapter, is_dora

# For the CUDA context and the gaps that PyTorch's allocator leaves.
USABLE = 0.92
_SEQUENCE_STEP = 256
_LARGEST_BATCH = 2**16


class Planner:
    """Steps of one config with any batch, sequence and loss, on ``devices`` that FSDP2 shards it over.

    A ``batch`` is as many rows as it says, or pairs of rows where the config learns from preferences.
    """

    def __init__(self, config: DictConfig, dtype: torch.dtype, devices: int = 1):
        self.config = config
        self.dtype = dtype
        self._devices = devices
        self.model = activations.build(config, "model", dtype)
        self.decoder = find_decoder(self.model)
        self.prefers = prefers(config)
        self.teacher = activations.build(config, "teacher_model", dtype) if distils(config) else None
        if self.teacher is not None:
            check_vocabularies(self.model, self.teacher)
        self._counted: dict[tuple[nn.Module, int], activations.Rows] = {}  # by their length
        if self.teacher is not None and (not get_adapter_params(self.model) or self.adapter is not None):
            raise CommandError(
                "model: a distillation is planned with LoRA on the student, as torchtune's recipes have it, and none "
                f"on its output, got {config.model._component_}"
            )

    @property
    def second(self) -> nn.Module | None:
        """What is there all the time and is not trained: a teacher, or a reference without adapters to disable."""
        if self.prefers and not get_adapter_params(self.model):
            return self.model
        return self.teacher

    @cached_property
    def fixed(self) -> Fixed:
        second = 0 if self.second is None else _bytes(self.second)
        whole = fixed(self.config, self.model, self.decoder, self.dtype, second)
        if self._devices == 1:
            return whole
        models = [self.model] if self.second is None else [self.model, self.second]
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
        if self.teacher is not None and loss not in distillation_memory.PLANNED:
            return "is not planned for a distillation; stock, chunked and cce are"
        if self.prefers and loss not in preference_memory.PLANNED:
            return "is not planned for preference tuning; stock, chunked and cce are"
        return obstacle(loss, self.adapter)

    def problem(self, batch: int, sequence: int) -> Problem:
        weight = _head_weight(self.decoder)
        ours = self.config.get("logprobs" if self.prefers else "loss") or {}
        return Problem(
            tokens=self._rows(batch) * sequence,
            features=weight.shape[1],
            vocabulary=weight.shape[0],
            itemsize=self.dtype.itemsize,
            trained_head=weight.requires_grad,
            workspace_mib=ours.get("workspace_mib", Options.workspace_mib),
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

    def activations(self, batch: int, sequence: int) -> Activations:
        return self._activations(self.model, batch, sequence)

    def _rows(self, batch: int) -> int:
        return 2 * batch if self.prefers else batch

    def _activations(self, model: nn.Module, batch: int, sequence: int) -> Activations:
        if (model, sequence) not in self._counted:
            self._counted[model, sequence] = activations.Rows(model, sequence)
        return self._counted[model, sequence].activations(self._rows(batch))

    def step(self, loss: str, batch: int, sequence: int) -> Step:
        counted, problem = self.activations(batch, sequence), self.problem(batch, sequence)
        if self.teacher is not None:
            own = distillation_memory.distillation_memory(loss, problem, self.distillation)
            of_teacher = self._activations(self.teacher, batch, sequence).untrained
            return step(self.fixed, counted, own, of_teacher)
        if self.prefers:
            own = preference_memory.preference_memory(loss, problem, self.second is not None)
            return step(self.fixed, counted, own, counted.untrained)
        return step(self.fixed, counted, StepLoss(loss_memory(loss, problem)))

    def largest_batch(self, loss: str, sequence: int, memory: float) -> int:
        """The largest one of such a length whose peak fits ``memory`` bytes; 0 if none does."""
        return _largest(lambda batch: self.step(loss, batch, sequence).peak <= memory, _LARGEST_BATCH)

    def longest(self, loss: str, batch: int, memory: float) -> int:
        """The longest sequence, in steps of 256, that fits in such a batch, within the model's own limit; or 0."""
        most = self.max_seq_len // _SEQUENCE_STEP
        fits = _largest(lambda steps: self.step(loss, batch, steps * _SEQUENCE_STEP).peak <= memory, most)
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
