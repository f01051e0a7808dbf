"""Tokens that the model has no embedding for: its own error names nobody, and on a GPU ends the process."""

from torch import Tensor, nn

from torchtune_lce.model.projection import embedding_rows


def check_tokens(tokens: Tensor, model: nn.Module, tokenizer) -> None:
    """Raises ValueError for a batch [B, S] with tokens of a tokenizer that is larger than the model's embedding.

    Reads the batch, which a GPU is waited for to do: for one that the loader has just made, on the CPU, or before
    something that takes seconds.
    """
    entries, largest = embedding_rows(model), int(tokens.max())
    if entries is None or largest < entries:
        return
    size = getattr(tokenizer, "vocab_size", None)
    which = "" if size is None else f", which has {size} entries"
    raise ValueError(
        f"tokens must be less than {entries}, the rows of the model's embedding, got {largest}: the usual cause is a "
        f"larger tokenizer{which}"
    )
