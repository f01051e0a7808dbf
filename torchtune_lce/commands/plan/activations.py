"""What the forward of a model keeps for its backward, counted on the meta device: nothing is loaded or computed.

The count is of the distinct tensors that autograd saves, so it holds for every model that torchtune builds. Attention
is the exception: it is counted as FlashAttention saves it (queries, keys, values, output and a float32 log-sum-exp a
row and head; Dao 2023, arXiv 2307.08691), which is what runs on a card; the meta device would save all scores.
"""

import warnings
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from omegaconf import DictConfig
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torchtune import training
from torchtune.modules import FeedForward, TransformerDecoder
from torchtune.modules.peft import get_adapter_params, set_trainable_params

from torchtune_lce.commands.shared.errors import CommandError
from torchtune_lce.commands.shared.random_weights import configured_model
from torchtune_lce.model.model_output import find_decoder, skip_output_layer


@dataclass(frozen=True)
class Activations:
    """Bytes that one forward of a batch saves, without the output projection and the loss.

    ``layers``: of each decoder layer, in their order; ``outside``: before, between and after them; ``largest``: the
    largest single tensor; ``layer_input``: what a checkpointed layer keeps in place of its own; ``kept_product``: that
    of a gated MLP's factors, where its layer saves it, as the last projection's input is where that trains; else 0.
    """

    layers: tuple[int, ...]
    outside: int
    largest: int
    layer_input: int
    kept_product: int

    def times(self, rows: int) -> "Activations":
        """Of as many times the rows; what does not depend on them, masks and the like, is nothing beside the rest."""
        layers = tuple(rows * value for value in self.layers)
        return replace(
            self,
            layers=layers,
            outside=rows * self.outside,
            largest=rows * self.largest,
            layer_input=rows * self.layer_input,
            kept_product=rows * self.kept_product,
        )


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


def count(model: nn.Module, batch: int, sequence: int) -> Activations:
    """Of a model that :func:`build` made, for ``batch`` rows of ``sequence`` tokens."""
    decoder = find_decoder(model)
    not_activations = {_storage(tensor) for tensor in (*model.parameters(), *model.buffers())}
    saved: dict[int, tuple[torch.UntypedStorage, int]] = {}  # the storage itself too: a freed one's number is reused
    where = [0]  # the layer that runs, or the number of layers
    outside = len(decoder.layers)
    where[0] = outside

    def pack(tensor: Tensor) -> Tensor:
        storage = _storage(tensor)
        if storage not in not_activations and storage not in saved:
            saved[storage] = (tensor.untyped_storage(), where[0])
        return tensor

    hooks, products = [], []
    for module in decoder.modules():
        if isinstance(module, FeedForward):
            hooks.append(module.w2.register_forward_pre_hook(lambda _, inputs: products.append(inputs[0])))
    for index, layer in enumerate(decoder.layers):
        hooks.append(layer.register_forward_pre_hook(lambda *_, index=index: where.__setitem__(0, index)))
        hooks.append(layer.register_forward_hook(lambda *_: where.__setitem__(0, outside)))
    skipped = skip_output_layer(model)
    tokens = torch.zeros(batch, sequence, dtype=torch.int64, device="meta")
    try:
        with (
            warnings.catch_warnings(),
            _AttentionAsOnACard(),
            torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor),
        ):
            warnings.simplefilter("ignore")  # about kernels that nothing here runs
            hidden = model(tokens)
    except (TypeError, ZeroDivisionError) as error:  # of a setting that no builder looks at, as lora_alpha
        raise CommandError(f"the model cannot be run with its settings: {' '.join(str(error).split())}") from error
    finally:
        skipped.restore()
        for hook in hooks:
            hook.remove()
    totals = [0] * (outside + 1)
    for storage, index in saved.values():
        totals[index] += storage.nbytes()
    largest = max((storage.nbytes() for storage, _ in saved.values()), default=0)
    kept_product = max((product.nbytes for product in products if _storage(product) in saved), default=0)
    return Activations(tuple(totals[:-1]), totals[-1], largest, hidden.nbytes, kept_product)


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


class _FlashAttention(torch.autograd.Function):
    """Saves what FlashAttention saves, and computes nothing."""

    @staticmethod
    def forward(ctx, query: Tensor, key: Tensor, value: Tensor) -> Tensor:  # [B, heads, S, D / heads]
        output = torch.empty_like(query)
        row_lse = torch.empty(query.shape[:-1], dtype=torch.float32, device=query.device)
        ctx.save_for_backward(query, key, value, output, row_lse)
        return output

    @staticmethod
    def backward(ctx, upstream: Tensor):
        raise RuntimeError("tune-lce plan counts what a forward saves and has no backward, but one was called")


class _AttentionAsOnACard(TorchFunctionMode):
    def __torch_function__(self, function, types, arguments=(), settings=None):
        if function is F.scaled_dot_product_attention:
            return _FlashAttention.apply(*arguments[:3])
        return function(*arguments, **(settings or {}))
