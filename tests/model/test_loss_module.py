"""The loss as a module: torchtune's contract, its settings, and what it says about bad input."""

import copy
import logging
import sys

import pytest
import torch
import torch.nn.functional as F
from omegaconf import OmegaConf
from tiny_models import VOCABULARY, build_model
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate
from torchtune import config
from torchtune.training import compile_loss

from torchtune_lce import LinearCrossEntropyLoss, linear_cross_entropy
from torchtune_lce.implementations import choice
from torchtune_lce.model import of_model_output
from torchtune_lce.model.sft_loss import SFTLoss

EMBED_DIM = 64


@pytest.fixture
def model() -> nn.Module:
    return build_model(tied=False)


@pytest.fixture
def hidden() -> torch.Tensor:
    return torch.randn(2, 7, EMBED_DIM, requires_grad=True)


@pytest.fixture
def targets() -> torch.Tensor:
    targets = torch.randint(VOCABULARY, (2, 7))
    targets[1, 2:5] = -100
    return targets


def bound(model, **settings) -> LinearCrossEntropyLoss:
    loss = LinearCrossEntropyLoss(**settings)
    loss.set_model_output(model)
    return loss


# ---- what it computes


@pytest.mark.parametrize("shape", ["[B, S, D]", "[N, D]"])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_both_ranks_and_reductions(model, hidden, targets, shape, reduction):
    expected = F.cross_entropy(model.output(hidden).flatten(0, 1), targets.flatten(), reduction=reduction)
    if shape == "[B, S, D]":
        actual = bound(model, reduction=reduction)(hidden, targets)
        expected = expected.reshape(targets.shape) if reduction == "none" else expected
    else:
        actual = bound(model, reduction=reduction)(hidden.flatten(0, 1), targets.flatten())
    torch.testing.assert_close(actual, expected)


def test_settings_reach_the_function(model, hidden, targets):
    """Each of them changes the result, or the comparison would not see it."""
    targets = targets.masked_fill(targets == -100, 7)
    plain = bound(model)(hidden, targets)
    for settings in ({"softcap": 0.5}, {"ignore_index": 7}, {"reduction": "sum"}):
        actual = bound(model, **settings)(hidden, targets)
        torch.testing.assert_close(actual, linear_cross_entropy(hidden, model.output.weight, targets, **settings))
        assert actual != plain


@pytest.mark.parametrize(("setting", "value"), [("filter_eps", 0.25), ("workspace_mib", 3), ("ignore_index", 5)])
def test_options_reach_the_implementation(model, hidden, targets, monkeypatch, setting, value):
    seen = []

    def recording(call):
        seen.append(call.options)
        return choice.reference.token_losses(call)

    monkeypatch.setitem(choice._FUNCTIONS, "reference", recording)
    bound(model, impl="reference", **{setting: value})(hidden, targets.abs())
    assert [getattr(options, setting) for options in seen] == [value]


def test_given_weight_and_bias_are_used_as_they_are(model, hidden, targets):
    weight, bias = torch.randn(33, EMBED_DIM, requires_grad=True), torch.randn(33)
    targets = targets.where(targets < 0, targets % 33)
    expected = F.cross_entropy(F.linear(hidden, weight, bias).flatten(0, 1), targets.flatten())
    unbound, other = LinearCrossEntropyLoss(), bound(model)
    for loss in (unbound, other):
        torch.testing.assert_close(loss(hidden, targets, weight, bias), expected)
    unbound(hidden, targets, weight=weight).backward()
    assert weight.grad.any()


@pytest.mark.parametrize("impl", ["auto", "chunked", "reference"])
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_all_ignored_is_zero_with_zero_gradients(impl, tied):
    """Gradients of zero, not none: ranks that have none of them wait for each other for ever."""
    model = build_model(tied)
    loss = bound(model, impl=impl)
    value = loss(model(torch.randint(VOCABULARY, (2, 7))), torch.full((2, 7), -100))
    assert value.item() == 0
    value.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert not parameter.grad.any(), name


# ---- torchtune's contract


def test_contract_of_torchtune_main(model):
    loss = LinearCrossEntropyLoss(ignore_index=-7)
    assert isinstance(loss, SFTLoss)
    assert isinstance(loss, nn.Module)
    assert loss.ignore_index == -7
    assert loss.apply_compile_strategy(backend="eager") is loss
    loss.tp_enabled = True
    plan = {"output": object()}
    assert loss.patch_tp_plan(plan) is plan
    assert loss.tp_requires_loss_parallel_ctx_manager is False


def test_nothing_of_the_model_is_registered(model, hidden, targets):
    loss = bound(model)
    loss(hidden, targets)
    assert loss.state_dict() == {}
    assert list(loss.modules()) == [loss]
    assert list(loss.parameters()) == []


