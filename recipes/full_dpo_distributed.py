"""Full preference tuning (DPO) on several devices: torchtune's recipe of this name, without the logits.

    tune run --nproc_per_node 2 torchtune_lce/recipes/full_dpo_distributed.py --config llama3_1/8B_full_dpo
    tune-lce run --nproc_per_node 2 lce_full_dpo_distributed --config lce/llama3_1/8B_full_dpo

Takes every config of torchtune's recipe, unchanged: the loss stays torchtune's. How log-probabilities are made may be
set in a section of its own, ``logprobs``; see :class:`torchtune_lce.LinearTokenLogprobs`.
"""

import sys

from omegaconf import DictConfig
from torchtune import config

from torchtune_lce.training.preference_binding import BindsLogprobsToModels
from torchtune_lce.training.process_group import join_processes
from torchtune_lce.training.stock_recipes import load_stock_recipe

stock = load_stock_recipe("full_dpo_distributed")


class FullDPORecipeDistributed(BindsLogprobsToModels, stock.FullDPORecipeDistributed):
    """torchtune's recipe; log-probabilities of policy and reference come from hidden states."""


@config.parse
def recipe_main(cfg: DictConfig) -> None:
    """Entry point; reads the config and then the command line, as torchtune's does."""
    join_processes(cfg)
    config.log_config(recipe_name="FullDPORecipeDistributed", cfg=cfg)
    recipe = FullDPORecipeDistributed(cfg=cfg)
    recipe.setup(cfg=cfg)
    recipe.train()
    recipe.cleanup()


if __name__ == "__main__":
    sys.exit(recipe_main())
