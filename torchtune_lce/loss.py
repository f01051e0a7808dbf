"""The loss as torchtune's recipes use it: bound to a model once, then called with hidden states and targets."""

import logging
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torchtune.utils import get_logger, log_rank_zero

from torchtune_lce.functional import TokenStatistics, compute, compute_token_statistics
from torchtune_lce.implementations import choice
from torchtune_lce.implementations.tensor_parallel import check_not_split, local_operands
from torchtune_lce.inputs import validation
from torchtune_lce.inputs.call import Call, checked
from torchtune_lce.inputs.options import Options
from torchtune_lce.inputs.shard import VocabularyShard
from torchtune_lce.model import output_adapter
from torchtune_lce.model.bound_model import BoundModel, check_one_tensor, check_width, described
from torchtune_lce.model.foreign_settings import refuses_settings_of_torchtune
from torchtune_lce.model.sft_loss import STOCK_RECIPES_BIND, SFTLoss
from torchtune_lce.model.stock_calls import check_no_preference_call, our_recipe


class Batch(NamedTuple):
    """What ``after_batch`` is given. Figures have no gradient."""

    hidden: Tensor  # [B, S, D] or [N, D]
    weight: Tensor  # [V, D], of tensor parallelism this rank's rows
    adapter: output_adapter.Adapter | None
    targets: Tensor  # [B, S] or [N]
    nll: Tensor  # [B S] or [N]: cross-entropy of each token, before label smoothing and z-loss; 0 where ignored
    z_loss: Tensor  # the same shape: the loss's z_loss times the squared log-sum-exp
    # Entropy and accuracy, which the logits are computed once more for.
    statistics: Callable[[], TokenStatistics]


