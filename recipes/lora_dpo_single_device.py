"""LoRA preference tuning (DPO) on one device: torchtune's recipe of this name, without the logits.

    tune run torchtune_lce/recipes/lora_dpo_single_device.py --config llama3_1/8B_lora_dpo_single_device
    tune-lce run lce_lora_dpo_single_device --config lce/llama3_1/8B_lora_dpo_single_device

Takes every config of torchtune's recipe, unchanged: the loss stays torchtune's. How log-probabilities are made may be
set in a section of its own, ``logprobs``; see :class:`torchtune_lce.LinearTokenLogprobs`.
"""

import sys

from omegaconf import DictConfig
from torch import nn
from torchtune import config
from torchtune.modules.peft import DoRALinear

from torchtune_lce.training.preference_binding import BindsLogprobsToModels
from torchtune_lce.training.stock_recipes import load_stock_recipe

stock = load_stock_recipe("lora_dpo_single_device")


class LoRADPORecipeSingleDevice(BindsLogprobsToModels, stock.LoRADPORecipeSingleDevice):
    """torchtune's recipe; log-probabilities of policy and reference come from hidden states.

    DoRA works here too: torchtune 0.6.1 leaves its magnitudes as they were in memory.
    """

    def _setup_model(self, *args, lora_weights_state_dict: dict | None = None, **settings) -> nn.Module:
        model = super()._setup_model(*args, lora_weights_state_dict=lora_weights_state_dict, **settings)
        if lora_weights_state_dict is None:
            for module in model.modules():
                if isinstance(module, DoRALinear):
                    module.initialize_dora_magnitude()
        return model


@config.parse
def recipe_main(cfg: DictConfig) -> None:
    """Entry point; reads the config and then the command line, as torchtune's does."""
    config.log_config(recipe_name="LoRADPORecipeSingleDevice", cfg=cfg)
    recipe = LoRADPORecipeSingleDevice(cfg=cfg)
    recipe.setup(cfg=cfg)
    recipe.train()
    recipe.cleanup()


if __name__ == "__main__":
    sys.exit(recipe_main())
