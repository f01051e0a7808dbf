"""Knowledge distillation on one device: torchtune's recipe of this name, with losses that never hold the logits.

    tune run torchtune_lce/recipes/knowledge_distillation_single_device.py --config <yaml>
    tune-lce run lce_knowledge_distillation_single_device --config lce/llama3_2/8B_to_1B_KD_lora_single_device

Takes every config of torchtune's recipe; its losses become these by ``loss=torchtune_lce.LinearCrossEntropyLoss`` and
``kd_loss=torchtune_lce.LinearForwardKLLoss`` (or ``LinearReverseKLLoss``, ``LinearSymmetricKLLoss``), both together.
"""

import sys

from omegaconf import DictConfig
from torchtune import config

from torchtune_lce.training.recipe_binding import BindsLossesToModels
from torchtune_lce.training.stock_recipes import load_stock_recipe

stock = load_stock_recipe("knowledge_distillation_single_device")


class KDRecipeSingleDevice(BindsLossesToModels, stock.KDRecipeSingleDevice):
    """torchtune's recipe; the losses are bound to the models, and a step without labels is left out."""


@config.parse
def recipe_main(cfg: DictConfig) -> None:
    """Entry point; reads the config and then the command line, as torchtune's does."""
    config.log_config(recipe_name="KDRecipeSingleDevice", cfg=cfg)
    recipe = KDRecipeSingleDevice(cfg=cfg)
    recipe.setup(cfg=cfg)
    recipe.train()
    recipe.cleanup()


if __name__ == "__main__":
    sys.exit(recipe_main())
