"""The bundled configs: all there, well-formed, torchtune's own but for the loss, and started as their headers say."""

import importlib.util
import re
import shlex
from pathlib import Path

import pytest
import torchtune
from omegaconf import OmegaConf
from torchtune._cli.tune import TuneCLIParser
from torchtune._recipe_registry import get_all_recipes
from vision_models import import_vision_models

from torchtune_lce.commands import registry
from torchtune_lce.implementations import choice

CONFIGS = registry.PACKAGE / "configs"
STOCK = Path(torchtune.__file__).parent.parent / "recipes" / "configs"
METHODS = {
    "llama3_2/1B": ["lora_single_device", "full_single_device", "qlora_single_device", "qat_lora"],
    "llama3_2/3B": ["lora_single_device", "full_single_device", "qlora_single_device", "lora", "full"],
    "llama3_1/8B": [
        "lora_single_device",
        "full_single_device",
        "qlora_single_device",
        "lora",
        "full",
        "lora_dpo_single_device",
        "lora_dpo",
        "full_dpo",
    ],
    "llama2/7B": ["lora_dpo_single_device", "lora_dpo"],
    "llama3_1/70B": ["lora", "full"],
    "qwen2_5/0.5B": ["lora_single_device", "full_single_device"],
    "qwen2_5/1.5B": ["lora_single_device", "full_single_device"],
    "qwen2_5/7B": ["lora_single_device", "full_single_device", "lora", "full"],
    "qwen2_5/72B": ["lora"],  # torchtune has no full one
    "gemma2/2B": ["lora_single_device", "qlora_single_device"],
    "gemma2/9B": ["lora_single_device", "qlora_single_device", "lora", "full"],
    "gemma2/27B": ["lora", "full"],
    "mistral/7B": [
        "lora_single_device",
        "qlora_single_device",
        "full_low_memory",
        "lora",
        "full",
        "full_ppo_low_memory",
    ],
    "phi4/14B": ["lora_single_device", "qlora_single_device", "full_low_memory"],
    "llama3/8B": ["qat_full"],
    "llama3_2_vision/11B": ["lora_single_device", "lora"],
    "llama3_2/8B_to_1B": ["KD_lora_single_device", "KD_lora_distributed"],
    "qwen2/1.5_to_0.5B": ["KD_lora_single_device", "KD_lora_distributed"],
}
OF_A_STOCK_CONFIG = sorted(f"{model}_{method}" for model, methods in METHODS.items() for method in methods)
ALL = sorted([*OF_A_STOCK_CONFIG, *(f"tiny/{method}_single_device" for method in ("lora", "full", "lora_dpo"))])


def path_of(name: str) -> Path:
    return CONFIGS / f"{name}.yaml"


def load(path: Path) -> dict:
    return OmegaConf.to_container(OmegaConf.load(path), resolve=False)


def header(name: str) -> list[str]:
    lines = path_of(name).read_text().splitlines()
    return [line.removeprefix("#").strip() for line in lines[: lines.index("")]]


def commands(name: str, start: str) -> list[list[str]]:
    return [shlex.split(line) for line in header(name) if line.startswith(start)]


def runs(name: str, program: str) -> list[tuple[int, list[str]]]:
    """Every ``<program> run`` of the header: on how many devices, and the words from the recipe on."""
    found = []
    for _, _, *words in commands(name, f"{program} run"):
        distributed = words[0] == "--nproc_per_node"
        found.append((int(words[1]), words[2:]) if distributed else (1, words))
    return found


def test_exactly_the_required_configs_are_bundled():
    assert len(ALL) == 57
    assert sorted(path.relative_to(CONFIGS).with_suffix("").as_posix() for path in CONFIGS.rglob("*.yaml")) == ALL


@pytest.mark.parametrize("name", ALL)
def test_tune_validate_passes(name, monkeypatch, capsys, tmp_path):
    if "vision" in name:
        # torchtune's package of them; without torchvision it cannot be imported otherwise.
        import_vision_models()
    path = path_of(name)
    config = OmegaConf.load(path)
    if config.optimizer._component_.startswith("bitsandbytes.") and not importlib.util.find_spec("bitsandbytes"):
        # torchtune imports every component. This one is stock's, as another test says; the rest is validated.
        del config["optimizer"]
        path = tmp_path / "without_optimizer.yaml"
        OmegaConf.save(config, path)
    monkeypatch.setattr("sys.argv", ["tune", "validate", str(path)])
    parser = TuneCLIParser()
    parser.run(parser.parse_args())
    assert "well-formed" in capsys.readouterr().out


