"""tune-lce compare: what it runs for each loss, what it remembers, what it shows, and short runs of the whole."""

import json
import math
import os
import signal
import subprocess
import threading
import time
import warnings
from pathlib import Path

import pytest
import torch
from command_line import exit_status
from omegaconf import OmegaConf
from rich.console import Console
from tiny_distillation import OURS, STOCK, STOCK_CHUNKED, distillation_config
from tiny_models import (
    DISTILLATION,
    DISTILLATION_DISTRIBUTED,
    FULL,
    FULL_DPO_DISTRIBUTED,
    LORA,
    LORA_DISTRIBUTED,
    LORA_DPO,
    LORA_DPO_DISTRIBUTED,
    OUR_LOSS,
    SIZES,
    STOCK_LOSS,
    our_recipe,
    recipe_config,
    stock_recipe,
    train,
    write_assets,
)
from tiny_preferences import preference_config, write_preference_assets
from torchtune import config as torchtune_config
from torchtune.models.qwen2 import Qwen2Tokenizer

from torchtune_lce.commands import registry
from torchtune_lce.commands.compare import command, report, runs, session
from torchtune_lce.commands.compare.checkpointers import LoadOnly, RandomWeights
from torchtune_lce.commands.compare.demo_data import DemoData, TokenRows
from torchtune_lce.commands.compare.runs import Outcome, Run
from torchtune_lce.commands.plan import command as plan
from torchtune_lce.commands.shared import distillation, loss_choices, preferences, recipe_runs
from torchtune_lce.commands.shared.errors import CommandError
from torchtune_lce.commands.shared.loss_choices import LossChoice
from torchtune_lce.commands.shared.random_weights import random_state_dict
from torchtune_lce.commands.shared.recipe_choice import recipe_for
from torchtune_lce.commands.shared.recipe_runs import Result

LORA_CONFIG = "lce/llama3_2/1B_lora_single_device"
BUILDER = "torchtune.models.llama3_2._component_builders.llama3_2"
DISTILLATION_CONFIG = "lce/qwen2/1.5_to_0.5B_KD_lora_single_device"


@pytest.fixture(autouse=True)
def _registered():
    registry.register()


@pytest.fixture
def blocked(tmp_path) -> Path:
    """An --output that is refused: what was to be told before would otherwise be told after a real run, or never."""
    path = tmp_path / "blocked"
    path.touch()
    return path


def ended(name: str, *arguments) -> int:
    """The exit status of plan or compare."""
    return exit_status({"plan": plan, "compare": command}[name], *arguments)


def result(*values, speed=100.0, peak=2**30) -> Result:
    return Result(list(values), speed, 1.0, peak, None)


# --- losses ---


def test_names_are_read():
    assert loss_choices.parse("stock,cce_compiled,torch_compile,main") == [
        LossChoice("stock", False),
        LossChoice("cce", True),
        LossChoice("torch_compile", False),
        LossChoice("main", False),
    ]
    assert LossChoice("cce", True).name == "cce_compiled"
    assert loss_choices.parse("stock@12,cce_compiled@0") == [LossChoice("stock", False, 12), LossChoice("cce", True, 0)]
    assert LossChoice("cce", True, 0).name == "cce_compiled@0"
    for wrong in ("ccee", "cce@", "cce@x", "cce@1_compiled"):
        with pytest.raises(CommandError, match=f"--losses takes stock, main, auto, cce, .* got '{wrong}'"):
            loss_choices.parse(f"stock,{wrong}")
    with pytest.raises(CommandError, match="each loss once"):
        loss_choices.parse("cce,stock,cce")


def test_sections_of_the_config():
    ours = OmegaConf.create({"_component_": OUR_LOSS, "impl": "auto", "workspace_mib": 64})
    stock = OmegaConf.create({"_component_": STOCK_LOSS, "num_output_chunks": 4})
    assert LossChoice("stock", True).section(ours) == {"_component_": STOCK_LOSS}
    assert LossChoice("cce", False).section(ours) == {"_component_": OUR_LOSS, "impl": "cce", "workspace_mib": 64}
    assert LossChoice("cce", False).section(stock) == {"_component_": OUR_LOSS, "impl": "cce"}
    assert LossChoice("main", True).section(ours)["compile"] is True


@pytest.mark.parametrize("component", [OURS, STOCK, STOCK_CHUNKED], ids=["ours", "stock", "stock_chunked"])
def test_sections_of_a_distillation(component):
    def section(name, divergence="Forward", **options):
        configured = OmegaConf.create({"_component_": component[divergence], **options})
        return distillation.section(loss_choices.parse(name)[0], configured)

    assert section("stock_compiled") == {"_component_": STOCK_CHUNKED["Forward"]}
    assert section("torch_compile", "Reverse") == {"_component_": OURS["Reverse"], "impl": "torch_compile"}
    assert section("cce", "Reverse") == {"_component_": OURS["Reverse"], "impl": "auto"}, "it is a filter's name"
    assert section("cce_exact", "Reverse") == {"_component_": OURS["Reverse"], "impl": "cce_exact"}
    mixed = {"sym_kd_ratio": 0.25}
    assert section("stock", "Symmetric", **mixed) == {"_component_": STOCK_CHUNKED["Symmetric"], **mixed}
    assert section("chunked", "Symmetric", **mixed) == {"_component_": OURS["Symmetric"], **mixed, "impl": "chunked"}


