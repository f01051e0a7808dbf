"""What a caller can set about the loss, in one object that travels through every implementation."""

from dataclasses import dataclass

import torch

# What finfo(dtype).eps is divided by for the threshold "auto": 32 in Wijmans et al. 2024 (arXiv 2411.09009, section
# 4.3), here by measured errors and times (docs/precision.md). With a frozen projection less costs hardly any time.
AUTO_TRAINED, AUTO_FROZEN = 45, 64
# Figures of a batch that a recipe can log, see live_feedback.
METRICS = ("accuracy", "entropy", "nll", "z_loss")


@dataclass(frozen=True)
class Options:
    """Settings of one call, validated once by :func:`torchtune_lce.inputs.validation.check_options`.

    ``filter_eps`` is ``"auto"``, ``None`` (keep everything) or a float in [0, 1): softmax entries below it may be
    dropped from the gradients by the implementations that filter. ``logit_scale`` multiplies the logits after bias and
    softcap. ``z_loss`` times the squared log-sum-exp is added to each token's loss (PaLM, Chowdhery et al. 2022,
    section 5). ``label_smoothing`` is that of ``torch.nn.functional.cross_entropy``.
    """

    ignore_index: int = -100
    softcap: float | None = None
    logit_scale: float = 1.0
    filter_eps: float | str | None = "auto"
    workspace_mib: int = 128
    z_loss: float = 0.0
    label_smoothing: float = 0.0

    def resolved_filter_eps(self, dtype: torch.dtype, trains_projection: bool) -> float | None:
        """The threshold in force for gradients in ``dtype``, one of which may be the projection's or its adapter's."""
        if isinstance(self.filter_eps, str):
            return torch.finfo(dtype).eps / (AUTO_TRAINED if trains_projection else AUTO_FROZEN)
        return self.filter_eps or None
