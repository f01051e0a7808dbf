"""Our recipes beside torchtune's own, both really run: the same losses step by step, the same checkpoints."""

import logging
import re
import shutil
import sys
from pathlib import Path

import pytest
import torch
from interpreted import INTERPRETED
from tiny_distillation import distillation_config, write_distillation_assets
from tiny_models import (
    DISTILLATION,
    FULL,
    LORA,
    OUR_LOSS,
    SIZES,
    STOCK_LOSS,
    VOCABULARY,
    build_model,
    logged_losses,
    our_recipe,
    recipe_config,
    stock_recipe,
    train,
    write_assets,
    write_chats,
)
from torchtune.models.llama3_2._component_builders import llama3_2

from torchtune_lce.loss import LinearCrossEntropyLoss

# Both losses sum the same float32 products in another order; the largest difference seen over five steps is 2e-7.
ROUNDING = 1.5e-6


class Runs:
    """Runs recipes on one set of assets; the stock run that several tests compare with runs once."""

    def __init__(self, folder: Path):
        self.assets = folder / "assets"
        self._folder = folder
        self._stock = {}
        self._count = 0
        write_assets(self.assets)

    def output(self) -> Path:
        self._count += 1
        return self._folder / f"run{self._count}"

    def config(self, method, *, tied=True, loss=OUR_LOSS, overrides=()):
        return recipe_config(self.assets, self.output(), method, tied=tied, loss=loss, overrides=overrides)

    def ours(self, method, **settings) -> tuple[list[float], Path]:
        return self._run(our_recipe(method), self.config(method, **settings))

    def stock(self, method, *, tied=True, overrides=()) -> tuple[list[float], Path]:
        key = (method, tied, tuple(overrides))
        if key not in self._stock:
            cfg = self.config(method, tied=tied, loss=STOCK_LOSS, overrides=overrides)
            self._stock[key] = self._run(stock_recipe(method), cfg)
        return self._stock[key]

    def resumed(self, recipe, loss, method, finished: Path) -> list[float]:
        """The second epoch of a run of two, from a copy of what it had written after its first."""
        output = self.output()
        shutil.copytree(finished, output, ignore=shutil.ignore_patterns("epoch_1", "steps.txt"))
        overrides = ["epochs=2", "resume_from_checkpoint=True"]
        if method == FULL:
            overrides.append("checkpointer.checkpoint_files=[epoch_0/model-00001-of-00001.bin]")
        return self._run(recipe, recipe_config(self.assets, output, method, tied=True, loss=loss, overrides=overrides))[
            0
        ]

    @staticmethod
    def _run(recipe, cfg) -> tuple[list[float], Path]:
        output = Path(cfg.output_dir)
        train(recipe, cfg)
        return logged_losses(output), output


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Runs:
    return Runs(tmp_path_factory.mktemp("recipes"))


def assert_equal_steps(ours: list[float], stock: list[float], tolerance: float = ROUNDING, steps: int = 5) -> None:
    assert len(stock) == steps
    assert len(set(stock)) == steps, "stock's losses must change, or equality says nothing"
    assert ours == pytest.approx(stock, rel=tolerance)


def saved(output: Path, epoch: int = 0, name: str = "model-00001-of-00001.bin") -> dict:
    return torch.load(output / f"epoch_{epoch}" / name, weights_only=True)


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("method", [LORA, FULL])
def test_five_steps_and_checkpoint_equal_stock(runs, method, tied):
    losses, output = runs.ours(method, tied=tied)
    stock_losses, stock_output = runs.stock(method, tied=tied)
    assert_equal_steps(losses, stock_losses)

    files = ["model-00001-of-00001.bin"] + (["adapter_model.pt"] if method == LORA else [])
    for file in files:
        ours, stock = saved(output, name=file), saved(stock_output, name=file)
        assert list(ours) == list(stock)
        for name in stock:
            # A step of AdamW is as large as the learning rate, whatever the gradient: tiny ones may change sign.
            torch.testing.assert_close(ours[name], stock[name], rtol=1e-4, atol=1e-5)
    build_model(tied).load_state_dict(saved(output), strict=True)


