"""Prompts, a reward and a config on which GRPO of torchtune's main branch runs in seconds; ranks import it."""

import os
from pathlib import Path

import torch
from distributed_processes import let_recipes_run_on_a_cpu
from omegaconf import DictConfig, OmegaConf
from tiny_models import recipe_config
from torch import Tensor
from torch.utils.data import Dataset
from torchtune import training

from torchtune_lce.training.stock_recipes import load_stock_recipe

GRPO = "grpo_full_finetune_distributed"
CONTEXT = 9


class Prompts(Dataset):
    """Of unlike lengths, so that batches are padded."""

    def __init__(self, tokenizer):
        generator = torch.Generator().manual_seed(0)
        self._rows = [
            torch.randint(97, 123, (CONTEXT - 3 * (index % 2),), generator=generator).tolist() for index in range(16)
        ]

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> dict:
        return {"tokens": self._rows[index], "answer": "", "question": "", "mask": [1] * len(self._rows[index])}


def rewards(tokenizer, completions: Tensor, answers: list[str], device) -> tuple[Tensor, Tensor, dict]:
    """[B, G, 1], in the shape of torchtune's: unlike within every group, whatever a model of random weights says."""
    found = (completions % 7).float().mean(-1, keepdim=True)
    return found, (found > 3).float(), {}


def grpo_config(folder: Path, name: str, overrides=()) -> DictConfig:
    """Of three steps of two updates, with ``write_assets`` in ``folder / "assets"``."""
    cfg = recipe_config(folder / "assets", folder / name, "full_finetune_distributed", tied=False, loss="unused")
    cfg.loss = {"_component_": "torchtune.dev.grpo.loss.GRPOLoss", "kl_coeff": 0.1, "epsilon": 0.02}
    # Adam's steps are as long where a gradient is next to nothing.
    cfg.optimizer = {"_component_": "torch.optim.SGD", "lr": 0.1}
    cfg.dataset = {"_component_": "tiny_grpo.Prompts"}
    cfg.ref_checkpointer = cfg.checkpointer.copy()
    cfg.ref_checkpointer.output_dir = str(folder / name / "reference")
    return OmegaConf.merge(
        cfg,
        {
            "batch_size": 2,
            "forward_batch_size": 1,
            "grpo_samples": 4,
            "max_generated_tokens": 6,
            "temperature": 0.7,
            "top_k": None,
            "ppo_epochs": 2,
            "num_steps": 3,
            "save_every_n_epochs": 1,
            # Its logs average over ranks as gloo cannot.
            "log_every_n_steps": 1000,
            "stop_token_ids": list(range(400, 500)),
            "seed": 1,
        },
        OmegaConf.from_dotlist(list(overrides)),
    )


def train_grpo(rank: int, runs: list[tuple[str, DictConfig]]) -> None:
    """Each of `runs` through its recipe, ours or stock's; every step's figures and the policy, to ``steps.pt``."""
    from torchtune_lce.recipes import grpo_full_finetune_distributed as ours

    stock = load_stock_recipe(f"dev/{GRPO}")
    # Here, since ranks have the environment of the process that they are forked from.
    os.environ["TORCH_COMPILE_BACKEND"] = "aot_eager"
    let_recipes_run_on_a_cpu()
    stock.init_process_group = stock.destroy_process_group = lambda *arguments: None
    stock.batched_rewards = rewards
    for whose, cfg in runs:
        recipe_class = (ours if whose == "ours" else stock).GRPOFullFinetuneRecipeDistributed
        recipe = recipe_class(cfg=cfg)
        recipe.setup(cfg=cfg)
        steps = _recorded(recipe)
        recipe.train()
        model = training.gather_cpu_state_dict(recipe._model, rank == 0, device=torch.device("cpu"))
        recipe.cleanup()
        if rank == 0:
            torch.save({"steps": steps, "model": model}, Path(cfg.output_dir) / "steps.pt")


def _recorded(recipe) -> list:
    """What the recipe's steps return, and the trajectories that they learn from."""
    found = []

    def recording(name: str):
        function = getattr(recipe, name)

        def call(*args, **kwargs):
            result = function(*args, **kwargs)
            found.append({key: value for key, value in result._asdict().items() if isinstance(value, Tensor)})
            return result

        setattr(recipe, name, call)

    for name in ("generate_trajectory", "grpo_step"):
        recording(name)
    return found
