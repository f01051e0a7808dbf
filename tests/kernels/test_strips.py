"""The walk over strips: loss and hidden gradient in the forward; unfiltered."""

import dataclasses
import itertools
import math
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch.autograd import grad

pytest.importorskip("triton")

from torchtune_lce import linear_cross_entropy
from torchtune_lce.inputs import filtering, validation
from torchtune_lce.kernels import division, exponentials, overflow, strip_operators, strip_product, strips, tuning
from torchtune_lce.kernels.operands import Operands
from torchtune_lce.kernels.places import compact
from torchtune_lce.kernels.reference_logits import reference_logits

EXACT = partial(linear_cross_entropy, impl="cce_exact")
MIB = 2**20


@pytest.fixture
def calls(monkeypatch):
    """Pieces of tokens and thresholds, as :func:`strips.walk` gets them."""
    made = []
    walk = strips.walk

    def spy(piece, *rest):
        made.append((piece, rest[-2]))
        walk(piece, *rest)

    monkeypatch.setattr(strips, "walk", spy)
    return made


@pytest.fixture
def small_strips(monkeypatch):
    """Pieces of two row blocks and strips of two tiles, whatever the workspace holds."""

    def divide(*arguments):
        return division.Division(2 * arguments[-1].row_block, 2)

    monkeypatch.setattr(strips, "divide", divide)


@pytest.mark.parametrize(
    ("impl", "eps", "filters"),
    [
        ("cce", None, False),
        ("cce", 0.0, False),
        ("cce", 0.25, True),
        ("cce_exact", 0.25, False),
        ("cce_kahan_full_e", 0.25, False),
        ("cce_kahan_full_c", 0.25, True),
    ],
)
def test_walks_and_filters_what_the_preset_does(impl, eps, filters, device, calls):
    hidden, weight, targets = inputs(device, tokens=5, vocabulary=90)
    linear_cross_entropy(hidden, weight, targets, impl=impl, filter_eps=eps).backward()
    ((_, found),) = calls
    assert found == (0.25 if filters else None)
    calls.clear()
    with torch.no_grad():
        linear_cross_entropy(hidden, weight, targets, impl=impl, filter_eps=eps)
    linear_cross_entropy(hidden.detach(), weight.clone().requires_grad_(), targets, impl=impl, filter_eps=eps)
    assert not calls
    # A filter with a trained projection goes by tiles.
    linear_cross_entropy(hidden, weight.clone().requires_grad_(), targets, impl=impl, filter_eps=eps)
    bias = torch.zeros(90, device=device, requires_grad=True)
    linear_cross_entropy(hidden, weight, targets, bias, impl=impl, filter_eps=eps)
    by_tiles = impl != "cce_exact" and eps
    assert [found for _, found in calls] == ([] if by_tiles else [None, None])


def inputs(device, tokens=70, vocabulary=200, width=24, dtype=torch.float32, scale=2.0):
    hidden = torch.randn(tokens, width).to(device, dtype).requires_grad_()
    weight = (torch.randn(vocabulary, width) * (scale / width**0.5)).to(device, dtype)
    return hidden, weight, torch.randint(0, vocabulary, (tokens,), device=device)


def right(hidden, weight, targets, bias=None, softcap=None):
    """Losses, log-sum-exps and gradients by hidden of their sums, in float64; a loss near 0 from the other entries."""
    leaf = hidden.detach().double().requires_grad_()
    logits = F.linear(leaf, weight.double(), bias if bias is None else bias.double())
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    own = logits.gather(1, targets[:, None])
    others = logits.scatter(1, targets[:, None], -torch.inf)
    losses = F.softplus((others - own).logsumexp(1), threshold=700)
    return losses, logits.logsumexp(1), leaf


def far(actual, exact) -> float:
    return ((actual.double() - exact).norm() / exact.norm()).item()


