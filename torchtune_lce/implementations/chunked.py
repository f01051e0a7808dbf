"""``impl="chunked"``: bounded memory in plain eager PyTorch, for any device and without a compiler.

The vocabulary is walked in chunks. The forward keeps, of the entries beside the target, the largest logit and the sum
of exponentials measured from it; the backward computes each chunk's logits again, so neither direction ever holds more
than one [N, chunk] block of them. Both are custom operators: how many tokens are in use decides their shapes, which a
compiler cannot know.

An adapter (:class:`torchtune_lce.inputs.low_rank.LowRank`) joins chunk by chunk, in the accumulation dtype: its rank is
small.
"""

from functools import partial

import torch
from torch import Tensor

from torchtune_lce.implementations.capabilities import TWICE_DIFFERENTIABLE
from torchtune_lce.inputs.autocast import without_autocast
from torchtune_lce.inputs.call import Call
from torchtune_lce.inputs.dtypes import accumulation_dtype
from torchtune_lce.inputs.losses import Losses
from torchtune_lce.inputs.low_rank import LowRank


def entries_per_chunk(
    tokens: int, vocabulary: int, workspace_mib: int, dtype: torch.dtype, more_blocks: int = 0, copied: int = 0
) -> int:
    """Vocabulary entries whose blocks fit the workspace: two of logits (a softcap or a log-sum-exp takes the second)
    and ``more_blocks`` (one where a scale is used, whose gradient needs them unscaled), beside the last chunk's
    gradient in the inputs' dtype. At least 64, or the products would be slow.

    ``copied``: features of whose copies and sums, as in :func:`tokens_per_piece`, the workspace holds too.
    """
    wide = accumulation_dtype(dtype).itemsize
    left = workspace_mib * 2**20 - tokens * copied * (wide + 2 * dtype.itemsize)
    bytes_per_entry = tokens * ((2 + more_blocks) * wide + dtype.itemsize)
    return min(vocabulary, max(left // max(bytes_per_entry, 1), 64))


def tokens_per_piece(tokens: int, features: int, workspace_mib: int, dtype: torch.dtype, more_blocks: int = 0) -> int:
    """Tokens that are taken at once, in pieces as equal as can be, for the rest of the workspace to hold a chunk.

    Half of it is for what a token takes beside its logits, a copy of its hidden state, the sum of its gradient and a
    chunk's part of that, and half for 64 entries at the least.
    """
    wide = accumulation_dtype(dtype).itemsize
    bytes_per_token = max(features * (wide + 2 * dtype.itemsize), 64 * ((2 + more_blocks) * wide + dtype.itemsize))
    fitting = max(workspace_mib * 2**19 // bytes_per_token, 1)
    return -(-tokens // max(-(-tokens // fitting), 1))


torch.library.define(
    "torchtune_lce::chunked",
    "(Tensor hidden, Tensor weight, Tensor? bias, Tensor? low, Tensor? up, Tensor? scale, Tensor targets, "
    "int ignore_index, float? softcap, int workspace_mib, bool with_means) "
    "-> (Tensor nll, Tensor peak, Tensor log_total, Tensor means)",
)


@torch.library.impl("torchtune_lce::chunked", "default")
@without_autocast
def _forward(hidden, weight, bias, low, up, scale, targets, ignore_index, softcap, workspace_mib, with_means):
    """What :func:`token_losses` returns; ``means`` is empty unless ``with_means``."""
    dtype = accumulation_dtype(hidden.dtype)
    results = [hidden.new_zeros(targets.shape, dtype=dtype) for _ in range(4)]
    if not with_means:
        results[3] = results[3].new_empty(0)
    pieces = in_pieces(hidden, weight, targets, ignore_index, workspace_mib, scale is not None)
    for rows, kept, labels, chunk in pieces:
        low_rank = _low_rank_in_use(low, up, scale, rows, kept)
        values = _forward_piece(kept, weight, bias, low_rank, labels, chunk, softcap, with_means)
        for result, part in zip(results, values, strict=True):
            if part is not None:
                result[rows] = part
    return tuple(results)


def _forward_piece(kept, weight, bias, low_rank, labels, chunk, softcap, with_means):
    """What the operator returns, of the tokens ``kept``; None in place of means that nobody wants."""
    peak = kept.new_full(labels.shape, -torch.inf, dtype=accumulation_dtype(kept.dtype))
    total, target_logit, mean = (torch.zeros_like(peak) for _ in range(3))
    largest = peak  # the target too
    for start in range(0, weight.shape[0], chunk):
        logits = chunk_logits(kept, weight, bias, low_rank, start, chunk, softcap)
        if with_means:
            before, largest = largest, torch.maximum(largest, logits.amax(-1))
            mean -= (_finite(largest) - _finite(before)) * (start / weight.shape[0])
            # Divided first: a sum of least finite numbers is none.
            mean += (logits - _finite(largest)[:, None]).div_(weight.shape[0]).sum(-1)
        target_logit += _take_target_logits(logits, labels, start)
        peak, total = _add_exponentials(peak, total, logits)
        # Before the next chunk is made.
        del logits
    # By how much the others outweigh the target: log((1 - p) / p), from which a confident token's loss loses no digit.
    others = peak - target_logit + total.log()
    nll = torch.logaddexp(others, torch.zeros_like(others)).masked_fill(target_logit == torch.inf, torch.nan)
    largest = torch.maximum(peak, target_logit)
    base = _finite(largest)
    log_total = (total * (peak - base).exp() + (target_logit - base).exp()).log()
    return nll, base, log_total, mean if with_means else None


@torch.library.register_fake("torchtune_lce::chunked")
def _(hidden, weight, bias, low, up, scale, targets, ignore_index, softcap, workspace_mib, with_means):
    dtype = accumulation_dtype(hidden.dtype)
    shapes = targets.shape, targets.shape, targets.shape, targets.shape if with_means else 0
    return tuple(hidden.new_empty(shape, dtype=dtype) for shape in shapes)


torch.library.define(
    "torchtune_lce::chunked_backward",
    "(Tensor? d_nll, Tensor? d_lse, Tensor? d_means, Tensor hidden, Tensor weight, Tensor? bias, Tensor? low, "
    "Tensor? up, Tensor? scale, Tensor targets, Tensor nll, Tensor peak, Tensor log_total, int ignore_index, "
    "float? softcap, int workspace_mib, bool[] needs) "
    "-> (Tensor d_hidden, Tensor d_weight, Tensor d_bias, Tensor d_low, Tensor d_up, Tensor d_scale)",
)


@torch.library.impl("torchtune_lce::chunked_backward", "default")
@without_autocast
def _backward(
    d_nll,
    d_lse,
    d_means,
    hidden,
    weight,
    bias,
    low,
    up,
    scale,
    targets,
    nll,
    peak,
    log_total,
    ignore_index,
    softcap,
    workspace_mib,
    needs,
):
    """Gradients by hidden, weight, bias, low, up and scale, empty where ``needs`` has no True."""
    nll, peak, log_total = nll.view(-1), peak.view(-1), log_total.view(-1)
    d_nll = torch.zeros_like(nll) if d_nll is None else d_nll
    # Of the target p - 1 and p: neither is the difference of two numbers near 1.
    d_target, d_softmax = d_nll * torch.expm1(-nll), d_nll
    if d_lse is not None:
        d_target, d_softmax = d_target + d_lse * torch.exp(-nll), d_nll + d_lse
    factor = d_softmax * torch.exp(-log_total)

    def by_logits(logits, start, rows, labels):
        d_logits = logits.sub_(peak[rows, None]).exp_().mul_(factor[rows, None])
        inside = ((labels >= start) & (labels < start + logits.shape[1])).nonzero().squeeze(-1)
        d_logits[inside, labels[inside] - start] = d_target[rows[inside]]
        return d_logits if d_means is None else d_logits.add_(d_means[rows, None] / weight.shape[0])

    operands = hidden, weight, bias, low, up, scale
    return walk_gradients(*operands, targets, ignore_index, workspace_mib, scale is not None, softcap, needs, by_logits)


def walk_gradients(
    hidden,
    weight,
    bias,
    low,
    up,
    scale,
    targets,
    ignore_index,
    workspace_mib,
    more_blocks,
    softcap,
    needs,
    by_logits,
):
    """Gradients by the six operands, empty where ``needs`` has no True, from those by the logits of a chunk at a time.

    ``by_logits(logits, start, rows, labels)`` makes these of the chunk's logits, of the tokens ``rows`` and the entries
    from ``start`` on; in their place if it can, both in the accumulation dtype.
    """
    need_hidden, need_weight, need_bias, need_low, need_up, need_scale = needs
    wide = accumulation_dtype(hidden.dtype)
    d_hidden = None
    d_weight = weight.new_empty(weight.shape if need_weight else 0)
    d_bias = hidden.new_empty(bias.shape if need_bias else 0)
    d_low = hidden.new_zeros(low.shape if need_low else 0)
    d_up = hidden.new_empty(0) if not need_up else torch.empty_like(up)
    d_scale = hidden.new_empty(0) if not need_scale else torch.empty_like(scale)
    # What is summed over tokens is summed over all at once: in pieces the logits would be computed another time.
    whole = need_weight or need_bias or need_up or need_scale
    for rows, kept, labels, chunk in in_pieces(
        hidden, weight, targets, ignore_index, workspace_mib, more_blocks, whole
    ):
        low_rank = _low_rank_in_use(low, up, scale, rows, kept)
        d_kept = torch.zeros_like(kept, dtype=wide) if need_hidden else None
        d_kept_low = torch.zeros_like(low_rank.low) if need_low else None
        by_chunk = partial(by_logits, rows=rows, labels=labels)
        for start in range(0, weight.shape[0], chunk):
            d_logits, d_scale_part = _chunk_gradient(kept, weight, bias, low_rank, start, chunk, softcap, by_chunk)
            part = slice(start, start + chunk)
            if need_scale:
                d_scale[part] = d_scale_part
            if need_low:
                d_kept_low += d_logits @ up[part].to(wide)
            if need_up:
                d_up[part] = d_logits.T @ low_rank.low
            if need_bias:
                d_bias[part] = d_logits.sum(0)
            d_logits = d_logits.to(hidden.dtype)
            if need_hidden:
                d_kept += d_logits @ weight[part]
            if need_weight:
                torch.mm(d_logits.T, kept, out=d_weight[part])
            # Before the next chunk is made.
            del d_logits
        if need_hidden:
            # Not before: the products have taken memory of their own.
            d_hidden = torch.zeros_like(hidden) if d_hidden is None else d_hidden
            d_hidden[rows] = d_kept.to(hidden.dtype)
        if need_low:
            d_low[rows] = d_kept_low.to(d_low.dtype)
    if d_hidden is None:
        d_hidden = hidden.new_zeros(hidden.shape if need_hidden else 0)
    return d_hidden, d_weight, d_bias, d_low, d_up, d_scale


@torch.library.register_fake("torchtune_lce::chunked_backward")
def _(d_nll, d_lse, d_means, *arguments):
    operands, needs = arguments[:6], arguments[-1]
    hidden = operands[0]
    return tuple(x.new_empty(x.shape) if need else hidden.new_empty(0) for need, x in zip(needs, operands, strict=True))


def _setup_context(ctx, inputs, output) -> None:
    *tensors, ignore_index, softcap, workspace_mib, ctx.with_means = inputs
    ctx.set_materialize_grads(False)
    nll, peak, log_total, _ = output
    ctx.save_for_backward(*tensors, nll, peak, log_total)
    ctx.settings = ignore_index, softcap, workspace_mib


def _differentiate(ctx, d_nll, _, d_lse, d_means):
    needs = ctx.needs_input_grad[:6]
    d_results = d_nll, d_lse, d_means if ctx.with_means else None
    gradients = torch.ops.torchtune_lce.chunked_backward(*d_results, *ctx.saved_tensors, *ctx.settings, needs)
    return *(gradient if need else None for gradient, need in zip(gradients, needs, strict=True)), *[None] * 5


def _refuse_second_derivative(ctx, *_):
    raise RuntimeError(f"impl='chunked' has no second derivative (create_graph=True); set {TWICE_DIFFERENTIABLE}")


torch.library.register_autograd("torchtune_lce::chunked", _differentiate, setup_context=_setup_context)
torch.library.register_autograd("torchtune_lce::chunked_backward", _refuse_second_derivative)


def in_pieces(hidden, weight, targets, ignore_index, workspace_mib, more_blocks, whole=False):
    """Of the tokens that are not ignored: places, hidden states and labels of a piece, and the entries of its chunks.

    ``whole``: all are one piece, whose copies come to what the workspace holds.
    """
    everything = (targets != ignore_index).nonzero().squeeze(-1)
    (vocabulary, features), dtype = weight.shape, hidden.dtype
    tokens = everything.numel()
    if not whole:
        tokens = tokens_per_piece(tokens, features, workspace_mib, dtype, more_blocks)
    for rows in everything.split(max(tokens, 1)):
        # Of all tokens no copy is needed.
        kept = hidden if rows.numel() == targets.numel() else hidden[rows]
        copied = 0 if whole else features
        chunk = entries_per_chunk(rows.numel(), vocabulary, workspace_mib, dtype, more_blocks, copied)
        yield rows, kept, targets[rows].long(), chunk


def _low_rank_in_use(low, up, scale, rows: Tensor, kept: Tensor) -> LowRank | None:
    """``low`` of the tokens in use alone, in the accumulation dtype."""
    if low is None:
        return None
    return LowRank(low[rows].to(accumulation_dtype(kept.dtype)), up, scale)


def chunk_logits(hidden, weight, bias, low_rank, start, chunk, softcap):
    """Logits of entries [start, start + chunk), in the accumulation dtype, in which ``low`` must be."""
    logits = _unscaled_logits(hidden, weight, bias, low_rank, start, chunk)
    if low_rank is not None and low_rank.scale is not None:
        logits *= low_rank.scale[start : start + chunk]
    return _capped(logits, softcap)[0]


def _unscaled_logits(hidden, weight, bias, low_rank, start, chunk):
    """Before the scale and the softcap, in the accumulation dtype."""
    part = slice(start, start + chunk)
    logits = torch.mm(hidden, weight[part].T).to(accumulation_dtype(hidden.dtype))
    if bias is not None:
        logits += bias[part]
    if low_rank is not None:
        logits.addmm_(low_rank.low, low_rank.up[part].T.to(logits.dtype))
    return logits


def _capped(logits, softcap):
    """In place, as far as it goes; the tanh is None without a softcap."""
    if softcap is None:
        return logits, None
    tanh = torch.tanh_(logits.div_(softcap))
    return tanh * softcap, tanh


def _take_target_logits(logits, labels, start):
    """The target's logit where it lies in the chunk that begins at ``start``, 0 elsewhere; leaves -inf in its place."""
    inside = (labels >= start) & (labels < start + logits.shape[1])
    column = (labels - start).clamp(0, logits.shape[1] - 1)[:, None]
    there = logits.gather(-1, column).squeeze(-1)
    logits.scatter_(-1, column, there.masked_fill(inside, -torch.inf)[:, None])
    return there.where(inside, 0)


def _add_exponentials(peak: Tensor, total: Tensor, logits: Tensor) -> tuple[Tensor, Tensor]:
    """The largest logit, and the sum of exponentials measured from it, with a chunk's, which this overwrites."""
    higher = torch.maximum(peak, logits.amax(-1))
    # Where an infinity is the largest, it comes back out of exp.
    base = _finite(higher)
    return higher, total * (peak - base).exp() + logits.sub_(base[:, None]).exp_().sum(-1)


def _finite(largest: Tensor) -> Tensor:
    """Zero in place of an infinity, which stays in the logits that it is not subtracted from."""
    return largest.where(largest.isfinite(), 0)


def _chunk_gradient(hidden, weight, bias, low_rank, start, chunk, softcap, by_logits):
    """Gradient by the chunk's logits, before scale and softcap, and by the scale, or None; both accumulated wide."""
    unscaled = _unscaled_logits(hidden, weight, bias, low_rank, start, chunk)
    scale = None if low_rank is None or low_rank.scale is None else low_rank.scale[start : start + chunk]
    logits, tanh = _capped(unscaled if scale is None else unscaled * scale, softcap)
    d_logits = by_logits(logits, start)
    if tanh is not None:
        d_logits.mul_(tanh.square_().neg_().add_(1))
    if scale is None:
        return d_logits, None
    d_scale = unscaled.mul_(d_logits).sum(0)
    return d_logits.mul_(scale), d_scale


def token_losses(call: Call) -> Losses:
    """By the operator."""
    options = call.options
    nll, peak, log_total, means = torch.ops.torchtune_lce.chunked(
        *call.operands,
        call.labels,
        options.ignore_index,
        options.softcap,
        options.workspace_mib,
        bool(options.label_smoothing),
    )
    return Losses(nll, peak.detach(), log_total, means if options.label_smoothing else None)