def test_a_distillation_keeps_the_options_that_its_loss_has():
    ours = OmegaConf.create({"_component_": OURS["Forward"], "workspace_mib": 64, "impl": "reference"})
    stock = OmegaConf.create({"_component_": STOCK_CHUNKED["Forward"], "num_output_chunks": 4})
    chunked = LossChoice("chunked", False)
    assert distillation.section(chunked, ours) == {
        "_component_": OURS["Forward"],
        "workspace_mib": 64,
        "impl": "chunked",
    }
    assert distillation.section(chunked, stock) == {"_component_": OURS["Forward"], "impl": "chunked"}
    assert distillation.section(LossChoice("stock", False), ours) == {"_component_": STOCK_CHUNKED["Forward"]}


def test_a_loss_that_cannot_run_is_refused_and_left_out_of_the_usual_ones(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(CommandError, match="--losses: cce needs a CUDA card, not cpu; take 'chunked'"):
        loss_choices.select("stock,cce", "cpu", torch.float32)
    usual = [choice.name for choice in loss_choices.select(None, "cpu", torch.float32)]
    assert usual == ["stock", "chunked", "torch_compile"]


# --- configs ---


@pytest.mark.parametrize(
    ("name", "overrides", "message"),
    [
        ("lce/none/such", [], "--config takes a name that `tune-lce ls` lists or the path of a YAML file, got"),
        (LORA_CONFIG, ["max_steps_per_epoch=3"], "max_steps_per_epoch is set by tune-lce compare"),
        (LORA_CONFIG, ["metric_logger.filename=a"], "metric_logger.filename is set by tune-lce compare"),
        (LORA_CONFIG, ["loss.impl=cce"], "loss.impl is set by tune-lce compare"),
        (DISTILLATION_CONFIG, ["kd_loss.impl=chunked"], "kd_loss.impl is set by tune-lce compare"),
        (LORA_CONFIG, ["batch_size"], "must be in the form of key=value, got batch_size"),
    ],
)
def test_bad_configs_are_named(name, overrides, message):
    with pytest.raises(CommandError, match=message):
        runs.read_config(name, overrides)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--warmup", "-1"], "--warmup must be at least 0, got -1"),
        (["--steps", "0", "--warmup", "0"], "--steps must be more than the --warmup of 0, got 0"),
        (["--steps", "5"], "--steps must be more than the --warmup of 5, got 5"),
        (["--jobs", "0"], "--jobs must be at least 1, got 0"),
        (["--nproc_per_node", "0"], "--nproc_per_node must be at least 1, got 0"),
        (["--sequence-length", "1"], "--sequence-length must be at least 2, got 1"),
        (["--vocabulary", "258"], "--vocabulary must be at least 259, a byte's values and the special tokens, got 258"),
        (["--losses", f"stock@{2**32}"], "--losses: a seed must be less than 4294967296, got 4294967296"),
        (["seed=-1"], "seed must be null or a whole number from 0 to 4294967295, got -1"),
        (["seed=abc"], "seed must be null or a whole number from 0 to 4294967295, got 'abc'"),
    ],
)
def test_numbers_that_make_no_sense(blocked, capsys, arguments, message):
    options = ["--random-weights", "--demo-data", *arguments, "device=cpu", "dtype=fp32"]
    assert compare("--config", LORA_CONFIG, "--output", blocked, *options) == 2
    assert capsys.readouterr().err == f"tune-lce compare: {message}\n"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        # Their outputs' rows.
        (
            ["teacher_model._component_=torchtune.models.qwen2_5.qwen2_5_7b_base"],
            "model and teacher_model must have the same vocabulary, got outputs of 151936 and of 152064 rows",
        ),
        (["model.lora_rankk=1"], "model: torchtune.models.qwen2.lora_qwen2_0_5b cannot be built: "),
        (["model.lora_rank=-1"], "model: torchtune.models.qwen2.lora_qwen2_0_5b cannot be built: Trying to create"),
        (["teacher_model.bogus=1"], "teacher_model: torchtune.models.qwen2.qwen2_1_5b cannot be built: "),
    ],
)
def test_models_that_cannot_distil_are_named(blocked, capsys, settings, message):
    """Before anything is written, by plan and compare."""
    for name, output in (("plan", []), ("compare", ["--output", blocked])):
        options = ["--config", DISTILLATION_CONFIG, "--losses", "stock", *output, *settings]
        assert ended(name, *options, "device=cpu", "dtype=fp32") == 2
        assert capsys.readouterr().err.startswith(f"tune-lce {name}: {message}")


def test_a_teacher_of_no_kind_is_named(blocked, tmp_path, capsys):
    config, path = runs.read_config(DISTILLATION_CONFIG, ["device=cpu", "dtype=fp32"]), tmp_path / "mine.yaml"
    for teacher in ({"max_seq_len": 64}, "qwen2"):
        config.teacher_model = teacher
        OmegaConf.save(config, path)
        for name, output in (("plan", []), ("compare", ["--output", blocked])):
            assert ended(name, "--config", path, "--losses", "stock", *output) == 2
            said = f"tune-lce {name}: teacher_model must be a section with a _component_, which builds the model, got "
            assert capsys.readouterr().err.startswith(said)


@pytest.mark.parametrize("model", ["torchtune.models.llama3_2.nosuch", "collections.Counter"])
def test_a_model_that_cannot_be_made_is_named(blocked, capsys, model):
    settings = [f"model._component_={model}", "device=cpu", "dtype=fp32"]
    assert compare("--config", LORA_CONFIG, "--output", blocked, "--demo-data", *settings) == 2
    assert capsys.readouterr().err.startswith("tune-lce compare: model: ")


