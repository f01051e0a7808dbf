"""The walk over strips with a filter: what of the softmax the hidden gradient is made of, and the mean of the rest."""

import itertools
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch.autograd import grad

pytest.importorskip("triton")

from torchtune_lce import linear_cross_entropy
from torchtune_lce.inputs import filtering, validation
from torchtune_lce.kernels import division, dropped_mean, strips, tuning

# A card's row blocks and tiles are so many times as large as the interpreter's: as many more tokens and entries, whose
# shares are smaller, and what stands out does so by more.
DEVICE = torch.device("cpu" if tuning.is_interpreted() else "cuda")
SCALE = tuning.config_for(DEVICE, torch.float32).row_block // 32
EPS, LENGTH = (2.0**-7, 4) if SCALE == 1 else (2.0**-8, 8)
CCE = partial(linear_cross_entropy, impl="cce", filter_eps=EPS)


@pytest.fixture(autouse=True)
def slots_for_all(monkeypatch):
    """At a test's size more than a quarter of a strip's columns may be active: room for all, so that none is whole."""
    for module in (division, strips):
        monkeypatch.setattr(module, "ENTRIES_A_SLOT", 1)


@pytest.fixture
def small_strips(monkeypatch):
    """Pieces of two row blocks, a first strip of a tile and others of two."""
    monkeypatch.setattr(division, "FIRST_TILES", 1)
    monkeypatch.setattr(strips, "divide", lambda *args: division.Division(2 * args[-1].row_block, 2))


