"""Our knowledge distillation recipes beside torchtune's own, all really run: the same losses, the same checkpoints."""

import logging
import re
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from interpreted import INTERPRETED
from tiny_distillation import (
    OURS,
    STOCK,
    STOCK_CHUNKED,
    build_teacher,
    distillation_config,
    write_distillation_assets,
)
from tiny_models import (
    DISTILLATION,
    OUR_LOSS,
    STOCK_LOSS,
    VOCABULARY,
    build_model,
    our_recipe,
    stock_recipe,
    train,
)
from torchtune import config
from torchtune.modules.peft import LoRALinear

from torchtune_lce import LinearCrossEntropyLoss, LinearForwardKLLoss
from torchtune_lce.distillation import KullbackLeibler
from torchtune_lce.training.joint_losses import JointLosses

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
        pytest.param(["kd_loss.impl=cce_exact"], marks=INTERPRETED),
    ],
)
def test_settings_come_from_the_config(runs, overrides):
    assert_equal_steps(runs.ours(overrides=overrides), runs.stock())


KERNELS = ["loss.impl=cce", "kd_loss.impl=cce_exact"]


ONE_WALK = "the labels' cross-entropy in the same walk over the vocabulary"


@INTERPRETED
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("divergence", OURS)
def test_both_losses_in_one_walk(runs, divergence, tied, caplog):
    caplog.set_level(logging.INFO)
    settings = {"divergence": divergence, "tied": tied}
    ours = runs.ours(overrides=KERNELS, **settings)
    assert sum(ONE_WALK in message for message in caplog.messages) == 1
    assert_equal_steps(ours, runs.stock(**settings))


class Doubled(LinearCrossEntropyLoss):
    """A user's own loss."""

    def forward(self, *arguments) -> torch.Tensor:
        return 2 * super().forward(*arguments)


def batch_of(seed: int) -> dict[str, torch.Tensor]:
    tokens = torch.randint(0, VOCABULARY, (2, 9), generator=torch.Generator().manual_seed(seed))
    return {"tokens": tokens, "labels": tokens}


def set_up(runs, *overrides: str):
    cfg = runs.config(overrides=[*KERNELS, *overrides])
    recipe = our_recipe(DISTILLATION)(cfg=cfg)
    recipe.setup(cfg=cfg)
    return recipe


@pytest.fixture
def walks(monkeypatch) -> list[bool]:
    """Of each step whose losses were asked for, whether they took one walk."""
    taken = []
    joint, own = KullbackLeibler.with_cross_entropy, KullbackLeibler.forward
    monkeypatch.setattr(KullbackLeibler, "with_cross_entropy", lambda *a: taken.append(True) or joint(*a))
    monkeypatch.setattr(KullbackLeibler, "forward", lambda *a: taken.append(False) or own(*a))
    return taken


@INTERPRETED
@pytest.mark.parametrize(
    "overrides",
    [
        ["kd_ratio=1"],
        ["kd_ratio=0"],
        ["log_loss_stats=True"],
        ["loss.metrics=[accuracy]"],
        ["loss.z_loss=1e-4"],
        ["loss.label_smoothing=0.1"],
        ["loss.softcap=30.0"],
        ["loss.logit_scale=0.5"],
        ["kd_loss.ignore_index=-1"],
        [f"loss._component_={__name__}.Doubled"],
        ["loss.impl=chunked"],
        ["kd_loss.impl=chunked"],
    ],
    ids=lambda value: "-".join(value),
)
def test_two_walks_where_one_does_not_do(runs, overrides, walks):
    recipe = set_up(runs, *overrides)
    loss, _ = recipe._loss_step(batch_of(0))
    assert walks == [False]
    if isinstance(recipe._loss_fn, Doubled):
        assert loss.item() == pytest.approx(2 * set_up(runs)._loss_step(batch_of(0))[0].item(), rel=ROUNDING)


@INTERPRETED
def test_who_listens_after_setup_is_told(runs, walks):
    recipe, told = set_up(runs), []
    for module in (recipe._loss_fn, recipe._kd_loss_fn):
        hook = module.register_forward_hook(lambda *_: told.append("hook"))
        recipe._loss_step(batch_of(0))
        hook.remove()
    recipe._loss_fn.after_batch.append(lambda _: told.append("batch"))
    recipe._loss_step(batch_of(0))
    assert told == ["hook", "hook", "batch"]
    recipe._loss_fn.after_batch.clear()
    recipe._loss_step(batch_of(0))
    assert walks == [False, False, False, True]


@INTERPRETED
def test_a_ratio_that_changes_is_followed(runs):
    recipe = set_up(runs)
    for ratio in (0.7, 1e-12, 1.0):
        recipe._kd_ratio = ratio
        found = []
        for one_walk in (True, False):
            recipe._one_walk = one_walk
            loss, kd_loss = recipe._loss_step(batch_of(0))
            recipe._optimizer.zero_grad()
            ((1 - ratio) * loss + ratio * kd_loss).backward()
            found.append([x.grad.clone() for x in recipe._model.parameters() if x.requires_grad])
        for one, other in zip(*found, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-7)


