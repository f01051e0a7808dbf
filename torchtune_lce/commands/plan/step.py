"""The memory of one training step: what is there all the time, and the moments at which most is there.

    parameters + optimizer state, and gradients where several batches make a step
    + the largest of
        loss     activations + the loss (see loss_memory), its gradients among it
        other    a distillation's teacher, or DPO's reference: activations + what the loss holds by then, the student's
                 logits or the policy's log-softmax, or none + what a layer of the other model holds
        layers   backward of layer l: activations up to l, gradients of what comes after it, and what is alive at once
                 on the way through the layer
        update   gradients + the optimizer's own copies
    and at each what the loss leaves behind until the next step

Checkpointed layers keep their input, and one layer at a time has its activations again. Adapters' and other gradients
have the parameters' dtype, as torchtune's recipes have it.
"""

from dataclasses import dataclass, replace

import torch
from omegaconf import DictConfig, OmegaConf
from torch import nn
from torchtune import config as torchtune_config
from torchtune.modules.tied_linear import TiedLinear

from torchtune_lce.commands.plan.activations import Activations
from torchtune_lce.commands.shared.errors import CommandError
from torchtune_lce.commands.shared.random_weights import is_quantised
from torchtune_lce.implementations.memory import LossMemory

# 4 bits an entry, a byte for 64 of them, 4 bytes for 256 of those (Dettmers et al. 2023, arXiv 2305.14314).
_NF4_BYTES = 0.5 + 1 / 64 + 4 / (64 * 256)
# bitsandbytes runs on cards only, so its state is not measured: two entries a parameter, of 4 bytes or of 1 and a
# float32 for 256 of them.
_BITSANDBYTES = {"AdamW": 8.0, "PagedAdamW": 8.0, "AdamW8bit": 2 + 8 / 256, "PagedAdamW8bit": 2 + 8 / 256}
_TRIAL = 512  # rows and columns of the parameter that tells an optimizer's state


