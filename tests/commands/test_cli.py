"""``tune-lce`` is torchtune's command line with our names; ``tune run`` takes our recipes by path."""

import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest
from omegaconf import OmegaConf
from tiny_models import FULL, LORA, OUR_LOSS, logged_losses, recipe_config, write_assets
from torchtune._recipe_registry import get_all_recipes

import torchtune_lce
from torchtune_lce.commands import cli, registry

PACKAGE = Path(torchtune_lce.__file__).parent
CONFIG = "lce/llama3_2/1B_lora_single_device"


@pytest.fixture
def tune_lce(monkeypatch, capsys):
    """Runs the command in this process and returns what it printed; raises SystemExit if it ends with an error."""

    def run(*arguments: str) -> str:
        monkeypatch.setattr(sys, "argv", ["tune-lce", *map(str, arguments)])
        try:
            cli.main()
        except SystemExit as end:
            if end.code not in (None, 0):
                raise
        return capsys.readouterr().out

    return run


@pytest.fixture(scope="module")
def tiny_config(tmp_path_factory):
    """Writes the config of a run on the tiny model and returns its path and the folder that it logs to."""
    folder = tmp_path_factory.mktemp("cli")
    write_assets(folder / "assets")

    def write(name: str, method: str) -> tuple[Path, Path]:
        output = folder / name
        cfg = recipe_config(folder / "assets", output, method, tied=True, loss=OUR_LOSS, overrides=["epochs=1"])
        path = folder / f"{name}.yaml"
        OmegaConf.save(cfg, path)
        return path, output

    return write


# ---- names


def test_every_config_on_disk_has_a_name_and_a_recipe():
    written = {path.resolve() for path in (PACKAGE / "configs").rglob("*.yaml")}
    named = [Path(config.file_path).resolve() for recipe in registry.recipes() for config in recipe.configs]
    assert len(named) >= 20
    assert sorted(named) == sorted(written)


def test_every_recipe_on_disk_has_a_name():
    assert {Path(recipe.file_path).name for recipe in registry.recipes()} == {
        path.name for path in (PACKAGE / "recipes").glob("*.py")
    }


def test_names_and_paths():
    recipes = {recipe.name: recipe for recipe in registry.recipes()}
    lora = recipes["lce_lora_finetune_single_device"]
    assert Path(lora.file_path).is_absolute()
    assert not lora.supports_distributed
    names = {config.name: config.file_path for config in lora.configs}
    assert Path(names[CONFIG]) == PACKAGE / "configs" / "llama3_2" / "1B_lora_single_device.yaml"
    assert "lce/llama3_2/1B_qlora_single_device" in names
    full = {config.name for config in recipes["lce_full_finetune_single_device"].configs}
    assert "lce/llama3_2/1B_full_single_device" in full
    assert not full & set(names)


def test_registering_keeps_stock_names_and_happens_once():
    stock = [recipe.name for recipe in get_all_recipes() if not recipe.name.startswith("lce_")]
    registry.register()
    registry.register()
    assert [recipe.name for recipe in get_all_recipes()] == stock + [recipe.name for recipe in registry.recipes()]


def test_find_config():
    registry.register()
    assert registry.find_config(CONFIG) == PACKAGE / "configs" / f"{CONFIG.removeprefix('lce/')}.yaml"
    assert registry.find_config("llama3_2/1B_lora_single_device").exists()
    assert registry.find_config("lce/none/such") is None


# ---- subcommands


def test_help(tune_lce):
    text = tune_lce("--help")
    assert "usage: tune-lce" in text
    assert "lce_<method>" in text
    assert "lce/<model>/<size>_<method>" in text
    for subcommand in ("download", "ls", "cp", "run", "validate", "cat", "demo", "doctor"):
        assert f"\n    {subcommand} " in text
    assert tune_lce() == text


@pytest.mark.parametrize("subcommand", ["download", "ls", "cp", "run", "validate", "cat"])
def test_help_of_subcommands_speaks_of_tune_lce(tune_lce, subcommand):
    text = tune_lce(subcommand, "--help")
    assert f"tune-lce {subcommand}" in text
    assert f" tune {subcommand}" not in text
    assert "`tune ls`" not in text


