"""The loss's metrics in torchtune's own log, against the logits of torchtune's own recipes."""

import math

import pytest
import torch
from distributed_processes import RUN_AGAIN_AFTER_A_SIGNAL, spawn, train_all
from real_logits import read_steps, recorded_stock_recipe, sums
from tiny_distillation import distillation_config, write_distillation_assets
from tiny_models import (
    DISTILLATION,
    FULL,
    FULL_DISTRIBUTED,
    LORA,
    OUR_LOSS,
    STOCK_LOSS,
    VOCABULARY,
    build_model,
    our_recipe,
    recipe_config,
    train,
    write_chats,
)
from torchtune.modules.peft import LoRALinear

import torchtune_lce.loss
from torchtune_lce import LinearCrossEntropyLoss
from torchtune_lce.commands.shared.recipe_runs import read_log

pytestmark = RUN_AGAIN_AFTER_A_SIGNAL

# A z-loss that changes no step; its metric divided by it is the mean square.
Z_LOSS = 1e-9
ASKED = "loss.metrics=[accuracy,entropy,nll,z_loss]", f"loss.z_loss={Z_LOSS}"
KEYS = {"token_accuracy", "token_entropy", "token_nll", "token_z"}
# Fast enough for a tiny model to be right now and then.
FAST = "optimizer.lr=0.02"
MICRO_BATCHES = 2
DORA_ON_OUTPUT = (
    "model._component_=torchtune.models.llama3._component_builders.lora_llama3",
    "checkpointer.model_type=LLAMA3",
    "model.apply_lora_to_output=True",
    "model.use_dora=True",
)


