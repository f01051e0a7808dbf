"""What can be measured: this package's implementations and other people's, as functions of the same three tensors."""

import importlib.util
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from torchtune_lce import implementations, linear_cross_entropy
from torchtune_lce.bench import peers
from torchtune_lce.bench.errors import BenchError

# hidden [N, D], weight [V, D], targets [N] -> mean loss over the targets that are not -100
Loss = Callable[[Tensor, Tensor, Tensor], Tensor]

BASELINE = "torch_compile_full"


@dataclass(frozen=True)
class Candidate:
    """One loss. ``build`` gives a function that has compiled nothing for any shape yet."""

    name: str
    build: Callable[[], Loss]
    ours: bool = False
    filters: bool = False  # leaves small softmax entries out of the gradients
    any_size: bool = False  # takes every N, D and V
    compiles: bool = False
    requires: str | None = None  # a module that may be absent
    cuda_only: bool = False

    def obstacle(self, device: torch.device, dtype: torch.dtype) -> str | None:
        """Why it cannot run here, or None."""
        if self.requires and importlib.util.find_spec(self.requires) is None:
            return f"{self.requires} is not installed"
        if self.cuda_only and device.type != "cuda":
            return "needs a CUDA card"
        if self.compiles and device.type == "cpu" and not _has_cpp_compiler():
            return "torch.compile needs a C++ compiler, none was found"
        if self.ours:
            try:
                implementations.choose(self.name, torch.empty(1, 1, device=device, dtype=dtype))
            except RuntimeError as error:
                return str(error)
        return None


def _has_cpp_compiler() -> bool:
    return any(shutil.which(name) for name in (os.environ.get("CXX", "g++"), "g++", "clang++"))


def _ours(name: str) -> Candidate:
    def build() -> Loss:
        return lambda hidden, weight, targets: linear_cross_entropy(hidden, weight, targets, impl=name)

    filtering = implementations.CCE_PRESETS.get(name)
    return Candidate(
        name,
        build,
        ours=True,
        filters=filtering is not None and (filtering.hidden or filtering.weight),
        any_size=True,
        compiles=name == "torch_compile",
    )


_ALL = (
    *(_ours(name) for name in implementations.NAMES if name != "auto"),
    Candidate("eager_full", lambda: peers.full_logits, any_size=True),
    Candidate(BASELINE, peers.compiled_full_logits, any_size=True, compiles=True),
    Candidate("torchtune", peers.torchtune_release, any_size=True, compiles=True),
    Candidate("torchtune_main", peers.compiled_chunks, any_size=True, compiles=True),
    Candidate("apple_cce", peers.apple_cce, filters=True, requires="cut_cross_entropy", cuda_only=True),
    Candidate("liger", peers.liger, requires="liger_kernel", cuda_only=True),
    Candidate("quack", peers.quack, requires="quack", cuda_only=True),
)
CANDIDATES = {candidate.name: candidate for candidate in _ALL}
# The other presets differ from these two in nothing but which gradients are filtered: on request.
_ON_REQUEST = implementations.CCE_PRESETS.keys() - {"cce", "cce_exact"}


def select(names: list[str] | None) -> list[Candidate]:
    """The named candidates, or all but the presets that are measured on request only.

    Raises BenchError for an unknown name.
    """
    if names is None:
        return [candidate for candidate in _ALL if candidate.name not in _ON_REQUEST]
    for name in names:
        if name not in CANDIDATES:
            raise BenchError(f"--only takes {', '.join(CANDIDATES)}; got {name!r}")
    return [candidate for candidate in _ALL if candidate.name in names]
