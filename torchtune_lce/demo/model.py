"""A small model with random weights, as a checkpoint that torchtune's recipes load."""

from pathlib import Path

import torch
from omegaconf import DictConfig
from torch import nn
from torchtune import config


def write_checkpoint(model_config: DictConfig, path: Path) -> int:
    """Builds ``model_config``, gives it weights that depend on nothing but its shapes, saves them; returns how many.

    Matrices get a standard deviation of 1 / sqrt(columns): with the final norm, logits then have about that of 1, and
    the head can tell tokens apart even while it is frozen, as it is under LoRA.
    """
    model: nn.Module = config.instantiate(model_config)
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        if parameter.ndim == 2:
            nn.init.normal_(parameter, std=parameter.shape[1] ** -0.5, generator=generator)
        elif name.endswith(".bias"):
            nn.init.zeros_(parameter)
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(model.state_dict(), path)
    return sum(parameter.numel() for parameter in model.parameters())
