"""Every config of torchtune that trains with cross-entropy takes the loss, every DPO or PPO config stays as it is, and
what is bound sees the head that there is.
"""

import re
from argparse import Namespace
from dataclasses import dataclass, replace
from importlib.metadata import version

import pytest
import torch
import torch.nn.functional as F
from omegaconf import OmegaConf
from stock_configs import (
    FOLDER,
    OVERRIDE,
    PAGE,
    PREFERENCE_LOSSES,
    STOCK_LOSS,
    Head,
    Subject,
    decoder_of,
    described,
    load,
    models,
    page,
    readme_table,
    subjects,
    table,
    written,
)
from torch import Tensor, nn
from torchtune import config
from torchtune._recipe_registry import get_all_recipes
from torchtune.config._utils import _merge_yaml_and_cli_args
from torchtune.rlhf.loss import DPOLoss, PPOLoss

from torchtune_lce import LinearCrossEntropyLoss, LinearForwardKLLoss
from torchtune_lce.logprobs import TokenFigures
from torchtune_lce.training.preference_binding import make_logprobs

RECIPES = {
    "lora_finetune_single_device": 41,
    "full_finetune_single_device": 17,
    "lora_finetune_distributed": 36,
    "full_finetune_distributed": 27,
    "qat_distributed": 2,
    "qat_lora_finetune_distributed": 4,
    "knowledge_distillation_single_device": 2,
    "knowledge_distillation_distributed": 2,
}
PREFERENCE_RECIPES = {
    "lora_dpo_single_device": 2,
    "lora_dpo_distributed": 2,
    "full_dpo_distributed": 1,
    "ppo_full_finetune_single_device": 1,
}


@dataclass
class Bound:
    """What happened when the loss took a model."""

    head: Head
    vocabulary: int
    logits: torch.Size
    outputs: torch.Size
    product: torch.Size
    weight_is_the_embedding: bool
    trains: str
    released: torch.Size


def bind(model: nn.Module) -> Bound:
    decoder = decoder_of(model)
    width = next(decoder.norm.parameters()).shape[0]
    hidden = torch.empty(1, 4, width, dtype=torch.bfloat16, device="meta")
    embedding = decoder.tok_embeddings
    rows = embedding.num_embeddings if isinstance(embedding, nn.Embedding) else embedding.embedding.num_embeddings
    logits = decoder.unembed(hidden).shape
    loss = LinearCrossEntropyLoss()
    loss.set_model_output(model)
    seen = []

    def product(
        hidden: Tensor, targets: None, weight: Tensor, bias: Tensor | None, adapter: nn.Module | None
    ) -> Tensor:
        seen.append((weight, adapter))
        return F.linear(hidden, weight, bias)

    result = loss._bound.projection.call(product, decoder.unembed(hidden), None)
    outputs = decoder.unembed(hidden).shape
    loss.release()
    [(weight, adapter)] = seen
    return Bound(
        head=described(model),
        vocabulary=rows,
        logits=logits,
        outputs=outputs,
        product=result.shape,
        weight_is_the_embedding=isinstance(embedding, nn.Embedding) and weight is embedding.weight,
        trains="whole" if weight.requires_grad else "nothing" if adapter is None else "adapters",
        released=decoder.unembed(hidden).shape,
    )


@dataclass
class Distilled:
    """What happened when two losses took two models, the student's first."""

    outputs: tuple[torch.Size, torch.Size]
    loss: Tensor
    gradient: torch.Size
    heads_with_gradient: int
    released: tuple[torch.Size, torch.Size]


def distil(subject: Subject, student: nn.Module, teacher: nn.Module) -> Distilled:
    """The two losses of its config, bound and called as the recipe does."""
    cfg = load(subject)
    loss, kd_loss = config.instantiate(cfg.loss), config.instantiate(cfg.kd_loss)
    assert type(loss) is LinearCrossEntropyLoss
    assert type(kd_loss) is LinearForwardKLLoss
    decoders = [decoder_of(model) for model in (student, teacher)]
    hidden, teacher_hidden = (
        torch.empty(1, 4, next(decoder.norm.parameters()).shape[0], dtype=torch.bfloat16, device="meta")
        for decoder in decoders
    )
    hidden.requires_grad_()
    labels = torch.empty(1, 4, dtype=torch.int64, device="meta")
    loss.set_model_output(student)
    kd_loss.set_model_output(student)
    kd_loss.set_teacher_output(teacher)
    outputs = decoders[0].unembed(hidden), decoders[1].unembed(teacher_hidden)
    mixed = kd_loss(*outputs, labels) + loss(outputs[0], labels)
    mixed.backward()
    kd_loss.release()
    loss.release()
    heads = [
        part for decoder in decoders for part in (decoder.tok_embeddings, decoder.output) if isinstance(part, nn.Module)
    ]
    return Distilled(
        outputs=tuple(output.shape for output in outputs),
        loss=mixed.detach(),
        gradient=hidden.grad.shape,
        heads_with_gradient=sum(p.grad is not None for head in heads for p in head.parameters()),
        released=(decoders[0].unembed(hidden).shape, decoders[1].unembed(teacher_hidden).shape),
    )


