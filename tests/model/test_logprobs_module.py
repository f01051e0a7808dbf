"""Log-probabilities of given tokens as a module: what a bound model gives, and what it says about bad input."""

import copy
import logging
import pickle
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from adapters import EMBED_DIM, KINDS, make_output
from interpreted import INTERPRETED
from omegaconf import OmegaConf
from tiny_models import VOCABULARY, build_model
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torchtune import config
from torchtune.generation import generate
from torchtune.modules.peft import disable_adapter

from torchtune_lce import LinearTokenLogprobs, linear_token_logprobs, skip_output_layer
from torchtune_lce.inputs import dtypes
from torchtune_lce.model import of_model_output

IGNORED = -100
HEADS = ["tied", "untied", "bias", *KINDS]


def build(head: str, dtype: torch.dtype = torch.float64) -> nn.Module:
    """The same weights at every call."""
    model = build_model(tied=head == "tied")
    if head == "bias":
        model.output = nn.Linear(EMBED_DIM, VOCABULARY)
    elif head in KINDS:
        model.output = make_output(head)
    return model.to(dtype)


def bound(model: nn.Module, **settings) -> LinearTokenLogprobs:
    logprobs = LinearTokenLogprobs(**settings)
    logprobs.set_model_output(model)
    return logprobs


@pytest.fixture
def tokens() -> Tensor:
    return torch.randint(VOCABULARY, (2, 7))


@pytest.fixture
def targets() -> Tensor:
    targets = torch.randint(VOCABULARY, (2, 7))
    targets[0, :2] = targets[1, 4] = IGNORED
    return targets


@pytest.fixture
def model() -> nn.Module:
    return build("untied", torch.float32)


@pytest.fixture
def hidden() -> Tensor:
    return torch.randn(2, 7, EMBED_DIM, requires_grad=True)


def by_logits(model: nn.Module, tokens: Tensor, targets: Tensor, scale=1.0, softcap=None) -> SimpleNamespace:
    """The definition, by the output layer itself, whose own logits torchtune's decoder would round to float32."""
    handle = skip_output_layer(model)
    logits = model.output(model(tokens))
    handle.restore()
    means = (logits * scale).mean(-1)
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    every = (logits * scale).log_softmax(-1)
    used = targets != IGNORED
    logprobs = every.gather(-1, targets.clamp(min=0)[..., None])[..., 0].where(used, 0)
    entropy = -(every.exp() * every).sum(-1).where(used, 0)
    return SimpleNamespace(logprobs=logprobs, entropy=entropy, means=means)


def gradients(logprobs: Tensor, model: nn.Module) -> dict[str, Tensor]:
    """Of a sum with another weight for each token, by every parameter that is trained."""
    model.zero_grad()
    upstream = torch.randn(logprobs.shape, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    (logprobs * upstream).sum().backward()
    return {name: parameter.grad for name, parameter in model.named_parameters() if parameter.requires_grad}


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor], **tolerances) -> None:
    assert found.keys() == expected.keys()
    for name, wanted in expected.items():
        assert wanted.any(), name
        torch.testing.assert_close(found[name], wanted, **tolerances, msg=lambda text, name=name: f"{name}: {text}")


# ---- what it computes

EXACT = {"rtol": 1e-10, "atol": 1e-13}  # sums of float64 in another order


@pytest.mark.parametrize("settings", [{}, {"logit_scale": 1 / 0.7}, {"softcap": 1.5, "logit_scale": 2.0}], ids=str)
@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("impl", ["chunked", "reference"])
def test_equals_the_logits_of_the_model(impl, head, settings, tokens, targets):
    """In float64 only the same function passes: values, gradients of every parameter, and both figures."""
    model = build(head)
    expected = by_logits(model, tokens, targets, settings.get("logit_scale", 1.0), settings.get("softcap"))
    expected_gradients = gradients(expected.logprobs, model)
    logprobs = bound(model, impl=impl, **settings)
    found = logprobs(model(tokens), targets)
    assert found.shape == targets.shape
    torch.testing.assert_close(found, expected.logprobs, **EXACT)
    assert (found[targets == IGNORED] == 0).all()
    assert_same(gradients(found, model), expected_gradients, **EXACT)

    with_figures = logprobs.with_figures(model(tokens), targets)
    torch.testing.assert_close(with_figures.logprobs, expected.logprobs, **EXACT)
    torch.testing.assert_close(with_figures.entropy, expected.entropy, **EXACT)
    torch.testing.assert_close(with_figures.mean_logits, expected.means, **EXACT)
    assert not with_figures.entropy.requires_grad
    assert not with_figures.mean_logits.requires_grad
    assert_same(gradients(with_figures.logprobs, model), expected_gradients, **EXACT)


