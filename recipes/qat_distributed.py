"""Quantisation-aware full fine-tuning: torchtune's recipe of this name, with a loss that never holds the logits.

    tune run --nproc_per_node 2 torchtune_lce/recipes/qat_distributed.py --config <yaml>
    tune-lce run --nproc_per_node 2 lce_qat_distributed --config lce/llama3/8B_qat_full

Takes every config of torchtune's recipe; its loss becomes this one by ``loss=torchtune_lce.LinearCrossEntropyLoss``.
"""

import sys

import torch
from omegaconf import DictConfig
from torch.distributed import init_process_group
from torchtune import config, training

from torchtune_lce.recipe_binding import BindsLossToModel
from torchtune_lce.stock_recipes import load_stock_recipe

stock = load_stock_recipe("qat_distributed")


class QATRecipeDistributed(BindsLossToModel, stock.QATRecipeDistributed):
    """torchtune's recipe; only the loss is bound to the model."""


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
    config.log_config(recipe_name="QATRecipeDistributed", cfg=cfg)
    recipe = QATRecipeDistributed(cfg=cfg)
    recipe.setup(cfg=cfg)
    recipe.train()
    recipe.cleanup()


if __name__ == "__main__":
    sys.exit(recipe_main())
