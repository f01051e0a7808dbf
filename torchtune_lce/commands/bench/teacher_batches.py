"""What divergences are measured on: a batch of a student, and the hidden states and weight of its teacher."""

from dataclasses import dataclass

import torch
from torch import Tensor

from torchtune_lce.commands.shared.batches import Batch, random_batch
from torchtune_lce.commands.shared.shapes import Shape

NEAR = "near"
_NEAR_SHARE = 1e-2  # of a student's numbers that are not its teacher's
# Of a near teacher's logits: a peaked softmax, whose large logits lose most where they are rounded.
_NEAR_LOGIT_STD = 3.0

FLOPS_FORMULA = (
    "FLOP = 2NV(D + E) forward, 2NV(2D + E) with a frozen head, 2NV(3D + E) with both gradients, D features of the "
    "student and E of its teacher; recomputation is not counted"
)


@dataclass(frozen=True)
class TeacherShape(Shape):
    """``hidden`` is the student's."""

    teacher_hidden: int

    def __str__(self) -> str:
        return f"{super().__str__()}, teacher {self.teacher_hidden}"

    def flops(self, frozen_weight: bool | None) -> float:
        """As a :class:`Shape`'s, and the teacher's logits."""
        return super().flops(frozen_weight) + 2.0 * self.tokens * self.teacher_hidden * self.vocab


@dataclass(frozen=True)
class TeacherBatch(Batch):
    teacher_hidden: Tensor  # [N, E], dtype of hidden
    teacher_weight: Tensor  # [V, E]

    @property
    def shape(self) -> TeacherShape:
        return TeacherShape(*self.hidden.shape, self.weight.shape[0], self.teacher_hidden.shape[1])

    @property
    def heads(self) -> tuple[tuple[Tensor, Tensor], ...]:
        return *super().heads, (self.teacher_hidden, self.teacher_weight)

    @property
    def others(self) -> tuple[Tensor, ...]:
        return *super().others, self.teacher_hidden, self.teacher_weight


@dataclass(frozen=True)
class Statistics:
    loss: float  # mean

    def __str__(self) -> str:
        return f"loss {self.loss:.4g}"


def teacher_batch(kind: str, shape: TeacherShape, dtype: torch.dtype, device: torch.device) -> TeacherBatch:
    """ "random": student and teacher are untrained models that have nothing in common. "near": as late in a
    distillation, each number of the student is its teacher's but for 1%, so their sizes are equal.
    """
    one, width = Shape(shape.tokens, shape.hidden, shape.vocab), shape.teacher_hidden
    if kind != NEAR:
        student = random_batch(one, dtype, device)
        teacher = random_batch(Shape(shape.tokens, width, shape.vocab), dtype, device, seed=1)
        return TeacherBatch(kind, kind, student.hidden, student.weight, student.targets, teacher.hidden, teacher.weight)
    teacher = random_batch(one, torch.float32, device)
    teacher.weight.mul_(_NEAR_LOGIT_STD / shape.hidden**0.5 / teacher.weight.std())
    change = random_batch(one, torch.float32, device, seed=1)
    hidden, weight = (
        was.add(by, alpha=_NEAR_SHARE * (was.std() / by.std()).item()).to(dtype)
        for was, by in ((teacher.hidden, change.hidden), (teacher.weight, change.weight))
    )
    return TeacherBatch(kind, kind, hidden, weight, teacher.targets, teacher.hidden.to(dtype), teacher.weight.to(dtype))
