"""Our knowledge distillation recipes beside torchtune's own, all really run: the same losses, the same checkpoints."""

import logging
import re
from pathlib import Path

import pytest
import torch
from tiny_distillation import OURS, STOCK, STOCK_CHUNKED, distillation_config, write_distillation_assets
from tiny_models import (
    DISTILLATION,
    OUR_LOSS,
    STOCK_LOSS,
    our_recipe,
    stock_recipe,
    train,
)
from torchtune import config

from torchtune_lce import LinearCrossEntropyLoss, LinearForwardKLLoss

# Both sum the same float32 products in another order; the largest difference seen over five steps is 4e-7.
ROUNDING = 3e-6
FIGURES = ("loss", "class_loss", "kd_loss")


class Runs:
    """Runs recipes on one set of assets; the stock run that several tests compare with runs once."""

    def __init__(self, folder: Path):
        self.assets = folder / "assets"
        self._folder = folder
        self._stock = {}
        self._count = 0
        write_distillation_assets(self.assets)

    def config(self, *, tied=True, divergence="Forward", ours=True, overrides=()):
        self._count += 1
        output = self._folder / f"run{self._count}"
        return distillation_config(
            self.assets, output, DISTILLATION, tied=tied, divergence=divergence, ours=ours, overrides=overrides
        )

    def ours(self, **settings) -> Path:
        return self._run(our_recipe, self.config(**settings))

    def stock(self, **settings) -> Path:
        key = str(sorted(settings.items()))
        if key not in self._stock:
            self._stock[key] = self._run(stock_recipe, self.config(ours=False, **settings))
        return self._stock[key]

    @staticmethod
    def _run(recipe, cfg) -> Path:
        train(recipe(DISTILLATION), cfg)
        return Path(cfg.output_dir)


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Runs:
    return Runs(tmp_path_factory.mktemp("distillation"))


def logged(output: Path) -> dict[str, list[float]]:
    """Each figure, one value a step."""
    text = (output / "steps.txt").read_text()
    return {name: [float(value) for value in re.findall(rf" {name}:(\S+)", text)] for name in FIGURES}


def assert_equal_steps(ours: Path, stock: Path, tolerance: float = ROUNDING, steps: int = 5) -> None:
    ours, stock = logged(ours), logged(stock)
    for name in FIGURES:
        assert len(stock[name]) == len(set(stock[name])) == steps, "stock's must change, or equality says nothing"
        assert ours[name] == pytest.approx(stock[name], rel=tolerance), name


def assert_equal_checkpoints(ours: Path, stock: Path) -> None:
    for file in ("model-00001-of-00001.bin", "adapter_model.pt"):
        ours_, stock_ = (torch.load(folder / "epoch_0" / file, weights_only=True) for folder in (ours, stock))
        assert list(ours_) == list(stock_)
        for name in stock_:
            # A step of AdamW is as large as the learning rate, whatever the gradient: tiny ones may change sign.
            torch.testing.assert_close(
                ours_[name], stock_[name], rtol=1e-4, atol=2e-5, msg=lambda m, n=name: f"{n}: {m}"
            )


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("divergence", OURS)
def test_five_steps_and_checkpoint_equal_stock(runs, divergence, tied):
    ours, stock = (run(divergence=divergence, tied=tied) for run in (runs.ours, runs.stock))
    assert_equal_steps(ours, stock)
    assert_equal_checkpoints(ours, stock)


@pytest.mark.parametrize(
    "overrides",
    [
        ["dataset.packed=True", "gradient_accumulation_steps=1", "batch_size=1"],
        ["enable_activation_checkpointing=True", "clip_grad_norm=0.1"],
        ["kd_ratio=1.0"],
        ["model.use_dora=True"],
    ],
    ids=lambda value: "-".join(value),
)
def test_variants_equal_stock(runs, overrides):
    assert_equal_steps(runs.ours(overrides=overrides), runs.stock(overrides=overrides))


