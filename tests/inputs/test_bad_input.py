"""Every complaint about an argument: it names the argument, what was expected and what came."""

import os
import re
import warnings

import pytest
import torch
import torch.distributed as dist
from calls import compute
from fused_steps import steps_as
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor
from torchao.dtypes.nf4tensor import to_nf4

from torchtune_lce import LinearCrossEntropyLoss, functional, linear_cross_entropy
from torchtune_lce.implementations.choice import NAMES
from torchtune_lce.inputs import validation
from torchtune_lce.inputs.call import checked
from torchtune_lce.inputs.low_rank import LowRank
from torchtune_lce.inputs.options import Options
from torchtune_lce.inputs.shard import VocabularyShard

ANY = ("reference", "chunked", "torch_compile", "cce", "cce_exact", "auto")
# The kernels take CPU tensors in the interpreter alone; where there is a card, conftest.py leaves it off.
RUNNABLE = [impl for impl in ANY if os.environ.get("TRITON_INTERPRET") == "1" or not impl.startswith("cce")]


@pytest.fixture(autouse=True)
def _uncompiled():
    """What a compiler fuses complains about nothing."""
    with steps_as():
        yield


def arguments(**changed) -> dict:
    """A good call on the CPU, [2, 3] tokens of width 8 and 11 entries, with some arguments changed."""
    good = {
        "hidden": torch.randn(2, 3, 8),
        "weight": torch.randn(11, 8),
        "targets": torch.tensor([[0, 10, -100], [5, -100, 3]]),
        "bias": torch.randn(11),
    }
    return good | changed


def nested(*parts: torch.Tensor, **settings) -> torch.Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # that their interface may change
        return torch.nested.nested_tensor(list(parts), **settings)


