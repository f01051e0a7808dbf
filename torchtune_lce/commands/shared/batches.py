"""What the losses are measured on: hidden states, projection weight and targets."""

import pickle
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from torchtune_lce.commands.shared.errors import CommandError
from torchtune_lce.commands.shared.shapes import Shape

IGNORE_INDEX = -100
_TARGET_DTYPES = (torch.int64, torch.int32)
# Of the logits that random data gives: enough that nearly every tile has an entry worth keeping.
_RANDOM_LOGIT_STD = 1.28


@dataclass(frozen=True)
class Batch:
    """``data`` is "random", "trained" or "file"; ``name`` tells apart several batches of one file."""

    data: str
    name: str
    hidden: Tensor  # [N, D]
    weight: Tensor  # [V, D], dtype of hidden
    targets: Tensor  # [N] int64, IGNORE_INDEX or 0 <= t < V

    @property
    def shape(self) -> Shape:
        return Shape(*self.hidden.shape, self.weight.shape[0])

    @property
    def heads(self) -> tuple[tuple[Tensor, Tensor], ...]:
        """Hidden states and weight of every model whose logits the loss is of."""
        return ((self.hidden, self.weight),)

    @property
    def others(self) -> tuple[Tensor, ...]:
        """What a loss takes behind ``hidden`` and ``weight``."""
        return (self.targets,)

    @property
    def title(self) -> str:
        return f"{self.name} {self.shape}"

    def first(self, tokens: int) -> "Batch":
        """Its first ``tokens``, over the same memory."""
        return replace(self, hidden=self.hidden[:tokens], targets=self.targets[:tokens])


def random_batch(shape: Shape, dtype: torch.dtype, device: torch.device, seed: int = 0) -> Batch:
    """An untrained model: hidden ~ N(0, 1), weight ~ N(0, (1.28 / sqrt D)^2), targets uniform."""
    generator = torch.Generator(device).manual_seed(seed)
    hidden = torch.randn(shape.tokens, shape.hidden, generator=generator, device=device, dtype=torch.float32).to(dtype)
    weight = torch.randn(shape.vocab, shape.hidden, generator=generator, device=device, dtype=torch.float32)
    weight = weight.mul_(_RANDOM_LOGIT_STD / shape.hidden**0.5).to(dtype)
    targets = torch.randint(shape.vocab, (shape.tokens,), generator=generator, device=device)
    return Batch("random", "random", hidden, weight, targets)


def file_batches(path: Path, dtype: torch.dtype, device: torch.device) -> list[Batch]:
    """Batches saved with torch.save: {"hidden", "weight", "targets"}, or {name: (hidden, weight, targets)}.

    They are brought to ``dtype`` and ``device``. Raises CommandError for a file that holds something else.
    """
    wanted = (
        f'--file: {path} must hold {{"hidden", "weight", "targets"}} or {{name: (hidden, weight, targets)}}, a dict of '
        "tensors alone, written by torch.save"
    )
    try:
        saved = torch.load(path, map_location="cpu", weights_only=True)
    except (RuntimeError, EOFError, pickle.UnpicklingError) as error:
        # Its own text advises to load whatever it is, which would run what is in the file.
        raise CommandError(f"{wanted}; torch.load(weights_only=True) does not read it") from error
    if not isinstance(saved, dict) or not saved:
        raise CommandError(f"{wanted}; it holds a {type(saved).__name__}{' of nothing' * (saved == {})}")
    if set(saved) == {"hidden", "weight", "targets"}:
        saved = {path.stem: (saved["hidden"], saved["weight"], saved["targets"])}
    elif any(isinstance(value, Tensor) for value in saved.values()):
        raise CommandError(f"{wanted}; it holds {', '.join(map(repr, saved))}")
    return [_checked_batch(path, name, tensors, dtype, device) for name, tensors in saved.items()]


def _checked_batch(path: Path, name: str, tensors: object, dtype: torch.dtype, device: torch.device) -> Batch:
    wanted = f"--file: {path}: {name!r} must be a tuple of tensors hidden [N, D], weight [V, D] and targets [N]"
    if not isinstance(tensors, (tuple, list)) or not all(isinstance(x, Tensor) for x in tensors):
        raise CommandError(f"{wanted}, got a {type(tensors).__name__}")
    if [x.ndim for x in tensors] != [2, 2, 1]:
        raise CommandError(f"{wanted}, got {', '.join(str(list(x.shape)) for x in tensors)}")
    hidden, weight, targets = tensors
    if hidden.shape[1] != weight.shape[1] or hidden.shape[0] != targets.shape[0] or not weight.numel():
        raise CommandError(f"{wanted}, got {list(hidden.shape)}, {list(weight.shape)}, {list(targets.shape)}")
    if not hidden.is_floating_point() or not weight.is_floating_point() or targets.dtype not in _TARGET_DTYPES:
        raise CommandError(
            f"{wanted}, floating and int64 or int32, got {hidden.dtype}, {weight.dtype} and {targets.dtype}"
        )
    valid = targets[targets != IGNORE_INDEX]
    if not len(valid) or valid.min() < 0 or valid.max() >= weight.shape[0]:
        raise CommandError(
            f"{wanted}; every target must be {IGNORE_INDEX} or in [0, {weight.shape[0]}), some of them in"
        )
    hidden, weight = (tensor.to(device, dtype).contiguous() for tensor in (hidden, weight))
    return Batch("file", name, hidden, weight, targets.to(device, torch.int64).contiguous())
