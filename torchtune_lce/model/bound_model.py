"""A model bound to a loss: it returns hidden states from now on, and the loss reads its output projection."""

from torch import Tensor, nn

from torchtune_lce.model.model_output import skip_output_layer
from torchtune_lce.model.output_adapter import Adapter, is_dora
from torchtune_lce.model.projection import Projection, output_rows


class BoundModel:
    """Binds ``model``; :meth:`release` undoes it.

    Args:
        model: after FSDP2 and tensor parallelism, if they are used.
        before: what the same loss was bound to, if anything: it is released, and may be of the same model.

    Raises:
        TypeError, ValueError: a model whose output is not one matrix (and bias, and adapter), with what to do instead.
            All is then as it was.
    """

    def __init__(self, model: nn.Module, before: "BoundModel | None" = None):
        self.projection = Projection(model)
        self.rows = output_rows(model)
        if before is not None:
            # Before the output layer is skipped: it may be the same model.
            before.release()
        self._skipped = skip_output_layer(model)
        self.logits = self._skipped.logits
        self.generates = self._skipped.generates

    @property
    def gives_hidden_states(self) -> bool:
        """False within :meth:`logits`."""
        return self._skipped.is_skipped

    def release(self) -> None:
        """The model gives logits again."""
        self.projection.release()
        self._skipped.restore()


def check_one_tensor(outputs: Tensor) -> None:
    """Raises TypeError for the several hidden states that a decoder can be built to return."""
    if isinstance(outputs, (list, tuple)):
        raise TypeError(
            f"outputs must be one tensor of hidden states, got a {type(outputs).__name__} of {len(outputs)}: build "
            "the model without output_hidden_states, or pass the last one"
        )


def check_width(outputs: Tensor, weight: Tensor) -> None:
    """Raises ValueError where ``outputs`` are no hidden states for ``weight``."""
    if weight.ndim != 2 or outputs.shape[-1:] == weight.shape[1:]:
        return
    given_logits = outputs.shape[-1:] == weight.shape[:1]
    hint = ": those are logits: leave `with loss.logits()`, or call set_model_output again" if given_logits else ""
    raise ValueError(
        f"outputs must be hidden states of shape [..., {weight.shape[1]}] to match weight, "
        f"got {list(outputs.shape)}{hint}"
    )


def described(weight: Tensor, adapter: Adapter | None) -> str:
    """An output projection in a message."""
    if adapter is None:
        return str(list(weight.shape))
    kind = "DoRA" if is_dora(adapter) else "LoRA"
    return f"{list(weight.shape)} and the {kind} on it, of rank {adapter.lora_a.out_features}"
