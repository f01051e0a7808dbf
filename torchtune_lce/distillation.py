"""Knowledge distillation losses as torchtune's recipes use them: bound to student and teacher once, then called."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor, nn
from torchtune.utils import get_logger, log_rank_zero

from torchtune_lce.divergence.choice import KERNELS, check_impl, choose, resolve
from torchtune_lce.divergence.function import divergence, divergence_and_cross_entropy
from torchtune_lce.divergence.operands import Head, Shares, check_head
from torchtune_lce.inputs import validation
from torchtune_lce.inputs.options import Options
from torchtune_lce.model.bound_model import BoundModel
from torchtune_lce.model.foreign_settings import refuses_settings_of_torchtune
from torchtune_lce.model.output_adapter import Adapter, low_rank
from torchtune_lce.model.projection import output_rows
from torchtune_lce.model.stock_calls import check_no_preference_call


class KullbackLeibler(nn.Module):
    """What the three losses share. ``shares``: of the forward and the reverse divergence in the loss."""

    def __init__(self, shares: Shares, ignore_index: int, impl: str, workspace_mib: int):
        super().__init__()
        validation.check_options(Options(ignore_index=ignore_index, workspace_mib=workspace_mib))
        check_impl(impl)
        self.ignore_index = ignore_index
        self.impl = impl
        self.workspace_mib = workspace_mib
        self._shares = shares
        # Neither is a Module, so nothing of the models is registered here: the loss has no parameters and no state.
        self._student = None
        self._teacher = None
        self._first_batch = True

    def set_model_output(self, model: nn.Module) -> None:
        """Make the student return hidden states and use its output projection from now on. After FSDP2, if it is used.

        Raises:
            TypeError, ValueError: a model whose output is not one matrix (and bias, and adapter), or has not as many
                rows as the teacher's that is bound, with what to do instead. The model is then as it was.
        """
        self._check_rows(model, "student", self._teacher)
        self._student = BoundModel(model, self._student)
        self._first_batch = True

    def set_teacher_output(self, model: nn.Module) -> None:
        """The same for the teacher, whose output projection gets no gradient, trainable or not."""
        self._check_rows(model, "teacher", self._student)
        self._teacher = BoundModel(model, self._teacher)
        self._first_batch = True

    def _check_rows(self, model: nn.Module, name: str, other: BoundModel | None) -> None:
        rows = output_rows(model)
        if other is not None and rows != other.rows:
            raise ValueError(
                f"student and teacher must have the same vocabulary, got a {name} whose output has {rows} rows, and "
                f"{other.rows} in the other's: take models with equal outputs, or release() the loss before it gets "
                "another pair"
            )

    def release(self) -> None:
        """Undo both: student and teacher give logits again. Harmless when nothing is bound."""
        for bound in (self._student, self._teacher):
            if bound is not None:
                bound.release()
        self._student = self._teacher = None

    @contextmanager
    def logits(self) -> Iterator[None]:
        """``with loss.logits():`` student and teacher give logits, compiled or not, to generate or to evaluate with."""
        with ExitStack() as stack:
            for bound in filter(None, (self._student, self._teacher)):
                stack.enter_context(bound.logits())
            yield

    def __getstate__(self) -> dict:
        """What a copy or a pickle takes; of a bound loss there is none, for it would hold two more models."""
        if self._student is not None or self._teacher is not None:
            raise TypeError("a loss that is bound to models cannot be copied: release() it first, or build another one")
        return vars(self)

    def forward(
        self,
        student_hidden: Tensor,  # [B, S, D] or [N, D]
        teacher_hidden: Tensor,  # [B, S, E] or [N, E]
        labels: Tensor | None = None,  # [B, S] or [N], required; only whether they are ignore_index matters
        normalize: bool = True,
    ) -> Tensor:
        """The divergence of the two bound models: the mean over the tokens in use, their sum without ``normalize``.

        Raises:
            RuntimeError: student or teacher is not bound.
            TypeError, ValueError: an argument of the wrong type, shape, dtype or device, by name.
        """
        check_no_preference_call(self, student_hidden, teacher_hidden, labels, normalize)
        if labels is None:
            # As a recipe calls its loss of labels.
            name = type(self).__name__
            raise TypeError(
                f"{name} compares two models and takes student_hidden, teacher_hidden and labels, got no labels: it is "
                "a kd_loss, of the knowledge_distillation recipes; as loss set torchtune_lce.LinearCrossEntropyLoss"
            )
        loss = partial(divergence, impl=self.impl, normalize=normalize)
        return self._of_heads(loss, student_hidden, teacher_hidden, labels)

    def takes_cross_entropy(self, student_hidden: Tensor, teacher_hidden: Tensor) -> bool:
        """Whether :meth:`with_cross_entropy` runs for such hidden states: ``impl`` stands for the kernels here.

        Raises RuntimeError: a model is not bound, or ``impl`` cannot run here.
        """
        bound = self._both_bound()
        dtypes = student_hidden.dtype, teacher_hidden.dtype
        has_adapter = any(model.projection.adapter is not None for model in bound)
        return resolve(self.impl, student_hidden.device, dtypes, has_adapter) == KERNELS

    def with_cross_entropy(
        self,
        student_hidden: Tensor,  # [B, S, D] or [N, D]
        teacher_hidden: Tensor,  # [B, S, E] or [N, E]
        labels: Tensor,  # [B, S] or [N]
        divergence_share: float,
    ) -> tuple[Tensor, Tensor]:
        """The mean divergence of the two bound models, and the mean cross-entropy of the student's labels with it.

        For a loss of which the former is ``divergence_share``, in (0, 1), and the latter the rest: the gradients are
        made for these shares, and NaN where others are differentiated. Nothing is left out of them.

        Raises: as a call.
        """
        losses = partial(divergence_and_cross_entropy, divergence_share=divergence_share)
        beside = ", and the labels' cross-entropy in the same walk over the vocabulary, of which nothing is left out"
        both = self._of_heads(losses, student_hidden, teacher_hidden, labels, beside)
        return both[0], both[1]

    def _of_heads(
        self,
        losses: Callable[..., Tensor],  # as divergence, but for what they alone take
        student_hidden: Tensor,
        teacher_hidden: Tensor,
        labels: Tensor,
        beside: str = "",  # of what the first batch says runs
    ) -> Tensor:
        """``losses`` of both models' ends, whose projections are there while it runs."""
        student_bound, teacher_bound = self._both_bound()
        trains = torch.is_grad_enabled()

        def of_teacher(hidden, labels, *projection):
            teacher = _head("teacher", hidden, *projection)

            def of_student(hidden, labels, *projection):
                student = _head("student", hidden, *projection)
                settings = {"ignore_index": self.ignore_index, "workspace_mib": self.workspace_mib}
                result = losses(student, teacher, labels, self._shares, **settings)
                if self._first_batch and not torch.compiler.is_compiling():
                    self._say_which(student, teacher, beside)
                    self._first_batch = False
                return result

            student = student_bound.projection
            # The backward only scales what the forward found, but for the product with an adapter's first matrix.
            read_in_backward = self.impl == "reference" or student.trained or student.adapter is not None
            with torch.set_grad_enabled(trains):
                return student.call(of_student, student_hidden, labels, read_in_backward)

        # Without gradients around the teacher: no backward touches its projection.
        with torch.no_grad():
            return teacher_bound.projection.call(of_teacher, teacher_hidden, labels)

    def _both_bound(self) -> tuple[BoundModel, BoundModel]:
        """Student and teacher."""
        if self._student is None or self._teacher is None:
            raise RuntimeError(self._unbound_message())
        return self._student, self._teacher

    def _say_which(self, student: Head, teacher: Head, beside: str) -> None:
        name = choose(self.impl, student, teacher)
        log_rank_zero(
            get_logger(),
            f"{type(self).__name__} runs impl '{name}' (set: '{self.impl}') on {student.hidden.device.type} "
            f"in {student.hidden.dtype}, output projections {_described(student)} (student) and "
            f"{_described(teacher)} (teacher){beside}.",
        )

    def _unbound_message(self) -> str:
        missing = "set_model_output(student)" if self._student is None else "set_teacher_output(teacher)"
        return (
            f"the loss was called before {missing}, so it lacks an output projection. torchtune's own recipes never "
            "call that: use `tune run torchtune_lce/recipes/knowledge_distillation_single_device.py` or "
            "`..._distributed.py`, or add `self._kd_loss_fn.set_model_output(self._model)` and "
            "`self._kd_loss_fn.set_teacher_output(self._teacher_model)` at the end of setup() to your own `tune cp` "
            "copy of a recipe"
        )

    def apply_compile_strategy(self, *args, **kwargs) -> "KullbackLeibler":
        """Nothing is left to compile here: an implementation is one operator, or brings its own compiled steps."""
        return self