def test_torchtunes_compile_loss(model, hidden, targets, monkeypatch):
    """The wrapper of 0.6.1 around a loss that it does not know: attributes and values pass through it."""
    monkeypatch.setenv("TORCH_COMPILE_BACKEND", "eager")
    loss = LinearCrossEntropyLoss(impl="reference")
    compiled = compile_loss(loss, verbose=False)
    assert compiled.ignore_index == -100
    compiled.set_model_output(model)
    torch.testing.assert_close(compiled(hidden, targets), loss(hidden, targets))


def test_config_builds_it():
    cfg = {"_component_": "torchtune_lce.LinearCrossEntropyLoss", "impl": "chunked", "softcap": 30, "filter_eps": None}
    loss = config.instantiate(OmegaConf.create(cfg))
    assert type(loss) is LinearCrossEntropyLoss
    assert loss.impl == "chunked"


def test_says_once_which_implementation_runs(model, hidden, targets, caplog):
    caplog.set_level(logging.INFO)
    loss = bound(model)
    loss(hidden, targets)
    loss(hidden, targets)
    said = [record for record in caplog.records if "Linear cross-entropy" in record.message]
    assert len(said) == 1
    assert "runs impl 'chunked' (set: 'auto') on cpu in torch.float32, output projection [512, 64]" in said[0].message
    assert said[0].levelno == logging.INFO


# ---- bad input


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"impl": "fast"}, ValueError, "impl must be one of auto, cce, .*reference, got 'fast'"),
        ({"reduction": "median"}, ValueError, "reduction must be one of mean, sum, none, got 'median'"),
        ({"softcap": 0.0}, ValueError, "softcap must be None or a finite number > 0, got 0.0"),
        ({"filter_eps": "high"}, ValueError, "filter_eps must be 'auto', None or a number in .* got 'high'"),
        ({"workspace_mib": 0}, ValueError, "workspace_mib must be at least 1, got 0"),
        ({"ignore_index": 1.5}, TypeError, "ignore_index must be an int, got 1.5"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else None,
)
def test_bad_settings_are_refused_when_built(settings, error, message):
    with pytest.raises(error, match=message):
        LinearCrossEntropyLoss(**settings)


def test_unbound_loss_says_what_to_do(hidden, targets, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["/somewhere/recipes/full_finetune_single_device.py", "--config", "x.yaml"])
    loss = LinearCrossEntropyLoss()
    with pytest.raises(RuntimeError) as error:
        loss(hidden, targets)
    assert "before set_model_output" in str(error.value)
    assert "`tune run torchtune_lce/recipes/full_finetune_single_device.py`" in str(error.value)
    assert "`self._loss_fn.set_model_output(self._model)`" in str(error.value)


def test_unbound_loss_in_an_unknown_script(hidden, targets, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["train.py"])
    with pytest.raises(RuntimeError, match="torchtune_lce/recipes/<recipe>.py"):
        LinearCrossEntropyLoss()(hidden, targets)


def test_released_loss_is_unbound(model, hidden, targets):
    loss = bound(model)
    loss.release()
    with pytest.raises(RuntimeError, match="before set_model_output"):
        loss(hidden, targets)


def test_list_of_outputs(targets):
    """What a decoder built with output_hidden_states returns."""
    model = build_model()
    model.output_hidden_states = [0]
    loss = bound(model)
    with pytest.raises(TypeError, match="got a list of 2: build the model without output_hidden_states, or pass the"):
        loss(model(torch.randint(VOCABULARY, (2, 7))), targets)


def test_logits_in_place_of_hidden_states(model, targets):
    loss = bound(model)
    with pytest.raises(
        ValueError, match=r"shape \[..., 64\] .* got \[2, 7, 512\]: those are logits: leave `with loss.logits"
    ):
        loss(torch.randn(2, 7, VOCABULARY), targets)
    with pytest.raises(ValueError, match=r"shape \[..., 64\] to match weight, got \[2, 7, 63\]$"):
        loss(torch.randn(2, 7, 63), targets)


def test_bias_without_weight(model, hidden, targets):
    with pytest.raises(ValueError, match="bias must come with weight"):
        bound(model)(hidden, targets, bias=torch.zeros(VOCABULARY))


def test_targets_of_another_shape(model, hidden, targets):
    with pytest.raises(ValueError, match=r"targets must have the shape .* \[2, 7\], got \[2, 6\]"):
        bound(model)(hidden, targets[:, 1:])


def test_targets_out_of_range_on_the_first_batch(model, hidden, targets):
    loss = bound(model)
    with pytest.raises(ValueError, match=r"in \[0, 512\).* the first 513.* has 512 rows; .* a larger tokenizer$"):
        loss(hidden, targets.masked_fill(targets == -100, VOCABULARY + 1))
    loss.tokenizer_size = 600
    with pytest.raises(ValueError, match="a larger tokenizer, which has 600 entries"):
        loss(hidden, targets.masked_fill(targets == -100, VOCABULARY + 1))
    # Still the first: no batch has passed.
    assert loss._first_batch


