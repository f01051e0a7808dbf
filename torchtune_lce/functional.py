"""The public function: validate, pick the implementation, shift and reduce."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from torchtune_lce.implementations import choice
from torchtune_lce.implementations.reference import accumulation_dtype
from torchtune_lce.inputs import validation
from torchtune_lce.inputs.autocast import cast_inputs
from torchtune_lce.inputs.low_rank import LowRank
from torchtune_lce.inputs.options import Options
from torchtune_lce.terms.label_smoothing import smooth, with_mean_logits
from torchtune_lce.terms.token_statistics import token_statistics

if TYPE_CHECKING:
    from torchtune_lce.implementations.tensor_parallel import VocabularyShard


def linear_cross_entropy(
    hidden: Tensor,  # [..., D] float32 | bfloat16 | float16 (float64 too, but for the cce choice)
    weight: Tensor,  # [V, D], dtype of hidden
    targets: Tensor,  # [...] int64 | int32, ignore_index or 0 <= t < V
    bias: Tensor | None = None,  # [V], dtype of hidden
    *,
    ignore_index: int = -100,
    reduction: str = "mean",
    softcap: float | None = None,
    z_loss: float = 0.0,
    label_smoothing: float = 0.0,
    shift: int = 0,
    impl: str = "auto",
    filter_eps: float | str | None = "auto",
    workspace_mib: int = 128,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Cross-entropy of ``targets`` under ``softmax(hidden @ weight.T + bias)``, without holding the logits.

    Args:
        reduction: ``mean`` over the targets that are not ignored, ``sum``, or ``none``: the shape of ``targets``, 0
            where ignored. No tokens, or all of them ignored, give 0 with zero gradients.
        softcap: logits become ``softcap * tanh(logits / softcap)``.
        z_loss: this times the squared log-sum-exp is added to each token's loss, which keeps the logits from drifting.
        label_smoothing: the share of the target's weight that is spread over the whole vocabulary, in [0, 1], as in
            ``torch.nn.functional.cross_entropy``. Never filtered.
        shift: k >= 0: ``hidden[..., :-k, :]`` predicts ``targets[..., k:]``, without a copy of either. With ``none``
            the first k positions of the last axis are 0.
        impl: one of :data:`torchtune_lce.implementations.choice.NAMES`.
        filter_eps: softmax entries below it may be left out of the gradients of the filtering choice, unless
            together they hold more than a quarter of the softmax, in the mean of a block of 128 tokens: then nothing
            of that block is. ``auto`` is finfo(dtype).eps / 32, None keeps everything.
        workspace_mib: the most memory in MiB that an implementation may use beyond gradients and O(N + V). With a
            trained weight or bias ``chunked`` holds hidden states and their gradient's sum, O(N D), beside it.
        return_lse: also return the log-sum-exp of the logits, float32 in the shape of ``targets``, 0 where ignored or
            shifted off. Gradients flow through it.

    Returns:
        The loss, float32 (float64 for float64 inputs), or ``(loss, lse)``.

    Raises:
        TypeError, ValueError: an argument of the wrong type, shape, dtype, device or value, by name. A target outside
            [0, V) raises on CPU; on a GPU, where looking would stall it, its loss and gradients become NaN.
        RuntimeError: ``impl`` cannot run on this device or dtype.
    """
    options = Options(
        ignore_index=ignore_index,
        softcap=softcap,
        filter_eps=filter_eps,
        workspace_mib=workspace_mib,
        z_loss=z_loss,
        label_smoothing=label_smoothing,
    )
    return compute(
        hidden,
        weight,
        targets,
        bias,
        options=options,
        reduction=reduction,
        shift=shift,
        impl=impl,
        return_lse=return_lse,
    )


