"""What can be measured: this package's implementations and other people's, as functions of the same tensors."""

import importlib.util
import os
import shutil
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from torchtune_lce.commands.shared import peers
from torchtune_lce.commands.shared.errors import CommandError
from torchtune_lce.commands.shared.objective import Objective
from torchtune_lce.functional import compute
from torchtune_lce.implementations import choice
from torchtune_lce.implementations.capabilities import CAPABILITIES
from torchtune_lce.inputs.call import checked
from torchtune_lce.inputs.filtering import UNFILTERED, Filtering
from torchtune_lce.inputs.options import Options

# hidden [N, D], weight [V, D], targets [N], and with a teacher its hidden [N, E] and weight [V, E]
# -> mean loss over the targets that are not -100
Loss = Callable[..., Tensor]

BASELINE = "torch_compile_full"


@dataclass(frozen=True)
class Candidate:
    """One loss. ``build`` gives a function that has compiled nothing for any shape yet; this package's take settings of
    :class:`torchtune_lce.inputs.options.Options`."""

    name: str
    build: Callable[..., Loss]
    ours: bool = False
    settings: dict = field(default_factory=dict)  # for ``build``
    filtering: Filtering = UNFILTERED  # of which gradients it leaves out small softmax entries
    any_size: bool = False  # takes every N, D and V
    compiles: bool = False
    requires: str | None = None  # a module of other people's kernels, which may be absent
    cuda_only: bool = False
    objective: Objective | None = None  # with a teacher; None: the cross-entropy of the targets
    impl: str | None = None  # of this package's, where its name is another

    def obstacle(self, device: torch.device, dtype: torch.dtype) -> str | None:
        """Why it cannot run here, or None."""
        if self.requires and importlib.util.find_spec(self.requires) is None:
            package, inside, _ = self.requires.partition(".")
            return f"the installed {package} has no {self.requires}" if inside else f"{package} is not installed"
        if self.cuda_only and device.type != "cuda":
            return "needs a CUDA card"
        if self.requires:
            try:
                self.build()
            except Exception as error:  # other people's code may raise anything, and some runs on import
                return f"{self.requires} cannot be imported: {' '.join(str(error).split())}"
        if self.compiles and device.type == "cpu" and not _has_cpp_compiler():
            return "torch.compile needs a C++ compiler, none was found"
        if self.ours:
            try:
                choice.choose(self.impl or self.name, torch.empty(1, 1, device=device, dtype=dtype))
            except RuntimeError as error:
                return str(error)
        return None


def _has_cpp_compiler() -> bool:
    return any(shutil.which(name) for name in (os.environ.get("CXX", "g++"), "g++", "clang++"))


def _ours(name: str) -> Candidate:
    def build(**settings) -> Loss:
        options = Options(**settings)
        return lambda hidden, weight, targets: compute(
            checked(hidden, weight, targets, None, options=options), reduction="mean", impl=name
        )

    return Candidate(
        name,
        build,
        ours=True,
        filtering=CAPABILITIES[name].filtering,
        any_size=True,
        compiles=CAPABILITIES[name].needs_compiler,
    )


_ALL = (
    *map(_ours, CAPABILITIES),
    Candidate("eager_full", lambda: peers.full_logits, any_size=True),
    Candidate(BASELINE, peers.compiled_full_logits, any_size=True, compiles=True),
    Candidate("torchtune", peers.torchtune_release, any_size=True, compiles=True),
    Candidate("torchtune_main", peers.compiled_chunks, any_size=True, compiles=True),
    Candidate(
        "torch_linear_ce",
        peers.torch_linear_ce,
        any_size=True,
        requires="torch.nn.modules.linear_cross_entropy_options",
    ),
    Candidate(
        "apple_cce", peers.apple_cce, filtering=Filtering(True, True), requires="cut_cross_entropy", cuda_only=True
    ),
    Candidate("liger", peers.liger, requires="liger_kernel", cuda_only=True),
    Candidate("quack", peers.quack, requires="quack", cuda_only=True),
)
CANDIDATES = {candidate.name: candidate for candidate in _ALL}
# The other presets differ from these two in nothing but which gradients are filtered: on request.
_ON_REQUEST = choice.CCE_PRESETS.keys() - {"cce", "cce_exact"}


def select(
    names: list[str] | None,
    workspace_mib: int | None = None,
    among: Iterable[Candidate] | None = None,
    filter_eps: Sequence[float] = (),
) -> list[Candidate]:
    """The named candidates, or all but the presets that are measured on request only; this package's with a workspace,
    and where they filter once with each threshold.

    ``among`` None: those of the cross-entropy. Raises CommandError for an unknown name.
    """
    known = {candidate.name: candidate for candidate in (_ALL if among is None else among)}
    if names is None:
        names = [name for name in known if name not in _ON_REQUEST]
    for name in names:
        if name not in known:
            raise CommandError(f"--only takes {', '.join(known)}; got {name!r}")
    settings = {} if workspace_mib is None else {"workspace_mib": workspace_mib}
    chosen = [candidate for candidate in known.values() if candidate.name in names]
    return [of_settings for candidate in chosen for of_settings in _with_settings(candidate, settings, filter_eps)]


def _with_settings(candidate: Candidate, settings: dict, filter_eps: Sequence[float]) -> list[Candidate]:
    if not candidate.ours:
        return [candidate]
    if candidate.filtering == UNFILTERED or not filter_eps:
        return [replace(candidate, settings=settings)]
    return [
        replace(
            candidate,
            name=f"{candidate.name}@{eps:.6g}",
            impl=candidate.name,
            settings={**settings, "filter_eps": eps},
        )
        for eps in filter_eps
    ]
