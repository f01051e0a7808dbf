"""Every implementation against plain PyTorch in float64: losses, log-sum-exps and all gradients."""

import importlib.util
import itertools
import math
from dataclasses import dataclass, replace
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from common_logits import COMMON, inputs_with_a_common_logit
from fused_steps import steps_as
from grid import each, marks_of, needs_triton, one
from tolerance import Plain, Settings, Upstream, allowances, assert_as_accurate_as_torch, plain_torch

from torchtune_lce import linear_cross_entropy
from torchtune_lce.implementations import chunked, fused, walk
from torchtune_lce.implementations.choice import CCE_PRESETS
from torchtune_lce.inputs.options import AUTO_TRAINED

F64 = torch.float64
INPUTS = ("hidden", "weight", "bias")


@dataclass(frozen=True)
class Case:
    """One call: where it leaves the plainest one (a matrix of hidden states, a fifth of the labels ignored)."""

    tokens: tuple[int, ...] = (71,)
    vocabulary: int = 301
    width: int = 40
    settings: Settings = Settings()
    bias: bool = False
    ignored: float = 0.2  # share of the labels
    pulled: tuple[str, ...] = ("loss",)  # results that a gradient arrives at; lse among them: return_lse=True
    frozen: tuple[str, ...] = ()
    layout: str = "contiguous"
    target_dtype: torch.dtype = torch.int64
    deviation: float = 2.0  # standard, of the logits
    confident: float = 0.0  # share of the tokens whose softmax is nearly one entry: the target,
    mistaken: bool = False  # or another one
    filter_eps: float | str | None = "auto"
    first_entries: int | None = None  # targets, or what takes their place, are among these alone


BOTH = ("loss", "lse")

# Not a product of the options: they meet in few places of the code. A case moves one option from the plainest call, or
# two where they touch each other (bias and softcap act on the same logit; shift and reduction "none" on the same
# places; ignored labels on the count of "mean"). Sizes are ragged against the kernels' tiles (powers of two) and
# against the 64 entries that `chunked` is made to take here; N, V and D each cross a tile in "tiles" and are one below,
# at and one above a power of two in the cases named for it. 71 x 301 x 40 keeps a call in Triton's interpreter short.
CASES = {
    "mean": Case(),
    "sum": Case(settings=Settings(reduction="sum")),
    "none": Case(settings=Settings(reduction="none")),
    "bias": Case(bias=True),
    "softcap": Case(settings=Settings(softcap=3.0), deviation=4.0),
    "bias-softcap-none": Case(settings=Settings(softcap=5.0, reduction="none"), bias=True, pulled=BOTH),
    "saturated-softcap": Case(settings=Settings(softcap=0.5), deviation=20.0, bias=True),
    "scale": Case(settings=Settings(logit_scale=0.37), deviation=6.0),
    "scale-bias-softcap-none": Case(
        settings=Settings(logit_scale=2.7, softcap=5.0, reduction="none"), bias=True, pulled=BOTH
    ),
    "shift-1": Case(tokens=(3, 23), settings=Settings(shift=1)),
    "shift-1-none-lse": Case(tokens=(3, 23), settings=Settings(shift=1, reduction="none"), pulled=BOTH),
    "shift-3-sum": Case(tokens=(2, 3, 11), settings=Settings(shift=3, reduction="sum")),
    "shift-all": Case(tokens=(3, 7), settings=Settings(shift=7, reduction="none"), pulled=BOTH),
    "shift-more": Case(tokens=(3, 7), settings=Settings(shift=40)),
    "none-ignored": Case(ignored=0.0),
    "all-ignored": Case(ignored=1.0, pulled=BOTH),
    "all-ignored-none": Case(ignored=1.0, settings=Settings(reduction="none"), bias=True),
    "ignore-0": Case(settings=Settings(ignore_index=0)),
    "ignore-minus-1": Case(settings=Settings(ignore_index=-1, reduction="none")),
    "ignore-last": Case(settings=Settings(ignore_index=300)),
    "ignore-beyond": Case(settings=Settings(ignore_index=301)),
    "lse": Case(pulled=BOTH),
    "lse-only": Case(pulled=("lse",), settings=Settings(reduction="none")),
    "lse-confident": Case(pulled=BOTH, confident=0.7, settings=Settings(reduction="sum")),
    # A sum: divided by their number, the gradients of float16 would be subnormal.
    "confident": Case(confident=0.7, settings=Settings(reduction="sum")),
    "large-logits": Case(deviation=3000.0),
    "rank-1": Case(tokens=(), ignored=0.0, pulled=BOTH),
    "rank-1-ignored": Case(tokens=(), ignored=1.0),
    "rank-3": Case(tokens=(5, 13), settings=Settings(reduction="none")),
    "rank-4": Case(tokens=(2, 3, 11), bias=True, pulled=BOTH),
    "transposed": Case(tokens=(5, 13), layout="transposed", settings=Settings(reduction="none"), pulled=BOTH),
    "strided": Case(tokens=(5, 13), layout="strided", bias=True, settings=Settings(shift=1)),
    "int32": Case(target_dtype=torch.int32),
    "int32-shift": Case(tokens=(3, 23), target_dtype=torch.int32, settings=Settings(shift=2, reduction="none")),
    "no-tokens": Case(tokens=(0,), bias=True, pulled=BOTH),
    "no-tokens-none": Case(tokens=(2, 0), settings=Settings(reduction="none")),
    "tiles": Case(tokens=(131,), vocabulary=259, width=133, bias=True, pulled=BOTH),
    "tiles-minus-1": Case(tokens=(127,), vocabulary=127, width=31),
    "tiles-exact": Case(tokens=(128,), vocabulary=128, width=32, ignored=0.0),
    "tiles-plus-1": Case(tokens=(129,), vocabulary=129, width=33),
    "one-entry": Case(vocabulary=1, ignored=0.0, pulled=BOTH),
    "two-entries": Case(vocabulary=2, tokens=(5,)),
    "one-wide": Case(width=1, bias=True),
    "one-of-all": Case(tokens=(1,), vocabulary=1, width=1, ignored=0.0, pulled=BOTH),
    "frozen-hidden": Case(frozen=("hidden",), bias=True),
    "frozen-weight": Case(frozen=("weight",), bias=True, pulled=BOTH),
    "frozen-head-scale": Case(
        frozen=("weight", "bias"), settings=Settings(logit_scale=2.7, softcap=5.0), bias=True, pulled=BOTH
    ),
    "frozen-bias": Case(frozen=("bias",), bias=True),
    "bias-alone": Case(frozen=("hidden", "weight"), bias=True, settings=Settings(softcap=4.0)),
    "all-frozen": Case(frozen=INPUTS, bias=True),
    "all-frozen-ignored": Case(frozen=("weight",), ignored=1.0),
    "keep-all": Case(filter_eps=None, deviation=4.0),
}
# Rounding shows where it meets a sum, a cancellation (p - 1) or a nonlinearity; places and shapes are the same code.
LOW_PRECISION = (
    "mean",
    "sum",
    "bias-softcap-none",
    "softcap",
    "shift-1-none-lse",
    "scale-bias-softcap-none",
    "lse-confident",
    "confident",
    "all-ignored",
    "tiles",
    "one-wide",
    "frozen-hidden",
    "frozen-weight",
)
# Of cce_exact with a frozen head, which has kernels of its own: places and reductions, upstream gradients, ragged
# sizes, softcap and bias, layouts.
FROZEN_HEAD = (
    "mean",
    "bias-softcap-none",
    "saturated-softcap",
    "scale-bias-softcap-none",
    "shift-1-none-lse",
    "all-ignored",
    "all-ignored-none",
    "lse-only",
    "lse-confident",
    "large-logits",
    "rank-1",
    "strided",
    "int32-shift",
    "no-tokens",
    "tiles",
    "one-of-all",
)
FROZEN_HEAD_IN_16_BITS = ("sum", "scale-bias-softcap-none", "lse-confident", "tiles", "one-wide")
# Compiling is what takes the time: the differences in code that the compiler sees.
COMPILED = ("mean", "bias-softcap-none", "no-tokens")
# A tile goes if no entry in it reaches the threshold and no target lies in it: what is probable keeps to the first
# tile, and in "filter-mistaken" the targets are what keeps others.
FILTER = Case(tokens=(140,), vocabulary=501, filter_eps=0.02, deviation=1.0, confident=0.9, first_entries=97)
FILTERING = {
    "filter": replace(FILTER, pulled=BOTH),
    "filter-softcap": replace(FILTER, bias=True, settings=Settings(softcap=60.0)),
    "filter-scale": replace(FILTER, deviation=2.0, settings=Settings(logit_scale=0.5)),
    "filter-mistaken": replace(FILTER, mistaken=True, settings=Settings(reduction="none")),
}
# On a card: many row blocks and strips, a width of several steps.
LARGE = Case(
    tokens=(3, 1021),
    vocabulary=50_021,
    width=520,
    settings=Settings(shift=1, softcap=30.0),
    bias=True,
    pulled=BOTH,
    confident=0.9,
)


