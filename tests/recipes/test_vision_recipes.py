"""Llama 3.2 Vision through torchtune's real recipes, with images: ours beside stock's."""

from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf
from tiny_models import (
    FULL,
    LORA,
    OUR_LOSS,
    STOCK_LOSS,
    logged_losses,
    our_recipe,
    recipe_config,
    stock_recipe,
    write_assets,
)
from tiny_models import train as train_recipe
from vision_models import ADAPTERS, build_deep_fusion

STEPS = 3


@pytest.fixture(scope="module")
def assets(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("vision") / "assets"
    write_assets(folder)
    torch.save(build_deep_fusion().state_dict(), folder / "vision.pt")
    return folder


def train(assets: Path, output: Path, method: str, *, ours: bool) -> list[float]:
    loss = OUR_LOSS if ours else STOCK_LOSS
    overrides = [f"max_steps_per_epoch={STEPS}", "collate_fn=torchtune.data.padded_collate_tiled_images_and_mask"]
    cfg = recipe_config(assets, output, method, tied=False, loss=loss, overrides=overrides)
    cfg.model = {"_component_": "vision_models.build_deep_fusion", "lora": method == LORA}
    if method == LORA:
        # The recipe reads them too; the builder knows them.
        cfg.model |= ADAPTERS | {"apply_lora_to_mlp": False}
    cfg.dataset = {"_component_": "vision_models.CaptionedImages", "packed": False}
    cfg.checkpointer.checkpoint_files = ["vision.pt"]
    cfg.checkpointer.model_type = "LLAMA3_VISION"
    train_recipe(our_recipe(method) if ours else stock_recipe(method), OmegaConf.create(cfg))
    return logged_losses(output)


@pytest.mark.parametrize("method", [LORA, FULL])
def test_steps_and_checkpoint_equal_stock(assets, tmp_path, method):
    """With LoRA the adapters are trained, without it the encoder and what fuses it; the head is frozen in both."""
    stock = train(assets, tmp_path / "stock", method, ours=False)
    assert len(set(stock)) == STEPS
    # Both losses sum the same float32 products in another order.
    assert train(assets, tmp_path / "ours", method, ours=True) == pytest.approx(stock, rel=1.5e-6)
    file = Path("epoch_0") / "model-00001-of-00001.bin"
    ours, stock = (torch.load(tmp_path / run / file, weights_only=True) for run in ("ours", "stock"))
    before = torch.load(assets / "vision.pt", weights_only=True)
    assert list(ours) == list(stock)
    changed = {name for name in stock if not torch.equal(stock[name], before[name])}
    assert any(name.startswith("encoder.") for name in changed)
    assert "decoder.output.weight" not in changed
    for name in stock:
        # A step of AdamW is as large as the learning rate, whatever the gradient: tiny ones may change sign.
        torch.testing.assert_close(ours[name], stock[name], rtol=1e-4, atol=2e-5, msg=lambda m, n=name: f"{n}: {m}")
