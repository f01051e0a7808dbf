"""The losses with a teacher that can be measured: this package's and torchtune's."""

from functools import partial

from torch import Tensor

from torchtune_lce.commands.shared import peers
from torchtune_lce.commands.shared.batches import IGNORE_INDEX
from torchtune_lce.commands.shared.candidates import BASELINE, Candidate, Loss
from torchtune_lce.commands.shared.objective import Objective
from torchtune_lce.divergence.choice import KERNELS, NAMES
from torchtune_lce.divergence.function import divergence, divergence_and_cross_entropy
from torchtune_lce.divergence.operands import Head
from torchtune_lce.functional import linear_cross_entropy
from torchtune_lce.implementations.capabilities import CAPABILITIES
from torchtune_lce.inputs.options import Options


def candidates(objective: Objective) -> tuple[Candidate, ...]:
    """All of them; ``one_walk``, the kernels that compute both losses together, where the objective has both."""
    common = {"any_size": True, "objective": objective}
    ours = [
        Candidate(
            name, partial(_ours, objective, name), ours=True, compiles=CAPABILITIES[name].needs_compiler, **common
        )
        for name in NAMES
        if name != "auto"
    ]
    if not objective.is_divergence:
        ours.insert(0, Candidate("one_walk", partial(_one_walk, objective), ours=True, impl=KERNELS, **common))
    return (
        *ours,
        Candidate("eager_full", partial(peers.full_logits_with_teacher, objective), **common),
        Candidate(BASELINE, partial(peers.compiled_full_logits_with_teacher, objective), compiles=True, **common),
        Candidate("torchtune", partial(peers.torchtune_release_with_teacher, objective), compiles=True, **common),
    )


def _ours(objective: Objective, impl: str, **settings) -> Loss:
    """The divergence, and where it has a share the cross-entropy of the same name, computed by itself."""
    workspace_mib = Options(**settings).workspace_mib

    def loss(hidden: Tensor, weight: Tensor, labels: Tensor, *teacher: Tensor) -> Tensor:
        of_teacher = divergence(
            Head("student", hidden, weight),
            Head("teacher", *teacher),
            labels,
            objective.shares,
            ignore_index=IGNORE_INDEX,
            workspace_mib=workspace_mib,
            impl=impl,
            normalize=True,
        )
        return objective.mix(
            of_teacher, lambda: linear_cross_entropy(hidden, weight, labels, impl=impl, workspace_mib=workspace_mib)
        )

    return loss


def _one_walk(objective: Objective, **settings) -> Loss:
    workspace_mib = Options(**settings).workspace_mib

    def loss(hidden: Tensor, weight: Tensor, labels: Tensor, *teacher: Tensor) -> Tensor:
        of_teacher, of_labels = divergence_and_cross_entropy(
            Head("student", hidden, weight),
            Head("teacher", *teacher),
            labels,
            objective.shares,
            divergence_share=objective.kd_ratio,
            ignore_index=IGNORE_INDEX,
            workspace_mib=workspace_mib,
        ).unbind()
        return objective.mix(of_teacher, lambda: of_labels)

    return loss
