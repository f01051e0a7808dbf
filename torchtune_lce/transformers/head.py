"""A model's output projection, which puts its product off while a training forward runs."""

from types import MethodType

from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel

from torchtune_lce.transformers.deferred_logits import DeferredLogits, Product, Recipe
from torchtune_lce.transformers.switch import NAME, Switch


def make_ready(head: nn.Module | None, switch: Switch) -> str | None:
    """Lets the projection ``head`` put its product off, or tells why it cannot.

    To be asked before every forward: adapters, resizing and tying replace the module. With LoRA on it the products of
    head and adapter are put off alike. A weight that ZeRO-3 has split is whole again when the loss reads it: DeepSpeed
    gathers what is read while the model's forward runs.
    """
    if head is None:
        return "it has no output projection (get_output_embeddings gives None)"
    linears = _linears(head)
    if not linears:
        return f"its output projection is a {type(head).__name__}, which is no torch.nn.Linear"
    for module in head.modules():
        if isinstance(module, (FSDPModule, FullyShardedDataParallel)):
            return "its output projection is an FSDP unit of its own, whose weight is gone when the loss needs it"
    for linear in linears:
        if linear.__dict__.get(NAME) is switch:
            continue
        why = _obstacle(linear)
        if why is not None:
            return why
        setattr(linear, NAME, switch)
        linear.forward = MethodType(_forward, linear)
    return None


def release(model: nn.Module) -> None:
    """Gives every projection that :func:`make_ready` has met in ``model`` its own forward again."""
    for module in model.modules():
        if getattr(vars(module).get("forward"), "__func__", None) is _forward:
            del module.forward
            delattr(module, NAME)


def _linears(head: nn.Module) -> list[nn.Linear]:
    """Those inside that give logits: the head itself, or an adapter's base layer and its second matrix."""
    found = [module for module in head.modules() if isinstance(module, nn.Linear)]
    rows = [module.out_features for module in found]
    return [module for module in found if module.out_features == max(rows)]


def _obstacle(linear: nn.Linear) -> str | None:
    if type(linear).forward is not nn.Linear.forward:
        return f"its output projection is a {type(linear).__name__}, whose product is not torch.nn.Linear's"
    if "forward" in linear.__dict__:
        return "the forward of its output projection has been replaced on this one module"
    return None


def _forward(self: nn.Linear, hidden: Tensor):
    """In place of the projection's forward: its product, put off while the model's switch is on."""
    switch = getattr(self, NAME)
    if not switch.on:
        return nn.Linear.forward(self, hidden)
    if isinstance(hidden, DeferredLogits):
        hidden = hidden.look("a second projection")
    weight = self.weight
    for what, tensor in (("its output projection's weight is a", weight), ("its hidden states are a", hidden)):
        if type(tensor) in (Tensor, nn.Parameter):
            continue
        switch.say(f"{what} {type(tensor).__name__}, not a plain tensor")
        switch.on = False  # for the rest of this forward, whose loss is the class's own
        return nn.Linear.forward(self, hidden)
    product = Product.of(hidden, self, weight)
    return DeferredLogits(switch, Recipe((product,)), product.make)