@INTERPRETED
def test_a_step_that_fails_leaves_nothing_to_the_next(runs, walks):
    recipe = set_up(runs)
    expected = [[x.item() for x in recipe._loss_step(batch_of(seed))] for seed in (0, 1)]
    kd_loss = recipe._kd_loss_fn

    def interrupted(*_):
        raise KeyboardInterrupt

    # Between the two losses.
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(JointLosses, "of_labels", interrupted)
        with pytest.raises(KeyboardInterrupt):
            recipe._loss_step(batch_of(0))
    assert type(recipe._loss_fn) is LinearCrossEntropyLoss
    assert recipe._kd_loss_fn is kd_loss
    assert [x.item() for x in recipe._loss_step(batch_of(1))] == expected[1]
    assert walks == [True] * 4


@INTERPRETED
def test_losses_asked_for_in_another_order_or_of_other_states(runs, walks):
    recipe = set_up(runs)
    hidden, teacher_hidden = torch.randn(6, 64, requires_grad=True), torch.randn(6, 96)
    labels = torch.randint(0, VOCABULARY, (6,))
    own = recipe._loss_fn, recipe._kd_loss_fn
    joint = JointLosses(*own, 0.3)
    losses = joint.of_labels(hidden, labels), joint.of_teacher(hidden, teacher_hidden, labels)
    assert walks == [False]
    assert [x.item() for x in losses] == [own[0](hidden, labels).item(), own[1](hidden, teacher_hidden, labels).item()]
    joint = JointLosses(*own, 0.3)
    joint.of_teacher(hidden, teacher_hidden, labels)
    with pytest.raises(RuntimeError, match="^loss was called with other hidden states or labels .* loss.impl=chunked"):
        joint.of_labels(hidden.clone(), labels)


@INTERPRETED
@pytest.mark.parametrize("overrides", [["loss.impl=cce"], ["kd_loss.impl=cce_exact"]])
def test_an_impl_that_is_named_is_not_replaced(runs, overrides, caplog):
    caplog.set_level(logging.INFO)
    assert_equal_steps(runs.ours(overrides=overrides), runs.stock())
    assert not any(ONE_WALK in message for message in caplog.messages)


@INTERPRETED
def test_a_label_beyond_the_output_is_told_of_in_one_walk_too(runs, walks):
    recipe = set_up(runs)
    batch = batch_of(0)
    batch["labels"] = batch["labels"].clone()
    batch["labels"][1, 3] = VOCABULARY
    message = rf"{VOCABULARY}.* The model's output has {VOCABULARY} rows; the usual cause is a larger token"
    for _ in range(2):
        with pytest.raises(ValueError, match=message):
            recipe._loss_step(batch)
    assert type(recipe._loss_fn) is LinearCrossEntropyLoss
    assert type(recipe._kd_loss_fn) is LinearForwardKLLoss
    assert not walks


@pytest.mark.gpu
@pytest.mark.parametrize("divergence", OURS)
def test_one_walk_on_a_card_equals_stock(runs, divergence, caplog):
    """By `auto`. Products there are sums of three parts each, and in another order."""
    caplog.set_level(logging.INFO)
    settings = {"divergence": divergence, "tied": False, "overrides": ["device=cuda"]}
    ours = runs.ours(**settings)
    assert sum(ONE_WALK in message for message in caplog.messages) == 1
    assert_equal_steps(ours, runs.stock(**settings), tolerance=2e-5)


@pytest.mark.gpu
def test_labels_on_a_card_are_looked_at_in_the_first_batch(device):
    """And in every one only where that is asked for: it waits for the card."""
    labels = torch.tensor([3, VOCABULARY], device=device)
    for looks in (False, True):
        loss = LinearCrossEntropyLoss(check_targets=looks)
        loss.set_model_output(build_model(True).to(device))
        with pytest.raises(ValueError, match=f"{VOCABULARY} rows"):
            loss.check_labels(labels)
        loss.check_labels(labels[:1])
        with pytest.raises(ValueError, match=f"{VOCABULARY} rows") if looks else nullcontext():
            loss.check_labels(labels)


@pytest.mark.gpu
def test_auto_takes_two_walks_with_an_adapter_on_the_output(device):
    hidden, teacher_hidden = torch.randn(3, 64, device=device), torch.randn(3, 96, device=device)
    student = build_model(tied=False).to(device)
    for adapter in (False, True):
        if adapter:
            student.output = LoRALinear(64, VOCABULARY, rank=2, alpha=4).to(device)
        kd_loss = LinearForwardKLLoss()
        kd_loss.set_model_output(student)
        kd_loss.set_teacher_output(build_teacher().to(device))
        assert kd_loss.takes_cross_entropy(hidden, teacher_hidden) == (not adapter)
        kd_loss.release()


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
