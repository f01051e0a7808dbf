"""torchtune's main branch, where the loss works in stock recipes by its name alone; what needs processes is checked in
test_many_ranks.py."""

import importlib
import importlib.metadata
import inspect
import logging
import re
import sys

import pytest
import torch
import torchtune.modules.loss
from omegaconf import OmegaConf
from tiny_models import VOCABULARY, build_model
from torch import Tensor, nn
from torchtune import config
from torchtune.modules.model_fusion import DeepFusionModel
from torchtune_main import MainRecipe, SFTLoss, as_on_main

import torchtune_lce

OURS = "torchtune_lce.LinearCrossEntropyLoss"


class ModuleInterface(SFTLoss, nn.Module):
    """As an earlier commit of main had it: a Module itself."""


@pytest.fixture
def with_interface(monkeypatch):
    """Imports this package's component anew, where torchtune has an interface of main's."""

    def imported(interface: type) -> type:
        monkeypatch.setattr(torchtune.modules.loss, "SFTLoss", interface, raising=False)
        for package, name in ((torchtune_lce.model, "sft_loss"), (torchtune_lce, "loss")):
            # Put back afterwards, both as a module and as an attribute of the package.
            monkeypatch.setattr(package, name, getattr(package, name))
            monkeypatch.delitem(sys.modules, f"{package.__name__}.{name}")
        return importlib.import_module("torchtune_lce.loss").LinearCrossEntropyLoss

    importlib.import_module("torchtune_lce.loss")
    return imported


def batches(count: int) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(5)
    found = []
    for _ in range(count):
        tokens, labels = torch.randint(VOCABULARY, (2, 2, 9), generator=generator)
        labels[0, :4] = -100
        found.append((tokens, labels))
    return found


def settings(loss: str, compiled: bool = False):
    return OmegaConf.create({"loss": {"_component_": loss}, "compile": compiled})


@pytest.mark.parametrize("interface", [SFTLoss, ModuleInterface], ids=["interface", "module"])
def test_mains_interface_is_inherited(with_interface, interface):
    component = with_interface(interface)
    loss = component(ignore_index=-7)
    assert isinstance(loss, interface)
    assert isinstance(loss, nn.Module)
    assert loss.ignore_index == -7
    # Not main's, which compiles all of forward.
    assert loss.apply_compile_strategy(backend="inductor") is loss
    assert "forward" not in vars(loss)
    assert not loss.tp_requires_loss_parallel_ctx_manager
    plan = {"output": object()}
    assert loss.patch_tp_plan(plan) is plan
    loss.tp_enabled = True


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_stock_recipe_by_the_component_alone(with_interface, tied, compiled):
    """Steps and validation equal those of a loss that takes logits; the checkpoint has the same names."""
    with_interface(SFTLoss)
    ours = MainRecipe(SFTLoss, as_on_main(build_model(tied)), settings(OURS, compiled))
    stock = MainRecipe(SFTLoss, as_on_main(build_model(tied)), settings("torch.nn.CrossEntropyLoss"))
    assert isinstance(ours.loss, SFTLoss)
    assert ours.model.skip_output_layer
    assert not stock.model.skip_output_layer
    expected = stock.train(batches(2))
    assert len(set(expected)) == 2
    assert ours.train(batches(2)) == pytest.approx(expected, rel=1.5e-6)
    assert ours.validate(batches(3)) == pytest.approx(stock.validate(batches(3)), rel=1.5e-6)
    assert ours.train(batches(4)) == pytest.approx(stock.train(batches(4)), rel=1.5e-6)
    assert list(ours.model.state_dict()) == list(stock.model.state_dict())
    assert not ours.loss.state_dict()


class MainFusionModel(DeepFusionModel):
    """Main gives it the decoder's output, and its switch."""

    @property
    def output(self):
        return self.decoder.output

    @property
    def skip_output_layer(self) -> bool:
        return self.decoder.skip_output_layer

    @skip_output_layer.setter
    def skip_output_layer(self, skip: bool) -> None:
        self.decoder.skip_output_layer = skip


def test_fusion_models_of_main(with_interface):
    [(tokens, labels)] = batches(1)
    model = MainFusionModel(as_on_main(build_model(tied=False)), nn.Identity(), decoder_trainable=True)
    logits = model(tokens)
    loss = with_interface(SFTLoss)()
    loss.set_model_output(model)
    assert model.skip_output_layer
    expected = nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())
    torch.testing.assert_close(loss(model(tokens), labels), expected)
    loss.release()
    assert torch.equal(model(tokens), logits)


def test_a_batch_without_labels_trains_on(with_interface):
    """Main's own loss returns a constant there, whose backward raises."""
    [(tokens, labels)] = batches(1)
    model = as_on_main(build_model())
    loss = with_interface(SFTLoss)()
    loss.set_model_output(model)
    value = loss(model(tokens), torch.full_like(labels, -100))
    value.backward()
    assert value == 0
    assert all(parameter.grad is not None and not parameter.grad.any() for parameter in model.parameters())


