"""Inputs of a call with a row of each kind that the kernels treat by a rule of its own."""

import torch

TOKENS, VOCABULARY, WIDTH = 75, 301, 40
FLAT, CONFIDENT, MISTAKEN = slice(10, 20), slice(20, 30), slice(30, 40)
MASKED, IGNORED = slice(40, 42), slice(42, 50)


def hard_inputs(device: torch.device) -> dict[str, torch.Tensor]:
    """hidden, weight, bias and targets: rows of a flat softmax, confident ones, of a loss past 100, of a masked target.

    Most entries are improbable, so that a filter finds whole tiles to leave out. All logits are far below zero.
    """
    from torchtune_lce.kernels.reference_logits import SAMPLED_ENTRIES

    torch.manual_seed(7)
    hidden, weight = torch.randn(TOKENS, WIDTH, device=device), torch.randn(VOCABULARY, WIDTH, device=device) / 8
    # Two entries that one feature alone speaks for and against. The first is in no sample of the vocabulary.
    favourite, loser = 6, 7
    samples = SAMPLED_ENTRIES.value
    assert not any(number * VOCABULARY // samples == favourite for number in range(samples))
    hidden[:, 0], weight[:, 0] = 0, 0
    weight[favourite], weight[loser] = 0, 0
    weight[favourite, 0], weight[loser, 0] = 4, -4
    bias = torch.randn(VOCABULARY, device=device) / 4 - 40
    bias[97:] -= 6
    bias[5] = -torch.inf
    targets = torch.randint(8, 97, (TOKENS,), device=device)
    hidden[FLAT] *= 0.01
    hidden[CONFIDENT, 0], targets[CONFIDENT] = 5, favourite
    hidden[MISTAKEN, 0], targets[MISTAKEN] = 20, loser
    targets[MASKED], targets[IGNORED] = 5, -100
    return {"hidden": hidden, "weight": weight, "bias": bias, "targets": targets}
