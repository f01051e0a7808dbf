"""The mean of each token's logits, over the whole vocabulary, without the logits: a product with the weight's mean row.

    mean of (h W^T + b + low up^T) * scale = h . mean of scale * W + mean of scale * b + low . mean of scale * up

in float64 all the way, and with gradients; in float32 and without any where the device has no float64. Costs
O(N D + V D). Capped logits have no such mean.
"""

from __future__ import annotations  # torch 2.8 compiles nested functions, but not `Tensor | None`

import torch
from torch import Tensor

from torchtune_lce.inputs.autocast import without_autocast
from torchtune_lce.inputs.call import Call
from torchtune_lce.inputs.dtypes import widest

# Elements of a matrix that are widened at a time to add them up: within a processor's cache, and 32 MiB of a card,
# where a sum in float64 takes a copy.
_ELEMENTS_ON_CPU, _ELEMENTS_ON_CARD = 2**16, 2**22


def mean_logits(call: Call, valid: Tensor) -> Tensor:
    """[N] of the widest dtype, 0 where not ``valid``, [N]. Of the logits before a softcap, ``logit_scale`` in them.

    With a shard the mean over this rank's rows.
    """
    hidden, weight, bias, low, up, scale = call.operands
    workspace_mib = call.options.workspace_mib
    means = _products_with_mean_row(hidden, weight, scale, valid, workspace_mib)
    if bias is not None:
        scaled = bias if scale is None else bias.to(means.dtype) * scale
        means = means + scaled.mean(dtype=means.dtype).where(valid, 0)
    if low is not None:
        means = means + _products_with_mean_row(low, up, scale, valid, workspace_mib)
    return means if call.options.logit_scale == 1 else means * call.options.logit_scale


def _products_with_mean_row(
    hidden: Tensor, weight: Tensor, scale: Tensor | None, valid: Tensor, workspace_mib: int
) -> Tensor:
    row = torch.ops.torchtune_lce.row_sum(weight, scale, workspace_mib) / weight.shape[0]
    return torch.ops.torchtune_lce.row_products(hidden, row, valid, workspace_mib)


# Custom operators: a compiler would unroll the pieces, for the number of tokens that it sees.
torch.library.define("torchtune_lce::row_sum", "(Tensor matrix, Tensor? scale, int workspace_mib) -> Tensor row")


@torch.library.impl("torchtune_lce::row_sum", "default")
@without_autocast
def _row_sum(matrix, scale, workspace_mib):
    """[V, D], each row times its scale [V] if there are any, to [D] of the widest dtype."""
    dtype = widest(matrix.device)
    if scale is not None:
        parts = (part.to(dtype) * factors[:, None] for part, factors in _pieces(workspace_mib, matrix, scale))
        return torch.stack([part.sum(0) for part in parts]).sum(0)
    elements = _ELEMENTS_ON_CPU if matrix.device.type == "cpu" else _ELEMENTS_ON_CARD
    rows = max(elements // matrix.shape[1], 1)
    return torch.stack([part.sum(0, dtype=dtype) for part in matrix.split(rows)]).sum(0)


@torch.library.register_fake("torchtune_lce::row_sum")
def _(matrix, scale, workspace_mib):
    return matrix.new_empty(matrix.shape[1], dtype=widest(matrix.device))


torch.library.define(
    "torchtune_lce::row_sum_backward",
    "(Tensor d_row, Tensor matrix, Tensor scale, int workspace_mib, bool[] needs) -> (Tensor d_matrix, Tensor d_scale)",
)


@torch.library.impl("torchtune_lce::row_sum_backward", "default")
@without_autocast
def _row_sum_backward(d_row, matrix, scale, workspace_mib, needs):
    """Of a scaled one; empty where ``needs`` has no True."""
    need_matrix, need_scale = needs
    d_matrix = torch.empty_like(matrix) if need_matrix else matrix.new_empty(0)
    d_scale = torch.empty_like(scale) if need_scale else scale.new_empty(0)
    if need_matrix:
        for d_part, factors in _pieces(workspace_mib, d_matrix, scale):
            d_part.copy_(factors[:, None] * d_row)
    if need_scale:
        for part, d_factors in _pieces(workspace_mib, matrix, d_scale):
            d_factors.copy_(part.double() @ d_row)
    return d_matrix, d_scale


@torch.library.register_fake("torchtune_lce::row_sum_backward")
def _(d_row, matrix, scale, workspace_mib, needs):
    return tuple(x.new_empty(x.shape if need else 0) for x, need in zip((matrix, scale), needs, strict=True))


def _setup_row_sum(ctx, inputs, output) -> None:
    matrix, scale, ctx.workspace_mib = inputs
    ctx.shape, ctx.dtype = matrix.shape, matrix.dtype
    ctx.save_for_backward(*(() if scale is None else (matrix, scale)))


def _differentiate_row_sum(ctx, d_row):
    if not ctx.saved_tensors:
        return d_row.to(ctx.dtype).expand(ctx.shape), None, None
    needs = list(ctx.needs_input_grad[:2])
    made = torch.ops.torchtune_lce.row_sum_backward(d_row, *ctx.saved_tensors, ctx.workspace_mib, needs)
    return *(gradient if need else None for gradient, need in zip(made, needs, strict=True)), None


def _setup_second_derivative_of_row_sum(ctx, inputs, output) -> None:
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*inputs[:3])


