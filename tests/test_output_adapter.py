"""LoRA and DoRA on the output projection, dropout included, against torchtune's own layers on full logits."""

import logging

import pytest
import torch
import torch.nn.functional as F
from test_memory import usage
from tiny_models import SIZES, VOCABULARY, build_model
from torch import nn
from torch.profiler import ProfilerActivity, profile
from torchtune.modules.peft import DoRALinear, LoRALinear

from torchtune_lce import LinearCrossEntropyLoss, LinearForwardKLLoss, implementations, output_adapter
from torchtune_lce.chunked import entries_per_chunk

EMBED_DIM = SIZES["embed_dim"]
MIB = 2**20
KINDS = {"LoRA": LoRALinear, "DoRA": DoRALinear}


def make_output(kind: str, vocabulary: int = VOCABULARY, width: int = EMBED_DIM, rank: int = 4, **settings):
    """An adapter that has been trained for a while: B starts at zero, the magnitude at the row norms."""
    output = KINDS[kind](width, vocabulary, rank=rank, alpha=3 * rank, **settings)
    nn.init.normal_(output.lora_b.weight, std=0.1)
    if kind == "DoRA":
        output.initialize_dora_magnitude()
        with torch.no_grad():
            output.magnitude.mul_(1 + 0.3 * torch.randn(vocabulary))
            output.magnitude[5] = 0  # a scale by which nothing may be divided
    return output


def bound(output, **settings) -> tuple[nn.Module, LinearCrossEntropyLoss]:
    model = build_model(tied=False)
    model.output = output
    model.to(output.weight.dtype)
    loss = LinearCrossEntropyLoss(**settings)
    loss.set_model_output(model)
    return model, loss


def batch(dtype: torch.dtype = torch.float64) -> tuple[torch.Tensor, torch.Tensor]:
    hidden = torch.randn(2, 9, EMBED_DIM, dtype=dtype, requires_grad=True)
    targets = torch.randint(VOCABULARY, (2, 9))
    targets[0, :3] = -100
    return hidden, targets


def expected_loss(output, hidden, targets, softcap=None, z_loss=0.0, label_smoothing=0.0) -> torch.Tensor:
    """Full logits by torchtune's module itself."""
    logits = output(hidden).flatten(0, 1)
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    targets = targets.flatten()
    loss = F.cross_entropy(logits, targets, label_smoothing=label_smoothing)
    return loss + z_loss * logits[targets != -100].logsumexp(-1).square().mean()


def results(loss: torch.Tensor, output, hidden) -> dict[str, torch.Tensor | None]:
    names, parameters = zip(*output.named_parameters(), strict=True)
    wanted = [p for p in parameters if p.requires_grad]
    gradients = iter(torch.autograd.grad(loss, [hidden, *wanted]))
    found = {"loss": loss.detach(), "hidden": next(gradients)}
    return found | {n: next(gradients) for n, p in zip(names, parameters, strict=True) if p.requires_grad}


