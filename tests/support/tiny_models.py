"""A tokenizer, checkpoints, data and configs, made on the spot, on which torchtune's real recipes run in a second."""

import base64
import contextlib
import importlib
import json
import re
from pathlib import Path

import pytest
import torch
from omegaconf import DictConfig, OmegaConf
from torchtune.models.llama3_2._component_builders import llama3_2
from torchtune.modules import attention_utils

from torchtune_lce.training.stock_recipes import load_stock_recipe

VOCABULARY = 512
LORA = "lora_finetune_single_device"
FULL = "full_finetune_single_device"
LORA_DISTRIBUTED = "lora_finetune_distributed"
FULL_DISTRIBUTED = "full_finetune_distributed"
QAT = "qat_distributed"
QAT_LORA = "qat_lora_finetune_distributed"
DISTILLATION = "knowledge_distillation_single_device"
DISTILLATION_DISTRIBUTED = "knowledge_distillation_distributed"
LORA_DPO = "lora_dpo_single_device"
LORA_DPO_DISTRIBUTED = "lora_dpo_distributed"
FULL_DPO_DISTRIBUTED = "full_dpo_distributed"
PPO = "ppo_full_finetune_single_device"
_CLASSES = {
    LORA: "LoRAFinetuneRecipeSingleDevice",
    FULL: "FullFinetuneRecipeSingleDevice",
    LORA_DISTRIBUTED: "LoRAFinetuneRecipeDistributed",
    FULL_DISTRIBUTED: "FullFinetuneRecipeDistributed",
    QAT: "QATRecipeDistributed",
    QAT_LORA: "QATLoRAFinetuneRecipeDistributed",
    DISTILLATION: "KDRecipeSingleDevice",
    DISTILLATION_DISTRIBUTED: "KDRecipeDistributed",
    LORA_DPO: "LoRADPORecipeSingleDevice",
    LORA_DPO_DISTRIBUTED: "LoRADPORecipeDistributed",
    FULL_DPO_DISTRIBUTED: "FullDPORecipeDistributed",
    PPO: "PPOFullFinetuneRecipeSingleDevice",
}
STOCK_LOSS = "torchtune.modules.loss.CEWithChunkedOutputLoss"
OUR_LOSS = "torchtune_lce.LinearCrossEntropyLoss"

SIZES = {
    "vocab_size": VOCABULARY,
    "num_layers": 2,
    "num_heads": 4,
    "num_kv_heads": 2,
    "embed_dim": 64,
    "max_seq_len": 256,
    "intermediate_dim": 128,
}
# Every name that Llama3Tokenizer asks for.
_SPECIAL_TOKENS = (
    "<|begin_of_text|>",
    "<|end_of_text|>",
    "<|finetune_right_pad_id|>",
    "<|step_id|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|eom_id|>",
    "<|eot_id|>",
    "<|python_tag|>",
    "<|image|>",
)


def build_model(tied: bool = True, seed: int = 0) -> torch.nn.Module:
    """A decoder as the recipes below build it, with its own random weights."""
    torch.manual_seed(seed)
    model = llama3_2(**SIZES, tie_word_embeddings=tied)
    with torch.no_grad():
        # nn.Embedding starts with a deviation of 1: as a tied head that gives losses about ten times too large.
        model.tok_embeddings.weight.mul_(0.1)
    return model


