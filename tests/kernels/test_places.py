"""Tokens in use first: their rows, labels and number."""

import pytest
import torch

pytest.importorskip("triton")

from torchtune_lce import linear_cross_entropy
from torchtune_lce.kernels.places import BLOCK, compact

VOCABULARY = 1000


def expected(targets, ignore_index):
    ignored = targets == ignore_index
    rows = ignored.to(torch.uint8).sort(stable=True).indices
    labels = targets[rows]
    outside = (labels < 0) | (labels >= VOCABULARY)
    count = (~ignored).sum(dtype=torch.int32)
    labels = labels.masked_fill(outside, 0).masked_fill(ignored[rows], -1)
    return rows, labels, count.view(1), count.clamp(min=1)


# A share of the targets and what marks them.
IGNORED = ((0.3, -100), (0.0, -100), (0.5, 0), (0.9, 7), (1.0, -1), (0.4, VOCABULARY))
# Within a block, at its ends, and in many programs, which the interpreter takes a second for.
CASES = [(tokens, dtype, IGNORED) for dtype in (torch.int64, torch.int32) for tokens in (0, 1, 70, BLOCK)]
CASES += [(BLOCK - 1, torch.int64, IGNORED), (3 * BLOCK + 1, torch.int64, IGNORED), (131_072, torch.int64, IGNORED[:1])]


@pytest.mark.parametrize(("tokens", "dtype", "ignored"), CASES)
def test_order_is_that_of_a_stable_sort(tokens, dtype, ignored, device):
    for share, ignore_index in ignored:
        targets = torch.randint(0, VOCABULARY, (tokens,), dtype=dtype)
        targets[torch.rand(tokens) < share] = ignore_index
        targets = targets.to(device)
        found, wanted = compact(targets, ignore_index, VOCABULARY), expected(targets, ignore_index)
        for mine, theirs in zip(found, wanted, strict=True):
            assert mine.dtype == theirs.dtype
            assert torch.equal(mine, theirs), f"{share} ignored"


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32])
def test_labels_that_name_no_entry_are_in_use(dtype, device):
    """And as an entry that there is, so that nothing is read out of bounds."""
    info = torch.iinfo(dtype)
    targets = torch.tensor([5, VOCABULARY, -1, -100, info.max, info.min, 999], dtype=dtype, device=device)
    rows, labels, count, _ = compact(targets, -100, VOCABULARY)
    assert rows.tolist() == [0, 1, 2, 4, 5, 6, 3]
    assert labels[:6].tolist() == [5, 0, 0, 0, 0, 999]
    assert count.item() == 6


def test_an_index_of_64_bits(device):
    """No value of 32 bits is taken for it."""
    targets = torch.tensor([2**32, 0, 2**40 + 3, 3], device=device)
    for ignore_index in (2**32, 2**40 + 3):
        rows, _, count, _ = compact(targets, ignore_index, VOCABULARY)
        last = targets.tolist().index(ignore_index)
        assert rows.tolist() == [row for row in range(4) if row != last] + [last]
        assert count.item() == 3


@pytest.mark.parametrize("trained", [False, True])
def test_targets_need_not_lie_next_to_each_other(trained, device):
    hidden, weight = torch.randn(9, 16, device=device, requires_grad=True), torch.randn(40, 16, device=device)
    weight.requires_grad_(trained)
    targets = torch.randint(0, 40, (9, 2), device=device)[:, 0]
    assert not targets.is_contiguous()
    losses = [linear_cross_entropy(hidden, weight, x, impl="cce_exact") for x in (targets, targets.contiguous())]
    assert torch.equal(*losses)