@pytest.mark.parametrize(
    ("method", "overrides"),
    [
        (LORA, ["dataset.packed=True", "gradient_accumulation_steps=1", "batch_size=1"]),
        (FULL, ["dataset.packed=True", "gradient_accumulation_steps=1", "batch_size=1"]),
        (LORA, ["gradient_accumulation_steps=1"]),
        (FULL, ["gradient_accumulation_steps=3", "max_steps_per_epoch=4"]),
        (LORA, ["model.use_dora=True"]),
        (LORA, ["enable_activation_checkpointing=True"]),
        (FULL, ["enable_activation_checkpointing=True", "clip_grad_norm=0.1"]),
        (FULL, ["dataset.train_on_input=True"]),
        (FULL, ["optimizer_in_bwd=True", "gradient_accumulation_steps=1"]),
    ],
    ids=lambda value: value if isinstance(value, str) else "-".join(value),
)
def test_variants_equal_stock(runs, method, overrides):
    losses, _ = runs.ours(method, overrides=overrides)
    stock, _ = runs.stock(method, overrides=overrides)
    assert_equal_steps(losses, stock, steps=4 if "max_steps_per_epoch=4" in overrides else 5)


@pytest.mark.parametrize("method", [LORA, FULL])
def test_compile_equals_stock(runs, method, monkeypatch, caplog):
    """The backend that torchtune reads from here: what is traced is the same, and no C++ compiler is needed."""
    monkeypatch.setenv("TORCH_COMPILE_BACKEND", "eager")
    recipe = our_recipe(method)
    cfg = runs.config(method, tied=False, overrides=["compile=True"])
    trained = train(recipe, cfg)
    assert type(trained._loss_fn) is LinearCrossEntropyLoss
    stock, _ = runs.stock(method, tied=False, overrides=["compile=True"])
    assert_equal_steps(logged_losses(Path(cfg.output_dir)), stock)


@pytest.mark.parametrize("method", [LORA, FULL])
def test_bfloat16_within_its_rounding(runs, method):
    losses, _ = runs.ours(method, overrides=["dtype=bf16"])
    stock, _ = runs.stock(method, overrides=["dtype=bf16"])
    # Logits are rounded to bfloat16 in both, their gradients in different places; a step's loss is a mean of many.
    assert_equal_steps(losses, stock, tolerance=torch.finfo(torch.bfloat16).eps / 4)


