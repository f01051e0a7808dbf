"""Full fine-tuning on one device, as torchtune's recipe of this name, with a loss that never holds the logits.

    tune run torchtune_lce/recipes/full_finetune_single_device.py --config <yaml>
    tune-lce run lce_full_finetune_single_device --config lce/llama3_2/1B_full_single_device

Takes every config of torchtune's recipe; its loss becomes this one by ``loss=torchtune_lce.LinearCrossEntropyLoss``.
"""

import sys

from omegaconf import DictConfig
from torchtune import config

from torchtune_lce.training.recipe_binding import BindsLossToModel
from torchtune_lce.training.stock_recipes import load_stock_recipe

stock = load_stock_recipe("full_finetune_single_device")


class FullFinetuneRecipeSingleDevice(BindsLossToModel, stock.FullFinetuneRecipeSingleDevice):
    """torchtune's recipe; the loss is bound to the model, and a step without labels is left out."""


@config.parse
def recipe_main(cfg: DictConfig) -> None:
    """Entry point; reads the config and then the command line, as torchtune's does."""
    config.log_config(recipe_name="FullFinetuneRecipeSingleDevice", cfg=cfg)
    recipe = FullFinetuneRecipeSingleDevice(cfg=cfg)
    recipe.setup(cfg=cfg)
    recipe.train()
    recipe.cleanup()


if __name__ == "__main__":
    sys.exit(recipe_main())