# What is wrong: the changed arguments, the error, and what its message says, in this order.
BAD = {
    "reduction": ({"reduction": "avg"}, ValueError, "reduction", "mean, sum, none", "'avg'"),
    "reduction-none": ({"reduction": None}, ValueError, "reduction", "mean, sum, none", "None"),
    "shift-negative": ({"shift": -1}, ValueError, "shift", ">= 0", "-1"),
    "shift-float": ({"shift": 1.0}, TypeError, "shift", "int", "1.0"),
    "shift-bool": ({"shift": True}, TypeError, "shift", "int", "True"),
    "ignore-index-none": ({"ignore_index": None}, TypeError, "ignore_index", "int", "None"),
    "ignore-index-float": ({"ignore_index": -100.0}, TypeError, "ignore_index", "int", "-100.0"),
    "ignore-index-of-65-bits": ({"ignore_index": 2**63}, ValueError, "ignore_index", "torch.int64", str(2**63)),
    # Compared as 32 bits it would be 0, and every target 0 would be ignored.
    "ignore-index-wraps": (
        {"targets": torch.zeros(2, 3).int(), "ignore_index": 2**32},
        *(ValueError, "ignore_index", "torch.int32", "from -2147483648 to 2147483647", "got 4294967296"),
    ),
    "softcap-zero": ({"softcap": 0}, ValueError, "softcap", "finite number > 0", "0"),
    "softcap-negative": ({"softcap": -30.0}, ValueError, "softcap", "finite number > 0", "-30.0"),
    "softcap-inf": ({"softcap": float("inf")}, ValueError, "softcap", "finite number > 0", "inf"),
    "softcap-nan": ({"softcap": float("nan")}, ValueError, "softcap", "finite number > 0", "nan"),
    "softcap-word": ({"softcap": "30"}, ValueError, "softcap", "finite number > 0", "'30'"),
    "softcap-bool": ({"softcap": True}, ValueError, "softcap", "finite number > 0", "True"),
    "softcap-inf-in-float32": ({"softcap": 1e39}, ValueError, "softcap", "finite", "torch.float32", "1e+39"),
    "return-lse-word": ({"return_lse": "no"}, TypeError, "return_lse", "True or False", "'no'"),
    "eps-one": ({"filter_eps": 1.0}, ValueError, "filter_eps", "'auto', None", "[0, 1)", "1.0"),
    "eps-negative": ({"filter_eps": -1e-3}, ValueError, "filter_eps", "[0, 1)", "-0.001"),
    "eps-nan": ({"filter_eps": float("nan")}, ValueError, "filter_eps", "[0, 1)", "nan"),
    "eps-word": ({"filter_eps": "high"}, ValueError, "filter_eps", "[0, 1)", "'high'"),
    "eps-bool": ({"filter_eps": False}, ValueError, "filter_eps", "[0, 1)", "False"),
    "impl": ({"impl": "triton"}, ValueError, "impl", *NAMES, "'triton'"),
    "impl-none": ({"impl": None}, ValueError, "impl", *NAMES, "None"),
    "hidden-list": ({"hidden": [torch.ones(8)]}, TypeError, "hidden", "torch.Tensor", "list"),
    "hidden-missing": ({"hidden": None}, TypeError, "hidden", "torch.Tensor", "NoneType"),
    "weight-module": ({"weight": torch.nn.Linear(8, 11)}, TypeError, "weight", "torch.Tensor", "Linear"),
    "targets-list": ({"targets": [1, 2]}, TypeError, "targets", "torch.Tensor", "list"),
    "bias-flag": ({"bias": True}, TypeError, "bias", "torch.Tensor", "bool"),
    "hidden-int": ({"hidden": torch.ones(2, 3, 8).int()}, TypeError, "hidden", "float32, bfloat16", "torch.int32"),
    "hidden-complex": ({"hidden": torch.ones(2, 3, 8) + 0j}, TypeError, "hidden", "float32", "torch.complex64"),
    "weight-dtype": ({"weight": torch.ones(11, 8).half()}, TypeError, "weight", "torch.float32", "torch.float16"),
    "bias-dtype": ({"bias": torch.ones(11).bfloat16()}, TypeError, "bias", "torch.float32", "torch.bfloat16"),
    "targets-float": ({"targets": torch.ones(2, 3)}, TypeError, "targets", "int64, int32", "torch.float32"),
    "targets-int16": ({"targets": torch.ones(2, 3).short()}, TypeError, "targets", "int64, int32", "torch.int16"),
    "targets-bool": ({"targets": torch.ones(2, 3) > 0}, TypeError, "targets", "int64, int32", "torch.bool"),
    "targets-int8": ({"targets": torch.ones(2, 3).char()}, TypeError, "targets", "int64, int32", "torch.int8"),
    "targets-uint8": ({"targets": torch.ones(2, 3).byte()}, TypeError, "targets", "int64, int32", "torch.uint8"),
    "weight-sparse": ({"weight": torch.ones(11, 8).to_sparse()}, TypeError, "weight", "dense", "torch.sparse_coo"),
    "weight-mkldnn": ({"weight": torch.ones(11, 8).to_mkldnn()}, TypeError, "weight", "dense", "torch._mkldnn"),
    "hidden-nested": ({"hidden": nested(torch.ones(3, 8))}, TypeError, "hidden", "dense", "nested"),
    "hidden-jagged": (
        {"hidden": nested(torch.ones(3, 8), layout=torch.jagged)},
        *(TypeError, "hidden", "plain tensor", "NestedTensor"),
    ),
    "hidden-empty": (
        {"hidden": torch.ones(2, 3, 0), "weight": torch.ones(11, 0)},
        *(ValueError, "hidden", "at least one feature", "[2, 3, 0]"),
    ),
    "hidden-scalar": ({"hidden": torch.tensor(1.0)}, ValueError, "hidden", "[..., D]", "scalar"),
    "weight-transposed": ({"weight": torch.ones(8, 11)}, ValueError, "weight", "[V, 8]", "[8, 11]"),
    "weight-vector": ({"weight": torch.ones(8)}, ValueError, "weight", "[V, 8]", "[8]"),
    "weight-3d": ({"weight": torch.ones(1, 11, 8)}, ValueError, "weight", "[V, 8]", "[1, 11, 8]"),
    "weight-empty": ({"weight": torch.ones(0, 8), "bias": None}, ValueError, "weight", "at least one row", "[0, 8]"),
    "targets-flat": ({"targets": torch.zeros(6).long()}, ValueError, "targets", "[2, 3]", "[6]"),
    "targets-short": ({"targets": torch.zeros(2, 2).long()}, ValueError, "targets", "[2, 3]", "[2, 2]"),
    "bias-width": ({"bias": torch.ones(8)}, ValueError, "bias", "[11]", "[8]"),
    "bias-2d": ({"bias": torch.ones(11, 1)}, ValueError, "bias", "[11]", "[11, 1]"),
    "weight-device": ({"weight": torch.ones(11, 8, device="meta")}, ValueError, "weight", "cpu", "meta"),
    "targets-device": ({"targets": torch.zeros(2, 3, device="meta").long()}, ValueError, "targets", "cpu", "meta"),
    "bias-device": ({"bias": torch.ones(11, device="meta")}, ValueError, "bias", "cpu", "meta"),
    "targets-vocabulary": (
        {"targets": torch.tensor([[0, 11, -100], [12, 1, -5]])},
        *(ValueError, "targets", "ignore_index (-100)", "[0, 11)", "got 3 outside", "first 11", "from -5 to 12"),
    ),
    "targets-minus-100": (
        {"targets": torch.full((2, 3), -100), "ignore_index": -1},
        *(ValueError, "targets", "ignore_index (-1)", "[0, 11)", "got 6 outside", "first -100"),
    ),
}


