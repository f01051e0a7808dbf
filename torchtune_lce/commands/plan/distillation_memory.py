"""What the two losses of a distillation allocate, of one step's student and teacher; frozen heads, as LoRA has them.

N tokens, V entries, b bytes of an element; D features of the student, E of the teacher.

stock: the logits of both models, 2bNV, until both losses are known. Kept for the backward is what torchtune's formulas
make of them in float32: softmaxes, log-softmaxes and their products' masks, 9NV for the forward divergence, 13NV for
the reverse one, 22NV for both; and the cross-entropy's log-softmax, 4NV.
ours: the divergence is over before the cross-entropy begins, and keeps the gradient of the student's hidden states,
bND; one walk of the kernels for both takes no more. The workspace of `chunked` holds both logits of a piece of tokens
in float32 and, of some of them, three or four blocks more; that of the kernels, which stand beside every `cce`, both
hidden states of a piece, its gradient's sums, and the gradient by a strip of the student's logits.
"""

from dataclasses import dataclass

from torchtune_lce.commands.plan.step import StepLoss
from torchtune_lce.divergence.chunked import tokens_at_once
from torchtune_lce.implementations import choice
from torchtune_lce.implementations.memory import CHUNKS, LossMemory, Problem, loss_memory

_STOCK_KEEPS = {"Forward": 9, "Reverse": 13, "Symmetric": 22}
_BLOCKS = {"Forward": 3, "Reverse": 4, "Symmetric": 4}
# Of kernels/divergence_walk.py: tokens and entries of a tile on a card; segments of the vocabulary that a row is summed
# in, at most, and numbers of each.
_TILE, _SEGMENTS, _SUMS = 128, 32, 6
PLANNED = ("stock", "chunked", *choice.CCE_PRESETS)


@dataclass(frozen=True)
class Distillation:
    """``divergence``: Forward, Reverse or Symmetric. ``workspace_mib``: of our loss of that name."""

    divergence: str
    teacher_features: int
    workspace_mib: int = 128


def distillation_memory(loss: str, problem: Problem, distillation: Distillation) -> StepLoss:
    """Of one of :data:`PLANNED`, paired with a divergence as ``tune-lce compare`` has it; teacher's states too."""
    if loss == "stock":
        return _stock(problem, distillation)
    cross_entropy = loss_memory(loss, problem)
    of_student, of_teacher = (
        problem.tokens * features * problem.itemsize for features in (problem.features, distillation.teacher_features)
    )
    in_workspace = _pieces if loss == "chunked" else _strips
    divergence = of_student + in_workspace(problem, distillation)
    memory = LossMemory(
        of_teacher + max(divergence, of_student + cross_entropy.forward),
        of_student + max(cross_entropy.backward, 2 * of_student),
    )
    return StepLoss(memory)


def _stock(problem: Problem, distillation: Distillation) -> StepLoss:
    b, logits = problem.itemsize, problem.logits
    kept = (_STOCK_KEEPS[distillation.divergence] + 4) * logits
    # float() of float32 logits is no copy.
    forward = kept + 2 * b * logits + (4 * logits // CHUNKS if b < 4 else 0)
    # The gradients of all chunks' logits wait for both losses.
    products = b * logits + problem.hidden_bytes
    memory = LossMemory(forward, max(kept + 8 * logits // CHUNKS, products))
    return StepLoss(memory, beside_other=b * logits)


def _pieces(problem: Problem, distillation: Distillation) -> int:
    """What torchtune_lce/divergence/chunked.py holds of a piece of tokens, and of a block among these."""
    workspace, wide = distillation.workspace_mib * 2**20, max(problem.itemsize, 4)
    piece, block = (min(tokens, problem.tokens) for tokens in tokens_at_once(workspace, problem.vocabulary, wide, wide))
    block = min(block, piece)
    states = piece * (problem.features + distillation.teacher_features) * problem.itemsize
    blocks = _BLOCKS[distillation.divergence] * block * problem.vocabulary * wide
    return 2 * piece * problem.vocabulary * wide + blocks + states


def _strips(problem: Problem, distillation: Distillation) -> int:
    """What kernels/divergence_walk.py holds of a piece of tokens beside a strip, and numbers a token."""
    of_token = (problem.features + distillation.teacher_features) * problem.itemsize
    of_token += 4 * (problem.features + _SUMS * _SEGMENTS)
    blocks, tiles = -(-problem.tokens // _TILE), -(-problem.vocabulary // _TILE)
    of_tile = _TILE * problem.itemsize
    most = problem.tokens * of_token + blocks * _TILE * tiles * of_tile
    least = min(problem.tokens, _TILE) * of_token + _TILE * of_tile
    return max(min(distillation.workspace_mib * 2**20, most), least) + 64 * problem.tokens
