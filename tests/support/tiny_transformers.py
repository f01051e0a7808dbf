"""Small random models of transformers, and a training step of one."""

import torch
import transformers

VOCABULARY = 64
SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def build(family: str, **settings) -> torch.nn.Module:
    """A model of ``{family}ForCausalLM`` in training mode, always of the same weights."""
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(**{**SIZES, **settings})
    return getattr(transformers, f"{family}ForCausalLM")(config).train()


def batch(seed: int = 1) -> dict[str, torch.Tensor]:
    tokens = torch.randint(3, VOCABULARY, (2, 12), generator=torch.Generator().manual_seed(seed))
    labels = tokens.clone()
    labels[0, :4] = -100
    return {"input_ids": tokens, "labels": labels}


def step(model, **arguments):
    """The result of a training step, its loss, and the gradients by name."""
    model.zero_grad(set_to_none=True)
    result = model(**{**batch(), **arguments})
    result.loss.backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return result, {"loss": result.loss.detach(), **gradients}


def assert_same(ours: dict, own: dict) -> None:
    assert ours.keys() == own.keys()
    for name, value in own.items():
        error = (ours[name] - value).abs()
        assert (error <= 1e-5 + 1e-5 * value.abs()).all(), f"{name} by {error.max():.1e}"
