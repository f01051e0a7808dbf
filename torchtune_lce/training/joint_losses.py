"""A distillation recipe's two losses by one walk over the vocabulary, where the kernels run.

The divergence needs the student's softmax of every label, and so has the cross-entropy at hand: the same gradient by
the student's logits takes both, in the shares that the recipe mixes them in.
"""

from omegaconf import DictConfig
from torch import Tensor, nn
from torchtune.utils import get_logger, log_rank_zero

from torchtune_lce.distillation import KullbackLeibler
from torchtune_lce.implementations.capabilities import CCE_PRESETS
from torchtune_lce.loss import LinearCrossEntropyLoss
from torchtune_lce.training.live_feedback import LOSS_SETTING


class JointLosses:
    """Stands in for both losses within a step: asked for the divergence, which comes first, it computes either."""

    def __init__(self, loss: LinearCrossEntropyLoss, kd_loss: KullbackLeibler, kd_ratio: float):
        """Bound to their models; ``kd_ratio`` of the recipe's loss is the divergence, the rest the cross-entropy."""
        self._loss = loss
        self._kd_loss = kd_loss
        self._label_share = 1 - kd_ratio
        self._cross_entropy: Tensor | None = None
        self._said = False

    def of_teacher(self, student_hidden: Tensor, teacher_hidden: Tensor, labels: Tensor) -> Tensor:
        """The recipe's ``kd_loss``."""
        if not self._in_one_walk(student_hidden, teacher_hidden):
            return self._kd_loss(student_hidden, teacher_hidden, labels)
        self._loss.check_labels(labels)
        divergence, self._cross_entropy = self._kd_loss.with_cross_entropy(
            student_hidden, teacher_hidden, labels, self._label_share
        )
        return divergence

    def of_labels(self, hidden: Tensor, labels: Tensor) -> Tensor:
        """The recipe's ``loss``, of what it gave :meth:`of_teacher` before."""
        found, self._cross_entropy = self._cross_entropy, None
        return self._loss(hidden, labels) if found is None else found

    def _in_one_walk(self, student_hidden: Tensor, teacher_hidden: Tensor) -> bool:
        by_kernels = self._loss.implementation(student_hidden) in CCE_PRESETS
        joint = by_kernels and self._kd_loss.takes_cross_entropy(student_hidden, teacher_hidden)
        if joint and not self._said:
            self._said = True
            log_rank_zero(
                get_logger(),
                f"loss (impl set: '{self._loss.impl}') is computed along with kd_loss, in one walk over the "
                "vocabulary: its gradients leave nothing out.",
            )
        return joint


def joint_losses(loss: nn.Module, kd_loss: nn.Module, kd_ratio: float, cfg: DictConfig) -> JointLosses | None:
    """None where a config wants of one what the other does not compute, or mixes nothing.

    By the config alone, as all ranks have it: all of them gather the same weights.
    """
    if not isinstance(loss, LinearCrossEntropyLoss) or not isinstance(kd_loss, KullbackLeibler):
        return None
    wants_more = not loss.is_plain or cfg.get(LOSS_SETTING, False)
    if wants_more or loss.ignore_index != kd_loss.ignore_index or not 0 < kd_ratio < 1:
        return None
    return JointLosses(loss, kd_loss, kd_ratio)
