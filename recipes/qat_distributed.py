"""Quantisation-aware full fine-tuning: torchtune's recipe of this name, with a loss that never holds the logits.

    tune run --nproc_per_node 2 torchtune_lce/recipes/qat_distributed.py --config <yaml>
    tune-lce run --nproc_per_node 2 lce_qat_distributed --config lce/llama3/8B_qat_full

Takes every config of torchtune's recipe; its loss becomes this one by ``loss=torchtune_lce.LinearCrossEntropyLoss``.
"""

import sys

from omegaconf import DictConfig
from torchtune import config

from torchtune_lce.training.process_group import join_processes
from torchtune_lce.training.recipe_binding import BindsLossToModel
from torchtune_lce.training.stock_recipes import load_stock_recipe

stock = load_stock_recipe("qat_distributed")


class QATRecipeDistributed(BindsLossToModel, stock.QATRecipeDistributed):
    """torchtune's recipe; the loss is bound to the model, and a step without labels is left out."""


@config.parse
def recipe_main(cfg: DictConfig) -> None:
    """Entry point; reads the config and then the command line, as torchtune's does."""
    join_processes(cfg)
    config.log_config(recipe_name="QATRecipeDistributed", cfg=cfg)
    recipe = QATRecipeDistributed(cfg=cfg)
    recipe.setup(cfg=cfg)
    recipe.train()
    recipe.cleanup()


if __name__ == "__main__":
    sys.exit(recipe_main())
