"""Configs and overrides that are none, in every command that reads them: one sentence, and no traceback."""

import argparse
import sys
from functools import partial

import pytest
from omegaconf import OmegaConf

from torchtune_lce.commands import cli, registry
from torchtune_lce.commands.compare import command as compare
from torchtune_lce.commands.plan import command as plan
from torchtune_lce.commands.shared import config_reading
from torchtune_lce.commands.shared.errors import CommandError
from torchtune_lce.commands.shared.recipe_choice import recipe_for

CONFIG = "lce/llama3_2/1B_lora_single_device"
TEXT = "model:\n  _component_: torchtune.models.qwen2.qwen2\n"
FILES = {
    "utf16": (
        TEXT.encode("utf-16"),
        "must be a text file in UTF-8: 'utf-8' codec can't decode byte 0xff in pos",
    ),
    "latin1": (b'name: "gr\xfc\xdfe"\n', "must be a text file in UTF-8: 'utf-8' codec can't decode byte 0xfc in pos"),
    "list": (b"- model\n", "must hold sections and settings by name, got a list"),
    "number": (b"7\n", "is no YAML file: Invalid loaded object type: int"),
    "unclosed": (b"model: [\n", "is no YAML file: while parsing a flow node"),
    "tab": (b"model:\n\tlayers: 1\n", "is no YAML file: while scanning for the next token found character"),
    "duplicate": (b"seed: 1\nseed: 2\n", "is no YAML file: while constructing a mapping"),
    "documents": (b"seed: 1\n---\nseed: 2\n", "is no YAML file: expected a single document in the stream"),
    "control": (b"model: \x00\n", "is no YAML file: unacceptable character #x0000"),
    "digits": (b"seed: " + b"9" * 5000, "is no YAML file: Exceeds the limit"),
    "set": (b"model: !!set {a, b}\n", "is no YAML file: Value 'set' is not a supported primitive type"),
    "brace": (b"seed: ${rows\n", "is no YAML file: no viable alternative at input '${rows'"),
    "integer": (b"1: 2\n", "must have names for its settings, got the key 1"),
    "on": (b"on: 2\n", "must have names for its settings, got the key True"),
    "null": (b"null: 2\n", "is no YAML file: Incompatible key type 'NoneType'"),
    "section": (TEXT.encode() + b"  3: 4\n", "must have names for its settings, got the key 3 in model"),
    "component": (
        b"loss:\n  _component_: 3\n",
        "loss._component_ must be the dotted name of a class or a function, got 3",
    ),
    "config": (b"config: mine\n", "must have no setting named config, which torchtune takes for its own option"),
    "interpolation": (b"seed: ${rows}\n", "Interpolation key 'rows' not found"),
}
OVERRIDES = {
    "loss.metrics=[accuracy": "while parsing a flow sequence",
    "loss.softcap=*x": "found undefined alias",
    "seed=!!int abc": "invalid literal for int() with base 10: 'abc'",
    "batch_size=${rows": "no viable alternative at input '${rows'",
    "seed": "Command-line overrides must be in the form of key=value, got seed",
    "model.lora_attn_modules.0=x": "Cannot merge incompatible container types",
    "~seed.x": "'NoneType' object is not subscriptable",
    "~nothing": "Could not find key nothing in yaml config to remove",
    "loss..impl=cce": "a name is empty",
    "=1": "a name is empty",
}