@pytest.mark.parametrize("reduction", ["sum", "none", "mean"])
def test_another_reduction_is_warned_of_at_binding(with_interface, caplog, reduction):
    """Main's recipes multiply by the number of tokens whatever it is; ours refuse it."""
    loss = with_interface(SFTLoss)(reduction=reduction)
    model = as_on_main(build_model())
    loss.set_model_output(model)
    loss.set_model_output(model)
    said = [record for record in caplog.records if "reduction" in record.message]
    assert len(said) == (reduction != "mean")
    for record in said:
        assert record.levelno == logging.WARNING
        assert f"got {reduction}" in record.message


def test_metrics_that_nobody_logs_are_said_once(with_interface, caplog):
    with_interface(SFTLoss)
    cfg = settings(OURS)
    cfg.loss.metrics = ["accuracy", "nll"]
    MainRecipe(SFTLoss, as_on_main(build_model()), cfg).train(batches(2))
    (said,) = [record for record in caplog.records if "metrics" in record.message]
    assert said.levelno == logging.WARNING
    assert "accuracy, nll" in said.message
    assert "torchtune_lce/recipes/" in said.message


def test_metrics_that_somebody_takes_are_not(caplog):
    loss = torchtune_lce.LinearCrossEntropyLoss(metrics="nll")
    loss.after_batch.append(lambda batch: None)
    model = build_model()
    loss.set_model_output(model)
    [(tokens, labels)] = batches(1)
    loss(model(tokens), labels)
    assert not [record for record in caplog.records if "metrics" in record.message]


@pytest.mark.parametrize("interface", [SFTLoss, None], ids=["main", "release"])
def test_a_key_that_the_loss_never_sees_is_named_where_stock_recipes_bind(with_interface, caplog, interface):
    """Main's recipes bind the loss themselves, and the YAML's top level is theirs alone. Said once, at the start."""
    caplog.set_level(logging.INFO)
    loss = with_interface(interface)() if interface else torchtune_lce.LinearCrossEntropyLoss()
    model = as_on_main(build_model()) if interface else build_model()
    loss.set_model_output(model)
    for tokens, labels in batches(2):
        loss(model(tokens), labels)
    said = [record.message for record in caplog.records if "log_loss_stats" in record.message]
    assert len(said) == (interface is not None)
    assert all("torchtune_lce/recipes/" in message for message in said)
    # This package's recipes know it.
    caplog.clear()
    loss.bound_by_our_recipe = True
    loss.set_model_output(model)
    for tokens, labels in batches(1):
        loss(model(tokens), labels)
    assert not [record for record in caplog.records if "log_loss_stats" in record.message]


@pytest.mark.parametrize("name", ["num_output_chunks", "mask_ignored_tokens"])
@pytest.mark.parametrize(
    "component",
    ["LinearCrossEntropyLoss", "LinearForwardKLLoss", "LinearReverseKLLoss", "LinearSymmetricKLLoss"],
)
def test_settings_of_torchtunes_own_loss_say_what_takes_their_place(component, name):
    with pytest.raises(TypeError) as error:
        config.instantiate(OmegaConf.create({"_component_": f"torchtune_lce.{component}", name: 8}))
    message = str(error.value)
    assert message.startswith(f"{component} takes no {name}, got 8: ")
    assert f"~loss.{name}" in message or f"~kd_loss.{name}" in message
    assert ("workspace_mib" in message) == (name == "num_output_chunks")
    assert name not in inspect.signature(getattr(torchtune_lce, component)).parameters


def test_a_kl_loss_in_place_of_the_loss_says_so():
    recipe = MainRecipe(SFTLoss, as_on_main(build_model()), settings("torchtune_lce.LinearForwardKLLoss"))
    message = "LinearForwardKLLoss compares two models .* as loss set torchtune_lce.LinearCrossEntropyLoss"
    with pytest.raises(TypeError, match=message):
        recipe.train(batches(1))


@pytest.mark.parametrize("version", ["", "0.0.0", "0.7.0", None])
def test_qat_lora_under_main_asks_for_no_older_torchao(version, monkeypatch):
    """Main's own version says nothing, and its torchao is 0.18 or newer."""
    recipe = importlib.import_module("torchtune_lce.recipes.qat_lora_finetune_distributed")
    found = {"torchtune": version, "torchao": "0.18.0"}
    monkeypatch.setattr(importlib.metadata, "version", found.get)
    monkeypatch.setattr(torchtune.modules.loss, "SFTLoss", SFTLoss, raising=False)
    recipe.check_torchao()


@pytest.mark.parametrize("version", ["0.12.0", "0.15.0"])
def test_qat_lora_of_the_release_asks_for_an_older_torchao(version, monkeypatch):
    recipe = importlib.import_module("torchtune_lce.recipes.qat_lora_finetune_distributed")
    monkeypatch.setattr(importlib.metadata, "version", {"torchtune": "0.6.1", "torchao": version}.get)
    with pytest.raises(RuntimeError, match=re.escape(f"got {version}: pip install torchao==0.11.0")):
        recipe.check_torchao()
