"""The loss for models of Hugging Face's transformers, which call it from their own forward; needs no torchtune."""

from torchtune_lce.transformers.patching import patch, unpatch

__all__ = ["patch", "unpatch"]