@pytest.mark.parametrize("name", OF_A_STOCK_CONFIG)
def test_settings_are_torchtunes_but_for_the_loss(name):
    ours, stock = load(path_of(name)), load(STOCK / f"{name}.yaml")
    if "_dpo" in name or "_ppo" in name:
        assert ours.pop("logprobs") == {"_component_": "torchtune_lce.LinearTokenLogprobs", "impl": "auto"}
        assert stock["loss"]["_component_"] == f"torchtune.rlhf.loss.{'DPO' if '_dpo' in name else 'PPO'}Loss"
    else:
        assert stock.pop("loss") == {"_component_": "torchtune.modules.loss.CEWithChunkedOutputLoss"}
        assert ours.pop("loss") == {"_component_": "torchtune_lce.LinearCrossEntropyLoss", "impl": "auto"}
    if "_KD_" in name:
        assert stock.pop("kd_loss") == {"_component_": "torchtune.modules.loss.ForwardKLWithChunkedOutputLoss"}
        assert ours.pop("kd_loss") == {"_component_": "torchtune_lce.LinearForwardKLLoss", "workspace_mib": 128}
    assert ours.pop("log_level") == "INFO"
    assert ours.pop("output_dir") == stock.pop("output_dir").replace("/torchtune/", "/torchtune_lce/")
    assert list(ours) == list(stock), "torchtune's order"
    assert ours == stock


@pytest.mark.parametrize("name", ALL)
def test_header_starts_an_existing_recipe_with_this_config(name):
    ours = {
        recipe.name: {config.name: Path(config.file_path) for config in recipe.configs} for recipe in registry.recipes()
    }
    by_name = runs(name, "tune-lce")
    assert len(by_name) == 2, "one to start it, one with overrides"
    for devices, (recipe, option, config, *overrides) in by_name:
        assert option == "--config"
        assert (devices > 1) == recipe.endswith("_distributed")
        assert ours[recipe][config] == path_of(name)
        for override in overrides:
            assert OmegaConf.select(OmegaConf.load(path_of(name)), override.partition("=")[0]) is not None
    [(devices, (recipe, option, config, *_))] = runs(name, "tune")
    assert option == "--config"
    assert devices == by_name[0][0] == by_name[1][0]
    assert (registry.PACKAGE.parent / recipe).exists()
    assert Path(recipe).stem == by_name[0][1][0].removeprefix("lce_")
    if not name.startswith("tiny/"):
        assert (registry.PACKAGE.parent / config).samefile(path_of(name))


@pytest.mark.parametrize("name", OF_A_STOCK_CONFIG)
def test_header_names_stocks_config_and_what_to_install(name):
    stock = {config.name: recipe.name for recipe in get_all_recipes() for config in recipe.configs}
    assert f"torchtune's {name}." in " ".join(header(name))
    assert runs(name, "tune-lce")[0][1][0] == f"lce_{stock[name]}"
    needs_bitsandbytes = load(path_of(name))["optimizer"]["_component_"].startswith("bitsandbytes.")
    assert ("pip install bitsandbytes" in header(name)) == needs_bitsandbytes


@pytest.mark.parametrize("name", OF_A_STOCK_CONFIG)
def test_downloaded_model_lands_where_the_config_reads_it(name):
    downloads = commands(name, "tune download")
    config = load(path_of(name))
    models = [config[key] for key in ("checkpointer", "teacher_checkpointer", "value_checkpointer") if key in config]
    # What DPO and PPO compare with is the model that they start from; a value model starts from the reward model.
    for key in ("ref_checkpointer", "ref_policy_checkpointer"):
        assert config.get(key, models[0])["checkpoint_dir"] == models[0]["checkpoint_dir"]
    assert config.get("reward_checkpointer", models[-1])["checkpoint_dir"] == models[-1]["checkpoint_dir"]
    folders = [Path(download[download.index("--output-dir") + 1]) for download in downloads]
    # Meta's own checkpoints lie a folder further down.
    directories = [Path(model["checkpoint_dir"]) for model in models]
    assert [path.parent if path.name == "original" else path for path in directories] == folders
    folder = folders[0]
    tokenizer_files = [value for key, value in config["tokenizer"].items() if re.search("path|file", key)]
    assert tokenizer_files
    assert all(folder in Path(file).parents for file in tokenizer_files)


@pytest.mark.parametrize("name", ALL)
def test_comment_beside_impl_lists_the_choices(name):
    [line] = [line for line in path_of(name).read_text().splitlines() if line.startswith("  impl: ")]
    listed = re.fullmatch(r"  impl: auto  # or (.*)", line)[1].split(", ")
    covered = {impl for impl in choice.NAMES for pattern in listed if re.fullmatch(pattern.replace("*", ".*"), impl)}
    assert covered == set(choice.NAMES) - {"auto"}


def test_tiny_configs_differ_only_by_method():
    lora, full = load(path_of("tiny/lora_single_device")), load(path_of("tiny/full_single_device"))
    for key in ("tokenizer", "checkpointer", "dataset", "seed", "batch_size", "loss", "max_steps_per_epoch", "dtype"):
        assert lora[key] == full[key], key
    dpo = load(path_of("tiny/lora_dpo_single_device"))
    for key in ("model", "checkpointer", "seed", "lr_scheduler", "max_steps_per_epoch", "dtype"):
        assert lora[key] == dpo[key], key
    assert dpo["tokenizer"] | {"max_seq_len": 256} == lora["tokenizer"]
    sizes = {key: value for key, value in full["model"].items() if key != "_component_"}
    assert sizes.items() <= lora["model"].items()
    assert len(full["tokenizer"]["special_tokens"]) == 3
    assert max(full["tokenizer"]["special_tokens"].values()) + 1 == sizes["vocab_size"] == 32768