def with_losses(device, losses, vocabulary=300, width=64, dtype=torch.float32):
    """Inputs whose tokens have these losses: each hidden state is along its target's weight row, or against it."""
    weight = F.normalize(torch.randn(vocabulary, width), dim=-1)
    targets = torch.arange(len(losses))
    hidden = torch.empty(len(losses), width)
    for token, loss in enumerate(losses):
        low, high = -400.0, 400.0
        for _ in range(60):
            scale = (low + high) / 2
            logits = (scale * weight[token].double()) @ weight.double().T
            low, high = (scale, high) if F.cross_entropy(logits, targets[token]) > loss else (low, scale)
        hidden[token] = scale * weight[token]
    return hidden.to(device, dtype).requires_grad_(), weight.to(device, dtype), targets.to(device)


@pytest.mark.parametrize("softcap", [None, 60.0])
def test_confident_tokens_cost_no_digits(softcap, device):
    """1 - p from 1e-1 to 1e-12: loss and gradient are what the other entries have, the target's own p in neither."""
    hidden, weight, targets = with_losses(device, [10.0**-power for power in range(1, 13)])
    losses, _, leaf = right(hidden, weight, targets, softcap=softcap)
    found = EXACT(hidden, weight, targets, softcap=softcap, reduction="none")
    # Logits of 50 are off by half a rounding each.
    assert ((found.double() - losses) / losses).abs().max() < 4e-5
    for actual, exact in zip(grad(found.sum(), hidden)[0], grad(losses.sum(), leaf)[0], strict=True):
        assert far(actual, exact) < 4e-5


@pytest.mark.parametrize("dtype", [torch.float16, pytest.param(torch.bfloat16, marks=pytest.mark.gpu)])
def test_confident_tokens_in_16_bits(dtype, device):
    """Each row is off by what its gradient is rounded by, not by a rounding of p, which is larger than all of it.

    The loss is scaled, as float16 needs.
    """
    hidden, weight, targets = with_losses(device, [10.0**-power for power in range(1, 9)], dtype=dtype)
    losses, _, leaf = right(hidden, weight, targets)
    scale = 1 / losses.detach()
    found = EXACT(hidden, weight, targets, reduction="none")
    assert ((found.double() - losses) / losses).abs().max() < 4e-5
    (actual,), (exact,) = grad((found * scale).sum(), hidden), grad((losses * scale).sum(), leaf)
    for mine, wanted in zip(actual, exact, strict=True):
        # E, the value kept, and the result are rounded.
        assert far(mine, wanted) < 2 * torch.finfo(dtype).eps


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, pytest.param(torch.bfloat16, marks=pytest.mark.gpu)])
def test_losses_of_12_to_100(dtype, device):
    """The sum over the other entries is e^loss; where the sample does not show the row's maximum, it overflows."""
    hidden, weight, targets = with_losses(device, [12, 20, 40, 45, 60, 66, 70, 80, 88, 90, 100], dtype=dtype)
    losses, log_sums, leaf = right(hidden, weight, targets)
    found, lse = EXACT(hidden, weight, targets, reduction="none", return_lse=True)
    # Logits of 100 are off by a rounding or two.
    assert ((found.double() - losses) / losses).abs().max() < 2e-6
    assert ((lse.double() - log_sums).abs() / losses).max() < 2e-6
    # The log-sum-exp's gradient alone is small where the target is unlikely: it must not come from a difference.
    for pulled, exact in ((found, losses), (lse, log_sums), (found - lse, losses - log_sums)):
        actual, wanted = grad(pulled.sum(), hidden, retain_graph=True)[0], grad(exact.sum(), leaf, retain_graph=True)[0]
        for mine, row in zip(actual, wanted, strict=True):
            assert far(mine, row) < 4 * torch.finfo(dtype).eps + 2e-5


@pytest.fixture
def blind_sample(monkeypatch):
    """A reference that is the target's logit alone: what the sample would spare is done again."""

    def blind(*arguments):
        logits = reference_logits(*arguments)
        logits[1] = logits[0]
        return logits

    monkeypatch.setattr(strips, "reference_logits", blind)


