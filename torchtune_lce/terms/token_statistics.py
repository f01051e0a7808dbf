"""Entropy and accuracy of each token's prediction, in one bounded pass over the vocabulary.

No implementation of the loss has both at hand, so this computes the logits once more: 2 N D V operations, a third of
what the loss and its gradients take without filtering. Plain PyTorch, on any device, which it never waits for: that is
why ignored tokens are computed too.

The gradient of the entropy H by a token's logits z, with its softmax p, is -p_v (log p_v + H). A second pass makes it,
of the tokens in use.
"""

from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from torchtune_lce.implementations.walk import (
    Operands,
    Piece,
    by_logits,
    entries_per_strip,
    no_values,
    pieces,
    sizes_of,
    tokens_per_piece,
    walk_gradients,
)
from torchtune_lce.inputs.autocast import without_autocast
from torchtune_lce.inputs.call import Call
from torchtune_lce.inputs.dtypes import accumulation_dtype
from torchtune_lce.inputs.shard import VocabularyShard


class Predictions(NamedTuple):
    """What some entries of the vocabulary say about each token, [N] each, in the accumulation dtype but for ``place``.

    With e = exp(z - largest) for the logits z of those entries:
    """

    largest: Tensor  # logit
    place: Tensor  # int64: its entry, the first of equal ones; -1 where a logit is NaN
    others: Tensor  # sum of e but for that entry's, which is 1: of a certain token the sum of all would lose digits
    disorder: Tensor  # sum of -e log e

    def measured_from(self, largest: Tensor, elsewhere: Tensor) -> tuple[Tensor, Tensor]:
        """``others`` and ``disorder`` with respect to a logit, the same or a larger one where it is ``elsewhere``."""
        # Where no entry so far can be, all are zero, whatever they are measured from.
        scale = (self.largest - largest.where(largest != -torch.inf, 0)).exp()
        total = 1 + self.others
        others = torch.where(elsewhere, scale * total, self.others)
        return others, scale * self.disorder + torch.special.entr(scale) * total


# A custom operator: a compiler would unroll the walk over the vocabulary.
torch.library.define(
    "torchtune_lce::predictions",
    "(Tensor hidden, Tensor weight, Tensor? bias, Tensor? low, Tensor? up, Tensor? scale, float? softcap, "
    "float logit_scale, int workspace_mib) -> (Tensor largest, Tensor place, Tensor others, Tensor disorder)",
)


@torch.library.impl("torchtune_lce::predictions", "default")
@without_autocast
def _predict(hidden, weight, bias, low, up, scale, softcap, logit_scale, workspace_mib):
    operands, tokens = Operands(hidden, weight, bias, low, up, scale), hidden.shape[0]
    sizes = sizes_of(operands, None, workspace_mib, more_blocks=1)
    # All at once, of which no copy is needed; some where they are widened.
    at_once = tokens_per_piece(tokens, sizes) if sizes.widened else tokens
    found = []
    for rows in torch.arange(tokens, device=hidden.device).split(max(at_once, 1)):
        strip = entries_per_strip(rows.numel(), sizes, copied=sizes.widened)
        found.append(_predict_piece(Piece(operands, softcap, logit_scale, rows, strip)))
    return tuple(map(torch.cat, zip(*found, strict=True)))


def _predict_piece(piece: Piece) -> Predictions:
    none = piece.hidden.new_zeros(piece.rows.shape, dtype=piece.wide)
    found = Predictions(none - torch.inf, torch.full_like(none, -1, dtype=torch.int64), none, none)
    for part, rows in piece.strips():
        logits, _, _ = piece.logits(part, rows, differentiable=False)
        value, index = logits.max(-1)
        rises = value > found.largest
        place = torch.where(rises, index + part.start, found.place)
        largest = torch.maximum(found.largest, value)
        others, disorder = found.measured_from(largest, rises)
        logits.scatter_(-1, index[:, None], value.masked_fill(rises, -torch.inf)[:, None])
        logits = logits.sub_(largest.where(largest != -torch.inf, 0)[:, None]).exp_()
        others += logits.sum(-1)
        disorder += torch.special.entr(logits).sum(-1)
        found = Predictions(largest, place, others, disorder)
    return found


@torch.library.register_fake("torchtune_lce::predictions")
def _(hidden, weight, bias, low, up, scale, softcap, logit_scale, workspace_mib):
    values = [hidden.new_empty(hidden.shape[0], dtype=accumulation_dtype(hidden.dtype)) for _ in range(3)]
    return values[0], hidden.new_empty(hidden.shape[0], dtype=torch.int64), *values[1:]


torch.library.define(
    "torchtune_lce::entropy",
    "(Tensor hidden, Tensor weight, Tensor? bias, Tensor? low, Tensor? up, Tensor? scale, Tensor targets, "
    "Tensor largest, Tensor others, Tensor disorder, int ignore_index, float? softcap, float logit_scale, "
    "int workspace_mib) -> Tensor",
)


