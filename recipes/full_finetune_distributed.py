"""Full fine-tuning on several devices, as torchtune's recipe of this name, with a loss that never holds the logits.

    tune run --nproc_per_node 2 torchtune_lce/recipes/full_finetune_distributed.py --config <yaml>
    tune-lce run --nproc_per_node 2 lce_full_finetune_distributed --config lce/llama3_2/3B_full

Takes every config of torchtune's recipe; its loss becomes this one by ``loss=torchtune_lce.LinearCrossEntropyLoss``.
"""

import sys

from omegaconf import DictConfig
from torchtune import config

from torchtune_lce.training.process_group import require_launcher
from torchtune_lce.training.recipe_binding import BindsLossToModel
from torchtune_lce.training.stock_recipes import load_stock_recipe

stock = load_stock_recipe("full_finetune_distributed")


class FullFinetuneRecipeDistributed(BindsLossToModel, stock.FullFinetuneRecipeDistributed):
    """torchtune's recipe; the loss is bound to the model, and a step without labels is left out."""


@config.parse
def recipe_main(cfg: DictConfig) -> None:
    """Entry point; reads the config and then the command line, as torchtune's does."""
    # torchtune's own joins the processes itself, but asks the device for bfloat16 first.
    require_launcher()
    config.log_config(recipe_name="FullFinetuneRecipeDistributed", cfg=cfg)
    recipe = FullFinetuneRecipeDistributed(cfg=cfg)
    recipe.setup(cfg=cfg)
    recipe.train()
    recipe.cleanup()


if __name__ == "__main__":
    sys.exit(recipe_main())
