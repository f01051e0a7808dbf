"""Accuracy and entropy of a training by plain PyTorch, from the logits of torchtune's own recipe with its own loss."""

import os
from pathlib import Path

import torch
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
    """[3] float64: right predictions, entropies and labels."""
    if isinstance(logits, list):  # chunks of the sequence
        logits = torch.cat(logits, 1)
    used = labels.flatten() != -100
    labels, logits = labels.flatten()[used], logits.detach().flatten(0, -2)[used].double()
    right = (logits.argmax(-1) == labels).sum()
    return torch.stack([right, torch.distributions.Categorical(logits=logits).entropy().sum(), used.sum()]).double()


def read_steps(output: Path, calls_of_steps: int | list[int]) -> list[dict[str, float]]:
    """What was to be logged at each step, all ranks' tokens counting alike."""
    calls = sum(torch.load(path, weights_only=True) for path in sorted(output.glob("calls.*.pt")))
    steps = [part.sum(0).tolist() for part in calls.split(calls_of_steps)]
    return [{"token_accuracy": right / n, "token_entropy": entropy / n} for right, entropy, n in steps]