@pytest.fixture(autouse=True)
def _sparse(monkeypatch):
    """Inputs this small keep most of their tiles; cce would then compute all of them, as cce_exact does."""
    if importlib.util.find_spec("triton"):
        monkeypatch.setattr("torchtune_lce.kernels.plan.DENSE_FRACTION", 1.0)


# For what does not depend on the options: cce alone for its presets, which share its code.
EACH = each("reference", "chunked", "torch_compile", "cce")
# With what is trained: a frozen head has cce_exact take another way.
TRAINED = [pytest.param(*impl.values, INPUTS, marks=impl.marks, id=impl.id) for impl in EACH]
FROZEN = pytest.param("cce_exact", ("hidden",), marks=marks_of("cce_exact"), id="cce_exact-frozen-head")


def _calls():
    """(implementation, case, dtype) as parameters, with an id that tells them apart."""
    fp32, fp16, bf16, fp64 = torch.float32, torch.float16, torch.bfloat16, torch.float64
    for name, case in CASES.items():
        for impl in ("reference", "chunked"):
            yield _call(impl, name, case, fp32)
            if name in LOW_PRECISION:
                for dtype in (fp16, bf16, fp64):
                    yield _call(impl, name, case, dtype)
        yield _call("cce", name, case, fp32)
        if name in LOW_PRECISION:
            yield _call("cce", name, case, fp16)
            # Triton's interpreter multiplies bfloat16 wrongly.
            yield _call("cce", name, case, bf16, pytest.mark.gpu)
        if name in COMPILED:
            yield _call("torch_compile", name, case, fp32)
    # Hundreds of pieces: sums over them must not be rounded to the inputs' dtype on the way.
    many = Case(tokens=(40,), vocabulary=20_011, width=24, bias=True)
    for dtype in (fp32, fp16, bf16):
        yield _call("chunked", "many-pieces", many, dtype)
    yield _call("torch_compile", "mean", CASES["mean"], bf16)
    yield _call("torch_compile", "frozen-head", replace(CASES["bias-softcap-none"], frozen=("weight", "bias")), fp32)
    for name, case in FILTERING.items():
        yield _call("cce", name, case, fp16)
        yield _call("cce", name, case, bf16, pytest.mark.gpu)
    for impl in ("chunked", "torch_compile", *CCE_PRESETS):
        for dtype in (fp32, fp16, bf16):
            yield _call(impl, "large", replace(LARGE, confident=0.0), dtype, pytest.mark.gpu)
            yield _call(impl, "large-confident", LARGE, dtype, pytest.mark.gpu)


