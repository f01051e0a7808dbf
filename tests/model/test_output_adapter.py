"""LoRA and DoRA on the output projection, dropout included, against torchtune's own layers on full logits."""

import dataclasses
import logging

import pytest
import torch
import torch.nn.functional as F
from adapters import EMBED_DIM, KINDS, make_output
from allocations import usage
from calls import compute
from tiny_models import VOCABULARY, build_model
from torch import nn
from torch.profiler import ProfilerActivity, profile

from torchtune_lce import LinearCrossEntropyLoss
from torchtune_lce.commands.shared.torchtune_main import ChunkedProjectionLoss
from torchtune_lce.implementations.walk import Sizes, tokens_with_whole_rows
from torchtune_lce.inputs import filtering
from torchtune_lce.inputs.low_rank import LowRank
from torchtune_lce.inputs.options import Options
from torchtune_lce.model import output_adapter

MIB = 2**20


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
    "smoothed and capped": {"label_smoothing": 0.2, "softcap": 1.5},
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("dropout", [0.0, 0.4])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("impl", ["chunked", "reference"])
def test_loss_and_gradients_are_torchtunes(impl, kind, dropout, case):
    assert_torchtunes(impl, kind, dropout, case)


def test_compiled_they_are_too():
    """The case that has most of it: what torch.compile compiles is the reference, of which LoRA is a part of DoRA."""
    assert_torchtunes("torch_compile", "DoRA", 0.4, "smoothed and capped")


def assert_torchtunes(impl, kind, dropout, case):
    """In float64, with the dropout of the same seed; every other case with a frozen base, as recipes have it."""
    frozen = case in ("plain", "z-loss")
    output = make_output(kind, dropout=dropout, use_bias=not frozen).double()
    for name in ("weight", "bias") if not frozen else ("weight",):
        getattr(output, name).requires_grad_(not frozen)
    hidden, targets = batch()
    torch.manual_seed(4)
    settings = CASES[case]
    expected = results(expected_loss(output, hidden, targets, **settings), output, hidden)
    _, loss = bound(output, impl=impl, **settings)
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
    assert tokens_with_whole_rows(200, Sizes(EMBED_DIM, 4000, torch.float64, 1, 1)) == 0, "one strip would do"
    _, loss = bound(output, impl="chunked", workspace_mib=1)
    expected = results(expected_loss(output, hidden, targets), output, hidden)
    found = results(loss(hidden, targets), output, hidden)
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-10, atol=1e-13)


def test_norms_of_pieces(monkeypatch):
    """DoRA's row norms, some rows at a time, are those of the whole sum."""
    monkeypatch.setattr(output_adapter, "NORM_BYTES", 100 * EMBED_DIM * 4)
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


def test_torchtunes_way_is_compared_with_the_adapter():
    output = make_output("DoRA")
    hidden, targets = (x.flatten(0, 1).detach() for x in batch(torch.float32))
    model = build_model(tied=False)
    model.output = output
    loss = ChunkedProjectionLoss()
    loss.set_model_output(model)
    torch.testing.assert_close(loss(hidden, targets), expected_loss(output, hidden[None], targets[None]))


# ---- in the kernels


@pytest.mark.parametrize(
    ("kind", "impl", "dropout", "case"),
    [
        *(
            ("LoRA", *call, case)
            for call in [("cce_exact", 0.0), ("cce", 0.4), ("cce_kahan_full_c", 0.0)]
            for case in CASES
        ),
        *(("DoRA", *call, case) for call in [("cce_exact", 0.4), ("cce", 0.0)] for case in CASES),
    ],
)
def test_kernels_are_torchtunes(kind, impl, dropout, case, device):
    """As above, in float32: no softmax entry here is below what filtering leaves out there, 2^-28."""
    pytest.importorskip("triton")
    trained = case not in ("plain", "z-loss")
    output = make_output(kind, dropout=dropout, use_bias=trained).to(device)
    for name in ("weight", "bias") if trained else ("weight",):
        getattr(output, name).requires_grad_(trained)
    hidden, targets = (x.to(device) for x in batch(torch.float32))
    hidden = hidden.detach().requires_grad_()
    torch.manual_seed(4)
    expected = results(expected_loss(output, hidden, targets, **CASES[case]), output, hidden)
    _, loss = bound(output, impl=impl, **CASES[case])
    torch.manual_seed(4)
    found = results(loss(hidden, targets), output, hidden)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        scale = value.abs().max().item()
        assert scale > 0
        torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-5 * scale, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("needs", [("low", "up"), ("hidden", "low", "up")])