@pytest.mark.parametrize("bad", BAD)
def test_message(bad):
    changed, error, *said = BAD[bad]
    with pytest.raises(error, match="^" + ".*".join(map(re.escape, said))):
        linear_cross_entropy(**arguments(**changed))


@pytest.mark.parametrize("impl", ["reference", "chunked"])
def test_softcap_that_is_finite_in_float64_alone(impl):
    wide = {name: x.double() for name, x in arguments().items() if name != "targets"}
    capped, plain = (linear_cross_entropy(**arguments(**wide), softcap=softcap, impl=impl) for softcap in (1e39, None))
    torch.testing.assert_close(capped, plain)


@pytest.mark.parametrize("flag", ["yes", 1, None])
def test_flag_of_the_module(flag):
    with pytest.raises(TypeError, match=f"^check_targets must be True or False, got {flag!r}"):
        LinearCrossEntropyLoss(check_targets=flag)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("shift", [3, 4, 2**70])
def test_shift_past_the_end_leaves_nothing(shift, reduction):
    loss, lse = linear_cross_entropy(**arguments(), shift=shift, reduction=reduction, return_lse=True)
    assert not loss.any()
    assert torch.equal(lse, torch.zeros(2, 3))


@pytest.mark.parametrize("workspace_mib", [0, -1, 1.5, None])
def test_workspace(workspace_mib):
    options = Options(workspace_mib=workspace_mib)
    with pytest.raises((TypeError, ValueError), match=f"^workspace_mib must be .*, got {workspace_mib}"):
        compute(**arguments(), options=options, reduction="mean", shift=0, impl="auto", return_lse=False)


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32])
@pytest.mark.parametrize("target", [-1, 11, 2**31 - 1])
@pytest.mark.parametrize("impl", RUNNABLE)
def test_target_out_of_range_raises_on_cpu(impl, target, dtype):
    """Before anything is computed: no implementation may index with it."""
    targets = torch.tensor([[0, 10, -100], [5, target, 3]], dtype=dtype)
    with pytest.raises(ValueError, match=rf"^targets must be .* got 1 outside, the first {target},"):
        linear_cross_entropy(**arguments(targets=targets), impl=impl)


@pytest.mark.parametrize("impl", ["reference", "chunked"])
def test_target_that_is_shifted_off_may_be_anything(impl):
    """As the first label of a sequence is by F.cross_entropy on shifted labels."""
    targets = torch.tensor([[77, 10, 3]])
    good = arguments(hidden=torch.randn(1, 3, 8), targets=targets)
    expected = torch.nn.functional.cross_entropy(
        good["hidden"][0, :-1] @ good["weight"].T + good["bias"], targets[0, 1:]
    )
    torch.testing.assert_close(linear_cross_entropy(**good, shift=1, impl=impl), expected)