@pytest.mark.parametrize("impl", ["reference", "chunked", pytest.param("cce", marks=INTERPRETED)])
def test_impl_comes_from_the_config(runs, impl, caplog):
    caplog.set_level(logging.INFO)
    losses, _ = runs.ours(FULL, overrides=[f"loss.impl={impl}", "loss.workspace_mib=64"])
    assert_equal_steps(losses, runs.stock(FULL)[0])
    said = [record for record in caplog.records if "Linear cross-entropy runs" in record.message]
    assert len(said) == 1
    assert f"impl '{impl}'" in said[0].message
    assert said[0].name.startswith("torchtune.")
    assert said[0].levelno == logging.INFO


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("use_dora", [False, True], ids=["lora", "dora"])
def test_adapter_on_the_output(runs, use_dora, dropout):
    def lora_on_output(cfg):
        cfg.model.use_dora = use_dora
        cfg.model.lora_dropout = dropout
        cfg.enable_activation_checkpointing = bool(dropout)
        del cfg.model["tie_word_embeddings"]
        cfg.model._component_ = "torchtune.models.llama3._component_builders.lora_llama3"
        cfg.model.apply_lora_to_output = True
        cfg.checkpointer.model_type = "LLAMA3"
        return cfg

    # torchtune's chunked loss runs the output layer on pieces of the hidden states, and draws dropout for each.
    whole = "torch.nn.CrossEntropyLoss" if dropout else STOCK_LOSS
    stock = lora_on_output(runs.config(LORA, tied=False, loss=whole))
    ours = lora_on_output(runs.config(LORA, tied=False))
    train(stock_recipe(LORA), stock)
    train(our_recipe(LORA), ours)
    stock, ours = Path(stock.output_dir), Path(ours.output_dir)
    assert_equal_steps(logged_losses(ours), logged_losses(stock))
    adapters, stock_adapters = (saved(folder, name="adapter_model.pt") for folder in (ours, stock))
    assert adapters.keys() == stock_adapters.keys()
    assert ("output.magnitude" in adapters) == use_dora
    assert adapters["output.lora_b.weight"].abs().max() > 1e-3
    for name in filter(lambda name: name.startswith("output."), adapters):
        torch.testing.assert_close(adapters[name], stock_adapters[name], rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("method", [LORA, FULL])
def test_resume(runs, method):
    """Two epochs, cut after the first: ours and stock go on alike, from what either of them wrote."""
    overrides = ["epochs=2"]
    losses, output = runs.ours(method, overrides=overrides)
    stock, stock_output = runs.stock(method, overrides=overrides)
    assert_equal_steps(losses, stock, steps=10)
    expected = runs.resumed(stock_recipe(method), STOCK_LOSS, method, stock_output)
    assert_equal_steps(runs.resumed(our_recipe(method), OUR_LOSS, method, output), expected)
    assert_equal_steps(runs.resumed(stock_recipe(method), STOCK_LOSS, method, output), expected)
    assert_equal_steps(runs.resumed(our_recipe(method), OUR_LOSS, method, stock_output), expected)
    if method == FULL:
        # torchtune 0.6.1's LoRA runs of limited epochs do not go on as if never stopped; its full runs do.
        assert_equal_steps(expected, stock[5:])


def test_batch_without_labels_trains_on(runs):
    """One micro-batch of the two has only truncated questions; torchtune's own loss divides 0 by 0 there."""
    question = "Say nothing at all. " * 20
    chats = write_chats(runs.assets / "unlabelled.jsonl", [(question, "nothing"), ("Say one", "one, of course")] * 5)
    cfg = runs.config(FULL, overrides=[f"dataset.data_files={chats}", "batch_size=1", "shuffle=False"])
    recipe = train(our_recipe(FULL), cfg)
    labelled = [any(label != -100 for label in row["labels"][1:]) for row in recipe._dataloader.dataset]
    assert labelled == [False, True] * 5
    losses = logged_losses(Path(cfg.output_dir))
    assert len(losses) == 5
    assert losses[-1] < losses[0]
    assert all(torch.isfinite(tensor).all() for tensor in saved(Path(cfg.output_dir)).values())


EMPTY = ("Say nothing at all. " * 20, "nothing")  # truncated: the answer is lost
ANSWERED = [("Say one", "one, of course"), ("Say two", "two and a half"), ("Say three", "three"), ("Say four", "4, 5")]
ONE_BY_ONE = ["batch_size=1", "shuffle=False", "max_steps_per_epoch=2"]


@pytest.mark.parametrize(
    ("method", "overrides", "kept", "with_empty_steps"),
    [
        (FULL, ["clip_grad_norm=0.1"], "ab", "EaEEb"),
        (FULL, ["optimizer_in_bwd=True"], "ab", "aEb"),
        (LORA, ["gradient_accumulation_steps=2"], "EabE", "EaEEEEbE"),
        (DISTILLATION, ["gradient_accumulation_steps=2"], "abEc", "EEabEEEc"),
    ],
    ids=["clipping", "optimizer in backward", "accumulation", "distillation"],
)
def test_a_step_without_labels_is_as_if_it_were_not_there(runs, caplog, method, overrides, kept, with_empty_steps):
    """To the bit, weights and optimizer: neither momentum nor decay moves them, and the schedule waits."""
    overrides = [*ONE_BY_ONE, "gradient_accumulation_steps=1", *overrides]
    expected, lines = _trained_on(runs, method, kept, overrides)
    assert len(lines) == len(set(lines)) == 2
    caplog.clear()
    trained, lines_with_empty_steps = _trained_on(runs, method, with_empty_steps, overrides)
    assert lines_with_empty_steps == lines
    assert "nan" not in "".join(lines)
    for found, wanted in zip(_tensors(trained), _tensors(expected), strict=True):
        assert torch.equal(found, wanted)
    said = [record for record in caplog.records if "has no label" in record.message]
    assert len(said) == 1
    assert said[0].levelno == logging.WARNING


def test_micro_batches_left_over_by_an_epoch_are_of_the_next_ones_first_step(runs):
    """As torchtune has it; so the second epoch's first step has a label, and the first one's has none."""
    overrides = [*ONE_BY_ONE, "gradient_accumulation_steps=2", "epochs=2", "max_steps_per_epoch=null"]
    _, lines = _trained_on(runs, FULL, "EEa", overrides)
    assert len(lines) == 1
    assert "nan" not in lines[0]


def _trained_on(runs, method, rows, overrides):
    """A recipe that was run on these rows, E one without labels; what it logged, but for the time it took."""
    chats = [EMPTY if row == "E" else ANSWERED["abcd".index(row)] for row in rows]
    data = write_chats(runs.assets / f"{rows}.jsonl", chats)
    overrides = [*overrides, f"dataset.data_files={data}"]
    if method == DISTILLATION:
        write_distillation_assets(runs.assets)
        where = runs.assets, runs.output(), method
        cfg = distillation_config(*where, tied=True, divergence="Forward", ours=True, overrides=overrides)
    else:
        cfg = runs.config(method, overrides=overrides)
    recipe = train(our_recipe(method), cfg)
    log = (Path(cfg.output_dir) / "steps.txt").read_text()
    return recipe, re.sub(r"tokens_per_second_per_gpu:\S+", "", log).splitlines()


def _tensors(recipe) -> list[torch.Tensor]:
    """Every weight, and every state of the optimizer."""
    optimizer = recipe._optim_ckpt_wrapper if getattr(recipe, "_optimizer_in_bwd", False) else recipe._optimizer
    state = torch.utils._pytree.tree_leaves(optimizer.state_dict())
    states = [leaf for leaf in state if isinstance(leaf, torch.Tensor)]
    assert states
    return [*recipe._model.parameters(), *states]


def test_a_loss_without_set_model_output_is_left_alone(runs):
    losses, _ = runs.ours(FULL, loss=STOCK_LOSS)
    assert losses == runs.stock(FULL)[0]


def test_stock_recipe_names_ours(runs, monkeypatch):
    monkeypatch.setattr(sys, "argv", [sys.modules[stock_recipe(LORA).__module__].__file__])
    with pytest.raises(RuntimeError) as error:
        train(stock_recipe(LORA), runs.config(LORA))
    assert "tune run torchtune_lce/recipes/lora_finetune_single_device.py" in str(error.value)
    assert "self._loss_fn.set_model_output(self._model)" in str(error.value)


def test_the_line_for_an_own_copy_of_a_recipe_suffices(runs):
    class OwnCopy(stock_recipe(FULL)):
        def setup(self, cfg):
            super().setup(cfg)
            self._loss_fn.set_model_output(self._model)

    cfg = runs.config(FULL)
    train(OwnCopy, cfg)
    assert_equal_steps(logged_losses(Path(cfg.output_dir)), runs.stock(FULL)[0])


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("loss.reduction=sum", "loss.reduction must be mean in a torchtune recipe.* got sum"),
        (
            "loss._component_=torchtune_lce.LinearForwardKLLoss",
            "loss must be a loss of labels, .*, got torchtune_lce.LinearForwardKLLoss, .* that is a kd_loss",
        ),
        (
            "loss._component_=torchtune_lce.LinearTokenLogprobs",
            "loss must be a loss of labels, .*, got torchtune_lce.LinearTokenLogprobs, .* preference recipes",
        ),
    ],
    ids=["reduction", "a kd_loss", "log-probabilities"],
)
def test_refused_before_anything_is_loaded(runs, setting, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        runs.ours(FULL, overrides=[setting, "checkpointer.checkpoint_files=[missing.pt]"])


def test_targets_beyond_the_head_name_the_tokenizer(runs):
    cfg = runs.config(FULL)
    recipe = our_recipe(FULL)(cfg)
    recipe.setup(cfg)
    hidden = torch.zeros(3, 64)
    with pytest.raises(ValueError, match=rf"{VOCABULARY} rows; .* a larger tokenizer, which has 266 entries"):
        recipe._loss_fn(hidden, torch.tensor([1, VOCABULARY, -100]))


def test_tokens_beyond_the_embedding_name_the_tokenizer(runs, tmp_path):
    """Before the embedding takes them, which would name nobody, and on a GPU end the process."""
    torch.save(llama3_2(**SIZES | {"vocab_size": 200}).state_dict(), tmp_path / "small.pt")
    overrides = [f"checkpointer.checkpoint_dir={tmp_path}", "checkpointer.checkpoint_files=[small.pt]"]
    with pytest.raises(ValueError, match="^tokens must be less than 200, .* a larger tokenizer, which has 266 entries"):
        runs.ours(FULL, overrides=["model.vocab_size=200", *overrides])


@pytest.mark.gpu
@pytest.mark.parametrize(
    "overrides",
    [["enable_activation_checkpointing=True", "enable_activation_offloading=True"], ["compile=True"]],
    ids=["offloading", "compile"],
)
@pytest.mark.parametrize("method", [LORA, FULL])
def test_on_a_card_equals_stock(runs, method, overrides):
    overrides = ["device=cuda", "dtype=bf16", *overrides]
    losses, _ = runs.ours(method, overrides=overrides)
    stock, _ = runs.stock(method, overrides=overrides)
    assert_equal_steps(losses, stock, tolerance=torch.finfo(torch.bfloat16).eps / 4)