def _described(head: Head) -> str:
    """Its projection."""
    if head.low_rank is None:
        return str(list(head.weight.shape))
    kind = "LoRA" if head.low_rank.scale is None else "DoRA"
    return f"{list(head.weight.shape)} with {kind} of rank {head.low_rank.up.shape[1]}"


def _head(name: str, hidden: Tensor, weight: Tensor, bias: Tensor | None, adapter: Adapter | None) -> Head:
    head = Head(name, hidden, weight, bias)
    if adapter is None:
        return head
    check_head(head)
    return replace(head, low_rank=low_rank(adapter, hidden))


class LinearForwardKLLoss(KullbackLeibler):
    """Cross-entropy of the student under the teacher's distribution, as torchtune's ``ForwardKLLoss`` defines it.

    .. code-block:: yaml

        kd_loss:
          _component_: torchtune_lce.LinearForwardKLLoss

    That is KL(teacher || student) plus the teacher's entropy, which has no gradient. From hidden states and the output
    projections of both models, without either's logits; hidden sizes may differ, the vocabulary may not.

    Args:
        ignore_index: tokens with a label of this value have no loss and no gradient.
        impl: ``cce_exact``: Triton kernels, for float32, bfloat16 and float16 on CUDA cards of compute capability 8.0
            and newer, without an adapter on either output; nothing is left out of the gradients. ``chunked``: plain
            PyTorch in bounded memory, anywhere; ``torch_compile``: the same, with what stands between the products
            fused by torch.compile; ``reference``: both full logits. ``auto`` is ``cce_exact`` where that runs, else
            ``chunked``.
        workspace_mib: the most memory in MiB that all but ``reference`` use beyond gradients and O(N + V), and
            beyond hidden states and their gradient's sum, O(N D), where the student's weight or bias is trained.

    Raises:
        TypeError, ValueError: a setting that is not accepted, by name.
    """

    @refuses_settings_of_torchtune
    def __init__(self, ignore_index: int = -100, impl: str = "auto", workspace_mib: int = 128):
        super().__init__(Shares(1.0, 0.0), ignore_index, impl, workspace_mib)