CASES = {
    "plain": {},
    "softcap": {"softcap": 1.5},
    "z-loss": {"z_loss": 0.1},
    "smoothed": {"label_smoothing": 0.2},
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("dropout", [0.0, 0.4])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("impl", ["chunked", "reference"])
def test_loss_and_gradients_are_torchtunes(impl, kind, dropout, case):
    """In float64, with the dropout of the same seed; every other case with a frozen base, as recipes have it."""
    if (impl, kind, case) == ("chunked", "DoRA", "smoothed"):
        pytest.skip("refused, below")
    frozen = case in ("plain", "z-loss")
    output = make_output(kind, dropout=dropout, use_bias=not frozen).double()
    for name in ("weight", "bias") if not frozen else ("weight",):
        getattr(output, name).requires_grad_(not frozen)
    hidden, targets = batch()
    torch.manual_seed(4)
    expected = results(expected_loss(output, hidden, targets, **CASES[case]), output, hidden)
    _, loss = bound(output, impl=impl, **CASES[case])
    torch.manual_seed(4)
    found = results(loss(hidden, targets), output, hidden)
    assert found.keys() == expected.keys()
    assert {"lora_a.weight", "lora_b.weight", *(["magnitude"] if kind == "DoRA" else [])} <= expected.keys()
    for name, value in expected.items():
        assert value.abs().max() > 0
        # torchtune divides by the norm once it has been rounded to the weight's dtype, which is float64 here.
        torch.testing.assert_close(found[name], value, rtol=1e-10, atol=1e-13, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("kind", KINDS)
def test_many_chunks(kind):
    """The smallest workspace, so that the vocabulary takes several; some of them the norms' as well."""
    output = make_output(kind, vocabulary=4000).double()
    hidden = torch.randn(1, 200, EMBED_DIM, dtype=torch.float64, requires_grad=True)
    targets = torch.randint(4000, (1, 200))
    assert entries_per_chunk(200, 4000, 1, torch.float64, kind == "DoRA") < 400
    _, loss = bound(output, impl="chunked", workspace_mib=1)
    expected = results(expected_loss(output, hidden, targets), output, hidden)
    found = results(loss(hidden, targets), output, hidden)
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-10, atol=1e-13)


def test_norms_of_pieces(monkeypatch):
    """DoRA's row norms, some rows at a time, are those of the whole sum."""
    monkeypatch.setattr(output_adapter, "_NORM_BYTES", 100 * EMBED_DIM * 4)
    output = make_output("DoRA")
    norms = output._get_weight_norm(output.weight, output.lora_b.weight @ output.lora_a.weight)
    scale = output_adapter.low_rank(output, torch.randn(3, EMBED_DIM)).scale
    torch.testing.assert_close(scale, output.magnitude / norms)


@pytest.mark.parametrize("kind", KINDS)
def test_autocast_and_bfloat16(kind):
    """As near to float64 as torchtune's layer in that dtype is, twice over."""
    output = make_output(kind).bfloat16()
    hidden, targets = batch(torch.bfloat16)
    exact = make_output(kind).double()
    exact.load_state_dict(output.state_dict())
    wide = hidden.detach().double().requires_grad_()
    expected = results(expected_loss(exact, wide, targets), exact, wide)
    plain = results(expected_loss(output, hidden, targets).float(), output, hidden)
    _, loss = bound(output, impl="chunked")
    found = results(loss(hidden, targets), output, hidden)
    full = make_output(kind)
    full.load_state_dict(output.state_dict())
    _, loss = bound(full, impl="chunked")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = results(loss(hidden, targets), full, hidden)
    for name, value in expected.items():
        scale = value.abs().max()
        allowed = 2 * (plain[name].double() - value).abs().max() / scale + 2 * torch.finfo(torch.bfloat16).eps
        for own in (found, cast):
            assert (own[name].double() - value).abs().max() / scale <= allowed, name


@pytest.mark.parametrize("kind", KINDS)
def test_disabled_and_evaluated(kind):
    output = make_output(kind, dropout=0.5).double()
    hidden, targets = batch()
    _, loss = bound(output, impl="chunked")
    output.eval()
    with torch.no_grad():
        torch.testing.assert_close(loss(hidden, targets), expected_loss(output, hidden, targets))
    output.train()
    output.disabled = True
    torch.testing.assert_close(
        loss(hidden, targets), F.cross_entropy(F.linear(hidden, output.weight).flatten(0, 1), targets.flatten())
    )
    output.disabled = False
    assert loss(hidden, targets) != loss(hidden, targets), "dropout is drawn at every call"


@pytest.mark.parametrize("kind", KINDS)
def test_no_label_at_all(kind):
    output = make_output(kind, dropout=0.3)
    hidden, targets = batch(torch.float32)
    _, loss = bound(output, impl="chunked")
    found = results(loss(hidden, targets.fill_(-100)), output, hidden)
    assert not any(value.any() for value in found.values())


# ---- memory


@pytest.mark.parametrize("dropout", [0.0, 0.2])
@pytest.mark.parametrize("kind", KINDS)
def test_nothing_as_large_as_the_weight_is_allocated(kind, dropout, monkeypatch):
    """Neither the sum of weight and adapter nor its gradient; and at the worst moment less than half of the weight."""
    tokens, vocabulary, width = 128, 9000, 512
    monkeypatch.setattr(output_adapter, "_NORM_BYTES", MIB)
    output = make_output(kind, vocabulary=vocabulary, width=width, dropout=dropout)
    output.weight.requires_grad_(False)
    weight = output.weight.nbytes
    targets = torch.randint(vocabulary, (1, tokens))
    hidden = torch.randn(1, tokens, width, requires_grad=True)
    model = build_model(tied=False)
    model.tok_embeddings = nn.Embedding(vocabulary, width)
    model.output = output
    loss = LinearCrossEntropyLoss(impl="chunked", workspace_mib=1)
    loss.set_model_output(model)

    def step():
        loss(hidden, targets).backward()

    step()
    for tensor in (hidden, *output.parameters()):
        tensor.grad = None
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        step()
    largest = max(e.nbytes() for e in recorded.profiler.kineto_results.events() if e.name() == "[memory]")
    assert 0 < largest < weight / 8
    used = usage(step, torch.device("cpu"), interpreted=False)
    assert used.peak < weight / 2
    if kind == "LoRA" and not dropout:  # the meter shows what kernels, which take one matrix, are given
        assert usage(loss._projection.read, torch.device("cpu"), interpreted=False).peak >= weight
    elif kind == "DoRA":
        with pytest.raises(TypeError, match="DoRALinear"):
            loss._projection.read()


# ---- what runs, and what is refused


@pytest.mark.parametrize(("kind", "dropout"), [("LoRA", 0.1), ("DoRA", 0.0)])
def test_kernels_refuse_and_auto_takes_chunked(kind, dropout, caplog, monkeypatch):
    output = make_output(kind, dropout=dropout)
    hidden, targets = batch(torch.float32)
    _, loss = bound(output, impl="cce")
    message = r"impl='cce' takes an output projection as one matrix, .* set impl='chunked' \(what 'auto' takes for it\)"
    with pytest.raises(RuntimeError, match=message):
        loss(hidden, targets)
    _, loss = bound(output)
    caplog.set_level(logging.INFO)
    assert loss.implementation(hidden) == "chunked"
    assert loss(hidden, targets).isfinite()
    (said,) = [record.message for record in caplog.records if "Linear cross-entropy runs" in record.message]
    assert "impl 'chunked' (set: 'auto')" in said
    assert f"and the {kind} on it, of rank 4" in said


def test_auto_says_why(caplog):
    implementations._say_once.cache_clear()
    caplog.set_level(logging.INFO, logger="torchtune_lce")
    name, _ = implementations.choose("auto", torch.empty(1, device="meta"), low_rank=True)
    assert name == "chunked"
    assert "DoRA or dropout keeps the output's adapter apart" in caplog.text


def test_kernels_take_lora_without_dropout():
    """The weight that the adapter has been added to, as before; and with dropout too where it does not act."""
    pytest.importorskip("triton")
    for dropout in (0.0, 0.5):
        output = make_output("LoRA", dropout=dropout).eval()
        hidden, targets = batch(torch.float32)
        _, loss = bound(output, impl="cce")
        expected = results(expected_loss(output, hidden, targets), output, hidden)
        found = results(loss(hidden, targets), output, hidden)
        for name, value in expected.items():
            torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_distillation_refuses(kind):
    """And leaves the model as it was."""
    model = build_model(tied=False)
    model.output = make_output(kind, dropout=0.25)
    attributes = set(vars(model))
    error, message = {
        "LoRA": (ValueError, r"lora_dropout 0\.25, .* set lora_dropout: 0\.0 or apply_lora_to_output: False"),
        "DoRA": (TypeError, "DoRALinear, .* set apply_lora_to_output: False, or use_dora: False"),
    }[kind]
    loss = LinearForwardKLLoss()
    for bind in (loss.set_model_output, loss.set_teacher_output):
        with pytest.raises(error, match=message):
            bind(model)
    assert set(vars(model)) == attributes


def test_bad_inputs():
    hidden, targets = batch(torch.float32)
    _, loss = bound(make_output("DoRA"), impl="chunked", label_smoothing=0.1)
    with pytest.raises(ValueError, match=r"label_smoothing must be 0 with DoRA on the output .* got 0\.1: set impl="):
        loss(hidden, targets)
    output = make_output("LoRA")
    _, loss = bound(output, impl="chunked")
    output.lora_a.double()
    with pytest.raises(TypeError, match="lora_a and lora_b of model.output must have the dtype of hidden, .*float64"):
        loss(hidden, targets)
    with pytest.raises(ValueError, match="those are logits"):
        loss(torch.randn(2, 9, VOCABULARY), targets)
