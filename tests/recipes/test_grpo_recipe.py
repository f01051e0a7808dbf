"""GRPO of torchtune's main branch, without the logits, against its own recipe; with the release, what that says."""

import importlib
import importlib.util

import pytest
import torch
from distributed_processes import spawn
from tiny_models import write_assets

from torchtune_lce.training.stock_recipes import load_stock_recipe

ON_MAIN = importlib.util.find_spec("torchtune.dev") is not None
RECIPE = "torchtune_lce.recipes.grpo_full_finetune_distributed"
only_on_main = pytest.mark.skipif(not ON_MAIN, reason="the installed torchtune cannot run its GRPO recipe")


@pytest.mark.skipif(ON_MAIN, reason="the installed torchtune can run it")
def test_a_torchtune_without_it_says_so():
    """Every time: what has failed to load is not there half."""
    for _ in range(2):
        with pytest.raises(
            ImportError, match="but not torchtune.dev, which that imports: it runs with torchtune's main"
        ):
            importlib.import_module(RECIPE)
    with pytest.raises(ImportError, match="no recipe dev/ppo"):
        load_stock_recipe("dev/ppo")


CASES = {"plain": (), "compiled and checkpointed": ("enable_activation_checkpointing=True", "compile=True")}


@only_on_main
def test_equals_stock(tmp_path):
    """Three steps of two updates on two ranks: what is sampled, every figure of every update, and the policy."""
    from tiny_grpo import grpo_config, train_grpo

    write_assets(tmp_path / "assets")
    runs = [
        (whose, grpo_config(tmp_path, f"{whose}, {case}", overrides))
        for case, overrides in CASES.items()
        for whose in ("stock", "ours")
    ]
    spawn(train_grpo, 2, runs)
    for case in CASES:
        stock, ours = (
            torch.load(tmp_path / f"{whose}, {case}" / "steps.pt", weights_only=True) for whose in ("stock", "ours")
        )
        assert len(ours["steps"]) == len(stock["steps"]) == 3 * (2 + 2)
        for number, (expected, found) in enumerate(zip(stock["steps"], ours["steps"], strict=True)):
            assert found.keys() == expected.keys()
            for name, value in expected.items():
                torch.testing.assert_close(
                    found[name],
                    value,
                    rtol=1e-5,
                    atol=1e-6,
                    msg=lambda text, at=(case, number, name): f"{at}: {text}",
                )
        sampled, learnt = ([step for step in stock["steps"] if name in step] for name in ("advantages", "loss"))
        assert all(trajectory["advantages"].any() for trajectory in sampled)
        assert any(trajectory["response_padding_masks"].any() for trajectory in sampled)
        assert learnt[-1]["kl_loss"] > 0
        assert any(step["clipfrac"] > 0 for step in learnt)
        assert ours["model"].keys() == stock["model"].keys()
        for name, value in stock["model"].items():
            torch.testing.assert_close(ours["model"][name], value, rtol=1e-5, atol=1e-6)


@only_on_main
@pytest.mark.parametrize(
    ("overrides", "error", "message"),
    [
        (["temperature=0"], ValueError, "temperature must be > 0, since logits are divided by it, got 0"),
        (["logprobs.logit_scale=2"], ValueError, "logprobs.logit_scale must be left out, .* got 2"),
        (["loss._component_=torchtune_lce.LinearCrossEntropyLoss"], TypeError, "loss must be torchtune's own"),
    ],
    ids=["temperature", "logit_scale", "loss"],
)
def test_bad_settings_are_refused_before_anything_is_loaded(tmp_path, overrides, error, message):
    from tiny_grpo import grpo_config

    recipe_class = importlib.import_module(RECIPE).GRPOFullFinetuneRecipeDistributed
    cfg = grpo_config(tmp_path, "refused", overrides)
    if "loss" in overrides[0]:
        cfg.loss = {"_component_": cfg.loss._component_}
    recipe = object.__new__(recipe_class)
    with pytest.raises(error, match=message):
        recipe.setup(cfg)
