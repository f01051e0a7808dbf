"""Which of torchtune's recipes a config is for."""

from omegaconf import DictConfig, OmegaConf

from torchtune_lce.commands import registry
from torchtune_lce.commands.shared import distillation
from torchtune_lce.commands.shared.errors import CommandError

TAKES = "--config must be one of a LoRA or full fine-tune or of a distillation"


def recipe_for(name: str, config: DictConfig, devices: int | None) -> str:
    """The name of torchtune's recipe that the config is for; ``devices`` None means one, without torchrun.

    Raises CommandError where a registered config and ``devices`` do not go together, and for a config that learns from
    preferences, which no command makes.
    """
    loss = config.get("loss")
    component = loss.get("_component_") if OmegaConf.is_dict(loss) else None
    if str(component).startswith("torchtune.rlhf.loss."):
        raise CommandError(f"{TAKES}, {name} learns from preferences, by {component}")
    recipe = registry.find_recipe(name)
    if recipe is not None:
        method = recipe.name.removeprefix("lce_")
        # With whatever loss in place of its own.
        if method not in registry.CONFIG_SUFFIXES or "dpo_" in method or "ppo_" in method:
            raise CommandError(f"{TAKES}, {name} is for {method}")
        if recipe.supports_distributed != (devices is not None):
            needs = "needs --nproc_per_node" if recipe.supports_distributed else "takes one device"
            raise CommandError(f"{name} is for torchtune's {method}, which {needs}")
        return method
    if distillation.distils(config):
        method = "knowledge_distillation"
    else:
        method = "lora_finetune" if "lora_rank" in (config.get("model") or ()) else "full_finetune"
    return f"{method}_{'single_device' if devices is None else 'distributed'}"