@pytest.fixture(scope="module")
def assets(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokens") / "assets"
    write_distillation_assets(folder)
    return folder


def config(assets, output, method, *overrides, tied=True, ours=True):
    overrides = [FAST, *overrides]
    if method == DISTILLATION:
        return distillation_config(
            assets, output, method, tied=tied, divergence="Forward", ours=ours, overrides=overrides
        )
    loss = OUR_LOSS if ours else STOCK_LOSS
    cfg = recipe_config(assets, output, method, tied=tied, loss=loss, overrides=overrides)
    if "model.apply_lora_to_output=True" in overrides:
        del cfg.model["tie_word_embeddings"]
    return cfg


def run_both(assets, folder, method, *overrides, tied=True, calls_of_steps=MICRO_BATCHES):
    """What our recipe logged, and what torchtune's logits say it should have."""
    train(recorded_stock_recipe(method), config(assets, folder / "stock", method, *overrides, tied=tied, ours=False))
    train(our_recipe(method), config(assets, folder / "ours", method, *ASKED, *overrides, tied=tied))
    return read_log(folder / "ours" / "steps.txt"), read_steps(folder / "stock", calls_of_steps)


def assert_logged(records: list[dict], expected: list[dict[str, float]]) -> None:
    assert len(records) == len(expected)
    for record, wanted in zip(records, expected, strict=True):
        # Sums in float32, of models whose steps differ by as much.
        found = {key: record[key] for key in KEYS}
        found["token_z"] /= Z_LOSS
        assert found == pytest.approx(wanted, rel=1e-5)
    assert len({wanted["token_accuracy"] for wanted in expected}) > 1, "a constant would do"


@pytest.mark.parametrize(
    ("method", "tied", "overrides"),
    [(FULL, True, ()), (LORA, False, ()), (LORA, False, DORA_ON_OUTPUT), (DISTILLATION, True, ())],
    ids=["full", "lora", "dora on the output", "distillation"],
)
def test_recipes_log_what_the_logits_say(assets, tmp_path, method, tied, overrides):
    """Micro-batches of unlike numbers of labels, whose tokens count alike."""
    assert_logged(*run_both(assets, tmp_path, method, *overrides, tied=tied))


def test_computed_for_the_logged_steps_alone(assets, tmp_path, monkeypatch):
    calls = []
    compute = torchtune_lce.loss.compute_token_statistics
    monkeypatch.setattr(torchtune_lce.loss, "compute_token_statistics", lambda call: calls.append(1) or compute(call))
    records, expected = run_both(assets, tmp_path, FULL, "log_every_n_steps=2", "log_loss_stats=True")
    assert_logged(records, expected[1::2])
    assert len(calls) == 2 * MICRO_BATCHES
    for record in records:
        assert record["impl_is_chunked"] == 1, "both may be asked for"


def test_what_the_loss_has_at_hand_needs_no_second_pass(assets, tmp_path, monkeypatch):
    """And one name needs no list."""
    monkeypatch.setattr(torchtune_lce.loss, "compute_token_statistics", None)
    train(our_recipe(FULL), config(assets, tmp_path, FULL, "loss.metrics=nll", "max_steps_per_epoch=1"))
    (record,) = read_log(tmp_path / "steps.txt")
    assert {key for key in record if key.startswith("token_")} == {"token_nll"}
    # Nothing is added to the loss that was trained with.
    assert record["token_nll"] == pytest.approx(record["loss"], rel=1e-5)


@pytest.mark.parametrize("metrics", ["acc", ["nll", "loss"], None, 3, [["nll"]]])
def test_names_are_checked(metrics):
    with pytest.raises(ValueError, match="^metrics must be names out of accuracy, entropy, nll, z_loss, got "):
        LinearCrossEntropyLoss(metrics=metrics)


def test_names_count_once():
    assert LinearCrossEntropyLoss(metrics=["nll", "accuracy", "nll"]).metrics == ("nll", "accuracy")
    assert LinearCrossEntropyLoss().metrics == ()


def test_what_an_epoch_leaves_over_counts_in_the_next_ones_first_step(assets, tmp_path):
    """As torchtune has it: twelve micro-batches an epoch, of which five make a step."""
    overrides = "epochs=2", "gradient_accumulation_steps=5", "max_steps_per_epoch=null"
    records, expected = run_both(assets, tmp_path, FULL, *overrides, calls_of_steps=[5, 5, 7, 5, 2])
    assert_logged(records, expected[:-1])


def test_a_step_without_labels_is_not_logged(assets, tmp_path):
    cfg = config(assets, tmp_path, FULL, *ASKED, "max_steps_per_epoch=1", "shuffle=False")
    # Truncated questions, whose answers are lost: the first step's two batches of two.
    chats = [("Say nothing at all. " * 20, "nothing")] * 4 + [("Say one", "one, of course")] * 4
    cfg.dataset.data_files = str(write_chats(tmp_path / "data.jsonl", chats))
    train(our_recipe(FULL), cfg)
    (record,) = read_log(tmp_path / "steps.txt")
    assert all(math.isfinite(record[key]) for key in ("loss", *KEYS))


def test_of_the_very_logits_that_the_loss_saw():
    """Those of this draw of an output's dropout, under a softcap; without gradients, as in validation, of none."""
    model = build_model(tied=False)
    model.output = LoRALinear(64, VOCABULARY, rank=4, alpha=40, dropout=0.4).double()
    torch.nn.init.normal_(model.output.lora_b.weight, std=0.3)
    hidden = torch.randn(3, 40, 64, dtype=torch.float64, requires_grad=True)
    torch.manual_seed(4)
    logits = 5 * torch.tanh(model.output(hidden) / 5)
    targets = torch.where(torch.rand(3, 40) < 0.5, logits.argmax(-1), torch.randint(VOCABULARY, (3, 40)))
    targets[:, :6] = -100
    loss = LinearCrossEntropyLoss(impl="chunked", softcap=5.0, label_smoothing=0.1, z_loss=0.3)
    loss.set_model_output(model)
    found = []
    loss.after_batch.append(lambda batch: found.append((batch, batch.statistics())))
    torch.manual_seed(4)
    loss(hidden, targets)
    with torch.no_grad():
        loss(hidden, targets)
    ((batch, (entropy, correct)),) = found
    right, total, nll, squares, labels = sums(logits, targets).tolist()
    assert 0.3 < right / labels < 0.7
    assert correct.sum() == right
    assert entropy.sum().item() == pytest.approx(total, rel=1e-12)
    assert batch.nll.sum().item() == pytest.approx(nll, rel=1e-12), "neither smoothed nor with the z-loss"
    assert batch.z_loss.sum().item() == pytest.approx(0.3 * squares, rel=1e-12)
    assert not any(x.requires_grad for x in (entropy, batch.nll, batch.z_loss))


SPLIT = "tensor_parallel_dim=2", "tensor_parallel_plan._component_=torchtune.models.llama3.base_llama_tp_plan"
LAYOUTS = {
    "fsdp": (True, ()),
    "head in a group of its own": (False, ("custom_sharded_layers=[tok_embeddings,output]",)),
    "tensor parallel": (False, SPLIT),
}


@pytest.fixture(scope="module")
def distributed(assets, tmp_path_factory):
    """The folder of all runs: starting two processes costs more than they do."""
    if not hasattr(torch.cpu.Stream, "record_event"):
        pytest.skip("this torch's FSDP2 does not run on a CPU")
    folder = tmp_path_factory.mktemp("distributed")
    runs = []
    for name, (tied, overrides) in LAYOUTS.items():
        for ours in (True, False):
            output = folder / name / ("ours" if ours else "stock")
            asked = ASKED if ours else ()
            cfg = config(assets, output, FULL_DISTRIBUTED, *asked, *overrides, tied=tied, ours=ours)
            runs.append((ours, FULL_DISTRIBUTED, cfg))
    spawn(train_all, 2, runs, recorded_stock_recipe)
    return folder


@pytest.mark.parametrize("name", LAYOUTS)
def test_distributed_recipes_log_all_ranks_tokens(distributed, name):
    """Ranks have batches of their own, with unlike numbers of labels; the same ones under tensor parallelism."""
    output = distributed / name
    assert_logged(read_log(output / "ours" / "steps.txt"), read_steps(output / "stock", MICRO_BATCHES))
    own, other = (torch.load(output / "stock" / f"calls.{rank}.pt", weights_only=True) for rank in range(2))
    assert torch.equal(own, other) == (name == "tensor parallel")
