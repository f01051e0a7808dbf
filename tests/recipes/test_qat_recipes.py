"""Quantisation-aware training: torchtune's real recipes on two processes, ours beside stock's."""

import importlib.metadata
from pathlib import Path

import pytest
import torch
from distributed_processes import RUN_AGAIN_AFTER_A_SIGNAL, spawn, train_all
from packaging.version import Version
from tiny_models import (
    OUR_LOSS,
    QAT,
    QAT_LORA,
    STOCK_LOSS,
    logged_losses,
    our_recipe,
    recipe_config,
    write_assets,
    write_chats,
)

pytestmark = RUN_AGAIN_AFTER_A_SIGNAL

# torchtune 0.6.1's LoRA layer for it does not know newer ones' settings.
TORCHAO_TAKES_LORA = Version(importlib.metadata.version("torchao")) < Version("0.12")
CASES = {
    # Rounding makes steps of what is smooth: after an update, a difference of 1e-7 in a weight may be one of 1e-1 in
    # its rounded value. So either nothing is updated, or only one update is looked at.
    "losses": (QAT, ["max_steps_per_epoch=2", "fake_quant_after_n_steps=1", "optimizer.lr=0"]),
    "update": (QAT, ["max_steps_per_epoch=1", "optimizer._component_=torch.optim.SGD", "optimizer.lr=1"]),
}
if TORCHAO_TAKES_LORA:
    CASES["lora"] = (QAT_LORA, ["max_steps_per_epoch=3"])
# Rows of both ranks in turn, of our recipes alone; E has no label. The third step of the longer ones has none at all.
EMPTY_STEPS = ["no empty step", "an empty step"]
ROWS = dict(zip(EMPTY_STEPS, ("abEcdE", "abEcEEdE"), strict=True))
ONE_ROW = ["max_steps_per_epoch=3", "batch_size=1", "shuffle=False", "gradient_accumulation_steps=1"]
SKIPPING = [QAT, QAT_LORA] if TORCHAO_TAKES_LORA else [QAT]
QUANTIZER = [
    "quantizer._component_=torchtune.training.quantization.Int8DynActInt4WeightQATQuantizer",
    "quantizer.groupsize=32",
]


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Path:
    """The folder of all runs: starting two processes costs more than they do."""
    if not hasattr(torch.cpu.Stream, "record_event"):
        pytest.skip("this torch's FSDP2 does not run on a CPU")
    folder = tmp_path_factory.mktemp("qat")
    write_assets(folder / "assets")
    prepared = []
    for name, (method, overrides) in CASES.items():
        for who, loss in (("stock", STOCK_LOSS), ("ours", OUR_LOSS)):
            output = folder / name / who
            overrides = [*overrides, *QUANTIZER]
            cfg = recipe_config(folder / "assets", output, method, tied=False, loss=loss, overrides=overrides)
            prepared.append((who == "ours", method, cfg))
    for method in SKIPPING:
        for name, rows in ROWS.items():
            output, overrides = folder / method / name, [*ONE_ROW, *QUANTIZER]
            cfg = recipe_config(folder / "assets", output, method, tied=False, loss=OUR_LOSS, overrides=overrides)
            # E: a truncated question, whose answer is lost.
            chats = [
                ("Say nothing at all. " * 20, "nothing") if row == "E" else (f"Say {row}", row * 9) for row in rows
            ]
            cfg.dataset.data_files = str(write_chats(folder / "assets" / f"{rows}.jsonl", chats))
            prepared.append((True, method, cfg))
    spawn(train_all, 2, prepared)
    return folder


@pytest.mark.parametrize("name", CASES)
def test_losses_equal_stock(runs, name):
    stock = logged_losses(runs / name / "stock")
    assert len(stock) == len(set(stock)) == int(CASES[name][1][0].rpartition("=")[2])
    # Both losses sum the same float32 products in another order.
    assert logged_losses(runs / name / "ours") == pytest.approx(stock, rel=1.5e-6)


@pytest.mark.parametrize("name", [name for name in CASES if name != "losses"])
def test_updates_equal_stock(runs, name):
    file = Path("epoch_0") / "model-00001-of-00001.bin"
    ours, stock = (torch.load(runs / name / who / file, weights_only=True) for who in ("ours", "stock"))
    before = torch.load(runs / "assets" / "untied.pt", weights_only=True)
    assert list(ours) == list(stock)
    trained = "output.weight" if name == "update" else "layers.0.attn.q_proj.weight"
    assert (stock[trained] - before[trained]).abs().max() > 1e-4
    for name in stock:
        torch.testing.assert_close(ours[name], stock[name], rtol=1e-4, atol=2e-5, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("method", SKIPPING)
def test_a_step_without_labels_is_as_if_it_were_not_there(runs, method):
    """To the bit, and so are the steps after it."""
    without, with_one = (runs / method / name for name in EMPTY_STEPS)
    losses = logged_losses(without)
    assert len(set(losses)) == 3
    assert logged_losses(with_one) == losses
    file = Path("epoch_0") / "model-00001-of-00001.bin"
    expected, weights = (torch.load(run / file, weights_only=True) for run in (without, with_one))
    assert all(torch.equal(weights[key], expected[key]) for key in expected)


@pytest.mark.skipif(TORCHAO_TAKES_LORA, reason="this torchao is old enough")
def test_lora_with_a_newer_torchao_says_which_one_it_needs(tmp_path):
    cfg = recipe_config(tmp_path, tmp_path, QAT_LORA, tied=True, loss=OUR_LOSS)
    with pytest.raises(RuntimeError, match=r"needs torchao 0.11 or older, got .*: pip install torchao==0.11.0"):
        our_recipe(QAT_LORA)(cfg)