@pytest.mark.parametrize("softcap", [None, 300.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, pytest.param(torch.bfloat16, marks=pytest.mark.gpu)])
def test_rows_that_overflow_are_done_again(dtype, softcap, device, blind_sample):
    """And their neighbours keep their bits."""
    losses = [1, 12, 60, 65, 68, 70, 80, 88, 89, 100, 2]
    hidden, weight, targets = with_losses(device, losses, dtype=dtype)
    bias = torch.randn(len(weight)).to(device, dtype)
    exact, log_sums, leaf = right(hidden, weight, targets, bias, softcap)
    assert exact.max() > 75
    found, lse = EXACT(hidden, weight, targets, bias, softcap=softcap, reduction="none", return_lse=True)
    assert ((found.double() - exact) / exact).abs().max() < 2e-6
    assert (lse.double() - log_sums).abs().max() < 2e-4
    (actual,), (wanted,) = grad((found + lse).sum(), hidden), grad((exact + log_sums).sum(), leaf)
    for mine, row in zip(actual, wanted, strict=True):
        assert far(mine, row) < 4 * torch.finfo(dtype).eps + 1e-5
    calm = torch.tensor([0, 1, 10], device=device)
    alone = EXACT(hidden[calm], weight, targets[calm], bias, softcap=softcap, reduction="none")
    if device.type == "cuda":
        assert torch.equal(alone, found[calm])


def test_maxima_stay_within_their_memory(device, blind_sample, monkeypatch):
    """However many programs share a small vocabulary."""
    room = []
    run = overflow.launch

    def spy(kernel, grid, arguments, **constants):
        if kernel is overflow._maximum_kernel:
            # In a share of its own each, as many as a card would have.
            _, shares = grid
            room.append(arguments[6].numel() - shares * arguments[0].shape[0])
        run(kernel, grid, arguments, **constants)

    monkeypatch.setattr(overflow, "programs", lambda _: 132)
    monkeypatch.setattr(overflow, "launch", spy)
    hidden, weight, targets = with_losses(device, [1, 12, 80, 2])
    exact, *_ = right(hidden, weight, targets, None, None)
    found = EXACT(hidden, weight, targets, reduction="none")
    assert room
    assert min(room) >= 0
    assert far(found, exact) < 1e-6


MASKS = (-math.inf, torch.finfo(torch.float32).min)


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("removed", [slice(0, 256), slice(1, None, 2), slice(3, 300)])
def test_entries_that_a_bias_removes(removed, mask, device):
    """Be they whole tiles, or all that the sample looks at; they have no share in anything."""
    hidden, weight, _ = inputs(device, tokens=30, vocabulary=301)
    bias = torch.randn(301, device=device)
    bias[removed] = mask
    left = (bias > -1e30).nonzero()[:, 0]
    place = torch.arange(30, device=device) % len(left)
    losses, log_sums, leaf = right(hidden, weight[left], place, bias[left])
    found, lse = EXACT(hidden, weight, left[place], bias, reduction="none", return_lse=True)
    assert far(found, losses) < 1e-6
    assert far(lse, log_sums) < 1e-6
    (actual,), (exact,) = grad((found + 2 * lse).sum(), hidden), grad((losses + 2 * log_sums).sum(), leaf)
    assert far(actual, exact) < 1e-6


