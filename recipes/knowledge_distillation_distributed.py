"""Knowledge distillation on several devices: torchtune's recipe of this name, with losses that never hold the logits.

    tune run --nproc_per_node 2 torchtune_lce/recipes/knowledge_distillation_distributed.py --config <yaml>
    tune-lce run --nproc_per_node 2 lce_knowledge_distillation_distributed \\
        --config lce/llama3_2/8B_to_1B_KD_lora_distributed

Takes every config of torchtune's recipe; its losses become these by ``loss=torchtune_lce.LinearCrossEntropyLoss`` and
``kd_loss=torchtune_lce.LinearForwardKLLoss`` (or ``LinearReverseKLLoss``, ``LinearSymmetricKLLoss``), both together.
"""

import sys

from omegaconf import DictConfig
from torchtune import config

from torchtune_lce.training.process_group import join_processes
from torchtune_lce.training.recipe_binding import BindsLossesToModels
from torchtune_lce.training.stock_recipes import load_stock_recipe

stock = load_stock_recipe("knowledge_distillation_distributed")


class KDRecipeDistributed(BindsLossesToModels, stock.KDRecipeDistributed):
    """torchtune's recipe; the losses are bound to the models, and a step without labels is left out."""


@config.parse
def recipe_main(cfg: DictConfig) -> None:
    """Entry point; reads the config and then the command line, as torchtune's does."""
    join_processes(cfg)
    config.log_config(recipe_name="KDRecipeDistributed", cfg=cfg)
    recipe = KDRecipeDistributed(cfg=cfg)
    recipe.setup(cfg=cfg)
    recipe.train()
    recipe.cleanup()


if __name__ == "__main__":
    sys.exit(recipe_main())
