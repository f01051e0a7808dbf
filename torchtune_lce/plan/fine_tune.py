"""Which configs are planned, and with which settings; every other one is refused with a sentence."""

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from torchtune_lce import config_reading, registry, validation
from torchtune_lce.compare import runs
from torchtune_lce.errors import CommandError
from torchtune_lce.options import Options

_TAKES = "--config must be one of a LoRA or full fine-tune or of a distillation"
_PLANNED = ("lora_finetune_", "full_finetune_", "knowledge_distillation_")
_SECTIONS = ("model", "tokenizer", "optimizer", "loss")
# Methods whose config says so, of a file that no recipe has registered.
_REFUSED_SECTIONS = {"quantizer": "quantisation-aware training", "policy_model": "reinforcement learning"}
_REFUSED_LOSSES = {"torchtune.rlhf.": "learning from preferences", "torchtune.dev.rl.": "reinforcement learning"}


def check(name: str, config: DictConfig, devices: int | None) -> None:
    """Raises CommandError unless it is of a LoRA or full fine-tune or of a distillation, with settings to count with.

    ``devices`` None means one, without torchrun.
    """
    if devices is not None and devices < 1:
        raise CommandError(f"--nproc_per_node must be at least 1, got {devices}")
    try:
        OmegaConf.to_container(config, resolve=True)
    except OmegaConfBaseException as error:
        raise CommandError(f"--config: {name}: {' '.join(str(error).split())}") from error
    recipe = registry.find_recipe(name)
    other = _method_of_file(config) if recipe is None else recipe.name.removeprefix("lce_")
    if other is not None and not other.startswith(_PLANNED):
        raise CommandError(f"{_TAKES}, {name} is for {other}")
    for section in _SECTIONS:
        if OmegaConf.select(config, f"{section}._component_") is None:
            raise CommandError(f"{_TAKES}, {name} has no {section}._component_")
    runs.recipe_for(name, config, devices)
    _check_integer("batch_size", config.get("batch_size"))
    _check_integer("gradient_accumulation_steps", config.get("gradient_accumulation_steps", 1))
    if config.tokenizer.get("max_seq_len") is not None:
        _check_integer("tokenizer.max_seq_len", config.tokenizer.max_seq_len)
    for section in ("loss", "kd_loss"):
        _check_workspace(section, OmegaConf.select(config, f"{section}.workspace_mib"))
    config_reading.training_dtype(config)


def _method_of_file(config: DictConfig) -> str | None:
    """What a file that no recipe has registered is for, where it is none of what is planned."""
    loss = str(OmegaConf.select(config, "loss._component_"))
    methods = [method for section, method in _REFUSED_SECTIONS.items() if section in config]
    methods += [method for prefix, method in _REFUSED_LOSSES.items() if loss.startswith(prefix)]
    return methods[0] if methods else None


def _check_integer(key: str, value) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise CommandError(f"{key} must be a whole number of at least 1, got {value!r}")


def _check_workspace(section: str, value) -> None:
    try:
        validation.check_options(Options() if value is None else Options(workspace_mib=value))
    except (TypeError, ValueError) as error:
        raise CommandError(f"{section}.{error}") from error
