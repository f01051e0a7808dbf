"""Every config of the installed torchtune that trains with cross-entropy or on preferences (DPO, PPO), and the
output projection of its model.

    python tests/support/stock_configs.py     writes docs/models.md and the table in README.md

Models are built as torchtune's recipes build them, but on the meta device: no data, no memory.
"""

import json
from argparse import Namespace
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Literal
from unittest import mock

import torch
import torchtune
from omegaconf import DictConfig, OmegaConf
from project import ROOT
from torch import nn
from torchao.dtypes.nf4tensor import NF4Tensor, to_nf4
from torchtune import config
from torchtune._recipe_registry import get_all_recipes
from torchtune.config._utils import _merge_yaml_and_cli_args
from torchtune.modules.low_precision import _register_nf4_dispatch_ops, nf4_linear
from torchtune.modules.peft import dora, get_adapter_params, lora, set_trainable_params
from torchtune.modules.tied_linear import TiedLinear
from torchtune.training import set_default_dtype
from vision_models import import_vision_models

FOLDER = Path(torchtune.__file__).parent.parent / "recipes" / "configs"
PAGE = ROOT / "docs" / "models.md"
README = ROOT / "README.md"
# Between these stands the README's table.
MARKS = "<!-- which models -->\n", "<!-- end -->\n"
RECIPES = ROOT / "recipes"
OVERRIDE = "loss=torchtune_lce.LinearCrossEntropyLoss"
KD_OVERRIDE = "kd_loss=torchtune_lce.LinearForwardKLLoss"
STOCK_LOSS = "torchtune.modules.loss.CEWithChunkedOutputLoss"
PREFERENCE_LOSSES = ("torchtune.rlhf.loss.DPOLoss", "torchtune.rlhf.loss.PPOLoss")
# By its own header; torchtune's list of configs leaves it out.
UNLISTED = {"dev/8B_full_experimental": "full_finetune_distributed"}
# Rows of the README's table, by the packages of torchtune.models.
FAMILIES = {
    "llama2": "Llama 2, Code Llama",
    "code_llama2": "Llama 2, Code Llama",
    "llama3": "Llama 3, 3.1, 3.2, 3.3",
    "llama3_1": "Llama 3, 3.1, 3.2, 3.3",
    "llama3_2": "Llama 3, 3.1, 3.2, 3.3",
    "llama3_3": "Llama 3, 3.1, 3.2, 3.3",
    "llama3_2_vision": "Llama 3.2 Vision",
    "gemma": "Gemma, Gemma 2",
    "gemma2": "Gemma, Gemma 2",
    "mistral": "Mistral",
    "phi3": "Phi 3, Phi 4",
    "phi4": "Phi 3, Phi 4",
    "qwen2": "Qwen 2, Qwen 2.5",
    "qwen2_5": "Qwen 2, Qwen 2.5",
}
# Its columns: what begins a config's method, the first that does; else its recipe tells.
METHODS = {
    "full": "full",
    "lora": "LoRA",
    "qlora": "QLoRA",
    "dora": "DoRA, QDoRA",
    "qdora": "DoRA, QDoRA",
    "qat_full": "QAT",
    "qat_lora": "QAT with LoRA †",
}


# What is trained, a distillation's teacher, PPO's policy.
PARTS = ("model", "teacher_model", "policy_model")


@dataclass(frozen=True)
class Subject:
    """A model of a config: ``part`` is the config's section, one of :data:`PARTS`."""

    config: str
    recipe: str
    part: str = "model"

    @property
    def model(self) -> str:
        """Whose sizes it has, such as ``llama3_2/1B``."""
        family, _, method = self.config.partition("/")
        return f"{family}/{method.partition('_')[0]}"

    @property
    def method(self) -> str:
        return self.config.partition("/")[2].partition("_")[2]

    @property
    def family(self) -> str:
        return FAMILIES[written(self.config)[self.part]["_component_"].split(".")[2]]

    @property
    def distils(self) -> bool:
        return "knowledge" in self.recipe

    @property
    def prefers(self) -> bool:
        """Whether it learns from pairs of answers, or from rewards."""
        return "_dpo_" in self.recipe or "ppo_" in self.recipe

    @property
    def kind(self) -> str:
        """Column of the README's table."""
        if self.prefers:
            return "DPO, PPO"
        if self.distils:
            return "distillation"
        return next(kind for start, kind in METHODS.items() if self.method.startswith(start))

    @property
    def has_our_recipe(self) -> bool:
        return (RECIPES / f"{self.recipe}.py").exists()


@dataclass(frozen=True)
class Head:
    """What the loss needs to know of a model: an output projection [rows, width], and what of it is trained."""

    rows: int
    width: int
    tied: bool
    trained: Literal["whole", "adapters", "nothing"]