def test_targets_of_minus_100_are_blamed_on_the_ignore_index():
    """As torch and torchtune's data sets mark what is ignored, where the loss is told that 0 does."""
    hidden, weight, targets = torch.randn(3, 8), torch.randn(512, 8), torch.tensor([-100, 3, -100])
    for loss in (
        lambda: LinearCrossEntropyLoss(ignore_index=0, impl="chunked")(hidden, targets, weight),
        lambda: linear_cross_entropy(hidden, weight, targets, ignore_index=0, impl="chunked"),
    ):
        with pytest.raises(ValueError, match=r"ignore_index \(0\) .* got 2 outside, .* -100 is torch's mark") as error:
            loss()
        assert str(error.value).endswith("of what is ignored: set ignore_index=-100, or mark such targets with 0")
    with pytest.raises(ValueError, match=r"to -5$"):
        LinearCrossEntropyLoss(impl="chunked")(hidden, torch.tensor([-100, 3, -5]), weight)
    with pytest.raises(ValueError, match=r"-100 is torch's mark .* a larger tokenizer$"):
        LinearCrossEntropyLoss(ignore_index=0, impl="chunked")(hidden, torch.tensor([-100, 3, 512]), weight)


@pytest.mark.parametrize(
    ("shape", "said"),
    [((), r"\[V, 64\] .*, got \[\]"), ((64,), r"\[V, 64\] .*, got \[64\]"), ((1, 9, 64), r"\[V, 64\] .*, got \[1,")]
    + [((0, 64), "at least one row")],
)
def test_bad_weight_is_not_blamed_on_the_targets(hidden, targets, shape, said):
    with pytest.raises(ValueError, match=f"^weight must have .*{said}"):
        LinearCrossEntropyLoss()(hidden, targets, weight=torch.ones(shape))


def test_first_batch_is_the_first_with_values(hidden, targets):
    """Shapes alone, for a memory plan, are none."""
    loss = LinearCrossEntropyLoss()
    with FakeTensorMode():
        fake = loss(torch.randn(2, 7, EMBED_DIM), torch.zeros(2, 7).long(), weight=torch.randn(VOCABULARY, EMBED_DIM))
    assert fake.shape == ()
    with pytest.raises(ValueError, match="larger tokenizer"):
        loss(hidden, targets + VOCABULARY, weight=torch.randn(VOCABULARY, EMBED_DIM))


@pytest.mark.gpu
@pytest.mark.parametrize("check_targets", [False, True])
def test_targets_out_of_range_on_a_card(check_targets):
    """The first batch raises; later ones give NaN without a look, which would stall the card, unless asked to look."""
    model = build_model(tied=False).cuda()
    hidden = torch.randn(7, EMBED_DIM, device="cuda")
    good = torch.randint(VOCABULARY, (7,), device="cuda")
    bad = good.clone()
    bad[3] = VOCABULARY
    loss = bound(model, check_targets=check_targets)
    with pytest.raises(ValueError, match="512 rows"):
        loss(hidden, bad)
    assert loss(hidden, good).isfinite()
    if check_targets:
        with pytest.raises(ValueError, match="512 rows"):
            loss(hidden, bad)
    else:
        assert loss(hidden, bad).isnan()


@pytest.mark.parametrize(("check_targets", "looks"), [(False, 1), (True, 3)])
def test_checked_mode_looks_at_every_batch(model, hidden, targets, monkeypatch, check_targets, looks):
    """On a CPU every implementation checks anyway, so the looks themselves are counted."""
    loss = bound(model, check_targets=check_targets)
    looked_at = []
    real = of_model_output.checked
    monkeypatch.setattr(
        of_model_output, "checked", lambda *a, look, **k: looked_at.append(look) or real(*a, look=look, **k)
    )
    for _ in range(3):
        loss(hidden, targets)
    assert looked_at == [True] * looks + [False] * (3 - looks)


def test_distributed_tensors_are_refused(model, hidden, targets):
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))
        sharded = DTensor.from_local(hidden, mesh, [Replicate()])
        with pytest.raises(TypeError, match="outputs must be a plain tensor, got a DTensor .* tensor parallelism"):
            bound(model)(sharded, targets)
        weight = DTensor.from_local(model.output.weight.detach(), mesh, [Replicate()])
        with pytest.raises(TypeError, match="weight must be a plain tensor, got DTensor"):
            LinearCrossEntropyLoss()(hidden, targets, weight=weight)
        loss = bound(model)
        model.output.weight = nn.Parameter(weight)
        with pytest.raises(TypeError, match="weight of the model's output is a DTensor"):
            loss(hidden, targets)
    finally:
        torch.distributed.destroy_process_group()


def test_impl_that_cannot_run_here_says_what_to_set(model, hidden, targets, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(RuntimeError, match="impl='cce' needs .* set impl='chunked'"):
        bound(model, impl="cce")(hidden, targets)


def test_copy_of_an_unbound_loss():
    assert copy.deepcopy(LinearCrossEntropyLoss(impl="reference")).impl == "reference"
