"""The recipes and configs of this package under the names that torchtune's command line knows them by."""

from pathlib import Path

from torchtune import _recipe_registry
from torchtune._recipe_registry import Config, Recipe

PACKAGE = Path(__file__).parents[1]
# How torchtune ends the names of the configs that a recipe takes; of several endings that fit, the longest counts.
# QLoRA and DoRA configs end as LoRA's do.
CONFIG_SUFFIXES = {
    "lora_finetune_single_device": ("lora_single_device", "dora_single_device"),
    "full_finetune_single_device": ("full_single_device", "full_low_memory"),
    "lora_finetune_distributed": ("lora",),
    "full_finetune_distributed": ("full",),
    "qat_distributed": ("qat_full",),
    "qat_lora_finetune_distributed": ("qat_lora",),
    "knowledge_distillation_single_device": ("KD_lora_single_device",),
    "knowledge_distillation_distributed": ("KD_lora_distributed",),
    "lora_dpo_single_device": ("lora_dpo_single_device",),
    "lora_dpo_distributed": ("lora_dpo",),
    "full_dpo_distributed": ("full_dpo",),
    "ppo_full_finetune_single_device": ("full_ppo_low_memory",),
    "grpo_full_finetune_distributed": (),  # torchtune main's own, which the release cannot run
}


def recipes() -> list[Recipe]:
    """``lce_<method>`` with its configs ``lce/<model>/<size>_<method>``, each with the absolute path of its file.

    torchtune joins these paths to those of its own recipes, where an absolute path stays what it is.
    """
    return [
        Recipe(
            name=f"lce_{method}",
            file_path=str(PACKAGE / "recipes" / f"{method}.py"),
            configs=_configs(suffixes),
            supports_distributed=method.endswith("_distributed"),
        )
        for method, suffixes in CONFIG_SUFFIXES.items()
    ]


def register() -> None:
    """Put them behind torchtune's own, whose names therefore win. Once a process, however often it is called."""
    known = {recipe.name for recipe in _recipe_registry.get_all_recipes()}
    _recipe_registry._ALL_RECIPES.extend(recipe for recipe in recipes() if recipe.name not in known)


def find_config(name: str) -> Path | None:
    """The file of a registered config, torchtune's or ours, or None."""
    stock = Path(_recipe_registry.__file__).parent.parent / "recipes" / "configs"
    for recipe in _recipe_registry.get_all_recipes():
        for config in recipe.configs:
            if config.name == name:
                return stock / config.file_path
    return None


def find_recipe(config_name: str) -> Recipe | None:
    """The recipe that a registered config is for, or None."""
    for recipe in _recipe_registry.get_all_recipes():
        if any(config.name == config_name for config in recipe.configs):
            return recipe
    return None


def _configs(suffixes: tuple[str, ...]) -> list[Config]:
    folder = PACKAGE / "configs"
    paths = sorted(path for path in folder.rglob("*.yaml") if _longest_suffix(path.stem) in suffixes)
    return [Config(f"lce/{path.relative_to(folder).with_suffix('').as_posix()}", str(path)) for path in paths]


def _longest_suffix(stem: str) -> str | None:
    fitting = (suffix for suffixes in CONFIG_SUFFIXES.values() for suffix in suffixes if stem.endswith(suffix))
    return max(fitting, key=len, default=None)
