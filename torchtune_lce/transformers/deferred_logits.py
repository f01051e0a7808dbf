"""Logits that are not made unless somebody looks at them.

A model's forward gets them from its output projection in place of a tensor. What models do to logits before their loss,
a scale, a soft cap, LoRA's product beside the head's, is noted down; whatever else is asked of them makes the tensor,
just as the model would have made it, and is then done to that. So nothing that a forward does can be missed.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from torchtune_lce.transformers.switch import Switch


class Product(NamedTuple):
    """``factor * (hidden @ linear.weight.T + linear.bias)``."""

    hidden: Tensor  # [..., D]
    linear: nn.Linear
    factor: float


@dataclass(frozen=True)
class Recipe:
    """The logits are the sum of ``products``, or ``scale * tanh`` of it."""

    products: tuple[Product, ...]
    capped: bool = False
    scale: float = 1.0

    def times(self, number: float) -> Recipe:
        if self.capped:
            return Recipe(self.products, True, self.scale * number)
        return Recipe(tuple(part._replace(factor=part.factor * number) for part in self.products))


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
            self.switch.say(f"its forward uses the logits themselves ({what})")
            self.made = self.make()
        return self.made

    @property
    def device(self) -> torch.device:
        return self.recipe.products[0].hidden.device

    @property
    def dtype(self) -> torch.dtype:
        given = self.recipe.products[0].hidden
        kind = given.device.type
        return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else given.dtype

    @property
    def shape(self) -> torch.Size:
        first = self.recipe.products[0]
        return torch.Size((*first.hidden.shape[:-1], first.linear.weight.shape[0]))

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