KERNELS = [pytest.param(impl, marks=INTERPRETED) for impl in ("cce", "cce_exact", "cce_kahan_full_c")]


@pytest.mark.parametrize("impl", [*KERNELS, "torch_compile", "chunked", "reference"])
@pytest.mark.parametrize("head", ["tied", "DoRA"])
def test_every_impl_that_runs_on_a_cpu(impl, head, tokens, targets):
    """As near to float64 as the model's own logits in float32 are, twice over, and a few roundings."""
    model, exact = build(head, torch.float32), build(head)
    expected, plain = (by_logits(each, tokens, targets, 1 / 0.7) for each in (exact, model))
    wanted = {"logprobs": expected.logprobs.detach(), "entropy": expected.entropy.detach(), "means": expected.means}
    wanted |= gradients(expected.logprobs, exact)
    torchs = {"logprobs": plain.logprobs.detach(), "entropy": plain.entropy.detach(), "means": plain.means}
    torchs |= gradients(plain.logprobs, model)
    logprobs = bound(model, impl=impl, logit_scale=1 / 0.7)
    ours = logprobs.with_figures(model(tokens), targets)
    assert [figure.dtype for figure in ours] == [torch.float32] * 3
    found = {"logprobs": ours.logprobs.detach(), "entropy": ours.entropy, "means": ours.mean_logits}
    found |= gradients(ours.logprobs, model)
    for name, value in wanted.items():
        scale = value.abs().max()
        assert scale > 0, name
        # `cce` leaves out softmax entries below eps / 45; the entropy is promised to 2e-5.
        least = 2e-5 if name == "entropy" else 16 * torch.finfo(torch.float32).eps
        allowed = 2 * (torchs[name].double() - value).abs().max() / scale + least
        assert (found[name].double() - value).abs().max() / scale <= allowed, name


def test_adapters_disabled_are_the_reference(tokens, targets):
    """As DPO with LoRA has its reference model: the same one, without its adapters, on one bound object."""
    model = build("LoRA")
    base = build("untied")
    base.output.weight = nn.Parameter(model.output.weight.detach().clone())
    expected = by_logits(base, tokens, targets)
    logprobs = bound(model)
    with_adapter = logprobs(model(tokens), targets)
    with disable_adapter(model), torch.no_grad():
        found = logprobs.with_figures(model(tokens), targets)
    torch.testing.assert_close(found.logprobs, expected.logprobs, **EXACT)
    torch.testing.assert_close(found.mean_logits, expected.means, **EXACT)
    assert not torch.equal(with_adapter, found.logprobs)
    assert torch.equal(logprobs(model(tokens), targets), with_adapter)


@pytest.mark.parametrize("impl", [pytest.param("cce_exact", marks=INTERPRETED), "chunked", "reference"])
def test_without_gradients(impl, tokens, targets):
    """Old and reference log-probabilities: the same to a rounding, and nothing that a backward would need."""
    model = build("untied", torch.float32)
    logprobs = bound(model, impl=impl)
    expected = logprobs(model(tokens), targets).detach()
    for without in (torch.no_grad, torch.inference_mode):
        with without():
            figures = logprobs.with_figures(model(tokens), targets)
        assert not figures.logprobs.requires_grad
        torch.testing.assert_close(figures.logprobs, expected, rtol=4 * torch.finfo(torch.float32).eps, atol=0)


def test_figures_that_nobody_asks_for_are_none(model, hidden, targets):
    logprobs = bound(model)
    everything = logprobs.with_figures(hidden, targets)
    for asked in ({"entropy": False}, {"mean_logits": False}):
        (name,) = asked
        found = logprobs.with_figures(hidden, targets, **asked)
        assert getattr(found, name) is None
        for other in {"logprobs", "entropy", "mean_logits"} - {name}:
            assert torch.equal(getattr(found, other), getattr(everything, other)), other


def test_flat_hidden_states(model, hidden, targets):
    logprobs = bound(model)
    for found, expected in zip(
        logprobs.with_figures(hidden.flatten(0, 1), targets.flatten()),
        logprobs.with_figures(hidden, targets),
        strict=True,
    ):
        assert torch.equal(found.view(targets.shape), expected)


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_all_ignored(tied):
    """Zeros, with gradients that are zeros and not missing; the mean of the logits is there all the same."""
    model = build_model(tied)
    logprobs = bound(model)
    found = logprobs.with_figures(model(torch.randint(VOCABULARY, (2, 7))), torch.full((2, 7), IGNORED))
    assert not found.logprobs.any()
    assert not found.entropy.any()
    assert found.mean_logits.all()
    found.logprobs.sum().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert not parameter.grad.any(), name


