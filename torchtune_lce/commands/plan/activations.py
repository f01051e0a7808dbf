"""What the forward of a model keeps for its backward, counted on the meta device: nothing is loaded or computed.

The count is of the distinct tensors that autograd saves, and of those that are alive at once while a layer goes forward
and back, so it holds for every model that torchtune builds. Attention is the exception: it is counted as FlashAttention
has it (queries, keys, values, output and a float32 log-sum-exp a row and head; backward a float32 sum of the queries'
gradient; Dao 2023, arXiv 2307.08691), which is what runs on a card; the meta device would save all scores.
"""

import warnings
import weakref
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from omegaconf import DictConfig
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torchtune import training
from torchtune.modules import TransformerDecoder
from torchtune.modules.peft import get_adapter_params, set_trainable_params

from torchtune_lce.commands.shared.errors import CommandError
from torchtune_lce.commands.shared.random_weights import configured_model
from torchtune_lce.model.model_output import find_decoder, skip_output_layer


@dataclass(frozen=True)
class Activations:
    """Bytes that one forward of a batch saves, without the output projection and the loss.

    ``layers``: of each decoder layer, in their order; ``outside``: before, between and after them; ``layer_input``:
    what a checkpointed layer keeps in place of its own, all of it or nothing among its own too: ``saved_input``;
    ``moving``: the most that is alive at once, beside what the last layer saves, in its forward and backward;
    ``untrained``: in a forward that keeps nothing, its input too.
    """

    layers: tuple[int, ...]
    outside: int
    layer_input: int
    saved_input: int
    moving: int
    untrained: int


def build(config: DictConfig, section: str, dtype: torch.dtype) -> nn.Module:
    """A section's model as a recipe builds it, unquantised and without memory; of one with adapters these alone train.

    Raises CommandError for one that cannot be built, or that takes images, whose activations nothing here counts.
    """
    try:
        with training.set_default_dtype(dtype):
            model = configured_model(config, section)
    except CommandError as error:
        if "torchvision" in str(error):
            raise CommandError(f"{_images(config, section)}; to run it here, pip install torchvision") from error
        raise
    if not isinstance(model, TransformerDecoder):
        raise CommandError(_images(config, section))
    for module in model.modules():
        if hasattr(module, "rope_init"):
            # Some position embeddings compute their tables from values, which meta tensors have none of.
            module.rope_init()
            module.to("meta")
    adapters = get_adapter_params(model)
    if adapters:
        set_trainable_params(model, adapters)
    return model


def _images(config: DictConfig, section: str) -> str:
    return (
        f"{section}: {config[section]._component_} takes more than tokens (images), and what that keeps is not counted"
    )


class Rows:
    """Of a model that :func:`build` made: the activations of any number of rows of ``sequence`` tokens.

    Raises CommandError for a model that cannot be run with its settings.
    """

    def __init__(self, model: nn.Module, sequence: int):
        self._layer = find_decoder(model).layers[-1]
        # What is saved grows by as much with each row; masks, and what is of a weight's size, do not grow.
        self._one, self._two = (_save(model, rows, sequence) for rows in (1, 2))
        self._found: dict[int, Activations] = {}

    def activations(self, rows: int) -> Activations:
        if rows not in self._found:
            self._found[rows] = self._count(rows)
        return self._found[rows]

    def _count(self, rows: int) -> Activations:
        def grown(one: int, two: int) -> int:
            return one + (rows - 1) * (two - one)

        layers = tuple(map(grown, self._one.layers, self._two.layers))
        state = self._one.state.new_empty((rows, *self._one.state.shape[1:]))
        with _run():
            most, unsaved = _most_alive(self._layer, state, self._one.others)
        return Activations(
            layers=layers,
            outside=grown(self._one.outside, self._two.outside),
            layer_input=state.nbytes,
            saved_input=state.nbytes if self._one.saves_input else 0,
            moving=most - layers[-1],
            untrained=state.nbytes + unsaved,
        )


@dataclass(frozen=True)
class _Saved:
    """Bytes, as of :class:`Activations`, and how the last layer was called."""

    layers: tuple[int, ...]
    outside: int
    state: Tensor  # [rows, sequence, D] on the meta device: the last layer's input
    others: dict  # its other arguments
    saves_input: bool