def linear_token_logprobs(
    hidden: Tensor,  # [..., D]
    weight: Tensor,  # [V, D]
    targets: Tensor,  # [...]
    bias: Tensor | None = None,  # [V]
    *,
    ignore_index: int = -100,
    softcap: float | None = None,
    shift: int = 0,
    impl: str = "auto",
    filter_eps: float | str | None = "auto",
    workspace_mib: int = 128,
) -> Tensor:
    """Log-probability of each target, float32 in the shape of ``targets``, 0 where ignored or shifted off.

    What DPO, PPO and GRPO are made of. Gradients flow with any upstream gradient a token; arguments and errors as in
    :func:`linear_cross_entropy`.
    """
    options = Options(ignore_index=ignore_index, softcap=softcap, filter_eps=filter_eps, workspace_mib=workspace_mib)
    return -compute(
        hidden, weight, targets, bias, options=options, reduction="none", shift=shift, impl=impl, return_lse=False
    )


class TokenStatistics(NamedTuple):
    """What :func:`linear_token_statistics` returns, each in the shape of ``targets``."""

    entropy: Tensor  # float32 (float64 for float64 inputs), nats, 0 where ignored or shifted off; has a gradient
    correct: Tensor  # bool: the target is the most likely entry; False where ignored or shifted off


def linear_token_statistics(
    hidden: Tensor,  # [..., D]
    weight: Tensor,  # [V, D]
    targets: Tensor,  # [...]
    bias: Tensor | None = None,  # [V]
    *,
    ignore_index: int = -100,
    softcap: float | None = None,
    shift: int = 0,
    workspace_mib: int = 128,
) -> TokenStatistics:
    """Entropy of each token's prediction, and whether its target is the most likely entry.

    The accuracy is ``correct.sum() / (targets != ignore_index).sum()``. Of several equally likely entries the first
    counts. Computes the logits once more, chunk by chunk in at most ``workspace_mib``, whatever the loss computed and
    for ignored tokens too, so that it never waits for the device: as many operations as a plain forward, so ask for it
    every so many steps.

    The entropy has a gradient by ``hidden``, ``weight`` and ``bias``, for a bonus or a penalty: its backward takes as
    much memory and, for the tokens in use, two or three times as many operations. Call under ``torch.no_grad()`` for
    figures alone.

    Arguments and errors as in :func:`linear_cross_entropy`; a target out of range on a GPU is not correct.
    """
    options = Options(ignore_index=ignore_index, softcap=softcap, workspace_mib=workspace_mib)
    return compute_token_statistics(hidden, weight, targets, bias, options=options, shift=shift)


def compute_token_statistics(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None,
    *,
    options: Options,
    shift: int = 0,
    shard: "VocabularyShard | None" = None,
    low_rank: LowRank | None = None,
) -> TokenStatistics:
    """:func:`linear_token_statistics` with its settings in one object.

    ``shard`` and ``low_rank`` are as in :func:`compute`; every rank of a shard's mesh must call it, for figures alone:
    with a shard there is no gradient.
    """
    validation.check_options(options)
    validation.check_shift(shift)
    validation.check_plain(hidden, weight, targets, bias)
    validation.check_tensors(hidden, weight, targets, bias)
    hidden, weight, bias = cast_inputs(hidden, weight, bias)
    validation.check_same_dtype(hidden, weight, bias)
    validation.check_softcap(options.softcap, accumulation_dtype(hidden.dtype))
    validation.check_ignore_index(options.ignore_index, targets)
    if shift:
        targets = _align(targets, shift, options.ignore_index)
    labels = targets.reshape(-1)
    if labels.device.type == "cpu" and validation.is_readable(labels):
        vocabulary = weight.shape[0] if shard is None else shard.vocabulary
        validation.check_range(labels, vocabulary, options.ignore_index)
    hidden = hidden.reshape(-1, hidden.shape[-1])
    if validation.has_tangents(hidden, weight, bias):
        raise RuntimeError("token statistics have no forward-mode derivative (torch.func.jvp); use torch.autograd.grad")
    statistics = token_statistics(hidden, weight, bias, labels, options, low_rank, shard)
    return TokenStatistics(*(_restore(values, targets.shape, shift) for values in statistics))