def test_kernels_read_by_the_copy_engine_beside_an_adapter(needs, device, monkeypatch):
    """In float16 with descriptors, which the interpreter is made to use; a frozen weight, and frozen hidden states."""
    pytest.importorskip("triton")
    from torchtune_lce.kernels import autograd, tuning

    config = tuning.config_for(device, torch.float16)
    if device.type == "cpu":
        pytest.importorskip("triton.tools.tensor_descriptor")
        monkeypatch.setattr(autograd, "config_for", lambda *_: dataclasses.replace(config, tma=True))
    rows = {"hidden": 70, "weight": 300, "low": 70, "up": 300}
    widths = {"hidden": 48, "weight": 48, "low": 20, "up": 20}
    values = {name: torch.randn(rows[name], widths[name]) / 4 for name in rows}
    targets = torch.randint(300, (70,), device=device)
    targets[3:20] = -100

    def gradients(dtype, impl):
        leaves = {name: x.half().to(device, dtype).requires_grad_(name in needs) for name, x in values.items()}
        settings = {"options": Options(), "reduction": "mean", "shift": 0, "return_lse": False, "impl": impl}
        low_rank = LowRank(leaves["low"], leaves["up"], None)
        loss = compute(leaves["hidden"], leaves["weight"], targets, None, low_rank=low_rank, **settings)
        return torch.autograd.grad(loss, [leaves[name] for name in needs])

    eps = torch.finfo(torch.float16).eps
    for ours, wanted in zip(gradients(torch.float16, "cce_exact"), gradients(torch.float64, "reference"), strict=True):
        torch.testing.assert_close(ours.double(), wanted, rtol=4 * eps, atol=2 * eps * wanted.abs().max().item())


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("rank", "scaled"), [*((rank, False) for rank in (1, 8, 16, 24, 40, 140)), (8, True), (140, True)]
)
def test_filtered_gradients_beside_an_adapter_on_a_card(rank, scaled, dtype, device):
    """In 16 bits, where compilers pipeline products whose tiles may be as narrow as the rank; two runs, equal bits."""
    tokens, vocabulary, width = 700, 3000, 256
    values = {
        "hidden": torch.randn(tokens, width),
        "weight": torch.randn(vocabulary, width) * 2 / width**0.5,
        "low": torch.randn(tokens, rank) / 4,
        "up": torch.randn(vocabulary, rank) / 4,
    }
    # Two thirds of the vocabulary have next to no probability, so their tiles are dropped.
    alive = vocabulary // 3
    values["hidden"][:, 0] = 2
    values["weight"][alive:, 0] = -7
    values = {name: x.to(device, dtype) for name, x in values.items()}
    if scaled:
        values["scale"] = 0.5 + torch.rand(vocabulary, device=device)
    targets = torch.randint(alive, (tokens,), device=device)

    def gradients(dtype, impl):
        wide = {"scale": torch.promote_types(dtype, torch.float32)}
        leaves = {name: x.to(wide.get(name, dtype)).requires_grad_() for name, x in values.items()}
        low_rank = LowRank(leaves["low"], leaves["up"], leaves.get("scale"))
        settings = {"options": Options(), "reduction": "mean", "shift": 0, "return_lse": False, "impl": impl}
        loss = compute(leaves["hidden"], leaves["weight"], targets, None, low_rank=low_rank, **settings)
        return dict(zip(leaves, torch.autograd.grad(loss, list(leaves.values())), strict=True))

    with filtering.recording() as records:
        found, again = gradients(dtype, "cce"), gradients(dtype, "cce")
    assert all(record.kept_fraction < 0.5 for record in records)
    for name, exact in gradients(torch.float64, "reference").items():
        assert torch.equal(found[name], again[name]), name
        assert (found[name].double() - exact).norm() < torch.finfo(dtype).eps * exact.norm(), name


