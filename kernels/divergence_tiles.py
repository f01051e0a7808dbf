"""Logits of a student and its teacher, a tile of each at a time, by one program: neither is ever rounded or stored.

Places are those of a group of tokens whose gradients are made together; of the teacher's states there may be room for a
part of them alone, a piece of whole row blocks.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import triton
import triton.language as tl
from torch import Tensor

from torchtune_lce.kernels.descriptors import has_blocks, in_blocks
from torchtune_lce.kernels.exponentials import strip_logits
from torchtune_lce.kernels.operands import Operands, OperandsArgument
from torchtune_lce.kernels.tuning import Config, config_for

# Entries of a tile on a card: of twice as many, the sums of both models would not fit the registers.
TILE_ENTRIES = 128


@triton.jit
def both_logits(
    student: OperandsArgument,
    teacher: OperandsArgument,
    states,
    state_blocks,
    weight_blocks,
    teacher_states,
    teacher_state_blocks,
    teacher_weight_blocks,
    first_block,
    row_block,
    tile,
    used,
    TMA: tl.constexpr,
    ROW_BLOCK: tl.constexpr,
    ENTRIES: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Of a row block of a piece, whose first one is the group's `first_block`, by a tile of entries; float32, both.

    `used` places of the piece are in use.
    """
    logits = strip_logits(
        states,
        state_blocks,
        student.weight,
        weight_blocks,
        student.bias,
        first_block + row_block,
        tile,
        first_block * ROW_BLOCK + used,
        student.entries_total,
        student.features,
        student.weight_stride,
        1.0,
        student.bias is not None,
        False,
        TMA,
        ROW_BLOCK,
        ENTRIES,
        BLOCK_D,
        PRECISION,
    )
    teacher_logits = strip_logits(
        teacher_states,
        teacher_state_blocks,
        teacher.weight,
        teacher_weight_blocks,
        teacher.bias,
        row_block,
        tile,
        used,
        teacher.entries_total,
        teacher.features,
        teacher.weight_stride,
        1.0,
        teacher.bias is not None,
        False,
        TMA,
        ROW_BLOCK,
        ENTRIES,
        BLOCK_D,
        PRECISION,
    )
    return logits, teacher_logits


@dataclass(frozen=True)
class Group:
    """Tokens whose gradients are made together: places ``first`` to ``first + M``; those below ``count`` are in use."""

    operands: Operands  # the student's; without an adapter, a softcap or a scale, as the teacher's
    teacher: Operands
    states: Tensor  # [M, D]: the student's hidden states in the order of the places, zero past the count
    teacher_states: Tensor  # [P, E]: the teacher's, of a piece of the group
    count: Tensor  # [1] int32, on the device
    first: int

    @property
    def tokens(self) -> int:
        return self.states.shape[0]

    def arguments(self, config: Config) -> tuple:
        """The first of both kernels': operands, states in order, and the copy engine's descriptors or None."""
        student, teacher = self.operands, self.teacher
        blocks = (None,) * 4
        if has_blocks(config, self.states, student.weight, self.teacher_states, teacher.weight):
            blocks = tuple(
                in_blocks(matrix, rows, config.block_d)
                for matrix, rows in (
                    (self.states, config.row_block),
                    (student.weight, config.forward_entries),
                    (self.teacher_states, config.row_block),
                    (teacher.weight, config.forward_entries),
                )
            )
        own, its_teachers = blocks[:2], blocks[2:]
        return student.argument, teacher.argument, self.states, *own, self.teacher_states, *its_teachers, self.count

    def constants(self, arguments: tuple, config: Config) -> dict:
        """Of both kernels, and how they run."""
        return {
            "TMA": arguments[3] is not None,
            "ROW_BLOCK": config.row_block,
            "ENTRIES": config.forward_entries,
            "BLOCK_D": config.block_d,
            "GROUP": config.group,
            "PRECISION": config.precision,
            "num_warps": config.warps,
            "num_stages": config.forward_stages,
        }


def divergence_configs(device: torch.device, dtype: torch.dtype, teacher_dtype: torch.dtype) -> tuple[Config, Config]:
    """For the logits of a student and a teacher of these dtypes, and for the products with the student's gradient."""
    wider = max(dtype, teacher_dtype, key=lambda dtype: dtype.itemsize)
    of_logits, of_products = (
        replace(config, forward_entries=min(config.forward_entries, TILE_ENTRIES))
        for config in (config_for(device, wider), config_for(device, dtype))
    )
    if wider.itemsize == 2:
        # Narrower tiles leave room to fetch one step further ahead.
        of_logits = replace(of_logits, forward_stages=of_logits.forward_stages + 1)
    return of_logits, of_products