@pytest.mark.parametrize(
    "overrides",
    [
        ["kd_loss.impl=reference"],
        ["kd_loss.workspace_mib=1", "loss.impl=reference"],
        # On a CPU interpreted.
        ["kd_loss.impl=cce_exact"],
    ],
)
def test_settings_come_from_the_config(runs, overrides):
    assert_equal_steps(runs.ours(overrides=overrides), runs.stock())


# On a CPU interpreted.
KERNELS = ["loss.impl=cce", "kd_loss.impl=cce_exact"]


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("divergence", OURS)
def test_both_losses_in_one_walk(runs, divergence, tied, caplog):
    caplog.set_level(logging.INFO)
    settings = {"divergence": divergence, "tied": tied}
    ours = runs.ours(overrides=KERNELS, **settings)
    assert sum("loss (impl set: 'cce') is computed along with kd_loss" in message for message in caplog.messages) == 1
    assert_equal_steps(ours, runs.stock(**settings))


@pytest.mark.parametrize(
    "overrides",
    [
        ["kd_ratio=1.0"],
        ["kd_ratio=0.0"],
        ["log_loss_stats=True"],
        ["loss.metrics=[accuracy]"],
        ["loss.z_loss=1e-4"],
        ["loss.label_smoothing=0.1"],
        ["loss.softcap=30.0"],
        ["loss.logit_scale=0.5"],
        ["kd_loss.ignore_index=-1"],
    ],
    ids=lambda value: "-".join(value),
)
def test_two_walks_where_one_does_not_do(runs, overrides):
    recipe = our_recipe(DISTILLATION)(cfg=(cfg := runs.config(overrides=KERNELS + overrides)))
    recipe.setup(cfg=cfg)
    assert recipe._joint_losses is None


@pytest.mark.parametrize("overrides", [["loss.impl=cce"], ["kd_loss.impl=cce_exact"]])
def test_an_impl_that_is_named_is_not_replaced(runs, overrides, caplog):
    caplog.set_level(logging.INFO)
    assert_equal_steps(runs.ours(overrides=overrides), runs.stock())
    assert not any("along with kd_loss" in message for message in caplog.messages)


def test_a_label_beyond_the_output_is_told_of_in_one_walk_too(runs):
    recipe = our_recipe(DISTILLATION)(cfg=(cfg := runs.config(overrides=KERNELS)))
    recipe.setup(cfg=cfg)
    batch = {"tokens": torch.zeros(2, 5, dtype=torch.int64), "labels": torch.zeros(2, 5, dtype=torch.int64)}
    batch["labels"][1, 3] = 512
    with pytest.raises(ValueError, match=r"512.* The model's output has 512 rows; the usual cause is a larger token"):
        recipe._loss_step(batch)
    assert type(recipe._loss_fn) is LinearCrossEntropyLoss
    assert type(recipe._kd_loss_fn) is LinearForwardKLLoss


def test_compile_equals_stock(runs, monkeypatch):
    """The backend that torchtune reads from here: what is traced is the same, and no C++ compiler is needed."""
    monkeypatch.setenv("TORCH_COMPILE_BACKEND", "eager")
    cfg = runs.config(overrides=["compile=True"])
    recipe = train(our_recipe(DISTILLATION), cfg)
    assert type(recipe._loss_fn) is LinearCrossEntropyLoss
    assert type(recipe._kd_loss_fn) is LinearForwardKLLoss
    assert_equal_steps(Path(cfg.output_dir), runs.stock())


