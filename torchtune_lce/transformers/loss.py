"""In place of transformers' ``ForCausalLMLoss``: the same loss, of logits that have not been made."""

import math
from dataclasses import replace

import torch
from torch import Tensor, nn

from torchtune_lce.functional import compute
from torchtune_lce.inputs.call import Call, checked
from torchtune_lce.inputs.low_rank import LowRank
from torchtune_lce.inputs.options import Options
from torchtune_lce.transformers.deferred_logits import DeferredLogits, Product, Recipe
from torchtune_lce.transformers.switch import NAME


def causal_lm_loss(
    self: nn.Module,  # the patched model
    logits,  # [B, S, V]
    labels: Tensor | None,  # [B, S], each moved to the position that predicts it
    vocab_size: int,
    num_items_in_batch: Tensor | int | None = None,
    ignore_index: int = -100,
    shift_labels: Tensor | None = None,  # [B, S], already moved
    **kwargs,
) -> Tensor:
    """The mean over the labels in use, 0 where there are none; or with ``num_items_in_batch`` their sum by that."""
    switch = getattr(self, NAME)
    if isinstance(logits, DeferredLogits):
        given = labels if shift_labels is None else shift_labels
        why = _obstacle(logits, given, vocab_size)
        if why is None:
            options = replace(switch.options, ignore_index=ignore_index)
            labels, shift = given.to(logits.device), 1 if shift_labels is None else 0
            reduction = "mean" if num_items_in_batch is None else "sum"
            total = logits.recipe.products[0].context.run(
                lambda: compute(_call(logits.recipe, labels, options, shift), reduction=reduction, impl=switch.impl)
            )
            if num_items_in_batch is None:
                return total
            if isinstance(num_items_in_batch, Tensor):
                num_items_in_batch = num_items_in_batch.to(total.device)
            return total / num_items_in_batch
        logits = logits.look(why)
    elif switch.on:
        switch.say("its forward makes the logits without calling its output projection, or changes them by itself")
    return stock_loss()(logits, labels, vocab_size, num_items_in_batch, ignore_index, shift_labels, **kwargs)


def stock_loss():
    from transformers.loss.loss_utils import ForCausalLMLoss

    return ForCausalLMLoss


def _obstacle(logits: DeferredLogits, labels: Tensor, vocab_size: int) -> str | None:
    """What the stock loss has to say or do by itself."""
    if logits.made is not None:
        return "before the loss"
    shape = logits.shape
    if shape[-1] != vocab_size:
        return f"the loss reads them as of {vocab_size} entries, the output projection has {shape[-1]}"
    if shape[:-1] != labels.shape:
        return f"logits of {list(shape[:-1])} tokens, labels of {list(labels.shape)}"
    first, *others = logits.recipe.products
    if any(other.context != first.context for other in others):
        return "an adapter's product is made under another autocast, or without gradients, than the output projection's"
    return None


def _call(recipe: Recipe, labels: Tensor, options: Options, shift: int) -> Call:
    # The head's, and to it adapters add theirs.
    first, *others = recipe.products
    for product in recipe.products:
        product.check()
    # c tanh(x / c) times s is scale * tanh(factor * x).
    scale = recipe.scale * first.factor
    options = replace(
        options,
        softcap=1 / first.factor if recipe.capped else None,
        # A cap's division and multiplication: the one or two roundings of the product are not the model's.
        logit_scale=1.0 if math.isclose(scale, 1, rel_tol=1e-12) else scale,
    )
    bias = first.bias
    for other in others:
        if other.bias is not None:
            part = other.bias * (other.factor / first.factor)
            bias = part if bias is None else bias + part
    call = checked(first.hidden, first.weight, labels, bias, options=options, shift=shift)
    return replace(call, low_rank=_low_rank(others, first.factor, call.hidden.dtype)) if others else call


def _low_rank(products: list[Product], by: float, dtype: torch.dtype) -> LowRank:
    low = [product.hidden.flatten(0, -2) * (product.factor / by) for product in products]
    up = [product.weight for product in products]
    return LowRank(torch.cat(low, 1).to(dtype), torch.cat(up, 1).to(dtype), None)