def _save(model: nn.Module, rows: int, sequence: int) -> _Saved:
    decoder = find_decoder(model)
    not_activations = {_storage(tensor) for tensor in (*model.parameters(), *model.buffers())}
    saved: dict[int, tuple[torch.UntypedStorage, int]] = {}  # the storage itself too: a freed one's number is reused
    outside = len(decoder.layers)
    where = [outside]  # the layer that runs, or the number of layers

    def pack(tensor: Tensor) -> Tensor:
        storage = _storage(tensor)
        if storage not in not_activations and storage not in saved:
            saved[storage] = (tensor.untyped_storage(), where[0])
        return tensor

    calls = []
    hooks = [decoder.layers[-1].register_forward_pre_hook(lambda _, *call: calls.append(call), with_kwargs=True)]
    for index, layer in enumerate(decoder.layers):
        hooks.append(layer.register_forward_pre_hook(lambda *_, index=index: where.__setitem__(0, index)))
        hooks.append(layer.register_forward_hook(lambda *_: where.__setitem__(0, outside)))
    skipped = skip_output_layer(model)
    tokens = torch.zeros(rows, sequence, dtype=torch.int64, device="meta")
    try:
        with _run(), torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            model(tokens)
    finally:
        skipped.restore()
        for hook in hooks:
            hook.remove()
    totals = [0] * (outside + 1)
    for storage, index in saved.values():
        totals[index] += storage.nbytes()
    ((state,), others) = calls[0]
    return _Saved(tuple(totals[:-1]), totals[-1], state.detach(), others, _storage(state) in saved)


@contextmanager
def _run() -> Generator[None, None, None]:
    """For a forward on the meta device, of settings that no builder has looked at, as lora_alpha."""
    with warnings.catch_warnings(), _AttentionAsOnACard():
        warnings.simplefilter("ignore")  # about kernels that nothing here runs
        try:
            yield
        except (TypeError, ZeroDivisionError) as error:
            raise CommandError(f"the model cannot be run with its settings: {' '.join(str(error).split())}") from error


def _most_alive(layer: nn.Module, state: Tensor, others: dict) -> tuple[int, int]:
    """The most bytes alive in a layer's forward and backward, without its input, parameters and their gradients, but
    for one that is on its way; and of a forward that keeps nothing.
    """
    with torch.no_grad(), _Alive() as alive:
        layer(state, **others)
    unsaved = alive.most
    state = state.detach().requires_grad_()
    trained = [parameter for parameter in layer.parameters() if parameter.requires_grad]
    hooks = [parameter.register_post_accumulate_grad_hook(_forget_gradient) for parameter in trained]
    try:
        with _Alive() as alive:
            upstream = torch.empty_like(state)
            # Its output is the next layer's input, which is gone by the time of this one's backward.
            edge = torch.autograd.graph.get_gradient_edge(layer(state, **others))
            torch.autograd.backward(edge, upstream)
    finally:
        for hook, parameter in zip(hooks, trained, strict=True):
            hook.remove()
            parameter.grad = None
    return alive.most, unsaved


def _forget_gradient(parameter: nn.Parameter) -> None:
    parameter.grad = None


class _Alive(TorchDispatchMode):
    """Bytes of what operations make, while it is there: now and at most."""

    def __init__(self):
        super().__init__()
        self.now = self.most = 0
        self._made = {}

    def __torch_dispatch__(self, function, types, arguments=(), settings=None):
        given = tree_leaves((arguments, settings))
        results = function(*arguments, **(settings or {}))
        of_others = {_storage(tensor) for tensor in given if isinstance(tensor, Tensor)}
        for tensor in tree_leaves(results):
            if isinstance(tensor, Tensor) and _storage(tensor) not in of_others:
                self._add(tensor.untyped_storage())
        self.most = max(self.most, self.now)
        return results

    def _add(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self._made:
            return

        def is_gone(_):
            del self._made[key]
            self.now -= size

        self._made[key] = weakref.ref(storage, is_gone)
        self.now += size


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


class _FlashAttention(torch.autograd.Function):
    """Saves and allocates what FlashAttention does, and computes nothing."""

    @staticmethod
    def forward(ctx, query: Tensor, key: Tensor, value: Tensor) -> Tensor:  # [B, heads, S, D / heads]
        output = torch.empty_like(query)
        row_lse = torch.empty(query.shape[:-1], dtype=torch.float32, device=query.device)
        ctx.save_for_backward(query, key, value, output, row_lse)
        return output

    @staticmethod
    def backward(ctx, upstream: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        query, key, value, _, _ = ctx.saved_tensors
        # Alive until the end of this function, as the kernel's own.
        summed = torch.empty_like(query, dtype=torch.float32)
        gradients = tuple(torch.empty_like(x) for x in (query, key, value))
        del summed
        return gradients


class _AttentionAsOnACard(TorchFunctionMode):
    def __torch_function__(self, function, types, arguments=(), settings=None):
        if function is F.scaled_dot_product_attention:
            return _FlashAttention.apply(*arguments[:3])
        return function(*arguments, **(settings or {}))
