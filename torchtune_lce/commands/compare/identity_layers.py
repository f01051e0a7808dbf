"""A model of a few layers in place of a deep one, and its weights made a deep model's whose other layers do nothing."""

import re

import torch
from omegaconf import DictConfig
from torch import Tensor, nn
from torchtune.models.gemma.rms_norm import GemmaRMSNorm
from torchtune.modules import TransformerDecoder, TransformerSelfAttentionLayer
from torchtune.modules.peft import DoRALinear, LoRALinear, get_adapter_params

from torchtune_lce.commands.shared.errors import CommandError
from torchtune_lce.commands.shared.random_weights import meta_model

# What of a layer's output reaches its residual.
_OUTPUTS = ("attn.output_proj", "mlp.w2")
_POST_NORMS = ("sa_scale", "mlp_scale")
# The factor of an idle layer's norm behind its output, whose 0 it leaves 0. With the usual 1 the first step of an
# optimizer, however small, would be normed to a whole layer's output. Beside -1, from which Gemma's scales are counted,
# the smallest that bfloat16 has.
_QUIET = 2.0**-8


def first_layers(model_config: DictConfig, layers: int) -> TransformerDecoder:
    """The model of a config with its first ``layers`` alone, without adapters or memory: on the meta device.

    Raises CommandError for a model whose other layers cannot be idle.
    """
    model = meta_model(model_config)
    _check(model, layers)
    del model.layers[layers:]
    for name, module in list(model.named_modules()):
        if isinstance(module, (LoRALinear, DoRALinear)):
            bias = module.bias is not None
            model.set_submodule(name, nn.Linear(module.in_dim, module.out_dim, bias=bias, device="meta"))
    return model


def _check(model: nn.Module, layers: int) -> None:
    if not isinstance(model, TransformerDecoder):
        raise CommandError(
            f"--trained-weights: model must be one of torchtune's text decoders, got {type(model).__name__}"
        )
    for layer in model.layers:
        outputs = [layer.get_submodule(name) for name in _OUTPUTS] if _is_plain(layer) else [None]
        if not all(isinstance(output, (nn.Linear, LoRALinear, DoRALinear)) for output in outputs):
            raise CommandError(
                "--trained-weights: model must have layers of self-attention and an MLP, which can be made to do "
                f"nothing, got {type(layer).__name__}; take --random-weights"
            )
    if any(isinstance(module, DoRALinear) for module in model.layers[layers:].modules()):
        raise CommandError(
            "--trained-weights: model.use_dora must be False, got True: DoRA divides by the length of a weight's rows, "
            "which is 0 in layers that do nothing"
        )


def _is_plain(layer: nn.Module) -> bool:
    return isinstance(layer, TransformerSelfAttentionLayer) and all(
        isinstance(layer.get_submodule(name), (nn.Identity, GemmaRMSNorm)) for name in _POST_NORMS
    )


def deepened(learnt: dict[str, Tensor], model_config: DictConfig) -> dict[str, Tensor]:
    """The state dict, without adapters, of the model of a config that computes what its first layers do.

    ``learnt`` is that of :func:`first_layers`. Each layer beyond has the matrices of one of those, in turn, and shares
    their memory; but its output projections are 0, so that it adds nothing to its residual, in any dtype.
    """
    model = meta_model(model_config)
    learnt_layers = 1 + max(int(found[1]) for name in learnt if (found := re.match(r"layers\.(\d+)\.", name)))
    adapters = get_adapter_params(model)
    state = {}
    for name in model.state_dict():
        if name in adapters:
            continue
        number = re.match(r"layers\.(\d+)\.", name)
        if number is None or int(number[1]) < learnt_layers:
            state[name] = learnt[name]
            continue
        part = name[number.end() :]
        like = learnt[f"layers.{int(number[1]) % learnt_layers}.{part}"]
        if part.rpartition(".")[0] in _OUTPUTS:
            state[name] = torch.zeros_like(like)
        elif part.rpartition(".")[0] in _POST_NORMS:
            state[name] = torch.full_like(like, _QUIET - 1)
        else:
            # What no matrix product reads may be trained as it was loaded.
            state[name] = like.clone() if like.ndim < 2 else like
    return state
