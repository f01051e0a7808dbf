"""A model's forward, wrapped: in training with labels its output projection and its loss function work together."""

import functools
import inspect
from collections.abc import Callable
from dataclasses import fields, is_dataclass
from types import MethodType

from torch import nn

from torchtune_lce.implementations import choice
from torchtune_lce.inputs import validation
from torchtune_lce.inputs.options import Options
from torchtune_lce.transformers import bypass, head
from torchtune_lce.transformers.deferred_logits import DeferredLogits
from torchtune_lce.transformers.loss import causal_lm_loss, stock_loss
from torchtune_lce.transformers.switch import NAME, Switch

LABELS = ("labels", "shift_labels")


def patch(
    model: nn.Module, impl: str = "auto", filter_eps: float | str | None = "auto", workspace_mib: int = 128
) -> nn.Module:
    """Makes a model of transformers compute its loss from hidden states, without logits; returns the model.

    In training with labels, its own forward runs with an output projection that puts its product off until the loss
    function, which computes loss and gradients without it. ``logits`` of the result is then None. In evaluation, in
    generation and without labels all is as before. A forward that uses logits in another way gets them, as before, and
    a warning says so once. Whatever sits around the model may be given too: PEFT's model, DDP, a compiled model.

    Args:
        impl: one of :data:`torchtune_lce.implementations.choice.NAMES`.
        filter_eps, workspace_mib: see :func:`torchtune_lce.linear_cross_entropy`.

    Raises:
        TypeError, ValueError: no model of transformers, or a setting that no implementation accepts, by name.
    """
    choice.check_name(impl)
    options = Options(filter_eps=filter_eps, workspace_mib=workspace_mib)
    validation.check_options(options)
    inner = _inner(model)
    _release(inner)
    switch = Switch(type(inner).__name__, impl, options)
    why = _foreign_parts(inner)
    if why is not None:
        switch.say(*why)
        return model
    setattr(inner, NAME, switch)
    # As methods, which a copy of the model binds to itself.
    inner._loss_function = MethodType(causal_lm_loss, inner)
    if "forward" not in vars(inner):
        inner.forward = MethodType(_wrapper(type(inner).forward), inner)
    switch.watch = bypass.watch(inner)
    # Here too, so that a compiler finds it done.
    why = head.make_ready(inner.get_output_embeddings(), switch)
    if why is not None:
        switch.say(why)
    return model


def unpatch(model: nn.Module) -> nn.Module:
    """Undoes :func:`patch`, and returns the model. Harmless where nothing is patched.

    A forward that somebody has put around the patched one since, or in its place, stays where it is.
    """
    _release(_inner(model))
    return model


def _release(inner: nn.Module) -> None:
    if NAME in vars(inner):
        function = getattr(vars(inner).get("forward"), "__func__", None)
        # What has been put around ours calls it still: it does nothing then.
        if function is not None and getattr(function, "lce_wrapper", None) is function:
            del inner.forward
        watch = getattr(inner, NAME).watch
        if watch is not None:
            watch.remove()
        delattr(inner, NAME)
        if _is_ours(inner):
            del inner._loss_function
    head.release(inner)


def _inner(model: nn.Module) -> nn.Module:
    """The model of transformers in DDP, in a compiled model or in PEFT's."""
    from transformers import PreTrainedModel

    seen = model
    while not isinstance(seen, PreTrainedModel):
        if hasattr(seen, "get_base_model"):
            seen = seen.get_base_model()
        elif isinstance(seen, nn.Module) and hasattr(seen, "_orig_mod"):
            seen = seen._orig_mod
        elif isinstance(seen, nn.Module) and isinstance(getattr(seen, "module", None), nn.Module):
            seen = seen.module
        else:
            raise TypeError(f"model must be a transformers.PreTrainedModel, or PEFT's around one, got {type(model)}")
    return seen


def _is_around_ours(forward: Callable | None) -> bool:
    """Whether it is the patched forward, or names it as what it is around."""
    while forward is not None and not hasattr(forward, "lce_wrapper"):
        forward = getattr(forward, "__wrapped__", None)
    return forward is not None


def _is_ours(inner: nn.Module) -> bool:
    # In the words that Dynamo follows from torch 2.8 on: neither `vars` nor a default for a method's `__func__`.
    loss = inner.__dict__.get("_loss_function")
    return isinstance(loss, MethodType) and loss.__func__ is causal_lm_loss


def _foreign_parts(inner: nn.Module) -> tuple[str, ...] | None:
    """What to say of a model that is left alone."""
    if "forward" in vars(inner) and not _is_around_ours(inner.forward):
        return "its forward has been replaced on this one model: patch it before that", bypass.STATE
    loss = inner.loss_function
    if loss is stock_loss():
        return None
    return (f"its loss_function is {getattr(loss, '__name__', type(loss).__name__)}, not ForCausalLMLoss",)


def _wrapper(stock: Callable) -> Callable:
    names = list(inspect.signature(stock).parameters)[1:]
    places = [(name, names.index(name) if name in names else len(names)) for name in LABELS]

    @functools.wraps(stock)
    def forward(self, *args, **kwargs):
        if NAME not in self.__dict__:
            return stock(self, *args, **kwargs)
        switch = getattr(self, NAME)
        bypass.note_call(self)
        given = any(
            kwargs.get(name) is not None or (place < len(args) and args[place] is not None) for name, place in places
        )
        if not self.training or not given or switch.on:
            return stock(self, *args, **kwargs)
        why = _passed_by(self, kwargs) or head.make_ready(self.get_output_embeddings(), switch)
        if why is not None:
            switch.say(why)
            return stock(self, *args, **kwargs)
        switch.on = True
        try:
            result = stock(self, *args, **kwargs)
        finally:
            switch.on = False
        return _without_logits(result)

    forward.lce_wrapper = forward
    # Not by name: who takes wrappers away, as accelerate does, would take ours too.
    forward.__signature__ = inspect.signature(stock)
    del forward.__wrapped__
    return forward


def _passed_by(model: nn.Module, kwargs: dict) -> str | None:
    """Why this call is left to the model alone."""
    if not _is_ours(model):
        return "its loss_function has been replaced since the patch"
    asked = kwargs.get("return_dict")
    if asked is False or (asked is None and not getattr(model.config, "return_dict", True)):
        return "return_dict is False, and a tuple has no place for logits that are None"
    return None


def _without_logits(result):
    """The result with None for logits that nobody has made; those that no loss was made of are made now."""
    if not is_dataclass(result):
        return result
    deferred = {
        part.name: value
        for part in fields(result)
        if isinstance(value := getattr(result, part.name, None), DeferredLogits)
    }
    if not deferred:
        return result
    changed = {name: value.made for name, value in deferred.items()}
    if getattr(result, "loss", None) is None:
        for name, value in deferred.items():
            value.say(why := "its result has no loss")
            changed[name] = value.look(why)
    kept = {part.name: getattr(result, part.name) for part in fields(result)}
    return type(result)(**{**kept, **changed})
