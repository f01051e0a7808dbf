"""Pairs of answers, and configs on which torchtune's preference recipes run in seconds."""

import json
import re
from pathlib import Path

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


def logged_metrics(output: Path) -> dict[str, list[float]]:
    """Of each step, the loss and METRICS, as torchtune logged them."""
    text = (output / "steps.txt").read_text()
    return {name: [float(value) for value in re.findall(rf" {name}:(\S+)", text)] for name in ("loss", *METRICS)}