@pytest.fixture(scope="module")
def everything() -> tuple[dict[Subject, Bound], dict[str, Distilled]]:
    """Of each subject, and of each config that distils."""
    results, found, pairs = {}, {}, {}
    for subject, model in models():
        if id(model) not in results:
            results = {id(model): bind(model)}
        found[subject] = results[id(model)]
        if subject.distils:
            pairs.setdefault(subject.config, {})[subject] = model
    distilled = {}
    for name, pair in pairs.items():
        models_ = {subject.part: model for subject, model in pair.items()}
        distilled[name] = distil(next(iter(pair)), models_["model"], models_["teacher_model"])
    return found, distilled


@dataclass
class Preferred:
    """What happened when the log-probabilities of an unchanged config took its model."""

    head: Head
    figures: TokenFigures
    gradient: torch.Size
    head_has_gradient: bool
    released: torch.Size


def prefer(subject: Subject, model: nn.Module) -> Preferred:
    """As our recipe binds and calls them."""
    logprobs = make_logprobs(load(subject))
    decoder = decoder_of(model)
    hidden = torch.empty(2, 4, decoder.output.weight.shape[1], dtype=torch.bfloat16, device="meta", requires_grad=True)
    logprobs.set_model_output(model)
    targets = torch.empty(2, 4, dtype=torch.int64, device="meta")
    figures = logprobs.with_figures(decoder.unembed(hidden), targets, entropy=False)
    figures.logprobs.sum().backward()
    logprobs.release()
    return Preferred(
        head=described(model),
        figures=figures,
        gradient=hidden.grad.shape,
        head_has_gradient=any(parameter.grad is not None for parameter in decoder.output.parameters()),
        released=decoder.unembed(hidden).shape,
    )


@pytest.fixture(scope="module")
def preferred() -> dict[Subject, Preferred]:
    return {subject: prefer(subject, model) for subject, model in models(PREFERENCE_LOSSES)}


@pytest.fixture(scope="module")
def bound(everything) -> dict[Subject, Bound]:
    return everything[0]


def test_no_config_is_missed():
    """Counted without what the other tests are made from: by the files' text, and by torchtune's own list."""
    found = {subject.config for subject in subjects()}
    line = re.compile(rf"^\s*_component_: {re.escape(STOCK_LOSS)}\b", re.MULTILINE)
    by_text = {path for path in FOLDER.rglob("*.yaml") if line.search(path.read_text())}
    assert found == {path.relative_to(FOLDER).with_suffix("").as_posix() for path in by_text}
    for recipe in get_all_recipes():
        if recipe.name in RECIPES:
            assert {entry.file_path.removesuffix(".yaml") for entry in recipe.configs} <= found
    if version("torchtune") == "0.6.1":
        assert len(found) == 133
        assert {recipe.name: len(recipe.configs) for recipe in get_all_recipes() if recipe.name in RECIPES} == RECIPES


@pytest.mark.parametrize("subject", subjects(), ids=lambda subject: f"{subject.config}-{subject.part}")
def test_the_loss_takes_it(subject, bound):
    cfg = load(subject)
    assert type(config.instantiate(cfg.loss)) is LinearCrossEntropyLoss
    stock = written(subject.config)
    overridden = OmegaConf.to_container(cfg, resolve=False)
    assert overridden.keys() == stock.keys()
    changed = {"loss", "kd_loss"} if subject.distils else {"loss"}
    assert {key for key in stock if stock[key] != overridden[key]} == changed

    model = bound[subject]
    head = model.head
    assert model.logits == model.product == model.released == (1, 4, head.rows)
    assert model.outputs == (1, 4, head.width)
    assert head.rows == model.vocabulary, "special tokens of images aside, what is embedded is predicted"
    assert model.weight_is_the_embedding == head.tied
    assert model.trains == head.trained
    if "lora_rank" in cfg.model or subject.part == "teacher_model":
        on_output = subject.part == "model" and cfg.model.get("apply_lora_to_output", False)
        assert head.trained == ("adapters" if on_output else "nothing")
    else:
        # Llama 3.2 Vision's decoder is frozen unless asked for.
        frozen = "vision" in subject.config and not cfg.model.get("decoder_trainable", False)
        assert head.trained == ("nothing" if frozen else "whole")


