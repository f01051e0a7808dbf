"""A distillation recipe's two losses by one walk over the vocabulary, where the kernels run.

The divergence needs the student's softmax of every label, and so has the cross-entropy at hand: the same gradient by
the student's logits takes both, in the shares that the recipe mixes them in.
"""

from omegaconf import DictConfig
from torch import Tensor, nn

from torchtune_lce.distillation import (
    KullbackLeibler,
    LinearForwardKLLoss,
    LinearReverseKLLoss,
    LinearSymmetricKLLoss,
)
from torchtune_lce.implementations.capabilities import CCE_PRESETS
from torchtune_lce.loss import LinearCrossEntropyLoss
from torchtune_lce.training.live_feedback import is_asked_for

# These alone: whoever derives from them means another loss.
_DIVERGENCES = LinearForwardKLLoss, LinearReverseKLLoss, LinearSymmetricKLLoss


class JointLosses:
    """Stands in for both losses within one step: asked for the divergence first, it computes either."""

    def __init__(self, loss: LinearCrossEntropyLoss, kd_loss: KullbackLeibler, kd_ratio: float):
        """Bound to their models; ``kd_ratio`` of the recipe's loss is the divergence, the rest the cross-entropy."""
        self._loss = loss
        self._kd_loss = kd_loss
        self._kd_ratio = kd_ratio
        # Of hidden states and labels, once one is known.
        self._cross_entropy: tuple[Tensor, Tensor, Tensor] | None = None
        self._asked = False

    def of_teacher(self, student_hidden: Tensor, teacher_hidden: Tensor, labels: Tensor) -> Tensor:
        """The recipe's ``kd_loss``."""
        if self._asked or not self._in_one_walk(student_hidden, teacher_hidden):
            return self._kd_loss(student_hidden, teacher_hidden, labels)
        self._loss.check_labels(labels)
        divergence, cross_entropy = self._kd_loss.with_cross_entropy(
            student_hidden, teacher_hidden, labels, self._kd_ratio
        )
        self._cross_entropy = student_hidden, labels, cross_entropy
        return divergence

    def of_labels(self, hidden: Tensor, labels: Tensor) -> Tensor:
        """The recipe's ``loss``."""
        self._asked = True
        if self._cross_entropy is None:
            return self._loss(hidden, labels)
        of_hidden, of_labels, found = self._cross_entropy
        if hidden is not of_hidden or labels is not of_labels:
            raise RuntimeError(
                "loss was called with other hidden states or labels than kd_loss before it in the same step, for which "
                "both had been computed: set loss.impl=chunked to have a walk over the vocabulary for each"
            )
        return found

    def _in_one_walk(self, student_hidden: Tensor, teacher_hidden: Tensor) -> bool:
        # Whoever listens may have come since the recipe was set up.
        if not 0 < self._kd_ratio < 1 or not self._loss.is_plain or _has_hooks(self._loss) or _has_hooks(self._kd_loss):
            return False
        by_kernels = self._loss.implementation(student_hidden) in CCE_PRESETS
        return by_kernels and self._kd_loss.takes_cross_entropy(student_hidden, teacher_hidden)


def _has_hooks(module: nn.Module) -> bool:
    return bool(
        module._forward_pre_hooks or module._forward_hooks or module._backward_pre_hooks or module._backward_hooks
    )


def may_be_joint(loss: nn.Module, kd_loss: nn.Module, cfg: DictConfig) -> bool:
    """Whether neither of a recipe's losses computes what the other does not; a batch decides the rest.

    By the config alone, as all ranks have it: all of them gather the same weights.
    """
    if type(loss) is not LinearCrossEntropyLoss or type(kd_loss) not in _DIVERGENCES:
        return False
    return loss.is_plain and loss.ignore_index == kd_loss.ignore_index and not is_asked_for(cfg)