class LinearCrossEntropyLoss(SFTLoss, nn.Module):
    """Cross-entropy from hidden states and the model's own output projection, without the logits.

    .. code-block:: yaml

        loss:
          _component_: torchtune_lce.LinearCrossEntropyLoss

    Targets are never shifted here: torchtune's recipes (0.6.1) and data sets (main) have done it.

    Args:
        ignore_index: targets of this value have no loss and no gradient.
        impl: one of :data:`torchtune_lce.implementations.choice.NAMES`.
        softcap: logits become ``softcap * tanh(logits / softcap)``; None as in torchtune's own models.
        filter_eps: see :func:`torchtune_lce.linear_cross_entropy`.
        reduction: ``mean`` over the targets that are not ignored, as torchtune's recipes need; ``sum``; or ``none``.
        workspace_mib: the most memory in MiB that an implementation may use beyond gradients and O(N + V).
        z_loss: this times the squared log-sum-exp is added to each token's loss, which keeps the logits from drifting.
        label_smoothing: see :func:`torchtune_lce.linear_cross_entropy`.
        metrics: names out of :data:`torchtune_lce.inputs.options.METRICS`, or one of them: what this package's recipes
            log of each step's labels, beside its loss.
        check_targets: check the range of every batch's targets on a GPU too, which stalls it, not only the first one's.
        logit_scale: what the logits are multiplied by after a softcap, see :func:`torchtune_lce.linear_cross_entropy`.

    Raises:
        TypeError, ValueError: a setting that no implementation accepts, by name.
    """

    @refuses_settings_of_torchtune
    def __init__(
        self,
        ignore_index: int = -100,
        impl: str = "auto",
        softcap: float | None = None,
        filter_eps: float | str | None = "auto",
        reduction: str = "mean",
        workspace_mib: int = 128,
        z_loss: float = 0.0,
        label_smoothing: float = 0.0,
        metrics: Sequence[str] | str = (),
        check_targets: bool = False,
        logit_scale: float = 1.0,
    ):
        super().__init__()
        self._options = Options(
            ignore_index=ignore_index,
            softcap=softcap,
            logit_scale=logit_scale,
            filter_eps=filter_eps,
            workspace_mib=workspace_mib,
            z_loss=z_loss,
            label_smoothing=label_smoothing,
        )
        validation.check_options(self._options)
        validation.check_reduction(reduction)
        validation.check_flag("check_targets", check_targets)
        choice.check_name(impl)
        self.impl = impl
        self.metrics = validation.check_metrics(metrics)
        self.reduction = reduction
        self.check_targets = check_targets
        self.tp_enabled = False
        # Entries of the tokenizer, where the recipe knows them: for the message about targets that name no row.
        self.tokenizer_size: int | None = None
        self.bound_by_our_recipe = False
        # Called after each loss that has gradients: whoever listens decides what is worth it. See live_feedback.
        self.after_batch: list[Callable[[Batch], None]] = []
        # No Module, so nothing of the model is registered here: the loss has no parameters and no state.
        self._bound: BoundModel | None = None
        self._first_batch = True
        self._warned = set()

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
        if self.reduction != "mean":
            self._warn_once(
                "loss.reduction must be mean in a torchtune recipe, which multiplies the loss by the number of tokens, "
                f"got {self.reduction}: right only in a loop of your own that expects it"
            )

    def release(self) -> None:
        """Undo set_model_output: the model gives logits again. Harmless when nothing is bound."""
        if self._bound is not None:
            self._bound.release()
            self._bound = None

    @contextmanager
    def logits(self) -> Iterator[None]:
        """``with loss.logits():`` the bound model gives logits, compiled or not, to generate or to evaluate with."""
        with nullcontext() if self._bound is None else self._bound.logits():
            yield

    def __getstate__(self) -> dict:
        """What a copy or a pickle takes; of a bound loss there is none, for it would hold and train a second model."""
        if self._bound is not None:
            raise TypeError(
                "a loss that is bound to a model cannot be copied: release() it first, or build another one. "
                "torchtune's early_exit_loss copies its loss and takes logits of every layer: leave early_exit_loss "
                "out of the config, or keep torch.nn.CrossEntropyLoss for it"
            )
        return vars(self)

    def forward(
        self,
        outputs: Tensor,  # [B, S, D] or [N, D]
        targets: Tensor,  # [B, S] or [N], ignore_index or 0 <= t < V
        weight: Tensor | None = None,  # [V, D]
        bias: Tensor | None = None,  # [V]
    ) -> Tensor:
        """The loss of hidden states ``outputs`` under ``weight``, or under the bound model's projection without one.

        Raises:
            RuntimeError: no weight given and no model bound, or ``impl`` cannot run here.
            TypeError, ValueError: see :func:`torchtune_lce.linear_cross_entropy`.
        """
        check_one_tensor(outputs)
        if weight is not None:
            check_no_preference_call(self, outputs, targets, weight, bias)
            check_not_split(outputs)
            return self._loss(outputs, targets, weight, bias)
        if bias is not None:
            raise ValueError("bias must come with weight: the bound projection brings its own")
        if self._bound is None:
            raise RuntimeError(_unbound_message())
        return self._bound.projection.call(self._bound_loss, outputs, targets)

    def implementation(self, outputs: Tensor) -> str:
        """What ``impl`` stands for with hidden states ``outputs``.

        Raises RuntimeError, saying what to set instead, for one that cannot run.
        """
        return choice.choose(self.impl, outputs)[0]

    def _loss(
        self,
        outputs: Tensor,
        targets: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        shard: VocabularyShard | None = None,
        adapter: output_adapter.Adapter | None = None,
    ) -> Tensor:
        call = self._checked(outputs, targets, weight, bias, shard, adapter)
        settings = {"reduction": self.reduction, "impl": self.impl}
        if not self.after_batch or not torch.is_grad_enabled():
            return compute(call, **settings)

        @torch.no_grad()
        def statistics() -> TokenStatistics:
            return compute_token_statistics(call)

        terms = []
        loss = compute(call, **settings, observe=lambda *values: terms.extend(values))
        nll, lse = terms
        # Here FSDP2 has the weight gathered already, and dropout on the output has been drawn.
        batch = Batch(outputs, weight, adapter, targets, nll, self._options.z_loss * lse.square(), statistics)
        for listen in self.after_batch:
            listen(batch)
        return loss

    def _checked(
        self,
        outputs: Tensor,
        targets: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        shard: VocabularyShard | None,
        adapter: output_adapter.Adapter | None,
    ) -> Call:
        """What every call is asked, and what only a bound loss knows to ask; the first batch says what runs."""
        validation.check_plain(outputs, weight, targets, bias)
        check_width(outputs, weight)
        # In this order: compiled code must not depend on whether a batch has been.
        first = validation.is_readable(targets) and self._first_batch
        tokenizer = "" if self.tokenizer_size is None else f", which has {self.tokenizer_size} entries"
        call = checked(
            outputs,
            weight,
            targets,
            bias,
            options=self._options,
            shard=shard,
            look=first or self.check_targets,
            if_too_large=(
                f". The model's output has {{vocabulary}} rows; the usual cause is a larger tokenizer{tokenizer}"
            ),
        )
        if first:
            self._say_which(outputs, weight, adapter)
            self._first_batch = False
        if self.metrics and not self.after_batch and torch.is_grad_enabled() and not torch.compiler.is_compiling():
            self._warn_once(
                f"loss.metrics ({', '.join(self.metrics)}) are not logged here: only this package's recipes log them. "
                "Use `tune run torchtune_lce/recipes/<recipe>.py`, or take them in "
                "loss.after_batch"
            )
        return call if adapter is None else replace(call, low_rank=output_adapter.low_rank(adapter, outputs))

    def _bound_loss(
        self,
        outputs: Tensor,
        targets: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        adapter: output_adapter.Adapter | None,
    ) -> Tensor:
        """The loss under the bound projection, whose rows tensor parallelism may have split over ranks."""
        outputs, weight, bias, shard = local_operands(outputs, weight, bias)
        return self._loss(outputs, targets, weight, bias, shard, adapter)

    def _say_which(self, outputs: Tensor, weight: Tensor, adapter: output_adapter.Adapter | None) -> None:
        log_rank_zero(
            get_logger(),
            f"Linear cross-entropy runs impl '{self.implementation(outputs)}' (set: '{self.impl}') on "
            f"{outputs.device.type} in {outputs.dtype}, output projection {described(weight, adapter)}.",
        )
        if STOCK_RECIPES_BIND and not self.bound_by_our_recipe:
            log_rank_zero(
                get_logger(),
                "The key log_loss_stats does nothing here, if the config has it: only this package's recipes know it, "
                "`tune run torchtune_lce/recipes/<recipe>.py`.",
            )

    def _warn_once(self, message: str) -> None:
        if message not in self._warned:
            self._warned.add(message)
            log_rank_zero(get_logger(), message, level=logging.WARNING)

    def apply_compile_strategy(self, *args, **kwargs) -> "LinearCrossEntropyLoss":
        """Nothing is left to compile: every implementation is either a kernel or compiles itself, once."""
        return self

    def patch_tp_plan(self, tp_plan: dict) -> dict:
        return tp_plan

    @property
    def tp_requires_loss_parallel_ctx_manager(self) -> bool:
        return False


def _unbound_message() -> str:
    """Names this package's recipe of the same name as the one that runs, if there is one."""
    if Path(sys.argv[0]).stem == "early_exit_finetune_distributed":
        return (
            "the loss was called before set_model_output, so it knows no output projection; and torchtune's early-exit "
            "recipe cannot use it, because early_exit_loss takes logits of every layer: set "
            "loss=torch.nn.CrossEntropyLoss"
        )
    return (
        "the loss was called before set_model_output, so it knows no output projection. torchtune 0.6.1's own recipes "
        f"never call that: use `tune run torchtune_lce/recipes/{our_recipe()}.py`, or add "
        "`self._loss_fn.set_model_output(self._model)` at the end of setup() to your own `tune cp` copy of a recipe"
    )
