"""log_loss_stats: what the loss did, in torchtune's own log, in real recipes; nothing where it is not asked for."""

import pytest
import torch
from tiny_models import FULL, LORA, STOCK_LOSS, build_model, our_recipe, recipe_config, train, write_assets
from torchtune.modules.peft import DoRALinear, LoRALinear
from torchtune.training.metric_logging import DiskLogger

from torchtune_lce.commands.shared import recipe_runs
from torchtune_lce.commands.shared.recipe_runs import OUR_LOSS
from torchtune_lce.implementations.memory import OutputAdapter, Problem, loss_memory
from torchtune_lce.inputs import filtering
from torchtune_lce.loss import LinearCrossEntropyLoss
from torchtune_lce.training.live_feedback import LossStatistics

KEYS = {"kept_fraction", "largest_dropped_mass"}


@pytest.fixture(scope="module")
def assets(tmp_path_factory):
    folder = tmp_path_factory.mktemp("feedback") / "assets"
    write_assets(folder)
    return folder


def run(assets, output, method, *overrides, loss=OUR_LOSS):
    cfg = recipe_config(assets, output, method, tied=True, loss=loss, overrides=["max_steps_per_epoch=2", *overrides])
    recipe = train(our_recipe(method), cfg)
    return recipe, recipe_runs.read_log(output / "steps.txt")


@pytest.mark.parametrize("method", [LORA, FULL])
def test_recipes_log_what_ran(assets, tmp_path, method):
    _, records = run(assets, tmp_path / "asked", method, "log_loss_stats=True", "loss.impl=reference")
    _, silent = run(assets, tmp_path / "silent", method, "loss.impl=reference")
    assert [record.pop("impl_is_reference") for record in records] == [1, 1]
    for asked, unasked in zip(records, silent, strict=True):
        # Float32 logits of a few dozen tokens by 512 entries, five times at the worst.
        assert 1e-5 < asked.pop("loss_memory_planned") < 1e-2
        assert asked.keys() == unasked.keys(), "torchtune's own"
        assert asked["loss"] == unasked["loss"]


def test_the_kernels_tell_what_they_kept(assets, tmp_path, device):
    """Through a recipe on a card; in the interpreter, which takes seconds for a step, through the loss alone."""
    pytest.importorskip("triton")
    if device.type == "cuda":
        _, records = run(assets, tmp_path, FULL, "log_loss_stats=True", "loss.impl=cce", "device=cuda", "dtype=bf16")
        assert all(record["impl_is_cce"] == 1 and 0 < record["kept_fraction"] <= 1 for record in records)
        return
    logger = Logger()
    loss = LinearCrossEntropyLoss(impl="cce", filter_eps=0.02)
    statistics = LossStatistics(logger, loss)
    torch.manual_seed(0)
    weight = (torch.randn(300, 32) * 2).requires_grad_()
    expected = []
    for scale in (0.0, 0.12):  # two batches of one step, one of them sure of a few entries
        targets = torch.randint(20, (40,))
        hidden = (scale * weight.detach()[targets]).requires_grad_()
        with filtering.recording() as records:
            LinearCrossEntropyLoss(impl="cce", filter_eps=0.02)(hidden, targets, weight).backward()
        expected += records
        loss(hidden, targets, weight).backward()
    statistics.log_dict({"loss": 3.0}, step=7)
    step, logged = logger.records.pop()
    assert step == 7
    assert logged.keys() == {"loss", "impl_is_cce", "loss_memory_planned"} | KEYS
    kept, tiles = sum(record.tiles for record in expected).tolist()
    assert expected[0].kept_fraction != expected[1].kept_fraction
    assert logged["kept_fraction"] == kept / tiles
    assert logged["largest_dropped_mass"] == max(record.largest_dropped_mass for record in expected)
    assert logged["largest_dropped_mass"] > 0
    # A step later, and after a validation, which has no backward.
    with torch.no_grad():
        loss(hidden, targets, weight)
    statistics.log_dict({}, step=8)
    assert "kept_fraction" not in logger.records.pop()[1]


