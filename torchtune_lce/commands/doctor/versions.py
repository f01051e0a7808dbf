"""Installed versions, and which of them do not go together."""

import platform
import re
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path

from packaging.version import InvalidVersion, Version

PACKAGES = ("torchtune-lce", "torch", "triton", "torchtune", "torchao", "torchvision", "omegaconf", "numpy")


def installed() -> dict[str, str | None]:
    """Version by package name, None where it is not installed; Python first."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = None
    return found


def is_main_branch() -> bool:
    """Whether the torchtune here is its main branch, whose version says nothing ('0.0.0', or none at all).

    Told by the files, that one of them defines its SFTLoss: its import may be what fails.
    """
    found = find_spec("torchtune")
    folders = [Path(folder) for folder in (found and found.submodule_search_locations) or ()]
    files = (file for folder in folders for file in (folder / "modules" / "loss").glob("*.py"))
    return any("class SFTLoss" in file.read_text(encoding="utf-8") for file in files)


def import_error() -> str | None:
    """What stops torchtune and this package's loss from being imported, or None.

    In a process of its own, with the paths of this one: what does not fit together may end it, not only raise.
    """
    if "torchtune._cli.tune" in sys.modules and "torchtune_lce.loss" in sys.modules:
        return None
    code = f"import sys; sys.path[:] = {sys.path!r}; import torchtune._cli.tune, torchtune_lce.loss"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    if done.returncode == 0:
        return None
    lines = done.stderr.strip().splitlines()
    # A traceback's last line at the margin, and what belongs to the same message.
    first = max((i for i, line in enumerate(lines) if line and not line[0].isspace()), default=0)
    return " ".join(" ".join(lines[first:]).split()) or f"the process ended with status {done.returncode}"


def complaints(versions: dict[str, str | None], main_branch: bool = False) -> list[str]:
    """A sentence for each version that does not fit, with what to do."""
    result = []
    torch, torchtune, torchao = (_parsed(versions[name]) for name in ("torch", "torchtune", "torchao"))
    if torch is None or torch < Version("2.8"):
        result.append(f"torch must be 2.8 or newer, got {versions['torch']}: pip install -U torch")
    if main_branch or (torchtune is not None and torchtune >= Version("0.7.dev0")):
        result += _complaints_of_main(versions, torchao)
    elif torchtune is None or torchtune < Version("0.6.1"):
        got = versions["torchtune"] or repr(versions["torchtune"])
        result.append(f"torchtune must be 0.6.1 or newer, got {got}: pip install -U torchtune")
    elif torchao is None or not Version("0.9") <= torchao < Version("0.16") or torchao.release[:2] == (0, 12):
        result.append(
            f"torchtune {versions['torchtune']} imports with torchao 0.9 to 0.15 other than 0.12, got "
            f"{versions['torchao']}: pip install 'torchao>=0.9,<0.16,!=0.12'"
        )
    return result


def _complaints_of_main(versions: dict[str, str | None], torchao: Version | None) -> list[str]:
    """Of torchtune's main branch. --no-deps: none of it may bring another torch than the one that is here."""
    result, name = [], f"torchtune's main branch (its version reads {versions['torchtune']!r})"
    if torchao is None or torchao < Version("0.18"):
        result.append(
            f"{name} needs torchao 0.18 or newer, got {versions['torchao']}: pip install --no-deps 'torchao>=0.18'"
        )
    if versions.get("torchvision") is None:
        torch = _parsed(versions["torch"])
        # torchvision 0.N is built for torch 2.(N - 15), from the same index.
        fitting = "torchvision" if torch is None else f"torchvision==0.{torch.minor + 15}.*"
        result.append(f"{name} imports torchvision, which is not installed: pip install --no-deps '{fitting}'")
    return result


def of_import(versions: dict[str, str | None], error: str, explained: bool) -> str:
    """The sentence about an import that ended with ``error``; ``explained`` if a version is complained about."""
    said = f"torchtune cannot be imported: {error}"
    if explained:
        return f"{said}, for which see above"
    module = re.search(r"No module named '([^'.]+)'$", error)
    if module:
        return f"{said}: pip install --no-deps {module[1]}"
    here = ", ".join(f"{name} {versions[name]}" for name in ("torch", "torchtune", "torchao"))
    return (
        f"{said}. No known fault of {here}: one of them is broken or was built for another; "
        "pip install --force-reinstall --no-deps the one that is named there"
    )


def _parsed(text: str | None) -> Version | None:
    """None for what is no version too: torchtune's main branch has an empty one."""
    try:
        return None if text is None else Version(text)
    except InvalidVersion:
        return None