def test_recipe_goes_with_the_config_and_the_devices(tmp_path):
    config = runs.read_config(LORA_CONFIG, ["batch_size=3"])
    assert config.batch_size == 3
    assert recipe_for(LORA_CONFIG, config, None) == LORA
    assert recipe_for("llama3_2/1B_full_single_device", config, None) == FULL
    assert recipe_for("lce/llama3_2/3B_lora", config, 2) == LORA_DISTRIBUTED
    assert recipe_for("mine.yaml", config, 2) == LORA_DISTRIBUTED
    assert recipe_for(DISTILLATION_CONFIG, config, None) == DISTILLATION
    teaches = OmegaConf.create({"model": {"lora_rank": 2}, "teacher_model": {}})
    assert recipe_for("mine.yaml", teaches, None) == DISTILLATION
    assert recipe_for("mine.yaml", teaches, 2) == DISTILLATION_DISTRIBUTED
    full = OmegaConf.create({"model": {}})
    assert recipe_for("mine.yaml", full, None) == FULL
    with pytest.raises(CommandError, match="needs --nproc_per_node"):
        recipe_for("lce/llama3_2/3B_lora", config, None)
    with pytest.raises(CommandError, match="takes one device"):
        recipe_for(LORA_CONFIG, config, 2)
    with pytest.raises(CommandError, match="of a distillation or of DPO, llama3_1/8B_l"):
        recipe_for("llama3_1/8B_lora_dpo", config, 2)
    prefers = runs.read_config("llama3_1/8B_lora_dpo_single_device", [])
    assert recipe_for("llama3_1/8B_lora_dpo_single_device", prefers, None) == LORA_DPO
    assert recipe_for("mine.yaml", prefers, None) == LORA_DPO
    assert recipe_for("mine.yaml", prefers, 2) == LORA_DPO_DISTRIBUTED
    del prefers.model["lora_rank"]
    assert recipe_for("mine.yaml", prefers, 2) == FULL_DPO_DISTRIBUTED
    with pytest.raises(CommandError, match="full_dpo_distributed, which needs --nproc_per_node"):
        recipe_for("mine.yaml", prefers, None)


# --- inputs ---


def test_rows_are_full_and_made_once(tmp_path):
    sources = {f"module{i}": f"def wrapper_{i}(value):\n    return {word}\n" * 9 for i, word in enumerate(dir(torch))}
    demo = DemoData(rows=12, sequence=32, vocabulary=320)
    assert demo.make(tmp_path, sources)
    sections = OmegaConf.create(demo.sections(tmp_path))
    tokenizer = torchtune_config.instantiate(sections.tokenizer)
    assert isinstance(tokenizer, Qwen2Tokenizer)
    rows = torchtune_config.instantiate(sections.dataset, tokenizer)
    assert isinstance(rows, TokenRows)
    assert len(rows) == 12
    assert {len(row["tokens"]) for row in rows} == {32}
    assert all(row["tokens"] == row["labels"] for row in rows)
    ids = {token for row in rows for token in row["tokens"]}
    assert max(ids) < 317, "the special tokens come last"
    assert len(ids) > 20
    # torchtune's tokenizer reads the ids as the text that they came from.
    assert "return" in tokenizer.decode(rows[0]["tokens"])
    assert not demo.make(tmp_path, sources)
    for name, content in (("rows.pt", None), ("tokenizer/merges.txt", None), ("made.json", ""), ("made.json", "{")):
        path = tmp_path / name
        path.unlink() if content is None else path.write_text(content)
        assert demo.make(tmp_path, sources), f"{name} is gone or breaks off"
        assert not demo.make(tmp_path, sources)
    assert DemoData(rows=11, sequence=32, vocabulary=320).make(tmp_path, sources)
    with pytest.raises(
        CommandError, match=r"--demo-data: the runs need 500,000 rows of 32 tokens, .* take fewer --steps"
    ):
        DemoData(rows=500_000, sequence=32, vocabulary=320).make(tmp_path, sources)


def test_random_weights_fit_the_recipes_model(device):
    model = {
        "_component_": "torchtune.models.gemma2.lora_gemma2",
        **dict(lora_attn_modules=["q_proj"], lora_rank=2, lora_alpha=4),
        "quantize_base": True,
        **dict(vocab_size=400, num_layers=1, num_heads=2, head_dim=16, num_kv_heads=1, embed_dim=32),
        **dict(intermediate_dim=64, max_seq_len=64),
    }
    state = RandomWeights(model, model_type="GEMMA2", should_load_recipe_state=False).load_checkpoint()["model"]
    assert {tensor.dtype for tensor in state.values()} == {torch.bfloat16}
    built = torchtune_config.instantiate(OmegaConf.create(model | {"quantize_base": False}))
    missing, unexpected = built.load_state_dict(state, strict=False)
    assert not unexpected
    assert missing
    assert all("lora" in name for name in missing)
    other = RandomWeights(model, seed=1).load_checkpoint()["model"]
    assert not torch.equal(other["tok_embeddings.weight"], state["tok_embeddings.weight"])
    again = random_state_dict(OmegaConf.create(model), torch.bfloat16, device)
    assert all(torch.equal(again[name], state[name]) for name in state)
    # Gemma's scales are offsets from 1: an untrained one does nothing.
    assert torch.equal(state["norm.rms_norm.scale"], torch.zeros(32, dtype=torch.bfloat16))
    assert state["tok_embeddings.weight"].float().std().item() == pytest.approx(32**-0.5, rel=0.05)


