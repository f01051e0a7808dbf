"""Knowledge distillation on several devices: torchtune's recipe of this name, with losses that never hold the logits.

    tune run --nproc_per_node 2 torchtune_lce/recipes/knowledge_distillation_distributed.py --config <yaml>
    tune-lce run --nproc_per_node 2 lce_knowledge_distillation_distributed \\
        --config lce/llama3_2/8B_to_1B_KD_lora_distributed

Takes every config of torchtune's recipe; its losses become these by ``loss=torchtune_lce.LinearCrossEntropyLoss`` and
``kd_loss=torchtune_lce.LinearForwardKLLoss`` (or ``LinearReverseKLLoss``, ``LinearSymmetricKLLoss``), both together.
"""

import sys

import torch
from omegaconf import DictConfig
from torch.distributed import init_process_group
from torchtune import config, training

from torchtune_lce.recipe_binding import BindsLossesToModels
from torchtune_lce.stock_recipes import load_stock_recipe

stock = load_stock_recipe("knowledge_distillation_distributed")


class KDRecipeDistributed(BindsLossesToModels, stock.KDRecipeDistributed):
    """torchtune's recipe; only the losses are bound to the models."""


@config.parse
def recipe_main(cfg: DictConfig) -> None:
    """Entry point; reads the config and then the command line, as torchtune's does."""
    if not training.is_distributed():
        raise RuntimeError("several devices need torchtune's launcher: give `tune run` --nproc_per_node <devices>")
    # torchtune's full fine-tuning recipe does this itself; this one leaves it to this function.
    device = torch.device(cfg.device).type
    init_process_group(training.get_distributed_backend(device, offload_ops_to_cpu=device != "cpu"))
    if cfg.get("fsdp_cpu_offload", False):
        # The optimizer then steps on the CPU, with all of its cores.
        training.set_torch_num_threads()
    config.log_config(recipe_name="KDRecipeDistributed", cfg=cfg)
    recipe = KDRecipeDistributed(cfg=cfg)
    recipe.setup(cfg=cfg)
    recipe.train()
    recipe.cleanup()


if __name__ == "__main__":
    sys.exit(recipe_main())
