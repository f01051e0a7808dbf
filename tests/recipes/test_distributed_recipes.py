"""Our distributed recipes beside torchtune's own, all really run on two processes: same losses, same checkpoints."""

import importlib
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from distributed_processes import RUN_AGAIN_AFTER_A_SIGNAL, launch, spawn, train_all
from interpreted import IS_INTERPRETED
from omegaconf import OmegaConf
from tiny_distillation import distillation_config, write_distillation_assets
from tiny_models import (
    DISTILLATION_DISTRIBUTED,
    FULL,
    FULL_DISTRIBUTED,
    LORA_DISTRIBUTED,
    OUR_LOSS,
    STOCK_LOSS,
    build_model,
    logged_losses,
    our_recipe,
    recipe_config,
    stock_recipe,
    train,
    write_chats,
)

pytestmark = RUN_AGAIN_AFTER_A_SIGNAL

# Both losses sum the same float32 products in another order; over three steps up to 4e-7 was seen.
ROUNDING = 1.5e-6
STEPS = 3
OWN_GROUPS = "custom_sharded_layers=[tok_embeddings,output]"
# Both losses of a distillation, by the kernels.
ONE_WALK = "loss.impl=cce", "kd_loss.impl=cce_exact"


@dataclass(frozen=True)
class Case:
    """One run. ``equals``: the run whose losses it must have; None for a run that others are measured by."""

    method: str
    tied: bool
    overrides: tuple[str, ...] = ()
    equals: str | None = None
    loss: str = OUR_LOSS
    # The batches of both ranks, in turn, as rows of one: E has no label, another letter has its own.
    rows: str | None = None

    @property
    def runs_on_a_cpu(self) -> bool:
        return self.overrides != ONE_WALK or IS_INTERPRETED


def _cases() -> dict[str, Case]:
    cases = {}
    for method, short in ((LORA_DISTRIBUTED, "lora"), (FULL_DISTRIBUTED, "full")):
        for tied in (True, False):
            head = f"{short} {'tied' if tied else 'untied'}"
            cases[f"stock {head}"] = Case(method, tied, loss=STOCK_LOSS)
            # However torchtune shards the model, the numbers are those of one run. Its own recipe crashes where a tied
            # embedding has a group of its own.
            for overrides in ((), (OWN_GROUPS,), ("fsdp_reshard_after_forward=False",)):
                cases[" ".join([head, *overrides])] = Case(method, tied, overrides, equals=f"stock {head}")
    variants = {
        "optimizer in backward": ("optimizer_in_bwd=True", "gradient_accumulation_steps=1"),
        "clipping and checkpointing": ("clip_grad_norm=0.1", "enable_activation_checkpointing=True"),
    }
    for name, overrides in variants.items():
        cases[f"stock {name}"] = Case(FULL_DISTRIBUTED, True, overrides, loss=STOCK_LOSS)
        cases[name] = Case(FULL_DISTRIBUTED, True, overrides, equals=f"stock {name}")
    cases["optimizer in backward, own groups"] = Case(
        FULL_DISTRIBUTED, True, (*variants["optimizer in backward"], OWN_GROUPS), equals="stock optimizer in backward"
    )
    cases["tok_embeddings in a group"] = Case(
        FULL_DISTRIBUTED, True, ("custom_sharded_layers=[tok_embeddings]",), equals="stock full tied"
    )
    on_output = (
        "model._component_=torchtune.models.llama3._component_builders.lora_llama3",
        "model.apply_lora_to_output=True",
        "checkpointer.model_type=LLAMA3",
    )
    cases["stock lora on the output"] = Case(LORA_DISTRIBUTED, False, on_output, loss=STOCK_LOSS)
    for overrides in ((), (OWN_GROUPS,)):
        cases[" ".join(["lora on the output", *overrides])] = Case(
            LORA_DISTRIBUTED, False, (*on_output, *overrides), equals="stock lora on the output"
        )
    split = (
        "tensor_parallel_dim=2",
        "tensor_parallel_plan._component_=torchtune.models.llama3.base_llama_tp_plan",
        # On a card several tensors would be stepped at once, which DTensor refuses beside the norms' plain ones.
        "optimizer.foreach=False",
    )
    cases["stock tensor parallel"] = Case(FULL_DISTRIBUTED, False, split, loss=STOCK_LOSS)
    cases["tensor parallel"] = Case(FULL_DISTRIBUTED, False, split, equals="stock tensor parallel")
    # torchtune's own recipe crashes here.
    cases["tensor parallel, tied"] = Case(FULL_DISTRIBUTED, True, split)
    for tied in (True, False):
        head = f"distillation {'tied' if tied else 'untied'}"
        cases[f"stock {head}"] = Case(DISTILLATION_DISTRIBUTED, tied, loss=STOCK_LOSS)
        for overrides in ((), (OWN_GROUPS,), ONE_WALK):
            cases[" ".join([head, *overrides])] = Case(
                DISTILLATION_DISTRIBUTED, tied, overrides, equals=f"stock {head}"
            )
    cases["a rank without labels"] = Case(FULL_DISTRIBUTED, True, ("batch_size=1", "shuffle=False"), rows="Ea" * 6)
    for name, method, overrides in EMPTY_STEPS:
        overrides = ("batch_size=1", "shuffle=False", "gradient_accumulation_steps=1", *overrides)
        # Both ranks, the other one and the first have no label; the third of these steps is not there to compare.
        cases[f"{name}, no empty step"] = Case(method, True, overrides, rows="abEcdE")
        cases[f"{name}, an empty step"] = Case(method, True, overrides, rows="abEcEEdE")
    return cases


