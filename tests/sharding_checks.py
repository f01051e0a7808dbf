"""What several processes check of models that FSDP2 shards, on meshes of one and two axes; each imports this."""

from collections import Counter
from contextlib import contextmanager
from functools import partial

import torch
import torch.distributed as dist
import torch.nn.functional as F
from fsdp_checks import relative_error
from tiny_models import VOCABULARY, build_model
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import CPUOffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torchtune.training import get_shard_conditions, scale_grads, shard_model
from vision_models import TOKENS_PER_TILE, build_deep_fusion, images

from torchtune_lce import LinearCrossEntropyLoss

IGNORED = -100
# The last two are their names before torch 2.13.
COLLECTIVES = {
    "all_gather_single": "gathers",
    "reduce_scatter_single": "reduce-scatters",
    "all_gather_into_tensor": "gathers",
    "reduce_scatter_tensor": "reduce-scatters",
}


def check_sharded(flat: DeviceMesh, hybrid: DeviceMesh) -> None:
    """``flat`` has one axis; ``hybrid`` has two: FSDP2 replicates over the first and shards over the second."""
    for tied in (True, False):
        for own_group in ([], ["tok_embeddings"], ["tok_embeddings", "output"]):
            _check_recipe_scaling(f"hybrid, tied {tied}, own group {own_group}", tied, hybrid, own_group)
        _check_recipe_scaling(f"flat, tied {tied}", tied, flat, [])
        _check_recipe_scaling(f"offloaded, tied {tied}", tied, flat, [], cpu_offload=True)
    for own_group in ([], ["decoder.tok_embeddings"]):
        _check_fusion(flat, own_group)
    _check_collectives(flat)
    _check_evaluation_leaves_parameters_sharded(flat)


def _batch(rank: int, index: int, device: str) -> tuple[Tensor, Tensor]:
    """As many labels as this rank has, from none at all (the last rank's second) to many."""
    generator = torch.Generator().manual_seed(2 * rank + index)
    tokens, targets = torch.randint(VOCABULARY, (2, 2, 9), generator=generator)
    targets[:, : 2 * rank + index] = IGNORED
    if rank == dist.get_world_size() - 1 and index == 1:
        targets.fill_(IGNORED)
    return tokens.to(device), targets.to(device)


def _sharded(tied: bool, mesh: DeviceMesh, own_group: list[str], cpu_offload: bool = False) -> nn.Module:
    model = build_model(tied)
    if not cpu_offload:
        model.to(mesh.device_type)
    elif mesh.device_type == "cpu":
        # As shard_model does it, but that pins memory, which needs a card.
        for module in (*model.layers, model):
            fully_shard(module, mesh=mesh, offload_policy=CPUOffloadPolicy(pin_memory=False))
        return model
    conditions = [partial(get_shard_conditions, names_to_match=own_group)]
    shard_model(model, conditions, cpu_offload=cpu_offload, reshard_after_forward=True, dp_mesh=mesh)
    return model


def _check_recipe_scaling(
    case: str, tied: bool, mesh: DeviceMesh, own_group: list[str], cpu_offload: bool = False
) -> None:
    """Gradients of the mean over every rank's labels, as torchtune's recipes get them from each rank's own means."""
    ranks, device = dist.get_world_size(), mesh.device_type
    loss = LinearCrossEntropyLoss(impl="reference")
    single = build_model(tied).to(device)
    loss.set_model_output(single)
    batches = [_batch(rank, index, device) for rank in range(ranks) for index in range(2)]
    labels = sum(int((targets != IGNORED).sum()) for _, targets in batches)
    for tokens, targets in batches:
        (loss(single(tokens), targets) * (targets != IGNORED).sum() / labels).backward()

    model = _sharded(tied, mesh, own_group, cpu_offload)
    loss.set_model_output(model)
    for index in range(2):
        tokens, targets = _batch(dist.get_rank(), index, device)
        (loss(model(tokens), targets) * (targets != IGNORED).sum()).backward()
    scale_grads(model, torch.tensor(ranks / labels))
    for (name, parameter), expected in zip(model.named_parameters(), single.parameters(), strict=True):
        assert isinstance(parameter, DTensor), f"{case}: {name} was left unsharded"
        error = relative_error(parameter.grad.full_tensor().to(device), expected.grad)
        assert error < 1e-6, f"{case}, {name}: relative error {error}"


