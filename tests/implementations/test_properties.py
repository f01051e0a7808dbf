"""Whatever a call is made of, its numbers are right or there is a sign: cases drawn by Hypothesis, bounded for CI."""

from unittest import mock

import pytest
import torch
from fused_steps import steps_as
from grid import needs_triton
from hypothesis import given
from hypothesis import strategies as st
from property_cases import INPUTS, Call, bounded, calls
from tally import tried
from tolerance import allowances, assert_as_accurate_as_torch, plain_torch

from torchtune_lce import linear_cross_entropy
from torchtune_lce.implementations import fused, walk
from torchtune_lce.implementations.choice import CCE_PRESETS
from torchtune_lce.inputs.options import AUTO_TRAINED

EACH_IN_TORCH = [torch.float32, torch.float16, torch.bfloat16, torch.float64]
IN_TORCH = pytest.mark.parametrize("impl", ["chunked", "torch_compile", "reference"])


def in_triton(test):
    """With cce alone of its presets, which share its code: in the interpreter a case takes as long as a hundred others.

    A test a dtype, so that workers share them: on a card nearly every case compiles kernels of its own.
    """
    dtypes = [torch.float32, torch.float16, pytest.param(torch.bfloat16, marks=pytest.mark.gpu)]
    return needs_triton(pytest.mark.parametrize("dtype", dtypes, ids=str)(test))


def results(call: Call, return_lse: bool = True, **changed) -> dict[str, torch.Tensor]:
    """Loss, log-sum-exp and every gradient, in strips of ``call.chunk`` entries, or whole rows of as many tokens, where
    `chunked` runs; where `torch_compile` does, in such rows and strips of its products, without its compiler."""
    tensors = {name: x if x is None else x.detach().requires_grad_(x.requires_grad) for name, x in call.tensors.items()}
    tensors |= changed
    strips = mock.patch.object(walk, "entries_per_strip", lambda tokens, sizes, **_: min(sizes.vocabulary, call.chunk))
    division = fused.Division(call.chunk, call.chunk, wide_sums=call.chunk % 2 == 0)
    divided = mock.patch.object(fused, "divide", return_value=division)
    whole_rows = mock.patch.object(walk, "tokens_with_whole_rows", return_value=call.chunk)
    with strips, whole_rows, divided, steps_as():
        made = linear_cross_entropy(
            **tensors, **vars(call.settings), impl=call.impl, filter_eps=call.filter_eps, return_lse=return_lse
        )
        made = dict(zip(("loss", "lse"), made, strict=True)) if return_lse else {"loss": made}
        pulled = [(made[name], x.to(made[name].dtype)) for name, x in vars(call.upstream).items() if x is not None]
        pulled = [(result, upstream) for result, upstream in pulled if result.requires_grad]
        if pulled:
            torch.autograd.backward(*map(list, zip(*pulled, strict=True)))
    for name in INPUTS:
        if tensors[name] is not None and tensors[name].requires_grad:
            made[name] = tensors[name].grad
    return {name: result.detach() for name, result in made.items()}


def bounds(call: Call, exact) -> dict[str, torch.Tensor]:
    preset = CCE_PRESETS.get(call.impl)
    eps = torch.finfo(call.dtype).eps / AUTO_TRAINED if call.filter_eps == "auto" else call.filter_eps
    filtered = tuple(name for name in ("hidden", "weight") if preset and getattr(preset, name))
    # The kernels keep their logits in float32; F.linear and torch.mm round them.
    logits_dtype = torch.promote_types(call.dtype, torch.float32) if preset else call.dtype
    return allowances(
        exact,
        call.tensors["weight"],
        call.tensors["bias"],
        call.settings,
        call.dtype,
        logits_dtype,
        eps if preset else None,
        filtered,
    )