def test_late_layers_repeat_the_matrices_of_early_ones(device):
    model = {"_component_": BUILDER, **SIZES, "num_layers": 11}
    state = RandomWeights(model).load_checkpoint()["model"]
    assert torchtune_config.instantiate(OmegaConf.create(model)).load_state_dict(state)
    own = random_state_dict(OmegaConf.create(model), torch.bfloat16, device)
    query, scale = "layers.{}.attn.q_proj.weight", "layers.{}.sa_norm.scale"
    for layer in range(8):
        assert torch.equal(state[query.format(layer)], own[query.format(layer)])
    assert state[query.format(10)] is state[query.format(2)]
    assert not torch.equal(own[query.format(10)], own[query.format(2)])
    # What no matrix product reads may be trained as it was loaded.
    assert state[scale.format(10)] is not state[scale.format(2)]
    state = random_state_dict(OmegaConf.create(model), distinct_layers=1)
    assert state[query.format(10)] is state[query.format(0)]


def test_llama_scales_are_ones():
    config = OmegaConf.load(registry.PACKAGE / "configs" / "tiny" / "full_single_device.yaml").model
    state = random_state_dict(config)
    assert torch.equal(state["norm.scale"], torch.ones(128))
    assert not state["layers.0.attn.q_proj.bias"].any()


# --- runs ---


@pytest.fixture
def run(tmp_path) -> Run:
    config = runs.read_config(LORA_CONFIG, [])
    choice = LossChoice("chunked", True)
    ready = runs.prepared(config, choice, tmp_path / "run", 3, random_weights=True)
    return Run(choice, LORA, ready, None, tmp_path / "run", 3, 1, {"commit": "a"})


def logging(*values):
    """What stands in for a recipe: logs these losses."""

    def recipe(command, folder, steps, on_step, log, warmup, process):
        lines = [f"Step {i} | loss:{loss} tokens_per_second_per_gpu:{10.0 * i} \n" for i, loss in enumerate(values)]
        log.write_text("".join(lines))
        return recipe_runs.summarise(recipe_runs.read_log(log), 700, warmup)

    return recipe


def test_command_and_config_of_a_run(run):
    assert run.command()[:3] == ["tune", "run", f"torchtune_lce/recipes/{LORA}.py"]
    config = run.config
    assert config.compile is True
    assert (config.max_steps_per_epoch, config.epochs, config.log_every_n_steps, config.seed) == (3, 1, 1, 0)
    assert config.save_adapter_weights_only is True
    assert config.checkpointer.model_type == "LLAMA3_2"
    assert config.checkpointer.model == config.model, "whatever the overrides make of it"
    assert config.checkpointer.seed == config.seed
    stock = Run(LossChoice("stock", False), LORA_DISTRIBUTED, config, 2, run.folder, 3, 1, {})
    assert stock.command()[:5] == ["tune", "run", "--nproc_per_node", "2", LORA_DISTRIBUTED]


def test_a_seed_of_its_own_stands_before_the_configs(tmp_path):
    config = runs.read_config(LORA_CONFIG, ["seed=5"])
    for name, seed in (("stock", 5), ("stock@7", 7), ("stock@0", 0)):
        ready = runs.prepared(config, loss_choices.parse(name)[0], tmp_path, 3, random_weights=True)
        assert (ready.seed, ready.checkpointer.seed) == (seed, seed)


def test_what_is_done_is_remembered_until_something_changes(run, monkeypatch):
    assert run.finished() is None
    monkeypatch.setattr(recipe_runs, "run", logging(3.0, 2.0, 1.0))
    outcome = run.execute(lambda done: None)
    assert outcome.status == "ok"
    assert run.finished() == outcome
    for change in (
        {"environment": {"commit": "b"}},
        {"devices": 2},
        {"at_once": 2},
        {"config": OmegaConf.create({"seed": 1})},
    ):
        assert Run(**vars(run) | change).finished() is None, change
    # Another warm-up is another way to read the same log.
    longer = Run(**vars(run) | {"warmup": 2}).finished()
    assert (outcome.result.tokens_per_second, longer.result.tokens_per_second) == (15.0, 20.0)


@pytest.mark.parametrize(
    ("name", "content"), [(runs.RESULT, ""), (runs.RESULT, '{"key": '), (recipe_runs.LOG, None), (recipe_runs.LOG, "")]
)
def test_what_is_left_of_a_result_counts_as_not_done(run, monkeypatch, name, content):
    monkeypatch.setattr(recipe_runs, "run", logging(3.0, 2.0, 1.0))
    outcome = run.execute(lambda done: None)
    path = run.folder / name
    path.unlink() if content is None else path.write_text(content)
    assert run.finished() is None
    assert run.execute(lambda done: None) == outcome
    assert run.finished() == outcome


@pytest.mark.parametrize("out_of_memory", [True, False])
def test_only_want_of_memory_is_a_result(run, monkeypatch, out_of_memory):
    def recipe(*args):
        raise recipe_runs.RunFailed("the run ended", out_of_memory)

    monkeypatch.setattr(recipe_runs, "run", recipe)
    outcome = run.execute(lambda done: None)
    assert outcome.result is None
    assert outcome.status == ("out of memory" if out_of_memory else "failed")
    assert (run.finished() is None) != out_of_memory


