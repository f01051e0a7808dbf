"""The public functions: a call is checked, computed by an implementation, and reduced."""

from collections.abc import Callable
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from torchtune_lce.implementations import choice
from torchtune_lce.inputs import validation
from torchtune_lce.inputs.call import Call, checked
from torchtune_lce.inputs.losses import Losses
from torchtune_lce.inputs.options import Options
from torchtune_lce.terms.label_smoothing import smooth, with_mean_logits
from torchtune_lce.terms.token_statistics import token_statistics


def linear_cross_entropy(
    hidden: Tensor,  # [..., D] float32 | bfloat16 | float16 (float64 too, but for the cce implementations)
    weight: Tensor,  # [V, D], dtype of hidden
    targets: Tensor,  # [...] int64 | int32, ignore_index or 0 <= t < V
    bias: Tensor | None = None,  # [V], dtype of hidden
    *,
    ignore_index: int = -100,
    reduction: str = "mean",
    softcap: float | None = None,
    logit_scale: float = 1.0,
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
        logit_scale: then they are multiplied by it, in float32: 1 / temperature, or a model's own factor. From 1e-30
            to 1e30.
        z_loss: this times the squared log-sum-exp is added to each token's loss, which keeps the logits from drifting.
        label_smoothing: the share of the target's weight that is spread over the whole vocabulary, in [0, 1], as in
            ``torch.nn.functional.cross_entropy``. Never filtered.
        shift: k >= 0: ``hidden[..., :-k, :]`` predicts ``targets[..., k:]``, without a copy of either. With ``none``
            the first k positions of the last axis are 0.
        impl: one of :data:`torchtune_lce.implementations.choice.NAMES`.
        filter_eps: softmax entries below it may be left out of the gradients of the filtering implementations, unless
            together they hold more than a quarter of the softmax, in the mean of a block of 128 tokens: then nothing
            of that block is. ``auto`` is finfo(dtype).eps / 45, and / 64 where weight, bias and adapter have no
            gradient; None keeps everything.
        workspace_mib: the most memory in MiB that an implementation may use beyond gradients and O(N + V), where that
            has room for its smallest pieces. With a trained weight or bias ``cce_exact`` may hold it until the
            backward, and has the memory of the weight's gradient from the forward on; ``chunked`` holds hidden states
            and their gradient's sum, O(N D), beside it; ``torch_compile`` takes in 16 bits as much again as a float32
            sum of the weight's gradient would, or with a frozen weight of the hidden states'.
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
        logit_scale=logit_scale,
        filter_eps=filter_eps,
        workspace_mib=workspace_mib,
        z_loss=z_loss,
        label_smoothing=label_smoothing,
    )
    validation.check_reduction(reduction)
    validation.check_flag("return_lse", return_lse)
    call = checked(hidden, weight, targets, bias, options=options, shift=shift)
    return compute(call, reduction=reduction, impl=impl, return_lse=return_lse)