@pytest.mark.parametrize(
    ("rank", "eps", "scaled"),
    [(1, None, False), (140, None, False), (140, 2.0**-8, False), (1, None, True), (140, 2.0**-8, True)],
)
def test_kernels_with_a_large_rank_in_strips_and_with_a_dropped_tail(rank, eps, scaled, device):
    """Against float64. Rank 140 takes two blocks of it; filtered gradients are near, and their tail's mean is there.

    Where all rows of weight and adapter agree in a feature the whole tail is its mean: the gradient there is exact.
    """
    pytest.importorskip("triton")
    from torchtune_lce.kernels import autograd, plan

    tokens, vocabulary, width = 140, 1500, 24
    hidden, low = torch.randn(tokens, width) / 2, torch.randn(tokens, rank) / rank**0.5
    weight, up = torch.randn(vocabulary, width) / 3, torch.randn(vocabulary, rank) / 3
    hidden[:, 0] = 3
    weight[:, 0] = torch.linspace(-3, 0, vocabulary)[torch.randperm(vocabulary)]
    weight[:, 1] = up[:, 0] = 0.5
    leaf_names = ["hidden", "weight", "low", "up"]
    scale = None
    if scaled:
        leaf_names.append("scale")
        scale = 0.5 + torch.rand(vocabulary)
        # Rows agree as they are used, and one of them is not.
        scale[11] = 0
        weight[:, 1] = up[:, 0] = (0.5 / scale).nan_to_num(posinf=0)
    targets = torch.randint(vocabulary, (tokens,))
    targets[7:50] = -100

    def gradients(dtype, impl):
        values = (x for x in (hidden, weight, low, up, scale) if x is not None)
        leaves = [x.to(device, dtype).requires_grad_() for x in values]
        options = Options(filter_eps=eps, workspace_mib=1)
        settings = {"options": options, "reduction": "mean", "shift": 0, "return_lse": False, "impl": impl}
        low_rank = LowRank(leaves[2], leaves[3], leaves[4] if scaled else None)
        loss = compute(*leaves[:2], targets.to(device), None, low_rank=low_rank, **settings)
        return loss.detach(), torch.autograd.grad(loss, leaves)

    exact_loss, exact = gradients(torch.float64, "reference")
    with pytest.MonkeyPatch.context() as patch:
        # Filtering few tokens keeps most tiles; and the smallest strips that there can be.
        patch.setattr(plan, "DENSE_FRACTION", 1.0)
        patch.setattr(autograd, "make_plan", lambda *args: plan.make_plan(*args[:6], 2 * args[4], *args[7:]))
        with filtering.recording() as records:
            loss, found = gradients(torch.float32, "cce")
    torch.testing.assert_close(loss.double(), exact_loss, rtol=1e-6, atol=0)
    if eps is None:
        for ours, wanted in zip(found, exact, strict=True):
            # That of `low` is zero where its rank is 1: all of `up` is the same.
            torch.testing.assert_close(ours.double(), wanted, rtol=1e-4, atol=1e-5 * wanted.abs().max().item() + 1e-7)
        return
    assert records[0].kept_fraction < 0.9
    assert records[0].dropped_mass.mean() > 1e-3
    for name, ours, wanted in zip(leaf_names, found, exact, strict=True):
        assert 0 < (ours.double() - wanted).norm() < 0.1 * wanted.norm(), name
    for ours, wanted, feature in ((found[0], exact[0], 1), (found[2], exact[2], 0)):
        torch.testing.assert_close(ours[:, feature].double(), wanted[:, feature], rtol=1e-3, atol=1e-6)


# ---- memory


@pytest.mark.parametrize("dropout", [0.0, 0.2])
@pytest.mark.parametrize("kind", KINDS)
def test_nothing_as_large_as_the_weight_is_allocated(kind, dropout, monkeypatch):
    """Neither the sum of weight and adapter nor its gradient; and at the worst moment less than half of the weight."""
    tokens, vocabulary, width = 128, 9000, 512
    monkeypatch.setattr(output_adapter, "NORM_BYTES", MIB)
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
    if kind == "LoRA" and not dropout:  # the meter shows what a sum of weight and adapter would take

        def whole():
            torch.addmm(output.weight, output.lora_b.weight, output.lora_a.weight)

        assert usage(whole, torch.device("cpu"), interpreted=False).peak >= weight


def test_kernels_allocate_nothing_as_large_as_the_weight(device):
    pytest.importorskip("triton")
    vocabulary, width = (2400, 400) if device.type == "cpu" else (200_000, 2048)
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    output = make_output("LoRA", vocabulary=vocabulary, width=width, dropout=0.2).to(device, dtype)
    output.weight.requires_grad_(False)
    hidden = torch.randn(1, 32, width, device=device, dtype=dtype, requires_grad=True)
    targets = torch.randint(vocabulary, (1, 32), device=device)
    model = build_model(tied=False)
    model.tok_embeddings = nn.Embedding(vocabulary, 1)
    model.output = output
    loss = LinearCrossEntropyLoss(impl="cce", workspace_mib=1)
    loss.set_model_output(model)

    def step():
        loss(hidden, targets).backward()

    if device.type == "cuda":
        # What is compiled and made once a process does not count.
        step()
        for tensor in (hidden, *output.parameters()):
            tensor.grad = None
    assert usage(step, device, interpreted=device.type == "cpu").peak < output.weight.nbytes / 2


# ---- what runs, and what is refused


def test_log_names_the_adapter(caplog):
    _, loss = bound(make_output("DoRA"), label_smoothing=0.1)
    caplog.set_level(logging.INFO)
    loss(*batch(torch.float32))
    (said,) = [record.message for record in caplog.records if "Linear cross-entropy runs" in record.message]
    assert "and the DoRA on it, of rank 4" in said


def test_bad_inputs():
    hidden, targets = batch(torch.float32)
    output = make_output("LoRA")
    _, loss = bound(output, impl="chunked")
    output.lora_a.double()
    with pytest.raises(TypeError, match="lora_a and lora_b of model.output must have the dtype of hidden, .*float64"):
        loss(hidden, targets)
    with pytest.raises(ValueError, match="those are logits"):
        loss(torch.randn(2, 9, VOCABULARY), targets)
