"""Log-probabilities of given tokens, for preference tuning: bound to a model once, then called with hidden states."""

from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from torchtune_lce.functional import compute, logprobs_and_entropy
from torchtune_lce.implementations.tensor_parallel import local_operands, mean_over_ranks
from torchtune_lce.inputs.call import Call
from torchtune_lce.inputs.dtypes import accumulation_dtype
from torchtune_lce.inputs.options import Options
from torchtune_lce.model.bound_model import check_one_tensor
from torchtune_lce.model.foreign_settings import refuses_settings_of_losses
from torchtune_lce.model.of_model_output import OfModelOutput
from torchtune_lce.model.stock_calls import check_no_preference_call
from torchtune_lce.terms.mean_logits import mean_logits


class TokenFigures(NamedTuple):
    """What :meth:`LinearTokenLogprobs.with_figures` returns, each in the shape of ``targets``.

    float32, or float64 for float64 inputs.
    """

    logprobs: Tensor  # 0 where ignored
    entropy: Tensor | None  # nats, without a gradient, 0 where ignored
    mean_logits: Tensor | None  # over the vocabulary, without a gradient, of every position


class LinearTokenLogprobs(OfModelOutput):
    """Log-probability of each target from hidden states and the model's own output projection, without the logits.

    .. code-block:: yaml

        logprobs:
          _component_: torchtune_lce.LinearTokenLogprobs

    What this package's DPO and PPO recipes use for policy and reference, one object a model; the section may be
    missing. Targets are never shifted here: entry i of ``targets`` is the token that hidden state i predicts.

    Args:
        ignore_index: targets of this value have log-probability 0 and no gradient.
        impl: one of :data:`torchtune_lce.implementations.choice.NAMES`.
        softcap: logits become ``softcap * tanh(logits / softcap)``; None as in torchtune's own models.
        logit_scale: what the logits are multiplied by after a softcap: 1 / temperature.
        filter_eps: see :func:`torchtune_lce.linear_cross_entropy`.
        workspace_mib: the most memory in MiB that an implementation may use beyond gradients and O(N + V).
        check_targets: check the range of every batch's targets on a GPU too, which stalls it, not only the first one's.

    Raises:
        TypeError, ValueError: a setting that no implementation accepts, by name.
    """

    _runs = "Token log-probabilities run"
    _not_copied = "log-probabilities that are bound to a model cannot be copied: release() them first, or build others"

    @refuses_settings_of_losses
    def __init__(
        self,
        ignore_index: int = -100,
        impl: str = "auto",
        softcap: float | None = None,
        logit_scale: float = 1.0,
        filter_eps: float | str | None = "auto",
        workspace_mib: int = 128,
        check_targets: bool = False,
    ):
        options = Options(
            ignore_index=ignore_index,
            softcap=softcap,
            logit_scale=logit_scale,
            filter_eps=filter_eps,
            workspace_mib=workspace_mib,
        )
        super().__init__(options, impl, check_targets)

    @property
    def rows(self) -> int:
        """V of the bound model."""
        return self._bound_model().rows

    @property
    def gives_hidden_states(self) -> bool:
        """Whether a bound model returns them at this moment: not within :meth:`logits`."""
        return self._bound is not None and self._bound.gives_hidden_states

    def logits_of(self, outputs: Tensor) -> Tensor:
        """What the bound model makes of hidden states [..., D]: all their logits, float32 [..., V], to sample from.

        Raises RuntimeError where no model is bound.
        """
        return self._bound_model().projection.logits(outputs)

    def generates(self) -> None:
        """torchtune may generate from the bound model, which is refused otherwise: for what returns, in place of its
        hidden states, something that gives each next token's :meth:`logits_of` them.

        Raises RuntimeError where no model is bound.
        """
        self._bound_model().generates()

    def forward(
        self,
        outputs: Tensor,  # [B, S, D] or [N, D]
        targets: Tensor,  # [B, S] or [N], ignore_index or 0 <= t < V
        *others: Tensor,  # none: what a preference recipe, of which this is no loss, calls its loss with
        logit_scale: float = 1.0,
    ) -> Tensor:
        """Log-probability of each target under the bound model's projection, in the shape of ``targets``.

        float32, or float64 for float64 inputs.

        ``logit_scale`` is a factor of this call, beside the setting: 1 / temperature.

        Raises:
            RuntimeError: no model bound, or ``impl`` cannot run here.
            TypeError, ValueError: see :func:`torchtune_lce.linear_token_logprobs`.
        """
        if others:
            check_no_preference_call(self, outputs, targets, *others)
            raise TypeError(f"outputs and targets are all that it takes, got {len(others)} more")
        return self.with_figures(outputs, targets, entropy=False, mean_logits=False, logit_scale=logit_scale).logprobs

    def with_figures(
        self,
        outputs: Tensor,
        targets: Tensor,
        *,
        entropy: bool = True,
        mean_logits: bool = True,
        logit_scale: float = 1.0,
    ) -> TokenFigures:
        """The same, and what is asked for beside it: each prediction's entropy, as ``return_entropy`` of
        :func:`torchtune_lce.linear_token_logprobs` has it, and the mean of its logits before a softcap.

        Under FSDP2 the weight is gathered once for all of them.
        """
        check_one_tensor(outputs)
        figures = {}
        options = replace(self._options, logit_scale=self._options.logit_scale * logit_scale)

        def run(outputs, targets, weight, bias, adapter) -> Tensor:
            outputs, weight, bias, shard = local_operands(outputs, weight, bias)
            call = self._checked(outputs, targets, weight, bias, shard, adapter, options)
            if mean_logits:
                figures["mean_logits"] = _mean_logits(call)
            if not entropy:
                return -compute(call, reduction="none", impl=self.impl)
            logprobs, figures["entropy"] = logprobs_and_entropy(call, self.impl)
            return logprobs

        logprobs = self._bound_model().projection.call(run, outputs, targets)
        return TokenFigures(logprobs, figures.get("entropy"), figures.get("mean_logits"))

    def _unbound_message(self) -> str:
        return (
            "log-probabilities were asked for before set_model_output, so no output projection is known: call "
            "logprobs.set_model_output(model), or torchtune_lce.linear_token_logprobs with a weight of your own"
        )


@torch.no_grad()
def _mean_logits(call: Call) -> Tensor:
    """In the shape of the targets, ignored ones as well."""
    means = mean_logits(call, torch.ones_like(call.labels, dtype=torch.bool))
    if call.shard is not None:
        means = mean_over_ranks(means, call.shard)
    return call.at_targets(means.to(accumulation_dtype(call.hidden.dtype)))
