"""The output projection of a torchtune model: which tensors it is made of, and how to reach them."""

import itertools
import sys
import weakref
from collections.abc import Callable, Iterator
from types import MethodType

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, register_fsdp_forward_method
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass
from torchtune.modules.peft import DoRALinear, LoRALinear, QATLoRALinear
from torchtune.modules.tied_linear import TiedLinear

from torchtune_lce.model.model_output import check_unembed, find_decoder, uncompiled
from torchtune_lce.model.output_adapter import Adapter, is_dora

_counter = itertools.count()
# Roots that let go of their parameters after forward until a projection had them keep them.
_made_to_keep = weakref.WeakSet()
# Who puts hooks on a head that leave its product as it is, or that the loss stands in for: FSDP2 gathers the weight,
# tensor parallelism splits it, torchtune opts the head out of offloading.
_KNOWN_HOOKS = ("torch.distributed.", "torchtune.training.")
_HOOKS = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")


class Projection:
    """The weight [V, D] and bias [V] of a model's output, read anew at every call: FSDP2 and optimizers swap them.

    Raises TypeError or ValueError, saying what to do instead, for an output that is no product with one matrix, beside
    an adapter.
    """

    def __init__(self, model: nn.Module):
        model, decoder = uncompiled(model), find_decoder(model)
        self._decoder = decoder
        self._output = decoder.output
        self._owner = _owner(self._output)
        _check_untouched(self._output)
        _check_covers_vocabulary(output_rows(model), embedding_rows(model))
        for tensor in self._tensors():
            # Sharded is what FSDP2 parameters are between two forwards; inside one they are checked again.
            if not isinstance(tensor, DTensor):
                _check_plain(tensor)
        self._holder = _deepest_fsdp_module(model, self._owner)
        self._fsdp = isinstance(self._holder, FSDPModule)
        # Without FSDP2 only tensor parallelism splits a weight. With it, what is split still while its holder runs is.
        self._mesh = None if self._fsdp else getattr(self._owner.weight, "device_mesh", None)
        if self._fsdp:
            # For its mesh to be that of the shards.
            self._holder.reshard()
            self._shards_mesh = getattr(self._owner.weight, "device_mesh", None)
        self._is_root = self._holder is model
        self._method = f"_linear_cross_entropy_{next(_counter)}"
        setattr(self._holder, self._method, MethodType(_call_with_projection, self._holder))
        # FSDP2 then gathers the weight before the method and averages its gradient over the ranks after the backward,
        # just as it does for forward(). It does nothing to a model that is not sharded.
        register_fsdp_forward_method(self._holder, self._method)

    def call(
        self,
        function: Callable,
        hidden: Tensor,
        targets: Tensor | None,
        read_in_backward: bool = True,
    ):
        """``function(hidden, targets, weight, bias, adapter)``, within what FSDP2 takes for a forward of the weight's
        holder. The weight is without the :attr:`adapter`, which is None where there is none.

        Weight and bias are DTensors where tensor parallelism splits them, on its mesh alone. FSDP2 gathers them once
        more for the backward, unless that will not read them: then ``read_in_backward`` spares it.
        """
        self._check_as_bound()
        trains = torch.is_grad_enabled()
        shown, made = hidden, []
        if self._stays_gathered():
            # Shown hidden states that need a gradient, FSDP2 would free the weight when they have it, and then gather
            # it again for the holder's own backward. It says only which dtype they must have.
            shown = torch.empty(0, dtype=hidden.dtype, device=hidden.device)

        def run(shown_hidden: Tensor, *others):
            taken = shown_hidden if shown is hidden else hidden.to(shown_hidden.dtype)
            made.append(function(self.input(taken), *others))
            return made[0]

        with torch.set_grad_enabled(trains and read_in_backward):
            result = getattr(self._holder, self._method)(self, run, shown, targets, trains)
        if result.dtype != made[0].dtype:
            raise TypeError(
                f"FSDP2 would round the loss from {made[0].dtype} to {result.dtype}: leave output_dtype out of the "
                f"MixedPrecisionPolicy of the {type(self._holder).__name__}, or set it to torch.float32"
            )
        if self._holder in _made_to_keep and not trains:
            # No backward will do it.
            self._holder.reshard()
        return result

    def logits(self, hidden: Tensor) -> Tensor:
        """What the model itself makes of hidden states [..., D]: float32 [..., V]."""
        return self.call(lambda *operands: self._output(hidden).float(), hidden, None)

    def _check_as_bound(self) -> None:
        """Raises TypeError for whatever happened to the head since that this projection does not compute."""
        check_unembed(self._decoder)
        if self._decoder.output is not self._output or _owner(self._output) is not self._owner:
            raise TypeError(
                "model.output is another module than set_model_output found: call set_model_output again after "
                "whatever replaces it, an adapter or a tied embedding"
            )
        _check_untouched(self._output)

    def _stays_gathered(self) -> bool:
        """Whether FSDP2 keeps the weight gathered from the holder's forward to its backward.

        torchtune has the root let go of its parameters after forward: they would be gathered again for the loss at
        once, so it has to keep them from now on.
        """
        if not self._fsdp or self._holder in _made_to_keep:
            return False
        if getattr(self._owner.weight, "device_mesh", None) != self._shards_mesh:
            return True
        if self._is_root:
            self._holder.set_reshard_after_forward(False, recurse=False)
            _made_to_keep.add(self._holder)
        return False

    @property
    def trained(self) -> bool:
        return any(tensor.requires_grad for tensor in self._tensors())

    @property
    def adapter(self) -> Adapter | None:
        """The output layer itself, if it has an adapter in use."""
        output = self._output
        return output if isinstance(output, Adapter) and not output.disabled else None

    def release(self) -> None:
        vars(self._holder).pop(self._method, None)

    def read(self) -> tuple[Tensor, Tensor | None]:
        for tensor in self._tensors():
            if not isinstance(tensor, DTensor):
                _check_plain(tensor)
            elif not self._fsdp and tensor.device_mesh != self._mesh:
                raise TypeError(
                    f"weight of the model's output is a DTensor ({', '.join(map(str, tensor.placements))}) on a mesh "
                    "that it was not on before: apply FSDP2 before set_model_output, and tensor parallelism too"
                )
            elif isinstance(self._output, Adapter):
                raise TypeError(
                    f"model.output is a {'DoRALinear' if is_dora(self._output) else 'LoRALinear'} under tensor "
                    "parallelism, whose adapters are not split as its weight is: set apply_lora_to_output: False"
                )
            elif _is_fake_quantised(self._output):
                raise TypeError(
                    f"model.output is a {type(self._output).__name__} under tensor parallelism, and its fake "
                    "quantizers take whole tensors: set tensor_parallel_dim: 1"
                )
        if isinstance(self._output, TiedLinear):
            return self._owner.weight, None
        if _is_fake_quantised(self._output):
            return _applied(self._output.weight_fake_quantizer, self._output.weight), self._output.bias
        return self._output.weight, self._output.bias

    def input(self, hidden: Tensor) -> Tensor:
        """What the output's product takes in place of ``hidden``: quantisation-aware training rounds it."""
        if _is_fake_quantised(self._output):
            return _applied(self._output.activation_fake_quantizer, hidden)
        return hidden

    def _tensors(self) -> Iterator[Tensor]:
        if isinstance(self._output, TiedLinear):
            yield self._owner.weight
        else:
            yield from self._output.parameters()