def test_autocast(tokens, targets):
    """Products in bfloat16, results in float32: as far from float64 as torch's logits are there, twice over."""
    model = build("DoRA", torch.float32)
    expected = by_logits(build("DoRA"), tokens, targets)
    with torch.autocast("cpu", torch.bfloat16):
        plain = by_logits(model, tokens, targets)
        logprobs = bound(model)
        found = logprobs.with_figures(model(tokens), targets)
    assert [figure.dtype for figure in found] == [torch.float32] * 3
    for name, ours, torchs, wanted in (
        ("logprobs", found.logprobs, plain.logprobs, expected.logprobs),
        ("entropy", found.entropy, plain.entropy, expected.entropy),
        ("mean logits", found.mean_logits, plain.means, expected.means),
    ):
        allowed = 2 * (torchs.double() - wanted).abs().max() + torch.finfo(torch.bfloat16).eps * wanted.abs().max()
        assert (ours.double() - wanted).abs().max() <= allowed, name
    found.logprobs.sum().backward()
    assert model.output.lora_a.weight.grad.any()


def test_settings_reach_the_function(model, hidden, targets):
    plain = bound(model)(hidden, targets)
    for settings in ({"softcap": 0.5}, {"logit_scale": 2.0}, {"ignore_index": int(targets.max())}):
        labels = targets.abs()
        actual = bound(model, **settings)(hidden, labels)
        assert torch.equal(actual, linear_token_logprobs(hidden, model.output.weight, labels, **settings))
        assert not torch.equal(actual, plain)


@pytest.mark.parametrize("head", HEADS)
def test_on_a_device_without_float64(head, tokens, targets, monkeypatch):
    """As MPS, which makes no such tensor: none is made here, and the figures are as accurate."""
    model, exact = build(head, torch.float32), by_logits(build(head), tokens, targets)
    logprobs = bound(model)
    monkeypatch.setattr(dtypes, "_WITHOUT_FLOAT64", ("cpu",))
    with MakesNoFloat64():
        found = logprobs.with_figures(model(tokens), targets)
    for ours, wanted in ((found.logprobs, exact.logprobs), (found.mean_logits, exact.means)):
        torch.testing.assert_close(ours.double(), wanted, rtol=1e-5, atol=1e-6 * wanted.abs().max().item())


class MakesNoFloat64(TorchDispatchMode):
    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        made = function(*args, **kwargs or {})
        for tensor in tree_leaves(made):
            assert getattr(tensor, "dtype", None) != torch.float64 or not tensor.ndim, function
        return made


# ---- the module


def test_nothing_of_the_model_is_registered(model, hidden, targets):
    logprobs = bound(model)
    logprobs(hidden, targets)
    assert logprobs.state_dict() == {}
    assert list(logprobs.modules()) == [logprobs]
    assert list(logprobs.parameters()) == []
    assert logprobs.rows == VOCABULARY
    assert logprobs.ignore_index == IGNORED
    assert logprobs.apply_compile_strategy(backend="eager") is logprobs


def test_config_builds_it():
    cfg = {"_component_": "torchtune_lce.LinearTokenLogprobs", "impl": "chunked", "workspace_mib": 3}
    logprobs = config.instantiate(OmegaConf.create(cfg))
    assert type(logprobs) is LinearTokenLogprobs
    assert logprobs.impl == "chunked"


def test_says_once_which_implementation_runs(model, hidden, targets, caplog):
    caplog.set_level(logging.INFO)
    logprobs = bound(model)
    logprobs(hidden, targets)
    logprobs(hidden, targets)
    (said,) = [record.message for record in caplog.records if "Token log-probabilities run" in record.message]
    assert "impl 'chunked' (set: 'auto') on cpu in torch.float32, output projection [512, 64]" in said
    assert logprobs.implementation(hidden) == "chunked"


def test_release_and_binding_again(tokens, targets):
    first, second = build("tied", torch.float32), build_model(seed=3)
    logits, attributes = first(tokens), set(vars(first))
    logprobs = bound(first)
    expected = logprobs(first(tokens), targets)
    logprobs.set_model_output(first)
    assert torch.equal(logprobs(first(tokens), targets), expected)
    logprobs.set_model_output(second)
    assert torch.equal(first(tokens), logits)
    assert set(vars(first)) == attributes
    assert not torch.equal(logprobs(second(tokens), targets), expected)
    logprobs.release()
    logprobs.release()
    assert second(tokens).shape[-1] == VOCABULARY
    with pytest.raises(RuntimeError, match="before set_model_output"):
        logprobs(second(tokens), targets)


