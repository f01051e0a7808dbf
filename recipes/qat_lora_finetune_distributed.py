"""Quantisation-aware LoRA fine-tuning: torchtune's recipe of this name, with a loss that never holds the logits.

    tune run --nproc_per_node 2 torchtune_lce/recipes/qat_lora_finetune_distributed.py --config <yaml>
    tune-lce run --nproc_per_node 2 lce_qat_lora_finetune_distributed --config lce/llama3_2/1B_qat_lora

Takes every config of torchtune's recipe; its loss becomes this one by ``loss=torchtune_lce.LinearCrossEntropyLoss``.
torchtune 0.6.1's needs torchao 0.11 or older.
"""

import importlib.metadata
import sys

from omegaconf import DictConfig
from packaging.version import Version
from torchtune import config

from torchtune_lce.process_group import join_processes
from torchtune_lce.recipe_binding import BindsLossToModel
from torchtune_lce.stock_recipes import load_stock_recipe

stock = load_stock_recipe("qat_lora_finetune_distributed")


class QATLoRAFinetuneRecipeDistributed(BindsLossToModel, stock.QATLoRAFinetuneRecipeDistributed):
    """torchtune's recipe; only the loss is bound to the model.

    Raises RuntimeError for a torchao whose settings torchtune 0.6.1's layers do not know; there, torchtune's own recipe
    fails on a bare assertion once its checkpoint is loaded.
    """

    def __init__(self, cfg: DictConfig):
        torchtune, torchao = (importlib.metadata.version(name) for name in ("torchtune", "torchao"))
        if Version(torchtune) < Version("0.7") and Version(torchao) >= Version("0.12"):
            raise RuntimeError(
                f"LoRA with quantisation-aware training of torchtune {torchtune} needs torchao 0.11 or older, got "
                f"{torchao}: pip install torchao==0.11.0, or fine-tune without LoRA by qat_distributed"
            )
        super().__init__(cfg=cfg)


@config.parse
def recipe_main(cfg: DictConfig) -> None:
    """Entry point; reads the config and then the command line, as torchtune's does."""
    join_processes(cfg)
    config.log_config(recipe_name="QATLoRAFinetuneRecipeDistributed", cfg=cfg)
    recipe = QATLoRAFinetuneRecipeDistributed(cfg=cfg)
    recipe.setup(cfg=cfg)
    recipe.train()
    recipe.cleanup()


if __name__ == "__main__":
    sys.exit(recipe_main())
