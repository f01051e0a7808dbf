"""The dtypes that a call may come in, and the one that it is summed in."""

import torch

HIDDEN_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
TARGET_DTYPES = (torch.int64, torch.int32)
# Types of devices. Some of Intel's cards have it.
_WITHOUT_FLOAT64 = ("mps", "xpu")


def has_float64(device: torch.device) -> bool:
    return device.type not in _WITHOUT_FLOAT64


def widest(device: torch.device) -> torch.dtype:
    return torch.float64 if has_float64(device) else torch.float32


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """float64 stays float64; everything else is accumulated in float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32
