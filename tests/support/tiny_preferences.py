"""Pairs of answers, and configs on which torchtune's preference recipes run in seconds."""

import json
import re
from pathlib import Path

import pytest
import torch
from omegaconf import DictConfig, OmegaConf
from tiny_models import (
    FULL_DISTRIBUTED,
    FULL_DPO_DISTRIBUTED,
    LORA,
    LORA_DISTRIBUTED,
    LORA_DPO,
    recipe_config,
    write_assets,
)

DPO_LOSS = "torchtune.rlhf.loss.DPOLoss"
RSO_LOSS = "torchtune.rlhf.loss.RSOLoss"
# What the recipes log of each step beside its loss.
METRICS = (
    "rewards/chosen",
    "rewards/rejected",
    "rewards/accuracies",
    "rewards/margins",
    "log_probs/chosen",
    "log_probs/rejected",
    "logits/chosen",
    "logits/rejected",
)
# Of float32: both sum the same products in another order.
ROUNDING = 1e-5
_ALIKE = {LORA_DPO: LORA, FULL_DPO_DISTRIBUTED: FULL_DISTRIBUTED}


def write_preference_assets(folder: Path) -> None:
    write_assets(folder)
    # Of different lengths, so that batches are padded; enough for ten steps of two batches of two on two devices.
    pairs = [("Say the number " * (1 + i % 3), f"{i}, and again {i * i}", f"{'no ' * (i % 4)}{i}") for i in range(80)]
    write_pairs(folder / "pairs.jsonl", pairs)


def write_pairs(path: Path, pairs: list[tuple[str, str, str]]) -> Path:
    """One pair a line: a question, the chosen answer and the rejected one; only answers have labels."""
    path.write_text(
        "\n".join(
            json.dumps({"chosen": _chat(question, chosen), "rejected": _chat(question, rejected)})
            for question, chosen, rejected in pairs
        )
    )
    return path


def _chat(question: str, answer: str) -> list[dict]:
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def preference_config(
    assets: Path, output: Path, method: str, *, tied: bool, loss: str = DPO_LOSS, steps: int = 10, overrides=()
) -> DictConfig:
    """A DPO recipe's config, ten steps of two micro-batches of two pairs; the loss is torchtune's in any case."""
    cfg = recipe_config(assets, output, _ALIKE.get(method, LORA_DISTRIBUTED), tied=tied, loss=loss)
    cfg = OmegaConf.merge(
        cfg,
        {
            "dataset": {
                "_component_": "torchtune.datasets.preference_dataset",
                "source": "json",
                "data_files": str(assets / "pairs.jsonl"),
                "cache_dir": str(assets / "cache"),
                "split": "train",
            },
            "max_steps_per_epoch": steps,
            "save_adapter_weights_only": False,
        },
    )
    del cfg.dataset["conversation_column"], cfg.dataset["conversation_style"], cfg.dataset["packed"]
    if method == FULL_DPO_DISTRIBUTED:
        cfg.ref_checkpointer = cfg.checkpointer
        cfg.lr_scheduler = None
    return OmegaConf.merge(cfg, OmegaConf.from_dotlist(list(overrides)))


def on_output(cfg: DictConfig) -> DictConfig:
    """The same, of an untied head, with an adapter on it, which this model's own builder has not."""
    del cfg.model["tie_word_embeddings"]
    cfg.model._component_ = "torchtune.models.llama3._component_builders.lora_llama3"
    cfg.model.apply_lora_to_output = True
    cfg.checkpointer.model_type = "LLAMA3"
    return cfg


def logged_metrics(output: Path) -> dict[str, list[float]]:
    """Of each step, the loss and METRICS, as torchtune logged them."""
    text = (output / "steps.txt").read_text()
    return {name: [float(value) for value in re.findall(rf" {name}:(\S+)", text)] for name in ("loss", *METRICS)}


def assert_equal_steps(ours: Path, stock: Path, steps: int = 10, tolerance: float = ROUNDING) -> None:
    """Loss and METRICS of two runs, which must be of so many steps."""
    ours, stock = logged_metrics(ours), logged_metrics(stock)
    assert len(stock["loss"]) == steps
    # LoRA starts as the reference does, and warms up from a rate of 0.
    assert len(set(stock["loss"])) >= steps - 1, "stock's losses must change, or equality says nothing"
    # While the policy is the reference still, as in the first step, rounding alone decides.
    undecided = [abs(margin) <= tolerance for margin in stock["rewards/margins"]]
    for name in ("loss", *METRICS):
        if name == "rewards/accuracies":
            ours[name] = [b if tie else a for a, b, tie in zip(ours[name], stock[name], undecided, strict=True)]
        assert ours[name] == pytest.approx(stock[name], rel=tolerance, abs=tolerance), name
    for name in ("logits/chosen", "logits/rejected"):
        # Numbers near 0, of which the above would say little.
        assert ours[name] == pytest.approx(stock[name], abs=tolerance * max(map(abs, stock[name]))), name


def saved(output: Path, file: str = "adapter_model.pt", epoch: int = 0) -> dict:
    return torch.load(output / f"epoch_{epoch}" / file, weights_only=True)


def assert_equal_checkpoints(ours: Path, stock: Path, adapters: bool = True) -> None:
    for file in ("model-00001-of-00001.bin", *(["adapter_model.pt"] if adapters else [])):
        weights, expected = saved(ours, file), saved(stock, file)
        assert list(weights) == list(expected)
        for name in expected:
            # A step of AdamW is as large as its rate, whatever the gradient: of tiny ones it makes more of rounding.
            torch.testing.assert_close(
                weights[name], expected[name], rtol=ROUNDING, atol=ROUNDING, msg=lambda m, n=name: f"{n}: {m}"
            )
