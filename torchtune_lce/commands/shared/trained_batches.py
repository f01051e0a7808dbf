"""A synthetic softmax with the sparsity of a trained language model's, at any size, in a second.

A logit is the entry's popularity, plus how well the entry suits the token, plus a favour for one entry:

* popularities fall like a power of the rank, as word frequencies do, so frequent entries are active nearly everywhere;
* how well an entry suits a token is Gaussian, so that a few of the many rare entries come into play in each token, and
  others in the next;
* one entry per token, drawn by popularity, stands out by a Gaussian amount: large ones make tokens that are as good as
  certain. It is the target.

Entry ids follow the ranks only roughly, as in a vocabulary that was made from other text.

The constants were fitted to a small language model of documentation and Python source, over its training tokens (8192
of them, D = 2048, V = 151,936): loss 2.1, entropy 2.84 nats, 118 entries over 2^-12 a token, and of the tiles of 128
tokens by 128 entries 0.41 with such an entry or a target in natural order of the vocabulary, 0.15 sorted by mean logit,
0.10 sorted by the number of row blocks with the entry active.
"""

import math

import torch

from torchtune_lce.commands.shared.batches import Batch
from torchtune_lce.commands.shared.shapes import Shape

_POPULARITY_EXPONENT = 1.38
_POPULARITY_OFFSET = 6.0  # flattens the head of the power law
_SUIT_STD = 1.97
_FAVOUR_MEAN, _FAVOUR_STD, _FAVOUR_LEAST = 5.7, 6.0, 2.5
_FAVOURED_SHARPNESS = 1.2  # favoured entries are drawn from popularity to this power
_ID_NOISE = 1.35  # in units of the logarithm of the rank


def trained_batch(shape: Shape, dtype: torch.dtype, device: torch.device, seed: int = 0) -> Batch:
    """Hidden states and weight whose products are the logits described above, with the rounding of ``dtype``.

    The Gaussian part needs room: below about 256 features the favoured entry's neighbours by chance get too much of it.
    """
    generator = torch.Generator(device).manual_seed(seed)

    def normal(*size: int) -> torch.Tensor:
        return torch.randn(*size, generator=generator, device=device, dtype=torch.float32)

    root = math.sqrt(shape.hidden)
    rank = torch.arange(shape.vocab, device=device, dtype=torch.float32).add_(_POPULARITY_OFFSET).log_()
    # Position = id, value = logarithm of the popularity's rank.
    rank = rank[(rank + _ID_NOISE * normal(shape.vocab)).argsort()]
    popularity = -_POPULARITY_EXPONENT * rank
    favoured = torch.multinomial(
        (_FAVOURED_SHARPNESS * popularity).softmax(0), shape.tokens, replacement=True, generator=generator
    )
    favour = (_FAVOUR_MEAN + _FAVOUR_STD * normal(shape.tokens)).clamp_(min=_FAVOUR_LEAST)

    # One direction, half as long as a hidden state, carries popularity; nothing else has a part in it.
    common = normal(shape.hidden)
    common /= common.norm()
    length = root / 2
    weight = normal(shape.vocab, shape.hidden).mul_(_SUIT_STD / root)
    _remove(weight, common)
    hidden = normal(shape.tokens, shape.hidden)
    _remove(hidden, common)
    # The favoured row has chance products with all others: the rest of the hidden state shrinks by as much.
    by_chance = (favour / root / _SUIT_STD).square()
    hidden *= (1 - by_chance).clamp_(min=0).sqrt()[:, None]
    rows = weight[favoured]
    hidden += rows * (favour / rows.square().sum(1))[:, None]
    hidden += length * common
    # Softmax does not see a constant; centred, the logits are as small as they can be.
    weight.addr_((popularity - popularity.mean()) / length, common)
    return Batch("trained", "trained", hidden.to(dtype), weight.to(dtype), favoured)


def _remove(matrix: torch.Tensor, direction: torch.Tensor) -> None:
    """Takes the part along a unit vector out of every row, in place."""
    matrix.addr_(matrix @ direction, direction, alpha=-1)