@dataclass(frozen=True)
class Fixed:
    """Bytes that no batch changes; ``layer_gradients`` of each decoder layer, in their order.

    ``head_gradient``: of all that is trained of the output, its adapter too.
    """

    parameters: int
    trained: int
    optimizer: int
    update: int
    head_gradient: int
    layer_gradients: tuple[int, ...]
    largest_gradient: int
    accumulates: bool
    in_backward: bool
    checkpoints: bool
    gathered: int = 0

    def sharded(self, devices: int, root: int, layer: int) -> "Fixed":
        """On each of several devices under FSDP2: parts, and what is gathered at a time.

        ``root`` are the bytes of embedding, last norm and output, which stay gathered from the forward to the loss;
        ``layer`` those of the largest layer. Two of these are gathered, one used and one on its way.
        """
        part = {name: getattr(self, name) // devices for name in ("parameters", "trained", "optimizer", "update")}
        gradients = tuple(value // devices for value in self.layer_gradients)
        return replace(self, **part, layer_gradients=gradients, gathered=root + 2 * layer)


@dataclass(frozen=True)
class StepLoss:
    """A loss's ``memory``, and bytes among it: those held while a model that is not trained runs, and those that are
    there until the next step."""

    memory: LossMemory
    beside_other: int = 0
    left_over: int = 0


@dataclass(frozen=True)
class Step:
    """Bytes at each of the moments, everything included."""

    loss: LossMemory
    at_loss: int
    at_other: int
    at_layers: int
    at_update: int

    @property
    def peak(self) -> int:
        return max(self.at_loss, self.at_other, self.at_layers, self.at_update)

    @property
    def share(self) -> float:
        """The loss's own memory as a part of the peak, which may be at another moment."""
        return self.loss.peak / self.peak


def fixed(config: DictConfig, model: nn.Module, decoder: nn.Module, dtype: torch.dtype, second: int = 0) -> Fixed:
    """Of a config and its model on the meta device, with a ``second`` model, which nothing trains, of so many bytes."""
    quantised = is_quantised(config.model)
    parameters = sum(_parameter_bytes(decoder, parameter, quantised) for parameter in model.parameters())
    trained = sum(parameter.nbytes for parameter in model.parameters() if parameter.requires_grad)
    state, update = optimizer_bytes(config.optimizer, dtype)
    entries = trained / dtype.itemsize
    gradients = [
        sum(parameter.nbytes for parameter in layer.parameters() if parameter.requires_grad) for layer in decoder.layers
    ]
    return Fixed(
        parameters=parameters + second,
        trained=trained,
        optimizer=int(entries * state),
        update=int(entries * update),
        head_gradient=sum(parameter.nbytes for parameter in head_parameters(decoder) if parameter.requires_grad),
        layer_gradients=tuple(gradients),
        largest_gradient=max(parameter.nbytes for parameter in model.parameters() if parameter.requires_grad),
        accumulates=config.get("gradient_accumulation_steps", 1) > 1,
        in_backward=bool(config.get("optimizer_in_bwd", False)),
        checkpoints=bool(config.get("enable_activation_checkpointing", False)),
    )


def _parameter_bytes(decoder: nn.Module, parameter: nn.Parameter, quantised: bool) -> int:
    """Quantised are the frozen matrices, but for the embedding and the output."""
    outside = {id(p) for module in (decoder.tok_embeddings, decoder.output) for p in _parameters(module)}
    if quantised and parameter.ndim == 2 and not parameter.requires_grad and id(parameter) not in outside:
        return int(parameter.numel() * _NF4_BYTES)
    return parameter.nbytes


def head_parameters(decoder: nn.Module) -> list[nn.Parameter]:
    """Of the output, or what it is tied to."""
    output = decoder.output
    return list((output.tied_module if isinstance(output, TiedLinear) else output).parameters())


def _parameters(module) -> list[nn.Parameter]:
    return list(module.parameters()) if isinstance(module, nn.Module) else []  # a tied output is no module


def optimizer_bytes(optimizer: DictConfig, dtype: torch.dtype) -> tuple[float, float]:
    """Bytes that each trained number has as state, and for copies during the update.

    Of the optimizer itself, after one step with a small parameter. Raises CommandError for one that cannot be built.
    """
    name = optimizer._component_
    if name.startswith("bitsandbytes."):
        known = _BITSANDBYTES.get(name.rpartition(".")[2])
        if known is None:
            raise CommandError(f"optimizer: of bitsandbytes the plan knows {', '.join(_BITSANDBYTES)}, got {name}")
        return known, 0.0
    settings = OmegaConf.create(OmegaConf.to_container(optimizer, resolve=True))
    parameter = nn.Parameter(torch.zeros(_TRIAL, _TRIAL, dtype=dtype))
    parameter.grad = torch.ones_like(parameter)
    try:
        trial = torchtune_config.instantiate(settings, [parameter])
    except (ImportError, TypeError, ValueError, torchtune_config._errors.InstantiationError) as error:
        raise CommandError(f"optimizer: {name} cannot be built here: {error}") from error
    with torch.compiler.set_stance("force_eager"):  # torchao's would compile the step, which takes seconds
        trial.step()
    state = sum(_bytes(value) for value in trial.state[parameter].values() if torch.is_tensor(value) and value.ndim)
    # On a card torch's own optimizers take all parameters at once, unless fused; Adam's square roots are then a copy.
    copies = isinstance(trial, torch.optim.Adam) and not settings.get("fused") and settings.get("foreach") is not False
    return state / parameter.numel(), dtype.itemsize if copies else 0.0


def _bytes(tensor: torch.Tensor) -> int:
    """Of the parts too, where a tensor is made of several, as quantised ones are."""
    if hasattr(tensor, "__tensor_flatten__"):
        names, _ = tensor.__tensor_flatten__()
        return sum(_bytes(getattr(tensor, name)) for name in names)
    return tensor.nbytes


def step(fixed: Fixed, activations: Activations, loss: StepLoss, of_other: int | None = None) -> Step:
    """Of a batch with these activations and this loss; ``of_other``: what another model's forward takes, or None."""
    gradients_before = fixed.trained if fixed.accumulates and not fixed.in_backward else 0
    always = fixed.parameters + fixed.optimizer + fixed.gathered + gradients_before
    layers = activations.layers
    held = [activations.layer_input] * len(layers) if fixed.checkpoints else list(layers)
    before_loss = always + activations.outside + sum(held) + activations.layer_input
    at_loss = before_loss + loss.memory.peak
    at_other = 0 if of_other is None else before_loss + loss.beside_other + of_other
    at_layers = 0
    # Gradients that this batch has made so far.
    made = 0 if fixed.accumulates else fixed.head_gradient
    for index in reversed(range(len(layers))):
        again = layers[index] - activations.saved_input if fixed.checkpoints else 0
        own = again + activations.moving
        grads = fixed.largest_gradient if fixed.in_backward else made
        at_layers = max(at_layers, always + activations.outside + sum(held[: index + 1]) + own + grads)
        if not fixed.accumulates:
            made += fixed.layer_gradients[index]
    at_update = fixed.parameters + fixed.optimizer + fixed.trained + fixed.update
    if fixed.in_backward:
        at_update = fixed.parameters + fixed.optimizer + fixed.largest_gradient
    return Step(loss.memory, at_loss, at_other, at_layers + loss.left_over, at_update + loss.left_over)
