"""Policy, reward and value models, prompts, and a config on which torchtune's PPO recipe runs in seconds."""

import json
import re
from pathlib import Path

import torch
from omegaconf import DictConfig, OmegaConf
from tiny_models import FULL, SIZES, recipe_config, write_assets
from torchtune.models.mistral._component_builders import mistral_classifier

PPO_LOSS = "torchtune.rlhf.loss.PPOLoss"
_CLASSIFIER = SIZES | {"num_classes": 1}
# What the recipe logs of each step, but for its speed.
METRICS = (
    "scores",
    "num_stop_tokens",
    "rlhf_reward",
    "kl",
    "kl_reward",
    "loss",
    "policy_loss",
    "value_loss",
    "clipfrac",
    "ratios",
    "approx_policy_kl",
    "response_lengths",
)


def write_ppo_assets(folder: Path) -> None:
    write_assets(folder)
    torch.manual_seed(7)
    torch.save(mistral_classifier(**_CLASSIFIER).state_dict(), folder / "reward.pt")
    # Of different lengths, so that prompts are padded; five steps an epoch.
    prompts = ["Say the number " * (1 + i % 3) + str(i) for i in range(20)]
    (folder / "prompts.jsonl").write_text("\n".join(json.dumps({"prompt": prompt}) for prompt in prompts))


def ppo_config(assets: Path, output: Path, *, tied: bool, steps: int = 10, overrides=()) -> DictConfig:
    """``steps`` of four trajectories, each step two epochs of two mini-batches."""
    cfg = recipe_config(assets, output, FULL, tied=tied, loss=PPO_LOSS)
    policy = cfg.checkpointer

    def checkpointer(file: str, kind: str, folder: str) -> DictConfig:
        changes = {"checkpoint_files": [file], "model_type": kind, "output_dir": str(output / folder)}
        return OmegaConf.merge(policy, changes)

    cfg = OmegaConf.merge(
        cfg,
        {
            "policy_model": cfg.model,
            "reward_and_value_model": {
                "_component_": "torchtune.models.mistral._component_builders.mistral_classifier",
                **_CLASSIFIER,
            },
            "ref_policy_checkpointer": checkpointer(policy.checkpoint_files[0], policy.model_type, "policy"),
            "value_checkpointer": checkpointer("reward.pt", "REWARD", "value"),
            "reward_checkpointer": checkpointer("reward.pt", "REWARD", "value"),
            "dataset": {
                "_component_": "torchtune.datasets.text_completion_dataset",
                "source": "json",
                "data_files": str(assets / "prompts.jsonl"),
                "cache_dir": str(assets / "cache"),
                "split": "train",
                "column": "prompt",
                "add_eos": False,
            },
            "batch_size": 4,
            "num_steps": 4 * steps,
            "ppo_epochs": 2,
            "ppo_batch_size": 2,
            "gradient_accumulation_steps": 1,
            "forward_batch_size": 2,
            "max_generated_tokens": 6,
            "temperature": 0.7,
            "top_k": None,
            "enable_kv_cache": True,
            "min_response_length": None,
            "penalise_no_eos": False,
            "reward_penalty": -3,
            "stop_token_ids": list(range(0, SIZES["vocab_size"], 16)),
            "whiten_rewards": False,
            "gamma": 1,
            "lmbda": 0.95,
            "kl_coeff": 0.01,
            "optimizer": {"lr": 1e-3},
        },
    )
    del cfg.model, cfg.dataset["conversation_column"], cfg.dataset["conversation_style"], cfg.dataset["packed"]
    return OmegaConf.merge(cfg, OmegaConf.from_dotlist(list(overrides)))


def logged_metrics(output: Path) -> dict[str, list[float]]:
    """Of each step, as torchtune logged them."""
    text = (output / "steps.txt").read_text()
    return {name: [float(value) for value in re.findall(rf" {name}:(\S+)", text)] for name in METRICS}
