"""``impl="chunked"``: bounded memory in plain eager PyTorch, for any device and without a compiler.

The vocabulary is walked in chunks. The forward keeps a running log-sum-exp; the backward computes each chunk's logits
again, so neither direction ever holds more than one [N, chunk] block of them.
"""

import torch
from torch import Tensor

from torchtune_lce.options import Options
from torchtune_lce.reference import accumulation_dtype


def entries_per_chunk(tokens: int, vocabulary: int, workspace_mib: int) -> int:
    """Vocabulary entries whose logits and softmax (8 bytes a pair in float32, plus one copy in the input dtype) fit."""
    fitting = workspace_mib * 2**20 // (12 * max(tokens, 1))
    return min(vocabulary, max(fitting, 64))


class _ChunkedTokenLosses(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, bias, targets, options: Options):
        dtype = accumulation_dtype(hidden.dtype)
        rows = (targets != options.ignore_index).nonzero().squeeze(-1)
        kept = hidden if rows.numel() == targets.numel() else hidden[rows]
        labels = targets[rows].long()
        lse = hidden.new_full(rows.shape, -torch.inf, dtype=dtype)
        target_logit = hidden.new_zeros(rows.shape, dtype=dtype)
        chunk = entries_per_chunk(rows.numel(), weight.shape[0], options.workspace_mib)
        for start in range(0, weight.shape[0], chunk):
            logits, _ = _chunk_logits(kept, weight, bias, start, chunk, options.softcap)
            lse = torch.logaddexp(lse, logits.logsumexp(-1))
            inside = (labels >= start) & (labels < start + chunk)
            column = (labels - start).clamp(0, logits.shape[1] - 1)
            target_logit = logits.gather(-1, column[:, None]).squeeze(-1).where(inside, target_logit)
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
            logits, slope = _chunk_logits(kept, weight, bias, start, ctx.chunk, ctx.options.softcap)
            d_logits = logits.sub_(lse[:, None]).exp_().mul_(d_softmax[:, None])
            inside = ((labels >= start) & (labels < start + ctx.chunk)).nonzero().squeeze(-1)
            # Subtracted before rounding to the input dtype: p - 1 is small where the model is confident.
            d_logits[inside, labels[inside] - start] -= d_nll[inside]
            if slope is not None:
                d_logits.mul_(slope)
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
    """Logits of entries [start, start + chunk) and, with a softcap, their derivative by the uncapped logits."""
    part = slice(start, start + chunk)
    logits = torch.mm(hidden, weight[part].T).to(accumulation_dtype(hidden.dtype))
    if bias is not None:
        logits += bias[part]
    if softcap is None:
        return logits, None
    capped = torch.tanh_(logits.div_(softcap))
    return capped * softcap, 1 - capped.square()


def token_losses(hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, options: Options):
    """Same contract as :func:`torchtune_lce.reference.token_losses`."""
    return _ChunkedTokenLosses.apply(hidden, weight, bias, targets, options)
