"""Full fine-tuning by PPO on one device: torchtune's recipe of this name, its steps without the logits.

    tune run torchtune_lce/recipes/ppo_full_finetune_single_device.py --config mistral/7B_full_ppo_low_memory
    tune-lce run lce_ppo_full_finetune_single_device --config lce/mistral/7B_full_ppo_low_memory

Takes every config of torchtune's recipe, unchanged: the loss stays torchtune's. How log-probabilities are made may be
set in a section of its own, ``logprobs``; see :class:`torchtune_lce.LinearTokenLogprobs`.
"""

import sys

from omegaconf import DictConfig
from torchtune import config

from torchtune_lce.training.ppo_binding import GivesLogitsToCome
from torchtune_lce.training.stock_recipes import load_stock_recipe

stock = load_stock_recipe("ppo_full_finetune_single_device")


class PPOFullFinetuneRecipeSingleDevice(GivesLogitsToCome, stock.PPOFullFinetuneRecipeSingleDevice):
    """torchtune's recipe; log-probabilities of policy and reference come from hidden states."""


@config.parse
def recipe_main(cfg: DictConfig) -> None:
    """Entry point; reads the config and then the command line, as torchtune's does."""
    config.log_config(recipe_name="PPOFullFinetuneRecipeSingleDevice", cfg=cfg)
    recipe = PPOFullFinetuneRecipeSingleDevice(cfg=cfg)
    recipe.setup(cfg=cfg)
    recipe.train()
    recipe.cleanup()


if __name__ == "__main__":
    sys.exit(recipe_main())
