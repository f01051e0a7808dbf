"""What a comparison needs for a config that learns from preferences (DPO): the loss stays, log-probabilities differ."""

from omegaconf import DictConfig, OmegaConf

from torchtune_lce.commands.shared import config_reading
from torchtune_lce.commands.shared.errors import CommandError
from torchtune_lce.commands.shared.loss_choices import MAIN, STOCK, LossChoice

_COMPARED = ("torchtune.rlhf.loss.DPOLoss", "torchtune.rlhf.loss.RSOLoss")
_OTHERS = ("torchtune.rlhf.", "torchtune.dev.")
_OURS = "torchtune_lce.LinearTokenLogprobs"


def prefers(config: DictConfig) -> bool:
    """Whether the config is one for torchtune's DPO recipes.

    Raises CommandError for one of another kind of learning from preferences.
    """
    loss = config.get("loss")
    component = str(loss.get("_component_")) if OmegaConf.is_dict(loss) else ""
    if component in _COMPARED:
        return True
    if component.startswith(_OTHERS):
        raise CommandError(f"loss._component_ must be one of {', '.join(_COMPARED)} to learn from, got {component}")
    return False


def check(choices: list[LossChoice]) -> None:
    """Raises CommandError for a choice that has no log-probabilities."""
    if any(choice.kind == MAIN for choice in choices):
        raise CommandError(
            f"--losses: {MAIN} is a loss of labels, and the config learns from preferences; take {STOCK} or this "
            "package's"
        )


def check_logprobs(config: DictConfig) -> None:
    """Raises CommandError for a section ``logprobs`` that is none, or has a setting that it cannot have."""
    given = config.get("logprobs")
    if given is not None and not OmegaConf.is_dict(given):
        raise CommandError(f"logprobs must be a section of settings, got {given}")
    whole = OmegaConf.merge(config, {"logprobs": OmegaConf.merge({"_component_": _OURS}, given or {})})
    config_reading.check_settings(whole, ("logprobs",))


def section(choice: LossChoice, configured: DictConfig | None) -> dict | None:
    """The config's ``logprobs`` for this choice, which keeps the options that are ``configured``; None for stock."""
    if choice.kind == STOCK:
        return None
    options = OmegaConf.to_container(configured) if configured else {}
    return {"_component_": _OURS, **options, "impl": choice.kind}