def assert_bad_targets_are_nan(losses, targets, vocabulary, ignore_index, trained=True):
    """Loss, log-sum-exp and gradient of a token are NaN where its target is bad, there alone; the mean counts it."""
    hidden = torch.randn(len(targets), 8, requires_grad=True)
    weight = torch.randn(vocabulary, 8, requires_grad=trained)
    ignored = targets == ignore_index
    bad = ((targets < 0) | (targets >= vocabulary)) & ~ignored
    loss, lse = losses(hidden, weight, targets)
    assert torch.equal(loss.isnan(), bad)
    assert torch.equal(lse.isnan(), bad)
    (loss.sum() / (~ignored).sum()).backward()
    assert torch.equal(hidden.grad.isnan().all(-1), bad)
    good = ~bad
    expected = torch.nn.functional.cross_entropy(
        hidden[good] @ weight.T, targets[good].long(), ignore_index=ignore_index, reduction="sum"
    )
    (expected,) = torch.autograd.grad(expected / (~ignored).sum(), hidden)
    torch.testing.assert_close(hidden.grad[good], expected[good])
    assert not trained or weight.grad.isnan().all(-1).any()


# Of a vocabulary of one entry, and of what stands in for a bad target being ignored itself.
VOCABULARY_AND_IGNORED = [(11, -100), (11, 0), (11, 10), (1, -100), (1, 0)]


@pytest.mark.parametrize(("vocabulary", "ignore_index"), VOCABULARY_AND_IGNORED)
@pytest.mark.parametrize("trained", [True, False])
@pytest.mark.parametrize("impl", RUNNABLE)
def test_bad_target_that_nobody_looks_at_is_nan(impl, trained, vocabulary, ignore_index, monkeypatch):
    """As on a card, where looking would wait for it."""
    monkeypatch.setattr(validation, "is_readable", lambda targets: False)
    targets = torch.tensor([0, vocabulary - 1, ignore_index, vocabulary, -1, 0, 2**31 - 1]).int()

    def losses(hidden, weight, targets):
        settings = {"ignore_index": ignore_index, "reduction": "none", "return_lse": True, "impl": impl}
        loss, lse = linear_cross_entropy(hidden, weight, targets, **settings)
        mean, _ = linear_cross_entropy(hidden, weight, targets, **settings | {"reduction": "mean"})
        assert mean.isnan()
        return loss, lse

    assert_bad_targets_are_nan(losses, targets, vocabulary, ignore_index, trained)


@pytest.mark.parametrize("settings", [{}, {"softcap": 3.0, "z_loss": 0.1}, {"label_smoothing": 0.1}], ids=str)
@pytest.mark.parametrize("trained", [True, False])
@pytest.mark.parametrize("impl", RUNNABLE)
def test_bad_target_spoils_a_mean_and_its_own_token_alone(impl, trained, settings, monkeypatch):
    """Though the mean is NaN, that of other tokens' gradients which arrives at the hidden states is right."""
    monkeypatch.setattr(validation, "is_readable", lambda targets: False)
    targets = torch.tensor([0, 10, -100, 11, -1, 0, 2**40])
    hidden, weight = torch.randn(7, 8, requires_grad=True), torch.randn(11, 8, requires_grad=trained)
    assert_bad_targets_spoil_a_mean(hidden, weight, targets, impl=impl, options=Options(**settings))
    assert not trained or weight.grad.isnan().all(-1).any()


@pytest.mark.parametrize("scaled", [False, True], ids=["LoRA", "DoRA"])
@pytest.mark.parametrize("trained", [True, False])
@pytest.mark.parametrize("impl", ["chunked", "torch_compile"])
def test_bad_target_beside_an_adapter(impl, scaled, trained, monkeypatch):
    """In those which read the adapter's rows and scale of targets."""
    monkeypatch.setattr(validation, "is_readable", lambda targets: False)
    targets = torch.tensor([0, 10, -100, 11, -1, 0, 2**40])
    hidden, weight = torch.randn(7, 8, requires_grad=True), torch.randn(11, 8)
    low = torch.randn(7, 2, requires_grad=True)
    low_rank = LowRank(low, torch.randn(11, 2, requires_grad=trained), torch.rand(11) + 0.5 if scaled else None)
    assert_bad_targets_spoil_a_mean(hidden, weight, targets, low_rank, impl=impl, options=Options())