@pytest.mark.parametrize(
    ("printed", "out_of_memory"),
    [
        ("torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB.", True),
        ("RuntimeError: CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`", True),
        ("torch.AcceleratorError: CUDA error: out of memory", True),
        ("RuntimeError: Triton Error [CUDA]: out of memory", True),
        ("RuntimeError: Triton Error [CUDA]: an illegal memory access was encountered", False),
        ("triton.runtime.errors.OutOfResources: out of resource: shared memory", False),
    ],
)
def test_want_of_memory_is_told_from_other_failures(printed, out_of_memory):
    assert recipe_runs.ran_out_of_memory(f"Traceback (most recent call last):\n{printed}\n") == out_of_memory


def test_a_repeated_run_leaves_nothing_of_the_old_one(run, monkeypatch):
    monkeypatch.setattr(recipe_runs, "run", logging(3.0, 2.0, 1.0))
    run.execute(lambda done: None)
    monkeypatch.setattr(recipe_runs, "run", lambda *args: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        run.execute(lambda done: None)
    assert run.finished() is None
    assert not (run.folder / recipe_runs.LOG).exists()


# --- report ---


def test_rows_compare_with_the_first():
    outcomes = {
        "stock": Outcome("ok", result(3.0, 2.0, 1.0)),
        "cce": Outcome("ok", result(3.0, 1.75, 1.0, speed=150.0, peak=2**29)),
        "chunked": Outcome("out of memory", None),
    }
    _, cce, chunked = report.rows(outcomes)
    assert cce["largest_difference"] == 0.25
    assert cce["speed_to_first"] == 1.5
    assert cce["memory_to_first"] == 0.5
    assert cce["final_loss"] == 1.0
    assert cce["mean_loss_of_last_tenth"] == 1.0
    twenty = report.rows({"stock": Outcome("ok", result(*range(20)))})
    assert twenty[0]["mean_loss_of_last_tenth"] == 18.5
    assert chunked == {"loss": "chunked", "status": "out of memory"}


def test_spread_of_a_loss_over_its_seeds():
    found = {
        "stock": result(3.0, 2.0),
        "stock@2": result(3.0, 2.5),
        "stock@3": result(3.0, 1.5),
        "cce": result(3.0, 2.0),
    }
    outcomes = {name: Outcome("ok", of_run) for name, of_run in found.items()}
    outcomes["cce@2"] = Outcome("failed", None)
    assert report.seed_spread(outcomes) == {"stock": (1.5, 2.5)}


def test_losses_differ_by_those_of_equal_seeds():
    found = {"stock@1": 2.0, "stock@2": 5.0, "cce@1": 2.25, "cce@2": 5.75, "cce@3": 9.0, "chunked@1": 1.0}
    outcomes = {name: Outcome("ok", result(3.0, last)) for name, last in found.items()}
    outcomes["chunked@2"] = Outcome("failed", None)
    assert report.seed_differences(outcomes) == {"cce": (0.5, pytest.approx(0.25))}
    assert "cce less stock, seed by seed: +0.5000, standard error 0.2500" in report.notes(outcomes, 1, False)
    outcomes["cce@1"] = Outcome("ok", result(3.0, math.nan))
    assert all(map(math.isnan, report.seed_differences(outcomes)["cce"]))
    assert report.seed_differences({}) == {}


@pytest.mark.parametrize(
    ("pairs", "counted"), [(False, "tokens with a label"), (True, "all tokens of both rows of a pair")]
)
def test_notes_say_which_tokens_a_recipe_counts(pairs, counted):
    assert report.notes({}, 1, pairs)[0].startswith(f"tokens/s: {counted}")


def test_tiles_kept_are_shown_where_the_log_tells():
    records = [
        {"loss": 1.0, "tokens_per_second_per_gpu": 1.0, "kept_fraction": kept} for kept in (1.0, 0.5, 0.25, 0.125)
    ]
    told = recipe_runs.summarise(records, None)
    assert told.kept_fraction == 0.25
    outcomes = {"cce": Outcome("ok", told), "stock": Outcome("ok", result(1.0, 1.0, 1.0, 1.0))}
    assert [row["kept_fraction"] for row in report.rows(outcomes)] == [0.25, None]
    headings = [column.header for column in report.table(outcomes, on_card=True).columns]
    assert headings[-1] == "tiles\nkept"
    assert "tiles\nkept" not in [column.header for column in report.table({"a": outcomes["stock"]}, True).columns]


def test_results_are_written_where_the_first_failed_and_where_a_loss_is_nan(tmp_path):
    outcomes = {"stock": Outcome("failed", None, "why"), "cce": Outcome("ok", result(3.0, math.nan))}
    report.write_json(outcomes, {"about": {"device": "x"}}, tmp_path / "compare.json")
    written = json.loads((tmp_path / "compare.json").read_text())
    assert written["rows"][1]["final_loss"] is None
    assert written["losses"] == {"cce": [3.0, None]}
    assert written["about"]["device"] == "x"
    report.draw(outcomes, "title", True, tmp_path / "compare.png")
    assert (tmp_path / "compare.png").read_bytes().startswith(b"\x89PNG")
    assert report.table(outcomes, on_card=True).row_count == 2
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        report.draw({"stock": outcomes["stock"]}, "title", True, tmp_path / "nothing.png")
    same = {"a": Outcome("ok", result(3.0, math.nan)), "b": Outcome("ok", result(3.0, 2.0))}
    assert math.isnan(report.rows(same)[1]["largest_difference"])


# --- several at once ---


def test_runs_at_once_are_told_in_order(run, monkeypatch):
    """The first one ends only after the others have, which run beside it."""
    others_done = threading.Semaphore(0)

    def execute(self, on_step, process):
        if self.folder.name == "first":
            assert all(others_done.acquire(timeout=10) for _ in range(2))
        others_done.release()
        return Outcome("ok", None)

    monkeypatch.setattr(Run, "start", lambda self: None)
    monkeypatch.setattr(Run, "execute", execute)
    waiting = [Run(**vars(run) | {"folder": run.folder.parent / name}) for name in ("first", "second", "third")]
    told = []
    session.run_all(Console(quiet=True), waiting, 2, True, False, lambda run, outcome: told.append(run.folder.name))
    assert told == ["first", "second", "third"]


def test_an_interruption_ends_what_runs_and_starts_nothing(run, monkeypatch):
    """Whoever is told of an outcome is interrupted, while a second run is under way and a third waits."""
    seen, under_way = [], threading.Event()

    def execute(self, on_step, process):
        seen.append(self.folder.name)
        if self.folder.name == "first":
            assert under_way.wait(10)
            return Outcome("ok", None)
        under_way.set()
        for done in range(200):
            on_step(done)
            time.sleep(0.01)
        seen.append("came to its end")

    def on_outcome(run, outcome):
        raise KeyboardInterrupt

    monkeypatch.setattr(Run, "start", lambda self: None)
    monkeypatch.setattr(Run, "execute", execute)
    names = ("first", "second", "third", "fourth")
    waiting = [Run(**vars(run) | {"folder": run.folder.parent / name}) for name in names]
    with pytest.raises(KeyboardInterrupt):
        session.run_all(Console(quiet=True), waiting, 2, True, False, on_outcome)
    assert {"first", "second"} <= set(seen)
    assert not {"fourth", "came to its end"} & set(seen)


def test_a_signal_is_an_interruption(tmp_path, monkeypatch, capsys):
    """While the main thread waits for a run, whose own thread polls its process."""

    ended = threading.Event()

    def execute(self, on_step, process):
        os.kill(os.getpid(), signal.SIGTERM)
        try:
            for done in range(1000):
                on_step(done)
                time.sleep(0.01)
        except KeyboardInterrupt:
            ended.set()
            raise

    before = signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr(Run, "start", lambda self: None)
    monkeypatch.setattr(Run, "execute", execute)
    common = ("--config", LORA_CONFIG, "--losses", "stock,chunked", "--output", tmp_path / "out")
    assert compare(*common, "--random-weights", "device=cpu", "dtype=fp32") == 143
    assert ended.wait(5)
    assert capsys.readouterr().err.startswith("tune-lce compare: interrupted; what is done is kept")
    assert signal.getsignal(signal.SIGTERM) == before


def test_the_next_process_starts_with_a_run_and_none_is_left(run, monkeypatch):
    """Of five runs the second is done already, and the fourth is interrupted."""
    names = ("first", "second", "third", "fourth", "fifth")
    waiting = [Run(**vars(run) | {"folder": run.folder.parent / name}) for name in names]
    happened, processes = [], {}

    def start(self):
        happened.append(f"start {self.folder.name}")
        # As idle as one that waits to be let go.
        processes[self.folder.name] = subprocess.Popen(["sleep", "60"])
        return processes[self.folder.name]

    def execute(self, on_step, process):
        assert process is processes[self.folder.name]
        happened.append(f"run {self.folder.name}")
        process.kill()
        if self.folder.name == "fourth":
            raise KeyboardInterrupt
        return Outcome("ok", None)

    monkeypatch.setattr(Run, "start", start)
    monkeypatch.setattr(Run, "execute", execute)
    monkeypatch.setattr(Run, "finished", lambda self: Outcome("ok", None) if self.folder.name == "second" else None)
    with pytest.raises(KeyboardInterrupt):
        session.run_all(Console(quiet=True), waiting, 1, False, True, lambda run, outcome: None)
    assert happened == [
        *("start first", "start third", "run first"),
        *("start fourth", "run third"),
        *("start fifth", "run fourth"),
    ]
    assert all(process.wait(5) for process in processes.values()), "ended by a signal"


@pytest.mark.slow
def test_a_process_that_is_not_let_go_ends_without_a_run(tmp_path):
    """Torchtune's real command line, which would list its recipes."""
    process = recipe_runs.start(["tune", "ls"], tmp_path, tmp_path / "log.txt")
    process.stdin.close()
    assert process.wait(60) == 0
    assert "lora_finetune" not in (tmp_path / recipe_runs.PRINTED).read_text()


# --- command line ---

TEACHER = [f"teacher_model.{name}={size}" for name, size in SIZES.items()]


def compare(*arguments) -> int:
    return ended("compare", *arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--losses", "ccee", "device=cpu"], "--losses takes stock"),
        (["--demo-data", "device=cpu", "--vocabulary", "128257"], "--vocabulary must be at most 128256"),
        (["--demo-data", "device=cpu", "--sequence-length", "131073"], "--sequence-length must be from 2 to 131072"),
        (["device=cpu", "dtype=null"], "the config's dtype must be bf16, fp16 or fp32, got None"),
    ],
)
def test_bad_arguments_are_named(tmp_path, capsys, arguments, message):
    assert compare("--config", LORA_CONFIG, "--output", tmp_path / "out", *arguments) == 2
    assert capsys.readouterr().err.startswith(f"tune-lce compare: {message}")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--losses", "stock,main", "device=cpu"], "--losses: main is a loss without a teacher"),
        (["device=cpu", "kd_loss=torch.nn.KLDivLoss"], "kd_loss._component_ must be one of ForwardKLWithChunked"),
        # The teacher's is one in which the student's sizes would have passed.
        (["--demo-data", "device=cpu", f"teacher_model={BUILDER}", *TEACHER], "--vocabulary must be at most 512"),
        (
            ["--demo-data", "--vocabulary", "400", "device=cpu", f"teacher_model={BUILDER}", *TEACHER],
            "--sequence-length must be from 2 to 256",
        ),
    ],
)
def test_bad_arguments_of_a_distillation_are_named(tmp_path, capsys, arguments, message):
    assert compare("--config", DISTILLATION_CONFIG, "--output", tmp_path / "out", *arguments) == 2
    assert capsys.readouterr().err.startswith(f"tune-lce compare: {message}")
    assert not (tmp_path / "out").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a card")
