"""What a comparison needs besides for a distillation config: the loss that sees the teacher, for each choice."""

from omegaconf import DictConfig, OmegaConf
from torch import nn

from torchtune_lce.commands.shared.errors import CommandError
from torchtune_lce.commands.shared.loss_choices import MAIN, STOCK, LossChoice
from torchtune_lce.divergence import choice as divergence
from torchtune_lce.model.projection import output_rows

_DIVERGENCES = ("Forward", "Reverse", "Symmetric")
_STOCK = {name: f"torchtune.modules.loss.{name}KLWithChunkedOutputLoss" for name in _DIVERGENCES}
_OURS = {name: f"torchtune_lce.Linear{name}KLLoss" for name in _DIVERGENCES}
# By the class's own name: a config may name any module that exports it.
_OF_CLASS = {
    component.rpartition(".")[2]: name
    for name in _DIVERGENCES
    for component in (_STOCK[name], f"torchtune.modules.loss.{name}KLLoss", _OURS[name])
}


def distils(config: DictConfig) -> bool:
    """Whether the config is one for torchtune's knowledge distillation recipes."""
    return "teacher_model" in config


def check(config: DictConfig, choices: list[LossChoice]) -> None:
    """Raises CommandError for a ``kd_loss`` that nothing here stands for, or a choice that cannot distil."""
    component = OmegaConf.select(config, "kd_loss._component_")
    if component is None or _class_name(component) not in _OF_CLASS:
        raise CommandError(f"kd_loss._component_ must be one of {', '.join(_OF_CLASS)}, got {component}")
    if any(choice.kind == MAIN for choice in choices):
        raise CommandError(
            f"--losses: {MAIN} is a loss without a teacher, and the config distils; take {STOCK} or this package's"
        )


def check_vocabularies(student: nn.Module, teacher: nn.Module) -> None:
    """Raises CommandError for models that no divergence can compare: their outputs have not as many rows."""
    try:
        rows = output_rows(student), output_rows(teacher)
    except (TypeError, ValueError) as error:
        raise CommandError(f"model and teacher_model must be what torchtune builds: {error}") from error
    if rows[0] != rows[1]:
        raise CommandError(
            f"model and teacher_model must have the same vocabulary, got outputs of {rows[0]} and of {rows[1]} rows"
        )


def section(choice: LossChoice, configured: DictConfig) -> dict:
    """The config's ``kd_loss`` for this choice, the divergence that is ``configured``; that :func:`check` has seen.

    Stock's is the one in chunks, as in torchtune's configs. This package's has the choice's implementation where
    divergences have one of that name, else ``auto``; like ``loss`` it keeps its configured options.
    """
    options = OmegaConf.to_container(configured)
    component = options.pop("_component_")
    name = _OF_CLASS[_class_name(component)]
    mixture = {key: value for key, value in options.items() if key == "sym_kd_ratio"}
    if choice.kind == STOCK:
        return {"_component_": _STOCK[name], **mixture}
    kept = options if _class_name(component) == _class_name(_OURS[name]) else mixture
    impl = choice.kind if choice.kind in divergence.NAMES else "auto"
    return {"_component_": _OURS[name], **kept, "impl": impl}


def _class_name(component: str) -> str:
    return component.rpartition(".")[2]
