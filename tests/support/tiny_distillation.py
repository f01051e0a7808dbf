"""Student and teacher of unlike sizes, and configs on which torchtune's knowledge distillation recipes run."""

from pathlib import Path

import torch
from omegaconf import DictConfig, OmegaConf
from tiny_models import DISTILLATION, LORA, LORA_DISTRIBUTED, OUR_LOSS, SIZES, STOCK_LOSS, recipe_config, write_assets
from torchtune.models.llama3_2._component_builders import llama3_2

TEACHER_SIZES = SIZES | {"embed_dim": 96, "num_layers": 1, "intermediate_dim": 80}
OURS = {name: f"torchtune_lce.Linear{name}KLLoss" for name in ("Forward", "Reverse", "Symmetric")}
STOCK = {name: f"torchtune.modules.loss.{name}KLLoss" for name in OURS}
STOCK_CHUNKED = {name: f"torchtune.modules.loss.{name}KLWithChunkedOutputLoss" for name in OURS}


def build_teacher(seed: int = 5) -> torch.nn.Module:
    torch.manual_seed(seed)
    model = llama3_2(**TEACHER_SIZES, tie_word_embeddings=False)
    with torch.no_grad():
        # Untrained, it would know nothing to teach: nearly every entry as likely as any other.
        model.output.weight.mul_(3)
    return model


def write_distillation_assets(folder: Path) -> None:
    write_assets(folder)
    torch.save(build_teacher().state_dict(), folder / "teacher.pt")


def distillation_config(
    assets: Path, output: Path, method: str, *, tied: bool, divergence: str, ours: bool, overrides=()
) -> DictConfig:
    """LoRA on the student, five steps of two micro-batches; stock's losses are the chunked ones, as in its configs."""
    like = LORA if method == DISTILLATION else LORA_DISTRIBUTED
    cfg = recipe_config(assets, output, like, tied=tied, loss=OUR_LOSS if ours else STOCK_LOSS)
    student = cfg.checkpointer
    teacher = {
        "teacher_model": {
            "_component_": "torchtune.models.llama3_2._component_builders.llama3_2",
            **TEACHER_SIZES,
            "tie_word_embeddings": False,
        },
        "teacher_checkpointer": OmegaConf.merge(student, {"checkpoint_files": ["teacher.pt"]}),
        "kd_loss": {"_component_": (OURS if ours else STOCK_CHUNKED)[divergence]},
        "kd_ratio": 0.3,
    }
    return OmegaConf.merge(cfg, teacher, OmegaConf.from_dotlist(list(overrides)))
