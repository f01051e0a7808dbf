"""Hidden states times what their row's softmax is multiplied by in the gradients by weight and bias.

With E, T, S', the softcap's slope c and the upstream gradients g and l as in row_gradients.py, the gradient by a row's
logit is a E c with a = (g + l) / (T + S'), but c_t (l T - g S') / (T + S') at its target. So the weight's gradient is a
product of E c and a times the hidden states, if the target's cell of E holds its own number over a. Where g + l is 0
that is none: then a is as good as 0 beside it.
"""

import triton
import triton.language as tl
from torch import Tensor

from torchtune_lce.kernels.launching import launch
from torchtune_lce.kernels.operands import ForEntries
from torchtune_lce.kernels.primitives import rounded_to_tf32
from torchtune_lce.kernels.tuning import ceil_div, rows_and_columns

# What other entries then get of a row is below a rounding of what its target does, and the target's cell within range.
NEXT_TO_NOTHING = tl.constexpr(2.0**-24)


@triton.jit(do_not_specialize=["tokens", "d_loss_stride", "d_log_sum_stride"])
def _scale_kernel(
    hidden,
    rows,
    count,
    shares,
    d_losses,
    d_log_sums,
    scaled,
    factors,
    cells,
    tokens,
    features,
    hidden_stride,
    d_loss_stride,
    d_log_sum_stride,
    HAS_D_LSE: tl.constexpr,
    FOR_TF32: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """At each place a times its hidden state, a, and its target's cell; 0 past the count."""
    place = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    inside = place < tokens
    used = place < tl.load(count)
    row = tl.load(rows + place, mask=inside, other=0)
    of_loss = tl.load(d_losses + row * d_loss_stride, mask=used, other=0.0)
    of_log_sum = tl.zeros((ROWS,), tl.float32)
    if HAS_D_LSE:
        of_log_sum = tl.load(d_log_sums + row * d_log_sum_stride, mask=used, other=0.0)
    both = of_loss + of_log_sum
    both = tl.where(both == 0, of_log_sum * NEXT_TO_NOTHING, both)
    own = shares + place
    inverse = tl.load(own + 2 * tokens, mask=used, other=0.0)
    own_share = tl.load(own + 3 * tokens, mask=used, other=0.0)
    other_share = tl.load(own + 4 * tokens, mask=used, other=0.0)
    factor = both * inverse
    at_target = of_log_sum * own_share - of_loss * other_share
    cell = tl.where(factor == 0, at_target, at_target / tl.where(factor == 0, 1.0, factor))
    write = place < tl.where(tl.program_id(1) == 0, tokens, 0)
    if FOR_TF32:
        cell = rounded_to_tf32(cell)
    tl.store(factors + place, tl.where(used, factor, 0.0), mask=write)
    tl.store(cells + place, tl.where(used, cell, 0.0), mask=write)
    d = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    exists = (d < features)[None, :]
    h = tl.load(hidden + row[:, None] * hidden_stride + d[None, :], mask=used[:, None] & exists, other=0.0)
    value = tl.where(used[:, None], h.to(tl.float32) * factor[:, None], 0.0)
    if FOR_TF32:
        value = rounded_to_tf32(value)
    at = scaled + place.to(tl.int64)[:, None] * features + d[None, :]
    tl.store(at, value.to(scaled.dtype.element_ty), mask=inside[:, None] & exists)


def scale_states(
    hidden: Tensor,  # [N, D]
    rows: Tensor,  # [N] int64
    count: Tensor,  # [1] int32
    shares: Tensor,  # [5, N] float32: see Walk
    d_losses: Tensor,  # [N] float32, in the order of hidden
    d_log_sums: Tensor | None,  # [N] float32
    scaled: Tensor,  # [N, D], filled
) -> ForEntries:
    """One launch."""
    tokens, features = hidden.shape
    factors, cells = shares.new_empty((2, tokens))
    block = rows_and_columns(hidden.device)
    launch(
        _scale_kernel,
        (ceil_div(tokens, block["ROWS"]), ceil_div(features, block["COLUMNS"])),
        (
            hidden,
            rows,
            count,
            shares,
            d_losses,
            d_log_sums,
            scaled,
            factors,
            cells,
            tokens,
            features,
            hidden.stride(0),
            d_losses.stride(0),
            0 if d_log_sums is None else d_log_sums.stride(0),
        ),
        HAS_D_LSE=d_log_sums is not None,
        FOR_TF32=scaled.element_size() > hidden.element_size(),
        **block,
        num_warps=4,
    )
    return ForEntries(scaled, factors, cells)