EMPTY_STEPS = [
    ("full", FULL_DISTRIBUTED, ("clip_grad_norm=0.1",)),
    ("in backward", FULL_DISTRIBUTED, ("optimizer_in_bwd=True",)),
    ("lora", LORA_DISTRIBUTED, ()),
    ("distillation", DISTILLATION_DISTRIBUTED, ()),
]
CASES = _cases()
COMPARED = [name for name, case in CASES.items() if case.equals]
ON_A_CPU = [name for name in COMPARED if CASES[name].runs_on_a_cpu]


class Runs:
    """Runs all cases in one spawn: starting two processes costs more than a run."""

    def __init__(self, folder: Path, device: str = "cpu", backend: str = "gloo"):
        self._device = device
        self.assets = folder / "assets"
        self._folder = folder
        write_distillation_assets(self.assets)
        cases = {name: case for name, case in CASES.items() if device != "cpu" or case.runs_on_a_cpu}
        spawn(train_all, 2, [self._prepared(*case) for case in cases.items()], backend=backend)

    def output(self, name: str) -> Path:
        return self._folder / name

    def losses(self, name: str) -> list[float]:
        return logged_losses(self.output(name))

    def saved(self, name: str, file: str = "model-00001-of-00001.bin") -> dict:
        return torch.load(self.output(name) / "epoch_0" / file, weights_only=True)

    def config(self, name: str, method: str, *, tied: bool, overrides=(), loss=OUR_LOSS):
        overrides = [f"max_steps_per_epoch={STEPS}", f"device={self._device}", *overrides]
        where = self.assets, self.output(name), method
        if method == DISTILLATION_DISTRIBUTED:
            ours = loss == OUR_LOSS
            return distillation_config(*where, tied=tied, divergence="Forward", ours=ours, overrides=overrides)
        return recipe_config(*where, tied=tied, loss=loss, overrides=overrides)

    def data(self, rows: str) -> Path:
        # E: a truncated question, whose answer is lost.
        chats = [("Say nothing at all. " * 20, "nothing") if row == "E" else (f"Say {row}", row * 9) for row in rows]
        return write_chats(self.assets / f"{rows}.jsonl", chats)

    def _prepared(self, name: str, case: Case) -> tuple:
        cfg = self.config(name, case.method, tied=case.tied, overrides=case.overrides, loss=case.loss)
        if "lora on the output" in name:
            del cfg.model["tie_word_embeddings"]
        if case.rows:
            cfg.dataset.data_files = str(self.data(case.rows))
        return case.loss == OUR_LOSS, case.method, cfg


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Runs:
    if not hasattr(torch.cpu.Stream, "record_event"):
        pytest.skip("this torch's FSDP2 does not run on a CPU")
    return Runs(tmp_path_factory.mktemp("distributed"))


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA cards")
def test_steps_on_two_cards_equal_stock(tmp_path):
    runs = Runs(tmp_path, device="cuda", backend="cuda:nccl,cpu:gloo")
    for name in COMPARED:
        # Other kernels sum in another order.
        assert runs.losses(name) == pytest.approx(runs.losses(CASES[name].equals), rel=1e-5), name


@pytest.mark.parametrize("name", ON_A_CPU)
def test_steps_equal_stock(runs, name):
    stock = runs.losses(CASES[name].equals)
    assert len(stock) == len(set(stock)) == STEPS, "stock's losses must change, or equality says nothing"
    assert runs.losses(name) == pytest.approx(stock, rel=ROUNDING)


@pytest.mark.parametrize("name", ON_A_CPU)
def test_checkpoint_equals_stock(runs, name):
    files = ["model-00001-of-00001.bin"]
    if CASES[name].method in (LORA_DISTRIBUTED, DISTILLATION_DISTRIBUTED):
        files.append("adapter_model.pt")
    for file in files:
        ours, stock = runs.saved(name, file), runs.saved(CASES[name].equals, file)
        assert list(ours) == list(stock)
        for key in stock:
            # A step of AdamW is as large as the learning rate, whatever the gradient: tiny ones may change sign.
            torch.testing.assert_close(ours[key], stock[key], rtol=1e-4, atol=2e-5, msg=lambda m, k=key: f"{k}: {m}")


def test_lora_on_the_output_was_trained(runs):
    adapters = runs.saved("lora on the output", "adapter_model.pt")
    assert adapters["output.lora_b.weight"].abs().max() > 1e-3