def subjects(losses: tuple[str, ...] = (STOCK_LOSS,)) -> list[Subject]:
    """All with one of these, in the order of their names."""
    recipes = {
        entry.file_path.removesuffix(".yaml"): recipe.name
        for recipe in get_all_recipes()
        if not recipe.name.startswith("lce_")
        for entry in recipe.configs
    } | UNLISTED
    found = []
    for path in sorted(FOLDER.rglob("*.yaml")):
        name = path.relative_to(FOLDER).with_suffix("").as_posix()
        cfg = written(name)
        section = cfg.get("loss")
        if not isinstance(section, dict) or section["_component_"] not in losses:
            continue
        found += [Subject(name, recipes[name], part) for part in PARTS if part in cfg]
    return found


@cache
def written(config: str) -> dict:
    """What torchtune's file says."""
    return OmegaConf.to_container(OmegaConf.load(FOLDER / f"{config}.yaml"), resolve=False)


def load(subject: Subject) -> DictConfig:
    """Its config with the loss overridden as on the command line, both losses where it distils, not at all where it
    prefers."""
    overrides = [] if subject.prefers else [OVERRIDE, KD_OVERRIDE] if subject.distils else [OVERRIDE]
    return _merge_yaml_and_cli_args(Namespace(**written(subject.config)), overrides)


def build(subject: Subject) -> nn.Module:
    """Its model as its recipe has it when training begins: quantised where it is, and frozen where it is."""
    cfg = load(subject)
    if "vision" in cfg[subject.part]._component_:
        import_vision_models()
    with set_default_dtype(torch.bfloat16), torch.device("meta"), _without_data():
        model = config.instantiate(cfg[subject.part])
    if subject.part == "teacher_model":
        return model.requires_grad_(False)
    if "lora_rank" in cfg[subject.part]:
        set_trainable_params(model, get_adapter_params(model))
        # Where the recipe also trains for quantisation, it rounds what has adapters; none of these heads has.
        assert "quantizer" not in cfg or not isinstance(decoder_of(model).output, lora.LoRALinear)
    elif "quantizer" in cfg:
        quantizer = config.instantiate(cfg.quantizer)
        quantizer.precision = torch.bfloat16
        model = quantizer.prepare(model)
    return model


def decoder_of(model: nn.Module) -> nn.Module:
    return getattr(model, "decoder", model)


def described(model: nn.Module) -> Head:
    """Read off torchtune's model, without this package."""
    decoder = decoder_of(model)
    tied = isinstance(decoder.output, TiedLinear)
    weight = decoder.output.tied_module.weight if tied else decoder.output.weight
    if weight.requires_grad:
        trained = "whole"
    else:
        adapters = isinstance(decoder.output, (lora.LoRALinear, dora.DoRALinear))
        trained = "adapters" if adapters else "nothing"
    return Head(*weight.shape, tied=tied, trained=trained)


def models(losses: tuple[str, ...] = (STOCK_LOSS,)) -> Iterator[tuple[Subject, nn.Module]]:
    """Each subject with its model, one of which serves all configs that have the same."""
    alike = {}
    for subject in subjects(losses):
        alike.setdefault(_model_key(subject), []).append(subject)
    for group in alike.values():
        model = build(group[0])
        for subject in group:
            yield subject, model


def _model_key(subject: Subject) -> str:
    """Equal for subjects whose models are the same: many configs differ in nothing that a model knows."""
    cfg = written(subject.config)
    return json.dumps([cfg[subject.part], cfg.get("quantizer"), "lora" in subject.recipe, subject.part])


@cache
def _quantised(shape: torch.Size, dtype: torch.dtype, settings: tuple) -> NF4Tensor:
    return to_nf4(torch.empty(shape, dtype=dtype, device="meta"), **dict(settings))


@contextmanager
def _without_data() -> Iterator[None]:
    """On the meta device, where no numbers are, leave out the work on them: it takes minutes."""

    def quantised_once(weight: torch.Tensor, **settings: int):
        return _quantised(weight.shape, weight.dtype, tuple(settings.items()))

    with ExitStack() as patches:
        for module in (lora, dora, nf4_linear, _register_nf4_dispatch_ops):
            patches.enter_context(mock.patch.object(module, "to_nf4", quantised_once))
        for name in ("kaiming_uniform_", "uniform_", "normal_", "zeros_", "ones_"):
            patches.enter_context(mock.patch.object(nn.init, name, lambda tensor, *settings, **named: tensor))
        yield


