"""What stands for logits where only log-probabilities of given tokens are made of them: hidden states."""

import functools
import math
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from torchtune_lce.logprobs import LinearTokenLogprobs


class LogitsToCome:
    """Logits [..., V] of hidden states [..., D] that are not there, for code that was written for logits.

    Such code may take some of their rows by a slice, scale them by a number, and gather given tokens' out of their
    ``log_softmax`` over the vocabulary: these are computed then, by ``logprobs``, without the rest. The number is a
    factor on the logits, which are never rounded, and not on hidden states, which would be.

    torchtune's generation takes the last position [B], samples from a ``clone``, which is those logits themselves, and
    joins what it returns of all tokens: that stays hidden states, [B, R, D].

    Raises:
        TypeError: by anything else, which names it.
    """

    def __init__(self, hidden: Tensor, logprobs: LinearTokenLogprobs, scale: float = 1.0, normalised: bool = False):
        self._hidden, self._logprobs, self._scale, self._normalised = hidden, logprobs, scale, normalised

    @property
    def shape(self) -> torch.Size:
        return torch.Size((*self._hidden.shape[:-1], self._logprobs.rows))

    def __getitem__(self, index) -> "LogitsToCome":
        index = index if isinstance(index, tuple) else (index,)
        if len(index) >= self._hidden.ndim or not all(isinstance(part, (slice, int)) for part in index):
            raise _not_there(f"index {index}")
        return self._like(hidden=self._hidden[index])

    def __mul__(self, factor: float) -> "LogitsToCome":
        if self._normalised or not isinstance(factor, (int, float)) or not math.isfinite(factor):
            raise _not_there(f"a product with {factor!r}")
        return self._like(scale=self._scale * factor)

    def __truediv__(self, divisor: float) -> "LogitsToCome":
        if not isinstance(divisor, (int, float)) or divisor == 0:
            raise _not_there(f"a quotient by {divisor!r}")
        return self * (1 / divisor)

    @classmethod
    def __torch_function__(cls, function: Callable, types, args=(), kwargs=None):
        if function not in _FUNCTIONS:
            raise _not_there(getattr(function, "__name__", str(function)))
        return _FUNCTIONS[function](*args, **(kwargs or {}))

    def log_softmax(self, dim: int | None = None, _stacklevel: int = 3, dtype: torch.dtype | None = None):
        if self._normalised or dim not in (-1, self._hidden.ndim - 1) or dtype not in (None, torch.float32):
            raise _not_there(f"log_softmax(dim={dim}, dtype={dtype})")
        return self._like(normalised=True)

    def gather(self, dim: int, index: Tensor, *, sparse_grad: bool = False) -> Tensor:
        """[..., 1] float32, of the tokens ``index`` [..., 1]."""
        if not self._normalised or dim not in (-1, self._hidden.ndim - 1) or index.shape[-1] != 1 or sparse_grad:
            raise _not_there(f"gather(dim={dim}) of {list(index.shape)}")
        return self._logprobs(self._hidden, index.squeeze(-1), logit_scale=self._scale).unsqueeze(-1)

    def clone(self) -> Tensor:
        """The logits themselves of one position a row, [B, V] float32: a copy that may be written to, as sampling does.

        Without a gradient, as torchtune generates.
        """
        if self._normalised or self._hidden.ndim != 2:
            raise _not_there(f"clone of {list(self.shape)}")
        with torch.no_grad():
            logits = self._logprobs.logits_of(self._hidden)
        return logits if self._scale == 1 else logits * self._scale

    def unsqueeze(self, dim: int) -> "LogitsToCome":
        if not 0 <= dim < self._hidden.ndim:
            raise _not_there(f"unsqueeze({dim})")
        return self._like(hidden=self._hidden.unsqueeze(dim))

    @staticmethod
    def cat(parts: Sequence["LogitsToCome"], dim: int = 0) -> "LogitsToCome":
        first = parts[0]
        alike = all(isinstance(part, LogitsToCome) and part._same_kind_as(first) for part in parts)
        if not alike or not 0 <= dim < first._hidden.ndim - 1:
            raise _not_there(f"cat(dim={dim}) with others")
        return first._like(hidden=torch.cat([part._hidden for part in parts], dim))

    def _same_kind_as(self, other: "LogitsToCome") -> bool:
        return (self._logprobs, self._scale, self._normalised) == (other._logprobs, other._scale, other._normalised)

    def _like(self, **changes) -> "LogitsToCome":
        own = {
            "hidden": self._hidden,
            "logprobs": self._logprobs,
            "scale": self._scale,
            "normalised": self._normalised,
        }
        return LogitsToCome(**own | changes)


_FUNCTIONS = {F.log_softmax: LogitsToCome.log_softmax, torch.gather: LogitsToCome.gather, torch.cat: LogitsToCome.cat}


def give_logits_to_come(model: nn.Module, logprobs: LinearTokenLogprobs) -> None:
    """Binds ``model`` to ``logprobs``; what it returns is a :class:`LogitsToCome` from now on, and logits still within
    ``with logprobs.logits():``. torchtune generates from either.
    """
    logprobs.set_model_output(model)
    logprobs.generates()
    model.register_forward_hook(functools.partial(_wrapped, logprobs))


def _wrapped(logprobs: LinearTokenLogprobs, model: nn.Module, arguments, output: Tensor):
    return LogitsToCome(output, logprobs) if logprobs.gives_hidden_states else output


def _not_there(what: str) -> TypeError:
    return TypeError(
        f"logits are not there for {what}: the model is bound to log-probabilities, and of its logits only slices over "
        "batch and sequence, a factor, gather of log_softmax over the vocabulary, and a clone of one position a row "
        "are known; call it within `with logprobs.logits():` for the logits themselves"
    )