class Logger:
    """torchtune's interface, as far as a recipe uses it."""

    def __init__(self):
        self.records = []
        self.closed = False

    def log_dict(self, payload, step):
        self.records.append((step, payload))

    def close(self):
        self.closed = True


def test_the_rest_of_the_logger_is_its_own():
    logger = Logger()
    LossStatistics(logger, LinearCrossEntropyLoss()).close()
    assert logger.closed


def test_a_loss_that_raises_ends_its_recording():
    loss = LinearCrossEntropyLoss(impl="chunked")
    LossStatistics(Logger(), loss)
    with pytest.raises(RuntimeError, match="before set_model_output"):
        loss(torch.zeros(2, 4), torch.zeros(2, dtype=torch.int64))
    assert filtering.open_record(torch.arange(2)) is None


@pytest.mark.parametrize("value", ["False", 1])
def test_what_is_neither_true_nor_false(assets, tmp_path, value):
    """A string is true, whatever it says."""
    with pytest.raises(ValueError, match=f"log_loss_stats must be True or False, got {value!r}"):
        run(assets, tmp_path, FULL, f"log_loss_stats={value!r}")


def test_nothing_is_attached_where_nobody_asks(assets, tmp_path, caplog):
    recipe, _ = run(assets, tmp_path / "silent", FULL)
    assert not recipe._loss_fn._forward_hooks
    assert not recipe._loss_fn._forward_pre_hooks
    assert not recipe._loss_fn.after_batch
    assert type(recipe._metric_logger) is DiskLogger
    # torchtune's own loss has nothing to tell, and its recipe runs on.
    _, records = run(assets, tmp_path / "stock", FULL, "log_loss_stats=True", loss=STOCK_LOSS)
    assert records
    assert "The key log_loss_stats does nothing here: the loss is torchtune.modules.loss.CEWithChunked" in caplog.text
    assert not [key for record in records for key in record if key.startswith(("impl_is_", "token_"))]


@pytest.mark.parametrize("kind", [None, LoRALinear, DoRALinear])
def test_memory_is_that_of_the_largest_batch(kind):
    model = build_model(tied=False)
    if kind is not None:
        model.output = kind(64, 512, rank=4, alpha=8, dropout=0.1)
        model.output.weight.requires_grad_(False)
        model.output.initialize_dora_magnitude() if kind is DoRALinear else None
    logger, loss = Logger(), LinearCrossEntropyLoss(impl="chunked", workspace_mib=1)
    loss.set_model_output(model)
    statistics = LossStatistics(logger, loss)
    for length in (7, 900, 30):
        loss(torch.randn(2, length, 64, requires_grad=True), torch.randint(512, (2, length))).backward()
    with torch.no_grad():
        loss(torch.randn(2, 5000, 64), torch.randint(512, (2, 5000)))
    statistics.log_dict({}, step=1)
    adapter = None if kind is None else OutputAdapter(4, True, kind is DoRALinear)
    problem = Problem(1800, 64, 512, itemsize=4, trained_head=kind is None, workspace_mib=1, adapter=adapter)
    assert logger.records[0][1]["loss_memory_planned"] == loss_memory("chunked", problem).peak / 2**30
    statistics.log_dict({}, step=2)
    assert "loss_memory_planned" not in logger.records[1][1]


def test_no_key_ends_in_loss():
    """torchtune main's tests and dashboards take whatever ends so for a loss."""
    logger = Logger()
    model = build_model()
    loss = LinearCrossEntropyLoss(impl="reference")
    loss.set_model_output(model)
    statistics = LossStatistics(logger, loss)
    tokens = torch.randint(512, (2, 8))
    loss(model(tokens), tokens).backward()
    statistics.log_dict({}, step=1)
    ((_, logged),) = logger.records
    assert logged.keys() == {"impl_is_reference", "loss_memory_planned"}
    assert not [key for key in logged.keys() | KEYS if key.endswith("loss")]
