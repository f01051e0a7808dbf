"""CUDA graphs of forward and backward: captured once, replayed with other targets and other numbers of ignored ones."""

import copy
from functools import partial

import pytest
import torch
from torch import nn

from torchtune_lce import linear_cross_entropy
from torchtune_lce.divergence import operands
from torchtune_lce.divergence.function import divergence

pytestmark = pytest.mark.gpu

TOKENS, VOCABULARY, WIDTH = 1030, 20_011, 264
IMPLS = ["cce", "cce_exact", "reference"]
# Each in its own way of what the kernels have flags for.
OPTIONS = {
    "mean": {},
    "none-lse": {"reduction": "none", "return_lse": True, "softcap": 20.0},
    "shift": {"shift": 1, "reduction": "sum"},
    "smoothed": {"label_smoothing": 0.1, "softcap": 20.0},
}
SHARES_IGNORED = (0.0, 0.9, 0.3, 1.0, 0.999)


class Inputs:
    """Tensors that keep their addresses while their values change."""

    def __init__(self, dtype: torch.dtype):
        self.hidden = torch.empty(TOKENS, WIDTH, device="cuda", dtype=dtype, requires_grad=True)
        self.weight = torch.empty(VOCABULARY, WIDTH, device="cuda", dtype=dtype, requires_grad=True)
        self.bias = torch.empty(VOCABULARY, device="cuda", dtype=dtype, requires_grad=True)
        self.targets = torch.empty(TOKENS, device="cuda", dtype=torch.int64)
        self.fill(0.2)

    @torch.no_grad()
    def fill(self, ignored: float) -> None:
        self.hidden.normal_()
        self.weight.normal_(std=0.3)
        self.bias.normal_()
        self.targets.random_(0, VOCABULARY)
        # So that filtering has something to leave out: confident in half of the tokens.
        self.hidden[::2] = self.weight[self.targets[::2]] * 4
        self.targets[torch.rand(TOKENS, device="cuda") < ignored] = -100

    def step(self, impl: str, options: dict) -> list[torch.Tensor]:
        """Results and gradients, the upstream gradients all different."""
        results = linear_cross_entropy(self.hidden, self.weight, self.targets, self.bias, impl=impl, **options)
        results = list(results) if isinstance(results, tuple) else [results]
        scales = torch.linspace(0.5, 2, TOKENS, device="cuda")
        upstream = [scales if result.ndim else torch.ones_like(result) for result in results]
        trained = [x for x in (self.hidden, self.weight, self.bias) if x.requires_grad]
        return results + list(torch.autograd.grad(results, trained, upstream))


