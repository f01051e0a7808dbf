"""Installed versions, and which of them do not go together."""

import platform
from importlib.metadata import PackageNotFoundError, version

from packaging.version import Version

PACKAGES = ("torchtune-lce", "torch", "triton", "torchtune", "torchao", "omegaconf", "numpy")


def installed() -> dict[str, str | None]:
    """Version by package name, None where it is not installed; Python first."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = None
    return found


def complaints(versions: dict[str, str | None]) -> list[str]:
    """A sentence for each version that does not fit, with what to do."""
    result = []
    torch, torchtune, torchao = (_parsed(versions[name]) for name in ("torch", "torchtune", "torchao"))
    if torch is None or torch < Version("2.8"):
        result.append(f"torch must be 2.8 or newer, got {versions['torch']}: pip install -U torch")
    if torchtune is None or torchtune < Version("0.6.1"):
        result.append(f"torchtune must be 0.6.1 or newer, got {versions['torchtune']}: pip install -U torchtune")
    elif torchtune < Version("0.7.dev0") and (
        torchao is None or not Version("0.9") <= torchao < Version("0.16") or torchao.release[:2] == (0, 12)
    ):
        result.append(
            f"torchtune {versions['torchtune']} imports with torchao 0.9 to 0.15 other than 0.12, got "
            f"{versions['torchao']}: pip install 'torchao>=0.9,<0.16,!=0.12'"
        )
    elif torchtune >= Version("0.7.dev0") and (torchao is None or torchao < Version("0.18")):
        result.append(
            f"torchtune {versions['torchtune']} needs torchao 0.18 or newer, got {versions['torchao']}: "
            "pip install -U --no-deps torchao"
        )
    return result


def _parsed(text: str | None) -> Version | None:
    return None if text is None else Version(text)
