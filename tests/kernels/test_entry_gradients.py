"""Gradients by a projection that is trained, unfiltered: the strips once more, in the backward."""

import dataclasses
import itertools
import math
from contextlib import nullcontext

import pytest
import torch
import torch.nn.functional as F
from torch.autograd import grad
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

pytest.importorskip("triton")

from torchtune_lce import linear_cross_entropy
from torchtune_lce.kernels import compiling, division, entry_gradients, strip_operators, strips, tuning, weight_product
from torchtune_lce.kernels.entry_gradients import BackwardStrip, backward_strips
from torchtune_lce.kernels.places import compact
from torchtune_lce.kernels.reference_logits import reference_logits

FOUND = division.tiles_in_gradient
DTYPES = [torch.float32, torch.float16, pytest.param(torch.bfloat16, marks=pytest.mark.gpu)]


def hold(monkeypatch, in_workspace: int, in_gradient: int) -> None:
    """Tiles of the forward's, whatever the workspace holds, and as many as go into the gradient's memory."""

    def held_in_workspace(_, vocabulary, *rest):
        return min(in_workspace, -(-vocabulary // rest[-1].forward_entries))

    def held_in_gradient(*sizes):
        return min(in_gradient, FOUND(*sizes[:5], 0, sizes[-1]))

    monkeypatch.setattr(strips, "tiles_held", held_in_workspace)
    monkeypatch.setattr(strip_operators, "tiles_in_gradient", held_in_gradient)


@pytest.fixture(
    params=[(0, 0), (2, 0), (100, 0), (0, 2), (1, 2), (100, 1)],
    ids=["nothing-held", "some-held", "all-held", "in-the-gradient", "in-both", "all-in-both"],
)
def tiles_held(request, monkeypatch):
    hold(monkeypatch, *request.param)
    return sum(request.param)


@pytest.fixture
def many_strips(monkeypatch):
    """States of a row block at once, and strips of a tile in the workspace, of more in the weight's gradient."""
    seen = []
    strips_of, divide = entry_gradients.backward_strips, entry_gradients._division

    def spy(*arguments):
        seen.extend(found := strips_of(*arguments))
        return found

    monkeypatch.setattr(entry_gradients, "backward_strips", spy)
    monkeypatch.setattr(entry_gradients, "_division", lambda hidden, _, config: divide(hidden, 0, config))
    return seen


def operands(device, dtype=torch.float32, tokens=70, vocabulary=333, width=100, with_bias=True):
    hidden = torch.randn(tokens, width).to(device, dtype).requires_grad_()
    weight = (torch.randn(vocabulary, width) * (2 / width**0.5)).to(device, dtype).requires_grad_()
    bias = torch.randn(vocabulary).to(device, dtype).requires_grad_() if with_bias else None
    return hidden, weight, bias, torch.randint(0, vocabulary, (tokens,), device=device)


def exact(hidden, weight, bias, targets, softcap=None):
    """Losses, log-sum-exps and what they are made of, in float64."""
    leaves = [None if x is None else x.detach().double().requires_grad_() for x in (hidden, weight, bias)]
    logits = F.linear(*leaves)
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    used = targets != -100
    return F.cross_entropy(logits, targets, reduction="none"), logits.logsumexp(1) * used, leaves


def far(actual, wanted) -> float:
    return ((actual.double() - wanted).norm() / wanted.norm()).item()


def upstream(device, tokens):
    """Of losses and log-sum-exps: of both signs, each of them 0, both, and such that they cancel; not every third."""
    of_loss, of_lse = torch.randn(2, tokens, device=device)
    of_lse[4], of_loss[5], of_lse[7] = -of_loss[4], 0, 0
    of_loss[8] = of_lse[8] = 0
    return of_loss, of_lse


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("softcap", "with_bias"), [(None, False), (9.0, True)])
def test_gradients_for_any_upstream(softcap, with_bias, dtype, device, many_strips, tiles_held):
    hidden, weight, bias, targets = operands(device, dtype, with_bias=with_bias)
    targets[::3] = -100
    with torch.no_grad():
        hidden[0] = torch.nan
    leaves = [x for x in (hidden, weight, bias) if x is not None]
    results = linear_cross_entropy(
        hidden, weight, targets, bias, impl="cce_exact", softcap=softcap, reduction="none", return_lse=True
    )
    upstreams = upstream(device, len(targets))
    found = grad(results, leaves, upstreams, retain_graph=True)
    clean = hidden.detach().clone()
    clean[0] = 0
    losses, sums, right = exact(clean, weight, bias, targets, softcap)
    wanted = grad((losses, sums), [x for x in right if x is not None], [x.double() for x in upstreams])
    # The hidden states' is rounded at the end; a strip, what it is multiplied by, and the result for the others. In
    # float32 its logits' own roundings, several of a logit of 10, are most of it.
    for actual, expected in zip(found, wanted, strict=True):
        assert far(actual, expected) < (2e-6 if dtype == torch.float32 else torch.finfo(dtype).eps)
    # A card's tiles are too large, and few.
    if tuning.config_for(device, dtype).row_block < 100:
        assert {strip.in_output for strip in many_strips} >= ({True, False} if tiles_held == 0 else set())
        assert bool(many_strips) == (tiles_held < 100)
    # The first again, after others.
    grad(results, leaves, [2 * x for x in upstreams], retain_graph=True)
    for first, again in zip(found, grad(results, leaves, upstreams), strict=True):
        assert torch.equal(first, again)


def test_one_of_them_alone(device, many_strips, tiles_held):
    hidden, weight, bias, targets = operands(device)
    losses, _, right = exact(hidden, weight, bias, targets)
    wanted = dict(zip(("hidden", "weight", "bias"), grad(losses.mean(), right), strict=True))
    for names in (("weight",), ("bias",), ("hidden", "bias"), ("hidden", "weight")):
        leaves = {
            name: x.detach().requires_grad_(name in ("hidden", *names))
            for name, x in zip(wanted, (hidden, weight, bias), strict=True)
        }
        loss = linear_cross_entropy(
            leaves["hidden"], leaves["weight"], targets, leaves["bias"], impl="cce_exact", reduction="mean"
        )
        for name, actual in zip(names, grad(loss, [leaves[name] for name in names]), strict=True):
            assert far(actual, wanted[name]) < 1e-6, names


def test_without_tokens_in_use_they_are_zero(device, many_strips, tiles_held):
    hidden, weight, bias, targets = operands(device)
    for used in (targets.fill_(-100), targets[:0]):
        loss = linear_cross_entropy(hidden[: len(used)], weight, used, bias, impl="cce_exact", reduction="sum")
        for gradient in grad(loss, (weight, bias)):
            assert not gradient.any()


def test_confident_tokens_cost_no_digits(device, tiles_held):
    """Where p of the target is 1 but for 1e-2 to 1e-9: what is left of it reaches the weight's gradient whole."""
    width = 32
    weight = F.normalize(torch.randn(60, width, device=device), dim=-1).requires_grad_()
    targets = torch.arange(8, device=device)
    hidden = (weight.detach()[:8] * torch.linspace(10, 40, 8, device=device)[:, None]).requires_grad_()
    losses, _, right = exact(hidden, weight, None, targets)
    scale = 1 / losses.detach()
    found = linear_cross_entropy(hidden, weight, targets, impl="cce_exact", reduction="none")
    actual = grad((found * scale).sum(), (hidden, weight))
    for mine, wanted in zip(actual, grad((losses * scale).sum(), right[:2]), strict=True):
        assert far(mine, wanted) < 4e-5


@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_that_overflow(dtype, device, monkeypatch, many_strips, tiles_held):
    """Measured from their largest logits; their neighbours from their targets'."""

    def blind(*arguments):
        logits = reference_logits(*arguments)
        logits[1] = logits[0]
        return logits

    monkeypatch.setattr(strips, "reference_logits", blind)
    hidden, weight, _, targets = operands(device, dtype, with_bias=False)
    with torch.no_grad():
        hidden[::5] *= 25
    losses, _, right = exact(hidden, weight, None, targets)
    assert losses.max() > 90
    found = linear_cross_entropy(hidden, weight, targets, impl="cce_exact", reduction="none")
    # So that no row is lost beside the others.
    scale = 1 / hidden.detach().float().norm(dim=1)
    actual = grad((found * scale).sum(), (hidden, weight))
    for mine, wanted in zip(actual, grad((losses * scale).sum(), right[:2]), strict=True):
        # Logits of 150 are off by several roundings.
        assert far(mine, wanted) < (4e-5 if dtype == torch.float32 else torch.finfo(dtype).eps)


@pytest.mark.parametrize("mask", [-math.inf, torch.finfo(torch.float32).min])
def test_masked_targets_and_entries_have_finite_gradients(mask, device, tiles_held):
    """As torch has it: minus the token at its target, though the loss is infinite or nearly."""
    hidden, weight, bias, targets = operands(device, tokens=6, vocabulary=301)
    with torch.no_grad():
        bias[5] = bias[::7] = mask
    targets[:] = torch.tensor([5, 1, 7, 9, 5, 300])
    wanted = grad(F.cross_entropy(F.linear(hidden, weight, bias), targets, reduction="sum"), (hidden, weight, bias))
    loss = linear_cross_entropy(hidden, weight, targets, bias, impl="cce_exact", reduction="sum")
    for actual, expected in zip(grad(loss, (hidden, weight, bias)), wanted, strict=True):
        assert expected.isfinite().all()
        torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_not_a_number_reaches_the_weight(value, device, tiles_held):
    hidden, weight, bias, targets = operands(device)
    with torch.no_grad():
        hidden[17, 3] = value
    loss = linear_cross_entropy(hidden, weight, targets, bias, impl="cce_exact")
    for gradient in grad(loss, (weight, bias)):
        assert gradient.isnan().all()


def test_ignored_tokens_have_no_cell(device):
    """Of a batch that is mostly prompts one tile would go over all of them."""
    config = tuning.config_for(device, torch.float32)
    for ignore_index in (-100, 3):
        targets = torch.full((90,), ignore_index, device=device)
        targets[10:20], targets[20:24] = 70, 1000
        _, labels, _, _ = compact(targets, ignore_index, 333)
        own = weight_product.in_order_of_labels(labels, torch.zeros(90, device=device), 0, 333, config)
        # Those that name no entry are in use, as the first one.
        assert own.labels[own.starts[0] : own.starts[-1]].tolist() == [0] * 4 + [70] * 10


@pytest.mark.parametrize("tma", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_what_is_held_changes_no_loss(dtype, tma, device, monkeypatch):
    """Nor a gradient by more than an order of sums; with labels many times, and places of ignored tokens, of which a
    bias alone would overflow.
    """
    if tma and device.type == "cuda" and not tuning.has_tma(torch.cuda.get_device_capability(device)):
        pytest.skip("no copy engine")
    hidden, weight, bias, targets = operands(device, dtype, tokens=100, width=96)
    targets[:30], targets[30:50], targets[50:95] = 332, 1, -100
    with torch.no_grad():
        # Confident ones, by 1e-3 and less.
        hidden[30:40] = weight[1] * 4
    config = dataclasses.replace(tuning.config_for(device, dtype), tma=tma)
    monkeypatch.setattr(strip_operators, "config_for", lambda *_: config)

    def results(tiles, in_gradient=0, **options):
        monkeypatch.setattr(strips, "tiles_held", lambda *_: tiles)
        monkeypatch.setattr(strip_operators, "tiles_in_gradient", lambda *_: in_gradient)
        torch.manual_seed(0)
        found = linear_cross_entropy(
            hidden, weight, targets, bias, impl="cce_exact", reduction="none", return_lse=True, z_loss=0.1, **options
        )
        return found, grad(found, (hidden, weight, bias), upstream(device, len(targets)))

    most = -(-len(weight) // config.forward_entries)
    for largest, options in ((1, {"softcap": 9.0}), (1, {"logit_scale": 0.4}), (120, {})):
        with torch.no_grad():
            bias[200] = largest
        losses, gradients = results(0, **options)
        in_gradient = FOUND(*hidden.shape[:1], *weight.shape, dtype, 1, 0, config)
        for tiles in ((min(2, most), 0), (most, 0), (0, in_gradient)):
            found, actual = results(*tiles, **options)
            assert all(torch.equal(*pair) for pair in zip(losses, found, strict=True))
            for mine, wanted in zip(actual, gradients, strict=True):
                assert far(mine, wanted.double()) < max(2 * torch.finfo(dtype).eps, 1e-6)


def test_beside_gradients_of_means_nothing_is_held(device, monkeypatch):
    """They take the workspace."""

    def asked(*_):
        raise AssertionError("asked what is held")

    monkeypatch.setattr(strips, "tiles_held", asked)
    monkeypatch.setattr(strip_operators, "tiles_in_gradient", asked)
    hidden, weight, _, targets = operands(device)
    settings = {"impl": "cce_exact", "label_smoothing": 0.1}
    linear_cross_entropy(hidden, weight, targets, softcap=9.0, **settings).backward()
    with pytest.raises(AssertionError, match="asked"):
        linear_cross_entropy(hidden, weight, targets, **settings)


def test_the_gradient_takes_over_what_is_held_in_its_memory(device, monkeypatch):
    """In the backward that nothing follows; one that may run again leaves it, and has the same bits."""
    made = []
    empty = strips.empty_held
    monkeypatch.setattr(strips, "empty_held", lambda *sizes: made.append(empty(*sizes)) or made[-1])
    hold(monkeypatch, 1, 2)
    hidden, weight, _, targets = operands(device, with_bias=False)

    def loss():
        return linear_cross_entropy(hidden, weight, targets, impl="cce_exact")

    first = loss()
    ((held, in_gradient),) = made
    assert held.numel() < in_gradient.numel() == weight.numel()
    kept = grad(first, (hidden, weight), retain_graph=True)
    own = grad(first, (hidden, weight))
    assert own[1].data_ptr() == in_gradient.data_ptr() != kept[1].data_ptr()
    assert all(torch.equal(*pair) for pair in zip(own, kept, strict=True))
    # A tensor as any other, without the graph that its memory comes from.
    assert own[1]._base is None
    assert not own[1].requires_grad
    own[1].add_(0.1 * weight)
    loss().backward()
    assert weight.grad.data_ptr() == made[-1][1].data_ptr()
    assert torch.equal(weight.grad, kept[1])
    # The hidden states' alone leave it as it is.
    second = loss()
    grad(second, hidden, retain_graph=True)
    assert torch.equal(grad(second, weight)[0], kept[1])


def held_in_gradient(device, monkeypatch):
    """A loss of which some is, its weight, and what the gradient of that must be."""
    hold(monkeypatch, 1, 2)
    hidden, weight, _, targets = operands(device, with_bias=False)
    loss = linear_cross_entropy(hidden, weight, targets, impl="cce_exact", reduction="sum")
    losses, _, right = exact(hidden, weight, None, targets)
    return loss, weight, grad(losses.sum(), right[1])[0]


def test_what_is_overwritten_is_not_begun_again_for_compiling(device, monkeypatch):
    """A kernel that is missing after the first launch is compiled in its turn."""
    made, ways = entry_gradients.strip_again, []

    def missing(*arguments):
        launch = made(*arguments)

        def noted(*numbers):
            ways.append(compiling.way.get())
            launch(*numbers)

        return noted

    monkeypatch.setattr(entry_gradients, "strip_again", missing)
    loss, weight, wanted = held_in_gradient(device, monkeypatch)
    token = compiling.way.set(compiling.Way.FIND)
    try:
        loss.backward()
    finally:
        compiling.way.reset(token)
    assert set(ways) == {compiling.Way.IN_TURN}
    assert far(weight.grad, wanted) < 1e-6


def test_a_backward_that_failed_is_not_begun_again(device, monkeypatch):
    """Its gradient is written where exponentials were."""

    def fail(*_):
        raise torch.OutOfMemoryError

    row_gradients = strip_operators.row_gradients
    loss, weight, wanted = held_in_gradient(device, monkeypatch)
    monkeypatch.setattr(strip_operators, "row_gradients", fail)
    with pytest.raises(torch.OutOfMemoryError):
        loss.backward()
    monkeypatch.setattr(strip_operators, "row_gradients", row_gradients)
    with pytest.raises(RuntimeError, match="compute the loss again"):
        loss.backward()
    # One that may run again leaves them.
    loss, weight, wanted = held_in_gradient(device, monkeypatch)
    monkeypatch.setattr(strip_operators, "row_gradients", fail)
    with pytest.raises(torch.OutOfMemoryError):
        loss.backward(retain_graph=True)
    monkeypatch.setattr(strip_operators, "row_gradients", row_gradients)
    loss.backward()
    assert far(weight.grad, wanted) < 1e-6


@pytest.mark.parametrize("way", ["frozen", "bias alone", "compiled", "hooked"])
def test_nothing_else_holds_a_gradients_memory(way, device, monkeypatch):
    found = []
    empty = strips.empty_held
    monkeypatch.setattr(strips, "empty_held", lambda *sizes: found.append(empty(*sizes)) or found[-1])
    hidden, weight, bias, targets = operands(device, tokens=300, vocabulary=2000, width=512)
    weight.requires_grad_(way in ("compiled", "hooked"))
    bias.requires_grad_(way != "frozen")

    def loss():
        return linear_cross_entropy(hidden, weight, targets, bias, impl="cce_exact", workspace_mib=1)

    # What moves activations to the host, for one, would move it too.
    with torch.autograd.graph.save_on_cpu() if way == "hooked" else nullcontext():
        (torch.compile(loss, backend="aot_eager") if way == "compiled" else loss)()
    assert found
    assert not any(in_gradient.numel() for _, in_gradient in found)


def test_a_checkpoint_holds_the_same_in_both_of_its_passes(device, monkeypatch):
    """Though a mode, as this one, sees the first of them alone: torch compares what each of them saves."""
    hold(monkeypatch, 1, 2)
    hidden, weight, bias, targets = operands(device)

    def loss(hidden):
        return linear_cross_entropy(hidden, weight, targets, bias, impl="cce_exact", reduction="sum")

    with FlopCounterMode(display=False):
        found = checkpoint(loss, hidden, use_reentrant=False)
    losses, _, right = exact(hidden, weight, bias, targets)
    for actual, wanted in zip(grad(found, (hidden, weight, bias)), grad(losses.sum(), right), strict=True):
        assert far(actual, wanted) < 1e-6


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("workspace_mib", [1, 128])
@pytest.mark.parametrize("tokens", [1, 130, 1024, 8192])
def test_what_is_held_in_a_gradient_is_before_its_own_rows(tokens, workspace_mib, dtype):
    for capability, vocabulary, features in itertools.product(((8, 6), (9, 0)), (1, 3000, 151_936), (8, 2048)):
        config = tuning._cuda_config(capability, dtype, "tf32x3")
        held = FOUND(tokens, vocabulary, features, dtype, 1, workspace_mib * 2**20, config)
        tiles = -(-vocabulary // config.forward_entries)
        rows = (tiles - held) * config.forward_entries
        assert held * division.tile_bytes(tokens, dtype, False, config) <= rows * features * dtype.itemsize
        assert held == 0 or tiles / division.LEAST_HELD <= held < tiles


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("workspace_mib", [1, 16, 128, 1536])
@pytest.mark.parametrize("tokens", [1, 130, 1024, 8192])
def test_what_is_held_fits_the_workspace(tokens, workspace_mib, dtype):
    """Beside what the forward takes, and the backward; and is no small part."""
    workspace = workspace_mib * 2**20
    for capability, vocabulary, features, sums in itertools.product(
        ((8, 6), (9, 0)), (1, 3000, 151_936), (8, 2048), (1, 3)
    ):
        config = tuning._cuda_config(capability, dtype, "tf32x3")
        sizes = tokens, vocabulary, features, dtype
        held = division.tiles_held(*sizes, sums, workspace, config)
        tiles = -(-vocabulary // config.forward_entries)
        assert held == 0 or tiles / division.LEAST_HELD <= held <= tiles
        if not held:
            continue
        left = workspace - held * division.tile_bytes(tokens, dtype, False, config)
        assert division.bytes_beside(tokens, tiles, features, False, sums, config) <= left
        hidden = torch.empty(tokens, features, dtype=dtype, device="meta")
        places, in_workspace = entry_gradients._division(hidden, left, config)
        taken = places * features * dtype.itemsize + in_workspace * division.tile_bytes(tokens, dtype, False, config)
        assert taken + (4 * tokens * features if dtype == torch.float16 else 0) <= left
        # Row blocks by themselves would be a program a launch, hundreds of launches.
        assert 2 * (places + config.row_block) >= tokens


def test_what_is_held_of_models():
    """Of Qwen's vocabulary, in bfloat16: nothing of a long batch by default, and all of it where there is room."""
    config = tuning._cuda_config((9, 0), torch.bfloat16, "ieee")
    for tokens, workspace_mib, held in ((8192, 128, 0), (8192, 1536, 363), (1024, 128, 235), (1024, 320, 594)):
        sizes = tokens, 151_936, 2048, torch.bfloat16
        assert division.tiles_held(*sizes, 1, workspace_mib * 2**20, config) == held
        # All states are copied at once, beside what is held too.
        left = workspace_mib * 2**20 - held * division.tile_bytes(tokens, torch.bfloat16, False, config)
        hidden = torch.empty(tokens, 2048, dtype=torch.bfloat16, device="meta")
        places, _ = entry_gradients._division(hidden, left, config)
        assert places == tokens


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("workspace", [16 * 2**20, 64 * 2**20, 128 * 2**20])
@pytest.mark.parametrize("tokens", [1, 130, 8192, 131_072])
def test_division_fits_the_workspace(tokens, workspace, dtype):
    """But for the least there is: states of a row block, and a tile; of float16 what is scaled comes to them."""
    config = tuning._cuda_config((9, 0), dtype, "tf32x3")
    for features in (512, 4096):
        hidden = torch.empty(tokens, features, dtype=dtype, device="meta")
        size = 2 if dtype == torch.bfloat16 else 4
        tile = config.forward_entries * -(-tokens // 128) * 128 * size
        of_block = min(tokens, 128) * features * hidden.element_size()
        places, tiles = entry_gradients._division(hidden, workspace, config)
        assert places == tokens or places % config.row_block == 0
        scaled = tokens * features * 4 if dtype == torch.float16 else 0
        taken = places * features * hidden.element_size() + tiles * tile
        assert taken + scaled <= workspace or (tiles == 1 and taken == of_block + tile)


def test_strips_cover_the_vocabulary_from_its_end(device):
    for tiles in (1, 2, 7, 594):
        for in_workspace in (1, 5, 100, 1000):
            for rows_a_row in (0.0, 0.01, 0.25, 2.0, 100.0):
                end = tiles
                for first, width, in_output in backward_strips(tiles, in_workspace, rows_a_row):
                    assert first + width == end
                    assert width >= 1
                    # In the rows that are not written yet, or in the workspace.
                    assert width <= (first * rows_a_row if in_output else in_workspace)
                    end = first
                assert end == 0
    assert backward_strips(10, 2, 1.0) == [
        BackwardStrip(5, 5, True),
        BackwardStrip(3, 2, False),
        BackwardStrip(1, 2, False),
        BackwardStrip(0, 1, False),
    ]


@pytest.mark.parametrize("width", [48, 41])
def test_descriptor_path_equals_pointer_path(width, device, monkeypatch):
    hidden, weight, bias, targets = operands(device, torch.float32, width=width)
    config = tuning.config_for(device, hidden.dtype)
    if not tuning.has_tma(torch.cuda.get_device_capability(device) if device.type == "cuda" else (9, 0)):
        pytest.skip("no copy engine")
    results, descriptors = [], []
    made = weight_product.in_blocks
    monkeypatch.setattr(weight_product, "in_blocks", lambda *args: descriptors.append(args) or made(*args))
    for tma in (False, True):
        changed = dataclasses.replace(config, tma=tma)
        monkeypatch.setattr(strip_operators, "config_for", lambda *_, changed=changed: changed)
        loss = linear_cross_entropy(hidden, weight, targets, bias, impl="cce_exact")
        results.append(grad(loss, (weight, bias)))
        assert bool(descriptors) == (tma and width == 48)
    for pointer, descriptor in zip(*results, strict=True):
        torch.testing.assert_close(pointer, descriptor, rtol=2 * torch.finfo(torch.float32).eps, atol=1e-6)
