"""Where the demo runs, in which dtype, and with which implementation."""

import torch

from torchtune_lce.commands.shared.errors import CommandError
from torchtune_lce.implementations import choice


def choose() -> tuple[str, torch.dtype]:
    """``cuda`` if there is one, in bfloat16 if the card computes in it; else ``cpu``. float32 where not bfloat16."""
    if not torch.cuda.is_available():
        return "cpu", torch.float32
    return "cuda", torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float32


def describe(device: str) -> str:
    return torch.cuda.get_device_name() if device == "cuda" else f"CPU with {torch.get_num_threads()} threads"


def implementation(impl: str, device: str, dtype: torch.dtype) -> str:
    """The name of what will run for ``impl``. Raises CommandError, before any work is done, if nothing can."""
    try:
        return choice.choose(impl, torch.empty(1, 1, device=device, dtype=dtype))[0]
    except (ValueError, RuntimeError) as error:
        raise CommandError(f"--impl: {error}") from error
