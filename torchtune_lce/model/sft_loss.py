"""The interface that torchtune's main branch asks of a loss of its fine-tuning recipes.

torchtune main checks for it with isinstance, so its own class is inherited where it exists; the 0.6.1 release has none.
"""

from abc import ABC, abstractmethod

import torchtune.modules.loss
from torch import Tensor, nn


class _SFTLoss(ABC):
    """The same members as torchtune main's ``torchtune.modules.loss.SFTLoss``."""

    @abstractmethod
    def apply_compile_strategy(self, *args, **kwargs):
        """Compile in place whatever gains from it, and return self."""

    @abstractmethod
    def set_model_output(self, model: nn.Module) -> None:
        """Make the model return what this loss takes."""

    @abstractmethod
    def forward(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """The loss of the model's outputs."""

    @abstractmethod
    def patch_tp_plan(self, tp_plan: dict) -> dict:
        """The tensor parallel plan that this loss needs."""

    @property
    @abstractmethod
    def tp_requires_loss_parallel_ctx_manager(self) -> bool:
        """Whether the loss must run under torch.distributed's loss_parallel."""


SFTLoss = getattr(torchtune.modules.loss, "SFTLoss", _SFTLoss)
# Whether torchtune's own recipes bind such a loss, as main's do.
STOCK_RECIPES_BIND = SFTLoss is not _SFTLoss