def test_failed_binding_keeps_the_earlier_one(tokens, targets):
    model, other = build("tied", torch.float32), build_model(tied=False)
    other.output = nn.Sequential()
    logprobs = bound(model)
    expected = logprobs(model(tokens), targets)
    with pytest.raises(TypeError, match="must be a torch.nn.Linear"):
        logprobs.set_model_output(other)
    assert torch.equal(logprobs(model(tokens), targets), expected)


def test_two_models_of_one_kind(tokens, targets):
    """Policy and reference, each with an object of its own."""
    policy, reference = build("untied", torch.float32), build_model(tied=False, seed=3)
    ours, theirs = bound(policy), bound(reference)
    ratio = ours(policy(tokens), targets) - theirs(reference(tokens), targets)
    expected = by_logits(policy, tokens, targets).logprobs - by_logits(reference, tokens, targets).logprobs
    torch.testing.assert_close(ratio, expected)


def test_generation_within_logits_alone(tokens, targets):
    model = build("tied", torch.float32)
    settings = {"max_generated_tokens": 3, "top_k": 5}
    expected, _ = generate(model, tokens, rng=torch.Generator().manual_seed(3), **settings)
    logprobs = LinearTokenLogprobs()
    with logprobs.logits():
        assert model(tokens).shape[-1] == VOCABULARY
    logprobs.set_model_output(model)
    before = logprobs(model(tokens), targets)
    with pytest.raises(RuntimeError, match=r"returns hidden states, .* generate within `with .*logits\(\):`"):
        generate(model, tokens, **settings)
    with logprobs.logits():
        found, _ = generate(model, tokens, rng=torch.Generator().manual_seed(3), **settings)
        with pytest.raises(ValueError, match=r"those are logits: leave `with .*logits\(\)`"):
            logprobs(model(tokens), targets)
    assert torch.equal(found, expected)
    assert torch.equal(logprobs(model(tokens), targets), before)


def test_a_copy_of_a_bound_one_is_refused(model):
    logprobs = bound(model, impl="reference", logit_scale=2.0)
    for make in (copy.deepcopy, copy.copy, pickle.dumps):
        with pytest.raises(TypeError, match=r"bound to a model cannot be copied: release\(\) them first"):
            make(logprobs)
    logprobs.release()
    assert copy.deepcopy(logprobs).impl == "reference"
    assert copy.deepcopy(logprobs)._options == logprobs._options


# ---- bad input


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"impl": "fast"}, ValueError, "impl must be one of auto, cce, .*reference, got 'fast'"),
        ({"softcap": 0.0}, ValueError, "softcap must be None or a finite number > 0, got 0.0"),
        ({"logit_scale": 0.0}, ValueError, "logit_scale must be a number from 1e-30 to 1e30, got 0.0"),
        ({"filter_eps": "high"}, ValueError, "filter_eps must be 'auto', None or a number in .* got 'high'"),
        ({"workspace_mib": 0}, ValueError, "workspace_mib must be at least 1, got 0"),
        ({"ignore_index": 1.5}, TypeError, "ignore_index must be an int, got 1.5"),
        ({"check_targets": 1}, TypeError, "check_targets must be True or False, got 1"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else None,
)
def test_bad_settings_are_refused_when_built(settings, error, message):
    with pytest.raises(error, match=message):
        LinearTokenLogprobs(**settings)


@pytest.mark.parametrize("name", ["num_output_chunks", "mask_ignored_tokens", "tp_enabled"])
def test_settings_of_torchtunes_losses_say_what_takes_their_place(name):
    """And how the command line takes it out of the section that this one's is called by."""
    cfg = OmegaConf.create({"_component_": "torchtune_lce.LinearTokenLogprobs", name: 8})
    with pytest.raises(TypeError, match=f"LinearTokenLogprobs takes no {name}, got 8: .* ~logprobs.{name}"):
        config.instantiate(cfg)


def test_called_before_set_model_output(hidden, targets):
    logprobs = LinearTokenLogprobs()
    for ask in (logprobs, logprobs.with_figures, lambda *_: logprobs.rows):
        with pytest.raises(RuntimeError, match=r"before set_model_output, .*: call logprobs.set_model_output\(model\)"):
            ask(hidden, targets)