def linear_token_logprobs(
    hidden: Tensor,  # [..., D]
    weight: Tensor,  # [V, D]
    targets: Tensor,  # [...]
    bias: Tensor | None = None,  # [V]
    *,
    ignore_index: int = -100,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    shift: int = 0,
    impl: str = "auto",
    filter_eps: float | str | None = "auto",
    workspace_mib: int = 128,
    return_entropy: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Log-probability of each target, float32 in the shape of ``targets``, 0 where ignored or shifted off.

    What DPO, PPO and GRPO are made of; ``logit_scale`` is then 1 / temperature. Gradients flow with any upstream
    gradient a token; arguments and errors as in :func:`linear_cross_entropy`.

    With ``return_entropy`` also the entropy of each prediction, in nats, alike, but without a gradient (that of
    :func:`linear_token_statistics` has one). The ``cce`` implementations have it from the pass that makes the losses,
    others compute the logits once more. It is right to some 2e-5, and NaN where the log-probability is.
    """
    options = Options(
        ignore_index=ignore_index,
        softcap=softcap,
        logit_scale=logit_scale,
        filter_eps=filter_eps,
        workspace_mib=workspace_mib,
    )
    validation.check_flag("return_entropy", return_entropy)
    call = checked(hidden, weight, targets, bias, options=options, shift=shift)
    if return_entropy:
        return logprobs_and_entropy(call, impl)
    return -compute(call, reduction="none", impl=impl)


def logprobs_and_entropy(call: Call, impl: str) -> tuple[Tensor, Tensor]:
    """:func:`linear_token_logprobs` with ``return_entropy``, of a call that has been checked."""
    losses = _token_losses(call, impl)(replace(call, with_entropy=True))
    entropy = losses.entropy
    if entropy is None:
        with torch.no_grad():
            entropy = token_statistics(call)[0].masked_fill(losses.nll.isnan(), torch.nan)
    return -call.at_targets(losses.nll), call.at_targets(entropy)


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
    logit_scale: float = 1.0,
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
    options = Options(ignore_index=ignore_index, softcap=softcap, logit_scale=logit_scale, workspace_mib=workspace_mib)
    return compute_token_statistics(checked(hidden, weight, targets, bias, options=options, shift=shift))


def compute_token_statistics(call: Call) -> TokenStatistics:
    """:func:`linear_token_statistics` of a call that has been checked.

    With a shard every rank of its mesh must call it, for figures alone: there is no gradient.
    """
    if validation.has_tangents(call.hidden, call.weight, call.bias):
        raise RuntimeError("token statistics have no forward-mode derivative (torch.func.jvp); use torch.autograd.grad")
    return TokenStatistics(*map(call.at_targets, token_statistics(call)))


def compute(
    call: Call,
    *,
    reduction: str,
    impl: str,
    return_lse: bool = False,
    observe: Callable[[Tensor, Tensor], None] | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """:func:`linear_cross_entropy` of a call that has been checked.

    ``observe`` is called with each token's cross-entropy, before label smoothing and z-loss, and its log-sum-exp, [N],
    0 where ignored, without gradient.
    """
    # A log-sum-exp that is returned may be differentiated.
    call = replace(call, summed=reduction != "none" and not return_lse)
    losses, options = _token_losses(call, impl)(call), call.options
    # What nobody asks for is a launch of a kernel.
    lse = losses.peak + losses.log_total if return_lse or options.z_loss or observe is not None else None
    if observe is not None:
        observe(losses.nll.detach(), lse.detach())
    loss = _reduced(losses, lse, call, reduction)
    return (loss, call.at_targets(lse)) if return_lse else loss


def _reduced(losses: Losses, lse: Tensor | None, call: Call, reduction: str) -> Tensor:
    options, total = call.options, losses.total
    if total is None:
        nll = smooth(losses, options) if options.label_smoothing else losses.nll
        if options.z_loss:
            nll = nll + options.z_loss * lse.square()
        if reduction == "none":
            return call.at_targets(nll)
        total = nll.sum()
    elif options.label_smoothing:
        total = total - options.label_smoothing * losses.mean.sum()
    if reduction == "sum":
        return total
    return total / (call.valid.sum().clamp(min=1) if losses.divisor is None else losses.divisor)


def _token_losses(call: Call, impl: str) -> choice.TokenLosses:
    """What computes the call's losses a token: an implementation, and around it what it does not do itself."""
    name, token_losses = choice.choose(impl, call.hidden)
    choice.check_transforms(name, *call.given, *(call.low_rank or ()))
    # Other means the implementation returns itself.
    if call.options.label_smoothing and choice.CAPABILITIES[name].own_backward and call.means_by_product:
        token_losses = with_mean_logits(token_losses)
    if call.shard is not None:
        # torch.distributed.tensor is loaded by whoever has a shard.
        from torchtune_lce.implementations.tensor_parallel import over_ranks

        token_losses = over_ranks(token_losses)
    elif choice.CAPABILITIES[name].any_label:
        return token_losses
    return token_losses if call.in_range else _with_nan_outside(token_losses)


def _with_nan_outside(token_losses: choice.TokenLosses) -> choice.TokenLosses:
    """The same, with NaN for tokens whose label names no entry."""

    def run(call: Call) -> Losses:
        call, outside = call.without_labels_outside()
        nll, peak, log_total, *others = token_losses(call)
        # A factor, not a replacement: the NaN then reaches the gradients too.
        poison = torch.ones_like(nll).masked_fill_(outside, torch.nan)
        # No _replace, into which Dynamo of torch 2.8 does not look.
        return Losses(nll * poison, peak, log_total * poison, *others)

    return run
