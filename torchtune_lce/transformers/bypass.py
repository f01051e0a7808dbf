"""Notices that a patched model trains by another forward: TRL and Liger put theirs in its place, after the patch."""

from types import MethodType

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from torchtune_lce.transformers.switch import NAME

STATE = "trains without the patch"


def watch(model: nn.Module) -> RemovableHandle | None:
    """Has ``model``, just patched, say so once its layers are trained by a forward that does not call the patched one.

    None where its layers are no module of their own.
    """
    note_call(model)
    layers = model.base_model
    return None if layers is model else layers.register_forward_pre_hook(MethodType(_before_layers, model))


def note_call(model: nn.Module) -> None:
    """The patched forward is being called: by itself, or by what has been put around it."""
    getattr(model, NAME).called_by = model.__dict__.get("forward")


def _before_layers(self: nn.Module, layers: nn.Module, args: tuple) -> None:
    switch = getattr(self, NAME)
    if self.training and torch.is_grad_enabled() and self.__dict__.get("forward") is not switch.called_by:
        switch.say(
            "its forward has been replaced since, and what is there now does not call the patched one "
            "(TRL's trainers and Liger do so)",
            STATE,
        )
