"""Which of torchtune's recipes a config is for."""

from omegaconf import DictConfig

from torchtune_lce.commands import registry
from torchtune_lce.commands.shared import distillation, preferences
from torchtune_lce.commands.shared.errors import CommandError

TAKES = "--config must be one of a LoRA or full fine-tune, of a distillation or of DPO"


def recipe_for(name: str, config: DictConfig, devices: int | None) -> str:
    """The name of torchtune's recipe that the config is for; ``devices`` None means one, without torchrun.

    Raises CommandError where a config and ``devices`` do not go together, and for one that no command runs.
    """
    prefers = preferences.prefers(config)
    recipe = registry.find_recipe(name)
    if recipe is not None:
        method = recipe.name.removeprefix("lce_")
        # With whatever loss in place of its own.
        if method not in registry.CONFIG_SUFFIXES or "ppo_" in method or ("dpo_" in method) != prefers:
            raise CommandError(f"{TAKES}, {name} is for {method}")
        if recipe.supports_distributed != (devices is not None):
            needs = "needs --nproc_per_node" if recipe.supports_distributed else "takes one device"
            raise CommandError(f"{name} is for torchtune's {method}, which {needs}")
        return method
    has_lora = "lora_rank" in (config.get("model") or ())
    if distillation.distils(config):
        method = "knowledge_distillation"
    elif prefers:
        method = "lora_dpo" if has_lora else "full_dpo"
        if not has_lora and devices is None:
            raise CommandError(f"{name} is for torchtune's full_dpo_distributed, which needs --nproc_per_node")
    else:
        method = "lora_finetune" if has_lora else "full_finetune"
    return f"{method}_{'single_device' if devices is None else 'distributed'}"
