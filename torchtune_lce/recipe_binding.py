"""The one thing that a torchtune 0.6.1 recipe lacks: it never tells a loss which model it belongs to."""

import os

from omegaconf import DictConfig

from torchtune_lce.loss import LinearCrossEntropyLoss
from torchtune_lce.model_output import uncompiled


class BindsLossToModel:
    """Put before a torchtune fine-tuning recipe among the bases of a class.

    A loss without ``set_model_output`` (torchtune's own of 0.6.1) is left alone: the recipe is then stock's.
    """

    def setup(self, cfg: DictConfig) -> None:
        super().setup(cfg)
        loss = uncompiled(self._loss_fn)
        if not hasattr(loss, "set_model_output"):
            return
        if loss is not self._loss_fn:
            # torchtune 0.6.1's LoRA recipe wraps any loss that it does not know in torch.compile; such a loss says
            # itself what to compile of it.
            self._loss_fn = loss.apply_compile_strategy(backend=os.environ.get("TORCH_COMPILE_BACKEND", "inductor"))
        if isinstance(loss, LinearCrossEntropyLoss):
            if loss.reduction != "mean":
                raise ValueError(
                    "loss.reduction must be mean in a torchtune recipe, which multiplies the loss by the number of "
                    f"tokens, got {loss.reduction}"
                )
            loss.tokenizer_size = getattr(self._tokenizer, "vocab_size", None)
        # After torchtune has sharded the model. torchtune main has done this already, and once more changes nothing.
        self._loss_fn.set_model_output(self._model)
