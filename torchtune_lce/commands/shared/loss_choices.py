"""The losses that can be compared: torchtune's own, its main branch's way, and this package's implementations."""

from dataclasses import dataclass

import torch
from omegaconf import DictConfig, OmegaConf

from torchtune_lce.commands.shared.errors import CommandError
from torchtune_lce.commands.shared.recipe_runs import OUR_LOSS, STOCK_LOSS
from torchtune_lce.implementations.choice import NAMES, obstacle

STOCK, MAIN, COMPILED, SEED = "stock", "main", "_compiled", "@"
KINDS = (STOCK, MAIN, *NAMES)
# Taken when none are named, as far as they can run.
USUAL = (STOCK, "chunked", "torch_compile", "cce", "cce_exact")
MOST_SEED = 2**32 - 1  # torchtune's
_MAIN_LOSS = "torchtune_lce.commands.shared.torchtune_main.ChunkedProjectionLoss"


@dataclass(frozen=True)
class LossChoice:
    """``kind`` is one of :data:`KINDS`; ``compiled`` runs the recipe with ``compile: True``.

    ``seed`` is the run's own, or None for the config's.
    """

    kind: str
    compiled: bool
    seed: int | None = None

    @property
    def loss(self) -> str:
        """Its name without the seed."""
        return self.kind + COMPILED * self.compiled

    @property
    def name(self) -> str:
        return self.loss + ("" if self.seed is None else f"{SEED}{self.seed}")

    def section(self, configured: DictConfig) -> dict:
        """The config's ``loss`` for this choice; this package's keeps the options that are ``configured``."""
        if self.kind == STOCK:
            return {"_component_": STOCK_LOSS}
        if self.kind == MAIN:
            return {"_component_": _MAIN_LOSS, "compile": self.compiled}
        options = OmegaConf.to_container(configured)
        ours = options.pop("_component_", None) == OUR_LOSS
        return {"_component_": OUR_LOSS, **(options if ours else {}), "impl": self.kind}

    def obstacle(self, device: str, dtype: torch.dtype) -> str | None:
        """Why it cannot run there, or None."""
        if self.kind in (STOCK, MAIN, "auto"):
            return None
        return obstacle(self.kind, torch.device(device), dtype)


def parse(text: str) -> list[LossChoice]:
    """``stock,stock@2,cce_compiled`` and the like; raises CommandError for an unknown name, or one that comes twice."""
    choices = []
    for name in map(str.strip, text.split(",")):
        loss, marked, seed = name.partition(SEED)
        kind = loss.removesuffix(COMPILED)
        if kind not in KINDS or (marked and not seed.isdecimal()):
            raise CommandError(
                f"--losses takes {', '.join(KINDS)}, each also with {COMPILED} for compile: True and with {SEED} and a "
                f"number for a seed of its own; got {name!r}"
            )
        if marked and int(seed) > MOST_SEED:
            raise CommandError(f"--losses: a seed must be less than {MOST_SEED + 1}, got {seed}")
        choices.append(LossChoice(kind, kind != loss, int(seed) if marked else None))
    if len(set(choices)) < len(choices):
        raise CommandError(f"--losses must name each loss once, got {text}")
    return choices


def select(text: str | None, device: str, dtype: torch.dtype) -> list[LossChoice]:
    """The named losses, or the usual ones that can run there.

    Raises CommandError, saying what to do instead, for a named one that cannot.
    """
    if text is None:
        usual = [LossChoice(kind, compiled=False) for kind in USUAL]
        return [choice for choice in usual if choice.obstacle(device, dtype) is None]
    choices = parse(text)
    for choice in choices:
        obstacle = choice.obstacle(device, dtype)
        if obstacle:
            raise CommandError(f"--losses: {choice.kind} {obstacle.replace('; set impl=', '; take ')}")
    return choices
