"""What the measurements were made with and on."""

import importlib.metadata
import importlib.util
import platform
import shutil
import subprocess
from pathlib import Path

import torch

# Other people's losses, and what decides whether PyTorch's own is fused.
_PEERS = ("cut-cross-entropy", "liger-kernel", "quack-kernels", "nvidia-cutlass-dsl", "apache-tvm-ffi")


def describe(device: torch.device) -> dict[str, str | None]:
    """Device, driver, versions and commit; None for what cannot be found out."""
    cuda = device.type == "cuda"
    return {
        "device": torch.cuda.get_device_name(device) if cuda else f"CPU ({platform.machine()})",
        "driver": _driver() if cuda else None,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": _version("triton"),
        "torchtune": _version("torchtune"),
        "torchao": _version("torchao"),
        "commit": commit(),
        **{name.replace("-", "_"): version for name in _PEERS if (version := _version(name))},
    }


def in_words(setting: dict[str, str | None]) -> str:
    """What :func:`describe` found, in one line."""
    return ", ".join(f"{name} {value}" for name, value in setting.items() if value)


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def _driver() -> str | None:
    output = _run(["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"], Path.cwd())
    return output.splitlines()[0].strip() if output else None


def commit() -> str | None:
    """The commit that the package was loaded from, "+changes" if files differ from it; None outside a git checkout."""
    folder = Path(__file__).resolve().parent
    # A virtual environment may lie inside somebody else's repository.
    if _run(["git", "ls-files", "--error-unmatch", Path(__file__).name], folder) is None:
        return None
    head = _run(["git", "rev-parse", "HEAD"], folder)
    changes = _run(["git", "status", "--porcelain", "--untracked-files=no"], folder)
    return head and head.strip() + ("+changes" if changes else "")


def _run(command: list[str], folder: Path) -> str | None:
    """Its standard output, or None if it is not there or fails."""
    if shutil.which(command[0]) is None:
        return None
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    return None if done.returncode else done.stdout