def page(table: dict[Subject, Head]) -> str:
    """docs/models.md."""
    projections, distillations, preferences = {}, [], []
    for subject, head in sorted(table.items(), key=lambda item: item[0].config):
        if subject.prefers:
            shape = f"{head.rows} × {head.width}, {'tied' if head.tied else 'its own'}"
            preferences.append(_row(subject.config, subject.recipe, shape, head.trained))
        elif not subject.distils:
            shape = f"{head.rows} × {head.width}, {'tied' if head.tied else 'its own'}"
            methods = projections.setdefault((subject.model, shape), {"whole": [], "adapters": [], "nothing": []})
            methods[head.trained].append(_cell(subject))
        elif subject.part == "model":
            teacher = table[replace(subject, part="teacher_model")]
            shapes = (f"{each.rows} × {each.width}" for each in (head, teacher))
            distillations.append(_row(subject.config, *shapes))
    return PAGE_TEXT.format(
        count=len({subject.config for subject in table if not subject.prefers}),
        preference_count=len(preferences),
        version=version("torchtune"),
        override=OVERRIDE,
        kd_override=KD_OVERRIDE,
        models="\n".join(
            _row(model, shape, *(", ".join(names) for names in methods.values()))
            for (model, shape), methods in sorted(projections.items())
        ),
        distillations="\n".join(distillations),
        preferences="\n".join(preferences),
    )


PAGE_TEXT = """\
# Which models

All {count} configs of torchtune {version} that train with cross-entropy: each one's own model was built on the meta
device, with nothing overridden but the loss, and bound to it. `python tests/support/stock_configs.py` writes this page;
a test builds and binds them all again and compares it.

| Model | Output projection | Trained by | LoRA on it | Frozen in |
|---|---|---|---|---|
{models}

A config's name is `<model>_<method>`, such as `llama3_2/1B_lora_single_device`. Each runs with the recipe of the same
name as torchtune's, by `tune run torchtune_lce/recipes/<recipe>.py` or `tune-lce run lce_<recipe>`, and
`{override}`. Where a star stands there is no such recipe: add
`self._loss_fn.set_model_output(self._model)` at the end of `setup()` in your own `tune cp` copy of torchtune's.

`qat_full` rounds the head as torchtune does: hidden states to 8 bits, the weight to 4. All others leave it as it is.

† The recipe of these configs needs torchao 0.11 or older with torchtune 0.6.1, whose LoRA layer for it does not know
what newer ones call their settings. Our recipe then raises a RuntimeError that says so, before anything is loaded;
torchtune's own fails on an AssertionError without a message, once its checkpoint is loaded. Here the models were built
and bound without the recipe.

## Distillation

These recipes need two overrides, the one above and `{kd_override}`. Both losses were
bound to both models as our recipe binds them, and called: each model returned hidden states, the loss had a gradient by
the student's, and no head got one. The student is trained with LoRA, its head frozen; the teacher is not trained.

| Config | Student's projection | Teacher's |
|---|---|---|
{distillations}

## Preference tuning

All {preference_count} DPO and PPO configs need no override: the loss stays torchtune's, and our recipes take its
log-probabilities from hidden states ([preference-tuning.md](preference-tuning.md)). Each one's model was bound as they
bind it, from torchtune's config unchanged, and gave log-probabilities and mean logits.

| Config | Recipe | Output projection | Trained of it |
|---|---|---|---|
{preferences}
"""


def _row(*cells: str) -> str:
    return f"| {' | '.join(cells)} |"


def _cell(subject: Subject) -> str:
    dagger = " †" if subject.method == "qat_lora" else ""
    return subject.method + dagger + ("" if subject.has_our_recipe else " *")


def table() -> str:
    """The README's: how many configs there are of each family and method."""
    found = [subject for subject in subjects((STOCK_LOSS, *PREFERENCE_LOSSES)) if subject.part != "teacher_model"]
    counts = Counter((subject.family, subject.kind) for subject in found)
    kinds = [*dict.fromkeys(METHODS.values()), "distillation", "DPO, PPO"]
    families = dict.fromkeys(FAMILIES.values())
    rows = [_row(family, *(str(counts[family, kind] or "") for kind in kinds)) for family in families]
    assert counts.total() == len(found)
    return "\n".join([_row("", *kinds), _row("---", *["---:"] * len(kinds)), *rows, ""])


def readme_table() -> str:
    """What stands in its place in README.md now."""
    start, end = MARKS
    return README.read_text(encoding="utf-8").partition(start)[2].partition(end)[0]


if __name__ == "__main__":
    every = models((STOCK_LOSS, *PREFERENCE_LOSSES))
    PAGE.write_text(page({subject: described(model) for subject, model in every}))
    start, end = MARKS
    written_now = README.read_text(encoding="utf-8")
    README.write_text(written_now.replace(f"{start}{readme_table()}{end}", f"{start}{table()}{end}"), encoding="utf-8")