def assert_bad_targets_spoil_a_mean(hidden, weight, targets, low_rank=None, **settings):
    bad = ((targets < 0) | (targets >= len(weight))) & (targets != -100)
    loss = compute(hidden, weight, targets, low_rank=low_rank, **settings)
    loss.backward()
    assert loss.isnan()
    leaves = [hidden] if low_rank is None else [hidden, low_rank.low]
    if low_rank is not None:
        low_rank = low_rank._replace(low=low_rank.low[~bad])
    good = compute(
        hidden[~bad], weight, targets[~bad], low_rank=low_rank, **settings | {"impl": "reference", "reduction": "sum"}
    )
    for leaf, expected in zip(leaves, torch.autograd.grad(good / (targets != -100).sum(), leaves), strict=True):
        assert torch.equal(leaf.grad.isnan().all(-1), bad)
        torch.testing.assert_close(leaf.grad[~bad], expected[~bad])


@pytest.mark.parametrize("ignore_index", [-100, 0])
@pytest.mark.parametrize("impl", RUNNABLE)
def test_compiled_call_answers_a_bad_target_with_nan(impl, ignore_index):
    """Raising would take a look at the values, which compiled code cannot."""

    def losses(*inputs):
        return linear_cross_entropy(
            *inputs, ignore_index=ignore_index, reduction="none", impl=impl, return_lse=True, filter_eps=None
        )

    torch._dynamo.reset()
    compiled = torch.compile(losses, backend="eager", fullgraph=True)
    assert_bad_targets_are_nan(compiled, torch.tensor([0, 10, ignore_index, 11, -1, 3]), 11, ignore_index)


@pytest.mark.gpu
@pytest.mark.parametrize("ignore_index", [-100, 0])
@pytest.mark.parametrize("impl", ["chunked", "cce", "cce_exact", "reference", "torch_compile"])
def test_bad_target_on_a_card_is_nan(impl, ignore_index):
    hidden = torch.randn(300, 64, device="cuda", requires_grad=True)
    weight = torch.randn(1000, 64, device="cuda", requires_grad=True)
    targets = torch.randint(0, 1000, (300,), device="cuda")
    targets[[7, 150, 299]] = torch.tensor([1000, -1, 2**40], device="cuda")
    loss = linear_cross_entropy(hidden, weight, targets, reduction="none", impl=impl, ignore_index=ignore_index)
    loss.sum().backward()
    assert loss.isnan().nonzero().flatten().tolist() == [7, 150, 299]
    assert hidden.grad.isnan().any(-1).nonzero().flatten().tolist() == [7, 150, 299]
    assert weight.grad.isnan().any()


@pytest.fixture
def mesh():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        yield init_device_mesh("cpu", (1,))
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize("ignore_index", [-100, 0])
@pytest.mark.parametrize("impl", RUNNABLE)
def test_bad_target_that_no_rank_owns_is_nan(mesh, impl, ignore_index, monkeypatch):
    monkeypatch.setattr(validation, "is_readable", lambda targets: False)

    def losses(hidden, weight, targets):
        shard = VocabularyShard(mesh, 0, 11, 11)
        call = checked(hidden, weight, targets, None, options=Options(ignore_index=ignore_index), shard=shard)
        return functional.compute(call, reduction="none", impl=impl, return_lse=True)

    assert_bad_targets_are_nan(losses, torch.tensor([0, 10, ignore_index, 11, -1, 3]), 11, ignore_index)


@pytest.mark.parametrize("impl", ANY)
@pytest.mark.parametrize(("name", "placement"), [("weight", Shard(0)), ("weight", Replicate()), ("hidden", Shard(0))])
def test_distributed_tensor_is_refused(mesh, name, placement, impl):
    """A kernel would read past a shard, or through a null pointer."""
    good = arguments()
    with pytest.raises(TypeError, match=rf"^{name} must be a plain tensor, got DTensor: .*Unshard"):
        linear_cross_entropy(**good | {name: distribute_tensor(good[name], mesh, [placement])}, impl=impl)


def test_quantised_weight_is_refused():
    weight = to_nf4(torch.randn(64, 64), block_size=64, scaler_block_size=1)
    hidden, targets = torch.randn(3, 64), torch.zeros(3).long()
    with pytest.raises(TypeError, match=r"^weight must be a plain tensor, got NF4Tensor: .*dequantise"):
        linear_cross_entropy(hidden, weight, targets)


def test_parameter_is_a_plain_tensor():
    good = arguments(weight=torch.nn.Parameter(torch.randn(11, 8)))
    linear_cross_entropy(**good).backward()
    assert good["weight"].grad.isfinite().all()
