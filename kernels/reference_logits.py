"""One reference logit a row, before any pass over the vocabulary: the logit of the row's own target.

Exponentials measured from it need no running maximum: their sum over the other entries is (1 - p) / p of the target, so
neither a confident token nor a logit that all entries share costs digits. A target that is masked, or far below the
others, would make that sum overflow. So a sample of the vocabulary is looked at first, and a row's reference is at
least its largest logit less ``FURTHEST_BELOW`` powers of two. Rows that overflow all the same are done again, see
overflow.py.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from torchtune_lce.kernels.launching import launch
from torchtune_lce.kernels.operands import Operands
from torchtune_lce.kernels.primitives import multiply_add, softcapped
from torchtune_lce.kernels.tuning import Config, ceil_div

# Entries spread over the vocabulary.
SAMPLED_ENTRIES = tl.constexpr(256)
# With it the sums of the softmax's other entries stay far below overflow.OVERFLOWS.
FURTHEST_BELOW = tl.constexpr(64.0)


@triton.jit(do_not_specialize=["tokens"])
def _reference_kernel(
    hidden,
    weight,
    bias,
    targets,
    rows,
    count,
    states,
    target_logits,
    references,
    floors,
    tokens,
    entries_total,
    features,
    hidden_stride,
    weight_stride,
    softcap,
    log2_scale,
    HAS_BIAS: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    TOKENS: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Of TOKENS places: their hidden states in order, zero past the count, targets' logits, references and floors.

    The target's logit is the diagonal of hidden times the targets' weight rows, in the steps over D of the other
    kernels: where accumulation rounds towards zero, another order would move every loss the same way. It is NaN where a
    target names no entry.
    """
    place = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    inside = place < tokens
    used = place < tl.load(count)
    row = tl.load(rows + place, mask=used, other=0)
    label = tl.load(targets + row, mask=used, other=0)
    names_entry = (label >= 0) & (label < entries_total)
    label = tl.where(names_entry, label, 0)
    number = tl.arange(0, SAMPLED_ENTRIES).to(tl.int64)
    sampled = (number * entries_total // SAMPLED_ENTRIES).to(tl.int32)
    # Of a smaller vocabulary an entry is there several times.
    is_first = (number == 0) | (sampled != (tl.maximum(number - 1, 0) * entries_total // SAMPLED_ENTRIES).to(tl.int32))
    depth = tl.arange(0, BLOCK_D)
    hidden_rows = hidden + row[:, None] * hidden_stride
    target_rows = weight + label.to(tl.int64)[None, :] * weight_stride
    sampled_rows = weight + sampled.to(tl.int64)[None, :] * weight_stride
    own_states = states + place.to(tl.int64)[:, None] * features
    for start in range(0, features, BLOCK_D):
        d = start + depth
        exists = d < features
        a = tl.load(hidden_rows + d[None, :], mask=used[:, None] & exists[None, :], other=0.0)
        tl.store(own_states + d[None, :], a, mask=inside[:, None] & exists[None, :])
    # Loops of their own: what a product reads must have no other use in its loop, see tests/house/test_kernel_loops.py.
    products = tl.zeros((TOKENS, TOKENS), tl.float32)
    for start in range(0, features, BLOCK_D):
        d = start + depth
        exists = d < features
        a = tl.load(hidden_rows + d[None, :], mask=used[:, None] & exists[None, :], other=0.0)
        b = tl.load(target_rows + d[:, None], mask=used[None, :] & exists[:, None], other=0.0)
        products = tl.dot(a, b, products, input_precision=PRECISION)
    others = tl.zeros((TOKENS, SAMPLED_ENTRIES), tl.float32)
    for start in range(0, features, BLOCK_D):
        d = start + depth
        exists = d < features
        a = tl.load(hidden_rows + d[None, :], mask=used[:, None] & exists[None, :], other=0.0)
        b = tl.load(sampled_rows + d[:, None], mask=exists[:, None], other=0.0)
        others = tl.dot(a, b, others, input_precision=PRECISION)
    own = tl.arange(0, TOKENS)[:, None] == tl.arange(0, TOKENS)[None, :]
    target = tl.sum(tl.where(own, products, 0.0), 1)
    if HAS_BIAS:
        target += tl.load(bias + label, mask=used, other=0.0).to(tl.float32)
        others += tl.load(bias + sampled).to(tl.float32)[None, :]
    if HAS_SOFTCAP:
        target = softcapped(target, softcap)
        others = softcapped(others, softcap)
    # From here on it spoils all results of its token, and of no other.
    target = tl.where(names_entry, target, float("nan"))
    reference = tl.maximum(target, tl.max(others, 1) - FURTHEST_BELOW / log2_scale)
    tl.store(target_logits + place, target, mask=inside)
    tl.store(references + place, reference, mask=inside)
    # The target's own exponential, and those of the sample's other entries.
    offset = reference * -log2_scale
    powers = tl.exp2(multiply_add(others, log2_scale, offset[:, None]))
    floor = tl.exp2(multiply_add(target, log2_scale, offset))
    counts = is_first[None, :] & (sampled[None, :] != label[:, None])
    floor += tl.sum(tl.where(counts, powers, 0.0), 1)
    tl.store(floors + place, floor, mask=inside)


def reference_logits(
    operands: Operands,  # without an adapter
    targets: Tensor,  # [N], as they came
    rows: Tensor,  # [N] int64, those in use first
    count: Tensor,  # [1] int32, rows in use, on the device
    states: Tensor,  # [N, D], filled with the hidden states of ``rows``, zero past the count
    config: Config,
) -> Tensor:  # [3, N] float32: target logits, references, and lower bounds of sums; of no meaning past the count
    """One launch; reads nothing back to the host."""
    hidden, weight = operands.hidden, operands.weight
    tokens, features = states.shape
    logits = states.new_empty((3, tokens), dtype=torch.float32)
    launch(
        _reference_kernel,
        (ceil_div(tokens, config.sample),),
        (
            hidden,
            weight,
            operands.bias,
            targets,
            rows,
            count,
            states,
            *logits.unbind(),
            tokens,
            weight.shape[0],
            features,
            hidden.stride(0),
            weight.stride(0),
            operands.softcap or 1.0,
            operands.log2_scale,
        ),
        HAS_BIAS=operands.bias is not None,
        HAS_SOFTCAP=operands.softcap is not None,
        TOKENS=config.sample,
        BLOCK_D=config.block_d,
        PRECISION=config.precision,
        num_warps=config.warps,
        num_stages=config.forward_stages,
    )
    return logits
