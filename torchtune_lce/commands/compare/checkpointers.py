"""Checkpointers for runs whose weights nobody wants afterwards: nothing is saved, nothing need be downloaded."""

import torch
from omegaconf import OmegaConf
from torchtune import config, training
from torchtune.utils import get_logger

from torchtune_lce.commands.compare.identity_layers import deepened
from torchtune_lce.commands.shared.random_weights import random_state_dict

# Every number that a card draws has to reach the host, and most runs of a comparison are short.
_DISTINCT_LAYERS = 8


class _SavesNothing:
    def save_checkpoint(self, state_dict: dict, *args, **kwargs) -> None:
        get_logger("INFO").info("No checkpoint is saved: the run is a comparison.")


class RandomWeights(_SavesNothing):
    """Weights of the shapes of ``model``, a config's section, in bfloat16.

    See :mod:`torchtune_lce.commands.shared.random_weights`. Layers past the eighth repeat those of the first eight.
    """

    def __init__(self, model: dict, seed: int = 0, **settings):
        self._model = OmegaConf.create(model)
        self._seed = seed

    def load_checkpoint(self) -> dict:
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        weights = random_state_dict(self._model, torch.bfloat16, device, self._seed, _DISTINCT_LAYERS)
        if device.type == "cuda":
            torch.cuda.empty_cache()  # or what drew the numbers would count as reserved by the training
        return {training.MODEL_KEY: weights}


class Deepened(_SavesNothing):
    """The first layers in the file ``path`` as weights of ``model``, a config's section.

    See :mod:`torchtune_lce.commands.compare.trained_weights`.
    """

    def __init__(self, model: dict, path: str, **settings):
        self._model = OmegaConf.create(model)
        self._path = path

    def load_checkpoint(self) -> dict:
        learnt = torch.load(self._path, mmap=True, weights_only=True)
        return {training.MODEL_KEY: deepened(learnt, self._model)}


class LoadOnly(_SavesNothing):
    """What the section ``checkpointer`` of a config loads."""

    def __init__(self, checkpointer: dict, should_load_recipe_state: bool = False, **settings):
        self._checkpointer = config.instantiate(
            OmegaConf.create(checkpointer), should_load_recipe_state=should_load_recipe_state
        )

    def load_checkpoint(self) -> dict:
        return self._checkpointer.load_checkpoint()
