"""Make a torchtune model return the hidden states that its output projection would have taken."""

from types import MethodType

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
    if not _has_switch(decoder) and _function(decoder.unembed) not in (TransformerDecoder.unembed, _final_norm):
        raise TypeError(
            f"model must end as torchtune's decoders do, in norm and output, but this {type(decoder).__name__} has its "
            "own unembed; make it return the hidden states yourself and call the loss as "
            "loss(hidden, targets, weight=projection.weight)"
        )
    return decoder


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
        if _has_switch(decoder):
            decoder.skip_output_layer = True
        else:
            # A bound function lands in the instance's __dict__ and wins over the class; a module there (decoder.norm
            # itself) would be registered, would change the checkpoint, and would be ignored. Bound rather than a
            # closure, so that a deep copy of the model normalises with its own weights.
            decoder.unembed = MethodType(_final_norm, decoder)

    def restore(self) -> None:
        """The model returns logits again. Harmless when called twice."""
        if _has_switch(self._decoder):
            self._decoder.skip_output_layer = False
        else:
            vars(self._decoder).pop("unembed", None)


def _has_switch(decoder: TransformerDecoder) -> bool:
    """torchtune's main branch has this attribute; the 0.6.1 release does not."""
    return hasattr(decoder, "skip_output_layer")


def _function(method):
    """What a bound method calls; whatever else stands in its place."""
    return getattr(method, "__func__", method)


def _final_norm(decoder: TransformerDecoder, hidden: Tensor) -> Tensor:
    return decoder.norm(hidden)
