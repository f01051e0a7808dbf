"""The arguments of one call, checked once, in the form that everything below takes."""

from __future__ import annotations  # torch 2.8 compiles nested functions, but not `Tensor | None`

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from torchtune_lce.inputs import validation
from torchtune_lce.inputs.autocast import cast_inputs
from torchtune_lce.inputs.dtypes import accumulation_dtype, has_float64
from torchtune_lce.inputs.low_rank import LowRank
from torchtune_lce.inputs.options import Options
from torchtune_lce.inputs.shard import VocabularyShard


@dataclass(frozen=True, eq=False)
class Call:
    """What :func:`checked` has made of a call's arguments, and what a bound loss puts beside them, ``low_rank``.

    ``hidden``, ``weight`` and ``bias`` are of one dtype. With a ``shard`` the latter two are this rank's rows of the
    vocabulary that ``labels`` are in. ``low_rank``, of as many tokens as ``hidden`` and not with ``shard``, is a part
    of the projection beside ``weight``. ``given`` is for whoever asks how torch differentiates: under torch.func what
    is made of a constant looks like what is differentiated.
    """

    hidden: Tensor  # [N, D]
    weight: Tensor  # [V, D]
    bias: Tensor | None  # [V]
    labels: Tensor  # [N] int64 | int32, each with the hidden state that predicts it: ignore_index, or see in_range
    options: Options
    shape: torch.Size  # of targets as they came
    shift: int
    given: tuple[Tensor | None, ...]  # hidden, weight and bias as they came
    in_range: bool = True  # all other labels are entries; False where nobody could look
    low_rank: LowRank | None = None
    shard: VocabularyShard | None = None
    summed: bool = False  # of its losses only a sum or a mean is differentiated, and no log-sum-exp
    with_entropy: bool = False  # wanted from whoever has it at hand

    @property
    def vocabulary(self) -> int:
        """The entries of all ranks together."""
        return self.weight.shape[0] if self.shard is None else self.shard.vocabulary

    @property
    def valid(self) -> Tensor:
        """[N] bool: the tokens that are not ignored."""
        return self.labels != self.options.ignore_index

    @property
    def operands(self) -> tuple[Tensor | None, ...]:
        """What the logits are made of: hidden, weight, bias, and low, up and scale of the low rank."""
        return self.hidden, self.weight, self.bias, *(self.low_rank or (None, None, None))

    @property
    def means_by_product(self) -> bool:
        """Whether the means of the logits, which label smoothing needs, are products with the mean row, in float64.

        Those of capped logits are not.
        """
        return self.options.softcap is None and has_float64(self.hidden.device)

    def without_labels_outside(self) -> tuple[Call, Tensor | None]:
        """The same with every label an entry or ignored, so that nothing reads out of bounds, and which, [N] bool, were
        neither and are now 0; None where that cannot be.
        """
        if self.in_range:
            return self, None
        labels, options = self.labels, self.options
        outside = validation.out_of_range(labels, self.vocabulary, options.ignore_index)
        if options.ignore_index == 0:
            # What stands in for a bad label, 0, must not be ignored.
            labels, options = labels.where(labels != 0, -1), replace(options, ignore_index=-1)
        return replace(self, labels=labels.where(~outside, 0), options=options, in_range=True), outside

    def at_targets(self, values: Tensor) -> Tensor:
        """Values [N] back at their targets; the positions rolled round are shifted off, so they hold 0."""
        values = values.reshape(self.shape)
        # All of them are, where the shift is at least as long as the axis.
        rolls = self.shift and values.ndim and self.shift < self.shape[-1]
        return values.roll(self.shift, -1) if rolls else values


def checked(
    hidden: Tensor,  # [..., D]
    weight: Tensor,  # [V, D]
    targets: Tensor,  # [...]
    bias: Tensor | None,  # [V]
    *,
    options: Options,
    shift: int = 0,
    shard: VocabularyShard | None = None,
    look: bool = False,
    if_too_large: str = "",
) -> Call:
    """The call that these arguments make.

    ``look``: at the values of ``targets`` on a GPU too, which waits for it. ``if_too_large``, in which ``{vocabulary}``
    stands for V, ends the message where a target is V or more.

    Raises:
        TypeError, ValueError: an argument of the wrong type, shape, dtype, device or value, by name.
    """
    validation.check_options(options)
    validation.check_shift(shift)
    validation.check_plain(hidden, weight, targets, bias)
    validation.check_tensors(hidden, weight, targets, bias)
    given = hidden, weight, bias
    hidden, weight, bias = cast_inputs(hidden, weight, bias)
    validation.check_same_dtype(hidden, weight, bias)
    validation.check_softcap(options.softcap, accumulation_dtype(hidden.dtype))
    validation.check_ignore_index(options.ignore_index, targets)
    labels = (_aligned(targets, shift, options.ignore_index) if shift else targets).reshape(-1)
    hidden = hidden.reshape(-1, hidden.shape[-1])
    looks = (look or labels.device.type == "cpu") and validation.is_readable(labels)
    call = Call(hidden, weight, bias, labels, options, targets.shape, shift, given, in_range=looks, shard=shard)
    if looks:
        hint = if_too_large.format(vocabulary=call.vocabulary)
        validation.check_range(labels, call.vocabulary, options.ignore_index, hint)
    return call


def _aligned(targets: Tensor, shift: int, ignore_index: int) -> Tensor:
    """Targets moved to the hidden state that predicts them: moving int labels is cheaper than slicing hidden states."""
    aligned = torch.full_like(targets, ignore_index)
    if targets.ndim and shift < targets.shape[-1]:
        aligned[..., :-shift] = targets[..., shift:]
    return aligned