def _call(impl: str, name: str, case: Case, dtype: torch.dtype, *marks):
    return pytest.param(
        impl, case, dtype, id=f"{impl}-{name}-{str(dtype).removeprefix('torch.')}", marks=[*marks_of(impl), *marks]
    )


@pytest.fixture(autouse=True)
def _small_pieces(monkeypatch):
    """`chunked` takes 64 entries at a time, or whole rows of 16 tokens, and `torch_compile` these with products of 64
    entries: their budget holds all of so few logits."""
    monkeypatch.setattr(walk, "tokens_with_whole_rows", lambda tokens, sizes: 16)
    monkeypatch.setattr(walk, "entries_per_strip", lambda tokens, sizes, **_: min(sizes.vocabulary, 64))
    monkeypatch.setattr(fused, "divide", lambda *_, **__: fused.Division(16, 64, wide_sums=False))


@pytest.mark.parametrize("frozen", [(), ("weight", "bias")], ids=["trained", "frozen"])
def test_a_product_with_the_whole_weight_is_rounded_once(frozen, monkeypatch):
    """By `torch_compile`, as on a card, whose factors of 16 bits are not widened; however narrow the strips are that
    the weight's gradient is added up in."""
    monkeypatch.setattr(walk, "_WIDENING", ())
    monkeypatch.setattr(fused, "divide", lambda *_, **__: fused.Division(16, 64, wide_sums=True))
    case, device = Case(tokens=(40,), vocabulary=5_011, width=24, frozen=frozen), torch.device("cpu")
    with steps_as():
        test_agrees_with_float64("torch_compile", case, torch.bfloat16, device)


@pytest.mark.parametrize(("impl", "case", "dtype"), list(_calls()))
def test_agrees_with_float64(impl, case, dtype, device):
    tensors = make_inputs(case, dtype, device)
    upstream = make_upstream(case, device)
    before = {name: tensor.detach().clone() for name, tensor in tensors.items() if tensor is not None}

    actual = run(impl, case, tensors, upstream)

    exact, native = (plain_torch(**tensors, settings=case.settings, upstream=upstream, dtype=d) for d in (F64, dtype))
    if case.confident:
        assert highest_probability(exact, case).gt(0.999).sum() > 0.5 * case.confident * len(exact.labels)
    compare(actual, native, exact, allowed(impl, case, dtype, exact, tensors))

    ignored = tensors["targets"] == case.settings.ignore_index
    if case.settings.reduction == "none":
        assert not actual["loss"][ignored].any()
    if "lse" in actual:
        assert not actual["lse"][ignored].any()
    if "hidden" in actual and not case.settings.shift:
        assert not actual["hidden"][ignored].any(), "ignored tokens have gradients"
    for name, tensor in before.items():
        assert torch.equal(tensor, tensors[name]), f"{name} was written to"


def _uncompiled_calls():
    for name, case in CASES.items():
        low_precision = (torch.float16, torch.bfloat16, F64) if name in LOW_PRECISION else ()
        for dtype in (torch.float32, *low_precision):
            yield _call("torch_compile", name, case, dtype)
    for name in FROZEN_HEAD:
        low_precision = (torch.float16, torch.bfloat16) if name in FROZEN_HEAD_IN_16_BITS else ()
        for dtype in (torch.float32, *low_precision):
            yield _call("torch_compile", f"frozen-head-{name}", replace(CASES[name], frozen=("weight", "bias")), dtype)


@pytest.mark.parametrize(("impl", "case", "dtype"), list(_uncompiled_calls()))
def test_steps_agree_with_float64(impl, case, dtype, device):
    """All that is not the compiler's."""
    with steps_as():
        test_agrees_with_float64(impl, case, dtype, device)


