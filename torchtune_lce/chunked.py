"""``impl="chunked"``: bounded memory in plain eager PyTorch, for any device and without a compiler.

The vocabulary is walked in chunks. The forward keeps a running log-sum-exp; the backward computes each chunk's logits
again, so neither direction ever holds more than one [N, chunk] block of them.
"""

import torch
from torch import Tensor

from torchtune_lce.options import Options
from torchtune_lce.reference import accumulation_dtype


def entries_per_chunk(tokens: int, vocabulary: int, workspace_mib: int, dtype: torch.dtype) -> int:
    """Vocabulary entries whose blocks fit the workspace: two of logits (a softcap or a log-sum-exp takes the second)
    beside the last chunk's gradient in the inputs' dtype. At least 64, or the products would be slow.
    """
    bytes_per_entry = tokens * (2 * accumulation_dtype(dtype).itemsize + dtype.itemsize)
    return min(vocabulary, max(workspace_mib * 2**20 // max(bytes_per_entry, 1), 64))


class _ChunkedTokenLosses(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, bias, targets, options: Options):
        dtype = accumulation_dtype(hidden.dtype)
        rows = (targets != options.ignore_index).nonzero().squeeze(-1)
        kept = hidden if rows.numel() == targets.numel() else hidden[rows]
        labels = targets[rows].long()
        lse = hidden.new_full(rows.shape, -torch.inf, dtype=dtype)
        target_logit = hidden.new_zeros(rows.shape, dtype=dtype)
        chunk = entries_per_chunk(rows.numel(), weight.shape[0], options.workspace_mib, hidden.dtype)
        for start in range(0, weight.shape[0], chunk):
            chunk_lse, chunk_target = _chunk_statistics(kept, weight, bias, labels, start, chunk, options.softcap)
            lse = torch.logaddexp(lse, chunk_lse)
            target_logit += chunk_target
        ctx.save_for_backward(hidden, weight, bias, targets, rows, lse)
        ctx.options, ctx.chunk = options, chunk
        ctx.set_materialize_grads(False)
        scattered = [hidden.new_zeros(targets.shape, dtype=dtype) for _ in range(2)]
        scattered[0][rows] = lse - target_logit
        scattered[1][rows] = lse
        return tuple(scattered)

    @staticmethod
    def backward(ctx, d_nll, d_lse):
        # once_differentiable would let the gradients pass for constants where only the saved inputs ask for more.
        if torch.is_grad_enabled():
            raise RuntimeError("impl='chunked' has no second derivative (create_graph=True); set impl='reference'")
        hidden, weight, bias, targets, rows, lse = ctx.saved_tensors
        need_hidden, need_weight, need_bias = ctx.needs_input_grad[:3]
        kept = hidden if rows.numel() == targets.numel() else hidden[rows]
        labels = targets[rows].long()
        nothing = torch.zeros_like(lse)
        d_nll = nothing if d_nll is None else d_nll[rows]
        d_softmax = d_nll if d_lse is None else d_nll + d_lse[rows]
        d_kept = torch.zeros_like(kept, dtype=lse.dtype) if need_hidden else None
        d_weight = torch.empty_like(weight) if need_weight else None
        d_bias = torch.empty_like(bias) if need_bias else None
        for start in range(0, weight.shape[0], ctx.chunk):
            d_logits = _chunk_gradient(
                kept, weight, bias, labels, lse, d_nll, d_softmax, start, ctx.chunk, ctx.options.softcap
            )
            chunk = slice(start, start + ctx.chunk)
            if need_bias:
                d_bias[chunk] = d_logits.sum(0)
            d_logits = d_logits.to(hidden.dtype)
            if need_hidden:
                d_kept += d_logits @ weight[chunk]
            if need_weight:
                torch.mm(d_logits.T, kept, out=d_weight[chunk])
        d_hidden = None
        if need_hidden:
            d_hidden = torch.zeros_like(hidden)
            d_hidden[rows] = d_kept.to(hidden.dtype)
        return d_hidden, d_weight, d_bias, None, None


def _chunk_logits(hidden, weight, bias, start, chunk, softcap):
    """Logits of entries [start, start + chunk) and, with a softcap, the tanh that they are made of."""
    part = slice(start, start + chunk)
    logits = torch.mm(hidden, weight[part].T).to(accumulation_dtype(hidden.dtype))
    if bias is not None:
        logits += bias[part]
    if softcap is None:
        return logits, None
    tanh = torch.tanh_(logits.div_(softcap))
    return tanh * softcap, tanh


def _chunk_statistics(hidden, weight, bias, labels, start, chunk, softcap):
    """Log-sum-exp over the chunk, and the target's logit where the target lies in it, 0 elsewhere."""
    logits = _chunk_logits(hidden, weight, bias, start, chunk, softcap)[0]
    inside = (labels >= start) & (labels < start + chunk)
    column = (labels - start).clamp(0, logits.shape[1] - 1)
    return logits.logsumexp(-1), logits.gather(-1, column[:, None]).squeeze(-1).where(inside, 0)


def _chunk_gradient(hidden, weight, bias, labels, lse, d_nll, d_softmax, start, chunk, softcap):
    """Gradient by the chunk's logits, before the softcap, in the accumulation dtype."""
    logits, tanh = _chunk_logits(hidden, weight, bias, start, chunk, softcap)
    d_logits = logits.sub_(lse[:, None]).exp_().mul_(d_softmax[:, None])
    inside = ((labels >= start) & (labels < start + chunk)).nonzero().squeeze(-1)
    # Subtracted before rounding to the input dtype: p - 1 is small where the model is confident.
    d_logits[inside, labels[inside] - start] -= d_nll[inside]
    return d_logits if tanh is None else d_logits.mul_(tanh.square_().neg_().add_(1))


def token_losses(hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, options: Options):
    """Same contract as :func:`torchtune_lce.reference.token_losses`."""
    return _ChunkedTokenLosses.apply(hidden, weight, bias, targets, options)
