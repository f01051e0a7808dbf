"""Block shapes and pipeline depths: one named configuration a device and dtype, chosen by capability alone."""

import os
from dataclasses import dataclass
from functools import cache

import torch


@dataclass(frozen=True)
class Config:
    """Block sizes of every kernel, in elements.

    ``row_block`` tokens by ``entry_tile`` entries is the unit that the backward keeps or drops. The forward computes
    ``row_block`` x ``forward_entries`` logits a step, the backward's gradients ``features`` columns of D a step. Logits
    of ``sample`` tokens are computed at once for their targets, and for the mean of what is dropped. ``block_d`` and
    ``block_k`` are depths of the products over D and over tokens or entries.
    """

    row_block: int
    entry_tile: int
    forward_entries: int
    features: int
    sample: int
    block_d: int
    block_k: int
    group: int
    warps: int
    forward_stages: int
    backward_stages: int
    tma: bool
    precision: str  # of float32 products, as tl.dot names it
    # Whether the copy engine stores tiles of 16 bits transposed. Triton 3.9 does not compile that for sm100.
    stores_transposed: bool = False


def ceil_div(dividend: int, divisor: int) -> int:
    """Triton's cdiv, which serves kernels first, takes the host 10 us."""
    return -(-dividend // divisor)


def is_interpreted() -> bool:
    return os.environ.get("TRITON_INTERPRET") == "1"


def has_tma(capability: tuple[int, int]) -> bool:
    """Whether the card has the copy engine that host-made tensor descriptors are for."""
    return capability >= (9, 0)


def config_for(device: torch.device, dtype: torch.dtype) -> Config:
    if device.type == "cpu":
        return Config(32, 32, 64, 32, 32, 32, 32, 2, 4, 1, 1, tma=False, precision="ieee")
    precision = "tf32" if dtype == torch.float32 and _allows_tf32() else "tf32x3"
    return _cuda_config(_capability(device), dtype, precision)


@cache
def _capability(device: torch.device) -> tuple[int, int]:
    """Each call of a kernel asks for it, and torch takes microseconds to say it."""
    return torch.cuda.get_device_capability(device)


def _allows_tf32() -> bool:
    """torch's setting for products of float32: its newer name is torch 2.9's, beside which the older one raises."""
    matmul = torch.backends.cuda.matmul
    if not hasattr(matmul, "fp32_precision"):
        return matmul.allow_tf32
    inherits = matmul.fp32_precision == "none"
    return (torch.backends.fp32_precision if inherits else matmul.fp32_precision) == "tf32"


@cache
def _cuda_config(capability: tuple[int, int], dtype: torch.dtype, precision: str) -> Config:
    tma = has_tma(capability)
    if dtype == torch.float32:
        return Config(128, 128, 128, 128, 64, 32, 32, 8, 8, 2, 2, tma=tma, precision=precision)
    if capability in ((8, 6), (8, 9)) or capability >= (12, 0):
        # 100 KiB of shared memory a program.
        return Config(128, 128, 128, 128, 64, 32, 32, 8, 8, 3, 3, tma=False, precision="ieee")
    if capability < (9, 0):
        return Config(128, 128, 256, 256, 64, 32, 32, 8, 8, 3, 3, tma=False, precision="ieee")
    transposed = capability < (10, 0)
    return Config(128, 128, 256, 256, 64, 64, 64, 8, 8, 3, 3, tma=tma, precision="ieee", stores_transposed=transposed)


def rows_and_columns(device: torch.device) -> dict[str, int]:
    """Of a program that goes over a matrix [N, D]: its rows, of one row block, and columns of D.

    The interpreter takes programs in turn: there few of them.
    """
    return {"ROWS": 32 if device.type == "cpu" else 8, "COLUMNS": 256}


def rank_block(rank: int) -> int:
    """Columns of an adapter's gradients that are computed at once: tl.dot takes no less than 16."""
    return min(128, max(16, 1 << (rank - 1).bit_length()))


@cache
def programs(device: torch.device) -> int:
    """Size of a persistent grid: a program a multiprocessor; one alone in the interpreter, which runs them in turn."""
    if device.type == "cpu":
        return 1
    return torch.cuda.get_device_properties(device).multi_processor_count