def test_hidden_states_of_another_width(model, targets):
    logprobs = bound(model)
    with pytest.raises(ValueError, match=r"shape \[..., 64\] to match weight, got \[2, 7, 63\]$"):
        logprobs(torch.randn(2, 7, 63), targets)
    with pytest.raises(ValueError, match=r"got \[2, 7, 512\]: those are logits: leave `with .*logits\(\)`"):
        logprobs(torch.randn(2, 7, VOCABULARY), targets)


def test_outputs_that_are_no_tensor(model, tokens, targets):
    """A list is what a decoder built with output_hidden_states returns."""
    model.output_hidden_states = [0]
    logprobs = bound(model)
    with pytest.raises(TypeError, match="got a list of 2: build the model without output_hidden_states, or pass the"):
        logprobs(model(tokens), targets)
    with pytest.raises(TypeError, match="must be a torch.Tensor, got ndarray"):
        logprobs(torch.randn(2, 7, EMBED_DIM).numpy(), targets)
    with pytest.raises(TypeError, match="targets must be a torch.Tensor, got list"):
        logprobs(torch.randn(2, 7, EMBED_DIM), targets.tolist())


def test_targets_of_another_shape(model, hidden, targets):
    with pytest.raises(ValueError, match=r"targets must have the shape .* \[2, 7\], got \[2, 6\]"):
        bound(model)(hidden, targets[:, 1:])


def test_targets_out_of_range_on_the_first_batch(model, hidden, targets):
    logprobs = bound(model)
    outside = targets.masked_fill(targets == IGNORED, VOCABULARY + 1)
    with pytest.raises(ValueError, match=r"in \[0, 512\).* the first 513.* has 512 rows; .* a larger tokenizer$"):
        logprobs(hidden, outside)
    logprobs.tokenizer_size = 600
    with pytest.raises(ValueError, match="a larger tokenizer, which has 600 entries"):
        logprobs(hidden, outside)
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    with mode:  # shapes alone, for a memory plan, are no batch
        assert logprobs(mode.from_tensor(hidden), mode.from_tensor(targets)).shape == (2, 7)
    with pytest.raises(ValueError, match="a larger tokenizer"):
        logprobs(hidden, outside)
    assert logprobs._first_batch


@pytest.mark.parametrize(("check_targets", "looks"), [(False, 1), (True, 3)])
def test_checked_mode_looks_at_every_batch(model, hidden, targets, monkeypatch, check_targets, looks):
    """On a CPU every implementation checks anyway, so the looks themselves are counted."""
    logprobs = bound(model, check_targets=check_targets)
    looked_at = []
    real = of_model_output.checked
    monkeypatch.setattr(
        of_model_output, "checked", lambda *a, look, **k: looked_at.append(look) or real(*a, look=look, **k)
    )
    for _ in range(3):
        logprobs(hidden, targets)
    assert looked_at == [True] * looks + [False] * (3 - looks)


@pytest.mark.gpu
@pytest.mark.parametrize("check_targets", [False, True])
def test_targets_out_of_range_on_a_card(check_targets):
    """The first batch raises; later ones give NaN without a look, which would stall the card, unless asked to look."""
    model = build_model(tied=False).cuda()
    hidden = torch.randn(7, EMBED_DIM, device="cuda")
    good = torch.randint(VOCABULARY, (7,), device="cuda")
    bad = good.clone()
    bad[3] = VOCABULARY
    logprobs = bound(model, check_targets=check_targets)
    with pytest.raises(ValueError, match="512 rows"):
        logprobs(hidden, bad)
    assert logprobs(hidden, good).isfinite().all()
    if check_targets:
        with pytest.raises(ValueError, match="512 rows"):
            logprobs(hidden, bad)
        return
    found = logprobs.with_figures(hidden, bad)
    for figure in (found.logprobs, found.entropy):
        assert torch.equal(figure.isnan(), bad == VOCABULARY)
    assert found.mean_logits.isfinite().all()


def test_impl_that_cannot_run_here_says_what_to_set(model, hidden, targets, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(RuntimeError, match="impl='cce' needs .* set impl='chunked'"):
        bound(model, impl="cce")(hidden, targets)


def test_mean_logits_of_positions_that_are_ignored(model, hidden, targets):
    """Each position's own: what stands at another one, NaN included, does not reach it."""
    logits = F.linear(hidden.detach().double(), model.output.weight.detach().double())
    spoilt = hidden.detach().clone()
    spoilt[1, 4] = torch.nan
    found = bound(model).with_figures(spoilt, targets).mean_logits
    expected = logits.mean(-1)
    expected[1, 4] = torch.nan
    torch.testing.assert_close(found, expected.float(), equal_nan=True, rtol=1e-6, atol=1e-7)
