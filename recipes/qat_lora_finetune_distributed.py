"""Quantisation-aware LoRA fine-tuning: torchtune's recipe of this name, with a loss that never holds the logits.

    tune run --nproc_per_node 2 torchtune_lce/recipes/qat_lora_finetune_distributed.py --config <yaml>
    tune-lce run --nproc_per_node 2 lce_qat_lora_finetune_distributed --config lce/llama3_2/1B_qat_lora

Takes every config of torchtune's recipe; its loss becomes this one by ``loss=torchtune_lce.LinearCrossEntropyLoss``.
torchtune 0.6.1's needs torchao 0.11 or older.
"""

import importlib.metadata
import sys

import torchtune.modules.loss
from omegaconf import DictConfig
from packaging.version import Version
from torchtune import config

from torchtune_lce.training.process_group import join_processes
from torchtune_lce.training.recipe_binding import BindsLossToModel
from torchtune_lce.training.stock_recipes import load_stock_recipe

stock = load_stock_recipe("qat_lora_finetune_distributed")


class QATLoRAFinetuneRecipeDistributed(BindsLossToModel, stock.QATLoRAFinetuneRecipeDistributed):
    """torchtune's recipe; the loss is bound to the model, and a step without labels is left out.

    Raises RuntimeError for a torchao whose settings torchtune 0.6.1's layers do not know; there, torchtune's own recipe
    fails on a bare assertion once its checkpoint is loaded.
    """

    def __init__(self, cfg: DictConfig):
        check_torchao()
        super().__init__(cfg=cfg)


def check_torchao() -> None:
    """Raises RuntimeError for torchtune's release with a torchao that its layers do not know."""
    # Main's version is no help: built from its repository it is 0.0.0, or empty.
    if hasattr(torchtune.modules.loss, "SFTLoss"):
        return
    release, torchao = (importlib.metadata.version(name) for name in ("torchtune", "torchao"))
    if Version(torchao) >= Version("0.12"):
        raise RuntimeError(
            f"LoRA with quantisation-aware training of torchtune {release} needs torchao 0.11 or older, got "
            f"{torchao}: pip install torchao==0.11.0, or fine-tune without LoRA by qat_distributed"
        )


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
