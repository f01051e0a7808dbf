"""QLoRA and QDoRA: torchtune's real recipe on a model whose frozen weights are NF4, ours beside stock's."""

from pathlib import Path

import pytest
import torch
from tiny_models import (
    LORA,
    OUR_LOSS,
    SIZES,
    STOCK_LOSS,
    logged_losses,
    our_recipe,
    recipe_config,
    stock_recipe,
    write_assets,
)
from tiny_models import train as train_recipe
from torchao.dtypes.nf4tensor import NF4Tensor
from torchtune.models.llama3_2._component_builders import llama3_2

# Every quantised weight must hold a whole number of NF4's blocks of blocks, 64 x 256 entries.
WIDE = SIZES | {"embed_dim": 128, "num_kv_heads": 4, "intermediate_dim": 256}
STEPS = 3


@pytest.fixture(scope="module")
def assets(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("quantised") / "assets"
    write_assets(folder)
    torch.manual_seed(0)
    model = llama3_2(**WIDE)
    with torch.no_grad():
        model.tok_embeddings.weight.mul_(0.1)
    torch.save(model.state_dict(), folder / "wide.pt")
    return folder


def train(assets: Path, output: Path, *, ours: bool, use_dora: bool):
    overrides = [f"model.{name}={size}" for name, size in WIDE.items()]
    overrides += [
        f"model.use_dora={use_dora}",
        f"max_steps_per_epoch={STEPS}",
        "checkpointer.checkpoint_files=[wide.pt]",
    ]
    loss = OUR_LOSS if ours else STOCK_LOSS
    cfg = recipe_config(assets, output, LORA, tied=True, loss=loss, overrides=[*overrides, "model.quantize_base=True"])
    recipe = train_recipe(our_recipe(LORA) if ours else stock_recipe(LORA), cfg)
    return logged_losses(output), recipe


@pytest.mark.parametrize("use_dora", [False, True], ids=["QLoRA", "QDoRA"])
def test_steps_and_adapters_equal_stock(assets, tmp_path, use_dora):
    stock, _ = train(assets, tmp_path / "stock", ours=False, use_dora=use_dora)
    losses, recipe = train(assets, tmp_path / "ours", ours=True, use_dora=use_dora)
    assert len(set(stock)) == STEPS
    # Both losses sum the same float32 products in another order.
    assert losses == pytest.approx(stock, rel=1.5e-6)

    kinds = {name: type(parameter.data) for name, parameter in recipe._model.named_parameters()}
    assert kinds["layers.0.attn.q_proj.weight"] is NF4Tensor
    assert kinds["layers.1.mlp.w1.weight"] is NF4Tensor
    assert kinds["tok_embeddings.weight"] is torch.Tensor
    adapters = [
        torch.load(tmp_path / run / "epoch_0" / "adapter_model.pt", weights_only=True) for run in ("ours", "stock")
    ]
    assert list(adapters[0]) == list(adapters[1])
    assert any("magnitude" in name for name in adapters[0]) == use_dora
    for name in adapters[0]:
        # A step of AdamW is as large as the learning rate, whatever the gradient: tiny ones may change sign.
        torch.testing.assert_close(adapters[0][name], adapters[1][name], rtol=1e-4, atol=2e-5)
