"""Tensor parallelism over the vocabulary: each rank holds some rows of the weight, and nobody ever holds more.

A rank runs an implementation on its own rows, as if they were a whole vocabulary. Two all-reduces over the tokens merge
the largest logits, and what is measured from them, of all ranks; the backward needs one more, which adds up the hidden
states' gradients. Neither the weight nor logits travel. Label smoothing adds an all-reduce of the logits' means to the
forward.
"""

import math
from dataclasses import replace

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard

from torchtune_lce.implementations.choice import TokenLosses
from torchtune_lce.inputs.call import Call
from torchtune_lce.inputs.losses import Losses
from torchtune_lce.inputs.options import Options
from torchtune_lce.inputs.shard import VocabularyShard


def over_ranks(local: TokenLosses) -> TokenLosses:
    """The implementation ``local``, which knows this rank's rows only, as one of the whole vocabulary.

    It takes calls with a shard, and returns the same on every rank. Every rank must call it, with the same hidden
    states and labels.
    """

    def run(call: Call) -> Losses:
        shard, hidden, valid = call.shard, call.hidden, call.valid
        group = shard.mesh.get_group()
        place = call.labels - shard.start
        owned = valid & (place >= 0) & (place < shard.rows)
        # Tokens whose target lies elsewhere need their log-sum-exp here: a row of ours stands in for the target, and
        # the merge drops its loss, whose gradient is then zero.
        place = place.clamp(0, shard.rows - 1).where(valid, -1)
        if shard.sums_hidden:
            hidden = _SumGradients.apply(hidden, group)
        bias, beyond = _apart_from_all_masked(call.bias, call.options)
        options = replace(call.options, ignore_index=-1)
        own = local(replace(call, hidden=hidden, bias=bias, labels=place, options=options, shard=None, summed=False))
        nll, log_total = own.nll + beyond, own.log_total - beyond
        nll, peak, log_total = _Merge.apply(nll, own.peak, log_total, valid, owned, group)
        merged = Losses(nll, peak, log_total, divisor=own.divisor)
        if own.mean is None:
            return merged
        part = shard.rows / shard.vocabulary * (own.mean + (own.peak - peak) - beyond)
        return merged._replace(mean=_Sum.apply(part.where(valid, 0), group))

    return run


def local_operands(
    hidden: Tensor, weight: Tensor, bias: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None, VocabularyShard | None]:
    """Hidden states and this rank's rows of a projection as plain tensors, and which rows they are if it is split.

    Raises TypeError or ValueError, naming the tensor, for a layout that there is no way for.
    """
    if not isinstance(weight, DTensor):
        check_not_split(hidden)
        return hidden, weight, bias, None
    weight, shard = _local_rows("weight", weight)
    if bias is not None:
        bias, _ = _local_rows("bias", bias)
    if isinstance(hidden, DTensor):
        hidden, shard = _whole_hidden(hidden, shard)
    return hidden, weight, bias, shard


def check_not_split(hidden: Tensor) -> None:
    """For a projection that is not split either."""
    if isinstance(hidden, DTensor):
        raise TypeError(
            f"outputs must be a plain tensor, got a DTensor ({_names(hidden)}), though weight is none: split the "
            "output projection too, or leave the final norm out of tensor parallelism"
        )


def mean_over_ranks(part: Tensor, shard: VocabularyShard) -> Tensor:
    """The mean over the vocabulary from that over each rank's rows, on every rank; without a gradient."""
    total = part * (shard.rows / shard.vocabulary)
    dist.all_reduce(total, group=shard.mesh.get_group())
    return total


def _local_rows(name: str, tensor: DTensor) -> tuple[Tensor, VocabularyShard]:
    """This rank's rows of a weight or bias, through which gradients reach the DTensor, and which rows they are.

    Raises ValueError, naming the tensor ``name``, for any layout but rows on one axis of ranks, each with some rows.
    """
    mesh, vocabulary = tensor.device_mesh, tensor.shape[0]
    # By its exact type: the strided kind holds other rows.
    if mesh.ndim != 1 or type(tensor.placements[0]) is not Shard or tensor.placements[0].dim != 0:
        raise ValueError(
            f"{name} of the model's output must be split by rows over one axis of ranks (ColwiseParallel on the output "
            f"projection, RowwiseParallel on an embedding tied to it), got {_names(tensor)} on {mesh}"
        )
    ranks = mesh.size()
    # As torch.chunk does it: as even as ceil allows, and the last ones may be short.
    most = math.ceil(vocabulary / ranks)
    if most * (ranks - 1) >= vocabulary:
        # Every rank says so, and none waits for the others.
        raise ValueError(
            f"{name} of the model's output must have rows for each of {ranks} tensor parallel ranks, got {vocabulary}"
        )
    start = mesh.get_local_rank() * most
    return tensor.to_local(), VocabularyShard(mesh, start, min(most, vocabulary - start), vocabulary)


