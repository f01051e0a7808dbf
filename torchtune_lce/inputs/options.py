"""What a caller can set about the loss, in one object that travels through every implementation."""

from dataclasses import dataclass

import torch

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

    def resolved_filter_eps(self, dtype: torch.dtype) -> float | None:
        """The threshold in force for gradients in ``dtype``.

        ``auto`` is finfo(dtype).eps / 32, 2^-12 for bfloat16: the smallest probability that still matters once the
        gradient is rounded to that dtype (Wijmans et al. 2024, arXiv 2411.09009, section 4.3).
        """
        if isinstance(self.filter_eps, str):
            return torch.finfo(dtype).eps / 32
        return self.filter_eps or None