def test_a_card_that_is_not_there_is_named(tmp_path, capsys):
    assert compare("--config", LORA_CONFIG, "--output", tmp_path) == 2
    assert "the config's device is cuda, and there is none" in capsys.readouterr().err


@pytest.mark.parametrize(("status", "code"), [("ok", 0), ("out of memory", 0), ("failed", 1)])
def test_exit_status_and_files(tmp_path, monkeypatch, capsys, status, code):
    outcomes = {
        "stock": Outcome("ok", result(3.0, 2.0)),
        "chunked": Outcome(status, None if code else result(3.0, 2.0)),
    }
    monkeypatch.setattr(session, "run_one", lambda progress, run, *_: outcomes[run.choice.name])
    common = ("--output", tmp_path / "out", "--steps", "2", "--warmup", "1", "device=cpu", "dtype=fp32")
    assert compare("--config", LORA_CONFIG, "--losses", "stock,chunked", *common) == code
    assert "chunked" in capsys.readouterr().out
    written = json.loads((tmp_path / "out" / session.RESULTS).read_text())
    assert [row["status"] for row in written["rows"]] == ["ok", status]
    assert written["about"]["overrides"] == ["device=cpu", "dtype=fp32"]
    assert (tmp_path / "out" / session.PICTURE).exists()
    document = (tmp_path / "out" / session.TABLE).read_text()
    for line in (f"torch {torch.__version__}", "`tune-lce", "| loss | tokens/s | spread |", "within a run"):
        assert line in document
    if commit := written["about"]["commit"]:
        assert f"commit {commit}" in document
    (last,) = (line for line in document.splitlines() if line.startswith("| chunked |"))
    assert ("| 2.0000 |" in last) == (status == "ok")
    assert (f"| {status} |" in last) == (status != "ok")
    assert {line.count("|") for line in document.splitlines() if line.startswith("|")} == {10}


