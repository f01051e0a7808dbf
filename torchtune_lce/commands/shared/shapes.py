"""Sizes of the problem, by the name of a model or in numbers."""

import re
from dataclasses import dataclass

from torchtune_lce.commands.shared.errors import CommandError


@dataclass(frozen=True)
class Shape:
    tokens: int
    hidden: int
    vocab: int

    def __str__(self) -> str:
        return f"{self.tokens}x{self.hidden}x{self.vocab}"

    def flops(self, frozen_weight: bool | None) -> float:
        """Of the products that the mathematics needs: 2NDV for the logits, as much again for each gradient.

        ``frozen_weight`` None means the forward alone. What an implementation computes twice or leaves out is not
        counted, so a rate above the card's own shows work that was skipped.
        """
        products = 1 if frozen_weight is None else 2 if frozen_weight else 3
        return 2.0 * self.tokens * self.hidden * self.vocab * products


FLOPS_FORMULA = "FLOP = 2NDV forward, 4NDV with a frozen head, 6NDV with both gradients; recomputation is not counted"

# Hidden size and vocabulary, by the names of torchtune's model builders.
MODELS = {
    "llama3_2_1b": (2048, 128_256),
    "llama3_2_3b": (3072, 128_256),
    "llama3_1_8b": (4096, 128_256),
    "llama3_1_70b": (8192, 128_256),
    "qwen2_5_0_5b": (896, 151_936),
    "qwen2_5_1_5b": (1536, 151_936),
    "qwen2_5_3b": (2048, 151_936),
    "qwen2_5_7b": (3584, 152_064),
    "qwen2_5_14b": (5120, 152_064),
    "gemma2_2b": (2304, 256_000),
    "gemma2_9b": (3584, 256_000),
    "gemma2_27b": (4608, 256_000),
    "mistral_7b": (4096, 32_000),
    "phi4_14b": (5120, 100_352),
}


def parse_shape(text: str, tokens: int) -> Shape:
    """A model's name, with ``tokens``, or TOKENSxHIDDENxVOCAB."""
    if text in MODELS:
        return Shape(tokens, *MODELS[text])
    numbers = re.fullmatch(r"(\d+)x(\d+)x(\d+)", text)
    if not numbers:
        raise CommandError(f"a shape is TOKENSxHIDDENxVOCAB or one of {', '.join(MODELS)}; got {text!r}")
    return checked(Shape(*map(int, numbers.groups())))


def checked(shape: Shape) -> Shape:
    """``shape`` itself; raises CommandError for a size below 1."""
    for name, size in vars(shape).items():
        if size < 1:
            raise CommandError(f"{name} must be at least 1, got {size}")
    return shape
