"""Weights for any torchtune model without a checkpoint: its shapes, and numbers that depend on nothing else."""

import torch
from omegaconf import DictConfig, OmegaConf
from torch import Tensor
from torchtune import config
from torchtune.models.gemma.rms_norm import GemmaRMSNorm
from torchtune.modules.peft import get_adapter_params


def random_state_dict(
    model_config: DictConfig,
    dtype: torch.dtype = torch.float32,
    device: torch.device | None = None,
    logit_std: float = 1.0,
) -> dict[str, Tensor]:
    """A state dict, on the CPU, of the model that ``model_config`` builds; without adapters.

    Matrices get a standard deviation of 1 / sqrt(columns). With the final norm, logits then have about that of 1, and
    the head can tell tokens apart even while it is frozen, as it is under LoRA. The head's is ``logit_std`` times that:
    1 is an untrained model, whose softmax is flat. ``device`` draws the numbers; another one draws others.
    """
    model_config = OmegaConf.create(OmegaConf.to_container(model_config))
    if "quantize_base" in model_config:
        model_config.quantize_base = False  # the recipe quantises what it loads
    with torch.device("meta"):
        model = config.instantiate(model_config)
    shapes = model.state_dict()
    head = "output.weight" if "output.weight" in shapes else "tok_embeddings.weight"
    adapters = get_adapter_params(model)
    zeros = {f"{name}.scale" for name, module in model.named_modules() if isinstance(module, GemmaRMSNorm)}
    device = device or torch.device("cpu")
    generator = torch.Generator(device).manual_seed(0)
    state = {}
    for name, meta in shapes.items():
        if name in adapters:
            continue
        if meta.ndim < 2:
            # A norm's scale; Gemma's is an offset from 1.
            value = torch.full(meta.shape, 0.0 if name in zeros or name.endswith(".bias") else 1.0)
        else:
            std = meta.shape[1] ** -0.5 * (logit_std if name == head else 1.0)
            value = torch.empty(meta.shape, device=device).normal_(std=std, generator=generator)
        state[name] = value.to("cpu", dtype)
    return state
