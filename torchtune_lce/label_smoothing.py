"""Label smoothing on top of an implementation that holds no logits, from their mean for each token.

With smoothing e the target's one-hot becomes (1 - e) one-hot + e / V (Szegedy et al. 2016, arXiv 1512.00567, section 7;
``label_smoothing`` of ``torch.nn.functional.cross_entropy``), and the loss of a token

    (1 - e) nll + e (lse - mean of the logits),    mean of the logits = hidden . mean row of weight + mean of bias.

So the uniform part is exact, whatever an implementation leaves out of its gradients, and costs O(N D + V D). Its
gradient adds one and the same row to every row of the weight's gradient: in place, to the gradient that the
implementation has just made, which autograd itself does not promise.
"""

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from torchtune_lce.autocast import without_autocast
from torchtune_lce.implementations import TokenLosses
from torchtune_lce.low_rank import LowRank
from torchtune_lce.options import Options
from torchtune_lce.reference import accumulation_dtype


def smoothed(token_losses: TokenLosses, low_rank: LowRank | None = None) -> TokenLosses:
    """The same, with its loss smoothed by ``options.label_smoothing``; weight and bias are the whole vocabulary's.

    ``low_rank``, without a scale, is what ``token_losses`` itself adds to their product.
    """

    def run(hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, options: Options):
        valid = targets != options.ignore_index
        hidden, weight, bias, sums = with_logit_sums(hidden, weight, bias, valid, options)
        if low_rank is not None:
            # No product, which autocast would round.
            added = _used(low_rank.low, valid).to(sums.dtype) * low_rank.up.sum(0, dtype=sums.dtype)
            sums = sums + added.sum(-1)
        nll, lse = token_losses(hidden, weight, bias, targets, options)
        return smooth(nll, lse, sums / weight.shape[0], options), lse

    return run


def smooth(nll: Tensor, lse: Tensor, mean_logit: Tensor, options: Options) -> Tensor:
    """The smoothed loss of each token, [N]; all three are 0 where ignored."""
    return (1 - options.label_smoothing) * nll + options.label_smoothing * (lse - mean_logit)


def with_logit_sums(hidden: Tensor, weight: Tensor, bias: Tensor | None, valid: Tensor, options: Options):
    """``hidden`` [N, D], ``weight`` [V, D] and ``bias`` [V] as they are, and the sum of each token's logits, [N].

    The three must go to the implementation, and nowhere else, so that the gradients that come back are the only ones.
    """
    return _WithLogitSums.apply(hidden, weight, bias, valid, options.workspace_mib * 2**20)


class _WithLogitSums(torch.autograd.Function):
    @staticmethod
    @without_autocast
    def forward(ctx, hidden: Tensor, weight: Tensor, bias: Tensor | None, valid: Tensor, workspace: int):
        wide = accumulation_dtype(hidden.dtype)
        row = sum(part.sum(0, dtype=wide) for (part,) in _pieces(workspace, weight))
        sums = torch.cat([_used(*piece).to(wide) @ row for piece in _pieces(workspace, hidden, valid)])
        if bias is not None:
            sums = sums + bias.sum(dtype=wide)
        ctx.save_for_backward(hidden, valid, row)
        ctx.workspace = workspace
        # A gradient for what is frozen would be computed for nothing, and be as large as a trained one's.
        ctx.set_materialize_grads(False)
        outputs = [x if x is None else x.view_as(x) for x in (hidden, weight, bias)]
        inputs = zip(outputs, ctx.needs_input_grad[:3], strict=True)
        ctx.mark_non_differentiable(*(output for output, need in inputs if output is not None and not need))
        return *outputs, sums.where(valid, 0)

    @staticmethod
    @once_differentiable
    @without_autocast
    def backward(ctx, d_hidden: Tensor | None, d_weight: Tensor | None, d_bias: Tensor | None, d_sums: Tensor | None):
        """The implementation's gradients, those of the sums added in place."""
        if d_sums is not None:
            hidden, valid, row = ctx.saved_tensors
            d_sums = d_sums.where(valid, 0)
            need_hidden, need_weight, need_bias, *_ = ctx.needs_input_grad
            if need_hidden:
                for part, d_part in _pieces(ctx.workspace, d_hidden, d_sums):
                    part.add_(d_part[:, None] * row)
            if need_weight:
                pieces = _pieces(ctx.workspace, hidden, valid, d_sums)
                d_row = sum(d_part @ _used(part, used).to(row.dtype) for part, used, d_part in pieces)
                for (part,) in _pieces(ctx.workspace, d_weight):
                    part.add_(d_row)
            if need_bias:
                d_bias.add_(d_sums.sum())
        return d_hidden, d_weight, d_bias, None, None


def _pieces(workspace: int, matrix: Tensor, *others: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Rows of all of them at a time: CPUs widen copies of what they add, here three at most, within the workspace."""
    rows = max(workspace // (3 * 4 * matrix.shape[1]), 1)
    # One without rows is a piece too.
    for start in range(0, max(matrix.shape[0], 1), rows):
        yield tuple(tensor[start : start + rows] for tensor in (matrix, *others))


def _used(hidden: Tensor, valid: Tensor) -> Tensor:
    """Zeros where ignored: hidden states may be NaN there, and 0 times NaN is no 0."""
    return hidden.where(valid[:, None], 0)