class LinearReverseKLLoss(KullbackLeibler):
    """KL(student || teacher), as torchtune's ``ReverseKLLoss`` defines it; else as :class:`LinearForwardKLLoss`."""

    @refuses_settings_of_torchtune
    def __init__(self, ignore_index: int = -100, impl: str = "auto", workspace_mib: int = 128):
        super().__init__(Shares(0.0, 1.0), ignore_index, impl, workspace_mib)


class LinearSymmetricKLLoss(KullbackLeibler):
    """``sym_kd_ratio`` of the forward and the rest of the reverse loss, as torchtune's ``SymmetricKLLoss`` mixes them;
    else as :class:`LinearForwardKLLoss`.
    """

    @refuses_settings_of_torchtune
    def __init__(
        self, sym_kd_ratio: float = 0.5, ignore_index: int = -100, impl: str = "auto", workspace_mib: int = 128
    ):
        # Written so that a NaN fails.
        if not (isinstance(sym_kd_ratio, (int, float)) and 0 <= sym_kd_ratio <= 1):
            raise ValueError(f"sym_kd_ratio must be a number in [0, 1], got {sym_kd_ratio!r}")
        super().__init__(Shares(float(sym_kd_ratio), 1.0 - sym_kd_ratio), ignore_index, impl, workspace_mib)
        self.sym_kd_ratio = sym_kd_ratio