def _check_fusion(mesh: DeviceMesh, own_group: list[str]) -> None:
    """Llama 3.2 Vision, whose head lies in a decoder that is no shard group; every rank has the same batch."""
    case, device = f"fusion, own group {own_group}", mesh.device_type
    tokens, targets = _batch(0, 0, device)
    # Special tokens of images, which embed and are never predicted.
    tokens[0, :8] = VOCABULARY + torch.arange(8)
    inputs = {
        "encoder_input": {name: value.to(device) for name, value in images(len(tokens)).items()},
        "encoder_mask": torch.ones(*tokens.shape, TOKENS_PER_TILE, dtype=torch.bool, device=device),
    }
    loss = LinearCrossEntropyLoss(impl="chunked")
    single = build_deep_fusion(decoder_trainable=True).to(device)
    loss.set_model_output(single)
    loss(single(tokens, **inputs), targets).backward()
    model = build_deep_fusion(decoder_trainable=True).to(device)
    conditions = [partial(get_shard_conditions, names_to_match=own_group)]
    shard_model(model, conditions, cpu_offload=False, reshard_after_forward=True, dp_mesh=mesh)
    loss.set_model_output(model)
    loss(model(tokens, **inputs), targets).backward()
    for (name, parameter), expected in zip(model.named_parameters(), single.parameters(), strict=True):
        assert expected.grad.any(), f"{case}: {name} has no gradient"
        error = relative_error(parameter.grad.full_tensor(), expected.grad)
        assert error < 1e-6, f"{case}, {name}: relative error {error}"


def _check_collectives(mesh: DeviceMesh) -> None:
    """For a head in the root's group: no more gathers than torchtune's own loss needs, nor do statistics.

    One reduce-scatter more where the embedding, whose gradient comes last, is not the head itself.
    """
    tokens, targets = _batch(0, 0, mesh.device_type)

    def stock(model: nn.Module) -> Tensor:
        return F.cross_entropy(model(tokens).flatten(0, 1), targets.flatten())

    loss = LinearCrossEntropyLoss(impl="chunked")
    for tied in (True, False):
        model = _sharded(tied, mesh, [])
        assert _collectives(model, stock) == {"gathers": 6, "reduce-scatters": 3}
        loss.set_model_output(model)
        for loss.after_batch in (None, lambda compute, targets: compute()):
            ours = _collectives(model, lambda model: loss(model(tokens), targets))
            assert ours == {"gathers": 6, "reduce-scatters": 3 if tied else 4}


def _collectives(model: nn.Module, forward) -> dict[str, int]:
    """Of the second of two micro-batches: the first one also sets FSDP2 up."""
    for _ in range(2):
        with counting() as count:
            forward(model).backward()
    return dict(count)


@contextmanager
def counting():
    """Counts what FSDP2 calls, from whatever thread the backward runs in."""
    count = Counter()
    functions = {name: getattr(dist, name) for name in COLLECTIVES if hasattr(dist, name)}

    def counted(name: str):
        def call(*arguments, **settings):
            count[COLLECTIVES[name]] += 1
            return functions[name](*arguments, **settings)

        return call

    for name in functions:
        setattr(dist, name, counted(name))
    try:
        yield count
    finally:
        for name, function in functions.items():
            setattr(dist, name, function)


def _check_evaluation_leaves_parameters_sharded(mesh: DeviceMesh) -> None:
    """As torchtune's setting promises, though the root keeps its parameters from forward to loss."""
    model = _sharded(True, mesh, [])
    loss = LinearCrossEntropyLoss(impl="chunked")
    loss.set_model_output(model)
    tokens, targets = _batch(0, 0, mesh.device_type)
    with torch.no_grad():
        loss(model(tokens), targets)
    unsharded = [name for name, parameter in model.named_parameters() if not isinstance(parameter, DTensor)]
    assert not unsharded
