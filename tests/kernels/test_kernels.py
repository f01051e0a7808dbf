"""The Triton kernels from inside: what the forward records, what the plan keeps, and how the backward cuts its work."""

import dataclasses
import math
import random
from types import SimpleNamespace

import pytest
import torch
from calls import compute
from packaging.version import Version
from torch.utils._python_dispatch import TorchDispatchMode

pytest.importorskip("triton")
import triton

from torchtune_lce import functional
from torchtune_lce.inputs import filtering
from torchtune_lce.inputs.options import AUTO_FROZEN, AUTO_TRAINED, Options
from torchtune_lce.kernels import autograd, division, forward, launching, plan, tuning
from torchtune_lce.kernels.operands import Operands, Tail

EPS = 2.0**-8
# Rows of whole 16 bytes in 16 bits, as the copy engine takes them. Triton 3.4's interpreter counts elements as bytes.
NARROW, WIDE = (48, 112) if Version(triton.__version__) < Version("3.5") else (40, 104)


@pytest.fixture(autouse=True)
def _sparse(monkeypatch):
    """Data this small keep most of their tiles; all of them would then be computed."""
    monkeypatch.setattr(plan, "DENSE_FRACTION", 1.0)


def peaked(device, tokens=150, vocabulary=700, width=32, dtype=torch.float32):
    """Hidden states, a weight and targets whose softmax is large on few entries, scattered over the vocabulary."""
    hidden = torch.randn(tokens, width)
    weight = torch.randn(vocabulary, width) * 0.2
    hidden[:, 0] = 4
    weight[:, 0] = torch.linspace(-3, 0, vocabulary)[torch.randperm(vocabulary)]
    targets = torch.randint(0, vocabulary, (tokens,))
    return hidden.to(device, dtype), weight.to(device, dtype), targets.to(device)


def require_copy_engine(device):
    """The interpreter plays a card that has one."""
    capability = torch.cuda.get_device_capability(device) if device.type == "cuda" else (9, 0)
    if not tuning.has_tma(capability):
        pytest.skip("a card without a copy engine")


def softmax_of(hidden, weight):
    return torch.softmax(hidden.double() @ weight.double().T, -1)


def run_forward(hidden, weight, targets, used=None, eps=EPS):
    config = tuning.config_for(hidden.device, hidden.dtype)
    count = torch.tensor([len(hidden) if used is None else used], dtype=torch.int32, device=hidden.device)
    activity = autograd._empty_activity(len(hidden), len(weight), config, hidden.device)
    total = torch.empty(len(hidden), 2, device=hidden.device)
    target_logit = torch.empty(len(hidden), device=hidden.device)
    forward.lse_and_target_logit(
        Operands(hidden, weight, None, None, None, None),
        targets,
        count,
        activity,
        math.log2(eps),
        total,
        target_logit,
        None,
        None,
    )
    return config, count, activity, total.sum(1), target_logit


def no_tiles(device):
    return torch.zeros(2, dtype=torch.int64, device=device)