def _parsed(module, *arguments: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    module.add_parser(parser.add_subparsers())
    return parser.parse_args(arguments)


def ended(capsys, command: str, config: str, *overrides: str) -> str:
    """What the command said as it ended with status 2."""
    if command in ("plan", "compare"):
        args = _parsed({"plan": plan, "compare": compare}[command], command, "--config", config, *overrides)
        run = partial(args.func, args)
    else:
        words = [config] if command == "validate" else ["lce_full_finetune_single_device", "--config", config]
        sys.argv = ["tune-lce", command, *words, *overrides]
        run = cli.main
    with pytest.raises(SystemExit) as end:
        run()
    assert end.value.code == 2
    return capsys.readouterr().err


@pytest.fixture(autouse=True)
def _arguments_and_folder(monkeypatch, tmp_path):
    registry.register()
    monkeypatch.setattr(sys, "argv", sys.argv)
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize("name", FILES)
def test_a_file_that_is_no_config(capsys, tmp_path, name):
    content, message = FILES[name]
    path = tmp_path / f"{name}.yaml"
    path.write_bytes(content)
    for command in ("plan", "compare", "validate", "run"):
        said = ended(capsys, command, str(path))
        assert f"{path}" in said, command
        assert message in said, command
        assert len(said.splitlines()) <= 3, "torchtune's parsers say their usage before"


@pytest.mark.parametrize("name", ["missing.yaml", "", ".", "x" * 5000])
def test_no_file(capsys, name):
    for command in ("plan", "compare", "run"):
        said = ended(capsys, command, name)
        assert "--config takes a name that `tune-lce ls` lists or the path of a YAML file, got " in said
    if name:
        assert "config takes a name that `tune-lce ls` lists or the path" in ended(capsys, "validate", name)


@pytest.mark.parametrize("override", OVERRIDES)
def test_an_override_that_is_none(capsys, override):
    for command in ("plan", "compare", "run"):
        said = ended(capsys, command, CONFIG, "dtype=fp32", override)
        assert f"{override!r} is no override of the config: {OVERRIDES[override]}" in said, command


def test_several_overrides_are_read_together():
    """A setting that is taken out of the file and given anew stays."""
    config = config_reading.read(CONFIG, ["loss.softcap=3", "~loss.impl", "loss.impl=chunked"])
    assert (config.loss.impl, config.loss.softcap) == ("chunked", 3)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({}, "has no model._component_"),
        ({"model": None}, "has no model._component_"),
        ({"loss": "cce"}, "has no loss._component_"),
        ({"checkpointer": None}, "has no checkpointer.model_type"),
        ({"device": "abacus"}, "the config's device must be one that torch knows, got 'abacus'"),
        ({"device": None}, "the config's device must be one that torch knows, got None"),
        ({"dtype": None}, "the config's dtype must be bf16, fp16 or fp32, got None"),
        ({"batch_size": "abc"}, "batch_size must be a whole number of at least 1, got 'abc'"),
        ({"gradient_accumulation_steps": 0}, "gradient_accumulation_steps must be a whole number of at least 1, got 0"),
    ],
)
def test_sections_that_are_missing(capsys, tmp_path, changes, message):
    path = tmp_path / "own.yaml"
    OmegaConf.save(OmegaConf.merge(config_reading.read(CONFIG, []), changes) if changes else {}, path)
    # The plan reads neither checkpoint nor device.
    for command in ("compare",) if changes.keys() & {"checkpointer", "device"} else ("plan", "compare"):
        assert message in ended(capsys, command, str(path)), command


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ("  impl: CCE\n  softcap: -1\n", "loss.softcap must be None or a finite number > 0, got -1"),
        ("  impl: CCE\n", "loss.impl must be one of auto, cce,"),
        ("  bogus: 1\n", "loss: torchtune_lce.LinearCrossEntropyLoss got an unexpected keyword argument 'bogus'"),
        ("  metrics: [accuracy, speed]\n", "loss.metrics must be names out of"),
        ("kd_loss:\n  _component_: torchtune_lce.LinearForwardKLLoss\n  impl: cce\n", "kd_loss.impl must be one of"),
        (
            "kd_loss:\n  _component_: torchtune_lce.LinearKLLoss\n",
            "kd_loss: Error loading 'torchtune_lce.Lin",
        ),
    ],
)
def test_settings_that_a_loss_does_not_take(capsys, tmp_path, settings, message):
    path = tmp_path / "own.yaml"
    config = OmegaConf.to_container(config_reading.read(CONFIG, []))
    del config["loss"]
    loss = "loss:\n  _component_: torchtune_lce.LinearCrossEntropyLoss\n"
    path.write_text(OmegaConf.to_yaml(config) + loss + settings)
    for command in ("plan", "compare", "validate"):
        assert message in ended(capsys, command, str(path)), command


def test_validate_names_what_torchtune_ends_in_a_traceback_for(capsys, tmp_path):
    path = tmp_path / "own.yaml"
    path.write_text("optimizer:\n  _component_: torch.optim.AdamW\n  speed: 9\n")
    assert "got an unexpected keyword argument 'speed'" in ended(capsys, "validate", str(path))
    path.write_text("model:\n  _component_: torchtune.models.none\n")
    assert "Error loading 'torchtune.models.none'" in ended(capsys, "validate", str(path))


@pytest.mark.parametrize("loss", ["torchtune.rlhf.loss.PPOLoss", "torchtune.dev.rl.loss.GRPOSimpleLoss"])
def test_a_config_of_reinforcement_is_no_fine_tune(loss):
    """Of a name or of a file of one's own."""
    config = OmegaConf.create({"model": {"lora_rank": 8}, "loss": {"_component_": loss}})
    for name in ("mine.yaml", "llama3_1/8B_lora_dpo"):
        with pytest.raises(CommandError, match=f"loss._component_ must be one of .*DPOLoss.* got {loss}"):
            recipe_for(name, config, None)
