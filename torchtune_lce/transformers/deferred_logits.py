"""Logits that are not made unless somebody looks at them.

A model's forward gets them from its output projection in place of a tensor. What models do to logits before their loss,
a scale, a soft cap, LoRA's product beside the head's, is noted down; whatever else is asked of them makes the tensor,
just as the model would have made it, and is then done to that. So nothing that a forward does can be missed.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized

from torchtune_lce.transformers.switch import Switch


@dataclass(frozen=True)
class Context:
    """What a product depends on beside its operands."""

    device: str  # its type
    autocast: torch.dtype | None  # None: off
    grad: bool

    @staticmethod
    def here(device: str) -> Context:
        # torch has no autocast there to ask for, nor, in Dynamo, a way to ask whether it has.
        is_on = device != "meta" and torch.is_autocast_enabled(device)
        return Context(device, torch.get_autocast_dtype(device) if is_on else None, torch.is_grad_enabled())

    def run(self, function: Callable[[], Tensor]) -> Tensor:
        """What ``function`` gives under this autocast, and without gradients where there were none."""
        with torch.set_grad_enabled(self.grad and torch.is_grad_enabled()):
            if self.autocast == Context.here(self.device).autocast:
                return function()
            with torch.autocast(self.device, self.autocast, enabled=self.autocast is not None):
                return function()


@dataclass(frozen=True)
class Product:
    """``factor * (hidden @ linear.weight.T + linear.bias)``."""

    hidden: Tensor  # [..., D]
    linear: nn.Linear
    parametrised: Tensor | None  # the weight, where reading it makes it
    factor: float
    context: Context
    version: int | None  # of hidden, where torch counts; a compiler sees every change

    @staticmethod
    def of(hidden: Tensor, linear: nn.Linear, weight: Tensor) -> Product:
        parametrised = weight if is_parametrized(linear) else None
        version = None if torch.compiler.is_compiling() or hidden.is_inference() else hidden._version
        return Product(hidden, linear, parametrised, 1.0, Context.here(hidden.device.type), version)

    @property
    def weight(self) -> Tensor:
        """[V, D]. Read anew: ZeRO-3 may have split it, and gathers what is read."""
        return self.linear.weight if self.parametrised is None else self.parametrised

    @property
    def bias(self) -> Tensor | None:
        return self.linear.bias

    def make(self) -> Tensor:
        """The product as the model would have made it, without the factor."""
        self.check()
        return self.context.run(lambda: F.linear(self.hidden, self.weight, self.bias))

    def check(self) -> None:
        """Raises RuntimeError where the hidden states are not any more what the model has multiplied."""
        if self.version is not None and self.hidden._version != self.version:
            raise RuntimeError(
                "the hidden states that the output projection was given have been changed in place since, and its "
                "product was put off until the loss: change a copy of them, or leave this model unpatched"
            )


@dataclass(frozen=True)
class Recipe:
    """The logits are the sum of ``products``, or ``scale * tanh`` of it."""

    products: tuple[Product, ...]
    capped: bool = False
    scale: float = 1.0

    def times(self, number: float) -> Recipe:
        if self.capped:
            return Recipe(self.products, True, self.scale * number)
        return Recipe(tuple(replace(part, factor=part.factor * number) for part in self.products))


class DeferredLogits:
    """Logits [..., V] of the dtype that the head's product would have.

    ``make`` computes them. Once somebody has looked, ``made`` is what they saw, and perhaps changed.
    """

    def __init__(self, switch: Switch, recipe: Recipe, make: Callable[[], Tensor]):
        self.switch = switch
        self.recipe = recipe
        self.make = make
        self.made: Tensor | None = None

    def look(self, what: str) -> Tensor:
        """The tensor; ``what`` needs it."""
        if self.made is None:
            if self.switch.on:
                self.say(what)
                self.switch.on = False  # for the rest of this forward, whose loss is the class's own
            # Whoever looks may do so without gradients.
            with torch.set_grad_enabled(any(part.context.grad for part in self.recipe.products)):
                self.made = self.make()
        return self.made

    def say(self, what: str) -> None:
        self.switch.say(f"its forward uses the logits themselves ({what})")

    @property
    def device(self) -> torch.device:
        return self.recipe.products[0].hidden.device

    @property
    def dtype(self) -> torch.dtype:
        first = self.recipe.products[0]
        return first.context.autocast or first.hidden.dtype

    @property
    def shape(self) -> torch.Size:
        first = self.recipe.products[0]
        return torch.Size((*first.hidden.shape[:-1], first.weight.shape[0]))

    def size(self, dim: int | None = None):
        return self.shape if dim is None else self.shape[dim]

    def float(self):
        return self.to(torch.float32)

    def contiguous(self):
        return self if self.made is None else self.made.contiguous()

    def to(self, *args, **kwargs):
        """Itself where that changes nothing, or only widens: the loss is computed in float32 anyway."""
        if self.made is None and len(args) == 1 and not kwargs:
            if args[0] in (self.dtype, self.device):
                return self
            if args[0] == torch.float32 and self.dtype in (torch.bfloat16, torch.float16):
                return DeferredLogits(self.switch, self.recipe, lambda: self.make().to(torch.float32))
        return self.look("to").to(*args, **kwargs)

    def tanh(self):
        if self.made is not None or self.recipe.capped:
            return self.look("tanh").tanh()
        return DeferredLogits(self.switch, Recipe(self.recipe.products, True), lambda: self.make().tanh())

    def __mul__(self, other):
        if self.made is None and _is_factor(other):
            return DeferredLogits(self.switch, self.recipe.times(other), lambda: self.make() * other)
        return self.look("mul") * other

    __rmul__ = __mul__

    def __truediv__(self, other):
        if self.made is None and _is_factor(other):
            return DeferredLogits(self.switch, self.recipe.times(1 / other), lambda: self.make() / other)
        return self.look("div") / other

    def __add__(self, other):
        if not isinstance(other, DeferredLogits):
            return self.look("add") + other
        recipes = self.recipe, other.recipe
        if self.made is None and other.made is None and not any(recipe.capped for recipe in recipes):
            products = self.recipe.products + other.recipe.products
            return DeferredLogits(self.switch, Recipe(products), lambda: self.make() + other.make())
        return self.look("add") + other.look("add")

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        noted = _NOTED.get(function)
        if noted is not None and not kwargs and isinstance(args[0], cls):
            return noted(*args)
        name = getattr(function, "__name__", str(function))
        return function(*_looked_at(args, name), **_looked_at(kwargs or {}, name))

    def __getattr__(self, name: str):
        # Asked for only where the class has nothing of that name.
        if name.startswith("__"):
            raise AttributeError(name)
        return getattr(self.look(name), name)


_NOTED = {
    torch.tanh: DeferredLogits.tanh,
    torch.Tensor.tanh: DeferredLogits.tanh,
    torch.mul: DeferredLogits.__mul__,
    torch.div: DeferredLogits.__truediv__,
}


def _is_factor(other) -> bool:
    return type(other) in (int, float) and 1e-30 < other < 1e30


def _looked_at(given, what: str):
    if isinstance(given, DeferredLogits):
        return given.look(what)
    if isinstance(given, dict):
        return {name: _looked_at(value, what) for name, value in given.items()}
    if isinstance(given, (list, tuple)):
        return type(given)(_looked_at(value, what) for value in given)
    return given


def _by_tensor(name: str):
    def method(self, *args):
        return getattr(self.look(name.strip("_")), name)(*_looked_at(args, name))

    return method


# Python looks for operators in the class only.
for _name in "sub rsub radd rtruediv neg pow matmul getitem setitem len iter lt gt".split():
    setattr(DeferredLogits, f"__{_name}__", _by_tensor(f"__{_name}__"))