@pytest.mark.slow
def test_lora_from_a_checkpoint_and_again(tmp_path, capsys):
    """Torchtune's own loss and ours in their recipes; the same command again runs nothing."""
    write_assets(tmp_path / "assets")
    cfg = recipe_config(tmp_path / "assets", tmp_path / "unused", LORA, tied=True, loss=OUR_LOSS)
    OmegaConf.save(cfg, tmp_path / "mine.yaml")
    arguments = ("--config", tmp_path / "mine.yaml", "--output", tmp_path / "out", "--steps", "3", "--warmup", "1")
    assert compare(*arguments, "--losses", "stock,chunked") == 0
    said = capsys.readouterr().out
    assert "tune run lora_finetune_single_device --config" in said
    assert "tune run torchtune_lce/recipes/lora_finetune_single_device.py --config" in said
    written = json.loads((tmp_path / "out" / session.RESULTS).read_text())
    stock, chunked = written["rows"]
    assert len(set(written["losses"]["stock"])) == 3
    assert chunked["largest_difference"] <= 1.5e-6 * written["losses"]["stock"][0]
    assert min(stock["tokens_per_second"], chunked["peak_allocated_bytes"]) > 0
    # Nothing is saved.
    assert not list((tmp_path / "out").rglob("*.bin"))
    assert not list((tmp_path / "out").rglob("adapter*"))
    assert compare(*arguments, "--losses", "stock,chunked") == 0
    assert capsys.readouterr().out.count("done before (ok)") == 2


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_full_on_random_weights_in_mains_way(tmp_path, tied):
    """In this process, as the recipe does it: the same losses as torchtune's own, from no checkpoint at all."""
    write_assets(tmp_path / "assets")
    curves = []
    for kind, recipe in (("stock", stock_recipe(FULL)), ("main", our_recipe(FULL))):
        cfg = recipe_config(tmp_path / "assets", tmp_path, FULL, tied=tied, loss=OUR_LOSS)
        cfg.checkpointer.checkpoint_dir = str(tmp_path / "nowhere")
        folder = tmp_path / kind
        train(recipe, runs.prepared(cfg, LossChoice(kind, False), folder, 3, random_weights=True))
        curves.append([record["loss"] for record in recipe_runs.read_log(folder / recipe_runs.LOG)])
        assert not list(folder.rglob("*.bin"))
    stock, main = curves
    assert stock[0] == pytest.approx(math.log(512), abs=1), "an untrained model"
    assert len(set(stock)) == 3
    assert main == pytest.approx(stock, rel=1.5e-6)


