"""Device functions that several kernels share. No libdevice calls: they fail in Triton's interpreter."""

import triton
import triton.language as tl

from torchtune_lce.kernels.operands import OperandsArgument
from torchtune_lce.kernels.tuning import is_interpreted

IS_INTERPRETED = tl.constexpr(is_interpreted())
LOG2_E = tl.constexpr(1.4426950408889634)
LOG_2 = tl.constexpr(0.6931471805599453)
# Entries whose bits a word has.
WORD_BITS = tl.constexpr(32)
# Trained models leave a few hundredths of the softmax below finfo(bfloat16).eps / 32; a flat softmax leaves all of it.
DROPPED_MASS_LIMIT = tl.constexpr(0.25)
# Depth of products over an adapter's rank, the least that tl.dot takes: addresses of deeper ones spill.
RANK_DEPTH = tl.constexpr(16)
# Of loops over products with an adapter's matrix, which are not pipelined: by Triton 3.6, on sm90 in 16 bits, sums over
# tiles as narrow as a small rank came out wrong, and other ones in each run; see docs/kernel-notes.md.
ADAPTER_STAGES = tl.constexpr(1)


@triton.jit
def softcapped(logits, softcap):
    """softcap * tanh(logits / softcap), with tanh(x) = 2 sigmoid(2x) - 1, or its series where that difference is small.

    Up to x^9; what follows is below 1e-8 of it for |x| < 1/4.
    """
    x = logits / softcap
    y = x * x
    series = logits * (1 + y * (-1 / 3 + y * (2 / 15 + y * (-17 / 315 + y * (62 / 2835)))))
    return tl.where(y < 1 / 16, series, softcap * (2 * tl.sigmoid(2 * x) - 1))


@triton.jit
def multiply_add(a, b, c):
    """a * b + c in float32, rounded once. The interpreter of older Tritons would round the product too."""
    if IS_INTERPRETED:
        return (a.to(tl.float64) * b + c).to(tl.float32)
    else:
        return tl.fma(a, b, c)


@triton.jit
def times_log2(x):
    """x log2(x) for x >= 0, and 0 for what is not normal. By the card's own instruction: libdevice's takes thirty."""
    if IS_INTERPRETED:
        logarithm = tl.log2(x)
    else:
        logarithm = tl.inline_asm_elementwise(
            "lg2.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1
        )
    # A NaN stays one.
    return tl.where(x < 1.1754943508222875e-38, 0.0, x * logarithm)


@triton.jit
def log_one_plus(x):
    """log(1 + x) for x >= 0 to 2e-7 of it, however small x is: 1 + x would lose what makes a confident loss."""
    s = x / (2 + x)
    y = s * s
    series = 1 / 13
    series = series * y + 1 / 11
    series = series * y + 1 / 9
    series = series * y + 1 / 7
    series = series * y + 1 / 5
    series = series * y + 1 / 3
    return tl.where(x < 1, 2 * s * (series * y + 1), tl.log(1 + x))


@triton.jit
def rounded_to_tf32(values):
    """Float32 values to the 11 bits that tensor cores look at: those cut the rest off, always towards zero."""
    bits = values.to(tl.int32, bitcast=True)
    rounded = ((bits + 0x1000) & -0x2000).to(tl.float32, bitcast=True)
    # The bits of a NaN may be all ones.
    return tl.where(values == values, rounded, values)


@triton.jit
def softcap_slope(capped, softcap):
    """Derivative of :func:`softcapped`, from its result."""
    share = capped / softcap
    return 1 - share * share


@triton.jit
def add_low_rank(logits, operands: OperandsArgument, low_rows, low_mask, up_rows, up_mask, PRECISION: tl.constexpr):
    """logits + low[low_rows] @ up[up_rows]^T, an adapter's part: before the products over D, as all do."""
    for start in tl.range(0, operands.rank, RANK_DEPTH, num_stages=ADAPTER_STAGES):
        r = start + tl.arange(0, RANK_DEPTH)
        exists = r < operands.rank
        a_at = operands.low + low_rows.to(tl.int64)[:, None] * operands.low_stride + r[None, :]
        b_at = operands.up + up_rows.to(tl.int64)[None, :] * operands.up_stride + r[:, None]
        a = tl.load(a_at, mask=low_mask[:, None] & exists[None, :], other=0.0)
        b = tl.load(b_at, mask=up_mask[None, :] & exists[:, None], other=0.0)
        logits = tl.dot(a, b, logits, input_precision=PRECISION)
    return logits


@triton.jit
def bits_set(word):
    """How many bits of each int32 are."""
    word = word - ((word >> 1) & 0x55555555)
    word = (word & 0x33333333) + ((word >> 2) & 0x33333333)
    word = (word + (word >> 4)) & 0x0F0F0F0F
    word = word + (word >> 8)
    return (word + (word >> 16)) & 0x3F


@triton.jit
def bitwise_or(a, b):
    return a | b


@triton.jit
def tile_coordinates(index, row_blocks, columns, GROUP: tl.constexpr):
    """(row block, column) of the index-th tile, walking GROUP row blocks down before one column across (for L2)."""
    in_group = GROUP * columns
    first = index // in_group * GROUP
    height = tl.minimum(row_blocks - first, GROUP)
    return first + index % in_group % height, index % in_group // height


@triton.jit
def load_halves(high, low, mask):
    """The float32 values that :func:`store_halves` stored, 0 where masked off."""
    upper = tl.load(high, mask=mask, other=0).to(tl.int32) << 16
    lower = tl.load(low, mask=mask, other=0).to(tl.int32) & 0xFFFF
    return (upper | lower).to(tl.float32, bitcast=True)


@triton.jit
def store_halves(high, low, values, mask):
    """Stores the bits of float32 values as two int16: an output of 16 bits then holds half of its own running sums."""
    bits = values.to(tl.int32, bitcast=True)
    tl.store(high, (bits >> 16).to(tl.int16), mask=mask)
    tl.store(low, bits.to(tl.int16), mask=mask)


@triton.jit
def grid_barrier(arrivals, target, COPY_ENGINE: tl.constexpr):
    """Waits until `target` programs have arrived in all; every program of the grid must be resident.

    What any program wrote before is visible to all of them after; with COPY_ENGINE to loads by descriptor too, which
    go past the order of the others (PTX: the async proxy).
    """
    if COPY_ENGINE and not IS_INTERPRETED:
        _fence_copy_engine()
    tl.debug_barrier()
    tl.atomic_add(arrivals, 1, sem="acq_rel", scope="gpu")
    while tl.atomic_add(arrivals, 0, sem="acq_rel", scope="gpu") < target:
        pass
    tl.debug_barrier()
    if COPY_ENGINE and not IS_INTERPRETED:
        _fence_copy_engine()


@triton.jit
def _fence_copy_engine():
    tl.inline_asm_elementwise(
        "fence.proxy.async.global; mov.b32 $0, 0;", "=r", [], dtype=tl.int32, is_pure=False, pack=1
    )