@pytest.fixture
def lists(monkeypatch):
    """(First entry, row block's columns or None for all of them) of each strip and row block."""
    found = []
    add_product = strips.add_product

    def spy(piece, strip, blocks, filters, totals, config):
        launch = add_product(piece, strip, blocks, filters, totals, config)

        def launch_and_look(number, first, tiles):
            launch(number, first, tiles)
            first_block, first_entry = piece.first // config.row_block, first * config.forward_entries
            waited = strip.waiting[number % 2, 0].tolist() if number else itertools.repeat(0)
            due, _, adds, _ = strip.due
            listed = torch.where(adds > 0, due, strip.waiting[(number + 1) % 2, 0]).tolist()
            states = zip(
                waited, listed, strip.due[1].tolist(), range(-(-piece.tokens // config.row_block)), strict=False
            )
            for start, end, whole, block in states:
                columns = None if whole else strip.entries[block, start:end].cpu() - first_entry
                found.append((first_block + block, first_entry, tiles * config.forward_entries, columns))

        return launch_and_look

    monkeypatch.setattr(strips, "add_product", spy)
    return found


def peaked(device, tokens=90, vocabulary=700, width=24, dtype=torch.float32, common=0.0):
    """Each target stands out by several nats; all weight rows share ``common`` times a row's length."""
    tokens, vocabulary = tokens * SCALE, vocabulary * SCALE
    weight = torch.randn(vocabulary, width) / width**0.5
    targets = torch.randint(vocabulary, (tokens,))
    hidden = LENGTH * weight[targets] + torch.randn(tokens, width)
    weight += common * F.normalize(torch.randn(width), dim=0)
    return hidden.to(device, dtype).requires_grad_(), weight.to(device, dtype), targets.to(device)


def right(hidden, weight, targets, bias=None, softcap=None):
    """Losses, and the gradient by hidden of their sum, in float64; and the softmax."""
    leaf = hidden.detach().double().requires_grad_()
    logits = F.linear(leaf, weight.double(), bias if bias is None else bias.double())
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    losses = F.cross_entropy(logits, targets, reduction="none")
    return losses, grad(losses.sum(), leaf)[0], logits.detach().softmax(-1)


def far(actual, exact) -> float:
    return ((actual.double() - exact).norm() / exact.norm()).item()


@pytest.mark.usefixtures("small_strips")
def test_what_is_left_out_is_below_the_threshold_and_known(device, lists):
    hidden, weight, targets = peaked(device)
    _, _, softmax = right(hidden, weight, targets)
    with filtering.recording() as records:
        CCE(hidden, weight, targets).backward()
    row_block = tuning.config_for(device, hidden.dtype).row_block
    kept = torch.zeros_like(softmax, dtype=torch.bool)
    for block, first, width, columns in lists:
        entries = torch.arange(width) if columns is None else columns
        # In order, each once.
        assert (entries.diff() > 0).all()
        entries = first + entries[first + entries < weight.shape[0]]
        kept[block * row_block : (block + 1) * row_block, entries.to(device)] = True
    left = softmax.masked_fill(kept, 0).scatter(1, targets[:, None], 0)
    assert 0 < left.max() < EPS
    assert 0.05 < kept.double().mean() < 0.9
    (record,) = records
    assert far(record.dropped_mass, left.sum(1)) < 1e-5
    assert record.dropped_mass.view(-1)[:row_block].mean() < 0.25
    blocks = -(-len(targets) // row_block)
    assert record.kept_fraction == kept[::row_block].sum().item() / (blocks * weight.shape[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, pytest.param(torch.bfloat16, marks=pytest.mark.gpu)])
@pytest.mark.parametrize(("softcap", "with_bias"), [(None, False), (9.0, True)])
@pytest.mark.usefixtures("small_strips")
def test_gradient_is_near_the_unfiltered_one(softcap, with_bias, dtype, device):
    hidden, weight, targets = peaked(device, dtype=dtype)
    bias = torch.randn(len(weight)).to(device, dtype) / 4 if with_bias else None
    losses, exact, _ = right(hidden, weight, targets, bias, softcap)
    found = CCE(hidden, weight, targets, bias, softcap=softcap, reduction="none")
    torch.testing.assert_close(found.double(), losses, rtol=1e-5, atol=1e-5)
    assert far(grad(found.sum(), hidden)[0], exact) < 0.06


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.usefixtures("small_strips")
def test_a_threshold_that_all_pass_drops_nothing(dtype, device):
    hidden, weight, targets = peaked(device, dtype=dtype)
    targets[::4] = -100
    results = []
    for settings in ({"filter_eps": 1e-30}, {"impl": "cce_exact"}):
        loss = CCE(hidden, weight, targets, **settings)
        results.append((loss.detach(), grad(loss, hidden)[0]))
    torch.testing.assert_close(*results, rtol=4 * torch.finfo(dtype).eps, atol=1e-6)


@pytest.mark.parametrize("softcap", [None, 5.0 * LENGTH])
@pytest.mark.usefixtures("small_strips")
def test_the_mean_of_what_is_left_out_goes_back(softcap, device, monkeypatch):
    """Where weight rows share a large part, as learnt ones do, dropping without it is wrong by that part."""
    hidden, weight, targets = peaked(device, tokens=150, vocabulary=900 if SCALE == 1 else 1500, common=8.0)
    _, exact, _ = right(hidden, weight, targets, softcap=softcap)

    def error():
        return far(grad(CCE(hidden, weight, targets, softcap=softcap, reduction="sum"), hidden)[0], exact)

    with_mean = error()
    find_means = dropped_mean.find_means

    def nothing(piece, dropped, *rest):
        find_means(piece, dropped, *rest)
        dropped.means.zero_()

    monkeypatch.setattr(strips, "find_means", nothing)
    assert with_mean < 0.1
    assert error() > 4 * with_mean


def test_the_mean_is_of_row_blocks_that_leave_something_out(device, monkeypatch):
    """Several share it, of which some may keep everything: here the first of each, as the beginnings of sequences."""
    monkeypatch.setattr(strips, "divide", lambda *args: division.Division(40 * args[-1].row_block, 2))
    row_block = tuning.config_for(device, torch.float32).row_block
    row_blocks = 2 * division.GROUPS.value + 2
    hidden, weight, targets = peaked(device, tokens=row_blocks * row_block // SCALE, common=8.0)
    is_flat = torch.arange(len(targets), device=device) // row_block % 3 == 0
    hidden = torch.where(is_flat[:, None], hidden.detach() / 100, hidden.detach()).requires_grad_()
    _, exact, _ = right(hidden, weight, targets)
    with filtering.recording() as records:
        (actual,) = grad(CCE(hidden, weight, targets, reduction="sum"), hidden)
    dropped = records[0].dropped_mass.view(-1)
    assert not dropped[is_flat].any()
    assert dropped[~is_flat].mean() > 0.02
    assert far(actual[~is_flat], exact[~is_flat]) < 0.06


def test_a_flat_softmax_is_kept_whole(device, small_strips, lists):
    hidden, weight, targets = peaked(device)
    hidden = (hidden.detach() / 100).requires_grad_()
    _, exact, _ = right(hidden, weight, targets)
    with filtering.recording() as records:
        (actual,) = grad(CCE(hidden, weight, targets, filter_eps=2.0**-7, reduction="sum"), hidden)
    assert far(actual, exact) < 1e-5
    assert records[0].kept_fraction == 1
    assert records[0].largest_dropped_mass == 0
    assert all(columns is None for *_, columns in lists)


def test_a_strip_with_more_columns_than_slots_is_kept_whole(device, small_strips, lists, monkeypatch):
    for module in (division, strips):
        monkeypatch.setattr(module, "ENTRIES_A_SLOT", 16)
    hidden, weight, targets = peaked(device)
    _, exact, _ = right(hidden, weight, targets)
    (actual,) = grad(CCE(hidden, weight, targets, filter_eps=2.0**-9, reduction="sum"), hidden)
    assert any(columns is None for *_, columns in lists)
    assert far(actual, exact) < 0.01


@pytest.mark.usefixtures("products_term_by_term", "small_strips")
def test_losses_have_the_bits_of_the_unfiltered_way_and_gradients_those_of_another_run(device):
    hidden, weight, targets = peaked(device)
    targets[::9] = -100
    runs = []
    for impl in ("cce", "cce", "cce_exact"):
        found = linear_cross_entropy(
            hidden, weight, targets, impl=impl, filter_eps=EPS, reduction="none", return_lse=True
        )
        runs.append((*(x.detach() for x in found), grad(found[0].sum(), hidden)[0]))
    assert all(torch.equal(*pair) for pair in zip(runs[0], runs[1], strict=True))
    assert all(torch.equal(*pair) for pair in zip(runs[0][:2], runs[2][:2], strict=True))
    assert not torch.equal(runs[0][2], runs[2][2])


@pytest.mark.usefixtures("small_strips")
def test_one_row_that_is_not_a_number_costs_its_neighbours_nothing(device):
    """Nor does one that overflows: neither has a vote that keeps everything, and the mean is of the others."""
    hidden, weight, targets = peaked(device)
    clean = CCE(hidden, weight, targets, reduction="none")
    (gradient,) = grad(clean.sum(), hidden)
    spoilt = hidden.detach().clone()
    spoilt[17, 3] = torch.nan
    spoilt.requires_grad_()
    with filtering.recording() as records:
        found = CCE(spoilt, weight, targets, reduction="none")
        (dirty,) = grad(found.sum(), spoilt)
    others = torch.arange(len(targets), device=device) != 17
    assert found[17].isnan()
    assert dirty[17].isnan().all()
    assert torch.equal(found[others], clean[others])
    assert far(dirty[others], gradient[others].double()) < 0.02
    assert records[0].kept_fraction < 0.9


@pytest.mark.usefixtures("small_strips")
def test_another_backward_with_other_upstream_gradients(device):
    hidden, weight, targets = peaked(device)
    losses, lse = CCE(hidden, weight, targets, filter_eps=1e-9, reduction="none", return_lse=True)
    leaf = hidden.detach().double().requires_grad_()
    logits = leaf @ weight.double().T
    exact = F.cross_entropy(logits, targets, reduction="none"), logits.logsumexp(1)
    for factors in ((1.0, 0.0), (0.0, 1.0), (-0.3, 2.0)):
        pulled = [factor * torch.linspace(0.5, 2, len(targets), device=device) for factor in factors]
        (actual,) = grad((losses, lse), hidden, pulled, retain_graph=True)
        (wanted,) = grad(exact, leaf, [x.double() for x in pulled], retain_graph=True)
        assert far(actual, wanted) < 1e-5


def test_operator_keeps_the_rules(device):
    hidden, weight, targets = peaked(device, tokens=40, vocabulary=200)
    arguments = (hidden, weight, None, targets, -100, None, 0.5, EPS, False, 0, True, False, 64)
    torch.library.opcheck(torch.ops.torchtune_lce.strip_cross_entropy.default, arguments)


def test_samples_of_the_pieces_cover_the_vocabulary():
    """Together, where there are enough of them; a small vocabulary is looked at whole by each."""
    for pieces, tiles in itertools.product((1, 3, 4, 8, 64), (1, 63, 594)):
        samples = [division.Sample.of(piece, pieces, 16, tiles) for piece in range(pieces)]
        seen = [set(range(sample.first, tiles, sample.every)) for sample in samples]
        assert all(
            len(tiles_seen) == sample.tiles >= min(tiles, 60) for tiles_seen, sample in zip(seen, samples, strict=True)
        )
        if pieces >= samples[0].every:
            assert set().union(*seen) == set(range(tiles))


@pytest.mark.parametrize("used", [1, 31, 32, 64])
@pytest.mark.usefixtures("small_strips")
def test_few_tokens_in_use(used, device):
    """Row blocks without any have nothing in lists, samples or counts."""
    hidden, weight, targets = peaked(device, tokens=130)
    used = used * SCALE if used > 1 else used
    targets[used:] = -100
    with filtering.recording() as records:
        loss = CCE(hidden, weight, targets, reduction="sum")
        (actual,) = grad(loss, hidden)
    losses, exact, _ = right(hidden[:used], weight, targets[:used])
    torch.testing.assert_close(loss.double(), losses.sum(), rtol=1e-5, atol=1e-5)
    assert far(actual[:used], exact) < 0.05
    assert not actual[used:].any()
    assert records[0].kept_fraction < 0.5


@pytest.mark.usefixtures("small_strips")
def test_a_target_that_names_no_entry_has_no_vote(device, lists, monkeypatch):
    """Of what is kept: its row block's other tokens would have other gradients for its sake."""
    hidden, weight, targets = peaked(device)
    monkeypatch.setattr(validation, "is_readable", lambda _: False)
    CCE(hidden, weight, targets)
    found = [columns for *_, columns in lists]
    lists.clear()
    # The target is one of what is kept, its own and others'.
    spoilt = targets.clone()
    spoilt[5] = len(weight) + 3
    CCE(hidden, weight, spoilt)
    for mine, others in zip((columns for *_, columns in lists), found, strict=True):
        assert (mine is None) == (others is None)
        assert mine is None or set(mine.tolist()) <= set(others.tolist())


@pytest.mark.parametrize("trained", [False, True])
def test_nothing_is_recorded_without_gradients(trained, device):
    hidden, weight, targets = peaked(device)
    weight.requires_grad_(trained)
    with filtering.recording() as records:
        with torch.no_grad():
            CCE(hidden, weight, targets)
        assert records == []
        CCE(hidden, weight, targets)
    assert len(records) == 1
