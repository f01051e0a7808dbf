"""A training's token metrics by plain PyTorch, from the logits of torchtune's own recipe with its own loss."""

import os
from pathlib import Path

import torch
import torch.nn.functional as F
from omegaconf import DictConfig
from tiny_models import stock_recipe
from torch import Tensor


def recorded_stock_recipe(method: str) -> type:
    """torchtune's recipe, which leaves what its loss was called with, summed up, in its output folder."""

    class Recorded(stock_recipe(method)):
        def setup(self, cfg: DictConfig) -> None:
            super().setup(cfg)
            self._calls = []
            self._loss_fn.register_forward_pre_hook(lambda loss, inputs: self._calls.append(sums(*inputs)))

        def cleanup(self) -> None:
            super().cleanup()
            torch.save(torch.stack(self._calls), Path(self._output_dir) / f"calls.{os.environ.get('RANK', 0)}.pt")

    return Recorded


def sums(logits: Tensor | list[Tensor], labels: Tensor) -> Tensor:
    """[5] float64: right predictions, entropies, cross-entropies, squared log-sum-exps and labels."""
    if isinstance(logits, list):  # chunks of the sequence
        logits = torch.cat(logits, 1)
    used = labels.flatten() != -100
    labels, logits = labels.flatten()[used], logits.detach().flatten(0, -2)[used].double()
    right = (logits.argmax(-1) == labels).sum()
    entropy = torch.distributions.Categorical(logits=logits).entropy().sum()
    nll, squares = F.cross_entropy(logits, labels, reduction="sum"), logits.logsumexp(-1).square().sum()
    return torch.stack([right.double(), entropy, nll, squares, used.sum().double()])


def read_steps(output: Path, calls_of_steps: int | list[int]) -> list[dict[str, float]]:
    """What was to be logged at each step, all ranks' tokens counting alike; the squares without a factor."""
    calls = sum(torch.load(path, weights_only=True) for path in sorted(output.glob("calls.*.pt")))
    steps = [part.sum(0).tolist() for part in calls.split(calls_of_steps)]
    keys = "token_accuracy", "token_entropy", "token_nll", "token_z"
    return [dict(zip(keys, (value / n for value in values), strict=True)) for *values, n in steps]