@pytest.mark.parametrize("dora", [False, True], ids=["LoRA", "DoRA"])
def test_adapter_on_the_output(runs, dora):
    """The student's alone, as the stock configs would have it; stock's own losses beside it."""

    def on_output(cfg):
        del cfg.model["tie_word_embeddings"]
        cfg.model._component_ = "torchtune.models.llama3._component_builders.lora_llama3"
        cfg.model.apply_lora_to_output = True
        cfg.model.use_dora = dora
        cfg.checkpointer.model_type = "LLAMA3"
        return cfg

    stock, ours = (on_output(runs.config(tied=False, ours=mine)) for mine in (False, True))
    train(stock_recipe(DISTILLATION), stock)
    train(our_recipe(DISTILLATION), ours)
    ours, stock = Path(ours.output_dir), Path(stock.output_dir)
    assert_equal_steps(ours, stock)
    assert_equal_checkpoints(ours, stock)


def test_bfloat16_within_its_rounding(runs):
    ours, stock = (run(overrides=["dtype=bf16"], tied=False) for run in (runs.ours, runs.stock))
    # Logits are rounded to bfloat16 in both, their gradients in different places; a step's loss is a mean of many.
    assert_equal_steps(ours, stock, tolerance=torch.finfo(torch.bfloat16).eps / 4)


@pytest.mark.parametrize("chunked", [True, False])
def test_stock_losses_are_left_alone(runs, chunked):
    cfg = runs.config(ours=False)
    if not chunked:
        cfg.loss._component_, cfg.kd_loss._component_ = "torch.nn.CrossEntropyLoss", STOCK["Forward"]
    train(our_recipe(DISTILLATION), cfg)
    assert_equal_steps(Path(cfg.output_dir), runs.stock(), tolerance=0 if chunked else ROUNDING)


@pytest.mark.parametrize(
    ("loss", "kd_loss"),
    [
        (OUR_LOSS, STOCK_CHUNKED["Forward"]),
        (STOCK_LOSS, OURS["Reverse"]),
        ("torch.nn.CrossEntropyLoss", OURS["Forward"]),
    ],
)
def test_one_loss_of_each_kind_is_refused(runs, loss, kd_loss):
    cfg = runs.config(overrides=[f"loss._component_={loss}", f"kd_loss._component_={kd_loss}"])
    with pytest.raises(ValueError, match="loss and kd_loss must both take hidden states or both logits") as error:
        train(our_recipe(DISTILLATION), cfg)
    for component in (loss, kd_loss, "loss=torchtune_lce.LinearCrossEntropyLoss"):
        assert component in str(error.value)


@pytest.mark.parametrize(
    ("loss", "kd_loss", "message"),
    [
        (OUR_LOSS, OUR_LOSS, "kd_loss must compare student and teacher, .* got torchtune_lce.LinearCrossEntropyLoss$"),
        (OURS["Reverse"], OURS["Forward"], "loss must be a loss of labels, .* got torchtune_lce.LinearReverseKLLoss,"),
    ],
    ids=["cross-entropy twice", "divergence twice"],
)
def test_losses_in_the_wrong_place_are_refused_before_anything_is_loaded(runs, loss, kd_loss, message):
    cfg = runs.config(overrides=[f"loss._component_={loss}", f"kd_loss._component_={kd_loss}"])
    cfg.checkpointer.checkpoint_files = ["missing.pt"]
    with pytest.raises(ValueError, match=f"^{message}"):
        train(our_recipe(DISTILLATION), cfg)


def test_a_teacher_of_another_vocabulary_is_refused_when_bound(runs, tmp_path):
    cfg = runs.config()
    cfg.teacher_model.vocab_size = 600
    teacher = config.instantiate(cfg.teacher_model)
    torch.save(teacher.state_dict(), tmp_path / "teacher.pt")
    cfg.teacher_checkpointer.checkpoint_dir = str(tmp_path)
    recipe = our_recipe(DISTILLATION)(cfg=cfg)
    with pytest.raises(ValueError, match="same vocabulary, got a teacher whose output has 600 rows, and 512 "):
        recipe.setup(cfg=cfg)


def test_stock_recipe_names_ours(runs):
    with pytest.raises(RuntimeError, match="tune run torchtune_lce/recipes/knowledge_distillation_single_device.py"):
        train(stock_recipe(DISTILLATION), runs.config())
