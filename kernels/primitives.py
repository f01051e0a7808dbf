"""Device functions that several kernels share. No libdevice calls: they fail in Triton's interpreter."""

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def softcapped(logits, softcap):
    """softcap * tanh(logits / softcap), with tanh(x) = 2 sigmoid(2x) - 1."""
    return softcap * (2 * tl.sigmoid(2 * logits / softcap) - 1)


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
def grid_barrier(arrivals, target):
    """Waits until `target` programs have arrived in all; every program of the grid must be resident.

    What any program wrote before is visible to all of them after.
    """
    tl.debug_barrier()
    tl.atomic_add(arrivals, 1, sem="acq_rel", scope="gpu")
    while tl.atomic_add(arrivals, 0, sem="acq_rel", scope="gpu") < target:
        pass
    tl.debug_barrier()
