"""Perplexity without logits, as docs/transformers.md has it, beside the class's own loss."""

import pytest
import torch

pytest.importorskip("transformers")

from tiny_transformers import batch, build

from torchtune_lce import linear_cross_entropy, linear_token_logprobs


@torch.no_grad()
def test_perplexity_of_a_text():
    model, tokens = build("Llama").eval(), batch()["input_ids"]
    head, total, count = model.get_output_embeddings().weight, 0.0, 0
    for ids in tokens.split(1):
        hidden = model.base_model(input_ids=ids).last_hidden_state
        logprobs = linear_token_logprobs(hidden, head, ids, shift=1)
        torch.testing.assert_close(linear_cross_entropy(hidden, head, ids, shift=1, reduction="none"), -logprobs)
        total, count = total - logprobs.sum(), count + ids[:, 1:].numel()
    torch.testing.assert_close((total / count).exp(), model(input_ids=tokens, labels=tokens).loss.exp())
