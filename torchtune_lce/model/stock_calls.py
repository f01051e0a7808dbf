"""What torchtune's own recipes, which bind no loss to a model, are told when they call one of these."""

import sys
from pathlib import Path

from torch import Tensor, nn

RECIPES = Path(__file__).parents[1] / "recipes"


def our_recipe() -> str:
    """This package's recipe of the same name as the one that runs, or a word in its place if there is none."""
    running = Path(sys.argv[0]).stem
    return running if (RECIPES / f"{running}.py").exists() else "<recipe>"


def check_no_preference_call(loss: nn.Module, *arguments: object) -> None:
    """Raises TypeError for the call of a preference recipe, four log-probabilities a pair, each [B]."""
    for argument in arguments:
        if not (isinstance(argument, Tensor) and argument.ndim == 1 and argument.is_floating_point()):
            return
    raise TypeError(
        "loss must be torchtune's own in a preference recipe, such as torchtune.rlhf.loss.DPOLoss, got "
        f"{type(loss).__name__}, which takes hidden states, and here log-probabilities: set "
        f"loss=torchtune.rlhf.loss.DPOLoss, and use `tune run torchtune_lce/recipes/{our_recipe()}.py`, which spares "
        "the logits"
    )
