"""What a row block keeps of a strip: its active columns, or all of it; and whether u' has a product to add by now.

A threshold on single entries says nothing about their sum: where the softmax is flat, as in an untrained model, all of
it lies in entries below any threshold. So the mass of what is not active is summed too, and where a row block's mean of
what is dropped, through this strip, would pass ``DROPPED_MASS_LIMIT``, the row block keeps the strip whole. So it does
where there are no slots for the columns.
"""

import triton
import triton.language as tl

from torchtune_lce.kernels.overflow import OVERFLOWS
from torchtune_lce.kernels.primitives import DROPPED_MASS_LIMIT, bits_set, multiply_add

TILES_A_STEP = tl.constexpr(64)
WORDS_A_STEP = tl.constexpr(1024)


@triton.jit
def _row_totals(
    sums,
    dropped_sums,
    totals_before,
    targets,
    references,
    place,
    used,
    tokens,
    log2_scale,
    number,
    first_tile,
    tiles,
):
    """Through this strip T + S', and what is dropped if all that is not active is; what was; which rows count."""
    present = place < used
    later = place < tl.where(number > 0, used, 0)
    target = tl.load(targets + place, mask=present, other=0.0)
    reference = tl.load(references + place, mask=present, other=0.0)
    own = tl.exp2(multiply_add(target, log2_scale, reference * -log2_scale))
    total = tl.where(number > 0, tl.load(totals_before + place, mask=later, other=0.0), own)
    before = tl.load(totals_before + tokens + place, mask=later, other=0.0)
    dropped = before
    in_step = tl.arange(0, TILES_A_STEP)
    for start in range(0, tiles, TILES_A_STEP):
        tile = start + in_step
        mask = (tile < tiles)[:, None] & present[None, :]
        at = tile.to(tl.int64)[:, None] * tokens + place[None, :]
        total += tl.sum(tl.load(sums + first_tile * tokens.to(tl.int64) + at, mask=mask, other=0.0), 0)
        dropped += tl.sum(tl.load(dropped_sums + at, mask=mask, other=0.0), 0)
    # False for a NaN.
    return total, dropped, before, present & (total < OVERFLOWS) & (total > 0)


@triton.jit
def _is_flat(row_total, dropped, before, counts, entries_before, entries):
    """Whether what is not active, of all entries so far or of these alone, is more than may be dropped."""
    rows = tl.sum(counts.to(tl.float32), 0)
    scale = tl.where(counts, 1 / tl.where(counts, row_total, 1.0), 0.0)
    share = tl.sum(tl.where(counts, dropped * scale, 0.0), 0)
    # This strip alone may leave out its part of the entries so far: all of a flat softmax is kept.
    here = tl.sum(tl.where(counts, (dropped - before) * scale, 0.0), 0)
    part = entries.to(tl.float32) / (entries_before + entries)
    return (share > DROPPED_MASS_LIMIT * rows) | (here > DROPPED_MASS_LIMIT * part * rows)


@triton.jit
def decide(
    words,
    sums,
    dropped_sums,
    targets,
    references,
    running,
    waiting,
    due,
    strip_is_whole,
    kept,
    row_block,
    row_blocks,
    used,
    tokens,
    entries_total,
    slots,
    log2_scale,
    number,
    first_tile,
    tiles,
    ROW_BLOCK: tl.constexpr,
    ENTRIES: tl.constexpr,
):
    """For a row block with tokens in use and a strip, whose bits are `words`: the sums through it, what it keeps, how
    many columns then wait, and what is due: see Strip.
    """
    depth = tiles * ENTRIES
    first_entry = first_tile * ENTRIES
    place = row_block * ROW_BLOCK + tl.arange(0, ROW_BLOCK)
    row_total, dropped, before, counts = _row_totals(
        sums,
        dropped_sums,
        running + ((number + 1) % 2).to(tl.int64) * 2 * tokens,
        targets,
        references,
        place,
        used,
        tokens,
        log2_scale,
        number,
        first_tile,
        tiles,
    )
    in_step = tl.arange(0, WORDS_A_STEP)
    bits = tl.zeros((WORDS_A_STEP,), tl.int32)
    for start in range(0, depth // 32, WORDS_A_STEP):
        bits += bits_set(tl.load(words + start + in_step, mask=start + in_step < depth // 32, other=0))
    old = waiting + number % 2 * 2 * row_blocks + row_block
    waited = tl.load(old, mask=number > 0, other=0)
    has_before = tl.load(old + row_blocks, mask=number > 0, other=0)
    found = tl.sum(bits, 0)
    flat = _is_flat(row_total, dropped, before, counts, first_entry, depth)
    is_whole = tl.where(flat | (waited + found > slots), 1, 0)
    found *= 1 - is_whole
    listed = waited + found
    # The next strip has room if it finds no more than this one and a quarter.
    is_last = first_entry + depth >= entries_total
    adds = tl.where(is_last | (listed + found + found // 4 > slots), 1, is_whole)
    own_due = due + row_block
    tl.store(own_due, listed * adds)
    tl.store(own_due + row_blocks, depth * is_whole)
    tl.store(own_due + 2 * row_blocks, adds)
    tl.store(own_due + 3 * row_blocks, has_before)
    after = running + (number % 2).to(tl.int64) * 2 * tokens
    tl.store(after + place, row_total, mask=place < used)
    tl.store(after + tokens + place, tl.where(is_whole > 0, before, dropped), mask=place < used)
    # Of this piece of tokens, which may have fewer row blocks.
    tl.store(strip_is_whole + number * tl.cdiv(tokens, ROW_BLOCK) + row_block, is_whole)
    # Past the vocabulary a strip has nothing.
    all_here = tl.minimum(depth, entries_total - first_entry) * is_whole
    tl.store(kept + row_block, tl.load(kept + row_block) + found + all_here)
    new = waiting + (number + 1) % 2 * 2 * row_blocks + row_block
    tl.store(new, listed * (1 - adds))
    tl.store(new + row_blocks, has_before | adds)
