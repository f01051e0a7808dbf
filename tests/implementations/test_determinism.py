"""The same bits: under torch's deterministic mode, over many runs, and for a token whatever else is in the batch.

That a second call gives the same bits is in test_linear_cross_entropy.py, for every implementation.
"""

from contextlib import nullcontext

import pytest
import torch
from calls import compute
from fused_steps import steps_as
from grid import each, needs_triton, one

from torchtune_lce.implementations.choice import CCE_PRESETS
from torchtune_lce.inputs.options import Options

# The presets share cce's code; on a card each is tried.
EACH = [
    *each("reference", "chunked", "cce"),
    *(one(impl, pytest.mark.gpu) for impl in CCE_PRESETS if impl != "cce"),
]
# Ragged against every tile, a third of the tokens ignored.
SMALL = {"tokens": 70, "vocabulary": 200, "width": 40}
LARGE = {"tokens": 4099, "vocabulary": 50_021, "width": 328}


def make_inputs(device, dtype, tokens, vocabulary, width) -> dict[str, torch.Tensor]:
    targets = torch.randint(0, vocabulary, (tokens,))
    targets[torch.rand(tokens) < 0.3] = -100
    tensors = {
        "hidden": torch.randn(tokens, width, dtype=dtype),
        "weight": torch.randn(vocabulary, width, dtype=dtype) / 4,
        "bias": torch.randn(vocabulary, dtype=dtype),
        "targets": targets,
    }
    return {name: tensor.to(device) for name, tensor in tensors.items()}


def results(impl, inputs, rows=None, workspace_mib=128) -> dict[str, torch.Tensor]:
    """Losses and log-sum-exps of the tokens in ``rows``, and the gradients of their sum."""
    rows = slice(None) if rows is None else rows
    leaves = {name: inputs[name].clone().requires_grad_() for name in ("weight", "bias")}
    leaves["hidden"] = inputs["hidden"][rows].clone().requires_grad_()
    loss, lse = compute(
        leaves["hidden"],
        leaves["weight"],
        inputs["targets"][rows],
        leaves["bias"],
        options=Options(workspace_mib=workspace_mib, softcap=20.0),
        reduction="none",
        shift=0,
        impl=impl,
        return_lse=True,
    )
    (loss + lse).sum().backward()
    return {"loss": loss.detach(), "lse": lse.detach()} | {name: leaf.grad for name, leaf in leaves.items()}


def same(ours: dict[str, torch.Tensor], others: dict[str, torch.Tensor]) -> None:
    for name in ours:
        assert torch.equal(ours[name], others[name]), name


@pytest.fixture
def deterministic_algorithms(monkeypatch):
    """Operations without a deterministic form raise, and fresh memory is filled with NaN."""
    # What cuBLAS, which the implementations in PyTorch use on a card, must be told.
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("impl", [*EACH, *each("torch_compile")])
def test_runs_in_deterministic_mode(impl, device, deterministic_algorithms):
    inputs = make_inputs(device, torch.float32, **SMALL)
    # A card compiles the steps: what it has for a sum is not what runs without.
    with steps_as() if device.type == "cpu" else nullcontext():
        first, again = (results(impl, inputs) for _ in range(2))
    assert all(tensor.isfinite().all() for tensor in first.values())
    same(first, again)


def parts(tokens: int) -> dict[str, torch.Tensor]:
    """Ways to meet the same tokens in other company."""
    return {
        "one": torch.tensor([tokens // 2]),
        "across-tiles": torch.arange(tokens // 4, tokens // 4 * 3 + 1),
        "shuffled-twice": torch.randperm(2 * tokens) % tokens,
    }


# Gradients are sums over strips of the vocabulary, which are cut by the workspace and by what is kept in this batch.
PER_TOKEN = ("loss", "lse")


@needs_triton
@pytest.mark.parametrize(
    ("impl", "dtype", "size"),
    [
        ("cce", torch.float16, SMALL),
        ("cce_exact", torch.float32, SMALL),
        *(
            pytest.param(impl, dtype, LARGE, marks=pytest.mark.gpu, id=f"{impl}-{dtype}-large")
            for impl in ("cce", "cce_exact")
            for dtype in (torch.bfloat16, torch.float16, torch.float32)
        ),
    ],
)
@pytest.mark.usefixtures("products_term_by_term")
def test_a_token_does_not_see_its_batch(impl, dtype, size, device):
    """Its loss and log-sum-exp are the same bits in any company, in any place, and with any workspace."""
    inputs = make_inputs(device, dtype, **size)
    everything = results(impl, inputs)
    for rows in parts(size["tokens"]).values():
        rows = rows.to(device)
        same({name: everything[name][rows] for name in PER_TOKEN}, results(impl, inputs, rows))
    # Ignored tokens are no company either.
    inputs["targets"][::2] = -100
    half = results(impl, inputs, workspace_mib=1)
    same(*({name: tensors[name][1::2] for name in PER_TOKEN} for tensors in (everything, half)))


@pytest.mark.gpu
@pytest.mark.parametrize("impl", ["cce", "cce_exact"])
def test_many_runs_beside_other_work_on_a_card(impl, device):
    """Which program comes first differs from run to run; another stream's products keep part of the card busy."""
    inputs = make_inputs(device, torch.bfloat16, **LARGE)
    first = results(impl, inputs)
    noise = torch.randn(3000, 3000, device=device)
    stream = torch.cuda.Stream()
    for _ in range(30):
        with torch.cuda.stream(stream):
            noise = torch.tanh(noise @ noise)
        same(first, results(impl, inputs))
    torch.cuda.synchronize()
