"""What stands for logits where only log-probabilities of given tokens are made of them: hidden states."""

import functools
import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from torchtune_lce.logprobs import LinearTokenLogprobs


class LogitsToCome:
    """Logits [..., V] of hidden states [..., D] that are not there, for code that was written for logits.

    Such code may take some of their rows by a slice, scale them by a number, and gather given tokens' out of their
    ``log_softmax`` over the vocabulary: these are computed then, by ``logprobs``, without the rest. The number is a
    factor on the logits, which are never rounded, and not on hidden states, which would be.

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
        if len(index) >= self._hidden.ndim or not all(isinstance(part, slice) for part in index):
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

    def _like(self, **changes) -> "LogitsToCome":
        own = {
            "hidden": self._hidden,
            "logprobs": self._logprobs,
            "scale": self._scale,
            "normalised": self._normalised,
        }
        return LogitsToCome(**own | changes)


_FUNCTIONS = {F.log_softmax: LogitsToCome.log_softmax, torch.gather: LogitsToCome.gather}


def give_logits_to_come(model: nn.Module, logprobs: LinearTokenLogprobs) -> None:
    """Binds ``model`` to ``logprobs``; what it returns is a :class:`LogitsToCome` from now on, and logits still within
    ``with logprobs.logits():``.
    """
    logprobs.set_model_output(model)
    model.register_forward_hook(functools.partial(_wrapped, logprobs))


def _wrapped(logprobs: LinearTokenLogprobs, model: nn.Module, arguments, output: Tensor):
    return LogitsToCome(output, logprobs) if logprobs.gives_hidden_states else output


def _not_there(what: str) -> TypeError:
    return TypeError(
        f"logits are not there for {what}: the model is bound to log-probabilities, and of its logits only slices over "
        "batch and sequence, a factor, and gather of log_softmax over the vocabulary are known; call it within "
        "`with logprobs.logits():` for the logits themselves"
    )