@pytest.mark.parametrize("recipe", [stock_recipe, our_recipe], ids=["stock", "ours"])
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_single_device_recipes_go_on_from_the_checkpoint(runs, tied, recipe, tmp_path):
    """The first loss of another run is that of the checkpoint's weights on its first batches."""
    name = f"full {'tied' if tied else 'untied'}"
    build_model(tied).load_state_dict(runs.saved(name), strict=True)
    losses = []
    for trained in (name, f"stock {name}"):
        loss = STOCK_LOSS if recipe is stock_recipe else OUR_LOSS
        overrides = [f"checkpointer.checkpoint_dir={runs.output(trained)}/epoch_0"]
        cfg = runs.config(f"from {trained} {recipe.__name__}", FULL, tied=tied, overrides=overrides, loss=loss)
        cfg.checkpointer.checkpoint_files = ["model-00001-of-00001.bin"]
        train(recipe(FULL), cfg)
        losses.append(logged_losses(Path(cfg.output_dir)))
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    assert losses[0][0] < runs.losses(name)[0] - 0.1


@pytest.mark.parametrize(
    ("command", "recipe", "method", "name"),
    [
        ("tune-lce", "lce_lora_finetune_distributed", LORA_DISTRIBUTED, "lora tied"),
        ("tune", "torchtune_lce/recipes/full_finetune_distributed.py", FULL_DISTRIBUTED, "full tied"),
    ],
    ids=["by name", "by path"],
)
def test_launched_as_a_user_does(runs, command, recipe, method, name):
    builder = "lora_llama3_2" if method == LORA_DISTRIBUTED else "llama3_2"
    overrides = ["max_steps_per_epoch=1", f"model._component_=distributed_processes.{builder}_on_a_cpu"]
    cfg = runs.config(f"launched {name}", method, tied=True, overrides=overrides)
    path = runs.assets / f"{method}.yaml"
    OmegaConf.save(cfg, path)
    launch(Path(sys.executable).parent / command, 2, recipe, "--config", path, folder=runs.assets)
    assert runs.losses(f"launched {name}") == pytest.approx(runs.losses(name)[:1], rel=ROUNDING)


@pytest.mark.parametrize(
    "method",
    [
        FULL_DISTRIBUTED,
        LORA_DISTRIBUTED,
        DISTILLATION_DISTRIBUTED,
        "qat_distributed",
        "qat_lora_finetune_distributed",
    ],
)
def test_without_a_launcher_says_so(method, monkeypatch, tmp_path):
    """Before anything of the config is looked at."""
    for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    path = tmp_path / "config.yaml"
    path.write_text("device: cpu\ndtype: no such one\n")
    monkeypatch.setattr(sys, "argv", ["recipe", "--config", str(path)])
    with pytest.raises(RuntimeError, match="give `tune run` --nproc_per_node"):
        importlib.import_module(f"torchtune_lce.recipes.{method}").recipe_main()


def test_a_tied_head_under_tensor_parallelism_equals_one_device(runs):
    cfg = runs.config("one device", FULL, tied=True, loss=STOCK_LOSS)
    train(stock_recipe(FULL), cfg)
    stock = runs.losses("one device")
    assert len(set(stock)) == STEPS
    assert runs.losses("tensor parallel, tied") == pytest.approx(stock, rel=ROUNDING)
    ours, single = runs.saved("tensor parallel, tied"), runs.saved("one device")
    assert list(ours) == list(single)


def test_a_rank_without_labels_leaves_the_other_ranks_numbers(runs):
    """One process with both ranks' rows in each batch is the reference: torchtune's own loss divides 0 by 0."""
    cfg = runs.config("one process", FULL, tied=True, overrides=["batch_size=2", "shuffle=False"])
    cfg.dataset.data_files = str(runs.data(CASES["a rank without labels"].rows))
    recipe = train(our_recipe(FULL), cfg)
    labelled = [any(label != -100 for label in row["labels"][1:]) for row in recipe._dataloader.dataset]
    assert labelled == [False, True] * 6
    losses = runs.losses("a rank without labels")
    assert len(set(losses)) == STEPS
    assert losses == pytest.approx(runs.losses("one process"), rel=ROUNDING)
    ours, single = runs.saved("a rank without labels"), runs.saved("one process")
    for key in single:
        torch.testing.assert_close(ours[key], single[key], rtol=1e-4, atol=2e-5, msg=lambda m, k=key: f"{k}: {m}")


@pytest.mark.parametrize("name", [name for name, _, _ in EMPTY_STEPS])
def test_a_step_without_labels_on_any_rank_is_as_if_it_were_not_there(runs, name):
    """To the bit, and so are the steps after it, which momentum would have moved; one rank alone takes part as ever."""
    without, with_one = f"{name}, no empty step", f"{name}, an empty step"
    assert len(set(runs.losses(without))) == STEPS
    assert runs.losses(with_one) == runs.losses(without)
    expected, weights = runs.saved(without), runs.saved(with_one)
    assert all(torch.equal(weights[key], expected[key]) for key in expected)
