"""What loss and log-probabilities have in common: settings, the model that they are bound to, checks of a call."""

from abc import abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace

from torch import Tensor, nn
from torchtune.utils import get_logger, log_rank_zero

from torchtune_lce.implementations import choice
from torchtune_lce.inputs import validation
from torchtune_lce.inputs.call import Call, checked
from torchtune_lce.inputs.options import Options
from torchtune_lce.inputs.shard import VocabularyShard
from torchtune_lce.model.bound_model import BoundModel, check_width, described
from torchtune_lce.model.output_adapter import Adapter, low_rank


class OfModelOutput(nn.Module):
    """Bound to a model once, then called with its hidden states and targets."""

    # In messages: what runs, and why it cannot be copied while it is bound.
    _runs: str
    _not_copied: str

    def __init__(self, options: Options, impl: str, check_targets: bool):
        """Raises TypeError or ValueError for a setting that no implementation accepts, by name."""
        super().__init__()
        validation.check_options(options)
        validation.check_flag("check_targets", check_targets)
        choice.check_name(impl)
        self._options = options
        self.impl = impl
        self.check_targets = check_targets
        # Entries of the tokenizer, where the recipe knows them: for the message about targets that name no row.
        self.tokenizer_size: int | None = None
        # No Module, so nothing of the model is registered here: this has no parameters and no state.
        self._bound: BoundModel | None = None
        self._first_batch = True

    @property
    def ignore_index(self) -> int:
        return self._options.ignore_index

    @property
    def workspace_mib(self) -> int:
        return self._options.workspace_mib

    def set_model_output(self, model: nn.Module) -> None:
        """Make the model return hidden states and use its output projection from now on. After FSDP2, if that is used.

        Raises:
            TypeError, ValueError: a model whose output is not one matrix (and bias), with what to do instead. The model
                is then as it was.
        """
        self._bound = BoundModel(model, self._bound)
        self._first_batch = True

    def release(self) -> None:
        """Undo set_model_output: the model gives logits again. Harmless when nothing is bound."""
        if self._bound is not None:
            self._bound.release()
            self._bound = None

    @contextmanager
    def logits(self) -> Iterator[None]:
        """Inside, the bound model gives logits, compiled or not, to generate or to evaluate with."""
        with nullcontext() if self._bound is None else self._bound.logits():
            yield

    def __getstate__(self) -> dict:
        """What a copy or a pickle takes; there is none of what is bound, for it would hold and train a second model."""
        if self._bound is not None:
            raise TypeError(self._not_copied)
        return vars(self)

    def implementation(self, outputs: Tensor) -> str:
        """What ``impl`` stands for with hidden states ``outputs``.

        Raises RuntimeError, saying what to set instead, for one that cannot run.
        """
        return choice.choose(self.impl, outputs)[0]

    def apply_compile_strategy(self, *args, **kwargs) -> "OfModelOutput":
        """Nothing is left to compile: every implementation is either a kernel or compiles itself, once."""
        return self

    def _bound_model(self) -> BoundModel:
        if self._bound is None:
            raise RuntimeError(self._unbound_message())
        return self._bound

    @abstractmethod
    def _unbound_message(self) -> str:
        """Of a call before set_model_output, with what to do."""

    def _checked(
        self,
        outputs: Tensor,
        targets: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        shard: VocabularyShard | None,
        adapter: Adapter | None,
        options: Options,
    ) -> Call:
        """What every call is asked; the first batch says what runs."""
        validation.check_plain(outputs, weight, targets, bias)
        check_width(outputs, weight)
        # In this order: compiled code must not depend on whether a batch has been.
        first = validation.is_readable(targets) and self._first_batch
        call = checked(
            outputs,
            weight,
            targets,
            bias,
            options=options,
            shard=shard,
            look=first or self.check_targets,
            if_too_large=self._if_too_large(),
        )
        if first:
            self._say_which(outputs, weight, adapter)
            self._first_batch = False
        return call if adapter is None else replace(call, low_rank=low_rank(adapter, outputs))

    def _if_too_large(self) -> str:
        tokenizer = "" if self.tokenizer_size is None else f", which has {self.tokenizer_size} entries"
        return f". The model's output has {{vocabulary}} rows; the usual cause is a larger tokenizer{tokenizer}"

    def _say_which(self, outputs: Tensor, weight: Tensor, adapter: Adapter | None) -> None:
        log_rank_zero(
            get_logger(),
            f"{self._runs} impl '{self.implementation(outputs)}' (set: '{self.impl}') on {outputs.device.type} in "
            f"{outputs.dtype}, output projection {described(weight, adapter)}.",
        )
