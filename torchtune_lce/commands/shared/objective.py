"""What a loss computes that is measured beside a teacher."""

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from torchtune_lce.divergence.operands import Shares

# By how torchtune's classes begin, its symmetric one with its own ratio.
_SHARES = {"forward": Shares(1.0, 0.0), "reverse": Shares(0.0, 1.0), "symmetric": Shares(0.5, 0.5)}


@dataclass(frozen=True)
class Objective:
    """As torchtune's distillation recipes mix it: ``kd_ratio``, in (0, 1], of a divergence of the student from its
    teacher, the rest the cross-entropy of the labels under the student.
    """

    divergence: str  # forward, reverse or symmetric
    kd_ratio: float = 1.0

    def __str__(self) -> str:
        name = f"{self.divergence} divergence"
        return name if self.is_divergence else f"{self.kd_ratio:g} {name} + {1 - self.kd_ratio:g} cross-entropy"

    @property
    def shares(self) -> Shares:
        """Of the forward and the reverse divergence."""
        return _SHARES[self.divergence]

    @property
    def is_divergence(self) -> bool:
        """And nothing else."""
        return self.kd_ratio == 1

    def mix(self, divergence: Tensor, cross_entropy: Callable[[], Tensor]) -> Tensor:
        """The second is asked for where it has a share."""
        if self.is_divergence:
            return divergence
        return self.kd_ratio * divergence + (1 - self.kd_ratio) * cross_entropy()
