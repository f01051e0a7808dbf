"""The two models of a divergence at their ends, checked; and how much of each divergence a loss is made of."""

from dataclasses import dataclass

from torch import Tensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from torchtune_lce.inputs import validation
from torchtune_lce.inputs.autocast import cast_inputs
from torchtune_lce.inputs.dtypes import HIDDEN_DTYPES, TARGET_DTYPES
from torchtune_lce.inputs.low_rank import LowRank


@dataclass(frozen=True)
class Shares:
    """How much of the loss is the forward and how much the reverse divergence; together 1."""

    forward: float
    reverse: float


@dataclass(frozen=True)
class Head:
    """One of the two models at its end: ``hidden`` [..., D], ``weight`` [V, D] and ``bias`` [V], of one dtype, or
    under autocast of any.

    ``low_rank``, of as many tokens as ``hidden``, is a part of the projection beside ``weight``.
    """

    name: str  # as in messages: student or teacher
    hidden: Tensor
    weight: Tensor
    bias: Tensor | None = None
    low_rank: LowRank | None = None

    @property
    def operands(self) -> tuple[Tensor | None, ...]:
        """All of its tensors: hidden, weight, bias, low, up, scale."""
        return self.hidden, self.weight, self.bias, *(self.low_rank or (None, None, None))

    def flat(self) -> "Head":
        """The hidden states as [N, D], all of it in the dtype that autocast wants, if it is on; ``scale`` as it is."""
        hidden, weight, bias = cast_inputs(self.hidden.reshape(-1, self.hidden.shape[-1]), self.weight, self.bias)
        low_rank = self.low_rank
        if low_rank is not None:
            # Autocast may have made the one and has not seen the other.
            low_rank = LowRank(low_rank.low.to(hidden.dtype), low_rank.up.to(hidden.dtype), low_rank.scale)
        return Head(self.name, hidden, weight, bias, low_rank)

    def without_gradient(self) -> "Head":
        hidden, weight, bias, *low_rank = (x if x is None else x.detach() for x in self.operands)
        return Head(self.name, hidden, weight, bias, None if self.low_rank is None else LowRank(*low_rank))


@dataclass(frozen=True)
class Pair:
    """What :func:`checked` has made of student, teacher and labels: all flat, and gradients reach the student alone."""

    student: Head
    teacher: Head
    labels: Tensor  # [N]
    ignore_index: int


def checked(student: Head, teacher: Head, labels: Tensor, ignore_index: int) -> Pair:
    """Raises TypeError or ValueError, by name, for whatever no divergence can be computed of."""
    check_head(student)
    check_head(teacher)
    _check_labels(student, teacher, labels)
    validation.check_ignore_index(ignore_index, labels)
    if student.weight.shape[0] != teacher.weight.shape[0]:
        raise ValueError(
            "student and teacher must have the same vocabulary, got output projections "
            f"{list(student.weight.shape)} and {list(teacher.weight.shape)}"
        )
    student, teacher = student.flat(), teacher.without_gradient().flat()
    for head in (student, teacher):
        _check_same_dtype(head)
    return Pair(student, teacher, labels.reshape(-1), ignore_index)


def check_head(head: Head) -> None:
    """Raises TypeError or ValueError, by name, for tensors of the wrong type, shape, dtype or device.

    Whether their dtypes are equal is another question: autocast may make them so.
    """
    hidden, weight, name = head.hidden, head.weight, head.name
    for what, tensor in (("hidden", hidden), ("weight", weight), ("bias", head.bias)):
        if tensor is None and what == "bias":
            continue
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name}_{what} must be a torch.Tensor, got a {type(tensor).__name__}{_chunks(tensor)}")
        if is_traceable_wrapper_subclass(tensor):
            raise TypeError(
                f"{name}_{what} must be a plain tensor, got {type(tensor).__name__}: divergences take no output "
                "projection that is quantised or split by tensor parallelism"
            )
        validation.check_dense(f"{name}_{what}", tensor)
        if tensor.device != hidden.device:
            raise ValueError(
                f"{name}_{what} must be on the device of {name}_hidden, {hidden.device}, got {tensor.device}"
            )
        if tensor.dtype not in HIDDEN_DTYPES:
            raise TypeError(f"{name}_{what} must be one of {_names(HIDDEN_DTYPES)}, got {tensor.dtype}")
    if weight.ndim != 2 or not weight.numel():
        raise ValueError(
            f"{name}_weight must have shape [V, D] with a row and a feature at least, got {list(weight.shape)}"
        )
    if hidden.ndim < 1 or hidden.shape[-1] != weight.shape[1]:
        hint = ": those are logits, call set_model_output and set_teacher_output again"
        raise ValueError(
            f"{name}_hidden must be hidden states of shape [..., {weight.shape[1]}] to match {name}_weight, "
            f"got {list(hidden.shape)}{hint if hidden.shape[-1:] == weight.shape[:1] else ''}"
        )
    if head.bias is not None and head.bias.shape != weight.shape[:1]:
        raise ValueError(
            f"{name}_bias must have shape [{weight.shape[0]}] to match {name}_weight, got {list(head.bias.shape)}"
        )


def _check_same_dtype(head: Head) -> None:
    for what, tensor in (("weight", head.weight), ("bias", head.bias)):
        if tensor is not None and tensor.dtype != head.hidden.dtype:
            raise TypeError(
                f"{head.name}_{what} must have the dtype of {head.name}_hidden, {head.hidden.dtype}, got "
                f"{tensor.dtype}: cast one of them, or call under torch.autocast"
            )


def _check_labels(student: Head, teacher: Head, labels: Tensor) -> None:
    if not isinstance(labels, Tensor):
        raise TypeError(f"labels must be a torch.Tensor, got a {type(labels).__name__}{_chunks(labels)}")
    validation.check_dense("labels", labels)
    if labels.dtype not in TARGET_DTYPES:
        raise TypeError(f"labels must be one of {_names(TARGET_DTYPES)}, got {labels.dtype}")
    for name, tensor in (("labels", labels), ("teacher_hidden", teacher.hidden)):
        if tensor.device != student.hidden.device:
            raise ValueError(
                f"{name} must be on the device of student_hidden, {student.hidden.device}, got {tensor.device}"
            )
    for head in (student, teacher):
        tokens = head.hidden.shape[:-1]
        # torchtune's distributed recipe flattens labels and student, and not the teacher.
        flattened = labels.ndim == 1 and tokens.numel() == labels.numel()
        if tokens != labels.shape and not flattened:
            raise ValueError(
                f"labels must have the shape of {head.name}_hidden without its last axis, {list(tokens)}, flattened or "
                f"not, got {list(labels.shape)}"
            )


def _chunks(value) -> str:
    """What torchtune's models return once a loss with num_output_chunks has been set."""
    return f" of {len(value)}: pass one tensor of hidden states, not chunks" if isinstance(value, (list, tuple)) else ""


def _names(dtypes) -> str:
    return ", ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