def unpacked(activity, row_blocks, vocabulary):
    """[row blocks, V] bool from the packed words."""
    words = activity.words[:row_blocks].cpu().view(row_blocks, -1, activity.tile // 32)
    bits = (words[:, :, None, :] >> torch.arange(32)[None, None, :, None]) & 1
    return bits.reshape(row_blocks, -1)[:, :vocabulary].bool()


def test_log_sum_exp_and_target_logit(device):
    hidden, weight, targets = peaked(device)
    weight[targets[:40]] += hidden[:40] * 3
    *_, lse, target_logit = run_forward(hidden, weight, targets)
    exact = hidden.double() @ weight.double().T
    # tf32x3 and ieee products are both good to a few float32 roundings of the largest logit.
    bound = 8 * torch.finfo(torch.float32).eps * exact.abs().max()
    assert (lse - exact.logsumexp(-1)).abs().max() <= bound
    assert (target_logit - exact.gather(1, targets[:, None])[:, 0]).abs().max() <= bound


def test_activity_keeps_every_entry_that_matters(device):
    hidden, weight, targets = peaked(device)
    config, _, activity, lse, _ = run_forward(hidden, weight, targets)
    row_blocks = -(-len(hidden) // config.row_block)
    active = unpacked(activity, row_blocks, len(weight))
    softmax = softmax_of(hidden, weight).cpu()
    for block in range(row_blocks):
        rows = slice(block * config.row_block, (block + 1) * config.row_block)
        needed = (softmax[rows] >= EPS * (1 + 1e-4)).any(0)
        needed[targets[rows].cpu()] = True
        assert active[block][needed].all()
    # The first phase meets no running value and keeps all of its two tiles.
    late = active[:, 2 * config.forward_entries :]
    assert late.numel() == 0 or late.float().mean() < 0.5, "peaked data must leave most entries inactive"


def test_tokens_past_the_count_are_not_looked_at(device):
    hidden, weight, targets = peaked(device)
    hidden[70:] = torch.nan
    config, _, activity, lse, target_logit = run_forward(hidden, weight, targets, used=70)
    assert lse[:70].isfinite().all()
    assert target_logit[:70].isfinite().all()


@pytest.mark.parametrize("filters", [(True, True), (True, False), (False, True)])
@pytest.mark.parametrize("strip_tiles", [12, 40, 10_000])
def test_plan_covers_what_is_kept(device, strip_tiles, filters):
    hidden, weight, targets = peaked(device)
    # The last row blocks keep everything, so that columns are kept in some of their row blocks.
    hidden[100:] *= 0.01
    config, count, activity, *_ = run_forward(hidden, weight, targets)
    row_blocks = -(-len(hidden) // config.row_block)
    strip_tiles = max(strip_tiles, row_blocks)
    sizes = row_blocks, len(weight), strip_tiles, 0, 32, config
    tiles = no_tiles(device)
    made = plan.make_plan(activity, *filters, count, *sizes, tiles)
    columns = made.columns_length.numel()
    entries = made.entries.cpu().long()
    assert entries[: len(weight)].sort().values.equal(torch.arange(len(weight)))
    assert (entries[len(weight) :] == len(weight)).all()

    active = torch.zeros(row_blocks, len(entries), dtype=torch.bool)
    active[:, : len(weight)] = unpacked(activity, row_blocks, len(weight))[:, entries[: len(weight)]]
    active = active.view(row_blocks, columns, -1).any(-1).T  # [columns, row blocks]
    of_hidden, of_weight = (active if is_filtered else torch.ones_like(active) for is_filtered in filters)
    assert (active.any(1) & ~active[:, 0]).any()
    kept = of_hidden | of_weight
    assert tiles.tolist() == [kept.sum(), kept.numel()]
    assert not made.counters.any()
    first_id, ids = made.first_id.cpu(), made.ids.cpu().view(columns, row_blocks)
    assert first_id[-1] == kept.sum()
    assert ids[kept].equal(torch.arange(int(kept.sum()), dtype=torch.int32))

    assert not made.dense_strips.any()
    assert not made.output_strips.any()
    first, strips, all_strips = made.sparse_strips.tolist()
    assert first == 0
    assert strips == all_strips
    starts = made.strip_first.cpu().long()[: strips + 1]
    assert starts[0] == 0
    assert starts[-1] == columns
    assert (first_id[starts[1:]] - first_id[starts[:-1]]).max() <= strip_tiles

    pairs = made.pairs.cpu()
    for strip in range(strips):
        inside = torch.zeros_like(kept)
        inside[starts[strip] : starts[strip + 1]] = True
        first, last = made.first_pair.cpu()[starts[strip]], made.first_pair.cpu()[starts[strip + 1]]
        places = pairs[:, first:last]
        both = places[:, places[1] >= 0]
        assert (both % row_blocks)[0].equal((both % row_blocks)[1]), "a pair has one row block"
        covered = torch.cat([places[0], both[1]]).sort().values
        assert covered.equal((kept & inside).reshape(-1).nonzero().squeeze(1).int())

    for row_block in range(row_blocks):
        expected = of_hidden[:, row_block].nonzero().squeeze(1)
        line = slice(row_block * columns, row_block * columns + len(expected))
        assert made.rows.other.cpu()[line].equal(expected.int())
        assert made.rows.slot.cpu()[line].equal(ids[expected, row_block])
        before = made.rows_before[row_block].cpu()
        assert before.tolist() == [0, *of_hidden[:, row_block].cumsum(0)]
    for column in range(columns):
        expected = of_weight[column].nonzero().squeeze(1)
        assert made.columns_length[column] == len(expected)
        line = slice(column * row_blocks, column * row_blocks + len(expected))
        assert made.columns.other.cpu()[line].equal(expected.int())
        assert made.columns.slot.cpu()[line].equal(ids[column, expected])


def test_entries_of_few_row_blocks_share_tiles(device):
    """Half of the vocabulary or more is in no row block, a quarter in one, and a tile of it in half of them or all."""
    config = tuning.config_for(device, torch.float32)
    row_blocks, vocabulary = 40, 24 * config.forward_entries
    active = torch.zeros(row_blocks, vocabulary, dtype=torch.bool)
    alone = torch.randperm(vocabulary)[: vocabulary // 4]
    active[torch.randint(row_blocks, alone.shape), alone] = True
    many = torch.randperm(vocabulary)[: config.entry_tile]
    active[:, many] = torch.rand(row_blocks, len(many)) < 0.5
    active[:, many[: len(many) // 2]] = True
    shape = row_blocks, -1, 32, config.forward_entries // 32
    bits = (active.view(shape).long() << torch.arange(32)[:, None]).sum(2)
    words = bits.where(bits < 2**31, bits - 2**32).to(torch.int32).view(row_blocks, -1).to(device)
    count = torch.tensor([row_blocks * config.row_block], dtype=torch.int32, device=device)
    activity = forward.Activity(words, None, config.forward_entries)
    assert unpacked(activity, row_blocks, vocabulary).equal(active)
    tiles = no_tiles(device)
    made = plan.make_plan(activity, True, True, count, row_blocks, vocabulary, 10_000, 0, 32, config, tiles)
    # Of those in one a tile each row block, and each tile of them once more; of the many two columns and an edge.
    columns_alone = len(alone) / config.entry_tile
    assert tiles[0] <= row_blocks + columns_alone + 3 * row_blocks
    counts = active.sum(0).tolist()
    first = active.int().argmax(0).tolist()
    # By powers of two, then by the first row block, then as they stand in the vocabulary.
    right = sorted(range(vocabulary), key=lambda entry: (-counts[entry].bit_length(), first[entry], entry))
    assert made.entries.tolist() == right


@pytest.mark.parametrize("used", [0, 70, 150])
@pytest.mark.parametrize("programs", [3, 132])
@pytest.mark.parametrize("fitting", [2, 3.5, 7, 1000])
@pytest.mark.parametrize("features", [0, 40, 3000])
def test_dense_strips_are_whole_pairs_of_columns(device, features, fitting, programs, used, monkeypatch):
    """And whole rounds of the programs over them, where a strip has room for one.

    Where the unwritten part of the weight's gradient has more room than the workspace, they are larger.
    """
    monkeypatch.setattr(plan, "programs", lambda _: programs)
    config = tuning.config_for(device, torch.float32)
    columns = 11
    vocabulary = columns * config.entry_tile - 5
    row_blocks = -(-150 // config.row_block)
    strip_tiles = int(fitting * row_blocks)
    output_tiles = vocabulary * features // (config.row_block * config.entry_tile)
    count = torch.tensor([used], dtype=torch.int32, device=device)
    sizes = row_blocks, vocabulary, strip_tiles, output_tiles, features, config
    made = plan.make_plan(None, True, True, count, *sizes, no_tiles(device))
    assert not made.sparse_strips.any()
    first, in_output, strips = made.output_strips.tolist()
    assert first == 0
    assert made.dense_strips.tolist() == [in_output, strips, strips]
    starts = made.strip_first.cpu()
    assert starts[0] == 0
    assert starts[strips:].eq(columns).all()
    ends, widths = starts[1 : strips + 1], starts[: strips + 1].diff()
    used_blocks = -(-used // config.row_block)
    tiles = widths * used_blocks
    first_slots = -(-ends * features // config.row_block)
    # Behind the rows that the strip itself writes, and within the gradient.
    assert (first_slots * config.row_block * config.entry_tile >= ends * config.entry_tile * features).all()
    assert ((first_slots + tiles)[:in_output] <= output_tiles).all()
    assert (tiles[in_output:] <= strip_tiles).all()
    assert (widths[:-1] % 2 == 0).all()
    assert widths.min() > 0
    items = widths[:-1] // 2 * used_blocks
    assert ((-items % programs < used_blocks) | (widths[:-1] == 2) | (items < programs)).all()
    if used and features == 3000 and fitting < 7:
        assert in_output, "there is room"
    if features == 0:
        assert not in_output


def gradients(hidden, weight, targets, impl="cce", eps=EPS, workspace_mib=128, frozen=()):
    leaves = {"hidden": hidden.detach().clone(), "weight": weight.detach().clone()}
    wanted = [leaf.requires_grad_() for name, leaf in leaves.items() if name not in frozen]
    loss = compute(
        leaves["hidden"],
        leaves["weight"],
        targets,
        None,
        options=Options(filter_eps=eps, workspace_mib=workspace_mib),
        reduction="mean",
        shift=0,
        impl=impl,
        return_lse=False,
    )
    return torch.autograd.grad(loss, wanted)


def test_strips_in_the_weight_gradient_never_pass_its_end(device, monkeypatch):
    """Random shapes, since few come within a tile of it; on a card the write would be out of bounds."""
    seeded = random.Random(0)
    base = dataclasses.replace(tuning.config_for(device, torch.float32), entry_tile=16)
    strips, least_room = 0, math.inf
    for _ in range(100):
        workers = seeded.choice([1, 3, 7])
        monkeypatch.setattr(plan, "programs", lambda _, workers=workers: workers)
        config = dataclasses.replace(base, row_block=seeded.choice([16, 32]))
        tokens, vocabulary, features = seeded.randint(1, 120), seeded.randint(100, 900), seeded.randint(8, 200)
        row_blocks = -(-tokens // config.row_block)
        capacity = vocabulary * features // (config.row_block * config.entry_tile)
        used = seeded.randint(1, tokens)
        count = torch.tensor([used], dtype=torch.int32, device=device)
        sizes = row_blocks, vocabulary, 2 * row_blocks, capacity, features, config
        made = plan.make_plan(None, True, True, count, *sizes, no_tiles(device))
        starts = made.strip_first.tolist()
        for strip in range(*made.output_strips.tolist()[:2]):
            first, end = starts[strip : strip + 2]
            slots = -(-end * features // config.row_block) + (end - first) * -(-used // config.row_block)
            assert slots <= capacity
            strips += 1
            least_room = min(least_room, capacity - slots)
    assert strips > 100
    assert least_room <= 1, "no strip came near the end"


@pytest.mark.parametrize("tokens", [0, 1, 128, 129, 1000, 4097])
def test_pieces_are_few_and_much_the_same(tokens):
    config = tuning.config_for(torch.device("cpu"), torch.float32)
    pieces = division.pieces_of(tokens, 4096, 2**20, config)  # 256 tokens would fit
    assert [t for piece in pieces for t in range(piece.start, piece.stop)] == list(range(tokens))
    lengths = [piece.stop - piece.start for piece in pieces]
    assert len(pieces) == -(-tokens // 256)
    assert all(length <= 256 for length in lengths)
    assert all(length % config.row_block == 0 for length in lengths[:-1])
    assert max(lengths, default=0) - min(lengths, default=0) <= 2 * config.row_block


def test_kept_fraction_counts_every_piece(device, monkeypatch):
    """The last piece of tokens alone keeps everything; the others do not."""
    monkeypatch.setattr(plan, "DENSE_FRACTION", 1.0)
    block = tuning.config_for(device, torch.float32).row_block
    weight = torch.randn(700, 32)
    targets = torch.randint(0, 60, (8 * block,))
    hidden = weight[targets] * 2
    hidden[7 * block :] *= 0.01
    made = [hidden.to(device), weight.to(device), targets.to(device)]
    monkeypatch.setattr(autograd, "_sum_bytes", lambda hidden: 2**20 // block // 2)
    with filtering.recording() as records:
        gradients(*made, eps=2**-6, workspace_mib=1)
    # The weight's pass and that of each piece keep the same tiles in all.
    assert 1 / 8 < records[0].kept_fraction < 0.7


def test_a_weight_stored_the_other_way_round_is_copied_once(device):
    hidden, weight, targets = peaked(device)
    stored = weight.T.contiguous().requires_grad_()
    copies = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            result = function(*args, **(kwargs or {}))
            if function is torch.ops.aten.clone.default and result.shape == weight.shape:
                copies.append(result)
            return result

    with Watch():
        loss = functional.linear_cross_entropy(hidden, stored.T, targets, impl="cce")
        loss.backward()
    assert len(copies) == 1
    expected = gradients(hidden, weight, targets, eps="auto", frozen=("hidden",))[0]
    torch.testing.assert_close(stored.grad.T, expected)


def test_strips_and_pieces_change_nothing_but_the_order_of_sums(device, monkeypatch):
    """A workspace too small for everything gives the gradients of a large one, to rounding."""
    monkeypatch.setattr(plan, "DENSE_FRACTION", 0.0)
    hidden, weight, targets = peaked(device, tokens=300)
    targets[5:90] = -100
    at_once = gradients(hidden, weight, targets)
    plans = []
    made = plan.make_plan

    def spy(*args):
        plans.append(made(*args))
        return plans[-1]

    monkeypatch.setattr(autograd, "make_plan", spy)
    sum_bytes = autograd._sum_bytes
    monkeypatch.setattr(autograd, "_sum_bytes", lambda hidden: 4096)
    in_pieces = gradients(hidden, weight, targets, workspace_mib=1)
    assert len(plans) > 2, "the tokens must have been cut into pieces"
    for whole, cut in zip(at_once, in_pieces, strict=True):
        assert (whole - cut).norm() <= 1e-6 * whole.norm()

    plans.clear()
    monkeypatch.setattr(autograd, "_sum_bytes", sum_bytes)
    # The smallest strips that there can be: two tiles of every row block.
    monkeypatch.setattr(autograd, "make_plan", lambda *args: spy(*args[:6], 2 * args[4], *args[7:]))
    in_strips = gradients(hidden, weight, targets)
    assert plans[-1].dense_strips[2] >= 3
    for whole, cut in zip(at_once, in_strips, strict=True):
        assert (whole - cut).norm() <= 1e-6 * whole.norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("dense", [False, True])
def test_blocks_by_the_copy_engine_change_nothing(device, dtype, dense, monkeypatch):
    """Ragged everywhere, over several strips, with hidden states that are not finite where they are ignored."""
    if dense:
        monkeypatch.setattr(plan, "DENSE_FRACTION", 0.0)
    hidden, weight, targets = peaked(device, tokens=140, vocabulary=451, width=NARROW, dtype=dtype)
    targets[5:90] = -100
    hidden[50] = torch.nan
    weight *= 0.5
    config = tuning.config_for(device, dtype)
    require_copy_engine(device)
    blocks = []
    run_backward = autograd.run_backward

    def spy(plan, operands, in_order, *rest):
        blocks.append(in_order is not None)
        assert bool(plan.sparse_strips[2]) is not dense
        run_backward(plan, operands, in_order, *rest)

    monkeypatch.setattr(autograd, "run_backward", spy)
    monkeypatch.setattr(autograd, "make_plan", lambda *args: plan.make_plan(*args[:6], 2 * args[4], *args[7:]))
    found = []
    for tma in (False, True):
        monkeypatch.setattr(autograd, "config_for", lambda *_, tma=tma: dataclasses.replace(config, tma=tma))
        found.append(gradients(hidden, weight, targets))
    assert blocks == [False, True]
    for gathered, copied in zip(*found, strict=True):
        assert copied.isfinite().all()
        torch.testing.assert_close(gathered, copied, rtol=torch.finfo(dtype).eps, atol=1e-7)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("all_used", [True, False])
def test_hidden_states_without_room_for_a_copy(device, dtype, all_used, monkeypatch):
    """They are read where they are if every token is in use, and gathered if not; the host does not know which."""
    monkeypatch.setattr(plan, "DENSE_FRACTION", 0.0)
    hidden, weight, targets = peaked(device, tokens=140, vocabulary=451, width=NARROW, dtype=dtype)
    if not all_used:
        targets[5:90] = -100
        hidden[50] = torch.nan
    config = tuning.config_for(device, dtype)
    require_copy_engine(device)
    monkeypatch.setattr(autograd, "config_for", lambda *_: dataclasses.replace(config, tma=True))
    copied = gradients(hidden, weight, targets)
    division = autograd._division
    monkeypatch.setattr(autograd, "_division", lambda *args: (division(*args)[0], False))
    for ours, wanted in zip(gradients(hidden, weight, targets), copied, strict=True):
        assert wanted.isfinite().all()
        torch.testing.assert_close(ours, wanted, rtol=torch.finfo(dtype).eps, atol=1e-7)


@pytest.mark.parametrize(("tma", "dtype"), [(True, torch.float16), (True, torch.float32), (False, torch.float16)])
def test_logit_gradients_in_the_unwritten_weight_gradient(device, tma, dtype, monkeypatch):
    """The same gradients as with a workspace that has room for all: nothing is overwritten before it is read."""
    monkeypatch.setattr(plan, "DENSE_FRACTION", 0.0)
    config = tuning.config_for(device, dtype)
    if tma:
        require_copy_engine(device)
    monkeypatch.setattr(autograd, "config_for", lambda *_: dataclasses.replace(config, tma=tma))
    tokens, vocabulary = 2 * config.row_block + 5, 23 * config.entry_tile - 5
    hidden, weight, targets = peaked(device, tokens, vocabulary, width=WIDE, dtype=dtype)
    weight *= 0.3
    targets[5:30] = -100
    roomy = gradients(hidden, weight, targets)
    plans = []
    made = plan.make_plan

    def tight(*args):
        plans.append(made(*args[:6], 2 * args[4], *args[7:]))
        return plans[-1]

    monkeypatch.setattr(autograd, "make_plan", tight)
    in_output = gradients(hidden, weight, targets)
    assert plans[0].output_strips[1] > 1
    assert plans[0].dense_strips[1] > plans[0].dense_strips[0]
    for ours, wanted in zip(in_output, roomy, strict=True):
        torch.testing.assert_close(ours, wanted, rtol=2 * torch.finfo(dtype).eps, atol=1e-6)


@pytest.mark.parametrize("impl", ["cce", "cce_exact"])
def test_rows_padded_for_alignment(device, impl, monkeypatch):
    """Their strides suit the copy engine; a copy of them, rows next to each other, would not."""
    config = tuning.config_for(device, torch.float16)
    if device.type == "cpu":
        require_copy_engine(device)
        monkeypatch.setattr(autograd, "config_for", lambda *_: dataclasses.replace(config, tma=True))
    hidden, weight, targets = peaked(device, tokens=70, vocabulary=300, width=48, dtype=torch.float16)
    padded, cut = (hidden, weight), (hidden[:, :41].contiguous(), weight[:, :41].contiguous())
    found = []
    for matrices in (padded, cut):
        leaves = [x.detach().clone().requires_grad_() for x in matrices]
        loss = compute(
            *(leaf[:, :41] for leaf in leaves),
            targets,
            None,
            options=Options(filter_eps=EPS),
            reduction="mean",
            shift=0,
            impl=impl,
            return_lse=False,
        )
        found.append([gradient[:, :41] for gradient in torch.autograd.grad(loss, leaves)])
    eps = torch.finfo(torch.float16).eps
    for ours, wanted in zip(*found, strict=True):
        torch.testing.assert_close(ours, wanted, rtol=2 * eps, atol=eps * wanted.abs().max().item())


@pytest.mark.parametrize("impl", ["cce", "cce_exact"])
def test_a_weight_smaller_than_a_tile(device, impl, monkeypatch):
    """Its gradient has no room for any logit gradients."""
    config = tuning.config_for(device, torch.float16)
    if device.type == "cpu":
        require_copy_engine(device)
        monkeypatch.setattr(autograd, "config_for", lambda *_: dataclasses.replace(config, tma=True))
    hidden, weight, targets = peaked(device, tokens=50, vocabulary=20, width=16, dtype=torch.float16)
    ours, wanted = gradients(hidden, weight, targets, impl=impl), gradients(hidden, weight, targets, impl="reference")
    for actual, expected in zip(ours, wanted, strict=True):
        # Logit gradients and results are rounded to float16.
        eps = torch.finfo(torch.float16).eps
        torch.testing.assert_close(actual, expected, rtol=2 * eps, atol=eps * expected.abs().max().item())


@pytest.mark.parametrize("spread", [0.02, 1.0])
def test_past_a_share_of_kept_tiles_the_rest_is_computed_too(device, spread, monkeypatch):
    """The host does not know: a launch for either case is made, and one of them has nothing to do."""
    monkeypatch.setattr(plan, "DENSE_FRACTION", 0.6)
    hidden, weight, targets = peaked(device, tokens=100, vocabulary=1500)
    weight *= spread
    plans = []
    monkeypatch.setattr(autograd, "make_plan", lambda *args: plans.append(plan.make_plan(*args)) or plans[-1])
    with filtering.recording() as records:
        found = gradients(hidden, weight, targets)
    flat = spread < 1
    assert (plans[0].dense_strips[2].item() > 0) == flat
    assert (plans[0].sparse_strips[2].item() > 0) != flat
    assert (records[0].kept_fraction == 1) == flat
    exact = gradients(hidden, weight, targets, impl="cce_exact")
    for ours, wanted in zip(found, exact, strict=True):
        # Strips may be of other widths, so sums of another order.
        rounding = 32 * torch.finfo(torch.float32).eps * wanted.abs().max().item()
        assert ((ours - wanted).abs().max().item() <= rounding) == flat


def test_what_is_dropped_is_below_the_threshold(device):
    """An error no larger than every dropped entry at eps would give, and a gradient that did drop something."""
    hidden, weight, targets = peaked(device)
    filtered, _ = gradients(hidden, weight, targets, eps=EPS)
    exact, _ = gradients(hidden, weight, targets, impl="cce_exact")
    softmax = softmax_of(hidden, weight)
    dropped = torch.where(softmax < EPS, softmax, 0).norm(dim=1)
    bound = (dropped * torch.linalg.matrix_norm(weight.double(), 2)).norm() / len(targets)
    error = (filtered - exact).norm()
    assert 0 < error <= bound


def test_a_flat_softmax_is_not_filtered_away(device):
    """All of it lies below the threshold, entry by entry: dropping those would leave the targets alone."""
    hidden, weight, targets = peaked(device, tokens=300)
    flat, eps = weight * 0.01, 2.0**-5
    assert softmax_of(hidden, flat).max() < eps
    *_, activity, _, _ = run_forward(hidden, flat, targets, eps=eps)
    assert (activity.words == -1).all()
    assert not activity.dropped_mass.any()
    filtered, exact = gradients(hidden, flat, targets, eps=eps), gradients(hidden, flat, targets, impl="cce_exact")
    for ours, wanted in zip(filtered, exact, strict=True):
        # The same products, their sums taken in another order of the vocabulary.
        assert (ours - wanted).norm() <= 1e-6 * wanted.norm()
    *_, activity, _, _ = run_forward(hidden, weight, targets)
    assert not (activity.words == -1).all(1).any()
    assert activity.dropped_mass.all()


@pytest.mark.parametrize("softcap", [None, 30.0])
def test_one_bad_token_stays_alone(device, softcap):
    """Also where it is among those that the tail's mean is made of, whichever these are."""
    hidden, weight, targets = peaked(device, tokens=64, vocabulary=1500)
    hidden[::7] = torch.nan
    hidden.requires_grad_()
    loss = compute(
        hidden,
        weight,
        targets,
        None,
        options=Options(filter_eps=EPS, softcap=softcap),
        reduction="none",
        shift=0,
        impl="cce",
        return_lse=False,
    )
    (gradient,) = torch.autograd.grad(loss.sum(), hidden)
    assert gradient.isfinite().all(1).equal(hidden.isfinite().all(1))


@pytest.mark.parametrize("frozen", [(), ("weight",)])
def test_auto_is_a_smaller_threshold_where_the_projection_is_frozen(frozen, device):
    vocabulary = 24 * tuning.config_for(device, torch.float16).forward_entries
    hidden, weight, targets = peaked(device, vocabulary=vocabulary, dtype=torch.float16)
    # Few are active: a row block with more of them than there are slots keeps all.
    hidden[:, 0] *= 8
    eps = torch.finfo(torch.float16).eps

    def found(threshold):
        return gradients(hidden, weight, targets, eps=threshold, frozen=frozen)

    auto, trained, other = found("auto"), found(eps / AUTO_TRAINED), found(eps / AUTO_FROZEN)
    if frozen:
        trained, other = other, trained
    assert all(map(torch.equal, auto, trained))
    assert not any(map(torch.equal, auto, other))


def test_nothing_is_recorded_for_a_gradient_that_nobody_wants(device, monkeypatch):
    """That of hidden is what the preset filters; where the weight is frozen, see test_strips.py."""
    plans = []
    monkeypatch.setattr(autograd, "make_plan", lambda *args: plans.append(plan.make_plan(*args)) or plans[-1])
    hidden, weight, targets = peaked(device, tokens=40, vocabulary=90)
    gradients(hidden, weight, targets, impl="cce_kahan_full_c", frozen=("hidden",))
    assert plans[0].is_dense


@pytest.mark.parametrize("strips", ["one", "many"])
def test_the_mean_of_what_is_dropped_is_added_back(device, strips, monkeypatch):
    """Where all weight rows agree in a feature, the whole tail is its mean: the gradient there is exact."""
    hidden, weight, targets = peaked(device, tokens=140, vocabulary=1500)
    targets[5:40] = -100
    hidden[50:60] = torch.nan
    targets[50:60] = -100
    weight[:, 1] = 0.5
    if strips == "many":
        monkeypatch.setattr(autograd, "make_plan", lambda *args: plan.make_plan(*args[:6], 2 * args[4], *args[7:]))
    hidden.requires_grad_()
    # With a frozen projection it is another walk, see test_sparse.py.
    weight.requires_grad_()
    upstream = torch.randn(2, len(targets), device=device)

    def gradient(impl):
        loss, lse = compute(
            hidden,
            weight,
            targets,
            None,
            options=Options(filter_eps=EPS),
            reduction="none",
            shift=0,
            impl=impl,
            return_lse=True,
        )
        return torch.autograd.grad([loss, lse], hidden, list(upstream))[0]

    exact, filtered = gradient("cce_exact"), gradient("cce")
    assert exact.isfinite().all()
    torch.testing.assert_close(filtered[:, 1], exact[:, 1], rtol=1e-4, atol=1e-5)
    error = (filtered - exact).norm()
    zero = torch.zeros(hidden.shape[1], device=device)
    monkeypatch.setattr(autograd, "tail_direction", lambda *_: Tail(zero, None))
    bare = gradient("cce")
    assert (bare[:, 1] - exact[:, 1]).abs().max() > 1e-2
    # Feature 0 orders the vocabulary: what is dropped has much of it in common, too.
    assert error < 0.5 * (bare - exact).norm()


def test_the_mean_is_of_row_blocks_that_drop_something(device):
    """In a long batch there may be few of them: here one of more than there are tokens in a sample."""
    config = tuning.config_for(device, torch.float32)
    sure = slice(config.row_block, 2 * config.row_block)
    tokens = (2 * config.sample + 2) * config.row_block
    # What a phase of few tiles keeps is known before much of the denominators is.
    hidden, weight, targets = peaked(device, tokens=tokens, vocabulary=24 * config.forward_entries)
    weight[:, 1] = 0.5
    is_flat = torch.ones_like(targets, dtype=torch.bool)
    is_flat[sure] = False
    hidden[is_flat] /= 100
    # They are sure of the same entries: what one keeps, its row block does.
    hidden[sure, 0] *= 16
    hidden[sure, 2:] /= 4
    targets[is_flat] = 0
    with filtering.recording() as records:
        filtered, _ = gradients(hidden, weight, targets, eps=2.0**-6)
    dropped = records[0].dropped_mass.view(-1)
    assert not dropped[is_flat].any()
    assert dropped[sure].mean() > 0.01
    exact, _ = gradients(hidden, weight, targets, impl="cce_exact")
    torch.testing.assert_close(filtered[sure, 1], exact[sure, 1], rtol=1e-4, atol=1e-4 * exact.abs().max().item())


def test_same_bits_every_run(device):
    hidden, weight, targets = peaked(device, dtype=torch.float16)
    first, again = gradients(hidden, weight, targets), gradients(hidden, weight, targets)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


def test_frozen_hidden_states_leave_the_weight_gradient_as_it_is(device):
    hidden, weight, targets = peaked(device)
    _, both = gradients(hidden, weight, targets)
    (alone,) = gradients(hidden, weight, targets, frozen=("hidden",))
    assert torch.equal(alone, both)


@pytest.mark.usefixtures("products_term_by_term")
def test_loss_of_a_token_does_not_depend_on_its_neighbours(device):
    hidden, weight, targets = peaked(device)

    def losses(rows):
        return functional.linear_cross_entropy(hidden[rows], weight, targets[rows], reduction="none", impl="cce")

    everything = losses(slice(None))
    assert torch.equal(everything[40:41], losses(slice(40, 41)))
    assert torch.equal(everything[100:], losses(slice(100, None)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_descriptor_path_equals_pointer_path(device, dtype, monkeypatch):
    """Ragged tokens, entries and features; rows of whole 16 bytes, as descriptors need."""
    hidden, weight, targets = peaked(device, tokens=77, vocabulary=333, width=NARROW, dtype=dtype)
    require_copy_engine(device)
    results = {}
    for tma in (False, True):
        config = dataclasses.replace(tuning.config_for(device, dtype), tma=tma)
        monkeypatch.setattr(forward, "config_for", lambda *_, config=config: config)
        kernel, *_ = forward._kernel_for(hidden, weight, config)
        assert kernel is (forward._descriptor_kernel if tma else forward._pointer_kernel)
        *_, lse, target_logit = run_forward(hidden, weight, targets)
        results[tma] = (lse, target_logit)
    for pointer, descriptor in zip(results[False], results[True], strict=True):
        torch.testing.assert_close(pointer, descriptor, rtol=1e-6, atol=1e-5)


def test_a_single_feature_with_a_stride_goes_by_pointers(device, monkeypatch):
    """The copy engine wants features next to each other, which torch does not say of a strided column."""
    hidden, weight, targets = peaked(device, tokens=8, vocabulary=40, width=64)
    config = dataclasses.replace(tuning.config_for(device, torch.float32), tma=True)
    for module in (autograd, forward):
        monkeypatch.setattr(module, "config_for", lambda *_: config)
    column = weight[:, ::64]
    ours, plain = (
        functional.linear_cross_entropy(hidden[:, :1], column, targets, impl=impl) for impl in ("cce", "reference")
    )
    torch.testing.assert_close(ours, plain)


@pytest.mark.parametrize(
    ("matmul", "everything", "allowed"),
    [("ieee", "tf32", False), ("tf32", "ieee", True), ("none", "tf32", True), ("none", "ieee", False)],
)
def test_tf32_by_torchs_newer_setting(matmul, everything, allowed, monkeypatch):
    monkeypatch.setattr(torch.backends.cuda, "matmul", SimpleNamespace(fp32_precision=matmul))
    monkeypatch.setattr(torch.backends, "fp32_precision", everything, raising=False)
    assert tuning._allows_tf32() is allowed
    monkeypatch.setattr(torch.backends.cuda, "matmul", SimpleNamespace(allow_tf32=allowed))
    assert tuning._allows_tf32() is allowed


def test_every_launch_asks_for_contracted_multiply_adds(device, monkeypatch):
    """Triton's default is about to change, and with it the bits."""
    asked = {}
    kernels = type(forward._merge_kernel)
    at_grid = kernels.__getitem__

    def recorded(kernel, grid):
        def launch(*arguments, **options):
            asked.setdefault(kernel.fn.__name__, set()).add(options.get("enable_fp_fusion"))
            return at_grid(kernel, grid)(*arguments, **options)

        return launch

    monkeypatch.setattr(kernels, "__getitem__", recorded)
    # Later launches of the like do not ask again.
    monkeypatch.setattr(launching, "_compiled", {})
    gradients(*peaked(device))
    gradients(*peaked(device), frozen=("weight",))
    walk = {"_reference_kernel", "_exponential_kernel", "_product_kernel", "_row_sum_kernel", "_maximum_kernel"}
    walk |= {"_redo_kernel", "_finish_kernel", "_gradient_kernel", "_pack_kernel", "_mean_kernel"}
    main = {"_backward_kernel", "_merge_kernel", "_target_kernel", "_loss_kernel", "_tail_kernel"}
    main |= {"_places_kernel", "_in_order_kernel", "_tail_mean_kernel"}
    of_plan = {"_strip_kernel", "_pair_kernel", "_key_kernel", "_tile_kernel", "_list_kernel"}
    assert asked.keys() - {"_pointer_kernel", "_descriptor_kernel"} == main | of_plan | walk
    assert asked.keys() & {"_pointer_kernel", "_descriptor_kernel"}
    assert set().union(*asked.values()) == {True}


def test_phases_cover_the_vocabulary_once():
    for vocabulary in (1, 63, 64, 65, 1000, 64 * 594, 300_001):
        covered = [tile for first, width in forward.phases(vocabulary, 64) for tile in range(first, first + width)]
        assert covered == list(range(-(-vocabulary // 64)))


def test_what_filtering_left_out_can_be_asked_for(device):
    hidden, weight, targets = peaked(device)
    targets[10:20] = -100
    with filtering.recording() as records:
        gradients(hidden, weight, targets)
        gradients(hidden, weight, targets, impl="cce_exact")
    filtered, exact = records
    softmax = softmax_of(hidden, weight)
    below = torch.where(softmax < EPS, softmax, 0).sum(1)
    assert (filtered.dropped_mass[10:20] == 0).all()
    # Some entries count as active on the strength of a running value: never more is left out than the threshold says.
    assert (filtered.dropped_mass <= below * (1 + 1e-4)).all()
    assert 0 < filtered.largest_dropped_mass < 1
    assert 0 < filtered.kept_fraction < exact.kept_fraction == 1
    assert exact.largest_dropped_mass == 0
    gradients(hidden, weight, targets)
    assert len(records) == 2, "nothing is collected outside"