def _call_with_projection(
    holder: nn.Module,
    projection: Projection,
    function: Callable,
    hidden: Tensor,
    targets: Tensor,
    trains: bool,
):
    with torch.set_grad_enabled(trains):
        weight, bias = projection.read()
        return function(hidden, targets, weight, bias, projection.adapter)


def output_rows(model: nn.Module) -> int:
    """V. Raises as :class:`Projection` does for an output that it does not know."""
    return _owner(find_decoder(model).output).weight.shape[0]


def embedding_rows(model: nn.Module) -> int | None:
    """Entries of the token embedding, which an early fusion model keeps in place of its decoder; None for one of
    another kind, as of a vision model, whose special tokens have a table of their own.
    """
    model = uncompiled(model)
    for holder in (find_decoder(model), model):
        rows = getattr(getattr(holder, "tok_embeddings", None), "num_embeddings", None)
        if rows is not None:
            return rows
    return None


def _owner(output) -> nn.Module:
    """The module whose parameters the projection uses."""
    if isinstance(output, TiedLinear):
        return output.tied_module
    # By the function that runs, not by the class: FSDP2 subclasses what it wraps, and other subclasses compute
    # something else from the same weight.
    known = (nn.Linear.forward, LoRALinear.forward, DoRALinear.forward)
    if isinstance(output, nn.Module) and type(output).forward in known:
        return output
    if _is_fake_quantised(output):
        return output
    if isinstance(output, QATLoRALinear):
        raise TypeError(
            "model.output is a QATLoRALinear, whose adapter takes hidden states that its weight takes rounded: set "
            "apply_lora_to_output: False"
        )
    raise TypeError(
        "model.output must be a torch.nn.Linear, or torchtune's TiedLinear, LoRALinear or DoRALinear, "
        f"got {type(output).__name__}; for another kind of output call the loss as loss(hidden, targets, weight=...)"
    )


