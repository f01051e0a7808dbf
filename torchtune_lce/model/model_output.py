"""Make a torchtune model return the hidden states that its output projection would have taken."""

import functools
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import MethodType

import torch
import torchtune.generation
from torch import Tensor, nn
from torchtune.modules import TransformerDecoder


def uncompiled(module: nn.Module) -> nn.Module:
    """The module that torch.compile wrapped, or the module itself."""
    return getattr(module, "_orig_mod", module)


def find_decoder(model: nn.Module) -> TransformerDecoder:
    """The decoder of a torchtune model: itself, or what a fusion model keeps as ``.decoder``.

    Raises TypeError, saying what to do instead, for a model that torchtune did not build.
    """
    model = uncompiled(model)
    if isinstance(model, nn.parallel.DistributedDataParallel):
        raise TypeError(
            "model must be one that torchtune built, got DistributedDataParallel around one: shard it with FSDP2 "
            "(torch.distributed.fsdp.fully_shard) instead, or call skip_output_layer(model.module) and the loss as "
            "loss(hidden, targets, weight=model.module.output.weight)"
        )
    decoder = getattr(model, "decoder", model)
    if not isinstance(decoder, TransformerDecoder):
        raise TypeError(
            "model must be a torchtune.modules.TransformerDecoder or a fusion model with one as .decoder, "
            f"got {type(model).__name__}; for any other model call the loss as "
            "loss(hidden, targets, weight=projection.weight)"
        )
    check_unembed(decoder)
    return decoder


def check_unembed(decoder: TransformerDecoder) -> None:
    """Raises TypeError, saying what to do instead, for a decoder that ends in something of its own."""
    if not _has_switch(decoder) and _function(decoder.unembed) not in (TransformerDecoder.unembed, _unembed):
        raise TypeError(
            f"model must end as torchtune's decoders do, in norm and output, but this {type(decoder).__name__} has its "
            "own unembed; make it return the hidden states yourself and call the loss as "
            "loss(hidden, targets, weight=projection.weight)"
        )


def skip_output_layer(model: nn.Module) -> "SkippedOutputLayer":
    """From now on the model returns ``norm(h)``, [B, S, D] in its own dtype, in place of logits [B, S, V].

    Args:
        model: a torchtune decoder, or a fusion model around one, wrapped by FSDP2 or torch.compile or not.

    Returns:
        A handle; ``handle.restore()`` gives the model its output layer back.

    Raises:
        TypeError: the model is not one of torchtune's.
    """
    return SkippedOutputLayer(find_decoder(model))


class SkippedOutputLayer:
    """A decoder whose output projection is skipped until :meth:`restore`."""

    def __init__(self, decoder: TransformerDecoder):
        self._decoder = decoder
        self._restored = False
        _refuse_to_sample()
        _skip(decoder)

    def restore(self) -> None:
        """The model returns logits again. Harmless when called twice."""
        self._restored = True
        vars(self._decoder).pop("_gives_logits_to_come", None)
        _restore(self._decoder)

    def generates(self) -> None:
        """torchtune may generate from this model, as long as it is skipped: who asks for this hands it the logits of
        each next token.
        """
        self._decoder._gives_logits_to_come = True

    @property
    def is_skipped(self) -> bool:
        """Whether the model returns hidden states at this moment."""
        return _is_skipped(self._decoder)

    @contextmanager
    def logits(self) -> Iterator[None]:
        """Within it the model returns logits; behind it whatever it returned before, unless it was restored."""
        skipped = _is_skipped(self._decoder)
        _restore(self._decoder)
        try:
            yield
        finally:
            if skipped and not self._restored:
                _skip(self._decoder)


def _skip(decoder: TransformerDecoder) -> None:
    if _has_switch(decoder):
        decoder.skip_output_layer = True
        return
    # A bound function lands in the instance's __dict__ and wins over the class; a module there (decoder.norm itself)
    # would be registered, would change the checkpoint, and would be ignored. Bound rather than a closure, so that a
    # deep copy of the model normalises with its own weights.
    decoder.unembed = MethodType(_unembed, decoder)
    decoder._returns_hidden_states = True
    _forget_compiled()


def _restore(decoder: TransformerDecoder) -> None:
    if _has_switch(decoder):
        decoder.skip_output_layer = False
        return
    if vars(decoder).pop("unembed", None) is not None:
        vars(decoder).pop("_returns_hidden_states", None)
        _forget_compiled()


def _forget_compiled() -> None:
    """Compilers before torch 2.11 do not guard that a module lacks an attribute, and would not see one that is new.

    All that was compiled in the process is then compiled again when it is next called: who called what is not known.
    """
    if torch.__version__ < (2, 11) and "torch._dynamo" in sys.modules:
        torch.compiler.reset()


def _is_skipped(decoder: TransformerDecoder) -> bool:
    return getattr(decoder, "skip_output_layer", False) or vars(decoder).get("_returns_hidden_states", False)


def _unembed(decoder: TransformerDecoder, hidden: Tensor) -> Tensor:
    # True wherever this is bound, and read all the same: what torch.compile made of a bound function stays in use, in
    # torch 2.11 at least, once that is taken away, but not once an attribute that it read is.
    if decoder._returns_hidden_states:
        return decoder.norm(hidden)
    return TransformerDecoder.unembed(decoder, hidden)


def _refuse_to_sample() -> None:
    """torchtune's generation takes hidden states for logits: from now on it refuses a model that returns them.

    Nothing in the model's own call tells generation from validation, whose arguments and gradient mode are the same.
    """
    for module in (torchtune.generation._generation, torchtune.generation):
        if not hasattr(module.generate_next_token, "_refuses_hidden_states"):
            module.generate_next_token = _refusing(module.generate_next_token)


def _refusing(generate_next_token: Callable) -> Callable:
    # generate() takes its first token from this function even where it is given another one for the rest.
    @functools.wraps(generate_next_token)
    def checked(model: nn.Module, *args, **kwargs):
        inner = uncompiled(model)
        decoder = getattr(inner, "decoder", inner)
        if _is_skipped(decoder) and not vars(decoder).get("_gives_logits_to_come", False):
            raise RuntimeError(
                f"model must return logits to generate from, but this {type(inner).__name__} is bound to a loss and "
                "returns hidden states, which would be taken for logits: generate within `with loss.logits():`, or "
                "after loss.release() (after restore(), where skip_output_layer was called)"
            )
        return generate_next_token(model, *args, **kwargs)

    checked._refuses_hidden_states = True
    return checked


def _has_switch(decoder: TransformerDecoder) -> bool:
    """torchtune's main branch has this attribute; the 0.6.1 release does not."""
    return hasattr(decoder, "skip_output_layer")


def _function(method):
    """What a bound method calls; whatever else stands in its place."""
    return getattr(method, "__func__", method)
