"""The way of torchtune's main branch to the loss, in the recipes of the 0.6.1 release: chunks of projected tokens."""

from torch import Tensor, nn

from torchtune_lce.commands.shared import peers
from torchtune_lce.commands.shared.batches import IGNORE_INDEX
from torchtune_lce.model.model_output import skip_output_layer
from torchtune_lce.model.projection import Projection


class ChunkedProjectionLoss(nn.Module):
    """Eight chunks of tokens, each projected and reduced at once, keeping for the backward what autograd keeps.

    ``compile`` compiles what is done to a chunk, as torchtune's main branch does where its config says so.
    """

    def __init__(self, compile: bool = False):
        super().__init__()
        self.ignore_index = IGNORE_INDEX
        self._loss = peers.compiled_chunks(dynamic=None) if compile else peers.eager_chunks()
        self._projection = None

    def set_model_output(self, model: nn.Module) -> None:
        """The model returns hidden states from now on."""
        self._projection = Projection(model)
        skip_output_layer(model)

    def apply_compile_strategy(self, *args, **kwargs) -> "ChunkedProjectionLoss":
        """What there is to compile is compiled."""
        return self

    def forward(self, outputs: Tensor, targets: Tensor) -> Tensor:  # [N, D], [N]
        return self._projection.call(self._of_projection, outputs, targets)

    def _of_projection(
        self, hidden: Tensor, targets: Tensor, weight: Tensor, bias: Tensor | None, adapter: nn.Module | None
    ) -> Tensor:
        if bias is not None:
            raise ValueError("the model's output must have no bias: torchtune's way is measured without one")
        return self._loss(hidden, weight if adapter is None else adapter, targets)
