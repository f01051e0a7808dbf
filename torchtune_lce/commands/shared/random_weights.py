"""Weights for any torchtune model without a checkpoint: its shapes, and numbers that depend on nothing else."""

import inspect
import re

import torch
from omegaconf import DictConfig, OmegaConf
from torch import Tensor, nn
from torchtune import config
from torchtune.config._errors import InstantiationError
from torchtune.config._utils import _get_component_from_path
from torchtune.models.gemma.rms_norm import GemmaRMSNorm
from torchtune.modules.peft import get_adapter_params

from torchtune_lce.commands.shared.errors import CommandError

# What torchtune, its builders and torch raise for sizes and settings that make no model.
_UNBUILDABLE = (InstantiationError, TypeError, ValueError, RuntimeError, ZeroDivisionError)


def is_quantised(model_config: DictConfig) -> bool:
    """Whether its base weights are, by a setting or by the name of the builder, as torchtune's qlora_* have it."""
    builder = inspect.signature(_get_component_from_path(model_config._component_)).parameters.get("quantize_base")
    return bool(model_config.get("quantize_base", builder is not None and builder.default))


def meta_model(model_config: DictConfig) -> nn.Module:
    """What ``model_config`` builds, unquantised, its parameters of the right shapes and without any memory."""
    if is_quantised(model_config):
        # Quantising takes seconds a layer, and recipes quantise what they load.
        model_config = OmegaConf.merge(model_config, {"quantize_base": False})
    with torch.device("meta"):
        return config.instantiate(model_config)


def configured_model(cfg: DictConfig, section: str) -> nn.Module:
    """:func:`meta_model` of a section of a config; raises CommandError for one that cannot be built, by its name."""
    settings = cfg.get(section)
    if not OmegaConf.is_dict(settings) or "_component_" not in settings:
        raise CommandError(f"{section} must be a section with a _component_, which builds the model, got {settings}")
    try:
        return meta_model(settings)
    except _UNBUILDABLE as error:
        said = " ".join(str(error).split())
        raise CommandError(f"{section}: {settings._component_} cannot be built: {said}") from error


def random_state_dict(
    model_config: DictConfig,
    dtype: torch.dtype = torch.float32,
    device: torch.device | None = None,
    seed: int = 0,
    distinct_layers: int | None = None,
) -> dict[str, Tensor]:
    """:func:`random_state` of the model that ``model_config`` builds."""
    return random_state(meta_model(model_config), dtype, device, seed, distinct_layers)


def random_state(
    model: nn.Module,
    dtype: torch.dtype = torch.float32,
    device: torch.device | None = None,
    seed: int = 0,
    distinct_layers: int | None = None,
) -> dict[str, Tensor]:
    """A state dict, on the CPU, of a model of torchtune's, its own weights unread; without adapters.

    Matrices get a standard deviation of 1 / sqrt(columns). With the final norm, logits then have about that of 1, and
    the head can tell tokens apart even while it is frozen, as it is under LoRA. Their
    softmax is an untrained model's: flat. ``device`` draws the numbers; another one draws others.

    Layers from ``distinct_layers`` on share the matrices of those before, in turn: nothing is drawn for them, nor held.
    """
    shapes = model.state_dict()
    adapters = get_adapter_params(model)
    zeros = {f"{name}.scale" for name, module in model.named_modules() if isinstance(module, GemmaRMSNorm)}
    device = device or torch.device("cpu")
    generator = torch.Generator(device).manual_seed(seed)
    state = {}
    for name, meta in shapes.items():
        if name in adapters:
            continue
        earlier = state.get(_like_earlier_layer(name, distinct_layers))
        if meta.ndim < 2:
            # A norm's scale; Gemma's is an offset from 1.
            value = torch.full(meta.shape, 0.0 if name in zeros or name.endswith(".bias") else 1.0)
        elif earlier is not None and earlier.shape == meta.shape:
            value = earlier
        else:
            value = torch.empty(meta.shape, device=device).normal_(std=meta.shape[1] ** -0.5, generator=generator)
        # Half the bytes then leave the device, and it is the faster one to round them.
        state[name] = value.to(dtype).to("cpu")
    return state


def _like_earlier_layer(name: str, distinct_layers: int | None) -> str | None:
    """The name of the same weight in an earlier layer that has its own, if this one need not have."""
    number = re.search(r"(?<=\blayers\.)\d+", name)
    if distinct_layers is None or number is None or int(number[0]) < distinct_layers:
        return None
    return f"{name[: number.start()]}{int(number[0]) % distinct_layers}{name[number.end() :]}"