def test_ls(tune_lce):
    lines = tune_lce("ls").splitlines()
    first = next(index for index, line in enumerate(lines) if line.startswith("lce_"))
    assert any(line.startswith("lora_finetune_single_device") for line in lines[:first])
    assert any(CONFIG in line for line in lines[first:])


def test_cat(tune_lce):
    assert f"_component_: {OUR_LOSS}" in tune_lce("cat", CONFIG)
    assert "is a recipe, not a config" in tune_lce("cat", "lce_lora_finetune_single_device")


def test_cp(tune_lce, tmp_path):
    tune_lce("cp", CONFIG, tmp_path / "mine.yaml")
    assert (tmp_path / "mine.yaml").read_text() == registry.find_config(CONFIG).read_text()
    tune_lce("cp", "lce_lora_finetune_single_device", tmp_path / "mine.py")
    assert (tmp_path / "mine.py").read_text() == (PACKAGE / "recipes" / f"{LORA}.py").read_text()


def test_validate(tune_lce, tmp_path, capsys):
    path = registry.find_config("llama3_2/1B_lora_single_device")
    for config in (CONFIG, "llama3_2/1B_lora_single_device", path):
        assert "well-formed" in tune_lce("validate", config)
    bad = tmp_path / "bad.yaml"
    bad.write_text(f"loss:\n  _component_: {OUR_LOSS}\n  speed: 9\n")
    with pytest.raises(SystemExit):
        tune_lce("validate", bad)
    assert "got an unexpected keyword argument 'speed'" in capsys.readouterr().err


@pytest.mark.parametrize("method", [LORA, FULL])
def test_run_by_name(tune_lce, tiny_config, method):
    config, output = tiny_config(f"{method}_by_name", method)
    tune_lce("run", f"lce_{method}", "--config", config, "max_steps_per_epoch=2", "loss.impl=reference")
    assert len(logged_losses(output)) == 2


def test_run_a_stock_recipe_with_our_loss(tune_lce, tiny_config):
    """The script that runs is torchtune's, so the error can name ours of the same name."""
    config, _ = tiny_config("stock_by_name", FULL)
    with pytest.raises(RuntimeError, match="tune run torchtune_lce/recipes/full_finetune_single_device.py"):
        tune_lce("run", FULL, "--config", config)


def test_single_device_recipes_refuse_torchrun(tune_lce, tiny_config, capsys):
    config, _ = tiny_config("torchrun", LORA)
    with pytest.raises(SystemExit):
        tune_lce("run", "--nproc_per_node", "2", f"lce_{LORA}", "--config", config)
    assert "tune-lce run: error: Recipe lce_lora_finetune_single_device does not support" in capsys.readouterr().err


# ---- from a shell


def shell(folder: Path, *command: str) -> str:
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    result = subprocess.run(list(map(str, command)), cwd=folder, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return result.stdout + result.stderr


def test_torchaos_notice_is_kept_off_the_screen_and_nothing_else(caplog):
    logging.getLogger("torchao").warning("matters")
    logging.getLogger("torchao").warning("Skipping import of cpp extensions due to incompatible torch version 1 for 2")
    logging.getLogger("torchao").warning("Skipping import of cpp extensions due to TORCHAO_FORCE")
    assert [record.getMessage()[-7:] for record in caplog.records] == ["matters", "O_FORCE"]


def test_tune_run_takes_our_recipe_by_path_from_any_folder(tiny_config, tmp_path):
    config, output = tiny_config("by_path", LORA)
    # torchtune's console script, by the function that it calls.
    tune = (sys.executable, "-c", "from torchtune._cli.tune import main; main()")
    recipe = "torchtune_lce/recipes/lora_finetune_single_device.py"
    said = shell(tmp_path, *tune, "run", recipe, "--config", config, "max_steps_per_epoch=2")
    assert len(logged_losses(output)) == 2
    assert "Linear cross-entropy runs impl 'chunked' (set: 'auto')" in said


def test_python_m_is_the_same_command(tmp_path):
    said = shell(tmp_path, sys.executable, "-m", "torchtune_lce", "validate", CONFIG)
    assert "well-formed" in said
    assert "Skipping import" not in said, "torchao's notice, at its import"