def check_numbers(data, impl, dtypes, device):
    """Loss, log-sum-exp and gradients, against plain PyTorch in float64; and no argument is written to."""
    call = data.draw(calls(impl, dtypes, device))
    tried[f"{impl}: loss, log-sum-exp and gradients against float64"] += 1
    before = {name: x.detach().clone() for name, x in call.tensors.items() if x is not None}
    actual = results(call, return_lse=call.upstream.lse is not None)
    reference = {"settings": call.settings, "upstream": call.upstream}
    exact, native = (plain_torch(**call.tensors, **reference, dtype=dtype) for dtype in (torch.float64, call.dtype))
    allowed = bounds(call, exact)
    for name, result in actual.items():
        assert_as_accurate_as_torch(name, result, native.results[name], exact.results[name], allowed[name])
    for name, value in before.items():
        assert torch.equal(value, call.tensors[name]), f"{name} was written to"


@IN_TORCH
@given(data=st.data())
@bounded(120)
def test_numbers(data, impl, device):
    check_numbers(data, impl, EACH_IN_TORCH, device)


@in_triton
@given(data=st.data())
@bounded(9)
def test_numbers_of_kernels(data, dtype, device):
    check_numbers(data, "cce", [dtype], device)


@IN_TORCH
@given(data=st.data())
@bounded(30)
def test_targets_outside(data, impl, device):
    """One or more anywhere that a hidden state predicts: an error that says so, and nothing computed."""
    call = data.draw(calls(impl, EACH_IN_TORCH, device))
    vocabulary, shift = call.tensors["weight"].shape[0], call.settings.shift
    near = st.integers(vocabulary, vocabulary + 1) | st.integers(-2, -1)
    outside = data.draw(near | st.integers(-(2**31), 2**31 - 1))
    targets = call.tensors["targets"].clone()
    predicted = targets[..., shift:] if shift else targets
    if not predicted.numel() or 0 <= outside < vocabulary or outside == call.settings.ignore_index:
        return
    tried[f"{impl}: targets outside the vocabulary"] += 1
    places = torch.randperm(predicted.numel(), device=device)[: data.draw(st.integers(1, 3))]
    predicted.copy_(predicted.flatten().index_fill(0, places, outside).view(predicted.shape))
    if targets.device.type == "cpu":
        with pytest.raises(ValueError, match=rf"^targets must be .* got {len(places)} outside, the first {outside}"):
            results(call, targets=targets)
    else:
        assert results(call, targets=targets)["loss"].isnan().any()


def check_not_finite(data, impl, dtypes, device):
    """A loss is finite where float64 says so and only there; a token that is not spoils no other's, not by a bit."""
    call = data.draw(calls(impl, dtypes, device))
    name = data.draw(st.sampled_from([name for name in INPUTS if call.tensors[name] is not None]))
    value = data.draw(st.sampled_from((torch.nan, torch.inf, -torch.inf)))
    # A copy, since a matrix product's bits may depend on where in memory its operands begin.
    clean = call.tensors[name].detach().clone(memory_format=torch.contiguous_format)
    if not clean.numel():
        return
    tried[f"{impl}: NaN and infinities in the inputs"] += 1
    spoilt = clean.clone()
    spoilt.view(-1)[data.draw(st.integers(0, clean.numel() - 1))] = value
    actual = results(call, **{name: spoilt.requires_grad_(call.tensors[name].requires_grad)})
    exact, exact_clean = (
        plain_torch(
            **(call.tensors | {name: x}), settings=call.settings, upstream=call.upstream, dtype=torch.float64
        ).results
        for x in (spoilt, clean)
    )
    for result in ("loss", "lse"):
        assert torch.equal(actual[result].isfinite(), exact[result].isfinite()), result
    if name == "hidden":
        others = exact["lse"] == exact_clean["lse"]
        assert torch.equal(actual["lse"][others], results(call, **{name: clean})["lse"][others])


@IN_TORCH
@given(data=st.data())
@bounded(60)
def test_not_finite(data, impl, device):
    check_not_finite(data, impl, EACH_IN_TORCH, device)


@in_triton
@given(data=st.data())
@bounded(5)
def test_not_finite_in_kernels(data, dtype, device):
    check_not_finite(data, "cce", [dtype], device)