def _second_derivative_of_row_sum(ctx, by_matrix, by_scale):
    """By d_row, matrix and scale, in as much memory as it takes, as that of the products."""
    d_row, matrix, scale = ctx.saved_tensors
    again = torch.zeros_like(d_row)
    d_matrix = d_scale = None
    if by_matrix is not None:
        again = again + scale.double() @ by_matrix.double()
        d_scale = (by_matrix.double() @ d_row).to(scale.dtype)
    if by_scale is not None:
        again = again + by_scale.double() @ matrix.double()
        d_matrix = (by_scale[:, None] * d_row).to(matrix.dtype)
    return again, d_matrix, d_scale, None, None


torch.library.register_autograd("torchtune_lce::row_sum", _differentiate_row_sum, setup_context=_setup_row_sum)
torch.library.register_autograd(
    "torchtune_lce::row_sum_backward",
    _second_derivative_of_row_sum,
    setup_context=_setup_second_derivative_of_row_sum,
)

torch.library.define(
    "torchtune_lce::row_products", "(Tensor hidden, Tensor row, Tensor valid, int workspace_mib) -> Tensor products"
)


@torch.library.impl("torchtune_lce::row_products", "default")
@without_autocast
def _row_products(hidden, row, valid, workspace_mib):
    """[N, D] times [D], which is of the widest dtype as the products are, 0 where not valid.

    Neither pieces nor the number of tokens show in what is left of it once it is rounded.
    """
    parts = [_used(*piece).to(row.dtype) @ row for piece in _pieces(workspace_mib, hidden, valid)]
    # Nothing times what may be NaN would not be nothing.
    return torch.cat(parts).where(valid, 0)


@torch.library.register_fake("torchtune_lce::row_products")
def _(hidden, row, valid, workspace_mib):
    return row.new_empty(hidden.shape[0])


torch.library.define(
    "torchtune_lce::row_products_backward",
    "(Tensor d_products, Tensor hidden, Tensor row, Tensor valid, int workspace_mib, bool[] needs) "
    "-> (Tensor d_hidden, Tensor d_row)",
)


@torch.library.impl("torchtune_lce::row_products_backward", "default")
@without_autocast
def _row_products_backward(d_products, hidden, row, valid, workspace_mib, needs):
    """Empty where ``needs`` has no True."""
    need_hidden, need_row = needs
    d_products = d_products.where(valid, 0)
    d_hidden = torch.empty_like(hidden) if need_hidden else hidden.new_empty(0)
    d_row = torch.zeros_like(row) if need_row else row.new_empty(0)
    if need_hidden:
        for d_part, used, d_piece in _pieces(workspace_mib, d_hidden, valid, d_products):
            d_part.copy_(_used(d_piece[:, None] * row, used))
    if need_row:
        for part, used, d_piece in _pieces(workspace_mib, hidden, valid, d_products):
            d_row += d_piece @ _used(part, used).to(row.dtype)
    return d_hidden, d_row


@torch.library.register_fake("torchtune_lce::row_products_backward")
def _(d_products, hidden, row, valid, workspace_mib, needs):
    return tuple(x.new_empty(x.shape if need else 0) for x, need in zip((hidden, row), needs, strict=True))


def _setup_row_products(ctx, inputs, output) -> None:
    *tensors, ctx.workspace_mib = inputs
    ctx.save_for_backward(*tensors)


def _differentiate_row_products(ctx, d_products):
    needs = list(ctx.needs_input_grad[:2])
    gradients = torch.ops.torchtune_lce.row_products_backward(d_products, *ctx.saved_tensors, ctx.workspace_mib, needs)
    return *(gradient if need else None for gradient, need in zip(gradients, needs, strict=True)), None, None


def _setup_second_derivative(ctx, inputs, output) -> None:
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*inputs[:4])


def _second_derivative(ctx, by_hidden, by_row):
    """By d_products, hidden and row, in as much memory as it takes: what is smoothed has none, and is asked as well."""
    d_products, hidden, row, valid = ctx.saved_tensors
    d_products, hidden = d_products.where(valid, 0), _used(hidden, valid)
    d_hidden = d_row = None
    again = torch.zeros_like(d_products)
    if by_hidden is not None:
        again = again + by_hidden.to(row.dtype) @ row
        d_row = d_products @ by_hidden.to(row.dtype)
    if by_row is not None:
        again = again + hidden.to(row.dtype) @ by_row
        d_hidden = (d_products[:, None] * by_row).to(hidden.dtype)
    return again.where(valid, 0), d_hidden, d_row, None, None, None


torch.library.register_autograd(
    "torchtune_lce::row_products", _differentiate_row_products, setup_context=_setup_row_products
)
torch.library.register_autograd(
    "torchtune_lce::row_products_backward", _second_derivative, setup_context=_setup_second_derivative
)


def _pieces(workspace_mib: int, matrix: Tensor, *others: Tensor):
    """Rows of all of them at a time, of which three copies in float64 are a quarter of the workspace at the most: what
    kernels leave for their backward may fill it.
    """
    rows = max(workspace_mib * 2**18 // (3 * 8 * matrix.shape[1]), 1)
    return zip(*(tensor.split(rows) for tensor in (matrix, *others)), strict=True)


def _used(hidden: Tensor, valid: Tensor) -> Tensor:
    """Zeros where ignored: hidden states may be NaN there, and 0 times NaN is no 0."""
    return hidden.where(valid[:, None], 0)