def _whole_hidden(hidden: DTensor, shard: VocabularyShard) -> tuple[Tensor, VocabularyShard]:
    """All of the hidden states that sequence parallelism split, as a plain tensor, and the shard for them.

    Their gradients go back as parts of a sum: each rank gets the total of its own part, in one reduce-scatter.
    """
    if hidden.device_mesh != shard.mesh:
        raise TypeError(
            f"outputs must be plain or on the device mesh of weight, {shard.mesh}, got {hidden.device_mesh}"
        )
    if any(placement.is_partial() for placement in hidden.placements):
        raise TypeError(
            f"outputs must be sharded or replicated, got a DTensor of unsummed parts ({_names(hidden)}): the final "
            "norm cannot have run on them"
        )
    whole = hidden.redistribute(placements=[Replicate()]).to_local(grad_placements=[Partial()])
    return whole, replace(shard, sums_hidden=False)


def _apart_from_all_masked(bias: Tensor | None, options: Options) -> tuple[Tensor | None, Tensor | float]:
    """A bias [rows] that leaves this rank some softmax, and how far above the logits its own are by it: inf, or else 0.

    Where -inf masks every row here, the local softmax would be NaN, and so would the gradients by it, though its share
    in the whole is zero.
    """
    if bias is None or options.softcap is not None:  # a capped logit is finite
        return bias, 0.0
    all_masked = bias.isneginf().all()
    return bias.masked_fill(all_masked, 0), torch.where(all_masked, torch.inf, 0.0)


class _SumGradients(torch.autograd.Function):
    """The same hidden states for every rank; each rank's gradient is a part, and their sum is the gradient."""

    @staticmethod
    def forward(ctx, hidden: Tensor, group):
        ctx.group = group
        return hidden.view_as(hidden)

    @staticmethod
    def backward(ctx, d_hidden: Tensor):
        total = d_hidden.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total, group=ctx.group)
        return total, None


class _Sum(torch.autograd.Function):
    """The sum over all ranks; every rank has the same gradient by it, which is that by each rank's part."""

    @staticmethod
    def forward(ctx, part: Tensor, group):
        total = part.clone()
        dist.all_reduce(total, group=group)
        return total

    @staticmethod
    def backward(ctx, d_total: Tensor):
        return d_total, None


class _Merge(torch.autograd.Function):
    """Loss, peak, and log-sum-exp less the peak, [N], over all ranks' rows, from those over this rank's."""

    @staticmethod
    def forward(ctx, nll: Tensor, peak: Tensor, log_total: Tensor, valid: Tensor, owned: Tensor, group):
        # A rank none of whose logits is finite has a peak all the same.
        largest = peak.masked_fill(log_total == -torch.inf, torch.finfo(peak.dtype).min)
        dist.all_reduce(largest, dist.ReduceOp.MAX, group=group)
        # Log-sum-exps measured from the largest peak are of the size of the logits' differences.
        own = (peak - largest) + log_total
        sums = torch.stack([own.exp().masked_fill(owned, 0), own.where(owned, 0), nll.where(owned, 0)])
        dist.all_reduce(sums, group=group)
        others, targets, target_nll = sums
        others = others.log()
        # By how much the rows beside those of the target's rank outweigh them: no digit of a confident token's loss,
        # nor of its gradient, is lost to a sum with 1.
        excess = others - targets
        whole = torch.logaddexp(others, targets)
        ctx.save_for_backward((own - whole).exp(), torch.sigmoid(excess), valid, owned)
        loss = target_nll + torch.logaddexp(excess, torch.zeros_like(excess))
        loss, largest, whole = (x.where(valid, 0) for x in (loss, largest, whole))
        ctx.mark_non_differentiable(largest)
        return loss, largest, whole

    @staticmethod
    def backward(ctx, d_nll: Tensor, _, d_log_total: Tensor):
        # Only create_graph has a backward record itself; what it would record here knows nothing of other ranks.
        if torch.is_grad_enabled():
            raise RuntimeError(
                "a loss over a vocabulary that tensor parallelism splits has no second derivative (create_graph=True)"
            )
        share, rest, valid, owned = ctx.saved_tensors
        # The target's rank has d_nll by its own loss already: share - 1 remains.
        by_nll = d_nll * torch.where(owned, -rest, share)
        return d_nll.where(owned, 0), None, (by_nll + d_log_total * share).where(valid, 0), None, None, None


def _names(tensor: DTensor) -> str:
    return ", ".join(map(str, tensor.placements))