@pytest.mark.parametrize("subject", [s for s in subjects() if s.distils and s.part == "model"], ids=lambda s: s.config)
def test_distillation_takes_both_models(subject, everything):
    bound, distilled = everything
    student, teacher = (bound[replace(subject, part=part)].head for part in ("model", "teacher_model"))
    result = distilled[subject.config]
    assert result.outputs == ((1, 4, student.width), (1, 4, teacher.width))
    assert student.width < teacher.width, "they differ, so neither was taken for the other"
    assert student.rows == teacher.rows
    assert student.trained == teacher.trained == "nothing"
    assert result.heads_with_gradient == 0
    assert result.loss.is_meta
    assert result.loss.shape == ()
    assert result.loss.dtype == torch.float32
    assert result.gradient == (1, 4, student.width)
    assert result.released == ((1, 4, student.rows), (1, 4, teacher.rows))


def test_no_preference_config_is_missed():
    found = {subject.config for subject in subjects(PREFERENCE_LOSSES)}
    by_text = {path for path in FOLDER.rglob("*.yaml") if re.search(r"rlhf\.loss\.(DPO|RSO|PPO)Loss", path.read_text())}
    assert found == {path.relative_to(FOLDER).with_suffix("").as_posix() for path in by_text}
    listed = {recipe.name: recipe.configs for recipe in get_all_recipes() if recipe.name in PREFERENCE_RECIPES}
    assert found == {entry.name for configs in listed.values() for entry in configs}
    if version("torchtune") == "0.6.1":
        assert {name: len(configs) for name, configs in listed.items()} == PREFERENCE_RECIPES


@pytest.mark.parametrize("subject", subjects(PREFERENCE_LOSSES), ids=lambda subject: subject.config)
def test_preferences_take_it_unchanged(subject, preferred):
    cfg = load(subject)
    assert OmegaConf.to_container(cfg, resolve=False) == written(subject.config)
    assert type(config.instantiate(cfg.loss)) is (PPOLoss if subject.part == "policy_model" else DPOLoss)
    result = preferred[subject]
    assert result.figures.logprobs.shape == result.figures.mean_logits.shape == (2, 4)
    assert result.gradient == (2, 4, result.head.width)
    assert result.head.trained == ("nothing" if "lora" in subject.recipe else "whole")
    assert result.head_has_gradient == (result.head.trained == "whole")
    assert result.released == (2, 4, result.head.rows)


def test_a_setting_of_the_loss_before_is_left_out_with_a_tilde():
    had = Namespace(loss={"_component_": STOCK_LOSS, "num_output_chunks": 16})
    with pytest.raises(TypeError, match="num_output_chunks"):
        config.instantiate(_merge_yaml_and_cli_args(had, [OVERRIDE]).loss)
    cfg = _merge_yaml_and_cli_args(had, [OVERRIDE, "~loss.num_output_chunks"])
    assert type(config.instantiate(cfg.loss)) is LinearCrossEntropyLoss


@pytest.mark.skipif(version("torchtune") != "0.6.1", reason="the page tells about the release")
def test_the_page_is_up_to_date(bound, preferred):
    expected = page({subject: model.head for subject, model in (bound | preferred).items()})
    assert PAGE.read_text() == expected, "run `python tests/support/stock_configs.py`"


@pytest.mark.skipif(version("torchtune") != "0.6.1", reason="the table tells about the release")
def test_the_readmes_table_is_up_to_date():
    assert readme_table() == table(), "run `python tests/support/stock_configs.py`"
    assert table().count("\n") <= 12
    numbers = [int(cell) for cell in re.findall(r"(?<=\| )\d+(?= \|)", table())]
    assert sum(numbers) == len({subject.config for subject in subjects((STOCK_LOSS, *PREFERENCE_LOSSES))})