def capture(step) -> tuple[torch.cuda.CUDAGraph, list[torch.Tensor]]:
    """As torch's notes on CUDA graphs do: warmed up on another stream, so that kernels are compiled before."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = step()
    return graph, outputs


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("impl", IMPLS)
def test_replay_gives_the_bits_of_a_plain_call(impl, options, dtype):
    inputs = Inputs(dtype)
    graph, outputs = capture(lambda: inputs.step(impl, OPTIONS[options]))
    for ignored in SHARES_IGNORED:
        inputs.fill(ignored)
        expected = [x.clone() for x in inputs.step(impl, OPTIONS[options])]
        # What a replay reads or writes outside its own pool lies under this by now.
        scribbled = [torch.full((2**size,), torch.nan, device="cuda") for size in range(8, 26)]
        graph.replay()
        for actual, wanted in zip(outputs, expected, strict=True):
            assert torch.equal(actual, wanted), f"{ignored} ignored"
        assert all(x.isnan().all() for x in scribbled), "a replay wrote to memory of others"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_replay_with_a_frozen_head(dtype):
    """For which cce_exact has kernels of its own; rows that overflow are done again, and nothing waits for the card."""
    inputs, options = Inputs(dtype), {"reduction": "none", "return_lse": True, "softcap": 200.0}
    for frozen in (inputs.weight, inputs.bias):
        frozen.requires_grad_(False)
    graph, outputs = capture(lambda: inputs.step("cce_exact", options))
    for ignored, scale in ((0.0, 1), (0.9, 1), (0.3, 60), (1.0, 1)):
        inputs.fill(ignored)
        with torch.no_grad():
            inputs.hidden.mul_(scale)
        torch.cuda.set_sync_debug_mode("error")
        try:
            expected = [x.clone() for x in inputs.step("cce_exact", options)]
        finally:
            torch.cuda.set_sync_debug_mode("default")
        graph.replay()
        for actual, wanted in zip(outputs, expected, strict=True):
            assert torch.equal(actual, wanted), f"{ignored} ignored"


@pytest.mark.parametrize("trained", [True, False], ids=["trained", "frozen"])
def test_replay_of_a_divergence(trained):
    """From a teacher that is the student rolled by a token, another one in each replay."""
    inputs = Inputs(torch.bfloat16)
    for head in (inputs.weight, inputs.bias):
        head.requires_grad_(trained)
    settings = {"ignore_index": -100, "workspace_mib": 4, "impl": "cce_exact", "normalize": True}

    def step():
        student, teacher = (
            operands.Head(name, hidden, inputs.weight, inputs.bias)
            for name, hidden in (("student", inputs.hidden), ("teacher", inputs.hidden.detach().roll(1, 0)))
        )
        loss = divergence(student, teacher, inputs.targets, operands.Shares(0.3, 0.7), **settings)
        wanted = [x for x in (inputs.hidden, inputs.weight, inputs.bias) if x.requires_grad]
        return [loss, *torch.autograd.grad(loss, wanted)]

    graph, outputs = capture(step)
    for ignored in SHARES_IGNORED:
        inputs.fill(ignored)
        expected = [x.clone() for x in step()]
        graph.replay()
        for actual, wanted in zip(outputs, expected, strict=True):
            assert torch.equal(actual, wanted), f"{ignored} ignored"


@pytest.mark.parametrize("impl", ["cce", "cce_exact"])
def test_target_out_of_range_in_a_replay_is_nan(impl):
    inputs = Inputs(torch.bfloat16)
    graph, (loss, *_) = capture(lambda: inputs.step(impl, {"reduction": "none"}))
    inputs.targets[7] = VOCABULARY
    graph.replay()
    assert loss.isnan().nonzero().flatten().tolist() == [7]


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("impl", ["cce", "cce_exact"])
def test_nothing_waits_for_the_card(impl, options):
    """No host synchronisation in forward and backward: torch raises for one."""
    inputs = Inputs(torch.bfloat16)
    inputs.step(impl, OPTIONS[options])
    torch.cuda.synchronize()
    try:
        torch.cuda.set_sync_debug_mode("error")
        outputs = inputs.step(impl, OPTIONS[options])
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert all(x.isfinite().all() for x in outputs)


def test_the_check_for_waiting_sees_one():
    """`chunked` counts the tokens in use on the host: it cannot be captured, and the docs say so."""
    inputs = Inputs(torch.bfloat16)
    try:
        torch.cuda.set_sync_debug_mode("error")
        with pytest.raises(RuntimeError, match="synchroniz"):
            inputs.step("chunked", {})
    finally:
        torch.cuda.set_sync_debug_mode("default")


class Head(nn.Module):
    """A layer and a projection, whose forward is the loss."""

    def __init__(self, impl: str):
        super().__init__()
        self.impl = impl
        self.layer = nn.Linear(WIDTH, WIDTH)
        self.output = nn.Linear(WIDTH, VOCABULARY, bias=False)

    def forward(self, hidden: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return linear_cross_entropy(torch.tanh(self.layer(hidden)), self.output.weight, targets, impl=self.impl)


@pytest.mark.parametrize("impl", ["cce", "cce_exact"])
def test_graphed_callable_trains_alike(impl):
    plain = Head(impl).to("cuda", torch.bfloat16)
    graphed = copy.deepcopy(plain)
    inputs = Inputs(torch.bfloat16)
    sample = (inputs.hidden.detach().clone().requires_grad_(), inputs.targets.clone())
    called = torch.cuda.make_graphed_callables(graphed, sample)
    optimizers = [torch.optim.SGD(head.parameters(), lr=0.1) for head in (plain, graphed)]
    for ignored in SHARES_IGNORED:
        inputs.fill(ignored)
        losses = []
        for call, optimizer in zip((plain, called), optimizers, strict=True):
            optimizer.zero_grad(set_to_none=True)
            loss = call(inputs.hidden, inputs.targets)
            loss.backward()
            optimizer.step()
            losses.append(loss.detach().clone())
            inputs.hidden.grad = None
        assert torch.equal(*losses), f"{ignored} ignored"
    for ours, wanted in zip(graphed.parameters(), plain.parameters(), strict=True):
        assert torch.equal(ours, wanted)


@pytest.mark.parametrize("impl", ["cce", "cce_exact"])
def test_compiled_into_graphs(impl):
    """torch.compile's own CUDA graphs, which take the operators in as they are."""
    torch._dynamo.reset()
    inputs = Inputs(torch.bfloat16)
    # Of a mean the compiler divides in its own order: a rounding of the upstream gradient, which a sum has not.
    call = partial(linear_cross_entropy, impl=impl, reduction="sum")
    compiled = torch.compile(lambda *x: call(*x) * 2, mode="reduce-overhead", fullgraph=True)
    for ignored in (0.2, *SHARES_IGNORED):
        inputs.fill(ignored)
        torch.compiler.cudagraph_mark_step_begin()
        loss = compiled(inputs.hidden, inputs.weight, inputs.targets)
        gradients = [x.clone() for x in torch.autograd.grad(loss, (inputs.hidden, inputs.weight))]
        expected = call(inputs.hidden, inputs.weight, inputs.targets) * 2
        wanted = torch.autograd.grad(expected, (inputs.hidden, inputs.weight))
        for actual, exact in zip(gradients, wanted, strict=True):
            assert torch.equal(actual, exact)
