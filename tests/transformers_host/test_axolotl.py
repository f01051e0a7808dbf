"""torchtune_lce.axolotl.Plugin in Axolotl itself: its config, data, model loader and trainer, on a tiny model."""

import json
import os
from pathlib import Path

import pytest
import torch
import yaml
from tiny_transformers import VOCABULARY, batch, build, step

# Before Axolotl is imported: nothing is looked for on a hub, nothing is told to anybody.
os.environ |= {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "AXOLOTL_DO_NOT_TRACK": "1"}
pytest.importorskip("axolotl")

from axolotl.cli.config import load_cfg
from axolotl.common.datasets import load_datasets
from axolotl.integrations.base import PluginManager
from axolotl.train import train
from axolotl.utils.dict import DictDefault
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

OURS = "torchtune_lce.axolotl.Plugin"
# With which Axolotl changes the class of the model's attention, for all tests that follow.
NO_KERNELS = {"lora_qkv_kernel": False, "lora_mlp_kernel": False, "lora_o_kernel": False}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A model, its tokenizer and a data set, as files."""
    folder = tmp_path_factory.mktemp("axolotl")
    words = ["<pad>", "<s>", "</s>", "<unk>", *(f"w{number}" for number in range(VOCABULARY - 4))]
    tokenizer = Tokenizer(models.WordLevel({word: place for place, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    special = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special).save_pretrained(folder / "model")
    build("Llama").save_pretrained(folder / "model")
    rows = torch.randint(4, 20, (32, 20), generator=torch.Generator().manual_seed(1)).tolist()
    texts = [json.dumps({"text": " ".join(words[place] for place in row)}) for row in rows]
    (folder / "data.jsonl").write_text("\n".join(texts))
    return folder


@pytest.fixture(autouse=True)
def no_plugins_of_other_tests(monkeypatch):
    """Axolotl keeps them for the process, and asks all of them."""
    monkeypatch.setattr(PluginManager, "_instance", None)
    monkeypatch.setattr("axolotl.loaders.model.PLUGIN_MANAGER", PluginManager.get_instance())


def read(folder: Path, **settings) -> DictDefault:
    """The config as Axolotl's command line reads it."""
    config = {
        "base_model": str(folder / "model"),
        "datasets": [{"path": str(folder / "data.jsonl"), "ds_type": "json", "type": "completion"}],
        "dataset_prepared_path": str(folder / "prepared"),
        "output_dir": str(folder / "out"),
        "dataset_num_proc": 1,
        "val_set_size": 0,
        "sequence_len": 32,
        "micro_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "max_steps": 4,
        "learning_rate": 0.05,
        "optimizer": "adamw_torch",
        "lr_scheduler": "constant",
        "logging_steps": 1,
        "save_strategy": "no",
        "attn_implementation": "sdpa",
        "bf16": False,
        "fp16": False,
        "tf32": False,
        "seed": 3,
    }
    (folder / "config.yaml").write_text(yaml.safe_dump({**config, **settings}))
    return load_cfg(str(folder / "config.yaml"))


def run(folder: Path, **settings):
    """The losses of a run of Axolotl's, and the model that it has trained."""
    cfg = read(folder, **settings)
    torch.manual_seed(0)  # for the adapter's weights
    model, _, trainer = train(cfg=cfg, dataset_meta=load_datasets(cfg=cfg))
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry], model


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"sample_packing": True, "sequence_len": 64},
        {"adapter": "lora", "lora_r": 4, "lora_alpha": 8, "lora_target_modules": ["q_proj", "lm_head"], **NO_KERNELS},
    ],
    ids=["whole", "packed", "LoRA on the head"],
)
def test_trains_as_without_it(folder, settings):
    own, _ = run(folder, **settings)
    ours, model = run(folder, plugins=[OURS], **settings)
    assert len(own) == 4
    assert own[0] - own[-1] > 0.1
    assert ours == pytest.approx(own, abs=1e-4)
    assert step(model.train())[0].logits is None
    assert model.eval()(**batch()).logits is not None


@pytest.mark.parametrize(("given", "eps"), [(0.25, 0.25), (None, None), ("1e-3", 1e-3), ("auto", "auto")])
def test_its_keys_reach_the_patch(folder, given, eps):
    settings = {"lce_impl": "chunked", "lce_filter_eps": given, "lce_workspace_mib": 7}
    _, model = run(folder, plugins=[OURS], max_steps=1, **settings)
    switch = model._lce_switch
    assert (switch.impl, switch.options.filter_eps, switch.options.workspace_mib) == ("chunked", eps, 7)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"lce_impl": "fast"}, "impl must be one of auto, "),
        ({"lce_filter_eps": 2.0}, r"filter_eps must be 'auto', None or a number in \[0, 1\), got 2.0"),
        ({"lce_workspace_mib": 0}, "workspace_mib must be at least 1, got 0"),
        ({"chunked_cross_entropy": True}, f"{OURS} and chunked_cross_entropy are two losses for one model"),
    ],
    ids=["impl", "filter", "workspace", "another loss"],
)
def test_a_bad_config_is_refused_before_a_model_is_loaded(folder, settings, said):
    with pytest.raises(ValueError, match=said):
        read(folder, plugins=[OURS], **settings)


def test_liger_s_loss_beside_ours_is_refused(folder):
    plugins = [OURS, "axolotl.integrations.liger.LigerPlugin"]
    with pytest.raises(ValueError, match="liger_fused_linear_cross_entropy are two losses for one model"):
        read(folder, plugins=plugins, liger_fused_linear_cross_entropy=True)