def _check_untouched(output) -> None:
    """Raises TypeError for what the output does when it is called and the loss, which reads its weight, would not do.

    Parametrisations are no such thing: reading the weight applies them.
    """
    for name, module in _passed_by(output):
        if "forward" in vars(module):
            raise TypeError(
                f"model.{name} has its own forward, set on this one {type(module).__name__}: remove it, since the loss "
                "reads the weight and would pass it by, or keep torch.nn.CrossEntropyLoss"
            )
        for hook in itertools.chain.from_iterable(getattr(module, kind).values() for kind in _HOOKS):
            origin = getattr(hook, "__module__", None) or ""
            if not origin.startswith(_KNOWN_HOOKS):
                what = getattr(hook, "__qualname__", type(hook).__name__)
                raise TypeError(
                    f"model.{name} has a hook ({what} of {origin}), and the loss, which reads the weight, would pass "
                    "it by: remove it (prune.remove, remove_weight_norm, remove_spectral_norm of torch.nn.utils make "
                    "theirs permanent; torch.nn.utils.parametrizations are honoured), or keep torch.nn.CrossEntropyLoss"
                )


def _passed_by(output) -> Iterator[tuple[str, nn.Module]]:
    """The modules that the model calls for its logits and the loss does not, with their names in the model."""
    if isinstance(output, TiedLinear):
        yield "output.linear", output.linear
        return
    yield "output", output
    if isinstance(output, Adapter):
        yield "output.lora_b", output.lora_b


def _is_fake_quantised(output) -> bool:
    """Whether it is torchao's linear layer for quantisation-aware training, of any kind.

    Such a model has imported that class; nobody else need wait for it.
    """
    kind = getattr(sys.modules.get("torchao.quantization.qat.linear"), "FakeQuantizedLinear", None)
    return kind is not None and isinstance(output, kind) and type(output).forward is kind.forward


def _applied(fake_quantizer: nn.Module | None, tensor: Tensor) -> Tensor:
    return tensor if fake_quantizer is None else fake_quantizer(tensor)


def _check_plain(tensor: Tensor) -> None:
    if is_traceable_wrapper_subclass(tensor):
        raise TypeError(
            f"weight of the model's output must be a plain tensor, got {type(tensor).__name__}: leave the output "
            "projection unquantised"
        )


def _check_covers_vocabulary(output_rows: int, embedding_rows: int | None) -> None:
    # Half: a head may be a little shorter than the embedding, whose special tokens are never predicted.
    if embedding_rows is not None and output_rows < embedding_rows / 2:
        raise ValueError(
            f"model.output has {output_rows} rows for {embedding_rows} token embeddings: that is a classifier's head, "
            "and targets name classes, not tokens; keep torch.nn.CrossEntropyLoss for it"
        )


def _deepest_fsdp_module(model: nn.Module, owner: nn.Module) -> nn.Module:
    """The FSDP2 module whose forward gathers the parameters of ``owner``; without FSDP2 the model itself."""
    path = next((name for name, module in model.named_modules() if module is owner), None)
    if path is None:
        raise ValueError(
            f"model holds no {type(owner).__name__} that its output is tied to: pass the whole model, not its decoder"
        )
    holder, module = model, model
    for name in filter(None, path.split(".")):
        module = getattr(module, name)
        if isinstance(module, FSDPModule):
            holder = module
    return holder