def write_assets(folder: Path) -> None:
    """tokenizer.model, data.jsonl, and the checkpoints tied.pt and untied.pt."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = (f"{base64.b64encode(bytes([byte])).decode()} {byte}" for byte in range(256))
    (folder / "tokenizer.model").write_text("\n".join(lines))
    # Different lengths, so that batches are padded; more than enough for five steps of two batches of two.
    write_chats(
        folder / "data.jsonl", [("Say the number " * (1 + i % 3), f"{i}, and again {i * i}") for i in range(24)]
    )
    for tied in (True, False):
        torch.save(build_model(tied).state_dict(), folder / f"{'tied' if tied else 'untied'}.pt")


def write_chats(path: Path, chats: list[tuple[str, str]]) -> Path:
    """One conversation a line, each a question and its answer; only the answer has labels."""
    rows = (
        {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}
        for question, answer in chats
    )
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


def recipe_config(assets: Path, output: Path, method: str, *, tied: bool, loss: str, overrides=()) -> DictConfig:
    """What a YAML file would say, five steps of two micro-batches; ``overrides`` as on torchtune's command line."""
    builder = "torchtune.models.llama3_2._component_builders."
    model = {"_component_": builder + "llama3_2", **SIZES, "tie_word_embeddings": tied}
    if method in (LORA, LORA_DISTRIBUTED, QAT_LORA):
        model |= {
            "_component_": builder + "lora_llama3_2",
            "lora_attn_modules": ["q_proj", "v_proj"],
            "apply_lora_to_mlp": False,
            "lora_rank": 4,
            "lora_alpha": 8,
        }
    cfg = {
        "output_dir": str(output),
        "model": model,
        "tokenizer": {
            "_component_": "torchtune.models.llama3.Llama3Tokenizer",
            "path": str(assets / "tokenizer.model"),
            "special_tokens": {name: 256 + i for i, name in enumerate(_SPECIAL_TOKENS)},
            "max_seq_len": 128,
        },
        "checkpointer": {
            "_component_": "torchtune.training.FullModelTorchTuneCheckpointer",
            "checkpoint_dir": str(assets),
            "checkpoint_files": ["tied.pt" if tied else "untied.pt"],
            "output_dir": str(output),
            "model_type": "LLAMA3_2",
        },
        "resume_from_checkpoint": False,
        "dataset": {
            "_component_": "torchtune.datasets.chat_dataset",
            "source": "json",
            "data_files": str(assets / "data.jsonl"),
            "cache_dir": str(assets / "cache"),
            "split": "train",
            "conversation_column": "messages",
            "conversation_style": "openai",
            "packed": False,
        },
        "seed": 1,
        "shuffle": True,
        "batch_size": 2,
        "optimizer": {"_component_": "torch.optim.AdamW", "lr": 3e-3},
        "lr_scheduler": {
            "_component_": "torchtune.training.lr_schedulers.get_cosine_schedule_with_warmup",
            "num_warmup_steps": 1,
        },
        "loss": {"_component_": loss},
        "epochs": 1,
        "max_steps_per_epoch": 5,
        "gradient_accumulation_steps": 2,
        "optimizer_in_bwd": False,
        "clip_grad_norm": None,
        "compile": False,
        "metric_logger": {
            "_component_": "torchtune.training.metric_logging.DiskLogger",
            "log_dir": str(output),
            "filename": "steps.txt",
        },
        "log_every_n_steps": 1,
        "log_peak_memory_stats": False,
        "log_level": "INFO",
        "device": "cpu",
        "dtype": "fp32",
        "enable_activation_checkpointing": False,
        "enable_activation_offloading": False,
    }
    if method in (FULL, FULL_DISTRIBUTED, QAT):
        del cfg["lr_scheduler"]
    return OmegaConf.merge(cfg, OmegaConf.from_dotlist(list(overrides)))


def stock_recipe(method: str) -> type:
    return getattr(load_stock_recipe(method), _CLASSES[method])


def our_recipe(method: str) -> type:
    return getattr(importlib.import_module(f"torchtune_lce.recipes.{method}"), _CLASSES[method])


def train(recipe_class: type, cfg: DictConfig):
    """Runs a recipe as its recipe_main does, and returns it."""
    recipe = recipe_class(cfg=cfg)
    with _attention_of(cfg.device):
        recipe.setup(cfg=cfg)
        recipe.train()
    recipe.cleanup()
    return recipe


@contextlib.contextmanager
def _attention_of(device: str):
    """Where there is a card, torchtune takes FlexAttention for packed rows on a CPU too: it has no backward there."""
    with pytest.MonkeyPatch.context() as patch:
        if device == "cpu":
            patch.setattr(attention_utils, "_SUPPORTS_FLEX_ATTENTION", False)
        yield


def logged_losses(output: Path) -> list[float]:
    """One loss a step, as torchtune logged them."""
    return [float(loss) for loss in re.findall(r" loss:(\S+)", (output / "steps.txt").read_text())]
