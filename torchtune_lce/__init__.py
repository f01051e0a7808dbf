"""Linear cross-entropy for torchtune: loss and gradients from hidden states and output projection, without logits."""

import importlib
from typing import TYPE_CHECKING

from torchtune_lce.functional import linear_cross_entropy, linear_token_logprobs, linear_token_statistics

if TYPE_CHECKING:
    from torchtune_lce.distillation import LinearForwardKLLoss, LinearReverseKLLoss, LinearSymmetricKLLoss
    from torchtune_lce.logprobs import LinearTokenLogprobs
    from torchtune_lce.loss import LinearCrossEntropyLoss
    from torchtune_lce.model.model_output import skip_output_layer

__version__ = "0.2.0"
__all__ = [
    "LinearCrossEntropyLoss",
    "LinearForwardKLLoss",
    "LinearReverseKLLoss",
    "LinearSymmetricKLLoss",
    "LinearTokenLogprobs",
    "linear_cross_entropy",
    "linear_token_logprobs",
    "linear_token_statistics",
    "skip_output_layer",
]

# These need torchtune, whose import takes seconds and sets environment variables: loaded when first used.
_LAZY = {
    "LinearCrossEntropyLoss": "torchtune_lce.loss",
    "LinearForwardKLLoss": "torchtune_lce.distillation",
    "LinearReverseKLLoss": "torchtune_lce.distillation",
    "LinearSymmetricKLLoss": "torchtune_lce.distillation",
    "LinearTokenLogprobs": "torchtune_lce.logprobs",
    "skip_output_layer": "torchtune_lce.model.model_output",
}


def __getattr__(name: str):
    if name in _LAZY:
        return getattr(importlib.import_module(_LAZY[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
