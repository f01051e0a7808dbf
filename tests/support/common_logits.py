"""Logits that share a large value, exact in float32."""

import torch

# Of the latter two a sum over the vocabulary is no float32.
COMMON = (0.0, 1e3, 2.0**16 + 1 / 8, 2.0**20 + 1 / 8)


def inputs_with_a_common_logit(common: float, where: str, device):
    """hidden, weight, bias and targets. No logit is rounded: differences are multiples of an eighth.

    ``where``: the bias, a column of the weight, or that alone, so that all logits are equal.
    """
    tokens, entries = (16, 8) if where == "all of them" else (40, 300)
    hidden = torch.randint(-4, 5, (tokens, 8), device=device) / 2
    weight = torch.randint(-4, 5, (entries, 8), device=device) / 4
    bias = torch.zeros(entries, device=device)
    if where == "bias":
        bias += common
    else:
        hidden[:, 0], weight[:, 0] = 1, common
    if where == "all of them":
        hidden[:, 1:] = 0
    targets = torch.randint(0, entries, (tokens,), device=device)
    targets[::5] = -100
    return hidden, weight, bias, targets
