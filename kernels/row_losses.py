"""From a row's log-sum-exp and target logit to its token's results, where the forward leaves no gradient behind."""

import triton
import triton.language as tl
from torch import Tensor

from torchtune_lce.kernels.launching import launch
from torchtune_lce.kernels.primitives import LOG_2
from torchtune_lce.kernels.tuning import ceil_div


@triton.jit(do_not_specialize=["tokens"])
def _loss_kernel(
    row_total,
    target_logits,
    mean_exponents,
    mean_logits,
    rows,
    targets,
    count,
    losses,
    peaks,
    log_totals,
    entropies,
    means,
    tokens,
    entries_total,
    logit_scale,
    BLOCK: tl.constexpr,
):
    """Results at each place's row, 0 past the count, where row_total becomes 0 too; entropies and means unless None."""
    place = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = place < tokens
    used = place < tl.minimum(tl.load(count), tokens)
    row = tl.load(rows + place, mask=inside, other=0)
    label = tl.load(targets + row, mask=used, other=0)
    target = tl.load(target_logits + place, mask=used, other=0.0)
    peak = tl.load(row_total + 2 * place, mask=used, other=0.0)
    log_sum = tl.load(row_total + 2 * place + 1, mask=used, other=0.0)
    # With it the softmax of a token whose target names no entry, and so all gradients that it is in.
    log_sum = tl.where((label >= 0) & (label < entries_total), log_sum, float("nan"))
    # The peak and the target's logit first: their difference is exact where it is small. A sum that the target is
    # nearly alone in may round to just below it, and a loss is never negative.
    loss = logit_scale * (peak - target) + log_sum
    loss = tl.where(loss < 0, 0.0, loss)
    finite = tl.where(tl.abs(peak) < float("inf"), logit_scale * peak, 0.0)
    # An infinity is in the sum too, and so is a NaN.
    rest = logit_scale * target - finite
    log_total = tl.where((log_sum >= rest) | (log_sum != log_sum), log_sum, rest)
    tl.store(losses + row, loss, mask=inside)
    tl.store(peaks + row, finite, mask=inside)
    tl.store(log_totals + row, log_total, mask=inside)
    if entropies is not None:
        entropy = log_sum - LOG_2 * tl.load(mean_exponents + place, mask=used, other=0.0)
        tl.store(entropies + row, tl.where(used & ((entropy < 0) == 0), entropy, 0.0), mask=inside)
    if means is not None:
        mean = logit_scale * tl.load(mean_logits + place, mask=used, other=0.0) - finite
        tl.store(means + row, tl.where(used, mean, 0.0), mask=inside)
    tl.store(row_total + 2 * place, peak, mask=inside)
    tl.store(row_total + 2 * place + 1, log_sum, mask=inside)


def row_losses(
    row_total: Tensor,  # [N, 2] float32: peak and log of the sum measured from it, in the order of ``rows``
    target_logits: Tensor,  # [N] float32, in that order
    mean_exponents: Tensor | None,  # [N] float32, in that order: see lse_and_target_logit
    mean_logits: Tensor | None,  # likewise
    rows: Tensor,  # [N] int64, those in use first
    targets: Tensor,  # [N], as they came
    count: Tensor,  # [1] int32, rows in use, on the device
    vocabulary: int,
    logit_scale: float,
) -> list[Tensor]:
    """nll, peak and log_total, [N] float32, 0 where not in use; entropy, or [0]; mean logit less the peak, or [0].

    One launch. Where a target names no entry, NaN in nll, log_total and the log of the sum in ``row_total``.
    """
    tokens = rows.numel()
    with_entropy, with_mean = mean_exponents is not None, mean_logits is not None
    sizes = (tokens, tokens, tokens, tokens * with_entropy, tokens * with_mean)
    results = [target_logits.new_empty(size) for size in sizes]
    if tokens:
        launch(
            _loss_kernel,
            (ceil_div(tokens, 256),),
            (
                row_total,
                target_logits,
                mean_exponents,
                mean_logits,
                rows,
                targets,
                count,
                *results[:3],
                results[3] if with_entropy else None,
                results[4] if with_mean else None,
                tokens,
                vocabulary,
                logit_scale,
            ),
            BLOCK=256,
        )
    return results