def compute(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None,
    *,
    options: Options,
    reduction: str,
    shift: int,
    impl: str,
    return_lse: bool,
    shard: "VocabularyShard | None" = None,
    low_rank: LowRank | None = None,
    observe: Callable[[Tensor, Tensor], None] | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """:func:`linear_cross_entropy` with its settings in one object.

    ``observe`` is called with each token's cross-entropy, before label smoothing and z-loss, and its log-sum-exp, [N],
    0 where ignored, without gradient.

    With ``shard``, weight and bias are this rank's rows of a larger vocabulary, which ``targets`` are in. ``low_rank``,
    of as many tokens as ``hidden`` and not with ``shard``, is a part of the projection beside ``weight``.
    """
    validation.check_options(options)
    validation.check_reduction(reduction)
    validation.check_flag("return_lse", return_lse)
    validation.check_shift(shift)
    validation.check_plain(hidden, weight, targets, bias)
    validation.check_tensors(hidden, weight, targets, bias)
    hidden, weight, bias = cast_inputs(hidden, weight, bias)
    validation.check_same_dtype(hidden, weight, bias)
    validation.check_softcap(options.softcap, accumulation_dtype(hidden.dtype))
    validation.check_ignore_index(options.ignore_index, targets)
    scaled = low_rank is not None and low_rank.scale is not None
    name, token_losses = choice.choose(impl, hidden, choice.beyond_kernels(options, scaled))
    if low_rank is not None:
        token_losses = partial(token_losses, low_rank=low_rank)
    if name not in choice.MADE_OF_TORCH:
        validation.check_transforms(name, hidden, weight, bias, *(low_rank or ()))
    if options.label_smoothing and name in choice.CCE_PRESETS:
        token_losses = with_mean_logits(token_losses, low_rank)
    vocabulary = weight.shape[0]
    if shard is not None:
        token_losses, vocabulary = shard.token_losses(token_losses), shard.vocabulary

    if shift:
        targets = _align(targets, shift, options.ignore_index)
    labels = targets.reshape(-1)
    if labels.device.type == "cpu" and validation.is_readable(labels):
        validation.check_range(labels, vocabulary, options.ignore_index)
        poison = None
    else:
        outside = validation.out_of_range(labels, vocabulary, options.ignore_index)
        if options.ignore_index == 0:
            # What stands in for a bad label, 0, must not be ignored.
            labels, options = labels.where(labels != 0, -1), replace(options, ignore_index=-1)
        labels = labels.where(~outside, 0)
        # A factor, not a replacement: the NaN then reaches the gradients too.
        poison = torch.ones_like(labels, dtype=torch.float32).masked_fill_(outside, torch.nan)

    nll, peak, log_total, *means = token_losses(hidden.reshape(-1, hidden.shape[-1]), weight, bias, labels, options)
    if poison is not None:
        nll, log_total = nll * poison, log_total * poison
    lse = peak + log_total
    if observe is not None:
        observe(nll.detach(), lse.detach())
    if options.label_smoothing:
        nll = smooth(nll, log_total, *means, options)
    if options.z_loss:
        nll = nll + options.z_loss * lse.square()
    loss = _reduce(nll, labels, targets.shape, reduction, shift, options.ignore_index)
    return (loss, _restore(lse, targets.shape, shift)) if return_lse else loss


def _align(targets: Tensor, shift: int, ignore_index: int) -> Tensor:
    """Targets moved to the hidden state that predicts them: moving int labels is cheaper than slicing hidden states."""
    aligned = torch.full_like(targets, ignore_index)
    if targets.ndim and shift < targets.shape[-1]:
        aligned[..., :-shift] = targets[..., shift:]
    return aligned


def _restore(values: Tensor, shape: torch.Size, shift: int) -> Tensor:
    """Per-token values back at their targets; the positions rolled round are shifted off, so they hold 0."""
    values = values.reshape(shape)
    # All of them are, where the shift is at least as long as the axis.
    return values.roll(shift, -1) if shift and values.ndim and shift < shape[-1] else values


def _reduce(nll: Tensor, labels: Tensor, shape: torch.Size, reduction: str, shift: int, ignore_index: int) -> Tensor:
    if reduction == "none":
        return _restore(nll, shape, shift)
    total = nll.sum()
    if reduction == "sum":
        return total
    return total / (labels != ignore_index).sum().clamp(min=1)
