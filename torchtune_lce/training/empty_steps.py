"""Steps without a label, which a torchtune recipe must not take: it divides by their number of labels, and every weight
becomes NaN; and were there no division, momentum and weight decay would move what no label has spoken for.

So the recipe never sees their micro-batches. Nothing is computed for them, no optimizer steps, in the backward or after
it, no schedule moves on, and nothing is logged: the run is that of data without them.
"""

import logging
from collections.abc import Iterator, Mapping

import torch.distributed as dist
from torch import Tensor
from torchtune.utils import get_logger, log_rank_zero

from torchtune_lce.training.token_range import check_tokens


class SkipsEmptySteps:
    """Stands in for a recipe's data loader: steps whose micro-batches have no label on any device are left out.

    A step without labels on some devices or in some of its micro-batches is taken as it is. Labels are counted where
    the loader puts them; several devices add an all-reduce of one number a step, and one more for each micro-batch
    before the step's first label.
    """

    def __init__(self, recipe):
        """``recipe``: a fine-tuning recipe of torchtune that has been set up."""
        self._model, self._tokenizer = recipe._model, recipe._tokenizer
        self._loader = recipe._dataloader
        self._micro_batches = recipe._gradient_accumulation_steps
        self._ignore_index = recipe._loss_fn.ignore_index
        self._device = recipe._device
        # The release's recipes shift the labels and so drop the first of each row; main's data sets have done it.
        self._first = 1 if hasattr(recipe, "ignore_labels_cache") else 0
        # Whether the micro-batches that an epoch leaves over have a label: they are of the next one's first step.
        self._left_over = False
        self._said = False

    def __iter__(self) -> Iterator[Mapping[str, Tensor]]:
        labelled, self._left_over = self._left_over, False
        held, count = [], 0
        for batch in self._loader:
            check_tokens(batch["tokens"], self._model, self._tokenizer)
            held.append(batch)
            count += 1
            labelled = labelled or self._has_labels(batch)
            while labelled and held:
                yield held.pop(0)
            if count == self._micro_batches:
                if not labelled:
                    self._say()
                labelled, held, count = False, [], 0
        # Not where the recipe stops before the end: then after a whole step.
        self._left_over = labelled

    def __len__(self) -> int:
        return len(self._loader)

    def __getattr__(self, name: str):
        """All else is the loader's own."""
        return getattr(self._loader, name)

    def _has_labels(self, batch: Mapping[str, Tensor]) -> bool:
        """On any device; all of them ask at once, and so agree on what to take."""
        labels = (batch["labels"][..., self._first :] != self._ignore_index).sum()
        if dist.is_available() and dist.is_initialized():
            labels = labels.to(self._device)
            dist.all_reduce(labels)
        return labels.item() > 0

    def _say(self) -> None:
        if self._said:
            return
        self._said = True
        log_rank_zero(
            get_logger(),
            f"A step has no label: all of its targets are ignore_index ({self._ignore_index}). It is skipped, and "
            "so is any other, without being said again: weights, optimizer and schedule stay as they are. The usual "
            "cause is a prompt longer than tokenizer.max_seq_len, whose answer is cut off",
            level=logging.WARNING,
        )
