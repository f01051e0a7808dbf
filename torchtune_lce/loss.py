"""The loss as torchtune's recipes use it: bound to a model once, then called with hidden states and targets."""

import logging
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torchtune.utils import get_logger, log_rank_zero

from torchtune_lce.functional import TokenStatistics, compute, compute_token_statistics
from torchtune_lce.implementations.tensor_parallel import check_not_split, local_operands
from torchtune_lce.inputs import validation
from torchtune_lce.inputs.options import Options
from torchtune_lce.inputs.shard import VocabularyShard
from torchtune_lce.model import output_adapter
from torchtune_lce.model.bound_model import check_one_tensor
from torchtune_lce.model.foreign_settings import refuses_settings_of_torchtune
from torchtune_lce.model.of_model_output import OfModelOutput
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


class LinearCrossEntropyLoss(OfModelOutput, SFTLoss):
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

    _runs = "Linear cross-entropy runs"
    _not_copied = (
        "a loss that is bound to a model cannot be copied: release() it first, or build another one. "
        "torchtune's early_exit_loss copies its loss and takes logits of every layer: leave early_exit_loss "
        "out of the config, or keep torch.nn.CrossEntropyLoss for it"
    )

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
        options = Options(
            ignore_index=ignore_index,
            softcap=softcap,
            logit_scale=logit_scale,
            filter_eps=filter_eps,
            workspace_mib=workspace_mib,
            z_loss=z_loss,
            label_smoothing=label_smoothing,
        )
        super().__init__(options, impl, check_targets)
        validation.check_reduction(reduction)
        self.metrics = validation.check_metrics(metrics)
        self.reduction = reduction
        self.tp_enabled = False
        self.bound_by_our_recipe = False
        # Called after each loss that has gradients: whoever listens decides what is worth it. See live_feedback.
        self.after_batch: list[Callable[[Batch], None]] = []
        self._warned = set()

    def set_model_output(self, model: nn.Module) -> None:
        """See :class:`OfModelOutput`; warns of a reduction that torchtune's recipes do not expect."""
        super().set_model_output(model)
        if self.reduction != "mean":
            self._warn_once(
                "loss.reduction must be mean in a torchtune recipe, which multiplies the loss by the number of tokens, "
                f"got {self.reduction}: right only in a loop of your own that expects it"
            )

    @property
    def is_plain(self) -> bool:
        """Whether it is the mean cross-entropy of the bound model's own logits, and nobody asks for more than that."""
        options = self._options
        plain = replace(
            Options(),
            ignore_index=options.ignore_index,
            workspace_mib=options.workspace_mib,
            filter_eps=options.filter_eps,
        )
        return options == plain and self.reduction == "mean" and not self.after_batch

    def check_labels(self, labels: Tensor) -> None:
        """What a call with these targets is asked of their range, for whoever computes the loss in its place.

        Raises ValueError for a label that names no row of the bound model's output, in the first batch, and wherever
        calls look at every one's.
        """
        if not validation.is_readable(labels):
            return
        if self._first_batch or self.check_targets or labels.device.type == "cpu":
            rows = self._bound_model().rows
            validation.check_range(labels, rows, self.ignore_index, self._if_too_large().format(vocabulary=rows))
            self._first_batch = False

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
        return self._bound_model().projection.call(self._bound_loss, outputs, targets)

    def _loss(
        self,
        outputs: Tensor,
        targets: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        shard: VocabularyShard | None = None,
        adapter: output_adapter.Adapter | None = None,
    ) -> Tensor:
        call = self._checked(outputs, targets, weight, bias, shard, adapter, self._options)
        self._tell_of_metrics()
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

    def _tell_of_metrics(self) -> None:
        if self.metrics and not self.after_batch and torch.is_grad_enabled() and not torch.compiler.is_compiling():
            self._warn_once(
                f"loss.metrics ({', '.join(self.metrics)}) are not logged here: only this package's recipes log them. "
                "Use `tune run torchtune_lce/recipes/<recipe>.py`, or take them in "
                "loss.after_batch"
            )

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
        super()._say_which(outputs, weight, adapter)
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

    def patch_tp_plan(self, tp_plan: dict) -> dict:
        return tp_plan

    @property
    def tp_requires_loss_parallel_ctx_manager(self) -> bool:
        return False

    def _unbound_message(self) -> str:
        """Names this package's recipe of the same name as the one that runs, if there is one."""
        if Path(sys.argv[0]).stem == "early_exit_finetune_distributed":
            return (
                "the loss was called before set_model_output, so it knows no output projection; and torchtune's "
                "early-exit recipe cannot use it, because early_exit_loss takes logits of every layer: set "
                "loss=torch.nn.CrossEntropyLoss"
            )
        return (
            "the loss was called before set_model_output, so it knows no output projection. torchtune 0.6.1's own "
            f"recipes never call that: use `tune run torchtune_lce/recipes/{our_recipe()}.py`, or add "
            "`self._loss_fn.set_model_output(self._model)` at the end of setup() to your own `tune cp` copy of a recipe"
        )