def test_distillation_on_random_weights_beside_stocks(tmp_path):
    """Student, teacher and both losses, in torchtune's recipe and in ours."""
    write_assets(assets := tmp_path / "assets")
    curves = {}
    for kind, recipe in (("stock", stock_recipe), ("chunked", our_recipe), ("auto", our_recipe)):
        # Configured is the other one's pair of losses, which the comparison replaces.
        ours = kind == "stock"
        cfg = distillation_config(assets, tmp_path, DISTILLATION, tied=True, divergence="Reverse", ours=ours)
        cfg.checkpointer.checkpoint_dir = cfg.teacher_checkpointer.checkpoint_dir = str(tmp_path / "nowhere")
        folder = tmp_path / kind
        trained = train(recipe(DISTILLATION), runs.prepared(cfg, LossChoice(kind, False), folder, 3, True))
        curves[kind] = [(log["class_loss"], log["kd_loss"]) for log in recipe_runs.read_log(folder / recipe_runs.LOG)]
        assert trained._kd_loss_fn.__class__.__name__.startswith("ReverseKL" if kind == "stock" else "LinearReverseKL")
        assert not list(folder.rglob("*.bin"))
    assert len({kd for _, kd in curves["stock"]}) == 3
    for ours in (curves["chunked"], curves["auto"]):
        assert ours == [pytest.approx(step, rel=3e-6) for step in curves["stock"]]


def test_preferences_on_random_weights_beside_stocks(tmp_path):
    """The loss stays; on pairs made here."""
    write_preference_assets(assets := tmp_path / "assets")
    demo = DemoData(rows=3 * 2 * 2 * 2, sequence=48, vocabulary=265, pairs=True)
    text = {f"{i}.py": f"def f{i}(x):\n    return x + {i}\n" * 20 for i in range(30)}
    demo.make(tmp_path / "data", text)
    curves = []
    for kind, recipe in (("stock", stock_recipe), ("chunked", our_recipe)):
        cfg = preference_config(assets, tmp_path, LORA_DPO, tied=True, overrides=("batch_size=2",))
        cfg.checkpointer.checkpoint_dir = str(tmp_path / "nowhere")
        cfg.logprobs = {"workspace_mib": 64}
        for section, content in demo.sections(tmp_path / "data").items():
            cfg[section] = content
        folder = tmp_path / kind
        ready = runs.prepared(cfg, LossChoice(kind, False), folder, 3, True)
        assert ready.loss == cfg.loss
        assert ready.get("logprobs") == (
            {"_component_": "torchtune_lce.LinearTokenLogprobs", "workspace_mib": 64, "impl": "chunked"}
            if kind == "chunked"
            else None
        )
        train(recipe(LORA_DPO), ready)
        curves.append([record["loss"] for record in recipe_runs.read_log(folder / recipe_runs.LOG)])
        assert not list(folder.rglob("*.bin"))
    stock, ours = curves
    assert len(set(stock)) >= 2
    assert ours == pytest.approx(stock, rel=1e-5)


def test_a_reference_on_random_weights_is_the_policy(tmp_path):
    write_preference_assets(assets := tmp_path / "assets")
    cfg = preference_config(assets, tmp_path, FULL_DPO_DISTRIBUTED, tied=True)
    ready = runs.prepared(cfg, LossChoice("cce", True), tmp_path / "cce", 3, True)
    assert ready.ref_checkpointer == ready.checkpointer
    assert ready.compile is True
    for kind, message in (("main", "main is a loss of labels"),):
        with pytest.raises(CommandError, match=message):
            preferences.check([LossChoice(kind, False)])


def test_lora_on_the_output_beside_stocks(tmp_path):
    write_assets(tmp_path / "assets")
    curves = []
    for kind, recipe in (("stock", stock_recipe), ("main", our_recipe), ("chunked", our_recipe)):
        cfg = recipe_config(tmp_path / "assets", tmp_path, LORA, tied=False, loss=OUR_LOSS)
        del cfg.model.tie_word_embeddings
        cfg.model._component_ = "torchtune.models.llama3._component_builders.lora_llama3"
        cfg.model.apply_lora_to_output = True
        folder = tmp_path / kind
        trained = train(recipe(LORA), runs.prepared(cfg, LossChoice(kind, False), folder, 3, True))
        curves.append([record["loss"] for record in recipe_runs.read_log(folder / recipe_runs.LOG)])
        assert trained._model.output.lora_b.weight.abs().max() > 0, "it starts at zero"
    stock, main, chunked = curves
    assert len(set(stock)) == 3
    assert main == pytest.approx(stock, rel=1.5e-6)
    assert chunked == pytest.approx(stock, rel=1.5e-6)


def test_load_only_loads_what_the_checkpointer_loads(tmp_path):
    write_assets(tmp_path / "assets")
    section = recipe_config(tmp_path / "assets", tmp_path / "out", LORA, tied=True, loss=OUR_LOSS).checkpointer
    checkpointer = LoadOnly(OmegaConf.to_container(section), model_type="LLAMA3_2", should_load_recipe_state=False)
    loaded = checkpointer.load_checkpoint()["model"]
    assert loaded.keys() == torch.load(tmp_path / "assets" / "tied.pt").keys()
    checkpointer.save_checkpoint({}, epoch=0, intermediate_checkpoint=False)
    assert not Path(section.output_dir, "epoch_0").exists()
