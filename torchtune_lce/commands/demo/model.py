"""A small model with random weights, as a checkpoint that torchtune's recipes load."""

from pathlib import Path

import torch
from omegaconf import DictConfig

from torchtune_lce.commands.shared.random_weights import random_state_dict


def write_checkpoint(model_config: DictConfig, path: Path) -> int:
    """Saves random weights for ``model_config``; returns how many numbers they are."""
    state = random_state_dict(model_config)
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(state, path)
    return sum(tensor.numel() for tensor in state.values())
