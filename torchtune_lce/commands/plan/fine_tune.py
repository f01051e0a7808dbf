"""Which configs are planned, and with which settings; every other one is refused with a sentence."""

from omegaconf import DictConfig

from torchtune_lce.commands import registry
from torchtune_lce.commands.shared import config_reading, preferences
from torchtune_lce.commands.shared.errors import CommandError
from torchtune_lce.commands.shared.recipe_choice import TAKES, recipe_for

_PLANNED = ("lora_finetune_", "full_finetune_", "knowledge_distillation_", "lora_dpo_", "full_dpo_")
_NEEDED = ("model._component_", "tokenizer._component_", "optimizer._component_", "loss._component_")
# Methods whose config says so, of a file that no recipe has registered.
_REFUSED_SECTIONS = {"quantizer": "quantisation-aware training", "policy_model": "reinforcement learning"}


def check(name: str, config: DictConfig, devices: int | None) -> None:
    """Raises CommandError unless it is of a LoRA or full fine-tune, a distillation or DPO, with settings to count with.

    ``devices`` None means one, without torchrun.
    """
    if devices is not None and devices < 1:
        raise CommandError(f"--nproc_per_node must be at least 1, got {devices}")
    recipe = registry.find_recipe(name)
    other = _method_of_file(config) if recipe is None else recipe.name.removeprefix("lce_")
    if other is not None and not other.startswith(_PLANNED):
        raise CommandError(f"{TAKES}, {name} is for {other}")
    config_reading.check_sections(name, config, _NEEDED, TAKES)
    recipe_for(name, config, devices)
    if config.get("tensor_parallel_dim", 1) != 1:
        raise CommandError(
            "tensor_parallel_dim must be 1, since what tensor parallelism splits is not planned, got "
            f"{config.tensor_parallel_dim}"
        )
    config_reading.check_positive("batch_size", config.get("batch_size"))
    config_reading.check_positive("gradient_accumulation_steps", config.get("gradient_accumulation_steps", 1))
    if config.tokenizer.get("max_seq_len") is not None:
        config_reading.check_positive("tokenizer.max_seq_len", config.tokenizer.max_seq_len)
    config_reading.check_settings(config, ("loss", "kd_loss"))
    if preferences.prefers(config):
        preferences.check_logprobs(config)
    config_reading.training_dtype(config)


def _method_of_file(config: DictConfig) -> str | None:
    """What a file that no recipe has registered is for, where it is none of what is planned."""
    return next((method for section, method in _REFUSED_SECTIONS.items() if section in config), None)