@torch.library.impl("torchtune_lce::entropy", "default")
def _entropy(*arguments):
    """Of each token, [N], 0 where ignored, from what :class:`Predictions` of all entries say. Operands and settings are
    for the backward.
    """
    targets, largest, others, disorder, ignore_index, *_ = arguments[6:]
    # Without a largest logit no entry can be, or one is infinitely likelier than itself.
    entropy = (torch.log1p(others) + disorder / (1 + others)).where(largest.isfinite(), torch.nan)
    return entropy.where(targets != ignore_index, 0)


@torch.library.register_fake("torchtune_lce::entropy")
def _(*arguments):
    return torch.empty_like(arguments[8])


torch.library.define(
    "torchtune_lce::entropy_backward",
    "(Tensor d_entropy, Tensor hidden, Tensor weight, Tensor? bias, Tensor? low, Tensor? up, Tensor? scale, "
    "Tensor targets, Tensor largest, Tensor others, Tensor disorder, int ignore_index, float? softcap, "
    "float logit_scale, int workspace_mib, bool[] needs) "
    "-> (Tensor d_hidden, Tensor d_weight, Tensor d_bias, Tensor d_low, Tensor d_up, Tensor d_scale)",
)


@torch.library.impl("torchtune_lce::entropy_backward", "default")
@without_autocast
def _entropy_backward(d_entropy, *arguments):
    """Gradients by the six operands, empty where ``needs`` has no True."""
    operands, (targets, largest, others, disorder, *settings, needs) = Operands(*arguments[:6]), arguments[6:]
    needs = Operands(*needs)
    total = 1 + others
    _, _, logit_scale, _ = settings
    # By logits as they are before their scale.
    factor, mean = d_entropy * logit_scale / total, disorder / total

    def of_piece(piece):
        base, of_mean, by_entropy = (x[piece.rows, None] for x in (largest, mean, factor))

        def differentiate(logits, _):
            # With e as above, log p + H = log e + disorder / total; and an entry that cannot be has no gradient.
            e = logits.sub_(base).exp_()
            return torch.special.entr(e).sub_(e.mul_(of_mean)).mul_(by_entropy)

        return by_logits(piece, differentiate)

    walked = pieces(operands, targets, *settings, more_blocks=1, at_once=needs.of_entries)
    return walk_gradients(operands, walked, needs, of_piece)


@torch.library.register_fake("torchtune_lce::entropy_backward")
def _(d_entropy, *arguments):
    return no_values(Operands(*arguments[:6]), arguments[-1])


def _setup_context(ctx, inputs, output) -> None:
    *tensors, ignore_index, softcap, logit_scale, workspace_mib = inputs
    ctx.save_for_backward(*tensors)
    ctx.settings = ignore_index, softcap, logit_scale, workspace_mib


def _differentiate(ctx, d_entropy):
    needs = ctx.needs_input_grad[:6]
    gradients = torch.ops.torchtune_lce.entropy_backward(d_entropy, *ctx.saved_tensors, *ctx.settings, needs)
    return *(gradient if need else None for gradient, need in zip(gradients, needs, strict=True)), *[None] * 8


def _refuse_second_derivative(ctx, *_):
    raise RuntimeError("the entropy of linear_token_statistics has no second derivative (create_graph=True)")


torch.library.register_autograd("torchtune_lce::entropy", _differentiate, setup_context=_setup_context)
torch.library.register_autograd("torchtune_lce::entropy_backward", _refuse_second_derivative)


def token_statistics(call: Call) -> tuple[Tensor, Tensor]:
    """Entropy and whether the target is the most likely entry, both [N]; 0 and False where ignored.

    The entropy has gradients by the operands, but with a shard, whose rows are only some of the vocabulary's: then
    every rank of its mesh must call this, for figures alone.
    """
    call, outside = call.without_labels_outside()
    options, operands = call.options, call.operands
    settings = options.softcap, float(options.logit_scale), options.workspace_mib
    constants = [x if x is None else x.detach() for x in operands]
    found = Predictions(*torch.ops.torchtune_lce.predictions(*constants, *settings))
    if call.shard is not None:
        found, operands = _over_ranks(found, call.shard), constants
    entropy = torch.ops.torchtune_lce.entropy(
        *operands,
        call.labels,
        found.largest,
        found.others,
        found.disorder,
        options.ignore_index,
        *settings,
    )
    correct = (found.place == call.labels) & call.valid
    return entropy, correct if outside is None else correct & ~outside


def _over_ranks(found: Predictions, shard: VocabularyShard) -> Predictions:
    """Over all ranks' rows, from those over this rank's: three all-reduces over the tokens."""
    group = shard.mesh.get_group()
    largest = found.largest.clone()
    dist.all_reduce(largest, dist.ReduceOp.MAX, group=group)
    # Of equally large ones the first, as within a rank.
    own = (found.place + shard.start).where(found.largest == largest, shard.vocabulary)
    place = own.clone()
    dist.all_reduce(place, dist.ReduceOp.MIN, group=group)
    sums = torch.stack(found.measured_from(largest, own != place))
    dist.all_reduce(sums, group=group)
    return Predictions(largest, place, *sums)
