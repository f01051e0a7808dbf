"""GRPO on several devices, as the recipe of this name on torchtune's main branch, without the logits but to sample.

    tune run --nproc_per_node 2 torchtune_lce/recipes/grpo_full_finetune_distributed.py --config dev/3B_full_grpo

Takes every config of torchtune's recipe, unchanged: the loss stays torchtune's. How log-probabilities are made may be
set in a section of its own, ``logprobs``; see :class:`torchtune_lce.LinearTokenLogprobs`. torchtune 0.6.1 cannot run
its own recipe, of which it lacks a part: this one says so.
"""

import sys

from omegaconf import DictConfig
from torchtune import config

from torchtune_lce.training.grpo_binding import BindsLogprobsToGRPO, take_hidden_states
from torchtune_lce.training.process_group import require_launcher
from torchtune_lce.training.stock_recipes import load_stock_recipe

stock = load_stock_recipe("dev/grpo_full_finetune_distributed")
take_hidden_states(stock)


class GRPOFullFinetuneRecipeDistributed(BindsLogprobsToGRPO, stock.GRPOFullFinetuneRecipeDistributed):
    """torchtune's recipe; log-probabilities of policy and reference come from hidden states."""


@config.parse
def recipe_main(cfg: DictConfig) -> None:
    """Entry point; reads the config and then the command line, as torchtune's does."""
    # torchtune's own joins the processes itself, but asks the device for bfloat16 first.
    require_launcher()
    config.log_config(recipe_name="GRPOFullFinetuneRecipeDistributed", cfg=cfg)
    recipe = GRPOFullFinetuneRecipeDistributed(cfg=cfg)
    recipe.setup(cfg=cfg)
    recipe.train()
    recipe.cleanup()


if __name__ == "__main__":
    sys.exit(recipe_main())