@pytest.mark.parametrize("frozen", [(), ("weight", "bias")], ids=["trained", "frozen"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("impl", ["chunked", "torch_compile"])
def test_without_widening(impl, dtype, frozen, device, monkeypatch):
    """As on ROCm, where products of 16 bits are rounded to them and widened ones would be slow; `torch_compile` on any
    card."""
    monkeypatch.setattr(walk, "_WIDENING", ())
    # Of a strip's 64.
    monkeypatch.setattr(walk.Sizes, "logits_at_once", lambda *_: 24)
    for pulled in (BOTH, ("loss",)):
        with steps_as():
            test_agrees_with_float64(impl, replace(CASES["tiles"], frozen=frozen, pulled=pulled), dtype, device)


def _frozen_head_calls():
    for names, dtype, marks in (
        (FROZEN_HEAD, torch.float32, ()),
        (FROZEN_HEAD_IN_16_BITS, torch.float16, ()),
        # Triton's interpreter multiplies bfloat16 wrongly.
        (FROZEN_HEAD_IN_16_BITS, torch.bfloat16, (pytest.mark.gpu,)),
    ):
        for name in names:
            yield _call("cce_exact", name, replace(CASES[name], frozen=("weight", "bias")), dtype, *marks)


@pytest.mark.parametrize(("impl", "case", "dtype"), list(_frozen_head_calls()))
def test_frozen_head_agrees_with_float64(impl, case, dtype, device, monkeypatch):
    """In pieces of two row blocks and strips of two tiles, whatever the workspace holds."""
    from torchtune_lce.kernels import division, strips

    divided = []

    def divide(*arguments):
        divided.append(division.Division(2 * arguments[-1].row_block, 2))
        return divided[-1]

    monkeypatch.setattr(strips, "divide", divide)
    tensors, upstream = make_inputs(case, dtype, device), make_upstream(case, device)
    actual = run(impl, case, tensors, upstream)
    exact, native = (plain_torch(**tensors, settings=case.settings, upstream=upstream, dtype=d) for d in (F64, dtype))
    compare(actual, native, exact, allowed(impl, case, dtype, exact, tensors))
    assert bool(divided) == (tensors["targets"].numel() > 0)
    if not case.settings.shift:
        ignored = tensors["targets"] == case.settings.ignore_index
        assert not actual["hidden"][ignored].any(), "ignored tokens have gradients"


@needs_triton
@pytest.mark.parametrize("impl", CCE_PRESETS)
def test_preset_filters_the_gradients_that_it_names(impl, device):
    """What it filters is off by more than rounding, which the other gradient is not; None filters neither."""
    case = FILTERING["filter"]
    tensors, upstream = make_inputs(case, torch.float32, device), make_upstream(case, device)
    exact, native = (
        plain_torch(**tensors, settings=case.settings, upstream=upstream, dtype=d) for d in (F64, torch.float32)
    )
    rounding_alone = allowed("cce_exact", case, torch.float32, exact, tensors)
    actual = run(impl, case, tensors, upstream)
    compare(actual, native, exact, allowed(impl, case, torch.float32, exact, tensors))
    for name in ("hidden", "weight"):
        accurate = (actual[name], native.results[name], exact.results[name], rounding_alone[name])
        if getattr(CCE_PRESETS[impl], name):
            with pytest.raises(AssertionError, match="further from float64 than allowed"):
                assert_as_accurate_as_torch(name, *accurate)
        else:
            assert_as_accurate_as_torch(name, *accurate)
    if impl == "cce":
        compare(run(impl, replace(case, filter_eps=None), tensors, upstream), native, exact, rounding_alone)


@needs_triton
@pytest.mark.parametrize("softcap", [1e5, 1e10])
def test_a_softcap_far_above_the_logits_changes_nothing(softcap, device):
    """tanh of a small number must not come from the difference of two near 1."""
    hidden, weight = torch.randn(5, 64, device=device, requires_grad=True), torch.randn(11, 64, device=device) / 4
    targets = torch.arange(5, device=device)
    capped, plain = (linear_cross_entropy(hidden, weight, targets, softcap=cap, impl="cce") for cap in (softcap, None))
    torch.testing.assert_close(capped, plain, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(
        *(torch.autograd.grad(loss, hidden)[0] for loss in (capped, plain)), rtol=1e-5, atol=1e-7
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("impl", EACH)
def test_second_backward_gives_the_same(impl, dtype, device):
    """With retain_graph; what the forward keeps must survive the first backward."""
    case = replace(CASES["bias-softcap-none"], layout="transposed", tokens=(5, 13))
    tensors, upstream = make_inputs(case, dtype, device), make_upstream(case, device)
    results = call(impl, case, tensors)
    backward(results, upstream, retain_graph=True)
    first = {name: tensors[name].grad for name in INPUTS}
    for name in INPUTS:
        tensors[name].grad = None
    backward(results, upstream)
    for name in INPUTS:
        assert torch.equal(tensors[name].grad, first[name]), name


@pytest.mark.parametrize("case", ["bias-softcap-none", pytest.param("large", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("impl", EACH)
def test_repeats_bit_by_bit(impl, case, device):
    """Whatever ran in between."""
    case, other = LARGE if case == "large" else CASES[case], CASES["mean"]
    upstreams = [make_upstream(c, device) for c in (case, other)]
    tensors = [make_inputs(c, torch.float32, device) for c in (case, other)]
    alone = run(impl, case, tensors[0], upstreams[0])
    tensors[0].update({name: tensors[0][name].detach().requires_grad_() for name in INPUTS})
    results = [call(impl, c, t) for c, t in zip((case, other), tensors, strict=True)]
    for result, upstream in zip(results, upstreams, strict=True):
        backward(result, upstream)
    for name, value in alone.items():
        again = results[0][name] if name in results[0] else tensors[0][name].grad
        assert torch.equal(again, value), name


@pytest.mark.parametrize("impl", EACH)
def test_gradients_reach_what_the_inputs_were_made_from(impl, device):
    """hidden and weight are results of other operations, and weight has a second use, as a tied embedding has."""
    weight, targets = torch.randn(301, 40, device=device), torch.randint(0, 301, (71,), device=device)
    gradients = []
    for loss in (
        lambda h, w: linear_cross_entropy(h, w, targets, impl=impl),
        lambda h, w: F.cross_entropy(h @ w.T, targets),
    ):
        leaf = weight.clone().requires_grad_()
        loss(torch.tanh(leaf[targets]) * 2, leaf * 1.5).backward()
        gradients.append(leaf.grad)
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("impl", EACH)
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_without_gradients(impl, mode, device):
    case = CASES["lse"]
    tensors = make_inputs(case, torch.float32, device)
    expected = call(impl, case, tensors)
    with mode():
        results = call(impl, case, tensors)
    for name, result in results.items():
        assert not result.requires_grad
        torch.testing.assert_close(result, expected[name].detach())


@pytest.mark.parametrize("impl", EACH)
def test_autocast_takes_mixed_dtypes(impl, device):
    """As F.linear does: the product in the autocast dtype, losses in float32, gradients in each input's own dtype."""
    case, low = Case(bias=True, settings=Settings(reduction="sum")), torch.float16
    tensors, upstream = make_inputs(case, low, device), make_upstream(case, device)
    exact, native = (plain_torch(**tensors, settings=case.settings, upstream=upstream, dtype=d) for d in (F64, low))
    # Values that the autocast dtype holds, so that its own cast rounds nothing.
    mixed = tensors | {name: tensors[name].detach().float().requires_grad_() for name in ("weight", "bias")}
    with torch.autocast(device.type, low):
        actual = call(impl, case, mixed)
    backward(actual, upstream)
    assert actual["loss"].dtype == torch.float32
    for name in INPUTS:
        assert mixed[name].grad.dtype == mixed[name].dtype
        actual[name] = mixed[name].grad
    compare({k: v.detach() for k, v in actual.items()}, native, exact, allowed(impl, case, low, exact, tensors))


def test_autocast_leaves_float64(device):
    hidden, weight = (torch.randn(n, 40, device=device, dtype=F64) for n in (5, 301))
    with torch.autocast(device.type, torch.bfloat16):
        assert linear_cross_entropy(hidden, weight, torch.arange(5, device=device), impl="chunked").dtype == F64


@pytest.mark.parametrize("value", [torch.nan, -torch.inf])
@pytest.mark.parametrize("impl", EACH)
def test_not_a_number_is_not_swallowed(impl, value, device):
    """In one token it spoils that token's loss and gradient and no other's; in one row of weight, every token's."""
    case = Case(settings=Settings(reduction="none"), ignored=0.0)
    tensors, upstream = make_inputs(case, torch.float32, device), make_upstream(case, device)
    clean = run(impl, case, tensors, upstream)
    others = torch.arange(71, device=device) != 17
    spoilt = dict(tensors, hidden=tensors["hidden"].detach().clone())
    spoilt["hidden"][17, 3] = value
    spoilt["hidden"].requires_grad_()
    dirty = run(impl, case, spoilt, upstream)
    assert not dirty["loss"][17].isfinite()
    assert torch.equal(dirty["loss"][others], clean["loss"][others])
    assert dirty["hidden"][17].isnan().any()
    assert torch.equal(dirty["hidden"][others], clean["hidden"][others])
    assert dirty["weight"].isnan().any()

    spoilt = dict(tensors, weight=tensors["weight"].detach().clone())
    # Of one column alone: its products with hidden are infinite with both signs, or NaN.
    spoilt["weight"][300, 3] = value
    spoilt["weight"].requires_grad_()
    dirty = run(impl, replace(case, settings=Settings()), spoilt, Upstream(torch.ones((), device=device), None))
    assert not dirty["loss"].isfinite()
    assert dirty["hidden"].isnan().any()


@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.float16, pytest.param(torch.bfloat16, marks=pytest.mark.gpu)], ids=str
)
@pytest.mark.parametrize("least", [False, True], ids=["-inf", "finfo.min"])
@pytest.mark.parametrize("impl", [*EACH, one("cce_exact")])
def test_a_bias_removes_entries(impl, least, dtype, device):
    """Whole tiles and pieces of them, the first ones: a running maximum starts at minus infinity too.

    Vocabularies are padded so with the least finite number as well: times log2(e) it would be minus infinity.
    """
    removed = 256
    case = Case(vocabulary=45, bias=True, pulled=BOTH, settings=Settings(reduction="none"))
    rest, upstream = make_inputs(case, dtype, device), make_upstream(case, device)
    exact, native = (plain_torch(**rest, settings=case.settings, upstream=upstream, dtype=d) for d in (F64, dtype))
    mask = torch.finfo(dtype).min if least else -torch.inf
    whole = {name: rest[name].detach() for name in ("hidden", "weight", "bias")}
    whole["weight"] = torch.cat([torch.randn(removed, 40, device=device, dtype=dtype), whole["weight"]])
    whole["bias"] = torch.cat([torch.full((removed,), mask, device=device, dtype=dtype), whole["bias"]])
    whole = {name: tensor.requires_grad_() for name, tensor in whole.items()}
    whole["targets"] = rest["targets"] + removed * (rest["targets"] != -100)

    actual = run(impl, case, whole, upstream)

    for name in ("weight", "bias"):
        assert not actual[name][:removed].any()
        actual[name] = actual[name][removed:]
    compare(actual, native, exact, allowed(impl, case, dtype, exact, rest))


@pytest.mark.parametrize("frozen", [(), ("weight", "bias")], ids=["trained", "frozen"])
@pytest.mark.parametrize("rise", [60.0, 200.0])
@pytest.mark.parametrize("impl", [*EACH, one("cce_exact")])
def test_later_entries_far_above_the_first_ones(impl, rise, frozen, device):
    """What sums of exponentials are measured from need not be near the largest logit: of the first entries it is far
    below."""
    case = Case(vocabulary=200, bias=True, frozen=frozen, pulled=BOTH, settings=Settings(reduction="none"))
    tensors, upstream = make_inputs(case, torch.float32, device), make_upstream(case, device)
    tensors["bias"].data[130:] += rise
    exact, native = (
        plain_torch(**tensors, settings=case.settings, upstream=upstream, dtype=d) for d in (F64, torch.float32)
    )
    actual = run(impl, case, tensors, upstream)
    compare(actual, native, exact, allowed(impl, case, torch.float32, exact, tensors))


@pytest.mark.parametrize("impl", [*EACH, one("cce_exact")])
def test_a_vocabulary_masked_alike_is_flat(impl, device):
    """Where every logit is the least finite number, each entry is as likely as any other."""
    hidden, weight = torch.zeros(5, 8, device=device, requires_grad=True), torch.randn(300, 8, device=device)
    bias = torch.full((300,), torch.finfo(torch.float32).min, device=device)
    targets = torch.arange(5, device=device)
    loss = linear_cross_entropy(hidden, weight, targets, bias, impl=impl)
    torch.testing.assert_close(loss.item(), math.log(300))
    (gradient,) = torch.autograd.grad(loss, hidden)
    torch.testing.assert_close(gradient, (weight.mean(0) - weight[:5]) / 5)


@pytest.mark.parametrize("logit", [-200.0, 0.0, 200.0])
@pytest.mark.parametrize("impl", [*EACH, one("cce_exact")])
def test_a_target_that_alone_can_be(impl, logit, device):
    """It is certain, whatever its logit: exp of what the others' -inf is measured from may be no number."""
    hidden, weight = torch.ones(3, 8, device=device, requires_grad=True), torch.zeros(70, 8, device=device)
    bias = torch.full((70,), -torch.inf, device=device)
    weight[5], bias[5] = logit / 8, 0
    weight.requires_grad_()
    loss = linear_cross_entropy(hidden, weight, torch.full((3,), 5, device=device), bias, impl=impl)
    assert loss == 0
    for gradient in torch.autograd.grad(loss, (hidden, weight)):
        assert not gradient.any()


@pytest.mark.parametrize("impl", ["reference", "chunked"])
def test_no_term_that_is_not_asked_for(impl, device):
    """Nothing times the square of a log-sum-exp that has none, or times one that is infinite, would not be nothing."""
    hidden, weight = torch.ones(3, 1, device=device, requires_grad=True), torch.zeros(70, 1, device=device)
    targets = torch.arange(3, device=device)
    weight[5] = 4e19
    weight.requires_grad_()
    loss = linear_cross_entropy(hidden, weight, targets, impl=impl)
    torch.testing.assert_close(loss.item(), 4e19)
    for actual, wanted in zip(
        torch.autograd.grad(loss, (hidden, weight)),
        torch.autograd.grad(F.cross_entropy(hidden @ weight.T, targets), (hidden, weight)),
        strict=True,
    ):
        torch.testing.assert_close(actual, wanted)
    with torch.no_grad():
        weight[5] = torch.inf
    assert linear_cross_entropy(hidden, weight, targets, impl=impl) == torch.inf


@pytest.mark.parametrize("added", [{}, {"label_smoothing": 0.2}, {"z_loss": 1e-6}], ids=["alone", "smoothed", "z-loss"])
@pytest.mark.parametrize(("impl", "trained"), [*TRAINED, FROZEN])
def test_a_common_logit_costs_no_digits(impl, trained, added, device):
    """The loss and its gradients do not depend on what all logits share, be it far larger than their differences.

    The z-loss is meant to, and is as far off as a log-sum-exp of that size is: by its rounding.
    """
    for where, common in itertools.product(("bias", "logits", "all of them"), COMMON):
        hidden, weight, bias, targets = inputs_with_a_common_logit(common, where, device)
        results = _with_and_without(impl, trained, hidden, weight, targets, bias, **added)
        for name, actual, exact in zip(("loss", *trained), *results, strict=True):
            if name == "hidden" and where != "bias":
                # That by the common column is a sum that cancels.
                actual, exact = actual[:, 1:], exact[:, 1:]
            error = ((actual.double() - exact).norm() / exact.norm()).item()
            assert error < 4e-7, f"{common} in {where}: {name} is {error:.1e} off"


def _with_and_without(impl, trained, hidden, weight, targets, bias, **settings):
    """Losses and gradients by ``trained``, in float32 by the implementation, and in float64 by plain PyTorch."""

    def plain(hidden, weight, targets, bias, reduction, label_smoothing=0.0, z_loss=0.0):
        logits = F.linear(hidden, weight, bias)
        losses = F.cross_entropy(logits, targets, reduction=reduction, label_smoothing=label_smoothing)
        return losses + z_loss * logits.logsumexp(-1).square().where(targets != -100, 0)

    results = []
    for dtype, function in ((torch.float32, partial(linear_cross_entropy, impl=impl, filter_eps=None)), (F64, plain)):
        leaves = {"hidden": hidden, "weight": weight, "bias": bias}
        leaves = {name: x.detach().to(dtype).requires_grad_(name in trained) for name, x in leaves.items()}
        # Without a threshold all presets are cce_exact.
        losses = function(**leaves, targets=targets, reduction="none", **settings)
        results.append([losses.detach(), *torch.autograd.grad(losses.sum(), [leaves[name] for name in trained])])
    return results


@pytest.mark.parametrize(("impl", "trained"), [*TRAINED, FROZEN])
def test_a_confident_token_costs_no_digits(impl, trained, device):
    """1 - p near 1e-5: p - 1 is what the others have, not the difference of two numbers near 1."""
    weight, targets = F.normalize(torch.randn(300, 64, device=device), dim=-1), torch.arange(40, device=device)
    bias = torch.zeros(300, device=device)
    results = _with_and_without(impl, trained, 20 * weight[targets], weight, targets, bias)
    assert 1e-6 < results[1][0].median() < 1e-4
    for name, actual, exact in zip(("loss", *trained), *results, strict=True):
        error = ((actual.double() - exact).norm() / exact.norm()).item()
        assert error < 2e-5, f"{name} is {error:.1e} off"


@pytest.mark.parametrize("pulled", ["loss", "lse", "both"])
@pytest.mark.parametrize("tokens", ["flat", "unsure", "confident", "mistaken"])
@pytest.mark.parametrize("common", [0.0, 1.0, 16.0])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_what_chunked_keeps_of_a_frozen_head_loses_no_digits(dtype, common, tokens, pulled, device):
    """It is rounded once: be what the rows of the weight have in common large or nothing, the target's share of the
    softmax 1 or 0."""
    weight = (torch.randn(300, 64, device=device) / 4 + common * torch.randn(64, device=device)).to(dtype)
    apart = F.normalize(weight.float() - weight.float().mean(0), dim=-1)
    spread = {"flat": 0.05, "unsure": 1.0}.get(tokens)
    hidden = spread * torch.randn(40, 64, device=device) if spread else 7 * apart[:40]
    # All logits of a token are moved alike by what rows have in common: as good as nothing here, where it would round.
    hidden = hidden - (hidden @ (shared := F.normalize(weight.float().mean(0), dim=0)))[:, None] * shared
    hidden = hidden.to(dtype).requires_grad_()
    targets = torch.arange(40, device=device) + (100 if tokens == "mistaken" else 0)
    # Within float16, as a scaled loss's.
    upstream = torch.linspace(1, 2, 40, device=device) * 2**6
    gradients = []
    for states, rows in ((hidden, weight), (hidden.double(), weight.double())):
        impl = "chunked" if rows is weight else "reference"
        loss, lse = linear_cross_entropy(
            states, rows, targets, logit_scale=0.75, reduction="none", return_lse=True, impl=impl
        )
        results = {"loss": [loss], "lse": [lse], "both": [loss, lse]}[pulled]
        (gradient,) = torch.autograd.grad(results, hidden, [upstream.to(loss.dtype)] * len(results))
        gradients.append(gradient.double())

    def error_of(gradient):
        # What is exact was rounded on its way to hidden, once.
        return ((gradient.double() - gradients[1]).norm(dim=-1) / gradients[1].norm(dim=-1)).max().item()

    assert error_of(gradients[0]) < 1.5 * torch.finfo(dtype).eps, f"{error_of(gradients[0]):.1e} off"


@pytest.mark.parametrize("tokens", ["flat", "unsure", "confident", "mistaken"])
@pytest.mark.parametrize("common", [0.0, 1.0, 16.0])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_nor_does_it_where_factors_are_rounded(dtype, common, tokens, device, monkeypatch):
    """As on a card, whose products of 16 bits have float32 results: exponentials are rounded, and their sum with them,
    which what rows have in common is multiplied by."""
    if device.type == "cpu":
        monkeypatch.setattr(walk, "_WIDENING", ())
        monkeypatch.setattr(walk, "_product", lambda left, right, out: torch.mm(left.float(), right.float(), out=out))
        monkeypatch.setattr(chunked, "add_product", lambda sums, left, right: sums.addmm_(left.float(), right.float()))
    test_what_chunked_keeps_of_a_frozen_head_loses_no_digits(dtype, common, tokens, "loss", device)


@pytest.mark.parametrize("impl", ["chunked", "torch_compile"])
@pytest.mark.parametrize("raw", [250.0, 300.0])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_all_shares_may_be_rounded_to_nothing(dtype, raw, impl, device, monkeypatch):
    """The largest logit, no target, is at the softcap, where its derivative is 0; the others are nothing beside it."""
    monkeypatch.setattr(walk, "_WIDENING", ())
    direction = F.normalize(torch.randn(64, device=device), dim=0)
    weight = torch.zeros(300, 64, device=device)
    weight[7], weight[20] = direction, 0.05 * direction
    weight, targets = weight.to(dtype), torch.full((5,), 20, device=device)
    gradients = []
    for to, name in ((dtype, impl), (F64, "reference")):
        hidden = (raw * direction).to(dtype).expand(5, 64).to(to).requires_grad_()
        with steps_as():
            linear_cross_entropy(hidden, weight.to(to), targets, softcap=30.0, impl=name).backward()
        gradients.append(hidden.grad.double())
    torch.testing.assert_close(*gradients, rtol=0, atol=4 * torch.finfo(dtype).eps * gradients[1].abs().max().item())


@pytest.mark.parametrize("impl", ["reference", "chunked", "torch_compile"])
@pytest.mark.parametrize("softcap", [None, 3.0])
def test_gradcheck(impl, softcap):
    with steps_as():
        assert torch.autograd.gradcheck(*tiny_float64(impl, softcap))


def tiny_float64(impl, softcap):
    """A function of hidden, weight and bias, and these three."""
    inputs = tuple(torch.randn(*shape, dtype=F64, requires_grad=True) for shape in ((2, 4, 3), (7, 3), (7,)))
    targets = torch.tensor([[3, -1, 0, 6], [2, 5, -1, 1]])

    def results(hidden, weight, bias):
        return linear_cross_entropy(
            hidden, weight, targets, bias, softcap=softcap, ignore_index=-1, shift=1, impl=impl, return_lse=True
        )

    return results, inputs


@pytest.mark.parametrize("impl", each("chunked", "cce"))
def test_second_derivative_is_refused(impl, device):
    """Their backward is computed by hand: differentiated, it would pass for a constant."""
    tensors = make_inputs(Case(), torch.float32, device)
    loss = call(impl, Case(), tensors)["loss"]
    (gradient,) = torch.autograd.grad(loss, tensors["hidden"], create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative.*impl='reference'"):
        torch.autograd.grad(gradient.square().sum(), tensors["hidden"])


def make_inputs(case: Case, dtype: torch.dtype, device: torch.device) -> dict[str, torch.Tensor | None]:
    """hidden, weight, targets and bias; what is not frozen is a leaf that asks for its gradient."""
    hidden = torch.randn(*case.tokens, case.width)
    weight = torch.randn(case.vocabulary, case.width) * (case.deviation / case.width**0.5)
    probable = torch.randint(0, case.first_entries or case.vocabulary, case.tokens)
    targets = torch.randint(0, case.vocabulary, case.tokens) if case.mistaken else probable.clone()
    if case.confident:
        chosen = torch.rand(case.tokens) < case.confident
        # Along the entry's own row: a logit around 25 to 75, where the other rows' are a sqrt(D)-th of that. From
        # hardly confident to a softmax of 1 but for 1e-20: rounding before p - 1 is taken shows in between.
        aligned = weight[probable] * (50 * (0.5 + torch.rand(*case.tokens, 1)) / case.deviation**2)
        if case.settings.shift:
            aligned = aligned.roll(-case.settings.shift, -2)
        hidden[chosen] = aligned[chosen]
    targets[torch.rand(case.tokens) < case.ignored] = case.settings.ignore_index
    tensors = {
        "hidden": hidden.to(device, dtype),
        "weight": weight.to(device, dtype),
        "targets": targets.to(device, case.target_dtype),
        "bias": torch.randn(case.vocabulary).to(device, dtype) if case.bias else None,
    }
    tensors = {name: lay_out(tensor, case.layout) for name, tensor in tensors.items()}
    for name in INPUTS:
        if tensors[name] is not None:
            tensors[name].requires_grad_(name not in case.frozen)
    return tensors


def make_upstream(case: Case, device: torch.device) -> Upstream:
    """Random gradients, negative ones too, in the layout of the case."""
    shapes = {"loss": case.tokens if case.settings.reduction == "none" else (), "lse": case.tokens}
    random = {name: lay_out(torch.randn(shape, device=device), case.layout) for name, shape in shapes.items()}
    return Upstream(**{name: gradient if name in case.pulled else None for name, gradient in random.items()})


def lay_out(tensor: torch.Tensor | None, layout: str) -> torch.Tensor | None:
    """The same values with other strides."""
    if tensor is None or tensor.ndim == 0 or layout == "contiguous":
        return tensor
    if layout == "transposed":
        placed = tensor if tensor.ndim == 1 else tensor.transpose(0, 1).contiguous().transpose(0, 1)
    else:
        placed = torch.stack([tensor, torch.full_like(tensor, 77)], -1)[..., 0]
    assert tensor.ndim == 1 or not placed.is_contiguous()
    return placed


def run(impl: str, case: Case, tensors: dict, upstream: Upstream) -> dict[str, torch.Tensor]:
    """Results and gradients by name, from fresh ``.grad``; checks which of them there are, and their dtypes."""
    for name in INPUTS:
        if tensors[name] is not None:
            tensors[name].grad = None
    results = call(impl, case, tensors)
    dtype = tensors["hidden"].dtype
    for name, result in results.items():
        assert result.dtype == torch.promote_types(dtype, torch.float32), name
    backward(results, upstream)
    for name in INPUTS:
        if tensors[name] is None or name in case.frozen:
            assert tensors[name] is None or tensors[name].grad is None, f"{name} is frozen but got a gradient"
        else:
            assert tensors[name].grad is not None, f"{name} has no gradient"
            assert tensors[name].grad.dtype == dtype, name
            results[name] = tensors[name].grad
    return {name: result.detach() for name, result in results.items()}


def call(impl: str, case: Case, tensors: dict) -> dict[str, torch.Tensor]:
    return_lse = "lse" in case.pulled
    settings = vars(case.settings)
    results = linear_cross_entropy(**tensors, **settings, impl=impl, filter_eps=case.filter_eps, return_lse=return_lse)
    return dict(zip(BOTH, results, strict=True)) if return_lse else {"loss": results}


def backward(results: dict[str, torch.Tensor], upstream: Upstream, retain_graph: bool = False) -> None:
    gradients = {name: gradient for name, gradient in vars(upstream).items() if gradient is not None}
    differentiable = [name for name in gradients if results[name].requires_grad]
    if differentiable:
        torch.autograd.backward(
            [results[name] for name in differentiable],
            [gradients[name].to(results[name].dtype) for name in differentiable],
            retain_graph=retain_graph,
        )


def allowed(impl: str, case: Case, dtype: torch.dtype, exact: Plain, tensors: dict) -> dict[str, torch.Tensor]:
    preset = CCE_PRESETS.get(impl)
    filtered = tuple(name for name in ("hidden", "weight") if preset and getattr(preset, name))
    eps = torch.finfo(dtype).eps / AUTO_TRAINED if case.filter_eps == "auto" else case.filter_eps
    # The kernels keep their logits in float32; F.linear and torch.mm round them.
    logits_dtype = torch.promote_types(dtype, torch.float32) if preset else dtype
    return allowances(
        exact, tensors["weight"], tensors["bias"], case.settings, dtype, logits_dtype, eps if preset else None, filtered
    )


def compare(actual: dict[str, torch.Tensor], native: Plain, exact: Plain, bounds: dict[str, torch.Tensor]) -> None:
    for name, result in actual.items():
        assert_as_accurate_as_torch(name, result, native.results[name], exact.results[name], bounds[name])


def highest_probability(exact: Plain, case: Case) -> torch.Tensor:
    logits, softcap = exact.logits, case.settings.softcap
    capped = logits if softcap is None else softcap * torch.tanh(logits / softcap)
    return (capped * case.settings.logit_scale).softmax(-1).amax(-1)
