"""Output projections with an adapter that has been trained for a while."""

import torch
from tiny_models import SIZES, VOCABULARY
from torch import nn
from torchtune.modules.peft import DoRALinear, LoRALinear

EMBED_DIM = SIZES["embed_dim"]


KINDS = {"LoRA": LoRALinear, "DoRA": DoRALinear}


def make_output(kind: str, vocabulary: int = VOCABULARY, width: int = EMBED_DIM, rank: int = 4, **settings):
    """An adapter that has been trained for a while: B starts at zero, the magnitude at the row norms."""
    output = KINDS[kind](width, vocabulary, rank=rank, alpha=3 * rank, **settings)
    nn.init.normal_(output.lora_b.weight, std=0.1)
    if kind == "DoRA":
        output.initialize_dora_magnitude()
        with torch.no_grad():
            output.magnitude.mul_(1 + 0.3 * torch.randn(vocabulary))
            output.magnitude[5] = 0  # a scale by which nothing may be divided
    return output