def test_targets_that_are_masked(device):
    """As torch has it: -inf gives a loss of inf and the least finite number one near it, and both finite gradients."""
    hidden, weight, targets = inputs(device, tokens=4, vocabulary=301)
    bias = torch.zeros(301, device=device)
    targets[:] = torch.tensor([5, 300, 7, 9])
    bias[5], bias[300] = MASKS
    leaf = hidden.detach().requires_grad_()
    wanted = F.cross_entropy(F.linear(leaf, weight, bias), targets, reduction="none")
    found = EXACT(hidden, weight, targets, bias, reduction="none")
    assert found[0] == torch.inf
    assert 3e38 < found[1] < torch.inf
    torch.testing.assert_close(found[2:], wanted[2:])
    (actual,) = grad(found.sum(), hidden)
    (exact,) = grad(wanted.sum(), leaf)
    assert exact.isfinite().all()
    torch.testing.assert_close(actual, exact, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("mask", MASKS)
def test_a_vocabulary_that_is_masked_alike(mask, device):
    """By the least finite number it is flat; by -inf there is no softmax, and the log-sum-exp is -inf."""
    hidden, weight, targets = inputs(device, tokens=5, vocabulary=300)
    bias = torch.full((300,), mask, device=device)
    found, lse = EXACT(torch.zeros_like(hidden).requires_grad_(), weight, targets, bias, return_lse=True)
    if mask == -math.inf:
        assert found.isnan()
        assert (lse == -torch.inf).all()
    else:
        torch.testing.assert_close(found.item(), math.log(300))


@pytest.mark.parametrize("common", [-3e10, 2e9, torch.finfo(torch.float32).min / 4])
def test_a_common_logit_as_large_as_a_mask(common, device):
    """As tensor parallelism gives a rank whose entries are all masked: no digit of the rest is left, so it is flat."""
    hidden, weight, targets = inputs(device, tokens=5, vocabulary=300)
    bias = torch.full((300,), common, device=device)
    loss, lse = EXACT(hidden, weight, targets, bias, return_lse=True)
    torch.testing.assert_close(loss.item(), math.log(300), rtol=1e-6, atol=0)
    torch.testing.assert_close(lse, torch.full_like(lse, common))
    (gradient,) = grad(loss, hidden)
    torch.testing.assert_close(gradient, (weight.mean(0) - weight[targets]) / 5)


@pytest.mark.parametrize("place", ["target", "sampled", "other"])
def test_a_logit_of_infinity(place, device):
    """No loss can be told, and the log-sum-exp is infinite, as torch has it; the row beside it has its own."""
    hidden, weight, targets = inputs(device, tokens=2, vocabulary=300)
    bias = torch.zeros(300, device=device)
    targets[:] = 150
    # Entries 0, 1, 2, 3, 4, 5 and 7 of the first eight are sampled.
    bias[{"target": 150, "sampled": 0, "other": 6}[place]] = torch.inf
    found, lse = EXACT(hidden, weight, targets, bias, reduction="none", return_lse=True)
    assert found.isnan().all()
    assert (lse == torch.inf).all()


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_not_a_number_is_not_swallowed(value, device, small_strips):
    hidden, weight, targets = inputs(device, tokens=40, vocabulary=301)
    clean = EXACT(hidden, weight, targets, reduction="none")
    (gradient,) = grad(clean.sum(), hidden)
    spoilt = hidden.detach().clone()
    spoilt[17, 3] = value
    spoilt.requires_grad_()
    dirty = EXACT(spoilt, weight, targets, reduction="none")
    others = torch.arange(40, device=device) != 17
    assert not dirty[17].isfinite()
    assert torch.equal(dirty[others], clean[others])
    (found,) = grad(dirty.sum(), spoilt)
    assert found[17].isnan().any()
    assert torch.equal(found[others], gradient[others])
    for row in (300, 0, 6):
        spoilt = weight.clone()
        spoilt[row, 3] = value
        # Infinite products of both signs, or NaN.
        loss = EXACT(hidden, spoilt, targets)
        assert not loss.isfinite()
        assert grad(loss, hidden)[0].isnan().any()
    targets[17] = -100
    ignored = EXACT(
        hidden.detach().index_fill(0, torch.tensor([17], device=device), value).requires_grad_(), weight, targets
    )
    assert ignored.isfinite()


def test_another_backward_with_other_upstream_gradients(device):
    """Each is right, and the first again has the bits that it had."""
    hidden, weight, targets = inputs(device)
    targets[3:20] = -100
    results = EXACT(hidden, weight, targets, reduction="none", softcap=20.0, return_lse=True)
    safe = targets.where(targets != -100, 0)
    *exact, leaf = right(hidden, weight, safe, softcap=20.0)
    used = targets != -100
    found = {}
    upstreams = [(1.0, 0.0), (0.0, 1.0), (1.0, -1.0), (-0.3, 2.0), (1.0, 0.0)]
    for number, factors in enumerate(upstreams):
        pulled = [factor * torch.linspace(0.5, 2, len(targets), device=device) for factor in factors]
        (actual,) = grad(results, hidden, pulled, retain_graph=True)
        (wanted,) = grad(exact, leaf, [x.double() * used for x in pulled], retain_graph=True)
        assert far(actual, wanted) < 1e-6
        assert not actual[~used].any()
        found[number] = actual
    assert torch.equal(found[0], found[4])
    (lse_alone,) = grad(results[1].sum(), hidden, retain_graph=True)
    assert far(lse_alone, grad((exact[1] * used).sum(), leaf, retain_graph=True)[0]) < 1e-6
    assert not grad(results[0].sum() * 0, hidden)[0].any()


DIVISIONS = (division.Division(32, 1), division.Division(96, 3), division.Division(64, 100))


@pytest.mark.usefixtures("products_term_by_term")
def test_a_token_has_the_same_bits_in_any_division_and_company(device, monkeypatch):
    hidden, weight, targets = inputs(device, tokens=90, vocabulary=333)
    targets[::9] = -100
    bias = torch.randn(333, device=device)

    def results(rows):
        leaf = hidden.detach()[rows].requires_grad_()
        found = EXACT(leaf, weight, targets[rows], bias, reduction="none", softcap=15.0, return_lse=True)
        return *(x.detach() for x in found), grad(found[0].sum(), leaf)[0]

    everything = results(slice(None))
    assert all(torch.equal(*pair) for pair in zip(everything, results(slice(None)), strict=True))
    for rows in (slice(40, 41), slice(31, 70), torch.randperm(90)):
        for whole, part in zip(everything[:2], results(rows)[:2], strict=True):
            assert torch.equal(whole[rows], part)
    for parts in DIVISIONS:
        parts = dataclasses.replace(parts, tokens=parts.tokens * (4 if device.type == "cuda" else 1))
        monkeypatch.setattr(strips, "divide", lambda *_, parts=parts: parts)
        divided = results(slice(None))
        for whole, part in zip(everything[:2], divided[:2], strict=True):
            assert torch.equal(whole, part)
        assert far(divided[2], everything[2].double()) < 1e-6


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("width", [48, 41])
def test_descriptor_path_equals_pointer_path(width, dtype, device, monkeypatch, small_strips):
    """Ragged tokens, entries and features; by rows of no whole 16 bytes there are pointers alone."""
    hidden, weight, targets = inputs(device, tokens=77, vocabulary=333, width=width, dtype=dtype)
    targets[60:70] = -100
    config = tuning.config_for(device, dtype)
    if not tuning.has_tma(torch.cuda.get_device_capability(device) if device.type == "cuda" else (9, 0)):
        pytest.skip("no copy engine")
    results, descriptors = [], []
    made = exponentials.in_blocks
    monkeypatch.setattr(exponentials, "in_blocks", lambda *args: descriptors.append(args) or made(*args))
    for tma in (False, True):
        monkeypatch.setattr(strip_operators, "config_for", lambda *_, tma=tma: dataclasses.replace(config, tma=tma))
        loss = EXACT(hidden, weight, targets, reduction="none")
        results.append((loss.detach(), grad(loss.sum(), hidden)[0]))
        assert bool(descriptors) == (tma and width == 48)
    for pointer, descriptor in zip(*results, strict=True):
        torch.testing.assert_close(pointer, descriptor, rtol=2 * torch.finfo(dtype).eps, atol=1e-6)


@pytest.mark.parametrize("filters", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("workspace_mib", [1, 3, 128, 4096])
@pytest.mark.parametrize("tokens", [1, 130, 8192, 131_072])
def test_division_fits_the_workspace_and_covers_everything(tokens, workspace_mib, dtype, filters):
    """But for the least there is, a row block and a tile."""
    for capability, vocabulary, features in itertools.product(
        ((8, 0), (8, 6), (9, 0)), (1, 50_021, 256_000), (8, 4096)
    ):
        config = tuning._cuda_config(capability, dtype, "tf32x3")
        parts = division.divide(tokens, vocabulary, features, dtype, filters, 1, workspace_mib * MIB, 132, config)
        tiles = -(-vocabulary // config.forward_entries)
        assert parts.tokens % config.row_block == 0
        assert 1 <= parts.tiles <= tiles
        places = min(parts.tokens, tokens)
        taken = division.bytes_beside(places, tiles, features, filters, 1, config)
        taken += parts.tiles * division.tile_bytes(places, dtype, filters, config)
        own = parts.tiles * config.forward_entries // division.ENTRIES_A_SLOT
        if filters:
            assert own <= parts.slots <= max(own, vocabulary // division.ENTRIES_A_WAITING_SLOT)
            assert parts.slots % 16 == 0
            taken += (parts.slots - own) * -(-places // config.row_block) * division.slot_bytes(dtype, config)
        else:
            assert not parts.slots
        assert taken <= workspace_mib * MIB or (parts.tokens, parts.tiles) == (config.row_block, 1)


@pytest.mark.parametrize(
    ("tokens", "filters", "width", "strips"), [(1024, False, 231, 3), (1024, True, 148, 4), (8192, True, 74, 8)]
)
def test_strips_are_few_and_fill_the_card(tokens, filters, width, strips):
    """Of Qwen's vocabulary in 128 MiB, by 132 programs; with a filter beside the narrow one that comes first."""
    config = tuning._cuda_config((9, 0), torch.bfloat16, "ieee")
    parts = division.divide(tokens, 151_936, 2048, torch.bfloat16, filters, 1, 128 * MIB, 132, config)
    assert parts.tiles == width
    assert -(-(594 - filters * division.FIRST_TILES) // width) == strips
    row_blocks = min(parts.tokens, tokens) // config.row_block
    assert -width * row_blocks % 132 < row_blocks, "a tile more would be another round"


def test_where_the_workspace_is_small_tokens_are_taken_in_pieces(device, calls, monkeypatch):
    """Of a hundredth of a MiB, since it takes many tokens to fill one."""
    hidden, weight, targets = inputs(device, tokens=100, vocabulary=130, width=64)
    targets[::3] = -100
    whole = EXACT(hidden, weight, targets)
    assert len(calls) == 1
    calls.clear()
    divide = strips.divide
    monkeypatch.setattr(strips, "divide", lambda *args: divide(*args[:6], args[6] // 100, *args[7:]))
    loss = EXACT(hidden, weight, targets, workspace_mib=1)
    assert len(calls) > 1 or tuning.config_for(device, hidden.dtype).row_block > 100
    torch.testing.assert_close(grad(loss, hidden), grad(whole, hidden), rtol=1e-5, atol=1e-7)


def test_filtering_left_out_nothing(device):
    hidden, weight, targets = inputs(device)
    targets[::3] = -100
    with filtering.recording() as records:
        EXACT(hidden, weight, targets).backward()
    (record,) = records
    assert record.kept_fraction <= 1
    assert record.largest_dropped_mass == 0
    assert record.tiles[1] > 0


@pytest.mark.parametrize(("softcap", "with_bias"), [(None, False), (9.0, True)])
def test_operators_keep_the_rules(softcap, with_bias, device):
    hidden, weight, targets = inputs(device, tokens=20)
    targets[:4] = -100
    bias = torch.randn(200, device=device) if with_bias else None
    for is_trained in (False, True):
        asked = is_trained, 0, True, softcap is not None, 64
        arguments = (hidden, weight, bias, targets, -100, softcap, 0.5, None, *asked)
        torch.library.opcheck(torch.ops.torchtune_lce.strip_cross_entropy.default, arguments)
        weight.requires_grad_()


def test_compiled_into_one_graph(device):
    def loss_and_lse(hidden, weight, targets):
        loss, lse = EXACT(hidden * 2, weight, targets, softcap=9.0, shift=1, return_lse=True)
        return loss * 3 + lse.mean()

    hidden, weight, targets = inputs(device)
    torch._dynamo.reset()
    traced = torch.compile(loss_and_lse, fullgraph=True, backend="aot_eager")
    pair = (grad(function(hidden, weight, targets), hidden)[0] for function in (traced, loss_and_lse))
    torch.testing.assert_close(*pair, rtol=1e-5, atol=1e-7)


def test_second_derivative_is_refused(device):
    hidden, weight, targets = inputs(device, tokens=5)
    (gradient,) = grad(EXACT(hidden, weight, targets), hidden, create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative.*impl='reference'"):
        grad(gradient.square().sum(), hidden)


@pytest.mark.gpu
@pytest.mark.parametrize("by_library", [False, True])
def test_second_products_on_a_card(by_library, device, monkeypatch):
    """Ragged, and with pieces; cuBLAS multiplies ignored tokens too, whatever is in their rows."""
    monkeypatch.setattr(strip_product, "LEAST_FILL", 2.0 if by_library else 0.0)
    hidden, weight, targets = inputs(device, tokens=3001, vocabulary=20_011, width=520, dtype=torch.bfloat16)
    targets[::3] = -100
    safe, used = targets.where(targets != -100, 0), targets != -100
    losses, _, leaf = right(hidden, weight, safe)
    (exact,) = grad((losses * used).sum(), leaf)
    for workspace_mib in (4, 128):
        loss = EXACT(hidden, weight, targets, reduction="sum", workspace_mib=workspace_mib)
        (actual,) = grad(loss, hidden)
        assert far(loss.detach(), (losses * used).sum()) < 1e-6
        # E and the result are rounded.
        assert far(actual, exact) < torch.finfo(torch.bfloat16).eps / 2
        (again,) = grad(EXACT(hidden, weight, targets, reduction="sum", workspace_mib=workspace_mib), hidden)
        assert torch.equal(actual, again)


@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize("impl", ["cce", "cce_exact"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_a_target_that_names_no_entry_spoils_its_token_alone(dtype, impl, trained, device, monkeypatch):
    """Its loss, log-sum-exp and the gradient of either, of a token whose logits are infinite too."""
    monkeypatch.setattr(validation, "is_readable", lambda _: False)
    hidden, weight, targets = inputs(device, dtype=dtype)
    with torch.no_grad():
        hidden[40] = 0
        hidden[40, 0] = torch.inf
        weight[:, 0].abs_()
    weight.requires_grad_(trained)
    bad = torch.tensor([3, 40, 69], device=device)
    targets[bad] = torch.tensor([-1, 200, 2**40], device=device)
    spoilt = torch.zeros(70, dtype=torch.bool, device=device).index_fill_(0, bad, True)
    settings = {"impl": impl, "reduction": "none", "return_lse": True, "z_loss": 1e-4}
    without = linear_cross_entropy(hidden, weight, targets.masked_fill(spoilt, -100), **settings)
    for result, expected in zip(linear_cross_entropy(hidden, weight, targets, **settings), without, strict=True):
        assert torch.equal(result.isnan(), spoilt)
        torch.testing.assert_close(result[~spoilt], expected[~spoilt])
        (d_hidden,) = grad(result.sum(), hidden, retain_graph=True)
        assert torch.equal(d_hidden.isnan().any(1), spoilt)
        torch.testing.assert_close(d_hidden[~spoilt], grad(expected.sum(), hidden, retain_graph=True)[0][~spoilt])


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize(("tokens", "width"), [(384, 256), (333, 1000)])
def test_reference_logits_on_a_card(tokens, width, dtype, device):
    """Each is the float64 product to its rounding, in every run the same: a pipeline's race shows as neither."""
    hidden, weight, targets = inputs(device, tokens=tokens, vocabulary=1024, width=width, dtype=dtype)
    operands = Operands(hidden.detach(), weight, None, None, None, None)
    rows, _, count, _ = compact(targets, -100, 1024)
    config = tuning.config_for(device, dtype)
    exact = (hidden.detach().double() * weight[targets].double()).sum(1)
    first = None
    for _ in range(5):
        states = torch.empty_like(hidden)
        found = reference_logits(operands, targets, rows, count, states, config)
        assert (found[0].double() - exact).abs().max() < 2e-5
        assert torch.equal(found[0], found[1])
        assert (found[2] >= 1).all()
        assert torch.equal(states, hidden)
        first = found if first is None else first
        assert torch.equal(found, first)
